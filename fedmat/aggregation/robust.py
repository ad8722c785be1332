"""Rules that withstand hostile sites: from what updates look like beside each other to a weight for every site.

Knows: the Gram matrix of quantised updates (all inner products, as integers), each site's base weight, and, in the clear,
the updates themselves. Refuses to know: sites' data, messages, who is who.

Most rules need inner products only: turning all updates together in space turns the result with them, so the result is
``sum_i c_i x_i`` with weights ``c`` that follow from the Gram matrix. That is what lets them run on encrypted updates,
where three parties work out ``c``, each for itself, and must agree bit for bit on any machine. Therefore everything that
decides here is a whole number: distances are ``G_ii + G_jj - 2 G_ij``, weights of an iteration are 30-bit fixed point,
roots are ``math.isqrt``. Ties go to the site that stands first. Floats occur in the words of a reason only, where they are
quotients and square roots that IEEE 754 rounds the same way everywhere.

Every rule counts sites, one voice each, when it decides who is believed; base weights then say how much each counts. Only
the geometric median, centred clipping and the median of coordinates use base weights throughout, and refuse to where the
``f`` heaviest sites would hold half of them.

``docs/rules.md`` says what each rule withstands, as measured.

References:
    Blanchard et al., "Machine Learning with Adversaries", NeurIPS 2017 (Krum, Multi-Krum; n >= 2f + 3).
    Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018 (median and trimmed mean of coordinates; n > 2f).
    Karimireddy et al., "Learning from History for Byzantine Robust Optimization", ICML 2021 (centred clipping).
    Pillutla et al., "Robust Aggregation for Federated Learning", IEEE TSP 2022 (smoothed Weiszfeld iterations).
    Allouah et al., "Fixing by Mixing", AISTATS 2023 (nearest-neighbour mixing).
    Xie et al., "Zeno", ICML 2019 (judging updates by their gain on a few trusted rows, in place of distances).
    He, Karimireddy, Jaggi, "Secure Byzantine-Robust Machine Learning", 2020 (rules from distances alone).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from fedmat.config import RuleSpec
from fedmat.envelopes import MOST_OVER_MEAN, MOST_WEIGHT
from fedmat.errors import PlanRefused, ProtocolError
from fedmat.weights import Vector

Gram = Sequence[Sequence[int]]

WEIGHT_BOUND = MOST_WEIGHT
SCALE = 1 << 10  # of weights that are no whole numbers by themselves
MIN_SELECTED = 4  # fewer updates are not opened as a sum: a member would see the sum of two others
CLEAR_ONLY = frozenset({"coordinate_median", "trimmed_mean"})
GRAM_RULES = frozenset(
    {
        "mean",
        "krum",
        "multi_krum",
        "nearest_neighbour_mixing",
        "geometric_median",
        "centred_clipping",
        "veto_multi_krum",
    }
)
_KRUM = frozenset({"krum", "multi_krum", "veto_multi_krum"})
_HALF = frozenset({"geometric_median", "centred_clipping", "coordinate_median"})  # break at half of the base weight

_ONE = 1 << 30  # of the fixed point in which iterated weights are kept
_WEISZFELD = 48  # iterations; weights move by less than 1/1024 after about 20
_CLIPPING = 12
_JUDGED_BITS = 20  # a median update's norm, in units of the judged copy
_FARTHEST = 1 << 20  # in median norms: longer updates are judged as if they were this long, which is far enough
_LONG = 4  # median norms: a longer update is vetoed for its length
_ALIKE = 64  # two updates repeat each other where they are an eighth as far apart as two usually are, or less
_LIMB = 21  # bits; products of two limbs may be added 2^21 times in 64 bits


@dataclass(frozen=True)
class Choice:
    """What a rule made of one round's updates.

    Attributes:
        weights: integer weight of every update, in the order given; 0: left out. Their sum is at most ``WEIGHT_BOUND``.
        reasons: index -> why it was left out or counts for less than its base weight, in words, with the numbers that decided.
    """

    weights: tuple[int, ...]
    reasons: dict[int, str] = field(default_factory=dict)


# --- conditions ----------------------------------------------------------------------------------------------------


def refuse(rule: RuleSpec, n: int, base: Sequence[int] | None = None) -> None:
    """Refuses a rule where its condition of breakdown is violated.

    Args:
        n: number of updates.
        base: their base weights, where they are known already.

    Raises:
        PlanRefused: too few sites for ``rule.hostile`` hostile ones, a rule that withstands nobody, or base weights that
            give ``rule.hostile`` sites the majority.
    """
    f, name = rule.hostile, rule.name
    if name == "mean":
        if f:
            raise PlanRefused(
                f"plan.rule: mean with hostile: {f} withstands nobody: one site moves a mean wherever it likes",
                fix="use plan.rule.name: veto_multi_krum (or another rule of docs/rules.md), or hostile: 0",
            )
        if n < 1:
            raise PlanRefused("plan.rule: mean of no updates", fix="raise plan.quorum to at least 1")
        return
    if name in _KRUM:
        least, most, condition = 2 * f + 3, (n - 3) // 2, "n >= 2 f + 3"
    elif name == "nearest_neighbour_mixing" and f:  # with 3 updates Krum would have no neighbour to look at
        least, most, condition = max(4, 2 * f + 1), (n - 1) // 2 if n > 3 else 0, "n > 2 f and n >= 4"
    else:
        least, most, condition = 2 * f + 1, (n - 1) // 2, "n > 2 f"
    if n < least:
        ways = [f"raise plan.quorum to at least {least}"]
        if 0 <= most < f:
            ways.append(f"lower plan.rule.hostile to at most {most}")
        if name in _KRUM and n > 2 * f:
            ways.append("use plan.rule.name: geometric_median, which needs n > 2 f")
        raise PlanRefused(
            f"plan.rule: {name} with hostile: {f} and {n} updates: it needs {condition}, that is {least} of them",
            fix=", or ".join(ways),
        )
    if base is not None and f and name in _HALF and 2 * sum(sorted(base)[-f:]) >= sum(base):
        raise PlanRefused(
            f"plan.rule: {name} with hostile: {f}: the {f} heaviest sites hold half of the weight or more, and could decide alone",
            fix="use plan.site_weights: equal, or lower plan.max_weight_share",
        )


def selected(rule: RuleSpec, n: int) -> int:
    """Returns the least number of sites that the rule gives weight to, out of ``n``: the floor under what a sum shows.

    Raises:
        PlanRefused: as :func:`refuse`.
    """
    refuse(rule, n)
    if rule.name in ("mean", *CLEAR_ONLY):
        return n
    if rule.name == "krum":
        return 1
    return _kept(n, rule.hostile) if rule.name == "veto_multi_krum" else n - rule.hostile


def _kept(n: int, f: int) -> int:
    """Least number of sites a veto leaves: ``f`` may be vetoed wrongly beside ``f`` rightly, and three honest ones are hidden."""
    return max(n - 2 * f, f + 3)


# --- choosing ------------------------------------------------------------------------------------------------------


def choose(rule: RuleSpec, gram: Gram, base: Sequence[int], scores: Sequence[int] | None = None) -> Choice:
    """Returns the weights by which updates are added, from their inner products alone.

    Args:
        gram: ``n x n``, symmetric: exact inner products of the quantised updates.
        base: shape ``n``, at least 1 each, at most ``WEIGHT_BOUND`` together: what each site's attested rows are worth.
        scores: shape ``n``, veto only: predicted gain of each update on the consortium's reference rows, to first order, in
            any unit; below 0: vetoed. Without them the updates vote on each other.

    Raises:
        PlanRefused: the rule's condition is violated, or it needs more than inner products.
        ProtocolError: bad_gram, bad_weights or bad_scores: the arguments do not fit together.
    """
    if rule.name in CLEAR_ONLY:
        raise PlanRefused(
            f"plan.rule: {rule.name} needs every coordinate of every update, and only inner products are known",
            fix=f"use one of {', '.join(sorted(GRAM_RULES))}, or security.mode: none",
        )
    g, b, s = _checked(gram, base, scores)
    refuse(rule, len(b), b)
    f = rule.hostile
    if rule.name == "mean":
        found = Choice(tuple(b))
    elif rule.name == "krum":
        found = _multi_krum(g, b, f, keep=1)
    elif rule.name == "multi_krum":
        found = _multi_krum(g, b, f, keep=len(b) - f)
    elif rule.name == "nearest_neighbour_mixing":
        found = _mixing(g, b, f)
    elif rule.name == "geometric_median":
        found = _iterated(g, b, f, _weiszfeld(g, b), "geometric median")
    elif rule.name == "centred_clipping":
        found = _iterated(g, b, f, _clipping(g, b, rule.radius), "clipped centre")
    else:
        found = _veto(g, b, f, s)
    return _levelled(found)


def _checked(
    gram: Gram, base: Sequence[int], scores: Sequence[int] | None
) -> tuple[list[list[int]], list[int], list[int] | None]:
    n = len(base)
    try:
        g = [[operator.index(v) for v in row] for row in gram]
        b = [operator.index(v) for v in base]
        s = None if scores is None else [operator.index(v) for v in scores]
    except TypeError:
        raise ProtocolError("bad_gram", "inner products, base weights and scores must be whole numbers") from None
    if len(g) != n or any(len(row) != n for row in g):
        raise ProtocolError("bad_gram", f"expected {n} rows of {n} inner products, one for each base weight")
    if any(g[i][i] < 0 or g[i][j] != g[j][i] for i in range(n) for j in range(i)) or (n and g[0][0] < 0):
        raise ProtocolError("bad_gram", "inner products of vectors are symmetric, and no square is negative")
    if any(v < 1 for v in b) or sum(b) > WEIGHT_BOUND:
        raise ProtocolError("bad_weights", f"base weights must be at least 1 and at most {WEIGHT_BOUND} in total")
    if s is not None and len(s) != n:
        raise ProtocolError("bad_scores", f"{len(s)} scores for {n} updates")
    return g, b, s


def _levelled(choice: Choice) -> Choice:
    """Lowers weights above ``MOST_OVER_MEAN`` mean weights: otherwise a sum would show one site's update."""
    weights, reasons = list(choice.weights), dict(choice.reasons)
    counted = sum(1 for w in weights if w)
    while max(weights) * counted > MOST_OVER_MEAN * sum(weights):
        most = MOST_OVER_MEAN * sum(weights) // counted
        for i, w in enumerate(weights):
            if w > most:
                weights[i] = most
                reasons[i] = f"counts for less: no site may weigh more than {MOST_OVER_MEAN} times the mean of those that count"
    return Choice(tuple(weights), reasons)


# --- Krum ----------------------------------------------------------------------------------------------------------


def _distances(g: Gram) -> list[list[int]]:
    """Squared distances, exact; a Gram matrix that belongs to no vectors could make them negative, which means nothing."""
    n = len(g)
    return [[max(0, g[i][i] + g[j][j] - 2 * g[i][j]) for j in range(n)] for i in range(n)]


def _krum_scores(g: Gram, f: int) -> list[int]:
    """Returns each update's sum of squared distances to its ``n - f - 2`` nearest others [Blanchard et al., section 4]."""
    n = len(g)
    near = max(0, n - f - 2)  # 0 only with fewer than 3 updates, none of them hostile
    return [sum(sorted(d for j, d in enumerate(row) if j != i)[:near]) for i, row in enumerate(_distances(g))]


def _multi_krum(g: Gram, base: Sequence[int], f: int, keep: int) -> Choice:
    scores = _krum_scores(g, f)
    order = sorted(range(len(base)), key=lambda i: (scores[i], i))
    weights, reasons = [0] * len(base), {}
    for rank, i in enumerate(order, start=1):
        if rank <= keep:
            weights[i] = base[i]
        else:
            reasons[i] = f"left out: {_rank_in_words(rank, scores, i)}; the first {keep} count"
    return Choice(tuple(weights), reasons)


def _rank_in_words(rank: int, scores: Sequence[int], i: int) -> str:
    middle = sorted(scores)[(len(scores) - 1) // 2]
    times = f"{scores[i] / middle:.2f} times the median" if middle else "the median is 0"
    return f"Krum rank {rank} of {len(scores)}, its squared distances to its nearest others are {times}"


# --- nearest-neighbour mixing --------------------------------------------------------------------------------------


def _mixing(g: Gram, base: Sequence[int], f: int) -> Choice:
    """Multi-Krum among the sums of every update and its nearest others, ``n - f`` in all [Allouah et al., algorithm 2].

    All sums have the same number of terms, so they are compared as they are, in whole numbers.
    """
    n = len(base)
    around = [sorted(range(n), key=lambda j: (row[j], j != i, j))[: n - f] for i, row in enumerate(_distances(g))]
    partial = [[sum(g[k][j] for k in near) for j in range(n)] for near in around]
    mixed = [[sum(row[k] for k in near) for near in around] for row in partial]
    scores = _krum_scores(mixed, f)
    chosen = sorted(range(n), key=lambda i: (scores[i], i))[: n - f]
    voices = [sum(1 for i in chosen if j in around[i]) for j in range(n)]
    weights = _to_scale([b * v for b, v in zip(base, voices, strict=True)])
    reasons = {}
    for j, v in enumerate(voices):
        if v == 0:
            reasons[j] = f"left out: among the {n - f} nearest of none of the {len(chosen)} mixed updates that count"
        elif _lighter(weights, base, j):
            reasons[j] = f"counts for less: among the {n - f} nearest of {v} of the {len(chosen)} mixed updates that count"
    return Choice(weights, reasons)


# --- geometric median and centred clipping -------------------------------------------------------------------------


def _iterated(g: Gram, base: Sequence[int], f: int, w: Sequence[int], centre: str) -> Choice:
    """Rounds fixed-point weights; all but the ``f`` farthest from the centre count, however little."""
    away = _away(g, w)
    order = sorted(range(len(base)), key=lambda i: (away[i], i))
    rounded = list(_to_scale(w, least=0))
    for i in order[: len(base) - f]:
        rounded[i] = max(1, rounded[i])  # nearer than some honest site: too near to do harm, and a sum needs its crowd
    middle = away[order[(len(order) - 1) // 2]]
    reasons = {}
    for i in range(len(base)):
        if rounded[i] == 0 or _lighter(rounded, base, i):
            what = "counts for less" if rounded[i] else "left out"
            times = f"{away[i] / middle:.2f} times the median distance" if middle else "farther than the median, which is 0,"
            reasons[i] = f"{what}: {times} from the {centre}"
    return Choice(tuple(rounded), reasons)


def _away(g: Gram, w: Sequence[int]) -> list[int]:
    """Returns ``|x_i - sum_j w_j x_j|`` in units of ``1 / sum(w)``, rounded down: exact squares, then a whole root."""
    n, one = len(w), sum(w)
    rows = [sum(w[j] * g[i][j] for j in range(n)) for i in range(n)]
    square = sum(w[i] * rows[i] for i in range(n))
    return [math.isqrt(max(0, one * one * g[i][i] - 2 * one * rows[i] + square)) for i in range(n)]


def _fixed(parts: Sequence[int]) -> list[int]:
    """Returns parts as fixed-point weights whose sum is ``_ONE`` exactly; the largest takes what rounding left."""
    total = sum(parts)
    w = [p * _ONE // total for p in parts]
    w[max(range(len(w)), key=lambda i: (w[i], -i))] += _ONE - sum(w)
    return w


def _weighted_median(values: Sequence[int], base: Sequence[int]) -> int:
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    reached = accumulate(base[i] for i in order)
    return next(values[i] for i, weight in zip(order, reached, strict=True) if 2 * weight >= sum(base))


def _weiszfeld(g: Gram, base: Sequence[int]) -> list[int]:
    """Returns weights of the smoothed geometric median [Pillutla et al., algorithm 2].

    A distance counts as at least half the median one. Pillutla et al. smooth by a constant; in units of the updates
    themselves nothing has to be tuned, and no site near the centre becomes the whole of it.
    """
    w = _fixed(base)
    for _ in range(_WEISZFELD):
        away = _away(g, w)
        floor = max(1, _weighted_median(away, base) // 2)
        far = max(floor, *away)
        # parts of 2^30 at the farthest, larger nearer: no part becomes 0 by rounding before the last step
        w = _fixed([b * (_ONE * far // max(floor, d)) for b, d in zip(base, away, strict=True)])
    return w


def _clipping(g: Gram, base: Sequence[int], radius: float) -> list[int]:
    """Returns weights of the centre that every update may pull by ``radius`` median distances at most.

    ``v <- v + sum_i p_i (x_i - v) min(1, t / |x_i - v|)`` with base shares ``p`` [Karimireddy et al., equation 3]. The paper
    starts at the aggregate before; here nothing is remembered, and the start is the update nearest to all others.
    """
    n, share = len(base), _fixed(base)
    numerator, denominator = radius.as_integer_ratio()
    near = [sum(b * math.isqrt(d) for b, d in zip(base, row, strict=True)) for row in _distances(g)]
    start = min(range(n), key=lambda i: (near[i], i))
    w = [_ONE if i == start else 0 for i in range(n)]
    for _ in range(_CLIPPING):
        away = _away(g, w)
        reach = max(1, _weighted_median(away, base) * numerator // denominator)
        kept = [_ONE if d <= reach else _ONE * reach // d for d in away]  # min(1, t / |x_i - v|)
        pull = [p * k // _ONE for p, k in zip(share, kept, strict=True)]
        stay = _ONE - sum(pull)
        w = _fixed([v * stay // _ONE + p for v, p in zip(w, pull, strict=True)])
    return w


# --- veto ----------------------------------------------------------------------------------------------------------


def votes(gram: Gram) -> list[Fraction]:
    """Returns what the others' updates say of each: the median of its cosines with them, squared, with its sign.

    Squares of cosines are quotients of whole numbers, so the votes are exact. A zero update points nowhere: its cosines are 0.
    Of an even number of others the lower one of the two in the middle is taken. Lengths do not matter: neither an update made
    small to look central nor one made large to outvote the others gains by it.
    """
    n, out = len(gram), []
    for i in range(n):
        squares = [_signed_square(gram[i][j], gram[i][i] * gram[j][j]) for j in range(n) if j != i]
        out.append(sorted(squares)[(len(squares) - 1) // 2] if squares else Fraction(0))
    return out


def _signed_square(product: int, norms: int) -> Fraction:
    return Fraction(product * abs(product), norms) if norms else Fraction(0)


def _veto(g: Gram, base: Sequence[int], f: int, scores: Sequence[int] | None) -> Choice:
    """Leaves out the far too long, repeats of others, then who is judged badly, then what Multi-Krum leaves of ``f``.

    Two updates from data of their own are never all but the same: who repeats another's gives its site a second voice, and Krum,
    which looks for company, would take both. Of such a pair the later one goes, ``f`` of them at most.

    Who is left out by mistake uses up room, so length comes first: of updates longer than four medians the ``f`` longest go. A
    hostile one that stays is then no longer than four medians or than an honest one, however the others are judged.
    """
    n = len(base)
    middle = sorted(g[i][i] for i in range(n))[(n - 1) // 2]
    longest = sorted((i for i in range(n) if g[i][i] > _LONG * _LONG * middle), key=lambda i: (-g[i][i], -i))[:f]
    judged: Sequence[int] | Sequence[Fraction] = votes(g) if scores is None else scores
    near = _distances(g)
    usual = sorted(near[i][j] for j in range(n) for i in range(j))[n * (n - 1) // 4]
    twins = {j: i for j in range(n) for i in reversed(range(j)) if _ALIKE * near[i][j] <= usual > 0}
    repeats = [j for j in twins if j not in longest][:f]
    bad = sorted((i for i in range(n) if judged[i] < 0 and i not in (*longest, *repeats)), key=lambda i: (judged[i], -i))
    against = [*longest, *repeats, *bad][: n - _kept(n, f)]
    rest = [i for i in range(n) if i not in against]
    f_left = max(0, f - len(against))
    inner = _multi_krum([[g[i][j] for j in rest] for i in rest], [base[i] for i in rest], f_left, len(rest) - f_left)
    weights, reasons = [0] * n, {}
    for at, i in enumerate(rest):
        weights[i] = inner.weights[at]
        if at in inner.reasons:
            reasons[i] = f"{inner.reasons[at]}, after a veto of {len(against)}"
    for i in against:
        if i in longest:
            times = (
                f"{math.sqrt(g[i][i] / middle):.2f} times as long as the median update" if middle else "most updates are zero"
            )
            reasons[i] = f"vetoed: {times}; {_LONG} times is the most"
        elif i in repeats:
            reasons[i] = f"vetoed: repeats the update of number {twins[i] + 1} of {n}"
        elif scores is None:
            cosine = -math.sqrt(-judged[i].numerator / judged[i].denominator)
            reasons[i] = f"vetoed: points away from most others, its median cosine with them is {cosine:.2f}"
        else:
            worse = sum(1 for s in scores if s < scores[i])
            reasons[i] = f"vetoed: predicted to make the reference rows worse, {_ordinal(worse)} of {n}"
    return Choice(tuple(weights), reasons)


def _ordinal(worse: int) -> str:
    return "the worst" if worse == 0 else f"number {worse + 1} from the worst"


# --- whole-number weights ------------------------------------------------------------------------------------------


def _to_scale(parts: Sequence[int], least: int = 1) -> tuple[int, ...]:
    """Returns parts as whole numbers that sum to about ``SCALE``, rounded half up; a part above 0 stays at ``least``."""
    total = sum(parts)
    return tuple(max(least, (2 * SCALE * p + total) // (2 * total)) if p else 0 for p in parts)


def _lighter(weights: Sequence[int], base: Sequence[int], i: int) -> bool:
    """Tells whether a site's share is less than its base share by more than rounding and a tenth."""
    return 10 * (weights[i] + 1) * sum(base) < 9 * base[i] * sum(weights)


# --- in the clear --------------------------------------------------------------------------------------------------


def coordinate_median(deltas: NDArray[np.float64], base: Sequence[int]) -> Vector:
    """Returns the weighted median of every coordinate, shape ``d``; where half the weight lies on each side, the middle.

    Args:
        deltas: ``n x d``.
        base: shape ``n``, positive.

    Raises:
        ProtocolError: non_finite, or bad_weights.
    """
    x = _finite(deltas)
    b = np.asarray(base, dtype=np.int64)
    if len(b) != len(x) or (b < 1).any():
        raise ProtocolError("bad_weights", f"{len(b)} base weights for {len(x)} updates, expected one each, at least 1")
    order = np.argsort(x, axis=0, kind="stable")
    ranked = np.take_along_axis(x, order, axis=0)
    reached = 2 * np.cumsum(b[order], axis=0)
    total = int(b.sum())
    low = np.argmax(reached >= total, axis=0)
    high = np.argmax(reached > total, axis=0)
    columns = np.arange(x.shape[1])
    return np.asarray(0.5 * ranked[low, columns] + 0.5 * ranked[high, columns], dtype=np.float64)


def trimmed_mean(deltas: NDArray[np.float64], trim: int) -> Vector:
    """Returns the mean of every coordinate without its ``trim`` largest and smallest values, shape ``d``.

    Sites count equally: what is left of a coordinate belongs to other sites than what is left of the next.

    Args:
        deltas: ``n x d``.

    Raises:
        PlanRefused: unless ``n > 2 * trim``.
        ProtocolError: non_finite.
    """
    x = _finite(deltas)
    refuse(RuleSpec(name="trimmed_mean", hostile=trim), len(x))
    kept = np.sort(x, axis=0)[trim : len(x) - trim]
    total = np.zeros(x.shape[1])
    for row in kept:  # in order: the same sum everywhere
        total += row
    return total / len(kept)


def choose_clear(
    rule: RuleSpec, deltas: NDArray[np.float64], base: Sequence[int], scores: Sequence[int] | None = None
) -> tuple[Vector, Choice]:
    """Returns the joined update, shape ``d``, and how it came about; for updates that the coordinator may see.

    Rules that need inner products only go through :func:`choose` as they do encrypted, on updates quantised for the
    judgement; what is added up are the updates themselves, in float64, in the order given.

    Args:
        deltas: ``n x d``.
        base, scores: as in :func:`choose`.

    Raises:
        PlanRefused, ProtocolError: as :func:`choose`; non_finite where an update holds NaN or infinity.
    """
    x = _finite(deltas)
    refuse(rule, len(x), base)
    if rule.name == "coordinate_median":
        return coordinate_median(x, base), Choice(tuple(base))
    if rule.name == "trimmed_mean":
        return trimmed_mean(x, rule.hostile), Choice((1,) * len(x))
    choice = choose(rule, exact_gram(x), base, scores)
    total = np.zeros(x.shape[1])
    for row, weight in zip(x, choice.weights, strict=True):
        if weight:  # not 0 * row: what is left out does not touch the sum
            total += weight * row
    return total / sum(choice.weights), choice


def exact_gram(deltas: NDArray[np.float64]) -> list[list[int]]:
    """Returns exact inner products of updates rounded to whole numbers, ``n x d`` to ``n x n``.

    The unit is a power of two that makes the median norm about ``2**20``: one huge update must not round all others to
    nothing. An update of more than ``2**20`` median norms is shortened to that for the judgement: it is farthest either way.

    Raises:
        ProtocolError: non_finite.
    """
    x = _finite(deltas)
    n = len(x)
    norms = [_norm(row) for row in x]
    positive = sorted(v for v in norms if v > 0)
    middle = sorted(norms)[(n - 1) // 2] if n else 0.0
    unit = middle if middle > 0 else (positive[-1] if positive else 1.0)
    if not all(math.isfinite(v) for v in norms):
        raise ProtocolError("non_finite", "an update is so long that its length is no number", fix="lower plan.max_update_norm")
    exponent = _JUDGED_BITS - math.frexp(unit)[1]
    quantised = np.zeros(x.shape, dtype=np.int64)
    for i, row in enumerate(x):
        shortened = row if norms[i] <= _FARTHEST * unit else row / norms[i] * (_FARTHEST * unit)
        quantised[i] = np.rint(np.ldexp(shortened, exponent)).astype(np.int64)
    high, low = quantised >> _LIMB, quantised & ((1 << _LIMB) - 1)  # quantised = high * 2^21 + low, low never negative
    gram = [[0] * n for _ in range(n)]
    for i in range(n):
        for j in range(i + 1):
            crossed = _dot(high[i], low[j]) + _dot(low[i], high[j])
            gram[i][j] = gram[j][i] = (_dot(high[i], high[j]) << (2 * _LIMB)) + (crossed << _LIMB) + _dot(low[i], low[j])
    return gram


def _dot(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    return sum(int(np.dot(a[at : at + (1 << 20)], b[at : at + (1 << 20)])) for at in range(0, len(a), 1 << 20))


def _norm(row: Vector) -> float:
    peak = float(np.abs(row).max(initial=0.0))
    # by its largest number first: the square of a very large or small one would overflow or vanish
    return peak * math.sqrt(float(np.square(row / peak).sum())) if peak else 0.0


def _finite(deltas: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.asarray(deltas, dtype=np.float64)
    if x.ndim != 2:
        raise ProtocolError("bad_shape", f"updates have shape {x.shape}, expected one row per site")
    if not np.isfinite(x).all():
        raise ProtocolError("non_finite", "an update holds NaN or infinity", fix="reject it before the rule sees it")
    return x
