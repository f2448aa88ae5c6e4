"""The market maker against hand-worked numbers and against plain, slow simulators.

A small market is told in ticks away from MID and in ms after START_MS. Its tick, its lot
and most sizes are sums of powers of two, so that sums of them are exact and results that
should be equal are equal to the last bit.
"""

import csv
import gzip
import io
import json
import math
import os
import random
import shutil
from array import array
from pathlib import Path

import pytest

import feed
from feed import ASK, BID, MS, Instrument, Message
from marketmaker import (
    NEVER,
    Display,
    Fill,
    MarketMaker,
    State,
    exponential_average,
    floor_to_lot,
    main,
)
from optimize import FILL_MODELS, Parameters, linprog

COIN = Instrument("COINUSDT", "linear", "0.5", "0.125", 0.125)
MID = 100_000  # ticks of 0.5 USDT; one tick is 0.1 bps
START_MS = 1_700_000_000_000  # a whole second
LIMITS = dict(order_qty=1.0, max_inventory=10.0, max_depth_share=1.0)


# ---- A market told by hand ---------------------------------------------------------


def ns(ms: float) -> int:
    return (START_MS * MS) + round(ms * MS)


def rows(side: int, sizes: dict) -> feed.Columns:
    """{ticks from MID: size} as a message holds it."""
    levels = (side * (MID + x) for x in sizes)
    return array(feed.LEVEL, levels), array(feed.SIZE, map(float, sizes.values()))


def delta(ms, bids=None, asks=None, heard=None, kind=feed.DELTA) -> Message:
    """A book message of exchange time ms, received at `heard` (the same unless given)."""
    recv_ns = ns(ms if heard is None else heard)
    return Message(kind, recv_ns, ns(ms), rows(BID, bids or {}), rows(ASK, asks or {}))


BIDS, ASKS = {-1: 5, -2: 4, -3: 5}, {1: 5, 2: 4, 3: 5}


def snapshot(ms, bids=BIDS, asks=ASKS, heard=None) -> Message:
    return delta(ms, bids, asks, heard, feed.SNAPSHOT)


def trades(ms, *entries, heard=None) -> Message:
    """Entries (taker side, ticks from MID, size[, is_rpi[, own ms]])."""
    full = [(*entry, False, ms)[:5] if len(entry) == 3 else (*entry, ms)[:5] for entry in entries]
    found = [(ns(t), taker, MID + x, float(size), rpi) for taker, x, size, rpi, t in full]
    return Message(feed.TRADES, ns(ms if heard is None else heard), found[-1][0], trades=found)


def ticker(ms, **fields) -> Message:
    return Message(feed.TICKER, ns(ms), ns(ms), fields=fields)


def lost(ms, reason="a gap") -> Message:
    return Message(feed.LOST, ns(ms), fields={"reason": reason})


def params(ms, **changes) -> Message:
    return Message(feed.CONTROL, ns(ms), fields={"event": "params", "parameters": changes})


def make(log=None, solver=linprog, exchange=None, **values) -> MarketMaker:
    return MarketMaker(Parameters(**LIMITS | values), COIN, log, None, solver, **exchange or {})


def decisions(log: io.StringIO) -> list[dict]:
    """The log's rows, with `ms` for the time."""
    found = list(csv.DictReader(io.StringIO(log.getvalue())))
    return [row | {"ms": (int(row["time_ns"]) - ns(0)) / MS} for row in found]


def beat(maker, first_ms, last_ms, every_ms=1000) -> None:
    """A book message that changes nothing, every second."""
    for ms in range(first_ms, last_ms + 1, every_ms):
        maker.take(delta(ms))


def warm(bids=BIDS, asks=ASKS, **values) -> MarketMaker:
    """A market maker that has seen a flat market for 12 s, and quotes."""
    maker = make(**values)
    maker.take(snapshot(500, bids, asks))
    beat(maker, 1500, 12_500)
    assert maker.quote.source in ("lp", "default")
    return maker


class Story:
    """Paper orders in a market seen from our bid; side = ASK tells the mirror image.

    Ticks count from MID and are negative on our side of it. Nothing is decided but by
    the story; an order placed at ms arrives 100 ms later.
    """

    def __init__(self, side: int, exchange=None, **values) -> None:
        self.side, self.maker = side, make(exchange=exchange, stale_after_s=60, **values)
        self.maker.decide = lambda time_ns: None
        self.maker.due_ns = NEVER
        self.book(0, {x: s for x, s in BIDS.items()}, ASKS, kind=feed.SNAPSHOT)

    def book(self, ms, own=None, facing=None, heard=None, kind=feed.DELTA) -> None:
        sides = [{self.side * x: s for x, s in (sizes or {}).items()} for sizes in (own, facing)]
        self.maker.take(delta(ms, *sides[:: self.side], heard, kind))

    def trade(self, ms, x, size, heard=None, rpi=False, taker=-1) -> None:
        """Somebody sells into our bid, unless taker is +1."""
        entry = (taker * self.side, self.side * x, size, rpi)
        self.maker.take(trades(ms, entry, heard=heard))

    def order(self, ms, x, qty=1.0) -> None:
        self.maker.flush()
        level = None if x is None else self.side * MID + x
        self.maker.exchange.send(self.side, level, qty, ns(ms))

    @property
    def fills(self) -> list[tuple]:
        """(ms, ticks from MID, qty) of every fill, each on our side."""
        self.maker.flush()
        found = self.maker.exchange.fills
        assert all(fill.side == self.side for fill in found)
        ticks = [fill.price / COIN.tick_size - MID for fill in found]
        return [((f.time_ns - ns(0)) / MS, self.side * x, f.qty) for f, x in zip(found, ticks)]


@pytest.fixture(params=[BID, ASK], ids=["bid", "ask"])
def side(request) -> int:
    return request.param


# ---- 1. How paper orders fill ------------------------------------------------------


def order(*args):
    return lambda story: story.order(*args)


def book(*args, **more):
    return lambda story: story.book(*args, **more)


def trade(*args, **more):
    return lambda story: story.trade(*args, **more)


def models(names: str) -> dict:
    return {"fill_model": names}


EVERY, PEER = models("queue touch through"), {"exchange": {"peer_rules": True}}
O2 = order(0, -2)  # arrives at 100, behind 4
GONE = {-1: 0, -2: 0}
# Each story: options, what happens, (ms, ticks from MID, qty) of the fills it must have.
# fmt: off
STORIES = {
    "the queue ahead is the size displayed up to the arrival, that instant included": (
        {}, [O2, book(99, {-2: 6}), book(100, {-2: 7}), book(101, {-2: 9}), trade(200, -2, 7),
             trade(201, -2, 0.5)], [(201, -2, 0.5)]),
    "a row from before the arrival counts though heard after a later trade": (
        {}, [O2, trade(150, -2, 1), book(90, {-2: 6}, heard=160), trade(200, -2, 5),
             trade(201, -2, 0.25)], [(201, -2, 0.25)]),
    "an order that would take by a row heard late is refused": (
        {}, [O2, trade(150, -1, 1), book(90, GONE, {-2: 1}, heard=160), book(200),
             trade(210, -3, 1)], []),
    "by the queue a trade at our price leaves us what is left of it": (
        {}, [O2, trade(200, -2, 4), trade(201, -2, 0.5)], [(201, -2, 0.5)]),
    "by touch a trade at our price fills the whole order": (
        models("touch"), [O2, trade(200, -2, 0.125)], [(200, -2, 1)]),
    "by through no trade at our price fills": (
        models("through"), [O2, trade(200, -2, 50), trade(201, -2, 50)], []),
    "what is left of trades fills us bit by bit and never beyond the order": (
        {}, [O2, trade(200, -2, 3), trade(201, -2, 1.5), trade(202, -2, 0.25), trade(203, -2, 50),
             trade(204, -2, 50)], [(201, -2, 0.5), (202, -2, 0.25), (203, -2, 0.25)]),
    "only the opposite aggressor meets us": (
        EVERY, [O2, trade(200, -2, 50, taker=1), trade(201, -3, 50, taker=1)], []),
    "a book row shortens the queue to its size and never lengthens it": (
        {}, [O2, book(200, {-2: 2}), book(201, {-2: 9}), trade(202, -2, 2.5)], [(202, -2, 0.5)]),
    "a delete inside the window empties the queue": (
        {}, [O2, book(200, {-2: 0}), trade(201, -2, 0.5)], [(201, -2, 0.5)]),
    "a level that only leaves the window keeps its queue": (
        {}, [O2, book(200, {-2: 0, -3: 0}), trade(201, -2, 4), trade(202, -2, 0.5)],
        [(202, -2, 0.5)]),
    "by the peer rules a level that leaves the window is empty": (
        PEER, [O2, book(200, {-2: 0, -3: 0}), trade(201, -2, 0.125)], [(201, -2, 1)]),
    "an order beyond the window waits behind all that its level shows at first": (
        {}, [order(0, -5), trade(200, -5, 50), book(201, {-5: 3}), trade(202, -5, 3),
             trade(203, -5, 0.5)], [(203, -5, 0.5)]),
    "an order beyond the window has none ahead once its level is seen empty": (
        {}, [order(0, -5), book(150), book(200, {-6: 3}), trade(201, -5, 0.5)], [(201, -5, 0.5)]),
    "by the peer rules nothing shown is nothing ahead": (
        PEER, [order(0, -5), trade(200, -5, 0.125)], [(200, -5, 1)]),
    "by the peer rules an order fills whole or not at all": (
        PEER, [O2, trade(200, -2, 4), trade(201, -2, 0.125)], [(201, -2, 1)]),
    "a trade through our price fills the whole order at our price, once": (
        EVERY, [O2, trade(200, -3, 0.125), trade(201, -3, 5)], [(200, -2, 1)]),
    "the opposite best reaching our price fills the order without a trade": (
        EVERY, [O2, book(200, {-1: 0}, {-1: 1}), book(201, {-2: 0}, {-2: 1})], [(201, -2, 1)]),
    "only what happens after the arrival fills": (
        EVERY, [O2, trade(99, -3, 5), book(250), trade(99, -3, 5, heard=300),
                trade(100, -3, 5, heard=300), trade(101, -3, 5, heard=300)], [(101, -2, 1)]),
    "before its cancel arrives the old order is hit and not the new": (
        EVERY, [O2, order(200, -3), trade(300, -9, 5)], [(300, -2, 1)]),
    "after that the new order is hit and not the old": (
        EVERY, [O2, order(200, -3), trade(301, -9, 5)], [(301, -3, 1)]),
    "a trade heard of late fills the order of its own time": (
        EVERY, [O2, book(120), order(200, -5), book(400), trade(250, -3, 1, heard=500)],
        [(250, -2, 1)]),
    "a trade heard of late, of after the replacement, does not": (
        EVERY, [O2, book(120), order(200, -5), book(400), trade(301, -3, 1, heard=500)], []),
    "trades of the instant of the cancel are met, however many messages tell of them": (
        EVERY, [O2, order(200, None), book(350), trade(300, -1, 1, heard=360),
                trade(300, -3, 1, heard=1360)], [(300, -2, 1)]),
    "a cancelled order can be hit until its cancel arrives": (
        {}, [O2, order(200, None), trade(299, -2, 4.5), trade(300, -2, 0.25), trade(301, -3, 5)],
        [(299, -2, 0.5), (300, -2, 0.25)]),
    "a trade that the displayed size already knows does not eat the queue": (
        {}, [O2, book(200, {-2: 4}), trade(200, -2, 4, heard=205), trade(211, -2, 4.5)],
        [(211, -2, 0.5)]),
    "retail trades count through our price but not at it": (
        models("queue touch"), [O2, trade(200, -2, 50, rpi=True), trade(201, -3, 1, rpi=True)],
        [(201, -2, 1)]),
    "an unchanged order keeps its place": (
        {}, [O2, trade(150, -2, 3), order(200, -2), trade(400, -2, 1.5)], [(400, -2, 0.5)]),
    "another quantity loses the place": (
        {}, [O2, trade(150, -2, 3), order(200, -2, 2), trade(400, -2, 1.5)], []),
    "post-only is judged again at arrival, and a refused order may be sent again": (
        {}, [O2, book(100, GONE, {-2: 1}), book(101, {-2: 1}, {-2: 0}), trade(200, -3, 5),
             order(300, -2), trade(401, -3, 5)], [(401, -2, 1)]),
    "the inventory limit is judged again at arrival": (
        {"max_inventory": 1.5}, [O2, order(200, -3, 0.625), trade(250, -2, 5), trade(400, -9, 5),
        order(400, -3, 0.5), trade(600, -9, 5)], [(250, -2, 1), (600, -3, 0.5)]),
    "participation bounds our share of what is left": (
        {"exchange": {"participation": 0.5}}, [O2, trade(200, -2, 4.5)], [(200, -2, 0.25)]),
    "a clock that is ahead of the exchange's is put right": (
        {"clock_offset_ms": 30_000}, [book(0, heard=30_050), order(30_050, -2), order(30_250, -5),
         book(260, heard=30_270), trade(340, -3, 1, heard=30_350)], [(340, -2, 1)]),
    "a clock that is behind the exchange's is put right": (
        {"clock_offset_ms": -30_000}, [order(50, -2), order(250, -5), book(30_260, heard=270),
         trade(30_340, -3, 1, heard=350)], [(30_340, -2, 1)]),
}
# fmt: on
@pytest.mark.parametrize("alone", [False, True], ids=["in slices", "alone"])
@pytest.mark.parametrize(
    "name", STORIES
)
def test_story(name, side, alone):
    options, steps, fills = STORIES[name]
    for model in options.get("fill_model", "queue").split():
        story = Story(side, **options | {"fill_model": model})
        for step in steps:
            step(story)
            if alone:
                story.maker.flush()
        assert story.fills == fills, model


def test_a_fill_remembers_the_queue_at_arrival_and_at_the_fill(side):
    story = Story(side)
    for step in (O2, trade(200, -2, 3), trade(201, -2, 1.5), trade(202, -3, 1)):
        step(story)
    assert story.fills == [(201, -2, 0.5), (202, -2, 0.5)]
    fills = story.maker.exchange.fills
    assert [(f.queue_at_arrival, f.queue_ahead) for f in fills] == [(4, 1), (4, 0)]


@pytest.mark.parametrize("name, why", [("post-", "would take"), ("the inv", "inventory limit")])
def test_a_refused_order_is_counted_with_its_reason(name, why):
    (_, (options, steps, _)) = next(item for item in STORIES.items() if item[0].startswith(name))
    story = Story(BID, **options)
    for step in steps:
        step(story)
    assert story.fills and story.maker.exchange.counts[f"refused: {why}"] == 1


# ---- 2. Slicing does not matter ----------------------------------------------------

BUSY = dict(
    min_half_spread_bps=0.05, default_spread_bps=0.4, gamma=0.05, delta=0.1, zeta=0.1,
    requote_move_bps=0.1, order_latency_ms=40.0, max_inventory=4.0, depth_band_bps=0.5,
)  # fmt: skip


def busy_market(seed: int, seconds: int = 24) -> list[Message]:
    """A seeded stream: a book of six levels that wanders, and trades around its best.

    Book and trades each have their own lag, so that they are heard out of order.
    """
    rng = random.Random(seed)
    sizes = [0.125, 0.25, 0.5, 1.0, 2.0, 3.5]
    center, shown, last = 0, {BID: {}, ASK: {}}, {"book": 0.0, "trades": 0.0}

    def draw(side: int, old: dict) -> dict:
        new = {}
        for x in (center - side * k for k in range(1, 7)):
            if rng.random() < 0.9:
                kept = x in old and rng.random() < 0.7
                new[x] = old[x] if kept else rng.choice(sizes)
        return new or {center - side: 1.0}

    def exchange_ms(kind: str, ms: float) -> float:
        last[kind] = max(last[kind], ms - rng.choice([2, 10, 45, 90, 150]))
        return last[kind]

    stream, ms, gap = [], 400.0, False
    while ms < seconds * 1000:
        ms += rng.choice([0, 1, 5, 15, 30, 40])
        if not stream or (ms > 18_000 and not gap):
            if stream:
                gap = True
                stream += [params(ms, gamma=0.03), lost(ms)]
            shown = {side: draw(side, {}) for side in (BID, ASK)}
            stream.append(snapshot(exchange_ms("book", ms), shown[BID], shown[ASK], heard=ms))
        elif rng.random() < 0.5:
            center += rng.choice([-1, 0, 0, 1])
            new = {side: draw(side, shown[side]) for side in (BID, ASK)}
            changed = [
                {x: new[s].get(x, 0) for x in shown[s] | new[s] if new[s].get(x) != shown[s].get(x)}
                for s in (BID, ASK)
            ]
            shown = new
            stream.append(delta(exchange_ms("book", ms), *changed, heard=ms))
        else:
            t, entries = exchange_ms("trades", ms), []
            for _ in range(rng.choice([1, 1, 2, 3])):
                taker = rng.choice([BID, ASK])
                x = center + taker * rng.choice([1, 1, 1, 2, 2, 3, 7])
                entries.append((taker, x, rng.choice(sizes), rng.random() < 0.1))
            stream.append(trades(t, *entries, heard=ms))
    return stream


def in_bursts(stream: list, seed: int) -> list[list[Message]]:
    """The stream cut at random, as a busy thread would take it."""
    rng, bursts, at = random.Random(seed), [], 0
    while at < len(stream):
        bursts.append(stream[at : (at := at + rng.choice([1, 1, 2, 3, 10, 200]))])
    return bursts


def run(stream, exchange=None, bursts=None, **values):
    """The maker after a stream, its log, and what it wanted: message number -> sends."""
    log, wants = io.StringIO(), {}
    maker = make(log, exchange=exchange, **BUSY | values)
    send = maker.exchange.send

    def note(*order) -> None:
        wants.setdefault(maker.messages, []).append(order)
        send(*order)

    maker.exchange.send = note
    for burst in bursts or [[message] for message in stream]:
        maker.take(*burst)
    return maker, log.getvalue(), wants


@pytest.mark.parametrize("model", FILL_MODELS)
@pytest.mark.parametrize("seed", range(4))
def test_slices_give_to_the_bit_what_single_messages_give(seed, model):
    stream = busy_market(seed)
    fast, fast_log, _ = run(stream, bursts=[stream], fill_model=model)
    slow, slow_log, _ = run(stream, fill_model=model)
    some, some_log, _ = run(stream, bursts=in_bursts(stream, seed), fill_model=model)
    assert some_log == fast_log and some.exchange.fills == fast.exchange.fills
    assert fast.state.fills > 20  # otherwise this shows nothing
    assert fast.exchange.fills == slow.exchange.fills
    assert fast_log == slow_log
    account = ("inventory", "cash", "fees_paid", "spread_captured", "revaluation", "turnover")
    market = ("mid_price", "best_bid", "best_ask", "volatility", "ema_volatility", "grid_mid")
    for name in account + market:
        assert repr(getattr(fast.state, name)) == repr(getattr(slow.state, name)), name
    assert repr(fast.state.liquidity) == repr(slow.state.liquidity)
    assert fast.exchange.counts == slow.exchange.counts
    times = [row["ms"] for row in decisions(io.StringIO(fast_log))]
    assert len(times) > 50 and times == sorted(times)


@pytest.mark.parametrize("seed", range(2))
def test_cash_and_inventory_are_the_sums_over_the_fills(seed):
    maker, _, _ = run(busy_market(seed), maker_fee_bps=-0.5)
    fills, state = maker.exchange.fills, maker.state
    assert state.inventory == sum(f.side * f.qty for f in fills)
    assert state.cash == pytest.approx(-sum(f.side * f.qty * f.price + f.fee for f in fills))
    assert abs(state.residual) < 1e-12 * state.turnover


def simulate(stream, wants, model, peer_rules, latency_ns=40 * MS, limit=4.0):
    """The fill rules once more: one message, one order at a time, in plain dicts."""
    books, orders, fills = {BID: {}, ASK: {}}, [], []
    standing, known = {BID: None, ASK: None}, {"cts": 0, "inventory": 0.0}

    def shown(order) -> float:
        """Size at the order's level; inf where the window does not reach."""
        book = books[order["side"]]
        if book and order["level"] >= min(book):
            return book.get(order["level"], 0.0)
        return 0.0 if peer_rules else math.inf

    def is_reached(order) -> bool:
        return any(level >= -order["level"] for level in books[-order["side"]])

    def end(order) -> None:
        orders.remove(order)
        if standing[order["side"]] is order:
            standing[order["side"]] = None

    def fill(order, qty, t) -> None:
        known["inventory"] += order["side"] * qty
        fills.append((t, order["side"], order["side"] * order["level"] * COIN.tick_size, qty))
        order["left"] -= qty
        if order["left"] == 0:
            end(order)

    def arrive(t) -> None:
        for order in [o for o in orders if o["queue"] is None and o["arrival"] < t]:
            too_much = order["side"] * known["inventory"] + order["left"] > limit
            if is_reached(order) or too_much:
                end(order)
            else:
                order["queue"] = shown(order)

    def book_message(message) -> None:
        if message.kind == feed.SNAPSHOT:
            books[BID], books[ASK] = {}, {}
        for side, (levels, sizes) in ((BID, message.bids), (ASK, message.asks)):
            books[side].update(zip(levels, sizes))
            books[side] = {level: size for level, size in books[side].items() if size}
        known["cts"] = message.exch_ns
        for order in [o for o in orders if o["queue"] is not None]:
            if message.exch_ns <= order["arrival"]:
                if is_reached(order):
                    end(order)
                elif shown(order) < math.inf:
                    order["queue"] = max(shown(order) - order["eaten"], 0.0)
            elif message.exch_ns <= order["cancel"]:
                if is_reached(order):
                    fill(order, order["left"], message.exch_ns)
                else:
                    order["queue"] = min(order["queue"], shown(order))

    def trade(t, taker, tick, size, is_rpi) -> None:
        for order in [o for o in orders if o["side"] == -taker and o["queue"] is not None]:
            if not order["arrival"] < t <= order["cancel"]:
                continue
            price = order["side"] * order["level"]
            if (tick - price) * taker > 0 or (tick == price and model == "touch" and not is_rpi):
                fill(order, order["left"], t)
            elif tick == price and model == "queue" and not is_rpi:
                if t <= known["cts"] and not peer_rules:
                    continue
                left = size - order["queue"]
                order["queue"], order["eaten"] = max(-left, 0.0), order["eaten"] + size
                if left > 0:
                    fill(order, order["left"] if peer_rules else min(order["left"], left), t)

    for number, message in enumerate(stream, 1):
        if message.kind in (feed.SNAPSHOT, feed.DELTA, feed.TRADES):
            arrive(message.exch_ns)
            if message.kind == feed.TRADES:
                for entry in message.trades:
                    trade(*entry)
            else:
                book_message(message)
        for side, level, qty, time_ns in wants.get(number, []):
            old = standing[side]
            if old and (old["level"], old["qty"]) == (level, qty):
                continue
            if old:
                old["cancel"], standing[side] = time_ns + latency_ns, None
            if level is not None:
                new = dict(side=side, level=level, qty=qty, left=qty, queue=None, eaten=0.0)
                standing[side] = new | dict(arrival=time_ns + latency_ns, cancel=NEVER)
                orders.append(standing[side])
    return fills


@pytest.mark.parametrize("peer_rules", [False, True], ids=["own rules", "peer rules"])
@pytest.mark.parametrize("model", FILL_MODELS)
@pytest.mark.parametrize("seed", range(4, 8))
def test_fills_are_those_of_a_plain_simulator(seed, model, peer_rules):
    stream = busy_market(seed)
    maker, _, wants = run(stream, exchange=dict(peer_rules=peer_rules), fill_model=model)
    found = [(f.time_ns, f.side, f.price, f.qty) for f in maker.exchange.fills]
    assert len(found) > 20
    assert found == simulate(stream, wants, model, peer_rules)


@pytest.mark.parametrize("seed", range(3))
def test_the_mirror_image_of_a_random_story_has_the_mirrored_fills(seed):
    def tell(side: int) -> list:
        story, rng = Story(side, max_inventory=1000), random.Random(seed)
        for ms in range(10, 9000, 10):
            size = rng.choice([0.25, 0.5, 1, 3])
            match rng.randrange(4):
                case 0:
                    story.order(ms, rng.randrange(-5, 0), size)
                case 1:
                    story.trade(ms, rng.randrange(-5, 0), size, rpi=rng.random() < 0.1)
                case 2:
                    story.book(ms, {rng.randrange(-6, 0): size, -7: 1})
                case 3:
                    story.book(ms - 40, {rng.randrange(-6, 0): 0}, heard=ms)
        return story.fills

    assert len(tell(BID)) > 50
    assert tell(BID) == tell(ASK)


# ---- 3. Accounting -----------------------------------------------------------------


def test_four_fills_by_pencil_and_paper():
    state = State()
    for mid, bought, price, qty, fee, *expected in (
        (100, +1, 99, 2, 0.5, -198.5, 2, 0),
        (104, -1, 105, 3, 1.0, 115.5, 5, 8),  # 2 held while the mid rose by 4
        (101, +1, 100, 2, -0.25, -84.25, 7, 11),  # 1 short while it fell by 3; a rebate
        (98, -1, 97, 1, 0.25, 12.5, 6, 8),  # 1 held while it fell by 3; sold below the mid
    ):
        state.revalue(mid)
        state.settle(Fill(0, 0, bought, price, qty, fee, mid, 0.0, 0.0))
        assert [state.cash, state.spread_captured, state.revaluation] == expected
    assert (state.inventory, state.fees_paid, state.gross, state.equity) == (0, 1.5, 14, 12.5)
    assert (state.fills, state.turnover, state.residual) == (4, 2 * 99 + 3 * 105 + 2 * 100 + 97, 0)


@pytest.mark.parametrize("fee_bps, fee", [(2, 9.9998), (-1, -4.9999)])
def test_a_maker_fee_is_paid_on_the_price_and_a_rebate_raises_cash(fee_bps, fee):
    story = Story(BID, maker_fee_bps=fee_bps)
    story.order(0, -2)
    story.trade(200, -3, 1)
    assert story.fills == [(200, -2, 1)]
    state = story.maker.state
    assert state.cash == pytest.approx(-49_999 - fee, abs=1e-9)
    assert state.fees_paid == pytest.approx(fee, abs=1e-9)
    assert state.equity == pytest.approx(1 - fee, abs=1e-9)  # bought 1 below the mid of 50,000


def test_the_residual_stays_rounding_over_thousands_of_fills():
    rng, state, mid, cash = random.Random(1), State(), 60_000.0, 0.0
    for _ in range(5000):
        mid += rng.uniform(-20, 20)
        bought, qty, off = rng.choice([1, -1]), rng.randrange(1, 200) / 1000, rng.uniform(-1, 5)
        price = round(mid - bought * off, 1)
        fee = price * qty * rng.choice([2e-4, -1e-4])
        state.revalue(mid)
        state.settle(Fill(0, 0, bought, price, qty, fee, mid, 0.0, 0.0))
        cash -= bought * price * qty + fee
    assert abs(state.residual) < 1e-12 * state.turnover
    assert state.equity == pytest.approx(cash + state.inventory * mid, abs=1e-6)
    assert state.gross - state.fees_paid == pytest.approx(state.equity, abs=1e-9)


# ---- 4. What is measured -----------------------------------------------------------


def test_the_average_forgets_half_in_a_half_life_however_the_steps_fall():
    assert exponential_average(1, 3, dt_s=30, half_life_s=30) == 2
    two_steps = exponential_average(exponential_average(1, 3, 7, 30), 3, 23, 30)
    assert two_steps == pytest.approx(2, rel=1e-15)
    assert exponential_average(math.nan, 3, 1, 30) == 3


def test_measures_are_those_of_a_plain_reckoning_on_the_grid_of_whole_seconds():
    rng, maker = random.Random(5), make(half_life_s=20)
    maker.take(snapshot(250, {-1: 9, -20: 9}, {1: 9, 20: 9}))
    told, turnover, x, ms = [(250, MID)], [], 0, 250
    while ms < 85_000:
        ms = min(ms + rng.choice([100, 350, 1000]), (ms // 1000 + 1) * 1000)  # often on the grid
        if rng.random() < 0.5:
            old, x = x, x + rng.choice([-1, 0, 1])
            maker.take(delta(ms, {old - 1: 0, x - 1: 9}, {old + 1: 0, x + 1: 9}))
            told.append((ms, MID + x))
        else:
            maker.take(trades(ms, (BID, 1, 2), (ASK, -1, 0.5)))
            turnover.append((ms, ((MID + 1) * 2 + (MID - 1) * 0.5) * 0.5e-6))
    ema = math.nan
    for second in range(11, ms // 1000 + 1):
        grid = [[mid for at, mid in told if at < 1000 * k][-1] for k in range(1, second + 1)]
        returns = [1e4 * math.log(b / a) for a, b in zip(grid, grid[1:])][-60:]
        volatility = math.sqrt(sum(r * r for r in returns) / len(returns))
        ema = volatility if second == 11 else volatility + (ema - volatility) * 0.5 ** (1 / 20)
    window = [usd for at, usd in turnover if 1000 * (second - 60) <= at < 1000 * second]
    liquidity = sum(window) / sum(map(abs, returns))
    state = maker.state
    assert state.volatility == pytest.approx(volatility, rel=1e-12)
    assert state.ema_volatility == pytest.approx(ema, rel=1e-12)
    assert state.liquidity == pytest.approx(liquidity, rel=1e-12)


def test_nothing_is_quoted_before_ten_returns_and_a_flat_market_is_no_error():
    log = io.StringIO()
    maker = make(log)
    maker.take(snapshot(500))
    beat(maker, 1500, 11_500)
    assert [(row["ms"], row["source"], row["reason"]) for row in decisions(log)] == [
        (500, "none", "warming up"),
        (5500, "none", "warming up"),
        (10_500, "none", "warming up"),  # the mids of seconds 1 to 10 are 9 returns
        (11_500, "lp", ""),
    ]
    assert (maker.state.volatility, maker.state.ema_volatility, maker.state.liquidity) == (0, 0, 0)
    assert maker.due_ns == ns(11_500 + 5000)


def test_a_loss_restarts_the_grid_and_keeps_the_average():
    maker = warm()
    maker.state.ema_volatility = 0.75
    maker.take(lost(12_900))
    maker.take(snapshot(20_300))
    beat(maker, 21_300, 30_300)
    assert maker.quote.reason == "warming up"
    assert math.isnan(maker.state.volatility) and maker.state.ema_volatility == 0.75
    beat(maker, 31_300, 31_300)  # renewed at 31, last at 12: 19 s of a half-life of 30
    assert maker.quote.source == "lp" and maker.state.volatility == 0
    assert maker.state.ema_volatility == pytest.approx(0.75 * 0.5 ** (19 / 30), rel=1e-12)


def test_nothing_is_measured_while_the_book_is_silent():
    maker = warm()
    for ms in range(13_000, 33_000, 500):
        maker.take(trades(ms, (BID, 1, 8)))
    assert maker.is_stale and not maker.state.returns_bps and math.isnan(maker.state.liquidity)
    beat(maker, 33_300, 45_300)
    assert maker.quote.source == "lp"
    assert maker.state.liquidity == 0  # no trade was heard since the book came back


# ---- 5. When a decision is made ----------------------------------------------------


def test_the_first_message_at_or_past_the_time_due_decides_with_itself_applied():
    log = io.StringIO()
    maker = make(log)
    maker.take(snapshot(300))
    maker.take(delta(5299, {-1: 0}))
    maker.take(trades(5300, (BID, 1, 1)))  # just due
    maker.take(delta(10_299, {-1: 1}))
    maker.take(delta(10_400, {0: 1}))  # the first at or past 10,300, moves the best bid
    maker.take(delta(10_400, {0: 0}))  # equal stamps keep their order
    rows = decisions(log)
    assert [row["ms"] for row in rows] == [300, 5300, 10_400]
    assert [row["best_bid"] for row in rows] == ["49999.5", "49999.0", "50000.0"]
    assert maker.due_ns == ns(15_400)


def test_a_loss_its_end_and_new_parameters_decide_at_once_and_a_loss_only_once():
    log = io.StringIO()
    maker = make(log)
    told = [snapshot(300), lost(400, "a gap, they say"), lost(500), ticker(600), snapshot(700),
            snapshot(800), params(900, alpha=2), params(950, alpha=77), delta(1000)]  # fmt: skip
    for message in told:
        maker.take(message)
    rows = [(row["ms"], row["reason"]) for row in decisions(log)]
    warming = "warming up"
    assert rows == [(300, warming), (400, "book lost"), (700, warming), (900, warming)]
    assert maker.parameters.alpha == 2


@pytest.mark.parametrize("told_by", ["the next line", "the timer", "the timer, often"])
def test_a_silent_book_is_noticed_exactly_then_whoever_tells_of_it(told_by):
    log = io.StringIO()
    maker = make(log, stale_after_s=2.5)
    maker.take(snapshot(300))
    if told_by == "the timer":
        maker.pass_time(ns(2801))
    if told_by == "the timer, often":
        for ms in range(310, 4000, 70):
            maker.pass_time(ns(ms))
    maker.take(ticker(4000))  # a ticker is no sign of life of the book
    maker.take(delta(4100))
    rows = [(row["ms"], row["reason"]) for row in decisions(log)]
    assert rows == [(300, "warming up"), (2800, "book stale"), (4100, "warming up")]


# ---- 6. Guards ---------------------------------------------------------------------

CAUSES = {  # guard: what trips it, what clears it
    "book crossed": (delta(13_000, {1: 1}), delta(15_000, {1: 0})),
    "book one-sided": (delta(13_000, dict.fromkeys(BIDS, 0)), delta(15_000, BIDS)),
    "far from mark price": (ticker(13_000, mark_price=50_300), ticker(15_000, mark_price=50_200)),
}


@pytest.mark.parametrize("reason", CAUSES)
def test_a_guard_pulls_the_quote_and_gives_it_back(reason):
    maker = warm()
    trips, clears = CAUSES[reason]
    assert set(maker.exchange.sent.values()) != {None}
    maker.take(trips)
    beat(maker, 14_200, 14_200)  # the whole second judges, the message after it decides
    assert (maker.quote.source, maker.quote.reason) == ("none", reason)
    assert (maker.quote.bid_price, maker.quote.ask_price) == (None, None)
    assert maker.exchange.sent == {BID: None, ASK: None}
    assert (maker.state.time_ns - ns(0)) / MS == 14_200
    maker.take(clears)
    beat(maker, 16_200, 16_200)
    assert maker.quote.source == "lp" and maker.quote.bid_price < maker.quote.ask_price


def test_the_mark_price_guards_only_once_it_is_known_and_by_its_limit():
    maker = warm(max_mark_gap_bps=40)
    assert math.isnan(maker.state.mark_price) and maker.guard(ns(12_500)) == ""
    for mark, reason in ((50_000 / 1.0039, ""), (50_000 / 1.0041, "far from mark price")):
        maker.take(ticker(12_600, mark_price=mark))
        assert maker.guard(ns(12_600)) == reason


def test_a_drawdown_flattens_through_the_book_level_by_level_and_stops_for_good():
    maker = warm(max_drawdown_usdt=100, maker_fee_bps=0, taker_fee_bps=10)
    maker.exchange.send(BID, MID - 2, 1.0, ns(12_500))
    maker.take(trades(12_700, (ASK, -3, 1)))  # bought 1 at 49,999; equity 1
    maker.take(delta(12_750, dict.fromkeys(BIDS, 0) | {-210: 0.5, -212: 0.25, -220: 9},
                     dict.fromkeys(ASKS, 0) | {-208: 3}))  # fmt: skip
    assert maker.guard(ns(12_750)) == ""
    beat(maker, 13_200, 13_200)  # decides: equity 1 - 104.5, more than 100 below its peak
    assert maker.quote.reason == "drawdown limit" and maker.state.inventory == 1
    maker.take(delta(13_301, {-210: 8}))  # the order arrived at 13,300, when there were 0.5
    maker.flush()
    sold = [(f.side, f.price, f.qty, f.is_taker) for f in maker.exchange.fills[1:]]
    assert sold == [(-1, 49_895, 0.5, True), (-1, 49_894, 0.25, True), (-1, 49_890, 0.25, True)]
    proceeds = 0.5 * 49_895 + 0.25 * 49_894 + 0.25 * 49_890
    assert maker.state.inventory == 0
    assert maker.state.cash == pytest.approx(-49_999 + proceeds * (1 - 10e-4), abs=1e-9)
    beat(maker, 14_300, 30_300)
    assert maker.quote.reason == "drawdown limit" and maker.exchange.sent == {BID: None, ASK: None}
    assert len(maker.exchange.fills) == 4


# ---- 7. The quote ------------------------------------------------------------------


def reckoned_half_spread(bids=BIDS, asks=ASKS) -> float:
    """Half the base spread of a flat market without trades, USDT: sigma and L are 0."""
    depth_musd = (sum(bids.values()) + sum(asks.values())) / 2 * 50_000e-6
    return (1 + 1 / (1 + depth_musd)) / 2 * 50_000e-4


def test_quotes_stand_half_the_base_spread_from_the_mid_rounded_outward():
    maker = warm()
    half = reckoned_half_spread()
    assert maker.quote.bid_price == math.floor((50_000 - half) * 2) / 2
    assert maker.quote.ask_price == math.ceil((50_000 + half) * 2) / 2
    assert half % 0.5 and maker.quote[1::2] != (0, 0)
    assert (maker.quote.bid_qty, maker.quote.ask_qty) == (1, 1)


def test_however_small_the_spread_a_quote_joins_the_best_prices_and_never_takes():
    tiny = dict(gamma=0, delta=0, zeta=0, min_half_spread_bps=0.01, default_spread_bps=0.02)
    maker = warm({0: 5}, {1: 5}, **tiny)
    assert (maker.quote.bid_price, maker.quote.ask_price) == (50_000, 50_000.5)


def test_quantity_is_bounded_by_the_share_of_the_depth_in_whole_lots():
    maker = warm({-1: 5}, {1: 14}, max_depth_share=0.07)  # 0.35 and 0.98
    assert (maker.quote.bid_qty, maker.quote.ask_qty) == (0.25, 0.875)
    thin = warm({-1: 1}, {1: 14}, max_depth_share=0.1)
    assert (thin.quote.bid_price, thin.quote.ask_qty) == (None, 1)
    assert thin.quote.reason == "no bid: book too thin for a lot"
    assert [floor_to_lot(q, 0.001) for q in (0.3, 0.0129, 0.0009999)] == [0.3, 0.012, 0]


def quote_at(maker, inventory: float):
    maker.state.inventory = inventory
    maker.decide(maker.state.time_ns)
    return maker.quote


def test_the_inventory_limit_pulls_the_side_that_would_breach_it():
    maker = warm(alpha=0)
    for inventory, bid, ask in ((9, True, True), (9.125, False, True), (-9.125, True, False)):
        quote = quote_at(maker, inventory)
        assert (quote.bid_price is not None, quote.ask_price is not None) == (bid, ask)
        assert ("inventory limit" in quote.reason) == (not (bid and ask))


def test_long_inventory_lowers_both_quotes_and_short_raises_both():
    maker = warm(delta=5, zeta=5, min_half_spread_bps=0.01)
    prices = [quote_at(maker, q)[0::2][:2] for q in (-6, -3, 0, 3, 6)]
    for pair in zip(*prices):
        assert list(pair) == sorted(pair, reverse=True) and len(set(pair)) == 5


class Solver:
    """linprog until told to fail."""

    fails = False

    def __call__(self, *problem, **bounds):
        if self.fails:
            raise ValueError("out of order")
        return linprog(*problem, **bounds)


def test_every_rung_of_the_fallback_says_its_name_and_why():
    solver = Solver()
    maker = warm(solver=solver, default_spread_bps=20, fallback_max_age_s=3)
    lp_prices, solver.fails = maker.quote[0::2][:2], True
    maker.take(delta(13_000, {-1: 0, 19: 1}, {1: 0, 2: 0, 3: 0, 21: 1}))  # the mid: 10 USDT up
    maker.take(params(13_100, alpha=2))
    why = "solver raised ValueError: out of order"
    assert (maker.quote.source, maker.quote.reason) == ("last_good", why)
    rise = [new - old for new, old in zip(maker.quote[0::2][:2], lp_prices)]
    assert rise == pytest.approx([10, 10], abs=0.5)  # the same distances, from the new mid
    beat(maker, 14_000, 15_400)
    maker.take(params(15_501, alpha=3))  # the last good one is now 3.001 s old
    assert (maker.quote.source, maker.quote.reason) == ("default", why)
    assert (maker.quote.bid_price, maker.quote.ask_price) == (49_959.5, 50_060.5)
    solver.fails = False
    maker.take(params(15_600, alpha=2))
    assert (maker.quote.source, maker.quote.reason) == ("lp", "")
    assert [maker.counts[name] for name in ("last_good", "default", why)] == [1, 1, 2]


def test_without_any_good_solution_the_default_spread_is_quoted():
    def fails(*problem, **bounds):
        raise ValueError("out of order")

    maker = warm(solver=fails, default_spread_bps=20)
    assert (maker.quote.bid_price, maker.quote.ask_price) == (49_950, 50_050)
    assert (maker.quote.source, maker.quote.reason[:13]) == ("default", "solver raised")


# ---- 8. The log --------------------------------------------------------------------

HEADER = (
    "time_ns, mid_price, best_bid, best_ask, bid_price, bid_qty, ask_price, ask_qty, "
    "base_spread_bps, volatility, ema_volatility, bid_depth, ask_depth, liquidity, inventory, "
    "cash, equity, source, reason"
)


def test_the_log_has_the_columns_of_the_design_and_a_row_for_every_decision():
    log = io.StringIO()
    maker = make(log)
    count = []
    maker.on_decision = count.append
    maker.take(ticker(100))  # decides, and nothing is known yet
    for message in (snapshot(300), lost(400, "they, say")):
        maker.take(message)
    assert log.getvalue().splitlines()[0] == HEADER.replace(" ", "")
    before, first, gone = list(csv.reader(io.StringIO(log.getvalue())))[1:]
    assert len(count) == 3
    unknown = [""] * 13
    zero, nothing = ["0", "0.00000000", "0.00000000"], ["none", "book lost"]
    assert before == [str(ns(100)), *unknown, *zero, *nothing]
    assert first[:8] == [str(ns(300)), "50000.00", "49999.5", "50000.5", "", "", "", ""]
    assert first[8:] == ["", "", "", "14", "14", "", *zero, "none", "warming up"]
    assert gone == [str(ns(400)), *unknown, *zero, *nothing]


def test_the_log_reads_back_as_the_quote_and_the_account():
    log = io.StringIO()
    maker = warm({-1: 5}, {1: 14}, max_depth_share=0.07, log=log)
    quote_at(maker, 1.5)
    row, quote, state = decisions(log)[-1], maker.quote, maker.state
    names = ("bid_price", "bid_qty", "ask_price", "ask_qty")
    assert [float(row[name]) for name in names] == list(quote[:4])
    assert len({*quote[:4]}) == 4  # so that none can stand for another
    names = ("time_ns", "mid_price", "volatility", "bid_depth", "ask_depth", "inventory", "equity")
    assert [float(row[name]) for name in names] == [getattr(state, name) for name in names]
    spread = maker.distances.base_spread.total_bps
    assert float(row["base_spread_bps"]) == pytest.approx(spread, rel=1e-8)


RECORDING = Path(os.environ.get("RECORDINGS", ".")) / "bybit_linear_BTCUSDT_20260809.jsonl.gz"


@pytest.mark.skipif(not RECORDING.exists(), reason="set RECORDINGS to the real recordings' folder")
@pytest.mark.parametrize("ticks, hit", [(651142, 1), (651137, 1), (651131, 1), (651130, 0)])
def test_a_real_sweep_that_no_book_message_shows_fills_what_rests_in_its_range(ticks, hit):
    parser, _ = feed.parser_of_recording(RECORDING, None, None, None)
    maker = MarketMaker(Parameters(), parser.instrument)
    maker.decide = lambda time_ns: None
    for message in feed.replay(RECORDING, parser):
        maker.take(message)
        if message.kind == feed.SNAPSHOT:
            maker.due_ns = NEVER
            maker.exchange.send(BID, ticks, 0.01, message.recv_ns)
    maker.flush()
    when = {fill.time_ns // MS for fill in maker.exchange.fills}
    assert when == ({1786310857440} if hit else set())
    assert maker.state.inventory == pytest.approx(0.01 * hit)


# ---- 9. Sessions -------------------------------------------------------------------


@pytest.fixture
def recording(tmp_path) -> Path:
    """20 s of a market with a tick of 0.1 that goes up and down, written as recorded."""
    topic, path = "orderbook.200.BTCUSDT", tmp_path / "short.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for i in range(201):
            ms, x = START_MS + 100 * i, i // 10 % 2
            bids, asks = [["50000.0", "3"], ["50000.2", f"{2 * x}"]], [["50000.4", "3"]]
            data = {"s": "BTCUSDT", "b": bids, "a": asks, "u": i + 5, "seq": i}
            kind = "delta" if i else "snapshot"
            book = {"topic": topic, "type": kind, "ts": ms, "data": data, "cts": ms - 5}
            sold = {"T": ms - 3, "s": "BTCUSDT", "S": "Sell", "v": "0.5", "p": "49900.0"}
            trade = {"topic": "publicTrade.BTCUSDT", "ts": ms, "data": [sold]}
            mark = {"symbol": "BTCUSDT", "markPrice": "50000.17", "lastPrice": "50000.2"}
            told = {"topic": "tickers.BTCUSDT", "type": "delta", "ts": ms, "data": mark}
            for message in (book, trade, told) if i % 20 == 19 else (book,):
                file.write(f"{ms * MS} {json.dumps(message)}\n")
    return path


def test_a_replay_ends_with_a_summary_a_log_and_a_picture(recording, tmp_path, capsys):
    log, plot = tmp_path / "log.csv", tmp_path / "plot.png"
    run_it = ["--replay", str(recording), "--speed", "max", "--log", str(log)]
    assert main([*run_it, "--plot", str(plot)]) == 0
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(log.read_text().splitlines()))
    assert rows[-1]["source"] == "lp" and int(rows[-1]["time_ns"]) > (START_MS + 14_000) * MS
    assert "REPLAY of short.jsonl.gz" in out and "221 messages" in out and "residual" in out
    assert "inventory +0.02" in out and err == ""  # 0.01 of each of the two quotes
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    written = log.read_bytes()
    assert main(run_it) == 2
    assert "log.csv exists and is not overwritten" in capsys.readouterr().err
    assert log.read_bytes() == written
    assert main([*run_it[:4], "--log", str(tmp_path / "again.csv")]) == 0
    assert (tmp_path / "again.csv").read_bytes() == written


def test_duration_cuts_by_receive_time(recording, tmp_path, capsys):
    assert main(["--replay", str(recording), "--speed", "max", "--duration", "3.05"]) == 0
    assert "33 messages" in capsys.readouterr().out  # 31 of the book; a trade, a ticker


FAULTS = {
    "alpha out of range": (["--alpha", "77"], ["alpha = 77", "0 to 10", "--alpha"]),
    "alpha no number": (["--alpha", "x"], ["--alpha", "'x'", "--help"]),
    "unknown key": (["--params", '{"alpah": 1}'], ["alpah", "did you mean alpha"]),
    "no JSON": (["--params", "alpha=1"], ["--params", "line 1"]),
    "no object": (["--params", "[1]"], ["--params", "JSON object"]),
    "no params file": (["--params", ""], ["--params", "No such file"]),
    "record a replay": (["--record", "x.gz"], ["--record", "leave it out"]),
    "tick size": (["--tick-size", "0.3"], ["multiple of the tick 0.3", "--tick-size"]),
    "tick no number": (["--tick-size", "x"], ["--tick-size 'x'", "above 0"]),
    "depth": (["--depth", "1000"], ["no depth 1000", "[200]"]),
    "speed": (["--speed", "0"], ["--speed", "'0'"]),
    "plot folder": (["--plot", "none/x.png"], ["none/x.png", "cannot be written"]),
    "log folder": (["--log", "none/x.csv"], ["none/x.csv", "cannot be written"]),
    "missing file": (["--replay", "absent.gz"], ["absent.gz", "No such file"]),
}




@pytest.mark.parametrize("fault", FAULTS)
def test_a_users_error_is_one_line_with_value_rule_and_remedy(
    fault, recording, tmp_path, capsys, monkeypatch
):
    flags, words = FAULTS[fault]
    monkeypatch.chdir(tmp_path)
    if flags[0] == "--params":
        if flags[1]:
            Path("p.json").write_text(flags[1])
        flags = ["--params", "p.json"]
    try:
        status = main(["--replay", str(recording), "--speed", "max", *flags])
    except SystemExit as stopped:  # argparse's own
        status = stopped.code
    err = capsys.readouterr().err
    assert status == 2
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("network is unreachable")

    for name in ("fetch_instrument", "open_feed"):
        monkeypatch.setattr(feed, name, refuse)


def test_without_a_network_the_sample_is_replayed_and_marked(no_network, capsys):
    assert main(["--duration", "2", "--speed", "max"]) == 0
    out, err = capsys.readouterr()
    assert "OFFLINE REPLAY" in out and "SYNTHETIC" in out
    assert "network is unreachable" in err and "synthetic sample" in err


@pytest.mark.parametrize("flags", [["--live"], ["--record", "x.gz"], ["--url", "ws://127.0.0.1:9"]])
def test_who_insists_on_live_data_gets_an_error_and_no_file(
    flags, no_network, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main([*flags, "--log", "log.csv"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "--replay FILE" in err
    assert list(tmp_path.iterdir()) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [80, 100])
def test_the_screen_fits_the_terminal_and_holds_the_key_facts(columns, monkeypatch):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda _: os.terminal_size((columns, 24)))
    maker = warm()
    maker.exchange.send(BID, MID - 2, 1.0, ns(12_500))
    maker.take(trades(12_700, (ASK, -3, 1)))
    maker.take(ticker(12_700, mark_price=50_001.25))
    beat(maker, 13_000, 17_700)
    stream = Terminal()
    display = Display("COINUSDT linear   OFFLINE REPLAY of SYNTHETIC data", stream)
    display.show(maker, lambda: ["last frame 0.1 s ago", "7 gaps"])
    lines = [line.split("\x1b[K")[0] for line in stream.getvalue().splitlines()]
    text = "\n".join(lines).replace("\x1b[2J\x1b[H", "")
    assert max(map(len, text.splitlines())) <= columns and len(lines) <= 24
    for fact in ("OFFLINE REPLAY of SYNTHETIC", "no order is ever sent", "bid 49,999.5", "7 gaps",
                 "mark 50,001.2", "1 fills", "bought 1 at 49,999.0", "Base spread", "lp", "+1 ",
                 "volatility 0.00", "net -9.00", "gross +1.00", "2023-11-14"):  # fmt: skip
        assert fact in text, fact
    before = stream.getvalue()
    display.show(maker, lambda: [])  # not again so soon
    assert stream.getvalue() == before


def test_without_a_terminal_there_is_the_title_and_then_plain_lines():
    stream, maker = io.StringIO(), warm()
    Display("title", stream).show(maker, lambda: [])
    title, line = stream.getvalue().splitlines()
    assert title == "title"
    assert line.startswith("2023-11-14 22:13:32  mid 50000.00  quote 4999") and "lp" in line
    assert "\x1b" not in line and "net +0.00 USDT" in line


def test_a_crossed_book_that_falls_silent_is_no_endless_loop():
    """Two guards at once: the first is named, and time passes all the same."""
    maker = warm()
    now_ms = (maker.last_ns - ns(0)) // MS
    maker.take(delta(now_ms, {5: 1}))
    maker.flush()
    assert maker.book.fault == "book crossed"
    maker.pass_time(maker.last_ns + 600 * feed.NS)
    assert maker.quote.reason == "book crossed" and maker.is_stale


def test_a_first_stamp_decades_ago_costs_no_walk_through_every_second():
    maker = make()
    maker.take(Message(feed.LOST, 5, fields={"reason": "a gap"}))
    maker.take(lost(0))
    assert maker.second_ns == ns(1000)


def test_a_stopped_maker_whose_book_is_lost_flattens_at_the_prices_it_finds_after():
    maker = warm()
    maker.state.inventory, maker.is_stopped = 2.0, True
    now_ms = (maker.last_ns - ns(0)) // MS
    maker.take(lost(now_ms + 10))
    far = {x + 200: size for x, size in BIDS.items()}, {x + 200: size for x, size in ASKS.items()}
    maker.take(snapshot(now_ms + 2000, *far))
    maker.take(delta(now_ms + 2600, far[0]))
    maker.flush()
    (fill,) = maker.exchange.fills
    assert fill.is_taker and fill.price == (MID + 199) * 0.5 and maker.state.inventory == 0
