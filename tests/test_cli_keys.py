"""The commands about keys: what they answer, how they refuse, and that no private key leaves its folder."""

from __future__ import annotations

import base64
import json
import re
import shutil
import traceback
from datetime import date, timedelta
from pathlib import Path

import pytest
import small
from leaks import contents
from typer.testing import CliRunner, Result

from fedmat import cli_keys, keys
from fedmat.cli import app
from fedmat.envelopes import ROLES
from fedmat.errors import FedmatError

TODAY = date(2026, 11, 23)


class Clock:
    """A day that tests move."""

    def __init__(self) -> None:
        self.day = TODAY

    def __call__(self) -> date:
        return self.day


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The day on which commands think they run."""
    found = Clock()
    monkeypatch.setattr(cli_keys, "_today", found)
    return found


def fedmat(*words: object, debug: bool = False) -> Result:
    """Runs a command about keys in this process."""
    line = [*(["--debug"] if debug else []), "keys", *map(str, words)]
    return CliRunner().invoke(app, line, env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def plain(result: Result) -> str:
    """All that was said, without frames and line breaks."""
    return re.sub(r"[\s│╭╮╰╯─┃┏┓┡┩┴└┘]+", " ", result.output)


class Parties:
    """Every party of a small consortium, each with its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.consortium = small.build(folder / "c", security={"mode": "trigram"})
        self.names = (*small.COMPANIES, *ROLES)
        self.charter = folder / "charter.json"

    def keys(self, name: str) -> Path:
        """A party's folder of keys."""
        return self.folder / name / "keys"

    def entry(self, name: str) -> Path:
        """A party's public entry."""
        return self.keys(name) / f"{name}.party.json"

    def new(self, name: str, *more: object, organisation: str | None = None) -> Result:
        """Makes a party's keys."""
        owner = organisation or (f"{name.title()} Ltd" if name in small.COMPANIES else f"{name.title()} office")
        return fedmat("new", name, "--folder", self.keys(name), "--organisation", owner, *more)

    def agree(self, *more: object, without: tuple[str, ...] = ()) -> Result:
        """Puts the entries into a charter."""
        entries = [self.entry(n) for n in self.names if n not in without]
        return fedmat("charter", self.consortium, *entries, "-o", self.charter, *more)


@pytest.fixture
def parties(tmp_path: Path, clock: Clock) -> Parties:
    """A consortium whose parties have keys and a charter."""
    found = Parties(tmp_path)
    for name in found.names:
        assert found.new(name).exit_code == 0
    assert found.agree().exit_code == 0
    return found


def test_from_nothing_to_a_charter_everyone_can_check(parties: Parties) -> None:
    assert parties.agree().exit_code == 2  # never over another
    charter = keys.read_charter(parties.charter)
    assert {p.name: p.kind for p in charter.parties} == {n: n if n in ROLES else "site" for n in parties.names}
    for name in parties.names:
        said = fedmat("check", parties.charter, "--folder", parties.keys(name), "--json")
        assert said.exit_code == 0, said.output
        told = json.loads(said.stdout)
        assert (told["folder_of"], told["ok"], told["sha256"], told["revisions"]) == (
            name,
            True,
            charter.sha256,
            [charter.sha256],
        )
    assert cli_keys.spoken(charter.sha256) in plain(fedmat("check", parties.charter))
    shown = fedmat("show", parties.keys("mill"), "--json")
    assert json.loads(shown.stdout)["parties"][0]["signing"] == charter.party("mill", str(TODAY)).signing
    assert "365" in plain(fedmat("show", parties.charter))


def test_keys_are_never_replaced_and_lie_in_a_folder_of_their_own(parties: Parties, tmp_path: Path) -> None:
    before = {p.name: p.read_bytes() for p in parties.keys("mill").iterdir()}
    again = parties.new("mill")
    assert again.exit_code == 5 and "nothing was written" in plain(again)
    assert before == {p.name: p.read_bytes() for p in parties.keys("mill").iterdir()}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    there = fedmat("new", "mill", "--folder", tmp_path / "full", "--organisation", "Mill Ltd")
    assert there.exit_code == 5 and [p.name for p in (tmp_path / "full").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("notary", "--kind", "site"), "cannot be of kind site"),
        (("mill", "--kind", "notary"), "cannot be of kind notary"),
        (("Mill One",), "no name of a party"),
    ],
)
def test_a_party_is_called_by_what_it_is(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    found = fedmat("new", *words, "--folder", tmp_path / "k", "--organisation", "X")
    assert found.exit_code == 2 and said in plain(found) and not (tmp_path / "k").exists()


def test_a_charter_is_not_made_before_everyone_is_there(parties: Parties) -> None:
    parties.charter.unlink()
    found = parties.agree(without=("mill", "notary"))
    assert found.exit_code == 2 and not parties.charter.exists()
    assert "no keys of site mill" in plain(found) and "nobody runs the notary" in plain(found)
    shutil.rmtree(parties.keys("notary"))
    parties.new("notary", organisation="Auditor office")
    assert "one organisation holds two roles" in plain(parties.agree())


def test_the_roles_that_are_needed_are_those_of_the_mode(tmp_path: Path, clock: Clock) -> None:
    found = Parties(tmp_path)
    for name in found.names:
        found.new(name, "--kem", "mlkem768-x25519")
    for mode, roles in (("masking", ()), ("ckks", ("auditor",))):
        small.build(tmp_path / "c", security={"mode": mode})
        found.charter = tmp_path / f"{mode}.json"
        assert found.agree(without=tuple(set(ROLES) - set(roles))).exit_code == 0
        assert keys.read_charter(found.charter).kem == "mlkem768-x25519"
        if roles:
            found.charter = tmp_path / "none.json"
            assert "nobody runs the auditor" in plain(found.agree(without=ROLES))


def test_a_rotation_from_the_party_to_the_charter_and_back(parties: Parties) -> None:
    mine, first = parties.keys("mill"), keys.read_charter(parties.charter)
    made = fedmat("rotate", "mill", "--folder", mine, "--json")
    assert made.exit_code == 0, made.output
    rotation = Path(json.loads(made.stdout)["rotation"])
    assert fedmat("rotate", "mill", "--folder", mine).exit_code == 5
    waiting = fedmat("check", parties.charter, "--folder", mine)
    assert waiting.exit_code == 0 and "still holds the old keys" in plain(waiting)
    early = fedmat("rotate", "mill", "--folder", mine, "--finish", parties.charter)
    assert early.exit_code == 5 and "does not hold the new keys" in plain(early)
    assert fedmat("charter", "--apply", rotation, parties.charter).exit_code == 0
    again = fedmat("charter", "--apply", rotation, parties.charter)
    assert again.exit_code == 6 and "replayed_rotation" in plain(again)
    taken = fedmat("check", parties.charter, "--folder", mine, "--json")
    assert json.loads(taken.stdout)["revisions"][0] == first.sha256 and json.loads(taken.stdout)["revision"] == 2
    assert "remove the old ones" in json.loads(taken.stdout)["notes"][0]
    assert fedmat("rotate", "mill", "--folder", mine, "--finish", parties.charter).exit_code == 0
    assert sorted(p.name for p in mine.iterdir()) == ["mill.party.json", "sealing.key", "signing.key"]
    assert json.loads(fedmat("check", parties.charter, "--folder", mine, "--json").stdout)["notes"] == []


def test_a_rotation_can_be_taken_back(parties: Parties) -> None:
    mine = parties.keys("mill")
    before = {p.name: p.read_bytes() for p in mine.iterdir()}
    assert fedmat("rotate", "mill", "--folder", mine).exit_code == 0
    assert fedmat("show", mine / "mill.rotation.json").exit_code == 0
    assert fedmat("rotate", "mill", "--folder", mine, "--undo", "--finish", parties.charter).exit_code == 2
    assert fedmat("rotate", "forge", "--folder", mine).exit_code == 2
    assert fedmat("rotate", "mill", "--folder", mine, "--undo").exit_code == 0
    assert before == {p.name: p.read_bytes() for p in mine.iterdir()}
    assert fedmat("rotate", "mill", "--folder", mine, "--undo").exit_code == 5


def test_time_is_told(parties: Parties, clock: Clock) -> None:
    clock.day = TODAY + timedelta(days=340)
    soon = fedmat("check", parties.charter, "--folder", parties.keys("mill"))
    assert soon.exit_code == 0 and "25 days left" in plain(soon)
    rotation = parties.keys("mill") / "mill.rotation.json"
    fedmat("rotate", "mill", "--folder", parties.keys("mill"))
    clock.day = TODAY + timedelta(days=366)
    ended = fedmat("check", parties.charter)
    assert ended.exit_code == 6 and "expired_key" in plain(ended)
    assert fedmat("rotate", "forge", "--folder", parties.keys("forge")).exit_code == 6
    assert "expired_key" in plain(fedmat("charter", "--apply", rotation, parties.charter))
    clock.day = TODAY + timedelta(days=400)
    assert "expired_rotation" in plain(fedmat("charter", "--apply", rotation, parties.charter))


def test_a_check_finds_foreign_keys_open_files_and_a_forged_charter(parties: Parties, tmp_path: Path) -> None:
    mine = parties.keys("mill")
    (mine / "signing.key").chmod(0o644)
    assert fedmat("check", parties.charter, "--folder", mine).exit_code == 5
    (mine / "signing.key").chmod(0o600)
    mine.chmod(0o755)
    assert fedmat("check", parties.charter, "--folder", mine).exit_code == 5
    mine.chmod(0o700)
    assert fedmat("check", parties.charter, "--folder", mine).exit_code == 0
    fedmat("new", "mill", "--folder", tmp_path / "other", "--organisation", "Mill Ltd")
    foreign = fedmat("check", parties.charter, "--folder", tmp_path / "other")
    assert foreign.exit_code == 5 and "not those of mill" in plain(foreign)
    body = json.loads(parties.charter.read_text())
    parties.charter.write_text(json.dumps(body | {"revision": 2}))
    assert fedmat("check", parties.charter).exit_code == 6
    parties.charter.write_text(json.dumps(body | {"parties": body["parties"][:-1] + body["parties"][:1]}))
    assert fedmat("check", parties.charter).exit_code == 2
    parties.charter.write_text("{")
    assert fedmat("check", parties.charter).exit_code == 2


@pytest.mark.parametrize(
    "words",
    [
        ("show", "nothing"), ("check", "nothing.json"), ("charter", "--apply", "nothing.json", "charter.json"),
        ("charter", "nothing.yaml"), ("charter", "--apply", "x.json", "a.json", "b.json"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_a_setting_to_correct(words: tuple[str, ...], clock: Clock) -> None:
    assert fedmat(*words).exit_code == 2


# --- the canary --------------------------------------------------------------------------------------------------


def spellings(secret: bytes) -> set[bytes]:
    """A secret as any tool may write it: raw, hex, numbers, base64 at each of its three alignments."""
    found = {secret, secret.hex().encode(), secret.hex().upper().encode(), secret.hex(":").encode()}
    found |= {repr(secret).encode(), str(list(secret)).encode()}
    for shift in range(3):
        coded = base64.b64encode(b"\0" * shift + secret)[4 if shift else 0 : -4]
        found |= {coded, coded.translate(bytes.maketrans(b"+/", b"-_"))}
    return found


def leaked(secrets: dict[str, bytes], where: bytes) -> list[str]:
    """Names of the secrets that ``where`` gives away."""
    return sorted({name for name, secret in secrets.items() if any(s in where for s in spellings(secret))})


def private(folder: Path) -> dict[str, bytes]:
    """The secret bytes of every key file below a folder: a sealing key of two kinds also in its two parts."""
    found = {}
    for path in folder.rglob("*.key"):
        raw = bytes.fromhex(path.read_text().split()[1])
        found[f"{path.parent.parent.name}/{path.name}"] = raw
        if len(raw) > 32:
            found |= {f"{path}:{i}": raw[i : i + 32] for i in range(0, len(raw), 32)}
    return found


def told(error: BaseException) -> str:
    """An exception, what it came from, and their tracebacks."""
    texts, seen = ["".join(traceback.format_exception(error))], error
    while (before := seen.__cause__ or seen.__context__) is not None:
        texts += [repr(before), str(before), str(before.args)]
        seen = before
    return "\n".join([*texts, repr(error), str(error), str(error.args), str(vars(error))])


@pytest.mark.parametrize("kem", ["x25519", "mlkem768-x25519"])
def test_private_keys_are_nowhere_but_in_their_folders(tmp_path: Path, clock: Clock, kem: str) -> None:
    parties, outputs = Parties(tmp_path), []
    secrets: dict[str, bytes] = {}
    for name in parties.names:
        outputs.append(parties.new(name, "--kem", kem, *(["--json"] if name == "mill" else [])))
    secrets |= private(tmp_path)
    outputs += [parties.agree("--json"), parties.agree()]
    mine = parties.keys("mill")
    outputs += [fedmat(*words) for words in (
        ("show", mine), ("show", mine, "--json"), ("show", parties.charter), ("show", mine / "signing.key"),
        ("show", mine / "sealing.key"), ("check", parties.charter, "--folder", mine),
        ("check", parties.charter, "--folder", mine, "--json"), ("rotate", "mill", "--folder", mine),
        ("rotate", "mill", "--folder", mine), ("rotate", "mill", "--folder", mine, "--finish", parties.charter),
    )]  # fmt: skip
    secrets |= {f"new {k}": v for k, v in private(tmp_path).items()}
    outputs += [fedmat("charter", "--apply", mine / "mill.rotation.json", parties.charter)]
    assert [o.exit_code for o in outputs[-3:]] == [5, 5, 0]

    # Whatever goes wrong with a key file, and all that a debugging flag shows of it.
    errors = []
    for file in (keys.SIGNING, keys.SEALING):
        good = (mine / file).read_text()
        kind, text = good.split()
        for bad in (text, f"{text} {kind}", f"{kind} {text}x", f"{kind} {text[:-2]}", f"{kind}\n{text}\n{text}", f"x {text}"):
            (mine / file).write_text(bad)
            with pytest.raises(FedmatError) as caught:
                keys.load(mine, "mill")
            errors.append(told(caught.value))
            outputs.append(fedmat("check", parties.charter, "--folder", mine, debug=True))
            outputs.append(fedmat("rotate", "mill", "--folder", mine, "--finish", parties.charter, debug=True))
            assert outputs[-1].exit_code == outputs[-2].exit_code == 5
        (mine / file).write_text(good)
    own = keys.load(mine, "mill")
    said = [repr(own), str(own), f"{own}", repr(vars(keys)), repr([own])]
    said += ["\n".join(o.output + o.stderr + (told(o.exception) if o.exception else "") for o in outputs)]
    assert leaked(secrets, "\n".join(errors + said).encode()) == []

    # Every file outside the folders of keys, and the public files inside.
    public = [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".key"]
    assert len([p for p in public if p.name.endswith(".json")]) >= 8
    assert {name for p in public for piece in contents(p) for name in leaked(secrets, piece)} == set()


@pytest.mark.parametrize("spell", [bytes.hex, lambda b: base64.b64encode(b"x" + b + b"yz").decode(), repr, lambda b: str([*b])])
def test_the_canary_sings(tmp_path: Path, clock: Clock, spell: object) -> None:
    Parties(tmp_path).new("mill")
    secrets = private(tmp_path)
    for name, secret in secrets.items():
        assert leaked(secrets, f"log: {spell(secret)}".encode()) == [name]  # type: ignore[operator]
    assert len(secrets) == 2 and leaked(secrets, (tmp_path / "mill/keys/signing.key").read_bytes()) == ["mill/signing.key"]
