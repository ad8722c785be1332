"""Local training: steps of an optimiser on one table of features, with FedProx and SCAFFOLD corrections.

Knows: features, targets, weights and a learning rate. Refuses to know: rounds as an exchange, sites' files, the wire.
Nothing here keeps state between calls: everything comes in as arguments and goes out as values.

References:
    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017 (FedAvg).
    Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020 (FedProx, eq. 2).
    Karimireddy et al., "SCAFFOLD", ICML 2020 (Algorithm 1, option II).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmat import weights as wts
from fedmat.config import LocalTraining, ModelSpec
from fedmat.models import mlp
from fedmat.weights import Weights


@dataclass(frozen=True)
class Trained:
    """Weights after training and the mean loss over the steps taken."""

    weights: Weights
    loss: float


@functools.cache
def warm_up() -> None:
    """Makes torch load what its optimisers import on first use (seconds), so that no round pays for it."""
    parameter = nn.Parameter(torch.zeros(1))
    _optimizer(LocalTraining(), [parameter], 0.1).zero_grad()


def loss_function(name: str, kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the loss on standardised targets; a binary task always uses the logistic loss."""
    if kind == "binary":
        return nn.BCEWithLogitsLoss()
    return {"mse": nn.MSELoss(), "l1": nn.L1Loss(), "huber": nn.HuberLoss(delta=1.0)}[name]


def batches(n: int, size: int, steps: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Returns row numbers of shape ``steps x min(size, n)``: shuffled epochs, one after another, without repeats."""
    size = min(size, n)
    per_epoch = n // size
    rows: list[NDArray[np.int64]] = []
    while len(rows) < steps:
        order = rng.permutation(n)[: per_epoch * size].reshape(per_epoch, size)
        rows.extend(order)
    return np.stack(rows[:steps])


def train(
    spec: ModelSpec,
    start: Weights,
    x: NDArray[np.float32],
    y: NDArray[np.float32],
    local: LocalTraining,
    *,
    kind: str,
    rates: NDArray[np.float64],
    rng: np.random.Generator,
    correction: Weights | None = None,
    checkpoint: Callable[[int, Weights], bool] | None = None,
    checkpoint_every: int = 0,
) -> Trained:
    """Trains from ``start`` for ``len(rates)`` steps.

    Args:
        x, y: standardised features ``n x p`` and targets ``n``.
        rates: learning rate of every step.
        rng: draws the batches and nothing else.
        correction: SCAFFOLD's ``c - c_i``, added to every gradient.
        checkpoint: called every ``checkpoint_every`` steps with (steps done, weights); False stops early.
    """
    steps = len(rates)
    net = mlp.network(spec, x.shape[1])
    mlp.load(net, start)
    net.train()
    if spec.dropout:
        torch.manual_seed(int(rng.integers(2**62)))  # dropout is torch's own draw: tie it to this call's stream
    parameters = list(net.parameters())
    names = [name for name, _ in net.named_parameters()]
    anchor = [p.detach().clone() for p in parameters] if local.mu > 0 else []
    shift = [torch.from_numpy(correction[name].copy()) for name in names] if correction else []
    optimizer = _optimizer(local, parameters, float(rates[0]) if steps else local.lr)
    loss_of = loss_function(local.loss, kind)
    features, target = torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(np.ascontiguousarray(y))[:, None]
    plan = torch.from_numpy(batches(len(x), local.batch_size, steps, rng)) if steps else torch.zeros((0, 1))
    total = torch.zeros((), dtype=torch.float64)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = float(rates[step])
        rows = plan[step]
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(net(features[rows]), target[rows])
        loss.backward()
        if local.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, local.clip_grad_norm)
        for p, a in zip(parameters, anchor, strict=False):
            p.grad.add_(p.detach() - a, alpha=local.mu)  # type: ignore[union-attr]  # FedProx, eq. 2
        for p, c in zip(parameters, shift, strict=False):
            p.grad.add_(c)  # type: ignore[union-attr]  # SCAFFOLD, Algorithm 1 line 10
        optimizer.step()
        total += loss.detach()
        if checkpoint and checkpoint_every and (step + 1) % checkpoint_every == 0:
            going_on = checkpoint(step + 1, mlp.extract(net))
            net.train()
            if not going_on:
                steps = step + 1
                break
    return Trained(mlp.extract(net), float(total) / steps if steps else float("nan"))


def train_best(
    spec: ModelSpec,
    start: Weights,
    train_xy: tuple[NDArray[np.float32], NDArray[np.float32]],
    validation_xy: tuple[NDArray[np.float32], NDArray[np.float32]],
    local: LocalTraining,
    *,
    kind: str,
    rates: NDArray[np.float64],
    rng: np.random.Generator,
    every: int,
    keep_start: bool,
) -> Trained:
    """Trains and returns the weights that scored best on the validation rows, looked at every ``every`` steps.

    Args:
        keep_start: whether the untouched start competes too (fine-tuning may then change nothing).
    """
    best: list[tuple[float, Weights]] = []

    def score(weights: Weights) -> float:
        output = mlp.forward(spec, weights, validation_xy[0])
        truth = validation_xy[1].astype(np.float64)
        if kind == "binary":
            return float(np.mean(np.logaddexp(0.0, output) - truth * output))
        return float(np.mean(np.abs(output - truth)))

    def look(_: int, weights: Weights) -> bool:
        value = score(weights)
        if not best or value < best[0][0]:
            best[:] = [(value, weights)]
        return True

    if keep_start:
        look(0, start)
    trained = train(spec, start, *train_xy, local, kind=kind, rates=rates, rng=rng, checkpoint=look, checkpoint_every=every)
    if not best:
        look(len(rates), trained.weights)
    return Trained(best[0][1], trained.loss)


def scaffold_correction(control: Weights, own: Weights) -> Weights:
    """Returns ``c - c_i``."""
    return wts.subtract(control, own)


def scaffold_control(own: Weights, control: Weights, start: Weights, end: Weights, steps: int, lr: float) -> Weights:
    """Returns the site's next control variate, option II: ``c_i - c + (x - y) / (K * lr)``."""
    drift = wts.subtract(start, end)
    return wts.add(wts.subtract(own, control), drift, scale=1.0 / (steps * lr))


def _optimizer(local: LocalTraining, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    if local.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=local.weight_decay, foreach=True)
    return torch.optim.SGD(parameters, lr=lr, weight_decay=local.weight_decay)
