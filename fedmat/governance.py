"""How members decide together: charter, joining, leaving, approving, pods; whose signatures an entry still lacks.

Knows: which entry says what was decided, the rules a charter has to keep to, who is asked to sign. Refuses to know: how entries are
stored and proved (``fedmat.ledger.log``), whether they count (``fedmat.ledger.fold`` alone says so), records, the clock.

The signers sit at different companies, so a proposal is a file: the entry in its envelope with the signatures so far. Each signer
adds its own; nobody's signature covers another's, so copies that went out at the same time can be put together again. A
proposal counts for nothing until the operator has put it into the ledger, and everybody can see there who signed.

References:
    The Update Framework, specification section 5.3 (a root of trust is what a threshold of known keys signs).
    DSSE, protocol.md (signatures of one payload are independent of each other).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from fedmat import files, keys
from fedmat.config import ConsortiumConfig, Terms
from fedmat.envelopes import ROLES
from fedmat.errors import ConfigError, NotEvidenced, ProtocolError
from fedmat.keys import Charter, Party, PartyKeys, Rotation
from fedmat.ledger import dsse, entries
from fedmat.ledger.entries import (
    OPERATOR,
    ApprovalEntry,
    CharterEntry,
    DepartureEntry,
    MembershipEntry,
    PodEntry,
    RotationEntry,
    SpendEntry,
    TransferEntry,
)
from fedmat.ledger.fold import Asked, Fold, Placed
from fedmat.ledger.text import stamp

Move = TypeVar("Move", TransferEntry, SpendEntry)

# --- what is decided -------------------------------------------------------------------------------------------------


def charter(consortium: ConsortiumConfig, parties: Charter, operator: Party, now: datetime) -> CharterEntry:
    """Returns the charter's entry, for everyone to sign: keys, operator, and the terms of the consortium file.

    A simulated consortium that says nothing of approvals needs none: one operator owns all its keys.

    Raises:
        ConfigError: every problem, one a line.
    """
    terms = consortium.terms
    if consortium.simulated and terms.approvals is None:
        terms = terms.model_copy(update={"approvals": 0})
    problems = _misfits(consortium, parties, operator, now) + _terms_out_of_reach(terms, parties.sites)
    if problems:
        raise ConfigError(
            f"no charter of {consortium.name} to sign yet:\n  " + "\n  ".join(problems),
            fix="correct the consortium file's terms, or the keys (docs/charter.md)",
        )
    return CharterEntry(
        consortium=consortium.name, by=OPERATOR, time=stamp(now), keys=parties, operator=operator, terms=terms
    )  # fmt: skip


def _misfits(consortium: ConsortiumConfig, parties: Charter, operator: Party, now: datetime) -> list[str]:
    owners = {m.site: m.organisation for m in consortium.members}
    found = []
    if parties.consortium != consortium.name:
        found.append(f"the keys are those of {parties.consortium}")
    if sorted(owners) != list(parties.sites):
        differ = sorted(set(owners) ^ set(parties.sites))
        found.append(f"consortium file and keys name other sites: {', '.join(differ)}")
    found += [
        f"{p.name} belongs to '{p.organisation}', in the consortium file to '{owners[p.name]}'"
        for p in parties.parties
        if p.name in owners and p.organisation != owners[p.name]
    ]
    if (operator.name, operator.kind) != (OPERATOR, OPERATOR):
        found.append(f"{operator.name} is no operator: fedmat keys new {OPERATOR}")
    for p in (*parties.parties, operator):
        if now.date() > p.not_after:
            found.append(f"the keys of {p.name} ended on {p.not_after}")
        if p.name != operator.name and p.signing == operator.signing:
            found.append(f"the operator signs with the key of {p.name}")
    return found


def _terms_out_of_reach(terms: Terms, sites: Sequence[str]) -> list[str]:
    """Terms that no behaviour of the members could keep."""
    found = [f"terms.residency names {s}, which is no site" for s in sorted(set(terms.residency) - set(sites))]
    for name in ("approvals", "witnesses"):
        wanted = getattr(terms, name)
        if wanted is not None and wanted > len(sites):
            found.append(f"terms.{name}: {wanted} of {len(sites)} members can never be had")
    if terms.min_sites > len(sites):
        found.append(f"terms.min_sites: {terms.min_sites}, and there are {len(sites)}")
    return found


def join(fold: Fold, party: Party, now: datetime, *, residency: str = "") -> MembershipEntry:
    """Returns a site's entry into the consortium: it signs first, then a quorum of the members and the operator.

    Raises:
        ConfigError: it is no site, is called like a role, is a member, or its keys are somebody's.
    """
    if party.kind != "site" or party.name in (*ROLES, OPERATOR):
        raise ConfigError(f"{party.name} cannot join as a site", fix="give the site a name of its own: fedmat keys new NAME")
    if party.name in fold.parties:
        raise ConfigError(f"{party.name} is a party of {fold.consortium} already", fix="fedmat ledger rotate replaces its keys")
    known = [k.party for ks in fold.history.values() for k in ks]
    if any(party.signing == p.signing or party.sealing == p.sealing for p in known):
        raise ConfigError(
            f"the keys of {party.name} stood in the ledger before", fix="make new ones in a new folder: fedmat keys new"
        )
    was = next((p.organisation for p in known if p.name == party.name), party.organisation)
    if was != party.organisation:  # its credits would go with the name
        raise ConfigError(f"{party.name} was the name of a site of {was}", fix="join under another name")
    return MembershipEntry(
        consortium=fold.consortium, by=party.name, time=stamp(now), party=party, residency=residency
    )  # fmt: skip


def leave(fold: Fold, site: str, now: datetime, *, by: str | None = None, reason: str = "") -> DepartureEntry:
    """Returns a site's departure, with the digests of every dataset it took part with.

    Args:
        by: who says so; the site itself by default. Of anybody else it takes a quorum.

    Raises:
        ProtocolError: unknown_member.
    """
    _member(fold, site)
    return DepartureEntry(
        consortium=fold.consortium, by=by or site, time=stamp(now), site=site, reason=reason, datasets=_datasets(fold, site)
    )  # fmt: skip


def approve(fold: Fold, run: str, by: str, now: datetime, *, approves: bool = True, note: str = "") -> ApprovalEntry:
    """Returns a member's word on a run's model, over the digests of the model and of its evaluation as the ledger has them.

    Raises:
        ProtocolError: unknown_member.
        ConfigError: the ledger has no such run.
        NotEvidenced: the run has no evaluation yet: there is nothing to approve.
    """
    _member(fold, by)
    found = fold.runs.get(run)
    if found is None:
        raise ConfigError(f"the ledger has no run {run}", fix=f"runs: {', '.join(sorted(fold.runs)) or 'none'}")
    if found.evaluation is None:
        raise NotEvidenced(f"run {run} has no evaluation in the ledger", fix="approve when the run is finished")
    about = found.evaluation.entry
    return ApprovalEntry(
        consortium=fold.consortium, by=by, time=stamp(now), run=run, model_sha256=about.model_sha256,
        metrics_sha256=about.metrics_sha256, approves=approves, note=note,
    )  # fmt: skip


def rotation(fold: Fold, step: Rotation, now: datetime) -> RotationEntry:
    """Returns a party's new keys as an entry; the old key signs it.

    Raises:
        ProtocolError: unknown_member, bad_rotation (it replaces other keys than those in force), or what is wrong with the
            rotation itself.
    """
    name = step.entry.name
    if name not in fold.parties:
        raise ProtocolError("unknown_member", f"{name} is no party of {fold.consortium}")
    if step.replaces != fold.parties[name]:
        raise ProtocolError(
            "bad_rotation", f"the rotation of {name} replaces other keys than those in force in the ledger",
            fix="append the party's earlier rotation first",
        )  # fmt: skip
    step.verify()
    return RotationEntry(consortium=fold.consortium, by=name, time=stamp(now), rotation=step)


def transfer(fold: Fold, by: str, to: str, amount: int, now: datetime, *, note: str = "") -> TransferEntry:
    """Returns a gift of credits with the giver's next number.

    Raises:
        ProtocolError: unknown_member, overdraft or bad_transfer: the ledger would refuse it.
    """
    entry = TransferEntry(
        consortium=fold.consortium, by=by, time=stamp(now), to=to, amount=amount, sequence=fold.credits.next(by), note=note
    )  # fmt: skip
    return _affordable(fold, entry)


def spend(
    fold: Fold, by: str, what: Literal["tier", "priority"], item: str, now: datetime, *, days: int = 1
) -> SpendEntry:  # fmt: skip
    """Returns what a member buys, at the charter's price.

    Args:
        item: the tier, or the model that is to be served first.
        days: of priority.

    Raises:
        ProtocolError: unknown_member, unknown_tier, overdraft, bought_before: the ledger would refuse it.
        ConfigError: nothing is to be paid.
    """
    terms = fold.terms
    price = days * terms.priority_price if what == "priority" else terms.tiers.get(item, 1)
    if price < 1:
        raise ConfigError(f"tier {item} costs nothing", fix="every member may use it")
    entry = SpendEntry(
        consortium=fold.consortium, by=by, time=stamp(now), what=what, item=item, amount=price, sequence=fold.credits.next(by)
    )  # fmt: skip
    return _affordable(fold, entry)


def pod(
    fold: Fold, name: str, members: Sequence[str], task: str, now: datetime, *, model_sha256: str | None = None
) -> PodEntry:  # fmt: skip
    """Returns a pod's entry: some members with a task of their own; each of them and the operator sign.

    Raises:
        ProtocolError: unknown_member.
        ConfigError: fewer members than the charter lets train together, one named twice, or the name is taken.
    """
    for member in members:
        _member(fold, member)
    least = fold.terms.min_sites
    if len(set(members)) != len(members) or len(members) < least:
        raise ConfigError(f"a pod has at least {least} members, each named once", fix="name more members")
    if name in fold.pods:
        raise ConfigError(f"there is a pod {name} already (entry {fold.pods[name].index})", fix="give it another name")
    return PodEntry(
        consortium=fold.consortium, by=OPERATOR, time=stamp(now), name=name, members=tuple(sorted(members)), task=task,
        model_sha256=model_sha256,
    )  # fmt: skip


def _affordable(fold: Fold, entry: Move) -> Move:
    """Returns the entry once the state would take it; the state itself stays as it is."""
    from copy import deepcopy

    deepcopy(fold.credits).apply(entry, fold.size, members=fold.sites, terms=fold.terms)
    return entry


def _member(fold: Fold, name: str) -> None:
    if name not in fold.sites:
        raise ProtocolError(
            "unknown_member", f"{name} is no member of {fold.consortium}", fix=f"members: {', '.join(sorted(fold.sites))}"
        )


def _datasets(fold: Fold, site: str) -> tuple[str, ...]:
    return tuple(sorted({r.datasets[site].entry.dataset_sha256 for r in fold.runs.values() if site in r.datasets}))


# --- proposals -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """Who has signed a proposal, and who still has to.

    Attributes:
        entry: what is proposed.
        needed: everyone who has to sign.
        votes: how many members of any name have to sign besides; 0 where none.
        signed: who did.
        missing: of those needed.
        votes_missing: of the members.
    """

    entry: Any
    needed: tuple[str, ...]
    votes: int
    signed: tuple[str, ...]
    missing: tuple[str, ...]
    votes_missing: int

    @property
    def complete(self) -> bool:
        """Tells whether nobody's signature is lacking."""
        return not self.missing and not self.votes_missing

    def lacking(self) -> str:
        """Returns what is lacking, in words."""
        parts = list(self.missing)
        if self.votes_missing:
            parts.append(f"{self.votes_missing} more of the members")
        return ", ".join(parts) or "nobody"


def propose(entry: Any, signer: PartyKeys) -> bytes:
    """Returns a proposal file's content: the entry, signed by the one who proposes it."""
    return entries.seal(entry, [signer]) + b"\n"


def read(path: Path) -> bytes:
    """Returns the envelope in a proposal file.

    Raises:
        ConfigError: there is no such file.
        ProtocolError: not_canonical or unknown_entry: it is no proposal.
    """
    try:
        data = path.read_bytes().strip()  # mail adds line breaks at the end
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({type(error).__name__})", fix="name a proposal's file") from None
    entries.open_envelope(data, str(path))
    return data


def standing(data: bytes, fold: Fold | None, where: str = "proposal") -> Standing:
    """Returns who has signed a proposal and who has to; every signature on it is verified.

    Args:
        fold: the ledger's state; None, or an empty one, for the first charter.

    Raises:
        ProtocolError: bad_signature, key_not_in_force (a key's last day is over), foreign_bundle, unknown_member.
        ConfigError: anything but a charter needs the ledger.
    """
    entry, envelope = entries.open_envelope(data, where)
    asked = _asked(entry, fold, where)
    signed = (fold or Fold()).signers(envelope, asked, entry.time, where)
    voted = len(signed & fold.sites) if fold is not None else 0
    return Standing(
        entry, tuple(sorted(asked.needed)), asked.votes, tuple(sorted(signed)), tuple(sorted(asked.needed - signed)),
        max(0, asked.votes - voted),
    )  # fmt: skip


def sign(path: Path, signer: PartyKeys, fold: Fold | None) -> Standing:
    """Adds a party's signature to a proposal's file; a second time changes nothing.

    Raises:
        ProtocolError: not_asked (the key is none of those the proposal waits for), and as in :func:`standing`.
        ConfigError: as in :func:`standing`.
    """
    data = read(path)
    before = standing(data, fold, str(path))
    asked = _asked(before.entry, fold, str(path))
    names = asked.needed | (fold.sites if asked.votes and fold is not None else set())
    if not any(signer.holds(asked.parties[name]) for name in names):
        raise ProtocolError(
            "not_asked", f"{path}: does not wait for the keys of {signer.name} that are given here",
            fix=f"signatures are lacking of: {before.lacking()}",
        )  # fmt: skip
    made = entries.cosign(data, signer)
    if made != data:
        files.write_atomic(path, made + b"\n")
    return standing(made, fold, str(path))


def merge(copies: Sequence[bytes], fold: Fold | None) -> bytes:
    """Returns one envelope with the signatures of all copies of a proposal; each is verified first.

    Raises:
        ProtocolError: other_proposal (two copies say different things), and as in :func:`standing`.
    """
    merged: dict[str, bytes] = {}
    first: dsse.Envelope | None = None
    for number, data in enumerate(copies, start=1):
        standing(data, fold, f"copy {number}")
        envelope = dsse.parse(data)
        if first is not None and envelope.payload != first.payload:
            raise ProtocolError(
                "other_proposal", f"copy {number} says something else than copy 1", fix="put together copies of one proposal"
            )
        first = first or envelope
        merged |= dict(envelope.signatures)
    if first is None:
        raise ConfigError("no proposal is given", fix="name its files")
    return dsse.Envelope(first.payload, first.payload_type, tuple(sorted(merged.items()))).encode()


def held(folder: Path, party: Party) -> PartyKeys:
    """Reads those keys of a folder that a party's entry is of: the present ones, or the old ones while they are being replaced.

    Raises:
        StateError: neither are, or they cannot be read.
    """
    # Not validated: a charter of keys has no operator in it, and this one exists for this call.
    one = Charter.model_construct(consortium="", kem=party.kem, parties=(party,))
    return keys.load_fitting(folder, party.name, one)


def finish_rotation(folder: Path, name: str, present: Party | None) -> None:
    """Removes a party's old keys, once the ledger holds the new ones.

    Args:
        present: the party's entry in the ledger.

    Raises:
        StateError: no rotation is under way, or the ledger does not hold the new keys.
    """
    parties = () if present is None else (present,)
    keys.finish_rotation(folder, name, Charter.model_construct(consortium="", kem="x25519", parties=parties))


def known(entry: Any, fold: Fold | None) -> dict[str, Party]:
    """Returns the parties that a proposal may wait for, as their keys are now; errors as in :func:`standing`."""
    return _asked(entry, fold, "proposal").parties


def _asked(entry: Any, fold: Fold | None, where: str) -> Asked:
    """Returns who has to sign, by the ledger's own rules."""
    if fold is None or fold.size == 0:
        if not isinstance(entry, CharterEntry):
            raise ConfigError(
                f"{where}: who has to sign a {entry.type} stands in the ledger", fix="name the ledger with --ledger"
            )
        return Fold().asked(entry, where)
    if entry.consortium != fold.consortium:
        raise ProtocolError("foreign_bundle", f"{where}: of consortium {entry.consortium}, the ledger is {fold.consortium}'s")
    return fold.asked(entry, where)


# --- after a departure -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Descendant:
    """A model that descends from a site's data.

    Attributes:
        run: that made it.
        model_sha256: None as long as the run has no evaluation.
        registered: name and version, or empty.
        rounds: in which the site's update counted; empty where it was in the scaling of inputs alone.
        last_without: last round before its first update, None where there is none. The scaling has its sums even then.
    """

    run: str
    model_sha256: str | None
    registered: str
    champion: bool
    rounds: tuple[int, ...]
    last_without: int | None


@dataclass(frozen=True)
class Departure:
    """What follows from a site's leaving.

    Attributes:
        datasets: digests that later models must not descend from.
        models: to be withdrawn or trained again.
        pods: it is in, or that start from one of these models.
        remaining: sites.
        quorum: of them.
        problems: what the charter asks that they can no longer give.
        commands: what to run.
    """

    site: str
    datasets: tuple[str, ...]
    models: tuple[Descendant, ...]
    pods: tuple[str, ...]
    remaining: tuple[str, ...]
    quorum: int
    problems: tuple[str, ...]
    commands: tuple[str, ...]


def plan_after(fold: Fold, site: str) -> Departure:
    """Returns what follows from a site's leaving, before or after the departure is in the ledger.

    A model counts as descended from the site's data where the plan names the site and it was not left out from the start: every site
    that takes part is in the sums by which inputs are scaled.

    Raises:
        ProtocolError: unknown_member: it never was a member.
    """
    if site not in fold.history:
        raise ProtocolError("unknown_member", f"{site} never was a member of {fold.consortium}")
    models = tuple(_descendant(site, name, run) for name, run in fold.runs.items() if _took_part(site, run))
    digests = {m.model_sha256 for m in models} - {None}
    pods = tuple(
        name for name, p in sorted(fold.pods.items()) if site in p.entry.members or p.entry.model_sha256 in digests
    )  # fmt: skip
    remaining, terms = tuple(sorted(fold.sites - {site})), fold.terms
    n = len(remaining)
    problems = [
        f"the charter asks for {wanted} {what}, {n} sites remain"
        for what, wanted in (
            ("sites that train together", terms.min_sites),
            ("approvals of a champion", terms.approvals_needed(n)),
            ("witnesses of a checkpoint", terms.witnesses_needed(n)),
        )
        if wanted > n
    ]
    commands = [f"fedmat run consortium.yaml --run-id {m.run}-without-{site}" for m in models if m.model_sha256]
    return Departure(
        site, _datasets(fold, site), models, pods, remaining, terms.needed(n), tuple(problems),
        () if n < terms.min_sites else tuple(commands),
    )  # fmt: skip


def _took_part(site: str, run: Any) -> bool:
    refused = {p.entry.site for p in run.exclusions if p.entry.round < 0}
    return site in run.plan.entry.sites and (site not in refused or bool(_counted(site, run)))


def _counted(site: str, run: Any) -> tuple[int, ...]:
    aggregates: dict[int, Placed] = run.aggregates
    return tuple(sorted(r for r, p in aggregates.items() if site in p.entry.updates or p.entry.shares.get(site)))


def _descendant(site: str, name: str, run: Any) -> Descendant:
    rounds = _counted(site, run)
    evaluated, registered = run.evaluation, run.registration
    return Descendant(
        name,
        evaluated.entry.model_sha256 if evaluated else None,
        f"{registered.entry.name} version {registered.entry.version}" if registered else "",
        bool(registered and "champion" in registered.entry.aliases),
        rounds,
        rounds[0] - 1 if rounds and rounds[0] > 0 else None,
    )
