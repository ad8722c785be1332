"""Intervals that keep their promise: calibrated at the sites, merged by the coordinator, served with every prediction."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small
from consortium import SITES, config, coordinator, handlers, run, table

from fedmat import baselines, pipeline, serving, wire
from fedmat.assurance import uncertainty
from fedmat.data.records import load_records
from fedmat.domain import Calibration, GlobalModel, SiteModel
from fedmat.features.table import TEST, FeatureTable
from fedmat.federation.engine import InProcessEngine
from fedmat.federation.evaluation import metrics
from fedmat.federation.plan import Plan
from fedmat.federation.site import PERSONAL, state_folder

ROWS = 600
LEVEL = 0.9


def binomial(n: int, level: float = LEVEL, z: float = 4.0) -> float:
    return z * (level * (1 - level) / n) ** 0.5


def intervals(folder: Path) -> dict[str, object]:
    return json.loads((folder / "run/intervals.json").read_text())


def single(site: str) -> FeatureTable:
    """Many rows, each a material of its own: rows are exchangeable within a site."""
    one = table(site, rows=ROWS)
    return dataclasses.replace(one, component=np.arange(ROWS), group=np.arange(ROWS))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("calibrated")
    settings, data = config(ensemble=3, rounds=8), {s: single(s) for s in SITES}
    _, model = run(settings, folder, data=data)
    return folder, settings, data, model


# --- in the rounds ---------------------------------------------------------------------------------------------------


def test_the_finished_model_carries_the_intervals_in_the_runs_folder(calibrated) -> None:  # type: ignore[no-untyped-def]
    folder, settings, _, model = calibrated
    found = intervals(folder)
    assert wire.plain(model.spec["interval"]) == found
    assert found["level"] == settings.plan.interval_level == LEVEL
    assert set(found["sites"]) == set(SITES) and all(w > 0 for w in found["sites"].values())
    assert found["units"] == {s: pytest.approx(0.8 * ROWS) for s in SITES}, "every row not in the test is a unit"
    assert min(found["sites"].values()) <= found["half_width"] <= max(found["sites"].values())


def test_every_site_is_covered_about_as_often_as_promised(calibrated) -> None:  # type: ignore[no-untyped-def]
    folder, settings, data, model = calibrated
    radius = intervals(folder)["sites"]
    engine = InProcessEngine(handlers(settings, folder, data=data))
    arm = baselines.Arm("federated", model.weights, model.scaler)
    found = baselines.score(engine, Plan.of(settings), arm, SITES, radius=radius)
    n = int((data["ash"].split == TEST).sum())
    for e in found:
        assert e.sums[0] == n and e.coverage[3] == radius[e.site]
        assert LEVEL - binomial(n) <= e.coverage[0] / n <= 1.0, e.site
    share = metrics(found, "regression")["interval"]["covered"]
    assert LEVEL - binomial(4 * n) <= share <= LEVEL + binomial(4 * n)


def test_calibrating_again_gives_the_same_bytes_and_a_finished_run_asks_nobody(calibrated, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder, settings, data, model = calibrated
    before = (folder / "run/intervals.json").read_bytes()
    asked: list[bytes] = []

    def heard(handle):  # type: ignore[no-untyped-def]
        return lambda request: (asked.append(request), handle(request))[1]

    engine = InProcessEngine(handlers(settings, folder, dict.fromkeys(SITES, heard), data))
    assert list(coordinator(settings, folder).run(engine)) == []
    assert not any(b"CalibrateRequest" in a for a in asked)
    (folder / "run/intervals.json").unlink()  # as if killed after the last round
    assert list(coordinator(settings, folder).run(engine)) == []
    assert (folder / "run/intervals.json").read_bytes() == before
    assert any(b"CalibrateRequest" in a for a in asked)
    assert wire.encode(coordinator(settings, folder).model()) == wire.encode(model)


def _calibration(change):  # type: ignore[no-untyped-def]
    def wrap(handle):  # type: ignore[no-untyped-def]
        def handler(data: bytes) -> bytes:
            reply = handle(data)
            return wire.encode(change(wire.decode(reply, Calibration))) if b"CalibrateRequest" in data else reply

        return handler

    return wrap


def _crashes(handle):  # type: ignore[no-untyped-def]
    def handler(data: bytes) -> bytes:
        if b"CalibrateRequest" in data:
            raise ValueError("4711.0815")
        return handle(data)

    return handler


@pytest.fixture(scope="module")
def without_ash(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("without")
    run(config(ensemble=2, rounds=1), folder, {"ash": _crashes})
    return intervals(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: dataclasses.replace(c, sketch=-c.sketch),
        lambda c: dataclasses.replace(c, sketch=c.sketch * 100.0),
        lambda c: dataclasses.replace(c, sketch=c.sketch[:-1]),
        lambda c: dataclasses.replace(c, sketch=np.full_like(c.sketch, np.nan)),
        lambda c: dataclasses.replace(c, site="birch"),
    ],
    ids=["negative", "more counts than rows", "a bin less", "NaN", "another's name"],
)
def test_a_site_that_sends_a_bad_sketch_is_left_out_and_the_others_are_calibrated(change, without_ash, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run(config(ensemble=2, rounds=1), tmp_path, {"ash": _calibration(change)})
    assert intervals(tmp_path) == without_ash
    assert set(without_ash["sites"]) == set(SITES[1:])
    assert without_ash["half_width"] > 0


def test_too_little_evidence_is_no_interval_rather_than_a_narrow_one(tmp_path: Path) -> None:
    """Two sites of four validation groups each give eight units; nine are needed for 90 %."""
    settings = config(SITES[:2], rounds=1)
    _, model = run(settings, tmp_path)
    found = intervals(tmp_path)
    assert found["units"] == pytest.approx(dict.fromkeys(SITES[:2], 4.0))
    assert found["half_width"] is None and set(found["sites"].values()) == {None}
    assert wire.decode(wire.encode(model), GlobalModel).spec["interval"]["half_width"] is None
    three = run(config(SITES[:3], rounds=1), tmp_path / "three")[1]
    assert three.spec["interval"]["half_width"] > 0


def test_nobodys_answer_is_no_interval(tmp_path: Path) -> None:
    run(config(rounds=1), tmp_path, dict.fromkeys(SITES, _crashes))
    found = intervals(tmp_path)
    assert found["half_width"] is None and found["sites"] == {}
    assert "4711" not in json.dumps(found)


def test_a_probability_has_no_interval(tmp_path: Path) -> None:
    task = {
        "name": "hard", "record_type": "alloy", "target": "hardness_hv", "unit": "", "kind": "binary", "threshold": 2.0,
        "metric": "auc",
    }  # fmt: skip
    run(config(SITES[:2], task=task, rounds=1), tmp_path)
    assert intervals(tmp_path) == {"level": LEVEL, "half_width": None, "sites": {}}


def test_a_sketch_says_how_many_and_how_large_and_nothing_else(calibrated) -> None:  # type: ignore[no-untyped-def]
    folder, settings, data, model = calibrated
    from fedmat.domain import CalibrateRequest

    request = wire.encode(CalibrateRequest(Plan.of(settings).sha256, model.weights, model.scaler))
    got = wire.decode(handlers(settings, folder, data=data)["ash"](request), Calibration)
    assert {f.name for f in dataclasses.fields(got)} == {"site", "sketch"}
    assert got.sketch.shape == (uncertainty.BINS,)


# --- from raw records ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> pipeline.Run:
    folder = tmp_path_factory.mktemp("served")
    run_ = pipeline.open_run(small.build(folder / "c", rows=360, rounds=6, ensemble=2), home=folder / "home")
    for site in run_.sites:
        pipeline.prepare_site(run_, site)
    list(pipeline.train(run_))
    pipeline.baselines(run_)
    return run_


def held_out(run_: pipeline.Run, site: str) -> pd.DataFrame:
    records = load_records(run_.site_folder(site))
    return records[pipeline.site_table(run_, site).split == TEST]


def inside(answer: pd.DataFrame, records: pd.DataFrame) -> np.ndarray:
    truth = records["hardness_hv"].to_numpy(dtype=float)
    return (answer["low"].to_numpy() <= truth) & (truth <= answer["high"].to_numpy())


def test_served_intervals_hold_about_the_promised_share_of_new_materials(served: pipeline.Run) -> None:
    model = wire.load_model(served.folder / "model.safetensors")
    hit = []
    for site in served.sites:
        records = held_out(served, site)
        answer = serving.predict(model, records)
        assert (answer["low"] < answer["prediction"]).all() and (answer["prediction"] < answer["high"]).all()
        hit.append(inside(answer, records))
    share, materials = np.concatenate(hit).mean(), len(np.concatenate(hit)) / 2  # two temperatures of one material
    assert LEVEL - binomial(materials) <= share <= min(1.0, LEVEL + binomial(materials))


def test_a_sites_personal_model_is_served_with_intervals_of_its_own(served: pipeline.Run) -> None:
    model = wire.load_model(served.folder / "model.safetensors")
    hit = []
    for site in served.sites:
        path = state_folder(served.site_folder(site), served.plan()) / PERSONAL
        personal = wire.decode(path.read_bytes(), SiteModel)
        assert sum(p.share for p in personal.parts) == pytest.approx(1.0)
        records = held_out(served, site)
        answer = serving.predict(personal, records)
        assert list(answer.columns) == list(serving.predict(model, records).columns)
        hit.append(inside(answer, records))
    share, materials = np.concatenate(hit).mean(), len(np.concatenate(hit)) / 2
    assert LEVEL - binomial(materials) <= share <= min(1.0, LEVEL + binomial(materials))


def test_a_model_without_evidence_for_an_interval_says_so_in_every_row(served: pipeline.Run) -> None:
    model = wire.load_model(served.folder / "model.safetensors")
    bare = dataclasses.replace(model, spec={**model.spec, "interval": {"level": LEVEL, "half_width": None, "sites": {}}})
    answer = serving.predict(bare, held_out(served, "mill"))
    assert answer["low"].isna().all() and answer["high"].isna().all() and answer["prediction"].notna().all()
