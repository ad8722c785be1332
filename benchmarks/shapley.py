"""What members' records were worth, by training every coalition anew, and how near the affordable estimates come to it.

Run ``python benchmarks/shapley.py`` (a minute: the shipped example, one seed, a few rounds: does it work?), or with ``--full``, which
needs the public data sets (``fedmat data get calisol23``, ``fedmat data get mpea``; FEDMAT_DATA): half an hour on one core, goes on where it
is interrupted, every coalition's federation is a file under ``--out``. Prints one JSON object; docs/shapley-benchmark.md has its tables.

Main case: the five sites of examples/liquid-electrolytes with their own plan, shortened to one network and 12 rounds, the last 4
averaged. The same with one site's labels shuffled, with a rider, with a twin, with a site divided in two; and six sites of
examples/alloys, yield strength, 20 rounds, the last 5 averaged.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fedmat.telemetry  # noqa: F401  before numpy: threads of its library wait busily, which counts as CPU time

# isort: split
import torch

from fedmat import benchmark, coalitions, pipeline
from fedmat.coalitions import Case
from fedmat.features.table import TEST
from fedmat.hostile import cut

MADE_UP_ROWS = 1500
SEEDS = (17, 18, 19)
LIQUIDS, ALLOYS = "C4a", "C2-YS"


def opened(name: str, out: Path, rounds: int, average: int, members: int | None = None) -> tuple[Case, Any]:
    """Returns a consortium of the suite as a case, and the run its tables come from."""
    job = benchmark.jobs((name,), SEEDS[:1], (), out)[0]
    benchmark.prepare(job)
    run = pipeline.open_run(job.file, home=job.home)
    tables = benchmark.deduplicated(run)
    tables = cut(tables, members) if members else tables
    return coalitions.base(name, coalitions.shortened(run.plan(), rounds, average), tables), run


def full(out: Path) -> Iterator[tuple[Case, tuple[int, ...]]]:
    """Yields the cases and their seeds, the main ones first."""
    liquids, _ = opened(LIQUIDS, out, 12, 4)
    yield liquids, SEEDS
    yield opened(ALLOYS, out, 20, 5)[0], SEEDS[:2]
    yield coalitions.shuffled(liquids, "libob"), SEEDS
    yield coalitions.ridden(liquids, "rider-noise", MADE_UP_ROWS), SEEDS
    yield coalitions.ridden(liquids, "rider-zero", MADE_UP_ROWS), SEEDS
    yield coalitions.twinned(liquids, "liasf6"), SEEDS[:2]
    yield coalitions.divided(liquids, "lipf6"), SEEDS[:1]
    yield coalitions.ridden(liquids, "rider-again", MADE_UP_ROWS), SEEDS[:1]


def quick(out: Path) -> Iterator[tuple[Case, tuple[int, ...]]]:
    """Yields the shipped example, cut into five sites, and a rider."""
    case, _ = opened(benchmark.DEMO, out, 4, 2, members=5)
    yield case, SEEDS[:1]


def copies(out: Path) -> dict[str, Any]:
    """What a search for duplicates leaves of a site and of its copy."""
    _, run = opened(LIQUIDS, out, 12, 4)
    keys = {s: found for s in run.sites if (found := pipeline.matching_keys(run, s)) is not None}
    tested = {s: pipeline.site_table(run, s).split == TEST for s in run.sites}
    return coalitions.rows_left(keys, tested, "liasf6")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--full", action="store_true", help="the real data sets")
    parser.add_argument("--out", type=Path, default=Path(".fedmat/bench/shapley"), help="where results are kept")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    told: list[dict[str, Any]] = []
    for case, seeds in full(chosen.out) if chosen.full else quick(chosen.out):
        for seed in seeds:
            coalitions.worth(case, seed, chosen.out, "mae")
        told.append(coalitions.summary(case, seeds, chosen.out, validation="/" not in case.name))
        sys.stderr.write(f"{case.name}: measured\n")
    found: dict[str, Any] = {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}, "cases": told,
    }  # fmt: skip
    if chosen.full:
        found["duplicates searched for"] = copies(chosen.out)
    sys.stdout.write(json.dumps(_known(found), indent=1, allow_nan=False) + "\n")


def _known(told: Any) -> Any:
    """Returns numbers that are none as null."""
    if isinstance(told, dict):
        return {k: _known(v) for k, v in told.items()}
    if isinstance(told, list):
        return [_known(v) for v in told]
    return None if isinstance(told, float) and not math.isfinite(told) else told


if __name__ == "__main__":
    main()
