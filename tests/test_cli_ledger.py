"""The commands about the ledger: a consortium's whole life by files between offices, and what everybody refuses by name."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import small
import typer
import yaml
from test_governance import digest
from typer.testing import CliRunner, Result

from fedmat import bundle, cli_keys, cli_ledger, keys
from fedmat.cli_consortium import consortium_app, spoken
from fedmat.cli_keys import keys_app
from fedmat.commands import Group
from fedmat.keys import PartyKeys
from fedmat.ledger import entries
from fedmat.ledger.entries import ContributionEntry, EvaluationEntry, MembershipEntry, MintEntry, PlanEntry, RegistrationEntry
from fedmat.ledger.log import Log
from fedmat.ledger.text import stamp

app = typer.Typer(cls=Group, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(consortium_app, name="consortium")
app.add_typer(keys_app, name="keys")
app.add_typer(cli_ledger.ledger_app, name="ledger")
app.add_typer(cli_ledger.credits_app, name="credits")
app.command()(cli_ledger.approve)
app.callback()(lambda debug=False: None)

SITES = ("forge", "foundry", "mill")


class Clock:
    """A time that moves a second with every look."""

    def __init__(self) -> None:
        self.now = datetime(2026, 11, 24, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time at which commands think they run."""
    found = Clock()
    monkeypatch.setattr(cli_ledger, "_now", found)
    monkeypatch.setattr(cli_keys, "_today", lambda: found.now.date())
    monkeypatch.delenv("FEDMAT_LEDGER", raising=False)
    return found


def fedmat(*words: object, says: str = "") -> Result:
    """Runs a command in this process."""
    env = {"COLUMNS": "240", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, [str(w) for w in words], input=says or None, env=env)


def plain(result: Result) -> str:
    """All that was said, without frames and line breaks."""
    return re.sub(r"[\s│╭╮╰╯─┃┏┓┡┩┴└┘]+", " ", result.output)


def answer(*words: object) -> Any:
    """What a command answers with --json; it has to be done."""
    found = fedmat(*words, "--json")
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def refused(code: int, said: str, *words: object) -> None:
    """The command ends with that code and names the reason."""
    found = fedmat(*words)
    assert found.exit_code == code and said in plain(found), found.output


class Offices:
    """The operator's office and those of the members; files are carried between them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.consortium = folder, folder / "c" / "consortium.yaml"
        self.database, self.export = folder / "operator" / "ledger.db", folder / "mail" / "ledger.jsonl"

    @classmethod
    def build(cls, folder: Path, **terms: Any) -> Offices:
        """Offices with nothing done yet."""
        found = cls(folder)
        raw = yaml.safe_load(small.build(folder / "c").read_text())
        raw |= {"simulated": False, "terms": {"tiers": {"champion": 300}, "priority_price": 7, **terms}}
        found.consortium.write_text(yaml.safe_dump(raw))
        (folder / "mail").mkdir()
        return found

    def keys(self, name: str) -> Path:
        return self.folder / name / "keys"

    def entry(self, name: str) -> Path:
        return self.keys(name) / f"{name}.party.json"

    def new(self, name: str) -> None:
        answer("keys", "new", name, "--folder", self.keys(name), "--organisation", f"{name.title()} Ltd")

    def own(self, name: str) -> PartyKeys:
        return keys.load(self.keys(name), name)

    def mail(self, name: str) -> Path:
        return self.folder / "mail" / name

    def agree(self) -> None:
        """Everyone makes keys and signs the charter, and the operator begins the ledger with it."""
        for name in (*SITES, "operator"):
            self.new(name)
        charter, proposal = self.folder / "charter.json", self.mail("charter.proposal.json")
        # small-alloys encrypts nothing, so that its key charter needs no roles
        found = keys.charter("small-alloys", "x25519", [keys.read_entry(self.entry(s)) for s in SITES])
        charter.write_text(json.dumps(found.model_dump(mode="json")))
        answer("consortium", "charter", self.consortium, "--keys", charter, "--operator", self.keys("operator"), "-o", proposal)
        for site in SITES:
            answer("ledger", "sign", proposal, "--folder", self.keys(site))
        self.append(proposal)

    def append(self, *proposals: Path) -> Any:
        """The operator adds its signature, appends and sends out the ledger."""
        told = answer("ledger", "append", *proposals, "--ledger", self.database, "--folder", self.keys("operator"))
        self.send()
        return told

    def send(self) -> None:
        answer("ledger", "export", "--ledger", self.database, "-o", self.export)

    def sign(self, proposal: Path, *names: str) -> None:
        for name in names:
            answer("ledger", "sign", proposal, "--folder", self.keys(name), "--ledger", self.export)

    def put(self, *made: Any) -> None:
        """The operator's own entries of a run, as the account step writes them."""
        with Log.open(self.database) as log:
            log.append([entries.seal(e, [self.own("operator")]) for e in made])
        answer("ledger", "checkpoint", "--ledger", self.database, "--folder", self.keys("operator"))
        self.send()

    def run(self, clock: Clock, run: str = "r1") -> str:
        """A finished run that is settled: forge gets 750 credits, mill 250."""
        about = {"consortium": "small-alloys", "by": "operator", "time": stamp(clock()), "run": run}
        model, shares = digest(run), {"forge": 0.3, "foundry": 0.0, "mill": 0.1}
        with Log.open(self.database) as log:
            size = log.size
        self.put(
            PlanEntry(**about, plan_sha256="a" * 64, sites=SITES, seed=1, rounds=1, code_version="1", environment_sha256="b" * 64, consortium_file_sha256="c" * 64),
            EvaluationEntry(**about, model_sha256=model, weights_sha256="1" * 64, held_out_sha256="3" * 64, metrics_sha256=digest("m" + run),
                            evaluations_sha256="4" * 64, intervals_sha256="5" * 64, matching_sha256="6" * 64, metric="mae", score=1.25),
            ContributionEntry(**about, model_sha256=model, method="settlement", shares=shares, errors=dict.fromkeys(shares, 0.0), evidence_sha256="7" * 64),
            MintEntry(**about, model_sha256=model, contribution=size + 2, amounts={"forge": 750, "mill": 250}),
        )  # fmt: skip
        return model

    def witness(self, *names: str) -> None:
        """Members check the ledger they were sent and cosign it; the operator takes that in."""
        lines = [self.mail(f"{n}.cosignature") for n in names]
        for name, line in zip(names, lines, strict=True):
            where = ("--folder", self.keys(name), "--state", self.folder / name / "witness")
            answer("ledger", "witness", self.export, *where, "-o", line)
        answer("ledger", "cosign", *lines, "--ledger", self.database)
        self.send()


_AGREED: list[Path] = []  # made once: every test gets a copy of the same offices


@pytest.fixture
def offices(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Offices:
    """Three members with a charter in force."""
    if not _AGREED:
        first = Offices.build(tmp_path_factory.mktemp("agreed"))
        first.agree()
        _AGREED.append(first.folder)
    return Offices(shutil.copytree(_AGREED[0], tmp_path / "offices"))


# --- a whole life --------------------------------------------------------------------------------------------------


def test_from_a_charter_to_a_departure(tmp_path: Path, clock: Clock) -> None:
    o = Offices.build(tmp_path)
    o.agree()
    first = answer("ledger", "show", o.export, "--entry", 0)
    assert first["entry"]["type"] == "charter" and len(first["signed_by_keys"]) == 4

    # a fourth joins: it signs, two of three members sign, the operator appends
    o.new("rolling")
    join = o.mail("join.json")
    where = ("--ledger", o.export, "--residency", "DE", "-o", join)
    told = answer("consortium", "join", "--folder", o.keys("rolling"), *where)
    assert told["missing"] == ["operator"] and told["votes_missing"] == 2
    o.sign(join, "forge")
    refused(6, "no_quorum", "ledger", "append", join, "--ledger", o.database, "--folder", o.keys("operator"))
    o.sign(join, "mill")
    assert o.append(join)["entry"] == 1
    o.witness("forge", "mill", "rolling")
    verified = answer("ledger", "verify", o.export)
    assert verified["members"] == ["forge", "foundry", "mill", "rolling"] and verified["witnessed"] == 2

    # a run is finished; three of four approve, then its model may be champion
    model = o.run(clock)
    for site in ("forge", "mill", "rolling"):
        vote = o.mail(f"approve-{site}.json")
        told = answer("approve", "r1", "--folder", o.keys(site), "--ledger", o.export, "-o", vote)
        assert told["complete"] and model[:16] in told["words"]
        o.append(vote)
    about = {"consortium": "small-alloys", "by": "operator", "time": stamp(clock()), "run": "r1"}
    o.put(RegistrationEntry(**about, model_sha256=model, name="fedmat-x", version=1, aliases=("champion",)))

    # one replaces its keys; the old ones count no more, the new ones do
    answer("keys", "rotate", "mill", "--folder", o.keys("mill"))
    step, turn = o.keys("mill") / "mill.rotation.json", o.mail("rotate.json")
    answer("ledger", "rotate", step, "--folder", o.keys("mill"), "--ledger", o.export, "-o", turn)
    o.append(turn)
    gift = o.mail("gift.json")
    answer("credits", "transfer", "rolling", 200, "--folder", o.keys("mill"), "--ledger", o.export, "-o", gift)
    o.append(gift)
    assert answer("credits", "balance", "--ledger", o.export)["balances"] == {
        "forge": 750, "foundry": 0, "mill": 50, "rolling": 200,
    }  # fmt: skip

    # one leaves, and everyone reads what follows
    leave = o.mail("leave.json")
    told = answer("consortium", "leave", "foundry", "--folder", o.keys("foundry"), "--ledger", o.export, "-o", leave)
    assert told["missing"] == ["operator"] and [m["run"] for m in told["after"]["models"]] == ["r1"]
    assert told["after"]["commands"] == ["fedmat run consortium.yaml --run-id r1-without-foundry"]
    o.append(leave)
    refused(6, "unknown_member", "approve", "r1", "--folder", o.keys("foundry"), "--ledger", o.export)

    # all of it is checked from the file alone, with the digest that was compared by telephone
    o.witness("forge", "mill")
    found = answer("ledger", "verify", o.export, "--charter-digest", spoken(first_digest(o)))
    assert found["ok"] and found["members"] == ["forge", "mill", "rolling"] and found["charter_told"]
    said = plain(fedmat("ledger", "show", o.export))
    for words in (
        "joins, data in DE",
        "forge approves model",
        "mill has new keys",
        "mill gives rolling 200 credits",
        "foundry leaves",
    ):
        assert words in said


def first_digest(o: Offices) -> str:
    """The charter's digest as it is printed to members."""
    return str(answer("ledger", "verify", o.export)["charter_sha256"])


def test_the_operator_replaces_its_own_keys(offices: Offices) -> None:
    o = offices
    answer("keys", "rotate", "operator", "--folder", o.keys("operator"))
    step, turn = o.keys("operator") / "operator.rotation.json", o.mail("turn.json")
    words = ("ledger", "rotate", step, "--folder", o.keys("operator"), "--ledger", o.database)
    refused(5, "does not hold the new keys", *words, "--finish")
    answer(*words, "-o", turn)
    o.append(turn)
    o.witness("forge", "mill")
    assert answer("ledger", "verify", o.export)["witnessed"] == 2  # the entry that brings the new key stands under the old one
    answer(*words, "--finish")
    assert not step.exists()
    leave = o.mail("leave.json")
    answer("consortium", "leave", "foundry", "--folder", o.keys("foundry"), "--ledger", o.export, "-o", leave)
    o.append(leave)
    o.witness("forge", "mill")
    assert answer("ledger", "verify", o.export)["witnessed"] == 3


def test_a_pod_is_formed_and_a_member_is_told_to_leave(offices: Offices) -> None:
    o = offices
    pod, out = o.mail("pod.json"), o.mail("out.json")
    where = ("--ledger", o.database, "-o", pod)
    told = answer(
        "consortium", "pod", "hot", "--members", "forge, mill", "--task", "creep", "--folder", o.keys("operator"), *where
    )
    assert told["missing"] == ["forge", "mill"]
    o.sign(pod, "forge", "mill")
    o.append(pod)
    told = answer(
        "consortium", "leave", "mill", "--folder", o.keys("forge"), "--ledger", o.export, "--reason", "left", "-o", out
    )
    assert told["votes_missing"] == 1 and told["after"]["pods"] == ["hot"]
    o.sign(out, "foundry")
    assert o.append(out)["size"] == 3


def test_copies_of_a_proposal_come_back_together(offices: Offices) -> None:
    o = offices
    o.new("rolling")
    one, other = o.mail("one.json"), o.mail("two.json")
    answer("consortium", "join", "--folder", o.keys("rolling"), "--ledger", o.export, "-o", one)
    shutil.copy(one, other)
    o.sign(one, "forge")
    o.sign(other, "foundry")
    assert o.append(one, other)["type"] == "membership"


# --- what people see -----------------------------------------------------------------------------------------------


def test_a_signer_reads_what_it_signs_and_may_say_no(tmp_path: Path) -> None:
    o = Offices.build(tmp_path)
    o.agree()
    o.new("rolling")
    join = o.mail("join.json")
    said = plain(fedmat("consortium", "join", "--folder", o.keys("rolling"), "--ledger", o.export, "-o", join))
    assert "still to sign operator, 2 more of the members" in said and "send it to operator, 2 more of the members" in said
    before = join.read_bytes()
    words = ("ledger", "sign", join, "--folder", o.keys("forge"), "--ledger", o.export)
    no = fedmat(*words, says="n\n")
    assert no.exit_code == 0 and join.read_bytes() == before
    assert "rolling of Rolling Ltd joins" in plain(no) and "nothing was signed" in plain(no)
    yes = fedmat(*words, says="y\n")
    assert yes.exit_code == 0 and "signed by forge, rolling" in plain(yes) and join.read_bytes() != before
    assert fedmat(*words, "--yes").exit_code == 0


def test_the_charter_is_shown_with_its_terms_before_anyone_signs(tmp_path: Path) -> None:
    o = Offices.build(tmp_path, residency={"mill": "DE"}, min_sites=3)
    o.agree()
    said = plain(fedmat("ledger", "show", o.export, "--entry", 0))
    for words in ("quorum 2 of 3", "residency mill DE", "fewest sites 3", "tiers champion 300", "Forge Ltd", "digest"):
        assert words in said
    assert "copies of one proposal" in plain(fedmat("ledger", "append", "--help"))


def test_credits_are_listed_given_and_spent(offices: Offices, clock: Clock) -> None:
    o = offices
    o.run(clock)
    buy, wait = o.mail("buy.json"), o.mail("wait.json")
    answer("credits", "spend", "tier", "champion", "--folder", o.keys("forge"), "--ledger", o.export, "-o", buy)
    o.append(buy)
    told = answer(
        "credits", "spend", "priority", "fedmat-x", "--days", 3, "--folder", o.keys("mill"), "--ledger", o.export, "-o", wait
    )
    assert told["words"] == "mill spends 21 credits on priority fedmat-x"
    o.append(wait)
    found = answer("credits", "balance", "--ledger", o.export)
    assert (found["minted"], found["spent"], found["balances"]["forge"]) == (1000, 321, 450)
    assert found["tiers"]["forge"] == ["champion"] and list(found["priority"]["mill"]) == ["fedmat-x"]
    assert "champion" in plain(fedmat("credits", "balance", "--ledger", o.export))
    assert [e["type"] for e in answer("credits", "history", "--ledger", o.export, "--member", "mill")] == [
        "credit_mint",
        "credit_spend",
    ]
    assert "credits for r1: forge 750, mill 250" in plain(fedmat("credits", "history", "--ledger", o.export))
    member = ("--folder", o.keys("mill"), "--ledger", o.export)
    refused(6, "overdraft", "credits", "transfer", "forge", 230, *member)
    refused(6, "unknown_tier", "credits", "spend", "tier", "gold", *member)
    refused(6, "unknown_member", "credits", "transfer", "rolling", 1, *member)
    refused(2, "to:", "credits", "transfer", "No One", 1, *member)


def test_entries_are_found_by_run_and_type(offices: Offices, clock: Clock) -> None:
    offices.run(clock)
    kinds = [e["type"] for e in answer("ledger", "show", offices.export, "--run", "r1")]
    assert kinds == ["plan", "evaluation", "contribution", "credit_mint"]
    assert len(answer("ledger", "show", offices.database, "--type", "charter")) == 1
    refused(2, "no entry is of type", "ledger", "show", offices.export, "--type", "votes")
    refused(2, "there is no entry 9", "ledger", "show", offices.export, "--entry", 9)


# --- what is refused -----------------------------------------------------------------------------------------------


def test_a_charter_that_not_everyone_signed_begins_no_ledger(tmp_path: Path) -> None:
    o = Offices.build(tmp_path)
    for name in (*SITES, "operator"):
        o.new(name)
    charter, proposal = tmp_path / "charter.json", o.mail("p.json")
    found = keys.charter("small-alloys", "x25519", [keys.read_entry(o.entry(s)) for s in SITES])
    charter.write_text(json.dumps(found.model_dump(mode="json")))
    words = ("consortium", "charter", o.consortium, "--keys", charter, "--operator", o.keys("operator"), "-o", proposal)
    told = answer(*words)
    assert told["missing"] == list(SITES) and re.fullmatch("[0-9a-f]{64}", told["digest"])
    refused(2, "is there already", *words)
    for site in SITES[:2]:
        answer("ledger", "sign", proposal, "--folder", o.keys(site))
    refused(6, "not signed by mill", "ledger", "append", proposal, "--ledger", o.database, "--folder", o.keys("operator"))
    assert not o.database.exists()
    refused(2, "no such ledger", "ledger", "show", o.database)
    mine = ("--folder", o.keys("forge"), "--ledger", o.consortium)
    refused(6, "not_canonical", "consortium", "leave", "forge", *mine)


def test_an_operator_that_appends_without_a_quorum_is_refused_by_every_reader(offices: Offices, clock: Clock) -> None:
    """It can write into its own database what it likes; nobody's fold takes it, and the entry is named."""
    o = offices
    o.new("rolling")
    party = keys.read_entry(o.entry("rolling"))
    forced = MembershipEntry(consortium="small-alloys", by="operator", time=stamp(clock()), party=party)
    with Log.open(o.database) as log:
        log.append([entries.seal(forced, [o.own("operator"), o.own("rolling"), o.own("forge")])])
        log.sign_checkpoint("fedmat/small-alloys", o.own("operator"))
        from fedmat.ledger import export

        export.export(log, o.export)
    for words in (
        ("verify", o.export),
        ("show", o.export),
        ("witness", o.export, "--folder", o.keys("mill"), "--state", o.folder / "w"),
    ):
        refused(6, "no_quorum: entry 1", "ledger", *words)
    refused(6, "no_quorum: entry 1", "credits", "balance", "--ledger", o.export)


def test_an_operator_that_shows_another_history_gets_no_cosignature(offices: Offices, tmp_path: Path) -> None:
    o = offices
    o.witness("forge", "mill")
    state = ("--folder", o.keys("forge"), "--state", o.folder / "forge" / "witness")
    o.database.unlink()
    for name in ("ledger.db-wal", "ledger.db-shm"):
        (o.database.parent / name).unlink(missing_ok=True)
    proposal = o.mail("again.json")
    charter = o.folder / "charter.json"
    answer("consortium", "charter", o.consortium, "--keys", charter, "--operator", o.keys("operator"), "-o", proposal)
    for site in SITES:
        answer("ledger", "sign", proposal, "--folder", o.keys(site))
    o.append(proposal)
    refused(6, "forked_log", "ledger", "witness", o.export, *state, "-o", tmp_path / "line")
    assert not (tmp_path / "line").exists()


def test_a_witness_refuses_a_ledger_that_is_shorter_than_it_was(offices: Offices, clock: Clock) -> None:
    o = offices
    early = o.mail("early.jsonl")
    shutil.copy(o.export, early)
    o.run(clock)
    o.witness("forge")
    state = ("--folder", o.keys("forge"), "--state", o.folder / "forge" / "witness")
    refused(6, "truncated_log", "ledger", "witness", early, *state)
    stranger = ("--folder", o.keys("operator"), "--state", o.folder / "w")
    refused(6, "unknown_member", "ledger", "witness", o.export, *stranger)


def test_only_a_member_s_line_of_this_ledger_is_taken_in(offices: Offices, tmp_path: Path) -> None:
    o = offices
    where = ("--folder", o.keys("forge"), "--state", o.folder / "forge" / "witness")
    line, bad = tmp_path / "line", tmp_path / "bad"
    answer("ledger", "witness", o.export, *where, "-o", line)
    text = line.read_text()
    bad.write_text(text.replace("/forge ", "/mill "))
    refused(6, "bad_signature", "ledger", "cosign", bad, "--ledger", o.database)
    bad.write_text(text[:30])
    refused(6, "bad_checkpoint", "ledger", "cosign", bad, "--ledger", o.database)
    refused(2, "cannot be read", "ledger", "cosign", tmp_path / "none", "--ledger", o.database)
    assert answer("ledger", "cosign", line, "--ledger", o.database)["taken"] == {"forge": 1}


def test_what_too_few_members_have_seen_is_not_evidenced(offices: Offices) -> None:
    refused(8, "entries 0 to 0 stand under no checkpoint", "ledger", "verify", offices.export)
    offices.witness("forge")
    refused(8, "entries 0 to 0", "ledger", "verify", offices.export)
    offices.witness("mill")
    assert fedmat("ledger", "verify", offices.export).exit_code == 0
    assert "compare it by telephone" in plain(fedmat("ledger", "verify", offices.export))
    for told in ("0000 " * 16, "12", ""):
        refused(6, "wrong_charter", "ledger", "verify", offices.export, "--charter-digest", told)


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("truncated_log", lambda lines: [lines[0], *lines[2:]]),
        ("truncated_log", lambda lines: lines[:1]),
        ("not_canonical", lambda lines: [lines[0], lines[1].replace(b"payload", b"payl0ad", 1), *lines[2:]]),
        ("not_canonical", lambda lines: [lines[0] + b" ", *lines[1:]]),
        ("bad_checkpoint", lambda lines: [*lines, lines[-1]]),
    ],
)
def test_a_changed_file_is_refused_with_the_place_named(
    offices: Offices, said: str, change: Callable[[list[bytes]], list[bytes]]
) -> None:
    lines = offices.export.read_bytes().splitlines()
    offices.export.write_bytes(b"\n".join(change(lines)) + b"\n")
    found = fedmat("ledger", "verify", offices.export)
    assert found.exit_code == 6 and said in plain(found) and re.search(r"line \d|checkpoint \d", plain(found))


def test_forged_and_replayed_entries_stay_out_of_the_ledger(offices: Offices, clock: Clock) -> None:
    o = offices
    o.run(clock)
    gift = o.mail("gift.json")
    answer("credits", "transfer", "mill", 700, "--folder", o.keys("forge"), "--ledger", o.export, "-o", gift)
    o.append(gift)
    to_ledger = ("--ledger", o.database, "--folder", o.keys("operator"))
    refused(6, "replayed_entry", "ledger", "append", gift, *to_ledger)
    sent = entries.open_envelope(gift.read_bytes().strip())[0]
    late = stamp(clock())
    for reason, entry, signer in (
        ("double_spend", sent.model_copy(update={"to": "foundry", "time": late}), "forge"),
        ("overdraft", sent.model_copy(update={"amount": 51, "sequence": 2, "time": late}), "forge"),
        ("sequence_gap", sent.model_copy(update={"amount": 1, "sequence": 3, "time": late}), "forge"),
        ("no_quorum", sent.model_copy(update={"amount": 50, "sequence": 2, "time": late}), "mill"),
        ("clock_backwards", sent.model_copy(update={"amount": 50, "sequence": 2, "time": "2026-11-24T11:00:00Z"}), "forge"),
    ):
        forged = o.mail(f"{reason}.json")
        forged.write_bytes(entries.seal(entry, [o.own(signer)]))
        refused(6, reason, "ledger", "append", forged, *to_ledger)
    with Log.open(o.database) as log:
        assert log.size == 6
    assert answer("credits", "balance", "--ledger", o.database)["balances"] == {"forge": 50, "foundry": 0, "mill": 950}


def test_a_proposal_of_another_consortium_stays_out(offices: Offices, tmp_path: Path) -> None:
    other = Offices.build(tmp_path / "other")
    raw = yaml.safe_load(other.consortium.read_text())
    other.consortium.write_text(yaml.safe_dump(raw | {"name": "other-alloys"}))
    for name in (*SITES, "operator"):
        other.new(name)
    charter, proposal = tmp_path / "charter2.json", tmp_path / "p.json"
    found = keys.charter("other-alloys", "x25519", [keys.read_entry(other.entry(s)) for s in SITES])
    charter.write_text(json.dumps(found.model_dump(mode="json")))
    answer("consortium", "charter", other.consortium, "--keys", charter, "--operator", other.keys("operator"), "-o", proposal)
    to_ledger = ("--ledger", offices.database, "--folder", other.keys("operator"))
    refused(6, "foreign_bundle", "ledger", "append", proposal, *to_ledger)
    refused(
        6, "foreign_bundle", "ledger", "sign", proposal, "--folder", other.keys("mill"), "--ledger", offices.export, "--yes"
    )


def test_what_is_no_ledger_is_said_to_be_none(offices: Offices, tmp_path: Path) -> None:
    refused(2, "a folder without a ledger", "ledger", "show", tmp_path)
    (tmp_path / "x.db").touch()
    sqlite3.connect(tmp_path / "x.db").execute("CREATE TABLE t (a)").connection.close()
    refused(5, "no ledger", "ledger", "show", tmp_path / "x.db")
    keys_of = ("--folder", offices.folder / "nobody")
    refused(5, "public entries", "approve", "r1", *keys_of, "--ledger", offices.export)


def test_the_ledger_is_read_from_a_bundle_too(offices: Offices, clock: Clock, tmp_path: Path) -> None:
    o = offices
    o.run(clock)
    o.witness("forge", "mill")
    (tmp_path / "run").mkdir()
    about = {"consortium": "small-alloys", "run": "r1"}
    packed = bundle.pack(tmp_path / "run", o.export.read_bytes(), {}, **about, out=tmp_path / "evidence.zip")
    assert answer("ledger", "verify", packed) == answer("ledger", "verify", o.export)
    shutil.unpack_archive(packed, tmp_path / "unpacked")
    assert answer("credits", "balance", "--ledger", tmp_path / "unpacked")["minted"] == 1000


def test_the_ledger_may_be_named_by_the_environment(offices: Offices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMAT_LEDGER", str(offices.export))
    assert answer("credits", "balance")["minted"] == 0
    assert answer("ledger", "show")[0]["type"] == "charter"


# --- keys of an operator -------------------------------------------------------------------------------------------


def test_an_operator_has_keys_of_its_own_kind(tmp_path: Path) -> None:
    made = answer("keys", "new", "operator", "--folder", tmp_path / "k", "--organisation", "Hub")
    assert made["party"]["kind"] == "operator"
    assert answer("keys", "show", tmp_path / "k")["parties"][0]["name"] == "operator"
    for words in (("operator", "--kind", "site"), ("mill", "--kind", "operator")):
        refused(2, "cannot be of kind", "keys", "new", *words, "--folder", tmp_path / "x", "--organisation", "Hub")


def test_the_key_charter_takes_no_operator(tmp_path: Path) -> None:
    o = Offices.build(tmp_path)
    for name in (*SITES, "operator", "aggregator", "auditor", "notary"):
        o.new(name)
    members = [o.entry(n) for n in (*SITES, "aggregator", "auditor", "notary")]
    words = ("keys", "charter", o.consortium, *members)
    refused(2, "operator cannot be of kind operator", *words, o.entry("operator"), "-o", tmp_path / "a.json")
    assert fedmat(*words, "-o", tmp_path / "b.json").exit_code == 0
