"""make bench: what the live path costs, and how fast a recording replays.

Figures are ratios within one run, since machines differ. The loopback exchange runs in a
process of its own and sends prebuilt frames as fast as the socket takes them.

  bare       websocket-client's recv and json.loads, nothing else
  live       receive, stamp, check, parse, queue, apply, decide (two threads)
  recording  the same, and every line goes to a gzip file
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["no_proxy"] = "127.0.0.1"

import websocket  # noqa: E402

import feed  # noqa: E402
import marketmaker  # noqa: E402
import optimize  # noqa: E402
from marketmaker import SAMPLE, MarketMaker  # noqa: E402
from optimize import Parameters  # noqa: E402

ROUNDS = 5  # of each variant, in turn; the median counts
MESSAGES = 40_000  # of the sample, in each round
LATENCY_S = 20  # of live messages for the latencies


@contextlib.contextmanager
def served(path: Path, speed: str) -> Iterator[str]:
    """The URL of a loopback exchange in its own process."""
    command = [sys.executable, str(ROOT / "tests" / "exchange.py"), str(path), "--speed", speed]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(timeout=30)
        process.stdout.close()


def sample_clock() -> Callable[[], int]:
    """The sample's own time, running as the wall clock does."""
    first_ns = next(feed.read_lines(SAMPLE))[0] - time.monotonic_ns()
    return lambda: first_ns + time.monotonic_ns()


def parser_of_sample() -> feed.Parser:
    return feed.parser_of_recording(SAMPLE, None, None, None)[0]


def time_bare(url: str) -> float:
    """Seconds for MESSAGES with websocket-client and json alone."""
    ws = websocket.create_connection(url, timeout=30, skip_utf8_validation=True)
    ws.send(json.dumps({"op": "subscribe", "args": list(parser_of_sample().handlers)}))
    ws.recv()
    began = time.perf_counter()
    for _ in range(MESSAGES):
        json.loads(ws.recv())
    elapsed = time.perf_counter() - began
    ws.abort()
    ws.shutdown()
    return elapsed


def time_live(url: str, record: Path | None = None) -> float:
    """Seconds for the same MESSAGES through feed thread, queue and market maker."""
    source = feed.LiveFeed(url, parser_of_sample(), clock_ns=sample_clock())
    source.recorder = feed.Recorder(record) if record else None
    maker = MarketMaker(Parameters(), source.parser.instrument)
    feed.MAX_QUEUED = 10 * MESSAGES  # as in a burst: the queue may grow
    began = 0.0
    for messages in live_messages(source, maker):
        maker.take(*messages)
        began = began or time.perf_counter()
        if maker.messages >= MESSAGES:
            break
    elapsed = time.perf_counter() - began
    source.stop()
    if source.recorder:
        source.recorder.close()
    return elapsed


def live_messages(source: feed.LiveFeed, maker: MarketMaker) -> Iterator[list[feed.Message]]:
    """The program's own loop over a live feed, without display and files."""
    source.start(source.connect())
    session = SimpleNamespace(maker=maker, look=lambda: None)
    return marketmaker.live_messages(session, source, threading.Event(), 600)


def compare_live_path() -> None:
    """The live path against the bare loop, in turn."""
    times: dict[str, list[float]] = {"bare": [], "live": [], "recording": []}
    with tempfile.TemporaryDirectory() as folder:
        head = Path(folder) / "head.gz"
        with gzip.open(head, "wt", compresslevel=1) as file:
            for _, (recv_ns, text) in zip(range(MESSAGES + 100), feed.read_lines(SAMPLE)):
                file.write(f"{recv_ns} {text}\n")
        for number in range(ROUNDS):
            for name in times:
                with served(head, "max") as url:
                    if name == "bare":
                        elapsed = time_bare(url)
                    else:
                        path = Path(folder) / f"{number}.gz" if name == "recording" else None
                        elapsed = time_live(url, path)
                times[name].append(elapsed)
    bare = statistics.median(times["bare"])
    print(f"the live path, {MESSAGES} messages of the sample, median of {ROUNDS} rounds:")
    for name, values in times.items():
        median = statistics.median(values)
        print(
            f"  {name:<10}{MESSAGES / median:9,.0f} messages/s {median / MESSAGES * 1e6:7.1f} us "
            f"each   {median / bare:5.2f} x bare"
        )


def measure_latency(fresh: bool) -> None:
    """From the stamp of a message to the quote decided on it."""
    maker = MarketMaker(Parameters(requote_move_bps=0.05), parser_of_sample().instrument)
    waits: list[float] = []

    def decided(_: MarketMaker) -> None:
        if maker.quote.source == "lp":
            waits.append((source.clock_ns() - maker.state.time_ns) / 1e3)
        if fresh:
            optimize._remembered.cache_clear()

    with served(SAMPLE, "1") as url:
        source = feed.LiveFeed(url, parser_of_sample())
        maker.on_decision = decided
        end = time.monotonic() + LATENCY_S + marketmaker.WARMUP_RETURNS
        for messages in live_messages(source, maker):
            maker.take(*messages)
            if time.monotonic() > end:
                break
        source.stop()
    low, high = (statistics.quantiles(waits, n=100)[k] for k in (49, 98))
    kind = "fresh solve" if fresh else "remembered solve"
    print(f"  {kind:<18}p50 {low:7.0f} us   p99 {high:7.0f} us   ({len(waits)} decisions)")


def measure_replay() -> None:
    """python marketmaker.py --replay of the sample at --speed max, and its least: reading."""
    speeds, readings = [], []
    for _ in range(3):
        began = time.perf_counter()
        with gzip.open(SAMPLE) as file:
            lines = sum(json.loads(line.partition(b" ")[2]) is not None for line in file)
        readings.append(lines / (time.perf_counter() - began))
        out = io.StringIO()
        began = time.perf_counter()
        with contextlib.redirect_stdout(out):
            assert marketmaker.main(["--replay", str(SAMPLE), "--speed", "max"]) == 0
        elapsed = time.perf_counter() - began
        messages = next(int(w) for w in out.getvalue().split("UTC")[1].split() if w.isdigit())
        speeds.append(messages / elapsed)
    speed, reading = max(speeds), max(readings)
    print(f"replay of the sample at --speed max: {speed:,.0f} messages/s, best of 3")
    ratio = reading / speed
    print(f"  gzip and json.loads alone: {reading:,.0f} messages/s, {ratio:.1f} x as fast")


def resident_bytes() -> int:
    """Memory that this process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_memory() -> None:
    """Resident memory after a tenth of the sample, and at its end."""
    parser = parser_of_sample()
    count = sum(1 for _ in feed.replay(SAMPLE, parser_of_sample()))
    maker, early, messages = MarketMaker(Parameters(), parser.instrument), 0, []
    for number, message in enumerate(feed.replay(SAMPLE, parser)):
        messages.append(message)
        if len(messages) == marketmaker.BURST:
            maker.take(*messages)
            messages.clear()
        if number == count // 10:
            early = resident_bytes()
    late = resident_bytes()
    print(
        f"memory: {early / 2**20:.1f} MiB after a tenth of the sample, {late / 2**20:.1f} MiB at "
        f"its end, {late / early:.3f} times"
    )


def main() -> None:
    measure_memory()
    measure_replay()
    compare_live_path()
    print(f"from message received to quote decided, {LATENCY_S} s of live messages each:")
    for fresh in (False, True):
        measure_latency(fresh)


if __name__ == "__main__":
    main()
