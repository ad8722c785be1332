"""The processes of a party and of the operator: started together, watched, started again when they end, stopped together.

Knows: which processes there are, their logs and their process ids. Refuses to know: what they answer. A site has two: its FLARE client, which
only carries bytes, and its desk, which holds the data. The operator has one: the FLARE server.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fedmat.telemetry  # noqa: F401  before anything that phones home is imported
from fedmat import files
from fedmat.errors import FedmatError, ServiceError, StateError
from fedmat.federation.desk import DESK
from fedmat.party import Party
from flows.services import LOOPBACK, Child, take_port

PIDS = Path("run/processes.json")  # in a party's or the operator's folder: what was started, and by whom
_STEADY_S = 30.0  # a process that lived this long is started again at once
_LONGEST_PAUSE_S = 60.0
_MODULES = {"server": "nvflare.private.fed.app.server.server_train", "client": "nvflare.private.fed.app.client.client_train"}


def server_child(project: Path) -> Child:
    """Starts the operator's FLARE server."""
    found = files.read_json(project / "project.json")
    folder = project / "server"
    command = _flare("server", folder, "fed_server.json", f"org={found['consortium']}")
    return Child("the FLARE server", command, log=folder / "console.log", env=_environment())


def client_child(home: Path) -> Child:
    """Starts a party's FLARE client."""
    party = Party.load(home)
    folder = home / "flare"
    command = _flare("client", folder, "fed_client.json", f"uid={party.name}", f"org={party.organisation}")
    return Child(f"the FLARE client of {party.name}", command, log=folder / "console.log", env=_environment())


def desk_child(home: Path) -> Child:
    """Starts a party's desk."""
    forget_desk(home)
    command = [sys.executable, "-u", "-m", "flows.desk", str(home)]
    return Child(f"the desk of {Party.load(home).name}", command, log=home / "run" / "desk.log", env=_environment())


def forget_desk(home: Path) -> None:
    """Removes what a desk that has ended left: its note, its socket, and the folder made for one where the home's path is too long."""
    note = home / DESK
    with suppress(FedmatError, OSError, KeyError, TypeError):
        socket_ = Path(files.read_json(note)["address"])
        socket_.unlink(missing_ok=True)
        if socket_.parent != note.parent:
            socket_.parent.rmdir()
    note.unlink(missing_ok=True)


def _flare(which: str, folder: Path, settings: str, *more: str) -> list[str]:
    start = [sys.executable, "-u", "-m", _MODULES[which], "-m", str(folder), "-s", settings]
    return [*start, "--set", "secure_train=true", *more, "config_folder=config"]


def _environment() -> dict[str, str]:
    """FLARE starts ``python3`` from the path for its job processes; they need the same packages and one thread each."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    root = str(Path(__file__).resolve().parents[1])
    return {"PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}


# --- what people start ---------------------------------------------------------------------------------------------


def serve_party(home: Path, say: Callable[[str], None]) -> None:
    """Runs a party's processes until Ctrl-C or SIGTERM; one that ends is started again.

    Raises:
        StateError, ProtocolError: the folder, a key or a certificate is not as it must be; nothing was started.
    """
    from fedmat import provision

    home = home.resolve()
    checked = provision.check_home(home, datetime.now(UTC))
    for text in checked.warnings:
        say(f"note: {text}")
    say(
        f"{checked.party}: works for {checked.consortium}; dials out to {checked.host}:{checked.port}; "
        "nobody outside this machine can call it"
    )
    _keep(home, {"desk": lambda: desk_child(home), "client": lambda: client_child(home)}, say)


def serve_operator(project: Path, say: Callable[[str], None]) -> None:
    """Runs the FLARE server until Ctrl-C or SIGTERM; when it ends it is started again.

    Raises:
        StateError, ProtocolError: the folder, a key or a certificate is not as it must be; nothing was started.
        ServiceError: the port is taken.
    """
    from fedmat import provision

    project = project.resolve()
    checked = provision.check_project(project, datetime.now(UTC))
    for text in checked.warnings:
        say(f"note: {text}")
    take_port(checked.port, "fedmat consortium init --port", "0.0.0.0")  # noqa: S104  where FLARE listens
    say(f"{checked.consortium}: parties reach the server at {checked.host}:{checked.port}")
    _keep(project, {"server": lambda: server_child(project)}, say)


def _keep(folder: Path, services: dict[str, Callable[[], Child]], say: Callable[[str], None]) -> None:
    from flows.serve import signals_ignored, stopped_by_signal

    _refuse_second(folder)
    running: dict[str, Child] = {}
    since: dict[str, float] = {}
    pause = dict.fromkeys(services, 1.0)
    due = dict.fromkeys(services, 0.0)
    try:
        with stopped_by_signal():
            while True:
                for name, start in services.items():
                    now = time.monotonic()
                    if name in running and not running[name].running():
                        ended = running.pop(name)
                        pause[name] = 1.0 if now - since[name] > _STEADY_S else min(2 * pause[name], _LONGEST_PAUSE_S)
                        due[name] = now + pause[name]
                        why = troubles(ended.log.parent)
                        ended.stop()
                        say(
                            f"{ended.name} ended{f': {why}' if why else ''}; starting it again in {pause[name]:.0f} s ({ended.log})"
                        )
                    if name not in running and now >= due[name]:
                        running[name], since[name] = start(), now
                        _note(folder, running)
                time.sleep(0.3)
    except KeyboardInterrupt:
        say("stopping")
    finally:
        with signals_ignored():
            for child in running.values():
                child.stop()
            end_jobs(folder)
            forget_desk(folder)
            (folder / PIDS).unlink(missing_ok=True)


def end_jobs(folder: Path) -> None:
    """Ends FLARE's job processes of a party's or the operator's folder.

    Each is a session of its own and would outlive whoever started it by a minute. What a run needs is on disk.
    """
    workspaces = {str(folder.resolve() / name) for name in ("flare", "server")}
    for entry in Path("/proc").glob("[0-9]*"):  # elsewhere than on Linux they end by themselves
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if any(w.startswith("nvflare.private.fed.app.") for w in words) and workspaces & set(words):
                os.kill(int(entry.name), signal.SIGKILL)


def _note(folder: Path, running: dict[str, Child]) -> None:
    found = {"keeper": os.getpid(), **{name: child.pid for name, child in running.items()}}
    files.write_json(folder / PIDS, found)


def _refuse_second(folder: Path) -> None:
    keeper = processes(folder).get("keeper")
    if keeper:
        raise StateError(
            f"{folder}: is running already (process {keeper})", fix="fedmat site stop, or fedmat consortium stop, ends it"
        )


def processes(folder: Path) -> dict[str, int]:
    """Returns the processes of a party's or the operator's folder that live, by name; ``keeper`` watches the others."""
    path = folder / PIDS
    if not path.exists():
        return {}
    return {name: pid for name, pid in files.read_json(path).items() if _alive(pid)}


def stop(folder: Path, patience_s: float = 30.0) -> bool:
    """Ends what was started in a folder; returns False if nothing ran.

    Raises:
        ServiceError: it did not end.
    """
    keeper = processes(folder).get("keeper")
    if keeper is None:
        return False
    os.kill(keeper, signal.SIGTERM)
    until = time.monotonic() + patience_s
    while _alive(keeper):
        if time.monotonic() > until:
            raise ServiceError(f"process {keeper} does not end", fix=f"see {folder}/run, then: kill -9 {keeper}")
        time.sleep(0.1)
    return True


def site_status(home: Path) -> dict[str, Any]:
    """Returns what runs at a party, whether the server can be reached, and what its log complains about."""
    party = Party.load(home)
    living = processes(home)
    return {
        "party": party.name,
        "consortium": party.consortium,
        "server": f"{party.host}:{party.port}",
        "server_reachable": _reachable(party.host, party.port),
        "running": {name: name in living for name in ("keeper", "client", "desk")},
        "trouble": troubles(home / "flare") if living else None,
        "readiness": files.read_json(home / "readiness.json") if (home / "readiness.json").exists() else None,
    }


def operator_status(project: Path) -> dict[str, Any]:
    """Returns what runs at the operator, who is connected, and the orders."""
    from fedmat.federation.flare import Session

    living = processes(project)
    found: dict[str, Any] = {"running": {name: name in living for name in ("keeper", "server")}, "connected": None}
    if "server" in living:
        with suppress(FedmatError), Session(project / "admin") as session:
            found["connected"] = {
                p: datetime.fromtimestamp(t, UTC).isoformat(timespec="seconds") for p, t in session.system().parties.items()
            }
    orders = sorted((project / "orders").glob("*/state.json"), key=lambda p: p.stat().st_mtime)
    found["orders"] = {p.parent.name: files.read_json(p) for p in orders[-5:]}
    return found


# What FLARE's logs say when something is wrong, and what that means for people.
_TROUBLES = (
    ("certificate has expired", "a certificate has expired: renew it (fedmat site renew), or set the clock"),
    ("certificate is not yet valid", "a certificate is not valid yet: set this machine's clock"),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "the other side's certificate is not of this consortium's root: is the kit of this consortium?",
    ),
    ("Handshake failed", "no TLS with the other side: the kit is of another consortium, or a certificate or clock is wrong"),
    ("SSL_ERROR_SSL", "no TLS with the other side: the kit is of another consortium, or a certificate or clock is wrong"),
    ("error:client_registration", "the server turned this party away: revoked, or registered under another name"),
    ("register_client unauthenticated", "the server turned this party away: revoked, or registered under another name"),
    ("unauthenticated", "the server turned this party away: revoked, or registered under another name"),
    ("No space left on device", "the disk is full"),
    ("not in allow_list", "a component is not on the allow-list: install the same release of fedmat on both sides"),
)


def trouble(log: Path, last_bytes: int = 20000) -> str | None:
    """Returns in plain words what the end of a log complains about, or None."""
    if not log.exists():
        return None
    with log.open("rb") as handle:
        handle.seek(max(0, log.stat().st_size - last_bytes))
        text = handle.read().decode(errors="replace")
    return next((words for pattern, words in _TROUBLES if pattern.lower() in text.lower()), None)


def troubles(folder: Path) -> str | None:
    """Returns what the logs of FLARE in a folder complain about: its own, and what it printed before it had one."""
    return trouble(folder / "console.log") or trouble(folder / "log.txt")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] if Path("/proc/self/stat").exists() else "R"
    except (ProcessLookupError, PermissionError, FileNotFoundError):
        return False
    return state != "Z"


def _reachable(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=2.0):
            return True
    except OSError:
        return False


def free_port() -> int:
    """Returns a port of this machine that nobody listens on."""
    return take_port(0, "--port", LOOPBACK)
