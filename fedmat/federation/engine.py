"""Engines deliver requests to sites and bring answers back; they decide nothing.

Knows: bytes, deadlines, processes. Refuses to know: what a good update is (the coordinator) and what a record is.
A site that is late, crashes or answers nonsense is a value in the delivery, never an exception.
"""

from __future__ import annotations

import abc
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, Literal

from fedmat import envelopes, files, wire
from fedmat.domain import (
    Answer,
    Attestation,
    AttestRequest,
    Baseline,
    BaselineRequest,
    CalibrateRequest,
    Calibration,
    Delivery,
    Dropout,
    EvaluateRequest,
    Evaluation,
    MatchRequest,
    MomentsRequest,
    NeedModel,
    Offer,
    Ranks,
    RanksRequest,
    ReferenceRequest,
    Rejection,
    Removed,
    RemoveRequest,
    Request,
    Sealed,
    Statements,
    StatementsRequest,
    Statistics,
    StatisticsRequest,
    TrainRequest,
    Update,
)
from fedmat.errors import FedmatError, PolicyRefused, WireError

Handler = Callable[[bytes], bytes]
Failure = Dropout | Rejection
ANSWERED = b"\x01"  # first byte of a framed answer; of a framed failure it is zero
_START_UP_S = 300.0  # imports and features of a site's own process; not counted against its deadline
_EXPECTED: dict[type, Any] = {
    MatchRequest: Offer,
    RemoveRequest: Removed,
    AttestRequest: Attestation,
    StatisticsRequest: Statistics,
    RanksRequest: Ranks,
    TrainRequest: Update | Sealed | NeedModel,
    BaselineRequest: Baseline,
    EvaluateRequest: Evaluation,
    CalibrateRequest: Calibration,
    MomentsRequest: envelopes.SealedMoments,
    StatementsRequest: Statements,
    ReferenceRequest: envelopes.PublicMap,
    **{
        getattr(envelopes, f"{asked}Request"): getattr(envelopes, given)
        for asked, given in {
            "Header": "HeaderSignature", "Deposit": "Deposit", "Commit": "Commitment", "Share": "Share", "Open": "Opening",
            "Confirm": "Confirmation", "Blame": "Projections", "Audit": "AuditVote", "MaskKeys": "MaskKeys",
            "MaskShares": "MaskShares", "Arrived": "ArrivedSignature", "Unmask": "Unmasked", "Witness": "SumWitness", "KeyHolder": "KeyHolderContext", "Decrypt": "Decrypted",
            "Settle": "Settlement",
        }.items()
    },
}  # fmt: skip


class Engine(abc.ABC):
    """The one port between the coordinator and the sites.

    Attributes:
        side_by_side: sites work at the same time, so that a request takes as long as its slowest site.
    """

    side_by_side: bool = False

    def broadcast(self, request: Request, sites: Sequence[str], deadline_s: float) -> Sequence[Delivery]:
        """Sends ``request`` to ``sites`` and returns one delivery per site, in the order of ``sites``."""
        return self.scatter(dict.fromkeys(sites, request), deadline_s)

    def scatter(self, requests: Mapping[str, Request], deadline_s: float) -> Sequence[Delivery]:
        """Sends each site its own request and returns one delivery per site, in the order of ``requests``."""
        encoded: dict[int, bytes] = {}
        for request in requests.values():
            if id(request) not in encoded:
                encoded[id(request)] = wire.encode(request)
        data = {site: encoded[id(request)] for site, request in requests.items()}
        replies = self.exchange(data, deadline_s)
        return [
            _delivery(site, data[site], reply, seconds, _EXPECTED[type(requests[site])])
            for site, (reply, seconds) in zip(requests, replies, strict=True)
        ]

    @abc.abstractmethod
    def exchange(self, data: Mapping[str, bytes], deadline_s: float) -> Sequence[tuple[bytes | Failure, float]]:
        """Sends bytes to sites; returns each site's bytes, or the failure, and the seconds it took."""

    def close(self) -> None:  # noqa: B027  most engines hold nothing
        """Gives back what the engine holds; a closed engine is not used again."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class InProcessEngine(Engine):
    """Calls every site's handler in this process, one after another; each site's deadline runs on its own."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = dict(handlers)

    def exchange(self, data: Mapping[str, bytes], deadline_s: float) -> Sequence[tuple[bytes | Failure, float]]:
        """See :class:`Engine`. A handler that overruns is cut only by process isolation; here its answer is left out."""
        out: list[tuple[bytes | Failure, float]] = []
        for site, request in data.items():
            started = time.perf_counter()
            try:
                handler = self._handlers[site]
            except KeyError:
                out.append((Dropout(site, "unreachable", "the engine has no such site"), 0.0))
                continue
            reply: bytes | Failure = answer(site, handler, request)
            seconds = time.perf_counter() - started
            if seconds > deadline_s:
                reply = Dropout(site, "late", f"answered after {seconds:.0f} s, the deadline is {deadline_s:g} s")
            out.append((reply, seconds))
        return out


class ProcessEngine(Engine):
    """One process per site, started on first use: a site that hangs or is killed costs its own answer and no more."""

    side_by_side = True

    def __init__(self, factories: Mapping[str, tuple[Callable[..., Handler], tuple[Any, ...]]]) -> None:
        """Takes, per site, an importable factory and its arguments; the handler is built inside the site's process."""
        self._factories = dict(factories)
        self._running: dict[str, tuple[multiprocessing.process.BaseProcess, Connection]] = {}

    def exchange(self, data: Mapping[str, bytes], deadline_s: float) -> Sequence[tuple[bytes | Failure, float]]:
        """See :class:`Engine`. All sites work at once; a late one is killed and started afresh for its next request."""
        with ThreadPoolExecutor(max_workers=max(1, len(data))) as pool:
            jobs = [pool.submit(self._one, site, request, deadline_s) for site, request in data.items()]
            return [job.result() for job in jobs]

    def start(self, site: str, *, forked: bool = False) -> None:
        """Starts a site's process before anything is asked of it, and returns when it is ready.

        Args:
            forked: copy this process, which has imported what is needed; only while it has no other thread.
        """
        self._process(site, "fork" if forked else "spawn")

    def _one(self, site: str, request: bytes, deadline_s: float) -> tuple[bytes | Failure, float]:
        started = time.perf_counter()
        if site not in self._factories:
            return Dropout(site, "unreachable", "the engine has no such site"), 0.0
        try:
            _, pipe = self._process(site)
            started = time.perf_counter()  # start-up is not the site's time
            pipe.send_bytes(request)
            if not pipe.poll(deadline_s):
                self._stop(site)
                return Dropout(site, "late", f"no answer within {deadline_s:g} s"), time.perf_counter() - started
            reply = unframe(site, pipe.recv_bytes())
        except (EOFError, OSError):
            self._stop(site)
            return Dropout(site, "crashed", "the site's process ended"), time.perf_counter() - started
        return reply, time.perf_counter() - started

    def close(self) -> None:
        """Ends every site's process."""
        for site in list(self._running):
            self._stop(site)

    def _process(
        self, site: str, how: Literal["spawn", "fork"] = "spawn"
    ) -> tuple[multiprocessing.process.BaseProcess, Connection]:
        if site not in self._running:
            context: Any = multiprocessing.get_context(how)
            ours, theirs = context.Pipe()
            factory, arguments = self._factories[site]
            process = context.Process(
                target=_serve, args=(site, theirs, factory, arguments, ours if how == "fork" else None), daemon=True
            )
            process.start()
            theirs.close()
            if ours.poll(_START_UP_S):
                ours.recv_bytes()
            self._running[site] = (process, ours)
        return self._running[site]

    def _stop(self, site: str) -> None:
        process, pipe = self._running.pop(site, (None, None))
        if process is not None and pipe is not None:
            pipe.close()
            process.kill()
            process.join(5.0)


def answer(site: str, handler: Handler, request: bytes) -> bytes | Failure:
    """Returns the handler's answer; an exception becomes a failure whose text can hold no record value."""
    try:
        return handler(request)
    except PolicyRefused as error:
        return Rejection(site, "policy", error.what)
    except FedmatError as error:
        return Dropout(site, "refused", error.what)
    except OSError as error:  # what the system calls it, e.g. a full disk, without the path
        why = f": {os.strerror(error.errno)}" if error.errno else ""
        return Dropout(site, "crashed", f"{type(error).__name__}{why}")
    except Exception as error:  # the text of a foreign exception may hold data: only its type leaves
        return Dropout(site, "crashed", type(error).__name__)


def _serve(
    site: str, pipe: Connection, factory: Callable[..., Handler], arguments: tuple[Any, ...], inherited: Connection | None
) -> None:
    """Runs in the site's process: builds the handler, says so, then answers one request after another.

    Args:
        inherited: the other end, which a forked process has a copy of: open, it would hide that the starter has ended.
    """
    if inherited is not None:
        inherited.close()
    built: list[Handler] = []

    def build(_: bytes) -> bytes:
        built.append(factory(*arguments))
        return b""

    failure = answer(site, build, b"")
    pipe.send_bytes(b"ready")
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(frame(answer(site, built[0], request) if built else failure))


def frame(reply: bytes | Failure) -> bytes:
    """Returns an answer or a failure as bytes for a pipe, a socket or a file between a party's own processes."""
    return ANSWERED + reply if isinstance(reply, bytes) else b"\x00" + wire.encode(reply)


def unframe(party: str, data: bytes) -> bytes | Failure:
    """Returns what :func:`frame` was given; bytes that are no frame are an answer that does not count."""
    if data[:1] == ANSWERED:
        return data[1:]
    try:
        found: Failure = wire.decode(data[1:], Failure)  # type: ignore[arg-type]
    except WireError as error:
        return Rejection(party, "malformed", error.what)
    return found if found.site == party else Rejection(party, "wrong_site", "a failure in another party's name")


def _delivery(site: str, request: bytes, reply: bytes | Failure, seconds: float, expected: Any) -> Delivery:
    if isinstance(reply, Dropout | Rejection):
        return Delivery(site, reply, len(request), 0, seconds)
    try:
        message: Answer | Rejection = wire.decode(reply, expected)
    except WireError as error:
        message = Rejection(site, "malformed", error.what)
    return Delivery(site, message, len(request), len(reply), seconds, files.sha256(reply))
