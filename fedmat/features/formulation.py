"""Features of a liquid electrolyte: what its solvents are on average, its anion, how much salt, how warm.

Knows: mixtures of named solvents and a salt. Refuses to know: which names occurred in training. There is no column per
solvent: a mixture is described by molecular properties, so a solvent that no site has trained on is a point between or
near known ones, and every mixture statistic stays within the range of its components.

Columns:

* ``solvent.<statistic>.<descriptor>`` for the 20 descriptors of ``fedmat.features.molecule`` and the density:
  ``mean`` (by mole fraction), ``wmean`` (by weight fraction), ``spread`` (standard deviation by mole fraction),
  ``min`` and ``max`` over the components present.
* ``anion.<descriptor>`` and ``cation.exact_mass`` (g/mol) of the salt.
* ``molality`` (mol salt per kg solvent), ``molarity`` (mol per litre of solvent), their square roots, ``salt_ratio``
  (mol salt per mol solvent).
* ``1000/T``, ``molality*1000/T``.

Fractions by weight, volume or mole and amounts per kg or litre are brought to one basis with molar masses (RDKit) and
ideal mixing of the densities in ``fedmat.features.solvents``. "Per litre" is read as per litre of *solvent*: the salt's own
volume, some 4 % per mol/L, is neglected. So is thermal expansion.

References:
    RDKit: G. Landrum et al., https://www.rdkit.org. CALiSol-23: doi:10.1038/s41597-024-03575-8.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pandas as pd

from fedmat.data.contract import RecordType
from fedmat.errors import ConfigError, FeatureError
from fedmat.features.common import Array, check_options, column, nearest, numbers, per_distinct, row_name, texts
from fedmat.features.molecule import DESCRIPTORS, descriptors, molecule
from fedmat.features.solvents import SALTS, SOLVENTS, SYNONYMS
from fedmat.features.table import Featurizer

STATISTICS = ("mean", "wmean", "spread", "min", "max")
SOLVENT_DESCRIPTORS = (*DESCRIPTORS, "density_g_ml")
AMOUNTS = ("molality", "molarity", "sqrt(molality)", "sqrt(molarity)", "salt_ratio", "1000/T", "molality*1000/T")
FIELDS = ("salt", "concentration", "concentration_basis", "solvents", "solvent_basis", "temperature_k")
_MIXTURE = len(STATISTICS) * len(SOLVENT_DESCRIPTORS)
_STATIC = _MIXTURE + len(DESCRIPTORS) + 1


@dataclass(frozen=True)
class FormulationFeatures(Featurizer):
    """Mixture statistics, anion, amounts and temperature of a liquid electrolyte.

    Attributes:
        solvents: further solvents, (name, SMILES, density in g/mL at 25 C).
        salts: further salts, (name, SMILES of cation and anion).
    """

    name = "formulation"
    version = "1"
    citations = ("RDKit: Open-source cheminformatics, https://www.rdkit.org",)
    libraries = ("rdkit",)

    solvents: tuple[tuple[str, str, float], ...] = ()
    salts: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, options: Mapping[str, Any], rt: RecordType, target: str) -> FormulationFeatures:
        """Returns the featurizer for options ``solvents: {name: {smiles, density_g_ml}}`` and ``salts: {name: smiles}``.

        Raises:
            ConfigError: an unknown option, an unreadable SMILES, or a density outside 0.3 to 5 g/mL.
        """
        check_options(cls.name, options, ("solvents", "salts"))
        solvents, salts = [], []
        for name, entry in _table(options, "solvents").items():
            if not isinstance(entry, Mapping) or set(entry) != {"smiles", "density_g_ml"}:
                raise ConfigError(
                    f"features: solvent '{name}' of formulation needs smiles and density_g_ml, nothing else",
                    fix=f"{name}: {{smiles: CCO, density_g_ml: 0.79}}",
                )
            density = entry["density_g_ml"]
            if isinstance(density, bool) or not isinstance(density, int | float) or not 0.3 <= density <= 5.0:
                raise ConfigError(
                    f"features: density_g_ml of solvent '{name}' must be between 0.3 and 5 g/mL",
                    fix="give the density near 25 C",
                )
            solvents.append((name, str(entry["smiles"]), float(density)))
        for name, entry in _table(options, "salts").items():
            salts.append((name, str(entry)))
        chosen = cls(tuple(solvents), tuple(salts))
        try:
            for _, smiles, _ in chosen.solvents:
                descriptors(smiles)
            for _, smiles in chosen.salts:
                _ions(smiles)
        except ValueError as error:
            raise ConfigError(
                f"features: a solvent or salt in the options of formulation: {error}", fix="correct its SMILES"
            ) from None
        return chosen

    @property
    def names(self) -> tuple[str, ...]:
        """Column names, see the module's description."""
        return (
            *(f"solvent.{s}.{d}" for s in STATISTICS for d in SOLVENT_DESCRIPTORS),
            *(f"anion.{d}" for d in DESCRIPTORS), "cation.exact_mass", *AMOUNTS,
        )  # fmt: skip

    @property
    def needs(self) -> tuple[str, ...]:
        """The fields of a liquid electrolyte but its conductivity and source."""
        return FIELDS

    def transform(self, records: pd.DataFrame) -> Array:
        """Returns features, shape ``n x len(names)``; every distinct salt and mixture is computed once.

        Raises:
            FeatureError: an unknown solvent, salt or basis, an unreadable mixture, an amount or temperature that is no
                positive number; names field and row.
        """
        mixture = mixture_texts(records, "solvents", self.name)
        basis = texts(records, "solvent_basis", self.name)
        salt = texts(records, "salt", self.name)
        about = f"{self.name}: field "
        solvent = per_distinct(records, [mixture, basis], _MIXTURE + 2, self._mixture, f"{about}'solvents'")
        ions = per_distinct(records, [salt], len(DESCRIPTORS) + 1, self._salt, f"{about}'salt'")
        density, molar_mass = solvent[:, _MIXTURE], solvent[:, _MIXTURE + 1]  # g/mL, g/mol

        amount = numbers(records, "concentration", self.name)
        self._refuse(records, "concentration", amount < 0, "negative")
        unit = texts(records, "concentration_basis", self.name).to_numpy()
        self._refuse(records, "concentration_basis", ~np.isin(unit, ["mol/kg", "mol/l"]), "neither mol/kg nor mol/l")
        molality = np.where(unit == "mol/kg", amount, amount / density)  # mol/L over kg/L
        molarity = np.where(unit == "mol/kg", amount * density, amount)
        kelvin = numbers(records, "temperature_k", self.name)
        self._refuse(records, "temperature_k", kelvin <= 0, "not above 0 K")
        inverse = 1000.0 / kelvin
        amounts = [
            molality, molarity, np.sqrt(molality), np.sqrt(molarity), molality * molar_mass / 1000.0, inverse, molality * inverse,
        ]  # fmt: skip
        return np.concatenate([solvent[:, :_MIXTURE], ions, np.column_stack(amounts)], axis=1)

    def _refuse(self, records: pd.DataFrame, field: str, bad: np.ndarray[Any, Any], what: str) -> None:
        if bad.any():
            raise FeatureError(
                f"{self.name}: field '{field}' is {what} in {int(bad.sum())} record(s), first in "
                f"{row_name(records, int(np.argmax(bad)))}",
                fix="correct or remove those records",
            )

    @cached_property
    def _solvents(self) -> dict[str, tuple[str, float]]:
        table = {_key(n): (s.smiles, s.density_g_ml) for n, s in SOLVENTS.items()}
        table |= {_key(alias): table[_key(n)] for alias, n in SYNONYMS.items() if _key(n) in table}
        return table | {_key(n): (smiles, density) for n, smiles, density in self.solvents}

    @cached_property
    def _salts(self) -> dict[str, str]:
        table = {_key(n): smiles for n, smiles in SALTS.items()}
        table |= {_key(alias): table[_key(n)] for alias, n in SYNONYMS.items() if _key(n) in table}
        return table | {_key(n): smiles for n, smiles in self.salts}

    def _mixture(self, text: str, basis: str) -> Array:
        parts: dict[tuple[str, float], float] = {}
        for name, fraction in read_mixture(text).items():
            if _key(name) not in self._solvents:
                raise ValueError("the mixture names a solvent that is not in the table; add it to options.solvents")
            entry = self._solvents[_key(name)]
            parts[entry] = parts.get(entry, 0.0) + fraction  # two names of one solvent are one component
        order = sorted(parts)  # sums do not depend on the order of components
        values = np.array([(*_molecule(smiles), density) for smiles, density in order])
        given = np.array([parts[e] for e in order])
        mass, density = values[:, 0], values[:, -1]
        moles = {"mol": given, "w": given / mass, "v": given * density / mass}.get(basis)
        if moles is None:
            raise ValueError("field 'solvent_basis' is none of w, v, mol")
        x = moles / moles.sum()
        w = x * mass / (x * mass).sum()
        mean = x @ values
        spread = np.sqrt(np.maximum(x @ (values - mean) ** 2, 0.0))
        ideal_density = 1.0 / float((w / density).sum())  # volumes add
        statistics = np.concatenate([mean, w @ values, spread, values.min(axis=0), values.max(axis=0)])
        return np.concatenate([statistics, [ideal_density, float(mean[0])]])

    def _salt(self, name: str) -> Array:
        if _key(name) not in self._salts:
            raise ValueError("the salt is not in the table; add it to options.salts")
        anion, cation_mass = _ions(self._salts[_key(name)])
        return np.array([*anion, cation_mass])


def read_mixture(text: str) -> dict[str, float]:
    """Returns component -> fraction of a mixture's JSON text, fractions divided by their sum; repeated names add up.

    Raises:
        ValueError: not a JSON object of positive finite numbers.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, float]:
        out: dict[str, float] = {}
        for name, fraction in items:
            if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction < math.inf:
                raise ValueError("a fraction of the mixture is not a number of zero or more")
            out[name.strip()] = out.get(name.strip(), 0.0) + float(fraction)
        return out

    try:
        parsed = json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError:
        raise ValueError('the mixture is not JSON like {"EC": 0.5, "DMC": 0.5}') from None
    total = sum(parsed.values()) if isinstance(parsed, dict) else 0.0
    if total <= 0:
        raise ValueError("the mixture has no components")
    return {name: fraction / total for name, fraction in parsed.items() if fraction > 0}


def mixture_texts(records: pd.DataFrame, field: str, featurizer: str) -> pd.Series[str]:
    """Returns a mixture column as JSON text; a cell may already be a dict (raw records for prediction)."""
    cells = column(records, field, featurizer)
    return cells.map(lambda c: json.dumps(c, sort_keys=True) if isinstance(c, Mapping) else "" if c is None else str(c))


def _table(options: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = options.get(key, {})
    if not isinstance(value, Mapping) or not all(isinstance(n, str) for n in value):
        raise ConfigError(
            f"features: option '{key}' of formulation must map names to structures", fix=nearest(key, ["solvents", "salts"])
        )
    return value


def _key(name: str) -> str:
    return name.strip().casefold()


@lru_cache(maxsize=1024)
def _molecule(smiles: str) -> tuple[float, ...]:
    return tuple(descriptors(smiles))


@lru_cache(maxsize=256)
def _ions(smiles: str) -> tuple[tuple[float, ...], float]:
    """Returns the anion's descriptors and the cation's molar mass (g/mol) of a salt given as dot-separated ions."""
    from rdkit import Chem
    from rdkit.Chem import rdMolDescriptors

    ions = Chem.GetMolFrags(molecule(smiles), asMols=True)
    anions = [m for m in ions if Chem.GetFormalCharge(m) < 0]
    cations = [m for m in ions if Chem.GetFormalCharge(m) > 0]
    if len(anions) != 1 or len(cations) < 1 or len(ions) != len(anions) + len(cations):
        raise ValueError("a salt needs one anion and its cations as ions, e.g. [Li+].F[B-](F)(F)F")
    return tuple(descriptors(Chem.MolToSmiles(anions[0]))), float(rdMolDescriptors.CalcExactMolWt(cations[0]))
