"""Bundles for auditors: a consistent one, and every kind of tampering with it, by somebody who can pack but not sign."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ledger_scene
from ledger_scene import Scene, metrics

from fedmat import accounts, files, pipeline
from fedmat.bundle import LEDGER, MANIFEST, Bundle
from fedmat.federation.engine import InProcessEngine

__all__ = ["Scene", "metrics"]


def build(home: Path, **how: Any) -> Scene:
    """Returns a scene with its run in the ledger."""
    return ledger_scene.build(home, **how)


def account(scene: Scene) -> None:
    """Writes a scene's run into its ledger."""
    there = files.read_json(scene.folder / "attestations.json")["attestations"]
    with InProcessEngine({s: ledger_scene._handler(scene, s) for s in there}) as engine:
        pipeline.statements(scene.run, engine=engine)
    pipeline.account(scene.run, scene.clock())


def packed(scene: Scene) -> Path:
    """Signs a checkpoint over the ledger as it is, cosigned by the members it has, and packs the bundle again."""
    here = scene.books.fold().sites
    own = {s: k for s, k in pipeline._own_keys(scene.run).items() if s in here}
    accounts.seal(scene.books, scene.clock(), own)
    return accounts.pack(scene.books, scene.run.run_id or "", scene.folder)


def opened(contents: dict[str, bytes], bundle: Bundle, *, repack: bool = True) -> Bundle:
    """Returns a bundle of these contents; with ``repack``, its packing list is made to fit, as a forger would."""
    found = dict(contents)
    if repack:
        manifest = json.loads(found[MANIFEST])
        manifest["files"] = {n: {"bytes": len(d), "sha256": files.sha256(d)} for n, d in sorted(found.items()) if n != MANIFEST}
        found[MANIFEST] = files.json_bytes(manifest)
    return Bundle(bundle.path, bundle.consortium, bundle.run, found)


def changed(bundle: Bundle, name: str, change: Callable[[bytes], bytes | None]) -> Bundle:
    """Returns a bundle in which one file was changed, or left out (None), and packed again."""
    contents = dict(bundle.contents)
    new = change(contents.pop(name))
    if new is not None:
        contents[name] = new
    return opened(contents, bundle)


def edited(change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    """Returns a change of a JSON file's value."""

    def apply(data: bytes) -> bytes:
        value = json.loads(data)
        return files.json_bytes(change(value) or value)

    return apply


def lines(change: Callable[[list[bytes]], list[bytes] | None]) -> Callable[[bytes], bytes]:
    """Returns a change of a file's lines."""

    def apply(data: bytes) -> bytes:
        found = data.splitlines(keepends=True)
        return b"".join(change(found) or found)

    return apply


def entries(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[bytes], bytes]:
    """Returns a change of the ledger's entries; the first line is made to fit their number."""

    def apply(data: bytes) -> bytes:
        first, *rest = data.splitlines()
        size = json.loads(first)["size"]
        new = change(list(rest[:size]))
        header = files.canonical_json({**json.loads(first), "size": len(new)})
        return b"".join(line + b"\n" for line in (header, *new, *rest[size:]))

    return apply


def payload(line: bytes) -> dict[str, Any]:
    """Returns what an entry in its envelope says."""
    found: dict[str, Any] = json.loads(base64.b64decode(json.loads(line)["payload"]))
    return found


def with_payload(line: bytes, /, **fields: Any) -> bytes:
    """Returns an envelope that says something else, with the old signatures."""
    envelope = json.loads(line)
    envelope["payload"] = base64.b64encode(files.canonical_json({**payload(line), **fields})).decode()
    return files.canonical_json(envelope)


def entry_lines(bundle: Bundle) -> list[bytes]:
    """Returns the ledger's entries."""
    first, *rest = bundle.contents[LEDGER].splitlines()
    return rest[: json.loads(first)["size"]]


def index_of(bundle: Bundle, type: str, **fields: Any) -> int:
    """Returns the index of the first entry of a type, with these fields."""
    for i, line in enumerate(entry_lines(bundle)):
        told_ = payload(line)
        if told_["type"] == type and all(told_.get(k) == v for k, v in fields.items()):
            return i
    raise LookupError(type)
