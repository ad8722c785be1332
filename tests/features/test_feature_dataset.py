"""Laws of a site's feature table and its cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedmat.config import Admission, FeatureSpec, SiteConfig, Splits, Task
from fedmat.data.contract import record_type
from fedmat.data.records import load_records, prepare
from fedmat.data.splits import assign
from fedmat.errors import FeatureError, StateError
from fedmat.features.dataset import bounds, cache_key, featurize, target
from fedmat.features.registry import FeatureSet, build
from fedmat.features.table import TEST, TRAIN, VALIDATION, FeatureTable

RT = record_type("solid_electrolyte")
TASK = Task(name="sigma", record_type=RT.name, target="conductivity_s_cm", unit="millisiemens / centimeter", transform="log10")
SPLITS = Splits()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site's workspace with accepted records: 24 formulas at three temperatures."""
    base = tmp_path_factory.mktemp("lab")
    rows = [
        {"formula": f"Li{n}La3Zr2O{12 + m}", "T": t, "sigma": 1e-4 * n / (m + 1) * t / 300}
        for n in range(1, 9)
        for m in range(3)
        for t in (280, 300, 320)
    ]
    pd.DataFrame(rows).to_csv(base / "data.csv", index=False)
    site = SiteConfig.model_validate(
        {
            "site": "lab",
            "organisation": "Lab",
            "record_type": RT.name,
            "sources": [
                {
                    "adapter": "csv",
                    "path": "data.csv",
                    "columns": {
                        "formula": "formula",
                        "temperature_k": {"from": "T", "unit": "kelvin"},
                        "conductivity_s_cm": {"from": "sigma", "unit": "S/cm"},
                    },
                }
            ],
        }
    )
    folder = base / "workspace"
    prepare(site, base, folder, target=TASK.target, admission=Admission())
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(prepared, tmp_path / "workspace"))


def features(**options: object) -> FeatureSet:
    specs = [FeatureSpec(name="composition"), FeatureSpec(name="conditions", options=options)]
    return build(specs, RT, TASK.target)


def same(a: FeatureTable, b: FeatureTable) -> bool:
    arrays = ("x", "y", "group", "split", "bound", "component")
    return (a.names, a.sha256, a.features_sha256) == (b.names, b.sha256, b.features_sha256) and all(
        np.array_equal(getattr(a, n), getattr(b, n)) for n in arrays
    )


def test_rows_target_groups_and_split_are_those_of_the_records(folder: Path) -> None:
    table = featurize(folder, features(), [TASK], SPLITS, RT)
    records = load_records(folder)
    assert len(table) == len(records) == 72
    assert np.array_equal(table.x, features().transform(records))
    assert table.y[:, 0] == pytest.approx(np.log10(records["conductivity_s_cm"] * 1000))  # S/cm to mS/cm
    assert not table.bound.any()
    assert np.array_equal(table.component, table.group)
    assert np.array_equal(table.split, assign(records, SPLITS))
    assert {TRAIN, VALIDATION, TEST} == set(table.split)
    assert len(set(table.group)) == 24 == records["group"].nunique()
    assert len({(g, s) for g, s in zip(table.group, table.split, strict=True)}) == 24  # no group on two sides


def test_the_second_call_reads_the_cache_and_gives_the_same_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = featurize(folder, features(), [TASK], SPLITS, RT)
    (cache,) = (folder / "features").iterdir()
    assert cache.name == f"{first.sha256}.npz"
    before = cache.stat().st_mtime_ns
    assert same(first, featurize(folder, features(), [TASK], SPLITS, RT))
    assert cache.stat().st_mtime_ns == before


def test_equal_inputs_give_equal_bytes(folder: Path, prepared: Path) -> None:
    a = featurize(folder, features(), [TASK], SPLITS, RT)
    path = folder / "features" / f"{a.sha256}.npz"
    once = path.read_bytes()
    path.unlink()
    featurize(folder, features(), [TASK], SPLITS, RT)
    assert path.read_bytes() == once


@pytest.mark.parametrize("damage", ["half", "empty", "flipped", "other"])
def test_a_damaged_cache_is_noticed_and_computed_again(folder: Path, damage: str) -> None:
    first = featurize(folder, features(), [TASK], SPLITS, RT)
    path = folder / "features" / f"{first.sha256}.npz"
    whole = path.read_bytes()
    if damage == "flipped":
        spot = whole.index(first.y.tobytes()[:64]) + 8
        broken = whole[:spot] + bytes([whole[spot] ^ 1]) + whole[spot + 1 :]
    elif damage == "other":
        other = featurize(folder, features(transforms={"temperature_k": "identity"}), [TASK], SPLITS, RT)
        broken = (folder / "features" / f"{other.sha256}.npz").read_bytes()
    else:
        broken = {"half": whole[: len(whole) // 2], "empty": b""}[damage]
    path.write_bytes(broken)
    with pytest.warns(UserWarning, match="damaged or half-written"):
        again = featurize(folder, features(), [TASK], SPLITS, RT)
    assert same(first, again) and path.read_bytes() == whole


def test_the_key_depends_on_records_features_task_and_splits() -> None:
    base = cache_key("a", features(), [TASK], SPLITS)
    assert base == cache_key("a", features(), [TASK], SPLITS)
    others = {
        cache_key("b", features(), [TASK], SPLITS),
        cache_key("a", features(transforms={"temperature_k": "identity"}), [TASK], SPLITS),
        cache_key("a", features(), [TASK.model_copy(update={"unit": "siemens / meter"})], SPLITS),
        cache_key("a", features(), [TASK.model_copy(update={"transform": "identity"})], SPLITS),
        cache_key("a", features(), [TASK], Splits(seed=8)),
        cache_key("a", features(), [TASK], Splits(test_fraction=0.3)),
    }
    assert len(others) == 6 and base not in others


def test_of_several_targets_a_record_may_lack_some_and_a_bound_is_kept_with_its_side() -> None:
    alloy = record_type("alloy")
    hard = Task(name="h", record_type="alloy", target="hardness_hv", unit="")
    frame = pd.DataFrame({"hardness_hv": [100.0, np.nan]})
    assert np.array_equal(target(frame, hard, alloy, may_miss=True), [100.0, np.nan], equal_nan=True)
    with pytest.raises(FeatureError, match="row 2"):
        target(frame, hard, alloy)
    stated = pd.DataFrame({TASK.target: [1e-9, 1e-5, 1e-1], f"{TASK.target}_censored": ["left", "", "right"]})
    assert bounds(stated, TASK).tolist() == [-1, 0, 1]
    assert bounds(frame, hard).tolist() == [0, 0]


def test_a_binary_target_is_above_its_threshold_in_the_tasks_unit() -> None:
    task = Task(name="fast", record_type=RT.name, target=TASK.target, unit="millisiemens / centimeter", kind="binary",
                threshold=0.1, metric="auc")  # fmt: skip
    assert target(pd.DataFrame({TASK.target: [0.5e-4, 1e-3]}), task, RT).tolist() == [0.0, 1.0]


def test_a_target_without_logarithm_or_value_is_refused_by_row() -> None:
    with pytest.raises(FeatureError, match="row 2.*logarithm"):
        target(pd.DataFrame({TASK.target: [1.0, 0.0]}), TASK, RT)
    with pytest.raises(FeatureError, match="row 1"):
        target(pd.DataFrame({TASK.target: [np.nan, 1.0]}), TASK, RT)


def test_an_unprepared_or_foreign_folder_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(StateError):
        featurize(tmp_path, features(), [TASK], SPLITS, RT)
    with pytest.raises(StateError, match="solid_electrolyte"):
        featurize(folder, features(), [TASK], SPLITS, record_type("alloy"))


def test_damaged_records_are_not_featurized(folder: Path) -> None:
    path = folder / "records.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StateError):
        featurize(folder, features(), [TASK], SPLITS, RT)
