"""Where things are: workspaces, runs, models and the example, from what a person types.

Knows: the folder layout of ``docs/operator-guide.md``. Refuses to know: what is in the files.
"""

from __future__ import annotations

import os
from pathlib import Path

from fedmat import files
from fedmat.config import ConsortiumConfig, load_consortium
from fedmat.errors import ConfigError

EXAMPLE = Path("examples/cells/consortium.yaml")
CONSORTIUM = "consortium.yaml"
PLAN, LATEST, MODEL, EVIDENCE = "plan.json", "latest", "model.safetensors", "evidence.zip"


def workspaces() -> Path:
    """Returns the folder that holds one workspace per consortium: ``$FEDMAT_HOME``, else ``.fedmat``."""
    return Path(os.environ.get("FEDMAT_HOME") or ".fedmat")


def workspace(consortium_file: Path, home: Path | None = None) -> Path:
    """Returns the workspace of a consortium file.

    Raises:
        ConfigError: the file is missing or wrong.
    """
    return (home or workspaces() / load_consortium(consortium_file).name).resolve()


def last_workspace() -> Path:
    """Returns the workspace that ran last, else the example's."""
    found = sorted(workspaces().glob(f"*/runs/{LATEST}"), key=lambda p: p.stat().st_mtime)
    return found[-1].parents[1].resolve() if found else workspace(example())


def example() -> Path:
    """Returns the example consortium of the checkout.

    Raises:
        ConfigError: fedmat was installed without its checkout.
    """
    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        if (root / EXAMPLE).is_file():
            return root / EXAMPLE
    raise ConfigError(
        f"the example consortium ({EXAMPLE}) is not here: it belongs to the source checkout, not to the installed package",
        fix="run this in a checkout of fedmat, or name a consortium file: fedmat run CONSORTIUM",
    )


def find_run(text: str, home: Path | None = None) -> Path:
    """Returns a run's folder.

    Args:
        text: a run's folder, a consortium file (its latest run), ``latest``, or a run id or an unambiguous start of one.
        home: look in this workspace only.

    Raises:
        ConfigError: there is no such run, or there are several.
    """
    path = Path(text)
    if (path / PLAN).is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        return _latest(workspace(path, home), text)
    if text == LATEST:
        return _latest(home or last_workspace(), text)
    homes = [home] if home else sorted(workspaces().glob("*/"))
    runs = [p.parent for h in homes for p in sorted(h.glob(f"runs/*/{PLAN}"))]
    exact = [r for r in runs if r.name == text]
    found = exact or [r for r in runs if len(text) >= 4 and r.name.startswith(text)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"several runs are called {text}: {', '.join(map(str, found))}", fix="name the run's folder")
    there = f"there are {', '.join(sorted({r.name for r in runs}))}" if runs else "there is none yet"
    raise ConfigError(
        f"no run '{text}' in {home or workspaces()}; {there}",
        fix="name a run's folder, its id, 'latest', or its consortium file",
    )


def find_model(text: str, home: Path | None = None) -> Path | None:
    """Returns the model file a person means by a file, a run's folder, ``latest`` or a run id; None for a registered name."""
    path = Path(text)
    if path.is_file() and path.suffix not in (".yaml", ".yml"):
        return path
    if text.startswith(("fedmat-", "models:/")):
        return None
    return find_run(text, home) / MODEL


def site_model(text: str, site: str, home: Path | None = None) -> Path:
    """Returns the file of the model that a site made for its own materials in a run; it lies in the site's workspace.

    Raises:
        ConfigError: there is no such run, or the site has made none in it.
    """
    folder = find_run(text, home)
    plan = files.sha256(files.canonical_json(files.read_json(folder / PLAN)))
    path = folder.parents[1] / "sites" / site / "state" / plan[:16] / "personal.safetensors"
    if not path.is_file():
        there = sorted(p.parents[2].name for p in folder.parents[1].glob(f"sites/*/state/{plan[:16]}/personal.safetensors"))
        raise ConfigError(
            f"site '{site}' has no model of its own in run {folder.name}",
            fix=f"use one of {', '.join(there)}" if there else "let the run finish: fedmat run CONSORTIUM",
        )
    return path


def consortium_of(site_file: Path, named: Path | None = None) -> tuple[Path, ConsortiumConfig] | None:
    """Returns the consortium a site file belongs to: the one that is named, else the nearest above it that lists it.

    Raises:
        ConfigError: the consortium file is wrong, or the one that is named does not list the site file.
    """
    site = site_file.resolve()
    nearby = [p / CONSORTIUM for p in site.parents[:4] if (p / CONSORTIUM).is_file()]
    for candidate in [named] if named else nearby:
        config = load_consortium(candidate)
        if any((candidate.resolve().parent / m.file).resolve() == site for m in config.members):
            return candidate, config
    if named:
        raise ConfigError(
            f"{named}: none of its members names {site_file}", fix="add the site under members, or check the path of its file"
        )
    return None


def _latest(home: Path, text: str) -> Path:
    note = home / "runs" / LATEST
    folder = home / "runs" / note.read_text().strip() if note.is_file() else None
    if folder is None or not (folder / PLAN).is_file():
        raise ConfigError(f"{text}: no run in {home} yet", fix="run it first: fedmat run CONSORTIUM")
    return folder
