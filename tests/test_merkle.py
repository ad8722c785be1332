"""The Merkle tree: known vectors, every proof of every size to 64 and what is left of it when anything changes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat.errors import ProtocolError
from fedmat.ledger import merkle
from fedmat.ledger.merkle import EMPTY, Frontier, Tree, leaf_hash, node_hash, verify_consistency, verify_inclusion

# The eight entries and roots of Certificate Transparency's own reference tests.
ENTRIES = [
    bytes.fromhex(x)
    for x in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOTS = """\
6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125
aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77 d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7
4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4 76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef
ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c 5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328
""".split()  # noqa: SIM905
TO = 64
LEAVES = [leaf_hash(data) for data in ENTRIES] + [leaf_hash(b"%d" % i) for i in range(8, TO + 1)]
TREE = Tree(LEAVES)


def plain_root(leaves: Sequence[bytes]) -> bytes:
    """The definition, word by word (RFC 9162, 2.1.1)."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return node_hash(plain_root(leaves[:k]), plain_root(leaves[k:]))


def test_known_roots() -> None:
    assert EMPTY.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" == Tree().root().hex()
    assert [Tree(map(leaf_hash, ENTRIES)).root(n + 1).hex() for n in range(8)] == ROOTS


def test_known_proofs() -> None:
    """RFC 9162, 2.1.5: the tree of seven leaves, in the RFC's own letters."""
    a, b, c, d, e, f, j = LEAVES[:7]
    g, h, i = node_hash(a, b), node_hash(c, d), node_hash(e, f)
    k, l = node_hash(g, h), node_hash(i, j)  # noqa: E741
    assert TREE.root(7) == node_hash(k, l)
    assert TREE.inclusion(0, 7) == (b, h, l)
    assert TREE.inclusion(3, 7) == (c, g, l)
    assert TREE.inclusion(4, 7) == (f, j, k)
    assert TREE.inclusion(6, 7) == (i, k)
    assert TREE.consistency(3, 7) == (c, d, g, l)
    assert TREE.consistency(4, 7) == (l,)
    assert TREE.consistency(6, 7) == (i, j, k)


def test_every_root_is_the_definition() -> None:
    for size in range(TO + 1):
        assert TREE.root(size) == plain_root(LEAVES[:size]) == merkle.root_of(LEAVES[:size])


def test_every_inclusion_proof_and_nothing_near_it() -> None:
    for size in range(1, TO + 1):
        root = TREE.root(size)
        for index in range(size):
            path, leaf = TREE.inclusion(index, size), LEAVES[index]
            assert len(path) <= (size - 1).bit_length()
            assert verify_inclusion(leaf, index, size, path, root)
            bad = leaf_hash(b"bad")
            assert not verify_inclusion(bad, index, size, path, root)
            assert not verify_inclusion(leaf, index, size, path, bad)
            for other in {index ^ 1, (index + 1) % size, size - 1} - {index}:
                assert not verify_inclusion(leaf, other, size, path, root)
            assert not verify_inclusion(leaf, index, size, (*path, bad), root)
            assert not verify_inclusion(leaf, index, size, (bad, *path), root)
            assert not verify_inclusion(leaf, size, size, path, root)
            assert not verify_inclusion(leaf, -1, size, path, root)
            for at in range(len(path)):
                assert not verify_inclusion(leaf, index, size, (*path[:at], *path[at + 1 :]), root)
                assert not verify_inclusion(leaf, index, size, (*path[:at], bad, *path[at + 1 :]), root)


def test_every_consistency_proof_and_nothing_near_it() -> None:
    bad = leaf_hash(b"bad")
    for new in range(TO + 1):
        for old in range(new + 1):
            path, before, after = TREE.consistency(old, new), TREE.root(old), TREE.root(new)
            assert verify_consistency(old, new, path, before, after)
            assert not verify_consistency(old, new, (*path, bad), before, after)
            assert not verify_consistency(old, new, path, bad, after)
            if old > 0:
                assert not verify_consistency(old, new, path, before, bad)
            if not 0 < old < new:
                assert path == ()
                continue
            assert not verify_consistency(new, old, path, after, before)
            assert not verify_consistency(old, new, (), before, after)
            if old > 1:
                assert not verify_consistency(old - 1, new, path, before, after)
            for at in range(len(path)):
                assert not verify_consistency(old, new, (*path[:at], *path[at + 1 :]), before, after)
                assert not verify_consistency(old, new, (*path[:at], bad, *path[at + 1 :]), before, after)


def test_one_flipped_bit_in_a_proof_is_detected() -> None:
    path, root = TREE.inclusion(11, 50), TREE.root(50)
    proof, before = TREE.consistency(27, 50), TREE.root(27)
    for at in range(8 * 32):
        for step in range(len(path)):
            assert not verify_inclusion(LEAVES[11], 11, 50, flipped(path, step, at), root)
        for step in range(len(proof)):
            assert not verify_consistency(27, 50, flipped(proof, step, at), before, root)


def flipped(path: Sequence[bytes], step: int, bit: int) -> list[bytes]:
    found = [bytearray(p) for p in path]
    found[step][bit // 8] ^= 1 << bit % 8
    return [bytes(p) for p in found]


def test_a_node_cannot_be_shown_as_an_entry() -> None:
    inner = LEAVES[0] + LEAVES[1]
    assert leaf_hash(inner) != TREE.root(2)
    assert not verify_inclusion(leaf_hash(inner), 0, 1, (), TREE.root(2))


def test_bytes_cannot_move_between_the_hashes_of_a_proof() -> None:
    """A left hash that is a byte longer and a leaf that is a byte shorter have the same preimage."""
    left, right = LEAVES[0], LEAVES[1]
    root = node_hash(left, right)
    assert node_hash(left + right[:1], right[1:]) == root
    assert not verify_inclusion(right[1:], 1, 2, (left + right[:1],), root)


def test_an_old_log_of_nothing_has_the_empty_root() -> None:
    assert not verify_consistency(0, 5, (), leaf_hash(b"x"), TREE.root(5))
    assert not verify_consistency(0, 0, (), leaf_hash(b"x"), leaf_hash(b"x"))


def test_a_failed_proof_shows_a_fork_only_if_it_is_one() -> None:
    evil = Tree([*LEAVES[:3], leaf_hash(b"evil"), *LEAVES[4:]])
    for old in (5, 6, 7, 11, 21):
        proof = evil.consistency(old, 40)
        assert not verify_consistency(old, 40, proof, TREE.root(old), evil.root(40))
        assert merkle.shows_fork(old, 40, proof, TREE.root(old), evil.root(40))
        assert not merkle.shows_fork(old, 40, proof, evil.root(old), evil.root(40))  # nothing failed
        assert not merkle.shows_fork(old, 40, flipped(proof, 0, 3), TREE.root(old), evil.root(40))  # a wrong proof
    assert not merkle.shows_fork(8, 40, evil.consistency(8, 40), TREE.root(8), evil.root(40))  # cannot be told


@given(st.lists(st.binary(max_size=4), max_size=70), st.data())
def test_a_log_that_grew_proves_what_it_was(datas: list[bytes], data: st.DataObject) -> None:
    leaves = [leaf_hash(d) for d in datas]
    tree, old = Tree(leaves), data.draw(st.integers(0, len(datas)))
    assert tree.root(old) == plain_root(leaves[:old])
    assert verify_consistency(old, tree.size, tree.consistency(old), tree.root(old), tree.root())
    if old < tree.size:
        assert verify_inclusion(leaves[old], old, tree.size, tree.inclusion(old), tree.root())


@given(st.lists(st.binary(max_size=3), min_size=1, max_size=40), st.lists(st.binary(max_size=3), max_size=40), st.data())
def test_another_history_has_no_proof(datas: list[bytes], more: list[bytes], data: st.DataObject) -> None:
    changed = list(datas)
    at = data.draw(st.integers(0, len(datas) - 1))
    changed[at] += b"!"
    honest, other = Tree(map(leaf_hash, datas)), Tree(map(leaf_hash, changed + more))
    proofs = [other.consistency(len(datas)), Tree(map(leaf_hash, datas + more)).consistency(len(datas))]
    for proof in proofs:
        assert not verify_consistency(len(datas), other.size, proof, honest.root(), other.root())


@settings(max_examples=50)
@given(st.lists(st.integers(0, 30), max_size=6))
def test_batches_make_the_tree_that_single_leaves_make(batches: list[int]) -> None:
    leaves = [leaf_hash(b"%d" % i) for i in range(sum(batches))]
    edge, kept, at = Frontier(), {}, 0
    for batch in batches:
        for level, index, found in edge.extend(leaves[at : at + batch]):
            assert (level, index) not in kept
            kept[level, index] = found
        at += batch
        again = Frontier(at, [kept[p] if p[0] else leaves[p[1]] for p in merkle.cover(0, at)])
        assert again.root() == edge.root() == plain_root(leaves[:at])
    for (level, index), found in kept.items():
        assert found == plain_root(leaves[index << level : (index + 1) << level])
    assert len(kept) == at - at.bit_count()


def test_what_a_tree_has_not_is_refused() -> None:
    for call in (
        lambda: TREE.root(TO + 2), lambda: TREE.root(-1), lambda: TREE.inclusion(5, 5), lambda: TREE.inclusion(-1, 5),
        lambda: TREE.consistency(6, 5), lambda: TREE.consistency(0, TO + 2),
    ):  # fmt: skip
        with pytest.raises(ProtocolError) as caught:
            call()
        assert caught.value.reason == "truncated_log"
    with pytest.raises(ValueError, match="2 full subtrees"):
        Frontier(3, LEAVES[:1])


def test_a_proof_asks_for_few_hashes_and_once() -> None:
    asked: list[int] = []

    def hashes(places: Sequence[merkle.Place]) -> list[bytes]:
        asked.append(len(places))
        return [bytes(32)] * len(places)

    size = 10**6
    assert len(merkle.inclusion(123_456, size, hashes)) == 20
    merkle.consistency(123_456, size, hashes)
    merkle.root(size, hashes)
    assert len(asked) == 3 and max(asked) <= 40
