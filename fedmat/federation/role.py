"""One role's party: a state machine that survives its own crashes.

Knows: the role's folder, where every request and reply is written before the reply leaves. Refuses to know: how a role
decides (``fedmat.transport.trigram.roles``, ``fedmat.transport.ckks``), the network, records.

A role started again reads its log and is where it was: a role's replies follow from its keys and what it was asked.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedmat import files, wire
from fedmat.aggregation import robust
from fedmat.envelopes import (
    Decrypted,
    DecryptRequest,
    Deposit,
    Header,
    HeaderRequest,
    KeyHolderContext,
    KeyHolderRequest,
    SettleRequest,
)
from fedmat.errors import ProtocolError, StateError, WireError
from fedmat.federation.plan import Plan
from fedmat.federation.settlement import Settling
from fedmat.keys import Charter, PartyKeys
from fedmat.transport.ckks import KeyHolder
from fedmat.transport.trigram.roles import Memory, Role

_HISTORY = "history.json"


class RoleWorker:
    """Answers what the coordinator brings to one role.

    Args:
        plan: the role's own copy of the plan; it decides by this plan's rule, and refuses any other.
        folder: the role's workspace.
    """

    def __init__(self, name: str, plan: Plan, keys: PartyKeys, charter: Charter, folder: Path) -> None:
        self.name, self.plan = name, plan
        self._folder = folder / "rounds" / plan.sha256[:16]
        self._answered: dict[str, bytes] = {}
        kept = self._folder / _HISTORY
        known: dict[str, Any] = files.read_json(kept) if kept.exists() else {"log": 0, "runs": {}}
        self._log = int(known["log"])
        runs = {run: _remembered(entry) for run, entry in known["runs"].items()}
        self._role = Role(name, keys, charter, select(plan), plan.sha256, runs)  # type: ignore[arg-type]
        self._settling = Settling(plan, keys, charter, folder)
        self._replay()

    def handle(self, data: bytes) -> bytes:
        """Returns the reply to a request; the very same request gets the very same reply.

        Raises:
            ProtocolError: the role refuses, and says why.
        """
        digest = files.sha256(data)
        if digest in self._answered:
            return self._answered[digest]
        request = _decode(data)
        before = self._role.memory
        if isinstance(request, SettleRequest):  # beside the rounds: it opens nothing of them and needs no log
            return self._settling.handle(data, request, before.__contains__)
        reply = wire.encode(self._role.handle(request))
        if isinstance(request, HeaderRequest):
            self._turn_over(before)
        self._append(data, reply)
        self._answered[digest] = reply
        return reply

    def _turn_over(self, memory: Mapping[str, Memory]) -> None:
        """Begins a new log with a new exchange; seeds and updates of the last one are destroyed with the old log."""
        self._log += 1
        runs = {run: _noted(known) for run, known in memory.items()}
        files.write_json(self._folder / _HISTORY, {"log": self._log, "runs": runs})
        for old in self._folder.glob("log-*"):
            if old != self._entries():
                shutil.rmtree(old)
        self._answered.clear()

    def _entries(self) -> Path:
        return self._folder / f"log-{self._log:06d}"

    def _append(self, request: bytes, reply: bytes) -> None:
        number = len(list(self._entries().glob("*.entry")))
        entry = len(request).to_bytes(8, "big") + request + reply
        files.write_atomic(self._entries() / f"{number:04d}.entry", entry, private=True)

    def _replay(self) -> None:
        for path in sorted(self._entries().glob("*.entry")):
            data = path.read_bytes()
            size = int.from_bytes(data[:8], "big")
            request, stored = data[8 : 8 + size], data[8 + size :]
            try:
                reply = wire.encode(self._role.handle(_decode(request)))
                kept = wire.decode(stored, object)
            except (ProtocolError, WireError) as error:
                raise StateError(
                    f"{path}: damaged ({error.what})", fix="restore the role's folder; never start it empty"
                ) from None
            if reply != stored and not isinstance(kept, Deposit):  # sealing is randomised: a deposit's seal alone differs
                raise StateError(f"{path}: the role no longer answers as it did", fix="restore the role's folder and keys")
            self._answered[files.sha256(request)] = stored


def _noted(m: Memory) -> dict[str, Any]:
    header = "" if m.header is None else wire.encode(m.header).hex()
    rest = {"exchange": m.exchange, "today": m.today, "rounds": m.rounds, "sites": m.sites, "weights": m.weights}
    return rest | {"header": header, "gram": [[str(v) for v in row] for row in m.gram]}


def _remembered(entry: Mapping[str, Any]) -> Memory:
    header = wire.decode(bytes.fromhex(entry["header"]), Header) if entry["header"] else None
    gram = tuple(tuple(int(v) for v in row) for row in entry["gram"])
    rounds, sites, weights = (tuple(entry[k]) for k in ("rounds", "sites", "weights"))
    return Memory(entry["exchange"], entry["today"], rounds, header, sites, weights, gram)


class KeyHolderWorker:
    """Holds a run's CKKS key and opens one sum a round.

    Args:
        folder: the key holder's workspace; its state, the secret key included, is a file only its owner can read.
    """

    def __init__(self, plan: Plan, keys: PartyKeys, charter: Charter, folder: Path) -> None:
        self._plan, self._keys, self._charter, self._folder = plan, keys, charter, folder / "ckks"
        self._settling = Settling(plan, keys, charter, folder)

    def handle(self, data: bytes) -> bytes:
        """Returns the reply to a request; it is written down before it is given.

        Raises:
            ProtocolError: the key holder refuses, and says why.
        """
        request = _decode(data)
        if getattr(request, "plan_sha256", "") != self._plan.sha256:
            raise ProtocolError("foreign_plan", "the request belongs to another plan than the key holder's")
        if isinstance(request, KeyHolderRequest):
            holder = self._holder(request.run, fresh=True)
            return wire.encode(KeyHolderContext(np.frombuffer(holder.public_context(), dtype=np.uint8)))
        if isinstance(request, SettleRequest):
            return self._settling.handle(data, request, lambda run: self._path(run).exists())
        if not isinstance(request, DecryptRequest):
            raise ProtocolError("bad_request", f"a key holder is not asked for {type(request).__name__}")
        header = request.header
        answer = self._path(header.run).with_suffix(f".{header.round:06d}-{files.sha256(data)[:32]}")
        if answer.exists():  # the very same request: the same noise again, which tells nothing new
            return answer.read_bytes()
        holder = self._holder(header.run)
        try:
            parts = [p.tobytes() for p in request.parts]
            opened = holder.decrypt(header, request.sites, parts, request.witnesses)
        finally:  # a refusal that depended on a decrypted number has used up the round as well
            files.write_atomic(self._path(header.run), holder.export(), private=True)
        reply = wire.encode(Decrypted(np.frombuffer(opened.astype("<f8").tobytes(), dtype=np.uint8)))
        files.write_atomic(answer, reply)
        return reply

    def _holder(self, run: str, *, fresh: bool = False) -> KeyHolder:
        path = self._path(run)
        if path.exists():
            return KeyHolder.restore(path.read_bytes(), self._keys, self._charter)
        if not fresh:
            raise ProtocolError("unknown_run", "this key holder has no key of this run", fix="restore its folder")
        made = KeyHolder.new(self._keys, self._charter, run)
        files.write_atomic(path, made.export(), private=True)
        return made

    def _path(self, run: str) -> Path:
        return self._folder / f"{files.sha256(run.encode())[:16]}.state"


def worker(name: str, plan: Plan, keys: PartyKeys, charter: Charter, folder: Path) -> RoleWorker | KeyHolderWorker:
    """Returns what answers for a role under a plan."""
    if plan.settings.security.mode == "ckks":
        return KeyHolderWorker(plan, keys, charter, folder)
    return RoleWorker(name, plan, keys, charter, folder)


def select(plan: Plan) -> Callable[[Any, Any, Any], Any]:
    """Returns the plan's rule as a function of what the roles open."""
    rule = plan.settings.rule
    return lambda gram, base, scores: robust.choose(rule, gram, base, scores)


def _decode(data: bytes) -> Any:
    return wire.decode(data, object)
