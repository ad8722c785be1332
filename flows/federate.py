"""The consortium's run: every site prepared, the rounds, the baselines, the evaluation, the report.

Rounds are one task, not one task each: the coordinator keeps its own state after every round, and Prefect gets a
progress bar now and then and one table at the end, which costs well under 0.3 s a round.

Where the sites are other organisations (``project``), each prepares its data at home, and what is asked of sites is done by a job
at the operator's FLARE server; this side submits it and follows it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedmat import files, pipeline
from fedmat.domain import RoundReport
from fedmat.errors import DataError, NotEvidenced, ServiceError, SiteRefused
from fedmat.pipeline import METRICS, MODEL, Run
from flows.prepare import prepare
from flows.publish import publish
from flows.shared import (
    DEADLINE_S,
    Board,
    Event,
    alert,
    call,
    flow,
    key,
    perform,
    reference,
    rename,
    run_name,
    table,
    task,
    tell,
)


# None of these is retried: they fail on data, on settings or on a quorum, and a second try would find the same. A run
# that was cut off goes on from its last round when it is started again.
@task(name="train", tags=["fedmat"])
def train(run: Run, fresh: bool) -> int:
    """Does the rounds that are still to do; returns how many that were."""
    board = Board(run.config().name, run.plan().settings.rounds)

    def rounds() -> int:
        done = 0
        for report in pipeline.train(run, resume=not fresh):
            tell(report)
            board.round(report)
            done += 1
        return done

    try:
        return perform("train", rounds, run=run, detail=lambda n: f"{n} rounds")
    finally:
        board.close()


@task(name="baselines", tags=["fedmat"])
def baselines(run: Run) -> None:
    """Trains what the global model is compared with."""
    perform("baselines", lambda: pipeline.baselines(run), run=run)


@task(name="evaluate", tags=["fedmat"])
def evaluate(run: Run) -> dict[str, Any]:
    """Scores every model on the frozen test groups and returns the metrics, which hold no record."""
    return perform("evaluate", lambda: pipeline.evaluate(run), run=run)


@task(name="account", tags=["fedmat"])
def account(run: Run, *, ask: bool) -> str:
    """Has the sites sign what they did, writes the run into the ledger and packs its evidence; says what kept it if not."""

    def work() -> str:
        try:
            done = pipeline.account(run, datetime.now(UTC), ask=ask)
        except NotEvidenced as error:  # a consortium that has begun no ledger: its model is none the worse
            return f"not in a ledger: {error.what}"
        return f"{done.written} entries, {done.size} in the ledger, {done.bundle.name}"

    return perform("account", work, run=run, detail=lambda said: said)


@task(name="operate", tags=["fedmat"])
def operate(run: Run, fresh: bool, token: str | None, deadline_s: float) -> tuple[Run, str]:
    """Has a job do the rounds, baselines and evaluation; returns the run under its name, and the order's token."""
    from fedmat.federation.flare import Session
    from flows import operate as side

    board = Board(run.config().name, run.plan().settings.rounds)
    placed = side.place(
        run.home, run.consortium_file, datetime.now(UTC), token=token, run_id=run.run_id, rounds=run.rounds, fresh=fresh
    )

    def hear(event: Event) -> None:
        tell(event)
        if isinstance(event, RoundReport):
            board.round(event)

    def job() -> Run:
        done = side.follow(placed, session=lambda: Session(run.home / "admin"), on_event=hear, deadline_s=deadline_s)
        return done.run()

    try:
        return perform("train", job, run=run, detail=lambda r: f"order {placed.token}, run {r.run_id}"), placed.token
    finally:
        board.close()


@task(name="report", tags=["fedmat"])
def report(run: Run) -> Path:
    """Writes the report page."""
    return perform("report", lambda: pipeline.report(run), run=run)


@flow(name="federate", flow_run_name=run_name, description="Prepares all sites, runs the rounds, evaluates and reports.")
def federate(
    consortium: str,
    home: str | None = None,
    run_id: str | None = None,
    rounds: int | None = None,
    fresh: bool = False,
    project: str | None = None,
    token: str | None = None,
    deadline_s: float = DEADLINE_S,
) -> dict[str, str]:
    """Runs a consortium up to its report and returns references to what it made.

    Args:
        consortium: path of the consortium file.
        home: workspace; by default ``$FEDMAT_HOME``, else ``.fedmat``, plus the consortium's name.
        run_id: name of the run; by default it is named by plan and data, so the same again goes on where it stopped.
        rounds: replaces the plan's number of rounds.
        fresh: throws away earlier rounds of this run.
        project: the operator's project folder, whose FLARE server reaches the sites; it is the workspace then. None: all sites
            are here.
        token: with a project, name of the order; by default plan and day, so that the same again goes on with it.
        deadline_s: with a project, how long sites and jobs may take together.
    """
    run = reference(consortium, home, run_id, rounds, project)
    name = run.config().name
    order = ""
    if project is None:
        _prepare_all(run)
        rename(f"{name}/{run.folder.name}")
        call(train, run, fresh)
        call(baselines, run)
        metrics = call(evaluate, run)
    else:
        run, order = call(operate, run, fresh, token, deadline_s)
        rename(f"{name}/{run.folder.name}")
        metrics = files.read_json(run.folder / METRICS)
    call(account, run, ask=project is None)
    page = call(report, run)
    table(key(name, "benefit"), _benefit(metrics), f"{name}: {metrics['task']['metric']} in {metrics['task']['metric_unit']}")
    return {
        "run_id": run.folder.name,
        "folder": str(run.folder),
        "report": str(page),
        "model_sha256": str(metrics["model"]["sha256"]),
        "order": order,
    }


@flow(
    name="consortium-run",
    flow_run_name=run_name,
    on_failure=[alert],
    on_crashed=[alert],
    description="From the sites' data to a registered model.",
)
def consortium_run(
    consortium: str,
    home: str | None = None,
    run_id: str | None = None,
    rounds: int | None = None,
    fresh: bool = False,
    to_registry: bool = True,
    tracking_uri: str | None = None,
    project: str | None = None,
    token: str | None = None,
    deadline_s: float = DEADLINE_S,
) -> dict[str, Any]:
    """Federates and, unless ``to_registry`` is off, publishes; see :func:`federate`, :func:`flows.publish.publish`.

    Raises:
        ServiceError: also when only the registration is missing; the finished model is on disk then, and the message says so.
    """
    name = reference(consortium, home, run_id, rounds, project).config().name
    tags = (f"consortium:{name}",)
    made: dict[str, Any] = call(federate, consortium, home, run_id, rounds, fresh, project, token, deadline_s, tags=tags)
    rename(f"{name}/{made['run_id']}")
    if not to_registry:
        return {**made, "registered": None}
    try:
        return {
            **made,
            "registered": call(publish, consortium, project or home, made["run_id"], rounds, tracking_uri, tags=tags),
        }
    except ServiceError as trouble:
        why = trouble.what
    if project is not None:
        from flows import operate as side

        side.reopen(Path(project), made["order"])
    raise ServiceError(
        f"the model is finished and on disk ({Path(made['folder']) / MODEL}); its registration is pending: {why}",
        fix="start MLflow and run the same command again, without --fresh: nothing is trained again",
    )


def _prepare_all(run: Run) -> None:
    refused: list[DataError] = []
    for site in run.sites:
        try:
            tags = (f"consortium:{run.config().name}", f"site:{site}")
            call(prepare, str(run.consortium_file), site, str(run.home), tags=tags)
        except DataError as trouble:  # the other sites still hear what is wrong with theirs
            refused.append(trouble)
    if len(run.sites) - len(refused) < run.plan().settings.quorum:
        raise _together(refused)  # otherwise the run goes on without them, and every report says so


def _together(refused: list[DataError]) -> DataError:
    if len(refused) == 1:
        return refused[0]
    return SiteRefused(
        f"{len(refused)} sites cannot take part:\n" + "\n".join(e.what for e in refused),
        fix="; ".join(dict.fromkeys(e.fix for e in refused if e.fix)),
    )


def _benefit(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    measure = metrics["task"]["metric"]
    rows = []
    for site, found in metrics["sites"].items():
        row: dict[str, Any] = {"site": site, "organisation": found["organisation"], "test rows": found["n_test"]}
        for arm in ("local", "federated", "finetuned", "personal", "pooled"):
            row[f"{arm} (own)"] = found["own"].get(arm, {}).get(measure)
        rows.append(row)
    return rows
