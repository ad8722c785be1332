"""The command line: ``fedmat demo``, ``run``, ``site ...``, ``report``, ``models``, ``predict``, ``ui``, ``serve``, ``data ...``.

Knows: what a person types and which function answers it. Refuses to know: how; every command calls two or three
functions, and imports them only when it runs, so that ``fedmat --help`` answers at once.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import fedmat.cli_drop  # adds its commands to site_app
import fedmat.cli_egress
import fedmat.telemetry  # noqa: F401  before anything that would phone home
from fedmat.cli_audit import audit_app
from fedmat.cli_bench import bench
from fedmat.cli_consortium import consortium_app
from fedmat.cli_data import data_app, site_app
from fedmat.cli_keys import keys_app
from fedmat.cli_ledger import approve, credits_app, ledger_app
from fedmat.cli_parties import rehearse
from fedmat.commands import DEBUG, Group, Home, Json, Store
from fedmat.errors import ConfigError, NotEvidenced

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # the plain help starts in half the time: rich help pulls in Markdown and a syntax highlighter
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="One property model for many materials companies; no record leaves its company.\n\n"
    "Start with fedmat demo. With your own data: fedmat site init, fedmat site check, fedmat run.",
    epilog="Exit codes: 0 done, 1 bug, 2 settings or usage, 3 a site's data, 4 a round failed, 5 saved state, 6 a message, "
    "7 a service, 8 not evidenced, 9 a site's policy, 130 interrupted. More: docs/errors.md",
)
app.add_typer(site_app, name="site")
app.add_typer(consortium_app, name="consortium")
app.add_typer(data_app, name="data")
app.add_typer(keys_app, name="keys")
app.add_typer(ledger_app, name="ledger")
app.add_typer(audit_app, name="audit")
app.add_typer(credits_app, name="credits")

Orchestrated = Annotated[
    Literal["auto", "prefect", "none"],
    typer.Option(help="Who chains the steps: Prefect, plain functions, or Prefect if it can be had. The model is the same."),
]
Project = Annotated[
    Path | None,
    typer.Option(help="The operator's project folder: sites are other organisations, reached through its FLARE server."),
]
Consortium = Annotated[Path, typer.Argument(help="The consortium file.", metavar="CONSORTIUM")]


def _version(wanted: bool) -> None:
    if wanted:
        from fedmat import __version__

        typer.echo(f"fedmat {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show the traceback of an error. It may quote data: look before sharing.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    del debug, version


# --- runs --------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of training.", show_default="as the example says")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away an earlier demo's rounds.")] = False,
    orchestrator: Orchestrated = "auto",
    home: Home = None,
    tracking_uri: Store = None,
    as_json: Json = False,
) -> None:
    """Run the example consortium, from raw files to a model.

    Four invented cell makers with simulated data: every record in it was computed with PyBaMM.

    Example:  fedmat demo --rounds 10
    """
    from fedmat import places

    _run(places.example(), home, None, rounds, fresh, orchestrator, True, tracking_uri, as_json)


@app.command()
def run(
    consortium: Consortium,
    home: Home = None,
    run_id: Annotated[
        str | None, typer.Option(help="Name of the run; the same name goes on with it.", show_default="named by plan and data")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of training.", show_default="as the consortium file says")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away this run's earlier rounds.")] = False,
    orchestrator: Orchestrated = "auto",
    register: Annotated[bool, typer.Option(help="Register the model in MLflow.")] = True,
    tracking_uri: Store = None,
    project: Project = None,
    token: Annotated[str | None, typer.Option(help="With --project: name of the order.", show_default="plan and day")] = None,
    as_json: Json = False,
) -> None:
    """Run a consortium, from its sites' data to a registered model.

    Prepares every site's data, trains in rounds, compares with what each site could do alone, reports and registers.
    With --project the sites are other organisations, reached through the operator's FLARE server; each prepares its data at home.

    A run that was interrupted goes on where it stopped; rounds that are done are not done again.

    Example:  fedmat run examples/cells/consortium.yaml --rounds 10 --json
    """
    if project is not None and home is not None:
        raise ConfigError("--project and --home", fix="give one: a project folder is the workspace of its runs")
    _run(consortium, home, run_id, rounds, fresh, orchestrator, register, tracking_uri, as_json, project, token)


def _run(
    consortium: Path,
    home: Path | None,
    run_id: str | None,
    rounds: int | None,
    fresh: bool,
    orchestrator: Literal["auto", "prefect", "none"],
    register: bool,
    tracking_uri: str | None,
    as_json: bool,
    project: Path | None = None,
    token: str | None = None,
) -> None:
    import time

    from fedmat import console, pipeline

    started = time.perf_counter()
    if project is None:
        config = pipeline.open_run(consortium, home=home, run_id=run_id, rounds=rounds).config()
    else:  # the sites' files are at the sites
        config = pipeline.Run(consortium.resolve(), project.resolve(), run_id, rounds).config()
    console.say(f"{config.title}: {len(config.members)} sites, {config.plan.rounds} rounds")
    progress = console.RunProgress(len(config.members), config.plan.rounds)
    try:
        with progress.showing():
            import flows

            outcome = flows.run_all(
                consortium, home=home, run_id=run_id, rounds=rounds, fresh=fresh, register=register,
                tracking_uri=tracking_uri, orchestrator=orchestrator, on_event=progress, project=project, token=token,
            )  # fmt: skip
    except KeyboardInterrupt:
        console.say("interrupted; the same command goes on where it stopped")
        raise
    metrics = outcome.metrics()
    seconds = time.perf_counter() - started
    folder = outcome.run.folder
    if as_json:
        kept = ("consortium", "title", "simulated", "task", "global", "sites", "bytes", "rounds", "exclusions", "plan_sha256")
        console.write_json(
            {
                **{k: metrics[k] for k in kept},
                "model": metrics["model"] | _standing(outcome.registered),
                "run": {"id": folder.name, "folder": str(folder), "report": str(outcome.report), "evidence": _evidence(folder)},
                "orchestrator": {"name": outcome.orchestrator.name, "why": outcome.orchestrator.why},
                "seconds": round(seconds, 3),
            }
        )
        return
    console.show_result(metrics)
    console.show_where(_where(consortium, project or home, folder, outcome.report, metrics, outcome.registered))
    console.say(f"\n{seconds:.0f} s; steps chained by {outcome.orchestrator.name} ({outcome.orchestrator.why})")


def _evidence(folder: Path) -> str | None:
    from fedmat.places import EVIDENCE

    return str(folder / EVIDENCE) if (folder / EVIDENCE).exists() else None


def _standing(registered: dict[str, Any] | None) -> dict[str, Any]:
    return {k: registered[k] for k in ("version", "aliases", "reason", "tracking_uri")} if registered else {"version": None}


def _where(
    consortium: Path, home: Path | None, folder: Path, report: Path, metrics: dict[str, Any], registered: dict[str, Any] | None
) -> list[tuple[str, str]]:
    from fedmat.console import show_path

    at = f" --home {show_path(home)}" if home else ""
    rejected = [s for s, row in metrics["sites"].items() if sum(row["rejected"].values())]
    places = [
        ("report", show_path(report)),
        ("Prefect and MLflow", f"fedmat ui {show_path(consortium)}{at}   (starts both pages, prints their addresses)"),
        ("model file", show_path(folder / "model.safetensors")),
    ]
    if registered:
        places.append(("model in MLflow", f"{registered['name']} version {registered['version']}; {registered['reason']}"))
    if evidence := _evidence(folder):
        places.append(("evidence", f"{show_path(Path(evidence))} (fedmat audit verify reads it)"))
    if rejected:
        reasons = folder.parents[1] / "sites" / rejected[0] / "quarantine" / "reasons.csv"
        places.append(("rejected rows", f"{show_path(reasons)} (stays at the site)"))
    places.append(("predict", f"fedmat predict {folder.name} RECORDS.csv{at}"))
    return places


@app.command()
def report(
    run_: Annotated[str, typer.Argument(metavar="RUN", help="Run id, run folder, consortium file (its latest run) or latest.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show a run's result and write its report page again.

    Example:  fedmat report latest
    """
    from fedmat import console, files, places
    from fedmat import report as page

    folder = places.find_run(run_, home)
    path = page.write(folder)
    metrics = files.read_json(folder / "metrics.json") if (folder / "metrics.json").is_file() else None
    if as_json:
        console.write_json({"run": folder.name, "report": str(path), "metrics": metrics})
        return
    if metrics is not None:
        console.show_result(metrics)
    console.show_where([("report", console.show_path(path))])


@app.command()
def settle(
    consortium: Consortium,
    run_id: Annotated[str | None, typer.Option(help="Which run.", show_default="the latest")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Settle who contributed how much to a run's model.

    The charter's Auditor works it out from noisy sums that the sites seal to it; each site pays for them from a privacy
    budget of its own, and answers once per plan. Needs plan.security.mode trigram or ckks.

    Example:  fedmat settle consortium.yaml
    """
    from fedmat import console, pipeline, places

    where = home or places.workspace(consortium)
    opened = pipeline.finished(consortium, where, places.find_run(run_id or str(consortium), where))
    folder = opened.folder
    with console.working("asking sites and the Auditor"):
        found = pipeline.settle(opened)
    try:
        entered = pipeline.account(opened, datetime.now(UTC), ask=True)
        ledger = f"{entered.written} new entries, {console.show_path(entered.bundle)}"
    except NotEvidenced as error:
        ledger = f"not in a ledger: {error.what}"
    if as_json:
        console.write_json(found | {"ledger": ledger})
        return
    cells = [
        (site, f"{row['share']:.4f}", f"{row['error']:.4f}", "-" if row["credits"] is None else row["credits"])
        for site, row in found["sites"].items()
    ]
    console.show_rows("", ("site", "share", "error", "credits"), cells, right=("share", "error", "credits"))
    for site, why in found["missing"].items():
        console.say(f"{site} gave no sums: {why}")
    console.show_where([("settlement", console.show_path(folder / "settlement.json")), ("ledger", ledger)])


# --- models ------------------------------------------------------------------------------------------------------


@app.command()
def register(
    consortium: Consortium,
    run_id: Annotated[str | None, typer.Option(help="Which run.", show_default="the latest")] = None,
    home: Home = None,
    tracking_uri: Store = None,
    as_json: Json = False,
) -> None:
    """Register a finished run's model, or decide anew about one that waited for approvals.

    It becomes champion when it beats the present one on the same test set and the charter's approvals are in the ledger
    (fedmat approve). The registration becomes an entry, and the evidence bundle is packed again.

    Example:  fedmat register consortium.yaml
    """
    from fedmat import console, pipeline, places

    where = home or places.workspace(consortium)
    folder = places.find_run(run_id or str(consortium), where)
    done = pipeline.publish(pipeline.finished(consortium, where, folder), tracking_uri)
    if as_json:
        console.write_json(pipeline.as_plain(done))
        return
    console.show_where([
        ("model", f"{done.name} version {done.version}: {', '.join(done.aliases) or 'superseded'}"),
        ("why", done.reason),
        ("registry", done.tracking_uri),
    ])  # fmt: skip


@app.command()
def models(tracking_uri: Store = None, as_json: Json = False) -> None:
    """List the registered models, newest first.

    Example:  fedmat models --json
    """
    from datetime import UTC, datetime

    from fedmat import console, registry

    store = tracking_uri or registry.registry_uri(Path.cwd())
    with console.working("asking MLflow"):
        rows = registry.models(store)
    if as_json:
        console.write_json(rows)
        return
    if not rows:
        console.say("no model is registered yet: fedmat run CONSORTIUM registers one")
        return
    columns = ("model", "version", "alias", "error", "consortium", "registered (UTC)", "why")
    cells = [
        (
            row["name"], row["version"], ", ".join(row["aliases"]) or "-",
            f"{row['score']:.4g} {row['unit'] or ''}".strip() if row["score"] is not None else "not evidenced",
            f"{row['consortium']}{' (simulated)' if row['simulated'] else ''}",
            datetime.fromtimestamp(row["created_ms"] / 1000, UTC).strftime("%Y-%m-%d %H:%M"), row["reason"] or "",
        )
        for row in rows
    ]  # fmt: skip
    console.show_rows("", columns, cells, right=("version", "error"))


@app.command()
def predict(
    model: Annotated[
        str,
        typer.Argument(
            help="Model file, run id or folder, consortium file, latest, or a registered name: fedmat-x, fedmat-x@champion, fedmat-x/3."
        ),
    ],
    records: Annotated[
        Path, typer.Argument(metavar="FILE", help="CSV, Excel, Parquet or JSON with contract field names and units.")
    ],
    site: Annotated[
        str | None, typer.Option(help="Use the model this site made for its own materials; it lies in the site's workspace.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write a CSV file instead of printing.")] = None,
    home: Home = None,
    tracking_uri: Store = None,
    as_json: Json = False,
) -> None:
    """Predict a property for raw records.

    Records hold formula, SMILES or mixture, and conditions; never feature vectors.
    Gives the task's property in its own unit with the ends of its interval, and whether the record lies inside the range the
    model was trained on. With --site it is the site's own mixture, made of the joint model and its own.

    Example:  fedmat predict latest new-cells.csv --out predictions.csv
    """
    from fedmat import console, files, places, registry, serving, wire
    from fedmat.data import layout

    path = places.site_model(model, site, home) if site else places.find_model(model, home)
    with console.working("predicting"):
        if path is None:
            found: Any = registry.load(model, tracking_uri or registry.registry_uri(Path.cwd()))
        else:
            found = wire.load_site_model(path) if site else wire.load_model(path)
        frame = layout.read(records)
        answers = serving.predict(found, frame)
    unit = str(wire.plain(found.spec)["task"]["unit"])
    if as_json:
        console.write_json({"unit": unit, "predictions": wire.plain(answers.to_dict(orient="records"))})
        return
    text = frame.assign(**answers).to_csv(index=False)
    if out:
        files.write_atomic(out, text.encode())
        console.say(f"{len(answers)} predictions{f' in {unit}' if unit else ''}: {out}")
    else:
        typer.echo(text, nl=False)
        console.say(f"prediction in {unit}" if unit else "prediction without a unit")
    outside = int((~answers["in_domain"]).sum())
    if outside:
        console.say(f"{outside} of {len(answers)} records lie outside the range the model was trained on: extrapolation")


# --- long-running ------------------------------------------------------------------------------------------------


@app.command()
def ui(
    consortium: Annotated[
        Path | None, typer.Argument(help="The consortium whose runs are shown.", show_default="the one that ran last")
    ] = None,
    home: Home = None,
    prefect_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 5000,
    tracking_uri: Store = None,
) -> None:
    """Start the pages of Prefect and MLflow; Ctrl-C stops both.

    Example:  fedmat ui examples/cells/consortium.yaml --prefect-port 4300
    """
    from fedmat import console, places
    from flows import serve as services

    where = home or (places.workspace(consortium) if consortium else places.last_workspace())
    services.ui(where, prefect_port=prefect_port, mlflow_port=mlflow_port, tracking_uri=tracking_uri, say=console.say)


@app.command()
def serve(
    consortium: Consortium,
    cron: Annotated[str, typer.Option(help="When: minute, hour, day, month, weekday.")] = "0 2 * * *",
    timezone: Annotated[str, typer.Option(help="IANA name, e.g. Europe/Berlin.")] = "UTC",
    every: Annotated[int | None, typer.Option(min=1, help="Run every so many seconds instead of --cron.")] = None,
    name: Annotated[str, typer.Option(help="Of the deployment.")] = "nightly",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of training.", show_default="as the consortium file says")
    ] = None,
    home: Home = None,
    prefect_port: Annotated[int, typer.Option(min=0, max=65535, help="Of the server, if one has to be started.")] = 4200,
    register: Annotated[bool, typer.Option(help="Register the models in MLflow.")] = True,
    tracking_uri: Store = None,
    project: Project = None,
) -> None:
    """Run a consortium every night until Ctrl-C.

    A Prefect deployment: it shows in the pages of Prefect and can be started there by hand too. Runs never overlap.

    Example:  fedmat serve examples/cells/consortium.yaml --cron "30 1 * * *" --timezone Europe/Berlin
    """
    from datetime import timedelta

    from fedmat import console
    from flows import serve as services

    services.serve(
        consortium, cron=cron, timezone=timezone, every=timedelta(seconds=every) if every else None, name=name, home=home,
        rounds=rounds, register=register, tracking_uri=tracking_uri, prefect_port=prefect_port, say=console.say,
        project=project,
    )  # fmt: skip


# --- between organisations, and to measure -----------------------------------------------------------------------

app.command()(rehearse)
app.command()(bench)
app.command()(approve)
