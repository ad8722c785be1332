"""Stage ``prepare@SITE``: one site's files -> accepted records, manifest, validation result, quarantine."""

from __future__ import annotations

from fedmat import pipeline
from fedmat.pipeline import Run
from pipelines import main


def prepare(run: Run, site: str) -> str:
    """Prepares one site."""
    snapshot = pipeline.prepare_site(run, site)
    return f"{site}: {snapshot.n_records} records, {snapshot.n_rejected} rejected, dataset {snapshot.sha256[:12]}"


if __name__ == "__main__":
    main(prepare, "SITE")
