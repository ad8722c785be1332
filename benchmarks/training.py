"""What local training costs: seconds per round of one epoch over 10,000 rows, and what an ensemble saves over single networks.

Ratios within one run; prints one JSON object. ``--compile`` also tries ``torch.compile`` (needs a C++ compiler; tens of seconds).
On a machine with an accelerator the forward and backward pass of one step is timed there too, for what a port would gain.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fedmat.config import LocalTraining, ModelSpec, Task
from fedmat.domain import Scaler
from fedmat.models.network import Architecture, Inputs
from fedmat.seeds import stream
from fedmat.training import trainer
from fedmat.training.trainer import Targets

ROWS, WIDTH = 10_000, 150
TASK = Task(name="bench", record_type="alloy", target="hardness_hv", unit="")


def main() -> None:
    """Times the trainer and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true")
    wanted = parser.parse_args()
    trainer.warm_up()
    out: dict[str, Any] = {"rows": ROWS, "features": WIDTH, "hidden": [128, 128], "batch": 64}
    for members in (1, 4, 8):
        out[f"round_s_ensemble_{members}"] = round(best(lambda m=members: one_round(m)), 3)
    for members in (4, 8):
        saved = members * out["round_s_ensemble_1"] / out[f"round_s_ensemble_{members}"]
        out[f"single_networks_to_ensemble_{members}"] = round(saved, 2)
    out["steps_per_s_single"] = round((ROWS // 64) / out["round_s_ensemble_1"])
    out["adam_foreach_to_fused"] = round(best(lambda: plain_steps(fused=False)) / best(lambda: plain_steps(fused=True)), 2)
    if wanted.compile:
        out["compiled"] = compiled()
    if torch.cuda.is_available():
        out["accelerator_to_processor_step_time"] = round(best(lambda: plain_steps(device="cuda")) / best(plain_steps), 2)
    json.dump(out, sys.stdout, indent=2)
    print()


def one_round(members: int) -> None:
    """One epoch of a round, through the trainer that sites use."""
    rng = stream(1, "bench")
    architecture = Architecture(ModelSpec(), (TASK,), members)
    x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
    scaler = Scaler(np.zeros(1), np.ones(1), np.ones(1), np.zeros(1), np.ones(1))
    targets = Targets.of(scaler, x[:, :1].astype(np.float64), np.zeros((ROWS, 1), dtype=np.int8))
    trainer.train(
        architecture, architecture.initial_weights(WIDTH, 1), Inputs(torch.from_numpy(x), torch.zeros(0), (1.0,)), targets,
        [np.arange(ROWS)] * members, LocalTraining(), rates=np.full(ROWS // 64, 1e-3), rng=rng,
    )  # fmt: skip


def plain_steps(*, fused: bool = True, device: str = "cpu", steps: int = 150, net: Any = None) -> None:
    """Bare steps of the same single network, without the trainer around them."""
    torch.manual_seed(0)
    net = net or network(device)
    optimizer = torch.optim.Adam(net.parameters(), fused=fused, foreach=not fused)
    x, y = torch.randn(64, WIDTH, device=device), torch.randn(64, 1, device=device)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.huber_loss(net(x), y).backward()
        optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()


def network(device: str = "cpu") -> torch.nn.Module:
    """The property network's shape as plain torch."""
    silu, linear = torch.nn.SiLU, torch.nn.Linear
    return torch.nn.Sequential(linear(WIDTH, 128), silu(), linear(128, 128), silu(), linear(128, 1)).to(device)


def compiled() -> dict[str, Any]:
    """What ``torch.compile`` costs once and gains per step."""
    started = time.perf_counter()
    net: Any = torch.compile(network())
    plain_steps(net=net, steps=2)
    start_up = time.perf_counter() - started
    ratio = best(plain_steps) / best(lambda: plain_steps(net=net))
    return {"start_up_s": round(start_up, 1), "eager_to_compiled_step_time": round(ratio, 2)}


def best(work: Callable[[], object], repeats: int = 3) -> float:
    """Returns the shortest time of a few."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    main()
