"""Rules that need only a weighted sum of updates: they work on sums alone, so a sum may arrive encrypted.

Knows: flat float64 vectors, shares and server moments. Refuses to know: sites' data, messages, engines.
State goes in and comes out; no rule remembers anything.

References:
    McMahan et al., AISTATS 2017 (FedAvg). Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (FedAdam).
    Hsu et al., "Measuring the Effects of Non-Identical Data Distribution", 2019 (FedAvgM).
    Karimireddy et al., ICML 2020 (SCAFFOLD: plain mean over the sites taking part).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmat.config import ServerOptimizer
from fedmat.errors import PlanRefused
from fedmat.weights import Vector

State = dict[str, Vector]


def equal_shares(sites: Sequence[str]) -> dict[str, float]:
    """Returns the same share for every site."""
    return {site: 1.0 / len(sites) for site in sites}


def row_shares(rows: Mapping[str, int], max_share: float) -> dict[str, float]:
    """Returns shares in proportion to attested row counts, none above ``max_share``; the excess goes to the others.

    Raises:
        PlanRefused: ``max_share`` times the number of sites is below one, so that no such shares exist.
    """
    sites = sorted(rows)
    if max_share * len(sites) < 1.0 - 1e-12:
        raise PlanRefused(
            f"max_weight_share {max_share} over {len(sites)} sites leaves weight unassigned",
            fix="raise plan.max_weight_share or plan.quorum",
        )
    capped: dict[str, float] = {}
    while True:
        free = [s for s in sites if s not in capped]
        left = 1.0 - max_share * len(capped)
        total = sum(rows[s] for s in free)
        shares = {s: left * rows[s] / total if total else left / len(free) for s in free}
        over = [s for s in free if shares[s] > max_share + 1e-12]
        if not over:
            return {s: capped.get(s, shares.get(s, 0.0)) for s in sites}
        capped.update(dict.fromkeys(over, max_share))


@dataclass(frozen=True)
class LinearRule:
    """The weighted mean of updates, applied by a server optimiser."""

    optimizer: ServerOptimizer

    @property
    def name(self) -> str:
        """The rule's name in reports."""
        return {"sgd": "weighted-mean", "momentum": "weighted-mean + server momentum",
                "adam": "weighted-mean + server adam"}[self.optimizer.name]  # fmt: skip

    def total(self, payloads: Sequence[Vector], shares: Sequence[float]) -> Vector:
        """Returns ``sum_i shares[i] * payloads[i]`` of shape ``d``, in the order given, in float64."""
        out = np.zeros_like(payloads[0])
        for payload, share in zip(payloads, shares, strict=True):
            out += share * payload
        return out

    def finish(self, total: Vector, state: State) -> tuple[Vector, State]:
        """Returns the change of the global weights (shape ``d``) and the next server state."""
        o = self.optimizer
        if o.name == "sgd":
            return o.lr * total, state
        first = o.momentum * state.get("m", np.zeros_like(total))
        if o.name == "momentum":
            first = first + total
            return o.lr * first, {"m": first}
        first = first + (1.0 - o.momentum) * total
        second = o.beta2 * state.get("v", np.zeros_like(total)) + (1.0 - o.beta2) * np.square(total)
        return o.lr * first / (np.sqrt(second) + o.epsilon), {"m": first, "v": second}
