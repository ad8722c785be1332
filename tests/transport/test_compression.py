"""Laws of compressors: what is sent is a projection that can be added, and both sides compute the same one."""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat import weights as wts
from fedmat.config import Compression
from fedmat.errors import FedmatError, PlanRefused, WireError
from fedmat.transport import compression
from fedmat.transport.compression import Compressor, Mixing, with_feedback
from fedmat.weights import Vector, Weights

NAMES = ("none", "random_k", "hadamard", "low_rank")
COMPRESSING = NAMES[1:]


def mlp(members: int = 2, width: int = 21, hidden: int = 40) -> Weights:
    shapes = {
        "hidden.0.weight": (members, width, hidden),
        "hidden.0.bias": (members, 1, hidden),
        "hidden.1.weight": (members, hidden, hidden),
        "hidden.1.bias": (members, 1, hidden),
        "last.weight": (members, hidden, 1),
        "last.bias": (members, 1, 1),
    }
    return {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}


def made(name: str, share: float = 0.2, seed: int = 11, like: Weights | None = None) -> Compressor:
    return Compressor.of(Compression(name=name, share=share), mlp() if like is None else like, seed)


def drawn(size: int, seed: int = 0) -> Vector:
    return np.random.default_rng(seed).normal(size=size)


# --- hand-computable ---------------------------------------------------------------------------------------------


def test_the_transform_of_two_numbers_is_their_sum_and_difference() -> None:
    x = np.array([3.0, 1.0])
    compression.hadamard(x)
    assert np.allclose(x, np.array([4.0, 2.0]) / np.sqrt(2.0), atol=1e-15)


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4, 5, 7])
def test_the_transform_is_sylvesters_matrix(bits: int) -> None:
    n = 1 << bits
    matrix = np.ones((1, 1))
    for _ in range(bits):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    x, columns = drawn(n), drawn(3 * n).reshape(n, 3)
    expected, expected_columns = matrix @ x / np.sqrt(n), matrix @ columns / np.sqrt(n)
    compression.hadamard(x)
    compression.hadamard(columns)
    assert np.allclose(x, expected, atol=1e-13)
    assert np.allclose(columns, expected_columns, atol=1e-13)


def test_the_transform_takes_only_what_it_can_do_in_place() -> None:
    with pytest.raises(ValueError, match="power of two"):
        compression.hadamard(np.zeros(6))
    with pytest.raises(ValueError, match="contiguous"):
        compression.hadamard(np.zeros((4, 8))[:, ::2])


@given(st.integers(1, 200), st.integers(0, 2**62))
@settings(max_examples=40, deadline=None)
def test_mixing_is_a_rotation_of_any_number_of_numbers(size: int, seed: int) -> None:
    mixing = Mixing.of(size, seed)
    matrix = mixing.turn(np.eye(size))
    assert np.allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    assert np.allclose(mixing.turn_back(matrix), np.eye(size), atol=1e-12)
    x = drawn(size)
    assert np.allclose(mixing.turn(x), matrix @ x, atol=1e-12)


def test_one_number_reaches_about_every_place() -> None:
    """Why the rotation is there: a change of one weight is seen at whatever places are drawn."""
    size = 1000
    spread = np.abs(Mixing.of(size, 3).turn(np.eye(size)))
    assert np.all((spread > 1e-9).sum(axis=0) >= size // 2)
    assert spread.max() <= 2.0 / np.sqrt(512) * 1.5  # no place keeps more than a little of one number


# --- what every compressor obeys ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_sum_of_compressed_updates_is_the_compressed_sum(name: str) -> None:
    squeeze = made(name)
    updates = [drawn(squeeze.size, i) for i in range(5)]
    numbers = [squeeze.compress(u) for u in updates]
    assert np.allclose(squeeze.compress(sum(updates)), sum(numbers), atol=1e-12)  # type: ignore[arg-type]
    expanded = sum(squeeze.expand(z) for z in numbers)
    assert np.allclose(squeeze.expand(sum(numbers)), expanded, atol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_integers_are_added_before_or_after_alike(name: str) -> None:
    """Encrypted rounds add ring elements: the expanded sum is that of the integers, whatever their order."""
    squeeze = made(name)
    rng = np.random.default_rng(4)
    whole = rng.integers(-(2**30), 2**30, size=(7, squeeze.length))
    total = whole.sum(axis=0).astype(np.float64)
    again = whole[::-1].sum(axis=0).astype(np.float64)
    assert squeeze.expand(total).tobytes() == squeeze.expand(again).tobytes()
    apart = sum(squeeze.expand(z.astype(np.float64)) for z in whole)
    assert np.allclose(squeeze.expand(total), apart, rtol=0, atol=1e-13 * 7 * 2**30)


@pytest.mark.parametrize("name", NAMES)
def test_the_directions_are_orthonormal(name: str) -> None:
    squeeze = made(name, like=mlp(1, 16, 20))
    rows = np.stack([squeeze.expand(e) for e in np.eye(squeeze.length)])
    assert np.allclose(rows @ rows.T, np.eye(squeeze.length), atol=1e-12)
    v = drawn(squeeze.size)
    assert np.allclose(squeeze.compress(v), rows @ v, atol=1e-12)  # expand is compress transposed


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**63 - 1), share=st.floats(0.15, 1.0))
@settings(max_examples=25, deadline=None)
def test_nothing_is_lost_twice_and_nothing_grows(name: str, seed: int, share: float) -> None:
    squeeze = made(name, share, seed)
    z, v = drawn(squeeze.length), drawn(squeeze.size)
    assert np.allclose(squeeze.compress(squeeze.expand(z)), z, atol=1e-12)
    assert np.allclose(squeeze.expand(squeeze.compress(squeeze.expand(z))), squeeze.expand(z), atol=1e-12)
    assert np.linalg.norm(squeeze.compress(v)) <= np.linalg.norm(v) * (1 + 1e-12)
    assert np.isclose(np.linalg.norm(squeeze.expand(z)), np.linalg.norm(z), rtol=1e-12)
    assert squeeze.length <= share * squeeze.size or name == "none"


@pytest.mark.parametrize("name", COMPRESSING)
def test_everything_sent_is_everything(name: str) -> None:
    squeeze = made(name, share=1.0)
    v = drawn(squeeze.size)
    assert squeeze.length == squeeze.size
    assert np.allclose(squeeze.expand(squeeze.compress(v)), v, atol=1e-12)


@pytest.mark.parametrize("name", COMPRESSING)
@given(decay=st.floats(0.0, 1.0), scale=st.floats(-3, 3))
@settings(max_examples=15, deadline=None)
def test_feedback_loses_nothing(name: str, decay: float, scale: float) -> None:
    squeeze = made(name)
    delta, memory = drawn(squeeze.size, 1), 10.0**scale * drawn(squeeze.size, 2)
    numbers, rest = with_feedback(squeeze, delta, memory, decay)
    wanted = delta + decay * memory
    assert np.allclose(wanted, squeeze.expand(numbers) + rest, rtol=0, atol=1e-12 * (1 + np.abs(memory).max()))
    assert np.linalg.norm(rest) <= np.linalg.norm(wanted) * (1 + 1e-12)  # the memory never grows by itself
    assert np.allclose(squeeze.compress(rest), 0.0, atol=1e-9)  # and holds nothing of what was sent


@pytest.mark.parametrize("name", COMPRESSING)
def test_under_feedback_a_steady_update_arrives_whole(name: str) -> None:
    """Where every round wants the same change, all of it but the last few rounds' arrives in the end."""
    like = mlp(1, 16, 20)
    delta = drawn(made(name, like=like).size)
    memory, arrived = np.zeros_like(delta), np.zeros_like(delta)
    for number in range(60):
        squeeze = made(name, 0.25, 1000 + number, like)
        numbers, memory = with_feedback(squeeze, delta, memory, 1.0)
        arrived += squeeze.expand(numbers)
    assert np.allclose(arrived + memory, 60 * delta, atol=1e-9)
    assert np.linalg.norm(arrived / 60 - delta) < 0.2 * np.linalg.norm(delta)


# --- two sides, one compressor -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_two_sides_agree_bit_for_bit(name: str) -> None:
    a, b = made(name), made(name)
    z = drawn(a.length)
    assert a.length == b.length
    assert a.expand(z).tobytes() == b.expand(z.copy()).tobytes()
    assert {k: v.tobytes() for k, v in a.basis().items()} == {k: v.tobytes() for k, v in b.basis().items()}


@pytest.mark.parametrize("name", COMPRESSING)
def test_the_values_of_the_tensors_and_their_order_play_no_part(name: str) -> None:
    like = mlp()
    other = {k: np.full_like(v, 7.0) for k, v in reversed(like.items())}
    a, b = made(name, like=like), made(name, like=other)
    z = drawn(a.length)
    assert a.expand(z).tobytes() == b.expand(z).tobytes()


@pytest.mark.parametrize("name", COMPRESSING)
def test_another_seed_is_another_compressor(name: str) -> None:
    a, b = made(name, seed=1), made(name, seed=2)
    z = drawn(a.length)
    assert a.length == b.length
    assert not np.allclose(a.expand(z), b.expand(z))


@pytest.mark.parametrize("name", COMPRESSING)
def test_every_number_of_the_model_is_reached_over_the_rounds(name: str) -> None:
    reached = np.zeros(made(name).size)
    for seed in range(60):
        squeeze = made(name, seed=seed)
        reached += np.abs(squeeze.expand(drawn(squeeze.length, seed)))
    assert np.all(reached > 0)


def test_places_are_drawn_evenly() -> None:
    size, count, rounds = 200, 40, 2000
    hits = np.zeros(size)
    for seed in range(rounds):
        hits[compression._choose(size, count, seed)] += 1
    share, spread = count / size, np.sqrt(rounds * 0.2 * 0.8)
    assert abs(hits.mean() - rounds * share) < 1e-9
    assert np.abs(hits - rounds * share).max() < 4.5 * spread  # 200 places: once in 700 by chance


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("random_k", "7cb379984b978a83"),
        ("hadamard", "603e43c7e464f6e0"),
        ("low_rank", "fab5d852b4395c69"),
    ],
)
def test_the_bits_are_those_of_every_other_machine(name: str, digest: str) -> None:
    """Numbers without rounding in, known bits out: a platform or a NumPy that computes others fails here, not in a round."""
    squeeze = made(name, like=mlp(1, 24, 40), seed=2**62 + 5)
    z = (np.arange(squeeze.length, dtype=np.float64) - 100.0) / 64.0
    found = squeeze.expand(z).astype("<f8")
    found[found == 0.0] = 0.0  # +0 and -0 are one number
    assert hashlib.sha256(found.tobytes()).hexdigest()[:16] == digest


# --- low rank ----------------------------------------------------------------------------------------------------


def test_low_rank_moves_matrices_by_a_b_and_sends_small_tensors_whole() -> None:
    like = mlp()
    squeeze = made("low_rank")
    z = drawn(squeeze.length)
    change, basis = wts.unflatten(squeeze.expand(z), like), squeeze.basis()
    assert squeeze.trains_inside
    assert set(basis) == {"hidden.0.weight", "hidden.1.weight"}
    for name, a in basis.items():
        assert a.dtype == np.float32
        assert a.shape[0] == like[name].shape[-2]
        inside = a.astype(np.float64)
        b = np.linalg.lstsq(inside, np.concatenate(list(change[name].astype(np.float64)), axis=1), rcond=None)[0]
        found = np.concatenate(list(change[name]), axis=1)
        assert np.allclose(inside @ b, found, atol=1e-5)  # one A for all members
        assert np.allclose(
            inside.T @ inside, compression.GAIN**2 * len(a) / a.shape[1] * np.eye(a.shape[1]), rtol=1e-5, atol=1e-3
        )
    whole = {n: change[n] for n in like if n not in basis}
    assert all(np.count_nonzero(v) == v.size for v in whole.values())


def test_ranks_use_the_budget_and_grow_with_the_rows() -> None:
    like = mlp(4, 130, 128)
    squeeze = made("low_rank", 0.04, like=like)
    ranks = {n: a.shape[1] for n, a in squeeze.basis().items()}
    cheapest = 4 * 128
    assert squeeze.size * 0.04 - cheapest < squeeze.length <= squeeze.size * 0.04
    assert abs(ranks["hidden.0.weight"] - ranks["hidden.1.weight"]) <= 1


def test_graph_networks_tensors_are_handled_by_shape_alone() -> None:
    like = {
        "0.embed.weight": np.zeros((64, 30), dtype=np.float32),
        "0.embed.bias": np.zeros(64, dtype=np.float32),
        "0.norms.0.weight": np.zeros(64, dtype=np.float32),
        "balance": np.zeros((10, 3), dtype=np.float32),  # members x tasks: never a matrix to factor
        "scalar": np.zeros((), dtype=np.float32),
        "1.embed.weight": np.zeros((64, 30), dtype=np.float32),
    }
    squeeze = made("low_rank", 0.2, like=like)
    basis = squeeze.basis()
    assert set(basis) == {"0.embed.weight", "1.embed.weight"}
    assert not np.array_equal(basis["0.embed.weight"], basis["1.embed.weight"])
    z = drawn(squeeze.length)
    assert np.allclose(squeeze.compress(squeeze.expand(z)), z, atol=1e-12)


# --- refusals ----------------------------------------------------------------------------------------------------


def test_a_share_that_fits_no_rank_is_refused_with_the_share_that_does() -> None:
    with pytest.raises(PlanRefused, match="low_rank needs") as refused:
        made("low_rank", 0.05)
    least = float(refused.value.fix.split("raise the share to ")[1].split(" ")[0])
    assert made("low_rank", least).length <= least * made("none").size
    with pytest.raises(PlanRefused):
        made("low_rank", least - 2e-4)


@pytest.mark.parametrize("name", COMPRESSING)
def test_a_share_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(PlanRefused, match="is none"):
        made(name, 1e-6)


@pytest.mark.parametrize("mode", ["none", "trigram", "masking", "ckks"])
@pytest.mark.parametrize("name", NAMES)
def test_every_compressor_can_be_added_in_every_mode(name: str, mode: str) -> None:
    compression.refuse(Compression(name=name), mode)


@pytest.mark.parametrize("name", sorted(compression.NOT_OFFERED))
def test_what_cannot_be_added_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(PlanRefused, match=name) as refused:
        compression.refuse(Compression.model_construct(name=name), "trigram")  # type: ignore[arg-type]
    assert "low_rank" in refused.value.fix


@pytest.mark.parametrize("name", NAMES)
def test_another_length_is_refused(name: str) -> None:
    squeeze = made(name)
    with pytest.raises(WireError, match="shape"):
        squeeze.expand(np.zeros(squeeze.length + 1))
    with pytest.raises(ValueError, match="shape") as error:
        squeeze.compress(np.zeros(squeeze.size - 1))
    assert not isinstance(error.value, FedmatError)


# --- cost --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPRESSING)
def test_a_million_numbers_cost_little(name: str) -> None:
    """CPU time, the best of three: the machine may be busy."""
    like = {"w": np.zeros((1, 1024, 1024), dtype=np.float32)}
    took = []
    for _ in range(3):
        started = time.process_time()
        squeeze = made(name, 0.04, like=like)
        numbers = squeeze.compress(np.ones(squeeze.size))
        squeeze.expand(numbers)
        took.append(time.process_time() - started)
    assert squeeze.size == 2**20
    assert min(took) < 0.4


def test_the_transform_of_a_million_numbers_is_fast() -> None:
    x = drawn(2**20)
    took = []
    for _ in range(3):
        started = time.process_time()
        compression.hadamard(x)
        took.append(time.process_time() - started)
    assert min(took) < 0.2
