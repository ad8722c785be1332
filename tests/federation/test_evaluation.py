"""Metrics from sums equal metrics from rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from fedmat.federation.evaluation import evaluate, metrics
from fedmat.seeds import stream


def parts(seed: int, n_sites: int = 3, binary: bool = False):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n_sites):
        n = int(rng.integers(5, 60))
        truth = rng.normal(i, 1.0, n)
        guess = truth + rng.normal(0, 0.5, n)
        if binary:
            truth, guess = (truth > 0.5).astype(float), np.round(1 / (1 + np.exp(-guess)), 2)
        rows.append((f"s{i}", truth, guess, rng.integers(0, 6, n)))
    kind = "binary" if binary else "regression"
    found = [evaluate(s, "a", "test", t, g, c, kind=kind, rng=stream(seed, s), floor=1) for s, t, g, c in rows]
    return found, np.concatenate([r[1] for r in rows]), np.concatenate([r[2] for r in rows])


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_global_metrics_from_sums_equal_those_from_all_rows(seed: int) -> None:
    found, truth, guess = parts(seed)
    m = metrics(found, "regression")
    assert m["n"] == len(truth)
    assert m["mae"] == pytest.approx(sk.mean_absolute_error(truth, guess))
    assert m["rmse"] == pytest.approx(np.sqrt(sk.mean_squared_error(truth, guess)))
    assert m["r2"] == pytest.approx(sk.r2_score(truth, guess))
    assert m["mae_low"] < m["mae"] < m["mae_high"]


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_auc_from_score_histograms_equals_auc_from_rows(seed: int) -> None:
    found, truth, guess = parts(seed, binary=True)
    if 0 < truth.sum() < len(truth):
        assert metrics(found, "binary")["auc"] == pytest.approx(sk.roc_auc_score(truth, guess), abs=0.01)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """MAE of |N(0, 0.5)| errors is 0.5 sqrt(2/pi); 95% intervals over 200 repeats (3 sigma: 0.90 to 0.99)."""
    expected = 0.5 * np.sqrt(2 / np.pi)
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        found = [
            evaluate(
                s,
                "a",
                "test",
                np.zeros(80),
                rng.normal(0, 0.5, 80),
                np.arange(80),
                kind="regression",
                rng=stream(seed, s),
                floor=1,
            )
            for s in "xyz"
        ]
        m = metrics(found, "regression")
        hits += m["mae_low"] <= expected <= m["mae_high"]
    assert 0.90 <= hits / 200 <= 0.99


def test_one_group_has_no_interval_rather_than_a_zero_one() -> None:
    e = evaluate("s", "a", "test", np.zeros(4), np.ones(4), np.zeros(4, int), kind="regression", rng=stream(0), floor=1)
    assert metrics([e], "regression")["mae_low"] is None


def test_small_histogram_cells_are_not_disclosed() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=40)
    e = evaluate("s", "a", "test", truth, truth, np.arange(40), kind="regression", rng=stream(0), floor=5)
    assert set(np.unique(e.histogram)) <= {0.0} | set(range(5, 41))


def test_grouped_rows_are_resampled_together() -> None:
    """Ten copies of every row must not narrow the interval."""
    rng = np.random.default_rng(1)
    error = rng.normal(size=30)
    one = evaluate("s", "a", "test", np.zeros(30), error, np.arange(30), kind="regression", rng=stream(0), floor=1)
    ten = evaluate(
        "s",
        "a",
        "test",
        np.zeros(300),
        np.repeat(error, 10),
        np.repeat(np.arange(30), 10),
        kind="regression",
        rng=stream(0),
        floor=1,
    )
    assert ten.mae_se == pytest.approx(one.mae_se)
