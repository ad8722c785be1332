"""The ledger is a function of its entries: every entry that breaks a rule is refused at its place, by everyone alike."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any, TypeVar

import pytest

from fedmat import keys
from fedmat.config import Terms
from fedmat.errors import ProtocolError
from fedmat.keys import PartyKeys
from fedmat.ledger import entries
from fedmat.ledger.entries import (
    AggregateEntry,
    ApprovalEntry,
    CharterEntry,
    ContributionEntry,
    DatasetEntry,
    DepartureEntry,
    EvaluationEntry,
    MembershipEntry,
    MintEntry,
    PlanEntry,
    PodEntry,
    RegistrationEntry,
    RotationEntry,
    TransferEntry,
    UpdateEntry,
)
from fedmat.ledger.fold import Fold
from fedmat.ledger.text import stamp

START = datetime(2026, 3, 2, 8, 0, 0, tzinfo=UTC)
UNTIL = date(2027, 3, 2)
E = TypeVar("E")
D = {c: c * 64 for c in "0123456789abcdef"}


class Life:
    """A consortium of three sites whose keys the test holds."""

    def __init__(self, **terms: Any) -> None:
        self.clock = START
        self.keys = {n: PartyKeys.new(n) for n in ("operator", "elm", "oak", "fir", "yew")}
        self.fold = Fold()
        parties = [self.keys[s].public("site", s.title(), UNTIL) for s in ("elm", "oak", "fir")]
        self.charter = CharterEntry(
            consortium="grove", by="operator", time=self.now(), keys=keys.charter("grove", "x25519", parties),
            operator=self.keys["operator"].public("operator", "Grove Ltd", UNTIL), terms=Terms(**terms),
        )  # fmt: skip
        self.log: list[bytes] = []
        self.add(self.charter, "operator", "elm", "oak", "fir")

    def now(self, later: timedelta = timedelta(seconds=1)) -> str:
        self.clock += later
        return stamp(self.clock)

    def make(self, type_: Callable[..., E], by: str = "operator", **fields: Any) -> E:
        return type_(**{"consortium": "grove", "by": by, "time": self.now(), **fields})

    def add(self, entry: Any, *signers: str) -> Any:
        data = entries.seal(entry, [self.keys[s] for s in (signers or (entry.by,))])
        found = self.fold.apply(data)
        self.log.append(data)
        return found

    def refused(self, reason: str, entry: Any, *signers: str) -> ProtocolError:
        before = self.fold.size
        with pytest.raises(ProtocolError) as caught:
            self.add(entry, *signers)
        assert caught.value.reason == reason, caught.value
        assert f"entry {before}" in caught.value.what
        assert self.fold.size == before
        return caught.value

    def plan(self, run: str = "r1", sites: tuple[str, ...] = ("elm", "oak", "fir")) -> PlanEntry:
        return self.make(
            PlanEntry, run=run, plan_sha256=D["a"], sites=sites, seed=1, rounds=2, code_version="1", environment_sha256=D["b"],
            consortium_file_sha256=D["c"],
        )  # fmt: skip

    def dataset(self, site: str, run: str = "r1", sha256: str = D["d"]) -> DatasetEntry:
        return self.make(
            DatasetEntry, by=site, run=run, dataset_sha256=sha256, attestation_sha256=D["e"], features_sha256=D["f"],
            contract_version="1.1.0", n_train=10,
        )  # fmt: skip

    def evaluation(self, run: str = "r1") -> EvaluationEntry:
        return self.make(
            EvaluationEntry, run=run, model_sha256=D["1"], weights_sha256=D["2"], held_out_sha256=D["3"], metrics_sha256=D["4"],
            evaluations_sha256=D["5"], intervals_sha256=D["6"], matching_sha256=D["7"], metric="mae", score=0.1,
        )  # fmt: skip

    def aggregate(self, number: int = 0, run: str = "r1") -> AggregateEntry:
        return self.make(
            AggregateEntry, run=run, round=number, rule="mean", protection="none", shares={"elm": 0.5, "oak": 0.5},
            updates={"elm": D["8"], "oak": D["9"]}, model_sha256=D["2"], report_sha256=D["0"],
        )  # fmt: skip

    def approval(self, site: str, **other: str) -> ApprovalEntry:
        about = {"model_sha256": D["1"], "metrics_sha256": D["4"]} | other
        return self.make(ApprovalEntry, by=site, run="r1", approves=True, **about)

    def registration(self, *aliases: str) -> RegistrationEntry:
        return self.make(RegistrationEntry, run="r1", model_sha256=D["1"], name="fedmat-grove", version=1, aliases=aliases)


def test_a_run_is_told_entry_by_entry_and_anyone_comes_to_the_same_state() -> None:
    life = Life(approvals=0)
    life.add(life.plan())
    for site in ("elm", "oak", "fir"):
        life.add(life.dataset(site))
    life.add(life.aggregate())
    life.add(life.evaluation())
    life.add(life.registration("champion"))
    again = Fold.of(life.log)
    assert again.size == life.fold.size == len(life.log)
    assert again.runs["r1"].registration == life.fold.runs["r1"].registration
    assert sorted(p.index for p in again.runs["r1"].all()) == list(range(1, len(life.log)))


def test_a_ledger_begins_with_a_charter_that_every_site_signed() -> None:
    life = Life()
    bare = Fold()
    data = entries.seal(life.charter, [life.keys[s] for s in ("operator", "elm", "oak")])
    with pytest.raises(ProtocolError, match="not signed by fir"):
        bare.apply(data)
    with pytest.raises(ProtocolError, match="truncated_log.*entry 0"):
        bare.apply(entries.seal(life.plan(), [life.keys["operator"]]))


def test_a_signature_that_does_not_fit_is_refused() -> None:
    life = Life()
    good = entries.seal(life.plan(), [life.keys["operator"]])
    other = entries.seal(life.plan("r2"), [life.keys["operator"]])
    from fedmat.ledger import dsse

    forged = dsse.Envelope(dsse.parse(good).payload, dsse.PAYLOAD_TYPE, dsse.parse(other).signatures).encode()
    with pytest.raises(ProtocolError, match="entry 1: the signature of operator does not fit"):
        life.fold.apply(forged)


@pytest.mark.parametrize("signer", ["oak", "yew"])
def test_nobody_signs_for_somebody_else(signer: str) -> None:
    life = Life()
    life.add(life.plan())
    life.refused("bad_signature", life.dataset("elm"), signer)


def test_what_is_the_operators_to_state_no_site_states() -> None:
    life = Life()
    entry = life.plan().model_copy(update={"by": "elm"})
    life.refused("bad_signature", entry, "elm")


def test_a_foreign_entry_is_refused() -> None:
    life = Life()
    life.refused("foreign_bundle", life.plan().model_copy(update={"consortium": "copse"}))


def test_an_entry_of_unknown_type_counts_nothing() -> None:
    life = Life()
    from fedmat import files
    from fedmat.ledger import dsse

    payload = files.canonical_json({"type": "gift", "consortium": "grove", "by": "operator", "time": life.now()})
    with pytest.raises(ProtocolError, match="unknown_entry: entry 1: of no known type"):
        life.fold.apply(dsse.sign(payload, [life.keys["operator"]]).encode())


def test_bytes_that_are_not_canonical_are_refused() -> None:
    life = Life()
    from fedmat.ledger import dsse

    loose = entries.payload(life.plan()).replace(b'"by":', b'"by": ')
    with pytest.raises(ProtocolError, match="not_canonical"):
        life.fold.apply(dsse.sign(loose, [life.keys["operator"]]).encode())


def test_the_same_words_do_not_count_twice_whoever_else_signs() -> None:
    life = Life()
    plan = life.plan()
    life.add(plan)
    life.refused("replayed_entry", plan)
    life.refused("replayed_entry", plan, "operator", "elm")


def test_a_clock_that_goes_backwards_is_named() -> None:
    life = Life()
    life.add(life.plan())
    late = life.plan("r2")
    early = late.model_copy(update={"time": stamp(life.clock - timedelta(hours=1)), "run": "r3"})
    life.add(late)
    life.refused("clock_backwards", early)


def test_a_back_dated_entry_of_another_party_is_named() -> None:
    life = Life()
    life.add(life.plan())
    entry = life.dataset("elm").model_copy(update={"time": stamp(START - timedelta(days=2))})
    life.refused("clock_backwards", entry)


def test_signatures_of_several_companies_may_take_their_time() -> None:
    life = Life()
    proposed = join(life)
    life.clock += timedelta(days=20)
    life.add(life.plan())
    life.add(proposed, "operator", "yew", "elm", "oak")
    life.clock += timedelta(days=31)
    life.add(life.plan("r2"))
    late = life.make(PodEntry, name="salts", members=("elm",), task="x").model_copy(update={"time": proposed.time})
    life.refused("clock_backwards", late, "operator", "elm")


def test_nobody_takes_a_departed_name_and_its_credits() -> None:
    life = Life()
    life.add(life.make(DepartureEntry, by="fir", site="fir", datasets=()), "operator", "fir")
    taken = life.make(MembershipEntry, party=life.keys["yew"].public("site", "Yew", UNTIL).model_copy(update={"name": "fir"}))
    life.refused("conflicting_entry", taken, "operator", "yew", "elm", "oak")


def test_a_key_counts_from_the_entry_that_brings_it_to_the_one_that_replaces_it() -> None:
    life = Life()
    life.add(life.plan())
    old, new = life.keys["elm"], PartyKeys.new("elm")
    entry = next(p for p in life.charter.keys.parties if p.name == "elm")
    rotation = keys.rotate(old, entry, new, UNTIL, life.clock.date())
    life.add(life.make(RotationEntry, by="elm", rotation=rotation))
    error = life.refused("key_not_in_force", life.dataset("elm"))
    assert "a key of elm" in error.what
    life.keys["elm"] = new
    placed = life.fold.size
    life.add(life.dataset("elm"))
    assert life.fold.key_at("elm", placed) == rotation.entry
    assert life.fold.key_at("elm", placed - 1) == entry


def test_a_key_that_had_ended_when_it_signed_is_refused() -> None:
    life = Life()
    life.add(life.plan())
    life.clock = datetime(2027, 3, 3, tzinfo=UTC)
    error = life.refused("key_not_in_force", life.dataset("elm"))
    assert "ended on 2027-03-02" in error.what


def join(life: Life) -> MembershipEntry:
    return life.make(MembershipEntry, party=life.keys["yew"].public("site", "Yew", UNTIL))


def test_joining_takes_a_quorum_the_operator_and_the_new_site() -> None:
    life = Life()  # three members: two are a quorum
    life.refused("no_quorum", join(life), "operator", "yew", "elm")
    life.refused("bad_signature", join(life), "operator", "elm", "oak")
    life.add(join(life), "operator", "yew", "elm", "oak")
    assert life.fold.sites == {"elm", "oak", "fir", "yew"}
    life.refused("conflicting_entry", join(life), "operator", "yew", "elm", "oak")


def test_a_site_leaves_by_itself_or_by_a_quorum() -> None:
    life = Life()
    life.add(life.plan())
    by_quorum = life.make(DepartureEntry, site="fir", datasets=(D["d"],))
    life.refused("no_quorum", by_quorum, "operator", "elm")
    life.add(by_quorum, "operator", "elm", "oak")
    life.refused("unknown_member", life.dataset("fir"))
    life.refused("unknown_member", life.plan("r2"))
    life.add(life.plan("r3", ("elm", "oak")))
    life.add(life.make(DepartureEntry, by="oak", site="oak", datasets=()), "operator", "oak")
    assert life.fold.sites == {"elm"}
    assert life.fold.sites_at(2) == ("elm", "fir", "oak")
    assert life.fold.sites_at(3) == ("elm", "oak")


@pytest.mark.parametrize("kind", ["plan", "dataset", "aggregate", "evaluation"])
def test_a_second_word_on_the_same_thing_is_refused(kind: str) -> None:
    life = Life()
    life.add(life.plan())
    if kind != "plan":
        first = getattr(life, kind)
        life.add(first("elm") if kind == "dataset" else first())
    again = getattr(life, kind)
    error = life.refused("conflicting_entry", again("elm") if kind == "dataset" else again())
    assert kind == "plan" or "the first is entry 2" in error.what


def test_an_update_of_a_site_that_is_in_no_plan_is_refused() -> None:
    life = Life()
    life.add(life.plan(sites=("elm", "oak")))
    life.refused("unknown_member", life.make(UpdateEntry, by="fir", run="r1", round=0, sha256=D["8"], bytes=9, kind="Update"))
    life.refused("truncated_log", life.make(UpdateEntry, by="elm", run="r9", round=0, sha256=D["8"], bytes=9, kind="Update"))


def test_a_champion_takes_the_charters_approvals_over_this_model_and_this_evaluation() -> None:
    life = Life()  # a quorum of three: two
    life.add(life.plan())
    life.add(life.evaluation())
    life.add(life.registration("challenger"))
    life.refused("bad_approval", life.approval("elm", model_sha256=D["9"]))
    life.refused("bad_approval", life.approval("elm", metrics_sha256=D["9"]))
    life.add(life.approval("elm"))
    life.refused("no_approval", life.registration("champion"))
    life.add(life.approval("oak").model_copy(update={"approves": False}))
    life.refused("no_approval", life.registration("champion"))
    life.add(life.approval("fir"))
    life.add(life.registration("champion"))
    life.refused("unknown_member", life.approval("yew"), "yew")


def test_a_pod_is_signed_by_its_members() -> None:
    life = Life()
    pod = life.make(PodEntry, name="salts", members=("elm", "oak"), task="conductivity")
    life.refused("bad_signature", pod, "operator", "elm")
    life.add(pod, "operator", "elm", "oak")
    assert set(life.fold.pods) == {"salts"}


def test_credits_follow_from_a_settlement_alone() -> None:
    life = Life(credits_per_release=100)
    life.add(life.plan())
    life.add(life.evaluation())

    def worth(method: str) -> ContributionEntry:
        return life.make(
            ContributionEntry, run="r1", model_sha256=D["1"], method=method, shares={"elm": 0.3, "oak": 0.1, "fir": -0.1},
            errors=dict.fromkeys(("elm", "oak", "fir"), 0.01), evidence_sha256=D["5"],
        )  # fmt: skip

    def mint(of: int, **amounts: int) -> MintEntry:
        return life.make(MintEntry, run="r1", model_sha256=D["1"], contribution=of, amounts=amounts)

    seen, settled = life.fold.size, life.fold.size + 1
    life.add(worth("gram"))
    life.add(worth("settlement"))
    life.refused("bad_mint", mint(seen, elm=75, oak=25))
    life.refused("bad_mint", mint(settled, elm=74, oak=26))
    life.add(mint(settled, elm=75, oak=25))
    life.refused("double_mint", mint(settled, elm=75, oak=25))
    life.add(life.make(TransferEntry, by="elm", to="fir", amount=5, sequence=1))
    assert life.fold.credits.balances == {"elm": 70, "oak": 25, "fir": 5}


def test_every_type_is_in_the_closed_list() -> None:
    assert len(entries.TYPES) == 19
    life = Life()
    data = entries.payload(life.plan())
    assert entries.read(data) == entries.read(data)
    with pytest.raises(ProtocolError, match=r"field plan\.seed"):
        entries.read(data.replace(b'"seed":1', b'"seed":"one"'))
