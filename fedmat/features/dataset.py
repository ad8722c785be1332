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
from collections.abc import Mapping
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
    from fedmat.config import Splits, Task

SCHEMA = "fedmat/features/1"


def featurize(folder: Path, features: FeatureSet, task: Task, splits: Splits, rt: RecordType) -> FeatureTable:
    """Returns the feature table of the records in ``folder``, from the cache where there is one.

    Args:
        folder: a site's workspace with ``records.parquet`` and ``manifest.json``; the cache is ``features/<key>.npz``.
        features: what :func:`fedmat.features.registry.build` returned.
        task: gives target, unit, transform and kind.
        splits: how groups are held out.
        rt: the record type of the records and of ``features``.

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
    key = cache_key(str(manifest["sha256"]), features, task, splits)
    path = folder / "features" / f"{key}.npz"
    found = _read(path, key, features)
    if found is not None:
        return found

    from fedmat.data.records import load_records
    from fedmat.data.splits import assign

    records = load_records(folder)
    table = FeatureTable(
        names=features.names,
        x=features.transform(records),
        y=target(records, task, rt),
        group=pd.factorize(records["group"], sort=True)[0].astype(np.int64),
        split=np.asarray(assign(records, splits), dtype=np.int8),
        sha256=key,
        features_sha256=features.sha256,
    )
    files.write_atomic(path, _encode(table))
    return table


def cache_key(dataset_sha256: str, features: FeatureSet, task: Task, splits: Splits) -> str:
    """Returns the digest of everything a feature table depends on."""
    return files.sha256(
        files.canonical_json(
            {
                "schema": SCHEMA,
                "dataset": dataset_sha256,
                "features": features.sha256,
                "target": [task.target, task.unit, task.transform, task.kind, task.threshold],
                "splits": splits.model_dump(mode="json"),
            }
        )
    )


def target(records: pd.DataFrame, task: Task, rt: RecordType) -> Array:
    """Returns the target in the task's unit after its transform, shape ``n``; 0/1 for a binary task.

    Raises:
        FeatureError: a target is absent, or not positive under a logarithm; names field and row.
    """
    from fedmat.data.units import convert

    field = rt.field(task.target)
    values = numbers(records, field.name, "target")
    if field.unit is not None:
        values = np.asarray(convert(values, field.unit, task.unit), dtype=np.float64)
    if task.kind == "binary":
        threshold = task.threshold if task.threshold is not None else np.nan
        return (values > threshold).astype(np.float64)
    if task.transform == "identity":
        return values
    bad = ~(values > 0)
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
    arrays: dict[str, NDArray[Any]] = {"x": table.x, "y": table.y, "group": table.group, "split": table.split}
    checksum = _checksum(meta, arrays)
    np.savez(buffer, meta=_bytes(json.dumps(meta)), checksum=_bytes(checksum), **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _read(path: Path, key: str, features: FeatureSet) -> FeatureTable | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in ("x", "y", "group", "split")}
            meta = json.loads(stored["meta"].tobytes())
            sound = stored["checksum"].tobytes().decode() == _checksum(meta, arrays) and meta["key"] == key
        if sound and tuple(meta["names"]) == features.names:
            return FeatureTable(features.names, **arrays, sha256=key, features_sha256=features.sha256)
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
