"""Keys and charters: who may replace a key, what a charter proves, and that a private key stays in its folder."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from consortium import SITES, config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmat import files, keys
from fedmat.envelopes import ROLES
from fedmat.errors import ConfigError, ProtocolError, StateError
from fedmat.keys import Charter, Party, PartyKeys, Rotation

TODAY = date(2026, 11, 23)
UNTIL = TODAY + timedelta(days=365)
LATER = UNTIL + timedelta(days=200)


def member(name: str, kem: Any = "x25519", until: date = UNTIL) -> tuple[PartyKeys, Party]:
    """Keys of a party and its entry."""
    own = PartyKeys.new(name, kem)
    kind: Any = name if name in ROLES else "site"
    organisations = {m.site: m.organisation for m in config().members}
    return own, own.public(kind, organisations.get(name, f"Office of the {name}"), until)


ELM, ELM_ENTRY = member("ash")
OAK, OAK_ENTRY = member("birch")
FIRST = keys.charter("grove", "x25519", [ELM_ENTRY, OAK_ENTRY])


def rotated(
    old: PartyKeys, entry: Party, made: date = TODAY, until: date = LATER, new: PartyKeys | None = None
) -> tuple[PartyKeys, Rotation]:
    """New keys of a party and the word that they are its own."""
    new = new or PartyKeys.new(old.name, old.kem)
    return new, keys.rotate(old, entry, new, until, made)


def reason(call: Any, *args: Any) -> str:
    """The one-word reason of the refusal."""
    with pytest.raises(ProtocolError) as caught:
        call(*args)
    return caught.value.reason


# --- a rotation takes hold ---------------------------------------------------------------------------------------


def test_a_rotation_gives_the_next_revision_in_which_only_the_new_key_counts() -> None:
    new, step = rotated(ELM, ELM_ENTRY)
    second = keys.apply(FIRST, step, TODAY)
    assert (second.revision, second.previous_sha256) == (2, FIRST.sha256)
    assert second.parties == (step.entry, OAK_ENTRY)
    second.verify("ash", new.sign(b"x"), b"x", str(TODAY))
    assert reason(second.verify, "ash", ELM.sign(b"x"), b"x", str(TODAY)) == "bad_signature"
    assert new.unseal(second.seal("ash", b"x", b"c", str(TODAY)), b"c") == b"x"
    with pytest.raises(ProtocolError, match="bad_seal"):
        ELM.unseal(second.seal("ash", b"x", b"c", str(TODAY)), b"c")


def test_a_charter_without_rotations_has_the_digest_it_always_had() -> None:
    plain = {"consortium": "grove", "kem": "x25519", "parties": [p.model_dump(mode="json") for p in FIRST.parties]}
    assert FIRST.model_dump(mode="json") == plain
    assert FIRST.sha256 == files.sha256(files.canonical_json(plain))
    assert keys.verify_chain(FIRST) == (FIRST.sha256,)


def test_the_chain_leads_back_to_the_digest_that_was_agreed() -> None:
    elm_2, one = rotated(ELM, ELM_ENTRY)
    _, two = rotated(OAK, OAK_ENTRY)
    second = keys.apply(FIRST, one, TODAY)
    third = keys.apply(second, two, TODAY)
    _, three = rotated(elm_2, one.entry)
    fourth = keys.apply(third, three, TODAY + timedelta(days=3))
    again = Charter.model_validate_json(fourth.model_dump_json())
    assert keys.verify_chain(again) == (FIRST.sha256, second.sha256, third.sha256, fourth.sha256)


def test_two_parties_may_rotate_in_either_order() -> None:
    (_, one), (_, two) = rotated(ELM, ELM_ENTRY), rotated(OAK, OAK_ENTRY)
    there = keys.apply(keys.apply(FIRST, one, TODAY), two, TODAY)
    back = keys.apply(keys.apply(FIRST, two, TODAY), one, TODAY)
    assert there.parties == back.parties
    assert there.sha256 != back.sha256  # but the charters tell what came first


# --- a rotation that is refused ----------------------------------------------------------------------------------


def test_nobody_else_can_rotate_a_partys_keys() -> None:
    thief = PartyKeys.new("ash")
    _, step = rotated(thief, thief.public("site", ELM_ENTRY.organisation, UNTIL))
    assert reason(keys.apply, FIRST, step, TODAY) == "out_of_order_rotation"  # from keys that are not in the charter
    _, honest = rotated(ELM, ELM_ENTRY)
    told = honest.model_copy(update={"signature": OAK.sign(b"anything").hex()})
    assert reason(keys.apply, FIRST, told, TODAY) == "bad_signature"


def test_a_party_cannot_claim_a_key_it_does_not_have() -> None:
    _, step = rotated(ELM, ELM_ENTRY)
    stranger = PartyKeys.new("ash")
    claimed = stranger.public("site", ELM_ENTRY.organisation, LATER)
    told = keys._rotation_body(ELM_ENTRY, claimed, TODAY)
    by_old = ELM.sign(b"fedmat/keys/rotation/v1|" + told).hex()
    by_itself = ELM.sign(b"fedmat/keys/possession/v1|" + told).hex()
    for possession in (by_itself, by_old, step.possession):
        forged = Rotation(replaces=ELM_ENTRY, entry=claimed, made=TODAY, signature=by_old, possession=possession)
        assert reason(keys.apply, FIRST, forged, TODAY) == "no_possession"


def test_a_rotation_counts_once() -> None:
    elm_2, one = rotated(ELM, ELM_ENTRY)
    second = keys.apply(FIRST, one, TODAY)
    assert reason(keys.apply, second, one, TODAY) == "replayed_rotation"
    _, two = rotated(elm_2, one.entry)
    assert reason(keys.apply, keys.apply(second, two, TODAY), one, TODAY) == "replayed_rotation"


def test_rotations_of_one_party_come_in_order() -> None:
    elm_2, one = rotated(ELM, ELM_ENTRY)
    _, two = rotated(elm_2, one.entry)
    _, other = rotated(ELM, ELM_ENTRY)
    assert reason(keys.apply, FIRST, two, TODAY) == "out_of_order_rotation"
    assert reason(keys.apply, keys.apply(FIRST, one, TODAY), other, TODAY) == "out_of_order_rotation"  # a fork


@pytest.mark.parametrize(("days", "good"), [(-2, False), (-1, True), (0, True), (30, True), (31, False), (200, False)])
def test_a_rotation_cannot_be_kept_for_a_later_day(days: int, good: bool) -> None:
    _, step = rotated(ELM, ELM_ENTRY)
    when = TODAY + timedelta(days=days)
    if good:
        assert keys.apply(FIRST, step, when).revision == 2
    else:
        assert reason(keys.apply, FIRST, step, when) == "expired_rotation"


def test_an_ended_key_vouches_for_nothing() -> None:
    assert reason(rotated, ELM, ELM_ENTRY, UNTIL + timedelta(days=1)) == "expired_key"
    _, dated_back = rotated(ELM, ELM_ENTRY, UNTIL)
    assert reason(keys.apply, FIRST, dated_back, UNTIL + timedelta(days=1)) == "expired_key"
    assert reason(rotated, ELM, ELM_ENTRY, TODAY, TODAY - timedelta(days=1)) == "expired_key"  # the new one ended already
    _, short = rotated(ELM, ELM_ENTRY, TODAY, TODAY + timedelta(days=2))
    assert reason(keys.apply, FIRST, short, TODAY + timedelta(days=3)) == "expired_key"


def test_a_rotation_changes_keys_alone_and_both_of_them() -> None:
    half = PartyKeys("ash", "x25519", PartyKeys.new("ash").signing, ELM.sealing)
    other_kind = PartyKeys.new("ash", "mlkem768-x25519")
    for new in (half, other_kind, ELM):
        assert reason(keys.rotate, ELM, ELM_ENTRY, new, LATER, TODAY) == "bad_rotation"
    _, step = rotated(ELM, ELM_ENTRY)
    for change in ({"organisation": "Thief Ltd"}, {"name": "birch"}):
        moved = step.model_copy(update={"entry": step.entry.model_copy(update=change)})
        assert reason(moved.verify) == "bad_rotation"
    assert reason(keys.rotate, OAK, ELM_ENTRY, PartyKeys.new("ash"), LATER, TODAY) == "bad_rotation"


def test_keys_never_come_back_and_are_nobody_elses() -> None:
    elm_2, one = rotated(ELM, ELM_ENTRY)
    second = keys.apply(FIRST, one, TODAY)
    _, back = rotated(elm_2, one.entry, new=ELM)
    assert reason(keys.apply, second, back, TODAY) == "reused_key"
    _, shared = rotated(elm_2, one.entry, new=PartyKeys("ash", "x25519", OAK.signing, os.urandom(32)))
    assert reason(keys.apply, second, shared, TODAY) == "reused_key"


def test_a_stranger_is_not_rotated() -> None:
    own, entry = member("cedar")
    _, step = rotated(own, entry)
    assert reason(keys.apply, FIRST, step, TODAY) == "unknown_member"


# --- a charter that was tampered with ----------------------------------------------------------------------------


def changed(charter: Charter, **fields: object) -> Charter:
    """The charter with other fields, unchecked."""
    return charter.model_copy(update=fields)


def test_whoever_keeps_the_file_cannot_put_in_a_key() -> None:
    _, step = rotated(ELM, ELM_ENTRY)
    second = keys.apply(FIRST, step, TODAY)
    _, own = member("ash")
    swapped = changed(second, parties=(own, OAK_ENTRY))
    for wrong in (
        swapped,
        changed(second, revision=3),
        changed(second, previous_sha256=FIRST.sha256[::-1]),
        changed(FIRST, revision=2, previous_sha256=FIRST.sha256),
    ):
        assert reason(keys.verify_chain, wrong) == "broken_chain"
    forged = changed(second, rotations=(step.model_copy(update={"signature": "0" * 128}),))
    assert reason(keys.verify_chain, forged) == "bad_signature"
    # Leaving the rotation out gives a charter that hangs together, but not the digest that was agreed.
    assert keys.verify_chain(changed(second, revision=1, previous_sha256="", rotations=()))[0] != FIRST.sha256


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_character_of_a_rotated_charter_is_noticed(tmp_path: Path, data: st.DataObject) -> None:
    _, step = rotated(ELM, ELM_ENTRY)
    good = keys.apply(FIRST, step, TODAY)
    text = files.json_bytes(good.model_dump(mode="json")).decode()
    at = data.draw(st.sampled_from([i for i, c in enumerate(text) if c.isalnum()]))
    put = data.draw(st.sampled_from("0123456789abcdef").filter(lambda c: c != text[at]))
    path = tmp_path / "charter.json"
    path.write_text(text[:at] + put + text[at + 1 :])
    try:
        found = keys.read_charter(path)
    except (ConfigError, ProtocolError):
        return
    assert keys.verify_chain(found)[0] != FIRST.sha256 and found.sha256 != good.sha256


# --- a party's folder --------------------------------------------------------------------------------------------


def made(folder: Path, name: str = "ash") -> tuple[PartyKeys, Party]:
    """A party's keys on disk."""
    own, entry = member(name)
    keys.create(own, entry, folder)
    return own, entry


def test_keys_are_their_owners_alone_and_never_replaced(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        own, entry = made(tmp_path / "k")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o700
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "k").glob("*.key")}
    assert modes == {"signing.key": 0o600, "sealing.key": 0o600}
    before = {p.name: p.read_bytes() for p in (tmp_path / "k").iterdir()}
    with pytest.raises(StateError, match="there already"):
        made(tmp_path / "k")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "k").iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["k"]  # nothing half made beside it
    assert keys.entry_of(tmp_path / "k") == entry and keys.load(tmp_path / "k", "ash").holds(entry)
    assert own.holds(entry)


def test_a_rotation_keeps_the_old_keys_until_the_charter_has_the_new_ones(tmp_path: Path) -> None:
    folder = tmp_path / "k"
    own, entry = made(folder)
    first = keys.charter("grove", "x25519", [entry, OAK_ENTRY])
    new, step = rotated(own, entry)
    keys.save_rotation(folder, step, new)
    assert sorted(p.name for p in folder.iterdir()) == [
        "ash.party.json", "ash.rotation.json", "sealing-until-2026-11-23.key", "sealing.key", "signing-until-2026-11-23.key",
        "signing.key",
    ]  # fmt: skip
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in folder.glob("*.key"))
    assert keys.load(folder, "ash").holds(step.entry)
    assert keys.load_fitting(folder, "ash", first).holds(entry)
    with pytest.raises(StateError, match="under way"):
        keys.save_rotation(folder, step, new)
    with pytest.raises(StateError, match="does not hold the new keys"):
        keys.finish_rotation(folder, "ash", first)
    second = keys.apply(first, keys.read_rotation(folder / "ash.rotation.json"), TODAY)
    assert keys.load_fitting(folder, "ash", second).holds(step.entry)
    keys.finish_rotation(folder, "ash", second)
    assert sorted(p.name for p in folder.iterdir()) == ["ash.party.json", "sealing.key", "signing.key"]
    with pytest.raises(StateError, match="not those of ash"):
        keys.load_fitting(folder, "ash", first)
    with pytest.raises(StateError, match="no rotation"):
        keys.undo_rotation(folder, "ash")


@pytest.mark.parametrize("stop", range(7))
def test_a_rotation_that_stops_anywhere_can_be_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    folder = tmp_path / "k"
    own, entry = made(folder)
    new, step = rotated(own, entry)
    real = os.replace
    done: list[Any] = []

    def replace(a: Any, b: Any) -> None:
        if len(done) == stop:
            raise OSError("power cut")
        done.append(b)
        real(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        if stop < 6:
            with pytest.raises(OSError, match="power cut"):
                keys.save_rotation(folder, step, new)
        else:
            keys.save_rotation(folder, step, new)
    if stop == 0:
        assert not keys.rotation_under_way(folder)
    elif stop == 1:  # one of the two old files was copied; the present ones were not touched
        with pytest.raises(StateError, match="not whole"):
            keys.undo_rotation(folder, "ash")
    else:
        keys.undo_rotation(folder, "ash")
    assert keys.load(folder, "ash").holds(entry) and keys.entry_of(folder) == entry


@pytest.mark.parametrize("kem", ["x25519", "mlkem768-x25519"])
def test_saved_keys_are_read_again(tmp_path: Path, kem: Any) -> None:
    own, entry = member("ash", kem)
    keys.create(own, entry, tmp_path / "k")
    back = keys.load(tmp_path / "k", "ash")
    assert back.holds(entry) and entry.kem == kem
    book = keys.charter("grove", kem, [entry])
    assert back.unseal(book.seal("ash", b"data", b"context", str(TODAY)), b"context") == b"data"


def test_damaged_or_readable_keys_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "k"
    made(folder)
    good = (folder / keys.SIGNING).read_text()
    for bad in ("", "ed25519", "ed25519 zz", good[:-9], "rsa " + good.split()[1], good.split()[1], "\xff\xfe"):
        (folder / keys.SIGNING).write_text(bad)
        with pytest.raises(StateError, match="damaged"):
            keys.load(folder, "ash")
    (folder / keys.SIGNING).write_text(good)
    (folder / keys.SIGNING).chmod(0o640)
    with pytest.raises(StateError, match="others than the owner"):
        keys.load(folder, "ash")
    folder.chmod(0o750)
    with pytest.raises(StateError, match="others than the owner"):
        keys.check_folder(folder)


# --- the first charter -------------------------------------------------------------------------------------------


def everyone(**instead: Party | None) -> list[Party]:
    """Entries of all parties of the test consortium."""
    names = (*SITES, *ROLES)
    return [p for n in names if (p := instead.get(n, member(n)[1])) is not None]


def test_a_charter_is_agreed_when_everyone_is_there() -> None:
    found = keys.agree(config(), everyone(), TODAY)
    assert found.sites == SITES and found.revision == 1 and len(found.parties) == 7
    only = [p for p in everyone() if p.kind == "site"]
    assert keys.agree(config(), only, TODAY, roles=()).sites == SITES


def office(name: Any, organisation: str) -> Party:
    """A role run by an organisation."""
    return PartyKeys.new(name).public(name, organisation, UNTIL)


@pytest.mark.parametrize(
    ("instead", "said"),
    [
        ({"birch": None}, "no keys of site birch"),
        ({"notary": None}, "nobody runs the notary"),
        ({"ash": OAK_ENTRY}, "birch has two entries"),
        ({"ash": ELM_ENTRY.model_copy(update={"name": "elm"})}, "elm is no member"),
        ({"ash": ELM_ENTRY.model_copy(update={"organisation": "Another"})}, "belongs to 'Another'"),
        ({"ash": member("ash", until=TODAY - timedelta(days=1))[1]}, "the keys of ash ended on 2026-11-22"),
        ({"ash": member("ash", "mlkem768-x25519")[1]}, "differ in kind"),
        ({"ash": ELM_ENTRY.model_copy(update={"sealing": "00"})}, "the sealing key of ash is damaged"),
        (
            {"ash": ELM_ENTRY, "birch": OAK_ENTRY.model_copy(update={"signing": ELM_ENTRY.signing})},
            "another party's signing key",
        ),
        ({"notary": office("notary", "X"), "auditor": office("auditor", "X")}, "one organisation holds two roles"),
    ],
)
def test_a_charter_that_is_not_whole_says_everything_that_is_missing(instead: dict[str, Party | None], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        keys.agree(config(), everyone(**instead), TODAY)


# --- a rehearsal -------------------------------------------------------------------------------------------------


def test_a_rehearsal_makes_keys_once_and_the_same_charter_ever_after(tmp_path: Path) -> None:
    organisations = {s: f"Company {s}" for s in SITES}
    where = lambda name: tmp_path / name / "keys"  # noqa: E731
    first = keys.rehearsal("grove", SITES, organisations, where, date(2028, 2, 29))
    written = {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert set(written) == {
        f"{n}/keys/{f}" for n in (*SITES, *ROLES) for f in ("signing.key", "sealing.key", f"{n}.party.json")
    }
    later = keys.rehearsal("grove", SITES, organisations, where, date(2030, 7, 1))
    assert later == first and first.party("ash", "2028-03-01").not_after == date(2038, 2, 28)
    assert written == {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert {p.organisation for p in first.parties if p.kind != "site"} == {f"Rehearsal {r}" for r in ROLES}
    assert all(keys.load(where(p.name), p.name).holds(p) for p in first.parties)
    with pytest.raises(StateError, match="expected mlkem768"):
        keys.rehearsal("grove", SITES, organisations, where, TODAY, "mlkem768-x25519")


def test_a_rehearsal_that_starts_everywhere_at_once_agrees(tmp_path: Path) -> None:
    organisations = {s: f"Company {s}" for s in SITES}

    def start(_: int) -> str:
        return keys.rehearsal("grove", SITES, organisations, lambda n: tmp_path / n / "keys", TODAY).sha256

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(start, range(8)))) == 1
    assert not list(tmp_path.rglob("*.tmp"))
