"""The operator's side fails: whoever follows an order is killed, then the whole machine loses power. The order ends in the same model."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from flare_scene import Scene, alive, descendants, kill, wait_for

from fedmat import files
from fedmat.conductor import Order
from flows import parties

pytestmark = pytest.mark.flare
KILLED, POWER = 2, 5  # in which round
FOLLOW = """
import sys
from pathlib import Path
from fedmat.conductor import Order
from fedmat.federation.flare import Session
from flows import operate
order = Order.load(Path(sys.argv[1]), sys.argv[2])
operate.follow(order, session=lambda: Session(order.project / "admin"), patience=operate.Patience(60.0, 10.0, 60.0, 0.03, 0.3))
"""


@dataclass
class Night:
    order: Order
    before: dict[str, object]  # what the follower's note said before and after it was killed
    after: dict[str, object]
    back_s: float
    log: bytes


def follow(order: Order, log: Path) -> subprocess.Popen[bytes]:
    """The follower as a process of its own."""
    with log.open("ab") as output:
        return subprocess.Popen([sys.executable, "-c", FOLLOW, str(order.project), order.token], stdout=output, stderr=output)


@pytest.fixture(scope="module")
def night(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Night:
    log = tmp_path_factory.mktemp("night") / "follower.log"
    forge = scene.moments("forge")
    forge.script([{"kind": "TrainRequest", "round": n, "hold": f"round {n}"} for n in (KILLED, POWER)])
    order = scene.order("night")
    note = order.folder / "followed.json"
    follower = follow(order, log)
    try:
        wait_for(lambda: forge.holds(f"round {KILLED}"), 120.0, "the first rounds")
        follower.kill()
        follower.wait()
        before = files.read_json(note)
        follower = follow(order, log)
        forge.release(f"round {KILLED}")
        wait_for(lambda: forge.holds(f"round {POWER}"), 120.0, "the rounds after")
        after = files.read_json(note)
        old = [pid for site in scene.sites for pid in descendants(scene.client(site))]
        kill(follower.pid, scene.job_of("server"), scene.client("server"))
        follower.wait()
    finally:
        follower.kill()
    forge.release(f"round {POWER}")
    scene.stage.children["server"] = parties.server_child(scene.stage.project)
    since = time.monotonic()
    with scene.following(Order.load(order.project, order.token)) as followed:
        followed.until(lambda: order.state.get("round", 0) > POWER)
        back = time.monotonic() - since
        followed.done()
    wait_for(lambda: not any(alive(pid) for pid in old), 60.0, "job processes of the job that died with the server end")
    return Night(order, before, after, back, log.read_bytes())


def test_a_follower_that_is_killed_and_started_again_goes_on_with_the_same_job(night: Night) -> None:
    assert night.before["job"] is not None
    assert night.before == night.after
    assert night.log == b""


def test_a_server_that_loses_power_ends_in_the_very_same_model(night: Night, scene: Scene) -> None:
    finished = Order.load(night.order.project, night.order.token)
    assert files.read_json(finished.folder / "followed.json")["attempt"] == 2
    reports = finished.run().reports()
    assert [r["round"] for r in reports] == list(range(scene.stage.config.plan.rounds))
    assert all(r["accepted"] == ["forge", "foundry", "mill"] for r in reports)
    assert scene.model(night.order) == scene.expected()
