"""An order for rounds, as the operator writes it and as the FLARE server carries it out.

Knows: the operator's project folder, orders and their states, the steps of a run that need the sites. Refuses to know: FLARE's
inside (``fedmat.federation.flare``), Prefect, schedules.

An order is written before it is submitted and its state while it is carried out, both as files: whoever follows it may be
stopped and started again, and so may the server.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from fedmat import files, pipeline
from fedmat._version import __version__
from fedmat.domain import Attestation, AttestRequest
from fedmat.errors import FedmatError, StateError
from fedmat.federation import flare
from fedmat.federation.engine import Engine
from fedmat.federation.plan import Plan
from fedmat.pipeline import Run

CONSORTIUM, ORDERS, CHARTER = "consortium.yaml", "orders", "charter.json"
_ORDER, _STATE, _YIELD = "order.json", "state.json", "yield"
_LOCK_S = 120.0


@dataclass(frozen=True)
class Order:
    """What the operator wants done.

    Attributes:
        project: the operator's project folder; it is the workspace of the runs as well.
        token: name of the order; the same token is the same order.
        run_id: None until the sites have said which data they have; then it stays, whoever is away later.
        fresh: throw away this run's earlier rounds.
    """

    project: Path
    token: str
    run_id: str | None = None
    rounds: int | None = None
    fresh: bool = False

    @property
    def folder(self) -> Path:
        """Where the order, its consortium file, its job and its state lie."""
        return self.project / ORDERS / self.token

    @property
    def consortium(self) -> bytes:
        """The consortium file of this order."""
        return (self.folder / CONSORTIUM).read_bytes()

    @property
    def for_parties(self) -> bytes:
        """The consortium file as the parties get it: with this order's number of rounds, which is part of the plan."""
        return with_rounds(self.consortium, self.rounds)

    def run(self) -> Run:
        """Returns the run this order is about."""
        charter = self.project / CHARTER
        return Run(
            self.folder / CONSORTIUM, self.project, self.run_id, self.rounds, None, charter if charter.exists() else None
        )

    def save(self) -> None:
        """Writes the order."""
        kept = {"run_id": self.run_id, "rounds": self.rounds, "fresh": self.fresh}
        files.write_json(self.folder / _ORDER, kept)

    @classmethod
    def load(cls, project: Path, token: str) -> Order:
        """Reads an order.

        Raises:
            StateError: there is none of that name.
        """
        path = project / ORDERS / token / _ORDER
        if not path.exists():
            raise StateError(f"{project}: there is no order {token}", fix="fedmat run CONSORTIUM --project P")
        return cls(project.resolve(), token, **files.read_json(path))

    @property
    def state(self) -> dict[str, Any]:
        """How far it is: ``state`` is ``new``, ``running``, ``done``, ``failed`` or ``yielded``; see :class:`Federate`."""
        path = self.folder / _STATE
        found: dict[str, Any] = files.read_json(path) if path.exists() else {"state": "new"}
        return found

    def note(self, **values: Any) -> None:
        """Writes how far it is."""
        files.write_json(self.folder / _STATE, self.state | values | {"at": datetime.now(UTC).isoformat(timespec="seconds")})

    def ask_to_yield(self) -> None:
        """Asks the job to end after its present round, so that the next job starts with parties that came back."""
        files.write_atomic(self.folder / _YIELD, b"")

    def write_job(self, attempt: int) -> Path:
        """Writes the FLARE job of an attempt at this order and returns its folder."""
        (self.folder / _YIELD).unlink(missing_ok=True)
        return flare.write_job(
            self.folder / f"job-{attempt}",
            name=f"{self.run().config().name}-{self.token}-{attempt}",
            conductor="fedmat.conductor.Federate",
            order=self.token,
            consortium=self.for_parties,
            stated=versions(),
            least=1,
        )


def order(project: Path, consortium_file: Path, *, token: str, run_id: str | None, rounds: int | None, fresh: bool) -> Order:
    """Writes an order, or finds the one of that token.

    Raises:
        ConfigError, PlanRefused: the consortium file is wrong.
        StateError: the token names an order of another consortium file.
    """
    wanted = Order(project.resolve(), token, run_id, rounds, fresh)
    data = Path(consortium_file).read_bytes()
    kept = wanted.folder / CONSORTIUM
    if (wanted.folder / _ORDER).exists():
        if kept.read_bytes() != data:
            raise StateError(f"order {token} is for another consortium file", fix="use another token")
        return Order.load(project, token)
    files.write_atomic(kept, data)
    wanted.run().plan()
    wanted.save()
    return wanted


def with_rounds(consortium: bytes, rounds: int | None) -> bytes:
    """Returns a consortium file that says another number of rounds; None: as it is."""
    if rounds is None:
        return consortium
    document = yaml.safe_load(consortium)
    document.setdefault("plan", {})["rounds"] = rounds
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode()


def versions() -> dict[str, str]:
    """Returns what a coordinator tells the parties it runs."""
    from fedmat.data.contract import CONTRACT_VERSION

    return {"fedmat": __version__, "contract": CONTRACT_VERSION}


class Federate(flare.Conductor):
    """Carries an order out: rounds, baselines, evaluation, each going on where it stopped."""

    def work(self, engine: Engine, project: Path, job: str) -> None:
        """See :class:`fedmat.federation.flare.Conductor`."""
        wanted = Order.load(project, self.order)
        wanted.note(state="running", job=job, pid=os.getpid(), error=None)
        try:
            with _with_files(wanted, engine, self.stop_if_told) as engine:
                if wanted.run_id is None:
                    wanted = dataclasses.replace(wanted, run_id=_name(wanted.run(), engine))
                    wanted.save()
                run = wanted.run()
                with _alone(run.folder):
                    self._steps(wanted, run, engine)
        except flare.Stopped:
            wanted.note(state="yielded")
        except FedmatError as error:
            wanted.note(
                state="failed",
                error={"kind": type(error).__name__, "what": error.what, "fix": error.fix, "exit_code": error.exit_code},
            )
            raise
        except Exception as error:
            wanted.note(
                state="failed",
                error={
                    "kind": "FedmatError",
                    "what": f"unexpected {type(error).__name__}",
                    "fix": "see the server's log",
                    "exit_code": 1,
                },
            )
            raise

    def _steps(self, wanted: Order, run: Run, engine: Engine) -> None:
        wanted.note(run_id=run.run_id, phase="rounds")
        fresh = wanted.fresh
        if fresh:  # once: an attempt that follows goes on
            dataclasses.replace(wanted, fresh=False).save()
        for report in pipeline.train(run, resume=not fresh, engine=engine):
            wanted.note(round=report.round + 1)
            if (wanted.folder / _YIELD).exists() and report.round + 1 < report.rounds:
                wanted.note(state="yielded")
                return
        wanted.note(phase="baselines")
        pipeline.baselines(run, engine=engine)
        wanted.note(phase="evaluate")
        found = pipeline.evaluate(run, engine=engine)
        wanted.note(phase="statements")
        pipeline.statements(run, engine=engine)
        wanted.note(state="done", phase="done", model_sha256=found["model"]["sha256"])


@contextmanager
def _with_files(wanted: Order, engine: Engine, check: Callable[[], None]) -> Iterator[Engine]:
    """Gives the engine, with the sites that have no sockets asked by files that a person carries (``fedmat.federation.drop``)."""
    from fedmat import credentials, provision
    from fedmat.federation.drop import DropEngine, Split

    run = wanted.run()
    config = run.config()
    members = provision.read_project(wanted.project).members
    carried = [
        m.site for m in config.members if m.transport == "files" and m.site in members and members[m.site].state == "admitted"
    ]
    if not carried:
        yield engine
        return
    kit = wanted.project / "server" / "startup"
    drop = DropEngine(
        wanted.project / "drop",
        carried,
        consortium=config.name,
        consortium_file=wanted.for_parties,
        run_folder=wanted.folder,
        credential=credentials.load(kit / "server.crt", kit / "server.key"),
        root=(kit / "rootCA.pem").read_bytes(),
        now=lambda: datetime.now(UTC),
        versions=versions(),
        check=check,
        on_wait=lambda waiting: wanted.note(carry=[{"party": w.party, "file": str(w.path)} for w in waiting]),
    )
    with drop:
        yield Split(drop, carried, engine)


def _name(run: Run, engine: Engine) -> str:
    """Asks the sites which data they have and returns the name of the run of this plan on these data."""
    plan: Plan = run.plan()
    found = engine.broadcast(AttestRequest(plan.sha256), plan.roster, plan.settings.deadline_s)
    data = {d.site: d.answer.dataset_sha256 for d in found if isinstance(d.answer, Attestation)}
    return pipeline.name_of(plan, data)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the run's folder; the job of a server that was killed may need a while to notice."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        until = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > until:
                    raise StateError(f"{folder}: another job works on this run", fix="end that job first") from None
                time.sleep(0.5)
        yield
