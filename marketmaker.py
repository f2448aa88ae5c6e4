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
has the same rules once more, row by row, in plain dicts: `simulate`.)

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

The words, the same in all files. A message is *received* by the feed and *heard* by the
market maker; the exchange *matches* messages with our *orders*; an order is *sent*,
*arrives*, is *refused*, or *filled*; a fill is *settled* in the *account*; the inventory is
*marked* to the mid; the maker *decides*, and a *decision* says what to *quote*.

Units: prices USDT at the edges, integer ticks inside; sizes and inventory base coin;
spreads and volatility bps of the mid; time int ns. Fees are positive when we pay.
Not modelled: funding. Our own impact and outages: only if backtest.py asks for them.
"""

from __future__ import annotations

import argparse
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
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import websocket
from scipy.optimize import linprog

import feed
from feed import (
    ASK,
    BID,
    CONTROL,
    DELTA,
    LOST,
    MS,
    NEVER,
    NO_LEVEL,
    NS,
    SIDES,
    SNAPSHOT,
    TICKER,
    TRADES,
    Book,
    Instrument,
    Message,
    Tape,
    UserError,
    View,
    build_tape,
    clock_text,
)
from optimize import (
    FIELDS,
    INF,
    Distances,
    Parameters,
    Solution,
    change_parameters,
    choose_distances,
    get_optimization_frequency,
)

WINDOW_S = 60  # of the volatility and the liquidity
WARMUP_RETURNS = 10  # no quote before so many 1 s returns
LOOK_AHEAD = 512  # messages, for the next one that is due
LATE_NS = 10 * NS  # no trade is heard of later than this
IMPACT_HALF_LIFE_S = 30.0  # of the shift that our own fills cause
SAMPLE = Path(__file__).parent / "data" / "sample.jsonl.gz"
SAMPLE_SPEED = 10.0
MAX_LAG_MS, MAX_DRIFT_MS = 2000.0, 500.0  # a lag beyond, or so far from the first, is warned of
BURST = 500  # messages taken at once in a replay without pauses
GATHER_S = 0.001  # after a message, so that a burst makes one tape and few changes of thread
TICK_S = 0.1  # how long the main thread waits for a message before it looks around


# ---- What is known of the market ---------------------------------------------------


@dataclass
class Market:
    """What is measured from the market, on our clock. nan = not known yet."""

    book: Book = field(default_factory=Book)
    lost: str = "no book yet"  # why the book cannot be trusted; empty: it can
    book_recv_ns: int = 0  # when the last book message was received
    volatility: float = math.nan  # bps/sqrt(s), over the last minute
    ema_volatility: float = math.nan  # bps/sqrt(s)
    liquidity: float = math.nan  # million USDT traded per bp of mid movement
    bid_depth: float = math.nan  # base coin within depth_band_bps of the mid
    ask_depth: float = math.nan
    returns_bps: deque = field(default_factory=partial(deque, maxlen=WINDOW_S))  # of 1 s
    turnovers: deque = field(default_factory=partial(deque, maxlen=WINDOW_S))  # M USDT a s
    grid_mid: float = math.nan  # USDT, the mid at the last whole second
    ema_ns: int = 0  # when ema_volatility was last renewed

    def measure_second(
        self, second_ns: int, mid_price: float, turnover_musd: float, tick_size: float,
        half_life_s: float,
    ) -> None:  # fmt: skip
        """One whole second of receive time has passed: volatility, its EMA, liquidity.

        volatility = root mean square of the 1 s log returns of the mid in the window;
        liquidity = turnover of the window / sum of the absolute returns (at least a tick).
        """
        previous, self.grid_mid = self.grid_mid, mid_price
        if math.isnan(previous):
            return
        self.returns_bps.append(1e4 * math.log(mid_price / previous))
        self.turnovers.append(turnover_musd)
        if len(self.returns_bps) < WARMUP_RETURNS:
            return
        self.volatility = math.hypot(*self.returns_bps) / math.sqrt(len(self.returns_bps))
        dt_s, self.ema_ns = (second_ns - self.ema_ns) / NS, second_ns
        self.ema_volatility = exponential_average(
            self.ema_volatility, self.volatility, dt_s, half_life_s
        )
        moved_bps = max(sum(map(abs, self.returns_bps)), 1e4 * tick_size / mid_price)
        self.liquidity = sum(self.turnovers) / moved_bps

    def restart(self) -> None:
        """After a loss or a silence the grid of seconds begins anew; the EMA is kept."""
        self.grid_mid = self.volatility = self.liquidity = math.nan
        self.returns_bps.clear()
        self.turnovers.clear()


def exponential_average(previous: float, value: float, dt_s: float, half_life_s: float) -> float:
    """EMA over uneven steps: the new value weighs 1 - 2^(-dt/half_life).

    >>> exponential_average(1.0, 3.0, dt_s=30, half_life_s=30)
    2.0
    """
    if math.isnan(previous):
        return value
    return value + (previous - value) * 2 ** (-dt_s / half_life_s)


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
    mid_price: float = math.nan  # the last mid that it was marked to
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


# ---- Paper exchange ----------------------------------------------------------------


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
    has_arrived: bool = False
    queue_ahead: float = math.inf  # base coin; inf where nothing can be seen
    queue_at_arrival: float = math.inf
    eaten: float = 0.0  # of the queue, by trades
    next_message: int = 0  # of the tape

    def stands_at(self, exch_ns: int) -> bool:
        """Market data go before orders at equal times."""
        return self.has_arrived and self.arrival_ns < exch_ns <= self.cancel_ns

    def shorten_queue(self, shown: float, exch_ns: int) -> None:
        """A book row says what is shown at our price."""
        if exch_ns <= self.arrival_ns:
            # subtle: a row from before the arrival, heard of after it
            self.queue_ahead = max(shown - self.eaten, 0.0)
        elif exch_ns <= self.cancel_ns:
            self.queue_ahead = min(self.queue_ahead, shown)


class PaperExchange:
    """Matches the market's messages, on the exchange's clock, against our orders.

    `orders` holds all that a message may still meet, cancelled ones included: a trade can be
    heard of after its order was replaced. `sent` is the last order sent to each side that
    as far as we know still stands. peer_rules is for comparison with hftbacktest: an order
    fills whole or not at all, and a level that leaves the window counts as cancelled.
    """

    def __init__(
        self, parameters: Parameters, instrument: Instrument, book: Book, account: Account,
        participation: float = 1.0, peer_rules: bool = False, impact_bps: float = 0.0,
    ) -> None:  # fmt: skip
        self.parameters, self.instrument = parameters, instrument
        self.book, self.account = book, account
        self.participation, self.peer_rules = participation, peer_rules
        self.impact_bps = impact_bps
        self.shifts = [(0, 0.0)]  # (exchange time, shift of the prices we see after it, bps)
        self.back_ns = 0  # cut off until then: we hear of nothing and nothing hears of us
        self.offset_ns = round(parameters.clock_offset_ms * MS)  # our clock - exchange's
        self.latency_ns = round(parameters.order_latency_ms * MS) - self.offset_ns
        self.orders: list[Order] = []
        self.sent: dict[int, Order | None] = {BID: None, ASK: None}
        self.flatten_ns = NEVER  # arrival of a taker order that closes the inventory
        self.trade_ns = 0  # exchange time of the last trade
        self.reach: dict[int, np.ndarray] = {}  # of the tape, by side: see `begin`
        self.counts: Counter[str] = Counter()

    # -- orders

    def send(self, side: int, level: int | None, qty: float, time_ns: int) -> bool:
        """Ask for one order at a level (None: for none), decided at time_ns.

        Unchanged against the last one sent, the order keeps its place. Otherwise cancel
        and new order arrive at one instant. True if anything was sent or cancelled.
        """
        standing = self.sent[side]
        if time_ns < self.back_ns or (standing is None and level is None):
            return False
        if standing is not None and (standing.level, standing.qty) == (level, qty):
            return False
        arrival_ns = time_ns + self.latency_ns
        if standing is not None:
            standing.cancel_ns, self.sent[side] = arrival_ns, None
        if level is not None:
            self.sent[side] = Order(side, level, qty, left=qty, arrival_ns=arrival_ns)
            self.orders.append(self.sent[side])
            self.counts["sent"] += 1
        return True

    def flatten(self, time_ns: int) -> None:
        """Send a taker order that closes the inventory, unless one is under way."""
        if self.flatten_ns == NEVER and self.account.inventory and time_ns >= self.back_ns:
            self.flatten_ns = time_ns + self.latency_ns

    def _drop(self, order: Order) -> None:
        self.orders.remove(order)
        if self.sent[order.side] is order:
            self.sent[order.side] = None

    # -- slices of messages

    def begin(self, tape: Tape) -> None:
        """A tape is to come. Of each message, how far it comes towards our orders of a side:
        by the opposite best, or by a trade that hits this side; as a level of this side.
        """
        is_event, has_trades = tape.exch_ns > 0, np.diff(tape.first_trade) > 0
        for side in SIDES:
            reach = np.where(is_event, -tape.best(-side), -NO_LEVEL)
            if len(tape.trade_level):
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
        """The first of messages start..stop-1 that comes after the arrival of an order, or
        reaches one that has arrived, or is a snapshot; else stop.
        """
        if tape.kind[start] == SNAPSHOT:
            return start
        arrivals = {order.arrival_ns for order in self.orders if not order.has_arrived}
        for arrival_ns in arrivals | {self.flatten_ns}:
            if arrival_ns < NEVER:
                stop = _first(tape.exch_ns[start:stop] > arrival_ns, start, stop)
        for side in SIDES:
            levels = [o.level for o in self.orders if o.side == side and o.has_arrived]
            if levels:
                stop = _first(self.reach[side][start:stop] <= max(levels), start, stop)
        return stop

    def end(self, tape: Tape) -> None:
        """The tape ends: what it says of our queues is looked at before it goes."""
        for order in self.orders:
            self._catch_up(order, tape, len(tape))
            order.next_message = 0
        if len(tape.trade_ns):
            self.trade_ns = tape.trade_ns.item(-1)

    # -- one message and our orders

    def _meet(self, tape: Tape, m: int) -> None:
        """Trades meet the book as it stood just before message m, book rows just after."""
        exch_ns, recv_ns = tape.exch_ns.item(m), tape.recv_ns.item(m)
        mid_price = self.book.view.mid_ticks * self.instrument.tick_size
        tell = partial(self._settle, recv_ns=recv_ns, mid_price=mid_price)
        self._forget(tape, m, recv_ns)

        # Who has arrived by then meets the book as it stands, unless it would take.
        if self.flatten_ns < exch_ns:
            self._walk_the_book(tell)
        for order in [o for o in self.orders if not o.has_arrived and o.arrival_ns < exch_ns]:
            order.has_arrived, order.next_message = True, m
            if why := self._objection(order):
                self._refuse(order, why)
            else:
                order.queue_ahead = order.queue_at_arrival = self._shown(order)

        if tape.kind[m] == TRADES:
            for order in self.orders:
                self._catch_up(order, tape, m)
            for t in range(tape.first_trade.item(m), tape.first_trade.item(m + 1)):
                self._meet_trade(tape, m, t, tell)
            return

        # A book message: does it shorten our queue, or reach our price?
        if tape.kind[m] == SNAPSHOT:
            self.book.clear()
        self.book.apply(tape, m, m + 1)
        for order in [o for o in self.orders if o.has_arrived]:
            self._catch_up(order, tape, m + 1)
            if tape.kind[m] == SNAPSHOT:  # it tells of every level
                order.shorten_queue(self._shown(order), exch_ns)
            if self._is_reached(order):
                if exch_ns <= order.arrival_ns:
                    self._refuse(order, "would take")
                elif exch_ns <= order.cancel_ns:
                    self._fill(order, order.left, exch_ns, tell)

    def _meet_trade(self, tape: Tape, m: int, t: int, tell: Callable) -> None:
        """Trade t of message m: through our price it fills us; at our price, by the model."""
        exch_ns, level = tape.trade_ns.item(t), tape.trade_level.item(t)
        size, is_rpi = tape.trade_size.item(t), tape.trade_is_rpi.item(t)
        model = "none" if is_rpi else self.parameters.fill_model
        if exch_ns < tape.recv_ns.item(m) - self.offset_ns - LATE_NS:
            return
        for order in self.orders:
            is_hit = order.side * level > 0 and level <= order.level
            if not (is_hit and order.stands_at(exch_ns)):
                continue
            if level < order.level or model == "touch":
                self._fill(order, order.left, exch_ns, tell)
            elif model == "queue" and (self.peer_rules or exch_ns > self.book.exch_ns):
                # The trade is not yet in the size shown: first the queue ahead, then us.
                order.queue_ahead = min(order.queue_ahead, self._shown(order))
                rest, lot = size - order.queue_ahead, self.instrument.lot_size
                order.eaten += size
                if rest >= lot / 2:
                    share = floor_to_lot(rest * self.participation, lot)
                    qty = order.left if self.peer_rules else min(order.left, share)
                    self._fill(order, qty, exch_ns, tell)
                order.queue_ahead = max(-rest, 0.0)
            return  # one order stands at a time, and a volume fills us once

    def _catch_up(self, order: Order, tape: Tape, stop: int) -> None:
        """Rows at the order's price in the messages before stop that it has not looked at."""
        if not order.has_arrived:
            return
        first, last = tape.first_row.item(order.next_message), tape.first_row.item(stop)
        order.next_message = stop
        for row in (tape.level[first:last] == order.level).nonzero()[0].tolist():
            m = int(tape.first_row.searchsorted(first + row, "right")) - 1
            shown = tape.size.item(first + row)
            worst = tape.worst_bid if order.side == BID else tape.worst_ask
            if not shown and order.level < worst.item(m) and not self.peer_rules:
                shown = math.inf  # it has only left the window
            order.shorten_queue(shown, tape.exch_ns.item(m))

    def _forget(self, tape: Tape, m: int, recv_ns: int) -> None:
        """Drop orders that are over: before message m, trades and book have both gone past
        their end, or it is so long ago that no trade of then will be heard of.
        """
        last_trade = tape.first_trade.item(m) - 1
        trade_ns = tape.trade_ns.item(last_trade) if last_trade >= 0 else self.trade_ns
        passed_ns = max(min(trade_ns, self.book.exch_ns), recv_ns - self.offset_ns - LATE_NS)
        self.orders = [order for order in self.orders if order.cancel_ns >= passed_ns]

    def _is_reached(self, order: Order) -> bool:
        """Whether the opposite side's best is at or beyond our price."""
        return -self.book.view.best(-order.side) <= order.level

    def _objection(self, order: Order) -> str:
        """Why an order is refused at its arrival; empty if it is not."""
        if self._is_reached(order):
            return "would take"
        held = order.side * self.account.inventory + order.qty
        limit = self.parameters.max_inventory + self.instrument.lot_size / 2
        return "inventory limit" if held > limit else ""

    def _refuse(self, order: Order, why: str) -> None:
        self.counts[f"refused: {why}"] += 1
        self._drop(order)

    def _shown(self, order: Order) -> float:
        """The size displayed at our price; inf where nothing can be seen."""
        if self.peer_rules:
            return self.book.sizes.item(order.level)
        return self.book.shown(order.side, order.level)

    def _fill(self, order: Order, qty: float, exch_ns: int, tell: Callable) -> None:
        """The order is filled by a quantity, at its own price."""
        if qty <= 0:
            return
        tell(exch_ns, order.side, order.side * order.level, qty, self.parameters.maker_fee_bps,
             order.queue_ahead, order.queue_at_arrival, order.arrival_ns)  # fmt: skip
        order.left = round(order.left - qty, 9)
        if order.left <= 0:
            self._drop(order)

    def _walk_the_book(self, tell: Callable) -> None:
        """The taker order arrives: level by level until the inventory is closed."""
        arrival_ns, self.flatten_ns = self.flatten_ns, NEVER
        side, left = (ASK if self.account.inventory > 0 else BID), abs(self.account.inventory)
        for level, size in zip(*map(np.ndarray.tolist, self.book.levels(-side))):
            qty = min(left, size)
            if qty < self.instrument.lot_size / 2:
                break
            tell(arrival_ns, side, -side * level, qty, self.parameters.taker_fee_bps, 0.0, 0.0,
                 arrival_ns, True)  # fmt: skip
            left = round(left - qty, 9)

    def _settle(
        self, exch_ns: int, side: int, tick: int, qty: float, fee_bps: float, *of_the_order: Any,
        recv_ns: int, mid_price: float,
    ) -> None:  # fmt: skip
        """The one place where a fill is made: it is booked at the mid just before it."""
        account, price = self.account, tick * self.instrument.tick_size
        marked = account.mid_price  # perhaps at a whole second after the fill: go back, and on
        account.mark(mid_price * (1 + self.shift_bps(recv_ns) * 1e-4))
        fee, known_ns = price * qty * fee_bps * 1e-4, max(recv_ns, self.back_ns)
        account.settle(
            Fill(exch_ns, known_ns, side, price, qty, fee, account.mid_price, *of_the_order)
        )
        account.mark(marked)
        if self.impact_bps and self.depths[side] > 0:
            since_ns = max(exch_ns, self.shifts[-1][0])  # one heard of late counts from now
            moved_bps = side * self.impact_bps * qty / self.depths[side]
            self.shifts.append((since_ns, self.shift_bps(since_ns) - moved_bps))

    depths: Mapping[int, float] = {BID: math.nan, ASK: math.nan}  # as the last decision saw them

    def shift_bps(self, time_ns: int) -> float:
        """How far our own fills have moved the prices that we see, bps; it decays."""
        since_ns, shift = self.shifts[-1]
        return shift and shift * 2 ** (-max(time_ns - since_ns, 0) / (IMPACT_HALF_LIFE_S * NS))


def _first(holds: np.ndarray, start: int, stop: int) -> int:
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


# ---- Decisions ---------------------------------------------------------------------


class Decision(NamedTuple):
    """What was known and what was wanted: a row of the log, the plots, quotes.csv and the
    screen. nan = none, or not known.
    """

    time_ns: int = 0  # receive time
    mid_price: float = math.nan  # USDT; nan while the book cannot be trusted, like the next 2
    best_bid: float = math.nan
    best_ask: float = math.nan
    bid_price: float = math.nan  # our quote, USDT
    bid_qty: float = 0.0  # base coin
    ask_price: float = math.nan
    ask_qty: float = 0.0
    base_spread_bps: float = math.nan
    volatility: float = math.nan  # bps/sqrt(s)
    ema_volatility: float = math.nan
    bid_depth: float = math.nan  # base coin
    ask_depth: float = math.nan
    liquidity: float = math.nan  # million USDT per bp
    inventory: float = 0.0  # base coin
    cash: float = 0.0  # USDT
    equity: float = 0.0
    fees_paid: float = 0.0
    volatility_bps: float = math.nan  # the base spread's terms
    liquidity_bps: float = math.nan
    depth_bps: float = math.nan
    source: str = "none"  # lp, last_good, default, none, or a baseline
    reason: str = "no message yet"  # why not lp, or why a side is missing
    is_sent: bool = False  # whether it sent or cancelled an order
    distances: Distances | None = None


LOGGED = Decision._fields[: Decision._fields.index("fees_paid")] + ("source", "reason")
NUMBERS = Decision._fields[1 : Decision._fields.index("source")]


def log_row(decision: Decision, digits: int) -> str:
    """A line of the log; empty where nothing is known. digits: decimals of a price."""
    d = decision

    def text(value: float, form: str = ".9g") -> str:
        return "" if value != value else format(value, form)

    prices = [text(getattr(d, f"{s}_price"), f".{digits}f") for s in ("bid", "ask")]
    qtys = [text(qty) if price else "" for price, qty in zip(prices, (d.bid_qty, d.ask_qty))]
    cells = [
        str(d.time_ns), text(d.mid_price, f".{digits + 1}f"), text(d.best_bid, f".{digits}f"),
        text(d.best_ask, f".{digits}f"), prices[0], qtys[0], prices[1], qtys[1],
        *map(text, d[8:15]), f"{d.cash:.8f}", f"{d.equity:.8f}", d.source,
        d.reason.replace(",", ";").replace("\n", " "),
    ]  # fmt: skip
    return ",".join(cells) + "\n"


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


class MarketMaker:
    """Messages in, decisions out. Holds market, account, exchange and log."""

    def __init__(
        self, parameters: Parameters, instrument: Instrument, log: TextIO | None = None,
        overrides: Mapping[str, Any] | None = None, solver: Callable = linprog,
        strategy: Callable[..., Distances] = choose_distances, **exchange: Any,
    ) -> None:  # fmt: skip
        self.parameters, self.instrument, self.strategy = parameters, instrument, strategy
        self.overrides = dict(overrides or {})  # parameters that a recording cannot change
        self.solver, self.log = solver, log
        self.market, self.account = Market(), Account()
        self.exchange = PaperExchange(
            parameters, instrument, self.market.book, self.account, **exchange
        )
        self.decision = Decision()
        self.on_decision: Callable[[MarketMaker], None] = lambda maker: None
        self.last_good: tuple[int, Distances] | None = None  # (time_ns, distances)
        self.last_guard = "book lost"
        self.is_stale = False  # the book is silent
        self.is_stopped = False  # by max_drawdown_usdt, for good
        self.is_cut_off = False  # by an outage
        self.due_ns = 0  # the next decision
        self.second_ns = 0  # the next whole second of receive time
        self.tape: Tape | None = None  # of it, what message was
        self.heard = self.matched = 0  # the first not yet heard; not yet matched
        self.counted = 0  # the first trade not yet counted
        self.traded: list[float] = []  # of this second in tapes before, ticks x base coin
        self.first_ns = self.last_ns = self.messages = 0
        self.sources: Counter[str] = Counter()  # of decisions
        self.reasons: Counter[str] = Counter()
        self.lags_ns: deque[int] = deque(maxlen=300)  # receive minus exchange time
        if log:
            log.write(",".join(LOGGED) + "\n")

    # -- from message to message

    def take(self, *messages: Message) -> None:
        """Messages as they come."""
        if messages:
            self.follow(build_tape(messages))

    def follow(self, tape: Tape) -> None:
        """Hear messages until something is due; decide; go on."""
        self.tape, self.heard, self.matched, self.counted = tape, 0, 0, 0
        self.messages += len(tape)
        self.exchange.begin(tape)
        changes = [*(tape.kind > TICKER).nonzero()[0].tolist(), len(tape)]  # of the rules
        m = change = 0
        while m < len(tape):
            # What is due next: a decision, a whole second, or the end of our patience with a
            # silent book. And who comes first: a message as late as that, one that changes
            # the rules, or the book message that ends a silence?
            due_ns = min(self.due_ns, self.second_ns, self.silent_ns() + 1)
            while changes[change] < m:
                change += 1
            stop = min(changes[change], m + LOOK_AHEAD)
            if self.is_stale:
                stop = _first(tape.kind[m:stop] == DELTA, m, stop)
            m += int(tape.recv_ns[m:stop].searchsorted(due_ns))
            self._hear(m)
            if m == len(tape):
                break
            kind, now_ns = tape.kind.item(m), tape.recv_ns.item(m)
            if now_ns >= due_ns or kind > TICKER:
                self.pass_time(now_ns)

            # The message may change the rules; or it decides, itself included.
            is_back = self.is_stale and kind == DELTA
            if kind > TICKER:
                self._change_rules(m, kind, now_ns)
                m += 1
            elif is_back or now_ns >= self.due_ns:
                self._hear(m + 1)
                self.flush()
                self.decide(now_ns)
                m += 1
        self.flush()
        self.exchange.end(tape)
        self._count_trades()
        self.last_ns = max(self.last_ns, tape.recv_ns.item(-1))
        books = np.unique(tape.last_book[-2 * self.lags_ns.maxlen :])
        books = books[books >= 0][-self.lags_ns.maxlen :]
        lags_ns = tape.recv_ns[books] - tape.exch_ns[books] - self.exchange.offset_ns
        self.lags_ns.extend(lags_ns.tolist())

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

    def view(self) -> View:
        """What is known after all that was heard, whether it is matched or not."""
        is_matched = self.tape is None or self.matched == self.heard
        return self.market.book.view if is_matched else self.tape.view(self.heard - 1)

    def _change_rules(self, m: int, kind: int, now_ns: int) -> None:
        """A snapshot, a loss, or a control line: never part of a slice."""
        self.flush()
        self._hear(m + 1)
        market, note = self.market, self.tape.notes.get(m, {})
        if kind == SNAPSHOT:
            self.flush()
            was_away, market.lost = market.lost or self.is_stale, ""
            if was_away or now_ns >= self.due_ns:
                self.decide(now_ns)
            return
        self.matched = m + 1  # there is nothing in it to match
        if kind == LOST and not market.lost:
            market.lost = note["reason"]
            market.restart()
            self.exchange.flatten_ns = NEVER  # at what price, nobody can say: sent again later
            self.decide(now_ns)
        elif kind == CONTROL and note["event"] == "params":
            self._change_parameters(note, now_ns)
        elif kind == CONTROL and note["event"] == "outage":  # of a backtest: we hear no more
            market.restart()
            self.is_cut_off, self.exchange.back_ns = True, note["back_ns"]
            self.decide(now_ns)
            self.due_ns = NEVER
        elif kind == CONTROL and note["event"] == "back":
            self.is_cut_off = False
            self.decide(now_ns)

    def _change_parameters(self, note: dict[str, Any], now_ns: int) -> None:
        try:
            if note.get("is_final"):  # no recording takes it back
                self.overrides |= note["parameters"]
            changes = {**note["parameters"], **self.overrides}
            parameters = change_parameters(
                self.parameters, changes, self.instrument.min_order, running=True
            )
        except (ValueError, TypeError, KeyError) as error:
            logging.warning("parameters in the recording are refused: %s", error)
            return
        self.parameters = self.exchange.parameters = parameters
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
            self.flush()  # the account of now is needed, not only the mid
        view = self.view()
        self._mark(view, second_ns)
        self._count_trades()
        traded, tick_size = math.fsum(self.traded), self.instrument.tick_size  # exact sum
        self.traded.clear()
        if math.isnan(self.account.mid_price):
            return
        turnover_musd = traded * tick_size * 1e-6
        self.market.measure_second(second_ns, self.account.mid_price, turnover_musd, tick_size,
                                   self.parameters.half_life_s)  # fmt: skip
        if self._guard(view, second_ns) != self.last_guard:
            self.due_ns = second_ns  # the next message decides

    def _count_trades(self) -> None:
        """Remember what was traded in the messages heard since the last time."""
        if self.tape is not None:
            first, last = self.counted, self.tape.first_trade.item(self.heard)
            if first < last:
                ticks = np.abs(self.tape.trade_level[first:last])
                self.traded += (ticks * self.tape.trade_size[first:last]).tolist()
            self.counted = last

    def _mid_ticks(self, view: View, time_ns: int) -> float:
        """The mid that we see: the book's, moved by our own impact if that is modelled."""
        return view.mid_ticks * (1 + self.exchange.shift_bps(time_ns) * 1e-4)

    def _mark(self, view: View, time_ns: int) -> None:
        """Mark the inventory to the mid, and look at the drawdown."""
        account, limit = self.account, self.parameters.max_drawdown_usdt
        account.mark(self._mid_ticks(view, time_ns) * self.instrument.tick_size)
        if limit is not None and account.peak_equity - account.equity > limit:
            self.is_stopped = True  # for good

    def finish(self) -> Decision:
        """The end: the last decision with the account as it is after the last message."""
        self._mark(self.view(), self.last_ns)
        a = self.account
        return self.decision._replace(
            time_ns=self.last_ns, mid_price=a.mid_price, inventory=a.inventory, cash=a.cash,
            equity=a.equity, fees_paid=a.fees_paid,
        )  # fmt: skip

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
        mark_gap_bps = abs(self.account.mid_price / view.mark_price - 1) * 1e4  # nan: no mark
        if mark_gap_bps > p.max_mark_gap_bps:
            return "far from mark price"
        if self.is_stopped:
            return "drawdown limit"
        return "warming up" if len(market.returns_bps) < WARMUP_RETURNS else ""

    def decide(self, time_ns: int) -> None:
        """Measure, choose, quote, log; the next decision is due an interval later."""
        if self.is_cut_off and self.last_guard == "outage":
            return
        p, market, account = self.parameters, self.market, self.account
        book, view, tick_size = market.book, market.book.view, self.instrument.tick_size

        # Mark the inventory, and measure the depth of a book that can be trusted.
        account.peak_equity = max(account.peak_equity, account.equity)
        self._mark(view, time_ns)
        is_sound = not (market.lost or view.fault)
        market.bid_depth, market.ask_depth = (
            book.depth(side, p.depth_band_bps) if is_sound else math.nan for side in SIDES
        )
        self.exchange.depths = {BID: market.bid_depth, ASK: market.ask_depth}

        # Is there a reason to stay out? A book that has gone silent is measured anew.
        reason = self.last_guard = self._guard(view, time_ns)
        was_stale = self.is_stale
        self.is_stale = time_ns - market.book_recv_ns >= round(p.stale_after_s * NS)
        if self.is_stale and not was_stale:
            market.restart()

        # What to quote: distances from the mid, then prices and quantities.
        source, distances, wanted = "none", None, {BID: (None, 0.0), ASK: (None, 0.0)}
        if not reason:
            distances = self._choose(time_ns)
            source = distances.source
            wanted, reason = self._place(distances, self._mid_ticks(view, time_ns))
        elif self.is_stopped and not market.lost:
            self.exchange.flatten(time_ns)
        sent = [self.exchange.send(side, *order, time_ns) for side, order in wanted.items()]

        # Write it down.
        (bid, bid_qty), (ask, ask_qty) = wanted.values()
        terms = distances.base_spread if distances else None
        self.decision = Decision(
            time_ns,
            account.mid_price if is_sound else math.nan,
            view.best_bid * tick_size if is_sound else math.nan,
            -view.best_ask * tick_size if is_sound else math.nan,
            math.nan if bid is None else bid * tick_size,
            bid_qty,
            math.nan if ask is None else -ask * tick_size,
            ask_qty,
            terms.total_bps if terms else math.nan,
            market.volatility, market.ema_volatility, market.bid_depth, market.ask_depth,
            market.liquidity, account.inventory, account.cash, account.equity, account.fees_paid,
            *(terms[:3] if terms else (math.nan,) * 3),
            source, reason, any(sent), distances,
        )  # fmt: skip
        self.due_ns = time_ns + round(get_optimization_frequency(p, market.ema_volatility) * NS)
        self.sources[source] += 1
        self.reasons[reason] += 1
        if self.log:
            self.log.write(log_row(self.decision, self.instrument.digits))
        self.on_decision(self)

    def _choose(self, time_ns: int) -> Distances:
        """Distances from the mid, by the program or its fallbacks."""
        p, market, account = self.parameters, self.market, self.account
        q = min(max(account.inventory / p.max_inventory, -1.0), 1.0)
        depth_musd = (market.bid_depth + market.ask_depth) / 2 * account.mid_price * 1e-6
        good_ns, good = self.last_good or (-NEVER, None)
        distances = self.strategy(
            p, q, market.ema_volatility, market.liquidity, depth_musd, good,
            (time_ns - good_ns) / NS, self.solver,
        )  # fmt: skip
        if distances.source == "lp":
            self.last_good = (time_ns, distances)
        return distances

    def _place(
        self, distances: Distances, mid: float
    ) -> tuple[dict[int, tuple[int | None, float]], str]:
        """(level, quantity) of each side around a mid in ticks, and the reasons given."""
        p, market, lot = self.parameters, self.market, self.instrument.lot_size
        wanted, reasons = {}, [distances.reason] if distances.reason else []
        for side, name, bps, depth in (
            (BID, "bid", distances.bid_bps, market.bid_depth),
            (ASK, "ask", distances.ask_bps, market.ask_depth),
        ):
            # Rounded outward to the tick; post-only; and a price above 0.
            level = math.floor(side * mid - mid * bps * 1e-4 + 1e-9)
            level = min(level, -market.book.view.best(-side) - 1)
            level = max(level, 1) if side == BID else level
            # No more than a share of the depth, and within the inventory limit.
            qty = floor_to_lot(min(p.order_qty, p.max_depth_share * depth), lot)
            why_not = ""
            if qty < self.instrument.min_order * (1 - 1e-9):
                why_not = "book too thin for a lot"
            elif side * self.account.inventory + qty > p.max_inventory + lot / 2:
                why_not = "inventory limit"
            wanted[side] = (None, 0.0) if why_not else (level, qty)
            if why_not:
                reasons.append(f"no {name}: {why_not}")
        return wanted, "; ".join(reasons)


# ---- Display -----------------------------------------------------------------------


def in_words(solution: Solution, order_share: float) -> list[str]:
    """What spread, edge and inventory cost at the margin, relative to the quote's cost C.

    order_share: one order as a share of max_inventory.
    """

    def effect(price: float, amount: float) -> str:
        return f"cost {100 * price * amount / solution.cost:+.1f} %"

    words = [f"1 % more spread asked for: {effect(solution.spread_price, 0.01)}"]
    if solution.spread_price <= 1e-9:
        words = ["spread: costs nothing, the edges ask for more"]
    for side, price in (("bid", solution.bid_edge_price), ("ask", solution.ask_edge_price)):
        if price > 1e-9:
            words.append(f"{side} stands on its edge, 1 % of S further: {effect(price, 0.01)}")
    return [*words, f"one order more bought: {effect(solution.inventory_price, order_share)}"]


def describe(maker: MarketMaker) -> list[tuple[str, list[str]]]:
    """What the screen shows: label and items, line by line."""
    d, a, p, market = maker.decision, maker.account, maker.parameters, maker.market
    coin, digits, view = maker.instrument.base_coin, maker.instrument.digits, market.book.view
    best = [math.nan, math.nan]
    if not (market.lost or view.fault):
        best = [s * view.best(s) * maker.instrument.tick_size for s in SIDES]

    def price(value: float) -> str:
        return "-" if value != value else f"{value:,.{digits}f}"

    def number(value: float) -> str:
        return "-" if value != value else f"{value:.2f}"

    quote = [f"NONE: {d.reason}"]
    if d.source == "none" and d.reason in ("book lost", "warming up"):
        progress = f"{len(market.returns_bps)} of {WARMUP_RETURNS} s"
        quote[0] += f" ({market.lost if d.reason == 'book lost' else progress})"
    elif d.source != "none":
        quote = [f"source {d.source}" + (f": {d.reason}" if d.reason else "")]
        for name, at, qty in (("ask", d.ask_price, d.ask_qty), ("bid", d.bid_price, d.bid_qty)):
            far = f" x {qty:g}, {abs(at / d.mid_price - 1) * 1e4:.2f} bps away" if at == at else ""
            quote.insert(0, f"{name} {price(at)}{far}")
    lines = [
        ("Market", [
            f"bid {price(best[0])}", f"ask {price(best[1])} USDT",
            f"last {price(view.last_price)}", f"mark {price(view.mark_price)}",
            f"depth {number(d.bid_depth)} / {number(d.ask_depth)} {coin} within "
            f"{p.depth_band_bps:g} bps",
            f"volatility {number(market.volatility)} (EMA {number(market.ema_volatility)}) "
            "bps/sqrt(s)",
            f"liquidity {number(market.liquidity)} M USDT per bp",
        ]),
        ("Our quote", quote),
    ]  # fmt: skip
    if d.base_spread_bps == d.base_spread_bps:
        lines.append(("Base spread", [
            f"{d.base_spread_bps:.2f} bps = volatility {d.volatility_bps:.2f} + liquidity "
            f"{d.liquidity_bps:.2f} + depth {d.depth_bps:.2f}",
            f"(at least {p.min_half_spread_bps:g})"]))  # fmt: skip
    if d.distances and d.distances.solution:
        words = in_words(d.distances.solution, p.order_qty / p.max_inventory)
        lines.append(("At the margin", words))
    held = [f"{a.inventory:+g} {coin} of at most {p.max_inventory:g}", f"{len(a.fills)} fills"]
    if a.fills:
        verb = "bought" if a.fills[-1].side == BID else "sold"
        held.append(f"last: {verb} {a.fills[-1].qty:g} at {price(a.fills[-1].price)}")
    lines.append(("Inventory", held))
    lines.append(("Result, USDT", [
        f"gross {a.gross:+.2f}", f"fees {a.fees_paid:.2f}", f"net {a.equity:+.2f}",
        f"gross = spread captured {a.spread_captured:+.2f}, revaluation {a.revaluation:+.2f}",
    ]))  # fmt: skip
    return lines


def wrap(lines: list[tuple[str, list[str]]], width: int) -> list[str]:
    """Fill the width with items, the label before the first of them."""
    text, indent, gap = [], 15, "   "
    for label, items in lines:
        line, is_empty = f"{label:<{indent}}", True
        for item in items:
            if not is_empty and len(line) + len(gap) + len(item) > width:
                text.append(line)
                line, is_empty = " " * indent, True
            line += item if is_empty else gap + item
            is_empty = False
        text.append(line)
    return text


class Display:
    """Shows the market maker: in place on a terminal, else one plain line a second."""

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        self.title, self.stream = title, stream or sys.stdout
        self.in_place = self.stream.isatty()
        self.next_s, self.started, self.notice = 0.0, False, ""

    def show(self, maker: MarketMaker, health: Callable[[], list[str]], force=False) -> None:
        """Show if it is time to; health is only asked then."""
        if time.monotonic() < self.next_s and not force:
            return
        self.next_s = time.monotonic() + (0.25 if self.in_place else 1.0)
        if self.in_place:
            self.stream.write(self.screen(maker, health()))
        elif not force and maker.messages:
            self.stream.write(("" if self.started else self.title + "\n") + self.line(maker) + "\n")
        self.started = True
        self.stream.flush()

    def screen(self, maker: MarketMaker, health: list[str]) -> str:
        """The whole screen, from its first line on."""
        columns, rows = shutil.get_terminal_size((80, 24))
        moment = f"{self.title}   {clock_text(maker.last_ns)} UTC"
        head = [moment, "paper trading: no order is ever sent", ""]
        body = wrap([*describe(maker), ("Feed", health)], columns)
        foot = ["", self.notice or "Ctrl-C ends the run with a summary"]
        text = [line[:columns] for line in head + body + foot][: rows - 1]
        clear = "" if self.started else "\x1b[2J"
        return clear + "\x1b[H" + "".join(line + "\x1b[K\n" for line in text) + "\x1b[J"

    def line(self, maker: MarketMaker) -> str:
        """The same in a line."""
        d, a, digits = maker.decision, maker.account, maker.instrument.digits
        quote = ["-" if p != p else f"{p:.{digits}f}" for p in (d.bid_price, d.ask_price)]
        why = f" ({d.reason})" if d.reason else ""
        notice, self.notice = f"  {self.notice}" if self.notice else "", ""
        return (
            f"{clock_text(maker.last_ns)}  mid {a.mid_price:.{digits + 1}f}  "
            f"quote {' / '.join(quote)}  {d.source}{why}  inventory {a.inventory:+g}  "
            f"net {a.equity:+.2f} USDT{notice}"
        )


def summarize(maker: MarketMaker, title: str) -> str:
    """The end of a run in a few lines."""
    a, start, end = maker.account, clock_text(maker.first_ns), clock_text(maker.last_ns)
    lines = [
        ("Span", [f"{start} to {end} UTC", f"{maker.messages} messages"]),
        ("Decisions", [f"{n} {name}" for name, n in maker.sources.items()]),
        ("Reasons", [f"{n} x {name}" for name, n in maker.reasons.items() if name]),
        ("Orders", [f"{n} {name}" for name, n in maker.exchange.counts.items()]),
        ("Fills", [f"{len(a.fills)}", f"turnover {a.turnover:,.0f} USDT",
                   f"inventory {a.inventory:+g} {maker.instrument.base_coin}"]),
        ("Result, USDT", [
            f"gross {a.gross:+.2f}", f"fees {a.fees_paid:.2f}", f"net {a.equity:+.2f}",
            f"net = spread captured {a.spread_captured:+.2f} + revaluation {a.revaluation:+.2f}"
            " - fees", f"(residual {a.residual:.0e})"]),
    ]  # fmt: skip
    width = shutil.get_terminal_size((100, 24)).columns
    return "\n".join([title, *wrap([line for line in lines if line[1]], width)])


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


def plot_prices(ax: Any, c: Mapping[str, np.ndarray], fills: list[Fill], at: np.ndarray) -> None:
    """Mid, our quotes, and where they were filled; `at` is x of each fill."""
    ax.plot(c["x"], c["mid_price"], color=BLACK, linewidth=0.9, label="mid", zorder=4)
    for name, color in (("bid", BLUE), ("ask", RED)):
        ax.step(c["x"], c[f"{name}_price"], where="post", color=color, linewidth=0.6, alpha=0.6,
                label=f"our {name}")  # fmt: skip
    prices = np.array([fill.price for fill in fills])
    for side, verb, color, marker in ((BID, "bought", BLUE, "^"), (ASK, "sold", RED, "v")):
        is_own = np.array([fill.side == side for fill in fills], bool)
        ax.scatter(at[is_own], prices[is_own], color=color, marker=marker, zorder=5,
                   s=30 if len(fills) < 300 else 15, edgecolors="white", linewidths=0.3,
                   label=f"{verb} ({is_own.sum():,})")  # fmt: skip
    ax.ticklabel_format(axis="y", useOffset=False)
    finish_panel(ax, "Price", "USDT")


def plot_inventory(ax: Any, c: Mapping[str, np.ndarray], limit: float, coin: str) -> None:
    """What we hold, between the limits."""
    ax.step(c["x"], c["inventory"], where="post", color=BLACK, linewidth=0.9, label="held")
    for sign, label in ((1, "limit"), (-1, None)):
        ax.axhline(sign * limit, color=RED, linestyle="--", linewidth=1, label=label)
    ax.axhline(0, color="grey", linewidth=0.6)
    finish_panel(ax, "Inventory", coin)


def plot_result(ax: Any, c: Mapping[str, np.ndarray]) -> None:
    """Gross, fees and net; the shade reaches from net up to its peak so far."""
    is_rebate = np.nansum(c["fees_paid"][-1:]) < 0
    peak = np.maximum.accumulate(np.append(0.0, np.nan_to_num(c["equity"])))[1:]
    ax.fill_between(c["x"], c["equity"], peak, color=SKY, alpha=0.3, linewidth=0, label="drawdown")
    for values, color, name in (
        (c["equity"] + c["fees_paid"], GREEN, "gross"),
        (-c["fees_paid"], PINK, "rebates" if is_rebate else "fees, as a loss"),
        (c["equity"], BLACK, "net = gross " + ("+ rebates" if is_rebate else "- fees")),
    ):
        ax.plot(c["x"], values, color=color, linewidth=1.2, label=name)
    ax.axhline(0, color="grey", linewidth=0.6)
    finish_panel(ax, "Result", "USDT")


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
    figure, axes = pyplot.subplot_mosaic(
        [[f"{k} 0", f"{k} {len(row) - 1}"] for k, row in enumerate(panels)],
        height_ratios=heights, figsize=(8.8, sum(heights)), layout="constrained",
    )  # fmt: skip
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


def check_plot_path(path: Path | None) -> None:
    """UserError, before the work and not after it, where no picture could be written."""
    if path and (not path.absolute().parent.is_dir() or path.is_dir()):
        raise UserError(f"--plot {path} cannot be written: choose a file in a folder")


# ---- Running -----------------------------------------------------------------------


class ParameterFile:
    """--params FILE.json, read again when it is edited while the program runs."""

    def __init__(self, path: Path) -> None:
        self.path, self.stamp = path, 0
        try:
            self.values = self.read() or {}  # as last accepted
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"--params {path}: {error}") from None

    def read(self) -> dict[str, Any] | None:
        """The values, if the file has changed; ValueError or OSError if it is unreadable."""
        stamp = self.path.stat().st_mtime_ns
        if stamp == self.stamp:
            return None
        self.stamp = stamp
        values = json.loads(self.path.read_text())
        if not isinstance(values, dict):
            raise ValueError('it must hold one JSON object such as {"alpha": 2}')
        return values


def given_parameters(options: argparse.Namespace, file: ParameterFile | None) -> dict[str, Any]:
    """What the user set: the flags before the file."""
    values = dict(file.values) if file else {}
    return values | {n: v for n in FIELDS if (v := getattr(options, n)) is not None}


def choose_parameters(
    given: Mapping[str, Any], start: Mapping[str, Any], instrument: Instrument
) -> Parameters:
    """The user's parameters before those of a recording's start line before the defaults."""
    try:
        recorded = start.get("parameters", {})
        if not isinstance(recorded, dict):
            raise ValueError(f"parameters {recorded!r} in the recording's start line are no object")
        return change_parameters(Parameters(), {**recorded, **given}, instrument.min_order)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None


class Session:
    """One run: its market maker, its display, and the files it writes.

    source is the live feed, None in a replay; start are the fields of a recording's first
    line, None when live.
    """

    def __init__(
        self, options: argparse.Namespace, instrument: Instrument, title: str, start: dict | None
    ) -> None:
        self.options, self.title, self.display = options, title, Display(title)
        self.source: feed.LiveFeed | None = None
        self.parser: feed.Parser | None = None
        self.file = ParameterFile(options.params) if options.params else None
        given = given_parameters(options, self.file)
        parameters = choose_parameters(given, start or {}, instrument)
        check_plot_path(options.plot)
        self.log = feed.GrowingFile(options.log) if options.log else None
        self.maker = MarketMaker(parameters, instrument, self.log, None if start is None else given)
        self.history = History()
        if options.plot:
            self.maker.on_decision = lambda maker: self.history.add(maker.decision)
        self.next_look_s = self.rate_since_s = 0.0
        self.rate_from, self.rate = 0, 0.0
        self.usual_lag_ms: float | None = None  # the first that was shown

    def run(self, bursts: Iterator[list[Message]]) -> None:
        """Take every message (their source looks around in between); close all files."""
        try:
            for messages in bursts:
                self.maker.take(*messages)
        except UserError:
            self.discard_log()
            raise
        finally:
            if self.source:
                self.source.stop()
                if self.source.recorder:
                    self.source.recorder.close()
            if self.log:
                self.log.close()
        self.history.add(self.maker.finish())
        self.display.show(self.maker, self.health, force=True)
        print(summarize(self.maker, self.title))
        if self.options.plot:
            self.plot(self.options.plot)

    def plot(self, path: Path) -> None:
        """Mid and quotes with fills, inventory, result."""
        maker, c = self.maker, self.history.columns()
        first_ns = c["time_ns"][0]
        c["x"] = (c["time_ns"] - first_ns) / (60 * NS)
        at = np.array([fill.recv_ns - first_ns for fill in maker.account.fills]) / (60 * NS)
        limit, coin = maker.parameters.max_inventory, maker.instrument.base_coin

        def result(ax: Any) -> None:
            plot_result(ax, c)
            ax.set_xlabel(f"minutes since {clock_text(first_ns)} UTC")

        rows = [
            (4.4, [partial(plot_prices, c=c, fills=maker.account.fills, at=at)]),
            (1.8, [partial(plot_inventory, c=c, limit=limit, coin=coin)]),
            (2.8, [result]),
        ]
        try:
            draw_figure(rows, self.title, path, shared=3)
        except OSError as error:
            raise UserError(f"--plot {path} cannot be written: {error.strerror}") from None

    def discard_log(self) -> None:
        """An error came before any quote: leave no log in the way of the next run."""
        if self.log and not set(self.maker.sources) - {"none"}:
            self.log.close()
            self.options.log.unlink()

    def look(self) -> None:
        """A few times a second: the screen, the parameter file, the disk."""
        now = time.monotonic()
        if now < self.next_look_s:
            return
        self.next_look_s = now + TICK_S
        for file in (self.log, self.source and self.source.recorder):
            if file and file.failure:
                self.display.notice = f"DISK: {file.failure}"
        if self.source:
            self.source.tend()
            if self.file:
                self.read_edits(self.file)
            market = self.maker.market
            if market.book.view.fault and not market.lost:
                self.source.cut(f"resync: {market.book.view.fault}")
        self.display.show(self.maker, self.health)

    def read_edits(self, file: ParameterFile) -> None:
        """A sound edit becomes a line of the session; another is refused with a notice."""
        try:
            values = file.read()
            if values is None:
                return
            edits = {n: v for n, v in values.items() if file.values.get(n, INF) != v}
            p = self.maker.parameters
            p = change_parameters(p, edits, self.maker.instrument.min_order, running=True)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            self.display.notice = f"edit of {file.path} refused: {error}"
        else:
            file.values = values
            self.source.emit(feed.control_line("params", parameters=asdict(p)))
            self.display.notice = f"parameters changed: {edits}"

    def health(self) -> list[str]:
        """The feed in words: age, rate, reconnects, gaps, lag, and what went wrong."""
        now, source, counts = time.monotonic(), self.source, self.parser.counts
        if now - self.rate_since_s >= 1:
            self.rate = (self.maker.messages - self.rate_from) / (now - self.rate_since_s)
            self.rate_since_s, self.rate_from = now, self.maker.messages
        items = [f"{self.rate:.0f} messages/s", f"{counts['gaps']} gaps"]
        if source:
            age_s = (source.clock_ns() - source.last_frame_ns) / NS
            state = f"last frame {age_s:.1f} s ago" if source.ws else "NOT CONNECTED"
            items = [state, *items, f"{source.reconnects} reconnects"]
        items.append(f"{counts['malformed']} malformed")
        if self.maker.lags_ns:
            lag_ms = statistics.median(self.maker.lags_ns) / MS
            self.usual_lag_ms = lag_ms if self.usual_lag_ms is None else self.usual_lag_ms
            items.append(describe_lag(lag_ms, self.usual_lag_ms))
        if source and source.recorder:
            items.append(source.recorder.failure or f"recording to {self.options.record}")
        return items + ([f"last problem: {self.parser.problem}"] if self.parser.problem else [])


def describe_lag(lag_ms: float, usual_ms: float) -> str:
    """Median of receive minus exchange time, with a warning where the clocks disagree."""
    if lag_ms < 0:
        return f"CLOCK BEHIND THE EXCHANGE by {-lag_ms:.0f} ms: see --clock-offset-ms"
    if lag_ms > MAX_LAG_MS:
        return f"LAG {lag_ms:.0f} ms: slow network, or see --clock-offset-ms"
    if abs(lag_ms - usual_ms) > MAX_DRIFT_MS:
        return f"LAG {lag_ms:.0f} ms HAS DRIFTED from {usual_ms:.0f} ms"
    return f"lag {lag_ms:.0f} ms"


def live_messages(
    session: Session, source: feed.LiveFeed, stop: feed.StopSignal, duration_s: float
) -> Iterator[list[Message]]:
    """Messages as they come. At the end the feed stops first, then the rest is drained."""
    end_ns = source.clock_ns() + duration_s * NS
    while not stop.is_set and source.clock_ns() < end_ns and not source.fatal:
        try:
            burst = [source.queue.get(timeout=TICK_S)]
            yield burst + [source.queue.get() for _ in range(source.queue.qsize())]
            session.look()
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


def replayed_messages(
    session: Session, recording: feed.Recording, stop: feed.StopSignal, speed: float
) -> Iterator[list[Message]]:
    """The messages of a recording at a multiple of their own pace (inf: no waiting)."""
    began_s, first_ns, end_ns, burst = time.monotonic(), 0, NEVER, []
    for message in recording.messages():
        if not first_ns:
            first_ns = message.recv_ns
            end_ns = first_ns + min(session.options.duration * NS, NEVER // 2)
        if message.recv_ns > end_ns or stop.is_set:
            break
        if speed < math.inf:
            due_s = began_s + (message.recv_ns - first_ns) / NS / speed
            while (wait_s := due_s - time.monotonic()) > 0:
                session.look()
                if stop.is_set:
                    return
                time.sleep(min(wait_s, TICK_S))
        burst.append(message)
        if speed < math.inf or len(burst) == BURST:
            session.look()
            yield burst
            burst = []
    yield burst


def run_live(options: argparse.Namespace, clock_ns: Callable[[], int] | None = None) -> None:
    """Paper trading on the live feed; the bundled sample where there is no network."""
    steps = options.tick_size, options.lot_size
    instrument = feed.find_instrument(options.symbol, options.category, *steps, not options.url)
    where = options.url or "Bybit"
    title = f"{instrument.symbol} {instrument.category}   LIVE from {where}"
    session = Session(options, instrument, title, None)
    depth, start = options.depth or feed.DEPTHS[0], asdict(session.maker.parameters)
    try:
        session.source = feed.open_feed(
            instrument, depth, options.url, options.record, clock_ns, parameters=start
        )
    except (UserError, KeyboardInterrupt, OSError, websocket.WebSocketException) as error:
        session.discard_log()
        if isinstance(error, (UserError, KeyboardInterrupt)):
            raise
        return run_offline(options, f"{where} cannot be reached ({error})")
    messages = live_messages(session, session.source, feed.StopSignal(), options.duration)
    session.parser = session.source.parser
    session.run(messages)


def run_offline(options: argparse.Namespace, reason: str) -> None:
    """No network at the start: replay the sample, unless live data were insisted on."""
    market = (options.symbol, options.category)
    if options.live or options.url or options.record or market != ("BTCUSDT", "linear"):
        raise UserError(f"{reason}: check the network, or give --replay FILE")
    print(f"{reason}: replaying the bundled synthetic sample instead", file=sys.stderr)
    run_replay(options, SAMPLE, options.speed or SAMPLE_SPEED, "OFFLINE REPLAY")


def run_replay(options: argparse.Namespace, path: Path, speed: float, label: str) -> None:
    """Paper trading on a recording."""
    flags = (options.tick_size, options.lot_size, options.depth)
    recording = feed.open_recording(path, *flags)
    instrument = recording.parser.instrument
    kind = "SYNTHETIC data" if recording.is_synthetic else path.name
    pace = "" if speed == math.inf else f" at {speed:g} x"
    title = f"{instrument.symbol} {instrument.category}   {label}{pace} of {kind}"
    session = Session(options, instrument, title, recording.start)
    session.parser = recording.parser
    session.run(replayed_messages(session, recording, feed.StopSignal(), speed))


# ---- Command line ------------------------------------------------------------------


def add_parameter_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every parameter, with unit and range; unset means the default."""
    group = parser.add_argument_group("parameters")
    for name, parameter in FIELDS.items():
        rule, default = parameter.metadata, parameter.default
        span = "" if "choices" in rule else f", {rule['low']:g} to {rule['high']:g}"
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=str if "choices" in rule else float,
            choices=rule.get("choices"),
            metavar=None if "choices" in rule else "X",
            help=f"{rule['help']}{span} (default {'off' if default is None else default})",
        )


def build_arguments() -> argparse.ArgumentParser:
    """The command line of `python marketmaker.py`."""
    parser = feed.Arguments(
        prog="marketmaker.py",
        description="Paper market maker on Bybit's live data, or on a recording. No order is sent.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--live", action="store_true", help="insist on the live feed")
    source.add_argument("--replay", type=Path, metavar="FILE", help="replay a recording")
    parser.add_argument("--speed", type=feed.positive, metavar="X|max", help="of a replay")
    feed.add_market_flags(parser)
    parser.add_argument("--duration", type=feed.positive, default=math.inf, metavar="SECONDS",
                        help="end after so many seconds of receive time")  # fmt: skip
    parser.add_argument("--record", type=Path, metavar="FILE", help="record the live session")
    parser.add_argument("--log", type=Path, metavar="FILE", help="every decision as CSV")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="a picture at the end")
    parser.add_argument("--params", type=Path, metavar="FILE.json",
                        help="parameters; a live run reads it again when edited")  # fmt: skip
    add_parameter_flags(parser)
    return parser


def main(
    arguments: list[str] | None = None, clock_ns: Callable[[], int] | None = None
) -> int:
    """python marketmaker.py; the exit status. clock_ns replaces the session's clock."""
    options = build_arguments().parse_args(arguments)

    def run() -> None:
        if options.replay:
            if options.record:
                raise UserError("--record records the live feed: leave it out with --replay")
            run_replay(options, options.replay, options.speed or 1.0, "REPLAY")
        else:
            run_live(options, clock_ns)

    return feed.exit_cleanly(run)


if __name__ == "__main__":
    sys.exit(main())
