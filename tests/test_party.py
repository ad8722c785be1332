"""The desk decides before the work is done and again before its answer leaves; the process that works is its business alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import yaml

from fedmat import files, party, pipeline, policy, wire
from fedmat.config import load_consortium
from fedmat.domain import Attestation, AttestRequest, Dropout, Rejection, StatisticsRequest
from fedmat.errors import DataError, StateError
from fedmat.federation.engine import InProcessEngine

PLAN = "p" * 64
ATTEST, STATISTICS = wire.encode(AttestRequest(PLAN)), wire.encode(StatisticsRequest(PLAN))
ATTESTED = wire.encode(Attestation("forge", "d" * 64, "1", "f" * 64, ("a",), 40, 5, 10, 20, {}, (40,)))


class Inline(InProcessEngine):
    """In place of a process of its own: builds the handler at the first request, as the process would."""

    made = 0

    def __init__(self, factories: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]) -> None:
        type(self).made += 1
        super().__init__({name: build(*arguments) for name, (build, arguments) in factories.items()})

    def start(self, site: str) -> None:
        """It is there."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the site forge, which has joined; its worker attests, whatever it is asked."""
    consortium = small.build(tmp_path / "lab")
    place = tmp_path / "home"
    files.write_atomic(place / "consortium.yaml", consortium.read_bytes())
    files.write_atomic(place / "policy.yaml", policy.draft(load_consortium(consortium)).encode())
    who = {"party": "forge", "kind": "site", "organisation": "Forge Ltd", "consortium": "small-alloys", "host": "h", "port": 1}
    files.write_json(
        place / "party.json", who | {"schema": "fedmat/party/1", "site_file": str(tmp_path / "lab/forge/site.yaml")}
    )
    monkeypatch.setattr(party, "ProcessEngine", Inline)
    monkeypatch.setattr(Inline, "made", 0)
    monkeypatch.setattr(pipeline, "build_handler", lambda run, site: lambda data: ATTESTED)
    return place


def consortium(home: Path, **changed: object) -> bytes:
    document = yaml.safe_load((home / "consortium.yaml").read_bytes())
    for key, value in changed.items():
        document[key] = {**document[key], **value} if isinstance(value, dict) else value
    return yaml.safe_dump(document).encode()


def test_what_the_worker_answers_is_what_the_desk_answers(home: Path) -> None:
    seen: list[str] = []

    def around(kind: str, work: Callable[[], Any]) -> Any:
        seen.append(kind)
        return work()

    desk = party.Desk(home, around=around)
    assert desk.answer(consortium(home), ATTEST) == ATTESTED
    assert seen == ["AttestRequest"]


def test_a_plan_outside_the_policy_is_refused_with_its_clause_before_any_work(home: Path) -> None:
    desk = party.Desk(home)
    found = desk.answer(consortium(home, plan={"rule": {"name": "krum", "hostile": 1}}), ATTEST)
    assert isinstance(found, Rejection) and found.reason == "policy"
    assert "plans." in found.detail
    assert Inline.made == 0


def test_a_policy_that_was_tightened_counts_at_once(home: Path) -> None:
    desk = party.Desk(home)
    assert desk.answer(consortium(home), ATTEST) == ATTESTED
    (home / "policy.yaml").write_text("consortium: small-alloys\n")
    found = desk.answer(consortium(home), ATTEST)
    assert isinstance(found, Rejection) and found.reason == "policy"
    (home / "policy.yaml").write_text("consortium: [broken\n")
    found = desk.answer(consortium(home), ATTEST)
    assert isinstance(found, Dropout) and found.reason == "refused"  # a policy that cannot be read permits nothing


def test_an_answer_of_a_kind_that_may_not_leave_stays(home: Path) -> None:
    text = (home / "policy.yaml").read_text()
    settings = yaml.safe_load(text)
    settings["outbound"]["most_bytes"] = 16
    (home / "policy.yaml").write_text(yaml.safe_dump(settings))
    found = party.Desk(home).answer(consortium(home), ATTEST)
    assert isinstance(found, Rejection) and "outbound.most_bytes" in found.detail


@pytest.mark.parametrize(
    ("change", "stated", "says"),
    [
        ({"name": "other-alloys"}, {}, "joined small-alloys"),
        ({"members": [{"site": s, "organisation": s, "file": "x"} for s in ("mill", "foundry")]}, {}, "is no member"),
        ({}, {"fedmat": "99.0.0"}, "version of fedmat"),
        ({}, {"contract": "99.0"}, "version of contract"),
    ],
)
def test_another_consortium_or_version_is_refused_and_says_which(
    home: Path, change: dict[str, object], stated: dict[str, str], says: str
) -> None:
    found = party.Desk(home).answer(consortium(home, **change), ATTEST, stated)
    assert isinstance(found, Dropout) and found.reason == "refused"
    assert says in found.detail


def test_bytes_that_are_no_request_are_refused_and_the_desk_goes_on(home: Path) -> None:
    desk = party.Desk(home)
    found = desk.answer(consortium(home), b"nonsense")
    assert isinstance(found, Dropout) and found.reason == "refused"
    assert desk.answer(consortium(home), ATTEST) == ATTESTED


def test_where_things_lie_at_a_party_does_not_leave(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: object, site: str) -> Callable[[bytes], bytes]:
        def refuse(_: bytes) -> bytes:
            raise DataError(f"{home}/sites/forge/manifest.json: no such file, and '{home}/sites/forge/x.csv' neither")

        return refuse

    monkeypatch.setattr(pipeline, "build_handler", broken)
    found = party.Desk(home).answer(consortium(home), ATTEST)
    assert isinstance(found, Dropout)
    assert found.detail == "manifest.json: no such file, and 'x.csv' neither"


def test_new_data_are_taken_up_when_a_run_begins_and_never_within_it(home: Path) -> None:
    desk = party.Desk(home)
    desk.answer(consortium(home), ATTEST)
    files.write_json(home / "sites" / "forge" / "manifest.json", {"sha256": "new"})
    desk.answer(consortium(home), STATISTICS)
    assert Inline.made == 1
    desk.answer(consortium(home), ATTEST)
    assert Inline.made == 2
    desk.answer(consortium(home), ATTEST)
    assert Inline.made == 2


def test_a_folder_that_is_no_partys_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"not a party's folder[\s\S]*fedmat site join"):
        party.Desk(tmp_path)
    (tmp_path / "party.json").write_text("{}")
    with pytest.raises(StateError, match="damaged"):
        party.Desk(tmp_path)
