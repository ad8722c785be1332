"""Files that are whole or not there: atomic writes, digests and canonical JSON (RFC 8785).

Knows: bytes and paths. Refuses to know: what the bytes mean.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rfc8785

from fedmat.errors import StateError


def write_atomic(path: Path, data: bytes, *, private: bool = False) -> None:
    """Replaces ``path`` by ``data`` so that a reader, or a crash, sees the old file or the new one, never a part.

    Args:
        private: only the owner may read it, from the first byte on.
    """
    write_together(path.parent, {path.name: data}, private=private)


def write_together(folder: Path, contents: Mapping[str, bytes], *, private: bool = False) -> None:
    """Replaces files of ``folder`` in the order given; all are on disk before the first one takes its place.

    A full disk therefore leaves every one of them as it was.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for name, data in contents.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            staged.append((temporary, path))
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666)
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
        for temporary, path in staged:
            os.replace(temporary, path)
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


def sha256(data: bytes) -> str:
    """Returns the hex SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Returns the hex SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """Returns ``value`` as RFC 8785 canonical JSON: equal values give equal bytes. NaN is refused."""
    return rfc8785.dumps(value)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` atomically as indented JSON with sorted keys; NaN is refused."""
    write_atomic(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Returns ``value`` as indented JSON with sorted keys; NaN is refused."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Returns a JSON file's value.

    Raises:
        StateError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StateError(f"{path}: no such file", fix="run the step that writes it") from None
    except ValueError:
        raise StateError(f"{path}: not valid JSON (half written or edited)", fix="remove it and run again") from None
