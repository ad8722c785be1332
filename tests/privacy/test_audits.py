"""Attacks as tests: what is released must withstand them, and every attack is shown to work where it should.

An audit proves nothing by passing; it can only find a guarantee broken. Each test therefore also runs on something broken
on purpose, where it must fail.

References:
    Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023 (canaries; Theorem 5.2).
    Carlini et al., "Membership Inference Attacks From First Principles", IEEE S&P 2022 (LiRA).
    Phong et al., "Privacy-Preserving Deep Learning via Additively Homomorphic Encryption", TIFS 2018 (analytic inversion).
    Zhu, Liu, Han, "Deep Leakage from Gradients", NeurIPS 2019; Geiping et al., "Inverting Gradients", NeurIPS 2020.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch.func import functional_call

from fedmat import weights as wts
from fedmat.config import GraphSpec, LocalTraining, ModelSpec, Privacy, Task
from fedmat.features.graphs import CRYSTAL_NAMES, Graphs
from fedmat.models import gnn, network
from fedmat.models.network import Architecture, Inputs
from fedmat.privacy.accounting import Event, epsilon, noise_for
from fedmat.seeds import stream
from fedmat.training import trainer
from fedmat.training.private import train_private
from fedmat.training.trainer import Targets
from fedmat.weights import Weights

F = NDArray[np.float64]
TASK = Task(name="t", record_type="alloy", target="hardness_hv", unit="")
SGD = LocalTraining(optimizer="sgd", lr=1.0, loss="mse", clip_grad_norm=None)


def table(x: F, y: F) -> tuple[Inputs, Targets]:
    made = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    target = torch.from_numpy(np.ascontiguousarray(y, dtype=np.float32).reshape(len(y), -1))
    return Inputs(made, torch.zeros(0), (1.0,)), Targets(target, torch.zeros_like(target))


# --- canaries in one run -----------------------------------------------------------------------------------------------


def chance_of(right: int, guesses: int, canaries: int, eps: float, delta: float) -> float:
    """Returns how likely ``right`` correct guesses or more are at best under (eps, delta): Steinke et al., Theorem 5.2."""
    q = 1.0 / (1.0 + math.exp(-eps))
    tail = float(stats.binom.sf(right - 1, guesses, q))
    below = np.cumsum(stats.binom.pmf(right - np.arange(1, right + 1), guesses, q))
    worst = float((below / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, tail + 2.0 * canaries * delta * worst)


def epsilon_at_least(score: F, included: NDArray[np.bool_], delta: float, confidence: float = 0.95) -> float:
    """Returns a lower bound on epsilon from scores that should be high for canaries that took part.

    The highest and the lowest scores are guessed, four numbers of guesses are tried, each at a quarter of the risk.
    """
    order, best = np.argsort(score), 0.0
    shares = (0.05, 0.15, 0.4, 1.0)
    for share in shares:
        k = max(1, int(share * len(score)) // 2)
        right = int((~included[order[:k]]).sum() + included[order[-k:]].sum())
        low, high = 0.0, 12.0
        for _ in range(40):
            middle = 0.5 * (low + high)
            refuted = chance_of(right, 2 * k, len(score), middle, delta) < (1.0 - confidence) / len(shares)
            low, high = (middle, high) if refuted else (low, middle)
        best = max(best, low)
    return best


def audit(claim: float, *, weaken: float, canaries: int, steps: int, rate: float, seed: int) -> float:
    """Returns the lower bound found by attacking the released weights of one private training.

    Canary ``i`` is a record whose gradient is weight ``i`` alone (a linear network, one-hot inputs, targets out of reach),
    so canaries do not disturb each other and the clipped gradient of each is as long as it may be.
    """
    delta = 1e-5
    linear = Architecture(ModelSpec(hidden=()), (TASK,))
    rng = stream(seed, "canaries")
    included = rng.random(canaries) < 0.5
    inputs, targets = table(1e3 * np.eye(canaries), np.full(canaries, -1e9))
    start = linear.initial_weights(canaries, 0)
    noise = noise_for(claim, delta, rate, steps)
    assert epsilon([Event(noise, rate, steps)], delta) <= claim
    end = train_private(
        linear, start, inputs, targets, [np.flatnonzero(included)], SGD, Privacy(unit="record", clip=1.0),
        rates=np.full(steps, 1e-3), noise_multiplier=noise * weaken, sampling_rate=rate,
    ).weights  # fmt: skip
    score = (start["last.weight"] - end["last.weight"]).ravel().astype(np.float64)
    return epsilon_at_least(score, included, delta)


def test_the_bound_of_the_audit_by_hand() -> None:
    """At epsilon 0 guesses are coins: 10 of 10 right has chance 2**-10; at a large epsilon it has chance 1."""
    assert chance_of(10, 10, 10, 0.0, 0.0) == pytest.approx(2**-10)
    assert chance_of(10, 10, 10, 30.0, 0.0) == pytest.approx(1.0)
    assert chance_of(10, 10, 10, 0.0, 1e-3) > 2**-10
    truth = np.arange(400) % 2 == 0
    assert epsilon_at_least(truth.astype(np.float64), truth, 1e-5) > 4.0
    assert epsilon_at_least(stream(1, "coin").random(400), truth, 1e-5) < 1.0


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_canaries_do_not_refute_the_claim_and_expose_a_tenth_of_the_noise(rate: float) -> None:
    claim = 1.0
    sound = audit(claim, weaken=1.0, canaries=600, steps=3, rate=rate, seed=1)
    broken = audit(claim, weaken=0.1, canaries=600, steps=3, rate=rate, seed=1)
    assert sound <= claim
    assert broken > claim


@pytest.mark.slow
@pytest.mark.parametrize("claim", [1.0, 3.0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_many_canaries_over_many_steps(claim: float, seed: int) -> None:
    sound = audit(claim, weaken=1.0, canaries=2000, steps=20, rate=0.5, seed=seed)
    broken = audit(claim, weaken=0.1, canaries=2000, steps=20, rate=0.5, seed=seed)
    assert sound <= claim
    assert broken > claim


# --- membership --------------------------------------------------------------------------------------------------------


def friedman(n: int, rng: np.random.Generator) -> tuple[F, F]:
    x = rng.random((n, 10))
    y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4] + rng.normal(size=n)
    return (x - 0.5) / 0.29, (y - 14.0) / 5.0


def auc(score: F, member: NDArray[np.bool_]) -> float:
    """Returns the chance that a member scores above a non-member."""
    ranks = stats.rankdata(score)
    n, m = int(member.sum()), int((~member).sum())
    return float((ranks[member].sum() - n * (n + 1) / 2) / (n * m))


def likelihood_ratios(loss: F, member: NDArray[np.bool_]) -> float:
    """Returns the AUC of LiRA, every model in turn the attacked one and all others its shadows; ``loss``: models x records."""
    confidence = np.log(loss + 1e-6)
    score = np.zeros_like(confidence)
    for m in range(len(loss)):
        others = np.arange(len(loss)) != m
        inside = np.where(member[others], confidence[others], np.nan)
        outside = np.where(member[others], np.nan, confidence[others])
        spread = 0.5 * (np.nanstd(inside, axis=0) + np.nanstd(outside, axis=0)) + 1e-6
        score[m] = stats.norm.logpdf(confidence[m], np.nanmean(inside, axis=0), spread)
        score[m] -= stats.norm.logpdf(confidence[m], np.nanmean(outside, axis=0), spread)
    return auc(score.ravel(), member.ravel())


def membership(models: int, n: int, steps: int) -> tuple[float, float]:
    """Returns LiRA's AUC against models overfitted on purpose, and against private ones at epsilon 8."""
    rng = stream(3, "lira")
    x, y = friedman(n, rng)
    inputs, targets = table(x, y)
    member = np.argsort(rng.random((models, n)), axis=0) < models // 2  # every record in half of the models
    rows = [np.flatnonzero(m) for m in member]

    def squared(weights: Weights, architecture: Architecture) -> F:
        return np.asarray(np.square(architecture.forward(weights, inputs)[..., 0] - targets.y.numpy()[:, 0]))

    shadows = Architecture(ModelSpec(hidden=(64,), activation="tanh"), (TASK,), members=models)
    local = LocalTraining(lr=0.01, batch_size=n, loss="mse", clip_grad_norm=None)
    plain = trainer.train(
        shadows, shadows.initial_weights(10, 1), inputs, targets, rows, local, rates=np.full(900, local.lr), rng=stream(4, "b")
    ).weights
    one = replace(shadows, members=1)
    privacy = Privacy(unit="record", epsilon=8.0, delta=1e-3, clip=1.0)
    noise = noise_for(privacy.epsilon, privacy.delta, 1.0, steps)
    private = [
        train_private(
            one, one.initial_weights(10, m), inputs, targets, [rows[m]], local, privacy, rates=np.full(steps, 0.02),
            noise_multiplier=noise, sampling_rate=1.0,
        ).weights
        for m in range(models)
    ]  # fmt: skip
    hidden = np.concatenate([squared(w, one) for w in private])
    assert hidden[~member].mean() < 0.9 * np.square(y).mean()  # it has learned something: a model of nothing hides everybody
    return likelihood_ratios(squared(plain, shadows), member), likelihood_ratios(hidden, member)


@pytest.mark.slow
def test_membership_shows_in_overfitted_models_and_not_in_private_ones() -> None:
    overfitted, private = membership(models=16, n=300, steps=40)
    assert overfitted > 0.9
    assert private <= 0.65


@pytest.mark.slow
def test_membership_with_many_shadows() -> None:
    overfitted, private = membership(models=64, n=300, steps=120)
    assert overfitted > 0.9
    assert private <= 0.65


# --- inversion ---------------------------------------------------------------------------------------------------------

WIDTH, SITES, HIT = 12, 5, 0.1
NET = Architecture(ModelSpec(hidden=(64, 32)), (TASK,))


def somewhere(architecture: Architecture, width: int) -> Weights:
    """Weights as in the middle of a run: at the initial ones, whose last layer is zero, nothing leaks at all."""
    rng = stream(2, "w")
    start = architecture.initial_weights(width, 1)
    return {k: (v + 0.2 * rng.normal(size=v.shape)).astype(np.float32) for k, v in start.items()}


def gradient(start: Weights, x: F, y: F) -> Weights:
    """The gradient of the mean loss, as one step of SGD with a rate of 1 gives it away."""
    inputs, targets = table(x, y)
    end = trainer.train(
        NET, start, inputs, targets, [np.arange(len(x))], SGD.model_copy(update={"batch_size": max(2, len(x))}),
        rates=np.ones(1), rng=stream(0, "g"),
    ).weights  # fmt: skip
    return wts.subtract(start, end)


def ratios(opened: Weights) -> F:
    """Analytic inversion: first-layer weights over biases, a record's inputs for every unit that one record alone moves."""
    slope, bias = opened["hidden.0.weight"][0].astype(np.float64), opened["hidden.0.bias"][0, 0].astype(np.float64)
    moved = np.abs(bias) > 1e-9
    return np.asarray((slope[:, moved] / bias[moved]).T)


def matched(start: Weights, opened: Weights, records: int, steps: int) -> F:
    """Optimised inversion: inputs (and targets) whose gradient points where the opened update does; best of two starts.

    The scale of several steps' update is unknown to an attacker, the direction is not: distance and cosine both count.
    """
    wanted = torch.from_numpy(wts.flatten(opened).astype(np.float32))
    net = NET.network(WIDTH)
    parameters = {k: torch.from_numpy(v).requires_grad_() for k, v in sorted(start.items())}
    best, found = math.inf, np.zeros((records, WIDTH))
    for attempt in range(2):
        rng = torch.Generator().manual_seed(attempt)
        x = torch.randn(records, WIDTH, generator=rng).requires_grad_()
        y = torch.randn(records, 1, generator=rng).requires_grad_()
        optimizer = torch.optim.Adam([x, y], lr=0.05)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / steps)) / 2
            inputs = Inputs(x, torch.zeros(0), (1.0,))
            output = functional_call(net, parameters, (inputs, torch.arange(records)[None]))[0]
            grads = torch.autograd.grad((output - y).square().mean(), list(parameters.values()), create_graph=True)
            guess = torch.cat([g.reshape(-1) for g in grads])
            miss = (guess - wanted).square().sum() / wanted.square().sum()
            loss = miss + 1 - torch.nn.functional.cosine_similarity(guess, wanted, dim=0)
            optimizer.zero_grad()
            loss.backward(inputs=[x, y])
            optimizer.step()
        if float(loss.detach()) < best:
            best, found = float(loss.detach()), x.detach().numpy().astype(np.float64)
    return found


def hits(found: F, records: F) -> int:
    """Returns how many records some reconstruction is close to: within a tenth of a standard deviation, root mean square."""
    distance = np.sqrt(np.square(found[:, None] - records[None]).mean(axis=2))
    return int((distance.min(axis=0) < HIT).sum())


def updates(start: Weights, steps: int, local: LocalTraining) -> tuple[list[Weights], F]:
    """Returns what five sites' training of one round changes, and all their records."""
    rng = stream(7, "sites")
    tables = [friedman_like(rng) for _ in range(SITES)]
    deltas = []
    for site, (x, y) in enumerate(tables):
        inputs, targets = table(x, y)
        end = trainer.train(
            NET, start, inputs, targets, [np.arange(len(x))], local, rates=np.full(steps, local.lr), rng=stream(site, "b")
        ).weights
        deltas.append(wts.subtract(start, end))
    return deltas, np.concatenate([x for x, _ in tables])


def friedman_like(rng: np.random.Generator, n: int = 100) -> tuple[F, F]:
    x = rng.normal(size=(n, WIDTH))
    return x, np.tanh(x[:, 0] + x[:, 1] * x[:, 2]) + 0.1 * rng.normal(size=n)


def summed(parts: list[Weights]) -> Weights:
    return wts.weighted_mean(parts, [1.0 / len(parts)] * len(parts))


def test_one_records_gradient_gives_the_record_away() -> None:
    """Both attacks work where they should: else the next tests would pass for nothing."""
    start, (x, y) = somewhere(NET, WIDTH), friedman_like(stream(5, "one"), 1)
    opened = gradient(start, x, y)
    found = ratios(opened)
    assert hits(found, x) == 1
    assert float(np.median(np.abs(found - x))) < 1e-3
    assert hits(matched(start, opened, 1, 400), x) == 1


@pytest.mark.parametrize(
    ("steps", "local"),
    [
        pytest.param(20, LocalTraining(batch_size=32), id="a round of Adam"),
        pytest.param(1, SGD.model_copy(update={"batch_size": 32, "lr": 0.1}), id="one step of SGD"),
    ],
)
def test_the_opened_sum_of_five_sites_gives_no_record_away(steps: int, local: LocalTraining) -> None:
    start = somewhere(NET, WIDTH)
    deltas, records = updates(start, steps, local)
    opened = summed(deltas)
    assert hits(ratios(opened), records) == 0
    assert hits(matched(start, opened, 16, 250), records) == 0
    assert hits(matched(start, opened, 1, 250), records) == 0


def test_noise_hides_even_a_single_record() -> None:
    """The same attack on the same single record, trained privately at epsilon 8."""
    start, (x, y) = somewhere(NET, WIDTH), friedman_like(stream(5, "one"), 1)
    inputs, targets = table(x, y)
    end = train_private(
        NET, start, inputs, targets, [np.arange(1)], SGD, Privacy(unit="record", clip=1.0), rates=np.ones(1),
        noise_multiplier=noise_for(8.0, 1e-5, 1.0, 1), sampling_rate=1.0,
    ).weights  # fmt: skip
    opened = wts.subtract(start, end)
    assert hits(ratios(opened), x) == 0
    assert hits(matched(start, opened, 1, 250), x) == 0


# --- inversion of a graph network --------------------------------------------------------------------------------------

GRAPHS = Architecture(ModelSpec(hidden=(16,), graph=GraphSpec(of="crystal", width=16, layers=2)), (TASK,))
NODES = 3


def crystals(n: int, rng: np.random.Generator) -> Graphs:
    """Crystals of three atoms, each a neighbour of both others; what an atom is, is random."""
    pairs = [(a, b) for b in range(NODES) for a in range(NODES) if a != b]
    e = len(pairs)
    return Graphs(
        nodes=NODES * np.arange(n + 1),
        edges=e * np.arange(n + 1),
        node_features=rng.normal(size=(NODES * n, len(CRYSTAL_NAMES))).astype(np.float32),
        node_weight=np.ones(NODES * n, dtype=np.float32),
        source=np.tile(np.array([a for a, _ in pairs], dtype=np.int32), n),
        target=np.tile(np.array([b for _, b in pairs], dtype=np.int32), n),
        edge_features=np.zeros((e * n, 0), dtype=np.float32),
        distance=rng.uniform(1.8, 3.5, e * n).astype(np.float32),
        edge_weight=np.ones(e * n, dtype=np.float32),
    )


def crystal_sites(start: Weights, sites: int, n: int, steps: int, local: LocalTraining) -> tuple[Weights, list[Graphs], F]:
    """Returns the mean update of some sites, their crystals and the targets of the first."""
    rng = stream(11, "crystals", sites)
    parts, owned, first = [], [], np.zeros(0)
    for site in range(sites):
        graphs, y = crystals(n, rng), rng.normal(size=n)
        inputs, targets = table(np.zeros((n, 0)), y)
        end = trainer.train(
            GRAPHS, start, replace(inputs, graphs=graphs), targets, [np.arange(n)], local, rates=np.full(steps, local.lr),
            rng=stream(site, "b"),
        ).weights  # fmt: skip
        parts.append(wts.subtract(start, end))
        owned.append(graphs)
        first = y if not site else first
    return summed(parts), owned, first


def atoms(start: Weights, opened: Weights, shape: Graphs, y: float, steps: int) -> F:
    """Returns the atoms' features, ``3 x f``, whose gradient points where the opened update does.

    The attacker is given more than a real one has: the crystal's bonds and its target.
    """
    names = sorted(start)
    wanted = torch.cat([torch.from_numpy(opened[k].ravel()) for k in names])
    module = GRAPHS.network(0)
    network.load(module, start)
    net = next(m for m in module.children() if isinstance(m, gnn.GraphNetwork))
    fixed = gnn.batch(shape, [0])
    x = (0.1 * torch.randn(NODES, len(CRYSTAL_NAMES), generator=torch.Generator().manual_seed(0))).requires_grad_()
    parameters = [dict(module.named_parameters())[k] for k in names]
    optimizer = torch.optim.Adam([x], lr=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / steps)) / 2
        output = net(torch.zeros(1, 0), replace(fixed, node_features=x))
        grads = torch.autograd.grad((output - y).square().mean(), parameters, create_graph=True, materialize_grads=True)
        guess = torch.cat([g.reshape(-1) for g in grads])
        loss = 1 - torch.nn.functional.cosine_similarity(guess, wanted, dim=0)
        optimizer.zero_grad()
        loss.backward(inputs=[x])
        optimizer.step()
    return x.detach().numpy().astype(np.float64)


def likeness(found: F, graphs: list[Graphs]) -> float:
    """Returns the highest correlation of reconstructed atoms with any crystal's, over the orders of its atoms' sum."""
    guess = found.sum(axis=0)  # atoms that are alike to the network may come out in any order
    each = [g.node_features[g.nodes[k] : g.nodes[k + 1]].sum(axis=0) for g in graphs for k in range(len(g))]
    return float(max(np.corrcoef(guess, e)[0, 1] for e in each))


def test_one_crystals_gradient_tells_its_atoms_and_five_sites_sum_does_not() -> None:
    start = somewhere(GRAPHS, 0)
    one_step = SGD.model_copy(update={"batch_size": 2})
    alone, (crystal,), (y,) = crystal_sites(start, 1, 1, 1, one_step)
    exposed = likeness(atoms(start, alone, crystal, float(y), 300), [crystal])
    together, owned, first = crystal_sites(start, SITES, 20, 10, LocalTraining(batch_size=8))
    hidden = likeness(atoms(start, together, owned[0], float(first[0]), 300), owned)
    rng = stream(12, "chance")
    chance = max(likeness(rng.normal(size=(NODES, len(CRYSTAL_NAMES))), owned) for _ in range(20))
    assert exposed > 0.95
    assert max(hidden, chance) < 0.6


# --- the other thing a round opens ---------------------------------------------------------------------------------------


def test_the_gram_matrix_tells_whose_updates_are_alike() -> None:
    """Documentation of what is opened: a site that holds another's records stands out, and every update's length is known.

    Inner products of n updates of d numbers fix the updates up to one common rotation of all d-dimensional space: whose are
    alike, not what they are.
    """
    start, local = somewhere(NET, WIDTH), LocalTraining(batch_size=32)
    deltas, _ = updates(start, 20, local)
    copied = deltas[0]
    rng = stream(8, "copy")
    near = {k: (v + 0.1 * np.abs(v).mean() * rng.normal(size=v.shape)).astype(np.float32) for k, v in copied.items()}
    x = np.stack([wts.flatten(d) for d in (*deltas, near)])
    gram = x @ x.T
    length = np.sqrt(np.diag(gram))
    cosine = gram / np.outer(length, length) - 2.0 * np.eye(len(x))
    assert set(divmod(int(cosine.argmax()), len(x))) == {0, SITES}
    assert cosine[0, SITES] > 0.95
    assert np.sort(cosine.ravel())[-3] < 0.9
    turned = x[:, rng.permutation(x.shape[1])] * rng.choice([-1.0, 1.0], x.shape[1])  # one of the rotations
    np.testing.assert_allclose(turned @ turned.T, gram, rtol=1e-9, atol=1e-12)
    assert not np.allclose(turned, x)
