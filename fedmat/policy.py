"""A site's own policy: which plans it takes part in, and which objects may leave it.

Knows: the clauses of ``policy.yaml``, and how a consortium file and an outbound object are held against them. Refuses to know:
records, what an object holds, how a request arrives. Whatever a policy does not name is refused, so an empty one refuses
everything, and nothing that another party sends changes it. ``fedmat.federation.plan`` refuses what is unsound for anybody;
this module refuses what is unwanted here.

References:
    Saltzer, Schroeder, "The protection of information in computer systems", Proceedings of the IEEE 63, 1975 (fail-safe defaults).
    Geiping et al., "Inverting gradients", NeurIPS 2020 (why an update made of few rows tells of them).
"""

from __future__ import annotations

import difflib
import textwrap
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field

from fedmat.config import (
    Compression,
    ConsortiumConfig,
    ContributionSpec,
    FeatureSpec,
    PlanSettings,
    RuleSpec,
    Security,
    Settings,
    Splits,
    parse_settings,
    read_yaml,
)
from fedmat.errors import ConfigError, PolicyRefused

ANY = "any"  # in place of a list of names: all of them, also those that do not exist yet
KINDS: Mapping[str, str] = {
    "Offer": "keys of records under the members' secret",
    "Removed": "how many rows were left out of training, by reason",
    "Attestation": "digests of data and features, names of features, numbers of rows",
    "Statistics": "count, sum and sum of squares of every feature and target over the training rows",
    "Ranks": "counts of every feature's values by size",
    "NeedModel": "that the site lacks the model a round starts from",
    "Update": "a round's update, readable by the coordinator, with training loss and sums of errors",
    "Sealed": "a round's update, encrypted or masked as the plan says",
    "AuditVote": "whether what the roles opened of the site's own update is true",
    "MaskKeys": "two public keys for one masked round",
    "MaskShares": "shares of two secrets of one masked round, sealed to the other members",
    "ArrivedSignature": "signed word of whose masked updates arrived",
    "Unmasked": "shares kept for other members, to open one sum",
    "SumWitness": "signature of an encrypted sum",
    "Calibration": "counts of errors by size, for prediction intervals",
    "Baseline": "how the site's own models do on its test groups; of a simulated consortium the models too",
    "Evaluation": "sums of errors and of the target over held-out rows, counts of predictions by size",
    "Statements": "signed entries for the ledger, and the list of all that left: digests, counts, sizes",
    "SealedMoments": "noisy second moments of rows, sealed to the auditor; asked for by fedmat settle alone",
}
MOST_BYTES = 64 * 2**20  # in a draft: well above an update of the networks in use
_UNITS = ("none", "record", "site")  # of privacy, weakest first
_WIDTH = 110


# --- policy.yaml -------------------------------------------------------------------------------------------------


def _listed(value: object) -> object:
    if value == ANY:
        return (ANY,)
    if isinstance(value, str):
        raise ValueError(f"write a list of names, [{value}], or the word {ANY}")
    if isinstance(value, list | tuple) and ANY in value and len(value) > 1:
        raise ValueError(f"'{ANY}' accepts everything, so it stands alone")
    return value


def _features(value: object) -> object:
    value = _listed(value)
    return [{"name": v} if isinstance(v, str) else v for v in value] if isinstance(value, list | tuple) else value


def _known(valid: tuple[str, ...]) -> AfterValidator:
    """A misspelt name would only refuse more, and nobody would know why."""

    def check(names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in (*valid, ANY):
                near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
                raise ValueError(f"there is no '{name}'; " + (f"did you mean '{near[0]}'?" if near else f"use {_text(valid)}"))
        return names

    return AfterValidator(check)


def _choices(model: type[Settings], key: str) -> AfterValidator:
    return _known(typing.get_args(model.model_fields[key].annotation))


def _digest(value: object) -> object:
    return "".join(value.split()).lower() if isinstance(value, str) else value  # as it is printed for people, in groups


def _clause(default: Any, setting: str, why: str) -> Any:
    return Field(default, title=setting, description=why)


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
Count = Annotated[int, Field(ge=0)] | None


class Plans(Settings):
    """What a plan may ask for; the title of a clause is the setting of the consortium file that it judges."""

    members: Names = _clause((), "members", "who may be a member: every member gets the model")
    record_types: Names = _clause((), "task.record_type", "record types that may be trained on")
    targets: Names = _clause((), "task.target", "contract fields that may be predicted")
    features: Annotated[tuple[FeatureSpec, ...], BeforeValidator(_features)] = _clause(
        (), "features", "featurizers, with their options as in the consortium file: sums of every feature leave the site"
    )
    splits: Splits | None = _clause(
        None,
        "splits",
        "how rows are divided, as in the consortium file: sums over a small test group tell of its rows, and sums over two "
        "divisions can be subtracted from each other",
    )
    algorithms: Annotated[Names, _choices(PlanSettings, "algorithm")] = _clause((), "plan.algorithm", "ways of training")
    rules: Annotated[Names, _choices(RuleSpec, "name")] = _clause(
        (), "plan.rule.name", "how updates may be joined (docs/rules.md)"
    )
    least_hostile: Count = _clause(None, "plan.rule.hostile", "hostile sites that the rule is set for, at least")
    security: Annotated[Names, _choices(Security, "mode")] = _clause(
        (), "plan.security.mode", "how updates are protected; none: the coordinator sees every one"
    )
    least_threshold: Number = _clause(
        None, "plan.security.threshold", "masking: share of the members that it takes to open a sum, at least"
    )
    least_canary_rate: Number = _clause(
        None, "plan.security.canary_rate", "trigram: share of exchanges in which members secretly test the roles, at least"
    )
    round_scores: bool = _clause(
        False,
        "plan.security",
        "may training loss and sums of errors leave with every round, readable by the coordinator; an update that is neither "
        "encrypted nor private always brings them",
    )
    compression: Annotated[Names, _choices(Compression, "name")] = _clause(
        (), "plan.compression.name", "how an update is made smaller; none: not at all"
    )
    scaling: Annotated[Names, _choices(PlanSettings, "scaling")] = _clause(
        (), "plan.scaling", "of features; quantile: counts of every feature's values by size leave the site"
    )
    contribution: Annotated[Names, _choices(ContributionSpec, "method")] = _clause(
        (),
        "plan.contribution.method",
        "how rounds tell who contributed; gram: the roles see what updates do to the reference rows",
    )
    deduplicate: bool = _clause(False, "plan.deduplicate", "may keys of records leave, to find what several sites hold")
    simulated: bool = _clause(
        False,
        "simulated",
        "may the consortium call itself simulated: the site's own models then leave it and small counts are not hidden; only "
        "for data that one operator owns",
    )
    most_rounds: Count = _clause(None, "plan.rounds", "rounds of a run, at most")
    most_steps: Count = _clause(None, "plan.local.steps", "optimiser steps of a round, at most")
    least_batch_size: Count = _clause(
        None, "plan.local.batch_size", "rows of an optimiser step, at least: an update made of few rows tells of them"
    )
    most_ensemble: Count = _clause(None, "plan.ensemble", "networks trained side by side, at most")
    least_quorum: Count = _clause(None, "plan.quorum", "sites that answer before a round closes, at least")
    most_update_norm: Number = _clause(None, "plan.max_update_norm", "length of an update, at most")


class PrivacyFloor(Settings):
    """The weakest differential privacy that the site trains under; the default accepts nothing."""

    unit: Literal["none", "record", "site"] = _clause(
        "record", "plan.privacy.unit", "what is protected, at least; none: plans without differential privacy are accepted"
    )
    max_epsilon: Number = _clause(None, "plan.privacy.epsilon", "budget of a run, at most; not judged where unit is none")
    max_delta: Number = _clause(
        None, "plan.privacy.delta", "chance that the guarantee fails, at most; not judged where unit is none"
    )
    max_settle_epsilon: Number = _clause(None, "plan.contribution.settle_epsilon", "budget of one settlement, at most")
    max_settle_delta: Number = _clause(None, "plan.contribution.settle_delta", "chance that its guarantee fails, at most")


class Outbound(Settings):
    """What may leave the site. That there is no answer, and why, may always be said."""

    kinds: Annotated[Names, _known(tuple(KINDS))] = _clause((), "", "kinds of objects that may leave")
    destinations: Names = _clause((), "", "to whom they may go; every answer goes to the coordinator")
    most_bytes: Count = _clause(None, "", "size of one object, at most")


class Policy(Settings):
    """The whole of policy.yaml: a list that is empty and a number that is not given accept nothing."""

    consortium: str = _clause("", "name", "name of the consortium that this site works for")
    charter_sha256: Annotated[str, BeforeValidator(_digest), Field(pattern="^([0-9a-f]{64})?$")] = _clause(
        "", "charter", "digest of the charter that the members compared by telephone (docs/keys.md); empty: any charter"
    )
    plans: Plans = _clause(Plans(), "", f"what a plan may ask for; the word {ANY} in place of a list accepts everything")
    privacy: PrivacyFloor = _clause(PrivacyFloor(), "", "the weakest differential privacy accepted (docs/privacy.md)")
    outbound: Outbound = _clause(Outbound(), "", "what may leave this site")

    def admit(self, config: ConsortiumConfig, charter_sha256: str = "") -> None:
        """Returns if this site agrees to a plan.

        Args:
            config: the consortium file that the coordinator runs.
            charter_sha256: digest of the charter it is run under; "" where there is none.

        Raises:
            PolicyRefused: the first clause, in the order of the file, that the plan violates.
        """
        for refusal in self._against(config, charter_sha256):
            raise refusal

    def violations(self, config: ConsortiumConfig, charter_sha256: str = "") -> tuple[PolicyRefused, ...]:
        """Returns all clauses that a plan violates; empty where :meth:`admit` returns."""
        return tuple(self._against(config, charter_sha256))

    def release(self, kind: str, size: int, destination: str = "coordinator") -> None:
        """Returns if an object may leave this site.

        Args:
            kind: class name of the answer, one of ``KINDS``.
            size: its encoded length in bytes.

        Raises:
            PolicyRefused: the kind, the destination or the size is not permitted.
        """
        out = self.outbound
        if kind not in KINDS or not _accepts(out.kinds, kind):  # 'any' is any answer, never a file that stays at the site
            raise _refused("outbound.kinds", f"a {kind} may not leave; this site releases {_text(out.kinds)}")
        if not _accepts(out.destinations, destination):
            raise _refused("outbound.destinations", f"nothing may go to {destination}, only to {_text(out.destinations)}")
        if out.most_bytes is None or size > out.most_bytes:
            limit = _limit(out.most_bytes, least=False)
            raise _refused("outbound.most_bytes", f"a {kind} has {size} bytes; this site accepts {limit}")

    def _against(self, config: ConsortiumConfig, charter_sha256: str) -> Iterator[PolicyRefused]:
        asked = _asked(config)
        if self.consortium != asked.consortium:
            yield _refused(
                "consortium", f"a plan of '{asked.consortium}'; this site works for {self.consortium or 'none'}", "name"
            )
        if self.charter_sha256 and charter_sha256 != self.charter_sha256:
            theirs = f"charter {charter_sha256[:16]}" if charter_sha256 else "no charter"
            yield _refused("charter_sha256", f"{theirs}; this site accepts {self.charter_sha256[:16]} alone", "charter")
        yield from _compared("plans", self.plans, asked.plans)
        yield from _compared("privacy", self.privacy, asked.privacy)
        if lacking := [kind for kind in _for_rounds(config) if not _accepts(self.outbound.kinds, kind)]:
            # no part at all is better than one that ends after the statistics have left
            what = f"rounds of the plan need {_text(lacking)}; this site releases {_text(self.outbound.kinds)}"
            yield _refused("outbound.kinds", what)


def load(path: Path) -> Policy:
    """Reads and checks a policy file; an empty file is a policy that refuses everything.

    Raises:
        ConfigError: the file is missing, is not YAML, or a key or value is wrong (named, with the nearest valid one).
    """
    raw = read_yaml(path)
    return parse_settings(Policy, {} if raw is None else raw, path)


# --- what a plan asks for ----------------------------------------------------------------------------------------


def kinds_asked(config: ConsortiumConfig) -> tuple[str, ...]:
    """Returns the kinds of objects a plan asks of a site, in the order of ``KINDS``; a settlement is no part of a plan."""
    after = {"Baseline", "Evaluation", "Statements"} | ({"Calibration"} if config.task.kind != "binary" else set())
    return tuple(kind for kind in KINDS if kind in after or kind in _for_rounds(config))


def _for_rounds(config: ConsortiumConfig) -> tuple[str, ...]:
    """Returns the kinds without which a site can take no part in training."""
    p, mode = config.plan, config.plan.security.mode
    return (
        *(("Offer", "Removed") if p.deduplicate else ()),
        *("Attestation", "Statistics"),
        *(("Ranks",) if p.scaling == "quantile" else ()),
        *(("NeedModel",) if mode == "ckks" or (p.compression.name != "none" and p.compression.downlink) else ()),
        "Update" if mode == "none" else "Sealed",
        *(("AuditVote",) if mode == "trigram" else ()),
        *(("MaskKeys", "MaskShares", "ArrivedSignature", "Unmasked") if mode == "masking" else ()),
        *(("SumWitness",) if mode == "ckks" else ()),
    )


def _asked(config: ConsortiumConfig) -> Policy:
    """Returns the policy that a plan just passes; None where a clause does not concern the plan.

    The names in it are not checked: they are the operator's words, to be compared and refused like any others.
    """
    p, mode = config.plan, config.plan.security.mode
    private, settles = p.privacy.unit != "none", mode in ("trigram", "ckks")  # only these have an auditor to settle with
    plans = Plans.model_construct(
        members=config.roster,
        record_types=(config.task.record_type,),
        targets=tuple(t.target for t in config.tasks),
        features=config.features,
        splits=config.splits,
        algorithms=(p.algorithm,),
        rules=(p.rule.name,),
        least_hostile=p.rule.hostile,
        security=(mode,),
        least_threshold=p.security.threshold if mode == "masking" else None,
        least_canary_rate=p.security.canary_rate if mode == "trigram" else None,
        round_scores=p.security.round_scores or (mode == "none" and p.privacy.unit != "record"),
        compression=(p.compression.name,),
        scaling=(p.scaling,),
        contribution=(p.contribution.method,),
        deduplicate=p.deduplicate,
        simulated=config.simulated,
        most_rounds=p.rounds,
        most_steps=round(p.local.steps * max(1.0, p.schedule.final_steps_factor)),
        least_batch_size=p.local.batch_size,
        most_ensemble=p.ensemble,
        least_quorum=p.quorum,
        most_update_norm=p.max_update_norm,
    )
    privacy = PrivacyFloor.model_construct(
        unit=p.privacy.unit,
        max_epsilon=p.privacy.epsilon if private else None,
        max_delta=p.privacy.delta if private else None,
        max_settle_epsilon=p.contribution.settle_epsilon if settles else None,
        max_settle_delta=p.contribution.settle_delta if settles else None,
    )
    outbound = Outbound(kinds=kinds_asked(config), destinations=("coordinator",), most_bytes=MOST_BYTES)
    return Policy.model_construct(consortium=config.name, plans=plans, privacy=privacy, outbound=outbound)


def _compared(section: str, ours: Settings, asked: Settings) -> Iterator[PolicyRefused]:
    """Yields a refusal for every clause of a section by which a plan asks for more than this site accepts."""
    unjudged = ("max_epsilon", "max_delta") if getattr(ours, "unit", "") == "none" else ()
    for key, field in type(ours).model_fields.items():
        limit, wanted, setting = getattr(ours, key), getattr(asked, key), str(field.title)
        what = ""
        if wanted is None or key in unjudged:
            continue
        if key == "unit":
            if _UNITS.index(wanted) < _UNITS.index(limit):
                what = f"{setting} is {wanted}; this site asks for {limit}"
        elif isinstance(wanted, bool):
            if wanted and not limit:
                what = f"the plan asks for it ({setting}); this site does not permit it"
        elif isinstance(wanted, tuple):
            if others := [a for a in wanted if not _accepts(limit, a)]:
                how = ", name and options" if key == "features" else ""
                what = f"the plan asks for {_text(others)} ({setting}{how}); this site accepts {_text(limit)}"
        elif isinstance(wanted, Settings):
            if wanted != limit:
                what = f"the plan's {setting} are not those this site accepts"
        elif limit is None or not (wanted >= limit if key.startswith("least") else wanted <= limit):
            what = f"{setting} is {wanted}; this site accepts {_limit(limit, least=key.startswith('least'))}"
        if what:
            yield _refused(f"{section}.{key}", what, setting)


def _accepts(listed: tuple[Any, ...], name: Any) -> bool:
    return name in listed or listed in ((ANY,), (FeatureSpec(name=ANY),))


def _text(names: Any) -> str:
    return ", ".join(dict.fromkeys(n.name if isinstance(n, FeatureSpec) else n for n in names)) or "none"


def _limit(limit: float | None, *, least: bool) -> str:
    return "none, as its policy gives no limit" if limit is None else f"{'at least' if least else 'at most'} {limit}"


def _refused(clause: str, what: str, setting: str = "") -> PolicyRefused:
    theirs = f"{setting} in the consortium file, or " if setting else ""
    return PolicyRefused(clause, what, fix=f"change {theirs}{clause} in the site's policy.yaml, which the site alone decides")


# --- a draft -----------------------------------------------------------------------------------------------------


def draft(config: ConsortiumConfig, charter_sha256: str = "") -> str:
    """Returns the text of a policy that accepts what a consortium file asks for and nothing more, for a person to read.

    Args:
        charter_sha256: digest of the charter to accept, where the plan encrypts; "" accepts any.

    Raises:
        ConfigError: something in the consortium file is called 'any', which in a policy would accept everything.
    """
    asked = _asked(config)
    for key, field in Plans.model_fields.items():
        named = getattr(asked.plans, key)
        if isinstance(named, tuple) and any(getattr(n, "name", n) == ANY for n in named):
            raise ConfigError(f"{field.title}: '{ANY}' accepts everything in a policy", fix="ask the operator for another name")
    top = (
        f"What this site agrees to in the consortium {config.name}. Drafted from the consortium file: it accepts what that file asks "
        "for and nothing more. Read every line before you agree, and take out what is too much. What is not named here is refused, "
        "and the operator is told the clause. Only this site changes this file. docs/policy.md explains it."
    )
    pinned = charter_sha256 if config.plan.security.mode != "none" else ""  # a plan that encrypts nothing runs under no charter
    return "\n".join([_comment(top, 0), *_written(asked.model_copy(update={"charter_sha256": pinned}), 0)]) + "\n"


def _written(part: Settings, depth: int) -> Iterator[str]:
    """Yields the lines of a part of a policy: every key below its description, a number that is not given as a comment."""
    for key, field in type(part).model_fields.items():
        value = getattr(part, key)
        yield ("" if depth else "\n") + _comment(str(field.description), depth)
        if value is None:
            yield _indented(f"# {key}: not asked for, so not accepted", depth)
        elif key == "kinds":
            yield _indented("kinds:", depth)
            yield from (_indented(f"- {kind} # {KINDS[kind]}", depth + 1) for kind in value)
        elif isinstance(value, Plans | PrivacyFloor | Outbound):
            yield f"{key}:"
            yield from _written(value, depth + 1)
        else:
            plain = part.model_dump(mode="json", include={key})
            flow = None if isinstance(value, tuple | Settings) else False  # lists on one line
            yield _indented(yaml.safe_dump(plain, default_flow_style=flow, sort_keys=False, width=_WIDTH).rstrip(), depth)


def _comment(text: str, depth: int) -> str:
    return _indented(textwrap.fill(text, _WIDTH, initial_indent="# ", subsequent_indent="# "), depth)


def _indented(text: str, depth: int) -> str:
    return textwrap.indent(text, "  " * depth)
