"""A replay finds every artefact that is not the run's, names the first, and never calls absence or noise a success."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat import files, pipeline, replay, wire
from fedmat.domain import GlobalModel, Scaler
from fedmat.errors import ConfigError, NotEvidenced, ServiceError, StateError
from fedmat.replay import Artefact, Expected, Replayed

SITES = ("forge", "mill")
ROUNDS = 3


# --- a workspace as a run leaves it, by hand ---------------------------------------------------------------------------


def model(shift: float = 0.0) -> GlobalModel:
    weights = {"a": np.array([[1.0, -2.0]], dtype=np.float32) * np.float32(1 + shift), "b": np.zeros(2, dtype=np.float32)}
    scaler = Scaler(np.zeros(2), np.ones(2), np.ones(2), np.array([3.0]), np.array([2.0]))
    return GlobalModel(weights, scaler, {"plan_sha256": "p", "interval": {"half_width": 0.5}})


def workspace(home: Path, shift: float = 0.0) -> Path:
    """Writes sites and one finished run; ``shift`` changes the weights from round 2 on, as rounding elsewhere would."""
    folder = home / "runs" / replay.RUN
    folder.mkdir(parents=True)
    for site in SITES:
        files.write_json(home / "sites" / site / "manifest.json", {"site": site, "sha256": files.sha256(site.encode())})
    attested = {s: {"dataset_sha256": files.sha256(s.encode()), "features_sha256": "f" * 64, "n_train": 10} for s in SITES}
    plan = {"consortium": "two", "roster": list(SITES), "settings": {"rounds": ROUNDS}}
    sha256 = wire.save_model(model(shift), folder / "model.safetensors")
    rounds = [
        {
            "round": i,
            "model_sha256": files.sha256(f"{i} {shift if i else 0}".encode()),
            "shares": {"forge": 0.5, "mill": 0.5},
            "train_loss": {"forge": 0.25 * (1 + (shift if i else 0)), "mill": None},
            "dropouts": [],
            "audits": {},
            "exchange": -1,
            "evidence": {},
            "seconds": 0.1 * i,
            "overhead_seconds": 0.01,
            "bytes_up": {"forge": 100},
        }
        for i in range(ROUNDS)
    ]
    metrics = {
        "global": {"federated": {"mae": 1.5 * (1 + shift), "n": 20}, "dummy": {"mae": 4.0, "n": 20}},
        "sites": {"forge": {"own": {"local": {"mae": 2.0}}}},
        "model": {"name": "m", "version": None, "sha256": sha256},
        "digests": {"model": sha256, "plan": "p"},
        "bytes": {"total_up": 300},
        "code_version": "0.1.0",
    }
    evaluations = [
        {"arm": arm, "site": s, "target": "t", "sums": [10, 1.5, 2.5]} for arm in ("dummy", "federated") for s in SITES
    ]
    files.write_json(folder / "plan.json", plan)
    files.write_json(folder / "matching.json", {"removed": {s: {"duplicate": 0} for s in SITES}})
    files.write_json(folder / "attestations.json", {"attestations": attested, "failures": [], "setup_bytes": {"forge": 9}})
    files.write_json(folder / "intervals.json", {"half_width": 0.5})
    files.write_json(folder / "evaluations.json", evaluations)
    files.write_json(folder / "metrics.json", metrics)
    (folder / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rounds))
    return folder


def edit(path: Path, change: Callable[[Any], None]) -> None:
    value = files.read_json(path)
    change(value)
    files.write_json(path, value)


def edit_round(folder: Path, number: int, **values: Any) -> None:
    path = folder / "rounds.jsonl"
    rounds = [json.loads(line) for line in path.read_text().splitlines()]
    rounds[number - 1] |= values
    path.write_text("".join(json.dumps(r) + "\n" for r in rounds))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of the first run."""
    return workspace(tmp_path / "first")


@pytest.fixture
def again(tmp_path: Path) -> Path:
    """The folder of the same run in the second workspace."""
    return workspace(tmp_path / "second")


def judged(run: Path, again: Path, **more: Any) -> tuple[str, str | None, tuple[Artefact, ...], tuple[str, ...]]:
    expected = Expected.of_run(run)
    artefacts, _ = replay.compare(expected, again.parents[1], again.name, **more)
    verdict, first, reasons = replay.judge(expected, artefacts)
    return verdict, first, artefacts, reasons


# --- comparing ---------------------------------------------------------------------------------------------------------


def test_a_run_is_identical_to_itself_artefact_by_artefact_in_the_order_it_is_made(run: Path, again: Path) -> None:
    verdict, first, artefacts, reasons = judged(run, again)
    assert (verdict, first, reasons) == ("identical", None, ())
    assert {a.verdict for a in artefacts} == {"identical"}
    assert all(a.expected_sha256 == a.found_sha256 for a in artefacts)
    rounds = [name for i in range(1, ROUNDS + 1) for name in (f"round {i}: model_sha256", f"round {i}")]
    assert [a.name for a in artefacts] == [
        *(f"sites/{s}/manifest.json" for s in SITES), *(f"sites/{s}/features" for s in SITES),
        "plan.json", "matching.json", "attestations.json", *rounds, "intervals.json", "model.safetensors",
        "evaluations.json", "metrics.json",
    ]  # fmt: skip


def test_one_changed_metric_is_named_by_its_path(run: Path, again: Path) -> None:
    edit(run / "metrics.json", lambda m: m["global"]["federated"].update(mae=1.4))
    verdict, first, artefacts, _ = judged(run, again)
    assert (verdict, first) == ("diverged", "metrics.json: global.federated.mae")
    assert [a.name for a in artefacts if a.verdict != "identical"] == ["metrics.json"]


def leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in leaves(v, f"{path}.{k}" if path else k)]
    return [(path, value)]


@given(data=st.data(), factor=st.floats(1.00001, 1e6))
@settings(max_examples=40, deadline=None)
def test_no_number_of_the_metrics_changes_unseen(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, factor: float
) -> None:
    metrics = files.read_json(workspace(tmp_path_factory.mktemp("metrics")) / "metrics.json")
    compared = [(p, v) for p, v in leaves(metrics) if isinstance(v, float)]
    path, value = data.draw(st.sampled_from(compared))
    changed = copy.deepcopy(metrics)
    *parents, last = path.split(".")
    at = changed
    for key in parents:
        at = at[key]
    at[last] = value * factor
    found = replay._values("metrics.json", metrics, changed, (), 1e-6)
    assert (found.verdict, found.where) == ("different", path)


def test_a_changed_round_digest_is_that_rounds(run: Path, again: Path) -> None:
    edit_round(run, 2, model_sha256="0" * 64)
    verdict, first, artefacts, _ = judged(run, again)
    assert (verdict, first) == ("diverged", "round 2: model_sha256")
    assert [a.name for a in artefacts if a.verdict != "identical"] == ["round 2: model_sha256"]


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"shares": {"forge": 0.6, "mill": 0.4}}, "round 3: shares.forge"),
        ({"train_loss": {"forge": 0.25, "mill": 0.1}}, "round 3: train_loss.mill"),
        ({"excluded": {"mill": "far off"}}, "round 3: excluded"),
        ({"exchange": 4}, "round 3: exchange"),
    ],
)
def test_what_a_round_reports_is_compared(run: Path, again: Path, change: dict[str, Any], place: str) -> None:
    edit_round(run, 3, **change)
    assert judged(run, again)[:2] == ("diverged", place)


def test_the_order_of_rounds_is_compared(run: Path, again: Path) -> None:
    path = run / "rounds.jsonl"
    one, two, three = path.read_text().splitlines()
    path.write_text("\n".join((two, one, three)) + "\n")
    assert judged(run, again)[:2] == ("diverged", "round 1: model_sha256")


def test_a_sites_data_come_first(run: Path, again: Path) -> None:
    edit(again.parents[1] / "sites" / "mill" / "manifest.json", lambda m: m.update(sha256="1" * 64))
    edit(run / "metrics.json", lambda m: m["global"]["dummy"].update(mae=9.0))
    verdict, first, artefacts, _ = judged(run, again)
    assert (verdict, first) == ("diverged", "sites/mill/manifest.json: dataset_sha256")
    assert artefacts[0].verdict == "identical"


def test_a_swapped_model_file_is_found_and_its_tensor_named(run: Path, again: Path) -> None:
    wire.save_model(model(0.5), run / "model.safetensors")
    verdict, first, artefacts, _ = judged(run, again)
    assert (verdict, first) == ("diverged", "model.safetensors: a")
    assert "0.33 of the tensor's largest entry" in next(a.detail for a in artefacts if a.name == "model.safetensors")


def test_a_model_of_another_shape_or_a_damaged_one_is_different(run: Path, again: Path) -> None:
    other = dataclasses.replace(model(), weights={"a": np.zeros(3, dtype=np.float32)})
    wire.save_model(other, run / "model.safetensors")
    assert judged(run, again)[:2] == ("diverged", "model.safetensors")
    (run / "model.safetensors").write_bytes(b"half")
    assert judged(run, again)[:2] == ("diverged", "model.safetensors")


@pytest.mark.parametrize(
    "name",
    ["plan.json", "attestations.json", "matching.json", "intervals.json", "rounds.jsonl", "metrics.json", "evaluations.json",
     "model.safetensors"],
)  # fmt: skip
def test_what_the_runs_folder_does_not_hold_is_never_identical(run: Path, again: Path, name: str) -> None:
    (run / name).unlink()
    verdict, first, artefacts, reasons = judged(run, again)
    assert (verdict, first) == ("not_evidenced", None)
    assert "not in" in reasons[0]
    assert any(a.verdict == "not_expected" and a.expected_sha256 is None for a in artefacts)


def test_a_round_that_was_taken_out_is_not_evidenced(run: Path, again: Path) -> None:
    path = run / "rounds.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:2]) + "\n")
    verdict, _, artefacts, _ = judged(run, again)
    assert verdict == "not_evidenced"
    assert [a.name for a in artefacts if a.verdict == "not_expected"] == ["round 3: model_sha256", "round 3"]


def test_what_the_replay_did_not_make_is_missing(run: Path, again: Path) -> None:
    (again / "evaluations.json").unlink()
    (again.parents[1] / "sites" / "forge" / "manifest.json").unlink()
    verdict, first, artefacts, _ = judged(run, again)
    assert (verdict, first) == ("diverged", "sites/forge/manifest.json: dataset_sha256")
    assert [a.name for a in artefacts if a.verdict == "missing"] == ["sites/forge/manifest.json", "evaluations.json"]


def test_rounding_is_within_tolerance_and_says_how_far(run: Path, tmp_path: Path) -> None:
    again = workspace(tmp_path / "other-processor", shift=2.0**-22)
    verdict, first, artefacts, _ = judged(run, again)
    assert (verdict, first) == ("within_tolerance", "round 2: model_sha256")
    assert [a.name for a in artefacts if a.verdict == "identical"][-1] == "evaluations.json"
    weights = next(a for a in artefacts if a.name == "model.safetensors")
    assert weights.verdict == "within_tolerance"
    assert "2.4e-07 of the tensor's largest entry" in weights.detail
    assert judged(run, again, tolerance=1e-7)[:2] == ("diverged", "round 2: model_sha256")
    with pytest.raises(ConfigError, match="tolerance"):
        judged(run, again, tolerance=-1.0)


def test_rounding_does_not_vanish_again(run: Path, tmp_path: Path) -> None:
    """A digest that differs before one that does not was written, not computed."""
    again = workspace(tmp_path / "other-processor", shift=2.0**-22)
    last = json.loads((again / "rounds.jsonl").read_text().splitlines()[-1])
    edit_round(run, 3, model_sha256=last["model_sha256"])
    verdict, first, artefacts, _ = judged(run, again)
    assert (verdict, first) == ("diverged", "round 2: model_sha256")
    assert next(a.verdict for a in artefacts if a.name == "round 2: model_sha256") == "different"


def test_counts_have_no_tolerance(run: Path, again: Path) -> None:
    edit(run / "metrics.json", lambda m: m["global"]["dummy"].update(n=10_000_000))
    edit(again / "metrics.json", lambda m: m["global"]["dummy"].update(n=10_000_001))
    assert judged(run, again)[:2] == ("diverged", "metrics.json: global.dummy.n")


def test_seconds_traffic_and_versions_are_not_compared(run: Path, again: Path) -> None:
    edit_round(run, 1, seconds=99.0, overhead_seconds=9.0, bytes_up={"forge": 1}, bytes_down={}, role_bytes={"auditor": 3})
    edit(run / "attestations.json", lambda a: a.update(setup_bytes={}))
    edit(run / "metrics.json", lambda m: m.update(bytes={}, code_version="9"))
    edit(run / "metrics.json", lambda m: m["model"].update(version=7))
    assert judged(run, again)[0] == "identical"
    named = {f for fields in replay.NOT_COMPARED.values() for f in fields}
    assert {"seconds", "overhead_seconds", "bytes", "setup_bytes", "code_version", "model.version"} <= named


def test_what_only_one_encrypted_runs_keys_decide_is_not_compared(run: Path, again: Path) -> None:
    for folder in (run, again):
        edit(folder / "plan.json", lambda p: p["settings"].update(security={"mode": "trigram"}))
    edit_round(run, 2, exchange=5, audits={"mill": "agrees"}, evidence={"header": "1"})
    edit_round(again, 2, exchange=2, audits={}, evidence={"header": "2"})
    assert judged(run, again)[0] == "identical"
    edit_round(run, 2, evidence={"header": "1", "sum": "3"})
    assert judged(run, again)[:2] == ("diverged", "round 2: evidence.sum")


# --- what no replay brings back ----------------------------------------------------------------------------------------


def noisy(folder: Path, **plan: Any) -> None:
    edit(folder / "plan.json", lambda p: p["settings"].update(plan or {"privacy": {"unit": "record"}}))


@pytest.mark.parametrize("plan", [{"privacy": {"unit": "record"}}, {"security": {"mode": "ckks"}}])
def test_noise_from_the_operating_system_is_never_identical_and_no_proof_against(
    run: Path, tmp_path: Path, plan: dict[str, Any]
) -> None:
    again = workspace(tmp_path / "noise", shift=0.1)
    edit_round(again, 1, model_sha256="2" * 64)
    noisy(run, **plan)
    noisy(again, **plan)
    verdict, first, _, reasons = judged(run, again)
    assert (verdict, first) == ("not_evidenced", "round 1: model_sha256")
    assert reasons[0].startswith("noise from the operating system")
    shutil.rmtree(again.parents[1])
    same = workspace(tmp_path / "noise")
    noisy(same, **plan)
    assert judged(run, same)[0] == "not_evidenced", "equal numbers under noise were called proof"


def test_noise_excuses_nothing_that_comes_before_it(run: Path, tmp_path: Path) -> None:
    again = workspace(tmp_path / "noise", shift=0.1)
    noisy(run)
    noisy(again)
    edit(again.parents[1] / "sites" / "mill" / "manifest.json", lambda m: m.update(sha256="1" * 64))
    assert judged(run, again)[:2] == ("diverged", "sites/mill/manifest.json: dataset_sha256")


def test_a_site_that_did_not_answer_excuses_what_follows_from_it_and_nothing_else(run: Path, tmp_path: Path) -> None:
    edit_round(run, 2, dropouts=[{"site": "mill", "reason": "late", "detail": ""}])
    full = workspace(tmp_path / "full", shift=0.1)
    verdict, first, _, reasons = judged(run, full)
    assert (verdict, first) == ("not_evidenced", "round 2: model_sha256")
    assert "round 2: mill did not answer" in reasons[0]
    edit_round(full, 1, model_sha256="3" * 64)
    assert judged(run, full)[:2] == ("diverged", "round 1: model_sha256")

    same = workspace(tmp_path / "same")
    edit_round(same, 2, dropouts=[{"site": "mill", "reason": "late", "detail": ""}])
    edit(run / "metrics.json", lambda m: m["global"]["federated"].update(mae=1.4))
    assert judged(run, same)[:2] == ("diverged", "metrics.json: global.federated.mae"), "an absence excused an edited number"


def test_dirty_code_is_stated_and_not_judged(run: Path, again: Path) -> None:
    expected = Expected.of_run(run, dirty=True)
    artefacts, _ = replay.compare(expected, again.parents[1], again.name)
    verdict, _, reasons = replay.judge(expected, artefacts)
    assert verdict == "identical"
    assert "its code differed from the commit" in reasons[0]


# --- files that cannot be read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plan.json", "{"),
        ("metrics.json", '{"a": NaN}'),
        ("metrics.json", "[]"),
        ("evaluations.json", "[1]"),
        ("attestations.json", '{"attestations": 3}'),
        ("attestations.json", '{"attestations": {"../../elsewhere": {}}}'),
        ("attestations.json", '{"attestations": {}, "failures": [3]}'),
        ("plan.json", '{"roster": 3}'),
        ("plan.json", '{"settings": []}'),
        ("rounds.jsonl", '{"model_sha256": "a", "dropouts": 3}'),
        ("rounds.jsonl", '{"round": 0}\n'),
        ("rounds.jsonl", '{"round": 0, "model_sha256": "a"}\n{"rou'),
    ],
)
def test_a_damaged_file_is_named(run: Path, name: str, text: str) -> None:
    (run / name).write_text(text)
    with pytest.raises(StateError, match=name):
        Expected.of_run(run)


def test_a_number_beyond_json_is_named(run: Path, again: Path) -> None:
    edit(run / "intervals.json", lambda i: i.update(half_width=2**60))
    with pytest.raises(StateError, match=r"intervals\.json"):
        judged(run, again)


def test_no_folder_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no such run folder"):
        Expected.of_run(tmp_path / "nowhere")


# --- a repository whose one stage puts prepared files in place -----------------------------------------------------------

STAGE = """\
import shutil, sys
from pathlib import Path
import fedmat
if fedmat.WRONG:
    print("noise before"); print("error: lab.csv: no column 'Alloy'\\n  fix: correct site.yaml", file=sys.stderr); sys.exit(3)
print("round 1 of 3: 2 sites")
shutil.copytree("made", "build", dirs_exist_ok=True)
"""


def git(folder: Path, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def commit(folder: Path) -> str:
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "--quiet", "--message", "as it stands")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with the layout of this one: two members with data, one stage, and its results committed with dvc.lock."""
    top = tmp_path / "code"
    for name, text in {
        "fedmat/__init__.py": "WRONG = False\n",
        "pipelines/__init__.py": "",
        "pipelines/evaluate.py": STAGE,
        "dvc.yaml": yaml.safe_dump({"stages": {"evaluate": {"cmd": "python -m pipelines.evaluate", "deps": ["params.yaml"]}}}),
        "params.yaml": "run: before\n",
        ".dvc/config": "[core]\n    analytics = false\n",
        ".gitignore": "build/\n",
        "two/consortium.yaml": yaml.safe_dump(
            {
                "name": "two",
                "simulated": True,
                "plan": {"rounds": 9},
                "members": [{"site": s, "file": f"{s}/site.yaml"} for s in SITES],
            }
        ),
        **{f"two/{s}/site.yaml": yaml.safe_dump({"site": s, "sources": [{"path": "lab.csv"}]}) for s in SITES},
        **{f"two/{s}/lab.csv": "a\n1\n" for s in SITES},
    }.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    workspace(top / "made")
    git(top, "init", "--quiet")
    return top


def replayed(repository: Path, run: Path, tmp_path: Path, **more: Any) -> tuple[Replayed, list[str]]:
    said: list[str] = []
    wanted: dict[str, Any] = {
        "repository": repository, "commit": "HEAD", "consortium_file": repository / "two/consortium.yaml",
        "workdir": tmp_path / "work", "progress": said.append,
    }  # fmt: skip
    return replay.replay(Expected.of_run(run), **(wanted | more)), said


def test_a_replay_runs_the_clones_code_and_names_its_stages(repository: Path, run: Path, tmp_path: Path) -> None:
    head = commit(repository)
    (repository / "fedmat/__init__.py").write_text("WRONG = True\n")  # the working tree is not what is replayed
    found, said = replayed(repository, run, tmp_path)
    assert found.verdict == "identical"
    assert (found.commit, found.dirty, found.first_divergence) == (head, None, None)
    assert said == ["evaluate", "evaluate: round 1 of 3: 2 sites"]
    params = yaml.safe_load((found.clone / "params.yaml").read_text())
    assert set(params["sites"]) == set(SITES)
    assert all(Path(p).is_relative_to(found.clone) for p in params["sites"].values()), "the clone's own data were not taken"
    consortium = yaml.safe_load(Path(params["consortium"]).read_text())
    assert consortium["plan"]["rounds"] == ROUNDS, "the run's own number of rounds was not taken over"
    plain = replay.as_plain(found)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["artefacts"][0]["verdict"] == "identical"
    assert plain["not_compared"]["rounds"]["seconds"] == "measured"
    with pytest.raises(StateError, match="is there already"):
        replayed(repository, run, tmp_path)


def test_results_and_a_lock_in_the_commit_do_not_stand_in_for_running(repository: Path, run: Path, tmp_path: Path) -> None:
    stage = {"cmd": "python -m pipelines.evaluate", "deps": ["pipelines/evaluate.py"]}
    (repository / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"evaluate": stage}}))
    commit(repository)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    again = [sys.executable, "-m", "dvc", "repro", "--quiet"]
    subprocess.run(again, cwd=repository, env=environment, check=True, capture_output=True)
    assert (repository / "dvc.lock").is_file()
    assert (repository / replay.HOME).is_dir()
    edit(repository / "made/runs" / replay.RUN / "metrics.json", lambda m: m["global"]["dummy"].update(mae=4.5))
    commit(repository)
    found, said = replayed(repository, run, tmp_path)
    assert "evaluate" in said
    assert (found.verdict, found.first_divergence) == ("diverged", "metrics.json: global.dummy.mae")


def test_a_stage_that_fails_says_so_in_its_own_words(repository: Path, run: Path, tmp_path: Path) -> None:
    (repository / "fedmat/__init__.py").write_text("WRONG = True\n")
    commit(repository)
    with pytest.raises(StateError, match="stage evaluate: lab.csv: no column 'Alloy'") as caught:
        replayed(repository, run, tmp_path)
    assert caught.value.fix == "correct site.yaml"


def test_a_stage_or_dvc_that_breaks_is_a_service_error(repository: Path, run: Path, tmp_path: Path) -> None:
    (repository / "pipelines/evaluate.py").write_text("1 / 0\n")
    commit(repository)
    with pytest.raises(ServiceError, match="stage evaluate broke off: ZeroDivisionError"):
        replayed(repository, run, tmp_path)
    (repository / "dvc.yaml").write_text("stages: 3\n")
    commit(repository)
    with pytest.raises(ServiceError, match="dvc repro broke off"):
        replayed(repository, run, tmp_path, workdir=tmp_path / "elsewhere")


def test_an_interrupted_replay_takes_its_stage_with_it(repository: Path, run: Path, tmp_path: Path) -> None:
    (repository / "pipelines/evaluate.py").write_text("import os, time; print('round 1 of 1:', os.getpid()); time.sleep(300)\n")
    commit(repository)
    said: list[str] = []

    def stop(what: str) -> None:
        said.append(what)
        if "round" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replayed(repository, run, tmp_path, progress=stop)
    stage = int(said[-1].split()[-1])
    until = time.monotonic() + 10
    while Path(f"/proc/{stage}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{stage}").exists()


def test_code_that_does_not_start_is_named_before_any_stage(repository: Path, run: Path, tmp_path: Path) -> None:
    (repository / "fedmat/__init__.py").write_text("import no_such_package\n")
    commit(repository)
    with pytest.raises(ServiceError, match="no_such_package"):
        replayed(repository, run, tmp_path)


def test_another_fedmat_than_the_clones_is_refused(repository: Path, run: Path, tmp_path: Path) -> None:
    shutil.rmtree(repository / "fedmat")
    commit(repository)
    with pytest.raises(ServiceError, match="would run, not the clone's code|does not start"):
        replayed(repository, run, tmp_path)


def test_no_repository_no_commit_no_stages(repository: Path, run: Path, tmp_path: Path) -> None:
    commit(repository)
    for folder, what in ((tmp_path / "nowhere", "no such folder"), (run, "no git repository")):
        with pytest.raises(StateError, match=what):
            replayed(folder, run, tmp_path)
    for name in ("0" * 40, "--all", "HEAD~5"):
        with pytest.raises(StateError, match="has no commit"):
            replayed(repository, run, tmp_path, commit=name)
    with pytest.raises(ConfigError, match="no such consortium file"):
        replayed(repository, run, tmp_path, consortium_file=tmp_path / "none.yaml")
    (repository / "dvc.yaml").unlink()
    commit(repository)
    with pytest.raises(StateError, match=r"holds no dvc\.yaml"):
        replayed(repository, run, tmp_path, workdir=tmp_path / "elsewhere")


def test_without_dvc_nothing_is_cloned(repository: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(repository)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ServiceError, match="DVC is not installed"):
        replayed(repository, run, tmp_path)
    assert not (tmp_path / "work").exists()


def test_members_whose_data_are_elsewhere_are_named(repository: Path, run: Path, tmp_path: Path) -> None:
    (repository / "two/mill/lab.csv").unlink()
    (repository / "two/forge/site.yaml").unlink()
    commit(repository)
    with pytest.raises(NotEvidenced, match="data of forge, mill are not on this machine"):
        replayed(repository, run, tmp_path)


def test_members_keys_are_elsewhere(repository: Path, run: Path, tmp_path: Path) -> None:
    edit(run / "plan.json", lambda p: p["settings"].update(security={"mode": "trigram"}))
    path = repository / "two/consortium.yaml"
    path.write_text(path.read_text().replace("simulated: true", "simulated: false"))
    commit(repository)
    with pytest.raises(NotEvidenced, match="private keys of the members"):
        replayed(repository, run, tmp_path)


def test_a_rehearsals_charter_is_left_out_for_its_keys_are_not_in_the_clone(
    repository: Path, run: Path, tmp_path: Path
) -> None:
    for folder in (run, repository / "made/runs" / replay.RUN):
        edit(folder / "plan.json", lambda p: p["settings"].update(security={"mode": "masking"}))
    path = repository / "two/consortium.yaml"
    path.write_text(path.read_text() + "charter: charter.json\n")
    commit(repository)
    found, _ = replayed(repository, run, tmp_path)
    assert found.verdict == "identical"
    assert "keys" in found.reasons[-1]
    params = yaml.safe_load((found.clone / "params.yaml").read_text())
    assert "charter" not in yaml.safe_load(Path(params["consortium"]).read_text())
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == ["clone"], "something was written beside the clone"


def test_a_consortium_outside_the_repository_keeps_its_place(repository: Path, run: Path, tmp_path: Path) -> None:
    commit(repository)
    outside = tmp_path / "outside"
    shutil.move(repository / "two", outside)
    found, _ = replayed(repository, run, tmp_path, consortium_file=outside / "consortium.yaml")
    params = yaml.safe_load((found.clone / "params.yaml").read_text())
    assert params["sites"] == {s: str(outside / s) for s in SITES}


# --- for real ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_replay_from_a_clone_is_identical_and_one_byte_of_a_site_is_found(project: Path, tmp_path: Path) -> None:
    """The cells example with two rounds: first as it was, then after one byte of one member's raw data changed."""
    if not (project / ".git").exists():
        pytest.skip("not a git checkout")
    code = tmp_path / "code"
    for name in git(project, "ls-files", "-co", "--exclude-standard").splitlines():
        if (project / name).is_file():
            (code / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(project / name, code / name)
    git(code, "init", "--quiet")
    head = commit(code)

    first = pipeline.open_run(code / "examples/cells/consortium.yaml", home=tmp_path / "home", run_id="first", rounds=2)
    for site in first.sites:
        pipeline.prepare_site(first, site)
        pipeline.featurize_site(first, site)
    assert len(list(pipeline.train(first))) == 2
    pipeline.baselines(first)
    pipeline.evaluate(first)

    said: list[str] = []
    found = replay.replay(
        Expected.of_run(first.folder), repository=code, commit=head, consortium_file=first.consortium_file,
        workdir=tmp_path / "one", progress=said.append,
    )  # fmt: skip
    assert (found.verdict, found.first_divergence) == ("identical", None), found.artefacts
    weights = next(a for a in found.artefacts if a.name == "model.safetensors")
    assert weights.found_sha256 == files.sha256_file(first.folder / "model.safetensors")
    assert {f"prepare@{s}" for s in first.sites} | {"train", "baselines", "evaluate", "train: round 2 of 2: 4 sites"} <= set(
        said
    )

    outside = tmp_path / "cells"
    shutil.copytree(code / "examples/cells", outside)
    raw = outside / "sites/ev-cells/zellversuche.csv"
    data = bytearray(raw.read_bytes())
    at = next(i for i in range(len(data) - 20, 0, -1) if chr(data[i]) in "345")
    data[at] += 1
    raw.write_bytes(data)
    found = replay.replay(
        Expected.of_run(first.folder), repository=code, commit=head, consortium_file=outside / "consortium.yaml",
        workdir=tmp_path / "two", progress=said.append,
    )  # fmt: skip
    assert (found.verdict, found.first_divergence) == ("diverged", "sites/ev-cells/manifest.json: dataset_sha256")
    assert [a.verdict for a in found.artefacts if a.name.endswith("manifest.json")] == ["different", *["identical"] * 3]
