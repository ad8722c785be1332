"""File drop: rounds with a site that has no way in or out but a person who carries signed files.

Knows: the format of such a file, who must have signed it, which request an answer belongs to, how long a person may take.
Refuses to know: what a request asks and what an answer says (they are bytes, the same as on every other way), how a site makes
its answer (a function that is passed in), and the coordinator's reasons.

A file is readable with ``head -n 2``: a first line, a header as one line of canonical JSON, the signature, then the sender's
certificate, of a request the consortium file, and the message. The signature covers the first line and the header; the header
has the digest and the length of everything below it, so no byte of a file can be changed, added or left out unnoticed.

What identifies a request is what it asks (consortium, party, run, consortium file, message), not when it was written or signed: a
coordinator that is started again asks the same, and the answers that were brought in meanwhile count at once.

References:
    RFC 8785, JSON Canonicalization Scheme. RFC 8017, section 8.1 (RSASSA-PSS).
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from fedmat import credentials, files
from fedmat._version import __version__
from fedmat.config import SLUG
from fedmat.credentials import Credential
from fedmat.domain import Dropout
from fedmat.errors import ProtocolError, StateError
from fedmat.federation.coordinator import NONCE
from fedmat.federation.engine import Engine, Failure, frame, unframe

__all__ = [
    "DEADLINE_S", "DropEngine", "DropFile", "Header", "ImportedAnswer", "Split", "Waiting", "export_requests", "import_answer",
    "read", "run_name", "run_request",
]  # fmt: skip

Kind = Literal["request", "answer"]
Answering = Callable[[bytes, bytes, Mapping[str, str]], bytes | Failure]

SCHEMA = "fedmat/drop/1"
OUT, IN, LOCK = "out", "in", "coordinator.lock"  # in the operator's drop folder
ANSWERS = Path("drop/answers")  # in a party's folder: what it answered, by the digest of the request
DEADLINE_S = 7 * 24 * 3600.0  # a person has a weekend
POLL_S = 2.0
MOST_BYTES = 1 << 30  # of a file; read no further, whoever sent it
_MOST_LINE = 1 << 16
_FIRST = b"fedmat drop file\n"
_CLOCKS = timedelta(days=1)  # a file made later than this from now is not believed
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_NAME = re.compile(r"(?P<party>[a-z][a-z0-9_-]*)-(?P<number>\d{1,9})-(?P<begins>[0-9a-f]{12})\.(?P<kind>request|answer)")
_DIGEST = r"[0-9a-f]{64}"
_TEXT = {
    "kind": "|".join(get_args(Kind)),
    "consortium": SLUG,
    "party": SLUG,  # a party's name becomes part of a path
    "run": r"[0-9a-f]{32}",
    "request": _DIGEST,
    "made": r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z",
    "consortium_sha256": _DIGEST,
    "payload_sha256": _DIGEST,
    "certificate_sha256": _DIGEST,
}
_COUNTS = {"number": 10**9 - 1, "certificate_bytes": 1 << 16, "consortium_bytes": 1 << 24, "payload_bytes": MOST_BYTES}
_VERSION = re.compile(r"[0-9A-Za-z.+_-]{1,64}")
_BRING_AGAIN = "ask its sender for the file again, unchanged"


# --- one file ----------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What identifies a request, and what its answer repeats.

    Attributes:
        run: random name of the run, so that nothing of another run counts.
        consortium_sha256: of the bytes of the consortium file that the coordinator runs.
        request: digest of all of this and of what is asked (:func:`request_digest`).
    """

    consortium: str
    party: str
    run: str
    consortium_sha256: str
    request: str


@dataclass(frozen=True)
class Header:
    """What a file says about itself.

    Attributes:
        party: whom a request is for, or whose answer it is.
        run, consortium_sha256, request: see :class:`Asked`; an answer repeats those of the request it answers.
        number: of the request, among this party's; for people.
        made: when the file was made, UTC, as its sender's clock had it.
        versions: what a coordinator runs (``fedmat``, ``contract``); a party of another release refuses.
    """

    kind: Kind
    consortium: str
    party: str
    run: str
    number: int
    request: str
    made: str
    consortium_sha256: str
    payload_sha256: str
    certificate_sha256: str
    certificate_bytes: int
    consortium_bytes: int
    payload_bytes: int
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def line(self) -> bytes:
        """The header as it is in the file, without the end of the line."""
        return files.canonical_json({"schema": SCHEMA, **dataclasses.asdict(self)})

    @property
    def time(self) -> datetime:
        """When the file was made."""
        return datetime.strptime(self.made, _TIME).replace(tzinfo=UTC)

    @property
    def asked(self) -> Asked:
        """What an answer has in common with its request."""
        return Asked(self.consortium, self.party, self.run, self.consortium_sha256, self.request)


@dataclass(frozen=True)
class DropFile:
    """A whole file: a header, its signature, and what the header has the digests of.

    Attributes:
        certificate: the sender's, PEM.
        consortium: of a request, the consortium file's bytes; else empty.
        payload: an encoded request, or a framed reply.
    """

    header: Header
    signature: bytes
    certificate: bytes
    consortium: bytes = field(repr=False)
    payload: bytes = field(repr=False)

    @property
    def name(self) -> str:
        """The file's name: who, the how manieth, which."""
        h = self.header
        return f"{h.party}-{h.number}-{h.request[:12]}.{h.kind}"

    @property
    def data(self) -> bytes:
        """The file's bytes."""
        return self.signed + self.signature.hex().encode() + b"\n" + self.certificate + self.consortium + self.payload

    @property
    def signed(self) -> bytes:
        """What the signature is over."""
        return _FIRST + self.header.line + b"\n"

    @property
    def reply(self) -> bytes | Failure:
        """Of an answer, what the party replied."""
        return unframe(self.header.party, self.payload)

    def check(self, root: bytes, *, name: str, now: datetime, revoked: Collection[str] = ()) -> None:
        """Checks that ``name``, by a certificate of ``root``, signed this file, and not in some future.

        Raises:
            ProtocolError: see :func:`fedmat.credentials.verify`; bad_time.
        """
        credentials.verify(self.signed, self.signature, self.certificate, root, name=name, now=now, revoked=revoked)
        if self.header.time > now + _CLOCKS:
            raise ProtocolError(
                "bad_time",
                f"{self.name} was made on {self.header.made}, and this machine's clock says {now.astimezone(UTC):{_TIME}}",
                fix="set the clock that is wrong; if it is the sender's, ask for the file again",
            )


def request_digest(consortium: str, party: str, run: str, consortium_sha256: str, payload_sha256: str) -> str:
    """Returns the SHA-256 that identifies a request, whenever and however often it is written and signed."""
    return files.sha256(
        files.canonical_json({
            "consortium": consortium, "party": party, "run": run, "consortium_sha256": consortium_sha256,
            "payload_sha256": payload_sha256,
        })
    )  # fmt: skip


def read(path: Path) -> DropFile:
    """Reads a file and compares it with the digests and lengths in its header; who signed it is :meth:`DropFile.check`'s.

    Raises:
        StateError: it is missing or cannot be read.
        ProtocolError: malformed, wrong_version, oversize, truncated, bad_digest.
    """
    with _told(path, "read"):
        if not path.is_file():
            raise StateError(f"{path}: no such file", fix="name a file that was carried here")
        with path.open("rb") as handle:
            data = handle.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ProtocolError("oversize", f"{path} has more than {MOST_BYTES} bytes", fix="it is no file of fedmat; remove it")
    if not data.startswith(_FIRST):
        raise _malformed(path, "it does not begin as a drop file does")
    line, rest = _line(path, data, len(_FIRST))
    header = _header(path, line)
    signature, rest = _line(path, data, rest)
    pieces: list[bytes] = []
    for size in (header.certificate_bytes, header.consortium_bytes, header.payload_bytes):
        pieces.append(data[rest : rest + size])
        rest += size
    if rest > len(data):
        raise ProtocolError("truncated", f"{path} ends before its {rest} bytes", fix="copy it again, whole")
    if rest < len(data):
        raise _malformed(path, f"it goes on after its {rest} bytes")
    certificate, consortium, payload = pieces
    found = DropFile(header, _unhex(path, signature), certificate, consortium, payload)
    stated = [header.certificate_sha256, header.payload_sha256]
    actual = [files.sha256(certificate), files.sha256(payload)]
    if header.kind == "request":
        h = header
        stated += [h.consortium_sha256, h.request]
        actual += [files.sha256(consortium)]
        actual += [request_digest(h.consortium, h.party, h.run, h.consortium_sha256, h.payload_sha256)]
    elif consortium:
        raise _malformed(path, "an answer carries no consortium file")
    if stated != actual:
        raise ProtocolError("bad_digest", f"{path}: what it holds is not what its header says", fix=_BRING_AGAIN)
    return found


def _signed(header: dict[str, Any], consortium: bytes, payload: bytes, credential: Credential, now: datetime) -> DropFile:
    """Returns a file made and signed now."""
    certificate = credential.certificate
    whole = Header(
        **header,
        made=now.astimezone(UTC).strftime(_TIME),
        payload_sha256=files.sha256(payload),
        certificate_sha256=files.sha256(certificate),
        certificate_bytes=len(certificate),
        consortium_bytes=len(consortium),
        payload_bytes=len(payload),
    )
    unsigned = DropFile(whole, b"", certificate, consortium, payload)
    made = dataclasses.replace(unsigned, signature=credential.sign(unsigned.signed))
    if len(made.data) > MOST_BYTES:  # refused here, not where somebody has carried it to
        raise ProtocolError("oversize", f"{made.name} would have more than {MOST_BYTES} bytes", fix="use a smaller model")
    return made


def _answer_to(asked: Header, payload: bytes, credential: Credential, now: datetime) -> DropFile:
    header = {"kind": "answer", "number": asked.number, **asked.asked._asdict()}
    return _signed(header, b"", payload, credential, now)


def _line(path: Path, data: bytes, start: int) -> tuple[bytes, int]:
    """Returns the line that begins at ``start``, and where the next one begins."""
    end = data.find(b"\n", start, start + _MOST_LINE)
    if end < 0:
        if len(data) < start + _MOST_LINE:
            raise ProtocolError("truncated", f"{path} ends within its header", fix="copy it again, whole")
        raise _malformed(path, "its header is too long")
    return data[start:end], end + 1


def _header(path: Path, line: bytes) -> Header:
    try:
        raw = json.loads(line)
        canonical = isinstance(raw, dict) and files.canonical_json(raw) == line
    except (ValueError, RecursionError):
        raise _malformed(path, "its header is not JSON") from None
    if not canonical:  # one header, one line of bytes: else two readers might see two headers
        raise _malformed(path, "its header is not canonical")
    schema = raw.pop("schema", None)
    if schema != SCHEMA:
        raise ProtocolError(
            "wrong_version",
            f"{path}: a drop file of another version, expected {SCHEMA}",
            fix="install one release on both sides",
        )
    if set(raw) != {f.name for f in dataclasses.fields(Header)}:
        raise _malformed(path, "its header has other fields than it should")
    wrong = [k for k, pattern in _TEXT.items() if not isinstance(raw[k], str) or not re.fullmatch(pattern, raw[k])]
    wrong += [k for k, most in _COUNTS.items() if type(raw[k]) is not int or not 0 <= raw[k] <= most]
    wrong += [] if _versions(raw["versions"]) else ["versions"]
    if not wrong:
        found = Header(**raw)
        with suppress(ValueError):  # of a day that no month has
            if found.time:
                return found
        wrong.append("made")
    raise _malformed(path, f"its header's {wrong[0]} is not of the right form")


def _versions(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return all(isinstance(text, str) and _VERSION.fullmatch(text) for pair in value.items() for text in pair)


def _unhex(path: Path, line: bytes) -> bytes:
    if not re.fullmatch(rb"(?:[0-9a-f]{2})+", line):
        raise _malformed(path, "its third line is no signature")
    return bytes.fromhex(line.decode())


def _malformed(path: Path, why: str) -> ProtocolError:
    return ProtocolError("malformed", f"{path} is not a file that fedmat wrote: {why}", fix=_BRING_AGAIN)


# --- the coordinator's side --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Waiting:
    """A request that somebody has to carry.

    Attributes:
        until: when the coordinator stops waiting for the answer.
    """

    party: str
    path: Path
    until: datetime


class DropEngine(Engine):
    """Writes requests into a folder and waits until their answers have been imported.

    A party has one request at a time: a new one replaces what it did not answer. What was imported stays, so that a coordinator
    which is stopped and started again goes on where it was. One coordinator uses a folder at a time.

    Args:
        folder: the operator's drop folder, with ``out/`` and ``in/``.
        parties: whom files are carried to; any other is unreachable.
        consortium: the consortium's name.
        consortium_file: the bytes of the consortium file that is run.
        run_folder: the folder of the run, or of the order for it; names it (:func:`run_name`), so that a run which is started
            afresh counts no old answer.
        credential: the server's, which signs the requests.
        root: the consortium's root certificate, PEM.
        now: the clock, UTC; asked again and again, since a wait takes days.
        versions: what this coordinator runs, for parties that check it.
        deadline_s: how long a person may take, in seconds from when the request was first written; the plan's own deadline is
            for machines.
        check: called at every look into the folder; what it raises ends the wait.
        on_wait: called with the requests that wait, whenever they have changed; within a :class:`Split`, in another thread.

    Raises:
        StateError: the folder cannot be written, or another coordinator uses it.
    """

    def __init__(
        self,
        folder: Path,
        parties: Collection[str],
        *,
        consortium: str,
        consortium_file: bytes,
        run_folder: Path,
        credential: Credential,
        root: bytes,
        now: Callable[[], datetime],
        versions: Mapping[str, str] | None = None,
        deadline_s: float = DEADLINE_S,
        poll_s: float = POLL_S,
        check: Callable[[], None] = lambda: None,
        on_wait: Callable[[Sequence[Waiting]], None] | None = None,
    ) -> None:
        self._folder, self._parties = folder, frozenset(parties)
        self._consortium, self._consortium_file, self._run_folder = consortium, consortium_file, run_folder
        self._credential, self._root, self._now = credential, root, now
        self._versions = {"fedmat": __version__} if versions is None else dict(versions)
        self._deadline, self._poll = timedelta(seconds=deadline_s), poll_s
        self._check, self._on_wait = check, on_wait or (lambda _: None)
        self._closed = threading.Event()
        with _told(folder, "write"):
            for name in (OUT, IN):
                (folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                raise StateError(f"{folder}: another coordinator is using it", fix="stop that one first") from None

    def exchange(self, data: Mapping[str, bytes], deadline_s: float) -> Sequence[tuple[bytes | Failure, float]]:
        """See :class:`Engine`; an answer that was there before it was asked for took no time. The plan's deadline is not used.

        Raises:
            StateError: a request cannot be written, or a file in ``in/`` is damaged or was not imported.
        """
        started = time.perf_counter()
        replies: dict[str, tuple[bytes | Failure, float]] = {}
        waiting: dict[str, tuple[Header, Path]] = {}
        run = run_name(self._run_folder)
        for party, request in data.items():
            if party not in self._parties:
                replies[party] = Dropout(party, "unreachable", "no files are carried to it"), 0.0
                continue
            asked = self._asked(run, party, request)
            reply = self._imported(asked)
            if reply is None:
                waiting[party] = self._ask(asked, request)
            else:
                replies[party] = reply, 0.0
        told: list[Waiting] = []
        while waiting:
            self._check()
            late = self._now() - self._deadline
            for party, (made, path) in list(waiting.items()):
                reply = self._imported(made.asked)
                if reply is None and made.time > late:
                    continue
                if reply is None:
                    reply = Dropout(
                        party, "late", f"no answer to {path.name} within {self._deadline}; import it, or allow more time"
                    )
                replies[party] = reply, time.perf_counter() - started
                del waiting[party]
            still = [Waiting(party, path, made.time + self._deadline) for party, (made, path) in waiting.items()]
            if still and still != told:
                self._on_wait(still)
                told = still
            if waiting and self._closed.wait(self._poll):
                seconds = time.perf_counter() - started
                replies |= {p: (Dropout(p, "unreachable", "the coordinator was stopped"), seconds) for p in waiting}
                break
        return [replies[party] for party in data]

    def close(self) -> None:
        """Ends a wait that is going on, and lets another coordinator use the folder. What was imported stays."""
        if not self._closed.is_set():
            self._closed.set()
            os.close(self._lock)

    def _asked(self, run: str, party: str, request: bytes) -> Asked:
        ours = (self._consortium, party, run, files.sha256(self._consortium_file))
        return Asked(*ours, request_digest(*ours, files.sha256(request)))

    def _ask(self, asked: Asked, request: bytes) -> tuple[Header, Path]:
        """Writes a request, unless it is there, and removes what the party did not answer before."""
        there = _find(self._folder / OUT, "request", asked)
        if there is not None:
            with _ours(there):
                found = read(there)
            ours = (self._credential.certificate, self._versions)
            if found.header.asked == asked and (found.certificate, found.header.versions) == ours:
                return found.header, there
        header = {"kind": "request", "number": 1 + self._highest(asked.party), "versions": self._versions}
        made = _signed(header | asked._asdict(), self._consortium_file, request, self._credential, self._now())
        path = self._folder / OUT / made.name
        _write(path, made.data, private=True)
        for other in _listed(self._folder / OUT, "request", asked.party):
            if other != path:
                _remove(other)
        return made.header, path

    def _imported(self, asked: Asked) -> bytes | Failure | None:
        """Returns the reply that was imported for a request; None if there is none yet.

        An answered request is removed; one that failed stays, so that the party can mend what is wrong and run it again.
        """
        path = _find(self._folder / IN, "answer", asked)
        if path is None:
            return None
        with _ours(path):
            found = read(path)
            # Whether its certificate counted on the day of the import was checked on that day; it may have ended since.
            day = credentials.facts(found.certificate).not_before
            credentials.verify(found.signed, found.signature, found.certificate, self._root, name=asked.party, now=day)
            if found.header.kind != "answer" or found.header.asked != asked:
                raise ProtocolError("wrong_request", "it answers another request")
        if isinstance(found.reply, bytes):
            _remove(_find(self._folder / OUT, "request", asked))
        return found.reply

    def _highest(self, party: str) -> int:
        """Returns the number of the party's last request, 0 if there was none."""
        there = [*_listed(self._folder / OUT, "request", party), *_listed(self._folder / IN, "answer", party)]
        return max((int(_parts(p)["number"]) for p in there), default=0)


class Split(Engine):
    """Asks some parties by one engine and the rest by another, side by side.

    Args:
        carried: the engine whose answers may take days; it works in a thread of its own.
        parties: whom it asks.
        others: the engine for everyone else; it works where this one is called.
    """

    side_by_side = True

    def __init__(self, carried: Engine, parties: Collection[str], others: Engine) -> None:
        self._carried, self._parties, self._others = carried, frozenset(parties), others

    def exchange(self, data: Mapping[str, bytes], deadline_s: float) -> Sequence[tuple[bytes | Failure, float]]:
        """See :class:`Engine`. If one half raises, or the process is interrupted, the wait of the other ends too."""
        halves = [{p: r for p, r in data.items() if (p in self._parties) is carried} for carried in (True, False)]
        if not halves[0]:
            return self._others.exchange(data, deadline_s)
        if not halves[1]:
            return self._carried.exchange(data, deadline_s)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="fedmat-drop") as pool:
            job = pool.submit(self._carried.exchange, halves[0], deadline_s)
            try:
                direct = self._others.exchange(halves[1], deadline_s)
                found = dict(zip(halves[1], direct, strict=True)) | dict(zip(halves[0], job.result(), strict=True))
            except BaseException:
                self._carried.close()  # else leaving the pool would wait for a person
                raise
        return [found[party] for party in data]

    def close(self) -> None:
        """Closes both engines."""
        try:
            self._carried.close()
        finally:
            self._others.close()


def run_name(run_folder: Path) -> str:
    """Returns the random name of the run in a folder, the one its coordinator binds encrypted rounds to; makes it on first use.

    Raises:
        StateError: the file that holds it is damaged.
    """
    path = run_folder / NONCE
    if not path.exists():
        _write(path, files.json_bytes({"run": os.urandom(16).hex()}))
    found = files.read_json(path)
    name = found.get("run") if isinstance(found, dict) else None
    if not isinstance(name, str) or not re.fullmatch(_TEXT["run"], name):
        raise StateError(f"{path}: damaged", fix="restore it, or start afresh with --fresh")
    return name


# --- the operator's side -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImportedAnswer:
    """An answer that was taken in.

    Attributes:
        path: where it lies now.
        request: digest of the request it answers.
        failure: why the party gave no answer, if it gave none.
        again: the same answer had been imported before; nothing was changed.
    """

    party: str
    path: Path
    request: str
    failure: Failure | None
    again: bool


def export_requests(folder: Path, destination: Path, party: str | None = None) -> list[Path]:
    """Copies requests that wait for an answer to where a person takes them from; returns the copies.

    Args:
        folder: the operator's drop folder.
        party: only this party's.

    Raises:
        StateError: a file cannot be read or written, or is damaged; there is no such folder to copy to.
    """
    copies: list[Path] = []
    _there(destination)
    for path in sorted(_listed(folder / OUT, "request", party)):
        with _ours(path):
            data = read(path).data
        _write(destination / path.name, data)
        copies.append(destination / path.name)
    return copies


def import_answer(file: Path, folder: Path, root: bytes, revoked: Collection[str], now: datetime) -> ImportedAnswer:
    """Takes in an answer that a person has brought, if its party signed it and it answers a request that was asked.

    A party that failed may bring an answer later, when it has mended what was wrong; an answer is never replaced.

    Args:
        folder: the operator's drop folder.
        root: the consortium's root certificate, PEM.
        revoked: serial numbers of revoked certificates.

    Raises:
        StateError: a file cannot be read or written.
        ProtocolError: as in :func:`read` and :meth:`DropFile.check`; wrong_kind; stale_answer: nobody waits for it, e.g. because
            it answers yesterday's request; wrong_request; second_answer. Nothing was changed.
    """
    found = read(file)
    header = found.header
    if header.kind != "answer":
        raise ProtocolError("wrong_kind", f"{file} is a request, expected an answer", fix="run it at its site first")
    found.check(root, name=header.party, now=now, revoked=revoked)
    before, pending = _find(folder / IN, "answer", header.asked), _find(folder / OUT, "request", header.asked)
    asked = before or pending
    others = [p.name for p in _listed(folder / OUT, "request", header.party)]
    if asked is None or (pending is None and others):  # also what was imported in its day
        raise ProtocolError(
            "stale_answer", f"{file} answers a request to {header.party} that nobody waits for, or no longer",
            fix=f"bring the answer to {' or '.join(others)}" if others else "none is needed until the coordinator asks again",
        )  # fmt: skip
    with _ours(asked):
        there = read(asked)
    if there.header.asked != header.asked:
        raise ProtocolError("wrong_request", f"{file} says other things of its request than were asked", fix=_BRING_AGAIN)
    failure = None if isinstance(found.reply, bytes) else found.reply
    path = folder / IN / f"{asked.stem}.answer"  # the number in it is the operator's
    again = before is not None and there.payload == found.payload
    if before is not None and not again and isinstance(there.reply, bytes):
        raise ProtocolError(
            "second_answer", f"{header.party} answered this request before, and otherwise; the first answer stays",
            fix="ask the site which one it stands by; a run that is started afresh asks again",
        )  # fmt: skip
    if not again:
        _write(path, found.data, private=True)
    if failure is None:
        _remove(pending)
    return ImportedAnswer(header.party, path, header.request, failure, again)


# --- the site's side ---------------------------------------------------------------------------------------------


def run_request(file: Path, home: Path, answer: Answering, *, now: datetime, to: Path | None = None) -> Path:
    """Answers a request that a person has brought, and writes the signed answer for the way back.

    A request that was answered before gets the same file, without any work. A failure is written too, so that the coordinator can
    hear of it, but not kept: once what is wrong is mended, the same request can be run again.

    Args:
        home: the party's folder.
        answer: makes the reply from the consortium file's bytes, the encoded request and the versions the coordinator runs.
        to: folder to write to; by default, the request's.

    Raises:
        StateError: the party's folder is not in order, or a file cannot be read or written.
        ProtocolError: as in :func:`read` and :meth:`DropFile.check` (the server must have signed it); wrong_kind,
            wrong_consortium, wrong_party. Nothing was run.
    """
    found = read(file)
    header = found.header
    if to is not None:
        _there(to)  # before any work
    if header.kind != "request":
        raise ProtocolError("wrong_kind", f"{file} is an answer, expected a request", fix="carry it to the operator")
    party, consortium, host = _party(home)
    startup = home / "flare" / "startup"
    credential = credentials.load(startup / "client.crt", startup / "client.key")
    if credential.name != party:
        raise StateError(f"{startup}: the certificate is of {credential.name}, not of {party}", fix="join again with the kit")
    with _told(startup / "rootCA.pem", "read"):
        root = (startup / "rootCA.pem").read_bytes()
    found.check(root, name=host, now=now)
    for what, stated, ours in (("consortium", header.consortium, consortium), ("party", header.party, party)):
        if stated != ours:
            raise ProtocolError(
                f"wrong_{what}", f"{file} is for the {what} {stated}, and {home} is the folder of {ours}",
                fix="run it where it belongs, or name the right folder with --home",
            )  # fmt: skip
    made = _answered(home, found, credential, answer, now)
    path = (to or file.parent) / made.name
    _write(path, made.data)
    return path


def _answered(home: Path, request: DropFile, credential: Credential, answer: Answering, now: datetime) -> DropFile:
    """Returns the answer this party gave before, else a new one, kept before it goes anywhere."""
    header = request.header
    kept = home / ANSWERS / f"{header.request}.answer"
    if kept.exists():
        with _ours(kept):
            made = read(kept)
            if made.header.kind != "answer" or made.header.asked != header.asked:
                raise ProtocolError("wrong_request", "it answers another request")
        if made.certificate == credential.certificate:
            return made
        made = _answer_to(header, made.payload, credential, now)  # the certificate was renewed since
        _write(kept, made.data, private=True)
        return made
    reply = answer(request.consortium, request.payload, header.versions)
    made = _answer_to(header, frame(reply), credential, now)
    if isinstance(reply, bytes):
        _write(kept, made.data, private=True)
    return made


def _party(home: Path) -> tuple[str, str, str]:
    """Returns the party's name, its consortium's, and the server's, as the party's folder has them."""
    path = home / "party.json"
    if not path.is_file():
        raise StateError(f"{home}: is not a party's folder (party.json is missing)", fix="name it with --home")
    found = files.read_json(path)
    try:
        return str(found["party"]), str(found["consortium"]), str(found["host"])
    except (KeyError, TypeError):
        raise StateError(f"{path}: damaged", fix="restore it, or join again with the kit") from None


# --- files and folders -------------------------------------------------------------------------------------------


def _parts(path: Path) -> dict[str, str]:
    """Returns what a file's name says; empty for any other file."""
    found = _NAME.fullmatch(path.name)
    return found.groupdict() if found else {}


def _listed(folder: Path, kind: Kind, party: str | None = None) -> list[Path]:
    """Returns the files of a kind, of one party or of all."""
    if not folder.is_dir():
        return []
    parts = {path: _parts(path) for path in folder.iterdir()}
    return [p for p, said in parts.items() if said.get("kind") == kind and party in (None, said["party"])]


def _find(folder: Path, kind: Kind, asked: Asked) -> Path | None:
    """Returns the file of a request, or of its answer; whoever opens it compares the whole digest."""
    return next((p for p in _listed(folder, kind, asked.party) if _parts(p)["begins"] == asked.request[:12]), None)


@contextmanager
def _ours(path: Path) -> Iterator[None]:
    """A file in one's own folder that is not right is damaged state, not somebody's misbehaviour."""
    try:
        yield
    except ProtocolError as error:
        raise StateError(
            f"{path}: damaged, or not put there by fedmat ({error.reason})",
            fix="remove it; an answer comes in with fedmat site import-update, a request is written again by the coordinator",
        ) from None


def _there(folder: Path) -> None:
    if not folder.is_dir():  # made on the fly, a mistyped stick would swallow the file
        raise StateError(f"{folder}: no such folder, and nothing was written", fix="name an existing one with --to")


def _remove(path: Path | None) -> None:
    if path is not None:
        with _told(path, "remove"):
            path.unlink(missing_ok=True)


def _write(path: Path, data: bytes, *, private: bool = False) -> None:
    with _told(path, "write"):
        files.write_atomic(path, data, private=private)


@contextmanager
def _told(path: Path, verb: str) -> Iterator[None]:
    """A disk that is full, read-only or gone is told plainly."""
    try:
        yield
    except OSError as error:
        raise StateError(
            f"{path}: cannot {verb} it ({error.strerror or type(error).__name__})",
            fix="make room there, see to it that this user may use the folder, or name another one",
        ) from None
