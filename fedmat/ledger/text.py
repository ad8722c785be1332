"""Numbers and bytes as text in exactly one spelling, so that no bit of a text can change unseen.

Knows: base64 with clean padding, decimal numbers without leading zeros, times. Refuses to know: what they stand for.

References:
    RFC 4648, sections 3.5 and 4 (pad bits that are not zero make a second spelling of the same bytes).
"""

from __future__ import annotations

import base64
import binascii
import re
from datetime import UTC, datetime

_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")  # below 10**18, which fits a database's 64-bit integer


def b64(data: bytes) -> str:
    """Returns standard base64 with padding."""
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def unb64(text: str) -> bytes:
    """Returns the bytes of a base64 text in its one canonical spelling.

    Raises:
        ValueError: another spelling (line breaks, missing padding, pad bits that are not zero), or no base64.
    """
    data = base64.b64decode(text, validate=True)
    if b64(data) != text:
        raise ValueError("not canonical base64")
    return data


def number(text: str) -> int:
    """Returns a non-negative decimal number below 10**18 in its one spelling: ASCII digits, no sign, no leading zero.

    Raises:
        ValueError: another spelling, or no number.
    """
    if not _NUMBER.fullmatch(text):
        raise ValueError("not a number in its canonical spelling")
    return int(text)


def stamp(now: datetime) -> str:
    """Returns a time as entries have it: UTC, whole seconds."""
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
