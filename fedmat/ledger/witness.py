"""A member's witness: it cosigns a log's checkpoints as long as each goes on from the last one it saw.

Knows: one log's origin, its operator's key, and the last checkpoint it cosigned. Refuses to know: the entries, and the clock
(``now`` is given). It never cosigns two checkpoints that cannot be of one history; so an operator that shows two histories
gets a member's cosignature on one of them only.

All it has is one file. Whoever puts an older copy of it back makes the witness forget, and it can be shown a second history
from there: keep it out of what is restored from a backup together with the operator's data.

Reference:
    C2SP tlog-witness (the rules of add-checkpoint: the old size must match, the new state is on disk before the reply, both
    in one step). RFC 9162, section 2.1.4 (consistency).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedmat import files
from fedmat.errors import ProtocolError, StateError
from fedmat.keys import PartyKeys
from fedmat.ledger import merkle, notes
from fedmat.ledger.notes import Verifier

FILE = "witness.json"
FORK = "fork-{}.txt"  # two signed checkpoints that exclude each other: evidence against the operator


@dataclass(frozen=True)
class Seen:
    """What a witness has seen of a log.

    Attributes:
        root: 32 bytes.
        time: when it last cosigned, seconds since 1970; 0 for never.
        note: the checkpoint it cosigned, as the operator signed it; "" for none.
    """

    size: int = 0
    root: bytes = merkle.EMPTY
    time: int = 0
    note: str = ""


@dataclass(frozen=True)
class Witness:
    """One member's witness of one log.

    Attributes:
        folder: its own; the state is in ``witness.json``.
        origin: of the log; checkpoints of any other are refused.
    """

    name: str
    keys: PartyKeys
    folder: Path
    operator: Verifier
    origin: str

    @property
    def seen(self) -> Seen:
        """What it has seen so far: the operator proves consistency from ``seen.size`` on.

        Raises:
            StateError: the state is damaged or of another log.
        """
        return self._read()

    def cosign(self, note: str, old_size: int, proof: Sequence[bytes], now: int) -> str:
        """Returns the cosignature line of a checkpoint that goes on from the last one; the new state is on disk by then.

        Args:
            old_size: entries of the last checkpoint this witness cosigned (0: none).
            proof: consistency from ``old_size`` to the checkpoint; empty where they are equal or ``old_size`` is 0.
            now: seconds since 1970.

        Raises:
            ProtocolError: bad_checkpoint, bad_signature, foreign_bundle (another log), stale_checkpoint (smaller than one it
                cosigned), ledger_moved (``old_size`` is not where it stands), forked_log (another history; the evidence is
                kept in the folder), bad_proof, clock_backwards.
            StateError: its own state is damaged.
        """
        offered = notes.verify(note, self.operator, (), 0)
        if offered.origin != self.origin:
            raise ProtocolError(
                "foreign_bundle", f"a checkpoint of {offered.origin}; {self.name} is a witness of {self.origin}"
            )
        with self._alone():
            seen = self._read()
            self._refuse(offered, seen, old_size, proof)
            if now < seen.time:
                raise ProtocolError(
                    "clock_backwards",
                    f"{self.name} cosigned at {seen.time} and would now at {now}",
                    fix="set the clock of the witness",
                )
            body = notes.parse(note).body
            self._write(Seen(offered.size, offered.root, now, note))
            return notes.cosign(body, self.name, self.keys, now)

    def _refuse(self, offered: notes.Checkpoint, seen: Seen, old_size: int, proof: Sequence[bytes]) -> None:
        size = offered.size
        if size < seen.size:
            raise ProtocolError(
                "stale_checkpoint", f"a checkpoint of {size} entries; {self.name} has cosigned one of {seen.size}"
            )
        if size == seen.size and offered.root != seen.root:
            raise self._forked(offered, seen)
        if old_size != seen.size:
            raise ProtocolError(
                "ledger_moved",
                f"{self.name} stands at {seen.size} entries, the proof begins at {old_size}",
                fix="prove from there",
            )
        if not merkle.verify_consistency(seen.size, size, proof, seen.root, offered.root):
            if merkle.shows_fork(seen.size, size, proof, seen.root, offered.root):
                raise self._forked(offered, seen)
            raise ProtocolError(
                "bad_proof",
                f"nothing proves that the log of {size} entries begins with the {seen.size} that {self.name} has seen",
                fix="ask the operator for the proof; if there is none, the log was rewritten",
            )

    def _forked(self, offered: notes.Checkpoint, seen: Seen) -> ProtocolError:
        evidence = self.folder / FORK.format(files.sha256(offered.note.encode())[:16])
        files.write_atomic(evidence, f"{seen.note}\n{offered.note}".encode())
        return ProtocolError(
            "forked_log",
            f"{self.operator.name} signed a log of {offered.size} entries that is not the one of {seen.size} entries "
            f"that {self.name} cosigned",
            fix=f"both signed checkpoints are in {evidence.name}: show them to the other members",
        )

    # --- its file ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the folder against other processes: reading, deciding and writing are one step."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _read(self) -> Seen:
        path = self.folder / FILE
        if not path.exists():
            return Seen()
        found = files.read_json(path)
        try:
            origin, seen = str(found["origin"]), _parsed(found)
        except (LookupError, TypeError, ValueError):
            raise StateError(f"{path}: damaged", fix="restore it; a witness that forgets can be shown two histories") from None
        if origin != self.origin:
            raise StateError(f"{path}: a witness of {origin}, not of {self.origin}", fix="give each log a folder of its own")
        return seen

    def _write(self, seen: Seen) -> None:
        state = {"note": seen.note, "origin": self.origin, "root": seen.root.hex(), "size": seen.size, "time": seen.time}
        files.write_json(self.folder / FILE, state)
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)  # the new name too must survive a loss of power
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _parsed(found: dict[str, object]) -> Seen:
    size, root, time, note = found["size"], bytes.fromhex(str(found["root"])), found["time"], found["note"]
    if type(size) is not int or type(time) is not int or not isinstance(note, str) or size < 0 or len(root) != 32:
        raise ValueError("not the state of a witness")
    if set(found) != {"note", "origin", "root", "size", "time"}:
        raise ValueError("not the state of a witness")
    return Seen(size, root, time, note)
