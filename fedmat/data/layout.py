"""How a file of records is laid out: which adapter reads it, with which options, found by looking at it.

Knows: file endings, encodings, separators, lines above the header, rows of units. Refuses to know: what a column means.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmat.config import Source
from fedmat.data import adapters, units
from fedmat.data.cells import text_of
from fedmat.data.selection import PROBLEM, ROW
from fedmat.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

_TEXT, _BOOK, _BASE = (".csv", ".tsv", ".txt", ".dat", ".gz"), (".xlsx", ".xlsm", ".xls"), (".sqlite", ".sqlite3", ".db")
_LOOK = 40  # lines looked at to find the layout


@dataclass(frozen=True)
class Layout:
    """How a file is read: the adapter and its options, and what the header row said about units."""

    adapter: str
    options: dict[str, Any] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)


def inspect(path: Path) -> Layout:
    """Returns how ``path`` is read.

    Raises:
        DataError: it is missing, damaged or of no known kind.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder", fix="name the file that holds the records")
    name = path.name.lower()
    if path.is_dir() or name.endswith((".tar", ".tar.gz", ".tgz")):
        return Layout("structures")
    suffix = path.suffix.lower()
    if suffix in _TEXT:
        return _inspect_text(path)
    if suffix in _BOOK:
        return _inspect_book(path)
    if suffix == ".parquet":
        return Layout("parquet")
    if suffix in _BASE:
        return Layout("sql", {"table": _table(path)})
    raise DataError(
        f"{path}: files ending in '{suffix}' are not known",
        fix="use CSV, Excel, Parquet, SQLite, or a folder of CIF files; a database URL goes into site.yaml by hand",
    )


def raw(path: Path, layout: Layout) -> pd.DataFrame:
    """Returns the cells of a file, as its adapter reads them, under the file's own column names."""
    settings = {"adapter": layout.adapter, "path": str(path.resolve()), "options": layout.options, "columns": {}}
    frame = adapters.read_raw(Source.model_validate(settings), path.parent)
    return frame.loc[:, [c for c in frame.columns if c not in (ROW, PROBLEM)]]


def columns_of(path: Path, layout: Layout) -> list[str]:
    """Returns the column names of a file as its adapter sees them."""
    return [str(c) for c in raw(path, layout).columns]


def read(path: Path) -> pd.DataFrame:
    """Returns a file of records under contract field names, to be predicted: a known table format, or JSON.

    JSON is a list of objects, one object, or one object a line.

    Raises:
        DataError: the file is missing, damaged or of no known kind.
    """
    import pandas as pd

    if path.suffix.lower() not in (".json", ".jsonl"):
        return raw(path, inspect(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = path.suffix.lower() == ".jsonl"
        found = [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file", fix="name the file that holds the records") from None
    except (OSError, ValueError):
        raise DataError(f"{path}: not valid JSON", fix="write a list of objects, one per record") from None
    rows = found if isinstance(found, list) else [found]
    if not all(isinstance(r, dict) for r in rows):
        raise DataError(f"{path}: not a list of objects", fix='write [{"formula": ..., ...}, ...], one object per record')
    return pd.DataFrame(rows)


def _inspect_text(path: Path) -> Layout:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError):
        raise DataError(f"{path}: the file cannot be read", fix="check its permissions, or restore it") from None
    encoding, text = _decode(data)
    numbered = [(i, line) for i, line in enumerate(text.splitlines()[:_LOOK]) if not line.startswith("#")]
    lines = [line for _, line in numbered]
    options: dict[str, Any] = {} if encoding == "utf-8-sig" else {"encoding": encoding}
    separator = max((",", ";", "\t", "|"), key=lambda s: _regularity(lines, s))
    if separator != ",":
        options["sep"] = "tab" if separator == "\t" else separator
    rows = [_fields(line, separator) for line in lines]
    width = max((len(r) for r in rows), default=0)
    start = next((i for i, r in enumerate(rows) if sum(c.strip() != "" for c in r) > width / 2), 0)
    above = numbered[start][0] if numbered else 0
    if above:
        options["skiprows"] = above
    if any(line.startswith("#") for line in text.splitlines()[above:_LOOK]):
        options["comment"] = "#"
    header, body = (rows[start], rows[start + 1 :]) if rows else ([], [])
    said = _unit_row(header, body[0] if body else [])
    if said:
        options["skip_after_header"] = 1
    cells = [c.strip() for r in body for c in r]
    commas = sum(bool(re.fullmatch(r"[-+]?\d+,\d+", c)) for c in cells)
    if separator != "," and commas > sum("." in c for c in cells if _digits(c)):
        options["decimal"] = ","
    return Layout("csv", options, said)


def _inspect_book(path: Path) -> Layout:
    for skip in range(8):
        options: dict[str, Any] = {"skiprows": skip} if skip else {}
        names = columns_of(path, Layout("excel", options))
        if len(names) > 1 and sum(not re.fullmatch(r"column \d+", n) for n in names) > 0.6 * len(names):
            break
    else:
        options = {}
    frame = raw(path, Layout("excel", options))
    names = [str(c) for c in frame.columns]
    said = _unit_row(names, [text_of(frame[n].iloc[0]) for n in names]) if len(frame) else {}
    return Layout("excel", options | ({"skip_after_header": 1} if said else {}), said)


def _decode(data: bytes) -> tuple[str, str]:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16", data.decode("utf-16", errors="replace")
    try:
        return "utf-8-sig", data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "cp1252", data.decode("cp1252", errors="replace")


def _regularity(lines: Sequence[str], separator: str) -> float:
    """Returns how table-like the lines are under a separator: fields per line, if most lines agree."""
    counts = [len(_fields(line, separator)) for line in lines if line.strip()]
    if not counts:
        return 0.0
    common = max(set(counts), key=counts.count)
    return (common - 1) * counts.count(common) / len(counts)


def _fields(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:  # a cell beyond the limit of this module; the adapter has its own
        return line.split(separator)


def _unit_row(header: Sequence[str], row: Sequence[str]) -> dict[str, str]:
    """Returns column -> unit when the row under the header holds units instead of data, else nothing."""
    filled = [(h.strip(), c.strip().strip("[]()")) for h, c in zip(header, row, strict=False) if c.strip()]
    read = {h: c for h, c in filled if not _digits(c) and units.known(c)}
    return read if filled and len(read) >= max(2, len(filled) / 2) else {}


def _digits(text: str) -> bool:
    return bool(re.fullmatch(r"[-+<>~]?\s*[\d.,]+(?:[eE][-+]?\d+)?\s*%?", text))


def _table(path: Path) -> str:
    """Returns the name of the widest table of an SQLite file."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            names = [r[0] for r in database.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")]
            widths = {n: database.execute("SELECT count(*) FROM pragma_table_info(?)", (n,)).fetchone()[0] for n in names}
    except sqlite3.Error:
        raise DataError(f"{path}: not a readable SQLite file", fix="restore it, or name another file") from None
    if not widths:
        raise DataError(f"{path}: the database has no table", fix="name the file that holds the records")
    return str(max(sorted(widths), key=lambda n: widths[n]))
