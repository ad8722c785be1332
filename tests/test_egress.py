"""What has left a site is on the disk before it leaves, in order, and no line can be changed unseen."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import ledger_scene
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat import egress, files, wire
from fedmat.config import PlanSettings
from fedmat.domain import StatementsRequest, TrainRequest, Update
from fedmat.egress import Door
from fedmat.errors import ProtocolError, StateError

PLAN = "a" * 64


def update(number: int, value: float = 0.5) -> bytes:
    return wire.encode(
        Update("elm", number, PLAN, "0" * 64, {"w": np.full((2, 3), value, dtype=np.float32)}, {}, 0.1, np.zeros(5))
    )


def request(number: int) -> bytes:
    return wire.encode(TrainRequest(PLAN, number, 0.1, "b" * 64, control={}))


def door(folder: Path, **settings_: Any) -> Door:
    return Door("elm", folder, PLAN, "d" * 64, PlanSettings.model_validate(settings_), ledger_scene.Clock())


def book(folder: Path) -> list[dict[str, Any]]:
    return egress.lines(egress.read(folder / egress.BOOK), "elm")


def test_every_object_is_written_down_with_what_an_auditor_asks_for(tmp_path: Path) -> None:
    answer = update(3)
    door(tmp_path).note(answer, request(3), clause="outbound.kinds", policy_sha256="e" * 64)
    (line,) = book(tmp_path)
    assert set(line) == set(egress.FIELDS)
    assert (line["kind"], line["round"], line["bytes"], line["sha256"]) == ("Update", 3, len(answer), files.sha256(answer))
    assert (line["tensors"], line["numbers"]) == (2, 11)
    assert (line["clause"], line["plan_sha256"], line["dataset_sha256"]) == ("outbound.kinds", PLAN, "d" * 64)


def test_a_line_holds_no_number_of_the_object(tmp_path: Path) -> None:
    door(tmp_path).note(update(0, 0.123456789), request(0))
    assert b"1234567" not in egress.read(tmp_path / egress.BOOK)


def test_the_line_is_on_the_disk_before_the_answer_is_given(tmp_path: Path) -> None:
    handler = door(tmp_path).around(lambda _: update(0))
    assert handler(request(0)) == update(0)
    assert len(book(tmp_path)) == 1


def test_what_cannot_be_written_down_does_not_leave(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(StateError, match="nothing leaves"):
        door(blocked).around(lambda _: update(0))(request(0))


def test_an_answer_that_fails_leaves_no_line(tmp_path: Path) -> None:
    def refuses(_: bytes) -> bytes:
        raise StateError("no")

    with pytest.raises(StateError):
        door(tmp_path).around(refuses)(request(0))
    assert book(tmp_path) == []


def test_what_was_done_to_an_update_is_told(tmp_path: Path) -> None:
    plain = door(tmp_path)
    plain.note(update(0), request(0))
    private = door(tmp_path, compression={"name": "hadamard"}, server={"name": "sgd"}, privacy={"unit": "record", "epsilon": 4})
    private.note(update(1), request(1))
    first, second = book(tmp_path)
    assert first["filters"] == [] and first["epsilon"] is None
    assert second["filters"] == ["differential privacy per record, epsilon 4", "compression hadamard"]


def test_a_line_that_a_crash_cut_off_is_taken_away(tmp_path: Path) -> None:
    d = door(tmp_path)
    d.note(update(0), request(0))
    path = tmp_path / egress.BOOK
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"n":1,"half')
    assert egress.read(path) == whole
    d.note(update(1), request(1))
    assert [n["n"] for n in book(tmp_path)] == [0, 1]


def test_a_damaged_last_line_stops_the_site(tmp_path: Path) -> None:
    (tmp_path / egress.BOOK).write_bytes(b"rubbish\n")
    with pytest.raises(StateError, match="last line is damaged"):
        door(tmp_path).note(update(0), request(0))


def _append(folder: Path, times: int) -> None:
    for _ in range(times):
        egress.append(folder / egress.BOOK, dict.fromkeys((f for f in egress.FIELDS if f != "n"), ""))


def test_several_processes_write_into_one_book(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append, args=(tmp_path, 20)) for _ in range(4)]
    for w in writers:
        w.start()
    for w in writers:
        w.join(60)
    assert [n["n"] for n in book(tmp_path)] == list(range(80))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("book")
    d = door(folder)
    for n in range(3):
        d.note(update(n), request(n))
    whole = bytearray(egress.read(folder / egress.BOOK))
    root = egress.root(bytes(whole))
    at = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[at // 8] ^= 1 << at % 8
    try:
        egress.lines(bytes(whole), "elm")
    except ProtocolError:  # the line is named
        return
    assert egress.root(bytes(whole)) != root


def test_a_book_that_lacks_a_line_is_not_read(tmp_path: Path) -> None:
    d = door(tmp_path)
    for n in range(3):
        d.note(update(n), request(n))
    first, _, third = egress.read(tmp_path / egress.BOOK).splitlines(keepends=True)
    with pytest.raises(ProtocolError, match="line 2"):
        egress.lines(first + third, "elm")


def test_rounds_are_reconciled_with_what_arrived(tmp_path: Path) -> None:
    d = door(tmp_path)
    answers = [update(n) for n in range(4)]
    for n, answer in enumerate(answers):
        d.note(answer, request(n))
    size = len(answers[0])
    reports = [
        {"round": n, "plan_sha256": PLAN, "bytes_up": {"elm": up}, "updates": {"elm": files.sha256(counted)}}
        for n, (up, counted) in enumerate([(size, answers[0]), (0, answers[1]), (size + 1, answers[2]), (size, b"other")])
    ]
    rows = egress.reconcile(book(tmp_path), reports, "elm")
    assert [r.verdict for r in rows] == ["agrees", "more left", "less left", "other update"]
    assert [r.sound for r in rows] == [True, True, False, False]


def test_the_command_reconciles_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from fedmat.cli import app

    scene = ledger_scene.build(tmp_path / "home", account=False)
    site = scene.sites[0]
    folder = scene.run.site_folder(site)
    done = CliRunner().invoke(app, ["site", "egress", str(folder), "--run", str(scene.folder), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [r["verdict"] for r in told["rounds"]] == ["agrees", "agrees"]
    assert told["kinds"]["Update"]["objects"] == 2
    reports = scene.run.reports()
    reports[1]["updates"][site] = "0" * 64
    (scene.folder / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in reports))
    done = CliRunner().invoke(app, ["site", "egress", str(folder), "--run", str(scene.folder)])
    assert done.exit_code == 6
    assert "round 2" in " ".join(done.output.split())


def test_a_site_signs_no_update_that_did_not_leave_it(tmp_path: Path) -> None:
    from fedmat.federation import statements
    from fedmat.federation.statements import Signing

    scene = ledger_scene.build(tmp_path / "home", account=False)
    site = scene.sites[0]
    a = files.read_json(scene.folder / "attestations.json")["attestations"][site]
    folder = scene.run.site_folder(site)
    asked = StatementsRequest(scene.run.plan().sha256, "electrolytes", "r1", {"0": "f" * 64})
    with pytest.raises(StateError, match="round 1 that has not left this site"):
        statements.answer(
            asked, ledger_scene._attestation(a), files.read_json(folder / "manifest.json"), folder, Signing(scene.keys(site))
        )
