"""make bench, second part: how fast history is played, with which memory.

The day is simulated (data/simulate.py) at about Bybit's density: one hour, repeated 24
times with the prices going on from where the hour before ended. Every measurement runs in
a process of its own, so that its peak of memory is its own.

  python tests/bench_backtest.py            everything; some minutes
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import simulate  # noqa: E402

import backtest  # noqa: E402
import feed  # noqa: E402
import marketmaker  # noqa: E402
from feed import ASK, BID, NS  # noqa: E402
from optimize import Parameters  # noqa: E402

HOURS = 24
UPDATES = 17.0  # levels changed at random in 100 ms: about 23 rows a message in all
LEVELS = 25  # changed in a line of the archive
LINES = 60_000  # of the archive
DAYS = (1, 2, 4, 8)
PEER_FLAGS = dict(order_qty=0.001, order_latency_ms=5.0, max_inventory=1000.0)


# ---- The data ----------------------------------------------------------------------


def make_day(folder: Path) -> None:
    """The columns of a day, hour after hour, with what backtest.read_tape needs."""
    lines = folder / "hour.jsonl.gz"
    with gzip.open(lines, "wt", compresslevel=1) as file:
        for recv_ns, text in simulate.simulate(np.random.default_rng(1), 1.0,
                                               updates_per_delta=UPDATES):  # fmt: skip
            file.write(f"{recv_ns} {text}\n")
    parser, _ = feed.parser_of_recording(lines, None, None, None)
    hour_folder = folder / "hour"
    hour_folder.mkdir()
    facts = json.loads(json.dumps(backtest.write_tape(feed.replay(lines, parser), hour_folder)))
    hour = backtest.read_tape(hour_folder, facts)
    mids = (hour.best[BID] - hour.best[ASK]) // 2
    drift, day = int(mids[-1] - mids[0]), folder / "day"
    day.mkdir()
    for name, column in backtest.flatten(hour).items():
        file = backtest.Column(day / f"{name}.npy")
        for k in range(HOURS):
            file.append(moved(name, column, k, len(hour), drift))
        file.close()
    for name, side in (("bid", BID), ("ask", ASK)):
        ends = (0, side * drift * (HOURS - 1))
        low, high = facts["bounds"][name]
        facts["bounds"][name] = [low + min(ends), high + max(ends)]
    (day / "facts.json").write_text(json.dumps(facts | dict(tick=parser.instrument.tick_text)))


def moved(name: str, column: np.ndarray, k: int, messages: int, drift: int) -> np.ndarray:
    """An hour's column, k hours later."""
    if name.endswith("_ns"):
        return np.where(column > 0, column + k * 3600 * NS, 0)
    if name.endswith("_end"):
        return column[k > 0 :] + k * column[-1]
    if name == "last_book":
        return np.where(column >= 0, column + k * messages, k * messages - 1)
    if name == "quotes":
        return column[:0]
    if name == "trade_tick":
        return column + k * drift
    if name.endswith(("_level", "_best", "_reach")):
        far = abs(column) >= -feed.NO_LEVEL
        return np.where(far, column, column + k * drift * (BID if name[0] == "b" else ASK))
    return column


def history_of(folder: Path, days: int = 1) -> backtest.History:
    """The day, played `days` times in succession."""
    facts = json.loads((folder / "facts.json").read_text())

    def pieces(_: int):
        for k in range(days):
            tape, shift = backtest.read_tape(folder, facts), k * HOURS * 3600 * NS
            if shift:
                exch_ns = np.where(tape.exch_ns > 0, tape.exch_ns + shift, 0)
                trades = tape.trades._replace(exch_ns=tape.trades.exch_ns + shift)
                tape = replace(tape, recv_ns=tape.recv_ns + shift, exch_ns=exch_ns, trades=trades)
            yield backtest.Piece(tape, 0, len(tape), facts["tick"])

    return backtest.History(feed.Instrument(), pieces, (0, 0), "a simulated day",
                            {"synthetic": True})  # fmt: skip


def make_archive(path: Path) -> None:
    """An order book file in the archive's form: a snapshot and LINES deltas."""
    rng = np.random.default_rng(2)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open(path.name.removesuffix(".zip"), "w") as file:
            for u in range(1, LINES + 2):
                count = 200 if u == 1 else LEVELS // 2
                below = rng.choice(250, count, replace=False) if u > 1 else np.arange(count)
                sizes = rng.integers(0 if u > 1 else 1, 9000, count)
                rows = [[f"{65000 - x / 10:.2f}", f"{s / 1000:g}"] for x, s in zip(below, sizes)]
                asks = [[f"{65000.1 + x / 10:.2f}", size] for x, (_, size) in zip(below, rows)]
                ms = 1_767_225_600_000 + 100 * u
                data = dict(s="BTCUSDT", b=rows, a=asks + rows[:0], u=u, seq=u)
                kind = "snapshot" if u == 1 else "delta"
                line = dict(topic="orderbook.200.BTCUSDT", type=kind, ts=ms, data=data, cts=ms)
                file.write((json.dumps(line, separators=(",", ":")) + "\n").encode())


# ---- Measurements, each in a process of its own ------------------------------------


def play(folder: Path, days: int, interval_s: float, flags: dict, quotes: str = "") -> dict:
    """The whole loop: program, fills, notebook. interval_s 0: the strategy's own pace."""
    if interval_s:
        marketmaker.get_optimization_frequency = lambda parameters, sigma: interval_s
    tape = next(history_of(folder).pieces(0)).tape
    rows = sum(len(side.level) for side in tape.rows.values()) + len(tape.trades.tick)
    file = feed.GrowingFile(Path(quotes)) if quotes else None
    began = time.perf_counter()
    parameters, peer_rules = Parameters(**flags), bool(flags)
    history = history_of(folder, days)
    result = backtest.run_backtest(history, parameters, quotes=file, peer_rules=peer_rules)
    elapsed = time.perf_counter() - began
    return dict(
        seconds=elapsed, rows=days * rows, rate=days * rows / elapsed, fills=len(result.fills),
        decisions=len(result.decisions), peak_mb=peak_mb(),
    )  # fmt: skip


def parse(folder: Path) -> dict:
    """Lines of the archive per second, parsed and written as columns."""
    book = folder / "2026-01-01_BTCUSDT_ob200.data.zip"
    make_archive(book)
    day = feed.ArchiveDay("2026-01-01", "BTCUSDT", "linear", book)
    (folder / "parsed").mkdir()
    began = time.perf_counter()
    parser = feed.parser_of_archive(day)
    backtest.write_tape(feed.replay_archive(day, parser), folder / "parsed")
    seconds = time.perf_counter() - began
    assert not Counter(parser.counts)["malformed"] and parser.counts["book"] == LINES + 1
    return dict(seconds=seconds, rate=LINES / seconds, peak_mb=peak_mb())


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alone(call: str) -> dict:
    """The result of a call to this module in a fresh process, and what all of that took."""
    modules = "import json, bench_backtest as b; from pathlib import Path"
    code = f"{modules}; print(json.dumps(b.{call}))"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", check=True,
                          stdout=subprocess.PIPE, text=True)  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1]) | dict(cold=time.perf_counter() - began)


def compare_with_peer(folder: Path, quotes: Path) -> None:
    """Our whole loop, decisions included, against hftbacktest following the same quotes."""
    import bench_peer

    ours = alone(f"play(Path({str(folder)!r}), 1, 1.0, b.PEER_FLAGS)")
    alone(f"play(Path({str(folder)!r}), 1, 1.0, b.PEER_FLAGS, {str(quotes)!r})")
    events = bench_peer.convert(next(history_of(folder).pieces(0)).tape)
    theirs = bench_peer.measure_peer(events, quotes, PEER_FLAGS["order_latency_ms"])
    print(f"the same day and quotes, peer rules: {ours['fills']:,} fills here, "
          f"{theirs['fills']:,} there, peak {theirs['peak_mb']:,.0f} MB there")  # fmt: skip
    for name, here, there in (
        ("cold, a fresh process", ours["cold"], theirs["cold_s"]),
        ("warm, the loop alone", ours["seconds"], theirs["warm_s"]),
    ):
        print(f"  {name:<24}{here:6.2f} s here, decisions included   {there:6.2f} s hftbacktest"
              f"   {there / here:5.2f} x as fast")  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parsed = alone(f"parse(Path({scratch!r}))")
        print(f"archive, {LEVELS} levels a line: {parsed['rate']:,.0f} lines/s to columns, "
              f"peak {parsed['peak_mb']:,.0f} MB", flush=True)  # fmt: skip
        make_day(folder)
        day = folder / "day"
        print("a simulated day, the loop with queue fills and the program:")
        for name, interval_s in (("decisions every 1 s", 1.0), ("at its own pace", 0.0)):
            found = max((alone(f"play(Path({str(day)!r}), 1, {interval_s}, {{}})")
                         for _ in range(3)), key=lambda run: run["rate"])  # fmt: skip
            print(f"  {name:<20}{found['rate'] / 1e6:5.2f} M rows/s, best of 3   "
                  f"{found['seconds']:.2f} s for {found['rows']:,} rows, {found['decisions']:,} "
                  f"decisions, {found['fills']:,} fills   peak {found['peak_mb']:,.0f} MB",
                  flush=True)  # fmt: skip
        print("several days, one after the other, decisions every 1 s:")
        for days in DAYS:
            found = alone(f"play(Path({str(day)!r}), {days}, 1.0, {{}})")
            print(f"  {days} days  {found['seconds']:6.2f} s   {found['seconds'] / days:5.2f} s "
                  f"a day   peak {found['peak_mb']:,.0f} MB", flush=True)  # fmt: skip
        if importlib.util.find_spec("hftbacktest"):
            compare_with_peer(day, folder / "quotes.csv")
        else:
            print("hftbacktest is not installed: pip install hftbacktest to compare with it")


if __name__ == "__main__":
    main()
