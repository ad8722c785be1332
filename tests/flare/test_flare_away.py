"""Sites that go away in the middle of a round, and come back."""

from __future__ import annotations

import time

import pytest
from flare_scene import AWAY, Scene, away, kill

from fedmat import files
from flows.operate import FOLLOWED
from flows.shared import Step

pytestmark = pytest.mark.flare
CLOSES_S = 15.0  # a round whose party was switched off; its deadline is longer


def test_a_site_that_is_switched_off_costs_seconds_and_takes_part_again_when_it_is_back(scene: Scene) -> None:
    """The round it is missed in closes long before its deadline; the job ends early for it once it is connected again."""
    mill, forge = scene.moments("mill"), scene.moments("forge")
    mill.script([{"kind": "TrainRequest", "round": 1, "hold": "away"}])
    forge.script([{"kind": "TrainRequest", "round": 3, "hold": "meanwhile"}])
    order = scene.order("away")
    with scene.following(order) as followed:
        followed.until(lambda: mill.holds("away"))
        kill(scene.client("mill"), scene.job_of("mill"))
        since = time.monotonic()
        followed.until(lambda: len(followed.reports) > 1)
        closed = time.monotonic() - since
        mill.release("away")
        followed.until(lambda: forge.holds("meanwhile"))
        scene.stage.start_client("mill")
        followed.until(lambda: any(isinstance(e, Step) and "mill is back" in e.detail for e in followed.events))
        forge.release("meanwhile")
        followed.done()
    gone = [report.round for report in followed.reports if report.dropouts]
    assert closed < CLOSES_S < scene.stage.config.plan.deadline_s
    assert gone == [1, 2, 3]
    assert {(d.site, d.reason) for r in followed.reports for d in r.dropouts} == {("mill", "unreachable")}
    assert all(r.accepted == ("forge", "foundry", "mill") for r in followed.reports if r.round not in gone)
    assert files.read_json(order.folder / FOLLOWED)["attempt"] == 2
    assert scene.model(order) == scene.expected(away(followed.reports))


def test_a_job_process_that_is_killed_at_a_site_costs_the_job_and_no_round(scene: Scene) -> None:
    """FLARE ends a whole job when one party's process of it breaks; the follower submits the next, which goes on."""
    mill = scene.moments("mill")
    mill.script([{"kind": "TrainRequest", "round": 2, "hold": "job"}])
    order = scene.order("job")
    with scene.following(order) as followed:
        followed.until(lambda: mill.holds("job"))
        kill(scene.job_of("mill"))
        mill.release("job")
        followed.done()
    assert files.read_json(order.folder / FOLLOWED)["attempt"] == 2
    assert [r.round for r in followed.reports] == list(range(scene.stage.config.plan.rounds))
    assert all(r.accepted == ("forge", "foundry", "mill") for r in followed.reports)
    assert scene.model(order) == scene.expected()


def test_a_site_whose_desk_does_not_run_is_left_out_at_the_deadline(scene: Scene) -> None:
    """Its FLARE client asks the desk again and again for a minute: the plan's deadline here is shorter."""
    scene.stage.stop_desk("mill")
    order = scene.order("desk")
    reports = scene.run(order)
    (failure,) = scene.setup(order)["failures"]
    assert (failure["site"], failure["reason"]) == ("mill", "late")
    assert {r.accepted for r in reports} == {("forge", "foundry")}
    assert scene.model(order) == scene.expected({("mill", "MatchRequest"): AWAY})
