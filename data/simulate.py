"""A simulated exchange: one seeded limit order market, written as a Bybit recording.

The problem. Tests, tutorials and benchmarks need hours of market data that may be copied freely,
are the same on every machine, and give a market maker the troubles of a real market: above all,
whoever lets the price come through his order has traded there. What this writes is SYNTHETIC.

The model, in the order in which a step of 100 ms runs it:

1. *News* changes what the contract is worth, by rare jumps without drift. Calm and nervous
   regimes, minutes long, follow each other.
2. *Informed traders* know news at once. They take, in slices, what rests on the way to the new
   worth: their trades come first, the price moves after them, and who rests there is run over.
3. *Noise traders* send bursts of orders, with sides that go together for long, and heavy-tailed
   sizes. They know nothing, but nobody can tell: each order moves the worth for good (see `push`).
4. *Makers* quote a best price anew only when an order has eaten it, and only within the prices just
   traded. They learn of news late: then the side in danger thins out, and one who wants a price
   beyond it takes what rests there, print by print, like everybody. Before a large order some
   leave unseen, others join. One-sided trades make best sizes smaller and spreads wider.
5. *The feed* sends what changed among the best 200 levels a side, every 100 ms, and each trade at
   once: it goes through prices which the pushed book still shows. Topics have random lags.

Units. Prices are integer ticks of 0.1 USDT, sizes integer lots of 0.001 BTC, times ms since the
epoch on the exchange and ns at the receiver; volatility is in bps (1e-4) per square root of a
second; a `side` is +1 (buy, bid) or -1 (sell, ask).

What it does not do. Nobody reacts to our quotes; makers are one crowd; there is no funding, block
trade, lost message or time of day; volume "of 24 h" only grows; prices end at 130,000 USDT.

Sources. Informed, noise and makers: Glosten and Milgrom (1985). Impact as the root of the size:
Bouchaud, Farmer and Lillo (2009). Copied signs: DAR(p) order flow (Taranto et al., 2018). Messages:
Bybit V5 documents, July 2026. Numbers: by hand, against real recordings; see README.md.
"""
import gzip
import heapq
import io
import json
import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from feed import Arguments, exit_cleanly, write_whole  # noqa: E402

import numpy as np  # noqa: E402

Line = tuple[int, str]  # receive time in ns, a message as JSON text
Order = tuple[int, int, int, int, bool]  # T ms, number, side, lots, whether it is informed
dump = json.JSONEncoder(separators=(",", ":")).encode  # as the exchange writes it: no spaces

# ---- The instrument and the feed -----------------------------------------------------
SYMBOL, TICK_SIZE, LOT_SIZE = "BTCUSDT", 0.1, 0.001  # USDT, BTC
START_MS, START_TICK = 1_767_225_600_000, 650_000  # 2026-01-01 00:00 UTC and 65,000 USDT, made up
STEP_MS, TICKER_MS, STEP_S = 100, 1000, 0.1  # from one push to the next
DEPTH, REACH, LIMIT_LOTS = 200, 1500, 40_000  # levels shown a side, within ticks; largest order
LAG_MS, JITTER_MS = 34.0, 4.0  # network: fixed part, scale of a Gamma(2) part
SPIKE_SHARE, SPIKE_MS = 0.0008, (200.0, 500.0)  # messages that are so much later

# ---- The numbers of the model --------------------------------------------------------
CALM, CALM_S = 0.25, 600.0  # volatility of news, bps per sqrt(s), and mean length of a regime, s
NERVOUS, NERVOUS_S = 1.0, 90.0  # likewise
NEWS_PER_S, NEWS_TAIL = 0.20, 10.0  # when calm; degrees of freedom of a Student law
INFORMED, SLICES, SLICE_MS = 0.45, 1.0, 150.0  # share of news traded on; more orders, mean gap
INFORMED_MS, INFORMED_LOTS, COST = 40.0, 2500.0, 5.0  # delay, median size, ticks to gain
LEARN_STEPS, SLACK, CORRECT = 2, 17.0, 0.8  # makers: delay; ticks borne; chance to take in a step
BURSTS_PER_S, MORE, MORE_MS = 0.7, 0.6, 6.0  # of noise; chance of one more order, mean gap
MEMORY, COPY, RPI_SHARE = 60, 0.85, 0.01  # signs kept; chance to copy one; of hidden retail
NOISE_LOTS, NOISE_TAIL, NOISE_REACH = 6.0, 0.82, 110  # least; Pareto exponent; ticks swept
IMPACT, DOUBT = 0.08, 0.8  # of noise: ticks of worth, times the root of its lots; most doubt
LARGE_LOTS, MOODS = 500, (0.2, 0.6, 0.2)  # orders seen coming: levels that then go, stay, double
TOXIC_S, TOXIC_LOTS, WIDE = 5.0, 20_000.0, 0.1  # one-sided trades: memory; many; ticks wider
MAKER_LOTS, MAKER_SPREAD = 50.0, 2.5  # a resting order: median size, sd of its log
TOUCH_LOTS, TOUCH_SPREAD = 6500.0, 0.6  # all of them at a best price, likewise
FRESH, FADE, NARROW = 0.7, 0.7, 0.3  # of that at first; kept in danger; chance to close a spread
TRADES_PER_S, UPDATES = 16.0, 10.0  # prints /s of all this; levels changed at random in a step


# ---- The book ------------------------------------------------------------------------
@dataclass
class Book:
    """Lots resting on each tick. Up to `bid` they are bids, from `ask` on asks."""

    rng: np.random.Generator
    maker_lots: float  # median resting order
    toxicity: float = 0.0  # lots bought less lots sold, of late; beyond 1 or -1 makers shy
    bid: int = START_TICK
    ask: int = START_TICK + 1
    lots: np.ndarray = field(default_factory=lambda: np.zeros(2 * START_TICK, np.int64))

    def __post_init__(self) -> None:
        self.lots[1:] = self.draw(np.arange(1, len(self.lots)))
        self.lots[[self.bid, self.ask]] = self.draw_touch(), self.draw_touch()

    def draw_touch(self) -> int:
        """The size that makers want to show at a best price, lots."""
        lots = TOUCH_LOTS * self.rng.lognormal(0.0, TOUCH_SPREAD)
        return 1 + int(lots / (1 + abs(self.toxicity)))

    def draw(self, ticks: np.ndarray) -> np.ndarray:
        """Sizes of levels behind the best prices: none, a crumb or an order."""
        distance = np.maximum(self.bid - ticks, ticks - self.ask)
        far = 1 - np.exp(-np.maximum(distance, 1) / 60.0)
        chance, normal = self.rng.random((2, len(ticks))), self.rng.standard_normal(len(ticks))
        is_order = chance[1] < 0.14 + 0.42 * far
        lots = np.where(is_order, 1000 * np.exp(0.7 * normal), 4 * np.exp(1.1 * normal))
        return np.where(chance[0] < 0.34 + 0.32 * far, np.maximum(lots, 1), 0).astype(int)

    def take(self, side: int, wanted: int, limit: int) -> list[tuple[int, int]]:
        """Execute a market order; return its prints (tick, lots), one for each resting order."""
        prints, tick, is_large = [], self.ask if side > 0 else self.bid, wanted > LARGE_LOTS
        while wanted > 0 and side * (limit - tick) >= 0:
            if is_large:  # makers see it coming, but some stay at the best price
                lots = int(self.lots[tick]) * int(self.rng.choice(3, p=MOODS))
                self.lots[tick] = lots if prints else max(1, lots)
            while wanted > 0 and self.lots[tick]:
                resting = 1 + int(self.maker_lots * self.rng.lognormal(0.0, MAKER_SPREAD))
                lots = min(resting, wanted, int(self.lots[tick]))
                prints.append((tick, lots))
                self.lots[tick] -= lots
                self.toxicity += side * lots / TOXIC_LOTS
                wanted -= lots
            tick += side
        return prints

    def requote(self, side: int, last: int, target: float) -> None:
        """After an order of this side, which traded up (or down) to `last`: if it ate the best
        price, makers quote anew near `target`. The other side follows it, but not as far as `last`,
        so that whatever rested on the way has traded; the side that was eaten comes back.
        """
        near, far = (self.bid, self.ask) if side > 0 else (self.ask, self.bid)
        if self.lots[far]:
            return
        while not self.lots[far]:
            far += side
        self.bid, self.ask = (near, far) if side > 0 else (far, near)
        wide = min(1 + int(self.rng.poisson(WIDE * abs(self.toxicity))), side * (last - near))
        wanted = side * round(target - side * wide / 2)
        near = max(side * near, min(wanted, side * last - wide))  # times side, as `far`
        far = min(side * far, near + wide)
        self.place(*((near, far) if side > 0 else (-far, -near)))

    def place(self, bid: int, ask: int) -> None:
        """New best prices, at or within the present ones; what they pass is drawn anew."""
        low, high = self.bid + (bid == self.bid), self.ask + (ask != self.ask)
        moved = [tick for tick in (bid, ask) if tick not in (self.bid, self.ask)]
        self.bid, self.ask = bid, ask
        self.lots[low:high] = self.draw(np.arange(low, high))
        self.lots[bid + 1:ask] = 0
        for tick in moved:
            self.lots[tick] = 1 + int(FRESH * self.draw_touch())

    def churn(self, updates: float, known: float) -> None:
        """A step of cancels and new orders. `known`: the worth, as far as makers know it."""
        rng, gap, middle = self.rng, self.ask - self.bid - 1, (self.bid + self.ask) / 2
        self.toxicity *= math.exp(-STEP_S / TOXIC_S)
        if gap and rng.random() < NARROW:  # from both sides: the mid stays
            self.place(self.bid + gap // 2, self.ask - (gap + 1) // 2)
        for side, tick in ((1, self.bid), (-1, self.ask)):
            lots = int(self.lots[tick])
            if rng.random() < 0.5:
                lots += (self.draw_touch() - lots) // 7
            if side * (middle - known) > SLACK / 2:  # this price will not hold
                lots = int(lots * FADE)
            self.lots[tick] = max(1, lots)
        distance = rng.integers(1, 330, rng.poisson(updates))
        ticks = np.where(rng.random(len(distance)) < 0.5, self.bid - distance, self.ask + distance)
        self.lots[ticks] = self.draw(ticks)

    def levels(self, side: int) -> dict[int, int]:
        """The best DEPTH levels of one side: tick to lots."""
        low, high = (self.bid - REACH, self.bid + 1) if side > 0 else (self.ask, self.ask + REACH)
        ticks = np.flatnonzero(self.lots[low:high]) + low
        ticks = ticks[-DEPTH:] if side > 0 else ticks[:DEPTH]
        return dict(zip(ticks.tolist(), self.lots[ticks].tolist()))


# ---- Those who trade -----------------------------------------------------------------
@dataclass
class Traders:
    """What the contract is worth to those who know, and the market orders still to come."""

    rng: np.random.Generator
    bursts_per_s: float  # of noise, when calm
    worth: float = START_TICK + 0.5  # ticks
    is_nervous: bool = False
    past: deque = field(default_factory=lambda: deque([START_TICK + 0.5], LEARN_STEPS))
    signs: deque = field(default_factory=lambda: deque([1, -1], MEMORY))
    pending: list[Order] = field(default_factory=list)  # a heap, by time
    count: int = 0

    def step(self, start_ms: int, middle: float, forced: int) -> None:
        """News, and the orders that one step brings about. `forced`: the side of all noise."""
        rng = self.rng
        self.past.append(self.worth)
        if rng.random() < STEP_S / (NERVOUS_S if self.is_nervous else CALM_S):
            self.is_nervous = not self.is_nervous
        nervous = NERVOUS / CALM if self.is_nervous else 1.0  # more and larger news, more noise
        error = self.past[0] - middle  # as makers see it
        if rng.random() < NEWS_PER_S * nervous * STEP_S:
            unit = rng.standard_t(NEWS_TAIL) / math.sqrt(NEWS_TAIL / (NEWS_TAIL - 2))
            jump = self.worth * 1e-4 * CALM * math.sqrt(nervous / NEWS_PER_S) * unit
            self.worth += jump
            if rng.random() < INFORMED:
                sizes = INFORMED_LOTS * rng.lognormal(size=1 + rng.poisson(SLICES))
                time_ms = start_ms + 1 + rng.exponential(INFORMED_MS)
                self.send(time_ms, 1 if jump > 0 else -1, sizes, SLICE_MS, True)
        elif abs(error) > SLACK and rng.random() < CORRECT:  # a maker wants to pass them
            time_ms, sizes = start_ms + rng.uniform(1, STEP_MS), [INFORMED_LOTS * rng.lognormal()]
            self.send(time_ms, 1 if error > 0 else -1, sizes, SLICE_MS, True)
        for _ in range(rng.poisson(self.bursts_per_s * math.sqrt(nervous) * STEP_S)):
            lag = int(len(self.signs) ** rng.random())  # mostly a recent sign
            side = self.signs[-lag] if rng.random() < COPY else int(rng.choice((1, -1)))
            self.signs.append(forced or side)
            sizes = NOISE_LOTS * (1 + rng.pareto(NOISE_TAIL, rng.geometric(1 - MORE)))
            self.send(start_ms + rng.uniform(1, STEP_MS), self.signs[-1], sizes, MORE_MS, False)

    def send(self, time_ms: float, side: int, sizes: Iterable, gap_ms: float, knows: bool) -> None:
        """Queue orders of one side, one after the other."""
        for lots in sizes:
            self.count += 1
            order = (int(time_ms), self.count, side, 1 + int(min(lots, LIMIT_LOTS)), knows)
            heapq.heappush(self.pending, order)
            time_ms += self.rng.exponential(gap_ms)


# ---- The feed ------------------------------------------------------------------------
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
    volume: float = 61_234.567  # BTC of the last 24 h, made up
    turnover: float = 3_980_246_855.5  # USDT
    shown: dict[int, dict[int, int]] = field(default_factory=dict)  # by side
    ticker: dict[str, str] = field(default_factory=dict)
    arriving: list[tuple[int, int, str]] = field(default_factory=list)  # a heap
    newest: dict[str, int] = field(default_factory=dict)  # topic to receive time, ns
    count: int = 0

    def send(self, time_ms: int, topic: str, kind: str, data: object, **more: int) -> None:
        """One message leaves the exchange; a topic's messages stay in order."""
        message = {"topic": f"{topic}.{SYMBOL}", "type": kind,
                   "ts": time_ms + int(self.rng.integers(1, 5)), "data": data, **more}
        lag_ms = LAG_MS + JITTER_MS * self.rng.standard_gamma(2.0)
        if self.rng.random() < SPIKE_SHARE:
            lag_ms += self.rng.uniform(*SPIKE_MS)
        recv_ns = time_ms * 1_000_000 + int(lag_ms * 1000) * 1000
        recv_ns = self.newest[topic] = max(recv_ns, self.newest.get(topic, 0))
        self.count += 1
        heapq.heappush(self.arriving, (recv_ns, self.count, dump(message)))

    def received(self, before_ns: float) -> Iterator[Line]:
        """What arrives before a time after which nothing earlier can come."""
        while self.arriving and self.arriving[0][0] < before_ns:
            yield heapq.heappop(self.arriving)[::2]  # without the count

    def send_book(self, cts: int, book: Book) -> None:
        """A snapshot at first, then what has changed, if anything has."""
        kind, rows = "delta" if self.shown else "snapshot", {}
        for side in (1, -1):
            old, new = self.shown.get(side, {}), book.levels(side)
            changed = dict.fromkeys(old.keys() - new.keys(), 0) | dict(new.items() - old.items())
            rows[side] = [[price_text(tick), size_text(changed[tick])]
                          for tick in sorted(changed, reverse=side > 0)]
            self.shown[side] = new
        if rows[1] or rows[-1]:
            self.seq, self.update_id = self.seq + 1, self.update_id + 1
            data = {"s": SYMBOL, "b": rows[1], "a": rows[-1], "u": self.update_id, "seq": self.seq}
            self.send(cts, f"orderbook.{DEPTH}", kind, data, cts=cts)

    def trade(self, time_ms: int, side: int, tick: int, lots: int, rpi: bool) -> dict:
        """One print, as it stands in the data of a trade message."""
        sign, same = np.sign(tick - self.last_tick), "Zero" + self.direction.removeprefix("Zero")
        self.direction = (same, "PlusTick", "MinusTick")[sign]
        self.last_tick, self.trade_id = tick, self.trade_id + 1
        self.volume += lots * LOT_SIZE
        self.turnover += lots * LOT_SIZE * tick * TICK_SIZE
        return {"T": time_ms, "s": SYMBOL, "S": "Buy" if side > 0 else "Sell",
                "v": size_text(lots), "p": price_text(tick), "L": self.direction,
                "i": f"00000000-0000-4000-8000-{self.trade_id:012x}", "BT": False,
                "RPI": rpi, "seq": self.seq}

    def send_ticker(self, time_ms: int, book: Book) -> None:
        """A snapshot at first, then the fields that have changed."""
        middle, basis = (book.bid + book.ask) / 2 * TICK_SIZE, 3 + 0.4 * math.sin(time_ms / 9e4)
        now = dict(
            lastPrice=price_text(self.last_tick), markPrice=f"{middle + basis:.2f}",
            indexPrice=f"{middle + 23:.2f}", fundingRate="0.0001", fundingIntervalHour="8",
            turnover24h=f"{self.turnover:.4f}", volume24h=f"{self.volume:.4f}",
            openInterest="59891.732", nextFundingTime=str((time_ms // 28_800_000 + 1) * 28_800_000),
            bid1Price=price_text(book.bid), bid1Size=size_text(book.lots[book.bid]),
            ask1Price=price_text(book.ask), ask1Size=size_text(book.lots[book.ask]))
        changed = {key: text for key, text in now.items() if self.ticker.get(key) != text}
        kind, self.ticker = "delta" if self.ticker else "snapshot", now
        self.send(time_ms, "tickers", kind, changed | {"symbol": SYMBOL}, cs=self.seq)


# ---- The market ----------------------------------------------------------------------
def simulate(rng: np.random.Generator, hours: float, trades_per_s: float = TRADES_PER_S,
             updates_per_delta: float = UPDATES, push: tuple = (0, 0, 0)) -> Iterator[Line]:
    """Yield (receive time in ns, raw message); the same state of `rng` gives the same lines.

    `trades_per_s`: prints per second, roughly, over hours. `updates_per_delta`: levels changed at
    random in 100 ms; moves of the best prices come on top. `push`: (from s, to s, side) in which
    all noise is of this side, to see what that does to the price. Memory is constant.
    """
    density = trades_per_s / TRADES_PER_S
    book, feed = Book(rng, MAKER_LOTS / density), Feed(rng)
    traders = Traders(rng, BURSTS_PER_S * density)
    for step in range(round(hours * 3_600_000 / STEP_MS)):
        start, cts = START_MS + step * STEP_MS, START_MS + (step + 1) * STEP_MS
        forced = push[2] if push[0] <= step * STEP_S < push[1] else 0
        traders.step(start, (book.bid + book.ask) / 2, forced)
        match(traders, cts, book, feed)
        book.churn(updates_per_delta, traders.past[0])
        feed.send_book(cts, book)
        if step * STEP_MS % TICKER_MS == 0:
            feed.send_ticker(cts, book)
        yield from feed.received(cts * 1_000_000)
    yield from feed.received(math.inf)


def match(traders: Traders, end_ms: int, book: Book, feed: Feed) -> None:
    """Execute the orders that are due; send their prints, a message for each ms."""
    prints: dict[int, list[dict]] = {}
    while traders.pending and traders.pending[0][0] < end_ms:
        time_ms, _, side, lots, informed = heapq.heappop(traders.pending)
        best = book.ask if side > 0 else book.bid
        gain = side * (traders.worth - best) - COST if informed else NOISE_REACH
        if gain < 0:  # those who know go only as far as it pays
            continue
        feed.seq += 1
        rpi = not informed and lots < LARGE_LOTS and book.rng.random() < RPI_SHARE
        taken = [(best, lots)] if rpi else book.take(side, lots, best + side * int(gain))
        prints.setdefault(time_ms, []).extend(feed.trade(time_ms, side, *one, rpi) for one in taken)
        if not informed:
            traders.worth += side * IMPACT * math.sqrt(sum(lots for _, lots in taken))
        doubt = DOUBT * book.rng.random()  # makers ask whether that was informed
        book.requote(side, taken[-1][0], (1 - doubt) * taken[-1][0] + doubt * traders.past[0])
    for time_ms, group in prints.items():
        feed.send(time_ms, "publicTrade", "snapshot", group)


# ---- The file ------------------------------------------------------------------------
def record(path: Path, lines: Iterator[Line]) -> None:
    """Write a recording, the same bytes every time."""
    start = {"op": "local", "event": "start", "symbol": SYMBOL, "category": "linear",
             "tick_size": str(TICK_SIZE), "lot_size": str(LOT_SIZE), "synthetic": True}

    def write(draft: Path) -> None:
        with open(draft, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed, \
                io.TextIOWrapper(packed, "ascii", newline="\n") as out:
            for recv_ns, text in chain([(START_MS * 1_000_000, dump(start))], lines):
                out.write(f"{recv_ns} {text}\n")
            out.write(f"{recv_ns} {dump({'op': 'local', 'event': 'end'})}\n")

    write_whole(path, write)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Arguments(prog="simulate.py", description="Write a SYNTHETIC Bybit recording.")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="file to write (.jsonl.gz)")
    add("--hours", type=float, default=2.0, help="length, hours (2)")
    add("--seed", type=int, default=1, help="same seed, same bytes (1)")
    add("--trades-per-s", type=float, default=TRADES_PER_S, help="prints, roughly (16)")
    add("--updates-per-delta", type=float, default=UPDATES, help="at random (10)")
    add("--force", action="store_true", help="replace an existing file")
    args = parser.parse_args(arguments)
    if args.out.exists() and not args.force:
        parser.error(f"{args.out} exists; name another file or add --force")
    for name, low, high in (("hours", 1e-3, 1e5), ("seed", 0, 2**53), ("trades_per_s", 1e-3, 1e4),
                            ("updates_per_delta", 0, 1000)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"{name} = {getattr(args, name):g} must lie in {low:g} to {high:g}")
    market = np.random.default_rng(args.seed), args.hours, args.trades_per_s, args.updates_per_delta
    return exit_cleanly(lambda: record(args.out, simulate(*market)))


if __name__ == "__main__":
    sys.exit(main())
