"""The finished model goes to the registry, and its verdict to people.

What Prefect sees is what MLflow sees: names, digests, counts and metrics.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmat import files, pipeline
from fedmat.pipeline import METRICS, Run
from flows.shared import call, flow, key, markdown, may_pass, perform, reference, run_name, task

if TYPE_CHECKING:
    from fedmat.registry import Registered


# Retried: MLflow's store may be locked by another writer, or its server restarting. Registering twice is registering
# once: a model that is there already gets no second version.
@task(name="register", tags=["fedmat"], retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=may_pass)
def register(run: Run, tracking_uri: str | None) -> Registered:
    """Registers the model and promotes it if it beats the present champion."""
    return perform(
        "register",
        lambda: pipeline.publish(run, tracking_uri),
        run=run,
        detail=lambda r: f"{r.name} version {r.version}",
    )


@flow(name="publish", flow_run_name=run_name, description="Registers a finished run's model and says how it fares.")
def publish(
    consortium: str,
    home: str | None = None,
    run_id: str | None = None,
    rounds: int | None = None,
    tracking_uri: str | None = None,
) -> dict[str, Any]:
    """Registers the model of a finished run and returns where it stands in the registry.

    Args:
        consortium: path of the consortium file.
        home, run_id, rounds: as in :func:`flows.federate.federate`.
        tracking_uri: MLflow's store; by default ``$MLFLOW_TRACKING_URI``, else ``mlruns/mlflow.db``.
    """
    run = reference(consortium, home, run_id, rounds)
    registered = call(register, run, tracking_uri)
    metrics = files.read_json(run.folder / METRICS)
    name = run.config().name
    markdown(key(name, "verdict"), verdict(metrics, registered, run.folder), f"{name}: what came out, and where it is")
    return pipeline.as_plain(registered)


def verdict(metrics: dict[str, Any], registered: Registered, folder: Path) -> str:
    """Returns the outcome of a run as a page of markdown."""
    task_, overall = metrics["task"], metrics["global"]
    measure, unit = task_["metric"], task_["metric_unit"]
    lines = [
        f"# {registered.name} version {registered.version}: {', '.join(registered.aliases) or 'superseded'}",
        "",
        registered.reason,
        "",
        f"| model | {measure} ({unit}) on every site's held-out groups |",
        "|---|---|",
    ]
    for arm, label in (
        ("federated", "**federated**"),
        ("local_mean", "local-only, mean over sites"),
        ("finetuned_mean", "fine-tuned, mean over sites"),
        ("pooled", "pooled (upper bound)"),
        ("dummy", "always the mean"),
    ):
        if arm in overall and overall[arm].get(measure) is not None:
            lines.append(f"| {label} | {overall[arm][measure]:.4g} |")
    if metrics["simulated"]:
        lines += ["", "This consortium is simulated: one operator owns all of its data."]
    lines += [
        "",
        f"* model sha256 `{metrics['model']['sha256']}`",
        f"* plan sha256 `{metrics['plan_sha256']}`",
        f"* registry `{registered.tracking_uri}`, load with `models:/{registered.name}/{registered.version}`",
        f"* report `{(folder / 'report.html').resolve()}`",
        f"* exclusions: {len(metrics['exclusions'])}, rounds: {metrics['rounds']['completed']} of {metrics['rounds']['count']}",
    ]
    return "\n".join(lines) + "\n"
