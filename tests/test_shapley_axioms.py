"""The laws that make a share fair, for the game itself, for the look at a round (Gram) and for the settlement (head).

Where an axiom does not hold of an estimate, what holds in its place is stated and tested: a zero update is no null player.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat.contribution import (
    Moments,
    coalition_worth,
    dealt,
    gram_shapley,
    gram_shapley_of_owners,
    head_shapley,
    head_shapley_of_owners,
    head_worth,
    moments,
    shapley,
    together,
)
from fedmat.errors import ProtocolError

SEEDS = st.integers(0, 10**6)
RIDGE = 1.0
Round = tuple[np.ndarray, np.ndarray, np.ndarray]


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def a_round(seed: int, n: int = 5, rows: int = 12) -> Round:
    """Changes of predictions (``n x rows``), residuals and weights."""
    rng = rng_of(seed)
    p = 0.3 * rng.normal(size=(n, rows))
    return p, p.mean(axis=0) + 0.2 * rng.normal(size=rows), rng.integers(1, 9, n).astype(float)


def gram(p: np.ndarray) -> np.ndarray:
    g = p @ p.T
    return np.asarray(0.5 * (g + g.T))


def looked(found: Round, rows: int = 12) -> np.ndarray:
    p, r, w = found
    return gram_shapley(gram(p), p @ r, w, rows=rows)


def a_site(rng: np.random.Generator, n: int, beta: np.ndarray, noise: float = 0.2) -> Moments:
    phi = rng.normal(size=(n, len(beta)))
    return moments(phi, phi @ beta + noise * rng.normal(size=n))


def a_settlement(seed: int, n: int = 5) -> tuple[list[Moments], Moments]:
    rng = rng_of(seed)
    beta = rng.normal(size=4)
    return [a_site(rng, int(rng.integers(3, 20)), beta) for _ in range(n)], a_site(rng, 80, beta)


# --- efficiency ----------------------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 7))
def test_all_that_was_gained_is_shared_out_and_no_more(seed: int, n: int) -> None:
    worth = rng_of(seed).normal(size=1 << n)
    assert shapley(worth).sum() == pytest.approx(worth[-1] - worth[0])
    p, r, w = a_round(seed, n)
    assert looked((p, r, w)).sum() == pytest.approx(np.mean(r**2) - np.mean((r - w @ p / w.sum()) ** 2))
    parts, exam = a_settlement(seed, n)
    assert head_shapley(parts, exam, RIDGE).sum() == pytest.approx(head_worth([together(parts)], exam, RIDGE)[-1])


# --- symmetry ------------------------------------------------------------------------------------------------------------


@given(SEEDS)
def test_shares_belong_to_sites_and_not_to_their_places(seed: int) -> None:
    order = rng_of(seed).permutation(5)
    p, r, w = a_round(seed)
    assert looked((p[order], r, w[order])) == pytest.approx(looked((p, r, w))[order])
    parts, exam = a_settlement(seed)
    assert head_shapley([parts[i] for i in order], exam, RIDGE) == pytest.approx(head_shapley(parts, exam, RIDGE)[order])


@given(SEEDS)
def test_sites_that_bring_the_same_get_the_same(seed: int) -> None:
    p, r, w = a_round(seed)
    p[3], w[3] = p[1], w[1]
    shares = looked((p, r, w))
    assert shares[3] == pytest.approx(shares[1])
    parts, exam = a_settlement(seed)
    parts[3] = parts[1]
    shares = head_shapley(parts, exam, RIDGE)
    assert shares[3] == pytest.approx(shares[1])


# --- null player ---------------------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(0, 4))
def test_who_changes_no_coalitions_worth_gets_nothing(seed: int, nobody: int) -> None:
    worth, coalitions = rng_of(seed).normal(size=32), np.arange(32)
    worth[coalitions | 1 << nobody] = worth[coalitions & ~(1 << nobody)]
    assert shapley(worth)[nobody] == pytest.approx(0.0, abs=1e-12)


@given(SEEDS)
def test_a_site_without_rows_changes_nobodys_settlement(seed: int) -> None:
    parts, exam = a_settlement(seed)
    empty = Moments(0, np.zeros((4, 4)), np.zeros(4), 0.0)
    found = head_shapley([*parts, empty], exam, RIDGE)
    assert found[5] == pytest.approx(0.0, abs=1e-12)
    assert found[:5] == pytest.approx(head_shapley(parts, exam, RIDGE))


@given(SEEDS, st.integers(1, 9))
def test_a_zero_update_earns_less_than_nothing_where_no_coalition_overshoots(seed: int, weight: int) -> None:
    """It is no null player: in a mean it dilutes. ``v(S + 0) - v(S) = -(1 - c)(2 r.p_S - (1 + c)|p_S|^2)``, ``c`` the weight that is left."""
    p, r, w = a_round(seed)
    p = np.abs(p)  # all updates help and agree ...
    r = np.abs(r) + p.max(axis=0)  # ... and none of their means goes past the residual
    with_rider = looked((np.vstack([p, np.zeros(12)]), r, np.append(w, weight)))
    assert with_rider[5] < 0


# --- linearity -----------------------------------------------------------------------------------------------------------


@given(SEEDS, st.floats(-3, 3), st.floats(-3, 3))
def test_shares_of_mixed_games_are_mixed_shares(seed: int, a: float, b: float) -> None:
    one, two = rng_of(seed).normal(size=(2, 32))
    assert shapley(a * one + b * two) == pytest.approx(a * shapley(one) + b * shapley(two))


@given(SEEDS)
def test_a_round_measured_on_all_rows_is_the_mean_of_its_parts(seed: int) -> None:
    p, r, w = a_round(seed)
    halves = 4 * looked((p[:, :4], r[:4], w), 4) + 8 * looked((p[:, 4:], r[4:], w), 8)
    assert looked((p, r, w)) == pytest.approx(halves / 12)


@given(SEEDS)
def test_a_settlement_examined_by_two_sets_is_their_mean_by_rows(seed: int) -> None:
    parts, one = a_settlement(seed)
    two = a_settlement(seed + 1)[1]
    mixed = (one.n * head_shapley(parts, one, RIDGE) + two.n * head_shapley(parts, two, RIDGE)) / (one.n + two.n)
    assert head_shapley(parts, together([one, two]), RIDGE) == pytest.approx(mixed)


# --- label noise ---------------------------------------------------------------------------------------------------------


def test_the_noisier_the_labels_the_less_a_round_gives_on_average() -> None:
    """Sites' own least-squares solutions as updates; mean over 40 data sets: each step costs more than two standard errors."""
    noises, shares = (0.1, 1.0, 2.0, 4.0), []
    for seed in range(40):
        rng = rng_of(seed)
        beta, reference = rng.normal(size=5), rng.normal(size=(60, 5))
        updates = []
        for noise in noises:
            phi = rng.normal(size=(30, 5))
            updates.append(np.linalg.lstsq(phi, phi @ beta + noise * rng.normal(size=30), rcond=None)[0])
        p = np.stack(updates) @ reference.T
        shares.append(looked((p, reference @ beta, np.ones(4)), 60))
    steps = -np.diff(np.array(shares), axis=1)
    assert (steps.mean(axis=0) > 2 * steps.std(axis=0) / math.sqrt(len(steps))).all()


def test_the_more_labels_are_reflected_the_less_a_settlement_gives() -> None:
    """Mean over 30 data sets, beside four honest sites; a site that reflects half of its labels takes away more than it brings."""
    levels, shares = (0.0, 0.25, 0.5, 1.0), []
    for seed in range(30):
        rng = rng_of(seed)
        beta = rng.normal(size=4)
        beta *= 2.0 / np.linalg.norm(beta)
        honest, exam, phi = [a_site(rng, 20, beta) for _ in range(4)], a_site(rng, 100, beta), rng.normal(size=(20, 4))
        order = rng.permutation(20)
        signs = [np.where(order < 20 * level, -1.0, 1.0) for level in levels]
        shares.append([head_shapley([*honest, moments(phi, phi @ beta * sign)], exam, RIDGE)[4] for sign in signs])
    steps = -np.diff(np.array(shares), axis=1)
    assert (steps.mean(axis=0) > 2 * steps.std(axis=0) / math.sqrt(len(steps))).all()
    means = np.mean(shares, axis=0)
    assert means[0] > 0 > means[2]


# --- copies --------------------------------------------------------------------------------------------------------------


def a_coverage(seed: int, n: int) -> np.ndarray:
    """Worth of coalitions that cover things of different value: never falls, and every site brings less the later it comes."""
    rng = rng_of(seed)
    covers, value = rng.random((n, 12)) < 0.4, rng.random(12)
    return np.array([value[covers[[i for i in range(n) if s >> i & 1]].any(axis=0)].sum() for s in range(1 << n)])


def copied(worth: np.ndarray) -> np.ndarray:
    """The game with one site more that brings what the last one brings, and nothing beside it."""
    n = len(worth).bit_length() - 1
    last = 1 << n - 1
    return np.array([worth[s & (2 * last - 1) | (last if s >> n else 0)] for s in range(2 << n)])


@given(SEEDS, st.integers(1, 5))
def test_a_copy_that_adds_nothing_gains_the_pair_at_most_what_the_one_had(seed: int, n: int) -> None:
    """Of two copies the first to come is counted, which comes early: at ``t`` of the way with density ``2 (1 - t)``, not 1.

    Where others' records repeat one's own, coming early pays: the pair gets more than the one did. But never twice as much, never
    more than the one is worth alone, and neither of the two more than the one had: who is copied loses, the copier gains.
    """
    worth = a_coverage(seed, n)
    one, pair = shapley(worth), shapley(copied(worth))
    alone = worth[1 << n - 1]
    assert pair[-1] == pytest.approx(pair[-2])
    assert one[-1] - 1e-12 <= pair[-2:].sum() <= min(2 * one[-1], alone) + 1e-12
    assert (pair[:-2] <= one[:-1] + 1e-12).all()


def test_the_bound_for_copies_is_reached() -> None:
    """Two sites that cover the same: 1/2 each. A copy of one of them: 1/3 each, so the pair goes from 1/2 to 2/3."""
    same = np.array([0.0, 1.0, 1.0, 1.0])
    assert shapley(same) == pytest.approx([1 / 2, 1 / 2])
    assert shapley(copied(same)) == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    apart = np.array([0.0, 1.0, 1.0, 2.0])  # nothing repeats: nothing is gained by a copy
    assert shapley(copied(apart)) == pytest.approx([1, 1 / 2, 1 / 2])


def test_where_records_need_each_other_a_copy_gains_nothing() -> None:
    """A pair of gloves: the game of whose sites each needs the other. A second right glove lowers what right gloves get together."""
    gloves = np.array([0.0, 0.0, 0.0, 1.0])
    assert shapley(copied(gloves)) == pytest.approx([2 / 3, 1 / 6, 1 / 6])


# --- one owner, several sites --------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(SEEDS, st.integers(2, 4))
def test_an_owner_that_divides_its_rows_gains_exactly_nothing(seed: int, into: int) -> None:
    """Moments add. However the rows are dealt out, what the owner gets in all and what everyone else gets stay as they were."""
    rng = rng_of(seed)
    beta = rng.normal(size=4)
    others, exam = [a_site(rng, 10, beta) for _ in range(3)], a_site(rng, 60, beta)
    phi, y = rng.normal(size=(24, 4)), rng.normal(size=24)
    whole = head_shapley([*others, moments(phi, y)], exam, RIDGE)
    piece = rng.integers(0, into, 24)
    pieces = [moments(phi[piece == k], y[piece == k]) for k in range(into)]
    owners = [[0], [1], [2], list(range(3, 3 + into))]
    found = head_shapley_of_owners([*others, *pieces], exam, RIDGE, owners)
    assert found[:3] == pytest.approx(whole[:3], abs=1e-9)
    assert found[3:].sum() == pytest.approx(whole[3], abs=1e-9)
    assert found[3:] == pytest.approx(whole[3] * np.bincount(piece, minlength=into) / 24, abs=1e-9)


@given(SEEDS)
def test_as_players_of_their_own_the_pieces_would_change_the_settlement(seed: int) -> None:
    """Why owners are merged: the same rows under two names are worth something else, mostly more."""
    parts, exam = a_settlement(seed)
    half = Moments(parts[4].n, parts[4].features / 2, parts[4].products / 2, parts[4].square / 2)
    apart = head_shapley([*parts[:4], half, half], exam, RIDGE)[4:].sum()
    assert apart != pytest.approx(head_shapley(parts, exam, RIDGE)[4], rel=1e-6)


@given(SEEDS)
def test_an_owner_per_site_is_the_plain_settlement_and_all_as_one_gets_everything(seed: int) -> None:
    parts, exam = a_settlement(seed)
    plain = head_shapley(parts, exam, RIDGE)
    assert head_shapley_of_owners(parts, exam, RIDGE, [[i] for i in range(5)]) == pytest.approx(plain)
    one = head_shapley_of_owners(parts, exam, RIDGE, [[0, 1, 2, 3, 4]])
    assert one.sum() == pytest.approx(plain.sum())
    assert one == pytest.approx(plain.sum() * np.array([m.n for m in parts]) / sum(m.n for m in parts))


@given(SEEDS)
def test_merging_some_changes_what_they_get_and_not_what_there_is(seed: int) -> None:
    parts, exam = a_settlement(seed)
    owners = [[0, 3], [1], [2, 4]]
    assert head_shapley_of_owners(parts, exam, RIDGE, owners).sum() == pytest.approx(head_shapley(parts, exam, RIDGE).sum())


@given(SEEDS, st.integers(1, 4), st.integers(1, 4))
def test_an_owner_that_divides_its_weight_gains_exactly_nothing_in_a_round(seed: int, first: int, second: int) -> None:
    """The round's look: two sites that send the same update with parts of the weight; the owner as one player."""
    p, r, w = a_round(seed)
    whole = looked((p, r, np.append(w[:4], first + second)))
    two, parts = p[[0, 1, 2, 3, 4, 4]], np.append(w[:4], [first, second])
    found = gram_shapley_of_owners(gram(two), two @ r, parts, [[0], [1], [2], [3], [4, 5]], rows=12)
    assert found[:4] == pytest.approx(whole[:4])
    assert found[4:].sum() == pytest.approx(whole[4])


def test_a_second_name_in_a_round_gains_where_owners_are_not_merged() -> None:
    """Two equal sites, 1/2 of the gain each. One under two names with its full weight twice: two thirds of it."""
    p, r = np.ones((2, 1)), np.ones(1)
    assert looked((p, r, np.ones(2)), 1) == pytest.approx([1 / 2, 1 / 2])
    three = np.ones((3, 1))
    assert looked((three, r, np.ones(3)), 1)[1:].sum() == pytest.approx(2 / 3)
    merged = gram_shapley_of_owners(gram(three), three @ r, np.ones(3), [[0], [1, 2]])
    assert merged == pytest.approx([1 / 2, 1 / 4, 1 / 4])
    assert coalition_worth(gram(three), three @ r, np.ones(3))[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("owners", [[[0, 1]], [[0, 1], [1, 2]], [[0, 1, 2], []]])
def test_groups_that_do_not_divide_the_sites_are_refused(owners: list[list[int]]) -> None:
    parts, exam = a_settlement(0, 3)
    with pytest.raises(ProtocolError, match="exactly once"):
        head_shapley_of_owners(parts, exam, RIDGE, owners)


def test_an_owner_without_rows_deals_its_nothing_out_equally() -> None:
    assert dealt(np.array([0.4, 0.2]), [0, 0, 3], [[0, 1], [2]]) == pytest.approx([0.2, 0.2, 0.2])
