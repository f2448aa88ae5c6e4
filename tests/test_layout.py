"""The shape of the code: who imports whom, what is documented, how long things are."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {path.stem: ast.parse(path.read_text()) for path in sorted(ROOT.glob("*.py"))}
ALLOWED = {  # what each module may import of the project, and of the packages
    "feed": {"numpy", "websocket"},
    "optimize": {"numpy", "scipy"},
    "marketmaker": {"feed", "optimize", "numpy", "scipy", "websocket", "matplotlib"},
    "backtest": {"feed", "optimize", "marketmaker", "numpy", "scipy", "matplotlib"},
}
BUDGETS = {  # lines, documentation included
    "feed.py": 900, "optimize.py": 650, "marketmaker.py": 1050, "backtest.py": 1400,
    "data/archive.py": 350,
}  # fmt: skip
TOTALS = {"*.py": 4000, "tests/*.py": 5500, "data/*.py": 1500}
LONGEST = 60  # lines of a function
MISSED = pytest.mark.xfail(strict=True, reason="a budget that is not kept yet")
EVERY = pytest.mark.parametrize("name", MODULES)


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def length(node: ast.FunctionDef) -> int:
    return node.end_lineno - node.lineno + 1


def count_lines(*paths: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


@EVERY
def test_module_imports_only_what_it_may(name):
    imported = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) <= ALLOWED[name]


@EVERY
def test_module_and_its_public_classes_and_functions_are_documented(name):
    tree = MODULES[name]
    assert len(ast.get_docstring(tree).splitlines()) >= 15
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}.{node.name}"


@EVERY
def test_public_functions_state_the_types_of_what_they_take_and_give(name):
    for node in MODULES[name].body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert node.returns is not None, f"{name}.{node.name}"
            for argument in node.args.args:
                assert argument.annotation is not None, f"{name}.{node.name}({argument.arg})"


@EVERY
def test_functions_stay_short(name, capsys):
    worst = sorted(functions(MODULES[name]), key=length)[-3:]
    with capsys.disabled():
        longest = ", ".join(f"{node.name} {length(node)}" for node in reversed(worst))
        lines = count_lines(ROOT / f"{name}.py")
        print(f"\n{name}.py: {lines} lines, longest functions {longest}", end="")
    assert length(worst[-1]) <= LONGEST


def budgets(lines: dict[str, int], *missed: str) -> list:
    return [pytest.param(k, marks=[MISSED] if k in missed else []) for k in lines]


@pytest.mark.parametrize("name", budgets(BUDGETS, "marketmaker.py"))
def test_file_keeps_within_its_budget_of_lines(name):
    assert count_lines(ROOT / name) <= BUDGETS[name]


@pytest.mark.parametrize("pattern", budgets(TOTALS, "*.py"))
def test_files_together_keep_within_their_budget_of_lines(pattern):
    assert count_lines(*ROOT.glob(pattern)) <= TOTALS[pattern]


@pytest.mark.parametrize("name", ["optimize", "backtest"])
def test_mathematics_and_history_read_no_clock(name):
    for node in ast.walk(MODULES[name]):
        names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        assert not names & {"time", "datetime"}


def test_decisions_read_no_clock():
    """Only what displays, waits or receives may ask for the time."""
    (maker,) = [n for n in MODULES["marketmaker"].body if getattr(n, "name", "") == "MarketMaker"]
    calls = {ast.unparse(node.func) for node in ast.walk(maker) if isinstance(node, ast.Call)}
    assert not {call for call in calls if call.startswith("time.") or "clock" in call}
