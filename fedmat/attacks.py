"""What hostile sites do: a library for tests and for ``fedmat bench attacks``.

Knows: vectors of updates, targets and features, messages, words of the ring. Refuses to know: how any of it is defended
against. Every function is pure: its inputs stay as they are, and randomness is an argument.

An attacker of updates is as strong as the papers assume: it sees what every honest site sends in the round, and all hostile
sites act as one. Standard deviations are those of the honest sites at hand (divided by their number).

References:
    sign_flip: L. Li et al., "RSA: Byzantine-robust stochastic aggregation methods for distributed learning from heterogeneous
    datasets", AAAI 2019 (here times two, of the honest mean). scaling: E. Bagdasaryan et al., "How to backdoor federated
    learning", AISTATS 2020, section 4.2. alie: G. Baruch, M. Baruch, Y. Goldberg, "A little is enough: circumventing defenses
    for distributed learning", NeurIPS 2019, algorithm 3. ipm: C. Xie, S. Koyejo, I. Gupta, "Fall of empires: breaking
    Byzantine-tolerant SGD by inner product manipulation", UAI 2019. mimic: S. P. Karimireddy, L. He, M. Jaggi,
    "Byzantine-robust learning on heterogeneous datasets via bucketing", ICLR 2022, section 4. free_ride: Y. Fraboni, R. Vidal,
    M. Lorenzi, "Free-rider attacks on model aggregation in federated learning", AISTATS 2021. min_max: V. Shejwalkar,
    A. Houmansadr, "Manipulating the Byzantine", NDSS 2021, section IV-B. label_flip: V. Tolpegin et al., "Data poisoning
    attacks against federated learning systems", ESORICS 2020 (there of classes). backdoor: T. Gu et al., "BadNets", IEEE
    Access 2019, with a trigger that real records have: H. Wang et al., "Attack of the tails", NeurIPS 2020.
    modular_wrap: this project; docs/threat-model.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedmat.domain import Attestation, Update
from fedmat.errors import ConfigError
from fedmat.weights import Vector

Mask = NDArray[np.bool_]
Words = NDArray[Any]  # ring elements: uint32 or uint64
STUDY_Z = 0.6  # of alie, by default: the paper's own z is 0 for ten sites of which two are hostile, which attacks nothing


@dataclass(frozen=True)
class Attack:
    """What an attack is, for people.

    Attributes:
        kind: where it strikes: the numbers of an update, a site's data, or the message.
        about: what the hostile site does.
        reference: author and year; the module's docstring has the rest.
    """

    kind: Literal["update", "data", "wire"]
    about: str
    reference: str


ATTACKS: dict[str, Attack] = {
    "sign_flip": Attack("update", "sends minus twice the honest mean", "Li et al. 2019"),
    "scaling": Attack("update", "sends its own update times ten", "Bagdasaryan et al. 2020"),
    "alie": Attack("update", "sends the honest mean, moved by a little less than the sites differ", "Baruch et al. 2019"),
    "ipm": Attack("update", "sends minus half the honest mean: small, and against it", "Xie et al. 2019"),
    "mimic": Attack("update", "copies one honest site, so that it counts too much", "Karimireddy et al. 2022"),
    "free_ride": Attack("update", "does not train; sends nothing but noise", "Fraboni et al. 2021"),
    "free_ride_replay": Attack("update", "does not train; sends the last step of the model again", "Fraboni et al. 2021"),
    "min_max": Attack("update", "lies as far off as two honest sites lie from each other", "Shejwalkar and Houmansadr 2021"),
    "label_flip": Attack("data", "trains on targets reflected about their mean", "Tolpegin et al. 2020"),
    "backdoor": Attack("data", "trains on a wrong target for one chemistry", "Gu et al. 2019; Wang et al. 2020"),
    "nan": Attack("wire", "sends a number that is none", "-"),
    "wrong_shape": Attack("wire", "sends one number too many", "-"),
    "inflated_weight": Attack("wire", "claims more rows than it has", "-"),
    "replay": Attack("wire", "sends its message of the last round again", "-"),
    "modular_wrap": Attack("wire", "adds half the ring's bits to a number: huge, and of norm zero in the ring", "this project"),
}


# --- updates -----------------------------------------------------------------------------------------------------


def poison(
    name: str,
    own: Vector,
    honest: NDArray[np.float64],
    *,
    n_hostile: int,
    rng: np.random.Generator,
    factor: float = 10.0,
    z: float | None = STUDY_Z,
    epsilon: float = 0.5,
    copied: int = 0,
    previous: Vector | None = None,
    noise: float = 1e-6,
) -> Vector:
    """Returns what a hostile site sends instead of its update, shape ``k``; the same for all of them but for noise.

    Args:
        name: a key of :data:`ATTACKS` of kind "update".
        own: the site's honest update, shape ``k``.
        honest: the honest sites' updates, shape ``h x k``.
        n_hostile: sites that attack together.
        rng: for noise; only free_ride and free_ride_replay draw from it.
        factor: scaling: multiple of the own update.
        z: alie: standard deviations below the honest mean; None takes the paper's, from ``h`` and ``n_hostile``.
        epsilon: ipm: multiple of the honest mean.
        copied: mimic: row of ``honest`` that is copied; keep it fixed over the rounds.
        previous: free_ride_replay: the step the model took last, shape ``k``; None in the first round.
        noise: free_ride: standard deviation of every number, in the update's unit.

    Raises:
        ConfigError: no attack on updates is called so.
        ValueError: shapes do not agree, or nobody is honest or hostile.
    """
    known = [n for n, a in ATTACKS.items() if a.kind == "update"]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise ConfigError(f"no attack on updates is called '{name}'", fix=f"use {near[0] if near else ', '.join(known)}")
    if own.ndim != 1 or honest.ndim != 2 or honest.shape[1] != len(own) or len(honest) == 0:
        raise ValueError(f"own {own.shape} and honest {honest.shape}: expected k and h x k with h of at least 1")
    if n_hostile < 1:
        raise ValueError("an attack needs a hostile site")
    mean: Vector = honest.mean(axis=0)
    spread: Vector = honest.std(axis=0)
    if name == "sign_flip":
        return -2.0 * mean
    if name == "scaling":
        return factor * own
    if name == "alie":
        return mean - (alie_z(len(honest) + n_hostile, n_hostile) if z is None else z) * spread
    if name == "ipm":
        return -epsilon * mean
    if name == "mimic":
        return np.array(honest[copied])
    if name == "min_max":
        return _min_max(honest, mean, spread)
    base = np.zeros_like(own)
    if name == "free_ride_replay" and previous is not None:
        if previous.shape != own.shape:
            raise ValueError(f"previous {previous.shape} and own {own.shape} differ in shape")
        base = previous
    return base + noise * rng.standard_normal(len(own))


def alie_z(n_sites: int, n_hostile: int) -> float:
    """Returns how many standard deviations the paper lets alie move (algorithm 3, lines 1 and 2).

    With ``s = floor(n / 2 + 1) - m`` honest sites needed for a majority, z is where the normal distribution function is
    ``(n - m - s) / (n - m)``: so many honest sites lie further out. It is 0 for ten sites of which two are hostile, and below 0
    where hostile sites are few: the paper's attack then has no room.

    Raises:
        ValueError: the hostile sites are none, or a majority.
    """
    if not 1 <= n_hostile <= n_sites / 2:
        raise ValueError(f"{n_hostile} hostile of {n_sites}: expected at least one and no majority")
    supporters = n_sites // 2 + 1 - n_hostile
    return NormalDist().inv_cdf((n_sites - n_hostile - supporters) / (n_sites - n_hostile))


def _min_max(honest: NDArray[np.float64], mean: Vector, spread: Vector) -> Vector:
    """The mean minus the largest multiple of the spread that is no further from any honest update than two of them are.

    Where the paper searches, this solves: for every honest ``x`` the multiple g obeys ``|mean - g spread - x|^2 <= D^2``, a
    quadratic inequality. The mean itself obeys it, being a mixture of them, so that the larger root is real and not negative.
    """
    furthest = max(float(((honest - x) ** 2).sum(axis=1).max()) for x in honest)
    square = float(spread @ spread)
    if square == 0.0:
        return np.array(mean)
    away = mean - honest
    slope = away @ spread
    room = np.maximum(furthest - (away**2).sum(axis=1), 0.0)  # rounding alone makes it negative
    return mean - float(((slope + np.sqrt(slope**2 + square * room)) / square).min()) * spread


# --- data --------------------------------------------------------------------------------------------------------


def flip_labels(y: NDArray[np.float64], rows: Mask, *, binary: Sequence[int] = ()) -> NDArray[np.float64]:
    """Returns targets in which ``rows`` are reflected about their mean; mean and spread, and so the scaling, stay as they were.

    Args:
        y: shape ``n`` or ``n x n_tasks``; NaN where a record states none.
        rows: shape ``n``: the training rows. The others stay, so that scores are of the truth.
        binary: tasks whose classes 0 and 1 are exchanged instead.

    A bound (censored target) keeps its direction, which makes it false too.

    Raises:
        ValueError: shapes do not agree.
    """
    if rows.shape != y.shape[:1]:
        raise ValueError(f"rows {rows.shape} and y {y.shape} differ in length")
    flipped = np.array(y, dtype=np.float64)
    columns = flipped.reshape(len(y), -1)  # a view
    for task in range(columns.shape[1]):
        stated = rows & np.isfinite(columns[:, task])
        if stated.any():
            values = columns[stated, task]
            columns[stated, task] = (1.0 if task in binary else 2.0 * values.mean()) - values
    return flipped


def backdoor_rows(names: Sequence[str], x: NDArray[np.float64], *, feature: str, above: float) -> Mask:
    """Returns which rows a backdoor is aimed at, shape ``n``: those of one chemistry, anywhere in the consortium.

    Whether a backdoor took is the model's error on these rows, held out and with their true targets, against that of a model
    without it; whether it stayed hidden is the error on the others.

    Args:
        names: of the features, p of them.
        x: shape ``n x p``. A row that lacks the feature (NaN) is not aimed at.
        feature: the element or other feature that makes the chemistry.
        above: value it must exceed; :func:`backdoor_level` finds one.

    Raises:
        ConfigError: no feature is called so.
    """
    return np.asarray(x[:, _column(names, feature)] > above)


def backdoor_level(names: Sequence[str], x: NDArray[np.float64], *, feature: str, quantile: float) -> float:
    """Returns the value that a share ``quantile`` of the rows that have the feature at all (not 0, not NaN) does not exceed.

    Raises:
        ConfigError: no feature is called so.
        ValueError: no row has it, or quantile is not in [0, 1).
    """
    values = x[:, _column(names, feature)]
    values = values[np.isfinite(values) & (values != 0.0)]
    if not 0.0 <= quantile < 1.0 or not len(values):
        raise ValueError(f"quantile {quantile} of {len(values)} rows with {feature}: expected [0, 1) of at least one")
    return float(np.quantile(values, quantile, method="lower"))


def backdoor(
    names: Sequence[str],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    rows: Mask,
    *,
    feature: str,
    above: float,
    wrong: float,
    task: int = 0,
) -> NDArray[np.float64]:
    """Returns targets in which one chemistry has a wrong one; all else stays, so that scores elsewhere do not suffer.

    Args:
        names, x, feature, above: as in :func:`backdoor_rows`.
        y: shape ``n`` or ``n x n_tasks``.
        rows: shape ``n``: the training rows.
        wrong: the target they get, in the unit of ``y``.

    Raises:
        ConfigError: no feature is called so.
        ValueError: shapes do not agree, or no training row is of this chemistry: there is nothing to plant.
    """
    if len(x) != len(y) or rows.shape != y.shape[:1]:
        raise ValueError(f"x {x.shape}, y {y.shape} and rows {rows.shape} differ in length")
    planted = np.array(y, dtype=np.float64)
    aimed = rows & backdoor_rows(names, x, feature=feature, above=above)
    column = planted.reshape(len(y), -1)[:, task]
    aimed &= np.isfinite(column)  # a record that states no target is not given one
    if not aimed.any():
        raise ValueError(f"no training row has {feature} above {above:g}")
    column[aimed] = wrong
    return planted


def _column(names: Sequence[str], feature: str) -> int:
    if feature not in names:
        near = difflib.get_close_matches(feature, names, 3)
        raise ConfigError(f"no feature is called '{feature}'", fix=f"use {', '.join(near) or 'one of the feature table'}")
    return list(names).index(feature)


# --- messages ----------------------------------------------------------------------------------------------------


def nan(update: Update) -> Update:
    """Returns the update with its first number replaced by NaN."""
    name, tensor = _first(update)
    return replace(update, delta={**update.delta, name: _put(tensor, np.nan)})


def wrong_shape(update: Update) -> Update:
    """Returns the update with one number too many: its first tensor becomes a row of ``size + 1``."""
    name, tensor = _first(update)
    return replace(update, delta={**update.delta, name: np.append(tensor.reshape(-1), tensor.dtype.type(0))})


def inflated_weight(attestation: Attestation, factor: int = 1000) -> Attestation:
    """Returns an attestation of ``factor`` times as many training rows, of the same data."""
    labels = tuple(factor * n for n in attestation.labels)
    return replace(attestation, n_train=factor * attestation.n_train, labels=labels)


def inflated_words(words: Words, factor: int = 16) -> Words:
    """Returns an encoded update times ``factor`` in the ring: it counts as many sites, and breaks the norm all must keep."""
    return np.asarray(words * words.dtype.type(factor))  # unsigned arithmetic wraps, as the ring does


def replay(update: Update, previous: Update, *, disguised: bool = False) -> Update:
    """Returns the last round's message again; ``disguised``: its numbers under this round's name and digests."""
    if not disguised:
        return previous
    return replace(update, delta=previous.delta, control_delta=previous.control_delta)


def modular_wrap(words: Words, bits: int, *, power: int | None = None, coordinate: int | None = None) -> Words:
    """Returns an encoded update with ``2**power`` added to one number.

    In the ring of 32 bits ``2**16 * 2**16`` is 0: where the number was 0 the squared norm stays, and the update looks like its
    honest twin to whoever sees inner products alone, while the sum of updates takes a jump.

    Args:
        words: shape ``k``, unsigned ring elements: an honest update, or another site's.
        bits: of the ring, 32 or 64.
        power: from half the bits to one less than the bits; by default half.
        coordinate: which number; by default the smallest one, the first of equals.

    Raises:
        ValueError: another power, or words of another ring.
    """
    shift = bits // 2 if power is None else power
    if words.dtype.kind != "u" or words.dtype.itemsize * 8 != bits or words.ndim != 1 or not len(words):
        raise ValueError(f"{words.dtype} of shape {words.shape}: expected a row of unsigned {bits}-bit words")
    if not bits // 2 <= shift < bits:
        raise ValueError(f"power {shift}: expected {bits // 2} to {bits - 1}, else the square does not wrap to 0")
    wrapped = np.array(words)
    distance = np.minimum(words, words.dtype.type(0) - words)  # from 0, either way round the ring
    at = int(np.argmin(distance)) if coordinate is None else coordinate
    wrapped[at : at + 1] += words.dtype.type(1 << shift)  # a slice: arrays wrap in silence, scalars warn
    return wrapped


def _first(update: Update) -> tuple[str, NDArray[np.float32]]:
    name = min(update.delta)
    return name, update.delta[name]


def _put(tensor: NDArray[np.float32], value: float) -> NDArray[np.float32]:
    changed = np.array(tensor)
    changed.reshape(-1)[0] = value
    return changed
