"""Federated standardisation: every site sends sums, and the consortium's mean and scale follow from them.

Knows: sums over training rows. Refuses to know: rows of another site, models, messages' travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedmat.domain import RANK_GRID, Array, Scaler, Statistics
from fedmat.errors import SiteRefused


def column_sums(site: str, x: Array, y: Array) -> Statistics:
    """Returns count, sum and sum of squares of every column of ``x`` (``n x p``) and of ``y`` (``n x n_tasks``); NaN = missing."""
    count, total, squares = _sums(x)
    return Statistics(site, count, total, squares, np.stack(_sums(y), axis=1))


def _sums(x: Array) -> tuple[Array, Array, Array]:
    there = np.isfinite(x)
    known = np.where(there, x, 0.0)
    return there.sum(0).astype(np.float64), known.sum(0), np.square(known).sum(0)


def federated_scaler(
    statistics: Sequence[Statistics], *, binary: bool, drop: NDArray[np.bool_] | None = None, known: Scaler | None = None
) -> Scaler:
    """Returns the consortium's standardisation from the sites' sums, in the order given.

    A feature that is constant over all training rows (relative variance below 1e-9) is switched off.

    Args:
        drop: features that are switched off whatever they are (temperature, where a law takes it), shape ``p``.
        known: gives the mean and spread of a target that these sites do not state or that does not vary; without it such a
            target is refused.
    """
    count = sum((s.count for s in statistics), np.zeros_like(statistics[0].count))
    total = sum((s.total for s in statistics), np.zeros_like(statistics[0].total))
    squares = sum((s.total_squares for s in statistics), np.zeros_like(statistics[0].total))
    safe = np.maximum(count, 1.0)
    mean = total / safe
    second = squares / safe
    variance = np.maximum(second - np.square(mean), 0.0)
    active = (variance > 1e-9 * second) & (count > 1)
    if drop is not None:
        active &= ~drop
    scale = np.where(active, np.sqrt(variance), 1.0)
    target = sum((s.target for s in statistics), np.zeros_like(statistics[0].target))
    y_mean, y_scale = np.zeros(len(target)), np.ones(len(target))
    for t, (n, y_sum, y_squares) in enumerate(target if not binary else ()):
        y_second = y_squares / max(n, 1.0)
        y_mean[t] = y_sum / max(n, 1.0)
        y_variance = y_second - y_mean[t] ** 2
        if y_variance > 1e-12 * max(1.0, y_second):
            y_scale[t] = np.sqrt(y_variance)
        elif known is not None:
            y_mean[t], y_scale[t] = known.y_mean[t], known.y_scale[t]
        else:
            raise SiteRefused(
                "all training labels of the consortium are equal" if n else f"no site states a label of task {t + 1}",
                fix="check the target's column and unit",
            )
    if not active.any():
        raise SiteRefused("no feature varies over the consortium's training records", fix="add features or conditions")
    return Scaler(np.where(active, mean, 0.0), scale, active.astype(np.float64), y_mean, y_scale)


def own_scaler(
    name: str, x: Array, y: Array, *, binary: bool, quantile: bool, drop: NDArray[np.bool_] | None, known: Scaler | None = None
) -> Scaler:
    """Returns the standardisation of one party's rows alone; arguments as in :func:`column_sums` and :func:`federated_scaler`.

    Args:
        quantile: whether features become normal scores.
    """
    scaler = federated_scaler([column_sums(name, x, y)], binary=binary, drop=drop, known=known)
    return with_scores(scaler, [rank_counts(scaler, x)]) if quantile else scaler


def rank_counts(scaler: Scaler, x: Array) -> Array:
    """Returns how many values of every feature lie nearest to each of ``RANK_GRID``, shape ``p x k``; NaN counts nowhere."""
    z = (x - scaler.mean) / scaler.scale
    step = RANK_GRID[1] - RANK_GRID[0]
    near = np.clip(np.rint((np.nan_to_num(z) - RANK_GRID[0]) / step), 0, len(RANK_GRID) - 1).astype(np.int64)
    out = np.zeros((x.shape[1], len(RANK_GRID)))
    for j in range(x.shape[1]):
        out[j] = np.bincount(near[np.isfinite(x[:, j]), j], minlength=len(RANK_GRID))
    return out


def with_scores(scaler: Scaler, counts: Sequence[Array]) -> Scaler:
    """Returns ``scaler`` with the normal score of every grid point: that of the middle rank of the values around it.

    Heavy tails and features that are mostly zero then spread like a normal distribution, which suits a network better than
    a few values at five standard deviations (van der Waerden scores; Conover, "Practical Nonparametric Statistics", 1999).
    """
    from scipy.special import ndtri

    total = np.sum(counts, axis=0)
    n = np.maximum(total.sum(axis=1, keepdims=True), 1.0)
    middle = (np.cumsum(total, axis=1) - 0.5 * total) / n
    return replace(scaler, scores=np.asarray(ndtri(np.clip(middle, 0.5 / n, 1.0 - 0.5 / n)), dtype=np.float64))
