"""What protection costs and what it holds off: attacks against rules, and small encrypted rounds against plain ones.

Knows: which runs make up the measurement, and how seeds become a mean with an interval. Refuses to know: terminals. One run
is one file, named by all it depends on: an interrupted measurement goes on where it stopped.

Everything here needs all members' data in one place; only consortia declared simulated take part.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmat import benchmark, files
from fedmat.federation.plan import Plan

SCHEMA = "fedmat/trust/1"
MEMBERS, HOSTILE = 10, 2
ABSENT = "absent"  # the hostile members stay away: what is left to learn from the honest ones
ATTACKS = ("none", ABSENT, "sign_flip", "scaling", "label_flip", "alie", "ipm", "mimic", "free_ride")
RULES = ("mean", "multi_krum", "geometric_median", "trimmed_mean", "veto_multi_krum")
PLAIN, MORE = "plain", 3
DEFAULT_RULE = "veto_multi_krum"
ATTACK_COLUMNS = (
    "consortium",
    "rule",
    "attack",
    "error",
    "to clean",
    "to absent",
    "to clean mean",
    "hostile weight",
    "honest left out",
)
SMALL_COLUMNS = ("consortium", "rounds", "error", "to plain", "up", "down", "bytes to roles")


@dataclass(frozen=True)
class Cell:
    """One run: what is trained how, against which attack, with which seed."""

    kind: str  # "attack" or "small"
    case: str
    arm: str
    attack: str
    seed: int
    plan: Plan

    @property
    def key(self) -> dict[str, Any]:
        """Everything but the data that the run's numbers depend on."""
        return {"schema": SCHEMA, "arm": self.arm, "attack": self.attack, "plan": self.plan.as_json()}


def small_plans(plan: Plan) -> dict[str, Plan]:
    """Returns the consortium's own plan without encryption and compression, and what it is compared with.

    ``small`` is encrypted and compressed, and trains as many local steps in all, spread over ``MORE`` times the rounds: what a
    compressed round leaves out needs later ones to arrive. ``plain-often`` has those rounds without compression.
    """
    from fedmat.hostile import vary

    s = plan.settings
    often = {
        "rounds": MORE * s.rounds, "average_last": MORE * s.average_last,
        "local": {"steps": max(1, round(s.local.steps / MORE))},
        "schedule": {"warmup_rounds": MORE * s.schedule.warmup_rounds},
    }  # fmt: skip
    plain = vary(plan, deduplicate=False)
    return {
        PLAIN: plain,
        "plain-often": vary(plain, **often),
        "small": vary(plain, **often, security={"mode": "trigram"}, compression={"name": "hadamard"}, server={"lr": 3.0}),
    }


def attack_plan(plan: Plan, rule: str, *, hostile: int = HOSTILE) -> Plan:
    """Returns one network trained under a rule; in the clear for rules that need every coordinate."""
    from fedmat.hostile import vary

    return vary(
        plan, deduplicate=False, ensemble=1, average_last=0, quorum=MEMBERS - HOSTILE,
        rule={"name": rule, "hostile": hostile if rule != "mean" else 0},
    )  # fmt: skip


def cells(
    kind: str, tables: Mapping[str, Mapping[str, Any]], plans: Mapping[str, Plan], seeds: Sequence[int],
    rules: Sequence[str] = RULES, attacks: Sequence[str] = ATTACKS,
) -> Iterator[Cell]:  # fmt: skip
    """Yields all runs of a measurement; the default rule and the clean runs first."""
    from fedmat.hostile import vary

    for case in tables:
        base = dataclasses.replace(plans[case], roster=tuple(sorted(tables[case])))
        for seed in seeds:
            if kind == "small":
                seeded = vary(base, seed=seed, quorum=max(5, base.settings.quorum))
                for arm, plan in small_plans(seeded).items():
                    yield Cell(kind, case, arm, "none", seed, plan)
            else:
                for rule in sorted(rules, key=lambda r: r != DEFAULT_RULE):
                    plan = attack_plan(vary(base, seed=seed), rule)
                    for attack in attacks:
                        yield Cell(kind, case, rule, attack, seed, plan)


def data(
    names: Sequence[str], out: Path, told: Callable[[str], None], members: int | None
) -> tuple[dict[str, Any], dict[str, Plan]]:
    """Returns every consortium's feature tables and plan; cut into ``members`` where given.

    Raises:
        ConfigError, PlanRefused: as :func:`fedmat.benchmark.jobs`.
    """
    from fedmat import pipeline
    from fedmat.hostile import cut

    tables: dict[str, Any] = {}
    plans: dict[str, Plan] = {}
    for job in benchmark.jobs(names, (17,), (), out):
        told(f"{job.case.name}: records and features")
        benchmark.prepare(job)
        run = pipeline.open_run(job.file, home=job.home)
        plan = run.plan()
        found = benchmark.deduplicated(run)
        name = job.case.name if members is None else f"{job.case.name}/{members}"
        tables[name] = found if members is None else cut(found, members)
        plans[name] = plan
    return tables, plans


def measure(cell: Cell, tables: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Returns a run's numbers, from its file where it was measured before."""
    from fedmat.hostile import run

    path = out / cell.kind / cell.case.replace("/", "-") / f"{cell.arm}-{cell.attack}-{cell.seed}.json"
    key = files.sha256(files.canonical_json([cell.key, {s: [t.sha256, len(t)] for s, t in sorted(tables.items())}]))
    if path.exists() and files.read_json(path).get("key") == key:
        found: dict[str, Any] = files.read_json(path)
        return found
    hostile = sorted(tables)[-HOSTILE:] if cell.attack != "none" else []
    result = run(
        cell.plan,
        tables,
        out / "work" / f"{path.parent.name}-{path.stem}",
        attack=cell.attack,
        hostile=hostile,
    )
    numbers = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name not in ("reports", "model")}
    d = sum(int(np.prod(v.shape)) for v in result.model.weights.values()) if result.model else 0
    found = {"key": key, "case": cell.case, "arm": cell.arm, "attack": cell.attack, "seed": cell.seed, "dense_bytes": 4 * d,
             "members": len(tables), **numbers}  # fmt: skip
    files.write_json(path, found)
    return found


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns means over seeds, ratios to the clean or plain run of the same seed, and verdicts."""
    by: dict[tuple[str, str, str], dict[int, Mapping[str, Any]]] = {}
    for r in found:
        by.setdefault((r["case"], r["arm"], r["attack"]), {})[r["seed"]] = r
    out: dict[str, Any] = {"attacks": [], "small": []}
    for (case, arm, attack), runs in sorted(by.items()):
        seeds = sorted(runs)
        row: dict[str, Any] = {"case": case, "arm": arm, "attack": attack, "seeds": len(seeds)}
        row |= {
            k: _mean([runs[s][k] for s in seeds])
            for k in ("mae", "hostile_share", "wrongly_excluded", "bytes_up", "bytes_down", "role_bytes", "seconds")
        }
        if arm in (PLAIN, "plain-often", "small"):
            plain = by.get((case, PLAIN, "none"), {})
            dense = runs[seeds[0]]["dense_bytes"] * runs[seeds[0]]["members"]
            row |= {"up_ratio": row["bytes_up"] / dense, "down_ratio": row["bytes_down"] / dense}
            row |= _ratio(runs, plain, seeds)
            out["small"].append(row)
        else:
            row |= _ratio(runs, by.get((case, arm, "none"), {}), seeds)
            row["to_absent"] = _ratio(runs, by.get((case, arm, ABSENT), {}), seeds)
            row["to_clean_mean"] = _ratio(runs, by.get((case, "mean", "none"), {}), seeds)
            out["attacks"].append(row)
    return out


def _ratio(
    runs: Mapping[int, Mapping[str, Any]], base: Mapping[int, Mapping[str, Any]], seeds: Sequence[int]
) -> dict[str, Any]:
    """Returns the mean ratio of errors to the run of the same seed, with a 95 % interval (Student's t) over seeds."""
    from scipy import stats

    logs = [math.log(runs[s]["mae"] / base[s]["mae"]) for s in seeds if s in base]
    if not logs:
        return {}
    mean = float(np.mean(logs))
    if len(logs) == 1:
        return {"ratio": math.exp(mean), "low": None, "high": None}
    half = float(stats.t.ppf(0.975, len(logs) - 1) * np.std(logs, ddof=1) / math.sqrt(len(logs)))
    return {"ratio": math.exp(mean), "low": math.exp(mean - half), "high": math.exp(mean + half)}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def ten(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a consortium's rows as ten members."""
    from fedmat.hostile import cut

    return cut(tables, MEMBERS)


def shortened(plan: Plan, rounds: int | None) -> Plan:
    """Returns the plan with another number of rounds, where one is given."""
    from fedmat.hostile import vary

    return plan if rounds is None else vary(plan, rounds=rounds, average_last=min(plan.settings.average_last, rounds))


def load(out: Path) -> list[dict[str, Any]]:
    """Returns what has been measured."""
    return [files.read_json(p) for kind in ("attack", "attacks", "small") for p in sorted((out / kind).glob("*/*.json"))]


def attack_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns the table of attacks for people."""
    return [
        (r["case"], r["arm"], r["attack"], f"{r['mae']:.4g}", _with_interval(r), _with_interval(r["to_absent"]),
         _with_interval(r["to_clean_mean"]), f"{r['hostile_share']:.2f}", f"{r['wrongly_excluded']:.2f}")
        for r in result["attacks"]
    ]  # fmt: skip


def small_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns the table of bytes and errors for people."""
    return [
        (r["case"], r["arm"], f"{r['mae']:.4g}", _with_interval(r), f"{100 * r['up_ratio']:.2f} %",
         f"{100 * r['down_ratio']:.2f} %", f"{r['role_bytes']:.3g}")
        for r in result["small"]
    ]  # fmt: skip


def _with_interval(row: Mapping[str, Any]) -> str:
    if row.get("ratio") is None:
        return "-"
    if row.get("low") is None:
        return f"{row['ratio']:.3f}"
    return f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
