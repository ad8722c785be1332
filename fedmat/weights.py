"""Algebra of named tensors: what a model's parameters are while they travel between parties.

Knows: addition, scaling, norms and flattening in float64, always in name order. Refuses to know: models, sites, files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Weights = dict[str, NDArray[np.float32]]
Vector = NDArray[np.float64]


def names(weights: Mapping[str, NDArray[np.float32]]) -> tuple[str, ...]:
    """Returns the tensor names in the one order every party uses."""
    return tuple(sorted(weights))


def flatten(weights: Mapping[str, NDArray[np.float32]]) -> Vector:
    """Returns all tensors as one float64 vector of shape ``d``, in name order."""
    if not weights:
        return np.zeros(0)
    return np.concatenate([np.asarray(weights[k], dtype=np.float64).ravel() for k in names(weights)])


def unflatten(vector: Vector, like: Mapping[str, NDArray[np.float32]]) -> Weights:
    """Returns ``vector`` (shape ``d``) cut into float32 tensors with the names and shapes of ``like``."""
    out: Weights = {}
    at = 0
    for key in names(like):
        shape = like[key].shape
        size = int(np.prod(shape, dtype=np.int64))
        out[key] = vector[at : at + size].reshape(shape).astype(np.float32)
        at += size
    if at != vector.size:
        raise ValueError(f"vector has {vector.size} numbers, the tensors need {at}")
    return out


def subtract(a: Weights, b: Weights) -> Weights:
    """Returns ``a - b`` tensor by tensor, computed in float64."""
    return {k: (a[k].astype(np.float64) - b[k].astype(np.float64)).astype(np.float32) for k in names(a)}


def add(a: Weights, b: Weights, scale: float = 1.0) -> Weights:
    """Returns ``a + scale * b`` tensor by tensor, computed in float64."""
    return {k: (a[k].astype(np.float64) + scale * b[k].astype(np.float64)).astype(np.float32) for k in names(a)}


def zeros_like(a: Weights) -> Weights:
    """Returns tensors of zeros with the names and shapes of ``a``."""
    return {k: np.zeros_like(a[k]) for k in names(a)}


def norm(a: Weights) -> float:
    """Returns the Euclidean norm over all tensors, in float64."""
    return float(np.sqrt(sum(float(np.square(a[k].astype(np.float64)).sum()) for k in names(a))))


def is_finite(a: Weights) -> bool:
    """Tells whether every number is finite."""
    return all(bool(np.isfinite(v).all()) for v in a.values())


def same_shape(a: Weights, b: Weights) -> bool:
    """Tells whether both have the same names, shapes and the wire's number type."""
    return names(a) == names(b) and all(a[k].shape == b[k].shape and a[k].dtype == b[k].dtype for k in a)


def weighted_mean(parts: Sequence[Weights], shares: Sequence[float]) -> Weights:
    """Returns ``sum_i shares[i] * parts[i]`` with float64 sums in the order given; shares must sum to one."""
    if len(parts) != len(shares) or not parts:
        raise ValueError("one share per part, and at least one part")
    if abs(sum(shares) - 1.0) > 1e-9:
        raise ValueError("shares must sum to one")
    out: Weights = {}
    for key in names(parts[0]):
        total = np.zeros(parts[0][key].shape, dtype=np.float64)
        for part, share in zip(parts, shares, strict=True):
            total += share * part[key].astype(np.float64)
        out[key] = total.astype(np.float32)
    return out
