"""prefect.yaml says what the code and the example consortium say."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml

from fedmat.config import load_consortium


@pytest.fixture(scope="module")
def deployments(project: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load((project / "prefect.yaml").read_text())["deployments"])


def test_every_member_has_its_own_work_pool(deployments: list[dict[str, Any]], project: Path) -> None:
    roster = load_consortium(project / "examples/cells/consortium.yaml").roster
    pools = {d["parameters"]["site"]: d["work_pool"]["name"] for d in deployments if "site" in d["parameters"]}
    assert pools == {site: f"site-{site}" for site in roster}


def test_entry_points_exist_and_take_the_parameters(deployments: list[dict[str, Any]], project: Path) -> None:
    for d in deployments:
        path, name = d["entrypoint"].split(":")
        flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
        inspect.signature(flow.fn).bind(**d["parameters"])
        file = Path(d["parameters"].get("consortium", "/"))
        assert file.is_absolute() or (project / file).is_file()


def test_schedules_name_their_time_zone(deployments: list[dict[str, Any]]) -> None:
    schedules = [s for d in deployments for s in d.get("schedules", [])]
    assert schedules
    for s in schedules:
        assert ZoneInfo(s["timezone"])
        assert len(s["cron"].split()) == 5


def test_no_party_works_in_another_partys_pool(deployments: list[dict[str, Any]]) -> None:
    """A worker executes whatever its pool holds, so a pool belongs to one party."""
    owners: dict[str, set[str]] = {}
    for d in deployments:
        given = d["parameters"]
        owner = given.get("site") or (Path(given["home"]).name if "home" in given else "")
        owners.setdefault(d["work_pool"]["name"], set()).add(owner or ("operator" if "project" in given else "consortium"))
    assert all(len(found) == 1 for found in owners.values()), owners
    assert owners["operator"] == {"operator"}


def test_a_run_that_is_due_while_another_goes_is_left_out(deployments: list[dict[str, Any]]) -> None:
    for d in deployments:
        if d.get("schedules"):
            assert d["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}


def test_what_runs_unattended_has_a_hook_for_its_failure(deployments: list[dict[str, Any]]) -> None:
    from flows.shared import alert

    for d in deployments:
        if d["name"] in ("nightly", "nightly-between-organisations", "prepare-at-home"):
            path, name = d["entrypoint"].split(":")
            flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
            assert flow.on_failure_hooks == flow.on_crashed_hooks == [alert]
