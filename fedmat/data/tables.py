"""Delimited text and rows of cells as raw tables: quoting, encodings, headers, row numbers.

Knows: RFC 4180 and what laboratories make of it. Refuses to know: what a column means. Row numbers count data rows, empty
ones too, so that they match what a person sees in the file.

References:
    Y. Shafranovich, "Common Format and MIME Type for Comma-Separated Values (CSV) Files", RFC 4180, 2005.
"""

from __future__ import annotations

import csv
import decimal
import gzip
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fedmat.data import cells
from fedmat.data.selection import PROBLEM, ROW
from fedmat.errors import ConfigError, DataError

_MAX_CELL = 2**26  # a structure may sit in one cell


def read_delimited(path: Path, options: Mapping[str, Any]) -> pd.DataFrame:
    """Returns a delimited text file as raw text cells; options as in ``adapters.CsvAdapter``."""
    encoding = str(options.get("encoding", "utf-8-sig"))
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode(encoding)
    except LookupError:
        raise ConfigError(f"{path}: options.encoding names an unknown encoding", fix="e.g. utf-8, cp1252, utf-16") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: the file is not {encoding} text", fix="set options.encoding, e.g. cp1252 or utf-16") from None
    except (OSError, EOFError):
        raise DataError(f"{path}: the file cannot be read", fix="check its permissions, or restore it") from None
    lines = io.StringIO(text, newline="")
    for _ in range(count_option(options, "skiprows")):
        lines.readline()
    comment = str(options.get("comment", ""))
    wanted: Iterable[str] = (line for line in lines if not line.startswith(comment)) if comment else lines
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_CELL))
    try:
        separator = {"tab": "\t", "\\t": "\t"}.get(str(options.get("sep", ",")), str(options.get("sep", ",")))
        reader = csv.reader(wanted, delimiter=separator, quotechar=str(options.get("quotechar", '"')), strict=True)
        rows = list(reader)
    except TypeError:
        raise ConfigError(f"{path}: options.sep and options.quotechar are one character each", fix="e.g. sep: ';'") from None
    except csv.Error:
        raise DataError(
            f"{path}: quoting is broken at or before line {reader.line_num + count_option(options, 'skiprows')}",
            fix="close the quotes in the file, or set options.quotechar",
        ) from None
    return table_of(rows, count_option(options, "skip_after_header"), path)


def count_option(options: Mapping[str, Any], name: str) -> int:
    """Returns a whole number of rows among ``options``, 0 when absent; raises ConfigError for anything else."""
    value = options.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"options.{name} must be a whole number of rows", fix="write e.g. 2")
    return value


def table_of(rows: Sequence[Sequence[Any]], skip_after_header: int, path: Path) -> pd.DataFrame:
    """Returns rows of cells as a table: the first row names the columns, empty rows are left out but counted."""
    if not rows:
        raise DataError(f"{path}: the file is empty", fix="name the file that holds the records")
    names = _header(rows[0])
    width = len(names)
    table, numbers, problems = [], [], []
    for number, row in enumerate(rows[1 + skip_after_header :], start=1):
        if all(_empty(c) for c in row):
            continue
        extra = not all(_empty(c) for c in row[width:])
        # the surplus of a ragged row stays with its last cell: the quarantine shows the row whole
        cut = [*row[: width - 1], " | ".join(str(c) for c in row[width - 1 :])] if extra else list(row[:width])
        table.append(cut + [""] * (width - len(cut)))
        numbers.append(number)
        problems.append("ragged_row" if extra else "")
    frame = pd.DataFrame(table, columns=names, dtype=object)
    frame[ROW] = pd.Series(numbers, dtype="int64")
    if any(problems):
        frame[PROBLEM] = problems
    return frame


def _empty(cell: Any) -> bool:
    return cell == "" if isinstance(cell, str) else cells.text_of(cell) == ""


def _header(row: Sequence[Any]) -> list[str]:
    """Returns column names without outer blanks; nameless columns get their position, repeated names get a number each."""
    names = [cells.text_of(c) or f"column {i}" for i, c in enumerate(row, start=1)]
    while len(names) > 1 and _empty(row[len(names) - 1]):
        names.pop()  # trailing separators
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(f"{name} #{seen[name]}" if names.count(name) > 1 else name)
    return result


def raw_frame(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> pd.DataFrame:
    """Returns named columns and rows of cells as a raw table; exact decimals become numbers."""
    plain = [[float(c) if isinstance(c, decimal.Decimal) else c for c in row] for row in rows]
    frame = pd.DataFrame(plain, columns=_header(names), dtype=object)
    frame[ROW] = pd.Series(range(1, len(frame) + 1), dtype="int64")
    return frame
