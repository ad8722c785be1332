"""Laws of the files a person writes: every mistake is named with its place and the nearest valid key."""

from __future__ import annotations

import copy
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmat.config import Column, MixtureColumns, SiteConfig, Splits, load_consortium, load_site, parse_settings
from fedmat.errors import ConfigError

SITE: dict[str, Any] = {
    "site": "alpha",
    "organisation": "Alpha Ltd",
    "record_type": "solid_electrolyte",
    "sources": [
        {
            "adapter": "csv",
            "path": "data.csv",
            "columns": {
                "formula": "Formula",
                "temperature_k": {"from": "T", "unit": "degC"},
                "solvents": {"fractions": {"EC": "EC"}},
            },
            "constants": {"doi": "10.1/x"},
            "structures": {"path": "cif", "on": "ID"},
        }
    ],
}
CONSORTIUM: dict[str, Any] = {
    "name": "demo",
    "title": "Demo",
    "task": {"name": "sigma", "record_type": "solid_electrolyte", "target": "conductivity_s_cm", "unit": "S/cm"},
    "features": ["composition", {"name": "conditions", "options": {"fields": ["temperature_k"]}}],
    "members": [
        {"site": "beta", "organisation": "B", "file": "b.yaml"},
        {"site": "alpha", "organisation": "A", "file": "a.yaml"},
    ],
}


def changed(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    *parents, last = path.split(".")
    at: Any = raw
    for part in parents:
        at = at[int(part)] if part.isdigit() else at[part]
    at[last] = value
    return raw


def refusal(folder: Path, raw: Any, load: Any = load_site) -> str:
    file = folder / "file.yaml"
    file.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(file) in str(caught.value)
    assert caught.value.fix
    return str(caught.value)


def test_short_and_long_forms_mean_the_same() -> None:
    site = parse_settings(SiteConfig, SITE, Path("site.yaml"))
    columns = site.sources[0].columns
    assert columns["formula"] == Column(source="Formula")
    assert isinstance(columns["solvents"], MixtureColumns)
    assert site.sources[0].constants["doi"].value == "10.1/x"
    again = parse_settings(SiteConfig, SITE | {"sources": [site.sources[0]]}, Path("site.yaml"))
    assert again == site


@pytest.mark.parametrize(
    ("path", "value", "place", "hint"),
    [
        ("organization", "x", "organization: unknown key", "did you mean 'organisation'?"),
        ("sources.0.colums", {}, "sources.0.colums", "did you mean 'columns'?"),
        (
            "sources.0.columns.temperature_k",
            {"from": "T", "unti": "K"},
            "sources.0.columns.temperature_k.unti:",
            "did you mean 'unit'?",
        ),
        ("sources.0.columns.temperature_k", {"form": "T"}, "sources.0.columns.temperature_k.form:", "did you mean 'from'?"),
        (
            "sources.0.columns.solvents",
            {"fractions": {"EC": "EC"}, "percnt": True},
            "solvents.percnt:",
            "did you mean 'percent'?",
        ),
        ("sources.0.columns.solvents", {"fractions": {"EC": "EC"}, "zz": 1}, "solvents.zz:", "valid keys: fractions, percent"),
        (
            "sources.0.columns.temperature_k",
            {"from": "T", "zz": 1},
            "temperature_k.zz:",
            "valid keys: chain_ends, from, replace, strip, unit",
        ),
        ("sources.0.constants.doi", {"valu": 1}, "sources.0.constants.doi.valu:", "did you mean 'value'?"),
        ("sources.0.structures.onn", "x", "sources.0.structures.onn", "did you mean 'on'?"),
    ],
)
def test_an_unknown_key_is_refused_in_its_place_with_the_nearest_valid_one(
    tmp_path: Path, path: str, value: Any, place: str, hint: str
) -> None:
    text = refusal(tmp_path, changed(SITE, path, value))
    assert place in text
    assert hint in text


@pytest.mark.parametrize("value", [{"unit": "K"}, {"from": "T", "unti": "K"}, 7, ["T"], None])
def test_a_wrong_column_speaks_of_columns_and_never_of_both_branches(tmp_path: Path, value: Any) -> None:
    text = refusal(tmp_path, changed(SITE, "sources.0.columns.temperature_k", value))
    assert "sources.0.columns.temperature_k" in text
    assert "MixtureColumns" not in text
    assert "fractions" not in text
    assert ".Column" not in text


def test_a_wrong_mixture_speaks_of_mixtures_only(tmp_path: Path) -> None:
    text = refusal(tmp_path, changed(SITE, "sources.0.columns.solvents", {"fractions": {"EC": 3}}))
    assert "sources.0.columns.solvents.fractions.EC:" in text
    assert "from" not in text.split("fix:")[0]


@pytest.mark.parametrize(
    ("path", "value", "hint"),
    [
        ("task.targt", "x", "did you mean 'target'?"),
        ("features", [{"name": "composition", "option": {}}], "did you mean 'options'?"),
        ("plan", {"server": {"learning_rate": 1}}, "plan.server.learning_rate: unknown key"),
        ("plan", {"local": {"step": 1}}, "did you mean 'steps'?"),
        ("plan", {"rounds": 0}, "plan.rounds"),
        ("features", [], "features"),
        ("task.kind", "binary", "needs a threshold"),
        ("members", [{"site": "a", "organisation": "A", "file": "a"}] * 2, "two members are called a"),
        ("name", "Has Blanks", "name"),
    ],
)
def test_a_consortium_s_mistakes_are_named(tmp_path: Path, path: str, value: Any, hint: str) -> None:
    assert hint in refusal(tmp_path, changed(CONSORTIUM, path, value), load_consortium)


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    text = refusal(tmp_path, changed(changed(SITE, "organization", "x"), "sources.0.colums", {}))
    assert "organization" in text
    assert "colums" in text


def test_on_and_no_are_words_as_people_mean_them(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(
        textwrap.dedent(
            """\
            site: alpha
            organisation: Alpha
            record_type: solid_electrolyte
            sources:
            - adapter: csv
              path: d.csv
              options: {flag: true, word: yes}
              columns: {formula: F}
              where: {usable: no}
              structures: {path: cif, on: ID}
            """
        )
    )
    source = load_site(tmp_path / "site.yaml").sources[0]
    assert source.structures is not None
    assert source.structures.on == "ID"
    assert source.where == {"usable": "no"}
    assert source.options == {"flag": True, "word": "yes"}


def test_a_key_given_twice_is_refused_instead_of_the_last_one_winning(tmp_path: Path) -> None:
    text = refusal(tmp_path, "site: alpha\norganisation: A\nsite: beta\n")
    assert "line 3" in text
    assert "'site' is given twice" in text


@pytest.mark.parametrize(
    ("raw", "hint"), [("a: [1", "not valid YAML"), ("- 1\n", "expected a mapping"), ("", "expected a mapping")]
)
def test_what_is_no_mapping_is_refused(tmp_path: Path, raw: str, hint: str) -> None:
    assert hint in refusal(tmp_path, raw)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_site(tmp_path / "none.yaml")


def test_a_field_to_keep_together_is_named_once() -> None:
    assert Splits(keep_together=["doi"]).keep_together == ("doi",)
    with pytest.raises(ValueError, match="named twice"):
        Splits(keep_together=("doi", "doi"))
