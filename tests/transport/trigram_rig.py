"""A consortium of sites and three roles in one process, with every wire open to be cut, bent or recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache
from typing import Any

import numpy as np

from fedmat import keys as keyring
from fedmat.domain import Dropout
from fedmat.envelopes import ROLES, AuditRequest, Header, HeaderRequest, PublicMap
from fedmat.errors import ProtocolError
from fedmat.transport.trigram import messages, shares, site
from fedmat.transport.trigram.exchange import Combined, Exchange
from fedmat.transport.trigram.ring import Ring, blob
from fedmat.transport.trigram.roles import Role

PLAN, TODAY = "p" * 64, "2026-11-24"
NAMES = tuple(f"site{i:02d}" for i in range(20))
TAMPER = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Chosen:
    weights: tuple[int, ...]
    reasons: dict[int, str] = field(default_factory=dict)


def leave_out(count: int) -> Callable[..., Chosen]:
    """A rule in exact integers: leaves out the ``count`` sites that lie farthest from the others; the rest keep their weight."""

    def select(gram: Sequence[Sequence[int]], base: Sequence[int], scores: Sequence[int] | None = None) -> Chosen:
        n = len(gram)
        apart = [sum(gram[i][i] + gram[j][j] - 2 * gram[i][j] for j in range(n)) for i in range(n)]
        out = sorted(range(n), key=lambda i: (-apart[i], i))[:count]
        return Chosen(tuple(0 if i in out else base[i] for i in range(n)), dict.fromkeys(out, "far from the others"))

    return select


def fixed(weights: Sequence[int]) -> Callable[..., Chosen]:
    return lambda gram, base, scores=None: Chosen(tuple(weights))


@cache
def charter_and_keys(n: int, kem: str = "x25519") -> tuple[keyring.Charter, dict[str, keyring.PartyKeys]]:
    keys = {name: keyring.PartyKeys.new(name, kem) for name in (*ROLES, *NAMES[:n])}  # type: ignore[arg-type]
    end = date(2030, 1, 1)
    parties = [k.public(name if name in ROLES else "site", f"owner of {name}", end) for name, k in keys.items()]
    return keyring.charter("testers", kem, parties), keys  # type: ignore[arg-type]


class Rig:
    """``n`` sites, three roles and a courier.

    Args:
        request, reply: see and may replace what goes to and comes from a party: ``(party, message) -> message``.
    """

    def __init__(
        self,
        n: int = 7,
        f: int = 1,
        bits: int = 32,
        length: int = 64,
        select: Callable[..., Chosen] | None = None,
        minimum: int = 0,
        weights: Sequence[int] = (),
        kem: str = "x25519",
    ) -> None:
        self.charter, self.keys = charter_and_keys(n, kem)
        self.select = select or leave_out(f)
        self.ring, self.names = Ring(bits), NAMES[:n]
        self.roles: dict[str, Role] = {r: self.new_role(r) for r in ROLES}
        self.log: dict[str, list[Any]] = {r: [] for r in ROLES}
        self.replies: dict[str, list[Any]] = {r: [] for r in ROLES}
        self.words: dict[str, Any] = {}
        self.header = Header(
            plan_sha256=PLAN, run="run", round=0, exchange=0, model_sha256="m" * 64, charter_sha256=self.charter.sha256,
            length=length, bits=bits, hostile=f, minimum=minimum or messages.least_minimum(f), clip=2.5,
            weights=dict(zip(self.names, weights or [1] * n, strict=True)), map_sha256="", today=TODAY,
        )  # fmt: skip
        self.request: TAMPER = lambda party, message: message
        self.reply: TAMPER = lambda party, message: message
        self.seeds: dict[str, bytes] = {}
        self.exchange = Exchange(self.charter, self.send)

    def new_role(self, name: str) -> Role:
        return Role(name, self.keys[name], self.charter, self.select, PLAN)  # type: ignore[arg-type]

    def restart(self, name: str) -> list[Any]:
        """Starts a role again and asks it all that it was asked before; returns its replies."""
        self.roles[name] = self.new_role(name)
        return [self.roles[name].handle(r) for r in self.log[name]]

    def send(self, requests: Mapping[str, object]) -> dict[str, object]:
        return {party: self.reply(party, self.answer(party, self.request(party, r))) for party, r in requests.items()}

    def answer(self, party: str, request: Any) -> Any:
        if isinstance(request, Dropout):
            return request
        try:
            if isinstance(request, AuditRequest):
                return site.audit(request, self.charter, self.keys[party], self.words[party], self.seeds.get(party))
            reply = self.roles[party].handle(request)
        except ProtocolError as error:
            return Dropout(party, "refused", error.what)
        self.log[party].append(request)
        self.replies[party].append(reply)
        return reply

    def vectors(self, seed: int = 0) -> dict[str, Any]:
        """Honest updates: a common direction and as much of everyone's own."""
        rng, k = np.random.default_rng(seed), self.header.length
        common = rng.standard_normal(k)
        return {s: self.ring.encode((common + 0.8 * rng.standard_normal(k)) / k**0.5, 2.5, rng) for s in self.names}

    def submissions(self, words: Mapping[str, Any] | None = None) -> dict[str, Any]:
        self.words = dict(words or self.vectors())
        consent = self.exchange.announce(self.header)
        return {s: site.submit(self.header, consent, self.charter, self.keys[s], w) for s, w in self.words.items()}

    def run(self, words: Mapping[str, Any] | None = None, public_map: PublicMap | None = None) -> Combined:
        return self.exchange.combine(self.header, self.submissions(words), public_map)

    def next(self, **changes: Any) -> None:
        self.header = replace(self.header, **{"exchange": self.header.exchange + 1, **changes})

    def force(self, name: str, words: Any) -> Any:
        """A submission of any words whatever: a hostile site does not ask its own code for leave."""
        consent = self.exchange.announce(self.header)
        honest = self.ring.zeros(self.header.length)
        made = site.submit(self.header, consent, self.charter, self.keys[name], honest)
        masked = made.masked.view(self.ring.dtype) + words
        return self.resign(name, replace(made, masked=blob(masked)))

    def resign(self, name: str, submission: Any, **changes: Any) -> Any:
        """The same submission with some of its envelope changed and everything signed by the site again."""
        digest = messages.header_digest(self.header)
        old = messages.Envelope.parse(submission.envelope.tobytes(), self.charter.seal_overhead)
        new = replace(old, payload=messages.sha256(submission.masked), **changes)
        new = replace(new, signature=self.keys[name].sign(new.signed(digest, name)))
        return replace(submission, envelope=blob(new.packed()))

    def holds(self, combined: Combined) -> None:
        """The law of every opening: it is the exact weighted sum of the named sites' updates."""
        lifted = [self.ring.lift(self.words[s]).astype(object) for s in combined.sites]
        total = sum(w * v for w, v in zip(combined.weights, lifted, strict=True))
        opened = self.ring.lift(np.frombuffer(combined.total, self.ring.dtype)).astype(object)
        assert (opened == total).all()
        assert [[int(a @ b) for b in lifted] for a in lifted] == [list(row) for row in combined.gram]
        base = [self.header.weights[s] for s in combined.sites]
        scores = [row[0] for row in combined.scores] if combined.scores else None
        assert combined.weights == tuple(self.select([list(r) for r in combined.gram], base, scores).weights)


def public_map(rig: Rig, rows: int = 6, columns: int = 1, seed: int = 0, spread: int = 9) -> PublicMap:
    rng = np.random.default_rng(seed)
    matrix = rng.integers(-spread, spread + 1, (rows, rig.header.length)).astype("<i4")
    targets = rng.integers(-1000, 1001, (rows, columns)).astype("<i4")
    return PublicMap(rows, columns, blob(matrix), blob(targets), 1.0, 1.0)


def first_header(rig: Rig) -> HeaderRequest:
    return HeaderRequest(PLAN, rig.header)


__all__ = ["NAMES", "PLAN", "Chosen", "Rig", "first_header", "fixed", "leave_out", "public_map", "shares"]
