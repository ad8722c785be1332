"""Attacks: each does what its paper says, and nothing to its inputs."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedmat import attacks, wire
from fedmat.attacks import ATTACKS, poison
from fedmat.domain import Attestation, Update
from fedmat.errors import ConfigError
from fedmat.seeds import stream
from fedmat.transport.trigram.ring import Ring, dot

ON_UPDATES = [n for n, a in ATTACKS.items() if a.kind == "update"]
OWN = np.array([1.0, 1.0, 1.0])
# Mean (2, 0, 4), standard deviation (1, 3, 0).
HONEST = np.array([[1.0, 3.0, 4.0], [3.0, -3.0, 4.0]])


def sent(name: str, **options: object) -> NDArray[np.float64]:
    """What one of two hostile sites sends."""
    options.setdefault("n_hostile", 2)
    return poison(name, OWN, HONEST, rng=stream(1, name), **options)  # type: ignore[arg-type]


# --- updates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("sign_flip", {}, [-4.0, 0.0, -8.0]),
        ("scaling", {}, [10.0, 10.0, 10.0]),
        ("scaling", {"factor": 3.0}, [3.0, 3.0, 3.0]),
        ("alie", {}, [2.0 - 0.6, -1.8, 4.0]),
        ("alie", {"z": 2.0}, [0.0, -6.0, 4.0]),
        ("ipm", {}, [-1.0, 0.0, -2.0]),
        ("mimic", {}, [1.0, 3.0, 4.0]),
        ("mimic", {"copied": 1}, [3.0, -3.0, 4.0]),
        ("free_ride", {"noise": 0.0}, [0.0, 0.0, 0.0]),
        ("free_ride", {"noise": 0.0, "previous": np.array([5.0, 6.0, 7.0])}, [0.0, 0.0, 0.0]),
        ("free_ride_replay", {"noise": 0.0, "previous": np.array([5.0, 6.0, 7.0])}, [5.0, 6.0, 7.0]),
        ("free_ride_replay", {"noise": 0.0}, [0.0, 0.0, 0.0]),
    ],
)
def test_an_attack_sends_what_its_paper_says(name: str, options: dict[str, object], expected: list[float]) -> None:
    np.testing.assert_allclose(sent(name, **options), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("sites", "hostile", "share"),
    # By hand: s = floor(n / 2 + 1) - m, share = (n - m - s) / (n - m); the paper's own example is 24 of 50: s = 2, 24 / 26.
    [(50, 24, 24 / 26), (10, 2, 4 / 8), (10, 4, 4 / 6), (5, 2, 2 / 3), (10, 1, 4 / 9)],
)
def test_alie_moves_as_far_as_the_paper_says(sites: int, hostile: int, share: float) -> None:
    assert attacks.alie_z(sites, hostile) == pytest.approx(NormalDist().inv_cdf(share), abs=1e-12)
    honest = stream(3).normal(size=(sites - hostile, 4))
    found = poison("alie", honest[0], honest, n_hostile=hostile, rng=stream(1), z=None)
    np.testing.assert_allclose(found, honest.mean(0) - NormalDist().inv_cdf(share) * honest.std(0))


@pytest.mark.parametrize(("sites", "hostile"), [(10, 0), (10, 6), (3, 2)])
def test_alie_has_no_distance_for_none_or_a_majority(sites: int, hostile: int) -> None:
    with pytest.raises(ValueError, match="no majority"):
        attacks.alie_z(sites, hostile)


def test_min_max_by_hand() -> None:
    # Two honest updates at -1 and 1: mean 0, spread 1, two apart; the furthest point no more than 2 from both is -1.
    honest = np.array([[-1.0], [1.0]])
    np.testing.assert_allclose(poison("min_max", honest[0], honest, n_hostile=1, rng=stream(1)), [-1.0])


@settings(max_examples=60, deadline=None)
@given(sites=st.integers(2, 9), length=st.integers(1, 12), seed=st.integers(0, 2**20))
def test_min_max_touches_the_limit_and_never_passes_it(sites: int, length: int, seed: int) -> None:
    honest = stream(seed).normal(size=(sites, length))
    found = poison("min_max", honest[0], honest, n_hostile=1, rng=stream(1))
    apart = max(float(np.linalg.norm(a - b)) for a in honest for b in honest)
    furthest = float(np.linalg.norm(honest - found, axis=1).max())
    assert furthest == pytest.approx(apart, rel=1e-9)


def test_min_max_of_equal_sites_is_their_mean() -> None:
    honest = np.ones((3, 2))
    np.testing.assert_array_equal(poison("min_max", honest[0], honest, n_hostile=1, rng=stream(1)), [1.0, 1.0])


def test_norms_are_as_stated() -> None:
    mean = np.linalg.norm(HONEST.mean(0))
    assert np.linalg.norm(sent("sign_flip")) == pytest.approx(2 * mean)
    assert np.linalg.norm(sent("ipm")) == pytest.approx(0.5 * mean)
    assert np.linalg.norm(sent("scaling")) == pytest.approx(10 * np.linalg.norm(OWN))
    assert np.linalg.norm(sent("alie") - HONEST.mean(0)) == pytest.approx(0.6 * np.linalg.norm(HONEST.std(0)))
    noise = poison("free_ride", np.zeros(40_000), np.zeros((1, 40_000)), n_hostile=1, rng=stream(2))
    assert np.linalg.norm(noise) == pytest.approx(1e-6 * 200.0, rel=0.03)


@pytest.mark.parametrize("name", ON_UPDATES)
def test_an_attack_is_pure_and_repeats_with_its_generator(name: str) -> None:
    own, honest = stream(1).normal(size=7), stream(2).normal(size=(5, 7))
    kept = own.copy(), honest.copy()
    first = poison(name, own, honest, n_hostile=2, rng=stream(5))
    again = poison(name, own, honest, n_hostile=2, rng=stream(5))
    assert first.shape == (7,) and first.dtype == np.float64 and np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)
    first[:] = 99.0  # what comes back shares no memory with what went in
    np.testing.assert_array_equal(own, kept[0])
    np.testing.assert_array_equal(honest, kept[1])
    other = poison(name, own, honest, n_hostile=2, rng=stream(6))
    assert np.array_equal(again, other) == (not name.startswith("free_ride"))


def test_two_free_riders_do_not_look_alike() -> None:
    rng = stream(9)
    one, two = (poison("free_ride", OWN, HONEST, n_hostile=2, rng=rng) for _ in range(2))
    assert not np.array_equal(one, two)


def test_an_impossible_attack_is_refused() -> None:
    with pytest.raises(ConfigError, match="use sign_flip"):
        sent("sign_flop")
    with pytest.raises(ConfigError, match="no attack on updates"):
        sent("label_flip")
    with pytest.raises(ValueError, match="hostile site"):
        sent("ipm", n_hostile=0)
    for own, honest in ((OWN[:2], HONEST), (OWN, HONEST[:0]), (OWN, OWN), (HONEST, HONEST)):
        with pytest.raises(ValueError, match="expected k and h x k"):
            poison("ipm", own, honest, n_hostile=1, rng=stream(1))
    with pytest.raises(ValueError, match="differ in shape"):
        sent("free_ride_replay", previous=np.zeros(2))


# --- data --------------------------------------------------------------------------------------------------------


def test_flipped_labels_are_reflected_about_the_training_mean() -> None:
    y = np.array([1.0, 2.0, 6.0, 100.0])
    flipped = attacks.flip_labels(y, np.array([True, True, True, False]))
    np.testing.assert_array_equal(flipped, [5.0, 4.0, 0.0, 100.0])  # mean 3; the test row stays
    np.testing.assert_array_equal(y, [1.0, 2.0, 6.0, 100.0])


def test_flipping_keeps_mean_spread_gaps_and_shape_and_undoes_itself() -> None:
    y = stream(4).normal(size=(30, 3))
    y[::4, 1], y[:, 2] = np.nan, stream(5).integers(0, 2, 30)
    rows = stream(6).random(30) < 0.7
    flipped = attacks.flip_labels(y, rows, binary=(2,))
    assert flipped.shape == y.shape and set(flipped[:, 2]) == {0.0, 1.0}
    np.testing.assert_array_equal(np.isnan(flipped), np.isnan(y))
    np.testing.assert_array_equal(flipped[~rows], y[~rows])
    np.testing.assert_array_equal(flipped[rows, 2], 1.0 - y[rows, 2])
    for task in (0, 1):
        assert np.nanmean(flipped[rows, task]) == pytest.approx(np.nanmean(y[rows, task]))
        assert np.nanstd(flipped[rows, task]) == pytest.approx(np.nanstd(y[rows, task]))
    np.testing.assert_allclose(attacks.flip_labels(flipped, rows, binary=(2,)), y, atol=1e-12)
    with pytest.raises(ValueError, match="differ in length"):
        attacks.flip_labels(y, rows[1:])


NAMES = ("density", "frac_Nb")
X = np.array([[1.0, 0.0], [2.0, 0.1], [3.0, 0.2], [4.0, 0.3], [5.0, 0.4], [6.0, np.nan]])


def test_a_backdoor_changes_one_chemistry_and_nothing_else() -> None:
    level = attacks.backdoor_level(NAMES, X, feature="frac_Nb", quantile=0.5)
    assert level == 0.2  # of the four rows that have niobium
    aimed = attacks.backdoor_rows(NAMES, X, feature="frac_Nb", above=level)
    np.testing.assert_array_equal(aimed, [False, False, False, True, True, False])
    y = np.column_stack([np.arange(6.0), -np.arange(6.0)])
    rows = np.array([True, True, True, True, False, True])  # row 4 is a test row
    planted = attacks.backdoor(NAMES, X, y, rows, feature="frac_Nb", above=level, wrong=77.0)
    np.testing.assert_array_equal(planted[:, 0], [0.0, 1.0, 2.0, 77.0, 4.0, 5.0])
    np.testing.assert_array_equal(planted[:, 1], y[:, 1])
    np.testing.assert_array_equal(y[:, 0], np.arange(6.0))
    flat = attacks.backdoor(NAMES, X, y[:, 0], rows, feature="frac_Nb", above=level, wrong=77.0)
    np.testing.assert_array_equal(flat, planted[:, 0])


def test_a_backdoor_that_plants_nothing_is_refused() -> None:
    y, rows = np.arange(6.0), np.ones(6, dtype=bool)
    with pytest.raises(ConfigError, match="no feature is called 'frac_nb'"):
        attacks.backdoor(NAMES, X, y, rows, feature="frac_nb", above=0.0, wrong=1.0)
    with pytest.raises(ValueError, match="no training row"):
        attacks.backdoor(NAMES, X, y, rows, feature="frac_Nb", above=0.4, wrong=1.0)
    for quantile in (-0.1, 1.0):
        with pytest.raises(ValueError, match="quantile"):
            attacks.backdoor_level(NAMES, X, feature="frac_Nb", quantile=quantile)
    with pytest.raises(ValueError, match="0 rows"):
        attacks.backdoor_level(NAMES, X[:1], feature="frac_Nb", quantile=0.5)
    with pytest.raises(ValueError, match="differ in length"):
        attacks.backdoor(NAMES, X, y[1:], rows[1:], feature="frac_Nb", above=0.0, wrong=1.0)


# --- messages ----------------------------------------------------------------------------------------------------


def update(number: int) -> Update:
    """A site's update of a round."""
    delta = {"b": np.full((2, 3), number, dtype=np.float32), "w": np.ones(2, dtype=np.float32)}
    return Update("ash", number, "plan", f"request-{number}", delta)


def test_tampered_messages_still_travel() -> None:
    now, before = update(2), update(1)
    for message in (attacks.nan(now), attacks.wrong_shape(now), attacks.replay(now, before, disguised=True)):
        assert wire.decode(wire.encode(message), Update).site == "ash"
        assert (message.round, message.request_sha256) == (2, "request-2")
        np.testing.assert_array_equal(message.delta["w"], now.delta["w"])
    assert np.isnan(attacks.nan(now).delta["b"]).sum() == 1 and np.isfinite(now.delta["b"]).all()
    assert attacks.wrong_shape(now).delta["b"].shape == (7,) and now.delta["b"].shape == (2, 3)
    assert attacks.wrong_shape(now).delta["b"].dtype == np.float32
    np.testing.assert_array_equal(attacks.replay(now, before, disguised=True).delta["b"], before.delta["b"])
    assert wire.encode(attacks.replay(now, before)) == wire.encode(before)


def test_an_inflated_weight_claims_more_rows_of_the_same_data() -> None:
    honest = Attestation("ash", "d", "1", "f", ("x",), 40, 5, 6, 7, labels=(40, 12))
    claimed = attacks.inflated_weight(honest, 10)
    assert (claimed.n_train, claimed.labels, claimed.dataset_sha256) == (400, (400, 120), "d")
    ring = Ring(32)
    words = ring.words(np.array([3, -5], dtype=np.int64))
    np.testing.assert_array_equal(ring.lift(attacks.inflated_words(words, 16)), [48, -80])


@pytest.mark.parametrize(("bits", "power"), [(b, p) for b in (32, 64) for p in (None, b // 2, b // 2 + 3, b - 1)])
def test_a_wrapped_update_looks_like_its_twin_and_is_huge(bits: int, power: int | None) -> None:
    ring = Ring(bits)
    honest = np.array([120, 0, -7, 31], dtype=np.int64)
    others = np.array([55, 0, 9, -3], dtype=np.int64)
    words = ring.words(honest)
    wrapped = attacks.modular_wrap(words, bits, power=power)
    np.testing.assert_array_equal(ring.lift(words), honest)
    np.testing.assert_array_equal(np.flatnonzero(wrapped != words), [1])  # the number that is 0
    values = [int(v) for v in ring.lift(wrapped)]
    modulus = 1 << bits
    assert sum(v * v for v in values) % modulus == sum(int(v) ** 2 for v in honest) % modulus
    assert sum(v * int(o) for v, o in zip(values, others, strict=True)) % modulus == int(dot(honest, others)) % modulus
    assert abs(values[1]) >= 2 * ring.bound


def test_a_wrap_can_be_put_anywhere_and_only_where_it_wraps() -> None:
    words = Ring(32).words(np.array([4, 3, -3], dtype=np.int64))
    assert list(Ring(32).lift(attacks.modular_wrap(words, 32))) == [4, 3 + (1 << 16), -3]
    assert list(Ring(32).lift(attacks.modular_wrap(words, 32, coordinate=2))) == [4, 3, (1 << 16) - 3]
    for power in (15, 32):
        with pytest.raises(ValueError, match="does not wrap"):
            attacks.modular_wrap(words, 32, power=power)
    for other in (words.astype(np.uint64), words.astype(np.int32), words[:0]):
        with pytest.raises(ValueError, match="32-bit words"):
            attacks.modular_wrap(other, 32)


def test_the_table_says_what_there_is() -> None:
    for name, attack in ATTACKS.items():
        assert attack.kind in ("update", "data", "wire") and attack.about and attack.reference
        if attack.kind == "wire":
            assert callable(getattr(attacks, name))
        author = attack.reference.split()[0]
        assert author in ("-", "this") or author in (attacks.__doc__ or ""), name
    assert callable(attacks.flip_labels) and callable(attacks.backdoor)
