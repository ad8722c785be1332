"""Ground truth by retraining: what is trained once, who is judged by what, what riders and copies are, how estimates are compared."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import consortium
import numpy as np
import pytest

from fedmat import coalitions, contribution, wire
from fedmat import keys as keyring
from fedmat import weights as wts
from fedmat.coalitions import Case, Member
from fedmat.domain import GlobalModel, MomentsRequest
from fedmat.errors import PlanRefused
from fedmat.features.table import TEST, TRAIN, VALIDATION
from fedmat.federation import settlement
from fedmat.federation.engine import InProcessEngine
from fedmat.federation.holding import Identity
from fedmat.federation.plan import Plan
from fedmat.federation.site import MatchingKeys, SiteWorker
from fedmat.models.network import Architecture

THREE, FIVE = consortium.SEVEN[:3], consortium.SEVEN[:5]
SEED = 11


def case_of(sites: tuple[str, ...] = THREE, **plan: Any) -> Case:
    given: dict[str, Any] = {"rounds": 2, "local": {"steps": 4, "batch_size": 16, "lr": 1e-2}, **plan}
    settings = consortium.config(sites, **given)
    tables = {s: replace(consortium.table(s), sha256=f"table of {s}") for s in sites}
    return coalitions.base("grove", Plan.of(settings), tables)


CASE = case_of()


def lone(rider: Member, case: Case = CASE) -> Case:
    return replace(case, members={**case.members, "rider": rider})


def weights_of(model: GlobalModel) -> np.ndarray:
    return np.asarray(wts.flatten(model.weights))


def trained(case: Case, sites: tuple[str, ...], folder: Path) -> GlobalModel:
    plan = coalitions._seated(case.plan, sites, SEED)
    with InProcessEngine(coalitions._workers(plan, case, folder)) as engine:
        return coalitions._lead(plan, engine, folder)


# --- truth ---------------------------------------------------------------------------------------------------------------


def test_every_coalition_is_trained_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worths, spent = coalitions.worth(CASE, SEED, tmp_path, "mae")
    assert len(list((tmp_path / "federations").glob("*.json"))) == 7 and spent > 0
    assert worths[0] == 0.0
    assert not list((tmp_path / "work").iterdir())

    def broken(*_: object) -> GlobalModel:
        raise AssertionError("trained again")

    monkeypatch.setattr(coalitions, "_lead", broken)
    assert coalitions.worth(CASE, SEED, tmp_path, "mae")[0].tolist() == worths.tolist()
    for other in (replace(CASE, plan=coalitions.shortened(CASE.plan, 3, 1)), coalitions.shuffled(CASE, "birch")):
        with pytest.raises(AssertionError, match="trained again"):
            coalitions.worth(other, SEED, tmp_path, "mae")
    with pytest.raises(AssertionError, match="trained again"):
        coalitions.worth(CASE, SEED + 1, tmp_path, "mae")


def test_coalitions_that_two_cases_have_in_common_are_trained_once(tmp_path: Path) -> None:
    coalitions.worth(CASE, SEED, tmp_path, "mae")
    coalitions.worth(coalitions.shuffled(CASE, "birch"), SEED, tmp_path, "mae")
    assert len(list((tmp_path / "federations").glob("*.json"))) == 7 + 4  # the four that birch is in


def test_worth_is_the_fall_of_the_error_on_everyones_frozen_rows(tmp_path: Path) -> None:
    """By hand for one coalition: the model of cedar alone, on all three sites' test rows, against one number for all."""
    model = trained(CASE, ("cedar",), tmp_path / "by-hand")
    architecture = Architecture.of(CASE.plan.model, CASE.plan.tasks, CASE.plan.settings)
    errors, nobody = [], []
    for site in THREE:
        test = consortium.table(site).part(TEST)
        errors.append(architecture.predict(model.weights, model.scaler, test.names, test.x, None)[:, 0] - test.y[:, 0])
        nobody.append(CASE.nobody - test.y[:, 0])
    e, base = np.concatenate(errors), np.concatenate(nobody)
    assert coalitions.worth(CASE, SEED, tmp_path, "mae")[0][4] == pytest.approx(np.abs(base).mean() - np.abs(e).mean())
    assert coalitions.worth(CASE, SEED, tmp_path, "mse")[0][4] == pytest.approx(np.mean(base**2) - np.mean(e**2))
    assert pytest.approx(np.concatenate([consortium.table(s).part(TRAIN).y[:, 0] for s in THREE]).mean()) == CASE.nobody


def test_what_a_member_does_changes_no_test_row() -> None:
    for other in (
        coalitions.shuffled(CASE, "ash"), coalitions.ridden(CASE, "rider-noise", 70), coalitions.twinned(CASE, "ash"),
        coalitions.divided(CASE, "ash"),
    ):  # fmt: skip
        assert other.test == CASE.test and other.nobody == CASE.nobody and other.reference is CASE.reference


def test_leave_one_out_by_hand() -> None:
    assert coalitions.left_out(np.array([0.0, 1.0, 2.0, 5.0])) == pytest.approx([3.0, 4.0])


# --- members -------------------------------------------------------------------------------------------------------------


def test_labels_are_dealt_out_anew_within_a_split() -> None:
    before, after = CASE.members["ash"].rows, coalitions.shuffled(CASE, "ash").members["ash"].rows
    for split in (TRAIN, VALIDATION):
        one, two = before.part(split).y[:, 0], after.part(split).y[:, 0]
        assert sorted(one) == sorted(two) and not np.array_equal(one, two)
    assert np.array_equal(before.x, after.x)


def test_a_riders_rows_have_the_sums_of_real_ones_and_no_law() -> None:
    made = coalitions.ridden(CASE, "rider-noise", 700).members["rider"].rows
    real = np.concatenate([consortium.table(s).part(TRAIN).y[:, 0] for s in THREE])
    assert set(made.y[:, 0]) <= set(real)
    assert abs(np.corrcoef(made.x[:, 0], made.y[:, 0])[0, 1]) < 0.12
    assert (made.split == VALIDATION).sum() == 100 and not (made.split == TEST).any()


def test_a_zero_rider_alone_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    case = coalitions.ridden(CASE, "rider-zero", 70)
    model = trained(case, ("rider",), tmp_path)
    plan = coalitions._seated(case.plan, ("rider",), SEED)
    start = Architecture.of(plan.model, plan.tasks, plan.settings).initial_weights(int(model.scaler.active.sum()), SEED)
    assert np.array_equal(weights_of(model), wts.flatten(start))


def test_a_rider_that_repeats_the_last_step_takes_it_half_again(tmp_path: Path) -> None:
    """Two rounds of two members, equal weights: in the second the rider sends the first one's step. With zeros instead, that is missing."""
    rows = CASE.members["ash"].rows  # so that the scaler is the same for both
    found: list[list[np.ndarray]] = []
    conducts: tuple[coalitions.Conduct, ...] = ("zero", "again")
    for conduct in conducts:
        case = lone(Member(rows, conduct))
        plan = coalitions._seated(coalitions.shortened(case.plan, 1, 0), ("ash", "rider"), SEED)
        two = coalitions._seated(case.plan, ("ash", "rider"), SEED)
        found.append([])
        for p, name in ((plan, "one"), (two, "two")):
            folder = tmp_path / conduct / name
            with InProcessEngine(coalitions._workers(p, case, folder)) as engine:
                found[-1].append(weights_of(coalitions._lead(p, engine, folder)))
    (zero_one, zero_two), (again_one, again_two) = found
    assert np.array_equal(zero_one, again_one)  # nothing to repeat yet
    assert not np.array_equal(zero_two, again_two)


def test_a_twin_has_the_same_rows_and_no_test() -> None:
    twin = coalitions.twinned(CASE, "birch").members["twin"].rows
    own = CASE.members["birch"].rows.part(TRAIN, VALIDATION)
    assert np.array_equal(twin.x, own.x) and np.array_equal(twin.y, own.y)


def test_a_divided_site_keeps_its_rows_and_no_material_is_divided() -> None:
    case = coalitions.divided(CASE, "birch")
    halves = [case.members[f"birch-{n}"].rows for n in "ab"]
    assert case.sites == ("ash", "birch-a", "birch-b", "cedar")
    assert not set(halves[0].component) & set(halves[1].component)
    assert sum(len(h) for h in halves) == len(CASE.members["birch"].rows)


# --- estimates -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path, coalitions.Released]:
    case, folder = case_of(FIVE, rounds=2), tmp_path_factory.mktemp("released")
    return case, folder, coalitions.release(case, SEED, folder)


def test_a_release_is_trained_once_and_its_rounds_say_who_contributed(
    released: tuple[Case, Path, coalitions.Released], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, folder, found = released
    assert len(found.rounds) == 2 and all(set(r) == set(FIVE) for r in found.rounds)
    assert coalitions.per_round(case, found) == pytest.approx([sum(r[s] for r in found.rounds) for s in FIVE])
    monkeypatch.setattr(coalitions, "_lead", None)
    again = coalitions.release(case, SEED, folder)
    assert np.array_equal(weights_of(again.model), weights_of(found.model)) and again.rounds == found.rounds
    with pytest.raises(TypeError):
        coalitions.release(coalitions.by_validation_rows(case), SEED, folder)  # other reference rows are another measurement


def test_so_few_encrypt_nothing(tmp_path: Path) -> None:
    with pytest.raises(PlanRefused, match="3 members"):
        coalitions.release(CASE, SEED, tmp_path)


def test_features_and_targets_are_those_a_site_makes_for_a_settlement(
    released: tuple[Case, Path, coalitions.Released], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, _, found = released
    settings = consortium.config(FIVE, rounds=2)
    charter, plan = consortium.charter(settings.model_copy(update={"plan": case.plan.settings.model_copy(
        update={"security": coalitions.encrypted(case, SEED).settings.security})}), tmp_path), coalitions.encrypted(case, SEED)  # fmt: skip
    assert charter is not None
    identity = Identity(keyring.load(consortium.key_folder(tmp_path, "ash"), "ash"), charter, b"secret")
    worker = SiteWorker(
        "ash", plan, case.members["ash"].rows, {"sha256": "s", "rejected": {}}, tmp_path / "ash", identity=identity
    )  # fmt: skip
    seen: list[Any] = []
    protected = settlement.protected

    def caught(p: Plan, phi: np.ndarray, y: np.ndarray) -> contribution.Moments:
        seen.append((phi, y))
        return protected(p, phi, y)

    monkeypatch.setattr(settlement, "protected", caught)
    digest = wire.weights_digest(found.model.weights, found.model.scaler)
    worker.handle(
        wire.encode(MomentsRequest(plan.sha256, "run", digest, found.model.weights, found.model.scaler, consortium.TODAY))
    )
    for (phi, y), split in zip(seen, (TRAIN, VALIDATION), strict=True):
        ours = coalitions.moments_of(plan, found.model, case.members["ash"].rows.part(split))
        assert np.array_equal(ours[0], phi) and np.array_equal(ours[1], y)


def test_settlements_differ_by_their_noise_and_by_nothing_else(released: tuple[Case, Path, coalitions.Released]) -> None:
    case, _, found = released
    plain = coalitions.settled(case, SEED, found.model, epsilon=None)
    assert np.array_equal(plain[0], coalitions.settled(case, SEED, found.model, epsilon=None, draw=1)[0])
    noisy = [coalitions.settled(case, SEED, found.model, epsilon=8.0, draw=d)[0] for d in (0, 0, 1)]
    assert np.array_equal(noisy[0], noisy[1]) and not np.array_equal(noisy[0], noisy[2])
    near = coalitions.settled(case, SEED, found.model, epsilon=1e4)[0]
    assert near == pytest.approx(plain[0], abs=0.01)
    bare = coalitions.settled(case, SEED, found.model, epsilon=None, bare=True)[0]
    assert bare.sum() > plain[0].sum()  # a smaller ridge fits more


def test_two_sites_as_one_player_get_one_share_by_rows(released: tuple[Case, Path, coalitions.Released]) -> None:
    case, _, found = released
    owners = [["ash", "birch"], ["cedar"], ["dogwood"], ["elm"]]
    shares = coalitions.settled(case, SEED, found.model, epsilon=None, owners=owners)[0]
    counts = coalitions.rows(case)
    assert shares[0] / counts[0] == pytest.approx(shares[1] / counts[1])


# --- comparison ----------------------------------------------------------------------------------------------------------


def test_agreement_by_hand() -> None:
    same = coalitions.agreement(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0]))
    assert same == pytest.approx({"spearman": 1.0, "pearson": 1.0, "l1": 0.0, "mean_error": 0.0, "credits": 0.0}, abs=1e-12)
    turned = coalitions.agreement(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    assert turned["l1"] == 2.0 and turned["credits"] == 1000.0 and turned["pearson"] == pytest.approx(-1.0)
    none = coalitions.agreement(np.array([-1.0, -2.0]), np.array([0.0, 1.0]))
    assert math.isnan(none["credits"])
    assert math.isnan(coalitions.agreement(np.array([1.0, 1.0]), np.array([0.0, 1.0]))["spearman"])


def test_an_interval_of_seeds_is_their_range() -> None:
    assert coalitions.spread([1.0, 2.0, 6.0, float("nan")]) == {"mean": 3.0, "low": 1.0, "high": 6.0}
    assert math.isnan(coalitions.spread([])["mean"])


def test_a_summary_has_truth_estimates_and_their_agreement(released: tuple[Case, Path, coalitions.Released]) -> None:
    case, folder, _ = released
    found = coalitions.summary(case, (SEED,), folder)
    assert found["coalitions"] == 31
    truth = contribution.shapley(coalitions.worth(case, SEED, folder, "mse")[0])
    assert [found["truth"]["mse"][s]["mean"] for s in FIVE] == pytest.approx(truth.tolist())
    assert sum(v["mean"] for v in found["truth"]["mse"].values()) == pytest.approx(found["gain"]["mse"]["mean"])
    for name in (coalitions.LOOK, coalitions.ROWS, coalitions.LEFT_OUT, *coalitions.SETTLED):
        told = found["estimates"][name]
        assert -1 <= told["mse"]["pearson"]["mean"] <= 1 or math.isnan(told["mse"]["pearson"]["mean"])
        assert 0 <= told["mae"]["l1"]["mean"] <= 2
    assert found["estimates"][coalitions.LEFT_OUT]["shares"]["ash"]["mean"] == pytest.approx(
        coalitions._scaled(coalitions.left_out(coalitions.worth(case, SEED, folder, "mse")[0]))[0]
    )


def test_of_a_site_and_its_copy_the_first_in_the_alphabet_keeps_the_rows() -> None:
    """Keys do not say who measured first; the copy under an earlier name takes it all, and the other is left with nothing."""
    learning = np.array([1, 2, 3, 4], dtype=np.uint64)
    keys = {"measurement": learning, "material": learning + 10, "source": np.zeros(4, np.uint64)}
    other = {k: v + np.uint64(100) for k, v in keys.items()}
    tested = np.zeros(4, dtype=np.bool_)
    found = coalitions.rows_left(
        {"ash": MatchingKeys("f", keys), "birch": MatchingKeys("f", other)}, {"ash": tested, "birch": tested}, "ash"
    )
    assert found == {"a-twin": {"ash": 0, "a-twin": 4}, "z-twin": {"ash": 4, "z-twin": 0}}
