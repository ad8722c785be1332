"""Laws of conditions."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from fedmat.data.contract import record_type
from fedmat.errors import ConfigError, FeatureError
from fedmat.features.conditions import ConditionFeatures

CELL = record_type("battery_cell")
ALLOY = record_type("alloy")


def test_temperature_enters_as_the_arrhenius_variable() -> None:
    part = ConditionFeatures.of({}, record_type("solid_electrolyte"), "conductivity_s_cm")
    assert part.names == ("1000/temperature_k",)
    assert part.transform(pd.DataFrame({"temperature_k": [250.0, 500.0]})).tolist() == [[4.0], [2.0]]


def test_default_is_every_required_number_but_the_target() -> None:
    part = ConditionFeatures.of({}, CELL, "areal_energy_wh_m2")
    assert "areal_energy_wh_m2" not in part.needs
    assert "c_rate" in part.needs
    assert ConditionFeatures.of({}, ALLOY, "hardness_hv").needs == ("temperature_k",)


def test_transforms_of_hand_computable_numbers() -> None:
    options = {
        "fields": ["c_rate", "temperature_k", "positive_porosity"],
        "transforms": {"c_rate": ["log", "sqrt", "square", "inverse"], "temperature_k": "identity"},
    }
    part = ConditionFeatures.of(options, CELL, "areal_energy_wh_m2")
    assert part.names == ("log10(c_rate)", "sqrt(c_rate)", "c_rate^2", "1000/c_rate", "temperature_k", "positive_porosity")
    x = part.transform(pd.DataFrame({"c_rate": [4.0], "temperature_k": [300.0], "positive_porosity": [0.3]}))
    assert x[0] == pytest.approx([np.log10(4), 2.0, 16.0, 250.0, 300.0, 0.3])


def test_categories_are_indicators_and_an_unlisted_one_is_other() -> None:
    options = {"fields": ["processing", "test_type"], "categories": {"processing": ["CAST", "WROUGHT"]}}
    part = ConditionFeatures.of(options, ALLOY, "hardness_hv")
    assert part.names == ("processing=CAST", "processing=WROUGHT", "processing=other",
                          "test_type=C", "test_type=T", "test_type=other")  # fmt: skip
    x = part.transform(pd.DataFrame({"processing": ["CAST", "POWDER"], "test_type": ["T", ""]}))
    assert x.tolist() == [[1, 0, 0, 0, 1, 0], [0, 0, 1, 0, 0, 1]]


def test_open_categories_must_be_listed() -> None:
    with pytest.raises(ConfigError, match="categories of 'processing'"):
        ConditionFeatures.of({"fields": ["processing"]}, ALLOY, "hardness_hv")


def test_nan_is_refused_unless_the_field_is_optional() -> None:
    rows = pd.DataFrame({"temperature_k": [300.0, np.nan], "elongation_pct": [1.0, np.nan]})
    part = ConditionFeatures.of({}, ALLOY, "hardness_hv")
    with pytest.raises(FeatureError, match=r"'temperature_k'.*row 2"):
        part.transform(rows)
    optional = ConditionFeatures.of({"fields": ["elongation_pct"]}, ALLOY, "hardness_hv")
    assert optional.may_miss and not part.may_miss
    assert np.isnan(optional.transform(rows)[1, 0])


def test_text_in_a_number_field_is_refused_even_where_the_field_may_miss() -> None:
    part = ConditionFeatures.of({"fields": ["elongation_pct"]}, ALLOY, "hardness_hv")
    with pytest.raises(FeatureError) as caught:
        part.transform(pd.DataFrame({"elongation_pct": ["canary-77"]}))
    assert "canary" not in str(caught.value)


def test_a_transform_outside_its_domain_is_refused() -> None:
    part = ConditionFeatures.of({"fields": ["c_rate"], "transforms": {"c_rate": "log"}}, CELL, "areal_energy_wh_m2")
    with pytest.raises(FeatureError, match=r"'log' of field 'c_rate'.*row 1"):
        part.transform(pd.DataFrame({"c_rate": [0.0]}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"field": []}, "did you mean 'fields'"),
        ({"fields": ["c_rat"]}, "has no field"),
        ({"fields": ["formula"]}, "use composition"),
        ({"transforms": {"c_rate": "logg"}}, "did you mean 'log'"),
        ({"transforms": {"c_rte": "log"}}, "did you mean 'c_rate'"),
        ({"fields": []}, "nothing to read"),
        ({"fields": "c_rate"}, "list of different names"),
        ({"fields": ["c_rate", "c_rate"]}, "list of different names"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ConditionFeatures.of(options, CELL, "areal_energy_wh_m2")


def test_the_logarithm_of_a_size_takes_either_sign_and_no_zero() -> None:
    rt = record_type("cell_ageing")
    part = ConditionFeatures.of({"fields": ["dq_min_ah"], "transforms": {"dq_min_ah": "log_abs"}}, rt, "cycle_life")
    assert part.names == ("log10|dq_min_ah|",)
    assert part.transform(pd.DataFrame({"dq_min_ah": [-0.01, 0.1]}))[:, 0] == pytest.approx([-2.0, -1.0])
    with pytest.raises(FeatureError, match="log_abs"):
        part.transform(pd.DataFrame({"dq_min_ah": [0.0]}))
