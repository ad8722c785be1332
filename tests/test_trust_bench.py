"""The measurement of protected rounds: what is compared with what, and that cutting a consortium loses nothing."""

from __future__ import annotations

from pathlib import Path

import consortium
import numpy as np
import pytest

from fedmat import trust_bench as tb
from fedmat.federation.plan import Plan
from fedmat.hostile import cut, run, vary


def test_cutting_keeps_every_row_and_divides_no_group() -> None:
    tables = {s: consortium.table(s) for s in consortium.SITES}
    parts = cut(tables, 10)
    assert len(parts) == 10 and sum(map(len, parts.values())) == sum(map(len, tables.values()))
    rows = np.concatenate([t.x for t in parts.values()])
    assert {tuple(r) for r in rows} == {tuple(r) for t in tables.values() for r in t.x}
    for t in tables.values():
        for group in np.unique(t.group):
            here = {tuple(r) for r in t.x[t.group == group]}
            assert sum(bool(here & {tuple(r) for r in p.x}) for p in parts.values()) == 1


def test_too_few_groups_give_no_ten_members() -> None:
    tiny = consortium.table("ash", rows=9)
    with pytest.raises(ValueError, match="do not give"):
        cut({"ash": tiny}, 10)


def test_a_small_run_trains_as_many_local_steps_in_more_rounds() -> None:
    plan = Plan.of(
        consortium.config(
            consortium.SEVEN, quorum=5, rounds=30, average_last=10, local={"steps": 30, "batch_size": 8, "lr": 0.01}
        )
    )
    plans = tb.small_plans(plan)
    steps = {name: sum(p.steps(r) for r in range(p.settings.rounds)) for name, p in plans.items()}
    assert set(steps.values()) == {900}
    assert plans["small"].settings.security.mode == "trigram" and plans["small"].settings.average_last == 30
    assert plans[tb.PLAIN].settings.security.mode == plans["plain-often"].settings.security.mode == "none"


def test_ratios_are_means_over_seeds_of_the_same_seeds_run() -> None:
    def result(arm: str, attack: str, seed: int, mae: float) -> dict[str, object]:
        rest = dict.fromkeys(("hostile_share", "wrongly_excluded", "bytes_up", "bytes_down", "role_bytes", "seconds"), 0.0)
        return {"case": "X", "arm": arm, "attack": attack, "seed": seed, "mae": mae, "dense_bytes": 100, "members": 10, **rest}

    found = [
        *(result("mean", "none", s, m) for s, m in ((17, 1.0), (18, 2.0))),
        *(result("mean", "absent", s, m) for s, m in ((17, 2.0), (18, 2.0))),
        *(result("mean", "sign_flip", s, m) for s, m in ((17, 2.0), (18, 4.0))),
    ]
    (row,) = (r for r in tb.summary(found)["attacks"] if r["attack"] == "sign_flip")
    assert row["ratio"] == pytest.approx(2.0) and row["low"] == pytest.approx(2.0) and row["seeds"] == 2
    assert row["to_absent"]["ratio"] == pytest.approx(2.0**0.5)
    assert tb.attack_rows(tb.summary(found))[0][0] == "X"


def test_absent_members_only_stay_away(tmp_path: Path) -> None:
    plan = vary(Plan.of(consortium.config(consortium.SEVEN, quorum=5, rounds=2)))
    found = run(plan, {s: consortium.table(s) for s in consortium.SEVEN}, tmp_path, attack="absent", hostile=("fir", "gorse"))
    assert all({d.site for d in r.dropouts} == {"fir", "gorse"} and len(r.shares) == 5 for r in found.reports)


def test_hostile_members_must_see_the_others_first(tmp_path: Path) -> None:
    plan = Plan.of(consortium.config(consortium.SEVEN, quorum=5, rounds=1))
    with pytest.raises(ValueError, match="last in the alphabet"):
        run(plan, {s: consortium.table(s) for s in consortium.SEVEN}, tmp_path, attack="ipm", hostile=("ash",))
