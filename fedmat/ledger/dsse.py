"""Signed envelopes: a payload and who signed it, in exactly one sequence of bytes.

Knows: the envelope, its signatures, its canonical bytes. Refuses to know: what the payload says, whose key is whose and until
when.

Equal envelopes are equal bytes: canonical JSON, canonical base64, signatures in the order of their key ids, one per key. Any
other spelling is refused, so that no bit can change unseen and no entry can be brought twice in two spellings. The signatures
do not cover each other: whoever holds an envelope can take a signature off or add its own. Who must have signed, and that a
payload counts once, is for the reader to check.

References:
    DSSE: Dead Simple Signing Envelope v1.0, protocol.md (pre-authentication encoding) and envelope.md, secure-systems-lab.
    RFC 8785 (canonical JSON). RFC 8032 (Ed25519).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedmat import files
from fedmat.errors import ProtocolError
from fedmat.keys import PartyKeys
from fedmat.ledger.text import b64, unb64

PAYLOAD_TYPE = "application/vnd.fedmat.ledger-entry+json"

_KEY_ID = re.compile(r"[0-9a-f]{16}")
_TYPE = re.compile(r"[!#-\[\]-~]{1,200}")  # what JSON writes as it is: no quotation mark, no backslash


def pae(payload_type: str, payload: bytes) -> bytes:
    """Returns what is signed: the pre-authentication encoding, which binds the payload to its type."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def key_id(public: bytes) -> str:
    """Returns the name of a raw public key: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(public).hexdigest()[:16]


@dataclass(frozen=True)
class Envelope:
    """A payload with its signatures; what is in it has the right form, and nothing is verified.

    Attributes:
        signatures: (key id, 64 bytes), at least one, sorted by key id, one per key.

    Raises:
        ProtocolError: not_canonical.
    """

    payload: bytes
    payload_type: str
    signatures: tuple[tuple[str, bytes], ...]

    def __post_init__(self) -> None:
        ids = [k for k, _ in self.signatures]
        if not ids or ids != sorted(set(ids)):
            raise _refused("signatures in the order of their key ids, at least one, one per key")
        if not _TYPE.fullmatch(self.payload_type):
            raise _refused("a payload type in printable ASCII without quotation marks and backslashes")
        if not all(_KEY_ID.fullmatch(k) and len(s) == 64 for k, s in self.signatures):
            raise _refused("key ids of 16 hex digits and signatures of 64 bytes")

    @property
    def signers(self) -> tuple[str, ...]:
        """The key ids, not verified."""
        return tuple(k for k, _ in self.signatures)

    @property
    def payload_sha256(self) -> str:
        """Hex digest of the payload, which stays the same whoever signs it."""
        return files.sha256(self.payload)

    def encode(self) -> bytes:
        """Returns the canonical bytes: what ``files.canonical_json`` gives, written out, since no text in it needs an escape."""
        signatures = ",".join([f'{{"keyid":"{k}","sig":"{b64(s)}"}}' for k, s in self.signatures])
        text = f'{{"payload":"{b64(self.payload)}","payloadType":"{self.payload_type}","signatures":[{signatures}]}}'
        return text.encode("ascii")


def parse(data: bytes) -> Envelope:
    """Returns the envelope of which these are the canonical bytes.

    Raises:
        ProtocolError: not_canonical (anything else, were it another spelling of an envelope).
    """
    try:
        found = json.loads(data)
        envelope = Envelope(
            unb64(found["payload"]),
            found["payloadType"],
            tuple((s["keyid"], unb64(s["sig"])) for s in found["signatures"]),
        )
        same = envelope.encode() == data
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        same = False
    if not same:
        raise _refused("the canonical bytes of a signed envelope")
    return envelope


def sign(payload: bytes, signers: Sequence[PartyKeys], payload_type: str = PAYLOAD_TYPE) -> Envelope:
    """Returns the envelope of a payload, signed by every one of ``signers``."""
    message = pae(payload_type, payload)
    signed = {key_id(k.signing.public_key().public_bytes_raw()): k.sign(message) for k in signers}
    return Envelope(payload, payload_type, tuple(sorted(signed.items())))


def verify(envelope: Envelope, keyid: str, public: bytes) -> None:
    """Verifies one signature.

    Args:
        public: the raw public key that ``keyid`` stands for.

    Raises:
        ProtocolError: bad_signature (there is none of this key, it is wrong, or the key has another id).
    """
    signature = dict(envelope.signatures).get(keyid)
    if signature is None or key_id(public) != keyid:
        raise ProtocolError("bad_signature", f"there is no signature by key {keyid}")
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, pae(envelope.payload_type, envelope.payload))
    except (InvalidSignature, ValueError):
        raise ProtocolError("bad_signature", f"the signature by key {keyid} is not over this payload") from None


def _refused(expected: str) -> ProtocolError:
    return ProtocolError("not_canonical", f"not a signed envelope in canonical form; expected {expected}")
