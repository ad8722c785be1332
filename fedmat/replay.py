"""Runs a finished run again, from a clean clone of its code, and compares the two artefact by artefact.

Knows: the order in which a run makes its artefacts, what of each must come out equal again, and how to have ``dvc repro``
do it where none of the first run's results can reach it. Refuses to know: records, who asserted what (``fedmat.ledger``),
and MLflow. It runs the stages of the commit it is given: an auditor reads that commit first, as any code one runs.

Equal means equal bytes: SHA-256 of the model's file, and of every JSON artefact's canonical form (RFC 8785) without the
fields in :data:`NOT_COMPARED`. Only where those differ are numbers compared, with a tolerance that the result states. A
round's model is kept as a digest alone, so its difference counts as one of rounding only if everything else speaks for
it: the final models agree within the tolerance, the round's own figures do, and every later digest differs too, as a
difference that was trained on must. What the first run's folder does not hold is "not evidenced", never equal.

Two things no replay brings back: noise that a plan takes from the operating system, and a site that did not answer.
From there on a difference is no proof against the run, and the verdict is "not evidenced" with that reason.

References:
    RFC 8785, JSON Canonicalization Scheme. DVC, "dvc repro", https://dvc.org. M. Baker, "1,500 scientists lift the lid on
    reproducibility", Nature 533, 2016 (why the same code on the same data is asked for at all).
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from fedmat import files, wire
from fedmat.config import SLUG, data_home, read_yaml, resolve_path
from fedmat.domain import GlobalModel
from fedmat.errors import ConfigError, NotEvidenced, ServiceError, StateError
from fedmat.evidence import ATTESTATIONS, EVALUATIONS, INTERVALS, MATCHING, METRICS, MODEL, PLAN, ROUNDS

TOLERANCE = 1e-6
HOME, RUN = "build", "replay"  # in the clone: the workspace and the run's name
_SMALL = 1e-12  # what counts as zero: a difference of two equal sums
_TAIL = 200  # lines of a stage's output that are kept for its error

NOT_COMPARED: Mapping[str, Mapping[str, str]] = {
    ATTESTATIONS: {"setup_bytes": "bytes on the way: they depend on the carrier"},
    "rounds": {
        "seconds": "measured",
        "overhead_seconds": "measured",
        "bytes_down": "bytes on the way: they depend on the carrier",
        "bytes_up": "bytes on the way: they depend on the carrier",
        "role_bytes": "bytes on the way: they depend on the carrier",
    },
    METRICS: {
        "bytes": "bytes on the way: they depend on the carrier",
        "protection.role_bytes": "bytes on the way: they depend on the carrier",
        "code_version": "names a version; the commit says more",
        "model.version": "given by the registry",
    },
}
"""Artefact -> field -> why it is not compared (dotted; ``*`` is every key)."""

NOT_COMPARED_SEALED: Mapping[str, Mapping[str, str]] = {
    "rounds": {
        "exchange": "canary exchanges fall where the members' secret and the run's random name say",
        "audits": "of the exchange that closed the round",
        "updates": "sealed with keys and pads that are new",
        "evidence.header": "names the run and its keys, which are new",
    },
    METRICS: {
        "protection.sites.*.agreed": "of the exchanges that closed the rounds",
        "protection.sites.*.disagreed": "of the exchanges that closed the rounds",
    },
}
"""As :data:`NOT_COMPARED`, for runs whose rounds were encrypted."""

Verdict = Literal["identical", "within_tolerance", "diverged", "not_evidenced"]
Match = Literal["identical", "within_tolerance", "different", "missing", "not_expected"]


@dataclass(frozen=True)
class Expected:
    """What a finished run's folder holds of what a replay must make again; None where a file is not there.

    Attributes:
        model: the weights' file.
        dirty: whether the code differed from its commit when the run was made; None: nobody said.
    """

    folder: Path
    plan: dict[str, Any] | None
    attestations: dict[str, Any] | None
    matching: dict[str, Any] | None
    intervals: dict[str, Any] | None
    rounds: tuple[dict[str, Any], ...] | None
    evaluations: list[dict[str, Any]] | None
    metrics: dict[str, Any] | None
    model: Path | None
    dirty: bool | None = None

    @classmethod
    def of_run(cls, folder: Path, *, dirty: bool | None = None) -> Expected:
        """Reads what is there of a run, or of an evidence bundle that has the same files.

        Raises:
            StateError: there is no such folder, or a file in it is damaged or of another form.
        """
        if not folder.is_dir():
            raise StateError(f"{folder}: no such run folder", fix="name a run's folder, or the unpacked bundle's")
        mapping = {name: _read(folder / name, dict) for name in (PLAN, ATTESTATIONS, MATCHING, INTERVALS, METRICS)}
        attested = mapping[ATTESTATIONS]
        if attested is not None and not _is_attested(attested):
            raise StateError(f"{folder / ATTESTATIONS}: not what sites attested", fix="restore the file")
        plan = mapping[PLAN] or {}
        if not isinstance(plan.get("settings", {}), dict) or not isinstance(plan.get("roster", []), list):
            raise StateError(f"{folder / PLAN}: not a plan", fix="restore the file")
        model = folder / MODEL
        return cls(
            folder, mapping[PLAN], attested, mapping[MATCHING], mapping[INTERVALS], _read_rounds(folder / ROUNDS),
            _read(folder / EVALUATIONS, list), mapping[METRICS], model if model.is_file() else None, dirty,
        )  # fmt: skip

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that took part, or, where nothing attests that, that the plan invited."""
        if self.attestations is not None:
            return tuple(sorted(self.attestations["attestations"]))
        return tuple(sorted(self.plan.get("roster", ()))) if self.plan is not None else ()

    @property
    def encrypted(self) -> bool:
        """Whether the plan opens sums only."""
        return _setting(self.plan, "security", "mode", "none") != "none"


@dataclass(frozen=True)
class Artefact:
    """One thing both runs made.

    Attributes:
        name: e.g. ``sites/lipf6/manifest.json``, ``round 3: model_sha256``, ``metrics.json``.
        expected_sha256, found_sha256: of what was compared; None where it is not there.
        verdict: ``not_expected`` where the first run's folder does not hold it, ``missing`` where the replay did not make it.
        detail: in words, how far the two are apart.
        where: path of the first difference inside the artefact; empty for a file as a whole.
    """

    name: str
    expected_sha256: str | None
    found_sha256: str | None
    verdict: Match
    detail: str = ""
    where: str = ""

    @property
    def place(self) -> str:
        """Name and path, e.g. ``metrics.json: global.federated.mae``."""
        return f"{self.name}: {self.where}" if self.where else self.name


@dataclass(frozen=True)
class Replayed:
    """What a replay found.

    Attributes:
        commit: the full name of the commit whose code ran.
        dirty: whether the first run's code differed from that commit; None: nobody said. It is stated, never judged.
        clone: where that code and everything it made can be looked at.
        artefacts: in the order in which a run makes them.
        first_divergence: place of the first artefact that is not identical.
        reasons: why the verdict is not a better one, and what else a reader has to know.
        seconds: of the whole replay.
        tolerance: relative, of numbers whose digests differ.
    """

    verdict: Verdict
    commit: str
    dirty: bool | None
    clone: Path
    artefacts: tuple[Artefact, ...]
    first_divergence: str | None
    seconds: float
    reasons: tuple[str, ...] = ()
    tolerance: float = TOLERANCE


def replay(
    expected: Expected,
    *,
    repository: Path,
    commit: str,
    consortium_file: Path,
    workdir: Path,
    progress: Callable[[str], None],
    tolerance: float = TOLERANCE,
) -> Replayed:
    """Runs a run again from a clone of its code and compares.

    Nothing of the first run is given to the second but the number of rounds. Data are read where the site files say.

    Args:
        expected: the first run.
        repository: the git repository of the code; only read.
        commit: the commit to replay, any name git knows it by.
        consortium_file: the run's consortium.yaml. Where it is part of the commit, the commit's is taken, and its sites'
            files with it.
        workdir: where to work; ``workdir/clone`` must not be there yet.
        progress: called with the name of every stage as it starts (``prepare@lipf6``), and of every round.
        tolerance: relative; see :func:`compare`.

    Raises:
        StateError: no repository there, no such commit, the clone's place is taken, or a stage refused to go on.
        ConfigError: the consortium file or a site's is wrong.
        NotEvidenced: the data, or the private keys, of a member are not on this machine.
        ServiceError: git or DVC is missing or failed, or another fedmat than the clone's would have run.
    """
    started = time.perf_counter()
    if importlib.util.find_spec("dvc") is None:
        raise ServiceError("DVC is not installed for this Python", fix="install fedmat with its dependencies")
    full = _commit(repository, commit)
    clone = workdir.resolve() / "clone"
    _clone(repository, full, clone)
    file = _in_clone(consortium_file, repository, clone)
    file, sites = _consortium(file, expected, clone)
    params = {"consortium": str(file), "home": HOME, "run": RUN, "sites": {s: str(f) for s, f in sorted(sites.items())}}
    files.write_atomic(clone / "params.yaml", yaml.safe_dump(params, sort_keys=False).encode())
    environment = _environment(clone)
    _check_code(clone, environment)
    _reproduce(clone, environment, progress)
    artefacts, reasons = compare(expected, clone / HOME, RUN, tolerance=tolerance)
    verdict, first, why = judge(expected, artefacts)
    return Replayed(
        verdict, full, expected.dirty, clone, artefacts, first, time.perf_counter() - started, (*why, *reasons), tolerance
    )


def as_plain(replayed: Replayed) -> dict[str, Any]:
    """Returns a replay as plain JSON, with what was not compared and why."""
    plain = dataclasses.asdict(replayed) | {"schema": "fedmat/replay/1", "clone": str(replayed.clone)}
    plain |= {"artefacts": [dataclasses.asdict(a) for a in replayed.artefacts], "reasons": list(replayed.reasons)}
    plain["not_compared"] = {name: dict(found) for name, found in NOT_COMPARED.items()}
    plain["not_compared_encrypted"] = {name: dict(found) for name, found in NOT_COMPARED_SEALED.items()}
    return plain


# --- comparing -----------------------------------------------------------------------------------------------------


def compare(
    expected: Expected, home: Path, run: str, *, tolerance: float = TOLERANCE
) -> tuple[tuple[Artefact, ...], tuple[str, ...]]:
    """Compares a run with what another workspace holds of the same run.

    Args:
        home: the other workspace, with ``sites/`` and ``runs/``.
        run: name of the run in it.
        tolerance: largest relative difference of two numbers; of a tensor, relative to its largest entry.

    Returns:
        The artefacts in the order a run makes them, and remarks in words.

    Raises:
        StateError: a file of the other workspace is damaged.
    """
    if not 0 <= tolerance < 1:
        raise ConfigError(f"a tolerance of {tolerance} is no relative difference", fix=f"use for instance {TOLERANCE:g}")
    found = Expected.of_run(home / "runs" / run)
    skip = _Skipped(expected.encrypted or found.encrypted)
    out: list[Artefact] = []
    for site in expected.sites:
        manifest = _read(home / "sites" / site / "manifest.json", dict)
        out.append(_digests(f"sites/{site}/manifest.json", _attested(expected, site, "dataset_sha256"),
                            None if manifest is None else str(manifest.get("sha256")), "dataset_sha256"))  # fmt: skip
    for site in expected.sites:
        key = "features_sha256"
        out.append(_digests(f"sites/{site}/features", _attested(expected, site, key), _attested(found, site, key), key))
    for name in (PLAN, MATCHING, ATTESTATIONS):
        field = name.removesuffix(".json")
        out.append(_values(name, getattr(expected, field), getattr(found, field), skip.of(name), tolerance))
    model = _models(expected.model, found.model, tolerance)
    out += _rounds(expected.rounds, found.rounds, skip.of("rounds"), tolerance, model.verdict == "within_tolerance")
    out.append(_values(INTERVALS, expected.intervals, found.intervals, (), tolerance))
    out.append(model)
    out.append(_values(EVALUATIONS, _by_arm(expected.evaluations), _by_arm(found.evaluations), (), tolerance))
    implied = ("model.sha256", "digests.model") if model.verdict == "within_tolerance" else ()  # judged with the model itself
    out.append(_values(METRICS, expected.metrics, found.metrics, (*skip.of(METRICS), *implied), tolerance))
    remarks = [
        "the rounds were encrypted: what only one run's keys, pads and random name decide was not compared"
    ] * skip.sealed
    return tuple(out), tuple(remarks)


def judge(expected: Expected, artefacts: Sequence[Artefact]) -> tuple[Verdict, str | None, tuple[str, ...]]:
    """Returns the verdict on compared artefacts, the place of the first that is not identical, and the reasons."""
    reasons: list[str] = []
    if expected.dirty:
        reasons.append("when the run was made, its code differed from the commit: what was replayed is the commit's code")
    absent = [a.name for a in artefacts if a.verdict == "not_expected"]
    if absent:
        reasons.append(f"not in {expected.folder}: {_some(absent)}")
    apart = [a for a in artefacts if a.verdict not in ("identical", "not_expected")]
    wrong = [a for a in artefacts if a.verdict in ("different", "missing")]
    start, why = _unrepeatable(expected)
    noisy = bool(_noise(expected))
    excused = bool(start) and _moved(artefacts)
    if excused:
        allowed = {a.name for a in artefacts[_index(artefacts, start) :]}
        excused = any(a.name in allowed for a in wrong)
        wrong = [a for a in wrong if a.name not in allowed]
    if excused or noisy:
        reasons.append(why)
    first = apart[0].place if apart else None
    if wrong:
        return "diverged", first, tuple(reasons)
    if absent or excused or noisy:
        return "not_evidenced", first, tuple(reasons)
    return ("within_tolerance" if apart else "identical"), first, tuple(reasons)


def _moved(artefacts: Sequence[Artefact]) -> bool:
    """Whether the last round and the weights both came out different: else what follows them has no excuse."""
    last = [a for a in artefacts if a.name.endswith(": model_sha256")][-1:]
    ends = [a for a in (*last, *(a for a in artefacts if a.name == MODEL)) if a.verdict != "not_expected"]
    return bool(ends) and all(a.verdict != "identical" for a in ends)


def _noise(expected: Expected) -> str:
    """Returns for what the plan takes noise from the operating system; empty where it takes none."""
    if _setting(expected.plan, "privacy", "unit", "none") == "record":
        return "every site adds it for the privacy of each record"
    if _setting(expected.plan, "security", "mode", "none") == "ckks":
        return "encryption and decryption under CKKS add it to every sum that is opened"
    return ""


def _unrepeatable(expected: Expected) -> tuple[str, str]:
    """Returns from which artefact on a difference proves nothing, and why; empty where everything can be made again."""
    failures = (expected.attestations or {}).get("failures") or []
    if failures:
        sites = sorted({str(f["site"]) for f in failures})
        return MATCHING, f"{', '.join(sites)} took no part in the run, and no replay brings an absence back"
    if noise := _noise(expected):
        return "round 1: model_sha256", f"noise from the operating system: {noise}"
    for number, r in enumerate(expected.rounds or (), start=1):
        gone = sorted({str(d["site"]) for d in r.get("dropouts") or ()})
        if gone:
            return (
                f"round {number}: model_sha256",
                f"round {number}: {', '.join(gone)} did not answer, and no replay brings an absence back",
            )
    return "", ""


def _index(artefacts: Sequence[Artefact], name: str) -> int:
    return next((i for i, a in enumerate(artefacts) if a.name == name), len(artefacts))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


@dataclass(frozen=True)
class _Skipped:
    """Which fields of an artefact are not compared."""

    sealed: bool

    def of(self, artefact: str) -> tuple[str, ...]:
        more = NOT_COMPARED_SEALED.get(artefact, {}) if self.sealed else {}
        return (*NOT_COMPARED.get(artefact, {}), *more)


def _digests(name: str, expected: str | None, found: str | None, where: str = "") -> Artefact:
    if expected is None:
        return Artefact(name, None, found, "not_expected", "the run's folder does not state it")
    if found is None:
        return Artefact(name, expected, None, "missing", "the replay did not make it", where)
    if expected == found:
        return Artefact(name, expected, found, "identical")
    return Artefact(name, expected, found, "different", f"is {found[:12]}, expected {expected[:12]}", where)


def _values(name: str, expected: Any, found: Any, skipped: Iterable[str], tolerance: float) -> Artefact:
    """Compares two JSON values without the skipped fields: by digest, then number by number."""
    skipped = tuple(skipped)
    a, b = (None if v is None else _without(v, skipped) for v in (expected, found))
    whole = _digests(name, None if a is None else _digest(name, a), None if b is None else _digest(name, b))
    if whole.verdict != "different":
        return whole
    worst = 0.0
    for where, apart in _differences(a, b):
        if apart is None or apart > tolerance:
            words = "not the same" if apart is None else f"differs by {apart:.2g} of its size"
            return dataclasses.replace(whole, detail=words, where=where)
        worst = max(worst, apart)
    where = next(where for where, _ in _differences(a, b))
    return dataclasses.replace(
        whole, verdict="within_tolerance", detail=f"numbers differ by at most {worst:.2g} of their size", where=where
    )


def _rounds(
    expected: Sequence[Mapping[str, Any]] | None,
    found: Sequence[Mapping[str, Any]] | None,
    skipped: Sequence[str],
    tolerance: float,
    models_close: bool,
) -> list[Artefact]:
    """Compares each round's model digest and the rest of its report."""
    count = max(len(expected or ()), len(found or ()))
    if not count:
        return [_digests(ROUNDS, None, None)]
    digests: list[Artefact] = []
    reports: list[Artefact] = []
    for i in range(count):
        a, b = (r[i] if r is not None and i < len(r) else None for r in (expected, found))
        name = f"round {i + 1}"
        digests.append(_digests(f"{name}: model_sha256", _model_of(a), _model_of(b)))
        reports.append(_values(name, a, b, (*skipped, "model_sha256"), tolerance))
    later_differ = models_close
    for i in reversed(range(count)):  # rounding that was trained on cannot vanish again
        close = digests[i].verdict == "different" and later_differ and reports[i].verdict in ("identical", "within_tolerance")
        if close:
            words = "weights of a round are not kept; its figures, every later digest and the final weights speak for rounding"
            digests[i] = dataclasses.replace(digests[i], verdict="within_tolerance", detail=words)
        later_differ = close
    return [artefact for pair in zip(digests, reports, strict=True) for artefact in pair]


def _model_of(report: Mapping[str, Any] | None) -> str | None:
    return None if report is None else str(report["model_sha256"])


def _models(expected: Path | None, found: Path | None, tolerance: float) -> Artefact:
    """Compares two weights' files: by digest, then tensor by tensor."""
    whole = _digests(
        MODEL, None if expected is None else files.sha256_file(expected), None if found is None else files.sha256_file(found)
    )
    if whole.verdict != "different" or expected is None or found is None:
        return whole
    try:
        a = wire.load_model(expected)
    except StateError as error:
        return dataclasses.replace(whole, detail=error.what)
    b = wire.load_model(found)
    one, other = _tensors(a), _tensors(b)
    if {k: v.shape for k, v in one.items()} != {k: v.shape for k, v in other.items()}:
        return dataclasses.replace(whole, detail="another network: its tensors have other names or shapes")
    worst: tuple[float, float, str] = (0.0, 0.0, "")
    for name, x in one.items():
        if not np.array_equal(np.isfinite(x), np.isfinite(other[name])) or not np.isfinite(x).all():
            return dataclasses.replace(whole, detail="holds numbers that are not finite", where=name)
        absolute = float(np.abs(x - other[name]).max(initial=0.0))
        size = max(float(np.abs(x).max(initial=0.0)), float(np.abs(other[name]).max(initial=0.0)), _SMALL)
        worst = max(worst, (absolute / size, absolute, name))
    relative, absolute, name = worst
    words = f"largest difference {absolute:.2g}, {relative:.2g} of the tensor's largest entry"
    if relative > tolerance:
        return dataclasses.replace(whole, detail=words, where=name)
    about = _values(MODEL, wire.plain(a.spec), wire.plain(b.spec), (), tolerance)
    if about.verdict == "different":
        return dataclasses.replace(whole, detail=f"what is said about the weights: {about.detail}", where=about.where)
    return dataclasses.replace(whole, verdict="within_tolerance", detail=words, where=name)


def _tensors(model: GlobalModel) -> dict[str, NDArray[np.float64]]:
    scaler = {f"scaler.{f.name}": np.atleast_1d(getattr(model.scaler, f.name)) for f in dataclasses.fields(model.scaler)}
    found = {**{k: model.weights[k] for k in sorted(model.weights)}, **scaler}
    return {name: np.asarray(value, dtype=np.float64) for name, value in found.items()}


def _differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, float | None]]:
    """Yields every place where two JSON values differ: its path, and how far apart two numbers are relative to the larger.

    None stands for a difference that no tolerance covers.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            where = f"{path}.{key}" if path else str(key)
            if key not in a or key not in b:
                yield where, None
            else:
                yield from _differences(a[key], b[key], where)
    elif isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            yield path, None
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from _differences(x, y, f"{path}[{i}]")
    elif _number(a) and _number(b) and not (isinstance(a, int) and isinstance(b, int)):  # counts are exact
        if a != b:
            yield path, 0.0 if abs(a - b) <= _SMALL else abs(a - b) / max(abs(a), abs(b))
    elif type(a) is not type(b) or a != b:
        yield path, None


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _without(value: Any, skipped: Sequence[str]) -> Any:
    """Returns a copy of a JSON value without the fields at these dotted paths."""
    out = copy.deepcopy(value)
    for path in skipped:
        _remove(out, path.split("."))
    return out


def _remove(value: Any, keys: Sequence[str]) -> None:
    if not isinstance(value, dict):
        return
    if len(keys) == 1:
        value.pop(keys[0], None)
        return
    for key in list(value) if keys[0] == "*" else [keys[0]]:
        _remove(value.get(key), keys[1:])


def _digest(name: str, value: Any) -> str:
    try:
        return files.sha256(files.canonical_json(value))
    except ValueError:  # a number beyond what JSON holds exactly
        raise StateError(f"{name}: holds a number that fedmat does not write", fix="restore the file") from None


def _by_arm(evaluations: Sequence[Mapping[str, Any]] | None) -> dict[str, Any] | None:
    """Returns evaluations by what was scored where, so that a difference has a name and their order does not matter."""
    if evaluations is None:
        return None
    out: dict[str, Any] = {}
    for e in evaluations:
        target = f" ({e['target']})" if e.get("target") else ""
        key = f"{e.get('arm')} at {e.get('site')}{target}"
        again = sum(k == key or k.startswith(f"{key} #") for k in out)
        out[f"{key} #{again + 1}" if again else key] = e
    return out


# --- reading -------------------------------------------------------------------------------------------------------


def _read(path: Path, kind: type[dict[str, Any]] | type[list[Any]]) -> Any:
    """Returns the JSON value of a file; None where there is none."""
    if not path.is_file():
        return None
    return _parsed(path.read_bytes(), path, kind)


def _parsed(data: bytes, path: Path, kind: type[dict[str, Any]] | type[list[Any]]) -> Any:
    def refuse(_: str) -> float:
        raise ValueError("not a JSON number")

    try:
        value: Any = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise StateError(f"{path}: not valid JSON (half written or edited)", fix="restore the file") from None
    inner = value if kind is list and isinstance(value, list) else ()
    if type(value) is not kind or not all(isinstance(v, dict) for v in inner):
        raise StateError(f"{path}: not a file that a run writes", fix="restore the file")
    return value


def _read_rounds(path: Path) -> tuple[dict[str, Any], ...] | None:
    if not path.is_file():
        return None
    rounds = tuple(_parsed(line, path, dict) for line in path.read_bytes().splitlines())
    good = (isinstance(r.get("model_sha256"), str) and _about_sites(r.get("dropouts", [])) for r in rounds)
    wrong = next((i for i, fine in enumerate(good, start=1) if not fine), None)
    if wrong is not None:
        raise StateError(f"{path}, line {wrong}: not a round's report", fix="restore the file")
    return rounds


def _is_attested(value: Mapping[str, Any]) -> bool:
    sites = value.get("attestations")
    named = isinstance(sites, dict) and all(re.fullmatch(SLUG, s) and isinstance(a, dict) for s, a in sites.items())
    return named and _about_sites(value.get("failures", []))  # a name becomes part of a path


def _about_sites(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, dict) and isinstance(v.get("site"), str) for v in value)


def _attested(run: Expected, site: str, key: str) -> str | None:
    if run.attestations is None:
        return None
    value = run.attestations["attestations"].get(site, {}).get(key)
    return None if value is None else str(value)


def _setting(plan: Mapping[str, Any] | None, section: str, key: str, otherwise: str) -> str:
    found = ((plan or {}).get("settings") or {}).get(section)
    return str(found.get(key, otherwise)) if isinstance(found, dict) else otherwise


# --- the clone -----------------------------------------------------------------------------------------------------


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs git without the machine's hooks, line endings, and any network."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith("GIT_CONFIG")}
    environment |= {"GIT_TERMINAL_PROMPT": "0", "GIT_ALLOW_PROTOCOL": "file", "GIT_NO_LAZY_FETCH": "1", "LC_ALL": "C"}
    settings = {"core.hooksPath": os.devnull, "core.autocrlf": "false", "advice.detachedHead": "false"}
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    try:
        return subprocess.run(
            ["git", *options, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise ServiceError("git is not installed, or not on the PATH", fix="install git") from error


def _top(repository: Path) -> Path:
    if not repository.is_dir():
        raise StateError(f"{repository}: no such folder", fix="name the checkout that holds the run's code")
    done = _git(repository, "rev-parse", "--show-toplevel")
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise StateError(
            f"{repository}: no git repository with a working tree ({said[0] if said else 'git says nothing'})",
            fix="name the checkout that holds the run's code",
        )
    return Path(done.stdout.strip())


def _commit(repository: Path, commit: str) -> str:
    """Returns the full name of a commit of the repository."""
    top = _top(repository)
    done = _git(top, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}")
    if done.returncode:
        raise StateError(
            f"{top}: has no commit '{commit}'", fix="fetch it, or name the repository that has the code the run was made with"
        )
    return done.stdout.strip()


def _clone(repository: Path, commit: str, clone: Path) -> None:
    if clone.exists():
        raise StateError(f"{clone}: is there already", fix="name an empty folder to work in")
    clone.parent.mkdir(parents=True, exist_ok=True)
    steps = (
        (clone.parent, "clone", "--quiet", "--no-hardlinks", "--no-checkout", "--template=", str(_top(repository)), str(clone)),
        (clone, "checkout", "--quiet", "--detach", commit),
    )
    for folder, *arguments in steps:
        done = _git(folder, *arguments)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise ServiceError(
                f"git {arguments[0]} of {commit[:12]} failed: {said[-1] if said else 'it says nothing'}",
                fix=f"see whether 'git clone {repository}' works by hand",
            )
    if not (clone / "dvc.yaml").is_file():
        raise StateError(f"commit {commit[:12]} of {repository} holds no dvc.yaml", fix="name the repository of fedmat's code")


def _in_clone(consortium_file: Path, repository: Path, clone: Path) -> Path:
    """Returns the clone's copy of a consortium file that belongs to the commit; another file stays where it is."""
    path = consortium_file.resolve()
    top = _top(repository).resolve()
    if path.is_relative_to(top) and (clone / path.relative_to(top)).is_file():
        return clone / path.relative_to(top)
    if not path.is_file():
        raise ConfigError(f"{path}: no such consortium file, here or in the commit", fix="name the run's consortium.yaml")
    return path


def _consortium(file: Path, expected: Expected, clone: Path) -> tuple[Path, dict[str, Path]]:
    """Returns the consortium file to replay and the folder of each member's site file.

    A run may have had its own number of rounds; it is the one thing that is set. A rehearsal's charter is left out, since
    the private keys behind it are not in the clone: new ones are made, and the sum that is opened is the same.
    """
    read = read_yaml(file)
    document: dict[str, Any] = dict(read) if isinstance(read, dict) else {}
    members = document.get("members")
    if not isinstance(members, list) or not all(isinstance(m, dict) and {"site", "file"} <= set(m) for m in members):
        raise ConfigError(f"{file}: names no members", fix="name the run's consortium.yaml")
    named = {str(m["site"]): (file.parent / str(m["file"])).resolve() for m in members}
    absent = _absent(
        named | ({"reference": (file.parent / str(document["reference"])).resolve()} if document.get("reference") else {})
    )
    if absent:
        raise NotEvidenced(
            f"the data of {', '.join(absent)} are not on this machine: {'; '.join(absent.values())}",
            fix="replay where all sites' data are, or have each of them replay its own stages (docs/dvc.md)",
        )
    plan: dict[str, Any] = dict(document.get("plan") or {})
    encrypted = expected.encrypted or _setting({"settings": plan}, "security", "mode", "none") != "none"
    if encrypted and not document.get("simulated", False):
        raise NotEvidenced(
            "the private keys of the members are not on this machine, and each of them signs every encrypted round",
            fix="replay a consortium that is declared simulated; of this one, verify the ledger",
        )
    changed: dict[str, Any] = {}
    rounds = (expected.plan or {}).get("settings", {}).get("rounds")
    if isinstance(rounds, int) and rounds != plan.get("rounds"):
        changed["plan"] = plan | {"rounds": rounds}
    if encrypted and document.get("charter"):
        changed["charter"] = None
    if changed:  # in a file of its own, so that all of the commit stays as it is
        whole = document | changed
        whole["members"] = [m | {"file": str(named[str(m["site"])])} for m in members]
        for key in ("reference", "charter"):
            if whole.get(key):
                whole[key] = str((file.parent / str(whole[key])).resolve())
            else:
                whole.pop(key, None)
        file = clone / "replayed-consortium.yaml"
        files.write_atomic(file, yaml.safe_dump(whole, sort_keys=False, allow_unicode=True).encode())
    return file, {site: path.parent for site, path in named.items()}


def _absent(site_files: Mapping[str, Path]) -> dict[str, str]:
    """Returns, for every site whose data are not here, what is missing."""
    out: dict[str, str] = {}
    for site, path in site_files.items():
        if not path.is_file():
            out[site] = f"no {path}"
            continue
        settings = read_yaml(path)
        sources = settings.get("sources") if isinstance(settings, dict) else None
        try:
            wanted = [resolve_path(text, path.parent) for text in _paths(sources) if "://" not in text]
        except ConfigError:
            out[site] = "no folder of public data (FEDMAT_DATA)"
            continue
        gone = [p for p in wanted if not p.exists()]
        if gone:
            out[site] = f"no {gone[0]}"
    return out


def _paths(sources: object) -> Iterator[str]:
    """Yields every file and table a site file names; a file of another form is the stage's to refuse."""
    for source in sources if isinstance(sources, list) else ():
        if isinstance(source, dict):
            for part in (source, source.get("select"), source.get("structures")):
                if isinstance(part, dict):
                    yield from (str(part[key]) for key in ("path", "table") if part.get(key))


def _environment(clone: Path) -> dict[str, str]:
    """Returns the environment of the stages: this Python with the clone's code first, and no settings of another DVC or git."""
    dropped = ("DVC_", "GIT_", "PYTHONPATH", "PYTHONHOME", "FEDMAT_HOME")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    own = clone / ".dvc" / "tmp" / "replay"
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONPATH": str(clone),
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
        "DVC_GLOBAL_CONFIG_DIR": str(own / "global"),
        "DVC_SYSTEM_CONFIG_DIR": str(own / "system"),
        "DVC_SITE_CACHE_DIR": str(own / "cache"),
        "GIT_TERMINAL_PROMPT": "0",
    }
    try:
        environment["FEDMAT_DATA"] = str(data_home())  # where this process finds it; a stage runs in another folder
    except ConfigError:
        environment.pop("FEDMAT_DATA", None)
    return environment


def _check_code(clone: Path, environment: Mapping[str, str]) -> None:
    """Makes sure that what the stages will call ``python`` is this one, and that it imports the clone's code."""
    asked = "import sys, fedmat, pipelines; print(sys.prefix, fedmat.__file__, pipelines.__file__, sep='\\n')"
    try:
        done = subprocess.run(
            ["python", "-c", asked], cwd=clone, env=environment, capture_output=True, text=True, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise ServiceError("no 'python' is on the PATH", fix="start fedmat from its own environment") from error
    said = done.stdout.strip().splitlines()
    if done.returncode or len(said) != 3:
        why = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise ServiceError(f"the clone's code does not start: {why}", fix="install what that commit depends on")
    if Path(said[0]) != Path(sys.prefix):
        raise ServiceError(
            f"'python' is the one of {said[0]}, not of {sys.prefix}", fix="start fedmat from its own environment"
        )
    foreign = [path for path in said[1:] if not Path(path).resolve().is_relative_to(clone.resolve())]
    if foreign:
        raise ServiceError(f"{foreign[0]} would run, not the clone's code", fix="start fedmat from its own environment")


def _reproduce(clone: Path, environment: Mapping[str, str], progress: Callable[[str], None]) -> None:
    """Runs ``dvc repro``; every stage runs, whatever the commit's dvc.lock or a cache says is there already."""
    command = [sys.executable, "-m", "dvc", "repro", "--force", "--no-commit", "--no-run-cache", "evaluate"]
    stage: str | None = None
    tail: collections.deque[str] = collections.deque(maxlen=_TAIL)
    process = subprocess.Popen(
        command, cwd=clone, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        for line in process.stdout or ():
            begun = re.match(r"Running stage '([^']+)':", line)
            if begun:
                stage = begun[1]
                tail.clear()
                progress(stage)
            elif re.match(r"round \d+ of \d+", line):
                progress(f"{stage}: {line.strip()}")
            tail.append(line.rstrip())
        process.wait()
    finally:
        if process.poll() is None:  # interrupted: the stage's own processes go with it
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
        if process.stdout:
            process.stdout.close()
    if process.returncode:
        raise _failed(stage, list(tail))


def _failed(stage: str | None, lines: Sequence[str]) -> StateError | ServiceError:
    """Returns the error of a replay that stopped, in the stage's own words where it has some."""
    own = next((i for i, line in enumerate(lines) if line.startswith("error: ")), None)
    if stage is not None and own is not None:
        fix = next((line.removeprefix("  fix: ") for line in lines[own + 1 :] if line.startswith("  fix: ")), "")
        return StateError(f"stage {stage}: {lines[own].removeprefix('error: ')}", fix=fix)
    verdict = next((line for line in lines if line.startswith("ERROR: ")), "")
    reason = verdict.removeprefix("ERROR: ").split("': ", 1)[-1]
    before = [line for line in lines[: lines.index(verdict)] if line.strip() and not line.startswith(">")] if verdict else lines
    if not reason or reason.startswith("failed to run"):  # the stage's own last words say more
        reason = before[-1] if before else reason or "it says nothing"
    where = f"stage {stage}" if stage is not None else "dvc repro"
    return ServiceError(f"{where} broke off: {reason}", fix="run 'dvc repro' in the clone to see all of it")
