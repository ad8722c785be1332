"""Stage ``evaluate``: all models -> metrics.json, and each site's benefit for ``dvc plots``."""

from __future__ import annotations

from fedmat import pipeline
from fedmat.pipeline import Run
from pipelines import main, write_csv


def evaluate(run: Run) -> str:
    """Scores every model on the frozen test groups."""
    found = pipeline.evaluate(run)
    measure = found["task"]["metric"]
    rows = [
        (site, arm, f"{site}, {arm}", value[measure], value.get(f"{measure}_low", ""), value.get(f"{measure}_high", ""))
        for site, row in found["sites"].items()
        for arm, value in row["own"].items()
    ]
    header = ("site", "model", "site_and_model", "value", "low", "high")
    write_csv(run.folder / "plots" / "sites.csv", header, rows)
    federated = found["global"]["federated"]
    return f"federated {measure} {federated[measure]:.4g} {found['task']['metric_unit']} on {federated['n']:.0f} test rows"


if __name__ == "__main__":
    main(evaluate)
