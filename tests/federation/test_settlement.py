"""Settlement through real sites, roles and engine: what shares say, who can open what, what is answered once."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import consortium
import numpy as np
import pytest
import small
from typer.testing import CliRunner

from fedmat import contribution, files, pipeline, wire
from fedmat import keys as keyring
from fedmat.cli import app
from fedmat.contribution import Moments, moments
from fedmat.domain import GlobalModel, MomentsRequest
from fedmat.envelopes import SealedMoments, Settlement, SettleRequest
from fedmat.errors import FedmatError, PlanRefused, ProtocolError, RoundFailed, StateError
from fedmat.features.table import FeatureTable
from fedmat.federation import settlement
from fedmat.federation.engine import Handler, InProcessEngine
from fedmat.federation.plan import Plan
from fedmat.privacy.mechanisms import Noise
from fedmat.seeds import stream

QUIET = {"settle_epsilon": 1e4}  # hardly any noise: the laws of shares, not of privacy
Wrap = Callable[[Handler], Handler]


def config(**plan: Any) -> Any:
    return consortium.config(
        consortium.SEVEN,
        **{
            "security": {"mode": "trigram"},
            "quorum": 5,
            "rounds": 2,
            "contribution": QUIET,
            "local": {"steps": 40, "batch_size": 32, "lr": 1e-2},
            **plan,
        },
    )


CONFIG = config()
PLAN = Plan.of(CONFIG)


def tables(rows: int = 240) -> dict[str, FeatureTable]:
    """Seven sites of one law; gorse's labels are shuffled."""
    out = {site: consortium.table(site, rows) for site in consortium.SEVEN}
    bad = out["gorse"]
    out["gorse"] = dataclasses.replace(bad, y=stream(1, "shuffled").permutation(bad.y))
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GlobalModel]:
    """A finished run; tests work on copies."""
    folder = tmp_path_factory.mktemp("trained")
    _, model = consortium.run(CONFIG, folder, data=tables())
    assert model is not None
    return folder, model


@pytest.fixture
def run(trained: tuple[Path, GlobalModel], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained[0], tmp_path / "grove"))


def settle(folder: Path, model: GlobalModel, bad: dict[str, Wrap] | None = None, *, today: str = consortium.TODAY) -> Any:
    engine = InProcessEngine(consortium.handlers(CONFIG, folder, bad, tables()))
    charter = consortium.charter(CONFIG, folder)
    assert charter is not None
    return settlement.settle(engine, PLAN, charter, model, rows(folder), nonce(folder), today, folder / "run")


def rows(folder: Path) -> dict[str, int]:
    found: Any = consortium.setup(folder)["attestations"]
    return {site: a["labels"][0] for site, a in found.items()}


def nonce(folder: Path) -> str:
    return str(files.read_json(folder / "run" / "run.json")["run"])


def recording(seen: list[Any]) -> Wrap:
    def wrap(handle: Handler) -> Handler:
        def answer(data: bytes) -> bytes:
            seen.append(wire.decode(data, object))
            reply = handle(data)
            seen.append(wire.decode(reply, object))
            return reply

        return answer

    return wrap


def asked(folder: Path, model: GlobalModel) -> SettleRequest:
    """What the Auditor is asked, caught on its way."""
    seen: list[Any] = []
    settle(folder, model, {"auditor": recording(seen)})
    return next(m for m in seen if isinstance(m, SettleRequest))


def auditor(folder: Path, request: SettleRequest) -> Settlement:
    return wire.decode(consortium.role("auditor", CONFIG, folder)(wire.encode(request)), Settlement)


def forget(folder: Path) -> None:
    """An Auditor that answered nothing yet."""
    shutil.rmtree(folder / "roles" / "auditor" / "settled")


# --- what shares say ---------------------------------------------------------------------------------------------------


def test_shares_sum_to_the_gain_and_random_labels_get_less(run: Path, trained: tuple[Path, GlobalModel]) -> None:
    found = settle(run, trained[1])
    shares = {s: row["share"] for s, row in found["sites"].items()}
    assert sum(shares.values()) == pytest.approx(found["held_out_gain"], abs=1e-12) and found["held_out_gain"] > 0.1
    assert min(shares, key=lambda s: shares[s]) == "gorse"
    assert sum(row["credits"] for row in found["sites"].values()) == 1000
    assert found["missing"] == {} and found["epsilon"] == 1e4
    charter = consortium.charter(CONFIG, run)
    assert charter is not None
    settlement.verify(found, PLAN, charter, consortium.TODAY)
    raised = {**found, "sites": {**found["sites"], "gorse": {**found["sites"]["gorse"], "share": 9.0}}}
    with pytest.raises(ProtocolError, match="bad_signature"):
        settlement.verify(raised, PLAN, charter, consortium.TODAY)


def linear(site: int, n: int, *, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    rng = stream(4, "linear", site)
    phi = np.column_stack([rng.normal(size=(n, 12)), np.ones(n)])
    phi[:, :12] /= np.maximum(1.0, np.linalg.norm(phi[:, :12], axis=1, keepdims=True))
    return phi, phi[:, :3].sum(axis=1) + noise * rng.normal(size=n)


def test_an_error_says_what_the_noise_does_to_a_share() -> None:
    """Shares of the same rows under fresh noise scatter about as much as each settlement says."""
    plan = Plan.of(config(contribution={"settle_epsilon": 4.0}))
    data = [linear(i, 4000) for i in range(6)]
    found = []
    for again in range(12):
        parts, exams = (
            [settlement.protected(plan, *d, noise=Noise(insecure_seed=100 * again + 10 * k + i)) for i, d in enumerate(data)]
            for k in range(2)
        )
        found.append(settlement.settle_moments(plan, parts, exams, f"model {again}"))
    scatter = np.std([f[0] for f in found], axis=0, ddof=1).mean()
    said = np.mean([f[1] for f in found])
    assert 0.6 < said / scatter < 1.6


def test_a_site_has_one_part_in_n_of_the_examination_however_many_rows_it_states() -> None:
    data = [linear(i, 400) for i in range(5)]
    parts = [moments(*d) for d in data]
    many = Moments(400 * 1000, parts[4].features * 1000, parts[4].products * 1000, parts[4].square * 1000)
    few = settlement.settle_moments(PLAN, parts, parts, "m")[0]
    np.testing.assert_allclose(settlement.settle_moments(PLAN, parts, [*parts[:4], many], "m")[0], few, atol=1e-9)


def test_sampled_orders_agree_with_all_coalitions(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [moments(*linear(i, 60 * (i + 1))) for i in range(6)]
    exact = settlement.settle_moments(PLAN, parts, parts, "m")
    monkeypatch.setattr("fedmat.contribution.MOST_RETRAINED", 5)
    values, errors, gain = settlement.settle_moments(PLAN, parts, parts, "m")
    assert gain == pytest.approx(exact[2]) and (errors > exact[1]).all()
    assert (np.abs(values - exact[0]) < 5 * errors + 1e-9).all()


def test_the_ridge_covers_the_noise_at_the_default_budget() -> None:
    """Pure noise: rows that say nothing still leave every coalition a solution."""
    plan = Plan.of(config(contribution={}))
    empty = (np.zeros((5, 13)), np.zeros(5))
    empty[0][:, -1] = 1.0
    for again in range(5):
        parts = [settlement.protected(plan, *empty, noise=Noise(insecure_seed=10 * again + i)) for i in range(7)]
        assert np.isfinite(settlement.settle_moments(plan, parts, parts, "m")[0]).all()


def test_shares_that_noise_could_have_made_earn_no_credits() -> None:
    assert contribution.credited([0.3, 0.1, 0.0], [0.01, 0.01, 0.01], settlement.CREDITS) == (750, 250, 0)
    assert contribution.credited([0.3, 0.1, 0.0], [0.2, 0.2, 0.2], settlement.CREDITS) == (None, None, None)
    assert contribution.credited([-0.3, -0.1, 0.0], [0.0, 0.0, 0.0], settlement.CREDITS) == (None, None, None)


# --- who can open what -------------------------------------------------------------------------------------------------


def test_moments_travel_sealed_and_only_the_auditor_opens_them(run: Path, trained: tuple[Path, GlobalModel]) -> None:
    seen: list[Any] = []
    settle(run, trained[1], dict.fromkeys((*consortium.SEVEN, "auditor"), recording(seen)))
    assert {type(m) for m in seen} == {MomentsRequest, SealedMoments, SettleRequest, Settlement}
    given = [m for m in seen if isinstance(m, SealedMoments)]
    assert len({len(m.sealed) for m in given}) == 1  # no length tells of rows
    charter = consortium.charter(CONFIG, run)
    assert charter is not None
    p = PLAN.settings.contribution.settle_dims + 1
    plain = 2 * 8 * (p * p + p + 2)
    assert {len(m.sealed) for m in given} == {plain + charter.seal_overhead}
    model_sha256 = wire.weights_digest(trained[1].weights, trained[1].scaler)
    for m, reader in itertools.product(given, ("auditor", "aggregator", "notary", "ash")):
        own = keyring.load(consortium.key_folder(run, reader), reader)
        context = settlement._context(charter, m.site, PLAN.sha256, nonce(run), model_sha256)
        if reader == "auditor":
            assert len(own.unseal(m.sealed.tobytes(), context)) == plain
        else:
            with pytest.raises(ProtocolError, match="bad_seal"):
                own.unseal(m.sealed.tobytes(), context)


def test_bytes_of_moments_are_in_no_file_of_the_run(run: Path, trained: tuple[Path, GlobalModel]) -> None:
    found = [d.sealed.tobytes() for d in asked(run, trained[1]).parts]
    charter = consortium.charter(CONFIG, run)
    assert charter is not None
    own = keyring.load(consortium.key_folder(run, "auditor"), "auditor")
    model_sha256 = wire.weights_digest(trained[1].weights, trained[1].scaler)
    context = settlement._context(charter, "ash", PLAN.sha256, nonce(run), model_sha256)
    plain = own.unseal(found[0], context)
    everything = b"".join(p.read_bytes() for p in run.rglob("*") if p.is_file())
    assert plain[8:200] not in everything and found[0][:64] in everything


@pytest.mark.parametrize("other", ["aggregator", "notary", "ash"])
def test_nobody_else_settles(run: Path, trained: tuple[Path, GlobalModel], other: str) -> None:
    request = wire.encode(asked(run, trained[1]))
    handle = consortium.worker("ash", CONFIG, run).handle if other == "ash" else consortium.role(other, CONFIG, run)
    with pytest.raises(FedmatError):
        handle(request)


def test_the_moments_of_a_site_are_those_of_its_rows(run: Path, trained: tuple[Path, GlobalModel]) -> None:
    """At hardly any noise the opened numbers are the plain second moments of clipped rows."""
    request, data = asked(run, trained[1]), tables()["ash"]
    charter = consortium.charter(CONFIG, run)
    assert charter is not None
    own = keyring.load(consortium.key_folder(run, "auditor"), "auditor")
    train, held_out = settlement.Settling(PLAN, own, charter, run)._open(request, request.parts[0])
    assert (train.n, held_out.n) == (int((data.split == 0).sum()), int((data.split == 1).sum()))
    target = np.clip(trained[1].scaler.target(data.y)[data.split == 0, 0].astype(float), -3, 3)
    assert train.square == pytest.approx(float(target @ target), abs=3.0)
    assert np.trace(train.features) <= 2.0 * train.n + 1.0 and np.linalg.eigvalsh(train.features).min() > -1.0


# --- what is refused, by name ------------------------------------------------------------------------------------------


def test_replayed_altered_and_misplaced_moments_are_named(run: Path, trained: tuple[Path, GlobalModel]) -> None:
    request = asked(run, trained[1])
    forget(run)
    first, *rest = request.parts
    flipped = np.array(first.sealed)
    flipped[-1] ^= 1
    renamed = dataclasses.replace(rest[0], site=first.site)
    for wrong in (dataclasses.replace(first, sealed=flipped), renamed, dataclasses.replace(first, signature=first.sealed)):
        found = auditor(run, dataclasses.replace(request, parts=(wrong, *rest)))
        assert first.site not in found.sites and len(found.sites) == len(found.shares) == 6
        assert found.excluded[first.site].split(":")[0] in ("bad_signature", "wrong_length")
        forget(run)
    low = auditor(run, dataclasses.replace(request, rows={**request.rows, first.site: 3}))
    assert low.excluded[first.site].startswith("bad_moments")
    forget(run)
    cases: dict[str, list[dict[str, Any]]] = {
        "bad_sets": [{"parts": (first, first, *rest[1:])}, {"parts": tuple(reversed(request.parts))}],
        "unknown_run": [{"run": "0" * 32}],
        "too_few": [{"parts": request.parts[:4]}, {"model_sha256": "0" * 64}, {"today": "2099-01-01"}],
        "foreign_plan": [{"plan_sha256": "0" * 64}],
        "wrong_charter": [{"charter_sha256": "0" * 64}],
    }
    for reason, changes in cases.items():
        for change in changes:
            with pytest.raises(ProtocolError) as error:
                auditor(run, dataclasses.replace(request, **change))
            assert error.value.reason == reason
    assert auditor(run, request).sites == consortium.SEVEN


def test_moments_that_no_rows_have_are_refused(run: Path, trained: tuple[Path, GlobalModel]) -> None:
    request = asked(run, trained[1])
    forget(run)
    charter = consortium.charter(CONFIG, run)
    assert charter is not None
    keys = keyring.load(consortium.key_folder(run, "ash"), "ash")
    about = MomentsRequest(request.plan_sha256, request.run, request.model_sha256, {}, trained[1].scaler, request.today)
    good = moments(*linear(0, 30))
    for wrong in (
        dataclasses.replace(good, features=good.features * 50),
        dataclasses.replace(good, products=good.products * 50),
        dataclasses.replace(good, square=-1e6),
        dataclasses.replace(good, n=240 * 50),
        moments(np.ones((30, 3)), np.ones(30)),
    ):
        lie = settlement.seal(about, keys, charter, wrong, good)
        found = auditor(run, dataclasses.replace(request, parts=(lie, *request.parts[1:])))
        assert found.excluded["ash"].startswith("bad_moments") and len(found.sites) == 6
        forget(run)


def test_one_settlement_per_model_and_one_release_per_site(run: Path, trained: tuple[Path, GlobalModel]) -> None:
    request = asked(run, trained[1])
    assert wire.encode(auditor(run, request)) == wire.encode(auditor(run, request))
    with pytest.raises(ProtocolError, match="second_settlement"):
        auditor(run, dataclasses.replace(request, parts=request.parts[1:]))
    moved = {k: v + 1e-3 for k, v in trained[1].weights.items()}
    other = wire.weights_digest(moved, trained[1].scaler)
    again = MomentsRequest(PLAN.sha256, nonce(run), other, moved, trained[1].scaler, consortium.TODAY)
    with pytest.raises(ProtocolError, match="second_settlement"):
        consortium.worker("ash", CONFIG, run).handle(wire.encode(again))


def test_a_site_refuses_a_model_that_is_not_the_one_named(run: Path, trained: tuple[Path, GlobalModel]) -> None:
    request = MomentsRequest(PLAN.sha256, nonce(run), "0" * 64, trained[1].weights, trained[1].scaler, consortium.TODAY)
    with pytest.raises(PlanRefused, match="not the one"):
        consortium.worker("ash", CONFIG, run).handle(wire.encode(request))


@pytest.mark.parametrize("mode", ["none", "masking"])
def test_without_an_auditor_nothing_is_settled(mode: str) -> None:
    plan = Plan.of(config(security={"mode": mode}))
    with pytest.raises(PlanRefused, match="Auditor") as error:
        settlement.refuse(plan)
    assert error.value.fix


def test_four_sites_are_not_settled() -> None:
    whole = Plan.of(consortium.config(consortium.SEVEN, security={"mode": "trigram"}, quorum=5))
    four = object.__new__(Plan)  # no plan of four encrypts; whoever hands one in is refused here too
    four.__dict__.update({**whole.__dict__, "roster": whole.roster[:4]})
    with pytest.raises(PlanRefused, match="so few"):
        settlement.refuse(four)


# --- going on ----------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    pass


@pytest.mark.parametrize(("party", "after"), [("ash", False), ("gorse", True), ("auditor", False), ("auditor", True)])
def test_a_crash_anywhere_changes_no_number(run: Path, trained: tuple[Path, GlobalModel], party: str, after: bool) -> None:
    seen: list[Any] = []

    def crashing(handle: Handler) -> Handler:
        def answer(data: bytes) -> bytes:
            if after:
                seen.append(wire.decode(handle(data), object))
            raise Crash

        return answer

    with pytest.raises(Crash):
        settle(run, trained[1], {party: crashing})
    found = settle(run, trained[1], today="2026-01-02")  # asked again a day later
    if after and party == "auditor":
        assert [row["share"] for row in found["sites"].values()] == list(seen[0].shares)
    assert settle(run, trained[1], dict.fromkeys((*consortium.SEVEN, "auditor"), crashing)) == found  # nobody is asked


def test_a_site_that_stays_away_is_named_and_the_others_are_settled(run: Path, trained: tuple[Path, GlobalModel]) -> None:
    def broken(_: Handler) -> Handler:
        def answer(data: bytes) -> bytes:
            raise OSError("away")

        return answer

    with pytest.raises(RoundFailed, match="4 sites gave moments"):
        settle(run, trained[1], dict.fromkeys(("ash", "birch", "cedar"), broken))
    found = settle(run, trained[1], {"ash": broken})
    assert set(found["missing"]) == {"ash"} and set(found["sites"]) == set(consortium.SEVEN) - {"ash"}


def test_an_answer_that_was_lost_on_the_way_is_given_again(run: Path, trained: tuple[Path, GlobalModel]) -> None:
    """Also where a site stayed away the first time: the Auditor would refuse another set of sites."""

    def broken(handle: Handler, *, after: bool) -> Handler:
        def answer(data: bytes) -> bytes:
            if after:
                handle(data)
            raise OSError("away")

        return answer

    with pytest.raises(RoundFailed, match="auditor"):
        settle(run, trained[1], {"ash": lambda h: broken(h, after=False), "auditor": lambda h: broken(h, after=True)})
    assert set(settle(run, trained[1])["missing"]) == {"ash"}


def test_under_ckks_the_key_holder_settles(tmp_path: Path) -> None:
    settings = config(security={"mode": "ckks", "clip": 5.0}, rounds=1)
    plan = Plan.of(settings)
    _, model = consortium.run(settings, tmp_path)
    charter = consortium.charter(settings, tmp_path)
    assert model is not None and charter is not None
    engine = InProcessEngine(consortium.handlers(settings, tmp_path))
    found = settlement.settle(engine, plan, charter, model, rows(tmp_path), nonce(tmp_path), consortium.TODAY, tmp_path / "run")
    assert len(found["sites"]) == 7 and found["held_out_gain"] > 0


@pytest.mark.slow
def test_the_command_settles_the_latest_run_of_a_consortium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    companies = {
        "foundry": ("Al", "Ni"),
        "forge": ("Ti", "Cr"),
        "mill": ("Cu", "Fe"),
        "smelter": ("Co", "Mn"),
        "works": ("Al", "Fe"),
    }
    monkeypatch.setattr(small, "COMPANIES", companies)
    path = small.build(
        tmp_path / "c",
        rounds=1,
        quorum=5,
        deduplicate=False,
        security={"mode": "trigram"},
        contribution={"settle_epsilon": 50.0},
    )
    opened = pipeline.open_run(path, home=tmp_path / "home")
    for site in companies:
        pipeline.prepare_site(opened, site)
    words = ["settle", str(path), "--home", str(tmp_path / "home"), "--json"]
    with pytest.raises(StateError):
        pipeline.settle(opened)  # nothing was trained yet
    assert len(list(pipeline.train(opened))) == 1
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found["sites"]) == set(companies) and found["epsilon"] == 50.0
    assert json.loads(CliRunner().invoke(app, words).stdout) == found
    assert "forge" in CliRunner().invoke(app, words[:-1]).stdout


# --- one organisation, several sites -----------------------------------------------------------------------------------


def owned(**organisations: str) -> Any:
    """The consortium with other owners of some sites; a plan does not name organisations, so the run stays the same."""
    members = [m.model_copy(update={"organisation": organisations.get(m.site, m.organisation)}) for m in CONFIG.members]
    return CONFIG.model_copy(update={"members": tuple(members)})


def trained_and_settled(settings: Any, folder: Path) -> tuple[Any, Any]:
    """A run under a charter with these organisations, settled; and the charter."""
    _, model = consortium.run(settings, folder, data=tables())
    charter = consortium.charter(settings, folder)
    assert charter is not None and model is not None
    engine = InProcessEngine(consortium.handlers(settings, folder, data=tables()))
    found = settlement.settle(
        engine, PLAN, charter, model, rows(folder), nonce(folder), consortium.TODAY, folder / "run"
    )  # fmt: skip
    return found, charter


def test_sites_of_one_organisation_are_one_player(tmp_path: Path) -> None:
    found, charter = trained_and_settled(owned(gorse="Ash"), tmp_path)
    assert found["one_player"] == [["ash", "gorse"]]
    ash, gorse = (found["sites"][s] for s in ("ash", "gorse"))
    # gorse's labels are shuffled, and yet it gets as much a row as ash: the two are one
    assert gorse["share"] / rows(tmp_path)["gorse"] == pytest.approx(ash["share"] / rows(tmp_path)["ash"])
    assert sum(row["share"] for row in found["sites"].values()) == pytest.approx(found["held_out_gain"], abs=1e-12)
    settlement.verify(found, PLAN, charter, consortium.TODAY)
    for wrong in ([["ash", "birch"]], []):
        with pytest.raises(ProtocolError, match="one player"):
            settlement.verify({**found, "one_player": wrong}, PLAN, charter, consortium.TODAY)


def test_sites_of_fewer_than_five_organisations_are_not_settled(tmp_path: Path) -> None:
    with pytest.raises(RoundFailed, match="4 organisations"):
        trained_and_settled(owned(birch="Ash", elm="Ash", gorse="Ash"), tmp_path)


def test_an_organisation_that_divides_its_rows_gains_nothing_but_a_draw_of_noise() -> None:
    """Without noise nothing at all: its player, its part of the examination and the ridge's part of rows are those of one site."""
    data = [linear(i, 400) for i in range(6)]
    whole = [moments(*d) for d in data]
    plain = settlement.settle_moments(PLAN, whole, whole, "m")[0]
    phi, y = data[5]
    pieces = [*whole[:5], moments(phi[:100], y[:100]), moments(phi[100:], y[100:])]
    owners = [[0], [1], [2], [3], [4], [5, 6]]
    found = settlement.settle_moments(PLAN, pieces, pieces, "m", owners)[0]
    # the ridge still covers seven sites' noise instead of six: with hardly any noise, hardly a difference
    assert found[:5] == pytest.approx(plain[:5], rel=2e-3)
    assert found[5:].sum() == pytest.approx(plain[5], rel=2e-3)
    apart = settlement.settle_moments(PLAN, pieces, pieces, "m")[0]
    assert apart[5:].sum() > 1.02 * plain[5]  # as two players it gains: two parts of seven in the examination and in the game


def test_the_ridge_follows_the_median_of_what_players_state() -> None:
    plan, few = PLAN, [100, 100, 100, 100, 100]
    assert settlement.penalty(plan, 5, [*few[:4], 10**9]) == settlement.penalty(plan, 5, few)
    more = settlement.penalty(plan, 5, [200] * 5) - settlement.penalty(plan, 5, few)
    assert more == pytest.approx(100 * settlement.ROWS_SHARE)
    doubled = Plan.of(config(contribution={**QUIET, "ridge": 2.0}))
    assert settlement.penalty(doubled, 5, few) == pytest.approx(2 * settlement.penalty(plan, 5, few))


def test_errors_of_one_players_sites_are_parts_of_one_error() -> None:
    """Two halves of an error of 0.2 count as 0.2 and not as 0.14."""
    assert contribution.credited([0.2, 0.1, 0.1], [0.0, 0.1, 0.11], 1000) != (None,) * 3
    assert contribution.credited([0.2, 0.1, 0.1], [0.0, 0.1, 0.11], 1000, [[1, 2]]) == (None,) * 3
