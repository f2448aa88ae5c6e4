"""A simulated exchange: one seeded limit order market, written as a Bybit recording.

The problem. Tests, tutorials and benchmarks need hours of market data that may be copied freely,
are the same on every machine, and give a market maker the troubles of a real market: above all,
whoever lets a price come through his order has traded there. What this writes is SYNTHETIC.

The model, in the order in which a step of 100 ms runs it:

1. *Volatility* switches between a calm and a nervous regime, at random times minutes apart, and
   wanders a little within each.
2. *News* changes what the contract is worth, by rare jumps, fat-tailed and without drift.
3. *Informed traders* know it at once. They take in slices what rests on the way to the new worth:
   whoever rests there is run over, and their trades come before the price has moved.
4. *Noise traders* come in self-exciting bursts, their sides correlated over many trades, their
   sizes heavy-tailed. They know nothing, but nobody can tell: each lot moves the worth a little,
   for good. Selling for 300 s brings the price down and it stays down: see `push`.
5. *Makers* learn of news a second later. A best price changes only when an order has eaten it:
   then they quote anew, within the prices just traded and never beyond. Whoever of them wants a
   price further off must take what rests before it, print by print, like everybody. What they
   can do is to leave: a large order meets less than was shown, a side in danger gets thinner,
   and one-sided trades make the best sizes smaller and the spread wider.
6. *The feed* sends what changed among the best 200 levels a side, every 100 ms, and each trade at
   once, so that trades between two pushes go through prices which the pushed book still shows.
   The network delays every topic by its own random lag.

Units. Prices are integer ticks of 0.1 USDT and sizes integer lots of 0.001 BTC; times are ms
since the epoch on the exchange and ns at the receiver; volatility is in bps per square root of a
second (1 bp = 1e-4); a `side` is +1 (buy, bid) or -1 (sell, ask).

What it does not do. No strategy is simulated and nobody reacts to our quotes. There is no
funding, block trade, lost message or time of day. Makers are one crowd, not agents. Volume and
turnover "of 24 h" only grow. README.md compares it with real recordings.

Sources. Informed, noise and makers: Glosten and Milgrom (1985); impact linear in the lots: Kyle
(1985). Bursts: a Hawkes process (Bacry, Mastromatteo and Muzy, 2015). Copied signs: DAR(p) order
flow (Taranto et al., 2018). Messages: Bybit V5 docs, July 2026. Numbers: by hand, see README.md.
"""
import argparse
import gzip
import heapq
import io
import json
import math
import os
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

Line = tuple[int, str]  # receive time in ns, a message as JSON text
Order = tuple[int, int, int, int, bool]  # T ms, number, side, lots, whether it is informed
Push = tuple[float, float, int]  # from and to which second, and which side, all noise goes

# ---- The instrument ----------------------------------------------------------------
SYMBOL = "BTCUSDT"
TICK_SIZE, LOT_SIZE = 0.1, 0.001  # USDT, BTC
START_MS = 1_767_225_600_000  # 2026-01-01 00:00:00 UTC, a made-up date
START_TICK = 650_000  # 65,000 USDT
STEP_MS, TICKER_MS = 100, 1000  # from one push to the next
STEP_S = STEP_MS / 1000
DEPTH = 200  # levels a side in the feed
LADDER, REACH = 1 << 14, 1500  # ticks in memory; searched for the levels

# ---- The numbers of the model ------------------------------------------------------
CALM, NERVOUS = 0.34, 0.85  # volatility of news, bps per sqrt(s)
CALM_S, NERVOUS_S = 420.0, 150.0  # mean length of a regime, s
WANDER, WANDER_S = 0.30, 45.0  # its log, within a regime: sd, memory in s
NEWS_PER_S, NEWS_TAIL = 0.5, 4.0  # when calm; degrees of freedom of a Student law
INFORMED, SLICES, SLICE_MS = 0.5, 1.0, 250.0  # share of news traded on; orders after the first
INFORMED_MS, INFORMED_LOTS = 40.0, 2500.0  # delay of the first; median size
COST, HASTE = 4.0, (0.5, 1.0)  # ticks an informed order must gain; its way to the worth
LEARN_STEPS, SLACK, CORRECT = 10, 12.0, 0.15  # makers: delay; ticks borne; chance in a step
TRADES_PER_S, UPDATES = 14.0, 8.0  # prints /s; levels changed at random in a step
BURSTS_PER_S = 1.2  # of noise, at that many prints
EXCITE, EXCITE_S = 0.55, 4.0  # children of a noise burst; their mean delay, s
MORE, MORE_MS = 0.60, 6.0  # chance of one more order in a burst; mean gap
MEMORY, COPY = 60, 0.85  # signs remembered; chance to copy one of them
NOISE_LOTS, NOISE_TAIL = 6.0, 0.86  # a noise order: least size, Pareto exponent
NOISE_MOST, NOISE_REACH = 40_000, 150  # its largest size, lots, and sweep, ticks
IMPACT = 0.003  # ticks by which a lot of noise moves the worth
RPI_SHARE = 0.01  # noise orders that meet hidden retail liquidity
LARGE_LOTS, SHY = 500, 0.6  # orders that makers shy away from; most of it that goes
PRESSURE_S, TOXIC_LOTS, WIDE = 5.0, 20_000.0, 0.1  # memory of flow; what makes it toxic
MAKER_LOTS, MAKER_SPREAD = 12.0, 2.15  # a resting order: median size, sd of its log
TOUCH_LOTS, TOUCH_SPREAD = 6000.0, 0.6  # all of them at a best price, likewise
FRESH, FADE = 0.4, 0.8  # of it there at first; left in a step of a side in danger
LAG_MS, JITTER_MS = 34.0, 4.0  # network: fixed part, scale of a Gamma(2) part
SPIKE_SHARE, SPIKE_MS = 0.0008, (200.0, 500.0)  # messages that are so much later


# ---- The book ----------------------------------------------------------------------
@dataclass
class Book:
    """Lots resting on each tick. Up to `bid` they are bids, from `ask` on asks."""

    rng: np.random.Generator
    maker_lots: float = MAKER_LOTS  # median resting order
    pressure: float = 0.0  # lots bought less lots sold, of late
    lots: np.ndarray = field(default_factory=lambda: np.zeros(LADDER, np.int64))
    origin: int = START_TICK - LADDER // 2  # tick of lots[0]
    bid: int = START_TICK
    ask: int = START_TICK + 1

    def __post_init__(self) -> None:
        """Both sides full, with the best prices at the start."""
        self.fill(self.origin, self.origin + LADDER)
        for tick in (self.bid, self.ask):
            self.lots[tick - self.origin] = self.draw_touch()

    @property
    def middle(self) -> float:
        """The mid, ticks."""
        return (self.bid + self.ask) / 2

    @property
    def toxicity(self) -> float:
        """How one-sided trades have been of late: 0 not at all, 1 enough for makers to shy."""
        return abs(self.pressure) / TOXIC_LOTS

    def draw_touch(self) -> int:
        """The size that makers want to show at a best price, lots."""
        mean = TOUCH_LOTS / (1 + self.toxicity)
        return 1 + int(mean * math.exp(TOUCH_SPREAD * self.rng.standard_normal()))

    def fill(self, low: int, high: int) -> None:
        """Draw new resting sizes for the ticks low <= tick < high."""
        ticks = np.arange(low, high)
        distance = np.maximum(self.bid - ticks, ticks - self.ask)
        self.lots[low - self.origin:high - self.origin] = draw_lots(self.rng, distance)

    def take(self, side: int, wanted: int, limit: int) -> list[tuple[int, int]]:
        """Execute a market order; return its prints (tick, lots) in order of price."""
        prints, tick = [], self.ask if side > 0 else self.bid
        if wanted > LARGE_LOTS:  # makers see it coming and leave, but at no price all of them
            low, high = min(tick, limit) - self.origin, max(tick, limit) - self.origin
            part = self.lots[low:high + 1]
            part[:] = np.ceil(part * (1 - SHY * self.rng.random()))
        while wanted > 0 and side * (limit - tick) >= 0:
            taken = min(int(self.lots[tick - self.origin]), wanted)
            prints += [(tick, lots) for lots in cut(self.rng, taken, self.maker_lots)]
            self.lots[tick - self.origin] -= taken
            self.pressure += side * taken
            wanted -= taken
            tick += side
        return prints

    def requote(self, side: int, last: int, target: float) -> None:
        """An order of this side has traded up (or down) to `last`. If it ate the best price,
        makers quote anew near `target`: the other side follows, at most to where it would meet
        `last`, so that all that rested on its way has traded; the eaten side comes back.
        """
        near, far = (self.bid, self.ask) if side > 0 else (self.ask, self.bid)
        if self.lots[far - self.origin]:
            return
        while not self.lots[far - self.origin]:
            far += side
        self.bid, self.ask = (near, far) if side > 0 else (far, near)
        wide = 1 + int(self.rng.poisson(WIDE * self.toxicity))
        wanted = side * round(target - side * wide / 2)
        near = max(side * near, min(wanted, side * last - 1))
        far = min(side * far, near + wide)
        self.place(*((near, far) if side > 0 else (-far, -near)))

    def place(self, bid: int, ask: int) -> None:
        """New best prices, at or within the present ones; what they pass is drawn anew."""
        low, high = self.bid + (bid == self.bid), self.ask + (ask != self.ask)
        moved = [tick for tick in (bid, ask) if tick not in (self.bid, self.ask)]
        self.bid, self.ask = bid, ask
        self.fill(low, high)
        self.lots[bid + 1 - self.origin:ask - self.origin] = 0
        for tick in moved:
            self.lots[tick - self.origin] = 1 + int(FRESH * self.draw_touch())
        shift = bid - self.origin - LADDER // 2
        if abs(shift) > LADDER // 2 - 2 * REACH:  # re-centre the ladder
            self.lots, self.origin = np.roll(self.lots, -shift), self.origin + shift
            new = (LADDER - shift, LADDER) if shift > 0 else (0, -shift)
            self.fill(self.origin + new[0], self.origin + new[1])

    def churn(self, updates: float, known: float) -> None:
        """A step of cancels and new orders: at the best prices, and anywhere in the window.
        `known`: what makers think the contract is worth.
        """
        self.pressure *= math.exp(-STEP_S / PRESSURE_S)
        rng, gap = self.rng, self.ask - self.bid - 1
        if gap and rng.random() < 0.3:  # a wide spread closes from both sides: its mid stays
            self.place(self.bid + gap // 2, self.ask - (gap + 1) // 2)
        for side, tick in ((1, self.bid), (-1, self.ask)):
            lots = int(self.lots[tick - self.origin])
            if rng.random() < 0.5:
                lots += (self.draw_touch() - lots) // 7
            if side * (self.middle - known) > SLACK / 2:  # this price will not hold
                lots = int(lots * FADE)
            self.lots[tick - self.origin] = max(1, lots)
        distance = rng.integers(1, 330, rng.poisson(updates))
        below = rng.random(distance.size) < 0.5
        ticks = np.where(below, self.bid - distance, self.ask + distance)
        self.lots[ticks - self.origin] = draw_lots(rng, distance)

    def levels(self, side: int) -> dict[int, int]:
        """The best DEPTH levels of one side: tick to lots."""
        best = (self.bid if side > 0 else self.ask) - self.origin
        start, stop = (best - REACH, best + 1) if side > 0 else (best, best + REACH)
        held = np.flatnonzero(self.lots[start:stop]) + start
        held = held[-DEPTH:] if side > 0 else held[:DEPTH]
        return dict(zip((held + self.origin).tolist(), self.lots[held].tolist()))


def draw_lots(rng: np.random.Generator, distance: np.ndarray) -> np.ndarray:
    """Sizes of levels `distance` ticks behind the best: none, a crumb or an order."""
    far = 1 - np.exp(-np.maximum(distance, 1) / 60.0)
    chance, normal = rng.random((2, distance.size)), rng.standard_normal(distance.size)
    big = chance[1] < 0.14 + 0.42 * far
    lots = np.where(big, 1000 * np.exp(0.7 * normal), 4 * np.exp(1.1 * normal))
    return np.where(chance[0] < 0.34 + 0.32 * far, np.maximum(lots, 1), 0).astype(int)


def cut(rng: np.random.Generator, lots: int, median: float) -> Iterator[int]:
    """The resting orders that make up `lots`: each is a print of its own."""
    while lots > 0:
        piece = min(lots, 1 + int(median * math.exp(MAKER_SPREAD * rng.standard_normal())))
        lots -= piece
        yield piece


# ---- What it is worth --------------------------------------------------------------
@dataclass
class Worth:
    """What the contract is worth to those who know, and how fast that changes."""

    rng: np.random.Generator
    price: float = START_TICK + 0.5  # ticks
    nervous: bool = False
    wander: float = 0.0  # log of the volatility's excess over its regime
    past: deque = field(default_factory=lambda: deque([START_TICK + 0.5], LEARN_STEPS))

    @property
    def known(self) -> float:
        """What the makers know of it: how it was a while ago."""
        return self.past[0]

    @property
    def volatility(self) -> float:
        """Standard deviation of one second's news, bps."""
        return (NERVOUS if self.nervous else CALM) * math.exp(self.wander)

    def step(self) -> float:
        """Advance; return the jump of this step in ticks (mostly 0)."""
        self.past.append(self.price)
        if self.rng.random() < STEP_S / (NERVOUS_S if self.nervous else CALM_S):
            self.nervous = not self.nervous
        memory = math.exp(-STEP_S / WANDER_S)
        noise = WANDER * math.sqrt(1 - memory * memory)
        self.wander = memory * self.wander + noise * self.rng.standard_normal()
        rate = NEWS_PER_S * self.volatility / CALM  # nervous: more and larger jumps
        if self.rng.random() >= rate * STEP_S:
            return 0.0
        unit = self.rng.standard_t(NEWS_TAIL) / math.sqrt(NEWS_TAIL / (NEWS_TAIL - 2))
        jump = self.price * 1e-4 * self.volatility / math.sqrt(rate) * unit
        self.price += jump
        return jump


# ---- Those who trade ---------------------------------------------------------------
@dataclass
class Traders:
    """The market orders that are still to come, of those who know and of the others."""

    rng: np.random.Generator
    bursts_per_s: float  # of noise, children included
    excitement: float = 0.0  # bursts per second above the constant rate
    signs: deque = field(default_factory=lambda: deque([1, -1], MEMORY))
    pending: list[Order] = field(default_factory=list)  # a heap, by time
    count: int = 0

    def send(self, time_ms: float, side: int, lots: float, informed: bool) -> None:
        """Queue one order for its time."""
        self.count += 1
        order = (int(time_ms), self.count, side, 1 + int(min(lots, NOISE_MOST)), informed)
        heapq.heappush(self.pending, order)

    def inform(self, time_ms: float, side: int, slices: int) -> None:
        """Orders of those who know what it is worth, one after the other."""
        for _ in range(slices):
            lots = INFORMED_LOTS * math.exp(self.rng.standard_normal())
            self.send(time_ms, side, lots, True)
            time_ms += self.rng.exponential(SLICE_MS)

    def act(self, start_ms: int, jump: float, error: float, nervous: float, forced: int) -> None:
        """Send the orders that one step brings about. `error`: how far the mid is from what
        makers know, ticks; `forced`: the side of all noise, 0 for its own.
        """
        rng = self.rng
        if jump and rng.random() < INFORMED:
            delay = 1 + rng.exponential(INFORMED_MS)
            self.inform(start_ms + delay, 1 if jump > 0 else -1, 1 + rng.poisson(SLICES))
        elif abs(error) > SLACK and rng.random() < CORRECT:  # a maker who wants to pass them
            self.inform(start_ms + rng.uniform(1, STEP_MS), 1 if error > 0 else -1, 1)
        rate = self.bursts_per_s * (1 - EXCITE) * math.sqrt(nervous) + self.excitement
        born = rng.poisson(rate * STEP_S)
        self.excitement *= math.exp(-STEP_S / EXCITE_S)
        self.excitement += born * EXCITE / EXCITE_S
        for _ in range(born):
            self.burst(start_ms + rng.uniform(1, STEP_MS), forced)

    def burst(self, time_ms: float, forced: int) -> None:
        """Noise orders of one side, milliseconds apart."""
        rng = self.rng
        lag = int(len(self.signs) ** rng.random())  # mostly a recent sign
        side = self.signs[-lag] if rng.random() < COPY else int(rng.choice((1, -1)))
        self.signs.append(forced or side)
        more = True
        while more:
            self.send(time_ms, forced or side, NOISE_LOTS * (1 + rng.pareto(NOISE_TAIL)), False)
            time_ms += rng.exponential(MORE_MS)
            more = rng.random() < MORE

    def due(self, end_ms: int) -> Iterator[Order]:
        """The orders that match before `end_ms`, in order of time."""
        while self.pending and self.pending[0][0] < end_ms:
            yield heapq.heappop(self.pending)


# ---- The feed ----------------------------------------------------------------------
def dump(message: dict) -> str:
    """JSON as the exchange writes it: no spaces."""
    return json.dumps(message, separators=(",", ":"))


def price_text(tick: int) -> str:
    """650001 -> '65000.10'."""
    return f"{tick // 10}.{tick % 10}0"


def size_text(lots: int) -> str:
    """1234 -> '1.234', and 0 -> '0', which deletes a level."""
    return f"{lots * LOT_SIZE:.3f}" if lots else "0"


@dataclass
class Feed:
    """Turns what happened into messages, and these into lines that arrive later."""

    rng: np.random.Generator
    seq: int = 90_000_000_000
    update_id: int = 5_000_000
    trade_id: int = 0
    last_tick: int = START_TICK
    direction: str = "ZeroPlusTick"
    volume: float = 61_234.567          # BTC of the last 24 h, made up
    turnover: float = 3_980_246_855.5   # USDT
    shown: dict[int, dict[int, int]] = field(default_factory=dict)  # by side
    ticker: dict[str, str] = field(default_factory=dict)
    arriving: list[tuple[int, int, str]] = field(default_factory=list)      # a heap
    newest: dict[str, int] = field(default_factory=dict)    # topic to receive time, ns
    count: int = 0

    def send(self, time_ms: int, message: dict) -> None:
        """One message leaves the exchange; a topic's messages stay in order."""
        lag_ms = LAG_MS + JITTER_MS * self.rng.standard_gamma(2.0)
        if self.rng.random() < SPIKE_SHARE:
            lag_ms += self.rng.uniform(*SPIKE_MS)
        topic = message["topic"]
        recv_ns = time_ms * 1_000_000 + int(lag_ms * 1000) * 1000
        recv_ns = self.newest[topic] = max(recv_ns, self.newest.get(topic, 0))
        self.count += 1
        heapq.heappush(self.arriving, (recv_ns, self.count, dump(message)))

    def received(self, before_ns: float) -> Iterator[Line]:
        """What arrives before a time after which nothing earlier can come."""
        while self.arriving and self.arriving[0][0] < before_ns:
            recv_ns, _, text = heapq.heappop(self.arriving)
            yield recv_ns, text

    def send_book(self, cts: int, book: Book) -> None:
        """A snapshot at first, then what has changed, if anything has."""
        kind, rows = "delta" if self.shown else "snapshot", {}
        for side in (1, -1):
            old, new = self.shown.get(side, {}), book.levels(side)
            changed = dict.fromkeys(old.keys() - new.keys(), 0)
            changed.update(new.items() - old.items())
            rows[side] = [[price_text(tick), size_text(changed[tick])]
                          for tick in sorted(changed, reverse=side > 0)]
            self.shown[side] = new
        if rows[1] or rows[-1]:
            self.seq += 1
            self.update_id += 1
            self.send(cts, {
                "topic": f"orderbook.{DEPTH}.{SYMBOL}", "type": kind,
                "ts": cts + int(self.rng.integers(1, 5)),
                "data": {"s": SYMBOL, "b": rows[1], "a": rows[-1], "u": self.update_id,
                         "seq": self.seq},
                "cts": cts})

    def trade(self, time_ms: int, side: int, tick: int, lots: int, rpi: bool) -> dict:
        """One print, as it stands in the data of a trade message."""
        if tick != self.last_tick:
            self.direction = "PlusTick" if tick > self.last_tick else "MinusTick"
        elif not self.direction.startswith("Zero"):
            self.direction = "Zero" + self.direction
        self.last_tick = tick
        self.trade_id += 1
        self.volume += lots * LOT_SIZE
        self.turnover += lots * LOT_SIZE * tick * TICK_SIZE
        return {"T": time_ms, "s": SYMBOL, "S": "Buy" if side > 0 else "Sell",
                "v": size_text(lots), "p": price_text(tick), "L": self.direction,
                "i": f"00000000-0000-4000-8000-{self.trade_id:012x}", "BT": False,
                "RPI": rpi, "seq": self.seq}

    def send_trades(self, prints: list[dict]) -> None:
        """All prints of one matching millisecond."""
        time_ms = prints[0]["T"]
        ts = time_ms + int(self.rng.integers(1, 4))
        self.send(time_ms, {"topic": f"publicTrade.{SYMBOL}", "type": "snapshot",
                            "ts": ts, "data": prints})

    def send_ticker(self, time_ms: int, book: Book) -> None:
        """A snapshot at first, then the fields that have changed."""
        middle = (book.bid + book.ask) / 2 * TICK_SIZE
        basis = 3.0 + 0.4 * math.sin(time_ms / 90_000)      # USDT, of the mark price
        now = {
            "symbol": SYMBOL, "lastPrice": price_text(self.last_tick),
            "markPrice": f"{middle + basis:.2f}", "indexPrice": f"{middle + 23:.2f}",
            "openInterest": "59891.732", "turnover24h": f"{self.turnover:.4f}",
            "volume24h": f"{self.volume:.4f}", "fundingIntervalHour": "8",
            "nextFundingTime": str((time_ms // 28_800_000 + 1) * 28_800_000),
            "fundingRate": "0.0001", "bid1Price": price_text(book.bid),
            "bid1Size": size_text(book.lots[book.bid - book.origin]),
            "ask1Price": price_text(book.ask),
            "ask1Size": size_text(book.lots[book.ask - book.origin])}
        data = {key: text for key, text in now.items()
                if key == "symbol" or self.ticker.get(key) != text}
        kind, self.ticker = "delta" if self.ticker else "snapshot", now
        self.send(time_ms, {"topic": f"tickers.{SYMBOL}", "type": kind, "data": data,
                            "cs": self.seq, "ts": time_ms})


# ---- The market --------------------------------------------------------------------
def simulate(rng: np.random.Generator, hours: float, trades_per_s: float = TRADES_PER_S,
             updates_per_delta: float = UPDATES, push: Push = (0, 0, 0)) -> Iterator[Line]:
    """Yield (receive time in ns, raw message) for `hours` of the simulated market.

    `trades_per_s`: prints per second, roughly, over hours. `updates_per_delta`: levels changed at
    random in 100 ms; moves of the best prices come on top (about as many again). `push`: between
    two seconds all noise trades on one side, to see its impact. Memory is constant; the same
    state of `rng` gives the same lines.
    """
    density = trades_per_s / TRADES_PER_S
    book, worth, feed = Book(rng, MAKER_LOTS / density), Worth(rng), Feed(rng)
    traders = Traders(rng, BURSTS_PER_S * density)
    for step in range(round(hours * 3_600_000 / STEP_MS)):
        start, cts = START_MS + step * STEP_MS, START_MS + (step + 1) * STEP_MS
        jump, error = worth.step(), worth.known - book.middle
        forced = push[2] if push[0] <= step * STEP_S < push[1] else 0
        traders.act(start, jump, error, worth.volatility / CALM, forced)
        match(traders.due(cts), book, worth, feed)
        book.churn(updates_per_delta, worth.known)
        feed.send_book(cts, book)
        if step * STEP_MS % TICKER_MS == 0:
            feed.send_ticker(cts, book)
        yield from feed.received(cts * 1_000_000)
    yield from feed.received(math.inf)


def match(orders: Iterator[Order], book: Book, worth: Worth, feed: Feed) -> None:
    """Execute orders against the book; send their prints, a message for each ms."""
    prints: list[dict] = []
    for time_ms, _, side, lots, informed in orders:
        if prints and prints[0]["T"] != time_ms:
            feed.send_trades(prints)
            prints = []
        best = book.ask if side > 0 else book.bid
        limit = best + side * NOISE_REACH
        if informed:  # only as far as it pays
            gain = side * (worth.price - best) - COST
            if gain < 0:
                continue
            limit = best + side * int(gain * book.rng.uniform(*HASTE))
        feed.seq += 1
        rpi = not informed and lots < LARGE_LOTS and book.rng.random() < RPI_SHARE
        taken = [(best, lots)] if rpi else book.take(side, lots, limit)
        prints += [feed.trade(time_ms, side, *one, rpi) for one in taken]
        if not informed:
            worth.price += side * IMPACT * sum(lots for _, lots in taken)
        last, trust = taken[-1][0], book.rng.random()  # makers half believe the trade
        book.requote(side, last, last + trust * (worth.price - last))
    if prints:
        feed.send_trades(prints)


# ---- The file ----------------------------------------------------------------------
def record(path: str, lines: Iterator[Line]) -> None:
    """Write a recording: to a temporary name first, and the same bytes every time."""
    start = {"op": "local", "event": "start", "symbol": SYMBOL, "category": "linear",
             "tick_size": str(TICK_SIZE), "lot_size": str(LOT_SIZE), "synthetic": True}
    recv_ns, part = START_MS * 1_000_000, f"{path}.part"
    with open(part, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed, \
            io.TextIOWrapper(packed, "ascii", newline="\n") as out:
        out.write(f"{recv_ns} {dump(start)}\n")
        for recv_ns, text in lines:
            out.write(f"{recv_ns} {text}\n")
        out.write(f"{recv_ns} {dump({'op': 'local', 'event': 'end'})}\n")
    os.replace(part, path)


def complaint(args: argparse.Namespace) -> str | None:
    """What is wrong with the command line, with the remedy; None if nothing is."""
    if os.path.exists(args.out) and not args.force:
        return f"{args.out} exists; name another file or add --force"
    if not os.path.isdir(os.path.dirname(args.out) or "."):
        return f"no folder for {args.out}; create it first"
    for name in ("hours", "trades_per_s"):
        if not 0 < getattr(args, name) < math.inf:
            flag = "--" + name.replace("_", "-")
            return f"{flag} is {getattr(args, name)}; it must be above 0"
    if args.seed < 0:
        return f"--seed is {args.seed}; it must not be negative"
    if not 0 <= args.updates_per_delta <= 1000:
        return f"--updates-per-delta is {args.updates_per_delta}; give 0 to 1000"
    return None


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write a SYNTHETIC Bybit recording.")
    parser.add_argument("--out", required=True, help="file to write (.jsonl.gz)")
    parser.add_argument("--hours", type=float, default=2.0, help="length, hours (2)")
    parser.add_argument("--seed", type=int, default=1, help="same seed, same bytes (1)")
    parser.add_argument("--trades-per-s", type=float, default=TRADES_PER_S,
                        help="prints per second, roughly (14)")
    parser.add_argument("--updates-per-delta", type=float, default=UPDATES,
                        help="levels changed at random in 100 ms (8)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    args = parser.parse_args(arguments)
    problem = complaint(args)
    if problem:
        print(f"simulate.py: {problem}", file=sys.stderr)
        return 2
    record(args.out, simulate(np.random.default_rng(args.seed), args.hours,
                              args.trades_per_s, args.updates_per_delta))
    return 0


if __name__ == "__main__":
    sys.exit(main())
