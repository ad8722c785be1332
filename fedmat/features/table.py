"""A featurized batch and the Featurizer port.

Knows: names, arrays and split codes of one site's rows. Refuses to know: where records come from, and models.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

TRAIN, VALIDATION, TEST = 0, 1, 2


@dataclass(frozen=True)
class FeatureTable:
    """Features and target of one site.

    Attributes:
        x: shape ``n x p``, float64; NaN only in columns of a featurizer that declares ``may_miss``.
        y: transformed target, shape ``n``, in the task's unit (0/1 for a binary task).
        group: integer group codes, shape ``n``; equal codes are one material or formulation.
        split: TRAIN, VALIDATION or TEST, shape ``n``.
        sha256: digest of the records and featurizers behind it.
        features_sha256: digest of feature names and featurizer versions alone, equal at all sites of a consortium.
    """

    names: tuple[str, ...]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    group: NDArray[np.int64]
    split: NDArray[np.int8]
    sha256: str = ""
    features_sha256: str = ""

    def part(self, code: int) -> FeatureTable:
        """Returns the rows of one split."""
        keep = self.split == code
        return replace(self, x=self.x[keep], y=self.y[keep], group=self.group[keep], split=self.split[keep])

    def __len__(self) -> int:
        return len(self.y)


class Featurizer(abc.ABC):
    """Turns records into numbers.

    Attributes:
        name: as written in consortium.yaml.
        version: changes whenever any output may change; part of every cache key.
        citations: papers to cite when the features are used.
        needs: contract fields it reads.
        may_miss: True when a record may lack the input; its columns are then NaN for that record.
        libraries: installed packages whose release may change the output; their versions enter the feature digest.
    """

    name: str
    version: str
    citations: tuple[str, ...] = ()
    may_miss: bool = False
    libraries: tuple[str, ...] = ()

    @property
    @abc.abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the columns that :meth:`transform` returns."""

    @property
    @abc.abstractmethod
    def needs(self) -> tuple[str, ...]:
        """Contract fields this featurizer reads."""

    @abc.abstractmethod
    def transform(self, records: pd.DataFrame) -> NDArray[np.float64]:
        """Returns features of shape ``len(records) x len(names)``.

        Raises:
            FeatureError: a record cannot be featurized; the message names field and row position, never the value.
        """


def concatenate(tables: Sequence[FeatureTable]) -> FeatureTable:
    """Returns all rows of ``tables`` in order; groups of different tables stay different."""
    shift = 0
    groups = []
    for table in tables:
        groups.append(table.group + shift)
        shift += int(table.group.max(initial=-1)) + 1
    first = tables[0]
    return FeatureTable(
        first.names,
        np.concatenate([t.x for t in tables]),
        np.concatenate([t.y for t in tables]),
        np.concatenate(groups),
        np.concatenate([t.split for t in tables]),
    )
