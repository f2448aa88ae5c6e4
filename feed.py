"""What the exchange tells us: Bybit's public messages, the order book, recordings.

  {"topic":"orderbook.200.BTCUSDT","type":"delta","ts":1786310818170,"cts":1786310818166,
   "data":{"b":[["65114.20","6.054"],["65101.00","0"]],"a":[],"u":15076953}}
  {"topic":"publicTrade.BTCUSDT","data":[{"T":1786310819680,"S":"Sell","v":"0.004","p":"65114.20"}]}
  {"topic":"tickers.BTCUSDT","type":"delta","data":{"markPrice":"65117.43"},"ts":1786310818183}

A book row carries the whole size that now rests at its price; "0" deletes the level. A "Sell" takes
from the bids. `u` counts the book's messages, and a book that lost one is worth nothing.
(bybit-exchange.github.io/docs/v5, read 2026-07; recordings have the lines of hftbacktest's.)

Two clocks: recv_ns is when we received a message (ns since the epoch, never decreasing); exch_ns
is when the matching engine acted (`cts` of the book, `T` of a trade). Prices are integer ticks,
sizes are base coin (BTC). A level is side x price tick, with the side +1 for bids and -1 for asks:
651142 is a bid at this tick, -651143 an ask. On both sides the larger level is the better price.

A line, stamped when received -> Parser -> Message -> Book. What comes after the stamp depends on
the lines alone, so the replay of a recorded session is that session. (A Tape keeps messages.)
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import math
import os
import queue
import signal
import sys
import threading
import time
import urllib.request
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from decimal import Decimal
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

try:
    import numpy as np
    import websocket
except ImportError as error:
    sys.exit(f"error: {error}: pip install -r requirements.txt")

NS, MS = 1_000_000_000, 1_000_000  # nanoseconds in a second, in a millisecond
DAY_NS, NEVER = 86_400 * NS, 2**63 - 1  # ns
BID, ASK = SIDES = 1, -1  # side: +1 buys, -1 sells
USER_AGENT = {"User-Agent": "marketmaker-reference/1.0"}
DEPTHS = (200, 1000)  # levels a side, pushed every 100 and 200 ms
CONNECT_S, RECV_S, STOP_S = 10.0, 0.5, 2.0  # patience: connecting, receiving, ending the thread
PING_S, FLUSH_S, LOOK_S = 5.0, 0.5, 0.1  # between pings (10 s idle: cut), writes to disk, looks
WATCHDOG_S, BOOK_WATCHDOG_S = 10.0, 60.0  # without any frame, without a book: reconnect
BACKOFF_S = (1.0, 30.0)  # first and longest wait between connections; 500/5 min allowed
MAX_WAITING = 64_000_000  # bytes for the main thread, a message its text and 1000; more: book lost
MAX_HANDSHAKE, MAX_MESSAGE = 1 << 16, 4 << 20  # bytes; a snapshot of 1000 levels has 60 kB
MAX_LINE = 8 * MAX_MESSAGE  # bytes of a recording's; escaped, a message may be 6 times as long
MAX_ROWS, MAX_TICK = 5_000, 8_000_000  # of a side, or trades, in a message; 800,000 USDT at 0.1
LEAST, MOST = 1e-12, 1e15  # of steps, sizes (base coin) and prices (USDT)


class UserError(ValueError):
    """Something the user can mend: one clear line with value, rule and remedy."""


def must_be(kind: type, value: Any, *limits: Any) -> Any:
    """The value; ValueError unless it is of a kind (True is no int) and within the limits."""
    size = len(value) if type(value) is str else value
    if type(value) is not kind or (limits and not limits[0] <= size <= limits[1]):
        raise ValueError(f"{str(value)[:40]} must be {kind.__name__} {limits or ''}")
    return value


# ---- Instrument --------------------------------------------------------------------


@dataclass(frozen=True)
class Instrument:
    """What is traded. Steps are kept as the exchange's text, so that they stay exact."""

    symbol: str = "BTCUSDT"
    category: str = "linear"  # or spot
    tick_text: str = "0.1"  # price step, USDT
    lot_text: str = "0.001"  # quantity step, base coin
    min_qty: float = 0.001  # base coin
    min_notional: float = 0.0  # least value of an order, USDT; 0: not known
    tick = cached_property(lambda self: Decimal(str(self.tick_text)))
    tick_size = cached_property(lambda self: float(self.tick_text))  # USDT
    lot_size = cached_property(lambda self: float(self.lot_text))  # base coin
    min_order = cached_property(lambda self: max(self.lot_size, float(self.min_qty)))  # base coin
    digits = cached_property(lambda self: max(0, -self.tick.normalize().as_tuple().exponent))
    base_coin = cached_property(lambda self: self.symbol.removesuffix("USDT"))
    told = property(lambda self: dict(zip(  # as the start line of a recording has it
        ("symbol", "category", "tick_size", "lot_size", "min_qty", "min_notional"), astuple(self))))

    def __post_init__(self) -> None:
        steps = self.tick_text, self.lot_text, self.min_qty or 1, self.min_notional or 1
        try:
            [must_be(float, float(step), LEAST, MOST) for step in steps]
        except (TypeError, ValueError):
            raise UserError(f"--tick-size, --lot-size {steps} must be above 0: try 0.1") from None


BUILT_IN = {("BTCUSDT", "linear"): Instrument(min_notional=5.0),  # in 2025
            ("BTCUSDT", "spot"): Instrument("BTCUSDT", "spot", "0.1", "0.000001", 0.000011, 5.0)}


def find_instrument(told: Mapping[str, Any], ask: bool = False) -> Instrument:
    """As told by flags or a start line; what they leave open is Bybit's, if asked, or built in."""
    market = printable(told.get("symbol") or "BTCUSDT"), printable(told.get("category") or "linear")
    base, why = BUILT_IN.get(market), " is not known"
    if told.get("tick_size") and told.get("lot_size"):
        base = base or Instrument(*market, min_qty=0.0)
    elif ask:
        url = "https://api.bybit.com/v5/market/instruments-info?symbol={}&category={}"
        request, body = urllib.request.Request(url.format(*market), headers=USER_AGENT), b""
        try:
            with urllib.request.urlopen(request, timeout=CONNECT_S) as response:  # TLS is verified
                body = response.read(MAX_MESSAGE)
            (entry,) = json.loads(body)["result"]["list"]
            tick_text, lot = entry["priceFilter"]["tickSize"], entry["lotSizeFilter"].get
            lot_text = lot("qtyStep") or lot("basePrecision")  # of linear, of spot; as below
            least = lot("minOrderQty") or lot_text, lot("minNotionalValue") or lot("minOrderAmt", 0)
            base = Instrument(*market, tick_text, lot_text, *map(float, least))
        except Exception as error:  # an answer without steps has a reason
            reason = printable(body.decode("utf-8", "replace") or error)
            why += f", and Bybit does not tell ({reason})"
    if base is None:
        raise UserError(f"{' '.join(market)}{why}: check --symbol or give --tick-size, --lot-size")
    known = {name: told[name] for name in [*base.told][2:] if told.get(name) is not None}
    return Instrument(*(base.told | known).values())


# ---- Messages and tapes ------------------------------------------------------------

# Kinds of messages: up to SNAPSHOT of the market, then of the session.
DELTA, TRADES, TICKER, SNAPSHOT, LOST, CONTROL, REFUSED = range(7)
NO_LEVEL = -(2**62)  # the best level of an empty side; its worst is -NO_LEVEL
Ints = Floats = Flags = np.ndarray  # int64, float64, int8


class View(NamedTuple):
    """What is known of the market after a message. NO_LEVEL: an empty side; nan: not known yet."""

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

    mid_ticks = property(lambda v: math.nan if v.fault else (v.best_bid - v.best_ask) / 2)


class Message(NamedTuple):
    """One parsed line."""

    kind: int  # DELTA, TRADES, ...
    recv_ns: int
    exch_ns: int = 0  # of book and trades; of trades that of the last
    rows: tuple[Sequence[int], Sequence[float]] = (), ()  # of the book: levels, sizes
    trades: Iterable[tuple[int, int, float, bool]] = ()  # exch_ns, level hit, size, is_rpi
    note: dict[str, Any] = {}  # a control line's fields; the reason of a loss or a refusal
    view: View = View()  # what is known after it: from LOST to SNAPSHOT an old book, not to be used


@dataclass(frozen=True, eq=False)
class Tape:
    """The messages of a recording as columns: to keep, and for questions on all of them at once."""

    kind: Flags  # of each message
    recv_ns: Ints
    exch_ns: Ints
    best_bid: Ints  # known after it, as in View
    best_ask: Ints
    worst_bid: Ints
    worst_ask: Ints
    last_price: Floats
    mark_price: Floats
    first_row: Ints  # message m has the rows first_row[m] to first_row[m + 1] - 1,
    first_trade: Ints  # and the trades alike: so there is one value more than messages
    level: Ints  # of each book row
    size: Floats
    trade_ns: Ints  # of each trade, on the exchange's clock
    trade_level: Ints  # of the resting order hit: by a "Sell" at tick 5 it is 5, by a "Buy" -5
    trade_size: Floats
    trade_is_rpi: Flags  # retail price improvement: it met orders that the book does not show
    notes: dict[int, dict[str, Any]]  # by message
    is_book = cached_property(lambda self: (self.kind == DELTA) | (self.kind == SNAPSHOT))
    mid_ticks = cached_property(lambda self: np.where(  # after each message; nan: a fault, as above
        (np.minimum(self.best_bid, self.best_ask) > NO_LEVEL) & (self.best_bid < -self.best_ask),
        (self.best_bid - self.best_ask) / 2, math.nan))  # fmt: skip

    def messages(self) -> Iterator[Message]:
        """The messages again, one after the other."""
        of_trades = self.trade_ns, self.trade_level, self.trade_size, self.trade_is_rpi
        for start in range(0, len(self.kind), 4096):  # a part at a time, as Python's own numbers
            part, firsts = slice(start, start + 4096), slice(start, start + 4097)
            heads = zip(*(getattr(self, name)[part].tolist() for name in HEAD))
            rows, trades = self.first_row[firsts].tolist(), self.first_trade[firsts].tolist()
            hits = [*zip(*(column[trades[0] : trades[-1]].tolist() for column in of_trades))]
            for m, (kind, recv_ns, exch_ns, *view) in enumerate(heads):
                row = slice(rows[m], rows[m + 1])
                trade = slice(trades[m] - trades[0], trades[m + 1] - trades[0])
                yield Message(kind, recv_ns, exch_ns, (self.level[row], self.size[row]),
                              hits[trade], self.notes.get(start + m, {}), View(*view))  # fmt: skip


CODES = {"Ints": "q", "Floats": "d", "Flags": "b"}  # of the arrays that grow into columns
COLUMNS = {f.name: CODES[f.type] for f in fields(Tape) if f.type in CODES}
HEAD = (*Message._fields[:3], *View._fields)  # the columns with one value for each message


def build_tape(messages: Iterable[Message]) -> Tape:
    """Messages as columns. They are taken one by one, so that a day needs no list of them."""
    columns, notes = {name: array(code) for name, code in COLUMNS.items()}, {}
    head = [columns[name] for name in (*HEAD, "first_row", "first_trade")]
    levels, trades, rest = columns["level"], columns["trade_ns"], [*columns.values()][len(head) :]
    for m, message in enumerate(messages):
        values = (*message[:3], *message.view, len(levels), len(trades))
        for column, value in zip(head, values):
            column.append(value)
        for column, values in zip(rest, (*message.rows, *zip(*message.trades))):
            column.extend(values)
        if message.note:
            notes[m] = message.note
    columns["first_row"].append(len(levels))
    columns["first_trade"].append(len(trades))
    return Tape(**{name: np.asarray(column) for name, column in columns.items()}, notes=notes)


# ---- Order book --------------------------------------------------------------------


class Book:
    """Sizes by level, as in a dict, but in one array: numpy counts negative levels from its end."""

    def __init__(self) -> None:
        self.view, self.exch_ns = View(), 0  # after the last message applied; its cts
        self.clear()

    def clear(self) -> None:
        """No level is known any more; what the ticker told stays."""
        self.sizes = np.zeros(1 << 24)  # above 2 x MAX_TICK; memory is taken where it is touched
        self.view = View(last_price=self.view.last_price, mark_price=self.view.mark_price)

    def show(self, levels: array, sizes: array, n_bids: int) -> None:
        """The parser's way: set rows, bids first; of two for one level the later wins."""
        self.sizes[levels] = sizes
        best, worst = list(self.view[:2]), list(self.view[2:4])  # of bids and asks
        for i, rows in enumerate((levels[:n_bids], levels[n_bids:])):
            best[i], worst[i] = max([best[i], *rows]), min([worst[i], *rows])
            # A deleted end is searched for anew. subtle: `or None`, as the ask at tick 1 is -1.
            if rows and not (self.sizes[best[i]] and self.sizes[worst[i]]):
                held = self.sizes[worst[i] : best[i] + 1 or None].nonzero()[0] + worst[i]
                best[i] = held.item(-1) if len(held) else NO_LEVEL
                worst[i] = held.item(0) if len(held) else -NO_LEVEL
        self.view = View(*best, *worst, *self.view[4:])

    def apply(self, message: Message) -> None:
        """Everybody else's way: what a message shows, and what it says is known after it."""
        if message.kind == SNAPSHOT:
            self.clear()
        if message.kind in (DELTA, SNAPSHOT):
            self.sizes[message.rows[0]] = message.rows[1]
            self.exch_ns = message.exch_ns
        self.view = message.view if message.kind <= SNAPSHOT else self.view

    def shown(self, side: int, level: int) -> float:
        """Base coin resting at a level; inf where the feed does not show it."""
        size = self.sizes.item(level)
        return size if size or level >= self.view.worst(side) else math.inf

    def depth(self, side: int, band_bps: float) -> float:
        """Base coin resting within band_bps of the mid on a side; 0 without a mid."""
        mid = self.view.mid_ticks
        if math.isnan(mid):
            return 0.0
        lowest = math.ceil(mid * (side - band_bps * 1e-4))
        return float(np.add.reduce(self.sizes[lowest : self.view.best(side) + 1 or None]))

    def levels(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """The levels of a side and their sizes, best first."""
        best, worst = self.view.best(side), self.view.worst(side)
        held = self.sizes[worst : best + 1 or None].nonzero()[0][::-1] + worst
        return held, self.sizes[held]


# ---- Parser: Bybit's letters become messages ---------------------------------------

MALFORMED = (ValueError, TypeError, KeyError, AttributeError, RecursionError, ArithmeticError)
DECODER = json.JSONDecoder(parse_constant=int)  # int("NaN") fails: JSON knows no NaN
HIT_SIDE = {"Buy": ASK, "Sell": BID}  # the side that a taker hits


def level_of(text: str, tick: Decimal, side: int) -> int:
    """A price text as side x ticks, exactly: an ask at "64474.1" or "64474.10" is -644741."""
    ticks = Decimal(must_be(str, text, 1, 40)) / tick
    if ticks % 1 > 0:
        raise UserError(f"price {text} is no multiple of the tick {tick}: check --tick-size")
    return side * must_be(int, int(ticks), 1, MAX_TICK)


def size_of(text: str) -> float:
    """A text as a number from 0 on: a size in base coin, or a price that is on no grid."""
    return must_be(float, float(must_be(str, text, 1, 40)), 0, MOST)


def exchange_time(ms: int, recv_ns: int) -> int:
    """ms of the exchange in ns; ValueError for what is further than a day from our clock."""
    return must_be(int, must_be(int, ms) * MS, recv_ns - DAY_NS, recv_ns + DAY_NS)


class Parser:
    """Lines become messages, each with what is known after it. UserError: a book off the grid."""

    def __init__(self, instrument: Instrument, depth: int = 200) -> None:
        self.instrument, self.book, symbol = instrument, Book(), instrument.symbol
        self.topics = {f"orderbook.{depth}.{symbol}": ("book", self._parse_book),
                       f"publicTrade.{symbol}": ("trades", self._parse_trades),
                       f"tickers.{symbol}": ("tickers", self._parse_ticker)}  # fmt: skip
        remember = lru_cache(maxsize=50_000)  # the same few thousand texts come again and again
        self.levels = {s: remember(partial(level_of, tick=instrument.tick, side=s)) for s in SIDES}
        self.sizes = remember(size_of)
        self.counts: Counter[str] = Counter()
        self.problem = ""  # the newest malformed message or gap, in words
        self.last_u: int | None = None  # of the book; None: there is none to go on from,
        self.is_loss_told = False  # which is told once, until a snapshot or another connection
        self.had_book = False  # a sound one came; if not, refusals and odd prices are the user's

    def parse(self, recv_ns: int, text: str) -> Message | None:
        """A line's message; None for what carries nothing (acks, pongs, other topics)."""
        topic = None
        try:
            # A line of our own: what no message tells, or one that could not stand as it is.
            line = DECODER.decode(text)
            if line.get("op") == "local":
                if line["event"] == "lost":  # told by the connection
                    self.last_u, self.is_loss_told = None, False
                    return self._tell(LOST, recv_ns, line["reason"])
                if line["event"] in ("start", "params", "end"):
                    return Message(CONTROL, recv_ns, note=line, view=self.book.view)
                line = DECODER.decode(line["text"])  # raw; no other event has a text
            topic = line.get("topic")
            name, parse = self.topics.get(topic, ("ignored", None))
            if topic is None:  # an answer to us; only a refusal matters
                name = "pongs" if "pong" in (line.get("ret_msg"), line.get("op")) else "acks"
                if name == "acks" and not must_be(bool, line["success"]):
                    self.counts["refusals"] += 1
                    return self._tell(REFUSED, recv_ns, line.get("ret_msg"))
            self.counts[name] += 1
            return parse(recv_ns, line) if parse else None
        except MALFORMED as error:
            reason = f"malformed message: {type(error).__name__}: {error}"
            if not str(topic).startswith("orderbook."):
                self.counts["malformed"] += 1
                self.problem = printable(reason)
                return None
            if isinstance(error, UserError):  # off the grid
                if not self.had_book:
                    raise
                self.had_book = False  # the next raises, unless a sound one comes
            return self._lose(recv_ns, "malformed", reason)

    def _lose(self, recv_ns: int, why: str, reason: str) -> Message | None:
        """From here to the next snapshot the book is worth nothing."""
        self.counts[why] += 1
        is_news = not self.is_loss_told
        self.last_u, self.is_loss_told, self.problem = None, True, printable(reason)
        return self._tell(LOST, recv_ns, reason) if is_news else None

    def _tell(self, kind: int, recv_ns: int, reason: Any) -> Message:
        return Message(kind, recv_ns, note={"reason": printable(reason)}, view=self.book.view)

    def _parse_book(self, recv_ns: int, line: dict) -> Message | None:
        data, u = line["data"], must_be(int, line["data"]["u"], 0, NEVER)
        exch_ns = exchange_time(line["cts"] if "cts" in line else line["ts"], recv_ns)
        # It begins a book anew (with u = 1 they restarted), or must carry the u after our last.
        kind = {"snapshot": SNAPSHOT, "delta": SNAPSHOT if u == 1 else DELTA}[line["type"]]
        if kind == DELTA and self.last_u is None:
            return self._lose(recv_ns, "before snapshot", "delta before a snapshot")
        if kind == DELTA and u <= self.last_u:
            self.counts["repeated"] += 1
            return None
        if kind == DELTA and u > self.last_u + 1:
            return self._lose(recv_ns, "gaps", f"gap in u: {u} after {self.last_u}")
        # Every row is judged before the first one changes our book.
        levels, sizes = array("q"), array("d")
        for side, rows in ((BID, data["b"]), (ASK, data["a"])):
            if len(rows) > MAX_ROWS or set(map(list.__len__, rows)) - {2}:  # raises for no list
                raise ValueError("too many rows, or one that is not a pair")
            prices, texts = zip(*rows) if rows else ((), ())
            levels.extend(map(self.levels[side], prices))
            sizes.extend(map(self.sizes, texts))
        self.last_u, self.is_loss_told, self.had_book = u, False, True
        if kind == SNAPSHOT:
            self.book.clear()
        self.book.show(levels, sizes, len(data["b"]))
        return Message(kind, recv_ns, exch_ns, (levels, sizes), view=self.book.view)

    def _parse_trades(self, recv_ns: int, line: dict) -> Message | None:
        trades, view = [], self.book.view
        must_be(int, len(line["data"]), 0, MAX_ROWS)
        for trade in line["data"]:
            if trade.get("BT"):  # a block trade is negotiated outside the book
                self.counts["block trades"] += 1
                continue
            exch_ns = exchange_time(trade["T"], recv_ns)
            level = self.levels[HIT_SIDE[trade["S"]]](trade["p"])
            size = must_be(float, self.sizes(trade["v"]), LEAST, MOST)
            trades.append((exch_ns, level, size, trade.get("RPI") is True))
        return Message(TRADES, recv_ns, exch_ns, trades=trades, view=view) if trades else None

    def _parse_ticker(self, recv_ns: int, line: dict) -> Message:
        """Linear deltas carry the changed fields only; spot has no mark price."""
        exchange_time(line["ts"], recv_ns)
        told = (("last_price", "lastPrice"), ("mark_price", "markPrice"))
        texts = {ours: line["data"].get(theirs) for ours, theirs in told}
        prices = {ours: must_be(float, size_of(text), LEAST, MOST)
                  for ours, text in texts.items() if text not in (None, "")}  # fmt: skip
        self.book.view = self.book.view._replace(**prices)
        return Message(TICKER, recv_ns, view=self.book.view)


# ---- Recordings --------------------------------------------------------------------


def printable(words: Any, most: int = 200) -> str:
    """The words of others, cut, without what could break a line or steer a terminal."""
    return "".join(sign if sign.isprintable() else "?" for sign in str(words)[:most])


def control_line(event: str, **fields: Any) -> str:
    """A line of our own, marked so that no message of the exchange is taken for one."""
    return json.dumps({"op": "local", "event": event, **fields}, separators=(",", ":"))


def sound_line(payload: bytes) -> str:
    """The text of a received message, escaped if it could not stand on a line as it is."""
    text = payload.decode("utf-8", "surrogateescape")
    is_sound = text.isprintable() and "\\" not in text and '"local"' not in text
    return text if is_sound else control_line("raw", text=text)


class GrowingFile:
    """A new file of whole lines, of a log or a recording. A failing disk stops it, no more."""

    def __init__(self, path: Path) -> None:
        self.path, self.failure = path, ""
        self.lines: list[tuple[float, str]] = []  # not yet on disk, with the time of coming, s
        self.file = open(path, "xb", buffering=0)  # x: it is never overwritten

    def write(self, text: str | bytes) -> None:
        """Put lines on disk now, all of them or none."""
        data, size = text.encode() if isinstance(text, str) else text, self.file.tell()
        try:
            while data and not self.failure:  # a disk may take a part
                data = data[self.file.write(data) :]
        except OSError as error:
            self.failure = f"{self.path} stopped: {error.strerror or error}"
            with contextlib.suppress(OSError):
                self.file.truncate(size)

    def record(self, recv_ns: int, text: str) -> None:
        """Take one line; it is on disk after FLUSH_S if flush is called now and then."""
        self.lines.append((time.monotonic(), f"{recv_ns} {text}\n"))
        self.flush(FLUSH_S)

    def flush(self, min_age_s: float = 0.0) -> None:
        """Add what waits as a complete gzip member, if the oldest has waited for min_age_s."""
        if self.lines and time.monotonic() - self.lines[0][0] >= min_age_s:
            text = "".join(line for _, line in self.lines).encode()
            self.write(gzip.compress(text, compresslevel=1))
            self.lines.clear()

    def close(self) -> None:
        self.flush()
        self.file.close()


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let write make a file under a temporary name, then give it its own. Links are followed."""
    if (path := path.resolve()).exists():
        check_file(path)
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def check_file(path: Path, most_bytes: float = math.inf) -> None:
    """UserError unless this is a regular file, which has an end, of a sane size."""
    if not path.is_file() or path.stat().st_size > most_bytes:
        raise UserError(f"{path}: {'huge or no regular file' if path.exists() else 'No such file'}")


def read_lines(path: Path, tell: Callable = lambda share: None) -> Iterator[tuple[int, str]]:
    """(recv_ns, text) of each line, up to a cut, with a warning; tell hears which share is read."""
    check_file(path)
    size, number, first_ns, last_ns = path.stat().st_size, 0, 0, 0
    try:
        with open(path, "rb") as raw:
            file = gzip.open(raw) if raw.peek(2).startswith(b"\x1f\x8b") else raw
            while line := file.readline(MAX_LINE):
                tell(raw.tell() / size)
                if not line.endswith(b"\n") and len(line) < MAX_LINE:  # it is the last, cut off
                    raise EOFError
                number += 1
                stamp, _, text = line[:-1].decode("utf-8-sig", "replace").partition(" ")
                recv_ns = int(stamp[:20]) if stamp.isdecimal() and len(line) < MAX_LINE else -1
                first_ns, last_ns = first_ns or recv_ns, max(last_ns, recv_ns)  # it never goes back
                if not 0 <= recv_ns <= NEVER or abs(recv_ns - first_ns) > 366 * DAY_NS:
                    raise UserError(f"{path}, line {number}: endless, or no time near the first's")
                yield last_ns, text
    except (EOFError, zlib.error, gzip.BadGzipFile):
        if number:
            print(f"{path} is cut off after line {number}: read up to there", file=sys.stderr)
    if not number:
        raise UserError(f"{path} holds no message: make a recording with feed.py record")


class Recording:
    """A recording and the parser that fits it: by the flags, its start line, its early topics."""

    def __init__(self, path: Path, flags: Mapping[str, Any] = {}) -> None:
        self.path, self.share_read = path, 0.0  # of the file's bytes, by messages() so far
        self.start, depths = {}, {}  # the start line's fields; depths by symbol
        for _, (_, text) in zip(range(2000), read_lines(path)):  # what does it hold?
            with contextlib.suppress(*MALFORMED):
                line = DECODER.decode(text)
                if line.get("op") == "local" and line["event"] == "start":
                    self.start = self.start or line
                elif line.get("topic", "").startswith("orderbook."):
                    _, levels, name = line["topic"].split(".")
                    depths.setdefault(name, set()).add(int(levels))
        symbol = flags.get("symbol")
        here = symbol if symbol in depths else next(iter(depths), symbol)
        held = depths.get(here, DEPTHS[:1])  # of them the deepest is played
        told = {"symbol": here, "category": flags.get("category"), "depth": max(held)} | self.start
        has = {"symbol": [told["symbol"]], "category": [told["category"]], "depth": held}
        for name, its in has.items():
            if (flag := flags.get(name)) and flag not in its:
                raise UserError(f"{path} has {printable([*its])}, not {flag}: leave out --{name}")
        told |= {name: flag for name, flag in flags.items() if flag is not None}
        self.parser = Parser(find_instrument(told), told["depth"])
        self.is_synthetic = bool(self.start.get("synthetic"))

    def messages(self) -> Iterator[Message]:
        """The messages of the file, as the live feed gave them."""
        lines = read_lines(self.path, partial(setattr, self, "share_read"))
        return filter(None, (self.parser.parse(*line) for line in lines))

    def replay(self, speed: float, duration_s: float) -> Iterator[Message | None]:
        """Messages at a multiple of their own pace (inf: no waiting); None: none is due yet."""
        stop, began_s, first_ns = StopSignal(), time.monotonic(), 0
        for message in self.messages():
            first_ns = first_ns or message.recv_ns
            at_s = (message.recv_ns - first_ns) / NS
            while (wait_s := began_s + at_s / speed - time.monotonic()) > 0 and not stop.is_set:
                yield None
                time.sleep(min(wait_s, LOOK_S))
            if at_s > duration_s or stop.is_set:
                return
            yield message


# ---- Live feed ---------------------------------------------------------------------


class Bounded:
    """A socket that gives no more than `left` bytes, until end_s: at first those of a handshake."""

    def __init__(self, sock: Any) -> None:
        self.sock, self.left, self.end_s = sock, MAX_HANDSHAKE, time.monotonic() + CONNECT_S
        self.ahead = b""  # read, and not yet given

    def recv(self, count: int) -> bytes:
        if self.left <= 0:
            raise ConnectionError("more bytes than a handshake or a message may have")
        if not self.ahead:
            self.sock.settimeout(max(self.end_s - time.monotonic(), 0.001))
            self.ahead = self.sock.recv(1 << 13)
        received, self.ahead = self.ahead[:count], self.ahead[count:]
        self.left -= len(received)
        return received

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)


class BoundedSocket(websocket.WebSocket):
    """A WebSocket whose own socket is bounded."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, Bounded(value) if name == "sock" and value else value)


class LiveFeed:
    """A thread that receives, stamps, records, parses and enqueues. OSError: no connection."""

    def __init__(self, instrument: Instrument, depth: int, url: str | None = None,
                 record: Path | None = None, clock_ns: Callable[[], int] | None = None,
                 **start: Any) -> None:  # fmt: skip  # fields of the session's first line
        self.url = url or f"wss://stream.bybit.com/v5/public/{instrument.category}"
        self.clock_ns, self.offset_ns = clock_ns or self.read_clock, 0  # wall - monotonic time
        self.parser, self.ws, self.reconnects = Parser(instrument, depth), None, -1
        self.queue: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.waiting = 0  # bytes since the main thread had taken all
        self.lock, self.stopping = threading.Lock(), threading.Event()
        self.cut_reason = self.fatal = ""  # why another thread cut it, why the thread has ended
        self.connect()
        self.recorder = GrowingFile(record) if record else None
        self.emit(control_line("start", **instrument.told, depth=depth, **start))
        self.thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self.thread.start()

    def read_clock(self) -> int:
        """ns since the epoch, by the clock that never decreases. A sleep is a loss."""
        wall_ns, now_ns = time.time_ns(), time.monotonic_ns()
        if wall_ns - now_ns - self.offset_ns > NS:
            self.offset_ns = wall_ns - now_ns
            self.cut("the computer slept, or its clock was set")
        return self.offset_ns + now_ns

    def emit(self, text: str) -> Message | None:
        """Take a line of the exchange, or a control line, into the session and its recording."""
        with self.lock:  # stamps, recording and queue have one order
            recv_ns = self.clock_ns()
            if self.recorder:
                self.recorder.record(recv_ns, text)
            if message := self.parser.parse(recv_ns, text):
                self.waiting = 0 if self.queue.empty() else self.waiting + len(text) + 1000
                self.queue.put(message)
            return message

    def cut(self, reason: str) -> None:
        """End this connection; the feed's thread wakes up and makes another."""
        if (ws := self.ws) is not None:
            self.cut_reason = self.cut_reason or reason
            ws.abort()

    def stop(self) -> None:
        """End the thread; the queue then holds all it received."""
        self.stopping.set()
        self.cut("stopping")
        self.thread.join(STOP_S)  # it may be connecting; then it can no longer emit
        if self.ws is not None:
            self.ws.shutdown()

    def connect(self) -> None:
        """Connect and subscribe. OSError, whatever is there in place of the exchange."""
        options = dict(skip_utf8_validation=True, header=USER_AGENT, class_=BoundedSocket)
        try:
            ws = websocket.create_connection(self.url, CONNECT_S, redirect_limit=0, **options)
            ws.sock.left = MAX_MESSAGE
            ws.send(json.dumps({"op": "subscribe", "args": [*self.parser.topics]}))
        except Exception as error:
            raise ConnectionError(printable(f"no exchange at {self.url}: {error}")) from None
        self.last_frame_ns = self.last_book_ns = self.last_ping_ns = self.clock_ns()
        self.cut_reason, self.ws, self.reconnects = "", ws, self.reconnects + 1

    def _run(self) -> None:
        """Receive one message after the other; a connection lost is a book lost."""
        wait_s = BACKOFF_S[0]
        while not self.stopping.is_set():
            try:
                # Between two messages: is the connection worth anything?
                if self.waiting > MAX_WAITING and not self.queue.empty():
                    raise ConnectionError(f"{MAX_WAITING / 1e6:g} MB wait: we cannot keep up")
                if self.ws is None:
                    self.connect()
                    continue
                now_ns = self.clock_ns()
                if now_ns - self.last_frame_ns > WATCHDOG_S * NS:
                    raise ConnectionError(f"nothing received for {WATCHDOG_S:g} s")
                if now_ns - self.last_book_ns > BOOK_WATCHDOG_S * NS:
                    raise ConnectionError(f"no book message for {BOOK_WATCHDOG_S:g} s")
                if now_ns - self.last_ping_ns >= PING_S * NS:
                    self.ws.send('{"op":"ping"}')
                    self.last_ping_ns = now_ns
                # Receive one, and take it into the session. Does it spoil the connection?
                self.ws.sock.end_s = time.monotonic() + RECV_S
                opcode, payload = self.ws.recv_data()
                self.last_frame_ns = self.clock_ns()
                if opcode == websocket.ABNF.OPCODE_CLOSE:
                    raise ConnectionError(f"closed (code {int.from_bytes(payload[:2], 'big')})")
                self.ws.sock.left = MAX_MESSAGE  # of the next message
                message = self.emit(sound_line(payload))
                kind, reason = (message.kind, message.note.get("reason")) if message else (None, "")
                if kind in (DELTA, SNAPSHOT):
                    self.last_book_ns, wait_s = message.recv_ns, BACKOFF_S[0]
                elif kind == LOST:  # only a new connection brings a snapshot; its end is told, too
                    raise ConnectionError(f"resync after: {reason}")
                elif kind == REFUSED and "already subscribed" not in reason:
                    error = ConnectionError if self.parser.had_book else UserError  # had it worked?
                    raise error(f"refused: {reason[:150]}: check --symbol, --category, --depth")
            except websocket.WebSocketTimeoutException:
                continue  # subtle: what has come of a message is kept for the next try
            except (websocket.WebSocketException, OSError) as error:
                # Tell the loss. Wait, longer each time.
                reason = printable(self.cut_reason or str(error) or type(error).__name__)
                if not self.stopping.is_set():
                    self.parser.problem = f"connection: {reason}"
                if self.ws is not None and not self.stopping.is_set():
                    self.emit(control_line("lost", reason=reason))
                    self.ws.shutdown()
                    self.ws = None
                self.stopping.wait(wait_s)
                wait_s = min(2 * wait_s, BACKOFF_S[1])
            except Exception as error:  # a mistake of the user's, or of ours
                self.fatal = str(error) if isinstance(error, UserError) else f"our fault: {error!r}"
                return

    def messages(self, duration_s: float) -> Iterator[Message | None]:
        """Messages as they come; None: none came, look around. At the end of the time, or at
        Ctrl-C, the thread ends first, then what it received is given."""
        stop, end_ns = StopSignal(), self.clock_ns() + duration_s * NS
        while not (stop.is_set or self.fatal) and self.clock_ns() < end_ns:
            try:
                yield self.queue.get(timeout=LOOK_S)
            except queue.Empty:
                with self.lock:
                    if self.recorder:
                        self.recorder.flush(FLUSH_S)
                yield None
        self.stop()
        self.emit(control_line("end"))
        while not self.queue.empty():
            yield self.queue.get()
        if self.fatal:
            raise UserError(self.fatal)


# ---- Command line: record, info ----------------------------------------------------


def run_record(options: argparse.Namespace) -> None:
    """Record the live feed to a file, for --minutes or until Ctrl-C."""
    instrument = find_instrument(vars(options), ask=not options.url)
    source = LiveFeed(instrument, options.depth or DEPTHS[0], options.url, options.file)
    try:
        for _ in source.messages(60 * options.minutes):
            if source.recorder.failure:
                break
    finally:
        source.stop()
        source.recorder.close()
        print(f"{options.file}: {dict(source.parser.counts)}")
    if source.recorder.failure:
        raise UserError(source.recorder.failure)


def run_info(options: argparse.Namespace) -> None:
    """Print what one wants to know of a recording."""
    if options.url or options.minutes < math.inf:
        raise UserError("--url and --minutes are for record: leave them out with info")
    recording = Recording(options.file, vars(options))
    parser, book, depths = recording.parser, recording.parser.book, []

    def watch(message: Message) -> Message:
        is_known = parser.last_u is not None  # from a snapshot to the next loss
        depths.append(book.depth(BID, 1.0) + book.depth(ASK, 1.0) if is_known else math.nan)
        return message

    tape = build_tape(map(watch, recording.messages()))
    if not len(tape.kind):
        raise UserError(f"{options.file} has no message of this market: check --symbol, --depth")
    kind, its = "SYNTHETIC" if recording.is_synthetic else "recorded", parser.instrument
    print(f"{options.file}: {its.symbol} {its.category}, {kind}")
    first_ns, last_ns = tape.recv_ns[[0, -1]].tolist()
    is_known, is_book, has_mid = ~np.isnan(depths), tape.is_book, ~np.isnan(tape.mid_ticks)
    losses = Counter(note["reason"] for m, note in tape.notes.items() if tape.kind[m] == LOST)
    facts = [*parser.counts.items(), ("snapshots", int((tape.kind == SNAPSHOT).sum())),
             ("first message, UTC", clock_text(first_ns)), ("span, s", (last_ns - first_ns) / NS),
             *((f"book lost {times} times", reason) for reason, times in losses.items()),
             ("crossed or one-sided books", int((is_book & ~has_mid).sum()))]  # fmt: skip
    columns = {"receive - exchange time, ms": ((tape.recv_ns - tape.exch_ns) / MS)[is_book],
               "spread, ticks": -(tape.best_bid + tape.best_ask)[is_book & has_mid],
               f"{len(tape.trade_size)} trades, base coin each": tape.trade_size}  # fmt: skip
    form = "median {1:g}, 1 % {0:g}, 99 % {2:g}".format
    facts += [(label, form(*np.percentile(values, [1, 50, 99])))
              for label, values in columns.items() if len(values)]  # fmt: skip
    mid_ticks = np.where(is_known, tape.mid_ticks, math.nan)
    mids = mid_ticks[tape.recv_ns.searchsorted(np.arange(first_ns, last_ns, NS), "right") - 1]
    returns_bps = 1e4 * np.diff(np.log(mids))  # from second to second
    if np.isfinite(returns_bps).any():
        way_bps = max(np.nansum(np.abs(returns_bps)), 1e4 / np.nanmedian(mids))  # a tick or more
        traded = np.abs(tape.trade_level) * tape.trade_size
        traded = traded[np.repeat(is_known, np.diff(tape.first_trade))].sum()
        liquidity, depth = traded / way_bps, np.nanmedian(mid_ticks * depths) / 2
        facts += [(label, f"{flag} {1e-6 * its.tick_size * value:.3g}") for label, flag, value in (
            ("liquidity, M USDT per bp", "--liquidity-scale-musd", liquidity),
            ("median depth within 1 bp, M USDT", "--depth-scale-musd", depth)) if value > 0]
    print(*(f"  {label:<37}{value}" for label, value in facts), sep="\n")


def clock_text(time_ns: int) -> str:
    """A time as date and time of day, UTC."""
    return time.strftime("%F %T", time.gmtime(time_ns / NS))


def add_market_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that every command on a market shares; None where one is not given."""
    parser.add_argument("--symbol", type=str.upper, help="(the recording's, else BTCUSDT)")
    parser.add_argument("--category", choices=("linear", "spot"), help="(as above, linear)")
    parser.add_argument("--depth", type=int, choices=DEPTHS, help="levels a side (as above, 200)")
    parser.add_argument("--tick-size", help="price step, USDT (as above, Bybit's or built in)")
    parser.add_argument("--lot-size", help="quantity step, base coin (as above)")


def positive(text: str) -> float:
    """A number above 0, or max for one without end."""
    return math.inf if text == "max" else must_be(float, float(text), LEAST, math.inf)


class Arguments(argparse.ArgumentParser):
    """Errors in one line, without the usage of every flag."""

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message}: {self.prog} --help lists what there is\n")


class StopSignal:
    """Whether Ctrl-C came (or SIGTERM: exit_cleanly). Another one ends the program where it is."""

    came = is_set = False  # to any of them, for exit_cleanly; to this one

    def __init__(self) -> None:
        signal.signal(signal.SIGINT, self._note)

    def _note(self, *_: Any) -> None:
        self.is_set = StopSignal.came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_cleanly(run: Callable[[], None]) -> int:
    """Run a command: 0, 130 after Ctrl-C, 2 and one line on stderr for what the user can mend."""
    StopSignal.came = False
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # as Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's & ignores it
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # there may be none
            stream.reconfigure(errors="replace")
    try:
        with contextlib.ExitStack() as end:
            end.callback(print, end="", flush=True)  # what stdout does not take is an error now
            run()
    except KeyboardInterrupt:
        StopSignal.came = True
        print("stopped", file=sys.stderr)
    except BrokenPipeError:  # | head
        sys.stdout = None
    except (UserError, OSError) as error:
        if file := getattr(error, "filename", None):
            error = f"{file}: {error.strerror}: check the path"
        elif isinstance(error, OSError):  # of stdout: Python would try it again
            sys.stdout = None
        print(f"error: {printable(error, 2000)}", file=sys.stderr)
        return 2
    return 130 if StopSignal.came else 0


def main(arguments: list[str] | None = None) -> int:
    """python feed.py record|info; the exit status."""
    parser = Arguments(prog="feed.py", description="Record Bybit, or inspect a recording.")
    parser.add_argument("command", choices=("record", "info"))
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--minutes", type=positive, default=math.inf, help="to record (no end)")
    add_market_flags(parser)
    parser.add_argument("--url", help="another WebSocket address than Bybit's")

    def run() -> None:
        options = parser.parse_args(arguments)
        (run_record if options.command == "record" else run_info)(options)

    return exit_cleanly(run)


if __name__ == "__main__":
    sys.exit(main())
