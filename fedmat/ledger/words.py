"""What an entry says, in words for people who sign it or look it up.

Knows: the fields of every type of entry. Refuses to know: whether it counts.
"""

from __future__ import annotations

from typing import Any

from fedmat.ledger.entries import CharterEntry


def words(entry: Any) -> str:
    """Returns what an entry says, in one line."""
    return str(_WORDS[entry.type](entry))


def terms_in_words(entry: CharterEntry) -> list[tuple[str, str]]:
    """Returns what a charter agrees on beside keys: (what, how)."""
    terms, n = entry.terms, len(entry.keys.sites)
    tiers = ", ".join(f"{t} {price}" for t, price in sorted(terms.tiers.items()))
    return [
        ("quorum", f"{terms.needed(n)} of {n}"),
        ("approvals of a champion", str(terms.approvals_needed(n))),
        ("witnesses of a checkpoint", str(terms.witnesses_needed(n))),
        ("contract versions", ", ".join(terms.contract_versions) or "any"),
        ("residency", ", ".join(f"{s} {c}" for s, c in sorted(terms.residency.items())) or "not agreed on"),
        ("export classes", ", ".join(terms.export_classes) or "any"),
        ("fewest sites", str(terms.min_sites)),
        ("shown", ", ".join(f"{what} to {whom}" for what, whom in sorted(terms.published.items()))),
        ("credits of a release", str(terms.credits_per_release)),
        ("tiers", tiers or "none"),
        ("a day of priority", f"{terms.priority_price} credits"),
        ("digest", entry.sha256),
    ]


def _many(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _counts(amounts: Any) -> str:
    return ", ".join(f"{s} {n}" for s, n in sorted(amounts.items())) or "nobody anything"


_WORDS: dict[str, Any] = {
    "charter": lambda e: f"charter of {_many(len(e.keys.sites), 'site')}, quorum {e.terms.needed(len(e.keys.sites))}, digest {e.sha256[:16]}",
    "membership": lambda e: f"{e.party.name} of {e.party.organisation} joins" + (f", data in {e.residency}" if e.residency else ""),
    "departure": lambda e: f"{e.site} leaves" + ("" if e.by == e.site else f", as {e.by} and a quorum say")
    + f"; {_many(len(e.datasets), 'dataset')}" + (f" ({e.reason})" if e.reason else ""),
    "rotation": lambda e: f"{e.by} has new keys, until {e.rotation.entry.not_after}",
    "plan": lambda e: f"run {e.run} begins: {_many(len(e.sites), 'site')}, {_many(e.rounds, 'round')}",
    "dataset": lambda e: f"{e.by} takes part in {e.run} with {e.n_train} training records, dataset {e.dataset_sha256[:16]}",
    "contract_report": lambda e: f"{e.by}: {e.accepted} records accepted, {sum(e.rejected.values())} rejected, in {e.run}",
    "update": lambda e: f"{e.by} sent its update of round {e.round} of {e.run}, {e.bytes} bytes",
    "exclusion": lambda e: f"{e.site} does not count in " + (f"round {e.round} of " if e.round >= 0 else "") + f"{e.run}: {e.reason}",
    "aggregate": lambda e: f"round {e.round} of {e.run}: {len(e.updates)} updates by {e.rule}, model {e.model_sha256[:16]}",
    "evaluation": lambda e: f"model {e.model_sha256[:16]} of {e.run} evaluated"
    + (f": {e.metric} {e.score:.4g}" if e.score is not None else ""),
    "registration": lambda e: f"{e.name} version {e.version} is the model of {e.run}" + (f" ({', '.join(e.aliases)})" if e.aliases else ""),
    "approval": lambda e: f"{e.by} {'approves' if e.approves else 'does not approve'} model {e.model_sha256[:16]} of {e.run}"
    + (f": {e.note}" if e.note else ""),
    "egress": lambda e: f"{e.by}: {e.objects} objects of {e.run} left, {e.bytes} bytes",
    "contribution": lambda e: f"contributions to {e.run} by {e.method}: "
    + (", ".join(f"{s} {v:.3g}" for s, v in sorted(e.shares.items())) or "none"),
    "credit_mint": lambda e: f"credits for {e.run}: {_counts(e.amounts)}",
    "credit_transfer": lambda e: f"{e.by} gives {e.to} {e.amount} credits" + (f": {e.note}" if e.note else ""),
    "credit_spend": lambda e: f"{e.by} spends {e.amount} credits on {e.what} {e.item}",
    "pod": lambda e: f"pod {e.name} of {', '.join(e.members)}: {e.task}",
}  # fmt: skip
