"""Markets told by hand or drawn by lot, in Bybit's words.

The coin has a tick of 0.5 USDT and a lot of 0.125. Most sizes are sums of powers of two,
so that results which should be equal are equal to the last bit. Prices are told in ticks
from MID, times in ms from START_MS.
"""

import gzip
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import feed
from feed import ASK, BID, DELTA, MS, SIDES, SNAPSHOT

COIN = feed.Instrument("COINUSDT", "linear", "0.5", "0.125", 0.125)
MID = 100_000  # ticks; one tick is 0.1 bps
START_MS = 1_700_000_000_000  # a whole second
BIDS, ASKS = {-1: 5, -2: 4, -3: 5}, {1: 5, 2: 4, 3: 5}
WALL, FAR = {-1: 5, -4: 2, -9: 9}, {1: 5, 4: 2, 9: 9}  # our quotes stand at 4 ticks, behind 2


# ---- Told by hand ------------------------------------------------------------------


class Line(NamedTuple):
    """What the exchange sends, or we note, and when it is received."""

    recv_ns: int
    message: dict


def ns(ms: int) -> int:
    return (START_MS + ms) * MS


def price(x: int) -> str:
    return str((MID + x) * COIN.tick_size)


def line(ms, topic, data, heard=None, kind="delta") -> Line:
    """A message of exchange time ms, received at `heard` (the same unless given)."""
    times = dict(ts=START_MS + ms, cts=START_MS + ms)
    message = dict(topic=f"{topic}.COINUSDT", type=kind, data=data, **times)
    return Line(ns(ms if heard is None else heard), message)


def delta(ms, bids=None, asks=None, heard=None, kind=DELTA) -> Line:
    """A book message with rows {ticks from MID: size}."""
    b, a = ([[price(x), str(size)] for x, size in (rows or {}).items()] for rows in (bids, asks))
    name = "snapshot" if kind == SNAPSHOT else "delta"
    return line(ms, "orderbook.200", dict(b=b, a=a), heard, name)


def snapshot(ms, bids=BIDS, asks=ASKS, heard=None) -> Line:
    return delta(ms, bids, asks, heard, SNAPSHOT)


def trades(ms, *entries, heard=None) -> Line:
    """Entries are (the taker's side, ticks from MID, size), and True for a retail trade."""
    data = []
    for side, x, size, *is_rpi in entries:
        taker = "Buy" if side == BID else "Sell"
        data.append(dict(T=START_MS + ms, S=taker, p=price(x), v=str(size), RPI=any(is_rpi)))
    return line(ms, "publicTrade", data, heard)


def ticker(ms, mark_price="") -> Line:
    return line(ms, "tickers", dict(markPrice=str(mark_price)))


def control(ms, event, **fields) -> Line:
    return Line(ns(ms), dict(op="local", event=event, **fields))


def lost(ms, reason="a gap") -> Line:
    return control(ms, "lost", reason=reason)


def params(ms, **changes) -> Line:
    return control(ms, "params", parameters=changes)


def beats(first_ms: int, last_ms: int) -> list[Line]:
    """A book message that changes nothing, every second."""
    return [delta(ms) for ms in range(first_ms, last_ms + 1, 1000)]


def in_order(lines: Iterable[Line]) -> list[Line]:
    return sorted(lines, key=lambda line: line.recv_ns)


def calm(end_ms: int, *events: Line) -> list[Line]:
    """A flat market from 500 ms on, a book message a second, and what else happens.

    Decided is at 11,500 and every 5 s; what is sent then arrives 100 ms later.
    """
    return in_order([snapshot(500, WALL, FAR), *beats(1500, end_ms), *events])


# ---- Drawn by lot ------------------------------------------------------------------

SIZES = [0, 0.125, 0.25, 0.5, 1.0, 2.0, 3.5]
LOSS = [("lost", 18_000, 18_200)]  # a spell of trouble, from ms, to ms
TROUBLES = [
    ("crossed", 13_300, 15_500), ("one-sided", 15_900, 17_300), ("crossed", 34_600, 36_700),
    ("one-sided", 38_500, 40_700), ("late", 41_100, 42_600), ("lost", 44_200, 45_500),
    ("silent", 60_100, 62_700), ("late", 76_200, 76_900), ("crossed", 78_700, 79_900),
]  # fmt: skip


def busy_market(seed: int, seconds: float = 24, spells=LOSS) -> list[Line]:
    """A book of six levels a side that wanders, and trades around its best. Book and trades
    each have their own lag, so that they are heard out of order.
    """
    rng, ms, center = random.Random(seed), 400, 0
    lines = [lost(begin, "a gap, they say") for kind, begin, _ in spells if kind == "lost"]
    exch_ms = {"book": 0, "trades": 0}  # of the last message
    book, told = {BID: {}, ASK: {}}, None  # {ticks from MID: size}: as it is; as was told
    while ms < seconds * 1000:
        ms += rng.choice([0, 1, 5, 15, 30, 40])
        now = {kind: end for kind, begin, end in spells if begin <= ms <= end}
        topic = "trades" if told and rng.random() < 0.5 else "book"
        exch_ms[topic] = at = max(exch_ms[topic], ms - rng.choice([2, 10, 45, 90, 150]))
        if topic == "trades":
            entries = []
            for _ in range(rng.choice([1, 1, 2, 3])):
                taker, distance = rng.choice(SIDES), rng.choice([1, 1, 1, 2, 2, 3, 7])
                is_rpi = rng.random() < 0.1
                entries.append((taker, center + taker * distance, rng.choice(SIZES[1:]), is_rpi))
            lines.append(trades(at, *entries, heard=now.get("late", ms)))
            continue

        # The book changes. It is told by what has changed, after a loss as a whole.
        center += rng.choice([-1, 0, 0, 1])
        for side in SIDES:
            old, levels = book[side], [center - side * k for k in range(1, 7)]
            kept = {x for x in levels if x in old and rng.random() < 0.7}
            book[side] = {x: old[x] if x in kept else rng.choice(SIZES) for x in levels}
        if "crossed" in now:
            book[BID][300] = 1.0
        if "one-sided" in now:
            book[ASK] = {}
        if "lost" in now:
            told = None
        elif told is None:
            lines.append(snapshot(at, *book.values(), heard=ms))
            told = dict(book)
        elif "silent" not in now:
            rows = {side: dict.fromkeys(told[side], 0) | book[side] for side in SIDES}
            changes = [dict(rows[side].items() - told[side].items()) for side in SIDES]
            lines.append(delta(at, *changes, heard=ms))
            told = dict(book)
    return in_order(lines)


def rough_session(seed: int) -> list[Line]:
    """90 s of a busy market with every kind of trouble, ending in mid-second."""
    changes = params(58_300, alpha=2.0, order_qty=0.75), params(59_300, alpha=77)
    stop = params(82_400, max_drawdown_usdt=1.0)
    notes = [ticker(31_400, 50_400.5), ticker(33_900, 50_000), *changes, stop]
    return in_order([*notes, *busy_market(seed, 90.4, TROUBLES)])


# ---- From lines to messages and recordings -----------------------------------------


def texts(lines: Iterable[Line], u: int = 99) -> Iterator[tuple[int, str]]:
    """(recv_ns, text) of every line; the messages of the book are counted from u + 1 on."""
    for recv_ns, message in lines:
        if message.get("topic", "").startswith("orderbook"):
            u += 1
            message["data"]["u"] = u
        yield recv_ns, json.dumps(message)


def messages(lines: Iterable[Line], parser: feed.Parser | None = None) -> list[feed.Message]:
    """What the feed makes of the lines, after those that the parser has had before."""
    parser = parser or feed.Parser(COIN)
    parsed = [parser.parse(*text) for text in texts(lines, parser.last_u or 99)]
    return [message for message in parsed if message]


def write(path: Path, lines: list[Line], **parameters) -> Path:
    """A recording of the lines, with our parameters in its start line."""
    steps = dict(symbol=COIN.symbol, tick_size=COIN.tick_text, lot_size=COIN.lot_text)
    start = control(0, "start", **steps, parameters=parameters)._replace(recv_ns=lines[0].recv_ns)
    recording = "".join(f"{recv_ns} {text}\n" for recv_ns, text in texts([start, *lines]))
    path.write_bytes(gzip.compress(recording.encode(), 1))
    return path
