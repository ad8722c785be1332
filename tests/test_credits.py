"""Credits: what is minted follows from the contribution, what moves was there, and nothing else ever happens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedmat import contribution
from fedmat.config import Terms
from fedmat.errors import ProtocolError
from fedmat.ledger import credits
from fedmat.ledger.credits import Credits
from fedmat.ledger.entries import ContributionEntry, MintEntry, SpendEntry, TransferEntry

TIME = "2026-11-24T12:00:00Z"
SITES = ("ash", "birch", "cedar", "dune")
TERMS = Terms(credits_per_release=1000, tiers={"champion": 300, "archive": 50, "open": 0}, priority_price=7)
MODEL = "a" * 64


def common(by: str) -> dict[str, Any]:
    return {"consortium": "woods", "by": by, "time": TIME}


def worth(shares: dict[str, float], errors: dict[str, float] | None = None, run: str = "r1", **more: Any) -> ContributionEntry:
    return ContributionEntry(**common("operator"), run=run, model_sha256=MODEL, method=more.pop("method", "settlement"),
                             shares=shares, errors=dict.fromkeys(shares, 0.0) if errors is None else errors, evidence_sha256="b" * 64, **more)  # fmt: skip


def mint(amounts: dict[str, int], run: str = "r1", model: str = MODEL) -> MintEntry:
    return MintEntry(**common("operator"), run=run, model_sha256=model, contribution=3, amounts=amounts)


def give(by: str, to: str, amount: int, sequence: int, note: str = "") -> TransferEntry:
    return TransferEntry(**common(by), to=to, amount=amount, sequence=sequence, note=note)


def spend(by: str, what: Any, item: str, amount: int, sequence: int, time: str = TIME) -> SpendEntry:
    return SpendEntry(**common(by) | {"time": time}, what=what, item=item, amount=amount, sequence=sequence)


def refused(state: Credits, reason: str, entry: Any, *, members: set[str] | None = None, basis: Any = None) -> None:
    """The entry is refused by that name, the message names its place, and nothing has changed."""
    before = copy.deepcopy(state)
    among = set(SITES) if members is None else members
    with pytest.raises(ProtocolError) as caught:
        step(state, entry, basis, among, index=17)
    assert caught.value.reason == reason
    assert "entry 17" in caught.value.what
    assert state == before


@pytest.fixture
def rich() -> Credits:
    """A release that gave ash 750 and birch 250."""
    state = Credits()
    state.mint(mint({"ash": 750, "birch": 250}), worth({"ash": 0.3, "birch": 0.1, "cedar": 0.0}), 4, terms=TERMS)
    return state


# --- minting -------------------------------------------------------------------------------------------------------


def test_a_release_is_divided_by_largest_remainders(rich: Credits) -> None:
    assert (rich.balances, rich.minted, rich.spent) == ({"ash": 750, "birch": 250}, 1000, 0)
    assert credits.due(worth(dict.fromkeys(SITES[:3], 1.0)), TERMS) == {"ash": 334, "birch": 333, "cedar": 333}


def test_a_negative_share_earns_nothing_and_takes_nothing() -> None:
    assert credits.due(worth({"ash": 0.3, "birch": 0.1, "cedar": -0.2}), TERMS) == {"ash": 750, "birch": 250}


@pytest.mark.parametrize("shares", [{"ash": 0.1, "birch": 0.1}, {"ash": -0.1, "birch": 0.05}, {"ash": 0.0}, {}])
def test_a_gain_within_the_noise_makes_no_credits(shares: dict[str, float]) -> None:
    basis = worth(shares, dict.fromkeys(shares, 0.1))
    state = Credits()
    refused(state, "bad_mint", mint({"ash": 1000}), basis=basis)
    state.mint(mint({}), basis, 4, terms=TERMS)
    assert (state.balances, state.minted) == ({}, 0)


def test_sites_of_one_owner_have_one_error() -> None:
    """Two halves of one player: their errors add, 2 * (0.1 + 0.1) > 0.35 > 2 * hypot(0.1, 0.1)."""
    basis = worth({"ash": 0.175, "birch": 0.175}, {"ash": 0.1, "birch": 0.1})
    assert credits.due(basis, TERMS, {"ash": "Wood Ltd", "birch": "Tree Ltd"}) == {"ash": 500, "birch": 500}
    assert credits.due(basis, TERMS, {"ash": "Wood Ltd", "birch": "Wood Ltd"}) == {}


@pytest.mark.parametrize(
    "amounts",
    [
        {},
        {"ash": 1000},
        {"ash": 749, "birch": 251},
        {"ash": 750, "birch": 250, "cedar": 1},
        {"ash": 750, "birch": 250, "dune": 0},
    ],
)
def test_other_amounts_than_follow_from_the_contribution_are_refused(amounts: dict[str, int]) -> None:
    refused(Credits(), "bad_mint", mint(amounts), basis=worth({"ash": 0.3, "birch": 0.1, "cedar": 0.0}))


def test_a_model_makes_credits_once(rich: Credits) -> None:
    basis = worth({"ash": 0.3, "birch": 0.1})
    refused(rich, "double_mint", mint({"ash": 750, "birch": 250}), basis=basis)
    rich.mint(mint({"ash": 750, "birch": 250}, run="r2"), worth({"ash": 0.3, "birch": 0.1}, run="r2"), 9, terms=TERMS)
    assert rich.minted == 2000


def test_a_mint_names_the_model_that_was_settled() -> None:
    refused(Credits(), "bad_mint", mint({"ash": 1000}, model="c" * 64), basis=worth({"ash": 1.0}))
    refused(Credits(), "bad_mint", mint({"ash": 1000}, run="r2"), basis=worth({"ash": 1.0}))


@pytest.mark.parametrize("errors", [{}, {"ash": 0.0}, {"ash": 0.0, "birch": 0.0, "cedar": 0.0}, {"ash": -0.1, "birch": 0.1}])
def test_a_settlement_without_an_error_for_every_share_makes_no_credits(errors: dict[str, float]) -> None:
    refused(Credits(), "bad_mint", mint({"ash": 500, "birch": 500}), basis=worth({"ash": 1.0, "birch": 1.0}, errors))


def test_a_look_at_single_rounds_makes_no_credits_and_retraining_does() -> None:
    refused(Credits(), "bad_mint", mint({"ash": 1000}), basis=worth({"ash": 1.0}, method="gram"))
    assert credits.due(worth({"ash": 1.0}, {}, method="retrained"), TERMS) == {"ash": 1000}


@given(st.dictionaries(st.sampled_from(SITES), st.floats(-1, 1), min_size=1), st.integers(1, 10**6))
def test_what_is_minted_is_all_or_nothing_and_follows_the_shares(shares: dict[str, float], total: int) -> None:
    found = credits.due(worth(shares), Terms(credits_per_release=total))
    positive = sum(max(0.0, s) for s in shares.values())
    assert sum(found.values()) in (0, total) and set(found) <= {s for s, v in shares.items() if v > 0}
    for site, amount in found.items():
        assert abs(amount - total * shares[site] / positive) < 1 + 1e-9 * total
    assert credits.due(worth(dict(reversed(shares.items()))), Terms(credits_per_release=total)) == found


def test_the_settlement_and_the_ledger_give_the_same() -> None:
    shares, errors = {"ash": 0.31, "birch": 0.12, "cedar": -0.02}, {"ash": 0.02, "birch": 0.01, "cedar": 0.03}
    given_ = contribution.credited(list(shares.values()), list(errors.values()), 1000)
    assert credits.due(worth(shares, errors), TERMS) == {s: c for s, c in zip(shares, given_) if c}


# --- transfers -----------------------------------------------------------------------------------------------------


def test_a_transfer_moves_credits(rich: Credits) -> None:
    rich.apply(give("ash", "cedar", 700, 1), 5, members=set(SITES), terms=TERMS)
    rich.apply(give("cedar", "dune", 1, 1), 6, members=set(SITES), terms=TERMS)
    assert rich.balances == {"ash": 50, "birch": 250, "cedar": 699, "dune": 1}
    assert rich.sequence == {"ash": 1, "cedar": 1} and rich.next("ash") == 2 and rich.next("birch") == 1


def test_no_entry_counts_twice(rich: Credits) -> None:
    first = give("ash", "cedar", 700, 1)
    rich.apply(first, 5, members=set(SITES), terms=TERMS)
    refused(rich, "replayed_entry", first)
    refused(rich, "double_spend", give("ash", "dune", 700, 1))
    refused(rich, "double_spend", give("ash", "cedar", 700, 1, note="another"))
    refused(rich, "double_spend", spend("ash", "tier", "archive", 50, 1))
    refused(rich, "sequence_gap", give("ash", "cedar", 1, 3))


def test_what_cannot_move_is_refused(rich: Credits) -> None:
    refused(rich, "overdraft", give("ash", "birch", 751, 1))
    refused(rich, "overdraft", give("dune", "birch", 1, 1))
    refused(rich, "bad_transfer", give("ash", "ash", 1, 1))
    refused(rich, "unknown_member", give("ash", "elm", 1, 1))
    refused(rich, "unknown_member", give("elm", "ash", 1, 1))


def test_what_a_member_that_left_has_stays_and_cannot_move(rich: Credits) -> None:
    left = set(SITES) - {"ash"}
    refused(rich, "unknown_member", give("ash", "birch", 1, 1), members=left)
    refused(rich, "unknown_member", give("birch", "ash", 1, 1), members=left)
    refused(rich, "unknown_member", spend("ash", "tier", "archive", 50, 1), members=left)
    assert rich.balances["ash"] == 750 and sum(rich.balances.values()) + rich.spent == rich.minted


def test_an_amount_is_a_whole_positive_number() -> None:
    for amount in (0, -1, 1.5, "7", True, 2**53):
        with pytest.raises(ValueError):
            give("ash", "birch", amount, 1)  # type: ignore[arg-type]


# --- spending ------------------------------------------------------------------------------------------------------


def test_a_tier_costs_what_the_charter_says_and_is_bought_once(rich: Credits) -> None:
    assert not rich.has_tier("ash", "champion", TERMS) and rich.has_tier("dune", "open", TERMS)
    refused(rich, "wrong_price", spend("ash", "tier", "champion", 299, 1))
    refused(rich, "unknown_tier", spend("ash", "tier", "gold", 300, 1))
    rich.apply(spend("ash", "tier", "champion", 300, 1), 5, members=set(SITES), terms=TERMS)
    assert (rich.balances["ash"], rich.spent) == (450, 300)
    assert rich.has_tier("ash", "champion", TERMS) and not rich.has_tier("birch", "champion", TERMS)
    assert not rich.has_tier("ash", "gold", TERMS)
    refused(rich, "bought_before", spend("ash", "tier", "champion", 300, 2))
    refused(rich, "overdraft", spend("birch", "tier", "champion", 300, 1))


def test_priority_is_paid_by_the_day_and_days_add_up(rich: Credits) -> None:
    refused(rich, "wrong_price", spend("ash", "priority", "fedmat-x", 20, 1))
    rich.apply(spend("ash", "priority", "fedmat-x", 14, 1), 5, members=set(SITES), terms=TERMS)
    assert rich.priority_until("ash", "fedmat-x") == "2026-11-26T12:00:00Z"
    rich.apply(spend("ash", "priority", "fedmat-x", 7, 2, "2026-11-25T00:00:00Z"), 6, members=set(SITES), terms=TERMS)
    assert rich.priority_until("ash", "fedmat-x") == "2026-11-27T12:00:00Z"
    rich.apply(spend("ash", "priority", "fedmat-x", 7, 3, "2027-01-01T00:00:00Z"), 7, members=set(SITES), terms=TERMS)
    assert rich.priority_until("ash", "fedmat-x") == "2027-01-02T00:00:00Z"
    assert rich.priority_until("ash", "fedmat-y") == rich.priority_until("birch", "fedmat-x") == ""


def test_priority_beyond_the_calendar_is_refused() -> None:
    state = Credits(balances={"ash": 10**12}, minted=10**12)
    refused(state, "wrong_price", spend("ash", "priority", "fedmat-x", 7 * 10**10, 1))


# --- laws ----------------------------------------------------------------------------------------------------------


class Market(RuleBasedStateMachine):
    """Members that mint, give, spend, leave, replay and forge, against a naive book of what each should have."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.members = Credits(), set(SITES)
        self.steps: list[tuple[Any, Any, set[str]]] = []  # entry, what it mints from, members at that place
        self.states = [copy.deepcopy(self.state)]
        self.book = dict.fromkeys(SITES, 0)

    def put(self, entry: Any, basis: Any = None) -> None:
        step(self.state, entry, basis, self.members)
        self.steps.append((entry, basis, set(self.members)))
        self.states.append(copy.deepcopy(self.state))

    def fails(self, entry: Any, basis: Any = None) -> str:
        """Tells why an entry is refused; it must change nothing."""
        with pytest.raises(ProtocolError) as caught:
            step(self.state, entry, basis, self.members)
        assert self.state == self.states[-1]
        return caught.value.reason

    @rule(shares=st.dictionaries(st.sampled_from(SITES), st.floats(0.01, 1), min_size=1))
    def release(self, shares: dict[str, float]) -> None:
        basis = worth(shares, run=f"r{len(self.steps)}")
        amounts = credits.due(basis, TERMS)
        self.put(mint(amounts, run=basis.run), basis)
        for site, amount in amounts.items():
            self.book[site] += amount

    @rule(by=st.sampled_from(SITES), to=st.sampled_from(SITES), amount=st.integers(1, 1500))
    def transfer(self, by: str, to: str, amount: int) -> None:
        entry = give(by, to, amount, self.state.next(by))
        if {by, to} <= self.members and by != to and amount <= self.book[by]:
            self.put(entry)
            self.book[by] -= amount
            self.book[to] += amount
        else:
            assert self.fails(entry) in ("unknown_member", "bad_transfer", "overdraft")

    @rule(by=st.sampled_from(SITES), days=st.integers(1, 60))
    def queue(self, by: str, days: int) -> None:
        entry = spend(by, "priority", "fedmat-x", 7 * days, self.state.next(by))
        if by in self.members and 7 * days <= self.book[by]:
            self.put(entry)
            self.book[by] -= 7 * days
        else:
            assert self.fails(entry) in ("unknown_member", "overdraft")

    @precondition(lambda self: len(self.members) > 2)
    @rule(site=st.sampled_from(SITES))
    def leave(self, site: str) -> None:
        self.members.discard(site)

    @precondition(lambda self: self.steps)
    @rule(data=st.data())
    def replay(self, data: Any) -> None:
        entry, basis, _ = data.draw(st.sampled_from(self.steps))
        assert self.fails(entry, basis) in ("replayed_entry", "double_mint", "unknown_member")

    @precondition(lambda self: self.state.sequence)
    @rule(data=st.data(), ahead=st.integers(2, 5))
    def forge(self, data: Any, ahead: int) -> None:
        by = data.draw(st.sampled_from(sorted(self.state.sequence)))
        for sequence in (self.state.sequence[by], self.state.sequence[by] + ahead):
            entry = give(by, next(s for s in SITES if s != by), 1, sequence, note="forged")
            assert self.fails(entry) in ("double_spend", "sequence_gap", "unknown_member")

    @invariant()
    def nothing_is_lost_or_made(self) -> None:
        assert sum(self.state.balances.values()) + self.state.spent == self.state.minted
        assert min(self.state.balances.values(), default=0) >= 0
        assert {s: self.state.balance(s) for s in SITES} == self.book

    def teardown(self) -> None:
        """The same entries give the same state, also up to every place before the last."""
        again = Credits()
        for (entry, basis, members), expected in zip(self.steps, self.states[1:], strict=True):
            step(again, entry, basis, members)
            assert again == expected


def step(state: Credits, entry: Any, basis: Any, members: set[str], index: int = 1) -> None:
    if basis is None:
        state.apply(entry, index, members=members, terms=TERMS)
    else:
        state.mint(entry, basis, index, terms=TERMS)


Market.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestMarket = Market.TestCase
