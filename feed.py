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

A book row carries the whole size that now rests at its price; "0" deletes the level.
`S` is the taker's side: a "Sell" can fill a bid. `u` counts the book's messages: a
missing number is a lost message, and a book that lost one is worth nothing.

Two clocks. recv_ns is when we received a message (ns since the epoch, never
decreasing); exch_ns is when the matching engine acted (`cts` of the book, `T` of a
trade). Prices are integer ticks, sizes are base coin (BTC).

Levels. A level is side x price tick, with the side +1 for bids and -1 for asks: a bid
at tick 651142 is the level 651142, an ask at tick 651143 is the level -651143. On both
sides the better price is the larger level, so that everything is written once.

The order of the file: what is traded; messages, and a tape of many; the order book; the
parser that makes messages out of text; recordings; the live socket; the command line.
A live session and its replay are the same because both are a sequence of stamped lines,
and everything after the stamp depends on these lines alone.

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
import queue
import signal
import sys
import threading
import time
import urllib.parse
import urllib.request
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal, DecimalException
from functools import cached_property, lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import websocket

NS = 1_000_000_000  # nanoseconds in a second
MS = 1_000_000  # nanoseconds in a millisecond
NEVER = 2**63 - 1  # ns
BID, ASK = SIDES = 1, -1  # side: +1 buys, -1 sells

WS_URL = "wss://stream.bybit.com/v5/public/{category}"
REST_URL = "https://api.bybit.com/v5/market/instruments-info?category={}&symbol={}"
USER_AGENT = {"User-Agent": "marketmaker-reference/1.0"}
DEPTHS = (200, 1000)  # levels a side, pushed every 100 and 200 ms

CONNECT_S, RECV_S = 10.0, 1.0  # socket time-outs
STOP_S = 2.0  # patience with a thread that is just connecting
PING_S = 5.0  # an idle socket may be cut after 10 s (sources differ, so be early)
WATCHDOG_S, BOOK_WATCHDOG_S = 10.0, 60.0  # without any frame, without a book: reconnect
BACKOFF_S = (1.0, 30.0)  # first and longest wait between connections; 500/5 min allowed
HEALTHY_S = 60.0  # a connection that lived so long resets the backoff
ARGS_PER_REQUEST = 10  # spot's limit of topics in one subscribe request
MAX_QUEUED = 50_000  # messages waiting for the main thread; more = book lost
MAX_MESSAGE = 4 << 20  # bytes; a snapshot of 1000 levels has about 60 kB
MAX_CLOCK_GAP_NS = 86_400 * NS  # exchange time further than this from ours is nonsense
MAX_TICK = 8_000_000  # the highest price: 800,000 USDT at a tick of 0.1
MAX_SIZE = 1e15  # base coin
FLUSH_S = 0.5  # a recording is on disk after so long


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
            with contextlib.suppress(TypeError, ValueError):
                if 1e-12 <= float(text) < math.inf:
                    continue
            raise UserError(f"{flag} {text!r} must be a number above 0, such as 0.1")

    @cached_property
    def tick_size(self) -> float:
        return float(self.tick_text)

    @cached_property
    def lot_size(self) -> float:
        return float(self.lot_text)

    @property
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


def find_instrument(
    symbol: str, category: str, tick_text: str | None, lot_text: str | None, ask: bool = False
) -> Instrument:
    """The steps given before those that Bybit tells, if asked, before the built-in table."""
    instrument = BUILT_IN.get((symbol, category))
    if ask and not (tick_text and lot_text):
        with contextlib.suppress(OSError, http.client.HTTPException):  # it cannot be reached
            instrument = fetch_instrument(symbol, category)
    if not (instrument or (tick_text and lot_text)):
        what = f"the steps of {symbol} ({category}) are not known"
        raise UserError(f"{what}: give --tick-size and --lot-size")
    instrument = instrument or Instrument(symbol, category, min_qty=0.0)
    tick_text, lot_text = tick_text or instrument.tick_text, lot_text or instrument.lot_text
    return dataclasses.replace(instrument, tick_text=tick_text, lot_text=lot_text)


def fetch_instrument(symbol: str, category: str) -> Instrument:
    """Ask Bybit's public REST endpoint. OSError when it cannot be reached."""
    url = REST_URL.format(category, urllib.parse.quote(symbol))
    request = urllib.request.Request(url, headers=USER_AGENT)
    with urllib.request.urlopen(request, timeout=CONNECT_S) as response:  # TLS is verified
        body = response.read(MAX_MESSAGE)
    if not body.startswith(b"{"):  # a page of somebody between us and Bybit
        raise OSError("no JSON in the answer")
    try:
        (entry,) = json.loads(body)["result"]["list"]
        lot, tick_text = entry["lotSizeFilter"], entry["priceFilter"]["tickSize"]
        lot_text = lot.get("qtyStep") or lot["basePrecision"]  # linear, or spot
        return Instrument(symbol, category, tick_text, lot_text, float(lot["minOrderQty"]))
    except MALFORMED:
        why = f"Bybit knows no {category} symbol {symbol}"
        raise UserError(f"{why}: check --symbol and --category") from None


# ---- Messages and tapes ------------------------------------------------------------

# The kinds above TICKER change the rules; between them messages can be taken together.
DELTA, TRADES, TICKER, SNAPSHOT, LOST, CONTROL, REFUSED = range(7)
NO_LEVEL = -(2**62)  # the best level of an empty side; its worst is -NO_LEVEL


class View(NamedTuple):
    """What is known of the market after a message. nan = not known yet."""

    best_bid: int = NO_LEVEL  # levels: side x price tick
    best_ask: int = NO_LEVEL
    worst_bid: int = -NO_LEVEL  # where the visible window of the book ends
    worst_ask: int = -NO_LEVEL
    last_price: float = math.nan  # USDT, from the ticker, as is the mark price
    mark_price: float = math.nan

    def best(self, side: int) -> int:
        return self.best_bid if side == BID else self.best_ask

    def worst(self, side: int) -> int:
        return self.worst_bid if side == BID else self.worst_ask

    @property
    def fault(self) -> str:
        """Why there is no mid price: one-sided, crossed, or empty for nothing."""
        if NO_LEVEL in (self.best_bid, self.best_ask):
            return "book one-sided"
        return "book crossed" if self.best_bid >= -self.best_ask else ""

    @property
    def mid_ticks(self) -> float:
        """(best bid + best ask) / 2 in ticks; nan while the book has a fault.

        >>> View(best_bid=100, best_ask=-103).mid_ticks
        101.5
        """
        return math.nan if self.fault else (self.best_bid - self.best_ask) / 2


NO_ROWS = (array("q"), array("d"))


class Message(NamedTuple):
    """One parsed line."""

    kind: int  # DELTA, TRADES, ...
    recv_ns: int
    exch_ns: int = 0  # of book and trades; of trades that of the last
    rows: tuple[array, array] = NO_ROWS  # of the book: levels, and sizes in base coin
    trades: Iterable[tuple[int, int, float, bool]] = ()  # exch_ns, level hit, size, is_rpi
    note: dict[str, Any] = {}  # a control line's fields; the reason of a loss or a refusal
    view: View = View()  # what is known after it


Ints = Floats = Flags = np.ndarray  # int64, float64, int8
CODES = {"Ints": "q", "Floats": "d", "Flags": "b"}  # of the arrays that grow into them


@dataclass(frozen=True, eq=False)
class Tape:
    """Messages in the order received, as columns: a burst, a recording, a day.

    One array for each thing that is told of all messages, all book rows, all trades. So
    whatever happens between two moments is a slice, and the market of any moment a look-up.
    A trade's level is that of the resting order that it hits: a "Sell" at tick 5 hits the
    level 5, a "Buy" the level -5.
    """

    # of each message; first_row and first_trade have one more value, the end of the last
    kind: Flags
    recv_ns: Ints
    exch_ns: Ints
    best_bid: Ints  # known after it, as in View
    best_ask: Ints
    worst_bid: Ints
    worst_ask: Ints
    last_price: Floats
    mark_price: Floats
    first_row: Ints  # message m has the rows first_row[m] to first_row[m + 1] - 1
    first_trade: Ints
    # of each book row
    level: Ints
    size: Floats
    # of each trade
    trade_ns: Ints  # on the exchange's clock
    trade_level: Ints
    trade_size: Floats
    trade_is_rpi: Flags
    notes: dict[int, dict[str, Any]]  # by message

    def __len__(self) -> int:
        return len(self.kind)

    def view(self, m: int) -> View:
        """What is known after message m."""
        return View(*(getattr(self, name).item(m) for name in View._fields))

    def best(self, side: int) -> np.ndarray:
        """The best level of a side after each message."""
        return self.best_bid if side == BID else self.best_ask

    @cached_property
    def last_book(self) -> np.ndarray:
        """For each message, the last book message up to it; -1 before the first."""
        is_book = (self.kind == DELTA) | (self.kind == SNAPSHOT)
        return np.maximum.accumulate(np.where(is_book, np.arange(len(self)), -1))


COLUMNS = {f.name: CODES[f.type] for f in dataclasses.fields(Tape) if f.type in CODES}


def build_tape(messages: Iterable[Message]) -> Tape:
    """Messages as columns. They are taken one by one, so that a day needs no list of them."""
    columns = {name: array(code) for name, code in COLUMNS.items()}
    notes: dict[int, dict[str, Any]] = {}
    of_a_message = [columns[name] for name in ("kind", "recv_ns", "exch_ns", *View._fields)]
    of_a_trade = [columns[name] for name in columns if name.startswith("trade_")]
    levels, sizes = columns["level"], columns["size"]
    columns["first_row"].append(0)
    columns["first_trade"].append(0)
    for m, message in enumerate(messages):
        for column, value in zip(of_a_message, (*message[:3], *message.view)):
            column.append(value)
        levels.extend(message.rows[0])
        sizes.extend(message.rows[1])
        for trade in message.trades:
            for column, value in zip(of_a_trade, trade):
                column.append(value)
        columns["first_row"].append(len(levels))
        columns["first_trade"].append(len(of_a_trade[0]))
        if message.note:
            notes[m] = message.note
    return Tape(**{name: np.asarray(column) for name, column in columns.items()}, notes=notes)


# ---- Order book --------------------------------------------------------------------


class Book:
    """Sizes by level, both sides in one array: numpy counts negative levels from its end.

    The array is as long as all prices there can be, and takes memory only where it is
    touched. What lies beyond the worst level shown is unknown, not zero.
    """

    def __init__(self) -> None:
        self.view = View()
        self.exch_ns = 0  # cts of the last message applied
        self.clear()

    def clear(self) -> None:
        """Forget every level."""
        self.sizes = np.zeros(1 << 24)  # more than 2 x MAX_TICK, so that no sides meet
        self.view = View(last_price=self.view.last_price, mark_price=self.view.mark_price)

    def show(self, side: int, levels: array, sizes: array) -> None:
        """One side of one message: set its rows, then find the best and the worst level.

        The later of two rows for one level wins.
        """
        if not levels:
            return
        self.sizes[levels] = sizes
        worst = min(self.view.worst(side), min(levels))
        best = max(self.view.best(side), max(levels))
        if not (self.sizes[worst] and self.sizes[best]):  # at an end something was deleted
            held = self.sizes[worst : best + 1 or None].nonzero()[0]
            is_empty = not len(held)
            best = NO_LEVEL if is_empty else worst + int(held[-1])
            worst = -NO_LEVEL if is_empty else worst + int(held[0])
        if side == BID:
            self.view = self.view._replace(best_bid=best, worst_bid=worst)
        else:
            self.view = self.view._replace(best_ask=best, worst_ask=worst)

    def apply(self, tape: Tape, start: int, stop: int) -> None:
        """The same for messages start..stop-1 of a tape at once; it knows the outcome."""
        if start >= stop:
            return
        first, last = tape.first_row.item(start), tape.first_row.item(stop)
        self.sizes[tape.level[first:last]] = tape.size[first:last]
        self.view = tape.view(stop - 1)
        book = tape.last_book.item(stop - 1)
        if book >= start:
            self.exch_ns = tape.exch_ns.item(book)

    def shown(self, side: int, level: int) -> float:
        """Base coin resting at a level; inf where the feed does not show it."""
        size = self.sizes.item(level)
        return size if size or level >= self.view.worst(side) else math.inf

    def depth(self, side: int, band_bps: float) -> float:
        """Base coin resting within band_bps of the mid on a side."""
        mid = self.view.mid_ticks
        if mid != mid:
            return 0.0
        lowest = math.ceil(mid * (side - band_bps * 1e-4))
        return float(np.add.reduce(self.sizes[lowest : self.view.best(side) + 1 or None]))

    def levels(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """The levels of a side and their sizes, best first."""
        best, worst = self.view.best(side), self.view.worst(side)
        if best == NO_LEVEL:
            return np.zeros(0, np.int64), np.zeros(0)
        held = self.sizes[worst : best + 1 or None].nonzero()[0][::-1] + worst
        return held, self.sizes[held]


# ---- Parser: Bybit's letters become messages ---------------------------------------


class OffGrid(ValueError):
    """A price that is not a multiple of the tick size."""


def level_of(text: str, tick: Decimal, side: int) -> int:
    """A price text as side x ticks, exactly: "64474.1" and "64474.10" agree.

    >>> level_of("64474.1", tick=Decimal("0.1"), side=ASK)
    -644741
    """
    try:
        ticks = Decimal(must_be(str, text)) / tick
        if not 0 < ticks <= MAX_TICK:
            raise ValueError(f"price {text[:40]} is out of range at a tick of {tick}")
    except DecimalException:
        raise ValueError(f"price {text[:40]!r} is not a number") from None
    if ticks != int(ticks):
        raise OffGrid(f"price {text[:40]} is not a multiple of the tick {tick}: check --tick-size")
    return side * int(ticks)


def size_of(text: str) -> float:
    """A size text in base coin."""
    size = float(must_be(str, text))
    if not 0 <= size < MAX_SIZE:  # nan fails too
        raise ValueError(f"size {text[:40]} is out of range")
    return size


def exchange_time(ms: int, recv_ns: int) -> int:
    """ms of the exchange in ns; ValueError for what is no time of about now."""
    if abs(must_be(int, ms) * MS - recv_ns) > MAX_CLOCK_GAP_NS:
        raise ValueError(f"exchange time {str(ms)[:30]} is more than a day from our clock")
    return ms * MS


def must_be(kind: type, value: Any) -> Any:
    """The value; TypeError unless it is of a kind. (True would pass for an integer.)"""
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:40]} is not of type {kind.__name__}")
    return value


def refuse(text: str) -> None:
    """What JSON does not know: NaN and Infinity."""
    raise ValueError(f"{text} is not JSON")


DECODER = json.JSONDecoder(parse_constant=refuse)
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)
KIND_OF = {"delta": DELTA, "snapshot": SNAPSHOT}
HIT_SIDE = {"Buy": ASK, "Sell": BID}  # the side that a taker hits
TICKER_FIELDS = {"lastPrice": "last_price", "markPrice": "mark_price"}  # theirs: ours


class Parser:
    """Lines to messages. It keeps a book of its own, so that every message can say what is
    known after it; it follows the book's `u`, and counts what it sees.

    No line makes it raise, but one: a first snapshot off the price grid is a wrong
    --tick-size and ends in a UserError.
    """

    def __init__(self, instrument: Instrument, depth: int = 200) -> None:
        self.instrument, self.book = instrument, Book()
        self.topics = {
            f"orderbook.{depth}.{instrument.symbol}": self._parse_book,
            f"publicTrade.{instrument.symbol}": self._parse_trades,
            f"tickers.{instrument.symbol}": self._parse_ticker,
        }
        # The same few thousand texts come again and again: each is judged and converted once.
        tick, remember = Decimal(instrument.tick_text), lru_cache(maxsize=50_000)
        self.levels = {s: remember(partial(level_of, tick=tick, side=s)) for s in SIDES}
        self.sizes = remember(size_of)
        self.counts: Counter[str] = Counter()
        self.problem = ""  # the newest malformed message or gap, in words
        self.last_u: int | None = None  # None: no book that can be vouched for
        self.is_loss_told = False  # said once until the next snapshot or connection
        self.had_book = False

    def parse(self, recv_ns: int, text: str, from_exchange: bool = False) -> Message | None:
        """A line's message; None for what carries nothing (acks, pongs, other topics)."""
        handler = self._parse_operation
        try:
            line = DECODER.decode(text)
            topic = line.get("topic")
            if topic is not None:
                if topic not in self.topics:
                    self.counts["ignored"] += 1
                    return None
                handler = self.topics[topic]
            elif line.get("op") == "local" and not from_exchange:
                handler = self._parse_control
            return handler(recv_ns, line)
        except MALFORMED as error:
            is_book = handler == self._parse_book
            if isinstance(error, OffGrid) and is_book and not self.had_book:
                raise UserError(str(error)) from None
            self.counts["malformed"] += 1
            reason = f"malformed message: {type(error).__name__}: {str(error)[:100]}"
            self.problem = printable(reason)
            return self._lose(recv_ns, self.problem) if is_book else None

    def _message(self, kind: int, recv_ns: int, *content: Any, **more: Any) -> Message:
        """A message that says what is known after it."""
        return Message(kind, recv_ns, *content, **more, view=self.book.view)

    def _lose(self, recv_ns: int, reason: str) -> Message | None:
        """From here to the next snapshot the book is worth nothing."""
        self.last_u, self.problem = None, reason
        if self.is_loss_told:
            return None
        self.is_loss_told = True
        self.counts["losses"] += 1
        return self._message(LOST, recv_ns, note={"reason": reason})

    def _parse_book(self, recv_ns: int, line: dict) -> Message | None:
        self.counts["book"] += 1
        data = line["data"]
        u, kind = data["u"], KIND_OF.get(line["type"])
        if not 0 <= must_be(int, u) < NEVER:
            raise ValueError(f"u {str(u)[:30]} is not a count")
        exch_ns = exchange_time(line["cts"] if "cts" in line else line["ts"], recv_ns)

        # Is it the next message of the book, or the beginning of a new one?
        if kind == SNAPSHOT or u == 1:  # u == 1: the exchange's service restarted
            kind = SNAPSHOT
        elif kind is None:
            raise ValueError(f"type {str(line['type'])[:30]!r} of a book message is not known")
        elif self.last_u is None:
            self.counts["before snapshot"] += 1
            return self._lose(recv_ns, "delta before a snapshot")
        elif u <= self.last_u:
            self.counts["repeated"] += 1
            return None
        elif u != self.last_u + 1:
            self.counts["gaps"] += 1
            return self._lose(recv_ns, f"gap in u: {u} after {self.last_u}")

        # Every row is judged before the first one changes our book.
        bids, asks = self._parse_rows(data["b"], BID), self._parse_rows(data["a"], ASK)
        self.last_u, self.is_loss_told, self.had_book = u, False, True
        if kind == SNAPSHOT:
            self.book.clear()
        self.book.show(BID, *bids)
        self.book.show(ASK, *asks)
        return self._message(kind, recv_ns, exch_ns, (bids[0] + asks[0], bids[1] + asks[1]))

    def _parse_rows(self, rows: list, side: int) -> tuple[array, array]:
        """Levels and sizes of one side; raises unless every row is sound."""
        if not rows:
            return NO_ROWS
        if set(map(list.__len__, rows)) != {2}:  # itself raises for what is no list
            raise ValueError("a book row is not a pair")
        prices, sizes = zip(*rows)
        return array("q", map(self.levels[side], prices)), array("d", map(self.sizes, sizes))

    def _parse_trades(self, recv_ns: int, line: dict) -> Message | None:
        self.counts["trades"] += 1
        trades = []
        for trade in line["data"]:
            if trade.get("BT"):  # a block trade is negotiated outside the book
                self.counts["block trades"] += 1
                continue
            exch_ns, size = exchange_time(trade["T"], recv_ns), self.sizes(trade["v"])
            level = self.levels[HIT_SIDE[trade["S"]]](trade["p"])
            if not size:
                raise ValueError("a trade of nothing")
            trades.append((exch_ns, level, size, trade.get("RPI") is True))
        return self._message(TRADES, recv_ns, exch_ns, trades=trades) if trades else None

    def _parse_ticker(self, recv_ns: int, line: dict) -> Message:
        """Linear deltas carry the changed fields only; spot has no mark price."""
        self.counts["tickers"] += 1
        exchange_time(line["ts"], recv_ns)
        prices = {}
        for theirs, ours in TICKER_FIELDS.items():
            text = line["data"].get(theirs)
            if text is None or text == "":
                continue
            prices[ours] = float(must_be(str, text))
            if not 0 < prices[ours] < math.inf:
                raise ValueError(f"ticker's {theirs} {str(text)[:30]!r} is out of range")
        self.book.view = self.book.view._replace(**prices)
        return self._message(TICKER, recv_ns)

    def _parse_operation(self, recv_ns: int, line: dict) -> Message | None:
        """Acks and pongs; only a refusal is passed on."""
        if line.get("ret_msg") == "pong" or line.get("op") == "pong":
            self.counts["pongs"] += 1
        elif line.get("success") is False:
            self.counts["refusals"] += 1
            reason = printable(str(line.get("ret_msg")))
            return self._message(REFUSED, recv_ns, note={"reason": reason})
        elif line.get("success") is True:
            self.counts["acks"] += 1
        else:
            raise ValueError("neither a topic nor an operation")
        return None

    def _parse_control(self, recv_ns: int, line: dict) -> Message | None:
        """A line of our own in a recording: what is not in the exchange's messages."""
        event = line["event"]
        if event == "raw":
            return self.parse(recv_ns, line["text"], from_exchange=True)
        if event == "lost":
            self.last_u, self.is_loss_told = None, False
            return self._message(LOST, recv_ns, note={"reason": printable(str(line["reason"]))})
        return self._message(CONTROL, recv_ns, note=line)


# ---- Recordings --------------------------------------------------------------------


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

    def write(self, text: str | bytes) -> None:
        """Append and flush."""
        try:
            if not self.failure:
                self.file.write(text.encode() if isinstance(text, str) else text)
                self.file.flush()
        except OSError as error:
            self.failure = f"{self.path} stopped: {error.strerror or error}"

    def close(self) -> None:
        """Close; what a failing disk says now is known already, or was said by write."""
        with contextlib.suppress(OSError):
            self.file.close()


class Recorder(GrowingFile):
    """Appends lines `<recv_ns> <text>` to a gzip file, one gzip member a flush.

    Every member is complete, so a killed process leaves a file that any gzip reads, short
    of the lines since the last flush.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.lines: list[str] = []
        self.since_s = 0.0  # when the oldest of the lines came

    def record(self, recv_ns: int, text: str) -> None:
        """One line; on disk after FLUSH_S at the latest, if flush is called now and then."""
        if not self.lines:
            self.since_s = time.monotonic()
        self.lines.append(f"{recv_ns} {text}\n")
        self.flush(FLUSH_S)

    def flush(self, min_age_s: float = 0.0) -> None:
        """Put the lines on disk if the oldest has waited for min_age_s."""
        if self.lines and time.monotonic() - self.since_s >= min_age_s:
            self.write(gzip.compress("".join(self.lines).encode(), compresslevel=1))
            self.lines.clear()

    def close(self) -> None:
        """Everything on disk, and no more lines."""
        self.flush()
        super().close()


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let write make a file under a temporary name, then give it its own."""
    draft = path.with_name(path.name + ".part")
    write(draft)
    draft.replace(path)


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
                    recv_ns = int(stamp)
                    if not 0 <= recv_ns < 2**63:
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


class Recording(NamedTuple):
    """A recording that is ready to be read."""

    path: Path
    start: dict[str, Any]  # the start line's fields; empty without one
    parser: Parser

    @property
    def is_synthetic(self) -> bool:
        return bool(self.start.get("synthetic"))

    def messages(self) -> Iterator[Message]:
        """The messages of the file: it is a slower exchange."""
        last_ns = 0
        for recv_ns, text in read_lines(self.path):
            last_ns = max(recv_ns, last_ns)  # a stamp never goes back
            message = self.parser.parse(last_ns, text)
            if message is not None:
                yield message


def open_recording(
    path: Path, tick_text: str | None = None, lot_text: str | None = None, depth: int | None = None
) -> Recording:
    """A recording and the parser that fits it: the flags first, then its start line, then the
    table. The first lines tell the symbol and the depths that it holds; the deepest is used.
    """
    start, symbol, depths = {}, "BTCUSDT", set()
    for _, text in islice(read_lines(path), 2000):
        with contextlib.suppress(*MALFORMED):
            line = DECODER.decode(text)
            if line.get("op") == "local" and line["event"] == "start":
                start = start or line
            elif line.get("topic", "").startswith("orderbook."):
                _, levels, symbol = line["topic"].split(".")
                depths.add(int(levels))
    if depth and depth not in depths:
        raise UserError(f"{path} has no depth {depth}: it has {sorted(depths)}")
    depth = depth or start.get("depth") or max(depths, default=DEPTHS[0])
    instrument = find_instrument(
        printable(str(start.get("symbol", symbol))),
        printable(str(start.get("category", "linear"))),
        tick_text or start.get("tick_size"),
        lot_text or start.get("lot_size"),
    )
    return Recording(path, start, Parser(instrument, depth))


# ---- Live feed ---------------------------------------------------------------------


class FeedProblem(Exception):
    """What ends a connection: the next one is tried."""


class BoundedSocket(websocket.WebSocket):
    """A WebSocket that takes no message above MAX_MESSAGE, in one frame or in many."""

    unfinished = 0  # bytes of a message of which frames are still to come

    def recv_frame(self) -> websocket.ABNF:
        """The next frame, judged by the length it announces, before memory is taken."""
        buffer = self.frame_buffer
        if buffer.needs_header():
            buffer.recv_header()
        if buffer.needs_length():
            buffer.recv_length()
        length = self.unfinished + buffer.length
        if length > MAX_MESSAGE:
            raise FeedProblem(f"a message of {length} bytes, more than {MAX_MESSAGE}")
        frame = super().recv_frame()
        if frame.opcode < websocket.ABNF.OPCODE_CLOSE:  # text, binary, or their continuation
            self.unfinished = 0 if frame.fin else length
        return frame


def session_clock() -> Callable[[], int]:
    """Wall time at the start plus monotonic time since: ns that never decrease."""
    offset = time.time_ns() - time.monotonic_ns()
    return lambda: offset + time.monotonic_ns()


class LiveFeed:
    """One thread that receives, stamps, records, parses and enqueues.

    It alone pings, reconnects and subscribes. What it cannot vouch for becomes a LOST
    message; nothing received is dropped. Take messages from `queue`, and call tend() a few
    times a second. Control lines of the main thread go through `emit` too, so that the
    recording is the session.
    """

    def __init__(
        self, url: str, parser: Parser, recorder: Recorder | None = None,
        clock_ns: Callable[[], int] | None = None, rng: np.random.Generator | None = None,
    ) -> None:  # fmt: skip
        self.url, self.parser, self.recorder = url, parser, recorder
        self.clock_ns = clock_ns or session_clock()
        self.rng = rng or np.random.default_rng()
        self.queue: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.thread: threading.Thread | None = None
        self.ws: websocket.WebSocket | None = None  # while connected
        self.cut_reason = ""  # why another thread cut the connection
        self.fatal = ""  # a configuration error: no retry
        self.reconnects = 0
        self.last_frame_ns = self.last_book_ns = self.clock_ns()

    # One function stamps, records and enqueues, under one lock, in this order.
    def emit(self, text: str) -> Message | None:
        """Take one line into the session: from the exchange, or a control line."""
        with self.lock:
            recv_ns = self.clock_ns()
            if self.recorder:
                self.recorder.record(recv_ns, text)
            message = self.parser.parse(recv_ns, text)
            if message is not None:
                self.queue.put(message)
            return message

    # -- what other threads call

    def start(self, ws: websocket.WebSocket) -> None:
        """Go on alone with a connected socket."""
        self.thread = threading.Thread(target=self._run, args=(ws,), name="feed", daemon=True)
        self.thread.start()

    def cut(self, reason: str) -> None:
        """End this connection; the feed's thread wakes up and makes another."""
        if (ws := self.ws) is not None:
            self.cut_reason = self.cut_reason or reason
            ws.abort()

    def stop(self) -> None:
        """End the thread; the queue then holds all it received."""
        self.stopping.set()
        self.cut("stopping")
        if self.thread:
            self.thread.join(STOP_S)  # it may be connecting; then it can no longer emit

    def tend(self) -> None:
        """Put on disk what has waited, and cut a connection that has fallen silent.

        It is for another thread: a message that drips byte by byte would keep ours waiting.
        """
        with self.lock:
            if self.recorder:
                self.recorder.flush(FLUSH_S)
        now_ns = self.clock_ns()
        if now_ns - self.last_frame_ns > WATCHDOG_S * NS:
            self.cut(f"nothing received for {WATCHDOG_S:g} s")
        elif now_ns - self.last_book_ns > BOOK_WATCHDOG_S * NS:
            self.cut(f"no book message for {BOOK_WATCHDOG_S:g} s")

    # -- the feed's own thread

    def connect(self) -> websocket.WebSocket:
        """A connected socket. OSError or WebSocketException where there is no exchange."""
        try:
            options = dict(skip_utf8_validation=True, header=USER_AGENT, class_=BoundedSocket)
            ws = websocket.create_connection(self.url, timeout=CONNECT_S, **options)
        except (ValueError, IndexError) as error:  # whatever answered, it was no exchange
            raise OSError(f"no sensible answer: {error}") from None
        ws.settimeout(RECV_S)
        return ws

    def _run(self, ws: websocket.WebSocket | None) -> None:
        """One connection after the other; a connection lost is a book lost."""
        failures = 0
        while not self.stopping.is_set() and not self.fatal:
            born_ns = self.clock_ns()
            try:
                if ws is None:
                    ws = self.connect()
                    self.reconnects += 1
                self.cut_reason, self.last_frame_ns = "", self.clock_ns()
                self.last_book_ns = self.last_frame_ns
                self.ws = ws
                self._subscribe(ws)
                self._receive(ws)
            except UserError as error:
                self.fatal = str(error)
            except (FeedProblem, websocket.WebSocketException, OSError) as error:
                reason = printable(self.cut_reason or str(error) or type(error).__name__)[:200]
                self.parser.problem = f"connection: {reason}"
                if ws is not None and not self.stopping.is_set():
                    self.emit(control_line("lost", reason=reason))
            except BaseException as error:  # a defect of ours: end the run, do not fall silent
                self.fatal = f"the feed failed: {error!r}: please report it"
                raise
            finally:
                self.ws = None
                if ws is not None:
                    ws.shutdown()
            ws = None

            # Wait longer after each failure, and until a consumer that is behind catches up.
            failures = 0 if self.clock_ns() - born_ns > HEALTHY_S * NS else failures + 1
            first, longest = BACKOFF_S
            delay_s = min(first * 2 ** min(failures, 30), longest) * self.rng.uniform(0.5, 1.0)
            self.stopping.wait(0 if self.fatal else delay_s)
            while self.queue.qsize() > MAX_QUEUED // 2 and not self.stopping.wait(RECV_S / 10):
                pass

    def _subscribe(self, ws: websocket.WebSocket) -> None:
        topics = list(self.parser.topics)
        for number, first in enumerate(range(0, len(topics), ARGS_PER_REQUEST)):
            args = topics[first : first + ARGS_PER_REQUEST]
            ws.send(json.dumps({"req_id": str(number), "op": "subscribe", "args": args}))

    def _receive(self, ws: websocket.WebSocket) -> None:
        """Receive from one connection; raises what ends it."""
        pinged_ns = self.clock_ns()
        while not self.stopping.is_set():
            if self.cut_reason:
                raise FeedProblem(self.cut_reason)
            if self.queue.qsize() > MAX_QUEUED:
                raise FeedProblem(f"{MAX_QUEUED} messages wait: the program cannot keep up")
            if self.clock_ns() - pinged_ns >= PING_S * NS:
                ws.send('{"req_id":"ping","op":"ping"}')
                pinged_ns = self.clock_ns()
            with contextlib.suppress(websocket.WebSocketTimeoutException):
                opcode, payload = ws.recv_data(control_frame=True)
                self.last_frame_ns = self.clock_ns()
                if opcode == websocket.ABNF.OPCODE_CLOSE:
                    code = int.from_bytes(payload[:2], "big") if len(payload) > 1 else 1005
                    raise FeedProblem(f"closed by the exchange (code {code})")
                if opcode in (websocket.ABNF.OPCODE_TEXT, websocket.ABNF.OPCODE_BINARY):
                    self._check(self.emit(sound_line(payload)))

    def _check(self, message: Message | None) -> None:
        """Raise if a message spoils the connection it came by."""
        if message is None:
            return
        if message.kind in (DELTA, SNAPSHOT):
            self.last_book_ns = message.recv_ns
        elif message.kind == LOST:
            raise FeedProblem(f"resync after: {message.note['reason']}")
        elif message.kind == REFUSED and "already subscribed" not in message.note["reason"]:
            reason = f"refused: {message.note['reason'][:200]}"
            if self.parser.had_book:  # what worked before is no mistake of the user
                raise FeedProblem(reason)
            raise UserError(
                f"the exchange {reason}: check --symbol (upper case), --category, --depth"
            )


def open_feed(
    instrument: Instrument, depth: int, url: str | None = None, record: Path | None = None,
    clock_ns: Callable[[], int] | None = None, **start: Any,
) -> LiveFeed:  # fmt: skip
    """A started feed whose first line is the control line `start`.

    OSError or WebSocketException where the exchange cannot be reached.
    """
    url = url or WS_URL.format(category=instrument.category)
    source = LiveFeed(url, Parser(instrument, depth), clock_ns=clock_ns)
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


# ---- Command line: record, info ----------------------------------------------------


def run_record(options: argparse.Namespace) -> None:
    """Record the live feed to a file, for --minutes or until Ctrl-C."""
    steps = options.tick_size, options.lot_size
    instrument = find_instrument(options.symbol, options.category, *steps, not options.url)
    try:
        source = open_feed(instrument, options.depth or DEPTHS[0], options.url, options.file)
    except (OSError, websocket.WebSocketException) as error:
        raise UserError(f"the exchange cannot be reached ({error}): check the network") from None
    stop, end_s, told_s = StopSignal(), time.monotonic() + options.minutes * 60, -math.inf
    while not (stop.is_set or source.fatal or source.recorder.failure):
        if (now_s := time.monotonic()) >= end_s:
            break
        if now_s - told_s >= 10:
            told_s = now_s
            print(f"{dict(source.parser.counts)}, {source.reconnects} reconnects", flush=True)
        time.sleep(min(FLUSH_S, end_s - now_s))
        source.tend()
        while not source.queue.empty():
            source.queue.get()
    source.stop()
    source.emit(control_line("end"))
    source.recorder.close()
    if problem := source.fatal or source.recorder.failure:
        raise UserError(problem)
    print(f"{options.file}: {dict(source.parser.counts)}")


def run_info(options: argparse.Namespace) -> None:
    """Print what one wants to know of a recording."""
    flags = options.tick_size, options.lot_size, options.depth
    recording = open_recording(options.file, *flags)
    parser, tape = recording.parser, build_tape(recording.messages())
    kind = "SYNTHETIC, made by a simulator" if recording.is_synthetic else "recorded"
    print(f"{options.file}: {parser.instrument.symbol} {parser.instrument.category}, {kind}")
    for label, value in [*parser.counts.items(), *measure_tape(tape)]:
        print(f"  {label:<37}{value}")


def measure_tape(tape: Tape) -> Iterator[tuple[str, Any]]:
    """The facts of a recording as (label, value)."""
    yield "messages", len(tape)
    if not len(tape):
        return
    yield "first message, UTC", clock_text(tape.recv_ns.item(0))
    yield "span, s", f"{(tape.recv_ns.item(-1) - tape.recv_ns.item(0)) / NS:.1f}"
    yield "snapshots", int((tape.kind == SNAPSHOT).sum())
    for reason, times in Counter(note.get("reason") for note in tape.notes.values()).items():
        if reason:
            yield f"book lost {times} times", reason

    # The book after each of its messages, and what its best prices say.
    is_book = (tape.kind == DELTA) | (tape.kind == SNAPSHOT)
    bid, ask, recv_ns = tape.best_bid[is_book], -tape.best_ask[is_book], tape.recv_ns[is_book]
    is_sound = (bid > NO_LEVEL) & (ask < -NO_LEVEL) & (bid < ask)
    yield "crossed or one-sided books", int((~is_sound).sum())
    for name, values in (
        ("receive - exchange time, ms", (recv_ns - tape.exch_ns[is_book]) / MS),
        ("spread, ticks", (ask - bid)[is_sound]),
        (f"{len(tape.trade_size)} trades, base coin each", tape.trade_size),
    ):
        if len(values):
            low, middle, high = np.percentile(values, [1, 50, 99])
            yield name, f"median {middle:g}, 1 % {low:g}, 99 % {high:g}"
    second, mid = recv_ns[is_sound] // NS, (bid + ask)[is_sound] / 2
    is_last = np.diff(second, append=NEVER) > 0  # of its second; some seconds have no message
    if is_last.sum() > 2:
        returns_bps = 1e4 * np.diff(np.log(mid[is_last]))
        variance = np.mean(returns_bps**2 / np.diff(second[is_last]))
        yield "volatility, bps/sqrt(s)", f"{math.sqrt(variance):.3f}"


def clock_text(time_ns: int) -> str:
    """A time as date and time of day, UTC."""
    return time.strftime("%F %T", time.gmtime(time_ns / NS))


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


class StopSignal:
    """Says when Ctrl-C or SIGTERM came, so that a loop ends where it chooses to; a second
    one ends the program where it is.
    """

    def __init__(self) -> None:
        self.is_set = False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._note)

    def _note(self, number: int, _: Any) -> None:
        self.is_set = True
        signal.signal(number, signal.default_int_handler)


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
    """python feed.py record|info; the exit status."""
    parser = Arguments(prog="feed.py", description="Record Bybit, inspect a file.")
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record", help="record the live feed to FILE")
    record.add_argument("file", type=Path, metavar="FILE")
    record.add_argument("--minutes", type=positive, default=math.inf, help="default: no end")
    add_market_flags(record)
    record.set_defaults(run=run_record)
    info = commands.add_parser("info", help="what FILE, a recording, holds")
    info.add_argument("file", type=Path, metavar="FILE")
    for flag, kind in (("--tick-size", str), ("--lot-size", str), ("--depth", int)):
        info.add_argument(flag, type=kind)
    info.set_defaults(run=run_info)
    options = parser.parse_args(arguments)
    return exit_cleanly(lambda: options.run(options))


if __name__ == "__main__":
    sys.exit(main())
