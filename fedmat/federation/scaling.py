"""Federated standardisation: every site sends sums, and the consortium's mean and scale follow from them.

Knows: sums over training rows. Refuses to know: rows of another site, models, messages' travel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedmat.domain import Array, Scaler, Statistics
from fedmat.errors import SiteRefused


def column_sums(site: str, x: Array, y: Array) -> Statistics:
    """Returns count, sum and sum of squares of every column of ``x`` (``n x p``, NaN = missing) and of ``y`` (``n``)."""
    there = np.isfinite(x)
    known = np.where(there, x, 0.0)
    target = np.array([len(y), y.sum(), np.square(y).sum()])
    return Statistics(site, there.sum(0).astype(np.float64), known.sum(0), np.square(known).sum(0), target)


def federated_scaler(statistics: Sequence[Statistics], *, binary: bool) -> Scaler:
    """Returns the consortium's standardisation from the sites' sums, in the order given.

    A feature that is constant over all training rows (relative variance below 1e-9) is switched off.
    """
    count = sum((s.count for s in statistics), np.zeros_like(statistics[0].count))
    total = sum((s.total for s in statistics), np.zeros_like(statistics[0].total))
    squares = sum((s.total_squares for s in statistics), np.zeros_like(statistics[0].total))
    target = sum((s.target for s in statistics), np.zeros(3))
    safe = np.maximum(count, 1.0)
    mean = total / safe
    second = squares / safe
    variance = np.maximum(second - np.square(mean), 0.0)
    active = (variance > 1e-9 * second) & (count > 1)
    scale = np.where(active, np.sqrt(variance), 1.0)
    if binary:
        y_mean, y_scale = 0.0, 1.0
    else:
        y_mean = float(target[1] / target[0])
        y_variance = float(target[2] / target[0]) - y_mean**2
        if y_variance <= 1e-12 * max(1.0, float(target[2] / target[0])):
            raise SiteRefused("all training labels of the consortium are equal", fix="check the target's column and unit")
        y_scale = float(np.sqrt(y_variance))
    if not active.any():
        raise SiteRefused("no feature varies over the consortium's training records", fix="add features or conditions")
    return Scaler(np.where(active, mean, 0.0), scale, active.astype(np.float64), y_mean, y_scale)
