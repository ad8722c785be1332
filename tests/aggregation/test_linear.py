"""Laws of rules that need only a weighted sum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmat.aggregation.linear import LinearRule, equal_shares, row_shares
from fedmat.config import ServerOptimizer
from fedmat.errors import PlanRefused

ROWS = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.integers(1, 10**6), min_size=2, max_size=8)


@given(ROWS, st.floats(0.5, 1.0))
def test_shares_sum_to_one_and_none_exceeds_the_cap(rows: dict[str, int], cap: float) -> None:
    shares = row_shares(rows, cap)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert max(shares.values()) <= cap + 1e-9


@given(ROWS)
def test_without_a_binding_cap_shares_are_in_proportion_to_rows(rows: dict[str, int]) -> None:
    total = sum(rows.values())
    assert row_shares(rows, 1.0) == pytest.approx({s: n / total for s, n in rows.items()})


def test_a_cap_moves_the_excess_to_the_others_in_proportion() -> None:
    assert row_shares({"a": 80, "b": 15, "c": 5}, 0.5) == pytest.approx({"a": 0.5, "b": 0.375, "c": 0.125})


def test_an_impossible_cap_is_refused_not_clamped() -> None:
    with pytest.raises(PlanRefused):
        row_shares({"a": 1, "b": 1}, 0.4)


def test_plain_mean_of_equal_updates_is_the_update() -> None:
    rule = LinearRule(ServerOptimizer())
    v = np.array([1.0, -2.0])
    step, state = rule.finish(rule.total([v, v, v], list(equal_shares("abc").values())), {})
    assert step == pytest.approx(v)
    assert state == {}


def test_server_momentum_by_hand() -> None:
    rule = LinearRule(ServerOptimizer(name="momentum", lr=0.5, momentum=0.9))
    one, state = rule.finish(np.array([1.0]), {})
    two, _ = rule.finish(np.array([2.0]), state)
    assert (one[0], two[0]) == pytest.approx((0.5, 0.5 * (0.9 + 2.0)))


def test_server_adam_by_hand() -> None:
    rule = LinearRule(ServerOptimizer(name="adam", lr=0.1, momentum=0.9, beta2=0.99, epsilon=1e-3))
    step, state = rule.finish(np.array([2.0]), {})
    assert state["m"][0] == pytest.approx(0.2)
    assert state["v"][0] == pytest.approx(0.04)
    assert step[0] == pytest.approx(0.1 * 0.2 / (0.2 + 1e-3))


def test_a_rule_remembers_nothing() -> None:
    rule = LinearRule(ServerOptimizer(name="adam"))
    first = rule.finish(np.array([1.0]), {})[0]
    rule.finish(np.array([5.0]), {})
    assert rule.finish(np.array([1.0]), {})[0] == pytest.approx(first)
