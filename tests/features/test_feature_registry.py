"""Laws of a set of featurizers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from fedmat.config import FeatureSpec
from fedmat.data.contract import record_type
from fedmat.errors import ConfigError, FeatureError
from fedmat.features.registry import FEATURIZERS, FeatureSet, build
from fedmat.features.table import Featurizer

RT = record_type("solid_electrolyte")
TARGET = "conductivity_s_cm"


def named(*specs: tuple[str, dict[str, object]], target: str = TARGET) -> FeatureSet:
    return build([FeatureSpec(name=n, options=o) for n, o in specs], RT, target)


def test_columns_are_the_parts_side_by_side() -> None:
    both = named(("composition", {}), ("conditions", {}), ("structure", {}))
    rows = pd.DataFrame({"formula": ["Li2O", "LiCl"], "temperature_k": [300.0, 400.0], "structure": ["", ""]})
    x = both.transform(rows)
    assert x.shape == (2, len(both.names)) and x.dtype == np.float64
    assert x[:, both.names.index("1000/temperature_k")] == pytest.approx([1000 / 300, 2.5])
    assert both.needs == ("formula", "temperature_k", "structure") and both.may_miss
    assert len(both.citations) == len(set(both.citations)) >= 3


def test_digest_depends_on_options_order_and_releases_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = named(("composition", {}), ("conditions", {}))
    assert plain.sha256 == named(("composition", {}), ("conditions", {})).sha256
    others = [
        named(("conditions", {}), ("composition", {})),
        named(("composition", {"elements": ["La"]}), ("conditions", {})),
        named(("composition", {}), ("conditions", {"transforms": {"temperature_k": "identity"}})),
        named(("composition", {})),
    ]
    digests = {plain.sha256, *(o.sha256 for o in others)}
    assert len(digests) == 5 and len({plain.version, *(o.version for o in others)}) == 5
    monkeypatch.setattr("fedmat.features.registry.release", lambda name: "another")
    assert named(("composition", {}), ("conditions", {})).sha256 not in digests


def test_options_of_every_featurizer_enter_the_digest() -> None:
    liquid = record_type("liquid_electrolyte")
    more = FeatureSpec(name="formulation", options={"salts": {"NaPF6": "[Na+].F[P-](F)(F)(F)(F)F"}})
    assert build([FeatureSpec(name="formulation")], liquid, TARGET).sha256 != build([more], liquid, TARGET).sha256
    polymer = record_type("polymer_electrolyte")
    sizes = [build([FeatureSpec(name="molecule", options={"radius": r})], polymer, TARGET).sha256 for r in (1, 2)]
    assert sizes[0] != sizes[1]


def test_the_target_is_no_input() -> None:
    with pytest.raises(ConfigError, match="is the target"):
        named(("conditions", {"fields": ["temperature_k", TARGET]}))
    with pytest.raises(ConfigError, match="is the target"):
        build([FeatureSpec(name="formulation")], record_type("liquid_electrolyte"), "temperature_k")


def test_an_unknown_featurizer_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'composition'"):
        named(("compostion", {}))


def test_an_unknown_target_or_missing_field_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no field"):
        named(("composition", {}), target="sigma")
    with pytest.raises(ConfigError, match="has no field"):
        named(("formulation", {}))


def test_one_column_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="two featurizers"):
        named(("conditions", {}), ("conditions", {}))


class Holed(Featurizer):
    """Returns one hole."""

    name = "holed"
    version = "1"

    def __init__(self, hole: float, may_miss: bool) -> None:
        self.hole, self.may_miss = hole, may_miss

    names = ("a", "b")  # type: ignore[assignment]
    needs = ("formula",)  # type: ignore[assignment]

    def transform(self, records: pd.DataFrame) -> np.ndarray:
        x = np.zeros((len(records), 2))
        x[1, 1] = self.hole
        return x


ROWS = pd.DataFrame({"formula": ["Li", "Li"], "source": ["lab", "lab"], "source_row": [4, 9]})


@pytest.mark.parametrize(("hole", "may_miss"), [(np.nan, False), (np.inf, False), (np.inf, True)])
def test_what_is_not_finite_is_refused_naming_column_and_source_row(hole: float, may_miss: bool) -> None:
    with pytest.raises(FeatureError, match=r"'b'.*row 9 of source 'lab'"):
        FeatureSet((Holed(hole, may_miss),)).transform(ROWS)


def test_nan_is_kept_where_a_featurizer_may_miss() -> None:
    assert np.isnan(FeatureSet((Holed(np.nan, True),)).transform(ROWS)[1, 1])


def test_no_rows_give_no_rows() -> None:
    both = named(("composition", {}), ("conditions", {}))
    empty = pd.DataFrame({"formula": pd.Series(dtype=str), "temperature_k": pd.Series(dtype=float)})
    assert both.transform(empty).shape == (0, len(both.names))


def test_every_featurizer_reads_the_record_type_it_is_for() -> None:
    made: dict[str, str | None] = dict.fromkeys(FEATURIZERS)
    for kind in ("solid_electrolyte", "liquid_electrolyte", "polymer_electrolyte"):
        rt = record_type(kind)
        for name in FEATURIZERS:
            try:
                part = build([FeatureSpec(name=name)], rt, TARGET)
            except ConfigError:
                continue
            made[name] = part.version
            assert len(part.names) == len(set(part.names)) and part.needs
    assert all(made.values())
