"""A site's accepted records: from its own files to one verified snapshot, with everything refused kept in quarantine.

Knows: the order of intake (read, judge, quarantine, admit, write) and the files of a site's workspace. Refuses to know:
file formats and units (``adapters``), reasons for refusal (``validation``), features, other sites.

A snapshot is replaced as a whole or not at all. Rejected rows are written, complete and with their reasons, to
``quarantine/`` of the site's workspace and nowhere else; messages, manifest and validation.json count them.
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

from fedmat import files
from fedmat.config import Admission, SiteConfig
from fedmat.data import quarantine, splits, validation
from fedmat.data.adapters import read_source
from fedmat.data.contract import CONTRACT_VERSION, RecordType, censored_columns, record_columns, record_type
from fedmat.data.mapping import RawBatch
from fedmat.data.quarantine import Finding
from fedmat.errors import ConfigError, FedmatError, SiteRefused, StateError

SCHEMA = "fedmat/manifest/1"
_log = logging.getLogger(__name__)

Problem = tuple[str, str]  # what, fix


@dataclass(frozen=True)
class Snapshot:
    """A site's accepted records.

    Attributes:
        sha256: digest of the manifest; the name of this version of the data.
        rejected: rejected rows by reason code (a row with several counts under its first).
    """

    site: str
    folder: Path
    sha256: str
    n_records: int
    n_rejected: int
    rejected: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckReport:
    """What ``fedmat site check`` tells a newcomer; holds no value of any record.

    Attributes:
        problems: what keeps the site from taking part, each with its remedy.
        warnings: what it may want to know.
    """

    site: str
    record_type: str
    target: str
    n_rows: int
    n_accepted: int
    n_rejected: int
    n_groups: int
    findings: tuple[Finding, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the site could take part as it is."""
        return not self.problems


def prepare(site: SiteConfig, base: Path, folder: Path, *, target: str | Sequence[str], admission: Admission) -> Snapshot:
    """Ingests a site's data into its workspace.

    Args:
        base: the folder of site.yaml.
        folder: the site's workspace; see the module's head for what is written.
        target: contract field the consortium predicts; a row without it is rejected. Of several, a row needs one.

    Returns:
        The snapshot; the same data give the same digest, whatever was there before.

    Raises:
        ConfigError, DataError: the mapping or a source is wrong.
        SiteRefused: too many rows rejected, too few records or groups, or no target that varies. The quarantine is
            written all the same; an earlier snapshot stays as it was.
        StateError: the workspace cannot be written; what was there before stays as it was.
    """
    targets = _targets(target)
    rt = _record_type(site, targets)
    batches = {source.name: read_source(site, source, base, rt) for source in site.sources}
    accepted, rejected, content = _judge(site, base, rt, targets, batches)
    quarantine.write(folder, site.site, rejected)
    problems = _refusals(site, rt, targets, admission, accepted, rejected)
    if problems:
        what, fix = problems[0]
        raise SiteRefused(f"site {site.site}: {what}", fix=fix)
    try:
        verdict = validation.run_suite(accepted, rt)
    except SiteRefused as error:
        raise SiteRefused(f"site {site.site}: {error.what}", fix=error.fix) from None
    if not verdict.success:
        raise SiteRefused(
            f"site {site.site}: the accepted records break the {rt.name} suite: {', '.join(verdict.failed)}",
            fix=f"see expectations/{rt.name}.json for what the batch must satisfy",
        )
    parquet = quarantine.table_bytes(accepted)
    counts = quarantine.counts(rejected)
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "site": site.site,
        "record_type": rt.name,
        "contract_version": CONTRACT_VERSION,
        "files": {"records.parquet": {"sha256": files.sha256(parquet), "bytes": len(parquet)}},
        "content_sha256": content,
        "n_records": len(accepted),
        "n_rejected": sum(counts.values()),
        "rejected": counts,
        "sources": {name: {"file_sha256": batch.file_sha256} for name, batch in batches.items()},
    }
    manifest["sha256"] = _manifest_sha256(manifest)
    quarantine.write_whole(
        folder,
        {
            "records.parquet": parquet,
            "validation.json": files.json_bytes(verdict.document),
            "manifest.json": files.json_bytes(manifest),  # last: it vouches for the others
        },
        f"site {site.site}: the snapshot",
    )
    _log.info("site %s: %d records accepted, %d rows rejected", site.site, len(accepted), manifest["n_rejected"])
    return Snapshot(site.site, folder, manifest["sha256"], len(accepted), manifest["n_rejected"], counts)


def load_records(folder: Path) -> pd.DataFrame:
    """Returns the accepted records of a workspace after checking them against their manifest.

    ``attrs`` of the result hold ``site``, ``record_type`` and ``sha256`` (the manifest's).

    Raises:
        StateError: there is no snapshot, or it is not the one its manifest vouches for.
    """
    again = "run the prepare step again; it rebuilds the snapshot from the site's own files"
    manifest = files.read_json(folder / "manifest.json")
    try:
        good = manifest["schema"] == SCHEMA and manifest["sha256"] == _manifest_sha256(manifest)
        stated = manifest["files"]["records.parquet"]["sha256"]
        facts = {name: str(manifest[name]) for name in ("site", "record_type", "sha256")}
    except (KeyError, TypeError):
        good = False
    if not good:
        raise StateError(f"{folder / 'manifest.json'}: not a manifest this fedmat wrote, or edited since", fix=again)
    path = folder / "records.parquet"
    try:
        data = path.read_bytes()
    except OSError:
        raise StateError(f"{path}: cannot be read", fix=again) from None
    if files.sha256(data) != stated:
        raise StateError(f"{path}: not the file its manifest states (half written or edited)", fix=again)
    records = pd.read_parquet(io.BytesIO(data))
    records.attrs.update(facts)
    return records


def check(site: SiteConfig, base: Path, *, target: str | Sequence[str], admission: Admission | None = None) -> CheckReport:
    """Tells what is wrong with a site's data and mapping, in its own column names; nothing is written.

    Args:
        base: the folder of site.yaml.
        target: contract field the consortium predicts, or several of which a row needs one.
        admission: the consortium's limits; the defaults when not given.
    """
    problems: list[str] = []
    batches: dict[str, RawBatch] = {}
    targets = _targets(target)
    named = ", ".join(targets)
    try:
        rt = _record_type(site, targets)
    except FedmatError as error:
        return CheckReport(site.site, site.record_type, named, 0, 0, 0, 0, (), (str(error),))
    for source in site.sources:
        try:
            batches[source.name] = read_source(site, source, base, rt)
        except FedmatError as error:
            problems.append(str(error))
    if not batches:
        return CheckReport(site.site, rt.name, named, 0, 0, 0, 0, (), tuple(problems))
    try:
        accepted, rejected, _ = _judge(site, base, rt, targets, batches)
    except FedmatError as error:
        return CheckReport(site.site, rt.name, named, 0, 0, 0, 0, (), (*problems, str(error)))
    n_rejected = sum(quarantine.counts(rejected).values())
    refused = _refusals(site, rt, targets, admission or Admission(), accepted, rejected)
    torn = splits.torn_groups(accepted)
    return CheckReport(
        site=site.site,
        record_type=rt.name,
        target=named,
        n_rows=len(accepted) + n_rejected,
        n_accepted=len(accepted),
        n_rejected=n_rejected,
        n_groups=accepted["group"].nunique(),
        findings=quarantine.findings(site, rejected),
        problems=(*problems, *(f"{what}\n  fix: {fix}" for what, fix in refused)),
        warnings=(f"the published split has {torn} groups on both sides; it is kept as published",) if torn else (),
    )


# --- judging -------------------------------------------------------------------------------------------------------


def _targets(target: str | Sequence[str]) -> tuple[str, ...]:
    targets = (target,) if isinstance(target, str) else tuple(target)
    if not targets:
        raise ConfigError("no target is named", fix="name the contract field, or fields, to be predicted")
    return targets


def _record_type(site: SiteConfig, targets: Sequence[str]) -> RecordType:
    rt = record_type(site.record_type)
    for target in targets:
        if rt.field(target).kind != "number":
            raise ConfigError(
                f"site {site.site}: target '{target}' is a {rt.field(target).kind}, not a number",
                fix=f"predict one of {', '.join(f.name for f in rt.fields if f.measured)}",
            )
    return rt


def _judge(
    site: SiteConfig, base: Path, rt: RecordType, targets: Sequence[str], batches: Mapping[str, RawBatch]
) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Returns accepted records (all columns of records.parquet), one line for every bad cell, the accepted rows' digest."""
    frames = [b.frame for b in batches.values() if len(b.frame)]
    everything = pd.concat(frames, ignore_index=True) if frames else next(iter(batches.values())).frame
    accepted, judged = validation.split_valid(everything, rt, target=targets)
    lines = [b.rejected for b in batches.values()] + [quarantine.complete(site, base, judged)]
    rejected = pd.concat([line for line in lines if len(line)] or lines[:1], ignore_index=True)
    order = {source.name: i for i, source in enumerate(site.sources)}
    rejected = _in_order(rejected, order).loc[:, list(quarantine.COLUMNS)]
    records, content = _as_records(_in_order(accepted, order), site, rt)
    return records, rejected, content


def _in_order(frame: pd.DataFrame, order: Mapping[str, int]) -> pd.DataFrame:
    """Returns rows by place in the site's sources, bad cells of one row in the order they were found."""
    places = list(zip(frame["source"], frame["source_row"], strict=True))
    return frame.iloc[sorted(range(len(frame)), key=lambda i: (order[str(places[i][0])], int(places[i][1])))].reset_index(
        drop=True
    )


def _as_records(accepted: pd.DataFrame, site: SiteConfig, rt: RecordType) -> tuple[pd.DataFrame, str]:
    digests = [sha256(row) for row in _content(accepted, rt)]
    out = accepted.assign(record_id=[d.hexdigest()[:16] for d in digests])
    parts = zip(*(validation.keys(accepted[name], rt.field(name)) for name in rt.group), strict=True)
    known: dict[tuple[Any, ...], str] = {}
    out["group"] = [known.get(p) or known.setdefault(p, files.sha256(files.canonical_json(list(p)))[:16]) for p in parts]
    out = out.loc[:, list(record_columns(rt))].astype({"source_row": "int64"})
    out.attrs["site"] = site.site
    content = sha256()
    places = zip(*(out[c] for c in ("group", "split_hint", "source", "source_row")), strict=True)
    for digest, place in zip(digests, places, strict=True):
        content.update(f"{digest.hexdigest()} {' '.join(map(str, place))}\n".encode())
    return out, content.hexdigest()


def _refusals(
    site: SiteConfig,
    rt: RecordType,
    targets: Sequence[str],
    admission: Admission,
    accepted: pd.DataFrame,
    rejected: pd.DataFrame,
) -> list[Problem]:
    """Returns every reason for which these records may not take part, the most telling one first."""
    counts = quarantine.counts(rejected)
    n_rejected = sum(counts.values())
    n_rows = len(accepted) + n_rejected
    places = "; ".join(f"source '{s.name}' ({s.path or s.adapter})" for s in site.sources)
    field_of = "; ".join(
        f"{s.name}: column {', '.join(quarantine.own_column(s, target) for target in targets)}" for s in site.sources
    )
    out: list[Problem] = []
    if n_rows and n_rejected / n_rows > admission.max_rejected_fraction:
        by_reason = ", ".join(f"{code} {n}" for code, n in counts.items())
        worst = Counter(
            (str(s), str(c), str(f)) for s, c, f in zip(rejected["source"], rejected["column"], rejected["field"], strict=True)
        )
        source, column, name = worst.most_common(1)[0][0]
        out.append(
            (
                f"{n_rejected} of {n_rows} rows rejected, the consortium admits {admission.max_rejected_fraction:.0%}: {by_reason}; "
                f"most often in source '{source}' ({quarantine.path_of(site, source)}), column '{column}' (field {name or ', '.join(rt.unique)})",
                "see quarantine/reasons.csv in the site's workspace; mend the data or the mapping in site.yaml",
            )
        )
    if not len(accepted):
        out.append((f"no record was accepted from {places}", "name the file, sheet or rows that hold the records"))
        return out
    usable = int((accepted["split_hint"] != "test").sum())
    if usable < admission.min_train_records:
        out.append(
            (
                f"{usable} records to train on, from {places}; the consortium asks for {admission.min_train_records}",
                "add data, or ask the operator to lower admission.min_train_records",
            )
        )
    if all(accepted[target].nunique() < 2 for target in targets):
        named = "', '".join(targets)
        out.append(
            (
                f"field '{named}' has the same value in all {len(accepted)} records of {places} ({field_of}): nothing to learn",
                "check which column the target is mapped to, and 'where' and 'select' in site.yaml",
            )
        )
    problem = splits.problem(accepted)
    if problem:
        out.append((f"{problem[0]}; groups are rows equal in {', '.join(rt.group)}, from {places}", problem[1]))
    return out


# --- digests and files ---------------------------------------------------------------------------------------------


def _content(accepted: pd.DataFrame, rt: RecordType) -> list[bytes]:
    """Returns each record's contract fields as canonical JSON; an absent number is null."""
    names = [f.name for f in rt.fields] + list(censored_columns(rt))
    columns = [
        [None if v != v else float(v) for v in accepted[n]] if accepted[n].dtype.kind == "f" else list(accepted[n])
        for n in names
    ]
    return [files.canonical_json(dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]


def _manifest_sha256(manifest: Mapping[str, Any]) -> str:
    return files.sha256(files.canonical_json({k: v for k, v in manifest.items() if k != "sha256"}))
