"""The market maker against hand-worked numbers and against plain, slow reckonings.

`simulate` is the simplest statement of the rules by which paper orders fill. Random markets
compare it with the paper exchange; then each rule is told as a story, for bid and ask.
"""

import csv
import io
import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from market import ASKS, BIDS, COIN, MID, START_MS  # isort: skip
from market import beats, busy_market, calm, control, delta, lost, messages  # isort: skip
from market import ns, params, rough_session, snapshot, ticker, trades, write  # isort: skip

import feed
import marketmaker
from feed import ASK, BID, DELTA, MS, NEVER, NS, SNAPSHOT, Message
from marketmaker import LOGGED, Account, Fill, MarketMaker, Session, build_arguments, coins, main
from optimize import FILL_MODELS, Parameters, linprog, quote_by_program

LIMITS = dict(order_qty=1.0, max_inventory=10.0, max_depth_share=1.0)
WARMING = "warming up"


class Maker(MarketMaker):
    """A market maker that hears lines, by way of a parser of its own."""

    def __init__(self, log=None, exchange=None, strategy="lp", coin=COIN, **values) -> None:
        parameters = Parameters(**LIMITS | values)
        super().__init__(parameters, coin, log, None, strategy, **exchange or {})
        self.parser = feed.Parser(COIN)

    def tell(self, *lines) -> None:
        """A note, which only a backtest sends, stands in an end line: see MOMENTS."""
        for message in messages(lines, self.parser):
            self.hear(message._replace(note=message.note.get("note", message.note)))


def warm(bids=BIDS, asks=ASKS, **values) -> Maker:
    """A market maker that has seen a flat market for 12 s, and quotes."""
    maker = Maker(**values)
    maker.tell(snapshot(500, bids, asks), *beats(1500, 12_500))
    return maker


def decisions(log: io.StringIO) -> list[dict]:
    """The log's rows, with `ms` for the time."""
    rows = csv.DictReader(io.StringIO(log.getvalue()))
    return [row | {"ms": int(row["time_ns"]) / MS - START_MS} for row in rows]


# ---- 1. The fill rules, row by row -------------------------------------------------

LATENCY_NS, LIMIT = 40 * MS, 4.0  # of orders; of the inventory


def simulate(stream: list[Message], wishes: dict, model: str, peer_rules: bool) -> list[tuple]:
    """The rules by which paper orders fill: one message, one order at a time.

    1. An order stands from LATENCY_NS after its decision until its cancel arrives, as late.
       Only what happens in that time can fill it, whenever we hear of it. At equal times
       the market comes before our orders.
    2. At its arrival it is refused if it would take, or could break the inventory limit.
    3. Ahead of it is then the size shown at its level; where nothing can be seen, a queue
       without end. Later a smaller size shortens the queue.
    4. It fills whole when the opposite best reaches its level, or a trade goes through it.
    5. A trade at its level fills it whole in the model "touch", and never in "through". In
       "queue" the trade eats the queue, and what is left of it fills the order; but not a
       trade that the book knows of already. A retail trade (RPI) at its level does nothing.

    By the peer rules nothing seen is nothing ahead, every trade eats the queue, and an order
    fills whole or not at all. wishes: by the number of the message heard before, (side,
    level or None, quantity, time decided). Returns (time, side, price, quantity, rule) of fills.
    """
    book, book_ns = {}, 0  # level -> size, on both sides; exchange time
    orders, fills = [], []  # an order of which nothing is left is over

    def shown(order: dict) -> float:
        worst = min((x for x in book if x * order["side"] > 0), default=math.inf)
        is_seen = peer_rules or order["level"] >= worst
        return book.get(order["level"], 0.0 if is_seen else math.inf)

    def is_reached(order: dict) -> bool:
        return any(x * order["side"] < 0 and -x <= order["level"] for x in book)

    def fill(order: dict, qty: float, time_ns: int, rule: str) -> None:
        qty, price = min(qty, order["left"]), order["side"] * order["level"] * COIN.tick_size
        order["left"] -= qty
        fills.append((time_ns, order["side"], price, qty, rule))

    for number, message in enumerate(stream, 1):
        # Who has arrived meets the book as it stands.
        for order in orders:
            if order["queue"] is None and order["arrival"] < message.exch_ns:
                order["queue"] = shown(order)
                inventory = sum(side * qty for _, side, _, qty, _ in fills)
                if is_reached(order) or order["side"] * inventory + order["left"] > LIMIT:
                    order["left"] = 0

        # Each trade meets the orders that stood at its own time.
        present = [order for order in orders if order["queue"] is not None]
        for time_ns, level, size, is_rpi in message.trades:
            for order in present:
                stands = order["left"] and order["arrival"] < time_ns <= order["cancel"]
                is_hit = order["side"] * level > 0 and level <= order["level"]
                if not (stands and is_hit):
                    continue
                if level < order["level"]:
                    fill(order, math.inf, time_ns, "through")
                elif model == "touch" and not is_rpi:
                    fill(order, math.inf, time_ns, "touch")
                elif model == "queue" and not is_rpi and (time_ns > book_ns or peer_rules):
                    rest = size - order["queue"]
                    order["queue"] = max(-rest, 0.0)
                    order["eaten"] += size
                    if rest > 0:
                        fill(order, math.inf if peer_rules else rest, time_ns, "queue")

        # A book message says what is shown now at some levels, a snapshot at all.
        if message.kind in (DELTA, SNAPSHOT):
            book = ({} if message.kind == SNAPSHOT else book) | dict(zip(*message.rows))
            book = {level: size for level, size in book.items() if size}
            book_ns = message.exch_ns
            for order in present:
                if book_ns <= order["arrival"] and is_reached(order):  # heard of too late
                    order["left"] = 0
                elif book_ns <= order["arrival"] and shown(order) < math.inf:
                    order["queue"] = max(shown(order) - order["eaten"], 0.0)
                elif order["left"] and order["arrival"] < book_ns <= order["cancel"]:
                    order["queue"] = min(order["queue"], shown(order))
                    if is_reached(order):
                        fill(order, math.inf, book_ns, "book")

        # The maker decides: cancel and new order travel together, unless nothing changes.
        for side, level, qty, decided_ns in wishes.get(number, ()):
            alive = [o for o in orders if o["left"] and (o["side"], o["cancel"]) == (side, NEVER)]
            if [(level, qty)] == [(o["level"], o["qty"]) for o in alive]:
                continue
            for order in alive:
                order["cancel"] = decided_ns + LATENCY_NS
            if level is not None:
                new = dict(side=side, level=level, qty=qty, left=qty, queue=None, eaten=0.0)
                orders.append(new | dict(arrival=decided_ns + LATENCY_NS, cancel=NEVER))
    return fills


BUSY = dict(
    min_half_spread_bps=0.05, default_spread_bps=1.0, gamma=0.05, delta=0.1, zeta=0.1,
    requote_move_bps=0.1, order_latency_ms=LATENCY_NS / MS, max_inventory=LIMIT, depth_band_bps=0.5,
)  # fmt: skip


@pytest.mark.parametrize("peer_rules", [False, True], ids=["our rules", "peer rules"])
@pytest.mark.parametrize("model", FILL_MODELS)
@pytest.mark.parametrize("seed, edge_bps", [(0, 0.05), (1, 0.5), (2, 0.5), (3, 0.05)])  # far: 0.5
def test_in_a_random_market_orders_fill_by_these_rules(seed, edge_bps, model, peer_rules):
    values = BUSY | dict(fill_model=model, min_half_spread_bps=edge_bps)
    maker = Maker(exchange=dict(peer_rules=peer_rules), **values)
    stream, wishes, send = messages(busy_market(seed)), {}, maker.exchange.send

    def note(*wish) -> bool:
        wishes.setdefault(maker.messages, []).append(wish)
        return send(*wish)

    maker.exchange.send = note
    for message in stream:
        maker.hear(message)
    account, fills = maker.account, maker.account.fills
    assert len(fills) > 20  # otherwise this shows nothing
    found = [(f.time_ns, f.side, f.price, f.qty, f.rule) for f in fills]
    assert found == simulate(stream, wishes, model, peer_rules)

    # The account is the sum over the fills.
    cash = -sum(fill.side * fill.qty * fill.price + fill.fee for fill in fills)
    assert account.inventory == sum(fill.side * fill.qty for fill in fills)
    assert account.equity == pytest.approx(cash + account.inventory * account.mid_price)
    residual = account.spread_captured + account.revaluation - account.fees_paid - account.equity
    assert abs(residual) < 1e-12 * account.turnover


# ---- 2. The fill rules, told as stories --------------------------------------------

# A step of a story is seen from our bid: ticks from MID are negative on our side of it. A
# function tells the line for our bid, or its mirror image for our ask; an order is a tuple.


def book(ms, near=None, far=None, **more):
    def tell(side: int):
        rows = [{side * x: size for x, size in (half or {}).items()} for half in (near, far)]
        return delta(ms, *rows[::side], **more)

    return tell


def trade(ms, x, size, heard=None, is_rpi=False, taker=ASK):
    """Somebody sells into our bid, unless the taker buys."""
    return lambda side: trades(ms, (side * taker, side * x, size, is_rpi), heard=heard)


def order(ms, x, qty=1.0) -> tuple:
    return ms, x, qty


def play(steps: list, side: int, **values) -> Maker:
    """The maker after a story in which nobody else decides. An order arrives 100 ms later."""
    maker = Maker(stale_after_s=60, **values)
    maker.decide, maker.due_ns = lambda time_ns: None, NEVER
    maker.tell(snapshot(0))
    for step in steps:
        if callable(step):
            maker.tell(step(side))
        else:
            ms, x, qty = step
            level = None if x is None else side * MID + x
            maker.exchange.send(side, level, qty, ns(ms))
    return maker


def story(steps: list, fills: list[tuple], models="queue", refused="", **options) -> tuple:
    """What happens, (ms, ticks from MID, quantity) of each fill it must have, and when."""
    return steps, fills, models.split(), refused, options


O2 = order(0, -2)  # arrives at 100, behind 4
EVERY = "queue touch through"
STORIES = {
    "the queue ahead is the size displayed up to the arrival, that instant included": story(
        [O2, book(99, {-2: 6}), book(100, {-2: 7}), book(101, {-2: 9}), trade(200, -2, 7.5)],
        [(200, -2, 0.5)]),
    "a row from before the arrival counts though heard after a later trade": story(
        [O2, trade(150, -2, 1), book(90, {-2: 6}, heard=160), trade(200, -2, 5.5)],
        [(200, -2, 0.5)]),
    "an order beyond the window has none ahead once its level is seen empty": story(
        [order(0, -5), book(150), book(200, {-6: 3}), book(201, {-6: 0}), trade(202, -5, 0.5)],
        [(202, -5, 0.5)]),
    "a level that had left the window before the arrival keeps the queue it was seen with": story(
        [O2, trade(150, -2, 1), book(90, {-2: 0, -3: 0}, heard=160), trade(200, -2, 3.5)],
        [(200, -2, 0.5)]),
    "what is left of trades fills us bit by bit and never beyond the order": story(
        [O2, trade(200, -2, 3), trade(201, -2, 1.5), trade(202, -2, 0.25), trade(203, -2, 50),
         trade(204, -2, 50)], [(201, -2, 0.5), (202, -2, 0.25), (203, -2, 0.25)]),
    "participation bounds our share of what is left, and what is below a lot adds up": story(
        [O2, trade(200, -2, 4.5), trade(210, -2, 0.125), trade(220, -2, 0.125)],
        [(200, -2, 0.25), (220, -2, 0.125)], exchange=dict(participation=0.5)),
    "a trade that the displayed size already knows does not eat the queue": story(
        [O2, book(200, {-2: 4}), trade(200, -2, 4), trade(211, -2, 4.5)], [(211, -2, 0.5)]),
    "nor does one fill us that the displayed size knows of since it is gone: too few fills": story(
        [O2, book(200, {-2: 0}), trade(200, -2, 50), trade(211, -2, 0.5)], [(211, -2, 0.5)]),
    "a trade through our price fills the whole order at our price, once": story(
        [O2, trade(200, -3, 0.125), trade(201, -3, 5)], [(200, -2, 1)], EVERY),
    "post-only is judged again at arrival, and a refused order may be sent again": story(
        [O2, book(100, {-1: 0, -2: 0}, {-2: 1}), book(101, {-2: 1}, {-2: 0}), trade(200, -3, 5),
         order(300, -2), trade(401, -3, 5)], [(401, -2, 1)], refused="would take"),
    "an order that would take by a row heard late is refused": story(
        [O2, trade(150, -1, 1), book(90, {-1: 0, -2: 0}, {-2: 1}, heard=160), book(200),
         trade(210, -3, 1)], [], refused="would take"),
    "the inventory limit is judged again at arrival": story(
        [O2, order(200, -3, 0.625), trade(250, -2, 5), trade(400, -9, 5), order(400, -3, 0.5),
         trade(600, -9, 5)], [(250, -2, 1), (600, -3, 0.5)], refused="inventory limit",
        max_inventory=1.5),
    "only what happens after the arrival fills": story(
        [O2, trade(99, -3, 5), book(250), trade(99, -3, 5, heard=300),
         trade(100, -3, 5, heard=300), trade(101, -3, 5, heard=300)], [(101, -2, 1)], EVERY),
    "a trade heard of 10 s late still fills, and a later one no more": story(
        [O2, trade(101, -2, 4.5, heard=10_101), trade(102, -3, 1, heard=10_103)], [(101, -2, 0.5)]),
    "trades of the instant of the cancel are met, however many messages tell of them": story(
        [O2, order(200, None), book(350), trade(300, -1, 1, heard=360),
         trade(300, -3, 1, heard=1360)], [(300, -2, 1)], EVERY),
    "a clock that is ahead of the exchange's is put right": story(
        [book(0, heard=30_050), order(30_050, -2), order(30_250, -5), book(260, heard=30_270),
         trade(340, -3, 1, heard=30_350)], [(340, -2, 1)], clock_offset_ms=30_000),
    "a clock that is behind the exchange's is put right": story(
        [order(50, -2), order(250, -5), book(30_260, heard=270),
         trade(30_340, -3, 1, heard=350)], [(30_340, -2, 1)], clock_offset_ms=-30_000),
}


@pytest.mark.parametrize("side", [BID, ASK], ids=["bid", "ask"])
@pytest.mark.parametrize("name", STORIES)
def test_story(name, side):
    steps, fills, models, refused, options = STORIES[name]
    for model in models:
        maker = play(steps, side, fill_model=model, **options)
        assert fills == [
            (f.time_ns / MS - START_MS, f.side * (f.price / COIN.tick_size - MID), f.qty)
            for f in maker.account.fills
        ], model
        refusals = [what for what in maker.exchange.counts if what.startswith("refused")]
        assert refusals == [f"refused: {refused}"] * bool(refused)


# ---- 3. Accounting -----------------------------------------------------------------


def test_four_fills_by_pencil_and_paper():
    a = Account()
    for mid, bought, price, qty, fee, *expected in (
        (100, +1, 99, 2, 0.5, -198.5, 2, 0),
        (104, -1, 105, 3, 1.0, 115.5, 5, 8),  # 2 held while the mid rose by 4
        (101, +1, 100, 2, -0.25, -84.25, 7, 11),  # 1 short while it fell by 3; a rebate
        (98, -1, 97, 1, 0.25, 12.5, 6, 8),  # 1 held while it fell by 3; sold below the mid
    ):
        a.mark(mid)
        a.settle(Fill(0, 0, bought, price, qty, fee, mid))
        assert [a.cash, a.spread_captured, a.revaluation] == expected
    assert (a.inventory, a.fees_paid, a.equity + a.fees_paid, a.equity) == (0, 1.5, 14, 12.5)
    assert a.spread_captured + a.revaluation - a.fees_paid == a.equity
    assert a.peak_equity == 14.5  # marked at 101, before the third fill
    assert (len(a.fills), a.turnover) == (4, 2 * 99 + 3 * 105 + 2 * 100 + 97)


# ---- 4. What is measured -----------------------------------------------------------


def test_measures_are_those_of_a_plain_reckoning_on_the_grid_of_whole_seconds():
    stream, maker = messages(busy_market(1, 85, spells=())), Maker(half_life_s=20)
    for message in stream:
        maker.hear(message)
    first, last = stream[0].recv_ns // NS + 1, stream[-1].recv_ns // NS
    seconds = range(first, last + 1)
    grid = [[m.view.mid_ticks for m in stream if m.recv_ns < s * NS][-1] for s in seconds]
    ema = math.nan
    for count in range(10, len(grid)):
        returns = [1e4 * math.log(b / a) for a, b in zip(grid, grid[1 : count + 1])][-60:]
        volatility = math.sqrt(sum(r * r for r in returns) / len(returns))
        ema = volatility if count == 10 else volatility + (ema - volatility) * 0.5 ** (1 / 20)
    window = [m for m in stream if (last - 60) * NS <= m.recv_ns < last * NS]
    ticks = sum(abs(level) * size for m in window for _, level, size, _ in m.trades)
    liquidity = ticks * 0.5e-6 / sum(map(abs, returns))
    found = maker.market.volatility, maker.market.ema_volatility, maker.market.liquidity
    assert found == pytest.approx((volatility, ema, liquidity), rel=1e-12)


def test_after_a_loss_the_first_whole_second_quotes_and_no_return_runs_across_the_hole():
    maker = warm()
    maker.market.ema_volatility = 0.75
    maker.tell(lost(12_900), snapshot(20_300, {7: 1}, {8: 1}))
    assert maker.decision.reason == "warming up"
    assert maker.unheard_ns == 500 * MS  # from the last book to the cancel's arrival at 13,000
    maker.tell(delta(21_300))
    assert maker.decision.source == "lp" and maker.market.ema_volatility == 0.75
    maker.tell(delta(22_300))  # renewed at 22, last at 12: 10 s of a half-life of 30
    assert maker.market.volatility == 0 and len(maker.market.returns_bps) == 12
    assert maker.market.ema_volatility == pytest.approx(0.75 * 0.5 ** (10 / 30), rel=1e-12)


def test_no_return_is_measured_while_the_book_is_crossed_nor_across_that():
    maker = warm()
    assert len(maker.market.returns_bps) == 11
    maker.tell(delta(13_000, {1: 1}), *beats(14_000, 15_000), delta(15_300, {1: 0, 5: 1}, {7: 1}))
    maker.tell(delta(15_400, {}, {1: 0, 2: 0, 3: 0}), *beats(16_500, 17_500))
    assert len(maker.market.returns_bps) == 13 and not any(maker.market.returns_bps)


def test_recent_trades_are_those_of_the_last_minute_with_time_side_price_and_size():
    maker = warm()
    maker.tell(trades(13_000, (BID, 3, 1)), trades(20_000, (ASK, -2, 2), (BID, 1, 0.5)))
    maker.tell(trades(79_000, (BID, 1, 4)))
    assert [*maker.market.trades] == [  # a taker who buys hits an ask, whose level is negative
        (ns(20_000), MID - 2, 2, False), (ns(20_000), -MID - 1, 0.5, False),
        (ns(79_000), -MID - 1, 4, False),
    ]  # fmt: skip


# ---- 5. When a decision is made, and what forbids a quote --------------------------

BEST = "49999.5"  # the mids of seconds 1 to 10 are 9 returns, and 10 are asked for
WARM_UP = [(500, WARMING, BEST), (5500, WARMING, BEST), (10_500, WARMING, BEST), (11_500, "", BEST)]
MOMENTS = {  # what follows 12 s of a flat market, and (ms, reason, best bid) of each decision
    "the first message at or past the time due decides, and sees itself": (
        [*beats(13_500, 15_500), delta(16_499, {-1: 0}), trades(16_500, (BID, 1, 1)),
         *beats(17_000, 21_000), delta(21_499, {-1: 1}), delta(21_600, {0: 1}),
         delta(21_600, {0: 0})], [(16_500, "", "49999.0"), (21_600, "", "50000.0")]),
    "a loss decides at once and only once, then its end, then new parameters": (
        [lost(12_600, "a gap, they say"), lost(12_700), ticker(12_800), snapshot(12_900),
         snapshot(13_000), params(13_100, alpha=2), params(13_150, alpha=77),
         control(13_160, "params", parameters=5), delta(13_200)],
        [(12_600, "book lost", ""), (12_900, WARMING, BEST), (13_000, "", BEST),
         (13_100, "", BEST)]),
    "a mid as far away as requote_move_bps decides, and the next only as far again": (
        [delta(12_600, {9: 1}, {1: 0, 2: 0, 3: 0, 10: 1}), snapshot(12_700, {9: 1}, {11: 1}),
         delta(12_800, {19: 1}, {11: 0, 20: 1})],
        [(12_700, "", "50004.5")]),
    "a book falls silent at that very moment, though a ticker is heard": (
        [ticker(19_000), delta(19_100)],
        [(17_500, "book stale", BEST), (19_100, WARMING, BEST)]),
    "in an outage nobody decides until it is over": (
        [control(13_000, "end", note=dict(event="outage", back_ns=ns(20_000))),
         *beats(14_000, 19_000), params(19_500, alpha=2),
         control(20_000, "end", note=dict(event="outage", back_ns=0))],
        [(13_000, "outage", BEST), (20_000, WARMING, BEST)]),
    "a guard is judged at whole seconds, and the next message decides: a crossed book": (
        [delta(13_000, {1: 1}), delta(14_200), delta(15_000, {1: 0}), delta(16_200)],
        [(14_200, "book crossed", ""), (16_200, "", BEST)]),
    "the same with a book of one side": (
        [delta(13_000, {}, dict.fromkeys(ASKS, 0)), delta(14_200), delta(15_000, {}, ASKS),
         delta(16_200)], [(14_200, "book one-sided", ""), (16_200, "", BEST)]),
    "the same with a mark price 60 and then 40 bps away": (
        [ticker(13_000, 50_300), delta(14_200), ticker(15_000, 50_200), delta(16_200)],
        [(14_200, "far from mark price", BEST), (16_200, "", BEST)]),
    "the same with a book that is heard 4.5, 5.4, 6.3 and then 0 s late": (
        [*(delta(12_600 + k * 100, heard=13_500 + k * 1000) for k in range(7)), delta(20_400),
         delta(21_500)], [(16_500, "", BEST), (19_500, "book late", BEST), (21_500, "", BEST)]),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_moment(moment):
    (lines, expected), log = MOMENTS[moment], io.StringIO()
    maker = warm(log=log)
    maker.tell(*lines)
    rows = decisions(log)
    found = [(row["ms"], row["reason"], row["best_bid"]) for row in rows]
    assert found == WARM_UP + expected
    for row in rows:
        assert (row["bid_price"] != "") == (row["ask_price"] != "") == (row["reason"] == "")
    stands = any(order.cancel_ns == NEVER for order in maker.exchange.orders)
    assert stands == (rows[-1]["reason"] == "")


def test_time_alone_notices_a_silent_book_and_walks_no_seconds_of_which_nothing_is_known():
    maker = warm(log=(log := io.StringIO()))
    maker.tell(delta(12_500, {5: 1}))
    for ms in (*range(12_500, 19_000, 70), 10**12):
        maker.pass_time(ns(ms))
    rows = [(row["ms"], row["reason"]) for row in decisions(log)[-2:]]
    assert rows == [(11_500, ""), (17_500, "book crossed")]  # of two guards the first is named
    assert maker.is_stale and maker.second_ns == ns(10**12 + 1000)


def test_a_mark_price_older_than_a_minute_guards_nothing():
    maker = warm()
    maker.tell(ticker(13_000, 50_300), *beats(14_000, 73_000))
    assert maker.decision.reason == "far from mark price"
    maker.tell(delta(74_000))
    assert maker.decision.reason == ""


def test_a_drawdown_flattens_through_the_book_level_by_level_and_stops_for_good():
    maker = warm(max_drawdown_usdt=104, maker_fee_bps=0, taker_fee_bps=10, requote_move_bps=50)
    maker.exchange.send(BID, MID - 2, 1.0, ns(12_500))
    maker.tell(trades(12_700, (ASK, -3, 1)), params(12_710, alpha=2))  # bought 1 at 49,999
    maker.tell(snapshot(12_750, {-210: 0.5, -212: 0.25}, {-208: 3}))  # the mid by 104.5, from 1
    assert not maker.is_stopped
    maker.exchange.impact_bps = 100.0  # of quotes: a taker walks the book
    maker.tell(delta(13_200))  # decides, as a whole second has passed
    assert maker.decision.reason == "drawdown limit" and maker.account.inventory == 0.25
    maker.tell(delta(13_300, {-220: 9}), *beats(14_300, 40_300))  # the rest, when it decides next
    sold = [(f.rule, f.side, f.price, f.qty) for f in maker.account.fills[1:]]
    levels = (49_895, 0.5), (49_894, 0.25), (49_895, 0.25)
    assert sold == [("taker", ASK, *level) for level in levels]
    proceeds = 0.75 * 49_895 + 0.25 * 49_894
    assert maker.account.cash == pytest.approx(-49_999 + proceeds * (1 - 10e-4), abs=1e-9)
    assert maker.decision.reason == "drawdown limit" and maker.account.inventory == 0
    assert all(order.cancel_ns < NEVER for order in maker.exchange.orders)
    queues = dict(zip(*(maker.columns()[name].tolist() for name in ("time_ns", "ask_queue"))))
    assert queues[ns(13_200)] > 0 and math.isnan(queues[ns(18_300)])  # cancelled: 100 ms later


@pytest.mark.parametrize("seed, pace_bps", [(0, 0.1), (1, 2.0)])
@pytest.mark.parametrize("model", FILL_MODELS)
def test_a_rough_session_trips_every_guard_and_takes_the_sound_edit(seed, pace_bps, model):
    values = dict(fill_model=model, stale_after_s=2.0, requote_move_bps=pace_bps)
    maker, stream = Maker(**BUSY | values), messages(rough_session(seed))
    for message in stream:
        maker.hear(message)
    reasons = {"far from mark price", "drawdown limit", WARMING}
    reasons |= {f"book {fault}" for fault in ("lost", "crossed", "one-sided", "stale")}
    assert reasons <= set(maker.reasons) and maker.parameters.alpha == 2
    assert len(maker.account.fills) > 10 and maker.messages == len(stream)


def test_the_peak_of_the_equity_is_its_highest_mark_at_whole_seconds_too():
    maker = warm(max_drawdown_usdt=2.5)
    maker.account.inventory, maker.account.cash = 1.0, 4 - 50_000.0
    maker.tell(delta(12_600, {5: 1}, {1: 0, 2: 0, 3: 0, 7: 1}))  # by 3 USDT: equity 7
    maker.tell(delta(13_200, {5: 0}, {7: 0, 1: 1}))  # and back
    maker.tell(delta(13_900))
    assert maker.account.peak_equity == 7 and not maker.is_stopped
    maker.tell(delta(14_100))
    equity = 4 - 0.5 - 49_999.5 * 5.5e-4  # closed as a taker, at the best bid and with the fee
    assert maker.is_stopped and maker.account.equity == pytest.approx(equity, abs=1e-9)


# ---- 6. The quote ------------------------------------------------------------------


def quote_at(maker: Maker, inventory: float) -> tuple[float, float]:
    """Our bid and ask price with an inventory; nan for none."""
    maker.account.inventory = inventory
    maker.decide(maker.last_ns)
    return maker.decision.bid_price, maker.decision.ask_price


TINY = dict(gamma=0, delta=0, zeta=0, min_half_spread_bps=0.01, default_spread_bps=0.02)
QUOTES = [  # after 12 s of a flat market: its book, what is set; bid, quantity, ask, quantity
    # (delta + zeta / (1 + 0.7 MUSD)) / 2 = 0.79 bps = 3.97 USDT from the mid, rounded outward
    (BIDS, ASKS, {}, (49_996, 1, 50_004, 1)),
    # however small the spread, a quote joins the best prices and never takes
    ({0: 5}, {1: 5}, TINY, (50_000, 1, 50_000.5, 1)),
    # quantities are bounded by a share of the depth, 0.35 and 0.98, in whole lots
    ({0: 5}, {1: 14}, TINY | dict(max_depth_share=0.07), (50_000, 0.25, 50_000.5, 0.875)),
    ({0: 1}, {1: 14}, TINY | dict(max_depth_share=0.1), (None, 0, 50_000.5, 1)),
]


@pytest.mark.parametrize("bids, asks, values, quote", QUOTES)
def test_a_quote_worked_by_hand(bids, asks, values, quote):
    decision = warm(bids, asks, **values).decision
    assert [None if x != x else x for x in decision[4:8]] == list(quote)
    assert decision.reason == ("" if quote[0] else "no bid: book too thin for a lot")


def test_an_order_of_too_little_value_is_refused_at_the_first_book_and_not_sent_later():
    dear = replace(COIN, min_notional=20_000.0)  # USDT: 0.4 coins and a little
    with pytest.raises(feed.UserError, match="order_qty = 0.375 is worth 18750.00 USDT, .* 20000"):
        Maker(coin=dear, order_qty=0.375).tell(ticker(100), snapshot(500))
    maker = warm({-1: 4}, {1: 14}, coin=dear, max_depth_share=0.1)  # the bid is cut to 0.375
    assert (maker.decision.reason, maker.decision.ask_qty) == ("no bid: book too thin for a lot", 1)


def test_inventory_moves_both_quotes_against_it_and_at_the_limit_takes_one_away():
    maker = warm(delta=5, zeta=5, min_half_spread_bps=0.01)
    for prices in zip(*(quote_at(maker, q) for q in (-9, -6, -3, 0, 3, 6, 9))):
        assert list(prices) == sorted(set(prices), reverse=True)
    for inventory, is_quoted in ((9.125, [False, True]), (-9.125, [True, False])):
        assert [price > 0 for price in quote_at(maker, inventory)] == is_quoted
        assert maker.decision.reason.endswith("inventory limit")


def test_every_rung_of_the_fallback_says_its_name_and_why():
    faults, why = [], "lp failed: ValueError: out of order"

    def solver(*problem, **bounds):
        for fault in faults:
            raise fault
        return linprog(*problem, **bounds)

    def quote() -> tuple:
        return maker.decision.source, maker.decision.reason, *maker.decision[4:8:2]

    def lp(*inputs):
        return quote_by_program(*inputs, solver)

    maker = warm(strategy=lp, default_spread_bps=20, fallback_max_age_s=3)
    _, _, bid, ask = quote()
    faults.append(ValueError("out of order"))
    maker.tell(delta(13_000, {-1: 0, 19: 1}, {1: 0, 2: 0, 3: 0, 21: 1}), params(13_100, alpha=2))
    near = partial(pytest.approx, abs=0.5)  # the same distances, from a mid 10 USDT higher
    assert quote() == ("last_good", why, near(bid + 10), near(ask + 10))
    maker.tell(*beats(14_000, 15_400), params(15_501, alpha=3))  # it is now 3.001 s old
    assert quote() == ("default", why, 49_959.5, 50_060.5)
    faults.clear()
    maker.tell(params(15_600, alpha=2))
    assert maker.sources == dict(none=3, lp=2, last_good=2, default=1) and maker.reasons[why] == 3
    faults.append(ValueError("out of order"))
    maker.tell(params(15_700, min_half_spread_bps=5))  # the last good is nearer
    assert quote() == ("default", why, 49_959.5, 50_060.5)


# ---- 7. The log --------------------------------------------------------------------

HEADER = (
    "time_ns, mid_price, best_bid, best_ask, bid_price, bid_qty, ask_price, ask_qty, "
    "base_spread_bps, volatility, ema_volatility, bid_depth, ask_depth, liquidity, inventory, "
    "cash, equity, source, reason"
)


def test_the_log_has_the_columns_of_the_design_and_a_row_for_every_decision():
    maker = Maker(log := io.StringIO())
    maker.tell(ticker(100), snapshot(300), lost(400, "they, say"))  # at 100 nothing is known yet
    header, before, first, gone = list(csv.reader(io.StringIO(log.getvalue())))
    assert header == HEADER.split(", ")
    account = ["0", "0.00000000", "0.00000000"]
    assert before == [str(ns(100)), *[""] * 13, *account, "none", "book lost"]
    assert first[:8] == [str(ns(300)), "50000.00", "49999.5", "50000.5", "", "", "", ""]
    assert first[8:] == ["", "", "", "14", "14", "", *account, "none", WARMING]
    assert gone == [str(ns(400)), *before[1:]]


def test_the_log_reads_back_as_the_decision():
    log = io.StringIO()
    maker = warm({-1: 5}, {1: 14}, max_depth_share=0.07, log=log)
    quote_at(maker, 1.5)
    row, values = decisions(log)[-1], maker.decision._asdict()
    assert len(set(maker.decision[1:8])) == 7  # so that none can stand for another
    assert [row["source"], row["reason"]] == [values["source"], values["reason"]]
    for name in LOGGED[:-2]:
        assert float(row[name]) == pytest.approx(values[name], rel=1e-8), name
    texts = "0.00000001 123456789.12345678 0.3 14 0 -0.0005".split()
    assert [*map(coins, (1e-8, 123456789.12345678, 0.1 + 0.2, 14.0, 0.0, -5e-4))] == texts


# ---- 8. Sessions -------------------------------------------------------------------


@pytest.fixture
def recording(tmp_path, monkeypatch) -> None:
    """20 s of a flat market in which our bid is hit, in the folder where we are."""
    monkeypatch.chdir(tmp_path)
    hit, mark = trades(13_000, (ASK, -50, 1)), ticker(14_000, 50_001)
    write(Path("short.gz"), calm(20_500, hit, mark), **LIMITS)


def source_of(maker: Maker) -> SimpleNamespace:
    """As much of a recording as a session asks for."""
    return SimpleNamespace(parser=maker.parser, share_read=0.25)


def replay(*flags: str) -> int:
    return main(["--replay", "short.gz", "--speed", "max", *flags])


def test_a_replay_ends_with_a_summary_and_a_log(recording, capsys):
    assert replay("--log", "log.csv") == 0
    out, err = capsys.readouterr()
    written = Path("log.csv").read_text()
    last = decisions(io.StringIO(written))[-1]
    assert (last["ms"], last["source"], last["inventory"]) == (16_500, "lp", "1")
    facts = "REPLAY of short.gz, 24 messages, +1 COIN, 1 fill\n, net -6.00, 100 %, ENDED, 0 gaps"
    for fact in facts.split(", "):
        assert fact in out, fact
    assert err == ""
    assert replay("--log", "log.csv") == 2 and Path("log.csv").read_text() == written
    assert "--log log.csv cannot be written: choose a new name" in capsys.readouterr().err
    assert replay("--log", "again.csv") == 0 and Path("again.csv").read_text() == written
    assert replay("--duration", "3.05") == 0
    assert "5 messages" in capsys.readouterr().out  # the start and four of the book


FAULTS = """\
--alpha 77: alpha = 77, 0 to 10, --alpha
--alpha x: --alpha, 'x', --help
--params unknown.json: alpah, did you mean alpha
--params list.json: --params, JSON object
--record x.gz: --record, leave out --replay
--tick-size 0.3: multiple of the tick 0.3, --tick-size
--strategy absent.py: --strategy absent.py, No such file, lp
--strategy list.json: --strategy list.json, 'quote', quote(parameters
--strategy lp.py: --strategy lp.py, a name that the log could not tell apart
--log none/x.csv: none/x.csv, cannot be written
--params /dev/zero: --params, regular file
--url ws://x: --url, leave out --replay
--symbol ETHUSDT: COINUSDT, leave out --symbol
--replay absent.gz: absent.gz, No such file"""


@pytest.mark.parametrize("fault", FAULTS.splitlines())
def test_a_users_error_is_one_line_with_value_rule_and_remedy(fault, recording, capsys):
    flags, words = fault.split(": ")
    Path("unknown.json").write_text('{"alpah": 1}')
    Path("list.json").write_text("[1]")
    try:
        status = replay(*flags.split())
    except SystemExit as stopped:  # argparse's own
        status = stopped.code
    err = capsys.readouterr().err
    assert (status, err[:7], err[-1], err.count("\n")) == (2, "error: ", "\n", 1), err
    assert all(word in err for word in words.split(", ")), err


@pytest.mark.parametrize("flags", ["", "--live", "--record x.gz", "--url ws://x", "--speed 5"])
def test_without_a_network_the_sample_is_replayed_unless_live_data_are_asked_for(
    flags, tmp_path, monkeypatch, capsys
):
    def refuse(*args, **kwargs):
        raise ConnectionError("network is unreachable")

    monkeypatch.setattr(feed.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(feed.LiveFeed, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    status = main([*flags.split(), "--duration", "2", "--log", "log.csv"])
    out, err = capsys.readouterr()
    cause = "--speed is of a replay" if "speed" in flags else "network is unreachable"
    assert cause in err and err.count("\n") == 1
    if flags:
        assert (status, out, os.listdir()) == (2, "", []) and "--replay FILE" in err
    else:
        assert (status, os.listdir()) == (0, ["log.csv"]) and "synthetic sample" in err
        assert "OFFLINE REPLAY" in out and "SYNTHETIC" in out


def test_an_edit_of_params_in_a_replay_obeys_flag_file_recording_default_in_this_order(tmp_path):
    path, maker = tmp_path / "p.json", warm(coin=replace(COIN, min_notional=7000.0))
    options = build_arguments().parse_args(["--params", str(path), "--alpha", "4"])
    path.write_text('{"alpha": 2, "gamma": 2, "zeta": 2}')
    maker.overrides = marketmaker.given_parameters(options)
    session = Session(options, maker, "REPLAY", maker.overrides, source_of(maker))
    maker.tell(params(13_000, gamma=1, zeta=3, delta=5))
    for text, notice, *expected in (
        (path.read_text(), "", 4, 2, 2, 5),
        ('{"alpha": 1, "gamma": 3}', "changed: gamma 3, zeta 3", 4, 3, 3, 5),
        ('{"gamma": 99}', "refused: gamma = 99", 4, 3, 3, 5),
        ('{"order_qty": 0.125}', "refused: order_qty = 0.125 is worth 6250.00", 4, 3, 3, 5),
        ("{}", "changed: gamma 1", 4, 1, 3, 5),
    ):
        path.write_text(text)
        session.read_edits()
        p = maker.parameters
        assert [p.alpha, p.gamma, p.zeta, p.delta] == expected and notice in maker.notice
    assert maker.decision.time_ns == ns(13_000) and maker.sources["lp"] == 4


FACTS = {  # by whether there is a terminal, and how wide and high
    (True, 80, 24): "COINUSDT linear   REPLAY, no order is ever sent, bid 49 999.5, mark 50 001.2, "
    "0 gaps, 1 fill, bought 1 at 49 999.0, markout so far +0.20 bps, Base spread, source lp, "
    "+1 COIN, net -9.00, gross +1.00, bps away, - ahead, 25 %",
    (True, 40, 12): "Invent +1 COIN, Result gross +1.00, Our qu bid 49 99",
    (False, 80, 24): "COINUSDT linear   REPLAY, 2023-11-14 22:13:37, 50 000.00, lp, net -9.00, "
    "25 %, min left",
}


@pytest.mark.parametrize("is_terminal, columns, rows", FACTS)
def test_the_screen_and_the_plain_lines_hold_the_key_facts(is_terminal, columns, rows, monkeypatch):
    for name, value in (("COLUMNS", columns), ("LINES", rows), ("TERM", "xterm")):
        monkeypatch.setenv(name, str(value))
    maker = warm()
    maker.exchange.send(BID, MID - 2, 1.0, ns(12_500))
    maker.tell(trades(12_700, (ASK, -3, 1)), ticker(12_700, 50_001.25), *beats(13_000, 17_700))
    options, stream, taking = build_arguments().parse_args([]), io.StringIO(), threading.Event()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setattr(stream, "flush", partial(taking.wait, 9))  # the terminal takes nothing yet
    monkeypatch.setattr(sys, "stdout", stream)
    session = Session(options, maker, "COINUSDT linear   REPLAY", {}, source_of(maker))
    session.look()
    assert session.next_show_s == 0  # a frame is left out, and nobody waits
    taking.set()
    session.printing.result()
    session.next_look_s = 0.0
    session.look()
    session.look()  # again, but too soon
    session.printer.shutdown()
    lines = stream.getvalue().replace("\x1b[H", "").replace("\x1b[K", "").splitlines()
    assert len(lines) <= rows if is_terminal else len(lines) == 2
    assert max(map(len, lines)) <= columns or not is_terminal
    for fact in FACTS[is_terminal, columns, rows].split(", "):
        assert fact in "\n".join(lines).replace(",", " "), fact


def test_a_stdout_that_fails_costs_no_decision_and_is_told_at_the_end(recording):
    assert replay("--log", "whole.csv") == 0
    command = sys.executable, marketmaker.__file__, *"--replay short.gz --log log.csv".split()
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*command, "--speed", "max"], stdout=full, stderr=-1, text=True)
    assert ended.returncode == 2 and ended.stderr == "error: [Errno 28] No space left on device\n"
    assert Path("log.csv").read_text() == Path("whole.csv").read_text()


def test_a_replay_keeps_the_pace_looks_around_while_it_waits_and_knows_how_far_it_is(recording):
    source, began_s = feed.Recording(Path("short.gz")), time.monotonic()
    found = [*source.replay(50.0, 5.0)]
    assert 0.09 < time.monotonic() - began_s < 2  # s for 4 or 5 of the market's
    heard = [message for message in found if message]
    assert heard[0].note["event"] == "start" and ns(4_000) < heard[-1].recv_ns <= ns(5_500)
    assert found.count(None) >= len(heard) - 1 and 0 < source.share_read <= 1
