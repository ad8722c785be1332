"""What the federated model is compared with, on a consortium in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from consortium import SITES, config, handlers, run, table

from fedmat import baselines, wire
from fedmat.config import ConsortiumConfig
from fedmat.domain import BaselineRequest, GlobalModel
from fedmat.errors import PlanRefused, RoundFailed
from fedmat.federation.engine import InProcessEngine
from fedmat.federation.evaluation import metrics
from fedmat.federation.plan import Plan
from fedmat.models.network import Architecture


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[ConsortiumConfig, Path, GlobalModel]:
    folder = tmp_path_factory.mktemp("grove")
    settings = config(rounds=30)
    return settings, folder, run(settings, folder)[1]


def test_pooled_beats_federated_beats_the_mean_and_every_arm_sees_the_same_rows(trained) -> None:  # type: ignore[no-untyped-def]
    settings, folder, model = trained
    plan = Plan.of(settings)
    engine = InProcessEngine(handlers(settings, folder))
    arms = [
        baselines.pooled(plan, {s: table(s) for s in SITES}),
        baselines.Arm("federated", model.weights, model.scaler),
        baselines.dummy(model),
    ]
    scored = [metrics(baselines.score(engine, plan, arm, SITES), "regression") for arm in arms]
    assert len({m["n"] for m in scored}) == 1
    assert scored[0]["mae"] < scored[1]["mae"] * 1.05
    assert scored[1]["mae"] < 0.8 * scored[2]["mae"]


def test_local_models_come_back_with_weights_only_in_a_simulated_consortium(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    settings, folder, model = trained
    plan = Plan.of(settings)
    pairs = baselines.own_models(InProcessEngine(handlers(settings, folder)), plan, model, SITES)
    assert {b.arm for b in pairs["ash"]} == {"local", "finetuned", "personal"}
    assert all(b.weights and b.scaler for own in pairs.values() for b in own if b.arm != "personal")
    assert all(not b.weights and sum(b.mixture.values()) == pytest.approx(1.0) for own in pairs.values() for b in own[2:])
    real = config(rounds=2, simulated=False)
    alone = run(real, tmp_path)[1]
    kept = baselines.own_models(InProcessEngine(handlers(real, tmp_path)), Plan.of(real), alone, SITES)
    assert all(not b.weights and b.scaler is None for pair in kept.values() for b in pair)
    assert all(np.isfinite(b.evaluation.sums).all() for pair in kept.values() for b in pair)


def test_a_site_of_a_real_consortium_keeps_its_own_model_whoever_asks(tmp_path: Path) -> None:
    real = config(rounds=1, simulated=False)
    model = run(real, tmp_path)[1]
    request = BaselineRequest(Plan.of(real).sha256, "local", model.weights, model.scaler, share=True)
    with pytest.raises(PlanRefused, match="declared simulated"):
        handlers(real, tmp_path)["ash"](wire.encode(request))


def test_pooling_real_companies_is_refused() -> None:
    with pytest.raises(PlanRefused, match="records in one place"):
        baselines.pooled(Plan.of(config(simulated=False)), {s: table(s) for s in SITES})


def test_a_missing_baseline_is_an_error_not_a_gap_in_the_table(trained) -> None:  # type: ignore[no-untyped-def]
    settings, folder, model = trained
    engine = InProcessEngine({k: v for k, v in handlers(settings, folder).items() if k != "ash"})
    with pytest.raises(RoundFailed, match="site ash: unreachable"):
        baselines.own_models(engine, Plan.of(settings), model, SITES)


def test_fine_tuning_never_loses_to_the_global_model_on_the_sites_own_validation_groups(trained) -> None:  # type: ignore[no-untyped-def]
    settings, folder, model = trained
    plan = Plan.of(settings)
    architecture = Architecture.of(plan.model, plan.tasks, plan.settings)
    pairs = baselines.own_models(InProcessEngine(handlers(settings, folder)), plan, model, SITES)
    for site in SITES:
        tuned = pairs[site][1]
        held = table(site).part(1)

        def error(weights, scaler, held=held) -> float:  # type: ignore[no-untyped-def]
            return float(np.abs(architecture.predict(weights, scaler, held.names, held.x) - held.y).mean())

        assert error(tuned.weights, tuned.scaler) <= error(model.weights, model.scaler) + 1e-9


def test_a_binary_task_runs_from_end_to_end(tmp_path: Path) -> None:
    task = {
        "name": "hard",
        "record_type": "alloy",
        "target": "hardness_hv",
        "unit": "",
        "kind": "binary",
        "threshold": 2.0,
        "metric": "auc",
    }
    settings = config(task=task, rounds=25)
    reports, model = run(settings, tmp_path)
    engine = InProcessEngine(handlers(settings, tmp_path))
    scored = baselines.score(engine, Plan.of(settings), baselines.Arm("federated", model.weights, model.scaler), SITES)
    m = metrics(scored, "binary")
    assert m["auc"] > 0.8
    assert 0.5 < m["accuracy"] <= 1.0
    assert reports[-1].train_loss["ash"] < reports[0].train_loss["ash"]
