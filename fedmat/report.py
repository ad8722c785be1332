"""The report of a run: one page for people, made from the run's files alone.

Knows: which file answers which question of a reader. Refuses to know: records, services, the clock. What is not in
the run's folder is shown as "not evidenced"; nothing is assumed.

References:
    W3C, "Web Content Accessibility Guidelines 2.2" (every plot has its numbers in a table and a text alternative).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from fedmat import evidence as ev
from fedmat import figures, files, wire
from fedmat.errors import StateError
from fedmat.evidence import Evidence
from fedmat.figures import Point
from fedmat.verdict import UNKNOWN, number, percent, score, size, table, unit_of, verdict

__all__ = ["REPORT", "table", "verdict", "write"]

REPORT = "report.html"
ARMS = {
    "local": "local only", "federated": "federated", "finetuned": "federated, fine-tuned", "personal": "personal mixture", "pooled": "pooled data",
    "dummy": "always the mean",
}  # fmt: skip


def write(run_folder: Path) -> Path:
    """Writes ``report.html`` into a run's folder and returns its path.

    The same files give the same bytes.

    Raises:
        StateError: there is no such folder, or a file in it is damaged.
    """
    evidence = Evidence.read(run_folder)
    page = render("report.html.j2", _plots(evidence), **_content(evidence), unknown=UNKNOWN, arms=ARMS)
    path = run_folder / REPORT
    files.write_atomic(path, page.encode())
    return path


def render(template: str, plots: Mapping[str, str], **content: Any) -> str:
    """Returns a page of ``templates/``: everything in ``content`` is escaped, ``plots`` are our own SVG, whose texts are."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    def source(name: str) -> str:
        return resources.files("fedmat").joinpath("templates", name).read_text(encoding="utf-8")

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(source)
    )
    environment.filters |= {"num": number, "bytes": size, "pct": percent}
    return environment.get_template(template).render(**content, plots={name: Markup(svg) for name, svg in plots.items()})


# --- the page's parts ----------------------------------------------------------------------------------------------


def _content(e: Evidence) -> dict[str, Any]:
    m, plan = e.metrics, e.plan
    sites = m["sites"] if m else {}
    roster = plan["roster"] if plan else sorted(sites)
    attested = e.attestations or {}
    reasons = sorted({k for row in sites.values() for k in row["rejected"]})
    return {
        "run": e.folder.name,
        "metrics": m,
        "plan": plan,
        "title": m["title"] if m else (plan["consortium"] if plan else e.folder.name),
        "verdict": verdict(m) if m else [(f"What this run achieved is {UNKNOWN}: it has no metrics.json yet.", [])],
        "rows": table(m) if m else [],
        "unit": unit_of(m) if m else "",
        "metric": m["task"]["metric"].upper() if m else "",
        "sites": sites,
        "attested": attested,
        "absent": [s for s in roster if s not in sites and s not in {x["site"] for x in m["exclusions"]}] if m else [],
        "reasons": reasons,
        "exclusions": m["exclusions"] if m else [],
        "setup_bytes": _setup_bytes(e.folder),
        "timings": e.timings,
        "settings": ev.flat(plan) if plan else {},
        "checks": _checks(e),
        "files": _files(e.folder),
        "registered": _registry(e.registered),
        "missing": e.missing(),
    }


def _checks(e: Evidence) -> list[tuple[str, str, str]]:
    """Returns (claim, verdict, how) with the verdicts proved, refuted and not evidenced."""
    wrong = {text.split(":")[0]: text for text in e.disagreements()}

    def digest(name: str, known: bool) -> tuple[str, str]:
        if name in wrong:
            return "refuted", wrong[name]
        return (
            ("proved", f"SHA-256 of {name} agrees with metrics.json")
            if known
            else (UNKNOWN, f"{name} or metrics.json is missing")
        )

    there = e.metrics is not None
    out = [
        (
            "The numbers on this page belong to the model in this folder",
            *digest(ev.MODEL, there and (e.folder / ev.MODEL).is_file()),
        ),
        ("The run followed the plan in this folder", *digest(ev.PLAN, there and e.plan is not None)),
        (
            "The sites' statements about their data are the ones used",
            *digest(ev.ATTESTATIONS, there and e.attestations is not None),
        ),
    ]
    if e.rounds is None or e.plan is None:
        out.append(("Every planned round was closed under this plan", UNKNOWN, f"{ev.ROUNDS} or {ev.PLAN} is missing"))
    else:
        asked = int(e.plan["settings"]["rounds"])
        same = {r["plan_sha256"] for r in e.rounds} <= {files.sha256(files.canonical_json(e.plan))}
        good = [r["round"] for r in e.rounds] == list(range(asked)) and same
        out.append(
            (
                "Every planned round was closed under this plan",
                "proved" if good else "refuted",
                f"{len(e.rounds)} of {asked} rounds",
            )
        )
    out.append(("The last round produced this model", *_last_round(e)))
    out.append(
        (
            "A site really trained on the data it named",
            UNKNOWN,
            "a digest shows what a site stated; only the site can show more",
        )
    )
    return out


def _last_round(e: Evidence) -> tuple[str, str]:
    """Returns (verdict, how) of whether the model in the folder is the one the last round's report names."""
    if not e.rounds or not (e.folder / ev.MODEL).is_file():
        return UNKNOWN, f"{ev.ROUNDS} or {ev.MODEL} is missing"
    try:
        model = wire.load_model(e.folder / ev.MODEL)
    except StateError:
        return "refuted", f"{ev.MODEL} cannot be read"
    same = e.rounds[-1]["model_sha256"] == wire.weights_digest(model.weights, model.scaler)
    return "proved" if same else "refuted", "digest in the last round's report"


def _files(folder: Path) -> list[tuple[str, str, int]]:
    names = (
        ev.PLAN,
        ev.MATCHING,
        ev.ATTESTATIONS,
        ev.ROUNDS,
        ev.INTERVALS,
        ev.MODEL,
        ev.EVALUATIONS,
        ev.METRICS,
        ev.TIMINGS,
        ev.REGISTERED,
    )
    return [(n, files.sha256_file(folder / n), (folder / n).stat().st_size) for n in names if (folder / n).is_file()]


def _registry(registered: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Returns what is known about the registered version, without the operator's paths or passwords."""
    if registered is None:
        return None
    uri = str(registered.get("tracking_uri", ""))
    shown = (
        f"{uri.split('://')[0]}://{uri.rpartition('@')[2].rpartition('://')[2]}"
        if uri.startswith("http")
        else "the operator's mlruns/mlflow.db"
    )
    return {**registered, "where": shown}


def _setup_bytes(folder: Path) -> dict[str, int]:
    path = folder / ev.ATTESTATIONS
    return dict(files.read_json(path).get("setup_bytes", {})) if path.is_file() else {}


def _plots(e: Evidence) -> dict[str, str]:
    out: dict[str, str] = {}
    m = e.metrics
    if m:
        metric, unit = m["task"]["metric"], unit_of(m)
        label = f"{metric.upper()}{f', {unit}' if unit else ''} ({'higher' if metric == 'auc' else 'lower'} is better)"
        own = {s: _points(row["own"], metric) for s, row in sorted(m["sites"].items())}
        if any(own.values()):
            out["own"] = figures.intervals(own, ARMS, label, "Error of each model on each site's own test groups; table below")
        beyond = {"one model for all": _points({k: v for k, v in m["global"].items() if k in ARMS}, metric)}
        beyond |= {s: _points(row["global"], metric) for s, row in sorted(m["sites"].items())}
        beyond = {k: v for k, v in beyond.items() if v}
        if beyond:
            out["beyond"] = figures.intervals(beyond, ARMS, label, "Error of each model on all sites' test groups; table below")
        rejected = {s: {k: float(n) for k, n in row["rejected"].items()} for s, row in sorted(m["sites"].items())}
        if any(sum(v.values()) for v in rejected.values()):
            out["rejected"] = figures.bars(rejected, "rejected rows", "Rejected rows by site and reason; table below")
    if e.rounds:
        out |= _round_plots(e.rounds, unit_of(m) if m else "")
    if e.evaluations and m:
        out |= _parity_plots(e.evaluations, m)
    return out


def _round_plots(rounds: list[dict[str, Any]], unit: str) -> dict[str, str]:
    def over(key: str) -> dict[str, list[tuple[int, float]]]:
        names = sorted({s for r in rounds for s in r[key]})
        return {s: [(r["round"] + 1, r[key][s]) for r in rounds if r[key].get(s) is not None] for s in names}

    validation = over("validation")
    shown = {k: v for k, v in validation.items() if k in ("mae", "rmse")}
    panels = {"training loss at each site": over("train_loss")}
    if shown:
        panels[f"joint model on validation rows{f', {unit}' if unit else ''}"] = shown
    traffic = {k: {s: [(n, v / 1e3) for n, v in points] for s, points in over(k).items()} for k in ("bytes_down", "bytes_up")}
    return {
        "learning": figures.curves(panels, "round", "Training loss per site and validation error of the joint model over rounds"),
        "bytes": figures.curves(
            {"to each site, kB": traffic["bytes_down"], "from each site, kB": traffic["bytes_up"]},
            "round", "Bytes sent to and from each site in each round; totals in the table below", log=False,
        ),
    }  # fmt: skip


def _parity_plots(evaluations: list[dict[str, Any]], m: Mapping[str, Any]) -> dict[str, str]:
    found = {(v["arm"], v["site"]): v for v in evaluations if v["split"] == "test"}
    sites = sorted(m["sites"])
    if m["task"]["kind"] == "binary":
        scores = {s: np.asarray(found["federated", s]["scores"], float) for s in sites if ("federated", s) in found}
        scores = {s: v for s, v in scores.items() if v.ndim == 2 and v.size}
        if not scores:
            return {}
        return {
            "parity": figures.roc(
                {"all sites": np.sum(list(scores.values()), axis=0), **scores}, "ROC curve of the joint model"
            )
        }

    def layer(arm: str, site: str) -> list[tuple[np.ndarray, np.ndarray]]:
        v = found.get((arm, site))
        edges, counts = (np.asarray(v[k], float) for k in ("edges", "histogram")) if v else (np.zeros(0), np.zeros(0))
        return [(edges, counts)] if counts.ndim == 2 and counts.sum() > 0 else []

    panels = [("all sites, federated", [x for s in sites for x in layer("federated", s)])]
    for s in sites:
        for arm, name in (("local:" + s, "local only"), ("federated", "federated"), ("finetuned:" + s, "fine-tuned")):
            panels.append((f"{s}\n{name}", layer(arm, s)))
    overall, rest = panels[0], [p for p in panels[1:] if p[1]]
    unit = str(m["task"]["metric_unit"])
    out = {}
    if overall[1]:
        out["parity"] = figures.parity([overall], unit, "Predicted over measured values of the joint model, all sites")
    if rest:
        out["parity_sites"] = figures.parity(rest, unit, "Predicted over measured values at each site for each model")
    return out


def _points(arms: Mapping[str, Any], metric: str) -> dict[str, Point]:
    out = {}
    for arm, values in arms.items():
        value = score(values, metric)
        if value is not None:
            out[arm] = Point(value, values.get(f"{metric}_low"), values.get(f"{metric}_high"))
    return out
