"""``consortium.yaml`` and ``site.yaml`` as frozen pydantic models: the only place where files become settings.

Knows: every key a person may write, its default and its meaning. Refuses to know: records, tensors, services.
An unknown key is refused with the nearest valid one.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from fedmat.errors import ConfigError

S = TypeVar("S", bound="Settings")
SLUG = r"^[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*$"


class Settings(BaseModel):
    """Base of everything read from a file: frozen, nothing unknown, nothing coerced by accident."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)


def _as_it_was(value: object) -> bool:
    """A setting left at its default is not in the plan's digest: a plan that does not use it is the plan it was."""
    return value == type(value)()


# --- consortium.yaml ---------------------------------------------------------------------------------------------


class Task(Settings):
    """What is predicted."""

    name: str = Field(pattern=SLUG, description="registered as the model fedmat-<name>")
    record_type: str = Field(description="a record type of the data contract")
    target: str = Field(description="a contract field")
    unit: str = Field(description="unit metrics are reported in, before the transform")
    transform: Literal["identity", "log10"] = "identity"
    kind: Literal["regression", "binary"] = "regression"
    threshold: float | None = Field(None, description="binary: the class is target > threshold, in unit")
    metric: Literal["mae", "rmse", "auc"] = "mae"
    law: Literal["none", "arrhenius", "vtf", "decreasing", "increasing"] = Field(
        "none", description="how the target follows temperature; built into the network, so that no prediction breaks it"
    )

    @model_validator(mode="after")
    def _kinds_agree(self) -> Task:
        if (self.kind == "binary") != (self.threshold is not None):
            raise ValueError("kind: binary needs a threshold, and only a binary task has one")
        if (self.metric == "auc") != (self.kind == "binary"):
            raise ValueError("metric: auc belongs to kind: binary; a regression uses mae or rmse")
        if self.law in ("arrhenius", "vtf") and self.transform != "log10":
            raise ValueError(f"law: {self.law} is a law of the logarithm: use transform: log10")
        if self.law != "none" and self.kind == "binary":
            raise ValueError("a law of temperature belongs to a regression, not to kind: binary")
        return self


class FeatureSpec(Settings):
    """One featurizer and its options; ``composition`` alone is short for ``{name: composition}``."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class GraphSpec(Settings):
    """A graph network in front of the property network."""

    of: Literal["crystal", "molecule"]
    field: str = Field("", description="the structure or SMILES field; by default the record type's first")
    width: int = Field(64, ge=4, description="numbers a node carries")
    layers: int = Field(3, ge=1)
    convolution: Literal["cgcnn", "schnet"] = Field("schnet", description="as good as cgcnn and half the work")


class ModelSpec(Settings):
    """Shape of the property network."""

    hidden: tuple[int, ...] = (128, 128)
    activation: Literal["relu", "silu", "tanh"] = "silu"
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    graph: GraphSpec | None = None
    task_balance: Literal["equal", "uncertainty"] = Field(
        "equal", description="several tasks: equal weights, or learned ones (Kendall et al., CVPR 2018)"
    )


class ServerOptimizer(Settings):
    """How the coordinator applies the mean update (Reddi et al., ICLR 2021)."""

    name: Literal["sgd", "momentum", "adam"] = "sgd"
    lr: float = Field(1.0, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)
    epsilon: float = Field(1e-3, gt=0)


class LocalTraining(Settings):
    """What a site does in one round."""

    steps: int = Field(40, ge=1, description="optimiser steps per round")
    batch_size: int = Field(64, ge=2)
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    loss: Literal["mse", "l1", "huber"] = "huber"
    bound_scale: float = Field(
        0.2, gt=0, description="scale of the error in the likelihood of a bound (censored target), in standard deviations"
    )
    mu: float = Field(0.0, ge=0, description="FedProx proximal strength (Li et al., MLSys 2020)")
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = 5.0


class Schedule(Settings):
    """Learning rate over rounds, as a factor of ``local.lr``."""

    kind: Literal["constant", "cosine", "step"] = "cosine"
    warmup_rounds: int = Field(0, ge=0)
    final_factor: float = Field(0.02, gt=0, le=1)
    step_every: int = Field(30, ge=1)
    final_steps_factor: float = Field(1.0, gt=0, description="local steps of the last round, as a factor of local.steps")


class Personalization(Settings):
    """What a site keeps for itself, in the rounds and after them."""

    private: tuple[Literal["head", "norm"], ...] = Field(
        (), description="parts each site trains for itself: the last layer (FedPer), scale and shift of the inputs (as FedBN)"
    )
    head_steps: int = Field(0, ge=0, description="FedRep: steps on the last layer alone before each round's steps on the rest")
    finetune_steps: int = Field(200, ge=0, description="steps of fine-tuning the global model at the site")
    finetune_lr_factor: float = Field(0.3, gt=0, description="of local.lr")
    ditto: Annotated[float, Field(gt=0)] | None = Field(
        None, description="also train a site model tied to the global one by this proximal strength (Ditto)"
    )
    mix: Literal["stack", "best", "off"] = Field(
        "stack", description="how a site joins its own and the shared models: weights found out of fold, one winner, or not"
    )


class RuleSpec(Settings):
    """How updates are joined into one; ``docs/rules.md`` says what each rule withstands."""

    name: Literal[
        "mean",
        "krum",
        "multi_krum",
        "nearest_neighbour_mixing",
        "geometric_median",
        "centred_clipping",
        "veto_multi_krum",
        "coordinate_median",
        "trimmed_mean",
    ] = "mean"
    hostile: int = Field(0, ge=0, description="f: how many sites may work against the others; every rule has its own limit")
    radius: float = Field(
        1.0, gt=0, description="centred clipping: how far an update may lie from the centre, in median distances"
    )


class Compression(Settings):
    """How few numbers an update becomes: linear, by public random numbers fixed when the last model was."""

    name: Literal["none", "low_rank", "hadamard", "random_k"] = "none"
    share: float = Field(0.033, gt=0, le=1, description="numbers sent, as a share of the model's")
    feedback: float = Field(
        0.9, ge=0, le=1, description="share of what was not sent that a site adds to its next update (not low_rank)"
    )
    downlink: bool = Field(True, description="sites get the step in its compressed form; needs plan.server.name: sgd")
    refresh_every: int = Field(0, ge=0, description="also send the whole model every so many rounds; 0: where a site lacks it")


class Security(Settings):
    """Who may see an update: docs/threat-model.md."""

    mode: Literal["none", "trigram", "masking", "ckks"] = "none"
    ring_bits: Literal[32, 64] = Field(
        32, description="of one number of a masked update; 64 for contributions and long updates"
    )
    clip: float = Field(10.0, gt=0, description="largest norm of an update in the first round; later ones follow the median")
    clip_factor: float = Field(2.0, ge=1, description="largest norm of an update, in median norms of the round before")
    exchanges: int = Field(3, ge=1, description="tries a round has before it is given up, as long as nothing was opened")
    canary_rate: float = Field(0.0, ge=0, le=0.5, description="share of exchanges in which members secretly test the roles")
    round_scores: bool = Field(False, description="sites add their validation sums and loss to a round, in the clear")
    threshold: float = Field(0.6, gt=0.5, le=1, description="masking: share of the roster that must be there to unmask a sum")


class Privacy(Settings):
    """Differential privacy of training at each site, per record (DP-SGD); docs/privacy.md."""

    unit: Literal["none", "record", "site"] = "none"
    epsilon: float = Field(8.0, gt=0, description="budget of a site over the whole run; training stops before it is passed")
    delta: float = Field(1e-5, gt=0, lt=1)
    clip: float = Field(1.0, gt=0, description="largest norm of one record's gradient")
    noise_multiplier: Annotated[float, Field(gt=0)] | None = Field(
        None, description="noise in units of clip; None: the least that keeps the budget over all rounds"
    )


class ContributionSpec(Settings):
    """How each round tells who contributed; needs the consortium's reference set."""

    method: Literal["none", "gram"] = "none"
    every: int = Field(1, ge=1, description="rounds between two looks")
    rows: int = Field(60, ge=5, description="reference rows whose predictions are explained")
    settle_epsilon: float = Field(1.0, gt=0, description="fedmat settle: privacy per record of a site's moments at the Auditor")
    settle_delta: float = Field(1e-5, gt=0, lt=1)
    settle_dims: int = Field(12, ge=1, le=64, description="numbers the model's last hidden layer is projected to")
    ridge: float = Field(
        1.0,
        gt=0,
        description="of the retrained last layer, in units of what covers the noise and 0.3 of a median player's rows",
    )


class PlanSettings(Settings):
    """How the consortium trains; the ``plan`` section of consortium.yaml."""

    algorithm: Literal["fedavg", "fedprox", "scaffold"] = "fedavg"
    rounds: int = Field(30, ge=1)
    ensemble: int = Field(
        1,
        ge=1,
        le=10,
        description="networks trained side by side, each without one fold of every site's groups; 1: one network",
    )
    average_last: int = Field(
        0, ge=0, description="the model is the mean of the weights after this many last rounds; 0: the last"
    )
    server: ServerOptimizer = ServerOptimizer()
    local: LocalTraining = LocalTraining()
    schedule: Schedule = Schedule()
    site_weights: Literal["equal", "rows"] = "equal"
    max_weight_share: float = Field(0.5, gt=0, le=1, description="no site counts for more than this share of a round")
    scaling: Literal["standard", "quantile"] = Field(
        "standard",
        description="of the features: mean and spread, or normal scores, which need counts of every feature's values from the sites",
    )
    quorum: int = Field(2, ge=1, description="sites that must answer well before a round closes")
    deadline_s: float = Field(120.0, gt=0, description="time a site has for one request")
    max_update_norm: float = Field(1e3, gt=0, description="larger updates are rejected")
    isolation: Literal["none", "process"] = Field("none", description="one process per site on the in-process engine")
    seed: int = Field(17, ge=0)
    personalization: Personalization = Personalization()
    deduplicate: bool = Field(
        True, description="find records that several sites hold, by keys under a secret of the members, and train on each once"
    )
    interval_level: float = Field(0.9, gt=0.5, lt=1, description="share of new materials that a prediction's interval covers")
    rule: RuleSpec = Field(RuleSpec(), exclude_if=_as_it_was)
    compression: Compression = Field(Compression(), exclude_if=_as_it_was)
    security: Security = Field(Security(), exclude_if=_as_it_was)
    privacy: Privacy = Field(Privacy(), exclude_if=_as_it_was)
    contribution: ContributionSpec = Field(ContributionSpec(), exclude_if=_as_it_was)
    site_momentum: float = Field(
        0.0,
        ge=0,
        lt=1,
        exclude_if=_as_it_was,
        description="a site sends this share of its last update along: less noise between sites",
    )


class Splits(Settings):
    """Held-out groups; never rows of one group on both sides."""

    test_fraction: float = Field(0.2, gt=0, lt=1, description="used where the source states no split of its own")
    validation_fraction: float = Field(0.15, gt=0, lt=1)
    seed: int = Field(7, ge=0)
    keep_together: tuple[str, ...] = Field(
        (),
        exclude_if=_as_it_was,
        description="contract fields, e.g. [doi]: rows that share a value are never divided over training and validation",
    )

    @field_validator("keep_together")
    @classmethod
    def _fields_differ(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a field is named twice: name each one once")
        return value


class Admission(Settings):
    """When a site is refused for a run."""

    max_rejected_fraction: float = Field(0.2, ge=0, lt=1)
    min_train_records: int = Field(20, ge=2)


class Member(Settings):
    """One site of the consortium and where its site.yaml lies, relative to consortium.yaml."""

    site: str = Field(pattern=SLUG)
    organisation: str
    file: Path
    transport: Literal["direct", "files"] = Field(
        "direct", description="files: a person carries signed files to and from the site (docs/file-drop.md)"
    )


class Terms(Settings):
    """What the members agree on beside their keys; part of the charter that all of them sign (docs/charter.md)."""

    quorum: float = Field(
        2 / 3, gt=0.5, le=1, description="share of the members that must sign: who joins, who has to leave; rounded up"
    )
    approvals: int | None = Field(
        None,
        ge=0,
        description="members that must approve a model before it is champion; by default the quorum, in a simulated consortium none",
    )
    witnesses: int | None = Field(
        None, ge=0, description="members that must cosign a checkpoint before it counts; by default the quorum"
    )
    contract_versions: tuple[str, ...] = Field((), description="releases of the data contract that data may follow; empty: any")
    residency: dict[str, str] = Field(default_factory=dict, description="site -> country in which its data stay")
    export_classes: tuple[str, ...] = Field(
        (), description="export classes of data that may take part, as members declare them; empty: any"
    )
    min_sites: int = Field(2, ge=2, description="fewer members than that train no model together")
    published: dict[str, Literal["members", "public"]] = Field(
        {"ledger": "members", "metrics": "members", "model": "members"}, description="what is shown to whom"
    )
    credits_per_release: int = Field(1000, ge=1, le=10**12, description="credits that one settled model makes")
    tiers: dict[str, Annotated[int, Field(ge=0)]] = Field(
        default_factory=dict, description="tier of the registry's models -> its price in credits"
    )
    priority_price: int = Field(1, ge=1, description="credits for one day of priority in serving")

    def needed(self, members: int) -> int:
        """Returns how many of ``members`` are a quorum."""
        return math.ceil(round(self.quorum * members, 9))

    def approvals_needed(self, members: int) -> int:
        """Returns how many members must approve a champion."""
        return self.needed(members) if self.approvals is None else self.approvals

    def witnesses_needed(self, members: int) -> int:
        """Returns how many members must cosign a checkpoint."""
        return self.needed(members) if self.witnesses is None else self.witnesses


class ConsortiumConfig(Settings):
    """The whole of consortium.yaml."""

    name: str = Field(pattern=SLUG)
    title: str
    description: str = ""
    simulated: bool = Field(False, description="one operator owns all data: permits pooled and cross-site baselines")
    task: Task
    auxiliary: tuple[Task, ...] = Field((), description="further targets the same network learns, where a site has them")
    features: tuple[FeatureSpec, ...] = Field(min_length=1)
    model: ModelSpec = ModelSpec()
    plan: PlanSettings = PlanSettings()
    splits: Splits = Splits()
    admission: Admission = Admission()
    members: tuple[Member, ...] = Field(min_length=1)
    reference: Path | None = Field(
        None, description="site file of the reference set: public or jointly agreed rows that contributions are measured on"
    )
    charter: Path | None = Field(
        None, description="everyone's public keys (docs/keys.md); a simulated consortium makes its own for a rehearsal"
    )
    terms: Terms = Field(Terms(), description="what members agree on beside keys: quorum, approvals, credits (docs/charter.md)")

    @field_validator("features", mode="before")
    @classmethod
    def _short_features(cls, value: Any) -> Any:
        return [{"name": v} if isinstance(v, str) else v for v in value] if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _tasks_agree(self) -> ConsortiumConfig:
        seen = [t.target for t in self.tasks]
        if len(set(seen)) != len(seen):
            raise ValueError("task and auxiliary name the same target twice")
        for t in self.auxiliary:
            if t.record_type != self.task.record_type:
                raise ValueError(f"auxiliary {t.name}: all tasks read one record type, {self.task.record_type}")
        if self.auxiliary and any(t.kind == "binary" for t in self.tasks):
            raise ValueError("kind: binary cannot be combined with auxiliary tasks")
        return self

    @property
    def tasks(self) -> tuple[Task, ...]:
        """All targets: the task first, then the auxiliary ones."""
        return (self.task, *self.auxiliary)

    @model_validator(mode="after")
    def _members_differ(self) -> ConsortiumConfig:
        seen = [m.site for m in self.members]
        twice = sorted({s for s in seen if seen.count(s) > 1})
        if twice:
            raise ValueError(f"two members are called {', '.join(twice)}: give every site its own name")
        return self

    @property
    def roster(self) -> tuple[str, ...]:
        """Site names in the one order every sum uses."""
        return tuple(sorted(m.site for m in self.members))


# --- site.yaml ---------------------------------------------------------------------------------------------------


class Column(Settings):
    """Where one contract field comes from."""

    source: str = Field(alias="from", description="column name in the source, as it is written there")
    unit: str | None = Field(None, description="unit in the source; needed for every field that has a unit")
    replace: dict[str, str] = Field(default_factory=dict, description="exact text replacements after stripping")
    strip: str = Field("", description="characters stripped from both ends besides white space")
    chain_ends: tuple[str, ...] = Field(
        (), description="SMILES: atoms that stand for the ends of a repeat unit in this source, e.g. '[Cu]'; read as [*]"
    )

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class MixtureColumns(Settings):
    """A mixture spread over one column per component: source column -> component name."""

    fractions: dict[str, str]
    percent: bool = False


def _mapping_kind(value: Any) -> str:
    """Tells which of the two ways of mapping a field is meant, so that an error speaks of that one only."""
    keys = value if isinstance(value, dict) else type(value).model_fields if isinstance(value, BaseModel) else ()
    return "MixtureColumns" if "fractions" in keys or ("percent" in keys and "from" not in keys) else "Column"


Mapped = Annotated[
    Annotated[Column, Tag("Column")] | Annotated[MixtureColumns, Tag("MixtureColumns")], Discriminator(_mapping_kind)
]


class Constant(Settings):
    """A value that holds for every row of the source (a condition of measurement)."""

    value: str | float
    unit: str | None = None


class Select(Settings):
    """Keeps the rows whose key appears in a second table, e.g. a published site or split table."""

    table: str
    left: str = Field(description="key column in the source, or 'row' for the 0-based row number")
    right: str = Field(description="key column in the table")
    where: dict[str, str | list[str]] = Field(default_factory=dict, description="table column -> permitted value(s)")
    take: dict[str, str] = Field(default_factory=dict, description="source column to add -> table column")


class Structures(Settings):
    """CIF files or pymatgen JSON that belong to rows: a folder or a .tar.gz, file stem = value of ``on``."""

    path: str
    on: str


class SplitColumn(Settings):
    """A published split: the column that states it and the values that mean train and test.

    ``test: []`` states that the source brings no test rows at all; where that holds for the whole site, none are drawn.
    """

    column: str
    train: tuple[str, ...] = ("train",)
    test: tuple[str, ...] = ("test",)


class Source(Settings):
    """One file, table or folder of a site and how its columns become contract fields."""

    name: str = Field("main", pattern=SLUG)
    adapter: str = Field(description="csv, excel, parquet, sql, structures, or an installed third-party adapter")
    path: str = Field("", description="relative to site.yaml; ${FEDMAT_DATA} is replaced; a URL for sql")
    options: dict[str, Any] = Field(default_factory=dict)
    select: Select | None = None
    structures: Structures | None = None
    where: dict[str, str | list[str]] = Field(default_factory=dict, description="source column -> permitted value(s)")
    columns: dict[str, Mapped]
    constants: dict[str, Constant] = Field(default_factory=dict)
    split: SplitColumn | None = None

    @field_validator("columns", mode="before")
    @classmethod
    def _short_columns(cls, value: Any) -> Any:
        return {k: {"from": v} if isinstance(v, str) else v for k, v in value.items()} if isinstance(value, dict) else value

    @field_validator("constants", mode="before")
    @classmethod
    def _short_constants(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: v if isinstance(v, dict) else {"value": v} for k, v in value.items()}


class SiteConfig(Settings):
    """The whole of one site.yaml."""

    site: str = Field(pattern=SLUG)
    organisation: str
    note: str = ""
    record_type: str
    sources: tuple[Source, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _sources_differ(self) -> SiteConfig:
        seen = [s.name for s in self.sources]
        if len(set(seen)) != len(seen):
            raise ValueError("two sources have the same name: give each its own 'name'")
        return self


# --- reading -----------------------------------------------------------------------------------------------------


def load_consortium(path: Path) -> ConsortiumConfig:
    """Reads and checks a consortium file.

    Raises:
        ConfigError: the file is missing, is not YAML, or a key or value is wrong (named, with the nearest valid key).
    """
    return parse_settings(ConsortiumConfig, read_yaml(path), path)


def load_site(path: Path) -> SiteConfig:
    """Reads and checks a site file; errors as in :func:`load_consortium`."""
    return parse_settings(SiteConfig, read_yaml(path), path)


def resolve_path(text: str, base: Path) -> Path:
    """Returns ``text`` with ``${FEDMAT_DATA}`` filled in, relative to ``base`` (the folder of the file naming it).

    Raises:
        ConfigError: ``${FEDMAT_DATA}`` is used and there is no such folder.
    """
    if "${FEDMAT_DATA}" in text:
        text = text.replace("${FEDMAT_DATA}", str(data_home()))
    path = Path(text).expanduser()
    return path if path.is_absolute() else (base / path).resolve()


def data_home() -> Path:
    """Returns the folder of public datasets: ``FEDMAT_DATA``, else ``../shared/data`` or ``./data`` if there is one."""
    named = os.environ.get("FEDMAT_DATA")
    if named:
        return Path(named).expanduser().resolve()
    for candidate in (Path("data"), Path("../shared/data")):
        if candidate.is_dir():
            return candidate.resolve()
    raise ConfigError(
        "the configuration uses ${FEDMAT_DATA}, and neither that variable nor a data folder is there",
        fix="run 'fedmat data get NAME' and set FEDMAT_DATA to the folder it names",
    )


def parse_settings(model: type[S], raw: object, path: Path) -> S:
    """Returns ``raw`` as ``model``; every problem is listed with its key, file and nearest valid key."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(raw).__name__}", fix="see docs/")
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(model, e) for e in error.errors(include_url=False, include_input=False)]
        raise ConfigError(f"{path}:\n  " + "\n  ".join(lines), fix=f"correct the named keys in {path}") from None


def read_yaml(path: Path) -> object:
    """Returns what a YAML file says.

    Raises:
        ConfigError: no such file, no YAML, or a key that is given twice; with file and line.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file", fix="name an existing YAML file")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except _RepeatedKey as error:
        raise ConfigError(f"{path}, line {error.line}: key '{error.key}' is given twice", fix="keep one of the two") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not valid YAML", fix="check indentation and quoting") from None


class _RepeatedKey(Exception):
    def __init__(self, key: object, line: int) -> None:
        super().__init__(key)
        self.key, self.line = key, line


class _Loader(yaml.SafeLoader):
    """YAML as people read it: ``on``, ``off``, ``yes`` and ``no`` are words (YAML 1.2), and no key stands twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Returns the mapping; raises _RepeatedKey where PyYAML would silently keep the last value."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise _RepeatedKey(key.value, key.start_mark.line + 1)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


_TAGS = ("Column", "MixtureColumns")  # pydantic puts the tag of a union into the place of an error; a person did not write it


def _explain(model: type[BaseModel], error: Any) -> str:
    where = ".".join(str(p) for p in error["loc"] if p not in _TAGS) or "(top level)"
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg']}"
    valid = _valid_keys(model, error["loc"][:-1])
    near = difflib.get_close_matches(str(error["loc"][-1]), valid, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(sorted(valid))}"
    return f"{where}: unknown key; {hint}"


def _valid_keys(model: Any, loc: tuple[Any, ...]) -> list[str]:
    candidates: list[type[BaseModel]] = [model]
    for part in loc:
        if part in _TAGS:
            candidates = [kind for kind in candidates if kind.__name__ == part]
            continue
        found = [
            kind
            for owner in candidates
            for name, field in owner.model_fields.items()
            if part in (name, field.alias)
            for kind in _members(field.annotation)
        ]
        candidates = found or candidates  # a list index, a dict key or a union tag: stay where we are
    return [field.alias or name for kind in candidates for name, field in kind.model_fields.items()]


def _members(annotation: Any) -> list[type[BaseModel]]:
    if typing.get_origin(annotation) is not None:
        return [m for a in typing.get_args(annotation) for m in _members(a)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
