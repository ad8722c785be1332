"""What a run's numbers mean, in a table and in plain sentences, losses included.

Knows: metrics.json and how to speak about it to a materials engineer. Refuses to know: pages, plots, files, records.

References:
    Mitchell et al., "Model Cards for Model Reporting", FAT* 2019 (numbers per group, limits stated first).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedmat.data.contract import RECORD_TYPES

UNKNOWN = "not evidenced"
_USABLE = ("local", "federated", "finetuned", "personal")  # what a site can use; pooled data it cannot
_NOISE = 0.01  # a difference below one percent is called none


def table(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns one row per site and a last one for all sites, as the command line shows them.

    Values are the task's metric; None where nothing was measured. ``gain_percent`` is what the federated model takes
    away from the local-only model's error on the site's own slice (for AUC: what it adds); negative where a site loses.
    ``best`` is the arm a site should use for its own materials.
    """
    metric = metrics["task"]["metric"]
    overall = metrics["global"]
    rows = []
    for site, row in sorted(metrics["sites"].items()):
        own = {arm: score(row["own"].get(arm), metric) for arm in (*_USABLE, "pooled")}
        rows.append({
            "site": site,
            "organisation": row["organisation"],
            "rows": row["n_train"] + row["n_validation"] + row["n_test"],
            **{f"own_{arm}": v for arm, v in own.items()},
            "gain_percent": gain(own["local"], own["federated"], metric),
            "finetuned_gain_percent": gain(own["local"], own["finetuned"], metric),
            "personal_gain_percent": gain(own["local"], own["personal"], metric),
            "best": _best(own, metric),
            "global_local": score(row["global"].get("local"), metric),
            "global_finetuned": score(row["global"].get("finetuned"), metric),
            "global_federated": score(overall.get("federated"), metric),
            "global_pooled": score(overall.get("pooled"), metric),
        })  # fmt: skip
    whole = {f"own_{arm}": _joined(metrics, arm) for arm in (*_USABLE, "pooled")}
    rows.append({
        "site": "all sites",
        "organisation": "",
        "rows": sum(r["rows"] for r in rows),
        **whole,
        "gain_percent": gain(whole["own_local"], whole["own_federated"], metric),
        "finetuned_gain_percent": gain(whole["own_local"], whole["own_finetuned"], metric),
        "personal_gain_percent": gain(whole["own_local"], whole["own_personal"], metric),
        "best": None,
        "global_local": score(overall.get("local_mean"), metric),
        "global_finetuned": score(overall.get("finetuned_mean"), metric),
        "global_federated": score(overall.get("federated"), metric),
        "global_pooled": score(overall.get("pooled"), metric),
    })  # fmt: skip
    return rows


def verdict(metrics: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Returns the run's result in plain words: paragraphs, each with one line per site where it speaks about sites.

    The first says for whom it paid; sites that lose come before sites that gain.
    """
    task, metric = metrics["task"], metrics["task"]["metric"]
    overall, sites = metrics["global"], metrics["sites"]
    unit = f" {unit_of(metrics)}".rstrip()
    told: dict[str, list[str]] = {"loss": [], "gain": [], "same": [], "unknown": []}
    kinds: dict[str, str] = {}
    for site, row in sorted(sites.items()):
        words, kind = _site(row, metric, unit)
        told[kind].append(f"{row['organisation']} ({site}): {words}")
        kinds[site] = kind
    owner = " The consortium is simulated: one operator owns all of its data." if metrics["simulated"] else ""
    done, asked = metrics["rounds"]["completed"], metrics["rounds"]["count"]
    first = (
        f"{_count(len(sites)).capitalize()} sites trained one model of {_words(task['target'])} together in {done} rounds. "
        f"No record left a site: {_travelled(metrics)}{owner} {_bottom_line(sites, kinds, metric)}"
    )
    out: list[tuple[str, list[str]]] = [(first, [])]
    if done < asked:
        out.append((f"The run is not complete: {done} of {asked} planned rounds are done.", []))
    joint = score(overall.get("federated"), metric)
    if joint is None:
        out.append((f"How good the joint model is, is {UNKNOWN}: it was not evaluated on the global test.", []))
    else:
        out.append((_overall(overall, joint, metric, unit, task), []))
    heads = {
        "loss": "worse with the joint model than with a model of their own, on their own materials",
        "gain": "better with the joint model than with a model of their own, on their own materials",
        "same": "about the same with either",
        "unknown": f"{UNKNOWN}, because a value is missing",
    }
    for kind, words in heads.items():
        if told[kind]:
            out.append((f"{_count(len(told[kind])).capitalize()} of {_count(len(sites))} sites: {words}.", told[kind]))
    out += [
        (f"{x['site']} took no part in this run ({x['reason']}): {x['detail']}.", [])
        for x in metrics["exclusions"]
        if x["round"] < 0
    ]
    matching = metrics.get("matching")
    gone = {s: sum(c.values()) for s, c in matching["removed"].items()} if matching else {}
    if sum(gone.values()):
        each = ", ".join(f"{s} {n}" for s, n in sorted(gone.items()) if n)
        out.append(
            (
                f"Left out of training, because another site or anyone's test holds the same: {sum(gone.values())} rows ({each}).",
                [],
            )
        )
    in_rounds = [x for x in metrics["exclusions"] if x["round"] >= 0]
    left = sorted({x["site"] for x in in_rounds})
    protection = metrics.get("protection") or {"sites": {}}
    for site, p in sorted(protection["sites"].items()):
        if p["disagreed"]:
            out.append((f"{site} disagrees with what was opened of its update in {_count(len(p['disagreed']))} rounds: a role lied, "
                        "or the site does. Settle that before anyone is paid.", []))  # fmt: skip
    judged = {s: p for s, p in sorted(protection["sites"].items()) if p["left_out"]}
    if judged:
        each = ", ".join(f"{s} {p['left_out']}" for s, p in judged.items())
        out.append((f"The rule ({protection['rule']}) did not count a site's update in some rounds: {each} of {done}. An unusual "
                    "site is left out more often; that alone says nothing against it.",
                    [f"{s}, the last time: {p['last_reason']}" for s, p in judged.items()]))  # fmt: skip
    if left:
        n = len(in_rounds)
        was = "s were" if n > 1 else " was"
        out.append(
            (f"{_count(n).capitalize()} answer{was} left out of a round ({', '.join(left)}); the reasons are below.", [])
        )
    return out


def gain(before: float | None, after: float | None, metric: str) -> float | None:
    """Returns by how many percent ``after`` is better than ``before``; negative when it is worse."""
    if before is None or after is None or before == 0:
        return None
    return 100.0 * (after / before - 1.0 if metric == "auc" else 1.0 - after / before)


# --- words and numbers ---------------------------------------------------------------------------------------------


def number(value: object, digits: int = 3) -> str:
    """Returns a number with ``digits`` significant digits; UNKNOWN for None."""
    if value is None:
        return UNKNOWN
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")


def percent(value: float | None) -> str:
    """Returns a signed percentage without decimals; UNKNOWN for None."""
    if value is None:
        return UNKNOWN
    return f"{value:+.0f}\u00a0%".replace("-", "−") if round(value) else "0\u00a0%"


def size(value: float | None) -> str:
    """Returns a number of bytes in the unit a person reads."""
    if value is None:
        return UNKNOWN
    for unit in ("B", "kB", "MB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def _bottom_line(sites: Mapping[str, Any], kinds: Mapping[str, str], metric: str) -> str:
    """Returns for whom it paid, in one sentence."""
    total = len(sites)
    winners = [s for s, kind in kinds.items() if kind == "gain"]
    who = "All" if len(winners) == total > 1 else f"{_count(len(winners)).capitalize()} of {_count(total)}"
    line = f"{who} sites gain{'s on its' if len(winners) == 1 else ' on their'} own materials"
    apart = [_apart(sites[s]["own"]["local"], sites[s]["own"]["federated"], metric) for s in winners]
    if winners and None not in apart:
        sure = sum(map(bool, apart))
        many = "all" if sure == len(winners) > 1 else _count(sure)
        line += f", {many} of them clearly (95\u00a0% intervals {'apart' if sure else 'overlap'})"
    lost = {s: _best({a: score(sites[s]["own"].get(a), metric) for a in _USABLE}, metric) for s in kinds if kinds[s] == "loss"}
    for best, words in (
        ("finetuned", "only by fine-tuning the joint model"),
        ("personal", "only by mixing the joint model with its own"),
        ("local", "not at all: its own model is better"),
    ):
        found = [str(sites[s]["organisation"]) for s in lost if lost[s] == best]
        if found:
            line += f"; {_listed(found)} {words if len(found) == 1 else words.replace('its', 'their').replace('model is', 'models are')}"
    return f"{line}."


def _overall(overall: Mapping[str, Any], joint: float, metric: str, unit: str, task: Mapping[str, Any]) -> str:
    """Returns how good the joint model is on everyone's materials, and compared with what."""
    span = _span(overall["federated"], metric)
    text = "On held-out materials of all sites the joint model "
    if metric == "auc":
        text += f"ranks a random positive above a random negative {100 * joint:.0f} times in 100 (AUC {number(joint)})."
    elif task["transform"] == "log10":
        text += f"is typically off by a factor of {number(10**joint, 2)} ({number(joint)}{unit}{span}, {_kind(metric)})."
    else:
        text += f"is typically off by {number(joint)}{unit} ({_kind(metric)}{span})."
    local, pooled, dummy = (score(overall.get(k), metric) for k in ("local_mean", "pooled", "dummy"))
    if local is not None:
        won = _change(gain(local, joint, metric) or 0.0)
        text += f" The sites' own models, each trained alone, reach {number(local)} on average: federation makes it {won}."
    else:
        text += f" How the sites' own models do on other sites' materials is {UNKNOWN}: outside a simulated consortium "
        text += "they stay at their site."
    if pooled is not None:
        won = _change(gain(pooled, joint, metric) or 0.0)
        text += f" With all records in one place it would be {number(pooled)}: keeping them apart makes it {won}."
    if dummy is not None and metric != "auc" and joint >= dummy:
        text += f" Always predicting the mean gives {number(dummy)}: the joint model has learned nothing of use."
    return text


def _site(row: Mapping[str, Any], metric: str, unit: str) -> tuple[str, str]:
    own = row["own"]
    local, federated, tuned, personal = (score(own.get(a), metric) for a in _USABLE)
    won = gain(local, federated, metric)
    if won is None or local is None or federated is None:
        return "a value is missing.", "unknown"
    words = f"{number(local)} alone, {number(federated)}{unit} with the joint model ({percent(won)}"
    words += f"; {_certainty(own['local'], own['federated'], metric)})."
    best = _best({"local": local, "federated": federated, "finetuned": tuned, "personal": personal}, metric)
    if best == "finetuned" and tuned is not None:
        words += f" Fine-tuned at the site it reaches {number(tuned)}: best for its own materials."
    elif best == "personal" and personal is not None:
        words += f" Mixed with its own model at the site it reaches {number(personal)}: best for its own materials."
    elif best == "local" and won < 0:
        words += " Keep your own model for your own materials."
    return words, "same" if abs(won) < 100 * _NOISE else "gain" if won > 0 else "loss"


def _apart(a: Mapping[str, Any], b: Mapping[str, Any], metric: str) -> bool | None:
    """Tells whether two 95% intervals have nothing in common; None where one is not known."""
    (low_a, high_a), (low_b, high_b) = ((m.get(f"{metric}_low"), m.get(f"{metric}_high")) for m in (a, b))
    if low_a is None or high_a is None or low_b is None or high_b is None:
        return None
    return bool(high_a < low_b or high_b < low_a)


def _certainty(a: Mapping[str, Any], b: Mapping[str, Any], metric: str) -> str:
    apart = _apart(a, b, metric)
    if apart is None:
        return "no interval known"
    return "the 95\u00a0% intervals are apart" if apart else "the 95\u00a0% intervals overlap, so it could be chance"


def _change(won: float) -> str:
    if abs(won) < 100 * _NOISE:
        return "neither better nor worse"
    return f"{abs(won):.0f}\u00a0% {'better' if won > 0 else 'worse'}"


def _kind(metric: str) -> str:
    return "mean absolute error" if metric == "mae" else "root mean square error"


def _span(m: Mapping[str, Any], metric: str) -> str:
    low, high = m.get(f"{metric}_low"), m.get(f"{metric}_high")
    return "" if low is None or high is None else f", 95\u00a0% interval {number(low)} to {number(high)}"


def unit_of(metrics: Mapping[str, Any]) -> str:
    """Returns the metric's unit; "" where it has none."""
    return str(metrics["task"]["metric_unit"]) if metrics["task"]["metric"] != "auc" else ""


def _words(field: str) -> str:
    """Returns what the contract says about a field, else its name as words."""
    known = (f.about for rt in RECORD_TYPES.values() for f in rt.fields if f.name == field)
    return next(known, field.replace("_", " "))


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


_PROTECTED = {
    "trigram": "updates were split between three roles, none of which could read one",
    "masking": "updates travelled under masks that cancel in their sum",
    "ckks": "updates travelled encrypted, and only their sums were decrypted",
}


def _travelled(metrics: Mapping[str, Any]) -> str:
    """Returns what left the sites, in words."""
    mode = metrics.get("protection", {}).get("mode", "none")
    return f"{_PROTECTED[mode]}." if mode in _PROTECTED else "what travelled were model weights and sums."


def _count(n: int) -> str:
    small = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
    return small[n] if n < len(small) else str(n)


def score(m: Mapping[str, Any] | None, metric: str) -> float | None:
    """Returns a model's result in the task's metric; None where it was not measured."""
    found = m.get(metric) if m else None
    return None if found is None else float(found)


def _best(own: Mapping[str, float | None], metric: str) -> str | None:
    known = {arm: v for arm, v in own.items() if v is not None and arm != "pooled"}
    if not known:
        return None
    return (max if metric == "auc" else min)(known, key=lambda arm: known[arm])


def _joined(metrics: Mapping[str, Any], arm: str) -> float | None:
    """Returns an arm's metric over all own slices together, each site using its own model; None where sums are not known."""
    metric = metrics["task"]["metric"]
    parts = [row["own"].get(arm) for row in metrics["sites"].values() if row["n_test"]]
    if metric == "auc" or any(score(p, metric) is None for p in parts):
        return None
    power = 2.0 if metric == "rmse" else 1.0
    n = sum(p["n"] for p in parts)
    return float((sum(p["n"] * p[metric] ** power for p in parts) / n) ** (1 / power)) if n else None
