"""The command line: what it answers, how it refuses, and that it never shows a record's value."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small
import yaml
from typer.testing import CliRunner, Result

from fedmat import errors
from fedmat.cli import app

CANARY = "Xq7Zz9"


def fedmat(*words: str) -> Result:
    """Runs a command in this process."""
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def plain(text: str) -> str:
    """Text without frames and line breaks."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Result]:
    """A consortium that was run once, its folder, and what the command said."""
    folder = tmp_path_factory.mktemp("cli")
    consortium = small.build(folder / "c", rounds=4)
    done = fedmat(*command(folder, consortium))
    return folder, consortium, done


def command(folder: Path, consortium: Path, *more: str) -> list[str]:
    store = f"sqlite:///{folder / 'mlruns' / 'mlflow.db'}"
    return [
        "run",
        str(consortium),
        "--home",
        str(folder / "home"),
        "--tracking-uri",
        store,
        "--orchestrator",
        "none",
        "--json",
        *more,
    ]


# --- the benchmark ---------------------------------------------------------------------------------------------------


def test_a_quick_benchmark_needs_no_data_and_its_results_are_shown_again_without_measuring(tmp_path: Path) -> None:
    words = ["bench", "--quick", "--rounds", "2", "--workers", "1", "--out", str(tmp_path), "--json"]
    done = fedmat(*words, "--arms", "dummy,default")
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert set(summary["cases"]) == {"demo"} and set(summary["cases"]["demo"]["global"]) == {"dummy", "default"}
    assert (tmp_path / "quick/bench.html").is_file()
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "quick/demo").rglob("*.json")}
    shown = fedmat("bench", "--quick", "--show", "--out", str(tmp_path))
    assert shown.exit_code == 0 and "claims" in shown.output and "demo, all sites' held-out materials" in shown.output
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "quick/demo").rglob("*.json")} == written


@pytest.mark.parametrize("words", [["C5"], ["demo", "--arms", "fedprocks"], ["demo", "--seeds", "0"]])
def test_a_benchmark_of_what_there_is_not_is_refused(words: list[str], tmp_path: Path) -> None:
    done = fedmat("bench", *words, "--out", str(tmp_path))
    assert done.exit_code == 2
    assert not (tmp_path / "data").exists()


# --- answering -----------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy_and_answers_in_half_a_second() -> None:
    code = (
        "import sys, fedmat.cli\n"
        "try: fedmat.cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "print('LOADED', *sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split("LOADED")[-1].split())
    assert not loaded & {"torch", "pandas", "numpy", "pydantic", "prefect", "mlflow", "dvc", "rich", "yaml", "flows"}
    assert "demo" in done.stdout
    spent = []
    for _ in range(3):  # processor time: other work on the machine does not count
        before = os.times()
        subprocess.run([sys.executable, "-m", "fedmat", "--help"], capture_output=True, check=True)
        after = os.times()
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(spent) < 0.5


@pytest.mark.parametrize("words", [[], ["site"], ["data"]])
def test_every_command_teaches_by_an_example(words: list[str]) -> None:
    listed = re.findall(r"^  ([a-z]+) {2,}", fedmat(*words, "--help").output.split("Commands:")[-1], re.MULTILINE)
    assert listed
    for name in listed:
        text = fedmat(*words, name, "--help").output
        assert "Example:  fedmat" in text or "Commands:" in text, name


def test_a_run_answers_a_machine_with_one_json_object_on_stdout(ran: tuple[Path, Path, Result]) -> None:
    folder, _, done = ran
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert set(answer) >= {"global", "sites", "bytes", "model", "run", "task", "exclusions", "orchestrator", "seconds"}
    assert set(answer["sites"]) == set(small.COMPANIES)
    assert answer["model"]["name"] == "fedmat-small-hardness"
    assert answer["model"]["version"] == 1
    assert "champion" in answer["model"]["aliases"]
    assert len(answer["model"]["sha256"]) == 64
    assert (folder / "home" / "runs" / answer["run"]["id"] / "report.html").is_file()
    assert "round 4 of 4" in done.stderr


def test_the_same_run_again_trains_nothing_and_gives_the_same_model(ran: tuple[Path, Path, Result]) -> None:
    folder, consortium, done = ran
    again = fedmat(*command(folder, consortium))
    first, second = json.loads(done.stdout), json.loads(again.stdout)
    assert first["model"] == second["model"]
    assert first["run"] == second["run"]
    assert "round 1" not in again.stderr


def test_fresh_trains_again_to_the_same_bytes(ran: tuple[Path, Path, Result]) -> None:
    folder, consortium, done = ran
    again = fedmat(*command(folder, consortium, "--fresh", "--no-register"))
    assert json.loads(done.stdout)["model"]["sha256"] == json.loads(again.stdout)["model"]["sha256"]
    assert "round 4 of 4" in again.stderr


def test_the_table_has_every_site_and_says_where_to_look_next(ran: tuple[Path, Path, Result]) -> None:
    folder, consortium, _ = ran
    shown = fedmat(*[w for w in command(folder, consortium) if w != "--json"]).output
    for word in (*small.COMPANIES, "alone", "federated", "fine-tuned", "pooled", "all sites", "lower is better"):
        assert word in shown
    for word in ("Where to look next", "report.html", "fedmat ui", "fedmat-small-hardness version 1", "fedmat predict"):
        assert word in shown


@pytest.mark.slow
def test_a_run_is_found_by_folder_id_start_of_id_consortium_file_and_latest(
    ran: tuple[Path, Path, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, consortium, done = ran
    name, home = json.loads(done.stdout)["run"]["id"], str(folder / "home")
    for text in (str(folder / "home" / "runs" / name), name, name[:5], str(consortium), "latest"):
        shown = fedmat("report", text, "--home", home, "--json")
        assert json.loads(shown.stdout)["run"] == name
    monkeypatch.setenv("FEDMAT_HOME", str(folder))
    assert json.loads(fedmat("report", "latest", "--json").stdout)["run"] == name
    wrong = fedmat("report", "nothing-like-it", "--home", home)
    assert wrong.exit_code == 2
    assert name in wrong.output


def test_models_lists_what_is_registered(ran: tuple[Path, Path, Result]) -> None:
    folder, _, done = ran
    store = ["--tracking-uri", f"sqlite:///{folder / 'mlruns' / 'mlflow.db'}"]
    (row,) = json.loads(fedmat("models", "--json", *store).stdout)
    assert row["sha256"] == json.loads(done.stdout)["model"]["sha256"]
    assert "fedmat-small-hardness" in fedmat("models", *store).output
    empty = fedmat("models", "--json", "--tracking-uri", f"sqlite:///{folder / 'none' / 'mlflow.db'}")
    assert json.loads(empty.stdout) == []


def test_a_registered_name_and_a_run_predict_the_same_from_raw_records(ran: tuple[Path, Path, Result]) -> None:
    folder, _, done = ran
    records = folder / "new.csv"
    records.write_text("formula,temperature_k\nAl0.5Ni0.5,300\nCu0.5O0.5,300\n")
    store = ["--tracking-uri", f"sqlite:///{folder / 'mlruns' / 'mlflow.db'}"]
    name = json.loads(done.stdout)["run"]["id"]
    by_run = fedmat("predict", name, str(records), "--json", "--home", str(folder / "home"))
    answer = json.loads(by_run.stdout)["predictions"]
    assert [a["in_domain"] for a in answer] == [True, False]  # no company had oxygen
    for text in ("fedmat-small-hardness", "fedmat-small-hardness@champion", "models:/fedmat-small-hardness/1"):
        assert json.loads(fedmat("predict", text, str(records), "--json", *store).stdout)["predictions"] == answer
    as_json = folder / "new.json"
    as_json.write_text(json.dumps([{"formula": "Al0.5Ni0.5", "temperature_k": 300}]))
    out = folder / "out.csv"
    fedmat("predict", name, str(as_json), "--out", str(out), "--home", str(folder / "home"))
    with out.open(newline="") as handle:
        (written,) = csv.DictReader(handle)
    assert float(written["prediction"]) == pytest.approx(answer[0]["prediction"])
    assert float(written["low"]) < float(written["prediction"]) < float(written["high"])
    bad = fedmat("predict", "fedmat-small-hardness@nobody", str(records), *store)
    assert bad.exit_code == 2


def test_a_record_that_cannot_be_predicted_is_named_by_row_not_by_value(ran: tuple[Path, Path, Result]) -> None:
    folder, _, done = ran
    records = folder / "bad.csv"
    records.write_text(f"formula,temperature_k\nAl0.5Ni0.5,300\n{CANARY},300\n")
    shown = fedmat("predict", json.loads(done.stdout)["run"]["id"], str(records), "--home", str(folder / "home"))
    assert shown.exit_code == 3
    assert "row 2" in shown.output
    assert CANARY not in shown.output


# --- refusing ------------------------------------------------------------------------------------------------------


def kinds() -> list[type[errors.FedmatError]]:
    found = [errors.FedmatError]
    for kind in found:
        found += kind.__subclasses__()
    return [k for k in found if k.__module__ == errors.__name__]


def test_the_documented_exit_codes_are_those_of_the_code(project: Path) -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", (project / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert sorted((name, int(code)) for code, name in rows) == sorted((k.__name__, k.exit_code) for k in kinds())


@pytest.mark.parametrize("kind", kinds())
def test_an_error_is_one_panel_with_the_remedy_and_its_own_exit_code(
    kind: type[errors.FedmatError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        words = ("bad_thing",) if issubclass(kind, errors.ProtocolError | errors.PolicyRefused) else ()
        raise kind(*words, "site a: the thing is wrong", fix="mend the thing")

    monkeypatch.setattr("fedmat.places.find_run", fail)
    shown = fedmat("report", "latest")
    assert shown.exit_code == kind.exit_code
    assert shown.stdout == ""
    assert kind.__name__ in shown.stderr
    assert "What to do: mend the thing" in plain(shown.stderr)
    assert "Traceback" not in shown.stderr
    traced = fedmat("report", "latest", "--debug")
    assert traced.exit_code == kind.exit_code


def test_an_unforeseen_error_keeps_its_text_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError(f"could not convert {CANARY}")

    monkeypatch.setattr("fedmat.places.find_run", fail)
    shown = fedmat("report", "latest")
    assert shown.exit_code == 1
    assert "ValueError" in shown.output
    assert CANARY not in shown.output


def test_an_interrupted_command_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedmat.places.find_run", stop)
    assert fedmat("report", "latest").exit_code == 130


@pytest.mark.parametrize(
    "words", [["rum"], ["run"], ["run", "x.yaml", "--rounds", "0"], ["run", "x.yaml", "--orchestrator", "cron"]]
)
def test_wrong_usage_ends_with_2_and_says_what_is_right(words: list[str]) -> None:
    shown = fedmat(*words)
    assert shown.exit_code == 2
    assert "Usage:" in shown.output


def test_a_wrong_key_is_named_with_the_nearest_valid_one(tmp_path: Path) -> None:
    path = small.build(tmp_path)
    settings = yaml.safe_load(path.read_text())
    settings["plan"]["ronds"] = settings["plan"].pop("rounds")
    path.write_text(yaml.safe_dump(settings))
    shown = fedmat("run", str(path), "--home", str(tmp_path / "h"))
    assert shown.exit_code == 2
    assert "did you mean 'rounds'?" in plain(shown.output)
    assert not (tmp_path / "h").exists()


# --- a site's own data ---------------------------------------------------------------------------------------------

HEADERS = ["Alloy", "Test temperature [°C]", "Vickers hardness", "operator"]


def table(folder: Path, separator: str = ";", encoding: str = "cp1252") -> Path:
    rows = [HEADERS, [CANARY, "25,5", "210,5", "m"], *[["Al0.5Ni0.5", f"{20 + i},0", f"{200 + i},5", "m"] for i in range(40)]]
    path = folder / "lab.csv"
    path.write_bytes("\n".join(separator.join(r) for r in rows).encode(encoding))
    return path


def test_a_draft_maps_columns_and_leaves_every_unit_to_a_person(tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    done = fedmat("site", "init", str(table(tmp_path)), "--name", "mill", "--record-type", "alloy", "--out", str(site))
    assert done.exit_code == 0, done.output
    text = site.read_text()
    source = yaml.safe_load(text)["sources"][0]
    assert source["path"] == "lab.csv"
    assert source["options"] == {"encoding": "cp1252", "sep": ";", "decimal": ","}
    assert source["columns"]["temperature_k"] == {"from": "Test temperature [°C]", "unit": "?"}
    assert source["columns"]["hardness_hv"] == {"from": "Vickers hardness"}
    assert CANARY not in text + done.output
    again = fedmat("site", "init", str(tmp_path / "lab.csv"), "--out", str(site))
    assert again.exit_code == 2
    assert site.read_text() == text


def test_a_check_refuses_an_unconfirmed_draft_in_the_sites_own_words(tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    fedmat("site", "init", str(table(tmp_path)), "--record-type", "alloy", "--out", str(site))
    shown = fedmat("site", "check", str(site), "--target", "hardness_hv")
    assert shown.exit_code == 2
    assert "column 'Test temperature [°C]'" in plain(shown.output)
    assert shown.output.count("in which unit") == 1


def test_a_check_counts_bad_rows_by_the_sites_own_column_and_shows_no_value(tmp_path: Path) -> None:
    table(tmp_path)
    site = tmp_path / "site.yaml"
    site.write_text(
        "site: mill\norganisation: Mill\nrecord_type: alloy\nsources:\n"
        "  - {adapter: csv, path: lab.csv, options: {encoding: cp1252, sep: ';', decimal: ','}, columns: {formula: Alloy,\n"
        "     temperature_k: {from: 'Test temperature [°C]', unit: degC}, hardness_hv: Vickers hardness}}\n"
    )
    before = sorted(tmp_path.rglob("*"))
    shown = fedmat("site", "check", str(site), "--target", "hardness_hv")
    answer = json.loads(fedmat("site", "check", str(site), "--target", "hardness_hv", "--json").stdout)
    (finding,) = answer["findings"]
    assert (finding["column"], finding["code"], finding["rows"], finding["first_rows"]) == ("Alloy", "bad_formula", 1, [1])
    assert "Alloy" in shown.output
    assert CANARY not in shown.output + json.dumps(answer)
    assert sorted(tmp_path.rglob("*")) == before
    assert not answer["ok"]  # one material cannot be divided into training and test
    assert shown.exit_code == 3


def test_a_check_finds_its_consortium_and_target_by_itself(tmp_path: Path) -> None:
    small.build(tmp_path / "c")
    shown = fedmat("site", "check", str(tmp_path / "c" / "mill" / "site.yaml"))
    assert shown.exit_code == 0, shown.output
    assert "Ready to take part" in shown.output
    lonely = tmp_path / "site.yaml"
    lonely.write_text((tmp_path / "c" / "mill" / "site.yaml").read_text())
    assert fedmat("site", "check", str(lonely)).exit_code == 2
    other = fedmat("site", "check", str(lonely), "--consortium", str(tmp_path / "c" / "consortium.yaml"))
    assert "none of its members" in plain(other.output)


def test_a_snapshot_needs_no_other_site(tmp_path: Path) -> None:
    consortium = small.build(tmp_path / "c")
    for other in ("forge", "foundry"):
        (consortium.parent / other / "site.yaml").unlink()
    words = ["site", "snapshot", str(tmp_path / "c" / "mill" / "site.yaml"), "--home", str(tmp_path / "home"), "--json"]
    first, second = (json.loads(fedmat(*words).stdout) for _ in range(2))
    assert first["snapshot"]["sha256"] == second["snapshot"]["sha256"]
    assert first["version"]["tag"] == second["version"]["tag"]
    assert (tmp_path / "home" / "sites" / "mill" / "records.parquet").is_file()


# --- long-running --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ui_shows_both_addresses_and_ctrl_c_stops_both(tmp_path: Path) -> None:
    import signal
    import urllib.error
    import urllib.request

    words = ["ui", "--home", str(tmp_path / "home"), "--prefect-port", "0", "--mlflow-port", "0"]
    words += ["--tracking-uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    child = subprocess.Popen([sys.executable, "-m", "fedmat", *words], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        if child.stderr is None:
            raise AssertionError("no pipe")
        urls: list[str] = []
        until = time.monotonic() + 150
        while len(urls) < 2 and time.monotonic() < until:
            urls += re.findall(r"http://\S+", child.stderr.readline())
        assert len(urls) == 2
        for url in urls:
            assert urllib.request.urlopen(url, timeout=20).status == 200
        child.send_signal(signal.SIGINT)
        child.wait(60)
        for url in urls:
            with pytest.raises(urllib.error.URLError):
                urllib.request.urlopen(url, timeout=5)
    finally:
        child.kill()
        child.wait()
