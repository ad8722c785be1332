"""The coordinator's side of rounds between organisations: an order is submitted to FLARE, followed, and submitted again if need be.

Knows: orders and their files, the operator's admin session, time. Refuses to know: what a round is about. That is the job's own
business, which goes on from its checkpoint; so whatever ends a job, the answer is another job.

Everything that must outlast this process is in the order's folder. A follower that was killed and is started again finds there
which attempt is under way, and the same attempt submitted twice is one job.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fedmat import conductor, errors, files
from fedmat.conductor import Order
from fedmat.domain import Dropout, Rejection, RoundReport
from fedmat.errors import FedmatError, PolicyRefused, ProtocolError, ServiceError
from fedmat.federation.coordinator import ROUNDS, SETUP
from fedmat.federation.flare import Session, System
from fedmat.federation.rounds import role_names
from fedmat.pipeline import Run
from flows.shared import DEADLINE_S, Event, Step, tell

FOLLOWED = "followed.json"  # in an order's folder: what its follower must remember
MOST_ATTEMPTS = 3  # one after another that get no further
MOST_YIELDS = 3  # jobs that end early for the sake of one party
_PHASES = ("rounds", "baselines", "evaluate", "done")
_ENDED = ("done", "failed", "yielded")


@dataclass(frozen=True)
class Patience:
    """How long the operator's side waits, in seconds.

    Attributes:
        quorum: for enough parties to be connected.
        rest: for the rest of the roster once there are enough: after a restart of the server parties come back one by one.
        away: for a server that does not answer any more.
        look: between two looks at the order's files.
        ask: between two questions to the server.
    """

    quorum: float = 600.0
    rest: float = 20.0
    away: float = 300.0
    look: float = 0.5
    ask: float = 5.0


@dataclass(frozen=True)
class Note:
    """What a follower must remember of an order.

    Attributes:
        attempt: number of the present job, from 1.
        job: FLARE's name of it; None until it was submitted.
        server: when the server that took it was started; another value later means that the job died with that server.
        connected: parties that were connected then.
        since: when the order was first followed, seconds since 1970.
        closed: its end, good or bad, was told; what comes now is a new order, or a new attempt at this one.
    """

    since: float
    attempt: int = 0
    job: str | None = None
    server: float = 0.0
    connected: tuple[str, ...] = ()
    closed: bool = False

    @classmethod
    def load(cls, order: Order) -> Note | None:
        """Returns the note in an order's folder; None where nobody followed it yet."""
        path = order.folder / FOLLOWED
        if not path.exists():
            return None
        found = files.read_json(path)
        return cls(**{**found, "connected": tuple(found["connected"])})

    def save(self, order: Order) -> None:
        """Writes the note."""
        files.write_json(order.folder / FOLLOWED, dataclasses.asdict(self) | {"connected": list(self.connected)})


# --- orders --------------------------------------------------------------------------------------------------------


def place(
    project: Path,
    consortium_file: Path,
    now: datetime,
    *,
    token: str | None = None,
    run_id: str | None = None,
    rounds: int | None = None,
    fresh: bool = False,
) -> Order:
    """Writes an order, or finds the one that is meant.

    Without a token the order is named by plan and day: an order of today that is not closed is gone on with. After one that is
    closed comes a new one, which asks the sites anew which data they have; on the same data it is the same run.

    Raises:
        ConfigError, PlanRefused: the consortium file is wrong.
        StateError: the token names an order of another consortium file.
    """
    if token is None:
        plan = Run(consortium_file, project, None, rounds).plan()
        token = _next_token(project, f"{plan.sha256[:8]}-{now:%Y%m%d}", consortium_file.read_bytes(), run_id, fresh)
    return conductor.order(project, consortium_file, token=token, run_id=run_id, rounds=rounds, fresh=fresh)


def reopen(project: Path, token: str) -> None:
    """Takes a closed order up again, because something that follows it is still to be done."""
    order = Order.load(project, token)
    note = Note.load(order)
    if note is not None:
        dataclasses.replace(note, closed=False).save(order)


def _next_token(project: Path, day: str, consortium: bytes, run_id: str | None, fresh: bool) -> str:
    number, token = 1, day
    while (project / conductor.ORDERS / token / "order.json").exists():
        known = Order.load(project, token)
        note = Note.load(known)
        meant = known.consortium == consortium and run_id in (None, known.run_id) and not fresh
        if meant and not (note and note.closed):
            break
        number += 1
        token = f"{day}-{number}"
    return token


# --- following -----------------------------------------------------------------------------------------------------


def follow(
    order: Order,
    *,
    session: Callable[[], Session],
    on_event: Callable[[Event], None] = tell,
    deadline_s: float = DEADLINE_S,
    patience: Patience = Patience(),
) -> Order:
    """Has an order carried out and returns it with the name of its run.

    Args:
        session: opens the operator's connection to the FLARE server. One is kept open: each takes a second and a half.
        on_event: gets a :class:`RoundReport` of every round of the run as it closes (those that the run had before this order,
            too, if it goes on with them), and steps: ``gather`` while parties are waited for, ``job`` when one is submitted or
            ended before its time, ``carry`` when a person has to take files to a party.
        deadline_s: after this long the job is ended; what was done is kept.

    Raises:
        FedmatError: as the job ended with it. It is told once; following the order again tries again.
        ServiceError: the server cannot be reached, too few parties are connected, jobs end without getting any further, or
            the deadline has passed.
    """
    follower = _Follower(order, _Line(session), on_event, time.monotonic() + deadline_s, deadline_s, patience)
    try:
        return follower.follow()
    finally:
        follower.line.close()


class _Line:
    """The admin session: opened when it is needed, kept, and opened again when it broke."""

    def __init__(self, session: Callable[[], Session]) -> None:
        self._new = session
        self._open: Session | None = None

    def ask(self, question: Callable[[Session], Any]) -> Any:
        """Returns the server's answer; a session that had been open before is tried anew once."""
        again = self._open is not None
        while True:
            try:
                if self._open is None:
                    self._open = self._new()
                return question(self._open)
            except ServiceError:
                self.close()
                if not again:
                    raise
                again = False

    def close(self) -> None:
        """Ends the session."""
        if self._open is not None:
            self._open.close()
            self._open = None


class _Follower:
    """One call of :func:`follow`."""

    def __init__(
        self,
        order: Order,
        line: _Line,
        on_event: Callable[[Event], None],
        until: float,
        deadline_s: float,
        patience: Patience,
    ) -> None:
        self.order, self.line, self._tell, self._patience = order, line, on_event, patience
        self._until, self._deadline_s = until, deadline_s
        plan = order.run().plan()
        carried = {m.site for m in order.run().config().members if m.transport == "files"}  # they are never connected
        self._sites = tuple(s for s in plan.roster if s not in carried)
        self._roles, self._quorum = role_names(plan), max(0, plan.settings.quorum - len(carried))
        self._note = Note.load(order) or Note(time.time())
        self._told = 0  # rounds
        self._size: tuple[int, int] | None = None
        self._latest: deque[RoundReport] = deque(maxlen=2)  # of the present job
        self._yields: Counter[str] = Counter()
        self._asked_to_yield = False
        self._alive = False  # the job's process was seen
        self._carry: Any = None

    def follow(self) -> Order:
        """See :func:`follow`."""
        if self.order.state["state"] == "done":
            return self._close()
        going_on = self._note.attempt > 0 and not self._note.closed
        furthest, idle = self._progress(), 0
        while True:
            if not going_on:
                self._next_attempt()
            going_on = False
            self._submit()
            how = self._watch()
            if how == "done":
                return self._close()
            if how == "failed":
                found = self._state()["error"]
                self._close()
                raise error_of(found)
            idle = 0 if self._progress() > furthest else idle + 1
            furthest = max(furthest, self._progress())
            self._say("job", "failed", f"job {self._note.attempt}: {how}")
            if idle == MOST_ATTEMPTS:
                self._close()
                raise ServiceError(
                    f"order {self.order.token}: {idle} jobs one after another got no further; of the last one: {how}",
                    fix=f"see the log of the FLARE server and {self.order.folder}, then run again: it goes on",
                )

    # --- a job -----------------------------------------------------------------------------------------------------

    def _next_attempt(self) -> None:
        system = self._gather()
        # Written before the job is submitted: whoever is started again after a crash in between submits it under the same name.
        self._note = dataclasses.replace(
            self._note,
            attempt=self._note.attempt + 1,
            job=None,
            server=system.started,
            connected=tuple(sorted(system.parties)),
            closed=False,
        )
        self._note.save(self.order)
        self._latest.clear()
        self._asked_to_yield = self._alive = False

    def _submit(self) -> None:
        if self._note.job is not None:
            return
        attempt = self._note.attempt
        folder = self.order.write_job(attempt)
        job = self.line.ask(lambda s: s.submit(folder, f"{self.order.token}-{attempt}"))
        self._note = dataclasses.replace(self._note, job=str(job))
        self._note.save(self.order)
        self._say("job", "started", f"job {attempt} of order {self.order.token}")

    def _watch(self) -> str:
        """Returns how the job ended: ``done``, ``failed`` or ``yielded`` as it says itself, else a sentence."""
        asked, away_since = 0.0, 0.0
        while True:
            now = time.monotonic()
            gone = self._process_gone()
            if gone is None and now - asked >= self._patience.ask:
                asked = now
                try:
                    gone, away_since = self._ask(), 0.0
                except ServiceError:
                    away_since = away_since or now
                    if now - away_since > self._patience.away:
                        raise
            state = self._state()  # after the questions: a job that is over has written its last word
            self._tell_rounds()
            self._tell_files(state.get("carry"))
            if state.get("state") in _ENDED:
                return str(state["state"])
            if gone is not None:
                self._abort()
                return gone
            if now > self._until:
                self._give_up(state)
            time.sleep(self._patience.look)

    def _ask(self) -> str | None:
        """Asks the server about itself and the job; returns why the job is no more, or None."""
        system: System = self.line.ask(lambda s: s.system())
        if system.started != self._note.server:
            return "the FLARE server was started again, and the job died with the one before"
        status = self.line.ask(lambda s: _status(s, str(self._note.job)))
        if status.startswith("FINISHED") or status == "ABSENT":
            return f"FLARE says {status}, and the job had not said that it was done"
        self._welcome(set(system.parties))
        return None

    def _process_gone(self) -> str | None:
        """A job whose process this follower has seen, and sees no more. One it never saw may be on another machine."""
        pid = self._state().get("pid")
        if not isinstance(pid, int):
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return "its process is gone" if self._alive else None
        except PermissionError:
            pass
        self._alive = True
        return None

    def _welcome(self, connected: set[str]) -> None:
        """Has the job end early for parties it lost and that are back: a party joins no job that runs, but the next one.

        Only those count whose data the run began with; others are in the next run.
        """
        if self._asked_to_yield or not self._latest or self._state().get("phase") != "rounds":
            return
        missed = [{d.site for d in report.dropouts if d.reason == "unreachable"} for report in self._latest]
        lost = missed[-1] & (set(self._sites) - set(self._note.connected) | (missed[0] if len(missed) == 2 else set()))
        back = {p for p in lost & connected & self._attested() if self._yields[p] < MOST_YIELDS}
        if back:
            self._yields.update(back)
            self._asked_to_yield = True
            self.order.ask_to_yield()
            self._say("gather", "started", f"{', '.join(sorted(back))} is back: the next job begins after this round")

    def _abort(self) -> None:
        job = self._note.job
        if job is not None:
            with suppress(ServiceError):
                self.line.ask(lambda s: s.abort(job))

    def _give_up(self, state: dict[str, Any]) -> None:
        self._abort()
        self._close()
        where = f"{state.get('phase', 'rounds')}, {state.get('round', 0)} rounds done" if state else "not begun"
        raise ServiceError(
            f"order {self.order.token} is not done after {self._deadline_s:g} s ({where}); its job was ended, what was done is kept",
            fix="run again: it goes on; or allow more time",
        )

    # --- before a job ------------------------------------------------------------------------------------------------

    def _gather(self) -> System:
        """Waits until enough parties are connected, and a little for the rest."""
        begun = time.monotonic()
        enough_since = away_since = 0.0
        met, shown = self._note.attempt > 0, ""
        while True:
            now = time.monotonic()
            try:
                system: System = self.line.ask(lambda s: s.system())
            except ServiceError:
                away_since = away_since or now
                if not met or now - away_since > self._patience.away:
                    raise
                time.sleep(self._patience.look)
                continue
            met, away_since = True, 0.0
            absent = [p for p in (*self._sites, *self._roles) if p not in system.parties]
            there = len(self._sites) - sum(p in self._sites for p in absent)
            enough = there >= self._quorum and not any(p in self._roles for p in absent)
            enough_since = (enough_since or now) if enough else 0.0
            about = f"{there} of {len(self._sites)} sites are connected" + (f"; absent: {', '.join(absent)}" if absent else "")
            if not absent or (enough and now - enough_since >= self._patience.rest):
                self._say("gather", "done", about)
                return system
            if about != shown:
                self._say("gather", "started", about)
                shown = about
            if not enough and now - begun > self._patience.quorum:
                raise ServiceError(
                    f"{about}; the plan needs {self._quorum}" + (f" and {', '.join(self._roles)}" if self._roles else ""),
                    fix="ask the absent parties to run fedmat site start, then run again: it goes on",
                )
            if now > self._until:
                self._give_up({})
            time.sleep(min(self._patience.ask, max(self._patience.look, 0.2 * self._patience.rest)))

    # --- files -----------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        """What the present job says of itself; nothing while only an earlier one has spoken."""
        state = self.order.state
        return state if state.get("job") == self._note.job else {}

    def _run_folder(self) -> Path | None:
        run_id = self.order.state.get("run_id") or self.order.run_id
        return self.order.project / "runs" / run_id if run_id else None

    def _attested(self) -> set[str]:
        folder = self._run_folder()
        if folder is None or not (folder / SETUP).exists():
            return set()
        return set(files.read_json(folder / SETUP)["attestations"])

    def _progress(self) -> tuple[int, int]:
        state = self.order.state
        phase = state.get("phase", _PHASES[0])
        return (_PHASES.index(phase) if phase in _PHASES else 0, int(state.get("round", 0)))

    def _tell_rounds(self) -> None:
        folder = self._run_folder()
        if folder is None:
            return
        path = folder / ROUNDS
        with suppress(FileNotFoundError):
            stat = path.stat()
            if stat.st_mtime < self._note.since or (stat.st_mtime_ns, stat.st_size) == self._size:
                return  # written before there was this order, or known
            self._size = (stat.st_mtime_ns, stat.st_size)
            for line in path.read_bytes().split(b"\n")[self._told : -1]:  # the last line may be half written
                report = _report(line)
                self._told += 1
                self._latest.append(report)
                self._tell(report)

    def _tell_files(self, carry: Any) -> None:
        if carry and carry != self._carry:
            self._say("carry", "started", "; ".join(f"{c['file']} to {c['party']}" for c in carry))
        self._carry = carry

    def _close(self) -> Order:
        self._tell_rounds()
        self._note = dataclasses.replace(self._note, closed=True)
        self._note.save(self.order)
        return Order.load(self.order.project, self.order.token)

    def _say(self, step: str, state: Any, about: str) -> None:
        self._tell(Step(step, None, state, about))


def error_of(found: dict[str, Any]) -> FedmatError:
    """Returns the error that a job wrote into its order's state."""
    kinds = {k: v for k, v in vars(errors).items() if isinstance(v, type) and issubclass(v, FedmatError)}
    what, fix = str(found["what"]), str(found.get("fix", ""))
    kind = kinds.get(str(found["kind"]))
    if kind is None:  # of a module of its own: its family is what its exit code says
        kind = next((k for k in kinds.values() if k.exit_code == found.get("exit_code")), FedmatError)
    if issubclass(kind, ProtocolError | PolicyRefused):
        first, _, rest = what.partition(": ")
        return kind(first, rest, fix=fix)
    return kind(what, fix=fix)


def _status(session: Session, job: str) -> str:
    try:
        return session.status(job)
    except ServiceError as error:
        if "JobNotFound" in error.what:
            return "ABSENT"
        raise


def _report(line: bytes) -> RoundReport:
    """Returns a line of rounds.jsonl as what it was."""
    found = json.loads(line)
    return RoundReport(
        **{
            **found,
            "accepted": tuple(found["accepted"]),
            "dropouts": tuple(Dropout(**d) for d in found["dropouts"]),
            "rejections": tuple(Rejection(**r) for r in found["rejections"]),
        }
    )
