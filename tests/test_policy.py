"""Laws of a site's own policy: what it does not name is refused, every clause refuses alone, and a draft accepts exactly its plan."""

from __future__ import annotations

import pickle
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import consortium
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from fedmat import baselines, domain, wire
from fedmat.config import ConsortiumConfig, FeatureSpec, load_consortium
from fedmat.errors import ConfigError, PolicyRefused
from fedmat.federation.engine import Handler, InProcessEngine
from fedmat.federation.plan import Plan
from fedmat.policy import ANY, KINDS, Outbound, Plans, Policy, PrivacyFloor, draft, kinds_asked, load

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*/consortium*.yaml"))
CHARTER, OTHER = "ab" * 32, "cd" * 32


def changed(config: ConsortiumConfig, path: str, value: Any) -> ConsortiumConfig:
    """The consortium file with one key changed; a callable gets the old value."""
    raw = config.model_dump(mode="json", by_alias=True)
    *parents, last = path.split(".")
    at = raw
    for part in parents:
        at = at.setdefault(part, {})  # a section at its default is left out of the dump
    at[last] = value(at.get(last)) if callable(value) else value
    return ConsortiumConfig.model_validate(raw)


def grove(**plan: Any) -> ConsortiumConfig:
    return consortium.config(consortium.SEVEN, **{"quorum": 5, **plan})


# every kind of plan that concerns some clause
TRIGRAM = grove(
    security={"mode": "trigram", "ring_bits": 64, "canary_rate": 0.1, "round_scores": True},
    rule={"name": "multi_krum", "hostile": 1},
    contribution={"method": "gram"},
    compression={"name": "hadamard", "share": 0.5},
    deduplicate=True,
    scaling="quantile",
    ensemble=2,
)
MASKED = grove(security={"mode": "masking", "threshold": 0.8})
CKKS = grove(security={"mode": "ckks"})
PRIVATE = grove(privacy={"unit": "record", "epsilon": 4.0, "delta": 1e-5})


def drafted(config: ConsortiumConfig, folder: Path, charter: str = "") -> Policy:
    path = folder / "policy.yaml"
    path.write_text(draft(config, charter))
    return load(path)


def clauses(policy: Policy, config: ConsortiumConfig, charter: str = "") -> list[str]:
    found = [v.clause for v in policy.violations(config, charter)]
    if found:
        with pytest.raises(PolicyRefused) as caught:
            policy.admit(config, charter)
        assert caught.value.clause == found[0]
    else:
        policy.admit(config, charter)
    return found


# --- an empty policy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "plans: {}\nprivacy: {}\noutbound: {}\n"])
def test_an_empty_policy_refuses_every_plan_and_releases_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    policy = load(path)
    assert policy == Policy()
    for file in EXAMPLES:
        assert len(clauses(policy, load_consortium(file))) > 15
    for kind in KINDS:
        with pytest.raises(PolicyRefused):
            policy.release(kind, 0)


def test_every_clause_of_an_empty_policy_refuses_what_concerns_it() -> None:
    found = {c for config in (TRIGRAM, MASKED, CKKS, PRIVATE) for c in clauses(Policy(), config)}
    every = {"consortium", "outbound.kinds"} | {f"plans.{k}" for k in Plans.model_fields}
    every |= {f"privacy.{k}" for k in PrivacyFloor.model_fields}
    assert found == every


# --- a draft ---------------------------------------------------------------------------------------------------------

PLANS = [
    *(pytest.param(load_consortium(f), id=str(f.relative_to(ROOT / "examples"))) for f in EXAMPLES),
    *(pytest.param(c, id=n) for n, c in (("trigram", TRIGRAM), ("masking", MASKED), ("ckks", CKKS), ("private", PRIVATE))),
]
# clause -> (setting, what asks for more), each weaker than any plan above; None: the clause does not concern this plan
WEAKER: dict[str, tuple[str, Callable[[ConsortiumConfig], Any]]] = {
    "consortium": ("name", lambda c: "another"),
    "plans.members": ("members", lambda c: [*c.model_dump()["members"], {"site": "rival", "organisation": "R", "file": "r"}]),
    "plans.record_types": ("task.record_type", lambda c: None if c.auxiliary else "molecule"),
    "plans.targets": ("task.target", lambda c: "doi"),
    "plans.features": ("features", lambda c: [*c.model_dump()["features"], {"name": "conditions", "options": {"fields": ["x"]}}]),
    "plans.splits": ("splits.test_fraction", lambda c: 0.001),
    "plans.algorithms": ("plan.algorithm", lambda c: "scaffold"),
    "plans.rules": ("plan.rule.name", lambda c: "trimmed_mean"),
    "plans.least_hostile": ("plan.rule.hostile", lambda c: c.plan.rule.hostile - 1 if c.plan.rule.hostile else None),
    "plans.security": ("plan.security.mode", lambda c: "masking" if c.plan.security.mode == "none" else "none"),
    "plans.least_threshold": ("plan.security.threshold", lambda c: 0.51 if c.plan.security.mode == "masking" else None),
    "plans.least_canary_rate": (
        "plan.security.canary_rate", lambda c: c.plan.security.canary_rate / 2 if c.plan.security.canary_rate else None,
    ),
    "plans.round_scores": (
        "plan.security.round_scores",
        lambda c: True if (c.plan.security.mode != "none" or c == PRIVATE) and not c.plan.security.round_scores else None,
    ),
    "plans.compression": ("plan.compression.name", lambda c: "random_k"),
    "plans.scaling": ("plan.scaling", lambda c: "quantile" if c.plan.scaling == "standard" else None),
    "plans.contribution": ("plan.contribution.method", lambda c: "gram" if c.plan.contribution.method == "none" else None),
    "plans.deduplicate": ("plan.deduplicate", lambda c: None if c.plan.deduplicate else True),
    "plans.simulated": ("simulated", lambda c: None if c.simulated else True),
    "plans.most_rounds": ("plan.rounds", lambda c: c.plan.rounds + 1),
    "plans.most_steps": ("plan.local.steps", lambda c: c.plan.local.steps + 2),
    "plans.least_batch_size": ("plan.local.batch_size", lambda c: c.plan.local.batch_size - 1),
    "plans.most_ensemble": ("plan.ensemble", lambda c: c.plan.ensemble + 1),
    "plans.least_quorum": ("plan.quorum", lambda c: c.plan.quorum - 1),
    "plans.most_update_norm": ("plan.max_update_norm", lambda c: c.plan.max_update_norm * 2),
    "privacy.unit": ("plan.privacy.unit", lambda c: None if c.plan.privacy.unit == "none" else "none"),
    "privacy.max_epsilon": ("plan.privacy.epsilon", lambda c: None if c.plan.privacy.unit == "none" else 4.5),
    "privacy.max_delta": ("plan.privacy.delta", lambda c: None if c.plan.privacy.unit == "none" else 2e-5),
    "privacy.max_settle_epsilon": (
        "plan.contribution.settle_epsilon", lambda c: 1.5 if c.plan.security.mode in ("trigram", "ckks") else None,
    ),
    "privacy.max_settle_delta": (
        "plan.contribution.settle_delta", lambda c: 1e-4 if c.plan.security.mode in ("trigram", "ckks") else None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("config", PLANS)
def test_a_draft_accepts_its_plan_and_refuses_every_single_weakening_of_it(config: ConsortiumConfig, tmp_path: Path) -> None:
    policy = drafted(config, tmp_path)
    assert clauses(policy, config) == []
    for clause, (setting, weaken) in WEAKER.items():
        value = weaken(config)
        if value is not None:
            weaker = changed(config, setting, value)
            assert weaker != config
            refusals = policy.violations(weaker)
            assert clause in [r.clause for r in refusals], clause
            named = next(r for r in refusals if r.clause == clause)
            assert named.what.startswith(f"{clause}: ")
            assert clause in named.fix


def test_every_clause_has_a_weakening_among_the_plans_above() -> None:
    every = {"consortium"} | {f"plans.{k}" for k in Plans.model_fields} | {f"privacy.{k}" for k in PrivacyFloor.model_fields}
    assert set(WEAKER) == every
    configs: list[Any] = [p.values[0] for p in PLANS]
    for clause, (_, weaken) in WEAKER.items():
        if clause != "plans.simulated":  # all plans above are simulated; the next test has the others
            assert any(weaken(c) is not None for c in configs), clause


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: str(f.relative_to(ROOT / "examples")))
def test_a_real_consortium_cannot_become_a_simulated_one(file: Path, tmp_path: Path) -> None:
    real = changed(load_consortium(file), "simulated", False)
    assert clauses(drafted(real, tmp_path), changed(real, "simulated", True)) == ["plans.simulated"]


def test_a_plan_that_asks_for_less_is_accepted(tmp_path: Path) -> None:
    policy = drafted(TRIGRAM, tmp_path)
    less = TRIGRAM
    for setting, value in {
        "plan.rounds": 1, "plan.local.steps": 1, "plan.local.batch_size": 500, "plan.ensemble": 1, "plan.quorum": 7,
        "plan.max_update_norm": 1.0, "plan.rule.hostile": 2, "plan.security.canary_rate": 0.5, "plan.deduplicate": False,
        "plan.security.round_scores": False, "simulated": False, "plan.contribution.settle_epsilon": 0.1,
        "members": TRIGRAM.model_dump(mode="json")["members"][:6],
    }.items():  # fmt: skip
        less = changed(less, setting, value)
        assert clauses(policy, less) == []
    assert clauses(drafted(PRIVATE, tmp_path), changed(PRIVATE, "plan.privacy.epsilon", 0.5)) == []


def test_steps_of_the_longest_round_count(tmp_path: Path) -> None:
    policy = drafted(grove(), tmp_path)  # 6 steps
    assert clauses(policy, grove(schedule={"final_steps_factor": 0.5})) == []
    assert clauses(policy, grove(schedule={"final_steps_factor": 2.0})) == ["plans.most_steps"]


# settings that no clause judges, and why a site need not mind; anything new has to be put here or be judged
FREE = {
    "title", "description", "task.name", "task.metric", "task.unit",  # words
    "task.transform", "task.kind", "task.threshold", "task.law", "auxiliary", "model",  # what is computed from accepted fields
    "admission", "members.file", "members.organisation", "members.transport", "reference", "charter",  # judged elsewhere
    "terms",  # every member signs them with the charter
    "plan.average_last", "plan.server", "plan.site_weights", "plan.max_weight_share", "plan.seed",  # what the coordinator does
    "plan.interval_level", "plan.site_momentum", "plan.personalization", "plan.local", "plan.schedule",  # how it is trained
    "plan.deadline_s", "plan.isolation",  # how it is delivered
    "plan.rule.radius", "plan.compression", "plan.security", "plan.privacy", "plan.contribution",  # tuning of what is judged
}  # fmt: skip


def leaves(model: type[BaseModel], at: str = "") -> set[str]:
    out: set[str] = set()
    for key, field in model.model_fields.items():
        kinds = [field.annotation, *typing.get_args(field.annotation)]
        inner = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        out |= leaves(inner, f"{at}{key}.") if inner else {f"{at}{key}"}
    return out


def test_every_setting_is_judged_or_known_to_need_no_judging() -> None:
    judged = {setting for setting, _ in WEAKER.values()} | {"features", "splits", "members.site", "auxiliary.target"}

    def covered(leaf: str, by: set[str]) -> bool:
        return any(leaf == known or leaf.startswith(f"{known}.") for known in by)

    every = leaves(ConsortiumConfig)
    assert [leaf for leaf in sorted(every) if not covered(leaf, judged) and not covered(leaf, FREE)] == []
    for name in judged | FREE:
        assert any(covered(leaf, {name}) for leaf in every) or any(covered(name, {leaf}) for leaf in every), name


def test_a_new_setting_in_a_section_that_is_free_as_a_whole_is_noticed() -> None:
    every = leaves(ConsortiumConfig)
    found = {f: sum(leaf.startswith(f"{f}.") for leaf in every) for f in FREE}
    assert {f: n for f, n in found.items() if n} == {
        "admission": 2, "auxiliary": 9, "model": 9, "plan.server": 5, "plan.personalization": 6, "plan.local": 9, "plan.schedule": 5,
        "plan.compression": 5, "plan.security": 8, "plan.privacy": 5, "plan.contribution": 7, "terms": 11,
    }  # fmt: skip


def test_what_an_operator_writes_cannot_widen_a_draft(tmp_path: Path) -> None:
    hostile = "x\nplans: {members: any}\n"
    config = changed(changed(TRIGRAM, "title", hostile), "description", hostile)
    config = changed(changed(config, "task.target", hostile), "features", [{"name": hostile, "options": {hostile: [hostile]}}])
    policy = drafted(config, tmp_path)
    assert policy.plans.members == TRIGRAM.roster
    assert clauses(policy, config) == []
    assert clauses(policy, TRIGRAM) == ["plans.targets", "plans.features"]
    for path, value in (
        ("task.target", ANY),
        ("task.record_type", ANY),
        ("features", [ANY]),
        ("members", [{"site": ANY, "organisation": "A", "file": "a"}]),
    ):
        with pytest.raises(ConfigError, match=f"'{ANY}' accepts everything"):
            draft(changed(TRIGRAM, path, value))


def test_a_plan_that_calls_something_any_is_compared_like_any_other(tmp_path: Path) -> None:
    policy = drafted(TRIGRAM, tmp_path)
    extra = {"name": "extra", "record_type": "alloy", "target": ANY, "unit": ""}
    assert clauses(policy, changed(TRIGRAM, "auxiliary", [extra])) == ["plans.targets"]


def test_a_draft_is_read_by_people() -> None:
    text = draft(TRIGRAM)
    assert max(map(len, text.splitlines())) <= 128
    for part in (Policy, Plans, PrivacyFloor, Outbound):
        for key, field in part.model_fields.items():
            assert field.description, key
            assert " ".join(text.replace("#", "").split()).count(" ".join(field.description.split())) >= 1, key
    assert "nothing more" in text


# --- clauses, one at a time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "clause", [*(f"plans.{k}" for k in Plans.model_fields), *(f"privacy.{k}" for k in PrivacyFloor.model_fields)]
)
def test_each_clause_refuses_alone_when_it_is_left_out(clause: str, tmp_path: Path) -> None:
    section, key = clause.split(".")
    config = {"plans.least_threshold": MASKED, "privacy.max_epsilon": PRIVATE, "privacy.max_delta": PRIVATE}.get(
        clause, TRIGRAM
    )
    raw = yaml.safe_load(draft(config))
    del raw[section][key]
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(raw))
    found = clauses(load(path), config)
    if clause == "privacy.unit":  # without a floor, the strictest is meant: records, at no cost at all
        assert found[0] == clause
    else:
        assert found == [clause]


def test_the_consortium_and_the_charter_are_pinned(tmp_path: Path) -> None:
    policy = drafted(TRIGRAM, tmp_path, CHARTER)
    assert clauses(policy, TRIGRAM, CHARTER) == []
    assert clauses(policy, TRIGRAM, OTHER) == ["charter_sha256"]
    assert clauses(policy, TRIGRAM, "") == ["charter_sha256"]
    assert clauses(policy, changed(TRIGRAM, "name", "other"), CHARTER) == ["consortium"]
    assert clauses(drafted(TRIGRAM, tmp_path), TRIGRAM, OTHER) == []  # no digest: any charter
    assert clauses(drafted(grove(), tmp_path, CHARTER), grove()) == []  # a plan that encrypts nothing runs under none


def test_a_charter_is_pinned_as_it_was_read_on_the_telephone() -> None:
    groups = " ".join(CHARTER.upper()[i : i + 4] for i in range(0, 64, 4))
    assert Policy(charter_sha256=groups).charter_sha256 == CHARTER


def test_any_accepts_everything_in_a_list_and_only_there() -> None:
    lists = {k: ANY for k, f in Plans.model_fields.items() if f.default == ()}
    policy = Policy.model_validate({"plans": lists, "outbound": {"kinds": ANY}})
    found = {v.clause for c in (TRIGRAM, MASKED, CKKS, PRIVATE) for v in policy.violations(c)}
    assert not found & {*(f"plans.{k}" for k in lists), "outbound.kinds"}
    assert "plans.most_rounds" in found


def test_features_are_accepted_with_their_options_only() -> None:
    asked = [{"name": "conditions", "options": {"fields": ["temperature_k"]}}]
    config = changed(TRIGRAM, "features", asked)
    for accepted, fits in (
        (asked, True),
        ([*asked, "composition"], True),
        (["conditions"], False),
        (["composition"], False),
        (ANY, True),
    ):
        policy = Policy.model_validate({"plans": {"features": accepted}})
        assert ("plans.features" in {v.clause for v in policy.violations(config)}) is not fits
    assert Policy.model_validate({"plans": {"features": ["composition"]}}).plans.features == (FeatureSpec(name="composition"),)


def test_a_floor_of_privacy_asks_for_it_and_its_absence_does_not() -> None:
    def found(config: ConsortiumConfig, **floor: Any) -> list[str]:
        return [
            v.clause for v in Policy.model_validate({"privacy": floor}).violations(config) if v.clause.startswith("privacy")
        ]

    open_plan = grove()
    assert found(open_plan, unit="none") == []
    assert found(PRIVATE, unit="none") == []  # more than was asked for
    assert found(open_plan, unit="record", max_epsilon=8, max_delta=1e-5) == ["privacy.unit"]
    assert found(PRIVATE, unit="record", max_epsilon=4, max_delta=1e-5) == []
    assert found(PRIVATE, unit="site", max_epsilon=4, max_delta=1e-5) == ["privacy.unit"]
    assert found(PRIVATE, unit="record", max_epsilon=3.9, max_delta=1e-5) == ["privacy.max_epsilon"]
    assert found(PRIVATE, unit="record", max_epsilon=4, max_delta=1e-6) == ["privacy.max_delta"]
    assert found(PRIVATE) == ["privacy.max_epsilon", "privacy.max_delta"]


def test_scores_of_rounds_leave_with_every_open_update_and_are_judged_there() -> None:
    def judged(config: ConsortiumConfig) -> bool:
        return "plans.round_scores" in {v.clause for v in Policy().violations(config)}

    assert judged(grove())
    assert not judged(PRIVATE)
    assert not judged(MASKED)
    assert judged(changed(MASKED, "plan.security.round_scores", True))


@given(
    rounds=st.integers(1, 60), steps=st.integers(1, 60), quorum=st.integers(1, 7), batch=st.integers(2, 90),
    norm=st.floats(1e-3, 1e6), limits=st.tuples(*[st.integers(0, 60)] * 4, st.floats(0, 1e6)),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_number_is_accepted_exactly_within_its_limit(
    rounds: int, steps: int, quorum: int, batch: int, norm: float, limits: tuple[int, int, int, int, float]
) -> None:
    config = grove(rounds=rounds, local={"steps": steps, "batch_size": batch}, quorum=quorum, max_update_norm=norm)
    names = ("most_rounds", "most_steps", "least_quorum", "least_batch_size", "most_update_norm")
    policy = Policy.model_validate({"plans": dict(zip(names, limits, strict=True))})
    found = {v.clause.split(".")[-1] for v in policy.violations(config)}
    inside = (rounds <= limits[0], steps <= limits[1], quorum >= limits[2], batch >= limits[3], norm <= limits[4])
    assert [n not in found for n in names] == list(inside)


# --- what leaves -----------------------------------------------------------------------------------------------------


@given(kinds=st.sets(st.sampled_from(sorted(KINDS))), most=st.integers(0, 1000), size=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_an_object_leaves_exactly_if_kind_and_size_are_permitted(kinds: set[str], most: int, size: int) -> None:
    policy = Policy(outbound=Outbound(kinds=tuple(kinds), destinations=("coordinator",), most_bytes=most))
    for kind in KINDS:
        if kind in kinds and size <= most:
            policy.release(kind, size)
        else:
            with pytest.raises(PolicyRefused) as caught:
                policy.release(kind, size)
            assert caught.value.clause == ("outbound.kinds" if kind not in kinds else "outbound.most_bytes")


def test_each_clause_about_what_leaves_refuses_alone() -> None:
    whole = {"kinds": ["Update"], "destinations": ["coordinator"], "most_bytes": 10}
    Policy.model_validate({"outbound": whole}).release("Update", 10)
    for key in whole:
        without = {k: v for k, v in whole.items() if k != key}
        with pytest.raises(PolicyRefused) as caught:
            Policy.model_validate({"outbound": without}).release("Update", 10)
        assert caught.value.clause == f"outbound.{key}"
    with pytest.raises(PolicyRefused, match="outbound.destinations: nothing may go to registry, only to coordinator"):
        Policy.model_validate({"outbound": whole}).release("Update", 10, "registry")


@pytest.mark.parametrize("kind", ["Prepared", "SiteModel", "Answered", "any", "", "update"])
def test_what_is_no_answer_never_leaves_whatever_the_policy_says(kind: str) -> None:
    policy = Policy(outbound=Outbound(kinds=(ANY,), destinations=(ANY,), most_bytes=10))
    policy.release("Update", 1, "anywhere")
    with pytest.raises(PolicyRefused, match="outbound.kinds"):
        policy.release(kind, 1)


def test_the_kinds_are_all_answers_of_a_site() -> None:
    answers = {kind.__name__ for kind in typing.get_args(domain.Answer)}
    assert set(KINDS) == answers - {"PublicMap"}  # that one is the reference party's


@pytest.mark.parametrize(
    ("config", "also"),
    [
        pytest.param(grove(rounds=1), set(), id="none"),
        pytest.param(grove(rounds=1, scaling="quantile"), set(), id="quantile"),
        pytest.param(grove(rounds=1, security={"mode": "trigram"}, compression={"name": "hadamard", "share": 0.5}, server={"name": "sgd"}), {"NeedModel"}, id="trigram"),
        pytest.param(grove(rounds=1, security={"mode": "masking", "threshold": 0.8}), set(), id="masking"),
        pytest.param(grove(rounds=1, security={"mode": "ckks"}), {"NeedModel"}, id="ckks"),
    ],
)  # fmt: skip
def test_a_draft_releases_all_that_a_run_asks_for_and_nothing_that_it_does_not(
    config: ConsortiumConfig, also: set[str], tmp_path: Path
) -> None:
    """``also``: what a site says only after it lost something."""
    policy = drafted(config, tmp_path)
    left: set[str] = set()

    def watched(handle: Handler) -> Handler:
        def answer(request: bytes) -> bytes:
            reply = handle(request)
            kind = type(wire.decode(reply, object)).__name__
            policy.release(kind, len(reply))
            left.add(kind)
            return reply

        return answer

    engine = InProcessEngine(consortium.handlers(config, tmp_path, dict.fromkeys(config.roster, watched)))
    coordinator = consortium.coordinator(config, tmp_path)
    for report in coordinator.run(engine):
        assert not report.rejections and not report.dropouts
    model, plan = coordinator.model(), Plan.of(config)
    baselines.own_models(engine, plan, model, config.roster, ["finetuned"])
    baselines.score(engine, plan, baselines.Arm("federated", model.weights, model.scaler), config.roster)
    also = also | {"Statements"}  # asked for when all is done, of sites with keys of their own
    assert left | also == set(kinds_asked(config)) == set(policy.outbound.kinds)


def test_a_settlement_is_agreed_to_by_hand(tmp_path: Path) -> None:
    policy = drafted(TRIGRAM, tmp_path)
    with pytest.raises(PolicyRefused, match="outbound.kinds"):
        policy.release("SealedMoments", 1)


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place", "hint"),
    [
        ("plan: {}", "plan: unknown key", "did you mean 'plans'?"),
        ("plans: {rule: [mean]}", "plans.rule: unknown key", "did you mean 'rules'?"),
        ("outbound: {most_byte: 3}", "outbound.most_byte: unknown key", "did you mean 'most_bytes'?"),
        ("privacy: {max_epsilom: 3}", "privacy.max_epsilom: unknown key", "did you mean 'max_epsilon'?"),
        ("plans: {rules: [trimed_mean]}", "plans.rules", "did you mean 'trimmed_mean'?"),
        ("plans: {security: [mask]}", "plans.security", "did you mean 'masking'?"),
        ("plans: {algorithms: [zzzz]}", "plans.algorithms", "use fedavg, fedprox, scaffold"),
        ("outbound: {kinds: [Updates]}", "outbound.kinds", "did you mean 'Update'?"),
        ("outbound: {kinds: [Prepared]}", "outbound.kinds", "there is no 'Prepared'"),
        ("plans: {rules: mean}", "plans.rules", "write a list of names, [mean], or the word any"),
        ("plans: {members: [any, rival]}", "plans.members", "stands alone"),
        ("plans: {features: [any, composition]}", "plans.features", "stands alone"),
        ("plans: {most_rounds: -1}", "plans.most_rounds", "greater than or equal to 0"),
        ("plans: {most_rounds: any}", "plans.most_rounds", "integer"),
        ("privacy: {max_epsilon: .inf}", "privacy.max_epsilon", "finite number"),
        ("privacy: {max_epsilon: .nan}", "privacy.max_epsilon", "finite number"),
        ("privacy: {unit: row}", "privacy.unit", "'record'"),
        ("charter_sha256: abc", "charter_sha256", "pattern"),
        ("plans: {splits: {sed: 3}}", "plans.splits.sed: unknown key", "did you mean 'seed'?"),
        ("plans: {rules: [mean]}\nplans: {}", "line 2", "key 'plans' is given twice"),
        ("[1, 2]", "policy.yaml", "expected a mapping"),
        ("plans: [", "policy.yaml", "not valid YAML"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_place(tmp_path: Path, text: str, place: str, hint: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(path) in caught.value.what
    assert place in caught.value.what
    assert hint in caught.value.what
    assert caught.value.fix


def test_a_missing_file_is_no_empty_policy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "policy.yaml")


def test_a_refusal_says_what_was_asked_and_what_is_accepted_and_travels(tmp_path: Path) -> None:
    policy = drafted(grove(), tmp_path)
    refusals = policy.violations(grove(rounds=9, rule={"name": "krum", "hostile": 1}))
    assert [(r.clause, r.what) for r in refusals] == [
        ("plans.rules", "plans.rules: the plan asks for krum (plan.rule.name); this site accepts mean"),
        ("plans.most_rounds", "plans.most_rounds: plan.rounds is 9; this site accepts at most 4"),
    ]
    again = pickle.loads(pickle.dumps(refusals[0]))
    assert (again.clause, again.what, again.fix, again.exit_code) == ("plans.rules", refusals[0].what, refusals[0].fix, 9)


def test_the_page_names_every_clause_and_its_example_loads(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "policy.md").read_text()
    table = {line.split("|")[1].strip().strip("`") for line in page.splitlines() if line.startswith("| `")}
    assert {f"plans.{k}" for k in Plans.model_fields} <= table
    assert {f"privacy.{k}" for k in PrivacyFloor.model_fields} <= table
    assert {f"outbound.{k}" for k in Outbound.model_fields} | {"consortium", "charter_sha256"} <= table
    assert set(KINDS) <= table
    (block,) = (b.split("```")[0] for b in page.split("```yaml\n")[1:])
    (tmp_path / "policy.yaml").write_text(block)
    policy = load(tmp_path / "policy.yaml")
    config = TRIGRAM
    for setting, value in {
        "name": policy.consortium, "simulated": False, "task.record_type": "solid_electrolyte", "task.target": "conductivity_s_cm",
        "features": ["composition", {"name": "conditions", "options": {"fields": ["temperature_k"]}}], "plan.scaling": "standard",
        "plan.local.batch_size": 64, "plan.security.round_scores": False,
        "members": [{"site": s, "organisation": s, "file": s} for s in policy.plans.members],
    }.items():  # fmt: skip
        config = changed(config, setting, value)
    Plan.of(config)
    assert clauses(policy, config) == []
    assert set(policy.outbound.kinds) == set(kinds_asked(config))
    quoted = page.split("```text\n")[1].split("```")[0].strip()
    assert quoted in {v.what for v in policy.violations(changed(config, "plan.rule.name", "mean"))}
