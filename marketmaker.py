"""From market to quote: state, decision, paper fills, display. No order is ever sent.

Live, in a replay and in a backtest the loop is the same: hear a message, and decide if it is time
to. Nothing else is ever asked for the time, so the same messages make the same decisions.

A decision is made at the first message that is due, with that message applied; its time is
the message's recv_ns. The next is due one optimization interval later, or as soon as the mid is
requote_move_bps away from where it was. Due at once are a loss, the snapshot that ends it, new
parameters, and a guard that trips or clears (judged at every whole second); a book gone silent is
decided on at the instant at which it has been so for too long. A fill calls for no decision.

After a loss both orders are cancelled. The snapshot ends it, yet no return may span the hole: the
decision on it says "warming up". At the next whole second the mid is measured again, and the first
message from then on decides, and quotes. An outage (of a backtest; a note tells its end) cuts us
off: nothing is decided, sent or known, while the market goes on meeting what rests.

How paper orders fill, with the direction of each rule's bias. (tests/test_marketmaker.py
has the same rules in their plainest form, message by message: `simulate`.)

  - An order decided at t (our clock) stands on the exchange from t + order_latency until its
    cancel arrives, as late. Only events of that time (exchange clock) can fill it, whenever we
    hear of them. At its arrival post-only and the inventory limit are judged again, on the last
    book pushed and the fills heard of. Realistic, but for the time since that push.
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
    a quote's fill is that much worse in price, times its share of the depth near the mid.
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
import re
import runpy
import shutil
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import feed
import optimize as opt
from feed import ASK, BID, MS, NEVER, NS, SIDES, UserError, clock_text
from optimize import INF, Distances, Parameters

import numpy as np

NAN = math.nan  # not known, or none
MINUTE_NS = 60 * NS
DECIMALS = 12  # of quantities: no lot is finer
DEFAULTS = asdict(Parameters())
WINDOW_S = 60  # of the volatility and the liquidity
WARMUP_RETURNS = 10  # of 1 s before the first quote
LATE_NS = 10 * NS  # a trade that is heard of later than this is left out
SAMPLE, SAMPLE_SPEED = Path(__file__).parent / "data" / "sample.jsonl.gz", 10.0
MAX_LAG_NS = 2 * NS  # of receive after exchange time; more is warned of


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
    trades: deque = field(default_factory=deque)  # of the last minute, as in Message

    @property
    def depth_musd(self) -> float:
        """Mean of the depths near the mid, million USDT."""
        return sum(self.depths.values()) / 2 * self.mid_price * 1e-6

    def measure_second(self, second_ns: int, mid_price: float, turnover_musd: float,
                       tick_size: float, half_life_s: float) -> None:  # fmt: skip
        """One whole second of receive time has passed; the volatility is the root mean square
        of the returns, the liquidity the turnover over the sum of their absolute values."""
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
    queue_ahead: float = 0.0  # base coin, just before the trade, or just after the book's row
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
    path: array = field(default_factory=partial(array, "d"))  # see `add_point`

    @property
    def equity(self) -> float:
        """cash + inventory x mid."""
        return self.cash + (self.inventory * self.mid_price if self.inventory else 0.0)

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
        self.add_point(fill.recv_ns, self.mid_price)

    def add_point(self, time_ns: int, mid_price: float) -> None:
        """A point of the pictures: every whole second, fill and loss of the mid (nan)."""
        self.path.extend((time_ns, mid_price, self.inventory, self.spread_captured,
                          self.revaluation, self.fees_paid, self.equity))  # fmt: skip


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
    is_sent: float = 0.0  # 1 if it sent or cancelled an order
    source: str = "none"  # the strategy, last_good, default or none
    reason: str = "no message yet"  # why not the strategy's own, or why a side is missing
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


# ---- Paper exchange ----------------------------------------------------------------


def floor_to_lot(qty: float, lot_size: float) -> float:
    """The largest multiple of the lot that is not above qty: 0.012 for 0.0129 and 0.001."""
    return round(math.floor(qty / lot_size + 1e-9) * lot_size, DECIMALS)


@dataclass(slots=True, eq=False)
class Order:
    """A paper order. It stands on the exchange in (arrival_ns, cancel_ns]. Its queue is the size
    shown at its price at its arrival, and from then on only gets shorter (or a late row says that
    it was another)."""

    side: int
    level: int  # side x price tick: a higher level is a better price on both sides
    qty: float  # base coin, as sent
    left: float  # of it, not yet filled
    arrival_ns: int  # exchange time
    cancel_ns: int = NEVER
    has_arrived: bool = False
    queue_ahead: float = INF  # base coin; inf where nothing can be seen
    queue_at_arrival: float = INF
    eaten: float = 0.0  # by trades at our price since then
    due: float = 0.0  # base coin, our share of what trades left, below a lot so far


@dataclass(eq=False)
class PaperExchange:
    """Matches the market's messages, on the exchange's clock, against our orders, cancelled ones
    included: a trade can be heard of after its order was replaced. By peer_rules, those of
    hftbacktest, an order fills whole or not at all, and a level out of the window is empty."""

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
    trade_ns: int = 0  # exchange time of the last trade
    recv_ns: int = 0  # of the message that is met
    before: feed.View = feed.View()  # of the market, just before that message

    def __post_init__(self) -> None:
        self.book, p = self.market.book, self.parameters
        self.offset_ns = round(p.clock_offset_ms * MS)  # our clock - exchange's
        # From a decision, on our clock, to its arrival, on the exchange's.
        self.to_exchange_ns = round(p.order_latency_ms * MS) - self.offset_ns

    def send(self, side: int, level: int | None, qty: float, time_ns: int) -> bool:
        """Ask for one order at a level, or for none, and say whether that changes anything. An
        unchanged order keeps its place, with what is left of it; else cancel and new order
        arrive at one instant."""
        standing = next((o for o in self.orders if o.side == side and o.cancel_ns == NEVER), None)
        wanted = None if level is None else (level, qty)
        if time_ns < self.back_ns or wanted == (standing and (standing.level, standing.qty)):
            return False
        arrival_ns = time_ns + self.to_exchange_ns
        if standing:
            standing.cancel_ns = arrival_ns
        if wanted:
            self.orders.append(Order(side, level, qty, left=qty, arrival_ns=arrival_ns))
            self.counts["sent"] += 1
        return True

    def flatten(self, time_ns: int) -> None:
        """Close the inventory as a taker, level by level, as far as the book goes. A concession
        to simplicity: at once, without the latency of an order; slightly optimistic."""
        self.recv_ns, self.before = time_ns, self.book.view
        exch_ns, inventory = time_ns - self.offset_ns, self.account.inventory
        side, qty = ASK if inventory > 0 else BID, abs(inventory)
        order = Order(side, 0, qty, qty, exch_ns, queue_ahead=0.0, queue_at_arrival=0.0)
        for level, size in zip(*map(np.ndarray.tolist, self.book.levels(-side))):
            order.level = -level
            self._fill(order, min(order.left, size), exch_ns, "taker")

    def meet(self, message: feed.Message) -> None:
        """Trades meet the book as it stood just before their message, book rows just after."""
        exch_ns, book = message.exch_ns, self.book
        self.recv_ns, self.before = message.recv_ns, book.view

        # A cancelled order is kept as long as a trade or a row of before its end may still
        # come: until both streams have gone past it, at most LATE_NS.
        oldest_ns = message.recv_ns - self.offset_ns - LATE_NS
        passed_ns = max(min(self.trade_ns, book.exch_ns), oldest_ns)
        self.orders = [order for order in self.orders if order.cancel_ns >= passed_ns]

        # Who has arrived meets the book as it stands. He is refused where he would take.
        limit = self.parameters.max_inventory + self.instrument.lot_size / 2
        for order in [o for o in self.orders if not o.has_arrived and o.arrival_ns < exch_ns]:
            order.has_arrived = True
            if self._is_reached(order):
                self._refuse(order, "would take")
            elif order.side * self.account.inventory + order.qty > limit:
                self._refuse(order, "inventory limit")
            else:
                order.queue_ahead = order.queue_at_arrival = self._shown(order)

        # A message of trades: each meets the orders as those before it left them.
        for trade_ns, level, size, is_rpi in message.trades:
            if trade_ns >= oldest_ns:
                self._meet_trade(trade_ns, level, size, is_rpi)
        self.trade_ns = exch_ns if message.trades else self.trade_ns

        # A message of the book: a smaller size shortens our queue; does it reach our price?
        book.apply(message)
        if message.kind not in (feed.DELTA, feed.SNAPSHOT):
            return
        for order in [o for o in self.orders if o.has_arrived]:
            shown, is_reached = self._shown(order), self._is_reached(order)
            if order.arrival_ns < exch_ns <= order.cancel_ns:
                order.queue_ahead = min(order.queue_ahead, shown)
                if is_reached:
                    self._fill(order, order.left, exch_ns, "book")
            elif exch_ns <= order.arrival_ns:
                # subtle: heard after the arrival, but of before it. It tells better what stood
                # there when we came: the queue is that, less what trades have eaten since.
                if shown < INF:
                    order.queue_at_arrival = shown
                    order.queue_ahead = max(shown - order.eaten, 0.0)
                if is_reached:
                    self._refuse(order, "would take")

    def _meet_trade(self, exch_ns: int, level: int, size: float, is_rpi: bool) -> None:
        """A trade through our price fills us; at our price, the fill model says how much."""
        model = "through" if is_rpi else self.parameters.fill_model
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
                rest, lot = size - order.queue_ahead, self.instrument.lot_size
                order.eaten += size
                if rest >= lot / 2:
                    order.due += rest * self.participation
                    share = floor_to_lot(order.due, lot)
                    order.due -= share
                    qty = order.left if self.peer_rules else min(order.left, share)
                    self._fill(order, qty, exch_ns, "queue")
                order.queue_ahead = max(-rest, 0.0)
            return  # on a side one order stands at a time, and a volume fills us once

    def _shown(self, order: Order) -> float:
        """The size displayed at our price; inf where nothing can be seen."""
        if self.peer_rules:
            return self.book.sizes.item(order.level)
        return self.book.shown(order.side, order.level)

    def _is_reached(self, order: Order) -> bool:
        """Whether the opposite side's best is at or beyond our price."""
        return -self.book.view.best(-order.side) <= order.level

    def _refuse(self, order: Order, why: str) -> None:
        """The exchange does not take the order, or, by a late row, should not have."""
        self.counts[f"refused: {why}"] += 1
        self.orders.remove(order)

    def _fill(self, order: Order, qty: float, exch_ns: int, rule: str) -> None:
        """A fill at the order's price, booked at the mid just before the message."""
        if qty <= 0:
            return
        account, p, side = self.account, self.parameters, order.side
        price = side * order.level * self.instrument.tick_size
        if self.impact_bps and rule != "taker" and (depth := self.market.depths[side]) > 0:
            price *= 1 + side * self.impact_bps * 1e-4 * order.qty / depth
        fee = price * qty * (p.taker_fee_bps if rule == "taker" else p.maker_fee_bps) * 1e-4
        account.mark(self.before.mid_ticks * self.instrument.tick_size)
        account.settle(Fill(
            exch_ns, max(self.recv_ns, self.back_ns), side, price, qty, fee, account.mid_price,
            order.queue_ahead, order.queue_at_arrival, order.arrival_ns, rule,
        ))  # fmt: skip
        order.left = round(order.left - qty, DECIMALS)
        self.orders = [order for order in self.orders if order.left > 0]


# ---- The market maker ---------------------------------------------------------------


class MarketMaker:
    """Messages in, decisions out. Holds market, account, exchange and log."""

    def __init__(self, parameters: Parameters, instrument: feed.Instrument, log: Any = None,
                 overrides: Mapping[str, Any] | None = None, strategy: str | Callable = "lp",
                 **frictions: Any) -> None:  # fmt: skip
        self.parameters, self.instrument, self.log = parameters, instrument, log
        self.overrides = dict(overrides or {})  # the user's, before a recording's, before defaults
        self.recorded = {n: v for n, v in asdict(parameters).items() if n not in self.overrides}
        self.strategy, self.strategy_name = load_strategy(strategy)
        market, account = self.market, self.account = Market(), Account()
        self.exchange = PaperExchange(parameters, instrument, market, account, **frictions)
        self.decision = Decision()
        self.times, self.rows = array("q"), array("d")  # of all decisions: see `columns`
        self.last_good: tuple[int, Distances | None] = (-NEVER, None)  # when, what
        self.last_guard = "book lost"
        self.is_stale = False  # the book is silent
        self.is_stopped = False  # by max_drawdown_usdt, for good
        self.due_ns = 0  # the next decision
        self.mid_ticks = NAN  # at the last one; the mid a requote_move away makes the next
        self.second_ns = 0  # the next whole second of receive time
        self.traded: list[float] = []  # turnovers heard of in this second, ticks x base coin
        self.first_ns = self.last_ns = self.messages = 0
        self.unheard_ns = 0  # for how long quotes stood while the connection was lost
        self.notice = ""  # what became of the newest edit of the parameters
        self.sources, self.reasons = Counter[str](), Counter[str]()  # of decisions
        if log is not None:
            log.write(",".join(LOGGED) + "\n")

    def hear(self, message: feed.Message) -> None:
        """What time brings before a message; the message itself; a decision, if one is due."""
        market, kind, now_ns, ends_hole = self.market, message.kind, message.recv_ns, False
        self.messages += 1
        self.pass_time(now_ns)
        # Our orders meet it, and the book shows it.
        self.exchange.meet(message)
        if kind == feed.TRADES:
            market.trades.extend(message.trades)
            self.traded += [abs(level) * size for _, level, size, _ in message.trades]
            while market.trades[0][0] < message.exch_ns - MINUTE_NS:
                market.trades.popleft()
        elif kind == feed.TICKER:
            market.ticker_recv_ns = now_ns
        elif kind in (feed.DELTA, feed.SNAPSHOT):
            market.book_recv_ns, market.lag_ns = now_ns, now_ns - message.exch_ns
            ends_hole = self.is_stale or bool(market.lost)
        if kind == feed.SNAPSHOT:  # from here on the book can be trusted
            market.lost, market.usual_lag_ns = "", market.lag_ns
        # Does it change the rules? If not: is it time, has the mid moved, is there a book again?
        if kind > feed.SNAPSHOT:
            is_due = self._change_rules(message)
        else:
            moved_ticks = abs(market.book.view.mid_ticks - self.mid_ticks)  # nan: not known
            band_ticks = self.mid_ticks * self.parameters.requote_move_bps * 1e-4
            is_due = now_ns >= self.due_ns or moved_ticks >= band_ticks or ends_hole
        if is_due:
            self.decide(now_ns)

    def _change_rules(self, message: feed.Message) -> bool:
        """A loss, or a control line: whether it calls for a decision."""
        market, note, now_ns = self.market, message.note, message.recv_ns
        if message.kind == feed.LOST and not market.lost:
            market.lost = note["reason"]
            # Until the cancels arrive the quotes stand, and what they meet is never heard.
            end_ns = min(max((o.cancel_ns for o in self.exchange.orders), default=0),
                         now_ns + self.exchange.to_exchange_ns)  # fmt: skip
            self.unheard_ns += max(end_ns - market.book.exch_ns, 0)
        elif note.get("event") == "params":
            return self._change_parameters(note)
        elif note.get("event") == "outage":  # of a backtest: we hear nothing until then; 0: it ends
            self.exchange.back_ns = note["back_ns"]
        else:
            return False
        return True

    def _change_parameters(self, note: Mapping[str, Any]) -> bool:
        """Parameters of a control line; whether they are sound, and so in force. Those under
        "overrides" are the user's, and replace all that he gave before."""
        try:
            recorded = {**self.recorded, **note.get("parameters", {})}
            overrides = {**note.get("overrides", self.overrides)}
            p = opt.change_parameters(self.parameters, DEFAULTS | recorded | overrides,
                                      self.instrument.min_order, running=True)  # fmt: skip
            self.check_value(p)
        except (ValueError, TypeError) as error:
            self.notice = feed.printable(f"parameters refused: {error}")
            logging.warning(self.notice)
            return False
        changed = {n: value for n, value in vars(p).items() if value != getattr(self.parameters, n)}
        self.notice = f"parameters changed: {opt.in_words(changed) or 'none'}"
        self.recorded, self.overrides = recorded, overrides
        if p.min_half_spread_bps > self.parameters.min_half_spread_bps:
            self.last_good = (-NEVER, None)  # it may be nearer than the edge of now
        self.parameters = self.exchange.parameters = p  # latency and clock stay as they are
        return True

    def check_value(self, p: Parameters) -> None:
        """UserError if the exchange would refuse order_qty at the mid as too small."""
        least, value = self.instrument.min_notional, p.order_qty * self.account.mid_price
        if value < least:  # nan: nothing is known yet
            worth = f"order_qty = {coins(p.order_qty)} is worth {value:.2f} USDT"
            raise UserError(f"{worth}, it must be at least {least:g}: raise --order-qty")

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
        self._mark()
        market, tick_size = self.market, self.instrument.tick_size
        mid_price = market.book.view.mid_ticks * tick_size
        self.account.add_point(second_ns, mid_price)
        turnover_musd = math.fsum(self.traded) * tick_size * 1e-6
        self.traded.clear()
        half_life_s = self.parameters.half_life_s
        market.measure_second(second_ns, mid_price, turnover_musd, tick_size, half_life_s)
        if self._guard(second_ns) != self.last_guard:
            self.due_ns = second_ns  # the next message decides

    def _mark(self) -> None:
        """Mark the inventory to the mid, and look at the drawdown."""
        account, limit = self.account, self.parameters.max_drawdown_usdt
        account.mark(self.market.book.view.mid_ticks * self.instrument.tick_size)
        if limit is not None and account.peak_equity - account.equity > limit:
            self.is_stopped = True  # for good

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
            return  # that we are cut off has been decided and logged
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

        # Is there a reason to stay out? While nothing is measured, no return runs across that.
        reason = self.last_guard = self._guard(time_ns)
        self.is_stale = time_ns >= self.stale_ns()
        if self.silent_ns() == NEVER:
            market.grid_mid = NAN
            account.add_point(time_ns, NAN)

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
        quote = [value for side, (level, qty) in wanted.items()
                 for value in (side * level * tick_size if qty else NAN, qty)]  # fmt: skip
        spread = distances and distances.base_spread
        *terms, total = (*spread[:3], spread.total_bps) if spread else [NAN] * 4
        standing = {o.side: o.queue_ahead for o in self.exchange.orders
                    if o.has_arrived and time_ns - self.exchange.offset_ns <= o.cancel_ns}
        queues = [standing.get(side, NAN) for side in SIDES]
        self.decision = Decision(
            time_ns, account.mid_price if is_sound else NAN, *best, *quote, total,
            market.volatility, market.ema_volatility, *market.depths.values(), market.liquidity,
            account.inventory, account.cash, account.equity, account.fees_paid, *terms, *queues,
            float(any(sent)), source, reason, distances,
        )  # fmt: skip
        self.due_ns = time_ns + round(opt.get_optimization_frequency(p, market.ema_volatility) * NS)
        self.sources[source] += 1
        self.reasons[reason] += 1
        if self.log is not None:
            self.log.write(log_row(self.decision, self.instrument.digits))
        self._keep(self.decision)

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
        self.account.add_point(self.last_ns, NAN)
        names = "mid_price", "inventory", "cash", "equity", "fees_paid"
        account = {name: getattr(self.account, name) for name in names}
        self._keep(self.decision._replace(time_ns=self.last_ns, is_sent=0.0, **account))

    def _keep(self, decision: Decision) -> None:
        self.times.append(decision.time_ns)
        self.rows.extend(decision[1 : 1 + len(NUMBERS)])

    def columns(self) -> dict[str, np.ndarray]:
        """Each number of all decisions by its name, and time_ns: (decisions,)."""
        table = np.array(self.rows).reshape(-1, len(NUMBERS))
        return {"time_ns": np.array(self.times), **dict(zip(NUMBERS, table.T))}


# ---- Display -----------------------------------------------------------------------

VERBS = {BID: "bought", ASK: "sold"}
dash_unknown = partial(re.sub, r"\b(nan|inf)\b", "-")  # for every number that is not known


def count(n: int, what: str) -> str:
    """1 fill, 2 fills."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def describe(maker: MarketMaker) -> list[tuple[str, str]]:
    """(label, text), a line each, what matters most first: as of the last decision, but account,
    queues, markouts, last and mark price of now. A mark of a minute ago guards nothing."""
    a, d, p, market = maker.account, maker.decision, maker.parameters, maker.market
    n, coin, view = maker.instrument.digits, maker.instrument.base_coin, market.book.view
    queues = {o.side: o.queue_ahead for o in maker.exchange.orders if o.cancel_ns == NEVER}
    quotes, margin = [], "-"
    for side, name, price, qty in ((BID, "bid", *d[4:6]), (ASK, "ask", *d[6:8])):
        away_bps, ahead = 1e4 * abs(price / d.mid_price - 1), coins(queues.get(side, NAN))
        text = f"{name} {price:,.{n}f} x {coins(qty)}, {away_bps:.2f} bps away, {ahead} ahead"
        quotes.append(text if qty else f"no {name}")
    fills = [f"{VERBS[fill.side]} {coins(fill.qty)} at {fill.price:,.{n}f}, markout so far "
             f"{1e4 * fill.side * (a.mid_price / fill.price - 1):+.2f} bps"
             for fill in a.fills[-3:]]  # fmt: skip
    recent = [*market.trades][-3:]
    trades = [f"{VERBS[ASK if level > 0 else BID]} {coins(size)}" for _, level, size, _ in recent]
    for time_ns, *_ in recent[-1:]:
        trades.append(f"{(maker.last_ns - maker.exchange.offset_ns - time_ns) / NS:.1f} s ago")
    is_old = maker.last_ns - market.ticker_recv_ns > MINUTE_NS
    mark = "over a minute old" if is_old else f"{view.mark_price:,.{n}f}"
    if d.distances and (solution := d.distances.solution):
        more = solution.inventory_price * p.order_qty / p.max_inventory
        margin = f"cost, 1 % more spread: {solution.spread_price / solution.cost:+.1f} %   "
        margin += f"one order more bought: {100 * more / solution.cost:+.1f} %"
    return [
        ("Inventory", f"{'+' * (a.inventory > 0)}{coins(a.inventory)} {coin} of at most "
                      f"{coins(p.max_inventory)}   {count(len(a.fills), 'fill')}"),
        ("Result, USDT", f"gross {a.equity + a.fees_paid:+.2f}   fees {a.fees_paid:.2f}   "
                         f"net {a.equity:+.2f}"),
        ("", f"gross = spread captured {a.spread_captured:+.2f} + "
             f"revaluation {a.revaluation:+.2f}"),
        *zip(("Our quote", ""), quotes),
        *zip(("Last fills", "", ""), fills or ["none"]),
        ("Market", f"bid {d.best_bid:,.{n}f}   ask {d.best_ask:,.{n}f}   "
                   f"last {view.last_price:,.{n}f}   mark {mark}"),
        ("", f"depth {d.bid_depth:.2f} / {d.ask_depth:.2f} {coin} within {p.depth_band_bps:g} bps"),
        ("", f"volatility {d.volatility:.2f} (EMA {d.ema_volatility:.2f}) bps/sqrt(s), "
             f"liquidity {d.liquidity:.2f} M USDT/bp"),
        ("", f"last trades {', '.join(trades) or 'none'}"),
        ("Base spread", f"{d.base_spread_bps:.2f} bps from volatility {d.volatility_bps:.2f} + "
                        f"liquidity {d.liquidity_bps:.2f} + depth {d.depth_bps:.2f}"),
        ("", f"no quote nearer than {p.min_half_spread_bps:g}; "
             f"a round trip: {2 * p.maker_fee_bps:g}, twice the maker fee"),
        ("Parameters", opt.in_words(opt.differing(p)) or "all at their defaults"),
        ("At the margin", margin),
    ]  # fmt: skip


def summarize(maker: MarketMaker) -> list[tuple[str, str]]:
    """What there is to say at the end, in the same form."""
    span = f"{clock_text(maker.first_ns)} to {clock_text(maker.last_ns)} UTC"
    decisions, reasons, orders = (
        "   ".join(f"{n} {what}" for what, n in counts.items() if what) or "none"
        for counts in (maker.sources, maker.reasons, maker.exchange.counts)
    )
    return [
        ("Span", f"{span}   {count(maker.messages, 'message')}"),
        ("Decisions", decisions), ("Reasons", reasons), ("Orders", orders),
        *describe(maker)[:3],  # inventory and result
        ("", f"turnover {maker.account.turnover:,.0f}"),
        ("Unheard", f"quotes stood {maker.unheard_ns / NS:.1f} s while the connection was lost"),
    ]  # fmt: skip


def table(rows: Iterable[tuple[str, str]], width: int = 15) -> str:
    """Lines: the texts right of their labels, which are cut before the texts are."""
    return dash_unknown("".join(f"{label[: width - 1]:<{width}}{text}\n" for label, text in rows))


# ---- Running -----------------------------------------------------------------------


def given_parameters(options: argparse.Namespace) -> dict[str, Any]:
    """What the user set: the flags, before the values in FILE.json of --params."""
    flags = {n: v for n, v in vars(options).items() if n in opt.FIELDS and v is not None}
    if not options.params:
        return flags
    try:
        feed.check_file(options.params, feed.MAX_MESSAGE)
        return {**json.loads(options.params.read_text("utf-8-sig")), **flags}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        rule = 'it must hold one JSON object such as {"alpha": 2}'
        raise UserError(f"--params {options.params}: {error}: {rule}") from None


def load_strategy(strategy: str | Callable) -> tuple[Callable, str]:
    """A strategy and its name: a function, a name of optimize.STRATEGIES, or a file that defines
    quote(parameters, market, q) -> (bid_bps, ask_bps), named as the file is."""
    if callable(strategy):
        return strategy, getattr(strategy, "__name__", "a function")
    if strategy in opt.STRATEGIES:
        return opt.STRATEGIES[strategy], strategy
    try:
        name = Path(strategy).stem
        taken = "last_good", "default", "none", *opt.STRATEGIES
        if name in taken or not name.isprintable() or "," in name:
            raise ValueError("a name that the log could not tell apart")
        return runpy.run_path(strategy)["quote"], name
    except (Exception, SystemExit) as error:  # subtle: it is anybody's code
        names = ", ".join(opt.STRATEGIES)
        raise UserError(f"--strategy {strategy}: {type(error).__name__}: {error}: give {names}, or "
                        "a Python file with quote(parameters, market, q)") from None  # fmt: skip


def choose_parameters(given: dict, start: dict, instrument: feed.Instrument) -> Parameters:
    """The user's parameters before those of a recording's start line before the defaults."""
    try:
        values = {**start.get("parameters", {}), **given}
        return opt.change_parameters(Parameters(), values, instrument.min_order)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None


class Session:
    """One run as its user sees it: screen, files, edits of --params."""

    def __init__(self, options: argparse.Namespace, maker: MarketMaker, title: str,
                 given: dict[str, Any], source: feed.LiveFeed | feed.Recording) -> None:
        self.options, self.maker, self.title = options, maker, title
        self.given, self.source = given, source  # given: parameters, as last read
        self.is_live = isinstance(source, feed.LiveFeed)
        self.files = [file for file in (maker.log, self.is_live and source.recorder) if file]
        self.began_s, self.next_look_s, self.next_show_s = time.monotonic(), 0.0, 0.0
        self.notice, self.notice_end_s = "", 0.0
        self.is_screen = bool(sys.stdout and sys.stdout.isatty() and os.getenv("TERM") != "dumb")
        # A terminal that takes nothing holds up no decision. What fails is told at the end.
        self.printer = ThreadPoolExecutor(1)
        self.print = partial(self.printer.submit, print, end="", flush=True)
        self.printing = self.print("" if self.is_screen else f"{title}\n")

    def run(self, messages: Iterable[feed.Message | None]) -> None:
        """Take every message, and look around in between; at the end close all files."""
        try:
            for message in messages:
                if message:
                    self.maker.hear(message)
                self.look()
        finally:
            if self.is_live:
                self.source.stop()
            for file in self.files:
                file.close()
        self.maker.finish()
        self.notice = "ENDED"
        summary = table(summarize(self.maker) + self.describe_feed())
        self.print(f"{self.draw()}{self.title}\n{summary}")
        self.printer.shutdown()
        if failures := [file.failure for file in self.files if file.failure]:
            raise UserError("; ".join(failures))

    def look(self) -> None:
        """Ten times a second: the time, the parameter file, the screen."""
        now_s, maker, source = time.monotonic(), self.maker, self.source
        if now_s < self.next_look_s:
            return
        self.next_look_s = now_s + feed.LOOK_S
        if self.is_live:
            fault = maker.market.book.view.fault
            if fault and not maker.market.lost:  # it heals by a new snapshot only
                source.cut(f"resync: {fault}")
            with source.lock:  # nothing is stamped meanwhile
                if source.queue.empty():
                    maker.pass_time(source.clock_ns())
        if self.options.params and self.options.speed != INF:
            self.read_edits()
        if maker.notice or now_s > self.notice_end_s:
            self.notice, self.notice_end_s = maker.notice, now_s + 10.0
            maker.notice = ""
        if now_s >= self.next_show_s and self.printing.done():
            self.next_show_s = now_s + (0.25 if self.is_screen else 1.0)
            self.printing = self.print(self.draw())

    def read_edits(self) -> None:
        """An edit of --params becomes a message of the session; the market maker judges it."""
        maker, before = self.maker, self.given
        try:
            self.given = given_parameters(self.options)
        except UserError as error:
            self.given, maker.notice = None, feed.printable(f"edit refused: {error}")
        if self.given in (None, before):
            return
        if self.is_live:  # what is taken out of the file goes back to what it was without it
            self.source.emit(feed.control_line("params", parameters=DEFAULTS | self.given))
        else:  # a replay's edit comes at the receive time of now
            note = {"event": "params", "overrides": self.given}
            maker.hear(feed.Message(feed.CONTROL, maker.last_ns, note=note))

    def describe_feed(self) -> list[tuple[str, str]]:
        """What was received, how the connection is, and what went wrong."""
        maker, parser, source = self.maker, self.source.parser, self.source
        lag_ns = maker.market.lag_ns - maker.exchange.offset_ns
        text = f"{count(maker.messages, 'message')}   {count(parser.counts['gaps'], 'gap')}   "
        text += f"{parser.counts['malformed']} malformed   lag {lag_ns / MS:.0f} ms"
        lines = [text + ("" if 0 <= lag_ns <= MAX_LAG_NS else ": see --clock-offset-ms")]
        if self.is_live:
            age_s = (source.clock_ns() - source.last_frame_ns) / NS
            connection = f"last frame {age_s:.1f} s ago" if source.ws else "NOT CONNECTED"
            lines.append(f"{connection}   {count(source.reconnects, 'reconnect')}")
        if silent := [name for name, _ in parser.topics.values() if not parser.counts[name]]:
            lines.append(f"none of {', '.join(silent)}")
        problems = [*(file.failure for file in self.files), parser.problem]
        lines += [f"last problem: {problem}" for problem in problems if problem]
        return [*zip(["Feed", *[""] * len(lines)], lines)]

    def draw(self) -> str:
        """A frame in place of the last, what matters most first: a window may be small. Where
        there is no terminal to draw on, only a line, and each notice once."""
        maker, d = self.maker, self.maker.decision
        words = [clock_text(maker.last_ns), f"mid {d.mid_price:,.{maker.instrument.digits + 1}f}",
                 f"net {maker.account.equity:+.2f}", f"source {d.source}", d.reason,
                 maker.market.lost]  # fmt: skip
        if not self.is_live:
            elapsed_s = (maker.last_ns - maker.first_ns) / NS
            share = max(self.source.share_read, elapsed_s / self.options.duration)
            left_s = (time.monotonic() - self.began_s) * (1 / share - 1)
            words.append(f"{100 * share:.0f} %, {left_s / 60:.0f} min left")
        status = dash_unknown("   ".join(filter(None, words)))
        if not self.is_screen:
            notice, self.notice = self.notice, ""
            return f"{status}   {notice}\n"
        notice = self.notice or "paper trading: no order is ever sent; Ctrl-C ends it"
        columns, rows = shutil.get_terminal_size((80, 24))
        facts = table(describe(maker) + self.describe_feed(), 15 if columns >= 80 else 7)
        lines = [self.title, notice, status, *facts.splitlines()][: rows - 1]
        return "\x1b[H" + "".join(f"{line[:columns]}\x1b[K\n" for line in lines) + "\x1b[J"


def run(options: argparse.Namespace, clock_ns: Callable[[], int] | None = None) -> None:
    """Paper trading on a recording or on the live feed."""
    # What can be said at once, also of flags that would do nothing.
    path, speed, label, log = options.replay, options.speed or 1.0, "REPLAY", options.log
    if path and (options.record or options.url):
        raise UserError("--record and --url are of the live feed: leave out --replay")
    if options.speed and not path:
        raise UserError("--speed is of a replay: give --replay FILE")
    if log and (log.exists() or log == options.record or not log.absolute().parent.is_dir()):
        raise UserError(f"--log {log} cannot be written: choose a new name in an existing folder")
    load_strategy(options.strategy)  # raises what is wrong with it
    given, overrides, start, source = given_parameters(options), {}, {}, None

    # The live feed; without a network the bundled sample, unless live data are asked for.
    if not path:
        instrument = feed.find_instrument(vars(options), ask=not options.url)
        parameters = choose_parameters(given, start, instrument)
        where, depth = options.url or "Bybit", options.depth or feed.DEPTHS[0]
        try:
            source = feed.LiveFeed(instrument, depth, options.url, options.record, clock_ns,
                                   parameters=asdict(parameters))  # fmt: skip
            messages = source.messages(options.duration)
            label = f"LIVE from {where}"
        except ConnectionError as error:
            reason = f"{where} cannot be reached ({error})"
            if options.live or options.url or options.record or options.symbol or options.category:
                raise UserError(f"{reason}: check the network, or give --replay FILE") from None
            print(f"{reason}: replaying the bundled synthetic sample instead", file=sys.stderr)
            path, speed, label = SAMPLE, SAMPLE_SPEED, "OFFLINE REPLAY"

    # A recording; what the user gave, its control lines do not change.
    if not source:
        source = feed.Recording(path, vars(options))
        overrides, start, instrument = given, source.start, source.parser.instrument
        parameters = choose_parameters(given, start, instrument)
        messages = source.replay(speed, options.duration)
        pace = "" if speed == INF else f" at {speed:g} x"
        label += f"{pace} of {'SYNTHETIC data' if source.is_synthetic else path.name}"

    # From here on both are the same.
    maker = MarketMaker(parameters, instrument, log and feed.GrowingFile(log), overrides,
                        options.strategy)  # fmt: skip
    maker.recorded |= start.get("parameters", {})
    title = f"{instrument.symbol} {instrument.category}   {label}"
    Session(options, maker, title, given, source).run(messages)
    if not maker.market.book_recv_ns and not feed.StopSignal.came:
        raise UserError(f"no book of {instrument.symbol} came: check --symbol, --depth")


# ---- Command line ------------------------------------------------------------------

STRATEGY_HELP = "lp (default), fixed (default_spread_bps), or a file's quote(parameters, market, q)"


def add_parameter_flags(parser: argparse.ArgumentParser) -> None:
    """--params, and a flag for every parameter, with unit and range; unset means the default."""
    add = parser.add_argument_group("parameters").add_argument
    add("--params", type=Path, metavar="FILE.json",
        help="parameters; marketmaker.py reads edits, but at --speed max")  # fmt: skip
    for name, parameter in opt.FIELDS.items():
        if name == "feed_latency_ms":
            continue  # a flag of data/archive.py
        flag, rule = "--" + name.replace("_", "-"), parameter.metadata
        choices = "|".join(rule.get("choices", ()))
        span = "" if choices else f", {rule['low']:g} to {rule['high']:g}"
        default = "off" if parameter.default is None else parameter.default
        add(flag, type=str if choices else float, metavar=choices or "X",
            help=f"{rule['help']}{span} (default {default})".replace("0 to inf", "above 0"))


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
    return feed.exit_cleanly(lambda: run(build_arguments().parse_args(arguments), clock_ns))


if __name__ == "__main__":
    sys.exit(main())
