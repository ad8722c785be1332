"""The nouns that cross a boundary: requests, updates, attestations, reports and the global model.

Knows: what each message holds. Refuses to know: records, and how a message travels (``fedmat.wire``) or is delivered
(``fedmat.federation.engine``). Failures of other parties are values here, never exceptions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedmat.envelopes import (
    ArrivedRequest,
    ArrivedSignature,
    AuditRequest,
    AuditVote,
    Blob,
    Ciphertexts,
    Header,
    HeaderSignature,
    Masked,
    MaskedSumRequest,
    MaskKeys,
    MaskKeysRequest,
    MaskShares,
    MaskSharesRequest,
    PublicMap,
    SealedMoments,
    Submission,
    SumWitness,
    Unmasked,
    UnmaskRequest,
    WitnessRequest,
)
from fedmat.weights import Weights

Array = NDArray[np.float64]
Digests = NDArray[np.uint64]
RANK_GRID: Array = np.linspace(-5.0, 5.0, 201)  # standard deviations from the mean: what quantile scaling resolves


@dataclass(frozen=True)
class Attestation:
    """What a site states about its data before a run; every later weight comes from here.

    Attributes:
        dataset_sha256: digest of the site's accepted-records manifest.
        features_sha256: digest of feature names and featurizer versions, equal at all sites or the run stops.
        rejected: rows in quarantine by reason code; counts only.
        labels: training rows that state each target, in the plan's order of tasks.
    """

    site: str
    dataset_sha256: str
    contract_version: str
    features_sha256: str
    feature_names: tuple[str, ...]
    n_train: int
    n_validation: int
    n_test: int
    n_groups: int
    rejected: dict[str, int] = field(default_factory=dict)
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Offer:
    """What one site shows the coordinator: sorted different keys, so neither the order nor the number of rows behind one.

    Attributes:
        fingerprint: equal for sites with the same secret (``fedmat.data.matching.fingerprint``).
        n_train, n_test: rows, as attested; validation counts as training.
        train, test: keys by kind; measurement keys of test rows stay home.
    """

    site: str
    fingerprint: str
    n_train: int
    n_test: int
    train: dict[str, Digests]
    test: dict[str, Digests]


@dataclass(frozen=True)
class Removal:
    """What one site leaves out of training.

    Attributes:
        material, source: keys of test rows, its own or another's.
        measurement: keys of measurements that another site keeps.
    """

    site: str
    material: Digests
    source: Digests
    measurement: Digests


@dataclass(frozen=True)
class MatchRequest:
    """Asks a site for the keys of its records, to find what several sites hold before training."""

    plan_sha256: str


@dataclass(frozen=True)
class RemoveRequest:
    """Tells a site which of its training rows repeat another site's, or a test row of anyone."""

    plan_sha256: str
    removal: Removal


@dataclass(frozen=True)
class Removed:
    """How many rows a site left out of training, by reason."""

    site: str
    counts: dict[str, int]


@dataclass(frozen=True)
class AttestRequest:
    """Asks a site what it will train on."""

    plan_sha256: str


@dataclass(frozen=True)
class StatisticsRequest:
    """Asks a site for sums over its training features and target."""

    plan_sha256: str


@dataclass(frozen=True)
class Statistics:
    """Sums over one site's training rows: arrays of shape ``n_features``, and ``n_tasks x 3`` with each target's count, sum
    and sum of squares.
    """

    site: str
    count: Array
    total: Array
    total_squares: Array
    target: Array


@dataclass(frozen=True)
class Scaler:
    """Federated standardisation: ``(x - mean) / scale`` on ``active`` features, clipped to ``+-clip``.

    Attributes:
        active: 1.0 where the feature varies in the consortium's training data, else 0.0; inactive features are dropped.
        y_mean, y_scale: of each task's transformed target, shape ``n_tasks``.
        scores: for quantile scaling, the normal score of each of ``RANK_GRID`` for every feature, shape ``n_features x k``;
            empty for plain standardisation.
    """

    mean: Array
    scale: Array
    active: Array
    y_mean: Array
    y_scale: Array
    clip: float = 5.0
    scores: Array = field(default_factory=lambda: np.zeros((0, 0)))

    def features(self, x: Array) -> NDArray[np.float32]:
        """Returns standardised features of shape ``n x n_active``; a missing value (NaN) becomes the mean, i.e. zero."""
        keep = self.active > 0
        z = (x[:, keep] - self.mean[keep]) / self.scale[keep]
        if len(self.scores):
            there = np.isfinite(z)
            z = np.stack([np.interp(z[:, j], RANK_GRID, s) for j, s in enumerate(self.scores[keep])], axis=1)
            z = np.where(there, z, 0.0)
        return np.clip(np.nan_to_num(z, nan=0.0), -self.clip, self.clip).astype(np.float32)

    def target(self, y: Array) -> NDArray[np.float32]:
        """Returns the standardised, already transformed targets, ``n x n_tasks``."""
        return ((y - self.y_mean) / self.y_scale).astype(np.float32)

    def restore(self, z: Array) -> Array:
        """Returns network output ``... x n_tasks`` in the transformed targets' units."""
        return z * self.y_scale + self.y_mean


@dataclass(frozen=True)
class RanksRequest:
    """Asks a site how its training features spread over the public grid, for quantile scaling."""

    plan_sha256: str
    scaler: Scaler


@dataclass(frozen=True)
class Ranks:
    """Counts of one site's standardised training features around each of ``RANK_GRID``, shape ``n_features x k``."""

    site: str
    counts: Array


@dataclass(frozen=True)
class Step:
    """One round's change of the global model in its compressed form, so that a site makes the step for itself.

    Attributes:
        round: the round that ended in this step.
        kind: how ``numbers`` are to be read, little-endian.
        scale: what one unit is worth, the server's learning rate included.
    """

    round: int
    kind: Literal["float32", "int32", "int64"]
    numbers: Blob
    scale: float

    def vector(self) -> Array:
        """Returns the step as float64 numbers, shape ``k``; every party computes the same."""
        kind = {"float32": "<f4", "int32": "<i4", "int64": "<i8"}[self.kind]
        return np.frombuffer(self.numbers.tobytes(), dtype=kind).astype(np.float64) * self.scale


@dataclass(frozen=True)
class TrainRequest:
    """Instruction for one round: start from ``weights`` and return the change.

    Attributes:
        model_sha256: of weights and scaling to start from (``wire.weights_digest``).
        weights, scaler: empty and None where the site holds them already: it then takes ``steps`` to come to ``model_sha256``.
        control: the coordinator's control variate (SCAFFOLD), empty otherwise.
        lr: local learning rate of this round, after the schedule.
        header, consents: of an encrypted round: what the update is bound to, and the roles' signatures of it.
        masks: of a masked round: the shares this site keeps for others.
        context: of a CKKS round: the key holder's public context, where the site lacks it.
    """

    plan_sha256: str
    round: int
    lr: float
    model_sha256: str
    weights: Weights = field(default_factory=dict)
    scaler: Scaler | None = None
    control: Weights = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    header: Header | None = None
    consents: tuple[HeaderSignature, ...] = ()
    masks: MaskedSumRequest | None = None
    context: Blob = field(default_factory=lambda: np.zeros(0, dtype=np.uint8))


@dataclass(frozen=True)
class ReferenceRequest:
    """Asks the reference party for a round's public map of updates (``envelopes.PublicMap``)."""

    plan_sha256: str
    round: int
    weights: Weights
    scaler: Scaler


@dataclass(frozen=True)
class NeedModel:
    """A site's answer where it does not hold the model that a TrainRequest starts from."""

    site: str
    round: int


@dataclass(frozen=True)
class Update:
    """What a site returns for one round: the weight change, and for SCAFFOLD the change of its control variate.

    Attributes:
        delta: named tensors; under a compressor one tensor ``compressed`` of shape ``k``.
        validation: sums (as in ``Evaluation.sums``) of the *received* weights on the site's validation groups.
    """

    site: str
    round: int
    plan_sha256: str
    request_sha256: str
    delta: Weights
    control_delta: Weights = field(default_factory=dict)
    train_loss: float = float("nan")
    validation: Array = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True)
class Sealed:
    """What a site returns for an encrypted round.

    Attributes:
        train_loss, validation: as in :class:`Update`, only where the plan opens them (``security.round_scores``).
    """

    site: str
    content: Submission | Masked | Ciphertexts
    train_loss: float = float("nan")
    validation: Array = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True)
class Prepared:
    """A round's update before it is sealed; a file that stays at the site.

    Attributes:
        numbers: what is to be sent, shape ``k``.
    """

    numbers: Array
    train_loss: float
    validation: Array


@dataclass(frozen=True)
class Answered:
    """What a site answered in an encrypted exchange; a file that stays at the site until the run has ended.

    Attributes:
        words: the update as ring elements.
        canary: seed of ``words`` where the exchange is a canary; else empty.
    """

    header_sha256: str
    sealed: Sealed
    words: Blob
    canary: Blob


OwnArm = Literal["local", "finetuned", "ditto", "personal"]


@dataclass(frozen=True)
class BaselineRequest:
    """Asks a site for a model of its own: trained alone, or made from the global ``weights``.

    Attributes:
        arm: ``local`` (its own records only), ``finetuned``, ``ditto`` (tied to the global weights while it trains), or
            ``personal``: what the site would use, the mixture of those and the global model that its own out-of-fold
            errors ask for.
        share: return the weights too; a site refuses this unless its consortium is declared simulated.
    """

    plan_sha256: str
    arm: OwnArm
    weights: Weights
    scaler: Scaler
    share: bool = False


@dataclass(frozen=True)
class Baseline:
    """A site's answer: its own-slice test result, and its weights where sharing is permitted.

    Attributes:
        auxiliary: results on the auxiliary tasks the site has test rows for.
        mixture: for a personal model, the share of each model in it.
    """

    site: str
    arm: str
    evaluation: Evaluation
    weights: Weights = field(default_factory=dict)
    scaler: Scaler | None = None
    auxiliary: tuple[Evaluation, ...] = ()
    mixture: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Network:
    """One network of a site's own mixture."""

    arm: str
    share: float
    weights: Weights
    scaler: Scaler


@dataclass(frozen=True)
class SiteModel:
    """The model a site uses for its own materials; a file that stays at the site.

    Attributes:
        spec: as in :class:`GlobalModel`, with the site's own intervals.
    """

    site: str
    parts: tuple[Network, ...]
    spec: dict[str, object]


@dataclass(frozen=True)
class EvaluateRequest:
    """Asks a site to score ``weights`` on its own held-out groups.

    Attributes:
        target: the task to score; "" means the first.
        radius: by site, half-width of the intervals to check, in the transformed target's unit; empty for none.
    """

    plan_sha256: str
    arm: str
    weights: Weights
    scaler: Scaler
    split: Literal["validation", "test"] = "test"
    target: str = ""
    radius: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MomentsRequest:
    """Asks a site for noisy second moments of its rows under a released model, sealed to the Auditor; answered once per plan.

    Attributes:
        run: random name of the run the model comes from.
        model_sha256: digest of ``weights`` and ``scaler``; it fixes the public projection.
        today: ISO date on which the Auditor's keys have to count.
    """

    plan_sha256: str
    run: str
    model_sha256: str
    weights: Weights
    scaler: Scaler
    today: str


@dataclass(frozen=True)
class StatementsRequest:
    """Asks a site for its signed entries about a run: data, contract, updates, what left.

    Attributes:
        consortium, run: whose ledger, and the run's name in it.
        updates: round -> digest of the site's update that the coordinator counted; a site signs those it sent and no other.
    """

    plan_sha256: str
    consortium: str
    run: str
    updates: dict[str, str]


@dataclass(frozen=True)
class Statements:
    """A site's signed entries, ready for the ledger, and its egress ledger, whose root the last of them fixes.

    Attributes:
        envelopes: as text, in the order in which they are appended.
        egress: lines of the egress ledger.
    """

    site: str
    envelopes: tuple[str, ...]
    egress: str


@dataclass(frozen=True)
class CalibrateRequest:
    """Asks a site how far the finished global model is off on rows that a member of its ensemble never saw."""

    plan_sha256: str
    weights: Weights
    scaler: Scaler


@dataclass(frozen=True)
class Calibration:
    """Counts of conformity scores in the public grid of ``fedmat.assurance.uncertainty``; no score is in it."""

    site: str
    sketch: Array


@dataclass(frozen=True)
class Evaluation:
    """Sums from which global metrics are exact, and the site's own bootstrap spread; no row's error is in it.

    Attributes:
        sums: n, sum|e|, sum e^2, sum y, sum y^2 in the transformed target's unit; n is 0 where a site has no such rows.
        mae_se, mae_low, mae_high: standard error and 95% interval of MAE over resampled groups.
        histogram: parity counts of shape ``bins x bins`` (true by predicted); a cell under the disclosure floor is 0.
        scores: for a binary task, counts of shape ``2 x bins`` (negatives, positives) by predicted probability.
        target: the task scored.
        coverage: rows inside their interval, lower and upper 95% limit of that share, the interval's half-width.
        draws: MAE of every bootstrap resample, the same resamples for every arm, so that two arms can be compared in pairs.
            Only in a consortium declared simulated: as many draws as groups would give the groups' errors away.
    """

    site: str
    arm: str
    split: str
    sums: Array
    n_groups: int
    mae_se: float
    mae_low: float
    mae_high: float
    edges: Array = field(default_factory=lambda: np.zeros(0))
    histogram: Array = field(default_factory=lambda: np.zeros((0, 0)))
    scores: Array = field(default_factory=lambda: np.zeros((2, 0)))
    target: str = ""
    coverage: Array = field(default_factory=lambda: np.zeros(0))
    draws: Array = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True)
class Dropout:
    """A site did not answer: late, crashed, refused or unreachable."""

    site: str
    reason: Literal["late", "crashed", "refused", "unreachable"]
    detail: str = ""


@dataclass(frozen=True)
class Rejection:
    """A site answered and the answer was left out, or it answered that its own policy forbids an answer (``policy``)."""

    site: str
    reason: Literal[
        "malformed",
        "non_finite",
        "wrong_shape",
        "too_large",
        "wrong_plan",
        "wrong_round",
        "wrong_site",
        "excluded",
        "protocol",
        "wrapped",
        "policy",
    ]
    detail: str = ""


Request = (
    MatchRequest
    | RemoveRequest
    | AttestRequest
    | StatisticsRequest
    | RanksRequest
    | TrainRequest
    | BaselineRequest
    | EvaluateRequest
    | CalibrateRequest
    | AuditRequest
    | ReferenceRequest
    | MaskKeysRequest
    | MaskSharesRequest
    | ArrivedRequest
    | UnmaskRequest
    | WitnessRequest
    | MomentsRequest
    | StatementsRequest
)
Answer = (
    Offer
    | Removed
    | Attestation
    | Statistics
    | Ranks
    | Update
    | Sealed
    | NeedModel
    | Baseline
    | Evaluation
    | Calibration
    | AuditVote
    | PublicMap
    | MaskKeys
    | MaskShares
    | ArrivedSignature
    | Unmasked
    | SumWitness
    | SealedMoments
    | Statements
)


@dataclass(frozen=True)
class Delivery:
    """One site's answer to one request as the engine saw it.

    Attributes:
        answer: the message, or the failure as a value.
        bytes_down, bytes_up: encoded message sizes, to and from the site.
        sha256: digest of the answer's bytes; "" where there is none.
    """

    site: str
    answer: Answer | Dropout | Rejection
    bytes_down: int
    bytes_up: int
    seconds: float
    sha256: str = ""


@dataclass(frozen=True)
class RoundReport:
    """Everything anyone may know about one round; the run is a generator of these.

    Attributes:
        shares: weight of each site whose update counted, summing to one.
        updates: site -> digest of the answer it gave to the round's request, of every site that answered well.
        excluded: site -> why the rule left its update out or counted it less.
        protection: how updates were protected: ``none``, ``trigram``, ``masking`` or ``ckks``.
        exchange: number of the encrypted exchange that closed the round; -1 in the clear.
        audits: site -> ``agrees``, ``disagrees: ...`` or ``silent``: what members found about what was opened of theirs.
        evidence: digests of what a ledger keeps: header, Gram matrix, sum.
        contribution: site -> share of this round's gain on the reference set, where the plan looks.
        role_bytes: party that is no site -> bytes to and from it.
        model_sha256: digest of the model's weights and scaling if this round were the last.
        validation: global validation metric after the round, where it was asked for.
    """

    round: int
    rounds: int
    rule: str
    lr: float
    accepted: tuple[str, ...]
    shares: dict[str, float]
    update_norms: dict[str, float]
    train_loss: dict[str, float]
    dropouts: tuple[Dropout, ...]
    rejections: tuple[Rejection, ...]
    bytes_down: dict[str, int]
    bytes_up: dict[str, int]
    model_sha256: str
    plan_sha256: str
    validation: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    overhead_seconds: float = 0.0
    excluded: dict[str, str] = field(default_factory=dict)
    protection: str = "none"
    exchange: int = -1
    audits: dict[str, str] = field(default_factory=dict)
    evidence: dict[str, str] = field(default_factory=dict)
    contribution: dict[str, float] = field(default_factory=dict)
    role_bytes: dict[str, int] = field(default_factory=dict)
    updates: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """Everything the coordinator needs to go on after a crash, as it stood before round ``next_round``.

    Attributes:
        server: the server optimiser's moments, flat float64 vectors by name, and the running sum of averaged weights.
        attestations_sha256: digest of what the sites attested; a resumed run must find the same.
        holds: site -> the round whose starting weights it holds.
        steps: the last rounds' steps, for sites that hold an older model.
        exchange: number of the next encrypted exchange.
    """

    plan_sha256: str
    attestations_sha256: str
    next_round: int
    weights: Weights
    control: Weights
    scaler: Scaler
    server: dict[str, Array]
    holds: dict[str, int] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    exchange: int = 0


@dataclass(frozen=True)
class GlobalModel:
    """A finished global model: weights, federated scaling and what is needed to predict from raw records.

    Attributes:
        spec: plain JSON with task, features, model shape and feature names.
    """

    weights: Weights
    scaler: Scaler
    spec: dict[str, object]
