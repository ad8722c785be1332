"""What may stand in the ledger: a closed union of entry types, each signed by whoever asserts it.

Knows: the fields of every type, who has to sign it, its canonical bytes, and how an envelope is opened. Refuses to know: which
keys count at which place (``fedmat.ledger.fold``), where entries are kept (``fedmat.ledger.log``), records, the clock.

An entry holds digests, counts and names: whoever has an object can show that it is the one that was stated, and nobody learns a
record from it. What a party states about its own data is its signed word, not a proof that it trained on them.

References:
    RFC 8785 (canonical JSON). DSSE, Dead Simple Signing Envelope, https://github.com/secure-systems-lab/dsse.
    in-toto Attestation Framework v1 (a statement is about subjects with digests); the types here are fixed and ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from fedmat import files
from fedmat.config import SLUG, Settings, Terms
from fedmat.errors import ProtocolError
from fedmat.keys import Charter, Party, PartyKeys, Rotation
from fedmat.ledger import dsse

OPERATOR = "operator"  # the party that keeps the ledger; its key signs checkpoints too
LARGEST = 2**53 - 1  # of an integer that every JSON reader reads alike


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("not a finite number")
    return value


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=SLUG)]
Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$", description="UTC, whole seconds")]
Number = Annotated[float, AfterValidator(_finite)]
Count = Annotated[int, Field(ge=0, le=LARGEST, strict=True)]
Amount = Annotated[int, Field(ge=1, le=LARGEST, strict=True, description="whole credits")]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run's folder")]


class _Entry(Settings):
    consortium: Name
    by: Name = Field(description="who asserts it; further signers stand in the envelope")
    time: Time


class CharterEntry(_Entry):
    """The consortium's charter; entry 0 of a ledger. Signed by the operator and every site."""

    type: Literal["charter"] = "charter"
    keys: Charter = Field(description="whose keys are whose")
    operator: Party
    terms: Terms

    @property
    def sha256(self) -> str:
        """Digest that members compare by telephone: keys, operator and terms."""
        return charter_digest(self.keys, self.operator, self.terms)


class MembershipEntry(_Entry):
    """A site joins. Signed by itself, the operator and a quorum of the members."""

    type: Literal["membership"] = "membership"
    party: Party
    residency: str = Field("", description="country in which its data stay")


class DepartureEntry(_Entry):
    """A site leaves, by its own signature or a quorum's, with the operator's."""

    type: Literal["departure"] = "departure"
    site: Name
    reason: str = ""
    datasets: tuple[Sha256, ...] = Field(description="digests of the datasets that models trained later must not descend from")


class RotationEntry(_Entry):
    """A party replaces its keys; the old key signs."""

    type: Literal["rotation"] = "rotation"
    rotation: Rotation


class PlanEntry(_Entry):
    """A run begins: its plan, code and environment. Signed by the operator; what follows under the run's name belongs to it."""

    type: Literal["plan"] = "plan"
    run: RunName
    plan_sha256: Sha256
    sites: tuple[Name, ...]
    seed: int
    rounds: Count
    code_version: str
    git_commit: str = ""
    git_dirty: bool = False
    environment_sha256: Sha256 = Field(description="of environment.json: Python, platform, every installed release")
    consortium_file_sha256: Sha256


class DatasetEntry(_Entry):
    """A site's word on which data it takes part with. Signed by the site."""

    type: Literal["dataset"] = "dataset"
    run: RunName
    dataset_sha256: Sha256 = Field(description="the accepted records' manifest")
    attestation_sha256: Sha256 = Field(description="what the site attested before the first round")
    features_sha256: Sha256
    contract_version: str
    n_train: Count
    version: str = Field("", description="tag in the site's own DVC repository")
    git_commit: str = Field("", description="commit of that repository")
    sources: dict[str, Sha256] = Field(default_factory=dict, description="digest of every raw file")


class ContractReportEntry(_Entry):
    """How a site's data fared against the shared contract. Signed by the site."""

    type: Literal["contract_report"] = "contract_report"
    run: RunName
    dataset_sha256: Sha256
    validation_sha256: Sha256 = Field(description="of the site's validation.json")
    contract_version: str
    accepted: Count
    rejected: dict[str, Count] = Field(default_factory=dict, description="rows in quarantine by reason")


class UpdateEntry(_Entry):
    """A site commits to the update it sent in a round. Signed by the site."""

    type: Literal["update"] = "update"
    run: RunName
    round: Count
    sha256: Sha256 = Field(description="of the answer's bytes as they left")
    bytes: Count
    kind: Literal["Update", "Sealed"]


class ExclusionEntry(_Entry):
    """A site, or its update, did not count. Signed by the operator."""

    type: Literal["exclusion"] = "exclusion"
    run: RunName
    round: int = Field(ge=-1, description="-1: before the first round")
    site: Name
    kind: Literal["dropout", "rejection", "rule"]
    reason: str
    detail: str = ""


class AggregateEntry(_Entry):
    """A round closed. Signed by the operator."""

    type: Literal["aggregate"] = "aggregate"
    run: RunName
    round: Count
    rule: str
    protection: str
    shares: dict[str, Number] = Field(description="site -> weight of its update")
    updates: dict[str, Sha256] = Field(description="site -> digest of the answer that counted")
    model_sha256: Sha256 = Field(description="weights and scaling after the round")
    report_sha256: Sha256 = Field(description="of the round's report in canonical form, without measured seconds")
    evidence: dict[str, str] = Field(default_factory=dict, description="an encrypted round's digests: header, Gram matrix, sum")


class EvaluationEntry(_Entry):
    """A finished model was scored. Signed by the operator."""

    type: Literal["evaluation"] = "evaluation"
    run: RunName
    model_sha256: Sha256 = Field(description="of the model file")
    weights_sha256: Sha256 = Field(description="of its weights and scaling: the last round's model_sha256")
    held_out_sha256: Sha256
    metrics_sha256: Sha256
    evaluations_sha256: Sha256
    intervals_sha256: Sha256
    matching_sha256: Sha256
    metric: str
    score: Number | None = None


class RegistrationEntry(_Entry):
    """A model was registered. Signed by the operator."""

    type: Literal["registration"] = "registration"
    run: RunName
    model_sha256: Sha256
    name: str
    version: Count
    aliases: tuple[str, ...] = ()
    decision: str = ""


class ApprovalEntry(_Entry):
    """A member's word on whether a model may become champion. Signed by the member, over model and evaluation."""

    type: Literal["approval"] = "approval"
    run: RunName
    model_sha256: Sha256
    metrics_sha256: Sha256
    approves: bool
    note: str = ""


class EgressEntry(_Entry):
    """How much left a site up to now: its egress ledger's size and root. Signed by the site."""

    type: Literal["egress"] = "egress"
    run: RunName
    size: Count
    root: Sha256 = Field(description="RFC 9162 root over the lines of the site's egress ledger")
    bytes: Count = Field(description="of this run's objects")
    objects: Count = Field(description="of this run")


class ContributionEntry(_Entry):
    """What each site's data were worth to a model. Signed by the operator; the evidence may carry the Auditor's signature."""

    type: Literal["contribution"] = "contribution"
    run: RunName
    model_sha256: Sha256
    method: Literal["settlement", "gram", "retrained"]
    shares: dict[str, Number]
    errors: dict[str, Number] = Field(default_factory=dict)
    evidence_sha256: Sha256 = Field(description="of settlement.json, or of the rounds' reports")


class MintEntry(_Entry):
    """Credits made from a contribution. Signed by the operator; anyone works the amounts out again."""

    type: Literal["credit_mint"] = "credit_mint"
    run: RunName
    model_sha256: Sha256
    contribution: Count = Field(description="index of the contribution's entry")
    amounts: dict[str, Count]


class TransferEntry(_Entry):
    """A member gives credits to another. Signed by the giver."""

    type: Literal["credit_transfer"] = "credit_transfer"
    to: Name
    amount: Amount
    sequence: Amount = Field(description="one more than the giver's last transfer or spend: none counts twice")
    note: str = ""


class SpendEntry(_Entry):
    """A member spends credits on access. Signed by the member."""

    type: Literal["credit_spend"] = "credit_spend"
    what: Literal["tier", "priority"]
    item: str = Field(description="the tier's name, or the model served with priority")
    amount: Amount
    sequence: Amount


class PodEntry(_Entry):
    """Some members form a pod with a task of its own. Signed by the operator and every member of the pod."""

    type: Literal["pod"] = "pod"
    name: Name
    members: tuple[Name, ...]
    task: str
    model_sha256: Sha256 | None = Field(None, description="a model it starts from")


Entry = Annotated[
    CharterEntry | MembershipEntry | DepartureEntry | RotationEntry | PlanEntry | DatasetEntry | ContractReportEntry
    | UpdateEntry | ExclusionEntry | AggregateEntry | EvaluationEntry | RegistrationEntry | ApprovalEntry | EgressEntry
    | ContributionEntry | MintEntry | TransferEntry | SpendEntry | PodEntry,
    Field(discriminator="type"),
]  # fmt: skip
_ENTRY: TypeAdapter[Any] = TypeAdapter(Entry)
TYPES: tuple[str, ...] = tuple(_ENTRY.json_schema()["discriminator"]["mapping"])


def charter_digest(keys: Charter, operator: Party, terms: Terms) -> str:
    """Returns the digest of a charter: keys, operator and terms."""
    parts = {"keys": keys, "operator": operator, "terms": terms}
    return files.sha256(files.canonical_json({k: v.model_dump(mode="json") for k, v in parts.items()}))


def payload(entry: _Entry) -> bytes:
    """Returns an entry's canonical bytes."""
    return files.canonical_json(entry.model_dump(mode="json", by_alias=True))


def seal(entry: _Entry, signers: Sequence[PartyKeys]) -> bytes:
    """Returns an entry in its signed envelope, as it stands in the log.

    Args:
        signers: ``entry.by`` first.
    """
    return dsse.sign(payload(entry), signers).encode()


def cosign(envelope: bytes, signer: PartyKeys) -> bytes:
    """Returns an envelope with one more signature."""
    before = dsse.parse(envelope)
    more = dsse.sign(before.payload, [signer], before.payload_type)
    merged = tuple(sorted((dict(before.signatures) | dict(more.signatures)).items()))
    return dsse.Envelope(before.payload, before.payload_type, merged).encode()


def placed(error: ProtocolError, where: str) -> ProtocolError:
    """Returns an error with the place in front of what it says."""
    return ProtocolError(error.reason, f"{where}: {error.what.removeprefix(error.reason + ': ')}", fix=error.fix)


def open_envelope(data: bytes, where: str = "entry") -> tuple[Any, dsse.Envelope]:
    """Returns the entry in an envelope and the envelope, its signatures not checked yet.

    Args:
        where: the entry's place, for messages.

    Raises:
        ProtocolError: not_canonical (not exactly the bytes an entry has), unknown_entry (no such type, or a wrong field).
    """
    try:
        envelope = dsse.parse(data)
    except ProtocolError as error:
        raise placed(error, where) from None
    if envelope.payload_type != dsse.PAYLOAD_TYPE:
        raise ProtocolError("unknown_entry", f"{where}: its payload is of another type than {dsse.PAYLOAD_TYPE}")
    return read(envelope.payload, where), envelope


def read(data: bytes, where: str = "entry") -> Any:
    """Returns the entry in canonical bytes; errors as :func:`open_envelope`."""
    try:
        entry = _ENTRY.validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if first["type"].startswith("union_tag"):
            raise ProtocolError(
                "unknown_entry",
                f"{where}: of no known type",
                fix="a newer fedmat may know it; this one counts nothing it does not know",
            ) from None
        place = ".".join(str(p) for p in first["loc"])
        raise ProtocolError("unknown_entry", f"{where}: field {place}: {first['msg'].lower()}") from None
    if payload(entry) != data:
        raise ProtocolError("not_canonical", f"{where}: its bytes are not the canonical form of what they say")
    return entry


def same(a: _Entry, b: _Entry) -> bool:
    """Tells whether two entries state the same, at whatever time."""
    return a.model_copy(update={"time": b.time}) == b


def report_digest(report: Mapping[str, Any]) -> str:
    """Returns the digest of a round's report (plain JSON) without what is measured and differs from run to run."""
    told = {k: v for k, v in report.items() if k not in ("seconds", "overhead_seconds")}
    return files.sha256(files.canonical_json(told))
