"""Under a real Prefect server: the same bytes, pages worth opening, and nothing raw in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small
import yaml
from prefect_server import Server

from fedmat.domain import RoundReport
from fedmat.errors import DataError, FedmatError, ServiceError
from fedmat.pipeline import open_run
from flows import Outcome, run_all
from flows.services import announce, prefect_home, withdraw
from flows.shared import Event, call, flow, may_pass, perform, task

pytestmark = pytest.mark.slow
ROUNDS = 30
SECRET = "cell-value-7QX"


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.build(tmp_path_factory.mktemp("alloys") / "c", rounds=ROUNDS)


@pytest.fixture(scope="module")
def bare(consortium: Path) -> Outcome:
    return run_all(consortium, home=consortium.parent / "bare", orchestrator="none", register=False)


@pytest.fixture(scope="module")
def served(consortium: Path, server: Server) -> Outcome:
    with server.configured():
        return run_all(consortium, home=consortium.parent / "served", register=False)


@pytest.fixture
def api(server: Server) -> Iterator[Any]:
    """Prefect's client on the test server."""
    from prefect.client.orchestration import get_client

    with server.configured(), get_client(sync_client=True) as client:
        yield client


def artifacts(api: Any) -> dict[str, Any]:
    return {a.key: a for a in api.read_artifacts()}


def test_a_running_server_is_used_and_changes_no_byte(bare: Outcome, served: Outcome, server: Server) -> None:
    assert (served.orchestrator.name, served.orchestrator.url) == ("prefect", server.url)
    assert served.model_sha256 == bare.model_sha256
    assert {**served.metrics(), "x": 0} == {**bare.metrics(), "x": 0}


def test_without_any_server_a_short_lived_one_is_used_changes_no_byte_and_leaves_no_process(
    bare: Outcome, consortium: Path
) -> None:
    from prefect.settings import get_current_settings

    home = consortium.parent / "alone"
    outcome = run_all(consortium, home=home, register=False, orchestrator="prefect")
    assert "short-lived" in outcome.orchestrator.why
    assert outcome.model_sha256 == bare.model_sha256
    assert (home / "prefect" / "prefect.db").stat().st_size > 100_000
    assert get_current_settings().api.url is None, "settings of the run outlived it"
    lines = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/environ") if _readable(p)]
    assert not [line for line in lines if str(home).encode() in line], "a server outlived its run"


def _readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


def test_a_server_that_runs_for_the_home_is_found(bare: Outcome, consortium: Path, server: Server, tmp_path: Path) -> None:
    announce(tmp_path, server.child, server.url)
    outcome = run_all(consortium, home=tmp_path, register=False)
    withdraw(tmp_path)
    assert outcome.orchestrator.url == server.url
    assert outcome.model_sha256 == bare.model_sha256


def test_the_pages_show_every_round_every_site_and_the_benefit(served: Outcome, api: Any) -> None:
    found = artifacts(api)
    name = "small-alloys"
    assert found[f"{name}-progress"].data == 100.0
    rounds = json.loads(found[f"{name}-rounds"].data)
    assert [r["round"] for r in rounds] == list(range(1, ROUNDS + 1))
    assert rounds[-1]["validation mae"] < rounds[0]["validation mae"]
    assert {r["site"] for r in json.loads(found[f"{name}-benefit"].data)} == set(small.COMPANIES)
    for site in small.COMPANIES:
        assert json.loads(found[f"{site}-validation"].data)[0] == {"what": "accepted", "rows": 60}


def test_runs_are_named_and_tagged_by_consortium_site_and_run(served: Outcome, api: Any) -> None:
    runs = {r.name: set(r.tags) for r in api.read_flow_runs(limit=200)}
    assert f"small-alloys/{served.run.run_id}" in runs
    for site in small.COMPANIES:
        assert runs[f"small-alloys/{site}"] >= {"consortium:small-alloys", f"site:{site}"}


def test_parameters_are_references(served: Outcome, api: Any) -> None:
    for r in api.read_flow_runs(limit=200):
        for value in r.parameters.values():
            assert value is None or isinstance(value, str | bool | int)
            assert len(str(value)) < 300


# --- retries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "attempts"), [(ServiceError("the remote is away"), 3), (DataError("a column is missing"), 1)]
)
def test_only_a_service_that_failed_is_asked_again(
    server: Server, consortium: Path, trouble: FedmatError, attempts: int
) -> None:
    run = open_run(consortium, home=consortium.parent / "retries")
    tried: list[int] = []

    def work() -> None:
        tried.append(1)
        raise trouble

    @task(name="push", retries=2, retry_delay_seconds=0, retry_condition_fn=may_pass)
    def push() -> None:
        perform("push", work, run=run, site="mill")

    @flow(name="retries")
    def pushes() -> None:
        call(push)

    with server.configured(), pytest.raises(type(trouble), match=trouble.what):
        pushes()
    assert len(tried) == attempts


# --- nothing raw ---------------------------------------------------------------------------------------------------


def test_neither_states_nor_logs_nor_the_database_hold_what_a_foreign_error_said(
    server: Server, consortium: Path, api: Any, tmp_path: Path
) -> None:
    run = open_run(consortium, home=tmp_path / "home")

    def work() -> None:
        try:
            raise KeyError(SECRET)
        except KeyError:
            raise ValueError(f"could not convert string to float: {SECRET!r}")  # noqa: B904  the context is the point

    @task(name="leaky")
    def leaky() -> None:
        perform("ingest", work, run=run, site="mill")

    @flow(name="leaky-site")
    def leaky_site() -> None:
        call(leaky)

    with server.configured(), pytest.raises(FedmatError):
        leaky_site()
    texts = json.dumps([line.model_dump(mode="json") for line in api.read_logs(limit=200)])
    assert "unexpected ValueError" in texts, "the search would find nothing because nothing was logged"
    assert any((prefect_home(server.home) / "storage").iterdir()), "the pickled exception is not among what is searched"
    held = texts.encode() + server.everything()
    assert b"unexpected ValueError" in held
    assert SECRET.encode() not in held
    assert SECRET in (run.site_folder("mill") / "state" / "errors" / "ingest.txt").read_text()


# --- losing Prefect ------------------------------------------------------------------------------------------------


def test_a_server_lost_during_the_run_costs_the_pages_and_not_the_run(bare: Outcome, consortium: Path) -> None:
    from flows.services import prefect_server

    home = consortium.parent / "lost"
    child = prefect_server(home)
    try:
        child.wait_ready(180)
        announce(home, child, child.url.removesuffix("/api/health"))
        rounds: list[int] = []

        def pull_the_plug(event: Event) -> None:
            if isinstance(event, RoundReport):
                rounds.append(event.round)
                if event.round == 4:
                    child.stop(0)

        outcome = run_all(consortium, home=home, register=False, on_event=pull_the_plug)
    finally:
        child.stop()
    assert outcome.orchestrator.name == "none"
    assert outcome.model_sha256 == bare.model_sha256
    assert rounds == list(range(ROUNDS)), "a round was done twice or not at all"


# --- prefect.yaml --------------------------------------------------------------------------------------------------


def test_everything_in_prefect_yaml_can_be_deployed(server: Server, api: Any, project: Path) -> None:
    import os
    import subprocess
    import sys

    from prefect.client.schemas.actions import WorkPoolCreate

    said = yaml.safe_load((project / "prefect.yaml").read_text())["deployments"]
    for pool in {d["work_pool"]["name"] for d in said}:
        api.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=project,
        env={**os.environ, "PREFECT_API_URL": f"{server.url}/api", "PREFECT_HOME": str(prefect_home(server.home))},
        check=True,
        capture_output=True,
    )
    found = {d.name: d for d in api.read_deployments()}
    assert set(found) >= {d["name"] for d in said}
    (nightly,) = found["nightly"].schedules
    assert (nightly.schedule.cron, nightly.schedule.timezone) == ("0 2 * * *", "Europe/Berlin")
    assert found["nightly"].global_concurrency_limit.limit == 1
    assert found["prepare-ev-cells"].work_pool_name == "site-ev-cells"
