"""The backtest against the live path, plain dicts and pencil and paper.

The market of test_marketmaker.py (ticks of 0.5 USDT away from MID, ms after START_MS) is
written as a recording and played through the cache of columns, as a user's would be.
"""

import dataclasses
import gzip
import io
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import test_marketmaker as tm
from market import WALL, best_by_dicts, calm, noise, rough_session, spoil, with_best, write
from test_marketmaker import LIMITS, MID, decisions, delta, ns, params, trades

import backtest
import feed
import marketmaker
from feed import ASK, BID, MS, NO_LEVEL, NS, Message, build_tape
from optimize import FIELDS, Distances, Parameters

CALM = LIMITS | dict(requote_move_bps=50.0, default_spread_bps=0.8, min_half_spread_bps=0.1)
ROUGH = tm.BUSY | LIMITS | dict(max_inventory=4.0, stale_after_s=2.0)
near = partial(pytest.approx, rel=1e-9, abs=1e-9)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An own place for the columns."""
    monkeypatch.setattr(backtest, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


# ---- Played ------------------------------------------------------------------------


def load(path: Path) -> backtest.History:
    return backtest.load_recording([path], None, None, None)


class Run:
    """run_backtest over the recording of a stream."""

    def __init__(self, stream, folder: Path, strategy=backtest.fixed_spread, outages=(), **more):
        exchange = {n: more.pop(n) for n in ("participation", "impact_bps") if n in more}
        log, quotes = io.StringIO(), io.StringIO()
        args = Parameters(**CALM | more), strategy, list(outages), None, log, quotes
        history = load(write(folder / "story.gz", stream))
        self.result = backtest.run_backtest(history, *args, **exchange)
        self.metrics, self.fills = backtest.measure(self.result), self.result.fills
        self.rows, self.quotes = decisions(log), quotes.getvalue()
        # as (ms, ticks from MID, ...): fills with the signed quantity; rows of quotes.csv
        self.traded = [((f.time_ns - ns(0)) / MS, f.price * 2 - MID, f.side * f.qty)
                       for f in self.fills]  # fmt: skip
        self.quoted = [(row["ms"], *(float(row[n]) * 2 - MID if row[n] else None
                                     for n in ("bid_price", "ask_price")))
                       for row in decisions(quotes)]  # fmt: skip


# ---- 1. Live equals backtest -------------------------------------------------------


def same_logs(path: Path, *flags: str) -> str:
    """Run both programs over a recording; the log that both write."""
    live, log = (Path(tempfile.mkdtemp(dir=path.parent)) / "log.csv" for _ in range(2))
    replayed = ["--replay", str(path), "--speed", "max", "--log", str(live), *flags]
    assert marketmaker.main(replayed) == 0
    assert backtest.main(["--data", str(path), "--log", str(log), *flags]) == 0
    assert live.read_text().splitlines() == log.read_text().splitlines()  # names the first row
    assert live.read_bytes() == log.read_bytes()
    return log.read_text()


def test_replay_and_backtest_write_the_same_log_for_15_minutes_of_the_sample(tmp_path):
    path, lines, first = tmp_path / "cut.gz", [], 0
    with gzip.open(marketmaker.SAMPLE, "rt") as file:
        for line in file:
            first = first or int(line[:19])
            if int(line[:19]) > first + 900 * NS:
                break
            lines.append(line)
    path.write_bytes(gzip.compress("".join(lines).encode(), 1))
    rows = decisions(io.StringIO(same_logs(path)))
    assert len(rows) > 300 and len({row["inventory"] for row in rows}) > 5


@pytest.mark.parametrize("seed, pace", [(0, 0.1), (1, 0.1), (1, 2.0), (2, 2.0)])
def test_replay_and_backtest_write_the_same_log_for_a_rough_session(seed, pace, tmp_path):
    """A fill matched after its second took the mid back."""
    stream, values = rough_session(seed), ROUGH | dict(requote_move_bps=pace)
    flags = ["--alpha", "5"] * (seed == 1)  # against the line of parameters in it
    log = same_logs(write(tmp_path / "rough.gz", stream, **values), *flags)
    for reason in ("book crossed", "book one-sided", "far from mark price", "book lost",
                   "book stale", "drawdown limit", "warming up"):  # fmt: skip
        assert reason in log, reason
    maker = tm.make(**values)
    maker.take(*stream)
    assert len(maker.exchange.fills) > 10 and maker.is_stopped and maker.last_ns % NS
    assert pace > 1 or any(f.recv_ns - f.time_ns > 200 * MS for f in maker.exchange.fills)
    assert (maker.parameters.alpha, maker.parameters.order_qty) == (2, 0.75)


RECORDINGS = sorted(Path(os.environ.get("RECORDINGS", "/nowhere")).glob("*.gz"))


@pytest.mark.skipif(not RECORDINGS, reason="RECORDINGS names no folder of real recordings")
def test_replay_and_backtest_write_the_same_log_for_the_real_recordings(tmp_path):
    busy = "--requote-move-bps 0.05 --gamma 0 --min-half-spread-bps 0.01 --delta 0 --zeta 0".split()
    for source in RECORDINGS:
        path = tmp_path / source.name
        path.write_bytes(source.read_bytes())
        assert same_logs(path).count(",lp,") > 5
        same_logs(path, *busy)


@pytest.mark.parametrize("pace", [0.1, 2.0])
@pytest.mark.parametrize("seed", range(10, 13))
def test_known_best_prices_decide_to_the_bit_what_single_messages_decide(seed, pace, tmp_path):
    stream, more = tm.busy_market(seed, 40), dict(requote_move_bps=pace, stale_after_s=0.5)
    slow, slow_log, _ = tm.run(stream, **more)
    log, tape, n = io.StringIO(), with_best(stream, tmp_path), len(stream)
    fast = tm.make(log, **tm.BUSY | more)
    for start, stop in ((0, n // 3), (n // 3, n // 2), (n // 2, n)):
        fast.follow(tape, start, stop)
    assert fast.exchange.fills == slow.exchange.fills and len(slow.exchange.fills) > 8
    assert log.getvalue() == slow_log
    assert repr(fast.state) == repr(slow.state) and fast.exchange.counts == slow.exchange.counts


def test_a_fill_before_a_whole_second_leaves_the_mid_of_that_second(tmp_path):
    """The mid rises after the fill, then the asks are gone for long."""
    hit, up = trades(12_700, (ASK, -50, 1)), delta(12_800, {3: 1}, {1: 0, 4: 0, 5: 1})
    story = calm(18_000, hit, up, delta(13_050), delta(13_100, {}, {5: 0, 9: 0}))
    log = same_logs(write(tmp_path / "story.gz", story, **CALM))
    *_, quote, row = decisions(io.StringIO(log))
    assert (row["reason"], row["inventory"]) == ("book one-sided", "1")
    spent = float(quote["bid_price"]) * (1 + 2e-4)
    assert float(row["equity"]) == near(50_002 - spent)  # the mid: 2 USDT up


# ---- 2. The cache of columns -------------------------------------------------------


@pytest.mark.parametrize("block", [7, 100_000])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_prices_kept_are_those_of_a_plain_dict(seed, block, tmp_path, monkeypatch):
    monkeypatch.setattr(backtest, "BLOCK", block)
    for stream in (noise(seed), rough_session(seed)[:800]):
        tape, oracle = with_best(stream, tmp_path), best_by_dicts(stream)
        assert {side: best.tolist() for side, best in tape.best.items()} == oracle
    assert NO_LEVEL in best_by_dicts(noise(seed))[ASK]


@pytest.mark.parametrize("block", [1, 3, 64, 100_000])
def test_columns_read_back_are_those_of_all_messages_at_once(block, tmp_path, monkeypatch):
    """A first block without a ticker wrote the header twice."""
    monkeypatch.setattr(backtest, "BLOCK", block)
    for stream in (noise(1, 150), rough_session(1)[:500], [delta(1), trades(2, (BID, 1, 1))]):
        tape, whole = with_best(stream, tmp_path), build_tape(stream)
        whole = dataclasses.replace(whole, best=tape.best)
        found, asked = backtest.flatten(tape), backtest.flatten(whole)
        for name in asked:
            assert found[name].dtype == asked[name].dtype, name
            assert repr(found[name].tolist()) == repr(asked[name].tolist()), name  # nan too
        assert tape.notes == whole.notes


@pytest.fixture
def parsed(monkeypatch) -> list:
    """The recordings that were parsed so far."""
    names, replay = [], feed.replay
    monkeypatch.setattr(feed, "replay", lambda p, parser: names.append(p.name) or replay(p, parser))
    return names


def test_the_columns_are_made_anew_when_what_they_depend_on_changes(tmp_path, parsed, monkeypatch):
    path = write(tmp_path / "a.gz", calm(3000))

    def is_made_once(tick=None, lot=None) -> bool:
        before = len(parsed)
        counts = [backtest.load_recording([path], tick, lot, None).counts for _ in range(3)]
        assert counts[0] == counts[1] == counts[2] and counts[0]["book"] == 3
        return len(parsed) == before + 1

    assert is_made_once() and not is_made_once()
    os.utime(path, ns=(1, 2))  # another time
    assert is_made_once()
    path.write_bytes(path.read_bytes() + gzip.compress(b""))
    os.utime(path, ns=(1, 2))  # another size
    assert is_made_once()
    assert is_made_once(tick="0.25") and not is_made_once(lot="0.5") and not is_made_once()
    monkeypatch.setattr(backtest, "CACHE_VERSION", 99)
    assert is_made_once() and not list(backtest.CACHE.glob("*.part"))


@pytest.mark.parametrize("facts", [None, "", "{", "[]", "null", '{"made_of": 1}', "column"])
def test_a_half_written_or_damaged_cache_is_made_anew(facts, tmp_path, parsed):
    path = write(tmp_path / "a.gz", calm(3000), **CALM)
    assert backtest.main(["--data", str(path)]) == 0
    (folder,) = backtest.CACHE.iterdir()
    if facts in (None, "column"):
        (folder / ("kind.npy" if facts else "facts.json")).unlink()
    else:
        (folder / "facts.json").write_text(facts)
    assert backtest.main(["--data", str(path)]) == 0 and len(parsed) == 2


def test_where_the_cache_cannot_be_written_the_systems_folder_serves(tmp_path, monkeypatch):
    path, block = write(tmp_path / "a.gz", calm(3000)), tmp_path / "file"
    block.write_text("in the way")
    monkeypatch.setattr(backtest, "CACHE", block / "cache")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert load(path).counts["book"] == 3
    assert len(list((tmp_path / "marketmaker-cache").iterdir())) == 1
    monkeypatch.setattr(tempfile, "tempdir", str(block))
    with pytest.raises(feed.UserError, match="can be written"):
        load(path)


def test_nothing_is_unpickled(tmp_path):
    """A column of objects ended in a segmentation fault."""
    np.save(tmp_path / "evil.npy", np.array([{}] * 4, object), allow_pickle=True)
    with pytest.raises(ValueError):
        backtest.read_column(tmp_path / "evil.npy")


def test_parts_of_a_recording_in_order_are_the_whole(tmp_path, capsys):
    path = write(tmp_path / "whole.gz", rough_session(5), **ROUGH)
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    parts = [str(tmp_path / f"part{k}.gz") for k in range(3)]
    for part, start, stop in zip(parts, (0, 701, 1502), (701, 1502, len(lines))):
        Path(part).write_bytes(gzip.compress(b"".join(lines[start:stop])))
    for name, data in (("one", [str(path)]), ("three", parts)):
        assert backtest.main(["--data", *data, "--out", str(tmp_path / name)]) == 0
    for one in (tmp_path / "one").iterdir():
        assert one.read_text() == (tmp_path / "three" / one.name).read_text() != ""
    assert backtest.main(["--data", parts[0], parts[2], parts[1]]) == 2
    assert "part1.gz begins before" in capsys.readouterr().err


MAKE = """
import os, sys, time, backtest, feed
from market import delta, snapshot
backtest.CACHE, path, count = *map(backtest.Path, sys.argv[1:3]), int(sys.argv[3])
def parse():
    yield from [snapshot(1), delta(2), delta(3)]
    path.with_name(f"{how}-{os.getpid()}").touch()
    while len(list(path.parent.glob(f"{how}-*"))) < count and time.monotonic() < end:
        time.sleep(0)  # until all are as far
end = time.monotonic() + 20
for how in range(20):
    parser = feed.Parser(feed.Instrument(tick_text=f"0.{how + 1}"))
    folder, facts = backtest.cached([path], parser, parse)
    assert len(backtest.read_tape(folder, facts)) == 3
"""


def test_two_processes_that_make_the_same_cache_at_once_both_succeed(tmp_path, cache):
    """Who came second threw away the folder of the first."""
    path, paths = write(tmp_path / "a.gz", calm(2000)), [p for p in sys.path if p]
    command = [sys.executable, "-c", MAKE, cache, path, "2"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    ran = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1].decode() for process in ran]
    assert [process.returncode for process in ran] == [0, 0], errors
    assert not list(cache.glob("*.part")) and len(list(cache.iterdir())) == 20


# ---- 3. Worked by hand -------------------------------------------------------------


class TapeStory(tm.Story):
    """A story first told to its end, then played from columns with known best prices."""

    def __init__(self, folder: Path, *args, **more) -> None:
        self.folder, self.told, self.orders = folder, [], []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(marketmaker.MarketMaker, "take", lambda _, m: self.told.append(m))
            super().__init__(*args, **more)
        self.maker.take = self.told.append

    def order(self, *args) -> None:
        self.orders.append((len(self.told), args))

    def play(self, is_alone: bool) -> None:
        tape, at = with_best(self.told, self.folder), 0
        for stop, args in [*self.orders, (len(self.told), None)]:
            for cut in range(at + 1, stop + 1) if is_alone else [stop] * (stop > at):
                self.maker.follow(tape, at, cut)
                at = cut
            if args:
                super().order(*args)


@pytest.mark.parametrize("name", tm.STORIES)
def test_every_story_of_fills_is_the_same_with_known_best_prices(name, tmp_path):
    options, steps, fills = tm.STORIES[name]
    for side, is_alone in ((BID, False), (ASK, True)):
        for model in options.get("fill_model", "queue").split():
            story = TapeStory(tmp_path, side, **options | {"fill_model": model})
            for step in steps:
                step(story)
            story.play(is_alone)
            assert story.fills == fills, (side, model)


FOUR = calm(
    29_900,
    trades(12_000, (ASK, -4, 2.5), heard=12_040),  # 2 were before us: buys 0.5 at 49,998
    delta(14_200, {1: 5}, {1: 0, 3: 5}),  # the mid: 50,001
    trades(15_000, (BID, 5, 0.125)),  # through: sells 1 at 50,002
    # 16,500: bid 49,998.5 and ask 50,003.5, 4.00008 ticks away, rounded outward
    trades(18_000, (ASK, -3, 0.25)),  # none before us: buys 0.25 at 49,998.5
    delta(19_200, {1: 0, -1: 0, -3: 5}, {-1: 5, 3: 0}),  # the mid: 49,999
    trades(20_000, (ASK, -9, 1)),  # through: buys the other 0.75 at 49,998.5
    delta(26_200, {-1: 5}, {-1: 0, 1: 5}),  # the mid: 50,000
    tm.ticker(29_900, mark_price=50_000.0),
)


def test_four_fills_by_pencil_and_paper_down_to_every_figure(tmp_path):
    played = Run(FOUR, tmp_path)
    m = played.metrics
    assert played.traded == [(12_000, -4, 0.5), (15_000, 4, -1), (18_000, -3, 0.25),
                             (20_000, -3, 0.75)]  # fmt: skip
    assert [f.mid_price for f in played.fills] == [50_000, 50_001, 50_001, 49_999]
    assert played.quoted == [(11_500, -4, 4), (16_500, -3, 7), (21_500, -6, 2), (26_500, -4, 4)]
    money = dict(
        spread_captured=1 + 1 + 0.625 + 0.375,  # 0.5 x 2, 1 x 1, 0.25 x 2.5, 0.75 x 0.5
        revaluation=0.5 + 0.5 + 0.5,  # 0.5 x 1, -0.25 x -2, 0.5 x 1
        gross=4.5,
        fees=24.9999,  # 4.9998 + 10.0004 + 2.499925 + 7.499775
        net=-20.4999,  # = cash -25,020.4999 + 0.5 x 50,000 at the end
    )
    for name, usdt in money.items():
        assert (m[f"{name}_usdt"], m[f"{name}_bps"]) == near((usdt, usdt / 12.49995)), name
    assert m["turnover_usdt"] == 24_999 + 50_002 + 12_499.625 + 37_498.875
    nets = [float(row["equity"]) for row in played.rows]  # 3 while warming up
    assert nets == near([0, 0, 0, 0, 2.5 - 15.0002, 4 - 24.9999, 4.5 - 24.9999])
    effective = 2 / 49_998, 2.5 / 49_998.5, 0.5 / 49_998.5
    later = 1 / 49_998, 1.5 / 49_998.5  # the last one's is after the end
    bought, sold = dict.fromkeys(("0 s", "0.1 s", "1 s"), effective) | {"10 s": later}, 1
    for horizon, values in bought.items():
        sold = 3 if horizon == "10 s" else 1
        for name, parts in (("bought", values), ("sold", [sold / 50_002]),
                            ("both", [*values, sold / 50_002])):  # fmt: skip
            cell, n = m["markouts"][name][horizon], len(parts)
            assert cell == dict(mean_bps=near(1e4 * sum(parts) / n), low_bps=None, high_bps=None,
                                fills=n, clusters=1, excluded=cell["excluded"])  # fmt: skip
    assert [m["markouts"]["both"][h]["excluded"] for h in ("1 s", "10 s", "60 s")] == [0, 1, 4]
    spreads = 5 * 4 / 5 + 5 * 5 / 5.0001 + 5 * 4 / 4.9999 + 3.4 * 4 / 5
    mean = (-0.5 * 5 + 0.5 * 8.4) / 29.4  # held at the decisions: -0.5, then 0.5 twice
    assert {n: m[n] for n in EXACT} == EXACT and abs(m["residual_usdt"]) < 1e-9
    for name, value in dict(
        max_drawdown_usdt=20.9999, max_drawdown_s=18.4,  # from 11.5 to the end
        fill_ratio=3 / 8, time_to_fill_s=2.4,  # 0.4, 1.4, 3.4, 3.4
        queue_at_arrival=1, queue_at_fill=1,  # 2, 2, 0, 0
        span_s=29.4, bid_uptime=18.4 / 29.4, ask_uptime=18.4 / 29.4,
        quoted_spread_bps=spreads / 18.4, inventory_mean=mean,
        inventory_std=(0.25 * 13.4 / 29.4 - mean**2) ** 0.5,
    ).items():  # fmt: skip
        assert m[name] == near(value), name


EXACT = dict(
    max_drawdown_recovered=False, fills=4, taker_fills=0, orders_sent=8, orders_filled=3,
    refused={}, outages=[], events=len(FOUR) + 1, inventory_min=-0.5, inventory_max=0.5, at_limit=0,
    decisions=dict.fromkeys(backtest.SOURCES, 0) | {"fixed": 4, "none": 3}, sharpe_minutes=0,
    reasons={"warming up": 3}, sharpe_per_minute=None, sharpe_per_year=None, is_synthetic=False,
)  # fmt: skip


def test_inventory_is_marked_to_the_last_mid_of_all(tmp_path):
    """The mid after the last decision and the last whole second."""
    hit, fall = trades(12_000, (ASK, -5, 1)), delta(14_700, {-1: 0, -4: 0}, {-3: 5})
    played = Run(calm(14_600, hit, fall), tmp_path)
    assert played.metrics["net_usdt"] == near(2 - 3 - 9.9996)  # the mid: 49,997
    assert played.result.decisions[-1][1] == 49_997


def test_a_fee_below_0_is_a_rebate(tmp_path, capsys):
    path = write(tmp_path / "a.gz", FOUR, **CALM | dict(maker_fee_bps=-1.0))
    assert backtest.main(["--data", str(path), "--strategy", "fixed"]) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert "rebates received +12.50 +1.00 = net +17.00 +1.36" in table


def test_participation_halves_what_is_left_of_a_trade_for_us(tmp_path):
    half = Run(FOUR, tmp_path, participation=0.5)
    assert half.traded == [(12_000, -4, 0.25), (15_000, 4, -1), (18_000, -3, 0.125),
                           (20_000, -3, 0.875)]  # fmt: skip  # through: the whole rest


def test_in_an_outage_what_rests_is_hit_nothing_is_sent_and_its_cost_is_listed(tmp_path):
    before = trades(12_400, (BID, 4, 2.5))  # 2 were before us: sells 0.5
    hit = trades(15_000, (ASK, -5, 1))  # through our bid
    fall = delta(16_200, {-1: 0, -4: 0, -5: 5}, {1: 0, -3: 5})  # the mid falls by 4 ticks
    late = trades(19_750, (BID, 5, 0.5))  # through the ask, whose cancel is on its way
    after = trades(19_850, (BID, 9, 0.5))  # and when it has arrived
    outages = [(ns(13_200), ns(19_700))]
    played = Run(calm(30_500, before, hit, fall, late, after), tmp_path, outages=outages)
    assert played.traded == [(12_400, 4, -0.5), (15_000, -4, 1), (19_750, 4, -0.5)]
    assert [(f.recv_ns - ns(0)) / MS for f in played.fills] == [12_400, 19_700, 19_750]
    assert played.quoted == [(11_500, -4, 4), (19_700, None, None), (30_500, -8, 0)]
    (cost,) = played.metrics["outages"]
    assert (cost["start_ns"], cost["end_ns"], cost["fills"]) == (ns(13_200), ns(19_700), 1)
    assert cost["net_usdt"] == near(2 - 1 - 9.9996)  # captured, the fall, the fee
    names = ("ms", "reason", "bid_price", "volatility", "liquidity", "inventory")
    begin, end, *_, back = [[r[n] for n in names] for r in played.rows if r["ms"] > 12_000]
    assert begin == [13_200, "outage", "", "", "", "-0.5"]
    assert end == [19_700, "warming up", "", "", "", "0.5"]
    assert back == [30_500, "", "49996.0", "0", "0", "0"]  # neither its move nor its trade counts


def test_flattening_walks_three_levels_of_the_book(tmp_path):
    fall = delta(12_700, dict.fromkeys(WALL, 0) | {-20: 0.5, -22: 0.25, -30: 9}, {-18: 3})
    played = Run(calm(30_500, trades(12_000, (ASK, -5, 1)), fall), tmp_path,
                 max_drawdown_usdt=3.0, maker_fee_bps=0.0, taker_fee_bps=10.0)  # fmt: skip
    # Bought 1 at 49,998, the mid is 49,990.5: stopped at second 13, decided at 13,500
    assert played.traded == [(12_000, -4, 1), (13_600, -20, -0.5), (13_600, -22, -0.25),
                             (13_600, -30, -0.25)]  # fmt: skip
    assert [(f.recv_ns - ns(0)) / MS for f in played.fills[1:]] == [14_500] * 3
    m, proceeds = played.metrics, 0.5 * 49_990 + 0.25 * 49_989 + 0.25 * 49_985
    assert m["net_usdt"] == near(proceeds * (1 - 10e-4) - 49_998)
    assert m["spread_captured_usdt"] == near(2 - 0.5 * 0.5 - 0.25 * 1.5 - 0.25 * 5.5)
    assert m["revaluation_usdt"] == near(-9.5)
    assert (m["fills"], m["taker_fills"], m["markouts"]["both"]["0 s"]["fills"]) == (4, 3, 1)
    assert played.quoted == [(11_500, -4, 4), (13_500, None, None)]
    assert {r["reason"] for r in played.rows if r["ms"] > 13_000} == {"drawdown limit"}


def test_impact_lowers_the_mid_after_we_bought_and_decays_by_half_in_30_s(tmp_path):
    marks = [params(42_000, alpha=2.0), delta(12_100), delta(13_000), delta(22_000)]
    story = calm(72_500, trades(12_000, (ASK, -5, 1)), *marks)
    played, plain = (Run(story, tmp_path, impact_bps=x) for x in (10.0, 0.0))
    assert played.traded == plain.traded == [(12_000, -4, 1)]

    def change(seconds: float) -> float:
        """Of the mid: filled was 1, the depth of the bid 16, so 10 / 16 bps."""
        return 50_000 * -10e-4 / 16 * 0.5 ** (seconds / 30)

    c = dict(zip(backtest.DECISION, played.result.decisions.T))
    mids, nets = (dict(zip(c["t_s"] + 0.5, x)) for x in (c["mid"], c["gross"] - c["fees"]))
    assert mids[11.5] == 50_000 == played.fills[0].mid_price
    assert mids[42.0] == near(50_000 - 1.5625)
    for at in (16.5, 21.5, 42.0):
        assert mids[at] == near(50_000 + change(at - 12))
        assert nets[at] == near(2 - 9.9996 + change(at - 12))
    for k, seconds in enumerate((0.1, 1, 10)):  # a book message stands at each of these
        moved = 1e4 * change(seconds) / 49_998
        assert played.result.markouts[0, k] == near(plain.result.markouts[0, k] + moved)
    # mid 49,997.18, less and plus 2 USDT, outward; but no ask at the market's best bid
    assert played.quoted[1] == (16_500, -10, 0) and plain.quoted[1] == (16_500, -4, 4)


# ---- 4. No look-ahead --------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_no_event_changes_what_was_decided_or_known_before_it(seed, tmp_path):
    rng, stream = random.Random(seed), rough_session(seed)[:2400]

    def play(messages: list[Message]) -> tuple[list[str], list]:
        log = io.StringIO()
        maker = tm.make(log, **ROUGH | dict(requote_move_bps=[0.1, 2.0][seed % 2]))
        maker.follow(with_best(messages, tmp_path))
        return log.getvalue().splitlines()[1:], maker.exchange.fills

    rows, fills = play(stream)
    assert len(fills) > 5
    for t in rng.sample([m.recv_ns for m in stream[600:2300]], 5):
        past = [m for m in stream if m.recv_ns <= t]
        other_rows, other_fills = play(past + spoil(stream[len(past) :], rng))
        known = [row for row in rows if int(row[:19]) <= t]
        assert known == [row for row in other_rows if int(row[:19]) <= t] and rows != other_rows
        assert [f for f in fills if f.recv_ns <= t] == [f for f in other_fills if f.recv_ns <= t]


# ---- 5. Baselines ------------------------------------------------------------------


def test_long_inventory_lowers_both_quotes_by_golden_values_and_a_fixed_spread_is_fixed():
    shape, sigma = (0.05, 2.986162360812285, 0.04235741115084049), 10.69
    half, skew = 20.47208533844371, 9.76326865029227
    assert backtest.avellaneda_stoikov(*shape, sigma) == pytest.approx((half, skew), rel=1e-13)
    p = Parameters(order_qty=1.0, max_inventory=4.0)  # at q = 0.5: two orders long
    found = backtest.quote_avellaneda_stoikov(*shape, p, 0.5, sigma, 1.0, 2.0)
    assert found[:2] == near((half + 2 * skew, half - 2 * skew))
    for strategy in (partial(backtest.quote_avellaneda_stoikov, *shape), backtest.choose_distances):
        leans = [d.bid_bps - d.ask_bps for q in (-0.9, -0.5, 0, 0.5, 0.9)
                 for d in [strategy(p, q, sigma, 1.0, 2.0)]]  # fmt: skip
        assert leans == sorted(set(leans)) and leans[2] == near(0)
    for q in (0, 0.9, -1):
        found = backtest.fixed_spread(Parameters(default_spread_bps=7.0), q, q * q, 1.0, 2.0)
        assert found == Distances(3.5, 3.5, "fixed")


@pytest.mark.parametrize("strategy", backtest.STRATEGIES)
def test_every_strategy_has_its_flag_and_its_name_in_the_log(strategy, tmp_path):
    path, log = write(tmp_path / "a.gz", calm(17_000), **CALM), tmp_path / "log.csv"
    flags = ["--data", str(path), "--log", str(log), "--strategy", strategy]
    flags += "--risk-aversion 0.1 --fill-rate-per-s 1 --fill-decay-per-bps 2".split()
    assert backtest.main(flags) == 0
    row = decisions(io.StringIO(log.read_text()))[-1]
    assert row["source"] == strategy and row["bid_price"] < "50000" < row["ask_price"]
    if strategy == "as":  # no volatility: ln(1 + 0.1 / 2) / 0.1 = 0.488 bps away
        assert (row["bid_price"], row["ask_price"]) == ("49997.5", "50002.5")


# ---- 6. The command line -----------------------------------------------------------

FAULTS = """\
--data absent.gz: absent.gz, does not exist
--data text.txt: text.txt, no gzip recording
--data other.gz: other.gz, not a recording
--data empty.gz: empty.gz, no message
--data .: no archive
--participation 0: --participation, '0', 0.01 to 1
--participation 2: --participation, '2', 0.01 to 1
--impact-bps -1: --impact-bps, '-1', 0 or more
--impact-bps nan: --impact-bps, 'nan', 0 or more
--outages -1: --outages, '-1', 0 or more
--seed -1: --seed, '-1', 0 or more
--strategy as --risk-aversion max: --risk-aversion, 'max'
--strategy best: --strategy, 'best', lp
--alpha 77: alpha = 77, 0 to 10, --alpha
--params bad.json: alpah, did you mean alpha
--params text.txt: --params, text.txt
--depth 1000: no depth 1000, [200]
--tick-size 0.3: multiple of the tick 0.3, --tick-size
--plot none/x.png: none/x.png cannot be written
--plot .: --plot, cannot be written
--out text.txt: text.txt, cannot be written
--log text.txt: text.txt, not overwritten
--log none/x.csv: none/x.csv, cannot be written"""


@pytest.mark.parametrize("fault", FAULTS.splitlines())
def test_a_users_error_is_one_clear_line(fault, tmp_path, monkeypatch, capsys):
    flags, words = fault.split(": ")
    monkeypatch.chdir(tmp_path)
    write(Path("a.gz"), calm(3000), **CALM)
    Path("text.txt").write_text("no recording, no parameters")
    Path("bad.json").write_text('{"alpah": 1}')
    Path("other.gz").write_bytes(gzip.compress(b"time,price\n1,2\n"))
    Path("empty.gz").write_bytes(gzip.compress(b""))
    before = sorted(Path().iterdir())
    try:
        status = backtest.main(["--data", "a.gz", *flags.split()])
    except SystemExit as stopped:  # argparse's own
        status = stopped.code
    out, err = capsys.readouterr()
    err = "".join(x for x in err.splitlines(keepends=True) if not x.startswith("reading "))
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words.split(", ")), err
    assert sorted(path for path in Path().iterdir() if path.name != "cache") == before


def test_outputs_exist_with_the_columns_of_the_design(tmp_path, capsys):
    path, out, log = write(tmp_path / "a.gz", FOUR, **CALM), tmp_path / "out", tmp_path / "log.csv"
    flags = ["--out", str(out), "--log", str(log), "--plot", str(tmp_path / "p.png")]
    assert backtest.main(["--data", str(path), "--strategy", "fixed", *flags]) == 0
    table = capsys.readouterr().out.splitlines()
    assert max(map(len, table[:-1])) <= 100 and (tmp_path / "p.png").read_bytes()[1:4] == b"PNG"
    lines = {p.name: p.read_text().splitlines() for p in out.iterdir()}
    assert sorted(lines) == ["equity.csv", "fills.csv", "metrics.json", "quotes.csv"]
    assert log.read_text().splitlines()[0] == tm.HEADER.replace(" ", "")
    assert lines["quotes.csv"][0] == "time_ns,bid_price,bid_qty,ask_price,ask_qty"
    assert lines["quotes.csv"][1] == f"{ns(11_500)},49998.0,1,50002.0,1"
    assert lines["fills.csv"][:3] == [
        "time_ns,recv_ns,side,price,qty,fee,mid_price,queue_ahead",
        f"{ns(12_000)},{ns(12_040)},buy,49998,0.5,4.9998,50000,2",
        f"{ns(15_000)},{ns(15_000)},sell,50002,1,10.0004,50001,2",
    ]
    assert lines["equity.csv"][0] == "time_ns,mid_price,inventory,gross,fees,net"
    logged, (*equity, last) = (decisions(io.StringIO("\n".join(x))) for x in
                               (log.read_text().splitlines(), lines["equity.csv"]))  # fmt: skip
    for row, asked in zip(equity, logged, strict=True):
        assert [float(row[n]) for n in ("ms", "mid_price", "inventory", "net")] == [
            float(asked[n]) for n in ("ms", "mid_price", "inventory", "equity")]  # fmt: skip
    assert (last["ms"], last["net"]) == (29_900, "-20.4999")
    assert json.loads("\n".join(lines["metrics.json"]))["net_usdt"] == near(-20.4999)


@pytest.mark.parametrize("seed", [20, 21])
def test_quotes_csv_has_a_row_exactly_when_an_order_is_sent_or_cancelled(seed, tmp_path):
    """From the log and the fills: what was wanted, and what stood, in a plain dict."""
    calmer = dict(max_inventory=40.0, min_half_spread_bps=0.6, default_spread_bps=1.2)
    choose, stream = backtest.choose_distances, tm.busy_market(seed, 40)
    played = Run(stream, tmp_path, choose, **tm.BUSY | calmer)
    assert not played.metrics["refused"] and len(played.fills) > 10  # else standing is unknown
    filled, standing, expected, reposts, fills = Counter(), {}, [], 0, list(played.fills)
    for row in played.rows:
        wanted = {s: (row[f"{n}_price"], row[f"{n}_qty"]) for s, n in ((BID, "bid"), (ASK, "ask"))}
        while fills and fills[0].recv_ns <= int(row["time_ns"]):
            fill = fills.pop(0)
            filled[fill.side, fill.arrival_ns] += fill.qty
            order, arrival_ns = standing.get(fill.side, (("", ""), 0))
            if arrival_ns == fill.arrival_ns and filled[fill[2], arrival_ns] == float(order[1]):
                del standing[fill.side]
                reposts += order == wanted[fill.side]
        sent = [s for s in wanted if standing.get(s, (("", ""), 0))[0] != wanted[s]]
        standing |= {s: (wanted[s], int(row["time_ns"]) + 40 * MS) for s in sent}
        if sent:
            expected.append(",".join([row["time_ns"], *wanted[BID], *wanted[ASK]]))
    assert played.quotes.splitlines()[1:] == expected
    assert reposts > 0 and 20 < len(expected) < len(played.rows)


def test_the_same_seed_gives_the_same_outages_and_another_seed_others(tmp_path):
    path, found = write(tmp_path / "a.gz", calm(400_000), **CALM), []
    for k, seed in enumerate("112"):
        flags = ["--out", str(tmp_path / str(k)), "--outages", "3", "--seed", seed]
        assert backtest.main(["--data", str(path), *flags]) == 0
        windows = json.loads((tmp_path / f"{k}/metrics.json").read_text())["outages"]
        spans = [(w["start_ns"], w["end_ns"]) for w in windows]
        assert spans and all(5 <= (end - begin) / NS <= 60 for begin, end in spans)
        assert all(a[1] < b[0] for a, b in zip(spans, spans[1:]))
        assert ns(500) <= spans[0][0] and spans[-1][1] < ns(400_000)
        found.append(spans)
    assert found[0] == found[1] != found[2]


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        backtest.main(["--help"])
    own = "data plot out log params strategy participation impact-bps outages seed peer-rules"
    own += " risk-aversion fill-rate-per-s fill-decay-per-bps tick-size lot-size depth"
    flags = {f"--{name}" for name in (*own.split(), *(n.replace("_", "-") for n in FIELDS))}
    assert stopped.value.code == 0 and flags <= set(capsys.readouterr().out.split())
