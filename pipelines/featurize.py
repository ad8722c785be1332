"""Stage ``featurize@SITE``: one site's records -> its feature table."""

from __future__ import annotations

from fedmat import pipeline
from fedmat.pipeline import Run
from pipelines import main


def featurize(run: Run, site: str) -> str:
    """Featurizes one site."""
    made = pipeline.featurize_site(run, site)
    return f"{site}: {made.n_rows} rows, {made.n_features} features, table {made.sha256[:12]}"


if __name__ == "__main__":
    main(featurize, "SITE")
