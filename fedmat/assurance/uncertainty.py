"""How wide an interval must be to keep its promise: federated conformal quantiles from sketches, coverage and ranking.

Knows: conformity scores at a site, counts of scores everywhere else. Refuses to know: records, models and messages.

A *score* is ``|y - prediction| / y_scale`` of a row the model has not learnt from, zero or more; divided by a row's
:func:`difficulty` it makes intervals that are wider where the model is less sure (the interval's half-width is then
``quantile * y_scale * difficulty``). A site sends one vector, the count of its scores in the public :data:`GRID`; no score,
no row and no order of rows is in it.

**The promise.** With calibration scores and the new score exchangeable, the interval holds at least the share ``level`` of new
rows, whatever the model (Vovk 2005, Lei 2018). Every step here rounds to the wide side: a score counts at the *upper* edge of
its bin, and where there are too few scores for a level the quantile is infinite. In a consortium the promise is about the
mixture of sites by their weight (Lu 2023, theorem 4.3); per site see :func:`mondrian`. It is exact for scores of rows the model
never saw (a held-out part). Out-of-fold scores of *other* models than the one that predicts are close in practice, but the
theorem for them promises no more than ``2 * level - 1`` (Barber 2021): measure :func:`coverage` on the test rows and say it.

**Groups.** Rows of one material are not independent, and a material with 500 rows would decide the quantile for all others.
With :func:`group_weights` each group counts one in total and the promise is about a row of a *new* group (Lee 2023, Dunn 2023).
The unit of the counts is then the group, and so is the number that decides whether a level is attainable.

**What a sketch reveals.** The number of calibration rows (or groups) and each absolute error to within 1 %, without saying
which row it belongs to: an extreme error stands out, and who knows all other rows' errors learns the last one. It never reveals
a target or the sign of an error, unless the receiver also knows the row's prediction and features. :func:`coarsen` leaves no
occupied bin below a minimum count and only ever moves counts up, so intervals grow and the promise stays.

References:
    Vovk2003: V. Vovk, D. Lindsay, I. Nouretdinov, A. Gammerman, "Mondrian confidence machine", 2003.
    Vovk2005: V. Vovk, A. Gammerman, G. Shafer, "Algorithmic Learning in a Random World", Springer 2005.
    Vovk2012: V. Vovk, "Conditional validity of inductive conformal predictors", ACML 2012 (coverage given the calibration set).
    Papadopoulos2011: H. Papadopoulos, H. Haralambous, "Reliable prediction intervals with regression neural networks",
    Neural Networks 24 (2011) 842 (scores over difficulty plus a floor).
    Lei2018: J. Lei et al., "Distribution-free predictive inference for regression", JASA 113 (2018) 1094.
    Barber2021: R. F. Barber et al., "Predictive inference with the jackknife+", Ann. Stat. 49 (2021) 486.
    Lu2023: C. Lu et al., "Federated conformal predictors for distributed uncertainty quantification", ICML 2023.
    Humbert2023: P. Humbert et al., "One-shot federated conformal prediction", ICML 2023 (quantile of quantiles; it needs less
    from a site and pays with wider intervals, which is why counts are sent here).
    Lee2023: Y. Lee, R. F. Barber, R. Willett, "Distribution-free inference with hierarchical data", arXiv:2306.06342.
    Dunn2023: R. Dunn, L. Wasserman, A. Ramdas, "Distribution-free prediction sets for two-layer hierarchical models", JASA 2023.
    Korn1998: E. L. Korn, B. I. Graubard, "Confidence intervals for proportions with small expected number of positive counts
    estimated from survey data", Survey Methodology 24 (1998) 193. Wilson: E. B. Wilson, JASA 22 (1927) 209.
    Ilg2018: E. Ilg et al., "Uncertainty estimates and multi-hypotheses networks for optical flow", ECCV 2018 (AUSE).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmat.domain import Array
from fedmat.errors import DataError, PlanRefused, WireError

PER_DECADE = 240  # ratio of neighbouring edges 1.0096: a quantile is at most 1 % too wide
_DECADES = (-4, 4)  # in standard deviations of the target
# Upper edges of the bins: exactly zero, the logarithmic ones (six digits, the same on every machine), everything above.
GRID: Array = np.array(
    [
        0.0,
        *(float(f"{10.0 ** (k / PER_DECADE):.6g}") for k in range(_DECADES[0] * PER_DECADE, _DECADES[1] * PER_DECADE + 1)),
        math.inf,
    ]
)
BINS = len(GRID)
FLOOR = 100  # calibration units for a quantile of one's own: coverage given the calibration set then varies by 3 points at 90 %
# Coarse edges for rankings: 12 per decade from 1e-3 to 1e2.
_COARSE: Array = np.array([0.0, *(float(f"{10.0 ** (k / 12):.6g}") for k in range(-36, 25)), math.inf])
_SLACK = 1e-9  # float rounding of weighted counts, relative; costs at most 1e-9 of coverage
_Z95 = 1.959963984540054


# --- scores at a site ----------------------------------------------------------------------------------------------


def spread(members: Array) -> Array:
    """Returns the standard deviation (``ddof=1``) over an ensemble's predictions, ``n_members x n -> n``.

    Raises:
        PlanRefused: fewer than two members.
        DataError: a prediction is no finite number.
    """
    values = np.asarray(members, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise PlanRefused("an ensemble's spread needs at least two members", fix="train more members, or use plain scores")
    _finite(values, "ensemble prediction")
    out: Array = values.std(axis=0, ddof=1)
    return out


def difficulty(spread: Array, floor: float) -> Array:
    """Returns ``spread + floor``, shape ``n``: what a row's score is divided by and its half-width multiplied by.

    Args:
        spread: of shape ``n``, zero or more, in the unit of ``floor``.
        floor: positive; the larger, the closer to intervals of one width. It keeps a row on which all members agree by
            chance from getting an interval of no width (Papadopoulos2011).
    """
    if not 0 < floor < math.inf:
        raise PlanRefused("the floor of the difficulty must be a positive number", fix="for example 0.1 standard deviations")
    return _nonnegative(spread, "spread") + floor


def group_weights(group: NDArray[np.int64]) -> Array:
    """Returns ``1 / rows of the same group`` for every row, shape ``n``: each group counts one (Lee2023)."""
    _, code = np.unique(group, return_inverse=True)
    out: Array = 1.0 / np.bincount(code)[code]
    return out


def sketch(scores: Array, weights: Array | None = None) -> Array:
    """Returns how many scores lie in each bin of :data:`GRID`, shape ``bins``; a score counts at its bin's upper edge.

    Args:
        scores: conformity scores, shape ``n``, zero or more.
        weights: what each counts, in ``(0, 1]``, see :func:`group_weights`; one each when not given.

    Raises:
        DataError: a score is NaN, infinite or negative, or a weight is outside its range.
    """
    values = _nonnegative(scores, "conformity score")
    if weights is not None:
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape != values.shape or not ((weights > 0) & (weights <= 1)).all():
            raise DataError("weights of scores must be one number in (0, 1] for each score", fix="use group_weights")
    return np.bincount(np.searchsorted(GRID, values, side="left"), weights=weights, minlength=BINS).astype(np.float64)


def coarsen(sketch: Array, minimum: int) -> Array:
    """Returns ``sketch`` with no occupied bin below ``minimum``: counts move up until a bin holds enough.

    What is left at the top joins the group below it at *its own* place, so every count moves up or stays: quantiles grow,
    never shrink. A site with fewer than ``minimum`` in all moves everything to overflow: it then widens the consortium's
    intervals and tells nothing but its number of scores.
    """
    counts = checked(sketch)
    out = np.zeros(BINS)
    places: list[int] = []
    held = 0.0
    for at in np.flatnonzero(counts):
        held += float(counts[at])
        if held >= minimum * (1.0 - _SLACK):
            out[at] = held
            places.append(int(at))
            held = 0.0
    if held > 0.0:
        below = float(out[places[-1]]) if places else 0.0
        top = int(np.flatnonzero(counts)[-1]) if places else BINS - 1
        if places:
            out[places[-1]] = 0.0
        out[top] = below + held
    return out


# --- sketches at the coordinator -----------------------------------------------------------------------------------


def sound(sketch: Array, at_most: float = math.inf) -> bool:
    """Tells whether another party's bytes are a sketch: its shape, counts of zero or more, no more than it attested rows."""
    good = sketch.shape == (BINS,) and bool(np.isfinite(sketch).all()) and bool((sketch >= 0).all())
    return good and float(sketch.sum()) <= at_most * (1.0 + _SLACK)


def checked(sketch: Array) -> Array:
    """Returns ``sketch`` as float64; raises WireError when it is none."""
    values = np.asarray(sketch, dtype=np.float64)
    if not sound(values):
        raise WireError(f"a score sketch is not {BINS} finite counts of zero or more", fix="compare fedmat versions")
    return values


def merge(sketches: Sequence[Array]) -> Array:
    """Returns the sketch of all sites' scores together, shape ``bins``; the order of sites changes no bit.

    Raises:
        WireError: one of them is no sketch.
    """
    parts = [checked(s) for s in sketches]
    if not parts:
        return np.zeros(BINS)
    stacked = np.stack(parts)
    if (stacked == np.floor(stacked)).all():
        return np.asarray(stacked.sum(axis=0), dtype=np.float64)
    return np.array([math.fsum(column) for column in stacked.T])  # correctly rounded, hence free of order


def quantile(sketch: Array, level: float) -> float:
    """Returns the conformal quantile: the lowest bin edge below which lie ``level * (total + 1)`` counts.

    For counts of one this is the ``ceil((n + 1) * level)``-th smallest score, taken at its bin's upper edge: at most 1 %
    above it. The "+ 1" is the new row, which counts at infinity; for weighted counts it is a new group (Lee2023, eq. 4).

    Returns:
        In units of the score. **Infinite when there are too few counts for the level** (below 19 at 95 %, 9 at 90 %, 4 at
        80 %), or when the quantile lies in the overflow bin: an interval that is not evidenced is the whole line.

    Raises:
        PlanRefused: ``level`` is not inside (0, 1).
    """
    need = _level(level) * (float(checked(sketch).sum()) + 1.0)
    return _at(np.asarray(sketch, dtype=np.float64), need)


def mondrian(sketches: Mapping[str, Array], level: float, floor: int = FLOOR) -> dict[str, float]:
    """Returns each site's quantile: its own where it has enough scores, never less than the consortium's where not.

    *At least* ``floor`` counts: the conformal quantile of the site's own scores, with the promise for that site alone
    (Vovk2003). ``floor`` is not about validity but about luck: given the calibration set, coverage follows
    ``Beta(k, n + 1 - k)`` (Vovk2012), with a standard deviation of 3 points for n = 100 at 90 % and 9 points for n = 10.

    *Fewer*: the larger of two quantiles, so that shrinking never narrows an interval. One is the consortium's. The other is of
    the site's own counts filled up to ``floor`` with scores drawn as in the whole consortium: it is wider when the few scores
    there are say that this site is harder than most. An easy site pays for its few rows with the consortium's width. The
    promise is then the consortium's (on the mixture of sites), not one for that site.

    Args:
        sketches: by site, all with or all without group weights.
        floor: counts (groups, when weighted) from which a site stands alone.

    Raises:
        PlanRefused: ``floor`` counts are too few for ``level``.
        WireError: one is no sketch.
    """
    if floor < math.ceil(_level(level) / (1.0 - level) - _SLACK):
        raise PlanRefused(
            f"mondrian: {floor} scores cannot evidence {level:.0%} intervals",
            fix=f"set the floor to {math.ceil(level / (1.0 - level) - _SLACK)} or more",
        )
    parts = {site: checked(sketches[site]) for site in sorted(sketches)}
    everyone = merge(list(parts.values()))
    total, common = float(everyone.sum()), quantile(everyone, level)
    out: dict[str, float] = {}
    for site, own in parts.items():
        n = float(own.sum())
        if n >= floor * (1.0 - _SLACK):
            out[site] = quantile(own, level)
        elif total > 0:
            filled = own + (floor - n) * everyone / total
            out[site] = max(common, _at(filled, level * (floor + 1.0)))
        else:
            out[site] = math.inf
    return out


def _at(counts: Array, need: float) -> float:
    reached = np.cumsum(counts) >= need * (1.0 - _SLACK)
    return float(GRID[int(np.argmax(reached))]) if reached.any() else math.inf


def _level(level: float) -> float:
    if not 0.0 < level < 1.0:
        raise PlanRefused("a coverage level must lie inside (0, 1)", fix="for example 0.9")
    return level


# --- what was promised against what is ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coverage:
    """How many of the rows lay inside their intervals.

    Attributes:
        n, covered: rows, and rows inside (ends included).
        n_groups: independent units among the rows.
        share: ``covered / n``.
        low, high: 95 % interval of the share, see :func:`coverage`.
        mean_width: mean of ``high - low`` of the intervals in the target's unit; infinite when one of them is.
    """

    n: int
    covered: int
    n_groups: int
    share: float
    low: float
    high: float
    mean_width: float


def coverage(truth: Array, low: Array, high: Array, group: NDArray[np.int64] | None = None) -> Coverage:
    """Returns the share of ``truth`` inside ``[low, high]``, with an interval that knows of groups.

    Rows of one group are covered or missed together. The share's variance is therefore taken between groups (the linearised
    ratio estimator); it gives the design effect, the effective number of rows ``n / deff``, corrected for few groups
    by ``(z / t)^2`` (Korn1998), and Wilson's interval at that number. Unlike a bootstrap it needs no random stream and does not
    collapse to a point when every row is covered: the effective number is then the number of groups.

    Args:
        truth, low, high: shape ``n``, one unit; ``low`` and ``high`` may be infinite.
        group: integer codes, shape ``n``; every row stands alone when not given.

    Raises:
        DataError: nothing to score, shapes differ, a NaN, or an interval that ends before it begins.
    """
    truth, low, high = (np.asarray(a, dtype=np.float64) for a in (truth, low, high))
    if not len(truth) or not truth.shape == low.shape == high.shape:
        raise DataError("coverage needs truths and interval ends of one shape, at least one row")
    _finite(truth, "truth")
    if not (low <= high).all():
        raise DataError(f"{int((~(low <= high)).sum())} interval(s) end before they begin, or are NaN")
    inside = ((low <= truth) & (truth <= high)).astype(np.float64)
    n = len(truth)
    _, code = np.unique(np.arange(n) if group is None else group, return_inverse=True)
    sums, sizes = np.bincount(code, weights=inside), np.bincount(code).astype(np.float64)
    share, n_groups = float(inside.mean()), len(sizes)
    effective = float(n_groups)
    if n_groups < n and n_groups > 1 and 0.0 < share < 1.0:
        variance = n_groups / (n_groups - 1) * float(np.square(sums - share * sizes).sum()) / n**2
        effective = min(float(n), share * (1.0 - share) / variance) if variance > 0 else float(n_groups)
        effective = max(1.0, effective * (_Z95 / _t95(n_groups - 1)) ** 2)
    bottom, top = _wilson(share, effective)
    return Coverage(n, int(inside.sum()), n_groups, share, bottom, top, float((high - low).mean()))


def _wilson(share: float, n: float) -> tuple[float, float]:
    z2 = _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return (0.0 if share == 0.0 else max(0.0, centre - half)), (1.0 if share == 1.0 else min(1.0, centre + half))


def _t95(df: int) -> float:
    """Student's two-sided 95 % point, exact to the digits shown for df < 5, by its series in 1/df from there on."""
    exact = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645}
    z = _Z95
    series = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    return exact.get(df, series + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3))


# --- does the model know where it errs ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranking:
    """How well an uncertainty orders the errors.

    Attributes:
        n: rows counted.
        spearman: rank correlation of uncertainty and absolute error; None when either is the same for all rows.
        ause: area between the sparsification curve by uncertainty and the one by true error, over the mean error; 0 is
            perfect (Ilg2018).
        ause_random: the same area for an uncertainty that says nothing: what ``ause`` is to be read against.
    """

    n: int
    spearman: float | None
    ause: float
    ause_random: float


def joint(uncertainty: Array, error: Array) -> Array:
    """Returns counts of shape ``k x k`` over coarse logarithmic bins: uncertainty by absolute error.

    Both in standard deviations of the target; 12 bins a decade, a fixed public grid. Sites' tables add up; they hold counts
    only, from which :func:`ranking` reads rank correlation and AUSE. A cell of one row tells its absolute error to 20 %.

    Raises:
        DataError: a value is NaN, infinite or negative.
    """
    rows = np.searchsorted(_COARSE, _nonnegative(uncertainty, "uncertainty"), side="left")
    columns = np.searchsorted(_COARSE, _nonnegative(error, "absolute error"), side="left")
    k = len(_COARSE)
    return np.bincount(rows * k + columns, minlength=k * k).reshape(k, k).astype(np.float64)


def ranking(table: Array) -> Ranking:
    """Returns what a (merged) table of :func:`joint` says; ties inside a bin share their mean rank.

    Errors enter AUSE at the geometric middle of their bin, within 10 %.

    Raises:
        WireError: it is no such table.
        DataError: it counts no row.
    """
    k = len(_COARSE)
    if table.shape != (k, k) or not np.isfinite(table).all() or not (table >= 0).all():
        raise WireError(f"a ranking table is not {k} x {k} finite counts of zero or more", fix="compare fedmat versions")
    n = float(table.sum())
    if n <= 0:
        raise DataError("a ranking needs at least one row")
    by_uncertainty, by_error = table.sum(axis=1), table.sum(axis=0)
    a, b = _centred_ranks(by_uncertainty), _centred_ranks(by_error)
    scale = math.sqrt(float(by_uncertainty @ a**2) * float(by_error @ b**2))
    value = np.concatenate([[0.0], np.sqrt(_COARSE[1:-2] * _COARSE[2:-1]), [_COARSE[-2]]])
    value = np.insert(value, 1, _COARSE[1] / 2)  # below the first logarithmic edge
    mean = float(by_error @ value) / n
    ause = random = 0.0
    if mean > 0:
        oracle = _area(by_error, by_error * value)
        ause = (_area(by_uncertainty, table @ value) - oracle) / mean
        random = 1.0 - oracle / mean
    return Ranking(round(n), float(a @ table @ b) / scale if scale > 0 else None, ause, random)


def _centred_ranks(counts: Array) -> Array:
    out: Array = np.cumsum(counts) - 0.5 * counts - 0.5 * counts.sum()
    return out


def _area(counts: Array, errors: Array) -> float:
    """Mean over t in (0, 1) of the mean error of the share t with the lowest bins; inside a bin the error is its mean.

    On a bin from a to b with e error before it and density m: the integral of (e + m (t - a)) / t is m (b - a) +
    (e - m a) ln(b / a), which is exact, where a sum over few bins would not be.
    """
    n = float(counts.sum())
    total = at = before = 0.0
    for count, error in zip(counts, errors, strict=True):
        if count <= 0:
            continue
        end, density = at + count / n, error / count
        total += density * (end - at) + ((before - density * at) * math.log(end / at) if at > 0 else 0.0)
        at, before = end, before + error / n
    return total


def _finite(values: Array, what: str) -> None:
    bad = ~np.isfinite(values)
    if bad.any():
        raise DataError(
            f"{int(bad.sum())} of {bad.size} values are no finite {what}",
            fix="a model that diverged has no uncertainty; lower lr",
        )


def _nonnegative(values: Array, what: str) -> Array:
    out = np.asarray(values, dtype=np.float64)
    if out.ndim != 1:
        raise DataError(f"{what}: expected one number for each row, found {out.ndim} dimensions")
    _finite(out, what)
    if (out < 0).any():
        raise DataError(f"{int((out < 0).sum())} of {out.size} values of {what} are negative", fix="use absolute errors")
    return out
