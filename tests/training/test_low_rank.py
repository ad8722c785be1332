"""Laws of training inside a basis: matrices move by ``A B`` alone, everything else as without one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedmat import weights as wts
from fedmat.config import Compression, GraphSpec, LocalTraining, ModelSpec, Task
from fedmat.domain import Scaler
from fedmat.features.graphs import molecular_graphs
from fedmat.models.network import Architecture, Inputs
from fedmat.seeds import stream
from fedmat.training import trainer
from fedmat.training.trainer import Targets
from fedmat.transport import compression
from fedmat.transport.compression import Compressor
from fedmat.weights import Weights

TASK = Task(name="t", record_type="alloy", target="hardness_hv", unit="")
NET = Architecture(ModelSpec(hidden=(24, 24)), (TASK,), members=2)
WIDTH = 20
SGD = LocalTraining(optimizer="sgd", lr=0.05, clip_grad_norm=None)


def data(n: int = 60) -> tuple[Inputs, Targets]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, WIDTH)).astype(np.float32)
    y = (x[:, 0] - 0.5 * x[:, 1]).astype(np.float64)[:, None]
    scaler = Scaler(np.zeros(1), np.ones(1), np.ones(1), np.zeros(1), np.ones(1))
    return Inputs(torch.from_numpy(x), torch.zeros(0), (1.0,)), Targets.of(scaler, y, np.zeros(y.shape, dtype=np.int8))


def first() -> Weights:
    """Weights whose last layer is not zero, so that every gradient is there from the first step."""
    start = NET.initial_weights(WIDTH, 1)
    return start | {"last.weight": stream(2, "last").normal(size=start["last.weight"].shape).astype(np.float32)}


def squeeze(start: Weights, seed: int = 5) -> Compressor:
    return Compressor.of(Compression(name="low_rank", share=0.25), start, seed)


def fit(start: Weights, local: LocalTraining = SGD, steps: int = 20, **options: Any) -> trainer.Trained:
    inputs, targets = data()
    return trainer.train(
        NET, start, inputs, targets, [np.arange(len(inputs))] * NET.members, local,
        rates=np.full(steps, local.lr), rng=stream(1, "t"), **options,
    )  # fmt: skip


@pytest.mark.parametrize("local", [SGD, LocalTraining(), LocalTraining(mu=0.5), LocalTraining(weight_decay=0.1)])
def test_training_moves_only_inside_the_span(local: LocalTraining) -> None:
    start = first()
    compressor = squeeze(start)
    delta = wts.flatten(wts.subtract(fit(start, local, basis=compressor.basis()).weights, start))
    outside = delta - compressor.expand(compressor.compress(delta))
    assert np.linalg.norm(delta) > 1e-2
    assert np.linalg.norm(outside) < 1e-5 * np.linalg.norm(delta)  # float32 weights: their rounding alone
    whole = fit(start, local).weights
    free = wts.flatten(wts.subtract(whole, start))
    lost = free - compressor.expand(compressor.compress(free))
    assert np.linalg.norm(lost) > 0.1 * np.linalg.norm(free)  # training without the basis does leave it


def test_one_step_of_gradient_descent_is_the_projected_step() -> None:
    """``dL/dB = A' dL/dW`` and unit columns: the step of ``W`` is the part of the free step along them, whatever A's scale."""
    start = first()
    basis = squeeze(start).basis()
    free, inside = fit(start, steps=1).weights, fit(start, steps=1, basis=basis).weights
    for name, value in start.items():
        expected = free[name] - value
        if name in basis:
            a = basis[name].astype(np.float64) / np.linalg.norm(basis[name], axis=0)
            expected = a @ a.T @ expected
        assert np.allclose(inside[name] - value, expected, rtol=1e-3, atol=2e-6)
    longer = fit(start, steps=1, basis={n: np.float32(3.0) * a for n, a in basis.items()}).weights
    assert all(np.allclose(longer[n], inside[n], atol=1e-6) for n in start)


def test_a_basis_of_all_directions_is_free_training() -> None:
    """``A`` orthogonal and square: gradient descent on ``B`` is gradient descent on ``W``."""
    start = first()
    basis = {n: np.eye(start[n].shape[-2], dtype=np.float32) for n in ("hidden.0.weight", "hidden.1.weight")}
    for local in (SGD, SGD.model_copy(update={"mu": 0.7}), SGD.model_copy(update={"weight_decay": 0.2}),
                  SGD.model_copy(update={"clip_grad_norm": 0.1})):  # fmt: skip
        free, inside = fit(start, local).weights, fit(start, local, basis=basis).weights
        assert all(np.allclose(free[n], inside[n], atol=2e-5) for n in free), local


def test_fedprox_pulls_back_inside_the_span() -> None:
    start = first()
    basis = squeeze(start).basis()
    free = wts.norm(wts.subtract(fit(start, SGD, basis=basis).weights, start))
    held = wts.norm(wts.subtract(fit(start, SGD.model_copy(update={"mu": 10.0}), basis=basis).weights, start))
    assert held < free


def test_frozen_tensors_stay() -> None:
    start = first()
    kept = ("hidden.0.weight", "last.weight")
    found = fit(start, LocalTraining(), basis=squeeze(start).basis(), frozen=lambda _, name: name in kept).weights
    assert all(np.array_equal(found[n], start[n]) == (n in kept) for n in start)


def test_members_do_not_touch_each_other() -> None:
    start = first()
    basis = squeeze(start).basis()
    other = {n: np.stack([v[0], 1.5 * v[1]]) for n, v in start.items()}
    a, b = fit(start, LocalTraining(), basis=basis).weights, fit(other, LocalTraining(), basis=basis).weights
    assert all(np.allclose(a[n][0], b[n][0], atol=1e-6) for n in a)


def test_a_fresh_basis_in_every_round_reaches_what_one_cannot() -> None:
    inputs, targets = data()

    def after(rounds: int, *, fresh: bool) -> float:
        w = NET.initial_weights(WIDTH, 1)
        for number in range(rounds):
            basis = squeeze(w, number if fresh else 0).basis()
            w = fit(w, LocalTraining(lr=0.01), 15, basis=basis).weights
        error = NET.forward(w, inputs).mean(axis=0) - targets.y.numpy()
        return float(np.abs(error).mean())

    assert after(12, fresh=True) < after(12, fresh=False)
    assert after(12, fresh=True) < 0.5 * after(1, fresh=True)


def test_looks_on_the_way_have_the_learned_part_in() -> None:
    start = first()
    looks: list[Weights] = []
    found = fit(
        start, LocalTraining(), 10, basis=squeeze(start).basis(), checkpoint=lambda _, w: looks.append(w), checkpoint_every=5
    )
    assert len(looks) == 2
    assert all(np.array_equal(looks[1][n], found.weights[n]) for n in start)
    assert not np.array_equal(looks[0]["hidden.0.weight"], start["hidden.0.weight"])


def test_without_steps_and_without_a_basis_nothing_changes() -> None:
    start = first()
    assert wts.norm(wts.subtract(fit(start, steps=0, basis=squeeze(start).basis()).weights, start)) == 0.0
    plain, empty = fit(start).weights, fit(start, basis={}).weights
    assert all(np.array_equal(plain[n], empty[n]) for n in plain)


def test_training_in_a_basis_is_a_pure_function() -> None:
    start = first()
    runs = [fit(start, LocalTraining(), basis=squeeze(start).basis()).weights for _ in range(2)]
    assert all(np.array_equal(runs[0][n], runs[1][n]) for n in start)


def test_scaffold_in_a_basis_is_refused() -> None:
    start = first()
    with pytest.raises(ValueError, match="SCAFFOLD"):
        fit(start, basis=squeeze(start).basis(), correction=wts.zeros_like(start))


@pytest.mark.parametrize(
    ("name", "shape"), [("hidden.9.weight", (WIDTH, 2)), ("hidden.0.weight", (WIDTH + 1, 2)), ("hidden.0.weight", (WIDTH,))]
)
def test_a_basis_of_no_tensor_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="n_in x r"):
        fit(first(), basis={name: np.ones(shape, dtype=np.float32)})


def test_graph_networks_train_inside_the_span() -> None:
    spec = ModelSpec(hidden=(16,), graph=GraphSpec(of="molecule", field="smiles", width=16, layers=1))
    net = Architecture(spec, (TASK,), members=2)
    smiles = ["CCO", "CC(=O)C", "c1ccccc1", "CCN", "COC", "CCCC", "O=C1OCCO1", "CCOC(=O)C"]
    inputs, targets = data(len(smiles))
    inputs = Inputs(inputs.x, inputs.kelvin, inputs.y_scale, molecular_graphs(smiles))
    start = net.initial_weights(WIDTH, 3)
    compressor = Compressor.of(Compression(name="low_rank", share=0.5), start, 8)
    basis = compressor.basis()
    assert {n[:2] for n in basis} == {"0.", "1."}
    trained = trainer.train(
        net, start, inputs, targets, [np.arange(len(smiles))] * 2, LocalTraining(lr=0.01),
        rates=np.full(6, 0.01), rng=stream(1, "t"), basis=basis,
    )  # fmt: skip
    delta = wts.flatten(wts.subtract(trained.weights, start))
    assert np.linalg.norm(delta) > 1e-2
    assert np.linalg.norm(delta - compressor.expand(compressor.compress(delta))) < 1e-5 * np.linalg.norm(delta)


def test_a_step_has_one_size_at_any_rank() -> None:
    """Adam moves every number of B by its learning rate, so ``A B`` moves by GAIN of them: the root mean square over signs."""
    for share in (0.25, 0.6):
        compressor = Compressor.of(Compression(name="low_rank", share=share), first(), 5)
        for a in compressor.basis().values():
            signs = stream(3, "signs", a.shape[1]).choice([-1.0, 1.0], size=(a.shape[1], 4000))
            assert np.isclose(np.sqrt(np.mean(np.square(a @ signs))), compression.GAIN, rtol=0.03)
