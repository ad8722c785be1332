"""Local training that hides every single record: DP-SGD over the records of one site.

Knows: inputs, targets, weights, a clip and a noise multiplier. Refuses to know: budgets (``fedmat.privacy.accounting`` is
asked before this is called), rounds, the wire.

One step: every record takes part with the sampling rate, independently of all others; the gradient of each one's loss is
clipped to ``privacy.clip``; their sum gets Gaussian noise of ``noise_multiplier * clip`` and is divided by the *expected*
number of records; Opacus' optimiser does the clipping and the step. What would look at several records at once, or at
the number that happened to be drawn, is absent: means over a batch, early stopping, the training loss in the answer.

Which records take part is as secret as the noise, so both come from the operating system (``mechanisms.Noise``). A stream
derived from the plan's seed, which every member knows, would void what sampling adds to the guarantee; that is why
this function has no generator among its arguments.

The gradient of every record comes out of the networks' own member axis: a batch of ``b`` records is run through ``b``
members with the same weights, one record each, so members' gradients are the records' gradients, with any loss and any
law of temperature. A graph network has no such axis; there records are taken one after another.

References:
    Abadi et al., "Deep Learning with Differential Privacy", CCS 2016 (Algorithm 1).
    Yousefpour et al., "Opacus: User-Friendly Differential Privacy Library in PyTorch", arXiv:2109.12298 (2021).
    Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020 (the proximal term).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmat import weights as wts
from fedmat.config import LocalTraining, Privacy
from fedmat.domain import Array
from fedmat.models import network
from fedmat.models.network import Architecture, Inputs
from fedmat.privacy.accounting import Event
from fedmat.privacy.mechanisms import Noise
from fedmat.training import trainer
from fedmat.training.trainer import Rows, Targets, Trained
from fedmat.weights import Weights

_AT_A_TIME = 1 << 25  # numbers of per-record gradients held at once: 128 MB


def train_private(
    architecture: Architecture,
    start: Weights,
    inputs: Inputs,
    targets: Targets,
    rows: Sequence[Rows],
    local: LocalTraining,
    privacy: Privacy,
    *,
    rates: Array,
    noise_multiplier: float,
    sampling_rate: float,
    insecure_seed: int | None = None,
) -> Trained:
    """Trains from ``start`` for ``len(rates)`` noisy steps: one ``Event(noise_multiplier, sampling_rate, len(rates))``.

    Of ``local``, the optimiser, its weight decay, the loss and the proximal strength count; batch size and gradient clipping
    do not: the sampling rate and ``privacy.clip`` take their place.

    A missing target (NaN) adds nothing. A record whose gradient is not finite adds nothing either: to stop there would tell
    that the record is present.

    Args:
        rows: of the one member, the rows it may learn from.
        rates: learning rate of every step.
        sampling_rate: chance of every row to take part in a step.
        insecure_seed: for tests only; see :class:`fedmat.privacy.mechanisms.Noise`.

    Returns:
        The weights. Their loss is NaN: a training loss is a number about records that no noise covers.

    Raises:
        ValueError: an ensemble, dropout, another unit than ``record``, no rows or a row twice, or a setting out of range.
    """
    _check(architecture, rows, privacy)
    learn = torch.from_numpy(rows[0]).to(network.DEVICE)
    steps = len(rates)
    net = architecture.network(inputs.x.shape[1])
    network.load(net, start)
    if not wts.is_finite(start):
        raise ValueError("the weights to start from are not finite")
    if not steps:
        return Trained(network.extract(net), float("nan"))
    Event(noise_multiplier, sampling_rate, steps)  # refuses what cannot be accounted for
    noise = Noise(insecure_seed=insecure_seed)
    parameters = dict(sorted(net.named_parameters()))
    anchor = [p.detach().clone() for p in parameters.values()] if local.mu > 0 else []
    optimizer = _optimizer_class()(
        _plain_optimizer(local, list(parameters.values()), float(rates[0])),
        noise=noise,
        noise_multiplier=noise_multiplier,
        max_grad_norm=privacy.clip,
        expected_batch_size=sampling_rate * len(learn),
    )
    if anchor:
        optimizer.attach_step_hook(functools.partial(_pull, local.mu, anchor))
    piece = max(1, _AT_A_TIME // sum(p.numel() for p in parameters.values()))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = float(rates[step])
        drawn = learn[torch.from_numpy(noise.chosen(len(learn), sampling_rate)).to(network.DEVICE)]
        parts = drawn.split(piece) if len(drawn) else (drawn,)  # an empty draw is a step too: noise alone
        for at, part in enumerate(parts):
            optimizer.zero_grad(set_to_none=True)
            for p, g in zip(
                parameters.values(), record_gradients(architecture, net, inputs, targets, part, local), strict=True
            ):
                p.grad_sample = g  # type: ignore[attr-defined]
            optimizer.signal_skip_step(at + 1 < len(parts))  # pieces of one draw are summed before noise is added, once
            optimizer.step()
    return Trained(network.extract(net), float("nan"))


def record_gradients(
    architecture: Architecture, net: nn.Module, inputs: Inputs, targets: Targets, rows: Tensor, local: LocalTraining
) -> list[Tensor]:
    """Returns the gradient of every record's loss, by parameter in name order, each of shape ``b x`` the parameter's.

    A record's loss is the sum over its known targets; one whose gradient is not finite counts as zero.

    Args:
        net: the architecture's network, of one member.
        rows: record numbers, shape ``b``.
    """
    parameters = dict(sorted(net.named_parameters()))
    if not len(rows):
        return [p.new_zeros((0, *p.shape)) for p in parameters.values()]
    y, bound = targets.y[rows], targets.bound[rows]
    kind = architecture.tasks[0].kind
    if architecture.spec.graph is None:
        copies = {k: p.detach().expand(len(rows), *p.shape[1:]).requires_grad_() for k, p in parameters.items()}
        output = functional_call(net, copies, (inputs, rows[:, None]))[:, 0]  # b members, one record each
        loss = _loss(output, y, bound, local, kind, copies.get("balance"))
        found = [g[:, None] for g in torch.autograd.grad(loss, list(copies.values()))]
    else:
        each: list[list[Tensor]] = [[] for _ in parameters]
        for i in range(len(rows)):
            output = net(inputs, rows[None, i : i + 1])[0]
            loss = _loss(output, y[i : i + 1], bound[i : i + 1], local, kind, None)
            # an empty graph passes no convolution: those gradients are zero
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
            for list_, g in zip(each, grads, strict=True):
                list_.append(g)
        found = [torch.stack(list_) for list_ in each]
    finite = torch.stack([g.flatten(1).isfinite().all(dim=1) for g in found]).all(dim=0)
    if not bool(finite.all()):  # NaN times a clip factor of zero is NaN
        found = [torch.where(finite.reshape(-1, *[1] * (g.dim() - 1)), g, torch.zeros_like(g)) for g in found]
    return found


def _loss(output: Tensor, y: Tensor, bound: Tensor, local: LocalTraining, kind: str, balance: Tensor | None) -> Tensor:
    each = trainer.losses(output, y, bound, local, kind)
    if balance is not None:  # Kendall et al., CVPR 2018, eq. 7, of single records
        each = torch.where(torch.isfinite(y), torch.exp(-balance) * each + balance, torch.zeros_like(each))
    return each.sum()


def _check(architecture: Architecture, rows: Sequence[Rows], privacy: Privacy) -> None:
    if privacy.unit != "record":
        raise ValueError(f"private training protects single records; privacy.unit is {privacy.unit}")
    if architecture.members != 1 or len(rows) != 1:
        raise ValueError("private training takes one network: every member of an ensemble would be one more release")
    if architecture.spec.dropout:
        raise ValueError("private training takes no dropout: set model.dropout: 0")
    if not len(rows[0]):
        raise ValueError("there are no rows to learn from")
    if len(np.unique(rows[0])) != len(rows[0]):
        raise ValueError("a row is named twice: it would count twice, and be accounted for once")
    if not math.isfinite(privacy.clip):
        raise ValueError("privacy.clip must be finite")


def _plain_optimizer(local: LocalTraining, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    made: type[Any] = torch.optim.Adam if local.optimizer == "adam" else torch.optim.SGD
    optimizer: torch.optim.Optimizer = made(parameters, lr=lr, weight_decay=local.weight_decay)
    return optimizer


def _pull(mu: float, anchor: Sequence[Tensor], optimizer: Any) -> None:
    """Adds the proximal term, which knows the received weights and released ones only, to gradients that have their noise."""
    for p, a in zip(optimizer.params, anchor, strict=True):
        p.grad.add_(p.detach() - a, alpha=mu)  # FedProx, eq. 2


@functools.cache
def _optimizer_class() -> Any:
    """Returns Opacus' optimiser with our noise; made on first use, because Opacus takes seconds to import."""
    from opacus.optimizers import DPOptimizer  # type: ignore[import-untyped, unused-ignore]

    class NoisyOptimizer(DPOptimizer):  # type: ignore[misc, unused-ignore]
        """Clips and steps as its parent does; the noise comes from ``Noise`` and is added in float64."""

        def __init__(self, optimizer: torch.optim.Optimizer, *, noise: Noise, **options: Any) -> None:
            super().__init__(optimizer, **options)
            self._noise = noise

        def add_noise(self) -> None:
            std = self.noise_multiplier * self.max_grad_norm
            for p in self.params:
                drawn = torch.from_numpy(self._noise.normal(*p.shape)).to(p.device)
                p.grad = (p.summed_grad.double() + std * drawn).to(p.dtype).view_as(p)

    return NoisyOptimizer
