"""Who contributed how much: Shapley shares from what encrypted rounds open, settlement per release, integer credits.

Knows: inner products of updates' images on the consortium's reference rows, second moments of a feature map and a target.
Refuses to know: updates, records, who is who beyond a name to put into words. No coalition's model is ever opened: opening
the sum over a coalition and the sum with one site more would give that site's update away, so a coalition's worth is
always worked out from quadratic forms.

Two looks. ``gram_shapley`` tells per round what each update did to the reference rows: cheap, good at telling bad from good records,
as good as its rows; an update of zeros can look useful where others overshoot. ``head_shapley`` retrains the last layer for
every coalition out of sums of moments, once per release: that is the one to settle by, where there are rows enough
(docs/shapley-benchmark.md).

Shares are worth what the reference rows are worth: a site whose materials they lack contributes nothing that is seen here.

References:
    Shapley, "A Value for n-Person Games", 1953. Castro et al., "Polynomial calculation of the Shapley value based on
    sampling", Computers & OR 2009. Song et al., "Profit Allocation for Federated Learning", IEEE Big Data 2019 (per round).
    Jia et al., "Towards Efficient Data Valuation Based on the Shapley Value", AISTATS 2019. Ghorbani, Zou, ICML 2019.
    Owen, "Values of games with a priori unions", 1977 (several identities of one owner as one player).
    Balle, Wang, "Improving the Gaussian Mechanism for Differential Privacy", ICML 2018 (theorem 8).
    Dwork et al., "Analyze Gauss", STOC 2014 (a noisy second moment matrix).
    Balinski, Young, "Fair Representation", 1982 (largest remainders).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import median
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedmat.errors import NotEvidenced, PlanRefused, ProtocolError
from fedmat.privacy.mechanisms import Noise
from fedmat.weights import Vector

Matrix = NDArray[np.float64]

MOST_EXACT = 20  # sites: 2^20 coalitions take about 0.1 s
MOST_RETRAINED = 14  # sites: 2^14 solutions of a linear system
_AT_A_TIME = 1 << 22  # numbers of coalitions' moments held at once
_MOVES = 0.01  # of the median norm: below, an update does not move the model
_REPLAYS = 0.9  # cosine with the aggregate before
_ABOVE = 0.3  # a suspicious cosine lies this far above the median one at least
_DEVIATIONS = 6.0  # ... and this many median absolute deviations


@dataclass(frozen=True)
class Estimate:
    """Shares from sampled orders of arrival.

    Attributes:
        values: shape ``n``; they sum to the worth of all together exactly, as exact shares do.
        errors: shape ``n``: standard error of each.
    """

    values: Vector
    errors: Vector


# --- the game ------------------------------------------------------------------------------------------------------


def shapley(worth: ArrayLike) -> Vector:
    """Returns exact Shapley shares, shape ``n``, from the worth of all ``2**n`` coalitions.

    Args:
        worth: shape ``2**n``; site ``i`` is in coalition ``S`` where bit ``i`` of ``S`` is set. ``worth[0]`` is nobody's.

    Raises:
        ValueError: the length is no power of two, or a worth is not finite.
    """
    v = np.asarray(worth, dtype=np.float64)
    n = len(v).bit_length() - 1
    if v.ndim != 1 or len(v) != 1 << n:
        raise ValueError(f"{len(v)} coalitions are not all the coalitions of some sites")
    if not np.isfinite(v).all():
        raise ValueError("the worth of a coalition is not finite")
    if n == 0:
        return np.zeros(0)
    sizes = np.zeros(1, dtype=np.int64)
    for _ in range(n - 1):
        sizes = np.concatenate([sizes, sizes + 1])
    share = np.array([1.0 / (n * math.comb(n - 1, s)) for s in range(n)])[sizes]
    out = np.empty(n)
    for i in range(n):
        pairs = v.reshape(-1, 2, 1 << i)
        out[i] = _folded(share * (pairs[:, 1] - pairs[:, 0]).reshape(-1))
    return out


def _folded(x: Vector) -> float:
    """Returns the sum of ``2**k`` numbers by halves: additions in an order that no machine's vector unit changes."""
    while len(x) > 1:
        half = len(x) // 2
        x = x[:half] + x[half:]
    return float(x[0])


def _sampled(n: int, gains: Callable[[NDArray[np.int64]], Vector], rng: np.random.Generator, permutations: int) -> Estimate:
    """Estimates shares from orders of arrival, each with its reverse [Castro et al.; antithetic pairs].

    Args:
        gains: order of arrival -> gain of each site when it arrives, shape ``n``, by site.
    """
    if permutations < 4 or permutations % 2:
        raise ValueError("permutations must be even and at least 4: an order and its reverse, twice, for a standard error")
    pairs = np.empty((permutations // 2, n))
    for row in pairs:
        order = rng.permutation(n)
        row[:] = 0.5 * (gains(order) + gains(order[::-1]))
    return Estimate(pairs.mean(axis=0), pairs.std(axis=0, ddof=1) / math.sqrt(len(pairs)))


# --- per round -----------------------------------------------------------------------------------------------------


def coalition_worth(mapped_gram: ArrayLike, mapped_target: ArrayLike, weights: ArrayLike, *, rows: int = 1) -> Vector:
    """Returns the worth of every coalition's weighted mean update, shape ``2**n``, in the linearised model.

    With ``p_i = J x_i`` the change that update ``i`` makes to predictions of ``m`` reference rows, ``r`` their residuals and
    ``p_S`` the weighted mean over the coalition: ``v(S) = (|r|^2 - |r - p_S|^2) / m = (2 r.p_S - |p_S|^2) / m``, the fall of
    the mean squared error (Gauss-Newton).

    Args:
        mapped_gram: ``n x n``, ``p_i . p_j``.
        mapped_target: shape ``n``, ``p_i . r``.
        weights: shape ``n``, positive: weights of the updates in the mean.
        rows: ``m``.

    Raises:
        ProtocolError: bad_gram: shapes or numbers that belong to no updates.
        PlanRefused: more than ``MOST_EXACT`` sites.
    """
    g, b, w = _quadratic(mapped_gram, mapped_target, weights, rows)
    n = len(b)
    if n > MOST_EXACT:
        raise PlanRefused(
            f"plan.contribution and {n} sites: {n} sites have 2^{n} coalitions, and all of them are looked at up to {MOST_EXACT} sites",
            fix="use gram_shapley_sampled, whose shares have a standard error, or merge sites of one owner (gram_shapley_of_owners)",
        )
    square, product, total = np.zeros(1), np.zeros(1), np.zeros(1)
    for i in range(n):
        crossed = np.zeros(1)  # sum over members of g_ij w_i w_j, for coalitions of the sites before i
        for j in range(i):
            crossed = np.concatenate([crossed, crossed + g[i, j] * w[i] * w[j]])
        square = np.concatenate([square, square + (g[i, i] * w[i] * w[i] + 2.0 * crossed)])
        product = np.concatenate([product, product + b[i] * w[i]])
        total = np.concatenate([total, total + w[i]])
    total[0] = 1.0  # nobody's mean is no update: worth 0
    return np.asarray((2.0 * product / total - square / (total * total)) / rows, dtype=np.float64)


def gram_shapley(mapped_gram: ArrayLike, mapped_target: ArrayLike, weights: ArrayLike, *, rows: int = 1) -> Vector:
    """Returns each site's exact Shapley share of a round's gain on the reference rows, shape ``n``; they sum to the gain.

    Every step is an elementwise operation in a fixed order, so all parties get the same bits. A zero update is not without
    effect: in a mean it dilutes the others, and its share is negative where they help.

    Args and errors: as :func:`coalition_worth`.
    """
    return shapley(coalition_worth(mapped_gram, mapped_target, weights, rows=rows))


def gram_shapley_sampled(
    mapped_gram: ArrayLike,
    mapped_target: ArrayLike,
    weights: ArrayLike,
    *,
    rows: int = 1,
    rng: np.random.Generator,
    permutations: int = 2000,
) -> Estimate:
    """Estimates :func:`gram_shapley` for any number of sites.

    Args:
        rng: from a seed that all parties know and no site could choose, e.g. ``stream(seed, "contribution", round)``.
        permutations: even; a standard error falls with the root of their number.

    Raises:
        ProtocolError: bad_gram, as :func:`coalition_worth`.
        ValueError: too few permutations.
    """
    g, b, w = _quadratic(mapped_gram, mapped_target, weights, rows)
    weighted = g * np.outer(w, w)

    def gains(order: NDArray[np.int64]) -> Vector:
        ordered = weighted[np.ix_(order, order)]
        square = np.cumsum(np.diag(ordered) + 2.0 * np.tril(ordered, -1).sum(axis=1))
        total = np.cumsum(w[order])
        worth = (2.0 * np.cumsum((b * w)[order]) / total - square / total**2) / rows
        out = np.empty(len(b))
        out[order] = np.diff(worth, prepend=0.0)
        return out

    return _sampled(len(b), gains, rng, permutations)


def gram_shapley_of_owners(
    mapped_gram: ArrayLike,
    mapped_target: ArrayLike,
    weights: ArrayLike,
    owners: Sequence[Sequence[int]],
    *,
    rows: int = 1,
) -> Vector:
    """Returns shares, shape ``n``, where the sites of one owner, or flagged copies of each other, are one player.

    Every player is the weighted mean of its sites, with their joint weight; within a player shares follow the weights. What
    all get together is unchanged.

    Args:
        owners: groups of site indices, each site in one of them.

    Raises:
        ProtocolError: bad_gram: as :func:`coalition_worth`, or a site is in no group or in two.
        PlanRefused: more than ``MOST_EXACT`` players.
    """
    g, b, w = _quadratic(mapped_gram, mapped_target, weights, rows)
    if sorted(i for group in owners for i in group) != list(range(len(b))) or not all(owners):
        raise ProtocolError("bad_gram", f"the groups must name every one of {len(b)} sites exactly once")
    joint = np.array([w[list(group)].sum() for group in owners])
    mix = np.zeros((len(owners), len(b)))
    for row, group, total in zip(mix, owners, joint, strict=True):
        row[list(group)] = w[list(group)] / total
    mixed = mix @ g @ mix.T
    players = gram_shapley(0.5 * (mixed + mixed.T), mix @ b, joint, rows=rows)
    return np.asarray(players @ mix, dtype=np.float64)


def _quadratic(gram: ArrayLike, target: ArrayLike, weights: ArrayLike, rows: int) -> tuple[Matrix, Vector, Vector]:
    g, b, w = (np.asarray(a, dtype=np.float64) for a in (gram, target, weights))
    n = len(b) if b.ndim == 1 else 0
    if n < 1 or g.shape != (n, n) or w.shape != (n,):
        raise ProtocolError("bad_gram", f"shapes {g.shape}, {b.shape}, {w.shape}: expected n x n, n and n")
    if not (np.isfinite(g).all() and np.isfinite(b).all() and np.isfinite(w).all()):
        raise ProtocolError("bad_gram", "an inner product or a weight is not finite")
    if not np.array_equal(g, g.T) or (np.diag(g) < 0).any():
        raise ProtocolError("bad_gram", "inner products of vectors are symmetric, and no square is negative")
    if (w <= 0).any() or rows < 1:
        raise ProtocolError("bad_gram", "weights must be above 0: leave out sites that took no part; rows at least 1")
    return g, b, w


# --- per release ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Sums over a site's rows of a public feature map ``phi`` (shape ``p``) and a target ``y``: all a ridge solution needs.

    Attributes:
        n: number of rows.
        features: ``p x p``, ``sum phi phi'``.
        products: shape ``p``, ``sum phi y``.
        square: ``sum y^2``.
    """

    n: int
    features: Matrix
    products: Vector
    square: float

    def __post_init__(self) -> None:
        p = self.products.shape[0] if self.products.ndim == 1 else -1
        if self.n < 0 or self.features.shape != (p, p):
            raise ProtocolError("bad_moments", f"{self.n} rows, shapes {self.features.shape} and {self.products.shape}")
        if not (np.isfinite(self.features).all() and np.isfinite(self.products).all() and math.isfinite(self.square)):
            raise ProtocolError("bad_moments", "a moment is not finite")
        if not np.array_equal(self.features, self.features.T):
            raise ProtocolError("bad_moments", "second moments are symmetric")


@dataclass(frozen=True)
class Bounds:
    """What no row passes: public, fixed before anyone looks at data.

    Attributes:
        phi: largest Euclidean norm of a row's features.
        y: largest absolute target.
    """

    phi: float
    y: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.phi) and self.phi > 0 and math.isfinite(self.y) and self.y > 0):
            raise PlanRefused("bounds of rows must be finite and above 0", fix="state the largest norm and the largest target")


def moments(phi: ArrayLike, y: ArrayLike, bounds: Bounds | None = None) -> Moments:
    """Returns the moments of rows ``phi`` (``n x p``) and ``y`` (shape ``n``), each row first clipped to ``bounds``.

    Raises:
        ProtocolError: bad_moments: shapes differ, or a number is not finite.
    """
    x, t = np.asarray(phi, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or t.shape != (len(x),):
        raise ProtocolError("bad_moments", f"shapes {x.shape} and {t.shape}: expected n x p and n")
    if bounds is not None:
        norms = np.sqrt(np.square(x).sum(axis=1, keepdims=True))
        x = x * np.minimum(1.0, bounds.phi / np.maximum(norms, bounds.phi))
        t = np.clip(t, -bounds.y, bounds.y)
    squares = x.T @ x
    return Moments(len(x), 0.5 * (squares + squares.T), x.T @ t, float(t @ t))


def head_worth(parts: Sequence[Moments], held_out: Moments, ridge: float) -> Vector:
    """Returns the worth of every coalition's own last layer, shape ``2**n``, on rows that nobody trained on.

    ``beta_S = (sum_S Phi'Phi + ridge I)^-1 sum_S Phi'y``; worth is the fall of the mean squared error against predicting 0, which is
    what a coalition of nobody predicts: centre the target by a public number if its mean is not near 0.

    Args:
        parts: one per site.
        held_out: the consortium's reference rows.
        ridge: penalty of every coefficient, above 0, in units of ``phi^2``.

    Raises:
        PlanRefused: more than ``MOST_RETRAINED`` sites, no ridge, or one too small for the noise in the moments.
        ProtocolError: bad_moments: the features differ in number, or there are no held-out rows.
    """
    features, products = _stacked(parts, held_out, ridge)
    n, p = products.shape
    if n > MOST_RETRAINED:
        raise PlanRefused(
            f"settlement for {n} sites: all coalitions are retrained up to {MOST_RETRAINED} sites",
            fix="use head_shapley_sampled, whose shares have a standard error",
        )
    out = np.empty(1 << n)
    chunk = max(1, _AT_A_TIME // (p * p + 1))
    for low in range(0, 1 << n, chunk):
        coalitions = np.arange(low, min(low + chunk, 1 << n))
        members = (coalitions[:, None] >> np.arange(n) & 1).astype(np.float64)
        total = (members @ features.reshape(n, p * p)).reshape(-1, p, p)
        out[coalitions] = _head_worth(total, members @ products, held_out, ridge)
    out[0] = 0.0
    return out


def head_shapley(parts: Sequence[Moments], held_out: Moments, ridge: float) -> Vector:
    """Returns each site's exact Shapley share of :func:`head_worth`, shape ``n``: what a release is settled by.

    One party works it out: solutions of linear systems are not equal to the last bit everywhere. Args and errors: as there.
    """
    return shapley(head_worth(parts, held_out, ridge))


def head_shapley_of_owners(
    parts: Sequence[Moments], held_out: Moments, ridge: float, owners: Sequence[Sequence[int]]
) -> Vector:
    """Returns shares, shape ``n``, where the sites of one owner are one player; within a player shares follow numbers of rows.

    Moments add, so an owner's player is the same however it divides its rows among sites: dividing gains exactly nothing,
    for it or for anybody. What all get together is unchanged.

    Args:
        owners: groups of site indices, each site in one of them.

    Raises:
        PlanRefused, ProtocolError: as :func:`head_worth`, but for the number of owners; bad_moments: a site is in no group or in two.
    """
    players = head_shapley([together([parts[i] for i in group]) for group in grouped(owners, len(parts))], held_out, ridge)
    return dealt(players, [m.n for m in parts], owners)


def grouped(owners: Sequence[Sequence[int]], n: int) -> Sequence[Sequence[int]]:
    """Returns ``owners`` once they are groups of ``n`` sites, each site in one of them.

    Raises:
        ProtocolError: bad_moments: they are not.
    """
    if sorted(i for group in owners for i in group) != list(range(n)) or not all(owners):
        raise ProtocolError("bad_moments", f"the groups must name every one of {n} sites exactly once")
    return owners


def together(parts: Sequence[Moments]) -> Moments:
    """Returns the moments of all rows of ``parts``, at least one."""
    first, *others = parts
    for m in others:
        first = Moments(
            first.n + m.n, first.features + m.features, first.products + m.products, first.square + m.square
        )  # fmt: skip
    return first


def dealt(players: Vector, rows: Sequence[int], owners: Sequence[Sequence[int]]) -> Vector:
    """Returns each site's part of its player's number, shape ``n``, by numbers of rows; equal parts where there are none."""
    out = np.empty(len(rows))
    for value, group in zip(players, owners, strict=True):
        total = sum(rows[i] for i in group)
        for i in group:
            out[i] = value * (rows[i] / total if total else 1.0 / len(group))
    return out


def head_shapley_sampled(
    parts: Sequence[Moments], held_out: Moments, ridge: float, *, rng: np.random.Generator, permutations: int = 400
) -> Estimate:
    """Estimates :func:`head_shapley` for any number of sites; ``rng`` and ``permutations`` as in :func:`gram_shapley_sampled`.

    Raises:
        PlanRefused, ProtocolError: as :func:`head_worth`, but for the number of sites.
        ValueError: too few permutations.
    """
    features, products = _stacked(parts, held_out, ridge)

    def gains(order: NDArray[np.int64]) -> Vector:
        worth = _head_worth(np.cumsum(features[order], axis=0), np.cumsum(products[order], axis=0), held_out, ridge)
        out = np.empty(len(order))
        out[order] = np.diff(worth, prepend=0.0)
        return out

    return _sampled(len(parts), gains, rng, permutations)


def _stacked(parts: Sequence[Moments], held_out: Moments, ridge: float) -> tuple[Matrix, Matrix]:
    p = len(held_out.products)
    if not parts or any(len(m.products) != p for m in parts) or held_out.n < 1:
        raise ProtocolError("bad_moments", f"expected the moments of at least one site over {p} features, and held-out rows")
    if not (math.isfinite(ridge) and ridge > 0):
        raise PlanRefused(
            f"settlement with a ridge of {ridge}: one site's rows may not determine a solution", fix="set it above 0"
        )
    return np.stack([m.features for m in parts]), np.stack([m.products for m in parts])


def _head_worth(total: Matrix, products: Matrix, held_out: Moments, ridge: float) -> Vector:
    regular = total + ridge * np.eye(products.shape[1])
    try:
        np.linalg.cholesky(regular)
    except np.linalg.LinAlgError:
        raise PlanRefused(
            f"settlement with a ridge of {ridge:g}: it is too small for the noise in the moments, a coalition's have no solution",
            fix="set it to at least 2 sigma sqrt(p n sites), see noise_scale",
        ) from None
    beta = np.linalg.solve(regular, products[..., None])[..., 0]
    error = np.einsum("sp,pq,sq->s", beta, held_out.features, beta)
    return np.asarray((2.0 * beta @ held_out.products - error) / held_out.n, dtype=np.float64)


# --- moments that may leave a site ---------------------------------------------------------------------------------


def noise_scale(epsilon: float, delta: float) -> float:
    """Returns the least standard deviation of Gaussian noise, in units of the sensitivity, for one release.

    The condition ``Phi(1/2s - eps s) - e^eps Phi(-1/2s - eps s) <= delta`` is exact [Balle, Wang, theorem 8]; the root is
    taken from above.

    Raises:
        PlanRefused: epsilon is not above 0, or delta not between 0 and 1.
    """
    from scipy.special import log_ndtr

    if not (math.isfinite(epsilon) and epsilon > 0 and 0 < delta < 1):
        raise PlanRefused(f"epsilon {epsilon} and delta {delta}", fix="epsilon above 0, delta between 0 and 1")

    def leak(s: float) -> float:
        first, second = float(log_ndtr(0.5 / s - epsilon * s)), epsilon + float(log_ndtr(-0.5 / s - epsilon * s))
        return math.exp(first) - math.exp(second)

    low, high = 1e-6, 1.0
    while leak(high) > delta:
        high *= 2.0
    for _ in range(100):  # the leak falls with s; ``high`` always keeps delta
        middle = 0.5 * (low + high)
        low, high = (low, middle) if leak(middle) <= delta else (middle, high)
    return high * (1.0 + 1e-9)  # floats in ``leak``


def noisy(parts: Moments, bounds: Bounds, epsilon: float, delta: float, *, noise: Noise | None = None) -> Moments:
    """Returns moments with Gaussian noise: they may go to whoever settles, the Auditor.

    What is claimed: (epsilon, delta)-differential privacy of this one release of (features, products, square) under
    replacing one row of the site by any other within ``bounds``, the number of rows being public. It holds for a feature
    map that does not depend on the site's rows; a network trained on them without privacy voids it. Each further release,
    also of another task over the same rows, adds to it. Noise is drawn in floats: see ``fedmat.privacy.mechanisms``.

    How: in units of the bounds a row is ``u = (phi / R, y / Y)`` with ``|u|^2 <= 2``, the moments are ``sum u u'``, and replacing
    a row changes them by ``|u u' - v v'|_F <= sqrt(|u|^4 + |v|^4) <= 2 sqrt(2)``. Noise is spherical in the Frobenius norm:
    standard deviation ``s`` on the diagonal and ``s / sqrt(2)`` on each pair beside it, ``s = 2 sqrt(2) noise_scale``.

    The result need not be positive; it is left so, because sums of it stay without bias. The ridge has to cover it.

    Args:
        parts: of rows clipped to ``bounds`` (:func:`moments` does it).
        noise: for tests; by default fresh from the operating system.

    Raises:
        PlanRefused: epsilon or delta is out of range.
        ProtocolError: bad_moments: the moments cannot come from rows within the bounds.
    """
    over = 1.0 + 1e-9  # rounding of sums
    if np.trace(parts.features) > parts.n * bounds.phi**2 * over or parts.square > parts.n * bounds.y**2 * over:
        raise ProtocolError(
            "bad_moments", "rows pass the stated bounds, and the noise would not cover them", fix="use moments(phi, y, bounds)"
        )
    scale = 2.0 * math.sqrt(2.0) * noise_scale(epsilon, delta)
    p = len(parts.products)
    drawn = (noise or Noise()).normal(p + 1, p + 1)
    symmetric = 0.5 * scale * (drawn + drawn.T)  # variance s^2 on the diagonal, s^2 / 2 beside it
    units = np.append(np.full(p, bounds.phi), bounds.y)
    added = symmetric * np.outer(units, units)
    return Moments(
        parts.n, parts.features + added[:p, :p], parts.products + added[:p, p], parts.square + float(added[p, p])
    )  # fmt: skip


# --- flags ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flag:
    """Something a person should look at; never a verdict.

    Attributes:
        kind: what it looks like.
        sites: whom it concerns.
        words: what was seen, with the numbers.
    """

    kind: Literal["near_duplicate", "no_movement", "replay"]
    sites: tuple[str, ...]
    words: str


def flags(
    gram: Sequence[Sequence[int | float]],
    names: Sequence[str],
    *,
    previous: Sequence[int | float] | None = None,
    previous_square: int | float = 0,
) -> tuple[Flag, ...]:
    """Returns what a round's inner products show of copies and free riders, in site order.

    Near duplicates: a cosine at least 0.3 and six median absolute deviations above the median of all pairs. Two sites that
    measure the same materials look the same as two that share a file. No movement: a norm below 1 % of the median one.
    Replay: a cosine above 0.9 with the aggregate before, and as far above the others' as for duplicates.

    Args:
        gram: ``n x n`` inner products of the updates; sums over rounds of their cosines serve as well and tell more.
        names: of the sites, shape ``n``.
        previous: shape ``n``, product of each update with the aggregate of the round before, where it is known.
        previous_square: that aggregate's square.

    Raises:
        ProtocolError: bad_gram: shapes differ.
    """
    n = len(names)
    if len(gram) != n or any(len(row) != n for row in gram) or (previous is not None and len(previous) != n):
        raise ProtocolError("bad_gram", f"inner products that are not those of {n} sites")
    norms = [math.sqrt(max(0.0, float(gram[i][i]))) for i in range(n)]
    middle = median(norms) if n else 0.0
    still = [i for i in range(n) if norms[i] <= _MOVES * middle]
    out = [
        Flag("no_movement", (names[i],), f"its update is {100 * norms[i] / middle:.2g} % as long as the median one")
        if middle
        else Flag("no_movement", (names[i],), "its update is zero, as most are")
        for i in still
    ]
    moving = [i for i in range(n) if i not in still]
    pairs = {(i, j): float(gram[i][j]) / (norms[i] * norms[j]) for i in moving for j in moving if i < j}
    for (i, j), cosine in _standing_out(pairs, floor=0.0):
        out.append(
            Flag(
                "near_duplicate", (names[i], names[j]),
                f"their updates have a cosine of {cosine:.2f}, the median of all pairs is {median(pairs.values()):.2f}",
            )
        )  # fmt: skip
    if previous is not None and previous_square > 0:
        along = {(i, i): float(previous[i]) / (norms[i] * math.sqrt(float(previous_square))) for i in moving}
        for (i, _), cosine in _standing_out(along, floor=_REPLAYS):
            out.append(
                Flag(
                    "replay", (names[i],),
                    f"its update has a cosine of {cosine:.2f} with the aggregate before, the median of all is {median(along.values()):.2f}",
                )
            )  # fmt: skip
    return tuple(out)


def _standing_out(cosines: dict[tuple[int, int], float], floor: float) -> list[tuple[tuple[int, int], float]]:
    if len(cosines) < 3:  # nothing to stand out from
        return []
    middle = median(cosines.values())
    spread = median(abs(c - middle) for c in cosines.values())
    least = max(floor, middle + max(_ABOVE, _DEVIATIONS * spread))
    return [(key, c) for key, c in cosines.items() if c >= least]


# --- credits -------------------------------------------------------------------------------------------------------


def credits(shares: Sequence[float], total: int) -> tuple[int, ...]:
    """Returns whole credits in proportion to shares, by largest remainders; they sum to ``total`` exactly.

    A negative share gets 0: a credit is never taken back here, and the others' credits are not raised by it above their
    proportion of what is positive. Ties go to the site that stands first.

    Raises:
        ValueError: ``total`` is negative, or a share is not finite.
        NotEvidenced: credits are to be given and no share is positive.
    """
    if total < 0 or not all(math.isfinite(s) for s in shares):
        raise ValueError("total must be at least 0, and shares finite")
    if total == 0:
        return (0,) * len(shares)
    positive = [Fraction(max(0.0, float(s))) for s in shares]  # exact: no rounding decides who gets the last credit
    together = sum(positive)
    if not together:
        raise NotEvidenced(f"{total} credits and no site with a positive share", fix="give none for this period")
    due = [p * total / together for p in positive]
    out = [math.floor(d) for d in due]
    first = sorted(range(len(due)), key=lambda i: (out[i] - due[i], i))
    for i in first[: total - sum(out)]:
        out[i] += 1
    return tuple(out)


def credited(
    shares: Sequence[float], errors: Sequence[float], total: int, together: Sequence[Sequence[int]] = ()
) -> tuple[int | None, ...]:
    """Returns whole credits out of ``total``; None for everyone where noise alone could have made the shares.

    That is: where the gain is below two standard errors, the errors of players' shares taken as independent, or no share is positive.

    Args:
        errors: standard errors, shape ``n``.
        together: groups of more than one site that are one player: parts of one error.

    Raises:
        ValueError: ``total`` is negative, or a share is not finite.
    """
    joint = [math.fsum(errors[i] for i in group) for group in together]
    alone = [e for i, e in enumerate(errors) if not any(i in group for group in together)]
    try:
        if math.fsum(shares) < 2.0 * math.hypot(*joint, *alone):
            raise NotEvidenced("the gain is within what noise makes")
        return credits(shares, total)
    except NotEvidenced:  # no reason for equal credits either
        return (None,) * len(shares)
