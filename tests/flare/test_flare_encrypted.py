"""Encrypted rounds between processes: five sites, and the three roles as parties of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import small
from flare_scene import Scene, kill

from fedmat import files, pipeline
from fedmat.envelopes import ROLES
from fedmat.pipeline import Run

pytestmark = [pytest.mark.flare, pytest.mark.slow]
FIVE = {**small.COMPANIES, "smithy": ("Co", "Mn"), "works": ("Al", "Fe")}
PLAN = {
    "rounds": 3,
    "quorum": 5,
    "deadline_s": 60.0,
    "rule": {"name": "multi_krum", "hostile": 1},
    "security": {"mode": "trigram", "clip": 5.0},
}


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("vault")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "COMPANIES", FIVE)
        consortium = small.build(folder / "c", **PLAN)  # type: ignore[arg-type]
    found = Scene(consortium, folder / "s")
    with found.stage:
        found.start()
        yield found


@pytest.mark.timeout(600)
def test_an_encrypted_run_between_processes_ends_in_the_model_of_one_process(vault: Scene) -> None:
    """Though a role's desk is killed in the middle of an exchange: what it answers is on its disk before it is sent."""
    assert set(vault.stage.parties) == {*FIVE, *ROLES}
    notary = vault.moments("notary")
    notary.script([{"kind": "ShareRequest", "hold": "share"}])
    order = vault.order("trigram")
    with vault.following(order) as followed:
        followed.until(lambda: notary.holds("share"), 180.0)
        kill(vault.stage.desk_pid("notary"))
        notary.release("share")
        vault.stage.start_desk("notary")
        followed.done(240.0)
    reports = followed.reports
    assert [r.protection for r in reports] == ["trigram"] * 3
    assert all(r.dropouts == r.rejections == () for r in reports)
    assert all(set(r.audits.values()) == {"agrees"} for r in reports)
    run = Run(vault.source, vault.stage.folder / "reference")
    for site in run.sites:
        pipeline.prepare_site(run, site)
        pipeline.featurize_site(run, site)
    list(pipeline.train(run))
    assert vault.model(order) == files.sha256_file(run.folder / pipeline.MODEL)
