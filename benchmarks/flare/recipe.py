"""NVIDIA FLARE's own FedAvg recipe in FLARE's own environments; started by ``benchmarks/carriers.py`` as a process of its own.

Knows: FLARE. Refuses to know: fedmat. Prints one line of JSON, the last on stdout: seconds since this script began, rounds and
sites as FLARE's own record of the rounds has them, how long they took by its log, and the number of parameters.
"""

from __future__ import annotations

import json
import re
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()


def main(kind: str, sites: int, rounds: int, workspace: str, width: int, hidden: tuple[int, ...]) -> dict[str, Any]:
    """Runs the recipe once.

    Args:
        kind: ``simulator``, or ``poc``: a server and clients as processes of their own, with mutual TLS on loopback.
        workspace: a folder for the simulator; the other takes NVFLARE_POC_WORKSPACE.
    """
    from local_step import Network  # type: ignore[import-not-found]  # beside this script
    from nvflare.app_opt.pt.recipes import FedAvgRecipe
    from nvflare.recipe import PocEnv, SimEnv

    network = Network(width, hidden)
    recipe = FedAvgRecipe(
        name="fedavg",
        model=network,
        min_clients=sites,
        num_rounds=rounds,
        train_script=str(Path(__file__).with_name("local_step.py")),
        train_args=" ".join(map(str, (width, *hidden))),
    )
    env = SimEnv(num_clients=sites, workspace_root=workspace) if kind == "simulator" else PocEnv(num_clients=sites)
    try:
        run = recipe.execute(env)
        submitted = time.perf_counter() - STARTED
        found = env.get_job_result(run.get_job_id())
        finished = time.perf_counter() - STARTED
        record = sorted(Path(found).rglob("round_metrics.jsonl"))
        told = [json.loads(line) for line in record[0].read_text().splitlines()] if record else []
        took = round_seconds(Path(found))
    finally:
        if kind == "poc":
            env.stop(clean_up=True)
    return {
        "submitted_s": round(submitted, 2),
        "finished_s": round(finished, 2),
        "rounds": len(told),
        "round_seconds": took,
        "sites": min((len(r["sites"]) for r in told), default=0),
        "parameters": sum(p.numel() for p in network.parameters()),
    }


def round_seconds(folder: Path) -> list[float]:
    """Seconds from the start of each round to that of the next, by the server's log; the last round has no such end."""
    starts: dict[int, datetime] = {}
    for path in folder.rglob("log.json"):
        for line in path.read_text().splitlines():
            if (found := re.search(r"Round (\d+) started\.", line)) is not None:
                at = datetime.strptime(json.loads(line)["asctime"], "%Y-%m-%d %H:%M:%S,%f")
                starts.setdefault(int(found[1]), at)
    return [(starts[n + 1] - at).total_seconds() for n, at in sorted(starts.items()) if n + 1 in starts]


if __name__ == "__main__":
    wanted = (sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
    answer = main(*wanted, tuple(int(a) for a in sys.argv[6:]))
    print("\n" + json.dumps(answer), flush=True)
