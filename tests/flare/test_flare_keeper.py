"""What people start keeps its processes running, says so, and ends all of them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import small
from flare_scene import alive, descendants, kill, wait_for
from flare_visitor import Visitor

from fedmat import provision
from flows import parties

pytestmark = pytest.mark.flare


@contextmanager
def started(*words: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A fedmat command that runs until it is stopped."""
    with log.open("wb") as output:
        keeper = subprocess.Popen([sys.executable, "-m", "fedmat", *words], stdout=output, stderr=output)
    try:
        yield keeper
    finally:
        keeper.terminate()
        keeper.wait(60.0)


def again(folder: Path, name: str, old: int) -> bool:
    """Whether a process was started anew."""
    return parties.processes(folder).get(name, old) != old


def test_a_partys_processes_that_are_killed_are_started_again_and_all_end_together(visitor: Visitor, tmp_path: Path) -> None:
    home, log = visitor.home, tmp_path / "keeper.log"
    visitor.since = time.time()
    with started("site", "start", "--home", str(home), log=log) as keeper:
        wait_for(visitor.connected, 90.0, "it is let in")
        for name in ("client", "desk"):
            old = parties.processes(home)[name]
            kill(old)
            wait_for(lambda name=name, old=old: again(home, name, old), 30.0, f"the {name} is started again")
        visitor.since = time.time()
        wait_for(visitor.connected, 60.0, "it is let in again")
        second = subprocess.run([sys.executable, "-m", "fedmat", "site", "start", "--home", str(home)], capture_output=True)
        assert second.returncode == 5 and b"is running already" in second.stdout + second.stderr
        family = descendants(keeper.pid)
        assert parties.stop(home)
        assert keeper.wait(30.0) == 0
    said = log.read_text()
    for name in ("FLARE client", "desk"):
        assert f"the {name} of auditor ended" in said and "starting it again in" in said
    assert "Traceback" not in said
    wait_for(lambda: not any(alive(pid) for pid in family), 5.0, "everything ends")
    assert parties.processes(home) == {} and not (home / "run" / "desk.json").exists()


def test_a_server_that_is_killed_is_started_again(tmp_path: Path) -> None:
    project, log = tmp_path / "project", tmp_path / "keeper.log"
    provision.init(small.build(tmp_path / "c"), project, host="localhost", now=datetime.now(UTC), port=parties.free_port())
    with started("consortium", "start", "--project", str(project), log=log):
        wait_for(lambda: (parties.operator_status(project)["connected"]) == {}, 90.0, "the server answers")
        old = parties.processes(project)["server"]
        kill(old)
        wait_for(lambda: again(project, "server", old), 30.0, "the server is started again")
        wait_for(lambda: (parties.operator_status(project)["connected"]) == {}, 90.0, "the server answers again")
    assert "the FLARE server ended" in log.read_text()
