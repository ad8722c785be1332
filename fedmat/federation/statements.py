"""What a site signs for the members' ledger about a run: its data, how they fared, every update it sent, all that left.

Knows: the site's manifest, validation result, published version and egress ledger, and the site's signing key. Refuses to know:
records, what other sites state, the ledger's state.

A site signs what its own books say. An update that the coordinator counted and this site's egress ledger does not know is not signed,
and the site says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedmat import egress, files, wire
from fedmat.domain import Attestation, Statements, StatementsRequest
from fedmat.errors import StateError
from fedmat.keys import PartyKeys
from fedmat.ledger import entries
from fedmat.ledger.entries import ContractReportEntry, DatasetEntry, EgressEntry, UpdateEntry
from fedmat.ledger.text import stamp

_UPDATES = ("Update", "Sealed")


@dataclass(frozen=True)
class Signing:
    """A site's signing key and its clock."""

    keys: PartyKeys
    now: Callable[[], datetime] = lambda: datetime.now(UTC)


def answer(
    request: StatementsRequest, attestation: Attestation, manifest: Mapping[str, Any], folder: Path, signing: Signing
) -> Statements:
    """Returns a site's signed entries about a run.

    Args:
        attestation: as the site attested before the first round.
        manifest: of its accepted records.
        folder: the site's workspace.

    Raises:
        StateError: the coordinator counted an update that did not leave this site, or the egress ledger is damaged.
        ProtocolError: bad_egress.
    """
    site = attestation.site
    data = egress.read(folder / egress.BOOK)
    lines = egress.lines(data, f"{site}: {egress.BOOK}")
    mine = [
        n for n in lines
        if (n["plan_sha256"], n["dataset_sha256"]) == (request.plan_sha256, attestation.dataset_sha256)
    ]  # fmt: skip
    about = {
        "consortium": request.consortium,
        "by": site,
        "time": stamp(signing.now()),
        "run": request.run,
    }
    validation = folder / "validation.json"
    tag, commit = _version(folder, attestation.dataset_sha256)
    told: list[Any] = [
        DatasetEntry(
            **about,
            dataset_sha256=attestation.dataset_sha256,
            attestation_sha256=files.sha256(files.canonical_json(wire.plain(attestation))),
            features_sha256=attestation.features_sha256,
            contract_version=attestation.contract_version,
            n_train=attestation.n_train,
            version=tag,
            git_commit=commit,
            sources={name: str(s["file_sha256"]) for name, s in dict(manifest.get("sources", {})).items()},
        ),
        *(
            [ContractReportEntry(
                **about,
                dataset_sha256=attestation.dataset_sha256,
                validation_sha256=files.sha256_file(validation),
                contract_version=attestation.contract_version,
                accepted=int(manifest["n_records"]),
                rejected=dict(attestation.rejected),
            )]
            if validation.exists()
            else []
        ),
        *_updates(request, mine, about, site),
        EgressEntry(
            **about,
            size=len(lines),
            root=egress.root(data).hex(),
            bytes=sum(n["bytes"] for n in mine),
            objects=len(mine),
        ),
    ]  # fmt: skip
    envelopes = tuple(entries.seal(entry, [signing.keys]).decode() for entry in told)
    return Statements(site, envelopes, data.decode())


def _updates(
    request: StatementsRequest, mine: Sequence[Mapping[str, Any]], about: Mapping[str, Any], site: str
) -> list[UpdateEntry]:
    sent = {(n["round"], n["sha256"]): n for n in mine if n["kind"] in _UPDATES}
    found = []
    for number, sha256 in sorted(request.updates.items(), key=lambda item: int(item[0])):
        line = sent.get((int(number), sha256))
        if line is None:
            raise StateError(
                f"site {site}: the coordinator counts an update in round {int(number) + 1} that has not left this site",
                fix="compare the site's egress ledger with the round's report",
            )
        found.append(UpdateEntry(**about, round=int(number), sha256=sha256, bytes=line["bytes"], kind=line["kind"]))
    return found


def _version(folder: Path, dataset_sha256: str) -> tuple[str, str]:
    """Returns tag and commit under which the site published these data; empty where it did not."""
    from fedmat.data import versions

    found = [v for v in versions.history(folder) if v.sha256 == dataset_sha256]
    return (found[-1].tag, found[-1].git_commit) if found else ("", "")
