"""Prefect flows: what happens in the world (clock, network, retries), thin, around the steps of ``fedmat.pipeline``.

``run_all`` is the one entry for a whole run. It works with a Prefect server, with a short-lived one of its own, and
without Prefect, with the identical model; it says which it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fedmat.telemetry  # noqa: F401  before Prefect is imported

if TYPE_CHECKING:
    from fedmat.pipeline import Run
    from flows.services import Orchestrator, Wanted
    from flows.shared import Event

__all__ = ["Outcome", "run_all"]


@dataclass(frozen=True)
class Outcome:
    """References to what a run made.

    Attributes:
        run: the run under the name it got.
        registered: where the model stands in the registry, as in ``fedmat.registry.Registered``; None if not asked for.
    """

    run: Run
    report: Path
    model_sha256: str
    registered: dict[str, Any] | None
    orchestrator: Orchestrator

    def metrics(self) -> dict[str, Any]:
        """Returns the run's metrics.json."""
        from fedmat import files
        from fedmat.pipeline import METRICS

        found: dict[str, Any] = files.read_json(self.run.folder / METRICS)
        return found


def run_all(
    consortium: Path | str,
    *,
    home: Path | str | None = None,
    run_id: str | None = None,
    rounds: int | None = None,
    fresh: bool = False,
    register: bool = True,
    tracking_uri: str | None = None,
    orchestrator: Wanted = "auto",
    on_event: Callable[[Event], None] | None = None,
    quiet: bool = True,
    project: Path | str | None = None,
    token: str | None = None,
    deadline_s: float | None = None,
) -> Outcome:
    """Runs a consortium from its sites' data to a registered model.

    Args:
        consortium: the consortium file.
        home: workspace; by default ``$FEDMAT_HOME``, else ``.fedmat``, plus the consortium's name.
        run_id: name of the run; by default it is named by plan and data, so the same again goes on where it stopped.
        rounds: replaces the plan's number of rounds.
        fresh: throws away earlier rounds of this run.
        register: False stops after the report.
        tracking_uri: MLflow's store; by default ``$MLFLOW_TRACKING_URI``, else ``mlruns/mlflow.db``.
        orchestrator: ``auto`` uses Prefect if it can be had, ``prefect`` insists on it, ``none`` runs plain functions.
        on_event: called with every :class:`flows.shared.Step` and :class:`fedmat.domain.RoundReport`.
        quiet: keeps Prefect's progress lines off the terminal.
        project: the operator's project folder, where sites are other organisations; it replaces ``home``.
        token, deadline_s: with a project, as in :func:`flows.federate.federate`.

    Raises:
        FedmatError: the consortium, its data or a service is at fault; see ``docs/errors.md``.
    """
    from dataclasses import replace

    from fedmat.errors import FedmatError, ServiceError
    from flows.federate import consortium_run
    from flows.services import Orchestrator, orchestration
    from flows.shared import DEADLINE_S, LISTENER, reference

    run = reference(str(consortium), str(home) if home else None, run_id, rounds, str(project) if project else None)
    given = {
        "consortium": str(run.consortium_file),
        "home": str(run.home) if project is None else None,
        "project": str(run.home) if project is not None else None,
        "token": token,
        "deadline_s": DEADLINE_S if deadline_s is None else deadline_s,
        "run_id": run_id,
        "rounds": rounds,
        "fresh": fresh,
        "to_registry": register,
        "tracking_uri": tracking_uri,
    }
    listening = LISTENER.set(on_event)
    try:
        meanwhile = _import_tools if project is None else lambda: None  # else the sites do the work
        with orchestration(orchestrator, run.home, quiet=quiet, meanwhile=meanwhile) as who:
            if who.name == "none":
                made = consortium_run.fn(**given)
            else:
                try:
                    made = consortium_run(**given)
                except FedmatError:
                    raise
                except Exception as error:  # every error of ours is a FedmatError: this one is Prefect's  # noqa: BLE001
                    what = f"Prefect failed during the run ({type(error).__name__})"
                    if orchestrator == "prefect":
                        raise ServiceError(what, fix="run again (it goes on), or use --orchestrator none") from None
                    who = Orchestrator("none", f"plain functions, because {what}")
                    made = consortium_run.fn(**{**given, "fresh": False})  # what was done before is kept
    finally:
        LISTENER.reset(listening)
    return Outcome(
        run=replace(run, run_id=made["run_id"]),
        report=Path(made["report"]),
        model_sha256=made["model_sha256"],
        registered=made["registered"],
        orchestrator=who,
    )


def _import_tools() -> None:
    """Imports what the first step needs anyway, while Prefect's server starts: two things that each take seconds."""
    from contextlib import suppress

    with suppress(Exception):  # a step that needs it says so properly
        import great_expectations
        import pymatgen.core
        import torch

        del great_expectations, pymatgen, torch
