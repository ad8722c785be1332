"""What every store of the ledger must do, whatever database is under it. A new one subclasses :class:`LedgerContract`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from fedmat.errors import ProtocolError, StateError
from fedmat.keys import PartyKeys
from fedmat.ledger import log as log_module
from fedmat.ledger import merkle, notes
from fedmat.ledger.log import Log
from fedmat.ledger.notes import Verifier

ORIGIN = "fedmat/test"
OPERATOR = PartyKeys.new("operator")
MEMBERS = tuple(PartyKeys.new(f"member-{i}") for i in range(3))

_WRITER = textwrap.dedent("""
    import sys
    from fedmat.ledger.log import Log
    where, tag, batches, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    with Log.open(where, "fedmat/test") as log:
        for batch in range(batches):
            got = log.append([f"{tag} {batch} {i}".encode() for i in range(size)])
            print(got.stop, flush=True)
""")


def writer(where: str, tag: str, batches: int, size: int) -> subprocess.Popen[str]:
    """Another process that appends, and prints the log's size after every append."""
    arguments = [sys.executable, "-c", _WRITER, where, tag, str(batches), str(size)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def some(count: int, tag: str = "entry") -> list[bytes]:
    return [f"{tag} {i}".encode() for i in range(count)]


def reason(call: object, *args: object, **kwargs: object) -> str:
    with pytest.raises(ProtocolError) as caught:
        call(*args, **kwargs)  # type: ignore[operator]
    return caught.value.reason


class LedgerContract:
    """The laws. A subclass gives the fixture ``where``: the name of a database in which nothing is."""

    @pytest.fixture
    def where(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def log(self, where: str) -> Iterator[Log]:
        with Log.open(where, ORIGIN) as log:
            yield log

    # --- entries

    def test_an_empty_log_has_the_root_of_no_leaves(self, log: Log) -> None:
        assert (log.size, log.root(), list(log.read()), log.checkpoints()) == (0, merkle.EMPTY, [], ())
        assert log.append([]) == range(0)
        assert log.check() == ()

    def test_entries_come_back_in_order_and_byte_by_byte(self, log: Log) -> None:
        entries = [b"", b"\x00\xff", *some(70), "é".encode()]
        assert log.append(entries[:1]) == range(1)
        assert log.append(entries[1:40]) == range(1, 40)
        assert log.append(entries[40:]) == range(40, len(entries))
        assert list(log.read()) == entries
        assert list(log.read(5, 9)) == entries[5:9]
        assert list(log.read(9, 9)) == []

    def test_roots_and_proofs_are_those_of_the_tree_in_memory(self, log: Log) -> None:
        entries = some(75)
        for start in range(0, 75, 7):  # batches that end at every kind of size
            log.append(entries[start : start + 7])
        tree = merkle.Tree(map(merkle.leaf_hash, entries))
        for size in range(76):
            assert log.root(size) == tree.root(size)
        for size in (1, 2, 33, 64, 75):
            for index in range(size):
                assert log.inclusion(index, size) == tree.inclusion(index, size)
            for old in range(size + 1):
                assert log.consistency(old, size) == tree.consistency(old, size)
        assert log.check() == ()

    def test_what_is_not_there_is_not_proved(self, log: Log) -> None:
        log.append(some(5))
        for call in (
            lambda: log.root(6), lambda: log.inclusion(5), lambda: log.inclusion(-1), lambda: log.inclusion(0, 6),
            lambda: log.consistency(6), lambda: log.consistency(3, 6), lambda: log.consistency(4, 3), lambda: list(log.read(0, 6)),
        ):  # fmt: skip
            assert reason(call) == "truncated_log"

    def test_the_same_bytes_do_not_count_twice(self, log: Log) -> None:
        log.append(some(10))
        with pytest.raises(ProtocolError, match="entry 7") as caught:
            log.append([b"new", b"entry 7", b"entry 9"])
        assert caught.value.reason == "replayed_entry"
        with pytest.raises(ProtocolError, match="number 2 .* number 0") as caught:
            log.append([b"twin", b"other", b"twin"])
        assert caught.value.reason == "replayed_entry"
        assert log.size == 10  # all or nothing
        assert log.find(b"new") is None

    def test_an_entry_is_found_by_its_bytes_or_its_leaf(self, log: Log) -> None:
        log.append(some(40))
        for index in range(40):
            data = f"entry {index}".encode()
            assert log.find(data) == log.find(leaf=merkle.leaf_hash(data)) == index
        assert log.find(b"entry 40") is None
        with pytest.raises(ValueError, match="bytes or its leaf"):
            log.find()

    def test_entries_are_found_in_every_run_of_the_lookup(self, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(log_module, "_RUN", 4)
        monkeypatch.setattr(log_module, "_FAN", 2)
        there = 0
        for batch in (1, 2, 3, 1, 9, 33, 5, 1, 1, 40):  # runs end inside batches, at their ends and several at once
            log.append(some(there + batch)[there:])
            there += batch
            assert [log.find(d) for d in some(there)] == list(range(there))
            assert reason(log.append, [f"entry {there - 1}".encode()]) == "replayed_entry"
        assert log.check() == ()

    def test_two_leaves_with_the_same_first_bytes_are_two_entries(self, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(log_module, "_prefix", lambda leaf: leaf[0] % 2)
        log.append(some(30))
        assert [log.find(d) for d in some(30)] == list(range(30))
        assert log.find(b"other") is None
        assert reason(log.append, [b"entry 3"]) == "replayed_entry"

    def test_an_append_checked_against_an_older_log_is_refused(self, log: Log, where: str) -> None:
        log.append(some(3), expected=0)
        with Log.open(where) as other:
            other.append([b"other"], expected=3)
        assert reason(log.append, [b"mine"], expected=3) == "ledger_moved"
        assert log.append([b"mine"], expected=4) == range(4, 5)

    def test_the_database_itself_refuses_to_change_a_row(self, log: Log) -> None:
        log.append(some(4))
        log.sign_checkpoint("operator", OPERATOR)
        log.add_cosignature(4, self._line(log, 4, MEMBERS[0]), Verifier.of("member-0", MEMBERS[0]))
        columns = {"meta": "origin", "entry": "data", "node": "hash", "checkpoint": "note", "cosignature": "line"}
        for table, column in columns.items():
            for statement in (f"DELETE FROM {table}", f"UPDATE {table} SET {column} = {column}"):
                with pytest.raises(sa.exc.DBAPIError, match="append-only"), log._engine.begin() as db:
                    db.exec_driver_sql(statement)
        assert log.check() == ()

    def _line(self, log: Log, size: int, keys: PartyKeys, now: int = 1_700_000_000) -> str:
        note = log.checkpoint(size)
        assert note is not None
        return notes.cosign(notes.parse(note).body, keys.name, keys, now)

    # --- the log as a whole

    def test_a_log_is_there_when_it_is_opened_again(self, log: Log, where: str) -> None:
        log.append(some(9))
        root, note = log.root(), log.sign_checkpoint("operator", OPERATOR)
        log.close()
        for origin in (None, ORIGIN):
            with Log.open(where, origin) as again:
                assert (again.origin, again.size, again.root(), again.checkpoints()) == (ORIGIN, 9, root, (note,))
                assert again.check() == ()

    def test_the_log_of_another_consortium_is_refused(self, log: Log, where: str) -> None:
        log.close()
        assert reason(Log.open, where, "fedmat/other") == "foreign_bundle"

    def test_a_log_needs_an_origin_to_begin(self, where: str) -> None:
        with pytest.raises(StateError, match="there is no ledger"):
            Log.open(where)
        assert reason(Log.open, where, "two\nlines") == "bad_checkpoint"

    def test_a_database_of_something_else_is_refused(self, where: str, log: Log) -> None:
        log.close()
        with Log.open(where) as again, again._engine.begin() as db:
            db.exec_driver_sql("DROP TABLE lookup")
        with pytest.raises(StateError, match="something else"):
            Log.open(where)

    # --- checkpoints

    def test_a_checkpoint_is_signed_once_for_each_size(self, log: Log) -> None:
        empty = log.sign_checkpoint("operator", OPERATOR)
        log.append(some(3))
        first = log.sign_checkpoint("operator", OPERATOR)
        assert log.sign_checkpoint("operator", OPERATOR) == first == log.checkpoint(3)
        log.append([b"more"])
        second = log.sign_checkpoint("operator", OPERATOR)
        assert log.checkpoints() == (empty, first, second)
        assert log.checkpoint(2) is None
        found = notes.verify(second, Verifier.of("operator", OPERATOR), (), 0)
        assert (found.origin, found.size, found.root) == (ORIGIN, 4, log.root())

    def test_cosignatures_are_kept_once_for_each_member(self, log: Log) -> None:
        log.append(some(3))
        note = log.sign_checkpoint("operator", OPERATOR)
        for keys in MEMBERS:
            line = self._line(log, 3, keys)
            note += line
            verifier = Verifier.of(keys.name, keys)
            assert log.add_cosignature(3, line, verifier) == note
            assert log.add_cosignature(3, self._line(log, 3, keys, 1_800_000_000), verifier) == note  # the first one stays
        assert log.checkpoints() == (note,)
        assert log.sign_checkpoint("operator", OPERATOR) == note
        members = [Verifier.of(k.name, k) for k in MEMBERS]
        assert set(notes.verify(note, Verifier.of("operator", OPERATOR), members, 3).cosigners) == {k.name for k in MEMBERS}

    def test_a_cosignature_that_does_not_verify_is_not_kept(self, log: Log) -> None:
        log.append(some(3))
        note = log.sign_checkpoint("operator", OPERATOR)
        verifier = Verifier.of("member-0", MEMBERS[0])
        line = self._line(log, 3, MEMBERS[0])
        other = notes.cosign(notes.checkpoint(ORIGIN, 3, bytes(32)), "member-0", MEMBERS[0], 5)
        assert reason(log.add_cosignature, 3, other, verifier) == "bad_signature"  # of another root
        assert reason(log.add_cosignature, 3, self._line(log, 3, MEMBERS[1]), verifier) == "bad_signature"
        assert reason(log.add_cosignature, 3, line[:-1], verifier) == "bad_checkpoint"
        assert reason(log.add_cosignature, 3, line + line, verifier) == "bad_checkpoint"
        assert reason(log.add_cosignature, 4, line, verifier) == "bad_checkpoint"
        assert log.checkpoints() == (note,)

    # --- tampering with the database

    def _tamper(self, log: Log, statement: str) -> None:
        raise NotImplementedError

    def test_check_names_the_first_entry_whose_bytes_were_changed(self, log: Log) -> None:
        log.append(some(50))
        log.sign_checkpoint("operator", OPERATOR)
        self._tamper(log, 'UPDATE entry SET data = (SELECT data FROM entry WHERE "index" = 0) WHERE "index" IN (17, 30)')
        tree, checkpoint = log.check()
        assert (tree.place, tree.reason) == ("entry 17", "forked_log")
        assert (checkpoint.place, checkpoint.reason) == ("checkpoint of 50 entries", "forked_log")

    def test_check_names_the_leaf_that_was_changed(self, log: Log) -> None:
        log.append(some(50))
        self._tamper(log, 'UPDATE entry SET leaf = (SELECT leaf FROM entry WHERE "index" = 0) WHERE "index" = 31')
        assert [(f.place, f.reason) for f in log.check()] == [("entry 31", "forked_log")]

    def test_check_names_the_hash_that_was_changed(self, log: Log) -> None:
        log.append(some(50))
        self._tamper(log, 'UPDATE node SET hash = (SELECT leaf FROM entry WHERE "index" = 0) WHERE level = 2 AND "index" = 5')
        (found,) = log.check()
        assert (found.place, found.reason) == ("entries 20 to 23", "forked_log")

    @pytest.mark.parametrize("index", [0, 20, 49])
    def test_check_names_the_entry_that_was_removed(self, log: Log, index: int) -> None:
        log.append(some(50))
        log.sign_checkpoint("operator", OPERATOR)
        self._tamper(log, f'DELETE FROM entry WHERE "index" = {index}')
        found = log.check()
        if index == 49:  # the last one: only the checkpoint tells
            assert ("checkpoint of 50 entries", "truncated_log") in {(f.place, f.reason) for f in found}
            assert reason(log.sign_checkpoint, "operator", OPERATOR) == "truncated_log"
        else:
            assert (found[0].place, found[0].reason) == (f"entry {index}", "truncated_log")

    def test_check_names_what_the_lookup_lacks(self, log: Log) -> None:
        log.append(some(50))
        self._tamper(log, 'DELETE FROM lookup WHERE "index" = 4')
        assert [(f.place, f.reason) for f in log.check()] == [("lookup", "damaged_log")]

    def test_no_checkpoint_is_signed_that_does_not_go_on_from_the_last(self, log: Log) -> None:
        log.append(some(6))
        log.sign_checkpoint("operator", OPERATOR)
        self._tamper(log, 'UPDATE node SET hash = (SELECT leaf FROM entry WHERE "index" = 0) WHERE level = 1 AND "index" = 2')
        log.append([b"more"])
        assert reason(log.sign_checkpoint, "operator", OPERATOR) == "forked_log"

    # --- crashes and several writers

    def test_processes_take_turns(self, where: str) -> None:
        writers = [writer(where, f"writer-{n}", 6, 5) for n in range(4)]  # all of them find no log and begin it
        sizes = [int(line) for process in writers for line in process.communicate(timeout=60)[0].split()]
        assert [process.returncode for process in writers] == [0] * 4
        assert sorted(sizes) == list(range(5, 125, 5))
        with Log.open(where, ORIGIN) as log:
            entries = list(log.read())
            assert len(set(entries)) == log.size == 120
            assert log.check() == ()
        for at in range(0, 120, 5):  # no batch has another one's entry in between
            assert len({entry.rsplit(b" ", 1)[0] for entry in entries[at : at + 5]}) == 1

    def test_who_reads_while_another_appends_sees_one_log(self, log: Log, where: str) -> None:
        """Enough entries for the lookup's runs to be merged while they are searched."""
        log.append([b"first"])
        process = writer(where, "busy", 60, 500)
        looks = 0
        while process.poll() is None or looks < 3:
            looks += 1
            assert log.find(b"first") == 0
            size = log.size
            assert log.find(leaf=merkle.leaf_hash(next(log.read(size - 1, size)))) == size - 1
            assert merkle.verify_consistency(1, size, log.consistency(1, size), log.root(1), log.root(size))
            if looks % 10 == 1:
                log.sign_checkpoint("operator", OPERATOR)
                assert log.check() == ()
        assert process.communicate()[0].split()[-1] == "30001"
        assert process.returncode == 0
        assert log.check() == ()

    KILLS = 6

    def test_a_killed_writer_leaves_whole_appends(self, where: str) -> None:
        with Log.open(where, ORIGIN) as log:
            before = 0
            for kill in range(self.KILLS):
                process = writer(where, f"kill-{kill}", 100_000, 7)
                assert process.stdout is not None
                process.stdout.readline()  # it is at work
                time.sleep(0.01 + 0.03 * (os.urandom(1)[0] / 255))
                process.send_signal(signal.SIGKILL)
                told = process.stdout.read().split()
                process.stdout.close()
                process.wait()
                deadline = time.monotonic() + 10
                log.append([f"after {kill}".encode()])  # waits for a server to notice that the writer is gone
                assert time.monotonic() < deadline
                size = log.size
                assert (size - before) % 7 == 1, "half a batch was kept"
                assert size >= int(told[-1] if told else before), "an append that was confirmed is lost"
                before = size
            assert log.check() == ()
            tree = merkle.Tree(merkle.leaf_hash(data) for data in log.read())
            assert (tree.size, tree.root()) == (log.size, log.root())


def temporary(path: Path) -> str:
    return str(path / "ledger.db")
