"""A site that does not want to, may not, or cannot take part says why; nothing else leaves it, and the others go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from flare_scene import AWAY, Scene

from fedmat import files
from fedmat.conductor import Order
from fedmat.errors import RoundFailed
from fedmat.federation.plan import Plan
from fedmat.federation.site import REMOVAL, state_folder

pytestmark = pytest.mark.flare


def failures(scene: Scene, order: Order) -> list[tuple[str, str, str]]:
    """Who takes no part in a run, and why."""
    return [(f["site"], f["reason"], f["detail"]) for f in scene.setup(order)["failures"]]


def test_a_plan_against_a_sites_policy_is_refused_with_the_clause_and_nothing_leaves(scene: Scene) -> None:
    order, before = scene.order("policy"), len(scene.said("mill"))
    with scene.policy("mill", plans={"most_rounds": 5}):
        reports = scene.run(order)
    ((site, reason, detail),) = failures(scene, order)
    assert (site, reason) == ("mill", "policy")
    assert detail == "plans.most_rounds: plan.rounds is 8; this site accepts at most 5"
    assert {r.accepted for r in reports} == {("forge", "foundry")}
    assert scene.said("mill")[before:] == [["MatchRequest", None, "Rejection policy"]]
    assert scene.model(order) == scene.expected({("mill", "MatchRequest"): AWAY})


def test_the_sites_own_filter_holds_back_what_its_desk_lets_out(scene: Scene) -> None:
    """The desk was replaced by one without a policy, and the job names no filters: privacy.json is the site's."""
    order, before = scene.order("filter"), len(scene.said("mill"))
    kinds = [k for k in scene.kinds("mill") if k != "Update"]
    scene.moments("mill").script([{"lawless": True}])
    with scene.policy("mill", outbound={"kinds": kinds}):
        reports = scene.run(order)
    assert ["TrainRequest", 0, "Update"] in scene.said("mill")[before:]  # the desk let it go
    for report in reports:
        ((site, reason, detail),) = [(r.site, r.reason, r.detail) for r in report.rejections]
        assert (site, reason) == ("mill", "policy")
        assert detail.startswith("outbound.kinds: a Update may not leave")
    assert scene.model(order) == scene.expected({("mill", r.round): AWAY for r in reports})


def test_another_release_on_the_other_side_is_named(scene: Scene) -> None:
    for site, stated in (("mill", {"fedmat": "99.1.0"}), ("forge", {"contract": "99.1.0"})):
        scene.moments(site).script([{"stated": stated}])
    order = scene.order("versions")
    with pytest.raises(RoundFailed) as refused, scene.following(order) as followed:
        followed.done()
    assert refused.value.exit_code == 4
    assert "mill refused: mill: version of fedmat here is" in refused.value.what
    assert "forge refused: forge: version of contract here is" in refused.value.what
    assert "at the coordinator 99.1.0" in refused.value.what


def test_a_site_whose_disk_is_full_says_so_and_the_others_go_on(scene: Scene) -> None:
    folder = state_folder(scene.stage.home("mill") / "sites" / "mill", Plan.of(scene.stage.config))
    folder.mkdir(parents=True, exist_ok=True)
    full = folder / f".{REMOVAL}.{scene.training('mill')}.tmp"  # where the next answer is written first
    full.symlink_to("/dev/full")
    order = scene.order("full")
    reports = scene.run(order)
    assert not full.exists()
    ((site, reason, detail),) = failures(scene, order)
    assert (site, reason) == ("mill", "crashed")
    assert "No space left on device" in detail
    assert {r.accepted for r in reports} == {("forge", "foundry")}
    assert scene.model(order) == scene.expected({("mill", "RemoveRequest"): AWAY})


# --- jobs that try to bring more than settings ---------------------------------------------------------------------


def _code(job: Path) -> None:
    custom = job / "app" / "custom"
    custom.mkdir()
    (custom / "mine.py").write_text("raise SystemExit('code of the operator ran at a site')\n")


def _foreign_class(job: Path) -> None:
    path = job / "app/config/config_fed_client.json"
    settings = files.read_json(path)
    settings["executors"][0]["executor"] = {"path": "nvflare.app_common.executors.common_executor.CommonExecutor", "args": {}}
    files.write_json(path, settings)


def _other_scope(job: Path) -> None:
    files.write_json(job / "meta.json", files.read_json(job / "meta.json") | {"scope": "open"})


@pytest.mark.parametrize(
    "change", [_code, _foreign_class, _other_scope], ids=["code", "foreign class", "another privacy scope"]
)
def test_a_job_that_is_more_than_settings_runs_at_no_site(scene: Scene, change: Callable[[Path], None]) -> None:
    order = scene.order("job")
    job = order.write_job(1)
    change(job)
    before = {site: len(scene.said(site)) for site in scene.sites}
    with scene.session() as session:
        name, until = session.submit(job, order.token), time.monotonic() + 60.0
        while not (status := session.status(name)).startswith("FINISHED"):
            assert time.monotonic() < until, status
            time.sleep(0.3)
    assert status != "FINISHED:COMPLETED"
    assert {site: len(scene.said(site)) for site in scene.sites} == before
