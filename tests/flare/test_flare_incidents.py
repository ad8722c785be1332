"""One order in whose rounds something goes wrong at a site, and what became of each of them."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field

import pytest
from flare_scene import AWAY, Scene, alive, kill

from fedmat.conductor import Order
from fedmat.domain import Dropout, RoundReport

pytestmark = pytest.mark.flare
SLOW_S, DESK_AWAY_S = 2.0, 1.0
SLOW, KILLED, DESK, HUNG = 1, 2, 4, 5  # in which round


@dataclass
class Day:
    """An order and what was seen on the way."""

    order: Order
    reports: list[RoundReport]
    orphan: bool
    log: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def day(scene: Scene) -> Day:
    mill, forge = scene.moments("mill"), scene.moments("forge")
    at = {n: {"kind": "TrainRequest", "round": n, "hold": f"round {n}"} for n in (SLOW, KILLED, DESK, HUNG)}
    mill.script([at[SLOW], at[KILLED], at[HUNG]])
    forge.script([at[DESK]])
    order = scene.order("incidents")
    with scene.following(order) as followed:
        followed.until(lambda: mill.holds(f"round {SLOW}"))
        os.kill(scene.training("mill"), signal.SIGSTOP)
        mill.release(f"round {SLOW}")
        time.sleep(SLOW_S)
        os.kill(scene.training("mill"), signal.SIGCONT)

        followed.until(lambda: mill.holds(f"round {KILLED}"))
        os.kill(scene.training("mill"), signal.SIGSTOP)  # so that it is killed while it has the request
        mill.release(f"round {KILLED}")
        time.sleep(0.3)
        kill(scene.training("mill"))

        followed.until(lambda: forge.holds(f"round {DESK}"))
        orphan = scene.training("forge")
        kill(scene.stage.desk_pid("forge"))
        forge.release(f"round {DESK}")
        time.sleep(DESK_AWAY_S)
        scene.stage.start_desk("forge")

        followed.until(lambda: mill.holds(f"round {HUNG}"))
        os.kill(scene.training("mill"), signal.SIGSTOP)
        mill.release(f"round {HUNG}")
        followed.done()
        return Day(order, followed.reports, alive(orphan))


def test_a_slow_site_that_is_in_time_counts(day: Day) -> None:
    report = day.reports[SLOW]
    assert "mill" in report.accepted and report.seconds >= SLOW_S
    assert report.dropouts == report.rejections == ()


def test_a_training_process_that_the_kernel_kills_costs_one_answer(day: Day) -> None:
    """As its out-of-memory killer does; FLARE's own job process would take the whole job with it."""
    assert day.reports[KILLED].dropouts == (Dropout("mill", "crashed", "the site's process ended"),)
    assert day.reports[KILLED].accepted == ("forge", "foundry")
    assert day.reports[KILLED].seconds < 5.0
    assert "mill" in day.reports[KILLED + 1].accepted


def test_a_desk_that_is_started_again_in_the_middle_of_a_request_still_answers_it(day: Day) -> None:
    report = day.reports[DESK]
    assert "forge" in report.accepted and report.seconds >= DESK_AWAY_S
    assert report.dropouts == ()
    assert not day.orphan  # its training process ended with it


def test_a_hung_process_is_late_at_the_deadline_and_well_in_the_next_round(day: Day, scene: Scene) -> None:
    deadline = scene.stage.config.plan.deadline_s
    report = day.reports[HUNG]
    assert report.dropouts == (Dropout("mill", "late", f"no answer within {deadline:g} s"),)
    assert report.accepted == ("forge", "foundry")
    assert deadline <= report.seconds < deadline + 3.0
    assert "mill" in day.reports[HUNG + 1].accepted


def test_the_model_is_that_of_the_same_sites_in_one_process(day: Day, scene: Scene) -> None:
    assert len(day.reports) == scene.stage.config.plan.rounds
    assert scene.model(day.order) == scene.expected({("mill", KILLED): AWAY, ("mill", HUNG): AWAY})
