"""Prefect and MLflow fail beside a run between organisations: they cost their pages and their registry, never the model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from flare_scene import Scene, wait_for

from fedmat import files, pipeline
from fedmat.errors import ServiceError
from flows import run_all
from flows.services import prefect_server

pytestmark = pytest.mark.flare
RUN = """
import json, sys
from flows import run_all
project, consortium, name = sys.argv[1:]
found = run_all(consortium, project=project, token=name, run_id=name, register=False, orchestrator="auto")
print(json.dumps({"model": found.model_sha256, "why": found.orchestrator.why, "report": str(found.report)}))
"""


def test_a_registry_that_is_down_leaves_the_registration_pending_and_nothing_is_trained_again(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    project, consortium, name = scene.stage.project, scene.stage.config_file, "registry"
    given = {"project": project, "token": name, "run_id": name, "orchestrator": "none"}
    with pytest.raises(ServiceError) as refused:
        run_all(consortium, tracking_uri="http://127.0.0.1:9", **given)
    assert refused.value.exit_code == 7
    assert "its registration is pending" in refused.value.what and "run the same command again" in refused.value.fix
    folder = project / "runs" / name
    assert files.sha256_file(folder / pipeline.MODEL) == scene.expected()
    before, said = (folder / "rounds.jsonl").stat().st_mtime_ns, len(scene.said("mill"))
    again = run_all(consortium, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", **given)
    assert again.registered is not None and again.registered["version"]
    assert (folder / "rounds.jsonl").stat().st_mtime_ns == before
    assert len(scene.said("mill")) == said


def test_a_prefect_that_dies_during_a_run_costs_its_pages_and_not_the_run(scene: Scene, tmp_path: Path) -> None:
    child = prefect_server(tmp_path)
    forge, name = scene.moments("forge"), "pages"
    forge.script([{"kind": "TrainRequest", "round": 2, "hold": "pages"}])
    try:
        child.wait_ready(180.0)
        env = os.environ | {"PREFECT_API_URL": child.url.removesuffix("/health"), "PREFECT_CLIENT_MAX_RETRIES": "1"}
        arguments = [str(scene.stage.project), str(scene.stage.config_file), name]
        run = subprocess.Popen([sys.executable, "-c", RUN, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            wait_for(lambda: forge.holds("pages") or run.poll() is not None, 120.0, "the rounds begin")
            os.killpg(child.pid, signal.SIGKILL)
            forge.release("pages")
            out, err = run.communicate(timeout=240.0)
        finally:
            run.kill()
    finally:
        child.stop()
        scene.honest()
    assert run.returncode == 0, err.decode()[-2000:]
    told = json.loads(out.decode().splitlines()[-1])
    assert told["model"] == scene.expected()
    assert Path(told["report"]).exists()
    assert "plain functions, because Prefect failed during the run" in told["why"]
