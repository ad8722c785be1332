"""Laws of local training."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat import weights as wts
from fedmat.config import LocalTraining, ModelSpec
from fedmat.models import mlp
from fedmat.seeds import stream
from fedmat.training import trainer

SPEC = ModelSpec(hidden=(8,))


def data(n: int = 50) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 3)).astype(np.float32)
    return x, (x[:, 0] - 0.5 * x[:, 1]).astype(np.float32)


def fit(local: LocalTraining, steps: int = 40, **options: object) -> trainer.Trained:
    x, y = data()
    return trainer.train(
        SPEC, mlp.initial_weights(SPEC, 3, 1), x, y, local, kind="regression",
        rates=np.full(steps, local.lr), rng=stream(1, "t"), **options,
    )  # type: ignore[arg-type]  # fmt: skip


@given(st.integers(2, 60), st.integers(2, 70), st.integers(1, 40))
@settings(max_examples=50)
def test_batches_never_repeat_a_row_inside_one_epoch(n: int, size: int, steps: int) -> None:
    rows = trainer.batches(n, size, steps, stream(0, "b"))
    size = min(n, size)
    assert rows.shape == (steps, size)
    per_epoch = n // size
    for start in range(0, steps - per_epoch + 1, per_epoch):
        epoch = rows[start : start + per_epoch].ravel()
        assert len(set(epoch.tolist())) == len(epoch)
    assert rows.min() >= 0
    assert rows.max() < n


def test_zero_steps_change_nothing() -> None:
    start = mlp.initial_weights(SPEC, 3, 1)
    assert wts.norm(wts.subtract(fit(LocalTraining(), steps=0).weights, start)) == 0.0


def test_training_is_a_pure_function() -> None:
    a, b = fit(LocalTraining()), fit(LocalTraining())
    assert all(np.array_equal(a.weights[k], b.weights[k]) for k in a.weights)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_loss_falls(optimizer: str) -> None:
    local = LocalTraining(optimizer=optimizer, lr=0.01 if optimizer == "adam" else 0.1)  # type: ignore[arg-type]
    assert fit(local, steps=300).loss < 0.5 * fit(local, steps=5).loss


def test_a_stronger_proximal_term_keeps_weights_closer_to_the_start() -> None:
    start = mlp.initial_weights(SPEC, 3, 1)
    moved = [
        wts.norm(wts.subtract(fit(LocalTraining(optimizer="sgd", lr=0.05, mu=mu), 100).weights, start))
        for mu in (0.0, 1.0, 10.0)
    ]
    assert moved[0] > moved[1] > moved[2]


def test_scaffold_with_equal_control_variates_is_plain_sgd() -> None:
    local = LocalTraining(optimizer="sgd", lr=0.05)
    zero = wts.zeros_like(mlp.initial_weights(SPEC, 3, 1))
    assert all(np.array_equal(v, fit(local).weights[k]) for k, v in fit(local, correction=zero).weights.items())


def test_scaffold_control_is_the_mean_gradient_when_controls_start_at_zero() -> None:
    """Option II with c = c_i = 0 and one step: the gradient itself, x - y = lr * g."""
    local = LocalTraining(optimizer="sgd", lr=0.05, clip_grad_norm=None)
    start = mlp.initial_weights(SPEC, 3, 1)
    end = fit(local, steps=1).weights
    zero = wts.zeros_like(start)
    control = trainer.scaffold_control(zero, zero, start, end, 1, 0.05)
    gradient = wts.add(zero, wts.subtract(start, end), scale=1 / 0.05)
    assert all(control[k] == pytest.approx(gradient[k], abs=1e-6) for k in control)


def test_the_best_weights_on_validation_are_kept() -> None:
    x, y = data()
    start = mlp.initial_weights(SPEC, 3, 1)
    wild = LocalTraining(optimizer="sgd", lr=500.0, clip_grad_norm=None)
    kept = trainer.train_best(
        SPEC, start, (x, y), (x, y), wild, kind="regression", rates=np.full(20, 500.0), rng=stream(0, "w"), every=5,
        keep_start=True,
    )  # fmt: skip
    assert all(np.array_equal(kept.weights[k], start[k]) for k in start)


def test_dropout_is_drawn_from_the_calls_own_stream() -> None:
    x, y = data()
    spec = ModelSpec(hidden=(8,), dropout=0.5)
    start = mlp.initial_weights(spec, 3, 1)
    runs = [
        trainer.train(spec, start, x, y, LocalTraining(), kind="regression", rates=np.full(9, 1e-2), rng=stream(s, "d")).weights
        for s in (1, 1, 2)
    ]
    assert all(np.array_equal(runs[0][k], runs[1][k]) for k in start)
    assert any(not np.array_equal(runs[0][k], runs[2][k]) for k in start)


def test_the_untrained_network_predicts_the_mean() -> None:
    assert mlp.forward(SPEC, mlp.initial_weights(SPEC, 3, 1), data()[0]) == pytest.approx(np.zeros(50))
