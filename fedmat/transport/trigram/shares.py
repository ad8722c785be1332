"""A role's arithmetic: shares of inner products, of a public map's images, of one sum and of projections.

With ``x = E + a + b`` and replicated holdings, Aggregator (E, a), Auditor (E, b), Notary (a, b), every product of two
terms of ``x`` is known to some role, so the Gram matrix is a sum of three numbers that each role works out alone:

    (E + a)(E + a)'  +  (E b' + b E' + b b')  +  (a b' + b a')  =  x x'

Everything streams over blocks; pads are made anew where they are needed and never kept.
Refuses to know: keys, messages, phases; what the opened numbers are used for.

References:
    Araki et al., "High-Throughput Semi-Honest Secure Three-Party Computation", CCS 2016 (replicated shares, zero sharing).
    Lycklama et al., "RoFL", S&P 2023, and RiseFL, VLDB 2024 (random projections against out-of-range inputs).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmat import wire
from fedmat.envelopes import PublicMap, RoleName
from fedmat.errors import ProtocolError
from fedmat.transport.trigram.messages import SEEDS_OF, fingerprint, pad_context
from fedmat.transport.trigram.ring import Pad, Ring, Words, blocks, hashed, products

MAP_NORM = 1 << 11  # Frobenius norm of a public map's matrix: its images then fit the 64-bit ring
TARGET_NORM = 1 << 20  # Euclidean norm of a column of its targets
MAP_COLUMNS = 8  # every column opens one more number about each update
PROJECTIONS = 256
_FEWEST_FOR_MEAN = 128  # projections below which a mean square says too little
_TALLEST, _MEAN_SQUARE = 9.0, 2.2  # in units of the bound; an honest update is above with probability below 1e-12
_BLOCK = 1 << 12
# The parts of x that each role holds: what it projects, and what it sums.
PARTS_OF: dict[RoleName, tuple[str, str]] = {"aggregator": ("e", "a"), "auditor": ("e", "b"), "notary": ("a", "b")}


@dataclass(frozen=True)
class Held:
    """What a role holds of one site.

    Attributes:
        envelope: digest of the envelope it came in.
        seeds: by tag, ``a`` and ``b``: those of this role.
        masked: ``length`` ring elements; None at the Notary.
    """

    site: str
    envelope: bytes
    seeds: dict[str, bytes]
    masked: Words | None


@dataclass(frozen=True)
class Holdings:
    """What a role holds of all sites of an exchange, in the order of the alphabet: ``n`` sites, ``k`` elements each."""

    role: RoleName
    ring: Ring
    header: bytes
    length: int
    held: tuple[Held, ...]

    def rows(self, block: int | None = None) -> Iterator[tuple[slice, dict[str, Words]]]:
        """Yields the role's two parts of all updates, ``n x block`` each, by tag, block by block."""
        pads = {
            tag: [Pad(self.ring, h.seeds[tag], pad_context(self.header, h.site, tag)) for h in self.held]
            for tag in SEEDS_OF[self.role]
        }
        for part in blocks(self.length, block) if block else blocks(self.length):
            width = part.stop - part.start
            parts = {tag: np.stack([p.take(width) for p in made]) for tag, made in pads.items()}
            if self.role != "notary":
                parts["e"] = np.stack([h.masked[part] for h in self.held])  # type: ignore[index]
            yield part, parts

    def gram(self) -> Words:
        """Returns this role's share of the updates' inner products, ``n x n``, without a mask."""
        share = self.ring.zeros(len(self.held), len(self.held))
        for _, parts in self.rows():
            share += self._quadratic(parts)
        return share

    def mapped(self, public_map: MapNumbers) -> Words:
        """Returns this role's share of the mapped updates' inner products and their products with the targets, flat."""
        n = len(self.held)
        images = {tag: self.ring.zeros(n, public_map.rows) for tag in PARTS_OF[self.role]}
        for part, parts in self.rows():
            matrix = self.ring.words(public_map.matrix[:, part])
            for tag, values in parts.items():
                images[tag] += products(values, matrix)
        targets = self.ring.words(public_map.targets.T)
        linear = self.ring.zeros(n, public_map.columns)
        if self.role == "aggregator":
            linear += products(images["e"] + images["a"], targets)
        elif self.role == "auditor":
            linear += products(images["b"], targets)
        return np.concatenate([self._quadratic(images).reshape(-1), linear.reshape(-1)])

    def sums(self, weights: Mapping[str, int]) -> dict[str, Words]:
        """Returns ``sum_i weights[i] * part_i`` for both of this role's parts, by tag, ``k`` elements each."""
        chosen = Holdings(self.role, self.ring, self.header, self.length, self._chosen(weights))
        factors = np.array([weights[h.site] for h in chosen.held]).astype(self.ring.dtype)
        totals = {tag: self.ring.zeros(self.length) for tag in PARTS_OF[self.role]}
        for part, parts in chosen.rows():
            for tag, values in parts.items():
                totals[tag][part] = np.einsum("i,ik->k", factors, values)
        return totals

    def projections(self, weights: Mapping[str, int], coin: bytes) -> dict[str, Words]:
        """Returns random projections of both of this role's parts of every selected update, ``repetitions x n`` by tag.

        Entries of a projection are -1, 0, 0, 1 and not -1, 1: with the latter 2^31 on any two coordinates would cancel
        modulo 2^32 in every projection, and the site that sent them would never be found.
        """
        chosen = Holdings(self.role, self.ring, self.header, self.length, self._chosen(weights))
        count = repetitions(self.length)
        totals = {tag: self.ring.zeros(count, len(chosen.held)) for tag in PARTS_OF[self.role]}
        stream = Pad(self.ring, coin, hashed("fedmat/trigram/projections/v1"))
        for part, parts in chosen.rows(_BLOCK):
            width = part.stop - part.start
            needed = 2 * count * width
            bits = np.unpackbits(stream.take(-(-needed // self.ring.bits)).view(np.uint8))[:needed].reshape(2, count, width)
            signs = bits[0].astype(np.float64) - bits[1]
            for tag, values in parts.items():
                totals[tag] += self._project(signs, values)
        return totals

    def _project(self, signs: NDArray[np.float64], values: Words) -> Words:
        # 16 bits at a time in float64, which is exact up to 2^53 and has a fast product.
        total = self.ring.zeros(len(signs), len(values))
        for shift in range(0, self.ring.bits, 16):
            limb = ((values >> self.ring.dtype.type(shift)) & self.ring.dtype.type(0xFFFF)).astype(np.float64)
            total += self.ring.words((signs @ limb.T).astype(np.int64)) << self.ring.dtype.type(shift)
        return total

    def _chosen(self, weights: Mapping[str, int]) -> tuple[Held, ...]:
        return tuple(h for h in self.held if weights.get(h.site, 0))

    def _quadratic(self, parts: Mapping[str, Words]) -> Words:
        if self.role == "aggregator":
            both = parts["e"] + parts["a"]
            return products(both, both)
        if self.role == "auditor":
            cross = products(parts["e"], parts["b"])
            return cross + cross.T + products(parts["b"], parts["b"])
        cross = products(parts["a"], parts["b"])
        return cross + cross.T


def repetitions(length: int) -> int:
    """Returns how many projections are opened to find a cheat: they may not tell more than an eighth of an update."""
    return min(PROJECTIONS, length // 8)


# --- public maps ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MapNumbers:
    """A public map as numbers.

    Attributes:
        matrix, targets: ``rows x length`` and ``rows x columns`` signed integers.
        square: squared Frobenius norm of the matrix.
        target_squares: squared norm of each column of the targets.
    """

    rows: int
    columns: int
    matrix: NDArray[Any]
    targets: NDArray[Any]
    square: int
    target_squares: tuple[int, ...]


def read_map(public_map: PublicMap | None, map_sha256: str, length: int) -> MapNumbers | None:
    """Returns the numbers of the map that a header names; None where it names none.

    Raises:
        ProtocolError: wrong_map; missing, another, of a wrong shape, or so large that images could wrap.
    """
    if public_map is None and not map_sha256:
        return None
    try:
        named = public_map is not None and wire.digest(public_map) == map_sha256
    except (ValueError, TypeError):
        named = False
    if public_map is None or not named:
        raise ProtocolError("wrong_map", "the public map is not the one the header names")
    m, t = public_map.rows, public_map.columns
    if (
        m < 1
        or not 1 <= t <= MAP_COLUMNS
        or public_map.matrix.nbytes != 4 * m * length
        or public_map.targets.nbytes != 4 * m * t
    ):
        raise ProtocolError(
            "wrong_map", f"a public map of a wrong shape, expected {length} columns, targets 1 to {MAP_COLUMNS}"
        )
    matrix = np.ascontiguousarray(public_map.matrix).reshape(-1).view("<i4").reshape(m, length)
    targets = np.ascontiguousarray(public_map.targets).reshape(-1).view("<i4").reshape(m, t)
    square = _square(matrix.reshape(-1), MAP_NORM)
    squares = tuple(_square(targets[:, j], TARGET_NORM) for j in range(t))
    if square > MAP_NORM**2 or max(squares) > TARGET_NORM**2:
        raise ProtocolError(
            "wrong_map",
            f"norms of a public map, expected at most {MAP_NORM} (matrix) and {TARGET_NORM} (targets)",
            fix="quantise it more coarsely",
        )
    return MapNumbers(m, t, matrix, targets, square, squares)


def _square(values: NDArray[Any], limit: int) -> int:
    """Returns the squared norm; if one entry alone is above the limit, its square, so that no sum overflows."""
    largest = max(abs(int(values.max())), abs(int(values.min())))
    if largest > limit:
        return largest**2
    total = 0
    for part in blocks(len(values)):
        piece = values[part].astype(np.int64)
        total += int(piece @ piece)
    return total


# --- what is opened ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """What three shares open: exact integers.

    Attributes:
        sites: in the order of the alphabet, n of them.
        gram, mapped_gram: ``n x n``; the latter empty without a public map.
        scores: ``n x columns`` products of the mapped updates with the targets; empty without a public map.
    """

    sites: tuple[str, ...]
    gram: list[list[int]]
    mapped_gram: list[list[int]] = field(default_factory=list)
    scores: list[list[int]] = field(default_factory=list)

    def of(self, sites: Sequence[str]) -> Opened:
        """Returns the part about some of the sites: no new shares are needed to leave one out."""
        at = [self.sites.index(s) for s in sites]
        gram, mapped = ([[g[i][j] for j in at] for i in at] if g else [] for g in (self.gram, self.mapped_gram))
        return Opened(tuple(sites), gram, mapped, [self.scores[i] for i in at if self.scores])


def share_sizes(sites: int, columns: int) -> tuple[int, int]:
    """Returns the numbers of ring elements in a share: Gram matrix, and what a map adds (0 columns: no map)."""
    return sites * sites, sites * sites + sites * columns if columns else 0


def opened(ring: Ring, sites: tuple[str, ...], grams: Sequence[Words], mapped: Sequence[Words], columns: int) -> Opened:
    """Returns what the three roles' shares add up to.

    Raises:
        ProtocolError: impossible_gram; it is not symmetric, so a role lied: no site could have caused that.
    """
    n = len(sites)
    total = ring.lift(np.sum(grams, axis=0, dtype=ring.dtype)).reshape(n, n)
    images = ring.lift(np.sum(mapped, axis=0, dtype=ring.dtype))
    squares, scores = images[: n * n].reshape(-1, n), images[n * n :].reshape(n, columns)
    if (total != total.T).any() or (len(squares) and (squares != squares.T).any()):
        raise ProtocolError("impossible_gram", "the inner products are not symmetric: a role's share is wrong")
    return Opened(sites, total.tolist(), squares.tolist(), scores.tolist() if columns else [])


@dataclass(frozen=True)
class OwnRow:
    """What was opened about one site: the site can check all of it with its own update.

    Attributes:
        weight: in the sum; 0 where it was left out, and ``reason`` says why.
        square, product: its update's squared norm, and its product with the opened sum, over the integers.
        salt: keeps other sites from trying out values against the digest of this row.
    """

    site: str
    weight: int
    square: int
    product: int
    reason: str
    salt: bytes

    def leaf(self, header: bytes) -> bytes:
        """Returns the digest that the roles sign."""
        known = fingerprint((self.site, self.weight, self.square, self.product, self.reason))
        return hashed("fedmat/trigram/row/v1", header, known, self.salt)


def own_rows(values: Opened, weights: Mapping[str, int], reasons: Mapping[str, str], coin: bytes) -> tuple[OwnRow, ...]:
    """Returns the row of every site whose inner products were opened, also of those left out as malformed."""
    factors = [weights.get(s, 0) for s in values.sites]
    return tuple(
        OwnRow(
            site,
            factors[i],
            row[i],
            sum(c * g for c, g in zip(factors, row, strict=True)),
            reasons.get(site, ""),
            hashed("fedmat/trigram/row-salt/v1", coin, site.encode()),
        )
        for i, (site, row) in enumerate(zip(values.sites, values.gram, strict=True))
    )


def common_coin(coins: Sequence[bytes]) -> bytes:
    """Returns the exclusive or of the roles' coins: random if one of them is."""
    return bytes(np.bitwise_xor.reduce([np.frombuffer(c, np.uint8) for c in coins]))


def malformed(values: Opened, ring: Ring, public_map: MapNumbers | None) -> dict[str, str]:
    """Returns the sites whose inner products no vectors of norm at most ``ring.bound`` have, with the reason.

    First what one site's own numbers show, then pairs against Cauchy-Schwarz: of those in most contradictions, all are
    left out, so that a site cannot pick whom it takes with it by its place in the alphabet. Whether the whole matrix is
    positive semidefinite is not asked: nobody could be named for it, and the norm of the opened sum is checked exactly.
    """
    found: dict[str, str] = {}
    n, g, m = len(values.sites), values.gram, values.mapped_gram
    for i, site in enumerate(values.sites):
        fits = 0 <= g[i][i] <= ring.bound**2
        if public_map is not None:
            fits = fits and 0 <= m[i][i] <= public_map.square * g[i][i]
            fits = fits and all(s * s <= m[i][i] * t for s, t in zip(values.scores[i], public_map.target_squares, strict=True))
        if not fits:
            found[site] = "malformed: its numbers are out of range"
    left = [i for i in range(n) if values.sites[i] not in found]
    while left:
        faults = {i: sum(_contradict(g, i, j) or (bool(m) and _contradict(m, i, j)) for j in left) for i in left}
        worst = max(faults.values())
        if not worst:
            break
        for i in [i for i in left if faults[i] == worst]:
            found[values.sites[i]] = "malformed: its numbers contradict another site's"
            left.remove(i)
    return found


def _contradict(gram: list[list[int]], i: int, j: int) -> bool:
    return gram[i][j] ** 2 > gram[i][i] * gram[j][j]


def guilty(ring: Ring, sites: Sequence[str], projections: Words) -> tuple[str, ...]:
    """Returns the sites whose projections no update of norm at most ``ring.bound`` has, but with probability 1e-12.

    Args:
        projections: ``repetitions x n``. Entries of -1, 0, 0, 1 keep half of the squared norm; hence the square root of two.
    """
    scaled = ring.lift(projections).reshape(-1, len(sites)).astype(np.float64) * (2.0**0.5 / ring.bound)
    tall = np.abs(scaled).max(axis=0, initial=0.0) > _TALLEST
    if len(scaled) >= _FEWEST_FOR_MEAN:
        tall |= (scaled**2).mean(axis=0) > _MEAN_SQUARE
    return tuple(s for s, out in zip(sites, tall, strict=True) if out)
