"""The plan: everything that decides the bytes of the global model, checked before any byte leaves a site.

Knows: which settings exclude each other, and the learning rate of every round. Refuses to know: where data lies and
how messages are delivered; neither changes the model, so neither is in the plan's digest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmat import files
from fedmat.aggregation import robust
from fedmat.config import Admission, ConsortiumConfig, FeatureSpec, ModelSpec, PlanSettings, Splits, Task
from fedmat.envelopes import FEWEST_SITES, MOST_OVER_MEAN
from fedmat.errors import PlanRefused
from fedmat.privacy import mechanisms
from fedmat.transport import compression

MIN_SITES = FEWEST_SITES
_A_SMALL_UPDATE = 5000  # numbers of an update, for the sum that shows why privacy of whole sites is refused


@dataclass(frozen=True)
class Plan:
    """Description of one run. Two plans with equal digests give equal models on equal data."""

    consortium: str
    simulated: bool
    roster: tuple[str, ...]
    tasks: tuple[Task, ...]
    features: tuple[FeatureSpec, ...]
    model: ModelSpec
    splits: Splits
    admission: Admission
    settings: PlanSettings

    def __post_init__(self) -> None:
        _refuse(self)

    @classmethod
    def of(cls, config: ConsortiumConfig) -> Plan:
        """Returns the plan that a consortium file describes.

        Raises:
            PlanRefused: two settings exclude each other; the message names both and the way out.
        """
        return cls(
            config.name, config.simulated, config.roster, config.tasks, config.features, config.model, config.splits,
            config.admission, config.plan,
        )  # fmt: skip

    @property
    def task(self) -> Task:
        """The first task: the one whose metric a run is judged by."""
        return self.tasks[0]

    def as_json(self) -> dict[str, Any]:
        """Returns the plan as plain JSON, without what only says how messages are delivered."""
        return {
            "schema": "fedmat/plan/2",
            "consortium": self.consortium,
            "simulated": self.simulated,
            "roster": list(self.roster),
            "task": self.task.model_dump(mode="json"),
            "auxiliary": [t.model_dump(mode="json") for t in self.tasks[1:]],
            "features": [f.model_dump(mode="json") for f in self.features],
            "model": self.model.model_dump(mode="json"),
            "splits": self.splits.model_dump(mode="json"),
            "admission": self.admission.model_dump(mode="json"),
            "settings": self.settings.model_dump(mode="json", exclude={"isolation", "deadline_s"}),
        }

    @property
    def sha256(self) -> str:
        """Digest of :meth:`as_json` in canonical form."""
        return files.sha256(files.canonical_json(self.as_json()))

    def model_spec(self, feature_names: Sequence[str], features_sha256: str) -> dict[str, object]:
        """Returns what stands beside the weights of a model of this plan, so that raw records can be predicted with it."""
        plan = self.as_json()
        return {
            "schema": "fedmat/model/2",
            "record_type": plan["task"]["record_type"],
            "task": plan["task"],
            "auxiliary": tuple(plan["auxiliary"]),
            "features": tuple(plan["features"]),
            "feature_names": tuple(feature_names),
            "features_sha256": features_sha256,
            "model": plan["model"],
            "ensemble": self.settings.ensemble,
            "private": tuple(self.settings.personalization.private),
            "plan_sha256": self.sha256,
        }

    def factor(self, round_number: int) -> float:
        """Returns the learning-rate factor of a round (0-based)."""
        s, rounds = self.settings.schedule, self.settings.rounds
        if round_number < s.warmup_rounds:
            return (round_number + 1) / (s.warmup_rounds + 1)
        if s.kind == "constant":
            return 1.0
        if s.kind == "step":
            return max(s.final_factor, 0.5 ** ((round_number - s.warmup_rounds) // s.step_every))
        span = max(1, rounds - 1 - s.warmup_rounds)
        progress = (round_number - s.warmup_rounds) / span
        return s.final_factor + (1.0 - s.final_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))

    def lr(self, round_number: int) -> float:
        """Returns the local learning rate of a round (0-based)."""
        return self.settings.local.lr * self.factor(round_number)

    def steps(self, round_number: int) -> int:
        """Returns the local steps of a round (0-based)."""
        s = self.settings
        progress = round_number / max(1, s.rounds - 1)
        return max(1, round(s.local.steps * (1.0 + (s.schedule.final_steps_factor - 1.0) * progress)))

    def rates(self, sites: int = 1) -> NDArray[np.float64]:
        """Returns the learning rate of every step of a run without rounds, same schedule.

        Args:
            sites: the steps of how many sites are taken (1 for local-only, all for pooled).
        """
        return np.concatenate([np.full(self.steps(r) * sites, self.lr(r)) for r in range(self.settings.rounds)])


def _refuse(plan: Plan) -> None:
    s, n = plan.settings, len(plan.roster)
    _refuse_protection(plan)
    if s.quorum > n:
        raise PlanRefused(f"plan.quorum is {s.quorum} and the consortium has {n} sites", fix=f"set plan.quorum to at most {n}")
    if s.site_weights == "rows" and s.max_weight_share * s.quorum < 1.0:
        raise PlanRefused(
            f"plan.max_weight_share {s.max_weight_share} and plan.quorum {s.quorum}: a round of {s.quorum} sites could not "
            "give away all weight",
            fix=f"raise max_weight_share to {1 / s.quorum:.2f} or more, or the quorum to {math.ceil(1 / s.max_weight_share)}",
        )
    if s.schedule.warmup_rounds >= s.rounds:
        raise PlanRefused(
            f"plan.schedule.warmup_rounds {s.schedule.warmup_rounds} and plan.rounds {s.rounds}: warm-up never ends",
            fix="warm up for fewer rounds than there are",
        )
    if (s.algorithm == "fedprox") != (s.local.mu > 0):
        raise PlanRefused(
            f"plan.algorithm {s.algorithm} and plan.local.mu {s.local.mu} disagree",
            fix="fedprox needs local.mu > 0 (0.01 to 1 is usual); every other algorithm needs mu: 0",
        )
    personal = s.personalization
    if personal.head_steps and "head" not in personal.private:
        raise PlanRefused(
            "plan.personalization.head_steps needs a head that the site keeps",
            fix="add private: [head], or set head_steps: 0",
        )
    if personal.head_steps >= min(plan.steps(0), plan.steps(s.rounds - 1)):
        raise PlanRefused(
            f"plan.personalization.head_steps {personal.head_steps} leaves no step of a round for the rest of the network",
            fix="raise plan.local.steps or lower head_steps",
        )
    if s.average_last > s.rounds:
        raise PlanRefused(
            f"plan.average_last {s.average_last} and plan.rounds {s.rounds}: there are not that many rounds to average",
            fix="lower plan.average_last",
        )
    if personal.private and (s.algorithm == "scaffold" or s.server.name != "sgd"):
        raise PlanRefused(
            f"plan.personalization.private and {'plan.algorithm scaffold' if s.algorithm == 'scaffold' else 'plan.server.name'}: "
            "parts that stay at a site have no common step for the coordinator to correct",
            fix="use plan.server.name: sgd and another algorithm, or private: []",
        )
    if plan.model.graph is not None and "norm" in personal.private:
        raise PlanRefused(
            "plan.personalization.private norm and model.graph: a graph network has no input scale to keep",
            fix="private: [head]",
        )
    if s.algorithm == "scaffold":
        for name, wrong, fix in (
            ("plan.local.optimizer", s.local.optimizer != "sgd", "use plan.local.optimizer: sgd"),
            ("plan.site_weights", s.site_weights != "equal", "use plan.site_weights: equal"),
            ("plan.local.weight_decay", s.local.weight_decay > 0, "use plan.local.weight_decay: 0"),
            ("plan.server.name", s.server.name != "sgd", "use plan.server.name: sgd"),
        ):
            if wrong:
                raise PlanRefused(f"plan.algorithm scaffold and {name}: its control variates assume plain SGD steps and "
                                  "a plain mean", fix=fix)  # fmt: skip


def _refuse_protection(plan: Plan) -> None:
    """Rules, compressors, protection and privacy that do not go together; silence here is where other frameworks fail."""
    s, n = plan.settings, len(plan.roster)
    mode, rule = s.security.mode, s.rule
    if s.quorum <= n:
        robust.refuse(rule, s.quorum)  # what may answer, not what was invited
    compression.refuse(s.compression, mode)
    if mode != "none" and n < MIN_SITES:
        raise PlanRefused(
            f"plan.security.mode {mode} and {n} sites: from a sum over so few, members read each other",
            fix=f"have {MIN_SITES} sites or more, or security.mode: none with plan.privacy.unit: record",
        )
    if mode != "none" and s.quorum < robust.MIN_SELECTED:
        raise PlanRefused(
            f"plan.security.mode {mode} and plan.quorum {s.quorum}: a sum of fewer than {robust.MIN_SELECTED} updates is not opened",
            fix=f"set plan.quorum to at least {robust.MIN_SELECTED}",
        )
    least = robust.selected(rule, s.quorum) if s.quorum <= n else n
    if mode != "none" and least < max(robust.MIN_SELECTED, rule.hostile + 3):
        raise PlanRefused(
            f"plan.rule.name {rule.name} with plan.quorum {s.quorum} may leave {least} updates: a sum of so few is not opened",
            fix=f"raise plan.quorum, or use a rule that keeps {max(robust.MIN_SELECTED, rule.hostile + 3)} or more",
        )
    if mode in ("masking", "ckks") and rule.name != "mean":
        raise PlanRefused(
            f"plan.security.mode {mode} and plan.rule.name {rule.name}: under {mode} only the sum is opened, no update can be judged",
            fix="use security.mode: trigram, or rule.name: mean (which withstands no hostile site)",
        )
    if mode == "masking" and not n + rule.hostile < 2 * math.ceil(s.security.threshold * n):
        raise PlanRefused(
            f"plan.security.threshold {s.security.threshold} of {n} sites: a lying coordinator could tell two halves different things",
            fix="raise plan.security.threshold above one half",
        )
    if mode == "trigram" and rule.name in robust.CLEAR_ONLY:
        raise PlanRefused(
            f"plan.security.mode trigram and plan.rule.name {rule.name}: it needs every coordinate of every update",
            fix=f"use one of {', '.join(sorted(robust.GRAM_RULES))}, which need inner products only",
        )
    if mode != "none" and s.site_weights == "rows" and s.max_weight_share * least > MOST_OVER_MEAN:
        raise PlanRefused(
            f"plan.site_weights rows, plan.max_weight_share {s.max_weight_share} and a sum of {least} sites: one update could stand out",
            fix=f"set plan.max_weight_share to at most {MOST_OVER_MEAN / least:.2f}",
        )
    if s.algorithm == "scaffold" and (mode != "none" or s.compression.name != "none" or s.site_momentum or rule.name != "mean"):
        raise PlanRefused(
            "plan.algorithm scaffold sends a second vector, which cannot be encrypted, compressed or judged with the first",
            fix="use plan.algorithm: fedavg, or security.mode: none, compression.name: none, rule.name: mean, site_momentum: 0",
        )
    if s.compression.name != "none" and s.compression.downlink and s.server.name != "sgd":
        raise PlanRefused(
            f"plan.compression.downlink and plan.server.name {s.server.name}: the server's step is no longer the sum the sites can expand",
            fix="use plan.server.name: sgd, or compression.downlink: false",
        )
    if s.compression.name == "low_rank" and s.personalization.head_steps:
        raise PlanRefused(
            "plan.compression.name low_rank and plan.personalization.head_steps: the head is trained in another form than it is sent",
            fix="use compression.name: hadamard, or head_steps: 0",
        )
    if s.compression.name == "low_rank" and s.site_momentum:
        raise PlanRefused(
            "plan.compression.name low_rank and plan.site_momentum: last round's update lies along directions this round does not send",
            fix="use compression.name: hadamard, or site_momentum: 0",
        )
    if s.contribution.method != "none" and (mode != "trigram" or s.security.ring_bits != 64):
        raise PlanRefused(
            f"plan.contribution.method {s.contribution.method} and plan.security.mode {mode} with ring_bits {s.security.ring_bits}: "
            "contributions are read from what three roles open in a 64-bit ring",
            fix="use security: {mode: trigram, ring_bits: 64}, or contribution.method: none",
        )
    if s.privacy.unit == "site":
        mechanisms.refuse_site_level(n, _A_SMALL_UPDATE, s.privacy.epsilon, s.privacy.delta, s.rounds)
    if s.privacy.unit == "record":
        for name, wrong, fix in (
            ("plan.ensemble", s.ensemble != 1, "use plan.ensemble: 1"),
            ("plan.algorithm", s.algorithm != "fedavg", "use plan.algorithm: fedavg"),
            ("plan.compression.name low_rank", s.compression.name == "low_rank", "use compression.name: hadamard"),
            ("plan.model.graph", plan.model.graph is not None, "use features without a graph"),
            ("plan.model.dropout", plan.model.dropout > 0, "use model.dropout: 0"),
            ("plan.security.round_scores", s.security.round_scores, "use round_scores: false"),
            ("plan.personalization.head_steps", s.personalization.head_steps > 0, "use head_steps: 0"),
        ):
            if wrong:
                raise PlanRefused(f"plan.privacy.unit record and {name}: the guarantee would not cover it", fix=fix)
