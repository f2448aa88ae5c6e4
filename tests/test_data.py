"""The programs of data/ and the loopback exchange end with their work, or with one clear line."""

from __future__ import annotations

import contextlib
import io
import runpy
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import archive
import backtest
import compare
import exchange
import experiments
import simulate

import pytest

SMALL = simulate.START_MS * 1_000_000, '{"topic":"publicTrade.BTCUSDT","data":[]}'


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    simulate.record(Path("taken.gz"), iter([SMALL]))
    return tmp_path


def run(program, *words) -> int:
    """The exit status of a program."""
    with contextlib.suppress(SystemExit):  # for wrong flags, with status 2
        return program.main(list(words))
    return 2


@pytest.mark.parametrize(
    "program, words, rule", [
        (simulate, "--out taken.gz", "taken.gz exists"),
        (simulate, "--out no/new.gz", ".part: No such file or directory"),
        (simulate, "--out /dev/null --force", "/dev/null: huge or no regular file"),
        (simulate, "--out new.gz --hours nan", "hours = nan must lie in 0.001 to 100000"),
        (simulate, "", "required: --out"),
        (compare, "", "required: FILE"),
        (compare, "no.gz", "No such file"),
        (compare, "/dev/null", "/dev/null: huge or no regular file"),
        (compare, "taken.gz", "taken.gz holds no book or no trades"),
        (experiments, "10", "experiments 1 to 9"),
        (archive, "", "required: DAY"),
        (archive, "2026-01-01 --out taken.gz", "taken.gz/linear: Not a directory"),
        (exchange, "no.gz", "No such file"),
        (exchange, "taken.gz --port 65536", "invalid port value: '65536'"),
        (exchange, "taken.gz", "0 order books: one is needed"),
    ]
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(folder, capsys, program, words, rule):
    assert run(program, *words.split()) == 2
    error = capsys.readouterr().err
    assert rule in error and error.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["taken.gz"]


def test_a_simulation_that_is_stopped_leaves_no_draft(folder, monkeypatch, capsys):
    monkeypatch.setattr(simulate, "match", lambda *_: signal.raise_signal(signal.SIGINT))
    assert run(simulate, "--out", "new.gz") == 130
    assert len(list(folder.iterdir())) == 1 and capsys.readouterr().err == "stopped\n"


def test_a_table_is_printed_as_far_as_stdout_takes_it(folder, monkeypatch, capsys):
    monkeypatch.setattr(compare, "FEWEST", 2)
    monkeypatch.setattr(backtest, "CACHE", folder / "cache")
    assert run(simulate, *"--out new.gz --hours 0.03 --seed 2".split()) == 0
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    for stdout in (out, None):
        monkeypatch.setattr(sys, "stdout", stdout)
        assert run(compare, "new.gz") == 0 and not capsys.readouterr().err
    table = out.buffer.getvalue().decode("ascii").splitlines()
    assert len(table) > 20 and {row.count("|") for row in table} == {3}
    assert any("? 0." in row for row in table)  # what was ± is still told
    run_of_an_experiment = experiments.play_one(Path("new.gz"), compare.quote_at_touch, {}, {})
    assert f"| at the touch: n of fills | {run_of_an_experiment['fills']} |" in table


def test_paths_of_another_simulator_are_not_taken_and_what_is_missing_is_made(folder, monkeypatch):
    monkeypatch.setattr(simulate, "__file__", exchange.__file__)  # whatever it is
    assert not set(experiments.PATHS) & set(runpy.run_path(experiments.__file__)["PATHS"])

    paths = [folder / ("taken.gz" if seed < 8 else "new.gz") for seed in experiments.SEEDS]
    monkeypatch.setattr(experiments, "PATHS", paths)
    monkeypatch.setattr(experiments, "HOURS", 0.001)
    with ThreadPoolExecutor(2) as pool:
        experiments.make_paths(pool)
    assert run(simulate, *"--out same.gz --hours 0.001 --seed 8".split()) == 0
    assert Path("new.gz").read_bytes() == Path("same.gz").read_bytes()
