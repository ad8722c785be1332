"""A structure may stand in a column: CIF text or pymatgen JSON in, one canonical text out, a bad one rejected by reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure

from fedmat.config import SiteConfig, parse_settings
from fedmat.data import matching
from fedmat.data.adapters import read_source
from fedmat.data.contract import record_type
from fedmat.data.mapping import RawBatch
from fedmat.data.structures import to_json
from fedmat.data.validation import split_valid
from fedmat.errors import ConfigError

RT = record_type("crystal")
SECRET = "CANARY9041"
COLUMNS: dict[str, Any] = {
    "formula": "name",
    "structure": "cell",
    "formation_energy_ev": {"from": "E (meV)", "unit": "meV"},
    "bulk_modulus_gpa": {"from": "K", "unit": "log10(GPa)"},
}


def perovskite(a: str = "Sr", b: str = "Ti", edge: float = 3.9) -> Structure:
    sites = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    return Structure(Lattice.cubic(edge), [a, b, "O", "O", "O"], sites)


def cif(structure: Structure) -> str:
    return str(structure.to(fmt="cif"))


def site_of(base: Path, cells: list[Any], kind: str = "csv", **source: Any) -> SiteConfig:
    table = pd.DataFrame({"name": "SrTiO3", "cell": cells, "E (meV)": -1500, "K": 2.0})
    path = base / f"data.{kind}"
    table.to_csv(path, index=False) if kind == "csv" else table.to_parquet(path)
    raw = {"adapter": kind, "path": path.name, "columns": COLUMNS, **source}
    text = {"site": "alpha", "organisation": "Alpha", "record_type": "crystal", "sources": [raw]}
    return parse_settings(SiteConfig, text, Path("site.yaml"))


def read(base: Path, cells: list[Any], kind: str = "csv", **source: Any) -> RawBatch:
    site = site_of(base, cells, kind, **source)
    return read_source(site, site.sources[0], base, RT)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_cif_text_and_json_in_cells_are_one_structure(tmp_path: Path, kind: str) -> None:
    crystal = perovskite()
    batch = read(tmp_path, [f"\n{cif(crystal)}\n", json.dumps(crystal.as_dict()), to_json(crystal)], kind)
    assert not len(batch.rejected)
    frame = batch.frame
    found = [Structure.from_dict(json.loads(text)) for text in frame["structure"]]
    assert all(s.composition == crystal.composition and np.allclose(s.lattice.abc, 3.9) for s in found)
    assert frame["structure"][1] == frame["structure"][2] == to_json(crystal)
    assert frame["formation_energy_ev"].tolist() == [-1.5] * 3
    assert frame["bulk_modulus_gpa"].tolist() == pytest.approx([100.0] * 3)


def test_a_bad_structure_rejects_its_row_and_no_message_holds_the_cell(tmp_path: Path) -> None:
    two = cif(perovskite()) + cif(perovskite("Ba")).replace("data_", "data_second_")
    bad = [f"data_x\n{SECRET}\n", f'{{"{SECRET}": 1}}', f"C:/cells/{SECRET}.cif", two, cif(perovskite())]
    batch = read(tmp_path, bad)
    assert batch.frame["source_row"].tolist() == [5]
    told = batch.rejected[["source_row", "column", "field", "code"]].to_numpy().tolist()
    assert told == [[row, "cell", "structure", "bad_structure"] for row in (1, 2, 3, 4)]
    assert not any(SECRET in reason for reason in batch.rejected["reason"])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_blank_cell_is_an_absent_structure_and_the_contract_needs_one(tmp_path: Path, kind: str) -> None:
    cells = [None, "", "n/a", "unknown", cif(perovskite())]
    batch = read(tmp_path, cells, kind, options={"missing": ["unknown"]})
    assert not len(batch.rejected)
    assert (batch.frame["structure"] == "").tolist() == [True] * 4 + [False]
    accepted, rejected = split_valid(batch.frame, RT, target="formation_energy_ev")
    assert accepted["source_row"].tolist() == [5]
    assert set(zip(rejected["field"], rejected["code"], strict=True)) == {("structure", "missing")}


def test_stripping_and_replacing_work_on_the_ends_and_whole_of_a_cell(tmp_path: Path) -> None:
    mapped = {**COLUMNS, "structure": {"from": "cell", "strip": '"', "replace": {"not solved": ""}}}
    batch = read(tmp_path, [f'"{cif(perovskite())}"', "not solved"], "parquet", columns=mapped)
    assert not len(batch.rejected)
    assert [text[:1] for text in batch.frame["structure"]] == ["{", ""]


def test_a_structure_has_no_unit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a structure has no unit"):
        read(tmp_path, [""], columns={**COLUMNS, "structure": {"from": "cell", "unit": "angstrom"}})


def test_crystals_of_one_formula_are_one_material_and_not_one_measurement() -> None:
    """Swapping which element sits on A and which on B gives another crystal: neither may be dropped as the other's copy."""
    rows = [
        {"formula": "SrTiO3", "structure": to_json(cell), "formation_energy_ev": 1.26, "bulk_modulus_gpa": np.nan, "doi": ""}
        for cell in (perovskite("Sr", "Ti"), perovskite("Ti", "Sr"), perovskite("Sr", "Ti"))
    ]
    keys = matching.keys(pd.DataFrame(rows), RT, "formation_energy_ev", b"s" * 32, "scope")
    assert len(set(keys["material"].tolist())) == 1
    assert keys["measurement"][0] == keys["measurement"][2] != keys["measurement"][1]
