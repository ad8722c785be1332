"""Laws of formula features."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat.data.contract import record_type
from fedmat.errors import ConfigError, FeatureError
from fedmat.features.composition import PROPERTIES, STATISTICS, CompositionFeatures, atomic_fractions

RT = record_type("solid_electrolyte")
TARGET = "conductivity_s_cm"
FORMULAS = ["Li7La3Zr2O12", "Li6PS5Cl", "Li1.3Al0.3Ti1.7(PO4)3", "Li3YCl6", "Li2O", "Li", "Fe0.6Cr0.2Ni0.2"]


def features(formulas: list[str], **options: object) -> np.ndarray:
    part = CompositionFeatures.of(options, RT, TARGET)
    return part.transform(pd.DataFrame({"formula": formulas}))


def value(formula: str, name: str, **options: object) -> float:
    part = CompositionFeatures.of(options, RT, TARGET)
    return float(part.transform(pd.DataFrame({"formula": [formula]}))[0, part.names.index(f"formula.{name}")])


def test_magpie_columns_are_matminers_in_matminers_order() -> None:
    from matminer.featurizers.composition import ElementProperty
    from pymatgen.core import Composition

    magpie = ElementProperty.from_preset("magpie", impute_nan=False)
    labels = [f"MagpieData {s} {p}" for p in PROPERTIES for s in STATISTICS]
    assert magpie.feature_labels() == labels
    got = features(FORMULAS)[:, : len(labels)]
    assert np.allclose(got, [magpie.featurize(Composition(f)) for f in FORMULAS], rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["Li", "La", "Zr", "O", "S", "P", "Cl", "Ti", "F"]), st.integers(1, 9), min_size=1),
    st.integers(2, 6),
    st.randoms(use_true_random=False),
)
def test_scale_and_element_order_of_a_formula_do_not_matter(amounts: dict[str, int], factor: int, random) -> None:
    pairs = list(amounts.items())
    once = "".join(f"{e}{n}" for e, n in pairs)
    random.shuffle(pairs)
    scaled = "".join(f"{e}{n * factor}" for e, n in pairs)
    x = features([once, scaled])
    assert np.array_equal(x[0], x[1])


def test_extras_of_a_hand_computable_formula() -> None:
    assert value("Li2O", "fraction_Li") == pytest.approx(2 / 3)
    assert value("Li2O", "fraction_O") == pytest.approx(1 / 3)
    assert value("Li2O", "anion_fraction") == pytest.approx(1 / 3)
    assert value("Li2O", "li_per_anion") == pytest.approx(2.0)
    assert value("Li2O", "electronegativity_gap") == pytest.approx(3.44 - 0.98)
    assert value("Li2O", "framework_mass") == pytest.approx(15.999, abs=0.01)
    assert value("Li2O", "n_elements") == 2
    assert value("LiCl", "mixing_entropy") == pytest.approx(np.log(2))


def test_without_anions_or_framework_the_extras_are_zero_not_missing() -> None:
    for name in ("anion_fraction", "li_per_anion", "electronegativity_gap"):
        assert value("FeNi", name) == 0.0
    assert value("Li", "framework_mass") == 0.0


def test_permuting_rows_permutes_features() -> None:
    order = np.random.default_rng(0).permutation(len(FORMULAS))
    assert np.array_equal(features(FORMULAS)[order], features([FORMULAS[i] for i in order]))


def test_names_match_columns_and_further_elements_add_columns() -> None:
    part = CompositionFeatures.of({"elements": ["La", "Zr"]}, RT, TARGET)
    assert part.transform(pd.DataFrame({"formula": ["Li7La3Zr2O12"]})).shape == (1, len(part.names))
    assert value("Li7La3Zr2O12", "fraction_La", elements=["La", "Zr"]) == pytest.approx(3 / 24)


def test_deuterium_counts_as_hydrogen() -> None:
    assert atomic_fractions("D2O") == atomic_fractions("H2O")


@pytest.mark.parametrize("formula", ["", "Li2(", "NotAFormula", "Xx2O", "Nh2O3"])
def test_an_unusable_formula_is_named_by_field_and_row_never_by_value(formula: str) -> None:
    with pytest.raises(FeatureError) as caught:
        features(["Li2O", "LiCl", formula])
    message = str(caught.value)
    assert "'formula'" in message and "row 3" in message
    assert not formula or formula not in message
    assert caught.value.__cause__ is None


def test_no_nan_for_an_element_magpie_lacks() -> None:
    with pytest.raises(FeatureError, match="Magpie has no data"):
        features(["HeF2"])


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'elements'"):
        CompositionFeatures.of({"element": ["La"]}, RT, TARGET)
    with pytest.raises(ConfigError, match="no element"):
        CompositionFeatures.of({"elements": ["Foo"]}, RT, TARGET)


def test_a_record_type_without_formula_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a formula field"):
        CompositionFeatures.of({}, record_type("liquid_electrolyte"), TARGET)
