"""From a source's own columns to the contract's fields: pure transformation of tables, one verdict per cell.

Knows: the mapping of a site file (columns, constants, structures, split) and how a field's kind is read from cells.
Refuses to know: files, and whether a value is plausible (``validation`` judges ranges, chemistry and duplicates).
A bad cell rejects its row with a reason; a mapping that cannot work for any row is an error before anything is read.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd

from fedmat.config import Column, Constant, MixtureColumns, Source
from fedmat.data import cells, structures, units
from fedmat.data.contract import Field, RecordType
from fedmat.data.selection import PROBLEM, ROW, require_columns
from fedmat.errors import ConfigError
from fedmat.files import canonical_json

REASONS: Mapping[str, str] = {
    "not_a_number": "the cell is not plainly one finite number",
    "bound_not_allowed": "the cell states a bound, and this field takes exact values only",
    "bad_unit": "the cell carries a unit that cannot be expressed in the field's unit",
    "bad_mixture": "the cells do not state a mixture of named, non-negative amounts",
    "bad_structure": "the text is not exactly one crystal structure",
    "ragged_row": "the row has more cells than the header has columns",
    "unknown_split": "the published split says neither train nor test",
}


@dataclass(frozen=True)
class RawBatch:
    """What one source yields.

    Attributes:
        frame: one row per readable row: the contract's fields in contract order (numbers float64 in canonical units, NaN
            when absent; everything else text, "" when absent; a mixture is JSON text of the amounts as stated, a structure
            is JSON text), ``<field>_censored`` for censorable fields, ``split_hint``, ``source``, ``source_row``.
        rejected: one row per bad cell: ``source``, ``source_row``, ``column`` (the source's name), ``field``, ``code``,
            ``reason`` and ``raw`` (JSON text of the whole raw row). It holds records: it never leaves the site.
        file_sha256: digest of the source file (of its files for a folder, of its rows for a database).
    """

    frame: pd.DataFrame
    rejected: pd.DataFrame
    file_sha256: str = ""


@dataclass(frozen=True)
class Notation:
    """How numbers and blanks are typed in one source."""

    decimal: str = "."
    thousands: str = ""
    missing: tuple[str, ...] = ()


@dataclass
class _Verdicts:
    """Bad cells found so far, by row position."""

    found: dict[int, list[tuple[str, str, str]]] = field(default_factory=dict)

    def add(self, row: int, column: str, name: str, code: str) -> None:
        found = self.found.setdefault(row, [])
        if not any(column_ == "" for column_, _, _ in found):  # an unreadable row has one reason, not one per cell
            found.append((column, name, code))


# --- before anything is read -------------------------------------------------------------------------------------


def check(source: Source, rt: RecordType) -> None:
    """Raises ConfigError listing everything in a source's mapping that cannot work, whatever the data say."""
    problems = [p for name, spec in source.columns.items() for p in _column_problems(name, spec, rt)]
    problems += [p for name, spec in source.constants.items() for p in _constant_problems(name, spec, rt)]
    mapped = [*source.columns, *source.constants]
    structure_fields = [f.name for f in rt.fields if f.kind == "structure"]
    if source.structures is not None:
        if not structure_fields:
            problems.append(f"structures: record type {rt.name} has no structure field")
        mapped += structure_fields[:1]
    problems += [f"{name}: given twice; map a field once" for name in sorted({m for m in mapped if mapped.count(m) > 1})]
    problems += [
        f"{f.name}: record type {rt.name} requires this field; map it under columns or constants"
        for f in rt.fields
        if f.required and f.name not in mapped
    ]
    if problems:
        raise ConfigError("the mapping cannot work:\n  " + "\n  ".join(problems), fix="correct the named fields in site.yaml")


def _field(name: str, rt: RecordType) -> Field | str:
    valid = [f.name for f in rt.fields]
    if name in valid:
        return rt.field(name)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"its fields: {', '.join(valid)}"
    return f"{name}: record type {rt.name} has no such field; {hint}"


def _column_problems(name: str, spec: Column | MixtureColumns, rt: RecordType) -> list[str]:
    target = _field(name, rt)
    if isinstance(target, str):
        return [target]
    if isinstance(spec, MixtureColumns):
        wrong = [] if target.kind == "mixture" else [f"{name}: 'fractions' belongs to a mixture; this field is a {target.kind}"]
        return wrong if spec.fractions else [*wrong, f"{name}: 'fractions' names no column"]
    ends = [f"{name}: 'chain_ends' belongs to a SMILES; this field is a {target.kind}"] if target.kind != "smiles" else []
    if target.kind == "smiles":
        ends = [f"{name}: a chain end has no text" for end in spec.chain_ends if not end]
    return (ends if spec.chain_ends else []) + _unit_problems(target, spec.unit)


def _constant_problems(name: str, spec: Constant, rt: RecordType) -> list[str]:
    target = _field(name, rt)
    if isinstance(target, str):
        return [target]
    problems = _unit_problems(target, spec.unit)
    if not problems:
        value, _, code = _reader(target, spec.unit, Notation())(spec.value)
        if code or value == "" or (target.kind == "number" and math.isnan(value)):
            problems = [f"{name}: the constant cannot be read as a {target.kind}{f' ({REASONS[code]})' if code else ''}"]
    return problems


def _unit_problems(target: Field, unit: str | None) -> list[str]:
    if target.kind != "number":
        return [f"{target.name}: a {target.kind} has no unit"] if unit is not None else []
    canonical = target.unit or ""
    if unit is None:
        return [f"{target.name}: needs 'unit', the unit in the source (the contract's is {canonical})"] if canonical else []
    problem = units.check(unit, canonical)
    return [f"{target.name}: {problem}"] if problem else []


# --- cells to fields ---------------------------------------------------------------------------------------------


def convert(
    raw: pd.DataFrame, source: Source, rt: RecordType, notation: Notation, texts: Mapping[str, str] | None, where: str
) -> RawBatch:
    """Returns the contract's fields read from the raw rows that were kept.

    Args:
        raw: raw cells under the source's own column names, with ``__row__`` and perhaps ``__problem__``.
        texts: {key: structure text} when the source names structure files.
        where: site, source and file, for messages.
    """
    require_columns(raw, _used_columns(source), where)
    verdicts = _Verdicts()
    for i, code in enumerate(raw.get(PROBLEM, ())):
        if code:
            verdicts.add(i, "", "", str(code))
    columns: dict[str, Any] = {}
    for target in rt.fields:
        values, bounds = _field_values(raw, source, target, notation, texts, verdicts)
        columns[target.name] = values
        if target.censorable:
            columns[f"{target.name}_censored"] = bounds
    columns["split_hint"] = _split_hints(raw, source, verdicts)
    columns["source"] = [source.name] * len(raw)
    columns["source_row"] = raw[ROW].to_numpy(dtype=np.int64)
    names = [f.name for f in rt.fields] + [f"{f.name}_censored" for f in rt.fields if f.censorable]
    frame = pd.DataFrame(columns, columns=[*names, "split_hint", "source", "source_row"])
    good = np.array([i not in verdicts.found for i in range(len(raw))], dtype=bool)
    return RawBatch(frame.loc[good].reset_index(drop=True), _rejections(raw, source.name, verdicts))


def _used_columns(source: Source) -> list[tuple[str, str]]:
    used: list[tuple[str, str]] = []
    for name, spec in source.columns.items():
        used += [(c, name) for c in spec.fractions] if isinstance(spec, MixtureColumns) else [(spec.source, name)]
    if source.split is not None:
        used.append((source.split.column, "split"))
    if source.structures is not None:
        used.append((source.structures.on, "structures"))
    return used


def _field_values(
    raw: pd.DataFrame,
    source: Source,
    target: Field,
    notation: Notation,
    texts: Mapping[str, str] | None,
    verdicts: _Verdicts,
) -> tuple[Any, list[str]]:
    blank: Any = math.nan if target.kind == "number" else ""
    spec = source.columns.get(target.name)
    if isinstance(spec, MixtureColumns):
        return _mixtures(raw, target, spec, notation, verdicts), []
    if spec is not None:
        read = _reader(target, spec.unit, notation, spec)
        return _read_column(raw[spec.source], spec.source, target, read, verdicts)
    if target.name in source.constants:
        constant = source.constants[target.name]
        value, bound, _ = _reader(target, constant.unit, Notation())(constant.value)
        return [value] * len(raw), [bound] * len(raw)
    if target.kind == "structure" and source.structures is not None and texts is not None:
        on = source.structures.on
        column = pd.Series([texts.get(cells.text_of(c), "") for c in raw[on]], dtype=object)
        return _read_column(column, on, target, _structure, verdicts)
    return [blank] * len(raw), [""] * len(raw)


Reader = Callable[[Any], tuple[Any, str, str]]  # cell -> (value, bound, reason code)


def _read_column(column: pd.Series[Any], name: str, target: Field, read: Reader, verdicts: _Verdicts) -> tuple[Any, list[str]]:
    known: dict[tuple[str, str], tuple[Any, str, str]] = {}  # many cells repeat; repr keeps 1, 1.0 and True apart
    values, bounds = [], []
    for i, cell in enumerate(column):
        key = (type(cell).__name__, cell if isinstance(cell, str) else repr(cell))
        if key not in known:
            known[key] = read(cell)
        value, bound, code = known[key]
        values.append(value)
        bounds.append(bound)
        if code:
            verdicts.add(i, name, target.name, code)
    return (np.array(values, dtype=np.float64) if target.kind == "number" else values), bounds


def _reader(target: Field, unit: str | None, notation: Notation, spec: Column | None = None) -> Reader:
    clean = partial(_clean, spec=spec)
    if target.kind == "number":
        return partial(_number, target=target, unit=unit or "", notation=notation, clean=clean)
    if target.kind == "structure":
        return partial(_structure, missing=notation.missing, spec=spec)
    if target.kind == "mixture":
        return lambda cell: _mixture_cell(clean(cell), notation)
    symbols = target.kind in ("formula", "smiles")

    def text(cell: Any) -> tuple[str, str, str]:
        value = clean(cell)
        if cells.is_blank(value, notation.missing, symbols=symbols):
            return "", "", ""
        for end in spec.chain_ends if spec is not None else ():
            value = value.replace(end, "[*]")
        return (cells.plain_formula(value) if target.kind == "formula" else value), "", ""

    return text


def _clean(cell: Any, spec: Column | None) -> str:
    text = cells.text_of(cell)
    if spec is not None:
        text = text.strip(spec.strip + " ") if spec.strip else text
        text = spec.replace.get(text, text)
    return text


def _number(cell: Any, *, target: Field, unit: str, notation: Notation, clean: Callable[[Any], str]) -> tuple[float, str, str]:
    canonical = target.unit or ""
    text = clean(cell)
    if isinstance(cell, Real) and type(cell).__name__ not in ("bool", "bool_") and text == cells.text_of(cell):
        number = cells.Number(float(cell))  # a real number, whatever the decimal mark of typed text is
        if math.isinf(number.value):
            return math.nan, "", "not_a_number"
    else:
        number = cells.read_number(
            text, decimal=notation.decimal, thousands=notation.thousands, missing=notation.missing, is_unit=units.known
        )
    if number.problem:
        return math.nan, "", number.problem
    if number.bound and not target.censorable:
        return math.nan, "", "bound_not_allowed"
    if number.unit and not units.compatible(number.unit, canonical):
        return math.nan, "", "bad_unit"
    value = float(units.convert([number.value], number.unit or unit, canonical)[0])
    return (math.nan, "", "not_a_number") if math.isinf(value) else (value, number.bound, "")


def _structure(cell: Any, missing: Sequence[str] = (), spec: Column | None = None) -> tuple[str, str, str]:
    """Reads the text of a CIF or of pymatgen JSON; its line breaks are part of it, so only its ends are cleaned."""
    if isinstance(cell, structures.Canonical):
        return str(cell), "", ""
    text = cell.strip() if isinstance(cell, str) else cells.text_of(cell)
    if spec is not None:
        text = text.strip(f"{spec.strip} ") if spec.strip else text
        text = spec.replace.get(text, text)
    if cells.is_blank(text, missing, symbols=True):
        return "", "", ""
    parsed = structures.parse(text)
    return ("", "", "bad_structure") if parsed is None else (parsed[1], "", "")


def _mixture_cell(text: str, notation: Notation) -> tuple[str, str, str]:
    """Reads ``{"EC": 0.3, "DMC": 0.7}`` or ``EC=0.3; DMC=0.7``."""
    if cells.is_blank(text, notation.missing):
        return "", "", ""
    pairs: list[tuple[str, Any]]
    if text.startswith("{"):
        try:
            pairs = json.loads(text, object_pairs_hook=list)
        except ValueError:
            return "", "", "bad_mixture"
    else:
        pairs = [(n, a) for n, _, a in (part.rpartition("=") for part in text.split(";") if part.strip())]
    amounts: dict[str, float] = {}
    for name, amount in pairs:
        number = _plain_amount(amount, notation)
        component = cells.text_of(name)
        if not component or number is None or component in amounts:
            return "", "", "bad_mixture"
        amounts[component] = number
    return _mixture_json(amounts), "", ("" if any(amounts.values()) else "bad_mixture")


def _plain_amount(amount: Any, notation: Notation) -> float | None:
    """Returns a finite amount of at least zero, blanks being zero; None for anything else."""
    if isinstance(amount, Real) and type(amount).__name__ not in ("bool", "bool_"):
        number = cells.Number(float(amount))
    else:
        number = cells.read_number(
            cells.text_of(amount), decimal=notation.decimal, thousands=notation.thousands, missing=notation.missing
        )
    if number.problem or number.bound or math.isinf(number.value) or number.value < 0:
        return None
    return 0.0 if math.isnan(number.value) else number.value


def _mixture_json(amounts: Mapping[str, float]) -> str:
    return canonical_json({name: amounts[name] for name in sorted(amounts) if amounts[name] > 0}).decode()


def _mixtures(raw: pd.DataFrame, target: Field, spec: MixtureColumns, notation: Notation, verdicts: _Verdicts) -> list[str]:
    """Assembles one mixture per row from a column per component; a row without any amount is absent, not a mixture."""
    scale = 0.01 if spec.percent else 1.0
    total: list[dict[str, float]] = [{} for _ in range(len(raw))]
    for column, component in spec.fractions.items():
        known: dict[tuple[str, str], float | None] = {}
        for i, cell in enumerate(raw[column]):
            key = (type(cell).__name__, cell if isinstance(cell, str) else repr(cell))
            if key not in known:
                known[key] = _plain_amount(cell, notation)
            amount = known[key]
            if amount is None:
                verdicts.add(i, column, target.name, "bad_mixture")
            elif amount:
                total[i][component] = total[i].get(component, 0.0) + amount * scale
    return [_mixture_json(amounts) if amounts else "" for amounts in total]


def _split_hints(raw: pd.DataFrame, source: Source, verdicts: _Verdicts) -> list[str]:
    if source.split is None:
        return [""] * len(raw)
    train = "train" if source.split.test else "train_only"
    meaning = {"": "", **dict.fromkeys(source.split.train, train), **dict.fromkeys(source.split.test, "test")}
    hints = []
    for i, cell in enumerate(raw[source.split.column]):
        text = cells.text_of(cell)
        if text not in meaning:
            verdicts.add(i, source.split.column, "split_hint", "unknown_split")
        hints.append(meaning.get(text, ""))
    return hints


def _rejections(raw: pd.DataFrame, name: str, verdicts: _Verdicts) -> pd.DataFrame:
    rows: list[Sequence[Any]] = []
    own = [c for c in raw.columns if c not in (ROW, PROBLEM)]
    for i in sorted(verdicts.found):
        text = json.dumps({str(c): _jsonable(raw[c].iloc[i]) for c in own}, ensure_ascii=False)
        for column, target, code in verdicts.found[i]:
            rows.append((name, int(raw[ROW].iloc[i]), column, target, code, REASONS.get(code, code), text))
    frame = pd.DataFrame(rows, columns=["source", "source_row", "column", "field", "code", "reason", "raw"])
    return frame.astype({"source_row": np.int64})


def _jsonable(cell: Any) -> str | float | None:
    if isinstance(cell, str):
        return cell
    if cell is None or (isinstance(cell, Real) and not math.isfinite(float(cell))):
        return None if cell is None else str(cell)
    return float(cell) if isinstance(cell, Real) else str(cell)
