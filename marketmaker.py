"""From market to quote: state, decision, paper fills, display. No order is ever sent.

The loop, the same for the live socket, a recording and the backtest:

  for every message:
      let the exchange match it against our paper orders
      show it to the book
      if a decision is due:  measure the market, solve the program, quote, log

Between two decisions our orders do not move, so messages come as columns (a tape) and are
applied in slices; single messages are looked at only where they reach our price, and
where only they can tell what became of our place in the queue. A slice
ends at a decision, at every whole second (the volatility's grid) unless the tape knows the
mid then, and at whatever changes the rules: a snapshot, a lost book, a control line. Where
else a tape or a slice ends changes nothing.

When is a decision made? At the first message that is due, with that message applied;
its time is that message's recv_ns, and the next is due one optimization interval later.
At once: after a loss, at the snapshot that ends it, when the book falls silent, when
parameters change. Guards are judged at every decision and every whole second; one that
trips or clears makes the next message decide. A fill does not; the next decision sees
it. No decision reads a clock.

How paper orders fill, with the direction of each rule's bias:

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
import threading
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
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
    DELTA,
    MS,
    NO_LEVEL,
    NS,
    SIDES,
    SNAPSHOT,
    TICKER,
    TRADES,
    Instrument,
    Message,
    OrderBook,
    Tape,
    UserError,
    build_tape,
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
NEVER = 2**63 - 1  # ns
MIN_SILENCE_NS = NS // 2  # the least that stale_after_s can be
LOOK_AHEAD = 512  # messages, for the next that something is due at
LATE_NS = 10 * NS  # no trade is heard of later than this
IMPACT_HALF_LIFE_S = 30.0  # of the shift that our own fills cause
SAMPLE = Path(__file__).parent / "data" / "sample.jsonl.gz"
SAMPLE_SPEED = 10.0
MAX_LAG_MS, MAX_DRIFT_MS = 2000.0, 500.0  # a lag beyond, or so far from the first, is warned of
LOG_HEADER = (
    "time_ns,mid_price,best_bid,best_ask,bid_price,bid_qty,ask_price,ask_qty,base_spread_bps,"
    "volatility,ema_volatility,bid_depth,ask_depth,liquidity,inventory,cash,equity,source,reason\n"
)
BURST = 500  # messages taken at once in a replay without pauses
GATHER_S = 0.001  # after a message, so that a burst makes one tape and few changes of thread
TICK_S = 0.1  # how long the main thread waits for a message before it looks around


# ---- State -------------------------------------------------------------------------


class Fill(NamedTuple):
    """One fill of a paper order."""

    time_ns: int  # exchange time
    recv_ns: int  # when we came to know
    side: int  # +1 we bought, -1 we sold
    price: float  # USDT
    qty: float  # base coin
    fee: float  # USDT, positive = paid
    mid_price: float  # USDT, as known just before the message that told of the fill
    queue_ahead: float  # base coin, at the fill
    queue_at_arrival: float  # base coin
    is_taker: bool = False
    arrival_ns: int = 0  # when the order reached the exchange, exchange time


@dataclass(slots=True)
class State:
    """What is known of the market, and our simulated account. nan = not known yet."""

    time_ns: int = 0  # receive time of the last decision
    # the market
    best_bid: float = math.nan  # USDT
    best_ask: float = math.nan  # USDT
    mid_price: float = math.nan  # USDT, (best_bid + best_ask) / 2; the last good one
    bid_depth: float = math.nan  # base coin within depth_band_bps of the mid
    ask_depth: float = math.nan
    volatility: float = math.nan  # bps/sqrt(s), over the last minute
    ema_volatility: float = math.nan  # bps/sqrt(s)
    liquidity: float = math.nan  # million USDT traded per bp of mid movement
    last_price: float = math.nan  # USDT, from the ticker, like the next three
    mark_price: float = math.nan
    index_price: float = math.nan
    funding_rate: float = math.nan  # per funding period
    recent_trades: deque = field(default_factory=partial(deque, maxlen=WINDOW_S))  # M USDT a s
    returns_bps: deque = field(default_factory=partial(deque, maxlen=WINDOW_S))
    moves_bps: deque = field(default_factory=partial(deque, maxlen=WINDOW_S))  # their sizes
    grid_mid: float = math.nan  # the mid at the last whole second
    volatility_ns: int = 0  # when ema_volatility was last renewed
    # our account
    inventory: float = 0.0  # base coin
    cash: float = 0.0  # USDT
    fees_paid: float = 0.0  # USDT
    spread_captured: float = 0.0  # USDT, sum of side (mid - price) qty
    revaluation: float = 0.0  # USDT, sum of inventory x change of the mid
    peak_net: float = 0.0  # USDT
    fills: int = 0
    turnover: float = 0.0  # USDT

    @property
    def equity(self) -> float:
        """cash + inventory x mid, USDT: the net result, since we start with nothing."""
        return self.cash + (self.inventory * self.mid_price if self.inventory else 0.0)

    @property
    def gross(self) -> float:
        """Result before fees, USDT."""
        return self.equity + self.fees_paid

    @property
    def residual(self) -> float:
        """net - (spread captured + revaluation - fees): nothing but rounding, USDT."""
        return self.equity - (self.spread_captured + self.revaluation - self.fees_paid)

    def revalue(self, mid_price: float) -> None:
        """A new mid: the inventory changes its worth."""
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
        self.fills += 1


class Quote(NamedTuple):
    """What we want to stand in the book: price and quantity by side, None = nothing."""

    bid_price: float | None = None  # USDT
    bid_qty: float = 0.0  # base coin
    ask_price: float | None = None
    ask_qty: float = 0.0
    source: str = "none"  # lp, last_good, default, none
    reason: str = ""  # why not lp, or why a side is missing


# ---- Measuring ---------------------------------------------------------------------


def exponential_average(previous: float, value: float, dt_s: float, half_life_s: float) -> float:
    """EMA over uneven steps: the new value weighs 1 - 2^(-dt/half_life).

    >>> exponential_average(1.0, 3.0, dt_s=30, half_life_s=30)
    2.0
    """
    if math.isnan(previous):
        return value
    return value + (previous - value) * 2 ** (-dt_s / half_life_s)


def update_measures(
    state: State, second_ns: int, turnover_musd: float, tick_size: float, half_life_s: float
) -> None:
    """One whole second of receive time has passed: volatility, its EMA, liquidity.

    volatility = root mean square of the 1 s log returns of the mid in the window;
    liquidity = turnover of the window / sum of the absolute returns (at least a tick).
    turnover_musd is that of the second.
    """
    previous, state.grid_mid = state.grid_mid, state.mid_price
    if math.isnan(previous):
        return
    returns = state.returns_bps
    returns.append(1e4 * math.log(state.mid_price / previous))
    state.moves_bps.append(abs(returns[-1]))
    state.recent_trades.append(turnover_musd)
    if len(returns) < WARMUP_RETURNS:
        return
    dt_s = (second_ns - state.volatility_ns) / NS
    state.volatility = math.hypot(*returns) / math.sqrt(len(returns))
    state.ema_volatility = exponential_average(
        state.ema_volatility, state.volatility, dt_s, half_life_s
    )
    state.volatility_ns = second_ns
    moved_bps = max(sum(state.moves_bps), 1e4 * tick_size / state.mid_price)
    state.liquidity = sum(state.recent_trades) / moved_bps


def restart_measures(state: State) -> None:
    """The grid begins anew after a loss or a silence; the EMA is kept."""
    state.grid_mid = state.volatility = state.liquidity = math.nan
    state.returns_bps.clear()
    state.moves_bps.clear()
    state.recent_trades.clear()


# ---- Paper exchange ----------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Order:
    """A paper order. It lives on the exchange in (arrival_ns, cancel_ns]."""

    side: int
    level: int  # side x price tick
    qty: float  # base coin, as sent
    arrival_ns: int  # exchange time
    cancel_ns: int = NEVER
    remaining: float = 0.0
    queue_ahead: float = math.inf  # base coin; inf where nothing can be seen
    queue_at_arrival: float = math.inf
    eaten: float = 0.0  # of the queue, by trades since arrival
    has_arrived: bool = False
    is_doubtful: bool = False  # it would be refused if it arrived now

    def lives_at(self, exch_ns: int, passed_ns: int) -> bool:
        """Market data go before orders at equal times; what has passed is over."""
        is_there = self.has_arrived and self.arrival_ns < exch_ns <= self.cancel_ns
        return is_there and passed_ns <= self.cancel_ns


class PaperExchange:
    """Matches the market's events, on the exchange's clock, against our orders.

    `orders` holds all that an event may still meet, past ones included: a trade can be
    heard of after its order was replaced. `sent` is the last order sent to each side that
    as far as we know still stands. peer_rules is for comparison with hftbacktest: an order
    fills whole or not at all, and a level that leaves the window counts as cancelled.
    """

    def __init__(
        self,
        parameters: Parameters,
        instrument: Instrument,
        state: State,
        participation: float = 1.0,
        peer_rules: bool = False,
        impact_bps: float = 0.0,
    ) -> None:
        self.parameters, self.instrument, self.state = parameters, instrument, state
        self.participation, self.peer_rules = participation, peer_rules
        self.impact_bps = impact_bps
        self.shifts = [(0, 0.0)]  # (exchange time, shift of the prices we see after it, bps)
        self.back_ns = 0  # cut off until then: we hear of nothing and nothing hears of us
        self.offset_ns = round(parameters.clock_offset_ms * MS)  # our clock - exchange's
        self.latency_ns = round(parameters.order_latency_ms * MS) - self.offset_ns
        self.orders: dict[int, list[Order]] = {BID: [], ASK: []}
        self.sent: dict[int, Order | None] = {BID: None, ASK: None}
        self.flatten_ns = NEVER  # arrival of an order that closes the inventory
        self.book = OrderBook()  # of the messages done; those after them wait for a touch
        self.done = 0  # the first message of the tape that is not
        self.is_skewed = False  # messages of the tape are stamped later than orders on them
        self.trade_ns = 0  # exchange time of the last trade of earlier tapes
        self.passed_ns = 0  # no event before this can come, of trades and book in order
        self.mid_price = math.nan  # just before the message that is being matched
        self.fills: list[Fill] = []
        self.counts: Counter[str] = Counter()

    # -- orders

    def send(self, side: int, level: int | None, qty: float, time_ns: int) -> bool:
        """Ask for one order at a level (None: for none), decided at time_ns.

        Unchanged against the last one sent, the order keeps its place. Otherwise cancel
        and new order arrive at one instant. True if anything was sent or cancelled.
        """
        standing = self.sent[side]
        if standing is None:
            if level is None:
                return False
        elif (standing.level, standing.qty) == (level, qty):
            return False
        if time_ns < self.back_ns:
            return False
        arrival_ns = time_ns + self.latency_ns
        if standing is not None:
            standing.cancel_ns, self.sent[side] = arrival_ns, None
        if level is not None:
            order = Order(side, level, qty, arrival_ns, remaining=qty)
            self.orders[side].append(order)
            self.sent[side] = order
            self.counts["sent"] += 1
        return True

    def flatten(self, time_ns: int) -> None:
        """Send a taker order that closes the inventory, unless one is under way."""
        if self.flatten_ns == NEVER and self.state.inventory and time_ns >= self.back_ns:
            self.flatten_ns = time_ns + self.latency_ns

    def change_instrument(self, instrument: Instrument) -> None:
        """Another grid of prices: whatever stood is cancelled."""
        self.instrument = instrument
        self.counts["cancelled: tick size changed"] += sum(map(bool, self.sent.values()))
        self.orders, self.sent = {BID: [], ASK: []}, {BID: None, ASK: None}
        self.flatten_ns = NEVER
        self.book.clear()

    def _all_orders(self) -> list[Order]:
        return [*self.orders[BID], *self.orders[ASK]]

    def _drop(self, order: Order) -> None:
        self.orders[order.side].remove(order)
        if self.sent[order.side] is order:
            self.sent[order.side] = None

    # -- messages

    def begin(self, tape: Tape, start: int, stop: int) -> None:
        """Messages start..stop-1 of a tape are to come."""
        self.done = start
        ahead_ns = tape.exch_ns[start:stop] - tape.recv_ns[start:stop]
        self.is_skewed = int(ahead_ns.max(initial=-NEVER)) > self.latency_ns

    def expect(self, tape: Tape | None, stop: int) -> None:
        """Orders may follow, decided on messages before stop. Where the exchange's clock runs
        ahead, some of these are later than the orders' arrival: they must not meet.
        """
        if self.is_skewed and tape is not None:
            self.catch_up(tape, stop)

    def match(self, tape: Tape, start: int, stop: int) -> None:
        """Messages start..stop-1 of a tape: one by one where they reach an order, else later."""
        while start < stop:
            touch = self._next_touch(tape, start, stop)
            self._retire(tape, touch)
            if touch < stop:
                self.match_one(tape, touch)
            start = touch + 1

    def match_one(self, tape: Tape, m: int) -> None:
        """Trades meet the book as it stood just before, book rows just after."""
        self.catch_up(tape, m)
        book = self.book
        self.passed_ns = self._passed_before(tape, m)
        self.mid_price = book.mid_ticks * self.instrument.tick_size
        self._arrive(int(tape.exch_ns[m]), int(tape.recv_ns[m]))
        if tape.kind[m] == TRADES:
            self._meet_trades(tape, m)
        else:
            if tape.kind[m] == SNAPSHOT:
                book.clear()
            book.apply(tape, m, m + 1)
            self._meet_book(tape, m)
        self.done = m + 1
        for order in self._all_orders():
            order.is_doubtful = not order.has_arrived and (
                self._is_reached(order) or self._is_over_limit(order)
            )

    def catch_up(self, tape: Tape, stop: int) -> None:
        """Messages before stop, none of which reached an order, that were put off: who has
        arrived, whose queue got shorter? Until somebody asks, nobody needs to know.
        """
        if self.done < stop and (self.orders[BID] or self.orders[ASK]):
            for m in self._pass_by(tape, self.done, stop):
                self.match_one(tape, m)
        self.book.apply(tape, self.done, stop)
        self.done = max(self.done, stop)

    def _next_touch(self, tape: Tape, start: int, stop: int) -> int:
        """The first of messages start..stop-1 of a tape that may fill an order, or refuse it:
        a trade or the opposite side reaches its price, a doubtful or a taker order arrives.
        Else stop.
        """
        for side, orders in self.orders.items():
            if orders and start < stop:
                hits = tape.reach[side][start:stop] <= max([order.level for order in orders])
                first = int(hits.argmax())
                if hits[first]:
                    stop = start + first
                for order in orders:
                    if order.is_doubtful:
                        stop = self._arrival(order.arrival_ns, tape, start, stop)
        return self._arrival(self.flatten_ns, tape, start, stop)

    def _arrival(self, arrival_ns: int, tape: Tape, start: int, stop: int) -> int:
        """The first of messages start..stop-1 after an arrival. Else stop."""
        if arrival_ns == NEVER or start >= stop:
            return stop
        is_later = tape.exch_ns[start:stop] > arrival_ns
        first = int(is_later.argmax())
        return start + first if is_later[first] else stop

    def _pass_by(self, tape: Tape, start: int, stop: int) -> list[int]:
        """Messages that reach no order, by columns. The answer is empty, or what must be looked
        at one by one because only that can tell; nothing is changed then.
        """
        waits: list[tuple[Order, tuple[float, float]]] = []
        for order in self._all_orders():
            since = start
            if not order.has_arrived:
                since = self._arrival(order.arrival_ns, tape, start, stop)
                if since == stop:
                    continue
            wait = self._queue_after(order, tape, start, stop, since)
            if wait is None:
                return self._singles(tape, start, stop)
            waits.append((order, wait))
        for order, wait in waits:
            order.has_arrived, (order.queue_at_arrival, order.queue_ahead) = True, wait
        return []

    def _queue_after(
        self, order: Order, tape: Tape, start: int, stop: int, since: int
    ) -> tuple[float, float] | None:
        """Queue at arrival and queue ahead after messages that do not reach the order, which
        is there from message `since` on; None where only single messages can tell.
        """
        level, size, end = tape.rows[order.side]
        first, last = int(end[start]), int(end[stop])
        ladder, at_arrival, ahead = (
            self.book.ladders[order.side], order.queue_at_arrival, order.queue_ahead
        )  # fmt: skip
        if not order.has_arrived:
            at_arrival = ahead = ladder.size_at(order.level)
        for row in (level[first:last] == order.level).nonzero()[0].tolist():
            row += first
            m, now = int(end.searchsorted(row, "right")) - 1, float(size[row])
            exch_ns = tape.exch_ns[m]
            if m < since:
                at_arrival = ahead = now
            elif exch_ns <= order.arrival_ns:
                return None
            elif exch_ns <= order.cancel_ns and now < ahead:
                ahead = now
        if ahead or (order.has_arrived and not order.queue_ahead) or self.peer_rules:
            return at_arrival, ahead
        # empty, or beyond the visible window? A level below that is never deleted tells
        deleted = level[first:last][(level[first:last] < order.level) & (size[first:last] == 0)]
        return (at_arrival, ahead) if ladder.holds_below(order.level, deleted) else None

    def _singles(self, tape: Tape, start: int, stop: int) -> list[int]:
        """Every message that can matter to an order of ours that is not reached."""
        found: set[int] = set()
        for order in self._all_orders():
            level, _, end = tape.rows[order.side]
            hits = (level[end[start] : end[stop]] == order.level).nonzero()[0]
            found.update((end.searchsorted(hits + end[start], "right") - 1).tolist())
            if not order.has_arrived:
                found.add(self._arrival(order.arrival_ns, tape, start, stop))
        return sorted(found - {stop})

    def _passed_before(self, tape: Tape, m: int) -> int:
        """Before this exchange time nothing can come any more once message m is due: trades
        and book have each gone past it.
        """
        trade, last = tape.trades.end[m] - 1, tape.last_book[m - 1] if m else -1
        trade_ns = tape.trades.exch_ns[trade] if trade >= 0 else self.trade_ns
        book_ns = tape.exch_ns[last] if last >= 0 else self.book.exch_ns
        return int(trade_ns if trade_ns < book_ns else book_ns)

    def _retire(self, tape: Tape, stop: int) -> None:
        """Forget orders that are over, and that no event from message stop on can meet; none
        before it has touched them.
        """
        for side, orders in self.orders.items():
            if stop and (len(orders) > 1 or (orders and self.sent[side] is None)):
                passed_ns = self._passed_before(tape, stop)
                late_ns = int(tape.recv_ns[stop - 1]) - self.offset_ns - LATE_NS
                passed_ns = passed_ns if passed_ns > late_ns else late_ns
                self.orders[side] = [o for o in orders if o.cancel_ns >= passed_ns]

    def end(self, tape: Tape, stop: int) -> None:
        """A tape ends: what was put off is made up for."""
        self.catch_up(tape, stop)
        last_trade = tape.trades.end[stop] - 1
        if last_trade >= 0:
            self.trade_ns = int(tape.trades.exch_ns[last_trade])

    # -- one message and our orders

    def _arrive(self, exch_ns: int, recv_ns: int) -> None:
        """Orders that arrive before exch_ns meet the book as it stood at their arrival."""
        if self.flatten_ns < exch_ns:
            self._walk_the_book(recv_ns)
        for order in self._all_orders():
            if order.has_arrived or order.arrival_ns >= exch_ns:
                continue
            order.has_arrived = True
            if self._is_reached(order):
                self._refuse(order, "would take")
            elif self._is_over_limit(order):
                self._refuse(order, "inventory limit")
            else:
                order.queue_ahead = order.queue_at_arrival = self._shown(order)

    def _meet_book(self, tape: Tape, m: int) -> None:
        """Book message m, just applied: does it reach our price, or shorten our queue?"""
        exch_ns, recv_ns = int(tape.exch_ns[m]), int(tape.recv_ns[m])
        for order in self._all_orders():
            level, _, end = tape.rows[order.side]
            is_told = tape.kind[m] == SNAPSHOT or (
                order.level in level[end[m] : end[m + 1]].tolist()
            )
            if order.has_arrived and exch_ns <= order.arrival_ns:
                # subtle: a row from before the arrival, heard of after a later trade
                if is_told:
                    order.queue_ahead = max(self._shown(order) - order.eaten, 0.0)
                if self._is_reached(order):
                    self._refuse(order, "would take")
            elif order.lives_at(exch_ns, self.passed_ns):
                if is_told:
                    order.queue_ahead = min(order.queue_ahead, self._shown(order))
                if self._is_reached(order):
                    self._fill(order, order.remaining, exch_ns, recv_ns)

    def _meet_trades(self, tape: Tape, m: int) -> None:
        """The trades of message m, one after the other: through our price, or at it."""
        model, recv_ns = self.parameters.fill_model, int(tape.recv_ns[m])
        *columns, end = tape.trades
        rows = slice(end[m], end[m + 1])
        for exch_ns, taker, tick, size, is_rpi in zip(*(c[rows].tolist() for c in columns)):
            if exch_ns < recv_ns - self.offset_ns - LATE_NS:
                continue
            side = -taker
            for order in self.orders[side]:
                beyond = order.level - side * tick  # above 0: the trade went through
                if beyond < 0 or not order.lives_at(exch_ns, self.passed_ns):
                    continue
                if beyond > 0 or (model == "touch" and not is_rpi):
                    self._fill(order, order.remaining, exch_ns, recv_ns)
                elif model == "queue" and not is_rpi and (
                    self.peer_rules or exch_ns > self.book.exch_ns
                ):  # else the size shown has it already
                    order.queue_ahead = min(order.queue_ahead, self._shown(order))
                    self._eat(order, size, exch_ns, recv_ns)
                break  # one order lives at a time, and a volume fills us once

    def _is_reached(self, order: Order) -> bool:
        """Whether the opposite side's best is at or beyond our price."""
        facing = self.book.ladders[-order.side].best
        return facing is not None and facing >= -order.level

    def _is_over_limit(self, order: Order) -> bool:
        limit = self.parameters.max_inventory + self.instrument.lot_size / 2
        return order.side * self.state.inventory + order.qty > limit

    def _shown(self, order: Order) -> float:
        """The size displayed at our price; inf where nothing can be seen."""
        ladder = self.book.ladders[order.side]
        size = ladder.size_at(order.level)
        is_known = size or self.peer_rules or ladder.is_visible(order.level)
        return size if is_known else math.inf

    def _refuse(self, order: Order, why: str) -> None:
        self.counts[f"refused: {why}"] += 1
        self._drop(order)

    def _eat(self, order: Order, size: float, exch_ns: int, recv_ns: int) -> None:
        """A trade at our price: first the queue ahead, then us."""
        left, lot = size - order.queue_ahead, self.instrument.lot_size
        order.eaten += size
        if left >= lot / 2:
            share = floor_to_lot(left * self.participation, lot)
            qty = order.remaining if self.peer_rules else min(order.remaining, share)
            self._fill(order, qty, exch_ns, recv_ns)
        order.queue_ahead = max(-left, 0.0)

    def _fill(self, order: Order, qty: float, exch_ns: int, recv_ns: int) -> None:
        if qty <= 0:
            return
        price = order.side * order.level * self.instrument.tick_size
        told = (order.queue_ahead, order.queue_at_arrival, False, order.arrival_ns)
        self._settle(exch_ns, recv_ns, order.side, price, qty, told)
        order.remaining = round(order.remaining - qty, 9)
        if order.remaining <= 0:
            self._drop(order)

    def _settle(
        self, exch_ns: int, recv_ns: int, side: int, price: float, qty: float,
        told: tuple[float, float, bool, int],
    ) -> None:  # fmt: skip
        """The one place where a fill is made; told are the last four fields of it."""
        p, s, is_taker = self.parameters, self.state, told[2]
        seen = s.mid_price  # at the last look, which may be after a fill worked out later
        if self.mid_price == self.mid_price:
            s.revalue(self.mid_price * (1 + self.shift_bps(recv_ns) * 1e-4))
        fee = price * qty * (p.taker_fee_bps if is_taker else p.maker_fee_bps) * 1e-4
        recv_ns = max(recv_ns, self.back_ns)
        fill = Fill(exch_ns, recv_ns, side, price, qty, fee, s.mid_price, *told)
        s.settle(fill)
        if seen == seen:
            s.revalue(seen)
        self.fills.append(fill)
        depth = s.bid_depth if side == BID else s.ask_depth
        if self.impact_bps and depth > 0:
            since_ns = max(exch_ns, self.shifts[-1][0])  # one heard of late counts from now
            shift = self.shift_bps(since_ns) - side * self.impact_bps * qty / depth
            self.shifts.append((since_ns, shift))

    def shift_bps(self, time_ns: int) -> float:
        """How far our own fills have moved the prices that we see, bps; it decays."""
        since_ns, shift = self.shifts[-1]
        return shift and shift * 2 ** (-max(time_ns - since_ns, 0) / (IMPACT_HALF_LIFE_S * NS))

    def _walk_the_book(self, recv_ns: int) -> None:
        """The taker order arrives: level by level until the inventory is closed."""
        arrival_ns, self.flatten_ns = self.flatten_ns, NEVER
        side, left = (ASK if self.state.inventory > 0 else BID), abs(self.state.inventory)
        for level, size in zip(*map(np.ndarray.tolist, self.book.ladders[-side].occupied())):
            qty = min(left, size)
            if qty < self.instrument.lot_size / 2:
                break
            price = -side * level * self.instrument.tick_size
            self._settle(arrival_ns, recv_ns, side, price, qty, (0.0, 0.0, True, arrival_ns))
            left = round(left - qty, 9)


@lru_cache
def floor_to_lot(qty: float, lot_size: float) -> float:
    """The largest multiple of the lot that is not above qty.

    >>> floor_to_lot(0.0129, 0.001)
    0.012
    """
    return round(math.floor(qty / lot_size + 1e-9) * lot_size, 9)


# ---- The market maker --------------------------------------------------------------


def find_breaks(tape: Tape, start: int, stop: int) -> list[int]:
    """The messages that no step may pass over: the first, those that change the rules,
    those after a silence of the book, and those around a fault of a book known beforehand.
    """
    kind, last = tape.kind[start:stop], tape.last_book[start:stop]
    is_break = kind > TICKER
    is_break[:1] = True
    silence = tape.recv_ns[start + 1 : stop] - tape.recv_ns[last[:-1]]
    is_break[1:] |= (silence > MIN_SILENCE_NS) | (last[:-1] < start)
    if tape.best is not None:
        bid, ask = tape.best[BID][start:stop], tape.best[ASK][start:stop]
        has_fault = (bid >= -ask) | (bid == NO_LEVEL) | (ask == NO_LEVEL)
        is_break |= has_fault
        is_break[1:] |= has_fault[:-1]
    return (is_break.nonzero()[0] + start).tolist()


class MarketMaker:
    """The loop's body: messages in, decisions out. Holds book, state, orders and log."""

    def __init__(
        self,
        parameters: Parameters,
        instrument: Instrument,
        log: TextIO | None = None,
        overrides: Mapping[str, Any] | None = None,
        solver: Callable = linprog,
        strategy: Callable[..., Distances] = choose_distances,
        **exchange: Any,
    ) -> None:
        self.parameters, self.instrument, self.strategy = parameters, instrument, strategy
        self.overrides = dict(overrides or {})  # parameters that a recording cannot change
        self.solver, self.log = solver, log
        self.state, self.book = State(), OrderBook()
        self.exchange = PaperExchange(parameters, instrument, self.state, **exchange)
        self.stale_ns = round(parameters.stale_after_s * NS)
        self.quote, self.distances = Quote(reason="no message yet"), None
        self.last_good: tuple[int, Distances] | None = None  # (time_ns, distances)
        self.on_decision: Callable[[MarketMaker], None] = lambda maker: None
        self.counts: Counter[str] = Counter()  # decisions by source and by reason
        self.tape: Tape | None = None  # of it, what message was
        self.heard = self.shown = 0  # the first not yet heard; not yet shown to exchange, book
        self.second_start = self.ticker = 0  # first message of this second, first ticker to see
        self.traded: list[float] = []  # turnover of this second in tapes before
        self.due_ns = 0  # the next decision
        self.second_ns = 0  # the next whole second of receive time
        self.book_recv_ns = 0  # when the last book message was received
        self.first_ns = self.last_ns = self.messages = 0
        self.lags: deque[int] = deque(maxlen=300)  # receive minus exchange time, ns
        self.lost = "no book yet"  # why the book cannot be trusted; empty: it can
        self.guard_shown = "book lost"
        self.is_stale = False
        self.is_stopped = False  # by max_drawdown_usdt, for good
        self.is_cut_off = False  # by an outage
        self.has_sent = False  # whether the last decision sent or cancelled anything
        if log:
            log.write(LOG_HEADER)

    # -- time and messages

    def take(self, *messages: Message) -> None:
        """Messages as they come."""
        if messages:
            self.follow(build_tape(messages))

    def follow(self, tape: Tape, start: int = 0, stop: int | None = None) -> None:
        """Messages start..stop-1 of a tape: decide wherever that is due.

        From one message that may change something to the next it goes in one step: these
        are the first at or past the time due, the first of a new second, and the tape's
        breaks.
        """
        stop = len(tape) if stop is None else stop
        self.tape, self.shown, self.heard, self.second_start = tape, start, start, start
        self.ticker = int(tape.quotes[:, 0].searchsorted(start))
        self.messages += stop - start
        self.exchange.begin(tape, start, stop)
        breaks = iter([*find_breaks(tape, start, stop), stop])
        at, next_break = start, start
        while at < stop:
            while next_break < at:
                next_break = next(breaks)
            ahead = tape.recv_ns[at : min(next_break, at + LOOK_AHEAD)]
            due_ns = self.due_ns if self.due_ns < self.second_ns else self.second_ns
            due = int(ahead.searchsorted(due_ns))
            at += due
            if at >= stop or (due == len(ahead) and at < next_break):
                continue  # nothing is due among these
            self._hear(at)
            self._meet(at, int(tape.kind[at]), int(tape.recv_ns[at]))
            if at == next_break:
                self.flush()
            at += 1
        self._hear(stop)
        self._see_tickers()
        self.flush()
        self.exchange.end(tape, stop)
        self.traded += [t for t in tape.turnover[self.second_start : stop].tolist() if t]
        self.second_start = stop
        self.last_ns = max(self.last_ns, int(tape.recv_ns[stop - 1]))
        books = tape.last_book[start:stop] == np.arange(start, stop)
        lags = tape.recv_ns[start:stop][books] - tape.exch_ns[start:stop][books]
        self.lags.extend((lags[-self.lags.maxlen :] - self.exchange.offset_ns).tolist())

    def _hear(self, stop: int) -> None:
        """Messages before `stop` of the tape have come."""
        self.heard = stop
        book = self.tape.last_book[stop - 1] if stop else -1
        if book >= 0:
            self.book_recv_ns = max(self.book_recv_ns, int(self.tape.recv_ns[book]))

    def _meet(self, m: int, kind: int, now_ns: int) -> None:
        """Message m: decide if that is due."""
        if now_ns >= self.second_ns or now_ns > self.book_recv_ns + MIN_SILENCE_NS:
            self.pass_time(now_ns)
        self.last_ns = now_ns
        if kind > TICKER:
            self._change_rules(m, kind, now_ns)
            return
        self.heard = m + 1
        if kind == DELTA:
            self.book_recv_ns = now_ns
        if now_ns >= self.due_ns or (kind == DELTA and self.is_stale):
            self.flush()
            self.decide(now_ns)

    def _change_rules(self, m: int, kind: int, now_ns: int) -> None:
        """A snapshot, a loss, or a control line: never part of a slice."""
        self.flush()
        self._hear(m + 1)
        self.shown = m + 1
        if kind == SNAPSHOT:
            self._take_snapshot(m, now_ns)
        elif kind == feed.LOST and not self.lost:
            self.lost = self.tape.notes[m]["reason"]
            self.exchange.flatten_ns = NEVER  # at what price, nobody can say: sent again later
            restart_measures(self.state)
            self.decide(now_ns)
        elif kind == feed.CONTROL and self.tape.notes[m]["event"] == "params":
            self._change_parameters(self.tape.notes[m], now_ns)

    def _take_snapshot(self, m: int, now_ns: int) -> None:
        """The whole book anew; after a loss it decides at once."""
        self.exchange.match_one(self.tape, m)
        self.book.clear()
        self.book.apply(self.tape, m, m + 1)
        was_away, self.lost = self.lost or self.is_stale, ""
        if was_away or now_ns >= self.due_ns:
            self.decide(now_ns)

    def _change_parameters(self, note: dict[str, Any], now_ns: int) -> None:
        try:
            changes = {**note["parameters"], **self.overrides}
            parameters = change_parameters(
                self.parameters, changes, self.instrument.min_order, running=True
            )
        except (ValueError, TypeError, KeyError) as error:
            logging.warning("parameters in the recording are refused: %s", error)
            return
        self.parameters = self.exchange.parameters = parameters
        self.stale_ns = round(parameters.stale_after_s * NS)
        self.decide(now_ns)

    def pass_time(self, now_ns: int) -> None:
        """What time alone brings up to now_ns: whole seconds, and a book gone silent."""
        if not self.second_ns:
            self.first_ns = now_ns
            self.second_ns = (now_ns // NS + 1) * NS
        self.last_ns = now_ns
        if self.lost or self.is_stale or self.is_cut_off:  # nothing is measured
            self.second_ns = (now_ns // NS + 1) * NS
            self._turnover_musd()
            return
        while True:
            silent_ns = self.book_recv_ns + self.stale_ns
            if self.second_ns <= min(now_ns, silent_ns):
                self._pass_second()
            elif silent_ns < now_ns:
                self.flush()
                self.decide(silent_ns)
                return self.pass_time(now_ns)
            else:
                return

    def _pass_second(self) -> None:
        """The mid after the last message before this second is a point of the grid."""
        second_ns, self.second_ns = self.second_ns, self.second_ns + NS
        self._look(second_ns)
        turnover = self._turnover_musd()
        if math.isnan(self.state.mid_price):
            return
        p = self.parameters
        update_measures(
            self.state, second_ns, turnover, self.instrument.tick_size, p.half_life_s
        )
        if self.guard(second_ns) != self.guard_shown:
            self.due_ns = second_ns  # the next message decides

    def _look(self, time_ns: int) -> None:
        """Bring the mid up to date. A tape that knows it spares a slice."""
        best, m, p = self.tape.best if self.tape else None, self.heard - 1, self.parameters
        must_match = p.max_drawdown_usdt is not None or self.exchange.impact_bps
        self._see_tickers()
        if best is None or m < self.shown or must_match:
            self.flush()
            self._see_mid(time_ns)
            return
        bid, ask = int(best[BID][m]), int(best[ASK][m])
        if NO_LEVEL < bid < -ask and ask > NO_LEVEL:
            self.state.revalue((bid - ask) / 2 * self.instrument.tick_size)

    def _turnover_musd(self) -> float:
        """What was traded in the second that has passed, million USDT."""
        if self.tape is not None:
            self.traded += self.tape.turnover[self.second_start : self.heard].tolist()
            self.second_start = self.heard
        traded, self.traded = math.fsum(self.traded), []  # exact: however it was sliced
        return traded * self.instrument.tick_size * 1e-6

    def _see_tickers(self) -> None:
        """What the tickers heard so far say."""
        quotes = self.tape.quotes if self.tape is not None else ()
        while self.ticker < len(quotes) and quotes[self.ticker, 0] < self.heard:
            for name, value in zip(feed.QUOTES, quotes[self.ticker, 1:].tolist()):
                if value == value:
                    setattr(self.state, name, value)
            self.ticker += 1

    def flush(self) -> None:
        """Show what was heard to the exchange and to the book."""
        if self.shown < self.heard:
            self.exchange.match(self.tape, self.shown, self.heard)
            self.book.apply(self.tape, self.shown, self.heard)
            self.shown = self.heard

    def _mid_ticks(self, time_ns: int) -> float:
        """The mid that we see: the book's, moved by our own impact if that is modelled."""
        return self.book.mid_ticks * (1 + self.exchange.shift_bps(time_ns) * 1e-4)

    def _see_mid(self, time_ns: int) -> None:
        """Mark the inventory to the mid, and look at the drawdown."""
        mid = self._mid_ticks(time_ns)
        if mid == mid:
            self.state.revalue(mid * self.instrument.tick_size)
        s, limit = self.state, self.parameters.max_drawdown_usdt
        if limit is not None and s.peak_net - s.equity > limit:
            self.is_stopped = True  # for good

    def change_tick(self, tick_text: str, now_ns: int) -> None:
        """The exchange has changed the grid of prices: a new book, and no order survives it."""
        self.pass_time(now_ns)
        self.instrument = dataclasses.replace(self.instrument, tick_text=tick_text)
        self.exchange.change_instrument(self.instrument)
        self.book.clear()
        restart_measures(self.state)
        self.lost = "tick size changed"
        self.decide(now_ns)

    def mark_to_last_mid(self) -> None:
        """The end: what came after the last decision and the last whole second."""
        self._see_mid(self.last_ns)

    def cut_off(self, now_ns: int, back_ns: int) -> None:
        """An outage begins: until back_ns we hear of nothing and cannot cancel."""
        self.pass_time(now_ns)
        restart_measures(self.state)
        self.is_cut_off, self.exchange.back_ns = True, back_ns
        self.decide(now_ns)
        self.due_ns = NEVER

    def reconnect(self) -> None:
        """The outage is over: what has happened meanwhile is known, and it decides."""
        self.is_cut_off = False
        self.decide(self.exchange.back_ns)

    # -- guards

    def is_silent(self, time_ns: int) -> bool:
        """Whether no book message has come for stale_after_s."""
        return time_ns - self.book_recv_ns >= self.stale_ns

    def guard(self, time_ns: int) -> str:
        """Why there must be no quote now; empty if there may be one."""
        p, s = self.parameters, self.state
        if self.is_cut_off:
            return "outage"
        if self.lost:
            return "book lost"
        if self.book.fault:
            return self.book.fault
        if self.is_silent(time_ns):
            return "book stale"
        if abs(s.mid_price / s.mark_price - 1) * 1e4 > p.max_mark_gap_bps:  # nan: no mark
            return "far from mark price"
        if self.is_stopped:
            return "drawdown limit"
        return "warming up" if len(s.returns_bps) < WARMUP_RETURNS else ""

    # -- deciding

    def decide(self, time_ns: int) -> None:
        """Measure, choose, quote, log; the next decision is due an interval later."""
        if self.is_cut_off and self.guard_shown == "outage":
            return
        state, p = self.state, self.parameters
        state.time_ns = time_ns
        self._see_tickers()
        state.peak_net = max(state.peak_net, state.equity)
        self._see_mid(time_ns)
        self._see_book()
        reason = self.guard_shown = self.guard(time_ns)
        was_stale, self.is_stale = self.is_stale, self.is_silent(time_ns)
        if self.is_stale and not was_stale:
            restart_measures(state)
        if reason:
            self.distances, self.quote = None, Quote(reason=reason)
            wanted: list[tuple[int | None, float]] = [(None, 0.0)] * 2
            if self.is_stopped and not self.lost:
                self.exchange.flatten(time_ns)
        else:
            self.distances = self._choose(time_ns)
            wanted = self._place(self.distances, self._mid_ticks(time_ns))
        self.exchange.expect(self.tape, self.shown)
        send = self.exchange.send
        self.has_sent = True in [send(s, *order, time_ns) for s, order in zip(SIDES, wanted)]
        self.counts[self.quote.source] += 1
        self.counts[self.quote.reason] += 1
        self.due_ns = time_ns + round(get_optimization_frequency(p, state.ema_volatility) * NS)
        if self.log:
            self.log.write(self.log_row())
        self.on_decision(self)

    def _see_book(self) -> None:
        """Best prices and depths; nan where they cannot be trusted."""
        s, book, band_bps = self.state, self.book, self.parameters.depth_band_bps
        if self.lost or book.fault:
            s.best_bid = s.best_ask = s.bid_depth = s.ask_depth = math.nan
            return
        s.best_bid = book.best(BID) * self.instrument.tick_size
        s.best_ask = book.best(ASK) * self.instrument.tick_size
        s.bid_depth, s.ask_depth = book.depth(BID, band_bps), book.depth(ASK, band_bps)

    def _choose(self, time_ns: int) -> Distances:
        """Distances from the mid, by the program or its fallbacks."""
        p, s = self.parameters, self.state
        q = min(max(s.inventory / p.max_inventory, -1.0), 1.0)
        depth_musd = (s.bid_depth + s.ask_depth) / 2 * s.mid_price * 1e-6
        good_ns, good = self.last_good or (-NEVER, None)
        age_s = (time_ns - good_ns) / NS
        distances = self.strategy(
            p, q, s.ema_volatility, s.liquidity, depth_musd, good, age_s, self.solver
        )
        if distances.source == "lp":
            self.last_good = (time_ns, distances)
        return distances

    def _place(self, distances: Distances, mid: float) -> list[tuple[int | None, float]]:
        """(level, quantity) of bid and ask around a mid in ticks. Sets self.quote, in USDT."""
        s, tick_size = self.state, self.instrument.tick_size
        wanted, reasons = [], [distances.reason] if distances.reason else []
        for side, name, bps, depth in (
            (BID, "bid", distances.bid_bps, s.bid_depth),
            (ASK, "ask", distances.ask_bps, s.ask_depth),
        ):
            qty, why_not = self._quantity(side, depth)
            if why_not:
                reasons.append(f"no {name}: {why_not}")
            wanted.append((None if why_not else self._level(side, mid, bps), qty))
        (bid, bid_qty), (ask, ask_qty) = wanted
        self.quote = Quote(
            None if bid is None else bid * tick_size,
            bid_qty,
            None if ask is None else -ask * tick_size,
            ask_qty,
            distances.source,
            "; ".join(reasons),
        )
        return wanted

    def _level(self, side: int, mid: float, bps: float) -> int:
        """bps from the mid, rounded outward to the tick, post-only, and a price above 0."""
        level = math.floor(side * mid - mid * bps * 1e-4 + 1e-9)
        level = min(level, -self.book.ladders[-side].best - 1)
        return max(level, 1) if side == BID else level

    def _quantity(self, side: int, depth: float) -> tuple[float, str]:
        """How much to quote on a side, or why nothing."""
        p, lot = self.parameters, self.instrument.lot_size
        qty = floor_to_lot(min(p.order_qty, p.max_depth_share * depth), lot)
        if qty < self.instrument.min_order * (1 - 1e-9):
            return 0.0, "book too thin for a lot"
        if side * self.state.inventory + qty > p.max_inventory + lot / 2:
            return 0.0, "inventory limit"
        return qty, ""

    # -- log

    def log_row(self) -> str:
        """The last decision as a line of CSV; empty where nothing is known."""
        s, q, digits = self.state, self.quote, self.instrument.digits
        is_sound = s.best_bid == s.best_bid
        terms = self.distances.base_spread if self.distances else None
        base_spread = terms.total_bps if terms else math.nan

        def price(value: float | None, decimals: int = digits) -> str:
            return "" if value is None or value != value else f"{value:.{decimals}f}"

        def number(value: float) -> str:
            return "" if value != value else f"{value:.9g}"

        cells = (
            str(s.time_ns),
            price(s.mid_price if is_sound else None, digits + 1),
            price(s.best_bid),
            price(s.best_ask),
            price(q.bid_price),
            number(q.bid_qty) if q.bid_price is not None else "",
            price(q.ask_price),
            number(q.ask_qty) if q.ask_price is not None else "",
            *map(number, (base_spread, s.volatility, s.ema_volatility, s.bid_depth, s.ask_depth)),
            *map(number, (s.liquidity, s.inventory)),
            f"{s.cash:.8f}",
            f"{s.equity:.8f}",
            q.source,
            q.reason.replace(",", ";").replace("\n", " "),
        )
        return ",".join(cells) + "\n"


# ---- Display -----------------------------------------------------------------------


def in_words(solution: Solution, order_share: float) -> list[str]:
    """What spread, edge and inventory cost at the margin, relative to the quote's cost C.

    order_share: one order as a share of max_inventory.
    """

    def effect(price: float, amount: float) -> str:
        return f"cost {100 * price * amount / solution.cost:+.1f} %"

    if solution.spread_price > 1e-9:
        words = [f"1 % more spread asked for: {effect(solution.spread_price, 0.01)}"]
    else:
        words = ["spread: costs nothing, the edges ask for more"]
    for side, price in (("bid", solution.bid_edge_price), ("ask", solution.ask_edge_price)):
        if price > 1e-9:
            words.append(f"{side} stands on its edge, 1 % of S further: {effect(price, 0.01)}")
    words.append(f"one order more bought: {effect(solution.inventory_price, order_share)}")
    return words


def describe(maker: MarketMaker, health: list[str]) -> list[tuple[str, list[str]]]:
    """What the screen shows: label and items, line by line."""
    s, p, coin = maker.state, maker.parameters, maker.instrument.base_coin
    d, fills = maker.distances, maker.exchange.fills

    def price(value: float | None) -> str:
        return "-" if value is None or value != value else f"{value:,.{maker.instrument.digits}f}"

    def number(value: float) -> str:
        return "-" if value != value else f"{value:.2f}"

    is_sound, tick_size = not (maker.lost or maker.book.fault), maker.instrument.tick_size
    best = {side: maker.book.best(side) * tick_size if is_sound else None for side in SIDES}
    lines = [
        ("Market", [
            f"bid {price(best[BID])}", f"ask {price(best[ASK])} USDT",
            f"last {price(s.last_price)}", f"mark {price(s.mark_price)}",
            f"depth {number(s.bid_depth)} / {number(s.ask_depth)} {coin} within "
            f"{p.depth_band_bps:g} bps",
            f"volatility {number(s.volatility)} (EMA {number(s.ema_volatility)}) bps/sqrt(s)",
            f"liquidity {number(s.liquidity)} M USDT per bp",
        ]),
        ("Our quote", describe_quote(maker, price)),
    ]  # fmt: skip
    if d and (t := d.base_spread):
        terms = (f"volatility {t.volatility_bps:.2f}", f"liquidity {t.liquidity_bps:.2f}")
        sum_ = f"{t.total_bps:.2f} bps = {' + '.join(terms)} + depth {t.depth_bps:.2f}"
        lines.append(("Base spread", [sum_, f"(at least {t.floor_bps:g})"]))
    if d and d.solution:
        lines.append(("At the margin", in_words(d.solution, p.order_qty / p.max_inventory)))
    held = [f"{s.inventory:+g} {coin} of at most {p.max_inventory:g}", f"{s.fills} fills"]
    if fills:
        verb = "bought" if fills[-1].side == BID else "sold"
        held.append(f"last: {verb} {fills[-1].qty:g} at {price(fills[-1].price)}")
    result = [f"gross {s.gross:+.2f}", f"fees {s.fees_paid:.2f}", f"net {s.equity:+.2f}"]
    parts = f"spread captured {s.spread_captured:+.2f}, revaluation {s.revaluation:+.2f}"
    result.append(f"gross = {parts}")
    return [*lines, ("Inventory", held), ("Result, USDT", result), ("Feed", health)]


def describe_quote(maker: MarketMaker, price: Callable[[float | None], str]) -> list[str]:
    """Our two orders and where they come from, or why there is none."""
    s, q = maker.state, maker.quote
    if q.source == "none":
        detail = f" ({maker.lost})" if q.reason == "book lost" else ""
        if q.reason == "warming up":
            detail = f" ({len(s.returns_bps)} of {WARMUP_RETURNS} s)"
        return [f"NONE: {q.reason}{detail}"]
    items = []
    for name, value, qty in (("bid", q.bid_price, q.bid_qty), ("ask", q.ask_price, q.ask_qty)):
        far = "" if value is None else f", {abs(value / s.mid_price - 1) * 1e4:.2f} bps away"
        items.append(f"{name} {price(value)}" + (f" x {qty:g}{far}" if value else ""))
    return [*items, f"source {q.source}" + (f": {q.reason}" if q.reason else "")]


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


def clock_text(time_ns: int) -> str:
    """A receive time as date and time of day, UTC."""
    return time.strftime("%F %T", time.gmtime(time_ns / NS))


class Display:
    """Shows the market maker: in place on a terminal, else one plain line a second."""

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        self.title, self.stream = title, stream or sys.stdout
        self.in_place = self.stream.isatty()
        self.interval_s = 0.25 if self.in_place else 1.0
        self.next_s, self.started, self.notice = 0.0, False, ""

    def show(self, maker: MarketMaker, health: Callable[[], list[str]], force=False) -> None:
        """Show if it is time to; health is only asked then."""
        now = time.monotonic()
        if now < self.next_s and not force:
            return
        self.next_s = now + self.interval_s
        if self.in_place:
            self.stream.write(self.screen(maker, health()))
        elif not force and maker.messages:
            title = "" if self.started else self.title + "\n"
            self.started = True
            self.stream.write(title + self.plain_line(maker) + "\n")
        self.stream.flush()

    def screen(self, maker: MarketMaker, health: list[str]) -> str:
        columns, rows = shutil.get_terminal_size((80, 24))
        moment = f"{self.title}   {clock_text(maker.last_ns)} UTC"
        head = [moment, "paper trading: no order is ever sent", ""]
        body = wrap(describe(maker, health), columns)
        foot = ["", self.notice or "Ctrl-C ends the run with a summary"]
        text = [line[:columns] for line in head + body + foot][: rows - 1]
        clear = "" if self.started else "\x1b[2J"
        self.started = True
        return clear + "\x1b[H" + "".join(line + "\x1b[K\n" for line in text) + "\x1b[J"

    def plain_line(self, maker: MarketMaker) -> str:
        s, q = maker.state, maker.quote
        sides = [
            "-" if price is None else f"{price:.{maker.instrument.digits}f}"
            for price in (q.bid_price, q.ask_price)
        ]
        why = f" ({q.reason})" if q.reason else ""
        notice, self.notice = f"  {self.notice}" if self.notice else "", ""
        mid = f"{s.mid_price:.{maker.instrument.digits + 1}f}"
        return (
            f"{clock_text(maker.last_ns)}  mid {mid}  quote {' / '.join(sides)}"
            f"  {q.source}{why}  inventory {s.inventory:+g}  net {s.equity:+.2f} USDT{notice}"
        )


def summarize(maker: MarketMaker, title: str) -> str:
    """The end of a run in a few lines."""
    s, counts, sources = maker.state, maker.counts, ("lp", "last_good", "default", "none")
    start, end = (clock_text(t) for t in (maker.first_ns, maker.last_ns))
    held = f"inventory {s.inventory:+g} {maker.instrument.base_coin}"
    lines = [
        ("Span", [f"{start} to {end} UTC", f"{maker.messages} messages"]),
        ("Decisions", [f"{counts[name]} {name}" for name in sources if counts[name]]),
        ("Reasons", [f"{counts[name]} x {name}" for name in counts if name not in (*sources, "")]),
        ("Orders", [f"{n} {name}" for name, n in maker.exchange.counts.items()]),
        ("Fills", [f"{s.fills}", f"turnover {s.turnover:,.0f} USDT", held]),
        ("Result, USDT", [
            f"gross {s.gross:+.2f}", f"fees {s.fees_paid:.2f}", f"net {s.equity:+.2f}",
            f"net = spread captured {s.spread_captured:+.2f} + revaluation {s.revaluation:+.2f}"
            " - fees", f"(residual {s.residual:.0e})",
        ]),
    ]  # fmt: skip
    width = shutil.get_terminal_size((100, 24)).columns
    return "\n".join([title, *wrap([line for line in lines if line[1]], width)])


# ---- Plot --------------------------------------------------------------------------


HISTORY = ("time_ns", "mid", "bid", "ask", "inventory", "gross", "fees")  # of each decision


def history_row(maker: MarketMaker) -> tuple[float, ...]:
    """What the plot needs of the last decision; nan where there is none."""
    s, q = maker.state, maker.quote
    bid, ask = (math.nan if price is None else price for price in (q.bid_price, q.ask_price))
    mid = s.mid_price if s.best_bid == s.best_bid else math.nan
    return s.time_ns, mid, bid, ask, s.inventory, s.gross, s.fees_paid


def plot_session(history: array, fills: list[Fill], title: str, coin: str, path: Path) -> None:
    """Mid and quotes with fills, inventory, result: one PNG."""
    import matplotlib  # slow to import, and needed by nobody else here

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = np.array(history).reshape(-1, len(HISTORY))
    columns = dict(zip(HISTORY, rows.T))
    start = rows[0, 0] if len(rows) else 0.0
    minutes = (columns["time_ns"] - start) / (60 * NS)
    figure, (top, middle, bottom) = pyplot.subplots(
        3, 1, figsize=(10, 9), sharex=True, height_ratios=(3, 1, 1.5), layout="constrained"
    )
    figure.suptitle(title)
    top.plot(minutes, columns["mid"], color="black", linewidth=0.8, label="mid price")
    for name, color in (("bid", "#0072B2"), ("ask", "#D55E00")):
        top.step(minutes, columns[name], where="post", color=color, linewidth=0.6, alpha=0.7,
                 label=f"our {name}")
    for side, name, color, marker in (
        (BID, "we bought", "#0072B2", "^"), (ASK, "we sold", "#D55E00", "v"),
    ):
        ours = [fill for fill in fills if fill.side == side]
        at = [(fill.recv_ns - start) / (60 * NS) for fill in ours]
        top.scatter(at, [fill.price for fill in ours], color=color, marker=marker, s=28, zorder=3,
                    edgecolors="white", linewidths=0.4, label=f"{name} ({len(ours)})")
    top.set_ylabel("price, USDT")
    top.legend(loc="best", fontsize=8, ncols=2)
    middle.step(minutes, columns["inventory"], where="post", color="black", linewidth=0.8)
    middle.axhline(0, color="grey", linewidth=0.5)
    middle.set_ylabel(f"inventory, {coin}")
    for name, values, color in (
        ("gross", columns["gross"], "#009E73"),
        ("net", columns["gross"] - columns["fees"], "black"),
        ("fees, as a loss", -columns["fees"], "#CC79A7"),
    ):
        bottom.plot(minutes, values, color=color, linewidth=1.0, label=name)
    bottom.axhline(0, color="grey", linewidth=0.5)
    bottom.set_ylabel("result, USDT")
    bottom.set_xlabel("minutes since the start")
    bottom.legend(loc="best", fontsize=8, ncols=3)
    feed.write_whole(path, partial(figure.savefig, dpi=120, format="png"))
    pyplot.close(figure)


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
        values = {**recorded, **given}
        return change_parameters(Parameters(), values, instrument.min_order)
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
        feed.check_plot_path(options.plot)
        self.log = feed.GrowingFile(options.log) if options.log else None
        self.maker = MarketMaker(parameters, instrument, self.log, None if start is None else given)
        self.history = array("d")  # flat rows of HISTORY
        if options.plot:
            self.maker.on_decision = lambda maker: self.history.extend(history_row(maker))
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
        self.maker.mark_to_last_mid()
        self.display.show(self.maker, self.health, force=True)
        print(summarize(self.maker, self.title))
        if self.options.plot:
            try:
                coin, fills = self.maker.instrument.base_coin, self.maker.exchange.fills
                plot_session(self.history, fills, self.title, coin, self.options.plot)
            except OSError as error:
                why = error.strerror or error
                raise UserError(f"--plot {self.options.plot} cannot be written: {why}") from None

    def discard_log(self) -> None:
        """An error came before any quote: leave no log in the way of the next run."""
        if self.log and not set(self.maker.counts) & {"lp", "last_good", "default"}:
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
            self.source.flush()
            if self.file:
                self.read_edits(self.file)
            if self.maker.book.fault and not self.maker.lost:
                self.source.resync_reason = self.maker.book.fault
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
            state = f"last frame {age_s:.1f} s ago" if source.connected else "NOT CONNECTED"
            items = [state, *items, f"{source.reconnects} reconnects"]
        items.append(f"{counts['malformed']} malformed")
        if self.maker.lags:
            lag_ms = statistics.median(self.maker.lags) / MS
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
    session: Session, source: feed.LiveFeed, stop: threading.Event, duration_s: float
) -> Iterator[list[Message]]:
    """Messages as they come. At the end the feed stops first, then the rest is drained."""
    end_ns = source.clock_ns() + duration_s * NS
    while not stop.is_set() and source.clock_ns() < end_ns and not source.fatal:
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
    session: Session, path: Path, parser: feed.Parser, stop: threading.Event, speed: float
) -> Iterator[list[Message]]:
    """The messages of a recording at a multiple of their own pace (inf: no waiting)."""
    began_s, first_ns, end_ns, burst = time.monotonic(), 0, NEVER, []
    for message in feed.replay(path, parser):
        if not first_ns:
            first_ns = message.recv_ns
            end_ns = first_ns + min(session.options.duration * NS, NEVER // 2)
        if message.recv_ns > end_ns or stop.is_set():
            break
        if speed < math.inf:
            due_s = began_s + (message.recv_ns - first_ns) / NS / speed
            while (wait_s := due_s - time.monotonic()) > 0:
                session.look()
                if stop.wait(min(wait_s, TICK_S)):
                    return
        burst.append(message)
        if speed < math.inf or len(burst) == BURST:
            session.look()
            yield burst
            burst = []
    yield burst


def run_live(options: argparse.Namespace, clock_ns: Callable[[], int] | None = None) -> None:
    """Paper trading on the live feed; the bundled sample where there is no network."""
    flags = (options.symbol, options.category, options.tick_size, options.lot_size)
    instrument = feed.live_instrument(*flags, options.url)
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
    messages = live_messages(session, session.source, feed.stop_signal(), options.duration)
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
    parser, header = feed.parser_of_recording(path, *flags)
    kind = "SYNTHETIC data" if header.start.get("synthetic") else path.name
    pace = "" if speed == math.inf else f" at {speed:g} x"
    title = f"{parser.instrument.symbol} {parser.instrument.category}   {label}{pace} of {kind}"
    session = Session(options, parser.instrument, title, header.start)
    stop = feed.stop_signal()
    session.parser = parser
    session.run(replayed_messages(session, path, parser, stop, speed))


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
