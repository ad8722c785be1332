"""FLARE carries bytes: what becomes of a party that answers, is late, is away, breaks or says something it should not."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fedmat import files, wire
from fedmat.domain import Attestation, AttestRequest, Dropout, Rejection
from fedmat.errors import StateError
from fedmat.federation import desk, flare
from fedmat.federation.engine import frame, unframe

ATTESTED = Attestation("ash", "d" * 64, "1", "f" * 64, ("a",), 40, 5, 10, 20, {}, (40,))
ASKED = wire.encode(AttestRequest("p" * 64))


class Server:
    """A FLARE server whose parties answer what the test says."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self.answers, self.sent = dict(answers), []

    @contextmanager
    def new_context(self) -> Iterator[None]:
        yield None

    def get_client_from_name(self, name: str) -> str | None:
        return name if name in self.answers else None

    def send_aux_request(self, targets: list[str], request: Shareable, **_: object) -> dict[str, Any]:
        (name,) = targets
        self.sent.append((name, request["request"]))
        found = self.answers[name]
        return {name: found(request["request"]) if callable(found) else found}


def reply(data: Any, code: str = ReturnCode.OK) -> Shareable:
    out = make_reply(code)
    if data is not None:
        out["reply"] = data
    return out


def ask(server: Server, *parties: str, abort: Signal | None = None) -> list[Any]:
    found = flare.FlareEngine(server, abort or Signal()).exchange(dict.fromkeys(parties, ASKED), 5.0)
    return [answer for answer, _ in found]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flare, "_FIRST_S", 0.3)
    monkeypatch.setattr(flare, "_AGAIN_S", 0.1)
    monkeypatch.setattr(flare, "_DESK_S", 0.3)


def test_what_a_party_answers_arrives_as_it_was_sent() -> None:
    data = wire.encode(ATTESTED)
    server = Server({"ash": reply(frame(data)), "birch": reply(frame(data))})
    assert ask(server, "birch", "ash") == [data, data]
    assert sorted(server.sent) == [("ash", ASKED), ("birch", ASKED)]


@pytest.mark.parametrize(
    ("answer", "kind", "reason"),
    [
        (reply(None, ReturnCode.TIMEOUT), Dropout, "late"),
        (reply(None, ReturnCode.EXECUTION_EXCEPTION), Dropout, "crashed"),
        (reply(None, ReturnCode.TASK_RESULT_FILTER_ERROR), Dropout, "crashed"),
        (reply(None, ReturnCode.COMMUNICATION_ERROR), Dropout, "unreachable"),
        (reply(None), Rejection, "malformed"),
        (reply(b"\x00nonsense"), Rejection, "malformed"),
        (reply("text, not bytes"), Rejection, "malformed"),
        (reply(frame(Dropout("birch", "late"))), Rejection, "wrong_site"),
        (reply(frame(Rejection("ash", "policy", "plans.rules: mean"))), Rejection, "policy"),
    ],
)
def test_every_failure_of_a_party_is_a_value(answer: Shareable, kind: type, reason: str) -> None:
    (found,) = ask(Server({"ash": answer}), "ash")
    assert isinstance(found, kind)
    assert (found.site, found.reason) == ("ash", reason)


def test_a_party_that_is_not_connected_is_waited_for_first_and_then_left_out() -> None:
    server = Server({})
    threading.Timer(0.15, lambda: server.answers.update(ash=reply(frame(b"late but there")))).start()
    engine = flare.FlareEngine(server, Signal())
    assert engine.exchange({"ash": ASKED}, 5.0)[0][0] == b"late but there"
    server.answers.clear()
    started = time.perf_counter()
    (gone,) = [a for a, _ in engine.exchange({"ash": ASKED}, 5.0)]
    assert isinstance(gone, Dropout) and gone.reason == "unreachable"
    assert time.perf_counter() - started < 0.29  # known parties are not waited for as at the start


def test_a_job_that_is_ended_stops_between_two_requests() -> None:
    abort = Signal()
    abort.trigger(True)
    with pytest.raises(flare.Stopped):
        ask(Server({"ash": reply(frame(b"x"))}), "ash", abort=abort)


def test_a_job_holds_settings_and_no_code(tmp_path: Path) -> None:
    job = flare.write_job(
        tmp_path / "job", name="n", conductor="fedmat.conductor.Federate", order="o", consortium=b"name: x", stated={}, least=1
    )
    found = sorted(str(p.relative_to(job)) for p in job.rglob("*") if p.is_file())
    assert found == ["app/config/config_fed_client.json", "app/config/config_fed_server.json", "meta.json"]
    named = [json.loads((job / f).read_text()) for f in found]
    paths = [e["executor"]["path"] for e in named[0]["executors"]] + [w["path"] for w in named[1]["workflows"]]
    assert all(p.startswith("fedmat.") for p in paths)  # what the allow-lists of server and parties permit


# --- at a party ----------------------------------------------------------------------------------------------------


class Context:
    """What FLARE tells a component about where and who it is."""

    def __init__(self, home: Path, name: str = "ash") -> None:
        self._home, self._name = home, name

    def get_identity_name(self) -> str:
        return self._name

    def get_prop(self, _: str) -> Context:
        return self

    def get_root_dir(self) -> str:
        return str(self._home / "flare")


def relayed(home: Path, request: Any = ASKED) -> Shareable:
    task = Shareable()
    task["request"] = request
    relay = flare.Relay(base64.b64encode(b"name: x").decode(), {"fedmat": "1"})
    found: Shareable = relay.execute("exchange", task, Context(home), Signal())
    return found


def test_the_relay_hands_on_consortium_request_and_versions_and_brings_the_answer(tmp_path: Path) -> None:
    asked: list[tuple[bytes, bytes, dict[str, str]]] = []

    def answer(consortium: bytes, request: bytes, stated: Mapping[str, str]) -> bytes:
        asked.append((consortium, request, dict(stated)))
        return b"answer"

    server = desk.DeskServer(tmp_path, answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert unframe("ash", relayed(tmp_path)["reply"]) == b"answer"
    assert asked == [(b"name: x", ASKED, {"fedmat": "1"})]
    assert (tmp_path / desk.DESK).stat().st_mode & 0o077 == 0  # the key to the desk is its owner's


def test_a_party_whose_desk_is_down_is_a_dropout_that_names_it(tmp_path: Path) -> None:
    found = unframe("ash", relayed(tmp_path)["reply"])
    assert isinstance(found, Dropout) and found.reason == "crashed"
    assert "desk" in found.detail
    assert relayed(tmp_path, "no bytes").get_return_code() == ReturnCode.BAD_TASK_DATA


def test_a_caller_without_the_key_gets_nothing(tmp_path: Path) -> None:
    server = desk.DeskServer(tmp_path, lambda *_: b"answer")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    note = files.read_json(tmp_path / desk.DESK)
    files.write_json(tmp_path / desk.DESK, note | {"key": "00" * 32})
    with pytest.raises(StateError, match="desk does not answer"):
        desk.ask(tmp_path, b"", ASKED, {}, lambda: False)
    files.write_json(tmp_path / desk.DESK, note)
    assert unframe("ash", desk.ask(tmp_path, b"", ASKED, {}, lambda: False)) == b"answer"  # and the desk still works


def test_the_sites_own_filter_lets_only_what_its_policy_permits_through(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("consortium: x\noutbound: {kinds: [Statistics], most_bytes: 100000}\n")
    last_look = flare.OutboundFilter(str(tmp_path))
    out = last_look.process(reply(frame(wire.encode(ATTESTED))), Context(tmp_path))
    found = unframe("ash", out["reply"])
    assert isinstance(found, Rejection) and found.reason == "policy"
    assert "outbound.kinds" in found.detail
    smuggled = reply(frame(Dropout("ash", "crashed")))
    smuggled["extra"] = b"records"
    assert "extra" not in last_look.process(smuggled, Context(tmp_path))  # only what was looked at goes on
