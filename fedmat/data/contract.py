"""The shared data contract: which fields a record of each type has, in which unit and within which limits.

Knows: record types as literal tables; generates the pandera schema (a record's truth) and the Great Expectations
suite (a batch's truth) from them. Refuses to know: where data comes from.

One column per field, named by the field, holding the canonical unit. A ``mixture`` is canonical JSON text
``{"component": fraction}``; a ``structure`` is pymatgen JSON text or ""; text that is absent is "".

The suites are committed as ``expectations/<record type>.json`` and reviewed as data; after a change here run
``python -m fedmat.data.contract expectations``.

References:
    pandera: N. Bantilan, "pandera: Statistical Data Validation of Pandas Dataframes", SciPy 2020.
    Great Expectations: https://docs.greatexpectations.io (expectation suites).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedmat import files
from fedmat.errors import ConfigError

CONTRACT_VERSION = "1.1.0"
Kind = Literal["number", "formula", "smiles", "mixture", "category", "text", "structure"]


@dataclass(frozen=True)
class Field:
    """One field of a record.

    Attributes:
        unit: canonical unit as pint reads it; "" for dimensionless; None for kinds without a unit.
        low, high: inclusive limits in the canonical unit.
        positive: excludes zero.
        censorable: the source may state a bound ("<1e-10"); kept at the bound with a flag in ``<name>_censored``.
        measured: an outcome, which a model may predict; a record to be predicted need not have it.
        needed_where: a number field of the same record; where that one is above zero, this optional field is needed too.
    """

    name: str
    kind: Kind
    about: str
    unit: str | None = None
    low: float | None = None
    high: float | None = None
    positive: bool = False
    required: bool = True
    censorable: bool = False
    measured: bool = False
    needed_where: str = ""
    categories: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecordType:
    """One kind of measurement.

    Attributes:
        group: fields that together name the material or formulation; one group is never split over train and test.
        unique: fields that together identify one measurement; a repeat is a duplicate.
    """

    name: str
    about: str
    fields: tuple[Field, ...]
    group: tuple[str, ...]
    unique: tuple[str, ...]

    def field(self, name: str) -> Field:
        """Returns the field called ``name``; raises ConfigError naming the fields there are."""
        for field in self.fields:
            if field.name == name:
                return field
        raise ConfigError(
            f"record type {self.name} has no field '{name}'", fix=f"use one of {', '.join(f.name for f in self.fields)}"
        )


_TEMPERATURE = Field("temperature_k", "number", "temperature of measurement", "kelvin", 1.0, 3000.0, positive=True)
_SIGMA = Field(
    "conductivity_s_cm",
    "number",
    "ionic conductivity",
    "siemens / centimeter",
    1e-20,
    10.0,
    positive=True,
    censorable=True,
    measured=True,
)
_DOI = Field("doi", "text", "where the measurement was published", required=False)

RECORD_TYPES: Mapping[str, RecordType] = {
    t.name: t
    for t in (
        RecordType(
            "solid_electrolyte",
            "ionic conductivity of a solid at one temperature",
            (
                Field("formula", "formula", "chemical formula"),
                _TEMPERATURE,
                _SIGMA,
                Field("family", "category", "structural family", required=False),
                Field("structure", "structure", "crystal structure, partial occupancy allowed", required=False),
                _DOI,
            ),
            group=("formula",),
            unique=("formula", "temperature_k", "conductivity_s_cm", "doi", "family"),
        ),
        RecordType(
            "liquid_electrolyte",
            "ionic conductivity of a salt in a solvent mixture",
            (
                Field("salt", "category", "salt, by its usual short name"),
                Field("concentration", "number", "amount of salt, as measured", "", 0.0, 10.0),
                Field("concentration_basis", "category", "mol per kg solvent or per litre", categories=("mol/kg", "mol/l")),
                Field("solvents", "mixture", "solvent fractions, as measured"),
                Field("solvent_basis", "category", "fractions by weight, volume or mole", categories=("w", "v", "mol")),
                _TEMPERATURE,
                replace(_SIGMA, low=1e-12),  # pure solvents conduct more than that: lower is a unit or a typing error
                _DOI,
            ),
            group=("salt", "solvents", "solvent_basis"),
            unique=(
                "salt",
                "concentration",
                "concentration_basis",
                "solvents",
                "solvent_basis",
                "temperature_k",
                "conductivity_s_cm",
                "doi",
            ),
        ),
        RecordType(
            "polymer_electrolyte",
            "ionic conductivity of a salt in a polymer",
            (
                Field("polymer_smiles", "smiles", "repeat unit"),
                Field(
                    "salt_smiles",
                    "smiles",
                    "salt that was added; empty where none was (the polymer carries the ions itself)",
                    required=False,
                    needed_where="molality",
                ),
                Field("molality", "number", "added salt per mass of polymer, 0 where none was", "mole / kilogram", 0.0, 50.0),
                _TEMPERATURE,
                _SIGMA,
                _DOI,
            ),
            group=("polymer_smiles",),
            unique=("polymer_smiles", "salt_smiles", "molality", "temperature_k", "conductivity_s_cm", "doi"),
        ),
        RecordType(
            "crystal",
            "what is computed or measured of one ordered or disordered crystal",
            (
                Field("formula", "formula", "chemical formula"),
                Field("structure", "structure", "crystal structure, partial occupancy allowed"),
                Field(
                    "formation_energy_ev",
                    "number",
                    "formation energy of the cell that the structure shows",
                    "electron_volt",
                    -1000.0,
                    1000.0,
                    required=False,
                    measured=True,
                ),
                Field(
                    "bulk_modulus_gpa",
                    "number",
                    "bulk modulus",
                    "gigapascal",
                    0.0,
                    2000.0,
                    positive=True,
                    required=False,
                    measured=True,
                ),
                Field(
                    "shear_modulus_gpa",
                    "number",
                    "shear modulus",
                    "gigapascal",
                    0.0,
                    2000.0,
                    positive=True,
                    required=False,
                    measured=True,
                ),
                _DOI,
            ),
            group=("formula",),  # all polymorphs of a composition are on one side of a split
            unique=("formula", "structure", "formation_energy_ev", "bulk_modulus_gpa", "shear_modulus_gpa", "doi"),
        ),
        RecordType(
            "alloy",
            "mechanical properties of an alloy at one temperature",
            (
                Field("formula", "formula", "composition"),
                Field("processing", "category", "processing route", required=False),
                Field("test_type", "category", "C compression, T tension", required=False, categories=("C", "T", "")),
                _TEMPERATURE,
                Field(
                    "yield_strength_mpa",
                    "number",
                    "yield strength",
                    "megapascal",
                    0.0,
                    1e4,
                    positive=True,
                    required=False,
                    measured=True,
                ),
                Field(
                    "tensile_strength_mpa",
                    "number",
                    "ultimate tensile strength",
                    "megapascal",
                    0.0,
                    1e4,
                    positive=True,
                    required=False,
                    measured=True,
                ),
                Field(
                    "elongation_pct", "number", "elongation at fracture", "percent", 0.0, 500.0, required=False, measured=True
                ),
                Field("hardness_hv", "number", "Vickers hardness", "", 0.0, 1e4, positive=True, required=False, measured=True),
                _DOI,
            ),
            group=("formula",),
            unique=(
                "formula",
                "processing",
                "test_type",
                "temperature_k",
                "yield_strength_mpa",
                "tensile_strength_mpa",
                "elongation_pct",
                "hardness_hv",
                "doi",
            ),
        ),
        RecordType(
            "battery_cell",
            "energy a lithium-ion cell delivers in one constant-current discharge",
            (
                Field("formula", "formula", "positive active material"),
                Field(
                    "positive_thickness_um", "number", "positive electrode coating", "micrometer", 1.0, 1000.0, positive=True
                ),
                Field(
                    "negative_thickness_um", "number", "negative electrode coating", "micrometer", 1.0, 1000.0, positive=True
                ),
                Field("positive_porosity", "number", "pore volume fraction", "", 0.01, 0.9),
                Field("negative_porosity", "number", "pore volume fraction", "", 0.01, 0.9),
                Field(
                    "positive_particle_radius_um", "number", "mean particle radius", "micrometer", 1e-3, 100.0, positive=True
                ),
                Field(
                    "negative_particle_radius_um", "number", "mean particle radius", "micrometer", 1e-3, 100.0, positive=True
                ),
                Field("c_rate", "number", "discharge rate", "1 / hour", 0.01, 20.0, positive=True),
                _TEMPERATURE,
                Field(
                    "areal_energy_wh_m2",
                    "number",
                    "energy delivered per electrode area",
                    "watt_hour / meter ** 2",
                    0.0,
                    1000.0,
                    positive=True,
                    measured=True,
                ),
            ),
            group=(
                "formula",
                "positive_thickness_um",
                "negative_thickness_um",
                "positive_porosity",
                "negative_porosity",
                "positive_particle_radius_um",
                "negative_particle_radius_um",
            ),
            unique=(
                "formula",
                "positive_thickness_um",
                "negative_thickness_um",
                "positive_porosity",
                "negative_porosity",
                "positive_particle_radius_um",
                "negative_particle_radius_um",
                "c_rate",
                "temperature_k",
                "areal_energy_wh_m2",
            ),
        ),
        RecordType(
            "cell_ageing",
            "cycles a lithium-ion cell lasts, and what its first hundred cycles showed",
            (
                Field("cell", "text", "name of the cell: one cell is one record"),
                Field("charging_policy", "text", "charging protocol, as the cycler has it", required=False),
                Field("dq_min_ah", "number", "least of Q100(V) - Q10(V) over voltage", "ampere_hour", -2.0, 2.0),
                Field("dq_mean_ah", "number", "mean of Q100(V) - Q10(V) over voltage", "ampere_hour", -2.0, 2.0),
                Field(
                    "dq_variance_ah2",
                    "number",
                    "variance of Q100(V) - Q10(V) over voltage",
                    "ampere_hour ** 2",
                    0.0,
                    4.0,
                    positive=True,
                ),
                Field("dq_skewness", "number", "skewness of Q100(V) - Q10(V) over voltage", "", -50.0, 50.0),
                Field("dq_excess_kurtosis", "number", "kurtosis of Q100(V) - Q10(V), 0 for a normal one", "", -3.0, 1000.0),
                Field("capacity_2_ah", "number", "discharge capacity in cycle 2", "ampere_hour", 0.01, 10.0),
                Field("capacity_100_ah", "number", "discharge capacity in cycle 100", "ampere_hour", 0.01, 10.0),
                Field(
                    "fade_slope_91_100_ah",
                    "number",
                    "slope of discharge capacity over cycles 91 to 100, by cycle",
                    "ampere_hour / cycle",
                    -0.1,
                    0.1,
                ),
                Field(
                    "cycle_life",
                    "number",
                    "cycles until 80 % of nominal capacity",
                    "cycle",
                    1.0,
                    1e5,
                    positive=True,
                    measured=True,
                ),
                _DOI,
            ),
            group=("cell",),
            unique=("cell",),
        ),
    )
}


def record_type(name: str) -> RecordType:
    """Returns the record type called ``name``; raises ConfigError naming the types there are."""
    if name not in RECORD_TYPES:
        raise ConfigError(f"there is no record type '{name}'", fix=f"use one of {', '.join(RECORD_TYPES)}")
    return RECORD_TYPES[name]


# --- generated from the tables above ------------------------------------------------------------------------------

DIGEST = r"^[0-9a-f]{16}$"
CENSORED = ("", "left", "right")
SPLIT_HINTS = ("", "train", "test", "train_only")  # train_only: its source states that it brings no test rows
EXPECTATIONS = "expectations"


def censored_columns(rt: RecordType) -> tuple[str, ...]:
    """Returns the columns that say whether a number is only a bound, one per censorable field."""
    return tuple(f"{f.name}_censored" for f in rt.fields if f.censorable)


def record_columns(rt: RecordType) -> tuple[str, ...]:
    """Returns every column of ``records.parquet``, in order."""
    fields = tuple(f.name for f in rt.fields)
    return ("record_id", *fields, *censored_columns(rt), "group", "split_hint", "source", "source_row")


def pandera_schema(rt: RecordType, *, required: Sequence[str] = ()) -> Any:
    """Returns the pandera schema of one record type's fields: types, presence, limits and categories of single cells.

    Every check is named by the reason code of a rejected row (``missing``, ``not_positive``, ``out_of_range``,
    ``unknown_category``). A pandera failure holds cell values: it may not leave the function that validates.

    Args:
        required: fields that must be present here although the contract calls them optional (a task's target).
    """
    import pandera.pandas as pa

    columns: dict[str, Any] = {}
    for field in rt.fields:
        needed = field.required or field.name in required
        checks: list[Any] = []
        if field.kind == "number":
            if field.positive:
                checks.append(pa.Check.gt(0.0, error="not_positive"))
            checks.append(pa.Check.in_range(field.low, field.high, error="out_of_range"))
        else:
            if needed:
                checks.append(pa.Check.str_length(min_value=1, error="missing"))
            if field.categories:
                checks.append(pa.Check.isin([*field.categories, ""], error="unknown_category"))
        kind: Any = float if field.kind == "number" else str
        columns[field.name] = pa.Column(kind, checks, nullable=field.kind == "number" and not needed)
    for name in censored_columns(rt):
        columns[name] = pa.Column(str, pa.Check.isin(list(CENSORED), error="unknown_category"))
    return pa.DataFrameSchema(columns, name=rt.name)


def gx_suite(rt: RecordType) -> dict[str, Any]:
    """Returns the Great Expectations suite of a batch of accepted records as plain JSON.

    It restates what every record satisfies and adds what only a batch can: all columns, at least one row, unique
    identifiers, no measurement twice. (How many groups a site needs is asked by ``splits``: it depends on what the site
    brings.)
    """
    out: list[dict[str, Any]] = []

    def expect(kind: str, about: str, **kwargs: Any) -> None:
        out.append({"type": f"expect_{kind}", "kwargs": kwargs, "meta": {"about": about}})

    expect(
        "table_columns_to_match_set", "the columns of records.parquet", column_set=list(record_columns(rt)), exact_match=True
    )
    expect("table_row_count_to_be_between", "a site with no record cannot take part", min_value=1)
    expect("column_values_to_be_unique", "a record has an identifier of its own", column="record_id")
    identity = [c for name in rt.unique for c in (name, f"{name}_censored") if c in record_columns(rt)]
    if len(identity) == 1:  # Great Expectations calls only several columns a compound
        expect("column_values_to_be_unique", "no measurement twice", column=identity[0])
    else:
        expect("compound_columns_to_be_unique", "no measurement twice", ignore_row_if="never", column_list=identity)
    for name in ("record_id", "group"):
        expect("column_values_to_match_regex", "16 hexadecimal digits", column=name, regex=DIGEST)
    for field in rt.fields:
        if field.kind == "number":
            if field.required:
                expect("column_values_to_not_be_null", f"{field.about} is required", column=field.name)
            unit = f" in {field.unit}" if field.unit else ""
            expect(
                "column_values_to_be_between",
                f"{field.about}{unit}",
                column=field.name,
                min_value=field.low,
                max_value=field.high,
                strict_min=field.positive and field.low == 0.0,
            )
            continue
        expect("column_values_to_not_be_null", "text that is absent is empty, not null", column=field.name)
        if field.required:
            expect("column_value_lengths_to_be_between", f"{field.about} is required", column=field.name, min_value=1)
        if field.needed_where:
            expect(
                "column_value_lengths_to_be_between",
                f"needed where {field.needed_where} is above zero",
                column=field.name,
                min_value=1,
                row_condition={
                    "type": "comparison",
                    "column": {"name": field.needed_where},
                    "operator": ">",
                    "parameter": 0,
                },
            )
        if field.categories:
            permitted = [*field.categories, *([] if field.required or "" in field.categories else [""])]
            expect("column_values_to_be_in_set", field.about, column=field.name, value_set=permitted)
    for name in censored_columns(rt):
        expect(
            "column_values_to_be_in_set",
            "a bound below (left) or above (right), or a value",
            column=name,
            value_set=list(CENSORED),
        )
    expect(
        "column_values_to_be_in_set", "a published split, where there is one", column="split_hint", value_set=list(SPLIT_HINTS)
    )
    expect("column_values_to_be_between", "rows of a source count from one", column="source_row", min_value=1)
    return {"name": rt.name, "meta": {"contract_version": CONTRACT_VERSION, "about": rt.about}, "expectations": out}


def suite_bytes(rt: RecordType) -> bytes:
    """Returns the suite as it is committed in ``expectations/``."""
    return (json.dumps(gx_suite(rt), indent=2, allow_nan=False) + "\n").encode()


def write_suites(folder: Path) -> tuple[Path, ...]:
    """Writes every record type's suite to ``folder/<record type>.json`` and returns the paths."""
    contents = {f"{rt.name}.json": suite_bytes(rt) for rt in RECORD_TYPES.values()}
    files.write_together(folder, contents)
    return tuple(folder / name for name in contents)


def main(arguments: Sequence[str]) -> int:
    """Regenerates the suites: ``python -m fedmat.data.contract [folder]``."""
    for path in write_suites(Path(arguments[0] if arguments else EXPECTATIONS)):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
