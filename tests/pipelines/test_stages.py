"""dvc.yaml, params.yaml, the scripts and the consortium say the same, and the stages make what the flow makes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small
import yaml

from fedmat import files
from fedmat.config import load_consortium
from fedmat.errors import ConfigError
from fedmat.pipeline import MODEL
from flows import run_all
from pipelines import Params, opened, params
from pipelines.baselines import baselines
from pipelines.evaluate import evaluate
from pipelines.featurize import featurize
from pipelines.prepare import prepare
from pipelines.report import report
from pipelines.train import train


@pytest.fixture(scope="module")
def stages(project: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((project / "dvc.yaml").read_text())["stages"])


def test_every_stage_has_its_script_and_every_script_its_stage(stages: dict[str, Any], project: Path) -> None:
    scripts = {p.stem for p in (project / "pipelines").glob("*.py")} - {"__init__"}
    assert set(stages) == scripts
    for name, stage in stages.items():
        command = stage.get("do", stage)["cmd"]
        assert command == f"python -m pipelines.{name}" + (" ${key}" if "foreach" in stage else "")


def test_params_and_consortium_name_the_same_sites_and_folders(project: Path) -> None:
    given = params(project / "params.yaml")
    config = load_consortium(project / given.consortium)
    folder = given.consortium.parent
    assert given.sites == {m.site: (folder / m.file).parent for m in config.members}


def test_params_repeat_nothing_that_decides_the_model() -> None:
    assert set(Params.model_fields) == {"consortium", "home", "run", "sites"}


def test_code_that_decides_the_model_is_a_dependency(stages: dict[str, Any], project: Path) -> None:
    named = {d for stage in stages.values() for d in stage.get("do", stage)["deps"] if d.startswith("fedmat/")}
    assert all((project / d).exists() for d in named)
    deciding = {"config.py", "seeds.py", "weights.py", "wire.py", "domain.py", "pipeline.py", "data", "features", "models",
                "training", "aggregation", "federation", "baselines.py"}  # fmt: skip
    assert {f"fedmat/{name}" for name in deciding} <= named


def test_a_member_missing_from_params_stops_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_params(tmp_path, small.build(tmp_path / "c"), sites=["mill", "forge"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="foundry"):
        opened()


def test_an_unknown_key_in_params_is_refused_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("consortium: a\nhome: b\nrun: c\nsite: {}\n")
    with pytest.raises(ConfigError, match="did you mean 'sites'"):
        params(tmp_path / "params.yaml")


def test_the_stages_make_the_flows_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small.build(tmp_path / "c")
    write_params(tmp_path, path)
    monkeypatch.chdir(tmp_path)
    run = opened()
    for site in run.sites:
        prepare(run, site)
        featurize(run, site)
    train(run)
    baselines(run)
    evaluate(run)
    report(run)
    flow = run_all(path, home=tmp_path / "flow", orchestrator="none", register=False)
    assert files.sha256_file(tmp_path / "build/runs/repro" / MODEL) == flow.model_sha256
    assert files.read_json(run.folder / "metrics.json") == flow.metrics()
    rounds = list(csv.DictReader((run.folder / "plots/rounds.csv").open()))
    assert [int(r["round"]) for r in rounds] == [1, 2, 3]
    assert all(float(r["validation"]) > 0 for r in rounds)
    sites = list(csv.DictReader((run.folder / "plots/sites.csv").open()))
    models = ("local", "federated", "finetuned", "personal", "pooled")
    assert sorted((s["site"], s["model"]) for s in sites) == sorted((s, m) for s in small.COMPANIES for m in models)
    assert not (run.site_folder("mill") / ".git").exists(), "a stage versioned data that DVC itself keeps"


def write_params(folder: Path, consortium: Path, sites: list[str] | None = None) -> None:
    given = {
        "consortium": str(consortium.relative_to(folder)),
        "home": "build",
        "run": "repro",
        "sites": {s: str((consortium.parent / s).relative_to(folder)) for s in sites or list(small.COMPANIES)},
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(given))


# --- dvc repro on a second machine ---------------------------------------------------------------------------------


def run_in(folder: Path, *command: str) -> str:
    """Runs a command as a person would who activated the environment; no machine-wide git or DVC settings reach it."""
    binaries = Path(sys.executable).parent
    env = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@example.org",
        "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@example.org",
    }  # fmt: skip
    env.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git clone of the checkout as it stands, with the small consortium in place of the example's."""
    if not (project / ".git").exists():
        pytest.skip("not a git checkout")
    base = tmp_path_factory.mktemp("second-machine")
    origin = base / "origin"
    origin.mkdir()
    for name in run_in(project, "git", "ls-files", "-co", "--exclude-standard").splitlines():
        source, target = project / name, origin / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    (origin / "dvc.lock").unlink(missing_ok=True)
    write_params(origin, small.build(origin / "examples/small"))
    run_in(origin, "git", "init", "--quiet")
    run_in(origin, "git", "add", "--all")
    run_in(origin, "git", "commit", "--quiet", "--message", "as it stands")
    run_in(base, "git", "clone", "--quiet", str(origin), "clone")
    return base / "clone"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dvc_repro_in_a_clone_gives_the_flows_model(clone: Path, tmp_path: Path) -> None:
    flow = run_all(small.build(tmp_path / "c"), home=tmp_path / "flow", orchestrator="none", register=False)
    run_in(clone, "dvc", "repro", "--quiet")
    assert files.sha256_file(clone / "build/runs/repro" / MODEL) == flow.model_sha256
    assert flow.model_sha256 in run_in(clone, "dvc", "metrics", "show", "--json")
    plots = json.loads(run_in(clone, "dvc", "plots", "show", "--json"))["data"]
    assert set(plots) == {"validation over rounds", "each site's own test groups"}
    page = run_in(clone, "dvc", "plots", "show", "--out", "build/dvc-plots").strip()
    assert page.endswith("index.html")
    said = run_in(clone, "dvc", "repro")
    assert "Data and pipelines are up to date." in said
    assert "dvc.lock" in run_in(clone, "git", "status", "--short")

    lab = clone / "examples/small/mill/lab.csv"
    lab.write_text(lab.read_text() + "Cu0.5Fe0.5,25.0,160.5\n")
    plan = run_in(clone, "dvc", "repro", "--dry", "--single-item", "--downstream", "prepare@mill")
    assert "pipelines.prepare mill" in plan
    assert "pipelines.prepare forge" not in run_in(clone, "dvc", "status")
