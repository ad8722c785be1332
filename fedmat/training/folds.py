"""Folds of a site's own rows: which member of an ensemble learns from which rows.

Knows: component codes and a generator. Refuses to know: features, targets, models.

Member ``m`` never sees fold ``m``, at any site. So every row has one member that never saw it, or anything that hangs
together with it: predictions out of fold are honest without giving up a row, and early stopping, mixing weights and
intervals rest on all rows instead of a small validation set.

References:
    Wolpert, "Stacked Generalization", Neural Networks 5, 1992. Breiman, "Bagging Predictors", Machine Learning 24, 1996.
    Parmanto, Munro, Doyle, "Improving committee diagnosis with resampling techniques", NeurIPS 1995 (cross-validation
    committees).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmat.domain import Array
from fedmat.features.table import VALIDATION, FeatureTable
from fedmat.seeds import stream


def assign(component: NDArray[np.int64], folds: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Returns a fold number per row, shape ``n``: whole components, the folds about equally large.

    A component that holds more than half of all rows is divided row by row, because no fold could hold it whole: a site
    with one polymer then learns from it, and its out-of-fold errors speak about that polymer only.
    """
    code = np.unique(component, return_inverse=True)[1]
    size = np.bincount(code)
    order = rng.permutation(len(size))
    order = order[np.argsort(-size[order], kind="stable")]  # the largest first, each into the emptiest fold
    load = np.zeros(folds, dtype=np.int64)
    place = np.zeros(len(size), dtype=np.int64)
    for c in order:
        place[c] = int(np.argmin(load))
        load[place[c]] += size[c]
    out = place[code]
    for c in np.flatnonzero(2 * size > len(code)):
        rows = np.flatnonzero(code == c)
        out[rows] = rng.permutation(len(rows)) % folds
    return np.asarray(out, dtype=np.int64)


def of_site(table: FeatureTable, ensemble: int, seed: int, site: str) -> NDArray[np.int64]:
    """Returns, per learning row of a site, the member that never sees it; -1 where all do.

    A single network never sees the validation rows; an ensemble divides all learning rows into folds.
    """
    if ensemble == 1:
        return np.where(table.split == VALIDATION, 0, -1)
    return assign(table.component, ensemble, stream(seed, "folds", site))


def members(fold: NDArray[np.int64], ensemble: int) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Returns, for every member, the rows it learns from and the rows it never sees."""
    numbers = np.arange(len(fold))
    return [numbers[fold != m] for m in range(ensemble)], [numbers[fold == m] for m in range(ensemble)]


def out_of_fold(output: Array, fold: NDArray[np.int64]) -> Array:
    """Returns each row's prediction by the member that never saw it, ``n x n_tasks``, from ``m x n x n_tasks``.

    A row of fold -1 was seen by all members; its prediction is NaN.
    """
    rows = np.arange(len(fold))
    found = output[np.maximum(fold, 0), rows]
    found[fold < 0] = np.nan
    return found
