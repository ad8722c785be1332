"""Crystal structures in files: a folder or a tar archive of CIF or pymatgen JSON, and one text as one structure.

Knows: how to find structure files by their stem without unpacking anything to disk, and how to parse one of them into
compact JSON whose bytes do not depend on the machine. Refuses to know: records, fields, and why a structure is wanted.

References:
    CIF: S. R. Hall, F. H. Allen, I. D. Brown, Acta Cryst. A47 (1991) 655.
    Parser: S. P. Ong et al., "Python Materials Genomics (pymatgen)", Comput. Mater. Sci. 68 (2013) 314.
"""

from __future__ import annotations

import json
import tarfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from fedmat.errors import DataError

SUFFIXES = (".cif", ".json")
_MAX_BYTES = 16 * 2**20  # one structure file; more is not a structure, or an attack on memory
_DECIMALS = 10  # of an angstrom or a cell edge: below any experiment, above the last bits of a cosine


class Canonical(str):
    """Structure JSON made by :func:`parse`: it need not be parsed again."""

    __slots__ = ()


def read_texts(path: Path) -> dict[str, str]:
    """Returns {file stem: text} of every CIF and JSON file in a folder or tar archive, by stem.

    Raises:
        DataError: nothing is there, the archive is damaged, or two files have the same stem.
    """
    found: dict[str, str] = {}
    count = 0
    for stem, data in _members(path):
        count += 1
        found[stem] = data.decode("utf-8", errors="replace")
    if not found:
        raise DataError(
            f"{path}: no {' or '.join(SUFFIXES)} file in it", fix="name the folder or archive that holds the structures"
        )
    if len(found) != count:
        raise DataError(
            f"{path}: {count - len(found)} structure files have the name of another one",
            fix="keep one structure file for each name",
        )
    return dict(sorted(found.items()))


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if _wanted(file.name) and file.is_file():
                _check_size(file.stat().st_size, path)
                yield file.stem, file.read_bytes()
        return
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder", fix="correct the path in site.yaml")
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:  # regular files only: links are not followed and nothing is written to disk
                name = PurePosixPath(member.name).name
                if not (member.isreg() and _wanted(name)):
                    continue
                handle = archive.extractfile(member)
                if handle is not None:
                    _check_size(member.size, path)
                    yield PurePosixPath(name).stem, handle.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError):
        raise DataError(
            f"{path}: neither a folder nor a readable tar archive", fix="restore the archive, or name a folder of CIF files"
        ) from None


def _wanted(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _check_size(size: int, path: Path) -> None:
    if size > _MAX_BYTES:
        raise DataError(f"{path}: a structure file is larger than {_MAX_BYTES >> 20} MiB", fix="remove it from the folder")


def parse(text: str) -> tuple[str, Canonical] | None:
    """Returns (formula, structure JSON) of one CIF or pymatgen JSON text, or None when it is not exactly one structure.

    Partial occupancy is kept. The parser's warnings (rounded coordinates, missing symmetry) are silenced: they repeat
    cell values and cannot be acted on here.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            structure = _structure(text)
            if structure is None or not len(structure):
                return None
            return structure.composition.element_composition.formula.replace(" ", ""), Canonical(to_json(structure))
    except Exception:  # noqa: BLE001  the parser lets any kind of error through for a bad file, with cell values in it
        return None


def _structure(text: str) -> Any:
    from pymatgen.core import Structure

    if text.lstrip()[:1] == "{":
        return Structure.from_dict(json.loads(text))
    from pymatgen.io.cif import CifParser

    structures = CifParser.from_str(text).parse_structures(primitive=False)
    return structures[0] if len(structures) == 1 else None


def to_json(structure: Any) -> str:
    """Returns a pymatgen ``Structure`` as JSON that ``Structure.from_dict`` reads, rounded below physical meaning."""
    raw = structure.as_dict(verbosity=0)
    raw["lattice"] = {"matrix": _rounded(raw["lattice"]["matrix"]), "pbc": raw["lattice"].get("pbc", [True, True, True])}
    for site in raw["sites"]:
        site["abc"] = _rounded(site["abc"])
        site.pop("xyz", None)
        for species in site["species"]:
            species["occu"] = _rounded(species["occu"])
    return json.dumps(raw, sort_keys=True, separators=(",", ":"))


def _rounded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return round(float(value), _DECIMALS) + 0.0  # +0.0 turns -0.0 into 0.0
