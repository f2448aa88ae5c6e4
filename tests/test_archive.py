"""Bybit's archives: daily files become the messages of a session, or a counted defect.

Files are written here in the documented formats by the standard library alone. What must
come out is worked out by plain dicts, csv and Decimal. Downloads go to a loopback server.
"""

import csv
import gzip
import http.server
import io
import json
import logging
import random
import re
import threading
import tracemalloc
import zipfile
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest

import feed
from feed import (
    CONTROL,
    DELTA,
    LOST,
    SNAPSHOT,
    TRADES,
    ArchiveDay,
    Instrument,
    Parser,
    UserError,
    grid_of,
    main,
    pair_archives,
    parser_of_archive,
    read_trades,
    replay_archive,
)

DAY, T0 = "2026-02-01", 1_769_904_000_000  # its midnight, ms
LINEAR = (
    "timestamp,symbol,side,size,price,tickDirection,trdMatchID,grossValue,homeNotional,"
    "foreignNotional,RPI"
)
SPOT = "id,timestamp,price,volume,side,rpi"
SNAP = dict(b=[("100.0", "1"), ("99.9", "2"), ("99.7", "2")], a=[("100.1", "3"), ("100.2", "4")])


# ---- Files in the documented formats -----------------------------------------------


def book_line(u, ms, b=(), a=(), kind="delta", depth=200, cts=True, seq=None, **more) -> str:
    seq = 7 * u if seq is None else seq
    data = {"s": "BTCUSDT", "b": list(b), "a": list(a), "u": u, "seq": seq}
    message = {"topic": f"orderbook.{depth}.BTCUSDT", "type": kind, "ts": T0 + ms + 4, "data": data}
    return json.dumps(message | ({"cts": T0 + ms} if cts else {}) | more, separators=(",", ":"))


def snapshot(u, ms, b=SNAP["b"], a=SNAP["a"], **more) -> str:
    return book_line(u, ms, b, a, kind="snapshot", **more)


def zip_book(folder, lines, category="linear", depth=200, day=DAY, end="\n") -> Path:
    path = folder / f"{day}_BTCUSDT_ob{depth}.data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(path.name.removesuffix(".zip"), "\n".join(lines) + end)
    return path


def linear_row(number, seconds, side="Buy", size="0.035", price="100.10", rpi="0") -> str:
    value = f"{float(size) * float(price) * 1e8:.7e}"
    row = [seconds, "BTCUSDT", side, size, price, "ZeroMinusTick", f"id-{number}", value, size]
    return ",".join(row + ["3.5"] + ([] if rpi is None else [rpi]))


def at(ms: float) -> str:
    """Seconds with four decimals, as Bybit writes them."""
    return f"{Decimal(T0) / 1000 + Decimal(str(ms)) / 1000:.4f}"


def gzip_trades(folder, rows, header=LINEAR, category="linear", day=DAY) -> Path:
    path = folder / f"BTCUSDT{'_' if category == 'spot' else ''}{day}.csv.gz"
    path.write_bytes(gzip.compress("\n".join([*([header] if header else []), *rows, ""]).encode()))
    return path


def told(book, trades=None, category="linear", tick=None) -> tuple[list, Counter]:
    """All messages of a day, and the defects counted."""
    day = ArchiveDay(DAY, "BTCUSDT", category, book, trades)
    parser = parser_of_archive(day, tick)
    return list(replay_archive(day, parser)), parser.counts


def trades_told(folder, rows, header=LINEAR, category="linear") -> tuple[list, Counter]:
    """All trades of a file whose book stands on a grid of 0.1."""
    path = gzip_trades(folder, rows, header, category)
    messages, counts = told(zip_book(folder, [snapshot(5, 1000)]), path, category)
    return [trade for m in messages if m.kind == TRADES for trade in m.trades], counts


def plain(message) -> tuple:
    kind, recv_ns, exch_ns, bids, asks, trades, fields = message
    return kind, recv_ns, exch_ns, *map(list, (*bids, *asks)), trades, fields


def market(rng, number=400) -> tuple[list[dict], list[dict]]:
    """A day's websocket messages: books, and trades (the websocket's form of them)."""
    books, trades, ms, mid = [json.loads(snapshot(10, 1070))], [], 1070, 1000
    for u in range(11, 11 + number):
        ms, mid = ms + rng.randint(95, 110), mid + rng.randint(-1, 1)
        rows = [
            [(f"{(mid + s * rng.randint(1, 40)) / 10:.2f}", rng.choice(("0", "1.5", "2.25")))
             for _ in range(rng.randint(0, 6))] for s in (-1, 1)
        ]  # fmt: skip
        text = snapshot(u, ms) if u % 97 == 0 else book_line(u, ms, *rows)
        books.append(json.loads(text))
        for stamp in sorted(rng.sample(range(ms - 90, ms + 1), rng.randint(0, 3))):
            trades.append(
                [{"T": T0 + stamp, "S": rng.choice(("Buy", "Sell")), "p": f"{mid / 10:.2f}",
                  "v": f"{rng.randint(1, 500) / 1000}", "RPI": rng.random() < 0.1}
                 for _ in range(rng.randint(1, 3))]
            )  # fmt: skip
    return books, trades


# ---- A day is a session ------------------------------------------------------------


@pytest.mark.parametrize("category, old", [("linear", False), ("linear", True), ("spot", False)])
def test_a_day_as_archive_is_the_day_as_websocket_messages(tmp_path, category, old):
    rng = random.Random(7)
    books, trades = market(rng)
    rows, number = [], 0
    for group in trades:
        for k, t in enumerate(group):
            number += 1
            if category == "spot":
                rows.append(
                    f"{number},{t['T']},{t['p']},{t['v']},{t['S'].lower()},{int(t['RPI'])}"
                )
            else:
                stamp = at(t["T"] - T0 + (k if old else 0) / 10)
                rpi = str(int(t["RPI"]))
                rows.append(linear_row(number, stamp, t["S"], t["v"], t["p"], rpi))
    if old:
        rows.reverse()
    header = SPOT if category == "spot" else LINEAR
    path = gzip_trades(tmp_path, rows, header, category)
    messages, counts = told(zip_book(tmp_path, map(json.dumps, books)), path, category)

    live = Parser(Instrument("BTCUSDT", category, "0.1", "0.001"), 200)
    session = [(m["cts"], 1, m) for m in books]
    topic = "publicTrade.BTCUSDT"
    session += [(g[0]["T"], 0, {"topic": topic, "type": "snapshot", "data": g}) for g in trades]
    session.sort(key=lambda one: one[:2])
    wanted = [live.parse(ms * 10**6, json.dumps(message)) for ms, _, message in session]
    assert [plain(m) for m in messages] == [plain(m) for m in wanted]
    assert not any(counts[k] for k in counts if k not in ("book", "trades"))


def test_the_book_of_an_archive_is_the_book_of_plain_dicts(tmp_path):
    books, _ = market(random.Random(8))
    sides = {"b": {}, "a": {}}
    wanted = []
    for message in books:
        if message["type"] == "snapshot":
            sides = {"b": {}, "a": {}}
        for letter, side in sides.items():
            side |= {Decimal(price): float(size) for price, size in message["data"][letter]}
        wanted.append({k: {p: s for p, s in v.items() if s} for k, v in sides.items()})
    messages, _ = told(zip_book(tmp_path, map(json.dumps, books)))
    for message, shown in zip(messages, wanted, strict=True):
        if message.kind == SNAPSHOT:
            mine = {"b": {}, "a": {}}
        for letter, sign, columns in (("b", 1, message.bids), ("a", -1, message.asks)):
            mine[letter] |= {sign * Decimal(q) / 10: s for q, s in zip(*columns)}
            assert {p: s for p, s in mine[letter].items() if s} == shown[letter]


def test_trades_at_the_time_of_a_book_row_come_before_it(tmp_path):
    rows = [linear_row(i, at(ms)) for i, ms in enumerate((500, 1000.0, 1000.9, 1001, 9000))]
    book = zip_book(tmp_path, [snapshot(5, 1000), book_line(6, 1001)])
    messages, _ = told(book, gzip_trades(tmp_path, rows))
    kinds = [(m.kind, m.recv_ns // 10**6 - T0, len(m.trades)) for m in messages]
    assert kinds == [
        (TRADES, 500, 1), (TRADES, 1000, 2), (SNAPSHOT, 1000, 0), (TRADES, 1001, 1),
        (DELTA, 1001, 0), (TRADES, 9000, 1),
    ]  # fmt: skip


def test_depth_of_the_book_is_that_of_its_topic_and_old_files_without_cts_use_ts(tmp_path):
    lines = [snapshot(5, 1000, depth=500, cts=False), book_line(6, 1100, depth=500, cts=False)]
    messages, _ = told(zip_book(tmp_path, lines, depth=500))
    assert [m.exch_ns // 10**6 - T0 for m in messages] == [1004, 1104]


# ---- Defects of the order book -----------------------------------------------------


def test_snapshot_anywhere_resets_even_when_u_repeats_or_restarts(tmp_path):
    lines = [snapshot(5, 1000), book_line(6, 1100), snapshot(6, 1200), book_line(7, 1300)]
    lines += [snapshot(1, 1400, seq=50), book_line(2, 1500, seq=51)]
    messages, counts = told(zip_book(tmp_path, lines))
    assert [m.kind for m in messages] == [SNAPSHOT, DELTA] * 3
    assert counts["gaps"] == counts["repeated"] == counts["seq went back"] == 0


def test_gap_in_u_loses_the_book_until_the_next_snapshot(tmp_path):
    lines = [snapshot(5, 1000), book_line(7, 1100), book_line(8, 1200), snapshot(9, 1300)]
    messages, counts = told(zip_book(tmp_path, lines))
    assert [m.kind for m in messages] == [SNAPSHOT, LOST, SNAPSHOT]
    assert counts["gaps"] == 1 and "gap in u: 7 after 5" in messages[1].fields["reason"]
    assert messages[1].recv_ns == messages[0].recv_ns


def test_first_line_that_is_no_snapshot_is_a_lost_book(tmp_path):
    messages, counts = told(zip_book(tmp_path, [book_line(4, 900), snapshot(5, 1000)]))
    assert [m.kind for m in messages] == [LOST, SNAPSHOT] and counts["before snapshot"] == 1
    assert messages[0].recv_ns == T0 * 10**6  # midnight: no stamp is known yet


@pytest.mark.parametrize("bad", ["{", "nonsense", "[1]", '{"topic":"orderbook.200.BTCUSDT"}', "\0"])
def test_line_that_is_no_message_is_counted_and_the_gap_behind_it_loses_the_book(tmp_path, bad):
    lines = [snapshot(5, 1000), bad, book_line(7, 1200), snapshot(8, 1300)]
    messages, counts = told(zip_book(tmp_path, lines))
    assert [m.kind for m in messages] == [SNAPSHOT, LOST, SNAPSHOT] and counts["malformed"] == 1


def test_line_of_another_kind_steers_nothing(tmp_path):
    local = '{"op":"local","event":"lost","reason":"x"}'
    messages, _ = told(zip_book(tmp_path, [snapshot(5, 1000), local, book_line(6, 1100)]))
    assert [m.kind for m in messages] == [SNAPSHOT, DELTA]


def test_time_that_goes_back_is_counted_and_the_stamp_does_not(tmp_path):
    lines = [snapshot(5, 1000), book_line(6, 900), book_line(7, 1100, seq=1)]
    messages, counts = told(zip_book(tmp_path, lines))
    assert [m.recv_ns // 10**6 - T0 for m in messages] == [1000, 1000, 1100]
    assert [m.exch_ns // 10**6 - T0 for m in messages] == [1000, 1000, 1100]
    assert counts["time went back"] == 1 and counts["seq went back"] == 1


def test_silence_of_more_than_two_seconds_is_counted(tmp_path):
    lines = [snapshot(5, 1000), book_line(6, 3000), book_line(7, 5001), book_line(8, 5100)]
    assert told(zip_book(tmp_path, lines))[1]["silences over 2 s"] == 1


def test_time_of_another_day_is_nonsense(tmp_path):
    lines = [snapshot(5, 1000), book_line(6, 3 * 86_400_000), snapshot(7, 1100)]
    messages, counts = told(zip_book(tmp_path, lines))
    assert [m.kind for m in messages] == [SNAPSHOT, LOST, SNAPSHOT] and counts["malformed"] == 1


def test_snapshot_of_nothing_is_an_empty_book(tmp_path):
    messages, _ = told(zip_book(tmp_path, [snapshot(4, 900, [], []), snapshot(5, 1000)]))
    assert [(m.kind, len(m.bids[0])) for m in messages] == [(SNAPSHOT, 0), (SNAPSHOT, 3)]


@pytest.mark.parametrize(
    "line", [snapshot(5, 1000).replace("BTCUSDT", "XRPUSDT"), snapshot(5, 9 * 86_400_000)]
)
def test_book_of_another_symbol_or_day_than_its_name_says_is_refused(tmp_path, line):
    with pytest.raises(UserError, match="unlike its name"):
        told(zip_book(tmp_path, [line]))


# ---- The price grid ----------------------------------------------------------------


@pytest.mark.parametrize(
    "prices, tick", [
        ("30247.5 30248.0 30250.00", "0.5"), ("16542.75 16542.77", "0.01"), ("300 200", "100"),
        ("0.00000012 0.00000015", "0.00000003"), ("78704.30 78704.40", "0.1"),
    ]
)  # fmt: skip
def test_grid_is_the_greatest_common_divisor_of_the_prices(prices, tick):
    assert grid_of(prices.split()) == tick


HALVES = dict(b=[("100.0", "1"), ("99.5", "1")], a=[("100.5", "1"), ("101.0", "1")])


def test_finer_grid_of_a_snapshot_is_told_before_it_and_holds_from_there(tmp_path):
    lines = [snapshot(5, 1000, **HALVES), book_line(6, 1100, a=[("100.5", "2")])]
    lines += [snapshot(1, 1200, seq=99), book_line(2, 1300, a=[("100.1", "9")], seq=100)]
    rows = [linear_row(i, at(ms), price=p) for i, (ms, p) in enumerate(
        [(1050, "100.50"), (1150, "100.20"), (1160, "100.00"), (1250, "100.20")]
    )]  # fmt: skip
    messages, counts = told(zip_book(tmp_path, lines), gzip_trades(tmp_path, rows))
    assert [m.kind for m in messages] == [
        SNAPSHOT, TRADES, DELTA, TRADES, CONTROL, SNAPSHOT, TRADES, DELTA
    ]  # fmt: skip
    assert messages[4].fields == {"event": "tick", "tick_size": "0.1"}
    assert messages[4].recv_ns == messages[5].recv_ns
    assert [m.trades[0][2] for m in messages if m.kind == TRADES] == [201, 200, 1002]
    assert list(messages[2].asks[0]) == [-201] and list(messages[7].asks[0]) == [-1001]
    assert counts["malformed trades"] == 1 and counts["book"] == 4  # 100.2 is between two halves


def test_finer_price_of_a_delta_is_malformed(tmp_path):
    lines = [snapshot(5, 1000, **HALVES), book_line(6, 1100, a=[("100.1", "2")])]
    messages, counts = told(zip_book(tmp_path, lines))
    assert [m.kind for m in messages] == [SNAPSHOT, LOST] and counts["malformed"] == 1


def test_snapshot_that_stays_unsound_on_a_finer_grid_leaves_the_grid_alone(tmp_path):
    bad = snapshot(7, 1100, b=[("100.1", "1"), ("100.0", "-1")])
    lines = [snapshot(5, 1000, **HALVES), bad, snapshot(8, 1200, **HALVES)]
    messages, _ = told(zip_book(tmp_path, lines))
    assert [m.kind for m in messages] == [SNAPSHOT, LOST, SNAPSHOT]
    assert list(messages[2].bids[0]) == [200, 199]


def test_tick_given_by_the_user_wins_and_a_wrong_one_is_an_error(tmp_path):
    book = zip_book(tmp_path, [snapshot(5, 1000)])
    assert list(told(book, tick="0.05")[0][0].bids[0]) == [2000, 1998, 1994]
    with pytest.raises(UserError, match="check --tick-size"):
        told(book, tick="0.5")


# ---- Trades ------------------------------------------------------------------------


def by_hand(header, rows, scale) -> list[tuple]:
    """Trades by csv and Decimal: prices in ticks of 0.1, time floored to ms."""
    found = []
    for row in csv.DictReader(io.StringIO("\n".join([header, *rows]))):
        ms = int(Decimal(row["timestamp"]) * scale)
        side = {"b": 1, "s": -1}[row["side"][0].lower()]
        size = float(row.get("size") or row["volume"])
        rpi = (row.get("RPI") or row.get("rpi") or "").lower() in ("1", "true")
        found.append((ms * 10**6, side, int(Decimal(row["price"]) * 10), size, rpi))
    return found


@pytest.mark.parametrize("rpi", ["0", "1", "", "null", "true", "False", None])
@pytest.mark.parametrize("with_header", [True, False])
def test_linear_rows_of_10_or_11_columns_with_or_without_header(tmp_path, rpi, with_header):
    stamps = (at(0.7), at(12.9999), at(1000.1), "1769904002", "1769904003.5", at(9e6))
    rows = [linear_row(i, s, ("Buy", "Sell")[i % 2], rpi=rpi) for i, s in enumerate(stamps)]
    header = LINEAR if rpi is not None else LINEAR.removesuffix(",RPI")
    trades, counts = trades_told(tmp_path, rows, header if with_header else None)
    assert trades == by_hand(header, rows, 1000) and counts["malformed trades"] == 0


@pytest.mark.parametrize("second", [0, 1, 43_217, 86_399])
def test_stamps_are_floored_to_the_ms_exactly(tmp_path, second):
    stamps = [at(1000 * second + n / 10) for n in range(0, 10_000, 3)]
    rows = [linear_row(i, stamp) for i, stamp in enumerate(stamps)]
    assert trades_told(tmp_path, rows)[0] == by_hand(LINEAR, rows, 1000)


@pytest.mark.parametrize("rpi", ["", ",0", ",1"])
@pytest.mark.parametrize("with_header", [True, False])
def test_spot_rows_of_5_or_6_columns_with_or_without_header(tmp_path, rpi, with_header):
    rows = [f"{i + 1},{T0 + 5 * i},{100 + i / 10},0.017389,{s}{rpi}"
            for i, s in enumerate(("buy", "sell", "buy"))]  # fmt: skip
    header = SPOT if rpi else SPOT.removesuffix(",rpi")
    trades, _ = trades_told(tmp_path, rows, header if with_header else None, "spot")
    assert trades == by_hand(header, rows, 1)


def test_columns_are_found_by_name(tmp_path):
    header = "RPI,price,side,new,timestamp,symbol,size,trdMatchID"
    trades, _ = trades_told(tmp_path, [f"1,100.10,Sell,?,{at(5)},BTCUSDT,0.5,x"], header)
    assert trades == [((T0 + 5) * 10**6, -1, 1001, 0.5, True)]


def test_descending_file_is_reversed_so_that_equal_stamps_keep_the_match_order(tmp_path):
    stamps = [1, *[k // 3 % 2 + k // 60 * 2 for k in range(6, 999)]]  # an unstable sort shows
    rows = [linear_row(i, at(ms), size=f"{i + 1}") for i, ms in enumerate(stamps)]
    upwards, _ = trades_told(tmp_path, rows)
    downwards, _ = trades_told(tmp_path, rows[::-1])
    assert [t[3] for t in upwards] == [i + 1 for _, i in sorted(zip(stamps, range(994)))]
    assert upwards == downwards


def test_disordered_rows_are_sorted_by_the_finer_stamp(tmp_path):
    stamps = (1, 2.3, 2.1, 3, 4, 3.5)
    rows = [linear_row(i, at(ms), size=f"{i + 1}") for i, ms in enumerate(stamps)]
    trades, _ = trades_told(tmp_path, rows)
    assert [t[3] for t in trades] == [1, 3, 2, 4, 6, 5]


def test_repeated_ids_are_dropped_and_counted(tmp_path):
    rows = [linear_row(i, at(ms)) for i, ms in ((0, 1), (1, 2), (0, 1), (2, 2), (1, 2))]
    trades, counts = trades_told(tmp_path, rows)
    assert len(trades) == 3 and counts["repeated trades"] == 2


BAD_ROWS = [
    "", ",", "1,2,3", linear_row(1, "soon"), linear_row(1, "nan"),
    linear_row(1, "1e308"), linear_row(1, "-inf"), linear_row(1, ""), linear_row(1, "1e9"),
    linear_row(1, "9" * 30), linear_row(1, at(5), side="Hold"), linear_row(1, at(5), price="0"),
    linear_row(1, at(5), price="1e99"), linear_row(1, at(5), price="nan"),
    linear_row(1, at(5), price="-1"), linear_row(1, at(5), size="0"),
    linear_row(1, at(5), size="inf"), linear_row(1, at(5), price="100.15"),
    linear_row(1, at(5), rpi="2"), linear_row(1, at(5), rpi=None), linear_row(1, "0.5"),
    linear_row(1, at(5)).replace("BTCUSDT", "DOTUSDT"), linear_row(1, at(3 * 86_400_000)), "\0",
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_malformed_rows_are_skipped_and_counted(tmp_path, bad):
    rows = [linear_row(i + 10, at(i)) for i in range(9)]
    trades, counts = trades_told(tmp_path, rows[:4] + [bad] + rows[4:])
    assert trades == by_hand(LINEAR, rows, 1000)
    assert counts["malformed trades"] == bool(bad)  # an empty line is nothing


@pytest.mark.parametrize("header", ["timestamp,symbol,side,size", "a,b,c", None])
def test_file_without_the_needed_columns_is_refused(tmp_path, header):
    with pytest.raises(UserError, match="has no"):
        trades_told(tmp_path, ["1,2,3,4"], header)


def test_gzip_of_nothing_is_a_day_without_trades_and_counted(tmp_path):
    trades, counts = trades_told(tmp_path, [], None)
    assert trades == [] and counts["empty files"] == 1


def test_trades_of_a_day_take_a_few_dozen_bytes_each(tmp_path):
    rows = [linear_row(i, at(i / 7)) for i in range(30_000)]
    day = ArchiveDay(DAY, "BTCUSDT", "linear", tmp_path, gzip_trades(tmp_path, rows))
    tracemalloc.start()
    found = read_trades(day, Counter())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 30_000 and peak < 5e6


# ---- Damaged files -----------------------------------------------------------------


def many_lines(number=20_000) -> list[str]:
    rng = random.Random(3)
    sizes = [f"{rng.random():.9f}" for _ in range(number)]
    return [snapshot(5, 1000)] + [
        book_line(6 + i, 1100 + i, b=[("99.9", size)]) for i, size in enumerate(sizes)
    ]


def test_book_with_a_bad_checksum_is_used_up_to_there_and_then_lost(tmp_path, caplog):
    book = zip_book(tmp_path, many_lines())
    data = bytearray(book.read_bytes())
    data[len(data) // 2] ^= 0xFF
    book.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        messages, counts = told(book)
    assert messages[0].kind == SNAPSHOT and messages[-1].kind == LOST and len(messages) > 100
    assert counts["cut off"] == 1 and "damaged" in caplog.text


def test_zip_that_understates_its_size_is_no_more_than_a_cut(tmp_path):
    lines = many_lines()
    book = zip_book(tmp_path, lines)
    data, real = book.read_bytes(), len("\n".join(lines)) + 1
    field = real.to_bytes(4, "little")
    assert data.count(field) == 2  # in the member's header, and in the directory
    book.write_bytes(data.replace(field, (real // 2).to_bytes(4, "little")))
    messages, counts = told(book)
    assert 5_000 < len(messages) < 15_000 and counts["cut off"] == 1
    book.write_bytes(data.replace(field, (2**31).to_bytes(4, "little")))
    messages, counts = told(book)
    assert len(messages) == len(lines) and counts["cut off"] in (0, 1)


@pytest.mark.parametrize("line", [b"\n", b" ", b"{}\n"])
def test_zip_bomb_ends_early_in_little_memory(tmp_path, line, monkeypatch):
    monkeypatch.setattr(feed, "SMALL", 1 << 20)
    path = tmp_path / f"{DAY}_BTCUSDT_ob200.data.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file, file.open("m", "w") as member:
        member.write(snapshot(5, 1000).encode() + b"\n" * 70_000)
        for _ in range(48):
            member.write(line * ((1 << 20) // len(line)))
    day = ArchiveDay(DAY, "BTCUSDT", "linear", path)
    tracemalloc.start()
    read = sum(map(len, feed.archive_lines(day.book, counts := Counter())))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts["cut off"] == 1 and read >= 1 and peak < 16e6


def test_line_longer_than_any_message_ends_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(feed, "MAX_MESSAGE", 1 << 18)
    lines = [*many_lines(900), "x" * (1 << 20), snapshot(2000, 5000)]
    messages, counts = told(zip_book(tmp_path, lines))
    assert messages[0].kind == SNAPSHOT and messages[-1].kind == LOST and counts["cut off"] == 1


@pytest.mark.parametrize("keep", [0, 10, 1000, -30])
def test_truncated_zip_is_refused_in_one_line(tmp_path, keep):
    book = zip_book(tmp_path, many_lines(200))
    book.write_bytes(book.read_bytes()[:keep])
    with pytest.raises(UserError, match="cannot be read .*: download it again") as caught:
        told(book)
    assert "\n" not in str(caught.value)


def test_zip_of_two_members_or_of_none_is_refused(tmp_path):
    for names in ((), ("a", "b")):
        with zipfile.ZipFile(path := tmp_path / f"{DAY}_BTCUSDT_ob200.data.zip", "w") as file:
            for name in names:
                file.writestr(name, snapshot(5, 1000))
        with pytest.raises(UserError, match="cannot be read"):
            told(path)


def test_stored_member_and_a_missing_last_newline_are_read(tmp_path):
    path = tmp_path / f"{DAY}_BTCUSDT_ob200.data.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x.data", snapshot(5, 1000) + "\n" + book_line(6, 1100))
    assert len(told(path)[0]) == 2


def test_truncated_trades_are_used_up_to_the_cut(tmp_path):
    rng = random.Random(4)
    rows = [linear_row(rng.random(), at(i)) for i in range(20_000)]
    trades = gzip_trades(tmp_path, rows)
    trades.write_bytes(trades.read_bytes()[:-50_000])
    messages, counts = told(zip_book(tmp_path, [snapshot(5, 1000)]), trades)
    found = [t for m in messages for t in m.trades]
    assert found == by_hand(LINEAR, rows, 1000)[: len(found)] and len(found) > 5_000
    assert counts["cut off"] == 1 and LOST not in [m.kind for m in messages]


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x1f\x8b\x08"])
def test_trades_that_are_no_gzip_are_refused(tmp_path, content):
    path = tmp_path / f"BTCUSDT{DAY}.csv.gz"
    path.write_bytes(content)
    if content:
        with pytest.raises(UserError, match="cannot be read"):
            told(zip_book(tmp_path, [snapshot(5, 1000)]), path)


def test_missing_file_and_file_without_book_are_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        told(tmp_path / f"{DAY}_BTCUSDT_ob200.data.zip")
    with pytest.raises(UserError, match="no order book"):
        told(zip_book(tmp_path, ["{}", "x"]))


# ---- Pairs -------------------------------------------------------------------------


def touch(folder, *names) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).touch()


def test_files_and_folders_become_days_by_date(tmp_path):
    touch(tmp_path, "2026-02-02_BTCUSDT_ob200.data.zip", "BTCUSDT2026-02-02.csv.gz", "notes.txt")
    touch(tmp_path, "x/2025-02-01_BTCUSDT_ob500.data.zip", "x/BTCUSDT2025-02-01.csv.gz")
    touch(tmp_path, "x/BTCUSDT2025-02-01.csv.gz.part")
    days = pair_archives([tmp_path, tmp_path / "BTCUSDT2026-02-02.csv.gz"])
    assert [(d.day, d.symbol, d.category) for d in days] == [
        ("2025-02-01", "BTCUSDT", "linear"), ("2026-02-02", "BTCUSDT", "linear"),
    ]  # fmt: skip
    assert days[0].book.name == "2025-02-01_BTCUSDT_ob500.data.zip"
    assert days[0].trades == tmp_path / "x/BTCUSDT2025-02-01.csv.gz"
    assert days[0].noon_ns == 1738411200 * 10**9


def test_underscore_in_the_trades_name_means_spot(tmp_path):
    touch(tmp_path, f"{DAY}_1000PEPEUSDT_ob200.data.zip", f"1000PEPEUSDT_{DAY}.csv.gz")
    (day,) = pair_archives([tmp_path])
    assert (day.symbol, day.category) == ("1000PEPEUSDT", "spot")


BOOK, LINEAR_TRADES, SPOT_TRADES = (
    f"{DAY}_BTCUSDT_ob200.data.zip", f"BTCUSDT{DAY}.csv.gz", f"BTCUSDT_{DAY}.csv.gz"
)  # fmt: skip


@pytest.mark.parametrize(
    "names, rule", [
        ([BOOK], f"{LINEAR_TRADES} is missing .*download {DAY} --symbol BTCUSDT --category linear"),
        ([f"spot/{BOOK}"], f"{SPOT_TRADES} is missing .*--category spot"),
        ([LINEAR_TRADES], f"{BOOK} is missing"),
        (["BTCUSDT2025-08-20.csv.gz"], "2025-08-20_BTCUSDT_ob500.data.zip is missing"),
        (["BTCUSDT2025-08-21.csv.gz"], "2025-08-21_BTCUSDT_ob200.data.zip is missing"),
        (["BTCUSDT_2025-08-20.csv.gz"], "2025-08-20_BTCUSDT_ob200.data.zip is missing"),
        ([BOOK, LINEAR_TRADES, SPOT_TRADES], "of one day"),
        ([BOOK, f"x/{BOOK}", LINEAR_TRADES], "of one day"),
        ([BOOK, LINEAR_TRADES, f"ETHUSDT{DAY}.csv.gz"], "two symbols"),
        (["BTCUSDT-2026-02.csv.gz"], "no archive in"),
        ([f"2026-02-30{BOOK[10:]}"], "is no day"),
    ]
)  # fmt: skip
def test_what_cannot_be_paired_is_refused_in_one_line(tmp_path, names, rule):
    touch(tmp_path, *names)
    with pytest.raises(UserError, match=rule) as caught:
        pair_archives([tmp_path])
    assert "\n" not in str(caught.value)


# ---- Download from a loopback server -----------------------------------------------


class Archive(http.server.BaseHTTPRequestHandler):
    """Serves `files` by path, after what `plan` holds for the next requests."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.seen.append((self.path, asked, self.headers.get("User-Agent")))
        act = server.plan.pop(0) if server.plan else "serve"
        body = server.files.get(self.path)
        if isinstance(act, int) or body is None:
            return self.answer(404 if body is None else act, b"", {})
        if act == "change":
            body = server.files[self.path] = body[:2] + body[:1:-1]
        tag = {} if server.untagged else {"ETag": f'"{hash(body)}"'}
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        if not asked or act == "ignore range":
            return self.answer(200, body, tag, act)
        if start >= len(body):
            return self.answer(416, b"", {})
        extent = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.answer(206, body[start:], tag | {"Content-Range": extent}, act)

    def answer(self, status, body, headers, act=""):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = act in ("truncate", "stall")
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.wfile.flush()
        if act == "stall":
            self.server.over.wait(5)
        self.close_connection = self.close_connection or cut

    def log_message(self, *_):
        pass


@pytest.fixture
def host(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Archive)
    server.seen, server.plan, server.files, server.untagged = [], [], {}, False
    server.over = threading.Event()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(feed, "BOOK_HOST", f"{url}/orderbook")
    monkeypatch.setattr(feed, "TRADES_HOST", url)
    for name, value in (("PAUSE_S", 0.0), ("RETRY_S", 0.001), ("CONNECT_S", 0.3)):
        monkeypatch.setattr(feed, name, value)
    monkeypatch.setenv("no_proxy", "*")
    for path in (f"/orderbook/linear/BTCUSDT/{BOOK}", f"/orderbook/spot/BTCUSDT/{BOOK}"):
        server.files[path] = b"PK" + random.Random(path).randbytes(200_000)
    for path in (f"/trading/BTCUSDT/{LINEAR_TRADES}", f"/spot/BTCUSDT/{SPOT_TRADES}"):
        server.files[path] = b"\x1f\x8b" + random.Random(path).randbytes(50_000)
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def download(folder, *words) -> int:
    return main(["download", "--out", str(folder), *(words or (DAY,))])


def files_under(folder) -> dict:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def linear_files(host) -> dict:
    book, _, trades, _ = host.files.values()
    return {f"linear/{BOOK}": book, f"linear/{LINEAR_TRADES}": trades}


@pytest.mark.parametrize("category", ["linear", "spot"])
def test_download_brings_the_two_files_of_a_day_and_keeps_those_that_are_there(
    tmp_path, host, capsys, category
):
    assert download(tmp_path, DAY, DAY, "--category", category) == 0
    paths = list(host.files)[category == "spot" :: 2]
    assert files_under(tmp_path) == {f"{category}/{Path(p).name}": host.files[p] for p in paths}
    assert [path for path, *_ in host.seen] == paths
    assert all(agent == feed.USER_AGENT["User-Agent"] for *_, agent in host.seen)
    assert capsys.readouterr().out.count("\n") == 2
    assert download(tmp_path, DAY, "--category", category) == 0 and len(host.seen) == 2
    assert capsys.readouterr().out.count("already there") == 2
    (day,) = pair_archives([tmp_path])
    assert day.category == category


@pytest.mark.parametrize("day, depth", [("2025-08-20", 500), ("2025-08-21", 200)])
def test_linear_books_had_500_levels_until_the_20th_of_august_2025(tmp_path, host, day, depth):
    assert download(tmp_path, day) == 2
    assert host.seen[0][0] == f"/orderbook/linear/BTCUSDT/{day}_BTCUSDT_ob{depth}.data.zip"


@pytest.mark.parametrize("trouble", [[503], [500, 502], ["truncate"], ["stall"], ["truncate", 503]])
def test_passing_trouble_is_overcome_and_what_came_is_not_asked_again(tmp_path, host, trouble):
    host.plan = list(trouble)
    assert download(tmp_path) == 0 and files_under(tmp_path) == linear_files(host)
    ranges = [asked for _, asked, _ in host.seen]
    assert (f"bytes={200_002 // 2}-" in ranges) == bool({"truncate", "stall"} & set(trouble))


def test_server_that_ignores_the_range_restarts_the_file(tmp_path, host):
    host.plan = ["truncate", "ignore range"]
    assert download(tmp_path) == 0 and files_under(tmp_path) == linear_files(host)


def test_file_that_changed_between_two_requests_starts_anew(tmp_path, host):
    host.plan = ["truncate", "change"]
    assert download(tmp_path) == 0 and files_under(tmp_path) == linear_files(host)
    assert [asked is None for _, asked, _ in host.seen] == [True, False, True, True]


def test_file_that_shrank_below_the_part_starts_anew(tmp_path, host):
    host.plan = ["truncate", 416]
    assert download(tmp_path) == 0 and files_under(tmp_path) == linear_files(host)


def test_part_of_unknown_version_is_not_continued(tmp_path, host):
    host.untagged, host.plan = True, ["truncate"]
    assert download(tmp_path) == 0 and files_under(tmp_path) == linear_files(host)
    assert {asked for _, asked, _ in host.seen} == {None}


def test_next_run_continues_where_the_last_one_ended(tmp_path, host, monkeypatch, capsys):
    monkeypatch.setattr(feed, "TRIES", 1)
    host.plan = ["truncate"]
    assert download(tmp_path) == 2
    assert "run it again later" in capsys.readouterr().err
    assert set(files_under(tmp_path)) == {f"linear/{BOOK}.part", f"linear/{BOOK}.tag"}
    assert download(tmp_path) == 0 and files_under(tmp_path) == linear_files(host)
    assert host.seen[1][1] == f"bytes={200_002 // 2}-"


@pytest.mark.parametrize(
    "plan, words", [
        ([403], "wait 10 min"), ([404], "the next day: check DAY"), ([418], "status 418"),
        ([503] * 9, r"status 503"), (["truncate", 503, 503, 503, 503], "status 503"),
    ]
)  # fmt: skip
def test_refusal_is_one_clear_line(tmp_path, host, capsys, plan, words):
    host.plan = plan
    assert download(tmp_path) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and DAY in error and error.count("\n") == 1
    assert len(host.seen) == (5 if "503" in words else 1) and not list(tmp_path.rglob("*.zip"))


def test_page_instead_of_an_archive_is_not_kept(tmp_path, host, capsys):
    host.files[f"/orderbook/linear/BTCUSDT/{BOOK}"] = b"<html>please log in</html>"
    assert download(tmp_path) == 2 and "somebody's page" in capsys.readouterr().err


def test_unreachable_host_and_full_disk_are_one_line(tmp_path, host, monkeypatch, capsys):
    (tmp_path / "file").touch()
    assert download(tmp_path / "file") == 2
    assert "cannot be written" in capsys.readouterr().err and not host.seen
    monkeypatch.setattr(feed, "BOOK_HOST", "http://127.0.0.1:9")
    assert download(tmp_path) == 2
    assert "refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, rule", [
        (["2026-2-1"], "write it as 2025-09-01"), (["yesterday"], "is no day"),
        ([DAY, "2026-02-30"], "is no day"), (["20260201"], "is no day"),
        (["２０２６-02-01"], "is no day"),
        ([DAY, "--symbol", "../x"], "capital letters"), ([DAY, "--symbol", ""], "capital letters"),
    ]
)  # fmt: skip
def test_wrong_words_are_one_line_and_ask_nobody(tmp_path, host, capsys, words, rule):
    assert download(tmp_path, *words) == 2
    error = capsys.readouterr().err
    assert rule in error and error.count("\n") == 1 and not host.seen


def test_progress_of_a_terminal_is_one_line(tmp_path, host, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr(feed, "FLUSH_S", 0.0)
    assert download(tmp_path) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 2 and out.count("\r") > 4 and "MB" in out


def test_hosts_are_bybits_and_are_asked_politely():
    assert feed.BOOK_HOST == "https://quote-saver.bycsi.com/orderbook"
    assert feed.TRADES_HOST == "https://public.bybit.com"
    assert feed.TRIES * feed.RETRY_S > 5 and feed.PAUSE_S >= 0.1
