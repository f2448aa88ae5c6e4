"""Markets told by hand or drawn by lot, as messages, recordings and cached columns.

Ticks count from MID and ms from START_MS, as in test_marketmaker.py.
"""

import gzip
import json
import random
import tempfile
from array import array
from pathlib import Path

from test_marketmaker import MID, busy_market, delta, lost, ns, params, snapshot, ticker, trades

import backtest
import feed
from feed import ASK, BID, MS, NO_LEVEL, Message

BOOK = (feed.DELTA, feed.SNAPSHOT)


def text_of(m: Message, u: int) -> str:
    """A message in Bybit's words, or ours."""
    if m.kind in (feed.LOST, feed.CONTROL):
        return feed.control_line(**{"event": "lost"} | m.fields)
    ms, kind = m.exch_ns // MS, "snapshot" if m.kind == feed.SNAPSHOT else "delta"
    if m.kind == feed.TICKER:
        topic, data = "tickers", {"markPrice": str(m.fields["mark_price"])}
    elif m.kind == feed.TRADES:
        topic, data = "publicTrade", [
            dict(T=t // MS, S="Buy" if taker == BID else "Sell", v=str(size), p=str(x / 2), RPI=rpi)
            for t, taker, x, size, rpi in m.trades]  # fmt: skip
    else:
        topic, (b, a) = "orderbook.200", (
            [[str(s * level / 2), str(size)] for level, size in zip(*columns)]
            for s, columns in ((BID, m.bids), (ASK, m.asks)))  # fmt: skip
        data = dict(b=b, a=a, u=u)
    return json.dumps(dict(topic=f"{topic}.COINUSDT", type=kind, ts=ms, cts=ms, data=data))


def write(path: Path, stream: list[Message], **values) -> Path:
    """The stream as a recording, with our parameters in its start line."""
    start = dict(symbol="COINUSDT", tick_size="0.5", lot_size="0.125", parameters=values)
    lines, u = [f"{stream[0].recv_ns} {feed.control_line('start', **start)}\n"], 99
    for m in stream:
        u += m.kind in BOOK
        lines.append(f"{m.recv_ns} {text_of(m, u)}\n")
    path.write_bytes(gzip.compress("".join(lines).encode(), 1))
    return path


def with_best(stream: list[Message], folder: Path) -> feed.Tape:
    """The stream as the cache keeps it."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    facts = json.loads(json.dumps(backtest.write_tape(iter(stream), folder)))
    return backtest.read_tape(folder, facts)


WALL, FAR = {-1: 5, -4: 2, -9: 9}, {1: 5, 4: 2, 9: 9}  # our quotes stand at 4 ticks, behind 2


def calm(end_ms: int, *events: Message) -> list[Message]:
    """A flat market from 500 ms on, a book message a second, and what else happens.

    Decided is at 11,500 and every 5 s; what is sent then arrives 100 ms later.
    """
    beats = [delta(ms) for ms in range(1500, end_ms + 1, 1000)]
    return sorted([snapshot(500, WALL, FAR), *beats, *events], key=lambda m: m.recv_ns)


def rough_session(seed: int) -> list[Message]:
    """90 s of a busy market with every kind of trouble, ending in mid-second."""
    rng, stream, spells, shown = random.Random(seed), [], [], {BID: {}, ASK: {}}
    for kind, begin_s, length_s in (
        ("crossed", 13, 2.2), ("one-sided", 15.6, 1.4), ("mark", 31, 2.5), ("crossed", 34.2, 2.1),
        ("one-sided", 38, 2.2), ("late", 41, 1.5), ("lost", 44, 1.3), ("params", 58, 1),
        ("silent", 60, 2.6), ("late", 76, 0.7), ("crossed", 78, 1.2), ("stop", 82, 1),
    ):  # fmt: skip
        begin = int(1000 * (begin_s + rng.uniform(0, 0.9)))
        end = begin + int(1000 * length_s)
        spells.append((kind, begin, end))
        stream += {
            "crossed": [delta(begin, {300: 1}), delta(end, {300: 0})],
            "mark": [ticker(begin, mark_price=50_400.5), ticker(end, mark_price=50_000)],
            "lost": [lost(begin, "a gap, they say")],
            "params": [params(begin, alpha=2.0, order_qty=0.75), params(end, alpha=77)],
            "stop": [params(begin, max_drawdown_usdt=1.0)],
        }.get(kind, [])
    for m in busy_market(seed, 90):
        ms, is_kept = (m.recv_ns - ns(0)) // MS, True
        for side, columns in ((BID, m.bids), (ASK, m.asks)):
            shown[side] |= {side * level - MID: size for level, size in zip(*columns)}
            shown[side] = {x: size for x, size in shown[side].items() if size}
        for kind, begin, end in spells:
            if m.kind in BOOK and kind in ("one-sided", "lost", "silent"):
                if begin <= ms <= end:
                    is_kept = False
                    stream += [snapshot(ms, shown[BID], {})] * (kind == "one-sided")
                elif 0 < ms - end < 99:
                    m = snapshot(ms, shown[BID], shown[ASK])
            elif kind == "late" and m.kind == feed.TRADES and begin <= ms <= end:
                m = m._replace(recv_ns=ns(end))
        stream += [m] * is_kept
    stream, cts = sorted([*stream, delta(90_437)], key=lambda m: m.recv_ns), 0
    for k, m in enumerate(stream):
        if m.kind in BOOK:  # its exchange time never goes back
            cts = max(cts, m.exch_ns)
            stream[k] = m._replace(exch_ns=cts)
    return stream


def noise(seed: int, count: int = 400) -> list[Message]:
    """Messages as a fiend would send them: levels twice, absent ones deleted, all gone."""
    rng, stream = random.Random(seed), []

    def side_rows(side: int) -> feed.Columns:
        some = [rng.randrange(-9, 4) for _ in range(rng.choice([0, 1, 2, 9]))]
        levels = range(-20, 20) if (is_all_gone := rng.random() < 0.04) else some
        sizes = [0.0 if is_all_gone else rng.choice([0.0, 0.0, 1.0, 2.5]) for _ in levels]
        return array(feed.LEVEL, (side * MID + x for x in levels)), array(feed.SIZE, sizes)

    for ms in range(count):
        stream.append(rng.choice([
            *[Message(feed.DELTA, ns(ms), ns(ms), side_rows(BID), side_rows(ASK))] * 12,
            Message(feed.SNAPSHOT, ns(ms), ns(ms), side_rows(BID), side_rows(ASK)),
            trades(ms, (BID, 1, 1.5), (ASK, 0, 0.125)), lost(ms), ticker(ms, mark_price=3.5),
        ]))  # fmt: skip
    return stream


def best_by_dicts(stream: list[Message]) -> dict[int, list[int]]:
    books, best = {BID: {}, ASK: {}}, {BID: [], ASK: []}
    for m in stream:
        for side, columns in ((BID, m.bids), (ASK, m.asks)):
            if m.kind == feed.SNAPSHOT:
                books[side] = {}
            books[side] |= dict(zip(*columns))
            best[side].append(max((x for x, s in books[side].items() if s), default=NO_LEVEL))
    return best


def spoil(tail: list[Message], rng: random.Random) -> list[Message]:
    """Another future: prices moved, messages taken out, trades put in."""
    by, future = rng.choice([-40, -3, 5, 60]), []
    for m in tail:
        bids, asks = ((array(feed.LEVEL, (x + s * by for x in c[0])), c[1])
                      for s, c in ((BID, m.bids), (ASK, m.asks)))  # fmt: skip
        found = [(t, taker, x + by, 3 * size, rpi) for t, taker, x, size, rpi in m.trades]
        trade = rng.choice([BID, ASK]), rng.randrange(-50, 50), 9
        more = trades((m.recv_ns - ns(0)) // MS, trade)
        kept = m._replace(bids=bids, asks=asks, trades=found)
        future += rng.choice([[], [kept, more], *[[kept]] * 8])
    return future
