"""Private keys of a site's records, so that sites find what they hold in common before training without showing it.

Knows: records, the contract and a secret of 32 bytes that all members hold and the coordinator does not. Refuses to know: other
sites, and who compares the keys (``fedmat.assurance.duplicates``, which sees keys only).

A key is the first eight bytes of HMAC-SHA256 (RFC 2104, FIPS 198-1) over the scope, the kind of key and the canonical text of:

* ``material``: the fields of ``RecordType.group`` (canonical formula, SMILES, mixture ...), as the split groups records; none
  where that is only a name a site gave (a cell's);
* ``measurement``: that, the conditions and the target, rounded (:class:`Rounding`): two parties that typed in one measurement
  rarely agree in its last digit, its kelvin or its flags;
* ``source``: the DOI in its normal form.

Eight bytes: for a million records at all sites together, one false match somewhere with a chance of 3e-8.

**What this does and does not give.** The coordinator, who lacks the secret, can neither read a key nor test a guess. It does see
how many different keys each site has and which sites share which of them, that is, how far their programmes overlap. *Any member*
that obtains another's keys (from a careless or colluding coordinator) can test guesses: it computes the key of a formula it is
curious about and looks it up. Chemistry is guessable, so between members the keys are a formality; what protects them is that
they go to the coordinator alone. A changed ``scope`` for every run keeps it from linking runs; a lost secret opens all scopes.
A member can also *invent* test rows to have another's training rows dropped: it learns only by the model's change, and the
counts in the report show it. Two-party private set intersection over a blinded group (OPRF, RFC 9497; Kolesnikov 2016) would take
guesses away from members, too, as every test of one costs an interaction; it is the upgrade where members do not trust the
coordinator to keep the keys.

References:
    RFC 2104, H. Krawczyk, M. Bellare, R. Canetti, "HMAC: keyed-hashing for message authentication", 1997.
    RFC 9497, A. Davidson et al., "Oblivious pseudorandom functions using prime-order groups", 2023.
    Kolesnikov2016: V. Kolesnikov et al., "Efficient batched oblivious PRF with applications to private set intersection", CCS 2016.
    S. Kaufman et al., "Leakage in Data Mining", ACM TKDD 6 (2012) 15.
"""

from __future__ import annotations

import functools
import hmac
import math
import os
import re
import secrets
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedmat import files
from fedmat.data import validation
from fedmat.data.contract import Field, RecordType
from fedmat.errors import ConfigError, DataError, StateError

MATERIAL, MEASUREMENT, SOURCE = "material", "measurement", "source"
KINDS = (MATERIAL, MEASUREMENT, SOURCE)
SECRET_BYTES = 32
Digests = NDArray[np.uint64]


@dataclass(frozen=True)
class Rounding:
    """How far apart two reports of one measurement may lie; a value is rounded, so neighbours across an edge stay apart.

    Attributes:
        kelvin: step of a temperature.
        decades: step of a target that spans decades, in log10; None rounds it to ``digits`` instead.
        digits: significant digits of a target that does not; any other condition has one more.
    """

    kelvin: float = 1.0
    decades: float | None = None
    digits: int = 2


# Solids are reported "at room temperature" for anything from 20 to 30 C: of the 142 rows of LiIon that repeat OBELiX training
# rows, 1 K finds 102 and 10 K finds 139, neither a false one (tests/data/test_matching.py).
ROUNDING: Mapping[str, Rounding] = {
    "solid_electrolyte": Rounding(kelvin=10.0, decades=0.1),
    "polymer_electrolyte": Rounding(decades=0.1),
    "liquid_electrolyte": Rounding(),  # within a decade or two, all of them: two digits, as reported
}


def keys(
    records: pd.DataFrame,
    rt: RecordType,
    target: str | Sequence[str],
    secret: bytes,
    scope: str,
    rounding: Rounding | None = None,
) -> dict[str, Digests]:
    """Returns the keys of every record: kind -> ``uint64`` of shape ``n``; 0 where a record has no such key.

    Args:
        records: accepted records, canonical and in canonical units (``fedmat.data.records.load_records``).
        target: the contract field the consortium predicts; of several, all are in the key, also as absent.
        secret: the members' secret, :func:`load_or_create_secret`.
        scope: what the keys are for, e.g. consortium and plan digest; keys of different scopes have nothing in common.
        rounding: the record type's entry in :data:`ROUNDING` when not given; the same at all sites.

    Raises:
        ConfigError: the target is no number field, or the secret has another length.
        DataError: a field of the key is not in the records.
    """
    _check(secret, scope)
    targets = [rt.field(name) for name in ([target] if isinstance(target, str) else target)]
    for field in targets:
        if field.kind != "number":
            raise ConfigError(f"matching: '{field.name}' is no number field of {rt.name}", fix="name the task's target")
    step = rounding or ROUNDING.get(rt.name, Rounding())
    group, under = [rt.field(name) for name in rt.group], conditions(rt)
    _need(records, [*group, *under, *targets], rt)
    tag = functools.lru_cache(maxsize=None)(functools.partial(_tag, secret, scope))
    material = _rows([validation.keys(records[f.name], f) for f in group], len(records))
    context = _rows([_rounded(records[f.name], f, step) for f in under], len(records))
    value = _rows([[_target(v, step) for v in records[f.name].to_numpy(dtype=np.float64)] for f in targets], len(records))
    named = _named_only(rt)
    out: dict[str, list[int]] = {MATERIAL: [], MEASUREMENT: [], SOURCE: [tag(SOURCE, (d,)) if d else 0 for d in _dois(records)]}
    for m, c, v in zip(material, context, value, strict=True):
        known = not named and all(part not in (None, "") for part in m)
        out[MATERIAL].append(tag(MATERIAL, m) if known else 0)
        out[MEASUREMENT].append(tag(MEASUREMENT, (*(() if named else m), *c, *v)) if any(v) and (known or named) else 0)
    return {kind: np.array(digests, dtype=np.uint64) for kind, digests in out.items()}


def fingerprint(secret: bytes, scope: str) -> str:
    """Returns 16 hex digits that are equal for sites with the same secret, and tell nothing about it.

    Sites with different secrets share no key, which looks exactly like sites without duplicates: the coordinator must compare
    fingerprints first (``fedmat.assurance.duplicates.find`` does).
    """
    _check(secret, scope)
    return f"{_tag(secret, scope, 'fingerprint', ()):016x}"


def conditions(rt: RecordType) -> tuple[Field, ...]:
    """Returns the fields that tell one measurement of a material from another, beside the target.

    Those the contract lists as identifying and that are neither the material, nor an outcome, nor an optional label of a site's
    own words (a structural family, a processing route): every house words those differently. A structure is one where every
    record has it, and by its text: two crystals of one composition are two, and one that was relaxed again is not recognised.
    Where the material is but a name (a cell's), all required numbers are.
    """
    if _named_only(rt):
        return tuple(f for f in rt.fields if f.kind == "number" and f.required and not f.measured)
    fields = [rt.field(name) for name in rt.unique if name not in rt.group]
    labels = ("category", "text")
    return tuple(
        f
        for f in fields
        if not f.measured and (f.required or (f.kind != "structure" and (f.kind not in labels or f.categories)))
    )


def _named_only(rt: RecordType) -> bool:
    """Tells whether the material is a name that a site gave: two sites' "cell 1" are not one cell."""
    return all(rt.field(name).kind == "text" for name in rt.group)


def doi(text: str) -> str:
    """Returns a DOI in lower case without resolver, prefix or trailing punctuation, or "" when ``text`` holds none.

    >>> doi("https://doi.org/10.1039/C3DT52917G."), doi("DOI: 10.1021/ic030208w "), doi("private communication")
    ('10.1039/c3dt52917g', '10.1021/ic030208w', '')
    """
    found = re.search(r"10\.\d{4,9}/\S+", text.strip().lower())
    return found[0].rstrip(".,;") if found else ""


def load_or_create_secret(path: Path) -> bytes:
    """Returns the 32 bytes in ``path``, drawn from the operating system and written first when there is no such file.

    The file holds 64 hexadecimal digits, readable by its owner alone. One member creates it and hands it to the others by a road
    that the coordinator does not see.

    Raises:
        StateError: anyone but the owner may read or change it, it is no plain file, or it does not hold a secret. The message
            never repeats what it holds.
    """
    if not os.path.lexists(path):
        _create(path)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise StateError(f"{path}: the matching secret cannot be opened ({error.strerror})", fix="name a plain file") from None
    try:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise StateError(f"{path}: the matching secret is no plain file", fix="name a plain file")
        if facts.st_uid != os.getuid() or facts.st_mode & 0o077:
            raise StateError(
                f"{path}: others may read the matching secret (mode {stat.S_IMODE(facts.st_mode):04o}, expected 0600, own file)",
                fix=f"if nobody did: chmod 600 {path}; else agree on a new secret",
            )
        text = os.read(handle, 1024).strip()
    finally:
        os.close(handle)
    if not re.fullmatch(rb"[0-9a-f]{%d}" % (2 * SECRET_BYTES), text):
        raise StateError(
            f"{path}: not a matching secret ({2 * SECRET_BYTES} hexadecimal digits)", fix="copy the members' file again"
        )
    return bytes.fromhex(text.decode())


def _create(path: Path) -> None:
    """Writes a new secret beside ``path`` and links it there: of two processes one wins, and nobody reads half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as opened:
            opened.write(secrets.token_bytes(SECRET_BYTES).hex().encode() + b"\n")
            opened.flush()
            os.fsync(handle)
        os.link(temporary, path)
    except FileExistsError:
        pass  # another process was first; its secret is the secret
    except OSError as error:
        raise StateError(
            f"{path}: the matching secret cannot be written ({error.strerror})", fix="name a writable folder"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


# --- canonical texts -----------------------------------------------------------------------------------------------


def _rows(columns: Sequence[list[Any]], n: int) -> list[tuple[Any, ...]]:
    return list(zip(*columns, strict=True)) if columns else [()] * n


def _tag(secret: bytes, scope: str, kind: str, parts: tuple[Any, ...]) -> int:
    message = files.canonical_json(["fedmat/matching/1", scope, kind, list(parts)])
    return int.from_bytes(hmac.digest(secret, message, "sha256")[:8], "big") or 1  # 0 says that there is no key


def _check(secret: bytes, scope: str) -> None:
    if len(secret) != SECRET_BYTES:
        raise ConfigError(f"matching: a secret has {SECRET_BYTES} bytes, not {len(secret)}", fix="use load_or_create_secret")
    if not scope:
        raise ConfigError("matching: keys need a scope", fix="name the consortium and the plan")


def _need(records: pd.DataFrame, fields: Sequence[Field], rt: RecordType) -> None:
    absent = sorted({f.name for f in fields} - set(records.columns))
    if absent:
        raise DataError(f"matching: {rt.name} records lack {', '.join(absent)}", fix="prepare the site again")


def _rounded(column: pd.Series[Any], field: Field, step: Rounding) -> list[Any]:
    if field.kind != "number":
        return validation.keys(column, field)
    values = column.to_numpy(dtype=np.float64)
    if field.unit == "kelvin":
        return [None if math.isnan(v) else int(np.rint(v / step.kelvin)) for v in values]
    return ["" if math.isnan(v) else f"{v + 0.0:.{step.digits}e}" for v in values]


def _target(value: float, step: Rounding) -> str:
    """Returns the rounded target as text, "" for an absent one. A bound and a value at that bound are one measurement."""
    if math.isnan(value):
        return ""
    if step.decades is not None and value > 0:
        return f"log {int(np.rint(round(math.log10(value) / step.decades, 6)))}"
    return f"{value + 0.0:.{step.digits - 1}e}"


def _dois(records: pd.DataFrame) -> list[str]:
    return [doi(str(text)) for text in records["doi"].fillna("")] if "doi" in records.columns else [""] * len(records)
