"""The README is true: its commands run, its names exist, its figures can be made again."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import backtest
import experiments
import feed
import marketmaker
import optimize

import numpy as np
import pytest
from scipy.optimize import linprog

ROOT = Path(feed.__file__).parent
MODULES = ("feed", "optimize", "marketmaker", "backtest")
README = (ROOT / "README.md").read_text()
FENCES = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
WORDS = ("source", "reason")
BLOCKS = [text for kind, text in FENCES if kind == "sh"]  # some need the files of those before
NEEDS_THE_NET = [line for kind, text in FENCES if kind == "console" for line in text.splitlines()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder that looks like the repository, where commands may write."""
    folder = tmp_path_factory.mktemp("readme")
    for path in (*ROOT.glob("*.py"), ROOT / "data"):
        (folder / path.name).symlink_to(path)
    (folder / "mine.py").write_text(next(text for kind, text in FENCES if "def quote" in text))
    return folder


@cache
def run(block: str, workplace: Path) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-e", "-c", block], cwd=workplace, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PATH": path},
    )  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1])
def test_commands_of_the_readme_run(block, workplace):
    done = run(block, workplace)
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


def test_what_the_readme_shows_below_a_command_is_what_the_command_prints(workplace):
    """Line by line; a line of three dots stands for lines left out."""
    plain, shown = re.compile(r"\s+|the sum is off by \S+"), 0  # rounding differs by processor
    for (kind, block), (below, text) in itertools.pairwise(f for f in FENCES if f[0] != "python"):
        if kind == "sh" and below == "text":
            printed = [plain.sub("", line) for line in run(block, workplace).stdout.splitlines()]
            for line in text.splitlines():
                assert line == "…" or plain.sub("", line) in printed, line
            shown += 1
    assert shown == 3


def test_results_of_baselines_and_frictions_are_those_of_the_readme(tmp_path):
    rows = re.findall(r"^\| (\S.*?) \| ([\d,]+) \| (\S+) \| (\S+) \|$", README, re.MULTILINE)
    assert len(rows) > 5
    for options, fills, gross, net in rows[1:]:
        words = shlex.split(re.search("`(.*)`", options)[1])
        assert backtest.main([*words, "--out", str(tmp_path)]) == 0
        found = json.loads((tmp_path / "metrics.json").read_text())
        shown = [f"{found['fills']:,}", f"{found['gross_usdt']:+.2f}", f"{found['net_usdt']:+.2f}"]
        assert shown == [cell.replace("\u2212", "-") for cell in (fills, gross, net)], options


def chords(low: float, high: float, step: float) -> list[tuple[float, float]]:
    """u + v and u v of the chords that cover low to high."""
    grid = step * np.arange(math.floor(low / step), math.ceil(high / step) + 1)
    return [(u + v, u * v) for u, v in itertools.pairwise(grid)]


@cache
def distances(q: float, d_min: float) -> list[float]:
    """d_b and d_a by the program, for q from 0 on and alpha = beta = 1."""
    rows = [([-1, -1, 0, 0, 0], -1)]
    rows += [([-k, k, -1, 0, 0], uv - k * q) for k, uv in chords(-1, 1, 1 / 32 / math.sqrt(2))]
    rows += [([k, 0, 0, -1, 0], uv) for k, uv in chords(0, 2, 1 / 32)]
    rows += [([0, k, 0, 0, -1], uv) for k, uv in chords(0, 2, 1 / 32)]
    bounds = [(d_min, 2)] * 2 + [(0, None)] * 3
    return linprog([0, 0, 1, 1, 1], *zip(*rows), bounds=bounds).x[:2].tolist()


def test_every_quote_of_the_sample_follows_from_the_formulas_alone_and_is_explained(workplace):
    run(next(block for block in BLOCKS if "--log decisions.csv" in block), workplace)
    with open(workplace / "decisions.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "lp"]
    for row in rows:
        explained = optimize.explain(row, optimize.Parameters())
        r = {name: float(text or "nan") for name, text in row.items() if name not in WORDS}
        mid, depth = r["mid_price"], (r["bid_depth"] + r["ask_depth"]) / 2
        S = max(0.5, 2 * 0.5 * r["volatility"] * math.sqrt(10)
                + 1 / (1 + r["liquidity"]) + 1 / (1 + depth * mid * 1e-6))  # fmt: skip
        steps = round(r["inventory"] / 0.1 * 200)
        d_min = min(math.ceil(0.5 / S * 64 - 1e-9) / 64, 1)
        d_b, d_a = distances(abs(steps) / 200, d_min)[:: 1 if steps >= 0 else -1]
        bid = math.floor(mid * (1 - d_b * S * 1e-4) / 0.1 + 1e-9)
        ask = math.ceil(mid * (1 + d_a * S * 1e-4) / 0.1 - 1e-9)
        bid = min(bid, round(r["best_ask"] / 0.1) - 1)
        ask = max(ask, round(r["best_bid"] / 0.1) + 1)
        assert S == pytest.approx(r["base_spread_bps"], rel=1e-7)
        for side, price, ours in (("bid", r["bid_price"], bid), ("ask", r["ask_price"], ask)):
            assert math.isnan(price) or round(price / 0.1) == ours, row["time_ns"]
            assert re.search(rf"   {side} .*: {ours / 10:.1f}\n", explained), row["time_ns"]
        is_at_edge = [min(d_b, d_a) < d_min + 1e-7, f" d_a <= {-d_min:.4f}\n" in explained]
        assert is_at_edge in ([True] * 2, [False] * 2), row["time_ns"]
    assert len(rows) > 1000


@pytest.mark.parametrize("log", ["decisions.csv 1", "decisions.csv 9999", "mine.py", "none.csv"])
def test_what_cannot_be_explained_is_told_in_one_line(log, workplace):
    done = run(f"python optimize.py --explain {log} || echo status $?", workplace)
    assert done.stdout == "status 2\n" and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and "give a decision log" in done.stderr


def test_figures_in_the_answers_are_printed_by_their_commands(workplace):
    """Of the first seven; what the eighth says is derived."""
    answers = re.findall(r"<details>.*?```sh\n(.*?)```\n(.*?)</details>", README, re.DOTALL)
    figures, _ = 0, [run(block, workplace) for block in BLOCKS]  # in order: they share files
    for block, words in answers[:7]:
        printed = run(block, workplace).stdout
        for figure in re.findall(r"\d+\.\d\d+|\d{3,}", words):
            assert figure in printed or figure in README[: README.index(block)], figure
            figures += 1
    assert len(answers) == 8 and figures > 10


def test_trades_of_the_market_in_one_page_are_those_of_the_sample():
    tape, _ = backtest.load_tape(feed.Recording(marketmaker.SAMPLE))
    a_second = tape.trade_size / 7200
    words = f"Some {len(a_second) / 7200:.0f} trades a second, {a_second.sum():.1f} BTC in all"
    assert words in " ".join(README.split())


@pytest.mark.skipif("EXPERIMENTS" not in os.environ, reason="it takes minutes: EXPERIMENTS=1")
def test_tables_of_the_readme_are_those_of_the_experiments(capsys):
    assert experiments.main([]) == 0
    tables = re.split(r"\n(?=\d\. )", capsys.readouterr().out.strip())
    assert len(tables) == 10 and all(table.strip() in README for table in tables[1:])


def test_the_jump_of_the_readme_is_that_of_the_experiment(capsys):
    experiments.jump(None)
    printed = capsys.readouterr().out.strip()
    assert printed in README


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"`([\w/]+\.(?:py|md|png|txt|gz))`", README):
        assert (ROOT / name).exists() or name == "mine.py", name
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
    rows = re.findall(r"^\| `(\w+\.py)` \| .*? \| (.*) \| (\d+) \|$", README, re.MULTILINE)
    assert {name for name, _, _ in rows} == {f"{module}.py" for module in MODULES}
    total = 0
    for name, sections, lines in rows:
        lengths = section_lengths(ROOT / name)
        found = [k for k in lengths if k and k.startswith(tuple(sections.split("; ")))]
        assert len(found) == len(sections.split("; ")), name
        assert sum(lengths[k] for k in found) == int(lines), name
        total += int(lines)
    assert total <= 1500 and f"| | | together | {total:,} |" in README


def test_symbol_table_of_the_readme_names_what_the_code_names():
    table = README[README.index("| symbol | code |") : README.index("The matrix, row by row")]
    for row in table.splitlines()[2:]:
        for name in re.findall(r"`(\w+)`", row):
            known = {*optimize.FIELDS, *optimize.Solution._fields}
            assert name in optimize.__doc__ or name in known, name


def test_table_of_parameters_is_that_of_the_code():
    for name, parameter in optimize.FIELDS.items():
        rule, default = parameter.metadata, parameter.default
        span = ", ".join(rule.get("choices", ())) or f"{rule['low']:,.12g} to {rule['high']:,.12g}"
        span = f"above {rule['low']}" if rule["high"] == optimize.INF else span
        star, default = "\\*" * rule["fixed"], "off" if default is None else default
        assert f"| `{name}`{star} | {default} | {span} |" in README


def test_columns_of_all_files_are_those_that_the_readme_lists(workplace):
    (block,) = (block for block in BLOCKS if "--out results" in block)
    run(block, workplace)
    for name in ("fills", "quotes", "equity", "decisions"):
        path = workplace / ("" if name == "decisions" else "results") / f"{name}.csv"
        (row,) = re.findall(rf"^\| `{name}.csv` .*? \| (.*) \|$", README, re.MULTILINE)
        assert re.findall(r"`(\w+)`", row) == path.read_text().split("\n")[0].split(",")


def test_makefile_and_requirements_name_the_five_packages_and_no_other():
    lines = (ROOT / "requirements.txt").read_text().split()
    names = {re.split("[<>=]", line)[0] for line in lines}
    assert names == {"numpy", "scipy", "websocket-client", "matplotlib", "pytest"}
    assert shutil.which("make") is None or "requirements.txt" in (ROOT / "Makefile").read_text()
