"""A finished run goes into the ledger once, whole, in order; what stands there is never overwritten."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import ledger_scene
import pytest

from fedmat import accounts, bundle, files, pipeline
from fedmat.bundle import Bundle
from fedmat.errors import NotEvidenced, ProtocolError, StateError
from fedmat.federation.engine import InProcessEngine
from fedmat.ledger import entries
from fedmat.ledger.entries import ApprovalEntry
from fedmat.ledger.text import stamp


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> ledger_scene.Scene:
    return ledger_scene.build(tmp_path_factory.mktemp("scene") / "home")


def types(scene: ledger_scene.Scene) -> list[str]:
    with scene.books.open() as log:
        return [entries.open_envelope(data)[0].type for data in log.read()]


def test_a_run_is_told_in_the_order_in_which_it_happened(scene: ledger_scene.Scene) -> None:
    found = types(scene)
    one_round = ["update"] * 3 + ["aggregate"]
    data = ["dataset", "contract_report"] * 3
    assert found == ["charter", "plan", *data, *one_round, *one_round, *["egress"] * 3, "evaluation"]


def test_doing_it_again_writes_nothing_and_packs_the_same_bytes(scene: ledger_scene.Scene) -> None:
    before, size = scene.bundle.read_bytes(), scene.books.fold().size
    again = pipeline.account(scene.run, scene.clock())
    assert (again.written, again.size) == (0, size)
    with zipfile.ZipFile(scene.bundle) as archive:
        assert {i.date_time for i in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert scene.bundle.read_bytes() == before


def test_the_bundle_holds_every_file_that_an_entry_speaks_of(scene: ledger_scene.Scene) -> None:
    found = Bundle.open(scene.bundle)
    assert {bundle.egress_file(s) for s in scene.sites} <= set(found.contents)
    run = scene.books.fold().runs["r1"]
    assert run.evaluation is not None
    told = run.evaluation.entry
    for name, stated in (
        ("metrics.json", told.metrics_sha256), ("evaluations.json", told.evaluations_sha256),
        ("intervals.json", told.intervals_sha256), ("matching.json", told.matching_sha256),
        ("model.safetensors", told.model_sha256), ("environment.json", run.plan.entry.environment_sha256),
        ("consortium.yaml", run.plan.entry.consortium_file_sha256),
    ):  # fmt: skip
        assert files.sha256(found.contents[f"run/{name}"]) == stated, name


def test_an_unpacked_bundle_reads_like_a_packed_one(scene: ledger_scene.Scene, tmp_path: Path) -> None:
    with zipfile.ZipFile(scene.bundle) as archive:
        archive.extractall(tmp_path / "open")
    assert dict(Bundle.open(tmp_path / "open").contents) == dict(Bundle.open(scene.bundle).contents)
    folder = Bundle.open(scene.bundle).unpack(tmp_path / "run")
    assert (folder / "model.safetensors").read_bytes() == (scene.folder / "model.safetensors").read_bytes()


def test_what_is_no_bundle_is_named(tmp_path: Path, scene: ledger_scene.Scene) -> None:
    with pytest.raises(StateError, match="no such file"):
        Bundle.open(tmp_path / "none.zip")
    broken = tmp_path / "broken.zip"
    broken.write_bytes(scene.bundle.read_bytes()[:-40])
    with pytest.raises(StateError, match="damaged"):
        Bundle.open(broken)
    twice = tmp_path / "twice.zip"
    twice.write_bytes(scene.bundle.read_bytes())
    with zipfile.ZipFile(twice, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("run/metrics.json", b"{}")
    with pytest.raises(StateError, match="two files of one name"):
        Bundle.open(twice)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StateError, match="there is no bundle.json"):
        Bundle.open(tmp_path / "empty")


def test_a_changed_run_is_not_written_over_what_the_ledger_says(tmp_path: Path) -> None:
    scene = ledger_scene.build(tmp_path / "home")
    first = scene.books.fold().runs["r1"]
    reports = scene.run.reports()
    reports[0]["shares"] = dict.fromkeys(reports[0]["shares"], 0.1)
    (scene.folder / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in reports))
    done = pipeline.account(scene.run, scene.clock())
    fold = scene.books.fold()
    assert done.run == "r1.2"
    assert fold.runs["r1"].aggregates == first.aggregates
    assert not fold.runs["r1.2"].updates, "no site has signed for it"


def test_a_run_that_is_begun_afresh_and_seals_anew_stands_beside_the_first(tmp_path: Path) -> None:
    scene = ledger_scene.build(tmp_path / "home")
    reports = scene.run.reports()
    for report in reports:  # as other pads and keys make it
        report["evidence"] = {"header": "0" * 64}
    (scene.folder / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in reports))
    with InProcessEngine({s: ledger_scene._handler(scene, s) for s in scene.sites}) as engine:
        pipeline.statements(scene.run, engine=engine)
    assert pipeline.account(scene.run, scene.clock()).run == "r1.2"
    again = scene.books.fold().runs["r1.2"]
    assert {site for _, site in again.updates} == set(scene.sites)


def test_another_model_of_the_same_name_is_another_run(tmp_path: Path) -> None:
    scene = ledger_scene.build(tmp_path / "home")
    fold = scene.books.fold()
    assert accounts.name_of(fold, scene.folder) == "r1"
    from fedmat import wire

    wire.save_model(ledger_scene.model(3), scene.folder / "model.safetensors")
    assert accounts.name_of(fold, scene.folder) == "r1.2"


def test_a_second_run_goes_on_in_the_same_ledger_and_every_witness_follows(tmp_path: Path) -> None:
    scene = ledger_scene.build(tmp_path / "home")
    second = scene.another("r2", weights_seed=2)
    fold = scene.books.fold()
    assert set(fold.runs) == {"r1", "r2"}
    with scene.books.open() as log:
        last = log.checkpoints()[-1]
    assert last.splitlines()[1] == str(fold.size)
    assert all(f"electrolytes/{site}" in last for site in second.sites)


def test_a_site_that_says_nothing_leaves_a_gap_and_not_a_guess(tmp_path: Path) -> None:
    scene = ledger_scene.build(tmp_path / "home", account=False)
    handlers = {s: ledger_scene._handler(scene, s) for s in scene.sites[1:]}
    with InProcessEngine(handlers) as engine:
        told = pipeline.statements(scene.run, engine=engine)
    assert "no such site" in told["sites"][scene.sites[0]]["why"]
    pipeline.account(scene.run, scene.clock())
    run = scene.books.fold().runs["r1"]
    assert set(run.datasets) == set(scene.sites[1:])
    assert bundle.egress_file(scene.sites[0]) not in Bundle.open(scene.bundle).contents


def test_exclusions_are_entries_with_their_reasons(tmp_path: Path) -> None:
    scene = ledger_scene.build(tmp_path / "home", sites=4, rounds=6, exclusions=True)
    found = [p.entry for p in scene.books.fold().runs["r1"].exclusions]
    assert [(e.round, e.kind, e.reason) for e in found] == [(2, "dropout", "late"), (4, "rejection", "non_finite")]


def test_an_unfinished_run_is_not_written(tmp_path: Path) -> None:
    scene = ledger_scene.build(tmp_path / "home", account=False)
    (scene.folder / "metrics.json").unlink()
    with pytest.raises(NotEvidenced, match=r"there is no metrics\.json"):
        pipeline.account(scene.run, scene.clock())


def test_a_real_consortium_begins_its_ledger_itself(tmp_path: Path) -> None:
    scene = ledger_scene.build(tmp_path / "home", account=False)
    path = scene.run.consortium_file
    path.write_text(path.read_text().replace("simulated: true", "simulated: false"))
    with pytest.raises((NotEvidenced, StateError), match="ledger|keys"):
        pipeline.account(scene.run, scene.clock())


def test_a_model_waits_for_the_charters_approvals(tmp_path: Path) -> None:
    home = tmp_path / "home"
    scene = ledger_scene.build(home, account=False)
    path = scene.run.consortium_file
    path.write_text(path.read_text() + "terms: {approvals: 2}\n")
    with InProcessEngine({s: ledger_scene._handler(scene, s) for s in scene.sites}) as engine:
        pipeline.statements(scene.run, engine=engine)
    pipeline.account(scene.run, scene.clock())
    store = f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    first = pipeline.publish(scene.run, store, scene.clock())
    assert "champion" not in first.aliases
    assert "0 of the 2 that the charter asks for" in first.reason
    about = scene.books.fold().runs["r1"].evaluation
    assert about is not None
    for site in scene.sites[:2]:
        entry = ApprovalEntry(
            consortium="electrolytes", by=site, time=stamp(scene.clock()), run="r1", model_sha256=about.entry.model_sha256,
            metrics_sha256=about.entry.metrics_sha256, approves=True,
        )  # fmt: skip
        with scene.books.open() as log:
            log.append([entries.seal(entry, [scene.keys(site)])])
    second = pipeline.publish(scene.run, store, scene.clock())
    assert "champion" in second.aliases and second.version == first.version
    run = scene.books.fold().runs["r1"]
    assert run.registration is not None and "champion" in run.registration.entry.aliases


def test_a_champion_without_approvals_is_refused_by_the_ledger(tmp_path: Path) -> None:
    scene = ledger_scene.build(tmp_path / "home", account=False)
    path = scene.run.consortium_file
    path.write_text(path.read_text() + "terms: {approvals: 2}\n")
    pipeline.account(scene.run, scene.clock())
    sha256 = files.sha256_file(scene.folder / "model.safetensors")
    with pytest.raises(ProtocolError, match="no_approval"):
        accounts.register(scene.books, "r1", "fedmat-x", 1, sha256, ("champion",), "by hand", scene.clock())
