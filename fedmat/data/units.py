"""Units of measurement: what laboratories write, understood by pint, converted to the contract's unit.

Knows: the spellings found in laboratory files (``S cm-1``, ``wt%``, ``mil``, ``log10(S/cm)``) and offset temperatures.
Refuses to know: fields, files and what a number stands for. There is no default unit: nothing is converted without one.

References:
    pint: https://pint.readthedocs.io; BIPM, "The International System of Units", 9th edition, 2019.
"""

from __future__ import annotations

import difflib
import functools
import re
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedmat.errors import ConfigError

# spellings pint does not know, or reads as something no laboratory means
_ALIASES = {
    "wt%": "percent",
    "wt.%": "percent",
    "w%": "percent",
    "mass%": "percent",
    "at%": "percent",
    "at.%": "percent",
    "mol%": "percent",
    "mol.%": "percent",
    "vol%": "percent",
    "vol.%": "percent",
    "wppm": "ppm",
    "mil": "thou",  # pint reads 'mil' as a plain thousandth
    "mils": "thou",
    "℃": "degC",
    "℉": "degF",
    "deg C": "degC",
    "deg F": "degF",
    "degree C": "degC",
    "mho": "siemens",
    "HV": "dimensionless",
    "-": "dimensionless",
    "1": "dimensionless",
}
_HINTS = {
    "C": "C is the coulomb; write degC for degrees Celsius",
    "F": "F is the farad; write degF for degrees Fahrenheit",
    "M": "M is mol/l",
    "m": "m is the metre; write mol/kg for molal",
}
_LOGARITHM = re.compile(r"^(log10|log|lg|ln)\s*[(\[]\s*(.*?)\s*[)\]]$", re.IGNORECASE)
_CYCLES = re.compile(r"\bcycles?\b")
_BARE_POWER = re.compile(r"(?<=[A-Za-zΩµμ%Å])([-+]?\d+)(?![A-Za-z\d])")
_MAX_LENGTH = 80


@functools.cache
def _registry() -> Any:
    import pint

    return pint.UnitRegistry(cache_folder=None)


def _split(unit: str) -> tuple[str, str]:
    """Returns (logarithm, unit under it); the logarithm is "", "log10" or "ln"."""
    match = _LOGARITHM.match(unit.strip())
    if match is None:
        return "", unit
    return ("ln" if match[1].lower() == "ln" else "log10"), match[2]


@functools.cache
def _parse(unit: str) -> Any:
    """Returns the pint unit written as ``unit``, or None."""
    text = unit.strip().replace("−", "-").replace("–", "-").replace("·", "*").replace("⋅", "*")
    if len(text) > _MAX_LENGTH or "//" in text:  # pint would take // as a floor division
        return None
    text = _ALIASES.get(text, text)
    text = re.sub(r"(?<=[A-Za-zΩµμ])\.(?=[A-Za-zΩµμ])", "*", text)  # mS.cm-1
    text = _BARE_POWER.sub(r"**\1", text)  # cm-1 means cm**-1
    text = _CYCLES.sub("count", text)  # a cell's cycles are counted; pint reads a cycle as an angle, 2 pi
    try:
        return _registry().parse_units(text)
    except Exception:  # noqa: BLE001  pint lets any kind of error through for text it cannot read
        return None


def known(unit: str) -> bool:
    """Returns whether ``unit`` can be read at all."""
    return _parse(_split(unit)[1]) is not None


def compatible(unit: str, canonical: str) -> bool:
    """Returns whether values in ``unit`` can be expressed in ``canonical``."""
    parsed = _parse(_split(unit)[1])
    return parsed is not None and bool(parsed.dimensionality == _parse(canonical).dimensionality)


def check(unit: str, canonical: str) -> str:
    """Returns why ``unit`` cannot be converted to ``canonical``, or "" when it can.

    Args:
        unit: as written in a site file; ``log10(...)`` and ``ln(...)`` of a unit are understood.
        canonical: the contract's unit; "" for dimensionless.
    """
    inner = _split(unit)[1]
    hint = f" ({_HINTS[inner]})" if inner in _HINTS else ""
    if _parse(inner) is None:
        near = difflib.get_close_matches(inner, _names(), n=1, cutoff=0.6)
        return f"unknown unit '{unit}'" + (f"; did you mean '{near[0]}'?" if near else hint)
    if not compatible(unit, canonical):
        return f"unit '{unit}' cannot be expressed in the contract's unit '{canonical or 'dimensionless'}'{hint}"
    return ""


def convert(values: ArrayLike, unit: str, canonical: str) -> NDArray[np.float64]:
    """Returns ``values`` in ``canonical``; NaN stays NaN, offset scales (degC, degF) are shifted.

    Args:
        values: numbers in ``unit``, any shape.
        unit: the unit they are in; ``log10(S/cm)`` means the values are decimal logarithms.
        canonical: the unit wanted; "" for dimensionless.

    Raises:
        ConfigError: a unit is unknown, or the two measure different things.

    >>> convert([25.0], "degC", "kelvin").tolist()
    [298.15]
    """
    problem = check(unit, canonical)
    if problem:
        raise ConfigError(problem, fix="write the unit the values are in, as pint reads it, e.g. mS/cm, degC, mol/kg, percent")
    logarithm, inner = _split(unit)
    array = np.asarray(values, dtype=np.float64)
    if logarithm:
        with np.errstate(over="ignore"):  # an absurd logarithm becomes infinite, which no range of the contract admits
            array = np.power(10.0, array) if logarithm == "log10" else np.exp(array)
    source, target = _parse(inner), _parse(canonical)
    if source == target:
        return array.copy()
    return np.asarray(_registry().Quantity(array, source).to(target).magnitude, dtype=np.float64)


def _names() -> list[str]:
    plain = [n for n in dir(_registry()) if n.isidentifier() and not n.startswith("_")]
    compounds = ["mS/cm", "S/cm", "S/m", "uS/cm", "mol/kg", "mol/l", "g/cm^3", "Wh/m^2", "Wh/kg", "mAh/g", "1/hour", "wt%"]
    return [*compounds, *_ALIASES, *plain]
