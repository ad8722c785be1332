"""The Merkle tree of an append-only log: roots, proofs and how to check them.

Knows: hashes of leaves and of full subtrees. A tree of any size is made of full subtrees (2**level leaves each), whose hashes
never change once they are there; every root and proof is computed from O(log n) of them, which the caller fetches from
wherever they are kept (:data:`Hashes`). Refuses to know: what a leaf's data means, where hashes are stored, signatures.

A *leaf* is the 32-byte hash of an entry's bytes (:func:`leaf_hash`), never the bytes themselves.

References:
    RFC 9162 (Certificate Transparency 2.0): section 2.1.1 (tree hash), 2.1.3 (inclusion), 2.1.4 (consistency).
    RFC 6962, section 2.1: the same tree. Hashes of leaves and of nodes begin with different bytes, so that a node can never
    be shown as an entry (second preimages).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

from fedmat.errors import ProtocolError

HASH_BYTES = 32
EMPTY = hashlib.sha256(b"").digest()
"""Root of a tree without leaves."""

Place = tuple[int, int]
"""(level, index): the full subtree over the leaves from ``index * 2**level`` to ``(index + 1) * 2**level - 1``."""
Hashes = Callable[[Sequence[Place]], Sequence[bytes]]
"""Gives the hashes of full subtrees, in the order asked; asked once per root or proof, for O(log n) places."""
Node = tuple[int, int, bytes]
"""(level, index, hash) of a full subtree."""

_Range = tuple[int, int]


def leaf_hash(data: bytes) -> bytes:
    """Returns the leaf of an entry: SHA-256(0x00 || data)."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Returns the hash of an inner node: SHA-256(0x01 || left || right)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


# --- roots and proofs from full subtrees -----------------------------------------------------------------------------


def cover(start: int, end: int) -> list[Place]:
    """Returns the fewest full subtrees over the leaves ``[start, end)``, left to right.

    ``start`` is 0 or a multiple of the largest power of two below ``end - start``, as in every range of a proof; the subtrees
    then only get smaller, and the range's hash is their hashes folded from the right.
    """
    places = []
    while start < end:
        level = (end - start).bit_length() - 1
        places.append((level, start >> level))
        start += 1 << level
    return places


def root(size: int, hashes: Hashes) -> bytes:
    """Returns the root of the first ``size`` leaves (RFC 9162, 2.1.1)."""
    return EMPTY if size == 0 else _folded([(0, size)], hashes)[0]


def inclusion(index: int, size: int, hashes: Hashes) -> tuple[bytes, ...]:
    """Returns the proof that leaf ``index`` is in the tree of ``size`` leaves (RFC 9162, 2.1.3.1), at most 64 hashes.

    Raises:
        ProtocolError: truncated_log (no such leaf in a tree of that size).
    """
    if not 0 <= index < size:
        raise ProtocolError("truncated_log", f"entry {index} was asked of a log of {size} entries")
    path, start, end = [], 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            path.append((middle, end))
            end = middle
        else:
            path.append((start, middle))
            start = middle
    return _folded(path[::-1], hashes)


def consistency(old: int, new: int, hashes: Hashes) -> tuple[bytes, ...]:
    """Returns the proof that the tree of ``new`` leaves begins with the tree of ``old`` (RFC 9162, 2.1.4.1).

    It is empty where ``old`` is 0 or ``new``: there is nothing to prove.

    Raises:
        ProtocolError: truncated_log (``old`` is larger than ``new``).
    """
    if not 0 <= old <= new:
        raise ProtocolError("truncated_log", f"a log of {new} entries cannot go on from {old}")
    if old in (0, new):
        return ()
    path, start, end, known = [], 0, new, True  # known: the old tree is a left part of this subtree, and its root is known
    while old != end:
        middle = start + _split(end - start)
        if old <= middle:
            path.append((middle, end))
            end = middle
        else:
            path.append((start, middle))
            start, known = middle, False
    if not known:
        path.append((start, end))
    return _folded(path[::-1], hashes)


def _split(size: int) -> int:
    """Returns the largest power of two below ``size``."""
    return 1 << ((size - 1).bit_length() - 1)


def _folded(ranges: Sequence[_Range], hashes: Hashes) -> tuple[bytes, ...]:
    covers = [cover(start, end) for start, end in ranges]
    found = iter(hashes([place for places in covers for place in places]))
    return tuple(_fold([next(found) for _ in places]) for places in covers)


def _fold(parts: Sequence[bytes]) -> bytes:
    found = parts[-1]
    for left in reversed(parts[:-1]):
        found = node_hash(left, found)
    return found


# --- growing ---------------------------------------------------------------------------------------------------------


class Frontier:
    """The right edge of a tree: all that is needed to append to it, O(log n) hashes.

    Args:
        size: leaves so far.
        hashes: of the full subtrees ``cover(0, size)``.
    """

    def __init__(self, size: int = 0, hashes: Sequence[bytes] = ()) -> None:
        if len(hashes) != size.bit_count():
            raise ValueError(f"a tree of {size} leaves has {size.bit_count()} full subtrees at its edge, not {len(hashes)}")
        self.size = size
        self._edge = list(hashes)

    def extend(self, leaves: Iterable[bytes]) -> list[Node]:
        """Appends leaves; returns the full subtrees above them that this completed (levels from 1), in the order of completion."""
        completed: list[Node] = []
        edge, sha256, size = self._edge, hashlib.sha256, self.size
        for leaf in leaves:
            index, level, found = size, 0, leaf
            while index & 1:
                found = sha256(b"\x01" + edge.pop() + found).digest()
                index >>= 1
                level += 1
                completed.append((level, index, found))
            edge.append(found)
            size += 1
        self.size = size
        return completed

    def root(self) -> bytes:
        """Returns the root of the leaves so far."""
        return _fold(self._edge) if self._edge else EMPTY


def root_of(leaves: Iterable[bytes]) -> bytes:
    """Returns the root over leaves that pass by once, in O(log n) memory."""
    edge = Frontier()
    edge.extend(leaves)
    return edge.root()


class Tree:
    """A whole tree in memory."""

    def __init__(self, leaves: Iterable[bytes] = ()) -> None:
        self._levels: list[list[bytes]] = [[]]
        self._edge = Frontier()
        for leaf in leaves:
            self.append(leaf)

    @property
    def size(self) -> int:
        """Number of leaves."""
        return self._edge.size

    def append(self, leaf: bytes) -> int:
        """Appends a leaf and returns its index."""
        self._levels[0].append(leaf)
        for level, _, found in self._edge.extend([leaf]):
            if level == len(self._levels):
                self._levels.append([])
            self._levels[level].append(found)
        return self.size - 1

    def root(self, size: int | None = None) -> bytes:
        """Returns the root, today's or that of the first ``size`` leaves."""
        return root(self._within(size), self._hashes)

    def inclusion(self, index: int, size: int | None = None) -> tuple[bytes, ...]:
        """Returns the proof that leaf ``index`` is among the first ``size`` (default: all)."""
        return inclusion(index, self._within(size), self._hashes)

    def consistency(self, old: int, new: int | None = None) -> tuple[bytes, ...]:
        """Returns the proof that the first ``new`` leaves (default: all) begin with the first ``old``."""
        return consistency(old, self._within(new), self._hashes)

    def _within(self, size: int | None) -> int:
        return within(size, self.size)

    def _hashes(self, places: Sequence[Place]) -> list[bytes]:
        return [self._levels[level][index] for level, index in places]


def within(size: int | None, there: int) -> int:
    """Returns ``size``, or ``there`` for None.

    Raises:
        ProtocolError: truncated_log (there are fewer entries than ``size``).
    """
    if size is None:
        return there
    if not 0 <= size <= there:
        raise ProtocolError("truncated_log", f"{size} entries were asked of a log of {there}", fix="get the whole log")
    return size


# --- checking --------------------------------------------------------------------------------------------------------


def verify_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> bool:
    """Tells whether ``path`` proves that ``leaf`` is number ``index`` of the ``size`` leaves under ``root`` (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size or not _all_hashes(leaf, root, *path):
        return False
    at, last, found = index, size - 1, leaf
    for step in path:
        if last == 0:
            return False
        if at & 1 or at == last:
            found = node_hash(step, found)
            while not at & 1 and at:
                at >>= 1
                last >>= 1
        else:
            found = node_hash(found, step)
        at >>= 1
        last >>= 1
    return last == 0 and found == root


def verify_consistency(old: int, new: int, path: Sequence[bytes], old_root: bytes, new_root: bytes) -> bool:
    """Tells whether ``path`` proves that the log of ``new`` leaves begins with that of ``old`` (RFC 9162, 2.1.4.2)."""
    if not 0 <= old <= new or not _all_hashes(old_root, new_root, *path):
        return False
    if old == new:
        return not path and old_root == new_root and (new > 0 or new_root == EMPTY)
    if old == 0:
        return not path and old_root == EMPTY
    return _replayed(old, new, path, old_root) == (old_root, new_root)


def shows_fork(old: int, new: int, path: Sequence[bytes], old_root: bytes, new_root: bytes) -> bool:
    """Tells whether a proof that failed is itself evidence of two histories.

    It is, if it leads to ``new_root`` but from another root of ``old`` leaves: whoever signed ``new_root`` signed a log that
    does not begin with ``old_root``. (Where ``old`` is a power of two, a proof does not contain the old root, and nobody can
    tell a fork from a wrong proof.)
    """
    if not 0 < old < new or not _all_hashes(old_root, new_root, *path):
        return False
    found = _replayed(old, new, path, old_root)
    return found is not None and found[1] == new_root and found[0] != old_root


def _replayed(old: int, new: int, path: Sequence[bytes], old_root: bytes) -> tuple[bytes, bytes] | None:
    """Returns the roots of ``old`` and ``new`` that a proof leads to, or None if it has not the shape of one; 0 < old < new."""
    steps = list(path) if old & (old - 1) else [old_root, *path]  # a full subtree is its own proof's first step
    if not steps:
        return None
    at, last = old - 1, new - 1
    while at & 1:
        at >>= 1
        last >>= 1
    before = after = steps[0]
    for step in steps[1:]:
        if last == 0:
            return None
        if at & 1 or at == last:
            before, after = node_hash(step, before), node_hash(step, after)
            while not at & 1 and at:
                at >>= 1
                last >>= 1
        else:
            after = node_hash(after, step)
        at >>= 1
        last >>= 1
    return (before, after) if last == 0 else None


def _all_hashes(*values: bytes) -> bool:
    return all(len(v) == HASH_BYTES for v in values)
