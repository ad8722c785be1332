"""A small consortium whose parties are real processes with real certificates, and ways to hurt them.

One stage serves many orders: each is a run of its own of the same plan on the same data, so that a test costs a job and not a
consortium. What a run must have come to is computed in this process, by the same code over the in-process engine.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import flare_desk
import yaml
from flare_desk import LIES, Moments, round_of

from fedmat import conductor, files, pipeline, wire
from fedmat.conductor import Order
from fedmat.domain import Dropout, RoundReport
from fedmat.errors import FedmatError
from fedmat.federation.engine import Failure, InProcessEngine
from fedmat.federation.flare import Session
from fedmat.pipeline import Run
from flows import operate, parties
from flows.operate import Patience
from flows.rehearse import Stage

# Rows of mill's file: accepted ones with extreme values, and one that is refused.
PLANTED = [
    (f"Cu{0.51 + i / 97:.5f}Fe{0.49 - i / 97:.5f}", 700.1234567 + 3.7654321 * i, 5123.456789 + 171.6543219 * i)
    for i in range(8)
] + [("canary-badcell-77aa01", 25.0, 987.6543217)]
QUICK = Patience(quorum=60.0, rest=10.0, away=60.0, look=0.03, ask=0.3)
AWAY = "away"
Incidents = Mapping[tuple[str, int | str], str]  # (site, round or kind of request) -> AWAY or the name of a lie


class ScriptedStage(Stage):
    """A rehearsal's stage whose desks do what a test says."""

    count: ClassVar[int] = 0  # stages of this process; they have one process that desks are copied from

    def import_once(self) -> None:
        super().import_once()
        ScriptedStage.count += 1

    def close(self) -> None:
        ScriptedStage.count -= 1
        if ScriptedStage.count:
            self._context = None
        super().close()

    def start_desk(self, party: str) -> None:
        parties.forget_desk(self.home(party))
        process = self._context.Process(target=flare_desk.main, args=(self.home(party),))
        process.start()
        self._desks[party] = process

    def desks(self) -> tuple[str, ...]:
        """Parties whose desk runs."""
        return tuple(party for party, process in self._desks.items() if process.is_alive())


class Scene:
    """The stage and what tests do on it."""

    def __init__(self, consortium_file: Path, folder: Path) -> None:
        self.source = consortium_file
        self.stage = ScriptedStage(consortium_file, folder)
        self._references = folder / "reference"
        self._numbers = iter(range(10**6))

    @property
    def sites(self) -> tuple[str, ...]:
        return self.stage.sites

    def start(self) -> None:
        """Provisions everybody, starts all processes and prepares the sites' data."""
        self.stage.import_once()
        self.stage.provision(datetime.now(UTC))
        self.stage.start_network()
        self.stage.share_secret()
        for site in self.sites:
            self.stage.prepare(site)
        for party in self.stage.parties:
            self.stage.start_desk(party)

    def session(self) -> Session:
        """The operator's connection."""
        return Session(self.stage.project / "admin")

    def moments(self, party: str) -> Moments:
        """What a party does otherwise."""
        return Moments(self.stage.home(party))

    def said(self, party: str) -> list[list[Any]]:
        """What a party's desk was asked and answered so far: kind, round, kind or failure."""
        path = self.stage.home(party) / flare_desk.SAID
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def setup(self, order: Order) -> dict[str, Any]:
        """What the coordinator noted before the first round of an order."""
        found: dict[str, Any] = files.read_json(order.project / "runs" / str(order.run_id) / "attestations.json")
        return found

    def kinds(self, site: str) -> list[str]:
        """What a site's policy lets out."""
        return list(yaml.safe_load((self.stage.home(site) / "policy.yaml").read_text())["outbound"]["kinds"])

    @contextmanager
    def policy(self, site: str, **changes: dict[str, Any]) -> Iterator[None]:
        """Changes clauses of a site's policy: section -> clause -> value."""
        path = self.stage.home(site) / "policy.yaml"
        before = path.read_text()
        policy = yaml.safe_load(before)
        for section, clauses in changes.items():
            policy[section].update(clauses)
        path.write_text(yaml.safe_dump(policy))
        try:
            yield
        finally:
            path.write_text(before)

    def honest(self) -> None:
        """Ends all scripts, and starts again whoever does not run."""
        for party in self.stage.parties:
            self.moments(party).script([])
            for path in (self.stage.home(party) / "run").glob("*.held"):
                self.moments(party).release(path.stem)
                path.unlink()
        self.mend()

    def mend(self) -> None:
        """Starts again what was ended."""
        for party in self.stage.parties:
            child = self.stage.children.get(party)
            if child is None or not child.running():
                self.stage.start_client(party)
            if party not in self.stage.desks():
                self.stage.start_desk(party)
        if not self.stage.children["server"].running():
            self.stage.children["server"] = parties.server_child(self.stage.project)

    # --- processes -------------------------------------------------------------------------------------------------

    def client(self, party: str) -> int:
        """A party's FLARE client."""
        return self.stage.children[party].pid

    def job_of(self, party: str) -> int:
        """A party's process of the job under way; of ``server``: the coordinator's."""
        mark = "runner_process" if party == "server" else "worker_process"
        return next(p for p in descendants(self.client(party)) if mark in command(p))

    def training(self, party: str) -> int:
        """The process in which a party's answers are worked out."""
        return next(p for p in descendants(self.stage.desk_pid(party)) if "resource_tracker" not in command(p))

    # --- orders ----------------------------------------------------------------------------------------------------

    def order(self, name: str, consortium_file: Path | None = None) -> Order:
        """An order of its own name, which is its run's name, too."""
        token = f"{name}-{next(self._numbers)}"
        return conductor.order(
            self.stage.project, consortium_file or self.stage.config_file, token=token, run_id=token, rounds=None, fresh=False
        )

    @contextmanager
    def following(self, order: Order, patience: Patience = QUICK) -> Iterator[Following]:
        """Has an order carried out beside the test, which meanwhile does its mischief."""
        found = Following(order, self.session, patience)
        try:
            yield found
        finally:
            self.honest()
            if found.running():  # a test failed: the next one needs a server that is free
                found.abandoned = True
                with suppress(FedmatError), self.session() as session:
                    session.abort(str(order.state.get("job")))
                found.join(30.0)

    def run(self, order: Order) -> list[RoundReport]:
        """Carries an order out and returns its reports."""
        with self.following(order) as followed:
            followed.done()
            return followed.reports

    def model(self, order: Order) -> str:
        """Digest of an order's model."""
        return files.sha256_file(Order.load(order.project, order.token).run().folder / pipeline.MODEL)

    def expected(self, incidents: Incidents | None = None) -> str:
        """Digest of the model of the same run in this process, with the same sites away or lying in the same rounds."""
        run = Run(self.source, self._references, f"reference-{next(self._numbers)}")
        if not (self._references / "sites").exists():
            for site in run.sites:
                pipeline.prepare_site(run, site)
                pipeline.featurize_site(run, site)
        engine = Scripted({s: pipeline.build_handler(run, s) for s in run.sites}, incidents or {})
        list(pipeline.train(run, engine=engine))
        return files.sha256_file(run.folder / pipeline.MODEL)


def away(reports: Sequence[RoundReport]) -> dict[tuple[str, int | str], str]:
    """The incidents that a run's reports tell of: who did not answer in which round."""
    return {(d.site, report.round): AWAY for report in reports for d in report.dropouts}


class Scripted(InProcessEngine):
    """The in-process engine with sites that are away or lie in named rounds."""

    def __init__(self, handlers: Mapping[str, Any], incidents: Incidents) -> None:
        super().__init__(handlers)
        self._incidents, self._earlier = incidents, dict[str, dict[int, bytes]]()

    def exchange(self, data: Mapping[str, bytes], deadline_s: float) -> Sequence[tuple[bytes | Failure, float]]:
        found: list[tuple[bytes | Failure, float]] = []
        for site, request in data.items():
            number = round_of(request)
            what = self._incidents.get((site, wire.kind_of(request) if number is None else number))
            if what == AWAY:
                found.append((Dropout(site, "unreachable"), 0.0))
                continue
            ((reply, seconds),) = super().exchange({site: request}, deadline_s)
            earlier = self._earlier.setdefault(site, {})
            if what:
                reply = LIES[what](reply, earlier)
            elif number is not None and isinstance(reply, bytes):
                earlier[number] = reply
            found.append((reply, seconds))
        return found


class Following:
    """``flows.operate.follow`` in a thread, and what it told."""

    def __init__(self, order: Order, session: Callable[[], Session], patience: Patience) -> None:
        self.order = order
        self.events: list[Any] = []
        self.abandoned = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._follow, args=(session, patience), daemon=True)
        self._thread.start()

    def _follow(self, session: Callable[[], Session], patience: Patience) -> None:
        try:
            operate.follow(self.order, session=session, on_event=self._hear, deadline_s=240.0, patience=patience)
        except BaseException as error:  # noqa: BLE001  told by done()
            self._error = error

    def _hear(self, event: Any) -> None:
        if self.abandoned:
            raise AssertionError("abandoned")
        self.events.append(event)

    def running(self) -> bool:
        """Whether the order is still followed."""
        return self._thread.is_alive()

    def join(self, seconds: float) -> None:
        """Waits for the follower to end, however it ends."""
        self._thread.join(seconds)

    @property
    def reports(self) -> list[RoundReport]:
        """Reports of the rounds so far."""
        return [e for e in self.events if isinstance(e, RoundReport)]

    def until(self, what: Callable[[], Any], seconds: float = 90.0) -> None:
        """Waits until something is so."""
        end = time.monotonic() + seconds
        while not what():
            if not self._thread.is_alive():
                raise AssertionError(f"the order ended first: {self._error or self.order.state}")
            if time.monotonic() > end:
                raise AssertionError(f"not so within {seconds:g} s: {self.order.state}, {self.events[-3:]}")
            time.sleep(0.02)

    def done(self, seconds: float = 120.0) -> Order:
        """Waits for the end; raises what the order ended with."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            raise AssertionError(f"not done within {seconds:g} s: {self.order.state}, {self.events[-3:]}")
        if self._error is not None:
            raise self._error
        return Order.load(self.order.project, self.order.token)


# --- processes -------------------------------------------------------------------------------------------------------


def command(pid: int) -> str:
    """A process's command line; empty where it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def descendants(pid: int) -> list[int]:
    """All processes that a process started, and that those started."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError, ValueError):
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    found, last = [pid], 0
    while last < len(found):
        found += [child for child, parent in parents.items() if parent == found[last]]
        last += 1
    return found[1:]


def kill(*pids: int) -> None:
    """``kill -9``."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def wait_for(what: Callable[[], Any], seconds: float = 60.0, about: str = "") -> None:
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"not so within {seconds:g} s: {about}"
        time.sleep(0.05)
