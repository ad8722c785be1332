"""All answers of an audit on one page for people, with the graph of what came from what; made from the audit alone.

Knows: how answers, checks, entries and the graph are shown. Refuses to know: how they were found, services, the clock. The page
needs no network and runs no script; everything in it is escaped, since a bundle may come from anybody.

References:
    W3C, "Web Content Accessibility Guidelines 2.2" (a drawing has a text alternative, and its content is in tables too).
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from fedmat import report
from fedmat.audit import BEYOND, Answer, Audit
from fedmat.checks import PROVED, worst
from fedmat.lineage import Graph, Node, dataset_id, model_id

MOST_ROWS = 2000  # of a table on the page; the rest is in the JSON answers
_COLUMNS = (
    "sources", "dataset", "features", "updates", "rounds", "model", "what was stated of it",
)  # fmt: skip
_WIDE, _HIGH, _GAP, _TOP = 150, 34, 12, 28  # of a box, between boxes, above them: pixels


def page(audit: Audit) -> str:
    """Returns the page."""
    summary = audit.summary()
    checks = audit.checks
    counted = [a for answers in summary.values() for a in answers if a.place != BEYOND]
    bundle = audit.verified.bundle
    return report.render(
        "audit.html.j2", {"graph": drawing(audit)},
        bundle=bundle, verdict=worst(a.verdict for a in counted), verified=worst(c.verdict for c in checks), anchor=audit.anchored,
        sections=[(name, _id(name), [_shown(a) for a in answers]) for name, answers in summary.items()],
        problems=[c for c in checks if c.verdict != PROVED], n_checks=len(checks),
        topics=by_topic(checks), entries=entries(audit)[:MOST_ROWS], more=max(0, audit.ledger.size - MOST_ROWS), size=audit.ledger.size,
    )  # fmt: skip


def by_topic(checks: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns how many checks of each topic are proved, refuted and not evidenced."""
    rows: dict[str, dict[str, Any]] = {}
    for check in checks:
        topic = check.topic.partition(":")[0]
        row = rows.setdefault(topic, {"topic": topic, "proved": 0, "refuted": 0, "not evidenced": 0})
        row[check.verdict] += 1
    return list(rows.values())


def entries(audit: Audit) -> list[dict[str, Any]]:
    """Returns the accepted entries in order, each with who signed it and whether it counts."""
    placed = {p.index: p.entry for run in audit.fold.runs.values() for p in run.all()}
    placed |= {p.index: p.entry for p in audit.ledger.charters}
    placed |= {p.index: p.entry for p in (*audit.fold.departures, *audit.fold.pods.values())}
    rows = []
    for index, signed in enumerate(audit.ledger.signed):
        entry = placed.get(index)
        rows.append({
            "entry": index, "type": signed.type, "by": signed.by, "time": signed.time, "signed_by": ", ".join(signed.signers),
            "about": _about(entry) if entry is not None else "", "sha256": signed.sha256, "verdict": audit.ledger.verdict(index),
        })  # fmt: skip
    return rows


def _about(entry: Any) -> str:
    run = getattr(entry, "run", "")
    number = getattr(entry, "round", None)
    where = run if number is None else f"{run}, round {number + 1}" if number >= 0 else f"{run}, before the first round"
    return f"{where}: {entry.site}" if hasattr(entry, "site") and where else where or getattr(entry, "site", "")


def table(value: Any) -> tuple[list[str], list[list[str]]]:
    """Returns columns and rows of an answer's value, as text: a list of rows, or fields one below the other."""
    if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
        value = [_counted_from_one(row) if "destination" in row else row for row in value]
        columns = list(dict.fromkeys(k for row in value for k in row))
        return columns, [[text(row.get(c)) for c in columns] for row in value]
    if isinstance(value, Mapping):
        return ["", "value"], [[str(k), text(v)] for k, v in value.items()]
    return [], []


def _counted_from_one(line: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a line of an egress ledger as people count lines and rounds."""
    told = {k: v for k, v in line.items() if k != "n"}
    return {"line": line["n"] + 1, **told, "round": line["round"] + 1 if line["round"] >= 0 else None}


def text(value: Any) -> str:
    """Returns a plain JSON value as people read it."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {text(v)}" for k, v in value.items()) or "–"
    if isinstance(value, list | tuple):
        if value and all(isinstance(v, Mapping) for v in value):
            return f"{len(value)} rows"
        return ", ".join(text(v) for v in value) or "–"
    return str(value)


def _shown(answer: Answer) -> dict[str, Any]:
    value = answer.value
    whole = isinstance(value, Mapping) and any(isinstance(v, list) and v and isinstance(v[0], Mapping) for v in value.values())
    tables = [("", *table({k: v for k, v in value.items() if not _rows(v)} if whole else value))]
    if whole:
        tables += [(str(k), *table(v)) for k, v in value.items() if _rows(v)]
    return {
        "answer": answer,
        "tables": [(name, columns, rows[:MOST_ROWS], len(rows)) for name, columns, rows in tables if rows],
        "evidence": list(answer.evidence[:50]),
        "more": max(0, len(answer.evidence) - 50),
    }  # fmt: skip


def _rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _id(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


# --- the graph -------------------------------------------------------------------------------------------------------


def drawing(audit: Audit) -> str:
    """Returns the graph of the bundle's run as SVG: rounds and the updates of one site drawn as one box each; "" without a run."""
    run = audit.verified.run
    if run is None:
        return ""
    name = run.plan.entry.run
    graph = audit.graph
    columns: list[list[tuple[str, str, str]]] = [[] for _ in _COLUMNS]  # key, label, what a pointer over it tells
    links: list[tuple[str, str]] = []

    def box(column: int, key: str, label: str, told: str) -> str:
        if key not in {k for k, _, _ in columns[column]}:
            columns[column].append((key, label, told))
        return key

    for site, placed in sorted(run.datasets.items()):
        e = placed.entry
        dataset = box(
            1, dataset_id(e.dataset_sha256), f"{site} {e.version}".strip(), f"dataset {e.dataset_sha256}, entry {placed.index}"
        )
        for source, sha256 in sorted(e.sources.items()):
            links.append((dataset, box(0, f"source:{sha256}@{site}", source, f"raw file {sha256}, entry {placed.index}")))
        features = box(2, f"features@{site}", f"features of {site}", f"features {e.features_sha256}, entry {placed.index}")
        links.append((features, dataset))
        signed = sorted(n for n, s in run.updates if s == site)
        if signed:
            first = run.updates[signed[0], site]
            updates = box(3, f"updates@{site}", f"{len(signed)} updates", f"of {site}, signed, entries {first.index} and on")
            links.append((updates, features))
    if run.aggregates:
        last = run.aggregates[max(run.aggregates)]
        rounds = box(4, "rounds", f"{len(run.aggregates)} rounds", f"{last.entry.rule}, the last one is entry {last.index}")
        links += [(rounds, key) for key, _, _ in columns[3]]
        if run.evaluation is not None:
            model = model_id(run.evaluation.entry.model_sha256)
            links.append(
                (
                    box(
                        5,
                        model,
                        graph.node(model).label,
                        f"model {run.evaluation.entry.model_sha256}, entry {run.evaluation.index}",
                    ),
                    rounds,
                )
            )
            for node in _stated(graph, model, name):
                links.append(
                    (
                        box(
                            6,
                            node.id,
                            node.label.removeprefix(f"{name}: "),
                            f"{node.kind}, entry {node.evidence}, signed by {node.signed_by}",
                        ),
                        model,
                    )
                )
    return _svg(columns, links, name)


def _stated(graph: Graph, model: str, run: str) -> list[Node]:
    return [
        n for n in graph.descendants(model, "evaluation", "registration", "approval", "contribution") if n.run == run
    ]  # fmt: skip


def _svg(columns: Sequence[Sequence[tuple[str, str, str]]], links: Sequence[tuple[str, str]], run: str) -> str:
    shown = [(name, boxes) for name, boxes in zip(_COLUMNS, columns, strict=True) if boxes]
    height = _TOP + max((len(boxes) for _, boxes in shown), default=1) * (_HIGH + _GAP) + _GAP
    width = max(1, len(shown)) * (_WIDE + 40)
    at: dict[str, tuple[float, float]] = {}
    parts: list[str] = []
    for i, (name, boxes) in enumerate(shown):
        x = 20 + i * (_WIDE + 40)
        parts.append(f'<text x="{x}" y="16" fill="var(--soft)" font-size="12">{html.escape(name)}</text>')
        space = (height - _TOP - len(boxes) * (_HIGH + _GAP)) / 2
        for j, (key, label, told) in enumerate(boxes):
            y = _TOP + space + j * (_HIGH + _GAP)
            at[key] = (x, y)
            parts.append(
                f'<g><title>{html.escape(told)}</title><rect x="{x}" y="{y:.0f}" width="{_WIDE}" height="{_HIGH}" rx="6" '
                f'fill="var(--panel)" stroke="var(--rule)"/><text x="{x + 8}" y="{y + 21:.0f}" fill="var(--ink)" font-size="12">'
                f"{html.escape(_short(label))}</text></g>"
            )
    lines = []
    for later, earlier in links:
        if later in at and earlier in at:
            (x1, y1), (x2, y2) = at[earlier], at[later]
            a, b, c, d = x1 + _WIDE, y1 + _HIGH / 2, x2, y2 + _HIGH / 2
            lines.append(
                f'<path d="M{a:.0f} {b:.0f} C{a + 20:.0f} {b:.0f} {c - 20:.0f} {d:.0f} {c:.0f} {d:.0f}" fill="none" stroke="var(--soft)"/>'
            )
    about = html.escape(f"What the model of run {run} came from; the tables of this page hold the same", quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}" role="img" aria-label="{about}" '
        f'class="plot">{"".join(lines)}{"".join(parts)}</svg>'
    )


def _short(label: str, limit: int = 21) -> str:
    return label if len(label) <= limit else label[: limit - 1] + "…"
