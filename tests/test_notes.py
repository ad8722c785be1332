"""Signed notes: published examples of the format, and everything that only looks like one."""

from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedmat.errors import ProtocolError
from fedmat.keys import PartyKeys
from fedmat.ledger import notes
from fedmat.ledger.notes import COSIGNATURE, SIGNATURE, Verifier
from fedmat.ledger.text import b64, number, unb64

# The example of golang.org/x/mod/sumdb/note, from which the format comes.
PETER = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
PETER_PRIVATE = "AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz"
ENOCH = "EnochRoot+af0cfe78+ATtqJ7zOtqQtYqOo0CpvDXNlMhV3HeJDpjrASKGLWdop"
TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
PETER_LINE = "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
ENOCH_LINE = "— EnochRoot rwz+eBzmZa0SO3NbfRGzPCpDckykFXSdeX+MNtCOXm2/5n2tiOHp+vAF1aGrQ5ovTG01oOTGwnWLox33WWd1RvMc+QQ=\n"
# The example of c2sp.org/signed-note.
FOO = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"
FOO_NOTE = (
    "This is an example message.\n\n"
    "— example.com/foo Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuwHjG1Yu72IneyaQM=\n"
)
# A checkpoint of a public log with cosignatures of public witnesses, as it was published.
ARCHE = "arche2025h1.staging.ct.transparency.dev+ba2f06c0+AU0vHmlGCS/PdN8b2OaGmKprLI8HKM+dJ472xgFYh15f"
REMORA = "remora.n621.de+da77ade7+BOvN63jn/bLvkieywe8R6UYAtVtNbZpXh34x7onlmtw2"
REAL = """arche2025h1.staging.ct.transparency.dev
1432088532
U7WM79jrzyhGZ5/GUBTpM7NzwdyfFx61t3RovgcC4Ro=

— arche2025h1.staging.ct.transparency.dev zTM8sQAAAZ5W0WdjBAMARjBEAiBjW5IQf9pvsYLfQFX6hoGREPMHbdQ3urbllzalApkptQIgIpwtEroeW2BXaHAI4kJXFbon5Ch9MNL5zRNZ55lvGt0=
— arche2025h1.staging.ct.transparency.dev ui8GwCF1+kWqZrxGdhj4aX3gcw7XUlXQQabg/27lefwhUkzbC3NygNI75MdhL1bfTW9g8Ei59RA23oHP7Ry1k3ZFWwQ=
— transparency.dev/DEV:witness-little-garden 2AQqhwAAAABqEiEgzgFIqqhbUoDwjMWE6UP8nd8/KYTzwZ2rhIgcqoXHAwVkjZr4AscylP3v7sEodkRAErumC2q44vdgJY096st5BQ==
— witness1.smartit.nu/witness1 pIyCDwAAAABqEiEghIp82KWebrw7/oHQwlTAm3g2RKS4+eebl8eO0WH+/iEcxZ75W3u5hNI7TOQtmJbqmNWVuE0tgh0XwzdZsDsUAQ==
— remora.n621.de 2net5wAAAABqEiEgPlfF3V06o0Y+fHM+J5J9s27wgxxcOVSpZ/2g/KSiXCg9DEZI+aVCIobWX9sXTynk5XeU/zZ0WBxtqB0DrAWfBw==
— witness.stagemole.eu Z/euoAAAAABqEiEgw0i+7g2ENfDAWHmtRzCfKTHSDwYDJA2NmKeGi9Y8FtEyOUvVr+AJmIY/2TUFucgKi7lI7cUiOvKFYe/TmN9DAg==
"""

OPERATOR = PartyKeys.new("operator")
MEMBERS = tuple(PartyKeys.new(f"member-{i}") for i in range(3))
ORIGIN, ROOT = "fedmat/test", bytes(range(32))
BODY = notes.checkpoint(ORIGIN, 17, ROOT)
OPERATED = Verifier.of("operator", OPERATOR)
WITNESSES = tuple(Verifier.of(k.name, k) for k in MEMBERS)


def verifier(vkey: str) -> Verifier:
    name, _, key = vkey.split("+", 2)
    return Verifier(name, base64.b64decode(key)[1:])


def signed(count: int = 3) -> str:
    lines = [notes.cosign(BODY, k.name, k, 1000 + i) for i, k in enumerate(MEMBERS[:count])]
    return notes.sign(BODY, "operator", OPERATOR) + "".join(lines)


def refused(note: str, needed: int = 0, witnesses: tuple[Verifier, ...] = WITNESSES, operator: Verifier = OPERATED) -> str:
    with pytest.raises(ProtocolError) as caught:
        notes.verify(note, operator, witnesses, needed)
    return caught.value.reason


# --- published examples


@pytest.mark.parametrize("vkey", [PETER, ENOCH, FOO, ARCHE])
def test_a_key_has_the_name_that_others_give_it(vkey: str) -> None:
    assert verifier(vkey).vkey(SIGNATURE) == vkey


def test_a_witness_key_has_the_name_that_others_give_it() -> None:
    assert verifier(REMORA).vkey(COSIGNATURE) == REMORA


def test_published_notes_verify() -> None:
    assert notes.verified(notes.parse(f"{TEXT}\n{PETER_LINE}{ENOCH_LINE}"), verifier(PETER), SIGNATURE) == (0,)
    assert notes.verified(notes.parse(f"{TEXT}\n{PETER_LINE}{ENOCH_LINE}"), verifier(ENOCH), SIGNATURE) == (0,)
    assert notes.verified(notes.parse(FOO_NOTE), verifier(FOO), SIGNATURE) == (0,)
    assert notes.verified(notes.parse(FOO_NOTE), verifier(PETER), SIGNATURE) == ()
    with pytest.raises(ProtocolError, match="bad_signature"):
        notes.verified(notes.parse(f"{TEXT.replace('problem', 'progress')}\n{PETER_LINE}"), verifier(PETER), SIGNATURE)


def test_a_published_note_is_signed_to_the_byte() -> None:
    key = Ed25519PrivateKey.from_private_bytes(base64.b64decode(PETER_PRIVATE)[1:])
    peter = PartyKeys("PeterNeumann", "x25519", key, bytes(32))
    assert notes.sign(TEXT, "PeterNeumann", peter) == f"{TEXT}\n{PETER_LINE}"


def test_a_published_checkpoint_with_cosignatures_verifies() -> None:
    found = notes.verify(REAL, verifier(ARCHE), [verifier(REMORA)], 1)
    assert (found.origin, found.size) == ("arche2025h1.staging.ct.transparency.dev", 1432088532)
    assert found.cosigners == {"remora.n621.de": 1779573024}
    assert refused(REAL.replace("1432088532", "1432088533"), 0, (), verifier(ARCHE)) == "bad_signature"
    assert refused(REAL, 2, (verifier(REMORA),), verifier(ARCHE)) == "no_quorum"


# --- our own


def test_a_checkpoint_comes_back() -> None:
    found = notes.verify(signed(), OPERATED, WITNESSES, 3)
    assert (found.origin, found.size, found.root, found.note) == (ORIGIN, 17, ROOT, signed())
    assert found.cosigners == {"member-0": 1000, "member-1": 1001, "member-2": 1002}


def test_a_cosignature_is_no_signature_and_the_other_way_round() -> None:
    alone = f"{BODY}\n{notes.cosign(BODY, 'operator', OPERATOR, 5)}"
    assert refused(alone) == "bad_signature"
    twice = notes.sign(BODY, "operator", OPERATOR)
    assert notes.verify(twice, OPERATED, [OPERATED], 0).cosigners == {}


def test_a_quorum_counts_members_not_lines() -> None:
    line = notes.cosign(BODY, "member-0", MEMBERS[0], 900)
    note = signed(1) + line + line
    assert notes.verify(note, OPERATED, WITNESSES, 1).cosigners == {"member-0": 900}  # the earliest is what they prove
    assert refused(note, 2) == "no_quorum"
    assert refused(signed(), 4) == "no_quorum"
    assert refused(signed(), -1) == "no_quorum"


def test_a_member_that_replaces_its_key_counts_once_with_both() -> None:
    new = PartyKeys.new("member-0")
    note = signed(1) + notes.cosign(BODY, "member-0", new, 7)
    witnesses = (*WITNESSES, Verifier.of("member-0", new))
    assert notes.verify(note, OPERATED, witnesses, 1).cosigners == {"member-0": 7}
    assert refused(note, 2, witnesses) == "no_quorum"


def test_one_key_is_not_two_members() -> None:
    sibling = Verifier("member-9", WITNESSES[0].public)
    assert refused(signed(), 0, (*WITNESSES, sibling)) == "shared_key"


def test_lines_of_unknown_keys_are_ignored() -> None:
    stranger = PartyKeys.new("stranger")
    note = signed() + notes.cosign(BODY, "stranger", stranger, 5) + notes.cosign(BODY, "member-1", stranger, 5)
    note += f"— another/kind {b64(b'abcd' + bytes(2420))}\n"  # as long as a signature of ML-DSA-44
    assert len(notes.verify(note, OPERATED, WITNESSES, 3).cosigners) == 3
    assert notes.strangers(notes.parse(note), OPERATED, WITNESSES) == ("stranger", "member-1", "another/kind")
    assert refused(note, 0, operator=Verifier.of("operator", stranger)) == "bad_signature"


def test_a_bad_signature_of_a_known_key_is_fatal() -> None:
    lines = signed().split("\n")
    for at in (4, 5, 7):  # the operator's, two members'
        name, value = lines[at][2:].split(" ")
        raw = bytearray(unb64(value))
        raw[-1] ^= 1
        changed = "\n".join([*lines[:at], f"— {name} {b64(bytes(raw))}", *lines[at + 1 :]])
        assert refused(changed) == "bad_signature"
        short = "\n".join([*lines[:at], f"— {name} {b64(bytes(raw[:20]))}", *lines[at + 1 :]])
        assert refused(short) == "bad_signature"


def test_a_cosignature_holds_its_time() -> None:
    lines = signed().split("\n")
    raw = bytearray(unb64(lines[5].split(" ")[2]))
    raw[11] ^= 1
    lines[5] = f"— member-0 {b64(bytes(raw))}"
    assert refused("\n".join(lines)) == "bad_signature"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda n: n[:-1],  # the last line does not end
        lambda n: n + "\n",
        lambda n: n + "x",
        lambda n: n + "trailing\n",
        lambda n: n.replace("\n\n", "\n"),
        lambda n: n.replace("\n17\n", "\n017\n"),
        lambda n: n.replace("\n17\n", "\n+17\n"),
        lambda n: n.replace("\n17\n", "\n17 \n"),
        lambda n: n.replace("\n17\n", "\n1_7\n"),
        lambda n: n.replace("\n17\n", "\n١٧\n"),  # Arabic digits, which int() reads
        lambda n: n.replace("\n17\n", "\n-1\n"),
        lambda n: n.replace("\n17\n", f"\n{10**18}\n"),
        lambda n: n.replace("\n17\n", "\n0\n"),  # with a root that is not the empty one
        lambda n: n.replace(f"{ORIGIN}\n", "\n"),
        lambda n: n.replace("\n\n", "\nextension\n\n"),
        lambda n: n.replace("8=\n\n", "9=\n\n"),  # pad bits
        lambda n: n.replace("8=\n\n", "8\n\n"),
        lambda n: n.replace("8=\n\n", "8= \n\n"),
        lambda n: n.replace("— operator", "- operator"),
        lambda n: n.replace("— operator", "—  operator"),
        lambda n: n.replace("— operator", "— "),
        lambda n: n.replace("— operator", "— oper+ator"),
        lambda n: n.replace("— operator", "— oper\u2003ator"),
        lambda n: n.replace("\n17\n", "\r\n17\n"),
        lambda n: n.replace("fedmat", "fed\x00mat"),
        lambda n: n.replace("fedmat", "fed\ud800mat"),
        lambda n: "",
        lambda n: BODY,
        lambda n: BODY + "\n",
        lambda n: BODY + "\n" + "— a " + b64(b"abcd") + "\n",  # a key and no signature
        lambda n: n + "— a aaaaaa==\n" * (notes.MOST_SIGNATURES + 1),
    ],
)
def test_a_second_spelling_is_no_checkpoint(spoil: object) -> None:
    note = spoil(signed())  # type: ignore[operator]
    assert note != signed()
    assert refused(note) == "bad_checkpoint"


def test_one_flipped_bit_is_detected() -> None:
    """With every signature needed, no bit of a note can change unseen."""
    note = signed().encode()
    for bit in range(8 * len(note)):
        changed = bytearray(note)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            text = bytes(changed).decode()
        except UnicodeDecodeError:
            continue
        assert refused(text, 3) in {"bad_checkpoint", "bad_signature", "no_quorum"}


@pytest.mark.parametrize(
    ("origin", "size", "root"),
    [("", 1, ROOT), ("a\nb", 1, ROOT), ("a", -1, ROOT), ("a", 1, ROOT[:31]), ("a\x07", 1, ROOT), ("a", 0, ROOT)],
)
def test_no_checkpoint_is_written_that_nobody_could_read(origin: str, size: int, root: bytes) -> None:
    with pytest.raises(ProtocolError, match="bad_checkpoint"):
        notes.checkpoint(origin, size, root)


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\tb", "a\nb", "a\u00a0b"])
def test_a_name_is_one_word(name: str) -> None:
    with pytest.raises(ProtocolError, match="bad_checkpoint"):
        notes.sign(BODY, name, OPERATOR)


def test_a_key_has_32_bytes() -> None:
    with pytest.raises(ProtocolError, match="bad_key"):
        Verifier("a", bytes(31))


@given(st.text(max_size=12), st.integers(0, 10**18 - 1), st.binary(min_size=32, max_size=32))
def test_what_is_written_is_read(origin: str, size: int, root: bytes) -> None:
    try:
        body = notes.checkpoint(origin, size, root)
    except ProtocolError:
        return  # an origin of no characters or with a control character, or a log of nothing with a root
    assert notes.read(body) == (origin, size, root)
    note = notes.sign(body, "operator", OPERATOR)
    assert notes.parse(note).body == body
    assert notes.verify(note, OPERATED, (), 0).size == size


@given(st.binary(max_size=40))
def test_bytes_have_one_text(data: bytes) -> None:
    assert unb64(b64(data)) == data
    for text in (b64(data) + "\n", " " + b64(data), b64(data) + "="):
        with pytest.raises(ValueError):
            unb64(text)


def test_numbers_have_one_text() -> None:
    assert [number(t) for t in ("0", "7", "10", "9" * 18)] == [0, 7, 10, 10**18 - 1]
    for text in ("", "00", "01", "-1", "+1", " 1", "1 ", "1\n", "1.0", "1e3", "٣", "1" + "0" * 18):
        with pytest.raises(ValueError):
            number(text)
