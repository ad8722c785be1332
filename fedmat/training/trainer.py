"""Local training: steps of an optimiser on one table of features, with FedProx and SCAFFOLD corrections.

With a basis, large matrices change by ``A B`` alone: ``A`` is given and only ``B`` is learned, starting at zero.

Knows: inputs, targets, weights and a learning rate. Refuses to know: rounds as an exchange, sites' files, the wire.
Nothing here keeps state between calls: everything comes in as arguments and goes out as values. The members of an
ensemble are trained in the same steps, each on rows of its own; no member's gradient touches another's.

References:
    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017 (FedAvg).
    Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020 (FedProx, eq. 2).
    Karimireddy et al., "SCAFFOLD", ICML 2020 (Algorithm 1, option II).
    Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018.
    Tobin, "Estimation of Relationships for Limited Dependent Variables", Econometrica 26, 1958 (bounds as likelihoods).
    Kendall, Gal, Cipolla, CVPR 2018 (eq. 7, learned weights of several tasks).
    Konecny et al., "Federated Learning: Strategies for Improving Communication Efficiency", 2016 (section 2, low rank).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmat import weights as wts
from fedmat.config import LocalTraining
from fedmat.domain import Array, Scaler
from fedmat.models import network
from fedmat.models.network import Architecture, Inputs
from fedmat.weights import Weights

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Targets:
    """What is to be learned of ``n`` records.

    Attributes:
        y: standardised targets, shape ``n x n_tasks``; NaN where a record does not state one.
        bound: shape ``n x n_tasks``; -1 where the truth is at most ``y``, +1 where it is at least ``y``, else 0.
    """

    y: Tensor
    bound: Tensor

    @classmethod
    def of(cls, scaler: Scaler, y: Array, bound: NDArray[np.int8]) -> Targets:
        """Returns the training targets of transformed targets ``y`` (``n x n_tasks``)."""
        device = network.DEVICE
        return cls(torch.from_numpy(scaler.target(y)).to(device), torch.from_numpy(bound.astype(np.float32)).to(device))


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


def losses(output: Tensor, y: Tensor, bound: Tensor, local: LocalTraining, kind: str) -> Tensor:
    """Returns the loss of every output, same shape as ``y``; 0 where ``y`` is NaN.

    A bound counts by the likelihood of lying beyond it: under a normal error for ``mse``, under a Laplace error for ``l1``
    and ``huber``, with scale ``local.bound_scale``. Far inside the permitted side it costs nothing; far outside it costs
    what the plain loss does.
    """
    known = torch.isfinite(y)
    truth = torch.where(known, y, torch.zeros_like(y))
    if kind == "binary":
        return nn.functional.binary_cross_entropy_with_logits(output, truth, reduction="none") * known
    error = output - truth
    if local.loss == "mse":
        plain = error.square()
    elif local.loss == "l1":
        plain = error.abs()
    else:
        plain = nn.functional.huber_loss(output, truth, reduction="none")
    if bool(bound.any()):
        s = local.bound_scale
        room = bound * error / s  # how far inside the permitted side, in units of the error's scale
        if local.loss == "mse":
            beyond = -2.0 * s * s * torch.special.log_ndtr(room)
        else:
            inside = -torch.log1p(-0.5 * torch.exp(-room.clamp(min=0.0)))
            beyond = s * torch.where(room < 0, math.log(2.0) - room, inside)
        plain = torch.where(bound != 0, beyond, plain)
    return plain * known


def batches(n: int, size: int, steps: int, rng: np.random.Generator) -> Rows:
    """Returns row numbers of shape ``steps x min(size, n)``: shuffled epochs, one after another, without repeats."""
    size = min(size, n)
    per_epoch = n // size
    rows: list[Rows] = []
    while len(rows) < steps:
        order = rng.permutation(n)[: per_epoch * size].reshape(per_epoch, size)
        rows.extend(order)
    return np.stack(rows[:steps])


def train(
    architecture: Architecture,
    start: Weights,
    inputs: Inputs,
    targets: Targets,
    rows: Sequence[Rows],
    local: LocalTraining,
    *,
    rates: Array,
    rng: np.random.Generator,
    correction: Weights | None = None,
    frozen: Callable[[int, str], bool] | None = None,
    checkpoint: Callable[[int, Weights], None] | None = None,
    checkpoint_every: int = 0,
    basis: Mapping[str, NDArray[np.float32]] | None = None,
) -> Trained:
    """Trains from ``start`` for ``len(rates)`` steps.

    Args:
        rows: for every member of the ensemble, the rows it may learn from.
        rates: learning rate of every step.
        rng: draws the batches and nothing else.
        correction: SCAFFOLD's ``c - c_i``, added to every gradient.
        frozen: tells whether a tensor stays as it is in a step (step number, name).
        checkpoint: called every ``checkpoint_every`` steps with (steps done, weights).
        basis: by tensor name the public factor ``A`` (``n_in x r``) of a change ``A B``; those tensors learn only ``B``.

    Raises:
        ValueError: a basis together with SCAFFOLD, or for a tensor that the network does not have in that shape.
    """
    if basis and correction:
        raise ValueError(
            "SCAFFOLD corrects gradients of whole tensors, and a basis learns only a part of them that changes every round: "
            "its control variates would never meet the gradients they stand for; use one of the two"
        )
    steps, kind = len(rates), architecture.tasks[0].kind
    net = architecture.network(inputs.x.shape[1])
    network.load(net, start)
    if not steps:
        return Trained(network.extract(net), float("nan"))
    net.train()
    if architecture.spec.dropout:
        torch.manual_seed(int(rng.integers(2**62)))  # dropout is torch's own draw: tie it to this call's stream
    factored = _Factored(net, basis, unit=local.optimizer == "sgd") if basis else None
    named = factored.named if factored else list(net.named_parameters())
    parameters = [p for _, p in named]
    anchor = [p.detach().clone() for p in parameters] if local.mu > 0 else []
    shift = [torch.from_numpy(correction[name].copy()).to(network.DEVICE) for name, _ in named] if correction else []
    optimizer = _optimizer(local, factored.inner if factored else parameters, float(rates[0]))
    if factored:
        optimizer.param_groups[0]["weight_decay"] = 0.0  # decays the tensor, not B: see pull
        if factored.whole:
            optimizer.add_param_group({"params": factored.whole})
    balance = getattr(net, "balance", None)
    size = min(local.batch_size, *(len(r) for r in rows))
    plan = torch.from_numpy(np.stack([r[batches(len(r), size, steps, rng)] for r in rows], axis=1)).to(network.DEVICE)
    total = torch.zeros((), dtype=torch.float64, device=network.DEVICE)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = float(rates[step])
        chosen = plan[step]
        optimizer.zero_grad(set_to_none=True)
        y = targets.y[chosen]
        each = losses(factored(inputs, chosen) if factored else net(inputs, chosen), y, targets.bound[chosen], local, kind)
        count = torch.isfinite(y).sum(dim=1)
        per_task = each.sum(dim=1) / count.clamp(min=1)  # m x n_tasks
        if balance is not None:
            per_task = torch.where(count > 0, torch.exp(-balance) * per_task + balance, 0.0 * balance)
        loss = per_task.sum()
        loss.backward()
        if frozen:
            for name, p in named:
                if frozen(step, name):
                    p.grad = None
        if local.clip_grad_norm is not None:
            _clip(parameters, local.clip_grad_norm, architecture.members)
        if factored:
            factored.pull(local.mu, local.weight_decay)
        for (name, p), a in zip(named, anchor, strict=False):
            if p.grad is not None and not (basis and name in basis):
                p.grad.add_(p.detach() - a, alpha=local.mu)  # FedProx, eq. 2
        for p, c in zip(parameters, shift, strict=False):
            if p.grad is not None:
                p.grad.add_(c)  # SCAFFOLD, Algorithm 1 line 10
        optimizer.step()
        total += loss.detach()
        if checkpoint and checkpoint_every and ((step + 1) % checkpoint_every == 0 or step + 1 == steps):
            checkpoint(step + 1, factored.extract() if factored else network.extract(net))
    return Trained(factored.extract() if factored else network.extract(net), float(total) / steps / architecture.members)


class _Factored:
    """A network some of whose tensors are ``start + A B``: ``A`` given, ``B`` learned from zero.

    Args:
        unit: take A's columns at length one. Adam's steps have the size of its learning rate whatever the gradient's, so there a
            longer column is a longer step; under SGD the step of W is ``A A'`` times the gradient, and any length but one would
            change the learning rate by its square.
    """

    def __init__(self, net: nn.Module, basis: Mapping[str, NDArray[np.float32]], *, unit: bool) -> None:
        found = dict(net.named_parameters())
        for name, a in basis.items():
            if name not in found or found[name].dim() < 2 or a.ndim != 2 or a.shape[0] != found[name].shape[-2]:
                raise ValueError(f"the basis of '{name}' fits no tensor of the network: it needs shape n_in x r")
        self._net = net
        self._start = {name: found[name].detach().clone() for name in basis}
        scaled = {name: a / np.linalg.norm(a, axis=0) if unit else np.array(a) for name, a in basis.items()}
        self._a = {name: torch.from_numpy(a).to(network.DEVICE) for name, a in scaled.items()}
        self._b = {
            name: nn.Parameter(torch.zeros(*p.shape[:-2], self._a[name].shape[1], p.shape[-1], device=network.DEVICE))
            for name, p in self._start.items()
        }
        self.named: list[tuple[str, nn.Parameter]] = [(name, self._b.get(name, p)) for name, p in found.items()]
        self.whole = [p for name, p in found.items() if name not in basis]
        self.inner = list(self._b.values())

    def _tensors(self) -> dict[str, Tensor]:
        return {name: torch.add(self._start[name], torch.matmul(a, self._b[name])) for name, a in self._a.items()}

    def __call__(self, inputs: Inputs, rows: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(self._net, self._tensors(), (inputs, rows))
        return output

    def pull(self, mu: float, decay: float) -> None:
        """Adds ``A' (mu A B + decay W)`` to every gradient of a B: FedProx and weight decay act on the tensor ``W``."""
        if not (mu or decay):
            return
        with torch.no_grad():
            for name, a in self._a.items():
                b = self._b[name]
                if b.grad is not None:
                    change = torch.matmul(a, b)
                    b.grad.add_(torch.matmul(a.T, mu * change + decay * (self._start[name] + change)))

    def extract(self) -> Weights:
        """Returns the weights, the learned changes put in."""
        with torch.no_grad():
            moved = {name: value.cpu().numpy().copy() for name, value in self._tensors().items()}
        return network.extract(self._net) | moved


def train_best(
    architecture: Architecture,
    start: Weights,
    inputs: Inputs,
    targets: Targets,
    rows: Sequence[Rows],
    held: Sequence[Rows],
    local: LocalTraining,
    *,
    rates: Array,
    rng: np.random.Generator,
    every: int,
    keep_start: bool,
    average: float = 0.25,
) -> Trained:
    """Trains and returns, for every member, its weights at the look where held-out rows were predicted best.

    The mean of the weights over the last part of the training competes as one more look (Izmailov et al., UAI 2018).

    A single network stops by its held-out rows. In an ensemble each member stops where the *other* members predict their
    held-out rows best: more rows decide, and a member's error on its own fold stays that of rows which took no part.

    Args:
        held: for every member, rows it does not learn from; without any to stop by, its last weights are kept.
        every: steps between two looks.
        keep_start: whether the untouched start competes too (fine-tuning may then change nothing).
        average: share of the looks, the last ones, whose mean competes.
    """
    looks: list[Weights] = []
    scores: list[list[float]] = []
    asked = np.unique(np.concatenate(held)).astype(np.int64)  # only held-out rows decide: no other is predicted
    output = np.full((architecture.members, len(inputs), len(architecture.tasks)), np.nan)
    some = inputs.take(asked)

    def look(_: int, weights: Weights) -> None:
        looks.append(weights)
        output[:, asked] = architecture.forward(weights, some)
        scores.append(held_out_loss(architecture, output, targets, held))

    if keep_start:
        look(0, start)
    trained = train(
        architecture, start, inputs, targets, rows, local, rates=rates, rng=rng, checkpoint=look, checkpoint_every=every
    )
    last = looks[len(looks) - int(average * len(looks)) :]
    if len(last) > 1:
        look(len(rates), wts.weighted_mean(last, [1.0 / len(last)] * len(last)))
    kept = {name: value.copy() for name, value in trained.weights.items()}
    for m, at in enumerate(stopping_points(scores, [len(h) for h in held])):
        if at is not None:
            _put_member(architecture, kept, looks[at], m)
    return Trained(kept, trained.loss)


def stopping_points(scores: Sequence[Sequence[float]], sizes: Sequence[int]) -> list[int | None]:
    """Returns the look at which each member stops, None where nothing tells.

    Args:
        scores: by look, every member's held-out loss; NaN where it has no held-out rows.
        sizes: every member's number of held-out rows.
    """
    if not len(scores):
        return [None] * len(sizes)
    table = np.array(scores)
    known = np.isfinite(table).all(axis=0) & (np.array(sizes) > 0)
    weight = np.where(known, sizes, 0).astype(np.float64)
    summed = np.where(known, table, 0.0) * weight
    out: list[int | None] = []
    for m in range(len(sizes)):
        others = np.arange(len(sizes)) != m if len(sizes) > 1 else np.ones(1, dtype=bool)
        out.append(int(np.argmin(summed[:, others].sum(axis=1))) if weight[others].any() else None)
    return out


def held_out_loss(architecture: Architecture, output: Array, targets: Targets, held: Sequence[Rows]) -> list[float]:
    """Returns every member's mean absolute error (logistic loss of a binary task) on its held rows, over the tasks.

    Args:
        output: standardised, ``m x n x n_tasks``.
    """
    truth = targets.y.cpu().numpy().astype(np.float64)
    out = []
    for m, rows in enumerate(held):
        found, y = output[m, rows], truth[rows]
        if architecture.tasks[0].kind == "binary":
            each = np.logaddexp(0.0, found) - y * found
        else:
            each = np.abs(found - y)
        known = np.isfinite(y)
        per_task = [each[known[:, t], t].mean() for t in range(y.shape[1]) if known[:, t].any()]
        out.append(float(np.mean(per_task)) if per_task else math.nan)
    return out


def scaffold_correction(control: Weights, own: Weights) -> Weights:
    """Returns ``c - c_i``."""
    return wts.subtract(control, own)


def scaffold_control(own: Weights, control: Weights, start: Weights, end: Weights, steps: int, lr: float) -> Weights:
    """Returns the site's next control variate, option II: ``c_i - c + (x - y) / (K * lr)``."""
    drift = wts.subtract(start, end)
    return wts.add(wts.subtract(own, control), drift, scale=1.0 / (steps * lr))


def _put_member(architecture: Architecture, into: Weights, weights: Weights, member: int) -> None:
    for name, value in weights.items():
        number = name.split(".", 1)[0]
        if not number.isdigit():
            into[name][member] = value[member]
        elif int(number) == member:
            into[name] = value.copy()


def _clip(parameters: Sequence[nn.Parameter], limit: float, members: int) -> None:
    """Scales gradients so that no member's norm exceeds ``limit``; parameters without a member axis are clipped together."""
    found = [p.grad for p in parameters if p.grad is not None]
    if members == 1 or not all(g.shape[0] == members and g.dim() > 1 for g in found):
        nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], limit)
        return
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in found]).norm(dim=0)
    factor = (limit / (norms + 1e-6)).clamp(max=1.0)
    for g in found:
        g.mul_(factor.reshape(-1, *[1] * (g.dim() - 1)))


def _optimizer(local: LocalTraining, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    if local.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=local.weight_decay, fused=True)
    return torch.optim.SGD(parameters, lr=lr, weight_decay=local.weight_decay)
