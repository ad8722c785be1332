"""Whatever a courier does to the messages, roles open the truth or nothing, once, and fail in one way only."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transport.trigram_rig import NAMES, PLAN, Rig, leave_out

from fedmat import wire
from fedmat.domain import Dropout
from fedmat.envelopes import ROLES, AuditRequest, DepositRequest, HeaderRequest, Opening, Submission
from fedmat.errors import ProtocolError, WireError
from fedmat.transport.trigram import messages, site
from fedmat.transport.trigram.exchange import ExchangeFailed
from fedmat.transport.trigram.messages import Envelope
from fedmat.transport.trigram.ring import blob
from fedmat.transport.trigram.roles import Reply, Request, Role

QUIET = settings(deadline=None, suppress_health_check=list(HealthCheck))


# --- altering messages


def altered(value: Any, draw: Any) -> Any:
    """The same kind of message with one thing in it changed, somewhere."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = draw(st.sampled_from([f.name for f in dataclasses.fields(value)]))
        return replace(value, **{name: altered(getattr(value, name), draw)})
    if isinstance(value, np.ndarray):
        how = draw(st.sampled_from(["flip", "cut", "grow", "empty", "random", "fold"]))
        data = bytearray(value.tobytes())
        if how == "flip" and data:
            data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
        if how == "cut":
            data = data[: draw(st.integers(0, len(data)))]
        if how == "grow":
            data += draw(st.binary(max_size=9))
        if how == "random":
            data = bytearray(draw(st.binary(min_size=len(data), max_size=len(data)))) if len(data) < 200 else data[::-1]
        made = np.frombuffer(bytes(data) if how != "empty" else b"", np.uint8)
        return made.reshape(2, -1) if how == "fold" and len(made) % 2 == 0 and len(made) else made
    if isinstance(value, tuple):
        return tuple(rearranged(list(value), draw))
    if isinstance(value, dict):
        items = rearranged(list(value.items()), draw)
        return {k: v for k, v in items if isinstance(k, str)} if all(isinstance(i, tuple) for i in items) else {}
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw(st.one_of(st.just(value + 1), st.just(-value), st.integers()))
    if isinstance(value, float):
        return draw(st.floats())
    if isinstance(value, str):
        return draw(st.one_of(st.just(value + "x"), st.just(""), st.sampled_from([*ROLES, *NAMES]), st.text()))
    return value


def rearranged(items: list[Any], draw: Any) -> list[Any]:
    how = draw(st.sampled_from(["drop", "double", "swap", "reorder", "alter", "empty"]))
    if not items or how == "empty":
        return []
    at = draw(st.integers(0, len(items) - 1))
    if how == "drop":
        return items[:at] + items[at + 1 :]
    if how == "double":
        return [*items, items[at]]
    if how == "swap":
        items[at], items[0] = items[0], items[at]
        return items
    if how == "reorder":
        return items[::-1]
    return [*items[:at], altered(items[at], draw), *items[at + 1 :]]


@settings(QUIET, max_examples=60)
@given(st.data())
def test_a_hostile_courier_gets_the_truth_or_nothing(data: st.DataObject) -> None:
    check_hostile_courier(data)


@pytest.mark.slow
@settings(QUIET, max_examples=1500)
@given(st.data())
def test_a_hostile_courier_gets_the_truth_or_nothing_however_long_it_tries(data: st.DataObject) -> None:
    check_hostile_courier(data)


def check_hostile_courier(data: st.DataObject) -> None:
    rig = Rig(6, 1, 32, 16)
    bent_at = data.draw(st.sets(st.integers(0, 20), min_size=1, max_size=3), "messages altered")
    where = data.draw(st.sampled_from(["request", "reply"]))
    count = -1

    def bend(party: str, message: Any) -> Any:
        nonlocal count
        count += 1
        if count not in bent_at or isinstance(message, Dropout):
            return message
        how = data.draw(st.sampled_from(["alter", "drop", "other"]))
        if how == "drop":
            return Dropout(party, "late")
        if how == "other" and rig.replies["auditor"]:
            pool = rig.log if where == "request" else rig.replies
            return data.draw(st.sampled_from([m for r in ROLES for m in pool[r]] or [message]))
        return altered(message, data.draw)

    setattr(rig, where, bend)
    try:
        combined = rig.run()
    except ProtocolError:
        combined = None
    openings = {r: {wire.encode(m) for m in rig.replies[r] if isinstance(m, Opening)} for r in ROLES}
    assert all(len(made) <= 1 for made in openings.values())
    if combined is not None:
        rig.holds(combined)
        assert len(combined.sites) >= 5 and all(len(made) == 1 for made in openings.values())
        rig.request = rig.reply = lambda party, m: m
        assert all(v.agrees for s, v in rig.exchange.audit(rig.header, combined).items() if s in combined.sites)  # type: ignore[union-attr]
    # Whoever gave a part gave the part of the true sum: of all that were given, the two together are exact.
    parts = [m for r in ("aggregator", "auditor") for m in rig.replies[r] if isinstance(m, Opening)]
    if len(parts) == 2 and parts[0] is not parts[1] and {p.role for p in parts} == {"aggregator", "auditor"}:
        assert parts[0].weights == parts[1].weights and parts[0].sites == parts[1].sites
        total = rig.ring.lift(parts[0].part.view("<u4") + parts[1].part.view("<u4"))
        true = sum(w * rig.ring.lift(rig.words[s]) for s, w in zip(parts[0].sites, parts[0].weights))
        assert (total == true).all()


# --- bytes that are no messages


@cache
def recorded() -> tuple[Rig, tuple[bytes, ...]]:
    rig = Rig(6, 1, 32, 16)
    rig.run()
    return rig, tuple(wire.encode(m) for m in rig.log["auditor"])


@settings(QUIET, max_examples=150)
@given(st.data())
def test_bytes_of_any_kind_are_answered_or_refused_and_never_crash_a_role(data: st.DataObject) -> None:
    rig, messages_ = recorded()
    at = data.draw(st.integers(0, len(messages_) - 1))
    role = Role("auditor", rig.keys["auditor"], rig.charter, rig.select, PLAN)
    for before in messages_[:at]:
        role.handle(wire.decode(before, Request))  # type: ignore[arg-type]
    raw = bytearray(messages_[at])
    how = data.draw(st.sampled_from(["random", "flip", "cut", "alter"]))
    if how == "random":
        raw = bytearray(data.draw(st.binary(max_size=300)))
    if how == "flip":
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if how == "cut":
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    try:
        request: Any = wire.decode(bytes(raw), Request)  # type: ignore[arg-type]
        if how == "alter":
            request = altered(request, data.draw)
        reply = role.handle(request)
    except WireError:
        return
    assert isinstance(reply, Reply)


@given(st.binary(max_size=500), st.integers(0, 2000))
def test_an_envelope_is_of_its_one_length_or_refused(data: bytes, overhead: int) -> None:
    try:
        envelope = Envelope.parse(data, overhead)
    except ProtocolError:
        return
    assert envelope.packed() == data


@given(st.binary(min_size=432, max_size=432))
def test_an_envelope_of_random_bytes_parses_and_packs_to_itself_and_is_refused_by_every_role(data: bytes) -> None:
    raw = b"\x01" + data
    assert Envelope.parse(raw, 48).packed() == raw
    rig, _ = recorded()
    for name in ROLES:
        role = rig.new_role(name)
        role.handle(HeaderRequest(PLAN, rig.header))
        masked = np.zeros(0 if name == "notary" else 64, np.uint8)
        reply = role.handle(DepositRequest(PLAN, rig.header, (Submission(NAMES[0], masked, blob(raw)),)))
        assert reply.refused[NAMES[0]].startswith("bad_signature")  # type: ignore[union-attr]


@settings(QUIET, max_examples=60)
@given(st.data())
def test_a_site_answers_any_audit_with_a_vote_or_refuses_and_agrees_to_the_truth_only(data: st.DataObject) -> None:
    rig, request = audit_request()
    bent = altered(request, data.draw)
    try:
        vote = site.audit(bent, rig.charter, rig.keys[NAMES[0]], rig.words[NAMES[0]])
    except ProtocolError:
        return
    same = {f.name for f in dataclasses.fields(bent)} - {"plan_sha256", "own_square", "own_product"}
    unchanged = all(messages.fingerprint(getattr(bent, n)) == messages.fingerprint(getattr(request, n)) for n in same)
    if vote.agrees:
        assert {messages.sha256(bent.total), bent.weights, bent.sites} == {
            messages.sha256(request.total), request.weights, request.sites
        }  # fmt: skip
        assert (int(bent.own_square), int(bent.own_product)) == (int(request.own_square), int(request.own_product))
    elif unchanged and bent.own_square == request.own_square and bent.own_product == request.own_product:
        raise AssertionError("the truth was denied")


@cache
def audit_request() -> tuple[Rig, AuditRequest]:
    rig = Rig(6, 1, 32, 16)
    asked: list[AuditRequest] = []
    combined = rig.run()

    def record(party: str, message: AuditRequest) -> AuditRequest:
        asked.append(message)
        return message

    rig.request = record
    rig.exchange.audit(rig.header, combined)
    return rig, asked[0]


# --- any order, any mixture of exchanges, any restarts


class Roles(RuleBasedStateMachine):
    """Roles are asked anything anybody ever wrote, in any order, and are started again whenever it suits."""

    @initialize()
    def begin(self) -> None:
        self.rig = Rig(5, 1, 32, 4, leave_out(0))
        self.pool: list[tuple[str, Any]] = []
        self.first: dict[tuple[str, bytes], bytes] = {}
        self.openings: dict[tuple[str, str, int], set[bytes]] = {}
        self.exchange_began = False

    def ask(self, party: str, request: Any) -> Any:
        rig = self.rig
        asked = messages.fingerprint(request)
        try:
            reply = rig.roles[party].handle(request)
        except ProtocolError as error:
            return Dropout(party, "refused", error.what)
        rig.log[party].append(request)
        if isinstance(reply, Opening):
            key = (party, request.header.run, request.header.round)
            self.openings.setdefault(key, set()).add(wire.encode(reply))
        if not hasattr(reply, "seed"):
            assert self.first.setdefault((party, asked), wire.encode(reply)) == wire.encode(reply)
        return reply

    @rule(round=st.integers(0, 2), step=st.integers(1, 6))
    def an_exchange_that_gets_so_far(self, round: int, step: int) -> None:
        rig, count = self.rig, dict.fromkeys(ROLES, 0)
        rig.next(round=round)

        def send(requests: Any) -> Any:
            replies = {}
            for party, request in requests.items():
                count[party] += 1
                self.pool.append((party, request))
                replies[party] = self.ask(party, request) if count[party] <= step + 1 else Dropout(party, "late")
            return replies

        rig.exchange._send = send
        try:
            consent = rig.exchange.announce(rig.header)
            rig.words = rig.vectors(rig.header.exchange)
            sent = {s: site.submit(rig.header, consent, rig.charter, rig.keys[s], w) for s, w in rig.words.items()}
            rig.holds(rig.exchange.combine(rig.header, sent))
        except ExchangeFailed as error:
            if error.reason != "role_failed":
                raise

    @precondition(lambda self: self.pool)
    @rule(data=st.data(), bent=st.booleans())
    def any_request_again(self, data: st.DataObject, bent: bool) -> None:
        party, request = data.draw(st.sampled_from(self.pool))
        self.ask(data.draw(st.sampled_from([party, *ROLES])), altered(request, data.draw) if bent else request)

    @precondition(lambda self: self.pool)
    @rule(role=st.sampled_from(ROLES))
    def a_restart(self, role: str) -> None:
        memory = self.rig.roles[role].memory
        self.rig.restart(role)
        assert self.rig.roles[role].memory == memory

    @invariant()
    def one_opening_of_a_round(self) -> None:
        assert all(len(made) == 1 for made in getattr(self, "openings", {}).values())


Roles.TestCase.settings = settings(QUIET, max_examples=25, stateful_step_count=12)
TestRoles = Roles.TestCase
