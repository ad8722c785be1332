"""From a site's accepted records to its feature table, cached in the site's own folder.

Knows: the records folder, the task's target and the split. Refuses to know: networks, models, other sites.

A cache file is named by everything it depends on (records, featurizers, task, splits) and carries a checksum of its
content: a half-written, damaged or foreign file is never used, it is computed again with a warning.
"""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedmat import files
from fedmat.data.contract import RecordType
from fedmat.errors import FeatureError, StateError
from fedmat.features.common import Array, numbers, row_name
from fedmat.features.registry import FeatureSet
from fedmat.features.table import FeatureTable

if TYPE_CHECKING:
    from fedmat.config import GraphSpec, Splits, Task
    from fedmat.features.graphs import Graphs

SCHEMA = "fedmat/features/2"
_COLUMNS = ("x", "y", "group", "split", "bound", "component")


def featurize(
    folder: Path, features: FeatureSet, tasks: Sequence[Task], splits: Splits, rt: RecordType, graph: GraphSpec | None = None
) -> FeatureTable:
    """Returns the feature table of the records in ``folder``, from the cache where there is one.

    Args:
        folder: a site's workspace with ``records.parquet`` and ``manifest.json``; the cache is ``features/<key>.npz``.
        features: what :func:`fedmat.features.registry.build` returned.
        tasks: give target, unit, transform and kind; with several, a record may lack some of the targets.
        splits: how groups are held out.
        rt: the record type of the records and of ``features``.
        graph: what the model's graphs are made of, where it reads graphs.

    Raises:
        StateError: there are no prepared records, or they do not match their manifest.
        FeatureError: a record cannot be featurized, or its target is outside the transform's domain.
        SiteRefused: no test or validation group remains.
    """
    manifest = files.read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("sha256"), str):
        raise StateError(f"{folder / 'manifest.json'}: states no dataset digest", fix="prepare the site again")
    if manifest.get("record_type", rt.name) != rt.name:
        raise StateError(
            f"{folder}: holds {manifest['record_type']} records, the task needs {rt.name}", fix="prepare the site for this task"
        )
    key = cache_key(str(manifest["sha256"]), features, tasks, splits, graph)
    path = folder / "features" / f"{key}.npz"
    digest = features_digest(features, graph)
    found = _read(path, key, features, digest)
    if found is not None:
        return found

    from fedmat.data.records import load_records
    from fedmat.data.splits import assign, components

    records = load_records(folder)
    table = FeatureTable(
        names=features.names,
        x=features.transform(records),
        y=np.stack([target(records, task, rt, may_miss=len(tasks) > 1) for task in tasks], axis=1),
        group=pd.factorize(records["group"], sort=True)[0].astype(np.int64),
        split=np.asarray(assign(records, splits), dtype=np.int8),
        bound=np.stack([bounds(records, task) for task in tasks], axis=1),
        component=components(records, splits),
        graphs=None if graph is None else record_graphs(records, rt, graph),
        sha256=key,
        features_sha256=digest,
    )
    files.write_atomic(path, _encode(table))
    return table


def features_digest(features: FeatureSet, graph: GraphSpec | None) -> str:
    """Returns the digest of what the columns, and the graphs, are made of; equal at all sites of a consortium."""
    if graph is None:
        return features.sha256
    from fedmat.features import graphs

    made = {"columns": features.sha256, "graphs": graphs.VERSION, "of": graph.of, "field": graph.field}
    return files.sha256(files.canonical_json(made))


def record_graphs(records: pd.DataFrame, rt: RecordType, graph: GraphSpec) -> Graphs:
    """Returns a graph per record; one without a structure has an empty graph.

    Raises:
        FeatureError: a structure or SMILES has no graph; names field and row.
    """
    from fedmat.features import graphs
    from fedmat.features.common import field_of_kind, texts

    kind = {"crystal": "structure", "molecule": "smiles"}[graph.of]
    field = field_of_kind("model.graph", {"field": graph.field} if graph.field else {}, rt, kind).name
    cells = list(texts(records, field, "model.graph"))
    try:
        return graphs.crystal_graphs(cells) if graph.of == "crystal" else graphs.molecular_graphs(cells)
    except graphs.GraphError as error:
        raise FeatureError(
            f"model.graph: field '{field}', {row_name(records, error.row)}: {error}", fix="correct or remove the record"
        ) from None


def bounds(records: pd.DataFrame, task: Task) -> NDArray[np.int8]:
    """Returns -1 where the target is an upper bound of the truth ("<1e-10"), 1 where a lower one, else 0; shape ``n``."""
    name = f"{task.target}_censored"
    if name not in records.columns:
        return np.zeros(len(records), dtype=np.int8)
    stated = records[name].to_numpy()
    sides = (stated == "right").astype(np.int8) - (stated == "left").astype(np.int8)
    return np.asarray(sides, dtype=np.int8)


def cache_key(
    dataset_sha256: str, features: FeatureSet, tasks: Sequence[Task], splits: Splits, graph: GraphSpec | None = None
) -> str:
    """Returns the digest of everything a feature table depends on."""
    return files.sha256(
        files.canonical_json(
            {
                "schema": SCHEMA,
                "dataset": dataset_sha256,
                "features": features_digest(features, graph),
                "targets": [[t.target, t.unit, t.transform, t.kind, t.threshold] for t in tasks],
                "splits": splits.model_dump(mode="json"),
            }
        )
    )


def target(records: pd.DataFrame, task: Task, rt: RecordType, *, may_miss: bool = False) -> Array:
    """Returns the target in the task's unit after its transform, shape ``n``; 0/1 for a binary task.

    Where ``may_miss``, a record that does not state it has NaN.

    Raises:
        FeatureError: a target is absent, or not positive under a logarithm; names field and row.
    """
    from fedmat.data.units import convert

    field = rt.field(task.target)
    values = numbers(records, field.name, "target", may_miss=may_miss)
    if field.unit is not None:
        values = np.asarray(convert(values, field.unit, task.unit), dtype=np.float64)
    if task.kind == "binary":
        threshold = task.threshold if task.threshold is not None else np.nan
        return (values > threshold).astype(np.float64)
    if task.transform == "identity":
        return values
    bad = ~(values > 0) & ~np.isnan(values)
    if bad.any():
        raise FeatureError(
            f"target '{field.name}' is not positive in {int(bad.sum())} record(s), first in "
            f"{row_name(records, int(np.argmax(bad)))}; it has no logarithm",
            fix="correct those records or use transform: identity",
        )
    return np.log10(values)


def _encode(table: FeatureTable) -> bytes:
    buffer = io.BytesIO()
    meta = {"schema": SCHEMA, "key": table.sha256, "features": table.features_sha256, "names": list(table.names)}
    arrays: dict[str, NDArray[Any]] = {name: getattr(table, name) for name in _COLUMNS}
    if table.graphs is not None:
        arrays |= {f"graph.{name}": array for name, array in table.graphs.arrays().items()}
    checksum = _checksum(meta, arrays)
    np.savez(buffer, meta=_bytes(json.dumps(meta)), checksum=_bytes(checksum), **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _read(path: Path, key: str, features: FeatureSet, digest: str) -> FeatureTable | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files if name not in ("meta", "checksum")}
            meta = json.loads(stored["meta"].tobytes())
            sound = stored["checksum"].tobytes().decode() == _checksum(meta, arrays) and meta["key"] == key
        if sound and tuple(meta["names"]) == features.names:
            columns = {name: arrays.pop(name) for name in _COLUMNS}
            graphs = None
            if arrays:
                from fedmat.features.graphs import Graphs

                graphs = Graphs.from_arrays({name.removeprefix("graph."): array for name, array in arrays.items()})
            return FeatureTable(features.names, **columns, graphs=graphs, sha256=key, features_sha256=digest)
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        pass
    warnings.warn(f"{path}: damaged or half-written feature cache, computing it again", stacklevel=3)
    return None


def _bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _checksum(meta: Mapping[str, object], arrays: Mapping[str, NDArray[Any]]) -> str:
    parts = [files.canonical_json(meta)]
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        parts += [f"{name}:{array.dtype.str}:{array.shape}".encode(), array.tobytes()]
    return files.sha256(b"\x1f".join(parts))
