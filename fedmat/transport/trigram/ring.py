"""Vectors over the integers modulo 2^32 or 2^64: fixed point, pads, exact products.

Knows: how a clipped update becomes ring elements and back, how a 32-byte seed becomes a pad as long as an update, and
integer arithmetic that never rounds. Refuses to know: who holds a seed, messages, keys.

Why no update can wrap: an encoded update has Euclidean norm at most ``bound``, so an inner product of two lies within
``bound**2``, which is below half the ring, and so does a sum with weights of at most 2^15 in total. In the wide ring the
bound is 2^20 and not 2^31, so that the image of an update under a public map of norm 2^11 still fits: (2^31)^2 < 2^63.

References:
    FIPS 197 and NIST SP 800-38A (AES-256 in counter mode). RFC 5869 (HKDF, section 2.3).
    Gupta et al., "Deep Learning with Limited Numerical Precision", ICML 2015 (stochastic rounding).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from numpy.typing import NDArray

from fedmat.envelopes import MOST_WEIGHT, Blob
from fedmat.errors import ProtocolError

Words = NDArray[Any]  # ring elements: uint32 or uint64, little-endian
Integers = NDArray[np.int64]
BLOCK = 1 << 14  # ring elements worked on at a time: ten sites' blocks stay in the cache
FILL = 0.97  # share of the bound that clipped updates fill; the rest is room for rounding
MAX_TOTAL_WEIGHT = MOST_WEIGHT
_ZEROS = bytes(BLOCK * 8)
_LIMB = 21  # products of two limbs, BLOCK of them added, stay below 2^63


@dataclass(frozen=True)
class Ring:
    """The integers modulo ``2**bits``, read as signed where a number is meant.

    Attributes:
        bits: 32 or 64.
    """

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (32, 64):
            raise ProtocolError("bad_header", f"a ring of {self.bits} bits", fix="use 32 or 64")

    @property
    def bound(self) -> int:
        """Largest Euclidean norm of an encoded update."""
        return 1 << (15 if self.bits == 32 else 20)

    @property
    def size(self) -> int:
        """Bytes of one element."""
        return self.bits // 8

    @property
    def dtype(self) -> np.dtype[Any]:
        """Little-endian unsigned type of the elements."""
        return np.dtype(f"<u{self.size}")

    def zeros(self, *shape: int) -> Words:
        """Returns zero elements."""
        return np.zeros(shape, self.dtype)

    def words(self, values: Integers) -> Words:
        """Returns signed integers as ring elements."""
        return values.astype(np.int64).astype(f"<i{self.size}").view(self.dtype)

    def lift(self, words: Words) -> Integers:
        """Returns the signed representatives of ring elements, any shape."""
        return np.ascontiguousarray(words, self.dtype).view(f"<i{self.size}").astype(np.int64)

    def unpack(self, blob: Blob, count: int, what: str) -> Words:
        """Returns ``count`` elements out of their bytes.

        Raises:
            ProtocolError: wrong_length.
        """
        if blob.nbytes != count * self.size:
            raise ProtocolError("wrong_length", f"{what}: {blob.nbytes} bytes, expected {count * self.size}")
        return np.ascontiguousarray(blob).reshape(-1).view(self.dtype)

    def encode(self, update: NDArray[np.float64], clip: float, rng: np.random.Generator) -> Words:
        """Returns an update, clipped to norm ``clip``, as ring elements of norm at most ``bound``, guaranteed.

        Args:
            update: shape ``k``, any unit; ``clip`` in the same unit.
            rng: makes the rounding unbiased; keep its seed at the site.

        Raises:
            ProtocolError: non_finite, or bad_clip for a clip that is not a positive number.
        """
        x = np.asarray(update, dtype=np.float64)
        if not (np.isfinite(clip) and clip > 0):
            raise ProtocolError("bad_clip", f"a clip of {clip}, expected a positive number")
        if not np.isfinite(x).all():
            raise ProtocolError("non_finite", "an update holds numbers that are not finite", fix="lower the learning rate")
        largest = float(np.abs(x).max(initial=0.0))
        if largest == 0.0:
            return self.zeros(len(x))
        unit = x / largest  # first: the square of a huge but finite number is not finite
        norm = float(np.linalg.norm(unit))
        # The update fills min(1, norm / clip) of the sphere; both cases without a product that could overflow.
        scale = FILL * self.bound * (1.0 / norm if largest >= clip / norm else largest / clip)
        scaled = unit * scale
        floor = np.floor(scaled)
        q = (floor + (rng.random(len(x)) < scaled - floor)).astype(np.int64)
        while dot(q, q) > self.bound**2:  # rounding carried it out, possible for very long vectors only
            q = np.sign(q) * (np.abs(q) * 63 // 64)
        return self.words(q)

    def decode(self, total: Words, clip: float, total_weight: int) -> NDArray[np.float64]:
        """Returns the weighted mean that a sum of encoded updates stands for, shape ``k``, in the unit of ``clip``."""
        return self.lift(total).astype(np.float64) * (clip / (FILL * self.bound)) / total_weight


def blob(data: bytes | Words) -> Blob:
    """Returns bytes, or ring elements, as a blob."""
    if isinstance(data, bytes):
        return np.frombuffer(data, dtype=np.uint8)
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def blocks(length: int, block: int = BLOCK) -> Iterator[slice]:
    """Yields consecutive slices of at most ``block`` elements."""
    for low in range(0, length, block):
        yield slice(low, min(length, low + block))


def hashed(label: str, *parts: bytes) -> bytes:
    """Returns SHA-256 of ``parts``, each behind its length, under a label of its own: one purpose, one label."""
    state = hashlib.sha256()
    for part in (label.encode(), *parts):
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return state.digest()


class Pad:
    """A stream of ring elements that nobody without the seed can tell from random ones.

    The key is derived from the seed and the whole context: one key makes one pad, so the counter may start at zero.
    """

    def __init__(self, ring: Ring, seed: bytes, context: bytes) -> None:
        self.ring = ring
        key = HKDFExpand(algorithm=hashes.SHA256(), length=32, info=b"fedmat/trigram/pad/v1|" + context).derive(seed)
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def take(self, count: int) -> Words:
        """Returns the next ``count`` elements."""
        size = count * self.ring.size
        zeros = memoryview(_ZEROS)[:size] if size <= len(_ZEROS) else bytes(size)
        return np.frombuffer(self._stream.update(zeros), self.ring.dtype)


def products(left: Words, right: Words) -> Words:
    """Returns ``left @ right.T`` modulo the ring, ``m x k`` and ``n x k`` to ``m x n``.

    einsum walks both rows in step: four times as fast as matmul, which has no library for unsigned integers.
    """
    return np.asarray(np.einsum("ik,jk->ij", left, right))


def dot(x: Integers, y: Integers) -> int:
    """Returns the exact inner product of two signed vectors of the same length."""
    left, right = _limbs(x), _limbs(y)
    total = 0
    for part in blocks(len(x)):
        for i, a in left:
            for j, b in right:
                total += int(np.dot(a[part], b[part])) << (i + j)
    return total


def _limbs(x: Integers) -> list[tuple[int, Integers]]:
    largest = max(int(x.max()), -int(x.min())) if len(x) else 0
    if largest < 1 << _LIMB:
        return [(0, x)]
    mask = (1 << _LIMB) - 1
    low = [(0, x & mask)]
    if largest < 1 << (2 * _LIMB):
        return [*low, (_LIMB, x >> _LIMB)]
    return [*low, (_LIMB, (x >> _LIMB) & mask), (2 * _LIMB, x >> (2 * _LIMB))]


def quadratic(weights: list[int] | tuple[int, ...], gram: list[list[int]]) -> int:
    """Returns ``c' G c`` over the integers."""
    return sum(c * w * g for c, row in zip(weights, gram, strict=True) for w, g in zip(weights, row, strict=True))
