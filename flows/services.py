"""Which Prefect a run talks to, and the servers fedmat starts as its own child processes.

Knows: ports, addresses, processes, Prefect's settings. Refuses to know: runs, sites and what a flow does.
A run works with a Prefect server that is configured or already running for its home, with a short-lived one of its
own, and with none; which one it was is stated, never guessed.

Measured with Prefect 3.8: a short-lived server needs 6 s (known database) to 17 s (first start); a flow 0.1 s without
and 1.1 s with its heartbeat thread, which sleeps a whole second before it may end.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import fedmat.telemetry  # noqa: F401  before Prefect is imported
from fedmat import files
from fedmat.errors import ConfigError, FedmatError, ServiceError

Wanted = Literal["auto", "prefect", "none"]
WANTED: tuple[Wanted, ...] = ("auto", "prefect", "none")
ADDRESS = "server.json"
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Orchestrator:
    """Who chains the steps of a run.

    Attributes:
        name: ``prefect``, or ``none`` when the steps run as plain functions.
        why: one sentence for people.
        url: address of Prefect's pages; None without Prefect or when the server ends with the run.
    """

    name: Literal["prefect", "none"]
    why: str
    url: str | None = None


# --- child processes -----------------------------------------------------------------------------------------------


class Child:
    """One server process in a group of its own, ended together with everything it started.

    Args:
        name: for messages.
        url: an address that answers 200 once the server is ready; empty for a process that has none.
        log: file that gets the server's output.
        option: the option a person changes when the port is taken.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        url: str = "",
        env: Mapping[str, str] | None = None,
        option: str = "",
    ) -> None:
        self.name, self.url, self.log, self._option = name, url, log, option
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("child.py")), str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process (and group) id."""
        return self._process.pid

    def wait_ready(self, timeout_s: float) -> None:
        """Returns when the server answers.

        Raises:
            ServiceError: it ended, or did not answer in time; its output is in the named file.
        """
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            code = self._process.poll()
            if code is not None:
                raise ServiceError(f"{self.name} ended with status {code} while starting", fix=f"see {self.log}")
            if answers(self.url, 2.0):
                return
            time.sleep(0.1)
        raise ServiceError(f"{self.name} did not answer at {self.url} within {timeout_s:.0f} s", fix=f"see {self.log}")

    def running(self) -> bool:
        """Whether the process is still there."""
        return self._process.poll() is None

    def stop(self, grace_s: float = 10.0) -> None:
        """Ends the whole group: asked first, then killed."""
        for sign, patience in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
            if not _group_alive(self._process.pid):
                return


def _group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def answers(url: str, timeout_s: float = 3.0) -> bool:
    """Whether ``url`` answers with success."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as reply:
            return bool(reply.status == 200)
    except (OSError, ValueError, urllib.error.URLError):
        return False


def take_port(port: int, option: str, host: str = LOOPBACK) -> int:
    """Returns ``port`` if nothing listens there, or a free one for 0.

    Raises:
        ServiceError: the port is in use; the message names the port and the option that changes it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OverflowError:
            raise ConfigError(f"{option} {port}: not a port", fix="use a number from 0 (any free port) to 65535") from None
        except OSError as error:
            raise ServiceError(
                f"port {port} on {host} cannot be used ({error.strerror})",
                fix=f"stop what listens there, or choose another port with {option} (0 takes a free one)",
            ) from None
        return int(probe.getsockname()[1])


# --- Prefect's server ----------------------------------------------------------------------------------------------


def prefect_home(home: Path) -> Path:
    """Returns ``$PREFECT_HOME`` if it is set, else ``home/prefect``."""
    named = os.environ.get("PREFECT_HOME")
    return Path(named).expanduser().resolve() if named else home / "prefect"


def prefect_server(home: Path, *, host: str = LOOPBACK, port: int = 0, option: str = "--prefect-port") -> Child:
    """Starts Prefect's server with its pages and its scheduler on the database of ``home``; wait for it before use."""
    port = take_port(port, option, host)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]
    url = f"http://{host}:{port}"
    # The pages ask for this address; the default is port 4200 whatever port the server has.
    env = _server_env(home) | {"PREFECT_SERVER_UI_API_URL": f"{url}/api", "PREFECT_API_URL": f"{url}/api"}
    return Child("Prefect's server", command, url=f"{url}/api/health", log=_log(home), env=env, option=option)


def short_lived_server(home: Path) -> Child:
    """Starts what Prefect calls an ephemeral server: the programming interface only, no pages and no scheduler."""
    port = take_port(0, "")
    command = [
        sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app",
        "--host", LOOPBACK, "--port", str(port), "--log-level", "error", "--lifespan", "on",
    ]  # fmt: skip
    env = _server_env(home) | {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    return Child("Prefect's short-lived server", command, url=f"http://{LOOPBACK}:{port}/api/health", log=_log(home), env=env)


def _server_env(home: Path) -> dict[str, str]:
    place = prefect_home(home)
    place.mkdir(parents=True, exist_ok=True)
    return {"PREFECT_HOME": str(place)}


def _log(home: Path) -> Path:
    return prefect_home(home) / "server.log"


def announce(home: Path, child: Child, url: str) -> None:
    """Lets later runs of this home find the running server."""
    files.write_json(prefect_home(home) / ADDRESS, {"url": url, "pid": child.pid})


def withdraw(home: Path) -> None:
    """Takes the announcement back."""
    (prefect_home(home) / ADDRESS).unlink(missing_ok=True)


def announced(home: Path) -> str | None:
    """Returns the address of a server that runs for this home, if it answers."""
    with suppress(FedmatError, KeyError, TypeError):
        url = str(files.read_json(prefect_home(home) / ADDRESS)["url"])
        if answers(f"{url}/api/health"):
            return url
    return None


def configured() -> str | None:
    """Returns the API address that the environment or Prefect's active profile names, without ``/api``."""
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    return url.removesuffix("/").removesuffix("/api") if url else None


# --- the decision --------------------------------------------------------------------------------------------------


@contextmanager
def orchestration(
    wanted: Wanted, home: Path, *, quiet: bool = True, meanwhile: Callable[[], None] = lambda: None
) -> Iterator[Orchestrator]:
    """Decides who chains the steps, and keeps a short-lived server running for as long as it is needed.

    Args:
        wanted: ``auto`` uses Prefect if it can be had and plain functions if not; ``prefect`` insists; ``none`` declines.
        home: the consortium's workspace; Prefect's own files are below it unless ``PREFECT_HOME`` says otherwise.
        quiet: keeps Prefect's progress lines off the terminal (they still reach its server).
        meanwhile: done while a short-lived server starts.

    Raises:
        ConfigError: ``wanted`` is none of the three.
        ServiceError: Prefect was insisted on and cannot be had.
    """
    if wanted not in WANTED:
        raise ConfigError(f"orchestrator '{wanted}' is unknown", fix=f"use one of {', '.join(WANTED)}")
    with _hushed() if quiet else nullcontext():
        yield from _orchestration(wanted, home, meanwhile)


def _orchestration(wanted: Wanted, home: Path, meanwhile: Callable[[], None]) -> Iterator[Orchestrator]:
    if wanted == "none":
        yield Orchestrator("none", "plain functions, as asked")
        return
    found: tuple[str, Child | None, str] | str
    try:
        found = _find(home, meanwhile)
    except FedmatError as trouble:
        if wanted == "prefect":
            raise
        found = trouble.what
    if isinstance(found, str):
        yield Orchestrator("none", f"plain functions, because {found}")
        return
    url, child, why = found
    try:
        with _settings(home, url):
            try:
                yield Orchestrator("prefect", why, None if child else url)
            finally:
                _drain()
    finally:
        if child:
            child.stop()


def _find(home: Path, meanwhile: Callable[[], None]) -> tuple[str, Child | None, str]:
    try:
        named = configured()
    except Exception as error:  # a broken installation shows itself in many ways, and none may stop a run  # noqa: BLE001
        raise ServiceError(
            f"Prefect cannot be imported ({type(error).__name__})", fix="pip install -c constraints.txt -e ."
        ) from None
    if named:
        if not answers(f"{named}/api/health"):
            raise ServiceError(
                f"Prefect's server at {named} does not answer", fix="start it, or unset PREFECT_API_URL and run again"
            )
        return named, None, f"Prefect at {named}"
    running = announced(home)
    if running:
        return running, None, f"Prefect at {running}"
    child = short_lived_server(home)
    try:
        meanwhile()
        child.wait_ready(float(os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"]))
    except BaseException:
        child.stop()
        raise
    return child.url.removesuffix("/api/health"), child, "Prefect, with a short-lived server of its own"


@contextmanager
def _settings(home: Path, url: str) -> Iterator[None]:
    from prefect.settings import temporary_settings

    place = prefect_home(home)
    place.mkdir(parents=True, exist_ok=True)
    values: dict[str, object] = {"home": place, "api.url": f"{url}/api", "flows.heartbeat_frequency": None}
    if "PREFECT_CLIENT_MAX_RETRIES" not in os.environ:
        values["client.max_retries"] = 3  # 14 s for each call to a server that went away; the default, 5, is a minute
    with temporary_settings(values):  # type: ignore[arg-type]
        yield


@contextmanager
def _hushed() -> Iterator[None]:
    """Keeps Prefect, which takes over the root logger's terminal output, from printing what is not an error.

    Its lines about runs go too, errors included: whoever started the run shows its progress and its error.
    """

    def wanted(record: logging.LogRecord) -> bool:
        about_runs = record.name.startswith(("prefect.flow_runs", "prefect.task_runs", "prefect._internal"))
        return record.name.startswith("fedmat") or (record.levelno >= logging.ERROR and not about_runs)

    loggers = (logging.getLogger(), logging.getLogger("prefect._internal"))
    consoles = [h for logger in loggers for h in logger.handlers if isinstance(h, logging.StreamHandler)]
    for handler in consoles:
        handler.addFilter(wanted)
    try:
        yield
    finally:
        for handler in consoles:
            handler.removeFilter(wanted)


@contextmanager
def without_heartbeat() -> Iterator[None]:
    """Spares sub-flows the second that Prefect's heartbeat thread sleeps; their parent keeps its own heartbeat."""
    from prefect.settings import temporary_settings

    with temporary_settings({"flows.heartbeat_frequency": None}):  # type: ignore[dict-item]
        yield


def _drain() -> None:
    """Sends what Prefect still has in its queues; otherwise it would try for a minute after its server has gone."""
    with suppress(Exception):
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        APILogWorker.drain_all(timeout=10.0)
        EventsWorker.drain_all(timeout=10.0)
