"""How members decide: what a charter has to keep to, whose signatures a proposal lacks, what a departure leaves behind."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmat import governance, keys
from fedmat.config import ConsortiumConfig, Terms, parse_settings
from fedmat.errors import ConfigError, NotEvidenced, ProtocolError, StateError
from fedmat.keys import Party, PartyKeys
from fedmat.ledger import dsse, entries, merkle, notes, whole, words
from fedmat.ledger.entries import (
    TYPES,
    AggregateEntry,
    ContributionEntry,
    DatasetEntry,
    EvaluationEntry,
    ExclusionEntry,
    MintEntry,
    PlanEntry,
    RegistrationEntry,
)
from fedmat.ledger.fold import Fold
from fedmat.ledger.text import stamp

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
UNTIL = date(2027, 11, 24)
SITES = ("ash", "birch", "cedar")
OWNERS = {s: f"{s.title()} Ltd" for s in (*SITES, "dune", "elm")} | {"operator": "Hub"}


def consortium(**terms: Any) -> ConsortiumConfig:
    raw = {
        "name": "woods", "title": "Woods", "features": ["composition"],
        "task": {"name": "hardness", "record_type": "alloy", "target": "hardness_hv", "unit": ""},
        "members": [{"site": s, "organisation": OWNERS[s], "file": f"{s}.yaml"} for s in SITES], "terms": terms,
    }  # fmt: skip
    return parse_settings(ConsortiumConfig, raw, Path("consortium.yaml"))


class Woods:
    """Every party's keys, and the ledger as a list of envelopes that the fold has taken."""

    def __init__(self, **terms: Any) -> None:
        self.keys = {n: PartyKeys.new(n) for n in OWNERS}
        self.config, self.fold, self.log = consortium(**terms), Fold(), list[bytes]()
        self.now = NOW

    def party(self, name: str, until: date = UNTIL) -> Party:
        kind: Any = "operator" if name == "operator" else "site"
        return self.keys[name].public(kind, OWNERS[name], until)

    @property
    def parties(self) -> keys.Charter:
        return keys.charter("woods", "x25519", [self.party(s) for s in SITES])

    def charter(self) -> Any:
        return governance.charter(self.config, self.parties, self.party("operator"), self.now)

    def tick(self) -> datetime:
        self.now += timedelta(minutes=1)
        return self.now

    def put(self, entry: Any, *signers: str) -> bytes:
        data = entries.seal(entry, [self.keys[s] for s in signers or (entry.by,)])
        self.fold.apply(data)
        self.log.append(data)
        return data

    def begin(self) -> Woods:
        self.put(self.charter(), "operator", *SITES)
        return self

    def of(self, run: str, by: str = "operator") -> dict[str, Any]:
        return {"consortium": "woods", "by": by, "time": stamp(self.tick()), "run": run}

    def plan(self, run: str, sites: tuple[str, ...] = SITES) -> None:
        self.put(PlanEntry(**self.of(run), plan_sha256="a" * 64, sites=sites, seed=1, rounds=2, code_version="1", environment_sha256="b" * 64, consortium_file_sha256="c" * 64))  # fmt: skip
        for s in sites:
            self.put(DatasetEntry(**self.of(run, s), dataset_sha256=digest(f"{s}{run[0]}"), attestation_sha256="d" * 64, features_sha256="e" * 64, contract_version="1", n_train=50))  # fmt: skip

    def round(self, run: str, number: int, *sites: str) -> None:
        self.put(AggregateEntry(**self.of(run), round=number, rule="mean", protection="none", shares={s: 1 / len(sites) for s in sites},
                                updates={s: digest(s + run) for s in sites}, model_sha256="1" * 64, report_sha256="2" * 64))  # fmt: skip

    def evaluate(self, run: str) -> str:
        model = digest(run)
        self.put(EvaluationEntry(**self.of(run), model_sha256=model, weights_sha256="1" * 64, held_out_sha256="3" * 64, metrics_sha256=digest("m" + run),
                                 evaluations_sha256="4" * 64, intervals_sha256="5" * 64, matching_sha256="6" * 64, metric="mae", score=1.25))  # fmt: skip
        return model

    def release(self, run: str, shares: dict[str, float], amounts: dict[str, int]) -> None:
        model = digest(run)
        about = ContributionEntry(**self.of(run), model_sha256=model, method="settlement", shares=shares, errors=dict.fromkeys(shares, 0.0), evidence_sha256="7" * 64)  # fmt: skip
        self.put(about)
        self.put(MintEntry(**self.of(run), model_sha256=model, contribution=self.fold.size - 1, amounts=amounts))


def digest(text: str) -> str:
    from fedmat import files

    return files.sha256(text.encode())


@pytest.fixture
def woods() -> Woods:
    return Woods().begin()


# --- the charter ---------------------------------------------------------------------------------------------------


def test_a_charter_binds_keys_operator_and_terms() -> None:
    first, other = Woods(), Woods()
    other.keys = first.keys
    assert first.charter().sha256 == other.charter().sha256
    other.config = consortium(quorum=0.9)
    assert first.charter().sha256 != other.charter().sha256
    other.config, other.keys = first.config, first.keys | {"operator": PartyKeys.new("operator")}
    assert first.charter().sha256 != other.charter().sha256


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({"residency": {"elm": "DE"}}, "terms.residency names elm"),
        ({"approvals": 4}, "terms.approvals: 4 of 3"),
        ({"witnesses": 5}, "terms.witnesses: 5 of 3"),
        ({"min_sites": 4}, "terms.min_sites: 4"),
        ({"tiers": {"gold": -1}}, "terms.tiers.gold"),
    ],
)
def test_terms_that_nobody_could_keep_are_refused(terms: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Woods(**terms).charter()


def test_every_misfit_of_a_charter_is_named_at_once() -> None:
    world = Woods()
    few = keys.charter(
        "other", "x25519", [world.party("ash", date(2026, 1, 1)), world.keys["birch"].public("site", "Else", UNTIL)]
    )
    with pytest.raises(ConfigError) as caught:
        governance.charter(world.config, few, world.party("ash"), NOW)
    for said in (
        "those of other",
        "other sites: cedar",
        "birch belongs to 'Else'",
        "ash is no operator",
        "ash ended on 2026-01-01",
    ):
        assert said in caught.value.what


def test_an_operator_with_the_key_of_a_member_or_its_name_is_refused() -> None:
    world = Woods()
    ash = world.keys["ash"]
    twin = PartyKeys("operator", "x25519", ash.signing, PartyKeys.new("operator").sealing)
    with pytest.raises(ConfigError, match="the operator signs with the key of ash"):
        governance.charter(world.config, world.parties, twin.public("operator", "Hub", UNTIL), NOW)
    with pytest.raises(ValueError, match="no site is called operator"):
        keys.charter("woods", "x25519", [*world.parties.parties, world.keys["operator"].public("site", "Hub", UNTIL)])


def test_the_key_charter_takes_no_operator() -> None:
    """Keys that sign the ledger open no round."""
    world = Woods()
    with pytest.raises(ValueError, match="operator cannot be of kind operator"):
        keys.charter("woods", "x25519", [*world.parties.parties, world.party("operator")])


def test_a_rehearsal_needs_no_approvals_unless_it_says_so() -> None:
    world = Woods()
    assert world.charter().terms.approvals_needed(3) == 2
    world.config = world.config.model_copy(update={"simulated": True})
    assert world.charter().terms.approvals_needed(3) == 0
    world.config = consortium(approvals=1).model_copy(update={"simulated": True})
    assert world.charter().terms.approvals_needed(3) == 1


# --- proposals -----------------------------------------------------------------------------------------------------


def proposals(world: Woods) -> list[Any]:
    """One of every kind that takes more than one signature, and one that does not."""
    step = keys.rotate(world.keys["ash"], world.party("ash"), PartyKeys.new("ash"), UNTIL, NOW.date())
    when = world.tick()
    return [
        governance.join(world.fold, world.party("dune"), when),
        governance.leave(world.fold, "ash", when),
        governance.leave(world.fold, "ash", when, by="birch", reason="no data"),
        governance.pod(world.fold, "twigs", ["birch", "ash"], "bending", when),
        governance.rotation(world.fold, step, when),
        world.charter().model_copy(update={"time": stamp(when)}),
    ]


def test_a_proposal_is_complete_exactly_when_the_ledger_takes_it() -> None:
    """Two parts of the code say whose signatures are needed; over every set of signers they agree."""
    world = Woods().begin()
    everyone = ["operator", *SITES, "dune"]
    for entry in proposals(world):
        for names in chain.from_iterable(combinations(everyone, n) for n in range(1, 6)):
            if "dune" in names and entry.type != "membership":
                continue  # a stranger's signature is an error of its own
            data = entries.seal(entry, [world.keys[n] for n in names])
            found = governance.standing(data, world.fold)
            fold = Fold.of(world.log)
            if found.complete:
                fold.apply(data)
                assert found.lacking() == "nobody"
            else:
                with pytest.raises(ProtocolError) as caught:
                    fold.apply(data)
                assert caught.value.reason in ("bad_signature", "no_quorum")
            assert set(found.signed) == set(names)


def test_signatures_come_in_by_files_one_after_the_other(tmp_path: Path) -> None:
    world = Woods()
    path = tmp_path / "charter.proposal.json"
    path.write_bytes(governance.propose(world.charter(), world.keys["operator"]))
    assert governance.standing(governance.read(path), None).missing == SITES
    for number, site in enumerate(SITES):
        found = governance.sign(path, world.keys[site], None)
        assert found.missing == SITES[number + 1 :]
        before = path.read_bytes()
        assert governance.sign(path, world.keys[site], None) == found and path.read_bytes() == before
    assert found.complete
    Fold().apply(governance.read(path))


def test_copies_that_went_out_together_are_put_together(woods: Woods, tmp_path: Path) -> None:
    entry = governance.join(woods.fold, woods.party("dune"), woods.tick())
    copies = []
    for name in ("operator", "ash", "cedar"):
        path = tmp_path / f"{name}.json"
        path.write_bytes(governance.propose(entry, woods.keys["dune"]))
        governance.sign(path, woods.keys[name], woods.fold)
        copies.append(governance.read(path))
    assert not any(governance.standing(c, woods.fold).complete for c in copies)
    merged = governance.merge(copies, woods.fold)
    assert governance.standing(merged, woods.fold).complete and merged == governance.merge(copies[::-1], woods.fold)
    woods.fold.apply(merged)
    assert woods.fold.sites == {*SITES, "dune"}
    other = governance.propose(governance.join(woods.fold, woods.party("elm"), woods.tick()), woods.keys["elm"]).strip()
    with pytest.raises(ProtocolError, match="other_proposal: copy 2"):
        governance.merge([entries.cosign(other, woods.keys["ash"]), copies[0]], after_charter(woods))


def after_charter(world: Woods) -> Fold:
    """The ledger's state after its charter."""
    return Fold.of(world.log[:1])


def test_a_key_that_is_not_asked_adds_no_signature(woods: Woods, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(governance.propose(governance.leave(woods.fold, "ash", woods.tick()), woods.keys["ash"]))
    before = path.read_bytes()
    for stranger in ("birch", "elm"):
        with pytest.raises(ProtocolError, match="not_asked"):
            governance.sign(path, woods.keys[stranger], woods.fold)
    with pytest.raises(ProtocolError, match="not_asked"):  # the name alone is nothing
        governance.sign(path, PartyKeys.new("operator"), woods.fold)
    assert path.read_bytes() == before
    assert governance.sign(path, woods.keys["operator"], woods.fold).complete


def test_a_bad_signature_or_a_foreign_proposal_is_found_before_one_signs(woods: Woods, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    entry = governance.join(woods.fold, woods.party("dune"), woods.tick())
    good = dsse.parse(entries.seal(entry, [woods.keys["dune"]]))
    keyid, signature = good.signatures[0]
    for forged in ((keyid, bytes(64)), (dsse.key_id(bytes(32)), signature)):
        path.write_bytes(dsse.Envelope(good.payload, good.payload_type, (forged,)).encode())
        with pytest.raises(ProtocolError, match="bad_signature"):
            governance.sign(path, woods.keys["ash"], woods.fold)
    path.write_bytes(good.encode()[:-1])
    with pytest.raises(ProtocolError, match="not_canonical"):
        governance.sign(path, woods.keys["ash"], woods.fold)
    path.write_bytes(governance.propose(entry.model_copy(update={"consortium": "hills"}), woods.keys["dune"]))
    with pytest.raises(ProtocolError, match="foreign_bundle"):
        governance.sign(path, woods.keys["ash"], woods.fold)
    path.write_bytes(good.encode())
    with pytest.raises(ConfigError, match="stands in the ledger"):
        governance.sign(path, woods.keys["ash"], None)
    with pytest.raises(ConfigError, match="cannot be read"):
        governance.sign(tmp_path / "nothing.json", woods.keys["ash"], None)


def test_an_ended_key_signs_nothing(tmp_path: Path) -> None:
    world = Woods().begin()
    late = datetime(2028, 1, 1, tzinfo=UTC)
    path = tmp_path / "p.json"
    path.write_bytes(governance.propose(governance.leave(world.fold, "ash", late), world.keys["ash"]))
    with pytest.raises(ProtocolError, match="key_not_in_force"):
        governance.sign(path, world.keys["operator"], world.fold)


# --- joining, approving, rotating ----------------------------------------------------------------------------------


def test_who_joins_has_a_name_and_keys_of_its_own(woods: Woods) -> None:
    def refused(party: Party, said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            governance.join(woods.fold, party, woods.tick())

    refused(woods.party("ash"), "is a party of woods already")
    refused(PartyKeys.new("auditor").public("auditor", "X", UNTIL), "cannot join as a site")
    refused(PartyKeys.new("notary").public("site", "X", UNTIL), "cannot join as a site")
    refused(PartyKeys.new("operator").public("site", "X", UNTIL), "cannot join as a site")
    taken = PartyKeys("dune", "x25519", woods.keys["ash"].signing, PartyKeys.new("dune").sealing)
    refused(taken.public("site", "Dune Ltd", UNTIL), "stood in the ledger before")


def test_a_name_that_left_is_not_taken_over_by_another_company(woods: Woods) -> None:
    """Whoever joined under it would have its credits."""
    woods.put(governance.leave(woods.fold, "ash", woods.tick()), "ash", "operator")
    with pytest.raises(ConfigError, match="was the name of a site of Ash Ltd"):
        governance.join(woods.fold, PartyKeys.new("ash").public("site", "Thief Ltd", UNTIL), woods.tick())
    governance.join(woods.fold, PartyKeys.new("ash").public("site", "Ash Ltd", UNTIL), woods.tick())


def test_an_approval_is_over_the_evaluation_in_the_ledger(woods: Woods) -> None:
    with pytest.raises(ConfigError, match="no run r1"):
        governance.approve(woods.fold, "r1", "ash", woods.tick())
    woods.plan("r1")
    with pytest.raises(NotEvidenced, match="no evaluation"):
        governance.approve(woods.fold, "r1", "ash", woods.tick())
    model = woods.evaluate("r1")
    with pytest.raises(ProtocolError, match="unknown_member"):
        governance.approve(woods.fold, "r1", "elm", woods.tick())
    entry = governance.approve(woods.fold, "r1", "ash", woods.tick())
    assert (entry.model_sha256, entry.metrics_sha256) == (model, digest("mr1"))
    champion = {**woods.of("r1"), "model_sha256": model, "name": "fedmat-x", "version": 1, "aliases": ("champion",)}
    woods.put(entry)
    woods.put(governance.approve(woods.fold, "r1", "birch", woods.tick(), approves=False, note="too coarse"))
    with pytest.raises(ProtocolError, match="no_approval"):
        woods.put(RegistrationEntry(**champion))
    woods.put(governance.approve(woods.fold, "r1", "birch", woods.tick()))
    woods.put(RegistrationEntry(**{**champion, "time": stamp(woods.tick())}))
    assert woods.fold.runs["r1"].approved_by() == ("ash", "birch")


def test_a_rotation_follows_on_the_keys_in_the_ledger(woods: Woods, tmp_path: Path) -> None:
    old, new = woods.keys["ash"], PartyKeys.new("ash")
    folder = tmp_path / "keys"
    keys.create(old, woods.party("ash"), folder)
    step = keys.rotate(old, woods.party("ash"), new, UNTIL, NOW.date())
    keys.save_rotation(folder, step, new)
    assert governance.held(folder, woods.party("ash")).signing.private_bytes_raw() == old.signing.private_bytes_raw()
    with pytest.raises(StateError, match="does not hold the new keys"):
        governance.finish_rotation(folder, "ash", woods.fold.parties["ash"])
    woods.put(governance.rotation(woods.fold, step, woods.tick()))
    assert governance.held(folder, woods.fold.parties["ash"]).signing.private_bytes_raw() == new.signing.private_bytes_raw()
    with pytest.raises(ProtocolError, match="bad_rotation"):
        governance.rotation(woods.fold, step, woods.tick())
    with pytest.raises(ProtocolError, match="key_not_in_force"):
        woods.put(governance.leave(woods.fold, "ash", woods.tick()), "ash", "operator")
    with pytest.raises(ProtocolError, match="unknown_member"):
        governance.rotation(
            woods.fold, keys.rotate(woods.keys["elm"], woods.party("elm"), PartyKeys.new("elm"), UNTIL, NOW.date()), NOW
        )
    governance.finish_rotation(folder, "ash", woods.fold.parties["ash"])
    with pytest.raises(StateError):
        governance.held(folder, woods.party("ash"))


def test_a_pod_is_of_members_and_not_of_one(woods: Woods) -> None:
    for members, said in ((["ash"], "at least 2"), (["ash", "ash"], "each named once")):
        with pytest.raises(ConfigError, match=said):
            governance.pod(woods.fold, "twigs", members, "bending", woods.tick())
    with pytest.raises(ProtocolError, match="unknown_member"):
        governance.pod(woods.fold, "twigs", ["ash", "elm"], "bending", woods.tick())
    woods.put(governance.pod(woods.fold, "twigs", ["birch", "ash"], "bending", woods.tick()), "operator", "ash", "birch")
    with pytest.raises(ConfigError, match="there is a pod twigs already"):
        governance.pod(woods.fold, "twigs", ["ash", "birch"], "bending", woods.tick())


# --- credits -------------------------------------------------------------------------------------------------------


@pytest.fixture
def rich() -> Woods:
    """A ledger in which ash has 750 credits and birch 250."""
    world = Woods(tiers={"champion": 300, "open": 0}, priority_price=7).begin()
    world.plan("r1")
    world.evaluate("r1")
    world.release("r1", {"ash": 0.3, "birch": 0.1, "cedar": 0.0}, {"ash": 750, "birch": 250})
    return world


def test_credits_move_by_signed_entries_that_are_refused_before_they_are_signed(rich: Woods) -> None:
    state = rich.fold.credits
    rich.put(governance.transfer(rich.fold, "ash", "cedar", 100, rich.tick()))
    rich.put(governance.spend(rich.fold, "ash", "tier", "champion", rich.tick()))
    rich.put(governance.spend(rich.fold, "ash", "priority", "fedmat-x", rich.tick(), days=2))
    assert state.balances == {"ash": 336, "birch": 250, "cedar": 100} and state.spent == 314
    assert rich.fold.credits.has_tier("ash", "champion", rich.fold.terms)
    for reason, make in (
        ("overdraft", lambda: governance.transfer(rich.fold, "ash", "birch", 337, NOW)),
        ("bad_transfer", lambda: governance.transfer(rich.fold, "ash", "ash", 1, NOW)),
        ("unknown_member", lambda: governance.transfer(rich.fold, "ash", "elm", 1, NOW)),
        ("unknown_tier", lambda: governance.spend(rich.fold, "ash", "tier", "gold", NOW)),
        ("bought_before", lambda: governance.spend(rich.fold, "ash", "tier", "champion", NOW)),
    ):
        with pytest.raises(ProtocolError) as caught:
            make()
        assert caught.value.reason == reason
    with pytest.raises(ConfigError, match="costs nothing"):
        governance.spend(rich.fold, "ash", "tier", "open", NOW)
    assert state.next("ash") == 4


def test_forged_and_replayed_transfers_are_refused_by_name(rich: Woods) -> None:
    entry = governance.transfer(rich.fold, "ash", "cedar", 100, rich.tick())
    size = rich.fold.size
    for reason, data in (
        ("bad_signature", entries.seal(entry, [rich.keys["cedar"]])),  # the taker writes itself a gift
        ("bad_signature", entries.seal(entry, [rich.keys["operator"]])),
        ("bad_signature", entries.seal(entry.model_copy(update={"amount": 700}), [PartyKeys.new("ash")])),
        ("overdraft", entries.seal(entry.model_copy(update={"amount": 751}), [rich.keys["ash"]])),
        ("sequence_gap", entries.seal(entry.model_copy(update={"sequence": 2}), [rich.keys["ash"]])),
    ):
        with pytest.raises(ProtocolError, match=f"entry {size}") as caught:
            rich.fold.apply(data)
        assert caught.value.reason == reason
    data = rich.put(entry)
    with pytest.raises(ProtocolError) as caught:
        rich.fold.apply(data)
    assert caught.value.reason == "replayed_entry"
    with pytest.raises(ProtocolError, match="double_spend"):
        rich.put(entry.model_copy(update={"to": "birch"}))
    assert Fold.of(rich.log).credits == rich.fold.credits


def test_a_member_that_left_keeps_what_it_has_and_cannot_move_it(rich: Woods) -> None:
    rich.put(governance.leave(rich.fold, "ash", rich.tick()), "ash", "operator")
    with pytest.raises(ProtocolError, match="unknown_member"):
        governance.transfer(rich.fold, "ash", "birch", 1, rich.tick())
    with pytest.raises(ProtocolError, match="unknown_member"):
        governance.transfer(rich.fold, "birch", "ash", 1, rich.tick())
    assert rich.fold.credits.balance("ash") == 750


# --- departures ----------------------------------------------------------------------------------------------------


def test_a_departure_names_every_model_that_descends_from_the_site(woods: Woods) -> None:
    woods.plan("a1")
    woods.round("a1", 0, "birch", "cedar")  # ash came late
    woods.round("a1", 1, *SITES)
    first = woods.evaluate("a1")
    woods.put(RegistrationEntry(**woods.of("a1"), model_sha256=first, name="fedmat-x", version=3))
    woods.plan("b1")  # ash is in the scaling alone
    woods.round("b1", 0, "birch", "cedar")
    woods.plan("c1", ("birch", "cedar"))
    woods.round("c1", 0, "birch", "cedar")
    woods.evaluate("c1")
    woods.plan("d1")
    woods.put(ExclusionEntry(**woods.of("d1"), round=-1, site="ash", kind="rejection", reason="too_few"))
    woods.round("d1", 0, "birch", "cedar")
    woods.put(
        governance.pod(woods.fold, "twigs", ["birch", "cedar"], "x", woods.tick(), model_sha256=first),
        "operator",
        "birch",
        "cedar",
    )
    entry = governance.leave(woods.fold, "ash", woods.tick(), reason="sold")
    assert entry.datasets == tuple(sorted(digest(f"ash{r}") for r in "abd"))
    before = governance.plan_after(woods.fold, "ash")
    woods.put(entry, "ash", "operator")
    after = governance.plan_after(woods.fold, "ash")
    assert after == before
    assert [(m.run, m.model_sha256, m.registered, m.rounds, m.last_without) for m in after.models] == [
        ("a1", first, "fedmat-x version 3", (1,), 0),
        ("b1", None, "", (), None),
    ]
    assert after.pods == ("twigs",) and after.remaining == ("birch", "cedar") and after.quorum == 2
    assert after.problems == () and after.commands == ("fedmat run consortium.yaml --run-id a1-without-ash",)


def test_a_departure_says_what_the_rest_can_no_longer_give() -> None:
    world = Woods(min_sites=3, approvals=3).begin()
    world.plan("a1")
    world.round("a1", 0, *SITES)
    world.evaluate("a1")
    after = governance.plan_after(world.fold, "ash")
    assert [p.split(",")[0] for p in after.problems] == [
        "the charter asks for 3 sites that train together",
        "the charter asks for 3 approvals of a champion",
    ]
    assert after.commands == () and after.models[0].last_without is None
    with pytest.raises(ProtocolError, match="unknown_member"):
        governance.plan_after(world.fold, "elm")
    with pytest.raises(ProtocolError, match="unknown_member"):
        governance.leave(world.fold, "elm", world.tick())


# --- the whole ledger ----------------------------------------------------------------------------------------------


def note(world: Woods, size: int, *cosigners: str, signer: str = "operator") -> str:
    root = merkle.root_of(merkle.leaf_hash(d) for d in world.log[:size])
    body = notes.checkpoint("fedmat/woods", size, root)
    signed = notes.sign(body, "fedmat/woods", world.keys[signer])
    return signed + "".join(notes.cosign(body, f"woods/{c}", world.keys[c], 1000 + size) for c in cosigners)


def test_a_whole_ledger_is_verified_with_its_checkpoints(woods: Woods) -> None:
    woods.plan("r1")
    size = len(woods.log)
    found = whole.examine(woods.log, [note(woods, 1, "ash", "birch"), note(woods, size, "ash")], "fedmat/woods")
    assert [(c.size, c.cosigners, c.needed, c.counts) for c in found.checkpoints] == [
        (1, ("ash", "birch"), 2, True), (size, ("ash",), 2, False),
    ]  # fmt: skip
    assert found.witnessed == 1 and found.charter_sha256 == woods.charter().sha256
    assert found.root == merkle.root_of(merkle.leaf_hash(d) for d in woods.log).hex()
    assert whole.examine(woods.log, [], "fedmat/woods").witnessed == 0


@pytest.mark.parametrize(
    ("reason", "wrong"),
    [
        ("truncated_log", lambda w: (w.log[:3], [note(w, 4)], "fedmat/woods")),
        ("forked_log", lambda w: ([*w.log[:3], w.log[4], w.log[3]], [note(w, 5)], "fedmat/woods")),
        ("foreign_bundle", lambda w: (w.log, [], "fedmat/hills")),
        ("foreign_bundle", lambda w: (w.log, [note(w, 2).replace("fedmat/woods\n2", "fedmat/hills\n2")], "fedmat/woods")),
        ("bad_signature", lambda w: (w.log, [note(w, 2, signer="ash")], "fedmat/woods")),
        ("unknown_signer", lambda w: (w.log, [note(w, 2, "elm")], "fedmat/woods")),
        ("bad_checkpoint", lambda w: (w.log, [note(w, 2), note(w, 1)], "fedmat/woods")),
        ("bad_checkpoint", lambda w: (w.log, [note(w, 2)[:-9]], "fedmat/woods")),
        ("unknown_signer", lambda w: (w.log, [note(w, 2, "ash").replace("woods/ash ", "woods/birch ")], "fedmat/woods")),
        ("truncated_log", lambda w: ([], [], "fedmat/woods")),
        ("truncated_log", lambda w: (w.log[1:], [], "fedmat/woods")),
    ],
)
def test_a_ledger_that_was_changed_is_refused_by_name(woods: Woods, reason: str, wrong: Any) -> None:
    woods.plan("r1")
    with pytest.raises(ProtocolError) as caught:
        whole.examine(*wrong(woods))
    assert caught.value.reason == reason


# --- words ---------------------------------------------------------------------------------------------------------


def test_every_type_of_entry_has_its_words(rich: Woods) -> None:
    assert set(words._WORDS) == set(TYPES)
    for data in rich.log:
        entry = entries.open_envelope(data)[0]
        assert len(words.words(entry)) > 10
    told = dict(words.terms_in_words(rich.charter()))
    assert (told["quorum"], told["tiers"], told["a day of priority"]) == ("2 of 3", "champion 300, open 0", "7 credits")


def test_the_terms_as_documented_are_those_there_are() -> None:
    text = (Path(__file__).parent.parent / "docs" / "charter.md").read_text()
    table = text.split("| Key under `terms:` |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(Terms.model_fields)
    shown = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert Terms.model_validate(shown["terms"]).needed(3) == 2
