"""One real Prefect server for all tests that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prefect_server import Server

from flows.services import prefect_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Prefect server on a free loopback port with a home of its own."""
    home = tmp_path_factory.mktemp("prefect-server")
    child = prefect_server(home)
    try:
        child.wait_ready(180)
        yield Server(child, home)
    finally:
        child.stop()
