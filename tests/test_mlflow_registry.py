"""The registry: a model is registered once, with the evidence attached, and promoted only by a fair comparison."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import runs

from fedmat import files, registry, wire
from fedmat.data.contract import RECORD_TYPES
from fedmat.data.example import example
from fedmat.data.validation import coerce
from fedmat.errors import ConfigError, NotEvidenced, ServiceError, StateError
from fedmat.evidence import held_out_digest


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One sqlite store for the module (its first use creates the tables, some seconds)."""
    return f"sqlite:///{tmp_path_factory.mktemp('root') / 'mlruns' / 'mlflow.db'}"


@pytest.fixture
def client(store: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(store, store)


@pytest.fixture
def task(request: pytest.FixtureRequest) -> dict[str, object]:
    """A task of this test's own, so that every test has a registered model of its own."""
    return {**runs.CONDUCTIVITY, "name": request.node.name.split("[")[0].replace("_", "-").lower()[:60]}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Works in an empty folder, and shows that nothing is written there by accident."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield folder
    assert list(folder.iterdir()) == []


def test_the_environment_decides_where_the_registry_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.registry_uri(tmp_path) == f"sqlite:///{tmp_path.resolve()}/mlruns/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    assert registry.registry_uri(tmp_path) == "http://localhost:5000"


def test_listing_an_empty_place_creates_nothing(tmp_path: Path) -> None:
    assert registry.models(f"sqlite:///{tmp_path}/none/mlflow.db") == []
    assert not (tmp_path / "none").exists()


def test_a_first_model_is_champion_and_says_why(store: str, client: Any, task: dict[str, object], tmp_path: Path) -> None:
    done = registry.register(runs.build(tmp_path / "home", task=task), tracking_uri=store)
    assert (done.name, done.version, done.aliases) == (f"fedmat-{task['name']}", 1, ("challenger", "champion"))
    assert "none before" in done.reason and done.tracking_uri == store
    listed = [m for m in registry.models(store) if m["name"] == done.name]
    assert len(listed) == 1 and listed[0]["sha256"] == done.sha256 and listed[0]["aliases"] == ["challenger", "champion"]
    assert json.loads(json.dumps(listed)) == listed


def test_registering_the_same_model_again_changes_nothing(
    store: str, client: Any, task: dict[str, object], tmp_path: Path
) -> None:
    folder = runs.build(tmp_path / "home", task=task)
    first = registry.register(folder, tracking_uri=store)
    client.delete_registered_model_alias(first.name, "champion")  # a person withdrew it: a repeat must not bring it back
    second = registry.register(folder, tracking_uri=store)
    assert (second.version, second.run_id, second.sha256) == (first.version, first.run_id, first.sha256)
    assert second.aliases == ("challenger",)
    assert len(_runs(client, first.sha256)) == 1


def test_the_version_carries_the_digests_an_auditor_compares(
    store: str, client: Any, task: dict[str, object], tmp_path: Path
) -> None:
    folder = runs.build(tmp_path / "home", task=task)
    metrics, plan = files.read_json(folder / "metrics.json"), files.read_json(folder / "plan.json")
    done = registry.register(folder, tracking_uri=store)
    version = client.get_model_version(done.name, str(done.version))
    assert version.tags["fedmat.model_sha256"] == files.sha256_file(folder / "model.safetensors")
    assert version.tags["fedmat.plan_sha256"] == metrics["plan_sha256"]
    assert version.tags["fedmat.features_sha256"] == "f" * 64
    assert version.tags["fedmat.test_set_sha256"] == held_out_digest(metrics, plan)
    for site, row in metrics["sites"].items():
        assert version.tags[f"fedmat.dataset_sha256.{site}"] == row["dataset_sha256"]
    run = client.get_run(done.run_id)
    assert run.info.status == "FINISHED" and run.data.params["settings.rounds"] == "12"
    found = {d.dataset.name: (d.dataset.digest, {t.key: t.value for t in d.tags}) for d in run.inputs.dataset_inputs}
    assert set(found) == {f"{s}/solid_electrolyte" for s in runs.SITES}
    digest, tags = found["garnet-gmbh/solid_electrolyte"]
    assert tags["fedmat.sha256"] == metrics["sites"]["garnet-gmbh"]["dataset_sha256"] and digest == tags["fedmat.sha256"][:36]
    assert {a.path for a in client.list_artifacts(done.run_id)} >= {"plan.json", "metrics.json", "timings.json"}
    assert (Path(store.removeprefix("sqlite:///")).parent / "artifacts").is_dir()


def test_every_round_is_a_step_of_every_sites_curve(store: str, client: Any, task: dict[str, object], tmp_path: Path) -> None:
    done = registry.register(runs.build(tmp_path / "home", task=task, rounds=7), tracking_uri=store)
    steps = [m.step for m in client.get_metric_history(done.run_id, "lisicon-ltd/train_loss")]
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    late = [m.step for m in client.get_metric_history(done.run_id, "argyrodite-ag/train_loss")]
    assert late == [1, 2, 4, 5, 6, 7]  # round 3 was missed, and no value is invented for it


@pytest.mark.parametrize(("scale", "champion"), [(0.5, 2), (1.5, 1), (1.0, 1)])
def test_only_a_better_score_on_the_same_test_rows_dethrones(
    store: str, client: Any, task: dict[str, object], tmp_path: Path, scale: float, champion: int
) -> None:
    task = {**task, "name": f"duel-{int(scale * 10)}"}
    registry.register(runs.build(tmp_path / "a", task=task), tracking_uri=store)
    rival = registry.register(runs.build(tmp_path / "b", task=task, weights_seed=2, scale=scale), tracking_uri=store)
    assert rival.version == 2 and "challenger" in rival.aliases
    assert int(client.get_model_version_by_alias(rival.name, "champion").version) == champion
    assert rival.reason.startswith("champion" if champion == 2 else "challenger") and "version 1" in rival.reason


def test_a_better_score_on_other_test_rows_proves_nothing(
    store: str, client: Any, task: dict[str, object], tmp_path: Path
) -> None:
    registry.register(runs.build(tmp_path / "a", task=task), tracking_uri=store)
    other = registry.register(runs.build(tmp_path / "b", task=task, seed=2, weights_seed=2, scale=0.1), tracking_uri=store)
    assert other.aliases == ("challenger",) and "another test set" in other.reason
    assert client.get_model_version(other.name, "2").tags["fedmat.decision"] == other.reason


def test_a_binary_task_is_won_by_the_higher_auc(store: str, client: Any, tmp_path: Path) -> None:
    registry.register(runs.build(tmp_path / "a", task=runs.SUPERIONIC, scale=4.0), tracking_uri=store)
    rival = registry.register(runs.build(tmp_path / "b", task=runs.SUPERIONIC, weights_seed=2, scale=0.5), tracking_uri=store)
    assert rival.aliases == ("challenger", "champion")


def test_an_interrupted_registration_is_taken_up(
    store: str, client: Any, task: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs.build(tmp_path / "home", task=task)

    def pulled_plug(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registry, "_save", pulled_plug)
        with pytest.raises(KeyboardInterrupt):
            registry.register(folder, tracking_uri=store)
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_decide", pulled_plug)
        with pytest.raises(KeyboardInterrupt):
            registry.register(folder, tracking_uri=store)
    done = registry.register(folder, tracking_uri=store)
    assert done.version == 1 and done.aliases == ("challenger", "champion")
    assert len(_runs(client, done.sha256)) == 1


def test_a_registered_model_is_found_by_name_alias_and_version_and_checked(
    store: str, client: Any, task: dict[str, object], tmp_path: Path
) -> None:
    folder = runs.build(tmp_path / "home", task=task)
    done = registry.register(folder, tracking_uri=store)
    mine = wire.load_model(folder / "model.safetensors")
    for reference in (done.name, f"{done.name}@challenger", f"models:/{done.name}/1"):
        assert wire.digest(registry.load(reference, store)) == wire.digest(mine)
    for reference, said in (
        (done.name[:-1], "did you mean"),
        (f"{done.name}@audited", "audited"),
        (f"{done.name}/7", "version 7"),
    ):
        with pytest.raises(ConfigError, match=said):
            registry.load(reference, store)
    source = str(client.get_model_version(done.name, "1").source).removeprefix("file://")
    stored = next(Path(source).rglob("model.safetensors"))
    stored.write_bytes(stored.read_bytes() + b"x")
    with pytest.raises(StateError, match="not the ones that were registered"):
        registry.load(done.name, store)


def test_the_test_set_digest_knows_data_counts_split_and_task(tmp_path: Path) -> None:
    folder = runs.build(tmp_path)
    metrics, plan = files.read_json(folder / "metrics.json"), files.read_json(folder / "plan.json")
    first = held_out_digest(metrics, plan)
    assert first == held_out_digest(json.loads(json.dumps(metrics)), {**plan, "settings": {}})
    for key, value in (("dataset_sha256", "0" * 64), ("n_test", 1), ("n_groups", 1)):
        sites = {**metrics["sites"], "garnet-gmbh": {**metrics["sites"]["garnet-gmbh"], key: value}}
        assert held_out_digest({**metrics, "sites": sites}, plan) != first
    assert held_out_digest(metrics, {**plan, "splits": {**plan["splits"], "seed": 8}}) != first
    assert held_out_digest(metrics, {**plan, "task": {**plan["task"], "transform": "identity"}}) != first


@pytest.mark.parametrize("name", ["metrics.json", "rounds.jsonl", "model.safetensors", "plan.json"])
def test_an_unfinished_run_is_not_registered(store: str, tmp_path: Path, name: str) -> None:
    folder = runs.build(tmp_path)
    (folder / name).unlink()
    with pytest.raises(NotEvidenced, match=name):
        registry.register(folder, tracking_uri=store)


def test_files_that_disagree_are_not_registered(store: str, tmp_path: Path) -> None:
    folder = runs.build(tmp_path)
    runs.edit(folder / "plan.json", consortium="another")
    with pytest.raises(StateError, match=r"plan\.json"):
        registry.register(folder, tracking_uri=store)


def test_an_unreachable_store_is_a_service_error_without_its_password(tmp_path: Path) -> None:
    folder = runs.build(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ServiceError, match="MLflow at"):
        registry.register(folder, tracking_uri=f"sqlite:///{tmp_path}/file/mlflow.db")
    assert "secret" not in registry._without_password("postgresql://me:secret@host/db")


@pytest.mark.parametrize("name", sorted(RECORD_TYPES))
def test_every_record_type_has_a_made_up_example(name: str) -> None:
    rt = RECORD_TYPES[name]
    target = next(f.name for f in rt.fields if f.measured)
    made_up = example(rt, target)
    assert target not in made_up
    clean = coerce(pd.DataFrame([made_up]), rt)  # refuses whatever the contract does not accept
    assert len(clean) == 1


def _runs(client: Any, sha256: str) -> list[Any]:
    every = [e.experiment_id for e in client.search_experiments()]
    return list(client.search_runs(every, f"tags.`fedmat.model_sha256` = '{sha256}'"))
