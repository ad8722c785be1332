"""Laws of rules that withstand hostile sites."""

from __future__ import annotations

import ast
import inspect
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat.aggregation import robust
from fedmat.aggregation.robust import choose, choose_clear, exact_gram, refuse, selected, votes
from fedmat.config import RuleSpec
from fedmat.errors import PlanRefused, ProtocolError

NAMES = sorted(robust.GRAM_RULES | robust.CLEAR_ONLY)
ROBUST = [n for n in NAMES if n != "mean"]
GRAM = sorted(robust.GRAM_RULES - {"mean"})
FEWEST = {  # f -> least n, as the papers state it
    "krum": (3, 5, 7),
    "multi_krum": (3, 5, 7),
    "veto_multi_krum": (3, 5, 7),
    "nearest_neighbour_mixing": (1, 4, 5),
    "geometric_median": (1, 3, 5),
    "centred_clipping": (1, 3, 5),
    "coordinate_median": (1, 3, 5),
    "trimmed_mean": (1, 3, 5),
}


def gram(x: object) -> list[list[int]]:
    """Exact inner products of whole-number vectors, without a library."""
    rows = [[int(v) for v in r] for r in np.asarray(x, dtype=object)]
    return [[sum(a * b for a, b in zip(r, s, strict=True)) for s in rows] for r in rows]


def spec(name: str, f: int = 0, **more: float) -> RuleSpec:
    return RuleSpec(name=name, hostile=f, **more)


def cloud(seed: int, n: int, d: int = 12, away: float = 1.0) -> np.ndarray:
    """Honest updates: a common direction and as much of their own."""
    rng = np.random.default_rng(seed)
    return away * rng.normal(size=d) + rng.normal(size=(n, d))


# --- conditions ----------------------------------------------------------------------------------------------------


def test_the_rules_of_the_settings_are_the_rules_here() -> None:
    assert set(get_args(RuleSpec.model_fields["name"].annotation)) == robust.GRAM_RULES | robust.CLEAR_ONLY
    assert not robust.GRAM_RULES & robust.CLEAR_ONLY


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("f", [0, 1, 2])
def test_one_update_too_few_is_refused_with_a_way_out_and_never_clamped(name: str, f: int) -> None:
    least = FEWEST[name][f]
    refuse(spec(name, f), least)
    with pytest.raises(PlanRefused, match=f"at least {least}") as caught:
        refuse(spec(name, f), least - 1)
    assert caught.value.fix
    with pytest.raises(PlanRefused):
        selected(spec(name, f), least - 1)


@pytest.mark.parametrize("name", ROBUST)
def test_the_way_out_is_one(name: str) -> None:
    with pytest.raises(PlanRefused, match="lower plan.rule.hostile to at most 1"):
        refuse(spec(name, 3), 5 if name in ("krum", "multi_krum", "veto_multi_krum") else 4)
    refuse(spec(name, 1), 5)


def test_a_mean_against_hostile_sites_is_refused() -> None:
    refuse(spec("mean"), 1)
    with pytest.raises(PlanRefused, match="withstands nobody"):
        refuse(spec("mean", 1), 100)


@pytest.mark.parametrize("name", ["geometric_median", "centred_clipping", "coordinate_median"])
def test_rules_that_weigh_are_refused_where_the_heaviest_could_decide_alone(name: str) -> None:
    x = cloud(0, 5)
    choose_clear(spec(name, 1), x, [2, 1, 1, 1, 1])
    with pytest.raises(PlanRefused, match="half of the weight"):
        choose_clear(spec(name, 1), x, [4, 1, 1, 1, 1])


@pytest.mark.parametrize("name", sorted(robust.CLEAR_ONLY))
def test_rules_that_need_coordinates_cannot_be_had_from_inner_products(name: str) -> None:
    with pytest.raises(PlanRefused, match="coordinate"):
        choose(spec(name, 1), gram(np.eye(5, dtype=int)), [1] * 5)


@pytest.mark.parametrize(
    ("g", "base", "scores", "reason"),
    [
        ([[1, 2], [3, 4]], [1, 1], None, "bad_gram"),
        ([[-1]], [1], None, "bad_gram"),
        ([[1, 0]], [1], None, "bad_gram"),
        ([[1.5]], [1], None, "bad_gram"),
        ([[1]], [0], None, "bad_weights"),
        ([[1]], [robust.WEIGHT_BOUND + 1], None, "bad_weights"),
        ([[1]], [1], [1, 2], "bad_scores"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(g: object, base: list[int], scores: object, reason: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        choose(spec("mean"), g, base, scores)  # type: ignore[arg-type]
    assert caught.value.reason == reason


# --- laws of all rules ---------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_weights_are_whole_bounded_and_enough_and_who_is_left_out_is_told_why(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(GRAM))
    f = data.draw(st.integers(0, 2))
    n = data.draw(st.integers(max(3, FEWEST[name][f]), 9))
    x = data.draw(st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=n, max_size=n))
    base = data.draw(st.lists(st.integers(3, 4), min_size=n, max_size=n))
    scores = data.draw(st.none() | st.lists(st.integers(-3, 3), min_size=n, max_size=n))
    if name in ("geometric_median", "centred_clipping") and f and 2 * sum(sorted(base)[-f:]) >= sum(base):
        base = [1] * n
    found = choose(spec(name, f), gram(x), base, scores)
    assert all(isinstance(w, int) and w >= 0 for w in found.weights)
    assert 0 < sum(found.weights) <= robust.WEIGHT_BOUND
    counted = [w for w in found.weights if w]
    assert len(counted) >= selected(spec(name, f), n)
    assert max(counted) * len(counted) <= robust.MOST_OVER_MEAN * sum(counted)
    assert {i for i, w in enumerate(found.weights) if w == 0} <= set(found.reasons)


@pytest.mark.parametrize("name", [n for n in GRAM if n != "krum"])
def test_a_sum_over_the_least_number_of_updates_shows_two_honest_ones_to_those_who_work_together(name: str) -> None:
    for f in range(4):
        for n in range(max(5, 2 * f + 3), 20):
            assert selected(spec(name, f), n) >= max(n - 2 * f, f + 2, robust.MIN_SELECTED)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_sites_does_not_matter(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, base, scores = cloud(seed, 9), list(range(10, 19)), [int(v) for v in rng.permutation(9) - 3]
    f = 0 if name == "mean" else 2
    order = rng.permutation(9)
    mean, found = choose_clear(spec(name, f), x, base, scores)
    other, turned = choose_clear(spec(name, f), x[order], [base[i] for i in order], [scores[i] for i in order])
    assert turned.weights == tuple(found.weights[i] for i in order)
    assert other == pytest.approx(mean)


@pytest.mark.parametrize("name", GRAM)
def test_rotating_all_updates_rotates_the_result(name: str) -> None:
    x = np.round(cloud(3, 9) * 1000)
    turned = x[:, ::-1] * np.where(np.arange(x.shape[1]) % 2, -1, 1)  # exact: an axis swap and some signs
    assert choose(spec(name, 2), gram(x), [1] * 9) == choose(spec(name, 2), gram(turned), [1] * 9)


@pytest.mark.parametrize("name", NAMES)
def test_equal_updates_come_out_as_they_went_in(name: str) -> None:
    one = np.array([0.25, -3.0, 1e-3])
    mean, found = choose_clear(spec(name, 0 if name == "mean" else 1), np.tile(one, (6, 1)), [1] * 6)
    assert mean == pytest.approx(one)
    assert sum(found.weights) > 0


@pytest.mark.parametrize("name", NAMES)
def test_zero_updates_are_no_trouble(name: str) -> None:
    mean, _ = choose_clear(spec(name, 0 if name == "mean" else 1), np.zeros((6, 3)), [1] * 6)
    assert mean == pytest.approx(np.zeros(3))


@pytest.mark.parametrize("name", ROBUST)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(7, 12),
    decades=st.floats(-3, 9),
    together=st.booleans(),
    away=st.sampled_from([0.0, 3.0]),
)
def test_two_hostile_sites_cannot_take_the_result_far_from_the_honest_updates(
    name: str, seed: int, n: int, decades: float, together: bool, away: float
) -> None:
    x = cloud(seed, n, away=away)
    rng = np.random.default_rng(seed + 1)
    push = rng.normal(size=x.shape[1]) * 10**decades
    x[0], x[1] = push, push if together else -push
    honest = x[2:]
    mean, _ = choose_clear(spec(name, 2), x, [1] * n)
    if name == "veto_multi_krum":  # what it promises is a bound by length; what it vetoes is another matter
        assert np.linalg.norm(mean) <= 4.01 * np.linalg.norm(honest, axis=1).max()
    else:
        spread = np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
        assert np.linalg.norm(mean - honest.mean(axis=0)) <= 4.0 * spread


def test_the_same_attack_carries_a_mean_away() -> None:
    x = cloud(0, 9)
    x[0] *= 1e6
    mean, _ = choose_clear(spec("mean"), x, [1] * 9)
    assert np.linalg.norm(mean) > 1e4


# --- exact on any machine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAM)
def test_distances_that_floats_cannot_tell_apart_are_told_apart(name: str) -> None:
    """Five points 0, 1, 2, 3, 9 on a line, 2^40 away from the origin: their inner products differ in the 80th bit."""
    near = choose(spec(name, 1), gram([[0, 1], [1, 1], [2, 1], [3, 1], [9, 1]]), [1] * 5, [1] * 5)
    far = choose(spec(name, 1), gram([[v, 1 << 40] for v in (0, 1, 2, 3, 9)]), [1] * 5, [1] * 5)
    assert far.weights == near.weights
    assert far.weights[4] == 0 or far.weights[4] == min(far.weights)


@pytest.mark.parametrize("name", GRAM)
def test_numbers_of_any_integer_type_give_the_same_choice(name: str) -> None:
    g = gram(np.round(cloud(1, 7) * 100))
    assert choose(spec(name, 2), np.array(g), np.ones(7, np.int32)) == choose(spec(name, 2), g, [1] * 7)  # type: ignore[arg-type]


def test_nothing_that_decides_calls_a_float_library() -> None:
    """Weights have to be equal on every machine: whole numbers, no numpy, no division that rounds."""
    for decides in (
        robust._distances, robust._krum_scores, robust._mixing, robust._away, robust._fixed, robust._weiszfeld, robust._clipping,
        robust._to_scale, robust._lighter, robust.votes, robust._signed_square,
    ):  # fmt: skip
        nodes = [n for line in ast.parse(inspect.getsource(decides)).body[0].body for n in ast.walk(line)]  # type: ignore[attr-defined]
        assert not any(isinstance(n, ast.Div) or (isinstance(n, ast.Constant) and isinstance(n.value, float)) for n in nodes)
        assert not any(isinstance(n, ast.Name) and n.id in ("np", "float") for n in nodes)
        assert {
            n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "math"
        } <= {"isqrt"}


# --- one rule after the other ----------------------------------------------------------------------------------------


def test_krum_by_hand() -> None:
    """0, 1, 2, 3, 100 with f = 1: two nearest others give 1+4, 1+1, 1+1, 1+4, 97^2+98^2; the first of two equal wins."""
    g = gram([[0], [1], [2], [3], [100]])
    assert robust._krum_scores(g, 1) == [5, 2, 2, 5, 97**2 + 98**2]
    assert choose(spec("krum", 1), g, [7] * 5).weights == (0, 7, 0, 0, 0)
    found = choose(spec("multi_krum", 1), g, [1, 2, 3, 4, 5])
    assert found.weights == (1, 2, 3, 4, 0)
    assert found.reasons == {
        4: "left out: Krum rank 5 of 5, its squared distances to its nearest others are 3802.60 times the median; the first 4 count"
    }


def test_mean_gives_everyone_the_base_weight() -> None:
    assert choose(spec("mean"), gram([[1], [2], [3]]), [3, 2, 4]) == robust.Choice((3, 2, 4))


def test_no_site_outweighs_the_others_in_what_is_opened() -> None:
    found = choose(spec("mean"), gram(np.eye(9, dtype=int)), [92, 1, 1, 1, 1, 1, 1, 1, 1])
    assert max(found.weights) * 9 <= 4 * sum(found.weights)
    assert "counts for less" in found.reasons[0] and len(found.reasons) == 1


def test_mixing_equals_mixing_the_vectors_themselves() -> None:
    x = np.round(cloud(5, 10) * 1000)
    x[3] *= 9
    d = ((x[:, None] - x) ** 2).sum(-1)
    mixed = np.stack([x[np.argsort(row, kind="stable")[:8]].mean(0) for row in d])
    scores = robust._krum_scores(gram(np.round(mixed * 8)), 2)
    expected = mixed[np.argsort(scores, kind="stable")[:8]].mean(0)
    w = np.array(choose(spec("nearest_neighbour_mixing", 2), gram(x), [1] * 10).weights)
    assert w[3] == 0
    assert w @ x / w.sum() == pytest.approx(expected, rel=0.01, abs=5.0)


def test_geometric_median_equals_iterating_on_the_vectors_themselves() -> None:
    x, base = np.round(cloud(6, 9) * 1000), np.array([1, 2, 1, 2, 1, 2, 1, 2, 1])
    x[4] = -5 * x[0]
    v = base @ x / base.sum()
    for _ in range(200):
        r = np.linalg.norm(x - v, axis=1)
        order = np.argsort(r)
        middle = r[order][np.searchsorted(2 * np.cumsum(base[order]), base.sum())]
        w = base / np.maximum(r, middle / 2)
        v = w @ x / w.sum()
    found = np.array(choose(spec("geometric_median", 2), gram(x), list(base)).weights)
    assert found / found.sum() == pytest.approx(w / w.sum(), abs=2 / 1024)


def test_centred_clipping_equals_clipping_the_vectors_themselves() -> None:
    x = np.round(cloud(7, 9) * 1000)
    x[4] = -5 * x[0]
    v = x[np.argmin(np.linalg.norm(x[:, None] - x, axis=-1).sum(1))]
    for _ in range(60):
        r = np.linalg.norm(x - v, axis=1)
        reach = 0.8 * np.sort(r)[4]
        v = v + ((x - v) * np.minimum(1, reach / np.maximum(r, 1e-9))[:, None]).mean(0)
    found = np.array(choose(spec("centred_clipping", 2, radius=0.8), gram(x), [1] * 9).weights)
    assert np.linalg.norm(found @ x / found.sum() - v) < 0.02 * np.linalg.norm(x - v, axis=1).min()


def test_a_wide_radius_is_the_mean_and_a_narrow_one_is_not() -> None:
    g = gram(np.round(cloud(8, 7) * 1000))
    assert len(set(choose(spec("centred_clipping", 1, radius=100.0), g, [1] * 7).weights)) <= 2
    assert len(set(choose(spec("centred_clipping", 1, radius=0.5), g, [1] * 7).weights)) > 2


# --- veto ------------------------------------------------------------------------------------------------------------


def test_votes_by_hand() -> None:
    """Cosines of (1,0) with (1,1), (0,1), (-2,0) are 0.71, 0, -1: the middle one is 0."""
    found = votes(gram([[1, 0], [1, 1], [0, 1], [-2, 0]]))
    assert found == [0, 0.5, 0, -0.5]


@given(st.lists(st.integers(1, 1000), min_size=7, max_size=7), st.integers(0, 100))
def test_votes_do_not_depend_on_lengths(lengths: list[int], seed: int) -> None:
    x = np.round(cloud(seed, 7) * 100).astype(int)
    assert votes(gram(x)) == votes(gram(x * np.array(lengths)[:, None]))


@pytest.mark.parametrize("factor", [-2.0, -0.5, -0.01])
@pytest.mark.parametrize("seed", range(5))
def test_a_reversed_mean_of_any_length_is_vetoed_by_the_others_votes(factor: float, seed: int) -> None:
    x = cloud(seed, 10, d=40)
    x[[1, 6]] = factor * x[[0, 2, 3, 4, 5, 7, 8, 9]].mean(0)
    _, found = choose_clear(spec("veto_multi_krum", 2), x, [1] * 10)
    assert found.weights[1] == found.weights[6] == 0
    assert "points away from most others" in found.reasons[1]
    # Krum alone prefers them when they are short
    if factor == -0.01:
        assert choose_clear(spec("multi_krum", 2), x, [1] * 10)[1].weights[1]


def test_scores_decide_where_they_are_given_and_the_best_are_kept() -> None:
    g = gram(np.eye(10, dtype=int))
    some = choose(spec("veto_multi_krum", 2), g, [1] * 10, [5, -1, 5, 5, 5, 5, -9, 5, 5, 5])
    assert [i for i, w in enumerate(some.weights) if not w] == [1, 6]
    assert some.reasons[6] == "vetoed: predicted to make the reference rows worse, the worst of 10"
    many = choose(spec("veto_multi_krum", 2), g, [1] * 10, list(range(-10, 0)))
    assert many.weights == (0, 0, 0, 0, 1, 1, 1, 1, 1, 1)


def test_who_repeats_another_update_has_no_voice_of_its_own() -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(10, 40)) + 1.0
    x[7] = x[3] + 1e-3 * rng.normal(size=40)
    x[9] = x[3]
    found = choose(spec("veto_multi_krum", 2), gram(x), [1] * 10)
    assert [i for i, w in enumerate(found.weights) if not w] == [7, 9]
    assert found.reasons[9] == "vetoed: repeats the update of number 4 of 10"


def test_a_veto_of_fewer_than_f_leaves_the_rest_to_krum() -> None:
    x = np.ones((10, 2), dtype=int)
    x[4] = [3, -3]
    found = choose(spec("veto_multi_krum", 2), gram(x), [1] * 10, [1, -1, 1, 1, 1, 1, 1, 1, 1, 1])
    assert [i for i, w in enumerate(found.weights) if not w] == [1, 4]
    assert "after a veto of 1" in found.reasons[4]


def test_far_too_long_updates_go_first_whoever_else_is_judged_badly() -> None:
    x = np.ones((10, 2), dtype=int)
    x[8] = x[9] = [1000, 1000]
    found = choose(spec("veto_multi_krum", 2), gram(x), [1] * 10, [-5, -5, -5, -5, 1, 1, 1, 1, 9, 9])
    assert [i for i, w in enumerate(found.weights) if not w] == [2, 3, 8, 9]  # of equal scores the first ones stay
    assert found.reasons[8] == "vetoed: 1000.00 times as long as the median update; 4 times is the most"


# --- in the clear ----------------------------------------------------------------------------------------------------


def test_coordinate_median_by_hand() -> None:
    x = np.array([[1.0, 5.0], [2.0, 1.0], [9.0, 3.0]])
    assert robust.coordinate_median(x, [1, 1, 1]) == pytest.approx([2.0, 3.0])
    assert robust.coordinate_median(x[:2], [1, 1]) == pytest.approx([1.5, 3.0])
    assert robust.coordinate_median(x, [1, 1, 5]) == pytest.approx([9.0, 3.0])


@given(st.integers(0, 10**6), st.integers(1, 9))
def test_coordinate_median_of_equal_weights_is_the_median(seed: int, n: int) -> None:
    x = np.random.default_rng(seed).normal(size=(n, 4))
    assert robust.coordinate_median(x, [3] * n) == pytest.approx(np.median(x, axis=0))


def test_trimmed_mean_by_hand() -> None:
    x = np.array([[0.0], [1.0], [2.0], [3.0], [1e9]])
    assert robust.trimmed_mean(x, 1) == pytest.approx([2.0])
    assert robust.trimmed_mean(x, 2) == pytest.approx([2.0])
    with pytest.raises(PlanRefused, match="n > 2 f"):
        robust.trimmed_mean(x, 3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(name: str, bad: float) -> None:
    x = cloud(0, 7)
    x[2, 1] = bad
    with pytest.raises(ProtocolError, match="non_finite"):
        choose_clear(spec(name, 0 if name == "mean" else 1), x, [1] * 7)


@pytest.mark.parametrize("name", GRAM)
def test_in_the_clear_and_from_inner_products_the_choice_is_the_same(name: str) -> None:
    x = cloud(2, 8)
    mean, found = choose_clear(spec(name, 1), x, [1] * 8)
    assert found == choose(spec(name, 1), exact_gram(x), [1] * 8)
    assert mean == pytest.approx(np.array(found.weights) @ x / sum(found.weights))


@given(st.integers(0, 10**6), st.floats(-30, 30))
def test_inner_products_are_exact_for_what_was_rounded_and_true_to_the_updates(seed: int, decades: float) -> None:
    x = cloud(seed, 5, d=6) * 10**decades
    g = np.array(exact_gram(x), dtype=float)
    true = x @ x.T
    assert g / g[0, 0] == pytest.approx(true / true[0, 0], rel=1e-4, abs=1e-4)


def test_one_huge_update_does_not_round_the_others_away() -> None:
    x = cloud(1, 7)
    x[0] *= 1e12
    g = np.array(exact_gram(x), dtype=object)
    assert g[1:, 1:] == pytest.approx(np.array(exact_gram(x[1:]), dtype=object)) or np.all(np.diag(g)[1:] > 1 << 36)
    assert g[0, 0] > (1 << 30) * g[1, 1]


def test_inner_products_of_limbs_are_those_of_whole_numbers() -> None:
    x = np.array([[1.0, 3.0, -7.0], [2.0**21 + 1, -(2.0**20) - 3, 5.0], [-1.0, 2.0, 2.0]])
    unit = exact_gram(x)[0][0] // 59
    assert exact_gram(x) == [[v * unit for v in row] for row in gram(x)]
