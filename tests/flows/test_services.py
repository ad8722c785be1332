"""A scheduled run really happens, and the servers that fedmat starts end with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import small

from flows import run_all

pytestmark = pytest.mark.timeout(600)

SERVE = """
import sys
from datetime import timedelta
from flows.serve import serve
serve(sys.argv[1], home=sys.argv[2], every=timedelta(seconds=20), prefect_port=0, register=False, name="tests",
      say=lambda text: print(text, flush=True))
"""
UI = """
import sys
from flows.serve import ui
ui(sys.argv[1], prefect_port=0, mlflow_port=0, tracking_uri=sys.argv[2], say=lambda text: print(text, flush=True))
"""


@contextmanager
def started(code: str, *arguments: str, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A Python process in a session of its own; whatever it leaves behind is killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "MARK": f"{id(code)}-{os.getpid()}-{time.time()}", **(env or {})},
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            for pid in family(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.kill()


def family(pid: int) -> set[int]:
    """Processes that inherited the environment mark of ``pid``, itself included, found while it lives or after."""
    if pid not in MARKS:
        with suppress(OSError):
            entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            MARKS[pid] = next(e for e in entries if e.startswith(b"MARK="))
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if MARKS.get(pid, b"?") in path.read_bytes().split(b"\0") and not zombie(path.parent):
                found.add(int(path.parent.name))
    return found


MARKS: dict[int, bytes] = {}


def zombie(process: Path) -> bool:
    return (process / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


def until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.5)
    raise AssertionError(f"{what}: not within {timeout_s:.0f} s")


def line_with(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return line.strip()
    raise AssertionError(f"the process ended without saying {word}")


def ask(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.load(reply)


def test_a_scheduled_round_happens_and_everything_stops_with_the_server(tmp_path: Path) -> None:
    """Import tests and pip check pass on dependency sets on which no scheduled run is ever created: see one happen."""
    consortium = small.build(tmp_path / "c", rounds=2)
    bare = run_all(consortium, home=tmp_path / "bare", orchestrator="none", register=False)
    env = {"PREFECT_RUNNER_POLL_FREQUENCY": "2"}
    with started(SERVE, str(consortium), str(tmp_path / "home"), env=env) as process:
        url = line_with(process, "serving").rsplit("; ", 1)[1]
        everyone = family(process.pid)
        assert len(everyone) >= 2

        def completed() -> list[dict[str, Any]]:
            query = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}, "deployments": {"name": {"any_": ["tests"]}}}
            return list(ask(f"{url}/api/flow_runs/filter", query))

        found = until(completed, 240, "a scheduled run that completed")
        os.kill(process.pid, signal.SIGTERM)
        process.wait(60)
        until(lambda: not family(process.pid), 30, "no process left")
    assert all(run["auto_scheduled"] for run in found)
    assert found[0]["name"] == f"small-alloys/{bare.run.run_id}", "the scheduled run trained on something else"
    assert (tmp_path / "home/runs" / bare.run.run_id / "report.html").exists()
    model = (tmp_path / "home/runs" / bare.run.run_id / "model.safetensors").read_bytes()
    assert model == (bare.run.folder / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_pages_open_and_both_servers_stop_with_the_command(tmp_path: Path, sign: signal.Signals) -> None:
    with started(UI, str(tmp_path / "home"), f"sqlite:///{tmp_path}/mlruns/mlflow.db") as process:
        prefect = line_with(process, "Prefect ").split()[-1]
        mlflow = line_with(process, "MLflow ").split()[-1]
        for url in (prefect, mlflow):
            with urllib.request.urlopen(url, timeout=30) as reply:
                assert b"<html" in reply.read().lower()
        assert len(family(process.pid)) >= 3
        os.kill(process.pid, sign)
        process.wait(60)
        until(lambda: not family(process.pid), 30, f"no process left after {sign.name}")
        if sign is not signal.SIGKILL:
            assert process.returncode == 0
            assert not (tmp_path / "home/prefect/server.json").exists()
