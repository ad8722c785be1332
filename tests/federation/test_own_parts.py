"""Laws of the rounds beyond one network on one task: averages, private parts, several tasks, bounds, laws of temperature."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from consortium import SITES, config, coordinator, handlers, run, setup, table, worker

from fedmat import baselines, wire
from fedmat.domain import (
    Attestation,
    Baseline,
    BaselineRequest,
    CalibrateRequest,
    Calibration,
    Checkpoint,
    EvaluateRequest,
    Statistics,
    TrainRequest,
    Update,
)
from fedmat.errors import FedmatError, SiteRefused
from fedmat.features.table import TEST, TRAIN, FeatureTable
from fedmat.federation.engine import InProcessEngine
from fedmat.federation.evaluation import metrics
from fedmat.federation.plan import Plan
from fedmat.federation.site import state_folder
from fedmat.models import laws
from fedmat.models.network import Architecture
from fedmat.seeds import stream

PAIR = SITES[:2]
FEDREP = {"finetune_steps": 8, "private": ["head"], "head_steps": 2}
FEDBN = {"finetune_steps": 8, "private": ["norm"]}


def checkpoint(folder: Path) -> Checkpoint:
    return wire.decode((folder / "run/checkpoint.safetensors").read_bytes(), Checkpoint)


# --- the model of the last rounds, and the schedule ------------------------------------------------------------------


def test_the_averaged_model_is_the_mean_of_the_last_rounds_weights_and_changes_no_round(tmp_path: Path) -> None:
    settings = config(PAIR, average_last=3)
    after, reports = [], []
    for report in coordinator(settings, tmp_path / "a").run(InProcessEngine(handlers(settings, tmp_path / "a"))):
        after.append(checkpoint(tmp_path / "a").weights)
        reports.append(report)
    model = coordinator(settings, tmp_path / "a").model()
    for name, value in model.weights.items():
        assert value == pytest.approx(np.mean([w[name] for w in after[1:]], axis=0), rel=1e-5, abs=1e-7)
    assert reports[-1].model_sha256 == wire.weights_digest(model.weights, model.scaler)
    assert reports[0].model_sha256 == wire.weights_digest(after[0], model.scaler), "before the average begins it is the last"
    plain = run(config(PAIR), tmp_path / "b")[1]
    assert wire.weights_digest(plain.weights, plain.scaler) == wire.weights_digest(after[-1], model.scaler)


def test_the_step_schedule_halves_the_rate_down_to_its_floor(tmp_path: Path) -> None:
    settings = config(PAIR, rounds=8, schedule={"kind": "step", "step_every": 2, "final_factor": 0.2})
    plan = Plan.of(settings)
    assert [plan.factor(r) for r in range(8)] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.2, 0.2]
    assert [r.lr for r in run(settings, tmp_path)[0]] == [plan.lr(r) for r in range(8)]
    warm = Plan.of(config(rounds=6, schedule={"kind": "step", "step_every": 2, "warmup_rounds": 1, "final_factor": 0.01}))
    assert [warm.factor(r) for r in range(6)] == [0.5, 1.0, 1.0, 0.5, 0.5, 0.25]


def test_local_steps_grow_to_their_last_factor_and_a_model_alone_takes_the_same_steps() -> None:
    plan = Plan.of(config(rounds=4, schedule={"final_steps_factor": 2.0}))
    assert [plan.steps(r) for r in range(4)] == [6, 8, 10, 12]
    assert len(plan.rates()) == 36 and len(plan.rates(3)) == 108
    assert plan.rates()[-1] == plan.lr(3)


# --- what a site keeps to itself ---------------------------------------------------------------------------------------


def kept(folder: Path, plan: Plan, site: str, number: int) -> dict[str, np.ndarray]:
    path = state_folder(folder / "sites" / site, plan) / f"private-{number:05d}.safetensors"
    return wire.decode(path.read_bytes(), Update).delta


@pytest.fixture(scope="module", params=[FEDREP, FEDBN], ids=["head", "norm"])
def private(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A consortium of companies with private parts after all its rounds, and every message its sites sent."""
    folder = tmp_path_factory.mktemp("private")
    settings = config(PAIR, simulated=False, personalization=request.param)
    said: list[tuple[bytes, bytes]] = []

    def heard(handle):  # type: ignore[no-untyped-def]
        def handler(data: bytes) -> bytes:
            reply = handle(data)
            said.append((data, reply))
            return reply

        return handler

    bad = dict.fromkeys(PAIR, heard)
    _, model = run(settings, folder, bad)
    baselines.own_models(InProcessEngine(handlers(settings, folder, bad)), Plan.of(settings), model, PAIR)
    return settings, folder, model, said


def test_every_site_ends_with_a_private_part_of_its_own(private) -> None:  # type: ignore[no-untyped-def]
    settings, folder, model, _ = private
    plan = Plan.of(settings)
    architecture = Architecture.of(plan.model, plan.tasks, plan.settings)
    parts = [kept(folder, plan, site, 3) for site in PAIR]
    assert set(parts[0]) == set(parts[1]) == {n for n in model.weights if architecture.is_private(n)} != set()
    assert all((parts[0][n] != parts[1][n]).any() for n in parts[0])


def test_a_private_part_leaves_as_the_change_in_an_update_and_in_no_other_message(private) -> None:  # type: ignore[no-untyped-def]
    """What a coordinator learns of it: received weights plus delta, the same as of every other tensor, and nothing later."""
    settings, folder, _, said = private
    plan = Plan.of(settings)
    rounds = 0
    for data, reply in said:
        try:
            request, update = wire.decode(data, TrainRequest), wire.decode(reply, Update)
        except FedmatError:
            assert b"last." not in reply and b"norm." not in reply
            continue
        rounds += 1
        for name, value in kept(folder, plan, update.site, update.round).items():
            assert request.weights[name] + update.delta[name] == pytest.approx(value, abs=1e-6)
    assert rounds == 8
    assert {type(wire.decode(r, Baseline | Update | Attestation | Statistics | Calibration)) for _, r in said} == {
        Baseline, Update, Attestation, Statistics, Calibration,
    }  # fmt: skip


def test_a_site_trains_on_its_own_private_part_whatever_is_sent(private) -> None:  # type: ignore[no-untyped-def]
    settings, folder, _, said = private
    plan = Plan.of(settings)
    data, reply = next((d, r) for d, r in said if b"TrainRequest" in d and wire.decode(d, TrainRequest).round == 2)
    request, update = wire.decode(data, TrainRequest), wire.decode(reply, Update)
    names = set(kept(folder, plan, update.site, 1))
    forged = {n: v + np.float32(0.5) if n in names else v for n, v in request.weights.items()}
    digest = wire.weights_digest(forged, request.scaler)
    asked = dataclasses.replace(request, weights=forged, model_sha256=digest)
    again = wire.decode(handlers(settings, folder)[update.site](wire.encode(asked)), Update)
    assert again.train_loss == update.train_loss
    assert (again.validation == update.validation).all()
    for name in request.weights:
        assert forged[name] + again.delta[name] == pytest.approx(request.weights[name] + update.delta[name], abs=1e-6)
    handlers(settings, folder)[update.site](data)  # leaves the site's state as it was


# --- several tasks -----------------------------------------------------------------------------------------------------

YIELD = {"name": "yield", "record_type": "alloy", "target": "yield_strength_mpa", "unit": "MPa", "transform": "identity"}
THREE = SITES[:3]


def two_tasks(site: str) -> FeatureTable:
    """``ash`` states the second target only, ``birch`` the first only, ``cedar`` both."""
    one = table(site)
    y = np.column_stack([one.y[:, 0], 3.0 * one.y[:, 0] + one.x[:, 2] + 40.0])
    y[:, 0] = np.nan if site == "ash" else y[:, 0]
    y[:, 1] = np.nan if site == "birch" else y[:, 1]
    return dataclasses.replace(one, y=y, bound=np.zeros(y.shape, dtype=np.int8))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("tasks")
    settings = config(THREE, auxiliary=(YIELD,), rounds=25, ensemble=2)
    data = {s: two_tasks(s) for s in THREE}
    _, model = run(settings, folder, data=data)
    return settings, data, model, InProcessEngine(handlers(settings, folder, data=data)), folder


def test_a_site_without_a_label_of_the_main_task_takes_part_and_says_so(tasks) -> None:  # type: ignore[no-untyped-def]
    _, data, model, _, folder = tasks
    labels = {s: a["labels"] for s, a in setup(folder)["attestations"].items()}
    train = {s: int((t.split == TRAIN).sum()) for s, t in data.items()}
    assert labels == {"ash": [0, train["ash"]], "birch": [train["birch"], 0], "cedar": [train["cedar"]] * 2}
    for at, sites in enumerate((("birch", "cedar"), ("ash", "cedar"))):
        known = np.concatenate([data[s].part(TRAIN).y[:, at] for s in sites])
        assert model.scaler.y_mean[at] == pytest.approx(known.mean()) and model.scaler.y_scale[at] == pytest.approx(known.std())


def test_both_tasks_are_learned_and_scored_on_the_rows_that_state_them(tasks) -> None:  # type: ignore[no-untyped-def]
    settings, data, model, engine, _ = tasks
    plan = Plan.of(settings)
    for at, task in enumerate(plan.tasks):
        found = {
            arm.name: baselines.score(engine, plan, arm, THREE, target=task.target)
            for arm in (baselines.Arm("federated", model.weights, model.scaler), baselines.dummy(model))
        }
        for e in found["federated"]:
            assert e.target == task.target and e.sums[0] == np.isfinite(data[e.site].part(TEST).y[:, at]).sum()
        mae = {name: metrics(parts, "regression")["mae"] for name, parts in found.items()}
        assert mae["federated"] < 0.8 * mae["dummy"], task.target


def test_a_site_without_a_main_label_still_gets_a_personal_model_judged_on_what_it_states(tasks) -> None:  # type: ignore[no-untyped-def]
    settings, _, model, engine, _ = tasks
    own = baselines.own_models(engine, Plan.of(settings), model, THREE)
    personal = {site: found[-1] for site, found in own.items()}
    assert personal["ash"].evaluation.sums[0] == 0 and personal["ash"].auxiliary[0].sums[0] > 0
    assert personal["ash"].mixture == {"federated": 0.0, "local": 0.0, "finetuned": 1.0}, "no error of its own to mix by"
    assert personal["birch"].evaluation.sums[0] > 0 and personal["birch"].auxiliary[0].sums[0] == 0
    assert all(sum(b.mixture.values()) == pytest.approx(1.0) for b in personal.values())


def test_an_unknown_task_is_refused_and_named(tasks) -> None:  # type: ignore[no-untyped-def]
    settings, _, model, engine, _ = tasks
    request = EvaluateRequest(Plan.of(settings).sha256, "x", model.weights, model.scaler, "test", "colour")
    (got,) = engine.broadcast(request, ("ash",), 60.0)
    assert got.answer.reason == "refused" and "no task 'colour'" in got.answer.detail


def statistics(change):  # type: ignore[no-untyped-def]
    def wrap(handle):  # type: ignore[no-untyped-def]
        def handler(data: bytes) -> bytes:
            reply = handle(data)
            return wire.encode(change(wire.decode(reply, Statistics))) if b"StatisticsRequest" in data else reply

        return handler

    return wrap


def _one_label_more(s: Statistics) -> Statistics:
    target = s.target.copy()
    target[1, 0] += 1.0
    return dataclasses.replace(s, target=target)


@pytest.mark.parametrize(
    "change",
    [
        _one_label_more,
        lambda s: dataclasses.replace(s, target=s.target[:1]),
        lambda s: dataclasses.replace(s, target=np.full_like(s.target, np.nan)),
        lambda s: dataclasses.replace(s, count=s.count + 1000.0),
    ],
    ids=["a label more", "a task less", "NaN", "more rows"],
)
def test_a_site_whose_sums_disagree_with_its_attested_labels_is_left_out_with_the_reason(change, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    settings = config(THREE, auxiliary=(YIELD,), rounds=1)
    data = {s: two_tasks(s) for s in THREE}
    _, model = run(settings, tmp_path, {"cedar": statistics(change)}, data=data)
    (failure,) = setup(tmp_path)["failures"]
    assert failure["site"] == "cedar" and "do not fit what it attested" in failure["detail"]
    assert model.scaler.y_mean[0] == pytest.approx(data["birch"].part(TRAIN).y[:, 0].mean())


def test_labels_of_another_number_of_tasks_stop_the_run(tmp_path: Path) -> None:
    def wrap(handle):  # type: ignore[no-untyped-def]
        def handler(data: bytes) -> bytes:
            reply = handle(data)
            if b"AttestRequest" not in data:
                return reply
            return wire.encode(dataclasses.replace(wire.decode(reply, Attestation), labels=(3,)))

        return handler

    with pytest.raises(SiteRefused, match=r"cedar: attests labels of another number of tasks than the plan's 2") as error:
        run(config(THREE, auxiliary=(YIELD,)), tmp_path, {"cedar": wrap}, data={s: two_tasks(s) for s in THREE})
    assert "consortium.yaml" in str(error.value.fix)


# --- bounds ------------------------------------------------------------------------------------------------------------


def bounded(site: str, *, told: bool) -> FeatureTable:
    """Half the training rows know no more than that the target lies below a value three units above it."""
    one = table(site, rows=120)
    rows = (stream(1, "bounded", site).random(len(one)) < 0.5) & (one.split == TRAIN)
    y = np.where(rows[:, None], one.y + 3.0, one.y)
    return dataclasses.replace(one, y=y, bound=np.where(told, -rows.astype(np.int8), 0)[:, None].astype(np.int8))


def test_a_bound_reaches_the_training_and_teaches_better_than_a_value_at_it(tmp_path: Path) -> None:
    error = {}
    for told in (True, False):
        data = {s: bounded(s, told=told) for s in PAIR}
        settings = config(PAIR, rounds=25, local={"steps": 20, "batch_size": 32, "lr": 1e-2})
        _, model = run(settings, tmp_path / str(told), data=data)
        engine = InProcessEngine(handlers(settings, tmp_path / str(told), data=data))
        arm = baselines.Arm("federated", model.weights, model.scaler)
        error[told] = metrics(baselines.score(engine, Plan.of(settings), arm, PAIR), "regression")["mae"]
    assert error[True] < 0.5 * error[False]


def test_a_bound_that_is_kept_is_no_error_when_intervals_are_calibrated(tmp_path: Path) -> None:
    one = table("ash")
    far = dataclasses.replace(one, y=one.y + 100.0, bound=np.full(one.y.shape, -1, dtype=np.int8))
    settings = config(PAIR, ensemble=3)
    model = run(settings, tmp_path)[1]
    request = CalibrateRequest(Plan.of(settings).sha256, model.weights, model.scaler)
    sketches = [
        wire.decode(worker("ash", settings, tmp_path, t).handle(wire.encode(request)), Calibration).sketch
        for t in (far, dataclasses.replace(far, bound=-far.bound))
    ]
    learning = one.part(0, 1)
    assert sketches[0][0] == pytest.approx(sketches[0].sum()) == pytest.approx(len(np.unique(learning.group)))
    assert sketches[1][0] == 0.0


# --- laws of temperature -------------------------------------------------------------------------------------------------

SOLID = {"name": "conductivity", "record_type": "solid_electrolyte", "target": "conductivity_s_cm", "unit": "S/cm"}
LAWS = {
    "arrhenius": {**SOLID, "transform": "log10", "law": "arrhenius"},
    "vtf": {**SOLID, "transform": "log10", "law": "vtf"},
    "decreasing": {"name": "hardness", "record_type": "alloy", "target": "hardness_hv", "unit": "", "law": "decreasing"},
}
NAMES = ("a", "b", "1000/T", "b*1000/T")


def heated(site: str, law: str) -> FeatureTable:
    """Rows whose target falls with 1/T (rises with T), by an amount that depends on the material; or falls with T."""
    one, rng = table(site), stream(2, "heated", site)
    kelvin, a, b = rng.uniform(260.0, 380.0, len(one)), one.x[:, 0], one.x[:, 1]
    slope = 1.0 + 0.3 * np.tanh(b)
    y = a - 6.0 - 2.0 * slope * (1000.0 / kelvin - 3.36) if law != "decreasing" else a + 200.0 - slope * (kelvin - 300.0) / 20.0
    x = np.column_stack([a, b, 1000.0 / kelvin, b * 1000.0 / kelvin])
    return dataclasses.replace(one, names=NAMES, x=x, y=y[:, None])


@pytest.fixture(scope="module", params=sorted(LAWS))
def lawful(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp(request.param)
    settings = config(PAIR, task=LAWS[request.param], rounds=20, ensemble=2)
    data = {s: heated(s, request.param) for s in PAIR}
    return request.param, settings, data, run(settings, folder, data=data)[1], folder


def test_temperature_is_an_argument_of_the_law_and_no_feature(lawful) -> None:  # type: ignore[no-untyped-def]
    _, settings, data, model, folder = lawful
    assert model.scaler.active.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert model.weights["hidden.0.weight"].shape == (2, 2, 8)
    request = BaselineRequest(Plan.of(settings).sha256, "local", model.weights, model.scaler, share=True)
    own = wire.decode(handlers(settings, folder, data=data)["ash"](wire.encode(request)), Baseline)
    assert own.scaler.active.tolist() == [1.0, 1.0, 0.0, 0.0], "a site alone obeys the same law"


def test_predictions_of_the_finished_model_obey_the_law_and_are_learned(lawful) -> None:  # type: ignore[no-untyped-def]
    law, settings, data, model, folder = lawful
    plan = Plan.of(settings)
    architecture = Architecture.of(plan.model, plan.tasks, plan.settings)
    x = np.concatenate([t.part(TEST).x for t in data.values()])

    def predict(rows: np.ndarray) -> np.ndarray:
        return architecture.predict(model.weights, model.scaler, NAMES, rows)[:, 0]

    tolerance = 1e-2
    found = laws.law_adherence(predict, x, NAMES, law, low_k=230.0, high_k=450.0, tolerance=tolerance)
    assert found.share == 1.0, found.shares
    engine = InProcessEngine(handlers(settings, folder, data=data))
    mae = [
        metrics(baselines.score(engine, plan, arm, PAIR), "regression")["mae"]
        for arm in (baselines.Arm("federated", model.weights, model.scaler), baselines.dummy(model))
    ]
    assert mae[0] < 0.8 * mae[1]


def test_always_the_mean_is_the_mean_at_any_temperature(lawful) -> None:  # type: ignore[no-untyped-def]
    _, settings, data, model, _ = lawful
    plan = Plan.of(settings)
    arm = baselines.dummy(model)
    x = data["ash"].x
    guess = Architecture.of(plan.model, plan.tasks, plan.settings).predict(arm.weights, arm.scaler, NAMES, x)
    assert guess == pytest.approx(np.full(guess.shape, model.scaler.y_mean[0]), abs=0.01)
    assert np.ptp(guess) < 0.01 < np.ptp(data["ash"].y) / 100, "what is left is the smallest energy a law permits"


def test_a_law_without_a_temperature_among_the_features_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedmatError, match="temperature"):
        run(config(PAIR, task=LAWS["arrhenius"], rounds=1, quorum=2), tmp_path)
