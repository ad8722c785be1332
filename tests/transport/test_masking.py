"""Laws of sums under pairwise masks: exact whoever drops out when, nothing below the threshold, no rule broken twice."""

from __future__ import annotations

import dataclasses
from datetime import date
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat import wire
from fedmat.envelopes import ArrivedSignature, Header, Masked, MaskKeys, MaskShares, Unmasked
from fedmat.errors import ProtocolError, StateError
from fedmat.keys import Charter, PartyKeys, charter
from fedmat.transport import masking
from fedmat.transport.masking import MaskingServer, MaskingSite, SiteState
from fedmat.transport.shamir import PRIME, SHARE_BYTES, recover, split
from fedmat.transport.trigram.ring import BLOCK, Ring, blob

NAMES = ("ash", "birch", "cedar", "elm", "fir", "hazel", "larch")
END = date(2030, 1, 1)
T = 5  # of seven, one of them hostile: 2 * 5 > 7 + 1


def parties(names: tuple[str, ...] = NAMES, kem: Any = "x25519") -> tuple[dict[str, PartyKeys], Charter]:
    keys = {name: PartyKeys.new(name, kem) for name in names}
    return keys, charter("trees", kem, [k.public("site", f"{n} ltd", END) for n, k in keys.items()])


KEYS, CHARTER = parties()


def header(**changes: Any) -> Header:
    values: dict[str, Any] = {
        "plan_sha256": "p", "run": "r", "round": 0, "exchange": 0, "model_sha256": "m", "charter_sha256": CHARTER.sha256,
        "length": 6, "bits": 32, "hostile": 1, "minimum": 4, "clip": 1.0, "weights": {n: i + 1 for i, n in enumerate(NAMES)},
        "map_sha256": "", "today": "2027-01-01",
    }  # fmt: skip
    return Header(**{**values, **changes})


def kind(h: Header) -> Any:
    return np.uint32 if h.bits == 32 else np.uint64


def words(h: Header, seed: int) -> Any:
    """An update in the ring, its largest elements at the ring's bound."""
    bound = Ring(h.bits).bound
    rng = np.random.default_rng(seed)
    signed = rng.integers(-bound, bound + 1, h.length)
    signed[0] = bound if seed % 2 else -bound
    return signed.astype(np.int64).astype(np.int32 if h.bits == 32 else np.int64).view(kind(h))


class Play:
    """All parties of an exchange in one place; a message can be lost, changed or repeated between any two steps."""

    def __init__(self, h: Header, threshold: int = T, keys: Any = KEYS, book: Charter = CHARTER) -> None:
        self.h, self.server = h, MaskingServer(book, threshold)
        self.sites = {n: MaskingSite(n, keys[n], book, threshold) for n in h.weights}
        self.words = {n: words(h, i) for i, n in enumerate(sorted(h.weights))}
        self._book, self._threshold, self._private = book, threshold, keys

    def restart(self, name: str) -> None:
        """The site crashes, and comes back from what it had on disk."""
        self.sites[name] = MaskingSite.restore(self.sites[name].export(), self._private[name], self._book, self._threshold)

    def keys(self, lost: Any = ()) -> tuple[MaskKeys, ...]:
        self.all_keys = self.server.check_keys(self.h, [s.keys_for(self.h) for n, s in self.sites.items() if n not in lost])
        return self.all_keys

    def shares(self, lost: Any = ()) -> Any:
        there = [k.site for k in self.all_keys]
        self.routed = self.server.route([self.sites[n].shares_for(self.h, self.all_keys) for n in there if n not in lost])
        return self.routed

    def mask(self, lost: Any = ()) -> list[Masked]:
        self.masked = [self.sites[n].mask(self.h, self.routed[n], self.words[n]) for n in self.routed]
        for message in self.masked:
            if message.site not in lost:
                self.server.accept(message)
        self.arrived, self.dropped = self.server.need()
        return self.masked

    def confirm(self, lost: Any = ()) -> dict[str, Any]:
        said = [self.sites[n].confirm(self.h, self.arrived, self.dropped) for n in self.arrived if n not in lost]
        self.signatures = self.server.consistent(said)
        return self.signatures

    def unmask(self, lost: Any = ()) -> list[Unmasked]:
        return [
            self.sites[n].unmask(self.h, self.arrived, self.dropped, self.signatures) for n in self.arrived if n not in lost
        ]

    def to_shares(self) -> Play:
        self.keys()
        self.shares()
        return self

    def to_masks(self, lost: Any = ()) -> Play:
        self.to_shares().mask(lost)
        return self

    def to_signatures(self, lost: Any = ()) -> Play:
        self.to_masks(lost).confirm()
        return self

    def expected(self) -> Any:
        out = np.zeros(self.h.length, dtype=object)
        for n in self.arrived:
            signed = self.words[n].view(np.int32 if self.h.bits == 32 else np.int64).astype(object)
            out = out + self.h.weights[n] * signed
        return out


def lifted(total: Any) -> list[int]:
    return [int(v) for v in total.view(f"i{total.dtype.itemsize}")]


def refuses(reason: str) -> Any:
    return pytest.raises(ProtocolError, match=rf"^{reason}: ")


# --- the sum -----------------------------------------------------------------------------------------------------------


def test_five_sites_of_one_number_each_give_its_sum() -> None:
    keys, book = parties(NAMES[:5])
    h = header(charter_sha256=book.sha256, length=1, hostile=0, minimum=3, weights=dict.fromkeys(NAMES[:5], 1))
    play = Play(h, 3, keys, book)
    play.words = {n: np.array([i + 1], dtype=np.uint32) for i, n in enumerate(NAMES[:5])}
    play.to_signatures()
    assert list(play.server.total(play.unmask())) == [1 + 2 + 3 + 4 + 5]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([32, 64]), st.integers(1, 70), st.sets(st.integers(0, 6), max_size=2),
    st.lists(st.sampled_from(["keys", "shares", "mask", "confirm", "unmask"]), min_size=7, max_size=7), st.booleans(),
)  # fmt: skip
def test_the_sum_is_exact_whoever_drops_out_at_whatever_step(bits, length, gone, steps, crash) -> None:  # type: ignore[no-untyped-def]
    play = Play(header(bits=bits, length=length))

    def lost(step: str) -> set[str]:
        if crash:  # every site is started again between every two messages
            for name in NAMES:
                play.restart(name)
        return {NAMES[i] for i in gone if steps[i] == step}

    play.keys(lost("keys"))
    play.shares(lost("shares"))
    play.mask(lost("mask"))
    play.confirm(lost("confirm"))
    total = play.server.total(play.unmask(lost("unmask")))
    assert total.dtype == kind(play.h) and lifted(total) == list(play.expected())
    early = {NAMES[i] for i in gone if steps[i] in ("keys", "shares", "mask")}
    assert set(play.arrived) == set(NAMES) - early


def test_blocks_of_a_long_update_join_without_a_seam() -> None:
    play = Play(header(length=2 * BLOCK + 23)).to_signatures(lost={"elm"})
    assert lifted(play.server.total(play.unmask())) == list(play.expected())


def test_the_largest_weights_and_elements_stay_in_the_ring() -> None:
    weights = dict.fromkeys(NAMES, (2**16 - 1) // 7)
    play = Play(header(weights=weights))
    play.words = {n: np.full(6, 2**15, dtype=np.uint32) for n in NAMES}
    play.to_signatures()
    assert lifted(play.server.total(play.unmask())) == [sum(weights.values()) * 2**15] * 6
    with refuses("bad_weights"):
        Play(header(weights=weights | {"ash": weights["ash"] + 3})).keys()


@pytest.mark.parametrize("step", ["keys", "shares", "mask", "confirm", "unmask"])
def test_one_site_too_few_at_any_step_opens_nothing(step: str) -> None:
    play, gone = Play(header()), set(NAMES[:3])
    with refuses("too_few"):
        for name in ("keys", "shares", "mask", "confirm"):
            getattr(play, name)(gone if name == step else ())
        play.server.total(play.unmask(gone))


def test_fewer_than_the_header_wants_are_too_few() -> None:
    play = Play(header(minimum=6)).to_shares()
    with refuses("too_few"):
        play.mask(lost={"ash", "elm"})


# --- what a masked update shows --------------------------------------------------------------------------------------------


def test_masked_words_look_uniform_and_two_of_them_have_nothing_in_common() -> None:
    h = header(length=40_000)
    play = Play(h)
    play.words = dict.fromkeys(NAMES, np.zeros(h.length, dtype=np.uint32))
    masked = [m.values for m in play.to_masks().masked]
    for values in masked:
        seen = np.bincount(values, minlength=256)
        expected = values.size / 256
        chi = float(((seen - expected) ** 2 / expected).sum())
        assert abs(chi - 255) < 6 * (2 * 255) ** 0.5
    bits = [np.unpackbits(v) for v in masked]
    for i, a in enumerate(bits):
        for b in bits[:i]:
            assert abs(float(np.mean(a == b)) - 0.5) < 0.004  # 9 standard deviations


def test_all_masked_words_and_all_but_the_last_needed_share_still_hide_the_sum() -> None:
    play = Play(header()).to_signatures(lost={"fir"})
    shares = play.unmask()[: T - 1]
    with refuses("too_few"):
        play.server.total(shares)
    naked = np.zeros(6, dtype=np.uint32)
    for message in play.masked:
        if message.site != "fir":
            naked += message.values.view(np.uint32)
    assert lifted(naked) != list(play.expected())


def test_every_exchange_has_new_masks() -> None:
    play = Play(header())
    first = play.to_masks().masked
    play.h = header(exchange=1)
    second = play.to_masks().masked
    assert all((a.values != b.values).any() for a, b in zip(first, second, strict=True))


# --- shares of a secret ------------------------------------------------------------------------------------------------------


def test_the_field_is_a_field_above_every_secret() -> None:
    p = PRIME
    assert p > 2**256 - 1 and p.bit_length() <= 8 * SHARE_BYTES
    odd, twos = p - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41):  # Miller and Rabin
        x = pow(base, odd, p)
        assert x == 1 or any(pow(x, 2**i, p) == p - 1 for i in range(twos))


@settings(deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(2, 12), st.data())
def test_any_threshold_of_shares_gives_the_secret_and_one_fewer_gives_another(
    secret: bytes, n: int, data: st.DataObject
) -> None:
    t = data.draw(st.integers(2, n))
    shares = split(secret, t, n, data.draw(st.binary(min_size=32, max_size=32)))
    chosen = data.draw(st.permutations(range(1, n + 1)))
    assert all(len(s) == SHARE_BYTES for s in shares)
    assert recover({x: shares[x - 1] for x in chosen[:t]}) == secret
    try:
        fewer = recover({x: shares[x - 1] for x in chosen[: t - 1]})
    except ProtocolError:
        fewer = b""
    assert fewer != secret


def test_one_share_too_few_is_compatible_with_every_secret() -> None:
    shares = split(bytes(32), 3, 5, b"r" * 32)
    for wanted in (0, 1, 2**256 - 1):  # a third share exists that makes the secret `wanted`
        at = {1: int.from_bytes(shares[0], "big"), 2: int.from_bytes(shares[1], "big")}
        p = PRIME
        # Lagrange at 0 over 1, 2, 3: secret = 3 y1 - 3 y2 + y3
        third = (wanted - 3 * at[1] + 3 * at[2]) % p
        assert recover({1: shares[0], 2: shares[1], 3: third.to_bytes(33, "big")}) == wanted.to_bytes(32, "big")


@pytest.mark.parametrize("wrong", [b"", bytes(32), bytes(34), b"\xff" * 33, PRIME.to_bytes(33, "big")])
def test_what_is_no_share_is_refused(wrong: bytes) -> None:
    with refuses("bad_share"):
        recover({1: wrong})


@pytest.mark.parametrize(("secret", "t", "n", "entropy"), [(31, 2, 3, 32), (32, 4, 3, 32), (32, 0, 3, 32), (32, 2, 3, 16)])
def test_wrong_sizes_of_secrets_are_refused(secret: int, t: int, n: int, entropy: int) -> None:
    with pytest.raises(ValueError, match="threshold"):
        split(bytes(secret), t, n, bytes(entropy))


# --- headers and thresholds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "changes", "threshold"),
    [
        ("wrong_charter", {"charter_sha256": "x"}, T),
        ("unknown_member", {"weights": dict.fromkeys((*NAMES, "oak"), 1)}, T),
        ("too_few", {"weights": dict.fromkeys(NAMES[:4], 1), "hostile": 0}, 3),
        ("bad_threshold", {"hostile": 0}, 3),
        ("bad_threshold", {"hostile": 3}, T),
        ("bad_threshold", {}, 8),
        ("lone_site", {"hostile": 6, "minimum": 7}, 7),
        ("bad_weights", {"weights": dict.fromkeys(NAMES, 0)}, T),
        ("bad_weights", {"weights": dict.fromkeys(NAMES, 2**40)}, T),
        ("bad_weights", {"weights": dict.fromkeys(NAMES, 1) | {"ash": 9}}, T),
        ("bad_header", {"bits": 16}, T),
        ("bad_header", {"length": 0}, T),
        ("bad_header", {"clip": float("nan")}, T),
        ("bad_header", {"minimum": 8}, T),
        ("bad_header", {"minimum": 1}, T),
        ("bad_header", {"exchange": -1}, T),
        ("bad_header", {"today": ""}, T),
        ("bad_header", {"today": "1.1.2027"}, T),
        ("bad_header", {"run": ""}, T),
    ],
)  # fmt: skip
def test_a_header_that_would_not_protect_is_refused_on_both_sides(reason: str, changes: Any, threshold: int) -> None:
    h = header(**changes)
    with refuses(reason):
        MaskingSite("ash", KEYS["ash"], CHARTER, threshold).keys_for(h)
    with refuses(reason):
        MaskingServer(CHARTER, threshold).check_keys(h, [])


def test_a_charter_that_asks_for_more_than_masks_can_give_is_refused() -> None:
    keys, book = parties(kem="mlkem768-x25519")
    with refuses("weaker_than_charter"):
        MaskingSite("ash", keys["ash"], book, T).keys_for(header(charter_sha256=book.sha256))


def test_a_site_that_has_no_weight_takes_no_part() -> None:
    with refuses("not_invited"):
        MaskingSite("ash", KEYS["ash"], CHARTER, T).keys_for(header(weights=dict.fromkeys(NAMES[1:], 1)))


def test_expired_keys_do_not_count() -> None:
    play = Play(header(today="2031-01-01"))
    with refuses("too_few"):
        play.keys()
    assert set(play.server.refused) == set(NAMES)
    assert all(r.startswith("expired_key") for r in play.server.refused.values())


# --- a coordinator that lies -----------------------------------------------------------------------------------------------------


def test_keys_that_the_coordinator_made_itself_are_refused() -> None:
    play = Play(header())
    good = play.keys()
    fake = MaskingSite("elm", PartyKeys.new("elm"), CHARTER, T).keys_for(play.h)  # the man in the middle
    with refuses("bad_signature"):
        play.sites["ash"].shares_for(play.h, [k for k in good if k.site != "elm"] + [fake])


@pytest.mark.parametrize("field", ["cipher", "mask", "commitment"])
def test_no_part_of_a_key_message_can_be_exchanged(field: str) -> None:
    play = Play(header())
    good = play.keys()
    fake = dataclasses.replace(good[1], **{field: getattr(good[2], field)})
    with refuses("bad_signature"):
        play.sites["ash"].shares_for(play.h, [good[0], fake, *good[2:]])


def test_lists_of_keys_that_are_short_double_foreign_or_without_ones_own_are_refused() -> None:
    play = Play(header())
    good = play.keys()
    ash = play.sites["ash"]
    with refuses("too_few"):
        ash.shares_for(play.h, good[: T - 1])
    with refuses("duplicate"):
        ash.shares_for(play.h, [*good, good[3]])
    with refuses("own_keys"):
        ash.shares_for(play.h, good[1:])
    other = MaskingSite("ash", KEYS["ash"], CHARTER, T).keys_for(play.h)  # its own key, of a life it forgot
    with refuses("own_keys"):
        ash.shares_for(play.h, [other, *good[1:]])
    old = Play(header(exchange=1)).keys()
    with refuses("bad_signature"):
        ash.shares_for(play.h, [good[0], *old[1:]])


def test_a_second_list_of_keys_in_one_exchange_is_refused() -> None:
    play = Play(header())
    good = play.keys()
    first = play.sites["ash"].shares_for(play.h, good)
    assert wire.encode(play.sites["ash"].shares_for(play.h, good)) == wire.encode(first)
    with refuses("second_keys"):
        play.sites["ash"].shares_for(play.h, good[:-1])


def test_a_key_of_small_order_is_refused() -> None:
    play = Play(header())
    good = list(play.keys())
    digest = masking.check_header(play.h, CHARTER)
    zero, elm = bytes(32), good[3]
    text = masking._keys_text(digest, "elm", zero, zero, elm.commitment.tobytes())
    good[3] = MaskKeys("elm", blob(zero), blob(zero), elm.commitment, blob(KEYS["elm"].sign(text)))
    with refuses("bad_key"):
        play.sites["ash"].shares_for(play.h, good)


def test_nobody_gets_both_secrets_of_a_site() -> None:
    play = Play(header()).to_masks(lost={"fir"})
    ash = play.sites["ash"]
    for arrived, dropped in [(NAMES, ("fir",)), (NAMES, NAMES[1:]), (play.arrived, ("elm", "fir"))]:
        with refuses("bad_sets"):
            ash.confirm(play.h, arrived, dropped)
        with refuses("bad_sets"):
            ash.unmask(play.h, arrived, dropped, {})


def test_a_second_set_of_arrivals_is_refused_after_signing_and_after_unmasking() -> None:
    play = Play(header()).to_signatures(lost={"fir"})
    ash = play.sites["ash"]
    others = (tuple(n for n in NAMES if n not in ("fir", "elm")), ("elm", "fir"))
    with refuses("second_unmask"):
        ash.confirm(play.h, *others)
    with refuses("second_unmask"):
        ash.unmask(play.h, *others, play.signatures)
    first = ash.unmask(play.h, play.arrived, play.dropped, play.signatures)
    play.restart("ash")
    again = play.sites["ash"]
    assert wire.encode(again.unmask(play.h, play.arrived, play.dropped, play.signatures)) == wire.encode(first)
    with refuses("second_unmask"):
        again.unmask(play.h, *others, play.signatures)


def test_a_coordinator_that_tells_two_groups_of_sites_different_arrivals_gets_no_shares() -> None:
    play = Play(header()).to_masks()
    told = {n: (NAMES, ()) if i < 4 else (NAMES[1:], ("ash",)) for i, n in enumerate(NAMES)}
    signed = {n: play.sites[n].confirm(play.h, *told[n]).signature for n in NAMES}
    for n in NAMES:
        same = {m: signed[m] for m in NAMES if told[m] == told[n]}
        with refuses("inconsistent"):
            play.sites[n].unmask(play.h, *told[n], same)
        with refuses("bad_signature|unknown_member"):
            play.sites[n].unmask(play.h, *told[n], signed)


def test_signatures_of_sites_that_did_not_arrive_do_not_count() -> None:
    play = Play(header()).to_masks(lost={"fir"})
    fir = play.sites["fir"]
    with refuses("not_arrived"):
        fir.confirm(play.h, play.arrived, play.dropped)
    play.confirm()
    with refuses("unknown_member"):
        play.sites["ash"].unmask(play.h, play.arrived, play.dropped, play.signatures | {"fir": play.signatures["ash"]})


@pytest.mark.parametrize("sets", [(NAMES[::-1], ()), (NAMES[:5], ()), ((*NAMES, "oak"), ()), ((*NAMES, "ash"), ())])
def test_sets_that_are_not_all_who_gave_shares_are_refused(sets: Any) -> None:
    play = Play(header()).to_masks()
    with refuses("bad_sets"):
        play.sites["ash"].confirm(play.h, *sets)


def test_too_few_arrivals_are_refused_by_the_sites_too() -> None:
    play = Play(header()).to_masks()
    with refuses("too_few"):
        play.sites["ash"].confirm(play.h, NAMES[:4], NAMES[4:])


def test_one_mask_never_lies_over_two_updates() -> None:
    play = Play(header()).to_shares()
    ash = play.sites["ash"]
    first = ash.mask(play.h, play.routed["ash"], play.words["ash"])
    assert wire.encode(ash.mask(play.h, play.routed["ash"], play.words["ash"])) == wire.encode(first)
    with refuses("second_update"):
        ash.mask(play.h, play.routed["ash"], play.words["elm"])
    with refuses("second_shares"):
        ash.mask(play.h, dict(list(play.routed["ash"].items())[:-1]), play.words["ash"])


def test_a_round_whose_sum_may_be_open_is_not_tried_again_and_no_exchange_comes_twice() -> None:
    play = Play(header()).to_signatures()
    play.unmask()
    ash = play.sites["ash"]
    for h, reason in ((header(exchange=1), "second_opening"), (header(model_sha256="n"), "replay")):
        with refuses(reason):
            ash.keys_for(h)
    ash.keys_for(header(round=1, exchange=1))
    with refuses("replay"):
        ash.keys_for(header())
    with refuses("out_of_order"):
        ash.confirm(header(), NAMES, ())
    ash.close()
    play.restart("ash")
    with refuses("replay"):
        play.sites["ash"].keys_for(header(round=1, exchange=1))
    play.sites["ash"].keys_for(header(run="another"))


def test_an_exchange_that_opened_nothing_can_be_followed_by_another_of_the_same_round() -> None:
    play = Play(header()).to_masks()
    play.h = header(exchange=1)
    play.to_signatures(lost={"ash"})
    assert lifted(play.server.total(play.unmask())) == list(play.expected())


def test_steps_out_of_order_are_refused() -> None:
    play = Play(header())
    ash = play.sites["ash"]
    with refuses("out_of_order"):
        ash.shares_for(play.h, [])
    with refuses("out_of_order"):
        play.server.route([])
    good = play.keys()
    with refuses("out_of_order"):
        ash.mask(play.h, {}, play.words["ash"])
    with refuses("out_of_order"):
        ash.confirm(play.h, NAMES, ())
    with refuses("out_of_order"):
        ash.shares_for(header(exchange=5), good)
    with refuses("out_of_order"):
        play.server.need()
    play.shares()
    with refuses("out_of_order"):
        play.server.consistent([])
    with refuses("out_of_order"):
        play.server.total([])


# --- sites that lie or err -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "wrong"),
    [
        ("wrong_ring", np.zeros(6, dtype=np.uint64)),
        ("wrong_ring", np.zeros(6, dtype=np.int32)),
        ("wrong_ring", np.zeros(6)),
        ("wrong_length", np.zeros(7, dtype=np.uint32)),
        ("wrong_length", np.zeros((6, 1), dtype=np.uint32)),
        ("out_of_range", np.full(6, 2**15 + 1, dtype=np.uint32)),
        ("out_of_range", np.full(6, 2**31, dtype=np.uint32)),
        ("out_of_range", np.full(6, 2**32 - 2**15 - 1, dtype=np.uint32)),
    ],
)
def test_words_that_are_not_an_update_of_this_header_are_refused(reason: str, wrong: Any) -> None:
    play = Play(header()).to_shares()
    with refuses(reason):
        play.sites["ash"].mask(play.h, play.routed["ash"], wrong)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_sealed_share_that_was_touched_does_not_open(data: st.DataObject) -> None:
    play = SEALED
    good = play.routed["ash"]["elm"]
    size = data.draw(st.sampled_from([0, 1, 81, 83, 82, 82, 82]))
    wrong = np.resize(good, size).copy()
    if size == 82:
        wrong[data.draw(st.integers(0, 81))] ^= data.draw(st.integers(1, 255))
    with refuses("wrong_length" if size != 82 else "bad_seal"):
        play.sites["ash"].mask(play.h, play.routed["ash"] | {"elm": wrong}, play.words["ash"])


SEALED = Play(header()).to_shares()


def test_a_share_meant_for_another_site_of_another_site_or_of_another_exchange_does_not_open() -> None:
    play, other = SEALED, Play(header(exchange=9)).to_shares()
    ash, mine = play.sites["ash"], play.routed["ash"]
    for wrong in (play.routed["fir"]["elm"], mine["fir"], play.routed["elm"]["ash"], other.routed["ash"]["elm"]):
        with refuses("bad_seal"):
            ash.mask(play.h, mine | {"elm": wrong}, play.words["ash"])
    with refuses("unknown_member"):
        ash.mask(play.h, mine | {"oak": mine["elm"]}, play.words["ash"])
    with refuses("unknown_member"):
        ash.mask(play.h, mine | {"ash": mine["elm"]}, play.words["ash"])
    with refuses("too_few"):
        ash.mask(play.h, {n: mine[n] for n in ("elm", "fir")}, play.words["ash"])


def test_bad_key_and_share_messages_are_noted_and_the_others_go_on() -> None:
    play = Play(header())
    sent = [play.sites[n].keys_for(play.h) for n in NAMES]
    sent[6] = dataclasses.replace(sent[6], signature=sent[5].signature)
    play.all_keys = play.server.check_keys(play.h, [*sent, sent[0], dataclasses.replace(sent[1], site="oak")])
    assert play.server.refused["larch"].startswith("bad_signature") and play.server.refused["oak"].startswith("unknown_member")
    assert play.server.refused["ash"].startswith("duplicate")
    there = [k.site for k in play.all_keys]
    shares = [play.sites[n].shares_for(play.h, play.all_keys) for n in there]
    less = dict(list(shares[5].sealed.items())[1:])
    play.routed = play.server.route([*shares[:5], MaskShares(there[5], less), MaskShares("larch", {}), shares[2]])
    assert play.server.refused[there[5]].startswith("missing_shares")
    play.mask()
    play.confirm()
    assert set(play.arrived) == set(NAMES[:5])
    assert lifted(play.server.total(play.unmask())) == list(play.expected())


def test_a_masked_update_that_is_late_double_short_foreign_or_changed_does_not_count() -> None:
    play = Play(header()).to_shares()
    made = {n: play.sites[n].mask(play.h, play.routed[n], play.words[n]) for n in NAMES}
    accept, elm = play.server.accept, made["elm"]
    flipped = elm.values.copy()
    flipped[3] ^= 1
    for reason, wrong in {
        "bad_signature": dataclasses.replace(elm, values=flipped),
        "bad_signature|x": dataclasses.replace(elm, site="fir"),
        "wrong_length": dataclasses.replace(elm, values=elm.values[:-1]),
        "wrong_length|x": dataclasses.replace(elm, signature=elm.signature[:10]),
        "malformed": dataclasses.replace(elm, values=elm.values.view(np.uint32)),
        "unknown_member": dataclasses.replace(elm, site="oak"),
    }.items():
        with refuses(reason):
            accept(wrong)  # type: ignore[arg-type]
    for n in NAMES[:-1]:
        accept(made[n])
    with refuses("duplicate"):
        accept(elm)
    play.server.need()
    with refuses("late"):
        accept(made["larch"])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1), st.integers(0, 6), st.integers(0, 32), st.integers(1, 255))
def test_false_shares_are_got_past_while_enough_true_ones_are_there(whose: int, site: int, at: int, flip: int) -> None:
    play = Play(header()).to_signatures(lost={"fir"})
    sent = play.unmask()
    liar = sent[whose]
    wrong = liar.shares[NAMES[site]].copy()
    wrong[at] ^= flip
    sent[whose] = dataclasses.replace(liar, shares=liar.shares | {NAMES[site]: wrong})
    assert lifted(play.server.total(sent)) == list(play.expected())
    play = Play(header()).to_signatures(lost={"fir"})
    sent = play.unmask()[:T]
    wrong = sent[whose].shares["elm"].copy()
    wrong[20] ^= flip
    sent[whose] = dataclasses.replace(sent[whose], shares=sent[whose].shares | {"elm": wrong})
    with refuses("bad_share"):
        play.server.total(sent)


def test_shares_of_the_wrong_secret_do_not_pass_for_the_right_one() -> None:
    play = Play(header()).to_signatures()
    sent = [dataclasses.replace(m, shares=dict.fromkeys(NAMES, m.shares["ash"])) for m in play.unmask()]
    with refuses("bad_share"):
        play.server.total(sent)


def test_unmasking_messages_with_missing_double_or_foreign_shares_do_not_count() -> None:
    play = Play(header()).to_signatures(lost={"fir"})
    sent = play.unmask()
    wrong = [
        Unmasked("birch", dict(list(sent[1].shares.items())[1:])),
        Unmasked("cedar", sent[2].shares | {"elm": sent[2].shares["elm"][:-1]}),
        Unmasked("fir", sent[3].shares),
        sent[0],
    ]
    with refuses("too_few") as caught:
        play.server.total([*sent[:1], *wrong, *sent[3:]])
    assert all(
        w in str(caught.value) for w in ("ash: duplicate", "birch: missing_shares", "cedar: wrong_length", "fir: unknown")
    )


def test_signatures_of_arrivals_are_checked_by_the_coordinator() -> None:
    play = Play(header()).to_masks(lost={"fir"})
    said = [play.sites[n].confirm(play.h, play.arrived, play.dropped) for n in play.arrived]
    bad = [ArrivedSignature("ash", said[1].signature), ArrivedSignature("fir", said[1].signature)]
    assert set(play.server.consistent([*bad, *said[1:]])) == set(play.arrived) - {"ash"}
    assert play.server.refused.keys() == {"ash", "fir"}


# --- state and messages ----------------------------------------------------------------------------------------------------------------


def test_a_site_that_starts_again_answers_every_step_with_the_same_bytes() -> None:
    play = Play(header())
    play.keys()
    for step, repeat in (
        ("keys", lambda s: s.keys_for(play.h)),
        ("shares", lambda s: s.shares_for(play.h, play.all_keys)),
        ("mask", lambda s: s.mask(play.h, play.routed["ash"], play.words["ash"])),
        ("confirm", lambda s: s.confirm(play.h, play.arrived, play.dropped)),
        ("unmask", lambda s: s.unmask(play.h, play.arrived, play.dropped, play.signatures)),
    ):
        if step != "keys":
            getattr(play, step)()
        before = wire.encode(repeat(play.sites["ash"]))
        play.restart("ash")
        assert wire.encode(repeat(play.sites["ash"])) == before, step


def test_state_is_not_shown_and_closing_forgets_the_secrets() -> None:
    play = Play(header()).to_signatures()
    state = SiteState.from_bytes(play.sites["ash"].export())
    secrets = (state.cipher, state.mask, state.seed, state.shamir, *state.kept.values())
    assert all(secrets) and not any(s in repr(state) for s in secrets)
    play.sites["ash"].close()
    left = play.sites["ash"].export()
    assert not any(s.encode() in left for s in secrets)


def test_state_of_another_site_is_refused() -> None:
    with pytest.raises(StateError):
        MaskingSite.restore(SiteState("elm").to_bytes(), KEYS["ash"], CHARTER, T)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_state_is_a_state_error_or_the_state_of_a_site(data: st.DataObject) -> None:
    good = bytearray(STATE)
    if data.draw(st.booleans()):
        good = bytearray(data.draw(st.binary(max_size=80)))
    else:
        at = data.draw(st.integers(0, len(good) - 1))
        good[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        assert isinstance(SiteState.from_bytes(bytes(good)), SiteState)
    except StateError:
        pass


STATE = SEALED.sites["ash"].export()


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(["keys", "shares", "masked", "arrived", "unmasked"]), st.integers(0, 3), st.integers(0, 4), st.data())
def test_arbitrary_blobs_are_named_errors_on_both_sides(message: str, shape: int, dtype: int, data: st.DataObject) -> None:
    kinds = (np.uint8, np.uint8, np.uint32, np.float32, np.int8)
    junk: Any = np.frombuffer(data.draw(st.binary(min_size=24, max_size=96).map(lambda b: b[: len(b) // 8 * 8])), np.uint8)
    junk = junk.view(kinds[dtype])
    junk = (junk, junk.reshape(1, -1), junk[:0], junk)[shape]
    with pytest.raises(ProtocolError):
        send_junk(message, junk)


def send_junk(message: str, junk: Any) -> None:
    play = Play(header())
    if message == "keys":
        good = play.keys()
        play.sites["ash"].shares_for(play.h, [MaskKeys("elm", junk, junk, junk, junk), *good[:3], *good[4:]])
    play.to_shares()
    if message == "shares":
        play.sites["ash"].mask(play.h, dict.fromkeys(NAMES[1:], junk), play.words["ash"])
    if message == "masked":
        play.server.accept(Masked("ash", junk, junk))
    play.mask()
    if message == "arrived":
        play.sites["ash"].unmask(play.h, play.arrived, play.dropped, dict.fromkeys(NAMES, junk))
    play.confirm()
    play.server.total([Unmasked(n, dict.fromkeys(NAMES, junk)) for n in NAMES])
