"""What a federated model is compared with: pooled training, each site alone, each site fine-tuned, and the mean.

Knows: how to ask sites for their own models, and, only where one operator owns all data, how to pool it.
Refuses to know: files and reports. Pooling in a consortium of real companies is refused, not simulated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from fedmat import weights as wts
from fedmat.domain import (
    Baseline,
    BaselineRequest,
    Delivery,
    Dropout,
    EvaluateRequest,
    Evaluation,
    GlobalModel,
    Rejection,
    Scaler,
)
from fedmat.errors import PlanRefused, RoundFailed
from fedmat.features.table import TRAIN, VALIDATION, FeatureTable, concatenate
from fedmat.federation.engine import Engine
from fedmat.federation.plan import Plan
from fedmat.federation.scaling import column_sums, federated_scaler
from fedmat.models import mlp
from fedmat.seeds import stream
from fedmat.training import trainer
from fedmat.weights import Weights

A = TypeVar("A", Baseline, Evaluation)
_OWN: tuple[Literal["local", "finetuned"], ...] = ("local", "finetuned")


@dataclass(frozen=True)
class Arm:
    """A model to be scored: its weights and its own standardisation."""

    name: str
    weights: Weights
    scaler: Scaler


def pooled(plan: Plan, tables: Mapping[str, FeatureTable]) -> Arm:
    """Trains one model on all sites' rows together: the upper bound that federation gives up.

    The same network, schedule and total number of optimiser steps as all sites of the federated run together; the
    weights kept are those that score best on the union of the sites' validation groups.

    Raises:
        PlanRefused: the consortium is not declared simulated.
    """
    if not plan.simulated:
        raise PlanRefused("pooled training needs every site's records in one place", fix="only for 'simulated: true'")
    table = concatenate([tables[s] for s in sorted(tables)])
    part, held = table.part(TRAIN), table.part(VALIDATION)
    binary = plan.task.kind == "binary"
    s = plan.settings
    scaler = federated_scaler([column_sums("pooled", part.x, part.y)], binary=binary)
    steps = s.local.steps * len(tables)
    trained = trainer.train_best(
        plan.model,
        mlp.initial_weights(plan.model, int(scaler.active.sum()), s.seed),
        (scaler.features(part.x), scaler.target(part.y)),
        (scaler.features(held.x), scaler.target(held.y)),
        s.local.model_copy(update={"mu": 0.0}),
        kind=plan.task.kind,
        rates=plan.rates(steps),
        rng=stream(s.seed, "batches", "pooled"),
        every=steps,
        keep_start=False,
    )
    return Arm("pooled", trained.weights, scaler)


def dummy(model: GlobalModel) -> Arm:
    """Returns the arm that predicts the consortium's training mean for everything."""
    return Arm("dummy", wts.zeros_like(model.weights), model.scaler)


def own_models(engine: Engine, plan: Plan, model: GlobalModel, sites: Sequence[str]) -> dict[str, list[Baseline]]:
    """Asks every site for its local-only and its fine-tuned model; returns them by site.

    In a simulated consortium the weights come along, to be scored at other sites too; otherwise they stay.

    Raises:
        RoundFailed: a site did not answer (a comparison with a hole in it would mislead).
    """
    out: dict[str, list[Baseline]] = {site: [] for site in sites}
    for arm in _OWN:
        request = BaselineRequest(plan.sha256, arm, model.weights, model.scaler, plan.simulated)
        patience = plan.settings.deadline_s * plan.settings.rounds
        for delivery in engine.broadcast(request, sites, patience):
            out[delivery.site].append(_expect(delivery, Baseline))
    return out


def score(engine: Engine, plan: Plan, arm: Arm, sites: Sequence[str]) -> list[Evaluation]:
    """Returns every site's sums for one arm on its own test groups; errors as in :func:`own_models`."""
    request = EvaluateRequest(plan.sha256, arm.name, arm.weights, arm.scaler, "test")
    return [_expect(d, Evaluation) for d in engine.broadcast(request, sites, plan.settings.deadline_s)]


def _expect(delivery: Delivery, kind: type[A]) -> A:
    if isinstance(delivery.answer, Dropout | Rejection):
        raise RoundFailed(
            f"site {delivery.site}: {delivery.answer.reason} ({delivery.answer.detail})", fix="mend the site and run again"
        )
    if not isinstance(delivery.answer, kind) or delivery.answer.site != delivery.site:
        raise RoundFailed(f"site {delivery.site}: answered something else than was asked", fix="compare fedmat versions")
    return delivery.answer
