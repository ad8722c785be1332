"""Laws of the benchmark: what it refuses, that nothing is measured twice, and that every arm sees the same rows."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import small
import yaml
from consortium import SITES, config

from fedmat import bench_report, benchmark, comparison
from fedmat.benchmark import Case, Job
from fedmat.errors import ConfigError, PlanRefused
from fedmat.federation.plan import Plan

ARMS = ("dummy", "forest", "pooled", "default", "fedavg")


def work(out: Path, *, seeds: tuple[int, ...] = (17,), arms: tuple[str, ...] = ARMS, rounds: int = 2) -> list[Job]:
    return benchmark.jobs(["tiny"], seeds, arms, out, rounds=rounds)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """The suite is one small consortium; its folder."""
    folder = tmp_path_factory.mktemp("suite")
    small.build(folder / "tiny", rounds=3, ensemble=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "SUITE", (Case("tiny", "tiny/consortium.yaml", "hardness of small alloys"),))
        patch.setattr(benchmark, "examples", lambda: folder)
        yield folder


@pytest.fixture(scope="module")
def measured(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    out, said = tmp_path_factory.mktemp("out"), []
    benchmark.run_all(work(out), 1, said.append)
    return out, said


def times(out: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in sorted((out / "tiny/17").glob("*.json"))}


# --- what it refuses -------------------------------------------------------------------------------------------------


def test_an_unknown_consortium_or_arm_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no consortium 'C4'") as error:
        benchmark.jobs(["C4"], [17], ["default"], tmp_path)
    assert "C4a" in str(error.value.fix) or "C4b" in str(error.value.fix)
    with pytest.raises(ConfigError, match="no arm 'fedprocks'") as error:
        benchmark.jobs(["demo"], [17], ["fedprocks"], tmp_path)
    assert error.value.fix == "did you mean 'fedprox'?"


def test_no_arm_named_means_all_of_them_and_each_has_one_name(tmp_path: Path) -> None:
    (job,) = benchmark.jobs(["demo"], [17], (), tmp_path)
    assert set(job.arms) == {*benchmark.BASELINES, *(m.name for m in benchmark.METHODS)}
    assert len(set(job.arms)) == len(job.arms)


def test_every_consortium_of_the_suite_is_an_example_that_is_declared_simulated() -> None:
    names = [c.name for c in benchmark.SUITE]
    assert len(set(names)) == len(names)
    for case in benchmark.SUITE:
        settings = yaml.safe_load((benchmark.examples() / case.file).read_text())
        assert settings["simulated"] is True, case.name


def test_a_consortium_of_companies_is_never_benchmarked(tmp_path: Path) -> None:
    path = small.build(tmp_path / "c", simulated=False)
    job = Job(Case("companies", "", ""), path, tmp_path / "home", tmp_path / "out", 17, ("dummy",))
    with pytest.raises(PlanRefused, match="not declared simulated"):
        benchmark.prepare(job)
    assert not (tmp_path / "home").exists()


# --- the arms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", benchmark.METHODS, ids=lambda m: m.name)
def test_every_arm_is_a_possible_plan_on_the_same_rows(method: benchmark.Method) -> None:
    """An arm changes how is trained, never which rows are held out, nor the seed."""
    plan = Plan.of(config(ensemble=3, average_last=2, server={"name": "momentum", "momentum": 0.5}))
    varied = method.vary(plan)
    if varied is None:
        assert method.name in ("single-task", "no-law", "arrhenius", "vtf"), "one task, no law and no conductivity"
        return
    assert (varied.splits, varied.roster, varied.task) == (plan.splits, plan.roster, plan.task)
    assert varied.settings.seed == plan.settings.seed and varied.settings.rounds == plan.settings.rounds
    if method.name == "default":
        assert varied.sha256 == plan.sha256
    else:
        assert varied.settings.ensemble == 1 and varied.settings.average_last == 0
        others = [m.vary(plan) for m in benchmark.METHODS if m.name != method.name]
        assert varied.sha256 not in {p.sha256 for p in others if p is not None}, "two arms are one"


def test_arms_without_tasks_or_law_keep_everything_else() -> None:
    auxiliary = ({"name": "yield", "record_type": "alloy", "target": "yield_strength_mpa", "unit": "MPa"},)
    task = {"name": "hardness", "record_type": "alloy", "target": "hardness_hv", "unit": "", "law": "decreasing"}
    plan = Plan.of(config(task=task, auxiliary=auxiliary, ensemble=2))
    vary = {m.name: m.vary for m in benchmark.METHODS}
    single, lawless = vary["single-task"](plan), vary["no-law"](plan)
    assert single.tasks == plan.tasks[:1] and single.settings == plan.settings
    assert [t.law for t in lawless.tasks] == ["none", "none"] and lawless.settings == plan.settings
    assert [t.target for t in lawless.tasks] == [t.target for t in plan.tasks]


@pytest.mark.parametrize("law", ["arrhenius", "vtf"])
def test_a_law_is_put_in_where_a_conductivity_has_none_and_nowhere_else(law: str) -> None:
    vary = {m.name: m.vary for m in benchmark.METHODS}[law]
    task = {
        "name": "x",
        "record_type": "solid_electrolyte",
        "target": "conductivity_s_cm",
        "unit": "S/cm",
        "transform": "log10",
    }
    plan = Plan.of(config(task=task, ensemble=2))
    varied = vary(plan)
    assert varied.task.law == law and varied.settings == plan.settings
    assert dataclasses.replace(varied, tasks=plan.tasks) == plan
    assert vary(varied) is None and vary(Plan.of(config())) is None


# --- measuring -------------------------------------------------------------------------------------------------------


def test_every_arm_leaves_one_file_and_nothing_else(measured) -> None:  # type: ignore[no-untyped-def]
    out, said = measured
    assert sorted(times(out)) == sorted(f"{a}.json" for a in ARMS)
    assert [p.name for p in (out / "tiny/17").iterdir() if p.is_dir()] == []
    assert said[-1].endswith("5 arms measured")


def test_all_arms_are_scored_on_the_same_rows_with_the_same_resamples(measured) -> None:  # type: ignore[no-untyped-def]
    found = benchmark.load(measured[0])["tiny"][17]
    rows = {a: {s: (e["n"], e["groups"]) for s, e in found[a]["scores"]["global"].items()} for a in ARMS}
    assert set(rows["dummy"]) == set(small.COMPANIES)
    assert all(r == rows["dummy"] for r in rows.values())
    for arm in ARMS:
        for site, e in found[arm]["scores"]["global"].items():
            assert len(e["draws"]) == 1000
            assert abs(np.mean(e["draws"]) - e["mae"]) < 0.3 * e["mae"], (arm, site)


def test_own_models_are_scored_at_home_and_local_ones_abroad(measured) -> None:  # type: ignore[no-untyped-def]
    scores = benchmark.load(measured[0])["tiny"][17]["default"]["scores"]
    abroad = {f"local:{s}" for s in small.COMPANIES}
    assert set(scores) == {"global", "local", "finetuned", "personal", *abroad}
    for site in small.COMPANIES:
        assert set(scores[f"local:{site}"]) == set(small.COMPANIES)
        assert scores[f"local:{site}"][site]["mae"] == pytest.approx(scores["local"][site]["mae"])
    found = benchmark.load(measured[0])["tiny"][17]["default"]
    assert all(sum(m.values()) == pytest.approx(1.0) for m in found["mixture"].values())
    assert all("covered" in e for e in scores["global"].values())


def test_a_second_run_measures_nothing_and_a_lost_file_is_measured_again(measured) -> None:  # type: ignore[no-untyped-def]
    out, _ = measured
    before, said = times(out), []
    benchmark.run_all(work(out), 1, said.append)
    assert said[-1].endswith("0 arms measured") and times(out) == before
    path = out / "tiny/17/dummy.json"
    result = json.loads(path.read_text())
    path.unlink()
    (job,) = work(out)
    assert benchmark.run_job(job) == ["dummy"]
    again = json.loads(path.read_text())
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in result.items() if k != "seconds"}


@pytest.mark.slow
def test_a_changed_plan_is_measured_again_and_so_is_a_changed_record(suite: Path, measured, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out, _ = measured
    arms = ("dummy", "forest")
    (job,) = work(tmp_path, arms=arms)
    job = dataclasses.replace(job, home=out / "data" / "tiny")  # prepared already
    assert benchmark.run_job(job) == list(arms)
    assert benchmark.run_job(job) == []
    assert benchmark.run_job(dataclasses.replace(job, rounds=3)) == list(arms), "another number of rounds is another plan"
    assert benchmark.run_job(job) == list(arms)
    changed = small.build(tmp_path / "changed", rounds=3, ensemble=2)
    lab = tmp_path / "changed/mill/lab.csv"
    lab.write_text(lab.read_text() + "Cu0.5Fe0.5,25.0,160.5\n")
    other = dataclasses.replace(job, file=changed, home=tmp_path / "home")
    benchmark.prepare(other)
    assert benchmark.run_job(other) == list(arms)


def test_another_seed_is_another_file_and_the_split_stays(measured, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out, _ = measured
    (job,) = work(tmp_path, seeds=(18,), arms=("dummy",))
    benchmark.run_job(dataclasses.replace(job, home=out / "data" / "tiny"))
    first = json.loads((out / "tiny/17/dummy.json").read_text())
    second = json.loads((tmp_path / "tiny/18/dummy.json").read_text())
    assert first["scores"] == second["scores"] and (first["seed"], second["seed"]) == (17, 18)


def test_the_mean_predicts_the_mean_of_all_training_rows(measured) -> None:  # type: ignore[no-untyped-def]
    from fedmat import pipeline
    from fedmat.features.table import TEST, TRAIN

    out, _ = measured
    (job,) = work(out)
    run = pipeline.open_run(job.file, home=job.home, rounds=job.rounds)
    tables = {s: pipeline.site_table(run, s) for s in run.sites}
    mean = np.concatenate([t.part(TRAIN).y for t in tables.values()]).mean()
    scores = benchmark.load(out)["tiny"][17]["dummy"]["scores"]["global"]
    for site, t in tables.items():
        assert scores[site]["mae"] == pytest.approx(np.abs(t.part(TEST).y - mean).mean())


def test_the_page_and_the_numbers_are_written_and_escape_names(measured, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    summary = comparison.summary(benchmark.load(measured[0]))
    page = bench_report.write(summary, {"tiny": "<script>alert(1)</script>"}, tmp_path)
    text = page.read_text()
    assert (
        page == tmp_path / "bench.html" and "<script>" not in text and "https://" not in text.replace("http://www.w3.org", "")
    )
    assert json.loads((tmp_path / "bench.json").read_text()) == summary
    assert "not evidenced" in text and all(site in text for site in small.COMPANIES)


def test_a_shared_row_is_trained_on_once_in_every_arm(suite: Path, tmp_path: Path) -> None:
    """One row copied from the foundry's file to the mill's: one of them leaves it out, or both if it is tested on."""
    file = small.build(tmp_path / "c", rounds=1)
    lines = (tmp_path / "c/foundry/lab.csv").read_text().splitlines()
    lab = tmp_path / "c/mill/lab.csv"
    lab.write_text(lab.read_text() + "\n".join(lines[1:21]) + "\n")
    job = Job(Case("tiny", "", ""), file, tmp_path / "home", tmp_path / "out", 17, ("dummy",))
    benchmark.prepare(job)
    from fedmat import pipeline
    from fedmat.features.table import TEST

    run = pipeline.open_run(file, home=job.home)
    run.plan()
    kept = benchmark.deduplicated(run)
    whole = {s: pipeline.site_table(run, s) for s in run.sites}
    assert sum(map(len, kept.values())) < sum(map(len, whole.values()))
    for site in run.sites:
        assert (kept[site].split == TEST).sum() == (whole[site].split == TEST).sum(), "no test row is ever left out"

    def rows(site: str, test: bool) -> set[tuple[float, ...]]:
        t = kept[site]
        return {tuple(x) for x in t.x[(t.split == TEST) == test]}

    assert not rows("foundry", False) & rows("mill", False)


def test_workers_are_the_cores_this_process_may_use() -> None:
    assert benchmark.workers_there() == len(os.sched_getaffinity(0))


def test_sites_of_the_simulator_are_what_the_arms_are_checked_on() -> None:
    assert Plan.of(config()).roster == SITES
