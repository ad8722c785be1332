"""How the updates of one round become one sum: in the clear, between three roles, under masks, or under CKKS.

Knows: whom to ask in which order, what makes an answer acceptable, how to go on after a crash. Refuses to know: what the
sum is used for (the coordinator), records, keys' private halves. Each way of protecting a round is one class with one
method, ``combine``; all of them ask sites to train through :class:`Asking`, which keeps what travels down small.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedmat import envelopes, files, wire
from fedmat import weights as wts
from fedmat.aggregation import robust
from fedmat.aggregation.linear import LinearRule, equal_shares, row_shares
from fedmat.contribution import gram_shapley
from fedmat.domain import (
    Attestation,
    Checkpoint,
    Delivery,
    Dropout,
    NeedModel,
    ReferenceRequest,
    Rejection,
    Request,
    Sealed,
    Step,
    TrainRequest,
    Update,
)
from fedmat.envelopes import ROLES, AuditVote, Ciphertexts, Header, Masked, MaskedSumRequest, Submission
from fedmat.errors import ProtocolError, RoundFailed, StateError
from fedmat.federation.engine import ANSWERED, Engine, Failure, frame, unframe
from fedmat.federation.plan import Plan
from fedmat.keys import Charter
from fedmat.seeds import derive
from fedmat.transport import ckks
from fedmat.transport.compression import Compressor
from fedmat.transport.masking import MaskingServer
from fedmat.transport.trigram.canary import proven
from fedmat.transport.trigram.exchange import Combined, Exchange, ExchangeFailed
from fedmat.transport.trigram.ring import FILL, Ring
from fedmat.weights import Vector, Weights

COMPRESSED = "compressed"  # the one tensor of a compressed update
REFERENCE = "reference"  # the party that holds the consortium's reference rows
SILENT = "silent"  # a site that did not say what it found
_OPENED_BEFORE = ("round_opened", "second_opening")  # reasons of a party that has helped to open a sum of the round before
_NOT_AS_SHOWN = "canary, and what was opened is not what it shows: a role lied, or the site"
_NO_VOTES: tuple[AuditVote, ...] = ()
_AWAY = ("crashed", "late", "unreachable")  # how an answer begins of a party that may be back later
KEPT_STEPS = 5  # a site that missed more rounds gets the whole model


class ExchangesSpent(RoundFailed):
    """A round had all its tries and nothing was opened; the next run begins with fresh ones.

    Attributes:
        next_exchange: number of the next encrypted exchange.
    """

    next_exchange = 0


class QuorumMissed(RoundFailed):
    """Too few sites answered well; nothing of the round was given to any role, so all of them may be asked again."""


@dataclass(frozen=True)
class Outcome:
    """What a round came to.

    Attributes:
        mean: weighted mean of the updates that counted, shape ``k``; None where the round opened nothing usable.
        step: the same as it travels to sites; None in a plan without compressed steps.
        shares: weight of every site that counted.
        parties: bytes to and from parties that are no sites.
        next_exchange: number of the next encrypted exchange.
        clip: largest norm of the next encrypted round's updates.
    """

    mean: Vector | None
    step: Step | None
    shares: dict[str, float]
    deliveries: Sequence[Delivery]
    dropouts: tuple[Dropout, ...]
    rejections: tuple[Rejection, ...]
    updates: Mapping[str, Update] = field(default_factory=dict)
    sealed: Mapping[str, Sealed] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)
    audits: dict[str, str] = field(default_factory=dict)
    evidence: dict[str, str] = field(default_factory=dict)
    contribution: dict[str, float] = field(default_factory=dict)
    parties: dict[str, int] = field(default_factory=dict)
    exchange: int = -1
    next_exchange: int = 0
    clip: float = 0.0


class Replay(Engine):
    """An engine that writes down every answer before anyone acts on it, and gives it again when asked the same again.

    A coordinator that is started again after a crash repeats its round and gets the same answers up to where it stopped;
    an encrypted update is thereby never asked for twice, and no two different sums of one round can be opened.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine, self._folder = engine, folder
        self.side_by_side = engine.side_by_side

    def exchange(self, data: Mapping[str, bytes], deadline_s: float) -> Sequence[tuple[bytes | Failure, float]]:
        """See :class:`Engine`; a stored answer took no time."""
        paths = {party: self._folder / f"{party}-{files.sha256(request)[:32]}.answer" for party, request in data.items()}
        missing = {party: request for party, request in data.items() if not paths[party].exists()}
        fresh = dict(zip(missing, self._engine.exchange(missing, deadline_s), strict=True)) if missing else {}
        for party, (reply, _) in fresh.items():
            if party in ROLES and isinstance(reply, Dropout) and reply.reason != "refused":
                continue  # a role that was away may be back, and its answer is the same whenever it comes
            files.write_atomic(paths[party], frame(reply))
        return [fresh[party] if party in fresh else (unframe(party, paths[party].read_bytes()), 0.0) for party in data]

    def forget(self, *, failures: bool = False) -> None:
        """Removes the answers of a round that is saved; or only those that say a party failed, so that it is asked again."""
        for path in self._folder.glob("*.answer" if failures else "*"):
            if not failures or path.read_bytes()[:1] != ANSWERED:
                path.unlink()


class Asking:
    """Asks sites to train from the round's model, sending each only what it lacks; counts every byte."""

    def __init__(self, engine: Engine, plan: Plan, state: Checkpoint, sites: Sequence[str]) -> None:
        self.engine, self.plan, self.state, self.sites = engine, plan, state, tuple(sites)
        self.number = state.next_round
        self.deadline = plan.settings.deadline_s
        self.model_sha256 = wire.weights_digest(state.weights, state.scaler)
        self.compressor = compressor(plan, state.weights, self.number, self.model_sha256)
        self.bytes_down = dict.fromkeys(self.sites, 0)
        self.bytes_up = dict.fromkeys(self.sites, 0)
        self.seconds = dict.fromkeys(self.sites, 0.0)
        self.parties: dict[str, int] = {}
        self.notes: dict[str, str] = {}  # site -> what a canary of this round found
        self.requests: dict[str, str] = {}  # site -> digest of the request it answered

    def train(
        self, each: Callable[..., Mapping[str, Any]] | None = None, *, sites: Sequence[str] | None = None
    ) -> list[Delivery]:
        """Returns the answers of ``sites`` (by default all) to the round's request.

        Args:
            each: gives a site's further fields, called with the site and ``whole``: whether it gets the whole model.
        """
        plan, s = self.plan, self.state
        sites = self.sites if sites is None else sites
        plain = TrainRequest(plan.sha256, self.number, plan.lr(self.number), self.model_sha256, control=s.control)
        shared: dict[tuple[Any, ...], TrainRequest] = {}

        def request(site: str, *, whole: bool) -> TrainRequest:
            steps = None if whole else self._missed(site)
            extra = each(site, whole=whole) if each else {}
            key = (whole, steps is None, len(steps or ()), *sorted((k, id(v)) for k, v in extra.items()))
            if key not in shared:  # one request, encoded once, for all sites that need the same
                body: dict[str, Any] = {"weights": s.weights, "scaler": s.scaler} if steps is None else {"steps": steps}
                if steps is None and not whole and self.number == 0 and travels(plan):
                    body["weights"] = {}  # every site can make the first weights: they follow from the plan's seed
                shared[key] = dataclasses.replace(plain, **body, **extra)
            return shared[key]

        first = {site: request(site, whole=False) for site in sites}
        found = {d.site: d for d in self._ask(first)}
        lacking = [site for site, d in found.items() if isinstance(d.answer, NeedModel)]
        again = {site: request(site, whole=True) for site in lacking}
        found |= {d.site: d for d in self._ask(again)} if again else {}
        self.requests = {site: wire.digest(again.get(site, first[site])) for site in sites}
        return [found[site] for site in sites]

    def _missed(self, site: str) -> tuple[Step, ...] | None:
        """Returns the steps from the model a site holds to this round's; None where it has to be sent whole."""
        c, held = self.plan.settings.compression, self.state.holds.get(site)
        if not travels(self.plan) or held is None:
            return None
        if c.refresh_every and self.number % c.refresh_every == 0:
            return None
        steps = tuple(step for step in self.state.steps if step.round >= held)
        return steps if [x.round for x in steps] == list(range(held, self.number)) else None

    def _ask(self, requests: Mapping[str, Request]) -> Sequence[Delivery]:
        """Sends requests to any parties and counts what they cost."""
        deliveries = self.engine.scatter(requests, self.deadline)
        for d in deliveries:
            if d.site in self.bytes_down:
                self.bytes_down[d.site] += d.bytes_down
                self.bytes_up[d.site] += d.bytes_up
                self.seconds[d.site] += d.seconds
            else:
                self.parties[d.site] = self.parties.get(d.site, 0) + d.bytes_down + d.bytes_up
        return deliveries

    def send(self, requests: Mapping[str, Any]) -> dict[str, Any]:
        """Sends requests to any parties; a role that crashed is asked the very same again, twice at most."""
        answers: dict[str, Any] = {}
        left = dict(requests)
        for _ in range(3):
            answers |= {d.site: d.answer for d in self._ask(left)}
            left = {
                p: r for p, r in left.items()
                if p not in self.bytes_down and isinstance(answers[p], Dropout) and answers[p].reason in ("crashed", "late")
            }  # fmt: skip
            if not left:
                break
        return answers

    def totals(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Returns one delivery per site with everything it sent and received in this round."""
        found = {d.site: d for d in deliveries}
        out = []
        for s in self.sites:
            last = found.get(s) or Delivery(s, Dropout(s, "unreachable", "took no part to the end"), 0, 0, 0.0)
            down, up = self.bytes_down[s], self.bytes_up[s]
            out.append(dataclasses.replace(last, bytes_down=down, bytes_up=up, seconds=self.seconds[s]))
        return out


def compressor(plan: Plan, like: Weights, number: int, model_sha256: str) -> Compressor:
    """Returns a round's compressor: its random numbers are fixed by the model the round starts from, before any training."""
    seed = derive(plan.settings.seed, "compression", number, model_sha256)
    return Compressor.of(plan.settings.compression, like, seed)


def travels(plan: Plan) -> bool:
    """Tells whether sites get compressed steps in place of whole models."""
    c = plan.settings.compression
    return c.name != "none" and c.downlink


def scaled(step: Step, factor: float) -> Step:
    """Returns ``factor`` times a step."""
    return dataclasses.replace(step, scale=step.scale * factor)


def single_step(number: int, mean: Vector) -> Step:
    """Returns a mean, shape ``k``, in single precision, as it travels."""
    return Step(number, "float32", np.frombuffer(mean.astype("<f4").tobytes(), dtype=np.uint8), 1.0)


def sum_as_step(header: Header, total: bytes, weight: int) -> Step:
    """Returns the weighted mean that an opened sum of ring elements stands for."""
    kind: Any = f"int{header.bits}"
    return Step(header.round, kind, np.frombuffer(total, dtype=np.uint8), ring_unit(header) / weight)


def ring_unit(header: Header) -> float:
    """Returns what one unit of a ring element is worth in an update."""
    return header.clip / (FILL * Ring(header.bits).bound)


def advance(weights: Weights, by: Vector) -> Weights:
    """Returns the model after a step of the whole vector ``by``; sites and coordinator make it alike, bit for bit."""
    return wts.unflatten(wts.flatten(weights) + by, weights)


class Combining(abc.ABC):
    """One way of making one sum out of a round's updates."""

    def __init__(self, plan: Plan, attestations: Mapping[str, Attestation]) -> None:
        self.plan, self.attestations = plan, attestations

    @abc.abstractmethod
    def combine(self, asking: Asking) -> Outcome:
        """Returns the round's outcome.

        Raises:
            RoundFailed: too few sites, or a party without which nothing can be opened; the state before the round is kept.
        """

    def base(self) -> dict[str, int]:
        """Returns every site's integer weight in a sum, from what it attested."""
        return integer_weights(self.plan, self.attestations)

    def need_quorum(self, good: Mapping[str, object], asking: Asking, failures: Sequence[Dropout | Rejection]) -> None:
        """Refuses to go on with fewer than the plan's quorum."""
        need_quorum(self.plan, f"round {asking.number + 1}", good, failures)

    def step(self, mean: Step) -> Step | None:
        """Returns the step that ``mean`` leads to, in the form in which sites get it; None where they get whole models."""
        return scaled(mean, self.plan.settings.server.lr) if travels(self.plan) else None


class Clear(Combining):
    """Updates arrive as they are; the coordinator sees each of them."""

    def combine(self, asking: Asking) -> Outcome:
        """See :class:`Combining`."""
        plan, compressing = self.plan, asking.compressor
        deliveries = asking.train()
        updates: dict[str, Update] = {}
        dropouts: list[Dropout] = []
        rejections: list[Rejection] = []
        for d in deliveries:
            if isinstance(d.answer, Dropout):
                dropouts.append(d.answer)
                continue
            verdict = d.answer if isinstance(d.answer, Rejection) else self._admit(d, asking)
            if isinstance(verdict, Rejection):
                rejections.append(verdict)
            elif isinstance(d.answer, Update):
                updates[d.site] = d.answer
        self.need_quorum(updates, asking, [*dropouts, *rejections])
        sites = sorted(updates)
        vectors = [self._numbers(updates[s]) for s in sites]
        shares, excluded, mean = self._join(sites, vectors)
        step = None
        if plan.settings.compression.name != "none":
            single = single_step(asking.number, mean)
            mean, step = single.vector(), self.step(single)  # what sites get is what is applied here
        return Outcome(
            compressing.expand(mean), step, shares, asking.totals(deliveries), tuple(dropouts), tuple(rejections),
            updates=updates, excluded=excluded, parties=asking.parties,
        )  # fmt: skip

    def _numbers(self, update: Update) -> Vector:
        if self.plan.settings.compression.name == "none":
            return wts.flatten(update.delta)
        return update.delta[COMPRESSED].astype(np.float64)

    def _join(self, sites: Sequence[str], vectors: Sequence[Vector]) -> tuple[dict[str, float], dict[str, str], Vector]:
        rule = self.plan.settings.rule
        if rule.name == "mean":
            shares = shares_of(self.plan, self.attestations, sites)
            return shares, {}, LinearRule(self.plan.settings.server).total(vectors, [shares[s] for s in sites])
        base = self.base()
        mean, choice = robust.choose_clear(rule, np.stack(vectors), [base[s] for s in sites])
        total = sum(choice.weights)
        shares = {s: w / total for s, w in zip(sites, choice.weights, strict=True) if w} if total else {}
        return shares, {sites[i]: why for i, why in choice.reasons.items()}, mean

    def _admit(self, delivery: Delivery, asking: Asking) -> Rejection | None:
        update, site = delivery.answer, delivery.site
        if not isinstance(update, Update):
            return Rejection(site, "malformed", f"answered a training request with {type(update).__name__}")
        if update.site != site:
            return Rejection(site, "wrong_site", "signed with another site's name")
        if update.plan_sha256 != self.plan.sha256:
            return Rejection(site, "wrong_plan", "made for another plan")
        if update.round != asking.number or update.request_sha256 != asking.requests[site]:
            return Rejection(site, "wrong_round", f"answers another request than round {asking.number + 1}'s")
        control, like = asking.state.control, self._like(asking)
        shapes = wts.same_shape(update.delta, like) and wts.same_shape(update.control_delta or control, control)
        if not shapes or bool(update.control_delta) != bool(control):
            return Rejection(site, "wrong_shape", "tensors differ in name, shape or type from the request's")
        if not (wts.is_finite(update.delta) and wts.is_finite(update.control_delta)):
            return Rejection(site, "non_finite", "holds NaN or infinity")
        size = wts.norm(update.delta)
        if size > self.plan.settings.max_update_norm:
            return Rejection(site, "too_large", f"norm {size:.3g}, the plan permits {self.plan.settings.max_update_norm:g}")
        return None

    def _like(self, asking: Asking) -> Weights:
        if self.plan.settings.compression.name == "none":
            return asking.state.weights
        return {COMPRESSED: np.zeros(asking.compressor.length, dtype=np.float32)}


class Encrypted(Combining):
    """What all encrypted ways share: the header, its file, and reading the sealed answers."""

    def __init__(
        self, plan: Plan, attestations: Mapping[str, Attestation], charter: Charter, folder: Path, run: str, today: str
    ) -> None:
        super().__init__(plan, attestations)
        self.charter, self.folder, self.run, self.today = charter, folder, run, today

    def clip(self, state: Checkpoint) -> float:
        """Returns the largest norm of this round's updates."""
        return float(state.server["clip"][0]) if "clip" in state.server else self.plan.settings.security.clip

    def header(self, asking: Asking, exchange: int, public_map: envelopes.PublicMap | None = None) -> Header:
        """Returns the exchange's header: the stored one if the coordinator crashed after it had made it."""
        path = self.folder / f"header-{exchange:06d}.safetensors"
        if path.exists():
            stored = wire.decode(path.read_bytes(), Header)
            if (stored.round, stored.model_sha256) != (asking.number, asking.model_sha256):
                raise StateError(f"{path}: belongs to another round", fix="restore the run's checkpoint, or start afresh")
            return stored
        s, weights = self.plan.settings, self.base()
        made = Header(
            self.plan.sha256, self.run, asking.number, exchange, asking.model_sha256, self.charter.sha256,
            asking.compressor.length, s.security.ring_bits, s.rule.hostile, minimum(self.plan), self.clip(asking.state),
            {site: weights[site] for site in asking.sites}, "" if public_map is None else wire.digest(public_map), self.today,
        )  # fmt: skip
        files.write_atomic(path, wire.encode(made))
        return made

    def read(self, deliveries: Sequence[Delivery], kind: type) -> tuple[dict[str, Sealed], list[Dropout], list[Rejection]]:
        """Returns the sealed answers of the right kind, and the failures."""
        sealed: dict[str, Sealed] = {}
        dropouts: list[Dropout] = []
        rejections: list[Rejection] = []
        for d in deliveries:
            a = d.answer
            if isinstance(a, Dropout):
                dropouts.append(a)
            elif isinstance(a, Rejection):
                rejections.append(a)
            elif not isinstance(a, Sealed) or not isinstance(a.content, kind):
                rejections.append(Rejection(d.site, "malformed", f"answered an encrypted round with {type(a).__name__}"))
            elif d.site != a.site or d.site != a.content.site:
                rejections.append(Rejection(d.site, "wrong_site", "answers in another site's name"))
            else:
                sealed[d.site] = a
        return sealed, dropouts, rejections

    def combine(self, asking: Asking) -> Outcome:
        """See :class:`Combining`. A canary does not count as a try."""
        number, canaries, troubles = asking.state.exchange, _NO_VOTES, list[str]()
        public_map = self._reference(asking)
        while len(troubles) < self.plan.settings.security.exchanges:
            header = self.header(asking, number, public_map)
            number += 1
            try:
                found = self._exchange(asking, header, public_map, canaries)
            except ExchangeFailed as error:
                if error.reason == "role_failed" and error.detail.startswith(_AWAY):
                    raise RoundFailed(  # it may come back: answers so far are kept, and nothing is asked for twice
                        f"round {asking.number + 1}: {error.what}",
                        fix=f"start the {error.role} again, then run again: it goes on",
                    ) from None
                if error.opened or any(why in error.detail for why in _OPENED_BEFORE):
                    return self._void(asking, header, error.what, error.guilty)
                troubles.append(error.what)
            except ProtocolError as error:
                if any(why in error.what for why in _OPENED_BEFORE):
                    return self._void(asking, header, error.what)
                troubles.append(error.what)
            else:
                if isinstance(found, Outcome):
                    return found
                canaries = found
        spent = ExchangesSpent(
            f"round {asking.number + 1}: no exchange came to an end: " + "; ".join(dict.fromkeys(troubles)),
            fix="mend what is named and run again; raise plan.security.exchanges for more tries",
        )
        spent.next_exchange = number
        raise spent

    @abc.abstractmethod
    def _exchange(
        self, asking: Asking, header: Header, public_map: envelopes.PublicMap | None, canaries: tuple[AuditVote, ...]
    ) -> Outcome | tuple[AuditVote, ...]:
        """Returns what one exchange came to; or the members' votes, where they declared it a canary.

        Raises:
            ProtocolError: it came to nothing.
        """

    def _reference(self, asking: Asking) -> envelopes.PublicMap | None:
        """Returns the round's public map, in rounds whose contributions the plan looks at."""
        wanted = self.plan.settings.contribution
        if wanted.method == "none" or asking.number % wanted.every:
            return None
        request = ReferenceRequest(self.plan.sha256, asking.number, asking.state.weights, asking.state.scaler)
        answer = asking.send({REFERENCE: request})[REFERENCE]
        if not isinstance(answer, envelopes.PublicMap):
            detail = answer.detail if isinstance(answer, Dropout | Rejection) else type(answer).__name__
            raise RoundFailed(
                f"round {asking.number + 1}: the reference party gave no map ({detail})",
                fix="bring it back and run again, or set plan.contribution.method: none",
            )
        return answer

    def _void(self, asking: Asking, header: Header, what: str, guilty: Sequence[str] = ()) -> Outcome:
        """A round of which something was opened that cannot be used: its updates are never sent again, the next one goes on."""
        blamed = [Rejection(s, "wrapped", "its update does not fit into the ring") for s in guilty]
        silent = [Dropout(s, "unreachable", f"the round was given up: {what}") for s in asking.sites if s not in guilty]
        return Outcome(
            None, None, {}, asking.totals(()), tuple(silent), tuple(blamed), evidence={"header": wire.digest(header)},
            parties=asking.parties, exchange=header.exchange, next_exchange=header.exchange + 1, clip=header.clip,
        )  # fmt: skip

    def outcome(
        self,
        asking: Asking,
        deliveries: Sequence[Delivery],
        mean: Step,
        sites: Mapping[str, int],
        header: Header,
        **more: Any,
    ) -> Outcome:
        """Returns the outcome of an opened ``mean`` over ``sites`` (site -> integer weight)."""
        weight = sum(sites.values())
        return Outcome(
            asking.compressor.expand(mean.vector()), self.step(mean), {s: w / weight for s, w in sites.items()}, asking.totals(deliveries),
            parties=asking.parties, exchange=header.exchange, next_exchange=header.exchange + 1, **more,
        )  # fmt: skip


class Trigram(Encrypted):
    """Three roles open the updates' Gram matrix and one selected sum, and nothing else."""

    def _exchange(
        self, asking: Asking, header: Header, public_map: envelopes.PublicMap | None, canaries: tuple[AuditVote, ...]
    ) -> Outcome | tuple[AuditVote, ...]:
        exchange = Exchange(self.charter, asking.send)
        consents = exchange.announce(header, canaries)
        deliveries = asking.train(lambda _, **__: {"header": header, "consents": consents})
        sealed, dropouts, rejections = self.read(deliveries, Submission)
        self.need_quorum(sealed, asking, [*dropouts, *rejections])
        submissions = {s: m.content for s, m in sealed.items() if isinstance(m.content, Submission)}
        combined = exchange.combine(header, submissions, public_map)
        rejections += [Rejection(s, "protocol", why) for s, why in combined.refused.items()]
        votes = exchange.audit(header, combined)
        declared = tuple(v for v in votes.values() if isinstance(v, AuditVote) and len(v.canary))
        if declared:
            shown = proven(self.charter, header, combined.sites, combined.gram, declared)
            asking.notes |= {v.site: _NOT_AS_SHOWN for v in declared if v.site not in shown}
            return declared
        weights = {s: w for s, w in zip(combined.sites, combined.weights, strict=True) if w}
        mean = sum_as_step(header, combined.total, sum(weights.values()))
        return self.outcome(
            asking, deliveries, mean, weights, header, dropouts=tuple(dropouts), rejections=tuple(rejections),
            sealed=sealed, excluded=dict(combined.excluded), audits=_findings(votes) | asking.notes,
            evidence=_evidence(header, combined), clip=self._next_clip(header, combined),
            contribution=_contribution(header, combined, public_map),
        )  # fmt: skip

    def _next_clip(self, header: Header, combined: Combined) -> float:
        """Returns the next round's clip from the median norm of this one's updates, which every role knows."""
        norms = [float(combined.gram[i][i]) ** 0.5 * ring_unit(header) for i in range(len(combined.sites))]
        middle = statistics.median(norms)
        return self.plan.settings.security.clip_factor * middle if middle > 0 else header.clip


class Masking(Encrypted):
    """Pairwise masks that cancel in the sum (Bonawitz et al., CCS 2017): no role is needed, and no update can be judged."""

    def _exchange(
        self, asking: Asking, header: Header, public_map: envelopes.PublicMap | None, canaries: tuple[AuditVote, ...]
    ) -> Outcome:
        plan_sha256, server = self.plan.sha256, MaskingServer(self.charter, masking_threshold(self.plan))
        failures: dict[str, Dropout | Rejection] = {}

        def ask(sites: Sequence[str], request: Any, kind: type) -> list[Any]:
            found = asking.send(dict.fromkeys(sites, request))
            failures.update({s: a for s, a in found.items() if isinstance(a, Dropout | Rejection)})
            return [a for a in found.values() if isinstance(a, kind)]

        given = ask(asking.sites, envelopes.MaskKeysRequest(plan_sha256, header), envelopes.MaskKeys)
        told_before = [f.detail for f in failures.values() if any(why in f.detail for why in _OPENED_BEFORE)]
        if told_before:  # the sites have helped to open a sum of this round, and will not help to open another
            raise ProtocolError("second_opening", told_before[0])
        keys = server.check_keys(header, given)
        held = [k.site for k in keys]
        shares = ask(held, envelopes.MaskSharesRequest(plan_sha256, header, keys), envelopes.MaskShares)
        routed = server.route(shares)
        masks = {s: MaskedSumRequest(plan_sha256, header, routed[s]) for s in sorted(routed)}
        deliveries = asking.train(lambda s, **_: {"header": header, "masks": masks[s]}, sites=tuple(masks))
        sealed, dropouts, rejections = self.read(deliveries, Masked)
        for site, message in sorted(sealed.items()):
            try:
                server.accept(message.content)  # type: ignore[arg-type]
            except ProtocolError as error:
                rejections.append(Rejection(site, "protocol", error.what))
        arrived, dropped = server.need()
        signed = ask(arrived, envelopes.ArrivedRequest(plan_sha256, header, arrived, dropped), envelopes.ArrivedSignature)
        request = envelopes.UnmaskRequest(plan_sha256, header, arrived, dropped, server.consistent(signed))
        total = server.total(ask(arrived, request, envelopes.Unmasked))
        rejections += [Rejection(s, "protocol", why) for s, why in server.refused.items()]
        early = [f for s, f in failures.items() if s not in sealed]
        weights = {s: header.weights[s] for s in arrived}
        mean = sum_as_step(header, total.tobytes(), sum(weights.values()))
        return self.outcome(
            asking, deliveries, mean, weights, header,
            dropouts=(*dropouts, *(f for f in early if isinstance(f, Dropout))),
            rejections=(*rejections, *(f for f in early if isinstance(f, Rejection))), sealed=sealed,
            evidence={"header": wire.digest(header), "sum": files.sha256(total.tobytes())}, clip=header.clip,
        )  # fmt: skip


class Ckks(Encrypted):
    """Updates under the key of a key holder who is neither a member nor the coordinator; only sums are decrypted."""

    def _exchange(
        self, asking: Asking, header: Header, public_map: envelopes.PublicMap | None, canaries: tuple[AuditVote, ...]
    ) -> Outcome:
        plan_sha256 = self.plan.sha256
        raw = self._holder(asking, envelopes.KeyHolderRequest(plan_sha256, self.run), envelopes.KeyHolderContext).context
        context = ckks.open_context(raw.tobytes(), self.charter, header)

        def each(site: str, *, whole: bool) -> dict[str, Any]:
            lacks = whole or site not in asking.state.holds
            return {"header": header, "context": raw} if lacks else {"header": header}

        deliveries = asking.train(each)
        sealed, dropouts, rejections = self.read(deliveries, Ciphertexts)
        parts: dict[str, tuple[bytes, ...]] = {}
        for site, message in sorted(sealed.items()):
            try:
                parts[site] = ckks.accept(header, self.charter, context, message.content)  # type: ignore[arg-type]
            except ProtocolError as error:
                rejections.append(Rejection(site, "protocol", error.what))
        self.need_quorum(parts, asking, [*dropouts, *rejections])
        sites = tuple(sorted(parts))
        total = ckks.add(context, [parts[s] for s in sites])
        submissions = tuple(sealed[s].content for s in sites)
        asked = [sites[(asking.number + i) % len(sites)] for i in range(header.hostile + 2)]  # one more than are needed
        request = envelopes.WitnessRequest(plan_sha256, header, submissions)  # type: ignore[arg-type]
        found = asking.send(dict.fromkeys(asked, request))
        witnesses = tuple(a for a in found.values() if isinstance(a, envelopes.SumWitness))
        blobs = tuple(np.frombuffer(p, dtype=np.uint8) for p in total)
        opened = self._holder(
            asking, envelopes.DecryptRequest(plan_sha256, header, sites, blobs, witnesses), envelopes.Decrypted
        )
        weights = {s: header.weights[s] for s in sites}
        values = np.frombuffer(opened.values.tobytes(), dtype="<f8") / sum(weights.values())
        if len(values) != header.length or not np.isfinite(values).all():
            raise ProtocolError("bad_sum", f"the {ckks.KEY_HOLDER} opened something that is no sum of these updates")
        mean = single_step(asking.number, values)
        return self.outcome(
            asking, deliveries, mean, weights, header, dropouts=tuple(dropouts), rejections=tuple(rejections), sealed=sealed,
            evidence={"header": wire.digest(header)}, clip=header.clip,
        )  # fmt: skip

    def _holder(self, asking: Asking, request: Any, kind: type) -> Any:
        answer = asking.send({ckks.KEY_HOLDER: request})[ckks.KEY_HOLDER]
        if isinstance(answer, kind):
            return answer
        detail = answer.detail if isinstance(answer, Dropout | Rejection) else type(answer).__name__
        raise ProtocolError("role_failed", f"{ckks.KEY_HOLDER} answered no {kind.__name__}: {detail}")


def role_names(plan: Plan) -> tuple[str, ...]:
    """Returns the parties beside sites and coordinator that a plan's rounds need."""
    found = {"none": (), "trigram": ROLES, "masking": (), "ckks": (ckks.KEY_HOLDER,)}[plan.settings.security.mode]
    return found if plan.settings.contribution.method == "none" else (*found, REFERENCE)


def masking_threshold(plan: Plan) -> int:
    """Returns how many sites must give shares before a masked sum can be opened."""
    return math.ceil(plan.settings.security.threshold * len(plan.roster))


def minimum(plan: Plan) -> int:
    """Returns the least number of sites in an opened sum: what the rule selects when only the quorum is there."""
    return robust.selected(plan.settings.rule, plan.settings.quorum)


def shares_of(plan: Plan, attestations: Mapping[str, Attestation], sites: Sequence[str]) -> dict[str, float]:
    """Returns each site's share of a weighted mean, from what it attested."""
    if plan.settings.site_weights == "equal":
        return equal_shares(sites)
    return row_shares({s: attestations[s].n_train for s in sites}, plan.settings.max_weight_share)


def integer_weights(plan: Plan, attestations: Mapping[str, Attestation]) -> dict[str, int]:
    """Returns each attesting site's share as an integer: 1 for all where they count equally, else in 1024 parts."""
    if plan.settings.site_weights == "equal":
        return dict.fromkeys(sorted(attestations), 1)
    shares = shares_of(plan, attestations, sorted(attestations))
    return {s: max(1, round(1024 * share)) for s, share in shares.items()}


def need_quorum(plan: Plan, what: str, good: Mapping[str, object], failures: Sequence[Dropout | Rejection]) -> None:
    """Refuses to go on with fewer than the plan's quorum.

    Raises:
        RoundFailed: with every failure's reason.
    """
    quorum = plan.settings.quorum
    if len(good) >= quorum:
        return
    why = dict.fromkeys(f"{f.site} {f.reason}: {f.detail}" for f in failures)
    raise QuorumMissed(
        f"{what}: {len(good)} of {len(plan.roster)} sites answered well, the quorum is {quorum}; " + "; ".join(why),
        fix="mend the named sites, or lower plan.quorum, and run again: it goes on from the last good round",
    )


def _findings(votes: Mapping[str, Any]) -> dict[str, str]:
    out: dict[str, str] = {}
    for site, vote in sorted(votes.items()):
        if isinstance(vote, AuditVote):
            out[site] = "agrees" if vote.agrees else f"disagrees: {vote.detail}"
        else:
            out[site] = SILENT
    return out


def _contribution(header: Header, combined: Combined, public_map: envelopes.PublicMap | None) -> dict[str, float]:
    """Returns each site's share of the fall in the reference rows' mean squared error (standardised target), to second order."""
    if public_map is None or combined.mapped_gram is None or combined.scores is None:
        return {}
    one = public_map.scale * ring_unit(header)  # what a mapped update's integer is worth
    counted = [i for i, w in enumerate(combined.weights) if w]
    gram = [[float(combined.mapped_gram[i][j]) * one * one for j in counted] for i in counted]
    target = [float(combined.scores[i][0]) * one * public_map.target_scale for i in counted]
    weights = [combined.weights[i] for i in counted]
    shares = gram_shapley(gram, target, weights, rows=public_map.rows)
    return {combined.sites[i]: float(v) for i, v in zip(counted, shares, strict=True)}


def _evidence(header: Header, combined: Combined) -> dict[str, str]:
    gram = files.canonical_json([[str(v) for v in row] for row in combined.gram])
    return {"header": wire.digest(header), "gram": files.sha256(gram), "sum": files.sha256(combined.total)}


def combining(
    plan: Plan, attestations: Mapping[str, Attestation], charter: Charter | None, folder: Path, run: str, today: str
) -> Combining:
    """Returns the plan's way of combining updates.

    Raises:
        StateError: the plan encrypts and there is no charter.
    """
    mode = plan.settings.security.mode
    if mode == "none":
        return Clear(plan, attestations)
    if charter is None:
        raise StateError("the plan encrypts rounds and there is no charter", fix="make one: docs/keys.md")
    kinds: dict[str, type[Encrypted]] = {"trigram": Trigram, "masking": Masking, "ckks": Ckks}
    return kinds[mode](plan, attestations, charter, folder, run, today)
