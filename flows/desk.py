"""A party's desk as a process: ``python -m flows.desk HOME``, started by ``fedmat site start``.

Knows: the desk, and Prefect where the party wants to see its rounds. Refuses to know: FLARE, and what is answered.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path

import fedmat.telemetry  # noqa: F401  before anything that phones home is imported
from fedmat import files
from fedmat.errors import FedmatError
from fedmat.federation.desk import DeskServer
from fedmat.federation.engine import Failure
from fedmat.party import Desk, Party
from flows.services import ADDRESS, answers, prefect_home

WATCHED = "TrainRequest"  # one flow a round; the few other requests of a run are not worth a page
HEALTH_S = 0.5
AGAIN_S = 30.0  # a server that was away is not asked again before
_log = logging.getLogger(__name__)


def main(home: Path, *, forked: bool = False) -> None:
    """Answers for the party at ``home`` until the process ends.

    Args:
        forked: this process has imported what training needs, so the process that trains can be a copy of it (a rehearsal).
    """
    pages = Pages(home)
    desk = Desk(home, around=pages.around)
    if forked:
        desk.warm(forked=True)  # before any thread is started
    server = DeskServer(home, pages.naming(desk.answer))
    if not forked:
        threading.Thread(target=desk.warm, daemon=True).start()
    pages.there()
    server.serve_forever()


class Pages:
    """Shows a party's rounds in its own Prefect, if that is there; a round neither needs it nor waits for it.

    Args:
        home: the party's folder. Its Prefect is the one that ``PREFECT_API_URL`` names, or one that runs for this folder.
    """

    def __init__(self, home: Path) -> None:
        self._party = Party.load(home)
        self._asked: ContextVar[dict[str, str]] = ContextVar("asked")
        self._next = 0.0
        self._was_there = False
        self._ready = threading.Event()
        self._importing: threading.Thread | None = None

    def naming(
        self, answer: Callable[[bytes, bytes, Mapping[str, str]], bytes | Failure]
    ) -> Callable[[bytes, bytes, Mapping[str, str]], bytes | Failure]:
        """Returns ``answer``, with the digests of what is asked noted for :meth:`around`."""

        def named(consortium: bytes, request: bytes, stated: Mapping[str, str]) -> bytes | Failure:
            token = self._asked.set({"consortium_sha256": files.sha256(consortium), "request_sha256": files.sha256(request)})
            try:
                return answer(consortium, request, stated)
            finally:
                self._asked.reset(token)

        return named

    def around(self, kind: str, work: Callable[[], bytes | Failure]) -> bytes | Failure:
        """Does the work, in a flow where there is a server and the request is one for a round."""
        url = self.there() if kind == WATCHED else None
        if url is None or not self._ready.is_set():
            return work()
        from flows.site import watched

        reply, served = watched(url, self._party, {**self._asked.get(), "kind": kind}, work)
        if not served:
            self._lost()
        return reply

    def there(self) -> str | None:
        """Returns the address of the party's Prefect if it answers now; imports what a flow needs beside the work."""
        if time.monotonic() < self._next:
            return None
        url = _address(self._party.home)
        if url is None:
            return None
        if not answers(f"{url}/api/health", HEALTH_S):
            self._lost()
            return None
        self._was_there = True
        if self._importing is None:  # seconds, which no round is to wait for
            self._importing = threading.Thread(target=self._import, args=(url,), daemon=True)
            self._importing.start()
        return url

    def wait(self, seconds: float) -> bool:
        """Waits until what a flow needs is imported; tells whether it is."""
        return self._ready.wait(seconds)

    def _import(self, url: str) -> None:
        with suppress(Exception):  # a Prefect that cannot be imported: rounds go on without pages
            from flows.site import warm

            warm(url, self._party.home)
            self._ready.set()

    def _lost(self) -> None:
        if self._was_there:
            _log.warning("%s: Prefect does not answer; rounds go on without pages", self._party.name)
        self._was_there = False
        self._next = time.monotonic() + AGAIN_S


def _address(home: Path) -> str | None:
    named = os.environ.get("PREFECT_API_URL", "").strip()
    if named:
        return named.removesuffix("/").removesuffix("/api")
    with suppress(FedmatError, KeyError, TypeError):
        return str(files.read_json(prefect_home(home) / ADDRESS)["url"])
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
