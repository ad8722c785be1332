"""A log as a file: what it shows alone, and where each kind of tampering is found."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fedmat import files
from fedmat.errors import ProtocolError, StateError
from fedmat.keys import PartyKeys
from fedmat.ledger import dsse, merkle, notes
from fedmat.ledger.export import Export, export, parse_export, read_export, structure
from fedmat.ledger.finding import Finding
from fedmat.ledger.log import Log
from fedmat.ledger.notes import Verifier

ORIGIN = "fedmat/test"
OPERATOR, AUTHOR = PartyKeys.new("operator"), PartyKeys.new("author")
MEMBERS = tuple(PartyKeys.new(f"m{i}") for i in range(3))
OPERATED = Verifier.of("operator", OPERATOR)
WITNESSES = tuple(Verifier.of(k.name, k) for k in MEMBERS)
AUTHOR_KEY = AUTHOR.signing.public_key().public_bytes_raw()
KEYS = {dsse.key_id(AUTHOR_KEY): AUTHOR_KEY}
ENTRIES = [dsse.sign(b'{"n":%d}' % i, [AUTHOR]).encode() for i in range(7)]
SIZES = (2, 5, 7)


def signed(size: int, entries: Sequence[bytes] = ENTRIES, members: Sequence[PartyKeys] = MEMBERS, now: int = 0) -> str:
    body = notes.checkpoint(ORIGIN, size, merkle.root_of(map(merkle.leaf_hash, entries[:size])))
    note = notes.sign(body, "operator", OPERATOR)
    return note + "".join(notes.cosign(body, k.name, k, now or 1000 + size) for k in members)


GOOD = Export(ORIGIN, tuple(ENTRIES), tuple(signed(size) for size in SIZES))


SMALL = Export(ORIGIN, GOOD.entries[:2], (signed(2, members=MEMBERS[:2]),))


def found(
    given: Export, *, needed: int = 2, keys: dict[str, bytes] | None = None, witnesses: Sequence[Verifier] = WITNESSES
) -> tuple[Finding, ...]:
    return structure(given, OPERATED, lambda size: witnesses, lambda size: needed, keys)


def one(given: Export, **more: object) -> tuple[str, str]:
    (finding,) = found(given, **more)  # type: ignore[arg-type]
    return finding.place, finding.reason


def text(given: Export) -> bytes:
    """The file, written down from its description."""
    lines = [
        files.canonical_json({"origin": given.origin, "schema": "fedmat/ledger/1", "size": len(given.entries)}),
        *given.entries,
    ]
    lines += [files.canonical_json({"checkpoint": note}) for note in given.checkpoints]
    return b"".join(line + b"\n" for line in lines)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(text(GOOD))
    return path


def refused(path: Path, data: bytes | None = None) -> tuple[str, str]:
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ProtocolError) as caught:
        read_export(path)
    return caught.value.what, caught.value.reason


# --- a good file


def test_a_log_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "bundle" / "ledger.jsonl"
    with Log.open(tmp_path / "l.db", ORIGIN) as log:
        at = 0
        for size in SIZES:
            log.append(ENTRIES[at:size])
            at = size
            log.sign_checkpoint("operator", OPERATOR)
            for keys in MEMBERS:
                line = notes.cosign(notes.parse(log.checkpoint(size) or "").body, keys.name, keys, 1000 + size)
                log.add_cosignature(size, line, Verifier.of(keys.name, keys))
        export(log, path)
        assert path.read_bytes() == text(GOOD)
        assert read_export(path) == GOOD
        export(log, path, 5)
        assert read_export(path) == Export(ORIGIN, GOOD.entries[:5], GOOD.checkpoints[:2])
        log.append([b"no envelope"])
        with pytest.raises(ProtocolError, match="entry 7") as caught:
            export(log, path)
        assert caught.value.reason == "not_canonical"
        assert read_export(path).checkpoints == GOOD.checkpoints[:2], "the file that was there is gone"
    assert [p.name for p in path.parent.iterdir()] == ["ledger.jsonl"]


def test_a_good_file_has_no_finding(file: Path) -> None:
    assert found(read_export(file, ORIGIN), needed=3, keys=KEYS) == ()
    assert read_export(file).place(5) == "ledger.jsonl line 7 (entry 5)"


def test_the_ledger_of_another_consortium_is_named(file: Path) -> None:
    with pytest.raises(ProtocolError, match="line 1") as caught:
        read_export(file, "fedmat/other")
    assert caught.value.reason == "foreign_bundle"
    with pytest.raises(StateError, match="no such file"):
        read_export(file.with_name("none"))


# --- one bit


@pytest.mark.parametrize("given", [SMALL, pytest.param(GOOD, marks=pytest.mark.slow)], ids=["small", "whole"])
def test_one_flipped_bit_anywhere_is_found_and_located(given: Export) -> None:
    """With the signers' keys every bit leads to its own line; one cosignature is enough, and still none is spare."""
    data = text(given)
    starts = [0]
    for at, byte in enumerate(data):
        if byte == 10:
            starts.append(at + 1)
    line = 0
    for at in range(len(data)):
        line += at == starts[line]  # lines count from 1
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            try:
                given = parse_export(io.BytesIO(changed))
                places = [f.place for f in found(given, needed=1, keys=KEYS)]
            except ProtocolError as error:
                places = [error.what]
            # a newline that is gone joins its line with the next
            assert any(f"line {line} " in f"{p} " or f"line {line}:" in p for p in places), (line, at, bit, places)


def test_without_keys_a_changed_entry_is_located_between_two_checkpoints(file: Path) -> None:
    for entry, (checkpoint, lines) in {0: (2, "2 to 3"), 3: (5, "4 to 6"), 6: (7, "7 to 8")}.items():
        other = list(ENTRIES)
        other[entry] = dsse.sign(b'{"n":99}', [AUTHOR]).encode()
        (finding, *rest) = found(replace(GOOD, entries=tuple(other)))
        assert finding.place == f"ledger.jsonl line {9 + SIZES.index(checkpoint)}"
        assert finding.reason == "forked_log"
        assert f"(lines {lines})" in finding.what
        assert [f.reason for f in rest] == []
        later = len(SIZES) - 1 - SIZES.index(checkpoint)
        assert (f"{later} later checkpoints" in finding.what) == (later > 0)


# --- the kinds of tampering


def test_a_reordered_log_is_a_fork() -> None:
    other = (*ENTRIES[:3], ENTRIES[4], ENTRIES[3], *ENTRIES[5:])
    assert one(replace(GOOD, entries=other), keys=KEYS) == ("ledger.jsonl line 10", "forked_log")


def test_a_log_without_its_end_is_truncated() -> None:
    assert one(replace(GOOD, entries=GOOD.entries[:5])) == ("ledger.jsonl line 9", "truncated_log")


def test_a_log_with_a_hole_is_a_fork_and_truncated() -> None:
    places = {(f.place, f.reason) for f in found(replace(GOOD, entries=(*GOOD.entries[:2], *GOOD.entries[3:])))}
    assert places == {("ledger.jsonl line 10", "truncated_log"), ("ledger.jsonl line 9", "forked_log")}


def test_what_no_checkpoint_covers_is_not_evidence() -> None:
    assert one(replace(GOOD, checkpoints=GOOD.checkpoints[:2])) == ("ledger.jsonl from line 7", "evidence_missing")
    assert one(replace(GOOD, checkpoints=())) == ("ledger.jsonl from line 2", "evidence_missing")
    assert found(Export(ORIGIN, (), ())) == ()


def test_a_checkpoint_that_too_few_members_cosigned_does_not_count() -> None:
    weak = replace(GOOD, checkpoints=(*GOOD.checkpoints[:2], signed(7, members=MEMBERS[:1])))
    places = [(f.place, f.reason) for f in found(weak)]
    assert places == [("ledger.jsonl line 11", "no_quorum"), ("ledger.jsonl from line 7", "evidence_missing")]


def test_a_stranger_under_a_checkpoint_is_named() -> None:
    stranger = PartyKeys.new("stranger")
    odd = replace(GOOD, checkpoints=(*GOOD.checkpoints[:2], signed(7, members=(*MEMBERS, stranger))))
    assert one(odd) == ("ledger.jsonl line 11", "unknown_signer")


def test_a_member_whose_clock_went_backwards_is_named() -> None:
    odd = replace(GOOD, checkpoints=(*GOOD.checkpoints[:2], signed(7, now=1004)))
    assert {(f.place, f.reason) for f in found(odd)} == {("ledger.jsonl line 11", "clock_backwards")}
    assert len(found(odd)) == 3


def test_two_histories_of_one_size_are_found() -> None:
    other = signed(5, [*ENTRIES[:4], ENTRIES[5]])
    given = replace(GOOD, checkpoints=(GOOD.checkpoints[0], other, GOOD.checkpoints[2]))
    assert one(given) == ("ledger.jsonl line 10", "forked_log")
    given = replace(GOOD, checkpoints=(*GOOD.checkpoints[:2], other, GOOD.checkpoints[2]))
    places = {(f.place, f.reason) for f in found(given)}
    assert places == {("ledger.jsonl line 11", "bad_checkpoint"), ("ledger.jsonl line 11", "forked_log")}


def test_checkpoints_stand_in_order() -> None:
    assert ("ledger.jsonl line 10", "bad_checkpoint") in {
        (f.place, f.reason) for f in found(replace(GOOD, checkpoints=(*GOOD.checkpoints[1::-1], GOOD.checkpoints[2])))
    }
    assert one(replace(GOOD, checkpoints=(*GOOD.checkpoints, GOOD.checkpoints[2]))) == (
        "ledger.jsonl line 12",
        "bad_checkpoint",
    )


def test_checkpoints_of_another_log_show_in_the_header() -> None:
    assert ("ledger.jsonl line 1", "foreign_bundle") in {
        (f.place, f.reason) for f in found(replace(GOOD, origin="fedmat/other"))
    }


def test_the_operators_key_may_have_been_replaced_on_the_way() -> None:
    new = PartyKeys.new("operator")
    body = notes.parse(GOOD.checkpoints[2]).body
    last = notes.sign(body, "operator", new) + "".join(notes.cosign(body, k.name, k, 2000) for k in MEMBERS)
    given = replace(GOOD, checkpoints=(*GOOD.checkpoints[:2], last))

    def operator(size: int) -> Verifier:
        return Verifier.of("operator", new) if size > 5 else OPERATED

    assert structure(given, operator, lambda size: WITNESSES, lambda size: 2) == ()
    assert ("ledger.jsonl line 11", "bad_signature") in {(f.place, f.reason) for f in found(given)}


def test_signatures_of_entries_are_verified_if_the_keys_are_given() -> None:
    forged = Export(ORIGIN, (dsse.Envelope(b"{}", dsse.PAYLOAD_TYPE, dsse.parse(ENTRIES[0]).signatures).encode(),), ())
    forged = replace(forged, checkpoints=(signed(1, forged.entries),))
    assert found(forged) == ()
    assert one(forged, keys=KEYS) == ("ledger.jsonl line 2 (entry 0)", "bad_signature")
    assert one(forged, keys={}) == ("ledger.jsonl line 2 (entry 0)", "unknown_signer")


# --- the form of the file


def _cut(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


@pytest.mark.parametrize(
    ("change", "line", "reason"),
    [
        (lambda d: b"", 1, "not_canonical"),
        (lambda d: b"\n" + d, 1, "not_canonical"),
        (lambda d: d[:-1], 11, "truncated_log"),
        (lambda d: d + b"\n", 12, "not_canonical"),
        (lambda d: d + b"{}\n", 12, "not_canonical"),
        (lambda d: _cut(d.split(b"\n")[:5]), 6, "truncated_log"),
        (lambda d: _cut(d.split(b"\n")[:7] + d.split(b"\n")[8:-1]), 8, "truncated_log"),
        (lambda d: d.replace(b'"size":7', b'"size":8'), 9, "truncated_log"),
        (lambda d: d.replace(b'"size":7', b'"size":6'), 8, "not_canonical"),
        (lambda d: d.replace(b'"size":7', b'"size":7.0'), 1, "not_canonical"),
        (lambda d: d.replace(b'"size":7', b'"size":true'), 1, "not_canonical"),
        (lambda d: d.replace(b'"size":7', b'"size":-1'), 1, "not_canonical"),
        (lambda d: d.replace(b"fedmat/ledger/1", b"fedmat/ledger/2"), 1, "not_canonical"),
        (lambda d: d.replace(b'"origin":"fedmat/test"', b'"origin":""'), 1, "not_canonical"),
        (lambda d: d.replace(b'{"payload"', b'{ "payload"', 1), 2, "not_canonical"),
        (lambda d: d.replace(b'{"checkpoint":"', b'{"checkpoint":"x\\n', 1), 9, "bad_checkpoint"),
        (lambda d: d + files.canonical_json({"checkpoint": 7}) + b"\n", 12, "not_canonical"),
        (lambda d: d + json.dumps({"checkpoint": GOOD.checkpoints[0]}).encode() + b"\n", 12, "not_canonical"),
    ],
)
def test_a_line_that_is_not_what_it_must_be_is_named(
    file: Path, change: Callable[[bytes], bytes], line: int, reason: str
) -> None:
    what, why = refused(file, change(text(GOOD)))
    assert f"line {line}" in what.replace(":", " ").replace("(", " "), what
    assert f"line {line} " in what.replace(":", " ")
    assert why == reason


def test_no_message_repeats_what_an_entry_says(file: Path) -> None:
    secret = dsse.sign(b"SECRET-42", [AUTHOR]).encode()
    for data in (secret.replace(b'"payloadType"', b'"payloadTypE"'), b"SECRET-42", b'{"payload":"SECRET-42"}'):
        what, _ = refused(file, text(GOOD).replace(ENTRIES[2], data))
        assert "SECRET" not in what and "U0VDUkVULTQy" not in what
