"""Held-out groups: whole, the same at every site, frozen by a seed."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmat.config import Splits
from fedmat.data import splits
from fedmat.data.splits import TEST, TRAIN, VALIDATION, assign
from fedmat.errors import ConfigError, SiteRefused
from fedmat.features import table

groups = st.lists(st.integers(0, 40).map("group{}".format), min_size=3, max_size=200).filter(lambda g: len(set(g)) >= 3)


def frame(names: list[str], hints: list[str] | None = None, site: str = "north") -> pd.DataFrame:
    out = pd.DataFrame({"group": names, "split_hint": hints or [""] * len(names)})
    out.attrs["site"] = site
    return out


def sides(records: pd.DataFrame, codes: np.ndarray) -> dict[str, set[int]]:
    return {g: set(codes[(records["group"] == g).to_numpy()].tolist()) for g in set(records["group"])}


def test_codes_are_those_of_the_feature_table() -> None:
    assert (TRAIN, VALIDATION, TEST) == (table.TRAIN, table.VALIDATION, table.TEST)


@given(groups, st.floats(0.01, 0.95), st.floats(0.01, 0.95), st.integers(0, 10**6))
def test_no_group_is_on_two_sides_and_no_side_is_empty(names: list[str], test: float, validation: float, seed: int) -> None:
    records = frame(names)
    codes = assign(records, Splits(test_fraction=test, validation_fraction=validation, seed=seed))
    assert codes.dtype == np.int8 and codes.shape == (len(names),)
    assert all(len(s) == 1 for s in sides(records, codes).values())
    assert set(codes.tolist()) == {TRAIN, VALIDATION, TEST}


@given(groups, st.randoms(use_true_random=False), st.integers(0, 99))
def test_order_and_number_of_rows_do_not_matter(names: list[str], random: object, seed: int) -> None:
    shuffled = [*names, names[0]]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    a, b = frame(names), frame(shuffled)
    settings = Splits(seed=seed)
    assert sides(a, assign(a, settings)) == sides(b, assign(b, settings))


def test_two_sites_hold_out_the_same_group() -> None:
    north, south = frame([f"g{i}" for i in range(300)]), frame([f"g{i}" for i in range(100, 700)])
    a, b = (sides(r, assign(r, Splits())) for r in (north, south))
    shared = set(a) & set(b)
    assert len(shared) == 200
    assert {g for g in shared if a[g] == {TEST}} == {g for g in shared if b[g] == {TEST}}


def test_fractions_are_met_over_many_groups_and_the_seed_chooses() -> None:
    records = frame([f"g{i}" for i in range(4000)])
    codes = assign(records, Splits(test_fraction=0.2, validation_fraction=0.15))
    assert np.mean(codes == TEST) == pytest.approx(0.2, abs=0.02)
    assert np.mean(codes[codes != TEST] == VALIDATION) == pytest.approx(0.15, abs=0.001)
    assert np.array_equal(codes, assign(records, Splits(test_fraction=0.2, validation_fraction=0.15)))
    assert not np.array_equal(codes, assign(records, Splits(seed=8)))


@given(st.lists(st.sampled_from(["train", "test"]), min_size=3, max_size=60), st.integers(0, 99))
def test_a_published_split_is_kept(hints: list[str], seed: int) -> None:
    records = frame([f"g{i}" for i in range(len(hints))], hints)
    if "test" not in hints or hints.count("train") < 2:
        with pytest.raises(SiteRefused):
            assign(records, Splits(seed=seed))
        return
    codes = assign(records, Splits(seed=seed))
    assert [c == TEST for c in codes] == [h == "test" for h in hints]
    assert {TRAIN, VALIDATION} <= set(codes.tolist())


def test_rows_without_a_hint_follow_the_hint_of_their_group() -> None:
    records = frame(["a", "a", "b", "b", "c", "d"], ["test", "", "train", "", "train", ""])
    codes = assign(records, Splits())
    assert codes[1] == TEST and codes[3] == codes[2] != TEST


def test_a_group_published_on_both_sides_is_kept_so_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    records = frame(["a", "a", "b", "c"], ["test", "train", "train", "train"])
    with caplog.at_level(logging.WARNING, "fedmat.data.splits"):
        codes = assign(records, Splits())
    assert codes[0] == TEST and codes[1] == TRAIN
    assert splits.torn_groups(records) == 1
    assert "site north" in caplog.text and "1 groups on both sides" in caplog.text


@pytest.mark.parametrize(
    ("names", "hints", "missing"),
    [
        (["a", "b", "c"], ["train"] * 3, "no test group"),
        (["a", "b", "b"], ["", "", ""], "no validation group"),
        (["a", "a"], ["", ""], "no test group"),
        (["a", "b"], ["test", "train"], "no validation group"),
        ([], [], "no test group"),
    ],
)
def test_a_side_that_cannot_be_filled_refuses_the_site_by_name(names: list[str], hints: list[str], missing: str) -> None:
    records = frame(names, hints)
    with pytest.raises(SiteRefused, match=rf"site north: {missing}[\s\S]*fix: \S"):
        assign(records, Splits())
    assert splits.problem(records) is not None


# --- a site without test rows -------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9).map("group{}".format), min_size=1, max_size=40), st.integers(0, 99))
def test_a_site_that_states_that_it_brings_no_test_rows_has_none(names: list[str], seed: int) -> None:
    records = frame(names, ["train_only"] * len(names))
    codes = assign(records, Splits(seed=seed))
    wanted = {TRAIN} if len(set(names)) == 1 else {TRAIN, VALIDATION}
    assert set(codes.tolist()) == wanted and splits.problem(records) is None
    assert all(len(s) == 1 for s in sides(records, codes).values())


def test_without_that_statement_training_rows_only_refuse_the_site_and_the_way_out_is_named() -> None:
    with pytest.raises(SiteRefused, match=r"test: \[\]"):
        assign(frame(["a", "b", "c"], ["train"] * 3), Splits())


def test_rows_without_a_published_side_are_drawn_even_beside_a_source_without_test_rows() -> None:
    names = [f"g{i}" for i in range(60)]
    codes = assign(frame(names, ["train_only"] * 30 + [""] * 30), Splits())
    assert TEST not in codes[:30] and TEST in codes[30:]


# --- kept together ------------------------------------------------------------------------------------------------

papers = st.lists(
    st.tuples(
        st.integers(0, 12).map("g{}".format),
        st.sampled_from(["", "", "p", "q", "r", "s"]),
        st.sampled_from(["", "train", "test"]),
    ),
    min_size=1,
    max_size=60,
)
TOGETHER = Splits(keep_together=("doi",))


def published(rows: list[tuple[str, str, str]]) -> pd.DataFrame:
    return frame([g for g, _, _ in rows], [h for _, _, h in rows]).assign(doi=[d for _, d, _ in rows])


@given(papers, st.integers(0, 99))
def test_no_paper_and_no_group_is_on_both_sides_of_training_and_validation(rows: list[tuple[str, str, str]], seed: int) -> None:
    records, settings = published(rows), Splits(keep_together=("doi",), seed=seed)
    try:
        codes = assign(records, settings)
    except SiteRefused:
        return
    parts = splits.components(records, settings)
    learnt = codes != TEST
    for column in (records["group"], records["doi"], pd.Series(parts)):
        for value in set(column[learnt]) - {""}:
            assert len(set(codes[learnt & (column == value).to_numpy()].tolist())) == 1
    assert {TRAIN, VALIDATION} <= set(codes.tolist())
    plain = assign(records, Splits(seed=seed))
    assert np.array_equal(codes == TEST, plain == TEST), "the test set does not depend on it"


@given(papers, st.randoms(use_true_random=False))
def test_components_do_not_depend_on_the_order_of_rows(rows: list[tuple[str, str, str]], random: object) -> None:
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined]
    codes = splits.components(published(rows), TOGETHER)
    assert np.array_equal(splits.components(published([rows[i] for i in order]), TOGETHER), codes[order])
    assert set(codes.tolist()) == set(range(int(codes.max()) + 1))


@given(papers)
def test_without_fields_to_keep_together_a_component_is_a_group(rows: list[tuple[str, str, str]]) -> None:
    records = published(rows)
    assert np.array_equal(splits.components(records, Splits()), pd.factorize(records["group"], sort=True)[0])
    blank = records.assign(doi="")
    learnt = ~records["group"].isin(records.loc[records["split_hint"] == "test", "group"])
    a, b = splits.components(blank, TOGETHER), splits.components(blank, Splits())
    assert np.array_equal(a[learnt], b[learnt])


def test_papers_link_groups_over_one_another_and_a_test_row_links_nothing() -> None:
    records = published([
        ("a", "p", "train"), ("b", "P ", "train"), ("b", "q", "train"), ("c", "q", "train"), ("d", "r", "train"),
        ("e", "r", "test"), ("f", "r", "train"), ("g", "s", "train"), ("h", "s", "test"), ("i", "", "train"), ("j", "", "train"),
    ])  # fmt: skip
    assert splits.components(records, TOGETHER).tolist() == [0, 0, 0, 0, 1, 2, 1, 3, 4, 5, 6]


def test_the_share_of_validation_groups_is_kept_and_a_large_component_trains() -> None:
    rows = [(f"g{i:03d}", "big" if i < 60 else f"p{i // 3}", "train") for i in range(200)] + [("t", "", "test")]
    for seed in range(5):
        records, settings = published(rows), Splits(keep_together=("doi",), validation_fraction=0.2, seed=seed)
        codes = assign(records, settings)
        assert 36 <= (codes == VALIDATION).sum() <= 40 and set(codes[:60].tolist()) == {TRAIN}


def test_what_hangs_together_altogether_refuses_the_site_and_names_the_field() -> None:
    records = published([("a", "p", "train"), ("b", "p", "train"), ("c", "", "test")])
    with pytest.raises(SiteRefused, match=r"site north: no validation group.*doi[\s\S]*keep_together"):
        assign(records, TOGETHER)
    with pytest.raises(ConfigError, match="no field 'paper'"):
        splits.components(records, Splits(keep_together=("paper",)))


def test_a_plan_that_keeps_nothing_together_is_described_as_before() -> None:
    assert set(Splits().model_dump(mode="json")) == {"test_fraction", "validation_fraction", "seed"}
    assert TOGETHER.model_dump(mode="json")["keep_together"] == ["doi"]
