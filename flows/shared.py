"""What every flow shares: one way to call a step, one boundary for errors, and the artifacts of a run.

Knows: Prefect's decorators and artifacts, and how to do without them. Refuses to know: records and science.

Prefect sends the text of exceptions, tracebacks, log lines and parameters to its server. So parameters are references
only, and :func:`perform` is the one place where an exception can pass from a step to Prefect: fedmat's own errors pass
(their text never holds a cell value), anything else is replaced by its type's name and stays, in full, at the site.
"""

from __future__ import annotations

import copy
import functools
import json
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import fedmat.telemetry  # noqa: F401  before Prefect is imported
from fedmat import files
from fedmat.domain import RoundReport
from fedmat.errors import FedmatError, ServiceError, StateError
from fedmat.pipeline import Run, open_run

try:
    import prefect
    from prefect.cache_policies import NO_CACHE
except Exception:  # a broken Prefect must not stop a run: everything below then works as plain functions  # noqa: BLE001
    prefect = None  # type: ignore[assignment]

T = TypeVar("T")
PROJECT, CHARTER = "project.json", "charter.json"  # in the operator's folder; fedmat.conductor, which knows them, imports FLARE
ALERTS = "alerts.jsonl"
DEADLINE_S = 86_400.0  # for what one run asks of other organisations


@dataclass(frozen=True)
class Step:
    """A step of a run began or ended.

    Attributes:
        site: None for a step of the consortium.
        detail: counts or a digest, for people.
    """

    name: str
    site: str | None
    state: Literal["started", "done", "failed"]
    detail: str = ""


Event = Step | RoundReport
LISTENER: ContextVar[Callable[[Event], None] | None] = ContextVar("LISTENER", default=None)


def tell(event: Event) -> None:
    """Passes an event to whoever started the run in this process (a progress bar, a test)."""
    listener = LISTENER.get()
    if listener is not None:
        listener(event)


# --- flows and tasks -----------------------------------------------------------------------------------------------


class _Plain:
    """Stands in for a flow or task where Prefect cannot be imported."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        functools.update_wrapper(self, fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)


def flow(**options: Any) -> Callable[[Callable[..., T]], Any]:
    """Prefect's ``flow`` with what all of ours have in common: nothing stored, prints not captured, no retries."""
    if prefect is None:
        return _Plain
    return prefect.flow(persist_result=False, log_prints=False, retries=0, validate_parameters=True, **options)


def task(**options: Any) -> Callable[[Callable[..., T]], Any]:
    """Prefect's ``task`` with nothing cached and nothing stored: the steps keep their own, digest-checked caches."""
    if prefect is None:
        return _Plain
    return prefect.task(cache_policy=NO_CACHE, persist_result=False, log_prints=False, **{"retries": 0, **options})


def orchestrated() -> bool:
    """Whether this code runs inside a Prefect flow run."""
    if prefect is None:
        return False
    from prefect.context import FlowRunContext

    return FlowRunContext.get() is not None


def call(step: Any, /, *args: Any, tags: Sequence[str] = (), **kwargs: Any) -> Any:
    """Calls a task or sub-flow through Prefect inside a flow run, and as the plain function it wraps outside of one."""
    if not orchestrated():
        return step.fn(*args, **kwargs)
    from flows.services import without_heartbeat

    with prefect.tags(*tags), without_heartbeat() if isinstance(step, prefect.Flow) else nullcontext():
        return step(*args, **kwargs)


def may_pass(task: Any, run: Any, state: Any) -> bool:
    """Retry condition: only what another attempt may mend, a service that did not do its part."""
    del task, run
    return isinstance(state.data, ServiceError)


# --- references ----------------------------------------------------------------------------------------------------


def reference(
    consortium: str, home: str | None, run_id: str | None = None, rounds: int | None = None, project: str | None = None
) -> Run:
    """Returns the run that a flow's parameters name; errors as in :func:`fedmat.pipeline.open_run`.

    In the operator's project folder the members' site files are not looked for: each is on its own party's machine.

    Args:
        project: the operator's project folder, which is the workspace then.

    Raises:
        StateError: the project folder is none.
    """
    if project is not None and not (Path(project) / PROJECT).is_file():
        raise StateError(
            f"{project}: is not a project folder ({PROJECT} is missing)",
            fix="make it with fedmat consortium init, or correct the path",
        )
    home = project or home
    if home is None or not (Path(home) / PROJECT).is_file():
        return open_run(Path(consortium), home=Path(home) if home else None, run_id=run_id, rounds=rounds)
    place = Path(home).resolve()
    charter = place / CHARTER
    run = Run(Path(consortium).resolve(), place, run_id, rounds, None, charter if charter.exists() else None)
    run.plan()
    return run


def run_name() -> str:
    """Names a flow run after what its parameters say: consortium, site, run."""
    from prefect import runtime

    given = runtime.flow_run.parameters
    parts = [Path(str(given.get("consortium", ""))).resolve().parent.name, given.get("site"), given.get("run_id")]
    with suppress(Exception):
        parts[0] = reference(str(given["consortium"]), given.get("project") or given.get("home")).config().name
    return "/".join(str(p) for p in parts if p)


def rename(name: str) -> None:
    """Gives the current flow run its full name once that is known."""

    def work() -> None:
        from prefect import runtime
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            client.set_flow_run_name(runtime.flow_run.id, name)

    _courteously(work)


# --- the boundary --------------------------------------------------------------------------------------------------


def perform(
    step: str, work: Callable[[], T], *, run: Run, site: str | None = None, detail: Callable[[T], str] = lambda _: ""
) -> T:
    """Does a step's work so that no exception carries a record's value further.

    Raises:
        FedmatError: as raised by the step, without its causes; or, for any other exception, one that names the step
            and the exception's type. What the exception said is in the site's own folder; for a step of the
            consortium only the places in the code are kept, since its text may quote a site's.
    """
    tell(Step(step, site, "started"))
    try:
        result = work()
    except FedmatError as error:
        trouble = copy.copy(error)
    except Exception as error:  # law 2: a foreign text may hold a cell value  # noqa: BLE001
        trouble = _unexpected(step, error, run, site)
    else:
        tell(Step(step, site, "done", detail(result)))
        return result
    tell(Step(step, site, "failed", trouble.what))
    raise trouble  # outside the handlers, so that it has no context that a traceback would print


def _unexpected(step: str, error: Exception, run: Run, site: str | None) -> FedmatError:
    if site is not None:
        path = run.site_folder(site) / "state" / "errors" / f"{step}.txt"
        text = "".join(traceback.format_exception(error))
    else:
        path = run.home / "errors" / f"{step}.txt"
        text = "".join([*traceback.format_tb(error.__traceback__), f"{type(error).__name__} (its text is not kept)\n"])
    with suppress(OSError):
        files.write_atomic(path, text.encode())
    who = f"site {site}, step {step}" if site else f"step {step}"
    return FedmatError(f"{who}: unexpected {type(error).__name__}", fix=f"see {path}, and report it as a bug")


def alert(flow: Any, flow_run: Any, state: Any) -> None:
    """Prefect's hook for a run of a deployment that failed: a page, and a line in ``alerts.jsonl`` of its home for other tools.

    A run that a person started shows its error to that person. Foreign errors are named by type, as everywhere.
    """
    del flow
    if flow_run is None or flow_run.deployment_id is None:
        return
    error: Any = None
    with suppress(Exception):  # a crashed run has no error, and what a state kept may not come back
        error = state.result(raise_on_failure=False) if state.is_failed() else None
    kind = type(error).__name__ if isinstance(error, BaseException) else state.name
    ours = isinstance(error, FedmatError)
    row = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "flow_run": flow_run.name,
        "kind": kind,
        "what": error.what if ours else f"the flow run ended: {kind}",
        "fix": error.fix if ours else "see its page in Prefect, and errors/ of its workspace",
    }
    given = flow_run.parameters
    with suppress(Exception):  # the error itself is with Prefect; telling of it may fail without hiding it
        home = given.get("project") or given.get("home")
        place = Path(home) if home else reference(given["consortium"], None).home
        place.mkdir(parents=True, exist_ok=True)
        with (place / ALERTS).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row, sort_keys=True) + "\n")
    with suppress(Exception):
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.actions import ArtifactCreate

        text = f"# {row['kind']}\n\n{row['what']}\n\n{row['fix']}\n"
        page = ArtifactCreate(
            key=key(flow_run.name, "alert"), type="markdown", description=row["kind"], data=text, flow_run_id=flow_run.id
        )
        with get_client(sync_client=True) as client:
            client.create_artifact(page)


# --- artifacts -----------------------------------------------------------------------------------------------------


def _courteously(work: Callable[[], None]) -> None:
    """Does what is for people only: without Prefect not at all, and a server that is gone neither stops nor delays a run."""
    if not orchestrated():
        return
    from prefect.logging import get_logger
    from prefect.settings import get_current_settings

    from flows.services import answers

    try:
        if answers(f"{get_current_settings().api.url}/health"):  # Prefect's client would try again for many seconds
            work()
    except Exception as error:  # noqa: BLE001  whatever Prefect's client raises, the run is worth more than its artifacts
        get_logger("fedmat").warning("an artifact was not stored (%s)", type(error).__name__)


def key(*parts: str) -> str:
    """Returns an artifact key: lower case letters, digits and dashes."""
    return "-".join("".join(c if c.isalnum() else "-" for c in p.lower()) for p in parts)


def table(name: str, rows: list[dict[str, Any]], about: str) -> None:
    """Stores a table artifact when Prefect is there."""

    def work() -> None:
        from prefect.artifacts import create_table_artifact

        create_table_artifact(table=rows, key=name, description=about)

    _courteously(work)


def markdown(name: str, text: str, about: str) -> None:
    """Stores a markdown artifact when Prefect is there."""

    def work() -> None:
        from prefect.artifacts import create_markdown_artifact

        create_markdown_artifact(markdown=text, key=name, description=about)

    _courteously(work)


class Board:
    """Shows rounds as they close: a progress bar now and then, one table with a row per round at the end.

    Updates wait at least ``every_s`` and twenty times what the last one took, so that they cost 5% of the time at most.
    """

    def __init__(self, consortium: str, rounds: int, every_s: float = 2.0) -> None:
        self._name, self._rounds, self._every = consortium, rounds, every_s
        self._rows: list[dict[str, Any]] = []
        self._bar: Any = None
        self._next = 0.0

    def round(self, report: RoundReport) -> None:
        """Takes one round's report."""
        left_out = [f"{d.site} ({d.reason})" for d in report.dropouts] + [f"{r.site} ({r.reason})" for r in report.rejections]
        self._rows.append(
            {
                "round": report.round + 1,
                "sites": len(report.accepted),
                "left out": ", ".join(left_out) or "none",
                **{f"validation {k}": v for k, v in report.validation.items() if k != "n"},
                "learning rate": report.lr,
                "KiB down": round(sum(report.bytes_down.values()) / 1024, 1),
                "KiB up": round(sum(report.bytes_up.values()) / 1024, 1),
                "seconds": round(report.seconds, 3),
                "model": report.model_sha256[:12],
            }
        )
        if time.monotonic() >= self._next:
            self._show()

    def close(self) -> None:
        """Brings the bar up to date and stores the table, also after a failure."""
        if self._rows:
            self._show()
            table(key(self._name, "rounds"), self._rows, f"{self._name}: every round of this run")

    def _show(self) -> None:
        started = time.monotonic()
        _courteously(self._draw)
        took = time.monotonic() - started
        self._next = time.monotonic() + max(self._every, 20.0 * took)

    def _draw(self) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        share = 100.0 * float(self._rows[-1]["round"]) / self._rounds
        if self._bar is None:
            about = f"{self._name}: rounds done of {self._rounds}"
            self._bar = create_progress_artifact(progress=share, key=key(self._name, "progress"), description=about)
        else:
            update_progress_artifact(artifact_id=self._bar, progress=share)
