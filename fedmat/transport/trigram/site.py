"""A member's side of an encrypted round: protect an update, and check afterwards what was opened of it.

Knows: one site's own update and keys. Refuses to know: files. Whoever calls :func:`submit` writes the submission down
before sending it and gives the same one again when the same header is asked again; a submission made anew has fresh
pads, so even a caller that forgets leaks nothing through them.

Reference:
    docs/adr/0007. RFC 9180 (HPKE): seals are bound to exchange, sender and receiver.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from fedmat.envelopes import ROLES, AuditRequest, AuditVote, Header, HeaderSignature, RoleName, Submission, no_bytes
from fedmat.errors import ProtocolError
from fedmat.keys import Charter, PartyKeys
from fedmat.transport.trigram import messages
from fedmat.transport.trigram.canary import canary_due, canary_words
from fedmat.transport.trigram.messages import SEED, SEEDS_OF, Envelope
from fedmat.transport.trigram.ring import Pad, Ring, Words, blob, blocks, dot
from fedmat.transport.trigram.shares import OwnRow

__all__ = ["audit", "canary_due", "canary_words", "submit"]


def submit(
    header: Header,
    signatures: Sequence[HeaderSignature],
    charter: Charter,
    keys: PartyKeys,
    words: Words,
    entropy: Callable[[int], bytes] = os.urandom,
) -> Submission:
    """Returns a site's update, protected for one exchange.

    Args:
        signatures: all three roles' consent to the header; without it nothing is sent.
        words: the encoded update, ``length`` ring elements of norm at most the ring's bound.
        entropy: source of the two seeds; anything but the operating system's is for tests.

    Raises:
        ProtocolError: a rule of the header is broken, a role did not sign it, or the update does not belong to it.
    """
    messages.check_header(header, charter)
    site, digest, ring = keys.name, messages.header_digest(header), Ring(header.bits)
    if site not in header.weights:
        raise ProtocolError("unknown_member", f"{site} has no weight in this exchange")
    for role, consent in messages.one_of_each(signatures, "consent").items():
        charter.verify(role, consent.signature.tobytes(), messages.consent_bytes(role, digest), header.today)
    if words.dtype != ring.dtype or words.shape != (header.length,):
        raise ProtocolError("wrong_length", f"an update of {words.size} elements, expected {header.length} of {ring.bits} bits")
    lifted = ring.lift(words)
    if dot(lifted, lifted) > ring.bound**2:
        raise ProtocolError("too_large", "the update is longer than the ring's bound", fix="use Ring.encode")
    seeds = {"a": entropy(SEED), "b": entropy(SEED)}
    pads = [Pad(ring, seed, messages.pad_context(digest, site, tag)) for tag, seed in seeds.items()]
    masked = words.copy()
    for part in blocks(header.length):
        for pad in pads:
            masked[part] -= pad.take(part.stop - part.start)
    body = blob(masked)
    envelope = Envelope(
        payload=messages.sha256(body),
        commitments={tag: messages.seed_commitment(digest, site, tag, seed) for tag, seed in seeds.items()},
        seals={role: _seal(charter, role, seeds, digest, site, header.today) for role in ROLES},
    )
    signed = Envelope(envelope.payload, envelope.commitments, envelope.seals, keys.sign(envelope.signed(digest, site)))
    return Submission(site, body, blob(signed.packed()))


def _seal(charter: Charter, role: RoleName, seeds: dict[str, bytes], digest: bytes, site: str, today: str) -> bytes:
    data = b"".join(seeds[tag] for tag in SEEDS_OF[role])
    return charter.seal(role, data, messages.seal_context(digest, site, role), today)


def audit(
    request: AuditRequest, charter: Charter, keys: PartyKeys, words: Words, canary_seed: bytes | None = None
) -> AuditVote:
    """Returns the site's signed finding about what was opened of its update.

    It agrees only if the two holders of the sum signed it, the weights respect the privacy floor, the roles vouch for the
    two numbers about this site, and both are exactly what its update and the sum give. A role that bent them to push the
    site out is thus found by the site alone.

    Args:
        words: what the site submitted under the request's header.
        canary_seed: shown in the vote where the exchange was a canary and the roles have confirmed its sum.

    Raises:
        ProtocolError: bad_header, wrong_length: the request cannot be about this update.
    """
    header = request.header
    digest, ring = messages.header_digest(header), Ring(header.bits)
    if words.shape != (header.length,) or words.dtype != ring.dtype:
        raise ProtocolError("wrong_length", "an audit of another update than the one submitted")
    try:
        messages.check_header(header, charter)
        _check(request, charter, keys.name, digest, words)
        detail, opened = "", True
    except ProtocolError as error:
        detail, opened = error.what, error.reason in ("wrong_square", "wrong_product")
    vote = AuditVote(
        site=keys.name,
        header_sha256=digest.hex(),
        agrees=not detail,
        detail=detail,
        # Shown only after all roles have signed what they opened: a courier that could ask before would warn them.
        canary=blob(canary_seed) if canary_seed and opened else no_bytes(),
    )
    signature = keys.sign(messages.signed_bytes(vote, digest))
    return AuditVote(vote.site, vote.header_sha256, vote.agrees, vote.detail, vote.canary, blob(signature))


def _check(request: AuditRequest, charter: Charter, site: str, digest: bytes, words: Words) -> None:
    header, ring = request.header, Ring(request.header.bits)
    if list(request.sites) != sorted(set(request.sites)) or not set(request.sites) <= set(header.weights):
        raise ProtocolError("bad_weights", "a sum over sites that are not in the header")
    if len(request.weights) != len(request.sites):
        raise ProtocolError("bad_weights", "not one weight for each site")
    messages.check_weights(header, request.weights)
    total = ring.unpack(request.total, header.length, "the opened sum")
    try:
        square, product = int(request.own_square), int(request.own_product)
    except ValueError:
        raise ProtocolError("wrong_row", "the two numbers are none") from None
    weight = dict(zip(request.sites, request.weights, strict=True)).get(site, 0)
    leaf = OwnRow(site, weight, square, product, request.reason, request.salt.tobytes()).leaf(digest)
    binding = messages.confirmation_binding(digest, request.sites, request.weights)
    for role, confirmation in messages.one_of_each(request.confirmations, "confirmation").items():
        messages.verify(charter, confirmation, role, binding, header.today)
        if confirmation.trouble:
            raise ProtocolError("not_confirmed", f"the {role} found trouble with the sum")
        if role != "notary" and confirmation.sum_sha256 != messages.sha256(request.total).hex():
            raise ProtocolError("wrong_sum", f"the {role} signed another sum")
        rows = confirmation.rows.tobytes()
        if leaf not in [rows[i : i + 32] for i in range(0, len(rows), 32)]:
            raise ProtocolError("wrong_row", f"the {role} did not sign these numbers about {site}")
    own = ring.lift(words)
    if dot(own, own) != square:
        raise ProtocolError("wrong_square", "what was opened as this update's squared norm is not")
    if dot(own, ring.lift(total)) != product:
        raise ProtocolError("wrong_product", "what was opened as this update's product with the sum is not")
