"""The three roles of an encrypted round, as state machines: a request in, a reply out, no files, no clock, no network.

What a role promises: it takes part in one exchange at a time, answers every step once, repeats an answer for a repeated
request and nothing else, and gives its part of one sum in a round. Its random choices come from its own key and the
header, so a role that is started again answers the requests it was asked before as it did before. Whoever runs it writes
a request down before sending the reply (``fedmat.federation``); the ``Deposit`` alone differs after a restart, in the
ciphertext of its seed, since sealing is randomised: the seed and every later reply are the same.

The roles do not trust the courier that carries their messages, nor one another: everything is signed over all that went
before, shares are committed to before any is shown, and each role works out inner products and weights for itself. Three
checks stand behind a sum: each pad sum is known to two roles, the sum's exact norm must be the one that the inner products
foretell, and every member checks its own row.

Layout of ``Opening.checks``: aggregator SHA-256 of ``sum c a``; auditor of ``sum c b``; notary of both, in this order.

Refuses to know: updates, data, how a rule chooses weights, who carries messages.

Reference:
    docs/adr/0007. Damgard et al., "Practical Covertly Secure MPC", ESORICS 2013 (commit before anything is opened).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import numpy as np

from fedmat.envelopes import (
    ROLES,
    BlameRequest,
    Commitment,
    CommitRequest,
    Confirmation,
    ConfirmRequest,
    Deposit,
    DepositRequest,
    Header,
    HeaderRequest,
    HeaderSignature,
    Opening,
    OpenRequest,
    Projections,
    RoleName,
    Share,
    ShareRequest,
    Submission,
    no_bytes,
)
from fedmat.errors import FedmatError, ProtocolError
from fedmat.keys import Charter, PartyKeys
from fedmat.transport.trigram import messages, shares
from fedmat.transport.trigram.canary import proven
from fedmat.transport.trigram.messages import SEED, SEEDS_OF, Envelope
from fedmat.transport.trigram.ring import Pad, Ring, Words, blob, dot, hashed, quadratic
from fedmat.transport.trigram.shares import Held, Holdings, MapNumbers, Opened, OwnRow

Request = HeaderRequest | DepositRequest | CommitRequest | ShareRequest | OpenRequest | ConfirmRequest | BlameRequest
Reply = HeaderSignature | Deposit | Commitment | Share | Opening | Confirmation | Projections
R = TypeVar("R", HeaderSignature, Deposit, Commitment, Share, Opening, Confirmation, Projections)
STEPS: tuple[type, ...] = (
    HeaderRequest,
    DepositRequest,
    CommitRequest,
    ShareRequest,
    OpenRequest,
    ConfirmRequest,
    BlameRequest,
)


class Chosen(Protocol):
    """What a rule decides: integer weights in the order of the sites, and why some are zero or reduced, by index."""

    @property
    def weights(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def reasons(self) -> Mapping[int, str]: ...  # noqa: D102


Select = Callable[[Sequence[Sequence[int]], Sequence[int], "Sequence[int] | None"], Chosen]


@dataclass(frozen=True)
class Decision:
    """What every role works out from the opened numbers, and the same at each.

    Attributes:
        values: of all sites whose shares were opened.
        sites, weights: of those that are not malformed.
        excluded: site -> why it was left out, has weight 0 or a reduced one.
    """

    values: Opened
    sites: tuple[str, ...]
    weights: tuple[int, ...]
    excluded: dict[str, str]
    coin: bytes

    @property
    def by_site(self) -> dict[str, int]:
        """Weight by site."""
        return dict(zip(self.sites, self.weights, strict=True))

    @property
    def rows(self) -> tuple[OwnRow, ...]:
        """What each site may check."""
        return shares.own_rows(self.values, self.by_site, self.excluded, self.coin)


@dataclass
class _Exchange:
    """A role's notes on the exchange under way; later steps need what earlier ones left."""

    header: Header
    digest: bytes
    answered: dict[type, tuple[bytes, Reply]] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)
    sites: tuple[str, ...] = ()
    held_digest: bytes = b""
    public_map: MapNumbers | None = None
    share: Share | None = None
    committed: dict[RoleName, Commitment] = field(default_factory=dict)
    committed_digest: bytes = b""
    decision: Decision | None = None
    sums: dict[str, Words] = field(default_factory=dict)
    trouble: str = ""

    @property
    def ring(self) -> Ring:
        return Ring(self.header.bits)

    @property
    def columns(self) -> int:
        return self.public_map.columns if self.public_map else 0


@dataclass(frozen=True)
class Memory:
    """What a role remembers of a run for as long as the run lasts; plain data, to be kept where a crash cannot reach it.

    Attributes:
        exchange, today: of the last header the role signed.
        rounds: in which it gave its part of a sum.
        header, sites, weights, gram: of the last sum: whose inner products were opened, and each one's weight in the sum.
            Votes that show these were random vectors allow the round another exchange.
    """

    exchange: int = -1
    today: str = ""
    rounds: tuple[int, ...] = ()
    header: Header | None = None
    sites: tuple[str, ...] = ()
    weights: tuple[int, ...] = ()
    gram: tuple[tuple[int, ...], ...] = ()


class Role:
    """One of the three roles.

    Args:
        name: which.
        keys: its private keys; their name is the role's.
        charter: whose keys are whose.
        select: the plan's rule: exact integers in, exact integers out, so that all roles choose alike.
        plan_sha256: digest of the one plan this role serves.
        memory: by run, as a former start of this role left it (:attr:`memory`); the requests of the exchange under way,
            asked again, then bring it to where it was.
    """

    def __init__(
        self,
        name: RoleName,
        keys: PartyKeys,
        charter: Charter,
        select: Select,
        plan_sha256: str,
        memory: Mapping[str, Memory] | None = None,
    ) -> None:
        if name not in ROLES or keys.name != name:
            raise ProtocolError("wrong_keys", f"the keys of {keys.name} cannot serve {name}")
        self.name: RoleName = name
        self._keys, self._charter, self._select, self._plan = keys, charter, select, plan_sha256
        self._runs: dict[str, Memory] = dict(memory or {})
        self._now: _Exchange | None = None

    @property
    def memory(self) -> dict[str, Memory]:
        """What has to outlive this object, by run. Taken before a header is signed, it is enough together with all
        requests from that header on.
        """
        return dict(self._runs)

    def handle(self, request: Request) -> Reply:
        """Returns the reply to a request; a repeated request gets the same reply.

        Raises:
            ProtocolError: the request breaks a rule; nothing is opened and nothing has changed. ``reason`` says which:
                unknown_request, wrong_plan, wrong_exchange, wrong_phase, second_request, second_opening, or that of the step.
        """
        kind = type(request)
        if kind not in STEPS:
            raise ProtocolError("unknown_request", f"a role is not asked {kind.__name__}")
        if request.plan_sha256 != self._plan or request.header.plan_sha256 != self._plan:
            raise ProtocolError("wrong_plan", f"the {self.name} serves another plan")
        digest, asked = messages.header_digest(request.header), messages.fingerprint(request)
        now = self._now
        if now is None or now.digest != digest:
            if not isinstance(request, HeaderRequest):
                raise ProtocolError("wrong_exchange", f"the {self.name} is not in this exchange")
            return self._consent(request, digest, asked)
        if kind in now.answered:
            before, reply = now.answered[kind]
            if before == asked:
                return reply
            reason = "second_opening" if kind in (OpenRequest, ConfirmRequest) else "second_request"
            raise ProtocolError(reason, f"the {self.name} has answered another {kind.__name__} in this exchange")
        if STEPS[STEPS.index(kind) - 1] not in now.answered:
            raise ProtocolError("wrong_phase", f"the {self.name} has not come to {kind.__name__} yet")
        # A step writes into a copy: what it refuses leaves no trace.
        then = replace(now, answered=dict(now.answered))
        reply = self._answer(then, request)
        then.answered[kind] = (asked, reply)
        self._now = then
        return reply

    def _answer(self, now: _Exchange, request: Request) -> Reply:
        if isinstance(request, DepositRequest):
            return self._deposit(now, request)
        if isinstance(request, CommitRequest):
            return self._commit(now, request)
        if isinstance(request, ShareRequest):
            return self._show(now, request)
        if isinstance(request, OpenRequest):
            return self._open(now, request)
        if isinstance(request, ConfirmRequest):
            return self._confirm(now, request)
        if isinstance(request, BlameRequest):
            return self._blame(now, request)
        raise ProtocolError("wrong_phase", "this exchange has begun")

    # --- header ---------------------------------------------------------------------------------------------------

    def _consent(self, request: HeaderRequest, digest: bytes, asked: bytes) -> HeaderSignature:
        header = request.header
        messages.check_header(header, self._charter)
        run = self._runs.get(header.run, Memory())
        if header.exchange <= run.exchange:
            raise ProtocolError("replay", f"exchange {header.exchange} of this run is over", fix="count on")
        if header.today < run.today:
            raise ProtocolError("replay", "the date of a header lies before that of an earlier one")
        if header.round in run.rounds:
            self._check_canaries(request, run)
        elif request.canaries:
            raise ProtocolError("not_a_canary", "votes about an exchange that opened nothing")
        reply = HeaderSignature(self.name, blob(self._keys.sign(messages.consent_bytes(self.name, digest))))
        self._runs[header.run] = replace(run, exchange=header.exchange, today=header.today)
        self._now = _Exchange(header, digest, {HeaderRequest: (asked, reply)})
        return reply

    def _check_canaries(self, request: HeaderRequest, run: Memory) -> None:
        """Refuses a second opening in a round unless the first was a canary.

        Two thresholds. More than f: so one honest site says so, and honest sites decide together. All but f of the sites
        in the sum: so that, whoever lied, the sum opened before holds no more than f vectors that are not public now.
        """
        before, round = run.header, request.header.round
        if before is None or before.round != round or not request.canaries:
            raise ProtocolError("round_opened", f"a sum of round {round} was opened", fix="go on with the next round")
        shown = proven(self._charter, before, run.sites, run.gram, request.canaries)
        counted = {s for s, w in zip(run.sites, run.weights, strict=True) if w}
        found, needed = len(counted & set(shown)), max(before.hostile + 1, len(counted) - before.hostile)
        if found < needed:
            raise ProtocolError("not_a_canary", f"{found} sites proved random vectors, expected {needed}", fix="skip the round")

    # --- deposit --------------------------------------------------------------------------------------------------

    def _deposit(self, now: _Exchange, request: DepositRequest) -> Deposit:
        names = [s.site for s in request.submissions]
        held: dict[str, Held] = {}
        refused: dict[str, str] = {}
        for submission in request.submissions:
            site = submission.site
            try:
                if site not in now.header.weights:
                    raise ProtocolError("unknown_member", "a submission of none of this exchange's sites")
                if names.count(site) > 1:
                    raise ProtocolError("duplicate", "two submissions in one exchange")
                held[site] = self._receive(now, submission)
            except ProtocolError as error:  # one bad site is a value, whatever it sent
                refused[site if site in now.header.weights else "unknown"] = error.what
        now.held = dict(sorted(held.items()))
        reply = Deposit(
            role=self.name,
            accepted=tuple(now.held),
            envelopes=blob(b"".join(h.envelope for h in now.held.values())),
            refused=dict(sorted(refused.items())),
            seed=blob(self._seal_seed(now)),
            signature=no_bytes(),
        )
        return self._signed(reply, now.digest)

    def _receive(self, now: _Exchange, submission: Submission) -> Held:
        site, data = submission.site, submission.envelope.tobytes()
        envelope = Envelope.parse(data, self._charter.seal_overhead)
        self._charter.verify(site, envelope.signature, envelope.signed(now.digest, site), now.header.today)
        masked = None
        if self.name != "notary":
            masked = now.ring.unpack(submission.masked, now.header.length, "a masked update")
            if messages.sha256(submission.masked) != envelope.payload:
                raise ProtocolError("wrong_payload", "the masked update is not the one the site signed")
        elif submission.masked.nbytes:
            raise ProtocolError("wrong_length", "the notary takes no masked update")
        opened = self._keys.unseal(envelope.seals[self.name], messages.seal_context(now.digest, site, self.name))
        tags = SEEDS_OF[self.name]
        seeds = {tag: opened[i * SEED : (i + 1) * SEED] for i, tag in enumerate(tags)}
        for tag, seed in seeds.items():
            if messages.seed_commitment(now.digest, site, tag, seed) != envelope.commitments[tag]:
                raise ProtocolError("wrong_seed", "a sealed seed is not the one the site committed itself to")
        return Held(site, messages.sha256(submission.envelope), seeds, masked)

    def _seal_seed(self, now: _Exchange) -> bytes:
        partner = messages.next_role(self.name)
        context = messages.seal_context(now.digest, self.name, partner)
        return self._charter.seal(partner, self._secret(now, "zero"), context, now.header.today)

    # --- commit ---------------------------------------------------------------------------------------------------

    def _commit(self, now: _Exchange, request: CommitRequest) -> Commitment:
        deposits = messages.one_of_each(request.deposits, "deposit")
        for role, deposit in deposits.items():
            messages.verify(self._charter, deposit, role, now.digest, now.header.today)
        own = now.answered[DepositRequest][1]
        # All but the seal, which another start of this role encrypted differently, is what this role said itself.
        if _claims(deposits[self.name]) != _claims(own):
            raise ProtocolError("roles_disagree", f"a deposit of the {self.name} that it did not make")
        common = agreed(deposits)
        needed = max(2 * now.header.hostile + 3, now.header.minimum)
        if len(common) < needed:
            raise ProtocolError("too_few", f"{len(common)} sites at all three roles, expected {needed}")
        now.public_map = shares.read_map(request.public_map, now.header.map_sha256, now.header.length)
        now.sites = tuple(common)
        now.held_digest = messages.held_digest(now.digest, common, now.header.map_sha256)
        holdings = self._holdings(now, now.sites)
        gram, mapped = holdings.gram(), holdings.mapped(now.public_map) if now.public_map else now.ring.zeros(0)
        given, got = self._secret(now, "zero"), self._unseal_seed(now, deposits)
        share = Share(
            role=self.name,
            gram=blob(gram.reshape(-1) + self._zero(now, "gram", gram.size, given, got)),
            mapped=blob(mapped + self._zero(now, "mapped", mapped.size, given, got)),
            coin=blob(self._secret(now, "coin")),
            nonce=blob(self._secret(now, "nonce")),
            signature=no_bytes(),
        )
        now.share = share
        now.held = {s: now.held[s] for s in now.sites}
        return self._signed(Commitment(self.name, blob(_commitment(now.held_digest, share)), no_bytes()), now.held_digest)

    def _unseal_seed(self, now: _Exchange, deposits: Mapping[RoleName, Deposit]) -> bytes:
        partner = messages.previous_role(self.name)
        seed = self._keys.unseal(deposits[partner].seed.tobytes(), messages.seal_context(now.digest, partner, self.name))
        if len(seed) != SEED:
            raise ProtocolError("wrong_length", f"a seed of {len(seed)} bytes from the {partner}, expected {SEED}")
        return seed

    def _zero(self, now: _Exchange, what: str, count: int, given: bytes, got: bytes) -> Words:
        # What is added here is taken off again at the next role: the masks of all three cancel, and two of them look random.
        context = hashed(f"fedmat/trigram/zero/{what}/v1", now.held_digest)
        return Pad(now.ring, given, context).take(count) - Pad(now.ring, got, context).take(count)

    # --- share ----------------------------------------------------------------------------------------------------

    def _show(self, now: _Exchange, request: ShareRequest) -> Share:
        commitments = messages.one_of_each(request.commitments, "commitment")
        for role, commitment in commitments.items():
            messages.verify(self._charter, commitment, role, now.held_digest, now.header.today)
        own = now.answered[CommitRequest][1]
        if now.share is None or commitments[self.name].digest.tobytes() != own.digest.tobytes():  # type: ignore[union-attr]
            raise ProtocolError("roles_disagree", f"a commitment of the {self.name} that it did not make")
        now.committed = commitments
        now.committed_digest = messages.committed_digest(now.held_digest, commitments)
        now.share = self._signed(now.share, now.committed_digest)
        return now.share

    # --- open -----------------------------------------------------------------------------------------------------

    def _open(self, now: _Exchange, request: OpenRequest) -> Opening:
        run = self._runs[now.header.run]
        by_role = messages.one_of_each(request.shares, "share")
        for role, share in by_role.items():
            messages.verify(self._charter, share, role, now.committed_digest, now.header.today)
            if _commitment(now.held_digest, share) != now.committed[role].digest.tobytes():
                raise ProtocolError("wrong_share", f"a share of the {role} that it did not commit itself to")
        values, coin = open_values(now.ring, now.sites, by_role, now.columns)
        decision = self._decide(now, values, coin)
        now.sums = self._holdings(now, now.sites).sums(decision.by_site)
        opening = Opening(
            role=self.name,
            sites=decision.sites,
            weights=decision.weights,
            excluded=decision.excluded,
            part=no_bytes() if self.name == "notary" else blob(self._part(now)),
            checks=blob(b"".join(messages.sha256(now.sums[tag]) for tag in SEEDS_OF[self.name])),
            signature=no_bytes(),
        )
        now.decision = decision
        opening = self._signed(opening, now.committed_digest)
        # The round is marked before anyone gets to see the opening.
        self._runs[now.header.run] = replace(
            run,
            rounds=tuple(sorted({*run.rounds, now.header.round})),
            header=now.header,
            sites=values.sites,
            weights=tuple(decision.by_site.get(s, 0) for s in values.sites),
            gram=tuple(map(tuple, values.gram)),
        )
        return opening

    def _part(self, now: _Exchange) -> Words:
        return now.sums["e"] + now.sums["a"] if self.name == "aggregator" else now.sums["b"]

    def _decide(self, now: _Exchange, values: Opened, coin: bytes) -> Decision:
        excluded = shares.malformed(values, now.ring, now.public_map)
        sites = tuple(s for s in values.sites if s not in excluded)
        needed = max(2 * now.header.hostile + 3, now.header.minimum)
        if len(sites) < needed:
            raise ProtocolError("too_few", f"{len(sites)} sites with well-formed updates, expected {needed}")
        kept = values.of(sites)
        scores = [row[0] for row in kept.scores] if kept.scores else None
        try:
            chosen = self._select(kept.gram, [now.header.weights[s] for s in sites], scores)
        except ProtocolError:
            raise
        except FedmatError as error:
            raise ProtocolError("rule_refused", error.what, fix=error.fix) from None
        weights = tuple(chosen.weights)
        if len(weights) != len(sites):
            raise ProtocolError("bad_weights", f"the rule gave {len(weights)} weights for {len(sites)} sites")
        messages.check_weights(now.header, weights)
        for i, site in enumerate(sites):
            if not weights[i] or i in chosen.reasons:
                excluded[site] = chosen.reasons.get(i, "weight 0 by the rule")
        return Decision(values, sites, weights, dict(sorted(excluded.items())), coin)

    # --- confirm --------------------------------------------------------------------------------------------------

    def _confirm(self, now: _Exchange, request: ConfirmRequest) -> Confirmation:
        by_role = {o.role: o for o in request.openings}
        others = set(ROLES) - {self.name}
        if len(request.openings) != len(others) or set(by_role) != others:
            raise ProtocolError("wrong_parties", "expected one opening of each of the other roles")
        for role, opening in by_role.items():
            digests = {"part": opening.part.tobytes()} if self.name == "notary" else {}
            messages.verify(self._charter, opening, role, now.committed_digest, now.header.today, **digests)
        decision = now.decision
        if decision is None:
            raise ProtocolError("wrong_phase", "nothing was opened")
        try:
            total = self._checked_sum(now, decision, by_role)
        except ProtocolError as error:  # what another role signed is wrong: said so, signed, for everyone to see
            total, now.trouble = None, error.what
        if total is not None and not self._norm_holds(now, decision, total):
            now.trouble = "wrapped: the sum's norm contradicts the inner products"
        reply = Confirmation(
            role=self.name,
            sum_sha256=messages.sha256(total).hex() if total is not None else "",
            trouble=now.trouble,
            rows=blob(b"".join(row.leaf(now.digest) for row in decision.rows)),
            signature=no_bytes(),
        )
        return self._signed(reply, messages.confirmation_binding(now.digest, decision.sites, decision.weights))

    def _checked_sum(self, now: _Exchange, decision: Decision, others: Mapping[RoleName, Opening]) -> Words | None:
        """Returns the opened sum (None at the Notary) if all that the others said about it agrees with what is held here."""
        for role, opening in others.items():
            if (opening.sites, opening.weights, opening.excluded) != (decision.sites, decision.weights, decision.excluded):
                raise ProtocolError("roles_disagree", f"the {role} chose other weights")
        claimed = claimed_pads({r: o.checks.tobytes() for r, o in others.items()})
        for tag in SEEDS_OF[self.name]:
            for role, digest in claimed[tag].items():
                if digest != messages.sha256(now.sums[tag]):
                    raise ProtocolError("wrong_check", f"the {role} summed other pads than the {self.name}")
        if self.name == "notary":
            if others["auditor"].part.tobytes() != messages.sha256(now.sums["b"]):
                raise ProtocolError("wrong_part", "the auditor's part is not the sum of its pads")
            return None
        other: RoleName = "auditor" if self.name == "aggregator" else "aggregator"
        part = now.ring.unpack(others[other].part, now.header.length, f"the part of the {other}")
        # What is left of the other's part without what both hold is a sum of pads that the notary knows too.
        pads, tag = (part, "b") if other == "auditor" else (part - now.sums["e"], "a")
        if messages.sha256(pads) != claimed[tag]["notary"]:
            raise ProtocolError("wrong_part", f"the part of the {other} is not what the notary's seeds make of it")
        return part + self._part(now)

    def _norm_holds(self, now: _Exchange, decision: Decision, total: Words) -> bool:
        lifted = now.ring.lift(total)
        return dot(lifted, lifted) == quadratic(decision.weights, decision.values.of(decision.sites).gram)

    # --- blame ----------------------------------------------------------------------------------------------------

    def _blame(self, now: _Exchange, request: BlameRequest) -> Projections:
        decision = now.decision
        confirmations = messages.one_of_each(request.confirmations, "confirmation")
        if decision is None:
            raise ProtocolError("wrong_phase", "nothing was opened")
        binding = messages.confirmation_binding(now.digest, decision.sites, decision.weights)
        for role, confirmation in confirmations.items():
            messages.verify(self._charter, confirmation, role, binding, now.header.today)
        found = [confirmations[r].trouble for r in ("aggregator", "auditor")]
        if not all(is_wrapped(t) for t in found) or (self.name != "notary" and not is_wrapped(now.trouble)):
            raise ProtocolError("no_cause", "projections are shown only where both holders of the sum found it wrapped")
        values = self._holdings(now, now.sites).projections(decision.by_site, decision.coin)
        both = b"".join(values[tag].tobytes() for tag in shares.PARTS_OF[self.name])
        return self._signed(Projections(self.name, blob(both), no_bytes()), now.committed_digest)

    # --- common ---------------------------------------------------------------------------------------------------

    def _holdings(self, now: _Exchange, sites: Sequence[str]) -> Holdings:
        return Holdings(self.name, now.ring, now.digest, now.header.length, tuple(now.held[s] for s in sites))

    def _secret(self, now: _Exchange, what: str) -> bytes:
        return self._keys.secret(f"fedmat/trigram/{what}/v1|".encode() + now.digest)

    def _signed(self, message: R, binding: bytes) -> R:
        return replace(message, signature=blob(self._keys.sign(messages.signed_bytes(message, binding))))


# --- what a courier works out too, and needs no secret for -----------------------------------------------------------


def agreed(deposits: Mapping[RoleName, Deposit]) -> dict[str, bytes]:
    """Returns the sites that all three roles accepted with the same envelope: site -> its digest, in alphabetical order."""
    held: list[dict[str, bytes]] = []
    for role, deposit in deposits.items():
        data = deposit.envelopes.tobytes()
        if len(data) != 32 * len(deposit.accepted) or list(deposit.accepted) != sorted(set(deposit.accepted)):
            raise ProtocolError("bad_deposit", f"a deposit of the {role} names sites twice or without a digest")
        held.append({s: data[32 * i : 32 * (i + 1)] for i, s in enumerate(deposit.accepted)})
    first, *rest = held
    return {s: d for s, d in first.items() if all(h.get(s) == d for h in rest)}


def open_values(ring: Ring, sites: tuple[str, ...], by_role: Mapping[RoleName, Share], columns: int) -> tuple[Opened, bytes]:
    """Returns what three shares open, and the common coin.

    Raises:
        ProtocolError: wrong_length or impossible_gram.
    """
    sizes = shares.share_sizes(len(sites), columns)
    parts: tuple[list[Words], list[Words]] = ([], [])
    for role in ROLES:
        share = by_role[role]
        parts[0].append(ring.unpack(share.gram, sizes[0], f"a share of the {role}"))
        parts[1].append(ring.unpack(share.mapped, sizes[1], f"a share of the {role}"))
        if share.coin.nbytes != SEED:
            raise ProtocolError("wrong_length", f"a coin of the {role}")
    values = shares.opened(ring, sites, parts[0], parts[1], columns)
    return values, shares.common_coin([by_role[r].coin.tobytes() for r in ROLES])


def claimed_pads(checks: Mapping[RoleName, bytes]) -> dict[str, dict[RoleName, bytes]]:
    """Returns the digests of both pad sums that roles gave: tag -> role -> digest.

    Raises:
        ProtocolError: wrong_length.
    """
    claimed: dict[str, dict[RoleName, bytes]] = {"a": {}, "b": {}}
    for role, data in checks.items():
        tags = SEEDS_OF[role]
        if len(data) != 32 * len(tags):
            raise ProtocolError("wrong_length", f"the checks of the {role}")
        for i, tag in enumerate(tags):
            claimed[tag][role] = data[32 * i : 32 * (i + 1)]
    return claimed


def is_wrapped(trouble: str) -> bool:
    """Returns whether a confirmation says that the sum's norm contradicts the inner products."""
    return trouble.startswith("wrapped:")


def joined_projections(ring: Ring, length: int, selected: int, given: Mapping[RoleName, Projections]) -> Words:
    """Returns the projections of the selected updates, ``repetitions x selected``.

    Raises:
        ProtocolError: wrong_length, or roles_disagree: two roles contradict each other about a part that both hold, so
            one of them lies, and no site is blamed.
    """
    count = shares.repetitions(length) * selected
    parts: dict[str, Words] = {}
    for role in ROLES:
        both = ring.unpack(given[role].values, 2 * count, f"projections of the {role}")
        for tag, values in zip(shares.PARTS_OF[role], (both[:count], both[count:]), strict=True):
            if tag in parts and not np.array_equal(parts[tag], values):
                raise ProtocolError("roles_disagree", f"the {role} contradicts another role about a projection")
            parts[tag] = values
    return np.asarray(parts["e"] + parts["a"] + parts["b"])


def _claims(deposit: Reply) -> bytes:
    """Digest of what a deposit says, without the seal and the signature."""
    if not isinstance(deposit, Deposit):
        raise ProtocolError("wrong_phase", "no deposit was made")
    return messages.fingerprint((deposit.role, deposit.accepted, deposit.envelopes, deposit.refused))


def _commitment(held: bytes, share: Share) -> bytes:
    """Digest of a share before it is shown; the nonce keeps it from being guessed."""
    return messages.signed_bytes(share, held)
