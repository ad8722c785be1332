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
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmat import wire
from fedmat.config import FeatureSpec, ModelSpec, Task
from fedmat.data.contract import RecordType, record_type
from fedmat.domain import Array, GlobalModel, Network, Scaler, SiteModel
from fedmat.errors import DataError, StateError

if TYPE_CHECKING:
    import pandas as pd

    from fedmat.features.registry import FeatureSet
    from fedmat.models.network import Architecture

SCHEMA = "fedmat/model/2"


@dataclass(frozen=True)
class Predictor:
    """A model made ready to answer: its features are built once and used for every batch.

    Attributes:
        parts: the networks whose mean, by share, is the prediction; one for a global model.
        half_width: of the prediction interval, in the transformed target's unit; NaN where it is not evidenced.
    """

    parts: tuple[Network, ...]
    architecture: Architecture
    records: RecordType
    features: FeatureSet
    half_width: float

    @classmethod
    def of(cls, model: GlobalModel | SiteModel) -> Predictor:
        """Returns the predictor of ``model``.

        Raises:
            StateError: the model is of another schema, or the installed featurizers are not the ones it was trained on.
        """
        from fedmat.features import dataset, registry
        from fedmat.models.network import Architecture

        spec: dict[str, Any] = wire.plain(model.spec)
        if spec.get("schema") != SCHEMA:
            raise StateError(
                f"the model says schema {spec.get('schema')!r}, this fedmat reads {SCHEMA!r}",
                fix="install the fedmat version that made the model",
            )
        tasks = tuple(Task.model_validate(t) for t in (spec["task"], *spec["auxiliary"]))
        network = ModelSpec.model_validate(spec["model"])
        records = record_type(str(spec["record_type"]))
        wanted = [FeatureSpec.model_validate(f) for f in spec["features"]]
        features = registry.build(wanted, records, tasks[0].target)
        digest = dataset.features_digest(features, network.graph)
        if digest != spec["features_sha256"]:
            raise StateError(
                f"the model was trained on features {str(spec['features_sha256'])[:12]}, the installed featurizers give "
                f"{digest[:12]}",
                fix="install fedmat and the libraries in the releases that made the model (requirements.txt of the registered one)",
            )
        targets = {t.target for t in tasks}
        fields = tuple(dataclasses.replace(f, measured=f.measured or f.name in targets) for f in records.fields)
        unasked = dataclasses.replace(records, fields=fields)  # whatever a model predicts, nobody has to supply it
        if isinstance(model, GlobalModel):
            parts: tuple[Network, ...] = (Network("federated", 1.0, model.weights, model.scaler),)
        else:
            parts = model.parts
        width = dict(spec.get("interval") or {}).get("half_width")
        return cls(
            parts,
            Architecture(network, tasks, int(spec["ensemble"]), tuple(spec["private"])),
            unasked,
            features,
            math.nan if width is None else float(width),
        )

    def predict(self, records: pd.DataFrame) -> pd.DataFrame:
        """Returns predictions for raw records; see :func:`predict`."""
        import pandas as pd

        from fedmat.data.validation import coerce
        from fedmat.features import dataset

        tasks = self.architecture.tasks
        columns = ("prediction", "low", "high", "spread", *(t.target for t in tasks[1:]))
        if not len(records):
            empty = {name: pd.Series(dtype=float) for name in columns}
            return pd.DataFrame(empty | {"in_domain": pd.Series(dtype=bool)}, index=records.index)
        clean = coerce(_asked_fields(records, self.records, tasks[0].target), self.records, need_target=None)
        x = self.features.transform(clean)
        graph = self.architecture.spec.graph
        graphs = None if graph is None else dataset.record_graphs(clean, self.records, graph)
        answers, inside = [], np.ones(len(records), dtype=bool)
        for part in self.parts:
            read = self.architecture.inputs(part.scaler, self.features.names, x, graphs)
            answers.append(self.architecture.restore(part.scaler, self.architecture.forward(part.weights, read)))
            inside &= share_inside(part.scaler, x) == 1.0
        mean = np.sum([p.share * a.mean(axis=0) for p, a in zip(self.parts, answers, strict=True)], axis=0)
        members = np.concatenate([a[:, :, 0] for a in answers])  # every network's own opinion
        out = {
            "prediction": in_unit(mean[:, 0], tasks[0]),
            "low": in_unit(mean[:, 0] - self.half_width, tasks[0]),
            "high": in_unit(mean[:, 0] + self.half_width, tasks[0]),
            "spread": members.std(axis=0, ddof=1) if len(members) > 1 else np.full(len(records), np.nan),
            **{t.target: in_unit(mean[:, at], t) for at, t in enumerate(tasks[1:], start=1)},
            "in_domain": inside,
        }
        return pd.DataFrame(out, index=records.index)


def predict(model: GlobalModel | SiteModel, records: pd.DataFrame) -> pd.DataFrame:
    """Returns predictions from raw records.

    Args:
        records: one row per record, one column per contract field in the contract's unit (formula, SMILES, mixture as
            JSON text or dict, conditions). Optional fields may be absent; the target, if present, is not looked at.

    Returns:
        ``prediction`` in ``task.unit`` (a probability for a binary task); ``low`` and ``high``, the ends of its conformal
        interval (NaN where the sites' errors were too few to evidence one); ``spread``, the standard deviation over the
        ensemble in the transformed target's unit, to rank predictions by (NaN for a single network); a column per auxiliary
        target; and ``in_domain``: whether every feature of the record lies inside the range the network was trained on;
        outside it the network sees the edge of that range instead, and the prediction is an extrapolation. Index as in
        ``records``.

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
