"""Scores from sums: what a site computes on its held-out rows, and how the coordinator adds sites up.

Knows: truths and predictions at a site; sums everywhere else. Refuses to know: records and models.
A weighted mean of per-site R2 or AUC is wrong; both are computed here from sums over all sites.

References:
    Efron & Tibshirani, "An Introduction to the Bootstrap", 1993 (resampling of groups, stratified by site).
    Hanley & McNeil, Radiology 143, 1982 (AUC as the probability of a correctly ranked pair).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmat.assurance.uncertainty import coverage
from fedmat.domain import Array, Evaluation

RESAMPLES = 1000
PARITY_BINS = 30
SCORE_BINS = 200
_Z95 = 1.959963984540054


def residual_sums(truth: Array, predicted: Array) -> Array:
    """Returns n, sum|e|, sum e^2, sum y, sum y^2 for truths and predictions of shape ``n``."""
    error = predicted - truth
    return np.array([len(truth), np.abs(error).sum(), np.square(error).sum(), truth.sum(), np.square(truth).sum()])


def evaluate(
    site: str,
    arm: str,
    split: str,
    truth: Array,
    predicted: Array,
    group: NDArray[np.int64],
    *,
    kind: str,
    rng: np.random.Generator,
    floor: int,
    target: str = "",
    radius: float | None = None,
    pairs: bool = False,
) -> Evaluation:
    """Returns a site's sums with the bootstrap spread of its MAE over groups.

    Args:
        group: rows of one group are resampled together (they are not independent measurements).
        floor: cells of the parity histogram with fewer counts are reported as 0.
        target: the task scored.
        radius: half-width of the intervals whose coverage is counted.
        pairs: give the MAE of every resample, to compare two arms in pairs.
    """
    if not len(truth):
        return Evaluation(site, arm, split, np.zeros(5), 0, math.nan, math.nan, math.nan, target=target)
    absolute = np.abs(predicted - truth)
    _, code = np.unique(group, return_inverse=True)
    n_groups = int(code.max(initial=-1)) + 1
    per_group = np.bincount(code, weights=absolute, minlength=n_groups)
    size = np.bincount(code, minlength=n_groups).astype(np.float64)
    se, low, high = math.nan, math.nan, math.nan
    kept = np.zeros(0)
    if n_groups > 1:
        draws = rng.multinomial(n_groups, np.full(n_groups, 1.0 / n_groups), size=RESAMPLES).astype(np.float64)
        maes = (draws @ per_group) / (draws @ size)
        se, low, high = float(maes.std(ddof=1)), *(float(q) for q in np.quantile(maes, [0.025, 0.975]))
        kept = maes if pairs else kept
    edges, histogram, scores = np.zeros(0), np.zeros((0, 0)), np.zeros((2, 0))
    if kind == "binary":
        bins = np.linspace(0.0, 1.0, SCORE_BINS + 1)
        scores = np.stack([np.histogram(predicted[truth == c], bins)[0] for c in (0.0, 1.0)]).astype(np.float64)
    else:
        edges = parity_edges(truth, predicted)
        histogram = np.histogram2d(truth, np.clip(predicted, edges[0], edges[-1]), bins=[edges, edges])[0]
        histogram = np.where(histogram >= floor, histogram, 0.0)
    covered = np.zeros(0)
    if radius is not None and kind != "binary":
        found = coverage(truth, predicted - radius, predicted + radius, group)
        covered = np.array([found.covered, found.low, found.high, radius])
    sums = residual_sums(truth, predicted)
    return Evaluation(
        site, arm, split, sums, n_groups, se, low, high, edges, histogram, scores, target, covered, kept
    )  # fmt: skip


def parity_edges(truth: Array, predicted: Array) -> Array:
    """Returns bin edges on a coarse public grid, so that the edges state no single value."""
    low, high = float(truth.min()), float(truth.max())
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-6)))
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    return np.linspace(low, high if high > low else low + step, PARITY_BINS + 1)


def metrics(evaluations: Iterable[Evaluation], kind: str) -> dict[str, Any] | None:
    """Returns exact metrics over all rows of ``evaluations`` (one arm, disjoint rows); None where there is no row.

    The interval of MAE is the sites' stratified bootstrap: variances of the sites' sums add up; for one site it is the
    site's own percentile interval. A missing spread (one group) makes the interval None, never zero.
    """
    parts = sorted((e for e in evaluations if e.sums[0] > 0), key=lambda e: e.site)
    if not parts:
        return None
    total = np.sum([e.sums for e in parts], axis=0)
    n, absolute, square, y, y2 = (float(v) for v in total)
    out: dict[str, Any] = {"n": int(n), "n_groups": sum(e.n_groups for e in parts)}
    mae = absolute / n
    low: float | None
    high: float | None
    if len(parts) == 1:
        low, high = parts[0].mae_low, parts[0].mae_high
    else:
        spread = math.sqrt(sum((float(e.sums[0]) / n * e.mae_se) ** 2 for e in parts))
        low, high = mae - _Z95 * spread, mae + _Z95 * spread
    known = math.isfinite(low) and math.isfinite(high)
    out |= {"mae": mae, "mae_low": low if known else None, "mae_high": high if known else None}
    out["rmse"] = math.sqrt(square / n)
    around = y2 - y * y / n
    out["r2"] = 1.0 - square / around if around > 1e-12 * max(1.0, y2) else None
    if all(len(e.coverage) for e in parts):
        rows = np.array([e.sums[0] for e in parts])
        covered = np.array([e.coverage for e in parts])
        width = float(rows @ covered[:, 3] / n)
        out["interval"] = {"covered": float(covered[:, 0].sum() / n), "half_width": width if math.isfinite(width) else None}
        if len(parts) == 1:
            out["interval"] |= {"low": float(covered[0, 1]), "high": float(covered[0, 2])}
    if kind == "binary":
        out |= {"auc": area_under_curve([e.scores for e in parts]), "accuracy": _accuracy([e.scores for e in parts])}
    return out


def area_under_curve(scores: Sequence[Array]) -> float | None:
    """Returns AUC from counts of shape ``2 x bins`` per site; ties inside a bin count half. None without both classes."""
    negative, positive = np.sum(scores, axis=0)
    if not negative.sum() or not positive.sum():
        return None
    below = np.concatenate([[0.0], np.cumsum(negative)[:-1]])
    return float((positive * (below + 0.5 * negative)).sum() / (negative.sum() * positive.sum()))


def _accuracy(scores: Sequence[Array]) -> float:
    negative, positive = np.sum(scores, axis=0)
    half = len(negative) // 2
    return float((negative[:half].sum() + positive[half:].sum()) / (negative.sum() + positive.sum()))


def scores(evaluations: Iterable[Evaluation], kind: str, metric: str, sites: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the scores that follow from sites' sums about one target, as metrics.json has them.

    Args:
        kind: of the task.
        metric: the one in which arms are compared.

    Returns:
        "" -> the arms on all sites' rows and how they compare; site -> its ``own`` and ``global`` arms. What is not known is left out.
    """
    arms: dict[str, dict[str, Evaluation]] = {}
    for e in evaluations:
        arms.setdefault(e.arm, {})[e.site] = e

    def everywhere(arm: str) -> dict[str, Any] | None:
        found = arms.get(arm, {})
        return metrics(found.values(), kind) if set(found) == set(sites) else None

    def at(arm: str, site: str) -> dict[str, Any] | None:
        found = arms.get(arm, {}).get(site)
        return metrics([found], kind) if found else None

    out: dict[str, dict[str, Any]] = {}
    for site in sites:
        own = {
            arm: at(arm if arm in ("federated", "pooled") else f"{arm}:{site}", site)
            for arm in ("local", "federated", "finetuned", "personal", "pooled")
        }
        beyond = {arm: everywhere(f"{arm}:{site}") for arm in ("local", "finetuned")}
        out[site] = {"own": known(own), "global": known(beyond)}
    local, finetuned = ([out[s]["global"].get(arm) for s in sites] for arm in ("local", "finetuned"))
    overall = known({
        **{arm: everywhere(arm) for arm in ("federated", "pooled", "dummy")},
        "local_mean": _mean(local),
        "finetuned_mean": _mean(finetuned),
    })  # fmt: skip
    return out | {"": overall | _comparisons(overall, local, metric)}


def known(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is not None."""
    return {k: v for k, v in values.items() if v is not None}


def _comparisons(overall: Mapping[str, Any], locals_: list[dict[str, Any] | None], metric: str) -> dict[str, float]:
    """Ratios of the federated model to its peers in the task's metric; a gain is the share of error taken away."""

    def value(m: Mapping[str, Any] | None) -> float | None:
        found = m.get(metric) if m else None
        return float(found) if found is not None else None

    federated = value(overall.get("federated"))
    out: dict[str, float] = {}
    if federated is None:
        return out

    def better(ours: float, other: float) -> float:
        return ours / other - 1.0 if metric == "auc" else 1.0 - ours / other

    pooled, mean = value(overall.get("pooled")), value(overall.get("local_mean"))
    single = [v for m in locals_ if (v := value(m)) is not None]
    if pooled:
        out["ratio_to_pooled"] = federated / pooled
    if mean:
        out["gain_over_local_mean"] = better(federated, mean)
    if single:
        out["gain_over_best_local"] = better(federated, max(single) if metric == "auc" else min(single))
    return out


def _mean(values: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    known = [v for v in values if v is not None]
    if not known or len(known) != len(values):
        return None
    keys = [k for k in ("mae", "rmse", "r2", "auc", "accuracy") if all(v.get(k) is not None for v in known)]
    return {"n": known[0]["n"], **{k: sum(v[k] for v in known) / len(known) for k in keys}}
