"""Signed notes: what the operator of a log says its tree is, and the members' cosignatures under it.

Knows: the text of a checkpoint (origin, size, root), who signed it and who cosigned it when. Refuses to know: the tree, the
clock, and who may be a witness (:func:`verify` is told).

A checkpoint that enough members cosigned cannot have a second version at the same size: each member cosigns one history only
(``fedmat.ledger.witness``). Lines of unknown keys are ignored, as the format demands, so that other kinds of signatures can be
added; a bad signature of a known key is an error, never "one less".

References:
    C2SP signed-note, tlog-checkpoint, and tlog-cosignature (cosignature/v1, Ed25519), https://c2sp.org.
    RFC 8032 (Ed25519).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedmat.errors import ProtocolError
from fedmat.keys import PartyKeys
from fedmat.ledger.merkle import EMPTY, HASH_BYTES
from fedmat.ledger.text import b64, number, unb64

Kind = Literal[1, 4]
SIGNATURE: Kind = 1  # Ed25519 over the text
COSIGNATURE: Kind = 4  # Ed25519 over a time and the text, cosignature/v1
MOST_SIGNATURES = 1000  # more lines than members and operators that will ever be; a bound for whoever reads a foreign note

_DASH = "\u2014 "
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f]")


@dataclass(frozen=True)
class Verifier:
    """A name and the public key that signs under it.

    Attributes:
        public: raw Ed25519 public key, 32 bytes.
    """

    name: str
    public: bytes

    def __post_init__(self) -> None:
        _check_name(self.name)
        if len(self.public) != 32:
            raise ProtocolError("bad_key", f"the public key of {self.name} has {len(self.public)} bytes, not 32")

    @classmethod
    def of(cls, name: str, keys: PartyKeys) -> Verifier:
        """Returns the verifier of a party's own keys."""
        return cls(name, keys.signing.public_key().public_bytes_raw())

    def key_id(self, kind: Kind) -> bytes:
        """Returns the 4 bytes by which a signature line names its key and the kind of signature."""
        return hashlib.sha256(self.name.encode() + b"\n" + bytes([kind]) + self.public).digest()[:4]

    def vkey(self, kind: Kind) -> str:
        """Returns the key in the text form that other tools of the format read: name, id and key, joined by ``+``."""
        return f"{self.name}+{self.key_id(kind).hex()}+{b64(bytes([kind]) + self.public)}"


@dataclass(frozen=True)
class Signature:
    """One line under a note, not verified: the key it names and the bytes after the key's id."""

    name: str
    key_id: bytes
    value: bytes
    line: str

    def by(self, verifier: Verifier, kind: Kind) -> bool:
        """Tells whether the line says that it is this key's, of this kind."""
        return (self.name, self.key_id) == (verifier.name, verifier.key_id(kind))


@dataclass(frozen=True)
class Note:
    """A note taken apart; nothing in it is verified.

    Attributes:
        body: the text that is signed, with its last newline.
    """

    body: str
    signatures: tuple[Signature, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        root: 32 bytes.
        note: the whole note it was read from.
        cosigners: verified witnesses -> when each says it saw this to be the log (seconds since 1970).
    """

    origin: str
    size: int
    root: bytes
    note: str
    cosigners: dict[str, int] = field(default_factory=dict)


# --- writing ---------------------------------------------------------------------------------------------------------


def checkpoint(origin: str, size: int, root: bytes) -> str:
    """Returns the text of a checkpoint.

    Args:
        origin: names the log for ever, e.g. ``fedmat/solid-electrolytes``: non-empty, one line.

    Raises:
        ProtocolError: bad_checkpoint.
    """
    if not origin or "\n" in origin or _CONTROL.search(origin):
        raise ProtocolError("bad_checkpoint", "a log's origin is one non-empty line of text")
    if size < 0 or len(root) != HASH_BYTES:
        raise ProtocolError("bad_checkpoint", f"a checkpoint of {origin} has a size of 0 or more and a root of 32 bytes")
    body = f"{origin}\n{size}\n{b64(root)}\n"
    read(body)  # refuses here what every reader would refuse
    return body


def sign(body: str, name: str, keys: PartyKeys) -> str:
    """Returns the note: the text, an empty line, and the operator's signature line."""
    _check_body(body)
    return f"{body}\n{_line(Verifier.of(name, keys), SIGNATURE, keys.sign(body.encode()))}"


def cosign(body: str, name: str, keys: PartyKeys, time: int) -> str:
    """Returns a witness's signature line, which goes at the end of the note.

    Args:
        time: seconds since 1970.
    """
    _check_body(body)
    signed = keys.sign(_cosigned(body, time))
    return _line(Verifier.of(name, keys), COSIGNATURE, time.to_bytes(8, "big") + signed)


def _line(verifier: Verifier, kind: Kind, value: bytes) -> str:
    return f"{_DASH}{verifier.name} {b64(verifier.key_id(kind) + value)}\n"


def _cosigned(body: str, time: int) -> bytes:
    return f"cosignature/v1\ntime {time}\n{body}".encode()


# --- reading ---------------------------------------------------------------------------------------------------------


def parse(note: str) -> Note:
    """Takes a note apart without verifying anything.

    Raises:
        ProtocolError: bad_checkpoint (not a signed note, or one with a second spelling of the same content).
    """
    text, separator, lines = note.rpartition("\n\n")
    if not separator or not lines.endswith("\n"):
        raise _malformed("a text, an empty line and lines of signatures, the last one ended")
    body = text + "\n"
    _check_body(body)
    found = lines.removesuffix("\n").split("\n")
    if len(found) > MOST_SIGNATURES:
        raise _malformed(f"at most {MOST_SIGNATURES} signatures")
    return Note(body, tuple(signature(line + "\n") for line in found))


def signature(line: str) -> Signature:
    """Takes one signature line apart.

    Raises:
        ProtocolError: bad_checkpoint.
    """
    words = line.removeprefix(_DASH).removesuffix("\n").split(" ")
    try:
        if not line.startswith(_DASH) or not line.endswith("\n") or len(words) != 2:
            raise ValueError("not a line of a signature")
        value = unb64(words[1])
        _check_name(words[0])
    except ValueError:
        raise _malformed("lines of a dash, a name and a signature in base64") from None
    if len(value) < 5:
        raise _malformed("signatures of more than four bytes")
    return Signature(words[0], value[:4], value[4:], line)


def read(body: str) -> tuple[str, int, bytes]:
    """Returns origin, size and root of a checkpoint's text. Lines beyond the three are refused: nobody could audit them.

    Raises:
        ProtocolError: bad_checkpoint.
    """
    _check_body(body)
    lines = body.split("\n")
    try:
        if len(lines) != 4 or not lines[0]:
            raise ValueError("not three lines")
        size, root = number(lines[1]), unb64(lines[2])
        if len(root) != HASH_BYTES or (size == 0 and root != EMPTY):
            raise ValueError("not a root")
    except ValueError:
        raise _malformed("three lines: origin, number of entries, root in base64") from None
    return lines[0], size, root


def verified(note: Note, verifier: Verifier, kind: Kind) -> tuple[int, ...]:
    """Verifies every line of one key.

    Returns:
        For each of its lines the time it tells (0 for a plain signature); nothing if there is none.

    Raises:
        ProtocolError: bad_signature.
    """
    times = []
    for line in note.signatures:
        if not line.by(verifier, kind):
            continue
        time, value, message = 0, line.value, note.body.encode()
        if kind == COSIGNATURE:
            time, value = int.from_bytes(value[:8], "big"), value[8:]
            message = _cosigned(note.body, time)
        try:
            Ed25519PublicKey.from_public_bytes(verifier.public).verify(value, message)
        except (InvalidSignature, ValueError):
            what = "cosignature" if kind == COSIGNATURE else "signature"
            raise ProtocolError(
                "bad_signature", f"the {what} of {verifier.name} under a checkpoint is not by its key", fix="get the note again"
            ) from None
        times.append(time)
    return tuple(times)


def verify(note: str, operator: Verifier, witnesses: Sequence[Verifier], needed: int) -> Checkpoint:
    """Verifies a checkpoint.

    Args:
        witnesses: who may cosign; a name may have two keys while it replaces one, a key may not have two names.
        needed: fewest witnesses, counted by name, whose cosignatures must be there and good.

    Raises:
        ProtocolError: bad_checkpoint, bad_signature (the operator's is missing, or any known key's is wrong), shared_key (two
            names with one key), no_quorum (fewer than ``needed``).
    """
    _check_apart(witnesses)
    taken = parse(note)
    origin, size, root = read(taken.body)
    if not verified(taken, operator, SIGNATURE):
        raise ProtocolError(
            "bad_signature", f"checkpoint {size} of {origin} is not signed by {operator.name}", fix="get the note again"
        )
    cosigners: dict[str, int] = {}
    for witness in witnesses:
        for time in verified(taken, witness, COSIGNATURE):  # repeated lines count once: the earliest time is what they prove
            cosigners[witness.name] = min(time, cosigners.get(witness.name, time))
    if len(cosigners) < needed or needed < 0:
        raise ProtocolError(
            "no_quorum",
            f"checkpoint {size} of {origin} is cosigned by {len(cosigners)} members, {needed} are needed",
            fix="collect the members' cosignatures",
        )
    return Checkpoint(origin, size, root, note, cosigners)


def strangers(note: Note, operator: Verifier, witnesses: Sequence[Verifier]) -> tuple[str, ...]:
    """Returns the names on signature lines that belong to none of these keys."""
    known = {(operator.name, operator.key_id(SIGNATURE))} | {(w.name, w.key_id(COSIGNATURE)) for w in witnesses}
    return tuple(s.name for s in note.signatures if (s.name, s.key_id) not in known)


def _check_apart(witnesses: Sequence[Verifier]) -> None:
    names: dict[bytes, str] = {}
    for witness in witnesses:
        if names.setdefault(witness.public, witness.name) != witness.name:
            raise ProtocolError(
                "shared_key",
                f"{names[witness.public]} and {witness.name} would cosign with one key, and be counted as two",
                fix="every member makes its own keys",
            )


def _check_name(name: str) -> None:
    if not name or "+" in name or _CONTROL.search(name) or any(c.isspace() for c in name) or not _encodes(name):
        raise ProtocolError("bad_checkpoint", "a signer's name is not empty and has no spaces and no plus sign")


def _check_body(body: str) -> None:
    if not body.endswith("\n") or body == "\n" or _CONTROL.search(body) or not _encodes(body):
        raise _malformed("a text in UTF-8 that ends in a newline and has no control characters")


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _malformed(expected: str) -> ProtocolError:
    return ProtocolError("bad_checkpoint", f"not a signed checkpoint; expected {expected}", fix="get the note again")
