"""The commands that set up a consortium: a whole set-up as two people type it, what they refuse, and what they never show."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import small
import typer
from test_provision import keys_from_a_pool  # noqa: F401  a fixture that every test uses
from typer.testing import CliRunner, Result

from fedmat import cli_consortium, credentials
from fedmat.cli_consortium import consortium_app
from fedmat.cli_data import site_app
from fedmat.commands import Group

app = typer.Typer(cls=Group, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(consortium_app, name="consortium")
app.add_typer(site_app, name="site")
app.callback()(lambda debug=False: None)


class Clock:
    """A time that tests move."""

    def __init__(self) -> None:
        self.now = datetime(2026, 11, 24, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time at which commands think they run."""
    found = Clock()
    monkeypatch.setattr(cli_consortium, "_now", found)
    return found


def fedmat(*words: object) -> Result:
    """Runs a command in this process."""
    return CliRunner().invoke(app, [str(w) for w in words], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def plain(result: Result) -> str:
    """All that was said, without frames and line breaks."""
    return re.sub(r"[\s│╭╮╰╯─┃┏┓┡┩┴└┘]+", " ", result.output)


def answer(*words: object) -> dict[str, Any]:
    """What a command answers with --json; it has to be done."""
    found = fedmat(*words, "--json")
    assert found.exit_code == 0, found.output
    told: dict[str, Any] = json.loads(found.stdout)
    return told


class TwoOffices:
    """The operator's folder and a company's, and what is carried between them."""

    def __init__(self, folder: Path) -> None:
        self.consortium = small.build(folder / "c")
        self.project, self.home, self.mail = folder / "project", folder / "forge", folder / "mail"
        self.data = folder / "c/forge/site.yaml"
        self.mail.mkdir()

    def init(self, *more: object) -> dict[str, Any]:
        """The operator begins."""
        return answer("consortium", "init", self.consortium, "--project", self.project, "--host", "hub.example.org", *more)

    def post(self, path: str) -> Path:
        """Carries a file to the other office."""
        out = self.mail / Path(path).name
        out.write_bytes(Path(path).read_bytes())
        return out

    def join(self, root: str | None = None) -> dict[str, Any]:
        """The company is invited and joins."""
        kit = self.post(answer("consortium", "invite", "forge", "--project", self.project)["kit"])
        told = ["--fingerprint", root] if root else []
        return answer("site", "join", kit, "--home", self.home, "--data", self.data, *told)

    def member(self) -> None:
        """The company becomes a member."""
        self.init()
        request = self.post(self.join()["request"])
        made = self.post(answer("consortium", "admit", request, "--project", self.project)["certificate"])
        answer("site", "certificate", made, "--home", self.home)


@pytest.fixture
def offices(tmp_path: Path) -> TwoOffices:
    """Two offices with nothing done yet."""
    return TwoOffices(tmp_path)


def test_two_offices_set_up_a_consortium_by_mail_and_telephone(offices: TwoOffices) -> None:
    begun = offices.init("--port", 9000)
    assert begun["port"] == 9000 and re.fullmatch(r"[0-9a-f]{64}", begun["root"])
    joined = offices.join(begun["root"])
    assert joined["root"] == begun["root"]
    request = offices.post(joined["request"])
    made = answer("consortium", "admit", request, "--project", offices.project, "--fingerprint", joined["key"])
    assert made["fingerprint"] == joined["key"] and made["revoked"] is None
    installed = answer("site", "certificate", offices.post(made["certificate"]), "--home", offices.home)
    assert installed == {"party": "forge", "home": str(offices.home), "not_after": "2027-11-24T12:00:00+00:00"}
    members = answer("consortium", "members", "--project", offices.project)
    assert members["members"]["forge"]["state"] == "admitted" and members["not_invited"] == ["foundry", "mill"]
    assert members["ok"] and members["warnings"] == []


def test_each_step_says_who_gets_what_and_what_comes_next(offices: TwoOffices) -> None:
    said = plain(fedmat("consortium", "init", offices.consortium, "--project", offices.project, "--host", "hub.example.org"))
    assert "root's fingerprint" in said and "to invite forge, foundry, mill" in said
    said = plain(fedmat("consortium", "invite", "forge", "--project", offices.project))
    assert "send to forge" in said and "tell by telephone" in said
    kit = offices.post(str(offices.project / "kits/forge.kit"))
    said = plain(fedmat("site", "join", kit, "--home", offices.home, "--data", offices.data))
    assert "compare it with the operator's by telephone" in said and "forge.request" in said and "policy" in said
    request = offices.post(str(offices.home / "forge.request"))
    said = plain(fedmat("consortium", "admit", request, "--project", offices.project))
    assert "compare it by telephone before you send the certificate" in said and "forge.certificate" in said
    said = plain(
        fedmat("site", "certificate", offices.post(str(offices.project / "kits/forge.certificate")), "--home", offices.home)
    )
    assert "counts until 2027-11-24" in said and "hub.example.org:8002" in said
    said = plain(fedmat("consortium", "members", "--project", offices.project))
    assert "forge" in said and "admitted" in said and "not invited" in said


def test_a_kit_is_compared_with_what_was_told(offices: TwoOffices) -> None:
    offices.init()
    kit = answer("consortium", "invite", "forge", "--project", offices.project)["kit"]
    found = fedmat("site", "join", kit, "--home", offices.home, "--data", offices.data, "--fingerprint", "ab" * 32)
    assert found.exit_code == 6 and "wrong_root" in plain(found) and not offices.home.exists()


def test_a_key_is_renewed(offices: TwoOffices, clock: Clock) -> None:
    offices.member()
    clock.now += timedelta(days=340)
    assert "ends on 2027-11-24" in answer("consortium", "members", "--project", offices.project)["warnings"][2]
    asked = answer("site", "renew", "--home", offices.home)
    request = offices.post(asked["request"])
    found = fedmat("consortium", "admit", request, "--project", offices.project)
    assert found.exit_code == 6 and "already_admitted" in plain(found) and "--replace" in plain(found)
    said = plain(fedmat("consortium", "admit", request, "--project", offices.project, "--replace", "--days", 30))
    assert "the party's key of before vouches for it" in said and "revoked serial" in said and "2027-11-29" in said
    made = offices.post(str(offices.project / "kits/forge.certificate"))
    assert answer("site", "certificate", made, "--home", offices.home)["not_after"] == "2027-11-29T12:00:00+00:00"
    assert "until 2028-10-29" in plain(fedmat("consortium", "renew", "--project", offices.project))
    said = plain(fedmat("site", "renew", "--home", offices.home))
    assert "fingerprint of the new key" in said and "admit forge.request --project FOLDER --replace" in said


def test_a_member_is_revoked(offices: TwoOffices) -> None:
    offices.member()
    serial = answer("consortium", "members", "--project", offices.project)["members"]["forge"]["serial"]
    assert serial in plain(fedmat("consortium", "revoke", "forge", "--project", offices.project))
    told = answer("consortium", "members", "--project", offices.project)
    assert told["members"]["forge"]["state"] == "revoked" and told["revoked"] == [serial]
    again = answer("consortium", "revoke", "forge", "--project", offices.project)
    assert again == {"party": "forge", "serial": serial, "disconnected": False}  # no server runs


def test_a_changed_consortium_file_is_taken_over(offices: TwoOffices) -> None:
    offices.member()
    answer_ = answer("consortium", "update", offices.consortium, "--project", offices.project)
    assert answer_["can_be_invited"] == ["foundry", "mill"]
    assert "invite foundry, mill" in plain(fedmat("consortium", "update", offices.consortium, "--project", offices.project))


def test_what_stops_the_server_stops_the_list_of_members_too(offices: TwoOffices) -> None:
    offices.member()
    (offices.project / "ca/ca.key").chmod(0o644)
    found = fedmat("consortium", "members", "--project", offices.project)
    assert found.exit_code == 5 and "others than its owner" in plain(found) and "admitted" in plain(found)
    found = fedmat("consortium", "members", "--project", offices.project, "--json")
    assert found.exit_code == 5 and json.loads(found.stdout)["ok"] is False


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["consortium", "init", "none.yaml", "--project", "P", "--host", "h"], 2, "no such file"),
        (["consortium", "init", "CONSORTIUM", "--project", "P2", "--host", "Not A Host"], 2, "no host name"),
        (["consortium", "init", "CONSORTIUM", "--project", "P", "--host", "h"], 5, "nothing was written"),
        (["consortium", "invite", "stranger", "--project", "P"], 2, "is no party"),
        (["consortium", "invite", "notary", "--project", "P"], 2, "--organisation"),
        (["consortium", "invite", "forge", "--project", "P2"], 5, "no project"),
        (["consortium", "admit", "none.request", "--project", "P"], 2, "cannot be read"),
        (["consortium", "admit", "CONSORTIUM", "--project", "P"], 6, "bad_request"),
        (["consortium", "revoke", "mill", "--project", "P"], 2, "was not invited"),
        (["consortium", "members", "--project", "P2"], 5, "no project"),
        (["site", "join", "CONSORTIUM", "--home", "H"], 6, "bad_kit"),
        (["site", "join", "none.kit", "--home", "H"], 2, "no such kit"),
        (["site", "certificate", "CONSORTIUM", "--home", "H"], 6, "bad_certificate"),
        (["site", "renew", "--home", "H"], 5, "no party's folder|the kit"),
    ],
)
def test_a_mistake_is_one_panel_and_an_exit_code(offices: TwoOffices, words: list[str], code: int, text: str) -> None:
    offices.init()
    names = {"CONSORTIUM": offices.consortium, "P": offices.project, "P2": offices.home.parent / "p2", "H": offices.home}
    found = fedmat(*(names.get(w, w) for w in words))
    assert found.exit_code == code and re.search(text, plain(found)), found.output
    assert "Traceback" not in found.output and "What to do" in found.output


def test_no_private_key_is_ever_shown(offices: TwoOffices, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def listening(*words: object) -> Result:
        found = run(*words)
        said.append(found.output)
        return found

    run = fedmat
    monkeypatch.setitem(globals(), "fedmat", listening)
    offices.member()
    request = offices.post(answer("site", "renew", "--home", offices.home)["request"])
    fedmat("consortium", "admit", request, "--project", offices.project, "--replace")
    fedmat("consortium", "admit", request, "--project", offices.home)
    fedmat("consortium", "members", "--project", offices.project)
    keys = [*offices.project.rglob("*.key"), *offices.home.rglob("*.key")]
    assert len(keys) == 5 and len(said) > 8
    shown = "\n".join(said) + "".join(p.read_text(errors="replace") for p in offices.mail.iterdir())
    for key in keys:
        assert not any(line in shown for line in key.read_text().splitlines()[2:-2])
        assert credentials.read_key(key)


def test_every_command_has_an_example() -> None:
    for group in (consortium_app, site_app):
        for command in group.registered_commands:
            told = (command.callback.__doc__ if command.callback else "") or ""
            if command.callback and command.callback.__module__ == cli_consortium.__name__:
                assert "Example:  fedmat " in told, command.name
