"""The benchmark's page: one HTML file from one JSON summary.

Knows: the summary of ``fedmat.comparison`` and how a person reads it. Refuses to know: how anything was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmat import figures, files
from fedmat._version import __version__
from fedmat.comparison import OWN, RIVALS
from fedmat.figures import Point
from fedmat.report import render
from fedmat.verdict import UNKNOWN

SUMMARY, PAGE = "bench.json", "bench.html"


def write(summary: Mapping[str, Any], about: Mapping[str, str], out: Path) -> Path:
    """Writes the summary as JSON and as a page into ``out``; returns the page's path."""
    files.write_json(out / SUMMARY, dict(summary))
    plots = {}
    for name, case in summary["cases"].items():
        points = {arm: {"federated": Point(m["mae"], m["low"], m["high"])} for arm, m in case["global"].items()}
        plots[name] = figures.intervals(
            points, {"federated": "mean absolute error"}, about[name], f"Errors of all arms, {name}"
        )
    page = render(
        "bench.html.j2", plots, cases=summary["cases"], claims=summary["claims"], about=about, own_arms=list(OWN),
        rivals=list(RIVALS), unknown=UNKNOWN, version=__version__,
    )  # fmt: skip
    files.write_atomic(out / PAGE, page.encode())
    return out / PAGE
