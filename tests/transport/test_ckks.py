"""Laws of sums under CKKS: right within the stated error, one per round, no key where it does not belong."""

from __future__ import annotations

import dataclasses
import math
from datetime import date
from typing import Any

import numpy as np
import pytest
import tenseal
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat.envelopes import Ciphertexts, Header, SumWitness
from fedmat.errors import ProtocolError, StateError
from fedmat.keys import Charter, PartyKeys, charter
from fedmat.transport import ckks
from fedmat.transport.ckks import HolderState, KeyHolder, accept, add, encrypt, open_context, submit, witness
from fedmat.transport.trigram.ring import blob

NAMES = ("ash", "birch", "cedar", "elm", "fir", "hazel")
END = date(2030, 1, 1)
KEYS = {n: PartyKeys.new(n) for n in (*NAMES, "auditor")}


def book(holder: str = "notary office", names: tuple[str, ...] = NAMES) -> Charter:
    sites = [KEYS[n].public("site", f"{n} ltd", END) for n in names]
    return charter("trees", "x25519", [*sites, KEYS["auditor"].public("auditor", holder, END)])


CHARTER = book()
K = 5000  # two ciphertexts
HOLDER = KeyHolder.new(KEYS["auditor"], CHARTER, "r").export()


def header(**changes: Any) -> Header:
    values: dict[str, Any] = {
        "plan_sha256": "p", "run": "r", "round": 0, "exchange": 0, "model_sha256": "m", "charter_sha256": CHARTER.sha256,
        "length": K, "bits": 32, "hostile": 1, "minimum": 4, "clip": 3.0, "weights": {n: i + 1 for i, n in enumerate(NAMES)},
        "map_sha256": "", "today": "2027-01-01",
    }  # fmt: skip
    return Header(**{**values, **changes})


def holder() -> KeyHolder:
    return KeyHolder.restore(HOLDER, KEYS["auditor"], CHARTER)


CONTEXT = open_context(holder().public_context(), CHARTER, header())


def update(seed: int, norm: float = 2.0) -> Any:
    x = np.random.default_rng(seed).standard_normal(K)
    return x * (norm / np.linalg.norm(x))


SENT = {n: submit(header(), CHARTER, KEYS[n], CONTEXT, update(i)) for i, n in enumerate(NAMES)}
PARTS = {n: accept(header(), CHARTER, CONTEXT, m) for n, m in SENT.items()}


def summed(names: Any, h: Header | None = None, observers: int = 2) -> tuple[Any, Any, Any]:
    """What the coordinator brings the key holder."""
    chosen = sorted(names)
    parts = add(CONTEXT, [PARTS[n] for n in chosen])
    seen = [witness(h or header(), CHARTER, KEYS[n], CONTEXT, [SENT[m] for m in chosen]) for n in chosen[:observers]]
    return tuple(chosen), parts, seen


SUM = summed(NAMES)


def refuses(reason: str) -> Any:
    return pytest.raises(ProtocolError, match=rf"^{reason}: ")


# --- the sum -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [(), ("ash",), ("birch", "fir")])
def test_the_opened_sum_is_the_weighted_sum_within_the_stated_noise(gone: tuple[str, ...]) -> None:
    h = header()
    there = [n for n in NAMES if n not in gone]
    opened = holder().decrypt(h, *summed(there))
    wanted = sum(h.weights[n] * update(NAMES.index(n)) for n in there)
    unit = h.clip * sum(h.weights.values())
    error = (opened - wanted) / unit
    assert opened.shape == (K,) and opened.dtype == np.float64
    assert np.abs(error).max() < 6 * ckks.FLOOD
    assert 0.95 * ckks.FLOOD < error.std() < 1.05 * ckks.FLOOD  # no less noise than promised, and no more


def test_the_noise_drowns_the_error_of_the_encryption_as_stated() -> None:
    private = tenseal.context_from(bytes.fromhex(HolderState.from_bytes(HOLDER).secret), n_threads=1)
    exact = np.concatenate([tenseal.ckks_vector_from(private, p).decrypt() for p in SUM[1]])[:K]
    h = header()
    wanted = sum(h.weights[n] / sum(h.weights.values()) * update(i) / h.clip for i, n in enumerate(NAMES))
    error = float(np.std(exact - wanted))
    assert 0 < error < ckks.ERROR
    assert ckks.FLOOD / error > 2**26


def test_noise_is_fresh_and_opened_numbers_lie_on_the_grid() -> None:
    h = header()
    one, other = holder().decrypt(h, *SUM), holder().decrypt(h, *SUM)  # two key holders, neither knows of the other
    unit = h.clip * sum(h.weights.values())
    spread = float(np.std((one - other) / unit)) / (math.sqrt(2) * ckks.FLOOD)
    assert 0.95 < spread < 1.05
    steps = one / (unit * 2.0**-20)
    assert np.abs(steps - np.rint(steps)).max() < 1e-6


def test_noise_is_normal() -> None:
    z = ckks._normal(100_000)
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02 and abs(np.mean(z**4) - 3) < 0.2
    assert not np.array_equal(z, ckks._normal(100_000))


def test_an_update_above_the_clip_is_scaled_down_to_it() -> None:
    h = header()
    big = submit(h, CHARTER, KEYS["ash"], CONTEXT, update(0, norm=30.0))
    private = tenseal.context_from(bytes.fromhex(HolderState.from_bytes(HOLDER).secret), n_threads=1)
    seen = np.concatenate([tenseal.ckks_vector_from(private, p.tobytes()).decrypt() for p in big.parts])
    assert np.linalg.norm(seen) == pytest.approx(h.weights["ash"] / sum(h.weights.values()), rel=1e-6)


def test_everyone_who_adds_gets_the_same_bytes_and_equal_updates_have_unequal_ciphertexts() -> None:
    assert add(CONTEXT, [PARTS[n] for n in NAMES]) == SUM[1]
    again = submit(header(), CHARTER, KEYS["ash"], CONTEXT, update(0))
    assert not np.array_equal(again.parts[0], SENT["ash"].parts[0])


def test_ciphertexts_do_not_compress_and_their_sizes_say_nothing() -> None:
    zero = submit(header(), CHARTER, KEYS["ash"], CONTEXT, np.zeros(K))
    sizes = [p.size for m in (zero, *SENT.values()) for p in m.parts]
    assert min(sizes) > 131_000 and max(sizes) - min(sizes) < 600
    assert 8 < min(sizes) / CONTEXT.slots / 4 < 8.6  # times the bytes of a float32: as documented


# --- keys ----------------------------------------------------------------------------------------------------------------------


def test_the_public_context_holds_no_secret_key_and_decrypts_nothing() -> None:
    public = holder().public_context()
    assert not CONTEXT.tenseal.has_secret_key() and CONTEXT.tenseal.is_public()
    secret = bytes.fromhex(HolderState.from_bytes(HOLDER).secret)
    grams = {
        secret[i : i + 16] for i in range(len(public), len(secret) - 16, 97)
    }  # the secret key is what the private one has more
    assert grams and not any(g in public for g in grams)
    with pytest.raises(ValueError, match="secret_key"):
        tenseal.ckks_vector_from(CONTEXT.tenseal, PARTS["ash"][0]).decrypt()


def test_a_context_with_its_secret_key_is_refused_even_when_the_key_holder_signed_it() -> None:
    body = bytes.fromhex(HolderState.from_bytes(HOLDER).secret)
    signed = KEYS["auditor"].sign(ckks._context_text("r", body)) + body
    with refuses("shared_secret_key") as caught:
        open_context(signed, CHARTER, header())
    assert "any one member could read every update" in str(caught.value)


def test_a_context_of_the_coordinators_own_making_is_refused_before_it_is_parsed() -> None:
    mine = KeyHolder.new(KEYS["auditor"], CHARTER, "r")
    body = mine.public_context()[64:]
    with refuses("bad_signature"):
        open_context(KEYS["ash"].sign(ckks._context_text("r", body)) + body, CHARTER, header())
    with refuses("bad_signature"):
        open_context(holder().public_context(), CHARTER, header(run="another"))
    with refuses("expired_key"):
        open_context(holder().public_context(), CHARTER, header(today="2031-01-01"))


@pytest.mark.parametrize(
    ("degree", "bits", "scale"),
    [(8192, [40, 40], 30), (8192, [60, 60], 40), (16384, [60, 60, 60], 57), (4096, [50, 50], 40), (8192, [60, 50], 40)],
)
def test_a_context_with_other_parameters_is_refused(degree: int, bits: list[int], scale: int) -> None:
    c = tenseal.context(tenseal.SCHEME_TYPE.CKKS, degree, coeff_mod_bit_sizes=bits, n_threads=1)
    c.global_scale = 2.0**scale
    with refuses("bad_context"):
        ckks._loaded(c.serialize(save_secret_key=False, save_galois_keys=False, save_relin_keys=False))


def test_the_key_holder_is_no_member_no_site_and_uses_no_weak_degree() -> None:
    with refuses("key_holder_is_member"):
        KeyHolder.new(KEYS["auditor"], book(holder="ash ltd"), "r")
    with refuses("key_holder_is_member"):
        open_context(holder().public_context(), book("ash ltd"), header(charter_sha256=book("ash ltd").sha256))
    with refuses("not_key_holder"):
        KeyHolder.new(KEYS["ash"], CHARTER, "r")
    with refuses("bad_context"):
        KeyHolder.new(KEYS["auditor"], CHARTER, "r", poly_modulus_degree=4096)
    alone = charter("trees", "x25519", [KEYS[n].public("site", f"{n} ltd", END) for n in NAMES])
    with refuses("unknown_member"):
        KeyHolder.new(KEYS["auditor"], alone, "r")


def test_the_larger_degree_works_too() -> None:
    big = KeyHolder.new(KEYS["auditor"], CHARTER, "r", poly_modulus_degree=16384)
    h = header(length=9)
    c = open_context(big.public_context(), CHARTER, h)
    x = np.linspace(-0.9, 0.9, 9)
    sent = [submit(h, CHARTER, KEYS[n], c, x) for n in NAMES]
    parts = add(c, [accept(h, CHARTER, c, m) for m in sent])
    opened = big.decrypt(h, NAMES, parts, [witness(h, CHARTER, KEYS[n], c, sent) for n in NAMES[:2]])
    assert c.slots == 8192 and np.abs(opened / sum(h.weights.values()) - x).max() < 6 * ckks.FLOOD * h.clip


# --- one sum per round -------------------------------------------------------------------------------------------------------------


def test_a_second_decryption_in_a_round_is_refused_also_after_a_restart_and_in_another_exchange() -> None:
    one = holder()
    one.decrypt(header(), *SUM)
    less = summed(NAMES[1:])
    two = KeyHolder.restore(one.export(), KEYS["auditor"], CHARTER)
    for again in (one, two):
        for request in (SUM, less):
            with refuses("second_opening"):
                again.decrypt(header(), *request)
    h = header(exchange=1)
    sent = [submit(h, CHARTER, KEYS[n], CONTEXT, update(i)) for i, n in enumerate(NAMES)]
    parts = add(CONTEXT, [accept(h, CHARTER, CONTEXT, m) for m in sent])
    seen = [witness(h, CHARTER, KEYS[n], CONTEXT, sent) for n in NAMES[:2]]
    with refuses("second_opening"):
        two.decrypt(h, NAMES, parts, seen)


def test_a_single_update_in_place_of_the_sum_is_refused() -> None:
    sites, _, seen = SUM
    with refuses("bad_signature"):
        holder().decrypt(header(), sites, PARTS["ash"], seen)
    with refuses("no_witness"):
        holder().decrypt(header(), sites, PARTS["ash"], [])
    alone = holder()
    with refuses("too_few"):
        alone.decrypt(header(), ("ash",), PARTS["ash"], seen)
    with refuses("too_few"):
        witness(header(), CHARTER, KEYS["ash"], CONTEXT, [SENT["ash"]])
    alone.decrypt(header(), *SUM)  # none of these refusals used up the round


def test_as_many_witnesses_as_there_may_be_hostile_sites_are_not_enough() -> None:
    sites, parts, seen = SUM
    for few in (seen[:1], [seen[0], seen[0]]):
        with refuses("no_witness"):
            holder().decrypt(header(), sites, parts, few)
    with refuses("no_witness"):  # of another sum
        holder().decrypt(header(), sites, parts, [seen[0], dataclasses.replace(seen[1], sites=NAMES[1:])])
    with refuses("no_witness"):
        holder().decrypt(header(), sites, parts, [seen[0], dataclasses.replace(seen[1], site="oak")])
    with refuses("bad_signature"):
        holder().decrypt(header(), sites, parts, [seen[0], dataclasses.replace(seen[0], site="fir")])
    with refuses("wrong_length"):
        holder().decrypt(header(), sites, parts, [seen[0], SumWitness("fir", sites, blob(b"x"))])


@pytest.mark.parametrize(
    ("reason", "changes", "sites"),
    [
        ("wrong_run", {"run": "another"}, NAMES),
        ("wrong_charter", {"charter_sha256": "x"}, NAMES),
        ("bad_signature", {"model_sha256": "another"}, NAMES),
        ("bad_signature", {"exchange": 7}, NAMES),
        ("too_few", {"minimum": 6}, NAMES[1:]),
        ("too_few", {"hostile": 4}, NAMES[1:]),
        ("bad_sets", {}, NAMES[::-1]),
        ("bad_sets", {}, (*NAMES, "hazel")),
        ("unknown_member", {}, (*NAMES, "oak")),
        ("wrong_length", {"length": K + 9000}, NAMES),
        ("too_few", {"weights": dict.fromkeys(NAMES[:4], 1)}, NAMES[:4]),
        ("expired_key", {"today": "2031-01-01"}, NAMES),
    ],
)
def test_a_request_outside_the_rules_is_refused(reason: str, changes: Any, sites: Any) -> None:
    with refuses(reason):
        holder().decrypt(header(**changes), sites, SUM[1], SUM[2])


def test_a_sum_longer_than_clipped_updates_can_be_is_refused_and_uses_up_the_round() -> None:
    h = header()
    unclipped = tuple(bytes(tenseal.ckks_vector(CONTEXT.tenseal, [0.5] * CONTEXT.slots).serialize()) for _ in SENT["ash"].parts)
    signature = KEYS["ash"].sign(ckks._submitted_text(ckks.check_header(h, CHARTER), "ash", unclipped))
    cheat = Ciphertexts("ash", tuple(blob(p) for p in unclipped), blob(signature))
    sent = [cheat, *(SENT[n] for n in NAMES[1:])]
    parts = add(CONTEXT, [accept(h, CHARTER, CONTEXT, m) for m in sent])
    seen = [witness(h, CHARTER, KEYS[n], CONTEXT, sent) for n in NAMES[:2]]
    one = holder()
    with refuses("out_of_range"):
        one.decrypt(h, NAMES, parts, seen)
    with refuses("second_opening"):
        one.decrypt(h, *SUM)


# --- messages ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [np.full(K, np.nan), np.full(K, np.inf), np.full(K, 1e300)])
def test_an_update_that_is_no_row_of_finite_numbers_is_refused(wrong: Any) -> None:
    with refuses("non_finite"):
        submit(header(), CHARTER, KEYS["ash"], CONTEXT, wrong)
    with refuses("wrong_length"):
        submit(header(), CHARTER, KEYS["ash"], CONTEXT, wrong[1:])
    with refuses("not_invited"):
        submit(header(weights=dict.fromkeys(NAMES[1:], 1)), CHARTER, KEYS["ash"], CONTEXT, update(0))


@pytest.mark.parametrize(("norm", "weight"), [(1.1, 0.5), (0.5, 0.0), (0.5, 1.5), (0.5, float("nan"))])
def test_encryption_takes_clipped_updates_and_shares_of_one(norm: float, weight: float) -> None:
    with refuses("out_of_range"):
        encrypt(CONTEXT, update(0, norm), weight)


def test_tampered_ciphertext_messages_are_named_errors() -> None:
    good = SENT["ash"]
    flipped = good.parts[0].copy()
    flipped[70_000] ^= 1
    for reason, wrong in {
        "bad_signature": dataclasses.replace(good, parts=(flipped, good.parts[1])),
        "bad_signature|a": dataclasses.replace(good, parts=good.parts[::-1]),
        "bad_signature|b": dataclasses.replace(good, site="elm"),
        "unknown_member": dataclasses.replace(good, site="oak"),
        "wrong_length": dataclasses.replace(good, parts=good.parts[:1]),
        "wrong_length|c": dataclasses.replace(good, signature=good.signature[1:]),
        "malformed": dataclasses.replace(good, parts=(good.parts[0].astype(np.uint32), good.parts[1])),
    }.items():
        with refuses(reason):
            accept(header(), CHARTER, CONTEXT, wrong)  # type: ignore[arg-type]
    with refuses("bad_signature"):
        accept(header(exchange=1), CHARTER, CONTEXT, good)  # a replay


def test_a_witness_adds_only_whole_sets_with_its_own_update() -> None:
    sent = list(SENT.values())
    with refuses("not_arrived"):
        witness(header(), CHARTER, KEYS["ash"], CONTEXT, sent[1:])
    with refuses("duplicate"):
        witness(header(), CHARTER, KEYS["ash"], CONTEXT, [*sent, sent[0]])
    with refuses("bad_signature"):
        witness(header(), CHARTER, KEYS["ash"], CONTEXT, [*sent[:5], dataclasses.replace(sent[0], site="hazel")])


def serialized(context: Any, scale: float = 2.0**ckks.SCALE_BITS, size: int = 4096) -> bytes:
    return bytes(tenseal.ckks_vector(context, [0.01] * size, scale=scale).serialize())


def test_ciphertexts_of_another_scale_size_or_key_kind_are_malformed() -> None:
    foreign = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 16384, coeff_mod_bit_sizes=[60, 60], n_threads=1)
    foreign.global_scale = 2.0**ckks.SCALE_BITS
    c = CONTEXT.tenseal
    for wrong in (serialized(c, 2.0**40), serialized(c, size=4095), b"", b"\0" * 99):
        with refuses("malformed"):
            add(CONTEXT, [[wrong]])
    for wrong in (serialized(c, size=5000), serialized(foreign, size=4096), bytes(300_000)):
        with refuses("wrong_length"):
            add(CONTEXT, [[wrong]])
    with refuses("wrong_length"):
        add(CONTEXT, [PARTS["ash"], PARTS["elm"][:1]])
    with refuses("too_few"):
        add(CONTEXT, [])


def mutated(good: bytes, data: st.DataObject) -> bytes:
    kind = data.draw(st.integers(0, 3))
    if kind == 0:
        return data.draw(st.binary(max_size=200))
    at = data.draw(st.one_of(st.integers(0, 300), st.integers(0, len(good) - 1)))
    if kind == 1:
        return good[:at]
    cut = at + data.draw(st.integers(0, 4))
    return good[:at] + data.draw(st.binary(max_size=4)) + good[cut:]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_arbitrary_ciphertext_bytes_add_up_or_are_a_named_error(data: st.DataObject) -> None:
    try:
        add(CONTEXT, [[mutated(PARTS["ash"][0], data)], [PARTS["elm"][0]]])
    except ProtocolError as error:
        assert error.reason in ("malformed", "wrong_length")  # noqa: PT017  most mutations raise, some stay ciphertexts


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_arbitrary_context_bytes_are_a_named_error_and_so_is_every_change_of_a_signed_one(data: st.DataObject) -> None:
    good = holder().public_context()
    wrong = mutated(good, data)
    if wrong != good:
        with pytest.raises(ProtocolError):
            open_context(wrong, CHARTER, header())
    try:  # behind the signature: what a key holder that errs might sign
        ckks._loaded(mutated(good[64:], data))
    except ProtocolError as error:
        assert error.reason in ("bad_context", "shared_secret_key")  # noqa: PT017


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_state_of_the_key_holder_is_a_state_error(data: st.DataObject) -> None:
    wrong = mutated(HOLDER, data)
    try:
        KeyHolder(KEYS["auditor"], CHARTER, HolderState.from_bytes(wrong))
    except StateError:
        return
    except ProtocolError as error:
        assert error.reason == "bad_context"  # noqa: PT017


def test_state_without_the_secret_key_is_refused_and_the_secret_is_not_shown() -> None:
    state = HolderState.from_bytes(HOLDER)
    assert state.secret[:64] not in repr(state)
    with pytest.raises(StateError):
        KeyHolder(KEYS["auditor"], CHARTER, HolderState("r", holder().public_context()[64:].hex()))
