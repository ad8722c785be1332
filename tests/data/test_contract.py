"""The contract is one table: pandera's schema and the committed Great Expectations suites follow from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from fedmat.data import units
from fedmat.data.contract import (
    RECORD_TYPES,
    RecordType,
    censored_columns,
    gx_suite,
    pandera_schema,
    record_columns,
    record_type,
    suite_bytes,
    write_suites,
)
from fedmat.errors import ConfigError

every_type = pytest.mark.parametrize("rt", RECORD_TYPES.values(), ids=list(RECORD_TYPES))


@every_type
def test_committed_suite_is_the_one_the_contract_generates(rt: RecordType, project: Path) -> None:
    committed = project / "expectations" / f"{rt.name}.json"
    assert committed.read_bytes() == suite_bytes(rt), "run: python -m fedmat.data.contract expectations"


def test_every_committed_suite_belongs_to_a_record_type(project: Path) -> None:
    assert {p.stem for p in (project / "expectations").glob("*.json")} == set(RECORD_TYPES)


def test_module_regenerates_the_suites(tmp_path: Path, project: Path) -> None:
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "fedmat.data.contract", str(tmp_path)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == len(RECORD_TYPES)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        f"{rt.name}.json": suite_bytes(rt) for rt in RECORD_TYPES.values()
    }


def test_writing_suites_twice_changes_nothing(tmp_path: Path) -> None:
    first = {p: p.read_bytes() for p in write_suites(tmp_path)}
    assert {p: p.read_bytes() for p in write_suites(tmp_path)} == first


@every_type
def test_suite_is_plain_json_and_its_expectations_differ(rt: RecordType) -> None:
    suite = gx_suite(rt)
    assert json.loads(json.dumps(suite)) == suite
    texts = [json.dumps([e["type"], e["kwargs"]], sort_keys=True) for e in suite["expectations"]]
    assert len(set(texts)) == len(texts)


@every_type
def test_every_number_has_limits_and_a_unit_pint_reads(rt: RecordType) -> None:
    for field in rt.fields:
        if field.kind == "number":
            assert field.low is not None and field.high is not None and field.low < field.high
            assert field.unit is not None and units.known(field.unit)
        else:
            assert field.unit is None and not field.censorable and not field.measured


@every_type
def test_groups_and_identities_are_made_of_fields_and_no_group_of_an_outcome(rt: RecordType) -> None:
    names = {f.name for f in rt.fields}
    measured = {f.name for f in rt.fields if f.measured}
    assert set(rt.group) <= set(rt.unique) <= names
    assert measured and not measured & set(rt.group)


@every_type
def test_both_generators_cover_every_field(rt: RecordType) -> None:
    named = {e["kwargs"].get("column") for e in gx_suite(rt)["expectations"]}
    assert {f.name for f in rt.fields} <= named
    assert set(pandera_schema(rt).columns) == {f.name for f in rt.fields} | set(censored_columns(rt))
    assert set(pandera_schema(rt).columns) < set(record_columns(rt))


def test_a_target_may_be_required_though_the_contract_calls_it_optional() -> None:
    frame = pd.DataFrame(
        {
            **{f.name: [float("nan") if f.kind == "number" else ""] for f in record_type("alloy").fields},
            "formula": ["FeNi"],
            "temperature_k": [300.0],
        }
    )
    pandera_schema(record_type("alloy")).validate(frame)
    schema = pandera_schema(record_type("alloy"), required=("hardness_hv",))
    with pytest.raises(Exception, match="hardness_hv"):
        schema.validate(frame)


def test_unknown_record_type_and_field_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'ceramic'[\s\S]*solid_electrolyte"):
        record_type("ceramic")
    with pytest.raises(ConfigError, match=r"'colour'[\s\S]*formula"):
        record_type("alloy").field("colour")
