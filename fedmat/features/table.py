"""A featurized batch and the Featurizer port.

Knows: names, arrays and split codes of one site's rows. Refuses to know: where records come from, and models.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fedmat.features.graphs import Graphs

TRAIN, VALIDATION, TEST = 0, 1, 2


@dataclass(frozen=True)
class FeatureTable:
    """Features and targets of one site.

    Attributes:
        x: shape ``n x p``, float64; NaN only in columns of a featurizer that declares ``may_miss``.
        y: transformed targets, shape ``n x n_tasks``, in the tasks' units (0/1 for a binary task); NaN where a record does
            not state one.
        group: integer group codes, shape ``n``; equal codes are one material or formulation.
        split: TRAIN, VALIDATION or TEST, shape ``n``.
        bound: shape ``n x n_tasks``: -1 where the truth is at most ``y``, 1 where it is at least ``y``, else 0.
        component: codes of what may not be divided when learning, shape ``n``; groups, or more coarsely joined ones.
        graphs: a graph per record, where the model reads graphs.
        sha256: digest of the records and featurizers behind it.
        features_sha256: digest of feature names and featurizer versions alone, equal at all sites of a consortium.
    """

    names: tuple[str, ...]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    group: NDArray[np.int64]
    split: NDArray[np.int8]
    bound: NDArray[np.int8]
    component: NDArray[np.int64]
    graphs: Graphs | None = None
    sha256: str = ""
    features_sha256: str = ""

    def part(self, *codes: int) -> FeatureTable:
        """Returns the rows of some splits."""
        return self.rows(np.isin(self.split, codes))

    def rows(self, keep: NDArray[np.bool_]) -> FeatureTable:
        """Returns the rows where ``keep`` is true."""
        graphs = self.graphs.take(np.flatnonzero(keep)) if self.graphs is not None else None
        columns = {name: getattr(self, name)[keep] for name in ("x", "y", "group", "split", "bound", "component")}
        return replace(self, **columns, graphs=graphs)

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
    """Returns all rows of ``tables`` in order; groups and components of different tables stay different."""
    graphs = None
    if tables[0].graphs is not None:
        from fedmat.features.graphs import Graphs

        graphs = Graphs.concatenate([t.graphs for t in tables if t.graphs is not None])
    return FeatureTable(
        tables[0].names,
        np.concatenate([t.x for t in tables]),
        np.concatenate([t.y for t in tables]),
        _apart([t.group for t in tables]),
        np.concatenate([t.split for t in tables]),
        np.concatenate([t.bound for t in tables]),
        _apart([t.component for t in tables]),
        graphs,
    )


def _apart(codes: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    shift = np.cumsum([0, *(int(c.max(initial=-1)) + 1 for c in codes[:-1])])
    return np.concatenate([c + s for c, s in zip(codes, shift, strict=True)])
