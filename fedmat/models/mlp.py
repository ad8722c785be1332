"""The property network: multilayer perceptrons over standardised features, a whole ensemble in one matrix product.

Knows: layers with a member axis. Refuses to know: data, training, what the outputs mean.

References:
    He et al., "Delving Deep into Rectifiers", ICCV 2015 (initialisation).
    Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR 2021 (a site's own
    normalisation; here scale and shift of the inputs, which need no running statistics).
    Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", CVPR 2018 (``balance``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmat.models.network import Architecture, Inputs, Readouts
from fedmat.seeds import stream
from fedmat.weights import Weights

_ACTIVATIONS: dict[str, Any] = {"relu": nn.functional.relu, "silu": nn.functional.silu, "tanh": torch.tanh}


class Layer(nn.Module):
    """An affine map per member: ``m x b x n_in`` to ``m x b x n_out``."""

    def __init__(self, members: int, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, n_in, n_out))
        self.bias = nn.Parameter(torch.empty(members, 1, n_out))

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x w + b``."""
        return torch.baddbmm(self.bias, x, self.weight)


class Norm(nn.Module):
    """A scale and a shift per feature that a site may keep for itself."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(members, 1, width))
        self.shift = nn.Parameter(torch.empty(members, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x * scale + shift``."""
        return x * self.scale + self.shift


class PropertyNetwork(nn.Module):
    """Features to one standardised value per task, for every member; see :meth:`Architecture.network`."""

    def __init__(self, architecture: Architecture, width: int) -> None:
        super().__init__()
        spec, members = architecture.spec, architecture.members
        sizes = (width, *spec.hidden)
        if "norm" in architecture.private:
            self.norm: nn.Module = Norm(members, width)
        else:
            self.norm = nn.Identity()
        self.hidden = nn.ModuleList(Layer(members, a, b) for a, b in zip(sizes, spec.hidden, strict=False))
        self.last = Layer(members, sizes[-1], sum(architecture.n_outputs))
        self.readouts = Readouts(architecture)
        if spec.task_balance == "uncertainty" and len(architecture.tasks) > 1:
            self.balance = nn.Parameter(torch.empty(members, len(architecture.tasks)))
        self._members = members
        self._dropout = spec.dropout
        self._activation = _ACTIVATIONS[spec.activation]

    def forward(self, inputs: Inputs, rows: Tensor | None) -> Tensor:
        """Returns ``m x b x n_tasks`` for rows ``m x b``; None takes all rows."""
        if rows is None:
            x, kelvin = inputs.x.expand(self._members, -1, -1), inputs.kelvin.expand(self._members, -1)
        else:
            x = inputs.x[rows]
            kelvin = inputs.kelvin[rows] if len(inputs.kelvin) else inputs.kelvin
        h = self.norm(x)
        for layer in self.hidden:
            h = self._activation(layer(h))
            if self._dropout:
                h = nn.functional.dropout(h, self._dropout, self.training)
        out: Tensor = self.readouts(self.last(h), kelvin, inputs.y_scale)
        return out

    def initial_weights(self, seed: int) -> Weights:
        """Returns He-uniform weights, each member's from its own stream; biases, shifts and the last layer are zero."""
        out: Weights = {}
        for key, value in sorted(self.state_dict().items()):
            shape = tuple(value.shape)
            if key == "norm.scale":
                out[key] = np.ones(shape, dtype=np.float32)
            elif key.startswith("hidden.") and key.endswith(".weight"):
                bound = np.sqrt(6.0 / shape[1])
                drawn = [stream(seed, "initial-weights", key, m).uniform(-bound, bound, shape[1:]) for m in range(shape[0])]
                out[key] = np.stack(drawn).astype(np.float32)
            else:
                out[key] = np.zeros(shape, dtype=np.float32)
        return out
