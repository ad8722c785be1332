"""What has left a site, written down before it leaves: one line for every outbound object, in a file that only grows.

Knows: the file, the line, the door at which an answer passes, and how the whole is fixed by one root. Refuses to know: what an
object holds beyond its kind, size, digest and count of numbers; other sites; the ledger that the members share.

A line is on the disk before its object is handed over: a crash in between leaves a line for something that did not leave, and never
the other way round. The root over all lines goes into the members' ledger, signed by the site: a line taken out, changed or put in
afterwards no longer fits it.

References:
    RFC 9162 (Merkle tree hashes), RFC 8785 (canonical JSON).
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedmat import files, wire
from fedmat.config import PlanSettings
from fedmat.errors import ProtocolError, StateError
from fedmat.ledger import merkle
from fedmat.ledger.text import stamp

BOOK = "egress.jsonl"  # in a site's workspace
FIELDS = (
    "n", "time", "site", "kind", "plan_sha256", "dataset_sha256", "round", "destination", "bytes", "sha256", "tensors", "numbers",
    "filters", "epsilon", "clause", "policy_sha256",
)  # fmt: skip
_UPDATES = ("Update", "Sealed")
_PRIVATE = Path("privacy/ledger.jsonl")


@dataclass(frozen=True)
class Door:
    """Where the answers of one site to one plan pass.

    Attributes:
        folder: the site's workspace.
        dataset_sha256: the accepted records that answers are made from.
        settings: the plan's, which decide what is done to an update before it leaves.
        now: the clock.
    """

    site: str
    folder: Path
    plan_sha256: str
    dataset_sha256: str
    settings: PlanSettings
    now: Callable[[], datetime] = lambda: datetime.now(UTC)

    def note(self, answer: bytes, request: bytes, *, clause: str = "", policy_sha256: str = "") -> None:
        """Writes down that ``answer`` is about to leave.

        Args:
            request: what it answers; tells the round.
            clause: of the site's policy that lets it go; "" where no policy was asked.

        Raises:
            StateError: it could not be written: nothing may leave then.
        """
        fields = wire.outline(answer)
        kind = str(fields["kind"])
        append(self.folder / BOOK, {
            "time": stamp(self.now()),
            "site": self.site,
            "kind": kind,
            "plan_sha256": self.plan_sha256,
            "dataset_sha256": self.dataset_sha256,
            "round": wire.outline(request)["round"],
            "destination": "coordinator",
            "bytes": len(answer),
            "sha256": files.sha256(answer),
            "tensors": fields["tensors"],
            "numbers": fields["numbers"],
            "filters": list(filters(self.settings, kind)),
            "epsilon": self._epsilon(kind),
            "clause": clause,
            "policy_sha256": policy_sha256,
        })  # fmt: skip

    def around(self, handler: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
        """Returns a site's handler whose answers are written down."""

        def noted(request: bytes) -> bytes:
            answer = handler(request)
            self.note(answer, request)
            return answer

        return noted

    def _epsilon(self, kind: str) -> float | None:
        """Returns what has been spent of the site's privacy budget with this object; None where it costs none."""
        if kind == "SealedMoments":
            return self.settings.contribution.settle_epsilon
        path = self.folder / _PRIVATE
        if kind not in _UPDATES or self.settings.privacy.unit == "none" or not path.exists():
            return None
        from fedmat.privacy.accounting import BudgetLedger

        return BudgetLedger(path).spent()


def filters(settings: PlanSettings, kind: str) -> tuple[str, ...]:
    """Returns what a plan has done to an object of a kind before it leaves, in order."""
    if kind == "SealedMoments":
        return (f"gaussian noise, epsilon {settings.contribution.settle_epsilon:g}", "sealed to the auditor")
    if kind not in _UPDATES:
        return ()
    p, c, s = settings.privacy, settings.compression, settings.security
    return (
        *((f"differential privacy per {p.unit}, epsilon {p.epsilon:g}",) if p.unit != "none" else ()),
        *((f"compression {c.name}",) if c.name != "none" else ()),
        *((f"encryption {s.mode}",) if s.mode != "none" else ()),
    )


def append(path: Path, fields: Mapping[str, Any]) -> int:
    """Appends a line, on the disk when this returns, and returns its number. Several processes may append.

    A line that a crash left half written, whose object never left, is taken away first.

    Raises:
        StateError: the file cannot be written, or its last whole line is none of an egress ledger.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as book:
            fcntl.flock(book, fcntl.LOCK_EX)
            number = _next(book, path)
            book.write(files.canonical_json({"n": number, **fields}) + b"\n")
            book.flush()
            os.fsync(book.fileno())
    except OSError as error:
        raise StateError(
            f"{path}: the egress ledger cannot be written ({error.strerror}), so nothing leaves",
            fix="free the disk, or mend its rights",
        ) from None
    return number


def _next(book: Any, path: Path) -> int:
    """Returns the number of the next line, from the last whole one; the file is cut after it."""
    size = book.seek(0, os.SEEK_END)
    tail, start = b"", size
    while start and tail.count(b"\n") < 2:
        start = max(0, start - 4096)
        book.seek(start)
        tail = book.read(size - start)
    end = tail.rfind(b"\n") + 1
    if start + end < size:
        book.truncate(start + end)
    if end == 0:
        return 0
    last = tail[: end - 1].rsplit(b"\n", 1)[-1]
    with suppress(ValueError, KeyError, TypeError):
        return int(json.loads(last)["n"]) + 1
    raise StateError(f"{path}: its last line is damaged", fix="restore the file from the site's backup")


def read(path: Path) -> bytes:
    """Returns all whole lines of a site's egress ledger; empty where nothing has left."""
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1]


def lines(data: bytes, where: str) -> list[dict[str, Any]]:
    """Returns the lines of an egress ledger as plain JSON.

    Args:
        where: the file, for messages.

    Raises:
        ProtocolError: bad_egress: a line is not canonical, not complete, or out of order; it is named.
    """
    found = []
    if data and not data.endswith(b"\n"):
        raise ProtocolError("bad_egress", f"{where}: its last line is cut off")
    for number, line in enumerate(data.split(b"\n")[:-1]):
        try:
            value = json.loads(line)
            whole = isinstance(value, dict) and set(value) == set(FIELDS) and files.canonical_json(value) == line
        except ValueError:
            whole = False
        if not whole or value["n"] != number:
            raise ProtocolError(
                "bad_egress", f"{where}, line {number + 1}: not a line of an egress ledger, or not in its place"
            )
        found.append(value)
    return found


def root(data: bytes, size: int | None = None) -> bytes:
    """Returns the RFC 9162 root over the first ``size`` lines (all by default)."""
    split: Sequence[bytes] = data.split(b"\n")[:-1]
    return merkle.root_of(merkle.leaf_hash(line) for line in (split if size is None else split[:size]))


@dataclass(frozen=True)
class Row:
    """One round of a site: what its egress ledger says left, and what the coordinator says arrived.

    Attributes:
        left, arrived: bytes.
        verdict: ``agrees``; ``more left``: answers that did not arrive, or were asked for again after a crash; ``less left``: bytes
            arrived that this site did not write down; ``other update``: the update that counted is none of those that left.
    """

    round: int
    objects: int
    left: int
    arrived: int
    verdict: str

    @property
    def sound(self) -> bool:
        """Whether everything that arrived had been written down."""
        return self.verdict in ("agrees", "more left")


def reconcile(book: Sequence[Mapping[str, Any]], reports: Sequence[Mapping[str, Any]], site: str) -> tuple[Row, ...]:
    """Compares a site's egress ledger with the reports of a run, round by round.

    Args:
        book: the lines, as :func:`lines` gives them.
        reports: of the rounds, as in ``rounds.jsonl``.
    """
    rows = []
    for report in reports:
        mine = [n for n in book if n["round"] == report["round"] and n["plan_sha256"] == report["plan_sha256"]]
        left, arrived = sum(n["bytes"] for n in mine), int(report["bytes_up"].get(site, 0))
        counted = report.get("updates", {}).get(site)
        if counted and counted not in {n["sha256"] for n in mine}:
            verdict = "other update"
        else:
            verdict = "agrees" if left == arrived else "more left" if left > arrived else "less left"
        rows.append(Row(report["round"], len(mine), left, arrived, verdict))
    return tuple(rows)
