"""The last hidden layer of a network: a feature map of records that everyone who has the model knows.

Knows: that every network ends in a layer called ``last``. Refuses to know: records, training, what the layer is used for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedmat.domain import Array
from fedmat.models.network import Architecture, Inputs, load
from fedmat.weights import Weights


def last_hidden(architecture: Architecture, weights: Weights, inputs: Inputs) -> Array:
    """Returns what the first member's last layer reads, shape ``n x h``, float64.

    One member stands for an ensemble: its members' layers have nothing in common whose mean would mean something.
    """
    net: Any = architecture.network(inputs.x.shape[1])
    load(net, weights)
    net.eval()
    seen: list[NDArray[np.float32]] = []
    last = net.last if hasattr(net, "last") else net.get_submodule("0.last")  # a graph network has one module per member
    hook = last.register_forward_pre_hook(lambda _, given: seen.append(given[0].cpu().numpy()))
    with torch.no_grad():
        net(inputs, None)
    hook.remove()
    parts = [part[0] if part.ndim == 3 else part for part in seen]  # graphs come a batch at a time
    return np.concatenate(parts).astype(np.float64)
