"""A site's part of FLARE's FedAvg recipe, as FLARE runs it: the network and a local step that is next to nothing.

Run by FLARE, never by hand: ``local_step.py WIDTH HIDDEN...``. One step on eight rows of ones, so that what is timed is FLARE.
"""

from __future__ import annotations

import itertools
import sys

import torch


class Network(torch.nn.Module):
    """A chain of linear layers with SiLU between them: the shape of fedmat's property network."""

    def __init__(self, width: int = 150, hidden: tuple[int, ...] = (128, 128)) -> None:
        super().__init__()
        self.width, self.hidden = width, tuple(hidden)  # FLARE writes a model down by the arguments it finds as attributes
        sizes = (width, *hidden, 1)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns ``n x 1`` for ``n x width``."""
        for layer in list(self.layers)[:-1]:
            x = torch.nn.functional.silu(layer(x))
        found: torch.Tensor = self.layers[-1](x)
        return found


def main(width: int, hidden: tuple[int, ...]) -> None:
    """Answers FLARE's tasks until there are no more."""
    from nvflare import client as flare

    torch.set_num_threads(1)
    flare.init()
    network, rows = Network(width, hidden), torch.ones(8, width)
    while flare.is_running():
        given = flare.receive()
        network.load_state_dict({k: torch.as_tensor(v) for k, v in given.params.items()})
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
        network(rows).square().mean().backward()
        optimizer.step()
        flare.send(flare.FLModel(params=network.state_dict(), metrics={"accuracy": 0.5}, meta={"NUM_STEPS_CURRENT_ROUND": 1}))


if __name__ == "__main__":
    main(int(sys.argv[1]), tuple(int(a) for a in sys.argv[2:]))
