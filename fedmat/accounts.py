"""A finished run goes into the ledger: the operator's entries, the sites' signed ones, a checkpoint, the evidence bundle.

Knows: which of a run's files becomes which entry, and in what order. Refuses to know: records, what an entry is allowed to say
(``fedmat.ledger.fold``), Prefect, the terminal.

It can be done again at any time: what stands there already is not written twice, and a ledger that says something else is an error,
never overwritten. Sites that did not answer leave a gap that an auditor sees as "not evidenced".
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmat import bundle, files, governance, keys
from fedmat._version import __version__
from fedmat.domain import Statements, StatementsRequest
from fedmat.errors import NotEvidenced, ProtocolError, StateError
from fedmat.evidence import (
    ATTESTATIONS,
    EVALUATIONS,
    INTERVALS,
    MATCHING,
    METRICS,
    MODEL,
    Evidence,
    FinishedRun,
    code_commit,
)
from fedmat.ledger import entries, export, log
from fedmat.ledger.credits import due
from fedmat.ledger.entries import (
    OPERATOR,
    AggregateEntry,
    ContributionEntry,
    EvaluationEntry,
    ExclusionEntry,
    MintEntry,
    PlanEntry,
    RegistrationEntry,
)
from fedmat.ledger.fold import Fold, Placed, RunEntries
from fedmat.ledger.notes import Verifier
from fedmat.ledger.text import stamp
from fedmat.ledger.witness import Witness
from fedmat.places import EVIDENCE

if TYPE_CHECKING:
    from fedmat.config import ConsortiumConfig
    from fedmat.federation.engine import Engine
    from fedmat.federation.plan import Plan
    from fedmat.keys import Charter, PartyKeys

LEDGER = Path("ledger")  # in the operator's workspace: the log, the operator's keys
DATABASE, OPERATOR_KEYS, WITNESS = "ledger.db", "keys", "witness"
STATEMENTS = "statements.json"  # in a run's folder: what the sites signed about it
URL = "FEDMAT_LEDGER"  # where the log is, if not below the workspace: a path or a database's URL
_TRIES = 5


@dataclass(frozen=True)
class Books:
    """The operator's ledger of one consortium, and the key that keeps it.

    Attributes:
        home: the operator's workspace.
    """

    home: Path
    consortium: str

    @property
    def where(self) -> str:
        """Path or URL of the log."""
        return os.environ.get(URL, "").strip() or str(self.home / LEDGER / DATABASE)

    @property
    def origin(self) -> str:
        """What checkpoints call this log."""
        return f"fedmat/{self.consortium}"

    @property
    def key_folder(self) -> Path:
        """Folder of the operator's keys."""
        return self.home / LEDGER / OPERATOR_KEYS

    def exists(self) -> bool:
        """Tells whether a log was begun."""
        return "://" in self.where or Path(self.where).exists()

    def open(self) -> log.Log:
        """Opens the log, begins it if there is none."""
        if "://" not in self.where:
            Path(self.where).parent.mkdir(parents=True, exist_ok=True)
        return log.Log.open(self.where, self.origin)

    def fold(self) -> Fold:
        """Returns what the ledger says; an empty one if none was begun.

        Raises:
            ProtocolError: the ledger is damaged.
        """
        if not self.exists():
            return Fold()
        with self.open() as opened:
            return Fold.of(opened.read())

    def operator(self, today: date | None = None) -> PartyKeys:
        """Returns the operator's keys; with ``today``, makes them if there are none (a rehearsal).

        Raises:
            StateError: there are none.
        """
        folder = self.key_folder
        if today is not None and not (folder / keys.SIGNING).exists():
            made = keys.PartyKeys.new(OPERATOR)
            until = keys.years_later(today, keys.REHEARSAL_YEARS)
            keys.create(made, made.public("operator", "Rehearsal operator", until), folder)
        return keys.load(folder, OPERATOR)


def begin(books: Books, config: ConsortiumConfig, charter: Charter, parties: Mapping[str, PartyKeys], now: datetime) -> None:
    """Begins the ledger of a rehearsal, whose parties' keys one operator holds; does nothing where it is begun.

    Args:
        parties: the sites' keys.
    """
    with books.open() as opened:
        if opened.size:
            return
        operator = books.operator(now.date())
        entry = governance.charter(config, charter, keys.entry_of(books.key_folder), now)
        opened.append([entries.seal(entry, [operator, *parties.values()])], expected=0)


def name_of(fold: Fold, folder: Path) -> str:
    """Returns what the ledger calls a run: its folder's name, with a number where the ledger knows another run under that name.

    A run that was started afresh is another one as soon as anything in its rounds, model or metrics differs (an encrypted one always
    does); the ledger keeps both.
    """
    for number in range(1, 10_000):
        name = folder.name if number == 1 else f"{folder.name}.{number}"
        known = fold.runs.get(name)
        if known is None or _is_of(known, folder):
            return name
    raise StateError(f"{folder}: the ledger knows too many runs of this name", fix="name the run with --run-id")


def _is_of(known: RunEntries, folder: Path) -> bool:
    """Tells whether entries are about the run in ``folder`` as it is."""
    if known.evaluation is not None:
        stated = known.evaluation.entry
        if stated.model_sha256 != files.sha256_file(folder / MODEL):
            return False
        if (folder / METRICS).exists() and stated.metrics_sha256 != files.sha256_file(folder / METRICS):
            return False
    reports = Evidence.read(folder).rounds or []
    there = {r["round"]: entries.report_digest(r) for r in reports}
    return all(there.get(number) == placed.entry.report_sha256 for number, placed in known.aggregates.items())


def ask(folder: Path, plan: Plan, run: str, engine: Engine) -> dict[str, Any]:
    """Asks the sites of a run for their signed entries, writes them to ``statements.json`` and returns them.

    A site that gives none is named there with the reason.
    """
    finished = files.read_json(folder / ATTESTATIONS)["attestations"]
    rounds = Evidence.read(folder).rounds or []
    requests = {
        site: StatementsRequest(
            plan.sha256, plan.consortium, run,
            {str(r["round"]): r["updates"][site] for r in rounds if site in r.get("updates", {})},
        )
        for site in sorted(finished)
    }  # fmt: skip
    told: dict[str, Any] = {}
    for d in engine.scatter(dict(requests), plan.settings.deadline_s):
        if isinstance(d.answer, Statements) and d.answer.site == d.site:
            told[d.site] = {"envelopes": list(d.answer.envelopes), "egress": d.answer.egress, "why": ""}
        else:
            why = getattr(d.answer, "detail", "") or "answered something else"
            told[d.site] = {"envelopes": [], "egress": "", "why": why}
    result = {"schema": "fedmat/statements/1", "run": run, "sites": told}
    files.write_json(folder / STATEMENTS, result)
    return result


def enter(books: Books, run: str, folder: Path, consortium_file: Path, now: datetime) -> int:
    """Writes a finished run's entries that are not in the ledger yet and returns how many that were.

    Raises:
        NotEvidenced: the run is not finished, or the ledger is not begun.
        StateError: the ledger says something else about this run.
        ProtocolError: an entry breaks a rule; nothing of it is written.
    """
    finished = FinishedRun.read(folder)
    begin_first = NotEvidenced(
        f"{books.where}: the ledger is not begun", fix="fedmat consortium charter, signed by all members (docs/charter.md)"
    )
    if not books.exists():
        raise begin_first
    operator = books.operator()
    _environment(folder)
    files.write_atomic(folder / bundle.CONSORTIUM, consortium_file.read_bytes())
    for _ in range(_TRIES):
        with books.open() as opened:
            size, fold = opened.size, Fold.of(opened.read())
            if size == 0:
                raise begin_first
            fresh = [*_wanted(finished, fold, run, operator, now)]
            try:
                opened.append(list(fresh), expected=size) if fresh else None
            except ProtocolError as error:
                if error.reason != "ledger_moved":
                    raise
                continue
            return len(fresh)
    raise StateError(f"{books.where}: others write to the ledger all the time", fix="try again")


def _wanted(finished: FinishedRun, fold: Fold, run: str, operator: PartyKeys, now: datetime) -> Iterable[bytes]:
    """Yields envelopes that the ledger lacks, each already applied to ``fold``."""
    folder, about = finished.folder, {"consortium": fold.consortium, "by": OPERATOR, "time": stamp(now), "run": run}
    statements = files.read_json(folder / STATEMENTS)["sites"] if (folder / STATEMENTS).exists() else {}
    signed: dict[str, list[tuple[Any, bytes]]] = {}
    for site, told in sorted(statements.items()):
        for text in told["envelopes"]:
            entry, _ = entries.open_envelope(text.encode(), f"a statement of {site}")
            signed.setdefault(site, []).append((entry, text.encode()))

    def of_sites(*types: str, round: int | None = None) -> Iterable[tuple[Any, bytes]]:
        for told in signed.values():
            yield from ((e, d) for e, d in told if e.type in types and (round is None or e.round == round))

    def ours(entry: Any) -> tuple[Any, bytes]:
        return entry, entries.seal(entry, [operator])

    def take(found: Iterable[tuple[Any, bytes]]) -> Iterable[bytes]:
        for entry, data in found:
            if not _known(fold, entry):
                fold.apply(data)
                yield data

    m = finished.metrics
    yield from take([ours(_plan(finished, about))])
    yield from take(of_sites("dataset", "contract_report"))
    yield from take(ours(e) for e in _exclusions(m, about, -1))
    for report in finished.rounds:
        number = report["round"]
        yield from take(of_sites("update", round=number))
        yield from take(ours(e) for e in (*_exclusions(m, about, number), *_left_out(report, about)))
        yield from take([ours(_aggregate(report, about))])
    yield from take(of_sites("egress"))
    yield from take([ours(_evaluation(finished, about))])
    for contribution in _contributions(finished, about):
        yield from take([ours(contribution)])
        yield from take(ours(e) for e in _mint(fold, run, contribution, about))


def _known(fold: Fold, entry: Any) -> bool:
    """Tells whether the ledger states this already.

    Raises:
        StateError: it states something else in its place.
    """
    run = fold.runs.get(entry.run)
    if run is None:
        return False
    for placed in run.all():
        if type(placed.entry) is type(entry) and entries.same(placed.entry, entry):
            return True
    slots: dict[str, Callable[[], Placed | None]] = {
        "plan": lambda: run.plan, "aggregate": lambda: run.aggregates.get(entry.round), "evaluation": lambda: run.evaluation,
        "dataset": lambda: run.datasets.get(entry.by), "contract_report": lambda: run.reports.get(entry.by),
        "update": lambda: run.updates.get((entry.round, entry.by)), "credit_mint": lambda: run.mint,
    }  # fmt: skip
    slot = slots[entry.type]() if entry.type in slots else None
    if slot is None:
        return False
    if entry.type == "plan" and slot.entry.plan_sha256 == entry.plan_sha256:
        return True  # the same run, looked at from a newer checkout or environment
    raise StateError(
        f"entry {slot.index} of the ledger states another {entry.type} of {entry.by} in run {entry.run}",
        fix="the ledger is never overwritten: run under another name (--run-id)",
    )


# --- one entry each ------------------------------------------------------------------------------------------------


def _plan(finished: FinishedRun, about: Mapping[str, Any]) -> PlanEntry:
    commit, dirty = code_commit()
    return PlanEntry(
        **about,
        plan_sha256=finished.metrics["plan_sha256"],
        sites=tuple(sorted(finished.metrics["sites"])),
        seed=finished.plan["settings"]["seed"],
        rounds=len(finished.rounds),
        code_version=__version__,
        git_commit=commit,
        git_dirty=dirty,
        environment_sha256=files.sha256_file(finished.folder / bundle.ENVIRONMENT),
        consortium_file_sha256=files.sha256_file(finished.folder / bundle.CONSORTIUM),
    )


def _exclusions(metrics: Mapping[str, Any], about: Mapping[str, Any], number: int) -> Iterable[ExclusionEntry]:
    for x in metrics["exclusions"]:
        if x["round"] == number:
            yield ExclusionEntry(**about, **{k: x[k] for k in ("round", "site", "kind", "reason", "detail")})


def _left_out(report: Mapping[str, Any], about: Mapping[str, Any]) -> Iterable[ExclusionEntry]:
    for site, why in sorted(report["excluded"].items()):
        yield ExclusionEntry(**about, round=report["round"], site=site, kind="rule", reason=report["rule"], detail=why)


def _aggregate(report: Mapping[str, Any], about: Mapping[str, Any]) -> AggregateEntry:
    return AggregateEntry(
        **about,
        **{k: report[k] for k in ("round", "rule", "protection", "shares", "model_sha256", "evidence")},
        updates=report.get("updates", {}),  # of a run of before there were ledgers: none
        report_sha256=entries.report_digest(report),
    )


def _evaluation(finished: FinishedRun, about: Mapping[str, Any]) -> EvaluationEntry:
    folder = finished.folder
    return EvaluationEntry(
        **about,
        model_sha256=finished.sha256,
        weights_sha256=finished.rounds[-1]["model_sha256"],
        held_out_sha256=finished.held_out_sha256,
        metrics_sha256=files.sha256_file(folder / METRICS),
        evaluations_sha256=files.sha256_file(folder / EVALUATIONS),
        intervals_sha256=files.sha256_file(folder / INTERVALS),
        matching_sha256=files.sha256_file(folder / MATCHING),
        metric=finished.metrics["task"]["metric"],
        score=finished.score,
    )


def _contributions(finished: FinishedRun, about: Mapping[str, Any]) -> Iterable[ContributionEntry]:
    totals: dict[str, float] = {}
    for report in finished.rounds:
        for site, value in report["contribution"].items():
            totals[site] = totals.get(site, 0.0) + value
    if totals:
        evidence = files.sha256(files.canonical_json([entries.report_digest(r) for r in finished.rounds]))
        yield ContributionEntry(**about, model_sha256=finished.sha256, method="gram", shares=totals, evidence_sha256=evidence)
    path = finished.folder / bundle.SETTLEMENT
    if path.exists():
        told = files.read_json(path)["sites"]
        yield ContributionEntry(
            **about, model_sha256=finished.sha256, method="settlement",
            shares={s: v["share"] for s, v in told.items()}, errors={s: v["error"] for s, v in told.items()},
            evidence_sha256=files.sha256_file(path),
        )  # fmt: skip


def _mint(fold: Fold, run: str, basis: ContributionEntry, about: Mapping[str, Any]) -> Iterable[MintEntry]:
    """Yields credits for what was settled; a look at single rounds is no basis for money (docs/contribution.md)."""
    placed = next((p for p in fold.runs[run].contributions if entries.same(p.entry, basis)), None)
    if basis.method == "gram" or placed is None:
        return
    given = due(basis, fold.terms, fold.organisations())
    yield MintEntry(**about, model_sha256=basis.model_sha256, contribution=placed.index, amounts=given)


def _environment(folder: Path) -> None:
    """Writes what the operator's side ran with, once per run."""
    path = folder / bundle.ENVIRONMENT
    if path.exists():
        return
    releases = {str(d.metadata["Name"]).lower(): d.version for d in distributions() if d.metadata["Name"]}
    files.write_json(path, {
        "python": platform.python_version(), "implementation": platform.python_implementation(), "byte_order": sys.byteorder,
        "system": platform.system(), "machine": platform.machine(), "releases": dict(sorted(releases.items())),
    })  # fmt: skip


# --- after the entries -----------------------------------------------------------------------------------------------


def register(
    books: Books, run: str, name: str, version: int, sha256: str, aliases: Sequence[str], why: str, now: datetime
) -> None:
    """Writes that a model was registered; done before, nothing is written.

    Raises:
        ProtocolError: no_approval: it is to be champion without the charter's approvals.
    """
    operator = books.operator()
    entry = RegistrationEntry(
        consortium=books.consortium, by=OPERATOR, time=stamp(now), run=run, model_sha256=sha256, name=name, version=version,
        aliases=tuple(aliases), decision=why,
    )  # fmt: skip
    with books.open() as opened:
        size, fold = opened.size, Fold.of(opened.read())
        known = fold.runs[run].registration if run in fold.runs else None
        if known is not None and entries.same(known.entry, entry):
            return
        data = entries.seal(entry, [operator])
        fold.apply(data)
        opened.append([data], expected=size)


def seal(books: Books, now: datetime, witnesses: Mapping[str, tuple[PartyKeys, Path]] | None = None) -> str:
    """Signs a checkpoint over the whole ledger and returns it, cosigned by the witnesses that are here.

    Args:
        witnesses: members whose keys are here (a rehearsal): name -> keys and folder of the witness's memory.
    """
    operator = books.operator()
    with books.open() as opened:
        note = opened.sign_checkpoint(books.origin, operator)
        size = opened.size
        log_key = Verifier.of(books.origin, operator)
        for site, (own, folder) in sorted((witnesses or {}).items()):
            name = witness_name(books.consortium, site)
            witness = Witness(name, own, folder, log_key, books.origin)
            seen = witness.seen.size
            line = witness.cosign(note, seen, opened.consistency(seen, size), int(now.timestamp()))
            note = opened.add_cosignature(size, line, Verifier.of(name, own))
    return note


def witness_name(consortium: str, site: str) -> str:
    """Returns what a member is called where it cosigns."""
    return f"{consortium}/{site}"


def pack(books: Books, run: str, folder: Path, out: Path | None = None) -> Path:
    """Writes the evidence bundle of a run and returns its path."""
    statements = files.read_json(folder / STATEMENTS)["sites"] if (folder / STATEMENTS).exists() else {}
    egress = {site: told["egress"].encode() for site, told in statements.items() if told["egress"]}
    with tempfile.TemporaryDirectory(prefix="fedmat-") as place, books.open() as opened:
        export.export(opened, Path(place) / bundle.LEDGER)
        exported = (Path(place) / bundle.LEDGER).read_bytes()
    target = out or folder / EVIDENCE
    return bundle.pack(folder, exported, egress, consortium=books.consortium, run=run, out=target)
