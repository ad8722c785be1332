"""Canary exchanges: members submit random vectors whose seeds they show afterwards, so that everyone can check the roles.

No role can tell a canary from a round before it has committed itself to the numbers it opens, so a role that bends inner
products without anybody's row showing it is found out at the canary rate, publicly and with proof.
Knows: when an exchange is one, the vector of a seed, and which sites have shown theirs. Refuses to know: updates, roles.

Reference:
    Aumann and Lindell, "Security against Covert Adversaries", TCC 2007 (deterrence by checks nobody can foresee).
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Sequence

import numpy as np

from fedmat.envelopes import AuditVote, Header
from fedmat.errors import ProtocolError
from fedmat.keys import Charter
from fedmat.transport.trigram.messages import SEED, header_digest, verify_vote
from fedmat.transport.trigram.ring import Pad, Ring, Words, blocks, dot, hashed


def canary_due(secret: bytes, header: Header, rate: float) -> bool:
    """Returns whether this exchange is a canary: the members' common ``secret`` decides, so all of them decide alike.

    Raises:
        ProtocolError: bad_rate.
    """
    if not 0.0 <= rate <= 1.0:
        raise ProtocolError("bad_rate", f"a canary rate of {rate}, expected 0 to 1")
    drawn = hmac.new(secret, b"fedmat/trigram/canary/v1" + header_digest(header), hashlib.sha256).digest()[:8]
    return int.from_bytes(drawn, "big") < int(rate * 2**64)


def canary_words(seed: bytes, header: Header) -> Words:
    """Returns the vector of a seed: ``length`` ring elements, about half the bound long, in a random direction.

    Whole numbers only, so that every party makes the same one: sums of four uniform 16-bit numbers, which are close
    enough to normal ones that no direction is preferred, then scaled down and never up.
    """
    if len(seed) != SEED:
        raise ProtocolError("wrong_length", f"a canary seed of {len(seed)} bytes, expected {SEED}")
    ring = Ring(header.bits)
    pad = Pad(Ring(64), seed, hashed("fedmat/trigram/canary-words/v1", header_digest(header)))
    draws = np.empty(header.length, np.int64)
    for part in blocks(header.length):
        halves = pad.take(part.stop - part.start).view("<u2").reshape(-1, 4)
        draws[part] = halves.astype(np.int64).sum(axis=1) - 2 * (2**16 - 1)
    length = math.isqrt(dot(draws, draws)) + 1
    return ring.words(np.sign(draws) * (np.abs(draws) * (ring.bound // 2) // length))


def proven(
    charter: Charter, header: Header, sites: Sequence[str], gram: Sequence[Sequence[int]], votes: Sequence[AuditVote]
) -> tuple[str, ...]:
    """Returns the sites that have shown that the opened numbers are those of a random vector, and no update.

    A shown seed counts if the squared norm and the products with every other such vector are what was opened; where two
    contradict each other, the one in more contradictions is dropped first.

    Args:
        sites, gram: of the exchange ``header`` is of, ``n`` and ``n x n``.

    Raises:
        ProtocolError: a vote is about another exchange, signed wrongly, or one of two of the same site.
    """
    digest = header_digest(header)
    seeds: dict[str, bytes] = {}
    for vote in votes:
        verify_vote(charter, vote, header, digest)
        if vote.site in seeds:
            raise ProtocolError("duplicate", "two votes of one site")
        seeds[vote.site] = vote.canary.tobytes()
    ring, at = Ring(header.bits), {s: i for i, s in enumerate(sites)}
    shown = {s: ring.lift(canary_words(seed, header)) for s, seed in seeds.items() if s in at and len(seed) == SEED}
    left = sorted(s for s, v in shown.items() if dot(v, v) == gram[at[s]][at[s]])
    wrong = {(s, t) for s in left for t in left if s < t and dot(shown[s], shown[t]) != gram[at[s]][at[t]]}
    while wrong:
        worst = max(left, key=lambda s: sum(s in pair for pair in wrong))
        left.remove(worst)
        wrong = {pair for pair in wrong if worst not in pair}
    return tuple(left)
