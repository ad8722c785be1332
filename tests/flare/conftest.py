"""One small consortium of real processes for all tests here."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import small
from flare_scene import PLANTED, Scene
from flare_visitor import NAME, Visitor

ROUNDS, DEADLINE_S = 8, 30.0


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Three sites, the FLARE server, and everybody's certificates; ends with the session.

    One site's file holds rows that nobody else could have, so that whatever tests do here is searched for them at the end.
    """
    folder = tmp_path_factory.mktemp("scene")
    consortium = small.build(folder / "c", rounds=ROUNDS, deadline_s=DEADLINE_S, site_weights="rows")
    with (folder / "c/mill/lab.csv").open("a", newline="") as handle:
        csv.writer(handle).writerows(PLANTED)
    scene = Scene(consortium, folder / "s")
    with scene.stage:
        scene.start()
        yield scene


@pytest.fixture
def visitor(scene: Scene, tmp_path: Path) -> Iterator[Visitor]:
    """A party that has joined and does not run."""
    found = Visitor(scene, tmp_path / NAME)
    found.join()
    yield found
    found.stop()
