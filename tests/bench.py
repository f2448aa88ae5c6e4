"""make bench: what a replay, the live path and a day of history cost.

    python tests/bench.py [replay] [live] [day]     all of them: some five minutes

Figures are ratios within one run where they can be, since machines differ. The loopback
exchange runs in a process of its own and sends prebuilt frames as fast as the socket takes
them. The day is simulated (data/simulate.py) at about Bybit's density: one hour, repeated 24
times, with the prices going on from where the hour before ended; each run of it has a process
of its own, whose memory is measured.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace as Bag

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "tests")]
os.environ["no_proxy"] = "127.0.0.1"

import numpy as np  # noqa: E402
import simulate  # noqa: E402
import websocket  # noqa: E402
from exchange import served  # noqa: E402

import backtest  # noqa: E402
import feed  # noqa: E402
import marketmaker  # noqa: E402
import optimize  # noqa: E402
from feed import NS  # noqa: E402
from marketmaker import SAMPLE, MarketMaker  # noqa: E402
from optimize import Parameters  # noqa: E402

ROUNDS = 5  # of each variant of the live path, in turn; the median counts
MESSAGES = 40_000  # of the sample, in each round
LATENCY_S = 20  # of live messages for the latencies
HOURS = 24
UPDATES = 17.0  # levels changed at random in 100 ms: about 23 rows a message in all


# ---- The live path -----------------------------------------------------------------


def time_bare(url: str) -> float:
    """Seconds for MESSAGES with websocket-client and json alone."""
    ws = websocket.create_connection(url, timeout=30, skip_utf8_validation=True)
    topics = list(feed.Recording(SAMPLE).parser.topics)
    ws.send(json.dumps({"op": "subscribe", "args": topics}))
    ws.recv(), ws.recv()  # the answer, and the first message: from here on all are built
    began = time.perf_counter()
    for _ in range(MESSAGES):
        json.loads(ws.recv())
    elapsed = time.perf_counter() - began
    ws.shutdown()
    return elapsed


def live_bursts(
    url: str, maker: MarketMaker, clock_ns: Callable[[], int], record: Path | None = None
) -> Iterator[list[feed.Message]]:
    """The program's own loop through feed thread and queue, without display and files."""
    source = feed.open_feed(feed.Instrument(), 200, url, record, clock_ns)
    session = Bag(maker=maker, options=Bag(duration=600), look=lambda: None)
    try:
        yield from marketmaker.live_messages(session, source)
    finally:
        source.stop()
        if record:
            source.recorder.close()


def time_live(url: str, record: Path | None = None) -> float | None:
    """Seconds for the same MESSAGES through feed thread, queue and market maker."""
    maker, began = MarketMaker(Parameters(), feed.Instrument()), 0.0
    first_ns = next(feed.read_lines(SAMPLE))[0] - time.monotonic_ns()  # the sample's own time
    feed.MAX_QUEUED = 10 * MESSAGES  # as in a burst: the queue may grow
    for messages in live_bursts(url, maker, lambda: first_ns + time.monotonic_ns(), record):
        maker.take(*messages)
        began = began or time.perf_counter()
        if maker.messages >= MESSAGES:
            return time.perf_counter() - began


def bench_live() -> None:
    """The live path against the bare loop, in turn; and from a message to a decision."""
    times = {"bare": [], "live": [], "recording": []}
    with tempfile.TemporaryDirectory() as folder:
        lines, head = islice(feed.read_lines(SAMPLE), MESSAGES + 100), Path(folder) / "head"
        head.write_text("".join(f"{recv_ns} {text}\n" for recv_ns, text in lines))
        for number in range(ROUNDS):
            print(f"  round {number + 1} of {ROUNDS}", file=sys.stderr)
            for name in times:
                with served(head, "--max") as url:
                    path = Path(folder) / f"{number}.gz" if name == "recording" else None
                    times[name].append(time_bare(url) if name == "bare" else time_live(url, path))
    print(f"the live path, {MESSAGES} messages of the sample, median of {ROUNDS} rounds:")
    bare, *_ = medians = [statistics.median(seconds) for seconds in times.values()]
    for name, middle in zip(times, medians):
        print(f"  {name:<10}{MESSAGES / middle:9,.0f} messages/s {middle / MESSAGES * 1e6:7.1f} us "
              f"each   {middle / bare:5.2f} x bare")  # fmt: skip
    print(f"from message received to quote decided, {LATENCY_S} s of live messages each:")
    for is_fresh in (False, True):
        measure_latency(is_fresh)


def measure_latency(is_fresh: bool) -> None:
    """From the stamp of a message to the quote decided on it."""
    maker, waits = MarketMaker(Parameters(requote_move_bps=0.05), feed.Instrument()), []

    def note(_: MarketMaker) -> None:
        if maker.decision.source == "lp":
            waits.append((time.time_ns() - maker.decision.time_ns) / 1e3)
        if is_fresh:
            optimize._remembered.cache_clear()

    maker.on_decision = note
    with served(SAMPLE) as url:
        end = time.monotonic() + LATENCY_S + marketmaker.WARMUP_RETURNS
        for messages in live_bursts(url, maker, time.time_ns):
            maker.take(*messages)
            if time.monotonic() > end:
                break
    low, high = (statistics.quantiles(waits, n=100)[k] for k in (49, 98))
    kind = "fresh solve" if is_fresh else "remembered solve"
    print(f"  {kind:<18}p50 {low:7.0f} us   p99 {high:7.0f} us   ({len(waits)} decisions)")


# ---- Replay ------------------------------------------------------------------------


def peak_mb() -> float:
    """The most memory that this process ever had (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bench_replay() -> None:
    """python marketmaker.py --replay of the sample at --speed max, and its least: reading."""
    times, peaks = [], []
    for _ in range(3):
        began = time.perf_counter()
        with gzip.open(SAMPLE) as file:
            lines = sum(json.loads(line.partition(b" ")[2]) is not None for line in file)
        is_read = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            assert marketmaker.main(["--replay", str(SAMPLE), "--speed", "max"]) == 0
        times.append((is_read - began, time.perf_counter() - is_read))
        peaks.append(peak_mb())
    reading, speed = (lines / min(seconds) for seconds in zip(*times))
    print(f"replay of the sample at --speed max: {speed:,.0f} messages/s, best of 3")
    print(f"  gzip, json.loads alone: {reading:,.0f} messages/s, {reading / speed:.1f} x as fast")
    print(f"  memory at most, after each: {', '.join(f'{peak:.1f}' for peak in peaks)} MiB")


# ---- A day of history --------------------------------------------------------------


def make_day(folder: Path) -> None:
    """The columns of a day, hour after hour, one .npy file each."""
    path, rng = folder / "hour.jsonl.gz", np.random.default_rng(1)
    simulate.record(path, simulate.simulate(rng, 1.0, updates_per_delta=UPDATES))
    began = time.perf_counter()
    hour = feed.build_tape(feed.Recording(path).messages())
    speed, rows = len(hour) / (time.perf_counter() - began), len(hour.level) / len(hour)
    print(f"parsing: {speed:,.0f} messages/s of {rows:.0f} rows")
    mid = hour.mid_ticks[~np.isnan(hour.mid_ticks)]
    drift = int(mid[-1] - mid[0])
    for name in feed.COLUMNS:
        hours = [moved(name, getattr(hour, name), k, drift) for k in range(HOURS)]
        np.save(folder / f"{name}.npy", np.concatenate(hours))


def moved(name: str, column: np.ndarray, k: int, drift: int) -> np.ndarray:
    """An hour's column, k hours later."""
    if name.endswith("_ns"):
        return np.where(column > 0, column + k * 3600 * NS, 0)
    if name.startswith("first_"):
        return column[k > 0 :] + k * column[-1]
    if name.startswith(("best_", "worst_")) or name.endswith("level"):
        is_level = abs(column) < -feed.NO_LEVEL
        return np.where(is_level, column + np.sign(column) * k * drift, column)
    if name.endswith("_price"):
        return column + k * drift * 0.1
    return column


def play(folder: Path, interval_s: float) -> dict:
    """The whole loop: program, fills, history. interval_s 0: the strategy's own pace."""
    if interval_s:
        optimize.get_optimization_frequency = lambda parameters, sigma: interval_s
    files = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in feed.COLUMNS}
    tape = feed.Tape(**{name: np.asarray(column) for name, column in files.items()}, notes={})
    maker = MarketMaker(Parameters(), feed.Instrument())
    began = time.perf_counter()
    maker.follow(tape)
    elapsed, rows = time.perf_counter() - began, len(tape.level) + len(tape.trade_level)
    return dict(seconds=elapsed, rows=rows, decisions=sum(maker.sources.values()),
                fills=len(maker.account.fills), peak_mb=peak_mb())  # fmt: skip


def bench_day() -> None:
    """A simulated day at its own pace and at one decision a second."""
    with tempfile.TemporaryDirectory() as scratch:
        make_day(Path(scratch))
        print("a simulated day, the loop with queue fills and the program, best of 3:")
        for name, interval_s in (("decisions every 1 s", 1.0), ("at its own pace", 0.0)):
            runs = []
            for number in range(3):
                print(f"  day {number + 1} of 3, {name}", file=sys.stderr)
                with backtest.start_workers(1) as alone:
                    runs.append(alone.submit(play, Path(scratch), interval_s).result())
            best = min(runs, key=lambda run: run["seconds"])
            print(f"  {name:<20}{best['rows'] / best['seconds'] / 1e6:5.2f} M rows/s   "
                  f"{best['seconds']:.2f} s for {best['rows']:,} rows, {best['decisions']:,} "
                  f"decisions, {best['fills']:,} fills, {best['peak_mb']:,.0f} MB")  # fmt: skip


PARTS = {"replay": (bench_replay, 15), "live": (bench_live, 140), "day": (bench_day, 120)}  # s


def main(names: list[str]) -> None:
    """Measure some parts, or all."""
    if unknown := set(names) - set(PARTS):
        raise feed.UserError(f"no part {min(unknown)!r}: there are {', '.join(PARTS)}")
    sys.stdout.reconfigure(line_buffering=True)
    for name in names or PARTS:
        measure, usual_s = PARTS[name]
        print(f"---- {name}: about {usual_s} s")
        measure()


if __name__ == "__main__":
    sys.exit(feed.exit_cleanly(lambda: main(sys.argv[1:])))
