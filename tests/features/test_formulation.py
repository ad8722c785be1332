"""Laws of liquid formulations."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat.config import ModelSpec
from fedmat.data.contract import record_type
from fedmat.errors import ConfigError, FeatureError
from fedmat.features.formulation import SOLVENT_DESCRIPTORS, FormulationFeatures, read_mixture
from fedmat.features.molecule import descriptors
from fedmat.features.solvents import SALTS, SOLVENTS, SYNONYMS
from fedmat.federation.scaling import column_sums, federated_scaler

RT = record_type("liquid_electrolyte")
PART = FormulationFeatures.of({}, RT, "conductivity_s_cm")
TABLE = np.array([(*descriptors(s.smiles), s.density_g_ml) for s in SOLVENTS.values()])
MIXTURES = st.dictionaries(st.sampled_from(sorted(SOLVENTS)), st.floats(0.01, 1.0), min_size=1, max_size=5)


def record(mixture: object, *, salt: str = "LiPF6", c: float = 1.0, unit: str = "mol/kg", basis: str = "w", t: float = 300.0):
    text = mixture if isinstance(mixture, str) else json.dumps(mixture)
    return {"salt": salt, "concentration": c, "concentration_basis": unit, "solvents": text, "solvent_basis": basis,
            "temperature_k": t}  # fmt: skip


def features(*rows: dict[str, object], part: FormulationFeatures = PART) -> np.ndarray:
    return part.transform(pd.DataFrame(list(rows)))


def value(x: np.ndarray, name: str) -> float:
    return float(x[0, PART.names.index(name)])


def test_every_tabled_solvent_and_salt_gives_finite_features() -> None:
    assert len(SOLVENTS) == 38 and len(SALTS) >= 14
    x = features(*(record({s: 1.0}) for s in SOLVENTS), *(record({"EC": 1.0}, salt=s) for s in SALTS))
    assert x.shape == (len(SOLVENTS) + len(SALTS), len(PART.names)) and np.isfinite(x).all()
    assert all(s.source and 0.5 < s.density_g_ml < 2 for s in SOLVENTS.values())
    assert all(full in SOLVENTS or full in SALTS for full in SYNONYMS.values())


def test_molar_masses_are_the_known_ones() -> None:
    known = {"EC": 88.06, "PC": 102.09, "DMC": 90.08, "TFP": 344.07, "TEOS": 208.33, "Sulfolane": 120.17, "4-Glyme": 222.28}
    for name, mass in known.items():
        assert value(features(record({name: 1.0})), "solvent.mean.MolWt") == pytest.approx(mass, abs=0.02)
    anions = {"LiPF6": 144.96, "LiTFSI": 280.15, "LiBOB": 186.85, "LiBF4": 86.80, "LiFSI": 180.12}
    for salt, mass in anions.items():
        assert value(features(record({"EC": 1.0}, salt=salt)), "anion.MolWt") == pytest.approx(mass, abs=0.02)


@settings(max_examples=30, deadline=None)
@given(MIXTURES, st.sampled_from(["w", "v", "mol"]), st.floats(0.1, 50.0))
def test_order_and_scale_of_a_mixture_do_not_matter(mixture: dict[str, float], basis: str, factor: float) -> None:
    turned = {n: f * factor for n, f in reversed(mixture.items())}
    x = features(record(mixture, basis=basis), record(turned, basis=basis))
    assert np.allclose(x[0], x[1], rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(MIXTURES, st.sampled_from(["w", "v", "mol"]))
def test_a_mixture_stays_within_the_range_of_known_molecules(mixture: dict[str, float], basis: str) -> None:
    x = features(record(mixture, basis=basis))[0]
    low, high = TABLE.min(axis=0), TABLE.max(axis=0)
    k = len(SOLVENT_DESCRIPTORS)
    for i, statistic in enumerate(("mean", "wmean", "spread", "min", "max")):
        block = x[i * k : (i + 1) * k]
        if statistic == "spread":
            assert (block >= 0).all() and (block <= (high - low) / 2 + 1e-9).all()
        else:
            assert (block >= low - 1e-9).all() and (block <= high + 1e-9).all()


def test_one_solvent_named_twice_is_one_component() -> None:
    x = features(record('{"EC": 0.25, "DMC": 0.5, "EC": 0.25}'), record({"EC": 0.5, "DMC": 0.5}),
                 record({" ec": 0.5, "DMC ": 0.5}))  # fmt: skip
    assert np.array_equal(x[0], x[1]) and np.array_equal(x[1], x[2])
    y = features(record({"GBL": 0.5, "g-Butyrolactone": 0.5}), record({"g-Butyrolactone": 1.0}))
    assert np.array_equal(y[0], y[1])


def test_two_names_of_one_salt_agree() -> None:
    x = features(record({"EC": 1}, salt="LiTFSI"), record({"EC": 1}, salt=" LiN(CF3SO2)2"))
    assert np.array_equal(x[0], x[1])


def test_weight_volume_and_mole_fractions_of_one_mixture_agree() -> None:
    masses = {n: descriptors(SOLVENTS[n].smiles)[0] for n in ("EC", "DEC")}
    weight = {"EC": 0.4, "DEC": 0.6}
    mole = {n: w / masses[n] for n, w in weight.items()}
    volume = {n: w / SOLVENTS[n].density_g_ml for n, w in weight.items()}
    x = features(record(weight, basis="w"), record(volume, basis="v"), record(mole, basis="mol"))
    assert np.allclose(x[0], x[1]) and np.allclose(x[0], x[2])


def test_amounts_agree_on_both_bases() -> None:
    x = features(record({"PC": 1.0}, c=1.0, unit="mol/kg"), record({"PC": 1.0}, c=1.20, unit="mol/l"))
    assert np.allclose(x[0], x[1])  # 1 mol/kg in a liquid of 1.20 kg/L
    assert value(x, "molality") == 1.0 and value(x, "molarity") == pytest.approx(1.20)
    assert value(x, "salt_ratio") == pytest.approx(0.10209, abs=1e-4)
    assert value(x, "1000/T") == pytest.approx(1000 / 300)


def test_permuting_rows_permutes_features() -> None:
    rows = [record({s: 0.6, "EC": 0.4}, c=i / 10, t=280.0 + i) for i, s in enumerate(list(SOLVENTS)[1:12])]
    order = np.random.default_rng(1).permutation(len(rows))
    assert np.array_equal(features(*rows)[order], features(*(rows[i] for i in order)))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"solvents": '{"canary-77": 1.0}'}, "solvents"),
        ({"solvents": "canary-77"}, "solvents"),
        ({"solvents": '{"EC": "canary-77"}'}, "solvents"),
        ({"solvents": "{}"}, "solvents"),
        ({"solvents": "[1, 2]"}, "solvents"),
        ({"solvent_basis": "canary-77"}, "solvent_basis"),
        ({"salt": "canary-77"}, "salt"),
        ({"concentration": np.nan}, "concentration"),
        ({"concentration": -0.5}, "concentration"),
        ({"concentration_basis": "canary-77"}, "concentration_basis"),
        ({"temperature_k": 0.0}, "temperature_k"),
        ({"temperature_k": np.nan}, "temperature_k"),
    ],
)
def test_an_unusable_record_is_named_by_field_and_row_never_by_value(change: dict[str, object], field: str) -> None:
    with pytest.raises(FeatureError) as caught:
        features(record({"EC": 1.0}), record({"EC": 1.0}) | change)
    assert f"'{field}'" in str(caught.value) and "row 2" in str(caught.value)
    assert "canary" not in str(caught.value)


def test_a_mixture_may_be_a_dict() -> None:
    rows = [record({"EC": 0.5, "DMC": 0.5})]
    raw = [rows[0] | {"solvents": {"DMC": 0.5, "EC": 0.5}}]
    assert np.array_equal(features(*rows), features(*raw))


def test_own_solvents_and_salts_come_by_option() -> None:
    options = {"solvents": {"Ethanol": {"smiles": "CCO", "density_g_ml": 0.79}}, "salts": {"NaPF6": "[Na+].F[P-](F)(F)(F)(F)F"}}
    part = FormulationFeatures.of(options, RT, "conductivity_s_cm")
    x = features(record({"ethanol": 1.0}, salt="NaPF6"), part=part)
    assert value(x, "solvent.mean.MolWt") == pytest.approx(46.07, abs=0.01)
    assert value(x, "cation.exact_mass") == pytest.approx(22.99, abs=0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"solvent": {}},
        {"solvents": {"A": "CCO"}},
        {"solvents": {"A": {"smiles": "CCO"}}},
        {"solvents": {"A": {"smiles": "C(", "density_g_ml": 1.0}}},
        {"solvents": {"A": {"smiles": "CCO", "density_g_ml": 790}}},
        {"salts": {"A": "CCO"}},
        {"salts": ["A"]},
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        FormulationFeatures.of(options, RT, "conductivity_s_cm")


def test_read_mixture_normalises() -> None:
    assert read_mixture('{"EC": 33.0, "DMC": 33.0, "DEC": 33.0, "PC": 0}') == pytest.approx(
        {"EC": 1 / 3, "DMC": 1 / 3, "DEC": 1 / 3}
    )


def test_a_solvent_never_seen_in_training_does_not_blow_a_prediction_up() -> None:
    """Networks trained without a solvent predict it, pure, within the training targets' range and half of it more."""
    from fedmat.config import LocalTraining, Task
    from fedmat.models.network import Architecture
    from fedmat.training import trainer

    random = np.random.default_rng(5)
    task = Task(name="t", record_type=RT.name, target="conductivity_s_cm", unit="S/cm", transform="log10")
    architecture = Architecture(ModelSpec(hidden=(64, 64)), (task,))
    seen = ["EC", "PC", "DMC", "EMC", "DEC", "DME", "EA", "MA", "FEC"]
    rows = []
    for _ in range(300):
        names = random.choice(seen, size=random.integers(1, 4), replace=False)
        mixture = dict(zip(names, random.uniform(0.1, 1, len(names)), strict=True))
        rows.append(record(mixture, c=random.uniform(0.1, 2), t=random.uniform(250, 340)))
    x = features(*rows)
    molality, inverse, size = (x[:, PART.names.index(n)] for n in ("molality", "1000/T", "solvent.mean.LabuteASA"))
    y = 1.2 + np.log10(molality) - 0.4 * molality - 0.5 * inverse - 0.02 * size  # dilution, association, activation, size
    scaler = federated_scaler([column_sums("a", x, y[:, None])], binary=False)
    weights = trainer.train(
        architecture,
        architecture.initial_weights(int(scaler.active.sum()), 3),
        architecture.inputs(scaler, PART.names, x),
        trainer.Targets.of(scaler, y[:, None], np.zeros((len(y), 1), dtype=np.int8)),
        [np.arange(len(y))],
        LocalTraining(batch_size=len(y), loss="mse"),
        rates=np.full(150, 3e-3),
        rng=np.random.default_rng(1),
    ).weights

    def predict(x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return architecture.predict(weights, scaler, PART.names, x)[:, 0]

    assert np.abs(predict(x) - y).mean() < 0.1 * (y.max() - y.min())
    unseen = [s for s in SOLVENTS if s not in seen]
    p = predict(features(*(record({s: 1.0}) for s in unseen)))
    margin = 0.5 * (y.max() - y.min())
    assert p.min() > y.min() - margin and p.max() < y.max() + margin
