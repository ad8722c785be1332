"""What a benchmark's numbers show: means over seeds, intervals, paired differences, and the claims they bear out or not.

Knows: scores with their bootstrap draws. Refuses to know: how anything was trained, pages and terminals. A claim without
its numbers is "not evidenced", never met.

An interval is over both sources of chance: test groups (the resamples every arm of a site shares, so that differences are
paired) and seeds (drawn anew for every resample).

References:
    Efron, Tibshirani, "An Introduction to the Bootstrap", 1993. Bouckaert, Frank, PAKDD 2004 (several seeds per split).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedmat.domain import Array
from fedmat.seeds import stream

Seeds = Mapping[int, Mapping[str, Mapping[str, Any]]]  # seed -> arm -> result
Pick = Callable[[Mapping[str, Mapping[str, Any]]], Mapping[str, Any] | None]  # arms of one seed -> scores by site
MET, MISSED, UNKNOWN = "met", "missed", "not evidenced"

# name -> (arm, model): whose scores on every site's rows are compared
GLOBAL: Mapping[str, tuple[str, str]] = {
    "dummy": ("dummy", "global"),
    "forest": ("forest", "global"),
    "pooled": ("pooled", "global"),
    "default": ("default", "global"),
    **{
        arm: (arm, "global")
        for arm in (
            "fedavg",
            "fedprox",
            "fedavgm",
            "fedadam",
            "scaffold",
            "rows",
            "fedper",
            "fedrep",
            "fedbn",
            "single-task",
            "arrhenius",
            "vtf",
            "no-law",
        )
    },
}
# name -> (arm, model): whose scores on the site's own rows are compared
OWN: Mapping[str, tuple[str, str]] = {
    "local": ("fedavg", "local"),
    "local ensemble": ("default", "local"),
    "fedavg": ("fedavg", "global"),
    "fedavg, fine-tuned": ("fedavg", "finetuned"),
    "fedper": ("fedper", "finetuned"),
    "fedrep": ("fedrep", "finetuned"),
    "fedbn": ("fedbn", "finetuned"),
    "ditto": ("ditto", "ditto"),
    "federated": ("default", "global"),
    "fine-tuned": ("default", "finetuned"),
    "personal": ("default", "personal"),
    "pooled": ("pooled", "global"),
}
RIVALS = ("local", "local ensemble", "fedavg, fine-tuned")


def summary(found: Mapping[str, Seeds]) -> dict[str, Any]:
    """Returns everything the page and the terminal show, as plain JSON."""
    cases = {name: case_summary(seeds) for name, seeds in found.items()}
    return {"schema": "fedmat/bench-summary/1", "cases": cases, "claims": claims(cases)}


def case_summary(seeds: Seeds) -> dict[str, Any]:
    """Returns one consortium's results over its seeds."""
    everywhere = {name: _scored(seeds, *at) for name, at in GLOBAL.items()}
    out: dict[str, Any] = {
        "seeds": sorted(seeds),
        "global": {name: _overall(s) for name, s in everywhere.items() if s},
        "to_pooled": {
            name: ratio
            for name, s in everywhere.items()
            if name != "pooled" and (ratio := _ratio(s, everywhere["pooled"])) is not None
        },
        "to_default": {
            law: ratio for law in ("arrhenius", "vtf") if (ratio := _ratio(everywhere[law], everywhere["default"])) is not None
        },
        "adherence": _law_shares(seeds),
        "several_tasks": _several_tasks(everywhere),
        "single": _single(seeds, everywhere["default"]),
        "own": _own(seeds),
        "coverage": _coverage(seeds),
        "auxiliary": _auxiliary(seeds),
        "rounds": _rounds(seeds),
        "mixture": _mixtures(seeds),
    }
    some = next((arms["default"] for arms in seeds.values() if "default" in arms), None)
    out["sites"] = some["sites"] if some else {}
    out["seconds"] = {
        arm: float(np.mean([arms[arm]["seconds"] for arms in seeds.values() if arm in arms]))
        for arm in sorted({a for arms in seeds.values() for a in arms})
    }
    return out


# --- numbers -------------------------------------------------------------------------------------------------------


def _scored(seeds: Seeds, arm: str, model: str, part: str | None = None) -> dict[int, Mapping[str, Any]]:
    """Returns seed -> site -> score of one model, of the seeds that have it."""
    out = {}
    for seed, arms in sorted(seeds.items()):
        scores = arms.get(arm, {}).get("auxiliary", {}).get(part, {}) if part else arms.get(arm, {}).get("scores", {})
        if model in scores:
            out[seed] = scores[model]
    return out


def _common(
    a: Mapping[int, Mapping[str, Any]], b: Mapping[int, Mapping[str, Any]]
) -> tuple[dict[int, Mapping[str, Any]], dict[int, Mapping[str, Any]]]:
    """Returns both with the seeds that both have: a difference is between runs of one seed."""
    both = sorted(set(a) & set(b))
    return {s: a[s] for s in both}, {s: b[s] for s in both}


def _draws(scored: Mapping[int, Mapping[str, Any]], site: str) -> Array | None:
    """Returns MAE at one site for every resample of test groups and seeds; None where resampling is impossible."""
    rows = [s[site].get("draws") for s in scored.values() if site in s]
    if not rows or any(r is None for r in rows) or len(rows) != len(scored):
        return None
    stacked = np.array(rows)
    chosen = stream(0, "seeds").integers(0, len(stacked), (stacked.shape[1], len(stacked)))  # the same for every arm
    return np.asarray(stacked[chosen.T, np.arange(stacked.shape[1])].mean(axis=0))


def _mae(scored: Mapping[int, Mapping[str, Any]], site: str) -> float:
    return float(np.mean([s[site]["mae"] for s in scored.values()]))


def _sites(scored: Mapping[int, Mapping[str, Any]]) -> list[str]:
    return sorted(set.intersection(*(set(s) for s in scored.values()))) if scored else []


def _overall(scored: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    sites = _sites(scored)
    per_seed = [
        sum(s[x]["mae"] * s[x]["n"] for x in sites) / sum(s[x]["n"] for x in sites) for s in scored.values()
    ]  # fmt: skip
    low, high = _limits(_overall_draws(scored, sites))
    return {
        "seeds": len(per_seed),
        "mae": float(np.mean(per_seed)),
        "sd": float(np.std(per_seed, ddof=1)) if len(per_seed) > 1 else None,
        "low": low,
        "high": high,
    }


def _overall_draws(scored: Mapping[int, Mapping[str, Any]], sites: Sequence[str]) -> Array | None:
    first = next(iter(scored.values()))
    n = {x: first[x]["n"] for x in sites}
    total: Array | None = None
    for x in sites:
        draws = _draws(scored, x)
        part = np.full(1, _mae(scored, x)) if draws is None else draws  # one test group: its error counts as it is
        total = n[x] * part if total is None else total + n[x] * part
    return None if total is None or len(total) == 1 else np.asarray(total / sum(n.values()))


def _limits(draws: Array | None) -> tuple[float | None, float | None]:
    if draws is None:
        return None, None
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def _ratio(a: Mapping[int, Mapping[str, Any]], b: Mapping[int, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Returns the ratio of two arms' errors, paired by seed and site; None where no seed and site have both."""
    a, b = _common(a, b)
    sites = sorted(set(_sites(a)) & set(_sites(b)))
    if not sites:
        return None
    value = _over(a, sites) / _over(b, sites)
    above, below = _overall_draws(a, sites), _overall_draws(b, sites)
    low, high = _limits(above / below if above is not None and below is not None else None)
    return {"ratio": value, "low": low, "high": high}


def _over(scored: Mapping[int, Mapping[str, Any]], sites: Sequence[str]) -> float:
    n = {x: next(iter(scored.values()))[x]["n"] for x in sites}
    return float(sum(n[x] * _mae(scored, x) for x in sites) / sum(n.values()))


def _law_shares(seeds: Seeds) -> dict[str, dict[str, float]]:
    """Returns, by arm and law, the smallest share of predictions that obey it over the seeds."""
    out: dict[str, dict[str, float]] = {}
    for arms in seeds.values():
        for arm, result in arms.items():
            for law, share in result.get("adherence", {}).items():
                out.setdefault(arm, {})[law] = min(share, out.get(arm, {}).get(law, 1.0))
    return out


def _several_tasks(everywhere: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any] | None:
    """Returns the error of the network of all tasks over that of the first task alone; None where there is one task."""
    return _ratio(everywhere["default"], everywhere["single-task"])


def _single(seeds: Seeds, federated: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns each company's own model on everyone's rows, and how much better the federated one is than the best."""
    names = sorted({m for arms in seeds.values() for m in arms.get("fedavg", {}).get("scores", {}) if m.startswith("local:")})
    out: dict[str, Any] = {"sites": {}}
    for name in names:
        single, ensemble = _scored(seeds, "fedavg", name), _scored(seeds, "default", name)
        if single:
            row = {"one network": _overall(single)["mae"]}
            if ensemble:
                row["ensemble"] = _overall(ensemble)["mae"]
            out["sites"][name.split(":", 1)[1]] = row
    if out["sites"] and federated:
        ours = _overall(federated)["mae"]
        for kind in ("one network", "ensemble"):
            known = {s: r[kind] for s, r in out["sites"].items() if kind in r}
            if known:
                best = min(known, key=lambda s: known[s])
                mean = float(np.mean(list(known.values())))
                out[kind] = {"best": best, "gain_over_best": 1 - ours / known[best], "gain_over_mean": 1 - ours / mean}
    return out


def _own(seeds: Seeds) -> dict[str, Any]:
    found = {name: _scored(seeds, *at) for name, at in OWN.items()}
    sites = sorted({x for s in found.values() for x in _sites(s)})
    out: dict[str, Any] = {}
    for site in sites:
        row: dict[str, Any] = {name: _mae(s, site) for name, s in found.items() if site in _sites(s)}
        first = next(s for s in found.values() if site in _sites(s))
        some = next(iter(first.values()))[site]
        entry: dict[str, Any] = {"n": some["n"], "groups": some["groups"], "mae": row, "against": {}}
        for rival in RIVALS:
            if rival in row and "personal" in row and set(found["personal"]) & set(found[rival]):
                entry["against"][rival] = _paired(found["personal"], found[rival], site)
        out[site] = entry
    return out


def _paired(a: Mapping[int, Mapping[str, Any]], b: Mapping[int, Mapping[str, Any]], site: str) -> dict[str, Any]:
    """Returns the relative gain of ``a`` over ``b`` at one site, with its interval and two-sided bootstrap p-value."""
    a, b = _common(a, b)
    ours, theirs = _draws(a, site), _draws(b, site)
    gain = 1 - _mae(a, site) / _mae(b, site)
    out: dict[str, Any] = {"gain": gain, "low": None, "high": None, "p": None, "verdict": "better" if gain > 0 else "worse"}
    if ours is None or theirs is None:
        return out | {"significant": None}
    low, high = _limits(1 - ours / theirs)
    wins = float(np.mean(ours < theirs))
    p = min(1.0, 2 * max(min(wins, 1 - wins), 1 / len(ours)))
    return out | {
        "low": low,
        "high": high,
        "p": p,
        "significant": bool(low is not None and high is not None and (low > 0 or high < 0)),
    }


def _coverage(seeds: Seeds) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, at in (
        ("federated", ("default", "global")),
        ("personal", ("default", "personal")),
        ("local", ("default", "local")),
    ):
        scored = _scored(seeds, *at)
        for site in _sites(scored):
            rows = [s[site] for s in scored.values()]
            if all("covered" in r for r in rows):
                widths = [r["half_width"] for r in rows]
                out.setdefault(site, {})[name] = {
                    "covered": float(np.mean([r["covered"] for r in rows])),
                    "low": float(np.mean([r["covered_low"] for r in rows])),
                    "high": float(np.mean([r["covered_high"] for r in rows])),
                    "half_width": None if any(w is None for w in widths) else float(np.mean(widths)),
                    "n": rows[0]["n"],
                }
    return out


def _auxiliary(seeds: Seeds) -> dict[str, Any]:
    """Returns, per auxiliary target, the global and the personal models' errors."""
    targets = sorted({t for arms in seeds.values() for a in arms.values() for t in a.get("auxiliary", {})})
    out: dict[str, Any] = {}
    for target in targets:
        for name, at in (("pooled", ("pooled", "global")), ("default", ("default", "global"))):
            scored = _scored(seeds, *at, target)
            if scored and _sites(scored):
                out.setdefault(target, {})[name] = _overall(scored)
    return out


def _rounds(seeds: Seeds) -> dict[str, Any]:
    """Returns rounds and bytes until the federated model's held-out error is within 1/0.95 of the pooled one's."""
    out: dict[str, Any] = {}
    for arm in ("default", "fedavg"):
        needed: list[int] = []
        size, asked = 0.0, 0
        for arms in seeds.values():
            pooled, run = arms.get("pooled", {}).get("held_out_mae"), arms.get(arm)
            if pooled is None or run is None:
                continue
            asked += 1
            size = float(run["bytes_per_round"])
            reached = [i for i, v in enumerate(run["validation"]) if v is not None and v <= pooled / 0.95]
            if reached:
                needed.append(reached[0])  # the validation of round i is of the weights after i rounds
        if asked:
            out[arm] = {
                "reached_in": f"{len(needed)} of {asked} seeds",
                "rounds": float(np.median(needed)) if needed else None,
                "bytes": float(np.median(needed)) * size if needed else None,
                "bytes_per_round": size,
            }
    return out


def _mixtures(seeds: Seeds) -> dict[str, Any]:
    rows = [arms["default"]["mixture"] for arms in seeds.values() if arms.get("default", {}).get("mixture")]
    if not rows:
        return {}
    return {site: {k: float(np.mean([r[site][k] for r in rows])) for k in rows[0][site]} for site in rows[0]}


# --- claims --------------------------------------------------------------------------------------------------------


def claims(cases: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns what was promised, what was measured, and whether it holds."""
    out: list[dict[str, Any]] = []

    def claim(text: str, value: float | None, good: Callable[[float], bool], shown: str) -> None:
        verdict = UNKNOWN if value is None or not math.isfinite(value) else MET if good(value) else MISSED
        out.append({"claim": text, "measured": shown if value is not None else UNKNOWN, "verdict": verdict})

    for name, limit in (("C1", 1.05), ("C2-YS", 1.05), ("C2-HV", 1.05), ("C4a", 1.0), ("C4b", 1.05)):
        r = cases.get(name, {}).get("to_pooled", {}).get("default")
        text = f"{name}: federated error at most {limit:.2f} of pooled"
        claim(text, r and r["ratio"], _at_most(limit), (r and _span(r["ratio"], r["low"], r["high"])) or "")
    for name in ("C1", "C2-YS", "C2-HV", "C4a", "C4b"):
        c = cases.get(name, {}).get("global", {})
        pooled, forest = c.get("pooled"), c.get("forest")
        ratio = pooled["mae"] / forest["mae"] if pooled and forest else None
        text = f"{name}: pooled at least as good as a random forest on the same rows"
        claim(text, ratio, lambda v: v <= 1.0, f"{pooled['mae']:.3g} against {forest['mae']:.3g}" if pooled and forest else "")
    for name, floor in (("C1", 1.228), ("C2-YS", 280.0), ("C2-HV", 109.0), ("C4a", 0.153), ("C4b", 1.016)):
        m = cases.get(name, {}).get("global", {}).get("pooled")
        text = f"{name}: pooled at least as good as the study's floor {floor:g}"
        claim(text, m and m["mae"], _at_most(floor), (m and _span(m["mae"], m["low"], m["high"])) or "")
    for rivals, words in (
        (("local", "fedavg, fine-tuned"), "local-only and FedAvg + fine-tuning"),
        (("local ensemble", "fedavg, fine-tuned"), "a local ensemble of the same size and FedAvg + fine-tuning"),
    ):
        rows = [e["against"] for c in cases.values() for e in c["own"].values() if set(rivals) <= set(e["against"])]
        won = [all(r[x]["gain"] > 0 for x in rivals) for r in rows]
        share = float(np.mean(won)) if won else None
        claim(
            f"personal beats {words} on the site's own rows at 80 % of sites",
            share,
            lambda v: v >= 0.8,
            f"{sum(won)} of {len(won)} sites",
        )
    for rival in ("local", "local ensemble"):
        rows = [e["against"].get(rival) for c in cases.values() for e in c["own"].values()]
        known = [r for r in rows if r and r.get("significant") is not None]
        worse = sum(1 for r in known if r["significant"] and r["gain"] < 0)
        claim(
            f"personal is never significantly worse than {rival}",
            float(worse) if known else None,
            lambda v: v == 0,
            f"{worse} of {len(known)} sites significantly worse",
        )
    for law in ("arrhenius", "vtf"):
        for name, c in cases.items():
            share = c.get("adherence", {}).get(law, {}).get(law)
            plain = c.get("adherence", {}).get("default", {}).get(law)
            if share is None:
                continue
            claim(
                f"{name}: the federated network with {law} built in obeys it in 99.9 % of predictions",
                share,
                lambda v: v >= 0.999,
                f"{100 * share:.2f} %" + (f" (without it {100 * plain:.1f} %)" if plain is not None else ""),
            )
            r = c["to_default"].get(law)
            claim(
                f"{name}: {law} built in costs no accuracy",
                r and r["ratio"],
                lambda v: v <= 1.0,
                (r and "error ratio " + _span(r["ratio"], r["low"], r["high"])) or "",
            )
    for name, target in (("C2-HV", "hardness"), ("C2-YS", "yield strength")):
        r = cases.get(name, {}).get("several_tasks")
        text = f"{name}: several tasks in one network beat {target} alone"
        claim(text, r and r["ratio"], lambda v: v < 1.0, (r and "error ratio " + _span(r["ratio"], r["low"], r["high"])) or "")
    for kind in ("one network", "ensemble"):
        g = cases.get("C1", {}).get("single", {}).get(kind)
        claim(
            f"C1: federated at least 22 % better than the best single company ({kind})",
            g and g["gain_over_best"],
            lambda v: v >= 0.22,
            (g and f"{100 * g['gain_over_best']:.1f} % (best: {g['best']}; over their mean {100 * g['gain_over_mean']:.1f} %)")
            or "",
        )
    rows = [(s, k) for c in cases.values() for s, r in c["coverage"].items() for k in [r.get("federated")] if k]
    within = [abs(k["covered"] - 0.9) <= 0.02 for _, k in rows]
    compatible = [k["low"] <= 0.92 and k["high"] >= 0.88 for _, k in rows]
    claim(
        "90 % intervals of the federated model cover 88 to 92 % at every site",
        float(np.mean(within)) if rows else None,
        lambda v: v == 1.0,
        f"{sum(within)} of {len(within)} sites; compatible with it by the 95 % interval: {sum(compatible)}",
    )
    return out  # fmt: skip


def _at_most(limit: float) -> Callable[[float], bool]:
    return lambda value: value <= limit


def _span(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.3g}" + (f" ({low:.3g} to {high:.3g})" if low is not None and high is not None else "")
