"""A real Prefect server for tests, and how to search everything it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from leaks import unwrapped

from flows.services import Child, _drain, prefect_home


class Server:
    """A running Prefect server and its files."""

    def __init__(self, child: Child, home: Path) -> None:
        self.child, self.home = child, home
        self.url = child.url.removesuffix("/api/health")

    @contextmanager
    def configured(self) -> Iterator[None]:
        """Makes this the server that the environment names, as ``PREFECT_API_URL`` does for a new process."""
        from prefect.settings import temporary_settings

        with temporary_settings({"home": prefect_home(self.home), "api.url": f"{self.url}/api"}):
            try:
                yield
            finally:
                _drain()

    def everything(self) -> bytes:
        """All files of its home, databases and pickles unwrapped."""
        return unwrapped(iter(sorted(prefect_home(self.home).rglob("*"))))
