"""A run needs no Prefect, says when it goes without, and lets no foreign text pass."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import small

from fedmat import files
from fedmat.domain import RoundReport
from fedmat.errors import ConfigError, DataError, FedmatError, ServiceError, SiteRefused
from fedmat.pipeline import MODEL, Run, open_run
from flows import Outcome, run_all
from flows.serve import serve, ui
from flows.services import orchestration, take_port
from flows.shared import Event, Step, key, perform

SECRET = "cell-value-7QX"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, list[Event]]:
    folder = tmp_path_factory.mktemp("bare")
    heard: list[Event] = []
    outcome = run_all(
        small.build(folder / "c"), home=folder / "home", orchestrator="none", register=False, on_event=heard.append
    )
    return outcome, heard


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return open_run(small.build(tmp_path / "c"), home=tmp_path / "home")


def test_plain_functions_do_the_whole_run(bare: tuple[Outcome, list[Event]]) -> None:
    outcome, _ = bare
    assert outcome.orchestrator.name == "none"
    assert outcome.report.stat().st_size > 1000
    assert outcome.metrics()["model"]["sha256"] == outcome.model_sha256 == files.sha256_file(outcome.run.folder / MODEL)


def test_a_listener_hears_every_step_and_every_round_in_order(bare: tuple[Outcome, list[Event]]) -> None:
    _, heard = bare
    done = [(e.name, e.site) for e in heard if isinstance(e, Step) and e.state == "done"]
    sites = [(step, site) for site in sorted(small.COMPANIES) for step in ("ingest", "version", "featurize")]
    assert done == [*sites, *((step, None) for step in ("train", "baselines", "evaluate", "account", "report"))]
    assert [e.round for e in heard if isinstance(e, RoundReport)] == [0, 1, 2]


def test_the_same_run_again_is_the_same_run(bare: tuple[Outcome, list[Event]]) -> None:
    outcome, _ = bare
    heard: list[Event] = []
    again = run_all(
        outcome.run.consortium_file, home=outcome.run.home, orchestrator="none", register=False, on_event=heard.append
    )
    assert again.run.folder == outcome.run.folder
    assert again.model_sha256 == outcome.model_sha256
    assert not [e for e in heard if isinstance(e, RoundReport)], "a finished run trained again"


@pytest.mark.slow
def test_a_server_that_does_not_answer_costs_the_pages_and_not_the_run(
    bare: tuple[Outcome, list[Event]], tmp_path: Path
) -> None:
    from prefect.settings import temporary_settings

    with temporary_settings({"api.url": f"http://127.0.0.1:{take_port(0, '')}/api"}):
        outcome = run_all(bare[0].run.consortium_file, home=tmp_path / "home", register=False)
        with pytest.raises(ServiceError, match="does not answer"):
            run_all(bare[0].run.consortium_file, home=tmp_path / "home", register=False, orchestrator="prefect")
    assert outcome.orchestrator.name == "none"
    assert "does not answer" in outcome.orchestrator.why
    assert outcome.model_sha256 == bare[0].model_sha256


BROKEN = """
import sys
from flows import run_all
outcome = run_all(sys.argv[1], home=sys.argv[2], register=False)
print(outcome.orchestrator.name, outcome.model_sha256, outcome.orchestrator.why)
"""


@pytest.mark.slow  # a process of its own that imports everything again
def test_a_prefect_that_cannot_be_imported_does_not_stop_a_run(
    bare: tuple[Outcome, list[Event]], tmp_path: Path, project: Path
) -> None:
    """The known case: a newer FastAPI makes importing Prefect's server raise TypeError."""
    broken = tmp_path / "broken" / "prefect"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise TypeError('unexpected keyword argument')\n")
    said = subprocess.run(
        [sys.executable, "-c", BROKEN, str(bare[0].run.consortium_file), str(tmp_path / "home")],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{broken.parent}{os.pathsep}{project}"},
    ).stdout.split(maxsplit=2)
    assert said[0] == "none"
    assert said[1] == bare[0].model_sha256
    assert "cannot be imported" in said[2]


def test_an_unknown_orchestrator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="airflow"), orchestration("airflow", tmp_path):  # type: ignore[arg-type]
        pass


# --- the boundary ----------------------------------------------------------------------------------------------------


def printed(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + repr(error) + str(error.__cause__) + str(error.__context__)


def test_a_foreign_error_leaves_its_text_at_the_site(run: Run) -> None:
    def work() -> None:
        try:
            raise KeyError(SECRET)
        except KeyError as inner:
            raise ValueError(f"could not convert string to float: {SECRET!r}") from inner

    with pytest.raises(FedmatError, match="site mill, step ingest: unexpected ValueError") as caught:
        perform("ingest", work, run=run, site="mill")
    assert SECRET not in printed(caught.value)
    kept = run.site_folder("mill") / "state" / "errors" / "ingest.txt"
    assert str(kept) in str(caught.value)
    assert kept.read_text().count(SECRET) >= 2


def test_our_own_error_passes_without_its_cause(run: Run) -> None:
    def work() -> None:
        try:
            raise ValueError(SECRET)
        except ValueError as error:
            raise DataError("mill: column 'Vickers': 3 cells are no numbers", fix="mend them") from error

    with pytest.raises(DataError, match="3 cells are no numbers") as caught:
        perform("ingest", work, run=run, site="mill")
    assert SECRET not in printed(caught.value)
    assert caught.value.fix == "mend them"
    assert caught.value.exit_code == DataError.exit_code


def test_a_step_of_the_consortium_keeps_places_and_no_text(run: Run) -> None:
    def work() -> None:
        raise RuntimeError("".join(reversed(SECRET)))  # so that the source line does not hold it

    with pytest.raises(FedmatError, match="step train: unexpected RuntimeError") as caught:
        perform("train", work, run=run)
    kept = (run.home / "errors" / "train.txt").read_text()
    assert "test_without_prefect.py" in kept
    assert SECRET[::-1] not in kept + printed(caught.value)


def test_every_site_hears_what_is_wrong_with_its_data(tmp_path: Path) -> None:
    path = small.build(tmp_path / "c")
    for site in ("forge", "mill"):
        (tmp_path / "c" / site / "lab.csv").write_text("Alloy,Test temp (C),Vickers\n" + f"{SECRET},25,{SECRET}\n" * 40)
    with pytest.raises(SiteRefused) as caught:
        run_all(path, home=tmp_path / "home", orchestrator="none")
    assert "forge" in str(caught.value)
    assert "mill" in str(caught.value)
    assert SECRET not in printed(caught.value)


# --- services ------------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_named_with_the_option_that_changes_it(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServiceError, match=rf"port {port} .*\n.*--mlflow-port"):
            ui(tmp_path, prefect_port=0, mlflow_port=port)
        with pytest.raises(ServiceError, match=rf"port {port} .*\n.*--prefect-port"):
            ui(tmp_path, prefect_port=port, mlflow_port=0)
    assert list(tmp_path.iterdir()) == [], "something was started before the refusal"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"cron": "every night"}, "every night"),
        ({"cron": "99 2 * * *"}, "99 2"),
        ({"timezone": "Europe/Atlantis"}, "Atlantis"),
        ({"every": timedelta(0)}, "too short"),
    ],
)
def test_a_schedule_that_means_nothing_is_refused_before_anything_starts(
    run: Run, wrong: dict[str, object], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        serve(run.consortium_file, home=run.home, **wrong)  # type: ignore[arg-type]
    assert not run.home.exists()


def test_artifact_keys_are_what_prefect_accepts() -> None:
    assert key("Simulated_Cells", "rounds") == "simulated-cells-rounds"
