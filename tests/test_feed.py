"""What the exchange says is understood, or counted: book, tapes, parser, recordings.

Each group compares with something that shares no code with feed.py: a book kept in plain
dicts by exact decimals, the program `gzip`, values worked by hand. No network.
"""

import gzip
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import zlib
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

import feed
from feed import ASK, BID, MS, NO_LEVEL, SIDES, Book, Instrument, Message, Parser, UserError

ROOT = Path(__file__).parent.parent
BOOK, TRADE, TICKERS = "orderbook.200.BTCUSDT", "publicTrade.BTCUSDT", "tickers.BTCUSDT"
NOW_MS = 1_700_000_000_000
NOW_NS = NOW_MS * MS  # receive time
DAY_NS = 86_400 * feed.NS
BOOK_KINDS = feed.SNAPSHOT, feed.DELTA


# ---- Messages by hand, and a book of plain dicts -----------------------------------


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


def session_lines(seed=0, count=300, step_ms=4, snapshots=range(1), quiet=()) -> list:
    """Lines of a session: a book message each step, but for the quiet ones, and others.

    Some rows delete what nobody holds, some name a level twice; at times a side is empty,
    or the book crossed.
    """
    rng, mid, u, lines = random.Random(seed), 5_000, 7_000, []

    def rows(side: int) -> list:
        ticks = [mid - side * rng.randint(0, 30) for _ in range(rng.randint(0, 8))]
        sizes = ["0", "2.50", f"{rng.randint(1, 9999)}e-3"]
        if rng.random() < 0.02:  # nobody is left
            ticks, sizes = range(mid - 40, mid + 41), ["0"]
        return [[f"{tick / 10:.2f}", rng.choice(sizes)] for tick in ticks]

    for number in range(count):
        ms = NOW_MS + number * step_ms
        if number not in quiet:
            u, kind = u + 1, "snapshot" if number in snapshots else "delta"
            mid += rng.randint(-99, 99) if kind == "snapshot" else 0
            lines.append((ms * MS, book_text(u, rows(BID), rows(ASK), kind, ts=ms, cts=ms)))
        if number % 4 == 3 and number not in quiet:
            lines.append((ms * MS, trade_text({"T": ms}, {"T": ms, "S": "Buy"}, ts=ms)))
        if number % 5 == 0:
            lines.append((ms * MS, ticker_text({"lastPrice": f"{mid + number}"}, ts=ms)))
    return lines


GOOD = (("100.0", "1"), ("99.9", "2")), (("100.1", "3"), ("100.2", "4"))
GOOD_LEVELS = {BID: {1000: 1.0, 999: 2.0}, ASK: {-1001: 3.0, -1002: 4.0}}
FIRST = book_text(7, *GOOD, kind="snapshot")


@pytest.fixture
def parser() -> Parser:
    return Parser(Instrument())


def parse(parser: Parser, *texts: str) -> list[Message | None]:
    return [parser.parse(NOW_NS, text) for text in texts]


def letters(messages) -> str:
    """A letter for the kind of each message: delta, trades, ticKer, ...; - for nothing."""
    return "".join("DTKSLCR"[message.kind] if message else "-" for message in messages)


def levels_of(book: Book) -> dict[int, dict[int, float]]:
    return {side: dict(zip(*(column.tolist() for column in book.levels(side)))) for side in SIDES}


class PlainBook:
    """A book as one would write it in an evening: a dict of level to size on each side."""

    def __init__(self, tick: str = "0.1") -> None:
        self.tick, self.sides = Decimal(tick), {BID: {}, ASK: {}}

    def apply(self, text: str) -> None:
        message = json.loads(text)
        for side, name in ((BID, "b"), (ASK, "a")):
            old = {} if message["type"] == "snapshot" else self.sides[side]
            rows = {side * int(Decimal(p) / self.tick): float(s) for p, s in message["data"][name]}
            self.sides[side] = {level: size for level, size in (old | rows).items() if size}

    def ends(self) -> tuple[int, ...]:
        """Best bid, best ask, worst bid, worst ask."""
        best = [max(levels, default=NO_LEVEL) for levels in self.sides.values()]
        return *best, *(min(levels, default=-NO_LEVEL) for levels in self.sides.values())

    def depth(self, side: int, band_bps: str) -> float:
        """In exact decimals. 0 where there is no mid."""
        bid, ask, *_ = self.ends()
        floor = Decimal(bid - ask) / 2 * (side - Decimal(band_bps) / 10_000)
        has_mid = NO_LEVEL not in (bid, ask) and bid < -ask
        return math.fsum(s for level, s in self.sides[side].items() if level >= floor and has_mid)


def assert_same(book: Book, plain: PlainBook) -> None:
    """Everything that a book can be asked for, against the dicts."""
    assert levels_of(book) == plain.sides and book.view[:4] == plain.ends()
    for side, held in plain.sides.items():
        assert list(book.levels(side)[0]) == sorted(held, reverse=True)
        for level in range(min(held, default=998) - 2, max(held, default=998) + 3):
            hidden = 0.0 if held and level > min(held) else math.inf
            assert book.shown(side, level) == held.get(level, hidden)
        for band in ("3.33", "33.3", "9000"):  # no level lies on such an edge
            depth = plain.depth(side, band)
            assert book.depth(side, float(band)) == pytest.approx(depth, rel=1e-12)


# ---- Order book and tapes ----------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_messages_one_by_one_leave_the_book_that_plain_dicts_leave(parser, seed):
    plain = PlainBook()
    for recv_ns, text in session_lines(seed, 400, snapshots=range(0, 400, 40)):
        message = parser.parse(recv_ns, text)
        if BOOK in text:
            plain.apply(text)
        assert message.view == parser.book.view
        assert_same(parser.book, plain)


def test_slices_of_a_tape_leave_the_book_that_its_messages_leave_one_by_one(parser):
    messages, book, rng, start = [], Book(), random.Random(5), 0
    for line in session_lines(5, 300, snapshots=range(0, 300, 40)):
        messages.append(parser.parse(*line))
        if messages[-1].kind == feed.SNAPSHOT:
            book.clear()
            start = len(messages) - 1
        if rng.random() < 0.3:
            tape = feed.build_tape(messages)
            book.apply(tape, start, len(tape))
            start = len(tape)
            assert levels_of(book) == levels_of(parser.book)
            np.testing.assert_equal(book.view, parser.book.view)
            np.testing.assert_equal(tape.view(start - 1), parser.book.view)
            assert book.exch_ns == max(m.exch_ns for m in messages if m.kind in BOOK_KINDS)


def test_a_tape_cut_anywhere_and_joined_is_the_whole(parser):
    messages = [parser.parse(*line) for line in session_lines(6)]
    messages += parse(parser, feed.control_line("end"))
    whole = feed.build_tape(messages)
    for cut in (0, 1, 2, 77, len(messages)):
        parts = feed.build_tape(messages[:cut]), feed.build_tape(messages[cut:])
        for name in feed.COLUMNS:
            first, second = (getattr(part, name) for part in parts)
            joined = [*first, *second]
            if name.startswith("first_"):
                joined = [*first[:-1], *(second + first[-1])]
            elif name == "notes":
                joined = first | {m + cut: note for m, note in second.items()}
            np.testing.assert_equal(joined, getattr(whole, name), err_msg=name)


def test_a_tape_keeps_rows_trades_and_notes_apart_and_in_order(parser):
    buy = {"S": "Buy", "v": "2", "p": "65114.3", "T": NOW_MS, "RPI": True}
    texts = trade_text({}, buy), feed.control_line("params"), book_text(8, [["99.8", "7"]])
    tape = feed.build_tape(parse(parser, FIRST, *texts))
    expected = dict(
        kind=[feed.SNAPSHOT, feed.TRADES, feed.CONTROL, feed.DELTA], last_book=[0, 0, 0, 3],
        best_bid=[1000] * 4, best_ask=[-1001] * 4, worst_bid=[999] * 3 + [998],
        first_row=[0, 4, 4, 4, 5], level=[1000, 999, -1001, -1002, 998], size=[1, 2, 3, 4, 7],
        first_trade=[0, 0, 2, 2, 2], trade_ns=[(NOW_MS - 3) * MS, NOW_MS * MS],
        trade_level=[651142, -651143], trade_size=[0.004, 2], trade_is_rpi=[0, 1],
    )  # fmt: skip
    assert {name: getattr(tape, name).tolist() for name in expected} == expected
    assert tape.best(ASK) is tape.best_ask and list(tape.notes) == [2]


@pytest.mark.parametrize(
    ("bid", "ask", "fault", "mid"),
    [(1000, -1001, "", 1000.5), (1001, -1001, "book crossed", math.nan),
     (NO_LEVEL, -5, "book one-sided", math.nan), (5, NO_LEVEL, "book one-sided", math.nan)],
)  # fmt: skip
def test_a_view_has_a_mid_price_unless_its_book_has_a_fault(bid, ask, fault, mid):
    view = feed.View(bid, ask, 3, -9)
    assert view.fault == fault and view.mid_ticks == pytest.approx(mid, nan_ok=True)
    assert [view.best(BID), view.best(ASK), view.worst(BID), view.worst(ASK)] == [bid, ask, 3, -9]


def test_both_sides_are_taken_before_a_book_is_called_crossed_and_they_never_meet(parser):
    up = [["100.3", "1"]], [["100.1", "0"], ["100.2", "0"], ["100.4", "5"]]
    ends = [["800000", "5"], ["0.1", "6"]], [["800000", "7"], ["0.1", "8"]]
    *_, moved, crossed = parse(parser, FIRST, book_text(8, *up), book_text(9, *ends))
    assert moved.view.fault == "" and crossed.view.fault == "book crossed"
    assert levels_of(parser.book) == {
        BID: {8_000_000: 5, 1003: 1, 1000: 1, 999: 2, 1: 6}, ASK: {-1: 8, -1004: 5, -8_000_000: 7},
    }  # fmt: skip


# ---- Real recordings ---------------------------------------------------------------


SAMPLE = ROOT / "data" / "sample.jsonl.gz"
FOLDER = os.environ.get("RECORDINGS")
REAL = pytest.mark.skipif(not FOLDER, reason="RECORDINGS names no folder of real recordings")
PATHS = sorted(Path(FOLDER).glob("*.jsonl.gz")) if FOLDER else [Path("none")]


@pytest.mark.parametrize(
    "path", [SAMPLE, *(pytest.param(path, marks=REAL) for path in PATHS)], ids=lambda path: path.stem
)
def test_a_recording_gives_the_book_of_plain_dicts_at_every_message(path):
    parser = feed.open_recording(path).parser
    plain = PlainBook(parser.instrument.tick_text)
    for number, (recv_ns, text) in zip(range(25_000), feed.read_lines(path)):
        message = parser.parse(recv_ns, text)
        if '"orderbook.' in text and (number < 4_000 or path != SAMPLE):
            plain.apply(text)
            assert message.view[:4] == plain.ends(), f"line {number}"
            depth = [plain.depth(side, "1") for side in SIDES]
            assert [parser.book.depth(side, 1.0) for side in SIDES] == pytest.approx(depth)
    assert parser.counts["book"] > 300
    assert not any(parser.counts[name] for name in ("malformed", "losses", "gaps", "repeated"))


# ---- What becomes of the exchange's words ------------------------------------------


@pytest.mark.parametrize(
    ("sent", "expected", "counts"),  # sent is u of a delta, S and u of a snapshot
    [("S7 8 9", "SDD", {}),
     ("S7 8 8 7 3 9", "SD---D", {"repeated": 3}),  # sent again, or too old
     ("S7 9 10 8 S20 21", "SL--SD", {"gaps": 1}),  # told once, until a snapshot
     ("S7 9 S20 22", "SLSL", {"gaps": 2, "losses": 2}),
     ("7 8 S9 10", "L-SD", {"before snapshot": 2}),
     ("S7 8 1 2", "SDSD", {"gaps": 0, "repeated": 0}),  # the service has restarted
     ("S7 8 S1 2", "SDSD", {"gaps": 0, "repeated": 0}),
     ("S7 8 S4 5", "SDSD", {"gaps": 0, "repeated": 0}),  # a snapshot in mid stream
     ("S7 8 S50 51", "SDSD", {"gaps": 0}),
     ("S7 lost 8 9 S9", "SLL-S", {"before snapshot": 2}),  # by the connection
     ("S7 broken broken 9 S9 10", "SL--SD", {"malformed": 2})],
)  # fmt: skip
def test_the_count_of_its_messages_decides_whether_a_book_is_trusted(
    parser, sent, expected, counts
):
    texts = {"lost": feed.control_line("lost", reason="closed"), "broken": book_text(8, type="x")}
    for word in set(sent.split()) - set(texts):
        kind = "snapshot" if "S" in word else "delta"
        texts[word] = book_text(int(word.strip("S")), *GOOD, kind=kind)
    assert letters(parse(parser, *map(texts.get, sent.split()))) == expected
    assert {name: parser.counts[name] for name in counts} == counts


UNSOUND_ROWS = [
    ["99.8"], ["99.8", "1", "1"], ["99.8", 1], [99.8, "1"], "ab", {"99.8": "1"}, None, 5,
    ["99.8", "-1"], ["99.8", "nan"], ["99.8", "inf"], ["99.8", "1e16"], ["99.8", ""],
    ["0", "1"], ["-5", "1"], ["NaN", "1"], ["1e400", "1"], ["1e999999999", "1"], ["x", "1"],
    [["99.8"], "1"], [True, "1"], ["99.85", "1"], ["800000.1", "1"],
]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"data": {"u": 8, "b": [["99.7", "1"], row], "a": []}} for row in UNSOUND_ROWS]
    + [{"data": {}}, {"data": None}, {"cts": None}, {"cts": float(NOW_MS)}, {"cts": "\n\x1b[2J"},
       {"cts": NOW_MS + 90_000_000}, {"data": {"u": "\ud800"}}, {"data": {"\n": 1}}],
)  # fmt: skip
def test_a_malformed_book_message_loses_the_book_in_words_and_changes_none_of_it(parser, change):
    messages = parse(parser, FIRST, book_text(8, **change), book_text(9))
    assert letters(messages) == "SL-" and parser.counts["malformed"] == 1
    assert messages[1].note["reason"].isprintable() and parser.problem.isprintable()
    assert levels_of(parser.book) == GOOD_LEVELS


ANSWERS = [  # as Bybit documents them: spot, then linear; one pong is the private socket's
    '{"success":true,"ret_msg":"subscribe","conn_id":"2324d924","req_id":"1","op":"subscribe"}',
    '{"success":true,"ret_msg":"","conn_id":"3cd84cb1","req_id":"","op":"subscribe"}',
    '{"success":true,"ret_msg":"pong","conn_id":"0970e817","op":"ping"}',
    '{"success":true,"ret_msg":"pong","conn_id":"465772b1","req_id":"","op":"ping"}',
    '{"req_id":"test","op":"pong","args":["1675418560633"],"conn_id":"cfcb4ocsvfriu23r3er0"}',
    '{"topic":"kline.1.BTCUSDT","data":[{"start":1}],"ts":1,"type":"snapshot"}',
    '{"topic":"orderbook.1.BTCUSDT","type":"snapshot","ts":1,"data":{"u":1}}',
    '{"topic":"orderbook.200.ETHUSDT","type":"delta","ts":1,"data":{"u":3}}',
]
UNSOUND_TRADES = [
    {"v": "0"}, {"v": "-1"}, {"v": "nan"}, {"v": 1}, {"S": "buy"}, {"S": None}, {"p": 65114.2},
    {"p": "65114.25"}, {"T": "1"}, {"T": NOW_MS + 90_000_000}, {"T": 10**400}, {"T": True},
    {"T": float(NOW_MS)},
]  # fmt: skip
LOOK_ALIKES = [  # of lines of our own
    '{"op":"local","event":"lost","reason":"x"}', '{"event":"start","op" : "local"}',
    '{"op":"local","event":"raw","text":"{\\"success\\":true}"}',
    '{"op":"\\u006cocal","event":"lost","reason":"x"}', '{"\\u006fp":"loc\\u0061l","event":"x"}',
]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "text"),
    [*zip(["acks"] * 2 + ["pongs"] * 3 + ["ignored"] * 3, ANSWERS)]
    + [("malformed", trade_text({}, change)) for change in UNSOUND_TRADES]
    + [("malformed", ticker_text({"lastPrice": "3", "markPrice": value}))
       for value in ("nan", "inf", "-1", "0", "x", 5, True, [], "1e999")]
    + [("malformed", feed.sound_line(text.encode())) for text in LOOK_ALIKES]
    + [("block trades", trade_text({"BT": True}))],
)  # fmt: skip
def test_what_carries_nothing_is_counted_and_changes_nothing(parser, count, text):
    messages = parse(parser, FIRST, text, book_text(8))
    assert letters(messages) == "S-D" and parser.counts[count] == 1
    assert levels_of(parser.book) == GOOD_LEVELS and math.isnan(messages[2].view.last_price)


@pytest.mark.parametrize(
    ("text", "tick", "ticks"),
    [("64474.20", "0.10", 644742), ("64474", "0.1", 644740), ("16542.75", "0.01", 1654275),
     ("28552.5", "0.5", 57105), ("70000", "5", 14000), ("0.00001234", "0.00000001", 1234)]
    + [(form.format(Decimal(ticks).scaleb(-1)), "0.1", ticks) for form in ("{}", "{}0", "{:e}")
       for ticks in (*range(1, 100), *range(650_000, 650_020), feed.MAX_TICK)],
)  # fmt: skip
def test_every_form_of_a_price_becomes_exact_ticks(text, tick, ticks):
    assert [feed.level_of(text, Decimal(tick), side) for side in SIDES] == [ticks, -ticks]


def test_a_price_off_the_grid_is_the_users_to_mend_at_first_and_malformed_later(parser):
    for text in ("64474.15", "0.05", "64474.1000001"):
        with pytest.raises(UserError, match=f"{text}.*--tick-size"):
            parse(parser, book_text(7, [[text, "1"]], [["100.1", "1"]], kind="snapshot"))
    wrong = book_text(8, [["100.05", "1"]])
    messages = parse(parser, trade_text({"p": "65114.25"}), FIRST, wrong, wrong, FIRST)
    assert letters(messages) == "-SL-S" and "--tick-size" in messages[2].note["reason"]


def test_the_order_of_keys_does_not_matter_and_without_cts_the_book_shows_ts(parser):
    line = json.loads(FIRST)
    line["data"] = dict(reversed(line["data"].items()))
    turned = json.dumps(dict(reversed(line.items())))
    del line["cts"]
    first, second, third = parse(parser, FIRST, turned, json.dumps(line))
    assert first == second and first.recv_ns == NOW_NS
    assert first.exch_ns == (NOW_MS - 2) * MS and third.exch_ns == NOW_NS


def test_a_trade_tells_the_level_that_it_hits_and_its_own_time(parser):
    buy = {"S": "Buy", "p": "65114.3", "v": "1.5", "RPI": True, "T": NOW_MS - 1}
    block = {"BT": True, "v": "9"}  # left out: it was negotiated outside the book
    (message,) = parse(parser, trade_text({"L": "x"}, block, buy))
    sell_ns, buy_ns = (NOW_MS - 3) * MS, (NOW_MS - 1) * MS
    assert [*message.trades] == [(sell_ns, 651142, 0.004, False), (buy_ns, -651143, 1.5, True)]
    assert message.exch_ns == buy_ns


def test_a_ticker_changes_only_what_it_names_and_a_new_book_does_not_touch_it(parser):
    full = {"lastPrice": "65114.30", "markPrice": "65117.44", "indexPrice": "1", "preOpenPrice": ""}
    empty = {"markPrice": "", "lastPrice": None}
    fields = {"lastPrice": "9"}, full, {"markPrice": "65117.43"}, empty
    messages = parse(parser, *map(ticker_text, fields), FIRST)
    assert letters(messages) == "KKKKS" and math.isnan(messages[0].view.mark_price)
    last_and_mark = [message.view[4:] for message in messages[1:]]
    assert last_and_mark == [(65114.3, 65117.44)] + [(65114.3, 65117.43)] * 3


def test_a_refusal_is_passed_on_in_the_exchanges_words(parser):
    words = "error:handler not found,topic:orderbook.500.BTCUSDT"
    (message,) = parse(parser, json.dumps({"success": False, "ret_msg": words + "\n"}))
    assert message.kind == feed.REFUSED and message.note == {"reason": words + "?"}


# ---- Garbage -----------------------------------------------------------------------

JUNK = [
    *"""null true false 0 -1 1 1.5 -0.0 1e308 1e999 -1e999 NaN Infinity 9223372036854775808 "" "x"
    "ab" "NaN" "nan" "Infinity" "-inf" "1e999" "-5" "0" "1e-400" "1e999999999" "1_0" [] {} [[]]
    ["ab"] [["1"]] [["1","2","3"]] [["100.0","1"]] [["100.05","1"]] {"b":1} "Buy" "delta" "local"
    "snapshot" 1700000000000 1701000000000 1700000000000.0 [null] [{}] [[[]]] "\\n" "\\u0000"
    "\\u0661\\u0662" "\u20ac\\ud800" "orderbook.200.BTCUSDT" """.split(),
    "", '" 1 "', f'"{"9" * 400}"', "1" + "0" * 400, "[" * 5_000, '{"a":' * 5_000, "\udcff\udcfe",
]  # fmt: skip
TEXTS = """null [] {} 0 "x" NaN {"topic":["x"]} {"topic":{}} {"topic":5} {"topic":null}
    {"op":"local"} {"op":"local","event":"raw","text":5} {"success":1} {"success":"true","op":[]}
    {"ret_msg":"pong"} {"success":false,"ret_msg":{}} Failed \ufeff{} {"topic":"tickers.BTCUSDT"}
    {"topic":"publicTrade.BTCUSDT"}""".split()
TEMPLATES = [
    book_text(2, [["100.0", "1"], ["99.9", "0"]], [["100.1", "3"]]), FIRST,
    book_text(2, [["99.8", "1"]], [["100.1", "0.5"], ["100.2", "0"]]),
    trade_text({"i": "1", "L": "PlusTick", "BT": False, "RPI": False}, {"S": "Buy"}),
    ticker_text({"lastPrice": "1", "markPrice": "2.5"}), ANSWERS[0], ANSWERS[2], ANSWERS[5],
]  # fmt: skip
PARTS = [r'"[^"]*"', r"[-\d.e]+|true|false", r"\[[^][]*\]", r"\{[^{}]*\}", r"\[.*\]", r"...", "$"]


def garbage(rng: random.Random, u: int) -> bytes:
    """A message of an exchange that has lost its mind, and sometimes finds it again."""
    if rng.random() < 0.01:
        return rng.choice(TEXTS).encode()
    text = rng.choice(TEMPLATES if rng.random() < 0.5 else TEMPLATES[:3])
    text = text.replace('"u": 2', f'"u": {u}')
    for _ in range(rng.choice((0, 0, 1, 1, 1, 4))):
        if parts := [*re.finditer(rng.choice(PARTS), text)]:
            part = rng.choice(parts)
            junk = rng.choice(JUNK) if rng.random() < 0.9 else f"[{part[0]}]"
            text = text[: part.start()] + junk + text[part.end() :]
    return text.encode("utf-8", "surrogateescape")


def assert_sound(message: Message) -> None:
    """Whatever was let through is fit for arithmetic."""
    for exch_ns, level, size, is_rpi in (*message.trades, (message.exch_ns or NOW_NS, 1, 1, True)):
        assert type(exch_ns) is int and abs(exch_ns - NOW_NS) <= DAY_NS
        assert 0 < abs(level) <= feed.MAX_TICK and 0 < size < math.inf and type(is_rpi) is bool
    for level, size in zip(*message.rows):
        assert 0 < abs(level) <= feed.MAX_TICK and 0 <= size < math.inf
    assert all(price > 0 or math.isnan(price) for price in message.view[4:])
    for side in SIDES:
        best, worst = message.view.best(side), message.view.worst(side)
        assert best == NO_LEVEL == -worst or 0 < worst * side <= feed.MAX_TICK and worst <= best


def test_no_garbage_gets_past_the_parser_and_all_of_it_is_counted(parser):
    rng, seen, total, is_lost, u = random.Random(20_260_809), "", 0, True, 1
    for number in range(100_000):
        is_healed = is_lost and rng.random() < 0.5
        payload = FIRST.encode() if is_healed else garbage(rng, u + 1)
        message = parser.parse(NOW_NS, feed.sound_line(payload))
        before, total = total, sum(parser.counts.values())
        assert total > before, f"message {number} is not counted: {payload[:300]!r}"
        if message is not None:
            assert_sound(message)
            seen += letters([message])
            if seen[-1] in "SDL":
                is_lost, u = seen[-1] == "L", parser.last_u or 1
    for side in SIDES:
        assert all(0 < size < math.inf for size in parser.book.levels(side)[1])
    assert all(seen.count(letter) > 20 for letter in "SDLTKR"), "too tame or too wild"
    assert "C" not in seen, "the exchange has spoken in our name"


# ---- Recordings --------------------------------------------------------------------


def record(path: Path, *texts: str, stamps=None) -> Path:
    """A recording with a line a second."""
    recorder = feed.Recorder(path)
    for second, text in enumerate(texts):
        recorder.record(NOW_NS + (stamps[second] if stamps else second * feed.NS), text)
    recorder.close()
    return path


def test_any_message_stands_on_one_line_and_comes_back_byte_for_byte(tmp_path):
    plain = [b'{"a": 1}', '{"\u20ac":"\u2028"}'.encode(), b"", b"x\r", b"\x00 "]
    awkward = [b'{"a":\n1}', b"\xff\xfe", '{"x":"\u20ac\n"}'.encode(), b'"local"', b"\r\n", b"\\"]
    texts = [feed.sound_line(payload) for payload in plain + awkward]
    path = record(tmp_path / "r.gz", *texts)
    expected = [f"{NOW_NS + i * feed.NS} {text}".encode() for i, text in enumerate(texts)]
    assert gzip.decompress(path.read_bytes()).split(b"\n") == [*expected, b""]
    assert [text for _, text in feed.read_lines(path)] == texts
    raw = [json.loads(text)["text"] for text in texts[len(plain) :]]
    back = [text.encode("utf-8", "surrogateescape") for text in texts[: len(plain)] + raw]
    assert back == plain + awkward


def test_our_own_lines_and_escaped_ones_of_the_exchange_come_back_as_they_were(parser):
    ours = feed.control_line("params", gamma=0.7, text='"local"\n')
    escaped = feed.sound_line(FIRST.replace(", ", ",\n").encode())
    control, snapshot, plain = parse(parser, ours, escaped, FIRST)
    assert control.note == {"op": "local", "event": "params", "gamma": 0.7, "text": '"local"\n'}
    assert control.kind == feed.CONTROL and snapshot == plain


def test_a_recorder_overwrites_nothing_and_needs_a_folder(tmp_path):
    (tmp_path / "r.gz").write_bytes(b"precious")
    for name, words in (("r.gz", "r.gz exists"), ("absent/r.gz", "r.gz cannot be written")):
        with pytest.raises(UserError, match=words):
            feed.Recorder(tmp_path / name)
    assert (tmp_path / "r.gz").read_bytes() == b"precious"


def test_lines_reach_the_disk_when_the_oldest_has_waited_long_enough(tmp_path, monkeypatch):
    now_s, on_disk, recorder = [100.0], [], feed.Recorder(tmp_path / "r.gz")
    monkeypatch.setattr(feed.time, "monotonic", lambda: now_s[0])
    for wait_s, text in ((0, "a"), (0.4, "b"), (0.2, ""), (9, "c")):  # c is young
        now_s[0] += wait_s
        if text:
            recorder.record(1, text)
        recorder.flush(feed.FLUSH_S)
        on_disk.append(gzip.decompress(recorder.path.read_bytes()))
    assert on_disk == [b"", b"", b"1 a\n1 b\n", b"1 a\n1 b\n"]
    recorder.close()
    assert gzip.decompress(recorder.path.read_bytes()) == b"1 a\n1 b\n1 c\n"


def test_a_file_cut_at_any_byte_of_its_last_member_is_read_up_to_the_cut(tmp_path, caplog):
    texts = [f'{{"n":{i},"text":"{i * 7919 % 1000:x}"}}' for i in range(12)]
    first = record(tmp_path / "first.gz", *texts[:8]).read_bytes()
    second = record(tmp_path / "second.gz", *texts[8:]).read_bytes()
    for length in range(len(second) + 1):
        (tmp_path / "cut.gz").write_bytes(first + second[:length])
        caplog.clear()
        read_texts = [text for _, text in feed.read_lines(tmp_path / "cut.gz")]
        left = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(second[:length])
        assert read_texts == texts[: 8 + left.count(b"\n")], f"cut after byte {length}"
        assert ("cut off after line" in caplog.text) == (0 < length < len(second))


KILLED = """
import itertools, sys, time
import feed
recorder = feed.Recorder(sys.argv[1])
for number in itertools.count():
    stamp = time.monotonic_ns()
    recorder.record(stamp, '{"number":%d}' % number)
    print(stamp, flush=True)
    time.sleep(0.002)
"""


def test_a_killed_recorder_leaves_all_but_the_last_second_to_any_gzip(tmp_path):
    path, stamps = tmp_path / "r.gz", []
    command = [sys.executable, "-c", KILLED, path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while not stamps or stamps[-1] - stamps[0] < 1.6 * feed.NS:
            stamps.append(int(process.stdout.readline()))
        process.kill()
    text = gzip.decompress(path.read_bytes()).decode()
    if tool := shutil.which("gzip"):
        assert subprocess.check_output([tool, "-dc", path], text=True) == text
    old = sum(stamp <= stamps[-1] - feed.NS for stamp in stamps)
    expected = [f'{stamp} {{"number":{number}}}' for number, stamp in enumerate(stamps)]
    assert old > 20 and text.splitlines()[:old] == expected[:old]


@pytest.mark.parametrize("bad", ["soon {}", "{}", "", " 7", "1.5 {}", "-1 {}", f"{2**63} {{}}"])
def test_a_line_without_a_stamp_is_named_by_its_number(tmp_path, bad):
    (tmp_path / "r.gz").write_bytes(gzip.compress(f"5 {{}}\n6 {{}}\n{bad}\n7 {{}}\n".encode()))
    lines = feed.read_lines(tmp_path / "r.gz")
    assert [next(lines), next(lines)] == [(5, "{}"), (6, "{}")]
    with pytest.raises(UserError, match="line 3"):
        next(lines)


def test_a_last_line_without_its_end_is_left_out_with_a_warning(tmp_path, caplog):
    (tmp_path / "r.gz").write_bytes(gzip.compress(b'5 {"a":1}\n6 {"b":'))
    assert list(feed.read_lines(tmp_path / "r.gz")) == [(5, '{"a":1}')]
    assert "cut off after line 1" in caplog.text


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "best.json"
    feed.write_whole(path, lambda draft: draft.write_text("old"))
    with pytest.raises(ZeroDivisionError):
        feed.write_whole(path, lambda draft: draft.write_text("ne") / 0)
    assert path.read_text() == "old"


def test_a_recording_gives_the_messages_of_its_lines_and_no_stamp_goes_back(tmp_path):
    texts = FIRST, "x", book_text(8), book_text(9)
    path = record(tmp_path / "r.gz", *texts, stamps=[5, 9, 7, 12])
    messages = list(feed.open_recording(path).messages())
    assert letters(messages) == "SDD"
    assert [message.recv_ns - NOW_NS for message in messages] == [5, 9, 12]


def test_a_recordings_start_line_says_what_it_holds_unless_a_flag_does(tmp_path):
    steps = dict(tick_size="0.25", lot_size="0.5")
    start = feed.control_line("start", symbol="ABCUSDT", category="spot", depth=200, **steps)
    path = record(tmp_path / "r.gz", start, book_text(1, topic="orderbook.200.ABCUSDT"))
    recording, flagged = feed.open_recording(path), feed.open_recording(path, "0.5", "1")
    assert recording.parser.instrument == Instrument("ABCUSDT", "spot", "0.25", "0.5", 0.0)
    assert flagged.parser.instrument == Instrument("ABCUSDT", "spot", "0.5", "1", 0.0)


def test_of_several_depths_the_deepest_is_used_unless_one_is_asked_for(tmp_path):
    deep = book_text(50, *GOOD, kind="snapshot", topic="orderbook.1000.BTCUSDT")
    path = record(tmp_path / "r.gz", FIRST, deep, book_text(8))
    assert letters(feed.open_recording(path).messages()) == "S"
    assert letters(feed.open_recording(path, depth=200).messages()) == "SD"
    with pytest.raises(UserError, match=r"no depth 50: it has \[200, 1000\]"):
        feed.open_recording(path, depth=50)


# ---- Instruments and the command line ----------------------------------------------


def find(monkeypatch, page: bytes | Exception, *given) -> Instrument:
    """find_instrument, while Bybit's REST endpoint answers with a page or an error."""

    def urlopen(request, timeout):
        if isinstance(page, Exception):
            raise page
        return io.BytesIO(page)

    monkeypatch.setattr(feed.urllib.request, "urlopen", urlopen)
    return feed.find_instrument(*given, ask=True)


def answer(tick: str, **lot) -> bytes:
    """Bybit's for one symbol, shortened."""
    entry = {"priceFilter": {"tickSize": tick}, "lotSizeFilter": lot}
    return json.dumps({"retCode": 0, "result": {"list": [entry]}}).encode()


def test_steps_come_from_flags_before_bybits_answer_before_the_table(monkeypatch):
    linear = answer("0.20", minOrderQty="0.004", qtyStep="0.002", maxOrderQty="1190.000")
    spot = answer("0.01", minOrderQty="0.000011", basePrecision="0.000001")
    asked = find(monkeypatch, linear, "BTCUSDT", "linear", None, None)
    assert asked == Instrument("BTCUSDT", "linear", "0.20", "0.002", 0.004)
    assert (asked.tick_size, asked.min_order, asked.digits) == (0.2, 0.004, 1)
    assert find(monkeypatch, linear, "BTCUSDT", "linear", "0.5", None).tick_text == "0.5"
    asked = find(monkeypatch, spot, "BTCUSDT", "spot", None, "0.1")
    assert asked == Instrument("BTCUSDT", "spot", "0.01", "0.1", 0.000011)
    silent = AssertionError("it must not be asked")
    both = find(monkeypatch, silent, "ABC", "spot", "0.01", "1")
    assert both == Instrument("ABC", "spot", "0.01", "1", 0.0)
    assert feed.find_instrument("BTCUSDT", "linear", None, "3") == Instrument(lot_text="3")


@pytest.mark.parametrize("page", [OSError("no route"), b"<html>busy</html>", b""])
def test_where_bybit_cannot_be_asked_the_table_serves_and_others_need_flags(monkeypatch, page):
    assert find(monkeypatch, page, "BTCUSDT", "linear", None, None) == Instrument()
    for steps in ((None, None), ("0.1", None), (None, "0.1")):
        with pytest.raises(UserError, match="ABC.*--tick-size and --lot-size"):
            find(monkeypatch, page, "ABC", "spot", *steps)


@pytest.mark.parametrize(
    "page", [b'{"retCode":10001,"result":{}}', b"{broken", b'{"result":{"list":[]}}',
             b'{"result":{"list":[{}]}}', answer("0.1", minOrderQty="1")],
)  # fmt: skip
def test_a_symbol_that_bybit_does_not_know_is_named_with_its_remedy(monkeypatch, page):
    with pytest.raises(UserError, match="XYZUSDT.*--symbol"):
        find(monkeypatch, page, "XYZUSDT", "linear", None, None)


@pytest.mark.parametrize("text", ["0", "-0.1", "nan", "inf", "x", "", "1e-999", None, []])
def test_a_senseless_step_is_refused_by_its_flag(text):
    for flag, name in (("--tick-size", "tick_text"), ("--lot-size", "lot_text")):
        with pytest.raises(UserError, match=flag):
            Instrument(**{name: text})


def test_info_prints_what_a_recording_holds(tmp_path, capsys):
    path = record(
        tmp_path / "r.gz", feed.control_line("start", symbol="BTCUSDT", synthetic=True),
        FIRST, book_text(8), book_text(8), "broken", ticker_text({"lastPrice": "100"}),
        trade_text({"v": "1"}, {"v": "3", "S": "Buy"}), book_text(11),
        book_text(12, [["100.0", "1"]], [["100.3", "1"]], kind="snapshot"),
        book_text(13, [["100.0", "0"]]), *ANSWERS[1:5],
    )  # fmt: skip
    assert feed.main(["info", str(path)]) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    facts = {row[:39].strip(): row[39:] for row in rows}
    assert "BTCUSDT linear, SYNTHETIC" in title
    expected = {
        "first message, UTC": "2023-11-14 22:13:20", "messages": "8", "snapshots": "2",
        "span, s": "9.0",  # from the first message that carries something to the last
        "book": "6", "trades": "1", "tickers": "1", "acks": "1", "pongs": "3", "malformed": "1",
        "repeated": "1", "gaps": "1", "book lost 1 times": "gap in u: 11 after 8",
        "crossed or one-sided books": "1", "spread, ticks": "median 1, 1 % 1, 99 % 2.96",
        "2 trades, base coin each": "median 2, 1 % 1.02, 99 % 2.98",
    }  # fmt: skip
    assert {name: facts.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    "arguments",
    ["", "dance", "info", "info missing.gz", "info text.gz", "info .", "record",
     "info good.gz --tick-size x", "info good.gz --depth 50", "info good.gz --tick-size 0.3",
     "record new.gz --category options", "record new.gz --depth 7", "record new.gz --minutes soon",
     "record new.gz --url http://127.0.0.1:1", "record new.gz --url ws://",
     "record new.gz --url 127.0.0.1:1", "record new.gz --url ws://127.0.0.1:x",
     "record new.gz --url ws://127.0.0.1:1", "record new.gz --symbol ABC --url ws://127.0.0.1:1"],
)  # fmt: skip
def test_a_mistake_of_the_user_ends_with_status_2_and_one_line(
    arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Path("text.gz").write_text("no gzip")
    record(Path("good.gz"), FIRST)
    try:
        status = feed.main(arguments.split())
    except SystemExit as end:
        status = end.code
    assert status == 2 and not Path("new.gz").exists()
    told = capsys.readouterr()
    assert told.out == "" and re.fullmatch("error: .*\n", told.err)
