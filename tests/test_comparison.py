"""What a benchmark's numbers bear out, on cases that can be done by hand."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat import comparison
from fedmat.comparison import MET, MISSED, UNKNOWN


def score(mae: float, n: int = 10, draws: list[float] | None = None, **more: Any) -> dict[str, Any]:
    return {"n": n, "groups": 5, "mae": mae, "rmse": mae, **({"draws": draws} if draws else {}), **more}


def arm(**models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """An arm's result: model name -> site -> score; ``local_x`` stands for ``local:x``."""
    named = {k.replace("local_", "local:"): v for k, v in models.items()}
    return {
        "scores": named,
        "auxiliary": {},
        "mixture": {},
        "validation": [],
        "bytes_per_round": 100,
        "seconds": 1.0,
        "sites": {},
    }


def around(mae: float, spread: float = 0.1, count: int = 40) -> list[float]:
    return list(mae + spread * np.linspace(-1.0, 1.0, count))


HARD = [1.0, 3.0] * 20  # resamples in which all arms err more at the same time


@pytest.fixture
def seeds() -> dict[int, dict[str, Any]]:
    """Two seeds, two sites of 10 and 30 rows; pooled errs by 1, the default by 1.1, a site alone by 2."""
    out: dict[int, dict[str, Any]] = {}
    for seed, shift in ((17, -0.1), (18, 0.1)):

        def at(mae: float, shift: float = shift) -> dict[str, Any]:
            return {
                "a": score(mae + shift, 10, [mae * d / 2 + shift for d in HARD]),
                "b": score(mae + shift, 30, [mae * d / 2 + shift for d in HARD]),
            }

        default = arm(
            **{"global": at(1.1)}, local=at(1.9), finetuned=at(1.05), personal=at(1.0), local_a=at(2.4), local_b=at(1.5)
        )
        default |= {"mixture": {"a": {"local": 0.25 + shift, "federated": 0.75 - shift}, "b": {"local": 0.0, "federated": 1.0}}}
        default |= {"validation": [3.0, 1.06, 1.04], "sites": {"a": {"train": 5, "test": 10}, "b": {"train": 9, "test": 30}}}
        out[seed] = {
            "pooled": arm(**{"global": at(1.0)}) | {"held_out_mae": 1.0},
            "default": default,
            "fedavg": arm(**{"global": at(1.4)}, local=at(2.0), finetuned=at(1.3), local_a=at(2.5), local_b=at(2.0))
            | {"validation": [3.0, 2.0]},
        }
    return out


def claim(found: list[dict[str, Any]], part: str) -> dict[str, Any]:
    (one,) = [c for c in found if part in c["claim"]]
    return one


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_an_arms_error_is_the_mean_over_seeds_of_that_of_all_rows(seeds: dict[int, Any]) -> None:
    seeds[17]["pooled"]["scores"]["global"]["a"]["mae"] = 4.9  # (10 * 4.9 + 30 * 0.9) / 40 = 1.9, the other seed 1.1
    found = comparison.case_summary(seeds)["global"]["pooled"]
    assert found["mae"] == pytest.approx(1.5)
    assert found["sd"] == pytest.approx(np.std([1.9, 1.1], ddof=1))


def test_the_ratio_to_pooled_is_paired(seeds: dict[int, Any]) -> None:
    """Every resample is as hard for both arms: the ratio hardly varies although both errors do by a factor of three."""
    summary = comparison.case_summary(seeds)
    ratio = summary["to_pooled"]["default"]
    assert ratio["ratio"] == pytest.approx(1.1)
    assert 1.05 < ratio["low"] <= ratio["high"] < 1.16
    wide = summary["global"]["default"]
    assert wide["low"] < 0.7 and wide["high"] > 1.5
    assert "pooled" not in summary["to_pooled"]


def test_a_paired_difference_is_significant_where_overlapping_intervals_would_not_be(seeds: dict[int, Any]) -> None:
    row = comparison.case_summary(seeds)["own"]["a"]
    assert row["mae"]["personal"] == pytest.approx(1.0) and row["mae"]["local"] == pytest.approx(2.0)
    against = row["against"]["local"]
    assert against["gain"] == pytest.approx(0.5) and against["significant"] is True and against["verdict"] == "better"
    assert against["p"] == pytest.approx(2 / 40), "no resample against: at most one in as many as there are, two-sided"
    assert set(row["against"]) == {"local", "local ensemble", "fedavg, fine-tuned"}


@given(st.floats(0.5, 2.0), st.floats(0.5, 2.0))
@settings(max_examples=40, deadline=None)
def test_a_gain_and_the_loss_of_the_other_agree(ours: float, theirs: float) -> None:
    a, b = ({17: {"a": score(m, 10, around(m, 0.2))}} for m in (ours, theirs))
    forward, backward = comparison._paired(a, b, "a"), comparison._paired(b, a, "a")
    assert forward["significant"] == backward["significant"]
    assert forward["p"] == pytest.approx(backward["p"]) or forward["p"] == 1.0 or backward["p"] == 1.0
    assert (forward["gain"] > 0) == (theirs > ours)
    assert 0 < forward["p"] <= 1


def test_without_resamples_nothing_is_called_significant(seeds: dict[int, Any]) -> None:
    for arms in seeds.values():
        del arms["default"]["scores"]["personal"]["a"]["draws"]
    against = comparison.case_summary(seeds)["own"]["a"]["against"]["local"]
    assert against["gain"] == pytest.approx(0.5)
    assert against["significant"] is None and against["low"] is None and against["p"] is None


def test_an_arm_that_one_seed_lacks_is_compared_over_the_seeds_that_both_have(seeds: dict[int, Any]) -> None:
    del seeds[18]["fedavg"]
    summary = comparison.case_summary(seeds)
    assert (summary["global"]["fedavg"]["seeds"], summary["global"]["default"]["seeds"]) == (1, 2)
    assert summary["to_pooled"]["fedavg"]["ratio"] == pytest.approx(1.3 / 0.9), "both of seed 17"
    against = summary["own"]["a"]["against"]["local"]
    assert against["gain"] == pytest.approx(1 - 0.9 / 1.9)


def test_arms_without_a_seed_in_common_are_not_compared(seeds: dict[int, Any]) -> None:
    del seeds[17]["pooled"], seeds[18]["default"]
    summary = comparison.summary({"C1": seeds})
    assert "default" not in summary["cases"]["C1"]["to_pooled"]
    assert claim(summary["claims"], "C1: federated error at most 1.05")["verdict"] == UNKNOWN


def test_one_seed_has_no_spread_over_seeds(seeds: dict[int, Any]) -> None:
    assert comparison.case_summary({17: seeds[17]})["global"]["pooled"]["sd"] is None


def test_a_company_alone_is_judged_on_everyones_rows_and_the_best_is_named(seeds: dict[int, Any]) -> None:
    single = comparison.case_summary(seeds)["single"]
    assert single["sites"]["a"] == {"one network": pytest.approx(2.5), "ensemble": pytest.approx(2.4)}
    assert single["one network"]["best"] == "b" and single["one network"]["gain_over_best"] == pytest.approx(1 - 1.1 / 2.0)
    assert single["ensemble"]["gain_over_mean"] == pytest.approx(1 - 1.1 / 1.95)


def test_rounds_are_counted_until_the_error_before_them_is_within_95_percent_of_pooled(seeds: dict[int, Any]) -> None:
    """1 / 0.95 = 1.0526: the weights after two rounds are the first within it; FedAvg never is."""
    rounds = comparison.case_summary(seeds)["rounds"]
    assert rounds["default"] == {"reached_in": "2 of 2 seeds", "rounds": 2.0, "bytes": 200.0, "bytes_per_round": 100.0}
    assert rounds["fedavg"]["rounds"] is None and rounds["fedavg"]["bytes"] is None


def test_mixtures_are_averaged_over_seeds(seeds: dict[int, Any]) -> None:
    assert comparison.case_summary(seeds)["mixture"]["a"] == {"local": pytest.approx(0.25), "federated": pytest.approx(0.75)}


def test_the_summary_is_json_and_the_same_twice(seeds: dict[int, Any]) -> None:
    from fedmat import files

    found = {"C1": seeds}
    assert files.canonical_json(comparison.summary(found)) == files.canonical_json(comparison.summary(copy.deepcopy(found)))


# --- claims ----------------------------------------------------------------------------------------------------------


def test_nothing_measured_is_nothing_claimed() -> None:
    found = comparison.summary({})
    assert found["cases"] == {}
    assert {c["verdict"] for c in found["claims"]} == {UNKNOWN}
    assert {c["measured"] for c in found["claims"]} == {UNKNOWN}


def test_each_claim_is_met_or_missed_by_its_own_number(seeds: dict[int, Any]) -> None:
    found = comparison.summary({"C1": seeds})["claims"]
    assert claim(found, "C1: federated error at most 1.05")["verdict"] == MISSED  # 1.1
    assert claim(found, "C1: pooled at least as good as the study")["verdict"] == MET  # 1.0 against 1.228
    assert claim(found, "local-only and FedAvg")["verdict"] == MET
    assert claim(found, "22 % better than the best single company (one network)")["verdict"] == MET
    assert claim(found, "never significantly worse than local ensemble")["verdict"] == MET
    assert claim(found, "C4a: federated error")["verdict"] == UNKNOWN
    assert claim(found, "cover 88 to 92 %")["verdict"] == UNKNOWN, "no interval was counted"
    for arms in seeds.values():
        for e in arms["default"]["scores"]["global"].values():
            e["mae"] -= 0.2
    assert claim(comparison.summary({"C1": seeds})["claims"], "C1: federated error at most 1.05")["verdict"] == MET


@pytest.mark.parametrize("name", ["pooled", "default", "fedavg"])
def test_a_claim_whose_numbers_are_missing_is_never_met(seeds: dict[int, Any], name: str) -> None:
    """Whatever arm is taken away, no claim changes from missed or not evidenced to met."""
    whole = {c["claim"]: c["verdict"] for c in comparison.summary({"C1": seeds})["claims"]}
    for arms in seeds.values():
        arms.pop(name)
    for c in comparison.summary({"C1": seeds})["claims"]:
        assert c["verdict"] == whole[c["claim"]] or c["verdict"] == UNKNOWN, c


def test_resamples_that_are_missing_cannot_show_that_nobody_loses(seeds: dict[int, Any]) -> None:
    for arms in seeds.values():
        for scores in arms["default"]["scores"].values():
            for e in scores.values():
                e.pop("draws", None)
    found = comparison.summary({"C1": seeds})["claims"]
    assert claim(found, "never significantly worse than local ensemble")["verdict"] == UNKNOWN


def test_one_site_that_loses_significantly_is_enough_to_miss(seeds: dict[int, Any]) -> None:
    for arms in seeds.values():
        arms["default"]["scores"]["personal"]["b"] = score(3.0, 30, [3.0 * d / 2 for d in HARD])
    found = comparison.summary({"C1": seeds})["claims"]
    assert claim(found, "never significantly worse than local ensemble")["verdict"] == MISSED
    assert claim(found, "never significantly worse than local ensemble")["measured"] == "1 of 2 sites significantly worse"
    assert claim(found, "local-only and FedAvg")["verdict"] == MISSED  # one of two sites is below 80 %


def test_coverage_is_judged_at_every_site(seeds: dict[int, Any]) -> None:
    def cover(a: float, b: float) -> str:
        for arms in seeds.values():
            for site, share in (("a", a), ("b", b)):
                arms["default"]["scores"]["global"][site] |= {
                    "covered": share, "covered_low": share - 0.1, "covered_high": share + 0.1, "half_width": 1.0,
                }  # fmt: skip
        return claim(comparison.summary({"C1": seeds})["claims"], "cover 88 to 92 %")["verdict"]

    assert cover(0.9, 0.91) == MET
    assert cover(0.9, 0.8) == MISSED
    assert cover(0.9, 1.0) == MISSED
