"""Compressors: how ``d`` numbers of an update become ``k`` that can still be added, and back.

Knows: a public seed, the shapes of a model's tensors, vectors. Refuses to know: records, sites, messages, keys; which update
a vector is.

Every compressor is an orthogonal projection given by ``k`` orthonormal public directions: ``compress`` takes the coordinates
along them (``C v``), ``expand`` goes back (``C' z``). So both are linear (a sum of compressed updates is the compressed sum,
under masks as in the clear), ``C C' = 1``, nothing grows (``|compress(v)| <= |v|``, ``|expand(z)| = |z|``), and a distance
between two compressed updates is the distance between what they would do to the model.

Why the projection and not the unbiased estimate ``d/k C' C v``: what a site does not send it adds to its next update, and
``v - C' C v`` is the rest, never longer than ``v``. After an unbiased estimate the rest is ``v - d/k C' C v``: ``d/k - 1`` times
too long along every direction that was sent, so it grows in every round.

The directions are made of sums, differences and products of single numbers in float64, never of a matrix product or a
factorisation of a library: every machine computes the same bits, in ``of`` and in ``expand``. Only ``compress`` of a low-rank
compressor uses a matrix product: a site alone computes it.

References:
    Ailon, Chazelle, "The fast Johnson-Lindenstrauss transform", SIAM J. Computing 39, 2009 (random signs before a Hadamard
    transform). Konecny et al., "Federated Learning: Strategies for Improving Communication Efficiency", 2016 (structured
    updates: low rank with one fixed random factor, random masks). Seide et al., Interspeech 2014, and Karimireddy et al.,
    "Error Feedback Fixes SignSGD", ICML 2019 (feedback). Hu et al., "LoRA", ICLR 2022.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedmat import weights as wts
from fedmat.config import Compression
from fedmat.errors import PlanRefused, WireError
from fedmat.seeds import derive
from fedmat.weights import Vector

SMALL = 16  # a tensor with fewer rows is sent whole; also keeps the member axis (at most 10) from being taken for rows
GAIN = 4.0  # learning rates by which a step of Adam moves a number of a matrix behind a public factor, whatever the rank

NOT_OFFERED = {
    "top_k": (
        "which numbers of an update are largest tells about the site's records, every site picks others, so the indices would "
        "have to be opened, and their union grows with the sites"
    ),
    "sign": "signs cannot be added: the sum of updates that the rules and the encrypted rounds need would not exist",
    "powersgd": "it needs two sums per round, and the second lets the first be taken apart",
}


@dataclass(frozen=True, eq=False)
class Compressor(abc.ABC):
    """``k`` public orthonormal directions in the space of a model's ``d`` numbers.

    Attributes:
        size: ``d``.
        trains_inside: whether a site trains along the directions alone, so that compressing its update loses nothing.
    """

    spec: Compression
    size: int
    trains_inside: ClassVar[bool] = False

    @classmethod
    def of(cls, spec: Compression, like: Mapping[str, NDArray[np.float32]], seed: int) -> Compressor:
        """Returns the compressor that the settings, the shapes of ``like`` and a public seed decide, the same everywhere.

        Args:
            like: tensors with the model's names and shapes; their values play no part.
            seed: fixed before training starts, and unknown before the model it starts from was; else a site could hide a
                change of its update where no direction leads.

        Raises:
            PlanRefused: ``spec.share`` of the model is too few numbers for this compressor.
        """
        size = sum(int(np.prod(v.shape, dtype=np.int64)) for v in like.values())
        if spec.name == "none":
            return Whole(spec, size)
        budget = int(spec.share * size)
        if budget < 1:
            raise PlanRefused(
                f"plan.compression.share {spec.share:g} of a model of {size} numbers is none",
                fix=f"raise it to {1.0 / max(size, 1):.2g} or more, or use compression.name: none",
            )
        if spec.name == "random_k":
            return RandomCoordinates(spec, size, _choose(size, budget, derive(seed, "coordinates")))
        if spec.name == "hadamard":
            return Hadamard(spec, size, Mixing.of(size, derive(seed, "mixing")), _choose(size, budget, derive(seed, "rows")))
        return LowRank(spec, size, _parts(spec, like, budget, seed))

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """``k``, the numbers of one update."""

    @abc.abstractmethod
    def _compress(self, vector: Vector) -> Vector: ...

    @abc.abstractmethod
    def _expand(self, numbers: Vector) -> Vector: ...

    def compress(self, vector: Vector) -> Vector:
        """Returns the coordinates, shape ``k``, of a vector of shape ``d`` along the directions."""
        if vector.shape != (self.size,):
            raise ValueError(f"a vector of shape {vector.shape}, the model has {self.size} numbers")
        return self._compress(np.asarray(vector, dtype=np.float64))

    def expand(self, numbers: Vector) -> Vector:
        """Returns the vector of shape ``d`` with the given coordinates, shape ``k``; the same bits on every machine.

        Raises:
            WireError: another number of coordinates, which come from another party.
        """
        if numbers.shape != (self.length,):
            raise WireError(f"a compressed update of shape {numbers.shape}, this plan's has {self.length} numbers")
        return self._expand(np.asarray(numbers, dtype=np.float64))

    def basis(self) -> Mapping[str, NDArray[np.float32]]:
        """Returns, by name, the public ``A`` (``n x r``) of every tensor that is trained as ``W + A B``; else nothing."""
        return {}


@dataclass(frozen=True, eq=False)
class Whole(Compressor):
    """No compression: every number is sent."""

    @property
    def length(self) -> int:
        """See :class:`Compressor`."""
        return self.size

    def _compress(self, vector: Vector) -> Vector:
        return vector.copy()

    def _expand(self, numbers: Vector) -> Vector:
        return numbers.copy()


@dataclass(frozen=True, eq=False)
class RandomCoordinates(Compressor):
    """Numbers of the update at public random places.

    Attributes:
        places: increasing, shape ``k``.
    """

    places: NDArray[np.int64]

    @property
    def length(self) -> int:
        """See :class:`Compressor`."""
        return len(self.places)

    def _compress(self, vector: Vector) -> Vector:
        return vector[self.places]

    def _expand(self, numbers: Vector) -> Vector:
        out = np.zeros(self.size)
        out[self.places] = numbers
        return out


@dataclass(frozen=True, eq=False)
class Hadamard(Compressor):
    """Numbers at public random places of the update after a random rotation, which spreads each number over all places."""

    mixing: Mixing
    places: NDArray[np.int64]

    @property
    def length(self) -> int:
        """See :class:`Compressor`."""
        return len(self.places)

    def _compress(self, vector: Vector) -> Vector:
        return self.mixing.turn(vector)[self.places]

    def _expand(self, numbers: Vector) -> Vector:
        out = np.zeros(self.size)
        out[self.places] = numbers
        return self.mixing.turn_back(out)


@dataclass(frozen=True, eq=False)
class Part:
    """Where one tensor lies in the vector and in the numbers.

    Attributes:
        shape: of the tensor as ``members x n_in x n_out``.
        factor: orthonormal columns ``n_in x r``; None where the tensor is sent whole.
    """

    name: str
    at: slice
    numbers: slice
    shape: tuple[int, int, int]
    factor: Vector | None


@dataclass(frozen=True, eq=False)
class LowRank(Compressor):
    """Every large matrix changes by ``A B`` with a public random ``A``; sites train ``B`` and all small tensors."""

    parts: tuple[Part, ...]
    trains_inside: ClassVar[bool] = True

    @property
    def length(self) -> int:
        """See :class:`Compressor`."""
        return sum(part.numbers.stop - part.numbers.start for part in self.parts)

    def _compress(self, vector: Vector) -> Vector:
        out = np.empty(self.length)
        for part in self.parts:
            found = vector[part.at]
            if part.factor is not None:
                found = np.matmul(part.factor.T, found.reshape(part.shape)).ravel()
            out[part.numbers] = found
        return out

    def _expand(self, numbers: Vector) -> Vector:
        out = np.zeros(self.size)
        for part in self.parts:
            found = numbers[part.numbers]
            if part.factor is None:
                out[part.at] = found
                continue
            members, _, n_out = part.shape
            b = found.reshape(members, -1, n_out)
            whole = out[part.at].reshape(part.shape)
            for j in range(b.shape[1]):  # one column of A at a time: the order of the sum is ours, not a library's
                whole += part.factor[:, j, None] * b[:, j, None, :]
        return out

    def basis(self) -> Mapping[str, NDArray[np.float32]]:
        """See :class:`Compressor`; a number of ``A`` is of size ``GAIN / sqrt(r)``, so that a step has one size at any rank."""
        return {
            part.name: (GAIN * math.sqrt(part.shape[1] / part.factor.shape[1]) * part.factor).astype(np.float32)
            for part in self.parts
            if part.factor is not None
        }


@dataclass(frozen=True, eq=False)
class Mixing:
    """A random rotation of ``n`` numbers: signs and Hadamard transforms.

    A Hadamard transform takes a power of two. Filling up with zeros would leave directions that point out of the space; here
    two transforms of the largest power of two cover the first and the last numbers, so that the whole is orthogonal for any ``n``.

    Attributes:
        signs: +-1 before the first transform, shape ``n``.
        again: +-1 before the second, shape ``2^a``; empty where ``n`` is a power of two and one is enough.
    """

    signs: Vector
    again: Vector

    @classmethod
    def of(cls, size: int, seed: int) -> Mixing:
        """Returns the rotation of ``size`` numbers that a seed decides."""
        window = 1 << (size.bit_length() - 1)
        return cls(_signs(size, derive(seed, "first")), _signs(window if window < size else 0, derive(seed, "second")))

    def turn(self, x: Vector) -> Vector:
        """Returns ``Q x`` for ``x`` of shape ``n`` or ``n x c``."""
        out = np.ascontiguousarray(_times(x, self.signs))
        window = 1 << (len(out).bit_length() - 1)
        hadamard(out[:window])
        if len(self.again):
            out[-window:] = _times(out[-window:], self.again)
            hadamard(out[-window:])
        return out

    def turn_back(self, x: Vector) -> Vector:
        """Returns ``Q' x``, the inverse of :meth:`turn`."""
        out = np.array(x, dtype=np.float64, order="C")
        window = 1 << (len(out).bit_length() - 1)
        if len(self.again):
            hadamard(out[-window:])
            out[-window:] = _times(out[-window:], self.again)
        hadamard(out[:window])
        return _times(out, self.signs)


def hadamard(x: Vector) -> None:
    """Replaces ``x`` (shape ``2^a`` or ``2^a x c``, contiguous) by its orthonormal Hadamard transform along the first axis.

    Sums and differences alone, and one product by ``2^(-a/2)``: the same bits everywhere. ``a 2^a`` sums.
    """
    n = len(x)
    bits = n.bit_length() - 1
    if n != 1 << bits or not x.flags.c_contiguous:
        raise ValueError(f"a contiguous array whose length is a power of two is needed, this one has {n} rows")
    if x.ndim == 1 and bits > 3:  # a Hadamard matrix is a Kronecker product: along both sides of a rectangle, in long rows
        rows = 1 << (bits // 2)
        square = x.reshape(rows, n // rows)
        _butterfly(square)
        turned = np.ascontiguousarray(square.T)
        _butterfly(turned)
        square[...] = turned.T
    else:
        _butterfly(x.reshape(n, -1))
    x *= math.sqrt(1.0 / n)


def _butterfly(x: Vector) -> None:
    """Unscaled transform of a matrix along its first axis, in place."""
    n, half = len(x), 1
    spare = np.empty(x.size // 2)
    while half < n:
        pairs = x.reshape(n // (2 * half), 2, -1)
        upper, lower = pairs[:, 0], pairs[:, 1]
        difference = spare.reshape(upper.shape)
        np.subtract(upper, lower, out=difference)
        upper += lower
        lower[...] = difference
        half *= 2


def with_feedback(compressor: Compressor, delta: Vector, memory: Vector, decay: float) -> tuple[Vector, Vector]:
    """Returns the numbers to send and what is left for the next round: ``delta + decay memory = expand(numbers) + rest``.

    Args:
        delta: the site's update, shape ``d``.
        memory: what was left the last time, shape ``d``; zeros at first.
        decay: share of it that still counts.
    """
    wanted = delta + decay * memory
    numbers = compressor.compress(wanted)
    return numbers, wanted - compressor.expand(numbers)


def refuse(spec: Compression, mode: str) -> None:
    """Refuses what would leak or could not be added; every compressor of :class:`Compressor` can be added in every mode.

    Args:
        mode: ``plan.security.mode``.

    Raises:
        PlanRefused: a compressor that is left out on purpose, with the reason.
    """
    why = NOT_OFFERED.get(spec.name)
    if why:
        raise PlanRefused(
            f"plan.compression.name {spec.name} (security.mode {mode}): {why}",
            fix="use low_rank, hadamard or random_k: their directions are public and fixed before training",
        )


def _parts(spec: Compression, like: Mapping[str, NDArray[np.float32]], budget: int, seed: int) -> tuple[Part, ...]:
    ranks = _ranks(spec, {name: _matrix(like[name].shape) for name in wts.names(like)}, budget)
    parts: list[Part] = []
    at = number = 0
    for name, rank in ranks.items():
        shape = _matrix(like[name].shape)
        members, n_in, n_out = shape
        size = members * n_in * n_out
        count = members * rank * n_out if rank else size
        factor = None
        if rank:
            directions = np.zeros((n_in, rank))
            directions[_choose(n_in, rank, derive(seed, "columns", name)), np.arange(rank)] = 1.0
            factor = Mixing.of(n_in, derive(seed, "factor", name)).turn_back(directions)
        parts.append(Part(name, slice(at, at + size), slice(number, number + count), shape, factor))
        at, number = at + size, number + count
    return tuple(parts)


def _ranks(spec: Compression, shapes: Mapping[str, tuple[int, int, int]], budget: int) -> dict[str, int]:
    """Returns every tensor's rank, 0 where it is sent whole: the next rank goes where the smallest share of rows is reached."""
    ranks = {name: int(n_in >= SMALL and n_out >= SMALL) for name, (_, n_in, n_out) in shapes.items()}
    cost = {name: members * n_out for name, (members, _, n_out) in shapes.items()}
    left = budget - sum(cost[n] if r else int(np.prod(shapes[n])) for n, r in ranks.items())
    if left < 0:
        total = sum(int(np.prod(s)) for s in shapes.values())
        raise PlanRefused(
            f"plan.compression.share {spec.share:g}: {budget} numbers, and low_rank needs {budget - left} even at rank 1",
            fix=f"raise the share to {math.ceil(1e4 * (budget - left) / total) / 1e4:g} or more, or use compression.name: hadamard",
        )
    while True:
        open_to = [n for n, r in ranks.items() if r and r < shapes[n][1] and cost[n] <= left]
        if not open_to:
            return ranks
        chosen = min(open_to, key=lambda n: ranks[n] / shapes[n][1])
        ranks[chosen] += 1
        left -= cost[chosen]


def _matrix(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns a tensor's shape as ``members x n_in x n_out``; a vector is one row."""
    padded = (1, 1, *shape)
    return int(np.prod(padded[:-2], dtype=np.int64)), padded[-2], padded[-1]


def _bits(count: int, seed: int) -> NDArray[np.uint64]:
    """Returns ``count`` raw words of a bit generator, whose stream NumPy promises to keep (NEP 19)."""
    return np.asarray(np.random.PCG64(seed).random_raw(count), dtype="<u8")


def _signs(count: int, seed: int) -> Vector:
    bits = np.unpackbits(_bits(-(-count // 64), seed).view(np.uint8), count=count) if count else np.zeros(0, dtype=np.uint8)
    return 1.0 - 2.0 * bits.astype(np.float64)


def _choose(size: int, count: int, seed: int) -> NDArray[np.int64]:
    """Returns ``count`` of ``size`` places, increasing: those with the smallest random words."""
    words = _bits(size, seed)
    limit = np.partition(words, count - 1)[count - 1]
    below, equal = np.flatnonzero(words < limit), np.flatnonzero(words == limit)
    return np.sort(np.concatenate([below, equal[: count - len(below)]])).astype(np.int64)


def _times(x: Vector, signs: Vector) -> Vector:
    return x * signs.reshape(-1, *[1] * (x.ndim - 1))
