"""Fixtures every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedmat.telemetry  # noqa: F401  before anything that would phone home
from fedmat.config import data_home
from fedmat.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def project() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def public_data(project: Path) -> Path:
    """The folder of public datasets; the test is skipped, and says so, where there is none."""
    shared = project.parent / "shared" / "data"
    try:
        folder = shared if shared.is_dir() else data_home()
    except ConfigError:
        pytest.skip("no public data: set FEDMAT_DATA (fedmat data get NAME)")
    if not (folder / "calisol23").is_dir():
        pytest.skip(f"no public data in {folder}: set FEDMAT_DATA (fedmat data get NAME)")
    return folder
