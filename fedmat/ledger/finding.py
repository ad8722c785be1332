"""One thing that is wrong with a log, and where.

Knows: a place, what was found there, and a word for machines. Refuses to know: what follows from it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something a check found; none is left out because another one was found before it.

    Attributes:
        place: file and line, or entry, e.g. ``ledger.jsonl line 19``.
        what: what is there and what was expected.
        reason: one word for machines, as of :class:`fedmat.errors.ProtocolError`.
    """

    place: str
    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what} ({self.reason})"
