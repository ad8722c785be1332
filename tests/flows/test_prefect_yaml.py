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
        assert (project / d["parameters"]["consortium"]).is_file()


def test_schedules_name_their_time_zone(deployments: list[dict[str, Any]]) -> None:
    schedules = [s for d in deployments for s in d.get("schedules", [])]
    assert schedules
    for s in schedules:
        assert ZoneInfo(s["timezone"])
        assert len(s["cron"].split()) == 5
