"""Between a party's own processes: a socket of its machine on which its desk answers.

Knows: bytes, the socket and the key that guards it. Refuses to know: what is asked and who answers.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from fedmat import files
from fedmat.errors import FedmatError, StateError
from fedmat.federation.engine import Failure, frame

DESK = Path("run/desk.json")  # in a party's folder: where its desk listens; readable by its owner alone
_LONGEST = 100  # characters of a socket's path; the system's limit is 107
Answer = Callable[[bytes, bytes, Mapping[str, str]], bytes | Failure]


class DeskServer:
    """Listens for this user alone, and lets a desk answer.

    Args:
        home: the party's folder.
        answer: gets consortium file, request and the versions at the coordinator.
    """

    def __init__(self, home: Path, answer: Answer) -> None:
        self._answer = answer
        note = home / DESK
        note.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        note.parent.chmod(0o700)
        address = str(note.with_suffix(".sock"))
        if len(address) > _LONGEST:
            address = str(Path(tempfile.mkdtemp(prefix="fedmat-")) / "desk.sock")  # mkdtemp: for the owner alone
        with suppress(FileNotFoundError):
            os.unlink(address)
        key = secrets.token_bytes(32)
        self._listener = Listener(address, "AF_UNIX", authkey=key)
        found = {"address": address, "key": key.hex(), "pid": os.getpid()}
        files.write_atomic(note, files.json_bytes(found), private=True)

    def serve_forever(self) -> None:
        """Answers until the process ends; every connection has a thread of its own."""
        while True:
            try:
                connection = self._listener.accept()
            except Exception:  # a caller without the key, or one that went away: no reason to stop  # noqa: BLE001, S112
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        with connection, suppress(EOFError, OSError):
            stated = json.loads(connection.recv_bytes())
            consortium = connection.recv_bytes()
            connection.send_bytes(frame(self._answer(consortium, connection.recv_bytes(), stated)))


def ask(home: Path, consortium: bytes, request: bytes, stated: Mapping[str, str], stop: Callable[[], bool]) -> bytes:
    """Returns the framed reply of the desk of the party at ``home``.

    Args:
        stop: asked now and then while the desk works; True ends the wait.

    Raises:
        StateError: no desk answers there.
        InterruptedError: ``stop`` said so.
    """
    note = home / DESK
    try:
        found = files.read_json(note)
        with Client(found["address"], "AF_UNIX", authkey=bytes.fromhex(found["key"])) as connection:
            connection.send_bytes(json.dumps(dict(stated)).encode())
            connection.send_bytes(consortium)
            connection.send_bytes(request)
            while not connection.poll(0.5):
                if stop():
                    raise InterruptedError
            return connection.recv_bytes()
    except InterruptedError:
        raise
    except (OSError, EOFError, FedmatError, KeyError, ValueError, AuthenticationError):
        raise StateError(f"{home}: the party's desk does not answer", fix="fedmat site start --home there") from None
