"""Laws of the round loop, shown on a consortium in memory."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
from consortium import SITES, config, coordinator, handlers, run, setup, table, worker

from fedmat import wire
from fedmat.config import ConsortiumConfig
from fedmat.domain import Attestation, Ranks, TrainRequest, Update
from fedmat.errors import FedmatError, PlanRefused, RoundFailed, SiteRefused, StateError
from fedmat.federation.engine import InProcessEngine
from fedmat.federation.plan import Plan
from fedmat.federation.scaling import rank_counts, with_scores

ALGORITHMS = {
    "fedavg": {},
    "fedprox": {"algorithm": "fedprox", "local": {"steps": 6, "batch_size": 16, "lr": 3e-3, "mu": 0.1}},
    "scaffold": {"algorithm": "scaffold", "local": {"steps": 6, "batch_size": 16, "lr": 0.02, "optimizer": "sgd"}},
    "fedavgm": {"server": {"name": "momentum", "lr": 0.5}},
    "fedadam": {"server": {"name": "adam", "lr": 0.02}},
    "rows": {"site_weights": "rows", "max_weight_share": 0.5},
    "ensemble": {"ensemble": 3, "average_last": 2, "scaling": "quantile"},
    "fedrep": {"ensemble": 2, "personalization": {"finetune_steps": 8, "private": ["head"], "head_steps": 2}},
    "norm": {"personalization": {"finetune_steps": 8, "private": ["norm"]}},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_same_plan_and_data_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    first = run(config(**ALGORITHMS[name]), tmp_path / "a")[1]
    second = run(config(**ALGORITHMS[name]), tmp_path / "b")[1]
    assert wire.encode(first) == wire.encode(second)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_training_lowers_the_validation_error(name: str, tmp_path: Path) -> None:
    reports, _ = run(config(**{**ALGORITHMS[name], "rounds": 25}), tmp_path)
    assert reports[-1].validation["mae"] < 0.9 * reports[0].validation["mae"]


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_killed_after_any_round_resumes_to_the_same_bytes(name: str, stop: int, tmp_path: Path) -> None:
    settings = config(**ALGORITHMS[name])
    whole = run(settings, tmp_path / "whole")[1]
    run(settings, tmp_path / "cut", stop=stop)
    reports, resumed = run(settings, tmp_path / "cut")
    assert [r.round for r in reports] == list(range(stop, settings.plan.rounds))
    assert wire.encode(resumed) == wire.encode(whole)


def test_a_crash_between_report_and_checkpoint_repeats_the_round_once(tmp_path: Path) -> None:
    settings = config(**ALGORITHMS["scaffold"])
    whole = run(settings, tmp_path / "whole")[1]
    lead = coordinator(settings, tmp_path / "cut")
    engine = InProcessEngine(handlers(settings, tmp_path / "cut"))
    rounds = lead.run(engine)
    next(rounds)
    before = (tmp_path / "cut/run/checkpoint.safetensors").read_bytes()
    next(rounds)
    rounds.close()
    (tmp_path / "cut/run/checkpoint.safetensors").write_bytes(before)  # as if killed before the second checkpoint
    with (tmp_path / "cut/run/rounds.jsonl").open("a") as handle:
        handle.write('{"half')
    _, resumed = run(settings, tmp_path / "cut")
    assert wire.encode(resumed) == wire.encode(whole)
    assert len((tmp_path / "cut/run/rounds.jsonl").read_text().splitlines()) == settings.plan.rounds


def test_the_order_in_which_members_are_listed_does_not_matter(tmp_path: Path) -> None:
    forward, backward = config(SITES), config(tuple(reversed(SITES)))
    assert wire.encode(run(forward, tmp_path / "a")[1]) == wire.encode(run(backward, tmp_path / "b")[1])


def _edit(**changes: object):  # type: ignore[no-untyped-def]
    def wrap(handle):  # type: ignore[no-untyped-def]
        def handler(data: bytes) -> bytes:
            reply = handle(data)
            try:
                update = wire.decode(reply, Update)
            except FedmatError:
                return reply
            values = {k: v(update) if callable(v) else v for k, v in changes.items()}
            return wire.encode(dataclasses.replace(update, **values))

        return handler

    return wrap


def _scaled(factor: float):  # type: ignore[no-untyped-def]
    return lambda u: {k: (v * np.float32(factor)).astype(np.float32) for k, v in u.delta.items()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"delta": _scaled(float("nan"))}, "non_finite"),
        ({"delta": _scaled(1e6)}, "too_large"),
        ({"delta": lambda u: {k: v[..., :1] for k, v in u.delta.items()}}, "wrong_shape"),
        ({"delta": lambda u: {k: v.astype(np.float64) for k, v in u.delta.items()}}, "malformed"),
        ({"control_delta": lambda u: u.delta}, "wrong_shape"),
        ({"round": 0}, "wrong_round"),
        ({"request_sha256": "0" * 64}, "wrong_round"),
        ({"plan_sha256": "0" * 64}, "wrong_plan"),
        ({"site": "birch"}, "wrong_site"),
    ],
)
def test_a_bad_update_is_left_out_with_its_reason_and_the_round_goes_on(
    change: dict[str, object], reason: str, tmp_path: Path
) -> None:
    reports, model = run(config(), tmp_path, {"ash": _edit(**change)})
    last = reports[-1]
    assert [(r.site, r.reason) for r in last.rejections] == [("ash", reason)]
    assert last.accepted == ("birch", "cedar", "dogwood")
    assert sum(last.shares.values()) == pytest.approx(1.0)
    assert all(np.isfinite(v).all() for v in model.weights.values())


def _answers_nonsense(handle):  # type: ignore[no-untyped-def]
    return lambda data: b"nonsense" if b"TrainRequest" in data else handle(data)


def _crashes(handle):  # type: ignore[no-untyped-def]
    def handler(data: bytes) -> bytes:
        if b"TrainRequest" in data:
            raise ValueError("the cell holds 4711.0815")
        return handle(data)

    return handler


def _slow(handle):  # type: ignore[no-untyped-def]
    def handler(data: bytes) -> bytes:
        if b"TrainRequest" in data:
            time.sleep(0.3)
        return handle(data)

    return handler


def test_a_crashed_site_is_a_dropout_whose_text_holds_no_value(tmp_path: Path) -> None:
    reports, _ = run(config(), tmp_path, {"cedar": _crashes})
    assert [(d.site, d.reason, d.detail) for d in reports[0].dropouts] == [("cedar", "crashed", "ValueError")]
    assert "4711" not in (tmp_path / "run/rounds.jsonl").read_text()


def test_a_late_site_is_a_dropout(tmp_path: Path) -> None:
    reports, _ = run(config(deadline_s=0.25), tmp_path, {"cedar": _slow})
    assert [(d.site, d.reason) for d in reports[0].dropouts] == [("cedar", "late")]


def test_nonsense_on_the_wire_is_a_rejection(tmp_path: Path) -> None:
    reports, _ = run(config(), tmp_path, {"cedar": _answers_nonsense})
    assert [(d.site, d.reason) for d in reports[0].rejections] == [("cedar", "malformed")]


def test_below_the_quorum_the_round_fails_names_everyone_and_keeps_the_state(tmp_path: Path) -> None:
    settings = config(quorum=3)
    with pytest.raises(RoundFailed, match="ash crashed.*cedar malformed"):
        run(settings, tmp_path, {"ash": _crashes, "cedar": _answers_nonsense})
    assert wire.encode(run(settings, tmp_path)[1]) == wire.encode(run(settings, tmp_path / "whole")[1])


def test_bytes_are_counted_both_ways_for_every_site(tmp_path: Path) -> None:
    reports, _ = run(config(), tmp_path)
    assert all(reports[0].bytes_down[s] > 400 and reports[0].bytes_up[s] > 400 for s in SITES)


def test_no_site_counts_for_more_rows_than_it_attested(tmp_path: Path) -> None:
    def inflate(handle):  # type: ignore[no-untyped-def]
        def handler(data: bytes) -> bytes:
            reply = handle(data)
            if b"Statistics" not in reply:
                return reply
            from fedmat.domain import Statistics

            sums = wire.decode(reply, Statistics)
            return wire.encode(dataclasses.replace(sums, target=sums.target * 1e6, count=sums.count * 1e6))

        return handler

    run(config(), tmp_path, {"ash": inflate})
    setup = (tmp_path / "run/attestations.json").read_text()
    scaler = wire.decode(
        (tmp_path / "run/checkpoint.safetensors").read_bytes(), __import__("fedmat.domain").domain.Checkpoint
    ).scaler
    without = np.concatenate([table(s).part(0).y for s in SITES[1:]])
    assert scaler.y_mean[0] == pytest.approx(without.mean()), setup


def test_a_constant_feature_is_switched_off(tmp_path: Path) -> None:
    _, model = run(config(), tmp_path)
    assert model.scaler.active.tolist() == [1.0, 1.0, 1.0, 0.0]


def test_federated_scaling_equals_scaling_of_the_pooled_rows(tmp_path: Path) -> None:
    _, model = run(config(), tmp_path)
    pooled = np.concatenate([table(s).part(0).x for s in SITES])
    assert model.scaler.mean[:3] == pytest.approx(pooled.mean(0)[:3])
    assert model.scaler.scale[:3] == pytest.approx(pooled.std(0)[:3])


def test_quantile_scaling_equals_that_of_the_pooled_rows_and_gives_normal_scores(tmp_path: Path) -> None:
    _, model = run(config(scaling="quantile"), tmp_path)
    pooled = np.concatenate([table(s).part(0).x for s in SITES])
    expected = with_scores(model.scaler, [rank_counts(model.scaler, pooled)])
    assert (model.scaler.scores == expected.scores).all()
    z = model.scaler.features(pooled)
    assert np.abs(z.mean(axis=0)).max() < 0.05 and np.abs(z.std(axis=0) - 1.0).max() < 0.05
    order = np.argsort(pooled[:, 0])
    assert (np.diff(z[order, 0]) >= 0).all(), "scores keep the order of values"


@pytest.mark.parametrize(
    "change",
    [lambda r: r.counts * 2.0, lambda r: -r.counts, lambda r: r.counts[:, :-1], lambda r: np.full_like(r.counts, np.nan)],
    ids=["more than attested", "negative", "another grid", "NaN"],
)
def test_counts_of_features_that_do_not_fit_are_left_out_with_the_reason(change, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    def wrap(handle):  # type: ignore[no-untyped-def]
        def handler(data: bytes) -> bytes:
            reply = handle(data)
            if b"RanksRequest" not in data:
                return reply
            ranks = wire.decode(reply, Ranks)
            return wire.encode(dataclasses.replace(ranks, counts=change(ranks)))

        return handler

    _, model = run(config(scaling="quantile", rounds=1), tmp_path, {"ash": wrap})
    (failure,) = setup(tmp_path)["failures"]
    assert failure["site"] == "ash" and "counts that do not fit" in failure["detail"]
    others = [rank_counts(model.scaler, table(s).part(0).x) for s in SITES[1:]]
    assert (model.scaler.scores == with_scores(model.scaler, others).scores).all()


def test_sites_with_different_featurizers_stop_the_run(tmp_path: Path) -> None:
    def other(handle):  # type: ignore[no-untyped-def]
        def handler(data: bytes) -> bytes:
            reply = handle(data)
            if b"AttestRequest" in data:
                return wire.encode(dataclasses.replace(wire.decode(reply, Attestation), features_sha256="0" * 64))
            return reply

        return handler

    with pytest.raises(SiteRefused, match="different features"):
        run(config(), tmp_path, {"ash": other})


def test_data_that_changed_since_the_run_began_is_noticed_on_resume(tmp_path: Path) -> None:
    settings = config()
    rounds = coordinator(settings, tmp_path).run(InProcessEngine(handlers(settings, tmp_path)))
    next(rounds)
    rounds.close()
    changed = handlers(settings, tmp_path) | {"ash": worker("ash", settings, tmp_path, table("ash", seed=4)).handle}
    with pytest.raises(StateError, match="ash attests other data"):
        next(coordinator(settings, tmp_path).run(InProcessEngine(changed)))


def test_a_site_away_at_resume_is_a_dropout_not_a_failure(tmp_path: Path) -> None:
    settings = config()
    rounds = coordinator(settings, tmp_path).run(InProcessEngine(handlers(settings, tmp_path)))
    next(rounds)
    rounds.close()
    there = {k: v for k, v in handlers(settings, tmp_path).items() if k != "ash"}
    report = next(coordinator(settings, tmp_path).run(InProcessEngine(there)))
    assert [(d.site, d.reason) for d in report.dropouts] == [("ash", "unreachable")]


def test_a_damaged_checkpoint_is_named_and_not_used(tmp_path: Path) -> None:
    settings = config()
    run(settings, tmp_path)
    path = tmp_path / "run/checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StateError, match=r"checkpoint\.safetensors: damaged"):
        next(coordinator(settings, tmp_path).run(InProcessEngine(handlers(settings, tmp_path))))


def test_another_plans_checkpoint_is_refused(tmp_path: Path) -> None:
    run(config(), tmp_path)
    with pytest.raises(StateError, match="another plan"):
        next(coordinator(config(seed=6), tmp_path).run(InProcessEngine(handlers(config(seed=6), tmp_path))))


def test_a_site_refuses_a_request_of_another_plan(tmp_path: Path) -> None:
    site = worker("ash", config(), tmp_path)
    other = Plan.of(config(seed=99)).sha256
    with pytest.raises(PlanRefused, match="another plan"):
        site.handle(wire.encode(dataclasses.replace(_attest(), plan_sha256=other)))


def _attest():  # type: ignore[no-untyped-def]
    from fedmat.domain import AttestRequest

    return AttestRequest("")


@pytest.mark.parametrize(
    "plan",
    [
        {"quorum": 5},
        {"algorithm": "fedprox"},
        {"local": {"mu": 0.5}},
        {"algorithm": "scaffold"},
        {"algorithm": "scaffold", "local": {"optimizer": "sgd"}, "site_weights": "rows"},
        {"site_weights": "rows", "max_weight_share": 0.3, "quorum": 2},
        {"schedule": {"warmup_rounds": 4}},
    ],
)
def test_an_impossible_plan_is_refused_before_anything_is_sent(plan: dict[str, object]) -> None:
    with pytest.raises(PlanRefused) as error:
        Plan.of(config(**plan))
    assert "plan." in error.value.what
    assert error.value.fix


def test_delivery_settings_do_not_change_the_plan() -> None:
    assert Plan.of(config(isolation="process", deadline_s=1.0)).sha256 == Plan.of(config()).sha256
    assert Plan.of(config(seed=6)).sha256 != Plan.of(config()).sha256


def test_scaffold_control_variates_stay_a_mean_of_the_sites(tmp_path: Path) -> None:
    """With full participation the coordinator's control variate is the plain mean of the sites' (SCAFFOLD, eq. 5)."""
    settings: ConsortiumConfig = config(**ALGORITHMS["scaffold"])
    run(settings, tmp_path)
    from fedmat.domain import Checkpoint

    state = wire.decode((tmp_path / "run/checkpoint.safetensors").read_bytes(), Checkpoint)
    folders = [tmp_path / "sites" / s / "state" / state.plan_sha256[:16] for s in SITES]
    own = [wire.decode((f / "control-00003.safetensors").read_bytes(), Update).delta for f in folders]
    for key, value in state.control.items():
        assert value == pytest.approx(np.mean([o[key] for o in own], axis=0), abs=1e-5)


def test_a_train_request_and_an_update_are_all_that_carry_weights() -> None:
    assert {f.name for f in dataclasses.fields(Update)} == {
        "site", "round", "plan_sha256", "request_sha256", "delta", "control_delta", "train_loss", "validation",
    }  # fmt: skip
    assert "weights" in {f.name for f in dataclasses.fields(TrainRequest)}
