"""What the exchange tells us: Bybit's public messages, the order book, recordings.

Three lines from Bybit's public socket (linear BTCUSDT, 2026-08-09, shortened; source:
the public capture in bmoscon/cryptofeed, branch v3):

  {"topic":"orderbook.200.BTCUSDT","type":"delta","ts":1786310818170,"data":{"s":
   "BTCUSDT","b":[["65114.20","6.054"],["65101.00","0"]],"a":[],"u":15076953,
   "seq":753843900402},"cts":1786310818166}
  {"topic":"publicTrade.BTCUSDT","type":"snapshot","ts":1786310819681,"data":[{"T":
   1786310819680,"s":"BTCUSDT","S":"Sell","v":"0.004","p":"65114.20",...}]}
  {"topic":"tickers.BTCUSDT","type":"delta","data":{"symbol":"BTCUSDT","markPrice":
   "65117.43"},"cs":753843915209,"ts":1786310818183}

A book row carries the whole size now resting at its price; "0" deletes the level.
`S` is the taker's side: a "Sell" can fill a bid. `u` counts the book's messages: a
missing number is a lost message, and a book that lost one is worth nothing.

Two clocks. recv_ns is when we received a message (ns since the epoch, never
decreasing); exch_ns is when the matching engine acted (`cts` of the book, `T` of a
trade). Prices are integer ticks, sizes are base coin (BTC).

The order of the file: what a message is, and a tape of columns made of many; the order
book that a tape is applied to; the parser that makes messages; then where they come from:
a recording, an archive, the live socket, and how archives are downloaded. One rule
makes a live session and its replay the same: both are a sequence of stamped lines, and
everything after the stamp is a function of these lines.

What this module does not do: it knows nothing of quoting, sends no order, holds no key.
Sources: Bybit's V5 documentation (bybit-exchange.github.io/docs/v5, read 2026-07);
hftbacktest's collector for the form of a recording's lines.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import http.client
import json
import logging
import math
import mmap
import os
import queue
import re
import signal
import struct
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, DecimalException
from functools import cached_property, partial
from itertools import accumulate, chain, groupby, islice, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import websocket

NS = 1_000_000_000  # nanoseconds in a second
MS = 1_000_000  # nanoseconds in a millisecond
BID, ASK = 1, -1  # side: +1 buys, -1 sells
SIDES = (BID, ASK)

WS_URL = "wss://stream.bybit.com/v5/public/{category}"
REST_URL = "https://api.bybit.com/v5/market/instruments-info?category={}&symbol={}"
USER_AGENT = {"User-Agent": "marketmaker-reference/1.0"}
DEPTHS = (200, 1000)  # levels a side, pushed every 100 and 200 ms

CONNECT_S, RECV_S = 10.0, 1.0  # socket time-outs
STOP_S = 2.0  # patience with a thread that is just connecting
PING_S = 5.0  # an idle socket may be cut after 10 s (sources differ, so be early)
WATCHDOG_S = 10.0  # without any frame: reconnect
BOOK_WATCHDOG_S = 60.0  # without a book message (a renamed topic looks like this)
BACKOFF_S = (1.0, 30.0)  # first and longest wait between connections; 500/5 min allowed
HEALTHY_S = 60.0  # a connection that lived so long resets the backoff
ARGS_PER_REQUEST = 10  # spot's limit of topics in one subscribe request
MAX_QUEUED = 50_000  # messages waiting for the main thread; more = book lost
MAX_MESSAGE = 4 << 20  # bytes; a snapshot of 1000 levels has about 60 kB
READ_AHEAD = 1 << 16  # bytes taken from the socket at once
MAX_CLOCK_GAP_NS = 86_400 * NS  # exchange time further than this from ours is nonsense
MAX_TICK = 2**31 - 1
MAX_SIZE = 1e15  # base coin
FLUSH_S = 0.5  # a recording is on disk after so long
BLOCK = 1 << 14  # messages or trades that are Python objects at a time

BOOK_HOST = "https://quote-saver.bycsi.com/orderbook"  # Bybit's archives of past days
TRADES_HOST = "https://public.bybit.com"
LAST_OB500 = "2025-08-20"  # linear order books have 200 levels a side since then
TRIES, RETRY_S = 5, 2.0  # a failed download waits 2, 4, 8, 16 s
PAUSE_S = 0.5  # between requests; 50 a second get the address blocked
INFLATION, SMALL = 100, 64 << 20  # text / file: a book has 5 to 25; bytes always allowed
SILENCE_NS = 2 * NS  # a book pushed every 100 ms that is silent for longer has a hole


class UserError(Exception):
    """Something the user can mend: one clear line with value, rule and remedy."""


# ---- Instrument --------------------------------------------------------------------


@dataclass(frozen=True)
class Instrument:
    """What is traded. Steps are kept as the exchange's text, so that they stay exact."""

    symbol: str = "BTCUSDT"
    category: str = "linear"  # or spot
    tick_text: str = "0.1"  # USDT
    lot_text: str = "0.001"  # base coin, the quantity step
    min_qty: float = 0.001  # base coin

    def __post_init__(self) -> None:
        for flag, text in (("--tick-size", self.tick_text), ("--lot-size", self.lot_text)):
            try:
                sound = 1e-12 <= float(text) < math.inf
            except (TypeError, ValueError):
                sound = False
            if not sound:
                raise UserError(f"{flag} {text!r} must be a number above 0, such as 0.1")

    @cached_property
    def tick_size(self) -> float:
        return float(self.tick_text)

    @cached_property
    def lot_size(self) -> float:
        return float(self.lot_text)

    @cached_property
    def min_order(self) -> float:
        """The smallest order, base coin."""
        return max(self.lot_size, self.min_qty)

    @property
    def base_coin(self) -> str:
        """BTC of BTCUSDT."""
        return self.symbol.removesuffix("USDT")

    @cached_property
    def digits(self) -> int:
        """Decimals of a price."""
        return max(0, -Decimal(self.tick_text).normalize().as_tuple().exponent)


BUILT_IN = {  # Bybit's instruments-info, 2025; asked again at every live start
    ("BTCUSDT", "linear"): Instrument(),
    ("BTCUSDT", "spot"): Instrument("BTCUSDT", "spot", "0.1", "0.000001", 0.000011),
}


def known_instrument(
    symbol: str, category: str, tick_text: str | None = None, lot_text: str | None = None
) -> Instrument:
    """From the built-in table, or from --tick-size and --lot-size."""
    known = BUILT_IN.get((symbol, category))
    if known is None and not (tick_text and lot_text):
        raise UserError(
            f"the steps of {symbol} ({category}) are not known: give --tick-size and --lot-size"
        )
    known = known or Instrument(symbol, category, min_qty=0.0)
    return with_steps(known, tick_text, lot_text)


def with_steps(known: Instrument, tick_text: str | None, lot_text: str | None) -> Instrument:
    """An instrument with the steps that the flags give."""
    steps = dict(tick_text=tick_text or known.tick_text, lot_text=lot_text or known.lot_text)
    return dataclasses.replace(known, **steps)


def live_instrument(
    symbol: str, category: str, tick_text: str | None, lot_text: str | None, url: str | None
) -> Instrument:
    """Asked from Bybit at a live start; from the flags or the table elsewhere."""
    if not (url or (tick_text and lot_text)):
        with contextlib.suppress(OSError, http.client.HTTPException):
            return with_steps(fetch_instrument(symbol, category), tick_text, lot_text)
    return known_instrument(symbol, category, tick_text, lot_text)


def fetch_instrument(symbol: str, category: str) -> Instrument:
    """Ask Bybit's public REST endpoint. OSError when it cannot be reached."""
    url = REST_URL.format(category, urllib.parse.quote(symbol))
    request = urllib.request.Request(url, headers=USER_AGENT)
    with urllib.request.urlopen(request, timeout=CONNECT_S) as response:  # TLS is verified
        body = response.read(MAX_MESSAGE)
    if not body.startswith(b"{"):  # a page of somebody between us and Bybit
        raise OSError("no JSON in the answer")
    return parse_instrument(body, symbol, category)


def parse_instrument(body: bytes | str, symbol: str, category: str) -> Instrument:
    """The steps out of an instruments-info answer; linear and spot name them differently."""
    try:
        (found,) = json.loads(body)["result"]["list"]
        lot = found["lotSizeFilter"]
        step = lot.get("qtyStep") or lot["basePrecision"]
        tick = found["priceFilter"]["tickSize"]
        return Instrument(symbol, category, tick, step, float(lot["minOrderQty"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"Bybit knows no {category} symbol {symbol}: check --symbol and --category"
        ) from None


# ---- Messages and tapes ------------------------------------------------------------

# The order counts: kinds above TICKER end a slice, those above SNAPSHOT come with a note.
DELTA, TRADES, TICKER, SNAPSHOT, LOST, CONTROL, REFUSED = KINDS = range(7)
LEVEL, SIZE = "q", "d"  # columns: int64, float64
Columns = tuple[array, array]  # levels and sizes of book rows
NO_ROWS: Columns = (array(LEVEL), array(SIZE))
NO_LEVEL = -(2**62)  # the best of an empty side
QUOTES = ("last_price", "mark_price", "index_price", "funding_rate")  # of a ticker


class Message(NamedTuple):
    """One parsed line. A level is side x price tick: on both sides larger is better."""

    kind: int  # one of KINDS
    recv_ns: int
    exch_ns: int = 0
    bids: Columns = NO_ROWS
    asks: Columns = NO_ROWS
    trades: list[tuple[int, int, int, float, bool]] = []  # rows of Trades
    fields: dict[str, Any] = {}  # ticker values, a control line, the reason of a loss


class Rows(NamedTuple):
    """Book rows of one side as columns; those of message m are end[m] to end[m + 1]."""

    level: np.ndarray  # int64
    size: np.ndarray  # float64, base coin; 0 deletes
    end: np.ndarray  # (messages + 1,), from 0


class Trades(NamedTuple):
    """Trades as columns; those of message m are end[m] to end[m + 1]."""

    exch_ns: np.ndarray
    side: np.ndarray  # the taker's
    tick: np.ndarray
    size: np.ndarray  # base coin
    is_rpi: np.ndarray
    end: np.ndarray  # (messages + 1,), from 0


@dataclass(frozen=True, slots=True, eq=False)
class Tape:
    """Messages in the order received, as columns: a burst, a recording, a day.

    `best` is known where the tape was made once to be used often (History).
    """

    kind: np.ndarray  # (messages,)
    recv_ns: np.ndarray  # (messages,)
    exch_ns: np.ndarray  # (messages,): 0 where it is neither book nor trades
    last_book: np.ndarray  # (messages,): the last book message so far; -1 before the first
    turnover: np.ndarray  # (messages,): sum of ticks x base coin traded
    rows: dict[int, Rows]  # by side
    trades: Trades
    reach: dict[int, np.ndarray]  # (messages,) by side: orders at or above that level are reached
    quotes: np.ndarray  # (tickers, 1 + fields): message, values; nan = unchanged
    notes: dict[int, dict[str, Any]]  # fields of losses, control lines, refusals, by message
    best: dict[int, np.ndarray] | None = None  # by side: best level after each message
    bounds: dict[int, np.ndarray] | None = None  # by side: lowest and highest level of all

    def __len__(self) -> int:
        return len(self.kind)


def build_tape(messages: Sequence[Message]) -> Tape:
    """Columns from parsed messages."""
    kinds, recv_ns, exch_ns, bids, asks, trades, fields = zip(*messages)
    book = [-1]
    is_event = [kind in (DELTA, SNAPSHOT, TRADES) for kind in kinds]
    for m, kind in enumerate(kinds):
        book.append(m if kind == DELTA or kind == SNAPSHOT else book[-1])
    tickers = [m for m, kind in enumerate(kinds) if kind == TICKER]
    rows, columns = {BID: _rows_of(bids), ASK: _rows_of(asks)}, _trades_of(trades)
    return Tape(
        np.array(kinds, np.int8),
        np.array(recv_ns, np.int64),
        np.array(exch_ns, np.int64) * is_event,
        np.array(book[1:]),
        np.array([sum(t[2] * t[3] for t in found) for found in trades], float),
        rows,
        columns,
        {side: _reach_of(side, rows[-side], columns) for side in SIDES},
        np.array(
            [[m, *(fields[m].get(name, math.nan) for name in QUOTES)] for m in tickers]
        ).reshape(-1, 1 + len(QUOTES)),
        {m: fields[m] for m, kind in enumerate(kinds) if kind > SNAPSHOT},
    )


def _ends(parts: Iterable) -> np.ndarray:
    return np.array([0, *accumulate(map(len, parts))], np.int64)


def _rows_of(sides: Sequence[Columns]) -> Rows:
    levels, sizes = zip(*sides)
    flat = np.frombuffer(b"".join(levels), LEVEL), np.frombuffer(b"".join(sizes), SIZE)
    return Rows(*flat, _ends(levels))


def _trades_of(trades: Sequence[list]) -> Trades:
    columns = list(zip(*chain.from_iterable(trades))) or [()] * 5
    types = (np.int64, np.int8, np.int64, float, bool)
    return Trades(*map(np.array, columns, types), _ends(trades))


def _reach_of(side: int, facing: Rows, trades: Trades) -> np.ndarray:
    """How far each message comes towards our orders on a side: by a level of the opposite
    side that it shows, or a trade of the opposite taker; as a level of ours.
    """
    shown = np.where(facing.size > 0, -facing.level, -NO_LEVEL)
    traded = np.where(trades.side == -side, side * trades.tick, -NO_LEVEL)
    reach = np.full(len(facing.end) - 1, -NO_LEVEL)
    for levels, end in ((shown, facing.end), (traded, trades.end)):
        has_any = (np.diff(end) > 0).nonzero()[0]
        if len(has_any):
            nearest = np.minimum.reduceat(levels, end[has_any])
            reach[has_any] = np.minimum(reach[has_any], nearest)
    return reach


def list_messages(tape: Tape, start: int, stop: int) -> list[Message]:
    """The other way round: messages start..stop-1 of a tape, without their tickers."""

    def columns(side: int, m: int) -> Columns:
        level, size, end = tape.rows[side]
        part = slice(end[m], end[m + 1])
        return array(LEVEL, level[part].tolist()), array(SIZE, size[part].tolist())

    messages = []
    for m in range(start, stop):
        kind, recv_ns, exch_ns = int(tape.kind[m]), int(tape.recv_ns[m]), int(tape.exch_ns[m])
        *found, end = tape.trades
        trades = list(zip(*(column[end[m] : end[m + 1]].tolist() for column in found)))
        sides, note = (columns(BID, m), columns(ASK, m)), tape.notes.get(m, {})
        if kind != TICKER:
            messages.append(Message(kind, recv_ns, exch_ns, *sides, trades, note))
    return messages


# ---- Order book --------------------------------------------------------------------

LADDER_WIDTH = 1 << 20  # levels: 104,858 USDT of ticks of 0.1; memory only where touched
SCAN = 256  # levels looked at once when the best level was deleted


def untouched_zeros(width: int) -> np.ndarray:
    """Zeros that take memory only where they are written to. A mapping of its own goes back
    to the system with the array; malloc would keep it, and fill it with zeros the next time.
    """
    return np.frombuffer(mmap.mmap(-1, width * np.dtype(float).itemsize))


class Ladder:
    """One side of the book: sizes in an array indexed by level = side x price tick.

    A better price has the larger level on either side, so everything is written once.
    What lies beyond the worst level shown is unknown, not zero.
    """

    def __init__(self, width: int = LADDER_WIDTH) -> None:
        self.width = width
        self.beyond = 0  # rows out of the array's reach, left out
        self.clear()

    def clear(self) -> None:
        """Forget every level."""
        self.sizes = untouched_zeros(self.width)
        self.origin = 0  # level of index 0
        self.best: int | None = None  # level
        self._low = self.width  # no occupied index is lower
        self._bounds: np.ndarray | None = None  # bounds known to fit into the array

    def set(self, levels: np.ndarray, sizes: np.ndarray) -> None:
        """Set sizes at levels; the later of two rows for one level wins."""
        index = levels - self.origin
        low, high = int(np.minimum.reduce(index)), int(np.maximum.reduce(index))
        if low < 0 or high >= self.width:
            levels, sizes = self._refit(levels, sizes)
            return self.set(levels, sizes) if len(levels) else None
        self.sizes[index] = sizes
        self._low = min(self._low, low)
        if self.best is not None:
            high = max(high, self.best - self.origin)
        self.best = self._occupied_from(high)

    def put(self, levels: np.ndarray, sizes: np.ndarray, best: int, bounds: np.ndarray) -> None:
        """The same where the outcome is known: `best` afterwards (NO_LEVEL: none), and
        `bounds`, the lowest and highest of all levels to come, so that nothing is searched.
        """
        if bounds is not self._bounds:
            low, high = bounds.tolist()
            if self.best is None:
                self.origin = (low + high - self.width) // 2
            if not self.origin <= low <= high < self.origin + self.width:
                return self.set(levels, sizes)
            self._bounds, self._low = bounds, min(self._low, low - self.origin)
        self.sizes[levels - self.origin] = sizes
        self.best = None if best == NO_LEVEL else best

    def _refit(self, levels: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bring the market to the array's middle; leave out rows that still do not fit."""
        market = self.best
        if market is None:  # a delete is no market
            market = int(levels[sizes > 0].max(initial=levels.min()))
        shift = market - self.width // 2 - self.origin
        if abs(shift) > self.width // 4 or self.best is None:
            moved = untouched_zeros(self.width)
            kept = max(self.width - abs(shift), 0)
            old, new = max(shift, 0), max(-shift, 0)
            moved[new : new + kept] = self.sizes[old : old + kept]
            self.sizes, self.origin, self._bounds = moved, self.origin + shift, None
            self._low = max(self._low - shift, 0)
        fits = (levels >= self.origin) & (levels < self.origin + self.width)
        self.beyond += int(len(levels) - fits.sum())
        return levels[fits], sizes[fits]

    def _occupied_from(self, index: int) -> int | None:
        """The best occupied level at or below an index."""
        if self.sizes[index]:
            return self.origin + index
        stop, chunk = index, SCAN
        while stop > self._low:
            start = max(stop - chunk, 0)
            found = np.flatnonzero(self.sizes[start:stop])
            if len(found):
                return self.origin + start + int(found[-1])
            stop, chunk = start, chunk * 4
        return None

    def worst(self) -> int | None:
        """The worst level shown: the edge of the visible window."""
        if self.best is None:
            return None
        top = self.best - self.origin
        worst = self._low + int(np.argmax(self.sizes[self._low : top + 1] > 0))
        if self._bounds is None:  # else lower levels may be put without a word
            self._low = worst
        return self.origin + worst

    def is_visible(self, level: int) -> bool:
        """Whether the feed shows this level (perhaps as empty)."""
        worst = self.worst()
        return worst is not None and level >= worst

    def holds_below(self, level: int, deleted: np.ndarray) -> bool:
        """Whether within 2 x SCAN levels below this one any stays occupied when the levels
        `deleted` are: then the feed goes on showing this one. False leaves it open.
        """
        index = level - self.origin
        first = max(index - 2 * SCAN, self._low)
        below = self.sizes[first : max(index, 0)].copy()
        gone = deleted - (first + self.origin)
        below[gone[gone >= 0]] = 0
        return bool(below.any())

    def size_at(self, level: int) -> float:
        """Size resting at a level, base coin; 0 where none is shown."""
        index = level - self.origin
        return float(self.sizes[index]) if 0 <= index < self.width else 0.0

    def depth(self, floor: float) -> float:
        """Size resting at levels >= floor, base coin."""
        if self.best is None:
            return 0.0
        start = max(math.ceil(floor) - self.origin, 0)
        return float(np.add.reduce(self.sizes[start : self.best - self.origin + 1]))

    def occupied(self) -> tuple[np.ndarray, np.ndarray]:
        """Levels and sizes, best first."""
        if self.best is None:
            return np.zeros(0, np.int64), np.zeros(0)
        index = np.flatnonzero(self.sizes[self._low : self.best - self.origin + 1])[::-1]
        index = index + self._low
        return index + self.origin, self.sizes[index]


class OrderBook:
    """Both ladders, and the exchange time that they show."""

    def __init__(self, width: int = LADDER_WIDTH) -> None:
        self.ladders = {BID: Ladder(width), ASK: Ladder(width)}
        self.exch_ns = 0  # cts of the last message applied

    def clear(self) -> None:
        for ladder in self.ladders.values():
            ladder.clear()

    def apply(self, tape: Tape, start: int = 0, stop: int | None = None) -> None:
        """Apply the rows of a tape's messages start..stop-1, both sides."""
        stop = len(tape) if stop is None else stop
        if start >= stop:
            return
        for side, ladder in self.ladders.items():
            level, size, end = tape.rows[side]
            first, last = end[start], end[stop]
            if first == last:
                continue
            if tape.best is None:
                ladder.set(level[first:last], size[first:last])
            else:
                best = int(tape.best[side][stop - 1])
                ladder.put(level[first:last], size[first:last], best, tape.bounds[side])
        book = tape.last_book[stop - 1]
        if book >= start:
            self.exch_ns = int(tape.exch_ns[book])

    def best(self, side: int) -> int | None:
        """The market's best price on a side, in ticks."""
        level = self.ladders[side].best
        return None if level is None else side * level

    @property
    def fault(self) -> str:
        """Why there is no mid price: one-sided, crossed, or empty for nothing."""
        bid, ask = self.ladders[BID].best, self.ladders[ASK].best
        if bid is None or ask is None:
            return "book one-sided"
        return "book crossed" if bid >= -ask else ""

    @property
    def mid_ticks(self) -> float:
        """(best bid + best ask) / 2 in ticks; nan while the book has a fault."""
        bid, ask = self.ladders[BID].best, self.ladders[ASK].best
        return math.nan if bid is None or ask is None or bid >= -ask else (bid - ask) / 2

    def depth(self, side: int, band_bps: float) -> float:
        """Base coin resting within band_bps of the mid on a side."""
        mid = self.mid_ticks
        return 0.0 if mid != mid else self.ladders[side].depth(mid * (side - band_bps * 1e-4))


# ---- Parser: Bybit's letters become messages ---------------------------------------


class OffGrid(ValueError):
    """A price that is not a multiple of the tick size."""


class Table(dict):
    """Text -> number, judged and converted once: the same few thousand prices and sizes
    come again and again, and a look-up is several times as fast as a conversion.
    """

    LIMIT = 50_000  # texts remembered

    def __init__(self, convert: Callable[[str], float]) -> None:
        self.convert = convert

    def __missing__(self, text: str) -> float:
        if type(text) is not str:
            raise TypeError(f"{str(text)[:40]} is not a text")
        number = self.convert(text)
        if len(self) >= self.LIMIT:
            self.clear()
        self[text] = number
        return number


def level_of(text: str, tick: Decimal, side: int = BID, limit: int = MAX_TICK) -> int:
    """A price text as side x ticks, exactly: "64474.1" and "64474.10" agree."""
    try:
        ticks = Decimal(text) / tick
        if not 0 < ticks <= limit:
            raise ValueError(f"price {text[:40]} is out of range")
    except DecimalException:
        raise ValueError(f"price {text[:40]!r} is not a number") from None
    if ticks != int(ticks):
        raise OffGrid(f"price {text[:40]} is not a multiple of the tick {tick}: check --tick-size")
    return side * int(ticks)


def size_of(text: str) -> float:
    """A size text in base coin."""
    size = float(text)
    if not 0 <= size < MAX_SIZE:  # nan fails too
        raise ValueError(f"size {text[:40]} is out of range")
    return size


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


_scan = json.JSONDecoder(parse_constant=_refuse_constant).raw_decode


def _decode(text: str) -> Any:
    """json.loads without NaN, Infinity, and the search for white space."""
    message, end = _scan(text)
    if end != len(text) and text[end:].strip():
        raise ValueError("text behind the message")
    return message


MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)
TAKER_SIDE = {"Buy": BID, "Sell": ASK}
KIND_OF = {"delta": DELTA, "snapshot": SNAPSHOT}
TICKER_FIELDS = {  # Bybit's name: ours
    "lastPrice": "last_price",
    "markPrice": "mark_price",
    "indexPrice": "index_price",
    "usdIndexPrice": "index_price",
    "fundingRate": "funding_rate",
}


class Parser:
    """Lines to messages; keeps the book's `u` and counts what it sees.

    No line makes it raise, but one: a first snapshot off the price grid is a wrong
    --tick-size and ends in a UserError.
    """

    def __init__(self, instrument: Instrument, depth: int = 200) -> None:
        self.use(instrument)
        self.sizes = Table(size_of)
        symbol = instrument.symbol
        self.handlers = {
            f"orderbook.{depth}.{symbol}": self._book,
            f"publicTrade.{symbol}": self._trades,
            f"tickers.{symbol}": self._ticker,
        }
        self.counts: Counter[str] = Counter()
        self.problem = ""  # the newest malformed message or gap, in words
        self.last_u: int | None = None  # None: no book that can be vouched for
        self._loss_told = False  # said once until the next snapshot or connection
        self.had_book = False

    def use(self, instrument: Instrument) -> None:
        """Read prices on an instrument's grid from here on."""
        self.instrument = instrument
        tick = Decimal(instrument.tick_text)
        self.levels = {s: Table(partial(level_of, tick=tick, side=s)) for s in SIDES}

    def parse(self, recv_ns: int, text: str, from_exchange: bool = False) -> Message | None:
        """A line's message; None for what carries nothing (acks, pongs, other topics)."""
        handler: Callable[[int, dict], Message | None] | None = None
        try:
            message = _decode(text)
            topic = message.get("topic")
            if topic is not None:
                handler = self.handlers.get(topic, self._ignored)
            elif message.get("op") == "local" and not from_exchange:
                handler = self._control
            else:
                handler = self._operation
            return handler(recv_ns, message)
        except MALFORMED as error:
            return self._malformed(recv_ns, error, handler)

    def _malformed(self, recv_ns: int, error: Exception, handler: Any) -> Message | None:
        if isinstance(error, OffGrid) and handler == self._book and not self.had_book:
            raise UserError(str(error))
        self.counts["malformed"] += 1
        self.problem = printable(f"malformed message: {type(error).__name__}: {str(error)[:100]}")
        return self._lose(recv_ns, self.problem) if handler == self._book else None

    def _lose(self, recv_ns: int, reason: str) -> Message | None:
        """From here to the next snapshot the book is worth nothing."""
        self.last_u, self.problem = None, reason
        if self._loss_told:
            return None
        self._loss_told = True
        self.counts["losses"] += 1
        return Message(LOST, recv_ns, fields={"reason": reason})

    def _time(self, ms: int, recv_ns: int) -> int:
        if type(ms) is not int or not -MAX_CLOCK_GAP_NS < ms * MS - recv_ns < MAX_CLOCK_GAP_NS:
            raise ValueError(f"exchange time {str(ms)[:30]} is more than a day from our clock")
        return ms * MS

    def _book(self, recv_ns: int, message: dict) -> Message | None:
        self.counts["book"] += 1
        data = message["data"]
        u, kind = data["u"], KIND_OF.get(message["type"])
        if type(u) is not int or not 0 <= u < 2**63:
            raise ValueError(f"u {str(u)[:30]} is not a count")
        exch_ns = self._time(message["cts"] if "cts" in message else message["ts"], recv_ns)
        if kind == SNAPSHOT or u == 1:  # u == 1: the service restarted
            kind = SNAPSHOT
        elif kind is None:
            raise ValueError(f"type {str(message['type'])[:30]!r} of a book message is not known")
        elif self.last_u is None:
            self.counts["before snapshot"] += 1
            return self._lose(recv_ns, "delta before a snapshot")
        elif u <= self.last_u:
            self.counts["repeated"] += 1
            return None
        elif u != self.last_u + 1:
            self.counts["gaps"] += 1
            return self._lose(recv_ns, f"gap in u: {u} after {self.last_u}")
        bids, asks = self._rows(data["b"], BID), self._rows(data["a"], ASK)
        self.last_u, self._loss_told, self.had_book = u, False, True
        return Message(kind, recv_ns, exch_ns, bids, asks)

    def _rows(self, rows: list, side: int) -> Columns:
        """Levels and sizes of one side; raises unless every row is sound."""
        if not rows:
            return NO_ROWS
        if set(map(list.__len__, rows)) != {2}:  # itself raises for what is no list
            raise ValueError("a book row is not a pair")
        prices, sizes = zip(*rows)
        levels = array(LEVEL, map(self.levels[side].__getitem__, prices))
        return levels, array(SIZE, map(self.sizes.__getitem__, sizes))

    def _trades(self, recv_ns: int, message: dict) -> Message | None:
        self.counts["trades"] += 1
        trades = []
        for trade in message["data"]:
            if trade.get("BT"):  # a block trade is negotiated outside the book
                self.counts["block trades"] += 1
                continue
            exch_ns, side = self._time(trade["T"], recv_ns), TAKER_SIDE[trade["S"]]
            size, tick = self.sizes[trade["v"]], self.levels[BID][trade["p"]]
            if not size:
                raise ValueError("a trade of nothing")
            trades.append((exch_ns, side, tick, size, trade.get("RPI") is True))
        if not trades:
            return None
        return Message(TRADES, recv_ns, trades[-1][0], trades=trades)

    def _ticker(self, recv_ns: int, message: dict) -> Message:
        """Linear deltas carry the changed fields only; spot has no mark and no funding."""
        self.counts["tickers"] += 1
        data, fields = message["data"], {}
        for theirs, ours in TICKER_FIELDS.items():
            text = data.get(theirs)
            if text is None or text == "":
                continue
            value = float(text) if type(text) is str else math.nan
            if not math.isfinite(value) or (value <= 0 and ours != "funding_rate"):
                raise ValueError(f"ticker's {theirs} {str(text)[:30]!r} is out of range")
            fields[ours] = value
        return Message(TICKER, recv_ns, self._time(message["ts"], recv_ns), fields=fields)

    def _operation(self, recv_ns: int, message: dict) -> Message | None:
        """Acks and pongs; only a refusal is passed on."""
        if message.get("ret_msg") == "pong" or message.get("op") == "pong":
            self.counts["pongs"] += 1
        elif message.get("success") is False:
            self.counts["refusals"] += 1
            reason = printable(str(message.get("ret_msg")))
            return Message(REFUSED, recv_ns, fields={"reason": reason})
        elif message.get("success") is True:
            self.counts["acks"] += 1
        else:
            raise ValueError("neither a topic nor an operation")
        return None

    def _control(self, recv_ns: int, message: dict) -> Message | None:
        """A line of our own in a recording: what is not in the exchange's messages."""
        event = message["event"]
        if event == "raw":
            return self.parse(recv_ns, message["text"], from_exchange=True)
        if event == "lost":
            self.last_u, self._loss_told = None, False
            return Message(LOST, recv_ns, fields={"reason": printable(str(message["reason"]))})
        return Message(CONTROL, recv_ns, fields=message)

    def _ignored(self, recv_ns: int, message: dict) -> None:
        self.counts["ignored"] += 1


# ---- Recording and replay ----------------------------------------------------------


def printable(text: str) -> str:
    """The exchange's words without what could break a line or steer a terminal."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def control_line(event: str, **fields: Any) -> str:
    """A line of our own, marked so that no message of the exchange is taken for one."""
    return json.dumps({"op": "local", "event": event, **fields}, separators=(",", ":"))


def sound_line(payload: bytes) -> str:
    """The text of a received message, escaped if it could not stand on a line as it is."""
    try:
        text = payload.decode()
        if "\n" not in text and "\\" not in text and '"local"' not in text:
            return text
    except UnicodeDecodeError:
        text = payload.decode("utf-8", "surrogateescape")
    return control_line("raw", text=text)


class GrowingFile:
    """A file, new unless append, that grows. A failing disk stops it and nothing else."""

    def __init__(self, path: Path, append: bool = False) -> None:
        try:
            self.file = open(path, "ab" if append else "xb")  # never overwrites
        except FileExistsError:
            raise UserError(f"{path} exists and is not overwritten: choose another name") from None
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        self.path, self.failure = path, ""

    def write(self, text: str) -> None:
        """A line of a log."""
        self.append(text.encode())

    def append(self, data: bytes) -> None:
        """Write and flush."""
        try:
            if not self.failure:
                self.file.write(data)
                self.file.flush()
        except OSError as error:
            self.failure = f"{self.path} stopped: {error.strerror or error}"

    def close(self) -> None:
        """Close; what a failing disk says now is known already, or was said by append."""
        with contextlib.suppress(OSError):
            self.file.close()


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let write make a file under a temporary name, then give it its own."""
    draft = path.with_name(path.name + ".part")
    write(draft)
    draft.replace(path)


def check_plot_path(path: Path | None) -> None:
    """UserError, before the work and not after it, where no picture could be written."""
    if path and (not path.absolute().parent.is_dir() or path.is_dir()):
        raise UserError(f"--plot {path} cannot be written: choose a file in a folder")


class Recorder:
    """Appends lines `<recv_ns> <text>` to a gzip file, one gzip member a flush.

    Every member is complete, so a killed process leaves a file that any gzip reads, short
    of the lines since the last flush.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.file = GrowingFile(path)
        self.clock, self.lines, self.since = clock, [], 0.0

    @property
    def failure(self) -> str:
        """Why the disk takes no more; empty while it does."""
        return self.file.failure

    def write(self, recv_ns: int, text: str) -> None:
        """One line; on disk after FLUSH_S at the latest, if flush is called now and then."""
        if not self.lines:
            self.since = self.clock()
        self.lines.append(f"{recv_ns} {text}\n")
        self.flush(min_age_s=FLUSH_S)

    def flush(self, min_age_s: float = 0.0) -> None:
        """Put lines on disk if the oldest has waited for min_age_s."""
        if self.lines and self.clock() - self.since >= min_age_s:
            self.file.append(gzip.compress("".join(self.lines).encode(), compresslevel=1))
            self.lines.clear()

    def close(self) -> None:
        """Everything on disk, and no more lines."""
        self.flush()
        self.file.close()


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(recv_ns, text) of every line of a recording, up to a cut if it has one.

    UserError for a file that is no recording; a cut-off end is a warning.
    """
    number, rest = 0, b""
    try:
        with gzip.open(path, "rb") as file:
            while chunk := file.read1(1 << 16):  # subtle: read() loses what precedes a cut
                whole, newline, rest = (rest + chunk).rpartition(b"\n")
                for line in whole.decode("utf-8", "replace").split("\n") if newline else ():
                    number += 1
                    stamp, _, text = line.partition(" ")
                    if not 0 <= (recv_ns := int(stamp)) < 2**63:
                        raise ValueError
                    yield recv_ns, text
                if len(rest) > 8 * MAX_MESSAGE:
                    raise ValueError
            if rest:
                raise EOFError
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        if number == 0 and not isinstance(error, EOFError):
            raise UserError(f"{path} is no gzip recording: make one with feed.py record") from None
        logging.warning("%s is cut off after line %d: read up to there", path, number)
    except ValueError:
        raise UserError(
            f"{path}, line {number}: does not begin with a receive time in ns: not a recording"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


class Header(NamedTuple):
    """What a recording's first lines say of it."""

    start: dict[str, Any]  # the start line's fields; empty without one
    symbol: str
    depths: set[int]


def peek(path: Path, lines: int = 2000) -> Header:
    """Look at the first lines: the start line, the symbol, the depths present."""
    start, symbol, depths = {}, "BTCUSDT", set()
    for _, (_, text) in zip(range(lines), read_lines(path)):
        with contextlib.suppress(*MALFORMED):
            message = _decode(text)
            if message.get("op") == "local" and message["event"] == "start":
                start = start or message
            elif message.get("topic", "").startswith("orderbook."):
                _, depth, symbol = message["topic"].split(".")
                depths.add(int(depth))
    return Header(start, printable(str(start.get("symbol") or symbol)), depths)


def parser_of_recording(
    path: Path, tick_text: str | None, lot_text: str | None, depth: int | None
) -> tuple[Parser, Header]:
    """A parser that fits a file: the flags first, then its start line, then the table."""
    header = peek(path)
    start = header.start
    tick_text = tick_text or (str(start["tick_size"]) if "tick_size" in start else None)
    lot_text = lot_text or (str(start["lot_size"]) if "lot_size" in start else None)
    category = printable(str(start.get("category", "linear")))
    instrument = known_instrument(header.symbol, category, tick_text, lot_text)
    if depth and depth not in header.depths:
        raise UserError(f"{path} has no depth {depth}: it has {sorted(header.depths)}")
    depth = depth or start.get("depth") or max(header.depths, default=DEPTHS[0])
    return Parser(instrument, depth), header


def replay(path: Path, parser: Parser) -> Iterator[Message]:
    """The messages of a recording: a file is a slower exchange."""
    last_ns = 0
    for recv_ns, text in read_lines(path):
        last_ns = recv_ns if recv_ns > last_ns else last_ns  # a stamp never goes back
        message = parser.parse(last_ns, text)
        if message is not None:
            yield message


# ---- Archives ----------------------------------------------------------------------

BOOK_NAME = re.compile(r"(?P<day>\d{4}-\d\d-\d\d)_(?P<symbol>[A-Z0-9]+)_ob\d+\.data\.zip")
TRADES_NAME = re.compile(r"(?P<symbol>[A-Z0-9]+)_?(?P<day>\d{4}-\d\d-\d\d)\.csv\.gz")


class ArchiveDay(NamedTuple):
    """Bybit's two files of one UTC day. They carry no receive time."""

    day: str  # YYYY-MM-DD
    symbol: str
    category: str  # linear or spot
    book: Path
    trades: Path | None = None  # None: the book alone

    @property
    def noon_ns(self) -> int:
        """The clock that stamps are judged by: further than a day from it is nonsense."""
        return int(datetime.fromisoformat(f"{self.day}T12:00+00:00").timestamp()) * NS


def archive_names(day: str, symbol: str, category: str) -> dict[str, str]:
    """How Bybit names a day's order book and trades; the keys are the names' ends."""
    depth = 500 if category == "linear" and day <= LAST_OB500 else 200
    joint = "_" if category == "spot" else ""
    return {".zip": f"{day}_{symbol}_ob{depth}.data.zip", ".gz": f"{symbol}{joint}{day}.csv.gz"}


def parse_day(text: str) -> str:
    """A day's text, checked."""
    try:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
            raise ValueError
        datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{text!r} is no day: write it as 2025-09-01 (UTC)") from None
    return text


def pair_archives(paths: Iterable[Path]) -> list[ArchiveDay]:
    """The days in files, and in folders with all below them, by date.

    UserError unless all are of one symbol and each day has one order book and one trades file.
    """
    paths, days, symbols = list(paths), {}, {}
    files = [f.absolute() for p in paths for f in (p.rglob("*.*") if p.is_dir() else [p])]
    for path in sorted(set(files)):
        if match := BOOK_NAME.fullmatch(path.name) or TRADES_NAME.fullmatch(path.name):
            symbols[match["symbol"]] = path
            if len(symbols) > 1:
                both = " and ".join(map(str, symbols.values()))
                raise UserError(f"{both} are of two symbols: give the files of one")
            other = days.setdefault(parse_day(match["day"]), {}).setdefault(path.suffix, path)
            if other != path:
                raise UserError(f"{other} and {path} are of one day: give one of them")
    if not days:
        names = " and ".join(archive_names("2025-09-01", "BTCUSDT", "linear").values())
        raise UserError(f"no archive in {', '.join(map(str, paths))}: names are like {names}")
    return [_pair(day, *symbols, files) for day, files in sorted(days.items())]


def _pair(day: str, symbol: str, files: dict[str, Path]) -> ArchiveDay:
    """Two files become a day; UserError naming the one that is missing."""
    spot = "_" in files[".gz"].name if ".gz" in files else "spot" in files[".zip"].parts
    category = "spot" if spot else "linear"
    for end, name in archive_names(day, symbol, category).items():
        if end not in files:
            remedy = f"feed.py download {day} --symbol {symbol} --category {category}"
            raise UserError(f"{name} is missing beside {[*files.values()][0]}: {remedy}")
    return ArchiveDay(day, symbol, category, files[".zip"], files[".gz"])


DAMAGE = (OSError, EOFError, ValueError, OverflowError, RuntimeError, struct.error, zlib.error)


def archive_lines(path: Path, counts: Counter[str]) -> Iterator[list[str]]:
    """Blocks of lines of a zip's single member or a gzip, up to where it is damaged.

    Memory stays small whatever the file claims or inflates to. UserError if nothing at all
    can be read; damage further on is a warning, and counted as "cut off".
    """
    read, rest = False, b""
    try:
        room = max(SMALL, INFLATION * path.stat().st_size)
        with _open_archive(path) as file:
            while chunk := file.read1(READ_AHEAD):
                whole, newline, rest = (rest + chunk).rpartition(b"\n")
                room -= len(chunk)
                if room < 0 or len(rest) > MAX_MESSAGE:
                    raise ValueError("a line, or the whole, is absurdly long")
                if newline:
                    read = True
                    yield [line for line in whole.decode("utf-8", "replace").split("\n") if line]
        if rest:
            yield [rest.decode("utf-8", "replace")]
    except (*DAMAGE, zipfile.BadZipFile) as error:
        reason = printable(getattr(error, "strerror", None) or str(error) or "cut off")
        if not read:
            raise UserError(f"{path} cannot be read ({reason}): download it again") from None
        counts["cut off"] += 1
        logging.warning("%s is damaged (%s): read up to there", path, reason)


def _open_archive(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    with zipfile.ZipFile(path) as archive:  # the open member keeps the file open
        (member,) = archive.infolist()
        return archive.open(member)


UNIT = Decimal("1e-12")  # of a price, USDT, while the tick is not known
units_of = partial(level_of, tick=UNIT, limit=2**63 - 1)


def grid_of(prices: Iterable[str]) -> str:
    """The coarsest tick that fits all prices: of 30247.5 and 30249.0 it is 1.5."""
    return f"{(math.gcd(*map(units_of, prices)) * UNIT).normalize():f}"


class ArchiveParser(Parser):
    """A Parser that also watches `seq`, and goes on where a snapshot refines the grid."""

    last_seq = 0

    def _book(self, recv_ns: int, message: dict) -> Message | None:
        data, before = message["data"], self.instrument
        if type(seq := data.get("seq")) is int:
            self.counts["seq went back"] += seq < self.last_seq
            self.last_seq = seq
        try:
            return super()._book(recv_ns, message)
        except OffGrid:
            if not self.had_book or (message["type"] != "snapshot" and data["u"] != 1):
                raise
        try:
            self.counts["book"] -= 1  # it is read twice
            prices = [before.tick_text, *(price for price, _ in data["b"] + data["a"])]
            self.use(dataclasses.replace(before, tick_text=grid_of(prices)))
            return super()._book(recv_ns, message)
        except MALFORMED:
            self.use(before)
            raise


def parser_of_archive(
    day: ArchiveDay, tick_text: str | None = None, lot_text: str | None = None
) -> ArchiveParser:
    """A parser that fits a day: depth, and tick unless given, from its first snapshot."""
    depth = None
    for text in islice(chain.from_iterable(archive_lines(day.book, Counter())), 2000):
        with contextlib.suppress(*MALFORMED):
            message = _decode(text)
            _, levels, symbol = message["topic"].split(".")
            is_of_day = abs(message["ts"] - day.noon_ns // MS) < MAX_CLOCK_GAP_NS // MS
            if symbol != day.symbol or not is_of_day:
                what = printable(f"{symbol} at {message['ts']} ms")
                raise UserError(f"{day.book} holds {what}, unlike its name: download it again")
            depth, data = depth or int(levels), message["data"]
            if message["type"] == "snapshot" and (rows := data["b"] + data["a"]):
                tick_text = tick_text or grid_of(price for price, _ in rows)
                break
    if depth is None:
        raise UserError(f"{day.book} holds no order book: download it again")
    return ArchiveParser(known_instrument(day.symbol, day.category, tick_text, lot_text), depth)


def read_book(day: ArchiveDay, parser: ArchiveParser) -> Iterator[Message]:
    """A day's order book as messages, stamped with exchange time, which never goes back.

    The control message `tick` precedes the first snapshot on a finer grid. Whether the book
    is crossed is for its owner to see.
    """
    counts, noon_ns, grid = parser.counts, day.noon_ns, parser.instrument
    last_ns, cuts = noon_ns - MAX_CLOCK_GAP_NS // 2, counts["cut off"]
    for text in chain.from_iterable(archive_lines(day.book, counts)):
        message = parser.parse(noon_ns, text, from_exchange=True)
        if message is None:
            continue
        exch_ns = message.exch_ns or last_ns  # a loss has no stamp of its own
        counts["silences over 2 s"] += exch_ns - last_ns > SILENCE_NS
        counts["time went back"] += exch_ns < last_ns
        last_ns = max(last_ns, exch_ns)
        if parser.instrument is not grid:
            grid = parser.instrument
            fields = {"event": "tick", "tick_size": grid.tick_text}
            yield Message(CONTROL, last_ns, last_ns, fields=fields)
        yield Message(message.kind, last_ns, last_ns, *message[3:])
    if counts["cut off"] > cuts:
        yield Message(LOST, last_ns, last_ns, fields={"reason": "the archive is cut off"})


LINEAR = (
    "timestamp,symbol,side,size,price,tickDirection,trdMatchID,grossValue,homeNotional,"
    "foreignNotional,RPI"
)
SPOT = "id,timestamp,price,volume,side,rpi"
UNTITLED = {10: LINEAR, 11: LINEAR, 5: SPOT, 6: SPOT}  # what a file without header has
ARCHIVED = np.dtype(
    [("exch_ns", "i8"), ("side", "i1"), ("price", "i8"), ("size", "f8"), ("rpi", "?")]
)  # side is the taker's, price in UNITs
AS_READ = np.dtype([("timestamp", "f8"), *ARCHIVED.descr[1:], ("id", "i8")])  # id is hashed
IS_RPI = {"1": True, "true": True, "0": False, "false": False, "": False, "null": False}


def read_trades(day: ArchiveDay, counts: Counter[str]) -> np.ndarray:
    """A day's trades as rows of ARCHIVED, each once, in the order of matching."""
    raw, names = bytearray(), []  # 34 bytes a trade
    convert = {
        "timestamp": float,
        "side": Table(lambda text: TAKER_SIDE[text.capitalize()]).__getitem__,
        "price": Table(units_of).__getitem__,
        "size": Table(size_of).__getitem__,
        "rpi": Table(lambda text: IS_RPI[text.lower()]).__getitem__,
        "id": hash,
    }
    for lines in archive_lines(day.trades, counts) if day.trades else ():
        if lines and not names:
            names, has_header = trade_columns(lines[0], day)
            lines = lines[has_header:]
        for rows in _trade_rows(lines, day.symbol, names, convert, counts):
            raw += rows.tobytes()
    counts["empty files"] += bool(day.trades and not names)
    read = np.frombuffer(raw, AS_READ)
    with np.errstate(over="ignore"):  # subtle: exact, being whole us below 2**53; ns are not
        read["timestamp"] = np.rint(read["timestamp"] * (1e3 if day.category == "spot" else 1e6))
    order = _order_of(read, day.noon_ns / 1e3, "id" in names, counts)
    trades = np.empty(len(order), ARCHIVED)
    for ours, theirs in zip(ARCHIVED.names, AS_READ.names):
        trades[ours] = read[theirs][order]
    trades["exch_ns"] = trades["exch_ns"] // 1000 * MS  # the websocket's T is in whole ms
    return trades


def _order_of(read: np.ndarray, noon_us: float, has_ids: bool, counts: Counter) -> np.ndarray:
    """The order of matching: indexes of sound rows by time, each trade once."""
    is_near = abs(read["timestamp"] - noon_us) < MAX_CLOCK_GAP_NS / 1e3
    order = np.flatnonzero(is_near & (read["size"] > 0))
    counts["malformed trades"] += len(read) - len(order)
    if np.sign(np.diff(read["timestamp"][order])).sum() < 0:  # old files have the newest first
        order = order[::-1]
    order = order[np.argsort(read["timestamp"][order], kind="stable")]
    if has_ids:
        _, first = np.unique(read["id"][order], return_index=True)
        counts["repeated trades"] += len(order) - len(first)
        order = order[np.sort(first)]
    return order


def trade_columns(line: str, day: ArchiveDay) -> tuple[list[str], bool]:
    """The columns of a trades file, from its first line, and whether that is a header."""
    width, has_header = line.count(",") + 1, "timestamp" in line.lower()
    header = line if has_header else UNTITLED.get(width, "")
    names = header.lower().replace("volume", "size").replace("trdmatchid", "id").split(",")[:width]
    if missing := {"timestamp", "side", "price", "size"} - set(names):
        raise UserError(f"{day.trades} has no {', '.join(sorted(missing))}: download it again")
    return names, has_header


def _trade_rows(
    lines: list[str], symbol: str, names: list[str], convert: dict[str, Callable], counts: Counter
) -> Iterator[np.ndarray]:
    """Lines column by column; lines that fail are halved until the bad one is found."""
    try:
        table = list(map(str.split, lines, repeat(",")))
        if not set(map(len, table)) <= {len(names)}:
            raise ValueError("a row has not the header's number of fields")
        rows = np.zeros(len(lines), AS_READ)
        for name, column in zip(names, zip(*table)):
            if name == "symbol" and set(column) != {symbol}:
                raise ValueError("a trade of another symbol")
            if name in convert:
                rows[name] = np.fromiter(map(convert[name], column), AS_READ[name], len(lines))
        yield rows
    except MALFORMED:
        if len(lines) == 1:
            counts["malformed trades"] += 1
        else:
            for half in lines[: len(lines) // 2], lines[len(lines) // 2 :]:
                yield from _trade_rows(half, symbol, names, convert, counts)


def replay_archive(day: ArchiveDay, parser: ArchiveParser) -> Iterator[Message]:
    """A day's messages by exchange time; at equal times the trades come before the book.

    Ticks are those of the last control message `tick`, if one came. Defects are counted in
    parser.counts.
    """
    trades, end = read_trades(day, parser.counts), (2**63, ())
    blocks = (trades[i : i + BLOCK].tolist() for i in range(0, len(trades), BLOCK))
    by_ms = groupby(chain.from_iterable(blocks), key=itemgetter(0))
    step = int(Decimal(parser.instrument.tick_text) / UNIT)
    next_ns, rows = next(by_ms, end)
    for message in chain(read_book(day, parser), [None]):
        until_ns = message.recv_ns if message else 2**63 - 1
        while next_ns <= until_ns:
            if told := _on_grid(rows, step, parser.counts):
                yield Message(TRADES, next_ns, next_ns, NO_ROWS, NO_ROWS, told)
            next_ns, rows = next(by_ms, end)
        if message:
            if message.kind == CONTROL:
                step = int(Decimal(message.fields["tick_size"]) / UNIT)
            yield message


def _on_grid(rows: Iterable[tuple], step: int, counts: Counter[str]) -> list[tuple]:
    """Trades with prices in ticks of `step` UNITs, without those between two ticks."""
    rows = list(rows)
    told = [(ns, side, n // step, size, rpi) for ns, side, n, size, rpi in rows if not n % step]
    if len(told) < len(rows):
        counts["malformed trades"] += len(rows) - len(told)
    return told


# ---- Live feed ---------------------------------------------------------------------


class FeedProblem(Exception):
    """What ends a connection: the next one is tried."""


def session_clock() -> Callable[[], int]:
    """Wall time at the start plus monotonic time since: ns that never decrease."""
    offset = time.time_ns() - time.monotonic_ns()
    return lambda: offset + time.monotonic_ns()


class LiveFeed:
    """One thread that receives, stamps, records, parses and enqueues.

    It alone pings, reconnects and subscribes. What it cannot vouch for becomes a LOST
    message; nothing received is dropped. Take messages from `queue`; control lines of the main
    thread go through `emit` too, so that the recording is the session.
    """

    def __init__(
        self,
        url: str,
        parser: Parser,
        recorder: Recorder | None = None,
        clock_ns: Callable[[], int] | None = None,
        rng: np.random.Generator | None = None,
    ) -> None:
        self.url, self.parser, self.recorder = url, parser, recorder
        self.clock_ns = clock_ns or session_clock()
        self.rng = rng or np.random.default_rng()
        self.queue: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.thread: threading.Thread | None = None
        self.fatal = ""  # a configuration error: no retry
        self.resync_reason = ""  # set by the main thread to ask for a new snapshot
        self.connected, self.reconnects = False, 0
        self.last_frame_ns = self.last_book_ns = 0

    # One function stamps, records and enqueues, under one lock, in this order.
    def emit(self, text: str) -> Message | None:
        """Take one line into the session: from the exchange, or a control line."""
        with self.lock:
            recv_ns = self.clock_ns()
            if self.recorder:
                self.recorder.write(recv_ns, text)
            message = self.parser.parse(recv_ns, text)
            if message is not None:
                self.queue.put(message)
            return message

    def start(self, ws: websocket.WebSocket) -> None:
        """Go on alone with a connected socket."""
        self.thread = threading.Thread(target=self._run, args=(ws,), name="feed", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Ask the thread to end, and wait for it; the queue then holds all it received."""
        self.stopping.set()
        if self.thread:
            self.thread.join(STOP_S)  # it may be connecting; then it can no longer emit

    def flush(self) -> None:
        """Put on disk what has waited; called now and then by the main thread."""
        with self.lock:
            if self.recorder:
                self.recorder.flush(min_age_s=FLUSH_S)

    def connect(self) -> websocket.WebSocket:
        try:
            ws = websocket.create_connection(
                self.url, timeout=CONNECT_S, skip_utf8_validation=True, header=USER_AGENT
            )
        except (ValueError, IndexError) as error:  # whatever answered, it was no exchange
            raise OSError(f"no sensible answer: {error}") from None
        ws.settimeout(RECV_S)
        self._read_ahead(ws)
        return ws

    def _read_ahead(self, ws: websocket.WebSocket) -> None:
        """Take from the socket all that is there, and look before each time.

        One read serves many frames of a burst. A frame is judged by its announced length,
        before memory is taken for it; a message that drips, or comes in endless small
        frames, cannot keep the watchdogs from looking.
        """
        frames, read = ws.frame_buffer, ws.frame_buffer.recv
        ahead, at = b"", 0

        def recv(size: int) -> bytes:
            nonlocal ahead, at
            if at == len(ahead):
                self._check(self.clock_ns())
                begun = ws.cont_frame.cont_data
                length = (frames.length or 0) + (len(begun[1]) if begun else 0)
                if length > MAX_MESSAGE:
                    raise FeedProblem(f"a message of {length} bytes, more than {MAX_MESSAGE}")
                ahead, at = read(READ_AHEAD), 0
            part = ahead[at : at + size]
            at += len(part)
            return part

        frames.recv = recv

    def _run(self, ws: websocket.WebSocket | None) -> None:
        attempt = 0
        try:
            while not self.stopping.is_set() and not self.fatal:
                born_ns = self.clock_ns()
                self._serve_connection(ws)
                ws = None
                attempt = 0 if self.clock_ns() - born_ns > HEALTHY_S * NS else attempt + 1
                self._wait(attempt)
        except BaseException as error:  # a defect of ours: end the run, do not fall silent
            self.fatal = f"the feed failed: {error!r}: please report it"
            raise

    def _wait(self, attempt: int) -> None:
        """Capped, jittered backoff; and a consumer that is behind catches up first."""
        first, longest = BACKOFF_S
        delay = min(first * 2 ** min(attempt, 30), longest) * self.rng.uniform(0.5, 1.0)
        self.stopping.wait(0 if self.fatal else delay)
        while self.queue.qsize() > MAX_QUEUED // 2 and not self.stopping.wait(RECV_S / 10):
            pass

    def _serve_connection(self, ws: websocket.WebSocket | None) -> None:
        """Connect if need be and receive until it ends; a connection lost is a book lost."""
        try:
            if ws is None:
                ws = self.connect()
                self.reconnects += 1
            self.connected = True
            self._subscribe(ws)
            self._receive(ws)
        except UserError as error:
            self.fatal = str(error)
        except (FeedProblem, websocket.WebSocketException, OSError) as error:
            reason = printable(str(error) or type(error).__name__)[:200]
            self.parser.problem = f"connection: {reason}"
            if self.connected and not self.stopping.is_set():
                self.emit(control_line("lost", reason=reason))
        finally:
            self.connected = False
            if ws is not None:
                ws.shutdown()

    def _subscribe(self, ws: websocket.WebSocket) -> None:
        topics = list(self.parser.handlers)
        for number, first in enumerate(range(0, len(topics), ARGS_PER_REQUEST)):
            args = topics[first : first + ARGS_PER_REQUEST]
            ws.send(json.dumps({"req_id": str(number), "op": "subscribe", "args": args}))

    def _receive(self, ws: websocket.WebSocket) -> None:
        """Blocking loop of one connection; raises what ends it."""
        self.resync_reason = ""
        pinged = self.last_frame_ns = self.last_book_ns = self.clock_ns()
        while not self.stopping.is_set():
            if (now := self.clock_ns()) - pinged >= PING_S * NS:
                ws.send('{"req_id":"ping","op":"ping"}')
                pinged = now
            try:
                opcode, payload = ws.recv_data(control_frame=True)
                self.last_frame_ns = self.clock_ns()
                self._take(opcode, payload)
            except websocket.WebSocketTimeoutException:
                self.flush()

    def _take(self, opcode: int, payload: bytes) -> None:
        """One frame: a message goes into the session; what spoils the connection raises."""
        if opcode == websocket.ABNF.OPCODE_CLOSE:
            code = int.from_bytes(payload[:2], "big") if len(payload) > 1 else 1005
            raise FeedProblem(f"closed by the exchange (code {code})")
        if opcode not in (websocket.ABNF.OPCODE_TEXT, websocket.ABNF.OPCODE_BINARY):
            return  # protocol ping and pong
        message = self.emit(sound_line(payload))
        if message is None:
            return
        if message.kind in (DELTA, SNAPSHOT):
            self.last_book_ns = message.recv_ns
        elif message.kind == LOST:
            raise FeedProblem(f"resync after: {message.fields['reason']}")
        elif message.kind == REFUSED and "already subscribed" not in message.fields["reason"]:
            reason = message.fields["reason"][:200]
            if self.parser.had_book:  # what worked before is no mistake of the user
                raise FeedProblem(f"refused: {reason}")
            raise UserError(
                f"the exchange refused: {reason}: check --symbol (upper case), --category, --depth"
            )

    def _check(self, now_ns: int) -> None:
        """The watchdogs, on receive time."""
        if self.stopping.is_set():
            raise FeedProblem("stopping")
        if self.resync_reason:
            raise FeedProblem(f"resync: {self.resync_reason}")
        if now_ns - self.last_frame_ns > WATCHDOG_S * NS:
            raise FeedProblem(f"nothing received for {WATCHDOG_S:g} s")
        if now_ns - self.last_book_ns > BOOK_WATCHDOG_S * NS:
            raise FeedProblem(f"no book message for {BOOK_WATCHDOG_S:g} s")
        if self.queue.qsize() > MAX_QUEUED:
            raise FeedProblem(f"{MAX_QUEUED} messages wait: the program cannot keep up")


def open_feed(
    instrument: Instrument,
    depth: int,
    url: str | None = None,
    record: Path | None = None,
    clock_ns: Callable[[], int] | None = None,
    **start: Any,
) -> LiveFeed:
    """A started feed whose first line is the control line `start`.

    OSError or WebSocketException where the exchange cannot be reached.
    """
    url = url or WS_URL.format(category=instrument.category)
    source = LiveFeed(url, Parser(instrument, depth), clock_ns=clock_ns)
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port  # itself raises where it is no number
        if parts.scheme not in ("ws", "wss") or not parts.hostname or port == 0:
            raise ValueError("it begins with wss:// and names a host")
    except ValueError as error:
        raise UserError(f"--url {url} is no WebSocket address: {error}") from None
    ws = source.connect()
    try:
        source.recorder = Recorder(record) if record else None
    except UserError:
        ws.shutdown()
        raise
    steps = dict(tick_size=instrument.tick_text, lot_size=instrument.lot_text)
    names = dict(symbol=instrument.symbol, category=instrument.category, depth=depth)
    source.emit(control_line("start", **names, **steps, **start))
    source.start(ws)
    return source


# ---- Download ----------------------------------------------------------------------


class Interrupted(Exception):
    """A download that is worth another try."""


def run_download(options: argparse.Namespace) -> None:
    """Fetch the archives of some days, one file after the other."""
    symbol, category, folder = options.symbol, options.category, options.out / options.category
    if not re.fullmatch("[A-Z0-9]+", symbol):
        raise UserError(f"--symbol {symbol} must be capital letters and digits, as BTCUSDT")
    with _on_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    trades = "spot" if category == "spot" else "trading"
    bases = f"{BOOK_HOST}/{category}/{symbol}", f"{TRADES_HOST}/{trades}/{symbol}"
    for day in sorted(set(map(parse_day, options.days))):
        for base, name in zip(bases, archive_names(day, symbol, category).values()):
            if (folder / name).exists():
                print(f"{folder / name}: already there")
            else:
                fetch_file(f"{base}/{name}", folder / name)
                time.sleep(PAUSE_S)


REFUSALS = {
    403: "refused: too many requests, or blocked here: wait 10 min, then run it again",
    404: "does not exist: a day's file appears the next day: check DAY, --symbol, --category",
}


def fetch_file(url: str, path: Path) -> None:
    """Download to a path by way of `path.part`, which a later try or run continues.

    UserError where Bybit refuses, has no such file, or fails in TRIES tries.
    """
    part, tag, reason = Path(f"{path}.part"), Path(f"{path}.tag"), ""
    for attempt in range(TRIES):
        time.sleep(RETRY_S * 2**attempt if attempt else 0)
        try:
            _fetch_rest(url, part, tag)
            with _on_disk(path):
                os.replace(part, path)
                tag.unlink()
            return _show(f"{path}: {path.stat().st_size / 1e6:.1f} MB", end="\n")
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"status {error.code}"
            if error.code == 416:  # nothing behind what we have: it is of another version
                part.unlink(missing_ok=True)
            elif error.code < 500:
                raise UserError(f"{url} {REFUSALS.get(error.code, reason)}") from None
        except (Interrupted, OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
    raise UserError(f"{url} failed ({reason}): run it again later, it goes on where it ended")


def _fetch_rest(url: str, part: Path, tag: Path) -> None:
    """One request for what a part lacks. Its tag tells which version it is of."""
    with _on_disk(part):
        known = tag.read_text() if part.exists() and tag.exists() else ""
        have = part.stat().st_size if known else 0
    headers = USER_AGENT | ({"Range": f"bytes={have}-"} if have else {})
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=CONNECT_S) as answer:  # TLS is verified
        extent = answer.headers["Content-Range"] or ""
        start, size = 0, int(answer.headers["Content-Length"] or -1)
        if answer.status == 206 and (match := re.fullmatch(r"bytes (\d+)-\d+/(\d+)", extent)):
            start, size = int(match[1]), int(match[2])
        version = answer.headers["ETag"] or answer.headers["Last-Modified"]
        found = f"{version} {size}" if version else ""  # without one nothing is continued
        if answer.status == 206 and (start, known) != (have, found):
            part.unlink(missing_ok=True)
            raise Interrupted("the file has changed")
        with _on_disk(part):
            tag.write_text(found)
            file = open(part, "ab" if start else "wb")
        with file:
            _receive(answer, file, start, size)


def _receive(answer: Any, file: Any, have: int, size: int) -> None:
    """Append what comes; Interrupted unless it is all of an archive."""
    told_s = time.monotonic()
    while chunk := answer.read1(READ_AHEAD):  # what is there: a stall costs nothing
        if not have and not chunk.startswith((b"PK", b"\x1f\x8b")):
            raise Interrupted("no archive came, but somebody's page")
        with _on_disk(file.name):
            file.write(chunk)
        have += len(chunk)
        if sys.stdout.isatty() and time.monotonic() - told_s > FLUSH_S:
            told_s = time.monotonic()
            _show(f"{file.name}: {have / 1e6:.1f} of {size / 1e6:.1f} MB", end="")
    if not have or 0 <= size != have:
        raise Interrupted(f"it ended after {have} of {size} bytes")


def _show(text: str, end: str) -> None:
    """Progress, on one line of a terminal."""
    print(f"\r{text}\x1b[K" if sys.stdout.isatty() else text, end=end, flush=True)


@contextlib.contextmanager
def _on_disk(path: Path | str) -> Iterator[None]:
    """What a disk refuses is no fault of the network."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


# ---- Command line: record, info, download ------------------------------------------


def run_record(options: argparse.Namespace) -> None:
    """Record the live feed to a file, for --minutes or until Ctrl-C."""
    steps = (options.tick_size, options.lot_size, options.url)
    instrument = live_instrument(options.symbol, options.category, *steps)
    try:
        feed = open_feed(instrument, options.depth or DEPTHS[0], options.url, options.file)
    except (OSError, websocket.WebSocketException) as error:
        raise UserError(f"the exchange cannot be reached ({error}): check the network") from None
    stop, end_s, told_s = stop_signal(), time.monotonic() + options.minutes * 60, -math.inf
    while (now_s := time.monotonic()) < end_s and not stop.wait(min(FLUSH_S, end_s - now_s)):
        feed.flush()
        while not feed.queue.empty():
            feed.queue.get()
        if feed.fatal or feed.recorder.failure:
            break
        if now_s - told_s >= 10:
            told_s = now_s
            print(f"{dict(feed.parser.counts)}, {feed.reconnects} reconnects", flush=True)
    feed.stop()
    feed.emit(control_line("end"))
    feed.recorder.close()
    if feed.fatal or feed.recorder.failure:
        raise UserError(feed.fatal or feed.recorder.failure)
    print(f"{options.file}: {dict(feed.parser.counts)}")


def run_info(options: argparse.Namespace) -> None:
    """Print what one wants to know of a recording."""
    flags = (options.tick_size, options.lot_size, options.depth)
    parser, header = parser_of_recording(options.file, *flags)
    facts = list(measure_recording(replay(options.file, parser), parser))
    kind = "SYNTHETIC, made by a simulator" if header.start.get("synthetic") else "recorded"
    print(f"{options.file}: {parser.instrument.symbol} {parser.instrument.category}, {kind}")
    for label, value in facts:
        print(f"  {label:<37}{value}")


def as_tapes(messages: Iterable[Message]) -> Iterator[tuple[Message, Tape, int]]:
    """Every message, and where it is on a tape."""
    messages = iter(messages)
    while block := list(islice(messages, BLOCK)):
        tape = build_tape(block)
        yield from ((message, tape, m) for m, message in enumerate(block))


def measure_recording(messages: Iterable[Message], parser: Parser) -> Iterator[tuple[str, Any]]:
    """One pass over messages: the facts of a recording as (label, value)."""
    book, kinds, reasons = OrderBook(), Counter(), Counter()
    first_ns, last_ns, crossed, lags, spreads, sizes, mids = 0, 0, 0, [], [], [], {}
    for message, tape, m in as_tapes(messages):
        first_ns, last_ns = first_ns or message.recv_ns, message.recv_ns
        kinds[message.kind] += 1
        if message.kind == LOST:
            reasons[message.fields["reason"]] += 1
        if message.kind not in (DELTA, SNAPSHOT, TRADES):
            continue
        lags.append((message.recv_ns - message.exch_ns) / MS)
        sizes.extend(trade[3] for trade in message.trades)
        if message.kind == SNAPSHOT:
            book.clear()
        if message.kind == TRADES:
            continue
        book.apply(tape, m, m + 1)
        crossed += bool(book.fault)
        if not book.fault:
            spreads.append(book.best(ASK) - book.best(BID))
            mids[message.recv_ns // NS] = book.mid_ticks

    def spread_of(values: list[float]) -> str:
        low, mid, high = np.percentile(values, [1, 50, 99])
        return f"median {mid:g}, 1 % {low:g}, 99 % {high:g}"

    seconds, counts = (last_ns - first_ns) / NS, parser.counts
    yield "first message, UTC", time.strftime("%F %T", time.gmtime(first_ns // NS))
    yield "span, s", f"{seconds:.1f}"
    for name in ("book", "trades", "tickers", "acks", "pongs", "ignored"):
        yield f"messages: {name}", f"{counts[name]}, {counts[name] / max(seconds, 1e-9):.1f}/s"
    for name in ("malformed", "repeated", "gaps", "before snapshot", "block trades"):
        yield name, counts[name]
    yield "snapshots", kinds[SNAPSHOT]
    yield "book lost", ", ".join(f"{n} x {why}" for why, n in reasons.items()) or 0
    yield "crossed or one-sided books", crossed
    yield "rows out of the ladder's reach", sum(side.beyond for side in book.ladders.values())
    for name, values in (
        ("receive - exchange time, ms", np.round(lags)),
        ("spread, ticks", spreads),
        (f"{len(sizes)} trades, base coin each", sizes),
    ):
        if len(values):
            yield name, spread_of(values)
    if len(mids) > 2:
        returns = 1e4 * np.diff(np.log(list(mids.values())))
        variance = np.mean(returns**2 / np.diff(list(mids)))  # a second may have no message
        yield "volatility, bps/sqrt(s)", f"{math.sqrt(variance):.3f}"


def add_market_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that every command on a market shares."""
    parser.add_argument("--symbol", default="BTCUSDT", help="upper case, as Bybit writes it")
    parser.add_argument("--category", default="linear", choices=("linear", "spot"))
    parser.add_argument("--depth", type=int, choices=DEPTHS, help="levels a side (default 200)")
    parser.add_argument("--tick-size", help="price step, USDT (asked from Bybit otherwise)")
    parser.add_argument("--lot-size", help="quantity step, base coin (as above)")
    parser.add_argument("--url", help="another WebSocket address than Bybit's")


def positive(text: str) -> float:
    """A number above 0, or max for one without end."""
    number = math.inf if text == "max" else float(text)
    if not number > 0:
        raise ValueError(text)
    return number


class Arguments(argparse.ArgumentParser):
    """Errors in one line, without the usage of every flag."""

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message}: {self.prog} --help lists what there is\n")


def stop_signal() -> threading.Event:
    """An event that Ctrl-C and SIGTERM set, so that a loop ends where it chooses to; a second
    one ends the program where it is.
    """
    stop = threading.Event()

    def ask(number: int, _: Any) -> None:
        # subtle: set() itself could wait for the lock of the wait() that it interrupts
        threading.Thread(target=stop.set).start()
        signal.signal(number, signal.default_int_handler)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask)
    return stop


def exit_cleanly(run: Callable[[], None]) -> int:
    """Run a command: 0, or 2 and one line on stderr for an error the user can mend."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: files are closed
    try:
        run()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:  # the reader of our output has gone (| head)
        sys.stdout = None
    return 0


def main(arguments: list[str] | None = None) -> int:
    """python feed.py record|download|info; the exit status."""
    parser = Arguments(prog="feed.py", description="Record Bybit, inspect a file.")
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record", help="record the live feed to FILE")
    record.add_argument("file", type=Path, metavar="FILE")
    record.add_argument("--minutes", type=positive, default=math.inf, help="default: no end")
    add_market_flags(record)
    record.set_defaults(run=run_record)
    download = commands.add_parser("download", help="fetch Bybit's archives of past days")
    download.add_argument("days", nargs="+", metavar="DAY", help="UTC, such as 2025-09-01")
    download.add_argument("--symbol", default="BTCUSDT", help="upper case, as Bybit writes it")
    download.add_argument("--category", default="linear", choices=("linear", "spot"))
    download.add_argument("--out", type=Path, default=Path("data/archive"), metavar="DIR")
    download.set_defaults(run=run_download)
    info = commands.add_parser("info", help="what FILE, a recording, holds")
    info.add_argument("file", type=Path, metavar="FILE")
    for flag, kind in (("--tick-size", str), ("--lot-size", str), ("--depth", int)):
        info.add_argument(flag, type=kind)
    info.set_defaults(run=run_info)
    options = parser.parse_args(arguments)
    return exit_cleanly(lambda: options.run(options))


if __name__ == "__main__":
    sys.exit(main())
