"""Canonical bytes of every message: one safetensors blob with a canonical JSON header, never pickle.

Knows: how a dataclass of ``fedmat.domain`` becomes bytes and back, and the digest of those bytes. Equal messages give
equal bytes. Whatever does not decode into exactly the declared types is a WireError.
Refuses to know: who sends what to whom.

References:
    RFC 8785, JSON Canonicalization Scheme. safetensors format, Hugging Face.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from fedmat import domain, envelopes, files
from fedmat.errors import StateError, WireError
from fedmat.weights import Weights

_HEADER = "fedmat"
_TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        domain.Attestation, domain.AttestRequest, domain.StatisticsRequest, domain.Statistics, domain.Scaler, domain.RanksRequest, domain.Ranks,
        domain.TrainRequest, domain.Update, domain.BaselineRequest, domain.Baseline, domain.EvaluateRequest,
        domain.MatchRequest, domain.Offer, domain.RemoveRequest, domain.Removal, domain.Removed,
        domain.Evaluation, domain.CalibrateRequest, domain.Calibration, domain.MomentsRequest, domain.StatementsRequest, domain.Statements, domain.Network, domain.SiteModel, domain.GlobalModel, domain.Dropout, domain.Rejection, domain.Checkpoint,
        domain.Step, domain.NeedModel, domain.ReferenceRequest, domain.Sealed, domain.Prepared, domain.Answered,
        *(k for k in vars(envelopes).values() if dataclasses.is_dataclass(k) and isinstance(k, type)),
    )
}  # fmt: skip
M = TypeVar("M")


def encode(message: Any) -> bytes:
    """Returns the canonical bytes of a message of ``fedmat.domain``."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    header = _pack(message, "", tensors)
    text = files.canonical_json(header).decode()
    return bytes(save_tensors(tensors, metadata={_HEADER: text}))


def decode(data: bytes, kind: type[M]) -> M:
    """Returns the message in ``data``, which must be exactly a ``kind`` (or one of its members, for a union).

    Raises:
        WireError: the bytes are damaged, of another type, or hold a field of a wrong type, name or shape.
    """
    try:
        tensors = load_tensors(data)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_HEADER])
        message = _unpack(header, tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WireError(f"a message does not decode ({type(error).__name__})", fix="compare fedmat versions") from None
    if not _fits(message, kind):
        wanted = getattr(kind, "__name__", str(kind))
        raise WireError(f"expected a {wanted}, found {type(message).__name__} or one with a wrong field")
    return typing.cast(M, message)


def kind_of(data: bytes) -> str:
    """Returns the name of the message type in ``data`` without unpacking it.

    Raises:
        WireError: the bytes are no message.
    """
    return _header_of(data)[0]


def _header_of(data: bytes) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Returns kind, fields and tensors of a message, the tensors' bytes unread; errors as :func:`kind_of`."""
    try:
        tensors = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        header = json.loads(tensors.pop("__metadata__")[_HEADER])
        kind, fields = header["!"], header["f"]
    except (ValueError, KeyError, TypeError):
        raise WireError("the bytes are no message", fix="compare fedmat versions") from None
    if kind not in _TYPES:
        raise WireError("a message of an unknown kind", fix="compare fedmat versions")
    return str(kind), fields, tensors


def outline(data: bytes) -> dict[str, Any]:
    """Returns what can be told of a message without its content: kind, round (-1: none), tensors, numbers in them.

    Raises:
        WireError: the bytes are no message.
    """
    kind, fields, tensors = _header_of(data)
    number = fields.get("round", (fields.get("header") or {}).get("f", {}).get("round"))  # an encrypted round's: in its header
    shapes = [t["shape"] for t in tensors.values()]
    return {
        "kind": kind,
        "round": number if isinstance(number, int) else -1,
        "tensors": len(shapes),
        "numbers": sum(math.prod(s) for s in shapes),
    }


def digest(message: Any) -> str:
    """Returns the SHA-256 of a message's canonical bytes."""
    return files.sha256(encode(message))


def weights_digest(weights: Weights, scaler: domain.Scaler) -> str:
    """Returns the digest of a model's numbers alone, without what is said about them."""
    return digest(domain.GlobalModel(weights, scaler, {}))


def save_model(model: domain.GlobalModel, path: Path) -> str:
    """Writes a model atomically and returns its SHA-256."""
    data = encode(model)
    files.write_atomic(path, data)
    return files.sha256(data)


def load_model(path: Path) -> domain.GlobalModel:
    """Reads a model.

    Raises:
        StateError: the file is missing or damaged.
    """
    return _load(path, domain.GlobalModel)


def _load(path: Path, kind: type[M]) -> M:
    try:
        return decode(path.read_bytes(), kind)
    except FileNotFoundError:
        raise StateError(f"{path}: no such model file", fix="train first, or name another run") from None
    except WireError as error:
        raise StateError(f"{path}: not a fedmat model: {error.what}", fix="restore the file or train again") from None


def load_site_model(path: Path) -> domain.SiteModel:
    """Reads a site's own model; errors as in :func:`load_model`."""
    return _load(path, domain.SiteModel)


def plain(value: Any) -> Any:
    """Returns ``value`` as JSON-ready data for people: arrays as lists, non-finite numbers as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _pack(value: Any, path: str, tensors: dict[str, np.ndarray[Any, Any]]) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        body = {f.name: _pack(getattr(value, f.name), f"{path}/{f.name}", tensors) for f in dataclasses.fields(value)}
        return {"!": type(value).__name__, "f": body}
    if isinstance(value, np.ndarray):
        tensors[path] = np.ascontiguousarray(value)
        return {"@": path}
    if isinstance(value, dict):
        return {"d": {k: _pack(v, f"{path}/{k}", tensors) for k, v in value.items()}}
    if isinstance(value, tuple | list):
        return [_pack(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"#": str(value)}
    if isinstance(value, np.generic):
        return _pack(value.item(), path, tensors)
    if isinstance(value, float) and value.is_integer():
        return {"#": repr(value)}  # canonical JSON would turn 1.0 into the integer 1
    return value


def _unpack(value: Any, tensors: dict[str, np.ndarray[Any, Any]]) -> Any:
    if isinstance(value, list):
        return tuple(_unpack(v, tensors) for v in value)
    if not isinstance(value, dict):
        return value
    if "!" in value:
        kind = _TYPES[value["!"]]
        return kind(**{k: _unpack(v, tensors) for k, v in value["f"].items()})
    if "@" in value:
        return tensors[value["@"]]
    if "#" in value:
        return float(value["#"])
    return {k: _unpack(v, tensors) for k, v in value["d"].items()}


def _fits(value: Any, kind: Any) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or kind is object:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(k, str) and _fits(v, args[1]) for k, v in value.items())
    if origin is np.ndarray:
        dtype = typing.get_args(args[1])[0]
        return isinstance(value, np.ndarray) and value.dtype == np.dtype(dtype)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(kind, type) or not isinstance(value, kind):
        return False
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return all(_fits(getattr(value, f.name), hints[f.name]) for f in dataclasses.fields(kind))
    return True
