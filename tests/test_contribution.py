"""Laws of shares, settlements, flags and credits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat import contribution
from fedmat.contribution import (
    Bounds,
    Moments,
    coalition_worth,
    credits,
    flags,
    gram_shapley,
    gram_shapley_of_owners,
    gram_shapley_sampled,
    head_shapley,
    head_shapley_sampled,
    head_worth,
    moments,
    noise_scale,
    noisy,
    shapley,
)
from fedmat.errors import NotEvidenced, PlanRefused, ProtocolError
from fedmat.privacy.mechanisms import Noise
from fedmat.seeds import stream


def symmetric(a: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * (a + a.T))


def images(seed: int, n: int = 6, rows: int = 15) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Changes of predictions (``n x rows``), residuals and weights of a round."""
    rng = np.random.default_rng(seed)
    p = rng.normal(size=(n, rows)) * 0.3
    return p, p[0] + p[n // 2] + 0.1 * rng.normal(size=rows), rng.integers(1, 9, n).astype(float)


def game(seed: int, n: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    p, r, w = images(seed, n)
    return symmetric(p @ p.T), p @ r, w


def by_orders(worth: np.ndarray, n: int) -> np.ndarray:
    """Shapley's definition: the mean gain over all orders of arrival."""
    out = np.zeros(n)
    for order in itertools.permutations(range(n)):
        there = 0
        for i in order:
            out[i] += worth[there | 1 << i] - worth[there]
            there |= 1 << i
    return out / math.factorial(n)


# --- the game ------------------------------------------------------------------------------------------------------


def test_shares_of_the_glove_game_by_hand() -> None:
    """One left glove (site 0), two right ones: a pair is worth 1. Shapley's answer is 2/3, 1/6, 1/6."""
    assert shapley([0, 0, 0, 1, 0, 1, 0, 1]) == pytest.approx([2 / 3, 1 / 6, 1 / 6])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_shares_are_the_mean_gain_over_all_orders(seed: int, n: int) -> None:
    worth = np.random.default_rng(seed).normal(size=1 << n)
    assert shapley(worth) == pytest.approx(by_orders(worth, n))


@given(st.integers(0, 10**6), st.integers(1, 8))
def test_shares_add_up_to_what_all_gained_over_nobody(seed: int, n: int) -> None:
    worth = np.random.default_rng(seed).normal(size=1 << n)
    assert shapley(worth).sum() == pytest.approx(worth[-1] - worth[0])


@given(st.integers(0, 10**6))
def test_shares_of_two_rounds_add_up(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, two = rng.normal(size=32), rng.normal(size=32)
    assert shapley(one) + shapley(two) == pytest.approx(shapley(one + two))


@given(st.integers(0, 10**6), st.integers(0, 4))
def test_who_never_changes_a_coalitions_worth_gets_nothing(seed: int, dummy: int) -> None:
    worth = np.random.default_rng(seed).normal(size=32)
    coalitions = np.arange(32)
    worth[coalitions | 1 << dummy] = worth[coalitions & ~(1 << dummy)]
    assert shapley(worth)[dummy] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("bad", [[0.0, 1.0, 2.0], [0.0, float("nan")], [[0.0, 1.0]]])
def test_what_is_no_game_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="coalition"):
        shapley(bad)  # type: ignore[arg-type]


# --- per round -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 6))
def test_worth_from_inner_products_is_the_fall_of_the_error_of_the_coalitions_own_mean(seed: int, n: int) -> None:
    p, r, w = images(seed, n)
    found = coalition_worth(symmetric(p @ p.T), p @ r, w, rows=15)
    for there in range(1, 1 << n):
        members = [i for i in range(n) if there >> i & 1]
        mean = w[members] @ p[members] / w[members].sum()
        assert found[there] == pytest.approx(np.mean(r**2) - np.mean((r - mean) ** 2), abs=1e-12)
    assert found[0] == 0.0


@given(st.integers(0, 10**6))
def test_shares_follow_the_sites_when_they_change_places(seed: int) -> None:
    g, b, w = game(seed)
    order = np.random.default_rng(seed).permutation(6)
    assert gram_shapley(g[np.ix_(order, order)], b[order], w[order]) == pytest.approx(gram_shapley(g, b, w)[order])


@given(st.integers(0, 10**6))
def test_two_sites_with_the_same_update_and_weight_get_the_same(seed: int) -> None:
    p, r, w = images(seed)
    p[4], w[4] = p[2], w[2]
    shares = gram_shapley(symmetric(p @ p.T), p @ r, w)
    assert shares[4] == pytest.approx(shares[2])


@given(st.integers(0, 10**6))
def test_shares_of_a_round_add_up_to_its_gain(seed: int) -> None:
    p, r, w = images(seed)
    gain = np.mean(r**2) - np.mean((r - w @ p / w.sum()) ** 2)
    assert gram_shapley(symmetric(p @ p.T), p @ r, w, rows=15).sum() == pytest.approx(gain)


def test_a_zero_update_is_no_dummy_it_dilutes() -> None:
    """One site explains the residual; a second that sends zero halves the mean: v = 1 alone, 3/4 together, 0 for zero alone."""
    worth = coalition_worth([[1.0, 0.0], [0.0, 0.0]], [1.0, 0.0], [1.0, 1.0])
    assert worth == pytest.approx([0, 1, 0, 0.75])
    assert gram_shapley([[1.0, 0.0], [0.0, 0.0]], [1.0, 0.0], [1.0, 1.0]) == pytest.approx([0.875, -0.125])


@given(st.integers(0, 10**6), st.integers(2, 6))
def test_only_ratios_of_weights_matter(seed: int, factor: int) -> None:
    g, b, w = game(seed)
    assert gram_shapley(g, b, factor * w) == pytest.approx(gram_shapley(g, b, w))


def test_every_party_gets_the_same_bits_from_an_order_of_additions_of_its_own() -> None:
    """The sum over coalitions is by halves: here against the definition, in Python floats."""

    def halves(x: list[float]) -> float:
        while len(x) > 1:
            x = [a + b for a, b in zip(x[: len(x) // 2], x[len(x) // 2 :], strict=True)]
        return x[0]

    g, b, w = game(1, 7)
    worth = coalition_worth(g, b, w).tolist()
    for i, share in enumerate(gram_shapley(g, b, w)):
        without = [s for s in range(128) if not s >> i & 1]
        terms = [1.0 / (7 * math.comb(6, s.bit_count())) * (worth[s | 1 << i] - worth[s]) for s in without]
        assert halves(terms) == share


def test_more_sites_than_coalitions_can_be_listed_for_are_refused_with_the_way_out() -> None:
    with pytest.raises(PlanRefused, match="gram_shapley_sampled"):
        gram_shapley(np.eye(21), np.ones(21), np.ones(21))


def test_twenty_sites_take_all_coalitions() -> None:
    g, b, w = game(0, 20)
    assert gram_shapley(g, b, w).sum() == pytest.approx(2 * b @ w / w.sum() - w @ g @ w / w.sum() ** 2)


def test_sampled_shares_are_within_their_errors_and_add_up() -> None:
    g, b, w = game(3, 8)
    exact = gram_shapley(g, b, w)
    found = gram_shapley_sampled(g, b, w, rng=stream(1, "orders"), permutations=4000)
    assert found.values.sum() == pytest.approx(exact.sum())
    assert (np.abs(found.values - exact) < 4.5 * found.errors).all()
    assert (found.errors < 0.05 * np.abs(exact).max()).all()


def test_standard_errors_say_how_far_estimates_scatter() -> None:
    g, b, w = game(4, 8)
    runs = [gram_shapley_sampled(g, b, w, rng=stream(k, "orders"), permutations=100) for k in range(120)]
    scatter = np.std([r.values for r in runs], axis=0)
    assert np.mean([r.errors for r in runs], axis=0) == pytest.approx(scatter, rel=0.25)


def test_sampling_serves_more_sites() -> None:
    g, b, w = game(5, 30)
    found = gram_shapley_sampled(g, b, w, rng=stream(1, "orders"), permutations=200)
    assert found.values.shape == (30,)
    with pytest.raises(ValueError, match="even"):
        gram_shapley_sampled(g, b, w, rng=stream(1, "orders"), permutations=3)


@pytest.mark.parametrize(
    ("g", "b", "w"),
    [
        ([[1.0, 0.0]], [1.0], [1.0]),
        ([[1.0, 2.0], [3.0, 1.0]], [1.0, 1.0], [1.0, 1.0]),
        ([[-1.0]], [1.0], [1.0]),
        ([[float("nan")]], [1.0], [1.0]),
        ([[1.0]], [1.0], [0.0]),
        ([], [], []),
    ],
)
def test_inner_products_of_no_updates_are_refused(g: object, b: object, w: object) -> None:
    with pytest.raises(ProtocolError, match="bad_gram"):
        gram_shapley(g, b, w)  # type: ignore[arg-type]


# --- one owner, one player -----------------------------------------------------------------------------------------


@given(st.integers(0, 10**6))
def test_owners_with_one_site_each_are_the_sites(seed: int) -> None:
    g, b, w = game(seed)
    assert gram_shapley_of_owners(g, b, w, [[i] for i in range(6)]) == pytest.approx(gram_shapley(g, b, w))


@given(st.integers(0, 10**6))
def test_copies_taken_as_one_player_get_what_one_site_with_their_weight_would(seed: int) -> None:
    """The quotient game: however many identities a site shows, nothing is gained by it."""
    p, r, w = images(seed, 5)
    alone = gram_shapley(symmetric(p @ p.T), p @ r, w)
    three, parts = p[[0, 1, 2, 3, 4, 4, 4]], np.append(w[:4], [w[4] / 2, w[4] / 4, w[4] / 4])
    found = gram_shapley_of_owners(symmetric(three @ three.T), three @ r, parts, [[0], [1], [2], [3], [4, 5, 6]])
    assert found[:4] == pytest.approx(alone[:4])
    assert found[4:] == pytest.approx(alone[4] * np.array([0.5, 0.25, 0.25]))


@given(st.integers(0, 10**6))
def test_what_all_get_together_does_not_depend_on_who_is_one_player(seed: int) -> None:
    g, b, w = game(seed)
    assert gram_shapley_of_owners(g, b, w, [[0, 3], [1, 2, 4], [5]]).sum() == pytest.approx(gram_shapley(g, b, w).sum())


@pytest.mark.parametrize("owners", [[[0, 1]], [[0, 1], [1, 2]], [[0, 1, 2], []]])
def test_groups_that_do_not_divide_the_sites_are_refused(owners: list[list[int]]) -> None:
    g, b, w = game(0, 3)
    with pytest.raises(ProtocolError, match="exactly once"):
        gram_shapley_of_owners(g, b, w, owners)


# --- per release ---------------------------------------------------------------------------------------------------


def rows(rng: np.random.Generator, n: int, beta: np.ndarray, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    phi = rng.normal(size=(n, len(beta)))
    return phi, phi @ beta + noise * rng.normal(size=n)


def settlement(seed: int, noises: tuple[float, ...] = (0.1, 0.1, 0.1, 0.1)) -> tuple[list[Moments], Moments]:
    rng = np.random.default_rng(seed)
    beta = rng.normal(size=5)
    return [moments(*rows(rng, 12, beta, s)) for s in noises], moments(*rows(rng, 300, beta))


def test_worth_of_a_coalition_is_that_of_ridge_on_its_rows() -> None:
    rng = np.random.default_rng(0)
    beta = rng.normal(size=4)
    data = [rows(rng, 9, beta) for _ in range(3)]
    phi, y = rows(rng, 50, beta)
    found = head_worth([moments(*d) for d in data], moments(phi, y), 0.5)
    for there in range(1, 8):
        x = np.concatenate([data[i][0] for i in range(3) if there >> i & 1])
        t = np.concatenate([data[i][1] for i in range(3) if there >> i & 1])
        fitted = np.linalg.lstsq(np.concatenate([x, math.sqrt(0.5) * np.eye(4)]), np.append(t, np.zeros(4)), rcond=None)[0]
        assert found[there] == pytest.approx(np.mean(y**2) - np.mean((y - phi @ fitted) ** 2))
    assert found[0] == 0.0


def test_settlement_adds_up_and_equal_sites_get_the_same() -> None:
    parts, held_out = settlement(1)
    parts[3] = parts[0]
    shares = head_shapley(parts, held_out, 1.0)
    assert shares.sum() == pytest.approx(head_worth(parts, held_out, 1.0)[-1])
    assert shares[3] == pytest.approx(shares[0])


def test_a_site_without_rows_is_a_dummy_of_the_settlement() -> None:
    parts, held_out = settlement(2)
    parts[1] = Moments(0, np.zeros((5, 5)), np.zeros(5), 0.0)
    assert head_shapley(parts, held_out, 1.0)[1] == pytest.approx(0.0, abs=1e-12)


def test_the_noisier_a_sites_labels_the_less_it_gets() -> None:
    """Mean over 30 data sets: each step of noise costs more than the standard error of the difference."""
    shares = np.array([head_shapley(*settlement(seed, (0.1, 1.0, 2.0, 4.0)), 1.0) for seed in range(30)])
    steps = shares[:, :-1] - shares[:, 1:]
    assert (steps.mean(axis=0) > 2 * steps.std(axis=0) / math.sqrt(len(steps))).all()


def test_coalitions_in_small_portions_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, held_out = settlement(3)
    whole = head_shapley(parts, held_out, 1.0)
    monkeypatch.setattr(contribution, "_AT_A_TIME", 60)
    assert head_shapley(parts, held_out, 1.0) == pytest.approx(whole)


def test_a_sampled_settlement_is_within_its_errors_and_serves_more_sites() -> None:
    parts, held_out = settlement(4, (0.1, 0.5, 1.0, 2.0, 3.0, 0.1))
    exact = head_shapley(parts, held_out, 1.0)
    found = head_shapley_sampled(parts, held_out, 1.0, rng=stream(2, "orders"), permutations=600)
    assert (np.abs(found.values - exact) < 4.5 * found.errors + 1e-12).all()
    assert found.values.sum() == pytest.approx(exact.sum())
    many, held_out = settlement(5, (0.5,) * 15)
    assert head_shapley_sampled(many, held_out, 1.0, rng=stream(3, "orders"), permutations=20).values.shape == (15,)
    with pytest.raises(PlanRefused, match="head_shapley_sampled"):
        head_shapley(many, held_out, 1.0)


def test_settlements_that_cannot_be_are_refused() -> None:
    parts, held_out = settlement(6)
    with pytest.raises(PlanRefused, match="above 0"):
        head_shapley(parts, held_out, 0.0)
    with pytest.raises(ProtocolError, match="bad_moments"):
        head_shapley([*parts, moments(np.ones((2, 3)), np.ones(2))], held_out, 1.0)
    with pytest.raises(ProtocolError, match="bad_moments"):
        moments([[1.0, float("nan")]], [1.0])
    with pytest.raises(ProtocolError, match="symmetric"):
        Moments(1, np.array([[1.0, 2.0], [0.0, 1.0]]), np.zeros(2), 0.0)
    indefinite = Moments(9, -5 * np.eye(5), np.zeros(5), 1.0)
    with pytest.raises(PlanRefused, match="too small for the noise"):
        head_shapley([*parts[:1], indefinite], held_out, 1.0)


# --- noise ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 20.0), st.floats(1e-10, 1e-2))
def test_the_noise_keeps_delta_and_a_little_less_does_not(epsilon: float, delta: float) -> None:
    from scipy.special import ndtr

    def leak(s: float) -> float:
        return float(ndtr(0.5 / s - epsilon * s) - math.exp(epsilon) * ndtr(-0.5 / s - epsilon * s))

    s = noise_scale(epsilon, delta)
    assert leak(s) <= delta * (1 + 1e-6)
    assert leak(s * 0.999) > delta


def test_the_noise_agrees_with_the_accountant_of_training() -> None:
    from fedmat.privacy import accounting

    assert accounting.noise_for(1.0, 1e-5, 1.0, 1) == pytest.approx(noise_scale(1.0, 1e-5), rel=2e-3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 10), st.floats(0.1, 10))
def test_replacing_a_row_moves_moments_by_no_more_than_the_sensitivity(seed: int, big: float, high: float) -> None:
    """In the norm the noise is spherical in: Frobenius, in units of the bounds, over features, products and square."""
    rng, bounds = np.random.default_rng(seed), Bounds(big, high)
    phi, y = rng.normal(size=(2, 3)) * 10, rng.normal(size=2) * 10
    one, two = moments(phi[:1], y[:1], bounds), moments(phi[1:], y[1:], bounds)
    change = np.block([
        [(one.features - two.features) / big**2, (one.products - two.products)[:, None] / (big * high)],
        [(one.products - two.products)[None] / (big * high), np.array([[(one.square - two.square) / high**2]])],
    ])  # fmt: skip
    assert np.linalg.norm(change) <= 2 * math.sqrt(2) + 1e-9


def test_the_sensitivity_is_reached() -> None:
    one, two = (moments([[2.0, 0.0]], [3.0]), moments([[0.0, 2.0]], [3.0]))
    change = np.linalg.norm((one.features - two.features) / 4) ** 2 + 2 * np.linalg.norm((one.products - two.products) / 6) ** 2
    assert 2 * math.sqrt(2) * 0.8 < math.sqrt(change) <= 2 * math.sqrt(2)


def test_noise_has_the_variance_it_claims_and_is_symmetric() -> None:
    bounds, base = Bounds(2.0, 3.0), moments(np.zeros((4, 3)), np.zeros(4))
    s = 2 * math.sqrt(2) * noise_scale(1.0, 1e-5)
    source = Noise(insecure_seed=1)
    drawn = [noisy(base, bounds, 1.0, 1e-5, noise=source) for _ in range(2500)]
    assert all(np.array_equal(m.features, m.features.T) for m in drawn)
    spread = np.std([m.features for m in drawn], axis=0)
    assert np.diag(spread) == pytest.approx(np.full(3, 4 * s), rel=0.06)
    assert spread[0, 1] == pytest.approx(4 * s / math.sqrt(2), rel=0.06)
    assert np.std([m.products for m in drawn], axis=0) == pytest.approx(np.full(3, 6 * s / math.sqrt(2)), rel=0.06)
    assert np.std([m.square for m in drawn]) == pytest.approx(9 * s, rel=0.06)
    assert np.mean([m.features for m in drawn], axis=0) == pytest.approx(np.zeros((3, 3)), abs=5 * 4 * s / math.sqrt(2500))


def test_noise_is_fresh_each_time() -> None:
    base = moments(np.zeros((4, 3)), np.zeros(4))
    one, two = (noisy(base, Bounds(1, 1), 1.0, 1e-5) for _ in range(2))
    assert not np.array_equal(one.products, two.products)
    assert one.n == base.n


def test_rows_beyond_the_bounds_are_refused_and_clipped_ones_are_not() -> None:
    phi, y = np.full((4, 3), 10.0), np.full(4, 10.0)
    with pytest.raises(ProtocolError, match="bounds"):
        noisy(moments(phi, y), Bounds(1, 1), 1.0, 1e-5)
    noisy(moments(phi, y, Bounds(1, 1)), Bounds(1, 1), 1.0, 1e-5)
    for epsilon, delta in ((0.0, 1e-5), (1.0, 0.0), (1.0, 1.0), (float("nan"), 0.1)):
        with pytest.raises(PlanRefused):
            noisy(moments(phi, y, Bounds(1, 1)), Bounds(1, 1), epsilon, delta)


def test_with_rows_enough_the_noisy_settlement_is_the_settlement() -> None:
    rng, bounds = np.random.default_rng(0), Bounds(4.0, 6.0)
    beta = np.array([1.0, -1.0, 0.5])
    parts = [moments(*rows(rng, n, beta, 1.0), bounds) for n in (20_000, 40_000)]
    held_out = moments(*rows(rng, 500, beta))
    private = [noisy(m, bounds, 1.0, 1e-6, noise=Noise(insecure_seed=k)) for k, m in enumerate(parts)]
    assert head_shapley(private, held_out, 500.0) == pytest.approx(head_shapley(parts, held_out, 500.0), rel=0.15)


# --- flags ---------------------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c", "d", "e", "f")


def updates(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 0.4 * rng.normal(size=400) + rng.normal(size=(6, 400))


def test_honest_sites_are_not_flagged() -> None:
    for seed in range(20):
        x = updates(seed)
        before = updates(seed + 100).mean(axis=0)
        assert flags((x @ x.T).tolist(), NAMES, previous=(x @ before).tolist(), previous_square=float(before @ before)) == ()


def test_a_copy_is_flagged_with_the_numbers() -> None:
    x = updates(0)
    x[4] = x[1] + 0.3 * np.random.default_rng(9).normal(size=400)
    (found,) = flags((x @ x.T).tolist(), NAMES)
    assert (found.kind, found.sites) == ("near_duplicate", ("b", "e"))
    assert "cosine of 0.9" in found.words and "median of all pairs is 0." in found.words


def test_all_alike_is_no_copy_of_one() -> None:
    x = np.ones((6, 3))
    assert flags((x @ x.T).tolist(), NAMES) == ()


def test_who_does_not_move_the_model_is_flagged() -> None:
    x = updates(1)
    x[2] *= 1e-4
    x[3] = 0
    found = flags((x @ x.T).tolist(), NAMES)
    assert [(f.kind, f.sites) for f in found] == [("no_movement", ("c",)), ("no_movement", ("d",))]
    assert "0.011 % as long" in found[0].words


def test_who_sends_the_aggregate_before_is_flagged() -> None:
    x, before = updates(2), updates(3).mean(axis=0)
    x[5] = 0.7 * before
    product, square = (x @ before).tolist(), float(before @ before)
    (found,) = flags((x @ x.T).tolist(), NAMES, previous=product, previous_square=square)
    assert (found.kind, found.sites) == ("replay", ("f",))
    assert "1.00 with the aggregate before" in found.words


def test_nothing_moving_and_nobody_there_are_no_trouble() -> None:
    assert [f.words for f in flags([[0, 0], [0, 0]], ("a", "b"))] == ["its update is zero, as most are"] * 2
    assert flags([], ()) == ()
    with pytest.raises(ProtocolError, match="bad_gram"):
        flags([[1]], ("a", "b"))


# --- credits -------------------------------------------------------------------------------------------------------


def test_credits_by_hand() -> None:
    assert credits([0.5, 0.3, 0.2], 10) == (5, 3, 2)
    assert credits([1.0, 1.0, 1.0], 10) == (4, 3, 3)
    assert credits([0.3, -0.1, 0.5, 0.2], 10) == (3, 0, 5, 2)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12), st.integers(0, 10**9))
def test_credits_sum_exactly_and_each_is_within_one_of_what_is_due(shares: list[float], total: int) -> None:
    positive = [max(0.0, s) for s in shares]
    if total and not any(positive):
        with pytest.raises(NotEvidenced):
            credits(shares, total)
        return
    found = credits(shares, total)
    assert sum(found) == total
    assert all(c == 0 for c, s in zip(found, shares, strict=True) if s <= 0)
    for c, s in zip(found, positive, strict=True):
        assert abs(c - total * s / (math.fsum(positive) or 1.0)) <= 1 + 1e-6


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=8), st.integers(0, 1000))
def test_a_larger_share_never_gets_fewer_credits(shares: list[float], total: int) -> None:
    if total and not any(shares):
        return
    found = credits(shares, total)
    for (s, c), (t, d) in itertools.combinations(zip(shares, found, strict=True), 2):
        assert (s - t) * (c - d) >= 0


def test_credits_that_cannot_be_are_refused() -> None:
    assert credits([-1.0], 0) == (0,)
    with pytest.raises(ValueError, match="total"):
        credits([1.0], -1)
    with pytest.raises(ValueError, match="finite"):
        credits([float("nan")], 1)
