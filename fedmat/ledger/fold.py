"""What the ledger says when it is read from the first entry to the last: who is a member, whose keys count, what was approved.

Knows: which signatures every type of entry needs, the order of times, the rules of joining, leaving, approving and minting.
Refuses to know: how entries are stored and proved to be in a tree, records, the clock.

The fold is a function of the entries alone: whoever has them comes to the same state, and an entry that breaks a rule is refused
at its place by everyone alike.

References:
    The Update Framework, specification section 5.3 (keys count from where the chain puts them). Lamport, "Time, clocks, and the
    ordering of events in a distributed system", CACM 1978 (the log's order is the order; times only bound it).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from fedmat.config import Terms
from fedmat.errors import ProtocolError
from fedmat.keys import Party
from fedmat.ledger import dsse, entries
from fedmat.ledger.credits import Credits
from fedmat.ledger.entries import (
    OPERATOR,
    AggregateEntry,
    ApprovalEntry,
    CharterEntry,
    ContractReportEntry,
    ContributionEntry,
    DatasetEntry,
    DepartureEntry,
    EgressEntry,
    EvaluationEntry,
    ExclusionEntry,
    MembershipEntry,
    MintEntry,
    PlanEntry,
    PodEntry,
    RegistrationEntry,
    RotationEntry,
    SpendEntry,
    TransferEntry,
    UpdateEntry,
)

SKEW = timedelta(days=1)  # between clocks of honest parties; an entry older than that, put at the end, is back-dated
COLLECTING = timedelta(days=30)  # while signatures of several companies are collected, others go on
_BY_OPERATOR = (
    PlanEntry, ExclusionEntry, AggregateEntry, EvaluationEntry, RegistrationEntry, ContributionEntry, MintEntry,
)  # fmt: skip
_BY_SEVERAL = (CharterEntry, MembershipEntry, DepartureEntry, PodEntry)
CHAMPION = "champion"


@dataclass(frozen=True)
class Placed:
    """An entry and its index in the log."""

    index: int
    entry: Any


@dataclass
class RunEntries:
    """All entries of one run, each with its place."""

    plan: Placed
    datasets: dict[str, Placed] = field(default_factory=dict)
    reports: dict[str, Placed] = field(default_factory=dict)
    updates: dict[tuple[int, str], Placed] = field(default_factory=dict)
    exclusions: list[Placed] = field(default_factory=list)
    aggregates: dict[int, Placed] = field(default_factory=dict)
    evaluation: Placed | None = None
    registration: Placed | None = None
    contributions: list[Placed] = field(default_factory=list)
    mint: Placed | None = None
    egress: dict[str, Placed] = field(default_factory=dict)
    approvals: dict[str, Placed] = field(default_factory=dict)

    def all(self) -> Iterator[Placed]:
        """Yields every entry of the run, the plan first."""
        yield self.plan
        for found in (self.datasets, self.reports, self.updates, self.aggregates, self.egress, self.approvals):
            yield from found.values()
        yield from (*self.exclusions, *self.contributions)
        yield from (p for p in (self.evaluation, self.registration, self.mint) if p is not None)

    def approved_by(self) -> tuple[str, ...]:
        """Returns the members that approve the model as it was evaluated."""
        return tuple(sorted(s for s, p in self.approvals.items() if p.entry.approves))


@dataclass(frozen=True)
class Keyed:
    """A party's entry and from which index of the log to which it counts (``until`` not included; None: still)."""

    party: Party
    since: int
    until: int | None = None


@dataclass(frozen=True)
class Asked:
    """Who has to sign an entry.

    Attributes:
        parties: name -> keys that count for it.
        needed: who must sign.
        votes: how many members must have signed besides or among them.
    """

    parties: dict[str, Party]
    needed: frozenset[str]
    votes: int


class Fold:
    """The state after some entries.

    Attributes:
        consortium: from the first entry.
        size: entries applied.
        charter: the charter's entry in force, with its place.
        operator: party that keeps the ledger.
        parties: name -> party in force, roles included.
        sites: sites that are members now.
        history: name -> keys over time.
        departures: entries of sites that left.
        pods: name -> entry.
        runs: name -> entries of that run.
        credits: who has how many.
    """

    def __init__(self) -> None:
        self.consortium = ""
        self.size = 0
        self.charter: Placed | None = None
        self.parties: dict[str, Party] = {}
        self.history: dict[str, list[Keyed]] = {}
        self.sites: set[str] = set()
        self.departures: list[Placed] = []
        self.pods: dict[str, Placed] = {}
        self.runs: dict[str, RunEntries] = {}
        self.credits = Credits()
        self._latest = ""
        self._last: dict[str, str] = {}
        self._payloads: dict[str, int] = {}  # a signature more or less makes other bytes of the same entry

    @classmethod
    def of(cls, log: Iterable[bytes]) -> Fold:
        """Returns the state after all entries of a log.

        Raises:
            ProtocolError: the first entry that breaks a rule; the message names its index.
        """
        fold = cls()
        for data in log:
            fold.apply(data)
        return fold

    @property
    def terms(self) -> Terms:
        """The terms in force."""
        terms: Terms = self._charter().terms
        return terms

    @property
    def operator(self) -> Party:
        """The party that keeps the ledger, as its keys are now."""
        return self.parties[OPERATOR]

    def organisations(self) -> dict[str, str]:
        """Returns site -> its owner, of every site that is or was a member."""
        return {name: known[-1].party.organisation for name, known in self.history.items() if known[-1].party.kind == "site"}

    def needed(self) -> int:
        """Returns how many of the present members are a quorum."""
        return self.terms.needed(len(self.sites))

    def key_at(self, name: str, size: int) -> Party | None:
        """Returns a party's keys as they were after ``size`` entries; None if it was none then."""
        last = size - 1
        for keyed in self.history.get(name, ()):
            if keyed.since <= last and (keyed.until is None or last < keyed.until):
                return keyed.party
        return None

    def sites_at(self, size: int) -> tuple[str, ...]:
        """Returns the sites that were members after ``size`` entries."""
        return tuple(sorted(n for n in self.history if (p := self.key_at(n, size)) is not None and p.kind == "site"))

    def apply(self, data: bytes) -> Any:
        """Takes the next entry in and returns it; a refused one changes nothing.

        Raises:
            ProtocolError: unknown_entry, not_canonical, bad_signature, key_not_in_force, clock_backwards, foreign_bundle,
                no_quorum, unknown_member, conflicting_entry, no_approval, or a reason of ``fedmat.ledger.credits``.
        """
        where = f"entry {self.size}"
        entry, envelope = entries.open_envelope(data, where)
        first = self._payloads.get(envelope.payload_sha256)
        if first is not None:
            raise ProtocolError("replayed_entry", f"{where}: says word for word what entry {first} says")
        if self.size == 0:
            self._signed(entry, envelope, where)
        else:
            if entry.consortium != self.consortium:
                raise ProtocolError(
                    "foreign_bundle", f"{where}: of consortium {entry.consortium}, this ledger is {self.consortium}'s"
                )
            self._in_time(entry, where)
            self._signed(entry, envelope, where)
        self._take(Placed(self.size, entry), where)
        self._latest = max(self._latest, entry.time)
        if not isinstance(entry, _BY_SEVERAL):
            self._last[entry.by] = entry.time
        self._payloads[envelope.payload_sha256] = self.size
        self.size += 1
        return entry

    # --- signatures and times --------------------------------------------------------------------------------------

    def _in_time(self, entry: Any, where: str) -> None:
        several = isinstance(entry, _BY_SEVERAL)  # dated when it was proposed
        before = self._last.get(entry.by, "")
        if not several and entry.time < before:
            raise ProtocolError("clock_backwards", f"{where}: {entry.by} signs at {entry.time}, after it signed at {before}")
        allowed = COLLECTING if several else SKEW
        if _time(entry.time, where) < _time(self._latest, where) - allowed:
            raise ProtocolError(
                "clock_backwards",
                f"{where}: dated {entry.time}, more than {allowed.days} days before an earlier entry ({self._latest})",
                fix="propose it anew and sign it again",
            )

    def asked(self, entry: Any, where: str = "entry") -> Asked:
        """Returns whose signatures an entry needs as the next one; whether it has them is not looked at.

        Raises:
            ProtocolError: truncated_log, bad_signature (it is not this party's to state), conflicting_entry, unknown_member.
        """
        if self.size == 0 and not isinstance(entry, CharterEntry):
            raise ProtocolError("truncated_log", f"{where}: a ledger begins with the charter, this one with a {entry.type}")
        parties = dict(self.parties)
        needed: set[str] = {entry.by}
        votes = 0
        if isinstance(entry, CharterEntry):
            if entry.operator.name != OPERATOR or entry.by != OPERATOR:
                raise ProtocolError("bad_signature", f"{where}: a charter is the {OPERATOR}'s entry, signed by every site too")
            parties = {p.name: p for p in (*entry.keys.parties, entry.operator)} | parties
            needed = {OPERATOR, *self.sites, *entry.keys.sites}
        elif isinstance(entry, _BY_OPERATOR):
            if entry.by != OPERATOR:
                raise ProtocolError("bad_signature", f"{where}: a {entry.type} is the {OPERATOR}'s to state, not {entry.by}'s")
        elif isinstance(entry, MembershipEntry):
            self._may_join(entry, where)
            parties[entry.party.name] = entry.party
            needed, votes = {OPERATOR, entry.party.name}, self.needed()
        elif isinstance(entry, DepartureEntry):
            self._member(entry.site, where)
            needed, votes = ({OPERATOR, entry.site}, 0) if entry.by == entry.site else ({OPERATOR}, self.needed())
        elif isinstance(entry, PodEntry):
            for member in entry.members:
                self._member(member, where)
            needed = {OPERATOR, *entry.members}
        elif entry.by != OPERATOR or not isinstance(entry, RotationEntry):
            self._member(entry.by, where, roles=isinstance(entry, RotationEntry))
        return Asked(parties, frozenset(needed), votes)

    def signers(self, envelope: dsse.Envelope, asked: Asked, time: str, where: str = "entry") -> set[str]:
        """Verifies every signature of an envelope and returns whose they are.

        Args:
            time: at which the entry is dated.

        Raises:
            ProtocolError: bad_signature, key_not_in_force.
        """
        known = {dsse.key_id(bytes.fromhex(p.signing)): p for p in asked.parties.values()}
        gone = {dsse.key_id(bytes.fromhex(k.party.signing)): name for name, ks in self.history.items() for k in ks}
        found: set[str] = set()
        for keyid in envelope.signers:
            party = known.get(keyid)
            if party is None and keyid in gone:
                raise ProtocolError(
                    "key_not_in_force", f"{where}: signed with a key of {gone[keyid]} that does not count at this place",
                    fix="a key counts from the entry that brings it to the one that replaces it",
                )  # fmt: skip
            if party is None:
                raise ProtocolError("bad_signature", f"{where}: signed with a key ({keyid}) that is no party's")
            if time[:10] > party.not_after.isoformat():
                raise ProtocolError(
                    "key_not_in_force", f"{where}: dated {time}, the key of {party.name} ended on {party.not_after}"
                )
            try:
                dsse.verify(envelope, keyid, bytes.fromhex(party.signing))
            except ProtocolError:
                raise ProtocolError(
                    "bad_signature", f"{where}: the signature of {party.name} does not fit what it says"
                ) from None
            found.add(party.name)
        return found

    def _signed(self, entry: Any, envelope: dsse.Envelope, where: str) -> None:
        """Refuses an entry that lacks a signature its type needs, or has one that does not count."""
        asked = self.asked(entry, where)
        found = self.signers(envelope, asked, entry.time, where)
        if lacking := sorted(asked.needed - found):
            raise ProtocolError("bad_signature", f"{where}: not signed by {', '.join(lacking)}")
        voted = len(found & self.sites)
        if voted < asked.votes:
            raise ProtocolError(
                "no_quorum", f"{where}: {entry.type} signed by {voted} of {len(self.sites)} members; {asked.votes} are needed",
                fix="collect the missing signatures with fedmat ledger sign",
            )  # fmt: skip

    def _may_join(self, entry: MembershipEntry, where: str) -> None:
        name = entry.party.name
        if name in self.parties or entry.party.kind != "site":
            raise ProtocolError("conflicting_entry", f"{where}: {name} is a party already, or no site")
        if self.organisations().get(name, entry.party.organisation) != entry.party.organisation:
            raise ProtocolError(
                "conflicting_entry", f"{where}: {name} was the name of another organisation's site, whose credits it has",
                fix="join under another name",
            )  # fmt: skip

    # --- what each type changes ------------------------------------------------------------------------------------

    def _take(self, placed: Placed, where: str) -> None:
        entry, index = placed.entry, placed.index
        if isinstance(entry, CharterEntry):
            self.consortium, self.charter = entry.consortium, placed
            for party in (*entry.keys.parties, entry.operator):
                self._put(party, index)
        elif isinstance(entry, MembershipEntry):
            self._put(entry.party, index)
        elif isinstance(entry, DepartureEntry):
            del self.parties[entry.site]
            self.sites.discard(entry.site)
            self._end(entry.site, index)
            self.departures.append(placed)
        elif isinstance(entry, RotationEntry):
            if entry.rotation.replaces != self.parties[entry.by] or entry.rotation.entry.name != entry.by:
                raise ProtocolError("bad_rotation", f"{where}: replaces other keys than those of {entry.by} in force")
            try:
                entry.rotation.verify()
            except ProtocolError as error:
                raise entries.placed(error, where) from None
            self._put(entry.rotation.entry, index)
        elif isinstance(entry, PodEntry):
            self.pods[entry.name] = placed
        elif isinstance(entry, TransferEntry | SpendEntry):
            self.credits.apply(entry, index, members=self.sites, terms=self.terms)
        elif isinstance(entry, PlanEntry):
            if entry.run in self.runs:
                raise ProtocolError("conflicting_entry", f"{where}: run {entry.run} has a plan already")
            for site in entry.sites:
                self._member(site, where)
            self.runs[entry.run] = RunEntries(placed)
        else:
            self._take_run(placed, where)

    def _take_run(self, placed: Placed, where: str) -> None:
        entry = placed.entry
        run = self.runs.get(entry.run)
        if run is None:
            raise ProtocolError("truncated_log", f"{where}: a {entry.type} of run {entry.run}, which no plan has opened")
        if isinstance(entry, ExclusionEntry):
            run.exclusions.append(placed)
        elif isinstance(entry, ContributionEntry):
            self._only(run.plan.entry.sites, entry.shares, where)
            run.contributions.append(placed)
        elif isinstance(entry, MintEntry):
            basis = next((p.entry for p in run.contributions if p.index == entry.contribution), None)
            if basis is None or basis.model_sha256 != entry.model_sha256 or basis.method == "gram":
                raise ProtocolError(
                    "bad_mint", f"{where}: mints from entry {entry.contribution}, which settles no contribution to this model",
                    fix="credits follow from a settlement; what single rounds show is no basis for them",
                )  # fmt: skip
            self.credits.mint(entry, basis, placed.index, terms=self.terms, organisations=self.organisations())
            run.mint = placed
        elif isinstance(entry, ApprovalEntry):
            about = run.evaluation.entry if run.evaluation else None
            if about is None or (about.model_sha256, about.metrics_sha256) != (entry.model_sha256, entry.metrics_sha256):
                raise ProtocolError(
                    "bad_approval", f"{where}: {entry.by} approves a model or an evaluation that this run has not"
                )
            run.approvals[entry.by] = placed
        else:
            if isinstance(entry, RegistrationEntry):
                self._may_register(run, entry, where)
            self._put_run(run, placed, where)

    def _put_run(self, run: RunEntries, placed: Placed, where: str) -> None:
        entry = placed.entry
        if isinstance(entry, DatasetEntry | ContractReportEntry | UpdateEntry | EgressEntry):
            self._only(run.plan.entry.sites, (entry.by,), where)
        slots: dict[type, tuple[dict[Any, Placed], Any]] = {
            DatasetEntry: (run.datasets, entry.by),
            ContractReportEntry: (run.reports, entry.by),
            UpdateEntry: (run.updates, (getattr(entry, "round", 0), entry.by)),
            AggregateEntry: (run.aggregates, getattr(entry, "round", 0)),
            EgressEntry: (run.egress, entry.by),
        }
        if type(entry) in slots:
            found, key = slots[type(entry)]
            grows = isinstance(entry, EgressEntry) and key in found and entry.size >= found[key].entry.size
            if key in found and not grows:
                raise ProtocolError(
                    "conflicting_entry",
                    f"{where}: a second {entry.type} of {key} in run {entry.run}; the first is entry {found[key].index}",
                )
            found[key] = placed
            return
        name = "evaluation" if isinstance(entry, EvaluationEntry) else "registration"
        first = getattr(run, name)
        if first is not None and not (name == "registration" and first.entry.model_sha256 == entry.model_sha256):
            raise ProtocolError(
                "conflicting_entry", f"{where}: a second {name} of run {entry.run}; the first is entry {first.index}"
            )
        setattr(run, name, placed)

    def _may_register(self, run: RunEntries, entry: RegistrationEntry, where: str) -> None:
        if run.evaluation is None or run.evaluation.entry.model_sha256 != entry.model_sha256:
            raise ProtocolError("conflicting_entry", f"{where}: registers a model that run {entry.run} has not evaluated")
        if CHAMPION not in entry.aliases:
            return
        needed = self.terms.approvals_needed(len(self.sites))
        approved = set(run.approved_by()) & self.sites
        if len(approved) < needed:
            raise ProtocolError(
                "no_approval", f"{where}: {entry.name} becomes {CHAMPION} with {len(approved)} approvals; the charter asks for {needed}",
                fix="members approve with fedmat approve",
            )  # fmt: skip

    def _put(self, party: Party, index: int) -> None:
        known = self.history.setdefault(party.name, [])
        if known and known[-1].until is None:
            if known[-1].party == party:
                return
            self._end(party.name, index)
        known.append(Keyed(party, index))
        self.parties[party.name] = party
        if party.kind == "site":
            self.sites.add(party.name)

    def _end(self, name: str, index: int) -> None:
        last = self.history[name][-1]
        self.history[name][-1] = Keyed(last.party, last.since, index)

    def _member(self, name: str, where: str, *, roles: bool = False) -> None:
        if name not in self.sites and not (roles and name in self.parties):
            left = next((p.index for p in self.departures if p.entry.site == name), None)
            why = f"it left with entry {left}" if left is not None else "it never joined"
            raise ProtocolError("unknown_member", f"{where}: {name} is no member here; {why}")

    def _only(self, sites: Sequence[str], named: Iterable[str], where: str) -> None:
        if strangers := sorted(set(named) - set(sites)):
            raise ProtocolError("unknown_member", f"{where}: {', '.join(strangers)} is in no plan of this run")

    def _charter(self) -> CharterEntry:
        if self.charter is None:
            raise ProtocolError("truncated_log", "the ledger has no entry yet, a charter is the first")
        entry: CharterEntry = self.charter.entry
        return entry


def _time(text: str, where: str) -> datetime:
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        raise ProtocolError("unknown_entry", f"{where}: {text} is no time") from None
