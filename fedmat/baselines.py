"""What a federated model is compared with: pooled training, each site alone, each site fine-tuned, and the mean.

Knows: how to ask sites for their own models, and, only where one operator owns all data, how to pool it.
Refuses to know: files and reports. Pooling in a consortium of real companies is refused, not simulated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fedmat import weights as wts
from fedmat.domain import (
    Array,
    Baseline,
    BaselineRequest,
    Delivery,
    Dropout,
    EvaluateRequest,
    Evaluation,
    GlobalModel,
    OwnArm,
    Rejection,
    Scaler,
)
from fedmat.errors import PlanRefused, RoundFailed
from fedmat.features.table import TRAIN, VALIDATION, FeatureTable, concatenate
from fedmat.federation.engine import Engine
from fedmat.federation.plan import Plan
from fedmat.federation.scaling import own_scaler
from fedmat.models.laws import law_of, temperature_columns
from fedmat.models.network import Architecture
from fedmat.seeds import stream
from fedmat.training import folds, trainer
from fedmat.training.trainer import Targets
from fedmat.weights import Weights

A = TypeVar("A", Baseline, Evaluation)
_NO_CHANGE = -40.0  # of a law's raw parameter: sigmoid and softplus of it are zero
OWN: tuple[OwnArm, ...] = ("local", "finetuned", "personal")  # personal last: it is made of the others


@dataclass(frozen=True)
class Arm:
    """A model to be scored: its weights and its own standardisation."""

    name: str
    weights: Weights
    scaler: Scaler


def pooled(plan: Plan, tables: Mapping[str, FeatureTable]) -> Arm:
    """Returns the first of :func:`pooled_with_error`."""
    return pooled_with_error(plan, tables)[0]


def pooled_with_error(plan: Plan, tables: Mapping[str, FeatureTable]) -> tuple[Arm, float]:
    """Trains one model on all sites' rows together: the upper bound that federation gives up.

    Comes with its mean absolute error on held-out rows of the first task, in the transformed target's unit. The same network and schedule, trained once with
    as many steps as one site takes and once with as many as all sites take together; the weights kept are those that score
    best on held-out rows, of every member of an ensemble and of the two lengths.

    Raises:
        PlanRefused: the consortium is not declared simulated.
    """
    if not plan.simulated:
        raise PlanRefused("pooled training needs every site's records in one place", fix="only for 'simulated: true'")
    table = concatenate([tables[s] for s in sorted(tables)])
    s, architecture = plan.settings, Architecture.of(plan.model, plan.tasks, plan.settings)
    learning, train = table.part(TRAIN, VALIDATION), table.part(TRAIN)
    drop = temperature_columns(table.names) if architecture.lawful else None
    scaler = own_scaler(
        "pooled", train.x, train.y, binary=plan.task.kind == "binary", quantile=s.scaling == "quantile", drop=drop
    )
    fold = np.concatenate(
        [folds.of_site(t.part(TRAIN, VALIDATION), s.ensemble, s.seed, site) for site, t in sorted(tables.items())]
    )
    rows, held = folds.members(fold, s.ensemble)
    inputs = architecture.inputs(scaler, learning.names, learning.x, learning.graphs)
    targets = Targets.of(scaler, learning.y, learning.bound)
    found: list[tuple[float, Weights]] = []
    for length in sorted({1, len(tables)}):
        trained = trainer.train_best(
            architecture,
            architecture.initial_weights(int(scaler.active.sum()), s.seed),
            inputs,
            targets,
            rows,
            held,
            s.local.model_copy(update={"mu": 0.0}),
            rates=plan.rates(length),
            rng=stream(s.seed, "batches", "pooled", length),
            every=s.local.steps * length,
            keep_start=False,
        )
        output = architecture.forward(trained.weights, inputs)
        guess = architecture.restore(scaler, folds.out_of_fold(output, fold))[:, 0]
        found.append((_mean_error(guess, learning.y[:, 0]), trained.weights))
    error, weights = min(found, key=lambda pair: pair[0])
    return Arm("pooled", weights, scaler), error


def _mean_error(guess: Array, truth: Array) -> float:
    """Returns the mean absolute error where both are known; infinite where nothing tells."""
    error = np.abs(guess - truth)
    return float(error[np.isfinite(error)].mean()) if np.isfinite(error).any() else math.inf


def dummy(model: GlobalModel) -> Arm:
    """Returns the arm that predicts the consortium's training mean for everything.

    A law of temperature is as weak as it can be: the smallest activation energy it permits leaves 0.01 decades over 100 K.
    """
    weights = wts.zeros_like(model.weights)
    last: list[float] = []  # one number per output of the last layer
    for task in (model.spec["task"], *model.spec["auxiliary"]):  # type: ignore[misc]
        name = str(task["law"])
        # a law's first number is the property at the reference temperature, the others are how strongly it changes
        last += [0.0] if name == "none" else [0.0, *[_NO_CHANGE] * (law_of(name).n_parameters - 1)]
    for key, value in weights.items():
        if key.endswith("last.bias"):
            value[...] = last
    return Arm("dummy", weights, model.scaler)


def own_models(
    engine: Engine, plan: Plan, model: GlobalModel, sites: Sequence[str], arms: Sequence[OwnArm] = OWN
) -> dict[str, list[Baseline]]:
    """Asks every site for models of its own (by default: local-only, fine-tuned, personal); returns them by site.

    In a simulated consortium the weights come along, to be scored at other sites too; otherwise they stay.

    Raises:
        RoundFailed: a site did not answer (a comparison with a hole in it would mislead).
    """
    out: dict[str, list[Baseline]] = {site: [] for site in sites}
    for arm in arms:
        share = plan.simulated and arm != "personal"
        request = BaselineRequest(plan.sha256, arm, model.weights, model.scaler, share)
        patience = plan.settings.deadline_s * plan.settings.rounds
        for delivery in engine.broadcast(request, sites, patience):
            out[delivery.site].append(_expect(delivery, Baseline))
    return out


def score(
    engine: Engine,
    plan: Plan,
    arm: Arm,
    sites: Sequence[str],
    *,
    target: str = "",
    radius: Mapping[str, float] | None = None,
) -> list[Evaluation]:
    """Returns every site's sums for one arm on its own test groups; errors as in :func:`own_models`.

    Args:
        target: the task to score; "" means the first.
        radius: by site, half-width of the intervals whose coverage is counted.
    """
    request = EvaluateRequest(plan.sha256, arm.name, arm.weights, arm.scaler, "test", target, dict(radius or {}))
    return [_expect(d, Evaluation) for d in engine.broadcast(request, sites, plan.settings.deadline_s)]


def _expect(delivery: Delivery, kind: type[A]) -> A:
    if isinstance(delivery.answer, Dropout | Rejection):
        raise RoundFailed(
            f"site {delivery.site}: {delivery.answer.reason} ({delivery.answer.detail})", fix="mend the site and run again"
        )
    if not isinstance(delivery.answer, kind) or delivery.answer.site != delivery.site:
        raise RoundFailed(f"site {delivery.site}: answered something else than was asked", fix="compare fedmat versions")
    return delivery.answer
