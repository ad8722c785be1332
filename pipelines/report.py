"""Stage ``report``: one self-contained page."""

from __future__ import annotations

from fedmat import pipeline
from fedmat.pipeline import Run
from pipelines import main


def report(run: Run) -> str:
    """Writes it."""
    return f"report {pipeline.report(run).name}"


if __name__ == "__main__":
    main(report)
