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
import resource
import subprocess
import sys
import zlib
from decimal import Decimal
from pathlib import Path

import feed
import market
from feed import ASK, BID, MS, NO_LEVEL, SIDES, Book, Instrument, Message, Parser, UserError

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
BOOK, TRADE, TICKERS = "orderbook.200.BTCUSDT", "publicTrade.BTCUSDT", "tickers.BTCUSDT"
NOW_MS = 1_700_000_000_000
NOW_NS = NOW_MS * MS  # receive time


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

    Absent levels are deleted, some named twice; a side may be empty, the book crossed.
    """
    rng, mid, u, lines = random.Random(seed), 5_000, 7_000, []

    def rows(side: int) -> list:
        ticks = [mid - side * rng.randint(0, 30) for _ in range(rng.randint(0, 8))]
        sizes = ["0", "2.50", f"{rng.randint(1, 9999)}e-3"]
        if rng.random() < 0.02:  # nobody is left
            ticks, sizes = range(mid - 40, mid + 41), ["0"]
        return [[f"{tick / 10:.2f}", rng.choice(sizes)] for tick in ticks]

    for number in range(count):
        ms, kind = NOW_MS + number * step_ms, "snapshot" if number in snapshots else "delta"
        texts = [ticker_text({"lastPrice": f"{mid + number}"}, ts=ms)] * (number % 5 == 0)
        if number not in quiet:
            u, mid = u + 1, mid + (rng.randint(-99, 99) if kind == "snapshot" else 0)
            texts.append(book_text(u, rows(BID), rows(ASK), kind, ts=ms, cts=ms))
            if number % 4 == 3:
                texts.append(trade_text({"T": ms}, {"T": ms, "S": "Buy"}, ts=ms))
        lines += [(ms * MS, text) for text in texts]
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

    def mid_ticks(self) -> float:
        bid, ask, *_ = self.ends()
        return (bid - ask) / 2 if all(self.sides.values()) and bid < -ask else math.nan

    def depth(self, side: int, band_bps: str) -> float:
        """In exact decimals. 0 where there is no mid."""
        if math.isnan(mid := self.mid_ticks()):
            return 0.0
        floor = Decimal(mid) * (side - Decimal(band_bps) / 10_000)
        return math.fsum(size for level, size in self.sides[side].items() if level >= floor)


def assert_same(book: Book, plain: PlainBook) -> None:
    """Everything that a book can be asked for, against the dicts."""
    assert levels_of(book) == plain.sides and book.view[:4] == plain.ends()
    np.testing.assert_equal(book.view.mid_ticks, plain.mid_ticks())
    for side, held in plain.sides.items():
        assert list(book.levels(side)[0]) == sorted(held, reverse=True)
        for level in range(min(held, default=998) - 2, max(held, default=998) + 3):
            hidden = 0.0 if held and level > min(held) else math.inf
            assert book.shown(side, level) == held.get(level, hidden)
        for band in ("3.33", "33.3", "9000"):  # no level lies on such an edge
            depth = plain.depth(side, band)
            assert book.depth(side, float(band)) == pytest.approx(depth, rel=1e-12)


# ---- Order book and tapes, by hand, by lot and from real recordings ----------------


@pytest.mark.parametrize("seed", range(3))
def test_messages_fresh_or_from_a_tape_leave_the_book_that_plain_dicts_leave(parser, seed):
    plain, messages = PlainBook(), []
    for recv_ns, text in session_lines(seed, snapshots=range(0, 300, 40)):
        messages.append(parser.parse(recv_ns, text))
        if BOOK in text:
            plain.apply(text)
        assert messages[-1].view == parser.book.view
        assert_same(parser.book, plain)
    for stream in (messages, feed.build_tape(messages).messages()):
        book = Book()
        for message in stream:
            book.apply(message)
        assert_same(book, plain)
        np.testing.assert_equal(book.view, parser.book.view)
        assert book.exch_ns == [m.exch_ns for m in messages if m.rows[0]][-1]


def test_a_tape_gives_its_messages_back(parser):
    stream = market.messages(market.rough_session(0))
    again = [*feed.build_tape(stream).messages()]
    for one, other in zip(stream, again, strict=True):
        assert [*map(list, one.rows)] == [*map(list, other.rows)]
        assert [*one.trades] == other.trades
        one, other = (m._replace(rows=(), trades=()) for m in (one, other))
        np.testing.assert_equal(one, other)


def test_a_tape_keeps_rows_trades_and_notes_apart_and_a_trade_hits_the_level_of_its_maker(parser):
    buy = {"S": "Buy", "v": "2", "p": "65114.3", "T": NOW_MS, "RPI": True}
    block = {"BT": True, "v": "9"}  # left out: it was negotiated outside the book
    control, delta = feed.control_line("params"), book_text(8, [["99.8", "7"]]).replace("cts", "x")
    tape = feed.build_tape(parse(parser, FIRST, trade_text({"L": "x"}, block, buy), control, delta))
    book_ns, sell_ns, buy_ns = ((NOW_MS - ms) * MS for ms in (2, 3, 0))
    expected = dict(
        kind=[feed.SNAPSHOT, feed.TRADES, feed.CONTROL, feed.DELTA],
        recv_ns=[NOW_NS] * 4, exch_ns=[book_ns, buy_ns, 0, NOW_NS],
        best_bid=[1000] * 4, best_ask=[-1001] * 4, worst_bid=[999] * 3 + [998],
        first_row=[0, 4, 4, 4, 5], level=[1000, 999, -1001, -1002, 998], size=[1, 2, 3, 4, 7],
        first_trade=[0, 0, 2, 2, 2], trade_ns=[sell_ns, buy_ns], trade_size=[0.004, 2],
        trade_level=[651142, -651143], trade_is_rpi=[0, 1],
    )  # fmt: skip
    assert {name: getattr(tape, name).tolist() for name in expected} == expected
    assert list(tape.notes) == [2]


def test_both_sides_are_taken_before_a_book_is_called_crossed_and_they_never_meet(parser):
    up = [["100.3", "1"]], [["100.1", "0"], ["100.2", "0"], ["100.4", "5"]]
    ends = [["800000", "5"], ["0.1", "6"]], [["800000", "7"], ["0.1", "8"]]
    *_, moved, crossed = parse(parser, FIRST, book_text(8, *up), book_text(9, *ends))
    assert moved.view.fault == "" and crossed.view.fault == "book crossed"
    bids = {8_000_000: 5, 1003: 1, 1000: 1, 999: 2, 1: 6}
    assert levels_of(parser.book) == {BID: bids, ASK: {-1: 8, -1004: 5, -8_000_000: 7}}
    parse(parser, book_text(10, [], [["800000", "0"]]))
    assert levels_of(parser.book) == {BID: bids, ASK: {-1: 8, -1004: 5}}


SAMPLE = ROOT / "data" / "sample.jsonl.gz"
REAL = sorted(Path(os.environ.get("RECORDINGS", "none")).glob("*.jsonl.gz"))


@pytest.mark.parametrize("path", [SAMPLE, *REAL], ids=str)
def test_a_recording_gives_the_book_of_plain_dicts_at_every_message(path):
    parser = feed.Recording(path).parser
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
    [("S7 8 9", "SDD", {}), ("S0 2", "SL", {"gaps": 1, "before snapshot": 0}),
     ("S7 8 8 7 3 9", "SD---D", {"repeated": 3}),  # sent again, or too old
     ("S7 9 10 8 S20 21", "SL--SD", {"gaps": 1}),  # told once, until a snapshot
     ("S7 9 S20 22", "SLSL", {"gaps": 2}),
     ("7 8 S9 10", "L-SD", {"before snapshot": 2}),
     ("S7 8 1 2", "SDSD", {"gaps": 0, "repeated": 0}),  # the service has restarted
     ("S7 8 S1 2", "SDSD", {"gaps": 0, "repeated": 0}),
     ("S7 8 S4 5", "SDSD", {"gaps": 0, "repeated": 0}),  # a snapshot in mid stream
     ("S7 8 S50 51", "SDSD", {"gaps": 0}),
     ("S7 lost 8 lost 9 9 S9", "SLLLL-S", {"before snapshot": 3}),  # by the connection
     ("S7 refused 8", "SRD", {"refusals": 1}),
     ("S7 broken broken 9 S9 10", "SL--SD", {"malformed": 2})],
)  # fmt: skip
def test_the_count_decides_whether_a_book_is_trusted(parser, sent, expected, counts):
    texts = {"lost": feed.control_line("lost", reason="closed"), "broken": book_text(8, type="x")}
    texts["refused"] = json.dumps({"success": False, "ret_msg": "handler not found\n"})
    for word in set(sent.split()) - set(texts):
        kind = "snapshot" if "S" in word else "delta"
        texts[word] = book_text(int(word.strip("S")), *GOOD, kind=kind)
    messages = parse(parser, *map(texts.get, sent.split()))
    assert letters(messages) == expected
    assert all(m.note["reason"].isprintable() for m in messages if m and m.note)
    assert {name: parser.counts[name] for name in counts} == counts


UNSOUND_ROWS = [
    ["99.8"], ["99.8", "1", "1"], ["99.8", 1], [99.8, "1"], "ab", {"99.8": "1"}, None, 5,
    ["99.8", "-1"], ["99.8", "nan"], ["99.8", "inf"], ["99.8", "1e16"], ["99.8", ""], ["0", "1"],
    ["-5", "1"], ["NaN", "1"], ["1e999999999", "1"], ["x", "1"], [["99.8"], "1"], [True, "1"],
    ["99.85", "1"], ["800000.1", "1"], ["99.8", "1." + 40 * "0"], [40 * "0" + "99.8", "1"],
]  # fmt: skip
TOO_HIGH, TOO_MANY = {"b": [["800000.1", "1"]], "a": []}, {"b": 5_001 * [["99.7", "1"]], "a": []}


@pytest.mark.parametrize(
    "change",
    [{"data": {"u": 8, "b": [["99.7", "1"]], "a": [["101", "1"], row]}} for row in UNSOUND_ROWS]
    + [{"type": "snapshot", "data": {"u": 8} | rows} for rows in (TOO_HIGH, TOO_MANY)]
    + [{"data": {"u": u, "b": [], "a": []}} for u in (True, -1, 2**63, "8", "\ud800", None)]
    + [{"data": {}}, {"data": None}, {"cts": None}, {"cts": float(NOW_MS)}, {"cts": "\n\x1b[2J"},
       {"cts": NOW_MS + 90_000_000}, {"cts": NOW_MS - 90_000_000}],
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
    '{"req_id":"test","op":"pong","args":["1675418560633"],"conn_id":"cfcb4ocsvfriu23r3er0"}',
    '{"topic":"kline.1.BTCUSDT","data":[{"start":1}],"ts":1,"type":"snapshot"}',
    '{"topic":"orderbook.1.BTCUSDT","type":"snapshot","ts":1,"data":{"u":1}}',
]
UNSOUND_TRADES = [
    {"v": "0"}, {"v": "-1"}, {"v": "nan"}, {"v": 1}, {"S": "buy"}, {"S": None}, {"p": 65114.2},
    {"p": "1.25"}, {"T": "1"}, {"T": NOW_MS + 90_000_000}, {"T": 10**400}, {"T": True}, {"T": 1e12},
]  # fmt: skip
LOOK_ALIKES = [  # of lines of our own
    '{"op":"local","event":"lost","reason":"x"}', '{"event":"start","op" : "local"}',
    '{"op":"local","event":"raw","text":"{\\"success\\":true}"}',
    '{"op":"\\u006cocal","event":"lost","reason":"x"}', '{"\\u006fp":"loc\\u0061l","event":"x"}',
]  # fmt: skip


@pytest.mark.parametrize(
    ("count", "text"),
    [*zip(["acks"] * 2 + ["pongs"] * 2 + ["ignored"] * 2, ANSWERS)]
    + [("malformed", trade_text({}, change)) for change in UNSOUND_TRADES]
    + [("malformed", ticker_text({"lastPrice": "3", "markPrice": value}))
       for value in ("nan", "inf", "-1", "0", "x", 5, True, [], "1e999")]
    + [("malformed", feed.sound_line(text.encode())) for text in LOOK_ALIKES]
    + [("malformed", ticker_text({"lastPrice": "3"}, **more))
       for more in ({"ts": NOW_MS + 90_000_000}, {"more": math.nan})]
    + [("block trades", trade_text({"BT": True}))],
)  # fmt: skip
def test_what_carries_nothing_is_counted_and_changes_nothing(parser, count, text):
    messages = parse(parser, FIRST, text, book_text(8))
    assert letters(messages) == "S-D" and parser.counts[count] == 1
    assert levels_of(parser.book) == GOOD_LEVELS and math.isnan(messages[2].view.last_price)


def test_every_form_of_a_price_becomes_exact_ticks():
    prices = [("16542.75", "0.01", 1654275), ("28552.5", "0.50", 57105), ("70000", "5", 14000)]
    for ticks in (*range(1, 999), *range(650_000, 650_999), feed.MAX_TICK):
        prices += [(form.format(ticks / 10), "0.1", ticks) for form in ("{}", "{:.2f}", "{:.7e}")]
    for text, tick, ticks in prices:
        assert [feed.level_of(text, Decimal(tick), side) for side in SIDES] == [ticks, -ticks], text


def test_a_price_off_the_grid_is_the_users_to_mend_at_first_or_again_else_malformed(parser):
    with pytest.raises(UserError, match="0.05.*--tick-size"):
        parse(parser, book_text(7, [["0.05", "1"]], kind="snapshot"))
    wrong = book_text(8, [["100.05", "1"]])
    messages = parse(parser, trade_text({"p": "65114.25"}), FIRST, wrong, wrong, FIRST, wrong)
    assert letters(messages) == "-SL-SL" and "--tick-size" in messages[2].note["reason"]
    with pytest.raises(UserError, match="100.05.*--tick-size"):  # no sound book came between
        parse(parser, book_text(1, [["100.05", "1"]]))


def test_a_ticker_changes_only_what_it_names_and_a_new_book_does_not_touch_it(parser):
    full = {"lastPrice": "65114.30", "markPrice": "65117.44", "indexPrice": "1"}
    empty = {"markPrice": "", "lastPrice": None}
    fields = {"lastPrice": "9"}, full, {"markPrice": "65117.43"}, empty
    first, *rest = [message.view[4:] for message in parse(parser, *map(ticker_text, fields), FIRST)]
    assert first[0] == 9 and math.isnan(first[1])
    assert rest == [(65114.3, 65117.44)] + [(65114.3, 65117.43)] * 3


# ---- Garbage -----------------------------------------------------------------------

JUNK = [
    *"""null true false 0 -1 1 1.5 -0.0 1e308 1e999 -1e999 NaN Infinity 9223372036854775808 "" "x"
    "ab" "NaN" "nan" "Infinity" "-inf" "1e999" "-5" "0" "1e-400" "1e999999999" "1_0" [] {} [[]]
    ["ab"] [["1"]] [["1","2","3"]] [["100.0","1"]] [["100.05","1"]] {"b":1} "Buy" "delta" "local"
    "snapshot" 1700000000000 1701000000000 1700000000000.0 [null] [{}] [[[]]] "\\n" "\\u0000"
    "\\u0661\\u0662" "\u20ac\\ud800" "orderbook.200.BTCUSDT" """.split(),
    "", '" 1 "', f'"{"9" * 400}"', "1" + "0" * 400, "[" * 5_000, '{"a":' * 5_000, "\udcff\udcfe",
]  # fmt: skip
TEMPLATES = [
    book_text(2, [["100.0", "1"], ["99.9", "0"]], [["100.1", "3"]]),
    book_text(2, [["99.8", "1"]], [["100.1", "0.5"], ["100.2", "0"]]), FIRST,
    trade_text({"i": "1", "L": "PlusTick", "BT": False, "RPI": False}, {"S": "Buy"}),
    ticker_text({"lastPrice": "1", "markPrice": "2.5"}), *ANSWERS[:3], '{"success":false}',
]  # fmt: skip
PARTS = [r'"[^"]*"', r"[-\d.e]+|true", r"\[[^][]*\]", r"\{[^{}]*\}", r"\[.*\]", "...", "$", ".*"]


def garbage(rng: random.Random, u: int) -> bytes:
    """A message of an exchange that has lost its mind, and sometimes finds it again."""
    text = rng.choice(TEMPLATES if rng.random() < 0.5 else TEMPLATES[:2])
    text = text.replace('"u": 2', f'"u": {u}')
    for _ in range(rng.choice((0, 0, 1, 1, 1, 4))):
        if parts := [*re.finditer(rng.choice(PARTS), text)]:
            part = rng.choice(parts)
            junk = rng.choice(JUNK) if rng.random() < 0.9 else f"[{part[0]}]"
            text = text[: part.start()] + junk + text[part.end() :]
    return text.encode("utf-8", "surrogateescape")


def assert_sound(message: Message) -> None:
    """Whatever was let through is fit for arithmetic."""
    trades, rows = [*message.trades], [*zip(*message.rows)]
    times = [message.exch_ns or NOW_NS, *(trade[0] for trade in trades)]
    assert all(type(ns) is int and abs(ns - NOW_NS) <= 86_400 * feed.NS for ns in times)
    for level, size in [trade[1:3] for trade in trades] + rows:
        assert 0 < abs(level) <= feed.MAX_TICK and 0 <= size < math.inf
    assert all(price > 0 or math.isnan(price) for price in message.view[4:])
    for side in SIDES:
        best, worst = message.view.best(side), message.view.worst(side)
        assert best == NO_LEVEL == -worst or 0 < worst * side <= feed.MAX_TICK and worst <= best


def test_no_garbage_gets_past_the_parser_and_all_of_it_is_counted(parser):
    rng, seen, total, is_lost, u = random.Random(20_260_809), "", 0, True, 1
    for number in range(50_000):
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
    assert all(seen.count(letter) > 20 for letter in "SDLTKR"), "too tame or too wild"
    assert "C" not in seen, "the exchange has spoken in our name"


# ---- Recordings --------------------------------------------------------------------


def record(path: Path, *texts: str, seconds=range(99)) -> Path:
    """A recording, if not told otherwise with a line a second."""
    recorder = feed.GrowingFile(path)
    for second, text in zip(seconds, texts):
        recorder.record(NOW_NS + second * feed.NS, text)
    recorder.close()
    return path


def test_any_message_stands_on_one_line_and_comes_back_as_it_was(tmp_path, parser):
    plain = [b'{"a": 1}', '{"\u20ac":"\u4e94"}'.encode(), b""]
    awkward = [b"\xff\xfe", b'"local"', b"\r\n", b"\\", "\u2028".encode(), b"\x00 "]
    awkward.append(FIRST.replace(", ", ",\n").encode())
    texts = [feed.sound_line(payload) for payload in plain + awkward]
    ours = feed.control_line("params", gamma=0.7, text='"local"\n')
    path = record(tmp_path / "r.gz", *texts, ours)
    lines = [(NOW_NS + i * feed.NS, text) for i, text in enumerate([*texts, ours])]
    on_disk = "".join(f"{stamp} {text}\n" for stamp, text in lines)
    assert gzip.decompress(path.read_bytes()).decode() == on_disk
    assert list(feed.read_lines(path)) == lines
    raw = [json.loads(text)["text"] for text in texts[len(plain) :]]
    back = [text.encode("utf-8", "surrogateescape") for text in texts[: len(plain)] + raw]
    assert back == plain + awkward
    snapshot, control = parse(parser, texts[-1], ours)
    assert snapshot.kind == feed.SNAPSHOT and levels_of(parser.book) == GOOD_LEVELS
    assert control.note == {"op": "local", "event": "params", "gamma": 0.7, "text": '"local"\n'}


def test_lines_are_on_disk_for_any_gzip_once_the_oldest_has_waited(tmp_path, monkeypatch):
    """So a recorder that is killed leaves all but its last lines, as the program gzip sees."""
    now_s, on_disk, recorder = [100.0], [], feed.GrowingFile(tmp_path / "r.gz")
    command = ["gzip", "-dcq", recorder.path]  # it complains of a file that is still empty
    monkeypatch.setattr(feed.time, "monotonic", lambda: now_s[0])
    for wait_s, text in ((0, "a"), (0.4, "b"), (0.2, ""), (9, "c"), (0.4, ""), (0.2, "d")):
        now_s[0] += wait_s
        if text:
            recorder.record(1, text)
        recorder.flush(feed.FLUSH_S)
        on_disk.append(subprocess.run(command, stdout=subprocess.PIPE).stdout)
    whole = b"1 a\n1 b\n1 c\n1 d\n"  # c is young, though the file is not
    assert on_disk == [b"", b"", whole[:8], whole[:8], whole[:8], whole]
    recorder.close()


def test_a_file_cut_at_any_byte_of_its_last_member_is_read_up_to_the_cut(tmp_path, capsys):
    texts = [f'{{"n":{i},"text":"{i * 7919 % 1000:x}"}}' for i in range(12)]
    first = record(tmp_path / "first.gz", *texts[:8]).read_bytes()
    second = record(tmp_path / "second.gz", *texts[8:]).read_bytes()
    ends = [second[:length] for length in range(len(second) + 1)] + [gzip.compress(b"9 {")]
    for end in ends:
        (tmp_path / "cut.gz").write_bytes(first + end)
        read_texts = [text for _, text in feed.read_lines(tmp_path / "cut.gz")]
        left = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(end)
        assert read_texts == texts[: 8 + left.count(b"\n")], f"cut after byte {len(end)}"
        assert ("cut off after line" in capsys.readouterr().err) == (end not in (b"", second))


BAD_STAMPS = ["soon", "", " 7", "1.5", "-1", str(2**63), 5000 * "9", str(400 * 86_400 * feed.NS)]
ENDLESS = "7 " + 9_999 * "x"


@pytest.mark.parametrize("bad", [*(f"{stamp} {{}}" for stamp in BAD_STAMPS), "{}", "", ENDLESS])
@pytest.mark.parametrize("pack", [gzip.compress, bytes])
def test_no_stamp_goes_back_and_a_line_without_one_is_named_by_its_number(
    tmp_path, monkeypatch, pack, bad
):
    path, good = tmp_path / "r.jsonl", "\ufeff5 {}\n7 x\n6 {}\n"  # the mark of an editor
    path.write_bytes(pack(good.encode()))
    assert [*feed.read_lines(path)] == [(5, "{}"), (7, "x"), (7, "{}")]
    path.write_bytes(pack(f"{good}{bad}\n7 {{}}\n".encode()))
    monkeypatch.setattr(feed, "MAX_LINE", 6000)
    with pytest.raises(UserError, match="line 4"):
        list(feed.read_lines(path))


def test_a_file_is_written_whole_or_not_at_all_and_in_place_of_no_device(tmp_path):
    best, link, pipe = (tmp_path / name for name in ("best", "link", "pipe"))
    link.symlink_to(best)
    os.mkfifo(pipe)
    for path in (best, link):
        feed.write_whole(path, lambda draft: draft.write_text("old"))
    for path, write, error in ((link, lambda draft: draft.write_text("ne") / 0, ZeroDivisionError),
                               *((path, Path.touch, UserError) for path in (pipe, tmp_path))):
        with pytest.raises(error):
            feed.write_whole(path, write)
    assert best.read_text() == "old" and link.is_symlink() and pipe.is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["best", "link", "pipe"]


def test_a_full_disk_leaves_whole_lines_and_is_told(tmp_path):
    log, (_, most) = feed.GrowingFile(tmp_path / "log"), resource.getrlimit(resource.RLIMIT_FSIZE)
    for size, text in ((most, "whole\n"), (9, "cut here\n"), (most, "nor this\n")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))  # bytes
        log.write(text)
    log.close()
    assert log.path.read_text() == "whole\n" and log.failure.endswith("log stopped: File too large")


def test_a_recordings_first_lines_say_what_it_holds_unless_a_flag_does(tmp_path):
    steps = dict(tick_size="0.25", lot_size="0.5", min_qty=0.75, min_notional=6.0)
    start = feed.control_line("start", symbol="ABCUSDT", category="spot", depth=200, **steps)
    path = record(tmp_path / "told.gz", start, book_text(1, topic="orderbook.200.ABCUSDT"))
    for flags, expected in ({}, ("0.25", "0.5")), ({"tick_size": "0.5"}, ("0.5", "0.5")):
        instrument = feed.Recording(path, flags).parser.instrument
        assert instrument == Instrument("ABCUSDT", "spot", *expected, 0.75, 6.0)
    deep = book_text(50, *GOOD, kind="snapshot", topic="orderbook.1000.BTCUSDT")
    path = record(tmp_path / "two depths.gz", FIRST, deep, book_text(8))
    assert letters(feed.Recording(path).messages()) == "S"  # the deepest
    assert letters(feed.Recording(path, {"depth": 200}).messages()) == "SD"
    assert feed.Recording(path, {"category": "spot"}).parser.instrument.category == "spot"


# ---- Instruments and the command line ----------------------------------------------

LINEAR_PAGE = b"""{"retCode":0,"result":{"list":[{"priceFilter":{"tickSize":"0.20"},
    "lotSizeFilter":{"minOrderQty":"0.004","qtyStep":"0.002","minNotionalValue":"6"}}]}}"""
SPOT_PAGE = b"""{"retCode":0,"result":{"list":[{"priceFilter":{"tickSize":"0.01"},
    "lotSizeFilter":{"minOrderQty":"0.000011","basePrecision":"0.000001","minOrderAmt":"5"}}]}}"""
LINEAR, SPOT, OTHER = ("BTCUSDT", "linear"), ("BTCUSDT", "spot"), ("ABC", "spot")


@pytest.mark.parametrize(
    ("answer", "symbol", "steps", "expected"),
    [(LINEAR_PAGE, LINEAR, (None, None), Instrument(*LINEAR, "0.20", "0.002", 0.004, 6.0)),
     (LINEAR_PAGE, LINEAR, ("0.5", None), Instrument(*LINEAR, "0.5", "0.002", 0.004, 6.0)),
     (SPOT_PAGE, SPOT, (None, "0.1"), Instrument(*SPOT, "0.01", "0.1", 0.000011, 5.0)),
     (AssertionError("asked"), OTHER, ("0.01", "1"), Instrument(*OTHER, "0.01", "1", 0.0)),
     (OSError("no route"), LINEAR, (None, "3"), Instrument(lot_text="3", min_notional=5.0)),
     (b"<html>busy</html>", LINEAR, (None, None), Instrument(min_notional=5.0)),
     (OSError("no route"), OTHER, ("0.1", None), "ABC.*--symbol.*--tick-size, --lot-size"),
     (b"", OTHER, (None, None), "ABC.*--symbol.*--tick-size, --lot-size")]
    + [(b'{"retCode":10001,"result":{}}', OTHER, (None, None), "ABC spot is not known.*10001")]
    + [(body, OTHER, (None, None), "ABC.*Bybit does not tell.*busy.*--tick-size") for body in (
        b"{busy", b'{"retCode":10006,"retMsg":"busy","result":{}}', b"busy\x1b" + 300 * b"x",
        b'{"retCode":10016,"retMsg":"busy"}', b'{"retCode":0,"busy":1,"result":{"list":[]}}')]
    + [(SPOT_PAGE.replace(b"minOrderQty", b""), SPOT, (None, None),
        Instrument(*SPOT, "0.01", "0.000001", 0.000001, 5.0))],
)  # fmt: skip
def test_flags_precede_bybits_answer_and_that_a_table(monkeypatch, answer, symbol, steps, expected):
    def urlopen(request, timeout):
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(feed.urllib.request, "urlopen", urlopen)
    try:
        told = dict(zip(("symbol", "category", "tick_size", "lot_size"), symbol + steps))
        assert feed.find_instrument(told, ask=True) == expected
    except UserError as error:
        assert isinstance(expected, str) and re.match(f".*{expected}", str(error))
        assert str(error).isprintable() and len(str(error)) < 400


def test_info_prints_what_a_recording_holds(tmp_path, capsys):
    path = record(
        tmp_path / "r.gz", feed.control_line("start", symbol="BTCUSDT", synthetic=True),
        FIRST, book_text(8), book_text(8), "broken", trade_text({"v": "1"}, {"v": "3"}),
        book_text(11), book_text(12, [["100.0", "1"]], [["100.3", "1"]], kind="snapshot"),
        book_text(13, [["100.5", "1"]]), book_text(14, [["100.0", "0"], ["100.5", "0"]]),
        *ANSWERS[1:4],
    )  # fmt: skip
    assert feed.main(["info", str(path)]) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    facts = {row[:39].strip(): row[39:] for row in rows}
    expected = {
        "first message, UTC": "2023-11-14 22:13:20", "span, s": "9.0",
        "book": "7", "trades": "1", "acks": "1", "pongs": "2", "malformed": "1", "gaps": "1",
        "repeated": "1", "snapshots": "2", "book lost 1 times": "gap in u: 11 after 8",
        "crossed or one-sided books": "2", "spread, ticks": "median 1, 1 % 1, 99 % 2.96",
        "2 trades, base coin each": "median 2, 1 % 1.02, 99 % 2.98",
    }  # fmt: skip
    assert {name: facts.get(name) for name in expected} == expected
    assert "BTCUSDT linear, SYNTHETIC" in title


def test_info_tells_the_usual_liquidity_and_depth_as_flags(tmp_path, capsys):
    """A flat market has moved by a tick, 0.1 bp; 29 trades of 0.1 M USDT meet a known book."""
    hits = [market.trades(1000 * second + 200, (feed.BID, 1, 2)) for second in range(30)]
    path = market.write(tmp_path / "r.gz", market.calm(30_500, *hits))
    assert feed.main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "--liquidity-scale-musd 29\n" in out and "--depth-scale-musd 0.8\n" in out


@pytest.mark.parametrize(
    "arguments",
    ["", "dance", "info", "info missing.gz", "info text.gz", "info .", "record",
     "info good.gz --depth 50", "info good.gz --symbol ethusdt", "info told.gz --symbol X",
     "info told.gz --category spot", "info empty.gz", "info /dev/null",
     "info good.gz --tick-size 0.3", "info good.gz --lot-size 1e-999",
     *(f"info good.gz {flag}={step}" for flag in ("--tick-size", "--lot-size")
       for step in ("x", "0", "-1", "nan", "inf")),
     "record new.gz --category options", "record new.gz --depth 7", "record new.gz --minutes soon",
     "record new.gz --url http://127.0.0.1:1", "record new.gz --url ws://",
     "record new.gz --url 127.0.0.1:1", "record new.gz --url ws://127.0.0.1:x",
     "record new.gz --url ws://127.0.0.1:1", "record new.gz --symbol ABC --url ws://127.0.0.1:1"],
)  # fmt: skip
def test_a_mistake_of_the_user_is_one_line_and_status_2(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Path("text.gz").write_text("no gzip")
    record(Path("good.gz"), FIRST)
    record(Path("told.gz"), feed.control_line("start", symbol="BTCUSDT", category="linear"), FIRST)
    Path("empty.gz").touch()
    with pytest.raises(SystemExit) as end:
        sys.exit(feed.main(arguments.split()))
    assert end.value.code == 2 and not Path("new.gz").exists()
    told = capsys.readouterr()
    assert told.out == "" and re.fullmatch("error: .*\n", told.err)


FULL = "error: .*No space left on device\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [("info √ > /dev/full", FULL), ("--help > /dev/full", FULL), ("info √ >&-", ""),
     ("info √ | true", ""), ("info √ --symbol btcusdt", ""), ("info √√", ".*No such file\n")],
)  # fmt: skip
def test_output_that_nobody_takes_is_one_line_and_never_a_traceback(tmp_path, words, told):
    record(tmp_path / "√", FIRST)
    command, env = f"{sys.executable} {feed.__file__} {words}", {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=env, capture_output=True)
    assert re.fullmatch(told, done.stderr.decode()) and done.returncode == (2 if told else 0)
