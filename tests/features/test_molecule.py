"""Laws of SMILES features."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from fedmat.data.contract import record_type
from fedmat.errors import ConfigError, FeatureError
from fedmat.features.molecule import CHAIN, DESCRIPTORS, EXTENSIVE, MoleculeFeatures, descriptors

RT = record_type("polymer_electrolyte")
ROWS = pd.DataFrame({"polymer_smiles": ["[*]CCO[*]", "[*]CC([*])C#N", "[*]CCO[*]"], "salt_smiles": ["[Li+].F[B-](F)(F)F"] * 3})


def part(**options: object) -> MoleculeFeatures:
    return MoleculeFeatures.of(options, RT, "conductivity_s_cm")


def test_names_match_columns_and_equal_molecules_have_equal_features() -> None:
    chosen = part(fingerprint=0)
    x = chosen.transform(ROWS)
    assert x.shape == (3, 2 * len(DESCRIPTORS) + 1) == (3, len(chosen.names)) and np.isfinite(x).all()
    assert np.array_equal(x[0], x[2]) and not np.array_equal(x[0], x[1])


def test_how_a_smiles_is_written_does_not_matter() -> None:
    assert descriptors("OCC") == pytest.approx(descriptors("C(C)O"))


def test_fingerprint_is_deepchems() -> None:
    import deepchem

    chosen = part(fields=["polymer_smiles"], fingerprint=64)
    x = chosen.transform(ROWS)[:, len(DESCRIPTORS) :]
    assert np.array_equal(x, deepchem.feat.CircularFingerprint(size=64).featurize(list(ROWS["polymer_smiles"])))
    assert chosen.names[-1] == "polymer_smiles.ecfp63"


def test_descriptors_alone_do_not_import_deepchem() -> None:
    import subprocess
    import sys

    code = (
        "import sys, fedmat.features.registry; from fedmat.features.molecule import descriptors; descriptors('CCO');"
        "assert not {'deepchem', 'torch', 'matminer'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_counts_are_per_heavy_atom_and_a_longer_piece_of_the_same_chain_is_nearly_the_same() -> None:
    chosen = part(fields=["polymer_smiles"], fingerprint=0, counts=64)
    rows = pd.DataFrame({"polymer_smiles": [f"[*]{'CCO' * n}[*]" for n in (1, 8, 16)] + ["[*]CC([*])c1ccccc1"]})
    x = chosen.transform(rows)[:, len(DESCRIPTORS) :]
    assert x.shape == (4, 64) and chosen.names[-1] == "polymer_smiles.morgan63"
    away = [np.abs(x[1] - x[i]).sum() for i in (2, 3)]
    assert away[0] < 0.4 < 1.5 < away[1]


def test_one_repeat_unit_or_two_of_it_are_nearly_one_polymer() -> None:
    rows = pd.DataFrame({"polymer_smiles": ["[*]" + "CCO" * n + "[*]" for n in (8, 16)]})
    options = {"fields": ["polymer_smiles"], "fingerprint": 0}
    chosen, plain = part(**options, repeat_units=["polymer_smiles"]), part(**options)
    x, raw = chosen.transform(rows), plain.transform(rows)
    assert x.shape == (2, len(chosen.names)) == (2, len(DESCRIPTORS) + len(CHAIN))
    at = [chosen.names.index(f"polymer_smiles.{d}_per_atom") for d in EXTENSIVE]
    assert x[:, at] == pytest.approx(raw[:, at] / np.array([[24], [48]]))
    mass = at[EXTENSIVE.index("MolWt")]
    assert x[1, mass] == pytest.approx(x[0, mass], rel=0.01) and raw[1, mass] > 1.9 * raw[0, mass]
    others = [i for i in range(len(DESCRIPTORS)) if i not in at]
    assert np.array_equal(x[:, others], raw[:, others])


def test_what_a_chain_is_made_of_is_hand_countable() -> None:
    chosen = part(fields=["polymer_smiles"], fingerprint=0, repeat_units=["polymer_smiles"])
    rows = pd.DataFrame({"polymer_smiles": ["*CCO*", "*CC(*)C(=O)OC", "*O[Si](*)(C)C", "*CC(*)c1ccc(cc1)S(=O)(=O)[O-]"]})
    x = chosen.transform(rows)[:, len(DESCRIPTORS) :]
    named = [dict(zip(CHAIN, row, strict=True)) for row in x]
    assert named[0] | {"backbone_share": 1.0, "backbone_O": 1 / 3, "side_O_per_atom": 0.0} == named[0]
    assert (
        named[1] | {"backbone_share": 1 / 3, "backbone_O": 0.0, "side_O_per_atom": 1 / 3, "carbonyl_per_atom": 1 / 6}
        == named[1]
    )
    assert named[2] | {"backbone_share": 0.5, "backbone_SiP": 0.5, "Si_per_atom": 0.25} == named[2]
    assert named[3] | {"backbone_ring": 0.0, "anion_per_atom": 1 / 12} == named[3]
    with pytest.raises(FeatureError, match="two chain ends"):
        chosen.transform(pd.DataFrame({"polymer_smiles": ["CCO"]}))


def test_a_field_the_contract_calls_optional_may_be_absent() -> None:
    chosen = part(fingerprint=0, counts=8)
    x = chosen.transform(ROWS.assign(salt_smiles=["", "[Li+].F[B-](F)(F)F", None]))
    own = np.array([n.startswith("salt_smiles.") and n != "salt_smiles.present" for n in chosen.names])
    assert chosen.may_miss and np.isnan(x[[0, 2]][:, own]).all() and np.isfinite(x[1]).all() and np.isfinite(x[:, ~own]).all()
    assert x[:, chosen.names.index("salt_smiles.present")].tolist() == [0.0, 1.0, 0.0]
    assert not part(fields=["polymer_smiles"]).may_miss


@pytest.mark.parametrize("cell", ["", "canary(((", None])
def test_an_unusable_smiles_is_named_by_field_and_row_never_by_value(cell: object, capfd: pytest.CaptureFixture[str]) -> None:
    rows = ROWS.assign(polymer_smiles=["[*]CCO[*]", "[*]CCO[*]", cell])
    with pytest.raises(FeatureError, match=r"'polymer_smiles'.*row 3") as caught:
        part(fingerprint=0).transform(rows)
    out = capfd.readouterr()
    assert "canary" not in str(caught.value) + out.out + out.err


@pytest.mark.parametrize(
    "options",
    [
        {"size": 3},
        {"fingerprint": -1},
        {"fingerprint": True},
        {"counts": 1.5},
        {"repeat_units": ["doi"]},
        {"fields": ["doi"]},
        {"fields": []},
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        part(**options)
