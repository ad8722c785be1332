"""The table of featurizers and the set a consortium chose, which is itself a Featurizer.

Knows: names, and the two refusals that guard every model: the target is no input, and NaN appears only where a
featurizer says a record may lack it. Refuses to know: how any feature is computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version as release
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fedmat import files
from fedmat.data.contract import RecordType
from fedmat.errors import ConfigError, FeatureError
from fedmat.features.common import Array, nearest, row_name
from fedmat.features.composition import CompositionFeatures
from fedmat.features.conditions import ConditionFeatures
from fedmat.features.formulation import FormulationFeatures
from fedmat.features.molecule import MoleculeFeatures
from fedmat.features.structure import StructureFeatures
from fedmat.features.table import Featurizer

if TYPE_CHECKING:
    from fedmat.config import FeatureSpec

Maker = Callable[[Mapping[str, Any], RecordType, str], Featurizer]

FEATURIZERS: Mapping[str, Maker] = {
    "composition": CompositionFeatures.of,
    "conditions": ConditionFeatures.of,
    "formulation": FormulationFeatures.of,
    "molecule": MoleculeFeatures.of,
    "structure": StructureFeatures.of,
}


@dataclass(frozen=True)
class FeatureSet(Featurizer):
    """Several featurizers side by side.

    Attributes:
        parts: featurizers in the order of their columns.
    """

    name = "features"

    parts: tuple[Featurizer, ...]

    @cached_property
    def sha256(self) -> str:
        """Digest of every part's name, version, options, columns and the releases of the libraries behind it."""
        return files.sha256(files.canonical_json([_describe(p) for p in self.parts]))

    @property
    def version(self) -> str:  # type: ignore[override]
        """First 16 hex digits of :attr:`sha256`."""
        return self.sha256[:16]

    @property
    def citations(self) -> tuple[str, ...]:  # type: ignore[override]
        """All papers to cite, without repeats."""
        return tuple(dict.fromkeys(c for p in self.parts for c in p.citations))

    @property
    def libraries(self) -> tuple[str, ...]:  # type: ignore[override]
        """All packages whose release may change a number."""
        return tuple(sorted({lib for p in self.parts for lib in p.libraries}))

    @property
    def may_miss(self) -> bool:  # type: ignore[override]
        """True when any part may miss."""
        return any(p.may_miss for p in self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        """Column names of all parts."""
        return tuple(n for p in self.parts for n in p.names)

    @property
    def needs(self) -> tuple[str, ...]:
        """Contract fields that prediction needs."""
        return tuple(dict.fromkeys(n for p in self.parts for n in p.needs))

    def transform(self, records: pd.DataFrame) -> Array:
        """Returns features, shape ``n x p``, float64.

        Raises:
            FeatureError: a record cannot be featurized, or a value is infinite, or NaN where the featurizer does not
                declare ``may_miss``; the message names the column and row.
        """
        blocks = [self._checked(p, records) for p in self.parts]
        return np.concatenate(blocks, axis=1)

    def _checked(self, part: Featurizer, records: pd.DataFrame) -> Array:
        block = np.asarray(part.transform(records), dtype=np.float64)
        if block.shape != (len(records), len(part.names)):
            raise FeatureError(
                f"featurizer {part.name} returned shape {block.shape}, expected {(len(records), len(part.names))}",
                fix="this is a fault of the featurizer, report it",
            )
        bad = np.isinf(block) if part.may_miss else ~np.isfinite(block)
        if bad.any():
            row, col = np.argwhere(bad)[0]
            raise FeatureError(
                f"feature '{part.names[col]}' is not a finite number in {int(bad.any(axis=1).sum())} record(s), first in "
                f"{row_name(records, int(row))}",
                fix=f"supply field(s) {', '.join(part.needs)} for every record, or choose other features",
            )
        return block


def build(specs: Sequence[FeatureSpec], rt: RecordType, target: str) -> FeatureSet:
    """Returns the featurizers that consortium.yaml names, for one record type and target.

    Args:
        specs: name and options of each featurizer, in column order.
        rt: the record type the featurizers read.
        target: the contract field a model predicts.

    Raises:
        ConfigError: unknown featurizer or option (with the nearest valid one), a field the record type lacks, the target
            among the inputs, or two featurizers giving the same column.
    """
    rt.field(target)
    parts = []
    for spec in specs:
        if spec.name not in FEATURIZERS:
            raise ConfigError(f"features: there is no featurizer '{spec.name}'", fix=nearest(spec.name, FEATURIZERS))
        part = FEATURIZERS[spec.name](spec.options, rt, target)
        for need in part.needs:
            rt.field(need)
        if target in part.needs:
            raise ConfigError(
                f"features: {spec.name} reads '{target}', which is the target (the model would be told the answer)",
                fix=f"remove '{target}' from the options of {spec.name}",
            )
        parts.append(part)
    if not parts:
        raise ConfigError("features: no featurizer is named", fix=nearest("", FEATURIZERS))
    chosen = FeatureSet(tuple(parts))
    names = chosen.names
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ConfigError(f"features: column '{twice[0]}' comes from two featurizers", fix="remove one of the two")
    return chosen


def _describe(part: Featurizer) -> dict[str, Any]:
    options: dict[str, Any] = dataclasses.asdict(part) if dataclasses.is_dataclass(part) and not isinstance(part, type) else {}
    return {
        "name": part.name,
        "version": part.version,
        "options": options,
        "names": list(part.names),
        "libraries": {lib: release(lib) for lib in part.libraries},
    }
