"""Prefect at a site: readiness that is true, rounds that are shown where there is a server and never wait for one."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import small
import yaml
from prefect_server import Server

from fedmat import files, pipeline
from fedmat._version import __version__
from fedmat.data.contract import CONTRACT_VERSION
from fedmat.domain import Dropout
from fedmat.errors import DataError, FedmatError, StateError
from fedmat.federation.engine import Failure
from fedmat.party import Party
from flows import desk
from flows.desk import Pages
from flows.services import announce, take_port, withdraw
from flows.site import READY, prepare_party

pytestmark = pytest.mark.timeout(600)

SECRET = "cell-value-9ZK"
PARTY = {"schema": "fedmat/party/1", "party": "mill", "kind": "site", "organisation": "Mill Ltd", "consortium": "small-alloys"}


def join(folder: Path, **plan: Any) -> Path:
    """A site's folder on its own machine, which has no other member's files."""
    consortium = small.build(folder / "c", **plan)
    for other in ("forge", "foundry"):
        (folder / "c" / other / "site.yaml").unlink()
    home = folder / "home"
    site_file = folder / "c/mill/site.yaml"
    files.write_json(home / "party.json", {**PARTY, "host": "localhost", "port": 1, "site_file": str(site_file)})
    (home / "consortium.yaml").write_bytes(consortium.read_bytes())
    return home


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return join(tmp_path)


# --- readiness -------------------------------------------------------------------------------------------------------


def test_the_certificate_says_what_was_prepared_and_refused_data_take_it_away(home: Path) -> None:
    prepare_party.fn(str(home))
    found = files.read_json(home / READY)
    run = Party.load(home).run()
    manifest = files.read_json(run.site_folder("mill") / "manifest.json")
    assert found["dataset_sha256"] == manifest["sha256"]
    assert found["features_sha256"] == pipeline.site_table(run, "mill").sha256
    assert (found["contract_version"], found["fedmat"], found["n_records"]) == (CONTRACT_VERSION, __version__, 60)
    assert found["privacy"] is None
    assert set(found) == {
        "schema", "party", "consortium", "date", "dataset_sha256", "contract_version", "n_records", "n_rejected",
        "features_sha256", "n_features", "version", "fedmat", "privacy",
    }  # fmt: skip
    (home.parent / "c/mill/lab.csv").write_text("Alloy,Test temp (C),Vickers\n" + f"{SECRET},25,{SECRET}\n" * 40)
    with pytest.raises(DataError) as caught:
        prepare_party.fn(str(home))
    assert SECRET not in str(caught.value)
    assert not (home / READY).exists()


def test_the_certificate_of_a_private_plan_says_what_is_left_of_the_budget(tmp_path: Path) -> None:
    from fedmat.federation.site import LEDGER
    from fedmat.privacy.accounting import BudgetLedger, Event
    from flows.site import _budget

    home = join(tmp_path, privacy={"unit": "record", "epsilon": 8.0, "delta": 1e-5})
    run = Party.load(home).run()
    assert _budget(run, "mill") == {"epsilon": 8.0, "delta": 1e-5, "left": 8.0}
    ledger = BudgetLedger.create(run.site_folder("mill") / LEDGER, site="mill", epsilon=8.0, delta=1e-5)
    ledger.spend(Event(2.0, 0.1, 10), run="r", round=0)
    after = _budget(run, "mill")
    assert after is not None
    assert 0 < after["left"] < 8.0


def test_a_role_has_nothing_to_prepare(home: Path) -> None:
    files.write_json(home / "party.json", {**files.read_json(home / "party.json"), "kind": "notary"})
    with pytest.raises(StateError, match="no site"):
        prepare_party.fn(str(home))


# --- rounds without a server -----------------------------------------------------------------------------------------


class Work:
    """A round's work, counted."""

    def __init__(self, answer: bytes | Failure | Exception = b"update") -> None:
        self.answer, self.times = answer, 0

    def __call__(self) -> bytes | Failure:
        self.times += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def done(pages: Pages, work: Work, request: bytes = b"request", kind: str = desk.WATCHED) -> tuple[bytes | Failure, float]:
    """One request as the desk process answers it: the reply, and the seconds it took."""
    started = time.perf_counter()
    reply = pages.naming(lambda *_: pages.around(kind, work))(b"consortium", request, {})
    return reply, time.perf_counter() - started


class Half:
    """A server that says it is well and does nothing else."""

    def __init__(self) -> None:
        half = self
        self.asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                half.asked.append(self.path)
                self.send_response(200 if self.path.endswith("/health") else 500)
                self.end_headers()

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def half() -> Iterator[Half]:
    server = Half()
    yield server
    server.close()


def test_a_round_without_a_server_is_the_bare_function(home: Path) -> None:
    work = Work()
    assert done(Pages(home), work)[0] == b"update"
    assert work.times == 1


def test_a_server_that_is_down_costs_nothing_and_is_not_asked_again(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{take_port(0, '')}/api")
    pages, work = Pages(home), Work()
    seconds = [done(pages, work)[1] for _ in range(20)]
    assert sum(seconds) < 0.5
    assert work.times == 20
    assert caplog.records == []


def test_a_server_that_hangs_delays_one_round_by_half_a_second(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/api")
        pages = Pages(home)
        first, *others = [done(pages, Work())[1] for _ in range(5)]
    assert first < 2 * desk.HEALTH_S + 0.5
    assert sum(others) < 0.5


def test_a_server_that_fails_in_the_midst_costs_one_log_line_and_no_work_twice(
    home: Path, half: Half, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"{half.url}/api")
    pages, work = Pages(home), Work()
    pages._ready.set()  # or it would never come so far
    with caplog.at_level(logging.INFO, logger="flows"):
        for _ in range(5):
            assert done(pages, work)[0] == b"update"
    assert work.times == 5
    assert len(caplog.records) == 1
    assert "rounds go on without pages" in caplog.text
    assert sum(path.endswith("/health") for path in half.asked) == 1


def test_a_first_round_does_not_wait_for_imports(home: Path, half: Half, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"{half.url}/api")
    monkeypatch.setattr(Pages, "_import", lambda *_: time.sleep(30))
    reply, seconds = done(Pages(home), Work())
    assert reply == b"update"
    assert seconds < 0.5
    assert [p for p in half.asked if not p.endswith("/health")] == []


def test_only_requests_of_rounds_are_shown(home: Path, half: Half, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"{half.url}/api")
    pages = Pages(home)
    for kind in ("AttestRequest", "EvaluateRequest", "CommitRequest"):
        assert done(pages, Work(), kind=kind)[0] == b"update"
    assert half.asked == []


def test_the_desk_process_answers_through_its_pages(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    class Desk:
        def __init__(self, home: Path, *, around: Any) -> None:
            self.around = around

        def answer(self, consortium: bytes, request: bytes, stated: Any) -> Any:
            return self.around("TrainRequest", lambda: consortium + request)

        def warm(self) -> None:
            """Nothing to start."""

    class DeskServer:
        def __init__(self, home: Path, answer: Any) -> None:
            self.answer = answer

        def serve_forever(self) -> None:
            said.append(self.answer(b"c", b"r", {}))

    monkeypatch.setattr(desk, "Desk", Desk)
    monkeypatch.setattr(desk, "DeskServer", DeskServer)
    desk.main(home)
    assert said == [b"cr"]


# --- rounds with a server --------------------------------------------------------------------------------------------


@pytest.fixture
def pages(home: Path, server: Server) -> Iterator[Pages]:
    """The pages of a site whose own Prefect runs, as ``fedmat ui`` and a served schedule announce it."""
    announce(home, server.child, server.url)
    found = Pages(home)
    found.there()
    assert found.wait(60)
    yield found
    withdraw(home)


def flow_runs(server: Server, **wanted: Any) -> list[dict[str, Any]]:
    import urllib.request

    body = json.dumps({"flow_runs": wanted, "limit": 200}).encode()
    request = urllib.request.Request(f"{server.url}/api/flow_runs/filter", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return list(json.load(reply))


@pytest.mark.slow
def test_a_round_is_shown_by_references_and_costs_a_fraction_of_a_second(
    pages: Pages, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = [done(pages, Work(b"the answer " + SECRET.encode()), b"request %d" % n)[1] for n in range(12)]
    with capsys.disabled():
        print(f"\na round in a flow: first {seconds[0]:.2f} s, then {statistics.median(seconds[1:]):.2f} s (median of 11)")
    assert statistics.median(seconds) < 2.0
    asked = {files.sha256(b"request %d" % n) for n in range(12)}
    found = [r for r in flow_runs(server) if r["parameters"].get("request_sha256") in asked]
    assert len(found) == 12
    assert {r["state_type"] for r in found} == {"COMPLETED"}
    for r in found:
        assert set(r["parameters"]) == {"consortium_sha256", "kind", "request_sha256"}
        assert r["parameters"]["consortium_sha256"] == files.sha256(b"consortium")
    assert SECRET.encode() not in server.everything()


@pytest.mark.slow
def test_an_answer_that_is_none_is_shown_as_one(pages: Pages, server: Server) -> None:
    late = Dropout("mill", "late", f"no answer within 120 s {SECRET}")
    assert done(pages, Work(late), b"late")[0] == late
    (run,) = [r for r in flow_runs(server) if r["parameters"].get("request_sha256") == files.sha256(b"late")]
    assert (run["state_type"], run["state"]["message"]) == ("FAILED", "no answer: dropout, late")


@pytest.mark.slow
def test_no_error_carries_a_value_to_the_server(pages: Pages, home: Path, server: Server) -> None:
    work = Work(ValueError(f"could not convert {SECRET}"))
    with pytest.raises(FedmatError, match="step round: unexpected ValueError"):
        done(pages, work, b"foreign")
    with pytest.raises(StateError, match="half written"):
        done(pages, Work(StateError("half written", fix="restore it")), b"ours")
    assert work.times == 1
    assert SECRET in (home / "sites/mill/state/errors/round.txt").read_text()
    held = server.everything()
    assert b"unexpected ValueError" in held
    assert SECRET.encode() not in held


# --- a schedule ------------------------------------------------------------------------------------------------------

SERVE = """
import sys
from datetime import timedelta
from flows.serve import serve_party
serve_party(sys.argv[1], every=timedelta(seconds=15), name="tests-site", say=lambda text: print(text, flush=True))
"""


@pytest.mark.slow
def test_a_scheduled_preparation_happens_at_the_site(home: Path, server: Server) -> None:
    env = {**os.environ, "PREFECT_API_URL": f"{server.url}/api", "PREFECT_RUNNER_POLL_FREQUENCY": "2"}
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, str(home)], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert "mill: serving prepare-party/tests-site, every 0:00:15" in said
            until = time.monotonic() + 240
            found: list[dict[str, Any]] = []
            while not found and time.monotonic() < until:
                time.sleep(1)
                done = flow_runs(server, state={"type": {"any_": ["COMPLETED"]}})
                found = [r for r in done if r["parameters"].get("home") == str(home) and r["auto_scheduled"]]
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            finally:
                process.kill()
    assert found, "no scheduled run completed"
    assert found[0]["name"] == "small-alloys/mill"
    certificate = files.read_json(home / READY)
    assert (certificate["party"], certificate["n_records"]) == ("mill", 60)


def test_only_a_site_has_a_schedule(home: Path) -> None:
    from flows.serve import serve_party

    files.write_json(home / "party.json", {**files.read_json(home / "party.json"), "kind": "notary"})
    with pytest.raises(StateError, match="no site"):
        serve_party(home)


def test_the_consortium_file_of_a_party_lists_sites_that_are_not_here(home: Path) -> None:
    """Otherwise nothing above would show that a site needs no other member's file."""
    members = yaml.safe_load((home / "consortium.yaml").read_text())["members"]
    assert [m["site"] for m in members if (home.parent / "c" / m["file"]).exists()] == ["mill"]
