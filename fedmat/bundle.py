"""A run's evidence in one file, for somebody who has nothing else: the ledger, the run's files, what left every site.

Knows: the names of the files in a bundle and how they are packed and read. Refuses to know: whether they are true
(``fedmat.audit``), records (there are none in it), networks.

The list of files in it is for finding one's way; what counts is what the ledger's entries say of their digests. Packing the same
files gives the same bytes.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmat import files
from fedmat.errors import ProtocolError, StateError
from fedmat.evidence import ATTESTATIONS, EVALUATIONS, INTERVALS, MATCHING, METRICS, MODEL, PLAN, ROUNDS
from fedmat.ledger import export

SCHEMA = "fedmat/bundle/1"
MANIFEST, LEDGER = "bundle.json", "ledger.jsonl"
CONSORTIUM, ENVIRONMENT, SETTLEMENT = "consortium.yaml", "environment.json", "settlement.json"
RUN_FILES = (
    PLAN, ATTESTATIONS, MATCHING, INTERVALS, ROUNDS, MODEL, EVALUATIONS, METRICS, SETTLEMENT, ENVIRONMENT, CONSORTIUM,
)  # fmt: skip
LARGEST = 4 * 2**30  # bytes of an unpacked bundle: they are read into memory
_DAY_ONE = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip file can say: packing again gives the same bytes


def run_file(name: str) -> str:
    """Returns the name in a bundle of a file of the run's folder."""
    return f"run/{name}"


def egress_file(site: str) -> str:
    """Returns the name in a bundle of a site's egress ledger."""
    return f"egress/{site}.jsonl"


@dataclass(frozen=True)
class Bundle:
    """The files of a bundle, as they were found.

    Attributes:
        path: where it was read from.
        run: the run it is about, as the ledger calls it.
        contents: name in the bundle -> bytes.
    """

    path: Path
    consortium: str
    run: str
    contents: Mapping[str, bytes]

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Reads a bundle: a zip file, or a folder it was unpacked into.

        Raises:
            StateError: there is none, or it is damaged.
        """
        if path.is_dir():
            found = {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
        else:
            found = _unpacked(path)
        if MANIFEST not in found:
            raise StateError(f"{path}: no evidence bundle, there is no {MANIFEST}", fix="fedmat audit bundle RUN makes one")
        try:
            manifest = json.loads(found[MANIFEST])
            if manifest["schema"] != SCHEMA:
                raise StateError(f"{path}: a bundle of another kind ({manifest['schema']})", fix="use the fedmat that made it")
            return cls(path, str(manifest["consortium"]), str(manifest["run"]), found)
        except (ValueError, KeyError, TypeError):
            raise StateError(f"{path}: {MANIFEST} is damaged", fix="ask for the bundle again") from None

    def data(self, name: str) -> bytes | None:
        """Returns a file's bytes; None where the bundle has none."""
        return self.contents.get(name)

    def run_data(self, name: str) -> bytes | None:
        """Returns the bytes of a file of the run's folder; None where the bundle has none."""
        return self.contents.get(run_file(name))

    def json(self, name: str) -> Any:
        """Returns what a JSON file of the run's folder says; None where there is none.

        Raises:
            StateError: it is damaged.
        """
        data = self.run_data(name)
        if data is None:
            return None
        try:
            return json.loads(data)
        except ValueError:
            raise StateError(f"{self.path}: {run_file(name)} is not valid JSON", fix="ask for the bundle again") from None

    def rounds(self) -> list[dict[str, Any]] | None:
        """Returns the rounds' reports; None where there are none; errors as :meth:`json`."""
        data = self.run_data(ROUNDS)
        if data is None:
            return None
        try:
            return [json.loads(line) for line in data.splitlines()]
        except ValueError:
            raise StateError(f"{self.path}: {run_file(ROUNDS)} has a damaged line", fix="ask for the bundle again") from None

    def ledger(self) -> export.Export:
        """Returns the ledger's entries and checkpoints, not checked yet.

        Raises:
            ProtocolError: evidence_missing, or what ``fedmat.ledger.export.parse_export`` finds.
        """
        data = self.data(LEDGER)
        if data is None:
            raise ProtocolError("evidence_missing", f"{self.path}: there is no {LEDGER}", fix="ask for the bundle again")
        return export.parse_export(io.BytesIO(data), LEDGER)

    def unpack(self, folder: Path) -> Path:
        """Writes the run's files into ``folder`` as they were in the run's folder and returns it."""
        for name in RUN_FILES:
            if (data := self.run_data(name)) is not None:
                files.write_atomic(folder / name, data)
        return folder


def pack(run_folder: Path, ledger: bytes, egress: Mapping[str, bytes], *, consortium: str, run: str, out: Path) -> Path:
    """Writes the bundle of a run's folder and returns its path.

    Args:
        ledger: the exported ledger.
        egress: site -> lines of its egress ledger, as the site handed them out.
        run: the run's name in the ledger.
    """
    contents = {run_file(n): (run_folder / n).read_bytes() for n in RUN_FILES if (run_folder / n).is_file()}
    contents |= {egress_file(site): data for site, data in egress.items()} | {LEDGER: ledger}
    listed = {name: {"bytes": len(data), "sha256": files.sha256(data)} for name, data in sorted(contents.items())}
    manifest = files.json_bytes({"schema": SCHEMA, "consortium": consortium, "run": run, "files": listed})
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {MANIFEST: manifest, **dict(sorted(contents.items()))}.items():
            archive.writestr(zipfile.ZipInfo(name, _DAY_ONE), data, zipfile.ZIP_DEFLATED)
    files.write_atomic(out, packed.getvalue())
    return out


def _unpacked(path: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            there = [i for i in archive.infolist() if not i.is_dir()]
            if len({i.filename for i in there}) != len(there):
                raise StateError(f"{path}: holds two files of one name", fix="ask for the bundle again")
            if sum(i.file_size for i in there) > LARGEST:
                raise StateError(f"{path}: unpacks to more than {LARGEST >> 30} GiB", fix="ask for the bundle again")
            return {i.filename: archive.read(i) for i in there}
    except FileNotFoundError:
        raise StateError(f"{path}: no such file", fix="name an evidence bundle, or a folder it was unpacked into") from None
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError):
        raise StateError(f"{path}: no evidence bundle, or a damaged one", fix="ask for the bundle again") from None
