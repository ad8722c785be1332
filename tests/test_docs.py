"""Documentation that works: commands parse, targets and links exist, the tree in the architecture is the tree on disk."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from fedmat.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("mlruns/*.md")])


def commands(page: Path) -> list[tuple[int, list[str]]]:
    """Every command line of a page's shell blocks, with its line number, split into words."""
    found, block, joined = [], None, ""
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.strip().startswith("```"):
            block = line.strip().removeprefix("```") if block is None else None
            continue
        if block not in ("bash", "sh", "console", "shell", ""):
            continue
        joined += line.strip().removeprefix("$ ")
        if joined.endswith("\\"):
            joined = joined[:-1] + " "
            continue
        try:
            words = shlex.split(joined, comments=True)
        except ValueError:  # prose or a drawing, not a command
            words = []
        if words:
            found.append((number, words))
        joined = ""
    return found


def calls(program: str) -> list[Any]:
    """Every call of ``program`` in the documentation, as pytest parameters; also those written inline as code."""
    out = []
    for page in PAGES:
        where = page.relative_to(ROOT)
        out += [pytest.param(w[1:], id=f"{where}:{n}") for n, w in commands(page) if w[0] == program and len(w) > 1]
        for number, line in enumerate(page.read_text().splitlines(), start=1):
            for code in re.findall(rf"`({program} [^`]+)`", line):
                if re.fullmatch(r"[\w ./@:=-]+", code) and not re.search(r"\b[A-Z]{3,}\b|\.\.\.| / ", code):
                    out.append(pytest.param(shlex.split(code)[1:], id=f"{where}:{number}:inline"))
    return out


def help_examples() -> list[Any]:
    """The examples that the help texts give."""
    out = []

    def walk(command: Any, path: tuple[str, ...]) -> None:
        for line in (command.help or "").splitlines():
            if line.strip().startswith("Example:"):
                out.append(pytest.param(shlex.split(line.split("Example:")[1])[1:], id=f"help of {' '.join(path)}"))
        for name, child in getattr(command, "commands", {}).items():
            walk(child, (*path, name))

    walk(typer.main.get_command(app), ("fedmat",))
    return out


def parse(words: list[str]) -> None:
    """Parses a fedmat command line to its last option without running it."""
    command: Any = typer.main.get_command(app)
    context, rest = None, list(words)
    while True:
        context = command.make_context(command.name, rest, parent=context, resilient_parsing=False)
        if not hasattr(command, "commands"):
            return
        rest = [*getattr(context, "_protected_args", []), *context.args]
        name, command, rest = command.resolve_command(context, rest)
        if command is None:
            raise AssertionError(name)


@pytest.mark.parametrize("words", [*calls("fedmat"), *help_examples()])
def test_every_fedmat_command_that_is_documented_parses(words: list[str]) -> None:
    if words[-1] in ("--help", "--version"):
        return
    path: list[str] = []
    group: Any = typer.main.get_command(app)
    for word in words:  # a command that is only named, like `fedmat site check`, must exist
        if word not in getattr(group, "commands", {}):
            break
        group = group.commands[word]
        path.append(word)
    if path == words:
        return
    parse(words)
    for word in words:
        if word.startswith("examples/"):
            assert (ROOT / word).is_file(), word


def test_a_wrong_command_in_a_page_would_be_noticed() -> None:
    for words in (["rum", "x"], ["run", "x.yaml", "--ronds", "3"], ["run", "x.yaml", "--rounds", "many"], ["site", "chk", "x"]):
        with pytest.raises(Exception, match=r".") as caught:
            parse(words)
        assert (
            "Usage" in type(caught.value).__name__
            or "Bad" in type(caught.value).__name__
            or "NoSuch" in type(caught.value).__name__
        )


@pytest.mark.parametrize("words", calls("make"))
def test_every_make_target_that_is_documented_exists(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word in words:
        assert "=" in word or word in targets


def anchors(page: Path) -> set[str]:
    """Addresses of a page's headings."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name}: {target}"


def test_the_tree_in_the_architecture_is_the_tree_on_disk() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    tree = text.split("## The tree")[1].split("```")[1]
    drawn, folder = set(), ""
    for line in tree.splitlines():
        if re.match(r"  [a-z]+/", line):
            folder = line.split("/")[0].strip() + "/"
        elif nested := re.match(r"    ([a-z]+/) ", line):
            folder += nested[1]
        elif re.match(r"  \S", line):
            folder = ""
        if re.match(r"\s+[\w]+\.py|\s+[a-z]+/", line):
            drawn |= {folder + name for name in re.findall(r"\b(\w+\.py)\b", line)}
    there = {str(p.relative_to(ROOT / "fedmat")) for p in (ROOT / "fedmat").rglob("*.py")}
    assert drawn == {name for name in there if not Path(name).name.startswith("_")}
    assert set(re.findall(r"^(\w+)/ ", tree, re.MULTILINE)) <= {p.name for p in ROOT.iterdir()}


def test_the_layers_in_the_architecture_are_those_that_are_enforced() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = next(c["layers"] for c in settings["tool"]["importlinter"]["contracts"] if c["id"] == "layers")
    enforced = [set(re.findall(r"[a-z]\w+", re.sub(r"\([^)]*\)|\b_\w+", "", row))) for row in layers]
    text = (ROOT / "docs" / "architecture.md").read_text().split("## Layers")[1].split("\n## ")[0]
    stated = [set(re.findall(r"`(\w+)`", row.split("|")[2])) for row in re.findall(r"^\|.*\|$", text, re.MULTILINE)[3:]]
    assert stated == [row for row in enforced if row]


def test_the_contract_as_documented_is_the_contract() -> None:
    from fedmat.data.contract import RECORD_TYPES

    text = (ROOT / "docs" / "contract.md").read_text()
    for rt in RECORD_TYPES.values():
        part = text.split(f"## {rt.name}\n")[1].split("\n#")[0]
        rows = [[c.strip() for c in row.strip("|").split("|")] for row in re.findall(r"^\| `.*\|$", part, re.MULTILINE)]
        assert [row[0].strip("`") for row in rows] == [f.name for f in rt.fields]
        for row, field in zip(rows, rt.fields, strict=True):
            unit = (field.unit or "none") if field.kind == "number" else ""
            limits = (
                f"{field.low:g} to {field.high:g}" if field.low is not None else ", ".join(c for c in field.categories if c)
            )
            need = "yes" if field.required else "if it is the target" if field.measured else "no"
            assert row[1:] == [field.kind, unit, limits, need, field.about], field.name
        assert all(f"`{name}`" in part.split("| Field")[0] for name in rt.group)


@pytest.mark.parametrize("kind", ["SiteConfig", "ConsortiumConfig"])
def test_the_settings_files_that_are_shown_are_valid(kind: str) -> None:
    import yaml

    from fedmat import config

    text = (ROOT / "docs" / "bring-your-own-data.md").read_text()
    shown = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    mine = next(s for s in shown if ("sources" in s) == (kind == "SiteConfig"))
    getattr(config, kind).model_validate(mine)


def test_the_adapters_as_documented_are_those_there_are() -> None:
    from fedmat.data.adapters import ADAPTERS

    part = (ROOT / "docs" / "bring-your-own-data.md").read_text().split("| adapter |")[1].split("\n\n")[0]
    rows = {r[0]: set(re.findall(r"`(\w+)`", r[1])) for r in re.findall(r"^\| `(\w+)` \|([^|]*)\|[^|]*\|$", part, re.MULTILINE)}
    assert rows == {name: set(kind.OPTIONS or ()) for name, kind in ADAPTERS.items()}
