"""The command ``fedmat bench``: compares ways of training on consortia of public data.

Knows: what a person types. Refuses to know: how anything is measured or compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmat.commands import Json

QUICK_ARMS = ("dummy", "forest", "pooled", "default", "fedavg")
QUICK_ROUNDS = 8


def bench(
    cases: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[attacks|small] [CONSORTIUM]...",
            help="C1 C2-YS C2-HV C4a C4b C6 demo. First word 'attacks': hostile members against rules; 'small': encrypted, "
            "compressed rounds against plain ones.",
            show_default="all",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=20, help="Repeats with other seeds; the split stays.")] = 5,
    arms: Annotated[str, typer.Option(help="Ways of training, comma-separated.", show_default="all")] = "",
    out: Annotated[Path, typer.Option(help="Where results are kept; what is there is not measured again.")] = Path(
        ".fedmat/bench"
    ),
    workers: Annotated[int, typer.Option(min=0, help="Processes, each with one thread; 0 means one per core.")] = 0,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of training.", show_default="as each consortium says")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The shipped example, one seed, a few rounds: does it work?")] = False,
    show: Annotated[bool, typer.Option("--show", help="Measure nothing; show what is there.")] = False,
    as_json: Json = False,
) -> None:
    """Compare ways of training on consortia of public data.

    Every arm (always the mean, random forest, pooled, each site alone, FedAvg and its relatives, the default with its
    personal models) is trained with several seeds and scored on the same frozen test rows. Results are one JSON file and
    one page, with intervals and a paired test for every site. An interrupted benchmark goes on where it stopped.

    The data come from fedmat data get; only the consortium demo needs none.

    fedmat bench attacks cuts each consortium into ten members, lets two of them attack, and compares rules for combining
    updates (--arms chooses rules). fedmat bench small compares encrypted rounds with plain ones: bytes and error.

    Example:  fedmat bench C1 C4a --seeds 3 --arms pooled,default,fedavg

    Example:  fedmat bench attacks C1 --seeds 3 --arms mean,veto_multi_krum
    """
    from fedmat import bench_report, benchmark, comparison, console

    if cases and cases[0] in ("attacks", "small"):
        trust(cases[0], cases[1:] or ["C1", "C4a"], seeds, arms, out / "trust", rounds, show, as_json)
        return
    out = out / "quick" if quick else out
    chosen = cases or [c.name for c in benchmark.SUITE if c.name != benchmark.DEMO]
    wanted = tuple(a for a in arms.split(",") if a)
    if quick:
        chosen, wanted = cases or [benchmark.DEMO], wanted or QUICK_ARMS
        seeds, rounds = 1, rounds or QUICK_ROUNDS
    if not show:
        work = benchmark.jobs(chosen, [*range(17, 17 + seeds)], wanted, out, rounds=rounds)
        benchmark.run_all(work, workers or benchmark.workers_there(), console.say)
    found = {name: seeds_ for name, seeds_ in benchmark.load(out).items() if not cases or name in cases}
    summary = comparison.summary(found)
    page = bench_report.write(summary, {c.name: c.about for c in benchmark.SUITE}, out)
    if as_json:
        console.write_json(summary)
        return
    for name, case in summary["cases"].items():
        rows = [
            (arm, f"{m['mae']:.4g}", "-" if m["low"] is None else f"{m['low']:.4g} to {m['high']:.4g}",
             f"{case['to_pooled'][arm]['ratio']:.3f}" if arm in case["to_pooled"] else "-")
            for arm, m in case["global"].items()
        ]  # fmt: skip
        console.show_rows(
            f"{name}, all sites' held-out materials",
            ("model", "error", "95 % interval", "to pooled"),
            rows,
            right=("error", "to pooled"),
        )
        shown = [a for a in comparison.OWN if any(a in e["mae"] for e in case["own"].values())]
        own = [(site, *(f"{e['mae'][a]:.3g}" if a in e["mae"] else "-" for a in shown)) for site, e in case["own"].items()]
        console.show_rows(f"{name}, each site's own held-out materials", ("site", *shown), own, right=tuple(shown))
    told = [(c["verdict"], c["claim"], c["measured"]) for c in summary["claims"] if c["verdict"] != comparison.UNKNOWN]
    console.show_rows("claims", ("verdict", "claim", "measured"), told)
    console.show_where(
        [("page", console.show_path(page)), ("numbers", console.show_path(page.with_name(bench_report.SUMMARY)))]
    )


def trust(
    kind: str, cases: list[str], seeds: int, arms: str, out: Path, rounds: int | None, show: bool, as_json: bool
) -> None:  # fmt: skip
    """Runs or shows the measurements of protected rounds."""
    from fedmat import console, trust_bench

    found: list[dict[str, object]] = []
    if show:
        found = trust_bench.load(out)
    else:
        members = trust_bench.MEMBERS if kind == "attacks" else None
        tables, plans = trust_bench.data(cases, out.parent, console.say, members)
        if kind == "small":  # fewer than five members are not encrypted: C1 has four
            tables = {c: t if len(t) >= 5 else trust_bench.ten(t) for c, t in tables.items()}
        plans = {c: trust_bench.shortened(p, rounds) for c, p in plans.items()}
        rules = tuple(a for a in arms.split(",") if a) or trust_bench.RULES
        work = list(trust_bench.cells(kind, tables, plans, range(17, 17 + seeds), rules))
        for i, cell in enumerate(work, 1):
            found.append(trust_bench.measure(cell, tables[cell.case], out))
            console.say(f"{i}/{len(work)} {cell.case} {cell.arm} {cell.attack} seed {cell.seed}: error {found[-1]['mae']:.4g}")
    result = trust_bench.summary(found)
    if as_json:
        console.write_json(result)
        return
    if rows := trust_bench.attack_rows(result):
        console.show_rows("ten members, two hostile", trust_bench.ATTACK_COLUMNS, rows)
    if rows := trust_bench.small_rows(result):
        console.show_rows("encrypted and small, against plain", trust_bench.SMALL_COLUMNS, rows)
