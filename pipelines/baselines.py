"""Stage ``baselines``: the models the global one is compared with."""

from __future__ import annotations

from fedmat import pipeline
from fedmat.pipeline import Run
from pipelines import main


def baselines(run: Run) -> str:
    """Trains them."""
    pipeline.baselines(run, lambda what: print(what, flush=True))
    return f"baselines in {run.folder.name}/arms"


if __name__ == "__main__":
    main(baselines)
