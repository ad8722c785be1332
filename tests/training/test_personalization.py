"""Folds, mixtures, and what a site keeps to itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat.config import ModelSpec, Task
from fedmat.models.network import Architecture
from fedmat.seeds import stream
from fedmat.training import folds, personalization

TASK = Task(name="t", record_type="alloy", target="hardness_hv", unit="")


@given(st.lists(st.integers(0, 12), min_size=8, max_size=200), st.integers(2, 5))
@settings(max_examples=60, deadline=None)
def test_what_hangs_together_stays_in_one_fold_unless_it_is_most_of_the_site(codes: list[int], count: int) -> None:
    component = np.array(codes)
    found = folds.assign(component, count, stream(3, "f"))
    assert found.min() >= 0 and found.max() < count
    for c in np.unique(component):
        rows = component == c
        if 2 * rows.sum() <= len(component):
            assert len(np.unique(found[rows])) == 1


def test_folds_are_about_equally_large_and_the_same_for_the_same_seed() -> None:
    component = np.random.default_rng(0).integers(0, 60, 600)
    first, again, other = (folds.assign(component, 4, stream(s, "f")) for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    sizes = np.bincount(first)
    assert sizes.max() <= 1.2 * sizes.min()


def test_one_material_that_is_most_of_a_site_is_divided_by_rows() -> None:
    found = folds.assign(np.zeros(100, dtype=np.int64), 4, stream(0))
    assert np.bincount(found).tolist() == [25, 25, 25, 25]


def test_out_of_fold_takes_each_row_from_the_member_that_never_saw_it() -> None:
    output = np.arange(2 * 3).reshape(2, 3, 1).astype(float)
    assert folds.out_of_fold(output, np.array([1, 0, -1]))[:2, 0].tolist() == [3.0, 1.0]
    assert np.isnan(folds.out_of_fold(output, np.array([1, 0, -1]))[2, 0])


@given(st.integers(0, 10**6), st.sampled_from(["stack", "best"]))
@settings(max_examples=25, deadline=None)
def test_a_mixture_is_never_worse_than_the_sites_own_model_out_of_fold(seed: int, mode: str) -> None:
    rng = np.random.default_rng(seed)
    n = 60
    truth = rng.normal(size=n)
    found = {k: truth + rng.normal(rng.normal(), rng.uniform(0.1, 2.0), n) for k in ("federated", "local", "finetuned")}
    shares = personalization.mixture(found, truth, np.arange(n) // 3, mode=mode)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert min(shares.values()) >= 0.0
    error = {k: np.abs(v - truth).mean() for k, v in found.items()}
    mixed = np.abs(sum(shares[k] * v for k, v in found.items()) - truth).mean()
    assert mixed <= error["local"] + 1e-9


def test_where_rows_cannot_tell_the_mixture_is_even_and_where_they_can_it_is_not() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=400)
    alike = {k: truth + rng.normal(0, 1.0, 400) for k in ("federated", "local")}
    assert personalization.mixture(alike, truth, np.arange(400), mode="stack") == {"federated": 0.5, "local": 0.5}
    apart = {"federated": truth + 3.0, "local": truth + rng.normal(0, 0.1, 400)}
    assert personalization.mixture(apart, truth, np.arange(400), mode="stack")["local"] == 1.0


def test_fedrep_trains_the_head_first_and_then_everything_but_the_head() -> None:
    architecture = Architecture(ModelSpec(hidden=(8,)), (TASK,), private=("head",))
    frozen = personalization.round_freezer(architecture, 3)
    assert frozen(0, "hidden.0.weight") and not frozen(0, "last.weight")
    assert not frozen(3, "hidden.0.weight") and frozen(3, "last.weight")
    assert personalization.round_freezer(architecture, 0) is None


@pytest.mark.parametrize(
    ("private", "name", "kept"),
    [
        (("head",), "last.weight", True),
        (("head",), "hidden.0.weight", False),
        (("norm",), "norm.scale", True),
        (("norm",), "last.bias", False),
        (("head",), "2.last.weight", True),
        ((), "last.weight", False),
    ],
)
def test_what_is_private(private: tuple[str, ...], name: str, kept: bool) -> None:
    assert Architecture(ModelSpec(), (TASK,), private=private).is_private(name) is kept
