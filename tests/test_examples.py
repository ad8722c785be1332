"""The example consortia: they load, their data are what they say they are, and the guide beside them is true."""

from __future__ import annotations

import csv
import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from fedmat.config import (
    Column,
    MixtureColumns,
    Select,
    SiteConfig,
    Source,
    SplitColumn,
    Structures,
    load_consortium,
    load_site,
)
from fedmat.data import mapping, records, splits, units, validation
from fedmat.data.contract import RECORD_TYPES, record_type
from fedmat.features.registry import build
from fedmat.federation.plan import Plan

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
CONSORTIA = sorted(EXAMPLES.glob("*/consortium*.yaml"))
CELLS = EXAMPLES / "cells" / "consortium.yaml"
GUIDE = ROOT / "docs" / "bring-your-own-data.md"
# what a planted fault is rejected for; blanks around a formula are planted too and are none
REASON = {"blank": "missing", "n/a": "missing", "bound": "bound_not_allowed", "temperature": "not_positive",
          "porosity": "out_of_range", "formula": "bad_formula", "duplicate": "duplicate"}  # fmt: skip


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_cells", EXAMPLES / "cells" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def prepared(consortium_file: Path, into: Path) -> dict[str, pd.DataFrame]:
    """Accepted records of every site, with the side of the split in column ``side``."""
    consortium = load_consortium(consortium_file)
    out = {}
    for member in consortium.members:
        site_file = consortium_file.parent / member.file
        snapshot = records.prepare(
            load_site(site_file), site_file.parent, into / member.site, target=[t.target for t in consortium.tasks],
            admission=consortium.admission,
        )  # fmt: skip
        frame = records.load_records(into / member.site)
        frame.attrs["rejected"] = snapshot.rejected
        frame["side"] = splits.assign(frame, consortium.splits)
        out[member.site] = frame
    return out


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    return prepared(CELLS, tmp_path_factory.mktemp("cells"))


# --- every consortium --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONSORTIA, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_consortium_and_its_sites_load_and_agree(path: Path) -> None:
    consortium = load_consortium(path)
    Plan.of(consortium)  # refuses settings that exclude each other
    build(consortium.features, record_type(consortium.task.record_type), consortium.task.target)
    assert units.compatible(consortium.task.unit, record_type(consortium.task.record_type).field(consortium.task.target).unit)
    for member in consortium.members:
        site = load_site(path.parent / member.file)
        assert (site.site, site.organisation, site.record_type) == (
            member.site,
            member.organisation,
            consortium.task.record_type,
        )


def test_every_example_says_that_one_operator_holds_its_data_and_that_its_companies_are_invented() -> None:
    assert len(CONSORTIA) == 12
    for path in CONSORTIA:
        consortium = load_consortium(path)
        assert consortium.simulated
        assert all("(invented)" in m.organisation for m in consortium.members)
        assert "invented" in (path.parent / "README.md").read_text(encoding="utf-8")


def test_no_committed_file_is_large_or_names_a_machine() -> None:
    files = [p for p in EXAMPLES.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files if CELLS.parent in p.parents) < 500_000
    assert sum(p.stat().st_size for p in files) < 1_000_000
    for path in files:
        assert not re.search(rb"/(?:home|root|tmp|work)/", path.read_bytes()), path


# --- cells -------------------------------------------------------------------------------------------------------


def test_exactly_the_planted_faults_are_rejected(cells: dict[str, pd.DataFrame], generator: ModuleType) -> None:
    for company in generator.COMPANIES:
        planted: Counter[str] = Counter()
        for fault, count in company.faults.items():
            if fault != "spaces":
                planted[REASON[fault]] += count
        assert cells[company.site].attrs["rejected"] == dict(planted), company.site


def test_each_company_has_a_few_hundred_records_and_loses_a_few_percent(cells: dict[str, pd.DataFrame]) -> None:
    for frame in cells.values():
        assert 250 <= len(frame) <= 450
        assert 0.02 < sum(frame.attrs["rejected"].values()) / len(frame) < 0.08


def test_records_are_the_programme_and_nothing_else(cells: dict[str, pd.DataFrame], generator: ModuleType) -> None:
    """Every accepted record, read from the company's own units, is one of the discharges that were planned."""
    for company in generator.COMPANIES:
        names = [*generator.DESIGN, "c_rate", "temperature_k"]
        planned = np.array([[*t.design.values(), t.c_rate, t.temperature_k] for t in generator.programme(company)])
        found = cells[company.site][names].to_numpy()
        gap = np.abs(found[:, None, :] / planned[None, :, :] - 1.0).max(axis=2).min(axis=1)
        assert gap.max() < 1e-9, company.site


def test_energies_are_what_the_physics_gives(cells: dict[str, pd.DataFrame], generator: ModuleType) -> None:
    for company in generator.COMPANIES:
        for line in company.lines:
            frame = cells[company.site]
            own = frame.loc[[validation.canonical.formula(line.chemistry.formula) == f for f in frame["formula"]]]
            record = own.iloc[len(own) // 3]
            energy = generator.cell(line.chemistry).energy(record, record["c_rate"], record["temperature_k"])
            assert energy == pytest.approx(record[generator.TARGET], rel=2e-3), (company.site, line.chemistry.nickname)


def test_simulation_balances_every_cell(generator: ModuleType) -> None:
    """A full cell sits at the upper voltage limit with both electrodes inside their limits, and 1C is its capacity."""
    for chemistry in (generator.NMC811, generator.NMC532, generator.LFP, generator.LCO):
        model = generator.cell(chemistry)
        design = {"positive_thickness_um": 70.0, "positive_porosity": 0.33, "negative_porosity": 0.3,
                  "positive_particle_radius_um": 1.0, "negative_particle_radius_um": 5.0}  # fmt: skip
        design["negative_thickness_um"] = model.negative_thickness(design, 1.1)
        thicker = {**design, "positive_thickness_um": 140.0, "negative_thickness_um": 2 * design["negative_thickness_um"]}
        capacity = model.capacity(design)
        assert 5.0 < capacity < 80.0  # A h / m^2, i.e. 0.5 to 8 mA h / cm^2
        assert model.capacity(thicker) == pytest.approx(2 * capacity, rel=1e-6)


def test_no_cell_stands_on_both_sides_and_every_site_holds_some_out(cells: dict[str, pd.DataFrame]) -> None:
    for frame in cells.values():
        assert frame.groupby("group")["side"].nunique().max() == 1
        assert frame.groupby("side")["group"].nunique().min() >= 3


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")  # a hundred epochs are enough for the point
def test_together_the_sites_can_learn_what_none_knows_alone(cells: dict[str, pd.DataFrame]) -> None:
    from sklearn.metrics import r2_score
    from sklearn.neural_network import MLPRegressor
    from sklearn.preprocessing import StandardScaler

    consortium = load_consortium(CELLS)
    features = build(consortium.features, record_type("battery_cell"), consortium.task.target)
    x = {site: features.transform(frame) for site, frame in cells.items()}
    y = {site: frame[consortium.task.target].to_numpy() for site, frame in cells.items()}
    train = {site: (frame["side"] != splits.TEST).to_numpy() for site, frame in cells.items()}
    test_x = np.concatenate([x[s][~train[s]] for s in cells])
    test_y = np.concatenate([y[s][~train[s]] for s in cells])

    def r2(sites: list[str]) -> float:
        scaler = StandardScaler().fit(np.concatenate([x[s][train[s]] for s in sites]))
        model = MLPRegressor(hidden_layer_sizes=(64, 64), learning_rate_init=3e-3, batch_size=64, max_iter=100, random_state=0)
        model.set_params(tol=0.0, n_iter_no_change=100)
        known_x, asked_x = (
            np.clip(scaler.transform(v), -5, 5) for v in (np.concatenate([x[s][train[s]] for s in sites]), test_x)
        )
        model.fit(known_x, np.concatenate([y[s][train[s]] for s in sites]))
        return float(r2_score(test_y, model.predict(asked_x)))

    assert r2(list(cells)) > 0.95
    assert max(r2([site]) for site in cells) < 0.7


# --- public data -------------------------------------------------------------------------------------------------


def shared_table(public_data: Path, name: str) -> list[dict[str, str]]:
    path = public_data / "consortia" / name
    if not path.is_file():
        pytest.skip(f"no {path.name} in the folder of public data: it is not published")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def own_table(folder: str) -> list[dict[str, str]]:
    with (EXAMPLES / folder / "sites.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def check_against_table(
    frames: dict[str, pd.DataFrame],
    table: list[dict[str, str]],
    rejected: dict[str, int],
    sides: tuple[str, ...] = ("train", "test"),
) -> None:
    """The accepted rows are the table's rows but for the rejected ones, and what is asked about is nowhere trained on."""
    total: Counter[str] = Counter()
    for frame in frames.values():
        total.update(frame.attrs["rejected"])
    assert total == rejected
    stated = Counter(
        (row["site"], "train" if row["split"] == "train" else "test")
        for row in table
        if row["split"] in sides and row["site"] in frames
    )
    found = Counter((site, hint.removesuffix("_only")) for site, frame in frames.items() for hint in frame["split_hint"])
    assert found.total() == stated.total() - sum(rejected.values())
    assert all(0 <= stated[key] - found[key] <= sum(rejected.values()) for key in stated)
    learnt = {g for frame in frames.values() for g in frame.loc[frame["side"] != splits.TEST, "group"]}
    asked = {g for frame in frames.values() for g in frame.loc[frame["side"] == splits.TEST, "group"]}
    assert asked and not learnt & asked, "a test material is trained on, here or at another site"


def test_solid_electrolytes_are_the_published_rows_and_no_test_material_is_trained_on(
    public_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMAT_DATA", str(public_data))
    frames = prepared(EXAMPLES / "solid-electrolytes" / "consortium.yaml", tmp_path)
    check_against_table(frames, own_table("solid-electrolytes"), {"bad_formula": 1})
    together = pd.concat(frames.values())
    assert (together["conductivity_s_cm_censored"] == "left").sum() == 37
    obelix = together.loc[together["source"] == "obelix"]
    assert set(obelix["temperature_k"]) == {298.15}
    assert (obelix["structure"] != "").sum() == 321 - 1  # one CIF belongs to the row whose formula cannot be read


def test_liquid_electrolytes_are_the_published_rows_and_no_test_mixture_is_trained_on(
    public_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMAT_DATA", str(public_data))
    frames = prepared(EXAMPLES / "liquid-electrolytes" / "consortium.yaml", tmp_path)
    check_against_table(frames, own_table("liquid-electrolytes"), {"out_of_range": 3})
    salts = {site: set(frame["salt"]) for site, frame in frames.items()}
    assert all(a.isdisjoint(b) for s, a in salts.items() for t, b in salts.items() if s != t)
    assert "LiN(CF3SO2)2" not in salts["imide-other"]


@pytest.mark.parametrize(
    ("task", "counts"),
    [
        ("yield-strength", {"cast-foundry": (222, 66), "cast-high-temperature": (70, 28), "anneal-lab": (131, 22),
                                 "powder-other": (104, 31), "wrought-mill": (125, 48), "steel-maker": (232, 80)}),
        ("hardness", {"cast-foundry": (205, 55), "cast-high-temperature": (9, 0), "anneal-lab": (38, 22),
                      "powder-other": (115, 10), "wrought-mill": (16, 7), "steel-maker": (0, 0)}),
    ],
)  # fmt: skip
def test_alloys_are_the_published_rows_and_no_test_composition_is_trained_on(
    task: str,
    counts: dict[str, tuple[int, int]],
    public_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEDMAT_DATA", str(public_data))
    shared_table(public_data, "C2_alloys.csv")  # the steels
    consortium = EXAMPLES / "alloys" / f"consortium-{task}.yaml"
    frames = prepared(consortium, tmp_path)
    check_against_table(frames, own_table("alloys"), {})  # every row states one of the four properties
    main = load_consortium(consortium).task.target
    sides = {s: f.loc[f[main].notna(), "side"] for s, f in frames.items()}
    assert {s: ((x != splits.TEST).sum(), (x == splits.TEST).sum()) for s, x in sides.items()} == counts
    together = load_consortium(consortium).splits
    for frame in frames.values():
        learnt = frame.loc[frame["side"] != splits.TEST]
        parts = pd.Series(splits.components(frame, together), index=frame.index)[learnt.index]
        assert learnt.groupby(parts)["side"].nunique().max() == 1
        assert (learnt.loc[learnt["doi"] != ""].groupby("doi")["side"].nunique() == 1).all()
        assert not set(learnt["doi"]) & set(frame.loc[frame["side"] == splits.TEST, "doi"]) - {""}


def test_polymer_electrolytes_are_the_published_rows_and_no_test_polymer_is_trained_on(
    public_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMAT_DATA", str(public_data))
    frames = prepared(EXAMPLES / "polymer-electrolytes" / "consortium.yaml", tmp_path)
    check_against_table(frames, own_table("polymer-electrolytes"), {"out_of_range": 27, "duplicate": 1})
    assert set(frames["peo"]["side"]) == {splits.TRAIN} and set(frames["peo"]["polymer_smiles"]) == {"*CCO*"}
    together = pd.concat(frames.values())
    assert together["polymer_smiles"].nunique() == 226 and together["polymer_smiles"].str.count(r"\*").min() >= 2
    assert not together["polymer_smiles"].str.contains("Cu|Au").any()
    unsalted = together["salt_smiles"] == ""
    assert (
        unsalted.sum() == 932
        and (together.loc[unsalted, "molality"] == 0).all()
        and (together.loc[~unsalted, "molality"] > 0).all()
    )
    assert together["conductivity_s_cm"].between(1e-16, 0.1).all()


def test_cells_are_the_published_ones_and_the_last_batch_is_all_test(
    public_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMAT_DATA", str(public_data))
    if not (public_data / "battery_severson" / "features_100cycles.csv").is_file():
        pytest.skip("no features_100cycles.csv in the folder of public data: it is not published")
    frames = prepared(EXAMPLES / "cell-ageing" / "consortium.yaml", tmp_path)
    table = own_table("cell-ageing")
    check_against_table(frames, table, {}, ("train", "primary_test", "secondary_test"))
    together = pd.concat(frames.values())
    assert len(together) == 124 == together["cell"].nunique()
    assert (together["side"] == splits.TEST).sum() == 83
    secondary = {r["cell"] for r in table if r["split"] == "secondary_test"}
    assert len(secondary) == 40 and set(together.loc[together["cell"].isin(secondary), "side"]) == {splits.TEST}
    assert together["capacity_2_ah"].between(1.0, 1.1).all(), "no logger spike is left"


def test_perovskites_are_divided_by_their_a_element_and_pairs_stay_on_one_side(public_data: Path) -> None:
    from pymatgen.core import Composition, Element

    own = own_table("perovskites")
    parts = [
        pd.read_csv(public_data / "perov5_structures" / f"perov5_{src}.csv", usecols=["formula"]).assign(src=src)
        for src in ("val", "test")
    ]
    assert [(r["src"], int(r["row"])) for r in own] == [(p["src"].iloc[0], i) for p in parts for i in range(len(p))]
    formulas = list(pd.concat(parts)["formula"])
    groups = [Element(re.match(r"[A-Z][a-z]?", f)[0]).group for f in formulas]  # type: ignore[index]
    places = [("alkaline", 2), ("early-metals", 5), ("late-metals", 12), ("p-block", 18)]
    assert [r["site"] for r in own] == [next(site for site, last in places if g <= last) for g in groups]
    sides: dict[str, list[str]] = {}
    for formula, row in zip(formulas, own, strict=True):
        sides.setdefault(Composition(formula).alphabetical_formula, []).append(row["split"])
    assert all(len(set(s)) == 1 for s in sides.values()), "a swapped pair is on both sides"
    assert sum(s[0] == "test" for s in sides.values()) == round(0.15 * len(sides))
    assert sum(len(s) for s in sides.values() if len(s) > 1 and s[0] == "test") == 464


def test_elastic_moduli_are_divided_by_chemistry_and_formulas_stay_on_one_side(public_data: Path) -> None:
    from pymatgen.core import Composition

    path = public_data / "mp_elastic_structures_join" / "elastic_structures.csv.gz"
    if not path.is_file():
        pytest.skip(f"no {path.name} in the folder of public data: it is not published")
    own, formulas = own_table("elastic-moduli"), list(pd.read_csv(path, usecols=["formula"])["formula"])
    kinds = [
        ("salts", {"O", "F", "Cl", "Br", "I", "S", "Se", "Te"}),
        ("pnictides", {"N", "P", "As", "Sb", "Bi"}),
        ("hard-metals", {"H", "B", "C", "Si", "Ge"}),
    ]
    sides: dict[str, set[str]] = {}
    for i, (formula, row) in enumerate(zip(formulas, own, strict=True)):
        symbols = {e.symbol for e in Composition(formula)}
        assert (int(row["row"]), row["site"]) == (i, next((s for s, k in kinds if symbols & k), "intermetallics"))
        sides.setdefault(Composition(formula).reduced_formula, set()).add(row["split"])
    assert all(len(s) == 1 for s in sides.values())
    assert sum(s == {"test"} for s in sides.values()) == round(0.2 * len(sides))


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "counts"), [("perovskites", (6425, 1147)), ("elastic-moduli", (916, 230))])
def test_crystals_are_the_published_rows_each_with_its_structure(
    folder: str, counts: tuple[int, int], public_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMAT_DATA", str(public_data))
    if folder == "elastic-moduli" and not (public_data / "mp_elastic_structures_join" / "elastic_structures.csv.gz").is_file():
        pytest.skip("no elastic_structures.csv.gz in the folder of public data: it is not published")
    frames = prepared(EXAMPLES / folder / "consortium.yaml", tmp_path)
    check_against_table(frames, own_table(folder), {})
    together = pd.concat(frames.values())
    assert ((together["side"] != splits.TEST).sum(), (together["side"] == splits.TEST).sum()) == counts
    assert together["structure"].str.startswith("{").all()


def test_committed_site_tables_say_what_the_study_said(public_data: Path) -> None:
    liquids = shared_table(public_data, "C4a_liquid_electrolyte_sites.csv")
    assert [(r["row"], r["site"], r["split"]) for r in own_table("liquid-electrolytes")] == [
        (r["row"], re.sub(r"^e\d_", "", r["site"].lower()).replace("_", "-"), r["split"]) for r in liquids
    ]
    solids = shared_table(public_data, "C1_solid_electrolyte.csv")
    liion = [r["row_id"] for r in solids if r["src"] == "liion"]
    with (public_data / "liion_liverpool" / "LiIonDatabase.csv").open(encoding="utf-8-sig", newline="") as file:
        assert [r["ID"] for r in csv.DictReader(file)] == liion, "rows are numbered in the order of the file"
    number = iter(range(len(liion)))
    theirs = [
        (
            r["src"],
            str(next(number)) if r["src"] == "liion" else r["row_id"],
            re.sub(r"^[A-D]_", "", r["site"]).replace("_", "-"),
            r["split"],
        )
        for r in solids
    ]
    ours = [(r["src"], r["key"], r["site"], r["split"]) for r in own_table("solid-electrolytes")]
    differ = [(mine, other) for mine, other in zip(ours, theirs, strict=True) if mine != other]
    assert [(mine[3], other[3]) for mine, other in differ] == [("dropped_same_composition", "train")] * 2
    assert all(mine[:3] == other[:3] for mine, other in differ)


def test_the_newer_site_tables_say_what_the_study_said_but_for_what_is_dropped(public_data: Path) -> None:
    alloys = shared_table(public_data, "C2_alloys.csv")
    own = own_table("alloys")
    assert [r["site"] for r in own] == [r["site"].replace("_", "-") for r in alloys]
    assert [(r["src"], int(r["row"])) for r in own] == [
        ("mpea", int(r["row"])) if r["src"] == "mpea" else ("steel", i) for i, r in enumerate(alloys)
    ]
    assert Counter((mine["split"], r["split"]) for mine, r in zip(own, alloys, strict=True) if mine["split"] != r["split"]) == {
        ("dropped_test_composition", "train"): 249,
        ("dropped_nothing_measured", "train"): 69,
        ("dropped_nothing_measured", "test"): 48,
    }
    polymers = shared_table(public_data, "C4b_polymer_electrolyte_sites.csv")
    mine = own_table("polymer-electrolytes")
    assert [r["row"] for r in mine] == [r["row"] for r in polymers]
    assert [r["row"] for r, s in zip(mine, polymers, strict=True) if r["split"] != s["split"]] == ["2088"]
    names = {(r["site"], s["site"]) for r, s in zip(mine, polymers, strict=True)}
    assert len(names) == 5 and {b[:2] for _, b in names} == {"P1", "P2", "P3", "P4", "P5"}
    cells = shared_table(public_data, "C6_battery_sites.csv")
    words = {"train": "train", "test1": "primary_test", "test2": "secondary_test"}
    companies = {"slow<=4.6C": "slow-charge", "mid<=5.3C": "mid-charge", "fast>5.3C": "fast-charge"}
    assert [(r["cell"], r["site"], r["split"]) for r in own_table("cell-ageing")] == [
        (r["cell"], companies[r["site_alt_c1"]], words[r["split"]]) for r in cells
    ]


# --- template and guide ------------------------------------------------------------------------------------------


def test_template_loads_and_its_data_are_ready_to_take_part() -> None:
    path = EXAMPLES / "template" / "site.yaml"
    report = records.check(load_site(path), path.parent, target="conductivity_s_cm")
    assert report.ok and report.n_rejected == 0


def blocks() -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("text", blocks(), ids=lambda text: text.split(maxsplit=2)[1])
def test_every_file_in_the_guide_works(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text, encoding="utf-8")
    if text.startswith("site:"):
        site = load_site(path)
        for source in site.sources:
            mapping.check(source, record_type(site.record_type))
    else:
        consortium = load_consortium(path)
        Plan.of(consortium)
        build(consortium.features, record_type(consortium.task.record_type), consortium.task.target)


def test_guide_names_every_key_every_record_type_and_every_reason() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    for model in (SiteConfig, Source, Column, MixtureColumns, Select, SplitColumn, Structures):
        for name, field in model.model_fields.items():
            assert re.search(rf"\b{field.alias or name}\b", text), f"{model.__name__}.{name}"
    for kind in RECORD_TYPES.values():
        assert f"`{kind.name}`" in text
        for field in kind.fields:
            assert field.name in text, f"{kind.name}.{field.name}"
    for reason in {*mapping.REASONS, *validation.REASONS}:
        assert f"`{reason}`" in text, reason


def test_every_unit_the_guide_lists_is_understood() -> None:
    line = next(line for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith("Write the unit as"))
    listed = re.findall(r"`([^`]+)`", line)
    assert len(listed) > 10
    assert [unit for unit in listed if not units.known(unit)] == []
