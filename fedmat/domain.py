"""The nouns that cross a boundary: requests, updates, attestations, reports and the global model.

Knows: what each message holds. Refuses to know: records, and how a message travels (``fedmat.wire``) or is delivered
(``fedmat.federation.engine``). Failures of other parties are values here, never exceptions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedmat.weights import Weights

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Attestation:
    """What a site states about its data before a run; every later weight comes from here.

    Attributes:
        dataset_sha256: digest of the site's accepted-records manifest.
        features_sha256: digest of feature names and featurizer versions, equal at all sites or the run stops.
        rejected: rows in quarantine by reason code; counts only.
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
    """Sums over one site's training rows: arrays of shape ``n_features`` and the target's count, sum, sum of squares."""

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
    """

    mean: Array
    scale: Array
    active: Array
    y_mean: float
    y_scale: float
    clip: float = 5.0

    def features(self, x: Array) -> NDArray[np.float32]:
        """Returns standardised features of shape ``n x n_active``; a missing value (NaN) becomes the mean, i.e. zero."""
        keep = self.active > 0
        z = (x[:, keep] - self.mean[keep]) / self.scale[keep]
        return np.clip(np.nan_to_num(z, nan=0.0), -self.clip, self.clip).astype(np.float32)

    def target(self, y: Array) -> NDArray[np.float32]:
        """Returns the standardised, already transformed target."""
        return ((y - self.y_mean) / self.y_scale).astype(np.float32)

    def restore(self, z: NDArray[np.float32]) -> Array:
        """Returns network output in the transformed target's unit."""
        return z.astype(np.float64) * self.y_scale + self.y_mean


@dataclass(frozen=True)
class TrainRequest:
    """Instruction for one round: start from ``weights`` and return the change.

    Attributes:
        control: the coordinator's control variate (SCAFFOLD), empty otherwise.
        lr: local learning rate of this round, after the schedule.
    """

    plan_sha256: str
    round: int
    lr: float
    weights: Weights
    scaler: Scaler
    control: Weights = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """What a site returns for one round: the weight change, and for SCAFFOLD the change of its control variate.

    Attributes:
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
class BaselineRequest:
    """Asks a site for a model of its own: trained alone from ``weights``, or fine-tuned from the global ``weights``.

    Attributes:
        share: return the weights too; a site refuses this unless its consortium is declared simulated.
    """

    plan_sha256: str
    arm: Literal["local", "finetuned"]
    weights: Weights
    scaler: Scaler
    share: bool = False


@dataclass(frozen=True)
class Baseline:
    """A site's answer: its own-slice test result, and its weights where sharing is permitted."""

    site: str
    arm: str
    evaluation: Evaluation
    weights: Weights = field(default_factory=dict)
    scaler: Scaler | None = None


@dataclass(frozen=True)
class EvaluateRequest:
    """Asks a site to score ``weights`` on its own held-out groups."""

    plan_sha256: str
    arm: str
    weights: Weights
    scaler: Scaler
    split: Literal["validation", "test"] = "test"


@dataclass(frozen=True)
class Evaluation:
    """Sums from which global metrics are exact, and the site's own bootstrap spread; no row's error is in it.

    Attributes:
        sums: n, sum|e|, sum e^2, sum y, sum y^2 in the transformed target's unit.
        mae_se, mae_low, mae_high: standard error and 95% interval of MAE over resampled groups.
        histogram: parity counts of shape ``bins x bins`` (true by predicted); a cell under the disclosure floor is 0.
        scores: for a binary task, counts of shape ``2 x bins`` (negatives, positives) by predicted probability.
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


@dataclass(frozen=True)
class Dropout:
    """A site did not answer: late, crashed, refused or unreachable."""

    site: str
    reason: Literal["late", "crashed", "refused", "unreachable"]
    detail: str = ""


@dataclass(frozen=True)
class Rejection:
    """A site answered and the answer was left out."""

    site: str
    reason: Literal["malformed", "non_finite", "wrong_shape", "too_large", "wrong_plan", "wrong_round", "wrong_site"]
    detail: str = ""


Request = AttestRequest | StatisticsRequest | TrainRequest | BaselineRequest | EvaluateRequest
Answer = Attestation | Statistics | Update | Baseline | Evaluation


@dataclass(frozen=True)
class Delivery:
    """One site's answer to one request as the engine saw it.

    Attributes:
        answer: the message, or the failure as a value.
        bytes_down, bytes_up: encoded message sizes, to and from the site.
    """

    site: str
    answer: Answer | Dropout | Rejection
    bytes_down: int
    bytes_up: int
    seconds: float


@dataclass(frozen=True)
class RoundReport:
    """Everything anyone may know about one round; the run is a generator of these.

    Attributes:
        shares: weight of each accepted site, summing to one.
        model_sha256: digest of the global weights after the round.
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


@dataclass(frozen=True)
class Checkpoint:
    """Everything the coordinator needs to go on after a crash, as it stood before round ``next_round``.

    Attributes:
        server: the server optimiser's moments, flat float64 vectors by name.
        attestations_sha256: digest of what the sites attested; a resumed run must find the same.
    """

    plan_sha256: str
    attestations_sha256: str
    next_round: int
    weights: Weights
    control: Weights
    scaler: Scaler
    server: dict[str, Array]


@dataclass(frozen=True)
class GlobalModel:
    """A finished global model: weights, federated scaling and what is needed to predict from raw records.

    Attributes:
        spec: plain JSON with task, features, model shape and feature names.
    """

    weights: Weights
    scaler: Scaler
    spec: dict[str, object]
