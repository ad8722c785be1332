"""Stage ``train``: every site's features -> the global model, and the learning curve for ``dvc plots``."""

from __future__ import annotations

from fedmat import files, pipeline
from fedmat.pipeline import MODEL, Run
from pipelines import main, write_csv


def train(run: Run) -> str:
    """Runs all rounds from the first."""
    for report in pipeline.train(run, resume=False):
        print(f"round {report.round + 1} of {report.rounds}: {len(report.accepted)} sites", flush=True)
    metric = "rmse" if run.config().task.metric == "rmse" else "mae"  # of the probability, for a binary task
    rows = [(r["round"] + 1, r["validation"].get(metric, ""), len(r["accepted"]), r["lr"]) for r in run.reports()]
    write_csv(run.folder / "plots" / "rounds.csv", ("round", "validation", "sites", "learning_rate"), rows)
    return f"model {files.sha256_file(run.folder / MODEL)}"


if __name__ == "__main__":
    main(train)
