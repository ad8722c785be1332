"""Serving: raw records in, the property in its own unit out, and a plain answer for bad records."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedmat import registry as models
from fedmat import serving, wire
from fedmat.config import FeatureSpec, Task
from fedmat.data.contract import record_type
from fedmat.data.example import example
from fedmat.data.validation import coerce
from fedmat.domain import GlobalModel, Scaler
from fedmat.errors import ConfigError, DataError, StateError
from fedmat.features import registry

CANARY = "Canary7Xq"
RECORDS = pd.DataFrame(
    {"formula": ["Li7La3Zr2O12", "Li6PS5Cl", "Na3Zr2Si2PO12"], "temperature_k": [300.0, 330.0, 298.15]},
    index=["first", "second", "third"],
)


def _fitted(model: GlobalModel, specs: list[FeatureSpec], records: pd.DataFrame) -> tuple[GlobalModel, np.ndarray]:
    """``model`` with the standardisation of ``records``, and their features."""
    rt = record_type(str(model.spec["record_type"]))
    x = registry.build(specs, rt, "conductivity_s_cm").transform(coerce(records, rt))
    scale = x.std(axis=0)
    active = scale > 1e-9
    scaler = Scaler(
        np.where(active, x.mean(axis=0), 0.0),
        np.where(active, scale, 1.0),
        active.astype(float),
        np.array([-5.0]),
        np.array([2.0]),
    )
    return dataclasses.replace(model, scaler=scaler), x


@pytest.fixture(scope="module")
def specs() -> list[FeatureSpec]:
    return [FeatureSpec.model_validate({"name": f} if isinstance(f, str) else f) for f in runs.FEATURES]


@pytest.fixture(scope="module")
def features(specs: list[FeatureSpec]) -> registry.FeatureSet:
    return registry.build(specs, record_type("solid_electrolyte"), "conductivity_s_cm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, features: registry.FeatureSet) -> Path:
    """A finished run whose model reads the real features."""
    return runs.build(tmp_path_factory.mktemp("served"), features=(features.names, features.sha256))


@pytest.fixture(scope="module")
def model(folder: Path, specs: list[FeatureSpec]) -> GlobalModel:
    """The run's model, standardised on many formulas and temperatures, as training data would."""
    loaded = wire.load_model(folder / "model.safetensors")
    many = pd.DataFrame(
        [
            {"formula": f, "temperature_k": t}
            for f in (*RECORDS["formula"], "LiCoO2", "Li3PO4", "NaAlO2", "LiI")
            for t in (250.0, 300.0, 400.0)
        ]
    )
    wide = _fitted(loaded, specs, many)[0]
    p = int(wide.scaler.active.sum())
    first = wide.weights["hidden.0.weight"]
    weights = wide.weights | {"hidden.0.weight": np.resize(first, (1, p, first.shape[2]))}
    return dataclasses.replace(wide, weights=weights)


def test_predictions_are_in_the_tasks_unit_and_keep_the_index(model: GlobalModel, specs: list[FeatureSpec]) -> None:
    from fedmat.config import ModelSpec, Task
    from fedmat.models.network import Architecture

    answer = serving.predict(model, RECORDS)
    assert list(answer.columns) == ["prediction", "low", "high", "spread", "in_domain"]
    assert list(answer.index) == list(RECORDS.index)
    x = _fitted(model, specs, RECORDS)[1]
    spec = wire.plain(model.spec)
    architecture = Architecture(ModelSpec.model_validate(spec["model"]), (Task.model_validate(spec["task"]),))
    output = architecture.forward(model.weights, architecture.inputs(model.scaler, spec["feature_names"], x))[0, :, 0]
    assert answer["prediction"].to_numpy() == pytest.approx(10 ** (output * 2.0 - 5.0), rel=1e-5)
    assert answer["in_domain"].dtype == bool and answer["in_domain"].all()


def test_the_order_and_company_of_rows_do_not_matter(model: GlobalModel) -> None:
    together = serving.predict(model, RECORDS)
    backwards = serving.predict(model, RECORDS.iloc[::-1])
    alone = pd.concat([serving.predict(model, RECORDS.iloc[[i]]) for i in range(3)])
    pd.testing.assert_frame_equal(backwards.loc[RECORDS.index], together)
    pd.testing.assert_frame_equal(alone, together)


def test_whole_numbers_and_numbers_as_text_are_numbers(model: GlobalModel) -> None:
    first = serving.predict(model, pd.DataFrame({"formula": ["LiI"], "temperature_k": [300.0]}))
    for cell in (300, "300"):
        pd.testing.assert_frame_equal(
            serving.predict(model, pd.DataFrame({"formula": ["LiI"], "temperature_k": [cell]})), first
        )


def test_no_records_give_no_predictions(model: GlobalModel) -> None:
    answer = serving.predict(model, RECORDS.iloc[:0])
    assert answer.empty and list(answer.columns) == list(serving.predict(model, RECORDS).columns)


def test_a_measured_target_does_not_change_the_answer(model: GlobalModel) -> None:
    known = RECORDS.assign(conductivity_s_cm=["n/a", 1e-3, np.nan], source_row=[1, 2, 3])
    pd.testing.assert_frame_equal(serving.predict(model, known), serving.predict(model, RECORDS))


def test_records_far_from_the_training_data_are_out_of_domain(model: GlobalModel) -> None:
    answer = serving.predict(model, pd.DataFrame({"formula": ["LiI", "LiI"], "temperature_k": [300.0, 5.0]}))
    assert list(answer["in_domain"]) == [True, False] and np.isfinite(answer["prediction"]).all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"formula": ["LiI", CANARY, "LiI"]}, ["formula", "2"]),
        ({"temperature_k": [300.0, 300.0, -4987.6]}, ["temperature_k", "3"]),
        ({"temperature_k": [300.0, CANARY, CANARY]}, ["temperature_k", "2, 3"]),
        ({"formula": ["", "LiI", None]}, ["formula", "1, 3"]),
    ],
)
def test_a_bad_row_is_named_by_number_and_field_never_by_value(
    model: GlobalModel, change: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        serving.predict(model, RECORDS.assign(**change))
    text = str(caught.value)
    assert all(n in text for n in named)
    assert CANARY not in text and "4987" not in text
    assert caught.value.__cause__ is None or CANARY not in repr(caught.value.__cause__)


def test_a_missing_field_and_a_misspelt_one_are_named(model: GlobalModel) -> None:
    with pytest.raises(DataError, match="temperature_k"):
        serving.predict(model, RECORDS[["formula"]])
    with pytest.raises(DataError, match="did you mean 'temperature_k'"):
        serving.predict(model, RECORDS.rename(columns={"temperature_k": "temperature_K"}))
    with pytest.raises(DataError, match="did you mean 'structure'"):
        serving.predict(model, RECORDS.assign(structur=""))


def test_a_mixture_may_be_a_mapping_or_its_text() -> None:
    rt = record_type("liquid_electrolyte")
    as_text = pd.DataFrame([example(rt, "conductivity_s_cm")])
    as_mapping = as_text.assign(solvents=[{"EC": 0.375, "DMC": 0.625}])
    asked = [coerce(serving._asked_fields(f, rt, "conductivity_s_cm"), rt) for f in (as_text, as_mapping)]
    pd.testing.assert_frame_equal(*asked)
    with pytest.raises(DataError, match="row 1: not a mixture"):
        serving._asked_fields(as_text.assign(solvents=[{"EC": CANARY}]), rt, "conductivity_s_cm")


def test_other_featurizers_than_the_models_are_refused(model: GlobalModel) -> None:
    with pytest.raises(StateError, match="trained on features 000000000000"):
        serving.predict(dataclasses.replace(model, spec={**model.spec, "features_sha256": "0" * 64}), RECORDS)
    with pytest.raises(StateError, match="schema"):
        serving.predict(dataclasses.replace(model, spec={**model.spec, "schema": "fedmat/model/9"}), RECORDS)
    with pytest.raises(ConfigError):
        serving.predict(dataclasses.replace(model, spec={**model.spec, "record_type": "cheese"}), RECORDS)


@given(arrays(np.float64, (7, 4), elements=st.floats(-1e6, 1e6) | st.just(np.nan)), st.floats(0.1, 10.0))
@settings(max_examples=60, deadline=None)
def test_a_record_is_inside_exactly_when_clipping_changes_nothing(x: np.ndarray, scale: float) -> None:
    scaler = Scaler(np.zeros(4), np.full(4, scale), np.array([1.0, 1.0, 0.0, 1.0]), np.zeros(1), np.ones(1))
    inside = serving.share_inside(scaler, x)
    loose = dataclasses.replace(scaler, clip=np.inf)
    same = (scaler.features(x) == loose.features(x)).all(axis=1)
    clear = (np.abs(np.nan_to_num(x) / scale - np.sign(np.nan_to_num(x)) * 5.0) > 1e-3).all(axis=1)  # not at the very edge
    assert ((inside == 1.0) == same)[clear].all() and (inside >= 0).all() and (inside <= 1).all()


def test_the_inverse_transform_undoes_the_task() -> None:
    task = Task.model_validate(runs.CONDUCTIVITY)
    assert serving.in_unit(np.array([-3.0, 0.0]), task) == pytest.approx([1e-3, 1.0])
    probability = np.array([0.2, 0.9])
    assert serving.in_unit(probability, Task.model_validate(runs.SUPERIONIC)) is probability


@pytest.mark.slow
def test_a_registered_model_predicts_in_a_plain_process(folder: Path, project: Path, tmp_path: Path) -> None:
    """Loads by alias, in another folder, with nothing but MLflow's own API, and no pickle in what was stored."""
    store = f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    done = models.register(folder, tracking_uri=store)
    script = """
import json, sys
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
rows = pd.DataFrame({"formula": ["Li7La3Zr2O12", "LiI"], "temperature_k": [300, 350]})
answer = model.predict(rows)
example = model.predict(model.input_example)
schema = {c["name"]: (c["type"], c["required"]) for c in model.metadata.get_input_schema().to_dict()}
refused = []
for change in ({"formula": ["Canary7Xq", "LiI"]}, {"temperature_k": [300, "Canary7Xq"]}):
    try:
        model.predict(rows.assign(**change))
    except Exception as error:
        refused.append(str(error))
loaded = sorted(m for m in sys.modules if m.startswith("fedmat.federation"))
print(json.dumps([answer["prediction"].tolist(), answer["in_domain"].tolist(), len(example), schema, refused, loaded]))
"""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": store, "PYTHONPATH": str(project)}
    ran = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:mlflow", "-c", script, f"models:/{done.name}@champion"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    values, inside, examples, schema, refused, loaded = json.loads(ran.stdout.splitlines()[-1])
    here = serving.predict(
        wire.load_model(folder / "model.safetensors"),
        pd.DataFrame({"formula": ["Li7La3Zr2O12", "LiI"], "temperature_k": [300.0, 350.0]}),
    )
    assert values == here["prediction"].tolist() and inside == here["in_domain"].tolist() and examples == 1
    assert schema == {
        "formula": ["string", True],
        "temperature_k": ["any", True],  # MLflow would refuse whole numbers, and print them
        "family": ["string", False],
        "structure": ["string", False],
        "doi": ["string", False],
    }
    assert "field 'formula', row 1" in refused[0] and "field 'temperature_k', row 2" in refused[1]
    assert CANARY not in "".join(refused)
    assert loaded == []
    stored = [p.name for p in (tmp_path / "mlruns" / "artifacts").rglob("*") if p.is_file()]
    assert "model.safetensors" in stored and "mlflow_model.py" in stored
    assert not [n for n in stored if n.endswith((".pkl", ".pickle", ".pt", ".joblib"))]
