"""What is registered where: the one module that speaks to MLflow, on the coordinator's side.

Knows: a finished run's folder and how its evidence becomes an MLflow run, a registered version, tags and aliases.
Refuses to know: records (it sees digests and counts only) and any decision about promotion other than "beats the
present champion on the same frozen test set". It retries nothing.

A version is a statement about digests: MLflow's own dataset digest covers 10,000 rows with 32 bits, so the datasets
here carry the first 36 characters of fedmat's SHA-256, and the full value in a tag.

References:
    MLflow model registry: aliases and tags (stages are deprecated). Models from code: no pickle is written or read.
"""

from __future__ import annotations

import difflib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as release
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fedmat.telemetry  # noqa: F401  before MLflow is imported
from fedmat import files, wire
from fedmat._version import __version__
from fedmat.config import FeatureSpec
from fedmat.data.contract import Field, RecordType
from fedmat.data.example import example, inputs
from fedmat.errors import ConfigError, ServiceError, StateError
from fedmat.evidence import MODEL, FinishedRun, flat, numbers

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

    from fedmat.domain import GlobalModel

CHAMPION, CHALLENGER = "champion", "challenger"
_SCRIPT = Path(__file__).with_name("mlflow_model.py")
_METRICS_PER_CALL, _PARAMS_PER_CALL = 1000, 100  # MLflow's limits for one batch
_DECISION = "fedmat.decision"
_WAITS = "challenger: waits for "  # a decision that is made anew when the version is registered again
_ATTACHED = ("plan.json", "metrics.json", "timings.json", "report.html")


@dataclass(frozen=True)
class Registered:
    """Where a run's model stands in the registry.

    Attributes:
        aliases: aliases that point at this version now.
        run_id: MLflow's id of the run, not fedmat's.
        reason: why the version is, or is not, the champion.
    """

    name: str
    version: int
    sha256: str
    aliases: tuple[str, ...]
    run_id: str
    tracking_uri: str
    reason: str = ""


def registry_uri(root: Path) -> str:
    """Returns ``MLFLOW_TRACKING_URI`` if it is set, else the sqlite store ``root/mlruns/mlflow.db`` (absolute)."""
    named = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    return named or f"sqlite:///{(root / 'mlruns' / 'mlflow.db').resolve()}"


def register(run_folder: Path, *, tracking_uri: str, hindrance: str = "") -> Registered:
    """Registers a finished run's model, once, and decides about its aliases.

    A model whose SHA-256 is registered already gets no second version, and its aliases stay as they are. A
    registration that was interrupted is taken up: its unfinished MLflow run is deleted and written anew.

    Args:
        run_folder: a run's folder with plan.json, metrics.json, rounds.jsonl and model.safetensors.
        tracking_uri: MLflow tracking (and registry) URI.
        hindrance: why the model may not be champion whatever its score, e.g. lacking approvals; "" if nothing forbids it.
            Such a version is decided about anew when it is registered again.

    Raises:
        NotEvidenced: the run is not finished (a file is missing).
        StateError: the files disagree with each other.
        ServiceError: MLflow refused or could not be reached.
    """
    run = FinishedRun.read(run_folder)
    with _service(tracking_uri):
        client = _client(tracking_uri)
        version = _find(client, run)
        if version is None:
            version = _publish(client, run, tracking_uri)
        found = client.get_model_version(run.name, str(version))
        run_id = str(found.run_id)
        if client.get_run(run_id).info.status != "FINISHED":
            client.set_terminated(run_id, "FINISHED")
        if found.tags.get(_DECISION, _WAITS).startswith(_WAITS):
            client.set_registered_model_alias(run.name, CHALLENGER, str(version))
            promoted, reason = (False, _WAITS + hindrance) if hindrance else _decide(client, run, version)
            if promoted:
                client.set_registered_model_alias(run.name, CHAMPION, str(version))
            client.set_model_version_tag(run.name, str(version), _DECISION, reason)
            found = client.get_model_version(run.name, str(version))
    return Registered(
        name=run.name,
        version=version,
        sha256=run.sha256,
        aliases=tuple(sorted(found.aliases)),
        run_id=run_id,
        tracking_uri=tracking_uri,
        reason=str(found.tags[_DECISION]),
    )


def models(tracking_uri: str) -> list[dict[str, Any]]:
    """Returns every registered fedmat model version, newest first within a name, as plain JSON.

    Raises:
        ServiceError: MLflow could not be reached.
    """
    place = _sqlite_file(tracking_uri)
    if place is not None and not place.exists():
        return []  # nothing was ever registered here; asking MLflow would create the store
    with _service(tracking_uri):
        found = _pages(_client(tracking_uri), "name LIKE 'fedmat-%'")
        rows = []
        for v in found:
            score = v.tags.get("fedmat.score")
            rows.append({
                "name": v.name,
                "version": int(v.version),
                "aliases": sorted(v.aliases),
                "sha256": v.tags.get("fedmat.model_sha256"),
                "metric": v.tags.get("fedmat.metric"),
                "score": float(score) if score else None,
                "unit": v.tags.get("fedmat.metric_unit"),
                "consortium": v.tags.get("fedmat.consortium"),
                "simulated": v.tags.get("fedmat.simulated") == "true",
                "test_set_sha256": v.tags.get("fedmat.test_set_sha256"),
                "reason": v.tags.get(_DECISION),
                "run_id": v.run_id,
                "created_ms": int(v.creation_timestamp),
            })  # fmt: skip
    return sorted(rows, key=lambda r: (r["name"], -r["version"]))


def load(reference: str, tracking_uri: str) -> GlobalModel:
    """Returns a registered model, its weights file checked against the registered SHA-256.

    Args:
        reference: ``fedmat-x`` (its champion, else its newest version), ``fedmat-x@alias`` or ``fedmat-x/3``; a leading
            ``models:/`` is allowed.

    Raises:
        ConfigError: there is no such model, alias or version.
        StateError: the stored weights are not the registered ones.
        ServiceError: MLflow could not be reached.
    """
    text = reference.removeprefix("models:/")
    name, alias, number = text.partition("@")[0].partition("/")[0], text.partition("@")[2], text.partition("/")[2]
    rows = models(tracking_uri)
    there = sorted({r["name"] for r in rows})
    mine = [r for r in rows if r["name"] == name]
    if not mine:
        near = difflib.get_close_matches(name, there, n=1, cutoff=0.5)
        hint = (
            f"did you mean '{near[0]}'?" if near else f"there are {', '.join(there)}" if there else "nothing is registered yet"
        )
        raise ConfigError(f"no registered model '{name}'; {hint}", fix="see fedmat models")
    if alias:
        found = [r for r in mine if alias in r["aliases"]]
    elif number:
        found = [r for r in mine if str(r["version"]) == number]
    else:
        found = [r for r in mine if CHAMPION in r["aliases"]] or mine[:1]
    if not found:
        raise ConfigError(f"{name} has no {'alias ' + alias if alias else 'version ' + number}", fix="see fedmat models")
    row = found[0]
    with _service(tracking_uri), tempfile.TemporaryDirectory(prefix="fedmat-") as folder:
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        import mlflow.artifacts

        source = str(_client(tracking_uri).get_model_version(name, str(row["version"])).source)
        got = Path(mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=folder, tracking_uri=tracking_uri))
        paths = sorted(got.rglob(MODEL))
        if len(paths) != 1 or files.sha256_file(paths[0]) != row["sha256"]:
            raise StateError(
                f"{name} version {row['version']}: the stored weights are not the ones that were registered",
                fix="restore the registry's artifacts, or use the run's own model file",
            )
        return wire.load_model(paths[0])


# --- what MLflow is told -----------------------------------------------------------------------------------------


def _client(tracking_uri: str) -> MlflowClient:
    """Returns a client of its own; the process-wide tracking URI stays untouched."""
    for quiet, value in (("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"), ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")):
        os.environ.setdefault(quiet, value)  # stdout belongs to the command line
    place = _sqlite_file(tracking_uri)
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def _find(client: MlflowClient, e: FinishedRun) -> int | None:
    found = _pages(client, f"name = '{e.name}' and tags.`fedmat.model_sha256` = '{e.sha256}'")
    return min((int(v.version) for v in found), default=None)


def _publish(client: MlflowClient, e: FinishedRun, tracking_uri: str) -> int:
    from mlflow.entities import LoggedModelOutput

    tags, text = e.tags(), e.description()
    experiment = _experiment(client, e, tracking_uri)
    for stale in client.search_runs([experiment], f"tags.`fedmat.model_sha256` = '{e.sha256}'"):
        if stale.info.status != "FINISHED":
            client.delete_run(stale.info.run_id)  # an earlier attempt was interrupted: no version came of it
    run = client.create_run(experiment, run_name=e.folder.name, tags=tags | {"mlflow.note.content": text})
    run_id = run.info.run_id
    try:
        _log(client, e, run_id)
        logged = client.create_logged_model(experiment, name=e.name, source_run_id=run_id, tags=tags, model_type="fedmat")
        with tempfile.TemporaryDirectory(prefix="fedmat-") as folder:
            client.log_model_artifacts(logged.model_id, str(_save(e, Path(folder), run_id, logged)))
        client.finalize_logged_model(logged.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, len(e.rounds))])
        if not client.search_registered_models(f"name = '{e.name}'"):
            client.create_registered_model(e.name, tags={"fedmat.target": e.target}, description=text)
        version = client.create_model_version(
            e.name, source=logged.artifact_location, run_id=run_id, model_id=logged.model_id, tags=tags, description=text
        )
        client.set_terminated(run_id, "FINISHED")
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    return int(version.version)


def _experiment(client: MlflowClient, e: FinishedRun, tracking_uri: str) -> str:
    name = f"fedmat/{e.metrics['consortium']}"
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)
    place = _sqlite_file(tracking_uri)
    # without a location of its own the experiment would write below the current directory
    artifacts = (place.parent / "artifacts").as_uri() if place is not None else None
    return str(client.create_experiment(name, artifact_location=artifacts))


def _log(client: MlflowClient, e: FinishedRun, run_id: str) -> None:
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag, Metric, Param

    now = int(time.time() * 1000)
    metrics = [Metric(k, v, now, step) for k, v, step in numbers(e.metrics, e.rounds)]
    for part in _chunks(metrics, _METRICS_PER_CALL):
        client.log_batch(run_id, metrics=part)
    params = [Param(k, v) for k, v in sorted(flat(e.plan).items())]
    for part in _chunks(params, _PARAMS_PER_CALL):
        client.log_batch(run_id, params=part)
    datasets = []
    for site, v in sorted(e.metrics["sites"].items()):
        source = CodeDatasetSource(tags={"fedmat.site": site, "fedmat.where": "stays at the site"})
        dataset = MetaDataset(source, name=f"{site}/{e.records.name}", digest=v["dataset_sha256"][:36])  # type: ignore[abstract]
        about = {"sha256": v["dataset_sha256"], "site": site, "n_train": v["n_train"], "n_test": v["n_test"]}
        tags = [InputTag("mlflow.data.context", "training"), *(InputTag(f"fedmat.{k}", str(x)) for k, x in about.items())]
        datasets.append(DatasetInput(dataset._to_mlflow_entity(), tags))
    client.log_inputs(run_id, datasets=datasets)
    for name in _ATTACHED:
        if (e.folder / name).is_file():
            client.log_artifact(run_id, str(e.folder / name))


def _save(e: FinishedRun, folder: Path, run_id: str, logged: Any) -> Path:
    """Writes the model in MLflow's format: the script, the weights file, signature and a made-up example."""
    import logging

    import mlflow.pyfunc
    import pandas as pd
    from mlflow.models import Model

    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    target = folder / "model"
    mlflow.pyfunc.save_model(
        str(target),
        python_model=str(_SCRIPT),
        artifacts={"model": str(e.folder / MODEL)},
        signature=_signature(e.records, e.target, e.further),
        input_example=pd.DataFrame([example(e.records, e.target)]),
        pip_requirements=_requirements(e),
        metadata={
            "fedmat.model_sha256": e.sha256,
            "fedmat.plan_sha256": e.metrics["plan_sha256"],
            "fedmat.fields": {f.name: {"kind": f.kind, "unit": f.unit} for f in inputs(e.records, e.target)},
        },
        mlflow_model=Model(
            artifact_path=logged.artifact_location, model_uuid=logged.model_id, run_id=run_id, model_id=logged.model_id
        ),
    )
    return target


def _requirements(e: FinishedRun) -> list[str]:
    """Returns fedmat and the exact releases whose change would change a feature."""
    from fedmat.features import registry

    specs = [FeatureSpec.model_validate(f) for f in e.plan["features"]]
    libraries = registry.build(specs, e.records, e.target).libraries
    return [f"fedmat=={__version__}", *(f"{name}=={release(name)}" for name in libraries)]


def _signature(rt: RecordType, target: str, further: Sequence[str]) -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import AnyType

    def column(f: Field) -> ColSpec:
        # MLflow refuses 300 where it expects 300.0, and prints the whole input in that refusal: numbers are left to
        # fedmat's own check, which takes either and names rows and fields only
        return ColSpec(AnyType() if f.kind == "number" else "string", f.name, required=f.required)

    return ModelSignature(
        Schema([column(f) for f in inputs(rt, target)]),
        Schema(
            [
                *(ColSpec("double", name) for name in ("prediction", "low", "high", "spread", *further)),
                ColSpec("boolean", "in_domain"),
            ]
        ),
    )


# --- aliases -------------------------------------------------------------------------------------------------------


def _decide(client: MlflowClient, e: FinishedRun, version: int) -> tuple[bool, str]:
    """Tells whether ``version`` becomes champion, and why (not)."""
    aliases = client.get_registered_model(e.name).aliases
    metric, score = e.metrics["task"]["metric"], e.score
    if score is None:
        return False, f"challenger: this run has no {metric} on the global test, so nothing is proved"
    if CHAMPION not in aliases:
        return True, "champion: there was none before"
    present = aliases[CHAMPION]
    if int(present) == version:
        return True, "champion: there was none before"
    tags = dict(client.get_model_version(e.name, str(present)).tags)
    by_hand = f"set the alias '{CHAMPION}' by hand to promote it"
    if tags.get("fedmat.test_set_sha256") != e.held_out_sha256:
        return False, f"challenger: version {present} was scored on another test set, so they cannot be compared; {by_hand}"
    if tags.get("fedmat.metric") != metric or "fedmat.score" not in tags:
        return False, f"challenger: version {present} has no comparable {metric}; {by_hand}"
    theirs = float(tags["fedmat.score"])
    better = score > theirs if metric == "auc" else score < theirs
    words = f"{metric} {score:.6g} against {theirs:.6g} of version {present} on the same test set"
    return better, f"{'champion' if better else 'challenger'}: {words}"


# --- plumbing ------------------------------------------------------------------------------------------------------


def _pages(client: MlflowClient, query: str) -> list[Any]:
    """Returns all versions a query finds, with their aliases."""
    found: list[Any] = []
    token: str | None = None
    while True:
        page = client.search_model_versions(query, max_results=1000, page_token=token)
        found.extend(page)
        token = page.token
        if not token:
            break
    aliases = {name: client.get_registered_model(name).aliases for name in sorted({v.name for v in found})}
    for v in found:
        v.aliases = [a for a, number in aliases[v.name].items() if int(number) == int(v.version)]
    return found


def _sqlite_file(tracking_uri: str) -> Path | None:
    head = "sqlite:///"
    return Path(tracking_uri[len(head) :].split("?")[0]) if tracking_uri.startswith(head) else None


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


@contextmanager
def _service(tracking_uri: str) -> Iterator[None]:
    """Turns MLflow's, the database's and the network's errors into one that names the service."""
    import requests
    from sqlalchemy.exc import SQLAlchemyError

    try:
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise ServiceError("MLflow does not import", fix="install fedmat with its dependencies again") from error
    try:
        yield
    except (MlflowException, SQLAlchemyError, requests.RequestException, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ServiceError(
            f"MLflow at {_without_password(tracking_uri)}: {first[:300]}",
            fix="check that the store is reachable and writable (MLFLOW_TRACKING_URI), then publish the run again",
        ) from error


def _without_password(uri: str) -> str:
    head, _, tail = uri.rpartition("@")
    return f"{head.split('://')[0]}://…@{tail}" if head else uri
