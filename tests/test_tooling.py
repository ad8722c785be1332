"""The project's own promises: what it needs is declared and pinned, its laws are enforced, nothing private is committed."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def settings(project: Path) -> dict[str, Any]:
    return tomllib.loads((project / "pyproject.toml").read_text())


def needs(settings: dict[str, Any]) -> dict[str, Requirement]:
    """Every requirement, also of the extras, by canonical name."""
    lists = [settings["project"]["dependencies"], *settings["project"]["optional-dependencies"].values()]
    found = [Requirement(text) for part in lists for text in part]
    return {canonicalize_name(r.name): r for r in found if r.name != "fedmat"}


def pins(project: Path) -> dict[str, str]:
    """Every pin of constraints.txt by canonical name."""
    out = {}
    for line in (project / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            out[canonicalize_name(name)] = version
    return out


def test_the_caps_and_the_pin_that_keep_a_plain_install_alive_are_there(settings: dict[str, Any]) -> None:
    found = {canonicalize_name(Requirement(t).name): Requirement(t).specifier for t in settings["project"]["dependencies"]}
    assert "0.151" not in found["fastapi"]
    assert "0.150.0" in found["fastapi"]
    assert "2.1.0" not in found["sqlalchemy"]
    assert "2.0.58" in found["sqlalchemy"]
    assert str(found["torch"]) == "==2.13.0"
    assert settings["project"]["requires-python"] == ">=3.11,<3.12"


def test_every_requirement_is_pinned_to_a_version_it_admits(settings: dict[str, Any], project: Path) -> None:
    pinned = pins(project)
    for name, requirement in needs(settings).items():
        assert name in pinned, name
        assert requirement.specifier.contains(pinned[name], prereleases=True), f"{requirement} against {pinned[name]}"


def imports(folder: Path) -> set[str]:
    """Top-level names of what the modules of a folder import."""
    out = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                out |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                out.add(node.module.split(".")[0])
    return out - set(sys.stdlib_module_names) - {"fedmat", "flows", "pipelines"}


def test_what_the_code_imports_is_declared_and_nothing_waits_for_code_to_come(settings: dict[str, Any], project: Path) -> None:
    homes = {k: {canonicalize_name(d) for d in v} for k, v in packages_distributions().items()}
    used = {name: homes.get(name, {name}) for f in ("fedmat", "flows", "pipelines") for name in imports(project / f)}
    declared = {canonicalize_name(Requirement(t).name) for t in settings["project"]["dependencies"]}
    extra = set(needs(settings)) - declared
    for name, packages in used.items():
        assert packages & (declared | extra), f"'{name}' is imported and not declared"
    behind_others = {"fastapi", "pyarrow", "openpyxl"}  # capped for Prefect; read through pandas
    unused = declared - behind_others - {p for packages in used.values() for p in packages}
    assert unused == set()


def test_every_module_that_runs_for_the_consortium_is_under_law_1(settings: dict[str, Any], project: Path) -> None:
    contracts = {c["id"]: c for c in settings["tool"]["importlinter"]["contracts"]}
    guarded = set(contracts["trust-boundary"]["source_modules"])
    assert {"fedmat.aggregation", "fedmat.federation.coordinator"} <= guarded
    for later in ("ledger", "contribution"):
        if (project / "fedmat" / later).exists() or (project / "fedmat" / f"{later}.py").exists():
            assert f"fedmat.{later}" in guarded
    assert set(contracts["trust-boundary"]["forbidden_modules"]) == {"fedmat.data", "fedmat.features", "fedmat.federation.site"}


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BIN / "lint-imports", "--no-cache", "--no-logo"], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def copy(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's code, to be broken."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("fedmat", "flows", "pipelines"):
        shutil.copytree(project / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(project / "pyproject.toml", folder)
    return folder


def test_the_import_rules_hold(copy: Path) -> None:
    done = lint_imports(copy)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "line", "rule"),
    [
        ("fedmat/aggregation/linear.py", "from fedmat.data import contract", "Law 1"),
        ("fedmat/federation/scaling.py", "from fedmat.features import table", "Law 1"),  # the coordinator imports it
        ("fedmat/data/units.py", "from fedmat import wire", "Layers"),
        ("fedmat/pipeline.py", "import flows", "starts flows"),
        ("fedmat/pipeline.py", "import prefect", "Prefect"),
        ("fedmat/serving.py", "import mlflow", "MLflow"),
    ],
)
def test_breaking_an_import_rule_is_noticed(copy: Path, module: str, line: str, rule: str) -> None:
    path = copy / module
    before = path.read_text()
    try:
        path.write_text(f"{before}\n\ndef _hidden() -> None:\n    {line}\n")
        done = lint_imports(copy)
    finally:
        path.write_text(before)
    assert done.returncode != 0
    assert any(rule in row and "BROKEN" in row for row in done.stdout.splitlines()), done.stdout


def committed(project: Path) -> list[Path]:
    """Files that git has or would take."""
    if not (project / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=project, capture_output=True, text=True, check=True
    )
    return [project / name for name in listed.stdout.split("\0") if name and (project / name).is_file()]


def test_no_file_names_a_machine_or_a_package_index(project: Path) -> None:
    words = ["/wo" + "rk/", "/ro" + "ot/", "file" + "://" + "/opt", "py" + "pi.org", "python" + "hosted", "index-" + "url"]
    found = []
    for path in committed(project):
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{path.relative_to(project)}: {word}" for word in words if word in text]
    assert found == []


def test_the_set_up_is_one_stamp_that_depends_on_what_is_installed(project: Path) -> None:
    text = (project / "Makefile").read_text()
    assert re.search(r"^\$\(STAMP\): pyproject\.toml constraints\.txt$", text, re.MULTILINE)
    assert "-c constraints.txt" in text
    phony = next(line for line in text.splitlines() if line.startswith(".PHONY:"))
    targets = set(re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE))
    assert {"demo", "test", "check", "bench", "docs", "ui", "clean", "help"} <= targets == set(phony.split()[1:])


def test_the_ci_command_runs_the_readmes_tests_and_ends_with_pytests_closing_line(project: Path, tmp_path: Path) -> None:
    assert re.search(r"^make test\b", (project / "README.md").read_text(), re.MULTILINE)
    stand_in = tmp_path / "make"
    stand_in.write_text('#!/bin/sh\necho "asked for: $*"\necho "== 1 failed, 2 passed in 3.21s =="\necho later\nexit 3\n')
    stand_in.chmod(0o755)
    done = subprocess.run(
        ["bash", project / ".ci" / "run"],
        capture_output=True,
        text=True,
        env={"PATH": f"{tmp_path}:/usr/local/bin:/usr/bin:/bin"},
    )
    assert done.returncode == 3
    assert "asked for: test" in done.stdout
    assert done.stdout.splitlines()[-1] == "== 1 failed, 2 passed in 3.21s =="
