"""Generates the simulated consortium: four invented companies, every number from a physics model, every flaw planted.

Knows: which cells each company builds, how PyBaMM computes the energy they deliver, how each company writes its files
and which faults their files have. Refuses to know: how fedmat reads, checks or learns from those files.

One cell is a Doyle-Fuller-Newman porous-electrode model [DFN] with a published parameter set. Only the seven design
numbers in a record, the rate and the temperature differ from that set:

* active fraction = 1 - porosity - inert, with the inert (binder, carbon) fraction of the parameter set;
* an empty cell has the stoichiometries of the parameter set's own cell at its lower voltage limit; a full one follows
  from charge conservation and the upper voltage limit, so every design is balanced, not merely rescaled;
* 1C empties the design's own capacity in one hour; the cell is isothermal.

References:
    DFN: M. Doyle, T. F. Fuller, J. Newman, J. Electrochem. Soc. 140 (1993) 1526.
    PyBaMM: V. Sulzer et al., J. Open Res. Softw. 9 (2021) 14.
    OKane2022: S. E. J. O'Kane et al., Phys. Chem. Chem. Phys. 24 (2022) 7909, with C.-H. Chen et al.,
        J. Electrochem. Soc. 167 (2020) 080534 (NMC811, graphite-SiOx).
    Mohtat2020: P. Mohtat et al., J. Electrochem. Soc. 167 (2020) 110561 (NMC532, graphite).
    Prada2013: E. Prada et al., J. Electrochem. Soc. 160 (2013) A616 (LFP, graphite).
    Marquis2019: S. G. Marquis et al., J. Electrochem. Soc. 166 (2019) A3693 (LCO, graphite).

Run ``python examples/cells/generate.py`` to write the files again (about two minutes on one core).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import io
import math
import sqlite3
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

import fedmat.telemetry  # noqa: F401  before PyBaMM, which would phone home
from fedmat.seeds import stream

SEED = 20
DESIGN = (
    "positive_thickness_um",
    "negative_thickness_um",
    "positive_porosity",
    "negative_porosity",
    "positive_particle_radius_um",
    "negative_particle_radius_um",
)
TARGET = "areal_energy_wh_m2"
FARADAY = 96485.33212  # C / mol
TOLERANCES = ((1e-5, 1e-4), (1e-6, 1e-6), (1e-4, 1e-4))  # relative, absolute: the next is tried where one fails


# --- physics -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chemistry:
    """A positive active material, the published cell it comes from and one usual short name."""

    formula: str
    parameter_set: str
    nickname: str


NMC811 = Chemistry("LiNi0.8Mn0.1Co0.1O2", "OKane2022", "NMC811")
NMC532 = Chemistry("LiNi0.5Mn0.3Co0.2O2", "Mohtat2020", "NMC532")
LFP = Chemistry("LiFePO4", "Prada2013", "LFP")
LCO = Chemistry("LiCoO2", "Marquis2019", "LCO")


class Cell:
    """The porous-electrode model of one chemistry, built once; designs and conditions are its inputs."""

    def __init__(self, chemistry: Chemistry) -> None:
        import pybamm

        pybamm.set_logging_level("ERROR")
        p = pybamm.ParameterValues(chemistry.parameter_set)
        self._x0, _, y100, self._y0 = (float(v) for v in pybamm.lithium_ion.get_min_max_stoichiometries(p))
        self._swing = self._y0 - y100
        self._full_voltage = float(p["Upper voltage cut-off [V]"])
        self._area = float(
            p["Electrode height [m]"]
            * p["Electrode width [m]"]
            * p["Number of electrodes connected in parallel to make a cell"]
        )
        self._maximum = {s: float(p[f"Maximum concentration in {s} electrode [mol.m-3]"]) for s in ("positive", "negative")}
        self._inert = {
            s: 1.0 - float(p[f"{s.title()} electrode porosity"] + p[f"{s.title()} electrode active material volume fraction"])
            for s in ("positive", "negative")
        }
        grid = np.linspace(1e-3, 1.0 - 1e-3, 4001)
        self._grid = grid
        self._ocp = {
            s: np.asarray(p.process_symbol(p[f"{s.title()} electrode OCP [V]"](pybamm.Vector(grid))).evaluate()).ravel()
            for s in ("positive", "negative")
        }
        inputs = ["Current function [A]", "Ambient temperature [K]", "Initial temperature [K]"]
        for side in ("Positive", "Negative"):
            inputs += [f"{side} electrode thickness [m]", f"{side} electrode porosity", f"{side} particle radius [m]",
                       f"{side} electrode active material volume fraction",
                       f"Initial concentration in {side.lower()} electrode [mol.m-3]"]  # fmt: skip
        p.update(dict.fromkeys(inputs, "[input]"))
        p.update({"Upper voltage cut-off [V]": 10.0})  # a full cell sits exactly on the limit, which would end the test
        model = pybamm.lithium_ion.DFN({"calculate discharge energy": "true"})
        meshes = {
            name: pybamm.SymbolicUniform1DSubMesh if kind is pybamm.Uniform1DSubMesh else kind
            for name, kind in ((n, getattr(k, "submesh_type", k)) for n, k in model.default_submesh_types.items())
        }
        self._simulation = pybamm.Simulation(model, parameter_values=p, submesh_types=meshes)
        self._solvers = [pybamm.IDAKLUSolver(rtol=r, atol=a, options={"silence_sundials_errors": True}) for r, a in TOLERANCES]
        self._failed = pybamm.SolverError

    def active(self, side: str, porosity: float) -> float:
        """Returns the active material's volume fraction of the ``side`` electrode."""
        return 1.0 - porosity - self._inert[side]

    def store(self, side: str, thickness_um: float, porosity: float) -> float:
        """Returns the charge that all sites of the ``side`` electrode hold, in A h / m^2."""
        return FARADAY * self._maximum[side] * self.active(side, porosity) * thickness_um * 1e-6 / 3600.0

    def negative_thickness(self, design: Mapping[str, float], ratio: float) -> float:
        """Returns the negative coating, in micrometres, that holds ``ratio`` times what the positive one can give."""
        give = self.store("positive", design["positive_thickness_um"], design["positive_porosity"]) * self._swing
        return ratio * give / (self.store("negative", 1.0, design["negative_porosity"]) * (1.0 - self._x0))

    def capacity(self, design: Mapping[str, float]) -> float:
        """Returns the charge between the voltage limits at rest, in A h / m^2, by bisection on the full cell's voltage."""
        positive = self.store("positive", design["positive_thickness_um"], design["positive_porosity"])
        negative = self.store("negative", design["negative_thickness_um"], design["negative_porosity"])
        low, high = 0.0, min(positive * self._y0, negative * (1.0 - self._x0))
        for _ in range(60):
            charge = 0.5 * (low + high)
            y, x = self._y0 - charge / positive, self._x0 + charge / negative
            voltage = np.interp(y, self._grid, self._ocp["positive"]) - np.interp(x, self._grid, self._ocp["negative"])
            low, high = (charge, high) if voltage < self._full_voltage else (low, charge)
        return low

    def energy(self, design: Mapping[str, float], c_rate: float, temperature_k: float) -> float:
        """Returns the energy of one constant-current discharge from full to the lower voltage limit, in W h / m^2."""
        charge = self.capacity(design)
        stoichiometry = {
            "positive": self._y0
            - charge / self.store("positive", design["positive_thickness_um"], design["positive_porosity"]),
            "negative": self._x0
            + charge / self.store("negative", design["negative_thickness_um"], design["negative_porosity"]),
        }
        inputs = {
            "Current function [A]": charge * c_rate * self._area,
            "Ambient temperature [K]": temperature_k,
            "Initial temperature [K]": temperature_k,
        }
        for side in ("positive", "negative"):
            inputs |= {
                f"{side.title()} electrode thickness [m]": design[f"{side}_thickness_um"] * 1e-6,
                f"{side.title()} electrode porosity": design[f"{side}_porosity"],
                f"{side.title()} particle radius [m]": design[f"{side}_particle_radius_um"] * 1e-6,
                f"{side.title()} electrode active material volume fraction": self.active(side, design[f"{side}_porosity"]),
                f"Initial concentration in {side} electrode [mol.m-3]": stoichiometry[side] * self._maximum[side],
            }
        for solver in self._solvers:  # the corners of a discharge sometimes need other tolerances than the rest
            try:
                solution = self._simulation.solve([0.0, 1.3 * 3600.0 / c_rate], inputs=inputs, solver=solver)
                break
            except self._failed:
                continue
        else:
            raise RuntimeError("no tolerance solves this discharge")
        if not solution.termination.startswith("event: Minimum voltage"):
            raise RuntimeError(f"the discharge ended by '{solution.termination}', not at the lower voltage limit")
        return float(solution["Discharge energy [W.h]"].entries[-1]) / self._area


@functools.cache
def cell(chemistry: Chemistry) -> Cell:
    """Returns the one model of ``chemistry``."""
    return Cell(chemistry)


# --- what each company builds and measures ------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A product line: one chemistry, ranges its designs are drawn from and how many there are."""

    chemistry: Chemistry
    designs: int
    thickness_um: tuple[float, float]
    positive_porosity: tuple[float, float]
    negative_porosity: tuple[float, float]
    positive_radius_um: tuple[float, float]
    negative_radius_um: tuple[float, float]
    balance: tuple[float, float] = (1.05, 1.25)


@dataclass(frozen=True)
class Native:
    """How a company writes one number: column name, ``native = canonical * factor + offset``, decimals kept."""

    column: str
    factor: float = 1.0
    offset: float = 0.0
    decimals: int = 3

    def write(self, value: float) -> float:
        """Returns the number as the company rounds and writes it."""
        return round(value * self.factor + self.offset, self.decimals)

    def read(self, native: float) -> float:
        """Returns the canonical value of a written number."""
        return (native - self.offset) / self.factor


@dataclass(frozen=True)
class Company:
    """One invented company: its lines, its test programme, its way of writing and the faults in its file.

    Attributes:
        tests: tests per design, drawn from all pairs of ``c_rates`` and ``temperatures_k``.
        spelling: how the company writes a formula.
        faults: how many rows get which fault; see :func:`spoil`.
    """

    site: str
    lines: tuple[Line, ...]
    c_rates: tuple[float, ...]
    temperatures_k: tuple[float, ...]
    tests: int
    formula_column: str
    spelling: Mapping[str, str]
    numbers: Mapping[str, Native]
    faults: Mapping[str, int] = field(default_factory=dict)


def _celsius(*values: float) -> tuple[float, ...]:
    return tuple(v + 273.15 for v in values)


COMPANIES = (
    Company(
        site="ev-cells",
        lines=(
            Line(NMC811, 32, (55, 100), (0.25, 0.40), (0.22, 0.36), (2.5, 6.5), (4.0, 8.0)),
            Line(LFP, 6, (70, 120), (0.30, 0.45), (0.28, 0.40), (0.03, 0.10), (3.0, 8.0)),
        ),
        c_rates=(0.2, 0.33, 0.5, 1.0, 1.5),
        temperatures_k=_celsius(5, 15, 25, 45),
        tests=10,
        formula_column="Kathodenmaterial",
        spelling={NMC811.formula: "LiNi0.8Mn0.1Co0.1O2", LFP.formula: "LiFePO4"},
        numbers={
            "positive_thickness_um": Native("Dicke Kathode [µm]", decimals=1),
            "negative_thickness_um": Native("Dicke Anode [µm]", decimals=1),
            "positive_porosity": Native("Porosität Kathode [%]", 100.0, decimals=1),
            "negative_porosity": Native("Porosität Anode [%]", 100.0, decimals=1),
            "positive_particle_radius_um": Native("Partikelradius Kathode [nm]", 1e3, decimals=0),
            "negative_particle_radius_um": Native("Partikelradius Anode [nm]", 1e3, decimals=0),
            "c_rate": Native("C-Rate [1/h]", decimals=2),
            "temperature_k": Native("Temperatur [°C]", 1.0, -273.15, decimals=1),
            TARGET: Native("Flächenenergie [mWh/cm²]", 0.1, decimals=3),
        },
        faults={"blank": 5, "n/a": 3, "bound": 3, "temperature": 3, "porosity": 3, "formula": 2, "duplicate": 5, "spaces": 12},
    ),
    Company(
        site="tool-cells",
        lines=(
            Line(NMC532, 28, (30, 70), (0.28, 0.42), (0.28, 0.42), (1.5, 4.5), (1.5, 5.0)),
            Line(NMC811, 6, (30, 65), (0.28, 0.42), (0.26, 0.40), (1.5, 4.5), (2.5, 6.0)),
        ),
        c_rates=(0.5, 1.0, 2.0, 3.0, 4.0),
        temperatures_k=tuple((f + 459.67) / 1.8 for f in (41.0, 59.0, 77.0, 113.0)),
        tests=10,
        formula_column="Cathode",
        spelling={NMC532.formula: "Li1 Ni0.5 Mn0.3 Co0.2 O2", NMC811.formula: "Li1 Ni0.8 Mn0.1 Co0.1 O2"},
        numbers={
            "positive_thickness_um": Native("Cathode coat (mil)", 1 / 25.4, decimals=3),
            "negative_thickness_um": Native("Anode coat (mil)", 1 / 25.4, decimals=3),
            "positive_porosity": Native("Cathode porosity", decimals=3),
            "negative_porosity": Native("Anode porosity", decimals=3),
            "positive_particle_radius_um": Native("Cathode particle radius (um)", decimals=2),
            "negative_particle_radius_um": Native("Anode particle radius (um)", decimals=2),
            "c_rate": Native("Rate (C)", decimals=2),
            "temperature_k": Native("Chamber temp (F)", 1.8, -459.67, decimals=1),
            TARGET: Native("Energy (Wh/m2)", decimals=2),
        },
        faults={"blank": 4, "n/a": 4, "bound": 2, "temperature": 2, "porosity": 3, "formula": 3, "duplicate": 4, "spaces": 8},
    ),
    Company(
        site="grid-cells",
        lines=(
            Line(LFP, 28, (60, 140), (0.30, 0.48), (0.28, 0.42), (0.025, 0.12), (3.0, 10.0)),
            Line(NMC532, 6, (50, 90), (0.28, 0.40), (0.28, 0.40), (2.0, 5.0), (2.0, 6.0)),
        ),
        c_rates=(0.1, 0.25, 0.5, 1.0, 2.0),
        temperatures_k=(278.15, 288.15, 298.15, 313.15),
        tests=10,
        formula_column="material",
        spelling={LFP.formula: "LiFePO4", NMC532.formula: "LiNi0.5Mn0.3Co0.2O2"},
        numbers={
            "positive_thickness_um": Native("pos_thickness_mm", 1e-3, decimals=5),
            "negative_thickness_um": Native("neg_thickness_mm", 1e-3, decimals=5),
            "positive_porosity": Native("pos_porosity_pct", 100.0, decimals=1),
            "negative_porosity": Native("neg_porosity_pct", 100.0, decimals=1),
            "positive_particle_radius_um": Native("pos_particle_nm", 1e3, decimals=1),
            "negative_particle_radius_um": Native("neg_particle_nm", 1e3, decimals=0),
            "c_rate": Native("rate_per_hour", decimals=2),
            "temperature_k": Native("t_kelvin", decimals=2),
            TARGET: Native("energy_kj_m2", 3.6, decimals=2),
        },
        faults={"blank": 6, "temperature": 4, "porosity": 4, "formula": 2, "duplicate": 4, "spaces": 8},
    ),
    Company(
        site="phone-cells",
        lines=(
            Line(LCO, 27, (60, 110), (0.24, 0.36), (0.24, 0.38), (3.0, 10.0), (4.0, 10.0)),
            Line(NMC811, 6, (55, 90), (0.25, 0.36), (0.22, 0.34), (2.5, 5.5), (3.5, 7.0)),
        ),
        c_rates=(0.2, 0.5, 0.7, 1.0, 1.5),
        temperatures_k=_celsius(0, 10, 25, 40),
        tests=10,
        formula_column="cathode",
        spelling={LCO.formula: "LCO", NMC811.formula: "LiNi0.8Mn0.1Co0.1O2"},
        numbers={
            "positive_thickness_um": Native("pos_um", decimals=1),
            "negative_thickness_um": Native("neg_um", decimals=1),
            "positive_porosity": Native("pos_eps", decimals=3),
            "negative_porosity": Native("neg_eps", decimals=3),
            "positive_particle_radius_um": Native("pos_radius_um", decimals=2),
            "negative_particle_radius_um": Native("neg_radius_um", decimals=2),
            "c_rate": Native("c_rate", decimals=2),
            "temperature_k": Native("temp_c", 1.0, -273.15, decimals=1),
            TARGET: Native("energy_j_cm2", 0.36, decimals=3),
        },
        faults={"blank": 4, "n/a": 3, "bound": 2, "temperature": 3, "porosity": 2, "formula": 3, "duplicate": 4, "spaces": 10},
    ),
)


def design(company: Company, line: Line, index: int) -> dict[str, float]:
    """Returns one design in canonical units, each number rounded the way the company writes it."""
    draw = stream(SEED, company.site, line.chemistry.nickname, index)

    def rounded(name: str, value: float) -> float:
        native = company.numbers[name]
        return native.read(native.write(value))

    ranges = {
        "positive_thickness_um": line.thickness_um,
        "positive_porosity": line.positive_porosity,
        "negative_porosity": line.negative_porosity,
        "positive_particle_radius_um": line.positive_radius_um,
        "negative_particle_radius_um": line.negative_radius_um,
    }
    drawn = {name: rounded(name, draw.uniform(*limits)) for name, limits in ranges.items()}
    thickness = cell(line.chemistry).negative_thickness(drawn, draw.uniform(*line.balance))
    drawn["negative_thickness_um"] = rounded("negative_thickness_um", thickness)
    return {name: drawn[name] for name in DESIGN}


@dataclass(frozen=True)
class Discharge:
    """One test: the cell's name, what it is made of and how it is discharged, in canonical units."""

    name: str
    chemistry: Chemistry
    design: Mapping[str, float]
    c_rate: float
    temperature_k: float

    def simulate(self) -> float:
        """Returns the energy delivered, in W h / m^2."""
        return cell(self.chemistry).energy(self.design, self.c_rate, self.temperature_k)


def programme(company: Company) -> list[Discharge]:
    """Returns every test of one company, cell after cell."""
    pairs = [(c, t) for c in company.c_rates for t in company.temperatures_k]
    out: list[Discharge] = []
    for line in company.lines:
        for index in range(line.designs):
            built = design(company, line, index)
            draw = stream(SEED, company.site, line.chemistry.nickname, index, "tests")
            chosen = sorted(draw.permutation(len(pairs))[: company.tests])
            name = f"{line.chemistry.nickname}-{index + 1:03d}"
            out += [Discharge(name, line.chemistry, built, *pairs[i]) for i in chosen]
    return out


# --- how it is written down ---------------------------------------------------------------------------------------


def written(company: Company, tests: Sequence[Discharge], energies: Sequence[float]) -> pd.DataFrame:
    """Returns tests and energies under the company's column names and units; cells are str or float."""
    out: dict[str, list[object]] = {
        "cell": [test.name for test in tests],
        company.formula_column: [company.spelling[test.chemistry.formula] for test in tests],
    }
    canonical = [
        {**test.design, "c_rate": test.c_rate, "temperature_k": test.temperature_k, TARGET: energy}
        for test, energy in zip(tests, energies, strict=True)
    ]
    for name, native in company.numbers.items():
        out[native.column] = [native.write(row[name]) for row in canonical]
    return pd.DataFrame(out, dtype=object)


def spoil(company: Company, clean: pd.DataFrame) -> pd.DataFrame:
    """Returns ``clean`` with the company's faults, at most one a row; which rows is drawn from the seed.

    ``blank``, ``n/a``: an empty or "n/a" number. ``bound``: an energy written "<0.1". ``temperature``: a dead
    thermocouple's -999. ``porosity``: over 100 %. ``formula``: zero for O or a shop-floor name. ``duplicate``: the row
    twice. ``spaces``: blanks around the formula, which are no fault.
    """
    draw = stream(SEED, company.site, "faults")
    order = iter(draw.permutation(len(clean)))
    rows: list[dict[str, object]] = [{str(k): v for k, v in row.items()} for row in clean.to_dict("records")]
    repeats: dict[int, int] = {}
    columns = [native.column for native in company.numbers.values()]
    porosities = [company.numbers[name] for name in ("positive_porosity", "negative_porosity")]
    for kind, count in company.faults.items():
        for at, number in zip((int(next(order)) for _ in range(count)), range(count), strict=True):
            row = rows[at]
            formula = str(row[company.formula_column])
            match kind:
                case "blank":
                    row[str(draw.choice(columns))] = None
                case "n/a":
                    row[str(draw.choice(columns))] = "n/a"
                case "bound":
                    row[company.numbers[TARGET].column] = "<0.1"
                case "temperature":
                    row[company.numbers["temperature_k"].column] = -999.0
                case "porosity":
                    native = porosities[number % 2]
                    row[native.column] = native.write(1.0 + float(draw.uniform(0.05, 0.6)))
                case "formula":
                    row[company.formula_column] = ("NMC cathode", "LiMe02", "unknown")[number % 3]
                case "spaces":
                    row[company.formula_column] = f" {formula}  "
                case "duplicate":
                    repeats[at] = 1
    spoilt = [copy for at, row in enumerate(rows) for copy in [row] * (1 + repeats.get(at, 0))]
    return pd.DataFrame(spoilt, columns=clean.columns, dtype=object)


def write_csv(frame: pd.DataFrame, company: Company, path: Path) -> None:
    """Writes a German spreadsheet's export: semicolons, decimal commas, Windows-1252, CR LF."""
    decimals = {native.column: native.decimals for native in company.numbers.values()}

    def text(column: str, value: object) -> str:
        if value is None:
            return ""
        if column not in decimals:
            return str(value)
        return (f"{value:.{decimals[column]}f}" if isinstance(value, float) else str(value)).replace(".", ",")

    lines = [";".join(["Zell-Nr.", *frame.columns[1:]])]
    lines += [";".join(text(str(c), v) for c, v in zip(frame.columns, row, strict=True)) for row in frame.to_numpy()]
    path.write_bytes("".join(line + "\r\n" for line in lines).encode("cp1252"))


def write_excel(frame: pd.DataFrame, company: Company, path: Path) -> None:
    """Writes a cycler's workbook: two title lines above the header, notes on a second sheet, fixed time stamps."""
    import openpyxl

    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "Cycler export"
    sheet.append(["Discharge energy, programme 7"])
    sheet.append([])
    sheet.append(["Cell ID", *map(str, frame.columns[1:])])
    for row in frame.to_numpy():
        sheet.append(list(row))
    notes = book.create_sheet("Notes")
    notes.append(["-999 means the chamber thermocouple was not connected"])
    then = datetime.datetime(2026, 1, 1)
    book.properties.created = book.properties.modified = then
    buffer = io.BytesIO()
    book.save(buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "docProps/core.xml":  # saving stamps the present time over the properties
                book.properties.modified = then
                content = openpyxl.xml.functions.tostring(book.properties.to_tree())
            new.writestr(zipfile.ZipInfo(name, then.timetuple()[:6]), content, zipfile.ZIP_DEFLATED)


def write_parquet(frame: pd.DataFrame, company: Company, path: Path) -> None:
    """Writes a data lake's file: typed columns, nulls for what is absent."""
    typed = frame.astype({native.column: "float64" for native in company.numbers.values()})
    typed.astype({"cell": str, company.formula_column: str}).rename(columns={"cell": "cell_uid"}).to_parquet(path, index=False)


def write_sqlite(frame: pd.DataFrame, company: Company, path: Path) -> None:
    """Writes a laboratory database whose columns accept text among the numbers, as sqlite's do."""
    path.unlink(missing_ok=True)
    names = ["test_no", "cell", *map(str, frame.columns[1:])]
    kinds = ["INTEGER PRIMARY KEY", "TEXT", "TEXT", *["NUMERIC"] * len(company.numbers)]
    columns = ", ".join(f"{name} {kind}" for name, kind in zip(names, kinds, strict=True))
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(f"CREATE TABLE discharge ({columns})")
        rows = [(number, *row) for number, row in enumerate(frame.to_numpy(), start=1)]
        connection.executemany(f"INSERT INTO discharge VALUES ({', '.join('?' * len(names))})", rows)
    connection.close()


FILES = {
    "ev-cells": ("zellversuche.csv", write_csv),
    "tool-cells": ("cycler_export.xlsx", write_excel),
    "grid-cells": ("discharge.parquet", write_parquet),
    "phone-cells": ("lab.sqlite", write_sqlite),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Simulates every company's programme and writes its file under ``--into``/<site>/."""
    parser = argparse.ArgumentParser(description="Writes the files of the simulated consortium again.")
    parser.add_argument("--into", type=Path, default=Path(__file__).resolve().parent / "sites")
    parser.add_argument("--only", choices=[company.site for company in COMPANIES], help="one company's file")
    chosen = parser.parse_args(argv)
    into = chosen.into
    for company in COMPANIES:
        if chosen.only not in (None, company.site):
            continue
        began = time.perf_counter()
        tests = programme(company)
        frame = spoil(company, written(company, tests, [test.simulate() for test in tests]))
        name, write = FILES[company.site]
        path = into / company.site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(frame, company, path)
        seconds = time.perf_counter() - began
        kib = math.ceil(path.stat().st_size / 1024)
        print(f"{company.site}: {len(tests)} discharges, {len(frame)} rows, {kib} KiB, {seconds:.0f} s")


if __name__ == "__main__":
    main()
