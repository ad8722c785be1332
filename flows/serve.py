"""Long-running services: the nightly round, and the pages of Prefect and MLflow.

Knows: schedules, ports, signals. Refuses to know: what a run does. Servers are child processes; they end with this
process, however it ends.
"""

from __future__ import annotations

import importlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import fedmat.telemetry  # noqa: F401  before Prefect is imported
from fedmat.errors import ConfigError, ServiceError, StateError
from fedmat.party import Party
from flows.services import (
    LOOPBACK,
    Child,
    announce,
    announced,
    answers,
    configured,
    prefect_home,
    prefect_server,
    take_port,
    withdraw,
)
from flows.shared import DEADLINE_S, reference

START_S = 180.0
PREFECT_PORT, MLFLOW_PORT = 4200, 5000


def serve(
    consortium: Path | str,
    *,
    cron: str = "0 2 * * *",
    timezone: str = "UTC",
    every: timedelta | None = None,
    name: str = "nightly",
    home: Path | str | None = None,
    rounds: int | None = None,
    register: bool = True,
    tracking_uri: str | None = None,
    host: str = LOOPBACK,
    prefect_port: int = PREFECT_PORT,
    say: Callable[[str], None] = print,
    project: Path | str | None = None,
    deadline_s: float = DEADLINE_S,
) -> None:
    """Runs a consortium on a schedule until it is stopped (Ctrl-C, SIGTERM); two of its runs never overlap.

    Every run takes the sites' data as it then is: unchanged data finds its finished run, changed data makes a new one.
    A run that fails leaves a page in Prefect and a line in ``alerts.jsonl`` of its workspace.

    Args:
        consortium: the consortium file.
        cron: when, in cron's five fields; ``every`` replaces it.
        timezone: IANA name, e.g. ``Europe/Berlin``; the hour stays when summer time begins.
        name: of the deployment, so that ``consortium-run/<name>`` can also be started by hand.
        prefect_port: of the server that is started when none is configured or running for this home; 0 takes a free one.
        project: the operator's project folder, where sites are other organisations; it replaces ``home``.
        deadline_s: with a project, how long sites and jobs may take together.

    Raises:
        ConfigError: the consortium file, the schedule or the time zone is wrong.
        StateError: the project folder is none.
        ServiceError: the port is taken, or the server cannot be had.
    """
    run = reference(str(consortium), str(home) if home else None, None, rounds, str(project) if project else None)
    given: dict[str, Any] = {
        "consortium": str(run.consortium_file),
        "rounds": rounds,
        "to_registry": register,
        "tracking_uri": tracking_uri,
    }
    given |= {"home": str(run.home)} if project is None else {"project": str(run.home), "deadline_s": deadline_s}
    served = _Served("consortium_run", "flows.federate", name, given, f"consortium:{run.config().name}", run.config().name)
    _serve(served, run.home, _schedule(cron, timezone, every), _when(cron, timezone, every), host, prefect_port, say)


def serve_party(
    home: Path | str,
    *,
    cron: str = "0 18 * * 1-5",
    timezone: str = "UTC",
    every: timedelta | None = None,
    name: str = "daily",
    host: str = LOOPBACK,
    prefect_port: int = PREFECT_PORT,
    say: Callable[[str], None] = print,
) -> None:
    """Prepares a site's data on a schedule, on the site's own machine, until it is stopped.

    While it runs, the site's desk shows its rounds in the same server.

    Args:
        home: the party's folder; other arguments and errors as in :func:`serve`.
    """
    party = Party.load(Path(home))
    if party.kind != "site":
        raise StateError(f"{home}: {party.name} is no site and has no data", fix="name the folder of a site")
    served = _Served("prepare_party", "flows.site", name, {"home": str(party.home)}, f"site:{party.name}", party.name)
    _serve(served, party.home, _schedule(cron, timezone, every), _when(cron, timezone, every), host, prefect_port, say)


def ui(
    home: Path | str,
    *,
    host: str = LOOPBACK,
    prefect_port: int = PREFECT_PORT,
    mlflow_port: int = MLFLOW_PORT,
    tracking_uri: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Starts Prefect's and MLflow's pages, says where they are, and stops both on Ctrl-C or SIGTERM.

    Args:
        home: the consortium's workspace, whose Prefect database is shown; runs of this home then use this server.
        prefect_port, mlflow_port: 0 takes a free one.
        tracking_uri: MLflow's store; by default ``$MLFLOW_TRACKING_URI``, else ``mlruns/mlflow.db``.

    Raises:
        ServiceError: a port is in use (the message names it and the option), or a server does not start or ends.
    """
    from fedmat import registry

    workspace = Path(home).resolve()
    store = tracking_uri or registry.registry_uri(Path.cwd())
    take_port(prefect_port, "--prefect-port", host)  # refuse before anything starts
    take_port(mlflow_port, "--mlflow-port", host)
    children: list[Child] = []
    try:
        with stopped_by_signal():
            prefect_child = prefect_server(workspace, host=host, port=prefect_port)
            children.append(prefect_child)
            if not store.startswith(("http://", "https://")):
                children.append(mlflow_server(workspace, store, host=host, port=mlflow_port))
            say("starting, about 15 s ...")
            for child in children:
                child.wait_ready(START_S)
            url = prefect_child.url.removesuffix("/api/health")
            announce(workspace, prefect_child, url)
            say(f"Prefect  {url}")
            say(f"MLflow   {children[1].url.removesuffix('/health') if len(children) > 1 else store}")
            say("Ctrl-C stops both")
            while all(child.running() for child in children):
                time.sleep(0.3)
            ended = next(child for child in children if not child.running())
            raise ServiceError(f"{ended.name} ended by itself", fix=f"see {ended.log}")
    except KeyboardInterrupt:
        say("stopping")
    finally:
        with signals_ignored():
            if children:
                withdraw(workspace)
            for child in reversed(children):
                child.stop()


def mlflow_server(home: Path, tracking_uri: str, *, host: str = LOOPBACK, port: int = MLFLOW_PORT) -> Child:
    """Starts MLflow's server on a store; wait for it before use."""
    port = take_port(port, "--mlflow-port", host)
    if tracking_uri.startswith("sqlite:///"):
        Path(tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri, "--host", host, "--port", str(port),
        "--workers", "1",
    ]  # fmt: skip
    if tracking_uri.startswith("sqlite:///"):
        artifacts = Path(tracking_uri.removeprefix("sqlite:///")).parent / "artifacts"
        command += ["--default-artifact-root", artifacts.as_uri()]
    env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = home / "mlflow-server.log"
    return Child("MLflow's server", command, url=f"http://{host}:{port}/health", log=log, env=env, option="--mlflow-port")


# --- inside --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Served:
    """A flow as a deployment: where it is, its name and parameters, and who it is about."""

    flow: str
    module: str
    name: str
    given: dict[str, Any]
    tag: str
    about: str


def _serve(
    served: _Served, home: Path, schedule: Any, when: str, host: str, prefect_port: int, say: Callable[[str], None]
) -> None:
    with stopped_by_signal(), _server(home, host, prefect_port, say) as url:
        import prefect
        from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
        from prefect.deployments.runner import EntrypointType
        from prefect.settings import temporary_settings

        flow = getattr(importlib.import_module(served.module), served.flow)
        with temporary_settings({"home": prefect_home(home), "api.url": f"{url}/api"}):  # type: ignore[dict-item]
            deployment = flow.to_deployment(
                served.name,
                schedules=[schedule],
                parameters=served.given,
                tags=["fedmat", served.tag],
                # A run that is still going when the next is due: the next is left out, not queued behind it.
                concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
                entrypoint_type=EntrypointType.MODULE_PATH,
            )
            say(f"{served.about}: serving {flow.name}/{served.name}, {when}; {url}")
            prefect.serve(deployment, limit=1, print_starting_message=False)


def _schedule(cron: str, timezone: str, every: timedelta | None) -> Any:
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    from prefect.client.schemas.schedules import CronSchedule
    from prefect.schedules import Cron, Interval

    try:
        ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ConfigError(f"time zone '{timezone}' is unknown", fix="use an IANA name, e.g. UTC or Europe/Berlin") from None
    if every is not None:
        if every < timedelta(seconds=1):
            raise ConfigError(f"every {every}: too short", fix="use a second or more")
        return Interval(every, timezone=timezone)
    try:
        CronSchedule(cron=cron, timezone=timezone)
    except ValueError:
        raise ConfigError(
            f"'{cron}' is not a cron schedule", fix="use minute, hour, day, month, weekday, e.g. '0 2 * * *'"
        ) from None
    return Cron(cron, timezone=timezone)


def _when(cron: str, timezone: str, every: timedelta | None) -> str:
    return f"every {every}" if every is not None else f"at '{cron}' {timezone}"


@contextmanager
def _server(home: Path, host: str, port: int, say: Callable[[str], None]) -> Iterator[str]:
    """Gives the address of the server that is configured, running for this home, or else started here, whole."""
    named = configured()
    if named:
        if not answers(f"{named}/api/health"):
            raise ServiceError(f"Prefect's server at {named} does not answer", fix="start it, or unset PREFECT_API_URL")
        yield named
        return
    running = announced(home)
    if running:
        yield running
        return
    child = prefect_server(home, host=host, port=port)
    try:
        say("starting Prefect's server, about 15 s ...")
        child.wait_ready(START_S)
        url = child.url.removesuffix("/api/health")
        announce(home, child, url)
        yield url
    finally:
        with signals_ignored():
            withdraw(home)
            child.stop()


@contextmanager
def stopped_by_signal() -> Iterator[None]:
    """Turns SIGTERM into what Ctrl-C does, so that one way out cleans up after both."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def signals_ignored() -> Iterator[None]:
    """A second Ctrl-C must not leave half of the servers behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for sign, handler in kept.items():
            with suppress(ValueError, TypeError):
                signal.signal(sign, handler)
