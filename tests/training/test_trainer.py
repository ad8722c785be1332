"""Laws of local training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat import weights as wts
from fedmat.config import LocalTraining, ModelSpec, Task
from fedmat.domain import Scaler
from fedmat.models.network import Architecture, Inputs
from fedmat.seeds import stream
from fedmat.training import trainer
from fedmat.training.trainer import Targets

TASK = Task(name="t", record_type="alloy", target="hardness_hv", unit="")
OTHER = Task(name="o", record_type="alloy", target="yield_strength_mpa", unit="megapascal")
ONE = Architecture(ModelSpec(hidden=(8,)), (TASK,))


def inputs(x: np.ndarray) -> Inputs:  # type: ignore[type-arg]
    return Inputs(torch.from_numpy(x), torch.zeros(0), (1.0, 1.0))


def targets(y: np.ndarray, bound: np.ndarray | None = None) -> Targets:  # type: ignore[type-arg]
    y = y.reshape(len(y), -1)
    nothing = np.zeros(y.shape, dtype=np.int8)
    return Targets.of(
        Scaler(np.zeros(1), np.ones(1), np.ones(1), np.zeros(1), np.ones(1)), y, nothing if bound is None else bound
    )


def data(n: int = 50) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 3)).astype(np.float32)
    return x, (x[:, 0] - 0.5 * x[:, 1]).astype(np.float64)


def fit(local: LocalTraining, steps: int = 40, architecture: Architecture = ONE, **options: object) -> trainer.Trained:
    x, y = data()
    rows = options.pop("rows", [np.arange(len(x))] * architecture.members)
    wanted = options.pop("targets", targets(y))
    return trainer.train(
        architecture, architecture.initial_weights(3, 1), inputs(x), wanted, rows, local,
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
    start = ONE.initial_weights(3, 1)
    assert wts.norm(wts.subtract(fit(LocalTraining(), steps=0).weights, start)) == 0.0


def test_training_is_a_pure_function() -> None:
    a, b = fit(LocalTraining()), fit(LocalTraining())
    assert all(np.array_equal(a.weights[k], b.weights[k]) for k in a.weights)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_loss_falls(optimizer: str) -> None:
    local = LocalTraining(optimizer=optimizer, lr=0.01 if optimizer == "adam" else 0.1)  # type: ignore[arg-type]
    assert fit(local, steps=300).loss < 0.5 * fit(local, steps=5).loss


def test_a_stronger_proximal_term_keeps_weights_closer_to_the_start() -> None:
    start = ONE.initial_weights(3, 1)
    moved = [
        wts.norm(wts.subtract(fit(LocalTraining(optimizer="sgd", lr=0.05, mu=mu), 100).weights, start))
        for mu in (0.0, 1.0, 10.0)
    ]
    assert moved[0] > moved[1] > moved[2]


def test_scaffold_with_equal_control_variates_is_plain_sgd() -> None:
    local = LocalTraining(optimizer="sgd", lr=0.05)
    zero = wts.zeros_like(ONE.initial_weights(3, 1))
    assert all(np.array_equal(v, fit(local).weights[k]) for k, v in fit(local, correction=zero).weights.items())


def test_scaffold_control_is_the_mean_gradient_when_controls_start_at_zero() -> None:
    """Option II with c = c_i = 0 and one step: the gradient itself, x - y = lr * g."""
    local = LocalTraining(optimizer="sgd", lr=0.05, clip_grad_norm=None)
    start = ONE.initial_weights(3, 1)
    end = fit(local, steps=1).weights
    zero = wts.zeros_like(start)
    control = trainer.scaffold_control(zero, zero, start, end, 1, 0.05)
    gradient = wts.add(zero, wts.subtract(start, end), scale=1 / 0.05)
    assert all(control[k] == pytest.approx(gradient[k], abs=1e-6) for k in control)


def test_the_best_weights_on_held_out_rows_are_kept() -> None:
    x, y = data()
    start = ONE.initial_weights(3, 1)
    wild = LocalTraining(optimizer="sgd", lr=500.0, clip_grad_norm=None)
    rows = [np.arange(len(x))]
    kept = trainer.train_best(
        ONE, start, inputs(x), targets(y), rows, rows, wild, rates=np.full(20, 500.0), rng=stream(0, "w"), every=5,
        keep_start=True,
    )  # fmt: skip
    assert all(np.array_equal(kept.weights[k], start[k]) for k in start)


def test_dropout_is_drawn_from_the_calls_own_stream() -> None:
    x, y = data()
    net = Architecture(ModelSpec(hidden=(8,), dropout=0.5), (TASK,))
    start = net.initial_weights(3, 1)
    runs = [
        trainer.train(
            net, start, inputs(x), targets(y), [np.arange(50)], LocalTraining(), rates=np.full(9, 1e-2), rng=stream(s, "d")
        ).weights
        for s in (1, 1, 2)
    ]
    assert all(np.array_equal(runs[0][k], runs[1][k]) for k in start)
    assert any(not np.array_equal(runs[0][k], runs[2][k]) for k in start)


def test_the_untrained_network_predicts_the_mean() -> None:
    assert ONE.forward(ONE.initial_weights(3, 1), inputs(data()[0])) == pytest.approx(np.zeros((1, 50, 1)))


# --- an ensemble ---------------------------------------------------------------------------------------------------

THREE = Architecture(ModelSpec(hidden=(8,)), (TASK,), members=3)


def test_a_member_never_learns_from_another_members_rows() -> None:
    """Member 1's weights do not change when only member 0's targets do."""
    _x, y = data()
    rows = [np.arange(0, 20), np.arange(20, 50), np.arange(20, 50)]
    other = y.copy()
    other[:20] += 5.0
    a, b = (fit(LocalTraining(), architecture=THREE, rows=rows, targets=targets(t)).weights for t in (y, other))
    for name in a:
        assert np.array_equal(a[name][1:], b[name][1:])
    assert not np.array_equal(a["last.bias"][0], b["last.bias"][0])


def test_members_start_and_end_differently() -> None:
    found = fit(LocalTraining(), architecture=THREE).weights["hidden.0.weight"]
    assert not np.allclose(found[0], found[1])


def test_a_member_stops_where_the_others_predict_their_held_out_rows_best() -> None:
    """Looks 0..2; member 0's own best look is 2, the others' rows say 1."""
    scores = [[3.0, 2.0, 2.0], [2.0, 1.0, 1.0], [1.0, 3.0, 1.5]]
    assert trainer.stopping_points(scores, [10, 10, 10]) == [1, 2, 1]
    # 1: others are members 0 and 2: sums 5, 3, 2.5; 2: members 0 and 1: 5, 3, 4
    assert trainer.stopping_points([[2.0], [1.0]], [10]) == [1]


def test_without_held_out_rows_of_others_a_member_keeps_its_last_weights() -> None:
    nan = float("nan")
    assert trainer.stopping_points([[1.0, nan], [2.0, nan]], [10, 0]) == [None, 0]
    assert trainer.stopping_points([], [0]) == [None]


def test_ruinous_training_leaves_every_member_as_it_started() -> None:
    x, y = data()
    start = THREE.initial_weights(3, 1)
    rows = [np.arange(50)] * 3
    wild = LocalTraining(optimizer="sgd", lr=500.0, clip_grad_norm=None)
    kept = trainer.train_best(
        THREE, start, inputs(x), targets(y), rows, rows, wild, rates=np.full(20, 500.0), rng=stream(0, "w"), every=5,
        keep_start=True,
    ).weights  # fmt: skip
    assert all(np.array_equal(kept[name], start[name]) for name in start)


# --- several targets, bounds ---------------------------------------------------------------------------------------


def test_a_missing_target_has_no_gradient() -> None:
    """With every second target absent, the other head is what a run on the first target alone gives it: zero."""
    _x, y = data()
    two = Architecture(ModelSpec(hidden=(8,)), (TASK, OTHER))
    both = np.column_stack([y, np.full(50, np.nan)])
    found = fit(LocalTraining(), architecture=two, targets=targets(both)).weights
    assert np.array_equal(found["last.weight"][..., 1], np.zeros((1, 8)))
    assert np.abs(found["last.weight"][..., 0]).max() > 0


def test_learned_task_weights_go_down_for_the_noisier_task() -> None:
    x, y = data(200)
    rng = np.random.default_rng(1)
    both = np.column_stack([y, 3.0 * rng.normal(size=200)])
    two = Architecture(ModelSpec(hidden=(8,), task_balance="uncertainty"), (TASK, OTHER))
    found = trainer.train(
        two, two.initial_weights(3, 1), inputs(x), targets(both), [np.arange(200)], LocalTraining(loss="mse"),
        rates=np.full(300, 1e-2), rng=stream(1, "t"),
    ).weights["balance"]  # fmt: skip
    assert found[0, 1] > found[0, 0]  # log variance


@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
def test_a_bound_costs_nothing_deep_inside_and_the_plain_loss_far_outside(loss: str) -> None:
    local = LocalTraining(loss=loss, bound_scale=0.1)  # type: ignore[arg-type]
    output = torch.tensor([[-9.0], [0.0], [9.0]])
    zero = torch.zeros(3, 1)
    left = trainer.losses(output, zero, -torch.ones(3, 1), local, "regression")
    right = trainer.losses(output, zero, torch.ones(3, 1), local, "regression")
    plain = trainer.losses(output, zero, zero, local, "regression")
    assert left[0].item() == pytest.approx(0.0, abs=1e-6)
    assert left[2].item() == pytest.approx(plain[2].item(), rel=0.1)
    assert torch.allclose(left.flip(0), right)


@given(st.floats(-5, 5), st.sampled_from(["mse", "l1", "huber"]), st.sampled_from([-1.0, 1.0]))
@settings(max_examples=60, deadline=None)
def test_the_loss_of_a_bound_pushes_towards_its_permitted_side_only(at: float, loss: str, side: float) -> None:
    output = torch.tensor([[at]], requires_grad=True)
    local = LocalTraining(loss=loss)  # type: ignore[arg-type]
    value = trainer.losses(output, torch.zeros(1, 1), torch.full((1, 1), side), local, "regression")
    value.sum().backward()
    assert value.item() >= 0.0
    assert np.isfinite(value.item())
    assert side * output.grad.item() <= 1e-6  # type: ignore[union-attr]


def test_a_bound_teaches_less_than_a_value_would() -> None:
    """All truths are stated as 'at most 0': a network that starts at -0.5 has nothing to learn from them."""
    x, _ = data()
    start = ONE.initial_weights(3, 1) | {"last.bias": np.full((1, 1, 1), -3.0, dtype=np.float32)}
    args = (ONE, start, inputs(x))
    rows = [np.arange(50)]
    kept = {
        name: trainer.train(
            *args, targets(np.zeros(50), bound), rows, LocalTraining(bound_scale=0.05), rates=np.full(40, 1e-2), rng=stream(1)
        ).weights["last.bias"]
        for name, bound in (("bound", -np.ones((50, 1), dtype=np.int8)), ("value", None))
    }
    assert kept["bound"] == pytest.approx(-3.0, abs=1e-3)
    assert kept["value"][0, 0, 0] > -2.9
