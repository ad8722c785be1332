"""One record at a time, then the batch: what is refused, with which reason, and that reasons hold no value."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat.data import canonical
from fedmat.data.contract import RecordType, record_columns, record_type
from fedmat.data.validation import coerce, split_valid, validate_batch
from fedmat.errors import DataError

SOLID, LIQUID, POLYMER, ALLOY = (
    record_type(n) for n in ("solid_electrolyte", "liquid_electrolyte", "polymer_electrolyte", "alloy")
)
GOOD = {
    SOLID.name: {"formula": "Li7La3Zr2O12", "temperature_k": 298.15, "conductivity_s_cm": 3e-4, "family": "garnet", "doi": "10.1/a"},
    LIQUID.name: {
        "salt": "LiPF6", "concentration": 1.0, "concentration_basis": "mol/kg", "solvents": '{"EC": 0.5, "DMC": 0.5}',
        "solvent_basis": "w", "temperature_k": 298.15, "conductivity_s_cm": 1e-2, "doi": "10.1/a",
    },
    POLYMER.name: {
        "polymer_smiles": "*CCO*", "salt_smiles": "[Li+].[Cl-]", "molality": 1.0, "temperature_k": 330.0,
        "conductivity_s_cm": 1e-5, "doi": "",
    },
    ALLOY.name: {"formula": "AlCoCrFeNi", "temperature_k": 298.15, "yield_strength_mpa": 1250.0, "test_type": "C"},
}  # fmt: skip


def rows(rt: RecordType, *changes: dict[str, object]) -> pd.DataFrame:
    return pd.DataFrame([{**GOOD[rt.name], **c, "source_row": i} for i, c in enumerate(changes, start=1)])


def codes(rt: RecordType, change: dict[str, object], target: str | list[str] | None = None) -> list[tuple[str, str]]:
    accepted, rejected = split_valid(rows(rt, change), rt, target=target)
    assert len(accepted) + rejected["source_row"].nunique() == 1
    return list(zip(rejected["field"], rejected["code"], strict=True))


@pytest.mark.parametrize("rt", [SOLID, LIQUID, POLYMER, ALLOY], ids=lambda r: r.name)
def test_a_good_record_is_accepted(rt: RecordType) -> None:
    assert codes(rt, {}) == []


@pytest.mark.parametrize(
    ("rt", "change", "code"),
    [
        (SOLID, {"formula": "Unobtainium"}, "bad_formula"),
        (SOLID, {"formula": "Xx2O"}, "bad_formula"),
        (SOLID, {"formula": "Li2SO4*(H2O)18"}, "bad_formula"),
        (SOLID, {"formula": ""}, "missing"),
        (SOLID, {"formula": None}, "missing"),
        (SOLID, {"temperature_k": 0.0}, "not_positive"),
        (SOLID, {"temperature_k": -25.0}, "not_positive"),
        (SOLID, {"temperature_k": 1e5}, "out_of_range"),
        (SOLID, {"temperature_k": math.inf}, "out_of_range"),
        (SOLID, {"temperature_k": math.nan}, "missing"),
        (SOLID, {"temperature_k": "warm"}, "not_a_number"),
        (SOLID, {"temperature_k": True}, "not_a_number"),
        (SOLID, {"conductivity_s_cm": 0.0}, "not_positive"),
        (SOLID, {"conductivity_s_cm_censored": "maybe"}, "unknown_category"),
        (SOLID, {"structure": "{}"}, "bad_structure"),
        (LIQUID, {"concentration": -0.005}, "out_of_range"),
        (LIQUID, {"concentration_basis": "mol/m3"}, "unknown_category"),
        (LIQUID, {"salt": " "}, "missing"),
        (LIQUID, {"solvents": '{"EC": 0.5, "DMC": 0.4}'}, "bad_mixture"),
        (LIQUID, {"solvents": '{"EC": 1.5, "DMC": -0.5}'}, "bad_mixture"),
        (LIQUID, {"solvents": '{"EC": NaN}'}, "bad_mixture"),
        (LIQUID, {"solvents": "EC"}, "bad_mixture"),
        (POLYMER, {"polymer_smiles": "C1CC"}, "bad_smiles"),
        (ALLOY, {"test_type": "B"}, "unknown_category"),
    ],
)
def test_a_bad_cell_rejects_its_record_with_one_reason(rt: RecordType, change: dict[str, object], code: str) -> None:
    assert codes(rt, change) == [(next(iter(change)), code)]


def test_of_several_targets_one_is_enough_and_one_of_one_is_needed() -> None:
    two = ["yield_strength_mpa", "hardness_hv"]
    assert codes(ALLOY, {"hardness_hv": math.nan}, target=two) == []
    assert codes(ALLOY, {"yield_strength_mpa": None, "hardness_hv": 300.0}, target=two) == []
    assert codes(ALLOY, {"yield_strength_mpa": None}, target=two) == [("", "no_target")]
    assert codes(ALLOY, {"yield_strength_mpa": None}, target=two[:1]) == [("yield_strength_mpa", "missing")]
    assert codes(ALLOY, {"yield_strength_mpa": None}, target=[]) == []


def test_a_polymer_without_salt_is_a_record_unless_it_states_an_amount_of_salt() -> None:
    assert codes(POLYMER, {"salt_smiles": "", "molality": 0.0}) == []
    assert codes(POLYMER, {"salt_smiles": "", "molality": 0.5}) == [("salt_smiles", "missing")]
    assert codes(POLYMER, {"salt_smiles": "C1CC", "molality": 0.5}) == [("salt_smiles", "bad_smiles")]
    assert codes(POLYMER, {"salt_smiles": "", "molality": None}) == [("molality", "missing")]
    with pytest.raises(DataError, match="salt_smiles"):
        coerce(rows(POLYMER, {"salt_smiles": ""}), POLYMER)


def test_optional_cells_may_be_absent_and_a_target_may_not() -> None:
    assert codes(ALLOY, {"yield_strength_mpa": math.nan, "test_type": ""}) == []
    assert codes(ALLOY, {"yield_strength_mpa": math.nan}, target="yield_strength_mpa") == [("yield_strength_mpa", "missing")]


def test_every_bad_cell_of_a_record_is_named() -> None:
    found = codes(SOLID, {"formula": "?", "temperature_k": -1.0, "conductivity_s_cm": None})
    assert found == [("formula", "bad_formula"), ("temperature_k", "not_positive"), ("conductivity_s_cm", "missing")]


def test_an_absent_required_column_is_an_error_not_a_rejection() -> None:
    with pytest.raises(DataError, match="temperature_k"):
        split_valid(rows(SOLID, {}).drop(columns="temperature_k"), SOLID)


def test_a_repeat_is_a_duplicate_whatever_its_notation_and_another_value_is_not() -> None:
    frame = rows(
        SOLID,
        {"formula": "Li7La3Zr2O12"},
        {"formula": "La3 Zr2 Li7 O12"},
        {"formula": "Li7La3Zr2O12", "temperature_k": 298.15 * (1 + 1e-15)},
        {"conductivity_s_cm": 3.1e-4},
        {"conductivity_s_cm_censored": "left"},
        {"doi": "10.1/b"},
    )
    accepted, rejected = split_valid(frame, SOLID)
    assert list(accepted["source_row"]) == [1, 4, 5, 6]
    assert list(rejected["source_row"]) == [2, 3] and set(rejected["code"]) == {"duplicate"}


def test_absent_values_are_equal_when_records_are_compared() -> None:
    accepted, rejected = split_valid(rows(ALLOY, {}, {}), ALLOY)
    assert (len(accepted), list(rejected["code"])) == (1, ["duplicate"])


def test_a_rejected_record_does_not_make_a_good_one_a_duplicate() -> None:
    accepted, _ = split_valid(rows(LIQUID, {"solvent_basis": "?"}, {}), LIQUID)
    assert list(accepted["source_row"]) == [2]


cells = st.one_of(st.text(max_size=8), st.floats(), st.none(), st.booleans(), st.sampled_from(["Li2O", "NaCl", "1e-3", "300"]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.fixed_dictionaries({"formula": cells, "temperature_k": cells, "conductivity_s_cm": cells}), max_size=8))
def test_every_row_is_accepted_or_rejected_and_none_is_lost(changes: list[dict[str, object]]) -> None:
    frame = rows(SOLID, *changes, {})
    accepted, rejected = split_valid(frame, SOLID)
    kept, refused = set(accepted["source_row"]), set(rejected["source_row"])
    assert kept | refused == set(frame["source_row"]) and not kept & refused
    assert np.isfinite(accepted["temperature_k"]).all() and (accepted["conductivity_s_cm"] > 0).all()
    again, none = split_valid(accepted, SOLID)
    assert len(none) == 0
    pd.testing.assert_frame_equal(again, accepted)


# --- canonical forms ---------------------------------------------------------------------------------------------

elements = st.dictionaries(st.sampled_from(["Li", "La", "Zr", "O", "S", "P", "Cl"]), st.integers(1, 24), min_size=1, max_size=5)


@given(elements, st.sampled_from([0.1, 0.25, 2.0, 3.0, 7.0]), st.randoms(use_true_random=False))
def test_scale_and_order_of_a_formula_do_not_change_its_key(amounts: dict[str, int], scale: float, random: object) -> None:
    shuffled = list(amounts.items())
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    a = "".join(f"{e}{n}" for e, n in amounts.items())
    b = " ".join(f"{e}{n * scale:g}" for e, n in shuffled)
    assert canonical.formula_key(a) == canonical.formula_key(b) != ""
    text = canonical.formula(a)
    assert text is not None and canonical.formula(text) == text and canonical.formula_key(text) == canonical.formula_key(a)


def test_fractional_amounts_survive() -> None:
    assert canonical.formula("Li1.3Al0.3Ti1.7(PO4)3") == "Li1.3Ti1.7Al0.3P3O12"


shares = st.dictionaries(st.sampled_from(["EC", "DMC", "PC", "EMC", "2-MeTHF"]), st.floats(0.01, 1.0), min_size=1)


@given(shares, st.floats(0.97, 1.03))
def test_mixtures_sum_to_one_and_are_written_one_way(amounts: dict[str, float], total: float) -> None:
    unit = sum(amounts.values())
    text = canonical.mixture(json.dumps({k: v / unit * total for k, v in amounts.items()}))
    assert text is not None
    fractions = json.loads(text)
    assert list(fractions) == sorted(amounts) and sum(fractions.values()) == pytest.approx(1.0, abs=1e-5)
    assert canonical.mixture(text) == text


def test_rounded_thirds_are_one_mixture() -> None:
    assert canonical.mixture('{"EC": 0.33, "PC": 0.33, "DMC": 0.33}') == canonical.mixture(
        '{"DMC": 0.333, "EC": 0.333, "PC": 0.333}'
    )


def test_two_spellings_of_a_molecule_are_one_smiles() -> None:
    assert canonical.smiles("OCC") == canonical.smiles("C(C)O") == "CCO"


def test_each_distinct_formula_is_parsed_once() -> None:
    canonical.formula.cache_clear()
    frame = rows(SOLID, *({"formula": f"Li{1 + i % 5}Zr2O12", "temperature_k": 300.0 + i} for i in range(500)))
    assert len(split_valid(frame, SOLID)[0]) == 500
    assert canonical.formula.cache_info().misses <= 5


# --- for prediction ----------------------------------------------------------------------------------------------


def test_coerce_keeps_every_row_and_needs_no_outcome() -> None:
    frame = rows(SOLID, {"formula": "LiO"}, {"temperature_k": "310"}, {}).drop(columns=["conductivity_s_cm", "doi"])
    frame.index = pd.Index([7, 3, 5])
    out = coerce(frame, SOLID)
    assert list(out.index) == [7, 3, 5] and out["temperature_k"].tolist() == [298.15, 310.0, 298.15]
    assert list(out.columns) == [f.name for f in SOLID.fields] + ["conductivity_s_cm_censored"]
    with pytest.raises(DataError, match="conductivity_s_cm"):
        coerce(frame, SOLID, need_target="conductivity_s_cm")


def test_coerce_names_fields_and_rows_and_never_a_value() -> None:
    frame = rows(SOLID, {}, {"formula": "Canarium77"}, {"temperature_k": 987654.321}, {"temperature_k": "canary"})
    with pytest.raises(DataError) as caught:
        coerce(frame, SOLID)
    text = str(caught.value)
    assert "'formula', row 2" in text and "'temperature_k', row 3" in text and "'temperature_k', row 4" in text
    assert not any(secret in text for secret in ("Canarium", "987654", "canary"))
    with pytest.raises(DataError, match="temperature_k"):
        coerce(frame.drop(columns="temperature_k"), SOLID)


# --- the batch ---------------------------------------------------------------------------------------------------


def batch(n: int) -> pd.DataFrame:
    frame, _ = split_valid(rows(SOLID, *({"formula": f"Li{i + 1}Cl"} for i in range(n))), SOLID)
    extra = {
        "record_id": [f"{i:016x}" for i in range(n)],
        "group": [f"{i:016x}" for i in range(n)],
        "split_hint": "",
        "source": "main",
    }
    return frame.assign(**extra)[list(record_columns(SOLID))]


def test_a_sound_batch_passes_and_validation_json_is_the_same_every_time(tmp_path: Path) -> None:
    result = validate_batch(batch(6), SOLID, tmp_path)
    first = (tmp_path / "validation.json").read_bytes()
    assert result.success and result.failed == ()
    assert validate_batch(batch(6), SOLID, tmp_path).success
    assert (tmp_path / "validation.json").read_bytes() == first
    document = json.loads(first)
    assert (
        document["result_format"] == "BOOLEAN_ONLY"
        and document["evaluated"] == len(document["expectations"]) == result.evaluated
    )
    assert all(set(e) == {"type", "kwargs", "meta", "success"} for e in document["expectations"])


@pytest.mark.parametrize(
    ("spoil", "failed"),
    [
        (lambda f: f.assign(record_id=f["record_id"].iloc[0]), "expect_column_values_to_be_unique(record_id)"),
        (lambda f: f.assign(temperature_k=777777.25), "expect_column_values_to_be_between(temperature_k)"),
        (lambda f: f.assign(formula="Li1Cl", conductivity_s_cm=1e-4), "expect_compound_columns_to_be_unique()"),
        (lambda f: f.assign(group="G"), "expect_column_values_to_match_regex(group)"),
        (lambda f: f.drop(columns="doi"), "expect_table_columns_to_match_set()"),
        (lambda f: f.assign(split_hint="777777.25"), "expect_column_values_to_be_in_set(split_hint)"),
    ],
)
def test_a_spoilt_batch_fails_by_name_without_values(spoil: object, failed: str, tmp_path: Path) -> None:
    result = validate_batch(spoil(batch(6)), SOLID, tmp_path)  # type: ignore[operator]
    assert not result.success and failed in result.failed
    assert "777777" not in (tmp_path / "validation.json").read_text()


def test_the_suite_too_asks_for_the_salt_where_there_is_an_amount_of_it(tmp_path: Path) -> None:
    frame, _ = split_valid(rows(POLYMER, {}, {"salt_smiles": "", "molality": 0.0}), POLYMER)
    extra = {"record_id": ["0" * 16, "1" * 16], "group": "2" * 16, "split_hint": "train_only", "source": "main"}
    sound = frame.assign(**extra)[list(record_columns(POLYMER))]
    assert validate_batch(sound, POLYMER, tmp_path).failed == ()
    spoilt = validate_batch(sound.assign(molality=0.5), POLYMER, tmp_path)
    assert spoilt.failed == ("expect_column_value_lengths_to_be_between(salt_smiles)",)
