"""The store of the log: entries, the hashes of its tree, checkpoints; in SQLite, or in PostgreSQL by URL.

Knows: bytes in the order they were appended. An append is durable when it returns and all or nothing; writers of any number of
processes take turns. Triggers of the database refuse to change or remove a row; whoever owns the file can drop them, which is
why :meth:`Log.check` computes everything again and members keep checkpoints. Refuses to know: what an entry says, and the clock.

Tables: ``meta`` (the origin), ``entry`` (index, leaf, bytes), ``node`` (hashes of full subtrees from level 1), ``checkpoint``
and ``cosignature``; ``lookup`` finds an entry by its leaf and can be rebuilt from ``entry``. It is not a unique index: that
changes about as many pages as there are entries in a batch, and at 300,000 entries a table took batches at a quarter of its
rate with one, at three fifths with this. It holds sorted runs of growing length: run n of tier t covers the entries from
n * 4096 * 4**t on, and four runs become one of the next tier.

References:
    RFC 9162, section 2.1 (the tree). SQLite: "Write-Ahead Logging", "PRAGMA synchronous". PostgreSQL: "Explicit Locking",
    advisory locks. O'Neil et al., The log-structured merge-tree, Acta Informatica 33 (1996): sorted runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import sqlalchemy as sa

from fedmat.errors import ProtocolError, ServiceError, StateError
from fedmat.keys import PartyKeys
from fedmat.ledger import merkle, notes
from fedmat.ledger.finding import Finding

_BUSY_S = 60  # how long a writer waits for its turn
_CHUNK = 2000  # entries read at a time
_RUN, _FAN = 4096, 4  # lookup: entries of the shortest run, and how many runs become one
_LOCK = 0x6665646D6174  # the advisory lock of whoever appends
_RESTORE = "restore the database from its copy, or rebuild it from an export"

_TABLES = sa.MetaData()
_INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # an INTEGER key is the row's own number there
_META = sa.Table("meta", _TABLES, sa.Column("id", _INTEGER, primary_key=True), sa.Column("origin", sa.Text, nullable=False))
_ENTRY = sa.Table(
    "entry",
    _TABLES,
    sa.Column("index", _INTEGER, primary_key=True, autoincrement=False),
    sa.Column("leaf", sa.LargeBinary, nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
)
_NODE = sa.Table(
    "node",
    _TABLES,
    sa.Column("level", _INTEGER, primary_key=True, autoincrement=False),
    sa.Column("index", _INTEGER, primary_key=True, autoincrement=False),
    sa.Column("hash", sa.LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)
_LOOKUP = sa.Table(
    "lookup",
    _TABLES,
    sa.Column("run", _INTEGER, primary_key=True, autoincrement=False),  # tier * 2**40 + number
    sa.Column("prefix", _INTEGER, primary_key=True, autoincrement=False),  # first 8 bytes of the leaf
    sa.Column("index", _INTEGER, primary_key=True, autoincrement=False),
    sqlite_with_rowid=False,
)
_CHECKPOINT = sa.Table(
    "checkpoint",
    _TABLES,
    sa.Column("size", _INTEGER, primary_key=True, autoincrement=False),
    sa.Column("note", sa.Text, nullable=False),
)
_COSIGNATURE = sa.Table(
    "cosignature",
    _TABLES,
    sa.Column("number", _INTEGER, primary_key=True),
    sa.Column("size", _INTEGER, nullable=False),
    sa.Column("line", sa.Text, nullable=False),
    sa.UniqueConstraint("size", "line"),
)
_Row = tuple[int, bytes, bytes]  # of entry
_KEPT = (_META, _ENTRY, _NODE, _CHECKPOINT, _COSIGNATURE)  # append-only; lookup is made of them


class Log:
    """An append-only log in a database. Use :meth:`open`; close it, or use it in a ``with`` statement."""

    def __init__(self, engine: sa.Engine, where: str, origin: str) -> None:
        self._engine, self.where, self.origin = engine, where, origin
        self._postgres = engine.dialect.name == "postgresql"
        self._mark = "%s" if self._postgres else "?"

    @classmethod
    def open(cls, where: str | Path, origin: str | None = None) -> Log:
        """Opens a log, or begins one.

        Args:
            where: a path (SQLite), or a URL of SQLAlchemy's; ``postgresql://`` means the driver pg8000.
            origin: names the log in its checkpoints. Needed where there is none yet; a log of another origin is refused.

        Raises:
            StateError: there is no log and no origin to begin one with, or what is there is no log.
            ProtocolError: foreign_bundle (the log of another consortium), bad_checkpoint (no origin a checkpoint can have).
            ServiceError: the database does not answer.
        """
        url, shown = _url(where)
        if origin is not None:
            notes.checkpoint(origin, 0, merkle.EMPTY)
        if url.get_backend_name() == "sqlite" and url.database and url.database != ":memory:":
            if origin is None and not Path(url.database).exists():
                raise StateError(f"{shown}: there is no ledger", fix="name its origin to begin one")
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        engine = _engine(url)
        try:
            log = cls(engine, shown, "")
            log.origin = log._begin(origin)
        except BaseException:
            engine.dispose()
            raise
        if origin is not None and log.origin != origin:
            log.close()
            raise ProtocolError(
                "foreign_bundle", f"{shown} is the ledger of {log.origin}, not of {origin}", fix="name the right ledger"
            )
        return log

    def close(self) -> None:
        """Closes the connections."""
        self._engine.dispose()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- entries -----------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Number of entries."""
        with self._reading() as db:
            return _size(db)

    def append(self, datas: Sequence[bytes], *, expected: int | None = None) -> range:
        """Appends entries in one transaction: all of them, or none. They are on disk when this returns.

        Args:
            expected: the size the caller checked these entries against; None appends to whatever is there.

        Returns:
            The indices of the entries.

        Raises:
            ProtocolError: ledger_moved (others appended since ``expected``), replayed_entry (exactly these bytes are in the
                log already, or twice among ``datas``).
            StateError, ServiceError: the database refuses or does not answer; nothing was appended.
        """
        leaves = [merkle.leaf_hash(d) for d in datas]
        _refuse_repeats(leaves)
        with self._writing() as db:
            size = _size(db)
            if expected is not None and expected != size:
                raise ProtocolError(
                    "ledger_moved",
                    f"{self.where} has {size} entries, these were checked against {expected}",
                    fix="read the new entries, check again and append",
                )
            if not leaves:
                return range(size, size)
            known = self._found(db, leaves, size)
            if known:
                raise ProtocolError(
                    "replayed_entry",
                    f"exactly these bytes are entry {min(known)} of {self.where} already",
                    fix="leave it out: it counts once",
                )
            edge = merkle.Frontier(size, self._hashes(db, merkle.cover(0, size)))
            completed = edge.extend(leaves)
            self._insert(db, _ENTRY, [(size + i, leaf, data) for i, (leaf, data) in enumerate(zip(leaves, datas))])
            self._insert(db, _NODE, sorted(completed))  # level by level, as the table keeps them
            self._index(db, size, leaves)
        return range(size, size + len(leaves))

    def read(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yields the bytes of entries ``start`` to ``end - 1`` (default: to the last), in order, some at a time.

        Raises:
            ProtocolError: truncated_log (there are fewer, or one is missing).
        """
        end = merkle.within(end, self.size)
        for first, rows in self._chunks(start, end, _CHUNK):
            for at, (index, _, data) in enumerate(rows, start=first):
                if index != at:
                    raise _missing(at, self.where)
                yield data

    def find(self, data: bytes | None = None, *, leaf: bytes | None = None) -> int | None:
        """Returns the index of the entry with exactly these bytes, or with this leaf; None if there is none."""
        if (data is None) == (leaf is None):
            raise ValueError("find() takes an entry's bytes or its leaf")
        wanted = merkle.leaf_hash(data) if data is not None else leaf or b""
        with self._reading() as db:
            return min(self._found(db, [wanted], _size(db)), default=None)

    # --- the tree ----------------------------------------------------------------------------------------------------

    def root(self, size: int | None = None) -> bytes:
        """Returns the root of the first ``size`` entries (default: all).

        Raises:
            ProtocolError: truncated_log.
        """
        with self._reading() as db:
            return merkle.root(merkle.within(size, _size(db)), lambda places: self._hashes(db, places))

    def inclusion(self, index: int, size: int | None = None) -> tuple[bytes, ...]:
        """Returns the proof that entry ``index`` is among the first ``size`` (default: all).

        Raises:
            ProtocolError: truncated_log.
        """
        with self._reading() as db:
            return merkle.inclusion(index, merkle.within(size, _size(db)), lambda places: self._hashes(db, places))

    def consistency(self, old: int, new: int | None = None) -> tuple[bytes, ...]:
        """Returns the proof that the first ``new`` entries (default: all) begin with the first ``old``.

        Raises:
            ProtocolError: truncated_log.
        """
        with self._reading() as db:
            return merkle.consistency(old, merkle.within(new, _size(db)), lambda places: self._hashes(db, places))

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def sign_checkpoint(self, name: str, keys: PartyKeys) -> str:
        """Returns the signed checkpoint of the log as it is; the one that is there already, if nothing was appended since.

        Raises:
            ProtocolError: truncated_log, forked_log (the log does not go on from its own last checkpoint: the database was
                tampered with or an older copy restored).
        """
        with self._writing() as db:
            size = _size(db)
            last = db.execute(sa.select(_CHECKPOINT).order_by(_CHECKPOINT.c.size.desc()).limit(1)).first()
            if last is not None and last.size == size:
                return self._note(db, size) or ""
            root = merkle.root(size, lambda places: self._hashes(db, places))
            if last is not None:
                self._goes_on(db, last.note, size, root)
            note = notes.sign(notes.checkpoint(self.origin, size, root), name, keys)
            db.execute(sa.insert(_CHECKPOINT).values(size=size, note=note))
            return note

    def add_cosignature(self, size: int, line: str, verifier: notes.Verifier) -> str:
        """Adds a member's cosignature to the checkpoint of that size and returns the note as it is then.

        A second cosignature by the same key adds nothing to the first, which stays.

        Raises:
            ProtocolError: bad_checkpoint (no such checkpoint, or not one line of a signature), bad_signature.
        """
        signature = notes.signature(line)
        if not signature.by(verifier, notes.COSIGNATURE):
            raise ProtocolError("bad_signature", f"this is no cosignature of {verifier.name} with its key")
        with self._writing() as db:
            note = self._note(db, size)
            if note is None:
                raise ProtocolError("bad_checkpoint", f"{self.where} has no checkpoint of {size} entries")
            notes.verified(notes.Note(notes.parse(note).body, (signature,)), verifier, notes.COSIGNATURE)
            if not notes.verified(notes.parse(note), verifier, notes.COSIGNATURE):
                db.execute(sa.insert(_COSIGNATURE).values(size=size, line=line))
                note += line
            return note

    def checkpoint(self, size: int) -> str | None:
        """Returns the checkpoint of that size with its cosignatures, or None."""
        with self._reading() as db:
            return self._note(db, size)

    def checkpoints(self) -> tuple[str, ...]:
        """Returns all checkpoints with their cosignatures, smallest first."""
        with self._reading() as db:
            lines: dict[int, str] = {}
            for row in db.execute(sa.select(_COSIGNATURE).order_by(_COSIGNATURE.c.number)):
                lines[row.size] = lines.get(row.size, "") + row.line
            found = db.execute(sa.select(_CHECKPOINT).order_by(_CHECKPOINT.c.size))
            return tuple(row.note + lines.get(row.size, "") for row in found)

    # --- checking ----------------------------------------------------------------------------------------------------

    def check(self) -> tuple[Finding, ...]:
        """Computes the whole tree again from the entries' bytes and compares it with what is stored.

        Returns:
            The first place where entries or hashes differ, every checkpoint that is not of this log (its root; signatures
            need keys: :func:`fedmat.ledger.export.structure`), and whether the lookup is whole. Nothing: all is well.
        """
        roots: dict[int, tuple[str, bytes]] = {}
        findings: list[Finding] = []
        checkpoints, size = self.checkpoints(), self.size  # in this order: others may append while this runs
        for note in checkpoints:
            try:
                origin, at, root = notes.read(notes.parse(note).body)
            except ProtocolError as error:
                findings.append(Finding("checkpoint", error.what, error.reason))
                continue
            roots[at] = (origin, root)
        differs, seen = self._compared(size, sorted(at for at in roots if 0 < at <= size))
        findings += [differs] if differs else []
        for at, (origin, root) in sorted(roots.items()):
            place = f"checkpoint of {at} entries"
            if origin != self.origin:
                findings.append(Finding(place, f"it is of {origin}, not of {self.origin}", "foreign_bundle"))
            elif at > size:
                findings.append(Finding(place, f"there are {size} entries", "truncated_log"))
            elif seen.get(at) != root:
                findings.append(Finding(place, "the entries do not give its root", "forked_log"))
        with self._reading() as db:
            size = _size(db)  # as of now
            there = db.execute(sa.select(sa.func.count()).select_from(_LOOKUP)).scalar_one()
            if there != size:
                findings.append(Finding("lookup", f"{there} of {size} entries are in it", "damaged_log"))
            stray = db.execute(sa.select(sa.func.count()).select_from(_NODE)).scalar_one()
            if differs is None and stray != size - size.bit_count():
                findings.append(Finding("node", f"{stray} hashes, {size - size.bit_count()} expected", "damaged_log"))
        return tuple(findings)

    def _compared(self, size: int, stops: Sequence[int]) -> tuple[Finding | None, dict[int, bytes]]:
        """Returns the first difference between the entries' bytes and what is stored, and the roots at ``stops``."""
        edge, differs, seen = merkle.Frontier(), None, {0: merkle.EMPTY}
        step = 4 * _CHUNK
        try:
            for first, rows in self._chunks(0, size, step):
                leaves = [merkle.leaf_hash(data) for _, _, data in rows]
                differs = differs or _entry_differs(first, rows, leaves, min(first + step, size))
                if len(rows) < min(step, size - first):
                    break  # entries are missing, and those that follow stand at other places
                at, upto = first, first + len(rows)
                completed: list[merkle.Node] = []
                for stop in (*(s for s in stops if first < s <= upto), upto):
                    completed += edge.extend(leaves[at - first : stop - first])
                    seen[stop], at = edge.root(), stop
                differs = differs or self._node_differs(first, upto, completed)
        except ProtocolError as error:
            differs = differs or Finding("entry", error.what.removeprefix(f"{error.reason}: "), error.reason)
        return differs, seen

    def _node_differs(self, first: int, end: int, completed: list[merkle.Node]) -> Finding | None:
        """Compares the full subtrees that entries ``first`` to ``end - 1`` complete with those stored."""
        expected = {(level, index): found for level, index, found in completed}
        stored: dict[merkle.Place, bytes] = {}
        with self._reading() as db:
            for level in sorted({place[0] for place in expected}):
                inside = sa.and_(_NODE.c.level == level, _NODE.c.index >= first >> level, _NODE.c.index < end >> level)
                stored |= {(level, at): bytes(found) for level, at, found in db.execute(sa.select(_NODE).where(inside))}
        wrong = [place for place, found in expected.items() if stored.get(place) != found]
        if not wrong:
            return None
        level, index = min(wrong, key=lambda place: (place[1] << place[0], place[0]))
        place = f"entries {index << level} to {((index + 1) << level) - 1}"
        what = f"the hash stored for them (level {level}, index {index}) is not the hash of their bytes"
        return Finding(place, what if (level, index) in stored else "no hash is stored for them", "forked_log")

    # --- the database ------------------------------------------------------------------------------------------------

    def _begin(self, origin: str | None) -> str:
        """Makes the tables, where there are none and an origin is given; returns the log's origin."""
        with self._reading() as db:
            found = self._origin(db)
        if found is not None:
            return found
        if origin is None:
            raise StateError(f"{self.where}: there is no ledger", fix="name its origin to begin one")
        with self._writing() as db:
            found = self._origin(db)  # another process may have been faster
            if found is None:
                _TABLES.create_all(db, checkfirst=False)
                for statement in _guards(self._postgres):
                    db.exec_driver_sql(statement)
                db.execute(sa.insert(_META).values(id=1, origin=origin))
        return found or origin

    def _origin(self, db: sa.Connection) -> str | None:
        there = set(sa.inspect(db).get_table_names())
        if _META.name not in there:
            return None
        if not set(_TABLES.tables) <= there:
            raise StateError(f"{self.where}: this database holds something else than a ledger", fix="name another one")
        found = db.execute(sa.select(_META.c.origin)).scalars().all()
        if len(found) != 1:
            raise StateError(f"{self.where}: a ledger without its origin", fix=_RESTORE)
        return str(found[0])

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        """A transaction that sees one state of the log, whoever appends meanwhile."""
        with self._own_errors(), self._engine.connect() as db, db.begin():
            if self._postgres:
                db.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            yield db

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """A transaction of the one writer."""
        with self._own_errors(), self._engine.connect() as plain:
            db = plain.execution_options(fedmat_writing=True)
            with db.begin():
                if self._postgres:
                    db.exec_driver_sql("SET LOCAL synchronous_commit = on")  # a server may have it off
                    db.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
                yield db

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """The database's errors as ours; no bytes of an entry are in them."""
        try:
            yield
        except (sa.exc.OperationalError, sa.exc.InterfaceError) as error:
            raise ServiceError(
                f"{self.where}: the ledger's database does not do what was asked ({_first_line(error)})",
                fix="see that it runs, that its disk has room and that no other program holds it",
            ) from error
        except (sa.exc.DBAPIError, OSError) as error:
            raise StateError(f"{self.where}: not a ledger, or a damaged one ({_first_line(error)})", fix=_RESTORE) from error

    def _insert(self, db: sa.Connection, table: sa.Table, rows: Sequence[tuple[Any, ...]]) -> None:
        """Inserts rows, their values in the order of the table's columns."""
        if not rows:
            return
        names = ", ".join(f'"{c.name}"' for c in table.columns)
        if self._postgres:  # one statement: its driver would send one for each row
            types = ", ".join(f"%s::{c.type.compile(self._engine.dialect)}[]" for c in table.columns)
            columns = tuple(list(column) for column in zip(*rows))
            db.exec_driver_sql(f"INSERT INTO {table.name} ({names}) SELECT * FROM unnest({types})", columns)
        else:
            db.exec_driver_sql(f"INSERT INTO {table.name} ({names}) VALUES ({self._marks(len(table.columns))})", list(rows))

    def _hashes(self, db: sa.Connection, places: Sequence[merkle.Place]) -> list[bytes]:
        """Returns the hashes of full subtrees, in the order asked."""
        leaves = [index for level, index in places if level == 0]
        above = [place for place in places if place[0] > 0]
        found: dict[merkle.Place, bytes] = {}
        if leaves:
            asked = f'SELECT "index", leaf FROM entry WHERE "index" IN ({self._marks(len(leaves))})'
            found |= {(0, index): bytes(leaf) for index, leaf in db.exec_driver_sql(asked, tuple(leaves))}
        if above:  # a pair at a time: with a list of pairs neither database would use the key
            each = " OR ".join([f'(level = {self._mark} AND "index" = {self._mark})'] * len(above))
            rows = db.exec_driver_sql(f'SELECT level, "index", hash FROM node WHERE {each}', tuple(chain(*above)))
            found |= {(level, index): bytes(digest) for level, index, digest in rows}
        try:
            return [found[place] for place in places]
        except KeyError:
            raise StateError(f"{self.where}: hashes of the tree are missing", fix=_RESTORE) from None

    def _chunks(self, start: int, end: int, step: int) -> Iterator[tuple[int, list[_Row]]]:
        """Yields the first index asked for and the rows there, some at a time; every time at least one."""
        for first in range(start, end, step):
            inside = sa.and_(_ENTRY.c.index >= first, _ENTRY.c.index < min(first + step, end))
            with self._reading() as db:
                found = db.execute(sa.select(_ENTRY).where(inside).order_by(_ENTRY.c.index))
                rows = [(int(index), bytes(leaf), bytes(data)) for index, leaf, data in found]
            if not rows:
                raise _missing(first, self.where)
            yield first, rows

    def _marks(self, count: int) -> str:
        return ", ".join([self._mark] * count)

    # --- lookup ------------------------------------------------------------------------------------------------------

    def _found(self, db: sa.Connection, leaves: Sequence[bytes], size: int) -> list[int]:
        """Returns the indices of entries that have one of these leaves."""
        by_prefix = {_prefix(leaf): leaf for leaf in leaves}
        runs = _runs(size)
        found: list[int] = []
        for at in range(0, len(by_prefix), 500):
            some = list(by_prefix)[at : at + 500]
            where = f"run IN ({self._marks(len(runs))}) AND prefix IN ({self._marks(len(some))})"
            found += db.exec_driver_sql(f'SELECT "index" FROM lookup WHERE {where}', (*runs, *some)).scalars()
        if not found:
            return []
        wanted = set(leaves)
        rows = db.execute(sa.select(_ENTRY.c.index, _ENTRY.c.leaf).where(_ENTRY.c.index.in_(found)))
        return [int(index) for index, leaf in rows if bytes(leaf) in wanted]  # eight bytes alone may be another entry's

    def _index(self, db: sa.Connection, size: int, leaves: Sequence[bytes]) -> None:
        """Puts new entries into the lookup, and makes longer runs of those that are complete."""
        rows = sorted((_run(0, (size + i) // _RUN), _prefix(leaf), size + i) for i, leaf in enumerate(leaves))
        self._insert(db, _LOOKUP, rows)
        for number in range(size // _RUN, (size + len(leaves)) // _RUN):
            tier, run = 0, number
            while run % _FAN == _FAN - 1:
                run //= _FAN
                parts = _LOOKUP.c.run.in_([_run(tier, run * _FAN + i) for i in range(_FAN)])
                tier += 1
                picked = sa.select(sa.literal(_run(tier, run)), _LOOKUP.c.prefix, _LOOKUP.c.index).where(parts)
                merged = picked.order_by(_LOOKUP.c.prefix, _LOOKUP.c.index)
                db.execute(sa.insert(_LOOKUP).from_select([c.name for c in _LOOKUP.columns], merged))
                db.execute(sa.delete(_LOOKUP).where(parts))

    # --- checkpoints' rows -------------------------------------------------------------------------------------------

    def _note(self, db: sa.Connection, size: int) -> str | None:
        note = db.execute(sa.select(_CHECKPOINT.c.note).where(_CHECKPOINT.c.size == size)).scalar()
        if note is None:
            return None
        lines = sa.select(_COSIGNATURE.c.line).where(_COSIGNATURE.c.size == size).order_by(_COSIGNATURE.c.number)
        return str(note) + "".join(db.execute(lines).scalars())

    def _goes_on(self, db: sa.Connection, note: str, size: int, root: bytes) -> None:
        """Refuses to sign what does not go on from what was signed last: that would be a second history."""
        _, last, before = notes.read(notes.parse(note).body)
        if last > size:
            raise ProtocolError("truncated_log", f"{self.where} has {size} entries, {last} were signed", fix=_RESTORE)
        proof = merkle.consistency(last, size, lambda places: self._hashes(db, places))
        if not merkle.verify_consistency(last, size, proof, before, root):
            raise ProtocolError(
                "forked_log", f"{self.where} does not go on from its own checkpoint of {last} entries", fix=_RESTORE
            )


# --- pieces ----------------------------------------------------------------------------------------------------------


def _size(db: sa.Connection) -> int:
    last = db.exec_driver_sql('SELECT max("index") FROM entry').scalar()
    return 0 if last is None else int(last) + 1


def _prefix(leaf: bytes) -> int:
    return int.from_bytes(leaf[:8], "big", signed=True)


def _run(tier: int, number: int) -> int:
    return (tier << 40) + number


def _runs(size: int) -> list[int]:
    """Returns the runs of a lookup of that many entries; the last one may be incomplete."""
    runs, tier, left = [_run(0, size // _RUN)], 0, size // _RUN
    while left:
        runs += [_run(tier, left - 1 - i) for i in range(left % _FAN)]
        tier, left = tier + 1, left // _FAN
    return runs


def _refuse_repeats(leaves: Sequence[bytes]) -> None:
    if len(set(leaves)) == len(leaves):
        return
    first: dict[bytes, int] = {}
    for at, leaf in enumerate(leaves):
        if first.setdefault(leaf, at) != at:
            raise ProtocolError(
                "replayed_entry",
                f"number {at} of these entries has exactly the bytes of number {first[leaf]}",
                fix="append it once",
            )


def _entry_differs(first: int, rows: Sequence[_Row], leaves: Sequence[bytes], end: int) -> Finding | None:
    for at, ((index, stored, _), leaf) in enumerate(zip(rows, leaves), start=first):
        if index != at:
            return Finding(f"entry {at}", "it is missing", "truncated_log")
        if stored != leaf:
            return Finding(f"entry {at}", "the leaf stored with it is not the hash of its bytes", "forked_log")
    if first + len(rows) < end:
        return Finding(f"entry {first + len(rows)}", "it is missing", "truncated_log")
    return None


def _missing(index: int, where: str) -> ProtocolError:
    return ProtocolError("truncated_log", f"entry {index} of {where} is missing", fix=_RESTORE)


def _first_line(error: BaseException) -> str:
    """Returns what kind of error it was; drivers put values into their texts, so those stay out."""
    cause = getattr(error, "orig", None) or error
    text = str(cause) if type(cause).__module__ == "sqlite3" else ""  # SQLite's own texts name tables and columns only
    return f"{type(cause).__name__} {text}".strip()


def _url(where: str | Path) -> tuple[sa.URL, str]:
    """Returns the URL, and how the log is called in messages: never with a password."""
    text = str(where)
    if isinstance(where, Path) or "://" not in text:
        return sa.URL.create("sqlite", database=text), text
    try:
        url = sa.make_url(text)
    except sa.exc.ArgumentError:
        raise StateError(
            "the ledger's URL is not one of SQLAlchemy's", fix="a path, sqlite:///path or postgresql://.."
        ) from None
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+pg8000")
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise StateError(
            f"a ledger is kept in SQLite or PostgreSQL, not in {url.get_backend_name()}", fix="a path or postgresql://.."
        )
    return url, url.render_as_string(hide_password=True)


def _engine(url: sa.URL) -> sa.Engine:
    if url.get_backend_name() == "postgresql":
        return sa.create_engine(url, hide_parameters=True, pool_pre_ping=True, isolation_level="READ COMMITTED")
    engine = sa.create_engine(url, hide_parameters=True, connect_args={"timeout": _BUSY_S})

    @sa.event.listens_for(engine, "connect")
    def _connected(connection: Any, record: object) -> None:
        connection.isolation_level = None  # transactions begin below, not where the driver thinks they should
        for setting in ("journal_mode = WAL", "synchronous = FULL", "cache_size = -32768", "wal_autocheckpoint = 16000"):
            connection.execute(f"PRAGMA {setting}")

    @sa.event.listens_for(engine, "begin")
    def _begun(connection: sa.Connection) -> None:
        # IMMEDIATE: a writer waits here, not in the middle, where it would have to give up
        writing = connection.get_execution_options().get("fedmat_writing")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine


def _guards(postgres: bool) -> Iterator[str]:
    """Yields the statements that make the tables append-only."""
    if postgres:
        yield (
            "CREATE FUNCTION ledger_append_only() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'the ledger is append-only'; END $$"
        )
        for table in _KEPT:
            yield (
                f"CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table.name} "
                "FOR EACH STATEMENT EXECUTE FUNCTION ledger_append_only()"
            )
        return
    refuse = "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
    for table in _KEPT:
        for verb in ("UPDATE", "DELETE"):
            yield f"CREATE TRIGGER {table.name}_no_{verb.lower()} BEFORE {verb} ON {table.name} {refuse}"
        if table is _ENTRY:
            continue  # below
        # REPLACE removes rows without asking the trigger above
        same = " AND ".join(f'"{c.name}" = NEW."{c.name}"' for c in table.primary_key.columns)
        there = f"EXISTS (SELECT 1 FROM {table.name} WHERE {same})"
        yield f"CREATE TRIGGER {table.name}_no_replace BEFORE INSERT ON {table.name} WHEN {there} {refuse}"
    yield (
        'CREATE TRIGGER entry_in_order BEFORE INSERT ON entry WHEN NEW."index" IS NOT '
        f'(SELECT coalesce(max("index") + 1, 0) FROM entry) {refuse}'
    )
