"""Credits as a fold over the ledger: made from contributions, given from member to member, spent on access.

Knows: who has how many, what a mint has to amount to, whose turn a transfer is, what the charter charges. Refuses to know: who
signed (``fedmat.ledger.fold`` has verified that before), how shares are estimated, what a tier holds.

Whole numbers only. Nothing is ever taken back and nothing appears but by a mint: the balances and what was spent sum to what was
minted after every entry. Each giver numbers its transfers and spends 1, 2, 3, ...: an entry that is brought again, or two that
claim one place, are refused by everyone alike. What a member that left has stays its own and cannot move.

References:
    Balinski, Young, "Fair Representation", 1982 (largest remainders). Nakamoto, "Bitcoin", 2008, section 2 (double spending is
    decided by one order of all transfers; here the log gives it, and each giver's own count does not depend on the operator's).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from fedmat import contribution
from fedmat.config import Terms
from fedmat.errors import ProtocolError

if TYPE_CHECKING:
    from fedmat.ledger.entries import ContributionEntry, MintEntry, SpendEntry, TransferEntry

_TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True)
class _Move:
    """A transfer or spend that counted: its place in the log and the entry."""

    index: int
    entry: TransferEntry | SpendEntry


@dataclass
class Credits:
    """Who has how many credits after some entries, and what was bought with the others.

    Attributes:
        balances: member -> credits; also members that left.
        minted, spent: credits of all members so far.
        sequence: member -> number of its last transfer or spend.
        tiers: member -> tiers it has bought.
        priority: (member, model) -> until when it is served first, UTC.
    """

    balances: dict[str, int] = field(default_factory=dict)
    minted: int = 0
    spent: int = 0
    sequence: dict[str, int] = field(default_factory=dict)
    tiers: dict[str, set[str]] = field(default_factory=dict)
    priority: dict[tuple[str, str], str] = field(default_factory=dict)
    _mints: dict[tuple[str, str], int] = field(default_factory=dict)
    _moves: dict[tuple[str, int], _Move] = field(default_factory=dict)

    def balance(self, member: str) -> int:
        """Returns a member's credits."""
        return self.balances.get(member, 0)

    def next(self, member: str) -> int:
        """Returns the number that a member's next transfer or spend has to have."""
        return self.sequence.get(member, 0) + 1

    def mint(
        self,
        entry: MintEntry,
        basis: ContributionEntry,
        index: int,
        *,
        terms: Terms,
        organisations: Mapping[str, str] | None = None,
    ) -> None:
        """Takes a mint in; a refused one changes nothing.

        Args:
            basis: the contribution that the mint names.
            index: of the mint in the log, for messages.
            organisations: site -> its owner, as in :func:`due`.

        Raises:
            ProtocolError: double_mint (credits were made from this model before), bad_mint (other amounts than follow from the
                contribution), or as in :func:`due`.
        """
        where, key = f"entry {index}", (entry.run, entry.model_sha256)
        if key in self._mints:
            raise ProtocolError(
                "double_mint", f"{where}: credits were made from this model of run {entry.run} with entry {self._mints[key]}",
                fix="a released model makes credits once",
            )  # fmt: skip
        if (basis.run, basis.model_sha256) != key:
            raise ProtocolError("bad_mint", f"{where}: mints for a model of run {entry.run} from a contribution to another one")
        expected = due(basis, terms, organisations, where=where)
        if entry.amounts != expected:
            differ = sorted(s for s in entry.amounts.keys() | expected.keys() if entry.amounts.get(s) != expected.get(s))
            raise ProtocolError(
                "bad_mint", f"{where}: gives {', '.join(differ)} other amounts than follow from the contribution and the charter",
                fix="whoever has the contribution's entry works the amounts out: fedmat.ledger.credits.due",
            )  # fmt: skip
        self._mints[key] = index
        for site, amount in expected.items():
            self.balances[site] = self.balance(site) + amount
            self.minted += amount

    def apply(self, entry: TransferEntry | SpendEntry, index: int, *, members: set[str], terms: Terms) -> None:
        """Takes a transfer or spend in; a refused one changes nothing.

        Args:
            index: of the entry in the log, for messages.
            members: sites that are members at this place.

        Raises:
            ProtocolError: unknown_member, replayed_entry (the same was taken before), double_spend (another one has its
                number), sequence_gap (one before it is missing), overdraft, bad_transfer (to the giver itself), unknown_tier,
                wrong_price, bought_before.
        """
        where = f"entry {index}"
        if entry.by not in members:
            raise ProtocolError("unknown_member", f"{where}: {entry.by} is no member here, its credits cannot move")
        self._in_turn(entry, where)
        if entry.type == "credit_transfer":
            if entry.to not in members:
                raise ProtocolError(
                    "unknown_member", f"{where}: {entry.by} gives credits to {entry.to}, which is no member here"
                )
            if entry.to == entry.by:
                raise ProtocolError("bad_transfer", f"{where}: {entry.by} gives credits to itself")
        else:
            self._priced(entry, terms, where)
        until = self._until(entry, terms, where) if entry.type == "credit_spend" and entry.what == "priority" else ""
        if entry.amount > self.balance(entry.by):
            raise ProtocolError(
                "overdraft", f"{where}: {entry.by} moves {entry.amount} credits and has {self.balance(entry.by)}",
                fix="move at most the balance: fedmat credits balance",
            )  # fmt: skip
        self.sequence[entry.by] = entry.sequence
        self._moves[entry.by, entry.sequence] = _Move(index, entry)
        self.balances[entry.by] -= entry.amount
        if entry.type == "credit_transfer":
            self.balances[entry.to] = self.balance(entry.to) + entry.amount
            return
        self.spent += entry.amount
        if entry.what == "tier":
            self.tiers.setdefault(entry.by, set()).add(entry.item)
        else:
            self.priority[entry.by, entry.item] = until

    def has_tier(self, member: str, tier: str, terms: Terms) -> bool:
        """Tells whether a member may use a tier of the registry's models: it bought it, or the charter asks nothing for it.

        A tier that the charter does not know is nobody's.
        """
        return tier in terms.tiers and (terms.tiers[tier] <= 0 or tier in self.tiers.get(member, ()))

    def priority_until(self, member: str, model: str) -> str:
        """Returns until when a member is served first (UTC, as entries have it); empty if it never bought that."""
        return self.priority.get((member, model), "")

    def _in_turn(self, entry: TransferEntry | SpendEntry, where: str) -> None:
        expected = self.next(entry.by)
        if entry.sequence == expected:
            return
        if entry.sequence > expected:
            raise ProtocolError(
                "sequence_gap", f"{where}: number {entry.sequence} of {entry.by}, expected {expected}: one before it is missing",
                fix="append the entries of a member in the order it made them",
            )  # fmt: skip
        taken = self._moves[entry.by, entry.sequence]
        if taken.entry == entry:
            raise ProtocolError("replayed_entry", f"{where}: the same as entry {taken.index} of {entry.by}, which counted once")
        raise ProtocolError(
            "double_spend", f"{where}: number {entry.sequence} of {entry.by} was used with entry {taken.index} for something else",
            fix=f"its next one has number {expected}",
        )  # fmt: skip

    def _until(self, entry: SpendEntry, terms: Terms, where: str) -> str:
        """Returns the end of a member's priority once this is paid: days from now, or from the end of what it has."""
        begin = datetime.strptime(max(entry.time, self.priority_until(entry.by, entry.item)), _TIME).replace(tzinfo=UTC)
        try:
            return (begin + timedelta(days=entry.amount // terms.priority_price)).strftime(_TIME)
        except OverflowError:
            raise ProtocolError("wrong_price", f"{where}: pays for more days of priority than the calendar has") from None

    def _priced(self, entry: SpendEntry, terms: Terms, where: str) -> None:
        """Refuses a spend that is not at the charter's price."""
        if entry.what == "priority":
            if entry.amount % terms.priority_price:
                raise ProtocolError(
                    "wrong_price", f"{where}: {entry.amount} credits for priority; a day costs {terms.priority_price}",
                    fix="pay whole days",
                )  # fmt: skip
            return
        if entry.item not in terms.tiers:
            raise ProtocolError(
                "unknown_tier", f"{where}: the charter has no tier of the name {entry.by} gives",
                fix=f"tiers: {', '.join(sorted(terms.tiers)) or 'none'}",
            )  # fmt: skip
        if entry.amount != terms.tiers[entry.item]:
            raise ProtocolError(
                "wrong_price", f"{where}: {entry.amount} credits for tier {entry.item}, which costs {terms.tiers[entry.item]}"
            )
        if entry.item in self.tiers.get(entry.by, ()):
            raise ProtocolError(
                "bought_before", f"{where}: {entry.by} has tier {entry.item} already", fix="nothing is to be paid"
            )


def due(
    basis: ContributionEntry, terms: Terms, organisations: Mapping[str, str] | None = None, *, where: str = "contribution"
) -> dict[str, int]:
    """Returns what each site earns by a contribution: what a mint's amounts have to be. Sites that earn nothing are left out.

    Largest remainders of the positive shares; nothing for anybody where the gain is within the noise
    (:func:`fedmat.contribution.credited`), so an empty mint says that a release was settled and made no credits.

    Args:
        organisations: site -> its owner, as the charter has it. Sites of one owner are one player of the settlement and the
            errors of their shares are parts of one error; without it every site counts as an owner.
        where: for messages.

    Raises:
        ProtocolError: bad_mint: a look at single rounds (gram) is no basis for credits; the errors are not one of each share, or a
            settlement states none.
    """
    if basis.method == "gram":
        raise ProtocolError("bad_mint", f"{where}: mints from a look at single rounds", fix="settle the release: fedmat settle")
    sites = sorted(basis.shares)
    if (basis.errors or basis.method == "settlement") and sorted(basis.errors) != sites:
        raise ProtocolError("bad_mint", f"{where}: mints from a contribution that does not give every share's error")
    errors = [basis.errors.get(s, 0.0) for s in sites]
    if min(errors, default=0.0) < 0.0:
        raise ProtocolError("bad_mint", f"{where}: mints from a contribution with a negative standard error")
    owner = {s: (organisations or {}).get(s, s) for s in sites}
    groups = [[i for i, s in enumerate(sites) if owner[s] == o] for o in sorted(set(owner.values()))]
    given = contribution.credited(
        [basis.shares[s] for s in sites], errors, terms.credits_per_release, [g for g in groups if len(g) > 1]
    )
    return {s: credits for s, credits in zip(sites, given, strict=True) if credits}
