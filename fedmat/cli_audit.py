"""The commands of an auditor: ``fedmat audit verify | why | who | what-left | impact | history | replay | page | export | bundle``.

Knows: what an auditor types and how answers read on a terminal. Refuses to know: how an answer is found (``fedmat.audit``).
They read the bundle and nothing else: no network, no records, no workspace; ``replay`` alone runs code, where the data are, and
``bundle`` is the operator's, who packs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedmat.commands import Group, Home, Json
from fedmat.errors import ConfigError, NotEvidenced, ProtocolError

if TYPE_CHECKING:
    from fedmat.audit import Answer, Audit
    from fedmat.checks import Verdict

audit_app = typer.Typer(
    cls=Group, no_args_is_help=True,
    help="An auditor's questions about a run, answered offline from its evidence bundle: proved, refuted or not evidenced.",
)  # fmt: skip

_SHOWN = 20  # rows of a table on a terminal
_WIDE = 10  # columns
_DIGEST = re.compile(r"\b[0-9a-f]{40,64}\b")
_CODES: dict[Verdict, int] = {"proved": 0, "refuted": 6, "not evidenced": 8}
_STYLES: dict[Verdict, str] = {"proved": "bold green", "refuted": "bold red", "not evidenced": "bold yellow"}

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="An evidence bundle, or a folder it was unpacked into.")]
Digest = Annotated[
    str | None,
    typer.Option(
        "--charter-digest", metavar="SHA256",
        help="Digest of the consortium's charter, from somebody other than who gave you the bundle. Without it, whose keys these "
        "are is not evidenced.",
    ),
]  # fmt: skip
Model = Annotated[str | None, typer.Option("--model", help="Digest, name or run of a model.", show_default="the bundle's")]


@audit_app.command("bundle")
def audit_bundle(
    consortium: Annotated[Path, typer.Argument(metavar="CONSORTIUM", help="The consortium file.")],
    run_id: Annotated[str | None, typer.Option(help="Which run.", show_default="the latest")] = None,
    home: Home = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write.", show_default="evidence.zip in the run's folder")
    ] = None,
    as_json: Json = False,
) -> None:
    """Pack a finished run's evidence: the ledger, the run's files, what left every site. At the operator.

    What the ledger lacks of the run is written first, and a checkpoint signed. Every run does this at its end; do it again after approvals
    or cosignatures.

    Example:  fedmat audit bundle consortium.yaml -o evidence.zip
    """
    from fedmat import console, files, pipeline, places

    where = home or places.workspace(consortium)
    folder = places.find_run(run_id or str(consortium), where)
    done = pipeline.account(pipeline.finished(consortium, where, folder), datetime.now(UTC))
    if out is not None:
        files.write_atomic(out, done.bundle.read_bytes())
    path = out or done.bundle
    if as_json:
        console.write_json({"run": done.run, "bundle": str(path), "entries": done.size, "new_entries": done.written})
    else:
        console.show_where(
            [("bundle", console.show_path(path)), ("ledger", f"{done.size} entries, {done.written} of them new")]
        )


@audit_app.command("verify")
def audit_verify(bundle: BundlePath, charter_digest: Digest = None, as_json: Json = False) -> None:
    """Check everything in a bundle against everything else, and name every place that does not fit.

    Ends with 0 if all is proved, 6 if something is refuted, 8 if something is not evidenced.

    Example:  fedmat audit verify evidence.zip
    """
    from fedmat import console
    from fedmat.audit_page import by_topic
    from fedmat.checks import PROVED, worst

    audit = _audit(bundle, charter_digest)
    verdict = worst(c.verdict for c in audit.checks)
    if as_json:
        console.write_json(_about(audit, verdict) | {"checks": [c.as_json() for c in audit.checks]})
    else:
        _line(verdict, f"{len(audit.checks)} checks of run {audit.verified.bundle.run} of {audit.verified.bundle.consortium}")
        counts = [(r["topic"].replace("_", " "), r["proved"], r["refuted"], r["not evidenced"]) for r in by_topic(audit.checks)]
        console.show_rows("", ("about", *_CODES), counts, right=tuple(_CODES))
        for check in audit.checks:
            if check.verdict != PROVED:
                _line(check.verdict, f"{check.place}: {check.what}" + (f" ({check.reason})" if check.reason else ""))
    _end(verdict)


@audit_app.command("why")
def audit_why(bundle: BundlePath, model: Model = None, charter_digest: Digest = None, as_json: Json = False) -> None:
    """Show what a model was made of: dataset versions of which sites, rounds, code, parameters, environment, data contract, scores.

    Example:  fedmat audit why evidence.zip
    """
    audit = _audit(bundle, charter_digest)
    _show(audit, audit.why(model), as_json)


@audit_app.command("who")
def audit_who(bundle: BundlePath, model: Model = None, charter_digest: Digest = None, as_json: Json = False) -> None:
    """Show who contributed what to a model, who was left out and why, and who approved it.

    Example:  fedmat audit who evidence.zip
    """
    audit = _audit(bundle, charter_digest)
    _show(audit, audit.who(model), as_json)


@audit_app.command("what-left")
def audit_what_left(
    bundle: BundlePath,
    site: Annotated[str, typer.Argument(metavar="SITE", help="A site's name.")],
    charter_digest: Digest = None,
    as_json: Json = False,
) -> None:
    """Show what left a site for this run: every object, when, how many bytes, what was done to it; and whether that is what arrived.

    Example:  fedmat audit what-left evidence.zip acme-cells
    """
    audit = _audit(bundle, charter_digest)
    _show(audit, audit.what_left(site), as_json)


@audit_app.command("impact")
def audit_impact(
    bundle: BundlePath,
    name: Annotated[
        str, typer.Argument(metavar="SITE_OR_DATASET", help="A site's name, or a dataset's digest (8 digits or more).")
    ],
    charter_digest: Digest = None,
    as_json: Json = False,
) -> None:
    """Show which models descend from a site or a dataset, what to do if it leaves, and which models are free of it.

    Example:  fedmat audit impact evidence.zip acme-cells
    """
    audit = _audit(bundle, charter_digest)
    _show(audit, audit.impact(name), as_json)


@audit_app.command("history")
def audit_history(bundle: BundlePath, charter_digest: Digest = None, as_json: Json = False) -> None:
    """Show whether the history was edited, which members vouch for it, and whose keys these are.

    Example:  fedmat audit history evidence.zip
    """
    audit = _audit(bundle, charter_digest)
    _show(audit, audit.history(), as_json)


@audit_app.command("page")
def audit_page(
    bundle: BundlePath,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("audit.html"),
    charter_digest: Digest = None,
    as_json: Json = False,
) -> None:
    """Write all answers, checks and entries and the graph of what came from what on one page that needs no network.

    Ends with 6 if anything is refuted, else with 0: some questions no bundle answers.

    Example:  fedmat audit page evidence.zip -o audit.html
    """
    from fedmat import audit_page as pages
    from fedmat import console, files
    from fedmat.checks import PROVED, REFUTED, worst

    audit = _audit(bundle, charter_digest)
    files.write_atomic(out, pages.page(audit).encode())
    verdict = worst([*(c.verdict for c in audit.checks), *(a.verdict for s in audit.summary().values() for a in _counted(s))])
    if as_json:
        found = {section: [a.as_json() for a in answers] for section, answers in audit.summary().items()}
        console.write_json(_about(audit, verdict) | {"page": str(out), "sections": found})
    else:
        _line(verdict, f"run {audit.verified.bundle.run} of {audit.verified.bundle.consortium}")
        console.show_where([("page", console.show_path(out))])
    _end(REFUTED if verdict == REFUTED else PROVED)


@audit_app.command("replay")
def audit_replay(
    bundle: BundlePath,
    consortium: Annotated[
        Path, typer.Argument(metavar="CONSORTIUM", help="The consortium file, with its sites' files and data.")
    ],
    repository: Annotated[Path, typer.Option(help="The git repository of the code; only read.")] = Path(),
    commit: Annotated[str | None, typer.Option(help="Which code.", show_default="the commit that the ledger states")] = None,
    workdir: Annotated[Path, typer.Option(help="Where to work; a clone of the code is made in it.")] = Path("replay"),
    charter_digest: Digest = None,
    as_json: Json = False,
) -> None:
    """Make the model again from a clone of the code, and compare everything with the bundle, artefact by artefact.

    For the machine that holds the data. It runs the code of that commit: read it first. Ends with 0 if all is identical or within the
    tolerance, 6 if it diverges, 8 if it cannot be told.

    Example:  fedmat audit replay evidence.zip consortium.yaml
    """
    from fedmat import console
    from fedmat import replay as replaying
    from fedmat.checks import REFUTED

    audit = _audit(bundle, charter_digest)
    run = audit.verified.run
    if run is None:
        raise NotEvidenced(f"{bundle}: its ledger has no run {audit.verified.bundle.run}", fix="ask for the bundle again")
    bad = [c for c in audit.checks if c.verdict == REFUTED]
    if bad:
        raise ProtocolError(
            bad[0].reason, f"{bad[0].place}: {bad[0].what}",
            fix="a bundle that contradicts itself has nothing to compare with: fedmat audit verify",
        )  # fmt: skip
    commit = commit or run.plan.entry.git_commit
    if not commit:
        raise NotEvidenced("the ledger states no commit of the code", fix="name one with --commit")
    folder = audit.verified.bundle.unpack(workdir / "expected")
    expected = replaying.Expected.of_run(folder, dirty=run.plan.entry.git_dirty)
    found = replaying.replay(
        expected, repository=repository, commit=commit, consortium_file=consortium, workdir=workdir, progress=console.say
    )
    verdict: Verdict = (
        "refuted" if found.verdict == "diverged" else "not evidenced" if found.verdict == "not_evidenced" else "proved"
    )
    if as_json:
        console.write_json(_about(audit, verdict) | replaying.as_plain(found))
    else:
        _line(verdict, f"{found.verdict.replace('_', ' ')}: commit {found.commit[:12]}, {found.seconds:.0f} s")
        rows = [(a.place, a.verdict.replace("_", " ")) for a in found.artefacts]
        console.show_rows("", ("artefact", "result"), rows)
        if found.first_divergence:
            console.out().print(f"first difference: {found.first_divergence}", markup=False)
        for reason in found.reasons:
            console.out().print(f"note: {reason}", markup=False)
    _end(verdict)


@audit_app.command("export")
def audit_export(
    bundle: BundlePath,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write into.")] = Path("provenance"),
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="openlineage, prov or ro-crate; once or more often.", show_default="all"),
    ] = None,
    audience: Annotated[
        Literal["members", "public"],
        typer.Option(help="To whom the crate may be shown: decides, by the charter, what is in it."),
    ] = "members",
    charter_digest: Digest = None,
    as_json: Json = False,
) -> None:
    """Write the graph of what came from what for other tools: OpenLineage events, W3C PROV and a Workflow Run RO-Crate.

    None of them carries a proof; every record in them names the ledger's entry that does. Ends with 6 if the bundle is refuted.

    Example:  fedmat audit export evidence.zip -o provenance
    """
    from fedmat import console, provenance
    from fedmat.checks import PROVED, REFUTED, worst

    audit = _audit(bundle, charter_digest)
    verdict = worst(c.verdict for c in audit.checks)
    written = provenance.write(audit.graph, audit.verified.bundle, out, formats or provenance.FORMATS, audience)
    if as_json:
        console.write_json(_about(audit, verdict) | {"written": {name: str(path) for name, path in written.items()}})
    else:
        _line(verdict, f"run {audit.verified.bundle.run} of {audit.verified.bundle.consortium}")
        console.show_where([(name, console.show_path(path)) for name, path in written.items()])
    _end(REFUTED if verdict == REFUTED else PROVED)


# --- inside ----------------------------------------------------------------------------------------------------------


def _audit(path: Path, charter_digest: str | None) -> Audit:
    from fedmat.audit import Audit
    from fedmat.bundle import Bundle

    if charter_digest is not None:
        bare = charter_digest.replace(" ", "").lower()
        if len(bare) != 64 or set(bare) - set("0123456789abcdef"):
            raise ConfigError(
                "--charter-digest is no SHA-256",
                fix="64 digits, as fedmat consortium charter prints them; blanks do not matter",
            )
        charter_digest = bare
    return Audit.of(Bundle.open(path), charter_digest)


def _about(audit: Audit, verdict: Verdict) -> dict[str, Any]:
    bundle = audit.verified.bundle
    return {"bundle": str(bundle.path), "consortium": bundle.consortium, "run": bundle.run, "verdict": verdict}


def _counted(answers: Iterable[Answer]) -> list[Answer]:
    """Returns the answers that a bundle can give: the others are shown, and decide nothing."""
    from fedmat.audit import BEYOND

    return [a for a in answers if a.place != BEYOND]


def _show(audit: Audit, answers: Sequence[Answer], as_json: bool) -> None:
    from fedmat import console
    from fedmat.checks import worst

    verdict = worst(a.verdict for a in _counted(answers))
    if as_json:
        console.write_json(_about(audit, verdict) | {"answers": [a.as_json() for a in answers]})
        _end(verdict)
        return
    for answer in answers:
        _line(answer.verdict, answer.question)
        _said(answer.said)
        if answer.place and answer.said not in answer.place:
            _said(answer.place)
    for answer in answers:
        _tables(answer)
    limits = [(a.name.replace("_", " "), a.limits) for a in answers if a.limits]
    if limits:
        console.show_rows("what this does not show", ("answer", "limits"), limits)
    evidence = sorted({p.entry for a in answers for p in a.evidence})
    if evidence:
        _said(
            f"Rests on {len(evidence)} entries of ledger.jsonl; --json names each with its digest, its signers and how to check it."
        )
    _end(verdict)


def _tables(answer: Answer) -> None:
    from fedmat import console
    from fedmat.audit_page import table

    value = answer.value
    parts: list[tuple[str, Any]] = [("", value)]
    if isinstance(value, dict):
        lists = [(k, v) for k, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
        parts = [("", {k: v for k, v in value.items() if k not in dict(lists)}), *lists]
    for name, part in parts:
        columns, rows = table(part)
        if not rows:
            continue
        title = f"{answer.name.replace('_', ' ')}{f', {name}' if name else ''}"
        title += f": the first {_SHOWN} of {len(rows)} rows (--json has all)" if len(rows) > _SHOWN else ""
        if columns != ["", "value"]:
            columns, rows = _narrow(columns, rows)
            rows = [[_DIGEST.sub(lambda found: found[0][:16], cell) for cell in row] for row in rows]
        console.show_rows(title, [c.replace("_", " ") for c in columns], rows[:_SHOWN])


def _narrow(columns: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Leaves out of a wide table the columns that say the same in every row."""
    if len(columns) <= _WIDE:
        return columns, rows
    kept = [i for i in range(len(columns)) if len({row[i] for row in rows}) > 1]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _line(verdict: Verdict, text: str) -> None:
    from rich.text import Text

    from fedmat import console

    console.out().print(Text.assemble((f"{verdict:<14}", _STYLES[verdict]), text), soft_wrap=True)


def _said(text: str) -> None:
    from fedmat import console

    console.out().print(f"{'':<14}{text}", markup=False, soft_wrap=True)


def _end(verdict: Verdict) -> None:
    if _CODES[verdict]:
        raise typer.Exit(_CODES[verdict])
