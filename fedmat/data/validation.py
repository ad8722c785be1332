"""Judges records against the contract: one record at a time (pandera and chemistry), then the batch (Great Expectations).

Knows: every reason for which a record is not accepted, and how to say it without repeating the record. Refuses to know:
files of a site, units of a source (values arrive in the contract's units) and what a model does with a record.
pandera's failure cases and Great Expectations' results hold cell values; both stop here.

References:
    pandera lazy validation: https://pandera.readthedocs.io. Great Expectations result formats:
    https://docs.greatexpectations.io (``BOOLEAN_ONLY`` is the only one without values).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import fedmat.telemetry  # noqa: F401  before Great Expectations
from fedmat import files
from fedmat.data import canonical
from fedmat.data.contract import CONTRACT_VERSION, Field, RecordType, censored_columns, gx_suite, pandera_schema
from fedmat.errors import DataError, SiteRefused

REASONS = {
    "missing": "the value is absent",
    "no_target": "none of the values to be predicted is there",
    "not_a_number": "the cell is not plainly one finite number",
    "not_positive": "the value is zero or negative",
    "out_of_range": "the value lies outside the contract's limits",
    "unknown_category": "the value is none of the contract's categories",
    "bad_formula": "the text is not a chemical formula",
    "bad_smiles": "the text is not a molecule",
    "bad_mixture": "the fractions are not a mixture that sums to one",
    "bad_structure": "the text is not exactly one crystal structure",
    "duplicate": "the measurement was given before",
}
_PRIORITY = {code: i for i, code in enumerate(REASONS)}
_ROWS_NAMED = 8

Problem = tuple[int, str, str]  # row position, field, code


@dataclass(frozen=True)
class BatchResult:
    """What Great Expectations said about a batch: verdicts only.

    Attributes:
        failed: expectations that did not hold, as ``type(column)``.
        document: the content of ``validation.json``.
    """

    success: bool
    evaluated: int
    failed: tuple[str, ...]
    document: dict[str, Any]


def split_valid(
    df: pd.DataFrame, rt: RecordType, *, target: str | Sequence[str] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Divides records into accepted and rejected ones.

    Args:
        df: one row per record; the contract's fields in the contract's units, absent optional columns allowed; other
            columns (source, row number) are carried along.
        target: field that must be present even if the contract calls it optional; of several, at least one must be.

    Returns:
        The accepted records with every field in its canonical form, and the rejected ones as they came with ``field``,
        ``code`` and ``reason``: one row per bad cell, in row order. A repeat of an accepted record in all of
        ``rt.unique`` is rejected as ``duplicate``; the first one stays. The index of ``df`` is kept in both.

    Raises:
        DataError: a required column is missing altogether.
    """
    targets = () if target is None else (target,) if isinstance(target, str) else tuple(target)
    frame, found = _canonical_form(df, rt)
    found += _schema_problems(frame, rt, targets if len(targets) == 1 else ())
    found += _companions_missing(frame, rt)
    if len(targets) > 1:
        found += [(int(i), "", "no_target") for i in np.flatnonzero(frame[list(targets)].isna().all(axis=1))]
    bad = {row for row, _, _ in found}
    good = np.array([i not in bad for i in range(len(frame))], dtype=bool)
    repeats = np.zeros(len(frame), dtype=bool)
    repeats[good] = identity(frame.loc[good], rt).duplicated(keep="first").to_numpy()
    found += [(int(i), "", "duplicate") for i in np.flatnonzero(repeats)]
    found = _one_reason_a_cell(found, rt)
    accepted = frame.set_index(df.index).loc[good & ~repeats]
    rejected = df.iloc[[row for row, _, _ in found]].copy()
    rejected["field"] = [name for _, name, _ in found]
    rejected["code"] = [code for _, _, code in found]
    rejected["reason"] = [explain(code, name, rt) for _, name, code in found]
    return accepted, rejected


def coerce(df: pd.DataFrame, rt: RecordType, *, need_target: str | None = None) -> pd.DataFrame:
    """Returns records to be predicted in canonical form, or refuses them all: an answer is due for every row.

    Args:
        df: contract fields in the contract's units. Measured fields may be absent unless ``need_target`` names them.

    Returns:
        All contract fields in contract order with their censoring flags, on the index of ``df``.

    Raises:
        DataError: fields and row numbers (from 1) of everything wrong; values are never repeated.
    """
    wanted = dataclasses.replace(
        rt, fields=tuple(dataclasses.replace(f, required=f.name == need_target) if f.measured else f for f in rt.fields)
    )
    frame, found = _canonical_form(df, wanted)
    found += _schema_problems(frame, wanted, () if need_target is None else (need_target,))
    found += _companions_missing(frame, wanted)
    found = _one_reason_a_cell(found, rt)
    if found:
        lines = []
        for name, code in sorted({(n, c) for _, n, c in found}):
            rows = [row + 1 for row, n, c in found if (n, c) == (name, code)]
            lines.append(f"field '{name}', row {name_rows(rows)}: {explain(code, name, rt)} ({code})")
        raise DataError("records do not meet the contract:\n  " + "\n  ".join(lines), fix="correct the named fields and rows")
    return frame.set_index(df.index).loc[:, [f.name for f in rt.fields] + list(censored_columns(rt))]


def validate_batch(df: pd.DataFrame, rt: RecordType, out: Path) -> BatchResult:
    """Runs the Great Expectations suite on accepted records and writes its verdicts to ``out/validation.json``.

    Args:
        df: all columns of ``records.parquet``.
    """
    result = run_suite(df, rt)
    files.write_json(out / "validation.json", result.document)
    return result


def run_suite(df: pd.DataFrame, rt: RecordType) -> BatchResult:
    """Runs the suite without writing anything; see :func:`validate_batch`.

    Raises:
        SiteRefused: Great Expectations itself failed on this batch.
    """
    import great_expectations as gx
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    suite = gx_suite(rt)
    try:
        with _quiet("great_expectations"):
            settings = DataContextConfig(
                store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),  # its pages hold values
                progress_bars=ProgressBarsConfig(globally=False),
            )
            context: Any = gx.get_context(mode="ephemeral", project_config=settings)
            batch = (
                context.data_sources.add_pandas("site")
                .add_dataframe_asset("records")
                .add_batch_definition_whole_dataframe("accepted")
                .get_batch(batch_parameters={"dataframe": df})
            )
            numbered = [{**e, "meta": {"number": i}} for i, e in enumerate(suite["expectations"])]
            raw: Any = batch.validate(
                gx.ExpectationSuite(name=suite["name"], expectations=numbered), result_format="BOOLEAN_ONLY"
            ).to_json_dict()
    except Exception as error:  # noqa: BLE001  its messages may hold cells
        raise SiteRefused(
            f"Great Expectations could not run the {rt.name} suite ({type(error).__name__})",
            fix="check the installation with 'pip check'; the records themselves passed one by one",
        ) from None
    # results come in an order of their own; exception texts and batch markers hold values, times and fingerprints
    verdicts = {r["expectation_config"]["meta"]["number"]: bool(r["success"]) for r in raw["results"]}
    lines = [{**e, "success": verdicts.get(i, False)} for i, e in enumerate(suite["expectations"])]
    failed = tuple(f"{e['type']}({e['kwargs'].get('column', '')})" for e in lines if not e["success"])
    document = {
        "schema": "fedmat/validation/1",
        "suite": suite["name"],
        "contract_version": CONTRACT_VERSION,
        "great_expectations": gx.__version__,
        "result_format": "BOOLEAN_ONLY",
        "success": not failed,
        "evaluated": len(lines),
        "failed": len(failed),
        "expectations": lines,
    }
    return BatchResult(not failed, len(lines), failed, document)


def identity(frame: pd.DataFrame, rt: RecordType) -> pd.DataFrame:
    """Returns the columns that tell whether two canonical records are one measurement, in comparable form."""
    flags = [c for c in censored_columns(rt) if c in frame.columns]
    return pd.DataFrame(
        {**{n: keys(frame[n], rt.field(n)) for n in rt.unique}, **{c: frame[c] for c in flags}}, index=frame.index
    )


def keys(column: pd.Series[Any], field: Field) -> list[Any]:
    """Returns a column's values such that equal values of ``field`` are equal, whatever their notation was."""
    if field.kind == "number":
        return [canonical.number_key(v) for v in column.to_numpy(dtype=np.float64)]
    return [canonical.formula_key(v) for v in column] if field.kind == "formula" else list(column)


def explain(code: str, name: str, rt: RecordType) -> str:
    """Returns the reason in words: the contract's side of it, never the record's."""
    text = REASONS.get(code, code.replace("_", " "))
    if code == "duplicate":
        return f"{text}: equal in {', '.join(rt.unique)}"
    if code not in ("out_of_range", "unknown_category") or name not in {f.name for f in rt.fields}:
        return text
    field = rt.field(name)
    if code == "out_of_range":
        return f"{text}, {field.low:g} to {field.high:g} {field.unit or ''}".rstrip()
    return f"{text}: {', '.join(c for c in field.categories if c)}"


def name_rows(rows: Sequence[int]) -> str:
    """Returns the first few row numbers as text."""
    more = len(rows) - _ROWS_NAMED
    return ", ".join(map(str, rows[:_ROWS_NAMED])) + (f" and {more} more" if more > 0 else "")


# --- inside --------------------------------------------------------------------------------------------------------


def _canonical_form(df: pd.DataFrame, rt: RecordType) -> tuple[pd.DataFrame, list[Problem]]:
    """Returns a copy of ``df`` (rows 0..n-1) with every field in canonical form, and the cells that have none."""
    absent = [f.name for f in rt.fields if f.required and f.name not in df.columns]
    if absent:
        raise DataError(
            f"{rt.name} records lack the column{'s' if len(absent) > 1 else ''} {', '.join(absent)}",
            fix="give every required field of the contract a column",
        )
    found: list[Problem] = []
    columns: dict[str, Any] = {}
    for field in rt.fields:
        cells = list(df[field.name]) if field.name in df.columns else [None] * len(df)
        if field.kind == "number":
            columns[field.name] = np.array([_number(c) for c in cells], dtype=np.float64)
            found += [
                (int(i), field.name, "not_a_number")
                for i in np.flatnonzero(np.isnan(columns[field.name]))
                if not _blank(cells[i])
            ]
            continue
        texts = [_text(c) for c in cells]
        if field.kind in canonical.CANONICAL:
            code, parse = canonical.CANONICAL[field.kind]
            parsed = {t: parse(t) for t in dict.fromkeys(texts) if t}  # once for each distinct text
            found += [(i, field.name, code) for i, t in enumerate(texts) if t and parsed[t] is None]
            texts = [parsed.get(t) or "" for t in texts]
        columns[field.name] = texts
    for name in censored_columns(rt):
        columns[name] = [_text(c) for c in df[name]] if name in df.columns else [""] * len(df)
    rest = {c: df[c].to_numpy() for c in df.columns if c not in columns}
    return pd.DataFrame({**columns, **rest}, index=pd.RangeIndex(len(df))), found


def _schema_problems(frame: pd.DataFrame, rt: RecordType, required: Iterable[str]) -> list[Problem]:
    import pandera.pandas as pa

    schema = pandera_schema(rt, required=tuple(required))
    if not len(frame):
        return []
    try:
        schema.validate(frame, lazy=True)
    except pa.errors.SchemaErrors as error:
        cases = error.failure_cases
    else:
        return []
    found: list[Problem] = []
    for row, column, check in zip(cases["index"], cases["column"], cases["check"], strict=True):
        if row is None or (isinstance(row, float) and math.isnan(row)):  # a whole column: never a record's fault
            raise DataError(f"{rt.name} records: column {column} is not of the contract's type", fix="report this as a fault")
        found.append((int(row), str(column), "missing" if check == "not_nullable" else str(check)))
    return found


def _companions_missing(frame: pd.DataFrame, rt: RecordType) -> list[Problem]:
    """Returns optional texts that are absent although the number they belong to is above zero."""
    return [
        (int(i), field.name, "missing")
        for field in rt.fields
        if field.needed_where
        for i in np.flatnonzero((frame[field.name] == "").to_numpy() & (frame[field.needed_where] > 0).to_numpy())
    ]


def _one_reason_a_cell(found: list[Problem], rt: RecordType) -> list[Problem]:
    """Returns problems by row and field with the most telling code for each cell."""
    order = {f.name: i for i, f in enumerate(rt.fields)}
    best: dict[tuple[int, str], str] = {}
    for row, name, code in found:
        kept = best.get((row, name))
        # what could not be parsed is empty by now; 'missing' would hide the cause
        if kept in (None, "missing") or (code != "missing" and _PRIORITY.get(code, 99) < _PRIORITY.get(str(kept), 99)):
            best[row, name] = code
    return sorted(((r, n, c) for (r, n), c in best.items()), key=lambda p: (p[0], order.get(p[1], len(order)), p[1]))


def _blank(cell: object) -> bool:
    return _text(cell) == ""


def _text(cell: object) -> str:
    if cell is None or cell is pd.NA or cell is pd.NaT or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return str(cell).strip()


def _number(cell: object) -> float:
    if isinstance(cell, bool | np.bool_):
        return math.nan
    if isinstance(cell, Real):
        return float(cell) + 0.0  # -0.0 and 0.0 are one value and must give one digest
    try:
        return float(_text(cell)) + 0.0
    except ValueError:
        return math.nan


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Holds back a library's log for a while: its tracebacks repeat cells."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)
