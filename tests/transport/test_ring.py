"""Laws of the ring: nothing wraps, nothing rounds but the encoding, and no two pads are alike."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedmat.errors import ProtocolError
from fedmat.transport.trigram.ring import BLOCK, Pad, Ring, blob, blocks, dot, hashed, products, quadratic

BITS = st.sampled_from([32, 64])
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


def stream(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(arrays(np.float64, st.integers(0, 60), elements=FLOATS), st.floats(1e-6, 1e6), BITS, st.integers(0, 99))
@example(np.array([1e308, -1e308]), 1.0, 32, 0)
@example(np.array([5e-324]), 1.0, 64, 0)
@example(np.full(60, 1e-300), 1e6, 32, 0)
def test_an_encoded_update_never_exceeds_the_bound(x, clip, bits, seed) -> None:  # type: ignore[no-untyped-def]
    ring = Ring(bits)
    lifted = ring.lift(ring.encode(x, clip, stream(seed)))
    assert dot(lifted, lifted) <= ring.bound**2


def test_a_vector_so_long_that_rounding_carries_it_out_is_pulled_back() -> None:
    class Up(np.random.Generator):
        def random(self, size: int) -> np.ndarray:  # type: ignore[override]
            return np.zeros(size)

    ring = Ring(32)
    lifted = ring.lift(ring.encode(np.ones(2**20 + 2000), 1.0, Up(np.random.PCG64(0))))  # from 31.01 units an entry to 32
    assert dot(lifted, lifted) <= ring.bound**2 < 32**2 * len(lifted)


@pytest.mark.parametrize("bits", [32, 64])
def test_decoding_gives_back_the_clipped_update_to_within_one_unit(bits: int) -> None:
    ring, x = Ring(bits), stream().standard_normal(500)
    clip = 0.5 * float(np.linalg.norm(x))
    back = ring.decode(ring.encode(x, clip, stream(1)), clip, 1)
    assert np.abs(back - 0.5 * x).max() <= 1.0001 * clip / (0.97 * ring.bound)


def test_rounding_is_unbiased() -> None:
    ring, x = Ring(32), np.full(200_000, 1.0)
    clip = 10.0 * float(np.linalg.norm(x))  # an entry is worth 7.1 units
    lifted = ring.lift(ring.encode(x, clip, stream()))
    expected = 0.97 * ring.bound / clip
    assert abs(lifted.mean() - expected) < 5 * lifted.std() / math.sqrt(len(x))


def test_the_sum_of_encoded_updates_decodes_to_their_weighted_mean() -> None:
    ring, rng = Ring(64), stream()
    x = rng.standard_normal((3, 50)) / 50
    words = [ring.encode(row, 2.0, rng) for row in x]
    weights = [1, 2, 5]
    total = sum((w * ring.dtype.type(c) for w, c in zip(words, weights)), ring.zeros(50))
    assert ring.decode(total, 2.0, 8) == pytest.approx(np.average(x, axis=0, weights=weights), abs=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ProtocolError, match="non_finite"):
        Ring(32).encode(np.array([1.0, bad]), 1.0, stream())


@pytest.mark.parametrize("clip", [0.0, -1.0, np.nan, np.inf])
def test_a_clip_that_is_no_positive_number_is_refused(clip: float) -> None:
    with pytest.raises(ProtocolError, match="bad_clip"):
        Ring(32).encode(np.ones(2), clip, stream())


def test_a_ring_of_other_bits_is_refused() -> None:
    with pytest.raises(ProtocolError, match="bad_header"):
        Ring(16)


@given(
    st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1)), max_size=40),
    st.integers(0, 62),
)
@example([(-(2**63), -(2**63))], 0)
def test_inner_products_are_exact(pairs, shift) -> None:  # type: ignore[no-untyped-def]
    x = np.array([a >> shift for a, _ in pairs], np.int64)
    y = np.array([b >> (62 - shift) for _, b in pairs], np.int64)
    assert dot(x, y) == sum(int(a) * int(b) for a, b in zip(x, y))


def test_inner_products_are_exact_across_blocks_of_large_numbers() -> None:
    x = np.full(3 * BLOCK + 5, 2**62 + 3, np.int64)
    assert dot(x, -x) == -((2**62 + 3) ** 2) * len(x)


@given(arrays(np.int64, 9, elements=st.integers(-(2**31), 2**31 - 1)))
def test_lifting_undoes_words(values) -> None:  # type: ignore[no-untyped-def]
    for bits in (32, 64):
        assert (Ring(bits).lift(Ring(bits).words(values)) == values).all()


def test_products_wrap_as_the_ring_does() -> None:
    left = np.array([[2**31, 3]], np.uint32)
    assert products(left, left).tolist() == [[9]]  # 2^62 is 0 modulo 2^32


def test_bytes_of_a_wrong_length_are_refused() -> None:
    with pytest.raises(ProtocolError, match="wrong_length"):
        Ring(32).unpack(blob(b"12345"), 1, "x")


def test_elements_are_little_endian_on_the_wire() -> None:
    assert blob(Ring(32).words(np.array([1]))).tolist() == [1, 0, 0, 0]


def test_a_pad_is_the_counter_mode_of_its_seed_however_it_is_taken() -> None:
    ring = Ring(64)
    whole = Pad(ring, bytes(32), b"c").take(BLOCK + 7)
    pad = Pad(ring, bytes(32), b"c")
    assert np.array_equal(whole, np.concatenate([pad.take(p.stop - p.start) for p in blocks(BLOCK + 7, 100)]))


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=8), st.binary(max_size=8))
@settings(max_examples=30)
def test_another_context_or_seed_makes_another_pad(seed, one, other) -> None:  # type: ignore[no-untyped-def]
    ring = Ring(32)
    pads = {Pad(ring, s, c).take(8).tobytes() for s in (seed, hashed("x", seed)) for c in {one, other}}
    assert len(pads) == 2 * len({one, other})


def test_parts_cannot_slide_into_one_another_under_a_hash() -> None:
    assert hashed("x", b"ab", b"c") != hashed("x", b"a", b"bc") != hashed("xa", b"", b"bc")


def test_the_quadratic_form_is_the_squared_norm_of_the_sum() -> None:
    assert quadratic([2, 1], [[5, -1], [-1, 9]]) == 4 * 5 - 4 + 9
