"""Every code a person or a script may meet is in docs/error-catalogue.md, and the catalogue lists no other.

Codes are read from the source, not imported: a reason that is raised only in a rare case is found like any other.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*ROOT.glob("fedmat/**/*.py"), *ROOT.glob("flows/**/*.py")])
PAGE = ROOT / "docs" / "error-catalogue.md"


class Unresolved(Exception):
    """Where a reason is made in a way that this test cannot follow."""


class Module:
    """A source file in which the texts that a name may stand for can be looked up."""

    def __init__(self, source: str, name: str) -> None:
        self.name, self.tree = name, ast.parse(source)
        self._parent = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}
        self.calls = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call)]

    def texts(self, node: ast.expr | None) -> set[str]:
        """Returns every text an expression may have: constants, choices, names bound to them, parameters given them."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return {node.value}
        if isinstance(node, ast.IfExp):
            return self.texts(node.body) | self.texts(node.orelse)
        if isinstance(node, ast.JoinedStr):
            return {"".join(parts) for parts in product(*(self.texts(part) for part in node.values))}
        if isinstance(node, ast.FormattedValue):
            return self.texts(node.value)
        if isinstance(node, ast.Attribute) and node.attr == "reason":
            return set()  # an error's reason, passed on: it was counted where that error is made
        if isinstance(node, ast.Name):
            return self._named(node)
        raise Unresolved(f"{self.name}:{getattr(node, 'lineno', 0)}")

    def _named(self, node: ast.Name) -> set[str]:
        for function in self._around(node):
            found = [self.texts(value) for value in self._bound(function, node.id)]
            if found:
                return set().union(*found)
            arguments = function.args.posonlyargs + function.args.args
            if node.id in [a.arg for a in arguments + function.args.kwonlyargs]:
                return self._given(function, node)
        raise Unresolved(f"{self.name}:{node.lineno} {node.id}")

    def _around(self, node: ast.AST) -> Iterator[ast.FunctionDef]:
        while node in self._parent:
            node = self._parent[node]
            if isinstance(node, ast.FunctionDef):
                yield node

    def _bound(self, function: ast.FunctionDef, name: str) -> Iterator[ast.expr]:
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                pairs = [(target, node.value) for target in node.targets]
            elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple | ast.List):
                pairs = [(node.target, value) for value in node.iter.elts]
            else:
                continue
            for target, value in pairs:
                if isinstance(target, ast.Name) and target.id == name:
                    yield value
                elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                    yield from (v for t, v in zip(target.elts, value.elts) if isinstance(t, ast.Name) and t.id == name)

    def _given(self, function: ast.FunctionDef, node: ast.Name) -> set[str]:
        if function.name.startswith("_rebuild"):  # an error on its way between processes
            return set()
        names = [a.arg for a in function.args.posonlyargs + function.args.args]
        if names[:1] in (["self"], ["cls"]):
            names = names[1:]
        found = set()
        for call in self.calls:
            if _name(call.func) != function.name:
                continue
            by_name = {k.arg: k.value for k in call.keywords}
            at = names.index(node.id) if node.id in names else len(call.args)
            found |= self.texts(call.args[at] if at < len(call.args) else by_name.get(node.id))
        if not found:
            raise Unresolved(f"{self.name}:{node.lineno} {node.id} of {function.name}")
        return found


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


MODULES = [Module(path.read_text(), str(path.relative_to(ROOT))) for path in SOURCES]


def classes(modules: list[Module]) -> dict[str, int]:
    """Returns every error of fedmat's with its exit code."""
    defined = [n for m in modules for n in ast.walk(m.tree) if isinstance(n, ast.ClassDef)]
    found = {"FedmatError": 1}
    while True:
        fresh = {}
        for node in defined:
            base = next((found[_name(b)] for b in node.bases if _name(b) in found), None)
            if base is None or node.name in found:
                continue
            own = [s.value for s in node.body if isinstance(s, ast.Assign) and _name(s.targets[0]) == "exit_code"]
            fresh[node.name] = ast.literal_eval(own[0]) if own else base
        if not fresh:
            return found
        found |= fresh


def reasons(modules: list[Module]) -> set[str]:
    """Returns the first words of all ProtocolErrors."""
    kinds = {"ProtocolError"}
    for module in modules:
        kinds |= {
            n.name for n in ast.walk(module.tree) if isinstance(n, ast.ClassDef) and "ProtocolError" in map(_name, n.bases)
        }
    calls = [(m, call) for m in modules for call in m.calls if _name(call.func) in kinds]
    return set().union(*(m.texts(call.args[0]) for m, call in calls))


def literal(kind: str) -> set[str]:
    """Returns the reasons that a class of fedmat/domain.py may have."""
    tree = next(m.tree for m in MODULES if m.name == "fedmat/domain.py")
    node = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == kind)
    field = next(s for s in node.body if isinstance(s, ast.AnnAssign) and _name(s.target) == "reason")
    return {str(n.value) for n in ast.walk(field.annotation) if isinstance(n, ast.Constant)}


def clauses() -> set[str]:
    """Returns the families of clauses that a policy has."""
    tree = next(m.tree for m in MODULES if m.name == "fedmat/policy.py")
    kinds = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    fields = [s for s in kinds["Policy"].body if isinstance(s, ast.AnnAssign)]
    return {_name(s.target) + (".*" if _name(s.annotation) in kinds else "") for s in fields}


def troubles() -> dict[str, set[str]]:
    """Returns what a status says of a log -> the texts in the log that it stands for."""
    tree = next(m.tree for m in MODULES if m.name == "flows/parties.py")
    value = next(n.value for n in ast.walk(tree) if isinstance(n, ast.Assign) and _name(n.targets[0]) == "_TROUBLES")
    found: dict[str, set[str]] = {}
    for pattern, words in ast.literal_eval(value):
        found.setdefault(words, set()).add(pattern)
    return found


def rows(heading: str) -> list[list[str]]:
    """Returns the cells of the rows of all tables below a heading of the catalogue."""
    text = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in re.findall(r"^\|.*\|$", text, re.MULTILINE)]
    return [cells for cells in found if cells[0] != "---" and "---" not in cells[0] and not cells[0][:1].isupper()]


def listed(heading: str) -> set[str]:
    """Returns the codes below a heading; each stands there once, and says what it means, who acts and how."""
    found = rows(heading)
    codes = Counter(cells[0].strip("`") for cells in found)
    assert [code for code, times in codes.items() if times > 1] == []
    assert [cells for cells in found if len(cells) != 4 or not all(cells)] == []
    return set(codes)


@pytest.mark.parametrize(
    ("heading", "there"),
    [
        ("First words of a ProtocolError", lambda: reasons(MODULES)),
        ("Why a party did not answer", lambda: literal("Dropout")),
        ("Why an answer does not count", lambda: literal("Rejection")),
        ("Clauses of a policy", clauses),
    ],
)
def test_the_catalogue_lists_what_is_in_the_code_and_nothing_else(heading: str, there: object) -> None:
    expected, found = there(), listed(heading)  # type: ignore[operator]
    assert found - expected == set(), "in the catalogue, and nowhere in the code"
    assert expected - found == set(), "in the code, and not in the catalogue"


def test_every_error_has_its_exit_code_in_the_catalogue() -> None:
    found = {cells[1].strip("`"): int(cells[0]) for cells in rows("Exit codes") if cells[1].startswith("`")}
    assert found == classes(MODULES)


def test_the_two_pages_agree_on_the_exit_codes() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    short = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert short == {int(cells[0]) for cells in rows("Exit codes")}


def test_what_a_status_reads_in_a_log_is_in_the_catalogue() -> None:
    found = {cells[0]: set(re.findall(r"`([^`]+)`", cells[1])) for cells in rows("Trouble in a log")}
    assert found == troubles()


def test_a_reason_is_found_however_it_is_chosen() -> None:
    source = """
class Late(ProtocolError): pass
def a(x):
    raise ProtocolError("one" if x else "two", "..")
def b(x):
    why = "three" if x else "four"
    raise errors.ProtocolError(why, "..")
def c(x):
    for what, value in (("five", 1), ("six", 2)):
        raise Late(f"is_{what}", "..")
def d(reason, x):
    raise ProtocolError(reason, "..")
def e():
    d("seven", 1)
    d(x=1, reason="eight")
def f(error):
    raise ProtocolError(error.reason, "..")
"""
    assert reasons([Module(source, "x")]) == {"one", "two", "three", "four", "is_five", "is_six", "seven", "eight"}


@pytest.mark.parametrize("made", ["names[0]", "given", "word()"])
def test_a_reason_that_cannot_be_followed_is_not_passed_over(made: str) -> None:
    with pytest.raises(Unresolved, match="x:2"):
        reasons([Module(f"def a(given):\n    raise ProtocolError({made}, '..')\n", "x")])
