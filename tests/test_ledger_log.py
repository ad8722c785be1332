"""The store in SQLite: the laws of every store, and what only a file can have."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_suite import OPERATOR, ORIGIN, LedgerContract, reason, some, temporary

from fedmat.errors import ServiceError, StateError
from fedmat.ledger import log as log_module
from fedmat.ledger import merkle
from fedmat.ledger.log import Log


class TestSqliteLog(LedgerContract):
    @pytest.fixture
    def where(self, tmp_path: Path) -> str:
        return temporary(tmp_path)

    def _tamper(self, log: Log, statement: str) -> None:
        with sqlite3.connect(log.where) as db:
            for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
                db.execute(f"DROP TRIGGER {name}")
            assert db.execute(statement).rowcount > 0
        db.close()

    def test_a_row_cannot_be_replaced_either(self, log: Log) -> None:
        """REPLACE removes the row that is in the way without asking a trigger for DELETE."""
        log.append(some(3))
        log.sign_checkpoint("operator", OPERATOR)
        db = sqlite3.connect(log.where)
        for statement in (
            "REPLACE INTO entry VALUES (1, x'00', x'00')",
            "REPLACE INTO node VALUES (1, 0, x'00')",
            "REPLACE INTO checkpoint VALUES (3, 'other')",
            "REPLACE INTO meta VALUES (1, 'other')",
            "INSERT INTO entry VALUES (4, x'00', x'00')",  # a gap
            "INSERT INTO entry VALUES (-1, x'00', x'00')",
        ):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                db.execute(statement)
        db.close()
        assert log.check() == ()

    def test_commits_are_on_disk(self, log: Log) -> None:
        with log._engine.connect() as db:
            settings = {s: db.exec_driver_sql(f"PRAGMA {s}").scalar() for s in ("journal_mode", "synchronous")}
        assert settings == {"journal_mode": "wal", "synchronous": 2}

    def test_a_writer_that_waits_too_long_is_told(self, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
        log.close()
        monkeypatch.setattr(log_module, "_BUSY_S", 0.05)
        other = sqlite3.connect(log.where, isolation_level=None)
        with Log.open(log.where) as impatient:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(ServiceError, match="database is locked"):
                impatient.append([b"x"])
            other.execute("ROLLBACK")
            assert impatient.append([b"x"]) == range(1)
        other.close()

    def test_a_file_of_something_else_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "notes.txt"
        path.write_text("no database " * 100)
        with pytest.raises(StateError, match="not a ledger"):
            Log.open(path, ORIGIN)
        db = sqlite3.connect(tmp_path / "other.db")
        db.execute("CREATE TABLE meta (id INTEGER, origin TEXT)")
        db.commit()
        db.close()
        with pytest.raises(StateError, match="something else"):
            Log.open(tmp_path / "other.db", ORIGIN)

    def test_looking_for_a_log_makes_none(self, tmp_path: Path) -> None:
        with pytest.raises(StateError, match="there is no ledger"):
            Log.open(tmp_path / "none" / "ledger.db")
        assert list(tmp_path.iterdir()) == []

    def test_a_path_and_its_url_are_the_same_log(self, tmp_path: Path) -> None:
        with Log.open(tmp_path / "a.db", ORIGIN) as log:
            log.append(some(2))
        with Log.open(f"sqlite:///{tmp_path / 'a.db'}") as log:
            assert log.size == 2

    def test_a_large_log_is_checked_in_parts(self, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(log_module, "_CHUNK", 3)
        log.append(some(100))
        log.sign_checkpoint("operator", OPERATOR)
        log.append(some(107)[100:])
        log.sign_checkpoint("operator", OPERATOR)
        assert list(log.read()) == some(107)
        assert log.check() == ()
        self._tamper(log, "UPDATE node SET hash = x'00' WHERE level = 5 AND \"index\" = 2")
        assert [f.place for f in log.check()] == ["entries 64 to 95"]


def test_only_sqlite_and_postgresql_are_known() -> None:
    for where in ("mysql://h/db", "://", "oracle://x"):
        with pytest.raises(StateError):
            Log.open(where, ORIGIN)


def test_a_password_is_in_no_message() -> None:
    with pytest.raises(ServiceError) as caught:
        Log.open("postgresql://someone:hunter2@127.0.0.1:9/none", ORIGIN)
    assert "hunter2" not in str(caught.value)
    assert "someone" in str(caught.value)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.lists(st.integers(0, 60), max_size=12), max_size=8))
def test_any_appends_give_the_log_of_those_that_were_accepted(tmp_path: Path, batches: list[list[int]]) -> None:
    """The model: a list; a batch with anything that is in it, or twice in itself, changes nothing."""
    path = tmp_path / "model.db"
    for old in tmp_path.glob("model.db*"):
        old.unlink()
    model: list[bytes] = []
    with Log.open(path, ORIGIN) as log:
        for batch in batches:
            datas = [b"%d" % n for n in batch]
            if len(set(datas)) < len(datas) or set(datas) & set(model):
                assert reason(log.append, datas) == "replayed_entry"
            else:
                assert log.append(datas) == range(len(model), len(model) + len(datas))
                model += datas
        assert list(log.read()) == model
        assert log.root() == merkle.root_of(map(merkle.leaf_hash, model))
        assert log.check() == ()
