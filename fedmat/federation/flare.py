"""NVIDIA FLARE as an engine: it carries bytes between organisations, and that is all it is trusted with.

Knows: FLARE's controller, executor, filter and admin session; the job folder, which holds settings and never code. Refuses to know:
what is in the bytes, rounds, records. The only module that imports nvflare.

Requests are pushed to a party's job process as FLARE tasks (so that the party's own filters see every answer) over the channel that
the party opened; nobody polls. The party's job process holds no data: it hands the bytes to the party's desk on the same machine.

References: NVIDIA FLARE 2.9 programming guide; measured behaviour in ``docs/adr/0008-flare-carries-bytes.md``.
"""

from __future__ import annotations

import abc
import base64
import contextlib
import io
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from nvflare.apis.app_validation import AppValidator
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.filter import Filter
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ReservedTopic, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.fuel.f3.cellnet.defs import IdentityChallengeKey

from fedmat import files
from fedmat.domain import Dropout, Rejection
from fedmat.envelopes import ROLES
from fedmat.errors import FedmatError, PolicyRefused, ServiceError
from fedmat.federation.engine import Engine, Failure, frame, unframe

TASK = "exchange"
_REQUEST, _REPLY = "request", "reply"
_FIRST_S = 90.0  # a party's job process may need this long to start; later a party that cannot be reached is one
_AGAIN_S = 3.0
_THERE = "fedmat.there"  # asked while a party works: FLARE itself waits out the deadline for one that was switched off
_LOOK_S, _MISSES = 2.0, 3  # patience with one such question, and how many may stay without an answer
_DESK_S = 60.0  # a party's desk may need this long to be there
_NOT_THERE = (ReturnCode.COMMUNICATION_ERROR, ReturnCode.TOPIC_UNKNOWN, ReturnCode.SERVER_NOT_READY)
OPERATOR = "operator@fedmat.local"  # as in kits; their module reaches what sees records, and this one may not


class Stopped(FedmatError):
    """The job was told to end before its work was done; what was done is kept."""


def stop_if_told(abort: Signal) -> None:
    """Checks whether a job is being ended.

    Raises:
        Stopped: it is.
    """
    if abort.triggered:
        raise Stopped("the job was ended", fix="run it again: it goes on where it stopped")


# --- at the coordinator --------------------------------------------------------------------------------------------


class FlareEngine(Engine):
    """Sends requests to parties through a running FLARE job."""

    side_by_side = True

    def __init__(self, server: Any, abort: Signal) -> None:
        self._server, self._abort = server, abort
        self._met: set[str] = set()
        self._gone: set[str] = set()  # parties whose job process did not answer last time: asked whether they are there first

    def exchange(self, data: Mapping[str, bytes], deadline_s: float) -> Sequence[tuple[bytes | Failure, float]]:
        """See :class:`Engine`. All parties work at once, each against its own deadline.

        Raises:
            Stopped: the job is being ended.
        """
        with ThreadPoolExecutor(max_workers=max(1, len(data))) as pool:
            found = list(pool.map(lambda party: self._one(party, data[party], deadline_s), data))
        stop_if_told(self._abort)
        return found

    def _one(self, party: str, request: bytes, deadline_s: float) -> tuple[bytes | Failure, float]:
        patience = time.monotonic() + (_AGAIN_S if party in self._met else _FIRST_S)
        while True:
            started = time.perf_counter()
            reply = self._send(party, request, deadline_s)
            seconds = time.perf_counter() - started
            if reply is not None and reply.get_return_code() not in _NOT_THERE:
                self._met.add(party)
                return _read(party, reply, deadline_s), seconds
            if self._abort.triggered or (party in self._gone and party in self._met) or time.monotonic() > patience:
                self._met.add(party)
                return Dropout(party, "unreachable", "not connected"), seconds
            time.sleep(0.1)

    def _send(self, party: str, request: bytes, deadline_s: float) -> Shareable | None:
        """Returns the party's reply; None where it is not connected, or went away while it worked."""
        task = Shareable()
        task[_REQUEST] = request
        task.set_header(ReservedHeaderKey.TASK_NAME, TASK)
        task.set_header(ReservedHeaderKey.TASK_ID, str(uuid.uuid4()))
        if party in self._gone and not self._there(party):
            return None
        self._gone.discard(party)
        found: list[Shareable | None] = []
        sending = threading.Thread(
            target=lambda: found.append(self._ask(party, ReservedTopic.DO_TASK, task, deadline_s)), daemon=True
        )
        sending.start()
        misses = 0
        while misses < _MISSES:
            sending.join(_LOOK_S)
            if not sending.is_alive():
                return found[0] if found else None
            misses = 0 if self._there(party) else misses + 1
        self._gone.add(party)
        return None

    def _there(self, party: str) -> bool:
        """Whether a party's job process answers: its FLARE client alone, started again without a job, does not count."""
        reply = self._ask(party, _THERE, Shareable(), _LOOK_S)
        return reply is not None and reply.get_return_code() in (ReturnCode.OK, ReturnCode.TOPIC_UNKNOWN)

    def _ask(self, party: str, topic: str, request: Shareable, timeout_s: float) -> Shareable | None:
        with self._server.new_context() as context:
            if self._server.get_client_from_name(party) is None:
                return None
            replies = self._server.send_aux_request(
                targets=[party], topic=topic, request=request, timeout=timeout_s, fl_ctx=context, optional=True
            )
        found: Shareable | None = (replies or {}).get(party)
        return found


def _read(party: str, reply: Shareable, deadline_s: float) -> bytes | Failure:
    code = reply.get_return_code()
    if code == ReturnCode.TIMEOUT:
        return Dropout(party, "late", f"no answer within {deadline_s:g} s")
    if code != ReturnCode.OK:
        return Dropout(party, "crashed", f"its FLARE client answers {code}")
    data = reply.get(_REPLY)
    if not isinstance(data, bytes):
        return Rejection(party, "malformed", "the answer holds no bytes")
    return unframe(party, data)


class Conductor(Controller, abc.ABC):  # type: ignore[misc]
    """FLARE's controller: gives a subclass an engine and lets it work; decides nothing.

    Args:
        order: name of what is to be done; a subclass knows where it is written.
    """

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self._abort = Signal()

    def stop_if_told(self) -> None:
        """Checks whether the job is being ended.

        Raises:
            Stopped: it is.
        """
        stop_if_told(self._abort)

    @abc.abstractmethod
    def work(self, engine: Engine, project: Path, job: str) -> None:
        """Does the job; ``project`` is the operator's project folder."""

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Nothing to do: see FLARE's Controller."""

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Nothing to do: see FLARE's Controller."""

    def process_result_of_unknown_task(self, *_: Any, **__: Any) -> None:
        """Nothing arrives by this road: see FLARE's Controller."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Runs :meth:`work`; an error of it ends the job as failed."""
        self._abort = abort_signal
        engine = FlareEngine(self._engine, abort_signal)
        try:
            self.work(engine, workspace(fl_ctx).parent, fl_ctx.get_job_id())
        except FedmatError as error:
            self.system_panic(error.what, fl_ctx)


def workspace(fl_ctx: FLContext) -> Path:
    """Returns the folder FLARE was started in."""
    return Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir()).resolve()


class Doorkeeper(FLComponent):  # type: ignore[misc]
    """In the server: turns away a party whose certificate was revoked, before FLARE looks at who it is.

    Args:
        revoked: file with the serial numbers.
    """

    def __init__(self, revoked: str) -> None:
        super().__init__()
        self._revoked = Path(revoked)
        self._watched: Any = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """See FLARE's FLComponent. The event comes before the check of the certificate, but without the certificate."""
        if event_type != EventType.CLIENT_REGISTER_RECEIVED:
            return
        manager = fl_ctx.get_engine().server.client_manager
        if manager is self._watched:
            return
        self._watched = manager
        check = manager.authenticated_client

        def authenticated_client(request: Any, fl_ctx: FLContext, client_type: Any) -> Any:
            shown = request.payload.get(IdentityChallengeKey.CERT) if isinstance(request.payload, Shareable) else None
            if shown and self._is_revoked(shown):
                self.logger.error(f"turned away {request.get_header('client_name')}: its certificate was revoked")
                return None
            return check(request, fl_ctx, client_type)

        manager.authenticated_client = authenticated_client

    def _is_revoked(self, shown: bytes) -> bool:
        serial = x509.load_pem_x509_certificates(shown)[0].serial_number
        return f"{serial:x}" in {str(s).lower().lstrip("0") for s in files.read_json(self._revoked)["serials"]}


# --- at a party ----------------------------------------------------------------------------------------------------


class Relay(Executor):  # type: ignore[misc]
    """In a party's job process: hands requests to the party's desk and its answers back.

    Args:
        consortium: the consortium file the coordinator runs, base64.
        stated: versions at the coordinator.
    """

    def __init__(self, consortium: str, stated: dict[str, str]) -> None:
        super().__init__()
        self._consortium, self._stated = base64.b64decode(consortium), stated

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """See FLARE's FLComponent."""
        if event_type == EventType.START_RUN:
            fl_ctx.get_engine().register_aux_message_handler(_THERE, lambda **_: make_reply(ReturnCode.OK))

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """See FLARE's Executor."""
        from fedmat.federation import desk

        name = fl_ctx.get_identity_name()
        request = shareable.get(_REQUEST)
        if not isinstance(request, bytes):
            return make_reply(ReturnCode.BAD_TASK_DATA)
        patience = time.monotonic() + _DESK_S
        while True:
            try:
                data = desk.ask(
                    workspace(fl_ctx).parent, self._consortium, request, self._stated, lambda: bool(abort_signal.triggered)
                )
                break
            except InterruptedError:
                return make_reply(ReturnCode.TASK_ABORTED)
            except FedmatError:  # a desk that is being started again is asked again: the same request, the same answer
                if time.monotonic() > patience:
                    data = frame(
                        Dropout(name, "crashed", "the party's desk does not answer")
                    )  # the error's own text has a path
                    break
            time.sleep(0.2)
        reply = make_reply(ReturnCode.OK)
        reply[_REPLY] = data
        return reply


class OutboundFilter(Filter):  # type: ignore[misc]
    """In a party's job process, by the party's own privacy.json and whatever the job says: the last look at what leaves.

    Args:
        home: the party's folder; a site's has its policy, and one without a policy lets nothing out.
    """

    def __init__(self, home: str) -> None:
        super().__init__()
        self._home = Path(home)

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """See FLARE's Filter."""
        from fedmat import policy, wire

        name = fl_ctx.get_identity_name()
        data = shareable.get(_REPLY)
        if not isinstance(data, bytes):
            return make_reply(shareable.get_return_code())  # a failure of FLARE's own: nothing of the party's is in it
        reply = unframe(name, data)
        if isinstance(reply, bytes) and name not in (*ROLES, "reference"):
            try:
                policy.load(self._home / "policy.yaml").release(wire.kind_of(reply), len(reply))
            except PolicyRefused as error:
                reply = Rejection(name, "policy", error.what)
            except FedmatError as error:
                reply = Dropout(name, "refused", error.what)
        out = make_reply(ReturnCode.OK)  # only what was looked at goes on
        out[_REPLY] = frame(reply)
        return out


class Lockdown(FLComponent):  # type: ignore[misc]
    """In a party's FLARE client: takes away the commands by which a server could read its files and settings.

    FLARE's client asks its authorization rules only when the server's message says so, and checks no paths: a server whose program
    was changed could read any file. What is not there cannot be asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors

        known = ClientRequestProcessors.request_processors
        known[:] = [p for p in known if type(p).__name__ not in _TAKEN_AWAY]


_TAKEN_AWAY = frozenset(
    ("ShellCommandProcessor", "ReportEnvProcessor", "ConfigureSiteLogProcessor", "ConfigureJobLogProcessor")
)


class SettingsOnly(AppValidator):  # type: ignore[misc]
    """In a party's FLARE client: refuses a job that holds anything but its two configuration files, whoever submitted it."""

    def validate(self, app_folder: str) -> tuple[str, dict[str, Any]]:
        """See FLARE's AppValidator."""
        root = Path(app_folder)
        allowed = {"config/config_fed_client.json", "config/config_fed_server.json"}
        more = sorted(str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir() and p.name not in _SIGNATURES)
        odd = [name for name in more if name not in allowed]
        return (f"a job brings settings and nothing else; this one has {len(odd)} other files", {}) if odd else ("", {})


_SIGNATURES = frozenset((".__nvfl_sig.json", ".__nvfl_submitter.crt"))


# --- jobs and the admin session --------------------------------------------------------------------------------------


def write_job(
    folder: Path, *, name: str, conductor: str, order: str, consortium: bytes, stated: Mapping[str, str], least: int
) -> Path:
    """Writes a FLARE job that holds settings and no code, and returns its folder.

    Args:
        conductor: dotted name of a :class:`Conductor` that is installed at the server.
        least: parties that must be connected for the job to start.
    """
    server = {
        "format_version": 2,
        "server": {"task_request_interval": 2.0, "heart_beat_timeout": 600},
        "workflows": [{"id": "conductor", "path": conductor, "args": {"order": order}}],
        "components": [],
        "task_data_filters": [],
        "task_result_filters": [],
    }
    relay = {
        "path": "fedmat.federation.flare.Relay",
        "args": {"consortium": base64.b64encode(consortium).decode(), "stated": dict(stated)},
    }
    party = {
        "format_version": 2,
        "executors": [{"tasks": [TASK], "executor": relay}],
        "components": [],
        "task_data_filters": [],
        "task_result_filters": [],
    }
    meta = {"name": name, "resource_spec": {}, "min_clients": least, "deploy_map": {"app": ["@ALL"]}}
    config = folder / "app" / "config"
    files.write_json(config / "config_fed_server.json", server)
    files.write_json(config / "config_fed_client.json", party)
    files.write_json(folder / "meta.json", meta)
    return folder.resolve()


@dataclass(frozen=True)
class System:
    """What FLARE's server says of itself.

    Attributes:
        started: time of its start, seconds since 1970.
        parties: party -> time it was last heard of.
    """

    started: float
    parties: dict[str, float]


class Session:
    """The operator's connection to the FLARE server."""

    def __init__(self, admin: Path, timeout_s: float = 10.0) -> None:
        """Connects.

        Raises:
            ServiceError: the server cannot be reached, or turns the operator away.
        """
        from nvflare.fuel.flare_api.flare_api import new_secure_session

        try:
            with _silent():
                self._session = new_secure_session(OPERATOR, str(admin), timeout=timeout_s)
        except Exception as error:  # FLARE raises many kinds, none of them documented  # noqa: BLE001
            raise ServiceError(
                f"the FLARE server cannot be reached ({type(error).__name__})", fix="fedmat consortium start --project P"
            ) from None

    def submit(self, job: Path, token: str) -> str:
        """Submits a job and returns its id; the same token again gives the same job."""
        return str(self._do("submit", lambda s: s.submit_job(str(job), submit_token=token)))

    def status(self, job: str) -> str:
        """Returns a job's status, e.g. ``RUNNING`` or ``FINISHED:COMPLETED``."""
        return str(self._do("ask for the job", lambda s: s.get_job_status(job)))

    def remove(self, party: str) -> None:
        """Ends a party's registration; with a certificate that was not revoked it may register again."""
        self._do("remove a party", lambda s: s.remove_client(party))

    def abort(self, job: str) -> None:
        """Ends a job; one that is not running stays as it is."""
        with contextlib.suppress(ServiceError):
            self._do("abort the job", lambda s: s.abort_job(job))

    def system(self) -> System:
        """Returns who is connected, and since when the server runs."""
        info = self._do("ask for its state", lambda s: s.get_system_info())
        seen = {c.name: float(c.last_connect_time or 0.0) for c in info.client_info}
        return System(float(info.server_info.start_time or 0.0), seen)

    def close(self) -> None:
        """Ends the session; one that is left open would keep the process alive."""
        with contextlib.suppress(Exception), _silent():
            self._session.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _do(self, what: str, work: Any) -> Any:
        try:
            with _silent():
                return work(self._session)
        except Exception as error:  # as above  # noqa: BLE001
            raise ServiceError(f"the FLARE server did not {what} ({type(error).__name__})", fix="see its log") from None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """FLARE's admin session prints on stdout, which belongs to the command's own answer."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
