"""Rejected rows: kept whole in the site's ``quarantine/`` with their reasons, and only counted everywhere else.

Knows: what a rejected row looked like in its source, and the site's own name for every field. Refuses to know: why a row
is rejected (``mapping``, ``validation``) and what is done about it (``records``).
``rejected.parquet`` holds one row per rejected row, complete; ``reasons.csv`` one line per bad cell, without its value.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fedmat import files
from fedmat.config import MixtureColumns, SiteConfig, Source
from fedmat.data import adapters
from fedmat.data.selection import PROBLEM, ROW
from fedmat.errors import DataError, StateError

COLUMNS = ("source", "source_row", "column", "field", "code", "reason", "raw")
_ROWS_NAMED = 5


@dataclass(frozen=True)
class Finding:
    """Rows of one column rejected for one reason, in the site's own terms.

    Attributes:
        column: the source's own column name.
        field: the contract field it is mapped to.
        rows: how many; ``first_rows`` are data rows counted from one.
    """

    source: str
    file: str
    column: str
    field: str
    code: str
    reason: str
    rows: int
    first_rows: tuple[int, ...]


def complete(site: SiteConfig, base: Path, judged: pd.DataFrame) -> pd.DataFrame:
    """Returns rejected records (``field``, ``code``, ``reason``) with their own column's name and their whole raw row.

    Args:
        judged: from ``validation.split_valid``, with ``source`` and ``source_row``.

    Raises:
        DataError: a source changed since it was read.
    """
    parts = []
    for source in site.sources:
        part = judged.loc[judged["source"] == source.name]
        if len(part):
            raw = _raw_rows(site, source, base, {int(r) for r in part["source_row"]})
            columns = [own_column(source, str(name)) for name in part["field"]]
            parts.append(part.assign(column=columns, raw=[raw[int(r)] for r in part["source_row"]]).loc[:, list(COLUMNS)])
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(COLUMNS)).astype({"source_row": "int64"})


def counts(rejected: pd.DataFrame) -> dict[str, int]:
    """Returns rejected rows by reason code; a row with several bad cells counts once, under its first."""
    first = rejected.drop_duplicates(["source", "source_row"])["code"]
    return {str(code): int(n) for code, n in sorted(Counter(first).items())}


def findings(site: SiteConfig, rejected: pd.DataFrame) -> tuple[Finding, ...]:
    """Returns what is wrong by source, column and reason, the most frequent first; no value is in it."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for *what, row in zip(*(rejected[c] for c in ("source", "column", "field", "code", "reason", "source_row")), strict=True):
        rows.setdefault(tuple(map(str, what)), []).append(int(row))
    found = [
        Finding(source, path_of(site, source), column, name, code, reason, len(at), tuple(sorted(at)[:_ROWS_NAMED]))
        for (source, column, name, code, reason), at in rows.items()
    ]
    return tuple(sorted(found, key=lambda f: (-f.rows, f.source, f.column, f.code)))


def write(folder: Path, site: str, rejected: pd.DataFrame) -> None:
    """Replaces the quarantine of a workspace by ``rejected``, as a whole or not at all.

    Raises:
        StateError: it cannot be written; the quarantine that was there is kept.
    """
    reasons = rejected.loc[:, [c for c in COLUMNS if c != "raw"]]
    whole = rejected.drop_duplicates(["source", "source_row"]).astype({"source_row": "int64"})
    write_whole(
        folder,
        {
            "quarantine/rejected.parquet": table_bytes(whole),
            "quarantine/reasons.csv": reasons.to_csv(index=False, lineterminator="\n").encode(),
        },
        f"site {site}: the quarantine",
    )


def write_whole(folder: Path, contents: dict[str, bytes], what: str) -> None:
    """Writes files together (``fedmat.files.write_together``); a full disk or missing permission is a StateError."""
    try:
        files.write_together(folder, contents)
    except OSError as error:
        raise StateError(
            f"{what} in {folder} cannot be written ({os.strerror(error.errno or 0)}); what was there before is kept",
            fix="free space or correct the permissions of that folder, then run the step again",
        ) from None


def table_bytes(frame: pd.DataFrame) -> bytes:
    """Returns ``frame`` as Parquet: numbers as float64 or int64, anything else as text; no index, no library's notes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"f": pa.float64(), "i": pa.int64()}
    columns = {
        str(name): pa.array(column.to_numpy(), type=kinds[column.dtype.kind])
        if column.dtype.kind in kinds
        else pa.array([str(cell) for cell in column], type=pa.string())
        for name, column in frame.items()
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    return buffer.getvalue()


def own_column(source: Source, name: str) -> str:
    """Returns the site's own name for a contract field."""
    spec = source.columns.get(name)
    if isinstance(spec, MixtureColumns):
        own = list(spec.fractions)
        return " + ".join(own[:4]) + (f" + {len(own) - 4} more" if len(own) > 4 else "")
    if spec is not None:
        return spec.source
    if name in source.constants:
        return "(a constant in site.yaml)"
    if source.structures is not None and name == "structure":
        return source.structures.on
    return "(not mapped)" if name else "(whole row)"


def path_of(site: SiteConfig, name: str) -> str:
    """Returns the file of the source called ``name``, as site.yaml has it."""
    return next((s.path or s.adapter for s in site.sources if s.name == name), "")


def _raw_rows(site: SiteConfig, source: Source, base: Path, wanted: set[int]) -> dict[int, str]:
    """Returns {source row: JSON text of the whole raw row}: what was rejected is kept as it stands in the source."""
    raw = adapters.read_raw(source, base)
    raw = raw.loc[raw[ROW].isin(wanted)]
    own = [c for c in raw.columns if c not in (ROW, PROBLEM)]
    rows = {
        int(number): json.dumps(dict(zip(map(str, own), row, strict=True)), ensure_ascii=False, default=str)
        for number, row in zip(raw[ROW], raw[own].astype(object).to_numpy().tolist(), strict=True)
    }
    if set(rows) != wanted:
        raise DataError(
            f"site {site.site}, source '{source.name}' ({source.path or source.adapter}): it changed while it was read",
            fix="let the export finish and run the step again",
        )
    return rows
