"""From market to quote: state, decision, paper fills, display. No order is ever sent.

Live, in a replay and in a backtest the loop is the same (`follow`): hear messages until something
is due; decide; go on. Messages come as columns (a tape), in slices that end at a decision. Where
a slice ends changes nothing.

A decision is made at the first message that is due, with that message applied; its time is
the message's recv_ns. The next is due one optimization interval later, or as soon as the mid is
requote_move_bps away from where it was. Due at once are a loss, the snapshot that ends it, new
parameters, a guard that trips or clears (they are judged at every whole second), and a book gone
silent: that one at the instant at which it is so for too long. A fill is not; the next decision
sees it. No decision reads a clock.

How paper orders fill, with the direction of each rule's bias. (tests/test_marketmaker.py
has the same rules in their plainest form, message by message: `simulate`.)

  - An order decided at t (our clock) stands on the exchange from t + order_latency until its
    cancel arrives, as late. Only events of that time (exchange clock) can fill it, whenever we
    hear of them. At its arrival post-only and the inventory limit are judged again, on the last
    book pushed. Realistic, but for the 20 ms or so since that push.
  - `queue`: behind the displayed size at arrival. Trades at our price eat it; a smaller
    displayed size shortens it; what is left of a trade fills us. Cancels are taken to be
    behind us, and a trade no later than the book's last push to be in the size shown: pessimistic.
  - A trade through our price, or the opposite best reaching it, fills the whole order.
    Optimistic in size: the trade may have been smaller than our order.
  - `touch`: any trade at our price fills the whole order: optimistic. `through`: only a
    trade through it, or the opposite best: pessimistic. Retail (RPI) trades, whose orders
    the book does not show, count as `through` in every model.
  - What our quotes meet after a connection is lost, until the cancels arrive, is never heard and
    fills nothing. Optimistic; the summary says for how long in all.
  - We take no volume from others and move no price: optimistic. impact_bps is a rough stand-in:
    each fill's price is that much worse, times the order's share of the depth near the mid.
  - Funding is not modelled.

Units: prices USDT at the edges, integer ticks inside; sizes and inventory base coin;
spreads and volatility bps of the mid; time int ns. Fees are positive when we pay.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import queue
import re
import runpy
import shutil
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import feed
import optimize as opt
from feed import ASK, BID, MS, NEVER, NO_LEVEL, NS, SIDES, Tape, UserError, clock_text
from optimize import INF, Distances, Parameters

NAN = math.nan  # not known, or none
MINUTE_NS = 60 * NS
DECIMALS = 12  # of quantities: no lot is finer
DEFAULTS = asdict(Parameters())
WINDOW_S = 60  # of the volatility and the liquidity
WARMUP_RETURNS = 10  # of 1 s before the first quote
LOOK_AHEAD = 512  # messages, for the next one that is due
LATE_NS = 10 * NS  # no trade is heard of later than this
SAMPLE, SAMPLE_SPEED = Path(__file__).parent / "data" / "sample.jsonl.gz", 10.0
MAX_LAG_NS = 2 * NS  # of receive after exchange time; more is warned of
BURST = 20_000  # rows and trades of a replay that are taken at once, if none is early
MAX_PARAMS = 1 << 20  # bytes of --params
GATHER_S = 0.001  # after a message, so that a burst makes one tape and few changes of thread
TICK_S = 0.1  # how long the main thread waits for a message before it looks around


# ---- What is known of the market ---------------------------------------------------


@dataclass
class Market:
    """What is measured from the market, on our clock. nan = not known yet."""

    book: feed.Book = field(default_factory=feed.Book)
    lost: str = "no book yet"  # why the book cannot be trusted; empty: it can
    book_recv_ns: int = 0  # when the last book message was received
    lag_ns: int = 0  # of it, receive after exchange time
    usual_lag_ns: int = 0  # of the last snapshot
    ticker_recv_ns: int = 0  # when the last ticker was received
    volatility: float = NAN  # bps/sqrt(s), over the last minute
    ema_volatility: float = NAN  # bps/sqrt(s)
    ema_ns: int = 0  # when that was last renewed
    liquidity: float = NAN  # million USDT traded per bp of mid movement
    mid_price: float = NAN  # USDT, at the last decision, as are the depths
    depths: dict[int, float] = field(default_factory=lambda: {BID: NAN, ASK: NAN})  # base coin
    grid_mid: float = NAN  # USDT, at the last whole second; nan after a hole: no return spans it
    returns_bps: deque = field(default_factory=partial(deque, maxlen=WINDOW_S))  # of 1 s
    turnovers: deque = field(default_factory=partial(deque, maxlen=WINDOW_S))  # M USDT a s
    trades: deque = field(default_factory=deque)  # (exch_ns, level hit, size) of the last minute

    @property
    def depth_musd(self) -> float:
        """Mean of the depths near the mid, million USDT."""
        return sum(self.depths.values()) / 2 * self.mid_price * 1e-6

    def recent_trades(self, tick_size: float) -> list[tuple[int, int, float, float]]:
        """(exchange time, taker's side, USDT, base coin) of the last minute, as received."""
        newest_ns = max((time_ns for time_ns, _, _ in self.trades), default=0)
        return [(time_ns, ASK if level > 0 else BID, abs(level) * tick_size, size)
                for time_ns, level, size in self.trades if time_ns > newest_ns - MINUTE_NS]

    def measure_second(self, second_ns: int, mid_price: float, turnover_musd: float,
                       tick_size: float, half_life_s: float) -> None:  # fmt: skip
        """One whole second of receive time has passed; the volatility is the root mean square
        of the returns, the liquidity the turnover over the sum of their absolute values.
        """
        previous, self.grid_mid = self.grid_mid, mid_price
        if math.isnan(previous) or math.isnan(mid_price):
            return
        self.returns_bps.append(1e4 * math.log(mid_price / previous))
        self.turnovers.append(turnover_musd)
        if len(self.returns_bps) < WARMUP_RETURNS:
            return
        self.volatility = math.hypot(*self.returns_bps) / math.sqrt(len(self.returns_bps))
        before = self.ema_volatility if self.ema_volatility >= 0 else self.volatility
        # The EMA, after an uneven step: the old value weighs 2^(-step / half-life).
        kept = 2 ** (-(second_ns - self.ema_ns) / NS / half_life_s)
        self.ema_volatility = self.volatility + (before - self.volatility) * kept
        self.ema_ns = second_ns
        moved_bps = max(sum(map(abs, self.returns_bps)), 1e4 * tick_size / mid_price)  # a tick
        self.liquidity = sum(self.turnovers) / moved_bps


# ---- Our account -------------------------------------------------------------------


# Why an order fills: a trade ate the queue ahead; a trade went through our price; the other
# side's best reached it without one; any trade at our price (model `touch`); we took.
RULES = ("queue", "through", "book", "touch", "taker")


class Fill(NamedTuple):
    """One fill of a paper order."""

    time_ns: int  # exchange time
    recv_ns: int  # when we came to know
    side: int  # +1 we bought, -1 we sold
    price: float  # USDT
    qty: float  # base coin
    fee: float  # USDT, positive = paid
    mid_price: float  # USDT, as known just before the message that told of the fill
    queue_ahead: float = 0.0  # base coin, just before what filled us
    queue_at_arrival: float = 0.0  # base coin
    arrival_ns: int = 0  # when the order reached the exchange, exchange time
    rule: str = "queue"  # which rule filled it: see RULES


@dataclass
class Account:
    """Our simulated account. It starts with nothing, so its equity is the net result."""

    inventory: float = 0.0  # base coin
    cash: float = 0.0  # USDT, like all that follows
    fees_paid: float = 0.0
    spread_captured: float = 0.0  # sum of side (mid - price) qty
    revaluation: float = 0.0  # sum of inventory x change of the mid
    turnover: float = 0.0
    mid_price: float = NAN  # the last mid that it was marked to
    peak_equity: float = 0.0  # the highest that was ever marked
    fills: list[Fill] = field(default_factory=list)
    path: array = field(default_factory=partial(array, "d"))  # see `note`

    @property
    def equity(self) -> float:
        """cash + inventory x mid."""
        return self.cash + (self.inventory * self.mid_price if self.inventory else 0.0)

    @property
    def gross(self) -> float:
        """Result before fees."""
        return self.equity + self.fees_paid

    @property
    def residual(self) -> float:
        """net - (spread captured + revaluation - fees): nothing but rounding."""
        return self.equity - (self.spread_captured + self.revaluation - self.fees_paid)

    def mark(self, mid_price: float) -> None:
        """A new mid: the inventory changes its worth. nan changes nothing."""
        if mid_price == mid_price:
            if self.inventory:
                self.revaluation += self.inventory * (mid_price - self.mid_price)
            self.mid_price = mid_price
            self.peak_equity = max(self.peak_equity, self.equity)

    def settle(self, fill: Fill) -> None:
        """Book one fill. Bought 1 at 99 around a mid of 100: cash -99, spread captured 1."""
        self.cash -= fill.side * fill.qty * fill.price + fill.fee
        self.inventory = round(self.inventory + fill.side * fill.qty, DECIMALS)
        self.fees_paid += fill.fee
        self.spread_captured += fill.side * (fill.mid_price - fill.price) * fill.qty
        self.turnover += fill.qty * fill.price
        self.fills.append(fill)
        self.note(fill.recv_ns)

    def note(self, time_ns: int) -> None:
        """A point of the pictures: every whole second, every fill and the end."""
        self.path.extend((time_ns, self.inventory, self.spread_captured, self.revaluation,
                          self.fees_paid, self.equity))  # fmt: skip


# ---- What is decided ---------------------------------------------------------------


class Decision(NamedTuple):
    """What was known and wanted, for log, plots and screen. nan = none, or not known."""

    time_ns: int = 0  # receive time
    mid_price: float = NAN  # USDT; nan while the book cannot be trusted, like the next two
    best_bid: float = NAN
    best_ask: float = NAN
    bid_price: float = NAN  # our quote, USDT
    bid_qty: float = 0.0  # base coin
    ask_price: float = NAN
    ask_qty: float = 0.0
    base_spread_bps: float = NAN
    volatility: float = NAN  # bps/sqrt(s)
    ema_volatility: float = NAN
    bid_depth: float = NAN  # base coin
    ask_depth: float = NAN
    liquidity: float = NAN  # million USDT per bp
    inventory: float = 0.0  # base coin
    cash: float = 0.0  # USDT
    equity: float = 0.0
    fees_paid: float = 0.0
    volatility_bps: float = NAN  # the base spread's terms
    liquidity_bps: float = NAN
    depth_bps: float = NAN
    bid_queue: float = NAN  # base coin ahead of our bid, as it stands on the exchange
    ask_queue: float = NAN
    source: str = "none"  # the strategy, last_good, default or none
    reason: str = "no message yet"  # why not the strategy's own, or why a side is missing
    is_sent: bool = False  # whether it sent or cancelled a quote
    distances: Distances | None = None


LOGGED = Decision._fields[: Decision._fields.index("fees_paid")] + ("source", "reason")
NUMBERS = Decision._fields[1 : Decision._fields.index("source")]


def plain(value: float) -> str:
    """A number in 9 significant digits, never with an exponent; empty for nan."""
    text = "" if value != value else f"{value:.9g}"
    return np.format_float_positional(float(text), trim="-") if "e" in text else text


def coins(qty: float) -> str:
    """A quantity with every digit that a lot may have, never with an exponent: 0.00000001."""
    return np.format_float_positional(round(qty, DECIMALS), trim="-")


def log_row(decision: Decision, digits: int) -> str:
    """A line of the log; empty where nothing is known. digits: decimals of a price."""
    prices = dict.fromkeys(("best_bid", "best_ask", "bid_price", "ask_price"), digits)
    decimals = prices | {"mid_price": digits + 1, "cash": 8, "equity": 8}
    cells = [str(decision.time_ns)]
    for name in LOGGED[1:-2]:
        value = getattr(decision, name)
        is_missing = value != value or (name.endswith("_qty") and not value)
        form = coins if name in ("bid_qty", "ask_qty", "inventory") else plain
        text = f"{value:.{decimals[name]}f}" if name in decimals else form(value)
        cells.append("" if is_missing else text)
    reason = decision.reason.replace(",", ";").replace("\n", " ")
    return ",".join([*cells, decision.source, reason]) + "\n"


class History:
    """The numbers of all decisions, for metrics and pictures."""

    def __init__(self) -> None:
        self.times, self.rows = array("q"), array("d")

    def add(self, decision: Decision) -> None:
        self.times.append(decision.time_ns)
        self.rows.extend(decision[1 : 1 + len(NUMBERS)])

    def columns(self) -> dict[str, np.ndarray]:
        """Each number by its name, and time_ns: (decisions,)."""
        table = np.array(self.rows).reshape(-1, len(NUMBERS))
        return {"time_ns": np.array(self.times), **dict(zip(NUMBERS, table.T))}


# ---- Paper exchange ----------------------------------------------------------------


def first_place(holds: np.ndarray, start: int, stop: int) -> int:
    """start + the first place where it holds; stop where it never does."""
    return start + int(holds.argmax()) if holds.any() else stop


def floor_to_lot(qty: float, lot_size: float) -> float:
    """The largest multiple of the lot that is not above qty: 0.012 for 0.0129 and 0.001."""
    return round(math.floor(qty / lot_size + 1e-9) * lot_size, DECIMALS)


@dataclass(slots=True, eq=False)
class Order:
    """A paper order. It stands on the exchange in (arrival_ns, cancel_ns]. Its queue is the size
    shown at its price at its arrival, and from then on only gets shorter.
    """

    side: int
    level: int  # side x price tick: a higher level is a better price on both sides
    qty: float  # base coin, as sent
    left: float  # of it, not yet filled
    arrival_ns: int  # exchange time
    cancel_ns: int = NEVER
    is_taker: bool = False  # it takes whatever price there is, level by level
    has_arrived: bool = False
    queue_ahead: float = INF  # base coin; inf where nothing can be seen
    queue_at_arrival: float = INF
    eaten: float = 0.0  # of the queue, by trades
    due: float = 0.0  # base coin, our share of what trades left, below a lot so far


@dataclass(eq=False)
class PaperExchange:
    """Matches the market's messages, on the exchange's clock, against our orders, cancelled ones
    included: a trade can be heard of after its order was replaced. By peer_rules, those of
    hftbacktest, an order fills whole or not at all, and a level out of the window is empty.
    """

    parameters: Parameters
    instrument: feed.Instrument
    market: Market
    account: Account
    participation: float = 1.0  # our share of what is left of a trade
    peer_rules: bool = False
    impact_bps: float = 0.0  # of an order as large as the depth near the mid
    back_ns: int = 0  # our clock; above 0: cut off until then, we and the exchange hear of nothing
    orders: list[Order] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    reach: dict = field(default_factory=dict)  # of the tape, by side: see `begin`
    trade_ns: int = 0  # exchange time of the last trade that was met
    recv_ns: int = 0  # of the message that is matched
    mid_price: float = NAN  # just before that message

    def __post_init__(self) -> None:
        self.book, p = self.market.book, self.parameters
        self.offset_ns = round(p.clock_offset_ms * MS)  # our clock - exchange's
        self.latency_ns = round(p.order_latency_ms * MS) - self.offset_ns

    def send(self, side: int, level: int | None, qty: float, time_ns: int) -> bool:
        """Ask for one order at a level, or for none, and say whether that changes anything. An
        unchanged order keeps its place, with what is left of it; else cancel and new order
        arrive at one instant.
        """
        standing = next((o for o in self.orders if o.side == side and o.cancel_ns == NEVER), None)
        wanted = None if level is None else (level, qty)
        if time_ns < self.back_ns or wanted == (standing and (standing.level, standing.qty)):
            return False
        arrival_ns = time_ns + self.latency_ns
        if standing:
            standing.cancel_ns = arrival_ns
        if wanted:
            self.orders.append(Order(side, level, qty, left=qty, arrival_ns=arrival_ns))
            self.counts["sent"] += 1
        return True

    def flatten(self, time_ns: int) -> None:
        """Send a taker order that closes the inventory, unless one is under way."""
        is_under_way = any(order.is_taker for order in self.orders)
        if self.account.inventory and time_ns >= self.back_ns and not is_under_way:
            arrival_ns = time_ns + self.latency_ns
            # Its side and size are known on arrival: see `_walk_the_book`.
            self.orders.append(Order(0, 0, 0.0, 0.0, arrival_ns, is_taker=True))

    def refuse(self, order: Order, why: str) -> None:
        """The exchange does not take the order, or, by a late row, should not have."""
        self.counts[f"refused: {why}"] += 1
        self.orders.remove(order)

    # -- slices of messages

    def begin(self, tape: Tape) -> None:
        """A tape is to come. reach[side][m]: an order of this side at that level or a better
        one (a higher level) is touched by message m, by its trades or the opposite best.
        """
        is_event, has_trades = tape.exch_ns > 0, np.diff(tape.first_trade) > 0
        for side in SIDES:
            reach = self.reach[side] = np.where(is_event, -tape.best(-side), -NO_LEVEL)
            hit = np.where(tape.trade_level * side > 0, tape.trade_level, -NO_LEVEL)
            nearest = np.minimum.reduceat(hit, tape.first_trade[:-1][has_trades])
            reach[has_trades] = np.minimum(reach[has_trades], nearest)

    def match(self, tape: Tape, start: int, stop: int) -> None:
        """Messages start..stop-1: those that matter meet our orders, all change the book."""
        while start < stop:
            # The next that matters: a snapshot, or one after the arrival of an order.
            m = start if tape.kind[start] == feed.SNAPSHOT else stop
            for arrival_ns in {order.arrival_ns for order in self.orders if not order.has_arrived}:
                m = first_place(tape.exch_ns[start:m] > arrival_ns, start, m)
            for order in [order for order in self.orders if order.has_arrived]:
                # Or one that reaches an order; or, unless its queue can change no more, that has
                # a row at its price, or opens the window as far as that.
                side, level = order.side, order.level
                m = first_place(self.reach[side][start:m] <= level, start, m)
                if not order.queue_ahead and self.book.exch_ns > order.arrival_ns:
                    continue
                first, last = tape.first_row.item(start), tape.first_row.item(m)
                row = first_place(tape.level[first:last] == level, first, last)
                m = int(tape.first_row.searchsorted(row, "right")) - 1 if row < last else m
                if level < self.book.view.worst(side):
                    worst = tape.worst_bid if side == BID else tape.worst_ask
                    m = first_place(worst[start:m] <= level, start, m)
            self.book.apply(tape, start, m)
            if m < stop:
                self._meet(tape, m)
            start = m + 1

    def _shown(self, order: Order) -> float:
        """The size displayed at our price; inf where nothing can be seen."""
        if self.peer_rules:
            return self.book.sizes.item(order.level)
        return self.book.shown(order.side, order.level)

    def _is_reached(self, order: Order) -> bool:
        """Whether the opposite side's best is at or beyond our price."""
        return -self.book.view.best(-order.side) <= order.level

    # -- one message and our orders

    def _meet(self, tape: Tape, m: int) -> None:
        """Trades meet the book as it stood just before message m, book rows just after."""
        kind, exch_ns = tape.kind.item(m), tape.exch_ns.item(m)
        self.recv_ns = tape.recv_ns.item(m)
        self.mid_price = self.book.view.mid_ticks * self.instrument.tick_size

        # A cancelled order is kept as long as a trade or a row of before its end may still
        # come: until both streams have gone past it, at most LATE_NS.
        late_ns = self.recv_ns - self.offset_ns - LATE_NS
        passed_ns = max(min(self.trade_ns, self.book.exch_ns), late_ns)
        self.orders = [order for order in self.orders if order.cancel_ns >= passed_ns]

        # Who has arrived meets the book as it stands. He is refused where he would take.
        limit = self.parameters.max_inventory + self.instrument.lot_size / 2
        for order in [o for o in self.orders if not o.has_arrived and o.arrival_ns < exch_ns]:
            order.has_arrived = True
            if order.is_taker:
                self._walk_the_book(order)
            elif self._is_reached(order):
                self.refuse(order, "would take")
            elif order.side * self.account.inventory + order.qty > limit:
                self.refuse(order, "inventory limit")
            else:
                order.queue_ahead = order.queue_at_arrival = self._shown(order)

        # A message of trades: each meets the orders as those before it left them.
        if kind == feed.TRADES:
            for t in range(tape.first_trade.item(m), tape.first_trade.item(m + 1)):
                if tape.trade_ns.item(t) >= late_ns:
                    self._meet_trade(tape, t)
            self.trade_ns = exch_ns
            return

        # A message of the book: a smaller size shortens our queue; does it reach our price?
        if kind == feed.SNAPSHOT:
            self.book.clear()
        self.book.apply(tape, m, m + 1)
        for order in [o for o in self.orders if o.has_arrived]:
            shown, is_late = self._shown(order), exch_ns <= order.arrival_ns
            if is_late and shown < INF:
                # subtle: heard after the arrival, but of before it. It tells better what stood
                # there when we came, so the queue starts anew from it.
                order.queue_ahead = max(shown - order.eaten, 0.0)
            elif exch_ns <= order.cancel_ns:
                order.queue_ahead = min(order.queue_ahead, shown)
            if self._is_reached(order) and is_late:
                self.refuse(order, "would take")
            elif self._is_reached(order) and exch_ns <= order.cancel_ns:
                self._fill(order, order.left, exch_ns, "book")

    def _meet_trade(self, tape: Tape, t: int) -> None:
        """A trade through our price fills us; at our price, the fill model says how much."""
        exch_ns, level = tape.trade_ns.item(t), tape.trade_level.item(t)
        size = tape.trade_size.item(t)
        model = "through" if tape.trade_is_rpi[t] else self.parameters.fill_model
        for order in self.orders:
            is_hit = order.side * level > 0 and level <= order.level
            stands = order.has_arrived and order.arrival_ns < exch_ns <= order.cancel_ns
            if not (is_hit and stands):
                continue
            if level < order.level or model == "touch":
                rule = "through" if level < order.level else "touch"
                self._fill(order, order.left, exch_ns, rule)
            elif model == "queue" and (self.peer_rules or exch_ns > self.book.exch_ns):
                # subtle: only a trade that the size shown does not know of yet. It meets the
                # queue ahead first, then us.
                if self.book.exch_ns <= order.cancel_ns:
                    order.queue_ahead = min(order.queue_ahead, self._shown(order))
                rest, lot = size - order.queue_ahead, self.instrument.lot_size
                order.eaten += size
                if rest >= lot / 2:
                    order.due += rest * self.participation
                    share = floor_to_lot(order.due, lot)
                    order.due -= share
                    qty = order.left if self.peer_rules else min(order.left, share)
                    self._fill(order, qty, exch_ns, "queue")
                order.queue_ahead = max(-rest, 0.0)
            return  # one order stands at a time, and a volume fills us once

    def _walk_the_book(self, order: Order) -> None:
        """The taker order closes the inventory, level by level, as far as the book goes."""
        order.side = ASK if self.account.inventory > 0 else BID
        order.left = abs(self.account.inventory)
        order.queue_ahead = order.queue_at_arrival = 0.0
        for level, size in zip(*map(np.ndarray.tolist, self.book.levels(-order.side))):
            order.level = -level
            if order.left >= self.instrument.lot_size / 2:
                self._fill(order, min(order.left, size), order.arrival_ns, "taker")
        if order in self.orders:
            self.orders.remove(order)

    def _fill(self, order: Order, qty: float, exch_ns: int, rule: str) -> None:
        """A fill at the order's price, booked at the mid just before the message."""
        if qty <= 0:
            return
        account, p, side = self.account, self.parameters, order.side
        price = side * order.level * self.instrument.tick_size
        if self.impact_bps and (depth := self.market.depths[side]) > 0:
            price *= 1 + side * self.impact_bps * 1e-4 * order.qty / depth
        fee = price * qty * (p.taker_fee_bps if rule == "taker" else p.maker_fee_bps) * 1e-4
        account.mark(self.mid_price)
        account.settle(Fill(
            exch_ns, max(self.recv_ns, self.back_ns), side, price, qty, fee, account.mid_price,
            order.queue_ahead, order.queue_at_arrival, order.arrival_ns, rule,
        ))  # fmt: skip
        order.left = round(order.left - qty, DECIMALS)
        if order.left <= 0:
            self.orders.remove(order)


# ---- The market maker ---------------------------------------------------------------


class MarketMaker:
    """Messages in, decisions out. Holds market, account, exchange and log."""

    def __init__(self, parameters: Parameters, instrument: feed.Instrument, log: Any = None,
                 overrides: Mapping[str, Any] | None = None, strategy: str | Callable = "lp",
                 **frictions: Any) -> None:  # fmt: skip
        self.parameters, self.instrument, self.log = parameters, instrument, log
        self.overrides = dict(overrides or {})  # the user's parameters, before a recording's
        self.recorded = {n: v for n, v in asdict(parameters).items() if n not in self.overrides}
        self.strategy, self.strategy_name = load_strategy(strategy)
        self.market, self.account = Market(), Account()
        exchange = parameters, instrument, self.market, self.account
        self.exchange = PaperExchange(*exchange, **frictions)
        self.decision, self.history = Decision(), History()
        self.on_decision: Callable[[MarketMaker], None] = lambda maker: None
        self.last_good: tuple[int, Distances | None] = (-NEVER, None)  # when, what
        self.last_guard = "book lost"
        self.is_stale = False  # the book is silent
        self.is_stopped = False  # by max_drawdown_usdt, for good
        self.due_ns = 0  # the next decision
        self.mid_ticks = NAN  # at the last one; the mid a requote_move away makes the next
        self.second_ns = 0  # the next whole second of receive time
        self.heard = 0  # the first message of the tape not yet heard
        self.seconds, self.mids = array("q"), array("d")  # whole seconds, and the mid at each, USDT
        self.traded: list[float] = []  # turnovers heard of in this second, ticks x base coin
        self.first_ns = self.last_ns = self.messages = 0
        self.unheard_ns = 0  # for how long quotes stood while the connection was lost
        self.sources: Counter[str] = Counter()  # of decisions
        self.reasons: Counter[str] = Counter()
        if log is not None:
            log.write(",".join(LOGGED) + "\n")

    def take(self, *messages: feed.Message) -> None:
        """Messages as they come."""
        if messages:
            self.follow(feed.build_tape(messages))

    def follow(self, tape: Tape) -> None:
        """Hear messages until something is due; decide; go on."""
        self.heard = 0
        self.messages += len(tape)
        self.exchange.begin(tape)
        # Snapshots, losses and control lines change the rules; the end of the tape ends all.
        changes = np.append((tape.kind > feed.TICKER).nonzero()[0], len(tape))
        m = 0
        while m < len(tape):
            # What is due next: a decision, a whole second, or the end of our patience with a
            # silent book. Which message is as late as that, or changes the rules, or is of
            # the book and ends a silence?
            due_ns = min(self.due_ns, self.second_ns, self.silent_ns() + 1)
            stop = min(changes.item(changes.searchsorted(m)), m + LOOK_AHEAD)
            if self.is_stale:
                stop = first_place(tape.kind[m:stop] == feed.DELTA, m, stop)
            stop = m + int(tape.recv_ns[m:stop].searchsorted(due_ns))
            band_ticks = self.mid_ticks * self.parameters.requote_move_bps * 1e-4
            has_moved = np.abs(tape.mid_ticks[m:stop] - self.mid_ticks) >= band_ticks
            m = first_place(has_moved, m, stop)
            is_move = m < stop
            self._hear(tape, m)
            if m == len(tape):
                break
            kind, now_ns = tape.kind.item(m), tape.recv_ns.item(m)
            if now_ns >= due_ns or kind > feed.TICKER:
                self.pass_time(now_ns)

            # It changes the rules, or it decides, itself included; or only time has passed,
            # and it is looked at again with a later due_ns.
            ends_silence = self.is_stale and kind == feed.DELTA
            if kind > feed.TICKER:
                self._change_rules(tape, m, now_ns)
                m += 1
            elif ends_silence or is_move or now_ns >= self.due_ns:
                self._hear(tape, m + 1)
                self.decide(now_ns)
                m += 1
        self.last_ns = max(self.last_ns, tape.recv_ns.item(-1))

    def _hear(self, tape: Tape, stop: int) -> None:
        """Messages before `stop` have come: our orders meet them, and the book shows them."""
        market, start, trades = self.market, self.heard, self.market.trades
        first, last = tape.first_trade.item(start), tape.first_trade.item(stop)
        columns = tape.trade_ns, tape.trade_level, tape.trade_size
        heard = [*zip(*(column[first:last].tolist() for column in columns))]
        self.traded += [abs(level) * size for _, level, size in heard]
        trades.extend(heard)
        while heard and trades[0][0] < heard[-1][0] - MINUTE_NS - LATE_NS:
            trades.popleft()
        self.exchange.match(tape, start, stop)
        self.heard = stop
        book = tape.last_book.item(stop - 1) if stop else -1
        if book >= 0:
            market.book_recv_ns = tape.recv_ns.item(book)
            market.lag_ns = market.book_recv_ns - tape.exch_ns.item(book)
        for ticker in (tape.kind[start:stop] == feed.TICKER).nonzero()[0][-1:].tolist():
            market.ticker_recv_ns = tape.recv_ns.item(start + ticker)

    def _change_rules(self, tape: Tape, m: int, now_ns: int) -> None:
        """A snapshot, a loss, or a control line: never part of a slice."""
        self._hear(tape, m + 1)
        market, note, is_due = self.market, tape.notes.get(m, {}), True
        if tape.kind[m] == feed.SNAPSHOT:  # from here on the book can be trusted
            is_due = market.lost or self.is_stale or now_ns >= self.due_ns
            market.lost, market.usual_lag_ns = "", market.lag_ns
        elif tape.kind[m] == feed.LOST and not market.lost:
            market.lost = note["reason"]
            market.grid_mid = NAN
            # Until the cancels arrive the quotes stand, and what they meet is never heard.
            end_ns = min(max((o.cancel_ns for o in self.exchange.orders), default=0),
                         now_ns + self.exchange.latency_ns)  # fmt: skip
            self.unheard_ns += max(end_ns - market.book.exch_ns, 0)
            # At what price a taker order would trade, nobody can say: it is sent again later.
            self.exchange.orders = [o for o in self.exchange.orders if not o.is_taker]
        elif note.get("event") == "params":
            is_due = self._change_parameters(note)
        elif note.get("event") == "outage":  # of a backtest: from here on we hear nothing
            market.grid_mid = NAN
            self.exchange.back_ns = note["back_ns"]
        elif note.get("event") == "back":
            self.exchange.back_ns = 0
        else:
            return
        if is_due:
            self.decide(now_ns)

    def _change_parameters(self, note: Mapping[str, Any]) -> bool:
        """Parameters of a control line, unless they are unsound; whether they are in force."""
        try:
            recorded, overrides, p = self.merge(note)
        except (ValueError, TypeError) as error:
            logging.warning("parameters in the recording are refused: %s", error)
            return False
        self.recorded, self.overrides = recorded, overrides
        if p.min_half_spread_bps > self.parameters.min_half_spread_bps:
            self.last_good = (-NEVER, None)  # it may be nearer than the edge of now
        self.parameters = self.exchange.parameters = p  # latency and clock stay as they are
        return True

    def merge(self, note: Mapping[str, Any]) -> tuple[dict, dict, Parameters]:
        """What a control line makes of ours; ValueError or TypeError if that is unsound. Those
        under "overrides" are the user's, and replace all that he gave before.
        """
        recorded = {**self.recorded, **note.get("parameters", {})}
        overrides = {**note.get("overrides", self.overrides)}
        changes, min_order = DEFAULTS | recorded | overrides, self.instrument.min_order
        p = opt.change_parameters(self.parameters, changes, min_order, running=True)
        return recorded, overrides, self.check_value(p)

    def check_value(self, p: Parameters) -> Parameters:
        """The same; UserError if the exchange would refuse order_qty at the mid as too small."""
        least, value = self.instrument.min_notional, p.order_qty * self.account.mid_price
        if value < least:  # nan: nothing is known yet
            worth = f"order_qty = {coins(p.order_qty)} is worth {value:.2f} USDT"
            raise UserError(f"{worth}, it must be at least {least:g}: raise --order-qty")
        return p

    def stale_ns(self) -> int:
        """From when on the book is stale, if no message of it comes before."""
        return self.market.book_recv_ns + round(self.parameters.stale_after_s * NS)

    def silent_ns(self) -> int:
        """When the book will fall silent; NEVER while nothing is measured."""
        is_measured = not (self.market.lost or self.is_stale or self.exchange.back_ns)
        return self.stale_ns() if is_measured else NEVER

    def pass_time(self, now_ns: int) -> None:
        """What time alone brings up to now_ns: whole seconds, and a book gone silent."""
        if not self.second_ns:
            self.first_ns, self.second_ns = now_ns, (now_ns // NS + 1) * NS
        self.last_ns = now_ns
        while (silent_ns := self.silent_ns()) < NEVER:
            if self.second_ns <= min(now_ns, silent_ns):
                self._pass_second(self.second_ns)
                self.second_ns += NS
            elif silent_ns < now_ns:
                self.decide(silent_ns)
            else:
                return
        self.second_ns = (now_ns // NS + 1) * NS  # nothing is measured now
        self.traded.clear()

    def _pass_second(self, second_ns: int) -> None:
        """The mid after the last message before this second is a point of the grid."""
        view = self.market.book.view
        self._mark()
        tick_size, mid_price = self.instrument.tick_size, view.mid_ticks * self.instrument.tick_size
        turnover_musd = math.fsum(self.traded) * tick_size * 1e-6  # subtle: exact in any order
        self.traded.clear()
        self.seconds.append(second_ns)
        self.mids.append(mid_price)
        self.account.note(second_ns)
        half_life_s = self.parameters.half_life_s
        self.market.measure_second(second_ns, mid_price, turnover_musd, tick_size, half_life_s)
        if self._guard(second_ns) != self.last_guard:
            self.due_ns = second_ns  # the next message decides

    def _mark(self) -> None:
        """Mark the inventory to the mid, and look at the drawdown."""
        account, limit = self.account, self.parameters.max_drawdown_usdt
        account.mark(self.market.book.view.mid_ticks * self.instrument.tick_size)
        if limit is not None and account.peak_equity - account.equity > limit:
            self.is_stopped = True  # for good

    # -- deciding

    def _guard(self, time_ns: int) -> str:
        """Why there must be no quote now, the first reason of these; empty if there may be one."""
        p, market, view = self.parameters, self.market, self.market.book.view
        gap_bps = abs(self.account.mid_price / view.mark_price - 1) * 1e4  # nan without a mark
        late_ns, mark_age_ns = market.lag_ns - market.usual_lag_ns, time_ns - market.ticker_recv_ns
        guards = {
            "outage": self.exchange.back_ns,
            "book lost": market.lost,
            view.fault: view.fault,  # crossed, one-sided; empty: sound
            "book stale": time_ns >= self.stale_ns(),
            "book late": late_ns > p.stale_after_s * NS,
            "far from mark price": gap_bps > p.max_mark_gap_bps and mark_age_ns <= MINUTE_NS,
            "drawdown limit": self.is_stopped,
            "warming up": len(market.returns_bps) < WARMUP_RETURNS or math.isnan(market.grid_mid),
        }
        return next((reason for reason, holds in guards.items() if holds), "")

    def decide(self, time_ns: int) -> None:
        """Measure, choose, quote, log; the next decision is due an interval later."""
        if self.exchange.back_ns and self.last_guard == "outage":
            return
        p, market, account = self.parameters, self.market, self.account
        view, tick_size = market.book.view, self.instrument.tick_size

        # Mark the inventory, and measure the depth of a book that can be trusted.
        self._mark()
        self.mid_ticks = view.mid_ticks
        is_sound = not (market.lost or view.fault)
        if math.isnan(market.mid_price):
            self.check_value(p)
        market.mid_price = account.mid_price
        for side in SIDES:
            market.depths[side] = market.book.depth(side, p.depth_band_bps) if is_sound else NAN

        # Is there a reason to stay out? No return runs across a silence of the book.
        reason = self.last_guard = self._guard(time_ns)
        self.is_stale = time_ns >= self.stale_ns()
        if self.is_stale:
            market.grid_mid = NAN

        # What to quote: distances from the mid, then levels and quantities.
        source, distances, wanted = "none", None, dict.fromkeys(SIDES, (None, 0.0))
        if not reason:
            q = min(max(account.inventory / p.max_inventory, -1.0), 1.0)
            good_ns, good = self.last_good
            distances = opt.choose_distances(self.strategy, self.strategy_name, p, market, q, good,
                                             (time_ns - good_ns) / NS)  # fmt: skip
            source = distances.source
            if source == self.strategy_name:
                self.last_good = (time_ns, distances)
            wanted, reason = self._place(distances, view.mid_ticks)
        elif reason == "drawdown limit":
            self.exchange.flatten(time_ns)
        sent = [self.exchange.send(side, *order, time_ns) for side, order in wanted.items()]

        # Write it down.
        best = [side * view.best(side) * tick_size if is_sound else NAN for side in SIDES]
        quote = []
        for side, (level, qty) in wanted.items():
            quote += [NAN if level is None else side * level * tick_size, qty]
        spread = distances and distances.base_spread
        *terms, total = (*spread[:3], spread.total_bps) if spread else [NAN] * 4
        standing = {o.side: o.queue_ahead for o in self.exchange.orders if o.has_arrived}
        queues = [standing.get(side, NAN) for side in SIDES]
        self.decision = Decision(
            time_ns, account.mid_price if is_sound else NAN, *best, *quote, total,
            market.volatility, market.ema_volatility, *market.depths.values(), market.liquidity,
            account.inventory, account.cash, account.equity, account.fees_paid, *terms, *queues,
            source, reason, any(sent), distances,
        )  # fmt: skip
        self.due_ns = time_ns + round(opt.get_optimization_frequency(p, market.ema_volatility) * NS)
        self.sources[source] += 1
        self.reasons[reason] += 1
        if self.log is not None:
            self.log.write(log_row(self.decision, self.instrument.digits))
        self.history.add(self.decision)
        self.on_decision(self)

    def _place(self, distances: Distances, mid: float) -> tuple[dict[int, tuple], str]:
        """(level or None, quantity) by side around a mid in ticks, and the reasons given."""
        p, lot, tick_size = self.parameters, self.instrument.lot_size, self.instrument.tick_size
        wanted = dict.fromkeys(SIDES, (None, 0.0))
        reasons = [feed.printable(distances.reason)] if distances.reason else []
        for side, name, bps in ((BID, "bid", distances.bid_bps), (ASK, "ask", distances.ask_bps)):
            # Rounded outward to the tick; post-only; and a price above 0.
            level = math.floor(side * mid - mid * bps * 1e-4 + 1e-9)
            level = min(level, -self.market.book.view.best(-side) - 1)
            level = max(level, 1) if side == BID else level
            # No more than a share of the depth, and within the inventory limit.
            qty = floor_to_lot(min(p.order_qty, p.max_depth_share * self.market.depths[side]), lot)
            least_usdt = self.instrument.min_notional
            least = max(self.instrument.min_order, least_usdt / (side * level * tick_size))
            if qty < least * (1 - 1e-9):
                reasons.append(f"no {name}: book too thin for a lot")
            elif side * self.account.inventory + qty > p.max_inventory + lot / 2:
                reasons.append(f"no {name}: inventory limit")
            else:
                wanted[side] = (level, qty)
        return wanted, "; ".join(reasons)

    def finish(self) -> None:
        """The end: write down the account as the last message leaves it."""
        self._mark()
        self.account.note(self.last_ns)
        names = "mid_price", "inventory", "cash", "equity", "fees_paid"
        account = {name: getattr(self.account, name) for name in names}
        self.history.add(self.decision._replace(time_ns=self.last_ns, **account))


# ---- Display -----------------------------------------------------------------------

VERBS = {BID: "bought", ASK: "sold"}
BELOW = "\n" + " " * 15  # the next line, right of the label


def count(n: int, what: str) -> str:
    """1 fill, 2 fills."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def dash_unknown(text: str) -> str:
    """The text with a dash for every number that is not known."""
    return re.sub(r"\b(nan|inf)\b", "-", text)


def describe_account(maker: MarketMaker) -> str:
    """Inventory and result."""
    a, coin, limit = maker.account, maker.instrument.base_coin, maker.parameters.max_inventory
    return f"""\
Inventory      {"+" * (a.inventory > 0)}{coins(a.inventory)} {coin} of at most {coins(limit)}   \
{count(len(a.fills), "fill")}
Result, USDT   gross {a.gross:+.2f}   fees {a.fees_paid:.2f}   net {a.equity:+.2f}
               gross = spread captured {a.spread_captured:+.2f} + revaluation {a.revaluation:+.2f}
"""


def describe_market(maker: MarketMaker) -> str:
    """What we quote and why, what filled, what is known of the market: as of the last decision,
    but queues, markouts, last and mark price of now. A mark of a minute ago guards nothing.
    """
    d, p, market, n = maker.decision, maker.parameters, maker.market, maker.instrument.digits
    view, coin = market.book.view, maker.instrument.base_coin
    queues = {o.side: o.queue_ahead for o in maker.exchange.orders if o.cancel_ns == NEVER}
    quotes, fills, margin = [], [], "-"
    for side, name, price, qty in ((BID, "bid", *d[4:6]), (ASK, "ask", *d[6:8])):
        away_bps, ahead = 1e4 * abs(price / d.mid_price - 1), coins(queues.get(side, NAN))
        text = f"{name} {price:,.{n}f} x {coins(qty)}, {away_bps:.2f} bps away, {ahead} ahead"
        quotes.append(text if qty else f"no {name}")
    for fill in maker.account.fills[-3:]:
        text = f"{VERBS[fill.side]} {coins(fill.qty)} at {fill.price:,.{n}f}, markout so far "
        bps = 1e4 * fill.side * (maker.account.mid_price / fill.price - 1)
        fills.append(f"{text}{bps:+.2f} bps")
    recent = market.recent_trades(maker.instrument.tick_size)[-3:]
    trades = ", ".join(f"{VERBS[side]} {coins(size)}" for _, side, _, size in recent)
    for time_ns, *_ in recent[-1:]:
        trades += f", {(maker.last_ns - maker.exchange.offset_ns - time_ns) / NS:.1f} s ago"
    is_old = maker.last_ns - market.ticker_recv_ns > MINUTE_NS
    mark = "over a minute old" if is_old else f"{view.mark_price:,.{n}f}"
    if d.distances and (solution := d.distances.solution):
        more = solution.inventory_price * p.order_qty / p.max_inventory
        margin = f"cost, 1 % more spread: {solution.spread_price / solution.cost:+.1f} %   "
        margin += f"one order more bought: {100 * more / solution.cost:+.1f} %"
    return f"""\
Our quote      {BELOW.join(quotes)}
Last fills     {BELOW.join(fills) or "none"}
Market         bid {d.best_bid:,.{n}f}   ask {d.best_ask:,.{n}f}   \
last {view.last_price:,.{n}f}   mark {mark}
               depth {d.bid_depth:.2f} / {d.ask_depth:.2f} {coin} within {p.depth_band_bps:g} bps
               volatility {d.volatility:.2f} (EMA {d.ema_volatility:.2f}) bps/sqrt(s), \
liquidity {d.liquidity:.2f} M USDT/bp
               last trades {trades or "none"}
Base spread    {d.base_spread_bps:.2f} bps = volatility {d.volatility_bps:.2f} + \
liquidity {d.liquidity_bps:.2f} + depth {d.depth_bps:.2f}
               no quote nearer than {p.min_half_spread_bps:g}; \
a round trip: {2 * p.maker_fee_bps:g}, twice the maker fee
Parameters     {opt.in_words(opt.differing(p)) or "all at their defaults"}
At the margin  {margin}
"""


def summarize(maker: MarketMaker) -> str:
    """What there is to say at the end."""
    span = f"{clock_text(maker.first_ns)} to {clock_text(maker.last_ns)} UTC   "
    decisions, reasons, orders = (
        "   ".join(f"{n} {what}" for what, n in counts.items() if what) or "none"
        for counts in (maker.sources, maker.reasons, maker.exchange.counts)
    )
    return f"""\
Span           {span if maker.messages else ""}{count(maker.messages, "message")}
Decisions      {decisions}
Reasons        {reasons}
Orders         {orders}
{describe_account(maker)}\
               turnover {maker.account.turnover:,.0f}
Unheard        quotes stood {maker.unheard_ns / NS:.1f} s while the connection was lost
"""


# ---- Running -----------------------------------------------------------------------


def given_parameters(options: argparse.Namespace) -> dict[str, Any]:
    """What the user set: the flags, before the values in FILE.json of --params."""
    path, flags = options.params, {name: getattr(options, name) for name in opt.FIELDS}
    try:
        if path:
            feed.check_file(path, MAX_PARAMS)
        values = {**json.loads(path.read_text("utf-8-sig"))} if path else {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        rule = 'it must hold one JSON object such as {"alpha": 2}'
        raise UserError(f"--params {path}: {error}: {rule}") from None
    return values | {name: value for name, value in flags.items() if value is not None}


def load_strategy(strategy: str | Callable) -> tuple[Callable, str]:
    """A strategy and its name: a function, a name of optimize.STRATEGIES, or a file that defines
    quote(parameters, market, q) -> (bid_bps, ask_bps), named as the file is.
    """
    if callable(strategy):
        return strategy, getattr(strategy, "__name__", "a function")
    if strategy in opt.STRATEGIES:
        return opt.STRATEGIES[strategy], strategy
    try:
        name = Path(strategy).stem
        if name in ("last_good", "default", "none") or not name.isprintable() or "," in name:
            raise ValueError("a name that the log could not tell apart")
        return runpy.run_path(strategy)["quote"], name
    except (Exception, SystemExit) as error:  # subtle: it is anybody's code
        names = ", ".join(opt.STRATEGIES)
        raise UserError(f"--strategy {strategy}: {type(error).__name__}: {error}: give {names}, or "
                        "a Python file with quote(parameters, market, q)") from None  # fmt: skip


def choose_parameters(given: Mapping[str, Any], start: Mapping[str, Any],
                      instrument: feed.Instrument) -> Parameters:  # fmt: skip
    """The user's parameters before those of a recording's start line before the defaults."""
    try:
        values = {**start.get("parameters", {}), **given}
        return opt.change_parameters(Parameters(), values, instrument.min_order)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None


class Session:
    """One run as its user sees it: screen, files, edits of --params. A replay has no source."""

    def __init__(self, options: argparse.Namespace, maker: MarketMaker, title: str,
                 parser: feed.Parser, given: Mapping[str, Any],
                 source: feed.LiveFeed | None = None) -> None:  # fmt: skip
        self.options, self.maker, self.title = options, maker, title
        self.parser, self.given, self.source = parser, given, source  # given: as last read
        self.files = [file for file in (maker.log, source and source.recorder) if file]
        self.next_look_s = self.next_show_s = self.notice_end_s = 0.0
        self.notice = ""
        self.printer = ThreadPoolExecutor(1)  # a terminal that takes nothing holds up no decision
        self.is_screen = bool(sys.stdout and sys.stdout.isatty() and os.getenv("TERM") != "dumb")
        self.print("" if self.is_screen else f"{title}\n")

    def run(self, bursts: Iterator[list[feed.Message]]) -> None:
        """Take every message, and look around in between; at the end close all files."""
        maker = self.maker
        try:
            for messages in bursts:
                maker.take(*messages)
                self.look()
        finally:
            if self.source:
                self.source.stop()
            for file in self.files:
                file.close()
        maker.finish()
        self.notice = "ENDED"
        failures = [file.failure for file in self.files if file.failure]
        screen = self.draw() if self.is_screen else ""
        self.print(screen + "\n".join([self.title, summarize(maker), *failures]))
        self.printer.shutdown()
        if failures:
            raise UserError("; ".join(failures))

    def look(self) -> None:
        """A few times a second: the feed, the parameter file, the screen."""
        now_s, market = time.monotonic(), self.maker.market
        if now_s < self.next_look_s:
            return
        self.next_look_s = now_s + TICK_S
        if self.options.params and self.options.speed != INF:
            self.read_edits()
        if self.source:
            self.source.tend()
            if market.book.view.fault and not market.lost:  # it heals by a new snapshot only
                self.source.cut(f"resync: {market.book.view.fault}")
        if now_s > self.notice_end_s:
            self.notice = ""
        if now_s >= self.next_show_s and self.printing.done():
            self.next_show_s = now_s + (0.25 if self.is_screen else 1.0)
            self.print(self.draw())

    def print(self, text: str) -> None:
        """Out of the way. What fails is kept by stdout, and told at the end."""
        self.printing = self.printer.submit(print, text, end="", flush=True)

    def read_edits(self) -> None:
        """A sound edit of --params becomes a message of the session; another gives a notice."""
        maker, before, given = self.maker, asdict(self.maker.parameters), None
        try:
            given = given_parameters(self.options)
            if given == self.given:
                return
            # What is taken out of the file goes back to what it was without it.
            note = {"parameters": DEFAULTS | given} if self.source else {"overrides": given}
            _, _, p = maker.merge(note)
            if self.source:
                self.source.emit(feed.control_line("params", **note))
            else:  # a file is a slower exchange: the edit comes at the receive time of now
                note, view = {"event": "params", **note}, maker.market.book.view
                maker.take(feed.Message(feed.CONTROL, maker.last_ns, note=note, view=view))
            changed = {name: v for name, v in asdict(p).items() if v != before[name]}
            notice = f"parameters changed: {opt.in_words(changed) or 'none'}"
        except (ValueError, TypeError) as error:
            notice = f"edit of {self.options.params} refused: {error}"
        self.given, self.notice = given, feed.printable(notice)
        self.notice_end_s = time.monotonic() + 10.0

    def describe_feed(self) -> str:
        """What was received, how the connection is, and what went wrong."""
        maker, counts, source = self.maker, self.parser.counts, self.source
        lag_ns = maker.market.lag_ns - maker.exchange.offset_ns
        text = f"{count(maker.messages, 'message')}   {count(counts['gaps'], 'gap')}   "
        text += f"{counts['malformed']} malformed   lag {lag_ns / MS:.0f} ms"
        text += "" if 0 <= lag_ns <= MAX_LAG_NS else ": see --clock-offset-ms"
        if source:
            age_s = (source.clock_ns() - source.last_frame_ns) / NS
            lost = "ended" if source.stopping.is_set() else "NOT CONNECTED"
            connection = f"last frame {age_s:.1f} s ago" if source.ws else lost
            text += f"{BELOW}{connection}   {count(source.reconnects, 'reconnect')}"
        silent = [name for name, _ in self.parser.topics.values() if not counts[name]]
        text += f"{BELOW}none of {', '.join(silent)}" if silent else ""
        problems = [file.failure for file in self.files if file.failure] + [self.parser.problem]
        return f"Feed           {text}" + f"{BELOW}last problem: {problems[0]}" * bool(problems[0])

    def draw(self) -> str:
        """A frame in place of the last, what matters most first: a window may be small. Where
        there is no terminal to draw on, only a line, and each notice once.
        """
        maker, d, digits = self.maker, self.maker.decision, self.maker.instrument.digits
        status = f"{clock_text(maker.last_ns)}   " if maker.messages else ""
        status += f"mid {d.mid_price:,.{digits + 1}f}   net {maker.account.equity:+.2f}   "
        status = dash_unknown(f"{status}source {d.source}   {d.reason}   {maker.market.lost}")
        if not self.is_screen:
            notice, self.notice = self.notice, ""
            return f"{status}   {notice}\n"
        notice = self.notice or "paper trading: no order is ever sent; Ctrl-C ends it"
        columns, rows = shutil.get_terminal_size((80, 24))
        text = describe_account(maker) + describe_market(maker) + self.describe_feed()
        if columns < 80:  # labels are cut before numbers
            text = re.sub(r"(?m)^(.{6}).{9}", r"\1 ", text)
        text = f"{self.title}\n{notice}\n{status}\n{dash_unknown(text)}"
        lines = [f"{line[:columns]}\x1b[K\n" for line in text.splitlines()[: rows - 1]]
        return f"\x1b[H{''.join(lines)}\x1b[J"


def live_messages(session: Session, source: feed.LiveFeed) -> Iterator[list[feed.Message]]:
    """Messages as they come. At the end the feed stops first, then the rest is drained."""
    stop, end_ns = feed.StopSignal(), source.clock_ns() + session.options.duration * NS
    while not stop.is_set and source.clock_ns() < end_ns and not source.fatal:
        try:
            burst = [source.queue.get(timeout=TICK_S)]
            yield burst + [source.queue.get() for _ in range(source.queue.qsize())]
            time.sleep(GATHER_S)
        except queue.Empty:
            with source.lock:  # nothing is stamped meanwhile
                if source.queue.empty():
                    session.maker.pass_time(source.clock_ns())
            yield []
    source.stop()
    source.emit(feed.control_line("end"))
    yield [source.queue.get() for _ in range(source.queue.qsize())]
    if source.fatal:
        raise UserError(source.fatal)


def replayed_messages(recording: feed.Recording, speed: float,
                      duration_s: float) -> Iterator[list[feed.Message]]:  # fmt: skip
    """The messages of a recording at a multiple of their own pace (inf: no waiting)."""
    stop, began_s, first_ns, burst, rows = feed.StopSignal(), time.monotonic(), 0, [], 0
    for message in recording.messages():
        first_ns = first_ns or message.recv_ns
        elapsed_s = (message.recv_ns - first_ns) / NS
        while (wait_s := began_s + elapsed_s / speed - time.monotonic()) > 0 and not stop.is_set:
            yield burst
            burst = []
            time.sleep(min(wait_s, TICK_S))
        if elapsed_s > duration_s or stop.is_set:
            break
        burst.append(message)
        rows += 1 + len(message.rows[0]) + len(message.trades)
        if rows > BURST:
            yield burst
            burst, rows = [], 0
    yield burst


def run(options: argparse.Namespace, clock_ns: Callable[[], int] | None = None) -> None:
    """Paper trading on a recording or on the live feed."""
    # What can be said at once, also of flags that would do nothing.
    replay, log = options.replay, options.log
    for is_wrong, what in (
        (replay and (options.record or options.url),
         "--record and --url are of the live feed: leave out --replay"),
        (options.speed and not replay, "--speed is of a replay: give --replay FILE"),
        (log and log.exists(), f"{log} exists and is not overwritten: choose another name"),
        (log and (log == options.record or not log.absolute().parent.is_dir()),
         f"--log {log} cannot be written: choose a name of its own in a folder"),
    ):  # fmt: skip
        if is_wrong:
            raise UserError(what)
    load_strategy(options.strategy)  # raises what is wrong with it
    given, steps = given_parameters(options), (options.tick_size, options.lot_size)
    source, path, speed, label = None, options.replay, options.speed or 1.0, "REPLAY"

    # The live feed; without a network the bundled sample, unless live data are asked for.
    if not path:
        where, market = options.url or "Bybit", (options.symbol, options.category)
        instrument = feed.find_instrument(*market, *steps, ask=not options.url)
        start, overrides = {}, {}
        parameters = choose_parameters(given, start, instrument)
        try:
            source = feed.open_feed(
                instrument, options.depth or feed.DEPTHS[0], options.url, options.record,
                clock_ns, parameters=asdict(parameters),
            )  # fmt: skip
        except OSError as error:
            reason = f"{where} cannot be reached ({error})"
            if options.live or options.url or options.record or any(market):
                raise UserError(f"{reason}: check the network, or give --replay FILE") from None
            print(f"{reason}: replaying the bundled synthetic sample instead", file=sys.stderr)
            path, speed, label = SAMPLE, SAMPLE_SPEED, "OFFLINE REPLAY"
        else:
            parser, label = source.parser, f"LIVE from {where}"

    # A recording; what the user gave, its control lines do not change.
    if not source:
        recording = feed.Recording(path, *steps, options.depth, options.symbol, options.category)
        parser, overrides, start = recording.parser, given, recording.start
        parameters = choose_parameters(given, start, parser.instrument)
        pace = "" if speed == INF else f" at {speed:g} x"
        label += f"{pace} of {'SYNTHETIC data' if recording.is_synthetic else path.name}"

    # From here on both are the same.
    log = feed.GrowingFile(options.log) if options.log else None
    maker = MarketMaker(parameters, parser.instrument, log, overrides, options.strategy)
    maker.recorded |= start.get("parameters", {})
    title = f"{parser.instrument.symbol} {parser.instrument.category}   {label}"
    if options.params and speed == INF:
        title += "   --params is read once at --speed max"
    session = Session(options, maker, title, parser, given, source)
    session.run(live_messages(session, source) if source
                else replayed_messages(recording, speed, options.duration))  # fmt: skip
    if not maker.market.book_recv_ns and not feed.StopSignal.came:
        raise UserError(f"no book of {parser.instrument.symbol} came: check --symbol, --depth")


# ---- Command line ------------------------------------------------------------------

STRATEGY_HELP = "lp (the program, default), fixed (default_spread_bps), \
or a file's quote(parameters, market, q)"


def add_parameter_flags(parser: argparse.ArgumentParser) -> None:
    """--params, and a flag for every parameter, with unit and range; unset means the default."""
    add = parser.add_argument_group("parameters").add_argument
    add("--params", type=Path, metavar="FILE.json",
        help="parameters; read again when edited, live or in a replay")  # fmt: skip
    for name, parameter in opt.FIELDS.items():
        flag, rule = "--" + name.replace("_", "-"), parameter.metadata
        default = f"(default {'off' if parameter.default is None else parameter.default})"
        if "choices" in rule:
            add(flag, choices=rule["choices"], help=f"{rule['help']} {default}")
        else:
            span = f"{rule['low']:g} to {rule['high']:g}"
            add(flag, type=float, metavar="X", help=f"{rule['help']}, {span} {default}")


def build_arguments() -> argparse.ArgumentParser:
    """The command line of `python marketmaker.py`."""
    what = "Paper market maker on Bybit's live data, or on a recording. No order is sent."
    parser = feed.Arguments(prog="marketmaker.py", description=what)
    source, add = parser.add_mutually_exclusive_group(), parser.add_argument
    source.add_argument("--live", action="store_true", help="insist on the live feed")
    source.add_argument("--replay", type=Path, metavar="FILE", help="replay a recording")
    add("--speed", type=feed.positive, metavar="X|max", help="of a replay (default 1)")
    add("--duration", type=feed.positive, default=INF, metavar="SECONDS", help="of receive time")
    add("--record", type=Path, metavar="FILE", help="record the live session")
    add("--log", type=Path, metavar="FILE", help="every decision as CSV")
    add("--strategy", default="lp", metavar="NAME|FILE.py", help=STRATEGY_HELP)
    feed.add_market_flags(parser)
    add("--url", help="another WebSocket address than Bybit's")
    add_parameter_flags(parser)
    return parser


def main(arguments: list[str] | None = None, clock_ns: Callable[[], int] | None = None) -> int:
    """python marketmaker.py; the exit status. clock_ns replaces the session's clock."""
    options = build_arguments().parse_args(arguments)
    return feed.exit_cleanly(lambda: run(options, clock_ns))


if __name__ == "__main__":
    sys.exit(main())
