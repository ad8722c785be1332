"""Laws every engine keeps; a new engine subclasses the contract."""

from __future__ import annotations

import abc
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from consortium import config, coordinator, handlers

from fedmat import wire
from fedmat.domain import Attestation, AttestRequest, Dropout
from fedmat.federation.engine import Engine, Handler, InProcessEngine, ProcessEngine
from fedmat.federation.plan import Plan

PAIR = ("ash", "birch")


def honest(site: str, folder: Path) -> Handler:
    return handlers(config(), folder)[site]


def loner(site: str, folder: Path) -> Handler:
    return handlers(config(quorum=1), folder)[site]


def one_of_two(site: str, folder: Path) -> Handler:
    return handlers(config(PAIR, rounds=2, ensemble=2), folder)[site]


def misbehaving(site: str, folder: Path, how: str) -> Handler:
    inner = loner(site, folder)

    def handler(data: bytes) -> bytes:
        if b"TrainRequest" in data:
            if how == "hang":
                time.sleep(600)
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("cell value 4711.0815")
        return inner(data)

    return handler


class EngineContract(abc.ABC):
    """What every engine does."""

    @pytest.fixture(scope="class")
    @classmethod
    @abc.abstractmethod
    def engine(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]: ...

    def test_deliveries_come_in_the_order_asked(self, engine: Engine) -> None:
        request = AttestRequest(Plan.of(config()).sha256)
        got = engine.broadcast(request, ("dogwood", "ash"), 60.0)
        assert [d.site for d in got] == ["dogwood", "ash"]
        assert all(isinstance(d.answer, Attestation) and d.answer.site == d.site for d in got)

    def test_an_unknown_site_is_unreachable_not_an_exception(self, engine: Engine) -> None:
        (got,) = engine.broadcast(AttestRequest("p"), ("elm",), 5.0)
        assert isinstance(got.answer, Dropout)
        assert got.answer.reason == "unreachable"

    def test_a_refusal_is_a_value_with_its_reason(self, engine: Engine) -> None:
        (got,) = engine.broadcast(AttestRequest("another plan"), ("ash",), 60.0)
        assert isinstance(got.answer, Dropout)
        assert got.answer.reason == "refused"
        assert "another plan" in got.answer.detail

    def test_bytes_are_those_of_the_encoded_messages(self, engine: Engine) -> None:
        request = AttestRequest(Plan.of(config()).sha256)
        (got,) = engine.broadcast(request, ("ash",), 60.0)
        assert got.bytes_down == len(wire.encode(request))
        assert got.bytes_up == len(wire.encode(got.answer))


class TestInProcess(EngineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
        with InProcessEngine(handlers(config(), tmp_path_factory.mktemp("sites"))) as engine:
            yield engine


class TestProcess(EngineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
        with ProcessEngine({s: (honest, (s, tmp_path_factory.mktemp(s))) for s in config().roster}) as engine:
            yield engine

    def test_both_engines_give_the_bit_identical_model(self, tmp_path: Path) -> None:
        settings = config(PAIR, rounds=2, ensemble=2)
        isolated = coordinator(settings, tmp_path / "a")
        with ProcessEngine({s: (one_of_two, (s, tmp_path / "a")) for s in PAIR}) as engine:
            list(isolated.run(engine))
        together = coordinator(settings, tmp_path / "b")
        list(together.run(InProcessEngine(handlers(settings, tmp_path / "b"))))
        assert wire.encode(isolated.model()) == wire.encode(together.model())

    def test_a_hung_killed_or_failing_site_costs_its_own_answer_only(self, tmp_path: Path) -> None:
        settings = config(deadline_s=4.0, quorum=1)
        factories = {
            "ash": (loner, ("ash", tmp_path)),
            "birch": (misbehaving, ("birch", tmp_path, "hang")),
            "cedar": (misbehaving, ("cedar", tmp_path, "killed")),
            "dogwood": (misbehaving, ("dogwood", tmp_path, "raise")),
        }
        with ProcessEngine(factories) as engine:
            report = next(coordinator(settings, tmp_path).run(engine))
        assert report.accepted == ("ash",)
        assert {d.site: d.reason for d in report.dropouts} == {"birch": "late", "cedar": "crashed", "dogwood": "crashed"}
        assert not any("4711" in d.detail for d in report.dropouts)
