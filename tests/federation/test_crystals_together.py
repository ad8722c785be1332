"""Crystals from files to predictions: graphs are made at each site, trained on together, cached, and made again to predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from consortium import coordinator, worker
from pymatgen.core import Element, Lattice, Structure

from fedmat import serving, wire
from fedmat.config import Admission, ConsortiumConfig, GraphSpec, SiteConfig
from fedmat.data.contract import record_type
from fedmat.data.records import load_records, prepare
from fedmat.data.structures import to_json
from fedmat.domain import GlobalModel
from fedmat.features.dataset import featurize, record_graphs
from fedmat.features.graphs import Graphs
from fedmat.features.registry import build
from fedmat.features.table import FeatureTable
from fedmat.federation.engine import InProcessEngine

RT = record_type("crystal")
A = {"alkaline": ("Ca", "Sr", "Ba", "Na", "K"), "rare": ("Y", "La", "Ce", "Nd", "Gd"), "late": ("Zn", "Cd", "Pb", "Bi", "Ag")}
B = ("Ti", "Zr", "Hf", "Sn", "V", "Nb")


def cell(a: str, b: str) -> Structure:
    edge = 2.0 * (float(Element(b).atomic_radius) + 0.6)
    sites = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    return Structure(Lattice.cubic(edge), [a, b, "O", "O", "O"], sites)


def energy(a: str, b: str) -> float:
    return float(2.0 * Element(a).X - Element(b).X) - 1.0


SETTINGS = ConsortiumConfig.model_validate(
    {
        "name": "quarry",
        "title": "A quarry",
        "simulated": True,
        "task": {"name": "energy", "record_type": "crystal", "target": "formation_energy_ev", "unit": "eV"},
        "features": ["composition"],
        "model": {"hidden": [16], "dropout": 0.1, "graph": {"of": "crystal", "width": 8, "layers": 2}},
        "plan": {
            "rounds": 2,
            "ensemble": 2,
            "quorum": 3,
            "local": {"steps": 6, "batch_size": 16, "lr": 3e-3},
            "deduplicate": False,
            "seed": 5,
        },
        "admission": {"min_train_records": 10},
        "members": [{"site": s, "organisation": s.title(), "file": f"{s}.yaml"} for s in A],
    }
)


def table_of(folder: Path) -> FeatureTable:
    features = build(SETTINGS.features, RT, SETTINGS.task.target)
    return featurize(folder, features, SETTINGS.tasks, SETTINGS.splits, RT, SETTINGS.model.graph)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every site's workspace: thirty crystals from a CSV of its own, as CIF at two sites and as JSON at the third."""
    out = {}
    for site, symbols in A.items():
        base = tmp_path_factory.mktemp(site)
        text: Any = to_json if site == "late" else lambda s: s.to(fmt="cif")
        rows = [{"name": f"{a}{b}O3", "cell": text(cell(a, b)), "E": energy(a, b)} for a in symbols for b in B]
        pd.DataFrame(rows).to_csv(base / "data.csv", index=False)
        columns = {"formula": "name", "structure": "cell", "formation_energy_ev": {"from": "E", "unit": "eV"}}
        source = {"adapter": "csv", "path": "data.csv", "columns": columns}
        config = SiteConfig.model_validate(
            {"site": site, "organisation": site.title(), "record_type": "crystal", "sources": [source]}
        )
        out[site] = base / "workspace"
        prepare(config, base, out[site], target=SETTINGS.task.target, admission=Admission(min_train_records=10))
    return out


@pytest.fixture(scope="module")
def tables(folders: dict[str, Path]) -> dict[str, FeatureTable]:
    return {site: table_of(folder) for site, folder in folders.items()}


def trained(folder: Path, tables: dict[str, FeatureTable]) -> GlobalModel:
    lead = coordinator(SETTINGS, folder)
    handlers = {site: worker(site, SETTINGS, folder, table).handle for site, table in tables.items()}
    reports = list(lead.run(InProcessEngine(handlers)))
    assert len(reports) == 2 and not any(r.dropouts or r.rejections for r in reports)
    return lead.model()


@pytest.fixture(scope="module")
def model(tables: dict[str, FeatureTable], tmp_path_factory: pytest.TempPathFactory) -> GlobalModel:
    return trained(tmp_path_factory.mktemp("first"), tables)


def same(a: Graphs | None, b: Graphs | None) -> bool:
    assert a is not None and b is not None
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(a.arrays().values(), b.arrays().values()))


def test_the_cache_gives_the_graphs_back(folders: dict[str, Path], tables: dict[str, FeatureTable]) -> None:
    for site, folder in folders.items():
        (cache,) = (folder / "features").glob(f"{tables[site].sha256}.npz")
        before = cache.stat().st_mtime_ns
        again = table_of(folder)
        assert cache.stat().st_mtime_ns == before, "read, not made again"
        assert same(again.graphs, tables[site].graphs)
        assert again.graphs is not None and len(again.graphs) == len(again) == 30
        assert same(again.graphs, record_graphs(load_records(folder), RT, GraphSpec(of="crystal")))


def test_a_damaged_graph_in_the_cache_is_noticed(folders: dict[str, Path], tables: dict[str, FeatureTable]) -> None:
    path = folders["rare"] / "features" / f"{tables['rare'].sha256}.npz"
    graphs = tables["rare"].graphs
    assert graphs is not None
    whole = path.read_bytes()
    at = whole.index(graphs.distance.tobytes()[:64]) + 8
    try:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.warns(UserWarning, match="damaged or half-written"):
            assert same(table_of(folders["rare"]).graphs, graphs)
        assert path.read_bytes() == whole, "equal inputs give equal bytes"
    finally:
        path.write_bytes(whole)


def test_the_same_plan_and_data_give_the_same_bytes(
    model: GlobalModel, tables: dict[str, FeatureTable], tmp_path: Path
) -> None:
    again = trained(tmp_path, tables)
    assert list(again.weights) == list(model.weights)
    assert all(again.weights[k].tobytes() == v.tobytes() for k, v in model.weights.items())
    assert wire.encode(again) == wire.encode(model)
    assert {name.split(".")[0] for name in model.weights} == {"0", "1"}, "two members"
    assert any(np.any(model.weights[f"0.{k}"] != model.weights[f"1.{k}"]) for k in ("embed.weight", "last.weight"))


def test_raw_records_are_predicted_by_their_structure_in_any_notation(
    model: GlobalModel, tables: dict[str, FeatureTable], folders: dict[str, Path]
) -> None:
    crystal, swapped = cell("Sr", "Ti"), cell("Ti", "Sr")
    texts = [
        str(crystal.to(fmt="cif")),
        to_json(crystal),
        to_json(crystal.make_supercell([2, 1, 1], in_place=False)),
        to_json(swapped),
    ]
    found = serving.predict(model, pd.DataFrame({"formula": ["SrTiO3"] * 4, "structure": texts}))
    value = found["prediction"].to_numpy()
    assert np.isfinite(value).all() and (found["spread"] > 0).all()
    assert value[:3] == pytest.approx([value[0]] * 3, abs=1e-4), "one crystal"
    assert abs(value[3] - value[0]) > 1e-3, "another crystal of the same formula"

    site = "alkaline"
    asked = load_records(folders[site]).loc[:, ["formula", "structure"]]
    table, predictor = tables[site], serving.Predictor.of(model)
    direct = predictor.architecture.predict(model.weights, model.scaler, table.names, table.x, table.graphs)[:, 0]
    assert predictor.predict(asked)["prediction"].to_numpy() == pytest.approx(direct, abs=1e-12)


def test_another_way_of_making_graphs_is_another_table(folders: dict[str, Path], tables: dict[str, FeatureTable]) -> None:
    features = build(SETTINGS.features, RT, SETTINGS.task.target)
    plain = featurize(folders["late"], features, SETTINGS.tasks, SETTINGS.splits, RT)
    assert plain.graphs is None
    assert plain.sha256 != tables["late"].sha256 and plain.features_sha256 != tables["late"].features_sha256
    assert plain.x.tobytes() == tables["late"].x.tobytes()
