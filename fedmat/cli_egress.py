"""The command about what has left a site: ``fedmat site egress``.

Knows: what the site's engineer types. Refuses to know: how the egress ledger is written (``fedmat.egress``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmat.cli_data import site_app
from fedmat.commands import Json
from fedmat.errors import ProtocolError

_SHOWN = 20


@site_app.command("egress")
def site_egress(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The site's workspace: the folder that holds egress.jsonl.")],
    run: Annotated[
        Path | None, typer.Option(help="A run's folder, or its rounds.jsonl: compare with what the coordinator says arrived.")
    ] = None,
    whole: Annotated[bool, typer.Option("--all", help="Show every line, not the last ones alone.")] = False,
    as_json: Json = False,
) -> None:
    """Show what has left this site: every object, its kind, size, digest and what let it go.

    With --run, compares round by round with the coordinator's reports, and ends with 6 if something arrived there that was not
    written down here.

    Example:  fedmat site egress .fedmat/cell-makers/sites/ev-cells
    """
    from fedmat import console, egress
    from fedmat.evidence import ROUNDS, read_lines

    path = folder / egress.BOOK
    data = egress.read(path)
    book = egress.lines(data, str(path))
    site = book[0]["site"] if book else folder.name
    reports = read_lines(run / ROUNDS if run.is_dir() else run) if run is not None else None
    rows = egress.reconcile(book, reports, site) if reports is not None else ()
    sums = {
        kind: {"objects": len(of), "bytes": sum(n["bytes"] for n in of)}
        for kind in sorted({n["kind"] for n in book})
        if (of := [n for n in book if n["kind"] == kind])
    }
    spent = [n["epsilon"] for n in book if n["epsilon"] is not None]
    if as_json:
        console.write_json({
            "site": site, "lines": book if whole else len(book), "root": egress.root(data).hex(), "kinds": sums,
            "epsilon": max(spent, default=None), "rounds": [vars(r) for r in rows],
        })  # fmt: skip
    else:
        shown = book if whole else book[-_SHOWN:]
        columns = ("line", "time", "kind", "round", "bytes", "numbers", "sha256 begins", "what was done to it")
        console.show_rows(
            "" if len(shown) == len(book) else f"the last {len(shown)} of {len(book)} lines (--all shows all)",
            columns,
            [
                (n["n"] + 1, n["time"], n["kind"], n["round"] + 1 if n["round"] >= 0 else "", n["bytes"], n["numbers"],
                 n["sha256"][:12], "; ".join(n["filters"]))
                for n in shown
            ],
            right=("line", "round", "bytes", "numbers"),
        )  # fmt: skip
        if rows:
            console.show_rows(
                f"{site}: what left and what arrived", ("round", "objects", "left", "arrived", "verdict"),
                [(r.round + 1, r.objects, r.left, r.arrived, r.verdict) for r in rows], right=("round", "objects", "left", "arrived"),
            )  # fmt: skip
        console.show_where([
            ("objects", str(len(book))),
            ("bytes", f"{sum(n['bytes'] for n in book):,}"),
            ("root", egress.root(data).hex()),
        ])  # fmt: skip
    if wrong := [r.round + 1 for r in rows if not r.sound]:
        raise ProtocolError(
            "bad_egress", f"{site}: in round {', '.join(map(str, wrong))} other bytes arrived than this site wrote down",
            fix="compare the digests with the operator's before the next round",
        )  # fmt: skip
