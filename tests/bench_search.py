"""make bench, third part: how fast a grid is searched, and what each worker takes for it.

100 configurations over the bundled sample, by one worker and by two; then a few over a
longer history (the simulated day of bench_backtest.py), where memory shows.

  python tests/bench_search.py              some minutes
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "tests")]

import bench_backtest  # noqa: E402

import backtest  # noqa: E402
from optimize import expand_grid, run_trials  # noqa: E402

GRID = {"alpha": [0.25, 0.5, 1, 2, 4], "gamma": [0.25, 0.5, 1, 2], "delta": [0, 0.5, 1, 2, 4]}
MB = 1e6


def private_bytes() -> int:
    """Memory of this process that no other shares: not what is mapped from the cache."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def watched(play, changes) -> tuple[int, int, int]:
    """Play; the worker, and its private memory before and after."""
    before = private_bytes()
    play(changes)
    return os.getpid(), before, private_bytes()


def play_day(folder: Path, changes) -> None:
    """A configuration over the simulated day."""
    history = bench_backtest.history_of(folder / "day")
    backtest.run_backtest(history, backtest.Parameters(**changes))


def search(play, configurations: list, workers: int) -> tuple[float, float]:
    """Seconds, and the most by which a worker's private memory grew."""
    began_s, grown = time.perf_counter(), {}
    with backtest.start_workers(workers) as pool:
        for _, (pid, before, after) in run_trials(partial(watched, play), configurations, pool):
            first, most = grown.get(pid, (before, 0))
            grown[pid] = first, max(most, after - first)
    return time.perf_counter() - began_s, max(most for _, most in grown.values())


def newest_cache() -> Path:
    """Where the sample's columns are."""
    return max(backtest.cache_folder().glob("sample-*"), key=lambda path: path.stat().st_mtime)


def main() -> None:
    """Print what was measured."""
    options = backtest.build_arguments().parse_args([])
    setting = backtest.make_setting(options)
    configurations = expand_grid(GRID)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench_backtest.make_day(folder)
        for what, play, some, size in (
            ("the sample", partial(backtest.try_out, setting), configurations,
             backtest.column_sizes(newest_cache())),
            ("a simulated day", partial(play_day, folder), configurations[:8],
             backtest.column_sizes(folder / "day")),
        ):  # fmt: skip
            megabytes = sum(size.values()) / MB
            print(f"{len(some)} configurations over {what}, {megabytes:.0f} MB of columns:")
            seconds = {}
            for workers in (1, 2):
                seconds[workers], grown = search(play, some, workers)
                ratio = seconds[1] / seconds[workers]
                print(f"  {workers} workers {seconds[workers]:7.1f} s   {ratio:.2f} x as fast   "
                      f"private memory of each grew by at most {grown / MB:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
