"""From a site's own files to a verified snapshot: whole or not at all, and rejected rows nowhere but in quarantine."""

from __future__ import annotations

import json
import logging
import resource
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedmat import files
from fedmat.config import Admission, SiteConfig, Splits
from fedmat.data import splits
from fedmat.data.contract import record_columns, record_type
from fedmat.data.records import check, load_records, prepare
from fedmat.errors import ConfigError, DataError, FedmatError, SiteRefused, StateError

TARGET = "conductivity_s_cm"
OPEN = Admission(max_rejected_fraction=0.5, min_train_records=5)
HEADER = "Probe,T / C,sigma / mS/cm,Klasse\n"


def line(i: int, *, formula: str = "", t: str = "", sigma: str = "", family: str = "garnet") -> str:
    return f"{formula or f'Li{i + 1}La3Zr2O12'},{t or 20 + i},{sigma or f'{0.1 + i / 100:.2f}'},{family}\n"


def solid_site(base: Path, lines: list[str], *more: dict[str, Any], **source: Any) -> SiteConfig:
    (base / "lab.csv").write_text(HEADER + "".join(lines), encoding="utf-8")
    main = {
        "adapter": "csv",
        "path": "lab.csv",
        "columns": {
            "formula": "Probe",
            "temperature_k": {"from": "T / C", "unit": "degC"},
            TARGET: {"from": "sigma / mS/cm", "unit": "mS/cm"},
            "family": "Klasse",
        },
        **source,
    }
    return SiteConfig.model_validate(
        {"site": "north", "organisation": "North", "record_type": "solid_electrolyte", "sources": [main, *more]}
    )


def good(n: int = 12) -> list[str]:
    return [line(i) for i in range(n)]


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- what is written ---------------------------------------------------------------------------------------------


def test_accepted_records_are_in_the_contracts_columns_and_units(tmp_path: Path) -> None:
    snapshot = prepare(solid_site(tmp_path, good()), tmp_path, tmp_path / "w", target=TARGET, admission=OPEN)
    frame = load_records(snapshot.folder)
    assert tuple(frame.columns) == record_columns(record_type("solid_electrolyte"))
    assert frame["temperature_k"].iloc[0] == pytest.approx(293.15) and frame[TARGET].iloc[0] == pytest.approx(1e-4)
    assert list(frame["source_row"]) == list(range(1, 13)) and set(frame["source"]) == {"main"}
    assert frame["record_id"].is_unique and frame["record_id"].str.fullmatch("[0-9a-f]{16}").all()
    assert frame["group"].nunique() == 12 and not frame.isna().any(axis=None)
    assert frame.attrs == {"site": "north", "record_type": "solid_electrolyte", "sha256": snapshot.sha256}
    assert sorted(content(snapshot.folder)) == [
        "manifest.json", "quarantine/reasons.csv", "quarantine/rejected.parquet", "records.parquet", "validation.json",
    ]  # fmt: skip


def test_the_same_data_give_the_same_bytes_and_another_row_another_digest(tmp_path: Path) -> None:
    site = solid_site(tmp_path, [*good(), line(3, t="warm")])
    first = prepare(site, tmp_path, tmp_path / "w", target=TARGET, admission=OPEN)
    before = content(first.folder)
    second = prepare(site, tmp_path, tmp_path / "w", target=TARGET, admission=OPEN)
    elsewhere = prepare(site, tmp_path, tmp_path / "other", target=TARGET, admission=OPEN)
    assert first == second and content(first.folder) == before == content(elsewhere.folder)
    third = prepare(solid_site(tmp_path, good(13)), tmp_path, tmp_path / "w", target=TARGET, admission=OPEN)
    assert third.sha256 != first.sha256 and load_records(third.folder).attrs["sha256"] == third.sha256


def test_a_formula_is_one_group_at_every_temperature_and_in_every_notation(tmp_path: Path) -> None:
    lines = [line(i, formula=f) for i, f in enumerate(["LiCl", "Cl Li", "Li2Cl2", "NaCl", "KCl", "RbCl"])]
    snapshot = prepare(solid_site(tmp_path, lines), tmp_path, tmp_path / "w", target=TARGET, admission=OPEN)
    assert load_records(snapshot.folder)["group"].nunique() == 4


def test_manifest_counts_and_vouches(tmp_path: Path) -> None:
    lines = [*good(), line(0), line(1, formula="Unobtainium"), line(2, t="warm"), line(3, sigma="-1"), "LiCl,20,,garnet\n"]
    snapshot = prepare(solid_site(tmp_path, lines), tmp_path, tmp_path / "w", target=TARGET, admission=OPEN)
    manifest = files.read_json(snapshot.folder / "manifest.json")
    counts = {"bad_formula": 1, "duplicate": 1, "missing": 1, "not_a_number": 1, "not_positive": 1}
    assert manifest["rejected"] == counts == snapshot.rejected
    assert (manifest["n_records"], manifest["n_rejected"]) == (12, 5) == (snapshot.n_records, snapshot.n_rejected)
    assert manifest["sources"] == {"main": {"file_sha256": files.sha256_file(tmp_path / "lab.csv")}}
    assert manifest["files"]["records.parquet"]["sha256"] == files.sha256_file(snapshot.folder / "records.parquet")
    rest = {k: v for k, v in manifest.items() if k != "sha256"}
    assert manifest["sha256"] == files.sha256(files.canonical_json(rest)) == snapshot.sha256


def test_two_sources_become_one_snapshot_in_their_order_and_repeats_over_both_are_found(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("comp;T;S\nLi1La3Zr2O12;293,15;0,0001\nNaCl;300;0,001\n")
    old = {
        "name": "old",
        "adapter": "csv",
        "path": "old.csv",
        "options": {"sep": ";", "decimal": ","},
        "columns": {
            "formula": "comp", "temperature_k": {"from": "T", "unit": "kelvin"}, TARGET: {"from": "S", "unit": "S/cm"},
        },
        "constants": {"family": "garnet"},
    }  # fmt: skip
    snapshot = prepare(solid_site(tmp_path, good(), old), tmp_path, tmp_path / "w", target=TARGET, admission=OPEN)
    frame = load_records(snapshot.folder)
    assert list(frame["source"]) == ["main"] * 12 + ["old"] and snapshot.rejected == {"duplicate": 1}


def test_rows_left_out_by_where_are_not_rejected(tmp_path: Path) -> None:
    lines = [*good(), *(line(i, formula="junk", family="other") for i in range(40))]
    site = solid_site(tmp_path, lines, where={"Klasse": "garnet"})
    snapshot = prepare(site, tmp_path, tmp_path / "w", target=TARGET, admission=Admission(min_train_records=5))
    assert (snapshot.n_records, snapshot.n_rejected) == (12, 0)


# --- quarantine --------------------------------------------------------------------------------------------------


def test_rejected_rows_are_kept_whole_with_row_number_and_reason(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    bad = [line(0, formula="Unobtainium", sigma="-1"), line(1, t="warm"), line(2)]
    snapshot = prepare(solid_site(tmp_path, [*good(), *bad]), tmp_path, tmp_path / "w", target=TARGET, admission=OPEN)
    rejected = pd.read_parquet(snapshot.folder / "quarantine" / "rejected.parquet")
    assert list(rejected["source_row"]) == [13, 14, 15]
    assert list(rejected["code"]) == ["bad_formula", "not_a_number", "duplicate"]
    kept = [json.loads(raw) for raw in rejected["raw"]]
    assert kept == [dict(zip(HEADER.strip().split(","), row.strip().split(","), strict=True)) for row in bad]
    reasons = pd.read_csv(snapshot.folder / "quarantine" / "reasons.csv", keep_default_na=False)
    assert list(zip(reasons["source_row"], reasons["column"], reasons["code"], strict=True)) == [
        (13, "Probe", "bad_formula"),
        (13, "sigma / mS/cm", "not_positive"),
        (14, "T / C", "not_a_number"),
        (15, "(whole row)", "duplicate"),
    ]


def test_too_many_rejected_rows_refuse_the_site_with_counts_and_keep_snapshot_and_quarantine(tmp_path: Path) -> None:
    strict = Admission(max_rejected_fraction=0.2, min_train_records=5)
    first = prepare(solid_site(tmp_path, good()), tmp_path, tmp_path / "w", target=TARGET, admission=strict)
    site = solid_site(tmp_path, [*good(), *(line(i, formula="junk") for i in range(3)), line(0, t="warm")])
    with pytest.raises(
        SiteRefused, match=r"site north: 4 of 16 rows[\s\S]*bad_formula 3, not_a_number 1[\s\S]*lab\.csv[\s\S]*'Probe'"
    ):
        prepare(site, tmp_path, tmp_path / "w", target=TARGET, admission=strict)
    assert load_records(first.folder).attrs["sha256"] == first.sha256
    assert len(pd.read_parquet(first.folder / "quarantine" / "rejected.parquet")) == 4


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Makes every write beyond ``size`` bytes of a file fail, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_clear_error_and_loses_neither_snapshot_nor_quarantine(tmp_path: Path) -> None:
    first = prepare(solid_site(tmp_path, [*good(), line(0)]), tmp_path, tmp_path / "w", target=TARGET, admission=OPEN)
    before = content(first.folder)
    site = solid_site(tmp_path, [*good(), *(line(i, formula=f"junk{i}", family="x" * 90) for i in range(10))])
    with largest_file(500), pytest.raises(StateError, match=r"site north: the quarantine[\s\S]*kept[\s\S]*free space"):
        prepare(site, tmp_path, tmp_path / "w", target=TARGET, admission=OPEN)
    assert content(first.folder) == before


def test_a_snapshot_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    first = prepare(solid_site(tmp_path, good()), tmp_path, tmp_path / "w", target=TARGET, admission=OPEN)
    before = {k: v for k, v in content(first.folder).items() if not k.startswith("quarantine")}
    quarantine = max(p.stat().st_size for p in (first.folder / "quarantine").iterdir())
    site = solid_site(tmp_path, good(300))
    with largest_file(quarantine + 200), pytest.raises(StateError, match="site north: the snapshot"):
        prepare(site, tmp_path, tmp_path / "w", target=TARGET, admission=OPEN)
    assert {k: v for k, v in content(first.folder).items() if not k.startswith("quarantine")} == before
    assert len(load_records(first.folder)) == 12


def test_a_quarantine_that_is_no_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "quarantine").write_text("in the way")
    with pytest.raises(StateError, match="site north: the quarantine"):
        prepare(solid_site(tmp_path, good()), tmp_path, tmp_path / "w", target=TARGET, admission=OPEN)


# --- refusals ----------------------------------------------------------------------------------------------------


def split_lines(hints: str) -> list[str]:
    return [line(i, family="test" if h == "t" else "train") for i, h in enumerate(hints)]


@pytest.mark.parametrize(
    ("lines", "source", "error", "words"),
    [
        ([], {}, DataError, "lab.csv"),
        (good(4), {}, SiteRefused, "4 records"),
        ([line(i, sigma="0.5") for i in range(12)], {}, SiteRefused, "'sigma / mS/cm'|sigma / mS/cm"),
        ([line(i, sigma="0.5") for i in range(12)], {}, SiteRefused, "same value"),
        ([line(i, formula="LiCl") for i in range(12)], {}, SiteRefused, "no test group"),
        (split_lines("rrrrrrr"), {"split": {"column": "Klasse"}}, SiteRefused, "no test group"),
        (split_lines("rttttttttt"), {"split": {"column": "Klasse"}}, SiteRefused, "1 records to train on"),
        ([line(i, formula="junk") for i in range(12)], {}, SiteRefused, "12 of 12"),
        (good(), {"path": "labs.csv"}, DataError, "labs.csv"),
    ],
)
def test_an_unusable_site_gets_one_error_naming_site_file_and_remedy(
    tmp_path: Path, lines: list[str], source: dict[str, Any], error: type[FedmatError], words: str
) -> None:
    site = solid_site(tmp_path, lines, **source)
    with pytest.raises(error, match=words) as caught:
        prepare(site, tmp_path, tmp_path / "w", target=TARGET, admission=OPEN)
    assert "north" in caught.value.what and site.sources[0].path in caught.value.what and caught.value.fix
    assert not (tmp_path / "w" / "manifest.json").exists()


def test_a_target_that_is_no_number_or_no_field_is_a_configuration_error(tmp_path: Path) -> None:
    site = solid_site(tmp_path, good())
    for target in ("family", "colour"):
        with pytest.raises(ConfigError, match=target):
            prepare(site, tmp_path, tmp_path / "w", target=target, admission=OPEN)
    assert not (tmp_path / "w").exists()


def test_of_several_targets_a_row_needs_one_and_a_site_one_that_varies(tmp_path: Path) -> None:
    rows = [f"Fe{i + 1}Ni,{300 + i if i % 2 else ''},{'' if i % 2 else 200 + i}" for i in range(12)] + ["FeNi40,,"]
    (tmp_path / "lab.csv").write_text("alloy,YS,HV\n" + "\n".join(rows) + "\n")
    site = SiteConfig.model_validate({"site": "north", "organisation": "N", "record_type": "alloy", "sources": [{
        "adapter": "csv", "path": "lab.csv", "constants": {"temperature_k": {"value": 300, "unit": "K"}}, "columns": {
            "formula": "alloy", "yield_strength_mpa": {"from": "YS", "unit": "MPa"},
            "hardness_hv": {"from": "HV", "unit": "HV"}}}]})  # fmt: skip
    two = ("hardness_hv", "yield_strength_mpa")
    snapshot = prepare(site, tmp_path, tmp_path / "w", target=two, admission=OPEN)
    assert (snapshot.n_records, snapshot.rejected) == (12, {"no_target": 1})
    report = check(site, tmp_path, target=two, admission=OPEN)
    assert report.ok and report.target == "hardness_hv, yield_strength_mpa"
    one = prepare(
        site, tmp_path, tmp_path / "one", target=two[:1], admission=OPEN.model_copy(update={"max_rejected_fraction": 0.6})
    )
    assert (one.n_records, one.rejected) == (6, {"missing": 7})
    assert check(site, tmp_path, target=[*two, "elongation_pct"], admission=OPEN).ok, "what is never measured here is no fault"
    with pytest.raises(SiteRefused, match=r"13 of 13 rows rejected.*no_target 13"):
        prepare(
            site,
            tmp_path,
            tmp_path / "none",
            target=("elongation_pct", "tensile_strength_mpa"),
            admission=Admission(max_rejected_fraction=0.99),
        )
    for wrong in ([], ["hardness_hv", "doi"]):
        with pytest.raises(ConfigError):
            prepare(site, tmp_path, tmp_path / "x", target=wrong, admission=OPEN)


# --- reading back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda w: (w / "records.parquet").write_bytes((w / "records.parquet").read_bytes()[:-7]),
        lambda w: (w / "records.parquet").unlink(),
        lambda w: (w / "manifest.json").write_text((w / "manifest.json").read_text()[:40]),
        lambda w: (w / "manifest.json").write_text(
            (w / "manifest.json").read_text().replace('"n_records": 12', '"n_records": 13')
        ),
        lambda w: (w / "manifest.json").write_text("[]"),
        lambda w: (w / "manifest.json").unlink(),
    ],
)
def test_a_damaged_snapshot_is_never_loaded_and_preparing_again_mends_it(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    site = solid_site(tmp_path, good())
    snapshot = prepare(site, tmp_path, tmp_path / "w", target=TARGET, admission=OPEN)
    damage(snapshot.folder)
    with pytest.raises(StateError, match=r"fix: \S"):
        load_records(snapshot.folder)
    assert prepare(site, tmp_path, tmp_path / "w", target=TARGET, admission=OPEN) == snapshot
    assert len(load_records(snapshot.folder)) == 12


# --- site check --------------------------------------------------------------------------------------------------


def test_check_speaks_the_sites_own_language_and_writes_nothing(tmp_path: Path) -> None:
    site = solid_site(tmp_path, [*good(), line(1, t="warm"), line(2, t="cold"), line(3, formula="junk")])
    before = content(tmp_path)
    report = check(site, tmp_path, target=TARGET, admission=OPEN)
    assert content(tmp_path) == before
    assert report.ok and (report.n_rows, report.n_accepted, report.n_rejected, report.n_groups) == (15, 12, 3, 12)
    told = [(f.file, f.column, f.field, f.code, f.rows, f.first_rows) for f in report.findings]
    assert told == [
        ("lab.csv", "T / C", "temperature_k", "not_a_number", 2, (13, 14)),
        ("lab.csv", "Probe", "formula", "bad_formula", 1, (15,)),
    ]


def test_check_tells_everything_at_once(tmp_path: Path) -> None:
    missing = {"name": "gone", "adapter": "csv", "path": "gone.csv", "columns": {
        "formula": "a", "temperature_k": {"from": "b", "unit": "K"}, TARGET: {"from": "c", "unit": "S/cm"}}}  # fmt: skip
    site = solid_site(tmp_path, [line(i, formula="LiCl", sigma="0.5") for i in range(3)], missing)
    report = check(site, tmp_path, target=TARGET, admission=OPEN)
    text = "\n".join(report.problems)
    assert not report.ok
    assert all(words in text for words in ("gone.csv", "3 records to train on", "same value", "no test group"))
    assert not check(site, tmp_path, target="family").ok
    assert not check(solid_site(tmp_path, []), tmp_path, target=TARGET).ok


# --- canaries ----------------------------------------------------------------------------------------------------

WORD, NUMBER, MOLECULE = "Kanarium7731", "77319.4242", "C1CN7731"
KELVIN = "77592.5742"  # NUMBER degC in the contract's unit


def liquid_site(base: Path) -> SiteConfig:
    rows = [f"LiPF6,{0.5 + i / 10:.1f},mol/kg,{10 + i % 90},{90 - i % 90},w,25,{5 + i / 10:.1f}" for i in range(30)]
    rows += [
        f"LiPF6,1.0,{WORD},50,50,w,25,5.01",
        f"LiPF6,1.0,mol/kg,50,50,{WORD},25,5.02",
        f"LiPF6,{WORD},mol/kg,50,50,w,25,5.03",
        f"LiPF6,1.0,mol/kg,{NUMBER},50,w,25,5.04",
        f"LiPF6,1.0,mol/kg,50,{WORD},w,25,5.05",
        f"LiPF6,1.0,mol/kg,50,50,w,{NUMBER},5.06",
        f"LiPF6,1.0,mol/kg,50,50,w,25,{NUMBER}",
        f"LiPF6,{NUMBER},mol/kg,50,50,w,25,5.07",
        f"{WORD},1.0,mol/kg,10,90,w,25,-{NUMBER}",
    ]
    (base / "lab.csv").write_text("salt,c,basis,EC,DMC,ratio,T,k\n" + "\n".join(rows) + "\n")
    return SiteConfig.model_validate({"site": "north", "organisation": "N", "record_type": "liquid_electrolyte", "sources": [{
        "adapter": "csv", "path": "lab.csv", "columns": {
            "salt": "salt", "concentration": "c", "concentration_basis": "basis",
            "solvents": {"fractions": {"EC": "EC", "DMC": "DMC"}, "percent": True}, "solvent_basis": "ratio",
            "temperature_k": {"from": "T", "unit": "degC"}, TARGET: {"from": "k", "unit": "mS/cm"}}}]})  # fmt: skip


def crystal_site(base: Path) -> SiteConfig:
    bad = [
        line(1, formula=WORD), line(2, t=WORD), line(3, t=NUMBER), line(4, sigma=NUMBER), line(5, sigma=f"-{NUMBER}"),
        line(6, sigma=f"{NUMBER} furlong"), line(7, sigma=f"<{WORD}"), line(0, formula=f"{WORD}(Li", sigma="n/a"),
    ]  # fmt: skip
    return solid_site(base, [*good(30), *bad])


def polymer_site(base: Path) -> SiteConfig:
    rows = [f"*{'C' * (i + 1)}O*,[Li+].[Cl-],1.0,300,{1 + i}e-6" for i in range(30)]
    rows += [f"{MOLECULE},[Li+].[Cl-],1.0,300,1e-6", f"*CO*,{MOLECULE},1.0,300,2e-6", f"*CO*,[Li+].[Cl-],{NUMBER},300,3e-6"]
    (base / "lab.csv").write_text("P,S,m,T,k\n" + "\n".join(rows) + "\n")
    return SiteConfig.model_validate({"site": "north", "organisation": "N", "record_type": "polymer_electrolyte", "sources": [{
        "adapter": "csv", "path": "lab.csv", "columns": {
            "polymer_smiles": "P", "salt_smiles": "S", "molality": {"from": "m", "unit": "mol/kg"},
            "temperature_k": {"from": "T", "unit": "K"}, TARGET: {"from": "k", "unit": "S/cm"}}}]})  # fmt: skip


@pytest.mark.parametrize("make", [liquid_site, crystal_site, polymer_site])
def test_canaries_in_bad_rows_are_in_quarantine_and_nowhere_else(
    tmp_path: Path,
    make: Callable[[Path], SiteConfig],
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    caplog.set_level(logging.DEBUG)
    work = tmp_path / "w"
    site = make(tmp_path)
    secrets = (WORD, NUMBER, KELVIN, MOLECULE, NUMBER.split(".")[0], KELVIN.split(".")[0])
    snapshot = prepare(site, tmp_path, work, target=TARGET, admission=OPEN)
    told = [repr(snapshot), repr(check(site, tmp_path, target=TARGET))]
    with pytest.raises(SiteRefused) as refused:
        prepare(site, tmp_path, work, target=TARGET, admission=Admission(max_rejected_fraction=0.01, min_train_records=5))
    told += ["".join(traceback.format_exception(refused.value)), repr(refused.value.__context__)]
    told += [*capfd.readouterr(), caplog.text, *(str(r.__dict__) for r in caplog.records), *(str(w.message) for w in recwarn)]
    told += [data.decode(errors="replace") for name, data in content(work).items() if name.endswith(".json")]
    told.append(load_records(work).to_csv())
    told.append((work / "quarantine" / "reasons.csv").read_text())
    assert not [secret for secret in secrets for text in told if secret in text]

    rejected = pd.read_parquet(work / "quarantine" / "rejected.parquet")
    assert len(load_records(work)) == 30 and len(rejected) == snapshot.n_rejected
    lines = (tmp_path / "lab.csv").read_text().splitlines()
    for row, raw in zip(rejected["source_row"], rejected["raw"], strict=True):
        assert ",".join(json.loads(raw).values()) == lines[row]
    assert all("7731" in raw for raw in rejected["raw"])


# --- the public data ---------------------------------------------------------------------------------------------


def test_calisol_as_published(public_data: Path, tmp_path: Path) -> None:
    path = public_data / "calisol23" / "calisol23.csv"
    solvents = path.read_text(encoding="utf-8").split("\n", 1)[0].strip().split(",")[7:]
    site = SiteConfig.model_validate({"site": "calisol", "organisation": "-", "record_type": "liquid_electrolyte", "sources": [{
        "adapter": "csv", "path": str(path), "columns": {
            "salt": {"from": "salt", "replace": {"LiN(CF3SO2)2": "LiTFSI"}}, "concentration": "c",
            "concentration_basis": "c units", "solvents": {"fractions": {s: s for s in solvents}},
            "solvent_basis": "solvent ratio type", "temperature_k": {"from": "T", "unit": "K"},
            TARGET: {"from": "k", "unit": "mS/cm"}, "doi": "doi"}}]})  # fmt: skip
    snapshot = prepare(site, tmp_path, tmp_path / "w", target=TARGET, admission=Admission())
    assert snapshot.rejected == {"missing": 523, "not_positive": 32, "out_of_range": 4}  # negative c; three below 1e-12 S/cm
    frame = load_records(snapshot.folder)
    assert len(frame) == 13266 and not frame["salt"].str.contains(r"^\s|\s$").any()


def test_obelix_keeps_repeats_bounds_structures_and_its_published_split(public_data: Path, tmp_path: Path) -> None:
    folder = public_data / "obelix"
    parts = [
        {"name": part, "adapter": "csv", "path": str(folder / f"{part}.csv"), "options": {},
         "columns": {"formula": "Reduced Composition", TARGET: {"from": "Ionic conductivity (S cm-1)", "unit": "S/cm"},
                     "family": "Family", "doi": "DOI"},
         "constants": {"temperature_k": {"value": 25, "unit": "degC"}}}
        for part in ("train", "test")
    ]  # fmt: skip
    for part in parts:
        part["split"] = {"column": "Side"}
        table = pd.read_csv(folder / f"{part['name']}.csv", dtype=str, keep_default_na=False).assign(Side=part["name"])
        table.to_csv(tmp_path / f"{part['name']}.csv", index=False)
        part["path"] = f"{part['name']}.csv"
    parts[1]["structures"] = {"path": str(folder / "test_cifs.tar.gz"), "on": "ID"}
    site = SiteConfig.model_validate(
        {"site": "obelix", "organisation": "-", "record_type": "solid_electrolyte", "sources": parts}
    )
    snapshot = prepare(site, tmp_path, tmp_path / "w", target=TARGET, admission=Admission())
    frame = load_records(snapshot.folder)
    assert snapshot.rejected["bad_formula"] == 1 and len(frame) + snapshot.n_rejected == 599
    assert (frame[f"{TARGET}_censored"] == "left").sum() > 30 and (frame["structure"] != "").sum() > 60
    assert frame["group"].nunique() < len(frame)
    # as texts the two sides share no composition; Li10.2Ge1.2P1.8S12 and Li3.4Ge0.4P0.6S4 are one all the same
    assert splits.torn_groups(frame) == 2
    codes = splits.assign(frame, Splits())
    assert [c == splits.TEST for c in codes] == [s == "test" for s in frame["source"]]
