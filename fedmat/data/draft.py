"""A first site.yaml, written by looking at the column names of a site's file.

Knows: how laboratories name columns and write units into headers. Refuses to know
what is true: every unit is left as a placeholder for a person to confirm, and no cell of the data enters the draft.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmat.config import Column, SiteConfig
from fedmat.data import units
from fedmat.data.contract import RECORD_TYPES, Field, RecordType
from fedmat.data.layout import Layout, columns_of, inspect
from fedmat.errors import ConfigError

TO_CONFIRM = "?"
_SURE = 0.62
_BRACKETS = re.compile(r"^(.*?)\s*[\[(]([^\[\]()]+)[\])]\s*$")
_AFTER = re.compile(r"^(.+?)(?:\s+/\s*(?=\S)|\s+in\s+(?=\S+\s*$)|,\s+(?=\S+\s*$))(.+?)\s*$")
_CASE = {"kj": "kJ", "j": "J", "wh": "Wh", "mwh": "mWh", "s": "S", "ms": "mS", "us": "uS", "mpa": "MPa", "gpa": "GPa", "k": "K",
         "kelvin": "K", "celsius": "degC", "pct": "percent", "mol": "mol", "hr": "hour"}  # fmt: skip

# Words for the noun of a field, as they stand in headers once accents and case are gone (English, German, French).
_WORDS: Mapping[str, tuple[str, ...]] = {
    "formula": ("formula", "composition", "compound", "material", "chemistry", "active material", "positive material",
                "cathode material", "cathode", "kathodenmaterial", "formel", "zusammensetzung", "formule"),
    "temperature": ("temperature", "temp", "t", "temperatur", "chamber temp", "chamber temperature"),
    "conductivity": ("conductivity", "ionic conductivity", "sigma", "kappa", "k", "leitfahigkeit", "conductivite"),
    "concentration": ("concentration", "conc", "c", "molality", "molarity", "konzentration"),
    "solvents": ("solvents", "solvent", "solvent mixture", "mixture", "losungsmittel"),
    "salt": ("salt", "leitsalz", "salz", "sel"),
    "doi": ("doi", "reference", "ref", "paper"),
    "family": ("family", "structure family", "structure type", "familie"),
    "molality": ("molality", "salt content"),
    "yield strength": ("yield strength", "ys", "yield stress", "rp02", "streckgrenze"),
    "tensile strength": ("tensile strength", "uts", "ultimate tensile strength", "rm", "zugfestigkeit"),
    "elongation": ("elongation", "el", "elongation at fracture", "bruchdehnung", "dehnung"),
    "hardness": ("hardness", "hv", "vickers hardness", "harte"),
    "processing": ("processing", "processing method", "process", "route"),
    "areal energy": ("areal energy", "energy", "discharge energy", "flachenenergie", "energie"),
    "c rate": ("c rate", "rate", "discharge rate", "crate"),
    "thickness": ("thickness", "coating thickness", "coating", "coat", "dicke", "schichtdicke"),
    "porosity": ("porosity", "porositat", "porosite", "void fraction", "eps"),
    "particle radius": ("particle radius", "radius", "partikelradius", "particle", "r"),
}  # fmt: skip
_SIDES: Mapping[str, tuple[str, ...]] = {
    "positive": ("positive", "pos", "cathode", "kathode", "p", "ca"),
    "negative": ("negative", "neg", "anode", "n", "an"),
}


@dataclass(frozen=True)
class Draft:
    """A proposed site file.

    Attributes:
        text: the YAML with its comments.
        mapped: contract field -> column name.
        missing: required contract fields for which no column was found.
        unused: columns that were not mapped.
    """

    text: str
    record_type: str
    mapped: dict[str, str]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def draft(path: Path, folder: Path, *, site: str, organisation: str, record_type: str | None = None) -> Draft:
    """Proposes a site file for one data file.

    Args:
        path: the data: CSV, Excel, Parquet or SQLite file, or a folder or tar archive of structures.
        folder: where site.yaml will lie; the path in it is relative to this folder where it can be.
        record_type: of the contract; None chooses the type that fits the columns best.

    Raises:
        DataError: the file is missing, damaged or of no known kind.
        ConfigError: no such record type.
    """
    layout = inspect(path)
    columns = columns_of(path, layout)
    known = {c: layout.units.get(c) or unit_in(c) for c in columns}
    if record_type is not None and record_type not in RECORD_TYPES:
        near = difflib.get_close_matches(record_type, RECORD_TYPES, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(RECORD_TYPES)}"
        raise ConfigError(f"there is no record type '{record_type}'; {hint}", fix="correct --record-type")
    types = [RECORD_TYPES[record_type]] if record_type else list(RECORD_TYPES.values())
    found = {rt.name: guess(known, rt) for rt in types}
    chosen = max(types, key=lambda rt: _fit(found[rt.name], rt))
    mapped = found[chosen.name]
    missing = tuple(f.name for f in chosen.fields if f.required and f.name not in mapped)
    unused = tuple(c for c in columns if c not in mapped.values())
    text = _write(_relative(path, folder), layout, chosen, mapped, known, unused, site=site, organisation=organisation)
    return Draft(text, chosen.name, mapped, missing, unused)


def unconfirmed(site: SiteConfig) -> list[str]:
    """Returns, in the site's own column names, what a drafted site file still leaves to be confirmed."""
    out = []
    for source in site.sources:
        for name, column in source.columns.items():
            if isinstance(column, Column) and column.unit == TO_CONFIRM:
                out.append(f"column '{column.source}' ({name}): in which unit are its values?")
        for name, constant in source.constants.items():
            if constant.unit == TO_CONFIRM or constant.value == TO_CONFIRM:
                out.append(f"constant {name}: which value, in which unit?")
    return out


# --- columns to fields -------------------------------------------------------------------------------------------


def unit_in(header: str) -> str:
    """Returns the unit a header states: in brackets, after a slash or 'in', or as its last words (``_nm``, ``_kj_m2``)."""
    return _split(header)[1]


def _split(header: str) -> tuple[str, str]:
    """Returns (the words of a header, the unit it states or "")."""
    match = _BRACKETS.match(header) or _AFTER.match(header)
    if match:
        return match[1], _known(match[2])
    words = re.split(r"[_\s]+", header)
    for n in (3, 2, 1):
        if len(words) > n:
            tail = "/".join(_CASE.get(w.lower(), w) for w in words[-n:] if w.lower() != "per" or n == 1)
            unit = _known(f"1/{tail}" if words[-n].lower() == "per" else tail)
            if unit and (len(words[-1]) > 1 or words[-1] in "cCfFkK") and not tail.isdigit():
                return " ".join(words[:-n]), unit
    return header, ""


def _known(text: str) -> str:
    text = {"c": "degC", "f": "degF"}.get(text.strip().lower(), text.strip())  # nobody measures in coulomb or farad here
    for spelling in (text, text.replace("°", "deg")):
        if units.known(spelling):
            return spelling
    return ""


def guess(columns: Mapping[str, str], rt: RecordType) -> dict[str, str]:
    """Returns contract field -> column for the fields some column's name and unit speak for.

    Args:
        columns: column name -> unit its header states, or "".
    """
    scores = sorted(
        ((_likeness(c, u, f), f.name, c) for f in rt.fields if f.kind != "structure" for c, u in columns.items()),
        key=lambda s: (-s[0], s[1], s[2]),
    )
    out: dict[str, str] = {}
    for score, name, column in scores:
        if score >= _SURE and name not in out and column not in out.values():
            out[name] = column
    return {f.name: out[f.name] for f in rt.fields if f.name in out}


def _likeness(column: str, unit: str, target: Field) -> float:
    heads = _plain(_split(column)[0] if unit else column)
    noun, side = _noun(target)
    if side:
        other = "negative" if side == "positive" else "positive"
        words = set(heads.split())
        if words & set(_SIDES[other]) or not any(w in words or any(w in h for h in words if len(w) > 3) for w in _SIDES[side]):
            return 0.0
        heads = " ".join(w for w in heads.split() if w not in _SIDES[side])
    best = 0.0
    for word in (_plain(target.name), *_WORDS.get(noun, (noun,))):
        if heads == word:
            best = 1.0
            break
        if len(word) > 2:
            near = difflib.SequenceMatcher(None, heads, word).ratio()
            inside = 0.8 if set(word.split()) <= set(heads.split()) else 0.0
            best = max(best, near if near > 0.75 else 0.0, inside)
    if unit and target.kind == "number":
        return best + 0.1 if units.compatible(unit, target.unit or "") else best - 0.5
    return best - 0.5 if unit and target.kind != "number" else best


def _noun(target: Field) -> tuple[str, str]:
    """Returns a field's noun without its unit, and the electrode it speaks of."""
    text = target.name
    if target.unit:
        text = re.sub(r"_(k|s_cm|um|mpa|pct|wh_m2)$", "", text)
    text = text.removesuffix("_hv").replace("_", " ")
    for side in _SIDES:
        if text.startswith(f"{side} "):
            return text.removeprefix(f"{side} "), side
    return text, ""


def _plain(text: str) -> str:
    letters = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().casefold()
    return " ".join(re.findall(r"[a-z0-9]+", letters))


def _fit(mapped: Mapping[str, str], rt: RecordType) -> float:
    return len(mapped) - 0.5 * sum(f.required and f.name not in mapped for f in rt.fields)


# --- the text ----------------------------------------------------------------------------------------------------


def _write(
    path: str, layout: Layout, rt: RecordType, mapped: Mapping[str, str], said: Mapping[str, str], unused: Sequence[str],
    *, site: str, organisation: str,
) -> str:  # fmt: skip
    lines = [
        "# Drafted by `fedmat site init` from the column names alone. Read every line: a wrong unit is worse than none.",
        f'# Every "{TO_CONFIRM}" waits for you; then run: fedmat site check site.yaml',
        f"site: {site}",
        f"organisation: {_quoted(organisation)}",
        f"record_type: {rt.name}   # {rt.about}",
        "sources:",
        "  - name: main",
        f"    adapter: {layout.adapter}",
        f"    path: {_quoted(path)}",
    ]
    if layout.options:
        lines.append("    options:")
        lines += [f"      {k}: {_quoted(v) if isinstance(v, str) else v}" for k, v in layout.options.items()]
    lines.append("    columns:" if mapped else "    columns: {}")
    for target in rt.fields:
        if target.name in mapped:
            lines += _mapping(target, mapped[target.name], said.get(mapped[target.name], ""))
    for target in rt.fields:
        if target.name not in mapped:
            need = "required" if target.required else "optional"
            lines.append(
                f"      # {target.name}: {{from: ...}}   # {need}: {target.about}{_limits(target)}; no column was found"
            )
    lines += [
        "    # What holds for every row and stands in no column goes here, for example:",
        "    # constants:",
        "    #   temperature_k: {value: 25, unit: degC}",
    ]
    if unused:
        lines.append(f"    # Columns that were left out: {'; '.join(unused)}")
    return "\n".join(lines) + "\n"


def _mapping(target: Field, column: str, said: str) -> list[str]:
    about = f"   # {target.about}{_limits(target)}"
    if target.kind != "number" or not (target.unit or said):
        return [f"      {target.name}: {{from: {_quoted(column)}}}{about}"]
    note = f"the header says {said}: write it here if that is true" if said else "which unit is the column in?"
    return [f"      {target.name}: {{from: {_quoted(column)}, unit: {_quoted(TO_CONFIRM)}}}{about}; {note}"]


def _limits(target: Field) -> str:
    if target.kind != "number":
        return f" (one of {', '.join(c for c in target.categories if c)})" if target.categories else ""
    unit = target.unit or "dimensionless"
    return (
        f" (contract: {unit}, {target.low:g} to {target.high:g})"
        if target.low is not None and target.high is not None
        else f" ({unit})"
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a JSON string is a YAML string


def _relative(path: Path, folder: Path) -> str:
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return path.resolve().as_posix()
