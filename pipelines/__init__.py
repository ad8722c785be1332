"""DVC stages: deterministic file -> file, one script a stage, each a thin shell around ``fedmat.pipeline``.

Stage name = script name. They read ``params.yaml`` for where things are; what decides the model is in the consortium
file. No stage calls a flow, and none versions a site's data: ``dvc repro`` itself keeps the versions here.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

import fedmat.telemetry  # noqa: F401  before anything that would phone home
from fedmat import files
from fedmat.config import Settings, parse_settings
from fedmat.errors import ConfigError, FedmatError
from fedmat.pipeline import Run, open_run


class Params(Settings):
    """The whole of params.yaml.

    Attributes:
        sites: per member, the folder of its site.yaml and data; what a stage depends on.
    """

    consortium: Path
    home: Path
    run: str
    sites: dict[str, Path]


def params(path: Path = Path("params.yaml")) -> Params:
    """Reads params.yaml.

    Raises:
        ConfigError: it is missing or wrong, or its sites are not the consortium's.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file", fix="run the stage in the project's folder")
    return parse_settings(Params, yaml.safe_load(path.read_text(encoding="utf-8")), path)


def opened() -> Run:
    """Returns the run that params.yaml describes.

    Raises:
        ConfigError: a file is wrong, or params.yaml and the consortium file name different sites.
    """
    given = params()
    run = open_run(given.consortium, home=given.home, run_id=given.run)
    if tuple(sorted(given.sites)) != run.sites:
        raise ConfigError(
            f"params.yaml lists the sites {', '.join(sorted(given.sites))}, {given.consortium} has {', '.join(run.sites)}",
            fix="list the consortium's members under 'sites' in params.yaml",
        )
    return run


def main(stage: Callable[..., str], *arguments: str) -> None:
    """Runs a stage's function, prints its one line, and exits with the documented status if it fails."""
    if len(sys.argv) - 1 != len(arguments):
        sys.exit(f"usage: python -m {stage.__module__} {' '.join(arguments)}".rstrip())
    try:
        print(stage(opened(), *sys.argv[1:]))
    except FedmatError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a small table for ``dvc plots``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    files.write_atomic(path, text.getvalue().encode())
