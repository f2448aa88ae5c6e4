"""Days of archives, joined, are the one stream that they are daily cuts of.

A market is told once, in tenths of USDT and ms after T0 (midnight of day 0), and written
down as a recording that nobody cut, and as Bybit's files of days with their quirks.
"""

import csv
import gzip
import io
import json
import random
import weakref
from datetime import date, timedelta
from decimal import Decimal

import numpy as np
import pytest
from test_archive import DAY, LINEAR, SPOT, T0, at, book_line, gzip_trades, linear_row, zip_book

import backtest
import feed
from backtest import fixed_spread, load_history, run_backtest
from feed import DELTA, MS, SNAPSHOT
from optimize import Parameters

DAY_MS, BEGIN_MS, FEED_MS, MID, FIRST_U = 86_400_000, 1070, 30, 50_000, 100
BUSY = dict(
    min_half_spread_bps=0.2, default_spread_bps=4, gamma=0.05, delta=0.2, zeta=0.2, order_qty=0.5,
    requote_move_bps=0.1, max_inventory=2, max_depth_share=1, depth_band_bps=2,
    order_latency_ms=40, feed_latency_ms=FEED_MS,
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, of columns that grow by many blocks."""
    monkeypatch.setattr(backtest, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(backtest, "BLOCK", 64)


# ---- A market: (ms, 1, bids, asks) is a whole book, (ms, 0, trades) what was traded -----


def wander(seed, start_ms, stop_ms) -> list[tuple]:
    """A book that wanders, and trades around its best, some at the time of a book."""
    rng, told, ms, mid, shown = random.Random(seed), [], start_ms, MID, ({}, {})
    while ms < stop_ms:
        mid += rng.choice([-1, 0, 0, 1])
        near = [[mid - s * k for k in range(1, 7) if k < 3 or rng.random() < 0.8] for s in (1, -1)]
        new = [{p: rng.choice([0.125, 0.25, 1.0, 2.0]) for p in prices} for prices in near]
        shown = [{p: old.get(p, size) if rng.random() < 0.7 else size for p, size in side.items()}
                 for side, old in zip(new, shown)]  # fmt: skip
        told.append((ms, 1, *shown))
        gap = rng.randint(95, 110)
        for stamp in rng.sample(range(ms + 1, ms + gap + 1), rng.randint(0, 3)):
            row = [(s, mid + s * rng.choice([1, 1, 2, 3, 7]), rng.choice([0.125, 0.5, 1.0]))
                   for s in rng.choices((1, -1), k=rng.randint(1, 3))]  # fmt: skip
            told.append((stamp, 0, [(*trade, rng.random() < 0.1) for trade in row]))
        ms += gap
    return in_order(told)


def flat(start_ms, stop_ms, step=1, mid=MID) -> list[tuple]:
    """The same book every 100 ms, with mid as its best bid and step as its tick."""
    sides = [{mid + s * k * step: 1.0 for k in range(s > 0, 4)} for s in (-1, 1)]
    return [(ms, 1, *sides) for ms in range(start_ms, stop_ms, 100)]


def hit(ms, taker, price) -> list[tuple]:
    return [(ms, 0, [(taker, price, 0.125, False)])]


def in_order(told) -> list[tuple]:  # at equal times the trades first
    return sorted(told, key=lambda event: event[:2])


def book_lines(books, first_u=FIRST_U, whole=(), gap=None) -> list[str]:
    """Books as lines: the first and those at `whole` are snapshots; number `gap` is lost."""
    lines, old = [], None
    for u, (ms, _, *sides) in enumerate(books, first_u):
        is_whole = not old or ms in whole
        rows = [[(f"{p / 10:.2f}", f"{new.get(p, 0):g}")
                 for p in was | new if was.get(p) != new.get(p)]
                for was, new in zip([{}, {}] if is_whole else old, sides)]  # fmt: skip
        old = sides
        if u != gap:
            lines.append(book_line(u, ms, *rows, kind="snapshot" if is_whole else "delta"))
    return lines


def trade_rows(ms, _, trades) -> list[tuple]:
    names = {1: "Buy", -1: "Sell"}
    return [(ms, names[s], f"{p / 10:.2f}", f"{v:g}", f"{rpi:d}") for s, p, v, rpi in trades]


def record(path, told, category="linear") -> list:
    """The recording of a feed that nothing interrupted."""
    texts = [dict(op="local", event="start", category=category, symbol="BTCUSDT")]
    lines = map(json.loads, book_lines([e for e in told if e[1]]))
    for event in told:
        texts.append(next(lines) if event[1] else dict(topic="publicTrade.BTCUSDT", data=[
            dict(T=T0 + ms, S=side, p=price, v=size, RPI=rpi == "1")
            for ms, side, price, size, rpi in trade_rows(*event)]))  # fmt: skip
    stamps = [(T0 + e[0] + FEED_MS) * MS for e in told[:1] + told]
    session = "".join(f"{ns} {json.dumps(text)}\n" for ns, text in zip(stamps, texts))
    path.write_bytes(gzip.compress(session.encode()))
    return [path]


def archive(folder, told, category="linear", whole=(), gap=None, overlap=0) -> list:
    """Files of days: the book begins 1 s after midnight, goes on to that of the next day, and
    `overlap` more, and closes with a snapshot that repeats the last u; trades change at midnight.
    """
    folder.mkdir(exist_ok=True)
    books = [e for e in told if e[1]]
    owner = [(e[0] - 1000) // DAY_MS for e in books]
    for day in sorted(set(owner)):
        name, first = str(date.fromisoformat(DAY) + timedelta(day)), owner.index(day)
        last = first + owner.count(day) + (1 + overlap if day + 1 in owner else 0)
        lines = book_lines(books[first:last], FIRST_U + first, whole, gap)
        lines += book_lines(books[first:last][-1:], FIRST_U + last - 1)
        zip_book(folder, lines, category, day=name)
        found = [e for e in told if not e[1] and e[0] // DAY_MS == day]
        rows = enumerate((row for e in found for row in trade_rows(*e)), 1)
        if category == "spot":
            table = [f"{n},{T0 + ms},{p},{v},{s.lower()},{rpi}" for n, (ms, s, p, v, rpi) in rows]
        else:
            table = [linear_row(n, at(ms), s, v, p, rpi) for n, (ms, s, p, v, rpi) in rows]
        gzip_trades(folder, table, SPOT if category == "spot" else LINEAR, category, name)
    return [folder]


def play(paths, *strategy, **values) -> tuple:
    """Result, log, history; and the log's rows, with ms after T0 less the feed's latency."""
    history, log = load_history(paths, None, None, None), io.StringIO()
    result = run_backtest(history, Parameters(**BUSY | values), *strategy, log=log)
    rows = list(csv.DictReader(io.StringIO(log.getvalue())))
    rows = [row | {"ms": int(row["time_ns"]) / MS - T0 - FEED_MS} for row in rows]
    return result, log.getvalue(), history, rows


def check(result, told, at_least=20) -> None:
    """Account and markouts are sums and differences over the fills; known but around midnight."""
    fills, state = result.fills, result.state
    assert len(fills) >= at_least and abs(state.residual) < 1e-6
    cash = -sum(f.side * f.qty * f.price + f.fee for f in fills)
    account = sum(f.side * f.qty for f in fills), cash
    assert (state.inventory, state.cash) == pytest.approx(account, abs=1e-6)
    books = [(e[0], (max(e[2]) + min(e[3])) / 20) for e in told if e[1]]
    for f, found in zip(fills, result.markouts.tolist(), strict=True):
        for after_ms, markout in zip((100, 1000, 10_000, 60_000), found, strict=True):
            until = f.time_ns / MS - T0 + after_ms
            mid = [mid for ms, mid in books if ms <= until][-1]
            if markout == markout:
                assert markout == pytest.approx(f.side * (mid / f.price - 1) * 1e4, abs=1e-6)
            else:
                assert until > books[-1][0] or until % DAY_MS < BEGIN_MS + 110


def tell(folder, told) -> list[str]:
    """The ticks of the pieces of a history, which must tell everything once and in order."""
    pieces = list(load_history(folder, None, None, None).pieces(FEED_MS * MS))
    recv_ns = [t for tape, start, stop, _ in pieces for t in tape.recv_ns[start:stop].tolist()]
    kinds = [kind for tape, start, stop, _ in pieces for kind in tape.kind[start:stop].tolist()]
    books = kinds.count(DELTA) + kinds.count(SNAPSHOT) - 1  # without the last closing one
    rows = [row for e in told if not e[1] for row in e[2]]
    assert recv_ns == sorted(recv_ns) and books == sum(e[1] for e in told)
    assert sum(p.tape.trades.end[p.stop] - p.tape.trades.end[p.start] for p in pieces) == len(rows)
    turnover = sum(p.tape.turnover[p.start : p.stop].sum() * float(p.tick_text) for p in pieces)
    assert turnover == pytest.approx(sum(price / 10 * size for _, price, size, _ in rows))
    return [piece.tick_text for piece in pieces]


@pytest.mark.parametrize("category", ["linear", "spot"])
def test_a_day_of_archives_is_played_as_its_recording(tmp_path, category):
    told = wander(1, BEGIN_MS, 60_000)
    assert {e[0] for e in told if e[1]} & {e[0] for e in told if not e[1]}  # some at one time
    mine, log, _, _ = play(archive(tmp_path / "days", told, category))
    theirs, their_log, _, _ = play(record(tmp_path / "r.gz", told, category))
    assert log == their_log and mine.fills == theirs.fills
    np.testing.assert_array_equal(mine.markouts, theirs.markouts)
    check(mine, told)


def days(seed, number) -> list[tuple]:
    """A market around each midnight between so many days: silent at noon."""
    midnights = range(DAY_MS, number * DAY_MS, DAY_MS)
    return [e for ms in midnights for e in wander(seed + ms, ms - 20_000, ms + 20_000)]


@pytest.mark.parametrize("number, overlap", [(2, 0), (2, 4), (5, 0)])
def test_days_in_succession_are_played_as_one_uninterrupted_recording(tmp_path, number, overlap):
    told = days(10, number)
    folder = archive(tmp_path / "days", told, overlap=overlap)
    assert set(tell(folder, told)) == {"0.1"}
    mine, log, _, _ = play(folder)
    theirs, their_log, _, _ = play(record(tmp_path / "r.gz", told))
    assert (log, mine.fills, repr(mine.state)) == (their_log, theirs.fills, repr(theirs.state))
    check(mine, told)


def test_days_that_both_tell_of_a_change_of_tick_repeat_nothing(tmp_path):
    change = DAY_MS + BEGIN_MS + 500
    told = flat(change - 20_000, change, 5) + flat(change, change + 5_000, 1)
    told = in_order(told + hit(DAY_MS + 300, 1, MID + 5))
    folder = archive(tmp_path / "days", told, whole={change}, overlap=9)
    assert tell(folder, told) == ["0.5", "0.5", "0.5", "0.1"]  # day, its end, next day


@pytest.mark.parametrize("ms", [500, BEGIN_MS])
def test_a_quote_stands_across_midnight_and_is_filled_in_the_first_second(tmp_path, ms):
    told = flat(DAY_MS + BEGIN_MS - 20_000, DAY_MS + 5_000) + hit(DAY_MS + ms, -1, MID - 100)
    (fill,) = play(archive(tmp_path / "days", in_order(told)), fixed_spread)[0].fills
    assert fill.time_ns == (T0 + DAY_MS + ms) * MS == fill.recv_ns - FEED_MS * MS
    assert fill.arrival_ns < (T0 + DAY_MS) * MS and fill.side == 1


def test_a_missing_day_makes_the_book_stale_after_5_s_and_carries_the_account_over(tmp_path):
    one, later = DAY_MS + BEGIN_MS, 2 * DAY_MS + BEGIN_MS
    before, after = wander(3, one - 30_000, one), wander(4, later, later + 30_000)
    told, last = before + hit(later - 900, 1, MID) + after, [e[0] for e in before if e[1]][-1]
    result, _, _, rows = play(archive(tmp_path / "days", told))
    stale = next(row for row in rows if row["reason"] == "book stale")
    after = [row for row in rows if row["ms"] > stale["ms"]]
    quoted = next(row["ms"] for row in after if row["bid_price"] or row["ask_price"])
    assert stale["ms"] == last + 5000 and later + 9_000 < quoted < later + 12_000  # 10 returns
    why = {(row["ms"] >= later, row["reason"]) for row in after if row["ms"] < quoted}
    assert why == {(False, "book stale"), (True, "warming up")}
    held = [f for f in result.fills if f.time_ns / MS - T0 < last + 5_100]
    assert not [f for f in result.fills[len(held) :] if f.time_ns / MS - T0 < quoted]
    inventory = sum(f.side * f.qty for f in held)
    assert inventory and float(after[0]["inventory"]) == float(stale["inventory"]) == inventory
    assert after[0]["cash"] == stale["cash"] and len(held) < len(result.fills)
    check(result, told)


@pytest.mark.parametrize("steps, at_ms", [((5, 1), 1070), ((1, 5), 1070), ((5, 1), 40_000)])
def test_no_order_survives_a_change_of_tick_and_quotes_move_to_the_new_grid(tmp_path, steps, at_ms):
    """Trades go through a bid, through where it was just after the change, through a new ask."""
    change, mids = DAY_MS + at_ms, (MID, MID + 20)
    told = flat(change - 25_000, change, steps[0], mids[0])
    told += flat(change, change + 20_000, steps[1], mids[1])
    told += hit(change - 10_050, -1, MID - 100) + hit(change + 50, -1, MID - 100)
    told = in_order(told + hit(change + 15_000, 1, MID + 100))
    result, _, _, rows = play(archive(tmp_path / "days", told, whole={change}), fixed_spread)
    assert [f.time_ns / MS - T0 for f in result.fills] == [change - 10_050, change + 15_000]
    for k, (step, mid, fill) in enumerate(zip(steps, mids, result.fills)):
        middle, tick = Decimal(2 * mid + step) / 20, Decimal(step) / 10
        bid = middle * Decimal("0.9998") // tick * tick  # 2 bps off, outward to the grid
        ask = (middle * Decimal("1.0002") // tick + 1) * tick
        quoted = [r for r in rows if r["bid_price"] and (r["ms"] >= change) == k]
        found = {tuple(Decimal(r[n + "_price"]) for n in ("mid", "bid", "ask")) for r in quoted}
        assert found == {(middle, bid, ask)}
        assert len(quoted) > 1 and fill.price == pytest.approx(float((bid, ask)[k]), abs=1e-9)
    (lost,) = [r for r in rows if r["reason"] == "book lost"]
    assert lost["ms"] == change and not lost["bid_price"] and float(lost["inventory"]) == 0.5
    assert result.order_counts["cancelled: tick size changed"] == 2 and not result.state.inventory
    check(result, told, at_least=2)


def test_gap_in_u_pulls_the_quotes_until_the_next_snapshot_and_the_user_is_told(tmp_path, capsys):
    told, gap, again = flat(BEGIN_MS, 40_000), BEGIN_MS + 15_000, BEGIN_MS + 20_000
    folder = archive(tmp_path / "days", told, whole={again}, gap=FIRST_U + 150)  # of 10 a second
    _, _, history, rows = play(folder, fixed_spread)
    (k,) = [k for k, row in enumerate(rows) if row["reason"] == "book lost"]
    assert rows[k]["ms"] == gap - 100 and rows[k - 1]["bid_price"] and rows[-1]["bid_price"]
    assert not [row for row in rows[k:] if row["bid_price"] and row["ms"] < again + 9_000]
    assert rows[k + 1]["ms"] == again and rows[k + 1]["reason"] == "warming up"
    assert history.counts["gaps"] == 1 and backtest.main(["--data", str(folder[0])]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "1 gaps" in line]


def test_days_are_parsed_once_whatever_the_latency_until_a_file_changes(tmp_path, monkeypatch):
    parsed, replay, told = [], feed.replay_archive, days(20, 2)
    watch = lambda day, parser: parsed.append(day.day) or replay(day, parser)  # noqa: E731
    monkeypatch.setattr(feed, "replay_archive", watch)
    folder = archive(tmp_path / "days", told)
    _, log, history, _ = play(folder)
    assert parsed == ["2026-02-01", "2026-02-02"]
    assert play(folder)[1] == log and play(folder, feed_latency_ms=250)[1] != log
    for ns in (0, 250 * MS):
        tapes = [piece.tape for piece in history.pieces(ns)]
        assert {t for tape in tapes for t in (tape.recv_ns - tape.exch_ns).tolist()} == {ns}
    archive(tmp_path / "new", in_order(told + hit(DAY_MS + 9_000, 1, MID)))
    (changed,) = (tmp_path / "new").glob("*02-02.csv.gz")
    changed.replace(folder[0] / changed.name)
    assert len(parsed) == 2 and play(folder)[1] != log and parsed[2:] == ["2026-02-02"]


def test_no_tape_is_kept_after_that_of_the_next_day(tmp_path, monkeypatch):
    told, tapes, alive, follow = days(30, 4), [], [], backtest.Player.follow

    def watch(player, tape, start, stop):
        follow(player, tape, start, stop)
        alive.append([ref() is not None for ref in tapes])
        tapes.append(weakref.ref(tape.recv_ns))

    monkeypatch.setattr(backtest.Player, "follow", watch)
    play(archive(tmp_path / "days", told))
    assert len(alive) == 7 and not any(any(older[:-2]) for older in alive)
