"""The property network: a multilayer perceptron over standardised features.

Knows: how a spec and a seed become weights, and how weights become predictions. Refuses to know: data and training.

References:
    He et al., "Delving Deep into Rectifiers", ICCV 2015 (initialisation).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedmat.config import ModelSpec
from fedmat.domain import Scaler
from fedmat.seeds import stream
from fedmat.weights import Weights

_ACTIVATIONS: dict[str, Any] = {"relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}

torch.set_num_threads(1)  # law 5: sums inside one matrix product must not depend on the number of cores


def network(spec: ModelSpec, n_features: int) -> nn.Sequential:
    """Returns an uninitialised network mapping ``n x n_features`` to ``n x 1``."""
    layers: list[nn.Module] = []
    width = n_features
    for hidden in spec.hidden:
        layers += [nn.Linear(width, hidden), _ACTIVATIONS[spec.activation]()]
        if spec.dropout:
            layers.append(nn.Dropout(spec.dropout))
        width = hidden
    layers.append(nn.Linear(width, 1))
    return nn.Sequential(*layers)


def initial_weights(spec: ModelSpec, n_features: int, seed: int) -> Weights:
    """Returns He-uniform weights drawn from the plan's stream; the output layer starts at zero (predicts the mean)."""
    out: Weights = {}
    state = network(spec, n_features).state_dict()
    last = max(int(k.split(".")[0]) for k in state)
    for key, value in sorted(state.items()):
        index, kind = key.split(".")
        if kind == "bias" or int(index) == last:
            out[key] = np.zeros(tuple(value.shape), dtype=np.float32)
            continue
        bound = np.sqrt(6.0 / value.shape[1])
        out[key] = stream(seed, "initial-weights", key).uniform(-bound, bound, tuple(value.shape)).astype(np.float32)
    return out


def load(net: nn.Sequential, weights: Weights) -> None:
    """Puts ``weights`` into ``net``; names and shapes must agree exactly."""
    net.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in weights.items()}, strict=True)


def extract(net: nn.Sequential) -> Weights:
    """Returns a copy of the network's weights."""
    return {k: v.detach().cpu().numpy().astype(np.float32).copy() for k, v in sorted(net.state_dict().items())}


def forward(spec: ModelSpec, weights: Weights, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns raw network output of shape ``n`` for standardised features of shape ``n x p``."""
    net = network(spec, x.shape[1])
    load(net, weights)
    net.eval()
    with torch.no_grad():
        output: NDArray[np.float32] = net(torch.from_numpy(np.ascontiguousarray(x))).numpy()
    return output[:, 0].astype(np.float64)


def predict(
    spec: ModelSpec, weights: Weights, scaler: Scaler, x: NDArray[np.float64], kind: str = "regression"
) -> NDArray[np.float64]:
    """Returns predictions of shape ``n`` from raw features ``n x p``.

    A regression gives the transformed target (before the inverse transform); a binary task gives a probability.
    """
    output = forward(spec, weights, scaler.features(x))
    if kind == "binary":
        return 1.0 / (1.0 + np.exp(-np.clip(output, -40.0, 40.0)))
    return scaler.restore(output.astype(np.float32))
