"""Laws of unit conversion."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat.data import units
from fedmat.data.contract import RECORD_TYPES
from fedmat.errors import ConfigError

finite = st.floats(-1e6, 1e6, allow_nan=False)


@pytest.mark.parametrize(
    ("value", "unit", "canonical", "expected"),
    [
        (25.0, "degC", "kelvin", 298.15),
        (25.0, "°C", "kelvin", 298.15),
        (25.0, "℃", "kelvin", 298.15),
        (77.0, "degF", "kelvin", 298.15),
        (10.0, "mS/cm", "siemens / centimeter", 0.01),
        (1.0, "S/m", "siemens / centimeter", 0.01),
        (3.0, "S cm-1", "siemens / centimeter", 3.0),
        (3.0, "mS.cm-1", "siemens / centimeter", 3e-3),
        (3.0, "S·cm⁻¹", "siemens / centimeter", 3.0),
        (3.0, "Ω^-1 cm^-1", "siemens / centimeter", 3.0),
        (-4.0, "log10(S/cm)", "siemens / centimeter", 1e-4),
        (0.0, "ln(mS/cm)", "siemens / centimeter", 1e-3),
        (1.0, "mil", "micrometer", 25.4),
        (30.0, "wt%", "", 0.3),
        (30.0, "%", "percent", 30.0),
        (0.3, "", "percent", 30.0),
        (1.0, "ksi", "megapascal", 6.894757293168361),
        (2.0, "mol/kg", "mole / kilogram", 2.0),
        (250.0, "HV", "", 250.0),
        (2.0, "1/h", "1 / hour", 2.0),
        (3.0, "mAh/cycle", "ampere_hour / cycle", 3e-3),
        (3.0, "cycles", "", 3.0),
    ],
)
def test_what_laboratories_write_is_understood(value: float, unit: str, canonical: str, expected: float) -> None:
    assert units.convert([value], unit, canonical)[0] == pytest.approx(expected, rel=1e-12)


@given(st.lists(finite, min_size=1, max_size=20), st.sampled_from([("degC", "kelvin"), ("mS/cm", "S/m"), ("mil", "um")]))
@settings(max_examples=30, deadline=None)
def test_there_and_back_is_the_same_number(values: list[float], pair: tuple[str, str]) -> None:
    there = units.convert(values, *pair)
    np.testing.assert_allclose(units.convert(there, pair[1], pair[0]), values, rtol=1e-9, atol=1e-9)


def test_nan_stays_nan_and_the_input_is_not_touched() -> None:
    values = np.array([1.0, np.nan])
    result = units.convert(values, "kelvin", "kelvin")
    result[0] = 7.0
    assert values[0] == 1.0
    assert np.isnan(result[1])


@pytest.mark.parametrize("unit", ["furlongz", "mS//cm", "__import__('os')", "3 S/cm", "x" * 500, "C-rate"])
def test_an_unknown_unit_is_refused_by_name(unit: str) -> None:
    assert not units.known(unit)
    with pytest.raises(ConfigError, match="unknown unit"):
        units.convert([1.0], unit, "kelvin")


def test_a_misspelt_unit_gets_the_nearest_one() -> None:
    assert "did you mean 'kelvin'?" in units.check("kelvn", "kelvin")


def test_an_incompatible_unit_names_both_units_and_the_trap() -> None:
    text = units.check("C", "kelvin")
    assert "'C'" in text
    assert "'kelvin'" in text
    assert "degC" in text
    assert "dimensionless" in units.check("mol/kg", "")


def test_every_unit_of_the_contract_is_one_pint_reads() -> None:
    for record_type in RECORD_TYPES.values():
        for field in record_type.fields:
            if field.unit is not None:
                assert units.check(field.unit, field.unit) == "", field.name
