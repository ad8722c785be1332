"""Readers of what laboratories keep: CSV, Excel, Parquet, SQL tables and folders of crystal structures.

Knows: file formats, encodings, credentials from the environment; rows keep the source's own column names and row numbers.
Refuses to know: what a column means (``mapping``) and which rows take part (``selection``). Nothing is written, a database
is only read, and no message repeats a cell.

A third party adds a reader by subclassing :class:`LegacyAdapter` under the entry point group ``fedmat.adapters``.

References:
    CSV: RFC 4180. Credentials in the environment: The Twelve-Factor App, "Config".
"""

from __future__ import annotations

import difflib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pandas as pd

from fedmat.config import SiteConfig, Source, resolve_path
from fedmat.data import cells, mapping, selection, structures
from fedmat.data.contract import RecordType
from fedmat.data.database import read_database
from fedmat.data.mapping import Notation, RawBatch
from fedmat.data.selection import PROBLEM, ROW
from fedmat.data.tables import count_option, raw_frame, read_delimited, table_of
from fedmat.errors import ConfigError, DataError, FedmatError
from fedmat.files import canonical_json, sha256, sha256_file

GROUP = "fedmat.adapters"
_NOTATION = frozenset(("decimal", "thousands", "missing"))  # options every adapter takes: how numbers are typed


class LegacyAdapter(ABC):
    """Port: reads one source as a table of raw cells.

    Attributes:
        OPTIONS: keys allowed under ``options`` besides decimal, thousands and missing; None leaves that to the adapter.
    """

    OPTIONS: ClassVar[frozenset[str] | None] = None

    @abstractmethod
    def read(self, source: Source, base: Path) -> pd.DataFrame:
        """Returns raw cells (text or numbers) under the source's own column names, plus ``__row__`` (1-based data row).

        An optional column ``__problem__`` holds a reason code for rows that could not be read.

        Args:
            source: its ``path`` and ``options``.
            base: the folder of site.yaml, which relative paths start from.

        Raises:
            ConfigError: an option is wrong.
            DataError: the source is missing or damaged.
        """

    def complete(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Returns ``frame`` with what is too costly for every row; called with the rows that take part only."""
        return frame


# --- files -------------------------------------------------------------------------------------------------------


class CsvAdapter(LegacyAdapter):
    """Delimited text, also gzip-compressed.

    Options: ``sep`` (","), ``encoding`` ("utf-8-sig": UTF-8 with or without byte order mark), ``quotechar`` ('"'),
    ``skiprows`` (lines above the header, 0), ``skip_after_header`` (rows under it, such as a row of units, 0),
    ``comment`` (lines that start with it are left out).
    """

    OPTIONS = frozenset(("sep", "encoding", "quotechar", "skiprows", "skip_after_header", "comment"))

    def read(self, source: Source, base: Path) -> pd.DataFrame:
        """Returns the file's rows as text cells."""
        return read_delimited(_file(source, base), source.options)


class ExcelAdapter(LegacyAdapter):
    """One sheet of a workbook; formulas count with the value that was saved with them.

    Options: ``sheet`` (name or 0-based number, the first one), ``skiprows``, ``skip_after_header`` as for CSV.
    """

    OPTIONS = frozenset(("sheet", "skiprows", "skip_after_header"))

    def read(self, source: Source, base: Path) -> pd.DataFrame:
        """Returns the sheet's rows, cells as they are typed (text, number, date)."""
        path = _file(source, base)
        sheet = source.options.get("sheet", 0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # openpyxl warns about styles and validation lists it drops
                with pd.ExcelFile(path) as book:
                    names = [str(n) for n in book.sheet_names]
                    if sheet not in names and not (isinstance(sheet, int) and 0 <= sheet < len(names)):
                        near = difflib.get_close_matches(str(sheet), names, n=1, cutoff=0.4)
                        hint = f"did you mean '{near[0]}'?" if near else f"its sheets: {', '.join(names)}"
                        raise ConfigError(f"{path}: no sheet '{sheet}'; {hint}", fix="correct options.sheet")
                    raw = book.parse(sheet, header=None, dtype=object, na_filter=False)
        except FedmatError:
            raise
        except ImportError:
            raise DataError(f"{path}: this kind of workbook cannot be read", fix="save it as .xlsx") from None
        except Exception:  # noqa: BLE001  zip, XML and openpyxl errors alike mean: not a workbook
            raise DataError(f"{path}: not a readable workbook", fix="open it in a spreadsheet and save it as .xlsx") from None
        rows = raw.to_numpy(dtype=object).tolist()[count_option(source.options, "skiprows") :]
        return table_of(rows, count_option(source.options, "skip_after_header"), path)


class ParquetAdapter(LegacyAdapter):
    """One Parquet file. No options."""

    OPTIONS = frozenset()

    def read(self, source: Source, base: Path) -> pd.DataFrame:
        """Returns the file's rows, a named index as columns."""
        path = _file(source, base)
        try:
            frame = pd.read_parquet(path)
        except Exception:  # noqa: BLE001  Arrow raises its own errors, some with values
            raise DataError(f"{path}: not a readable Parquet file", fix="write it again, or restore it") from None
        if any(name is not None for name in frame.index.names):
            frame = frame.reset_index()
        return raw_frame([str(c) for c in frame.columns], frame.to_numpy(dtype=object).tolist())


class SqlAdapter(LegacyAdapter):
    """A table or a query of a database that SQLAlchemy reaches; ``path`` is its URL or an SQLite file.

    Options: ``table`` (with ``schema`` where needed) or ``query``, exactly one. A table is read in the order of its primary
    key, else in the order of its rows' text; a query needs its own ORDER BY for stable row numbers.
    User names and passwords come from environment variables: ``postgresql://${LAB_USER}:${LAB_PASSWORD}@host/db``.
    """

    OPTIONS = frozenset(("table", "schema", "query"))

    def read(self, source: Source, base: Path) -> pd.DataFrame:
        """Returns the rows of the table or query."""
        return raw_frame(*read_database(source.path, source.options, base))


class StructuresAdapter(LegacyAdapter):
    """A folder or tar archive of CIF or pymatgen JSON files, one row each: ``id`` (file stem), ``formula``, ``structure``.

    Options: ``table`` (a CSV file with what was measured) joined on its column ``key`` = file stem, its ``sep`` and
    ``encoding``. Rows then follow the table; neither a table row without a file nor a file without a row is dropped.
    A table column called id, formula or structure becomes ``table.id`` and so on.
    """

    OPTIONS = frozenset(("table", "key", "sep", "encoding"))
    OWN = ("id", "formula", "structure")

    def read(self, source: Source, base: Path) -> pd.DataFrame:
        """Returns one row per table row or file; formulas come with :meth:`complete`."""
        texts = structures.read_texts(_path(source, base))
        table, key = source.options.get("table"), source.options.get("key")
        if (table is None) != (key is None):
            raise ConfigError("options.table and options.key go together", fix="name both, or neither")
        if table is None:
            return raw_frame(self.OWN, [[stem, "", text] for stem, text in texts.items()])
        path = resolve_path(str(table), base)
        if not path.is_file():
            raise DataError(f"{path}: no such file", fix="correct options.table")
        joined = read_delimited(path, source.options)
        selection.require_columns(joined, [(str(key), "options.key")], str(path))
        stems = [cells.text_of(c) for c in joined[str(key)]]
        joined = joined.rename(columns={name: f"table.{name}" for name in self.OWN})
        joined["id"], joined["formula"], joined["structure"] = stems, "", [texts.get(s, "") for s in stems]
        left = [s for s in texts if s not in set(stems)]
        if left:
            last = int(joined[ROW].max()) if len(joined) else 0
            rest = pd.DataFrame({"id": left, "formula": "", "structure": [texts[s] for s in left]}, dtype=object)
            rest[ROW] = range(last + 1, last + 1 + len(left))
            joined = pd.concat([joined, rest.reindex(columns=joined.columns, fill_value="")], ignore_index=True)
        return joined

    def complete(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Returns ``frame`` with structures parsed and formulas filled in; a bad one is ``bad_structure``."""
        parsed = {text: structures.parse(text) for text in dict.fromkeys(frame["structure"]) if text}
        problems = list(frame[PROBLEM]) if PROBLEM in frame else [""] * len(frame)
        formulas, found = [], []
        for i, text in enumerate(frame["structure"]):
            result = parsed.get(text)
            if text and result is None:
                problems[i] = problems[i] or "bad_structure"
            formulas.append(result[0] if result else "")
            found.append(result[1] if result else text)
        return frame.assign(formula=formulas, structure=found, **{PROBLEM: problems})


# --- one source of a site ----------------------------------------------------------------------------------------

ADAPTERS: Mapping[str, type[LegacyAdapter]] = {
    "csv": CsvAdapter,
    "excel": ExcelAdapter,
    "parquet": ParquetAdapter,
    "sql": SqlAdapter,
    "structures": StructuresAdapter,
}


def adapter_for(name: str) -> LegacyAdapter:
    """Returns the reader called ``name``: one of ours, or one installed under the entry point group ``fedmat.adapters``.

    Raises:
        ConfigError: there is none, or the installed one cannot be loaded.
    """
    if name in ADAPTERS:
        return ADAPTERS[name]()
    from importlib.metadata import entry_points

    installed = {e.name: e for e in entry_points(group=GROUP)}
    if name not in installed:
        names = [*ADAPTERS, *installed]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(names)}"
        raise ConfigError(f"there is no adapter '{name}'; {hint}", fix=f"correct 'adapter', or install one ({GROUP})")
    try:
        adapter = installed[name].load()()
    except Exception as error:  # noqa: BLE001  third-party code: any failure means it cannot be used
        raise ConfigError(
            f"adapter '{name}' cannot be loaded ({type(error).__name__})", fix="mend or remove its package"
        ) from None
    if not isinstance(adapter, LegacyAdapter):
        raise ConfigError(f"adapter '{name}' is not a LegacyAdapter", fix="subclass fedmat.data.adapters.LegacyAdapter")
    return adapter


def read_raw(source: Source, base: Path) -> pd.DataFrame:
    """Returns every row of a source under its own column names, as the adapter reads it.

    Raises:
        ConfigError, DataError: see :meth:`LegacyAdapter.read`.
    """
    adapter = adapter_for(source.adapter)
    _check_options(source, adapter)
    return _read(adapter, source, base)


def read_source(site: SiteConfig, source: Source, base: Path, rt: RecordType) -> RawBatch:
    """Reads one source of a site as the contract's fields in canonical units.

    Args:
        base: the folder of site.yaml.
        rt: the site's record type.

    Returns:
        Readable rows and one line for every bad cell; see :class:`fedmat.data.mapping.RawBatch`.

    Raises:
        ConfigError: the mapping names an unknown field, column, unit, option or adapter.
        DataError: the source is missing or damaged, or no row takes part.
    """
    shown = source.path if source.path and "://" not in source.path else source.adapter  # a URL may hold secrets
    where = f"source '{source.name}' ({shown})"
    try:
        mapping.check(source, rt)
        adapter = adapter_for(source.adapter)
        _check_options(source, adapter)
        frame = _read(adapter, source, base)
        digest = _digest(source, base, frame)
        table = None if source.select is None else read_delimited(_existing(resolve_path(source.select.table, base)), {})
        frame = adapter.complete(selection.keep_rows(frame, source, table, where))
        texts = None if source.structures is None else _structure_texts(source, base, frame, where)
        batch = mapping.convert(frame, source, rt, _notation(source), texts, where)
    except FedmatError as error:
        raise type(error)(
            f"site {site.site}, {error.what}" if where in error.what else f"site {site.site}, {where}: {error.what}",
            fix=error.fix,
        ) from None
    return replace(batch, file_sha256=digest)


def _read(adapter: LegacyAdapter, source: Source, base: Path) -> pd.DataFrame:
    try:
        frame = adapter.read(source, base)
    except FedmatError:
        raise
    except Exception as error:  # noqa: BLE001  a reader's own errors may hold cell values
        raise DataError(
            f"adapter '{source.adapter}' failed ({type(error).__name__})", fix="check the source and the adapter's options"
        ) from None
    if ROW not in frame:
        frame = frame.assign(**{ROW: range(1, len(frame) + 1)})
    return frame.reset_index(drop=True)


def _check_options(source: Source, adapter: LegacyAdapter) -> None:
    if adapter.OPTIONS is not None:
        valid = sorted(adapter.OPTIONS | _NOTATION)
        for key in source.options:
            if key not in valid:
                near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
                hint = f"did you mean '{near[0]}'?" if near else f"valid options: {', '.join(valid)}"
                raise ConfigError(
                    f"options.{key}: adapter '{source.adapter}' has no such option; {hint}", fix="correct it in site.yaml"
                )
    _notation(source)


def _notation(source: Source) -> Notation:
    mark, thousands = source.options.get("decimal", "."), source.options.get("thousands", "")
    missing = source.options.get("missing", [])
    if mark not in (".", ",") or not isinstance(thousands, str) or len(thousands) > 1 or thousands == mark:
        raise ConfigError("options.decimal is '.' or ',', options.thousands another single character", fix="e.g. decimal: ','")
    if not isinstance(missing, list) or not all(isinstance(m, str | int | float) for m in missing):
        raise ConfigError("options.missing is a list of words that mean 'no value'", fix="e.g. missing: ['-999']")
    return Notation(
        mark, cells.text_of(thousands) or thousands[:1].replace("\u00a0", " "), tuple(cells.text_of(m) for m in missing)
    )


def _path(source: Source, base: Path) -> Path:
    if not source.path:
        raise ConfigError(f"adapter '{source.adapter}' needs 'path'", fix="name the file, relative to site.yaml")
    return resolve_path(source.path, base)


def _file(source: Source, base: Path) -> Path:
    return _existing(_path(source, base))


def _existing(path: Path) -> Path:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, _siblings(path), n=1, cutoff=0.6)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise DataError(f"{path}: no such file{hint}", fix="correct the path in site.yaml")
    return path


def _siblings(path: Path) -> list[str]:
    return [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []


def _structure_texts(source: Source, base: Path, frame: pd.DataFrame, where: str) -> dict[str, str]:
    if source.structures is None:
        return {}
    selection.require_columns(frame, [(source.structures.on, "structures.on")], where)
    path = resolve_path(source.structures.path, base)
    texts = structures.read_texts(path)
    if not any(cells.text_of(c) in texts for c in frame[source.structures.on]):
        raise DataError(
            f"{where}: no value of column '{source.structures.on}' is the name of a file in {path}",
            fix="structures.on is the column that holds the file names without their ending",
        )
    return texts


def _digest(source: Source, base: Path, frame: pd.DataFrame) -> str:
    if source.path and "://" not in source.path:
        path = resolve_path(source.path, base)
        if path.is_file() and source.adapter != "sql":
            return sha256_file(path)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file())
            return sha256(canonical_json([[p.relative_to(path).as_posix(), sha256_file(p)] for p in files]))
    own = [c for c in frame.columns if c not in (ROW, PROBLEM)]
    rows = [[cells.text_of(c) for c in row] for row in frame[own].to_numpy(dtype=object).tolist()]
    return sha256(canonical_json([[str(c) for c in own], rows]))
