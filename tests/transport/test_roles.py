"""Laws of a role: it takes part under safe headers only, answers each step once, and opens one sum in a round."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transport.trigram_rig import NAMES, PLAN, Chosen, Rig, first_header, fixed, public_map

from fedmat import wire
from fedmat.domain import Dropout
from fedmat.envelopes import (
    ROLES,
    AuditVote,
    BlameRequest,
    CommitRequest,
    ConfirmRequest,
    DepositRequest,
    Header,
    HeaderRequest,
    OpenRequest,
    ShareRequest,
    Submission,
    no_bytes,
)
from fedmat.errors import PlanRefused, ProtocolError
from fedmat.transport.trigram import canary, messages, shares, site
from fedmat.transport.trigram.exchange import ExchangeFailed
from fedmat.transport.trigram.ring import blob
from fedmat.transport.trigram.roles import Memory, Role

REQUESTS = (HeaderRequest, DepositRequest, CommitRequest, ShareRequest, OpenRequest, ConfirmRequest)


def refused(rig: Rig, request: Any, role: str = "auditor") -> str:
    with pytest.raises(ProtocolError) as caught:
        rig.roles[role].handle(request)
    return caught.value.reason


def deposit(rig: Rig, submissions: dict[str, Submission], role: str = "auditor") -> dict[str, str]:
    """What a role refuses of these submissions."""
    sent = tuple(submissions[s] for s in sorted(submissions))
    if role == "notary":
        sent = tuple(replace(s, masked=no_bytes()) for s in sent)
    reply = rig.roles[role].handle(DepositRequest(PLAN, rig.header, sent))
    assert set(reply.accepted) | set(reply.refused) == set(submissions)  # type: ignore[union-attr]
    return dict(reply.refused)  # type: ignore[union-attr]


# --- headers


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"charter_sha256": "0" * 64}, "wrong_charter"),
        ({"plan_sha256": "0" * 64}, "wrong_plan"),
        ({"length": 0}, "bad_header"),
        ({"bits": 16}, "bad_header"),
        ({"round": -1}, "bad_header"),
        ({"exchange": -1}, "bad_header"),
        ({"exchange": 2**60}, "bad_header"),
        ({"clip": 0.0}, "bad_header"),
        ({"clip": float("nan")}, "bad_header"),
        ({"clip": float("inf")}, "bad_header"),
        ({"run": ""}, "bad_header"),
        ({"run": "\ud800"}, "bad_header"),
        ({"today": "yesterday"}, "bad_header"),
        ({"today": "20261124"}, "bad_header"),
        ({"today": "2031-01-01"}, "expired_key"),
        ({"hostile": -1}, "bad_header"),
        ({"hostile": 3}, "too_few"),  # 7 < 2 * 3 + 3
        ({"minimum": 3}, "too_few"),
        ({"minimum": 8}, "too_few"),
        ({"weights": dict.fromkeys(NAMES[:4], 1), "hostile": 0, "minimum": 4}, "too_few"),
        ({"weights": dict.fromkeys(NAMES[:7], 0)}, "bad_weights"),
        ({"weights": dict.fromkeys(NAMES[:7], 5000)}, "bad_weights"),
        ({"weights": dict.fromkeys((*NAMES[:6], "stranger"), 1)}, "unknown_member"),
        ({"weights": dict.fromkeys((*NAMES[:6], "notary"), 1)}, "unknown_member"),
        ({"map_sha256": "0" * 64}, "bad_header"),  # in 32 bits
    ],
)
def test_a_header_that_breaks_a_rule_is_signed_by_nobody_and_answered_by_no_site(change: dict[str, Any], reason: str) -> None:
    rig = Rig()
    consent = rig.exchange.announce(rig.header)
    bad = replace(rig.header, **{"exchange": 1, **change})
    assert refused(rig, HeaderRequest(bad.plan_sha256, bad)) == reason
    with pytest.raises(ProtocolError):
        site.submit(bad, consent, rig.charter, rig.keys[NAMES[0]], rig.ring.zeros(rig.header.length))


@pytest.mark.parametrize(("f", "least"), [(0, 4), (1, 4), (2, 5), (3, 6), (4, 7)])
def test_three_honest_updates_at_least_are_added_up_whatever_f_sites_do(f: int, least: int) -> None:
    assert messages.least_minimum(f) == least >= f + 3
    messages.check_header(replace(Rig(n=11, f=f).header, minimum=least), Rig(n=11).charter)
    with pytest.raises(ProtocolError, match="too_few"):
        messages.check_header(replace(Rig(n=11, f=f).header, minimum=least - 1), Rig(n=11).charter)


def test_a_site_sends_nothing_unless_all_three_roles_signed_this_header() -> None:
    rig = Rig()
    a, b, c = rig.exchange.announce(rig.header)
    keys, zeros = rig.keys[NAMES[0]], rig.ring.zeros(rig.header.length)
    for consent in [
        (a, b),
        (a, b, b),
        (a, b, c, c),
        (a, b, replace(c, signature=a.signature)),
        (a, b, replace(c, signature=no_bytes())),
    ]:
        with pytest.raises(ProtocolError):
            site.submit(rig.header, consent, rig.charter, keys, zeros)
    with pytest.raises(ProtocolError, match="bad_signature"):
        site.submit(replace(rig.header, round=1), (a, b, c), rig.charter, keys, zeros)


def test_a_site_refuses_to_send_what_is_too_long_or_of_another_shape() -> None:
    rig = Rig()
    consent, keys = rig.exchange.announce(rig.header), rig.keys[NAMES[0]]
    words = rig.ring.zeros(rig.header.length)
    words[0] = rig.ring.bound + 1
    with pytest.raises(ProtocolError, match="too_large"):
        site.submit(rig.header, consent, rig.charter, keys, words)
    for other in (words[:-1], words.astype(np.uint64)):
        with pytest.raises(ProtocolError, match="wrong_length"):
            site.submit(rig.header, consent, rig.charter, keys, other)


def test_exchanges_and_dates_only_go_forward() -> None:
    rig = Rig()
    rig.next(exchange=4)
    rig.roles["auditor"].handle(first_header(rig))
    for change in ({"exchange": 3}, {"round": 1}, {"exchange": 5, "today": "2026-11-23"}):
        assert refused(rig, HeaderRequest(PLAN, replace(rig.header, **change))) == "replay"
    rig.roles["auditor"].handle(HeaderRequest(PLAN, replace(rig.header, exchange=5)))
    rig.roles["auditor"].handle(HeaderRequest(PLAN, replace(rig.header, exchange=0, run="another run")))


def test_a_role_serves_only_under_its_own_name() -> None:
    rig = Rig()
    with pytest.raises(ProtocolError, match="wrong_keys"):
        Role("notary", rig.keys["auditor"], rig.charter, rig.select, PLAN)


# --- deposits


def test_one_flipped_bit_of_a_masked_update_is_refused() -> None:
    rig = Rig()
    sent = rig.submissions()
    bent = sent[NAMES[3]].masked.copy()
    bent[5] ^= 1
    sent[NAMES[3]] = replace(sent[NAMES[3]], masked=bent)
    assert deposit(rig, sent) == {NAMES[3]: "wrong_payload: the masked update is not the one the site signed"}


@pytest.mark.parametrize("index", [0, 1, 40, 80, 150, 250, 360, 368, 369, 432])
@pytest.mark.parametrize("role", ROLES)
def test_one_flipped_bit_anywhere_in_an_envelope_is_refused(index: int, role: str) -> None:
    rig = Rig()
    sent = rig.submissions()
    bent = sent[NAMES[3]].envelope.copy()
    bent[index] ^= 4
    sent[NAMES[3]] = replace(sent[NAMES[3]], envelope=bent)
    assert deposit(rig, sent, role)[NAMES[3]].split(":")[0] == ("bad_envelope" if index == 0 else "bad_signature")


@pytest.mark.parametrize("size", [0, 4 * 63, 4 * 65, 8 * 64])
def test_an_update_of_another_length_or_ring_is_refused(size: int) -> None:
    rig = Rig()
    sent = rig.submissions()
    sent[NAMES[0]] = rig.resign(NAMES[0], replace(sent[NAMES[0]], masked=np.zeros(size, np.uint8)))
    assert deposit(rig, sent)[NAMES[0]].startswith("wrong_length")


@pytest.mark.parametrize(("role", "seeds"), [("notary", 2), ("auditor", 1), ("aggregator", 1)])
def test_a_seed_that_is_not_the_committed_one_is_refused_by_the_role_it_was_sealed_to(role: str, seeds: int) -> None:
    rig = Rig()
    sent, name = rig.submissions(), NAMES[2]
    digest = messages.header_digest(rig.header)
    context = messages.seal_context(digest, name, role)
    old = messages.Envelope.parse(sent[name].envelope.tobytes(), rig.charter.seal_overhead)
    other = rig.charter.seal(role, bytes(32 * seeds), context, rig.header.today)
    sent[name] = rig.resign(name, sent[name], seals={**old.seals, role: other})
    assert deposit(rig, sent, role)[name].startswith("wrong_seed")
    others = [r for r in ROLES if r != role]
    assert [deposit(rig, sent, r) for r in others] == [{}, {}]


def test_a_seal_for_another_role_or_exchange_does_not_open() -> None:
    rig = Rig()
    sent, (one, two) = rig.submissions(), NAMES[:2]
    old = messages.Envelope.parse(sent[one].envelope.tobytes(), rig.charter.seal_overhead)
    swapped = {**old.seals, "auditor": old.seals["aggregator"]}
    sent[one] = rig.resign(one, sent[one], seals=swapped)
    elsewhere = rig.charter.seal("auditor", bytes(32), b"another context", rig.header.today)
    sent[two] = rig.resign(two, sent[two], seals={**old.seals, "auditor": elsewhere})
    assert {s: why.split(":")[0] for s, why in deposit(rig, sent).items()} == {one: "bad_seal", two: "bad_seal"}


@pytest.mark.parametrize("change", [{"exchange": 1}, {"round": 1, "exchange": 1}, {"run": "another run"}])
def test_a_submission_cannot_be_replayed_into_another_exchange_round_or_run(change: dict[str, Any]) -> None:
    rig = Rig()
    old = rig.submissions()
    rig.next(**change)
    new = rig.submissions()
    assert {s: why.split(":")[0] for s, why in deposit(rig, {**new, NAMES[1]: old[NAMES[1]]}).items()} == {
        NAMES[1]: "bad_signature"
    }


def test_a_site_that_submits_twice_is_left_out_and_others_are_not() -> None:
    rig = Rig()
    sent, again = rig.submissions(), rig.submissions()
    both = (*sent.values(), again[NAMES[4]])
    reply = rig.roles["auditor"].handle(DepositRequest(PLAN, rig.header, both))
    assert dict(reply.refused) == {NAMES[4]: "duplicate: two submissions in one exchange"}  # type: ignore[union-attr]
    assert len(reply.accepted) == 6  # type: ignore[union-attr]


def test_a_stranger_and_a_submission_under_another_name_are_refused() -> None:
    rig = Rig(n=7)
    sent = rig.submissions()
    moved = (*(sent[s] for s in NAMES[:6]), replace(sent[NAMES[6]], site="stranger\ud800"))
    reply = rig.roles["auditor"].handle(DepositRequest(PLAN, rig.header, moved))
    assert list(reply.refused) == ["unknown"]  # type: ignore[union-attr]
    wire.encode(reply)
    rig = Rig(n=7)
    sent = rig.submissions()
    sent[NAMES[6]] = replace(sent[NAMES[5]], site=NAMES[6])
    assert deposit(rig, sent)[NAMES[6]].startswith("bad_signature")


def test_the_notary_refuses_a_masked_update() -> None:
    rig = Rig()
    sent = rig.submissions()
    reply = rig.roles["notary"].handle(DepositRequest(PLAN, rig.header, tuple(sent.values())))
    assert len(reply.refused) == 7  # type: ignore[union-attr]


def test_a_site_that_shows_different_submissions_to_different_roles_is_left_out() -> None:
    rig = Rig()
    sent, again = rig.submissions(), rig.submissions()

    def equivocate(party: str, request: Any) -> Any:
        if isinstance(request, DepositRequest) and party == "auditor":
            return replace(request, submissions=tuple({**sent, NAMES[0]: again[NAMES[0]]}.values()))
        return request

    rig.request = equivocate
    combined = rig.exchange.combine(rig.header, sent)
    assert combined.refused == {NAMES[0]: "roles_disagree: the roles hold different submissions"}
    rig.holds(combined)


# --- phases


def played() -> Rig:
    rig = Rig()
    rig.holds(rig.run())
    return rig


@pytest.mark.parametrize("role", ROLES)
def test_the_same_request_gets_the_very_same_reply_at_any_time(role: str) -> None:
    rig = played()
    for request, reply in zip(rig.log[role], rig.replies[role]):
        assert wire.encode(rig.roles[role].handle(request)) == wire.encode(reply)


@pytest.mark.parametrize("kind", REQUESTS[1:])
def test_another_request_for_an_answered_step_is_refused(kind: type) -> None:
    rig = played()
    request: Any = next(r for r in rig.log["auditor"] if isinstance(r, kind))
    field = {DepositRequest: "submissions", CommitRequest: "deposits", ShareRequest: "commitments", OpenRequest: "shares"}.get(
        kind, "openings"
    )
    other = replace(request, **{field: getattr(request, field)[::-1]})
    expected = "second_opening" if kind in (OpenRequest, ConfirmRequest) else "second_request"
    assert refused(rig, other) == expected
    assert refused(rig, HeaderRequest(PLAN, rig.header, (vote(rig, NAMES[0]),))) == "second_request"


@pytest.mark.parametrize("at", range(1, 6))
def test_a_step_ahead_of_its_turn_is_refused(at: int) -> None:
    rig = played()
    log, fresh = rig.log["auditor"], rig.new_role("auditor")
    for request in log[: at - 1]:
        fresh.handle(request)
    with pytest.raises(ProtocolError) as caught:
        fresh.handle(log[at])
    assert caught.value.reason == ("wrong_exchange" if at == 1 else "wrong_phase")


def test_requests_of_an_exchange_that_is_over_are_refused() -> None:
    rig = played()
    rig.next(round=1)
    rig.submissions()
    assert {refused(rig, r) for r in rig.log["auditor"][1:6]} == {"wrong_exchange"}
    assert refused(rig, rig.log["auditor"][0]) == "replay"


def test_a_message_that_is_none_of_a_roles_is_refused() -> None:
    rig = Rig()
    assert refused(rig, Dropout("x", "late")) == "unknown_request"
    assert refused(rig, HeaderRequest("0" * 64, rig.header)) == "wrong_plan"


def test_a_refused_request_leaves_no_trace() -> None:
    rig = played()
    log = rig.log["auditor"]
    fresh = rig.new_role("auditor")
    for request in log[:2]:
        fresh.handle(request)
    with pytest.raises(ProtocolError, match="wrong_parties"):
        fresh.handle(replace(log[2], deposits=log[2].deposits[:2]))
    assert wire.encode(fresh.handle(log[2])) == wire.encode(rig.replies["auditor"][2])


@pytest.mark.parametrize("role", ROLES)
def test_a_role_started_again_at_any_step_goes_on_as_if_nothing_had_happened(role: str) -> None:
    for step in range(1, 7):
        rig = Rig()
        count = 0

        def restart(party: str, request: Any, rig: Rig = rig, step: int = step) -> Any:
            nonlocal count
            if party == role:
                count += 1
                if count == step:
                    again = rig.restart(role)
                    for before, now in zip(rig.replies[role], again):
                        same_but_seal(before, now)
            return request

        rig.request = restart
        rig.exchange.announce(rig.header)
        rig.holds(rig.run())
        assert count >= step


def same_but_seal(before: Any, now: Any) -> None:
    """Byte-identical; of a deposit all but the randomised seal and the signature over it."""
    if type(before).__name__ == "Deposit":
        before, now = (replace(m, seed=no_bytes(), signature=no_bytes()) for m in (before, now))
    assert wire.encode(before) == wire.encode(now)


def test_memory_and_the_requests_since_the_header_are_enough_to_start_again() -> None:
    rig = Rig()
    rig.run()
    memory = {r: rig.roles[r].memory for r in ROLES}
    for log in rig.log.values():
        log.clear()
    rig.roles = {r: Role(r, rig.keys[r], rig.charter, rig.select, PLAN, memory[r]) for r in ROLES}
    rig.next()
    assert refused(rig, first_header(rig)) == "round_opened"
    rig.next(round=1)
    rig.holds(rig.run())


# --- opening


@pytest.mark.parametrize(
    "weights",
    [(1, 1, 1, 0, 0, 0, 0), (100, 1, 1, 1, 1, 1, 1), (-1, 1, 1, 1, 1, 1, 1), (1,) * 6, (2**15, 1, 1, 1, 1, 1, 1), (1.0,) * 7, (True,) * 7],
)  # fmt: skip
def test_weights_that_would_show_one_update_are_opened_by_nobody(weights: tuple[int, ...]) -> None:
    rig = Rig(select=fixed(weights))
    with pytest.raises(ExchangeFailed, match=r"privacy_floor|bad_weights") as caught:
        rig.run()
    assert (caught.value.role, caught.value.step, caught.value.opened) == ("aggregator", "open", False)
    assert all(not rig.roles[r].memory["run"].rounds for r in ROLES)


def test_a_rule_that_refuses_stops_the_exchange_by_name() -> None:
    def select(gram: Any, base: Any, scores: Any = None) -> Chosen:
        raise PlanRefused("too few updates for this rule")

    with pytest.raises(ExchangeFailed, match="rule_refused"):
        Rig(select=select).run()


def test_a_round_is_opened_once_in_a_run_whatever_the_header_says() -> None:
    rig = played()
    for change in ({}, {"model_sha256": "0" * 64}, {"clip": 9.0}, {"hostile": 0, "minimum": 5}):
        rig.next(**change)
        assert {refused(rig, first_header(rig), r) for r in ROLES} == {"round_opened"}
    rig.next(round=1)
    rig.holds(rig.run())


def test_a_round_that_stopped_before_anything_was_opened_may_be_tried_again() -> None:
    rig = Rig()
    sent = rig.submissions()
    with pytest.raises(ExchangeFailed, match="too_few"):
        rig.exchange.combine(rig.header, {s: sent[s] for s in NAMES[:4]})
    rig.next()
    rig.holds(rig.run())


def test_a_part_given_out_marks_the_round_at_that_role_even_if_nobody_got_the_sum() -> None:
    rig = Rig()
    rig.reply = lambda party, m: Dropout(party, "crashed") if party == "notary" and hasattr(m, "checks") else m
    with pytest.raises(ExchangeFailed) as caught:
        rig.run()
    assert (caught.value.role, caught.value.step, caught.value.opened) == ("notary", "open", True)
    rig.next()
    assert {refused(rig, first_header(rig), r) for r in ROLES} == {"round_opened"}


# --- canaries


def vote(rig: Rig, name: str, header: Header | None = None, **changes: Any) -> Any:
    digest = messages.header_digest(header or rig.header)
    made = AuditVote(name, digest.hex(), True, "", blob(rig.seeds.get(name, bytes(32))))
    made = replace(made, **changes)
    return replace(made, signature=blob(rig.keys[name].sign(messages.signed_bytes(made, digest))))


def canaried(n: int = 7, f: int = 1, real: tuple[str, ...] = ()) -> Rig:
    rig = Rig(n, f, length=256)
    rig.seeds = {s: bytes([i]) * 32 for i, s in enumerate(rig.names) if s not in real}
    honest = rig.vectors()
    rig.run({s: site.canary_words(rig.seeds[s], rig.header) if s in rig.seeds else honest[s] for s in rig.names})
    return rig


def canaries_refused(rig: Rig, votes: list[Any]) -> str:
    return refused(rig, HeaderRequest(PLAN, replace(rig.header, exchange=rig.header.exchange + 1), tuple(votes)))


def test_a_canary_may_be_followed_by_another_exchange_of_its_round_and_a_round_may_not() -> None:
    rig = canaried()
    votes = [vote(rig, s) for s in rig.names]
    old = rig.header
    rig.next()
    consent = rig.exchange.announce(rig.header, votes)
    rig.words = rig.vectors()
    sent = {s: site.submit(rig.header, consent, rig.charter, rig.keys[s], w) for s, w in rig.words.items()}
    rig.holds(rig.exchange.combine(rig.header, sent))
    # The round is closed now: neither the old votes nor forged ones about the new exchange open it again.
    assert canaries_refused(rig, [replace(v) for v in votes]) == "wrong_exchange"
    assert canaries_refused(rig, [vote(rig, s) for s in rig.names]) == "not_a_canary"
    assert old.round == rig.header.round


@pytest.mark.parametrize(("n", "f", "counted", "needed"), [(7, 1, 6, 5), (7, 2, 5, 3), (10, 2, 8, 6)])
def test_all_but_f_of_the_summed_sites_must_show_their_seeds(n: int, f: int, counted: int, needed: int) -> None:
    rig = canaried(n, f)
    memory = rig.roles["auditor"].memory["run"]
    summed = [s for s, w in zip(memory.sites, memory.weights) if w]
    assert len(summed) == counted and needed == max(f + 1, counted - f)
    assert canaries_refused(rig, [vote(rig, s) for s in summed[: needed - 1]]) == "not_a_canary"
    rest = [s for s in rig.names if s not in summed]
    assert canaries_refused(rig, [vote(rig, s) for s in (*rest, *summed[: needed - 1])]) == "not_a_canary"
    rig.next()
    rig.roles["auditor"].handle(HeaderRequest(PLAN, rig.header, tuple(vote(rig, s, _before(rig)) for s in summed[:needed])))


def _before(rig: Rig) -> Header:
    return replace(rig.header, exchange=rig.header.exchange - 1)


def test_hostile_sites_alone_cannot_pass_a_round_off_as_a_canary() -> None:
    rig = canaried(10, 2, real=NAMES[2:10])
    assert canaries_refused(rig, [vote(rig, s) for s in rig.names]) == "not_a_canary"


def test_canary_votes_must_be_signed_and_unique_and_about_that_exchange() -> None:
    rig = canaried()
    votes = [vote(rig, s) for s in rig.names]
    assert canaries_refused(rig, []) == "round_opened"
    assert canaries_refused(rig, [votes[0], *votes]) == "duplicate"
    assert canaries_refused(rig, [replace(v, canary=blob(bytes(32))) for v in votes]) == "bad_signature"
    assert canaries_refused(rig, [vote(rig, s, canary=no_bytes()) for s in rig.names]) == "not_a_canary"
    assert canaries_refused(rig, [vote(rig, s, replace(rig.header, exchange=7)) for s in rig.names]) == "wrong_exchange"
    assert refused(Rig(), HeaderRequest(PLAN, Rig().header, tuple(votes))) == "not_a_canary"


def test_a_site_that_shows_a_wrong_seed_is_not_counted_and_spoils_nobody() -> None:
    rig = canaried()
    memory = rig.roles["auditor"].memory["run"]
    rig.seeds[NAMES[3]] = b"x" * 32
    shown = canary.proven(rig.charter, rig.header, memory.sites, memory.gram, [vote(rig, s) for s in rig.names])
    assert shown == tuple(s for s in rig.names if s != NAMES[3])


def test_a_product_that_two_shown_vectors_contradict_costs_one_of_them_its_say() -> None:
    rig = canaried()
    memory = rig.roles["auditor"].memory["run"]
    gram = [list(row) for row in memory.gram]
    gram[0][1] = gram[1][0] = gram[0][1] + 1
    shown = canary.proven(rig.charter, rig.header, memory.sites, gram, [vote(rig, s) for s in rig.names])
    assert len(shown) == 6 and set(rig.names[2:]) < set(shown)


@pytest.mark.parametrize("bits", [32, 64])
def test_a_canary_vector_is_random_in_direction_and_never_longer_than_the_bound(bits: int) -> None:
    rig = Rig(bits=bits, length=5000)
    made = [rig.ring.lift(canary.canary_words(bytes([i]) * 32, rig.header)).astype(float) / rig.ring.bound for i in range(4)]
    norms = [np.linalg.norm(v) for v in made]
    assert all(0.45 < n <= 0.5 for n in norms)
    assert all(abs(made[i] @ made[j]) < 5 * 0.25 / 5000**0.5 for i in range(4) for j in range(i))
    assert all(abs(v.mean()) < 5 * 0.5 / 5000 for v in made)


def test_members_agree_on_canaries_and_nobody_else_can_foresee_them() -> None:
    rig = Rig()
    headers = [replace(rig.header, exchange=i) for i in range(2000)]
    due = [canary.canary_due(b"secret", h, 0.1) for h in headers]
    assert 130 < sum(due) < 280
    assert (
        due == [canary.canary_due(b"secret", h, 0.1) for h in headers] != [canary.canary_due(b"other", h, 0.1) for h in headers]
    )
    assert not any(canary.canary_due(b"secret", h, 0.0) for h in headers)
    assert all(canary.canary_due(b"secret", h, 1.0) for h in headers)
    with pytest.raises(ProtocolError, match="bad_rate"):
        canary.canary_due(b"secret", rig.header, 1.5)


# --- public maps


@pytest.mark.parametrize(
    "wrong",
    ["missing", "other", "norm", "targets", "columns", "shape"],
)
def test_a_public_map_that_is_not_the_named_one_or_too_large_is_refused(wrong: str) -> None:
    rig = Rig(bits=64)
    good = public_map(rig)
    bad = {
        "norm": replace(good, matrix=blob(np.full((6, 64), 200, "<i4"))),
        "targets": replace(good, targets=blob(np.full(6, 2**30, "<i4"))),
        "columns": public_map(rig, columns=shares.MAP_COLUMNS + 1),
        "shape": replace(good, rows=5),
    }.get(wrong, good)
    rig.next(map_sha256=wire.digest(bad))
    given = {"missing": None, "other": public_map(rig, seed=1)}.get(wrong, bad)
    with pytest.raises(ExchangeFailed, match="wrong_map") as caught:
        rig.run(public_map=given)
    assert (caught.value.step, caught.value.opened) == ("commit", False)


def test_a_map_that_no_header_names_is_refused() -> None:
    rig = Rig(bits=64)
    with pytest.raises(ExchangeFailed, match="wrong_map"):
        rig.run(public_map=public_map(rig))


def test_a_map_at_its_largest_norm_does_not_wrap_the_longest_update() -> None:
    rig = Rig(bits=64, length=8)
    words = rig.ring.zeros(8)
    words[0] = rig.ring.bound
    matrix = np.zeros((1, 8), "<i4")
    matrix[0, 0] = shares.MAP_NORM
    largest = replace(public_map(rig), rows=1, matrix=blob(matrix), targets=blob(np.full(1, shares.TARGET_NORM, "<i4")))
    rig.next(map_sha256=wire.digest(largest))
    combined = rig.run(dict.fromkeys(rig.names, words), largest)
    assert combined.mapped_gram is not None and combined.mapped_gram[0][0] == 2**62
    assert combined.scores is not None and combined.scores[0][0] == 2**51


# --- blame


def test_projections_are_shown_only_where_the_sum_was_found_wrapped() -> None:
    rig = played()
    confirmations = tuple(rig.replies[r][-1] for r in ROLES)
    for role in ROLES:
        assert refused(rig, BlameRequest(PLAN, rig.header, confirmations), role) == "no_cause"


def test_one_lying_role_cannot_have_projections_shown() -> None:
    rig = played()
    binding = messages.confirmation_binding(
        messages.header_digest(rig.header), rig.replies["notary"][4].sites, rig.replies["notary"][4].weights
    )
    for liar in ROLES:
        said = {r: rig.replies[r][-1] for r in ROLES}
        lie = replace(said[liar], trouble="wrapped: so they say")
        said[liar] = replace(lie, signature=blob(rig.keys[liar].sign(messages.signed_bytes(lie, binding))))
        for role in ROLES:
            assert refused(rig, BlameRequest(PLAN, rig.header, tuple(said.values())), role) == "no_cause"


def test_memory_is_plain_and_starts_empty() -> None:
    assert Rig().roles["auditor"].memory == {}
    assert Memory().rounds == ()
