"""The whole run as plain functions, on real files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small

from fedmat import files, pipeline
from fedmat.errors import ConfigError, NotEvidenced, SiteRefused, StateError
from fedmat.features.table import TEST, TRAIN, VALIDATION
from fedmat.pipeline import Run


def whole(run: Run) -> dict[str, object]:
    """Every step up to the metrics."""
    for site in run.sites:
        pipeline.prepare_site(run, site)
        pipeline.featurize_site(run, site)
    list(pipeline.train(run))
    pipeline.baselines(run)
    return pipeline.evaluate(run)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, object]]:
    folder = tmp_path_factory.mktemp("alloys")
    run = pipeline.open_run(small.build(folder / "c", rounds=12), home=folder / "home")
    return run, whole(run)


def test_the_metrics_hold_both_numbers_for_every_site_and_arm(finished) -> None:  # type: ignore[no-untyped-def]
    _, metrics = finished
    assert set(metrics["sites"]) == set(small.COMPANIES)
    for row in metrics["sites"].values():
        assert set(row["own"]) == {"local", "federated", "finetuned", "personal", "pooled"}
        assert set(row["global"]) == {"local", "finetuned"}
        assert all(m["mae"] > 0 for m in row["own"].values())
    total = sum(row["n_test"] for row in metrics["sites"].values())
    arms = ("federated", "pooled", "dummy", "local_mean", "finetuned_mean")
    assert {metrics["global"][arm]["n"] for arm in arms} == {total}
    assert metrics["global"]["federated"]["mae"] < metrics["global"]["local_mean"]["mae"]
    assert metrics["global"]["federated"]["mae"] < metrics["global"]["dummy"]["mae"]


def test_the_global_metric_is_made_of_the_sites_sums(finished) -> None:  # type: ignore[no-untyped-def]
    _, metrics = finished
    own = [(r["own"]["federated"]["n"], r["own"]["federated"]["mae"]) for r in metrics["sites"].values()]
    assert metrics["global"]["federated"]["mae"] == pytest.approx(sum(n * m for n, m in own) / sum(n for n, _ in own))


def test_the_same_plan_and_data_again_are_the_same_run_and_cost_nothing(finished) -> None:  # type: ignore[no-untyped-def]
    run, metrics = finished
    again = pipeline.open_run(run.consortium_file, home=run.home)
    assert again.folder == run.folder
    assert list(pipeline.train(again)) == []
    assert files.sha256_file(run.folder / "model.safetensors") == metrics["model"]["sha256"]


def test_finished_baselines_are_kept_and_a_damaged_one_is_trained_again(finished) -> None:  # type: ignore[no-untyped-def]
    run, _ = finished
    path = run.folder / "arms" / "local-mill.safetensors"
    data = path.read_bytes()
    said: list[str] = []
    pipeline.baselines(run, said.append)
    assert said == []
    path.write_bytes(data[:-1])
    pipeline.baselines(run, said.append)
    assert said
    assert path.read_bytes() == data


def test_another_home_gives_the_same_bytes(finished, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run, metrics = finished
    other = whole(pipeline.open_run(run.consortium_file, home=tmp_path / "elsewhere"))
    assert json.dumps(other, sort_keys=True) == json.dumps(metrics, sort_keys=True)


@pytest.mark.slow
def test_one_process_per_site_gives_the_same_bytes(finished, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    _, metrics = finished
    run = pipeline.open_run(small.build(tmp_path / "c", rounds=12, isolation="process"), home=tmp_path / "home")
    for site in run.sites:
        pipeline.prepare_site(run, site)
    list(pipeline.train(run))
    assert files.sha256_file(run.folder / "model.safetensors") == metrics["model"]["sha256"]


def test_changed_data_is_another_run(finished, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run, _ = finished
    path = small.build(tmp_path / "c", rounds=12)
    lab = tmp_path / "c/mill/lab.csv"
    lab.write_text(lab.read_text() + "Cu0.5Fe0.5,25.0,160.5\n")
    other = pipeline.open_run(path, home=tmp_path / "home")
    for site in other.sites:
        pipeline.prepare_site(other, site)
    assert other.folder.name != run.folder.name


KILLED = """
import sys
from pathlib import Path
from fedmat import pipeline
run = pipeline.open_run(Path(sys.argv[1]), home=Path(sys.argv[2]))
for site in run.sites:
    pipeline.prepare_site(run, site)
for report in pipeline.train(run):
    print(report.round, flush=True)
"""


@pytest.mark.slow
def test_a_run_killed_by_the_kernel_resumes_to_the_same_bytes(finished, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run, metrics = finished
    command = [sys.executable, "-c", KILLED, str(run.consortium_file), str(tmp_path / "home")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 4:
                break
        time.sleep(0.03)
        os.kill(process.pid, signal.SIGKILL)
    cut = pipeline.open_run(run.consortium_file, home=tmp_path / "home")
    assert 5 <= len(cut.reports()) < 12
    left = list(pipeline.train(cut))
    assert 0 < len(left) <= 7
    assert [r["round"] for r in cut.reports()] == list(range(12))
    assert files.sha256_file(cut.folder / "model.safetensors") == metrics["model"]["sha256"]


def test_a_consortium_of_real_companies_has_no_pooled_model_and_shares_no_local_one(tmp_path: Path) -> None:
    run = pipeline.open_run(small.build(tmp_path / "c", simulated=False), home=tmp_path / "home")
    metrics = whole(run)
    assert "pooled" not in metrics["global"]
    assert "local_mean" not in metrics["global"]
    for row in metrics["sites"].values():
        assert set(row["own"]) == {"local", "federated", "finetuned", "personal"}
        assert row["global"] == {}
        assert sum(row["mixture"].values()) == pytest.approx(1.0)
    arms = sorted(p.name for p in (run.folder / "arms").glob("*.safetensors"))
    assert arms == sorted(f"{a}-{s}.safetensors" for a in ("local", "finetuned", "personal") for s in run.sites)
    assert all((run.folder / "arms" / a).stat().st_size < 12_000 for a in arms), "weights of a local model left its site"


def test_evaluating_without_baselines_is_not_evidenced_rather_than_empty(tmp_path: Path) -> None:
    run = pipeline.open_run(small.build(tmp_path / "c"), home=tmp_path / "home")
    for site in run.sites:
        pipeline.prepare_site(run, site)
    list(pipeline.train(run))
    with pytest.raises(NotEvidenced, match="was not trained"):
        pipeline.evaluate(run)


def test_a_run_named_by_its_data_needs_prepared_sites(tmp_path: Path) -> None:
    run = pipeline.open_run(small.build(tmp_path / "c"), home=tmp_path / "home")
    with pytest.raises(StateError, match=r"manifest\.json: no such file"):
        _ = run.folder


def test_a_refused_site_takes_no_part_and_the_run_goes_on_and_says_so(finished, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = small.build(tmp_path / "c", rounds=2)
    run = pipeline.open_run(path, home=tmp_path / "home")
    lab = tmp_path / "c/mill/lab.csv"
    good = lab.read_text()
    pipeline.prepare_site(run, "mill")  # an earlier good version exists, and must not be used in place of refused data
    lab.write_text(good.replace("Cu", "Qq"))
    for site in ("forge", "foundry"):
        pipeline.prepare_site(run, site)
    with pytest.raises(SiteRefused, match="mill"):
        pipeline.prepare_site(run, "mill")
    reports = list(pipeline.train(run))
    assert reports[-1].accepted == ("forge", "foundry")
    pipeline.baselines(run)
    metrics = pipeline.evaluate(run)
    assert set(metrics["sites"]) == {"forge", "foundry"}
    assert [(x["site"], x["round"], x["reason"]) for x in metrics["exclusions"]] == [("mill", -1, "refused")]
    assert "mill took no part in this run" in pipeline.report(run).read_text()
    lab.write_text(good)
    pipeline.prepare_site(run, "mill")
    assert list(pipeline.train(run))[-1].accepted == ("forge", "foundry", "mill"), "mended data are another run"


def test_records_that_two_companies_hold_are_trained_on_once_and_what_is_tested_on_never(tmp_path: Path) -> None:
    path = small.build(tmp_path / "c", rounds=2)
    forge, mill = tmp_path / "c/forge/lab.csv", tmp_path / "c/mill/lab.csv"
    copied = forge.read_text().splitlines()[1:31]
    mill.write_text(mill.read_text() + "\n".join(copied) + "\n")
    run = pipeline.open_run(path, home=tmp_path / "home")
    metrics = whole(run)
    gone = {s: sum(c.values()) for s, c in metrics["matching"]["removed"].items()}
    assert gone["mill"] > 0 and gone["foundry"] == 0
    assert [pair["sites"] for pair in metrics["matching"]["shared"]] == [["forge", "mill"]]
    trained: set[tuple[float, ...]] = set()
    tables = {s: pipeline.kept_table(run, s) for s in run.sites}
    tested = {tuple(row) for t in tables.values() for row in t.part(TEST).x}
    for site, t in tables.items():
        whole_table = pipeline.site_table(run, site)
        assert len(whole_table) - len(t) == gone[site]
        assert len(whole_table.part(TEST)) == len(t.part(TEST))
        mine = {tuple(row) for row in t.part(TRAIN, VALIDATION).x}
        assert metrics["sites"][site]["n_train"] == len(t.part(TRAIN))
        assert not mine & trained and not mine & tested, site
        trained |= mine
    assert f"{sum(gone.values())} rows" in pipeline.report(run).read_text()


def test_a_consortium_that_looks_for_no_duplicates_has_no_secret(tmp_path: Path) -> None:
    run = pipeline.open_run(small.build(tmp_path / "c", rounds=1, deduplicate=False), home=tmp_path / "home")
    for site in run.sites:
        pipeline.prepare_site(run, site)
    list(pipeline.train(run))
    assert not (run.home / pipeline.SECRET).exists()
    other = pipeline.open_run(small.build(tmp_path / "d", rounds=1), home=tmp_path / "home2")
    for site in other.sites:
        pipeline.prepare_site(other, site)
    list(pipeline.train(other))
    assert (other.home / pipeline.SECRET).stat().st_mode & 0o077 == 0


def test_a_site_file_of_another_name_or_record_type_is_refused(tmp_path: Path) -> None:
    path = small.build(tmp_path / "c")
    site = tmp_path / "c/mill/site.yaml"
    good = site.read_text()
    site.write_text(good.replace("site: mill", "site: quarry"))
    with pytest.raises(ConfigError, match="says site 'quarry'"):
        pipeline.open_run(path, home=tmp_path / "home")
    site.write_text(good.replace("record_type: alloy", "record_type: battery_cell"))
    with pytest.raises(ConfigError, match="battery_cell"):
        pipeline.open_run(path, home=tmp_path / "home")


def test_starting_afresh_forgets_earlier_rounds_and_ends_in_the_same_bytes(finished, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run, metrics = finished
    again = pipeline.open_run(run.consortium_file, home=tmp_path / "home")
    for site in again.sites:
        pipeline.prepare_site(again, site)
    rounds = pipeline.train(again)
    next(rounds)
    rounds.close()
    assert len(list(pipeline.train(again, resume=False))) == 12
    assert files.sha256_file(again.folder / "model.safetensors") == metrics["model"]["sha256"]
