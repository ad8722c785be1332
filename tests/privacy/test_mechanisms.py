"""Laws of clipping, noise and the refusal of site-level privacy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from fedmat.errors import PlanRefused
from fedmat.privacy import mechanisms
from fedmat.privacy.accounting import noise_for
from fedmat.privacy.mechanisms import Noise, clip, gaussian

F = NDArray[np.float64]
vectors = st.lists(st.floats(-1e200, 1e200), min_size=0, max_size=20).map(np.array)


@given(vectors, st.floats(1e-3, 1e3))
def test_a_clipped_vector_is_within_the_limit_and_points_where_it_did(v: F, limit: float) -> None:
    out = clip(v, limit)
    assert np.linalg.norm(out) <= limit * (1 + 1e-12)
    peak = np.abs(v).max(initial=0.0)
    if peak and peak * np.linalg.norm(v / peak) <= limit:
        assert np.array_equal(out, v)
    assert (np.sign(out) * np.sign(v) >= 0).all()


def test_three_four_five() -> None:
    assert clip(np.array([3.0, 4.0]), 2.5) == pytest.approx([1.5, 2.0])
    assert clip(np.array([3.0, 4.0]), 5.0).tolist() == [3.0, 4.0]


def test_zero_stays_zero() -> None:
    assert clip(np.zeros(3), 1.0).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [np.array([1.0, math.nan]), np.array([math.inf])])
def test_what_has_no_norm_is_refused(bad: F) -> None:
    with pytest.raises(ValueError, match="NaN"):
        clip(bad, 1.0)


@pytest.mark.parametrize("limit", [0.0, -1.0, math.inf, math.nan])
def test_a_limit_out_of_range_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="limit"):
        clip(np.ones(2), limit)


# --- noise -----------------------------------------------------------------------------------------------------------


def test_noise_is_standard_normal() -> None:
    found = Noise(insecure_seed=1).normal(200_000)
    assert stats.kstest(found, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 4 / math.sqrt(len(found))
    assert np.isfinite(found).all()


def test_uniform_numbers_are_uniform_and_never_an_end() -> None:
    found = Noise(insecure_seed=2).uniform(100_000)
    assert stats.kstest(found, "uniform").pvalue > 1e-3
    assert found.min() > 0.0
    assert found.max() < 1.0
    with_ends = mechanisms.Noise(insecure_seed=0)
    with_ends._stream = type("Ones", (), {"update": staticmethod(lambda data: b"\xff" * len(data))})()
    assert with_ends.uniform(1)[0] < 1.0
    assert np.isfinite(with_ends.normal(1)).all()


def test_released_noise_has_the_stated_variance() -> None:
    """And half of it would not pass: the interval holds the true value with probability 1 - 1e-6."""
    limit, z, n = 0.5, 3.0, 20_000
    found = gaussian(np.zeros(n), limit, z, Noise())
    ratio = float(np.square(found).sum()) / (z * limit) ** 2
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], n)
    assert low < ratio < high
    assert not low < ratio / 4 < high
    assert not low < ratio * 4 < high


def test_noise_lies_on_top_of_the_clipped_vector() -> None:
    v = np.array([3.0, 4.0])
    noise = Noise(insecure_seed=3).normal(2)
    assert gaussian(v, 2.5, 2.0, Noise(insecure_seed=3)) == pytest.approx(np.array([1.5, 2.0]) + 5.0 * noise)
    for z in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="noise_multiplier"):
            gaussian(v, 1.0, z, Noise())


def test_two_sources_never_agree_and_an_insecure_one_repeats() -> None:
    assert not np.array_equal(Noise().normal(8), Noise().normal(8))
    assert np.array_equal(Noise(insecure_seed=5).normal(8), Noise(insecure_seed=5).normal(8))
    assert not np.array_equal(Noise(insecure_seed=5).normal(8), Noise(insecure_seed=6).normal(8))
    source = Noise(insecure_seed=5)
    assert not np.array_equal(source.normal(8), source.normal(8))


def test_noise_owes_nothing_to_global_seeds() -> None:
    def draw() -> F:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002  this is what must not matter
        return Noise().normal(4)

    assert not np.array_equal(draw(), draw())


def test_pieces_do_not_change_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanisms, "_AT_A_TIME", 7)
    found = Noise().normal(5, 3, 2)
    assert found.shape == (5, 3, 2)
    assert len(np.unique(found)) == 30


def test_why_torch_draws_no_noise_here() -> None:
    """Seeds that differ above bit 32 give the same numbers: 2**32 tries take the noise off."""
    a, b = (torch.normal(0.0, 1.0, (4,), generator=torch.Generator().manual_seed(s)) for s in (7, 7 + 2**32))
    assert torch.equal(a, b)


@pytest.mark.parametrize("rate", [0.02, 0.5])
def test_records_are_drawn_each_for_itself(rate: float) -> None:
    source = Noise(insecure_seed=4)
    drawn = np.stack([source.chosen(200, rate) for _ in range(1000)])
    assert stats.binomtest(int(drawn.sum()), drawn.size, rate).pvalue > 1e-4
    variance = drawn.sum(axis=1).var() / (200 * rate * (1 - rate))  # binomial numbers of records, not fixed ones
    assert 0.85 < variance < 1.15
    assert Noise().chosen(50, 1.0).all()


# --- site level ------------------------------------------------------------------------------------------------------


def test_the_ratio_is_noise_over_the_longest_mean() -> None:
    """At epsilon 8, delta 1e-3, 30 rounds and 5000 numbers; the study had about 20 for 10 sites and 10 for 20."""
    z = noise_for(8.0, 1e-3, 1.0, 30)
    ratio = mechanisms.site_level_ratio(10, 5000, 8.0, 1e-3, 30)
    assert ratio == pytest.approx(18.6, abs=0.1)
    assert mechanisms.site_level_ratio(20, 5000, 8.0, 1e-3, 30) == pytest.approx(ratio / 2)
    noise = z * Noise(insecure_seed=1).normal(5000)  # of a sum of ten updates of norm 1
    assert np.linalg.norm(noise) / 10 == pytest.approx(ratio, rel=0.05)


def test_site_level_privacy_is_refused_with_its_price() -> None:
    with pytest.raises(
        PlanRefused, match=r"noise about 18\.6 times as long .* of 5000 numbers\n  fix: use privacy.unit: record"
    ):
        mechanisms.refuse_site_level(10, 5000, 8.0, 1e-3, 30)
    with pytest.raises(PlanRefused, match="give one of 20 sites away"):
        mechanisms.refuse_site_level(20, 5000, 8.0, 0.05, 30)
    with pytest.raises(ValueError, match="at least 1"):
        mechanisms.site_level_ratio(0, 5000, 8.0, 1e-3, 30)
