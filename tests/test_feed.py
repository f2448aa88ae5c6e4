"""What the exchange says is understood, or counted: book, parser, recordings, instruments.

Each group compares with something that shares no code with feed.py: a book kept in plain
dicts by exact decimals, the program `gzip`, values worked by hand. No network.
"""

import copy
import gzip
import json
import logging
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import zlib
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

import feed
from feed import (
    ASK,
    BID,
    CONTROL,
    DELTA,
    LOST,
    REFUSED,
    SNAPSHOT,
    TICKER,
    TRADES,
    Instrument,
    Ladder,
    Message,
    OrderBook,
    Parser,
    Recorder,
    UserError,
    build_tape,
    parse_instrument,
    read_lines,
    sound_line,
)

ROOT = Path(__file__).parent.parent
BOOK, TRADE, TICKERS = "orderbook.200.BTCUSDT", "publicTrade.BTCUSDT", "tickers.BTCUSDT"
NOW_MS = 1_700_000_000_000
NOW_NS = NOW_MS * 1_000_000  # receive time
DAY_NS = 86_400 * 10**9


# ---- Messages by hand, and a book of plain dicts -----------------------------------


def plain(columns) -> tuple[list, ...]:
    """Levels and sizes of book rows as lists."""
    return tuple(map(list, columns))



def book_text(u, bids=(), asks=(), kind="delta", **more) -> str:
    data = {"s": "BTCUSDT", "b": list(bids), "a": list(asks), "u": u, "seq": 7 * u}
    message = {"topic": BOOK, "type": kind, "ts": NOW_MS, "data": data, "cts": NOW_MS - 2}
    return json.dumps(message | more)


def trade_text(*trades, **more) -> str:
    usual = {"T": NOW_MS - 3, "s": "BTCUSDT", "S": "Sell", "v": "0.004", "p": "65114.20"}
    data = [usual | trade for trade in trades]
    return json.dumps({"topic": TRADE, "type": "snapshot", "ts": NOW_MS, "data": data} | more)


def ticker_text(fields, **more) -> str:
    message = {"topic": TICKERS, "type": "delta", "data": fields, "cs": 1, "ts": NOW_MS}
    return json.dumps(message | more)


GOOD = (("100.0", "1"), ("99.9", "2")), (("100.1", "3"), ("100.2", "4"))


@pytest.fixture
def parser() -> Parser:
    return Parser(Instrument())


def parse(parser: Parser, *texts: str) -> list:
    """The messages of some texts; None where a text carries nothing."""
    return [parser.parse(NOW_NS, text) for text in texts]


def kinds(messages) -> list[str]:
    return [message.kind for message in messages if message is not None]


class PlainBook:
    """A book as one would write it in an evening: dict of price to size on each side."""

    def __init__(self, tick: str = "0.1") -> None:
        self.per_tick = 1 / Decimal(tick)
        self.sides = {"b": {}, "a": {}}
        self.known: dict[str, int] = {}

    def ticks(self, price: str) -> int:
        if price not in self.known:
            exact = Decimal(price) * self.per_tick
            assert exact == exact.to_integral_value()
            self.known[price] = int(exact)
        return self.known[price]

    def apply(self, message: dict) -> None:
        if message["type"] == "snapshot":
            self.sides = {"b": {}, "a": {}}
        for name, side in self.sides.items():
            for price, size in message["data"][name]:
                side.pop(self.ticks(price), None)
                if float(size):
                    side[self.ticks(price)] = float(size)

    def best(self) -> tuple[int | None, int | None]:
        return max(self.sides["b"], default=None), min(self.sides["a"], default=None)

    def depth(self) -> tuple[float, float]:
        """Within 1 bp of the mid on each side, in whole numbers: exact at the edge."""
        bid, ask = self.best()
        near = [s for t, s in self.sides["b"].items() if 20_000 * t >= 9_999 * (bid + ask)]
        far = [s for t, s in self.sides["a"].items() if 20_000 * t <= 10_001 * (bid + ask)]
        return math.fsum(near), math.fsum(far)


def shown(book: OrderBook) -> dict[str, dict[int, float]]:
    """All levels of an order book as dicts of ticks to size."""
    sides = {}
    for name, side in (("b", BID), ("a", ASK)):
        levels, sizes = book.ladders[side].occupied()
        sides[name] = dict(zip((levels * side).tolist(), sizes.tolist(), strict=True))
    return sides


def take(book: OrderBook, message: Message) -> None:
    """Apply one message the way every consumer does."""
    if message.kind == SNAPSHOT:
        book.clear()
    if message.kind in (SNAPSHOT, DELTA):
        book.apply(build_tape([message]))


def assert_same(book: OrderBook, plain: PlainBook) -> None:
    """Everything that a book can be asked for, against the dicts."""
    assert shown(book) == plain.sides
    assert (book.best(BID), book.best(ASK)) == plain.best()
    for name, side in (("b", BID), ("a", ASK)):
        ladder, levels = book.ladders[side], {side * t: s for t, s in plain.sides[name].items()}
        assert ladder.worst() == min(levels, default=None)
        for level in levels:
            assert ladder.size_at(level) == levels[level]
            assert ladder.is_visible(level)
        if levels:
            worst, best = min(levels), max(levels)
            assert ladder.size_at(best + 1) == ladder.size_at(worst - 1) == 0
            assert ladder.is_visible(best + 1) and not ladder.is_visible(worst - 1)
            assert list(ladder.occupied()[0]) == sorted(levels, reverse=True)
            for floor in (worst, best - 2.5, best, best + 0.5):
                expected = math.fsum(s for level, s in levels.items() if level >= floor)
                assert ladder.depth(floor) == pytest.approx(expected, rel=1e-12)


# ---- The order book ----------------------------------------------------------------

WIDTH = 256  # levels: small, so that the ladder has to move with the market
WINDOW = WIDTH // 8  # levels a side that this market shows


class Market:
    """A market that wanders: texts of snapshots and deltas as Bybit would send them.

    Like Bybit it shows a window, and deletes what leaves it. Some deletes name levels
    that nobody holds; some price strings have two decimals.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.mid, self.u = 5_000, 0
        self.bids: dict[int, str] = {}
        self.asks: dict[int, str] = {}

    def row(self, tick: int, size: str) -> list[str]:
        zero = self.rng.choice(("", "0"))
        return [f"{tick // 10}.{tick % 10}{zero}", size]

    def text(self, kind: str) -> str:
        """Move, then say what has changed (delta) or what there is (snapshot)."""
        rng = self.rng
        self.mid += rng.randint(-WINDOW, WINDOW) if rng.random() < 0.5 else 0
        self.u += 1
        rows = [self.move(self.bids, -1, kind), self.move(self.asks, 1, kind)]
        return book_text(self.u, *rows, kind=kind)

    def move(self, side: dict[int, str], sign: int, kind: str) -> list:
        old = dict(side)
        inside = {t: s for t, s in old.items() if 0 < (t - self.mid) * sign <= WINDOW}
        for _ in range(self.rng.randint(0, 8)):
            tick = self.mid + sign * self.rng.randint(1, WINDOW)
            inside[tick] = self.rng.choice(("0", f"{self.rng.randint(1, 9999)}e-3", "2.50"))
        if self.rng.random() < 0.02:
            inside = dict.fromkeys(inside, "0")  # nobody is left
        gone = [tick for tick in old if tick not in inside]
        side.clear()
        side.update({t: s for t, s in inside.items() if float(s)})
        if kind == "snapshot":
            return [self.row(t, s) for t, s in side.items()]
        changed = [self.row(t, s) for t, s in inside.items() if old.get(t) != s]
        changed += [self.row(t, "0") for t in gone]
        self.rng.shuffle(changed)
        return changed


@pytest.mark.parametrize("seed", range(3))
def test_random_messages_leave_the_book_that_plain_dicts_leave(parser, seed, monkeypatch):
    monkeypatch.setattr(feed, "SCAN", 4)  # so that empty stretches are longer than a scan
    market, book, plain = Market(seed), OrderBook(WIDTH), PlainBook()
    origins = set()
    for step in range(600):
        text = market.text("snapshot" if step % 150 == 0 else "delta")
        (message,) = parse(parser, text)
        take(book, message)
        plain.apply(json.loads(text))
        assert_same(book, plain)
        origins.add(book.ladders[BID].origin)
    assert len(origins) > 5, "the ladder never had to move: the test is too tame"


def test_a_slice_of_many_messages_applies_like_one_message_after_another(parser):
    market, book, plain = Market(11), OrderBook(WIDTH), PlainBook()
    first = market.text("snapshot")
    take(book, *parse(parser, first))
    plain.apply(json.loads(first))
    for size in (1, 2, 5, 3, 9, 4) * 6:
        texts = [market.text("delta") for _ in range(size)]
        piece = build_tape(parse(parser, *texts))
        assert len(piece) == size
        half = size // 2
        book.apply(piece, 0, half)
        for text in texts[:half]:
            plain.apply(json.loads(text))
        assert_same(book, plain)
        book.apply(piece, half)
        for text in texts[half:]:
            plain.apply(json.loads(text))
        assert_same(book, plain)


def test_rows_out_of_reach_are_left_out_and_counted_and_never_shown_wrongly():
    rng = np.random.default_rng(5)
    ladder, true, anchor = Ladder(64), {}, 1_000
    for _ in range(2_000):
        anchor += int(rng.integers(-12, 13))
        levels = anchor + rng.integers(-150, 1, int(rng.integers(1, 6)))
        levels = np.append(levels, anchor)  # the best is always said
        sizes = rng.integers(0, 4, len(levels)).astype(float)
        sizes[-1] = 1.0
        above = [level for level in true if level > anchor]
        ladder.set(np.array([*above, *levels]), np.array([0.0] * len(above) + list(sizes)))
        true.update(dict.fromkeys(above, 0.0))
        true.update(zip(levels.tolist(), sizes.tolist(), strict=True))
        occupied, resting = ladder.occupied()
        assert ladder.best == anchor == occupied[0]
        assert all(true[k] == s > 0 for k, s in zip(occupied.tolist(), resting, strict=True))
    assert ladder.beyond > 100


def test_the_later_of_two_rows_for_one_level_wins():
    ladder = Ladder(64)
    ladder.set(np.array([10, 11, 10, 11]), np.array([5.0, 6.0, 7.0, 0.0]))
    assert ladder.size_at(10) == 7 and ladder.size_at(11) == 0 and ladder.best == 10


def test_deleting_what_nobody_holds_changes_nothing(parser):
    book = OrderBook(WIDTH)
    absent = [["98.5", "0"], ["103.0", "0"], ["100.0", "0.0"]], [["101.0", "0"], ["99.0", "0"]]
    snapshot, deletes = parse(parser, book_text(1, *GOOD, kind="snapshot"), book_text(2, *absent))
    take(book, snapshot)
    take(book, deletes)
    assert shown(book) == {"b": {999: 2.0}, "a": {1001: 3.0, 1002: 4.0}}
    assert book.ladders[BID].worst() == 999


def test_an_emptied_side_has_no_best_no_mid_and_no_depth_until_it_fills_again(parser):
    book = OrderBook(WIDTH)
    empty = [["100.0", "0"], ["99.9", "0"]]
    for message in parse(parser, book_text(1, *GOOD, kind="snapshot"), book_text(2, empty)):
        take(book, message)
    assert book.best(BID) is None and book.best(ASK) == 1001
    assert book.fault == "book one-sided" and math.isnan(book.mid_ticks)
    assert book.depth(BID, 1) == book.depth(ASK, 1) == 0
    assert book.ladders[BID].worst() is None and not book.ladders[BID].is_visible(1000)
    assert len(book.ladders[BID].occupied()[0]) == 0
    take(book, *parse(parser, book_text(3, [["55.0", "2"]])))  # far from where it was
    assert book.best(BID) == 550 and book.fault == "" and book.mid_ticks == 775.5


def test_an_empty_side_finds_its_place_by_what_rests_not_by_what_is_deleted():
    ladder = Ladder(64)
    ladder.set(np.array([5_000, 1_000]), np.array([0.0, 2.0]))
    assert ladder.best == 1_000 and ladder.size_at(1_000) == 2


def test_both_sides_are_applied_before_the_book_is_called_crossed(parser):
    book = OrderBook(WIDTH)
    up = [["100.3", "1"]], [["100.1", "0"], ["100.2", "0"], ["100.4", "5"]]
    crossed = [["100.4", "1"]], []
    first, moved, wrong = parse(
        parser, book_text(1, *GOOD, kind="snapshot"), book_text(2, *up), book_text(3, *crossed)
    )
    take(book, first)
    assert book.fault == "" and book.mid_ticks == 1000.5
    take(book, moved)  # the new bid lies above the old ask
    assert book.fault == "" and (book.best(BID), book.best(ASK)) == (1003, 1004)
    take(book, wrong)
    assert book.fault == "book crossed" and math.isnan(book.mid_ticks)


def test_a_snapshot_leaves_nothing_of_the_old_book(parser):
    book = OrderBook(WIDTH)
    other = [["50.0", "1"]], [["50.1", "2"]]
    for message in parse(
        parser, book_text(5, *GOOD, kind="snapshot"), book_text(3, *other, kind="snapshot")
    ):
        take(book, message)
    assert shown(book) == {"b": {500: 1.0}, "a": {501: 2.0}}


def test_the_book_shows_the_exchange_time_of_its_last_book_message(parser):
    book = OrderBook(WIDTH)
    snapshot, trade = parse(parser, book_text(1, *GOOD, kind="snapshot"), trade_text({}))
    book.apply(build_tape([snapshot, trade]))
    assert book.exch_ns == (NOW_MS - 2) * 1_000_000  # not the trade's T


def test_a_slice_keeps_trades_and_book_rows_apart_and_in_order(parser):
    snapshot, trades, delta = parse(
        parser,
        book_text(1, *GOOD, kind="snapshot"),
        trade_text({"RPI": True}, {"S": "Buy", "v": "2", "p": "65114.3", "T": NOW_MS}),
        book_text(2, [["99.8", "7"]]),
    )
    piece = build_tape([snapshot, trades, delta])
    assert piece.kind.tolist() == [SNAPSHOT, TRADES, DELTA]
    assert piece.last_book.tolist() == [0, 0, 2]
    assert piece.rows[BID].end.tolist() == [0, 2, 2, 3]
    assert piece.rows[ASK].level.tolist() == [-1001, -1002]
    assert [column.tolist() for column in piece.trades] == [
        [(NOW_MS - 3) * 1_000_000, NOW_MS * 1_000_000],
        [BID * -1, BID], [651142, 651143], [0.004, 2.0], [True, False], [0, 0, 2, 2],
    ]  # fmt: skip
    assert piece.turnover.tolist() == [0, 651142 * 0.004 + 651143 * 2.0, 0]


# ---- Real recordings ---------------------------------------------------------------


def recordings() -> list:
    folder = os.environ.get("RECORDINGS")
    if not folder:
        reason = "the environment variable RECORDINGS names no folder of real recordings"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="none")]
    paths = sorted(Path(folder).glob("*.jsonl.gz"))
    return [pytest.param(path, id=path.name.split(".")[0]) for path in paths]


def compare_with_dicts(path: Path, most: int | None = None) -> Parser:
    """Best prices and depth of ladder and dicts at every book message of a file."""
    parser, _header = feed.parser_of_recording(path, None, None, None)
    book, plain, compared = OrderBook(), PlainBook(parser.instrument.tick_text), 0
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number == most:
                break
            stamp, _, text = line.rstrip("\n").partition(" ")
            message = parser.parse(int(stamp), text)
            assert message is None or message.kind not in (LOST, REFUSED), message
            raw = json.loads(text)
            if not raw.get("topic", "").startswith("orderbook."):
                continue
            plain.apply(raw)
            take(book, message)
            assert (book.best(BID), book.best(ASK)) == plain.best(), f"line {number}"
            depth = book.depth(BID, 1.0), book.depth(ASK, 1.0)
            assert depth == pytest.approx(plain.depth(), rel=1e-9), f"line {number}"
            compared += 1
    assert shown(book) == plain.sides
    assert compared == parser.counts["book"] > 300
    return parser


@pytest.mark.parametrize("path", recordings())
def test_a_real_recording_gives_the_book_of_plain_dicts_at_every_message(path):
    counts = compare_with_dicts(path).counts
    assert not any(counts[name] for name in ("malformed", "losses", "gaps", "repeated"))


def test_the_bundled_sample_gives_the_book_of_plain_dicts():
    parser = compare_with_dicts(ROOT / "data" / "sample.jsonl.gz", most=5_000)
    assert parser.counts["malformed"] == parser.counts["losses"] == 0


# ---- The rules of u ----------------------------------------------------------------


def test_a_delta_that_follows_is_applied(parser):
    messages = parse(
        parser, book_text(7, *GOOD, kind="snapshot"), book_text(8), book_text(9, [["99.8", "1"]])
    )
    assert kinds(messages) == [SNAPSHOT, DELTA, DELTA]
    assert plain(messages[2].bids) == ([998], [1.0]) and plain(messages[2].asks) == ([], [])


def test_a_repeated_or_older_delta_is_ignored_and_counted(parser):
    texts = [book_text(u, [["99.8", str(u)]]) for u in (8, 8, 7, 3, 9)]
    messages = parse(parser, book_text(7, *GOOD, kind="snapshot"), *texts)
    assert kinds(messages) == [SNAPSHOT, DELTA, DELTA]
    assert plain(messages[5].bids) == ([998], [9.0])
    assert parser.counts["repeated"] == 3


def test_a_gap_loses_the_book_once_and_only_a_snapshot_brings_it_back(parser):
    texts = [book_text(u) for u in (8, 10, 11, 12, 9)]
    back = book_text(20, *GOOD, kind="snapshot"), book_text(21)
    messages = parse(parser, book_text(7, *GOOD, kind="snapshot"), *texts, *back)
    assert [m and m.kind for m in messages] == [
        SNAPSHOT, DELTA, LOST, None, None, None, SNAPSHOT, DELTA,
    ]  # fmt: skip
    assert "10" in messages[2].fields["reason"] and "8" in messages[2].fields["reason"]
    assert parser.counts["gaps"] == 1 and parser.counts["losses"] == 1
    assert kinds(parse(parser, book_text(30))) == [LOST], "a second loss is told again"


def test_a_delta_before_any_snapshot_is_a_loss_told_once(parser):
    messages = parse(parser, book_text(7), book_text(8), book_text(9, *GOOD, kind="snapshot"))
    assert [m and m.kind for m in messages] == [LOST, None, SNAPSHOT]
    assert parser.counts["before snapshot"] == 2


@pytest.mark.parametrize(
    ("u", "kind"), [(1, "delta"), (1, "snapshot"), (4, "snapshot"), (50, "snapshot")]
)
def test_a_snapshot_in_mid_stream_or_a_restarted_count_replaces_the_book(parser, u, kind):
    messages = parse(
        parser,
        book_text(7, *GOOD, kind="snapshot"),
        book_text(8),
        book_text(u, [["90.0", "1"]], [["90.1", "1"]], kind=kind),
        book_text(u + 1),
    )
    assert kinds(messages) == [SNAPSHOT, DELTA, SNAPSHOT, DELTA]
    assert parser.counts["gaps"] == parser.counts["repeated"] == 0


def test_a_lost_connection_ends_trust_in_the_book(parser):
    lost = feed.control_line("lost", reason="closed by the exchange")
    texts = book_text(7, *GOOD, kind="snapshot"), lost, book_text(8), book_text(9)
    messages = parse(parser, *texts, book_text(9, *GOOD, kind="snapshot"))
    assert [m and m.kind for m in messages] == [SNAPSHOT, LOST, LOST, None, SNAPSHOT]
    assert messages[1].fields["reason"] == "closed by the exchange"


@pytest.mark.parametrize(
    "change",
    [{"type": "other"}, {"data": {}}, {"data": None}, {"cts": None}, {"cts": float(NOW_MS)},
     {"cts": NOW_MS + 90_000_000}],
)  # fmt: skip
def test_a_malformed_book_message_is_counted_and_loses_the_book_once(parser, change):
    broken = book_text(8, **change)
    messages = parse(parser, book_text(7, *GOOD, kind="snapshot"), broken, broken, book_text(9))
    assert [m and m.kind for m in messages] == [SNAPSHOT, LOST, None, None]
    assert parser.counts["malformed"] == 2


@pytest.mark.parametrize(
    "row",
    [["99.8"], ["99.8", "1", "1"], ["99.8", 1], [99.8, "1"], "ab", {"99.8": "1"}, None, 5,
     ["99.8", "-1"], ["99.8", "nan"], ["99.8", "inf"], ["99.8", "1e16"], ["99.8", ""],
     ["0", "1"], ["-5", "1"], ["NaN", "1"], ["1e400", "1"], ["1e999999999", "1"], ["x", "1"],
     [["99.8"], "1"], [True, "1"], ["99.85", "1"]],
)  # fmt: skip
def test_one_unsound_row_spoils_the_whole_book_message(parser, row):
    rows = [["99.7", "1"], row, ["99.6", "1"]]
    messages = parse(parser, book_text(7, *GOOD, kind="snapshot"), book_text(8, rows))
    assert kinds(messages) == [SNAPSHOT, LOST]
    assert parser.counts["malformed"] == 1


# ---- Prices, trades, tickers, answers ----------------------------------------------


@pytest.mark.parametrize(
    ("text", "tick", "ticks"),
    [
        ("64474.1", "0.1", 644741),
        ("64474.10", "0.1", 644741),
        ("64474.20", "0.10", 644742),
        ("6.44741e4", "0.1", 644741),
        ("64474", "0.1", 644740),
        ("0.1", "0.1", 1),
        ("16542.75", "0.01", 1654275),
        ("28552.5", "0.5", 57105),
        ("0.00001234", "0.00000001", 1234),
        ("70000", "5", 14000),
    ],
)
def test_every_form_of_a_price_becomes_exact_ticks(text, tick, ticks):
    parser = Parser(Instrument(tick_text=tick))
    (message,) = parse(parser, book_text(7, [[text, "1"]], [[text, "1"]], kind="snapshot"))
    assert plain(message.bids)[0] == [ticks] and plain(message.asks)[0] == [-ticks]
    assert type(message.bids[0][0]) is int


def test_every_price_on_the_grid_becomes_exact_ticks(parser):
    many = [*range(1, 2_000), *range(650_000, 651_000), 2**31 - 1]
    exact = [Decimal(ticks).scaleb(-1) for ticks in many]
    for u, form in enumerate(("{}", "{}0", "{:e}"), 1):
        rows = [[form.format(price), "1"] for price in exact]
        (message,) = parse(parser, book_text(u, rows, kind="snapshot"))
        assert list(message.bids[0]) == many


def test_what_is_remembered_of_texts_does_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(feed.Table, "LIMIT", 100)
    table = feed.Table(float)
    assert [table[str(price)] for price in range(1, 1_000)] == list(range(1, 1_000))
    assert len(table) <= 100


@pytest.mark.parametrize("text", ["64474.15", "0.05", "64474.1000001"])
def test_a_first_snapshot_off_the_grid_is_the_users_to_mend(parser, text):
    with pytest.raises(UserError, match=f"{text}.*--tick-size"):
        parse(parser, book_text(7, [[text, "1"]], [["100.1", "1"]], kind="snapshot"))


def test_a_later_price_off_the_grid_is_malformed_and_loses_the_book(parser):
    wrong = book_text(8, [["100.05", "1"]])
    messages = parse(parser, book_text(7, *GOOD, kind="snapshot"), wrong)
    assert kinds(messages) == [SNAPSHOT, LOST] and "--tick-size" in messages[1].fields["reason"]
    assert parser.counts["malformed"] == 1
    wrong = book_text(9, [["100.05", "1"]], kind="snapshot")
    assert kinds(parse(parser, wrong, book_text(10, *GOOD, kind="snapshot"))) == [SNAPSHOT]


def test_the_order_of_keys_does_not_matter(parser):
    linear = (
        '{"topic":"orderbook.200.BTCUSDT","type":"snapshot","ts":1700000000000,'
        '"data":{"s":"BTCUSDT","b":[["100.00","1"]],"a":[["100.10","3"]],"u":7,"seq":5},"cts":1699999999998}'
    )
    spot = (
        '{"topic":"orderbook.200.BTCUSDT","ts":1700000000000,"type":"snapshot","cts":1699999999998,'
        '"data":{"seq":5,"u":7,"a":[["100.1","3"]],"b":[["100","1"]],"s":"BTCUSDT"}}'
    )
    first, second = parse(parser, linear, spot)
    assert first == second
    assert plain(first.bids) == ([1000], [1.0]) and plain(first.asks) == ([-1001], [3.0])
    assert first.recv_ns == NOW_NS and first.exch_ns == 1_699_999_999_998_000_000


def test_without_cts_the_book_shows_ts(parser):
    text = book_text(7, *GOOD, kind="snapshot")
    without = {k: v for k, v in json.loads(text).items() if k != "cts"}
    first, second = parse(parser, text, json.dumps(without))
    assert first.exch_ns == (NOW_MS - 2) * 1_000_000 and second.exch_ns == NOW_NS


def test_a_trade_has_the_takers_side_ticks_size_and_its_own_time(parser):
    (message,) = parse(
        parser,
        trade_text(
            {},
            {"S": "Buy", "p": "65114.3", "v": "1.5", "RPI": True, "T": NOW_MS - 1},
            {"RPI": False, "BT": False, "L": "MinusTick", "seq": 9},
        ),
    )
    assert message.kind == TRADES and message.recv_ns == NOW_NS
    assert message.trades == [
        ((NOW_MS - 3) * 1_000_000, ASK, 651142, 0.004, False),
        ((NOW_MS - 1) * 1_000_000, BID, 651143, 1.5, True),
        ((NOW_MS - 3) * 1_000_000, ASK, 651142, 0.004, False),
    ]


def test_block_trades_are_left_out_and_counted(parser):
    mixed, only = parse(parser, trade_text({"BT": True}, {"v": "2"}), trade_text({"BT": True}))
    assert [trade[3] for trade in mixed.trades] == [2.0] and only is None
    assert parser.counts["block trades"] == 2 and parser.counts["trades"] == 2


@pytest.mark.parametrize(
    "change",
    [{"v": "0"}, {"v": "-1"}, {"v": "nan"}, {"v": 1}, {"S": "buy"}, {"S": None}, {"p": 65114.2},
     {"p": "65114.25"}, {"T": "1"}, {"T": NOW_MS + 90_000_000}, {"T": 10**400}, {"T": True},
     {"T": float(NOW_MS)}],
)  # fmt: skip
def test_an_unsound_trade_is_malformed_and_leaves_the_book_alone(parser, change):
    texts = book_text(7, *GOOD, kind="snapshot"), trade_text(change), book_text(8)
    assert [m and m.kind for m in parse(parser, *texts)] == [SNAPSHOT, None, DELTA]
    assert parser.counts["malformed"] == 1


def test_a_ticker_carries_only_the_fields_that_came(parser):
    full, changed, empty, other = parse(
        parser,
        ticker_text(
            {"lastPrice": "65114.30", "markPrice": "65117.44", "indexPrice": "65137.76",
             "fundingRate": "-0.0001", "preOpenPrice": "", "bid1Price": "65114.20"},
            type="snapshot",
        ),
        ticker_text({"symbol": "BTCUSDT", "markPrice": "65117.43"}),
        ticker_text({"markPrice": "", "lastPrice": None}),
        ticker_text({"bid1Size": "6.054"}),
    )  # fmt: skip
    assert full.fields == {
        "last_price": 65114.3, "mark_price": 65117.44, "index_price": 65137.76,
        "funding_rate": -0.0001,
    }  # fmt: skip
    assert full.kind == TICKER and full.exch_ns == NOW_NS
    assert changed.fields == {"mark_price": 65117.43}
    assert empty.fields == other.fields == {}
    assert parser.counts["tickers"] == 4


def test_the_spot_ticker_has_a_last_and_an_index_price_but_no_mark(parser):
    text = (
        '{"topic":"tickers.BTCUSDT","ts":1700000000000,"type":"snapshot","cs":2588407389,"data":'
        '{"symbol":"BTCUSDT","lastPrice":"21109.77","volume24h":"6780.8","usdIndexPrice":"21120.24"}}'
    )
    (message,) = parse(parser, text)
    assert message.fields == {"last_price": 21109.77, "index_price": 21120.24}


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "x", 5, True, [], "1e999"])
def test_an_unsound_ticker_value_is_malformed(parser, value):
    assert parse(parser, ticker_text({"markPrice": value})) == [None]
    assert parser.counts["malformed"] == 1


ANSWERS = {  # as Bybit documents them: spot, then linear; the last is the private socket's
    "acks": [
        '{"success":true,"ret_msg":"subscribe","conn_id":"2324d924","req_id":"10001","op":"subscribe"}',
        '{"success":true,"ret_msg":"","conn_id":"3cd84cb1","req_id":"","op":"subscribe"}',
    ],
    "pongs": [
        '{"success":true,"ret_msg":"pong","conn_id":"0970e817","op":"ping"}',
        '{"success":true,"ret_msg":"pong","conn_id":"465772b1","req_id":"","op":"ping"}',
        '{"req_id":"test","op":"pong","args":["1675418560633"],"conn_id":"cfcb4ocsvfriu23r3er0"}',
    ],
    "ignored": [
        '{"topic":"kline.1.BTCUSDT","data":[{"start":1}],"ts":1,"type":"snapshot"}',
        '{"topic":"orderbook.1.BTCUSDT","type":"snapshot","ts":1,"data":{"u":1}}',
        '{"topic":"orderbook.200.ETHUSDT","type":"delta","ts":1,"data":{"u":3}}',
    ],
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_and_other_topics_are_counted_and_carry_nothing(parser, name):
    parse(parser, book_text(7, *GOOD, kind="snapshot"))
    before = dict(parser.counts)
    assert parse(parser, *ANSWERS[name]) == [None] * len(ANSWERS[name])
    assert parser.counts == before | {name: len(ANSWERS[name])}
    assert kinds(parse(parser, book_text(8))) == [DELTA]


def test_a_refusal_is_passed_on_in_the_exchanges_words(parser):
    text = (
        '{"success":false,"ret_msg":"error:handler not found,topic:orderbook.500.BTCUSDT",'
        '"conn_id":"1","req_id":"0","op":"subscribe"}'
    )
    (message,) = parse(parser, text)
    assert message.kind == REFUSED and parser.counts["refusals"] == 1
    assert message.fields["reason"] == "error:handler not found,topic:orderbook.500.BTCUSDT"


# ---- Garbage -----------------------------------------------------------------------

JUNK = [
    None, True, False, 0, -1, 1, 1.5, -0.0, 10**400, -(10**400), 2**63, 1e308, "", "x", "ab",
    "NaN", "nan", "Infinity", "-inf", "1e999", "-5", "0", "1e-400", "1e999999999", "\u20ac\ud800",
    "\u0661\u0662", "1_0", " 1 ", "\n", "\x00", [], {}, [[]], ["ab"], [["1"]], [["1", "2", "3"]],
    [["100.0", "1"]], [["100.05", "1"]], {"b": 1}, "Buy", "delta", "snapshot", BOOK, 1e999, -1e999,
    float("nan"), NOW_MS, NOW_MS + 10**9, float(NOW_MS), "local", [None], [{}],
    "100.0", "9" * 400, [[[]]],
]  # fmt: skip


def positions(value, path=()) -> list[tuple]:
    """The paths to everything inside a JSON value."""
    items = enumerate(value) if isinstance(value, list) else ()
    items = value.items() if isinstance(value, dict) else items
    return [p for key, item in items for p in ((*path, key), *positions(item, (*path, key)))]


class Garbage:
    """Messages of an exchange that has lost its mind, and sometimes finds it again."""

    TEXTS = [
        "", " ", "null", "[]", "{}", "0", '"x"', "NaN", "[" * 5_000, "[" * 5_000 + "]" * 5_000,
        '{"a":' * 5_000, f'{{"topic":"{BOOK}","data":{"[" * 900}1{"]" * 900}}}', "9" * 5_000,
        f'{{"topic":"{BOOK}","type":"delta","u":1e5}}', '{"topic":["x"]}', '{"topic":{}}',
        '{"topic":5}',
        '{"topic":null}', '{"topic":""}', '{"op":"local"}', '{"op":"local","event":"start"}',
        '{"op":"local","event":"lost","reason":"not ours"}', '{"op":"local","event":"lost"}',
        '{"op":"local","event":"raw","text":"{}"}', '{"op":"local","event":"raw","text":5}',
        '{"op" : "local","event":"params","gamma":1}', '{"success":1}',
        '{"success":"true","op":[]}',
        '{"op":"pong"}', '{"ret_msg":"pong"}', '{"success":false}',
        '{"success":false,"ret_msg":{}}',
        '{"topic":"kline.1.BTCUSDT"}', "Failed to decode incoming data:", "\ufeff{}", "\u2028",
        "".join(map(chr, range(128))), '{"topic":"tickers.BTCUSDT"}',
        '{"topic":"publicTrade.BTCUSDT"}',
    ]  # fmt: skip

    def __init__(self, seed: int) -> None:
        self.rng, self.u = random.Random(seed), 1
        self.templates = [json.loads(text) for text in (
            book_text(2, [["100.0", "1"], ["99.9", "0"]], [["100.1", "3"]]),
            book_text(2, [["99.8", "1"]], [["100.1", "0.5"], ["100.2", "0"]]),
            book_text(2, *GOOD, kind="snapshot"),
            trade_text({"i": "1", "L": "PlusTick", "BT": False, "RPI": False}, {"S": "Buy"}),
            ticker_text({"lastPrice": "1", "markPrice": "2.5", "fundingRate": "-1e-4"}),
            *(texts[0] for texts in ANSWERS.values()),
        )]  # fmt: skip
        self.places = [positions(template) for template in self.templates]

    def payload(self) -> bytes:
        """One message: mostly one wound, sometimes none, sometimes many."""
        rng = self.rng
        dice = rng.random()
        if dice < 0.01:
            return rng.choice(self.TEXTS).encode()
        kind = rng.randrange(len(self.templates)) if rng.random() < 0.5 else rng.randrange(3)
        message = copy.deepcopy(self.templates[kind])
        if kind < 3:
            message["data"]["u"] = self.u + 1
        for _ in range(1 if dice < 0.6 else 0 if dice < 0.9 else 4):
            self.wound(message, rng.choice(self.places[kind]))
        text = json.dumps(message, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
        return self.tear(text) if rng.random() < 0.1 else text

    def wound(self, message: dict, path: tuple) -> None:
        """Put junk at a place, or take it away, or wrap it; the place may be gone already."""
        *parents, last = path
        try:
            for key in parents:
                message = message[key]
            dice = self.rng.random()
            if dice < 0.15:
                del message[last]
            elif dice < 0.25:
                message[last] = [message[last]]
            else:
                message[last] = copy.copy(self.rng.choice(JUNK))
        except (KeyError, IndexError, TypeError):
            pass

    def tear(self, text: bytes) -> bytes:
        """Damage below the level of JSON: cut, doubled, or some bytes written over."""
        rng, place = self.rng, self.rng.randrange(len(text))
        over = text[:place] + rng.randbytes(2) + text[place + 2 :]
        return rng.choice((text[:place], text + text[place:], over))


def assert_sound(message: Message, book: OrderBook) -> None:
    """Whatever was let through is fit for arithmetic."""
    assert abs(message.exch_ns - NOW_NS) <= DAY_NS or message.kind in (LOST, REFUSED)
    for exch_ns, side, tick, size, rpi in message.trades:
        assert type(exch_ns) is int and abs(exch_ns - NOW_NS) <= DAY_NS and side in (BID, ASK)
        assert 0 < tick < 2**31 and 0 < size < math.inf and rpi in (True, False)
    if message.kind == TICKER:
        assert all(type(v) is float and math.isfinite(v) for v in message.fields.values())
    take(book, message)
    for side in (BID, ASK):
        ladder = book.ladders[side]
        levels, sizes = getattr(message, "bids" if side == BID else "asks")
        assert all(0 <= size < math.inf for size in sizes)
        assert all(0 < level * side < 2**31 for level in levels)
        assert ladder.best is None or 0 < book.best(side) < 2**31
        assert ladder.best is None or 0 < ladder.size_at(ladder.best) < math.inf


def test_no_garbage_gets_past_the_parser_and_all_of_it_is_counted(parser):
    garbage, book = Garbage(20_260_809), OrderBook(1 << 10)
    take(book, *parse(parser, book_text(1, *GOOD, kind="snapshot")))
    seen = dict.fromkeys((SNAPSHOT, DELTA, TRADES, TICKER, LOST, REFUSED), 0)
    good = book_text(1, *GOOD, kind="snapshot").encode()
    total, lost = sum(parser.counts.values()), False
    for number in range(100_000):
        healed = lost and garbage.rng.random() < 0.5
        payload = good if healed else garbage.payload()
        message = parser.parse(NOW_NS, sound_line(payload))
        before, total = total, sum(parser.counts.values())
        assert total > before, f"message {number} is not counted: {payload[:300]!r}"
        if message is None:
            continue
        seen[message.kind] += 1  # a control line would have no place here
        assert_sound(message, book)
        if message.kind == LOST:
            lost = True
        elif message.kind in (SNAPSHOT, DELTA):
            text = payload.decode("utf-8", "surrogateescape")
            lost, garbage.u = False, json.loads(text)["data"]["u"]
    for side in (BID, ASK):
        sizes = book.ladders[side].sizes
        assert np.isfinite(sizes).all() and (sizes >= 0).all()
    assert min(seen.values()) > 20, f"too tame or too wild: {seen}"


@pytest.mark.parametrize(
    "change", [{"cts": "\n\x1b[2J"}, {"data": {"u": "\ud800"}}, {"type": "\n"}, {"data": {"\n": 1}}]
)
def test_what_is_said_of_a_malformed_message_is_one_printable_line(parser, change):
    parse(parser, book_text(7, *GOOD, kind="snapshot"))
    (lost,) = parse(parser, book_text(8, **change))
    assert lost.kind == LOST
    assert parser.problem.isprintable() and lost.fields["reason"].isprintable()


# ---- Control lines of our own, and look-alikes -------------------------------------

LOOK_ALIKES = [
    '{"op":"local","event":"lost","reason":"x"}',
    '{"event":"start","op" : "local","symbol":"ETHUSDT"}',
    '{"op":"local","event":"raw","text":"{\\"success\\":true}"}',
    '{"op":"\\u006cocal","event":"lost","reason":"x"}',
    '{"\\u006fp":"loc\\u0061l","event":"params","gamma":5}',
]


@pytest.mark.parametrize("text", LOOK_ALIKES)
def test_the_exchange_cannot_speak_in_our_name(parser, text):
    parse(parser, book_text(7, *GOOD, kind="snapshot"))
    assert parse(parser, sound_line(text.encode())) == [None]
    assert parser.counts["malformed"] == 1
    assert kinds(parse(parser, book_text(8))) == [DELTA]


def test_our_control_lines_come_back_with_their_fields(parser):
    (message,) = parse(parser, feed.control_line("params", gamma=0.7, note='"local"\n'))
    assert message.kind == CONTROL and message.recv_ns == NOW_NS
    assert message.fields["event"] == "params" and message.fields["gamma"] == 0.7
    assert message.fields["note"] == '"local"\n'


@pytest.mark.parametrize(
    "payload", [b'{"a":\n1}', b"\xff\xfe", '{"x":"\u20ac\n"}'.encode(), b'"local"', b"\r\n"]
)
def test_an_awkward_message_is_kept_byte_for_byte_on_one_line(payload):
    line = sound_line(payload)
    assert "\n" not in line and line.isascii()
    assert json.loads(line)["text"].encode("utf-8", "surrogateescape") == payload


@pytest.mark.parametrize("payload", [b'{"a": 1}', "{\"\u20ac\":1}".encode(), b"", b"\r", b"\x00 "])
def test_a_plain_message_is_kept_as_it_is(payload):
    assert sound_line(payload).encode() == payload


def test_an_escaped_message_is_parsed_as_the_exchanges_own(parser):
    text = book_text(7, *GOOD, kind="snapshot").replace(", ", ",\n")
    (message,) = parse(parser, sound_line(text.encode()))
    assert message.kind == SNAPSHOT and plain(message.bids) == ([1000, 999], [1.0, 2.0])


# ---- Recordings --------------------------------------------------------------------


def record(path: Path, lines, **options) -> Recorder:
    recorder = Recorder(path, **options)
    for recv_ns, text in lines:
        recorder.write(recv_ns, text)
    recorder.close()
    return recorder


def test_lines_survive_the_round_trip_byte_for_byte(tmp_path):
    payloads = [b"{}", "\u20ac\u2028".encode(), b"a\nb\n", b"\xff\x00", b'"local"', b"", b"x\r"]
    lines = [(NOW_NS + i, sound_line(payload)) for i, payload in enumerate(payloads)]
    record(tmp_path / "r.gz", lines)
    expected = "".join(f"{stamp} {text}\n" for stamp, text in lines).encode()
    assert gzip.decompress((tmp_path / "r.gz").read_bytes()) == expected
    read = list(read_lines(tmp_path / "r.gz"))
    assert read == lines
    for (_, text), payload in zip(read, payloads, strict=True):
        if text.startswith('{"op":"local","event":"raw"'):
            text = json.loads(text)["text"]
        assert text.encode("utf-8", "surrogateescape") == payload


def test_an_existing_file_is_never_overwritten(tmp_path):
    (tmp_path / "r.gz").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"r\.gz exists"):
        Recorder(tmp_path / "r.gz")
    assert (tmp_path / "r.gz").read_bytes() == b"precious"


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="cannot be written") as raised:
        Recorder(tmp_path / "no such folder" / "r.gz")
    assert "\n" not in str(raised.value)


def test_lines_reach_the_disk_when_the_oldest_has_waited_long_enough(tmp_path):
    now = [100.0]
    recorder = Recorder(tmp_path / "r.gz", clock=lambda: now[0])
    recorder.write(1, "a")
    now[0] += 0.4
    recorder.write(2, "b")
    recorder.flush(min_age_s=feed.FLUSH_S)
    assert (tmp_path / "r.gz").read_bytes() == b""
    now[0] += 0.2
    recorder.flush(min_age_s=feed.FLUSH_S)
    assert gzip.decompress((tmp_path / "r.gz").read_bytes()) == b"1 a\n2 b\n"
    now[0] += 9
    recorder.write(3, "c")  # young, though the file is old
    assert gzip.decompress((tmp_path / "r.gz").read_bytes()) == b"1 a\n2 b\n"
    recorder.close()
    assert list(read_lines(tmp_path / "r.gz")) == [(1, "a"), (2, "b"), (3, "c")]


def test_a_file_cut_at_any_byte_of_its_last_member_is_read_up_to_the_cut(tmp_path, caplog):
    now = [0.0]
    recorder = Recorder(tmp_path / "whole.gz", clock=lambda: now[0])
    lines = [(i, f'{{"n":{i},"text":"{i * 7919 % 1000:x}"}}') for i in range(12)]
    for number, line in enumerate(lines):
        now[0] += 0.2
        recorder.write(*line)
        if number == 7:
            recorder.flush()
            first = (tmp_path / "whole.gz").stat().st_size
    recorder.close()
    whole = (tmp_path / "whole.gz").read_bytes()
    for length in range(first, len(whole) + 1):
        path = tmp_path / "cut.gz"
        path.write_bytes(whole[:length])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            read = list(read_lines(path))
        left = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(whole[first:length])
        assert read == lines[: 8 + left.count(b"\n")], f"cut after byte {length} of {len(whole)}"
        assert ("cut" in caplog.text) == (length not in (first, len(whole)))
    assert read == lines


def test_a_last_line_without_its_end_is_left_out_with_a_warning(tmp_path, caplog):
    (tmp_path / "r.gz").write_bytes(gzip.compress(b'5 {"a":1}\n6 {"b":'))
    assert list(read_lines(tmp_path / "r.gz")) == [(5, '{"a":1}')]
    assert "cut" in caplog.text


def test_a_long_awkward_message_does_not_end_the_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(feed, "MAX_MESSAGE", 1_000)
    lines = [(1, sound_line(b"\xff" * 1_000)), (2, "{}")]
    record(tmp_path / "r.gz", lines)
    assert list(read_lines(tmp_path / "r.gz")) == lines


KILLED = """
import sys, time
import feed
recorder = feed.Recorder(sys.argv[1])
for number in range(100_000):
    stamp = time.monotonic_ns()
    recorder.write(stamp, '{"number":%d}' % number)
    print(stamp, number, flush=True)
    time.sleep(0.002)
"""


def run_python(program: str, *arguments, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **options)


def test_a_killed_recorder_leaves_all_but_the_last_second_to_any_gzip(tmp_path):
    path = tmp_path / "r.gz"
    with run_python(KILLED, path) as process:
        written: list[tuple[int, int]] = []
        for line in process.stdout:
            written.append(tuple(map(int, line.split())))
            if written[-1][0] - written[0][0] > 1.8e9:
                break
        os.kill(process.pid, signal.SIGKILL)
        written += [tuple(map(int, line.split())) for line in process.stdout if line.endswith("\n")]
    assert process.returncode == -signal.SIGKILL
    if tool := shutil.which("gzip"):
        unpacked = subprocess.run([tool, "-dc", path], capture_output=True, timeout=60)
        assert unpacked.returncode == 0, unpacked.stderr
        text = unpacked.stdout.decode()
    else:
        text = gzip.decompress(path.read_bytes()).decode()
    expected = [f'{stamp} {{"number":{number}}}' for stamp, number in written]
    old = sum(stamp <= written[-1][0] - 10**9 for stamp, _ in written)
    assert old > 20
    assert text.splitlines()[:old] == expected[:old]
    numbers = [json.loads(text)["number"] for _, text in read_lines(path)]
    assert numbers == list(range(text.count("\n")))


FULL_DISK = """
import os, resource, sys
import feed
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
recorder = feed.Recorder(sys.argv[1], clock=iter(range(10_000)).__next__)
for number in range(200):
    recorder.write(number, os.urandom(500).hex())
recorder.close()
print(recorder.failure)
"""


def test_a_full_disk_stops_the_recording_and_nothing_else(tmp_path):
    with run_python(FULL_DISK, tmp_path / "r.gz") as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors == ""
    assert " stopped: " in output and len(output.split()) > 2
    assert (tmp_path / "r.gz").stat().st_size <= 20_000
    stamps = [stamp for stamp, _ in read_lines(tmp_path / "r.gz")]
    assert 10 < len(stamps) < 200 and stamps == list(range(len(stamps)))


def test_a_missing_file_or_one_that_is_no_gzip_is_one_clear_line(tmp_path):
    (tmp_path / "text.gz").write_text("5 {}\n")
    for path in (tmp_path / "text.gz", tmp_path / "missing.gz", tmp_path):
        with pytest.raises(UserError) as raised:
            list(read_lines(path))
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("bad", ["soon {}", "{}", "", " 7", "1.5 {}"])
def test_a_line_without_a_stamp_is_named_by_its_number(tmp_path, bad):
    (tmp_path / "r.gz").write_bytes(gzip.compress(f"5 {{}}\n6 {{}}\n{bad}\n7 {{}}\n".encode()))
    lines = read_lines(tmp_path / "r.gz")
    assert [next(lines), next(lines)] == [(5, "{}"), (6, "{}")]
    with pytest.raises(UserError, match="line 3"):
        next(lines)


def write_gzip(path: Path, *texts: str, step_ns: int = 10**8) -> Path:
    lines = [f"{NOW_NS + i * step_ns} {text}\n" for i, text in enumerate(texts)]
    path.write_bytes(gzip.compress("".join(lines).encode()))
    return path


def test_a_replay_gives_the_messages_of_the_lines_and_no_stamp_goes_back(tmp_path, parser):
    path = tmp_path / "r.gz"
    first = book_text(7, *GOOD, kind="snapshot")
    rows = [(5, first), (9, "x"), (7, book_text(8)), (12, book_text(9))]
    text = "".join(f"{NOW_NS + stamp} {text}\n" for stamp, text in rows)
    path.write_bytes(gzip.compress(text.encode()))
    messages = list(feed.replay(path, parser))
    assert kinds(messages) == [SNAPSHOT, DELTA, DELTA]
    assert [m.recv_ns - NOW_NS for m in messages] == [5, 9, 12]


def test_a_recordings_start_line_says_what_it_holds(tmp_path):
    start = feed.control_line(
        "start", symbol="ABCUSDT", category="spot", depth=200, tick_size="0.25", lot_size="0.5"
    )
    path = write_gzip(tmp_path / "r.gz", start, book_text(1, topic="orderbook.200.ABCUSDT"))
    parser, header = feed.parser_of_recording(path, None, None, None)
    assert parser.instrument == Instrument("ABCUSDT", "spot", "0.25", "0.5", 0.0)
    assert header.symbol == "ABCUSDT" and header.depths == {200} and header.start["depth"] == 200
    flagged, _ = feed.parser_of_recording(path, "0.5", "1", None)
    assert (flagged.instrument.tick_text, flagged.instrument.lot_text) == ("0.5", "1")


def test_of_several_depths_the_deepest_is_used_unless_one_is_asked_for(tmp_path):
    deep = book_text(50, *GOOD, kind="snapshot", topic="orderbook.1000.BTCUSDT")
    path = write_gzip(tmp_path / "r.gz", book_text(7, *GOOD, kind="snapshot"), deep, book_text(8))
    parser, header = feed.parser_of_recording(path, None, None, None)
    assert header.depths == {200, 1000}
    assert kinds(feed.replay(path, parser)) == [SNAPSHOT] and parser.counts["ignored"] == 2
    parser, _ = feed.parser_of_recording(path, None, None, 200)
    assert kinds(feed.replay(path, parser)) == [SNAPSHOT, DELTA]
    with pytest.raises(UserError, match="50"):
        feed.parser_of_recording(path, None, None, 50)


# ---- Instruments and the command line ----------------------------------------------

LINEAR_ANSWER = {
    "retCode": 0, "retMsg": "OK",
    "result": {"category": "linear", "nextPageCursor": "", "list": [{
        "symbol": "BTCUSDT", "status": "Trading", "priceScale": "2",
        "priceFilter": {"minPrice": "0.10", "maxPrice": "1999999.80", "tickSize": "0.10"},
        "lotSizeFilter": {"maxOrderQty": "1190.000", "minOrderQty": "0.001", "qtyStep": "0.001",
                          "postOnlyMaxOrderQty": "1190.000", "minNotionalValue": "5"},
    }]},
}  # fmt: skip
SPOT_ANSWER = {
    "retCode": 0, "retMsg": "OK",
    "result": {"category": "spot", "list": [{
        "symbol": "BTCUSDT", "innovation": "0",
        "lotSizeFilter": {"basePrecision": "0.000001", "quotePrecision": "0.0000001",
                          "minOrderQty": "0.000011", "maxOrderQty": "83", "minOrderAmt": "5"},
        "priceFilter": {"tickSize": "0.1"},
    }]},
}  # fmt: skip


def test_the_steps_of_an_instrument_are_read_from_bybits_answers():
    linear = parse_instrument(json.dumps(LINEAR_ANSWER), "BTCUSDT", "linear")
    assert linear == Instrument("BTCUSDT", "linear", "0.10", "0.001", 0.001)
    assert (linear.tick_size, linear.lot_size, linear.digits) == (0.1, 0.001, 1)
    spot = parse_instrument(json.dumps(SPOT_ANSWER).encode(), "BTCUSDT", "spot")
    assert spot == Instrument("BTCUSDT", "spot", "0.1", "0.000001", 0.000011)


@pytest.mark.parametrize(
    "answer",
    [
        {"retCode": 10001, "retMsg": "params error: symbol invalid", "result": {}},
        {"retCode": 0, "retMsg": "OK", "result": {"category": "linear", "list": []}},
        {"result": {"list": [{}]}},
        {"result": {"list": [{"lotSizeFilter": None}]}},
        [],
        None,
        "x",
    ],
)
def test_an_unknown_symbol_is_named_with_its_remedy(answer):
    with pytest.raises(UserError, match="XYZUSDT.*--symbol"):
        parse_instrument(json.dumps(answer), "XYZUSDT", "linear")
    with pytest.raises(UserError, match="XYZUSDT"):
        parse_instrument("<html>busy</html>", "XYZUSDT", "linear")


def test_flags_come_before_the_table_and_an_unknown_symbol_needs_both():
    known = feed.known_instrument
    assert known("BTCUSDT", "linear") == Instrument()
    assert known("BTCUSDT", "spot").lot_text == "0.000001"
    assert known("BTCUSDT", "linear", "0.5").tick_text == "0.5"
    assert known("BTCUSDT", "linear", None, "0.01").lot_text == "0.01"
    assert known("ABC", "spot", "0.01", "1") == Instrument("ABC", "spot", "0.01", "1", 0.0)
    for steps in ((), ("0.1",), (None, "0.1")):
        with pytest.raises(UserError, match="ABC.*--tick-size and --lot-size"):
            known("ABC", "spot", *steps)


@pytest.mark.parametrize("text", ["0", "-0.1", "nan", "inf", "x", "", "1e-999"])
def test_a_senseless_step_is_refused_by_its_flag(text):
    with pytest.raises(UserError, match="--tick-size"):
        Instrument(tick_text=text)
    with pytest.raises(UserError, match="--lot-size"):
        Instrument(lot_text=text)


def test_info_prints_what_a_recording_holds(tmp_path, capsys):
    trades = trade_text({"v": "1", "p": "100"}, {"v": "3", "p": "100", "S": "Buy"})
    gap = book_text(11), book_text(12, *GOOD, kind="snapshot")
    path = write_gzip(
        tmp_path / "r.gz",
        feed.control_line("start", symbol="BTCUSDT", category="linear", synthetic=True),
        book_text(7, *GOOD, kind="snapshot"), book_text(8), book_text(8), trades, "broken",
        ticker_text({"lastPrice": "100"}), *gap, *ANSWERS["pongs"], ANSWERS["acks"][0],
        step_ns=10**9,
    )  # fmt: skip
    assert feed.main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    rows = [row.strip() for row in out.splitlines()[1:]]
    facts = {row[:37].strip(): row[37:] for row in rows}
    assert "BTCUSDT linear" in out.splitlines()[0] and "SYNTHETIC" in out.splitlines()[0]
    assert facts["span, s"] == "8.0"  # from the first message that carries something to the last
    assert facts["first message, UTC"] == "2023-11-14 22:13:20"
    counts = {"book": 5, "trades": 1, "tickers": 1, "acks": 1, "pongs": 3, "ignored": 0}
    for name, count in counts.items():
        assert facts[f"messages: {name}"].startswith(f"{count}, ")
    assert [facts[name] for name in ("malformed", "repeated", "gaps", "snapshots")] == [*"1112"]
    assert facts["book lost"] == "1 x gap in u: 11 after 8"
    assert facts["spread, ticks"].startswith("median 1,")
    (sizes,) = (facts[name] for name in facts if name.endswith("trades, base coin each"))
    assert sizes.startswith("median 2,")


def exit_status(arguments: list[str]) -> int:
    try:
        return feed.main(arguments)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["dance"], ["info"], ["info", "missing.gz"], ["info", "text.gz"], ["record"],
        ["info", "good.gz", "--tick-size", "x"], ["info", "good.gz", "--depth", "50"],
        ["info", "good.gz", "--tick-size", "0.3"], ["record", "new.gz", "--category", "options"],
        ["record", "new.gz", "--depth", "7"], ["record", "new.gz", "--minutes", "soon"],
        ["record", "new.gz", "--url", "http://127.0.0.1:1"], ["record", "new.gz", "--url", "ws://"],
        ["record", "new.gz", "--url", "ws://127.0.0.1:1"],
        ["record", "new.gz", "--symbol", "ABC", "--url", "ws://127.0.0.1:1"],
    ],
)  # fmt: skip
def test_a_mistake_of_the_user_ends_with_status_2_and_one_line(
    arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Path("text.gz").write_text("no gzip")
    write_gzip(Path("good.gz"), book_text(7, *GOOD, kind="snapshot"))
    assert exit_status(arguments) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("error: ")
    assert told.err.count("\n") == 1 and told.err.endswith("\n")
    assert not Path("new.gz").exists()
