"""Named random streams: every use of randomness is an independent generator derived from the plan's seed.

Knows: how a name becomes a generator. Refuses to know: any global random state.

References:
    SeedSequence: M. E. O'Neill, "PCG: A Family of Simple Fast Space-Efficient Statistically Good Algorithms for
    Random Number Generation", 2014; NumPy's ``SeedSequence`` design note.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, *names: str | int) -> int:
    """Returns a 63-bit seed for the stream called ``names`` under ``seed``; equal inputs give equal seeds."""
    text = "\x1f".join([str(int(seed)), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """Returns an independent generator for one purpose, e.g. ``stream(plan.seed, "batches", site, round)``."""
    return np.random.Generator(np.random.PCG64(derive(seed, *names)))
