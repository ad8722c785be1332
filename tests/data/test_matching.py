"""Laws of private matching: equal things get equal keys, nobody reads one, and each duplicate stays at one site."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat.assurance import duplicates
from fedmat.assurance.duplicates import Offer, find, offer
from fedmat.data import matching
from fedmat.data.contract import RECORD_TYPES, record_type
from fedmat.data.matching import Rounding, keys, load_or_create_secret
from fedmat.errors import ConfigError, DataError, SiteRefused, StateError, WireError

SOLID = record_type("solid_electrolyte")
TARGET = "conductivity_s_cm"
SECRET, OTHER = bytes(range(32)), bytes(32)
DATA = Path(os.environ.get("FEDMAT_REFERENCE_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def records(*rows: tuple[str, float, float, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["formula", "temperature_k", TARGET, "doi"])


def solid(
    *rows: tuple[str, float, float, str], scope: str = "test", secret: bytes = SECRET, **rounding: float
) -> dict[str, np.ndarray]:
    return keys(records(*rows), SOLID, TARGET, secret, scope, Rounding(**{"decades": 0.1, **rounding}))  # type: ignore[arg-type]


# --- keys ----------------------------------------------------------------------------------------------------------


def test_one_measurement_told_in_two_ways_has_one_key() -> None:
    k = solid(
        ("Li7La3Zr2O12", 298.15, 3.1e-4, "10.1002/ANIE.200701144"),
        ("Zr4La6Li14O24", 298.0, 3.05e-4, "https://doi.org/10.1002/anie.200701144."),
    )
    for kind in matching.KINDS:
        assert k[kind].dtype == np.uint64 and k[kind][0] == k[kind][1] != 0


def test_another_temperature_or_value_is_another_measurement_of_the_same_material() -> None:
    k = solid(("Li2O", 298.15, 1e-8, ""), ("Li2O", 320.0, 1e-8, ""), ("Li2O", 298.15, 1e-6, ""), ("Li2S", 298.15, 1e-8, ""))
    assert len(set(k["material"][:3])) == 1 and k["material"][3] != k["material"][0]
    assert len(set(k["measurement"])) == 4


def test_what_is_absent_has_no_key_and_matches_nothing() -> None:
    k = solid(("Li2O", 298.15, float("nan"), "personal communication"), ("", 298.15, 1e-8, ""))
    assert k["measurement"].tolist() == [0, 0] and k["source"].tolist() == [0, 0]
    assert k["material"][0] != 0 and k["material"][1] == 0
    same = offer("ash", "f", k, np.array([True, False]))
    assert all(len(v) == 0 for v in same.train.values())


def test_keys_change_with_secret_scope_and_kind() -> None:
    row = ("Li2O", 298.15, 1e-8, "10.1000/x")
    variants = [solid(row), solid(row, secret=OTHER), solid(row, scope="other")]
    assert len({int(k[kind][0]) for k in variants for kind in matching.KINDS}) == 9
    prints = {matching.fingerprint(SECRET, "a"), matching.fingerprint(OTHER, "a"), matching.fingerprint(SECRET, "b")}
    assert len(prints) == 3


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["Li2O", "LiCl", "Li3PS4"]), st.floats(250, 400), st.floats(1e-9, 1e-2)), max_size=12),
    st.randoms(),
)
def test_a_key_depends_on_its_row_alone(rows: list[tuple[str, float, float]], random) -> None:
    full = [(*r, "10.1000/a") for r in rows]
    order = list(range(len(rows)))
    random.shuffle(order)
    straight, shuffled = solid(*full), solid(*(full[i] for i in order))
    for kind in matching.KINDS:
        assert np.array_equal(straight[kind][order], shuffled[kind])


def test_every_record_type_has_keys_and_labels_are_no_conditions() -> None:
    wanted = {
        "solid_electrolyte": ["temperature_k"],
        "liquid_electrolyte": ["concentration", "concentration_basis", "temperature_k"],
        "polymer_electrolyte": ["salt_smiles", "molality", "temperature_k"],
        "alloy": ["test_type", "temperature_k"],
        "battery_cell": ["c_rate", "temperature_k"],
    }
    for name, rt in RECORD_TYPES.items():
        if name in wanted:
            assert [f.name for f in matching.conditions(rt)] == wanted[name]
        row = {f.name: 300.0 if f.kind == "number" else (f.categories or ("Li2O",))[0] for f in rt.fields}
        target = next(f.name for f in rt.fields if f.measured)
        k = keys(pd.DataFrame([row, row | {"source": "b"}]), rt, target, SECRET, "s")
        assert k["measurement"][0] == k["measurement"][1] != 0


def test_a_name_that_a_site_gave_is_no_material() -> None:
    if "cell_ageing" not in RECORD_TYPES:
        pytest.skip("no record type is grouped by a name alone")
    rt = record_type("cell_ageing")
    row = {f.name: 0.5 if f.kind == "number" else "cell 1" for f in rt.fields} | {"cycle_life": 800.0}
    k = keys(pd.DataFrame([row, row | {"cell": "b3c7"}, row | {"dq_mean_ah": 0.6}]), rt, "cycle_life", SECRET, "s")
    assert k["material"].tolist() == [0, 0, 0]
    assert k["measurement"][0] == k["measurement"][1] != k["measurement"][2]


def test_several_targets_are_all_in_the_key_and_one_is_enough() -> None:
    rt = record_type("alloy")
    row = {f.name: "" for f in rt.fields} | {"formula": "FeCr", "temperature_k": 298.0, "hardness_hv": 512.0}
    both = row | {"yield_strength_mpa": 1200.0}
    df = pd.DataFrame([row | {"yield_strength_mpa": np.nan}, both, both | {"hardness_hv": 514.0}])
    k = keys(df, rt, ["hardness_hv", "yield_strength_mpa"], SECRET, "s")["measurement"]
    assert k[0] != 0 and k[1] == k[2] != k[0]
    alone = keys(df, rt, "hardness_hv", SECRET, "s")["measurement"]
    assert alone[0] == alone[1] == alone[2] != 0


def test_a_liquids_key_has_its_salt_mixture_amount_and_temperature() -> None:
    rt = record_type("liquid_electrolyte")
    row = {
        "salt": "LiPF6", "concentration": 1.0, "concentration_basis": "mol/kg", "solvents": '{"EC":0.5,"EMC":0.5}',
        "solvent_basis": "w", "temperature_k": 298.15, TARGET: 9.04e-3, "doi": "",
    }  # fmt: skip
    changes = [{}, {TARGET: 8.96e-3}, {"temperature_k": 298.0}, {"concentration": 1.0004}]
    other = [
        {"concentration": 1.1},
        {"concentration_basis": "mol/l"},
        {"temperature_k": 303.15},
        {TARGET: 9.2e-3},
        {"salt": "LiBF4"},
    ]
    k = keys(pd.DataFrame([row | c for c in [*changes, *other]]), rt, TARGET, SECRET, "s")["measurement"]
    assert len(set(k[: len(changes)])) == 1 and len(set(k)) == 1 + len(other)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("10.1039/C3DT52917G", "10.1039/c3dt52917g"),
        ("https://dx.doi.org/10.1016/j.ssi.2013.04.002;", "10.1016/j.ssi.2013.04.002"),
        (" doi:10.1021/IC030208W. ", "10.1021/ic030208w"),
        ("", ""),
        ("unpublished", ""),
    ],
)
def test_a_doi_has_one_form(text: str, wanted: str) -> None:
    assert matching.doi(text) == wanted


def test_wrong_use_is_refused_without_values() -> None:
    with pytest.raises(ConfigError, match="32 bytes"):
        solid(("Li2O", 298.15, 1e-8, ""), secret=b"short")
    with pytest.raises(ConfigError, match="scope"):
        solid(("Li2O", 298.15, 1e-8, ""), scope="")
    with pytest.raises(ConfigError, match="no number field"):
        keys(records(("Li2O", 298.15, 1e-8, "")), SOLID, "formula", SECRET, "s")
    with pytest.raises(DataError, match="lack temperature_k"):
        keys(records(("Li2O", 298.15, 1e-8, "")).drop(columns="temperature_k"), SOLID, TARGET, SECRET, "s")


# --- the secret ----------------------------------------------------------------------------------------------------


def test_a_secret_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "matching.key"
    with ThreadPoolExecutor(8) as pool:
        drawn = set(pool.map(lambda _: load_or_create_secret(path), range(16)))
    assert len(drawn) == 1 and len(drawn.pop()) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["matching.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666, 0o611])
def test_a_secret_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "matching.key"
    load_or_create_secret(path)
    path.chmod(mode)
    with pytest.raises(StateError, match=f"{mode:04o}"):
        load_or_create_secret(path)


@pytest.mark.parametrize("content", [b"", b"ab" * 31, b"zz" * 32, b"ab" * 33, os.urandom(32)])
def test_a_damaged_secret_is_refused_and_not_quoted(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "matching.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(StateError, match="not a matching secret") as caught:
        load_or_create_secret(path)
    assert "abab" not in str(caught.value) and path.read_bytes() == content


def test_a_link_or_a_folder_is_no_secret(tmp_path: Path) -> None:
    load_or_create_secret(tmp_path / "real.key")
    (tmp_path / "link.key").symlink_to(tmp_path / "real.key")
    (tmp_path / "dangling.key").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder.key").mkdir(mode=0o700)
    for name in ("link", "dangling", "folder"):
        with pytest.raises(StateError):
            load_or_create_secret(tmp_path / f"{name}.key")
    os.mkfifo(tmp_path / "pipe.key", 0o600)
    with pytest.raises(StateError, match="no plain file"):
        load_or_create_secret(tmp_path / "pipe.key")


# --- finding and leaving out ---------------------------------------------------------------------------------------


def site(name: str, measurement: list[int], material: list[int], test: list[bool], source: list[int] | None = None):
    k = {
        "measurement": np.array(measurement, dtype=np.uint64),
        "material": np.array(material, dtype=np.uint64),
        "source": np.array(source or [0] * len(test), dtype=np.uint64),
    }
    mask = np.array(test, dtype=bool)
    return k, mask, offer(name, "f", k, mask)


def test_a_training_row_of_any_sites_test_material_goes_its_own_included() -> None:
    a, a_test, a_offer = site("ash", [1, 2, 3], [10, 10, 30], [True, False, False])  # a torn group of its own
    b, b_test, b_offer = site("birch", [4, 5], [10, 50], [False, False])
    found = find({"ash": a_offer, "birch": b_offer})
    keep, counts = duplicates.apply(found.removals["ash"], a, a_test)
    assert keep.tolist() == [True, False, True] and counts == {"leak_material": 1, "leak_source": 0, "duplicate": 0}
    keep, counts = duplicates.apply(found.removals["birch"], b, b_test)
    assert keep.tolist() == [False, True] and counts["leak_material"] == 1
    assert found.leaks == {("ash", "ash"): 1, ("ash", "birch"): 0, ("birch", "ash"): 1, ("birch", "birch"): 0}


def test_a_publication_is_a_leak_only_where_asked() -> None:
    _, _, tester = site("ash", [1, 2], [10, 11], [True, False], source=[7, 0])
    k, mask, learner = site("birch", [4, 5, 6], [40, 50, 60], [False] * 3, source=[7, 0, 8])
    for asked, gone in ((False, 0), (True, 1)):
        removal = find({"ash": tester, "birch": learner}, sources=asked).removals["birch"]
        assert duplicates.apply(removal, k, mask)[1]["leak_source"] == gone


def test_a_shared_measurement_stays_at_the_smaller_site_and_by_name_among_equals() -> None:
    sites = {
        "ash": site("ash", [1, 2, 3, 3], [10, 20, 30, 30], [False] * 4),
        "birch": site("birch", [1, 2], [10, 20], [False] * 2),
        "cedar": site("cedar", [2, 5], [20, 50], [False] * 2),
    }
    found = find({name: s[2] for name, s in sites.items()})
    kept = {name: duplicates.apply(found.removals[name], s[0], s[1])[0].tolist() for name, s in sites.items()}
    assert kept == {"ash": [False, False, True, True], "birch": [True, True], "cedar": [False, True]}
    assert found.shared == {("ash", "birch"): 2, ("ash", "cedar"): 1, ("birch", "cedar"): 1}


KEYS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3), st.booleans()), min_size=1, max_size=25)


@settings(max_examples=200)
@given(st.lists(KEYS, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_afterwards_no_leak_and_no_shared_measurement_is_left_and_none_is_lost(sites, random) -> None:
    built = {
        f"s{i}": site(f"s{i}", [m * 4 + v for m, v, _ in rows], [m for m, _, _ in rows], [t for *_, t in rows])
        for i, rows in enumerate(sites)
    }
    names = list(built)
    found = find({n: built[n][2] for n in names})
    random.shuffle(names)
    again = find({n: built[n][2] for n in names})
    assert all(np.array_equal(found.removals[n].measurement, again.removals[n].measurement) for n in names)
    tested = {int(m) for k, test, _ in built.values() for m in k["material"][test]}
    left: dict[int, set[str]] = {}
    for name, (k, test, _) in built.items():
        keep, counts = duplicates.apply(found.removals[name], k, test)
        assert keep[test].all() and int((~keep).sum()) == sum(counts.values())
        assert not tested & {int(m) for m in k["material"][keep & ~test]}
        for m in k["measurement"][keep & ~test]:
            left.setdefault(int(m), set()).add(name)
    assert all(len(holders) == 1 for holders in left.values())
    before = {
        int(v)
        for k, test, _ in built.values()
        for v, m in zip(k["measurement"][~test], k["material"][~test])
        if int(m) not in tested
    }
    assert set(left) == before


def test_sites_with_different_secrets_are_told_so() -> None:
    k, mask, _ = site("ash", [1], [10], [False])
    offers = {n: offer(n, matching.fingerprint(s, "x"), k, mask) for n, s in (("ash", SECRET), ("birch", OTHER))}
    with pytest.raises(SiteRefused, match="different matching secrets"):
        find(offers)


def test_an_offer_that_is_none_is_refused() -> None:
    _, _, good = site("ash", [1, 2], [10, 20], [False, True])
    n = np.array

    def variant(**train: np.ndarray) -> Offer:
        return Offer("ash", "f", good.n_train, good.n_test, good.train | train, good.test)

    bad = [
        Offer("birch", "f", 1, 1, good.train, good.test),
        Offer("ash", "f", 1, 1, {}, good.test),
        Offer("ash", "f", 1, 0, good.train, good.test),
        variant(material=n([2, 1], dtype=np.uint64)),
        variant(material=n([0], dtype=np.uint64)),
        variant(material=n([1, 2], dtype=np.uint64)),
        variant(material=n([1.0])),
        variant(material=n([[1]], dtype=np.uint64)),
    ]
    for wrong in bad:
        with pytest.raises(WireError):
            find({"ash": wrong})
    assert find({"ash": good}).shared == {} and find({}).removals == {}


def test_an_offer_tells_neither_order_nor_repeats_nor_text() -> None:
    k = solid(("Li2O", 298.15, 1e-8, "10.1000/a"), ("LiCl", 298.15, 1e-8, ""), ("Li2O", 298.15, 1e-8, "10.1000/a"))
    shown = offer("ash", "f", k, np.zeros(3, dtype=bool))
    assert len(shown.train["material"]) == 2 and (np.diff(shown.train["material"].astype(object)) > 0).all()
    assert all(v.dtype == np.uint64 for v in (*shown.train.values(), *shown.test.values()))


# --- two published databases as two companies ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """LiIon, OBELiX and the study's own verdict on LiIon's rows (``consortia/C1_solid_electrolyte.csv``)."""
    files = [DATA / "liion_liverpool/LiIonDatabase_clean.csv", DATA / "obelix", DATA / "consortia/C1_solid_electrolyte.csv"]
    if not all(f.exists() for f in files):
        pytest.skip("the published databases are not here")
    liion = pd.read_csv(files[0])
    liion = pd.DataFrame(
        {
            "formula": liion["composition_clean"], "temperature_k": liion["temperature"] + 273.15,  # from Celsius
            TARGET: liion["target"], "doi": liion["source"].fillna(""), "split": "train", "id": liion["ID"].astype(str),
        }
    )  # fmt: skip
    parts = [pd.read_csv(files[1] / f"{s}.csv").assign(split=s) for s in ("train", "test")]
    obelix = pd.concat(parts, ignore_index=True)
    obelix = pd.DataFrame(
        {
            "formula": obelix["Reduced Composition"], "temperature_k": 298.15,  # OBELiX states room temperature
            TARGET: obelix["Ionic conductivity (S cm-1)"].astype(str).str.lstrip("<").astype(float),  # a bound counts at the bound
            "doi": obelix["DOI"].fillna(""), "split": obelix["split"],
        }
    )  # fmt: skip
    verdict = pd.read_csv(files[2]).query("src == 'liion'").astype({"row_id": str}).reset_index(drop=True)
    assert (verdict["row_id"] == liion["id"]).all()  # LiIon has two identifiers twice: rows are matched by place
    return liion, obelix, verdict


def matched(liion: pd.DataFrame, obelix: pd.DataFrame, rounding: Rounding | None) -> tuple[np.ndarray, dict[str, int]]:
    """Reasons for which LiIon leaves rows out when OBELiX, the smaller site, keeps what both have."""
    k = {n: keys(df, SOLID, TARGET, SECRET, "c1", rounding) for n, df in (("liion", liion), ("obelix", obelix))}
    test = {n: (df["split"] == "test").to_numpy() for n, df in (("liion", liion), ("obelix", obelix))}
    mark = matching.fingerprint(SECRET, "c1")
    found = find({n: offer(n, mark, k[n], test[n]) for n in k}, sources=True)
    _, own = duplicates.apply(found.removals["obelix"], k["obelix"], test["obelix"])
    # The official split shares no formula text, but Li10.2Ge1.2P1.8S12 (train) is three times Li3.4Ge0.4P0.6S4 (test), and
    # Li10.05Ge1.05P1.95S12 three times Li3.35Ge0.35P0.65S4.
    assert own == {"leak_material": 2, "leak_source": 0, "duplicate": 0}
    keep, counts = duplicates.apply(found.removals["liion"], k["liion"], test["liion"])
    return ~keep, counts


def test_the_studys_leaks_are_found_exactly(published) -> None:
    liion, obelix, verdict = published
    gone, counts = matched(liion, obelix, None)
    leak = (verdict["split"] == "dropped_test_leak").to_numpy()
    near_rt = verdict["temperature_C"].between(15, 35).to_numpy()
    assert gone[leak].all()
    assert counts["leak_material"] + counts["leak_source"] == leak.sum() == 103
    assert (leak & near_rt).sum() == 50


@pytest.mark.parametrize(
    ("rounding", "found", "false"),
    [
        (None, 139, 0),  # as fedmat matches solids: 10 K, 0.1 decades; the 3 others lie at 15, 20 and 21 C
        (Rounding(kelvin=1.0, decades=0.1), 102, 0),
        (Rounding(kelvin=1.0), 90, 1),  # two digits: 1.58e-6 meets 1.6e-6, but 1.55e-6 does not meet 1.5e-6
        (Rounding(kelvin=1e6, decades=0.1), 142, 3),  # the study's rule: 0.1 decades and any room temperature
    ],
)
def test_the_studys_duplicates_are_found(published, rounding: Rounding | None, found: int, false: int) -> None:
    liion, obelix, verdict = published
    gone, counts = matched(liion, obelix, rounding)
    repeat, leak = ((verdict["split"] == s).to_numpy() for s in ("dropped_dup", "dropped_test_leak"))
    assert repeat.sum() == 142
    assert (gone & repeat).sum() == found
    assert (gone & ~repeat & ~leak).sum() == false
    assert counts["duplicate"] == found + false
