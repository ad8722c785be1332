"""Laws of leaving duplicates out, through the real coordinator, workers, engine and keys."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from consortium import SITES, config, run, setup, table, worker

from fedmat import wire
from fedmat.data import matching
from fedmat.data.contract import record_type
from fedmat.domain import Answer, MatchRequest, Offer, RemoveRequest, Request
from fedmat.errors import FedmatError, SiteRefused
from fedmat.features.table import TEST, TRAIN, FeatureTable
from fedmat.federation.plan import Plan
from fedmat.federation.site import MatchingKeys

THREE = SITES[:3]
SECRET, OTHER = bytes(range(7, 39)), bytes(32)
OF = {"ash": "P", "birch": "S", "cedar": "Br"}
TWICE, LEAK, OWN_LEAK = 6, 9, 12  # training rows: of ash and birch both, of ash in cedar's test, of birch in its own


def config_(**plan: object):  # type: ignore[no-untyped-def]
    return config(THREE, deduplicate=True, rounds=3, **plan)


def records(site: str) -> pd.DataFrame:
    """A record behind every row of ``table(site)``: one formula per group, with planted repeats."""
    one = table(site)
    formula = np.array([f"Li{n + 1}{OF[site]}" for n in one.group], dtype=object)
    kelvin = 300.0 + 10.0 * (np.arange(len(one)) % 3)
    value = 10.0 ** -(3.0 + np.arange(len(one)) % 7)
    if site in ("ash", "birch"):
        formula[TWICE], kelvin[TWICE], value[TWICE] = "Li2OCl7", 333.0, 2e-5
    if site == "ash":
        formula[LEAK] = "LiBr"  # cedar's group 0, which it tests on
    if site == "birch":
        formula[OWN_LEAK] = "LiS"
    return pd.DataFrame({"formula": formula, "temperature_k": kelvin, "conductivity_s_cm": value, "doi": "10.1000/only"})


def keys(secrets: dict[str, bytes] | None = None) -> dict[str, MatchingKeys]:
    out = {}
    for site in THREE:
        secret = (secrets or {}).get(site, SECRET)
        made = matching.keys(records(site), record_type("solid_electrolyte"), "conductivity_s_cm", secret, "test")
        out[site] = MatchingKeys(matching.fingerprint(secret, "test"), made)
    return out


def without(site: str) -> FeatureTable:
    """The rows a site should work with, taken out by hand: ash keeps what it shares, by name among equals."""
    rows = {"ash": [LEAK], "birch": [TWICE, OWN_LEAK]}.get(site, [])
    return table(site).rows(~np.isin(np.arange(60), rows))


class Ear:
    """Keeps what is said to and by the sites."""

    def __init__(self) -> None:
        self.said: list[tuple[bytes, bytes]] = []

    def __call__(self, handle):  # type: ignore[no-untyped-def]
        def handler(data: bytes) -> bytes:
            reply = handle(data)
            self.said.append((data, reply))
            return reply

        return handler

    def asked(self) -> list[type]:
        return [type(wire.decode(data, Request)) for data, _ in self.said]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def matched(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    folder, ear = tmp_path_factory.mktemp("matched"), Ear()
    _, model = run(config_(), folder, dict.fromkeys(THREE, ear), keys=keys())
    return folder, model, ear


def test_the_planted_rows_are_training_rows() -> None:
    for site, row in (("ash", TWICE), ("birch", TWICE), ("ash", LEAK), ("birch", OWN_LEAK)):
        assert table(site).split[row] == TRAIN
    assert table("cedar").split[0] == table("birch").split[0] == TEST


def test_what_two_sites_hold_is_trained_on_once_and_what_anyone_tests_on_never(matched, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The run equals, bit for bit, one over tables from which the rows were taken out by hand."""
    folder, model, _ = matched
    by_hand = run(config(THREE, deduplicate=False, rounds=3), tmp_path, data={s: without(s) for s in THREE})[1]
    assert wire.weights_digest(model.weights, model.scaler) == wire.weights_digest(by_hand.weights, by_hand.scaler)
    attested = {s: a["n_train"] for s, a in setup(folder)["attestations"].items()}
    assert attested == {s: int((without(s).split == TRAIN).sum()) for s in THREE}


def test_the_runs_folder_says_how_much_was_shared_and_left_out(matched) -> None:  # type: ignore[no-untyped-def]
    folder, *_ = matched
    found = json.loads((folder / "run/matching.json").read_text())
    none = {"leak_material": 0, "leak_source": 0, "duplicate": 0}
    assert found["removed"] == {
        "ash": {**none, "leak_material": 1}, "birch": {**none, "leak_material": 1, "duplicate": 1}, "cedar": none,
    }  # fmt: skip
    assert found["shared"] == [{"sites": ["ash", "birch"], "measurements": 1}]
    assert found["leaks"] == [
        {"training": "ash", "test": "cedar", "materials": 1}, {"training": "birch", "test": "birch", "materials": 1},
    ]  # fmt: skip


def test_what_crosses_the_wire_are_keys_and_counts_only(matched) -> None:  # type: ignore[no-untyped-def]
    _, _, ear = matched
    offers = [wire.decode(r, Offer) for d, r in ear.said if b"MatchRequest" in d]
    assert sorted(o.site for o in offers) == list(THREE)
    for offer in offers:
        shown = [*offer.train.values(), *offer.test.values()]
        assert all(a.dtype == np.uint64 and (np.diff(a.astype(object)) > 0).all() for a in shown)
        assert set(offer.train) == {"material", "measurement", "source"} and set(offer.test) == {"material", "source"}
        assert {f.name for f in dataclasses.fields(offer)} == {"site", "fingerprint", "n_train", "n_test", "train", "test"}
    told = [wire.decode(d, RemoveRequest) for d, _ in ear.said if b"RemoveRequest" in d]
    own = {o.site: o for o in offers}
    for request in told:  # a site is told of its own keys, so it learns nothing of what others hold beside them
        r = request.removal
        assert np.isin(r.material, own[r.site].train["material"]).all()
        assert np.isin(r.measurement, own[r.site].train["measurement"]).all()
    everything = b"".join(d + r for d, r in ear.said)
    for word in (b"Li2OCl7", b"10.1000", SECRET, SECRET.hex().encode()):
        assert word not in everything


def test_a_run_that_goes_on_asks_nobody_again_and_drops_the_same_rows(matched, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run(config_(), tmp_path, keys=keys(), stop=1)
    ear = Ear()
    _, model = run(config_(), tmp_path, dict.fromkeys(THREE, ear), keys=keys())
    assert wire.encode(model) == wire.encode(matched[1])
    assert MatchRequest not in ear.asked() and RemoveRequest not in ear.asked()


def test_a_site_with_another_secret_stops_the_run_and_the_way_out_is_named(tmp_path: Path) -> None:
    with pytest.raises(SiteRefused, match="different matching secrets") as error:
        run(config_(), tmp_path, keys=keys({"cedar": OTHER}))
    assert "fedmat site secret" in str(error.value.fix)
    assert SECRET.hex() not in str(error.value) and OTHER.hex() not in str(error.value)


def test_without_deduplication_nobody_is_asked_and_every_row_trains(tmp_path: Path) -> None:
    ear = Ear()
    run(config(THREE, deduplicate=False, rounds=1), tmp_path, dict.fromkeys(THREE, ear), keys=keys())
    assert MatchRequest not in ear.asked() and RemoveRequest not in ear.asked()
    attested = {s: a["n_train"] for s, a in setup(tmp_path)["attestations"].items()}
    assert attested == {s: int((table(s).split == TRAIN).sum()) for s in THREE}
    assert json.loads((tmp_path / "run/matching.json").read_text())["removed"] == {}


def _refuses(kind: bytes):  # type: ignore[no-untyped-def]
    def wrap(handle):  # type: ignore[no-untyped-def]
        def handler(data: bytes) -> bytes:
            if kind in data:
                raise FedmatError("not today")
            return handle(data)

        return handler

    return wrap


def _offers(change):  # type: ignore[no-untyped-def]
    def wrap(handle):  # type: ignore[no-untyped-def]
        def handler(data: bytes) -> bytes:
            reply = handle(data)
            return wire.encode(change(wire.decode(reply, Offer))) if b"MatchRequest" in data else reply

        return handler

    return wrap


def _unsorted(offer: Offer) -> Offer:
    return dataclasses.replace(offer, train={**offer.train, "material": offer.train["material"][::-1].copy()})


@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (_refuses(b"MatchRequest"), "refused"),
        (_refuses(b"RemoveRequest"), "refused"),
        (_offers(_unsorted), "malformed"),
        (_offers(lambda o: dataclasses.replace(o, n_train=1)), "malformed"),
        (_offers(lambda o: dataclasses.replace(o, site="ash")), "malformed"),
    ],
    ids=["no offer", "no confirmation", "keys out of order", "more keys than rows", "another's name"],
)
def test_a_site_that_does_not_match_well_takes_no_part_and_costs_nobody_else_the_run(wrap, reason: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    reports, _ = run(config_(), tmp_path, {"cedar": wrap}, keys=keys())
    assert reports[-1].accepted == ("ash", "birch")
    assert [(f["site"], f["reason"]) for f in setup(tmp_path)["failures"]] == [("cedar", reason)]
    assert list(setup(tmp_path)["attestations"]) == ["ash", "birch"]


def test_a_site_without_keys_says_what_to_do(tmp_path: Path) -> None:
    request = MatchRequest(Plan.of(config_()).sha256)
    with pytest.raises(SiteRefused, match="no matching keys") as error:
        worker("ash", config_(), tmp_path).handle(wire.encode(request))
    assert "deduplicate: false" in str(error.value.fix)


def test_a_site_left_with_too_few_rows_refuses_and_is_itself_again_afterwards(tmp_path: Path) -> None:
    """Another site's test rows, invented or not, cannot shut a site out beyond the run they are in."""
    settings, honest = config_(), keys()
    everything = honest["ash"].keys["material"]
    planted = {k: v.copy() for k, v in honest["cedar"].keys.items()}
    at_test = np.flatnonzero(table("cedar").split == TEST)
    planted["material"][at_test] = np.unique(everything)[: len(at_test)]
    reports, _ = run(settings, tmp_path, keys={**honest, "cedar": MatchingKeys(honest["cedar"].fingerprint, planted)})
    assert reports[-1].accepted == ("birch", "cedar")
    (failure,) = setup(tmp_path)["failures"]
    assert failure["site"] == "ash" and "training records" in failure["detail"]
    again = worker("ash", settings, tmp_path, keys=honest["ash"])
    assert int((again.table.split == TRAIN).sum()) == int((table("ash").split == TRAIN).sum())


def test_a_removal_for_another_site_is_refused(tmp_path: Path) -> None:
    none = np.zeros(0, dtype=np.uint64)
    from fedmat.domain import Removal

    request = RemoveRequest(Plan.of(config_()).sha256, Removal("birch", none, none, none))
    with pytest.raises(FedmatError, match="not for this site's keys"):
        worker("ash", config_(), tmp_path, keys=keys()["ash"]).handle(wire.encode(request))


def test_every_answer_has_its_place_in_the_list_of_messages() -> None:
    from fedmat.federation.engine import _EXPECTED

    answers = {a for given in _EXPECTED.values() for a in getattr(given, "__args__", (given,))}
    assert set(Request.__args__) <= set(_EXPECTED) and set(Answer.__args__) <= answers
    assert {k.__module__ for k in (set(_EXPECTED) - set(Request.__args__)) | (answers - set(Answer.__args__))} == {
        "fedmat.envelopes"
    }
    assert set(_EXPECTED) | answers <= set(wire._TYPES.values())
