"""Clipping, Gaussian noise and random choice of records: what makes a release private, before anyone counts it.

Knows: vectors, limits and where randomness comes from. Refuses to know: records, models, budgets.

Where the noise comes from. The key of an AES-256-CTR stream is drawn from the operating system for every call; its bytes
become uniform numbers of 52 bits and, by the inverse of the normal distribution, normal ones in float64. A generator of
torch or numpy will not do: torch's takes 32 bits of its seed whatever it is given, which can be tried out one by one, and
earlier output of either tells what follows. (Opacus' own answer, ``secure_mode``, needs the package torchcsprng, which does
not exist for present releases of torch.)

What it is not. A float cannot be every real number, and which floats can appear tells about what was under the noise
[Mironov2012]. Each normal number is therefore half the sum of four, after which the known attacks are out of reach
[Holohan2021], the sum is taken in float64 and rounded to float32 only with the noise inside. That is a mitigation and not a
proof; a proof takes discrete noise. Each of the four also ends at 8.2 standard deviations, which a normal number passes
with probability 2e-16: far below any delta.

References:
    Dwork, Roth, "The Algorithmic Foundations of Differential Privacy", 2014 (appendix A).
    Mironov2012: I. Mironov, "On Significance of the Least Significant Bits for Differential Privacy", CCS 2012.
    Holohan2021: N. Holohan, S. Braghin, "Secure Random Sampling in Differential Privacy", ESORICS 2021.
    NIST SP 800-38A (CTR mode). McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018
    (privacy of a whole site).
"""

from __future__ import annotations

import hashlib
import math
import os
from typing import NoReturn

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedmat.errors import PlanRefused
from fedmat.privacy import accounting
from fedmat.weights import Vector

_SUMMANDS = 4
_AT_A_TIME = 1 << 18  # normal numbers per piece: keeps memory small for large networks


def clip(vector: Vector, limit: float) -> Vector:
    """Returns ``vector`` (shape ``d``), scaled down where its norm passes ``limit``; zero stays zero.

    Raises:
        ValueError: a number is not finite, or the limit is not positive.
    """
    if not (math.isfinite(limit) and limit > 0):
        raise ValueError("the limit must be a finite number above 0")
    if not np.isfinite(vector).all():
        raise ValueError("a vector with NaN or infinity has no norm to clip")
    peak = float(np.abs(vector).max(initial=0.0))
    if peak == 0.0:
        return vector.copy()
    norm = peak * float(np.linalg.norm(vector / peak))  # squares of very large or small numbers would overflow or vanish
    return vector * (limit / norm) if norm > limit else vector.copy()


class Noise:
    """Random numbers nobody can foretell; see the module's docstring.

    Args:
        insecure_seed: for tests only. Whoever knows it can take the noise off again.
    """

    def __init__(self, *, insecure_seed: int | None = None) -> None:
        key = os.urandom(32) if insecure_seed is None else hashlib.sha256(f"insecure {insecure_seed}".encode()).digest()
        # one key, one stream: a fixed counter start repeats nothing, because no key is used twice
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def uniform(self, n: int) -> Vector:
        """Returns ``n`` numbers between 0 and 1, neither included: the middles of ``2**52`` equal parts."""
        words = np.frombuffer(self._stream.update(bytes(8 * n)), dtype=np.uint64)
        # 52 bits, so that adding a half is exact and 1.0 cannot come out
        return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def normal(self, *shape: int) -> Vector:
        """Returns standard normal numbers of shape ``shape``, float64."""
        from scipy.special import ndtri

        out = np.empty(math.prod(shape))
        for start in range(0, len(out), _AT_A_TIME):
            part = out[start : start + _AT_A_TIME]
            part[:] = ndtri(self.uniform(_SUMMANDS * len(part))).reshape(_SUMMANDS, -1).sum(axis=0) / math.sqrt(_SUMMANDS)
        return out.reshape(shape)

    def chosen(self, n: int, rate: float) -> NDArray[np.bool_]:
        """Returns which of ``n`` records take part in a step: each for itself with chance ``rate`` (Poisson sampling).

        The choice must be as secret as the noise: the accountant's number holds for those who do not know who took part.
        """
        return np.asarray(self.uniform(n) < rate)


def gaussian(vector: Vector, limit: float, noise_multiplier: float, noise: Noise) -> Vector:
    """Returns ``vector`` (shape ``d``) clipped to ``limit``, plus noise of standard deviation ``noise_multiplier * limit``.

    Raises:
        ValueError: an argument is out of range, or the vector is not finite.
    """
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
        raise ValueError("noise_multiplier must be a finite number above 0")
    return clip(vector, limit) + noise_multiplier * limit * noise.normal(len(vector))


# --- privacy of a whole site ---------------------------------------------------------------------------------------


def site_level_ratio(n_sites: int, numbers: int, epsilon: float, delta: float, rounds: int) -> float:
    """Returns how long the noise of a round is beside the mean update, were whole sites to be hidden.

    The sum of ``n_sites`` updates of norm at most ``C`` gets noise of norm about ``z C sqrt(numbers)``, with ``z`` the least
    noise multiplier that keeps the budget over all rounds; the sum itself is at most ``n_sites * C`` long.

    Args:
        numbers: length of an update as it is summed, i.e. after compression.
    """
    if min(n_sites, numbers, rounds) < 1:
        raise ValueError("n_sites, numbers and rounds must be at least 1")
    return accounting.noise_for(epsilon, delta, 1.0, rounds) * math.sqrt(numbers) / n_sites


def refuse_site_level(n_sites: int, numbers: int, epsilon: float, delta: float, rounds: int) -> NoReturn:
    """Refuses ``privacy.unit: site`` and says what it would cost here; arguments as in :func:`site_level_ratio`.

    Raises:
        PlanRefused: always. Sites are not sampled and are few, so no setting that protects one leaves anything to learn.
    """
    ratio = site_level_ratio(n_sites, numbers, epsilon, delta, rounds)
    meaning = "" if delta * n_sites < 1 else f"; and delta {delta:g} would permit to give one of {n_sites} sites away"
    raise PlanRefused(
        f"privacy.unit: site is not offered: hiding one of {n_sites} sites at epsilon {epsilon:g} over {rounds} rounds takes "
        f"noise about {ratio:.3g} times as long as the longest mean update of {numbers} numbers{meaning}",
        fix="use privacy.unit: record, and security.mode: trigram against whoever combines the updates",
    )
