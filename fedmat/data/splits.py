"""Which records are held out: whole groups, the same ones at every site, frozen by a seed.

Knows: groups, a source's published split and the fractions asked for. Refuses to know: fields, values, features.
A group is one material or formulation at every temperature and concentration (``RecordType.group``); rows of one group
on both sides would measure memory, not prediction. A group is drawn by its own hash, so two sites that measured the same
material hold out the same one and neither teaches the other's test.

References:
    S. Kaufman et al., "Leakage in Data Mining: Formulation, Detection, and Avoidance", ACM TKDD 6 (2012) 15.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedmat.config import Splits
from fedmat.errors import SiteRefused
from fedmat.seeds import derive

TRAIN, VALIDATION, TEST = 0, 1, 2  # the codes of fedmat.features.table, which lies above this layer
_log = logging.getLogger(__name__)
_UNIT = float(2**63)


@dataclass(frozen=True)
class _Groups:
    """Groups by what the source states about them; ``torn`` ones are published with rows on both sides."""

    test: tuple[str, ...]
    train: tuple[str, ...]
    free: tuple[str, ...]
    torn: tuple[str, ...]


def assign(records: pd.DataFrame, splits: Splits) -> NDArray[np.int8]:
    """Returns TRAIN, VALIDATION or TEST for every record, shape ``len(records)``.

    A published split (``split_hint``) is kept: its test rows are the test set, its training groups are divided into
    training and validation. Other groups go into test when their hash under ``splits.seed`` lies below ``test_fraction``
    (at least one does where there is no published test). Of the rest, the share ``validation_fraction`` that comes first in
    hash order is for validation. Only a source that publishes one group on both sides gets it so; this is logged as a count.

    Args:
        records: columns ``group`` and ``split_hint``; ``records.attrs["site"]`` names the site in messages.

    Raises:
        SiteRefused: no test group, or no validation group, remains beside one to train on.
    """
    site = str(records.attrs.get("site", ""))
    groups = _groups(records)
    problem = _problem(groups)
    if problem:
        raise SiteRefused(f"site {site or '(unnamed)'}: {problem[0]}", fix=problem[1])
    if groups.torn:
        _log.warning("site %s: the published split has %d groups on both sides; it is kept", site, len(groups.torn))
    test, rest = list(groups.test), list(groups.train)
    order = _by_hash(groups.free, splits.seed, "test")
    drawn = [name for name, at in order if at < splits.test_fraction]
    if not test and not drawn:
        drawn = [order[0][0]]
    drawn = drawn[: max(0, len(rest) + len(order) - 2)]  # training and validation need a group each
    test += drawn
    rest += [name for name, _ in order if name not in set(drawn)]
    count = min(max(1, round(splits.validation_fraction * len(rest))), len(rest) - 1)
    validation = [name for name, _ in _by_hash(rest, splits.seed, "validation")[:count]]
    side = {**dict.fromkeys(validation, VALIDATION), **dict.fromkeys(test, TEST)}
    codes = np.array([side.get(g, TRAIN) for g in records["group"]], dtype=np.int8)
    codes[(records["split_hint"] == "train").to_numpy() & (codes == TEST)] = TRAIN  # the torn groups' training rows
    return codes


def problem(records: pd.DataFrame) -> tuple[str, str] | None:
    """Returns (what, fix) when no choice of fractions and seed can divide ``records``, else None."""
    return _problem(_groups(records))


def torn_groups(records: pd.DataFrame) -> int:
    """Returns how many groups the published split itself has on both sides."""
    return len(_groups(records).torn)


def _groups(records: pd.DataFrame) -> _Groups:
    hints: dict[str, set[str]] = {}
    for group, hint in zip(records["group"], records["split_hint"], strict=True):
        hints.setdefault(str(group), set()).add(str(hint))
    names = sorted(hints)
    return _Groups(
        test=tuple(g for g in names if "test" in hints[g]),
        train=tuple(g for g in names if "test" not in hints[g] and "train" in hints[g]),
        free=tuple(g for g in names if hints[g] == {""}),
        torn=tuple(g for g in names if {"train", "test"} <= hints[g]),
    )


def _problem(groups: _Groups) -> tuple[str, str] | None:
    more = "add data on other materials or formulations; rows of one group are never divided"
    if not groups.test and not groups.free:
        return (
            "no test group is left: the published split has training rows only",
            "name the values that mean test under 'split' in site.yaml, or leave 'split' out to have groups drawn",
        )
    others = len(groups.train) + len(groups.free) - (0 if groups.test else 1)
    if others < 2:
        missing = "validation group" if groups.test or others == 1 else "test group"
        count = len(groups.test) + len(groups.train) + len(groups.free)
        return f"no {missing} is left: {count} group(s) cannot be divided into training, validation and test", more
    return None


def _by_hash(names: Iterable[str], seed: int, purpose: str) -> list[tuple[str, float]]:
    """Returns names with their hash in [0, 1), in hash order: a place that depends on the name and the seed alone."""
    return sorted(((n, derive(seed, purpose, n) / _UNIT) for n in names), key=lambda pair: (pair[1], pair[0]))
