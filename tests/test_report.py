"""The report: one honest page without network, made from a run's files and nothing else."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat import figures, files, report, verdict, wire
from fedmat import weights as wts
from fedmat.errors import StateError
from fedmat.figures import Point


class _Page(html.parser.HTMLParser):
    """Tags, attributes and visible text of a page."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.build(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def page(finished: Path) -> _Page:
    read = _Page(report.write(finished).read_text(encoding="utf-8"))
    assert read.open == []
    return read


def _metrics(folder: Path) -> dict[str, Any]:
    return dict(files.read_json(folder / "metrics.json"))


def test_the_page_needs_no_network(page: _Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed"}
        for name in ("src", "href", "xlink:href", "action"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")


def test_every_plot_has_a_text_alternative_and_no_identifier_is_used_twice(page: _Page) -> None:
    plots = [a for t, a in page.tags if t == "svg"]
    assert len(plots) == 7 and all(a.get("role") == "img" and a.get("aria-label") for a in plots)
    used = [a["id"] for t, a in page.tags if a.get("id") and t not in {"path", "clippath"}]
    assert len(used) == len(set(used))


def test_equal_files_give_equal_pages(finished: Path, page: _Page) -> None:
    first = (finished / "report.html").read_bytes()
    assert report.write(finished).read_bytes() == first


def test_the_page_names_every_site_dataset_version_exclusion_and_reason(finished: Path, page: _Page) -> None:
    metrics = _metrics(finished)
    for site, row in metrics["sites"].items():
        assert site in page.text and row["organisation"] in page.text and row["dataset_sha256"] in page.text
        assert all(reason in page.text for reason in row["rejected"])
    for x in metrics["exclusions"]:
        assert x["detail"] in page.text
    for name in ("plan.json", "model.safetensors", "evaluations.json"):
        assert files.sha256_file(finished / name) in page.text
    assert page.text.count("proved") >= 5 and "refuted" not in page.text


def test_a_site_that_loses_is_told_so_first(finished: Path) -> None:
    told = verdict.verdict(_metrics(finished))
    assert "Three of four sites gain on their own materials, all of them clearly" in told[0][0]
    assert "; NASICON NV only by fine-tuning the joint model." in told[0][0]
    loss = next(i for i, (words, _) in enumerate(told) if "worse" in words and "joint model than" in words)
    win = next(i for i, (words, _) in enumerate(told) if "better" in words and "joint model than" in words)
    assert loss < win and len(told[loss][1]) == 1 and told[loss][1][0].startswith("NASICON NV (nasicon-nv): ")


def test_a_gain_within_the_intervals_is_not_called_clear(finished: Path) -> None:
    metrics = _metrics(finished)
    for row in metrics["sites"].values():
        for m in row["own"].values():
            m |= {"mae_low": 0.0, "mae_high": 9.0}
    told = verdict.verdict(metrics)
    assert "Three of four sites gain on their own materials, none of them clearly" in told[0][0]
    assert all("could be chance" in line for _, lines in told for line in lines)
    metrics["sites"]["garnet-gmbh"]["own"]["local"]["mae_low"] = None
    assert "clearly" not in verdict.verdict(metrics)[0][0]


def test_a_model_no_better_than_the_mean_is_called_useless(tmp_path: Path) -> None:
    told = verdict.verdict(_metrics(runs.build(tmp_path, scale=6.0)))
    words = " ".join(text for text, _ in told)
    assert "None of four sites gain on their own materials" in words
    assert "has learned nothing of use" in words and "% worse" in words


def test_a_consortium_of_companies_pools_nothing_and_says_so(tmp_path: Path) -> None:
    page = _Page(report.write(runs.build(tmp_path, simulated=False)).read_text())
    assert "not permitted: records are never pooled" in page.text
    assert "outside a simulated consortium they stay at their site" in page.text
    assert "simulated: one operator" not in page.text


def test_a_binary_task_speaks_of_ranks(tmp_path: Path) -> None:
    folder = runs.build(tmp_path, task=runs.SUPERIONIC)
    page = _Page(report.write(folder).read_text())
    assert "AUC" in page.text and "RMSE" not in page.text and "times in 100" in page.text
    rows = report.table(_metrics(folder))
    assert rows[-1]["own_federated"] is None and rows[-1]["global_federated"] is not None


@pytest.mark.parametrize(
    "name", ["metrics.json", "rounds.jsonl", "evaluations.json", "timings.json", "plan.json", "attestations.json"]
)
def test_missing_evidence_is_named_and_never_a_pass(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_plots", lambda e: {})
    folder = runs.build(tmp_path)
    (folder / name).unlink()
    text = _Page(report.write(folder).read_text()).text
    assert f"{name} – not evidenced" in text
    assert "refuted" not in text


def test_an_empty_run_folder_still_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    text = _Page(report.write(tmp_path / "run").read_text()).text
    assert "What this run achieved is not evidenced" in text and "proved" not in text.replace("What the files", "")


def test_a_changed_model_file_is_refuted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_plots", lambda e: {})
    folder = runs.build(tmp_path)
    with (folder / "model.safetensors").open("ab") as handle:
        handle.write(b"x")
    text = _Page(report.write(folder).read_text()).text
    assert "model.safetensors: SHA-256 is" in text and "model.safetensors cannot be read" in text


def test_another_model_than_the_last_rounds_is_refuted_and_a_missing_one_is_not_evidenced(tmp_path: Path) -> None:
    folder = runs.build(tmp_path)
    model = wire.load_model(folder / "model.safetensors")

    def last_round() -> str:
        return next(verdict_ for claim, verdict_, _ in report._checks(report.Evidence.read(folder)) if "last round" in claim)

    assert last_round() == "proved"
    spec = {**model.spec, "interval": {"level": 0.9, "half_width": 9.0, "sites": {}}}
    wire.save_model(dataclasses.replace(model, spec=spec), folder / "model.safetensors")
    assert last_round() == "proved", "what is said about the weights is not what the rounds made"
    wire.save_model(dataclasses.replace(model, weights=wts.zeros_like(model.weights)), folder / "model.safetensors")
    assert last_round() == "refuted"
    (folder / "model.safetensors").unlink()
    assert last_round() == "not evidenced"


def test_no_run_folder_and_a_damaged_file_are_state_errors(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no such run folder"):
        report.write(tmp_path / "nowhere")
    folder = runs.build(tmp_path)
    (folder / "rounds.jsonl").write_text('{"round": 0}\n{"rou')
    with pytest.raises(StateError, match=r"rounds\.jsonl"):
        report.write(folder)


def test_names_cannot_write_into_the_page(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&\"' $x_2$ #0072b1"
    folder = runs.build(tmp_path, sites={"a": evil, "b": "B & Sons"}, title=evil)
    rounds = (folder / "rounds.jsonl").read_text().replace("no answer within 120 s", "<img src=x onerror=alert(1)>")
    (folder / "rounds.jsonl").write_text(rounds)
    metrics = _metrics(folder)
    metrics["exclusions"][0]["detail"] = "<img src=x onerror=alert(1)>"
    metrics["sites"]["a"]["rejected"] = {"<b>bold</b>": 3}
    metrics["task"]["metric_unit"] = "<i>x</i>"
    files.write_json(folder / "metrics.json", metrics)
    page = _Page(report.write(folder).read_text())
    assert {t for t, _ in page.tags}.isdisjoint({"script", "img", "b", "i"})
    assert "<script>alert(1)</script>" in page.text and "<b>bold</b>" in page.text


def test_the_registry_is_shown_without_paths_or_passwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_plots", lambda e: {})
    folder = runs.build(tmp_path)
    entry = {"name": "fedmat-x", "version": 3, "aliases": ["champion"], "reason": "champion: there was none before"}
    files.write_json(folder / "registered.json", {**entry, "tracking_uri": "sqlite:////secret/mlflow.db"})
    text = _Page(report.write(folder).read_text()).text
    assert "fedmat-x version 3, alias champion" in text and "secret" not in text
    files.write_json(folder / "registered.json", {**entry, "tracking_uri": "https://me:secret@mlflow.example"})
    text = _Page(report.write(folder).read_text()).text
    assert "https://mlflow.example" in text and "secret" not in text


def test_the_table_is_what_the_metrics_say(finished: Path) -> None:
    metrics = _metrics(finished)
    rows = report.table(metrics)
    assert [r["site"] for r in rows] == [*sorted(runs.SITES), "all sites"] and json.loads(json.dumps(rows)) == rows
    loser = rows[3]
    own = metrics["sites"]["nasicon-nv"]["own"]
    assert (
        loser["gain_percent"] == pytest.approx(100 * (1 - own["federated"]["mae"] / own["local"]["mae"]))
        and loser["gain_percent"] < 0
    )
    assert loser["best"] == "finetuned"
    # all own slices together are the global test, so the joint model's errors must agree
    assert rows[-1]["own_federated"] == pytest.approx(metrics["global"]["federated"]["mae"])


@given(
    rows=st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 9.0)), min_size=1, max_size=5),
    metric=st.sampled_from(["mae", "rmse"]),
)
@settings(max_examples=50, deadline=None)
def test_joined_slices_equal_the_metric_of_all_rows(rows: list[tuple[int, float]], metric: str) -> None:
    errors = [np.full(n, e) for n, e in rows]

    def one(x: np.ndarray) -> float:
        return float(np.abs(x).mean() if metric == "mae" else np.sqrt(np.square(x).mean()))

    m = {
        "task": {"metric": metric},
        "sites": {str(i): {"n_test": len(x), "own": {"local": {"n": len(x), metric: one(x)}}} for i, x in enumerate(errors)},
    }
    assert verdict._joined(m, "local") == pytest.approx(one(np.concatenate(errors)))


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "not evidenced"), (0.4567, "0.457"), (1234.6, "1,235"), (100.0, "100"), (12, "12"), (1.2e-7, "1.20e-07")],
)
def test_numbers_have_three_digits(value: object, text: str) -> None:
    assert verdict.number(value) == text


def test_a_gain_is_an_error_taken_away_or_an_auc_added() -> None:
    assert verdict.gain(2.0, 1.0, "mae") == 50.0 and verdict.gain(0.5, 0.75, "auc") == 50.0
    assert verdict.gain(None, 1.0, "mae") is None and verdict.gain(0.0, 1.0, "mae") is None


def test_a_missed_round_leaves_a_gap_and_a_logarithm_no_tex() -> None:
    drawn = figures.curves({"loss": {"a": [(1, 1000.0), (2, 10.0), (4, 1.0)]}}, "round", "about")
    assert "mathdefault" not in drawn and "<metadata" not in drawn
    x, y = figures._gapped([(1, 3.0), (2, 2.0), (4, 1.0)])
    assert x == [1, 2, 3, 4] and np.isnan(y[2])


def test_colours_follow_the_pages_colour_scheme() -> None:
    drawn = figures.intervals({"a": {"local": Point(1.0, 0.9, 1.1)}}, {"local": "local only"}, "MAE", "about")
    assert "var(--series-1)" in drawn and "#e69f01" not in drawn and "var(--ink)" in drawn
