"""How alike are two recordings? Prints one markdown table, a column for each file.

    python data/compare.py data/sample.jsonl.gz [more.jsonl.gz ...]

The problem. A simulator is believed too easily. This file measures, with its own plain
book (two dicts) and none of the project's modules, what matters to a market maker, so
that a simulated and a real recording can be laid side by side. Input: recordings, gzip
lines `<recv_ns> <message>`. Only order book and trade messages are read.

Definitions. Mid returns are logarithmic, in bps (1 bp = 1e-4), on a grid of the
exchange's time (`cts`); volatility is their root mean square for 1 s. Liquidity is
turnover in million USDT per bp of absolute 1 s mid movement, in windows of 60 s.
Depth "at 1 bp" is what rests within 1 bp of the mid on one side. A *naive maker* quotes
a bid and an ask 1.2 bps from the mid, anew each second, effective 100 ms later; a quote
fills once, at the first print at its price or through it. `markout` is side * (mid h
later - fill price) / fill price in bps; negative: we were run over. Its standard error
allows for dependence within blocks of 60 s. The markout at 0 s uses the book pushed
last before the fill: what the maker seems to earn. The others say what it keeps.

What it does not do. No queue, no fees, no check of the messages: a recording with lost
messages gives nonsense. Its fills are optimistic (no queue) and only a yardstick.
"""
import argparse
import gzip
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

STEP_MS = 100                       # grid of the mid
BAND_BPS = 1.0                      # depth is measured within this of the mid
QUOTE_BPS, REQUOTE_MS, LATENCY_MS = 1.2, 1000, 100     # the naive maker
BLOCK_MS = 60_000                   # windows: volatility, liquidity, standard errors
BURST_MS = 10                       # prints nearer in time than this are a burst
BUCKETS = ((0.0, 0.2), (0.2, 1.0), (1.0, 3.0))          # bps behind the best price
Columns = dict[str, np.ndarray]


# ---- Reading -----------------------------------------------------------------------
@dataclass
class Recording:
    """What is kept of one file; rows become arrays in `columns`."""

    books: list[tuple] = field(default_factory=list)    # one row a book message
    trades: list[tuple] = field(default_factory=list)   # T ms, taker side, price, size
    changed: list[int] = field(default_factory=list)    # levels in each delta
    lags: list[float] = field(default_factory=list)     # receive minus cts, ms


def messages(path: Path) -> Iterator[tuple[int, dict]]:
    """(receive time in ns, message) for each line."""
    with gzip.open(path, "rt") as lines:
        for line in lines:
            stamp, text = line.split(" ", 1)
            yield int(stamp), json.loads(text)


def load(path: Path) -> Recording:
    """Read one file and rebuild its book."""
    record, book = Recording(), {"b": {}, "a": {}}
    for recv_ns, message in messages(path):
        topic = message.get("topic", "")
        if topic.startswith("orderbook."):
            data = message["data"]
            if message["type"] == "snapshot":
                book = {"b": {}, "a": {}}
            else:
                record.changed.append(len(data["b"]) + len(data["a"]))
            apply_rows(book, data)
            cts = message.get("cts", message["ts"])     # without cts before December 2023
            record.lags.append(recv_ns / 1e6 - cts)
            record.books.append((cts, *measure(book)))
        elif topic.startswith("publicTrade."):
            record.trades += [(t["T"], 1 if t["S"] == "Buy" else -1, float(t["p"]),
                               float(t["v"])) for t in message["data"]]
    return record


def apply_rows(book: dict[str, dict[float, float]], data: dict) -> None:
    """Absolute sizes; 0 deletes."""
    for side in ("b", "a"):
        for price, size in data[side]:
            if float(size):
                book[side][float(price)] = float(size)
            else:
                book[side].pop(float(price), None)


def measure(book: dict[str, dict[float, float]]) -> list[float]:
    """Best prices, depth at 1 bp a side, then depth by distance behind the best."""
    bid, ask = max(book["b"]), min(book["a"])
    band = (bid + ask) / 2 * BAND_BPS * 1e-4
    row, middle = [bid, ask], (bid + ask) / 2
    near = []
    for side, best in (("b", bid), ("a", ask)):
        row.append(sum(s for p, s in book[side].items() if abs(p - middle) <= band))
        near += [(abs(p / best - 1) * 1e4, s) for p, s in book[side].items()]
    row.append((book["b"][bid] + book["a"][ask]) / 2)
    for low, high in BUCKETS:
        row.append(sum(s for d, s in near if low < d <= high) / 2)
    return row


def columns(record: Recording) -> Columns:
    """The rows as arrays, with the mid on a regular grid."""
    books, trades = np.array(record.books), np.array(sorted(record.trades))
    names = ["cts", "bid", "ask", "bid_depth", "ask_depth", "touch"]
    data = dict(zip(names, books.T))
    data["by_distance"] = books[:, len(names):]
    data.update(zip(["T", "side", "price", "size"], trades.T))
    data["mid"] = (data["bid"] + data["ask"]) / 2
    data["grid"] = np.arange(data["cts"][0], data["cts"][-1], STEP_MS)
    data["grid_mid"] = mid_at(data, data["grid"])
    data["changed"], data["lags"] = np.array(record.changed), np.array(record.lags)
    return data


def mid_at(data: Columns, time_ms: np.ndarray) -> np.ndarray:
    """The mid as pushed last at or before these times."""
    row = np.searchsorted(data["cts"], time_ms, side="right") - 1
    return data["mid"][np.maximum(row, 0)]


# ---- Statistics of the market ------------------------------------------------------
def returns_bps(data: Columns, step_ms: int) -> np.ndarray:
    """Log returns of the mid over steps of this length."""
    return np.diff(np.log(data["grid_mid"][::step_ms // STEP_MS])) * 1e4


def blocks(time_ms: np.ndarray, start: float) -> np.ndarray:
    """The number of the 60 s window of each time."""
    return ((time_ms - start) // BLOCK_MS).astype(int)


def window_volatility(data: Columns) -> np.ndarray:
    """Volatility of every full window of 60 s."""
    seconds = BLOCK_MS // 1000
    moves = returns_bps(data, 1000)
    full = moves[:len(moves) // seconds * seconds].reshape(-1, seconds)
    return np.sqrt(np.mean(full ** 2, axis=1))


def window_liquidity(data: Columns) -> np.ndarray:
    """Million USDT per bp, in every full window of 60 s."""
    seconds = BLOCK_MS // 1000
    moves = np.abs(returns_bps(data, 1000))
    count = len(moves) // seconds
    path = moves[:count * seconds].reshape(-1, seconds).sum(axis=1)
    turnover = np.bincount(
        np.maximum(blocks(data["T"], data["cts"][0]), 0), data["price"] * data["size"],
        minlength=count)[:count] / 1e6
    tick_bps = 0.1 / data["mid"][0] * 1e4
    return turnover / np.maximum(path, tick_bps)


def autocorrelation(values: np.ndarray, lag: int) -> float:
    """Of a series with itself `lag` places later."""
    values = values - values.mean()
    return float(np.mean(values[lag:] * values[:-lag]) / np.mean(values ** 2))


def kurtosis(values: np.ndarray) -> float:
    """Raw kurtosis: 3 for a normal law; nan for a price that never moved."""
    values = values - values.mean()
    spread = np.mean(values ** 2)
    return float(np.mean(values ** 4) / spread ** 2) if spread else np.nan


def hidden(data: Columns) -> float:
    """Share of prints through the best price that the book pushed last still showed."""
    row = np.maximum(np.searchsorted(data["cts"], data["T"], side="right") - 1, 0)
    best = np.where(data["side"] > 0, data["ask"][row], data["bid"][row])
    return float(np.mean(data["side"] * (data["price"] - best) > 0.01))


# ---- The naive maker ---------------------------------------------------------------
def naive_fills(data: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(time ms, side, price) of every fill of a maker that asks no questions."""
    fills = []
    decided = np.arange(data["cts"][0], data["cts"][-1], REQUOTE_MS)
    starts = np.searchsorted(data["T"], decided + LATENCY_MS, side="right")
    for mid, first, last in zip(mid_at(data, decided), starts, starts[1:]):
        for side in (1, -1):
            quote = mid * (1 - side * QUOTE_BPS * 1e-4)
            hit = (data["side"][first:last] == -side) & (
                side * (quote - data["price"][first:last]) >= 0)
            if hit.any():
                fills.append((data["T"][first + int(np.argmax(hit))], side, quote))
    return tuple(np.array(fills).reshape(-1, 3).T)


def markout(data: Columns, fills: tuple, horizon_ms: int) -> str:
    """Mean markout in bps and its standard error."""
    time_ms, side, price = fills
    known = time_ms + horizon_ms <= data["cts"][-1]
    time_ms, side, price = time_ms[known], side[known], price[known]
    if not len(time_ms):
        return "no fills"
    gain = side * (mid_at(data, time_ms + horizon_ms) - price) / price * 1e4
    sums = np.bincount(blocks(time_ms, time_ms[0]), gain - gain.mean())
    return f"{gain.mean():+.2f} ± {np.sqrt(np.sum(sums ** 2)) / len(gain):.2f}"


# ---- The table ---------------------------------------------------------------------
def quantiles(values: np.ndarray, points: tuple[int, ...], digits: int) -> str:
    """Percentiles as 'a / b / c'."""
    if not len(values):
        return "-"
    return " / ".join(f"{v:.{digits}f}" for v in np.percentile(values, points))


def market_rows(data: Columns) -> dict[str, str]:
    """Prices, book and volatility."""
    spread = np.round((data["ask"] - data["bid"]) / 0.1)
    depth = np.concatenate([data["bid_depth"], data["ask_depth"]])
    second, tenth = returns_bps(data, 1000), returns_bps(data, STEP_MS)
    span_s = (data["cts"][-1] - data["cts"][0]) / 1000
    rows = {
        "span, s": f"{span_s:.0f}",
        "price, USDT": f"{data['mid'].mean():.0f}",
        "spread: mean, ticks": f"{spread.mean():.3f}",
        "spread: share of one tick": f"{np.mean(spread == 1):.1%}",
        "volatility, bps/sqrt(s)": f"{np.sqrt(np.mean(second ** 2)):.2f}",
        "volatility in 60 s: p10 / p50 / p90":
            quantiles(window_volatility(data), (10, 50, 90), 2),
        "1 s returns: kurtosis": f"{kurtosis(second):.1f}",
        "1 s returns: share of zero": f"{np.mean(second == 0):.1%}",
        "100 ms returns: kurtosis": f"{kurtosis(tenth):.0f}",
        "100 ms returns: share of zero": f"{np.mean(tenth == 0):.1%}",
        "100 ms moves: p50 / p90 / p99, bps":
            quantiles(np.abs(tenth[tenth != 0]), (50, 90, 99), 2),
        "depth at 1 bp a side: mean / median, BTC":
            f"{depth.mean():.1f} / {np.median(depth):.1f}",
        "size at a best price: mean, BTC": f"{data['touch'].mean():.2f}",
    }
    for (low, high), mean in zip(BUCKETS, data["by_distance"].mean(axis=0)):
        rows[f"depth {low:g} to {high:g} bps behind the best, BTC"] = f"{mean:.1f}"
    rows["levels changed in a delta: mean / median"] = (
        f"{data['changed'].mean():.1f} / {np.median(data['changed']):.0f}")
    rows["receive - cts: p50 / p99, ms"] = quantiles(data["lags"], (50, 99), 0)
    return rows


def trade_rows(data: Columns) -> dict[str, str]:
    """Trades, liquidity and the naive maker."""
    span_s = (data["cts"][-1] - data["cts"][0]) / 1000
    counts = np.bincount(((data["T"] - data["T"][0]) // 1000).astype(int))
    fills = naive_fills(data)
    return {
        "prints /s": f"{len(data['T']) / span_s:.2f}",
        "BTC traded /s": f"{data['size'].sum() / span_s:.2f}",
        "size of a print: p50 / mean / p99, BTC":
            f"{np.median(data['size']):.3f} / {data['size'].mean():.3f} / "
            f"{np.percentile(data['size'], 99):.2f}",
        "sign autocorrelation: lag 1 / 10": f"{autocorrelation(data['side'], 1):.2f} / "
            f"{autocorrelation(data['side'], 10):.2f}",
        f"prints within {BURST_MS} ms of the last":
            f"{np.mean(np.diff(data['T']) < BURST_MS):.0%}",
        "prints beyond the best price last pushed": f"{hidden(data):.0%}",
        "variance / mean of prints in 1 s": f"{counts.var() / counts.mean():.0f}",
        "liquidity in 60 s: p10 / p50 / p90":
            quantiles(window_liquidity(data), (10, 50, 90), 2),
        "naive maker: fills": f"{len(fills[0])}",
        "naive maker: markout at 0 s, bps": markout(data, fills, 0),
        "naive maker: markout at 1 s, bps": markout(data, fills, 1000),
        "naive maker: markout at 10 s, bps": markout(data, fills, 10_000),
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compare recordings in one table.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    files = parser.parse_args(arguments).files
    missing = [path for path in files if not path.is_file()]
    if missing:
        print(f"compare.py: no file {missing[0]}; give recordings (.jsonl.gz)",
              file=sys.stderr)
        return 2
    tables = []
    for path in files:
        data = columns(load(path))
        tables.append(market_rows(data) | trade_rows(data))
    print("| | " + " | ".join(p.name.split(".")[0] for p in files) + " |")
    print("|---|" + "---:|" * len(files))
    for name in tables[0]:
        print(f"| {name} | " + " | ".join(table[name] for table in tables) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
