"""A site that lies on the wire: its answer does not count, the reason is in the report, and the run is that of the others.

Unmarked, and the one test of a whole order in the default tests: mutual TLS, FLARE, desks, filters, all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from flare_desk import OTHER
from flare_scene import Scene

from fedmat.conductor import Order
from fedmat.domain import RoundReport

LIAR = "forge"
# round -> lie, kind of failure, reason. The site's own last look turns what is no message into a failure before it leaves.
LIES = {
    1: ("nan", "rejection", "non_finite"),
    2: ("shape", "rejection", "wrong_shape"),
    3: ("replay", "rejection", "wrong_round"),
    4: ("name", "rejection", "wrong_site"),
    5: ("huge", "rejection", "too_large"),
    6: ("nonsense", "dropout", "refused"),
    7: ("failure of another", "rejection", "wrong_site"),
}
CLAIMS = {"AttestRequest": "more rows", "StatisticsRequest": "more labels"}  # what mill says of itself


@dataclass
class Told:
    order: Order
    reports: list[RoundReport]


@pytest.fixture(scope="module")
def told(scene: Scene) -> Told:
    scene.moments(LIAR).script([{"kind": "TrainRequest", "round": n, "lie": lie} for n, (lie, *_) in LIES.items()])
    scene.moments("mill").script([{"kind": kind, "lie": lie} for kind, lie in CLAIMS.items()])
    order = scene.order("hostile")
    return Told(order, scene.run(order))


@pytest.mark.parametrize("number", LIES)
def test_a_lie_does_not_count_and_the_reason_is_in_the_report(told: Told, number: int) -> None:
    _, kind, reason = LIES[number]
    report = told.reports[number]
    found = [("dropout", d.site, d.reason) for d in report.dropouts] + [
        ("rejection", r.site, r.reason) for r in report.rejections
    ]
    assert found == [(kind, LIAR, reason)]
    assert report.accepted == (OTHER, "mill")


def test_who_claims_more_rows_than_all_others_together_gets_half_at_most(told: Told, scene: Scene) -> None:
    assert told.reports[0].shares["mill"] == pytest.approx(scene.stage.config.plan.max_weight_share)


def test_sums_that_exceed_what_was_attested_are_left_out(told: Told, scene: Scene) -> None:
    failures = scene.setup(told.order)["failures"]
    assert [(f["site"], f["detail"]) for f in failures] == [("mill", "sums that do not fit what it attested")]


def test_the_model_is_that_of_the_others(told: Told, scene: Scene) -> None:
    lies = {(LIAR, n): lie for n, (lie, *_) in LIES.items()} | {("mill", kind): lie for kind, lie in CLAIMS.items()}
    assert scene.model(told.order) == scene.expected(lies)
