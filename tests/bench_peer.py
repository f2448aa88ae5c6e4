"""hftbacktest's speed on our events and quotes: cold (import, compilation) and warm.

    python peer_bench.py EVENTS.npy QUOTES.csv [LATENCY_MS]     one fresh process, as JSON

hftbacktest is no dependency: install it (pip install hftbacktest) to run this. The quotes
are followed as fixed ones, as in test_peer.py.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

BID, ASK = 1, -1  # as in feed.py
TRADE, CLEAR, DEPTH, WHOLE = 2, 3, 1, 4  # hftbacktest's kinds of event
BUY, SELL, BOTH_CLOCKS = 1 << 29, 1 << 28, 3 << 30
EVENT = np.dtype(
    [("ev", "u8"), ("exch_ts", "i8"), ("local_ts", "i8"), ("px", "f8"), ("qty", "f8"),
     ("order_id", "u8"), ("ival", "i8"), ("fval", "f8")], align=True)  # fmt: skip
MS, FEED_LAG_MS, ROUNDS = 1_000_000, 25, 3


def convert(tape: Any, tick_size: float = 0.1, snapshot: int | None = None) -> np.ndarray:
    """A tape's columns as hftbacktest's events, without a loop.

    A snapshot is a clear of both sides and its rows. One order serves both clocks: what was
    heard of late stands where it happened, and times of receipt never go back.
    """
    if snapshot is None:
        from feed import SNAPSHOT as snapshot
    is_whole = np.asarray(tape.kind) == snapshot
    ends = [tape.rows[BID].end, tape.rows[ASK].end, tape.trades.end]
    counts = [is_whole.astype(np.int64), *map(np.diff, ends)]
    start = np.concatenate(([0], np.cumsum(sum(counts))))  # of each message's events
    events = np.zeros(int(start[-1]), EVENT)
    before = start[:-1].copy()

    def put(count: np.ndarray, kind: np.ndarray, exch_ns: Any, price: Any, size: Any) -> None:
        """`count` events of each message, after those that it has already."""
        message = np.repeat(np.arange(len(count)), count)
        at = np.arange(len(message)) + (before - (np.cumsum(count) - count))[message]
        events["ev"][at] = kind.astype(np.uint64) | np.uint64(BOTH_CLOCKS)
        events["exch_ts"][at] = np.asarray(tape.exch_ns)[message] if exch_ns is None else exch_ns
        events["local_ts"][at] = np.asarray(tape.recv_ns)[message]
        events["px"][at], events["qty"][at] = price, size
        before[:] += count

    put(counts[0], np.full(counts[0].sum(), CLEAR), None, 0.0, 0.0)
    for side, flag, count in ((BID, BUY, counts[1]), (ASK, SELL, counts[2])):
        level, size = tape.rows[side].level, tape.rows[side].size
        kind = np.repeat(np.where(is_whole, WHOLE | flag, DEPTH | flag), count)
        put(count, kind, None, side * level * tick_size, size)
    trades = tape.trades
    kind = np.where(np.asarray(trades.side) == BID, TRADE | BUY, TRADE | SELL)
    put(counts[3], kind, trades.exch_ns, trades.tick * tick_size, trades.size)
    events = events[np.argsort(events["exch_ts"], kind="stable")]
    events["local_ts"] = np.maximum.accumulate(events["local_ts"])
    return events


def read_quotes(path: Path, tick_size: float, lot_size: float) -> tuple[np.ndarray, ...]:
    """Times, ticks and lots (columns bid, ask; 0 lots = none) of quotes.csv."""
    with open(path) as file:
        rows = list(csv.DictReader(file))
    ticks, lots = (
        np.array([[round(float(row[f"{s}_{name}"] or 0) / unit) for s in ("bid", "ask")]
                  for row in rows])
        for name, unit in (("price", tick_size), ("qty", lot_size))
    )  # fmt: skip
    return np.array([int(row["time_ns"]) for row in rows]), ticks, lots


def time_peer(
    events: np.ndarray | str | Path, quotes: Path, latency_ms: float = 100.0,
    tick_size: float = 0.1, lot_size: float = 0.001,
) -> tuple[float, float]:  # fmt: skip
    """Seconds: cold (import, compilation and first run in a fresh process), and warm."""
    found = measure_peer(events, quotes, latency_ms, tick_size, lot_size)
    return found["cold_s"], found["warm_s"]


def measure_peer(
    events: np.ndarray | str | Path, quotes: Path, latency_ms: float = 100.0,
    tick_size: float = 0.1, lot_size: float = 0.001,
) -> dict[str, float]:  # fmt: skip
    """The same with what was run: rows, quotes, fills, import_s, first_s, peak_mb."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(events, np.ndarray):
            path = Path(folder) / "events.npy"
            np.save(path, events)
        else:
            path = Path(events)
        command = [sys.executable, __file__, path, quotes, latency_ms, tick_size, lot_size]
        # a cache of compiled code would make the next process warm
        environment = dict(os.environ, NUMBA_CACHE_DIR=folder)
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env=environment
        )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def build_follow() -> Any:
    """The loop over fixed quotes, to be compiled at its first call."""
    import numba
    from hftbacktest.order import FILLED, GTX, LIMIT, NEW, NONE

    @numba.njit
    def follow(peer, time_ns, ticks, lots, tick_size, lot_size):
        sent, level, size = np.zeros((3, 2), np.int64)  # of the order that stands; 0 = none
        fills = [(np.int64(0), np.int64(0), np.int64(0)) for _ in range(0)]
        late = 0
        peer.elapse(0)
        row = 0
        while row <= len(time_ns):
            is_over = row == len(time_ns)
            wait = 60_000_000_000 if is_over else time_ns[row] - peer.current_timestamp
            is_over |= peer.elapse(wait) != 0
            if row % 64 == 0 or is_over:  # collect, then forget, what is over
                values = peer.orders(0).values()
                while values.has_next():
                    order = values.get()
                    if order.status == FILLED:
                        fills.append(
                            (order.exch_timestamp, np.int64(order.side), order.exec_price_tick)
                        )
                for k in range(2):
                    if sent[k]:
                        status = peer.orders(0).get(sent[k]).status
                        if status != NEW and status != NONE:
                            sent[k] = 0
                peer.clear_inactive_orders(0)
            if is_over:
                break
            for k in range(2):
                if sent[k]:
                    status = peer.orders(0).get(sent[k]).status
                    if status == NEW or status == NONE:
                        if level[k] == ticks[row, k] and size[k] == lots[row, k]:
                            continue
                        if peer.cancel(0, sent[k], False):
                            late += 1  # its acknowledgement is still under way: it stays
                            continue
                    sent[k] = 0
                if lots[row, k]:
                    sent[k], level[k], size[k] = 2 * row + 2 + k, ticks[row, k], lots[row, k]
                    price, qty = level[k] * tick_size, size[k] * lot_size
                    if k == 0:
                        peer.submit_buy_order(0, sent[k], price, qty, GTX, LIMIT, False)
                    else:
                        peer.submit_sell_order(0, sent[k], price, qty, GTX, LIMIT, False)
            row += 1
        return fills, late

    return follow


def run_once(follow: Any, events: np.ndarray, quotes: tuple, latency_ms: float,
             tick_size: float, lot_size: float) -> tuple[list, int]:  # fmt: skip
    """One backtest by hftbacktest: its fills, and quotes it could not follow in time."""
    from hftbacktest import BacktestAsset, HashMapMarketDepthBacktest

    asset = BacktestAsset().data(events).linear_asset(1.0)
    asset = asset.constant_order_latency(round(latency_ms * MS), FEED_LAG_MS * MS)
    asset = asset.risk_adverse_queue_model().no_partial_fill_exchange()
    peer = HashMapMarketDepthBacktest([asset.tick_size(tick_size).lot_size(lot_size)])
    fills, late = follow(peer, *quotes, tick_size, lot_size)
    peer.close()
    return sorted(fills), late


def main(arguments: list[str]) -> None:
    """In a fresh process: load untimed, then cold, then warm."""
    import resource

    latency_ms, tick_size, lot_size = map(float, [*arguments[2:], 100, 0.1, 0.001][:3])
    events = np.load(arguments[0])
    quotes = read_quotes(Path(arguments[1]), tick_size, lot_size)
    settings = (events, quotes, latency_ms, tick_size, lot_size)
    began = time.perf_counter()
    follow = build_follow()
    imported = time.perf_counter()
    fills, late = run_once(follow, *settings)
    ended = time.perf_counter()
    warm = []
    for _ in range(ROUNDS):
        again = time.perf_counter()
        assert run_once(follow, *settings) == (fills, late)
        warm.append(time.perf_counter() - again)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(dict(
        cold_s=ended - began, warm_s=sorted(warm)[ROUNDS // 2], import_s=imported - began,
        first_s=ended - imported, rows=len(events), quotes=len(quotes[0]), fills=len(fills),
        not_followed=late, peak_mb=peak_mb,
    )))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
