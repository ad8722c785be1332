"""Laws of reading a site's own files: nothing is lost, nothing is guessed, every refusal says where and what to do."""

from __future__ import annotations

import gzip
import json
import math
import sqlite3
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat.config import SiteConfig, Source, parse_settings
from fedmat.data import cells, structures
from fedmat.data.adapters import LegacyAdapter, RawBatch, adapter_for, read_raw, read_source
from fedmat.data.contract import record_type
from fedmat.errors import ConfigError, DataError, FedmatError

CIF = """data_x
_cell_length_a {a}
_cell_length_b {a}
_cell_length_c {a}
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'P 1'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
Li1 Li 0.0 0.0 0.0 {occupancy}
Cl1 Cl 0.5 0.5 0.5 1.0
"""

SOLID: dict[str, Any] = {
    "formula": "Formula",
    "temperature_k": {"from": "T", "unit": "degC"},
    "conductivity_s_cm": {"from": "sigma", "unit": "mS/cm"},
}


def site_of(record: str = "solid_electrolyte", **source: Any) -> SiteConfig:
    raw = {"site": "alpha", "organisation": "Alpha Ltd", "record_type": record, "sources": [{"adapter": "csv", **source}]}
    return parse_settings(SiteConfig, raw, Path("site.yaml"))


def read(base: Path, record: str = "solid_electrolyte", **source: Any) -> RawBatch:
    site = site_of(record, **source)
    return read_source(site, site.sources[0], base, record_type(record))


def solid(base: Path, text: str | bytes, **source: Any) -> RawBatch:
    (base / "data.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return read(base, **{"path": "data.csv", "columns": SOLID, **source})


def refused(error: type[FedmatError], base: Path, text: str | bytes, **source: Any) -> str:
    with pytest.raises(error) as caught:
        solid(base, text, **source)
    assert caught.value.fix
    assert "alpha" in str(caught.value)
    return str(caught.value)


# --- one cell ----------------------------------------------------------------------------------------------------


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=200, deadline=None)
def test_every_finite_number_is_read_back_exactly(value: float) -> None:
    assert cells.read_number(repr(value)).value == value
    assert cells.read_number(repr(value).replace(".", ","), decimal=",").value == value


@pytest.mark.parametrize(
    ("text", "value", "bound"),
    [
        ("1.5e-4", 1.5e-4, ""),
        ("\u22121.5", -1.5, ""),
        ("1.2 \u00d7 10\u22124", 1.2e-4, ""),
        ("1.2\u00b710\u207b\u2074", 1.2e-4, ""),
        ("3x10^5", 3e5, ""),
        ("10^-5", 1e-5, ""),
        ("1.5D-3", 1.5e-3, ""),
        ("<1E-10", 1e-10, "left"),
        ("\u2264 1e-8", 1e-8, "left"),
        (">= 2", 2.0, "right"),
        ("\u00a07\u202f", 7.0, ""),
        ("\ufeff7", 7.0, ""),
    ],
)
def test_numbers_as_laboratories_type_them(text: str, value: float, bound: str) -> None:
    number = cells.read_number(cells.text_of(text))
    assert (number.value, number.bound, number.problem) == (pytest.approx(value, rel=1e-15), bound, "")


@pytest.mark.parametrize(
    "text",
    [
        "abc",
        "~5",
        "1.2(3)",
        "1.2 \u00b1 0.1",
        "1-2",
        "1,234",
        "1.2.3",
        "0x1A",
        "1_000",
        "inf",
        "1e999",
        "2024-01-02",
        "<",
        "5 x 10",
    ],
)
def test_text_that_is_not_plainly_one_number_is_never_guessed(text: str) -> None:
    assert cells.read_number(text).problem == "not_a_number"


@pytest.mark.parametrize("text", ["", " ", "n/a", "N/A", "NaN", "-", "\u2013", "null", "#N/A", "not measured", "\u00a0"])
def test_the_usual_words_for_nothing_are_blank(text: str) -> None:
    number = cells.read_number(cells.text_of(text))
    assert math.isnan(number.value)
    assert number.problem == ""


def test_a_thousands_separator_counts_only_where_it_is_declared_and_well_placed() -> None:
    assert cells.read_number("1.234,5", decimal=",", thousands=".").value == 1234.5
    assert cells.read_number("12,34", thousands=",").problem == "not_a_number"
    assert cells.read_number("1.5", decimal=",").problem == "not_a_number"


def test_chemical_symbols_are_not_blanks() -> None:
    assert not cells.is_blank("Na", symbols=True)
    assert not cells.is_blank("Nd", symbols=True)
    assert cells.is_blank("Na")


# --- one table ---------------------------------------------------------------------------------------------------


def test_values_arrive_in_canonical_units_with_their_row_numbers(tmp_path: Path) -> None:
    batch = solid(tmp_path, "Formula,T,sigma\nLi3N,25,1.2\n\nLiCl,-40,<0.001\n")
    frame = batch.frame
    assert list(frame.columns) == [
        "formula", "temperature_k", "conductivity_s_cm", "family", "structure", "doi", "conductivity_s_cm_censored",
        "split_hint", "source", "source_row",
    ]  # fmt: skip
    np.testing.assert_allclose(frame["temperature_k"], [298.15, 233.15])
    np.testing.assert_allclose(frame["conductivity_s_cm"], [1.2e-3, 1e-6])
    assert frame["conductivity_s_cm_censored"].tolist() == ["", "left"]
    assert frame["source_row"].tolist() == [1, 3]  # the empty row counts, as it does in an editor
    assert frame["doi"].tolist() == ["", ""]
    assert len(batch.rejected) == 0
    assert len(batch.file_sha256) == 64


def test_a_bad_cell_rejects_its_row_with_column_reason_and_the_whole_raw_row(tmp_path: Path) -> None:
    text = "Formula,T,sigma,note\nLi3N,25,abc,x\nLiCl,25 m,1 S/m,y\nLiF,<25,2,z\nLi2O,77 degF,3,w\n"
    batch = solid(tmp_path, text)
    assert batch.rejected[["source_row", "column", "field", "code"]].to_numpy().tolist() == [
        [1, "sigma", "conductivity_s_cm", "not_a_number"],
        [2, "T", "temperature_k", "bad_unit"],
        [3, "T", "temperature_k", "bound_not_allowed"],
    ]
    assert json.loads(batch.rejected["raw"][0]) == {"Formula": "Li3N", "T": "25", "sigma": "abc", "note": "x"}
    assert batch.frame["temperature_k"].tolist() == [pytest.approx(298.15)]  # a cell may carry its own unit


def test_every_row_is_either_accepted_or_rejected(tmp_path: Path) -> None:
    cellset = ["1", "abc", "", "<3", "4 K", "5 kg", "n/a", "1e400", "\u22126"]

    @given(st.lists(st.tuples(st.sampled_from(cellset), st.sampled_from(cellset)), min_size=1, max_size=12))
    @settings(max_examples=40, deadline=None)
    def law(rows: list[tuple[str, str]]) -> None:
        batch = solid(tmp_path, "Formula,T,sigma\n" + "".join(f"LiF,{t},{s}\n" for t, s in rows))
        accepted, rejected = set(batch.frame["source_row"]), set(batch.rejected["source_row"])
        assert accepted | rejected == set(range(1, len(rows) + 1))
        assert not accepted & rejected
        assert batch.frame["temperature_k"].dtype == np.float64

    law()


def test_same_bytes_give_the_same_batch(tmp_path: Path) -> None:
    text = "Formula,T,sigma\nLi3N,25,1.2\nLiCl,x,3\n"
    one, two = solid(tmp_path, text), solid(tmp_path, text)
    pd.testing.assert_frame_equal(one.frame, two.frame)
    pd.testing.assert_frame_equal(one.rejected, two.rejected)
    assert one.file_sha256 == two.file_sha256


def test_european_files_are_read_by_naming_their_notation(tmp_path: Path) -> None:
    text = "Messdaten 2019\nFormula;T;sigma\n;\u00b0C;mS/cm\nLi3N;25,0;1.234,5\nLiCl;k.A.;1,5\n".encode("cp1252")
    options = {
        "sep": ";",
        "decimal": ",",
        "thousands": ".",
        "encoding": "cp1252",
        "skiprows": 1,
        "skip_after_header": 1,
        "missing": ["k.A."],
    }
    frame = solid(tmp_path, text, options=options).frame
    np.testing.assert_allclose(frame["conductivity_s_cm"], [1.2345, 1.5e-3])
    assert math.isnan(frame["temperature_k"][1])


def test_text_is_cleaned_as_the_site_file_says(tmp_path: Path) -> None:
    columns = {
        **SOLID,
        "formula": {"from": "Formula", "strip": '"'},
        "family": {"from": "fam", "replace": {"LISICON-like": "LISICON"}},
    }
    text = 'Formula,T,sigma,fam\n"""Li10 Ge P2 S12""",25,1, LISICON-like \nLi\u2087La\u2083Zr\u2082O\u2081\u2082,25,1,\u00a0Garnet\nNa,25,1,n/a\n'
    frame = solid(tmp_path, text, columns=columns).frame
    assert frame["formula"].tolist() == ["Li10 Ge P2 S12", "Li7La3Zr2O12", "Na"]
    assert frame["family"].tolist() == ["LISICON", "Garnet", ""]


def test_a_ragged_row_is_rejected_and_a_short_one_is_padded(tmp_path: Path) -> None:
    batch = solid(tmp_path, "Formula,T,sigma\nLi3N,25,1,9\nLiCl,25\nLiF,25,1,\n")
    assert batch.rejected[["source_row", "code"]].to_numpy().tolist() == [[1, "ragged_row"]]
    assert math.isnan(batch.frame["conductivity_s_cm"][0])
    assert batch.frame["source_row"].tolist() == [2, 3]


def test_constants_where_and_split_hold_for_the_rows_they_name(tmp_path: Path) -> None:
    frame = solid(
        tmp_path,
        "Formula,sigma,lab,part\nLi3N,1,A,learn\nLiCl,2,B,learn\nLiF,3,A,exam\nLi2O,4,A,\nLi2S,5,A,odd\n",
        columns={"formula": "Formula", "conductivity_s_cm": SOLID["conductivity_s_cm"]},
        constants={"temperature_k": {"value": 25, "unit": "degC"}, "family": "oxide"},
        where={"lab": "A"},
        split={"column": "part", "train": ["learn"], "test": ["exam"]},
    )
    assert frame.frame["split_hint"].tolist() == ["train", "test", ""]
    assert frame.frame["source_row"].tolist() == [1, 3, 4]
    np.testing.assert_allclose(frame.frame["temperature_k"], 298.15)
    assert frame.rejected["code"].tolist() == ["unknown_split"]


def test_a_source_may_state_that_it_brings_no_test_rows(tmp_path: Path) -> None:
    batch = solid(
        tmp_path, "Formula,T,sigma,part\nLi3N,1,1,train\nLiCl,2,2,\nLiF,3,3,test\n", split={"column": "part", "test": []}
    )
    assert batch.frame["split_hint"].tolist() == ["train_only", ""]
    assert batch.rejected["code"].tolist() == ["unknown_split"]


def test_chain_ends_and_a_logarithmic_column_are_read_as_the_site_states_them(tmp_path: Path) -> None:
    (tmp_path / "lab.csv").write_text("P,S,m,T,k\n[Cu]CCO[Au],[Cu+].[Cl-],,25,-4\n*CCO*,,1,25,-5\n")
    columns: dict[str, Any] = {
        "polymer_smiles": {"from": "P", "chain_ends": ["[Cu]", "[Au]"]},
        "salt_smiles": "S",
        "molality": {"from": "m", "unit": "mol/kg", "replace": {"": "0"}},
        "temperature_k": {"from": "T", "unit": "degC"},
        "conductivity_s_cm": {"from": "k", "unit": "log10(S/cm)"},
    }
    frame = read(tmp_path, "polymer_electrolyte", path="lab.csv", columns=columns).frame
    assert frame["polymer_smiles"].tolist() == ["[*]CCO[*]", "*CCO*"]
    assert frame["salt_smiles"].tolist() == ["[Cu+].[Cl-]", ""]
    assert frame["molality"].tolist() == [0.0, 1.0]
    np.testing.assert_allclose(frame["conductivity_s_cm"], [1e-4, 1e-5])
    wrong = {**columns, "molality": {"from": "m", "unit": "mol/kg", "chain_ends": ["[Cu]"]}}
    with pytest.raises(ConfigError, match="'chain_ends' belongs to a SMILES"):
        read(tmp_path, "polymer_electrolyte", path="lab.csv", columns=wrong)


def test_select_keeps_exactly_the_rows_of_the_published_table(tmp_path: Path) -> None:
    (tmp_path / "sites.csv").write_text("row,site,split\n0,alpha,train\n2,alpha,test\n1,beta,train\n")
    select = {"table": "sites.csv", "left": "row", "right": "row", "where": {"site": "alpha"}, "take": {"part": "split"}}
    frame = solid(tmp_path, "Formula,T,sigma\nLi3N,1,1\nLiCl,2,2\nLiF,3,3\n", select=select, split={"column": "part"}).frame
    assert frame["formula"].tolist() == ["Li3N", "LiF"]
    assert frame["split_hint"].tolist() == ["train", "test"]


@pytest.mark.parametrize(
    ("table", "change", "expected"),
    [
        ("row,site\n0,alpha\n9,alpha\n", {}, "1 of 2 keys"),
        ("row,site\n0,alpha\n0,alpha\n", {}, "1 keys repeat"),
        ("row,site\n0,beta\n", {}, "meets select.where"),
        ("row,sight\n0,alpha\n", {}, "did you mean 'sight'?"),
        ("row,site\n0,alpha\n", {"take": {"T": "site"}}, "adds 'T'"),
        ("row,site\n0,alpha\n", {"table": "none.csv"}, "no such file"),
    ],
)
def test_a_select_table_that_does_not_fit_is_refused(tmp_path: Path, table: str, change: Any, expected: str) -> None:
    (tmp_path / "sites.csv").write_text(table)
    select = {"table": "sites.csv", "left": "row", "right": "row", "where": {"site": "alpha"}, **change}
    assert expected in refused(FedmatError, tmp_path, "Formula,T,sigma\nLi3N,1,1\n", select=select)


# --- mixtures ----------------------------------------------------------------------------------------------------

LIQUID: dict[str, Any] = {
    "salt": "salt",
    "concentration": "c",
    "concentration_basis": "basis",
    "temperature_k": {"from": "T", "unit": "K"},
    "conductivity_s_cm": {"from": "k", "unit": "S/m"},
}


def liquid(base: Path, solvents: Any, header: str, rows: list[str]) -> RawBatch:
    lines = [f"salt,c,basis,T,k,{header}", *(f"LiPF6,1,mol/l,298,1,{r}" for r in rows)]
    (base / "l.csv").write_text("\n".join(lines) + "\n")
    return read(
        base, "liquid_electrolyte", path="l.csv", columns={**LIQUID, "solvents": solvents}, constants={"solvent_basis": "w"}
    )


def test_a_column_per_component_becomes_one_mixture(tmp_path: Path) -> None:
    solvents = {"fractions": {"EC": "EC", "Dimethyl carbonate": "DMC", "DMC2": "DMC"}, "percent": True}
    batch = liquid(
        tmp_path, solvents, "EC,Dimethyl carbonate,DMC2", ["30,20,50", "100,0,", ",,", "110,-10,0", "30,<5,65", "30,x,70"]
    )
    assert batch.frame["solvents"].tolist() == ['{"DMC":0.7,"EC":0.3}', '{"EC":1}', ""]
    assert batch.rejected[["source_row", "column", "code"]].to_numpy().tolist() == [
        [4, "Dimethyl carbonate", "bad_mixture"],
        [5, "Dimethyl carbonate", "bad_mixture"],
        [6, "Dimethyl carbonate", "bad_mixture"],
    ]


def test_a_mixture_may_stand_in_one_cell(tmp_path: Path) -> None:
    rows = [
        '"{""EC"": 0.3, ""DMC"": 0.7}"',
        "EC=0.3; DMC=0.7",
        "EC=0.3; EC=0.7",
        "EC 0.3",
        '"{""EC"": -1}"',
        '"{""EC"": "',
        "EC=0",
        "n/a",
    ]
    batch = liquid(tmp_path, "mix", "mix", rows)
    assert batch.frame["solvents"].tolist() == ['{"DMC":0.7,"EC":0.3}'] * 2 + [""]
    assert batch.rejected["source_row"].tolist() == [3, 4, 5, 6, 7]
    assert set(batch.rejected["code"]) == {"bad_mixture"}


# --- other formats -----------------------------------------------------------------------------------------------


def test_all_tabular_formats_give_the_same_records(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {"Formula": ["Li3N", "LiCl", "LiF"], "T": [25.0, 30.5, 77.0], "sigma": ["<0.5", "2", "n/a"], "run": [1, 2, 3]}
    )
    table.to_csv(tmp_path / "t.csv", index=False)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress((tmp_path / "t.csv").read_bytes()))
    (tmp_path / "t16.csv").write_text(table.to_csv(index=False, sep="\t"), encoding="utf-16")
    table.to_parquet(tmp_path / "t.parquet")
    table.to_excel(tmp_path / "t.xlsx", sheet_name="Data", index=False, startrow=2)
    with sqlite3.connect(tmp_path / "t.sqlite") as connection:
        connection.execute('create table "lab data" (run integer primary key, Formula text, T real, sigma text)')
        shuffled = table.iloc[[2, 0, 1]][["run", "Formula", "T", "sigma"]]
        connection.executemany('insert into "lab data" values (?,?,?,?)', shuffled.to_numpy().tolist())
    connection.close()
    sources: list[dict[str, Any]] = [
        {"adapter": "csv", "path": "t.csv"},
        {"adapter": "csv", "path": "t.csv.gz"},
        {"adapter": "csv", "path": "t16.csv", "options": {"encoding": "utf-16", "sep": "tab"}},
        {"adapter": "parquet", "path": "t.parquet", "options": {"decimal": ","}},
        {"adapter": "excel", "path": "t.xlsx", "options": {"sheet": "Data", "skiprows": 2}},
        {"adapter": "sql", "path": "t.sqlite", "options": {"table": "lab data"}},
        {"adapter": "sql", "path": "sqlite:///t.sqlite", "options": {"query": 'SELECT * FROM "lab data" ORDER BY run'}},
    ]
    first = None
    for source in sources:
        columns = {**SOLID, "conductivity_s_cm": {**SOLID["conductivity_s_cm"], "replace": {"<0.5": "<0,5"}}}
        frame = read(tmp_path, columns=columns if "decimal" in source.get("options", {}) else SOLID, **source).frame
        first = frame if first is None else first
        pd.testing.assert_frame_equal(frame, first)


def test_excel_booleans_and_dates_are_not_numbers_and_failed_formulas_are_blank(tmp_path: Path) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    sheet = book.active
    for row in [
        ["Formula", "T", "sigma"],
        ["Li3N", True, 1],
        ["LiCl", pd.Timestamp("2024-01-01"), 1],
        ["LiF", 25, "#DIV/0!"],
        ["Li2O", None, "#N/A"],
    ]:
        sheet.append(row)
    book.save(tmp_path / "x.xlsx")
    batch = read(tmp_path, adapter="excel", path="x.xlsx", columns=SOLID)
    assert batch.rejected["code"].tolist() == ["not_a_number"] * 2
    assert math.isnan(batch.frame["conductivity_s_cm"][0])  # a failed formula left no value
    assert np.isnan(batch.frame[["temperature_k", "conductivity_s_cm"]].to_numpy()[1]).all()


def test_a_table_without_a_key_has_one_order_all_the_same(tmp_path: Path) -> None:
    rows = [("Li3N", 25.0, "1"), ("LiCl", 26.0, "2"), ("LiF", 27.0, "3")]
    frames = []
    for i, order in enumerate([rows, rows[::-1]]):
        connection = sqlite3.connect(tmp_path / f"{i}.sqlite")
        connection.execute("create table t (Formula text, T real, sigma text)")
        connection.executemany("insert into t values (?,?,?)", order)
        connection.commit()
        connection.close()
        frames.append(read(tmp_path, adapter="sql", path=f"{i}.sqlite", options={"table": "t"}, columns=SOLID))
    pd.testing.assert_frame_equal(frames[0].frame, frames[1].frame)
    assert frames[0].file_sha256 == frames[1].file_sha256


def test_database_secrets_come_from_the_environment_and_are_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failure(path: str, **options: Any) -> str:
        with pytest.raises(FedmatError) as caught:
            read(tmp_path, adapter="sql", path=path, options=options, columns=SOLID)
        return str(caught.value)

    secret = "hunter2/@:x"
    monkeypatch.setenv("LAB_PASSWORD", secret)
    monkeypatch.setenv("LAB_DB", "there.sqlite")
    sqlite3.connect(tmp_path / "there.sqlite").close()
    assert "no table 'runs'" in failure("sqlite:///${LAB_DB}", table="runs")
    assert "LAB_NOWHERE" in failure("sqlite:///${LAB_NOWHERE}", table="runs")
    assert "holds a password" in (text := failure("postgresql://me:geheim@host/db", table="t"))
    assert "geheim" not in text
    text = failure("postgresql+nosuchdriver://me:${LAB_PASSWORD}@host/db", table="t")
    assert secret not in text
    assert "not a SELECT" in failure("there.sqlite", query="DROP TABLE runs")
    assert "OperationalError" in failure("there.sqlite", query="select a from runs")
    assert "and not both" in failure("there.sqlite")
    assert "no such database" in failure("elsewhere.sqlite", table="t")
    assert not (tmp_path / "elsewhere.sqlite").exists()


def test_a_database_is_never_written(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "d.sqlite")
    connection.execute("create table t (a)")
    connection.close()
    before = (tmp_path / "d.sqlite").read_bytes()
    with pytest.raises(DataError):
        read(
            tmp_path,
            adapter="sql",
            path="d.sqlite",
            columns=SOLID,
            options={"query": "with x as (select 1) insert into t select * from x"},
        )
    assert (tmp_path / "d.sqlite").read_bytes() == before


# --- structures --------------------------------------------------------------------------------------------------


def test_structures_attach_to_rows_by_file_name_and_a_bad_one_rejects_its_row(tmp_path: Path) -> None:
    from pymatgen.core import Structure

    (tmp_path / "cif").mkdir()
    (tmp_path / "cif" / "a1.cif").write_text(CIF.format(a=3.8, occupancy=0.5))
    (tmp_path / "cif" / "b2.cif").write_text("data_x\nthis is no structure\n")
    (tmp_path / "cif" / "c3.cif").write_text("junk that is never read: its row does not take part")
    text = "Formula,T,sigma,ID,use\nLi0.5Cl,25,1,a1,y\nLiCl,25,1,b2,y\nLiCl,25,1,c3,n\nLiF,25,1,d4,y\n"
    batch = solid(tmp_path, text, structures={"path": "cif", "on": "ID"}, where={"use": "y"})
    assert batch.frame["source_row"].tolist() == [1, 4]
    structure = Structure.from_dict(json.loads(batch.frame["structure"][0]))
    assert structure.composition.get_el_amt_dict() == {"Li": 0.5, "Cl": 1.0}
    assert batch.frame["structure"][1] == ""
    assert batch.rejected[["source_row", "column", "field", "code"]].to_numpy().tolist() == [
        [2, "ID", "structure", "bad_structure"]
    ]


def test_folder_archive_and_json_give_the_same_structures(tmp_path: Path) -> None:
    from pymatgen.core import Structure

    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.cif").write_text(CIF.format(a=3.8, occupancy=0.5))
    (tmp_path / "one" / "b.cif").write_text(CIF.format(a=5.1, occupancy=1))
    (tmp_path / "one" / ".hidden.cif").write_text("junk")
    (tmp_path / "one" / "readme.txt").write_text("not a structure")
    with tarfile.open(tmp_path / "two.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "one", "deep/er")
        link = tarfile.TarInfo("evil.cif")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (tmp_path / "three").mkdir()
    for stem in "ab":
        parsed = structures.parse((tmp_path / "one" / f"{stem}.cif").read_text())
        assert parsed is not None
        (tmp_path / "three" / f"{stem}.json").write_text(Structure.from_dict(json.loads(parsed[1])).to_json())
    columns = {"formula": "formula", "structure": "structure"}
    constants = {"temperature_k": {"value": 25, "unit": "degC"}, "conductivity_s_cm": {"value": "<1e-4", "unit": "S/cm"}}
    frames = [
        read(tmp_path, adapter="structures", path=p, columns=columns, constants=constants).frame
        for p in ("one", "two.tar.gz", "three")
    ]
    pd.testing.assert_frame_equal(frames[0], frames[1])
    assert frames[0]["formula"].tolist() == frames[2]["formula"].tolist() == ["Li0.5Cl1", "Li1Cl1"]
    assert frames[0]["structure"].map(lambda t: json.loads(t)["lattice"]).tolist() == [
        json.loads(t)["lattice"] for t in frames[2]["structure"]
    ]
    assert frames[0]["conductivity_s_cm_censored"].tolist() == ["left", "left"]


def test_a_table_joined_to_structures_loses_neither_rows_nor_files(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    for stem, text in {"a": CIF.format(a=4, occupancy=1), "b": "junk", "z": CIF.format(a=4, occupancy=1)}.items():
        (tmp_path / "s" / f"{stem}.cif").write_text(text)
    (tmp_path / "m.csv").write_text("name,T,sigma\na,25,1\na,35,2\nb,25,3\nnone,25,4\n")
    batch = read(
        tmp_path,
        adapter="structures",
        path="s",
        options={"table": "m.csv", "key": "name"},
        columns={**SOLID, "formula": "formula", "structure": "structure"},
    )
    assert batch.frame["source_row"].tolist() == [1, 2, 4, 5]
    assert batch.frame["formula"].tolist() == ["Li1Cl1", "Li1Cl1", "", "Li1Cl1"]
    assert batch.rejected[["source_row", "code"]].to_numpy().tolist() == [[3, "bad_structure"]]


def test_structure_files_that_cannot_be_told_apart_or_belong_to_no_row_are_refused(tmp_path: Path) -> None:
    for folder in ("s/x", "s/y", "t"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.cif").write_text("junk")
    text = "Formula,T,sigma,ID\nLiF,25,1,q\n"
    assert "1 structure files" in refused(DataError, tmp_path, text, structures={"path": "s", "on": "ID"})
    assert "is the name of a file" in refused(DataError, tmp_path, text, structures={"path": "t", "on": "ID"})
    assert "no such file" in refused(DataError, tmp_path, text, structures={"path": "nowhere", "on": "ID"})
    (tmp_path / "bad.tar.gz").write_bytes(gzip.compress(b"not a tar")[:-4])
    assert "tar archive" in refused(DataError, tmp_path, text, structures={"path": "bad.tar.gz", "on": "ID"})


# --- refusals ----------------------------------------------------------------------------------------------------

GOOD = "Formula,T,sigma\nLi3N,25,1\n"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"columns": {**SOLID, "temprature_k": "T"}}, "did you mean 'temperature_k'?"),
        ({"columns": {**SOLID, "temperature_k": "T"}}, "needs 'unit'"),
        ({"columns": {**SOLID, "temperature_k": {"from": "T", "unit": "degX"}}}, "unknown unit 'degX'"),
        ({"columns": {**SOLID, "temperature_k": {"from": "T", "unit": "kg"}}}, "'kelvin'"),
        ({"columns": {**SOLID, "family": {"from": "T", "unit": "K"}}}, "has no unit"),
        ({"columns": {**SOLID, "family": {"fractions": {"T": "EC"}}}}, "belongs to a mixture"),
        ({"columns": {k: v for k, v in SOLID.items() if k != "formula"}}, "formula: record type solid_electrolyte requires"),
        ({"constants": {"formula": "LiF"}}, "formula: given twice"),
        ({"constants": {"doi": {"value": "x", "unit": "K"}}}, "has no unit"),
        ({"columns": {**SOLID, "formula": "Formule"}}, "no column 'Formule' (for formula); did you mean 'Formula'?"),
        ({"where": {"lab": "A"}}, "no column 'lab' (for where)"),
        ({"split": {"column": "part"}}, "no column 'part' (for split)"),
        ({"options": {"sepp": ";"}}, "did you mean 'sep'?"),
        ({"options": {"sep": ";"}}, "set options.sep"),
        ({"options": {"sep": "ab"}}, "one character"),
        ({"options": {"encoding": "utf-99"}}, "unknown encoding"),
        ({"options": {"skiprows": -1}}, "whole number"),
        ({"options": {"decimal": ";"}}, "options.decimal"),
        ({"options": {"missing": "-999"}}, "list of words"),
        ({"adapter": "cvs"}, "did you mean 'csv'?"),
        ({"path": ""}, "needs 'path'"),
    ],
)
def test_a_mapping_that_cannot_work_is_refused_naming_the_field_and_the_way_out(
    tmp_path: Path, change: Any, expected: str
) -> None:
    assert expected in refused(ConfigError, tmp_path, GOOD, **change)


@pytest.mark.parametrize(
    ("text", "change", "expected"),
    [
        (GOOD, {"path": "dat.csv"}, "did you mean 'data.csv'?"),
        (b"Formula,T,sigma\nLi\xff,1,1\n", {}, "not utf-8-sig text"),
        ("", {}, "the file is empty"),
        ("Formula,T,sigma\n\n", {}, "no data row"),
        ('Formula,T,sigma\nLi3N,"25,1\n', {}, "quoting is broken"),
        (GOOD, {"where": {"T": "26"}}, "no row meets 'where'"),
        (GOOD, {"adapter": "excel"}, "not a readable workbook"),
        (GOOD, {"adapter": "parquet"}, "not a readable Parquet file"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused(tmp_path: Path, text: str | bytes, change: Any, expected: str) -> None:
    assert expected in refused(DataError, tmp_path, text, **change)


def test_several_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = refused(ConfigError, tmp_path, GOOD, columns={"formla": "Formula", "temperature_k": {"from": "T", "unit": "kg"}})
    assert "formla" in text
    assert "temperature_k" in text
    assert "conductivity_s_cm" in text


def test_a_column_that_stands_twice_must_be_named_exactly(tmp_path: Path) -> None:
    text = "Formula,T,T,sigma\nLi3N,25,26,1\n"
    assert "T #1, T #2" in refused(ConfigError, tmp_path, text)
    frame = solid(tmp_path, text, columns={**SOLID, "temperature_k": {"from": "T #2", "unit": "K"}}).frame
    assert frame["temperature_k"].tolist() == [26.0]


def test_no_refusal_repeats_a_cell(tmp_path: Path) -> None:
    canary = "CANARY7431"
    texts = [f"Formula,T,sigma\n{canary},25,{canary}\n", f'Formula,T,sigma\n"{canary},25\n', f"Formula,T\n{canary},{canary}\n"]
    changes: list[dict[str, Any]] = [{}, {"where": {"Formula": "x"}}, {"options": {"sep": ";"}}, {"adapter": "excel"}]
    for text in texts:
        for change in changes:
            said = ""
            try:
                solid(tmp_path, text, **change)
            except FedmatError as error:
                said = f"{error} {error.__cause__}"
            assert canary not in said


def test_a_third_party_reader_is_found_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lims"
    info = package / "lims_reader-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lims-reader\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[fedmat.adapters]\nlims = lims_reader:Lims\nbroken = lims_reader:Nothing\nalien = io:StringIO\nfails = lims_reader:Fails\n"
    )
    (package / "lims_reader.py").write_text(
        "import pandas as pd\nfrom fedmat.data.adapters import LegacyAdapter\n"
        "class Lims(LegacyAdapter):\n"
        "    def read(self, source, base):\n"
        "        return pd.DataFrame({'Formula': ['Li3N'], 'T': [source.options['kelvin']], 'sigma': ['1']}, index=[7])\n"
        "class Fails(LegacyAdapter):\n"
        "    def read(self, source, base):\n"
        "        raise ValueError('CANARY')\n"
    )
    monkeypatch.syspath_prepend(package)
    assert isinstance(adapter_for("lims"), LegacyAdapter)
    batch = read(
        tmp_path, adapter="lims", options={"kelvin": 300}, columns={**SOLID, "temperature_k": {"from": "T", "unit": "K"}}
    )
    assert batch.frame["temperature_k"].tolist() == [300.0]
    assert batch.frame["source_row"].tolist() == [1]
    for name, expected in {
        "broken": "cannot be loaded",
        "alien": "not a LegacyAdapter",
        "fails": r"failed \(ValueError\)",
    }.items():
        with pytest.raises(FedmatError, match=expected) as caught:
            read(tmp_path, adapter=name, columns=SOLID)
        assert "CANARY" not in str(caught.value)


def test_raw_rows_keep_the_source_s_own_columns(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("\ufeff a ,,b,\n1,2,3,\n")
    frame = read_raw(Source(adapter="csv", path="d.csv", columns={}), tmp_path)
    assert frame.to_dict("records") == [{"a": "1", "column 2": "2", "b": "3", "__row__": 1}]


# --- the public files --------------------------------------------------------------------------------------------


@pytest.fixture
def _published(public_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMAT_DATA", str(public_data))


@pytest.mark.usefixtures("_published")
def test_calisol23_is_read_whole(public_data: Path, tmp_path: Path) -> None:
    header = (public_data / "calisol23" / "calisol23.csv").read_text().partition("\n")[0].strip().split(",")
    source = {
        "path": "${FEDMAT_DATA}/calisol23/calisol23.csv",
        "columns": {
            "salt": {"from": "salt", "replace": {"LiN(CF3SO2)2": "LiTFSI"}},
            "concentration": "c",
            "concentration_basis": "c units",
            "solvents": {"fractions": {h: h for h in header[7:]}},
            "solvent_basis": "solvent ratio type",
            "temperature_k": {"from": "T", "unit": "K"},
            "conductivity_s_cm": {"from": "k", "unit": "mS/cm"},
            "doi": "doi",
        },
    }
    batch = read(tmp_path, "liquid_electrolyte", **source)
    assert (len(header[7:]), len(batch.frame), len(batch.rejected)) == (38, 13825, 0)
    assert int(batch.frame["conductivity_s_cm"].isna().sum()) == 523
    assert int((batch.frame["concentration"] < 0).sum()) == 1
    assert not any(s != s.strip() for s in batch.frame["salt"])
    assert "LiN(CF3SO2)2" not in set(batch.frame["salt"])
    select = {"table": "${FEDMAT_DATA}/consortia/C4a_liquid_electrolyte_sites.csv", "left": "row", "right": "row",
              "where": {"site": "E1_LiPF6"}, "take": {"published": "split"}}  # fmt: skip
    part = read(tmp_path, "liquid_electrolyte", **source, select=select, split={"column": "published"}).frame
    assert part["split_hint"].value_counts().to_dict() == {"train": 3586, "test": 1113}
    assert set(part["salt"]) == {"LiPF6"}


@pytest.mark.usefixtures("_published")
def test_obelix_keeps_its_bounds_and_structures(tmp_path: Path) -> None:
    batch = read(
        tmp_path,
        path="${FEDMAT_DATA}/obelix/all.csv",
        columns={
            "formula": "Reduced Composition",
            "conductivity_s_cm": {"from": "Ionic conductivity (S cm-1)", "unit": "S/cm"},
        },
        constants={"temperature_k": {"value": 25, "unit": "degC"}},
    )
    assert len(batch.frame) == 599
    assert batch.frame["conductivity_s_cm_censored"].value_counts().to_dict() == {"": 562, "left": 37}
    few = read(
        tmp_path,
        path="${FEDMAT_DATA}/obelix/all.csv",
        columns={
            "formula": "Reduced Composition",
            "conductivity_s_cm": {"from": "Ionic conductivity (S cm-1)", "unit": "S/cm"},
        },
        constants={"temperature_k": {"value": 25, "unit": "degC"}},
        where={"ID": ["jqc", "oi6", "2t8", "019"]},
        structures={"path": "${FEDMAT_DATA}/obelix/all_cifs.tar.gz", "on": "ID"},
    )
    assert len(few.frame) + len(set(few.rejected["source_row"])) == 4
    assert few.frame["structure"].str.startswith("{").any()


@pytest.mark.usefixtures("_published")
def test_liion_and_mpea_are_read_whole(tmp_path: Path) -> None:
    liion = read(
        tmp_path,
        path="${FEDMAT_DATA}/liion_liverpool/LiIonDatabase.csv",
        columns={
            "formula": {"from": "composition", "strip": '"'},
            "temperature_k": {"from": "temperature", "unit": "degC"},
            "conductivity_s_cm": {"from": "target", "unit": "S/cm"},
        },
    )
    assert (len(liion.frame), len(liion.rejected)) == (820, 0)
    assert not any('"' in f for f in liion.frame["formula"])
    mpea = read(
        tmp_path,
        "alloy",
        path="${FEDMAT_DATA}/mpea/MPEA_dataset.csv",
        columns={
            "formula": "FORMULA",
            "test_type": "PROPERTY: Type of test",
            "temperature_k": {"from": "PROPERTY: Test temperature ($^\\circ$C)", "unit": "degC"},
            "yield_strength_mpa": {"from": "PROPERTY: YS (MPa)", "unit": "MPa"},
            "hardness_hv": {"from": "PROPERTY: HV", "unit": "HV"},
        },
    )
    assert (len(mpea.frame), len(mpea.rejected)) == (1545, 0)
    assert int(mpea.frame["hardness_hv"].notna().sum()) == 530
