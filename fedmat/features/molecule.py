"""Features of a molecule or repeat unit given as SMILES: RDKit descriptors and a circular fingerprint.

Knows: SMILES, through RDKit, and ECFP, through deepchem. Refuses to know: mixtures (``formulation``) and conditions.

Columns per SMILES field (``<field>.`` prefix): the 20 descriptors of :data:`DESCRIPTORS`, then ``ecfp<i>``: the folded
circular fingerprint [Rogers2010]_ as deepchem's ``CircularFingerprint`` computes it [Ramsundar2019]_, then ``morgan<i>``: how
often the environments that fall into fold ``i`` occur, per heavy atom, so that a long repeat unit and a short one of the same
make are alike. The descriptors are chosen to be finite for ions and main-group hypervalent atoms, which partial-charge
descriptors are not.

For the fields in ``repeat_units``, whose two chain ends are written ``*``, descriptors that grow with the molecule
(:data:`EXTENSIVE`) are divided by its heavy atoms and called ``<descriptor>_per_atom``: one repeat unit or ten of it are one
polymer. Further columns (:data:`CHAIN`) say what the chain is made of: the share of heavy atoms in the backbone (the shortest
way from end to end); the shares of O, of Si and P, and of ring atoms in the backbone; oxygen beside it; ethers, carbonyls,
anions, Si, P and B, all per heavy atom.

A field that the contract calls optional may be absent ("" for a polymer without added salt): its columns are then NaN, and
a first column ``present`` is 0.

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
EXTENSIVE = (
    "MolWt", "MolLogP", "MolMR", "TPSA", "LabuteASA", "NumRotatableBonds", "RingCount", "NumHAcceptors", "HallKierAlpha", "Chi0v",
    "Chi1v", "BertzCT",
)  # fmt: skip
CHAIN = (
    "backbone_share", "backbone_O", "backbone_SiP", "backbone_ring", "side_O_per_atom", "ether_per_atom", "carbonyl_per_atom",
    "anion_per_atom", "Si_per_atom", "P_per_atom", "B_per_atom",
)  # fmt: skip
_ETHER, _CARBONYL = "[#6;X4][OX2;!R][#6;X4]", "C=O"
ELEMENT_SHARES = ("O", "N", "F", "S")  # heavy atoms of the element per heavy atom
DESCRIPTORS = (*RDKIT_DESCRIPTORS, *(f"share_{e}" for e in ELEMENT_SHARES), "share_aromatic")


@dataclass(frozen=True)
class MoleculeFeatures(Featurizer):
    """Descriptors, fingerprint and environment counts of one or more SMILES fields.

    Attributes:
        fields: the SMILES fields.
        fingerprint: bits of the folded fingerprint; 0 leaves it (and deepchem's import) out.
        radius: bonds around each atom that fingerprint and counts see.
        counts: folds of the environment counts per heavy atom; 0 leaves them out.
        repeat_units: those of ``fields`` that are repeat units of polymers.
        optional: those of ``fields`` that a record may lack.
    """

    name = "molecule"
    version = "2"
    citations = (
        "RDKit: Open-source cheminformatics, https://www.rdkit.org",
        "Rogers and Hahn, J. Chem. Inf. Model. 50, 742 (2010), doi:10.1021/ci100050t",
        "Ramsundar et al., Deep Learning for the Life Sciences, O'Reilly 2019 (deepchem)",
    )
    libraries = ("rdkit", "deepchem")

    fields: tuple[str, ...]
    fingerprint: int = 256
    radius: int = 2
    counts: int = 0
    repeat_units: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    @classmethod
    def of(cls, options: Mapping[str, Any], rt: RecordType, target: str) -> MoleculeFeatures:
        """Returns the featurizer for ``fields`` (default: every SMILES field), ``fingerprint``, ``radius``, ``counts``
        and ``repeat_units``.

        Raises:
            ConfigError: an unknown option, or a field that holds no SMILES.
        """
        check_options(cls.name, options, ("fields", "fingerprint", "radius", "counts", "repeat_units"))
        fields = text_list(cls.name, options, "fields", [f.name for f in rt.fields if f.kind == "smiles"])
        for field in fields:
            if rt.field(field).kind != "smiles":
                raise ConfigError(
                    f"features: molecule cannot read '{field}', a {rt.field(field).kind}", fix="name SMILES fields"
                )
        if not fields:
            raise ConfigError(f"features: molecule needs a SMILES field and {rt.name} has none", fix="remove the featurizer")
        units = text_list(cls.name, options, "repeat_units", ())
        if set(units) - set(fields):
            raise ConfigError(
                "features: option 'repeat_units' of molecule names a field that it does not read", fix="name it in fields"
            )
        return cls(
            fields,
            whole_number(cls.name, options, "fingerprint", 256, 0, 4096),
            whole_number(cls.name, options, "radius", 2, 0, 6),
            whole_number(cls.name, options, "counts", 0, 0, 4096),
            units,
            tuple(f for f in fields if not rt.field(f).required),
        )

    @property
    def may_miss(self) -> bool:  # type: ignore[override]
        """True when a field is optional in the contract."""
        return bool(self.optional)

    @property
    def names(self) -> tuple[str, ...]:
        """Column names, see the module's description."""
        bits = (*(f"ecfp{i}" for i in range(self.fingerprint)), *(f"morgan{i}" for i in range(self.counts)))
        out: list[str] = []
        for field in self.fields:
            own = (f"{d}_per_atom" if field in self.repeat_units and d in EXTENSIVE else d for d in DESCRIPTORS)
            chain = CHAIN if field in self.repeat_units else ()
            out += [f"{field}.{n}" for n in (*(("present",) if field in self.optional else ()), *own, *chain, *bits)]
        return tuple(out)

    @property
    def needs(self) -> tuple[str, ...]:
        """The SMILES fields."""
        return self.fields

    def transform(self, records: pd.DataFrame) -> Array:
        """Returns features, shape ``n x len(names)``; every distinct SMILES is computed once.

        Raises:
            FeatureError: a required SMILES is absent or RDKit cannot read one; names field and row.
        """
        blocks = []
        for field in self.fields:
            made = _Recipe(self.fingerprint, self.radius, self.counts, field in self.repeat_units, field in self.optional)
            cells = [texts(records, field, self.name)]
            blocks.append(per_distinct(records, cells, made.width, made.numbers, f"molecule: field '{field}'"))
        return np.concatenate(blocks, axis=1)


@dataclass(frozen=True)
class _Recipe:
    """What becomes of one SMILES of one field."""

    fingerprint: int
    radius: int
    counts: int
    repeat_unit: bool
    optional: bool

    @property
    def width(self) -> int:
        return len(DESCRIPTORS) + len(CHAIN) * self.repeat_unit + self.fingerprint + self.counts + self.optional

    def numbers(self, smiles: str) -> Array:
        if self.optional and not smiles.strip():
            return np.concatenate([[0.0], np.full(self.width - 1, np.nan)])
        values = np.asarray(descriptors(smiles), dtype=np.float64)
        if self.repeat_unit:
            values[[DESCRIPTORS.index(d) for d in EXTENSIVE]] /= _heavy(smiles)
            values = np.concatenate([values, _chain(smiles)])
        parts = [np.ones(1 if self.optional else 0), values]
        if self.fingerprint:
            parts.append(_fingerprint(smiles, self.fingerprint, self.radius))
        if self.counts:
            parts.append(_counts(smiles, self.counts, self.radius))
        return np.concatenate(parts)


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


def _counts(smiles: str, size: int, radius: int) -> Array:
    from rdkit.Chem import rdFingerprintGenerator

    made = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=size)
    per_atom: Array = np.asarray(made.GetCountFingerprintAsNumPy(molecule(smiles)), dtype=np.float64) / _heavy(smiles)
    return per_atom


def _chain(smiles: str) -> list[float]:
    """Returns the values of :data:`CHAIN` of a repeat unit.

    Raises:
        ValueError: it has not exactly two chain ends.
    """
    from rdkit import Chem

    mol = molecule(smiles)
    ends = [atom.GetIdx() for atom in mol.GetAtoms() if atom.GetAtomicNum() == 0]
    if len(ends) != 2:
        raise ValueError("a repeat unit needs two chain ends, written * (see chain_ends in site.yaml)")
    way = Chem.GetShortestPath(mol, *ends)[1:-1]
    backbone, atoms, heavy = [mol.GetAtomWithIdx(i) for i in way], list(mol.GetAtoms()), _heavy(smiles)
    long = max(1, len(way))
    return [
        len(way) / heavy,
        sum(a.GetSymbol() == "O" for a in backbone) / long,
        sum(a.GetSymbol() in ("Si", "P") for a in backbone) / long,
        sum(a.IsInRing() for a in backbone) / long,
        sum(a.GetSymbol() == "O" and a.GetIdx() not in way for a in atoms) / heavy,
        *(len(mol.GetSubstructMatches(Chem.MolFromSmarts(s))) / heavy for s in (_ETHER, _CARBONYL)),
        sum(a.GetFormalCharge() < 0 for a in atoms) / heavy,
        *(sum(a.GetSymbol() == e for a in atoms) / heavy for e in ("Si", "P", "B")),
    ]


def _heavy(smiles: str) -> float:
    """Returns the number of heavy atoms, at least 1; a chain end ``*`` is no atom."""
    return max(1.0, float(sum(a.GetAtomicNum() > 1 for a in molecule(smiles).GetAtoms())))


def _fingerprint(smiles: str, size: int, radius: int) -> Array:
    import deepchem  # 6.6 s and 534 MB: only here

    bits = deepchem.feat.CircularFingerprint(size=size, radius=radius).featurize([molecule(smiles)])
    if np.shape(bits) != (1, size):  # deepchem logs a failure and returns an empty array
        raise ValueError("deepchem cannot compute a fingerprint of the SMILES")
    return np.asarray(bits[0], dtype=np.float64)
