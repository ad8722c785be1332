"""A site's own model: the shared one tuned at home, its own, and a mixture of both that its own errors ask for.

Knows: one site's inputs, targets and folds, and the global weights. Refuses to know: other sites, messages, files.

What a company gains on its *own* materials is decided here. A model picked as the winner on a small validation set is a
gamble; a mixture whose shares are found on out-of-fold errors of **all** training rows is not: with an ensemble, no member
of the shared model, of the fine-tuned one or of the site's own ever saw the fold it is judged on. The mixture's
out-of-fold error is at most that of the site's own model, by construction.

References:
    Arivazhagan et al., "Federated Learning with Personalization Layers", 2019 (FedPer: a private head).
    Collins et al., "Exploiting Shared Representations for Personalized Federated Learning", ICML 2021 (FedRep).
    Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021.
    Mansour et al., "Three Approaches for Personalization with Applications to Federated Learning", 2020 (interpolation).
    Breiman, "Stacked Regressions", Machine Learning 24, 1996 (shares that are not negative).
    Breiman et al., "Classification and Regression Trees", 1984, section 3.4.3 (the one-standard-error rule).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmat.config import LocalTraining, PlanSettings
from fedmat.domain import Array
from fedmat.models.network import Architecture, Inputs
from fedmat.training import trainer
from fedmat.training.trainer import Rows, Targets, Trained
from fedmat.weights import Weights

STEP = 0.05  # of the shares that are tried
_LOOKS = 40  # looks at the held-out rows during one training


@dataclass(frozen=True)
class Learner:
    """One site's rows, ready to train on.

    Attributes:
        rows, held: for every member of the ensemble, the rows it learns from and those it never sees.
    """

    architecture: Architecture
    inputs: Inputs
    targets: Targets
    rows: Sequence[Rows]
    held: Sequence[Rows]


def alone(learner: Learner, start: Weights, settings: PlanSettings, rates: Array, rng: np.random.Generator) -> Trained:
    """Returns the site's own model, trained from ``start`` on its rows only, stopped by its held-out rows."""
    return _best(learner, start, _plain(settings.local), rates, rng, keep_start=False)


def finetune(learner: Learner, start: Weights, settings: PlanSettings, rng: np.random.Generator) -> Trained:
    """Returns the global weights tuned on the site's rows; as they came where tuning does not help the held-out rows."""
    p = settings.personalization
    rates = settings.local.lr * p.finetune_lr_factor * np.linspace(1.0, 0.05, max(1, p.finetune_steps))[: p.finetune_steps]
    return _best(learner, start, _plain(settings.local), rates, rng, keep_start=True)


def ditto(learner: Learner, start: Weights, settings: PlanSettings, rates: Array, rng: np.random.Generator) -> Trained:
    """Returns the site's model tied to the global weights by a proximal term: Ditto's objective at the final global model."""
    local = settings.local.model_copy(update={"mu": settings.personalization.ditto or 0.0})
    return _best(learner, start, local, rates * settings.personalization.finetune_lr_factor, rng, keep_start=True)


def round_freezer(architecture: Architecture, head_steps: int) -> Callable[[int, str], bool] | None:
    """Returns FedRep's order of a round: the head alone for ``head_steps``, then everything but the head; None without."""
    if not head_steps:
        return None
    bare = Architecture(architecture.spec, architecture.tasks, architecture.members, ("head",))

    def frozen(step: int, name: str) -> bool:
        return bare.is_private(name) != (step < head_steps)

    return frozen


def mixture(
    predictions: Mapping[str, Array], truth: Array, component: NDArray[np.int64], *, mode: str, own: str = "local"
) -> dict[str, float]:
    """Returns the share of every model in the mixture, summing to one.

    ``best`` takes the model with the smallest mean absolute error. ``stack`` tries all shares in steps of 5 % and takes, of
    those whose error is within one standard error of the smallest (paired, over components), the most even one: where the
    rows cannot tell, nobody's noise is trusted more. Shares whose error exceeds that of ``own`` are not eligible.

    Args:
        predictions: model -> out-of-fold predictions, shape ``n``.
        truth: shape ``n``, same unit.
        component: rows that hang together, shape ``n``; they count as one observation of the standard error.
    """
    names = list(predictions)
    stacked = np.stack([predictions[k] for k in names], axis=1)
    grid = _simplex(len(names))
    if mode == "best":
        grid = np.eye(len(names))
    code = np.unique(component, return_inverse=True)[1]
    size = np.bincount(code).astype(np.float64)
    sums = np.empty((len(grid), len(size)))  # summed error of every component under every mixture
    for i, shares in enumerate(grid):
        sums[i] = np.bincount(code, weights=np.abs(stacked @ shares - truth))
    error = sums.sum(axis=1) / len(truth)
    alone_at = int(np.flatnonzero(grid[:, names.index(own)] == 1.0)[0]) if own in names else int(np.argmin(error))
    eligible = error <= error[alone_at] + 1e-12
    best = int(np.argmin(np.where(eligible, error, np.inf)))
    if mode == "stack":
        n = len(size)
        gap = sums - sums[best]  # paired over components
        centred = gap - (gap.sum(axis=1, keepdims=True) / len(truth)) * size
        spread = np.sqrt(np.square(centred).sum(axis=1) * n / max(n - 1, 1)) / len(truth) if n > 1 else np.zeros(len(grid))
        close = eligible & (error - error[best] <= spread)
        uneven = np.square(grid - 1.0 / len(names)).sum(axis=1)
        order = np.lexsort((error, np.round(uneven, 9), ~close))
        best = int(order[0])
    return {name: float(share) for name, share in zip(names, grid[best], strict=True)}


def _simplex(k: int) -> Array:
    parts = round(1.0 / STEP)
    cuts = itertools.combinations(range(parts + k - 1), k - 1)
    rows = [[b - a - 1 for a, b in itertools.pairwise((-1, *cut, parts + k - 1))] for cut in cuts]
    return np.array(rows, dtype=np.float64) / parts


def _plain(local: LocalTraining) -> LocalTraining:
    return local.model_copy(update={"mu": 0.0})


def _best(
    learner: Learner, start: Weights, local: LocalTraining, rates: Array, rng: np.random.Generator, *, keep_start: bool
) -> Trained:
    every = max(1, math.ceil(len(rates) / _LOOKS))
    return trainer.train_best(
        learner.architecture, start, learner.inputs, learner.targets, learner.rows, learner.held, local,
        rates=rates, rng=rng, every=every, keep_start=keep_start,
    )  # fmt: skip
