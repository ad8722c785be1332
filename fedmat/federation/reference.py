"""The consortium's reference set: rows everyone agreed on, and what an update would do to their predictions.

Knows: public or jointly agreed records' features, the plan. Refuses to know: members' records and updates. The answer is a
linear map of compressed updates (the Jacobian of the reference rows' predictions) with these rows' residuals; the roles of an
encrypted round open inner products of mapped updates, from which follow each update's predicted gain and its
contribution. Whoever runs this party chooses what is measured; docs/threat-model.md says what that may tell.
"""

from __future__ import annotations

import numpy as np
import torch

from fedmat import weights as wts
from fedmat import wire
from fedmat.domain import Array, ReferenceRequest
from fedmat.envelopes import PublicMap
from fedmat.errors import PlanRefused
from fedmat.features.table import FeatureTable
from fedmat.federation import rounds
from fedmat.federation.plan import Plan
from fedmat.models import network
from fedmat.models.network import Architecture
from fedmat.transport.trigram.shares import MAP_NORM, TARGET_NORM

_ROOM = 0.95  # of the permitted norms, so that rounding stays within
_MOST_NUMBERS = 1 << 21  # of a map: with more, whole numbers of the permitted norm would all be 0 or noise
_FEWEST_ROWS = 5


class ReferenceWorker:
    """Answers what a round's updates are to be measured by.

    Args:
        table: features of the reference rows; all of them are used, whatever split they bring.
    """

    def __init__(self, plan: Plan, table: FeatureTable) -> None:
        self.plan = plan
        known = np.flatnonzero(np.isfinite(table.y[:, 0]))
        wanted = min(plan.settings.contribution.rows, len(known))
        if wanted < _FEWEST_ROWS:
            raise PlanRefused(
                f"the reference set has {len(known)} rows with a target, {_FEWEST_ROWS} are needed", fix="add reference rows"
            )
        chosen = np.zeros(len(table), dtype=np.bool_)
        chosen[known[np.linspace(0, len(known) - 1, wanted).astype(int)]] = True
        self._table = table.rows(chosen)
        self._architecture = Architecture.of(plan.model, plan.tasks, plan.settings)

    def handle(self, data: bytes) -> bytes:
        """Returns the encoded map for a round's model.

        Raises:
            WireError, PlanRefused: the bytes are no such request, or belong to another plan.
        """
        request = wire.decode(data, ReferenceRequest)
        if request.plan_sha256 != self.plan.sha256:
            raise PlanRefused("the reference set serves another plan")
        return wire.encode(self._map(request))

    def _map(self, request: ReferenceRequest) -> PublicMap:
        digest = wire.weights_digest(request.weights, request.scaler)
        squeeze = rounds.compressor(self.plan, request.weights, request.round, digest)
        rows = min(len(self._table), _MOST_NUMBERS // squeeze.length)
        if rows < _FEWEST_ROWS:
            raise PlanRefused(
                f"an update of {squeeze.length} numbers is too long to be measured on reference rows",
                fix="compress it: plan.compression.share, or contribution.method: none",
            )
        jacobian, residual = self._linearised(request, rows)
        matrix = np.stack([squeeze.compress(row) for row in jacobian])  # directions are orthonormal: C is also E'
        whole, scale = _whole(matrix, MAP_NORM)
        targets, target_scale = _whole(residual[:, None], TARGET_NORM)
        return PublicMap(rows, 1, _bytes(whole), _bytes(targets), scale, target_scale)

    def _linearised(self, request: ReferenceRequest, rows: int) -> tuple[Array, Array]:
        """Returns the Jacobian of the ensemble's mean prediction, ``rows x d`` in the vector's order, and the residuals."""
        part = self._table.rows(np.arange(len(self._table)) < rows)
        inputs = self._architecture.inputs(request.scaler, part.names, part.x, part.graphs)
        net = self._architecture.network(inputs.x.shape[1])
        network.load(net, request.weights)
        net.eval()
        named = dict(net.named_parameters())
        output = net(inputs, None).mean(dim=0)[:, 0]
        out = []
        for i in range(rows):
            grads = torch.autograd.grad(output[i], list(named.values()), retain_graph=True, allow_unused=True)
            found = {
                k: np.zeros(p.shape, np.float32) if g is None else g.cpu().numpy()
                for (k, p), g in zip(named.items(), grads, strict=True)
            }
            out.append(wts.flatten(found))
        truth = request.scaler.target(part.y)[:, 0]
        return np.stack(out), (truth - output.detach().cpu().numpy()).astype(np.float64)


def _whole(values: Array, limit: int) -> tuple[Array, float]:
    """Returns values as whole numbers of norm at most ``limit``, and what one of them is worth."""
    norm = float(np.linalg.norm(values))
    if norm == 0:
        return np.zeros(values.shape), 1.0
    unit = norm / (_ROOM * limit)
    return np.rint(values / unit), unit


def _bytes(whole: Array) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(whole.astype("<i4").tobytes(), dtype=np.uint8)
