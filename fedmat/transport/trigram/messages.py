"""What is hashed, signed and sealed in an exchange, and which headers anyone may take part under.

Knows: the bytes under every signature, the fixed layout of a submission's envelope, the rules of a header. Every
signature is bound to what happened before it, so that a message cannot be moved to another exchange, another set of
sites or another set of commitments:

    header -> held (sites, their envelopes, the public map) -> committed (three commitments) -> everything later

Refuses to know: what is inside a seal, updates, the order of messages.

Reference:
    Bellare and Rogaway, "Entity Authentication and Key Distribution", CRYPTO 1993 (sign the whole conversation).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, TypeVar

import numpy as np

from fedmat import wire
from fedmat.envelopes import FEWEST_SITES, MOST_OVER_MEAN, ROLES, AuditVote, Blob, Commitment, Header, HeaderSignature, RoleName
from fedmat.errors import ProtocolError
from fedmat.keys import Charter
from fedmat.transport.trigram.ring import MAX_TOTAL_WEIGHT, Ring, hashed

SEED = 32
LONGEST = 1 << 31
LAST_NUMBER = 1 << 48  # of a round or an exchange
MAX_WEIGHT_OVER_MEAN = MOST_OVER_MEAN
SEEDS_OF: dict[RoleName, tuple[str, ...]] = {"aggregator": ("a",), "auditor": ("b",), "notary": ("a", "b")}
_VERSION = b"\x01"
M = TypeVar("M")


def next_role(role: RoleName) -> RoleName:
    """Returns the role that ``role`` shares the seed of its own choice with."""
    return ROLES[(ROLES.index(role) + 1) % len(ROLES)]


def previous_role(role: RoleName) -> RoleName:
    """Returns the role that ``role`` gets a seed from."""
    return ROLES[ROLES.index(role) - 1]


# --- digests and signatures ---------------------------------------------------------------------------------------


def fingerprint(value: Any) -> bytes:
    """Returns 32 bytes that tell any two different messages apart; of a blob, its SHA-256 and nothing else."""
    if isinstance(value, np.ndarray):
        return sha256(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return hashed(type(value).__name__, *(fingerprint(getattr(value, f.name)) for f in dataclasses.fields(value)))
    if isinstance(value, str):
        return hashed("text", value.encode("utf-8", "surrogatepass"))
    if isinstance(value, Mapping):
        return hashed("map", *(part for k in sorted(value) for part in (fingerprint(k), fingerprint(value[k]))))
    if isinstance(value, list | tuple):
        return hashed("list", *map(fingerprint, value))
    return hashed(type(value).__name__, repr(value).encode())


def sha256(blob: Blob) -> bytes:
    """Returns SHA-256 of a blob's bytes, without copying them."""
    return hashlib.sha256(np.ascontiguousarray(blob).reshape(-1).view(np.uint8).data).digest()


def signed_bytes(message: Any, binding: bytes, **digests: bytes) -> bytes:
    """Returns what a message's signature covers: every field but the signature, and what the message is bound to.

    Args:
        digests: of fields that are not at hand, e.g. of an opening's part at the Notary.
    """
    fields = [f.name for f in dataclasses.fields(message) if f.name != "signature"]
    parts = [digests.get(name) or fingerprint(getattr(message, name)) for name in fields]
    return hashed(f"fedmat/trigram/{type(message).__name__}/v1", binding, *parts)


def header_digest(header: Header) -> bytes:
    """Returns SHA-256 of a header's canonical bytes.

    Raises:
        ProtocolError: bad_header; it has no canonical bytes.
    """
    try:
        return bytes.fromhex(wire.digest(header))
    except (ValueError, TypeError):
        raise ProtocolError("bad_header", "a header holds a number or a text that no header may hold") from None


def held_digest(header: bytes, envelopes: Mapping[str, bytes], public_map: str) -> bytes:
    """Returns the digest of what all roles hold: sites, digests of their envelopes, digest of the map."""
    rows = [part for site in sorted(envelopes) for part in (site.encode(), envelopes[site])]
    return hashed("fedmat/trigram/held/v1", header, public_map.encode(), *rows)


def committed_digest(held: bytes, commitments: Mapping[RoleName, Commitment]) -> bytes:
    """Returns the digest of everything up to the three commitments."""
    return hashed("fedmat/trigram/committed/v1", held, *(commitments[r].digest.tobytes() for r in ROLES))


def confirmation_binding(header: bytes, sites: Sequence[str], weights: Sequence[int]) -> bytes:
    """Returns what a confirmation is bound to: a site knows it all, and so does whoever reads a ledger."""
    return hashed("fedmat/trigram/result/v1", header, fingerprint(tuple(sites)), fingerprint(tuple(weights)))


def one_of_each(messages: Sequence[M], kind: str) -> dict[RoleName, M]:
    """Returns the roles' messages by role.

    Raises:
        ProtocolError: wrong_parties; not exactly one of every role.
    """
    by_role = {m.role: m for m in messages}  # type: ignore[attr-defined]
    if len(messages) != len(ROLES) or set(by_role) != set(ROLES):
        raise ProtocolError("wrong_parties", f"expected one {kind} of each of {', '.join(ROLES)}")
    return by_role


def verify(charter: Charter, message: Any, sender: str, binding: bytes, today: str, **digests: bytes) -> None:
    """Checks that ``sender`` signed ``message`` under ``binding``; errors as in :meth:`Charter.verify`."""
    charter.verify(sender, message.signature.tobytes(), signed_bytes(message, binding, **digests), today)


def verify_vote(charter: Charter, vote: AuditVote, header: Header, digest: bytes) -> None:
    """Checks that a member of this exchange signed a vote about it.

    Raises:
        ProtocolError: wrong_exchange, unknown_member, expired_key or bad_signature.
    """
    if vote.header_sha256 != digest.hex():
        raise ProtocolError("wrong_exchange", "a vote is about another exchange")
    if vote.site not in header.weights:
        raise ProtocolError("unknown_member", "a vote of a site outside this exchange")
    verify(charter, vote, vote.site, digest, header.today)


# --- headers --------------------------------------------------------------------------------------------------------


def least_minimum(hostile: int) -> int:
    """Returns the least number of sites that an opened sum must hold, however many were invited.

    ``f + 3``, so that the f who may work together against the others still see no less than three honest updates added up;
    and four, so that a member sees no less than three others.
    """
    return max(4, hostile + 3)


def check_header(header: Header, charter: Charter) -> None:
    """Refuses a header that nobody should take part under, role or site.

    Raises:
        ProtocolError: bad_header, wrong_charter, bad_weights, too_few, unknown_member or expired_key.
    """
    n, f = len(header.weights), header.hostile
    if header.charter_sha256 != charter.sha256:
        raise ProtocolError("wrong_charter", "a header names another charter", fix="all parties need the same charter file")
    try:
        dated = date.fromisoformat(header.today).isoformat() == header.today
    except ValueError:
        dated = False
    numbers = (
        0 <= header.round < LAST_NUMBER
        and 0 <= header.exchange < LAST_NUMBER
        and 0 < header.length <= LONGEST
        and f >= 0
        and math.isfinite(header.clip)
        and header.clip > 0
    )
    if not (dated and numbers and 0 < len(header.run) <= 128):
        raise ProtocolError("bad_header", "a header's date, run or numbers are none", fix="see fedmat.envelopes.Header")
    ring = Ring(header.bits)
    if header.map_sha256 and ring.bits != 64:
        raise ProtocolError("bad_header", "a public map needs room that 32 bits do not have", fix="security.ring_bits: 64")
    for weight in header.weights.values():
        if weight < 1:
            raise ProtocolError("bad_weights", "a weight below one")
    if sum(header.weights.values()) > MAX_TOTAL_WEIGHT:
        raise ProtocolError("bad_weights", f"weights of more than {MAX_TOTAL_WEIGHT} in total", fix="divide them all")
    if n < max(FEWEST_SITES, 2 * f + 3):
        raise ProtocolError("too_few", f"{n} sites, expected {max(FEWEST_SITES, 2 * f + 3)} with {f} hostile ones")
    if not least_minimum(f) <= header.minimum <= n:
        raise ProtocolError("too_few", f"sums of {header.minimum} sites, expected {least_minimum(f)} to {n}")
    if not set(header.weights) <= set(charter.sites):
        raise ProtocolError("unknown_member", "a header gives weight to one that is no site of the charter")
    for name in (*ROLES, *sorted(header.weights)):
        charter.party(name, header.today)


def consent_bytes(role: RoleName, digest: bytes) -> bytes:
    """Returns what a role signs when it takes part under the header with this digest."""
    return signed_bytes(HeaderSignature(role, np.zeros(0, np.uint8)), digest)


def check_weights(header: Header, weights: Sequence[int]) -> None:
    """Refuses weights whose sum would show too much of one site.

    Raises:
        ProtocolError: bad_weights, or privacy_floor: fewer sites than the header's minimum, or one that drowns the others.
    """
    if any(isinstance(w, bool) or not isinstance(w, int) or w < 0 for w in weights) or sum(weights) > MAX_TOTAL_WEIGHT:
        raise ProtocolError("bad_weights", f"expected whole numbers from 0, at most {MAX_TOTAL_WEIGHT} in total")
    counted = [w for w in weights if w]
    if len(counted) < header.minimum:
        raise ProtocolError("privacy_floor", f"a sum of {len(counted)} sites, expected {header.minimum}")
    if max(counted) * len(counted) > MAX_WEIGHT_OVER_MEAN * sum(counted):
        raise ProtocolError("privacy_floor", f"a site counts for more than {MAX_WEIGHT_OVER_MEAN} times the mean")


# --- submissions ----------------------------------------------------------------------------------------------------


def pad_context(header: bytes, site: str, tag: str) -> bytes:
    """Returns what a pad is for: exchange, site and which of the two."""
    return hashed("fedmat/trigram/pad-context/v1", header, site.encode(), tag.encode())


def seal_context(header: bytes, sender: str, receiver: str) -> bytes:
    """Returns what a seal is bound to: exchange and direction."""
    return hashed("fedmat/trigram/seal/v1", header, sender.encode(), receiver.encode())


def seed_commitment(header: bytes, site: str, tag: str, seed: bytes) -> bytes:
    """Returns the digest by which a site binds itself to a seed; the seed is random, so it hides it too."""
    return hashed("fedmat/trigram/seed/v1", pad_context(header, site, tag), seed)


@dataclass(frozen=True)
class Envelope:
    """Everything of a submission but the masked update; 433 bytes with X25519.

    Layout: version (1), SHA-256 of the masked update (32), commitments to the seeds a and b (32 each), seals to
    aggregator and auditor (32 + overhead each) and notary (64 + overhead), Ed25519 signature of all this (64).
    """

    payload: bytes
    commitments: dict[str, bytes]
    seals: dict[RoleName, bytes]
    signature: bytes = b""

    def signed(self, header: bytes, site: str) -> bytes:
        """Returns what the site signs."""
        return hashed("fedmat/trigram/submission/v1", header, site.encode(), self._body())

    def packed(self) -> bytes:
        """Returns the layout above."""
        return self._body() + self.signature

    def _body(self) -> bytes:
        return _VERSION + self.payload + self.commitments["a"] + self.commitments["b"] + b"".join(self.seals[r] for r in ROLES)

    @classmethod
    def parse(cls, data: bytes, overhead: int) -> Envelope:
        """Reads an envelope.

        Args:
            overhead: bytes a seal adds (``Charter.seal_overhead``).

        Raises:
            ProtocolError: wrong_length or bad_envelope.
        """
        sizes = [SEED * len(SEEDS_OF[r]) + overhead for r in ROLES]
        expected = 1 + 3 * 32 + sum(sizes) + 64
        if len(data) != expected:
            raise ProtocolError("wrong_length", f"an envelope of {len(data)} bytes, expected {expected}")
        if data[:1] != _VERSION:
            raise ProtocolError("bad_envelope", "an envelope of an unknown version", fix="compare fedmat versions")
        pieces, at = [], 1
        for size in (32, 32, 32, *sizes, 64):
            pieces.append(data[at : at + size])
            at += size
        return cls(pieces[0], {"a": pieces[1], "b": pieces[2]}, dict(zip(ROLES, pieces[3:6], strict=True)), pieces[6])
