"""The README is true: its commands run, its names exist, its figures can be made again."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import backtest
import feed
import marketmaker
import optimize

ROOT = Path(feed.__file__).parent
MODULES = ("feed", "optimize", "marketmaker", "backtest")
README = (ROOT / "README.md").read_text()
FENCES = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, text in FENCES if kind == "sh" for line in text.splitlines()]
NEEDS_THE_NET = [line for kind, text in FENCES if kind == "console" for line in text.splitlines()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder that looks like the repository, where commands may write."""
    folder = tmp_path_factory.mktemp("readme")
    for path in (*ROOT.glob("*.py"), ROOT / "data"):
        (folder / path.name).symlink_to(path)
    return folder


@cache
def run(command: str, workplace: Path) -> subprocess.CompletedProcess:
    words = shlex.split(command, comments=True)
    assert words[0] == "python"
    return subprocess.run(
        [sys.executable, *words[1:]], cwd=workplace, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_command_of_the_readme_runs(command, workplace):
    done = run(command, workplace)
    assert done.returncode == 0, done.stderr
    assert done.stdout and "Traceback" not in done.stderr


def test_commands_that_need_a_network_have_flags_that_exist():
    modules = {"marketmaker.py": marketmaker, "backtest.py": backtest}
    for line in NEEDS_THE_NET:
        for name, module in modules.items():
            if line.startswith(f"python {name}"):
                known = module.build_arguments().format_help()
                for flag in re.findall(r"--[\w-]+", line):
                    assert flag in known, flag


@pytest.mark.parametrize(
    "command, before",
    [("python backtest.py --plot backtest.png", "draws this:\n\n.*?"),
     ("python backtest.py --tune --grid", "and prints\n\n")],
)  # fmt: skip
def test_results_of_the_readme_are_what_the_command_prints(command, before, workplace):
    (command,) = (line for line in COMMANDS if line.startswith(command))
    (shown,) = re.findall(before + "```text\n(.*?)```", README, re.DOTALL)
    printed = re.split("(?m)^(?:plot|written to)", run(command, workplace).stdout)[0]
    plain = re.compile(r"the sum is off by \S+")  # rounding differs between processors
    assert plain.sub("", shown).split() == plain.sub("", printed).split()


def test_results_of_baselines_and_frictions_are_those_of_the_readme(tmp_path):
    rows = re.findall(r"^\| (\S.*?) \| ([\d,]+) \| (\S+) \| (\S+) \|$", README, re.MULTILINE)
    assert len(rows) > 5
    for options, fills, gross, net in rows[1:]:
        words = shlex.split(re.search("`(.*)`", options)[1])
        assert backtest.main([*words, "--out", str(tmp_path)]) == 0
        found = json.loads((tmp_path / "metrics.json").read_text())
        shown = [f"{found['fills']:,}", f"{found['gross_usdt']:+.2f}", f"{found['net_usdt']:+.2f}"]
        assert shown == [cell.replace("\u2212", "-") for cell in (fills, gross, net)], options


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"`([\w/]+\.(?:py|md|png|txt|gz))`", README):
        assert (ROOT / name).exists(), name
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).exists(), picture


def section_lengths(path: Path) -> dict[str, int]:
    """Lines of each section of a module, by the name on its ruler."""
    lengths, name = {}, ""
    for line in path.read_text().splitlines():
        if line.startswith("# ---- "):
            name = line.strip("# -")
        lengths[name] = lengths.get(name, 0) + 1
    return lengths


def test_the_evening_path_is_as_long_as_the_readme_says_and_within_its_budget():
    rows = re.findall(r"^\| `(\w+\.py)` \| (.*?) \| (\d+) \|$", README, re.MULTILINE)
    assert {name for name, _, _ in rows} == {f"{module}.py" for module in MODULES}
    total = 0
    for name, sections, lines in rows:
        lengths = section_lengths(ROOT / name)
        found = [k for k in lengths if k and k.startswith(tuple(sections.split("; ")))]
        assert len(found) == len(sections.split("; ")), name
        assert sum(lengths[k] for k in found) == int(lines), name
        total += int(lines)
    assert total <= 1500 and f"| | together | {total:,} |" in README


def test_symbol_table_of_the_readme_names_what_the_code_names():
    table = README[README.index("| symbol | code |") : README.index("The matrix, row by row")]
    for row in table.splitlines()[2:]:
        for name in re.findall(r"`(\w+)`", row):
            assert name in optimize.__doc__ or hasattr(optimize.Parameters, name), name


def test_makefile_and_requirements_name_the_five_packages_and_no_other():
    lines = (ROOT / "requirements.txt").read_text().split()
    names = {re.split("[<>=]", line)[0] for line in lines}
    assert names == {"numpy", "scipy", "websocket-client", "matplotlib", "pytest"}
    assert shutil.which("make") is None or "requirements.txt" in (ROOT / "Makefile").read_text()
