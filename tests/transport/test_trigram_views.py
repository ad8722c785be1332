"""What one role sees can be made from what is opened anyway; what two see together is every update.

The simulator below gets the opened numbers, the weights and public data, and no update. It makes a view for the Aggregator
(for the Auditor) in which all that others sent is random subject to the equations an honest run fulfils; distinguishers
that look at bytes and at all equalities and correlations between parts of the view cannot tell it from the real one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from transport.trigram_rig import NAMES, Rig, leave_out

from fedmat.envelopes import ROLES, Opening, Share
from fedmat.transport.trigram import messages, site
from fedmat.transport.trigram.messages import SEEDS_OF
from fedmat.transport.trigram.ring import Pad, Ring, hashed
from fedmat.transport.trigram.shares import Held, Holdings

N, K = 6, 1 << 14
TAG = {"aggregator": "a", "auditor": "b"}


@dataclass
class View:
    """What a role receives, or works out of it: ring elements, and everything else as bytes."""

    masked: list[Any]
    own_seeds: list[bytes]
    zero_seed: bytes
    others_shares: list[Any]
    own_share: Any
    own_part: Any
    other_part: Any
    digests: list[bytes]
    foreign_commitments: list[bytes]


def padded(ring: Ring, header: bytes, site: str, tag: str, seed: bytes) -> Any:
    return Pad(ring, seed, messages.pad_context(header, site, tag)).take(K)


def holdings(role: str, ring: Ring, header: bytes, masked: list[Any], seeds: list[bytes]) -> Holdings:
    tag = TAG[role]
    held = tuple(Held(s, b"", {tag: seed}, e) for s, seed, e in zip(NAMES[:N], seeds, masked))
    return Holdings(role, ring, header, K, held)  # type: ignore[arg-type]


@cache
def real_run() -> tuple[Rig, Any, dict[Any, Any], dict[Any, Any]]:
    rig = Rig(N, 1, 32, K, leave_out(0))
    combined = rig.run({s: rig.ring.words(np.full(K, 40 + i)) for i, s in enumerate(rig.names)})  # as far from random as can be
    shares = {r: next(m for m in rig.replies[r] if isinstance(m, Share)) for r in ROLES}
    openings = {r: next(m for m in rig.replies[r] if isinstance(m, Opening)) for r in ROLES}
    return rig, combined, shares, openings


def seeds_of(rig: Rig, role: str, tag: str) -> list[bytes]:
    return [rig.roles[role]._now.held[s].seeds[tag] for s in rig.names]  # type: ignore[union-attr]


def real_view(role: str) -> View:
    rig, _, shares, openings = real_run()
    now = rig.roles[role]._now
    assert now is not None
    digest, other = now.digest, "auditor" if role == "aggregator" else "aggregator"
    deposits = {r: rig.replies[r][1] for r in ROLES}
    partner = messages.previous_role(role)  # type: ignore[arg-type]
    zero = rig.keys[role].unseal(deposits[partner].seed.tobytes(), messages.seal_context(digest, partner, role))
    envelopes = [s.envelope.tobytes() for s in rig.log[role][1].submissions]
    parsed = [messages.Envelope.parse(e, rig.charter.seal_overhead) for e in envelopes]
    foreign = "b" if role == "aggregator" else "a"
    return View(
        masked=[now.held[s].masked for s in rig.names],
        own_seeds=seeds_of(rig, role, TAG[role]),
        zero_seed=zero,
        others_shares=[shares[r].gram.view("<u4") for r in ROLES if r != role],
        own_share=shares[role].gram.view("<u4"),
        own_part=openings[role].part.view("<u4"),
        other_part=openings[other].part.view("<u4"),
        digests=[openings["notary"].checks.tobytes()[:32], openings["notary"].checks.tobytes()[32:]],
        foreign_commitments=[p.commitments[foreign] for p in parsed],
    )


def simulated_view(role: str, seed: int) -> View:
    """Makes a view from G, S, weights and public data alone."""
    rig, combined, _, _ = real_run()  # of the run, only what follows:
    gram, weights, header = combined.gram, combined.weights, messages.header_digest(rig.header)
    total = np.frombuffer(combined.total, "<u4")
    rng, ring = np.random.default_rng(seed), Ring(32)

    def draw(count: int) -> Any:
        return rng.integers(0, 1 << 32, count, dtype=np.uint64).astype("<u4")

    masked, seeds = [draw(K) for _ in range(N)], [rng.bytes(32) for _ in range(N)]
    mine = holdings(role, ring, header, masked, seeds)
    given, got, held = rng.bytes(32), rng.bytes(32), rng.bytes(32)
    mask = Pad(ring, given, held).take(N * N) - Pad(ring, got, held).take(N * N)
    own = mine.gram().reshape(-1) + mask
    one = draw(N * N)
    other = ring.words(np.array(gram).reshape(-1)) - own - one  # shares are random but for their sum
    sums = mine.sums(dict(zip(NAMES, weights)))
    part = sums["e"] + sums["a"] if role == "aggregator" else sums["b"]
    rest = total - part
    # Aggregator: the other part is the sum of b pads. Auditor: it holds the masked sum, and the rest of it are the a pads.
    pads = (sums["a"], rest) if role == "aggregator" else (rest - sums["e"], sums["b"])
    return View(
        masked,
        seeds,
        got,
        [one, other],
        own,
        part,
        rest,
        [messages.sha256(p.view(np.uint8)) for p in pads],
        [rng.bytes(32) for _ in range(N)],
    )


def numbers(view: View) -> list[Any]:
    """Long vectors that ought to look random by themselves, then short ones."""
    return [*view.masked, view.own_part, view.other_part, *view.others_shares, view.own_share]


def chi_square(data: bytes) -> float:
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    expected = counts.sum() / 256
    return float((((counts - expected) ** 2 / expected).sum() - 255) / np.sqrt(2 * 255))  # about standard normal


def constraints(view: View, role: str) -> dict[str, bool]:
    """Every equation that ties parts of a view together."""
    rig, combined, _, _ = real_run()
    ring, header = Ring(32), messages.header_digest(rig.header)
    mine = holdings(role, ring, header, view.masked, view.own_seeds)
    sums = mine.sums(dict(zip(NAMES, combined.weights)))
    gram = ring.lift(view.own_share + view.others_shares[0] + view.others_shares[1])
    if role == "aggregator":
        pads = (sums["a"], view.other_part)
    else:
        pads = (view.other_part - sums["e"], sums["b"])
    return {
        "shares add up to the Gram matrix": (gram.reshape(N, N) == np.array(combined.gram)).all(),
        "parts add up to the sum": (view.own_part + view.other_part).tobytes() == combined.total,
        "the notary's digests fit": view.digests == [messages.sha256(p.view(np.uint8)) for p in pads],
        "no two masked updates share a number in place": all(
            (view.masked[i] == view.masked[j]).sum() < 4 for i in range(N) for j in range(i)
        ),
        "no share equals another": len({s.tobytes() for s in (*view.others_shares, view.own_share)}) == 3,
        "a share is symmetric": (view.others_shares[0].reshape(N, N) == view.others_shares[0].reshape(N, N).T).all(),
        "seeds are different": len({*view.own_seeds, view.zero_seed}) == N + 1,
        "commitments are different": len(set(view.foreign_commitments)) == N,
    }


@pytest.mark.parametrize("role", ["aggregator", "auditor"])
def test_a_role_sees_nothing_that_the_opened_numbers_do_not_imply(role: str) -> None:
    real, made = real_view(role), simulated_view(role, 1)
    expected = dict.fromkeys(constraints(made, role), True) | {"a share is symmetric": False}
    assert constraints(real, role) == constraints(made, role) == expected
    for view in (real, made):
        long = numbers(view)[: N + 2]
        assert all(abs(chi_square(v.tobytes())) < 5 for v in long)
        assert all(abs(chi_square((v[1:] - v[:-1]).tobytes())) < 5 for v in long)
        scaled = [v.astype(float) / 2**32 - 0.5 for v in view.masked]
        assert all(abs(a @ b) * 12 / K**0.5 < 5 for i, a in enumerate(scaled) for b in scaled[:i])
        # Own pads taken off, the other's remain: as random as before.
        tag = TAG[role]
        digest = messages.header_digest(real_run()[0].header)
        bare = [e + padded(Ring(32), digest, s, tag, k) for e, s, k in zip(view.masked, NAMES, view.own_seeds)]
        assert all(abs(chi_square(v.tobytes())) < 5 for v in bare)


def test_these_distinguishers_would_see_a_view_that_depends_on_updates() -> None:
    rig = real_run()[0]
    assert abs(chi_square(rig.words[NAMES[0]].tobytes())) > 5
    both = real_view("aggregator")
    b = [padded(Ring(32), messages.header_digest(rig.header), s, "b", k) for s, k in zip(NAMES, seeds_of(rig, "auditor", "b"))]
    assert abs(chi_square((both.masked[0] + b[0]).tobytes())) < 5  # a is still missing
    a = [padded(Ring(32), messages.header_digest(rig.header), s, "a", k) for s, k in zip(NAMES, both.own_seeds)]
    assert abs(chi_square((both.masked[0] + a[0] + b[0]).tobytes())) > 5


def test_shares_of_many_exchanges_are_random_one_by_one_and_in_pairs_and_only_three_add_up() -> None:
    rig = Rig(6, 1, 32, 8, leave_out(0))
    words = {s: rig.ring.words(np.full(8, 3)) for s in rig.names}
    seen: dict[str, list[Any]] = {r: [] for r in ROLES}
    for i in range(60):
        rig.next(round=i)
        rig.run(words)
        for r in ROLES:
            share = [m for m in rig.replies[r] if isinstance(m, Share)][-1]
            seen[r].append(share.gram.view("<u4").copy())
    stacked = {r: np.concatenate(v) for r, v in seen.items()}
    for i, one in enumerate(ROLES):
        assert abs(chi_square(stacked[one].tobytes())) < 5
        for other in ROLES[:i]:
            assert abs(chi_square((stacked[one] + stacked[other]).tobytes())) < 5
            assert abs(chi_square((stacked[one] - stacked[other]).tobytes())) < 5
    assert (np.sum(list(stacked.values()), axis=0, dtype=np.uint32) == 72).all()


def test_the_notary_receives_nothing_that_is_as_long_as_an_update_and_nothing_that_depends_on_one() -> None:
    rig = Rig(length=5000)
    words = rig.vectors()
    assert rig.run(words) is not None
    deposit = rig.log["notary"][1]
    assert all(s.masked.nbytes == 0 and s.envelope.nbytes == 433 for s in deposit.submissions)
    assert all(o.part.nbytes == 32 for o in rig.log["notary"][5].openings)


def test_the_same_update_twice_is_masked_by_pads_that_have_nothing_in_common() -> None:
    rig = Rig(length=4096)
    zeros = dict.fromkeys(rig.names, rig.ring.zeros(4096))
    first, again = rig.submissions(zeros), rig.submissions(zeros)
    rig.next()
    later = rig.submissions(zeros)
    made = [m[s].masked.view("<u4") for m in (first, again, later) for s in rig.names]
    assert all((a == b).sum() < 4 for i, a in enumerate(made) for b in made[:i])
    assert all((a == -b).sum() < 4 for i, a in enumerate(made) for b in made[:i])


@pytest.mark.parametrize("pair", [("aggregator", "auditor"), ("aggregator", "notary"), ("auditor", "notary")])
def test_any_two_roles_together_read_every_update(pair: tuple[str, str]) -> None:
    """Documents the break: the three roles must not work together, two are enough."""
    rig, digest = real_run()[0], messages.header_digest(real_run()[0].header)
    for name in rig.names:
        seeds: dict[str, bytes] = {}
        for role in pair:
            seeds |= {t: rig.roles[role]._now.held[name].seeds[t] for t in SEEDS_OF[role]}  # type: ignore[index, union-attr]
        masked = next(rig.roles[r]._now.held[name].masked for r in pair if r != "notary")  # type: ignore[union-attr]
        read = masked + sum(padded(rig.ring, digest, name, tag, seed) for tag, seed in seeds.items())
        assert np.array_equal(read, rig.words[name])


def test_the_courier_and_the_notary_together_read_every_update() -> None:
    """Documents the break: whoever runs the coordinator must not run the Notary."""
    rig, digest = Rig(), b""
    sent = rig.submissions()
    rig.exchange.combine(rig.header, sent)
    digest = messages.header_digest(rig.header)
    for name in rig.names:
        seeds = rig.roles["notary"]._now.held[name].seeds  # type: ignore[union-attr]
        pads = [Pad(rig.ring, s, messages.pad_context(digest, name, t)).take(rig.header.length) for t, s in seeds.items()]
        assert np.array_equal(sent[name].masked.view("<u4") + pads[0] + pads[1], rig.words[name])


@pytest.mark.parametrize("change", [{"exchange": 1}, {"round": 1}, {"run": "other"}, {"model_sha256": "0" * 64}])
def test_the_same_seeds_in_another_exchange_make_other_pads(change: dict[str, Any]) -> None:
    rig = Rig(length=4096)
    zeros = rig.ring.zeros(4096)
    made = []
    for header in (rig.header, replace(rig.header, **{"exchange": 9, **change})):
        rig.header = header
        consent = rig.exchange.announce(header)
        names = rig.names[:2]
        made += [site.submit(header, consent, rig.charter, rig.keys[s], zeros, bytes).masked.view("<u4") for s in names]
    assert all((a == b).sum() < 4 for i, a in enumerate(made) for b in made[:i])
    assert made[0].any()


def test_a_commitment_does_not_tell_its_share() -> None:
    assert hashed("x", b"a") != hashed("x", b"b")
    rig = Rig(6, 1, 32, 8, leave_out(0))
    rig.run()
    commitment, share = rig.replies["notary"][2], rig.replies["notary"][3]
    held = rig.roles["notary"]._now.held_digest  # type: ignore[union-attr]
    assert commitment.digest.tobytes() == messages.signed_bytes(share, held)
    assert share.nonce.nbytes == 32 and share.nonce.tobytes() != share.coin.tobytes()
