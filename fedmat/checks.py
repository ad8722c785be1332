"""What the ledger, the run's files and the sites' egress ledgers in a bundle prove about each other, check by check.

Knows: every digest, signature, root and sum that can be computed again from a bundle, and where each of them stands. Refuses to
know: whose keys the charter's are, unless its digest was compared by telephone; records; the network; the clock.

Three verdicts only. *Proved*: the evidence is in hand and agrees. *Refuted*: two things contradict each other, and the place is
named. *Not evidenced*: what would show it is not here, which is never a pass. A check never stops another one: what is found is
found in one go.

Order of trust: the anchor (a charter's digest, from outside) vouches for keys, keys for entries, cosigned checkpoints for their
order and number, entries for the files' digests, and files of the right digest for what can be computed from them. A file whose
digest is not the one that was stated is read no further.

References:
    RFC 9162, section 2.1 (Merkle trees). C2SP tlog-checkpoint and tlog-cosignature. RFC 8785 (canonical JSON).
    fedmat.ledger.fold (which entry is allowed where).
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedmat import egress, files, wire
from fedmat.bundle import (
    CONSORTIUM,
    ENVIRONMENT,
    LEDGER,
    MANIFEST,
    SETTLEMENT,
    Bundle,
    egress_file,
    run_file,
)
from fedmat.config import Terms
from fedmat.domain import Evaluation, GlobalModel
from fedmat.errors import FedmatError, ProtocolError
from fedmat.evidence import (
    ATTESTATIONS,
    EVALUATIONS,
    INTERVALS,
    MATCHING,
    METRICS,
    MODEL,
    PLAN,
    ROUNDS,
    held_out_digest,
)
from fedmat.ledger import dsse, entries, merkle, notes
from fedmat.ledger.entries import OPERATOR, CharterEntry
from fedmat.ledger.fold import Fold, Placed, RunEntries
from fedmat.ledger.notes import Verifier

Verdict = Literal["proved", "refuted", "not evidenced"]
PROVED: Verdict = "proved"
REFUTED: Verdict = "refuted"
UNKNOWN: Verdict = "not evidenced"

_CLOSE = 1e-9  # relative, of numbers that are computed again from the same sums
_WRONG_FORM = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Returns the verdict of several: one that is refuted refutes all, one without evidence leaves all without; none: no evidence."""
    found = set(verdicts)
    return REFUTED if REFUTED in found else UNKNOWN if UNKNOWN in found or not found else PROVED


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        topic: what it is about, e.g. ``checkpoints``, ``dataset:SITE``, ``round:2``; answers rest on topics.
        place: file and line, or entry.
        what: what agrees, or what was found and what was expected.
        reason: one word for machines; "" where it is proved.
    """

    topic: str
    verdict: Verdict
    place: str
    what: str
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """Returns plain JSON."""
        return {
            "topic": self.topic, "verdict": self.verdict, "place": self.place, "what": self.what, "reason": self.reason,
        }  # fmt: skip


# --- the ledger ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signed:
    """Which entry it is, its digest, and whose signatures it carries.

    Attributes:
        sha256: of the payload.
    """

    type: str
    by: str
    time: str
    sha256: str
    signers: tuple[str, ...]


@dataclass(frozen=True)
class Vouched:
    """A checkpoint that was verified: how many entries it fixes, and when which members say they saw it."""

    size: int
    root: str
    cosigners: Mapping[str, int]


@dataclass(frozen=True)
class Ledger:
    """A ledger as far as it can be read, and how far it can be trusted.

    Attributes:
        fold: the state after the entries that were accepted.
        size: entries in the bundle, accepted or not.
        anchored: so many entries, from the first one, are fixed by a checkpoint that was verified.
        broken: no statement of this entry or a later one counts; None where nothing contradicts.
        why: what broke it.
        checkpoints: those that were verified.
        charters: every charter with its place.
    """

    fold: Fold
    size: int
    anchored: int
    broken: int | None
    why: str
    checkpoints: tuple[Vouched, ...]
    charters: tuple[Placed, ...]
    signed: tuple[Signed, ...]
    checks: tuple[Check, ...]

    def verdict(self, index: int) -> Verdict:
        """Returns whether an entry counts: accepted, and fixed by a checkpoint that was verified."""
        if self.broken is not None and index >= self.broken:
            return REFUTED
        return PROVED if index < min(self.anchored, self.fold.size) else UNKNOWN

    def doubt(self, index: int) -> str:
        """Returns in words why an entry does not count; "" if it does."""
        verdict = self.verdict(index)
        if verdict == REFUTED:
            return f"the ledger is broken: {self.why}"
        return "" if verdict == PROVED else f"entry {index} is signed, and no checkpoint that holds covers it"


def read_ledger(bundle: Bundle) -> Ledger:
    """Reads the ledger of a bundle and verifies entries and checkpoints; raises nothing that a check can say."""
    checks: list[Check] = []
    try:
        export = bundle.ledger()
        raw, told, origin = list(export.entries), list(export.checkpoints), export.origin
    except FedmatError as error:
        reason = getattr(error, "reason", "unreadable")
        missing = bundle.data(LEDGER) is None
        checks.append(Check("entries", UNKNOWN if missing else REFUTED, LEDGER, _bare(error), reason))
        return Ledger(Fold(), 0, 0, None if missing else 0, f"{LEDGER}: {_bare(error)}", (), (), (), tuple(checks))
    fold, refused, charters, signed = _apply(raw, checks)
    checks.append(_origin(origin, fold, bundle))
    broken, why = (fold.size, f"entry {fold.size}: {refused}") if refused else (None, "")
    vouched, torn, torn_why = _checkpoints(raw, told, origin, fold, charters, checks)
    if torn is not None and (broken is None or torn < broken):
        broken, why = torn, torn_why
    anchored = max((v.size for v in vouched), default=0)
    if broken is None and anchored < len(raw):
        checks.append(
            Check(
                "checkpoints", UNKNOWN, f"entry {anchored}",
                f"the last checkpoint that holds covers {anchored} of {len(raw)} entries", "stale_checkpoint",
            )
        )  # fmt: skip
    return Ledger(fold, len(raw), anchored, broken, why, tuple(vouched), tuple(charters), tuple(signed), tuple(checks))


def _apply(raw: Sequence[bytes], checks: list[Check]) -> tuple[Fold, str, list[Placed], list[Signed]]:
    fold, charters, signed = Fold(), [], []
    refused = ""
    for index, data in enumerate(raw):
        try:
            entry = fold.apply(data)
        except FedmatError as error:
            refused = _bare(error).removeprefix(f"entry {index}: ")
            checks.append(Check("entries", REFUTED, f"entry {index}", refused, getattr(error, "reason", "unknown_entry")))
            if left := len(raw) - index - 1:
                what = f"{left} entries after it are not read: what they say may rest on it"
                checks.append(Check("entries", UNKNOWN, f"entry {index + 1}", what, "truncated_log"))
            break
        if isinstance(entry, CharterEntry):
            charters.append(Placed(index, entry))
        signed.append(_signed(data, entry, fold))
    if fold.size:
        checks.append(
            Check("entries", PROVED, LEDGER, f"{fold.size} entries hold: form, signatures, keys in force, order of times")
        )
    elif not refused:
        checks.append(Check("entries", UNKNOWN, LEDGER, "there is no entry in it", "evidence_missing"))
    return fold, refused, charters, signed


def _signed(data: bytes, entry: Any, fold: Fold) -> Signed:
    envelope = dsse.parse(data)
    names = {dsse.key_id(bytes.fromhex(k.party.signing)): name for name, kept in fold.history.items() for k in kept}
    return Signed(
        entry.type, entry.by, entry.time, envelope.payload_sha256, tuple(sorted(names.get(k, k) for k in envelope.signers))
    )


def _origin(origin: str, fold: Fold, bundle: Bundle) -> Check:
    wrong = [
        (MANIFEST, f"the bundle says it is of consortium {bundle.consortium}, the ledger is {fold.consortium}'s")
        if fold.size and bundle.consortium != fold.consortium else None,
        (LEDGER, f"its origin is {origin}, the entries are of consortium {fold.consortium}")
        if fold.size and origin != f"fedmat/{fold.consortium}" else None,
    ]  # fmt: skip
    for found in wrong:
        if found is not None:
            return Check("entries", REFUTED, *found, "foreign_bundle")
    return Check("entries", PROVED if fold.size else UNKNOWN, LEDGER, f"is the ledger of {fold.consortium or 'nobody yet'}")


def _checkpoints(
    raw: Sequence[bytes], told: Sequence[str], origin: str, fold: Fold, charters: Sequence[Placed], checks: list[Check]
) -> tuple[list[Vouched], int | None, str]:
    """Returns the checkpoints that hold, the first entry that a signed one contradicts (None: none does), and how."""
    tree = merkle.Tree(merkle.leaf_hash(data) for data in raw)
    vouched: list[Vouched] = []
    torn: list[tuple[int, str]] = []
    lacking: list[tuple[int, str, str]] = []
    for number, note in enumerate(told):
        place = f"checkpoint {number + 1}"
        try:
            taken = notes.parse(note)
            called, size, root = notes.read(taken.body)
        except FedmatError as error:
            checks.append(Check("checkpoints", REFUTED, place, _bare(error), getattr(error, "reason", "bad_checkpoint")))
            continue
        place = f"checkpoint of {size} entries"
        if called != origin:
            checks.append(Check("checkpoints", REFUTED, place, f"is of {called}, the ledger is {origin}", "foreign_bundle"))
            continue
        if size == 0:
            checks.append(Check("checkpoints", REFUTED, place, "says nothing about any entry", "bad_checkpoint"))
            continue
        good = max((v.size for v in vouched if v.size < size), default=0)
        known = min(size, fold.size)  # keys as they were there, or at the last entry that was accepted
        trouble = _verified(note, taken, origin, fold, known, size, charters)
        by_operator = trouble is None or trouble.reason == "no_quorum"
        if size > len(raw):
            what = f"the ledger has {len(raw)} entries, the operator signed for {size}: some from entry {good} on are left out"
            checks.append(Check("checkpoints", REFUTED, place, what, "truncated_log"))
            torn += [(good, what)] if by_operator else []
        elif tree.root(size) != root:
            what = (
                f"its root is not that of the first {size} entries here: one of the entries {good} to {size - 1} was changed, "
                "left out, put in or moved, or the operator signed another history"
            )
            checks.append(Check("checkpoints", REFUTED, place, what, "forked_log"))
            torn += [(good, what)] if by_operator else []
        elif trouble is not None and trouble.reason == "no_quorum":
            lacking.append((size, place, _bare(trouble)))
        elif trouble is not None:
            checks.append(Check("checkpoints", REFUTED, place, _bare(trouble), trouble.reason))
        elif size > fold.size:
            what = f"fixes {size} entries, of which {fold.size} were accepted"
            checks.append(Check("checkpoints", UNKNOWN, place, what, "truncated_log"))
            vouched.append(Vouched(size, root.hex(), {}))
        else:
            cosigners = _cosigners(note, origin, fold, size, charters)
            who = ", ".join(sorted(cosigners)) or "nobody"
            checks.append(
                Check("checkpoints", PROVED, place, f"root computed again; signed by the operator, cosigned by {who}")
            )
            if not cosigners:
                what = "no member cosigned it: the operator could show others another history"
                checks.append(Check("witnesses", UNKNOWN, place, what, "no_quorum"))
            for name in notes.strangers(taken, *_parties(origin, fold, size)):
                what = f"a line of {name}, whose key is no member's at this size; it counts nothing"
                checks.append(Check("witnesses", UNKNOWN, place, what, "key_not_in_force"))
            vouched.append(Vouched(size, root.hex(), cosigners))
    for size, place, what in lacking:  # its root fits these entries, as does that of a later one
        if any(v.size > size for v in vouched):
            checks.append(Check("checkpoints", PROVED, place, "root computed again; enough members cosigned a later one"))
        else:
            checks.append(Check("checkpoints", UNKNOWN, place, what, "no_quorum"))
    if not told and fold.size:
        checks.append(Check("checkpoints", UNKNOWN, LEDGER, "there is no checkpoint in it", "evidence_missing"))
    latest: dict[str, int] = {}
    for found in vouched:
        for name, time in found.cosigners.items():
            if time < latest.get(name, time):
                what = f"{name} cosigned it before a smaller one, by its own clock"
                checks.append(Check("witnesses", REFUTED, f"checkpoint of {found.size} entries", what, "clock_backwards"))
            latest[name] = max(time, latest.get(name, time))
    first = min(torn, default=None)
    return vouched, first[0] if first else None, first[1] if first else ""


def _terms_at(charters: Sequence[Placed], size: int) -> Terms | None:
    found = [p.entry.terms for p in charters if p.index < size]
    return found[-1] if found else None


def _parties(origin: str, fold: Fold, size: int) -> tuple[Verifier, list[Verifier]]:
    """Returns the operator's and the members' keys in force after ``size`` entries."""
    operator = fold.key_at(OPERATOR, size)
    if operator is None:
        raise ProtocolError("key_not_in_force", f"nobody keeps the ledger at {size} entries")
    consortium = origin.removeprefix("fedmat/")
    members = []
    for site in fold.sites_at(size):
        party = fold.key_at(site, size)
        if party is not None:
            members.append(Verifier(f"{consortium}/{site}", bytes.fromhex(party.signing)))
    return Verifier(origin, bytes.fromhex(operator.signing)), members


def _verified(
    note: str, taken: notes.Note, origin: str, fold: Fold, known: int, size: int, charters: Sequence[Placed]
) -> ProtocolError | None:
    terms = _terms_at(charters, known)
    if terms is None:
        return ProtocolError("truncated_log", f"no charter comes before entry {size}")
    try:
        operator, members = _parties(origin, fold, known)
        notes.verify(note, operator, members, terms.witnesses_needed(len(members)))
    except ProtocolError as error:
        return error
    return None


def _cosigners(note: str, origin: str, fold: Fold, size: int, charters: Sequence[Placed]) -> dict[str, int]:
    operator, members = _parties(origin, fold, size)
    found = notes.verify(note, operator, members, 0).cosigners
    return {name.partition("/")[2]: time for name, time in found.items()}


def check_anchor(ledger: Ledger, charter_sha256: str | None) -> tuple[Check, int]:
    """Returns whether the charter is the one that the consortium agreed on, and from which entry on that vouches for keys."""
    if not ledger.charters:
        return Check("keys", UNKNOWN, LEDGER, "there is no charter in it", "evidence_missing"), ledger.size
    first, last = ledger.charters[0], ledger.charters[-1]
    if charter_sha256 is None:
        what = (
            f"anchored in the bundle's own charter: compare its digest {last.entry.sha256} by telephone, then give it "
            "with --charter-digest"
        )
        return Check("keys", UNKNOWN, f"entry {last.index}", what, "no_anchor"), ledger.size
    wanted = charter_sha256.replace(" ", "").lower()
    for placed in ledger.charters:
        if placed.entry.sha256 != wanted:
            continue
        if placed.index == first.index:
            return Check("keys", PROVED, f"entry {placed.index}", "the charter is the one that was agreed on"), 0
        # a later charter is signed by the keys before it: it vouches for what follows, not for what led to it
        what = f"the charter of entry {placed.index} is the one that was agreed on; it vouches for no entry before it"
        return Check("keys", UNKNOWN, f"entry {first.index}", what, "no_anchor"), placed.index
    what = f"the charter's digest is {last.entry.sha256}, not {wanted}: these are the keys of somebody else"
    return Check("keys", REFUTED, f"entry {last.index}", what, "foreign_bundle"), ledger.size


# --- the whole bundle ------------------------------------------------------------------------------------------------


@dataclass
class Verified:
    """A bundle after all checks: what was found, and those of its contents that are what the ledger says they are.

    Attributes:
        run: the entries of the bundle's run; None where the ledger has none.
        anchored_from: entries from this one on are signed with keys that the anchor vouches for.
        values: name of a file in the run's folder -> what it says, if its digest is the one stated.
        rounds: number of a round -> its report, if its digest is the one stated.
        attestations: site -> what it attested, if its digest is the one stated.
        books: site -> lines of its egress ledger that the site signed for.
    """

    bundle: Bundle
    ledger: Ledger
    run: RunEntries | None
    anchored_from: int
    checks: list[Check] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    rounds: dict[int, dict[str, Any]] = field(default_factory=dict)
    attestations: dict[str, dict[str, Any]] = field(default_factory=dict)
    books: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    model: GlobalModel | None = None

    @classmethod
    def of(cls, bundle: Bundle, charter_sha256: str | None = None) -> Verified:
        """Checks everything in a bundle.

        Args:
            charter_sha256: digest of the charter, from somebody other than who gave the bundle; None leaves it open whose
                keys these are.
        """
        ledger = read_ledger(bundle)
        anchor, since = check_anchor(ledger, charter_sha256)
        found = cls(bundle, ledger, ledger.fold.runs.get(bundle.run), since)
        found.checks += [*_structure(bundle), *ledger.checks, anchor]
        if found.run is None:
            what = f"the ledger has no run {bundle.run}"
            found.add("run", UNKNOWN, LEDGER, what, "evidence_missing")
            return found
        for step in (
            _plan, _environment, _datasets, _rounds, _updates, _exclusions, _model, _scores, _contributions, _egress,
        ):  # fmt: skip
            step(found, found.run)
        return found

    @property
    def verdict(self) -> Verdict:
        """The worst of all checks."""
        return worst(c.verdict for c in self.checks)

    @property
    def cut(self) -> bool:
        """Whether entries were left unread after one that was refused: what is missing may stand there."""
        return self.ledger.fold.size < self.ledger.size

    def add(self, topic: str, verdict: Verdict, place: str, what: str, reason: str = "") -> None:
        """Notes a check."""
        self.checks.append(Check(topic, verdict, place, what, "" if verdict == PROVED else reason))

    def about(self, *topics: str) -> tuple[Check, ...]:
        """Returns the checks of some topics; ``update`` stands for ``update:...`` too."""
        return tuple(c for c in self.checks if c.topic in topics or c.topic.partition(":")[0] in topics)

    def file(self, topic: str, name: str, stated: str, placed: Placed, *, canonical: bool = False) -> bytes | None:
        """Returns a file's bytes if its digest is the one that an entry states.

        Args:
            canonical: the digest is of the JSON value's canonical form, not of the bytes.
        """
        data, place = self.bundle.run_data(name), run_file(name)
        if data is None:
            what = f"it is missing, and entry {placed.index} states its digest {stated[:16]}: ask for it"
            self.add(topic, UNKNOWN, place, what, "evidence_missing")
            return None
        try:
            digest = files.sha256(files.canonical_json(strict_json(data)) if canonical else data)
        except _WRONG_FORM:
            self.add(topic, REFUTED, place, "it is not JSON in one reading", "not_canonical")
            return None
        if digest != stated:
            what = f"its digest is {digest[:16]}, entry {placed.index} states {stated[:16]}"
            self.add(topic, REFUTED, place, what, "wrong_digest")
            return None
        self.add(topic, PROVED, place, f"its digest is the one that entry {placed.index} states")
        return data

    def value(self, topic: str, name: str, stated: str, placed: Placed, *, canonical: bool = False) -> Any:
        """Returns what a JSON file says, as :meth:`file`."""
        data = self.file(topic, name, stated, placed, canonical=canonical)
        if data is None:
            return None
        try:
            self.values[name] = strict_json(data)
        except _WRONG_FORM:
            self.add(topic, REFUTED, run_file(name), "it is not JSON in one reading", "not_canonical")
        return self.values.get(name)

    def same(self, topic: str, place: str, what: str, found: Any, expected: Any, reason: str = "contradiction") -> bool:
        """Notes whether two things agree."""
        agree = close(found, expected)
        self.add(topic, PROVED if agree else REFUTED, place, f"{what}{' agree' if agree else ' differ'}", reason)
        return agree

    @contextmanager
    def form(self, topic: str, place: str) -> Iterator[None]:
        """Turns contents of another form than fedmat writes into a check that failed."""
        try:
            yield
        except FedmatError as error:
            self.add(topic, REFUTED, place, _bare(error), getattr(error, "reason", "malformed"))
        except _WRONG_FORM:
            self.add(topic, REFUTED, place, "it is not of the form that fedmat writes", "malformed")


def verify(bundle: Bundle, charter_sha256: str | None = None) -> tuple[Check, ...]:
    """Returns every check of a bundle; see :meth:`Verified.of`."""
    return tuple(Verified.of(bundle, charter_sha256).checks)


def strict_json(data: bytes) -> Any:
    """Returns the value of a JSON text that every reader reads alike.

    Raises:
        ValueError: no JSON, a key twice in one object, or a number that is none.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({k for k, _ in pairs}) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return dict(pairs)

    def never(text: str) -> Any:
        raise ValueError(f"{text} is no JSON number")

    return json.loads(data, object_pairs_hook=once, parse_constant=never)


def close(a: Any, b: Any) -> bool:
    """Tells whether two plain JSON values are equal, numbers up to the rounding of sums in another order."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return set(a) == set(b) and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, bool) or isinstance(b, bool) or not (isinstance(a, int | float) and isinstance(b, int | float)):
        return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)
    return math.isclose(a, b, rel_tol=_CLOSE, abs_tol=1e-12)


def _bare(error: FedmatError) -> str:
    return error.what.removeprefix(f"{getattr(error, 'reason', '')}: ")


def _structure(bundle: Bundle) -> Iterator[Check]:
    """Yields whether the packing list and the files agree; it vouches for nothing, a broken one shows a damaged parcel."""
    try:
        manifest = strict_json(bundle.contents[MANIFEST])
        listed = {str(k): (v["bytes"], v["sha256"]) for k, v in manifest["files"].items()}
        whole = files.json_bytes(manifest) == bundle.contents[MANIFEST]
    except _WRONG_FORM:
        yield Check("packing", REFUTED, MANIFEST, "it is not of the form that fedmat writes", "malformed")
        return
    if not whole or set(manifest) != {"schema", "consortium", "run", "files"}:
        yield Check("packing", REFUTED, MANIFEST, "it is not of the form that fedmat writes", "malformed")
    bad = False
    for name, (size, sha256) in sorted(listed.items()):
        data = bundle.data(name)
        if data is None:
            bad = True
            yield Check("packing", UNKNOWN, name, "it was packed, and is missing", "evidence_missing")
        elif (len(data), files.sha256(data)) != (size, sha256):
            bad = True
            yield Check("packing", REFUTED, name, "it is not the file that was packed", "wrong_digest")
    for name in sorted(set(bundle.contents) - set(listed) - {MANIFEST}):
        bad = True
        yield Check("packing", UNKNOWN, name, "nobody packed it; it counts nothing", "unlisted")
    if not bad and whole:
        yield Check("packing", PROVED, MANIFEST, f"all {len(listed)} files are as they were packed")


# --- plan, code, data ------------------------------------------------------------------------------------------------


def _plan(v: Verified, run: RunEntries) -> None:
    e = run.plan.entry
    plan = v.value("plan", PLAN, e.plan_sha256, run.plan, canonical=True)
    v.file("consortium_file", CONSORTIUM, e.consortium_file_sha256, run.plan)
    if plan is None:
        return
    place = f"entry {run.plan.index}"
    with v.form("plan", run_file(PLAN)):
        v.same("plan", place, "the seed in plan.json and in the ledger", plan["settings"]["seed"], e.seed)
        v.same("plan", place, "the rounds in plan.json and in the ledger", plan["settings"]["rounds"], e.rounds)
        v.same("plan", place, "the consortium in plan.json and in the ledger", plan["consortium"], e.consortium)
        if strangers := sorted(set(e.sites) - set(plan["roster"])):
            what = f"{', '.join(strangers)} took part and is not in the plan's roster"
            v.add("plan", REFUTED, place, what, "contradiction")


def _environment(v: Verified, run: RunEntries) -> None:
    v.value("environment", ENVIRONMENT, run.plan.entry.environment_sha256, run.plan)


def _datasets(v: Verified, run: RunEntries) -> None:
    attested = _attested(v)
    for site in run.plan.entry.sites:
        topic, placed = f"dataset:{site}", run.datasets.get(site)
        if placed is None:
            what = f"{site} took part by the operator's word and signed for no dataset"
            v.add(topic, UNKNOWN, f"entry {run.plan.index}", what, "evidence_missing")
            continue
        e, place = placed.entry, f"{run_file(ATTESTATIONS)}, {site}"
        if attested is None or site not in attested:
            what = f"what {site} attested is missing, and entry {placed.index} states its digest: ask for it"
            v.add(topic, UNKNOWN, place, what, "evidence_missing")
        else:
            _attestation(v, topic, place, attested[site], placed)
        _contract(v, run, site, e)
    if attested is not None:
        for site in sorted(set(attested) - set(run.plan.entry.sites)):
            what = f"{site} attested, and the ledger's plan does not name it"
            v.add("plan", REFUTED, f"{run_file(ATTESTATIONS)}, {site}", what, "contradiction")


def _attested(v: Verified) -> dict[str, Any] | None:
    data = v.bundle.run_data(ATTESTATIONS)
    if data is None:
        return None
    try:
        return dict(strict_json(data)["attestations"])
    except _WRONG_FORM:
        v.add("dataset", REFUTED, run_file(ATTESTATIONS), "it is not of the form that fedmat writes", "malformed")
        return None


def _attestation(v: Verified, topic: str, place: str, attested: Any, placed: Placed) -> None:
    e = placed.entry
    with v.form(topic, place):
        if files.sha256(files.canonical_json(attested)) != e.attestation_sha256:
            what = f"is not what {e.by} signed for with entry {placed.index}"
            v.add(topic, REFUTED, place, what, "wrong_digest")
            return
        told = {k: getattr(e, k) for k in ("dataset_sha256", "features_sha256", "contract_version", "n_train")}
        if v.same(topic, place, f"what {e.by} attested and its entry {placed.index}", {k: attested[k] for k in told}, told):
            v.attestations[e.by] = attested


def _contract(v: Verified, run: RunEntries, site: str, dataset: Any) -> None:
    topic, placed = f"contract:{site}", run.reports.get(site)
    if placed is None:
        what = f"{site} signed for no report on its data contract"
        v.add(topic, UNKNOWN, f"entry {run.datasets[site].index}", what, "evidence_missing")
        return
    e, place = placed.entry, f"entry {placed.index}"
    v.same(topic, place, f"{site}'s contract report and its dataset", (e.dataset_sha256, e.contract_version),
           (dataset.dataset_sha256, dataset.contract_version))  # fmt: skip
    if (attested := v.attestations.get(site)) is not None:
        with v.form(topic, place):
            v.same(
                topic,
                place,
                f"{site}'s rejected rows in its report and in what it attested",
                dict(e.rejected),
                attested["rejected"],
            )
    terms = _terms_at(v.ledger.charters, run.plan.index)
    if terms is not None and terms.contract_versions:
        allowed = e.contract_version in terms.contract_versions
        what = f"contract {e.contract_version} is {'' if allowed else 'not '}one that the charter allows"
        v.add(topic, PROVED if allowed else REFUTED, place, what, "contract_version")


# --- rounds ----------------------------------------------------------------------------------------------------------


def _rounds(v: Verified, run: RunEntries) -> None:
    e = run.plan.entry
    data = v.bundle.run_data(ROUNDS)
    lines = [] if data is None else data.splitlines()
    if data is None:
        v.add(
            "round",
            UNKNOWN,
            run_file(ROUNDS),
            "it is missing, and the aggregates' entries state its lines: ask for it",
            "evidence_missing",
        )
    elif len(lines) != len(run.aggregates) and not v.cut:
        what = f"it has {len(lines)} lines, the ledger {len(run.aggregates)} rounds"
        v.add("round", REFUTED, run_file(ROUNDS), what, "contradiction")
    for number in range(max(e.rounds, len(lines), max(run.aggregates, default=-1) + 1)):
        placed, topic, place = run.aggregates.get(number), f"round:{number}", f"{run_file(ROUNDS)} line {number + 1}"
        if placed is None:
            verdict = UNKNOWN if v.cut or number >= len(lines) else REFUTED
            v.add(topic, verdict, place, f"the ledger has no aggregate of round {number + 1}", "evidence_missing")
            continue
        if number >= e.rounds:
            v.add(topic, REFUTED, f"entry {placed.index}", f"the plan has {e.rounds} rounds", "contradiction")
        _shares(v, topic, placed, e)
        if number < len(lines):
            with v.form(topic, place):
                _report(v, topic, place, strict_json(lines[number]), placed, e)


def _shares(v: Verified, topic: str, placed: Placed, plan: Any) -> None:
    e, place = placed.entry, f"entry {placed.index}"
    total = math.fsum(e.shares.values())
    if e.shares and not math.isclose(total, 1.0, abs_tol=_CLOSE):
        v.add(topic, REFUTED, place, f"the shares of round {e.round + 1} sum to {total:.6g}, not to 1", "bad_shares")
    if any(share < 0 for share in e.shares.values()):
        v.add(topic, REFUTED, place, f"a share of round {e.round + 1} is negative", "bad_shares")
    if strangers := sorted((set(e.shares) | set(e.updates)) - set(plan.sites)):
        v.add(topic, REFUTED, place, f"{', '.join(strangers)} counted and is not in the run", "unknown_member")


def _report(v: Verified, topic: str, place: str, report: dict[str, Any], placed: Placed, plan: Any) -> None:
    e = placed.entry
    if entries.report_digest(report) != e.report_sha256:
        v.add(topic, REFUTED, place, f"is not the report that entry {placed.index} states", "wrong_digest")
        return
    told = {k: getattr(e, k) for k in ("round", "rule", "protection", "shares", "updates", "model_sha256", "evidence")}
    if not v.same(topic, place, f"the report and entry {placed.index}", {k: report[k] for k in told}, told):
        return
    v.same(topic, place, "the plan of the report and of the run", report["plan_sha256"], plan.plan_sha256)
    v.same(topic, place, "the sites that counted and those with a share", sorted(report["accepted"]), sorted(report["shares"]))
    v.rounds[e.round] = report


def _updates(v: Verified, run: RunEntries) -> None:
    for number, placed in sorted(run.aggregates.items()):
        e = placed.entry
        for site in sorted({*e.updates, *(s for s, share in e.shares.items() if share != 0)}):
            topic, mine = f"update:{number}/{site}", run.updates.get((number, site))
            if site not in e.updates:
                what = f"{site} counted in round {number + 1}, and no digest of its update is stated"
                v.add(topic, UNKNOWN, f"entry {placed.index}", what, "evidence_missing")
            elif mine is None:
                what = f"{site} counted in round {number + 1} by the operator's word, and signed for no update"
                v.add(topic, UNKNOWN, f"entry {placed.index}", what, "evidence_missing")
            elif mine.entry.sha256 != e.updates[site]:
                what = f"{site} signed for another update of round {number + 1} than entry {placed.index} counts"
                v.add(topic, REFUTED, f"entry {mine.index}", what, "other_update")
            else:
                v.add(topic, PROVED, f"entry {mine.index}", f"{site} signed for the update that round {number + 1} counts")
    for (number, site), placed in sorted(run.updates.items()):
        closed = run.aggregates.get(number)
        if closed is None or site not in closed.entry.updates:
            what = f"{site} signed for an update of round {number + 1}, and the round's entry does not name it"
            verdict = UNKNOWN if closed is None and v.cut else REFUTED
            v.add(f"update:{number}/{site}", verdict, f"entry {placed.index}", what, "contradiction")


def _exclusions(v: Verified, run: RunEntries) -> None:
    """Every site of the plan counted in every round, or an entry says why not; and the entries say what the reports say."""
    stated: dict[tuple[int, str], list[Placed]] = {}
    for placed in run.exclusions:
        stated.setdefault((placed.entry.round, placed.entry.site), []).append(placed)
    for number, placed in sorted(run.aggregates.items()):
        for site in run.plan.entry.sites:
            if placed.entry.shares.get(site, 0) != 0 or (number, site) in stated:
                continue
            what = f"{site} did not count in round {number + 1}, and no entry says why"
            v.add("exclusion", UNKNOWN, f"entry {placed.index}", what, "evidence_missing")
    with v.form("exclusion", run_file(PLAN)):
        for site in sorted(set(v.values.get(PLAN, {}).get("roster", ())) - set(run.plan.entry.sites)):
            if (-1, site) not in stated:
                what = f"{site} is in the plan's roster and took no part, and no entry says why"
                v.add("exclusion", UNKNOWN, f"entry {run.plan.index}", what, "evidence_missing")
    for number, report in sorted(v.rounds.items()):
        with v.form("exclusion", f"{run_file(ROUNDS)} line {number + 1}"):
            told = {(x["site"], kind, x["reason"]) for kind, key in (("dropout", "dropouts"), ("rejection", "rejections"))
                    for x in report[key]}  # fmt: skip
            told |= {(site, "rule", report["rule"]) for site in report["excluded"]}
            found = {(p.entry.site, p.entry.kind, p.entry.reason) for (n, _), ps in stated.items() if n == number for p in ps}
            for site, kind, reason in sorted(told ^ found):
                lacks = "the report" if (site, kind, reason) in found else "the ledger"
                what = f"{site} left out of round {number + 1} ({kind}, {reason}): {lacks} does not say so"
                v.add("exclusion", REFUTED, f"{run_file(ROUNDS)} line {number + 1}", what, "contradiction")
    if not [c for c in v.about("exclusion") if c.verdict != PROVED]:
        what = f"who was left out, and why, is stated for every round: {len(run.exclusions)} times"
        v.add("exclusion", PROVED, f"entry {run.plan.index}", what)


# --- model and scores ------------------------------------------------------------------------------------------------


def _model(v: Verified, run: RunEntries) -> None:
    placed = run.evaluation
    if placed is None:
        v.add("model", UNKNOWN, f"entry {run.plan.index}", "the ledger has no evaluation of this run", "evidence_missing")
        return
    e = placed.entry
    last = run.aggregates.get(run.plan.entry.rounds - 1)
    if last is None:
        v.add("model", UNKNOWN, f"entry {placed.index}", "the last round of the plan is not in the ledger", "evidence_missing")
    else:
        what = f"the evaluated weights and those after the last round (entry {last.index})"
        v.same("model", f"entry {placed.index}", what, e.weights_sha256, last.entry.model_sha256)
    data = v.file("model", MODEL, e.model_sha256, placed)
    if data is None:
        return
    with v.form("model", run_file(MODEL)):
        model = wire.decode(data, GlobalModel)
        digest = wire.weights_digest(model.weights, model.scaler)
        v.same(
            "model",
            run_file(MODEL),
            f"its weights and those that entry {placed.index} states",
            digest,
            e.weights_sha256,
            "wrong_digest",
        )
        v.same(
            "model", run_file(MODEL), "the plan it names and the run's", model.spec["plan_sha256"], run.plan.entry.plan_sha256
        )
        v.model = model


def _scores(v: Verified, run: RunEntries) -> None:
    placed = run.evaluation
    if placed is None:
        return
    e = placed.entry
    metrics = v.value("metrics", METRICS, e.metrics_sha256, placed)
    evaluations = v.value("evaluations", EVALUATIONS, e.evaluations_sha256, placed)
    v.value("intervals", INTERVALS, e.intervals_sha256, placed)
    matching = v.value("matching", MATCHING, e.matching_sha256, placed)
    if metrics is None:
        return
    place = run_file(METRICS)
    with v.form("metrics", place):
        v.same("metrics", place, "the model it scores and the one evaluated", metrics["model"]["sha256"], e.model_sha256)
        v.same("metrics", place, "its plan and the run's", metrics["plan_sha256"], run.plan.entry.plan_sha256)
        v.same("metrics", place, "its metric and the ledger's", metrics["task"]["metric"], e.metric)
        score = (metrics["global"].get("federated") or {}).get(e.metric)
        v.same("metrics", place, f"its score and that of entry {placed.index}", score, e.score)
        told = {s: row["dataset_sha256"] for s, row in metrics["sites"].items()}
        signed = {s: p.entry.dataset_sha256 for s, p in run.datasets.items()}
        v.same(
            "metrics", place, "the datasets it names and those that sites signed for", {s: told.get(s) for s in signed}, signed
        )
        v.same("metrics", place, "the sites it scores and the run's", sorted(told), sorted(run.plan.entry.sites))
        v.same(
            "metrics", place, "its rows of duplicates and matching.json", metrics["matching"], matching
        ) if matching is not None else None
        before = {(x["site"], x["kind"], x["reason"]) for x in metrics["exclusions"] if x["round"] < 0}
        stated = {(p.entry.site, p.entry.kind, p.entry.reason) for p in run.exclusions if p.entry.round < 0}
        for site, kind, reason in sorted(before ^ stated):
            lacks = "it" if (site, kind, reason) in stated else "the ledger"
            what = f"{site} left out before the first round ({kind}, {reason}): {lacks} does not say so"
            v.add("exclusion", REFUTED, place, what, "contradiction")
        plan = v.values.get(PLAN)
        if plan is not None:
            v.same(
                "metrics",
                place,
                "the held-out rows it names and the ledger's",
                held_out_digest(metrics, plan),
                e.held_out_sha256,
            )
    with v.form("metrics", place):
        _recomputed(v, run, metrics, evaluations)


def _recomputed(v: Verified, run: RunEntries, metrics: dict[str, Any], evaluations: list[dict[str, Any]] | None) -> None:
    place = run_file(METRICS)
    for site, attested in sorted(v.attestations.items()):
        counts = ("n_train", "n_validation", "n_test", "n_groups", "rejected")
        told = {k: metrics["sites"][site][k] for k in counts}
        v.same("metrics", f"{place}, {site}", "its counts and what the site attested", told, {k: attested[k] for k in counts})
    if len(v.rounds) == len(run.aggregates):
        sums = {
            site: {
                way: sum(r[f"bytes_{way}"].get(site, 0) for r in v.rounds.values()) for way in ("down", "up")
            }
            for site in metrics["sites"]
        }  # fmt: skip
        v.same("metrics", place, "its bytes and those of the rounds", metrics["bytes"]["sites"], sums)
        v.same("metrics", place, "its rounds and the ledger's", metrics["rounds"]["completed"], len(run.aggregates))
    if evaluations is None:
        what = f"its scores cannot be computed again without {run_file(EVALUATIONS)}"
        v.add("metrics", UNKNOWN, place, what, "evidence_missing")
        return
    from fedmat.federation.evaluation import scores

    task = metrics["task"]
    mine = [e for e in map(_evaluation, evaluations) if e.target in ("", task["target"])]
    expected = wire.plain(scores(mine, str(task["kind"]), str(task["metric"]), sorted(metrics["sites"])))
    for where, value in expected.items():
        found = metrics["global"] if where == "" else metrics["sites"][where]
        name = f"{place}{f', {where}' if where else ''}"
        kept = {k: found.get(k) for k in value}
        v.same("metrics", name, f"its scores and those computed again from {EVALUATIONS}", kept, value, "wrong_metric")
        if where == "":
            extra = sorted(set(found) - set(value))
            if extra:
                v.add("metrics", REFUTED, name, f"{', '.join(extra)} follows from no evaluation", "wrong_metric")


def _evaluation(told: Mapping[str, Any]) -> Evaluation:
    def number(value: float | None) -> float:
        return math.nan if value is None else float(value)

    def array(value: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array([math.nan if x is None else x for x in value], dtype=np.float64)

    scores = np.array(told["scores"], dtype=np.float64)
    return Evaluation(
        str(told["site"]), str(told["arm"]), str(told["split"]), array(told["sums"]), int(told["n_groups"]),
        number(told["mae_se"]), number(told["mae_low"]), number(told["mae_high"]),
        scores=scores if scores.size else np.zeros((2, 0)), target=str(told["target"]), coverage=array(told["coverage"]),
    )  # fmt: skip


# --- contribution ----------------------------------------------------------------------------------------------------


def _contributions(v: Verified, run: RunEntries) -> None:
    for placed in run.contributions:
        e, topic, place = placed.entry, f"contribution:{placed.index}", f"entry {placed.index}"
        if run.evaluation is None or e.model_sha256 != run.evaluation.entry.model_sha256:
            v.add(topic, REFUTED, place, "is about another model than this run's", "contradiction")
        elif e.method == "gram":
            _gram(v, run, topic, place, e)
        elif e.method == "settlement":
            _settlement(v, run, topic, placed)
        else:
            what = "retrained coalitions are not in a bundle: whoever has the data can train them again"
            v.add(topic, UNKNOWN, place, what, "evidence_missing")


def _gram(v: Verified, run: RunEntries, topic: str, place: str, entry: Any) -> None:
    if len(v.rounds) != len(run.aggregates):
        v.add(topic, UNKNOWN, place, "cannot be summed again: a round's report is missing or another", "evidence_missing")
        return
    totals: dict[str, float] = {}
    with v.form(topic, run_file(ROUNDS)):
        for _, report in sorted(v.rounds.items()):
            for site, value in report["contribution"].items():
                totals[site] = totals.get(site, 0.0) + value
        digests = [run.aggregates[n].entry.report_sha256 for n in sorted(run.aggregates)]
        v.same(
            topic,
            place,
            "its evidence and the rounds' reports",
            files.sha256(files.canonical_json(digests)),
            entry.evidence_sha256,
        )
        v.same(topic, place, "its shares and the rounds' sums", totals, dict(entry.shares), "wrong_share")


def _settlement(v: Verified, run: RunEntries, topic: str, placed: Placed) -> None:
    e = placed.entry
    told = v.value(topic, SETTLEMENT, e.evidence_sha256, placed)
    if told is None:
        return
    place = run_file(SETTLEMENT)
    with v.form(topic, place):
        for key, stated in (("share", e.shares), ("error", e.errors)):
            found = {s: row[key] for s, row in told["sites"].items()}
            v.same(topic, place, f"its {key}s and those of entry {placed.index}", found, dict(stated), "wrong_share")
        weights = run.evaluation.entry.weights_sha256 if run.evaluation else None  # what the sites were given, without a file
        v.same(topic, place, "its model and the run's", told["model_sha256"], weights)
        v.same(topic, place, "its plan and the run's", told["plan_sha256"], run.plan.entry.plan_sha256)
    with v.form(topic, place):
        _auditor(v, run, topic, place, told, placed)


def _auditor(v: Verified, run: RunEntries, topic: str, place: str, told: dict[str, Any], placed: Placed) -> None:
    """The Auditor signed the settlement of this plan; needs the plan as an object, from the consortium's file."""
    from fedmat.config import load_consortium
    from fedmat.federation import settlement
    from fedmat.federation.plan import Plan

    data = v.bundle.run_data(CONSORTIUM)
    charters = [p.entry for p in v.ledger.charters if p.index < placed.index]
    if data is None or not charters:
        v.add(topic, UNKNOWN, place, f"the Auditor's signature needs {run_file(CONSORTIUM)} and a charter", "evidence_missing")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONSORTIUM
        path.write_bytes(data)
        config = load_consortium(path)
    config = config.model_copy(update={"plan": config.plan.model_copy(update={"rounds": run.plan.entry.rounds})})
    plan = Plan.of(config)
    if plan.sha256 != run.plan.entry.plan_sha256:
        what = "the consortium's file makes another plan here than it did then: verify it with the fedmat that made it"
        v.add(topic, UNKNOWN, place, what, "other_version")
        return
    settlement.verify(told, plan, charters[-1].keys, placed.entry.time[:10])
    v.add(topic, PROVED, place, "the Auditor signed it, for this plan")


# --- egress ----------------------------------------------------------------------------------------------------------


def _egress(v: Verified, run: RunEntries) -> None:
    for site in run.plan.entry.sites:
        topic, placed = f"egress:{site}", run.egress.get(site)
        if placed is None:
            what = f"{site} signed for nothing that left it"
            v.add(topic, UNKNOWN, f"entry {run.plan.index}", what, "evidence_missing")
            continue
        data, place = v.bundle.data(egress_file(site)), egress_file(site)
        if data is None:
            what = f"it is missing, and entry {placed.index} states its root: ask {site} for it"
            v.add(topic, UNKNOWN, place, what, "evidence_missing")
            continue
        with v.form(topic, place):
            _book(v, run, topic, site, data, placed)
    for name in sorted(v.bundle.contents):
        if name.startswith("egress/") and name not in {egress_file(s) for s in run.plan.entry.sites}:
            v.add("egress", UNKNOWN, name, "no site of this run signed for it; it counts nothing", "unlisted")


def _book(v: Verified, run: RunEntries, topic: str, site: str, data: bytes, placed: Placed) -> None:
    e, place = placed.entry, egress_file(site)
    lines = egress.lines(data, place)
    if len(lines) < e.size:
        what = f"it has {len(lines)} lines, {site} signed for {e.size} with entry {placed.index}"
        v.add(topic, REFUTED, place, what, "truncated_log")
        return
    for other in sorted(_egress_entries(v.ledger.fold, site), key=lambda p: p.entry.size):
        if other.entry.size > len(lines):
            continue  # of a later run; this bundle was packed before
        if egress.root(data, other.entry.size).hex() != other.entry.root:
            what = f"its first {other.entry.size} lines are not those that {site} signed for with entry {other.index}"
            v.add(topic, REFUTED, place, what, "forked_log")
            return
    signed = lines[: e.size]
    what = f"all {e.size} lines are those that {site} signed for with entry {placed.index}"
    v.add(topic, PROVED, place, what)
    if len(lines) > e.size and not any(p.entry.size == len(lines) for p in _egress_entries(v.ledger.fold, site)):
        what = f"nobody signed for its lines from {e.size + 1} on; they count nothing"
        v.add(topic, UNKNOWN, f"{place} line {e.size + 1}", what, "unlisted")
    dataset = run.datasets[site].entry.dataset_sha256 if site in run.datasets else None
    mine = [n for n in signed if (n["plan_sha256"], n["dataset_sha256"]) == (run.plan.entry.plan_sha256, dataset)]
    v.same(topic, place, f"the bytes of this run's objects and entry {placed.index}", sum(n["bytes"] for n in mine), e.bytes)
    v.same(topic, place, f"the number of this run's objects and entry {placed.index}", len(mine), e.objects)
    if others := sorted({str(n["site"]) for n in signed} - {site}):
        v.add(topic, REFUTED, place, f"has lines of {', '.join(others)}", "contradiction")
    v.books[site] = mine
    _arrived(v, run, topic, site, mine)


def _egress_entries(fold: Fold, site: str) -> list[Placed]:
    return [run.egress[site] for run in fold.runs.values() if site in run.egress]


def _arrived(v: Verified, run: RunEntries, topic: str, site: str, mine: Sequence[Mapping[str, Any]]) -> None:
    """What the coordinator counted had left the site; what left and did not count is named."""
    left = {(n["round"], n["sha256"]): n for n in mine}
    place = egress_file(site)
    for (number, name), placed in sorted(run.updates.items()):
        if name != site:
            continue
        line = left.get((number, placed.entry.sha256))
        if line is None:
            what = f"the update of round {number + 1} that {site} signed for with entry {placed.index} is not in it"
            v.add(topic, REFUTED, place, what, "other_update")
        else:
            told = (placed.entry.bytes, placed.entry.kind)
            v.same(
                topic,
                f"{place} line {line['n'] + 1}",
                f"the line and entry {placed.index}",
                (line["bytes"], line["kind"]),
                told,
            )
    for number, placed in sorted(run.aggregates.items()):
        counted = placed.entry.updates.get(site)
        if counted is not None and (number, counted) not in left:
            what = f"entry {placed.index} counts an update of {site} in round {number + 1} that is not in it"
            v.add(topic, REFUTED, place, what, "other_update")
    for row in egress.reconcile(list(mine), [r for _, r in sorted(v.rounds.items())], site):
        if row.verdict == "less left":
            what = f"{row.left} bytes left in round {row.round + 1} by {site}'s word, {row.arrived} arrived"
            v.add(topic, REFUTED, f"{run_file(ROUNDS)} line {row.round + 1}", what, "contradiction")
    if len(v.rounds) < len(run.aggregates):
        what = f"what arrived cannot be compared: {len(run.aggregates) - len(v.rounds)} reports of rounds are missing or others"
        v.add(topic, UNKNOWN, run_file(ROUNDS), what, "evidence_missing")
