"""A whole log as one text file, and what such a file shows without any database or network.

Knows: the file's lines, its checkpoints, the tree over its entries, signatures of keys it is told. Refuses to know: what an
entry says and whose word counts when (``fedmat.ledger.fold``).

``ledger.jsonl``: first a header ``{"origin","schema","size"}``, then one signed envelope per line in canonical form, then one
line ``{"checkpoint": note}`` per checkpoint, smallest first. Every line has exactly one spelling and ends in a newline. Entry
``i`` is on line ``i + 2``.

Reference:
    RFC 8785 (canonical JSON). C2SP tlog-checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmat import files
from fedmat.errors import ProtocolError, StateError
from fedmat.ledger import dsse, merkle, notes
from fedmat.ledger.finding import Finding
from fedmat.ledger.notes import Verifier

if TYPE_CHECKING:
    from fedmat.ledger.log import Log

SCHEMA = "fedmat/ledger/1"
FILE = "ledger.jsonl"


@dataclass(frozen=True)
class Export:
    """What is in an export; every line has its one form, and nothing is verified.

    Attributes:
        entries: canonical envelopes, entry 0 first.
        checkpoints: signed notes, smallest first.
        name: the file's name, for messages.
    """

    origin: str
    entries: tuple[bytes, ...]
    checkpoints: tuple[str, ...]
    name: str = FILE

    def line_of(self, entry: int) -> int:
        """Returns the number of the line on which an entry stands (the first line is 1)."""
        return entry + 2

    def place(self, entry: int) -> str:
        """Returns how messages call an entry's place."""
        return f"{self.name} line {self.line_of(entry)} (entry {entry})"


# --- writing ---------------------------------------------------------------------------------------------------------


def export(log: Log, path: Path, size: int | None = None) -> None:
    """Writes a log as a file that appears whole or not at all.

    Args:
        size: the first so many entries and the checkpoints among them (default: all). What no checkpoint covers proves nothing.

    Raises:
        ProtocolError: not_canonical (an entry is no envelope in canonical form), truncated_log.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            size = merkle.within(size, log.size)
            handle.write(_header(log.origin, size))
            for index, data in enumerate(log.read(0, size)):
                if not data.startswith(b'{"payload":"') or b"\n" in data:
                    raise ProtocolError("not_canonical", f"entry {index} of {log.where} is no envelope in canonical form")
                handle.write(data + b"\n")
            for note in log.checkpoints():
                if notes.read(notes.parse(note).body)[1] <= size:
                    handle.write(_checkpoint(note))
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _header(origin: str, size: int) -> bytes:
    return files.canonical_json({"origin": origin, "schema": SCHEMA, "size": size}) + b"\n"


def _checkpoint(note: str) -> bytes:
    return files.canonical_json({"checkpoint": note}) + b"\n"


# --- reading ---------------------------------------------------------------------------------------------------------


def read_export(path: Path, origin: str | None = None) -> Export:
    """Reads an export.

    Args:
        origin: the log this must be; any, if None.

    Raises:
        StateError: there is no such file.
        ProtocolError: not_canonical (a line is not what it must be, to the bit), truncated_log (fewer entries than the header
            says), bad_checkpoint, foreign_bundle. The message names the line.
    """
    try:
        with path.open("rb") as handle:
            return parse_export(handle, path.name, origin)
    except FileNotFoundError:
        raise StateError(f"{path}: no such file", fix="name the ledger of a bundle") from None


def parse_export(handle: Iterable[bytes], name: str = FILE, origin: str | None = None) -> Export:
    """Returns what an export's lines say, each with its line feed; errors as :func:`read_export`."""
    lines = _lines(name, handle)
    found, size = _read_header(name, next(lines, b""))
    if origin is not None and found != origin:
        raise ProtocolError(
            "foreign_bundle", f"{name} line 1: the ledger of {found}, not of {origin}", fix="take the right bundle"
        )
    entries, checkpoints = [], []
    for number, line in enumerate(lines, start=2):
        if number - 2 < size:
            entries.append(_read_entry(name, number, size, line))
        else:
            checkpoints.append(_read_checkpoint(name, number, line))
    if len(entries) < size:
        raise _fewer(name, len(entries), size, len(entries) + 2)
    return Export(found, tuple(entries), tuple(checkpoints), name)


def _lines(name: str, handle: Iterable[bytes]) -> Iterator[bytes]:
    for number, line in enumerate(handle, start=1):
        if not line.endswith(b"\n"):
            raise ProtocolError("truncated_log", f"{name} line {number}: cut off, it does not end", fix="get the whole file")
        yield line[:-1]


def _read_header(name: str, line: bytes) -> tuple[str, int]:
    found = _json(line)
    try:
        origin, size = found["origin"], found["size"]
        if type(size) is not int or not isinstance(origin, str) or _header(origin, size) != line + b"\n" or size < 0:
            raise ValueError("not the header")
        notes.checkpoint(origin, 0, merkle.EMPTY)
    except (ValueError, LookupError, TypeError, ProtocolError):
        raise ProtocolError(
            "not_canonical", f"{name} line 1: not the header of a ledger ({SCHEMA}) in canonical form", fix="get the file again"
        ) from None
    return origin, size


def _read_entry(name: str, number: int, size: int, line: bytes) -> bytes:
    if line.startswith(b'{"checkpoint"'):
        raise _fewer(name, number - 2, size, number)
    try:
        dsse.parse(line)
    except ProtocolError as error:
        what = error.what.removeprefix(f"{error.reason}: ")
        raise ProtocolError(
            "not_canonical", f"{name} line {number} (entry {number - 2}): {what}", fix="get the file again"
        ) from None
    return line


def _read_checkpoint(name: str, number: int, line: bytes) -> str:
    found = _json(line)
    try:
        note = found["checkpoint"]
        if not isinstance(note, str) or _checkpoint(note) != line + b"\n":
            raise ValueError("not canonical")
    except (ValueError, LookupError, TypeError):
        raise ProtocolError(
            "not_canonical",
            f"{name} line {number}: expected a checkpoint in canonical form, after as many entries as line 1 says",
            fix="get the file again",
        ) from None
    try:
        notes.read(notes.parse(note).body)
    except ProtocolError as error:
        what = error.what.removeprefix(f"{error.reason}: ")
        raise ProtocolError("bad_checkpoint", f"{name} line {number}: {what}", fix="get the file again") from None
    return note


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _fewer(name: str, there: int, size: int, number: int) -> ProtocolError:
    return ProtocolError(
        "truncated_log", f"{name} line {number}: {there} entries, line 1 says {size}", fix="get the whole file"
    )


# --- what it shows ---------------------------------------------------------------------------------------------------


def structure(
    export: Export,
    operator: Verifier | Callable[[int], Verifier],
    witnesses: Callable[[int], Sequence[Verifier]],
    needed: Callable[[int], int],
    keys: Mapping[str, bytes] | None = None,
) -> tuple[Finding, ...]:
    """Checks that an export is one log that its operator signed and its members cosigned.

    Args:
        operator: who signs checkpoints; by size, where the key was replaced on the way.
        witnesses: by size of a checkpoint: who may have cosigned it. A signature of anybody else is a finding, in this file.
        needed: by size: how many must have.
        keys: key id -> raw public key. If given, every signature of every entry is verified too, which finds the very entry
            that was changed; the tree alone tells between which checkpoints it is.

    Returns:
        All findings in the order of lines; nothing if the file is what was signed. Reasons: bad_signature, unknown_signer,
        no_quorum, shared_key, foreign_bundle, truncated_log, forked_log, clock_backwards, evidence_missing.
    """
    findings = list(_wrong_signatures(export, keys)) if keys is not None else []
    good: list[tuple[int, notes.Checkpoint]] = []
    for number, note in enumerate(export.checkpoints, start=len(export.entries) + 2):
        place = f"{export.name} line {number}"
        try:
            found, wrong = _verified(note, operator, witnesses, needed)
        except ProtocolError as error:
            findings.append(Finding(place, error.what.removeprefix(f"{error.reason}: "), error.reason))
            continue
        findings += [Finding(place, what, reason) for what, reason in wrong]
        if found.origin != export.origin:
            what = f"says {export.origin}, the checkpoint on line {number} is signed for {found.origin}"
            findings.append(Finding(f"{export.name} line 1", what, "foreign_bundle"))
            continue
        if good and found.size <= good[-1][1].size:
            what = f"a checkpoint of {found.size} entries after one of {good[-1][1].size}"
            findings.append(Finding(place, what, "bad_checkpoint"))
        good.append((number, found))
    findings += _wrong_roots(export, good)
    findings += _clocks(export, good)
    covered = max((c.size for _, c in good), default=0)
    if covered < len(export.entries):
        what = f"no valid checkpoint covers entries {covered} to {len(export.entries) - 1}"
        findings.append(Finding(f"{export.name} from line {export.line_of(covered)}", what, "evidence_missing"))
    return tuple(findings)


def _verified(
    note: str,
    operator: Verifier | Callable[[int], Verifier],
    witnesses: Callable[[int], Sequence[Verifier]],
    needed: Callable[[int], int],
) -> tuple[notes.Checkpoint, list[tuple[str, str]]]:
    taken = notes.parse(note)
    _, size, _ = notes.read(taken.body)
    signer = operator if isinstance(operator, Verifier) else operator(size)
    members = witnesses(size)
    found = notes.verify(note, signer, members, needed(size))
    # Elsewhere such lines are ignored. Here one would be a line nobody checks, in which bits could change unseen.
    unknown = notes.strangers(taken, signer, members)
    return found, [(f"a signature by a key of {name} that is none of this checkpoint's", "unknown_signer") for name in unknown]


def _wrong_signatures(export: Export, keys: Mapping[str, bytes]) -> Iterator[Finding]:
    for index, data in enumerate(export.entries):
        try:
            envelope = dsse.parse(data)
            for keyid in envelope.signers:
                if keyid not in keys:
                    yield Finding(export.place(index), f"signed by key {keyid}, which nobody here has", "unknown_signer")
                else:
                    dsse.verify(envelope, keyid, keys[keyid])
        except ProtocolError as error:
            yield Finding(export.place(index), error.what.removeprefix(f"{error.reason}: "), error.reason)


def _wrong_roots(export: Export, good: Sequence[tuple[int, notes.Checkpoint]]) -> Iterator[Finding]:
    """Names the first checkpoint whose root the entries do not give, and how many others there are."""
    edge, agreed = merkle.Frontier(), 0
    failed: list[tuple[int, int]] = []
    for number, found in sorted(good, key=lambda pair: pair[1].size):
        if found.size > len(export.entries):
            what = f"a checkpoint of {found.size} entries was signed, {len(export.entries)} are here"
            yield Finding(f"{export.name} line {number}", what, "truncated_log")
            continue
        edge.extend(hashlib.sha256(b"\x00" + data).digest() for data in export.entries[edge.size : found.size])
        if edge.root() == found.root:
            agreed = found.size if not failed else agreed
        else:
            failed.append((number, found.size))
    if failed:
        number, size = failed[0]
        where = f"entries {agreed} to {size - 1} (lines {export.line_of(agreed)} to {export.line_of(size - 1)})"
        what = f"the checkpoint of {size} entries is not of these: what was signed differs in {where}"
        if len(failed) > 1:
            what += f"; {len(failed) - 1} later checkpoints fail too"
        yield Finding(f"{export.name} line {number}", what, "forked_log")


def _clocks(export: Export, good: Sequence[tuple[int, notes.Checkpoint]]) -> Iterator[Finding]:
    latest: dict[str, int] = {}
    for number, found in good:
        for name, time in found.cosigners.items():
            if time < latest.get(name, time):
                what = f"{name} cosigned at {time}, and a smaller checkpoint later, at {latest[name]}"
                yield Finding(f"{export.name} line {number}", what, "clock_backwards")
            latest[name] = max(time, latest.get(name, time))
