"""From market to quote: state, decision, paper fills, display. No order is ever sent.

The loop, the same for the live socket, a recording and the backtest:

  for every message:
      let the exchange match it against our paper orders
      show it to the book
      if a decision is due:  measure the market, solve the program, quote, log

Between two decisions our orders do not move, so messages come as columns (a tape) and are
matched in slices: only a message that reaches an order of ours, or at which one arrives,
is looked at alone. Where a tape or a slice ends changes nothing.

When is a decision made? At the first message that is due, with that message applied;
its time is that message's recv_ns, and the next is due one optimization interval later.
At once: after a loss, at the snapshot that ends it, when the book falls silent, when
parameters change. Guards are judged at every decision and every whole second; one that
trips or clears makes the next message decide. A fill does not; the next decision sees
it. No decision reads a clock.

How paper orders fill, with the direction of each rule's bias. (tests/test_marketmaker.py
has the same rules in their plainest form, message by message: `simulate`.)

  - An order decided at t (our clock) stands on the exchange from t + order_latency until
    its cancel arrives, as late. Only events of that time (exchange clock) can fill it,
    whenever we hear of them. Realistic.
  - Post-only and the inventory limit are judged again at arrival. Realistic.
  - `queue`: behind the displayed size at arrival. Trades at our price eat it; a smaller
    displayed size shortens it; what is left of a trade fills us. Cancels are taken to be
    behind us: pessimistic.
  - A trade through our price, or the opposite best reaching it, fills the whole order.
    Optimistic in size: the trade may have been smaller than our order.
  - `touch`: any trade at our price fills the whole order: optimistic. `through`: only
    the rule before: pessimistic.
  - We take no volume from others, and move no price unless impact_bps says so: optimistic.

The words. The feed *receives* a message, the market maker *hears* it, the exchange
*matches* it with our *orders*. An order is *sent*, *arrives*, and is *refused* or *filled*;
a fill is *settled* in the *account*; the inventory is *marked* to the mid. The maker
*measures* the market and *decides*; a *decision* says what to *quote*.

Units: prices USDT at the edges, integer ticks inside; sizes and inventory base coin;
spreads and volatility bps of the mid; time int ns. Fees are positive when we pay.
Not modelled: funding. Our own impact and outages: only if backtest.py asks for them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import queue
import shutil
import statistics
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import websocket
from scipy.optimize import linprog

import feed
import optimize as opt
from feed import ASK, BID, MS, NEVER, NO_LEVEL, NS, SIDES, Tape, UserError, View, clock_text
from optimize import INF, Distances, Parameters

NAN = math.nan  # not known, or none
WINDOW_S = 60  # of the volatility and the liquidity
WARMUP_RETURNS = 10  # no quote before so many 1 s returns
LOOK_AHEAD = 512  # messages, for the next one that is due
LATE_NS = 10 * NS  # no trade is heard of later than this
IMPACT_HALF_LIFE_S = 30.0  # of the shift that our own fills cause
SAMPLE, SAMPLE_SPEED = Path(__file__).parent / "data" / "sample.jsonl.gz", 10.0
MAX_LAG_MS = 2000.0  # of receive after exchange time; more is warned of
BURST = 500  # messages taken at once in a replay without pauses
GATHER_S = 0.001  # after a message, so that a burst makes one tape and few changes of thread
TICK_S = 0.1  # how long the main thread waits for a message before it looks around


# ---- What is known of the market ---------------------------------------------------


@dataclass
class Market:
    """What is measured from the market, on our clock. nan = not known yet."""

    book: feed.Book = field(default_factory=feed.Book)
    lost: str = "no book yet"  # why the book cannot be trusted; empty: it can
    book_recv_ns: int = 0  # when the last book message was received
    volatility: float = NAN  # bps/sqrt(s), over the last minute
    ema_volatility: float = NAN  # bps/sqrt(s)
    ema_ns: int = 0  # when that was last renewed
    liquidity: float = NAN  # million USDT traded per bp of mid movement
    depths: dict[int, float] = field(default_factory=lambda: {BID: NAN, ASK: NAN})  # base coin
    grid_mid: float = NAN  # USDT, the mid at the last whole second
    returns_bps: deque = field(default_factory=partial(deque, maxlen=WINDOW_S))  # of 1 s
    turnovers: deque = field(default_factory=partial(deque, maxlen=WINDOW_S))  # M USDT a s

    def measure_second(self, second_ns: int, mid_price: float, turnover_musd: float,
                       tick_size: float, half_life_s: float) -> None:  # fmt: skip
        """One whole second of receive time has passed.

        volatility = root mean square of the 1 s log returns of the mid in the window;
        its EMA: after an uneven step dt the new value weighs 1 - 2^(-dt/half_life);
        liquidity = turnover of the window / sum of the absolute returns (at least a tick).
        """
        previous, self.grid_mid = self.grid_mid, mid_price
        if previous != previous:
            return
        self.returns_bps.append(1e4 * math.log(mid_price / previous))
        self.turnovers.append(turnover_musd)
        if len(self.returns_bps) < WARMUP_RETURNS:
            return
        self.volatility = math.hypot(*self.returns_bps) / math.sqrt(len(self.returns_bps))
        before = self.ema_volatility if self.ema_volatility >= 0 else self.volatility
        forgotten = 2 ** (-(second_ns - self.ema_ns) / NS / half_life_s)
        self.ema_volatility = self.volatility + (before - self.volatility) * forgotten
        self.ema_ns = second_ns
        moved_bps = max(sum(map(abs, self.returns_bps)), 1e4 * tick_size / mid_price)
        self.liquidity = sum(self.turnovers) / moved_bps

    def restart(self) -> None:
        """After a loss or a silence the grid of seconds begins anew; the EMA is kept."""
        self.grid_mid = self.volatility = self.liquidity = NAN
        self.returns_bps.clear()
        self.turnovers.clear()


# ---- Our account -------------------------------------------------------------------


class Fill(NamedTuple):
    """One fill of a paper order."""

    time_ns: int  # exchange time
    recv_ns: int  # when we came to know
    side: int  # +1 we bought, -1 we sold
    price: float  # USDT
    qty: float  # base coin
    fee: float  # USDT, positive = paid
    mid_price: float  # USDT, as known just before the message that told of the fill
    queue_ahead: float = 0.0  # base coin, at the fill
    queue_at_arrival: float = 0.0  # base coin
    arrival_ns: int = 0  # when the order reached the exchange, exchange time
    is_taker: bool = False


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
    peak_equity: float = 0.0
    fills: list[Fill] = field(default_factory=list)

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

    def settle(self, fill: Fill) -> None:
        """Book one fill.

        By hand: mid 100, buy 1 at 99 with a fee of 0.1: cash -99.1, captured 1. The mid
        rises to 104: revaluation 4. Sell 1 at 105 with a fee of 0.1: cash 5.8, captured 2.
        Net 5.8 = captured 2 + revaluation 4 - fees 0.2.
        """
        self.cash -= fill.side * fill.qty * fill.price + fill.fee
        self.inventory = round(self.inventory + fill.side * fill.qty, 9)
        self.fees_paid += fill.fee
        self.spread_captured += fill.side * (fill.mid_price - fill.price) * fill.qty
        self.turnover += fill.qty * fill.price
        self.fills.append(fill)


# ---- What is decided ---------------------------------------------------------------


class Decision(NamedTuple):
    """What was known and what was wanted: a row of the log, the plots, quotes.csv and the
    screen. nan = none, or not known.
    """

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
    source: str = "none"  # lp, last_good, default, none, or a baseline
    reason: str = "no message yet"  # why not lp, or why a side is missing
    is_sent: bool = False  # whether it sent or cancelled an order
    distances: Distances | None = None


LOGGED = Decision._fields[: Decision._fields.index("fees_paid")] + ("source", "reason")
NUMBERS = Decision._fields[1 : Decision._fields.index("source")]


def log_row(decision: Decision, digits: int) -> str:
    """A line of the log; empty where nothing is known. digits: decimals of a price."""
    price = f".{digits}f"
    forms = dict.fromkeys(("best_bid", "best_ask", "bid_price", "ask_price"), price)
    forms |= {"mid_price": f".{digits + 1}f", "cash": ".8f", "equity": ".8f", "time_ns": ""}
    cells = []
    for name in LOGGED[:-2]:
        value = getattr(decision, name)
        is_missing = value != value or (name.endswith("_qty") and not value)
        cells.append("" if is_missing else format(value, forms.get(name, ".9g")))
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
    at = int(holds.argmax()) if len(holds) else 0
    return start + at if len(holds) and holds[at] else stop


@lru_cache
def floor_to_lot(qty: float, lot_size: float) -> float:
    """The largest multiple of the lot that is not above qty.

    >>> floor_to_lot(0.0129, 0.001)
    0.012
    """
    return round(math.floor(qty / lot_size + 1e-9) * lot_size, 9)


@dataclass(slots=True, eq=False)
class Order:
    """A paper order. It stands on the exchange in (arrival_ns, cancel_ns].

    It carries its own queue: at its arrival that is the size shown at its price, and from
    then on it only gets shorter. Until a message reaches the order nobody asks for it, so
    rows at its price wait on the tape from `next_message` on.
    """

    side: int
    level: int  # side x price tick
    qty: float  # base coin, as sent
    left: float  # of it, not yet filled
    arrival_ns: int  # exchange time
    cancel_ns: int = NEVER
    is_taker: bool = False  # it takes whatever price there is, level by level
    has_arrived: bool = False
    queue_ahead: float = INF  # base coin; inf where nothing can be seen
    queue_at_arrival: float = INF
    eaten: float = 0.0  # of the queue, by trades
    next_message: int = 0  # of the tape

    def shorten_queue(self, shown: float, exch_ns: int) -> None:
        """A book row says what is shown at our price."""
        if exch_ns <= self.arrival_ns:
            # subtle: a row from before the arrival, heard of after it
            self.queue_ahead = max(shown - self.eaten, 0.0)
        elif exch_ns <= self.cancel_ns:
            self.queue_ahead = min(self.queue_ahead, shown)


@dataclass(eq=False)
class PaperExchange:
    """Matches the market's messages, on the exchange's clock, against our orders.

    `orders` holds all that a message may still meet, cancelled ones included: a trade can be
    heard of after its order was replaced. `sent` is the last order sent to each side that
    as far as we know still stands. peer_rules is for comparison with hftbacktest: an order
    fills whole or not at all, and a level that leaves the window counts as cancelled.
    """

    parameters: Parameters
    instrument: feed.Instrument
    market: Market
    account: Account
    participation: float = 1.0  # our share of what is left of a trade
    peer_rules: bool = False
    impact_bps: float = 0.0  # of a fill as large as the depth near the mid
    shifts: list = field(default_factory=lambda: [(0, 0.0)])  # (exch_ns, bps that we see from then)
    back_ns: int = 0  # cut off until then: we hear of nothing and nothing hears of us
    orders: list[Order] = field(default_factory=list)
    sent: dict = field(default_factory=lambda: {BID: None, ASK: None})  # Order or None by side
    counts: Counter = field(default_factory=Counter)
    reach: dict = field(default_factory=dict)  # of the tape, by side: see `begin`
    trade_ns: int = 0  # exchange time of the last trade of the tapes before
    recv_ns: int = 0  # of the message that is matched
    mid_price: float = NAN  # just before that message

    def __post_init__(self) -> None:
        self.book, p = self.market.book, self.parameters
        self.offset_ns = round(p.clock_offset_ms * MS)  # our clock - exchange's
        self.latency_ns = round(p.order_latency_ms * MS) - self.offset_ns

    # -- orders

    def send(self, side: int, level: int | None, qty: float, time_ns: int) -> bool:
        """Ask for one order at a level (None: for none), decided at time_ns.

        Unchanged against the last one sent, the order keeps its place. Otherwise cancel
        and new order arrive at one instant. True if anything was sent or cancelled.
        """
        standing, arrival_ns = self.sent[side], time_ns + self.latency_ns
        wanted = None if level is None else (level, qty)
        if time_ns < self.back_ns or wanted == (standing and (standing.level, standing.qty)):
            return False
        if standing:
            standing.cancel_ns, self.sent[side] = arrival_ns, None
        if wanted:
            self.sent[side] = Order(side, level, qty, left=qty, arrival_ns=arrival_ns)
            self.orders.append(self.sent[side])
            self.counts["sent"] += 1
        return True

    def flatten(self, time_ns: int) -> None:
        """Send a taker order that closes the inventory, unless one is under way."""
        is_under_way = any(order.is_taker for order in self.orders)
        if self.account.inventory and time_ns >= self.back_ns and not is_under_way:
            arrival_ns = time_ns + self.latency_ns
            self.orders.append(Order(0, 0, 0.0, 0.0, arrival_ns, is_taker=True))

    def drop(self, order: Order, refusal: str = "") -> None:
        """The order is over: filled, or refused."""
        if refusal:
            self.counts[f"refused: {refusal}"] += 1
        self.orders.remove(order)
        if self.sent.get(order.side) is order:
            self.sent[order.side] = None

    def shift_bps(self, time_ns: int) -> float:
        """How far our own fills have moved the prices that we see, bps; it decays."""
        since_ns, shift = self.shifts[-1]
        return shift and shift * 2 ** (-max(time_ns - since_ns, 0) / (IMPACT_HALF_LIFE_S * NS))

    # -- slices of messages

    def begin(self, tape: Tape) -> None:
        """A tape is to come. Of each message, how far it comes towards our orders of a side:
        by the opposite best, or by a trade that hits this side; as a level of this side.
        """
        is_event, has_trades = tape.exch_ns > 0, np.diff(tape.first_trade) > 0
        for side in SIDES:
            reach = np.where(is_event, -tape.best(-side), -NO_LEVEL)
            if has_trades.any():
                hit = np.where(tape.trade_level * side > 0, tape.trade_level, -NO_LEVEL)
                nearest = np.minimum.reduceat(hit, tape.first_trade[:-1][has_trades])
                reach[has_trades] = np.minimum(reach[has_trades], nearest)
            self.reach[side] = reach

    def match(self, tape: Tape, start: int, stop: int) -> None:
        """Messages start..stop-1: those that matter to our orders meet them one by one, the
        others only change the book.
        """
        while start < stop:
            m = self._next_that_matters(tape, start, stop)
            self.book.apply(tape, start, m)
            if m < stop:
                self._meet(tape, m)
            start = m + 1

    def _next_that_matters(self, tape: Tape, start: int, stop: int) -> int:
        """The first of messages start..stop-1 that is a snapshot, or comes after the arrival
        of an order, or reaches one that has arrived; else stop.
        """
        if tape.kind[start] == feed.SNAPSHOT:
            return start
        for arrival_ns in {order.arrival_ns for order in self.orders if not order.has_arrived}:
            stop = first_place(tape.exch_ns[start:stop] > arrival_ns, start, stop)
        for side in SIDES:
            levels = [o.level for o in self.orders if o.side == side and o.has_arrived]
            if levels:
                stop = first_place(self.reach[side][start:stop] <= max(levels), start, stop)
        return stop

    def end(self, tape: Tape) -> None:
        """The tape ends: what it says of our queues is looked at before it goes."""
        for order in self.orders:
            self._catch_up(order, tape, len(tape))
            order.next_message = 0
        if len(tape.trade_ns):
            self.trade_ns = tape.trade_ns.item(-1)

    def _catch_up(self, order: Order, tape: Tape, stop: int) -> None:
        """Rows at the order's price in the messages before stop that it has not looked at."""
        if not order.has_arrived:
            return
        first, last = tape.first_row.item(order.next_message), tape.first_row.item(stop)
        order.next_message = stop
        worst = tape.worst_bid if order.side == BID else tape.worst_ask
        for row in (tape.level[first:last] == order.level).nonzero()[0].tolist():
            m = int(tape.first_row.searchsorted(first + row, "right")) - 1
            shown = tape.size.item(first + row)
            if not shown and order.level < worst.item(m) and not self.peer_rules:
                shown = INF  # it was not deleted, it has left the window
            order.shorten_queue(shown, tape.exch_ns.item(m))

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

        # Orders are over once trades and book have both gone past their end, or when it is
        # so long ago that no trade of then will be heard of.
        last_trade = tape.first_trade.item(m) - 1
        trade_ns = tape.trade_ns.item(last_trade) if last_trade >= 0 else self.trade_ns
        late_ns = self.recv_ns - self.offset_ns - LATE_NS
        passed_ns = max(min(trade_ns, self.book.exch_ns), late_ns)
        self.orders = [order for order in self.orders if order.cancel_ns >= passed_ns]

        # Who has arrived meets the book as it stands. He is refused where he would take.
        limit = self.parameters.max_inventory + self.instrument.lot_size / 2
        for order in [o for o in self.orders if not o.has_arrived and o.arrival_ns < exch_ns]:
            order.has_arrived, order.next_message = True, m
            if order.is_taker:
                self._walk_the_book(order)
            elif self._is_reached(order):
                self.drop(order, "would take")
            elif order.side * self.account.inventory + order.qty > limit:
                self.drop(order, "inventory limit")
            else:
                order.queue_ahead = order.queue_at_arrival = self._shown(order)

        # A message of trades: each meets the orders as those before it left them.
        if kind == feed.TRADES:
            for order in self.orders:
                self._catch_up(order, tape, m)
            for t in range(last_trade + 1, tape.first_trade.item(m + 1)):
                if tape.trade_ns.item(t) >= late_ns:
                    self._meet_trade(tape, t)
            return

        # A message of the book: does it shorten our queue, or reach our price?
        if kind == feed.SNAPSHOT:
            self.book.clear()
        self.book.apply(tape, m, m + 1)
        for order in [o for o in self.orders if o.has_arrived]:
            self._catch_up(order, tape, m + 1)
            if kind == feed.SNAPSHOT:  # it tells of every level
                order.shorten_queue(self._shown(order), exch_ns)
            if self._is_reached(order) and exch_ns <= order.arrival_ns:
                self.drop(order, "would take")
            elif self._is_reached(order) and exch_ns <= order.cancel_ns:
                self._fill(order, order.left, exch_ns)

    def _meet_trade(self, tape: Tape, t: int) -> None:
        """A trade through our price fills us; at our price, the fill model says how much."""
        exch_ns, level, size = (
            column.item(t) for column in (tape.trade_ns, tape.trade_level, tape.trade_size)
        )
        model = "through" if tape.trade_is_rpi[t] else self.parameters.fill_model
        for order in self.orders:
            is_hit = order.side * level > 0 and level <= order.level
            stands = order.has_arrived and order.arrival_ns < exch_ns <= order.cancel_ns
            if not (is_hit and stands):
                continue
            if level < order.level or model == "touch":
                self._fill(order, order.left, exch_ns)
            elif model == "queue" and (self.peer_rules or exch_ns > self.book.exch_ns):
                # The size shown does not yet know of it: first the queue ahead, then us.
                order.queue_ahead = min(order.queue_ahead, self._shown(order))
                rest, lot = size - order.queue_ahead, self.instrument.lot_size
                order.eaten += size
                if rest >= lot / 2:
                    share = floor_to_lot(rest * self.participation, lot)
                    qty = order.left if self.peer_rules else min(order.left, share)
                    self._fill(order, qty, exch_ns)
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
                self._fill(order, min(order.left, size), order.arrival_ns)
        if order in self.orders:
            self.drop(order)

    def _fill(self, order: Order, qty: float, exch_ns: int) -> None:
        """The one place where a fill is made: at the order's price, and booked at the mid
        just before the message.
        """
        if qty <= 0:
            return
        account, p, side = self.account, self.parameters, order.side
        price = side * order.level * self.instrument.tick_size
        fee = price * qty * (p.taker_fee_bps if order.is_taker else p.maker_fee_bps) * 1e-4
        marked = account.mid_price  # perhaps of a second after the fill: we go back, and on
        account.mark(self.mid_price * (1 + self.shift_bps(self.recv_ns) * 1e-4))
        account.settle(Fill(
            exch_ns, max(self.recv_ns, self.back_ns), side, price, qty, fee, account.mid_price,
            order.queue_ahead, order.queue_at_arrival, order.arrival_ns, order.is_taker,
        ))  # fmt: skip
        account.mark(marked)
        order.left = round(order.left - qty, 9)
        if order.left <= 0:
            self.drop(order)
        if self.impact_bps and self.market.depths[side] > 0:
            since_ns = max(exch_ns, self.shifts[-1][0])  # one heard of late counts from now
            moved_bps = side * self.impact_bps * qty / self.market.depths[side]
            self.shifts.append((since_ns, self.shift_bps(since_ns) - moved_bps))


# ---- The market maker ---------------------------------------------------------------


class MarketMaker:
    """Messages in, decisions out. Holds market, account, exchange and log."""

    def __init__(self, parameters: Parameters, instrument: feed.Instrument, log: Any = None,
                 overrides: Mapping[str, Any] | None = None, solver: Callable = linprog,
                 strategy: Callable = opt.choose_distances, **frictions: Any) -> None:  # fmt: skip
        self.parameters, self.instrument, self.log = parameters, instrument, log
        self.overrides = dict(overrides or {})  # parameters that a recording cannot change
        self.solver, self.strategy = solver, strategy
        self.market, self.account = Market(), Account()
        exchange = parameters, instrument, self.market, self.account
        self.exchange = PaperExchange(*exchange, **frictions)
        self.decision, self.history = Decision(), History()
        self.on_decision: Callable[[MarketMaker], None] = lambda maker: None
        self.last_good: tuple[int, Distances | None] = (-NEVER, None)  # and its time
        self.last_guard = "book lost"
        self.is_stale = False  # the book is silent
        self.is_stopped = False  # by max_drawdown_usdt, for good
        self.is_cut_off = False  # by an outage
        self.due_ns = 0  # the next decision
        self.second_ns = 0  # the next whole second of receive time
        self.tape: Tape | None = None  # of it, what message was
        self.heard = self.matched = 0  # the first not yet heard; not yet matched
        self.counted = 0  # the first trade not yet counted
        self.traded: list[float] = []  # of this second, ticks x base coin
        self.first_ns = self.last_ns = self.messages = 0
        self.sources: Counter[str] = Counter()  # of decisions
        self.reasons: Counter[str] = Counter()
        if log is not None:
            log.write(",".join(LOGGED) + "\n")

    # -- from message to message

    def take(self, *messages: feed.Message) -> None:
        """Messages as they come."""
        if messages:
            self.follow(feed.build_tape(messages))

    def follow(self, tape: Tape) -> None:
        """Hear messages until something is due; decide; go on."""
        self.tape, self.heard, self.matched, self.counted = tape, 0, 0, 0
        self.messages += len(tape)
        self.exchange.begin(tape)
        changes = [*(tape.kind > feed.TICKER).nonzero()[0].tolist(), len(tape)]  # of the rules
        m = change = 0
        while m < len(tape):
            # What is due next: a decision, a whole second, or the end of our patience with a
            # silent book. Which message is as late as that, or changes the rules, or is of
            # the book and ends a silence?
            due_ns = min(self.due_ns, self.second_ns, self.silent_ns() + 1)
            while changes[change] < m:
                change += 1
            stop = min(changes[change], m + LOOK_AHEAD)
            if self.is_stale:
                stop = first_place(tape.kind[m:stop] == feed.DELTA, m, stop)
            m += int(tape.recv_ns[m:stop].searchsorted(due_ns))
            self._hear(m)
            if m == len(tape):
                break
            kind, now_ns = tape.kind.item(m), tape.recv_ns.item(m)
            if now_ns >= due_ns or kind > feed.TICKER:
                self.pass_time(now_ns)

            # It changes the rules, or it decides, itself included, or only time has passed.
            ends_silence = self.is_stale and kind == feed.DELTA
            if kind > feed.TICKER:
                self._change_rules(m, kind, now_ns)
                m += 1
            elif ends_silence or now_ns >= self.due_ns:
                self._hear(m + 1)
                self.flush()
                self.decide(now_ns)
                m += 1
        self.flush()
        self.exchange.end(tape)
        self._count_trades()
        self.last_ns = max(self.last_ns, tape.recv_ns.item(-1))

    def _hear(self, stop: int) -> None:
        """Messages before `stop` of the tape have come."""
        self.heard = stop
        book = self.tape.last_book.item(stop - 1) if stop else -1
        if book >= 0:
            self.market.book_recv_ns = self.tape.recv_ns.item(book)

    def flush(self) -> None:
        """Match what was heard; the book then shows it."""
        if self.matched < self.heard:
            self.exchange.match(self.tape, self.matched, self.heard)
            self.matched = self.heard

    def _change_rules(self, m: int, kind: int, now_ns: int) -> None:
        """A snapshot, a loss, or a control line: never part of a slice."""
        self.flush()
        self._hear(m + 1)
        market, note = self.market, self.tape.notes.get(m, {})
        if kind == feed.SNAPSHOT:
            self.flush()
            was_away, market.lost = market.lost or self.is_stale, ""
            if was_away or now_ns >= self.due_ns:
                self.decide(now_ns)
            return
        self.matched = m + 1  # there is nothing in it to match
        if kind == feed.LOST and not market.lost:
            market.lost = note["reason"]
            market.restart()
            # At what price a taker order would trade, nobody can say: it is sent again later.
            self.exchange.orders = [o for o in self.exchange.orders if not o.is_taker]
            self.decide(now_ns)
        elif note.get("event") == "params":
            changes, min_order = note.get("parameters"), self.instrument.min_order
            try:
                if note.get("is_final"):  # no recording takes it back
                    self.overrides |= changes
                changes = {**changes, **self.overrides}
                p = opt.change_parameters(self.parameters, changes, min_order, running=True)
            except (ValueError, TypeError) as error:
                logging.warning("parameters in the recording are refused: %s", error)
                return
            self.parameters = self.exchange.parameters = p
            self.decide(now_ns)
        elif note.get("event") == "outage":  # of a backtest: from here on we hear nothing
            market.restart()
            self.is_cut_off, self.exchange.back_ns = True, note["back_ns"]
            self.decide(now_ns)
            self.due_ns = NEVER
        elif note.get("event") == "back":
            self.is_cut_off = False
            self.decide(now_ns)

    # -- time

    def silent_ns(self) -> int:
        """When the book will have been silent for too long."""
        if self.market.lost or self.is_stale or self.is_cut_off:
            return NEVER - 1
        return self.market.book_recv_ns + round(self.parameters.stale_after_s * NS)

    def pass_time(self, now_ns: int) -> None:
        """What time alone brings up to now_ns: whole seconds, and a book gone silent."""
        if not self.second_ns:
            self.first_ns, self.second_ns = now_ns, (now_ns // NS + 1) * NS
        self.last_ns = now_ns
        while not (self.market.lost or self.is_stale or self.is_cut_off):
            if self.second_ns <= min(now_ns, self.silent_ns()):
                self._pass_second()
            elif self.silent_ns() < now_ns:
                self.flush()
                self.decide(self.silent_ns())
            else:
                return
        self.second_ns = (now_ns // NS + 1) * NS  # nothing is measured now
        self._count_trades()
        self.traded.clear()

    def _pass_second(self) -> None:
        """The mid after the last message before this second is a point of the grid."""
        second_ns, self.second_ns = self.second_ns, self.second_ns + NS
        if self.parameters.max_drawdown_usdt is not None or self.exchange.impact_bps:
            self.flush()  # the account of now is needed, and not only the mid
        is_matched = self.tape is None or self.matched == self.heard
        view = self.market.book.view if is_matched else self.tape.view(self.heard - 1)
        self._mark(view, second_ns)
        self._count_trades()
        turnover_ticks, mid_price = math.fsum(self.traded), self.account.mid_price  # exact sum
        self.traded.clear()
        if mid_price == mid_price:
            tick_size, half_life_s = self.instrument.tick_size, self.parameters.half_life_s
            turnover_musd = turnover_ticks * tick_size * 1e-6
            self.market.measure_second(second_ns, mid_price, turnover_musd, tick_size, half_life_s)
            if self._guard(view, second_ns) != self.last_guard:
                self.due_ns = second_ns  # the next message decides

    def _count_trades(self) -> None:
        """Remember what was traded in the messages heard since the last time."""
        if self.tape is not None:
            first, self.counted = self.counted, self.tape.first_trade.item(self.heard)
            ticks = np.abs(self.tape.trade_level[first : self.counted])
            self.traded += (ticks * self.tape.trade_size[first : self.counted]).tolist()

    def _mark(self, view: View, time_ns: int) -> float:
        """Mark the inventory to the mid that we see, and look at the drawdown. The mid, in
        ticks, is the book's, moved by our own impact if that is modelled.
        """
        account, limit = self.account, self.parameters.max_drawdown_usdt
        mid_ticks = view.mid_ticks * (1 + self.exchange.shift_bps(time_ns) * 1e-4)
        account.mark(mid_ticks * self.instrument.tick_size)
        if limit is not None and account.peak_equity - account.equity > limit:
            self.is_stopped = True  # for good
        return mid_ticks

    # -- deciding

    def _guard(self, view: View, time_ns: int) -> str:
        """Why there must be no quote now; empty if there may be one."""
        p, market = self.parameters, self.market
        if self.is_cut_off:
            return "outage"
        if market.lost:
            return "book lost"
        if view.fault:
            return view.fault
        if time_ns - market.book_recv_ns >= round(p.stale_after_s * NS):
            return "book stale"
        if abs(self.account.mid_price / view.mark_price - 1) * 1e4 > p.max_mark_gap_bps:
            return "far from mark price"  # nan, no mark, is far from nothing
        if self.is_stopped:
            return "drawdown limit"
        return "warming up" if len(market.returns_bps) < WARMUP_RETURNS else ""

    def decide(self, time_ns: int) -> None:
        """Measure, choose, quote, log; the next decision is due an interval later."""
        if self.is_cut_off and self.last_guard == "outage":
            return
        p, market, account = self.parameters, self.market, self.account
        view, tick_size = market.book.view, self.instrument.tick_size

        # Mark the inventory, and measure the depth of a book that can be trusted.
        account.peak_equity = max(account.peak_equity, account.equity)
        mid_ticks = self._mark(view, time_ns)
        is_sound = not (market.lost or view.fault)
        for side in SIDES:
            market.depths[side] = market.book.depth(side, p.depth_band_bps) if is_sound else NAN

        # Is there a reason to stay out? A book that has fallen silent is measured anew.
        reason = self.last_guard = self._guard(view, time_ns)
        was_stale = self.is_stale
        self.is_stale = time_ns - market.book_recv_ns >= round(p.stale_after_s * NS)
        if self.is_stale and not was_stale:
            market.restart()

        # What to quote: distances from the mid, then levels and quantities.
        source, distances, wanted = "none", None, {BID: (None, 0.0), ASK: (None, 0.0)}
        if not reason:
            distances = self._choose(time_ns)
            source = distances.source
            wanted, reason = self._place(distances, mid_ticks)
        elif self.is_stopped and not market.lost:
            self.exchange.flatten(time_ns)
        sent = [self.exchange.send(side, *order, time_ns) for side, order in wanted.items()]

        # Write it down.
        best = [side * view.best(side) * tick_size if is_sound else NAN for side in SIDES]
        quote = []
        for side, (level, qty) in wanted.items():
            quote += [NAN if level is None else side * level * tick_size, qty]
        spread = distances and distances.base_spread
        terms = spread[:3] if spread else (NAN, NAN, NAN)
        self.decision = Decision(
            time_ns, account.mid_price if is_sound else NAN, *best, *quote,
            spread.total_bps if spread else NAN, market.volatility, market.ema_volatility,
            *market.depths.values(), market.liquidity, account.inventory, account.cash,
            account.equity, account.fees_paid, *terms, source, reason, any(sent), distances,
        )  # fmt: skip
        self.due_ns = time_ns + round(opt.get_optimization_frequency(p, market.ema_volatility) * NS)
        self.sources[source] += 1
        self.reasons[reason] += 1
        if self.log is not None:
            self.log.write(log_row(self.decision, self.instrument.digits))
        self.history.add(self.decision)
        self.on_decision(self)

    def _choose(self, time_ns: int) -> Distances:
        """Distances from the mid, by the program or its fallbacks."""
        p, market, account = self.parameters, self.market, self.account
        q = min(max(account.inventory / p.max_inventory, -1.0), 1.0)
        depth_musd = sum(market.depths.values()) / 2 * account.mid_price * 1e-6
        measures = market.ema_volatility, market.liquidity, depth_musd
        good_ns, good = self.last_good
        distances = self.strategy(p, q, *measures, good, (time_ns - good_ns) / NS, self.solver)
        if distances.source == "lp":
            self.last_good = (time_ns, distances)
        return distances

    def _place(self, distances: Distances, mid: float) -> tuple[dict[int, tuple], str]:
        """(level or None, quantity) by side around a mid in ticks, and the reasons given."""
        p, lot = self.parameters, self.instrument.lot_size
        wanted, reasons = {}, [distances.reason] if distances.reason else []
        for side, name, bps in ((BID, "bid", distances.bid_bps), (ASK, "ask", distances.ask_bps)):
            # Rounded outward to the tick; post-only; and a price above 0.
            level = math.floor(side * mid - mid * bps * 1e-4 + 1e-9)
            level = min(level, -self.market.book.view.best(-side) - 1)
            level = max(level, 1) if side == BID else level
            # No more than a share of the depth, and within the inventory limit.
            qty = floor_to_lot(min(p.order_qty, p.max_depth_share * self.market.depths[side]), lot)
            why_not = ""
            if qty < self.instrument.min_order * (1 - 1e-9):
                why_not = "book too thin for a lot"
            elif side * self.account.inventory + qty > p.max_inventory + lot / 2:
                why_not = "inventory limit"
            wanted[side] = (None, 0.0) if why_not else (level, qty)
            if why_not:
                reasons.append(f"no {name}: {why_not}")
        return wanted, "; ".join(reasons)

    def finish(self) -> Decision:
        """The end: write down the account as the last message leaves it."""
        self._mark(self.market.book.view, self.last_ns)
        a = self.account
        account = dict(inventory=a.inventory, cash=a.cash, equity=a.equity, fees_paid=a.fees_paid)
        account |= dict(time_ns=self.last_ns, mid_price=a.mid_price)
        self.decision = self.decision._replace(**account)
        self.history.add(self.decision)
        return self.decision


# ---- Display -----------------------------------------------------------------------

SCREEN = """\
{title}   {moment} UTC
paper trading: no order is ever sent

Market         bid {best_bid}   ask {best_ask}   last {last}   mark {mark} USDT
               depth {bid_depth:.2f} / {ask_depth:.2f} {coin} within {band:g} bps
               volatility {volatility:.2f} (EMA {ema_volatility:.2f}) bps/sqrt(s)
               liquidity {liquidity:.2f} M USDT per bp
Our quote      bid {bid_price} x {bid_qty:g}, {bid_bps:.2f} bps away
               ask {ask_price} x {ask_qty:g}, {ask_bps:.2f} bps away
               source {source}{reason}
Base spread    {base_spread_bps:.2f} bps = volatility {volatility_bps:.2f} + liquidity \
{liquidity_bps:.2f} + depth {depth_bps:.2f}
               at least {edge:g}: no quote nearer to the mid
At the margin  {margin}
{account}
Feed           {health}

{notice}"""
LINE = "{moment}  mid {mid}  quote {bid_price} / {ask_price}  {source}{reason}  net {equity:+.2f}"
ACCOUNT = """\
Inventory      {inventory:+g} {coin} of at most {limit:g}   {fills} fills{last_fill}
Result, USDT   gross {gross:+.2f}   fees {fees:.2f}   net {equity:+.2f}
               gross = spread captured {captured:+.2f} + revaluation {revaluation:+.2f}"""
SUMMARY = """\
{title}
Span           {first} to {moment} UTC   {messages} messages
Decisions      {sources}
Reasons        {reasons}
Orders         {orders}
{account}
               turnover {turnover:,.0f}   the sum is off by {residual:.0e}"""


def describe(maker: MarketMaker) -> dict[str, Any]:
    """What the screens tell of the market maker, by the names in their braces."""
    d, a, p, market = maker.decision, maker.account, maker.parameters, maker.market
    view, tick_size, digits = market.book.view, maker.instrument.tick_size, maker.instrument.digits
    told = d._asdict() | dict(
        coin=maker.instrument.base_coin, band=p.depth_band_bps, edge=p.min_half_spread_bps,
        limit=p.max_inventory, inventory=a.inventory, equity=a.equity, gross=a.gross,
        fees=a.fees_paid, captured=a.spread_captured, revaluation=a.revaluation,
        fills=len(a.fills), last_fill="", turnover=a.turnover, residual=a.residual,
        messages=maker.messages, first=clock_text(maker.first_ns), moment=clock_text(maker.last_ns),
        sources=list_counts(maker.sources), reasons=list_counts(maker.reasons),
        orders=list_counts(maker.exchange.counts), margin="-",
    )  # fmt: skip
    is_sound = not (market.lost or view.fault)
    best = [side * view.best(side) * tick_size if is_sound else NAN for side in SIDES]
    prices = dict(best_bid=best[0], best_ask=best[1], last=view.last_price, mark=view.mark_price,
                  bid_price=d.bid_price, ask_price=d.ask_price)  # fmt: skip
    told |= {name: f"{price:,.{digits}f}" for name, price in prices.items()}
    told["mid"] = f"{a.mid_price:,.{digits + 1}f}"
    for name, price in (("bid", d.bid_price), ("ask", d.ask_price)):
        told[f"{name}_bps"] = abs(price / d.mid_price - 1) * 1e4
    warmth = f" ({len(market.returns_bps)} of {WARMUP_RETURNS} s)"
    more = {"book lost": f" ({market.lost})", "warming up": warmth}.get(d.reason, "")
    told["reason"] = f": {d.reason}{more}" if d.reason else ""
    if a.fills:
        last, verb = a.fills[-1], "bought" if a.fills[-1].side == BID else "sold"
        told["last_fill"] = f"   last: {verb} {last.qty:g} at {last.price:,.{digits}f}"
    if d.distances and d.distances.solution:
        told["margin"] = in_words(d.distances.solution, p.order_qty / p.max_inventory)
    return told | dict(account=ACCOUNT.format(**told))


def list_counts(counts: Counter) -> str:
    """How often what, in a line."""
    return "   ".join(f"{n} {what}" for what, n in counts.items() if what) or "none"


def in_words(solution: opt.Solution, order_share: float) -> str:
    """What spread, edge and inventory cost at the margin, relative to the quote's cost C.

    order_share: one order as a share of max_inventory.
    """
    prices = {
        "1 % more spread": 0.01 * solution.spread_price,
        "bid 1 % of S beyond its edge": 0.01 * solution.bid_edge_price,
        "ask 1 % of S beyond its edge": 0.01 * solution.ask_edge_price,
        "one order more bought": solution.inventory_price * order_share,
    }
    words = [f"{what}: {100 * price / solution.cost:+.1f} %"
             for what, price in prices.items() if abs(price) > 1e-9]  # fmt: skip
    return "cost of the quote, " + "   ".join(words)


# ---- Pictures ----------------------------------------------------------------------
#
# A panel is a function of an axes and of columns over x, such as those of a History. The
# same panels serve here and in backtest.py.

BLACK, BLUE, RED, GREEN = "black", "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's, which
SKY, YELLOW, PINK = "#56B4E9", "#F0E442", "#CC79A7"  # colour-blind readers can tell apart
Panel = Callable[[Any], None]


def finish_panel(ax: Any, title: str, label: str) -> None:
    """Title at the left, legend beside it, above the data; unit at the axis."""
    ax.set_title(title, loc="left", fontsize=10, fontweight="bold")
    ax.set_ylabel(label)
    ax.margins(x=0.01)
    ax.grid(alpha=0.25, linewidth=0.5)
    ax.legend(loc="lower right", bbox_to_anchor=(1.01, 0.985), ncols=6, frameon=False,
              fontsize=8.5, handlelength=1.3, columnspacing=1.0, borderpad=0.2)  # fmt: skip


def plot_steps(ax: Any, x: np.ndarray, lines: Sequence[tuple[np.ndarray, str, str, float]]) -> None:
    """Values that hold until the next, each with its label, its colour, its width."""
    for values, label, color, width in lines:
        ax.step(x, values, where="post", label=label, color=color, linewidth=width)
    ax.axhline(0, color="grey", linewidth=0.6)


def plot_prices(ax: Any, c: Mapping[str, np.ndarray], fills: list[Fill], at: np.ndarray) -> None:
    """Mid, our quotes, and where they were filled; `at` is x of each fill."""
    prices = np.array([fill.price for fill in fills])
    ax.plot(c["x"], c["mid_price"], color=BLACK, linewidth=0.9, label="mid", zorder=4)
    for side, name, verb, color, marker in (
        (BID, "bid", "bought", BLUE, "^"), (ASK, "ask", "sold", RED, "v"),
    ):  # fmt: skip
        ax.step(c["x"], c[f"{name}_price"], where="post", color=color, linewidth=0.6, alpha=0.6,
                label=f"our {name}")  # fmt: skip
        is_ours = np.array([fill.side == side for fill in fills], bool)
        ax.scatter(at[is_ours], prices[is_ours], color=color, marker=marker, zorder=5,
                   s=30 if len(fills) < 300 else 15, edgecolors="white", linewidths=0.3,
                   label=f"{verb} ({is_ours.sum():,})")  # fmt: skip
    ax.ticklabel_format(axis="y", useOffset=False)
    finish_panel(ax, "Price", "USDT")


def plot_inventory(ax: Any, c: Mapping[str, np.ndarray], limit: float, coin: str) -> None:
    """What we hold, between the limits."""
    ends = np.full(len(c["x"]), limit)
    plot_steps(ax, c["x"], [(c["inventory"], "held", BLACK, 0.9), (ends, "limit", RED, 1.0),
                            (-ends, "", RED, 1.0)])  # fmt: skip
    finish_panel(ax, "Inventory", coin)


def plot_result(ax: Any, c: Mapping[str, np.ndarray]) -> None:
    """Gross, fees and net; the shade reaches from net up to its peak so far."""
    net, fees = c["equity"], c["fees_paid"]
    peak = np.maximum.accumulate(np.append(0.0, net))[1:]
    ax.fill_between(c["x"], net, peak, color=SKY, alpha=0.3, linewidth=0, label="drawdown")
    plot_steps(ax, c["x"], [(net + fees, "gross", GREEN, 1.2), (-fees, "- fees", PINK, 1.2),
                            (net, "= net", BLACK, 1.2)])  # fmt: skip
    finish_panel(ax, "Result", "USDT")


def plot_rows(maker: MarketMaker, c: dict[str, np.ndarray]) -> list[tuple[float, list[Panel]]]:
    """Prices, inventory and result of a run over its minutes, `x` of the history's columns."""
    fills, first_ns, minute_ns = maker.account.fills, maker.first_ns, 60 * NS
    c["x"] = (c["time_ns"] - first_ns) / minute_ns
    at = np.array([fill.recv_ns - first_ns for fill in fills]) / minute_ns
    limit, coin = maker.parameters.max_inventory, maker.instrument.base_coin
    return [
        (4.4, [partial(plot_prices, c=c, fills=fills, at=at)]),
        (1.8, [partial(plot_inventory, c=c, limit=limit, coin=coin)]),
        (2.8, [partial(plot_result, c=c)]),
    ]


def draw_figure(
    rows: Sequence[tuple[float, list[Panel]]], title: str, path: Path | None, shared: int = 0
) -> None:
    """Rows of one panel or two, each with its height in inches, as a PNG; on the screen
    without a path. So many rows on top share their x axis.
    """
    import matplotlib  # slow to import

    if path:
        matplotlib.use("Agg")
    from matplotlib import pyplot

    heights, panels = zip(*rows)
    names = [[f"{k} 0", f"{k} {len(row) - 1}"] for k, row in enumerate(panels)]
    size = dict(height_ratios=heights, figsize=(8.8, sum(heights)), layout="constrained")
    figure, axes = pyplot.subplot_mosaic(names, **size)
    figure.suptitle(title, fontsize=12)
    for name, ax in axes.items():
        row, column = map(int, name.split())
        panels[row][column](ax)
    for k in range(1, shared):
        axes[f"{k} 0"].sharex(axes["0 0"])
        axes[f"{k - 1} 0"].tick_params(labelbottom=False)
    if path:
        feed.write_whole(path, partial(figure.savefig, dpi=150, format="png"))
    else:
        pyplot.show()
    pyplot.close(figure)


# ---- Running -----------------------------------------------------------------------


def read_parameters(path: Path | None) -> dict[str, Any]:
    """The values in FILE.json of --params; UserError unless it holds a JSON object."""
    if path is None:
        return {}
    try:
        values = json.loads(path.read_text())
        if isinstance(values, dict):
            return values
        raise ValueError('it must hold one JSON object such as {"alpha": 2}')
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--params {path}: {error}") from None


def given_parameters(options: argparse.Namespace) -> dict[str, Any]:
    """What the user set: the flags before the file."""
    flags = {name: getattr(options, name) for name in opt.FIELDS}
    given = {name: value for name, value in flags.items() if value is not None}
    return {**read_parameters(options.params), **given}


def choose_parameters(given: Mapping[str, Any], start: Mapping[str, Any],
                      instrument: feed.Instrument) -> Parameters:  # fmt: skip
    """The user's parameters before those of a recording's start line before the defaults."""
    try:
        values = {**start.get("parameters", {}), **given}
        return opt.change_parameters(Parameters(), values, instrument.min_order)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None


class Session:
    """One run as its user sees it: the screen, the files, the edits of --params.

    source is the live feed, None in a replay.
    """

    def __init__(self, options: argparse.Namespace, maker: MarketMaker, title: str,
                 parser: feed.Parser, source: feed.LiveFeed | None = None) -> None:  # fmt: skip
        self.options, self.maker, self.title = options, maker, title
        self.parser, self.source, self.stream = parser, source, sys.stdout
        self.files = [file for file in (maker.log, source and source.recorder) if file]
        self.accepted = read_parameters(options.params)  # of --params
        self.edited_ns = options.params.stat().st_mtime_ns if options.params else 0
        self.next_look_s = self.next_show_s = 0.0
        self.lags_ns: deque[int] = deque(maxlen=300)  # of late, receive minus exchange time
        self.has_begun, self.notice = False, ""

    def run(self, bursts: Iterator[list[feed.Message]]) -> None:
        """Take every message (their source looks around in between); close all files."""
        maker = self.maker
        try:
            for messages in bursts:
                maker.take(*messages)
        finally:
            if self.source:
                self.source.stop()
            for file in self.files:
                file.close()
        maker.finish()
        if self.stream.isatty():
            self.show()
        print(SUMMARY.format(title=self.title, **describe(maker)), file=self.stream)
        if self.options.plot and maker.messages:
            rows = plot_rows(maker, maker.history.columns())
            title = f"{self.title}\nminutes since {clock_text(maker.first_ns)} UTC"
            draw_figure(rows, title, self.options.plot, shared=len(rows))

    def look(self) -> None:
        """A few times a second: the disk, the feed, the parameter file, the screen."""
        now_s, market, view = time.monotonic(), self.maker.market, self.maker.market.book.view
        if now_s < self.next_look_s:
            return
        self.next_look_s = now_s + TICK_S
        self.lags_ns.append(market.book_recv_ns - market.book.exch_ns)
        for file in self.files:
            if file.failure:
                self.notice = f"DISK: {file.failure}"
        if self.source:
            self.source.tend()
            if self.options.params:
                self.read_edits(self.options.params)
            if view.fault and not market.lost:
                self.source.cut(f"resync: {view.fault}")
        if now_s >= self.next_show_s:
            self.next_show_s = now_s + (0.25 if self.stream.isatty() else 1.0)
            self.show()

    def read_edits(self, path: Path) -> None:
        """A sound edit becomes a line of the session; another is refused with a notice."""
        maker = self.maker
        try:
            stamp_ns = path.stat().st_mtime_ns
            if stamp_ns == self.edited_ns:
                return
            self.edited_ns, values = stamp_ns, read_parameters(path)
            edits = {n: v for n, v in values.items() if self.accepted.get(n, INF) != v}
            min_order = maker.instrument.min_order
            p = opt.change_parameters(maker.parameters, edits, min_order, running=True)
        except (UserError, OSError, ValueError, TypeError) as error:
            self.notice = f"edit of {path} refused: {error}"
        else:
            self.accepted = values
            self.source.emit(feed.control_line("params", parameters=dataclasses.asdict(p)))
            self.notice = f"parameters changed: {edits}"

    def show(self) -> None:
        """In place on a terminal; else the title, and then a line each time."""
        told, text = describe(self.maker), "" if self.has_begun else self.title + "\n"
        if self.stream.isatty():
            columns, rows = shutil.get_terminal_size((80, 24))
            told |= dict(title=self.title, health=self.health())
            told["notice"] = self.notice or "Ctrl-C ends the run with a summary"
            lines = SCREEN.format(**told).replace("nan", "-").splitlines()
            text = "\x1b[H" if self.has_begun else "\x1b[2J\x1b[H"
            text += "".join(f"{line[:columns]}\x1b[K\n" for line in lines[: rows - 1]) + "\x1b[J"
        elif self.maker.messages:
            text += f"{LINE.format(**told).replace('nan', '-')}  {self.notice}\n"
            self.notice = ""
        else:
            return
        self.has_begun = True
        self.stream.write(text)
        self.stream.flush()

    def health(self) -> str:
        """The feed in words: age, reconnects, gaps, lag, and what went wrong."""
        source, parser, items = self.source, self.parser, []
        if source:
            age_s = (source.clock_ns() - source.last_frame_ns) / NS
            items.append(f"last frame {age_s:.1f} s ago" if source.ws else "NOT CONNECTED")
            items.append(f"{source.reconnects} reconnects")
        items.append(f"{self.maker.messages:,} messages")
        items += [f"{parser.counts[name]} {name}" for name in ("gaps", "malformed")]
        lag_ms = (statistics.median(self.lags_ns or [0]) - self.maker.exchange.offset_ns) / MS
        is_odd = not 0 <= lag_ms <= MAX_LAG_MS
        items.append(f"lag {lag_ms:.0f} ms" + ": see --clock-offset-ms" * is_odd)
        if source and source.recorder:
            items.append(source.recorder.failure or f"recording to {self.options.record}")
        if parser.problem:
            items.append(f"\n               last problem: {parser.problem}")
        return "   ".join(items)


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
        session.look()
    source.stop()
    source.emit(feed.control_line("end"))
    yield [source.queue.get() for _ in range(source.queue.qsize())]
    if source.fatal:
        raise UserError(source.fatal)


def replayed_messages(session: Session, recording: feed.Recording,
                      speed: float) -> Iterator[list[feed.Message]]:  # fmt: skip
    """The messages of a recording at a multiple of their own pace (inf: no waiting)."""
    stop, began_s, first_ns, burst = feed.StopSignal(), time.monotonic(), 0, []
    for message in recording.messages():
        first_ns = first_ns or message.recv_ns
        elapsed_s = (message.recv_ns - first_ns) / NS
        if elapsed_s > session.options.duration:
            break
        while (wait_s := began_s + elapsed_s / speed - time.monotonic()) > 0 and not stop.is_set:
            session.look()
            time.sleep(min(wait_s, TICK_S))
        if stop.is_set:
            break
        burst.append(message)
        if speed < INF or len(burst) == BURST:
            session.look()
            yield burst
            burst = []
    yield burst


def run_live(options: argparse.Namespace, clock_ns: Callable[[], int] | None = None) -> None:
    """Paper trading on the live feed; the bundled sample where there is no network."""
    steps, market = (options.tick_size, options.lot_size), (options.symbol, options.category)
    instrument = feed.find_instrument(*market, *steps, ask=not options.url)
    given, where = given_parameters(options), options.url or "Bybit"
    parameters = choose_parameters(given, {}, instrument)
    start, depth = dataclasses.asdict(parameters), options.depth or feed.DEPTHS[0]
    where_to = options.url, options.record, clock_ns
    try:
        source = feed.open_feed(instrument, depth, *where_to, parameters=start)
    except (OSError, websocket.WebSocketException) as error:
        reason = f"{where} cannot be reached ({error})"
        if options.live or options.url or options.record or market != ("BTCUSDT", "linear"):
            raise UserError(f"{reason}: check the network, or give --replay FILE") from None
        print(f"{reason}: replaying the bundled synthetic sample instead", file=sys.stderr)
        return run_replay(options, SAMPLE, options.speed or SAMPLE_SPEED, "OFFLINE REPLAY")
    maker = MarketMaker(parameters, instrument, open_log(options))
    title = f"{instrument.symbol} {instrument.category}   LIVE from {where}"
    session = Session(options, maker, title, source.parser, source)
    session.run(live_messages(session, source))


def run_replay(options: argparse.Namespace, path: Path, speed: float, label: str) -> None:
    """Paper trading on a recording."""
    if options.record:
        raise UserError("--record records the live feed: leave it out with --replay")
    recording = feed.open_recording(path, options.tick_size, options.lot_size, options.depth)
    instrument, given = recording.parser.instrument, given_parameters(options)
    parameters = choose_parameters(given, recording.start, instrument)
    maker = MarketMaker(parameters, instrument, open_log(options), given)
    data = "SYNTHETIC data" if recording.is_synthetic else path.name
    pace = "" if speed == INF else f" at {speed:g} x"
    title = f"{instrument.symbol} {instrument.category}   {label}{pace} of {data}"
    session = Session(options, maker, title, recording.parser)
    session.run(replayed_messages(session, recording, speed))


def open_log(options: argparse.Namespace) -> feed.GrowingFile | None:
    """The file of --log; and a picture must have a folder, before the work and not after it."""
    if options.plot and not options.plot.absolute().parent.is_dir():
        raise UserError(f"--plot {options.plot} cannot be written: choose a file in a folder")
    return feed.GrowingFile(options.log) if options.log else None


# ---- Command line ------------------------------------------------------------------


def add_parameter_flags(parser: argparse.ArgumentParser) -> None:
    """--params, and a flag for every parameter, with unit and range; unset means the default."""
    group = parser.add_argument_group("parameters")
    group.add_argument("--params", type=Path, metavar="FILE.json",
                       help="parameters; a live run reads it again when edited")  # fmt: skip
    for name, parameter in opt.FIELDS.items():
        rule, default, kind = parameter.metadata, parameter.default, dict(type=str)
        span, default = "", "off" if default is None else default
        if "choices" in rule:
            kind["choices"] = rule["choices"]
        else:
            kind, span = dict(type=float, metavar="X"), f", {rule['low']:g} to {rule['high']:g}"
        text = f"{rule['help']}{span} (default {default})"
        group.add_argument("--" + name.replace("_", "-"), help=text, **kind)


def build_arguments() -> argparse.ArgumentParser:
    """The command line of `python marketmaker.py`."""
    what = "Paper market maker on Bybit's live data, or on a recording. No order is sent."
    parser = feed.Arguments(prog="marketmaker.py", description=what)
    source, add = parser.add_mutually_exclusive_group(), parser.add_argument
    source.add_argument("--live", action="store_true", help="insist on the live feed")
    source.add_argument("--replay", type=Path, metavar="FILE", help="replay a recording")
    add("--speed", type=feed.positive, metavar="X|max", help="of a replay (default 1)")
    add("--duration", type=feed.positive, default=INF, metavar="SECONDS",
        help="end after so many seconds of receive time")  # fmt: skip
    add("--record", type=Path, metavar="FILE", help="record the live session")
    add("--log", type=Path, metavar="FILE", help="every decision as CSV")
    add("--plot", type=Path, metavar="FILE.png", help="a picture at the end")
    feed.add_market_flags(parser)
    add_parameter_flags(parser)
    return parser


def main(arguments: list[str] | None = None, clock_ns: Callable[[], int] | None = None) -> int:
    """python marketmaker.py; the exit status. clock_ns replaces the session's clock."""
    options = build_arguments().parse_args(arguments)

    def run() -> None:
        if options.replay:
            run_replay(options, options.replay, options.speed or 1.0, "REPLAY")
        else:
            run_live(options, clock_ns)

    return feed.exit_cleanly(run)


if __name__ == "__main__":
    sys.exit(main())
