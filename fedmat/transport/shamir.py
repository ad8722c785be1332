"""A secret in shares: any ``threshold`` of them give it back, fewer say nothing about it.

Knows: 32-byte secrets and a prime field. Refuses to know: what a secret opens and who keeps a share. A dealer that gives
out shares of different secrets is not found out by those who keep them, only when they are put together; Python's
integers take a time that depends on their values, so that a secret must not be shared over and over while others measure.

References:
    A. Shamir, "How to Share a Secret", CACM 1979. RFC 5869 (HKDF, section 2.3).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from fedmat.errors import ProtocolError

PRIME = 2**256 + 297  # the least prime above every 32-byte secret
SHARE_BYTES = 33
_TRIES = 2000  # sets of shares looked at to get past false ones


def split(secret: bytes, threshold: int, n: int, randomness: bytes) -> tuple[bytes, ...]:
    """Returns ``n`` shares of a 32-byte secret, 33 bytes each; any ``threshold`` give it back, fewer say nothing.

    Args:
        randomness: 32 secret random bytes; equal ones give equal shares, so that a site asked again gives the same.

    Raises:
        ValueError: sizes are wrong.
    """
    if len(secret) != 32 or len(randomness) != 32 or not 1 <= threshold <= n:
        raise ValueError("a secret and its randomness have 32 bytes, and 1 <= threshold <= n")
    # 64 bytes for a number below 2^257: the bias of the remainder is below 2^-254.
    coefficients = [int.from_bytes(secret, "big")] + [
        int.from_bytes(_expand(randomness, power), "big") % PRIME for power in range(1, threshold)
    ]
    shares = []
    for x in range(1, n + 1):
        y = 0
        for c in reversed(coefficients):
            y = (y * x + c) % PRIME
        shares.append(y.to_bytes(SHARE_BYTES, "big"))
    return tuple(shares)


def recover(shares: Mapping[int, bytes]) -> bytes:
    """Returns the secret that shares, by their number from 1, were made from; needs as many as ``split`` was told.

    Raises:
        ProtocolError: bad_share: malformed ones, or ones that belong to no 32-byte secret.
    """
    points = {x: share_value(y, f"share {x}") for x, y in shares.items()}
    total = 0
    for x, y in points.items():
        over = under = 1
        for other in points:
            if other != x:
                over, under = over * other % PRIME, under * (other - x) % PRIME
        total = (total + y * over * pow(under, -1, PRIME)) % PRIME
    if total >= 2**256:
        raise ProtocolError("bad_share", "the shares belong to no secret")
    return total.to_bytes(32, "big")


def share_value(share: bytes, what: str) -> int:
    """Returns a share as a field element.

    Raises:
        ProtocolError: bad_share.
    """
    value = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise ProtocolError("bad_share", f"{what} is no element of the field")
    return value


def recover_checked(shares: Mapping[int, bytes], threshold: int, fits: Callable[[bytes], bool], what: str) -> bytes:
    """Returns the secret that ``fits`` from any ``threshold`` shares, past false ones as long as enough true ones are there.

    Args:
        what: whose secret it is, for the message.

    Raises:
        ProtocolError: bad_share.
    """
    for chosen in itertools.islice(itertools.combinations(sorted(shares), threshold), _TRIES):
        try:
            secret = recover({x: shares[x] for x in chosen})
        except ProtocolError:
            continue
        if fits(secret):
            return secret
    raise ProtocolError(
        "bad_share", f"the shares of {what} do not give its secret: it, or those who keep them, sent false ones"
    )


def _expand(randomness: bytes, power: int) -> bytes:
    info = b"fedmat/shamir/coefficient/v1|%d" % power
    return HKDFExpand(algorithm=hashes.SHA256(), length=64, info=info).derive(randomness)
