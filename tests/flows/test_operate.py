"""The operator's side of rounds: whatever ends a job, the order goes on; whatever the job says, it is told once.

A FLARE server is played here (``Flare``): its jobs are generators that do a step each time the operator asks for the system's state,
so that nothing waits for a clock. One test lets the real conductor do the job, with sites in folders of their own.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import small
from prefect_server import Server

from fedmat import conductor, errors, files, pipeline, provision, wire
from fedmat.conductor import Federate, Order
from fedmat.domain import Dropout, RoundReport
from fedmat.errors import FedmatError, PolicyRefused, ProtocolError, RoundFailed, ServiceError, StateError
from fedmat.federation.engine import Failure, InProcessEngine
from fedmat.federation.flare import System
from fedmat.party import Party
from fedmat.registry import Registered
from flows import operate, run_all
from flows.operate import Note, Patience, error_of, follow, place
from flows.shared import ALERTS, Event, Step
from flows.site import READY, prepare_party

pytestmark = pytest.mark.timeout(600)

ROUNDS = 4
SITES = tuple(sorted(small.COMPANIES))
AT_ONCE = Patience(quorum=0.2, rest=0.0, away=0.2, look=0.0, ask=0.0)
NOW = datetime(2026, 3, 1, 2, tzinfo=UTC)
Script = Callable[[Order, str], Iterator[None]]


class Flare:
    """A FLARE server as its admin session shows it.

    Attributes:
        scripts: what jobs do, one after another; the last one also does all that follow.
        freeze: jobs whose status stays RUNNING whatever happens, as after a crash of the server.
    """

    def __init__(self, order: Order | None, *scripts: Script) -> None:
        self.order, self.scripts = order, list(scripts)
        self.started, self.parties, self.up = 1000.0, set(SITES), True
        self.logins = 0
        self.submitted: dict[str, str] = {}  # token -> job
        self.folders: list[Path] = []
        self.aborted: list[str] = []
        self.statuses: dict[str, str] = {}
        self.running: Iterator[None] | None = None
        self.before: Callable[[], None] = lambda: None  # each time the system is asked for
        self.breaks = 0  # sessions that break before they answer

    def session(self) -> Any:
        if not self.up:
            raise ServiceError("the FLARE server cannot be reached (NoConnection)")
        self.logins += 1
        return Session(self)

    def step(self) -> None:
        self.before()
        if self.running is not None and next(self.running, "over") == "over":
            self.end("FINISHED:COMPLETED")

    def end(self, status: str) -> None:
        self.running = None
        for job, known in self.statuses.items():
            self.statuses[job] = status if known == "RUNNING" else known

    def restart(self) -> None:
        """The server is killed and started again: its job is gone, and stays RUNNING for ever."""
        self.started += 50.0
        self.running = None


class Session:
    def __init__(self, flare: Flare) -> None:
        self.flare, self.closed = flare, False

    def _there(self) -> Flare:
        assert not self.closed
        if not self.flare.up or self.flare.breaks:
            self.flare.breaks = max(0, self.flare.breaks - 1)
            raise ServiceError("the FLARE server did not answer (SessionClosed)")
        return self.flare

    def system(self) -> System:
        self._there().step()
        return System(self.flare.started, dict.fromkeys(self.flare.parties, 0.0))

    def submit(self, job: Path, token: str) -> str:
        flare = self._there()
        if token not in flare.submitted:
            name = f"job-{len(flare.submitted) + 1}"
            flare.submitted[token] = name
            flare.statuses[name] = "RUNNING"
            flare.folders.append(job)
            script = flare.scripts.pop(0) if len(flare.scripts) > 1 else flare.scripts[0]
            order = flare.order or Order.load(job.parents[2], job.parent.name)
            flare.running = script(order, name)
        return flare.submitted[token]

    def status(self, job: str) -> str:
        flare = self._there()
        if job not in flare.statuses:
            raise ServiceError("the FLARE server did not ask for the job (JobNotFound)")
        return flare.statuses[job]

    def abort(self, job: str) -> None:
        self._there().aborted.append(job)

    def close(self) -> None:
        self.closed = True


# --- what jobs do ----------------------------------------------------------------------------------------------------


def report(number: int, dropouts: Sequence[Dropout] = ()) -> RoundReport:
    out = {d.site for d in dropouts}
    return RoundReport(
        round=number, rounds=ROUNDS, rule="mean", lr=0.1, accepted=tuple(s for s in SITES if s not in out), shares={},
        update_norms={}, train_loss={}, dropouts=tuple(dropouts), rejections=(), bytes_down={}, bytes_up={},
        model_sha256="0" * 64, plan_sha256="1" * 64,
    )  # fmt: skip


def job(
    until: int = ROUNDS, last: str | None = "done", *, without: str = "", heeds: bool = True, pid: int | None = None
) -> Script:
    """A job that does its rounds from where the run stands and then says its last word; None: it says nothing and is over."""

    def script(order: Order, name: str) -> Generator[None]:
        run_folder = order.project / "runs" / "r1"
        order.note(state="running", job=name, pid=pid or os.getpid(), error=None)
        yield
        order.note(run_id="r1", phase="rounds")
        files.write_json(run_folder / "attestations.json", {"attestations": {s: {} for s in SITES}})
        path = run_folder / "rounds.jsonl"
        done = len(path.read_bytes().splitlines()) if path.exists() else 0
        for number in range(done, until):
            lost = [Dropout(without, "unreachable", "not connected")] if without else []
            line = json.dumps(wire.plain(report(number, lost))) + "\n"
            with path.open("a") as handle:
                handle.write(line[:40])
                handle.flush()
                yield  # a half written line
                handle.write(line[40:])
            order.note(round=number + 1)
            yield
            if heeds and (order.folder / "yield").exists() and number + 1 < ROUNDS:
                order.note(state="yielded")
                return
        if last == "failed":
            order.note(
                state="failed",
                error={"kind": "RoundFailed", "what": "round 3: 1 of 3 sites", "fix": "mend them", "exit_code": 4},
            )
        elif last:
            order.note(state=last, phase="done" if last == "done" else "rounds")
        yield

    return script


def silent(order: Order, name: str) -> Iterator[None]:
    """A job that FLARE never lets begin."""
    del order, name
    return iter(())


@pytest.fixture
def order(tmp_path: Path) -> Order:
    consortium = small.build(tmp_path / "c", rounds=ROUNDS)
    return conductor.order(tmp_path / "p", consortium, token="t", run_id=None, rounds=None, fresh=False)


class Heard(list[Event]):
    """A listener."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    @property
    def rounds(self) -> list[int]:
        return [e.round for e in self if isinstance(e, RoundReport)]

    def steps(self, name: str) -> list[Step]:
        return [e for e in self if isinstance(e, Step) and e.name == name]


def followed(order: Order, flare: Flare, heard: Heard | None = None, **given: Any) -> Order:
    return follow(
        order, session=flare.session, on_event=heard if heard is not None else Heard(), **{"patience": AT_ONCE, **given}
    )


# --- a job that goes well ----------------------------------------------------------------------------------------------


def test_every_round_is_told_once_as_it_was_over_one_session(order: Order) -> None:
    flare, heard = Flare(order, job()), Heard()
    done = followed(order, flare, heard)
    assert [e for e in heard if isinstance(e, RoundReport)] == [report(n) for n in range(ROUNDS)]
    assert list(flare.submitted) == ["t-1"]
    assert flare.folders == [order.folder / "job-1"]
    assert flare.logins == 1
    assert done.state["state"] == "done"
    assert flare.aborted == []


def test_a_finished_order_is_not_submitted_again(order: Order) -> None:
    followed(order, Flare(order, job()))
    nobody = Flare(order, job())
    assert followed(order, nobody).state["state"] == "done"
    assert nobody.logins == 0


def test_rounds_of_a_run_from_before_the_order_are_not_told(order: Order) -> None:
    """The same plan on the same data is the same run, finished long ago."""

    def nothing_to_do(order: Order, name: str) -> Generator[None]:
        order.note(state="running", job=name, pid=os.getpid(), run_id="r1", phase="rounds")
        yield
        yield
        order.note(state="done", phase="done")

    path = order.project / "runs/r1/rounds.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(wire.plain(report(0))) + "\n")
    os.utime(path, (1, 1))
    heard = Heard()
    followed(order, Flare(order, nothing_to_do), heard)
    assert heard.rounds == []


def test_a_session_that_broke_is_opened_again(order: Order) -> None:
    flare = Flare(order, job())
    count = iter(range(1000))
    flare.before = lambda: setattr(flare, "breaks", 1 if next(count) == 4 else 0)
    followed(order, flare)
    assert flare.logins == 2
    assert len(flare.submitted) == 1


# --- before a job ------------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_said_at_once(order: Order) -> None:
    flare = Flare(order, job())
    flare.up = False
    with pytest.raises(ServiceError, match="cannot be reached"):
        followed(order, flare)
    flare.up = True
    assert followed(order, flare).state["state"] == "done"
    assert list(flare.submitted) == ["t-1"]


def test_a_quorum_is_waited_for_and_who_is_missing_is_said(order: Order) -> None:
    flare, heard = Flare(order, job()), Heard()
    flare.parties = {"mill"}
    arrivals = iter([None, None, "forge", None, "foundry"])
    flare.before = lambda: flare.parties.update({p} if (p := next(arrivals, None)) else set())
    followed(order, flare, heard, patience=Patience(quorum=60, rest=60, look=0, ask=0))
    said = [s.detail for s in heard.steps("gather")]
    assert said == [
        "1 of 3 sites are connected; absent: forge, foundry",
        "2 of 3 sites are connected; absent: foundry",
        "3 of 3 sites are connected",
    ]


def test_too_few_parties_end_the_wait_with_their_names(order: Order) -> None:
    flare = Flare(order, job())
    flare.parties = {"mill"}
    with pytest.raises(ServiceError, match=r"1 of 3 sites are connected; absent: forge, foundry; the plan needs 2"):
        followed(order, flare)
    assert flare.submitted == {}


def test_a_role_that_is_absent_is_waited_for(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operate, "role_names", lambda _: ("reference",))
    flare = Flare(order, job())
    with pytest.raises(ServiceError, match="absent: reference"):
        followed(order, flare)
    flare.parties.add("reference")
    assert followed(order, flare).state["state"] == "done"


def test_a_site_that_is_asked_by_files_need_not_be_connected_and_people_hear_what_to_carry(tmp_path: Path) -> None:
    import yaml

    def carried(order: Order, name: str) -> Generator[None]:
        waiting = [{"party": "mill", "file": "drop/mill-1.zip"}]
        order.note(state="running", job=name, pid=os.getpid(), carry=waiting)
        yield
        yield
        order.note(carry=[])
        yield from job()(order, name)

    path = small.build(tmp_path / "c", rounds=ROUNDS, quorum=3)
    document = yaml.safe_load(path.read_text())
    document["members"] = [{**m, "transport": "files"} if m["site"] == "mill" else m for m in document["members"]]
    path.write_text(yaml.safe_dump(document))
    order = conductor.order(tmp_path / "p", path, token="t", run_id=None, rounds=None, fresh=False)
    flare, heard = Flare(order, carried), Heard()
    flare.parties = {"forge", "foundry"}
    followed(order, flare, heard)
    assert [s.detail for s in heard.steps("carry")] == ["drop/mill-1.zip to mill"]


# --- jobs that end before their time ---------------------------------------------------------------------------------


def test_a_job_that_a_dead_server_left_running_is_followed_by_another(order: Order) -> None:
    flare, heard = Flare(order, job(), job()), Heard()
    flare.before = lambda: flare.restart() if heard.rounds == [0, 1] and len(flare.submitted) == 1 else None
    followed(order, flare, heard)
    assert list(flare.submitted) == ["t-1", "t-2"]
    assert flare.aborted == ["job-1"]
    assert flare.statuses["job-1"] == "RUNNING"
    assert heard.rounds == list(range(ROUNDS))
    assert "started again" in heard.steps("job")[1].detail


@pytest.mark.parametrize("status", ["FINISHED:EXECUTION_EXCEPTION", "FINISHED:ABORTED", None])
def test_a_job_that_is_over_without_a_last_word_is_followed_by_another(order: Order, status: str | None) -> None:
    flare, heard = Flare(order, job(2, None), job()), Heard()

    def over() -> None:
        if heard.rounds == [0, 1] and len(flare.submitted) == 1:
            flare.running = None
            flare.statuses.pop("job-1", None) if status is None else flare.end(status)

    flare.before = over
    followed(order, flare, heard)
    assert list(flare.submitted) == ["t-1", "t-2"]
    assert heard.rounds == list(range(ROUNDS))


def test_a_job_whose_process_is_gone_is_followed_by_another(order: Order) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        flare, heard = Flare(order, job(pid=process.pid), job()), Heard()

        def kill() -> None:
            if heard.rounds == [0, 1] and len(flare.submitted) == 1:
                flare.running = None
                process.kill()
                process.wait()

        flare.before = kill
        followed(order, flare, heard)
    assert list(flare.submitted) == ["t-1", "t-2"]
    assert heard.rounds == list(range(ROUNDS))


def test_a_process_that_was_never_seen_says_nothing(order: Order) -> None:
    """The server may be in another container, with the folder shared and process ids of its own."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    flare = Flare(order, job(pid=process.pid))
    followed(order, flare)
    assert list(flare.submitted) == ["t-1"]


def test_a_job_that_yields_is_followed_by_another(order: Order) -> None:
    flare, heard = Flare(order, job(2, "yielded"), job()), Heard()
    followed(order, flare, heard)
    assert list(flare.submitted) == ["t-1", "t-2"]
    assert heard.rounds == list(range(ROUNDS))


@pytest.mark.parametrize("script", [silent, job(0, "yielded"), job(0, None)])
def test_jobs_that_get_no_further_are_given_up_after_three(order: Order, script: Script) -> None:
    flare = Flare(order, script)
    with pytest.raises(ServiceError, match="3 jobs one after another got no further"):
        followed(order, flare)
    assert list(flare.submitted) == ["t-1", "t-2", "t-3"]
    flare.scripts = [job()]
    assert followed(order, flare).state["state"] == "done", "the operator's next try"
    assert list(flare.submitted)[-1] == "t-4"


def test_a_job_that_gets_further_each_time_is_never_given_up(order: Order) -> None:
    scripts = [job(n, None) for n in range(1, ROUNDS)]
    flare = Flare(order, *scripts, job())
    followed(order, flare)
    assert len(flare.submitted) == ROUNDS


def test_a_server_that_stays_away_ends_the_following_and_not_the_order(order: Order) -> None:
    flare, heard = Flare(order, job()), Heard()
    flare.before = lambda: setattr(flare, "up", not heard.rounds)
    with pytest.raises(ServiceError, match="did not answer|cannot be reached"):
        followed(order, flare, heard)
    flare.before, flare.up = lambda: None, True
    again = Heard()
    followed(order, flare, again)
    assert list(flare.submitted) == ["t-1"]
    assert again.rounds == list(range(ROUNDS)), "who follows anew hears of all rounds of the order"


# --- failures ----------------------------------------------------------------------------------------------------------


def test_a_failure_is_told_as_it_was_and_only_a_person_tries_again(order: Order) -> None:
    flare, heard = Flare(order, job(2, "failed"), job()), Heard()
    with pytest.raises(RoundFailed, match="1 of 3 sites") as caught:
        followed(order, flare, heard)
    assert caught.value.fix == "mend them"
    assert list(flare.submitted) == ["t-1"]
    followed(order, flare, heard)
    assert list(flare.submitted) == ["t-1", "t-2"]


def test_a_failure_that_nobody_heard_of_is_told_before_anything_is_tried_again(order: Order) -> None:
    flare, heard = Flare(order, job(2, "failed")), Heard()
    kill_follower_after(1, order, flare, heard)
    list(flare.running or ())
    with pytest.raises(RoundFailed):
        followed(order, flare, heard)
    assert list(flare.submitted) == ["t-1"]


ERRORS = [k for _, k in inspect.getmembers(errors, inspect.isclass) if issubclass(k, FedmatError)]


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_is_the_same_before_and_after_the_journey(kind: type[FedmatError]) -> None:
    error: FedmatError
    if issubclass(kind, ProtocolError):
        error = kind("replay", "seen: before", fix="do: that")
    elif issubclass(kind, PolicyRefused):
        error = kind("plans.rules", "not: that", fix="do: that")
    else:
        error = kind("what: happened", fix="do: that")
    sent = {"kind": kind.__name__, "what": error.what, "fix": error.fix, "exit_code": error.exit_code}
    found = error_of(json.loads(json.dumps(sent)))
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))


def test_an_error_of_another_module_keeps_its_exit_code() -> None:
    found = error_of({"kind": "QuorumMissed", "what": "w", "fix": "f", "exit_code": 4})
    assert (type(found), found.what, found.fix) == (RoundFailed, "w", "f")
    assert error_of({"kind": "os", "what": "w", "exit_code": 77}).exit_code == 1


# --- followers that end before the job -------------------------------------------------------------------------------


def kill_follower_after(rounds: int, order: Order, flare: Flare, heard: Heard) -> None:
    def listener(event: Event) -> None:
        heard(event)
        if len(heard.rounds) == rounds:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(order, session=flare.session, on_event=listener, patience=AT_ONCE)


def test_a_follower_that_was_killed_goes_on_following_the_same_job(order: Order) -> None:
    flare, heard = Flare(order, job()), Heard()
    kill_follower_after(2, order, flare, heard)
    again = Heard()
    followed(order, flare, again)
    assert list(flare.submitted) == ["t-1"]
    assert flare.aborted == []
    assert again.rounds == list(range(ROUNDS))


def test_a_follower_that_was_killed_while_it_submitted_submits_the_same_job(order: Order) -> None:
    flare = Flare(order, job())
    Note(0.0, attempt=1, server=flare.started, connected=SITES).save(order)
    flare.session().submit(order.write_job(1), "t-1")  # it was, but the note does not say so
    followed(order, flare)
    assert list(flare.submitted) == ["t-1"]


def test_a_follower_that_comes_back_after_the_server_was_restarted_submits_anew(order: Order) -> None:
    flare, heard = Flare(order, job()), Heard()
    kill_follower_after(2, order, flare, heard)
    flare.restart()
    followed(order, flare, heard)
    assert list(flare.submitted) == ["t-1", "t-2"]


# --- parties that come back ------------------------------------------------------------------------------------------


def test_a_party_that_is_back_takes_part_from_the_next_job_on(order: Order) -> None:
    flare, heard = Flare(order, job(without="mill"), job()), Heard()
    flare.parties -= {"mill"}
    flare.before = lambda: flare.parties.update({"mill"} if heard.rounds == [0, 1] else set())
    followed(order, flare, heard)
    assert list(flare.submitted) == ["t-1", "t-2"]
    assert heard.rounds == list(range(ROUNDS))
    absent = [[d.site for d in e.dropouts] for e in heard if isinstance(e, RoundReport)]
    assert absent == [["mill"], ["mill"], ["mill"], []]
    assert any("mill is back" in s.detail for s in heard.steps("gather"))


def test_a_party_whose_client_was_restarted_in_the_midst_of_a_job_is_seen_by_two_rounds(order: Order) -> None:
    """FLARE shows it as connected all the time; its part of the job is gone."""
    flare, heard = Flare(order, job(without="mill"), job()), Heard()
    followed(order, flare, heard)
    assert [len(e.dropouts) for e in heard if isinstance(e, RoundReport)] == [1, 1, 1, 0]


@pytest.mark.parametrize("case", ["away", "late", "not in this run"])
def test_no_job_ends_early_where_that_helps_nobody(order: Order, case: str) -> None:
    flare, heard = Flare(order, job(without="mill")), Heard()
    if case == "away":
        flare.parties -= {"mill"}
    if case == "not in this run":
        flare.before = lambda: files.write_json(
            order.project / "runs/r1/attestations.json", {"attestations": {"forge": {}, "foundry": {}}}
        )
    if case == "late":
        flare.scripts = [job()]
    followed(order, flare, heard)
    assert list(flare.submitted) == ["t-1"]


def test_a_party_that_is_lost_again_and_again_does_not_keep_the_run_from_ending(tmp_path: Path) -> None:
    order = conductor.order(tmp_path / "p", small.build(tmp_path / "c"), token="t", run_id=None, rounds=None, fresh=False)
    flare = Flare(order, job(40, without="mill"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "ROUNDS", 40)
        followed(order, flare)
    assert len(flare.submitted) == 1 + operate.MOST_YIELDS


# --- time ------------------------------------------------------------------------------------------------------------


def test_after_the_deadline_the_job_is_ended_and_what_was_done_is_kept(order: Order) -> None:
    flare, heard = Flare(order, job()), Heard()

    def hang() -> None:
        if heard.rounds == [0, 1]:
            flare.running = None

    flare.before = hang
    with pytest.raises(ServiceError, match=r"is not done after 0.5 s \(rounds, 2 rounds done\)"):
        followed(order, flare, heard, deadline_s=0.5)
    assert flare.aborted == ["job-1"]
    flare.before = lambda: None
    followed(order, flare, heard)
    assert list(flare.submitted) == ["t-1", "t-2"]
    assert heard.rounds[-1] == ROUNDS - 1


# --- orders ----------------------------------------------------------------------------------------------------------


def test_an_order_is_named_by_plan_and_day_until_it_is_closed(order: Order) -> None:
    project, consortium = order.project, order.folder / "consortium.yaml"

    def token(now: datetime = NOW, **given: Any) -> str:
        return place(project, consortium, now, **given).token

    first = token()
    assert first.endswith("-20260301")
    assert token() == first, "the same again goes on"
    assert token(run_id="mine") == f"{first}-2"
    assert token(rounds=9)[:8] != first[:8], "another plan"
    assert token(NOW.replace(day=2))[-8:] == "20260302"
    assert token(token="mine") == "mine"
    for done in (first, f"{first}-2"):
        Note(0.0, closed=True).save(Order.load(project, done))
    assert token() == f"{first}-3", "after its end comes a new one"
    operate.reopen(project, first)
    assert token() == first
    assert token(fresh=True) == f"{first}-4"


# --- with the real conductor -----------------------------------------------------------------------------------------

BAD_CELL, FORMULA, HARDNESS = "canary-cell-4Q7", "Cu0.51237Fe0.48763", 431.98765432


class World:
    """Three organisations with a folder each, and an operator with one, all below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.consortium = small.build(root / "companies", rounds=ROUNDS)
        lab = root / "companies/mill/lab.csv"
        lab.write_text(lab.read_text() + f"{FORMULA},25,{HARDNESS!r}\nCu0.5Fe0.5,25,{BAD_CELL}\n")
        self.project = root / "operator"
        provision.init(self.consortium, self.project, host="localhost", now=datetime.now(UTC))
        self.file = self.project / "consortium.yaml"
        self.parties = {site: self._party(site) for site in SITES}
        self.messages: list[bytes] = []

    def _party(self, site: str) -> Path:
        home = self.root / "parties" / site
        names = {"schema": "fedmat/party/1", "party": site, "kind": "site", "organisation": site, "consortium": "small-alloys"}
        site_file = self.root / "companies" / site / "site.yaml"
        files.write_json(home / "party.json", {**names, "host": "localhost", "port": 1, "site_file": str(site_file)})
        (home / "consortium.yaml").write_bytes(self.consortium.read_bytes())
        files.write_atomic(home / pipeline.SECRET, b"5c" * 32, private=True)  # members hand it to each other
        prepare_party.fn(str(home))
        return home

    def job(self, order: Order, name: str) -> Generator[None]:
        """What the server's job process does, with the sites asked from here instead of over the network."""
        world = self

        class Recorder(InProcessEngine):
            def exchange(self, data: Mapping[str, bytes], deadline_s: float) -> Sequence[tuple[bytes | Failure, float]]:
                found = super().exchange(data, deadline_s)
                world.messages += [*data.values(), *(reply for reply, _ in found if isinstance(reply, bytes))]
                return found

        handlers = {}
        for site, home in self.parties.items():
            run = Party.load(home).run(order.consortium)
            handlers[site] = pipeline._handler_or_refusal(run, site)
        with suppress(FedmatError):
            Federate(order.token).work(Recorder(handlers), self.project, name)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def flare(world: World, monkeypatch: pytest.MonkeyPatch) -> Flare:
    flare = Flare(None, world.job)
    monkeypatch.setattr("fedmat.federation.flare.Session", lambda admin: flare.session())
    monkeypatch.setattr("flows.operate.Patience.ask", 0.0)
    return flare


def test_rounds_between_folders_end_in_the_same_model_and_wait_for_a_registry(
    world: World, flare: Flare, monkeypatch: pytest.MonkeyPatch
) -> None:
    for site, home in world.parties.items():
        shutil.copytree(home / "sites" / site, world.root / "here/sites" / site)
    here = pipeline.open_run(world.consortium, home=world.root / "here")
    list(pipeline.train(here))
    expected = files.sha256_file(here.folder / pipeline.MODEL)

    def registry(run: pipeline.Run, tracking_uri: str | None) -> Registered:
        del tracking_uri
        if not flare.up:
            return Registered("fedmat-small-hardness", 1, "0", (), "0", "sqlite:///x")
        raise ServiceError("MLflow does not answer")

    monkeypatch.setattr(pipeline, "publish", registry)
    heard = Heard()
    given: dict[str, Any] = {"project": world.project, "orchestrator": "none", "on_event": heard}
    with pytest.raises(ServiceError, match="registration is pending: MLflow does not answer") as caught:
        run_all(world.file, **given)
    assert heard.rounds == list(range(ROUNDS))
    assert not [e for e in heard if isinstance(e, Step) and e.site], "the operator prepared a site's data"
    model = world.project / "runs" / here.folder.name / "model.safetensors"
    assert str(model) in str(caught.value)
    assert files.sha256_file(model) == expected
    flare.up = False  # nothing is asked of the server any more
    outcome = run_all(world.file, **given)
    assert outcome.registered is not None
    assert (outcome.model_sha256, outcome.run.folder) == (expected, model.parent)
    assert len(flare.submitted) == 1
    flare.up = True
    assert run_all(world.file, register=False, **given).model_sha256 == expected
    assert len(flare.submitted) == 2, "after that order's end the sites are asked anew which data they have"


def test_a_folder_that_is_no_project_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="not a project folder"):
        run_all(world.file, project=tmp_path, orchestrator="none")


@pytest.mark.slow
def test_the_operators_prefect_gets_no_value_no_path_of_a_site_and_no_message(
    world: World, flare: Flare, server: Server
) -> None:
    with server.configured():
        outcome = run_all(world.file, project=world.project, register=False, fresh=True)
        assert outcome.orchestrator.name == "prefect"
        for site in ("mill", "forge"):
            files.write_json(world.parties[site] / "sites" / site / pipeline.REFUSED, {"what": BAD_CELL, "fix": ""})
        try:
            with pytest.raises(FedmatError, match="mill refused"):
                run_all(world.file, project=world.project, register=False, fresh=True)
        finally:
            for site in ("mill", "forge"):
                (world.parties[site] / "sites" / site / pipeline.REFUSED).unlink()
    held = server.everything()
    assert outcome.run.folder.name.encode() in held, "the search would find nothing because nothing is there"
    assert b"mill refused" in held
    for word in (BAD_CELL, FORMULA, "431.98765", str(world.root / "parties"), str(world.root / "companies")):
        assert word.encode() not in held, word
    assert struct.pack("<d", HARDNESS) not in held
    assert len(world.messages) > 100
    pieces = {m[i : i + 32] for m in world.messages if len(m) > 3000 for i in range(len(m) // 2, len(m) - 32, len(m) // 7)}
    assert len(pieces) > 100
    assert not [p for p in pieces if p.strip(b"\0") and p in held]


@pytest.mark.slow
def test_a_deployments_failed_run_leaves_a_page_and_a_line(world: World, server: Server, tmp_path: Path) -> None:
    """The hook gets the run as Prefect hands it over; runs that a person started raise no alarm."""
    from prefect.client.orchestration import get_client

    from flows.federate import consortium_run

    missing = tmp_path / "p"
    missing.mkdir()
    with server.configured(), get_client(sync_client=True) as client:
        deployment = consortium_run.to_deployment("alarms", parameters={})
        identity = deployment.apply()
        given = {"consortium": str(world.file), "project": str(missing)}
        scheduled = client.create_flow_run_from_deployment(identity, parameters=given)
        from prefect.flow_engine import run_flow_sync

        run_flow_sync(consortium_run, flow_run=scheduled, parameters=given, return_type="state")
        with pytest.raises(FedmatError):
            consortium_run(**given)
        pages = [a for a in client.read_artifacts() if a.flow_run_id == scheduled.id and a.type == "markdown"]
    (line,) = (missing / ALERTS).read_text().splitlines()
    row = json.loads(line)
    assert row["kind"] == "StateError"
    assert "not a project folder" in row["what"]
    assert set(row) == {"time", "flow_run", "kind", "what", "fix"}
    assert len(pages) == 1
    assert "not a project folder" in str(pages[0].data)


def test_what_a_site_states_of_its_readiness_is_in_its_own_folder(world: World) -> None:
    assert all((home / READY).exists() for home in world.parties.values())
    assert not list(world.project.rglob(READY))
