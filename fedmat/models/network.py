"""What all networks share: their inputs, their tasks and laws, an ensemble of members, and the way to weights and back.

Knows: how an architecture and a seed become weights, and how weights become predictions. Refuses to know: records,
training, sites. Every tensor of a member's own lies along the first axis (``m`` members), so that one sum of updates
averages each member with its like.

References:
    Lakshminarayanan, Pritzel, Blundell, "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles",
    NeurIPS 2017. Caruana, "Multitask Learning", Machine Learning 28, 1997 (one trunk, a head per task).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmat.config import ModelSpec, PlanSettings, Task
from fedmat.domain import Array, Scaler
from fedmat.weights import Weights

if TYPE_CHECKING:
    from fedmat.features.graphs import Graphs

torch.set_num_threads(1)  # law 5: sums inside one matrix product must not depend on the number of cores

# Where networks run. The processor unless FEDMAT_DEVICE says otherwise ("cuda"): an accelerator's sums are not bit-identical
# to a processor's, so every site of a run and every replay of it must use the same kind.
DEVICE = torch.device(os.environ.get("FEDMAT_DEVICE", "cpu"))
HEAD, NORM = "last.", "norm."  # first letters of the names of what a site may keep to itself


@dataclass(frozen=True)
class Inputs:
    """What a network reads of ``n`` records.

    Attributes:
        x: standardised features, shape ``n x p``.
        kelvin: temperature, shape ``n``; empty unless a task has a law.
        y_scale: standard deviation of each task's target, which laws in physical units need.
        graphs: a graph per record, where the architecture reads graphs.
    """

    x: Tensor
    kelvin: Tensor
    y_scale: tuple[float, ...]
    graphs: Graphs | None = None

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: NDArray[np.int64]) -> Inputs:
        """Returns the inputs of some records."""
        kelvin = self.kelvin[rows] if len(self.kelvin) else self.kelvin
        return Inputs(self.x[rows], kelvin, self.y_scale, None if self.graphs is None else self.graphs.take(rows))


@dataclass(frozen=True)
class Architecture:
    """Shape of a network: everything about it but its weights.

    Attributes:
        members: networks side by side; the prediction is their mean.
        private: parts that sites keep to themselves; ``norm`` adds a scale and a shift per feature.
    """

    spec: ModelSpec
    tasks: tuple[Task, ...]
    members: int = 1
    private: tuple[str, ...] = ()

    @classmethod
    def of(cls, spec: ModelSpec, tasks: Sequence[Task], settings: PlanSettings) -> Architecture:
        """Returns the architecture that a plan's sections describe."""
        return cls(spec, tuple(tasks), settings.ensemble, tuple(settings.personalization.private))

    @property
    def lawful(self) -> bool:
        """Whether a task follows a law of temperature, so that temperature is no feature but an argument."""
        return any(t.law != "none" for t in self.tasks)

    @property
    def n_outputs(self) -> tuple[int, ...]:
        """Numbers the last layer gives per task."""
        from fedmat.models.laws import law_of

        return tuple(1 if t.law == "none" else law_of(t.law).n_parameters for t in self.tasks)

    def network(self, width: int) -> nn.Module:
        """Returns the network for ``width`` features, its weights not set.

        It maps ``Inputs`` and row numbers ``m x b`` (None: all rows, for every member) to ``m x b x n_tasks``.
        """
        if self.spec.graph is not None:
            from fedmat.models.gnn import GraphEnsemble

            return GraphEnsemble(self, width).to(DEVICE)
        from fedmat.models.mlp import PropertyNetwork

        return PropertyNetwork(self, width).to(DEVICE)

    def initial_weights(self, width: int, seed: int) -> Weights:
        """Returns the first weights, drawn from the plan's streams; the last layer starts at zero (predicts the mean)."""
        net: Any = self.network(width)
        found: Weights = net.initial_weights(seed)
        return found

    def is_private(self, name: str) -> bool:
        """Tells whether a tensor stays with its site."""
        parts = name.split(".", 1)
        bare = f"{parts[1]}" if parts[0].isdigit() else name  # members of a graph ensemble are numbered
        return ("head" in self.private and bare.startswith(HEAD)) or ("norm" in self.private and bare.startswith(NORM))

    def inputs(self, scaler: Scaler, names: Sequence[str], x: Array, graphs: Graphs | None = None) -> Inputs:
        """Returns what the network reads of raw features ``n x p`` (columns ``names``).

        Raises:
            FeatureError: a task has a law and the features give no temperature.
        """
        kelvin = np.zeros(0, dtype=np.float32)
        if self.lawful:
            from fedmat.models.laws import temperature_k

            kelvin = temperature_k(names, x).astype(np.float32)
        return Inputs(
            torch.from_numpy(np.ascontiguousarray(scaler.features(x))).to(DEVICE),
            torch.from_numpy(kelvin).to(DEVICE),
            tuple(float(v) for v in scaler.y_scale),
            graphs,
        )

    def forward(self, weights: Weights, inputs: Inputs) -> Array:
        """Returns every member's standardised output, shape ``m x n x n_tasks``, float64."""
        net = self.network(inputs.x.shape[1])
        load(net, weights)
        net.eval()
        with torch.no_grad():
            output: NDArray[np.float32] = net(inputs, None).cpu().numpy()
        return output.astype(np.float64)

    def predict(self, weights: Weights, scaler: Scaler, names: Sequence[str], x: Array, graphs: Graphs | None = None) -> Array:
        """Returns predictions of shape ``n x n_tasks`` from raw features: the mean over the members.

        A regression gives the transformed target (before the inverse transform); a binary task gives a probability.
        """
        return self.restore(scaler, self.forward(weights, self.inputs(scaler, names, x, graphs)).mean(axis=0))

    def restore(self, scaler: Scaler, output: Array) -> Array:
        """Returns standardised output ``... x n_tasks`` as predictions."""
        if self.tasks[0].kind == "binary":
            return np.asarray(1.0 / (1.0 + np.exp(-np.clip(output, -40.0, 40.0))), dtype=np.float64)
        return scaler.restore(output)


class Readouts(nn.Module):
    """The last step of every network: its raw numbers become one standardised value per task, laws obeyed."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self._laws = tuple(t.law for t in architecture.tasks)
        self._sizes = architecture.n_outputs

    def forward(self, raw: Tensor, kelvin: Tensor, y_scale: Sequence[float]) -> Tensor:
        """Returns ``... x n_tasks`` for raw numbers ``... x sum(n_outputs)`` and temperatures ``...``."""
        if all(law == "none" for law in self._laws):
            return raw
        from fedmat.models.laws import readout

        out = []
        for law, part, scale in zip(self._laws, torch.split(raw, list(self._sizes), dim=-1), y_scale, strict=True):
            out.append(part[..., 0] if law == "none" else readout(law, part, kelvin, 0.0, scale))
        return torch.stack(out, dim=-1)


def load(net: nn.Module, weights: Weights) -> None:
    """Puts ``weights`` into ``net``; names and shapes must agree exactly."""
    net.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in weights.items()}, strict=True)


def extract(net: nn.Module) -> Weights:
    """Returns a copy of the network's weights."""
    return {k: v.detach().cpu().numpy().astype(np.float32).copy() for k, v in sorted(net.state_dict().items())}
