"""One site prepares its own data: ingest and validate, version, featurize.

Runs at the site, with the site's own Prefect server or none. What Prefect sees: paths, names, counts and digests.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from fedmat import pipeline
from fedmat.pipeline import FeatureRef, Run
from flows.shared import call, flow, key, may_pass, perform, reference, run_name, table, task

if TYPE_CHECKING:
    from fedmat.data.records import Snapshot
    from fedmat.data.versions import Version


@task(name="ingest", task_run_name="ingest {site}")
def ingest(run: Run, site: str) -> Snapshot:
    """Reads, converts and validates the site's data; bad rows go to its quarantine. Wrong data stays wrong: no retry."""
    return perform(
        "ingest",
        lambda: pipeline.prepare_site(run, site),
        run=run,
        site=site,
        detail=lambda s: f"{s.n_records} records, {s.n_rejected} rejected",
    )


# Retried: the push to the site's DVC remote may meet a remote that is away for a moment. Nothing else here may pass.
@task(name="version", task_run_name="version {site}", retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=may_pass)
def version(run: Run, site: str, now: datetime) -> Version:
    """Records the accepted data as a version in the site's own git and DVC repository."""
    return perform("version", lambda: pipeline.version_site(run, site, now), run=run, site=site, detail=lambda v: v.sha256[:12])


@task(name="featurize", task_run_name="featurize {site}")
def featurize(run: Run, site: str) -> FeatureRef:
    """Computes the site's features, or finds them cached under the data's digest."""
    return perform(
        "featurize",
        lambda: pipeline.featurize_site(run, site),
        run=run,
        site=site,
        detail=lambda f: f"{f.n_rows} rows, {f.n_features} features",
    )


@flow(name="prepare", flow_run_name=run_name, description="One site validates, versions and featurizes its own data.")
def prepare(consortium: str, site: str, home: str | None = None) -> dict[str, str | int]:
    """Prepares one site and returns its reference: digests and counts.

    Args:
        consortium: path of the consortium file.
        site: name of the member whose data is prepared.
        home: workspace; by default ``$FEDMAT_HOME``, else ``.fedmat``, plus the consortium's name.
    """
    run = reference(consortium, home)
    run.site_config(site)
    snapshot = call(ingest, run, site)
    recorded = call(version, run, site, datetime.now(UTC))
    features = call(featurize, run, site)
    rows = [
        {"what": "accepted", "rows": snapshot.n_records},
        *({"what": f"rejected: {reason}", "rows": count} for reason, count in sorted(snapshot.rejected.items())),
    ]
    table(key(site, "validation"), rows, f"{site}: dataset {snapshot.sha256[:12]}, version {recorded.tag}")
    return {
        "site": site,
        "dataset_sha256": snapshot.sha256,
        "features_sha256": features.sha256,
        "n_records": snapshot.n_records,
        "n_rejected": snapshot.n_rejected,
        "n_features": features.n_features,
        "tag": recorded.tag,
    }
