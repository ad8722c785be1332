"""Laws of federated intervals: the promise holds, sketches lose nothing that matters, and nothing narrows in silence."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat.assurance import uncertainty as u
from fedmat.errors import DataError, PlanRefused, WireError

SCORES = st.lists(st.floats(0.0, 1e6, allow_nan=False), max_size=60).map(np.array)
LEVELS = (0.8, 0.9, 0.95)


def exact(scores: np.ndarray, level: float) -> float:
    """The conformal quantile of the scores themselves."""
    rank = math.ceil(round((len(scores) + 1) * level, 9))
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else math.inf


def upper_edge(score: float) -> float:
    return float(u.GRID[np.searchsorted(u.GRID, score)])


# --- sketches ------------------------------------------------------------------------------------------------------


def test_neighbouring_edges_are_less_than_one_percent_apart() -> None:
    edges = u.GRID[1:-1]
    assert u.GRID[0] == 0 and u.GRID[-1] == math.inf
    assert (edges[1:] / edges[:-1]).max() < 1.01


def test_a_score_counts_in_the_bin_whose_upper_edge_is_not_below_it() -> None:
    for at, score in ((0, 0.0), (1, 1e-9), (1, 1e-4), (u.BINS - 2, 1e4), (u.BINS - 1, 1.0001e4)):
        assert np.flatnonzero(u.sketch(np.array([score]))).tolist() == [at]


@given(st.lists(SCORES, max_size=5), st.randoms(use_true_random=False), st.sampled_from(LEVELS))
def test_merging_is_free_of_order_and_loses_one_bin_at_most(sites: list[np.ndarray], random, level: float) -> None:
    sketches = [u.sketch(s) for s in sites]
    merged = u.merge(sketches)
    random.shuffle(sketches)
    assert np.array_equal(merged, u.merge(sketches))
    pooled = np.concatenate([*sites, np.zeros(0)])
    assert np.array_equal(merged, u.sketch(pooled))
    wanted = exact(pooled, level)
    assert u.quantile(merged, level) == (upper_edge(wanted) if math.isfinite(wanted) else math.inf)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=20), min_size=2, max_size=6), st.permutations(range(6)))
def test_weighted_merging_is_free_of_order(sizes: list[list[int]], order: list[int]) -> None:
    sketches = [u.sketch(np.arange(len(s)) % 3 + 1.0, 1.0 / np.array(s)) for s in sizes]
    shuffled = [sketches[i] for i in order if i < len(sketches)]
    assert u.merge(sketches).tobytes() == u.merge(shuffled).tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1e-9])
def test_a_score_that_is_none_is_refused_and_not_quoted(bad: float) -> None:
    for call in (u.sketch, lambda s: u.joint(s, np.ones(3)), lambda s: u.joint(np.ones(3), s)):
        with pytest.raises(DataError) as caught:
            call(np.array([1.0, 777.125, bad]))
        assert "777" not in str(caught.value)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=20))
def test_any_list_of_floats_is_counted_whole_or_refused(values: list[float]) -> None:
    scores = np.array(values)
    if np.isfinite(scores).all() and (scores >= 0).all():
        assert u.sketch(scores).sum() == len(values)
    else:
        with pytest.raises(DataError):
            u.sketch(scores)


@pytest.mark.parametrize("weight", [0.0, -1.0, 1.5, np.nan])
def test_a_weight_outside_its_range_is_refused(weight: float) -> None:
    with pytest.raises(DataError, match="weights"):
        u.sketch(np.ones(2), np.array([1.0, weight]))


def test_a_foreign_sketch_is_refused() -> None:
    good = u.sketch(np.ones(3))
    assert u.sound(good, 3) and not u.sound(good, 2)
    for bad in (good[:-1], good * np.nan, -good, np.zeros((2, u.BINS))):
        assert not u.sound(bad)
        with pytest.raises(WireError):
            u.merge([good, bad])


# --- quantiles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "fewest"), [(0.8, 4), (0.9, 9), (0.95, 19)])
def test_too_few_scores_for_a_level_give_the_whole_line(level: float, fewest: int) -> None:
    assert u.quantile(u.sketch(np.ones(fewest - 1)), level) == math.inf
    assert u.quantile(u.sketch(np.ones(fewest)), level) == 1.0
    assert u.quantile(np.zeros(u.BINS), level) == math.inf


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, math.nan])
def test_a_level_that_is_none_is_refused(level: float) -> None:
    for call in (lambda: u.quantile(u.sketch(np.ones(9)), level), lambda: u.mondrian({"ash": u.sketch(np.ones(9))}, level)):
        with pytest.raises(PlanRefused):
            call()


@given(SCORES, st.sampled_from(LEVELS), st.floats(0, 1e6))
def test_a_larger_score_never_narrows(scores: np.ndarray, level: float, more: float) -> None:
    if len(scores):
        worse = scores.copy()
        worse[0] += more
        assert u.quantile(u.sketch(worse), level) >= u.quantile(u.sketch(scores), level)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=20, max_size=40), st.sampled_from(LEVELS))
def test_each_group_counts_one(sizes: list[int], level: float) -> None:
    group = np.repeat(np.arange(len(sizes)), sizes)
    scores = 1.0 + group.astype(float)  # equal in a group: repeating rows must change nothing
    weighted = u.sketch(scores, u.group_weights(group))
    assert weighted.sum() == pytest.approx(len(sizes))
    assert u.quantile(weighted, level) == u.quantile(u.sketch(1.0 + np.arange(len(sizes), dtype=float)), level)


def test_one_crowded_group_does_not_decide_for_all() -> None:
    group = np.array([*range(40), *[99] * 500])
    scores = np.array([*np.linspace(1.0, 2.0, 40), *[0.01] * 500])
    assert u.quantile(u.sketch(scores), 0.9) < 0.02
    assert u.quantile(u.sketch(scores, u.group_weights(group)), 0.9) > 1.8


# --- the promise ---------------------------------------------------------------------------------------------------


def binomial(share: float, n: int, z: float = 4.0) -> float:
    return z * math.sqrt(share * (1 - share) / n)


@pytest.mark.parametrize("level", LEVELS)
def test_new_rows_are_covered_as_often_as_promised(level: float) -> None:
    rng = np.random.default_rng(7)
    trials, n, hits, n_new = 400, 99, 0, 50
    for _ in range(trials):
        scores = np.abs(rng.standard_t(4, size=n + n_new))
        q = u.quantile(u.merge([u.sketch(part) for part in np.array_split(scores[:n], [10, 35, 60])]), level)
        hits += int((scores[n:] <= q).sum())
    share = hits / (trials * n_new)
    error = binomial(level, trials * n_new) + 4 * math.sqrt(level * (1 - level) / (n + 2) / trials)  # luck of calibration
    assert level - error <= share <= level + 1 / (n + 1) + 0.01 + error  # above: ties, and the bin's width


@pytest.mark.parametrize("level", LEVELS)
def test_a_row_of_a_new_group_is_covered_with_group_weights_and_not_without(level: float) -> None:
    rng = np.random.default_rng(11)
    trials, weighted, plain = 3000, 0, 0
    for _ in range(trials):
        size = np.where(rng.random(31) < 0.1, 100, 2)
        size[-1] = 1
        effect = np.exp(rng.normal(size=31)) * np.where(size == 100, 0.2, 1.0)  # crowded groups are easy ones
        effect[-1] = np.exp(rng.normal()) * (0.2 if rng.random() < 0.1 else 1.0)
        group = np.repeat(np.arange(31), size)
        scores = np.abs(rng.normal(size=len(group))) * effect[group]
        known, new = group < 30, scores[-1]
        weighted += new <= u.quantile(u.sketch(scores[known], u.group_weights(group[known])), level)
        plain += new <= u.quantile(u.sketch(scores[known]), level)
    assert weighted / trials >= level - binomial(level, trials)
    assert plain / trials < level - binomial(level, trials)


@pytest.mark.parametrize("level", LEVELS)
def test_half_widths_are_mapies_within_a_bin(level: float) -> None:
    mapie = pytest.importorskip("mapie.regression")
    from sklearn.linear_model import LinearRegression

    rng = np.random.default_rng(3)
    x = rng.normal(size=(400, 3))
    y = x @ np.array([1.0, -2.0, 0.5]) + rng.standard_t(3, size=400)
    model = LinearRegression().fit(x[:200], y[:200])
    reference = mapie.SplitConformalRegressor(model, confidence_level=level, prefit=True).conformalize(x[200:], y[200:])
    _, interval = reference.predict_interval(x[:5])
    half = (interval[:, 1, 0] - interval[:, 0, 0]) / 2
    scores = np.abs(y[200:] - model.predict(x[200:]))
    ours = u.quantile(u.merge([u.sketch(s) for s in np.array_split(scores, 4)]), level)
    assert np.all(ours >= half - 1e-9) and np.all(ours <= 1.01 * half)


# --- one quantile for each site ------------------------------------------------------------------------------------


def test_a_site_with_enough_scores_keeps_its_own_promise() -> None:
    rng = np.random.default_rng(5)
    scale = {"ash": 0.2, "birch": 1.0, "cedar": 5.0}
    own = {s: u.sketch(np.abs(rng.normal(size=300)) * k) for s, k in scale.items()}
    q = u.mondrian(own, 0.9)
    for site, k in scale.items():
        assert q[site] == u.quantile(own[site], 0.9)
        assert (np.abs(rng.normal(size=5000)) * k <= q[site]).mean() == pytest.approx(0.9, abs=0.06)
    common = u.quantile(u.merge(list(own.values())), 0.9)
    assert (np.abs(rng.normal(size=5000)) * scale["cedar"] <= common).mean() < 0.8  # why one quantile for all is not enough


@settings(max_examples=200)
@given(st.lists(SCORES, min_size=1, max_size=5), st.sampled_from(LEVELS), st.sampled_from([20, 40, 100]))
def test_a_site_with_too_few_scores_is_never_narrower_than_the_consortium(
    sites: list[np.ndarray], level: float, floor: int
) -> None:
    sketches = {f"s{i}": u.sketch(s) for i, s in enumerate(sites)}
    common = u.quantile(u.merge(list(sketches.values())), level)
    for site, q in u.mondrian(sketches, level, floor).items():
        n = sketches[site].sum()
        assert q == u.quantile(sketches[site], level) if n >= floor else q >= common


def test_a_site_that_is_visibly_harder_is_widened_before_it_has_enough() -> None:
    easy, hard = u.sketch(np.linspace(0.01, 1, 400)), u.sketch(np.full(30, 8.0))
    q = u.mondrian({"easy": easy, "hard": hard, "silent": np.zeros(u.BINS)}, 0.9)
    assert q["hard"] >= 8.0 > u.quantile(u.merge([easy, hard]), 0.9)
    common = u.quantile(u.merge([easy, hard]), 0.9)
    assert common <= q["silent"] < 1.02 * common  # nothing but the consortium, and a little for luck
    assert q["easy"] == u.quantile(easy, 0.9)


def test_without_evidence_nothing_is_narrow() -> None:
    assert u.mondrian({"ash": np.zeros(u.BINS), "birch": u.sketch(np.ones(3))}, 0.9) == {"ash": math.inf, "birch": math.inf}
    assert u.mondrian({}, 0.9) == {}


def test_a_floor_that_cannot_evidence_the_level_is_refused() -> None:
    with pytest.raises(PlanRefused, match="19 or more"):
        u.mondrian({"ash": u.sketch(np.ones(50))}, 0.95, floor=18)
    assert u.mondrian({"ash": u.sketch(np.ones(19))}, 0.95, floor=19) == {"ash": 1.0}


@given(SCORES, st.integers(1, 12), st.sampled_from(LEVELS))
def test_coarsening_hides_small_counts_and_never_narrows(scores: np.ndarray, minimum: int, level: float) -> None:
    fine = u.sketch(scores)
    coarse = u.coarsen(fine, minimum)
    assert coarse.sum() == fine.sum()
    assert np.all(np.cumsum(coarse) <= np.cumsum(fine))  # every count moved up or stayed
    assert u.quantile(coarse, level) >= u.quantile(fine, level)
    small = (coarse > 0) & (coarse < minimum)
    assert not small[:-1].any() and (not small[-1] or fine.sum() < minimum)


# --- difficulty ----------------------------------------------------------------------------------------------------


def test_difficulty_widens_where_the_ensemble_disagrees_and_keeps_the_promise() -> None:
    rng = np.random.default_rng(2)
    noise = np.exp(rng.normal(size=4000))
    d = u.difficulty(noise * rng.uniform(0.8, 1.2, size=4000), floor=0.05)
    error = np.abs(rng.normal(size=4000)) * noise
    q = u.quantile(u.sketch(error[:2000] / d[:2000]), 0.9)
    plain = u.quantile(u.sketch(error[:2000]), 0.9)
    assert (error[2000:] <= q * d[2000:]).mean() == pytest.approx(0.9, abs=0.03)
    assert (q * d[2000:]).mean() < plain
    hardest = noise[2000:] > np.quantile(noise, 0.9)
    assert (error[2000:] <= plain)[hardest].mean() < 0.75 < (error[2000:] <= q * d[2000:])[hardest].mean()


def test_spread_is_the_sample_deviation_and_needs_two_members() -> None:
    members = np.array([[1.0, 5.0], [3.0, 5.0]])
    assert np.allclose(u.spread(members), [math.sqrt(2), 0.0])
    for bad in (members[:1], members[0]):
        with pytest.raises(PlanRefused):
            u.spread(bad)
    with pytest.raises(DataError):
        u.spread(np.array([[1.0, np.nan], [1.0, 2.0]]))
    for floor in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(PlanRefused):
            u.difficulty(np.ones(2), floor)


# --- coverage ------------------------------------------------------------------------------------------------------


def test_coverage_of_a_hand_computable_case() -> None:
    c = u.coverage(np.array([0.0, 1.0, 2.0, 9.0]), np.zeros(4), np.full(4, 2.0))
    assert (c.n, c.covered, c.share, c.n_groups, c.mean_width) == (4, 3, 0.75, 4, 2.0)
    assert c.low == pytest.approx(0.300642, abs=1e-6) and c.high == pytest.approx(0.954413, abs=1e-6)  # Wilson, 3 of 4


def test_repeated_rows_of_a_group_are_no_new_evidence() -> None:
    truth, low = np.arange(30) % 4 == 0, np.full(30, 0.5)
    once = u.coverage(truth.astype(float), low, low + 1, np.arange(30))
    often = u.coverage(
        np.repeat(truth, 20).astype(float), np.repeat(low, 20), np.repeat(low + 1, 20), np.repeat(np.arange(30), 20)
    )
    blind = u.coverage(np.repeat(truth, 20).astype(float), np.repeat(low, 20), np.repeat(low + 1, 20))
    assert often.share == once.share
    assert often.high - often.low == pytest.approx(once.high - once.low, rel=0.1)
    assert blind.high - blind.low < 0.5 * (often.high - often.low)


@pytest.mark.parametrize("groups", [6, 12, 40])
def test_the_interval_of_the_share_holds_the_true_share(groups: int) -> None:
    rng = np.random.default_rng(groups)
    held, blind, trials = 0, 0, 1000
    for _ in range(trials):
        p = rng.beta(6, 1.5, size=groups)  # 0.8 on average, groups differ
        group = np.repeat(np.arange(groups), rng.integers(3, 30, size=groups))
        inside = rng.random(len(group)) < p[group]
        truth = np.where(inside, 0.0, 5.0)
        ends = -np.ones(len(group)), np.ones(len(group))
        grouped, single = u.coverage(truth, *ends, group), u.coverage(truth, *ends)
        held += grouped.low <= 0.8 <= grouped.high
        blind += single.low <= 0.8 <= single.high
    assert held / trials >= 0.93
    assert blind < held


def test_full_coverage_is_no_certainty() -> None:
    c = u.coverage(np.zeros(600), -np.ones(600), np.ones(600), np.repeat(np.arange(3), 200))
    assert c.share == c.high == 1.0 and c.low < 0.5
    assert u.coverage(np.zeros(5), np.full(5, -np.inf), np.full(5, np.inf)).mean_width == math.inf


def test_students_points_are_scipys() -> None:
    from scipy.stats import t

    for df in (1, 2, 3, 4, 5, 6, 10, 30, 1000):
        assert u._t95(df) == pytest.approx(t.ppf(0.975, df), rel=2e-3)


@pytest.mark.parametrize(
    ("truth", "low", "high"),
    [([], [], []), ([1.0], [0.0, 0.0], [1.0, 1.0]), ([np.nan], [0.0], [1.0]), ([1.0], [np.nan], [2.0]), ([1.0], [2.0], [1.0])],
)
def test_what_cannot_be_scored_is_refused(truth: list[float], low: list[float], high: list[float]) -> None:
    with pytest.raises(DataError):
        u.coverage(np.array(truth), np.array(low), np.array(high))


# --- ranking -------------------------------------------------------------------------------------------------------


def sparsification(uncertainty: np.ndarray, error: np.ndarray) -> float:
    """AUSE row by row, as the paper has it."""

    def curve(order: np.ndarray) -> np.ndarray:
        return np.cumsum(error[order]) / np.arange(1, len(error) + 1)

    return float((curve(np.argsort(uncertainty)) - curve(np.argsort(error))).mean() / error.mean())


@pytest.mark.parametrize("noise", [0.05, 0.5, 2.0])
def test_ranking_from_counts_is_that_of_the_rows(noise: float) -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(1)
    sigma = np.exp(rng.normal(size=3000)) * 0.3
    error = np.abs(rng.normal(size=3000)) * sigma
    guess = sigma * np.exp(noise * rng.normal(size=3000))
    r = u.ranking(sum(u.joint(g, e) for g, e in zip(np.array_split(guess, 3), np.array_split(error, 3))))
    assert r.n == 3000
    assert r.spearman == pytest.approx(spearmanr(guess, error).statistic, abs=0.01)
    assert r.ause == pytest.approx(sparsification(guess, error), abs=0.02)
    assert r.ause_random == pytest.approx(np.mean([sparsification(rng.permutation(guess), error) for _ in range(20)]), abs=0.02)


def test_a_perfect_uncertainty_has_no_area_and_a_constant_one_no_rank() -> None:
    error = np.abs(np.random.default_rng(0).normal(size=200))
    perfect = u.ranking(u.joint(error, error))
    assert perfect.ause == pytest.approx(0.0, abs=1e-12) and perfect.spearman == pytest.approx(1.0)
    constant = u.ranking(u.joint(np.ones(200), error))
    assert constant.spearman is None and constant.ause == pytest.approx(constant.ause_random)
    nothing = u.ranking(u.joint(np.ones(4), np.zeros(4)))
    assert (nothing.spearman, nothing.ause, nothing.ause_random) == (None, 0.0, 0.0)


def test_a_table_that_is_none_is_refused() -> None:
    table = u.joint(np.ones(2), np.ones(2))
    for bad in (table[1:], -table, table * np.nan):
        with pytest.raises(WireError):
            u.ranking(bad)
    with pytest.raises(DataError):
        u.ranking(table * 0)
