"""Which rows of a source take part: ``select`` (a published table of keys) and ``where`` (values of columns).

Knows: raw tables under the source's own column names. Refuses to know: fields and what a cell means beyond its text.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedmat.config import Source
from fedmat.data import cells
from fedmat.errors import ConfigError, DataError

ROW = "__row__"  # 1-based data row in the source
PROBLEM = "__problem__"  # reason code a reader gives to a row it could not read

_LOG = logging.getLogger(__name__)


def require_columns(frame: pd.DataFrame, wanted: Iterable[tuple[str, str]], where: str) -> None:
    """Raises ConfigError naming every (column, purpose) that is not in ``frame``, with the nearest name there is."""
    have = [str(c) for c in frame.columns if c not in (ROW, PROBLEM)]
    problems = []
    for column, purpose in wanted:
        if column in have:
            continue
        twice = [c for c in have if c.startswith(f"{column} #")]
        near = difflib.get_close_matches(column, have, n=1, cutoff=0.6)
        if twice:
            hint = f"the header has it {len(twice)} times; say which one: {', '.join(twice)}"
        elif len(have) == 1:
            hint = "the whole header reads as one column; set options.sep"
        else:
            hint = f"did you mean '{near[0]}'?" if near else f"its header has {len(have)} other columns"
        problems.append(f"no column '{column}' (for {purpose}); {hint}")
    if problems:
        raise ConfigError(f"{where}: " + "\n  ".join(problems), fix="write column names as they stand in the header")


def keep_rows(frame: pd.DataFrame, source: Source, table: pd.DataFrame | None, where: str) -> pd.DataFrame:
    """Returns the rows that ``select`` and ``where`` keep, with the columns ``select.take`` adds.

    Raises:
        ConfigError: a named column does not exist.
        DataError: keys of the select table repeat or are not in the source, or no row is left.
    """
    if frame.empty:
        raise DataError(f"{where}: the source has no data row", fix="name the file, sheet or table that holds the records")
    if source.select is not None and table is not None:
        frame = _select(frame, source, table, where)
    require_columns(frame, [(c, "where") for c in source.where], where)
    keep = np.ones(len(frame), dtype=bool)
    for column, permitted in source.where.items():
        keep &= _matches(frame[column], permitted)
    if not keep.any():
        raise DataError(f"{where}: no row meets 'where'", fix="check the columns and values under 'where' in site.yaml")
    return frame.loc[keep].reset_index(drop=True)


def _matches(column: pd.Series[Any], permitted: str | list[str]) -> NDArray[np.bool_]:
    allowed = {permitted} if isinstance(permitted, str) else set(permitted)
    return np.array([cells.text_of(c) in allowed for c in column], dtype=bool)


def _select(frame: pd.DataFrame, source: Source, table: pd.DataFrame, where: str) -> pd.DataFrame:
    select = source.select
    if select is None:
        return frame
    wanted = [(select.right, "select.right"), *((c, "select.where") for c in select.where)]
    require_columns(table, [*wanted, *((c, "select.take") for c in select.take.values())], f"{where}, table {select.table}")
    if select.left != "row":
        require_columns(frame, [(select.left, "select.left")], where)
    taken = [name for name in select.take if name in frame.columns]
    if taken:
        raise ConfigError(
            f"{where}: select.take adds '{taken[0]}', and the source has that column", fix="take it under another name"
        )
    for column, permitted in select.where.items():
        table = table.loc[_matches(table[column], permitted)]
    keys = [cells.text_of(c) for c in table[select.right]]
    if not keys:
        raise DataError(f"{where}: no row of {select.table} meets select.where", fix="check select.where in site.yaml")
    if len(set(keys)) != len(keys):
        raise DataError(
            f"{where}: {len(keys) - len(set(keys))} keys repeat in column '{select.right}' of {select.table}",
            fix="narrow the table with select.where until each key stands once",
        )
    own = [str(r - 1) for r in frame[ROW]] if select.left == "row" else [cells.text_of(c) for c in frame[select.left]]
    lost = len(set(keys) - set(own))
    if lost:
        raise DataError(
            f"{where}: {lost} of {len(keys)} keys in column '{select.right}' of {select.table} have no row in the source",
            fix="check select.left and select.right, narrow select.where, or restore the file the table was made for",
        )
    position = {key: i for i, key in enumerate(keys)}
    repeated = sum(key in position for key in own) - len(keys)
    if repeated:
        _LOG.warning(
            "%s: %d more rows than keys are selected, because values of '%s' repeat in the source; "
            "where each key should name one row, key by 'row'", where, repeated, select.left
        )  # fmt: skip
    at = [position.get(key, -1) for key in own]
    kept = frame.loc[[a >= 0 for a in at]].reset_index(drop=True)
    chosen = table.iloc[[a for a in at if a >= 0]]
    return kept.assign(**{name: list(chosen[column]) for name, column in select.take.items()})
