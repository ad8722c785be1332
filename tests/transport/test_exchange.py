"""Laws of an exchange: what is opened is exact, and whoever lies, cheats or dies is named or changes nothing."""

from __future__ import annotations

import copy
import pickle
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transport.trigram_rig import NAMES, PLAN, Rig, leave_out, public_map

from fedmat import wire
from fedmat.domain import Dropout
from fedmat.envelopes import (
    ROLES,
    AuditRequest,
    AuditVote,
    Commitment,
    Confirmation,
    ConfirmRequest,
    Deposit,
    HeaderSignature,
    Opening,
    OpenRequest,
    Share,
    ShareRequest,
)
from fedmat.errors import ProtocolError
from fedmat.transport.trigram import messages, shares, site
from fedmat.transport.trigram.exchange import Exchange, ExchangeFailed, _seen_by
from fedmat.transport.trigram.ring import Ring, blob, dot
from fedmat.transport.trigram.roles import Role
from fedmat.transport.trigram.shares import Holdings

STEPS = (HeaderSignature, Deposit, Commitment, Share, Opening, Confirmation)
STEP_NAMES = ("header", "deposit", "commit", "share", "open", "confirm")


# --- exactness


def test_five_sites_by_hand() -> None:
    rig = Rig(n=5, f=0, length=2, weights=[1, 2, 1, 1, 1])
    values = {"site00": [3, 0], "site01": [0, 4], "site02": [1, 1], "site03": [-1, 2], "site04": [0, 0]}
    combined = rig.run({s: rig.ring.words(np.array(v)) for s, v in values.items()})
    assert combined.weights == (1, 2, 1, 1, 1)
    assert rig.ring.lift(np.frombuffer(combined.total, "<u4")).tolist() == [3, 11]
    assert combined.gram[0] == (9, 0, 3, -3, 0)
    assert combined.gram[3] == (-3, 8, 1, 5, 0)
    assert (combined.excluded, combined.refused, combined.mapped_gram, combined.scores) == ({}, {}, None, None)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("kem", ["x25519", "mlkem768-x25519"])
def test_ten_sites_two_left_out(bits: int, kem: str) -> None:
    rig = Rig(10, 2, bits, 3000, kem=kem)
    combined = rig.run()
    rig.holds(combined)
    assert sum(combined.weights) == 8 and len(combined.excluded) == 2
    votes: dict[str, Any] = rig.exchange.audit(rig.header, combined)
    assert all(v.agrees for v in votes.values())


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_selection_on_protected_updates_is_selection_on_plain_ones_and_the_sum_is_exact(data: st.DataObject) -> None:
    check_any_consortium(data)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_selection_on_protected_updates_is_selection_on_plain_ones_a_thousand_times(data: st.DataObject) -> None:
    check_any_consortium(data)


def check_any_consortium(data: st.DataObject) -> None:
    f = data.draw(st.integers(0, 3), "f")
    n = data.draw(st.integers(max(5, 2 * f + 3), 12), "n")
    minimum = messages.least_minimum(f)
    out = data.draw(st.integers(0, max(0, n - minimum)), "left out")
    weights = data.draw(st.lists(st.integers(1, 3), min_size=n, max_size=n), "weights")
    rig = Rig(n, f, data.draw(st.sampled_from([32, 64])), data.draw(st.integers(1, 70), "k"), leave_out(out), 0, weights)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    size = data.draw(st.sampled_from([1e-9, 0.3, 3.0, 1e9]))
    updates = rng.standard_normal((n, rig.header.length)) * size
    rig.holds(rig.run({s: rig.ring.encode(u, rig.header.clip, rng) for s, u in zip(rig.names, updates)}))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 8), st.integers(1, 3), st.integers(0, 99))
def test_a_public_map_opens_the_products_of_the_mapped_updates_and_nothing_inexact(rows: int, columns: int, seed: int) -> None:
    rig = Rig(6, 1, 64, 40, leave_out(0))
    given_map = public_map(rig, rows, columns, seed)
    rig.next(map_sha256=wire.digest(given_map))
    combined = rig.run(public_map=given_map)
    matrix = given_map.matrix.view("<i4").reshape(rows, 40).astype(object)
    targets = given_map.targets.view("<i4").reshape(rows, columns).astype(object)
    mapped = np.array([rig.ring.lift(rig.words[s]) for s in combined.sites], dtype=object) @ matrix.T
    assert combined.mapped_gram == tuple(map(tuple, (mapped @ mapped.T).tolist()))
    assert combined.scores == tuple(map(tuple, (mapped @ targets).tolist()))
    rig.holds(combined)


def test_three_of_ten_may_stay_away_and_no_more() -> None:
    rig = Rig(10, 2)
    sent = rig.submissions()
    some = {s: sent[s] for s in NAMES[:10] if s not in (NAMES[0], NAMES[4], NAMES[9])}
    combined = rig.exchange.combine(rig.header, some)
    rig.holds(combined)
    assert len(combined.sites) == 7 and sum(combined.weights) == 5
    rig.next(round=1)
    sent = rig.submissions()
    with pytest.raises(ExchangeFailed, match="too_few") as caught:
        rig.exchange.combine(rig.header, {s: sent[s] for s in NAMES[:6]})
    assert not caught.value.opened


def test_protection_costs_less_than_438_bytes_an_update() -> None:
    rig = Rig()
    made = rig.submissions()[NAMES[0]]
    assert made.masked.nbytes == 4 * rig.header.length
    assert made.envelope.nbytes == 433 <= 438


def test_a_submission_in_another_sites_name_is_not_carried() -> None:
    rig = Rig()
    sent = rig.submissions()
    combined = rig.exchange.combine(rig.header, {**sent, NAMES[0]: sent[NAMES[1]]})
    assert combined.refused == {NAMES[0]: "wrong_site: a submission in another site's name"}
    rig.holds(combined)


def recorder(into: list[Any], plainly: bool = False) -> Any:
    def record(party: str, message: Any) -> Any:
        into.append(message if plainly else wire.encode(message))
        return message

    return record


def test_a_courier_that_plays_recorded_replies_asks_the_same_and_ends_the_same() -> None:
    rig = Rig()
    asked: list[bytes] = []
    sent = rig.submissions()
    rig.request = recorder(asked)
    first = rig.exchange.combine(rig.header, sent)
    recorded = {r: list(rig.replies[r][1:]) for r in ROLES}
    again: list[bytes] = []

    def play(requests: Any) -> Any:
        again.extend(wire.encode(m) for m in requests.values())
        return {p: recorded[p].pop(0) for p in requests}

    second = Exchange(rig.charter, play).combine(rig.header, sent)
    assert again == asked
    assert (second.total, second.weights, second.rows) == (first.total, first.weights, first.rows)


# --- hostile sites


def wrapping(value: int, at: tuple[int, ...] = (0,), length: int = 2048, bits: int = 32) -> tuple[Rig, dict[str, Any]]:
    """Site 3 copies site 2 and adds ``value`` on coordinates where all others are zero: a twin of site 2 in the Gram matrix."""
    rig = Rig(10, 2, bits, length)
    words = rig.vectors()
    for w in words.values():
        w[:8] = 0
    sent = rig.submissions(words)
    bad = words[NAMES[2]].copy()
    bad[list(at)] = value
    sent[NAMES[3]] = rig.force(NAMES[3], bad)
    return rig, sent


@pytest.mark.parametrize("value", [1 << 16, 1 << 17, 3 << 16, 1 << 20, 1 << 31])
def test_an_update_made_to_wrap_is_found_and_its_site_named(value: int) -> None:
    rig, sent = wrapping(value)
    with pytest.raises(ExchangeFailed) as caught:
        rig.exchange.combine(rig.header, sent)
    assert (caught.value.reason, caught.value.guilty, caught.value.opened) == ("wrapped", (NAMES[3],), True)


@pytest.mark.parametrize("at", [(0, 1), (0, 1, 2, 3)])
def test_wraps_that_cancel_in_projections_of_plus_and_minus_one_are_named_too(at: tuple[int, ...]) -> None:
    rig, sent = wrapping(1 << 31, at)
    with pytest.raises(ExchangeFailed, match="wrapped") as caught:
        rig.exchange.combine(rig.header, sent)
    assert caught.value.guilty == (NAMES[3],)


@pytest.mark.parametrize("value", [1 << 32, 1 << 40, 3 << 32, 1 << 63])
def test_wraps_of_the_wide_ring_are_named_as_well(value: int) -> None:
    rig, sent = wrapping(value, bits=64)
    with pytest.raises(ExchangeFailed, match="wrapped") as caught:
        rig.exchange.combine(rig.header, sent)
    assert caught.value.guilty == (NAMES[3],)


def test_short_updates_are_not_projected_away_to_find_a_cheat() -> None:
    assert [shares.repetitions(k) for k in (1, 64, 2048, 10**6)] == [0, 8, 256, 256]
    rig, sent = wrapping(1 << 20, length=8)
    with pytest.raises(ExchangeFailed, match="wrapped") as caught:
        rig.exchange.combine(rig.header, sent)
    assert caught.value.guilty in ((), (NAMES[3],))


@pytest.mark.parametrize("power", [1, 3, 5, 9, 51])
def test_an_honest_update_is_never_named_however_heavy_its_tails(power: int) -> None:
    rng, ring = np.random.default_rng(power), Ring(32)
    for _ in range(4):
        x = rng.standard_normal(4096) ** power
        q = ring.lift(ring.encode(x, 0.9 * float(np.linalg.norm(x)), rng))
        signs = rng.integers(0, 2, (256, 4096)) - rng.integers(0, 2, (256, 4096))
        assert shares.guilty(ring, ("a",), ring.words(signs @ q)[:, None]) == ()


def test_a_lie_about_an_update_that_stays_small_is_not_blamed_on_a_site(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(7, 1, length=2048)
    monkeypatch.setattr(Holdings, "gram", bend("aggregator", Holdings.gram, (0, 0), 2))
    with pytest.raises(ExchangeFailed, match="nobody") as caught:
        rig.run()
    assert (caught.value.reason, caught.value.guilty) == ("wrapped", ())


def test_an_update_of_random_numbers_is_left_out_as_malformed() -> None:
    rig = Rig(10, 2, length=300)
    sent = rig.submissions()
    noise = np.random.default_rng(4).integers(0, 1 << 32, 300, dtype=np.uint64).astype(np.uint32)
    sent[NAMES[5]] = rig.force(NAMES[5], noise)
    combined = rig.exchange.combine(rig.header, sent)
    assert NAMES[5] not in combined.sites and combined.excluded[NAMES[5]].startswith("malformed")
    rig.holds(combined)


def test_too_many_malformed_updates_stop_the_exchange_with_nothing_opened() -> None:
    rig = Rig(7, 2, length=300)
    sent = rig.submissions()
    sent[NAMES[5]] = rig.force(NAMES[5], rig.ring.words(np.full(300, 10_000)))
    with pytest.raises(ExchangeFailed, match="too_few") as caught:
        rig.exchange.combine(rig.header, sent)
    assert (caught.value.step, caught.value.opened) == ("open", False)


def test_rows_that_no_vectors_have_are_dropped_and_ties_fall_on_both() -> None:
    good = shares.Opened(("a", "b", "c"), [[4, 2, 0], [2, 4, 0], [0, 0, 1]])
    assert shares.malformed(good, Ring(32), None) == {}
    assert list(shares.malformed(replace(good, gram=[[4, 5, 0], [5, 4, 0], [0, 0, 1]]), Ring(32), None)) == ["a", "b"]
    assert list(shares.malformed(replace(good, gram=[[4, 5, 5], [5, 4, 0], [5, 0, 4]]), Ring(32), None)) == ["a"]
    assert list(shares.malformed(replace(good, gram=[[-4, 0, 0], [0, 4, 0], [0, 0, 2**31]]), Ring(32), None)) == ["a", "c"]


# --- lying roles


def bend(role: str, method: Any, at: tuple[int, int], by: int) -> Any:
    """A role that adds ``by`` to one inner product and commits itself to the lie."""

    def gram(self: Holdings) -> Any:
        share = method(self)
        if self.role == role:
            for i, j in {at, at[::-1]}:
                share[i : i + 1, j] += share.dtype.type(by)
        return share

    return gram


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("at", "by"), [((0, 0), 1), ((0, 1), 1), ((2, 2), 1 << 20)])
def test_a_role_that_lies_about_a_counted_update_is_found_by_the_norm_of_the_sum(
    role: str, at: tuple[int, int], by: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(7, 1, select=leave_out(0))
    monkeypatch.setattr(Holdings, "gram", bend(role, Holdings.gram, at, by))
    with pytest.raises(ExchangeFailed) as caught:
        rig.run()
    assert (caught.value.reason, caught.value.guilty) == ("wrapped", ())


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("by", [1 << 29, 1 << 31])  # pushed out by the rule; pushed out as malformed
def test_a_role_that_censors_a_site_is_found_by_that_site(role: str, by: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(7, 1)
    monkeypatch.setattr(Holdings, "gram", bend(role, Holdings.gram, (2, 2), by))
    combined = rig.run()
    assert NAMES[2] in combined.excluded
    votes = rig.exchange.audit(rig.header, combined)
    assert {s: v.agrees for s, v in votes.items()} == {s: s != NAMES[2] for s in rig.names}  # type: ignore[union-attr]
    assert votes[NAMES[2]].detail.startswith("wrong_square")


def test_a_courier_that_shields_the_lie_from_the_site_is_found_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(7, 1)
    monkeypatch.setattr(Holdings, "gram", bend("aggregator", Holdings.gram, (2, 2), 1 << 29))
    combined = rig.run()
    own = rig.ring.lift(rig.words[NAMES[2]])
    truth = {
        "own_square": str(dot(own, own)),
        "own_product": str(dot(own, rig.ring.lift(np.frombuffer(combined.total, "<u4")))),
    }
    rig.request = lambda party, m: replace(m, **truth) if party == NAMES[2] else m
    vote = rig.exchange.audit(rig.header, combined)[NAMES[2]]
    assert isinstance(vote, AuditVote) and not vote.agrees and vote.detail.startswith("wrong_row")


@pytest.mark.parametrize(
    ("role", "tag"),
    [("aggregator", "e"), ("aggregator", "a"), ("auditor", "b"), ("notary", "a"), ("notary", "b")],
)
def test_a_role_that_lies_in_its_part_or_its_checks_is_found_by_the_others(
    role: str, tag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Holdings.sums

    def sums(self: Holdings, weights: Any) -> Any:
        made = honest(self, weights)
        if self.role == role:
            made[tag][17] += 5
        return made

    monkeypatch.setattr(Holdings, "sums", sums)
    rig = Rig()
    with pytest.raises(ExchangeFailed) as caught:
        rig.run()
    assert (caught.value.reason, caught.value.step) == ("roles_disagree", "confirm")
    accused = [r for r in ROLES if r != role and f"the {role}" in caught.value.detail.split(f"{r}: ")[-1].split(";")[0]]
    assert accused  # some honest role names the liar


@pytest.mark.parametrize(("tag", "witness"), [("a", "aggregator"), ("b", "auditor")])
def test_a_notary_that_lies_about_pads_is_named_by_the_role_that_holds_the_same(
    tag: str, witness: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Holdings.sums

    def sums(self: Holdings, weights: Any) -> Any:
        made = honest(self, weights)
        if self.role == "notary":
            made[tag][0] += 1
        return made

    monkeypatch.setattr(Holdings, "sums", sums)
    rig = Rig()
    with pytest.raises(ExchangeFailed) as caught:
        rig.run()
    assert f"{witness}: wrong_check: the notary summed other pads" in caught.value.detail


@pytest.mark.parametrize("role", ["aggregator", "auditor"])
def test_a_role_that_lies_in_its_part_alone_is_found(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Role._part

    def part(self: Role, now: Any) -> Any:
        made = honest(self, now)
        if self.name == role:
            made = made.copy()
            made[0] += 1
        return made

    monkeypatch.setattr(Role, "_part", part)
    rig = Rig()
    with pytest.raises(ExchangeFailed, match="wrong_part") as caught:
        rig.run()
    assert f"the {role}" in caught.value.detail or f"part of the {role}" in caught.value.detail


@pytest.mark.parametrize("role", ROLES)
def test_a_role_that_counts_sites_otherwise_is_found(role: str) -> None:
    rig = Rig()
    rig.roles[role]._select = leave_out(2)
    with pytest.raises(ExchangeFailed, match="other weights"):
        rig.run()
    # Each honest role says so itself, signed, where the courier would not: the sum is confirmed by nobody.
    rig = Rig()
    rig.roles[role]._select = leave_out(2)
    openings: dict[Any, Any] = {}
    rig.reply = lambda party, m: (openings.setdefault(party, m), m)[1] if isinstance(m, Opening) else m
    with pytest.raises(ExchangeFailed):
        rig.run()
    for other in ROLES:
        if other != role:
            request = ConfirmRequest(PLAN, rig.header, _seen_by(other, openings))
            assert rig.roles[other].handle(request).trouble == f"roles_disagree: the {role} chose other weights"  # type: ignore[union-attr]


def test_a_gram_matrix_that_is_not_symmetric_can_only_be_a_roles_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Holdings.gram

    def gram(self: Holdings) -> Any:
        share = honest(self)
        share[0, 1] += self.role == "notary"
        return share

    monkeypatch.setattr(Holdings, "gram", gram)
    with pytest.raises(ExchangeFailed, match="shares do not fit") as caught:
        Rig().run()
    assert not caught.value.opened


@pytest.mark.parametrize("role", ROLES)
def test_a_role_that_lies_about_projections_frames_nobody(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Holdings.projections

    def projections(self: Holdings, weights: Any, coin: bytes) -> Any:
        made = honest(self, weights, coin)
        if self.role == role:
            for values in made.values():
                values[:, 0] += 1 << 25
        return made

    monkeypatch.setattr(Holdings, "projections", projections)
    rig, sent = wrapping(1 << 20)
    with pytest.raises(ExchangeFailed, match="contradict each other") as caught:
        rig.exchange.combine(rig.header, sent)
    assert (caught.value.reason, caught.value.step, caught.value.guilty) == ("roles_disagree", "blame", ())


def test_a_role_that_commits_itself_twice_gets_nothing_opened() -> None:
    rig = Rig()

    def equivocate(party: str, request: Any) -> Any:
        if isinstance(request, ShareRequest) and party == "auditor":
            a, b, c = request.commitments
            other = replace(c, digest=blob(bytes(32)))
            binding = rig.roles["auditor"]._now.held_digest  # type: ignore[union-attr]
            signed = replace(other, signature=blob(rig.keys["notary"].sign(messages.signed_bytes(other, binding))))
            return replace(request, commitments=(a, b, signed))
        return request

    rig.request = equivocate
    with pytest.raises(ExchangeFailed, match="bad_signature") as caught:
        rig.run()
    assert (caught.value.step, caught.value.opened) == ("share", False)
    # A courier in league with the notary would go on; the honest roles would not, they signed different conversations.
    given = tuple(rig.replies[r][-1] for r in ROLES)
    for role in ("aggregator", "auditor"):
        with pytest.raises(ProtocolError, match="bad_signature"):
            rig.roles[role].handle(OpenRequest(PLAN, rig.header, given))


def test_a_share_that_was_not_committed_to_is_refused() -> None:
    rig = Rig()

    def rush(party: str, request: Any) -> Any:
        if isinstance(request, OpenRequest):
            a, b, c = request.shares
            gram = c.gram.copy()
            gram[0] ^= 1
            other = replace(c, gram=gram)
            binding = rig.roles["notary"]._now.committed_digest  # type: ignore[union-attr]
            return replace(
                request,
                shares=(a, b, replace(other, signature=blob(rig.keys["notary"].sign(messages.signed_bytes(other, binding))))),
            )
        return request

    rig.request = rush
    with pytest.raises(ExchangeFailed, match="wrong_share") as caught:
        rig.run()
    assert not caught.value.opened


# --- roles that die


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("step", range(6))
@pytest.mark.parametrize("when", ["before it answers", "after it answered"])
def test_a_role_that_dies_is_named_with_its_step_and_no_sum_comes_out(role: str, step: int, when: str) -> None:
    rig, count = Rig(), 0

    def die(party: str, message: Any) -> Any:
        nonlocal count
        if party != role:
            return message
        count += when == "before it answers" or isinstance(message, STEPS)
        return Dropout(party, "crashed") if count > step else message

    setattr(rig, "request" if when == "before it answers" else "reply", die)
    with pytest.raises(ExchangeFailed) as caught:
        rig.run()
    assert (caught.value.reason, caught.value.role, caught.value.step) == ("role_failed", role, STEP_NAMES[step])
    assert caught.value.opened == (step >= 4)
    if step < 4:
        assert not any(m.rounds for r in ROLES for m in rig.roles[r].memory.values())


def test_an_answer_of_the_wrong_kind_or_role_counts_as_none() -> None:
    wrongs: tuple[Any, ...] = (lambda m: Dropout("x", "late"), lambda m: replace(m, role="notary"), lambda m: 7)
    for wrong in wrongs:
        rig = Rig()

        def reply(party: str, message: Any, wrong: Any = wrong) -> Any:
            return wrong(message) if party == "auditor" and isinstance(message, Commitment) else message

        rig.reply = reply
        with pytest.raises(ExchangeFailed) as caught:
            rig.run()
        assert (caught.value.role, caught.value.step) == ("auditor", "commit")
    rig = Rig()
    silent = Exchange(rig.charter, lambda requests: {})
    with pytest.raises(ExchangeFailed, match="aggregator did not answer header"):
        silent.announce(rig.header)


def test_a_failure_survives_pickling_with_all_it_knows() -> None:
    error = ExchangeFailed("wrapped", "it did", fix="skip", role="notary", step="open", detail="d", opened=True, guilty=["a"])
    back = pickle.loads(pickle.dumps(error))
    assert (str(back), back.__dict__) == (str(error), error.__dict__)
    assert copy.copy(error).guilty == ("a",)


# --- self-audit


def shift(blob_: Any) -> Any:
    bent = blob_.copy()
    bent[0] ^= 1
    return bent


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda m: m, ""),
        (lambda m: replace(m, total=shift(m.total)), "wrong_sum"),
        (lambda m: replace(m, total=m.total[:-1]), "wrong_length"),
        (lambda m: replace(m, own_square=str(int(m.own_square) + 1)), "wrong_row"),
        (lambda m: replace(m, own_product="0"), "wrong_row"),
        (lambda m: replace(m, own_product="zero"), "wrong_row"),
        (lambda m: replace(m, reason="because"), "wrong_row"),
        (lambda m: replace(m, salt=shift(m.salt)), "wrong_row"),
        (lambda m: replace(m, sites=m.sites[::-1]), "bad_weights"),
        (lambda m: replace(m, sites=("stranger", *m.sites[1:])), "bad_weights"),
        (lambda m: replace(m, weights=m.weights[1:]), "bad_weights"),
        (lambda m: replace(m, weights=tuple(2 * w for w in m.weights)), "bad_signature"),
        (lambda m: replace(m, weights=(1, 1, 1, 0, 0, 0, 0)), "privacy_floor"),
        (lambda m: replace(m, confirmations=m.confirmations[:2]), "wrong_parties"),
        (lambda m: replace(m, confirmations=(replace(m.confirmations[0], trouble="x"), *m.confirmations[1:])), "bad_signature"),
        (lambda m: replace(m, header=replace(m.header, exchange=5)), "bad_signature"),
        (lambda m: replace(m, header=replace(m.header, minimum=1)), "too_few"),
    ],
)
def test_a_site_agrees_to_the_whole_truth_only(change: Any, detail: str) -> None:
    rig = Rig()
    combined = rig.run()
    request: list[AuditRequest] = []
    rig.request = recorder(request, plainly=True)
    rig.exchange.audit(rig.header, combined)
    vote = site.audit(change(request[0]), rig.charter, rig.keys[NAMES[0]], rig.words[NAMES[0]])
    assert (vote.agrees, vote.detail.split(":")[0]) == (not detail, detail)


def test_a_site_does_not_agree_to_a_sum_that_a_role_found_trouble_with() -> None:
    rig = Rig()
    combined = rig.run()
    digest = messages.header_digest(rig.header)
    binding = messages.confirmation_binding(digest, combined.sites, combined.weights)
    *rest, last = combined.confirmations
    bad = replace(last, trouble="wrong_part: of somebody")
    bad = replace(bad, signature=blob(rig.keys["notary"].sign(messages.signed_bytes(bad, binding))))
    votes = rig.exchange.audit(rig.header, replace(combined, confirmations=(*rest, bad)))
    assert {v.detail.split(":")[0] for v in votes.values()} == {"not_confirmed"}


def test_votes_that_are_not_a_sites_own_do_not_count() -> None:
    rig = Rig()
    combined = rig.run()
    rig.reply = lambda party, m: {
        NAMES[0]: Dropout(party, "late"),
        NAMES[1]: replace(m, agrees=not m.agrees),
        NAMES[2]: 7,
    }.get(party, m)
    votes = rig.exchange.audit(rig.header, combined)
    assert [type(votes[s]).__name__ for s in rig.names] == ["Dropout"] * 3 + ["AuditVote"] * 4
    assert "bad_signature" in votes[NAMES[1]].detail


def test_confirmations_are_worth_keeping_without_any_other_message() -> None:
    rig = Rig()
    combined = rig.run()
    digest = messages.header_digest(rig.header)
    binding = messages.confirmation_binding(digest, combined.sites, combined.weights)
    for confirmation in combined.confirmations:
        messages.verify(rig.charter, confirmation, confirmation.role, binding, rig.header.today)


def test_a_sites_row_is_hidden_from_other_sites_by_its_salt() -> None:
    rig = Rig()
    combined = rig.run()
    leaves = combined.confirmations[0].rows.tobytes()
    digest, row = messages.header_digest(rig.header), combined.rows[0]
    assert row.leaf(digest) in leaves and replace(row, salt=bytes(32)).leaf(digest) not in leaves
    assert len({r.salt for r in combined.rows}) == 7


@pytest.mark.scale
def test_a_million_numbers_of_ten_sites_take_a_fraction_of_a_second_at_each_role() -> None:
    rig = Rig(10, 2, 32, 10**6)
    sent = rig.submissions()
    start = time.process_time()
    rig.exchange.combine(rig.header, sent)
    assert time.process_time() - start < 3.0  # all three roles and the courier; 0.4 s on a quiet machine
