"""Laws of private local training: what one record can change, and what noise is on everything that leaves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from fedmat import weights as wts
from fedmat.config import GraphSpec, LocalTraining, ModelSpec, Privacy, Task
from fedmat.features.graphs import CRYSTAL_NAMES, Graphs
from fedmat.models import network
from fedmat.models.network import Architecture, Inputs
from fedmat.privacy.accounting import Event, epsilon
from fedmat.privacy.mechanisms import Noise
from fedmat.seeds import stream
from fedmat.training import private, trainer
from fedmat.training.private import record_gradients, train_private
from fedmat.training.trainer import Targets
from fedmat.weights import Weights

TASK = Task(name="t", record_type="alloy", target="hardness_hv", unit="")
OTHER = Task(name="o", record_type="alloy", target="yield_strength_mpa", unit="megapascal")
WARM = Task(
    name="w", record_type="liquid_electrolyte", target="conductivity_s_cm", unit="S/cm", transform="log10", law="arrhenius"
)
ONE = Architecture(ModelSpec(hidden=(8,)), (TASK,))
SGD = LocalTraining(optimizer="sgd", lr=1.0, loss="mse", clip_grad_norm=None)
ALMOST_NOTHING = 1e-12  # of noise, relative to a clip of 1e6


def settings(clip: float = 1.0) -> Privacy:
    return Privacy(unit="record", clip=clip)


def inputs(n: int = 40, width: int = 3, graphs: Graphs | None = None, tasks: int = 1) -> Inputs:
    x = stream(0, "x").normal(size=(n, width)).astype(np.float32)
    kelvin = stream(0, "k").uniform(260.0, 360.0, n).astype(np.float32)
    return Inputs(torch.from_numpy(x), torch.from_numpy(kelvin), (1.0,) * tasks, graphs)


def targets(n: int = 40, tasks: int = 1, missing: float = 0.0) -> Targets:
    rng = stream(1, "y")
    y = rng.normal(size=(n, tasks)).astype(np.float32)
    y[rng.random((n, tasks)) < missing] = np.nan
    bound = (rng.random((n, tasks)) < 0.2).astype(np.float32)
    return Targets(torch.from_numpy(y), torch.from_numpy(bound))


def somewhere(architecture: Architecture, width: int = 3) -> Weights:
    """Weights at which every layer has a gradient; the initial last layer is zero."""
    rng = stream(2, "w")
    start = architecture.initial_weights(width, 1)
    return {k: (v + 0.3 * rng.normal(size=v.shape)).astype(np.float32) for k, v in start.items()}


def crystals(n: int) -> Graphs:
    """Small graphs with 2 to 4 nodes; the last record has none."""
    rng = stream(3, "g")
    sizes = [*(2 + k % 3 for k in range(n - 1)), 0]
    nodes = np.concatenate([[0], np.cumsum(sizes)])
    source, target, edges = [], [], [0]
    for size in sizes:
        pairs = [(a, b) for b in range(size) for a in range(size) if a != b]  # sorted by target
        source += [a for a, _ in pairs]
        target += [b for _, b in pairs]
        edges.append(len(source))
    n, e = int(nodes[-1]), len(source)
    return Graphs(
        nodes=nodes,
        edges=np.array(edges),
        node_features=rng.normal(size=(n, len(CRYSTAL_NAMES))).astype(np.float32),
        node_weight=np.ones(n, dtype=np.float32),
        source=np.array(source, dtype=np.int32),
        target=np.array(target, dtype=np.int32),
        edge_features=np.zeros((e, 0), dtype=np.float32),
        distance=rng.uniform(1.5, 4.0, e).astype(np.float32),
        edge_weight=np.ones(e, dtype=np.float32),
    )


def run(
    start: Weights,
    rows: trainer.Rows,
    *,
    architecture: Architecture = ONE,
    local: LocalTraining = SGD,
    clip: float = 1.0,
    noise: float = ALMOST_NOTHING,
    rate: float = 1.0,
    steps: int = 1,
    seed: int | None = 1,
    of: Inputs | None = None,
    y: Targets | None = None,
) -> Weights:
    found = train_private(
        architecture, start, of or inputs(), y or targets(), [rows], local, settings(clip), rates=np.full(steps, local.lr),
        noise_multiplier=noise, sampling_rate=rate, insecure_seed=seed,
    )  # fmt: skip
    assert math.isnan(found.loss)
    return found.weights


def directly(
    architecture: Architecture,
    start: Weights,
    rows: trainer.Rows,
    of: Inputs,
    y: Targets,
    local: LocalTraining,
) -> Weights:
    """The gradient of the summed loss, by one backward pass."""
    net = architecture.network(of.x.shape[1])
    network.load(net, start)
    at = torch.from_numpy(rows)
    each = trainer.losses(net(of, at[None])[0], y.y[at], y.bound[at], local, "regression")
    balance = getattr(net, "balance", None)
    if balance is not None:
        each = torch.where(torch.isfinite(y.y[at]), torch.exp(-balance) * each + balance, 0.0)
    each.sum().backward()
    return {k: p.grad.numpy().astype(np.float32) for k, p in net.named_parameters()}  # type: ignore[union-attr]


ARCHITECTURES = {
    "plain": ONE,
    "private parts": Architecture(ModelSpec(hidden=(8, 4), activation="tanh"), (TASK,), private=("head", "norm")),
    "law": Architecture(ModelSpec(hidden=(8,)), (WARM,)),
    "two tasks": Architecture(ModelSpec(hidden=(8,), task_balance="uncertainty"), (TASK, OTHER)),
    "no hidden layer": Architecture(ModelSpec(hidden=()), (TASK,)),
    "graph": Architecture(ModelSpec(hidden=(8,), graph=GraphSpec(of="crystal", width=4, layers=2)), (TASK,)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_without_noise_and_clipping_it_is_the_gradient_of_the_summed_loss(name: str, loss: str) -> None:
    architecture = ARCHITECTURES[name]
    n, tasks = 24, len(architecture.tasks)
    of = inputs(n, tasks=tasks, graphs=crystals(n) if name == "graph" else None)
    y = targets(n, tasks, missing=0.3)
    local = SGD.model_copy(update={"loss": loss})
    start, rows = somewhere(architecture), np.arange(2, n)
    end = run(start, rows, architecture=architecture, local=local, clip=1e6, of=of, y=y)
    step = wts.subtract(start, end)
    wanted = directly(architecture, start, rows, of, y, local)
    for k in start:
        np.testing.assert_allclose(step[k] * len(rows), wanted[k], rtol=2e-4, atol=2e-4)


def test_it_divides_by_the_expected_number_of_records_and_not_by_those_drawn() -> None:
    """At rate 0.5 over 40 rows the divisor is 20, whatever number comes up; the draw itself is that of the seed."""
    start = somewhere(ONE)
    for seed in range(5):
        drawn = np.flatnonzero(Noise(insecure_seed=seed).chosen(40, 0.5))
        step = wts.subtract(start, run(start, np.arange(40), clip=1e6, rate=0.5, seed=seed))
        wanted = directly(ONE, start, drawn, inputs(), targets(), SGD)
        for k in start:
            np.testing.assert_allclose(step[k] * 20, wanted[k], rtol=1e-3, atol=1e-4)
    assert len({int(Noise(insecure_seed=s).chosen(40, 0.5).sum()) for s in range(5)}) > 1


@pytest.mark.parametrize("name", ["plain", "two tasks", "law"])
def test_one_record_moves_the_weights_by_at_most_its_share(name: str) -> None:
    """Neighbouring data, the same noise: the difference of two SGD steps is within clip / expected records."""
    architecture = ARCHITECTURES[name]
    of, with_it = inputs(tasks=len(architecture.tasks)), targets(tasks=len(architecture.tasks))
    with_it.y[0] = 1e6  # as wild a record as there can be
    without = Targets(with_it.y.clone(), with_it.bound)
    without.y[0] = math.nan  # as good as removed, and every other draw stays what it was
    start, clip, rate = somewhere(architecture), 0.7, 0.5
    seed = next(s for s in range(9) if Noise(insecure_seed=s).chosen(40, rate)[0])  # the record is drawn
    a, b = (
        run(start, np.arange(40), architecture=architecture, clip=clip, noise=2.0, rate=rate, seed=seed, of=of, y=y)
        for y in (with_it, without)
    )
    difference = float(np.linalg.norm(wts.flatten(wts.subtract(a, b))))
    assert difference <= clip / 20 * (1 + 1e-3)
    assert difference == pytest.approx(clip / 20, rel=1e-3)  # the bound is met: the test could fail


def test_clipping_is_per_record_and_not_of_the_sum() -> None:
    start, clip = somewhere(ONE), 1e-3
    net = ONE.network(3)
    network.load(net, start)
    grads = torch.cat([g.flatten(1) for g in record_gradients(ONE, net, inputs(), targets(), torch.arange(40), SGD)], dim=1)
    wanted = (grads * (clip / grads.norm(dim=1, keepdim=True)).clamp(max=1.0)).sum(dim=0)
    step = wts.flatten(wts.subtract(start, run(start, np.arange(40), clip=clip, noise=1e-9))) * 40
    assert np.linalg.norm(step - wanted.numpy()) < 0.02 * np.linalg.norm(step)
    assert np.linalg.norm(step) < 40 * clip


@pytest.mark.parametrize("steps", [1, 7])
def test_released_noise_has_the_variance_that_was_accounted_for(steps: int) -> None:
    """Records without targets add nothing, so what is released is noise alone: steps * (rate of learning * z * clip / expected)^2.

    Half the noise, or one step fewer, would not pass.
    """
    wide = Architecture(ModelSpec(hidden=(100,)), (TASK,))
    start = wide.initial_weights(200, 1)
    y = Targets(torch.full((30, 1), math.nan), torch.zeros(30, 1))
    z, clip, rate, lr = 1.5, 0.4, 0.5, 0.2
    local = SGD.model_copy(update={"lr": lr})
    end = run(
        start, np.arange(30), architecture=wide, local=local, clip=clip, noise=z, rate=rate, steps=steps, seed=None,
        of=inputs(30, 200), y=y,
    )  # fmt: skip
    found = wts.flatten(wts.subtract(end, start)) / (lr * z * clip / (rate * 30))
    low, high = stats.chi2.ppf([1e-6, 1 - 1e-6], len(found))
    total = float(np.square(found).sum())
    assert low < total / steps < high
    assert not low < total / 4 / steps < high
    assert not low < total / (steps + 1) < high
    assert stats.kstest(found / math.sqrt(steps), "norm").pvalue > 1e-6


def test_steps_taken_are_steps_accounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    class Counted(Noise):
        def normal(self, *shape: int) -> wts.Vector:
            drawn.append("noise")
            return super().normal(*shape)

        def chosen(self, n: int, rate: float) -> NDArray[np.bool_]:
            drawn.append("records")
            return super().chosen(n, rate)

    monkeypatch.setattr(private, "Noise", Counted)
    start = somewhere(ONE)
    run(start, np.arange(40), noise=1.0, rate=0.001, steps=9)  # most draws are empty: they are steps as well
    event = Event(1.0, 0.001, 9)
    assert drawn.count("records") == event.steps
    assert drawn.count("noise") == event.steps * len(start)
    assert epsilon([event], 1e-5) > 0


def test_pieces_of_a_draw_get_one_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    start = somewhere(ONE)
    whole = run(start, np.arange(40), noise=1.0, steps=3, rate=0.6)
    monkeypatch.setattr(private, "_AT_A_TIME", 7 * sum(v.size for v in start.values()))
    parts = run(start, np.arange(40), noise=1.0, steps=3, rate=0.6)
    for k in start:
        np.testing.assert_allclose(parts[k], whole[k], atol=1e-5)


def test_two_runs_differ_and_a_seeded_one_repeats() -> None:
    start = somewhere(ONE)
    a, b = (run(start, np.arange(40), noise=1.0, seed=None) for _ in range(2))
    assert all(not np.array_equal(a[k], b[k]) for k in start)
    a, b = (run(start, np.arange(40), noise=1.0, seed=3, rate=0.5, steps=4) for _ in range(2))
    assert all(np.array_equal(a[k], b[k]) for k in start)


def test_a_missing_target_adds_nothing() -> None:
    start, y = somewhere(ONE), targets()
    y.y[:39] = math.nan
    step = wts.subtract(start, run(start, np.arange(40), clip=1e6, y=y))
    wanted = directly(ONE, start, np.array([39]), inputs(), targets(), SGD)
    for k in start:
        np.testing.assert_allclose(step[k] * 40, wanted[k], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("wild", [math.inf, 3e38])
def test_a_record_without_a_finite_gradient_adds_nothing_and_stops_nothing(wild: float) -> None:
    start, of = somewhere(ONE), inputs()
    rest = run(start, np.arange(1, 40), noise=1e-9, of=of)
    of.x[0] = wild
    end = run(start, np.arange(40), noise=1e-9, of=of)
    assert wts.is_finite(end)
    a, b = wts.subtract(start, end), wts.subtract(start, rest)
    for k in start:
        np.testing.assert_allclose(a[k] * 40, b[k] * 39, atol=1e-4)


def test_the_proximal_term_is_added_after_the_noise_and_is_not_clipped() -> None:
    """Two steps of almost no gradient: the second pulls back by mu times what noise moved in the first."""
    start = somewhere(ONE)
    y = Targets(torch.full((40, 1), math.nan), torch.zeros(40, 1))
    pulled = SGD.model_copy(update={"mu": 0.25})
    first = wts.subtract(run(start, np.arange(40), noise=100.0, y=y, steps=1), start)
    free = run(start, np.arange(40), noise=100.0, y=y, steps=2)
    tied = run(start, np.arange(40), noise=100.0, y=y, steps=2, local=pulled)
    for k in start:
        np.testing.assert_allclose(free[k] - tied[k], 0.25 * first[k], rtol=1e-3, atol=1e-4)


def test_it_learns_with_adam_under_a_moderate_budget() -> None:
    n = 400
    of = inputs(n)
    y = Targets((of.x[:, :1] - 0.5 * of.x[:, 1:2]).clone(), torch.zeros(n, 1))
    local = LocalTraining(lr=0.02)
    start = ONE.initial_weights(3, 1)
    end = run(start, np.arange(n), local=local, noise=1.0, rate=0.2, steps=100, of=of, y=y)
    error = [float(np.abs(ONE.forward(w, of)[0] - y.y.numpy()).mean()) for w in (start, end)]
    assert error[1] < 0.5 * error[0]


def test_zero_steps_change_nothing() -> None:
    start = somewhere(ONE)
    assert wts.norm(wts.subtract(run(start, np.arange(40), steps=0), start)) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": Architecture(ModelSpec(hidden=(8,)), (TASK,), members=2)}, "one network"),
        ({"architecture": Architecture(ModelSpec(hidden=(8,), dropout=0.1), (TASK,))}, "dropout"),
        ({"noise": 0.0}, "noise_multiplier"),
        ({"rate": 0.0}, "sampling_rate"),
        ({"rate": 1.5}, "sampling_rate"),
        ({"rows": np.zeros(0, dtype=np.int64)}, "no rows"),
        ({"rows": np.array([3, 4, 3])}, "twice"),
        ({"start": {k: v * np.float32(np.nan) for k, v in ONE.initial_weights(3, 1).items()}}, "not finite"),
    ],
)
def test_what_has_no_guarantee_is_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"start": somewhere(ONE), "rows": np.arange(40), "noise": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        run(**arguments)  # type: ignore[arg-type]


def test_another_unit_than_the_record_is_refused() -> None:
    with pytest.raises(ValueError, match="unit"):
        train_private(
            ONE, somewhere(ONE), inputs(), targets(), [np.arange(40)], SGD, Privacy(), rates=np.ones(1), noise_multiplier=1.0,
            sampling_rate=1.0,
        )  # fmt: skip
