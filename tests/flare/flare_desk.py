"""A party's real desk, made to wait or to lie at moments that a test names.

Everything but the named moment is the desk of the product: ``flows.forked.main`` with one class replaced.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedmat import files, wire
from fedmat.config import ConsortiumConfig, load_consortium
from fedmat.domain import Attestation, Dropout, Statistics, TrainRequest, Update
from fedmat.errors import WireError
from fedmat.federation.engine import Failure
from fedmat.party import Desk

SCRIPT, SAID = Path("run/script.json"), Path("run/said.jsonl")
OTHER = "foundry"  # whose name a liar takes
Reply = bytes | Failure


def round_of(request: bytes) -> int | None:
    """The round a request is about; None where it is about none."""
    if wire.kind_of(request) != "TrainRequest":
        return None
    return wire.decode(request, TrainRequest).round


# --- lies ------------------------------------------------------------------------------------------------------------


def _edited(**changes: Callable[[Any], Any]) -> Callable[[Reply, Mapping[int, bytes]], Reply]:
    def lie(reply: Reply, _: Mapping[int, bytes]) -> Reply:
        if not isinstance(reply, bytes):
            return reply
        kind: Any = {"Update": Update, "Statistics": Statistics, "Attestation": Attestation}[wire.kind_of(reply)]
        told = wire.decode(reply, kind)
        return wire.encode(dataclasses.replace(told, **{k: change(told) for k, change in changes.items()}))

    return lie


def _yesterdays(_: Reply, earlier: Mapping[int, bytes]) -> Reply:
    return earlier[max(earlier)]


LIES: dict[str, Callable[[Reply, Mapping[int, bytes]], Reply]] = {
    "nan": _edited(delta=lambda u: {k: v * np.float32("nan") for k, v in u.delta.items()}),
    "shape": _edited(delta=lambda u: {k: v[..., :1] for k, v in u.delta.items()}),
    "huge": _edited(delta=lambda u: {k: v * np.float32(1e7) for k, v in u.delta.items()}),
    "name": _edited(site=lambda _: OTHER),
    "replay": _yesterdays,
    "nonsense": lambda *_: b"no message at all",
    "failure of another": lambda *_: Dropout(OTHER, "late"),
    "more labels": _edited(target=lambda s: s.target * 1e6, count=lambda s: s.count * 1e6),
    "more rows": _edited(n_train=lambda _: 10**6),
}


class Moments:
    """What a party does otherwise, by kind of request and round; written by the test, read before every answer."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def script(self, rules: list[dict[str, Any]]) -> None:
        """Says what is to happen; an empty list makes the party honest again."""
        files.write_json(self._home / SCRIPT, rules)

    def rule(self, request: bytes) -> dict[str, Any]:
        """What is to happen at this request."""
        path = self._home / SCRIPT
        rules: list[dict[str, Any]] = files.read_json(path) if path.exists() else []
        kind, number = wire.kind_of(request), round_of(request)
        return next((r for r in rules if r.get("kind", kind) == kind and r.get("round", number) == number), {})

    def holds(self, name: str) -> bool:
        """Whether the party has a request in hand and waits for :meth:`release`."""
        return (self._home / "run" / f"{name}.held").exists()

    def release(self, name: str) -> None:
        """Lets it go on."""
        (self._home / "run" / f"{name}.released").touch()

    def wait(self, name: str) -> None:
        """Waits for :meth:`release`, once: a request that is asked again passes."""
        released = self._home / "run" / f"{name}.released"
        (self._home / "run" / f"{name}.held").touch()
        while not released.exists():
            time.sleep(0.01)


class ScriptedDesk(Desk):
    """A desk that follows :class:`Moments` and notes what it answered."""

    def __init__(self, home: Path, **more: Any) -> None:
        super().__init__(home, **more)
        self._moments, self._rule = Moments(home), dict[str, Any]()
        self._earlier: dict[int, bytes] = {}

    def answer(self, consortium: bytes, request: bytes, stated: Mapping[str, str] | None = None) -> Reply:
        self._rule = self._moments.rule(request)
        if "hold" in self._rule:
            self._moments.wait(self._rule["hold"])
        reply = super().answer(consortium, request, {**(stated or {}), **self._rule.get("stated", {})})
        number = round_of(request)
        if "lie" in self._rule:
            reply = LIES[self._rule["lie"]](reply, self._earlier)
        elif number is not None and isinstance(reply, bytes):
            self._earlier[number] = reply
        self._note(request, reply)
        return reply

    def _admit(self, consortium: bytes) -> ConsortiumConfig:
        if self._rule.get("lawless"):  # as if somebody had replaced the desk's code: its own policy is not looked at
            return load_consortium(self.party.run(consortium).consortium_file)
        return super()._admit(consortium)

    def _released(self, reply: Reply, request: bytes) -> Reply:
        return reply if self._rule.get("lawless") else super()._released(reply, request)

    def _note(self, request: bytes, reply: Reply) -> None:
        try:
            gave = wire.kind_of(reply) if isinstance(reply, bytes) else f"{type(reply).__name__} {reply.reason}"
        except WireError:
            gave = "nonsense"
        with (self.party.home / SAID).open("a") as handle:
            handle.write(json.dumps([wire.kind_of(request), round_of(request), gave]) + "\n")


def main(home: Path) -> None:
    """What the process of a scripted desk runs."""
    from flows import desk, forked

    desk.Desk = ScriptedDesk  # type: ignore[attr-defined]
    forked.main(home)
