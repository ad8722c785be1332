"""Rounds by files that a person carries: the same model, nothing lost when somebody stops, and no wrong file gets in."""

from __future__ import annotations

import errno
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from consortium import SEVEN, config, coordinator, handlers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli_drop import GROVE, HOST, NOW, YAML, Rig, credential, root
from test_engine import EngineContract

from fedmat import credentials, files, wire
from fedmat.credentials import Credential
from fedmat.domain import Dropout, Rejection
from fedmat.errors import FedmatError, PolicyRefused, ProtocolError, StateError
from fedmat.federation import drop
from fedmat.federation.drop import Split
from fedmat.federation.engine import Engine, Failure, InProcessEngine, frame

SITE = "mill"


def echo(data: bytes) -> bytes:
    return b"echo of " + data


def refuses(_: bytes) -> bytes:
    raise PolicyRefused("plans.rules", "mean is not permitted")


def breaks(_: bytes) -> bytes:
    raise RuntimeError("cell value 4711.0815")


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    """One site, without a connection, and another consortium member."""
    return Rig(tmp_path, (SITE, "forge"))


def reason(call: Callable[[], object]) -> str:
    """Why a file was refused."""
    with pytest.raises(FedmatError) as caught:
        call()
    assert "4711" not in str(caught.value) and caught.value.fix
    return caught.value.reason if isinstance(caught.value, ProtocolError) else type(caught.value).__name__


# --- the engine --------------------------------------------------------------------------------------------------


class TestDrop(EngineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
        folder = tmp_path_factory.mktemp("sites")
        inside = handlers(config(), folder)
        rig = Rig(folder, tuple(inside))
        with rig.engine() as engine, rig.person(inside):
            yield engine


class TestSplit(EngineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
        folder = tmp_path_factory.mktemp("sites")
        inside = handlers(config(), folder)
        rig = Rig(folder, ("ash",))
        with Split(rig.engine(), ("ash",), InProcessEngine(inside)) as engine, rig.person(inside):
            yield engine


def model_of(folder: Path, settings: Any, carried: tuple[str, ...]) -> str:
    """Digest of the model of a run in which files are carried to some of the sites."""
    inside, lead = handlers(settings, folder), coordinator(settings, folder)
    rig = Rig(folder / "rig", carried)
    with Split(rig.engine(run_folder=folder / "run"), carried, InProcessEngine(inside)) as engine, rig.person(inside):
        reports = list(lead.run(engine))
    assert all(set(r.accepted) == set(settings.roster) for r in reports)
    assert set(rig.runs) == set(carried)
    assert not list((rig.drop / "out").iterdir())  # all were answered
    return files.sha256(wire.encode(lead.model()))


SCAFFOLD: dict[str, Any] = {
    "algorithm": "scaffold",
    "site_weights": "equal",
    "local": {"steps": 6, "batch_size": 16, "lr": 3e-3, "optimizer": "sgd", "weight_decay": 0.0},
}


@pytest.mark.parametrize("changes", [{}, SCAFFOLD], ids=["fedavg", "scaffold"])
def test_who_carries_the_messages_does_not_change_a_bit_of_the_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    plan = config(rounds=2, **changes)
    lead = coordinator(plan, tmp_path / "a")
    list(lead.run(InProcessEngine(handlers(plan, tmp_path / "a"))))
    together = files.sha256(wire.encode(lead.model()))
    assert model_of(tmp_path / "b", plan, ("birch",)) == together
    assert model_of(tmp_path / "c", plan, plan.roster) == together


class Interrupted(Exception):
    """Somebody stopped the coordinator."""


ENCRYPTED: dict[str, dict[str, Any]] = {
    "trigram": {"security": {"mode": "trigram", "clip": 5.0}, "rule": {"name": "multi_krum", "hostile": 1}, "quorum": 5},
    "masking": {"security": {"mode": "masking", "clip": 5.0}, "quorum": 5},
}


@pytest.mark.parametrize(
    ("plan", "asked"),
    [
        (config(rounds=2), 5),  # attest, statistics, two rounds, calibrate: each is carried once
        pytest.param(config(SEVEN, rounds=2, **ENCRYPTED["trigram"]), 7, marks=pytest.mark.slow),  # and two audits
        pytest.param(
            config(SEVEN, rounds=1, **ENCRYPTED["masking"]), 8, marks=pytest.mark.slow
        ),  # keys, shares, arrived, unmask
    ],
    ids=["clear", "trigram", "masking"],
)
def test_a_coordinator_that_is_stopped_at_every_request_goes_on_and_nobody_works_twice(
    tmp_path: Path, plan: Any, asked: int
) -> None:
    whole = coordinator(plan, tmp_path / "a")
    list(whole.run(InProcessEngine(handlers(plan, tmp_path / "a"))))

    inside = handlers(plan, tmp_path / "b")
    rig = Rig(tmp_path / "rig", ("birch",))

    def stop(waiting: Sequence[drop.Waiting]) -> None:
        assert [w.party for w in waiting] == ["birch"]
        raise Interrupted

    stops = 0
    while True:
        lead = coordinator(plan, tmp_path / "b")
        carried = rig.engine(run_folder=tmp_path / "b" / "run", on_wait=stop)
        try:
            with Split(carried, ("birch",), InProcessEngine(inside)) as engine:
                list(lead.run(engine))
            break
        except Interrupted:
            stops += 1
            rig.bring(rig.carry("birch", inside["birch"]))
    assert wire.encode(lead.model()) == wire.encode(whole.model())
    assert stops == len(rig.runs) == asked


def test_an_answer_of_yesterdays_run_does_not_count_in_todays(rig: Rig) -> None:
    assert rig.ask({SITE: b"attest"}) is None
    old = rig.carry(SITE, echo)
    rig.bring(old)
    assert rig.ask({SITE: b"attest"}) == [b"echo of attest"]
    shutil.rmtree(rig.run)  # a run that is started afresh is another run, though it asks the same
    assert rig.ask({SITE: b"attest"}) is None
    assert reason(lambda: rig.bring(old)) == "stale_answer"


def test_an_answer_to_an_earlier_request_is_refused(rig: Rig) -> None:
    assert rig.ask({SITE: b"round 1"}) is None
    old = rig.carry(SITE, echo)
    assert rig.ask({SITE: b"round 2"}) is None  # the coordinator gave up on round 1
    before = rig.state()
    assert reason(lambda: rig.bring(old)) == "stale_answer"
    assert rig.state() == before
    (request,) = drop.export_requests(rig.drop, rig.stick, SITE)
    assert re.fullmatch(r"mill-2-[0-9a-f]{12}\.request", request.name)
    rig.bring(rig.carry(SITE, echo))
    assert rig.ask({SITE: b"round 2"}) == [b"echo of round 2"]


def test_each_site_is_asked_its_own_and_answers_come_in_the_order_asked(rig: Rig) -> None:
    asked = {"forge": b"f", SITE: b"m"}
    assert rig.ask(asked) is None
    rig.bring(rig.carry(SITE, echo))
    assert rig.ask(asked) is None
    rig.bring(rig.carry("forge", echo))
    assert rig.ask(asked) == [b"echo of f", b"echo of m"]
    assert rig.ask(asked | {"elm": b"e"}) == [
        b"echo of f",
        b"echo of m",
        Dropout("elm", "unreachable", "no files are carried to it"),
    ]


def test_who_waits_is_told_once_and_again_when_it_changes(rig: Rig) -> None:
    told: list[list[str]] = []

    def tell(waiting: Sequence[drop.Waiting]) -> None:
        told.append(sorted(w.party for w in waiting))
        assert all(w.path.is_file() and w.until == NOW + timedelta(days=7) for w in waiting)

    with rig.engine(on_wait=tell) as engine:
        thread = threading.Thread(target=engine.exchange, args=({SITE: b"m", "forge": b"f"}, 1.0))
        thread.start()
        _until(lambda: len(told) == 1)
        rig.bring(rig.carry(SITE, echo))
        _until(lambda: len(told) == 2)
        rig.bring(rig.carry("forge", echo))
        thread.join(10)
    assert told == [["forge", SITE], ["forge"]]


def test_a_person_has_a_week_from_when_the_request_was_written_whoever_was_stopped_meanwhile(rig: Rig) -> None:
    assert rig.ask({SITE: b"what"}) is None
    (request,) = drop.export_requests(rig.drop, rig.stick, SITE)
    rig.now = NOW + timedelta(days=6, hours=23)
    assert rig.ask({SITE: b"what"}) is None
    rig.now = NOW + timedelta(days=7, seconds=1)
    (late,) = rig.ask({SITE: b"what"}) or [b"nothing"]
    assert isinstance(late, Dropout) and late.reason == "late" and request.name in late.detail
    assert rig.ask({SITE: b"what"}, deadline_s=8 * 86400.0) is None  # a patient coordinator
    rig.bring(rig.answer(request, SITE, echo))  # it was late, and nothing else was asked: it counts if it is asked again
    assert rig.ask({SITE: b"what"}) == [b"echo of what"]


def test_a_sites_policy_travels_as_its_rejection_and_may_change_its_mind(rig: Rig) -> None:
    assert rig.ask({SITE: b"what"}) is None
    refused = rig.bring(rig.carry(SITE, refuses))
    expected = Rejection(SITE, "policy", "plans.rules: mean is not permitted")
    assert refused.failure == expected
    assert rig.ask({SITE: b"what"}) == [expected]
    assert rig.ask({SITE: b"what"}) == [expected]  # also for a coordinator that starts again: it does not wait a week
    assert rig.bring(rig.carry(SITE, echo)).failure is None  # the same request, once the policy permits it
    assert rig.ask({SITE: b"what"}) == [b"echo of what"]
    assert rig.runs == [SITE, SITE]


def test_a_crash_at_the_site_tells_its_kind_and_no_value(rig: Rig) -> None:
    assert rig.ask({SITE: b"what"}) is None
    back = rig.carry(SITE, breaks)
    rig.bring(back)
    assert rig.ask({SITE: b"what"}) == [Dropout(SITE, "crashed", "RuntimeError")]
    assert b"4711" not in back.read_bytes() and not any("4711" in p.name for p in rig.project.parent.rglob("*"))


def test_names_of_files_tell_who_and_which_and_nothing_else(rig: Rig) -> None:
    assert rig.ask({SITE: b"hardness 4711.0815"}) is None
    back = rig.carry(SITE, echo)
    rig.bring(back)
    names = {
        p.name for folder in (rig.stick, rig.drop / "in", rig.homes[SITE] / "drop") for p in folder.rglob("*") if p.is_file()
    }
    assert all(re.fullmatch(r"mill-1-[0-9a-f]{12}\.(request|answer)|[0-9a-f]{64}\.answer", n) for n in names)


def test_two_coordinators_do_not_share_a_folder(rig: Rig) -> None:
    with rig.engine():
        assert reason(rig.engine) == "StateError"
    rig.engine().close()


def test_closing_ends_a_wait(rig: Rig) -> None:
    engine = rig.engine()
    got: list[tuple[bytes | Failure, float]] = []
    thread = threading.Thread(target=lambda: got.extend(engine.exchange({SITE: b"what"}, 1.0)))
    thread.start()
    _until(lambda: bool(drop.export_requests(rig.drop, rig.stick)))
    engine.close()
    thread.join(10)
    assert [r.reason for r, _ in got if isinstance(r, Dropout)] == ["unreachable"]


def test_whoever_runs_the_coordinator_can_end_a_wait(rig: Rig) -> None:
    looks: list[int] = []

    def check() -> None:
        looks.append(1)
        if len(looks) > 3:
            raise Interrupted

    with rig.engine(check=check) as engine, pytest.raises(Interrupted):
        engine.exchange({SITE: b"what"}, 1.0)
    assert rig.ask({SITE: b"what"}) is None  # the request is still there


class Fails(Engine):
    """An engine that cannot go on."""

    def exchange(self, data: Mapping[str, bytes], deadline_s: float) -> Sequence[tuple[bytes | Failure, float]]:
        raise KeyboardInterrupt


def test_an_interruption_does_not_wait_for_the_person(rig: Rig) -> None:
    started = time.monotonic()
    with Split(rig.engine(), (SITE,), Fails()) as engine, pytest.raises(KeyboardInterrupt):
        engine.exchange({SITE: b"what", "elm": b"what"}, 1.0)
    assert time.monotonic() - started < 10


def test_direct_sites_work_where_the_engine_is_called(rig: Rig) -> None:
    """Threads of their own could compute otherwise: libraries keep settings per thread."""
    where: list[str] = []

    def handler(data: bytes) -> bytes:
        where.append(threading.current_thread().name)
        return data

    with Split(rig.engine(), (SITE,), InProcessEngine({"elm": handler})) as engine, rig.person({SITE: echo}):
        got = engine.exchange({SITE: b"m", "elm": b"e"}, 60.0)
        assert engine.exchange({"elm": b"e"}, 60.0)[0][0] == b"e"
    assert [r for r, _ in got] == [b"echo of m", b"e"]
    assert set(where) == {threading.current_thread().name}


# --- what gets in ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rig, Path, bytes, bytes]:
    """A request that waits, and its answer as it was brought back but not taken in yet."""
    rig = Rig(tmp_path_factory.mktemp("asked"), (SITE, "forge"))
    assert rig.ask({SITE: b"what"}) is None
    (request,) = drop.export_requests(rig.drop, rig.stick, SITE)
    back = rig.carry(SITE, echo)
    return rig, back, request.read_bytes(), back.read_bytes()


def changed(rig: Rig, back: Path, data: bytes) -> str:
    """Why an answer with these bytes is refused; nothing else may happen."""
    back.write_bytes(data)
    before = rig.state()
    why = reason(lambda: rig.bring(back))
    assert rig.state() == before
    return why


TAMPERED = {"malformed", "truncated", "bad_digest", "bad_signature", "bad_certificate", "wrong_version"}
many = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(place=st.floats(0, 1, exclude_max=True), by=st.integers(1, 255))
def test_one_changed_byte_anywhere_is_noticed(asked: tuple[Rig, Path, bytes, bytes], place: float, by: int) -> None:
    rig, back, _, data = asked
    i = int(place * len(data))
    assert changed(rig, back, data[:i] + bytes([data[i] ^ by]) + data[i + 1 :]) in TAMPERED | {"wrong_name", "oversize"}


@many
@given(place=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short_anywhere_is_noticed(asked: tuple[Rig, Path, bytes, bytes], place: float) -> None:
    rig, back, _, data = asked
    assert changed(rig, back, data[: int(place * len(data))]) in {"truncated", "malformed"}


@many
@given(place=st.floats(0, 1, exclude_max=True), by=st.integers(1, 255))
def test_a_changed_request_is_not_run(asked: tuple[Rig, Path, bytes, bytes], place: float, by: int) -> None:
    rig, _, data, _ = asked
    i = int(place * len(data))
    file = rig.stick / "changed.request"
    file.write_bytes(data[:i] + bytes([data[i] ^ by]) + data[i + 1 :])
    ran = list(rig.runs)
    assert reason(lambda: rig.answer(file, SITE, echo)) in TAMPERED | {"wrong_name"}
    assert rig.runs == ran


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A file's header, and all that follows its signature."""
    first, line, _, rest = data.split(b"\n", 3)
    assert first == b"fedmat drop file"
    return json.loads(line), rest


def signed(header: Mapping[str, Any], rest: bytes, by: Credential) -> bytes:
    """A file with this header, signed anew."""
    lines = b"fedmat drop file\n" + files.canonical_json(header) + b"\n"
    return lines + by.sign(lines).hex().encode() + b"\n" + rest


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("party", "forge", "bad_signature"),
        ("request", "0" * 64, "bad_signature"),
        ("made", "2026-01-05T12:00:01Z", "bad_signature"),
        ("run", "0" * 32, "bad_signature"),
        ("number", 7, "bad_signature"),
        ("versions", {"fedmat": "9"}, "bad_signature"),
        ("payload_sha256", "0" * 64, "bad_digest"),
        ("certificate_sha256", "0" * 64, "bad_digest"),
        ("payload_bytes", 10**6, "truncated"),
        ("payload_bytes", 1, "malformed"),
        ("payload_bytes", 1 << 40, "malformed"),
        ("payload_bytes", -1, "malformed"),
        ("payload_bytes", True, "malformed"),
        ("kind", "order", "malformed"),
        ("party", "../../etc", "malformed"),
        ("party", 3, "malformed"),
        ("made", "2026-02-30T12:00:00Z", "malformed"),
        ("versions", {"fedmat": 1}, "malformed"),
        ("versions", [], "malformed"),
        ("more", "", "malformed"),
        ("schema", "fedmat/drop/2", "wrong_version"),
    ],
)  # fmt: skip
def test_a_changed_header_field_is_refused(asked: tuple[Rig, Path, bytes, bytes], field: str, value: object, why: str) -> None:
    rig, back, _, data = asked
    signature = data.split(b"\n", 3)[2]
    header, rest = parts(data)
    lines = b"fedmat drop file\n" + files.canonical_json(header | {field: value}) + b"\n"
    got = changed(rig, back, lines + signature + b"\n" + rest)
    assert got == ("wrong_name" if (field, value) == ("party", "forge") else why)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"[]", "malformed"),
        (b"{", "malformed"),
        (b'{"a":NaN}', "malformed"),
        (b'{"a": 1}', "malformed"),
        (b'{"a":1,"a":1}', "malformed"),
        (b"[" * 50_000, "malformed"),
        (b"\xff\xfe", "malformed"),
        (b'"\\ud800"', "malformed"),
        (b"1" * 70_000, "malformed"),
        (b"1" * 10_000, "malformed"),
        (b"{}", "wrong_version"),
        (b'{"schema":"fedmat/drop/1"}', "malformed"),
    ],
)  # fmt: skip
def test_a_hostile_header_is_refused(asked: tuple[Rig, Path, bytes, bytes], line: bytes, why: str) -> None:
    rig, back, _, data = asked
    _, rest = parts(data)
    assert changed(rig, back, b"fedmat drop file\n" + line + b"\n" + b"00" * 256 + b"\n" + rest) == why


def test_more_bytes_a_twice_said_header_and_strangers_are_refused(asked: tuple[Rig, Path, bytes, bytes]) -> None:
    rig, back, _, data = asked
    assert changed(rig, back, data + b"\n") == "malformed"
    assert changed(rig, back, b"") == "malformed"
    assert changed(rig, back, b"MZ" + bytes(1000)) == "malformed"
    signature = data.split(b"\n", 3)[2]
    assert changed(rig, back, data.replace(signature, signature.upper())) == "malformed"
    assert reason(lambda: rig.bring(rig.stick)) == "StateError"
    assert reason(lambda: rig.bring(rig.stick / "none.answer")) == "StateError"


def test_a_file_beyond_the_limit_is_not_read(asked: tuple[Rig, Path, bytes, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    rig, back, _, data = asked
    monkeypatch.setattr(drop, "MOST_BYTES", len(data) - 1)
    assert changed(rig, back, data) == "oversize"
    monkeypatch.setattr(drop, "MOST_BYTES", 4000)
    fresh = Rig(back.parent.parent / "fresh", (SITE,))
    assert reason(lambda: fresh.ask({SITE: bytes(4000)})) == "oversize"  # nobody carries what would be refused
    assert not list((fresh.drop / "out").iterdir())


def resigned(data: bytes, by: Credential, **more: Any) -> bytes:
    """An answer signed by another, as that one's own."""
    header, rest = parts(data)
    payload = rest[header["certificate_bytes"] :]
    header |= {"certificate_sha256": files.sha256(by.certificate), "certificate_bytes": len(by.certificate)} | more
    return signed(header, by.certificate + payload, by)


def test_only_the_partys_own_certificate_of_this_consortium_counts(asked: tuple[Rig, Path, bytes, bytes]) -> None:
    rig, back, _, data = asked
    assert changed(rig, back, resigned(data, credential(SITE, "elsewhere"))) == "bad_certificate"
    assert changed(rig, back, resigned(data, credential("forge"))) == "wrong_name"
    assert changed(rig, back, resigned(data, credential("forge"), party="forge")) == "stale_answer"  # forge was asked nothing
    assert changed(rig, back, resigned(data, root(GROVE))) == "bad_certificate"
    own, other = credential(SITE), credential("forge")
    mixed = Credential(SITE, own.certificate, other.key)
    assert changed(rig, back, resigned(data, mixed)) == "bad_signature"


def test_time_counts(asked: tuple[Rig, Path, bytes, bytes]) -> None:
    rig, back, _, data = asked
    assert changed(rig, back, resigned(data, credential(SITE), made="2026-01-07T12:00:00Z")) == "bad_time"
    for day, why in ((NOW + timedelta(days=301), "expired_certificate"), (NOW - timedelta(days=3), "not_yet_valid")):
        rig.now = day
        assert changed(rig, back, data) == why
    rig.now = NOW


def test_an_answer_says_of_its_request_what_was_asked(asked: tuple[Rig, Path, bytes, bytes]) -> None:
    rig, back, request, data = asked
    own = credential(SITE)
    for field, value in (("run", "0" * 32), ("consortium", "elsewhere"), ("consortium_sha256", "0" * 64)):
        assert changed(rig, back, resigned(data, own, **{field: value})) == "wrong_request"
    digest = parts(data)[0]["request"]
    assert changed(rig, back, resigned(data, own, request=digest[:12] + "0" * 52)) == "wrong_request"
    assert changed(rig, back, resigned(data, own, request="0" * 64)) == "stale_answer"
    assert changed(rig, back, request) == "wrong_kind"
    header, rest = parts(request)
    assert changed(rig, back, signed(header | {"kind": "answer"}, rest, credential(HOST))) == "malformed"


def test_the_answer_itself_then_comes_in_once(asked: tuple[Rig, Path, bytes, bytes], tmp_path: Path) -> None:
    first, _, _, data = asked
    rig = Rig(tmp_path, (SITE,))
    shutil.copytree(first.drop, rig.drop, dirs_exist_ok=True)
    shutil.copytree(first.run, rig.run, dirs_exist_ok=True)
    back = rig.stick / "renamed by a mail program (1)"
    back.write_bytes(data)
    taken = rig.bring(back)
    assert (taken.party, taken.failure, taken.again) == (SITE, None, False)
    before = rig.state()
    assert rig.bring(back).again
    back.write_bytes(resigned(data, credential(SITE), made="2026-01-05T12:00:09Z"))
    assert rig.bring(back).again  # the same reply, signed once more
    header, rest = parts(data)
    payload = frame(b"another")
    header |= {"payload_sha256": files.sha256(payload), "payload_bytes": len(payload)}
    back.write_bytes(signed(header, rest[: header["certificate_bytes"]] + payload, credential(SITE)))
    assert reason(lambda: rig.bring(back)) == "second_answer"
    assert rig.state() == before
    assert rig.ask({SITE: b"what"}) == [b"echo of what"]


def test_a_later_failure_does_not_replace_an_answer(rig: Rig) -> None:
    assert rig.ask({SITE: b"what"}) is None
    failed = rig.carry(SITE, refuses).read_bytes()
    rig.bring(rig.carry(SITE, echo))
    (rig.stick / "old.answer").write_bytes(failed)
    assert reason(lambda: rig.bring(rig.stick / "old.answer")) == "second_answer"
    assert rig.ask({SITE: b"what"}) == [b"echo of what"]


def test_the_number_in_a_name_is_the_operators(rig: Rig) -> None:
    """A member that signs a huge number must not make the next request's name one that nobody can read."""
    assert rig.ask({SITE: b"round 1"}) is None
    back = rig.carry(SITE, echo)
    back.write_bytes(resigned(back.read_bytes(), credential(SITE), number=999_999_999))
    assert rig.bring(back).path.name.startswith("mill-1-")
    assert rig.ask({SITE: b"round 2"}) is None
    assert [p.name[:7] for p in drop.export_requests(rig.drop, rig.stick)] == ["mill-2-"]


def test_a_revoked_party_brings_nothing_in(rig: Rig) -> None:
    assert rig.ask({SITE: b"what"}) is None
    back = rig.carry(SITE, echo)
    serial = credentials.facts(credential(SITE).certificate).serial
    assert reason(lambda: rig.bring(back, [serial])) == "revoked"


@pytest.mark.parametrize("how", ["by hand", "flipped", "of another request"])
def test_what_was_not_imported_does_not_count_for_the_coordinator(rig: Rig, how: str) -> None:
    assert rig.ask({SITE: b"what"}) is None
    back = rig.carry(SITE, echo)
    data = back.read_bytes()
    if how == "by hand":
        data = resigned(data, credential(SITE, "elsewhere"))
    elif how == "flipped":
        data = data[:-1] + b"?"
    else:
        data = resigned(data, credential(SITE), request=parts(data)[0]["request"][:12] + "0" * 52)
    (rig.drop / "in" / back.name).write_bytes(data)
    assert reason(lambda: rig.ask({SITE: b"what"})) == "StateError"


def test_an_answer_whose_certificate_has_ended_since_still_counts(rig: Rig) -> None:
    assert rig.ask({SITE: b"what"}) is None
    rig.bring(rig.carry(SITE, echo))
    rig.now = NOW + timedelta(days=380)
    assert rig.ask({SITE: b"what"}) == [b"echo of what"]


# --- at the site -------------------------------------------------------------------------------------------------


def test_a_site_runs_only_what_its_own_server_asks_of_it(rig: Rig) -> None:
    assert rig.ask({SITE: b"what"}) is None
    (request,) = drop.export_requests(rig.drop, rig.stick, SITE)
    data = request.read_bytes()

    def given(data: bytes, site: str = SITE) -> str:
        request.write_bytes(data)
        return reason(lambda: rig.answer(request, site, echo))

    assert given(data, "forge") == "wrong_party"
    header, rest = parts(data)
    length = header["certificate_bytes"]

    def by(who: Credential) -> bytes:
        stated = {"certificate_sha256": files.sha256(who.certificate), "certificate_bytes": len(who.certificate)}
        return signed(header | stated, who.certificate + rest[length:], who)

    assert given(by(credential("forge"))) == "wrong_name"  # a member is not the server
    assert given(by(credential(HOST, "elsewhere"))) == "bad_certificate"
    assert given(signed(header | {"made": "2026-01-09T12:00:00Z"}, rest, credential(HOST))) == "bad_time"
    assert given(signed(header | {"run": "0" * 32}, rest, credential(HOST))) == "bad_digest"
    files.write_json(rig.homes[SITE] / "party.json", {"party": SITE, "consortium": "elsewhere", "host": HOST})
    assert given(data) == "wrong_consortium"
    files.write_json(rig.homes[SITE] / "party.json", {"party": SITE})
    assert given(data) == "StateError"
    assert rig.runs == []


def test_a_sites_own_folder_has_to_be_in_order(rig: Rig) -> None:
    assert rig.ask({SITE: b"what"}) is None
    (request,) = drop.export_requests(rig.drop, rig.stick, SITE)
    rig.give(SITE, credential("forge"))
    assert reason(lambda: rig.answer(request, SITE, echo)) == "StateError"
    rig.give(SITE, credential(SITE))
    key = rig.homes[SITE] / "flare" / "startup" / "client.key"
    key.chmod(0o644)
    assert reason(lambda: rig.answer(request, SITE, echo)) == "StateError"
    key.chmod(0o600)
    (key.parent / "rootCA.pem").unlink()
    assert reason(lambda: rig.answer(request, SITE, echo)) == "StateError"
    assert rig.runs == []


def test_a_request_written_again_gets_the_answer_that_was_given(rig: Rig) -> None:
    assert rig.ask({SITE: b"what"}) is None
    first = rig.carry(SITE, echo).read_bytes()
    shutil.rmtree(rig.drop)  # the operator lost the folder: the same is asked, and signed anew
    rig.now = NOW + timedelta(days=1)
    assert rig.ask({SITE: b"what"}) is None
    assert rig.carry(SITE, breaks).read_bytes() == first
    rig.give(SITE, credential(SITE, days=200))  # a renewed certificate signs the same answer
    renewed = rig.carry(SITE, breaks)
    assert renewed.read_bytes() != first and drop.read(renewed).payload == frame(b"echo of what")
    assert rig.carry(SITE, breaks).read_bytes() == renewed.read_bytes()
    assert rig.runs == [SITE]
    kept = next((rig.homes[SITE] / "drop" / "answers").iterdir())
    kept.write_bytes(kept.read_bytes()[:-1])
    assert reason(lambda: rig.carry(SITE, echo)) == "StateError"
    assert kept.stat().st_mode & 0o077 == 0


def test_a_renewed_server_signs_its_waiting_request_anew(rig: Rig) -> None:
    assert rig.ask({SITE: b"what"}) is None
    (old,) = drop.export_requests(rig.drop, rig.stick, SITE)
    answered = rig.answer(old, SITE, echo)
    assert rig.ask({SITE: b"what"}, credential=credential(HOST, days=200)) is None
    (new,) = drop.export_requests(rig.drop, rig.stick, SITE)
    assert drop.read(new).certificate == credential(HOST, days=200).certificate
    assert rig.answer(new, SITE, breaks).exists()  # the kept answer
    rig.bring(answered)  # also the one to the old file: it is the same request
    assert rig.ask({SITE: b"what"}) == [b"echo of what"]


# --- disks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_takes_nothing_is_told_and_nothing_is_lost(rig: Rig, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real, full = files.write_atomic, [rig.drop]

    def write(path: Path, data: bytes, *, private: bool = False) -> None:
        if any(path.is_relative_to(place) for place in full):
            raise OSError(number, "No space left on device", str(path))
        real(path, data, private=private)

    monkeypatch.setattr(files, "write_atomic", write)

    def told(call: Callable[[], object]) -> str:
        with pytest.raises(StateError, match="No space left on device") as caught:
            call()
        return caught.value.fix

    assert told(lambda: rig.ask({SITE: b"what"}))
    full[:] = [rig.stick]
    assert rig.ask({SITE: b"what"}) is None
    assert told(lambda: drop.export_requests(rig.drop, rig.stick))
    full.clear()
    (request,) = drop.export_requests(rig.drop, rig.stick)
    full[:] = [rig.homes[SITE]]
    assert told(lambda: rig.answer(request, SITE, echo))
    full[:] = [rig.stick]
    assert told(lambda: rig.answer(request, SITE, echo))
    full.clear()
    back = rig.answer(request, SITE, breaks)  # the stick was full, the answer is kept
    assert rig.runs == [SITE, SITE]
    full[:] = [rig.drop]
    before = rig.state()
    assert told(lambda: rig.bring(back))
    assert rig.state() == before
    full.clear()
    rig.bring(back)
    assert rig.ask({SITE: b"what"}) == [b"echo of what"]
    full[:] = [rig.run]
    shutil.rmtree(rig.run)
    assert told(lambda: rig.ask({SITE: b"what"}))


def test_a_damaged_name_of_a_run_is_told(rig: Rig) -> None:
    for damage in (b"{}", b"[]", b'{"run": "../x"}', b"{"):
        (rig.run / "run.json").write_bytes(damage)
        assert reason(lambda: rig.ask({SITE: b"what"})) == "StateError"


def test_a_request_carries_the_consortium_file_and_can_be_read_by_a_person(rig: Rig) -> None:
    assert rig.ask({SITE: b"what"}) is None
    (request,) = drop.export_requests(rig.drop, rig.stick)
    found = drop.read(request)
    assert (found.consortium, found.payload) == (YAML, b"what")
    header = json.loads(request.read_bytes().splitlines()[1])
    assert (header["party"], header["kind"], header["made"]) == (SITE, "request", "2026-01-05T12:00:00Z")
    assert header["consortium_sha256"] == files.sha256(YAML)
    assert (rig.drop / "out" / request.name).stat().st_mode & 0o077 == 0


def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)
