"""A rehearsal on one machine: a throw-away consortium with real certificates, its server and its parties as processes of their own.

Knows: provisioning, the processes and their clean end. Refuses to know: what a round is. What runs here is what runs between organisations:
the same kits, the same FLARE, the same desks; only the machine is one, and the desks share their imports.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver as forkserver
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fedmat.telemetry  # noqa: F401  before anything that phones home is imported
from fedmat import conductor, files, pipeline
from fedmat.conductor import Order
from fedmat.config import load_consortium
from fedmat.envelopes import ROLES
from fedmat.errors import ConfigError, FedmatError, ServiceError
from fedmat.federation.flare import Session
from fedmat.federation.plan import Plan
from fedmat.federation.rounds import role_names
from fedmat.party import Party
from fedmat.pipeline import KEYS, SECRET, Run
from flows import parties
from flows.services import Child

HOST = "localhost"
_CONNECTED_S = 180.0
_GRACE_S = 2.0  # for all processes together; then they are killed
Say = Callable[[str], None]


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal measured.

    Attributes:
        run: the finished run; its folder is gone unless the rehearsal was kept.
        metrics: the run's metrics.json.
        reports: the round reports.
        seconds: phase -> seconds since the command began.
        memory: kind of process -> largest proportional set size, bytes, and the largest sum over all processes as ``all``.
    """

    run: Run
    metrics: dict[str, Any]
    reports: list[dict[str, Any]]
    model_sha256: str
    seconds: dict[str, float]
    memory: dict[str, int]


class Stage:
    """A provisioned consortium on this machine: the operator's folder and one folder per party.

    Args:
        consortium_file: the consortium; its members' site files are read where they are.
        folder: is made; everything lies below it.
    """

    def __init__(self, consortium_file: Path, folder: Path, *, rounds: int | None = None) -> None:
        self.folder = folder.resolve()
        self.project = self.folder / "operator"
        self.port = parties.free_port()
        self.config_file = self.folder / conductor.CONSORTIUM
        source = Path(consortium_file).resolve()
        settings = load_consortium(source)
        files.write_atomic(self.config_file, conductor.with_rounds(source.read_bytes(), rounds))
        self.config = load_consortium(self.config_file)
        self.plan = Plan.of(self.config)
        self.sites = self.config.roster
        self.roles = role_names(self.plan)
        self._site_files = {m.site: (source.parent / m.file).resolve() for m in settings.members}
        if settings.reference is not None:
            self._site_files[pipeline.REFERENCE] = (source.parent / settings.reference).resolve()
        self.children: dict[str, Child] = {}
        self._desks: dict[str, Any] = {}
        self._context: Any = None

    @property
    def parties(self) -> tuple[str, ...]:
        """All parties but the operator."""
        return (*self.sites, *self.roles)

    def home(self, party: str) -> Path:
        """A party's folder."""
        return self.folder / "parties" / party

    def provision(self, now: datetime) -> None:
        """Makes certificates and kits, joins every party; of a simulated consortium also the charter, keys and the ledger."""
        from fedmat import accounts, keys, provision

        if not self.config.simulated and self.plan.settings.security.mode != "none":
            raise ConfigError(
                f"{self.config.name}: is no simulated consortium, and a rehearsal makes keys for everyone",
                fix="rehearse with a copy that says simulated: true",
            )
        charter: bytes | None = None
        if self.config.simulated:
            names = {m.site: m.organisation for m in self.config.members}
            roles = ROLES if self.plan.settings.security.mode != "none" else ()
            found = keys.rehearsal(
                self.config.name, self.sites, names, lambda p: self.folder / KEYS / p, now.date(), roles=roles
            )
            charter = files.json_bytes(found.model_dump(mode="json"))
        folders = {p: (self.home(p), self._site_files.get(p)) for p in self.parties}
        provision.rehearsal(self.config_file, self.project, folders, host=HOST, port=self.port, now=now, charter=charter)
        if charter:
            signing = {s: keys.load(self.folder / KEYS / s, s) for s in self.sites}
            accounts.begin(accounts.Books(self.project, self.config.name), self.config, found, signing, now)
        for party in self.parties if charter else ():
            if (self.folder / KEYS / party).exists():  # a party without keys of its own: the reference rows
                own = Run(self.config_file, self.home(party)).party_folder(party) / KEYS
                own.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                shutil.move(self.folder / KEYS / party, own)

    def account(self, run: Run, now: datetime) -> None:
        """Writes the finished run into the ledger; every site's witness cosigns."""
        from fedmat import accounts, keys

        if not self.config.simulated:
            return
        own = {}
        for site in self.sites:
            workspace = Run(self.config_file, self.home(site)).party_folder(site)
            own[site] = (keys.load(workspace / KEYS, site), workspace / accounts.WITNESS)
        pipeline.account(run, now, witnesses=own)

    def start_network(self) -> None:
        """Starts the FLARE server and every party's FLARE client."""
        self.children["server"] = parties.server_child(self.project)
        for party in self.parties:
            self.start_client(party)

    def start_client(self, party: str) -> None:
        """Starts, or starts again, a party's FLARE client."""
        self.children[party] = parties.client_child(self.home(party))

    def import_once(self) -> None:
        """Starts the process that desks are copied from, and returns before its imports are done."""
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["flows.forked"])
        with _deaf_to_ctrl_c():  # inherited: a terminal's Ctrl-C reaches the whole group, and this process ends the others
            forkserver.ensure_running()  # it imports while we go on

    def start_desk(self, party: str) -> None:
        """Starts, or starts again, a party's desk."""
        from flows import forked

        parties.forget_desk(self.home(party))
        process = self._context.Process(target=forked.main, args=(self.home(party),))
        process.start()
        self._desks[party] = process

    def share_secret(self) -> None:
        """Makes the members' secret and hands it to every site, as their people would."""
        from fedmat.data import matching

        made = matching.load_or_create_secret(self.folder / SECRET).hex().encode()
        for site in self.sites:
            files.write_atomic(self.home(site) / SECRET, made, private=True)

    def prepare(self, site: str) -> None:
        """Does at a site what its own schedule does there: ingest, validate, featurize."""
        run = Party.load(self.home(site)).run()
        with suppress(FedmatError):  # a site that is refused takes no part, and says so when it is asked
            pipeline.prepare_site(run, site)
            pipeline.featurize_site(run, site)

    def desk_pid(self, party: str) -> int:
        """Returns the process id of a party's desk."""
        return int(self._desks[party].pid)

    def stop(self, party: str) -> None:
        """Ends a party's processes, as when its machine is switched off."""
        self.children.pop(party).stop(2.0)
        parties.end_jobs(self.home(party))
        self.stop_desk(party)

    def stop_desk(self, party: str) -> None:
        """Ends a party's desk and what it started."""
        process = self._desks.pop(party)
        _end_group(process.pid)
        process.join(5.0)
        parties.forget_desk(self.home(party))

    def close(self) -> None:
        """Ends everything that was started."""
        for child in self.children.values():
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
        for party in list(self._desks):
            self.stop_desk(party)
        until = time.monotonic() + _GRACE_S
        for child in self.children.values():
            child.stop(max(0.05, until - time.monotonic()))
        for folder in (self.project, *(self.home(p) for p in self.parties)):
            parties.end_jobs(folder)
        self.children.clear()
        if self._context is not None:
            with suppress(Exception):
                forkserver._forkserver._stop()  # type: ignore[attr-defined]  # there is no public way to end it
            self._context = None

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        from flows.serve import signals_ignored

        with signals_ignored():
            self.close()


def rehearse(
    consortium_file: Path,
    *,
    rounds: int | None = None,
    keep: Path | None = None,
    say: Say = lambda _: None,
    on_event: Callable[[Any], None] | None = None,
) -> Rehearsal:
    """Provisions a throw-away consortium, runs its rounds over FLARE with mutual TLS on loopback, and tears everything down.

    Args:
        keep: folder to leave everything in; None: a temporary one that is removed.
        on_event: gets the round reports.

    Raises:
        ConfigError, PlanRefused: the consortium file is wrong.
        ServiceError, RoundFailed: what a run between organisations would raise.
    """
    from flows import operate
    from flows.serve import stopped_by_signal

    started = time.monotonic()
    seconds: dict[str, float] = {}

    def reached(phase: str) -> None:
        seconds[phase] = round(time.monotonic() - started, 2)
        say(f"{seconds[phase]:6.1f} s  {phase}")

    with _folder(keep) as folder, stopped_by_signal():
        stage = Stage(consortium_file, folder, rounds=rounds)
        with stage, _Memory(stage) as memory, ExitStack() as sessions:
            stage.import_once()
            stage.provision(datetime.now(UTC))
            reached("provisioned")
            stage.start_network()
            reached("processes started")
            order = conductor.order(stage.project, stage.config_file, token="rehearsal", run_id=None, rounds=None, fresh=False)
            following = _Thread(
                lambda: operate.follow(  # the job starts while the sites prepare
                    order,
                    session=lambda: sessions.enter_context(Session(stage.project / "admin")),  # ends before its server
                    on_event=on_event or (lambda _: None),
                    patience=operate.Patience(quorum=_CONNECTED_S, rest=_CONNECTED_S, ask=0.5, look=0.1),
                )
            )
            stage.share_secret()
            for site in stage.sites:
                stage.prepare(site)
            reached("sites prepared")
            for party in stage.parties:
                stage.start_desk(party)
            finished = following.result()
            reached("rounds, baselines and evaluation done")
            run = finished.run()
            stage.account(run, datetime.now(UTC))
            result = Rehearsal(
                run=run,
                metrics=files.read_json(run.folder / pipeline.METRICS),
                reports=run.reports(),
                model_sha256=files.sha256_file(run.folder / pipeline.MODEL),
                seconds=seconds,
                memory=memory.most,
            )
        reached("everything stopped")
    return result


class _Thread(threading.Thread):
    """Work beside this thread's own; Ctrl-C ends the wait for it, and the process does not wait for it at its end."""

    def __init__(self, work: Callable[[], Order]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._made: Order | Exception | None = None
        self.start()

    def run(self) -> None:
        """See :class:`threading.Thread`."""
        try:
            self._made = self._work()
        except Exception as error:  # told by result()  # noqa: BLE001
            self._made = error

    def result(self) -> Order:
        """Returns what the work returned, or raises what it raised."""
        while self.is_alive():
            self.join(0.2)
        if not isinstance(self._made, Order):
            raise self._made or ServiceError("the order was not followed to its end")
        return self._made


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        if any(keep.iterdir()):
            raise ConfigError(f"{keep}: is not empty", fix="name a new folder with --keep")
        yield keep
        return
    folder = Path(tempfile.mkdtemp(prefix="fedmat-rehearsal-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end_group(pid: int) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, sign)
        with suppress(ProcessLookupError):
            os.kill(pid, sign)


class _Memory:
    """Looks at the memory of a rehearsal's processes now and then (Linux; elsewhere it finds nothing)."""

    def __init__(self, stage: Stage, every_s: float = 1.0) -> None:
        self.most: dict[str, int] = {}
        self._marker, self._every = str(stage.folder), every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            total = 0
            for kind, size in _sizes(self._marker):
                self.most[kind] = max(self.most.get(kind, 0), size)
                total += size
            self.most["all"] = max(self.most.get("all", 0), total)


def _sizes(marker: str) -> Iterator[tuple[str, int]]:
    """Gives (kind, proportional set size) of every process that belongs to this one or works below ``marker``."""
    family = _family()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if int(entry.name) not in family and marker not in command:
                continue
            rollup = (entry / "smaps_rollup").read_text()
            size = 1024 * int(next(line for line in rollup.splitlines() if line.startswith("Pss:")).split()[1])
            yield _kind(command), size


def _family() -> set[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    found, grew = {os.getpid()}, True
    while grew:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        found |= more
        grew = bool(more)
    return found


def _kind(command: str) -> str:
    for mark, kind in (
        ("server_train", "server"), ("runner_process", "server job"), ("client_train", "client"), ("worker_process", "client job"),
        ("forkserver", "desk or training"), ("resource_tracker", "other"), ("flows.desk", "desk or training"),
    ):  # fmt: skip
        if mark in command:
            return kind
    return "the command itself"
