"""What Prefect adds to the same run done by plain functions, in one process on this machine.

Run ``python -m benchmarks.orchestration`` (or ``make bench``). Prints one JSON object: whole-run seconds of the example
consortium as plain functions, with Prefect's own short-lived server on a fresh database, and on the now existing one;
seconds a round in each; and the time of ``fedmat --help``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fedmat.telemetry  # noqa: F401

CONSORTIUM = Path(__file__).resolve().parent.parent / "examples" / "cells" / "consortium.yaml"
ROUNDS = 30


def run(home: Path, orchestrator: str) -> dict[str, Any]:
    """One whole run without registration; returns its seconds and its model."""
    from flows import run_all

    started = time.perf_counter()
    done = run_all(CONSORTIUM, home=home, rounds=ROUNDS, fresh=True, register=False, orchestrator=orchestrator)  # type: ignore[arg-type]
    whole = time.perf_counter() - started
    timings = json.loads((done.run.folder / "timings.json").read_text())
    return {
        "whole_s": round(whole, 1),
        "train_s_per_round": round(timings["train"] / ROUNDS, 4),
        "model_sha256": done.model_sha256,
    }


def help_seconds() -> float:
    """Best of five of ``fedmat --help`` as a whole process."""
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fedmat", "--help"], check=True, stdout=subprocess.DEVNULL)
        best = min(best, time.perf_counter() - started)
    return round(best, 3)


def main() -> None:
    """Measures and prints."""
    out: dict[str, Any] = {"help_s": help_seconds()}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        run(home, "none")  # warms caches and imports, so that the three below differ by Prefect alone
        out["plain"] = run(home, "none")
        out["prefect_first"] = run(home, "prefect")
        out["prefect_again"] = run(home, "prefect")
    out["prefect_first_adds_s"] = round(out["prefect_first"]["whole_s"] - out["plain"]["whole_s"], 1)
    out["prefect_again_adds_s"] = round(out["prefect_again"]["whole_s"] - out["plain"]["whole_s"], 1)
    out["prefect_adds_s_per_round"] = round(out["prefect_again"]["train_s_per_round"] - out["plain"]["train_s_per_round"], 4)
    out["same_model"] = len({out[k]["model_sha256"] for k in ("plain", "prefect_first", "prefect_again")}) == 1
    json.dump(out, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
