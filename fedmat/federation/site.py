"""The only place where records' numbers and the wire meet: reading this file is reviewing what leaves a company.

Knows: one site's feature table, and how to answer each kind of request. What leaves, in full:
attestations (digests and counts), sums over training rows, weight changes (in a plan that encrypts: masked by pads that only
the roles of the charter can take off), sums over held-out rows, counts of errors by size, for quantile scaling counts of
feature values by size, in an encrypted round a signed finding about what was opened of the site's own update, and once per
plan, if the release is settled, second moments of rows with noise on them, sealed to the Auditor; after a run, signed digests and
counts for the ledger (``fedmat.federation.statements``), and the list of all that left.
Refuses to know: other sites, the coordinator, how messages are delivered.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmat import files, wire
from fedmat import weights as wts
from fedmat.assurance import duplicates, uncertainty
from fedmat.contribution import Moments
from fedmat.data.contract import CONTRACT_VERSION
from fedmat.domain import (
    Answer,
    Array,
    Attestation,
    AttestRequest,
    Baseline,
    BaselineRequest,
    CalibrateRequest,
    Calibration,
    Digests,
    EvaluateRequest,
    Evaluation,
    GlobalModel,
    MatchRequest,
    MomentsRequest,
    NeedModel,
    Network,
    Offer,
    OwnArm,
    Prepared,
    Ranks,
    RanksRequest,
    Removal,
    Removed,
    RemoveRequest,
    Request,
    Scaler,
    SiteModel,
    StatementsRequest,
    Statistics,
    StatisticsRequest,
    TrainRequest,
    Update,
)
from fedmat.envelopes import (
    ArrivedRequest,
    AuditRequest,
    AuditVote,
    MaskKeysRequest,
    MaskSharesRequest,
    SealedMoments,
    UnmaskRequest,
    WitnessRequest,
)
from fedmat.errors import PlanRefused, SiteRefused, StateError
from fedmat.features.table import TEST, TRAIN, VALIDATION, FeatureTable
from fedmat.federation import rounds, settlement, statements
from fedmat.federation.evaluation import evaluate, residual_sums
from fedmat.federation.holding import Held, Identity, Sealing
from fedmat.federation.plan import Plan
from fedmat.federation.scaling import column_sums, own_scaler, rank_counts
from fedmat.federation.statements import Signing
from fedmat.models.hidden import last_hidden
from fedmat.models.laws import temperature_columns
from fedmat.models.network import Architecture
from fedmat.seeds import stream
from fedmat.training import folds, personalization, trainer
from fedmat.training.personalization import Learner
from fedmat.training.trainer import Targets
from fedmat.transport.compression import with_feedback
from fedmat.weights import Vector, Weights

REMOVAL = "removal.safetensors"  # in a site's state: keys of training rows that it leaves out
_KEPT = 4  # rounds whose state a site keeps: a run goes on from its last checkpoint, which is at most one round behind
_BETWEEN_ROUNDS = ("control", "private", "momentum", "unsent", "settled")
LEDGER = Path("privacy/ledger.jsonl")  # in a site's workspace: what training has cost of its privacy budget, over all runs
RELEASED = "released.safetensors"  # in a site's state: the last update that noise was added to
SETTLED = "settled.once"  # in a site's state: what it gave for the one settlement of a plan
PERSONAL = "personal.safetensors"  # in a site's state: the model it uses for its own materials


@dataclasses.dataclass(frozen=True)
class MatchingKeys:
    """Keys of a site's records under the members' secret (``fedmat.data.matching``).

    Attributes:
        keys: kind -> key per record, 0 where a record has none.
    """

    fingerprint: str
    keys: Mapping[str, Digests]


def state_folder(folder: Path, plan: Plan) -> Path:
    """Returns where a site with workspace ``folder`` keeps what belongs to one plan."""
    return folder / "state" / plan.sha256[:16]


def kept_rows(state: Path, table: FeatureTable, keys: MatchingKeys | None) -> FeatureTable:
    """Returns the rows a site works with: without the training rows that were found at another site, or in anyone's test."""
    path = state / REMOVAL
    if keys is None or not path.exists():
        return table
    removal = wire.decode(path.read_bytes(), Removal)
    return table.rows(duplicates.apply(removal, keys.keys, table.split == TEST)[0])


class SiteWorker:
    """Answers the coordinator's requests for one site.

    Args:
        plan: the site's own copy of the plan; a request for any other plan is refused.
        table: the site's features; stays here.
        manifest: the site's dataset manifest (digest and counts).
        folder: the site's workspace; training state is kept in ``state/``.
        keys: of the table's records, where the plan looks for duplicates.
        identity: the site's private keys and the charter, where the plan encrypts rounds.
        signing: signs what the site states for the ledger; without it, it states nothing there.
    """

    def __init__(
        self,
        site: str,
        plan: Plan,
        table: FeatureTable,
        manifest: dict[str, object],
        folder: Path,
        keys: MatchingKeys | None = None,
        identity: Identity | None = None,
        signing: Signing | None = None,
    ) -> None:
        self.site, self.plan, self.folder = site, plan, folder
        self._signing = signing
        self._identity = identity
        self._sealing = Sealing(plan, identity, self._state(), site) if identity else None
        self._manifest, self._whole, self._keys = manifest, table, keys
        self._architecture = Architecture.of(plan.model, plan.tasks, plan.settings)
        self._holding = Held(plan, self._state(), lambda n: self._architecture.initial_weights(n, plan.settings.seed))
        self._take_up(kept_rows(self._state(), table, keys))
        trainer.warm_up()

    def _take_up(self, table: FeatureTable) -> None:
        """Makes ``table`` the rows this site works with."""
        site, plan = self.site, self.plan
        self.table = table
        rows = int((table.split == TRAIN).sum())
        if rows < plan.admission.min_train_records:
            raise SiteRefused(
                f"site {site}: {rows} training records, the consortium asks for {plan.admission.min_train_records}",
                fix="add data, or ask the operator to lower admission.min_train_records",
            )
        self._learning = table.part(TRAIN, VALIDATION)  # all rows that any member may learn from
        self._test = table.part(TEST)
        self._fold = folds.of_site(self._learning, plan.settings.ensemble, plan.settings.seed, site)
        self._rows, self._held = folds.members(self._fold, plan.settings.ensemble)

    def handle(self, data: bytes) -> bytes:
        """Returns the encoded answer to an encoded request.

        Raises:
            WireError: the bytes are no request.
            PlanRefused: the request belongs to another plan, or asks for what this consortium does not permit.
        """
        request: Request = wire.decode(data, Request)  # type: ignore[arg-type]
        if request.plan_sha256 != self.plan.sha256:
            raise PlanRefused(f"site {self.site}: the request is for another plan than this site agreed to")
        return wire.encode(self._answer(request, data))

    def _answer(self, request: Request, data: bytes) -> Answer:
        if isinstance(request, MatchRequest):
            return self._offer()
        if isinstance(request, RemoveRequest):
            return self._remove(request)
        if isinstance(request, AttestRequest):
            return self._attest()
        if isinstance(request, StatisticsRequest):
            return self._statistics()
        if isinstance(request, RanksRequest):
            return Ranks(self.site, rank_counts(request.scaler, self.table.part(TRAIN).x))
        if isinstance(request, TrainRequest):
            return self._round(request, files.sha256(data))
        if isinstance(request, AuditRequest):
            return self._audit(request)
        if isinstance(request, MaskKeysRequest | MaskSharesRequest | ArrivedRequest | UnmaskRequest):
            if self._sealing is None or self.plan.settings.security.mode != "masking":
                raise PlanRefused(f"site {self.site}: the plan masks nothing")
            masks: Answer = self._sealing.masks(request)
            return masks
        if isinstance(request, WitnessRequest):
            if self._sealing is None or self.plan.settings.security.mode != "ckks":
                raise PlanRefused(f"site {self.site}: the plan encrypts no sums under CKKS")
            return self._sealing.witness(request)
        if isinstance(request, BaselineRequest):
            return self._baseline(request)
        if isinstance(request, CalibrateRequest):
            return self._calibrate(request)
        if isinstance(request, MomentsRequest):
            return self._moments(request, data)
        if isinstance(request, EvaluateRequest):
            return self._evaluate(request)
        if isinstance(request, StatementsRequest):
            if self._signing is None:
                raise SiteRefused(f"site {self.site}: has no keys to sign for the ledger", fix="make them with fedmat keys new")
            return statements.answer(request, self._attest(), self._manifest, self.folder, self._signing)
        raise PlanRefused(f"site {self.site}: a site is not asked {type(request).__name__}")

    def _offer(self) -> Offer:
        if self._keys is None:
            raise SiteRefused(
                f"site {self.site}: the plan looks for duplicates and this site has no matching keys",
                fix="put the members' matching secret in place, or set plan.deduplicate: false",
            )
        return duplicates.offer(self.site, self._keys.fingerprint, self._keys.keys, self._whole.split == TEST)

    def _remove(self, request: RemoveRequest) -> Removed:
        if self._keys is None or request.removal.site != self.site:
            raise PlanRefused(f"site {self.site}: a removal that is not for this site's keys")
        keep, counts = duplicates.apply(request.removal, self._keys.keys, self._whole.split == TEST)
        self._take_up(self._whole.rows(keep))  # a site left with too few rows refuses here, and is itself again next time
        files.write_atomic(self._state() / REMOVAL, wire.encode(request.removal))
        return Removed(self.site, counts)

    def _attest(self) -> Attestation:
        split = self.table.split
        train = self.table.part(TRAIN)
        return Attestation(
            site=self.site,
            dataset_sha256=str(self._manifest["sha256"]),
            contract_version=CONTRACT_VERSION,
            features_sha256=self.table.features_sha256,
            feature_names=self.table.names,
            n_train=len(train),
            n_validation=int((split == VALIDATION).sum()),
            n_test=len(self._test),
            n_groups=len(np.unique(self.table.group)),
            rejected={str(k): int(v) for k, v in dict(self._manifest["rejected"]).items()},  # type: ignore[call-overload]
            labels=tuple(int(n) for n in np.isfinite(train.y).sum(axis=0)),
        )

    def _statistics(self) -> Statistics:
        self._forget()  # asked at the start of a run and at no resumption: what an earlier run left does not count
        part = self.table.part(TRAIN)
        return column_sums(self.site, part.x, part.y)

    # --- a round ---------------------------------------------------------------------------------------------------

    def _round(self, request: TrainRequest, request_sha256: str) -> Answer:
        """Trains from the round's model; what leaves is the update in the plan's form, sealed where the plan encrypts."""
        encrypts = self.plan.settings.security.mode != "none"
        if encrypts != (request.header is not None) or (encrypts and self._sealing is None):
            raise PlanRefused(
                f"site {self.site}: the plan says security {self.plan.settings.security.mode}, and the request or this site's "
                "keys do not fit that",
                fix="an update leaves only as the plan says; see docs/keys.md",
            )
        held = self._holding.take(request)
        lacks = self.plan.settings.security.mode == "ckks" and not (self._sealing and self._sealing.knows_context(request))
        if held is None or lacks:
            return NeedModel(self.site, request.round)
        if self._sealing is None:
            return self._open_update(request, request_sha256, held)
        stored = self._sealing.stored(request)
        if stored is not None:
            return stored
        found = self._sealing.prepared(request) or self._prepare(request, held)
        return self._sealing.seal(request, found)

    def _open_update(self, request: TrainRequest, request_sha256: str, held: GlobalModel) -> Update:
        released = self._state() / RELEASED
        if self.plan.settings.privacy.unit != "none" and released.exists():
            update = wire.decode(released.read_bytes(), Update)
            if update.request_sha256 == request_sha256:
                return update  # the same noise again tells nothing new; fresh noise would be a second release
        delta, control, loss, sums = self._train(request, held)
        numbers = self._numbers(request, held, delta)
        if self.plan.settings.compression.name == "none":
            sent = wts.unflatten(numbers, held.weights)
        else:
            sent = {rounds.COMPRESSED: numbers.astype(np.float32)}
        update = Update(self.site, request.round, request.plan_sha256, request_sha256, sent, control, loss, sums)
        if self.plan.settings.privacy.unit != "none":
            files.write_atomic(released, wire.encode(update))
        return update

    def _prepare(self, request: TrainRequest, held: GlobalModel) -> Prepared:
        """Returns what an encrypted round sends: the update, and what the plan lets be told beside it."""
        delta, _, loss, sums = self._train(request, held)
        if not self.plan.settings.security.round_scores:
            loss, sums = float("nan"), np.zeros(0)
        return Prepared(self._numbers(request, held, delta), loss, sums)

    def _numbers(self, request: TrainRequest, held: GlobalModel, delta: Weights) -> Vector:
        """Returns the update as the plan's compressor makes it, shape ``k``."""
        s = self.plan.settings
        vector = self._with_momentum(request, wts.flatten(delta)) if s.site_momentum else wts.flatten(delta)
        squeeze = rounds.compressor(self.plan, held.weights, request.round, request.model_sha256)
        if squeeze.trains_inside or s.compression.name == "none":
            return squeeze.compress(vector)
        memory = self._recall("settled", request.round, also="unsent")
        before = wts.flatten(memory) if memory else np.zeros_like(vector)
        numbers, unsent = with_feedback(squeeze, vector, before, s.compression.feedback)
        self._keep("unsent", request.round, wts.unflatten(unsent, held.weights))
        return numbers

    def _with_momentum(self, request: TrainRequest, vector: Vector) -> Vector:
        """Returns the running mean of the site's updates (Karimireddy et al., ICML 2021: worker momentum)."""
        share = self.plan.settings.site_momentum
        last = self._recall("momentum", request.round)
        mixed = vector if not last else share * wts.flatten(last) + (1.0 - share) * vector
        self._keep("momentum", request.round, wts.unflatten(mixed, self._holding.like))
        return mixed

    def _audit(self, request: AuditRequest) -> AuditVote:
        """Checks what was opened of this site's update, and takes the step that the opened sum is."""
        if self._sealing is None:
            raise PlanRefused(f"site {self.site}: asked about an encrypted round, and its plan has none")
        vote = self._sealing.audit(request)
        if len(vote.canary) or not vote.agrees:  # what the roles did not confirm, or deny of this update, moves nothing here
            return vote
        self._settle(request)
        if rounds.travels(self.plan):
            mean = rounds.sum_as_step(request.header, request.total.tobytes(), sum(request.weights))
            self._holding.step(
                request.header.round, request.header.model_sha256, rounds.scaled(mean, self.plan.settings.server.lr)
            )
        return vote

    def _settle(self, request: AuditRequest) -> None:
        """Adds to what was not sent yet what the clip and the rounding kept back, or all of it where the update did not count."""
        found, number = self._sealing.prepared(request) if self._sealing else None, request.header.round
        unsent = self._recall("unsent", number + 1)
        if found is None or not unsent or self._sealing is None:
            return
        counted = dict(zip(request.sites, request.weights, strict=False)).get(self.site, 0) > 0
        lost = found.numbers - self._sealing.sent(request) if counted else found.numbers
        squeeze = rounds.compressor(self.plan, unsent, number, request.header.model_sha256)
        self._keep("settled", number, wts.unflatten(wts.flatten(unsent) + squeeze.expand(lost), unsent))

    def _train(self, request: TrainRequest, held: GlobalModel) -> tuple[Weights, Weights, float, Array]:
        """Returns the weight change, the change of the control variate, the mean loss and the sums over held-out rows."""
        s, architecture = self.plan.settings, self._architecture
        learner = self._learner(held.scaler)
        start = self._with_own_parts(held.weights, request.round)
        if s.privacy.unit == "record":  # no number travels beside the update: noise covers the update alone
            private = self._train_private(request, learner, start)
            return wts.subtract(private, held.weights), {}, float("nan"), np.zeros(0)
        rows = np.flatnonzero(self._fold >= 0)
        output = np.zeros((architecture.members, len(self._fold), len(self.plan.tasks)))
        output[:, rows] = architecture.forward(start, learner.inputs.take(rows))
        steps = self.plan.steps(request.round)
        own = self._control(request) if request.control else {}
        basis = None
        if s.compression.name == "low_rank":
            basis = rounds.compressor(self.plan, held.weights, request.round, request.model_sha256).basis()
        trained = trainer.train(
            architecture,
            start,
            learner.inputs,
            learner.targets,
            learner.rows,
            s.local,
            rates=np.full(steps, request.lr),
            rng=stream(s.seed, "batches", self.site, request.round),
            correction=trainer.scaffold_correction(request.control, own) if own else None,
            frozen=personalization.round_freezer(architecture, s.personalization.head_steps),
            basis=basis,
        )
        control_delta: Weights = {}
        if own:
            following = trainer.scaffold_control(own, request.control, start, trained.weights, steps, request.lr)
            control_delta = wts.subtract(following, own)
            self._keep("control", request.round, following)
        own_parts = {k: v for k, v in trained.weights.items() if architecture.is_private(k)}
        if own_parts:
            self._keep("private", request.round, own_parts)
        sums = self._out_of_fold_sums(output, held.scaler)
        return wts.subtract(trained.weights, held.weights), control_delta, trained.loss, sums

    def _train_private(self, request: TrainRequest, learner: Learner, start: Weights) -> Weights:
        """Returns the weights after noisy steps that this site's budget has paid for."""
        from fedmat.privacy.accounting import BudgetLedger, Event, noise_for
        from fedmat.training.private import train_private

        p, local = self.plan.settings.privacy, self.plan.settings.local
        rate = min(1.0, local.batch_size / len(learner.rows[0]))
        steps = self.plan.steps(request.round)
        noise = p.noise_multiplier
        if noise is None:
            noise = noise_for(p.epsilon, p.delta, rate, sum(self.plan.steps(r) for r in range(self.plan.settings.rounds)))
        path = self.folder / LEDGER
        if not path.exists():
            BudgetLedger.create(path, site=self.site, epsilon=p.epsilon, delta=p.delta)
        BudgetLedger(path).spend(Event(noise, rate, steps), run=self.plan.sha256, round=request.round)
        trained = train_private(
            self._architecture, start, learner.inputs, learner.targets, learner.rows, local, p,
            rates=np.full(steps, request.lr), noise_multiplier=noise, sampling_rate=rate,
        )  # fmt: skip
        return trained.weights

    def _learner(self, scaler: Scaler) -> Learner:
        part = self._learning
        inputs = self._architecture.inputs(scaler, part.names, part.x, part.graphs)
        return Learner(self._architecture, inputs, Targets.of(scaler, part.y, part.bound), self._rows, self._held)

    def _with_own_parts(self, weights: Weights, number: int) -> Weights:
        """Returns the received weights, with what this site keeps for itself as it was after its last round."""
        return weights | (self._recall("private", number) if self._architecture.private else {})

    def _out_of_fold(self, output: Array, scaler: Scaler) -> Array:
        """Returns predictions of the learning rows, ``n x n_tasks``, by members that never saw them; NaN where all did."""
        return self._architecture.restore(scaler, folds.out_of_fold(output, self._fold))

    def _out_of_fold_sums(self, output: Array, scaler: Scaler) -> Array:
        predicted, truth = self._out_of_fold(output, scaler)[:, 0], self._learning.y[:, 0]
        known = np.isfinite(predicted) & np.isfinite(truth)
        return residual_sums(truth[known], predicted[known])

    # --- models of the site's own ----------------------------------------------------------------------------------

    def _baseline(self, request: BaselineRequest) -> Baseline:
        """Makes one of this site's own models, keeps it in ``state/`` and tells how it does on the site's test groups."""
        if request.share and not self.plan.simulated:
            raise PlanRefused(f"site {self.site}: a site's own model leaves it only in a consortium declared simulated")
        if request.arm == "personal":
            return self._personal(request)
        model = self._own_model(request)
        (main, *others) = self._score_tasks([model], f"{request.arm}:{self.site}", self._own_radius([model]))
        if request.share:
            return Baseline(self.site, request.arm, main, model.weights, model.scaler, tuple(others))
        return Baseline(self.site, request.arm, main, auxiliary=tuple(others))

    def _own_model(self, request: BaselineRequest) -> Network:
        """Returns a model of the site's own, from ``state/`` if it was made for the same global model before."""
        made_for = files.sha256(wire.encode(GlobalModel(request.weights, request.scaler, {"arm": request.arm})))
        path = self._state() / f"{request.arm}.safetensors"
        if path.exists():
            kept = wire.decode(path.read_bytes(), SiteModel)
            if kept.spec.get("made_for") == made_for:
                return kept.parts[0]
        s, start, scaler = self.plan.settings, self._global(request), request.scaler
        rng = stream(s.seed, "batches", request.arm, self.site)
        if request.arm == "local":
            scaler = self._own_scaler(request.scaler)
            start = self._architecture.initial_weights(int(scaler.active.sum()), s.seed)
            trained = personalization.alone(self._learner(scaler), start, s, self.plan.rates(), rng)
        elif request.arm == "ditto":
            trained = personalization.ditto(self._learner(scaler), start, s, self.plan.rates(), rng)
        else:
            trained = personalization.finetune(self._learner(scaler), start, s, rng)
        model = Network(request.arm, 1.0, trained.weights, scaler)
        files.write_atomic(path, wire.encode(SiteModel(self.site, (model,), {"made_for": made_for})))
        return model

    def _personal(self, request: BaselineRequest) -> Baseline:
        """Mixes the global model and the site's own ones by their out-of-fold errors."""
        p = self.plan.settings.personalization
        arms: list[OwnArm] = ["local", "finetuned", *(["ditto"] if p.ditto else [])]  # type: ignore[list-item]
        models = [Network("federated", 1.0, self._global(request), request.scaler)]
        models += [self._own_model(dataclasses.replace(request, arm=arm)) for arm in arms]
        shares = {m.arm: float(m.arm == "finetuned") for m in models}
        truth = self._learning.y[:, 0]
        guesses = {m.arm: self._held_out_guess(m) for m in models}
        known = np.isfinite(truth) & np.isfinite(guesses["local"])
        if p.mix != "off" and known.any():
            shares = personalization.mixture(
                {k: v[known] for k, v in guesses.items()}, truth[known], self._learning.component[known], mode=p.mix
            )
        parts = tuple(dataclasses.replace(m, share=shares[m.arm]) for m in models if shares[m.arm] > 0)
        radius = self._own_radius(parts)
        spec = self.plan.model_spec(self.table.names, self.table.features_sha256)
        if radius is not None and np.isfinite(radius):
            spec["interval"] = {"level": self.plan.settings.interval_level, "half_width": radius}
        files.write_atomic(self._state() / PERSONAL, wire.encode(SiteModel(self.site, parts, spec)))
        (main, *others) = self._score_tasks(parts, f"personal:{self.site}", radius)
        return Baseline(self.site, "personal", main, auxiliary=tuple(others), mixture=shares)

    def _global(self, request: BaselineRequest) -> Weights:
        """Returns the global weights with the parts this site keeps for itself."""
        return self._with_own_parts(request.weights, self.plan.settings.rounds)

    def _own_scaler(self, common: Scaler) -> Scaler:
        part = self.table.part(TRAIN)
        binary = self.plan.task.kind == "binary"
        return own_scaler(
            self.site, part.x, part.y, binary=binary, quantile=len(common.scores) > 0, drop=self._argument(), known=common
        )

    def _argument(self) -> NDArray[np.bool_] | None:
        return temperature_columns(self.table.names) if self._architecture.lawful else None

    def _held_out_guess(self, model: Network) -> Array:
        inputs = self._architecture.inputs(model.scaler, self.table.names, self._learning.x, self._learning.graphs)
        return self._out_of_fold(self._architecture.forward(model.weights, inputs), model.scaler)[:, 0]

    def _own_radius(self, parts: Sequence[Network]) -> float | None:
        """Returns the half-width of the site's own conformal intervals; None for a binary task or without held-out rows."""
        guess = sum((m.share * self._held_out_guess(m) for m in parts), np.zeros(len(self._learning)))
        scores, group = self._conformity(guess)
        if self.plan.task.kind == "binary" or not len(scores):
            return None
        return uncertainty.quantile(
            uncertainty.sketch(scores, uncertainty.group_weights(group)), self.plan.settings.interval_level
        )

    def _conformity(self, guess: Array) -> tuple[Array, NDArray[np.int64]]:
        """Returns |error| of the out-of-fold rows and what hangs together; a bound that is kept is no error."""
        truth, bound = self._learning.y[:, 0], self._learning.bound[:, 0]
        known = np.isfinite(truth) & np.isfinite(guess)
        error = np.where(bound * (guess - truth) > 0, 0.0, np.abs(guess - truth))
        return error[known], self._learning.component[known]

    def _calibrate(self, request: CalibrateRequest) -> Calibration:
        guess = self._held_out_guess(Network("federated", 1.0, request.weights, request.scaler))
        scores, group = self._conformity(guess)
        unit = float(request.scaler.y_scale[0])
        return Calibration(self.site, uncertainty.sketch(scores / unit, uncertainty.group_weights(group)))

    def _moments(self, request: MomentsRequest, data: bytes) -> SealedMoments:
        """Returns noisy second moments of training and of validation rows, sealed to the Auditor; once per plan."""
        settlement.refuse(self.plan)
        identity = self._identity
        if identity is None or wire.weights_digest(request.weights, request.scaler) != request.model_sha256:
            raise PlanRefused(f"site {self.site}: has no keys to seal with, or the model is not the one that is to be settled")

        def protected(split: int) -> Moments:
            part = self.table.part(split)
            part = part.rows(np.isfinite(part.y[:, 0]) & (part.bound[:, 0] == 0))  # a bound is no target
            target = request.scaler.target(part.y)[:, 0].astype(np.float64)
            if self.plan.task.kind == "binary":
                target = 2.0 * target - 1.0  # nobody's prediction, 0, is then undecided
            inputs = self._architecture.inputs(request.scaler, part.names, part.x, part.graphs)
            hidden = last_hidden(self._architecture, request.weights, inputs)
            return settlement.protected(self.plan, settlement.features(self.plan, request.model_sha256, hidden), target)

        def reply() -> bytes:
            return wire.encode(
                settlement.seal(request, identity.keys, identity.charter, protected(TRAIN), protected(VALIDATION))
            )

        kept = settlement.once(self._state() / SETTLED, data, reply, f"site {self.site}")
        return wire.decode(kept, SealedMoments)

    # --- scores ----------------------------------------------------------------------------------------------------

    def _evaluate(self, request: EvaluateRequest) -> Evaluation:
        tasks = [t.target for t in self.plan.tasks]
        if request.target and request.target not in tasks:
            raise PlanRefused(
                f"site {self.site}: the plan has no task '{request.target}'", fix=f"use one of {', '.join(tasks)}"
            )
        at = tasks.index(request.target) if request.target else 0
        model = Network(request.arm, 1.0, request.weights, request.scaler)
        return self._score([model], request.arm, request.split, at, request.radius.get(self.site))

    def _score_tasks(self, parts: Sequence[Network], arm: str, radius: float | None) -> list[Evaluation]:
        return [self._score(parts, arm, "test", at, None if at else radius) for at in range(len(self.plan.tasks))]

    def _score(self, parts: Sequence[Network], arm: str, split: str, at: int, radius: float | None) -> Evaluation:
        part = self._test if split == "test" else self.table.part(VALIDATION)
        known = part.rows(np.isfinite(part.y[:, at]))
        return evaluate(
            self.site,
            arm,
            split,
            known.y[:, at],
            self._predict(parts, known)[:, at],
            known.group,
            kind=self.plan.task.kind,
            rng=stream(self.plan.splits.seed, "bootstrap", self.site, split, at),
            floor=1 if self.plan.simulated else 5,
            target=self.plan.tasks[at].target,
            radius=radius,
            pairs=self.plan.simulated,
        )

    def _predict(self, parts: Sequence[Network], part: FeatureTable) -> Array:
        out = np.zeros((len(part), len(self.plan.tasks)))
        if len(part):
            for m in parts:
                out += m.share * self._architecture.predict(m.weights, m.scaler, part.names, part.x, part.graphs)
        return out

    # --- what a site remembers between rounds ------------------------------------------------------------------------

    def _state(self) -> Path:
        return state_folder(self.folder, self.plan)

    def _control(self, request: TrainRequest) -> Weights:
        return self._recall("control", request.round) or wts.zeros_like(request.control)

    def _recall(self, kind: str, before: int, *, also: str = "") -> Weights:
        """Returns what was kept in the last round before this one, empty if nothing was: a repeated round finds the same.

        Args:
            also: another kind, taken where its last round is later than that of ``kind``.
        """
        kept: dict[int, Path] = {}
        for each in (also, kind):
            found = self._state().glob(f"{each}-*.safetensors") if each else ()
            kept |= {int(m[1]): p for p in found if (m := re.search(r"-(\d+)\.", p.name))}
        earlier = [r for r in kept if r < before]
        if kept and before and not earlier:
            raise StateError(
                f"site {self.site}: what it knew before round {before + 1} is gone; it keeps {_KEPT} rounds",
                fix="start afresh with --fresh",
            )
        return wire.decode(kept[max(earlier)].read_bytes(), Update).delta if earlier else {}

    def _keep(self, kind: str, number: int, weights: Weights) -> None:
        message = Update(self.site, number, self.plan.sha256, "", weights)
        files.write_atomic(self._state() / f"{kind}-{number:05d}.safetensors", wire.encode(message))
        for path in self._state().glob(f"{kind}-*.safetensors"):
            if int(path.stem.rpartition("-")[2]) < number - _KEPT:
                path.unlink()

    def _forget(self) -> None:
        for kind in _BETWEEN_ROUNDS:
            for path in self._state().glob(f"{kind}-*.safetensors"):
                path.unlink()
