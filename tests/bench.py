"""make bench: what a replay, the live path and hours of history cost.

    python tests/bench.py [replay] [live] [day]     all of them: two to three minutes

Figures are ratios within one run where they can be, since machines differ. The loopback
exchange runs in a process of its own and sends prebuilt frames as fast as the socket takes
them. History is simulated (data/simulate.py) at about Bybit's density, a quarter of a day; each
run of it has a process of its own, whose memory is measured.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "tests")]
os.environ["no_proxy"] = "127.0.0.1"

import backtest  # noqa: E402
import feed  # noqa: E402
import marketmaker  # noqa: E402
import optimize  # noqa: E402
import simulate  # noqa: E402
from exchange import served  # noqa: E402
from marketmaker import SAMPLE, MarketMaker  # noqa: E402
from optimize import Parameters  # noqa: E402

import numpy as np  # noqa: E402
import websocket  # noqa: E402

ROUNDS = 5  # of each variant of the live path, in turn; the median counts
MESSAGES = 40_000  # of the sample, in each round
LATENCY_S = 20  # of live messages for the latencies
HOURS = 6
UPDATES = 17.0  # levels changed at random in 100 ms: about 23 rows a message in all


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


def heard(url: str, maker: MarketMaker, clock_ns: Callable[[], int]) -> Iterator[None]:
    """The program's own loop through feed thread and queue, without display and files."""
    source = feed.LiveFeed(feed.Instrument(), 200, url, None, clock_ns)
    try:
        for message in filter(None, source.messages(600)):
            yield maker.hear(message)
    finally:
        source.stop()


def time_live(url: str) -> float | None:
    """Seconds for the same MESSAGES through feed thread, queue and market maker."""
    maker, began = MarketMaker(Parameters(), feed.Instrument()), 0.0
    first_ns = next(feed.read_lines(SAMPLE))[0] - time.monotonic_ns()  # the sample's own time
    feed.MAX_WAITING = 10**12  # as in a burst: the queue may grow
    for _ in heard(url, maker, lambda: first_ns + time.monotonic_ns()):
        began = began or time.perf_counter()
        if maker.messages >= MESSAGES:
            return time.perf_counter() - began


def bench_live() -> None:
    """The live path against the bare loop, in turn; and from a message to a decision."""
    variants = {"bare": time_bare, "live": time_live}
    times = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        lines, head = islice(feed.read_lines(SAMPLE), MESSAGES + 100), Path(folder) / "head"
        head.write_text("".join(f"{recv_ns} {text}\n" for recv_ns, text in lines))
        for name in [*variants] * ROUNDS:
            with served(head, "--max") as url:
                times[name].append(variants[name](url))
    print(f"the live path, {MESSAGES} messages of the sample, median of {ROUNDS} rounds:")
    bare, *_ = medians = [statistics.median(seconds) for seconds in times.values()]
    for name, middle in zip(times, medians):
        print(f"  {name:<10}{MESSAGES / middle:9,.0f} messages/s {middle / MESSAGES * 1e6:7.1f} us "
              f"each   {middle / bare:5.2f} x bare")  # fmt: skip
    measure_latency()


def measure_latency() -> None:
    """From the stamp of a message to the quote decided on it, solved anew."""
    maker, waits = MarketMaker(Parameters(requote_move_bps=0.05), feed.Instrument()), []

    decide = maker.decide

    def note(time_ns: int) -> None:
        decide(time_ns)
        if maker.decision.source == "lp":
            waits.append((time.time_ns() - maker.decision.time_ns) / 1e3)
        optimize._remembered.cache_clear()

    maker.decide = note
    with served(SAMPLE) as url:
        end = time.monotonic() + LATENCY_S + marketmaker.WARMUP_RETURNS
        for _ in heard(url, maker, time.time_ns):
            if time.monotonic() > end:
                break
    low, high = (statistics.quantiles(waits, n=100)[k] for k in (49, 98))
    print(f"from message received to quote decided, {LATENCY_S} s of live messages:")
    print(f"  p50 {low:.0f} us   p99 {high:.0f} us   ({len(waits)} decisions)")


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


def play(path: Path) -> dict:
    """The whole loop: program, fills, history."""
    backtest.CACHE = path.parent
    tape, _ = backtest.load_tape(feed.Recording(path))
    maker = MarketMaker(Parameters(), feed.Instrument())
    began = time.perf_counter()
    for message in tape.messages():
        maker.hear(message)
    elapsed, rows = time.perf_counter() - began, len(tape.level) + len(tape.trade_level)
    return dict(seconds=elapsed, rows=rows, decisions=sum(maker.sources.values()),
                fills=len(maker.account.fills), peak_mb=peak_mb())  # fmt: skip


def bench_day() -> None:
    """Simulated hours, parsed and then played."""
    with tempfile.TemporaryDirectory() as scratch:
        path, rng = Path(scratch) / "day.jsonl.gz", np.random.default_rng(1)
        simulate.record(path, simulate.simulate(rng, HOURS, updates_per_delta=UPDATES))
        backtest.CACHE, began = path.parent, time.perf_counter()
        tape, _ = backtest.load_tape(feed.Recording(path))
        speed = len(tape.kind) / (time.perf_counter() - began)
        rows = len(tape.level) / len(tape.kind)
        print(f"parsing: {speed:,.0f} messages/s of {rows:.0f} rows")
        runs = []
        for _ in range(3):
            with backtest.start_workers(1) as alone:
                runs.append(alone.submit(play, path).result())
    best = min(runs, key=lambda run: run["seconds"])
    print(f"{HOURS} simulated hours, the loop with queue fills and the program, best of 3:")
    print(f"  {best['rows'] / best['seconds'] / 1e6:.2f} M rows/s, {best['seconds']:.2f} s for "
          f"{best['rows']:,} rows, {best['decisions']:,} decisions, {best['fills']:,} fills, "
          f"{best['peak_mb']:,.0f} MB")  # fmt: skip


PARTS = {"replay": bench_replay, "live": bench_live, "day": bench_day}


def main(names: list[str]) -> None:
    """Measure some parts, or all."""
    if unknown := set(names) - set(PARTS):
        raise feed.UserError(f"no part {min(unknown)!r}: there are {', '.join(PARTS)}")
    sys.stdout.reconfigure(line_buffering=True)
    for name in names or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    sys.exit(feed.exit_cleanly(lambda: main(sys.argv[1:])))
