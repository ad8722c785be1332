"""What every featurizer needs: naming a row without its value, reading options, working once per distinct input.

Knows: columns of a records table. Refuses to know: chemistry.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedmat.data.contract import Field, RecordType
from fedmat.errors import ConfigError, FeatureError

Array = NDArray[np.float64]


def row_name(records: pd.DataFrame, position: int) -> str:
    """Returns how a person finds a row: its source and data row where known, else its 1-based place in the batch."""
    if "source_row" in records.columns and "source" in records.columns:
        return f"row {int(records['source_row'].iloc[position])} of source '{records['source'].iloc[position]}'"
    return f"row {position + 1}"


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns advice naming the nearest of ``known``, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(names) or '(none)'}"


def check_options(featurizer: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuses an option that ``featurizer`` does not have.

    Raises:
        ConfigError: names the option and the nearest valid one.
    """
    for key in options:
        if key not in known:
            raise ConfigError(f"features: {featurizer} has no option '{key}'", fix=nearest(key, known))


def whole_number(featurizer: str, options: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    """Returns an integer option within ``[low, high]``; raises ConfigError otherwise."""
    value = options.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(
            f"features: option '{key}' of {featurizer} must be a whole number from {low} to {high}",
            fix=f"set {key}: {default}",
        )
    return value


def text_list(featurizer: str, options: Mapping[str, Any], key: str, default: Sequence[str]) -> tuple[str, ...]:
    """Returns a list-of-names option; raises ConfigError when it is something else or repeats a name."""
    value = options.get(key, list(default))
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value) or len(set(value)) != len(value):
        raise ConfigError(f"features: option '{key}' of {featurizer} must be a list of different names", fix=f"{key}: [a, b]")
    return tuple(value)


def field_of_kind(featurizer: str, options: Mapping[str, Any], rt: RecordType, kind: str) -> Field:
    """Returns the field the option ``field`` names, else the record type's first field of ``kind``.

    Raises:
        ConfigError: there is none, or the named one is of another kind.
    """
    if "field" in options:
        chosen = rt.field(str(options["field"]))
        if chosen.kind != kind:
            raise ConfigError(
                f"features: {featurizer} needs a {kind} field, {chosen.name} is a {chosen.kind}", fix="name another field"
            )
        return chosen
    for field in rt.fields:
        if field.kind == kind:
            return field
    raise ConfigError(
        f"features: {featurizer} needs a {kind} field and {rt.name} has none",
        fix="remove the featurizer or use another record type",
    )


def column(records: pd.DataFrame, field: str, featurizer: str) -> pd.Series[Any]:
    """Returns a records column; raises FeatureError naming the field when it is not there."""
    if field not in records.columns:
        raise FeatureError(f"{featurizer}: the records have no field '{field}'", fix=f"supply the field '{field}'")
    return records[field]


def numbers(records: pd.DataFrame, field: str, featurizer: str, *, may_miss: bool = False) -> Array:
    """Returns a number column as float64, shape ``n``.

    Raises:
        FeatureError: a value is no finite number (NaN is permitted where ``may_miss``); names field and first row.
    """
    values: Array = pd.to_numeric(column(records, field, featurizer), errors="coerce").to_numpy(dtype=np.float64)
    absent = column(records, field, featurizer).isna().to_numpy()
    bad = ~np.isfinite(values) & ~(absent & may_miss)
    if bad.any():
        raise FeatureError(
            f"{featurizer}: {int(bad.sum())} record(s) have no finite number in field '{field}', first in "
            f"{row_name(records, int(np.argmax(bad)))}",
            fix="correct or remove those records",
        )
    return values


def texts(records: pd.DataFrame, field: str, featurizer: str) -> pd.Series[str]:
    """Returns a text column with absent values as ""."""
    return column(records, field, featurizer).fillna("").astype(str)


def per_distinct(
    records: pd.DataFrame,
    keys: Sequence[pd.Series[str]],
    width: int,
    compute: Callable[..., Sequence[float] | Array],
    about: str,
) -> Array:
    """Computes one row of features for every distinct combination of ``keys`` and spreads them over all records.

    Args:
        records: the table, for naming rows.
        keys: text columns, each of length ``n``.
        width: number of features ``p``.
        compute: takes one text per key, returns ``p`` numbers; raises ``ValueError`` with a reason that holds no value.
        about: featurizer and field, for the message.

    Returns:
        Shape ``n x p``. The order of rows does not influence any row's value.

    Raises:
        FeatureError: ``compute`` refused an input; the message names field, row and reason.
    """
    out = np.empty((len(records), width), dtype=np.float64)
    if not len(records):
        return out
    joined = pd.MultiIndex.from_arrays([k.to_numpy() for k in keys])
    codes, distinct = pd.factorize(joined)
    rows = np.empty((len(distinct), width), dtype=np.float64)
    for i, key in enumerate(distinct):
        try:
            rows[i] = compute(*key)
        except ValueError as error:
            first = int(np.argmax(codes == i))
            raise FeatureError(
                f"{about}: {row_name(records, first)}: {error}", fix="correct or remove the record, or choose other features"
            ) from None
    spread: Array = rows[codes]
    return spread
