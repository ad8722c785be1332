"""One text per thing: canonical forms of formulas, SMILES, mixtures and structures, and the keys that compare them.

Knows: how chemistry's own parsers read a cell, once for each distinct cell. Refuses to know: tables, sites and files.
Parsers' messages and warnings repeat the cell they stumbled over; none of them gets out of here.

References:
    Composition: S. P. Ong et al., "Python Materials Genomics (pymatgen)", Comput. Mater. Sci. 68 (2013) 314.
    Canonical SMILES: D. Weininger, A. Weininger, J. L. Weininger, J. Chem. Inf. Comput. Sci. 29 (1989) 97, as RDKit
    implements it.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from fedmat.files import canonical_json

MIXTURE_TOLERANCE = 0.03  # |sum of fractions - 1|: published ratios are rounded (1:1:1 as 0.33), more is a missing component
_FRACTION_DECIMALS = 6
_KEY_DECIMALS = 5  # 10 ppm of atoms: below what a synthesis controls
_MAX_TEXT = 500

Canonical = Callable[[str], "str | None"]


@functools.lru_cache(maxsize=65536)
def formula(text: str) -> str | None:
    """Returns the reduced formula with fractional amounts kept, or None when ``text`` is no chemical formula.

    >>> formula("Li7.0Bi1.0O6.0"), formula("Li1.3Al0.3Ti1.7(PO4)3"), formula("Unobtainium")
    ('Li7BiO6', 'Li1.3Ti1.7Al0.3P3O12', None)
    """
    reduced = _reduced(text)
    # the text must mean the same when it is read again: featurizers see only the text
    return reduced if reduced and _reduced(reduced) and formula_key(reduced) == formula_key(text) else None


def _reduced(text: str) -> str | None:
    composition = _composition(text)
    return None if composition is None else str(composition.reduced_formula)


@functools.lru_cache(maxsize=65536)
def formula_key(text: str) -> str:
    """Returns a key that is equal for formulas of one composition, whatever their scale, order or notation."""
    composition = _composition(text)
    if composition is None:
        return ""
    total = composition.num_atoms
    amounts = composition.get_el_amt_dict()
    # twice rounded: the first time takes off what the scale left in the last bits, so that no tie is broken by it
    return " ".join(f"{e}:{round(round(a / total, 10), _KEY_DECIMALS)}" for e, a in sorted(amounts.items()))


def _composition(text: str) -> Any:
    from pymatgen.core import Composition, Element

    if not text or len(text) > _MAX_TEXT:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            composition = Composition(text)
            # H stands for its isotopes; a dummy species (X, Vac) is no element
            known = all(isinstance(getattr(e, "element", e), Element) for e in composition)
            return composition if known and math.isfinite(composition.num_atoms) and composition.num_atoms > 0 else None
    except Exception:  # noqa: BLE001  the parser answers a bad formula with any kind of error, with the formula in its text
        return None


@functools.lru_cache(maxsize=65536)
def smiles(text: str) -> str | None:
    """Returns RDKit's canonical SMILES, or None when ``text`` is not one molecule that RDKit can build.

    >>> smiles("OCC"), smiles("C1CC")
    ('CCO', None)
    """
    from rdkit import Chem, rdBase

    if not text or len(text) > 8 * _MAX_TEXT:
        return None
    with rdBase.BlockLogs():  # RDKit prints the SMILES it cannot read
        try:
            molecule = Chem.MolFromSmiles(text)
            if molecule is None or molecule.GetNumAtoms() == 0:
                return None
            return str(Chem.MolToSmiles(molecule)) or None
        except Exception:  # noqa: BLE001  Boost.Python errors, with the SMILES in their text
            return None


@functools.lru_cache(maxsize=65536)
def mixture(text: str) -> str | None:
    """Returns ``{"component": fraction}`` sorted by name with fractions that sum to one, or None when it is no mixture.

    Components of amount zero are left out. Fractions are divided by their sum when it is one within
    :data:`MIXTURE_TOLERANCE`; any other sum is refused, for then a component is missing or the unit is wrong.

    >>> mixture('{"EMC": 0.66, "EC": 0.33}')
    '{"EC":0.333333,"EMC":0.666667}'
    >>> mixture('{"EC": 30, "EMC": 70}') is None
    True
    """
    try:
        pairs = json.loads(text, object_pairs_hook=list)
        if not text.lstrip().startswith("{"):
            return None
        amounts: dict[str, float] = {}
        for name, amount in pairs:
            label = str(name).strip()
            if isinstance(amount, bool) or not isinstance(amount, int | float) or not label or label in amounts:
                return None
            if not math.isfinite(amount) or amount < 0:
                return None
            amounts[label] = float(amount)
    except (ValueError, TypeError, OverflowError):
        return None
    total = math.fsum(amounts.values())
    if not amounts or abs(total - 1.0) > MIXTURE_TOLERANCE + 1e-9:
        return None
    amounts = {name: amounts[name] for name in sorted(amounts) if amounts[name] / total >= 10.0**-_FRACTION_DECIMALS}
    if not _rounded_already(amounts):
        total = math.fsum(amounts.values())
        amounts = {name: round(amount / total, _FRACTION_DECIMALS) for name, amount in amounts.items()}
    return canonical_json(amounts).decode()


def _rounded_already(amounts: Mapping[str, float]) -> bool:
    """Tells whether fractions are as :func:`mixture` leaves them; dividing those again would move their last digit."""
    noise = 0.5 * len(amounts) * 10.0**-_FRACTION_DECIMALS + 1e-9
    rounded = all(round(amount, _FRACTION_DECIMALS) == amount for amount in amounts.values())
    return rounded and abs(math.fsum(amounts.values()) - 1.0) <= noise


@functools.lru_cache(maxsize=4096)
def structure(text: str) -> str | None:
    """Returns a structure's JSON, or None when ``text`` is not exactly one crystal structure (CIF or pymatgen JSON)."""
    from fedmat.data import structures

    parsed = structures.parse(text)
    return None if parsed is None else parsed[1]


def number_key(value: float) -> float | None:
    """Returns ``value`` to ten significant digits, None for an absent one: two conversions of one value are equal."""
    return None if math.isnan(value) else float(f"{value:.10g}") + 0.0


CANONICAL: Mapping[str, tuple[str, Canonical]] = {
    "formula": ("bad_formula", formula),
    "smiles": ("bad_smiles", smiles),
    "mixture": ("bad_mixture", mixture),
    "structure": ("bad_structure", structure),
}
