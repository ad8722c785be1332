"""A real Prefect server for tests, and how to search everything it keeps."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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

        with temporary_settings({"api.url": f"{self.url}/api"}):
            try:
                yield
            finally:
                _drain()

    def everything(self) -> bytes:
        """The database as SQL text, and all files of its home as they are."""
        place = prefect_home(self.home)
        with sqlite3.connect(f"file:{place / 'prefect.db'}?mode=ro", uri=True) as database:
            text = "\n".join(database.iterdump())
        return text.encode() + b"".join(p.read_bytes() for p in sorted(place.rglob("*")) if p.is_file())
