"""Ctrl-C in the middle of a rehearsal leaves no process and no folder behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small
from flare_scene import alive, command, descendants

pytestmark = pytest.mark.flare
ROUNDS = 400  # of which it does a few


def working_below(folder: Path) -> dict[int, str]:
    """Every process whose command line or working folder is of that folder."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        try:
            where = os.readlink(entry / "cwd")
        except OSError:
            where = ""
        if pid != os.getpid() and (str(folder) in command(pid) or where.startswith(str(folder))):
            found[pid] = command(pid)
    return found


@pytest.mark.parametrize("moment", ["processes started", "rounds"])
def test_ctrl_c_leaves_nothing_behind(moment: str, tmp_path: Path) -> None:
    consortium, temporary = small.build(tmp_path / "c", rounds=ROUNDS), tmp_path / "t"
    temporary.mkdir()
    rehearsal = subprocess.Popen(
        [sys.executable, "-m", "fedmat", "rehearse", str(consortium)],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background are deaf to it
        text=True,
    )
    assert rehearsal.stdout is not None
    said = ""
    try:
        until = time.monotonic() + 180.0
        if moment == "rounds":
            while not list(temporary.glob("*/operator/runs/*/rounds.jsonl")) and rehearsal.poll() is None:
                assert time.monotonic() < until
                time.sleep(0.1)
        else:
            while moment not in said:
                line = rehearsal.stdout.readline()
                assert line, said
                said += line
        family = {pid: command(pid) for pid in descendants(rehearsal.pid)}
        assert len(family) > 4
        os.killpg(rehearsal.pid, signal.SIGINT)  # as a terminal does: to the whole group
        since = time.monotonic()
        said += rehearsal.communicate(timeout=60.0)[0]
        took = time.monotonic() - since
    finally:
        if rehearsal.poll() is None:
            rehearsal.terminate()
            rehearsal.wait(30.0)
    assert rehearsal.returncode == 130, said
    assert "Traceback" not in said
    assert took < 30.0
    time.sleep(1.0)
    assert working_below(tmp_path) == {}
    assert {pid: c for pid, c in family.items() if alive(pid) and command(pid) == c} == {}
    assert [p.name for p in temporary.iterdir() if "fedmat" in p.name] == []
