"""The commands that start, stop and look at a party's processes, the operator's, and a rehearsal of all of them.

Knows: what the operator and a site's engineer type. Refuses to know: processes, FLARE, certificates (``flows.parties``, ``flows.rehearse``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedmat.cli_consortium import consortium_app
from fedmat.cli_data import site_app
from fedmat.commands import Json
from fedmat.errors import ConfigError

Folder = Annotated[Path, typer.Option("--home", help="The party's folder, made by fedmat site join.")]
Project = Annotated[Path, typer.Option("--project", help="The operator's folder, made by fedmat consortium init.")]
Detach = Annotated[bool, typer.Option("--detach", help="Give the terminal back; fedmat ... stop ends it.")]


@site_app.command("start")
def site_start(home: Folder, detach: Detach = False) -> None:
    """Start a party: its FLARE client, which dials out, and its desk, which holds the data.

    Runs until Ctrl-C; a process that ends is started again. Refuses when a key can be read by others, a certificate has ended or
    the kit was edited.

    Example:  fedmat site start --home /srv/fedmat/acme
    """
    from fedmat import console
    from flows import parties

    if detach:
        _detached(["site", "start", "--home", str(home)], home)
        return
    parties.serve_party(home, console.say)


@site_app.command("stop")
def site_stop(home: Folder) -> None:
    """Stop what fedmat site start started.

    Example:  fedmat site stop --home /srv/fedmat/acme
    """
    _stop(home)


@site_app.command("status")
def site_status(home: Folder, as_json: Json = False) -> None:
    """Show whether a party runs, reaches the server and is ready, and what its log complains about.

    Example:  fedmat site status --home /srv/fedmat/acme --json
    """
    from fedmat import console
    from flows import parties

    found = parties.site_status(home)
    if as_json:
        console.write_json(found)
        return
    ready = found["readiness"]
    rows: list[tuple[str, Any]] = [
        ("party", f"{found['party']} in {found['consortium']}"),
        ("server", f"{found['server']} ({'reachable' if found['server_reachable'] else 'not reachable'})"),
        *((name, "runs" if there else "does not run") for name, there in found["running"].items()),
        (
            "data",
            f"dataset {ready['dataset_sha256'][:12]}, {ready['date']}" if ready else "not prepared: fedmat site prepare",
        ),
        ("trouble", found["trouble"] or "none in its log"),
    ]
    console.show_rows("", ("what", "how"), rows)


@site_app.command("secret")
def site_secret(
    home: Folder,
    take: Annotated[Path | None, typer.Option(help="The file another site made.", show_default="one is made here")] = None,
    as_json: Json = False,
) -> None:
    """Make the members' secret, at one site, or take over the one that another site made.

    Sites find records that several of them hold by keys under this secret. It goes from site to site by a road that the operator
    does not see; the fingerprint tells whether it is the same everywhere.

    Example:  fedmat site secret --home /srv/fedmat/acme --take /media/stick/matching.key
    """
    from fedmat import console, files
    from fedmat.data import matching
    from fedmat.errors import StateError
    from fedmat.pipeline import SECRET

    path = home / SECRET
    if take is not None:
        given = matching.load_or_create_secret(take) if take.exists() else None
        if given is None:
            raise ConfigError(f"{take}: no such file", fix="name the matching.key of another site")
        if path.exists() and matching.load_or_create_secret(path) != given:
            raise StateError(f"{path}: another secret is here", fix=f"remove {path} if it was never used, then take the other")
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        files.write_atomic(path, given.hex().encode(), private=True)
    found = matching.fingerprint(matching.load_or_create_secret(path), "members")
    if as_json:
        console.write_json({"file": str(path), "fingerprint": found})
        return
    console.say(f"{console.show_path(path)}: fingerprint {found[:12]}, the same at every site")


@site_app.command("prepare")
def site_prepare(home: Folder, as_json: Json = False) -> None:
    """Check, version and featurize a site's data in its party folder, and write its readiness certificate.

    Example:  fedmat site prepare --home /srv/fedmat/acme
    """
    from fedmat import console
    from flows import site

    with console.working("preparing"):
        found = site.prepare_party.fn(str(home))
    if as_json:
        console.write_json(found)
        return
    console.say(
        f"{found['party']}: {found['n_records']} records, {found['n_rejected']} rejected, dataset {found['dataset_sha256'][:12]}"
    )


@site_app.command("serve")
def site_serve(
    home: Folder,
    cron: Annotated[str, typer.Option(help="When: minute, hour, day, month, weekday.")] = "0 18 * * 1-5",
    timezone: Annotated[str, typer.Option(help="IANA name, e.g. Europe/Berlin.")] = "UTC",
    every: Annotated[int | None, typer.Option(min=1, help="Prepare every so many seconds instead of --cron.")] = None,
    prefect_port: Annotated[int, typer.Option(min=0, max=65535, help="Of the server, if one has to be started.")] = 4200,
) -> None:
    """Prepare a site's data on a schedule until Ctrl-C, with the site's own Prefect, which also shows its rounds.

    Example:  fedmat site serve --home /srv/fedmat/acme --cron "0 18 * * 1-5" --timezone Europe/Berlin
    """
    from datetime import timedelta

    from fedmat import console
    from flows import serve as services

    services.serve_party(
        home,
        cron=cron,
        timezone=timezone,
        every=timedelta(seconds=every) if every else None,
        prefect_port=prefect_port,
        say=console.say,
    )


@consortium_app.command("start")
def consortium_start(project: Project, detach: Detach = False) -> None:
    """Start the FLARE server that the parties dial in to; runs until Ctrl-C.

    Example:  fedmat consortium start --project /srv/fedmat/cells
    """
    from fedmat import console
    from flows import parties

    if detach:
        _detached(["consortium", "start", "--project", str(project)], project)
        return
    parties.serve_operator(project, console.say)


@consortium_app.command("stop")
def consortium_stop(project: Project) -> None:
    """Stop what fedmat consortium start started; a run under way goes on when it is started again.

    Example:  fedmat consortium stop --project /srv/fedmat/cells
    """
    _stop(project)


@consortium_app.command("status")
def consortium_status(project: Project, as_json: Json = False) -> None:
    """Show whether the server runs, who is connected, and how far the last orders are.

    Example:  fedmat consortium status --project /srv/fedmat/cells
    """
    from fedmat import console, provision
    from flows import parties

    found = parties.operator_status(project)
    if as_json:
        console.write_json(found)
        return
    console.say("the server runs" if found["running"]["server"] else "the server does not run: fedmat consortium start")
    connected = found["connected"] or {}
    members = provision.read_project(project).members
    rows = [(name, m.state, connected.get(name, "not connected")) for name, m in members.items()]
    console.show_rows("", ("party", "membership", "last heard of (UTC)"), rows)
    orders = [(t, o["state"], o.get("phase", ""), o.get("round", ""), o.get("run_id", "")) for t, o in found["orders"].items()]
    if orders:
        console.show_rows("", ("order", "state", "phase", "round", "run"), orders)


def rehearse(
    consortium: Annotated[Path, typer.Argument(help="The consortium file.", metavar="CONSORTIUM")],
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of training.", show_default="as the consortium file says")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Leave kits, logs and the run in this new folder.", show_default="all is removed")
    ] = None,
    as_json: Json = False,
) -> None:
    """Rehearse a consortium on this machine: FLARE server and one client per party, with certificates, on loopback.

    Makes a throw-away consortium, starts every party as processes of its own, runs the rounds, shows the result and what each
    round cost, and leaves nothing behind.

    Example:  fedmat rehearse examples/cells/consortium.yaml --rounds 5
    """
    from fedmat import console
    from flows.rehearse import rehearse as work

    found = work(consortium, rounds=rounds, keep=keep, say=console.say)
    per_round = [r["seconds"] for r in found.reports]
    traffic = found.metrics["bytes"]["sites"]
    if as_json:
        kept = ("consortium", "title", "simulated", "task", "global", "sites", "bytes", "rounds", "exclusions", "plan_sha256")
        console.write_json(
            {
                **{k: found.metrics[k] for k in kept},
                "model": {"sha256": found.model_sha256},
                "seconds": found.seconds,
                "round_seconds": per_round,
                "memory": found.memory,
            }
        )
        return
    console.show_result(found.metrics)
    rows = [(site, f"{t['down'] / 1024:.0f}", f"{t['up'] / 1024:.0f}") for site, t in traffic.items()]
    console.show_rows("", ("site", "KiB down", "KiB up"), rows, right=("KiB down", "KiB up"))
    memory = ", ".join(f"{kind} {size / 2**20:.0f}" for kind, size in sorted(found.memory.items()) if kind != "all")
    console.say(f"model sha256 {found.model_sha256}")
    console.say(
        f"rounds of {sum(per_round) / max(1, len(per_round)):.2f} s; {found.seconds['rounds, baselines and evaluation done']:.0f} s in all"
    )
    if found.memory:
        console.say(f"memory, MiB: {found.memory.get('all', 0) / 2**20:.0f} at most in all; the largest {memory}")


def _stop(folder: Path) -> None:
    from fedmat import console
    from flows import parties

    console.say("stopped" if parties.stop(folder.resolve()) else "nothing runs there")


def _detached(arguments: list[str], folder: Path) -> None:
    """Starts the same command in a session of its own and returns when it watches its processes, or says why it does not."""
    import subprocess
    import sys
    import time

    from fedmat import console
    from fedmat.errors import ServiceError
    from flows import parties

    log = folder / "run" / "keeper.log"
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with log.open("ab") as output:
        started = subprocess.Popen(
            [sys.executable, "-m", "fedmat", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    until = time.monotonic() + 60.0
    while time.monotonic() < until:
        if started.poll() is not None:
            raise ServiceError(f"it ended with status {started.returncode}", fix=f"see {log}")
        if parties.processes(folder.resolve()):
            console.say(f"started; its messages are in {console.show_path(log)}")
            return
        time.sleep(0.1)
    raise ServiceError("it did not start within a minute", fix=f"see {log}")
