"""What the engines cost beyond training, as ratios of one run on this machine.

Run ``python -m benchmarks.rounds`` (or ``make bench``). Prints one JSON object: seconds to start, seconds per round
beyond the sites' own work, bytes per round, for the in-process engine and for one process per site, on the same
synthetic consortium (4 sites, a 128 x 128 network over 150 features).
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import fedmat.telemetry  # noqa: F401
from fedmat.config import ConsortiumConfig
from fedmat.features.table import FeatureTable
from fedmat.federation.engine import Engine, Handler, InProcessEngine, ProcessEngine
from fedmat.seeds import stream

SITES = ("ash", "birch", "cedar", "dogwood")
ROUNDS, ROWS, WIDTH = 20, 800, 150


def settings() -> ConsortiumConfig:
    """The benchmark's consortium."""
    return ConsortiumConfig.model_validate(
        {
            "name": "bench",
            "title": "Benchmark",
            "simulated": True,
            "task": {"name": "bench", "record_type": "alloy", "target": "hardness_hv", "unit": ""},
            "features": ["composition"],
            "plan": {"rounds": ROUNDS, "local": {"steps": 40}, "deduplicate": False},
            "members": [{"site": s, "organisation": s, "file": "none"} for s in SITES],
        }
    )


def handler(site: str, folder: Path) -> Handler:
    """A site's real worker over random numbers."""
    from fedmat.federation.plan import Plan
    from fedmat.federation.site import SiteWorker

    rng = stream(1, "bench", site)
    x = rng.normal(size=(ROWS, WIDTH))
    split = (np.arange(ROWS) % 5).clip(0, 2).astype(np.int8)
    names = tuple(f"f{i}" for i in range(WIDTH))
    y = (x[:, 0] + 0.1 * rng.normal(size=ROWS))[:, None]
    numbers, bound = np.arange(ROWS), np.zeros(y.shape, dtype=np.int8)
    table = FeatureTable(names, x, y, numbers, split, bound, numbers, sha256="t", features_sha256="f")
    return SiteWorker(site, Plan.of(settings()), table, {"sha256": site, "rejected": {}}, folder / site).handle


def measure(kind: str, folder: Path) -> dict[str, Any]:
    """Runs the consortium on one engine and returns what it cost."""
    from fedmat.federation.coordinator import Coordinator
    from fedmat.federation.plan import Plan
    from fedmat.models.network import Architecture

    plan = Plan.of(settings())
    started = time.perf_counter()
    engine: Engine
    if kind == "in-process":
        engine = InProcessEngine({s: handler(s, folder) for s in SITES})
    else:
        engine = ProcessEngine({s: (handler, (s, folder)) for s in SITES})
    architecture = Architecture.of(plan.model, plan.tasks, plan.settings)
    lead = Coordinator(plan, lambda n: architecture.initial_weights(n, plan.settings.seed), folder)
    folder.mkdir(parents=True, exist_ok=True)
    with engine:
        reports, marks = [], [time.perf_counter()]
        for report in lead.run(engine):
            reports.append(report)
            marks.append(time.perf_counter())
    whole = float(np.diff(marks)[1:].mean())
    overhead = float(np.mean([r.overhead_seconds for r in reports[1:]])) if kind == "in-process" else None
    return {
        "start_s": round(marks[0] - started + max(0.0, (marks[1] - marks[0]) - whole), 3),
        "round_s": round(whole, 4),
        "beyond_training_s_per_round": None
        if overhead is None
        else round(overhead + whole - np.mean([r.seconds for r in reports[1:]]), 4),
        "bytes_per_site_and_round": {"down": reports[0].bytes_down["ash"], "up": reports[0].bytes_up["ash"]},
        "model_sha256": reports[-1].model_sha256,
    }


def main() -> None:
    """Measures both engines and prints the comparison."""
    from fedmat.training import trainer

    started = time.perf_counter()
    trainer.warm_up()
    out: dict[str, Any] = {"imports_s": round(time.perf_counter() - started, 2)}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("in-process", "process-per-site"):
            out[kind] = measure(kind, Path(folder) / kind)
    out["same_model"] = out["in-process"]["model_sha256"] == out["process-per-site"]["model_sha256"]
    out["process_to_in_process_round_time"] = round(out["process-per-site"]["round_s"] / out["in-process"]["round_s"], 2)
    out["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    json.dump(out, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
