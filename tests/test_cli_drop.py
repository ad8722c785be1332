"""The commands of a file drop: what they write, how they refuse, and that each says which file goes where next.

Also the rig of all tests about drop files: an operator's project folder, parties' folders and a stick, with real certificates.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import small
import yaml
from typer.testing import CliRunner, Result

from fedmat import cli_drop, credentials, files, party
from fedmat.cli import app
from fedmat.credentials import Credential
from fedmat.domain import Dropout, Rejection
from fedmat.federation import drop
from fedmat.federation.drop import DropEngine
from fedmat.federation.engine import Failure, Handler, answer

NOW = datetime(2026, 1, 5, 12, tzinfo=UTC)
HOST = "fl.grove.example"
YAML = b"name: grove\n"


GROVE = "grove"


@functools.cache
def root(of: str) -> Credential:
    """A consortium's own root."""
    return credentials.new_root(of, NOW - timedelta(days=1), 400)


@functools.cache
def credential(name: str, of: str = GROVE, days: int = 300) -> Credential:
    """A certificate of a consortium's root, and its key; the server is called HOST."""
    key = credentials.new_key()
    purpose: Any = "server" if name == HOST else "party"
    made = credentials.issue(
        root(of), key.public_key(), name=name, organisation="Org", purpose=purpose, now=NOW - timedelta(hours=2), days=days
    )
    return Credential(name, made, credentials.pem(key))


class Stopped(Exception):
    """A coordinator that was stopped while it waited."""


class Rig:
    """An operator's project folder, the parties' own folders, and the stick that is carried between them."""

    def __init__(self, folder: Path, sites: Sequence[str]) -> None:
        self.project, self.stick, self.now = folder / "project", folder / "stick", NOW
        self.run, self.drop = folder / "run", self.project / "drop"
        self.homes = {s: folder / "homes" / s for s in sites}
        self.runs: list[str] = []
        self.stick.mkdir(parents=True)
        self.run.mkdir()
        files.write_atomic(self.project / "ca" / "ca.crt", root(GROVE).certificate)
        files.write_json(self.project / "revoked.json", {"serials": []})
        for site, home in self.homes.items():
            files.write_json(home / "party.json", {"party": site, "consortium": "grove", "host": HOST})
            self.give(site, credential(site))

    def give(self, site: str, made: Credential) -> None:
        """Puts a certificate into a site's folder."""
        startup = self.homes[site] / "flare" / "startup"
        files.write_atomic(startup / "client.crt", made.certificate)
        files.write_atomic(startup / "client.key", made.key, private=True)
        files.write_atomic(startup / "rootCA.pem", root(GROVE).certificate)

    def engine(self, **more: Any) -> DropEngine:
        """The coordinator's engine for all sites of this rig."""
        settings: dict[str, Any] = {"consortium": "grove", "consortium_file": YAML, "run_folder": self.run, "poll_s": 0.01}
        settings |= {"credential": credential(HOST), "root": root(GROVE).certificate, "now": lambda: self.now}
        return DropEngine(self.drop, tuple(self.homes), **(settings | more))

    def ask(self, requests: Mapping[str, bytes], **more: Any) -> list[bytes | Failure] | None:
        """What a coordinator hears that asks and does not wait; None where it has to."""

        def stop(_: object) -> None:
            raise Stopped

        with self.engine(on_wait=stop, **more) as engine:
            try:
                return [reply for reply, _ in engine.exchange(requests, 1.0)]
            except Stopped:
                return None

    def carry(self, site: str, handler: Handler) -> Path:
        """Brings a site its request and lets it answer; returns the answer on the stick."""
        (request,) = drop.export_requests(self.drop, self.stick, site)
        return self.answer(request, site, handler)

    def answer(self, request: Path, site: str, handler: Handler) -> Path:
        """Lets a site answer a request on the stick."""

        def worker(consortium: bytes, data: bytes, _: Mapping[str, str]) -> bytes | Failure:
            assert consortium == YAML
            self.runs.append(site)
            return answer(site, handler, data)

        return drop.run_request(request, self.homes[site], worker, now=self.now)

    def bring(self, file: Path, revoked: Sequence[str] = ()) -> drop.ImportedAnswer:
        """Brings an answer back."""
        return drop.import_answer(file, self.drop, root(GROVE).certificate, revoked, self.now)

    @contextmanager
    def person(self, handlers: Mapping[str, Handler]) -> Iterator[None]:
        """Somebody who carries every file as soon as it is there."""
        done, trouble, carried = threading.Event(), list[BaseException](), set[Path]()

        def carry() -> None:
            try:
                while not done.wait(0.005):
                    for request in drop.export_requests(self.drop, self.stick):
                        site = request.name.rsplit("-", 2)[0]
                        if request not in carried:
                            carried.add(request)
                            self.bring(self.answer(request, site, handlers[site]))
            except BaseException as error:
                trouble.append(error)

        thread = threading.Thread(target=carry)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        assert not trouble, trouble

    def state(self) -> dict[str, bytes]:
        """Every file of the operator's drop folder."""
        return {str(p.relative_to(self.drop)): p.read_bytes() for p in self.drop.rglob("*") if p.is_file()}


# --- the commands ------------------------------------------------------------------------------------------------


class FakeDesk:
    """A desk that says what the test wants."""

    said: Callable[[bytes], bytes | Failure] = staticmethod(lambda data: b"yes " + data)
    opened, closed = 0, 0

    def __init__(self, home: Path) -> None:
        assert home.is_dir()
        type(self).opened += 1

    def answer(self, consortium: bytes, request: bytes, stated: Mapping[str, str] | None = None) -> bytes | Failure:
        assert consortium == YAML and stated is not None and "fedmat" in stated
        return type(self).said(request)

    def close(self) -> None:
        type(self).closed += 1


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> type[FakeDesk]:
    """The desk that run-request opens."""
    made = type("Desk", (FakeDesk,), {})
    monkeypatch.setattr(party, "Desk", made)
    return made


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A project whose site mill has no connection, and a request that waits for it."""
    found = Rig(tmp_path, ("mill", "forge"))
    text = yaml.safe_load(small.build(tmp_path / "c").read_text())
    for member in text["members"]:
        member["transport"] = "files" if member["site"] == "mill" else "direct"
    (found.project / "consortium.yaml").write_text(yaml.safe_dump(text))
    monkeypatch.setattr(cli_drop, "_now", lambda: NOW)
    monkeypatch.chdir(found.stick)
    assert found.ask({"mill": b"what"}) is None
    return found


def fedmat(*words: object) -> Result:
    """Runs a command about a site in this process."""
    return CliRunner().invoke(app, ["site", *map(str, words)], env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"})


def plain(result: Result) -> str:
    """All that was said, without frames and line breaks."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", result.output)


def said(result: Result) -> Any:
    """A command's answer to a machine."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def next_command(result: Result) -> list[str]:
    """The command that was said to come next, with the folder a person fills in."""
    assert result.exit_code == 0, result.output
    found = re.search(r"fedmat site (\S+) (\S+) (--home|--project) FOLDER", plain(result))
    assert found, result.output
    return [found[1], found[2], found[3]]


def test_each_command_says_the_next_one_until_the_answer_is_there(rig: Rig, desk: type[FakeDesk]) -> None:
    to_site = next_command(fedmat("export-request", "mill", "--project", rig.project))
    back = next_command(fedmat(*to_site, rig.homes["mill"]))
    taken = fedmat(*back, rig.project)
    assert "next: nothing: the coordinator goes on" in plain(taken)
    assert rig.ask({"mill": b"what"}) == [b"yes what"]
    assert (desk.opened, desk.closed) == (1, 1)
    nothing = fedmat("export-request", "mill", "--project", rig.project)
    assert nothing.exit_code == 0 and "no request waits" in plain(nothing)


def test_a_machine_hears_the_same(rig: Rig, desk: type[FakeDesk], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    out = said(fedmat("export-request", "mill", "--project", rig.project, "--to", tmp_path / "other", "--json"))
    (request,) = out["files"]
    assert out["site"] == "mill" and Path(request).parent == tmp_path / "other" and Path(request).name in out["next"]
    ran = said(fedmat("run-request", request, "--home", rig.homes["mill"], "--json"))
    assert Path(ran["file"]).parent == tmp_path / "other" and ran["failure"] is None
    taken = said(fedmat("import-update", ran["file"], "--project", rig.project, "--json"))
    assert not taken["again"] and Path(taken["file"]).parent == rig.drop / "in"
    again = said(fedmat("import-update", ran["file"], "--project", rig.project, "--json"))
    assert again["again"]


def test_a_request_that_is_run_twice_gives_the_same_file_without_any_work(rig: Rig, desk: type[FakeDesk]) -> None:
    (request,) = drop.export_requests(rig.drop, rig.stick, "mill")
    first = Path(said(fedmat("run-request", request, "--home", rig.homes["mill"], "--json"))["file"]).read_bytes()
    second = Path(said(fedmat("run-request", request, "--home", rig.homes["mill"], "--json"))["file"]).read_bytes()
    assert first == second
    assert desk.opened == 1


def test_a_policys_refusal_is_told_at_the_site_and_travels(rig: Rig, desk: type[FakeDesk]) -> None:
    desk.said = staticmethod(lambda _: Rejection("mill", "policy", "plans.rules: mean is not permitted"))
    (request,) = drop.export_requests(rig.drop, rig.stick, "mill")
    shown = fedmat("run-request", request, "--home", rig.homes["mill"])
    assert "mill gives no answer: policy: plans.rules" in plain(shown) and "run the same file again" in plain(shown)
    taken = fedmat(*next_command(shown), rig.project)
    assert "mill gave no answer: policy: plans.rules" in plain(taken)
    assert rig.ask({"mill": b"what"}) == [Rejection("mill", "policy", "plans.rules: mean is not permitted")]


def test_anothers_words_cannot_move_the_cursor_of_this_terminal(rig: Rig, desk: type[FakeDesk]) -> None:
    desk.said = staticmethod(lambda _: Dropout("mill", "refused", "no\x1b[2J\x9b1mway"))
    (request,) = drop.export_requests(rig.drop, rig.stick, "mill")
    back = Path(said(fedmat("run-request", request, "--home", rig.homes["mill"], "--json"))["file"])
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", fedmat("import-update", back, "--project", rig.project).output)


@pytest.mark.parametrize(
    ("site", "code", "told"),
    [("forge", 2, "over its own connection"), ("elm", 2, "no member"), ("../mill", 2, "no member")],
)
def test_only_a_site_that_files_are_carried_to_is_served(rig: Rig, site: str, code: int, told: str) -> None:
    got = fedmat("export-request", site, "--project", rig.project)
    assert got.exit_code == code and told in plain(got)


def test_a_mistyped_folder_is_not_made(rig: Rig, desk: type[FakeDesk], tmp_path: Path) -> None:
    got = fedmat("export-request", "mill", "--project", rig.project, "--to", tmp_path / "stcik")
    assert got.exit_code == 5 and "no such folder" in plain(got)
    (request,) = drop.export_requests(rig.drop, rig.stick, "mill")
    got = fedmat("run-request", request, "--home", rig.homes["mill"], "--to", tmp_path / "stcik")
    assert got.exit_code == 5 and desk.opened == 0
    assert not (tmp_path / "stcik").exists()


def test_refusals_end_with_their_code_and_their_reason(rig: Rig, desk: type[FakeDesk]) -> None:
    (request,) = drop.export_requests(rig.drop, rig.stick, "mill")
    before = rig.state()
    wrong = fedmat("import-update", request, "--project", rig.project)
    assert wrong.exit_code == 6 and "wrong_kind" in plain(wrong)
    elsewhere = fedmat("run-request", request, "--home", rig.homes["forge"])
    assert elsewhere.exit_code == 6 and "wrong_party" in plain(elsewhere)
    missing = fedmat("run-request", rig.stick / "none", "--home", rig.homes["mill"])
    assert missing.exit_code == 5 and "no such file" in plain(missing)
    no_home = fedmat("run-request", request, "--home", rig.stick)
    assert no_home.exit_code == 5 and "not a party's folder" in plain(no_home)
    assert desk.opened == 0
    back = Path(said(fedmat("run-request", request, "--home", rig.homes["mill"], "--json"))["file"])
    serial = credentials.facts(credential("mill").certificate).serial
    files.write_json(rig.project / "revoked.json", {"serials": [serial]})
    revoked = fedmat("import-update", back, "--project", rig.project)
    assert revoked.exit_code == 6 and "revoked" in plain(revoked)
    for damage in (b"[]", b"{", None):  # without the list, revoked certificates would count
        if damage is None:
            (rig.project / "revoked.json").unlink()
        else:
            (rig.project / "revoked.json").write_bytes(damage)
        assert fedmat("import-update", back, "--project", rig.project).exit_code == 5
    assert rig.state() == before
