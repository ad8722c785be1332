"""Which records are held out: whole groups, the same ones at every site, frozen by a seed.

Knows: groups, a source's published split and the fractions asked for. Refuses to know: what a field means, features.
A group is one material or formulation at every temperature and concentration (``RecordType.group``); rows of one group
on both sides would measure memory, not prediction. A group is drawn by its own hash, so two sites that measured the same
material hold out the same one and neither teaches the other's test.

``splits.keep_together`` goes further for the division into training and validation: rows that share a paper, say, were
made by the same hands, and a validation that shares papers with training is too kind.

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
from fedmat.errors import ConfigError, SiteRefused
from fedmat.seeds import derive

TRAIN, VALIDATION, TEST = 0, 1, 2  # the codes of fedmat.features.table, which lies above this layer
_LEARN = ("train", "train_only")  # hints of rows that are published as training rows
_log = logging.getLogger(__name__)
_UNIT = float(2**63)


@dataclass(frozen=True)
class _Groups:
    """Groups by what the source states about them.

    Attributes:
        torn: published with rows on both sides.
        no_test: a source states that it brings no test rows.
    """

    test: tuple[str, ...]
    train: tuple[str, ...]
    free: tuple[str, ...]
    torn: tuple[str, ...]
    no_test: bool


def assign(records: pd.DataFrame, splits: Splits) -> NDArray[np.int8]:
    """Returns TRAIN, VALIDATION or TEST for every record, shape ``len(records)``.

    A published split (``split_hint``) is kept: its test rows are the test set, its training groups are divided into
    training and validation. Other groups go into test when their hash under ``splits.seed`` lies below ``test_fraction``
    (at least one does where there is no published test). A site whose every source states that it brings no test rows
    has none; if all it has hangs together (one material), it has no validation either, and all its rows train. Of the rest, the share ``validation_fraction`` that comes first in hash order is for validation, whole
    components (:func:`components`) at a time: one that is larger than what is still wanted is passed over, and only
    where all are too large the smallest is taken. Only a source that publishes one group on both sides gets it so; this is
    logged as a count.

    Args:
        records: columns ``group``, ``split_hint`` and those of ``splits.keep_together``; ``records.attrs["site"]`` names
            the site in messages.

    Raises:
        ConfigError: the records have no field of that name.
        SiteRefused: no test group, or no validation group, remains beside one to train on.
    """
    site = str(records.attrs.get("site", "")) or "(unnamed)"
    groups = _groups(records)
    problem = _problem(groups)
    if problem:
        raise SiteRefused(f"site {site}: {problem[0]}", fix=problem[1])
    if groups.torn:
        _log.warning("site %s: the published split has %d groups on both sides; it is kept", site, len(groups.torn))
    test = _held_out(groups, splits)
    root = _roots(records, splits, test)
    rest = [name for name in (*groups.train, *groups.free) if name not in test]
    members: dict[str, list[str]] = {}
    for name in rest:
        members.setdefault(root[name], []).append(name)
    for name in groups.torn:  # their training rows train, and with them everything they are kept together with
        members.pop(root[name], None)
    left = min(max(1, round(splits.validation_fraction * len(rest))), len(rest) - 1)
    order = [name for name, _ in _by_hash(members, splits.seed, "validation")]
    validation: list[str] = []
    for name in order:
        if len(members[name]) <= left:
            validation += members[name]
            left -= len(members[name])
    if not validation:
        smallest = members[min(order, key=lambda name: len(members[name]))] if order else rest
        if len(smallest) < len(rest):
            validation = smallest
        elif not groups.no_test or test:
            raise SiteRefused(
                f"site {site}: no validation group is left: all training groups hang together by {', '.join(splits.keep_together)}",
                fix="add data from elsewhere, or take a field out of splits.keep_together in consortium.yaml",
            )
    side = {**dict.fromkeys(validation, VALIDATION), **dict.fromkeys(test, TEST)}
    codes = np.array([side.get(g, TRAIN) for g in records["group"]], dtype=np.int8)
    codes[_learning(records) & (codes == TEST)] = TRAIN  # the torn groups' training rows
    return codes


def components(records: pd.DataFrame, splits: Splits) -> NDArray[np.int64]:
    """Returns a code per record such that what may not be divided when learning has one code, shape ``len(records)``.

    Two rows that are not held out have one code when they share a group or a non-empty value of a field in
    ``splits.keep_together``, directly or over others. A test row links nothing: it stays where it is published, with the
    code of its group. Without ``keep_together`` a component is a group. Codes count from 0, and neither the order of rows
    nor of the fields changes them.

    Raises:
        ConfigError: the records have no field of that name.
    """
    names = records["group"].astype(str)
    if splits.keep_together:
        test = _held_out(_groups(records), splits)
        root = _roots(records, splits, test)
        learning = _learning(records) | ~names.isin(test).to_numpy()
        names = pd.Series([root[g] if free else g for g, free in zip(names, learning, strict=True)], dtype=str)
    return np.asarray(pd.factorize(names, sort=True)[0], dtype=np.int64)


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
        train=tuple(g for g in names if "test" not in hints[g] and hints[g] & {*_LEARN}),
        free=tuple(g for g in names if hints[g] == {""}),
        torn=tuple(g for g in names if "test" in hints[g] and hints[g] & {*_LEARN}),
        no_test=any("train_only" in h for h in hints.values()) and not any("train" in h for h in hints.values()),
    )


def _problem(groups: _Groups) -> tuple[str, str] | None:
    more = "add data on other materials or formulations; rows of one group are never divided"
    if not groups.test and not groups.free and not groups.no_test:
        return (
            "no test group is left: the published split has training rows only",
            "name the values that mean test under 'split' in site.yaml, write 'test: []' there if the site brings no test "
            "rows, or leave 'split' out to have groups drawn",
        )
    drawn = 1 if groups.free and not groups.test else 0
    others = len(groups.train) + len(groups.free) - drawn
    if others < (1 if groups.no_test and not drawn else 2):
        missing = "validation group" if not drawn or others == 1 else "test group"
        count = len(groups.test) + len(groups.train) + len(groups.free)
        return f"no {missing} is left: {count} group(s) cannot be divided into training, validation and test", more
    return None


def _held_out(groups: _Groups, splits: Splits) -> set[str]:
    """Returns the groups with test rows: published ones, and those drawn from the groups without a published side."""
    order = _by_hash(groups.free, splits.seed, "test")
    drawn = [name for name, at in order if at < splits.test_fraction]
    if not groups.test and not drawn:
        drawn = [name for name, _ in order[:1]]
    drawn = drawn[: max(0, len(groups.train) + len(order) - 2)]  # training and validation need a group each
    return {*groups.test, *drawn}


def _learning(records: pd.DataFrame) -> NDArray[np.bool_]:
    return np.asarray(records["split_hint"].isin(_LEARN), dtype=np.bool_)


def _roots(records: pd.DataFrame, splits: Splits, test: set[str]) -> dict[str, str]:
    """Returns group -> the first group, by name, of those its learning rows hang together with (itself, if with none)."""
    parent = {str(g): str(g) for g in records["group"]}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    learning = _learning(records)
    for field in splits.keep_together:
        if field not in records.columns:
            raise ConfigError(
                f"splits.keep_together: the records have no field '{field}'", fix="name fields of the record type, e.g. [doi]"
            )
        first: dict[str, str] = {}
        for group, cell, learns in zip(records["group"], records[field], learning, strict=True):
            value = "" if cell is None or cell != cell else str(cell).strip().casefold()  # a DOI has no case
            if not value or (str(group) in test and not learns):
                continue
            a, b = sorted((root(first.setdefault(value, str(group))), root(str(group))))
            parent[b] = a
    return {name: root(name) for name in parent}


def _by_hash(names: Iterable[str], seed: int, purpose: str) -> list[tuple[str, float]]:
    """Returns names with their hash in [0, 1), in hash order: a place that depends on the name and the seed alone."""
    return sorted(((n, derive(seed, purpose, n) / _UNIT) for n in names), key=lambda pair: (pair[1], pair[0]))
