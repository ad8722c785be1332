"""The auditor's commands: what they say, how they end, that they need no network, and that their page is one file."""

from __future__ import annotations

import json
import re
import socket
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import audit_scene as scene
import pytest
from ledger_scene import Scene
from typer.testing import CliRunner, Result

from fedmat import audit_page, replay
from fedmat.audit import Audit
from fedmat.bundle import Bundle
from fedmat.cli_audit import audit_app

SITE = "argyrodite-ag"
ALL = (["verify"], ["why"], ["who"], ["what-left", SITE], ["impact", SITE], ["history"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene.build(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def broken(whole: Scene, tmp_path: Path) -> Path:
    """The bundle, unpacked, with another score in it."""
    folder = tmp_path / "broken"
    bundle = Bundle.open(whole.bundle)
    changed = scene.changed(bundle, "run/metrics.json", scene.edited(lambda v: v | {"title": "better"}))
    for name, data in changed.contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def fedmat(*words: object) -> Result:
    return CliRunner().invoke(audit_app, [*map(str, words)], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def error(result: Result) -> str:
    """What the panel of an error says, in one line."""
    assert "What to do" in result.output, result.output
    return re.sub(r"[\s│╭╮╰╯─]+", " ", result.output)


def answered(*words: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(fedmat(*words, "--json").output)
    return found


@pytest.mark.parametrize("words", ALL, ids=lambda w: w[0])
def test_every_question_ends_with_the_worst_of_its_answers(whole: Scene, words: list[str]) -> None:
    line = [words[0], whole.bundle, *words[1:], "--charter-digest", whole.charter_sha256]
    told = answered(*line)
    result = fedmat(*line)
    assert result.exit_code == {"proved": 0, "not evidenced": 8, "refuted": 6}[told["verdict"]]
    assert told["run"] == "r1" and told["consortium"] == "electrolytes"
    assert told["verdict"] in result.output
    for answer in told.get("answers", ()):
        assert answer["question"] in result.output
        assert answer["verdict"] in ("proved", "refuted", "not evidenced")


def test_a_bundle_whose_charter_nobody_told_is_not_evidenced(whole: Scene) -> None:
    result = fedmat("verify", whole.bundle)
    assert result.exit_code == 8
    assert whole.charter_sha256 in result.output and "telephone" in result.output
    assert fedmat("verify", whole.bundle, "--charter-digest", whole.charter_sha256).exit_code == 0
    spoken = " ".join(re.findall("....", whole.charter_sha256.upper()))
    assert fedmat("verify", whole.bundle, "--charter-digest", spoken).exit_code == 0
    assert fedmat("verify", whole.bundle, "--charter-digest", "0" * 64).exit_code == 6
    assert "ConfigError" in error(fedmat("verify", whole.bundle, "--charter-digest", "abc"))


def test_a_tampered_bundle_is_refuted_with_the_place(whole: Scene, broken: Path) -> None:
    result = fedmat("verify", broken, "--charter-digest", whole.charter_sha256)
    assert result.exit_code == 6
    assert "run/metrics.json" in result.output and "wrong_digest" in result.output
    assert fedmat("why", broken).exit_code == 6
    assert fedmat("history", broken, "--charter-digest", whole.charter_sha256).exit_code == 0


def test_what_a_bundle_never_shows_is_shown_and_decides_nothing(whole: Scene) -> None:
    told = answered("impact", whole.bundle, SITE, "--charter-digest", whole.charter_sha256)
    assert told["verdict"] == "proved"
    trained = next(a for a in answered("why", whole.bundle)["answers"] if a["name"] == "trained")
    assert trained["verdict"] == "not evidenced"


def test_names_that_the_ledger_does_not_know_say_what_it_knows(whole: Scene) -> None:
    for words in (
        ["what-left", whole.bundle, "nobody"],
        ["impact", whole.bundle, "nobody"],
        ["why", whole.bundle, "--model", "none"],
    ):
        result = fedmat(*words)
        assert result.exit_code == 8 and "it knows" in error(result)


def test_no_bundle_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "junk.zip").write_bytes(b"PK junk")
    for path in (tmp_path / "nothing.zip", tmp_path / "junk.zip", tmp_path):
        result = fedmat("verify", path)
        assert result.exit_code == 5 and "StateError" in error(result)


def test_nothing_reaches_for_a_network(whole: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an audit works offline")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    for words in ALL:
        fedmat(words[0], whole.bundle, *words[1:])
    assert fedmat("page", whole.bundle, "-o", tmp_path / "a.html").exit_code == 0


# --- the page --------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects what a page refers to, and whether its elements are closed."""

    EMPTY = ("meta", "link", "br", "img", "hr", "rect", "path")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.refers: list[str] = []
        self.ids: set[str] = set()
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.EMPTY:
            self.open.append(tag)
        self.scripts += tag in ("script", "iframe", "object")
        self.refers += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href")]
        self.ids |= {str(v) for k, v in attrs if k == "id"}

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        return

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_file_with_every_answer_entry_and_the_graph(whole: Scene, tmp_path: Path) -> None:
    out = tmp_path / "audit.html"
    assert fedmat("page", whole.bundle, "-o", out, "--charter-digest", whole.charter_sha256).exit_code == 0
    text = out.read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == [] and reader.scripts == 0
    assert all(r.startswith("#") and r[1:] in reader.ids for r in reader.refers), reader.refers
    audit = Audit.of(Bundle.open(whole.bundle), whole.charter_sha256)
    for answers in audit.summary().values():
        for a in answers:
            assert a.question.replace("'", "&#39;") in text
    assert {f"entry-{i}" for i in range(audit.fold.size)} <= reader.ids
    assert "<svg" in text and "2 rounds" in text and SITE in text
    assert out.read_bytes() == audit_page.page(audit).encode(), "the same bundle gives the same page"


def test_a_page_of_a_refuted_bundle_is_written_and_ends_with_6(broken: Path, tmp_path: Path) -> None:
    result = fedmat("page", broken, "-o", tmp_path / "audit.html")
    assert result.exit_code == 6
    assert "run/metrics.json" in (tmp_path / "audit.html").read_text()


def test_what_a_bundle_says_is_escaped(whole: Scene) -> None:
    """A bundle comes from anybody: a name in it is text on the page, never markup."""
    evil = "<script>alert(1)</script>"
    bundle = Bundle.open(whole.bundle)
    page = audit_page.page(Audit.of(Bundle(bundle.path, evil, bundle.run, bundle.contents)))
    assert evil not in page and "&lt;script&gt;" in page
    nothing = audit_page.page(Audit.of(Bundle(bundle.path, bundle.consortium, evil, bundle.contents)))
    assert evil not in nothing and "no such run" in nothing


# --- replay and export -----------------------------------------------------------------------------------------------


def replayed(verdict: str, tmp_path: Path) -> Any:
    artefact = replay.Artefact("model.safetensors", "a" * 64, "a" * 64, "identical")
    return replay.Replayed(verdict, "c" * 40, False, tmp_path / "clone", (artefact,), None, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("verdict", "code"), [("identical", 0), ("within_tolerance", 0), ("diverged", 6), ("not_evidenced", 8)]
)
def test_a_replay_is_of_the_files_in_the_bundle(
    verdict: str, code: int, whole: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def once(expected: replay.Expected, **how: Any) -> Any:
        asked.update(how, expected=expected)
        return replayed(verdict, tmp_path)

    monkeypatch.setattr(replay, "replay", once)
    line = ["replay", whole.bundle, whole.run.consortium_file, "--commit", "c" * 40, "--workdir", tmp_path / "w"]
    result = fedmat(*line)
    assert result.exit_code == code, result.output
    assert asked["commit"] == "c" * 40 and asked["consortium_file"] == whole.run.consortium_file
    assert asked["expected"].plan == json.loads((whole.folder / "plan.json").read_bytes())
    assert "model.safetensors" in result.output


def test_a_bundle_that_contradicts_itself_is_not_replayed(broken: Path, whole: Scene, tmp_path: Path) -> None:
    result = fedmat("replay", broken, whole.run.consortium_file, "--workdir", tmp_path / "w")
    assert result.exit_code == 6 and "wrong_digest: run/metrics.json" in error(result)
    assert not (tmp_path / "w").exists()


def test_the_graph_goes_out_in_the_formats_of_other_tools(whole: Scene, tmp_path: Path) -> None:
    result = fedmat("export", whole.bundle, "-o", tmp_path / "p", "--format", "openlineage", "--json")
    assert result.exit_code == 0, result.output
    written = json.loads(result.output)["written"]
    assert list(written) == ["openlineage"] and Path(written["openlineage"]).is_file()
