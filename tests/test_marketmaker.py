"""The market maker against hand-worked numbers and against plain, slow reckonings.

`simulate` is the simplest statement of the rules by which paper orders fill. Random markets
compare it with the paper exchange; then each rule is told as a story, for bid and ask.
"""

import csv
import io
import math
import os
import random
import shutil
from functools import partial
from operator import methodcaller
from pathlib import Path

import pytest
from market import (
    ASKS,
    BIDS,
    COIN,
    MID,
    beats,
    busy_market,
    calm,
    control,
    delta,
    lost,
    messages,
    ns,
    params,
    rough_session,
    snapshot,
    ticker,
    trades,
    write,
)

import feed
from feed import ASK, BID, DELTA, MS, NEVER, NS, SNAPSHOT, Message
from marketmaker import LOGGED, Account, Fill, MarketMaker, Session, build_arguments, main
from optimize import FILL_MODELS, Parameters, linprog

LIMITS = dict(order_qty=1.0, max_inventory=10.0, max_depth_share=1.0)


class Maker(MarketMaker):
    """A market maker that hears lines, by way of a parser of its own."""

    def __init__(self, log=None, exchange=None, solver=linprog, **values) -> None:
        parameters = Parameters(**LIMITS | values)
        super().__init__(parameters, COIN, log, None, solver, **exchange or {})
        self.parser = feed.Parser(COIN)

    def hear(self, *lines) -> None:
        self.take(*messages(lines, self.parser))


def warm(bids=BIDS, asks=ASKS, **values) -> Maker:
    """A market maker that has seen a flat market for 12 s, and quotes."""
    maker = Maker(**values)
    maker.hear(snapshot(500, bids, asks), *beats(1500, 12_500))
    assert maker.decision.source in ("lp", "default")
    return maker


def to_ms(time_ns: int) -> float:
    return (time_ns - ns(0)) / MS


def decisions(log: io.StringIO) -> list[dict]:
    """The log's rows, with `ms` for the time."""
    rows = csv.DictReader(io.StringIO(log.getvalue()))
    return [row | {"ms": to_ms(int(row["time_ns"]))} for row in rows]


# ---- 1. The fill rules, row by row -------------------------------------------------

LATENCY_NS, LIMIT = 40 * MS, 4.0  # of orders; of the inventory


def simulate(stream: list[Message], sends: dict, model: str, peer_rules: bool) -> list[tuple]:
    """The rules by which paper orders fill: one message, one order at a time.

    1. An order arrives LATENCY_NS after its decision, and stands until its cancel arrives,
       as late. Only what happens in that time can fill it, whenever we hear of it. At
       equal times the market comes before our orders.
    2. At its arrival it is refused if it would take, or could break the inventory limit.
    3. Before it in the queue is then the size shown at its level; where nothing is shown,
       without end. A smaller size shown later shortens the queue.
    4. It fills whole when the opposite best reaches its level, or a trade goes through it.
    5. A trade at its level fills it whole in the model "touch", never in "through". In
       "queue" the trade first eats the queue, and what is left of it fills the order; but
       a trade that the book already knows of has left the queue before. A retail trade
       (RPI) at its level does nothing.

    With the peer rules nothing shown is nothing ahead, every trade eats the queue, and an
    order fills whole or not at all. sends: by the number of the message before them, the
    wishes (side, level or None, quantity, time decided). Returns (time, side, price, qty).
    """
    book = {}  # level -> size: the levels of bids are above 0, those of asks below
    book_ns = 0  # exchange time of the book
    orders, fills = [], []  # an order with nothing left is over

    def shown(order: dict) -> float:
        worst = min((x for x in book if x * order["side"] > 0), default=math.inf)
        unseen = 0.0 if peer_rules or order["level"] >= worst else math.inf
        return book.get(order["level"], unseen)

    def is_reached(order: dict) -> bool:
        return any(x * order["side"] < 0 and -x <= order["level"] for x in book)

    def fill(order: dict, qty: float, time_ns: int) -> None:
        price = order["side"] * order["level"] * COIN.tick_size
        fills.append((time_ns, order["side"], price, qty))
        order["left"] -= qty

    for number, message in enumerate(stream, 1):
        # Who has arrived by now meets the book as it stands.
        for order in orders:
            if order["queue"] is None and order["arrival"] < message.exch_ns:
                inventory = sum(side * qty for _, side, _, qty in fills)
                order["queue"] = shown(order)
                if is_reached(order) or order["side"] * inventory + order["left"] > LIMIT:
                    order["left"] = 0
        there = [order for order in orders if order["queue"] is not None]

        # Trades meet the orders that stood at their own time.
        for time_ns, level, size, is_rpi in message.trades:
            for order in there:
                is_standing = order["left"] and order["arrival"] < time_ns <= order["cancel"]
                if not is_standing or order["side"] * level < 0:
                    continue
                if level < order["level"]:
                    fill(order, order["left"], time_ns)
                elif level > order["level"] or is_rpi:
                    continue
                elif model == "touch":
                    fill(order, order["left"], time_ns)
                elif model == "queue" and (time_ns > book_ns or peer_rules):
                    left_of_trade = size - order["queue"]
                    order["queue"] = max(-left_of_trade, 0.0)
                    order["eaten"] += size
                    if left_of_trade > 0:
                        most = order["left"] if peer_rules else left_of_trade
                        fill(order, min(order["left"], most), time_ns)

        # A book message tells the sizes at some levels; a snapshot those of all.
        if message.kind in (DELTA, SNAPSHOT):
            rows = dict(zip(*message.rows))
            book = rows if message.kind == SNAPSHOT else book | rows
            book = {level: size for level, size in book.items() if size}
            book_ns = message.exch_ns
            for order in there:
                if book_ns <= order["arrival"]:  # from before it, but heard of after it
                    if is_reached(order):
                        order["left"] = 0
                    elif shown(order) < math.inf:
                        order["queue"] = max(shown(order) - order["eaten"], 0.0)
                elif order["left"] and book_ns <= order["cancel"]:
                    order["queue"] = min(order["queue"], shown(order))
                    if is_reached(order):
                        fill(order, order["left"], book_ns)

        # The maker has decided: cancel and new order travel together.
        for side, level, qty, decided_ns in sends.get(number, ()):
            standing = [o for o in orders if o["side"] == side and o["cancel"] == NEVER]
            standing = [o for o in standing if o["left"]]
            if any((o["level"], o["qty"]) == (level, qty) for o in standing):
                continue  # unchanged: it keeps its place
            arrival = decided_ns + LATENCY_NS
            for order in standing:
                order["cancel"] = arrival
            if level is not None:
                order = dict(side=side, level=level, qty=qty, left=qty, queue=None, eaten=0.0)
                orders.append(order | dict(arrival=arrival, cancel=NEVER))
    return fills


BUSY = dict(
    min_half_spread_bps=0.05, default_spread_bps=0.4, gamma=0.05, delta=0.1, zeta=0.1,
    requote_move_bps=0.1, order_latency_ms=LATENCY_NS / MS, max_inventory=LIMIT, depth_band_bps=0.5,
)  # fmt: skip


@pytest.mark.parametrize("peer_rules", [False, True], ids=["our rules", "peer rules"])
@pytest.mark.parametrize("model", FILL_MODELS)
@pytest.mark.parametrize("seed", range(4))
def test_in_a_random_market_orders_fill_by_these_rules(seed, model, peer_rules):
    maker = Maker(exchange=dict(peer_rules=peer_rules), **BUSY | dict(fill_model=model))
    stream, wishes, send = messages(busy_market(seed)), {}, maker.exchange.send

    def note(*wish) -> bool:
        wishes.setdefault(maker.messages, []).append(wish)
        return send(*wish)

    maker.exchange.send = note
    for message in stream:
        maker.take(message)
    fills = [(f.time_ns, f.side, f.price, f.qty) for f in maker.account.fills]
    assert len(fills) > 20  # otherwise this shows nothing
    assert fills == simulate(stream, wishes, model, peer_rules)
    assert maker.account.inventory == sum(side * qty for _, side, _, qty in fills)


# ---- 2. The fill rules, told as stories --------------------------------------------


class Story(Maker):
    """Paper orders in a market seen from our bid; side = ASK tells the mirror image.

    Ticks count from MID and are negative on our side of it. Nobody decides but the story:
    an order sent at ms arrives 100 ms later. What is told between two orders is heard as
    one tape, or each line alone.
    """

    def __init__(self, side: int, alone: bool = False, **values) -> None:
        super().__init__(stale_after_s=60, **values)
        self.side, self.alone, self.lines, self.due_ns = side, alone, [], NEVER
        self.book(0, BIDS, ASKS, kind=SNAPSHOT)

    def decide(self, time_ns: int) -> None:
        pass

    def tell(self, line=None) -> None:
        self.lines += [line] if line else []
        if self.alone or not line:
            self.hear(*self.lines)
            self.lines = []

    def book(self, ms, near=None, far=None, heard=None, kind=DELTA) -> None:
        rows = [{self.side * x: size for x, size in (r or {}).items()} for r in (near, far)]
        self.tell(delta(ms, *rows[:: self.side], heard, kind))

    def trade(self, ms, x, size, heard=None, rpi=False, taker=-1) -> None:
        """Somebody sells into our bid, unless taker is +1."""
        self.tell(trades(ms, (taker * self.side, self.side * x, size, rpi), heard=heard))

    def order(self, ms, x, qty=1.0) -> None:
        self.tell()
        level = None if x is None else self.side * MID + x
        self.exchange.send(self.side, level, qty, ns(ms))

    @property
    def fills(self) -> list[tuple]:
        """(ms, ticks from MID, quantity) of every fill, each on our side."""
        self.tell()
        fills = self.account.fills
        assert {fill.side for fill in fills} <= {self.side}
        ticks = [round(fill.price / COIN.tick_size) - MID for fill in fills]
        return [(to_ms(f.time_ns), self.side * x, f.qty) for f, x in zip(fills, ticks)]


def story(steps: list, fills: list[tuple], models="queue", refused="", **options) -> tuple:
    """What happens, (ms, ticks from MID, quantity) of each fill it must have, and when."""
    return steps, fills, models.split(), refused, options


order, book, trade = (partial(methodcaller, name) for name in ("order", "book", "trade"))
O2 = order(0, -2)  # arrives at 100, behind 4
GONE = {-1: 0, -2: 0}
EVERY = "queue touch through"
PEER = dict(exchange=dict(peer_rules=True))
STORIES = {
    # The queue
    "the queue ahead is the size displayed up to the arrival, that instant included": story(
        [O2, book(99, {-2: 6}), book(100, {-2: 7}), book(101, {-2: 9}), trade(200, -2, 7),
         trade(201, -2, 0.5)], [(201, -2, 0.5)]),
    "a row from before the arrival counts though heard after a later trade": story(
        [O2, trade(150, -2, 1), book(90, {-2: 6}, heard=160), trade(200, -2, 5),
         trade(201, -2, 0.25)], [(201, -2, 0.25)]),
    "a book row shortens the queue to its size and never lengthens it": story(
        [O2, book(200, {-2: 2}), book(201, {-2: 9}), trade(202, -2, 2.5)], [(202, -2, 0.5)]),
    "a snapshot shortens the queue too, and of all levels": story(
        [O2, book(200, {-1: 1, -2: 2}, ASKS, kind=SNAPSHOT), trade(202, -2, 2.5)],
        [(202, -2, 0.5)]),
    "a delete inside the window empties the queue": story(
        [O2, book(200, {-2: 0}), trade(201, -2, 0.5)], [(201, -2, 0.5)]),
    "a level that only leaves the window keeps its queue": story(
        [O2, book(200, {-2: 0, -3: 0}), trade(201, -2, 4), trade(202, -2, 0.5)],
        [(202, -2, 0.5)]),
    "an order beyond the window waits behind all that its level shows at first": story(
        [order(0, -5), trade(200, -5, 50), book(201, {-5: 3}), trade(202, -5, 3),
         trade(203, -5, 0.5)], [(203, -5, 0.5)]),
    "an order beyond the window has none ahead once its level is seen empty": story(
        [order(0, -5), book(150), book(200, {-6: 3}), trade(201, -5, 0.5)], [(201, -5, 0.5)]),
    "an unchanged order keeps its place": story(
        [O2, trade(150, -2, 3), order(200, -2), trade(400, -2, 1.5)], [(400, -2, 0.5)]),
    "another quantity loses the place": story(
        [O2, trade(150, -2, 3), order(200, -2, 2), trade(400, -2, 1.5)], []),
    # Trades at our price, and through it
    "by the queue a trade at our price leaves us what is left of it": story(
        [O2, trade(200, -2, 4), trade(201, -2, 0.5)], [(201, -2, 0.5)]),
    "by touch a trade at our price fills the whole order": story(
        [O2, trade(200, -2, 0.125)], [(200, -2, 1)], "touch"),
    "by through no trade at our price fills": story(
        [O2, trade(200, -2, 50), trade(201, -2, 50)], [], "through"),
    "what is left of trades fills us bit by bit and never beyond the order": story(
        [O2, trade(200, -2, 3), trade(201, -2, 1.5), trade(202, -2, 0.25), trade(203, -2, 50),
         trade(204, -2, 50)], [(201, -2, 0.5), (202, -2, 0.25), (203, -2, 0.25)]),
    "participation bounds our share of what is left": story(
        [O2, trade(200, -2, 4.5)], [(200, -2, 0.25)], exchange=dict(participation=0.5)),
    "a trade that the displayed size already knows does not eat the queue": story(
        [O2, book(200, {-2: 4}), trade(200, -2, 4, heard=205), trade(211, -2, 4.5)],
        [(211, -2, 0.5)]),
    "only the opposite aggressor meets us": story(
        [O2, trade(200, -2, 50, taker=1), trade(201, -3, 50, taker=1)], [], EVERY),
    "a trade through our price fills the whole order at our price, once": story(
        [O2, trade(200, -3, 0.125), trade(201, -3, 5)], [(200, -2, 1)], EVERY),
    "retail trades count through our price but not at it": story(
        [O2, trade(200, -2, 50, rpi=True), trade(201, -3, 1, rpi=True)], [(201, -2, 1)],
        "queue touch"),
    # The opposite best
    "the opposite best reaching our price fills the order without a trade": story(
        [O2, book(200, {-1: 0}, {-1: 1}), book(201, {-2: 0}, {-2: 1})], [(201, -2, 1)], EVERY),
    "post-only is judged again at arrival, and a refused order may be sent again": story(
        [O2, book(100, GONE, {-2: 1}), book(101, {-2: 1}, {-2: 0}), trade(200, -3, 5),
         order(300, -2), trade(401, -3, 5)], [(401, -2, 1)], refused="would take"),
    "an order that would take by a row heard late is refused": story(
        [O2, trade(150, -1, 1), book(90, GONE, {-2: 1}, heard=160), book(200),
         trade(210, -3, 1)], [], refused="would take"),
    "the inventory limit is judged again at arrival": story(
        [O2, order(200, -3, 0.625), trade(250, -2, 5), trade(400, -9, 5), order(400, -3, 0.5),
         trade(600, -9, 5)], [(250, -2, 1), (600, -3, 0.5)], refused="inventory limit",
        max_inventory=1.5),
    # When an order stands
    "only what happens after the arrival fills": story(
        [O2, trade(99, -3, 5), book(250), trade(99, -3, 5, heard=300),
         trade(100, -3, 5, heard=300), trade(101, -3, 5, heard=300)], [(101, -2, 1)], EVERY),
    "before its cancel arrives the old order is hit and not the new": story(
        [O2, order(200, -3), trade(300, -9, 5)], [(300, -2, 1)], EVERY),
    "after that the new order is hit and not the old": story(
        [O2, order(200, -3), trade(301, -9, 5)], [(301, -3, 1)], EVERY),
    "a cancelled order can be hit until its cancel arrives": story(
        [O2, order(200, None), trade(299, -2, 4.5), trade(300, -2, 0.25), trade(301, -3, 5)],
        [(299, -2, 0.5), (300, -2, 0.25)]),
    "a trade heard of late fills the order of its own time": story(
        [O2, book(120), order(200, -5), book(400), trade(250, -3, 1, heard=500)],
        [(250, -2, 1)], EVERY),
    "a trade heard of late, of after the replacement, does not": story(
        [O2, book(120), order(200, -5), book(400), trade(301, -3, 1, heard=500)], [], EVERY),
    "a trade heard of 10 s late still fills, and a later one no more": story(
        [O2, trade(101, -2, 4.5, heard=10_101), trade(102, -3, 1, heard=10_103)],
        [(101, -2, 0.5)]),
    "trades of the instant of the cancel are met, however many messages tell of them": story(
        [O2, order(200, None), book(350), trade(300, -1, 1, heard=360),
         trade(300, -3, 1, heard=1360)], [(300, -2, 1)], EVERY),
    "a clock that is ahead of the exchange's is put right": story(
        [book(0, heard=30_050), order(30_050, -2), order(30_250, -5), book(260, heard=30_270),
         trade(340, -3, 1, heard=30_350)], [(340, -2, 1)], clock_offset_ms=30_000),
    "a clock that is behind the exchange's is put right": story(
        [order(50, -2), order(250, -5), book(30_260, heard=270),
         trade(30_340, -3, 1, heard=350)], [(30_340, -2, 1)], clock_offset_ms=-30_000),
    # The peer's rules
    "by the peer rules an order fills whole or not at all": story(
        [O2, trade(200, -2, 4), trade(201, -2, 0.125)], [(201, -2, 1)], **PEER),
    "by the peer rules a level that leaves the window is empty": story(
        [O2, book(200, {-2: 0, -3: 0}), trade(201, -2, 0.125)], [(201, -2, 1)], **PEER),
    "by the peer rules nothing shown is nothing ahead": story(
        [order(0, -5), trade(200, -5, 0.125)], [(200, -5, 1)], **PEER),
}


@pytest.mark.parametrize("side", [BID, ASK], ids=["bid", "ask"])
@pytest.mark.parametrize("alone", [False, True], ids=["in slices", "alone"])
@pytest.mark.parametrize("name", STORIES)
def test_story(name, alone, side):
    steps, fills, models, refused, options = STORIES[name]
    for model in models:
        played = Story(side, alone, fill_model=model, **options)
        for step in steps:
            step(played)
        assert played.fills == fills, model
        refusals = [what for what in played.exchange.counts if what.startswith("refused")]
        assert refusals == [f"refused: {refused}"] * bool(refused)


def test_a_fill_remembers_its_queue_its_fee_and_the_mid():
    story = Story(BID, maker_fee_bps=-1)
    for step in (O2, trade(200, -2, 3), book(201, {}, {1: 0}), trade(202, -2, 1.5), trade(203, -3, 1)):
        step(story)
    assert story.fills == [(202, -2, 0.5), (203, -2, 0.5)]
    for fill, queue_ahead in zip(story.account.fills, (1, 0)):
        assert (fill.queue_at_arrival, fill.queue_ahead, to_ms(fill.arrival_ns)) == (4, queue_ahead, 100)
        assert (fill.fee, fill.mid_price) == (pytest.approx(-0.5 * 4.9999), 50_000.25)


# ---- 3. Slices do not matter -------------------------------------------------------


def cut(stream: list[Message], seed: int) -> list[list[Message]]:
    """The stream cut at random, as a busy thread would take it."""
    rng, bursts, at = random.Random(seed), [], 0
    while at < len(stream):
        bursts.append(stream[at : (at := at + rng.choice([1, 1, 2, 3, 10, 200]))])
    return bursts


def run(bursts: list[list[Message]], **values) -> tuple[Maker, list[str]]:
    """The maker after the bursts; its log and all that later decisions depend on, in words."""
    log = io.StringIO()
    maker = Maker(log, **BUSY | values)
    for burst in bursts:
        maker.take(*burst)
    market = vars(maker.market) | {"book": maker.market.book.view}
    orders = [(o.side, o.level, o.left, o.arrival_ns) for o in maker.exchange.orders]
    rest = maker.exchange.counts, maker.decision, maker.due_ns, maker.second_ns
    memory = [repr(part) for part in (maker.account, market, orders, *rest)]
    return maker, [*log.getvalue().splitlines(), *memory]


@pytest.mark.parametrize("draw, seed, pace_bps", [
    (busy_market, 4, 0.1), (busy_market, 5, 0.1), (rough_session, 0, 0.1), (rough_session, 1, 2.0),
])  # fmt: skip
@pytest.mark.parametrize("model", FILL_MODELS)
def test_slices_give_to_the_bit_what_single_messages_give(draw, seed, pace_bps, model):
    stream = messages(draw(seed))
    values = dict(fill_model=model, stale_after_s=2.0, requote_move_bps=pace_bps)
    maker, alone = run([[message] for message in stream], **values)
    assert len(maker.account.fills) > 10 and maker.messages == len(stream)
    assert run([stream], **values)[1] == alone
    assert run(cut(stream, seed), **values)[1] == alone
    if draw == rough_session:
        reasons = "book crossed, book one-sided, far from mark price, book lost, book stale, "
        reasons += "drawdown limit, warming up"
        assert set(reasons.split(", ")) <= set(maker.reasons) and maker.last_ns % NS
        assert (maker.parameters.alpha, maker.parameters.order_qty) == (2, 0.75)


# ---- 4. Accounting -----------------------------------------------------------------


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
    assert (a.inventory, a.fees_paid, a.gross, a.equity, a.residual) == (0, 1.5, 14, 12.5, 0)
    assert (len(a.fills), a.turnover) == (4, 2 * 99 + 3 * 105 + 2 * 100 + 97)


def test_the_residual_stays_rounding_over_thousands_of_fills():
    rng, account, mid, cash = random.Random(1), Account(), 60_000.0, 0.0
    for _ in range(5000):
        mid += rng.uniform(-20, 20)
        bought, qty = rng.choice([1, -1]), rng.randrange(1, 200) / 1000
        price = round(mid - bought * rng.uniform(-1, 5), 1)
        fee = price * qty * rng.choice([2e-4, -1e-4])
        account.mark(mid)
        account.settle(Fill(0, 0, bought, price, qty, fee, mid))
        cash -= bought * price * qty + fee
    assert abs(account.residual) < 1e-12 * account.turnover
    assert account.equity == pytest.approx(cash + account.inventory * mid, abs=1e-6)
    assert account.gross - account.fees_paid == pytest.approx(account.equity, abs=1e-9)


# ---- 5. What is measured -----------------------------------------------------------


def test_measures_are_those_of_a_plain_reckoning_on_the_grid_of_whole_seconds():
    rng, maker = random.Random(5), Maker(half_life_s=20)
    maker.hear(snapshot(250, {-1: 9, -20: 9}, {1: 9, 20: 9}))
    mids, traded, x, ms = [(250, MID)], [], 0, 250
    while ms < 85_000:
        ms = min(ms + rng.choice([100, 350, 1000]), (ms // 1000 + 1) * 1000)  # often on the grid
        if rng.random() < 0.5:
            old, x = x, x + rng.choice([-1, 0, 1])
            maker.hear(delta(ms, {old - 1: 0, x - 1: 9}, {old + 1: 0, x + 1: 9}))
            mids.append((ms, MID + x))
        else:
            maker.hear(trades(ms, (BID, 1, 2), (ASK, -1, 0.5)))
            traded.append((ms, ((MID + 1) * 2 + (MID - 1) * 0.5) * 0.5e-6))
    ema = math.nan
    for second in range(11, ms // 1000 + 1):
        grid = [[mid for at, mid in mids if at < 1000 * k][-1] for k in range(1, second + 1)]
        returns = [1e4 * math.log(b / a) for a, b in zip(grid, grid[1:])][-60:]
        volatility = math.sqrt(sum(r * r for r in returns) / len(returns))
        ema = volatility if second == 11 else volatility + (ema - volatility) * 0.5 ** (1 / 20)
    window = [musd for at, musd in traded if 1000 * (second - 60) <= at < 1000 * second]
    liquidity = sum(window) / sum(map(abs, returns))
    found = maker.market.volatility, maker.market.ema_volatility, maker.market.liquidity
    assert found == pytest.approx((volatility, ema, liquidity), rel=1e-12)


def test_nothing_is_quoted_before_ten_returns_and_a_flat_market_is_no_error():
    log = io.StringIO()
    maker = warm(log=log)
    assert [(row["ms"], row["source"], row["reason"]) for row in decisions(log)] == [
        (500, "none", "warming up"),
        (5500, "none", "warming up"),
        (10_500, "none", "warming up"),  # the mids of seconds 1 to 10 are 9 returns
        (11_500, "lp", ""),
    ]
    market = maker.market
    assert (market.volatility, market.ema_volatility, market.liquidity) == (0, 0, 0)
    assert maker.due_ns == ns(11_500 + 5000)


def test_a_loss_restarts_the_grid_and_keeps_the_average():
    maker = warm()
    maker.market.ema_volatility = 0.75
    maker.hear(lost(12_900), snapshot(20_300), *beats(21_300, 30_300))
    assert maker.decision.reason == "warming up"
    assert math.isnan(maker.market.volatility) and maker.market.ema_volatility == 0.75
    maker.hear(delta(31_300))  # renewed at 31, last at 12: 19 s of a half-life of 30
    assert maker.decision.source == "lp" and maker.market.volatility == 0
    assert maker.market.ema_volatility == pytest.approx(0.75 * 0.5 ** (19 / 30), rel=1e-12)


def test_nothing_is_measured_while_the_book_is_silent():
    maker = warm()
    maker.hear(*(trades(ms, (BID, 1, 8)) for ms in range(13_000, 33_000, 500)))
    assert maker.is_stale and not maker.market.returns_bps and math.isnan(maker.market.liquidity)
    maker.hear(*beats(33_300, 45_300))
    assert maker.decision.source == "lp"
    assert maker.market.liquidity == 0  # no trade was heard since the book came back


# ---- 6. When a decision is made, and what forbids a quote --------------------------

BEST, WARMING = "49999.5", "warming up"
MOMENTS = {  # what follows 12 s of a flat market, and (ms, reason, best bid) of each decision
    "the first message at or past the time due decides, and sees itself": (
        [*beats(13_500, 15_500), delta(16_499, {-1: 0}), trades(16_500, (BID, 1, 1)),
         *beats(17_000, 21_000), delta(21_499, {-1: 1}), delta(21_600, {0: 1}),
         delta(21_600, {0: 0})], [(16_500, "", "49999.0"), (21_600, "", "50000.0")]),
    "a loss decides at once and only once, then its end, then new parameters": (
        [lost(12_600, "a gap, they say"), lost(12_700), ticker(12_800), snapshot(12_900),
         snapshot(13_000), params(13_100, alpha=2), params(13_150, alpha=77), delta(13_200)],
        [(12_600, "book lost", ""), (12_900, WARMING, BEST), (13_100, WARMING, BEST)]),
    "a book falls silent at that very moment, though a ticker is heard": (
        [ticker(19_000), delta(19_100)],
        [(17_500, "book stale", BEST), (19_100, WARMING, BEST)]),
    "in an outage nobody decides until it is over": (
        [control(13_000, "outage", back_ns=ns(20_000)), *beats(14_000, 19_000),
         params(19_500, alpha=2), control(20_000, "back")],
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
}


@pytest.mark.parametrize("alone", [False, True], ids=["in slices", "alone"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_moment(moment, alone):
    (lines, expected), log = MOMENTS[moment], io.StringIO()
    maker = warm(log=log)
    for burst in ([line] for line in lines) if alone else [lines]:
        maker.hear(*burst)
    rows = [row for row in decisions(log) if row["ms"] > 12_500]
    assert [(row["ms"], row["reason"], row["best_bid"]) for row in rows] == expected
    for row in rows:
        assert (row["bid_price"] != "") == (row["ask_price"] != "") == (row["reason"] == "")
    assert any(maker.exchange.sent.values()) == (rows[-1]["reason"] == "")


def test_time_alone_notices_a_silent_book_and_walks_no_seconds_of_which_nothing_is_known():
    log = io.StringIO()
    maker = warm(log=log)
    maker.hear(delta(12_500, {5: 1}))
    for ms in (*range(12_500, 19_000, 70), 10**12):
        maker.pass_time(ns(ms))
    rows = [(row["ms"], row["reason"]) for row in decisions(log)[-2:]]
    assert rows == [(11_500, ""), (17_500, "book crossed")]  # of two guards the first is named
    assert maker.is_stale and maker.second_ns == ns(10**12 + 1000)


def test_parameters_that_the_user_gave_are_not_changed_by_a_recording():
    maker = MarketMaker(Parameters(alpha=5.0), COIN, overrides={"alpha": 5.0})
    maker.take(*messages([params(100, alpha=2.0, beta=3.0)]))
    assert (maker.parameters.alpha, maker.parameters.beta) == (5, 3)


def test_a_drawdown_flattens_through_the_book_level_by_level_and_stops_for_good():
    maker = warm(max_drawdown_usdt=100, maker_fee_bps=0, taker_fee_bps=10)
    maker.exchange.send(BID, MID - 2, 1.0, ns(12_500))
    fallen = dict.fromkeys(BIDS, 0) | {-210: 0.5, -212: 0.25, -220: 9}
    maker.hear(trades(12_700, (ASK, -3, 1)))  # bought 1 at 49,999; equity 1
    maker.hear(delta(12_750, fallen, dict.fromkeys(ASKS, 0) | {-208: 3}))
    assert not maker.is_stopped
    maker.hear(delta(13_200))  # decides: equity 1 - 104.5, more than 100 below its peak
    assert maker.decision.reason == "drawdown limit" and maker.account.inventory == 1
    maker.hear(delta(13_301, {-210: 8}))  # the order arrived at 13,300, when there were 0.5
    sold = [(f.side, f.price, f.qty, f.is_taker) for f in maker.account.fills[1:]]
    assert sold == [(-1, 49_895, 0.5, True), (-1, 49_894, 0.25, True), (-1, 49_890, 0.25, True)]
    proceeds = 0.5 * 49_895 + 0.25 * 49_894 + 0.25 * 49_890
    assert maker.account.inventory == 0
    assert maker.account.cash == pytest.approx(-49_999 + proceeds * (1 - 10e-4), abs=1e-9)
    maker.hear(*beats(14_300, 30_300))
    assert maker.decision.reason == "drawdown limit" and len(maker.account.fills) == 4
    assert maker.exchange.sent == {BID: None, ASK: None}


def test_a_stopped_maker_whose_book_is_lost_flattens_at_the_prices_after_the_loss():
    maker = warm()
    maker.account.inventory, maker.is_stopped = 2.0, True
    risen = [{x + 200: size for x, size in side.items()} for side in (BIDS, ASKS)]
    maker.decide(ns(12_500))
    maker.hear(lost(12_510), snapshot(14_500, *risen), delta(15_100))
    (fill,) = maker.account.fills
    assert fill.is_taker and fill.price == (MID + 199) * 0.5 and maker.account.inventory == 0


# ---- 7. The quote ------------------------------------------------------------------


def quote_at(maker: Maker, inventory: float) -> tuple[float, float]:
    """Our bid and ask price with an inventory; nan for none."""
    maker.account.inventory = inventory
    maker.decide(maker.last_ns)
    return maker.decision.bid_price, maker.decision.ask_price


def test_quotes_stand_half_the_base_spread_from_the_mid_rounded_outward():
    """In a flat market without trades volatility and liquidity are 0: delta and zeta remain."""
    d, half = warm().decision, (1 + 1 / (1 + 14 * 50_000e-6)) / 2 * 50_000e-4
    assert half % 0.5
    assert d.bid_price == math.floor((50_000 - half) * 2) / 2
    assert d.ask_price == math.ceil((50_000 + half) * 2) / 2
    assert (d.bid_qty, d.ask_qty) == (1, 1)


def test_however_small_the_spread_a_quote_joins_the_best_prices_and_never_takes():
    tiny = dict(gamma=0, delta=0, zeta=0, min_half_spread_bps=0.01, default_spread_bps=0.02)
    d = warm({0: 5}, {1: 5}, **tiny).decision
    assert (d.bid_price, d.ask_price) == (50_000, 50_000.5)


def test_quantity_is_bounded_by_the_share_of_the_depth_in_whole_lots():
    d = warm({-1: 5}, {1: 14}, max_depth_share=0.07).decision  # 0.35 and 0.98
    assert (d.bid_qty, d.ask_qty) == (0.25, 0.875)
    d = warm({-1: 1}, {1: 14}, max_depth_share=0.1).decision
    assert math.isnan(d.bid_price) and d.ask_qty == 1
    assert d.reason == "no bid: book too thin for a lot"


def test_the_inventory_limit_pulls_the_side_that_would_breach_it():
    maker = warm(alpha=0)
    for inventory, bid, ask in ((9, True, True), (9.125, False, True), (-9.125, True, False)):
        assert [price > 0 for price in quote_at(maker, inventory)] == [bid, ask]
        assert ("inventory limit" in maker.decision.reason) == (not (bid and ask))


def test_long_inventory_lowers_both_quotes_and_short_raises_both():
    maker = warm(delta=5, zeta=5, min_half_spread_bps=0.01)
    for prices in zip(*(quote_at(maker, q) for q in (-6, -3, 0, 3, 6))):
        assert list(prices) == sorted(set(prices), reverse=True)


def test_every_rung_of_the_fallback_says_its_name_and_why():
    is_broken, why = [], "solver raised ValueError: out of order"

    def solver(*problem, **bounds):
        if is_broken:
            raise ValueError("out of order")
        return linprog(*problem, **bounds)

    def quote() -> tuple:
        return maker.decision.source, maker.decision.reason, *maker.decision[4:8:2]

    maker = warm(solver=solver, default_spread_bps=20, fallback_max_age_s=3)
    lp, _, bid, ask = quote()
    is_broken.append(True)
    maker.hear(delta(13_000, {-1: 0, 19: 1}, {1: 0, 2: 0, 3: 0, 21: 1}))  # the mid: 10 USDT up
    maker.hear(params(13_100, alpha=2))
    near = partial(pytest.approx, abs=0.5)  # the same distances, from the new mid
    assert quote() == ("last_good", why, near(bid + 10), near(ask + 10))
    maker.hear(*beats(14_000, 15_400), params(15_501, alpha=3))  # it is now 3.001 s old
    assert quote() == ("default", why, 49_959.5, 50_060.5)
    is_broken.clear()
    maker.hear(params(15_600, alpha=2))
    assert lp == "lp" and quote()[:2] == ("lp", "")
    assert (maker.sources["last_good"], maker.sources["default"], maker.reasons[why]) == (1, 1, 2)


# ---- 8. The log --------------------------------------------------------------------

HEADER = (
    "time_ns, mid_price, best_bid, best_ask, bid_price, bid_qty, ask_price, ask_qty, "
    "base_spread_bps, volatility, ema_volatility, bid_depth, ask_depth, liquidity, inventory, "
    "cash, equity, source, reason"
)


def test_the_log_has_the_columns_of_the_design_and_a_row_for_every_decision():
    log, makers = io.StringIO(), []
    maker = Maker(log)
    maker.on_decision = makers.append
    maker.hear(ticker(100), snapshot(300), lost(400, "they, say"))  # at 100 nothing is known yet
    assert log.getvalue().splitlines()[0] == HEADER.replace(" ", "")
    before, first, gone = list(csv.reader(io.StringIO(log.getvalue())))[1:]
    assert makers == [maker] * 3
    unknown = [""] * 13
    zero, nothing = ["0", "0.00000000", "0.00000000"], ["none", "book lost"]
    assert before == [str(ns(100)), *unknown, *zero, *nothing]
    assert first[:8] == [str(ns(300)), "50000.00", "49999.5", "50000.5", "", "", "", ""]
    assert first[8:] == ["", "", "", "14", "14", "", *zero, "none", "warming up"]
    assert gone == [str(ns(400)), *unknown, *zero, *nothing]


def test_the_log_reads_back_as_the_decision():
    log = io.StringIO()
    maker = warm({-1: 5}, {1: 14}, max_depth_share=0.07, log=log)
    quote_at(maker, 1.5)
    row, values = decisions(log)[-1], maker.decision._asdict()
    assert len(set(list(values.values())[1:8])) == 7  # so that none can stand for another
    assert [row["source"], row["reason"]] == [values["source"], values["reason"]]
    for name in LOGGED[:-2]:
        assert float(row[name]) == pytest.approx(values[name], rel=1e-8), name


# ---- 9. Sessions -------------------------------------------------------------------


@pytest.fixture
def recording(tmp_path, monkeypatch) -> None:
    """20 s of a flat market in which our bid is hit, in the folder where we are."""
    monkeypatch.chdir(tmp_path)
    hit, mark = trades(13_000, (ASK, -50, 1)), ticker(14_000, 50_001)
    write(Path("short.gz"), calm(20_500, hit, mark), **LIMITS)


def replay(*flags: str) -> int:
    return main(["--replay", "short.gz", "--speed", "max", *flags])


def test_a_replay_ends_with_a_summary_a_log_and_a_picture(recording, capsys):
    assert replay("--log", "log.csv", "--plot", "plot.png") == 0
    out, err = capsys.readouterr()
    written = Path("log.csv").read_text()
    last = decisions(io.StringIO(written))[-1]
    assert (last["ms"], last["source"], last["inventory"]) == (16_500, "lp", "1")
    for fact in ("REPLAY of short.gz", "24 messages", "+1 COIN", "1 fills", "residual"):
        assert fact in out, fact
    assert err == "" and Path("plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert replay("--log", "log.csv") == 2 and Path("log.csv").read_text() == written
    assert "log.csv exists and is not overwritten" in capsys.readouterr().err
    assert replay("--log", "again.csv") == 0 and Path("again.csv").read_text() == written


def test_duration_cuts_by_receive_time(recording, capsys):
    assert replay("--duration", "3.05") == 0
    assert "5 messages" in capsys.readouterr().out  # the start and four of the book


FAULTS = """\
--alpha 77: alpha = 77, 0 to 10, --alpha
--alpha x: --alpha, 'x', --help
--params unknown.json: alpah, did you mean alpha
--params text.json: --params, line 1
--params list.json: --params, JSON object
--params absent.json: --params, No such file
--record x.gz: --record, leave it out
--tick-size 0.3: multiple of the tick 0.3, --tick-size
--tick-size x: --tick-size 'x', above 0
--depth 1000: no depth 1000, [200]
--speed 0: --speed, '0'
--plot none/x.png: none/x.png, cannot be written
--log none/x.csv: none/x.csv, cannot be written
--replay absent.gz: absent.gz, No such file"""


@pytest.mark.parametrize("fault", FAULTS.splitlines())
def test_a_users_error_is_one_line_with_value_rule_and_remedy(fault, recording, capsys):
    flags, words = fault.split(": ")
    for name, text in (("unknown", '{"alpah": 1}'), ("text", "alpha=1"), ("list", "[1]")):
        Path(f"{name}.json").write_text(text)
    try:
        status = replay(*flags.split())
    except SystemExit as stopped:  # argparse's own
        status = stopped.code
    err = capsys.readouterr().err
    assert status == 2
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert all(word in err for word in words.split(", ")), err


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("network is unreachable")

    for name in ("fetch_instrument", "open_feed"):
        monkeypatch.setattr(feed, name, refuse)
    monkeypatch.chdir(tmp_path)


def test_without_a_network_the_sample_is_replayed_and_marked(no_network, capsys):
    assert main(["--duration", "2", "--speed", "max"]) == 0
    out, err = capsys.readouterr()
    assert "OFFLINE REPLAY" in out and "SYNTHETIC" in out
    assert "network is unreachable" in err and "synthetic sample" in err


@pytest.mark.parametrize("flags", ["--live", "--record x.gz", "--url ws://127.0.0.1:9"])
def test_who_insists_on_live_data_gets_an_error_and_no_file(flags, no_network, capsys):
    assert main([*flags.split(), "--log", "log.csv"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "--replay FILE" in err
    assert list(Path().iterdir()) == []


def look(maker: Maker, is_terminal: bool, monkeypatch) -> str:
    """What a session shows of the maker when it looks around twice at once."""
    stream, options = io.StringIO(), build_arguments().parse_args([])
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    session = Session(options, maker, "COINUSDT linear   REPLAY", maker.parser, stream=stream)
    session.look()
    session.look()
    return stream.getvalue()


@pytest.mark.parametrize("columns", [80, 100])
def test_the_screen_fits_the_terminal_and_holds_the_key_facts(columns, monkeypatch):
    maker = warm()
    maker.exchange.send(BID, MID - 2, 1.0, ns(12_500))
    maker.hear(trades(12_700, (ASK, -3, 1)), ticker(12_700, 50_001.25), *beats(13_000, 17_700))
    size = os.terminal_size((columns, 24))
    with monkeypatch.context() as patch:  # only here: pytest asks for it too
        patch.setattr(shutil, "get_terminal_size", lambda *_: size)
        screen = look(maker, True, monkeypatch).replace("\x1b[2J\x1b[H", "")
    lines = [line.split("\x1b[K")[0] for line in screen.splitlines()]
    assert max(map(len, lines)) <= columns and len(lines) <= 24
    for fact in ("COINUSDT linear   REPLAY", "no order is ever sent", "bid 49,999.5", "0 gaps",
                 "mark 50,001.2", "1 fills", "bought 1 at 49,999.0", "Base spread", "lp", "+1 ",
                 "volatility 0.00", "net -9.00", "gross +1.00", "2023-11-14"):  # fmt: skip
        assert screen.count(fact) >= 1, fact


def test_without_a_terminal_there_is_the_title_and_then_plain_lines(monkeypatch):
    title, line = look(warm(), False, monkeypatch).splitlines()
    assert title == "COINUSDT linear   REPLAY" and "\x1b" not in line
    assert line.startswith("2023-11-14 22:13:32 UTC  mid 50000.00  quote 4999") and "lp" in line
    assert "net +0.00 USDT" in line
