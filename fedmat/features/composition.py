"""Features of a chemical formula: Magpie statistics of elemental properties and a few electrolyte-minded extras.

Knows: formulas, through pymatgen, and Magpie's element table, through matminer. Refuses to know: structure, conditions.

Columns (``formula.`` prefix, 132 + 16, + one per element asked for):

* ``magpie.<statistic>.<property>``: minimum, maximum, range, mean, average deviation and mode of 22 elemental
  properties over the atoms [Ward2016]_, computed by matminer [Ward2018]_ without imputing.
* ``n_elements``, ``mixing_entropy``: number of elements; ``-sum x ln x`` over atomic fractions (in units of R).
* ``fraction_<E>``: atomic fraction of Li, H, O, S, Se, N, F, Cl, Br, I: the mobile ion and what surrounds it.
* ``anion_fraction``: atoms of N, O, S, Se, Te, F, Cl, Br, I per atom.
* ``li_per_anion``: Li atoms per anion atom; 0 without anions.
* ``electronegativity_gap``: mean Pauling electronegativity of those anions minus that of all other atoms; 0 when
  either is absent.
* ``framework_mass``: mean atomic mass (g/mol) of atoms other than Li, a measure of lattice softness; 0 for pure Li.

A formula is reduced to atomic fractions first, so Li2O and Li4O2 give the same numbers.

References:
    Ward2016: L. Ward, A. Agrawal, A. Choudhary, C. Wolverton, "A general-purpose machine learning framework for
    predicting properties of inorganic materials", npj Comput. Mater. 2, 16028 (2016), doi:10.1038/npjcompumats.2016.28.
    Ward2018: L. Ward et al., "Matminer: An open source toolkit for materials data mining", Comput. Mater. Sci. 152,
    60 (2018), doi:10.1016/j.commatsci.2018.05.018.
    Ong2013: S. P. Ong et al., "Python Materials Genomics (pymatgen)", Comput. Mater. Sci. 68, 314 (2013),
    doi:10.1016/j.commatsci.2012.10.028.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pandas as pd

from fedmat.data.contract import RecordType
from fedmat.errors import ConfigError
from fedmat.features.common import Array, check_options, field_of_kind, per_distinct, text_list, texts
from fedmat.features.table import Featurizer

PROPERTIES = (
    "Number", "MendeleevNumber", "AtomicWeight", "MeltingT", "Column", "Row", "CovalentRadius", "Electronegativity",
    "NsValence", "NpValence", "NdValence", "NfValence", "NValence", "NsUnfilled", "NpUnfilled", "NdUnfilled", "NfUnfilled",
    "NUnfilled", "GSvolume_pa", "GSbandgap", "GSmagmom", "SpaceGroupNumber",
)  # fmt: skip
STATISTICS = ("minimum", "maximum", "range", "mean", "avg_dev", "mode")
ANIONS = ("N", "O", "S", "Se", "Te", "F", "Cl", "Br", "I")
FRACTIONS = ("Li", "H", "O", "S", "Se", "N", "F", "Cl", "Br", "I")


@dataclass(frozen=True)
class CompositionFeatures(Featurizer):
    """Magpie statistics plus extras of one formula field.

    Attributes:
        field: the formula field.
        elements: symbols whose atomic fraction becomes a column of its own, beyond the ten that always are.
    """

    name = "composition"
    version = "1"
    citations = (
        "Ward et al., npj Comput. Mater. 2, 16028 (2016), doi:10.1038/npjcompumats.2016.28",
        "Ward et al., Comput. Mater. Sci. 152, 60 (2018), doi:10.1016/j.commatsci.2018.05.018",
        "Ong et al., Comput. Mater. Sci. 68, 314 (2013), doi:10.1016/j.commatsci.2012.10.028",
    )
    libraries = ("matminer", "pymatgen-core")

    field: str = "formula"
    elements: tuple[str, ...] = ()

    @classmethod
    def of(cls, options: Mapping[str, Any], rt: RecordType, target: str) -> CompositionFeatures:
        """Returns the featurizer for options ``field`` and ``elements``.

        Raises:
            ConfigError: an unknown option or element, or the record type has no formula.
        """
        check_options(cls.name, options, ("field", "elements"))
        elements = text_list(cls.name, options, "elements", ())
        if elements:
            from pymatgen.core import Element

            for symbol in elements:
                if not Element.is_valid_symbol(symbol) or symbol in FRACTIONS:
                    raise ConfigError(
                        f"features: option 'elements' of composition: '{symbol}' is no element or always included",
                        fix="list further element symbols, e.g. [La, Zr]",
                    )
        return cls(field_of_kind(cls.name, options, rt, "formula").name, elements)

    @property
    def names(self) -> tuple[str, ...]:
        """Column names, see the module's description."""
        own = (
            *(f"magpie.{statistic}.{prop}" for prop in PROPERTIES for statistic in STATISTICS),
            "n_elements", "mixing_entropy",
            *(f"fraction_{symbol}" for symbol in (*FRACTIONS, *self.elements)),
            "anion_fraction", "li_per_anion", "electronegativity_gap", "framework_mass",
        )  # fmt: skip
        return tuple(f"{self.field}.{n}" for n in own)

    @property
    def needs(self) -> tuple[str, ...]:
        """The formula field."""
        return (self.field,)

    def transform(self, records: pd.DataFrame) -> Array:
        """Returns features, shape ``n x len(names)``; every distinct formula is computed once.

        Raises:
            FeatureError: a formula cannot be parsed or holds an element without Magpie data; names field and row.
        """
        return per_distinct(
            records, [texts(records, self.field, self.name)], len(self.names), self._one, f"composition: field '{self.field}'"
        )

    def _one(self, text: str) -> list[float]:
        fractions = atomic_fractions(text)
        from pymatgen.core import Composition

        magpie = [float(v) for v in _magpie().featurize(Composition(fractions))]
        if not all(map(math.isfinite, magpie)):
            raise ValueError("the formula holds an element for which Magpie has no data")
        return magpie + self._extras(fractions)

    def _extras(self, fractions: dict[str, float]) -> list[float]:
        anions = {e: x for e, x in fractions.items() if e in ANIONS}
        others = {e: x for e, x in fractions.items() if e not in ANIONS}
        frame = {e: x for e, x in fractions.items() if e != "Li"}
        return [
            float(len(fractions)),
            -sum(x * math.log(x) for x in fractions.values()),
            *(fractions.get(e, 0.0) for e in (*FRACTIONS, *self.elements)),
            sum(anions.values()),
            fractions.get("Li", 0.0) / sum(anions.values()) if anions else 0.0,
            _mean("Electronegativity", anions) - _mean("Electronegativity", others) if anions and others else 0.0,
            _mean("AtomicWeight", frame) if frame else 0.0,
        ]


def _mean(prop: str, fractions: Mapping[str, float]) -> float:
    from pymatgen.core import Element

    table = _magpie().data_source
    weighted = sum(x * float(table.get_elemental_property(Element(e), prop)) for e, x in fractions.items())
    return weighted / sum(fractions.values())


def atomic_fractions(formula: str) -> dict[str, float]:
    """Returns element symbol -> atomic fraction in order of atomic number, rounded to 12 digits; sums to one.

    Raises:
        ValueError: pymatgen cannot read the formula, or it is empty; the message does not repeat it.
    """
    from pymatgen.core import Composition, Element

    try:
        amounts = Composition(formula).element_composition.get_el_amt_dict()
        by_number: dict[int, float] = {}
        for symbol, amount in amounts.items():
            by_number[Element(symbol).Z] = by_number.get(Element(symbol).Z, 0.0) + amount  # deuterium counts as hydrogen
    except Exception:  # noqa: BLE001  pymatgen raises ValueError, KeyError, TypeError and others, all quoting the cell
        raise ValueError("pymatgen cannot read the formula") from None
    total = sum(by_number.values())
    if not 0 < total < math.inf:
        raise ValueError("the formula holds no elements")
    return {Element.from_Z(z).symbol: round(by_number[z] / total, 12) for z in sorted(by_number) if by_number[z] > 0}


@cache
def _magpie() -> Any:
    """Magpie as matminer computes it, without imputing elements it has no data for."""
    from matminer.featurizers.composition import ElementProperty

    return ElementProperty.from_preset("magpie", impute_nan=False)
