"""Predictions from raw records: contract fields in, the task's property in its own unit out.

Knows: how a finished global model reads a record (contract check, features, network, inverse transform) and whether a
record lies inside the range the model was trained on. Refuses to know: registries, sites, training, record values in
messages.

References:
    Tropsha, "Best Practices for QSAR Model Development, Validation, and Exploitation", Mol. Inf. 29, 2010 (a prediction
    is given together with its applicability domain).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmat import wire
from fedmat.config import FeatureSpec, ModelSpec, Task
from fedmat.data.contract import RecordType, record_type
from fedmat.domain import Array, GlobalModel, Scaler
from fedmat.errors import DataError, StateError

if TYPE_CHECKING:
    import pandas as pd

    from fedmat.features.registry import FeatureSet

SCHEMA = "fedmat/model/1"


@dataclass(frozen=True)
class Predictor:
    """A global model made ready to answer: its features are built once and used for every batch."""

    model: GlobalModel
    task: Task
    network: ModelSpec
    records: RecordType
    features: FeatureSet

    @classmethod
    def of(cls, model: GlobalModel) -> Predictor:
        """Returns the predictor of ``model``.

        Raises:
            StateError: the model is of another schema, or the installed featurizers are not the ones it was trained on.
        """
        from fedmat.features import registry

        spec: dict[str, Any] = wire.plain(model.spec)
        if spec.get("schema") != SCHEMA:
            raise StateError(
                f"the model says schema {spec.get('schema')!r}, this fedmat reads {SCHEMA!r}",
                fix="install the fedmat version that made the model",
            )
        task = Task.model_validate(spec["task"])
        records = record_type(str(spec["record_type"]))
        wanted = [FeatureSpec.model_validate(f) for f in spec["features"]]
        features = registry.build(wanted, records, task.target)
        if features.sha256 != spec["features_sha256"]:
            raise StateError(
                f"the model was trained on features {str(spec['features_sha256'])[:12]}, the installed featurizers give "
                f"{features.sha256[:12]}",
                fix="install fedmat and the libraries in the releases that made the model (requirements.txt of the registered one)",
            )
        fields = tuple(dataclasses.replace(f, measured=f.measured or f.name == task.target) for f in records.fields)
        unasked = dataclasses.replace(records, fields=fields)  # whatever a model predicts, nobody has to supply it
        return cls(model, task, ModelSpec.model_validate(spec["model"]), unasked, features)

    def predict(self, records: pd.DataFrame) -> pd.DataFrame:
        """Returns predictions for raw records; see :func:`predict`."""
        import pandas as pd

        from fedmat.data.validation import coerce
        from fedmat.models import mlp

        if not len(records):
            return pd.DataFrame({"prediction": pd.Series(dtype=float), "in_domain": pd.Series(dtype=bool)}, index=records.index)
        clean = coerce(_asked_fields(records, self.records, self.task.target), self.records, need_target=None)
        x = self.features.transform(clean)
        output = mlp.predict(self.network, self.model.weights, self.model.scaler, x, self.task.kind)
        inside = share_inside(self.model.scaler, x)
        return pd.DataFrame({"prediction": in_unit(output, self.task), "in_domain": inside == 1.0}, index=records.index)


def predict(model: GlobalModel, records: pd.DataFrame) -> pd.DataFrame:
    """Returns predictions from raw records.

    Args:
        records: one row per record, one column per contract field in the contract's unit (formula, SMILES, mixture as
            JSON text or dict, conditions). Optional fields may be absent; the target, if present, is not looked at.

    Returns:
        ``prediction`` in ``task.unit`` (a probability for a binary task) and ``in_domain``: whether every feature of the
        record lies inside the range the network was trained on; outside it the network sees the edge of that range
        instead, and the prediction is an extrapolation. Index as in ``records``.

    Raises:
        DataError: a field is missing or a row is wrong; row numbers (1-based) and fields are named, values never.
        StateError: the model needs other featurizers than those installed.
    """
    return Predictor.of(model).predict(records)


def share_inside(scaler: Scaler, x: Array) -> NDArray[np.float64]:
    """Returns, per row of ``x`` (shape ``n x p``), the share of active features within ``+-clip`` standard deviations.

    A missing value (NaN) says nothing about the range and counts as inside; inactive features are not looked at.
    """
    keep = scaler.active > 0
    with np.errstate(invalid="ignore", over="ignore"):
        outside = np.abs((x[:, keep] - scaler.mean[keep]) / scaler.scale[keep]) > scaler.clip
    return np.asarray(1.0 - outside.sum(axis=1) / max(1, int(keep.sum())), dtype=np.float64)


def in_unit(output: Array, task: Task) -> Array:
    """Returns the network's answer (transformed target) in ``task.unit``; a probability stays what it is."""
    if task.kind == "binary" or task.transform == "identity":
        return output
    with np.errstate(over="ignore"):
        return np.asarray(np.power(10.0, output), dtype=np.float64)  # inverse of log10


def _asked_fields(records: pd.DataFrame, rt: RecordType, target: str) -> pd.DataFrame:
    """Returns the contract's columns without the target, mixtures as text; refuses a misspelt column."""
    fields = {f.name: f for f in rt.fields if f.name != target}
    absent = [name for name in fields if name not in records.columns]
    for column in map(str, records.columns):
        near = difflib.get_close_matches(column, absent, n=1, cutoff=0.75)
        if column not in fields and column != target and near:
            raise DataError(
                f"column '{column}' is not a field of {rt.name} records; did you mean '{near[0]}'?",
                fix=f"rename the column; the fields are {', '.join(fields)}",
            )
    out = records.loc[:, [c for c in records.columns if c in fields]].reset_index(drop=True)
    for name, field in fields.items():
        if field.kind == "mixture" and name in out.columns:
            out[name] = _as_text(list(out[name]), name)
    return out


def _as_text(cells: list[object], name: str) -> list[object]:
    wrong: list[int] = []
    out: list[object] = []
    for row, cell in enumerate(cells, start=1):
        if isinstance(cell, Mapping):
            try:
                cell = json.dumps({str(k): float(v) for k, v in cell.items()}, sort_keys=True, allow_nan=False)
            except (TypeError, ValueError):
                wrong.append(row)
        out.append(cell)
    if wrong:
        raise DataError(
            f"field '{name}', row {', '.join(map(str, wrong))}: not a mixture", fix='give {"component": fraction, ...}'
        )
    return out
