"""A member's witness: it goes along with one history, whatever its operator shows it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat import files
from fedmat.errors import ProtocolError, StateError
from fedmat.keys import PartyKeys
from fedmat.ledger import merkle, notes, witness
from fedmat.ledger.notes import COSIGNATURE, Verifier
from fedmat.ledger.witness import Witness

ORIGIN, NOW = "fedmat/test", 1_700_000_000
OPERATOR, MEMBER = PartyKeys.new("operator"), PartyKeys.new("member-a")
LEAVES = [merkle.leaf_hash(b"%d" % i) for i in range(64)]
TREE = merkle.Tree(LEAVES)
EVIL = merkle.Tree([*LEAVES[:5], merkle.leaf_hash(b"another history"), *LEAVES[6:]])


def note(size: int, tree: merkle.Tree = TREE, origin: str = ORIGIN, keys: PartyKeys = OPERATOR) -> str:
    return notes.sign(notes.checkpoint(origin, size, tree.root(size)), "operator", keys)


@pytest.fixture
def member(tmp_path: Path) -> Witness:
    return Witness("member-a", MEMBER, tmp_path / "witness", Verifier.of("operator", OPERATOR), ORIGIN)


def show(member: Witness, size: int, tree: merkle.Tree = TREE, now: int = NOW) -> str:
    """What an operator does: it asks where the witness stands and proves from there."""
    old = member.seen.size
    return member.cosign(note(size, tree), old, tree.consistency(old, size) if old <= size else (), now)


def refused(member: Witness, *args: object) -> str:
    before = member.seen
    with pytest.raises(ProtocolError) as caught:
        member.cosign(*args)  # type: ignore[arg-type]
    assert member.seen == before, "a refusal changed the state"
    return caught.value.reason


def test_a_cosignature_verifies_and_the_state_is_kept(member: Witness) -> None:
    verifier = Verifier.of("member-a", MEMBER)
    for step, size in enumerate((0, 3, 3, 8, 21)):
        line = show(member, size, now=NOW + step)
        assert notes.verify(note(size) + line, member.operator, [verifier], 1).cosigners == {"member-a": NOW + step}
        again = Witness("member-a", MEMBER, member.folder, member.operator, ORIGIN)
        assert again.seen == witness.Seen(size, TREE.root(size), NOW + step, note(size))


def test_only_checkpoints_of_its_log_by_its_operator(member: Witness) -> None:
    assert refused(member, note(3, origin="fedmat/other"), 0, (), NOW) == "foreign_bundle"
    assert refused(member, note(3, keys=PartyKeys.new("operator")), 0, (), NOW) == "bad_signature"
    assert refused(member, note(3).replace("\n3\n", "\n4\n"), 0, (), NOW) == "bad_signature"
    assert refused(member, note(3)[:-1], 0, (), NOW) == "bad_checkpoint"


def test_an_older_checkpoint_is_refused(member: Witness) -> None:
    show(member, 8)
    assert refused(member, note(5), 8, (), NOW) == "stale_checkpoint"
    assert refused(member, note(5), 5, (), NOW) == "stale_checkpoint"


def test_the_proof_begins_where_the_witness_stands(member: Witness) -> None:
    show(member, 8)
    assert refused(member, note(12), 7, TREE.consistency(7, 12), NOW) == "ledger_moved"
    assert refused(member, note(12), 0, (), NOW) == "ledger_moved"


@pytest.mark.parametrize("old", [7, 8, 11])
def test_a_wrong_proof_is_refused(member: Witness, old: int) -> None:
    show(member, old)
    proof = TREE.consistency(old, 20)
    for wrong in (
        (),
        proof[:-1],
        (*proof, proof[0]),
        (bytes(32), *proof[1:]),
        (proof[0][:-1], *proof[1:]),
        TREE.consistency(old, 21),
    ):
        assert refused(member, note(20), old, wrong, NOW) == "bad_proof"
    assert not list(member.folder.glob("fork-*"))
    member.cosign(note(20), old, proof, NOW)


def test_a_second_root_of_the_same_size_is_a_fork_and_the_evidence_is_kept(member: Witness) -> None:
    show(member, 9)
    assert refused(member, note(9, EVIL), 9, (), NOW) == "forked_log"
    (kept,) = member.folder.glob("fork-*")
    first, second = kept.read_text().split("\n" + ORIGIN)
    for text, tree in ((first, TREE), (ORIGIN + second, EVIL)):  # each is signed by the operator: it cannot deny either
        assert notes.verify(text, member.operator, (), 0).root == tree.root(9)


def test_a_rewritten_log_is_a_fork(member: Witness) -> None:
    show(member, 9)
    assert refused(member, note(20, EVIL), 9, EVIL.consistency(9, 20), NOW) == "forked_log"
    assert refused(member, note(20, EVIL), 9, TREE.consistency(9, 20), NOW) == "bad_proof"


def test_a_clock_that_goes_backwards_is_refused(member: Witness) -> None:
    show(member, 3, now=NOW)
    assert refused(member, note(4), 3, TREE.consistency(3, 4), NOW - 1) == "clock_backwards"
    show(member, 4, now=NOW)


def test_a_damaged_state_is_not_forgotten(member: Witness) -> None:
    show(member, 8)
    path = member.folder / witness.FILE
    good = json.loads(path.read_text())
    for bad in (
        b"", b"{}", b"[]", b"null",
        *(files.json_bytes({**good, k: v}) for k, v in (("size", "8"), ("size", -1), ("size", True), ("root", "00"), ("root", "x"), ("time", None), ("note", 1), ("more", 1))),
    ):  # fmt: skip
        path.write_bytes(bad)
        with pytest.raises(StateError):
            member.cosign(note(12, EVIL), 0, (), NOW)
    path.write_text(json.dumps({**good, "origin": "fedmat/other"}))
    with pytest.raises(StateError, match="a folder of its own"):
        member.cosign(note(12, EVIL), 0, (), NOW)


def test_an_operator_with_two_histories_gets_no_quorum_for_both(tmp_path: Path) -> None:
    """Seven members, five needed: two histories would need ten cosignatures, and each member gives one."""
    keys = [PartyKeys.new(f"member-{i}") for i in range(7)]
    operator = Verifier.of("operator", OPERATOR)
    members = [Witness(k.name, k, tmp_path / k.name, operator, ORIGIN) for k in keys]
    verifiers = [Verifier.of(k.name, k) for k in keys]
    for member in members:
        show(member, 4)  # before the histories part
    got: dict[str, str] = {"honest": note(10), "evil": note(10, EVIL)}
    for turn, member in enumerate(members):
        order = ("honest", "evil") if turn % 2 else ("evil", "honest")  # it shows each half another one first
        for which in order:
            tree = TREE if which == "honest" else EVIL
            for size in (10, 10, 12):  # and tries again
                with suppress(ProtocolError):
                    line = show(member, size, tree)
                    got[which] += line if size == 10 else ""
    counted = {which: len(notes.verify(text, operator, verifiers, 0).cosigners) for which, text in got.items()}
    assert sum(counted.values()) == 7
    assert [which for which, n in counted.items() if n >= 5] == []
    with pytest.raises(ProtocolError, match="no_quorum"):
        notes.verify(got["honest"], operator, verifiers, 5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40), st.integers(0, 40), st.integers(-2, 5)), max_size=12))
def test_whatever_it_is_shown_what_it_cosigned_is_one_history(
    tmp_path_factory: pytest.TempPathFactory, shown: list[tuple[bool, int, int, int]]
) -> None:
    member = Witness("member-a", MEMBER, tmp_path_factory.mktemp("witness"), Verifier.of("operator", OPERATOR), ORIGIN)
    now, signed = NOW, [(0, merkle.EMPTY, 0)]
    for evil, size, old, step in shown:
        tree = EVIL if evil else TREE
        now += step
        for start in (member.seen.size, old):
            try:
                line = member.cosign(note(size, tree), start, tree.consistency(start, size) if start <= size else (), now)
            except ProtocolError:
                continue
            (time,) = notes.verified(notes.parse(note(size, tree) + line), Verifier.of("member-a", MEMBER), COSIGNATURE)
            signed.append((size, tree.root(size), time))
    assert signed == sorted(signed, key=lambda s: (s[0], s[2]))
    assert [time for _, _, time in signed] == sorted(time for _, _, time in signed)
    for tree in (TREE, EVIL):
        if all(root == tree.root(size) for size, root, _ in signed):
            return
    pytest.fail("it cosigned both histories")


_ASKER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from fedmat.errors import ProtocolError
    from fedmat.keys import PartyKeys
    from fedmat.ledger import merkle, notes
    from fedmat.ledger.witness import Witness
    folder, tag = sys.argv[1:3]
    operator, member = (PartyKeys(n, "x25519", Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32), bytes(32)) for i, n in enumerate(("operator", "member")))
    tree = merkle.Tree([merkle.leaf_hash(tag.encode() + b"%d" % i) for i in range(40)])
    witness = Witness("member", member, Path(folder), notes.Verifier.of("operator", operator), "o")
    for size in range(1, 40):
        old = witness.seen.size
        try:
            witness.cosign(notes.sign(notes.checkpoint("o", size, tree.root(size)), "operator", operator), old, tree.consistency(min(old, size), size), 5)
            print(size)
        except ProtocolError:
            pass
""")


def test_two_processes_cannot_get_two_histories_at_once(tmp_path: Path) -> None:
    """The state is read, judged and written under one lock: else both would begin from nothing."""
    askers = [
        subprocess.Popen([sys.executable, "-c", _ASKER, str(tmp_path / "w"), tag], stdout=subprocess.PIPE, text=True)
        for tag in "abc"
    ]
    got = [asker.communicate(timeout=60)[0].split() for asker in askers]
    assert [asker.returncode for asker in askers] == [0, 0, 0]
    assert sorted(map(len, got))[:2] == [0, 0]
    assert max(map(len, got)) > 0
