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
from fedmat.verdict import UNKNOWN, number

SUMMARY, PAGE, TEXT = "bench.json", "bench.html", "bench.md"


def write(summary: Mapping[str, Any], about: Mapping[str, str], out: Path) -> Path:
    """Writes the summary as JSON, as a page and as Markdown tables into ``out``; returns the page's path."""
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
    files.write_atomic(out / TEXT, markdown(summary, about).encode())
    return out / PAGE


def markdown(summary: Mapping[str, Any], about: Mapping[str, str]) -> str:
    """Returns the claims and the tables as Markdown, for a document."""
    lines = ["| claim | measured | verdict |", "| --- | --- | --- |"]
    lines += [f"| {c['claim']} | {c['measured']} | {c['verdict']} |" for c in summary["claims"]]
    for name, case in summary["cases"].items():
        lines += [
            "",
            f"## {name}: {about[name]}",
            "",
            "| one model for all sites | seeds | error | 95 % interval | ratio to pooled |",
        ]
        lines += ["| --- | --- | --- | --- | --- |"]
        for arm, m in case["global"].items():
            r = case["to_pooled"].get(arm)
            ratio = _between(r["ratio"], r["low"], r["high"]) if r else ""
            lines.append(f"| {arm} | {m['seeds']} | {number(m['mae'])} | {_ends(m['low'], m['high'])} | {ratio} |")
        shown = [a for a in OWN if any(a in e["mae"] for e in case["own"].values())]
        lines += ["", f"| own materials | rows (groups) | {' | '.join(shown)} | gain over local | over FedAvg + fine-tuning |"]
        lines += ["| --- " * (len(shown) + 4) + "|"]
        for site, e in case["own"].items():
            cells = [number(e["mae"][a]) if a in e["mae"] else "" for a in shown]
            gains = [_gain(e["against"].get(rival)) for rival in ("local", "fedavg, fine-tuned")]
            lines.append(f"| {site} | {e['n']} ({e['groups']}) | {' | '.join(cells)} | {' | '.join(gains)} |")
        if case["coverage"]:
            lines += [
                "",
                "| 90 % intervals: rows inside, half-width | joint | personal | local ensemble |",
                "| --- | --- | --- | --- |",
            ]
            for site, row in case["coverage"].items():
                cells = [_covered(row.get(kind)) for kind in ("federated", "personal", "local")]
                lines.append(f"| {site} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _between(value: float | None, low: float | None, high: float | None) -> str:
    ends = _ends(low, high)
    return number(value) + (f" ({ends})" if ends else "")


def _ends(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{number(low)} to {number(high)}"


def _gain(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    text = f"{100 * found['gain']:+.1f} %"
    if found["low"] is not None:
        text += f" ({100 * found['low']:+.0f} to {100 * found['high']:+.0f})"
    return f"**{text}**" if found.get("significant") else text


def _covered(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    return (
        f"{100 * found['covered']:.0f} % ({100 * found['low']:.0f} to {100 * found['high']:.0f}), {number(found['half_width'])}"
    )
