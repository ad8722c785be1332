"""Features of a molecule or repeat unit given as SMILES: RDKit descriptors and a circular fingerprint.

Knows: SMILES, through RDKit, and ECFP, through deepchem. Refuses to know: mixtures (``formulation``) and conditions.

Columns per SMILES field (``<field>.`` prefix): the 20 descriptors of :data:`DESCRIPTORS`, then ``ecfp<i>``: the folded
circular fingerprint [Rogers2010]_ as deepchem's ``CircularFingerprint`` computes it [Ramsundar2019]_. The descriptors are
chosen to be finite for ions and main-group hypervalent atoms, which partial-charge descriptors are not.

References:
    RDKit: G. Landrum et al., "RDKit: open-source cheminformatics", https://www.rdkit.org.
    Rogers2010: D. Rogers, M. Hahn, "Extended-connectivity fingerprints", J. Chem. Inf. Model. 50, 742 (2010),
    doi:10.1021/ci100050t.
    Ramsundar2019: B. Ramsundar et al., "Deep Learning for the Life Sciences", O'Reilly, 2019 (deepchem).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fedmat.data.contract import RecordType
from fedmat.errors import ConfigError
from fedmat.features.common import Array, check_options, per_distinct, text_list, texts, whole_number
from fedmat.features.table import Featurizer

RDKIT_DESCRIPTORS = (
    "MolWt", "MolLogP", "MolMR", "TPSA", "LabuteASA", "FractionCSP3", "NumRotatableBonds", "RingCount", "NumHAcceptors",
    "HallKierAlpha", "Chi0v", "Chi1v", "BertzCT", "MaxEStateIndex", "MinEStateIndex",
)  # fmt: skip
ELEMENT_SHARES = ("O", "N", "F", "S")  # heavy atoms of the element per heavy atom
DESCRIPTORS = (*RDKIT_DESCRIPTORS, *(f"share_{e}" for e in ELEMENT_SHARES), "share_aromatic")


@dataclass(frozen=True)
class MoleculeFeatures(Featurizer):
    """Descriptors and fingerprint of one or more SMILES fields.

    Attributes:
        fields: the SMILES fields.
        fingerprint: bits of the folded fingerprint; 0 leaves it (and deepchem's import) out.
        radius: bonds around each atom that the fingerprint sees.
    """

    name = "molecule"
    version = "1"
    citations = (
        "RDKit: Open-source cheminformatics, https://www.rdkit.org",
        "Rogers and Hahn, J. Chem. Inf. Model. 50, 742 (2010), doi:10.1021/ci100050t",
        "Ramsundar et al., Deep Learning for the Life Sciences, O'Reilly 2019 (deepchem)",
    )
    libraries = ("rdkit", "deepchem")

    fields: tuple[str, ...]
    fingerprint: int = 256
    radius: int = 2

    @classmethod
    def of(cls, options: Mapping[str, Any], rt: RecordType, target: str) -> MoleculeFeatures:
        """Returns the featurizer for ``fields`` (default: every SMILES field), ``fingerprint`` and ``radius``.

        Raises:
            ConfigError: an unknown option, or a field that holds no SMILES.
        """
        check_options(cls.name, options, ("fields", "fingerprint", "radius"))
        fields = text_list(cls.name, options, "fields", [f.name for f in rt.fields if f.kind == "smiles"])
        for field in fields:
            if rt.field(field).kind != "smiles":
                raise ConfigError(
                    f"features: molecule cannot read '{field}', a {rt.field(field).kind}", fix="name SMILES fields"
                )
        if not fields:
            raise ConfigError(f"features: molecule needs a SMILES field and {rt.name} has none", fix="remove the featurizer")
        return cls(
            fields,
            whole_number(cls.name, options, "fingerprint", 256, 0, 4096),
            whole_number(cls.name, options, "radius", 2, 0, 6),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Column names, see the module's description."""
        own = (*DESCRIPTORS, *(f"ecfp{i}" for i in range(self.fingerprint)))
        return tuple(f"{f}.{n}" for f in self.fields for n in own)

    @property
    def needs(self) -> tuple[str, ...]:
        """The SMILES fields."""
        return self.fields

    def transform(self, records: pd.DataFrame) -> Array:
        """Returns features, shape ``n x len(names)``; every distinct SMILES is computed once.

        Raises:
            FeatureError: a SMILES is absent or RDKit cannot read it; names field and row.
        """
        width = len(DESCRIPTORS) + self.fingerprint
        blocks = [
            per_distinct(records, [texts(records, f, self.name)], width, self._one, f"molecule: field '{f}'")
            for f in self.fields
        ]
        return np.concatenate(blocks, axis=1)

    def _one(self, smiles: str) -> Array:
        values = np.asarray(descriptors(smiles), dtype=np.float64)
        return np.concatenate([values, _fingerprint(smiles, self.fingerprint, self.radius)]) if self.fingerprint else values


def molecule(smiles: str) -> Any:
    """Returns the RDKit molecule.

    Raises:
        ValueError: empty or unreadable; the message does not repeat the text.
    """
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():  # RDKit would print the cell
        mol = Chem.MolFromSmiles(smiles.strip())
    if mol is None or mol.GetNumHeavyAtoms() == 0:
        raise ValueError("RDKit cannot read the SMILES")
    return mol


def descriptors(smiles: str) -> list[float]:
    """Returns the values of :data:`DESCRIPTORS` (g/mol for MolWt, square angstrom for TPSA and LabuteASA, else pure numbers).

    Raises:
        ValueError: the SMILES is unreadable or a descriptor is undefined for it.
    """
    from rdkit.Chem import Descriptors

    mol = molecule(smiles)
    heavy = [a for a in mol.GetAtoms() if a.GetAtomicNum() != 1]
    values = [float(getattr(Descriptors, name)(mol)) for name in RDKIT_DESCRIPTORS]
    values += [sum(a.GetSymbol() == e for a in heavy) / len(heavy) for e in ELEMENT_SHARES]
    values.append(sum(a.GetIsAromatic() for a in heavy) / len(heavy))
    if not all(map(math.isfinite, values)):
        raise ValueError("a descriptor is undefined for the molecule")
    return values


def _fingerprint(smiles: str, size: int, radius: int) -> Array:
    import deepchem  # 6.6 s and 534 MB: only here

    bits = deepchem.feat.CircularFingerprint(size=size, radius=radius).featurize([molecule(smiles)])
    if np.shape(bits) != (1, size):  # deepchem logs a failure and returns an empty array
        raise ValueError("deepchem cannot compute a fingerprint of the SMILES")
    return np.asarray(bits[0], dtype=np.float64)
