"""A whole ledger checked from its entries and checkpoints alone: signatures, rules, roots, who cosigned how far.

Knows: that entries obey the fold, that each checkpoint is of these entries, signed by the operator and cosigned by members as their
keys were then. Refuses to know: where the entries come from, runs' files (``fedmat.audit``), the clock.

The first thing that is wrong ends it, with its place: whoever decides by a ledger needs to know whether it holds, and the finder of
every single fault in a damaged file is :func:`fedmat.ledger.export.structure`.

References:
    RFC 9162, section 2.1. C2SP tlog-checkpoint and tlog-cosignature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedmat.errors import ProtocolError
from fedmat.ledger import entries, merkle, notes
from fedmat.ledger.entries import OPERATOR
from fedmat.ledger.fold import Fold
from fedmat.ledger.notes import Verifier


@dataclass(frozen=True)
class Sealed:
    """A checkpoint that fits the entries and is signed by the operator.

    Attributes:
        cosigners: members that cosigned it.
        needed: how many the charter asks for.
    """

    size: int
    cosigners: tuple[str, ...]
    needed: int

    @property
    def counts(self) -> bool:
        """Tells whether enough members saw this history: the operator cannot show another one up to here."""
        return len(self.cosigners) >= self.needed


@dataclass(frozen=True)
class Examined:
    """A ledger whose every entry, signature and checkpoint was verified.

    Attributes:
        charter_sha256: digest of the first charter: what was compared by telephone.
        root: of all entries, hex.
        checkpoints: smallest first.
    """

    fold: Fold
    charter_sha256: str
    root: str
    checkpoints: tuple[Sealed, ...]

    @property
    def witnessed(self) -> int:
        """Entries up to the last checkpoint that enough members cosigned; 0 without one."""
        return max((c.size for c in self.checkpoints if c.counts), default=0)


def origin(consortium: str) -> str:
    """Returns what a consortium's checkpoints call its log, and whoever signs them."""
    return f"fedmat/{consortium}"


def witness_name(consortium: str, site: str) -> str:
    """Returns what a member is called where it cosigns."""
    return f"{consortium}/{site}"


def examine(datas: Sequence[bytes], checkpoints: Sequence[str], named: str) -> Examined:
    """Verifies a ledger from its first entry to its last: entries, signatures, rules, roots, who cosigned.

    Args:
        datas: the entries' envelopes.
        checkpoints: notes with their cosignatures, smallest first.
        named: origin that the log gives itself.

    Raises:
        ProtocolError: the first thing that is wrong, with its place: as :meth:`Fold.apply`, truncated_log (a checkpoint is of more
            entries), forked_log (of other ones), foreign_bundle, bad_checkpoint, bad_signature.
    """
    by_size: dict[int, str] = {}
    last = 0
    for number, note in enumerate(checkpoints, start=1):
        try:
            name, size, _ = notes.read(notes.parse(note).body)
        except ProtocolError as error:
            raise entries.placed(error, f"checkpoint {number}") from None
        if size > len(datas):
            raise ProtocolError("truncated_log", f"checkpoint {number} is of {size} entries, and there are {len(datas)}")
        if size <= last:
            raise ProtocolError("bad_checkpoint", f"checkpoint {number} is of {size} entries, the one before it of {last}")
        if name != named:
            raise ProtocolError(
                "foreign_bundle", f"checkpoint {number}, of {size} entries, is of {name}, the ledger of {named}"
            )
        by_size[size], last = note, size
    fold, edge, sealed = Fold(), merkle.Frontier(), []
    for data in datas:
        fold.apply(data)
        edge.extend([merkle.leaf_hash(data)])
        if fold.size in by_size:
            sealed.append(_sealed(by_size[fold.size], fold, edge.root()))
    if fold.size == 0:
        raise ProtocolError("truncated_log", "the ledger has no entry, a charter is the first")
    if named != origin(fold.consortium):
        raise ProtocolError("foreign_bundle", f"the log calls itself {named}, its charter is {fold.consortium}'s")
    first = entries.open_envelope(datas[0], "entry 0")[0]
    return Examined(fold, first.sha256, edge.root().hex(), tuple(sealed))


def _sealed(note: str, fold: Fold, root: bytes) -> Sealed:
    """Returns a checkpoint of the entries so far, verified."""
    taken = notes.parse(note)
    _, size, stated = notes.read(taken.body)
    if stated != root:
        raise ProtocolError("forked_log", f"the checkpoint of {size} entries is of other entries than these")
    sites = fold.sites_at(size)
    signer = _verifier(fold, OPERATOR, origin(fold.consortium), size)
    witnesses = {s: _verifier(fold, s, witness_name(fold.consortium, s), size) for s in sites}
    if not notes.verified(taken, signer, notes.SIGNATURE):
        raise ProtocolError("bad_signature", f"the checkpoint of {size} entries is not signed by the operator")
    if strangers := notes.strangers(taken, signer, tuple(witnesses.values())):
        raise ProtocolError(  # else bits of such a line could change unseen
            "unknown_signer",
            f"the checkpoint of {size} entries has a signature of {strangers[0]} by a key that is no member's then",
        )
    cosigners = tuple(s for s in sites if notes.verified(taken, witnesses[s], notes.COSIGNATURE))
    return Sealed(size, cosigners, fold.terms.witnesses_needed(len(sites)))


def _verifier(fold: Fold, name: str, called: str, size: int) -> Verifier:
    party = fold.key_at(name, size)
    if party is None:
        raise ProtocolError("truncated_log", f"{name} has no keys after {size} entries")
    return Verifier(called, bytes.fromhex(party.signing))
