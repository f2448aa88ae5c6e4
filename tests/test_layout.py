"""The shape of the code: who imports whom, what is documented, how long things are."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {path.stem: ast.parse(path.read_text()) for path in sorted(ROOT.glob("*.py"))}
ALLOWED = {  # what each module may import of the project, and of the packages
    "feed": {"numpy", "websocket"},
    "optimize": {"numpy", "scipy"},
    "marketmaker": {"feed", "optimize", "numpy"},
    "backtest": {"feed", "optimize", "marketmaker", "numpy", "scipy", "matplotlib"},
}
BUDGETS = {  # lines of files together, documentation included
    "feed.py": 900, "optimize.py": 650, "marketmaker.py": 1050, "backtest.py": 1400,
    "data/archive.py": 350, "*.py": 4000, "tests/*.py": 5500, "data/*.py": 1500,
}  # fmt: skip
LONGEST = 60  # lines of a function
EVERY = pytest.mark.parametrize("name", MODULES)


def public(name: str) -> list[ast.FunctionDef | ast.ClassDef]:
    """A module's functions and classes, but not those with an underscore."""
    named = [node for node in MODULES[name].body if hasattr(node, "name")]
    return [node for node in named if not node.name.startswith("_")]


def count_lines(pattern: str) -> int:
    return sum(len(path.read_text().splitlines()) for path in ROOT.glob(pattern))


@EVERY
def test_module_imports_only_what_it_may(name):
    imported = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) <= ALLOWED[name]
    reads_a_clock = not imported.isdisjoint({"time", "datetime"})
    assert not reads_a_clock or name in ("feed", "marketmaker"), "mathematics and history"


@EVERY
def test_module_and_its_public_classes_and_functions_are_documented(name):
    assert len(ast.get_docstring(MODULES[name]).splitlines()) >= 15
    for node in public(name):
        assert ast.get_docstring(node), f"{name}.{node.name}"


@EVERY
def test_public_functions_state_the_types_of_what_they_take_and_give(name):
    for node in public(name):
        if isinstance(node, ast.FunctionDef):
            assert node.returns is not None, f"{name}.{node.name}"
            for argument in node.args.args:
                assert argument.annotation is not None, f"{name}.{node.name}({argument.arg})"


@EVERY
def test_functions_stay_short(name, capsys):
    functions = [node for node in ast.walk(MODULES[name]) if isinstance(node, ast.FunctionDef)]
    lengths = sorted((node.end_lineno - node.lineno + 1, node.name) for node in functions)
    with capsys.disabled():
        longest = ", ".join(f"{function} {lines}" for lines, function in lengths[:-4:-1])
        lines = count_lines(f"{name}.py")
        print(f"\n{name}.py: {lines} lines, longest functions {longest}", end="")
    assert lengths[-1][0] <= LONGEST


@pytest.mark.parametrize("pattern", BUDGETS)
def test_files_keep_within_their_budget_of_lines(pattern):
    assert count_lines(pattern) <= BUDGETS[pattern]


@pytest.mark.parametrize("command", ["feed numpy", "marketmaker websocket", "optimize scipy"])
def test_a_missing_package_is_one_line_that_names_the_command(command, tmp_path):
    program, package = command.split()
    (tmp_path / f"{package}.py").write_text("raise ImportError(f'No module named {__name__}')")
    words, env = [sys.executable, ROOT / f"{program}.py"], {"PYTHONPATH": str(tmp_path)}
    told = subprocess.run(words, env=env, capture_output=True, text=True).stderr
    assert told == f"error: No module named {package}: pip install -r requirements.txt\n"


def test_decisions_read_no_clock():
    """Only what displays, waits or receives may ask for the time."""
    (maker,) = [n for n in MODULES["marketmaker"].body if getattr(n, "name", "") == "MarketMaker"]
    calls = {ast.unparse(node.func) for node in ast.walk(maker) if isinstance(node, ast.Call)}
    assert not {call for call in calls if call.startswith("time.") or "clock" in call}
