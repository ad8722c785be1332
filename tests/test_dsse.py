"""Signed envelopes: the format's own vectors, another library, and one spelling only."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope as Theirs
from securesystemslib.signer import CryptoSigner, Key, SSlibKey  # type: ignore[attr-defined]

from fedmat import files
from fedmat.errors import ProtocolError
from fedmat.keys import PartyKeys
from fedmat.ledger import dsse
from fedmat.ledger.dsse import PAYLOAD_TYPE, Envelope

KEYS = sorted((PartyKeys.new(n) for n in "abc"), key=lambda k: dsse.key_id(k.signing.public_key().public_bytes_raw()))
PUBLIC = {dsse.key_id(raw): raw for raw in (k.signing.public_key().public_bytes_raw() for k in KEYS)}
PAYLOAD = b'{"type":"approval"}'
ENVELOPE = dsse.sign(PAYLOAD, KEYS)


def verifies(data: bytes) -> bool:
    """Whether it is an envelope of which every signature is by a key that is known, over this payload."""
    try:
        found = dsse.parse(data)
        for keyid in found.signers:
            dsse.verify(found, keyid, PUBLIC[keyid])
    except (ProtocolError, KeyError):
        return False
    return True


def refused(data: bytes) -> str:
    with pytest.raises(ProtocolError) as caught:
        dsse.parse(data)
    return caught.value.reason


def test_the_encoding_that_is_signed_is_the_published_one() -> None:
    assert (
        dsse.pae("http://example.com/HelloWorld", b"hello world") == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    assert dsse.pae("é", b"\x00") == b"DSSEv1 2 \xc3\xa9 1 \x00"


def test_another_library_reads_ours_and_agrees() -> None:
    theirs = Theirs.from_dict(json.loads(ENVELOPE.encode()))
    assert (theirs.payload, theirs.payload_type) == (PAYLOAD, PAYLOAD_TYPE)
    assert theirs.pae() == dsse.pae(PAYLOAD_TYPE, PAYLOAD)
    keys: list[Key] = [SSlibKey(k, "ed25519", "ed25519", {"public": raw.hex()}) for k, raw in PUBLIC.items()]
    assert set(theirs.verify(keys, 3)) == set(PUBLIC)
    assert files.canonical_json(theirs.to_dict()) == ENVELOPE.encode()


def test_we_read_what_another_library_signed() -> None:
    theirs = Theirs(PAYLOAD, PAYLOAD_TYPE, {})
    for keyid, keys in zip(PUBLIC, KEYS):
        signer = CryptoSigner(keys.signing, SSlibKey(keyid, "ed25519", "ed25519", {"public": PUBLIC[keyid].hex()}))
        theirs.sign(signer)
    assert dsse.parse(files.canonical_json(theirs.to_dict())) == ENVELOPE


def test_an_envelope_comes_back_and_verifies() -> None:
    found = dsse.parse(ENVELOPE.encode())
    assert found == ENVELOPE
    assert found.signers == tuple(PUBLIC)
    assert found.payload_sha256 == files.sha256(PAYLOAD)
    for keyid, public in PUBLIC.items():
        assert re.fullmatch("[0-9a-f]{16}", keyid)
        dsse.verify(found, keyid, public)


@pytest.mark.parametrize("change", ["payload", "type", "signature", "other key", "no such key"])
def test_a_signature_that_is_not_over_this_payload_is_refused(change: str) -> None:
    keyid, public = next(iter(PUBLIC.items()))
    envelope = ENVELOPE
    if change == "payload":
        envelope = Envelope(PAYLOAD + b" ", PAYLOAD_TYPE, ENVELOPE.signatures)
    if change == "type":
        envelope = Envelope(PAYLOAD, "text/plain", ENVELOPE.signatures)
    if change == "signature":
        envelope = Envelope(PAYLOAD, PAYLOAD_TYPE, ((keyid, bytes(64)), *ENVELOPE.signatures[1:]))
    if change == "other key":
        public = PUBLIC[ENVELOPE.signers[1]]
    if change == "no such key":
        envelope = Envelope(PAYLOAD, PAYLOAD_TYPE, ENVELOPE.signatures[1:])
    with pytest.raises(ProtocolError) as caught:
        dsse.verify(envelope, keyid, public)
    assert caught.value.reason == "bad_signature"


def test_the_order_of_signers_does_not_matter() -> None:
    assert dsse.sign(PAYLOAD, KEYS[::-1]).encode() == ENVELOPE.encode() == dsse.sign(PAYLOAD, [*KEYS, KEYS[0]]).encode()


def test_other_spellings_are_refused() -> None:
    good = json.loads(ENVELOPE.encode())
    encode = files.canonical_json
    two = good["signatures"][:2]
    for data in (
        json.dumps(good).encode(),
        ENVELOPE.encode() + b"\n",
        b" " + ENVELOPE.encode(),
        b"",
        b"null",
        b"[]",
        b"[" * 100_000,
        b'"\\ud800"',
        b"\xff",
        encode({**good, "signatures": two[::-1]}),
        encode({**good, "signatures": [two[0], two[0]]}),
        encode({**good, "signatures": []}),
        encode({**good, "extra": 1}),
        encode({k: v for k, v in good.items() if k != "payloadType"}),
        encode({**good, "payload": good["payload"].rstrip("=")}),
        encode({**good, "payload": good["payload"][:4] + "\n" + good["payload"][4:]}),
        encode({**good, "payload": 7}),
        encode({**good, "payloadType": 'a"b'}),
        encode({**good, "payloadType": "a\\b"}),
        encode({**good, "payloadType": "a b"}),
        encode({**good, "payloadType": ""}),
        encode({**good, "payloadType": None}),
        encode({**good, "signatures": [{**two[0], "keyid": two[0]["keyid"].upper() + "A"}]}),
        encode({**good, "signatures": [{**two[0], "keyid": two[0]["keyid"] + "\n"}]}),
        encode({**good, "signatures": [{**two[0], "sig": "AAAA"}]}),
        encode({**good, "signatures": [{**two[0], "more": 1}]}),
        encode({**good, "signatures": {"keyid": "a", "sig": "b"}}),
        ENVELOPE.encode().replace(b'{"payload":', b'{"payload":"","payload":', 1),  # twice the same name
        ENVELOPE.encode().replace(b"application/", b"application\\/", 1),
    ):
        assert refused(data) == "not_canonical"


def test_pad_bits_are_not_free() -> None:
    envelope = dsse.sign(b"1234", KEYS[:1]).encode()
    assert b'"MTIzNA=="' in envelope
    for last in b"BCDEFGHIJKLMNOP":  # the same bytes for a lenient reader
        assert refused(envelope.replace(b'"MTIzNA=="', b'"MTIzN' + bytes([last]) + b'=="')) == "not_canonical"


def test_one_flipped_bit_is_detected() -> None:
    data = dsse.sign(PAYLOAD, KEYS[:2]).encode()
    assert verifies(data)
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert not verifies(bytes(changed)), bit


@given(st.text(st.characters(codec="ascii"), max_size=3))
def test_a_payload_type_is_written_as_it_is_or_refused(payload_type: str) -> None:
    plain = payload_type != "" and files.canonical_json(payload_type) == b'"%b"' % payload_type.encode()
    plain = plain and all(" " < c <= "~" for c in payload_type)
    try:
        dsse.sign(PAYLOAD, KEYS[:1], payload_type)
    except ProtocolError:
        assert not plain
    else:
        assert plain


@given(st.binary(max_size=200), st.integers(1, 3), st.from_regex(r"[!#-\[\]-~]{1,20}", fullmatch=True))
def test_the_bytes_are_canonical_json(payload: bytes, count: int, payload_type: str) -> None:
    envelope = dsse.sign(payload, KEYS[:count], payload_type)
    data = envelope.encode()
    assert files.canonical_json(json.loads(data)) == data
    assert dsse.parse(data) == envelope


@given(st.binary(max_size=60))
def test_noise_is_refused(data: bytes) -> None:
    assert refused(data) == "not_canonical"
