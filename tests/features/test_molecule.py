"""Laws of SMILES features."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from fedmat.data.contract import record_type
from fedmat.errors import ConfigError, FeatureError
from fedmat.features.molecule import DESCRIPTORS, MoleculeFeatures, descriptors

RT = record_type("polymer_electrolyte")
ROWS = pd.DataFrame({"polymer_smiles": ["[*]CCO[*]", "[*]CC([*])C#N", "[*]CCO[*]"], "salt_smiles": ["[Li+].F[B-](F)(F)F"] * 3})


def part(**options: object) -> MoleculeFeatures:
    return MoleculeFeatures.of(options, RT, "conductivity_s_cm")


def test_names_match_columns_and_equal_molecules_have_equal_features() -> None:
    chosen = part(fingerprint=0)
    x = chosen.transform(ROWS)
    assert x.shape == (3, 2 * len(DESCRIPTORS)) == (3, len(chosen.names)) and np.isfinite(x).all()
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


@pytest.mark.parametrize("cell", ["", "canary(((", None])
def test_an_unusable_smiles_is_named_by_field_and_row_never_by_value(cell: object, capfd: pytest.CaptureFixture[str]) -> None:
    rows = ROWS.assign(polymer_smiles=["[*]CCO[*]", "[*]CCO[*]", cell])
    with pytest.raises(FeatureError, match=r"'polymer_smiles'.*row 3") as caught:
        part(fingerprint=0).transform(rows)
    out = capfd.readouterr()
    assert "canary" not in str(caught.value) + out.out + out.err


@pytest.mark.parametrize(
    "options", [{"size": 3}, {"fingerprint": -1}, {"fingerprint": True}, {"fields": ["doi"]}, {"fields": []}]
)
def test_a_wrong_option_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        part(**options)
