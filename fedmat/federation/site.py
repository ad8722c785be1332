"""The only place where records' numbers and the wire meet: reading this file is reviewing what leaves a company.

Knows: one site's feature table, and how to answer each kind of request. What leaves, in full:
attestations (digests and counts), sums over training rows, weight changes, sums over held-out rows.
Refuses to know: other sites, the coordinator, how messages are delivered.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from fedmat import files, wire
from fedmat import weights as wts
from fedmat.data.contract import CONTRACT_VERSION
from fedmat.domain import (
    Answer,
    Array,
    Attestation,
    AttestRequest,
    Baseline,
    BaselineRequest,
    EvaluateRequest,
    Evaluation,
    Request,
    Scaler,
    Statistics,
    StatisticsRequest,
    TrainRequest,
    Update,
)
from fedmat.errors import PlanRefused, SiteRefused
from fedmat.features.table import TEST, TRAIN, VALIDATION, FeatureTable
from fedmat.federation.evaluation import evaluate, residual_sums
from fedmat.federation.plan import Plan
from fedmat.federation.scaling import column_sums, federated_scaler
from fedmat.models import mlp
from fedmat.seeds import stream
from fedmat.training import trainer
from fedmat.weights import Weights


class SiteWorker:
    """Answers the coordinator's requests for one site.

    Args:
        plan: the site's own copy of the plan; a request for any other plan is refused.
        table: the site's features; stays here.
        manifest: the site's dataset manifest (digest and counts).
        folder: the site's workspace; training state is kept in ``state/``.
    """

    def __init__(self, site: str, plan: Plan, table: FeatureTable, manifest: dict[str, object], folder: Path) -> None:
        self.site, self.plan, self.table, self.folder = site, plan, table, folder
        self._manifest = manifest
        self._parts = {code: table.part(code) for code in (TRAIN, VALIDATION, TEST)}
        rows = len(self._parts[TRAIN])
        if rows < plan.admission.min_train_records:
            raise SiteRefused(
                f"site {site}: {rows} training records, the consortium asks for {plan.admission.min_train_records}",
                fix="add data, or ask the operator to lower admission.min_train_records",
            )
        for code, name in ((VALIDATION, "validation"), (TEST, "test")):
            if not len(self._parts[code]):
                raise SiteRefused(f"site {site}: no {name} group is left after the split", fix="add groups, or change splits")
        trainer.warm_up()

    def handle(self, data: bytes) -> bytes:
        """Returns the encoded answer to an encoded request.

        Raises:
            WireError: the bytes are no request.
            PlanRefused: the request belongs to another plan, or asks for what this consortium does not permit.
        """
        request: Request = wire.decode(data, Request)  # type: ignore[arg-type]
        if request.plan_sha256 != self.plan.sha256:
            raise PlanRefused(f"site {self.site}: the request is for another plan than this site agreed to")
        return wire.encode(self._answer(request, data))

    def _answer(self, request: Request, data: bytes) -> Answer:
        if isinstance(request, AttestRequest):
            return self._attest()
        if isinstance(request, StatisticsRequest):
            return self._statistics()
        if isinstance(request, TrainRequest):
            return self._train(request, files.sha256(data))
        if isinstance(request, BaselineRequest):
            return self._baseline(request)
        return self._evaluate(request)

    def _attest(self) -> Attestation:
        return Attestation(
            site=self.site,
            dataset_sha256=str(self._manifest["sha256"]),
            contract_version=CONTRACT_VERSION,
            features_sha256=self.table.features_sha256,
            feature_names=self.table.names,
            n_train=len(self._parts[TRAIN]),
            n_validation=len(self._parts[VALIDATION]),
            n_test=len(self._parts[TEST]),
            n_groups=len(np.unique(self.table.group)),
            rejected={str(k): int(v) for k, v in dict(self._manifest["rejected"]).items()},  # type: ignore[call-overload]
        )

    def _statistics(self) -> Statistics:
        part = self._parts[TRAIN]
        return column_sums(self.site, part.x, part.y)

    def _train(self, request: TrainRequest, request_sha256: str) -> Update:
        s, part = self.plan.settings, self._parts[TRAIN]
        held = self._parts[VALIDATION]
        predicted = self._predict(request.weights, request.scaler, held)
        own = self._control(request) if request.control else {}
        trained = trainer.train(
            self.plan.model,
            request.weights,
            request.scaler.features(part.x),
            request.scaler.target(part.y),
            s.local,
            kind=self.plan.task.kind,
            rates=np.full(s.local.steps, request.lr),
            rng=stream(s.seed, "batches", self.site, request.round),
            correction=trainer.scaffold_correction(request.control, own) if own else None,
        )
        control_delta: Weights = {}
        if own:
            following = trainer.scaffold_control(
                own, request.control, request.weights, trained.weights, s.local.steps, request.lr
            )
            control_delta = wts.subtract(following, own)
            self._keep_control(request.round, following)
        return Update(
            self.site,
            request.round,
            request.plan_sha256,
            request_sha256,
            wts.subtract(trained.weights, request.weights),
            control_delta,
            trained.loss,
            residual_sums(held.y, predicted),
        )

    def _baseline(self, request: BaselineRequest) -> Baseline:
        """Trains this site's own model: alone with its own scaling, or from the global weights (fine-tuning)."""
        if request.share and not self.plan.simulated:
            raise PlanRefused(f"site {self.site}: a site's own model leaves it only in a consortium declared simulated")
        s, part, held = self.plan.settings, self._parts[TRAIN], self._parts[VALIDATION]
        if request.arm == "local":
            scaler = federated_scaler([column_sums(self.site, part.x, part.y)], binary=self.plan.task.kind == "binary")
            start = mlp.initial_weights(self.plan.model, int(scaler.active.sum()), s.seed)
            rates = self.plan.rates(s.local.steps)
        else:
            scaler, start = request.scaler, request.weights
            rates = s.local.lr * s.finetune_lr_factor * np.linspace(1.0, 0.05, max(1, s.finetune_steps))[: s.finetune_steps]
        trained = trainer.train_best(
            self.plan.model,
            start,
            (scaler.features(part.x), scaler.target(part.y)),
            (scaler.features(held.x), scaler.target(held.y)),
            s.local.model_copy(update={"mu": 0.0}),
            kind=self.plan.task.kind,
            rates=rates,
            rng=stream(s.seed, "batches", request.arm, self.site),
            every=max(1, len(rates) // 40),
            keep_start=request.arm == "finetuned",
        )
        result = self._score(trained.weights, scaler, f"{request.arm}:{self.site}", "test")
        files.write_atomic(
            self._state() / f"{request.arm}.safetensors",
            wire.encode(Baseline(self.site, request.arm, result, trained.weights, scaler)),
        )
        if request.share:
            return Baseline(self.site, request.arm, result, trained.weights, scaler)
        return Baseline(self.site, request.arm, result)

    def _evaluate(self, request: EvaluateRequest) -> Evaluation:
        return self._score(request.weights, request.scaler, request.arm, request.split)

    def _score(self, weights: Weights, scaler: Scaler, arm: str, split: str) -> Evaluation:
        part = self._parts[TEST if split == "test" else VALIDATION]
        return evaluate(
            self.site,
            arm,
            split,
            part.y,
            self._predict(weights, scaler, part),
            part.group,
            kind=self.plan.task.kind,
            rng=stream(self.plan.settings.seed, "bootstrap", self.site, split),
            floor=1 if self.plan.simulated else 5,
        )

    def _predict(self, weights: Weights, scaler: Scaler, part: FeatureTable) -> Array:
        return mlp.predict(self.plan.model, weights, scaler, part.x, self.plan.task.kind)

    # --- SCAFFOLD's memory -----------------------------------------------------------------------------------------

    def _state(self) -> Path:
        return self.folder / "state" / self.plan.sha256[:16]

    def _control(self, request: TrainRequest) -> Weights:
        """Returns the control variate kept in the last round before this one: a repeated round finds the same."""
        kept = {int(m[1]): p for p in self._state().glob("control-*.safetensors") if (m := re.search(r"-(\d+)\.", p.name))}
        before = [r for r in kept if r < request.round]
        if not before:
            return wts.zeros_like(request.control)
        return wire.decode(kept[max(before)].read_bytes(), Update).delta

    def _keep_control(self, number: int, control: Weights) -> None:
        message = Update(self.site, number, self.plan.sha256, "", control)
        files.write_atomic(self._state() / f"control-{number:05d}.safetensors", wire.encode(message))
