"""A drafted site file: the layout is seen, the columns are matched, and no unit and no value is taken for granted."""

from __future__ import annotations

import gzip
import json
import sqlite3
from pathlib import Path

import openpyxl
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat.config import SiteConfig, load_site
from fedmat.data import draft, layout
from fedmat.data.contract import RECORD_TYPES
from fedmat.errors import ConfigError, DataError

CANARY = "Xq7Zz9"


def drafted(path: Path, record_type: str | None = None) -> draft.Draft:
    return draft.draft(path, path.parent, site="mill", organisation="Mill Ltd", record_type=record_type)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("a,b\n1,2\n", {}),
        ("a;b\n1,5;2,5\n", {"sep": ";", "decimal": ","}),
        ("a;b\n1.5;2.5\n", {"sep": ";"}),
        ("a\tb\n1\t2\n", {"sep": "tab"}),
        ("Export of 2024\n\na|b|c\n1|2|3\n4|5|6\n", {"sep": "|", "skiprows": 2}),
        ("# made by a machine\na,b\n1,2\n", {"skiprows": 1}),
        ("a,b\n# a note\n1,2\n", {"comment": "#"}),
        ("T,sigma\nK,S/cm\n300,1e-3\n", {"skip_after_header": 1}),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_layout_that_is_found_reads_the_file(tmp_path: Path, text: str, options: dict[str, object], packed: bool) -> None:
    path = tmp_path / ("lab.csv.gz" if packed else "lab.csv")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    found = layout.inspect(path)
    assert found.options == options
    frame = layout.raw(path, found)
    assert frame.columns[0] in ("a", "T")
    assert frame.iloc[0, 0] in ("1", "1,5", "1.5", "300")


def test_a_sheet_with_lines_above_its_header_is_read(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for row in (["Cycler export"], [], ["Cathode", "Rate (1/h)"], ["LiFePO4", 1.0]):
        book.active.append(row)
    book.save(tmp_path / "lab.xlsx")
    assert layout.columns_of(tmp_path / "lab.xlsx", layout.inspect(tmp_path / "lab.xlsx")) == ["Cathode", "Rate (1/h)"]


def test_the_widest_table_of_a_database_is_taken(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "lab.sqlite") as database:
        database.execute("CREATE TABLE people (name)")
        database.execute("CREATE TABLE cells (formula, temp_c, sigma)")
    assert layout.inspect(tmp_path / "lab.sqlite").options == {"table": "cells"}


@pytest.mark.parametrize("name", ["lab.docx", "lab.sqlite", "none.csv"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    if not name.startswith("none"):
        (tmp_path / name).write_bytes(b"\x00\x01 not what it says")
    with pytest.raises(DataError, match=name):
        layout.inspect(tmp_path / name)


@pytest.mark.parametrize(
    ("header", "unit"),
    [
        ("T [°C]", "°C"),
        ("T (F)", "degF"),
        ("sigma / S cm-1", "S cm-1"),
        ("thickness in um", "um"),
        ("pos_thickness_mm", "mm"),
        ("energy_kj_m2", "kJ/m2"),
        ("rate_per_hour", "1/hour"),
        ("temp_c", "degC"),
        ("porosity (%)", "%"),
        ("Space group", ""),
        ("cell_id", ""),
        ("run_2", ""),
    ],
)
def test_a_unit_is_seen_where_headers_have_it(header: str, unit: str) -> None:
    assert draft.unit_in(header) == unit


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=6, unique=True))
def test_no_header_upsets_the_guess_and_no_column_is_used_twice(headers: list[str]) -> None:
    columns = {h: draft.unit_in(h) for h in headers}
    for rt in RECORD_TYPES.values():
        mapped = draft.guess(columns, rt)
        assert set(mapped) <= {f.name for f in rt.fields}
        assert len(set(mapped.values())) == len(mapped)


def test_a_column_whose_unit_cannot_be_the_fields_is_not_mapped() -> None:
    rt = RECORD_TYPES["solid_electrolyte"]
    assert "temperature_k" not in draft.guess({"temperature (S/cm)": "S/cm"}, rt)
    assert draft.guess({"temperature (degC)": "degC"}, rt) == {"temperature_k": "temperature (degC)"}


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=15), min_size=2, max_size=5, unique=True
    )
)
def test_a_draft_is_a_valid_site_file_whatever_the_columns_are_called(headers: list[str]) -> None:
    import tempfile

    names = [h.strip() for h in headers if h.strip()]
    if len(set(names)) < 2:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lab.parquet"
        pd.DataFrame([[CANARY] * len(set(names))], columns=sorted(set(names))).to_parquet(path)
        for record_type in RECORD_TYPES:
            text = drafted(path, record_type).text
            SiteConfig.model_validate(yaml.safe_load(text))
            assert CANARY not in text


def test_every_unit_waits_for_a_person(tmp_path: Path) -> None:
    path = tmp_path / "lab.csv"
    path.write_text("formula,temperature (degC),conductivity [mS/cm]\nLi2O,25,0.1\n")
    (tmp_path / "site.yaml").write_text(drafted(path).text)
    site = load_site(tmp_path / "site.yaml")
    assert [p.split(":")[0] for p in draft.unconfirmed(site)] == [
        "column 'temperature (degC)' (temperature_k)",
        "column 'conductivity [mS/cm]' (conductivity_s_cm)",
    ]


def test_an_unknown_record_type_is_refused_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "lab.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="did you mean 'alloy'"):
        drafted(tmp_path / "lab.csv", "aloy")


@pytest.mark.parametrize("name", ["new.json", "new.jsonl"])
def test_records_to_predict_may_be_json(tmp_path: Path, name: str) -> None:
    rows = [{"formula": "Li2O", "temperature_k": 300}, {"formula": "LiCl", "temperature_k": 310}]
    text = json.dumps(rows) if name == "new.json" else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_text(text)
    assert list(layout.read(tmp_path / name)["temperature_k"]) == [300, 310]
    (tmp_path / name).write_text("[1, 2]" if name == "new.json" else "1")
    with pytest.raises(DataError, match="list of objects"):
        layout.read(tmp_path / name)
