"""The backtest against the live path, and against fills that were worked out by hand.

A market of market.py is written as a recording and played by the program's own command. It
is read back from the files that the command writes.
"""

import contextlib
import csv
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import avellaneda_stoikov
import backtest
import feed
import marketmaker
from feed import ASK, BID, MS, NS
from market import MID, busy_market, calm, delta, lost, ns, rough_session, snapshot, trades, write
from optimize import STRATEGIES, Distances, Parameters
from test_marketmaker import BUSY, LIMITS

import numpy as np
import pytest
from matplotlib.figure import Figure

AS = avellaneda_stoikov.__file__

CALM = LIMITS | dict(requote_move_bps=50.0, default_spread_bps=0.8, min_half_spread_bps=0.1)
ROUGH = BUSY | LIMITS | dict(max_inventory=4.0, stale_after_s=2.0)
near = partial(pytest.approx, rel=1e-8, abs=1e-8)  # the files have nine digits


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> None:
    """Where we are, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backtest, "CACHE", tmp_path / "cache")


def run(*flags, executor=None, encoding="utf-8") -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command; a search has a thread for a worker."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    with ThreadPoolExecutor(1) as thread, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            status = backtest.main([str(flag) for flag in flags], executor or thread)
        except SystemExit as stopped:  # argparse's own
            status = stopped.code
    return status, *(stream.buffer.getvalue().decode(encoding) for stream in (out, err))


def read_csv(path: Path | str) -> list[dict]:
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def play(data: Path, *flags: str) -> SimpleNamespace:
    """Run the command; all that it writes, with times and prices as market.py tells them."""
    Path("log.csv").unlink(missing_ok=True)
    status, table, err = run("--data", data, "--out", "out", "--log", "log.csv", *flags)
    assert status == 0, err
    csv_files = "log.csv", "out/quotes.csv", "out/fills.csv", "out/equity.csv"
    log, quotes, fills, equity = map(read_csv, csv_files)

    def ticks(text: str) -> float | None:
        return float(text) * 2 - MID if text else None

    for row in (*log, *quotes, *fills, *equity):
        row["ms"] = (int(row["time_ns"]) - ns(0)) / MS
    sign = dict(buy=1, sell=-1)
    return SimpleNamespace(
        metrics=json.loads(Path("out/metrics.json").read_text()), table=table, log=log,
        fills=fills, equity=equity, heard_ms=[(int(f["recv_ns"]) - ns(0)) / MS for f in fills],
        traded=[(f["ms"], ticks(f["price"]), sign[f["side"]] * float(f["qty"])) for f in fills],
        quoted=[(q["ms"], ticks(q["bid_price"]), ticks(q["ask_price"])) for q in quotes],
    )  # fmt: skip


def play_fixed(lines: list, *flags: str, **parameters) -> SimpleNamespace:
    """A fixed spread in a market told by hand."""
    recording = write(Path("market.gz"), lines, **CALM | parameters)
    return play(recording, "--strategy", "fixed", *flags)


# ---- 1. Live equals backtest -------------------------------------------------------


def assert_same_logs(data: Path, *flags: str) -> str:
    """Run both programs over a recording; the log that both write."""
    replay, log = Path("replay.csv"), Path("backtest.csv")
    for path in (replay, log):
        path.unlink(missing_ok=True)
    live = ["--replay", str(data), "--speed", "max", "--log", str(replay), *flags]
    assert marketmaker.main(live) == 0
    assert backtest.main(["--data", str(data), "--log", str(log), *flags]) == 0
    assert replay.read_bytes().splitlines(True) == log.read_bytes().splitlines(True)
    return log.read_text()


def test_replay_and_backtest_write_the_same_log_for_15_minutes_of_the_bundled_sample():
    lines = list(feed.read_lines(marketmaker.SAMPLE))
    first = [f"{t} {text}\n" for t, text in lines if t <= lines[0][0] + 900 * NS]
    Path("sample.gz").write_bytes(gzip.compress("".join(first).encode(), 1))
    assert assert_same_logs(Path("sample.gz")).count(",lp,") > 150


@pytest.mark.parametrize("seed, pace", [(0, 0.1), (1, 0.1), (1, 2.0), (2, 2.0)])
def test_replay_and_backtest_write_the_same_log_for_a_rough_session(seed, pace):
    parameters = ROUGH | dict(requote_move_bps=pace)
    flags = ["--alpha", "5"] * (seed == 1)  # against the line of parameters in the recording
    log = assert_same_logs(write(Path("a.gz"), rough_session(seed), **parameters), *flags)
    for reason in ("book crossed", "book one-sided", "far from mark price", "book lost",
                   "book stale", "drawdown limit", "warming up"):  # fmt: skip
        assert reason in log, reason


RECORDINGS = sorted(Path(os.environ.get("RECORDINGS", "/nowhere")).glob("*.gz"))


@pytest.mark.skipif(not RECORDINGS, reason="RECORDINGS names no folder of real recordings")
@pytest.mark.parametrize("source", RECORDINGS, ids=lambda path: path.name)
def test_replay_and_backtest_write_the_same_log_for_a_real_recording(source):
    busy = "--requote-move-bps 0.05 --gamma 0 --min-half-spread-bps 0.01 --delta 0 --zeta 0"
    assert assert_same_logs(source).count(",lp,") > 5
    assert_same_logs(source, *busy.split())


# ---- 2. Tapes, and no look-ahead ---------------------------------------------------


def load() -> feed.Tape:
    tape, counts = backtest.load_tape(feed.Recording(Path("a.gz")))
    assert counts["book"] == tape.is_book.sum()
    return tape


@pytest.fixture
def is_parsed_once(capsys):
    """Whether a.gz is parsed for the first of two readings, which are the same."""

    def read_twice() -> bool:
        first, second = load(), load()
        for name in feed.COLUMNS:
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
        assert first.notes == second.notes
        return capsys.readouterr().err.count("reading a.gz") == 1

    return read_twice


def test_a_recording_is_parsed_once_until_its_state_or_our_version_changes(
    monkeypatch, is_parsed_once
):
    path = write(Path("a.gz"), calm(3000))
    assert is_parsed_once() and not is_parsed_once()
    os.utime(path, ns=(1, 2))  # another time
    assert is_parsed_once()
    path.write_bytes(path.read_bytes()[:-8] + b"12345678")  # the same size and time
    os.utime(path, ns=(1, 2))
    assert is_parsed_once()
    Path("b").mkdir()  # another place
    shutil.copy2(path, "b/a.gz")
    monkeypatch.chdir("b")
    assert is_parsed_once()
    monkeypatch.setattr(backtest, "CACHE_VERSION", 99)
    assert is_parsed_once() and not is_parsed_once()


def test_a_damaged_cache_is_made_again_and_what_a_killed_process_left_is_removed(is_parsed_once):
    write(Path("a.gz"), calm(3000))
    assert is_parsed_once()
    whole, (folder,) = load(), backtest.CACHE.iterdir()
    killed = folder.with_name(folder.name + ".part")
    sound = {file.name: file.read_bytes() for file in folder.iterdir()}

    def array_file(values) -> bytes:
        np.save("column.npy", values, allow_pickle=True)
        return Path("column.npy").read_bytes()

    for name, content in [
        ("kind.npy", array_file(np.array([{}], object))),
        ("kind.npy", array_file(whole.kind[:-1])), ("kind.npy", array_file([*whole.kind, 0])),
        ("recv_ns.npy", array_file(whole.recv_ns.astype(float))),
        ("exch_ns.npy", array_file(whole.exch_ns + 1)), ("level.npy", sound["level.npy"][:-3]),
        ("notes.json", sound["notes.json"].replace(b"3", b"4")), ("notes.json", b""),
        ("sums", b"[1"), ("size.npy", None),
    ]:  # fmt: skip
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        killed.mkdir()
        assert is_parsed_once() and not killed.exists(), name


def test_several_files_or_a_folder_of_them_are_played_as_one_with_the_state_carried_on():
    """The cuts are at snapshots, as further files begin without a book."""
    Path("folder").mkdir()
    lines = rough_session(5)
    whole = play(write(Path("whole.gz"), lines, **ROUGH))
    cuts = [k for k, line in enumerate(lines) if line.message.get("type") == "snapshot"]
    bounds = [0, *cuts[1:], len(lines)]
    parts = [write(Path(f"folder/part{9 - k}.gz"), lines[begin:end], **ROUGH)
             for k, (begin, end) in enumerate(zip(bounds, bounds[1:]))]  # fmt: skip
    assert len(parts) > 1
    for data in (parts, ["folder"]):
        joined = play(data[0], "--data", *map(str, data))
        assert joined.log == whole.log and joined.fills == whole.fills and len(whole.fills) > 5
        assert joined.quoted == whole.quoted and joined.equity == whole.equity


@pytest.mark.parametrize("seed", range(2))
def test_no_future_changes_what_was_decided_or_known_before_it(seed):
    """Most is measured at whole seconds: half of the times are just after one."""
    lines, flags = rough_session(seed), ["--impact-bps", "0.5"] * (seed == 1)
    one = play(write(Path("one.gz"), lines, **ROUGH), *flags)
    times = sorted([int(row["time_ns"]) for row in one.log[60:]], key=lambda t: t % NS)
    for t in (*times[:3], *random.Random(seed).sample(times, 2)):
        future = [line for line in rough_session(seed + 50) if line.recv_ns > t]
        past = [line for line in lines if line.recv_ns <= t]
        other = play(write(Path("other.gz"), past + future, **ROUGH), *flags)
        for rows, others, clock in ((one.log, other.log, "time_ns"),
                                    (one.fills, other.fills, "recv_ns"),
                                    (one.equity, other.equity, "time_ns")):  # fmt: skip
            known = [row for row in rows if int(row[clock]) <= t]
            assert known == [row for row in others if int(row[clock]) <= t] and known
        assert one.log != other.log


# ---- 3. Frictions, by hand ---------------------------------------------------------

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
    delta(29_900),
)
SOLD = (15_000, 4, -1)


@pytest.mark.parametrize("flags, traded", [
    ("--participation 0.5", [(12_000, -4, 0.25), SOLD, (18_000, -3, 0.125), (20_000, -3, 0.875)]),
    ("--peer-rules", [(12_000, -4, 1), SOLD, (18_000, -3, 1)]),  # whole or not at all
])  # fmt: skip
def test_fills_worked_by_hand(flags, traded):
    assert play_fixed(FOUR, *flags.split()).traded == traded


def test_files_have_the_columns_of_the_design_and_what_was_worked_by_hand():
    result = play_fixed(FOUR)
    assert result.traded == [(12_000, -4, 0.5), SOLD, (18_000, -3, 0.25), (20_000, -3, 0.75)]
    assert result.quoted == [(11_500, -4, 4), (16_500, -3, 7), (21_500, -6, 2), (26_500, -4, 4)]
    lines = {path.name: path.read_text().splitlines() for path in Path("out").iterdir()}
    assert sorted(lines) == ["equity.csv", "fills.csv", "metrics.json", "quotes.csv"]
    assert lines["quotes.csv"][0] == "time_ns,bid_price,bid_qty,ask_price,ask_qty"
    assert lines["quotes.csv"][1] == f"{ns(11_500)},49998.0,1,50002.0,1"
    assert lines["fills.csv"][:2] == [
        "time_ns,recv_ns,side,price,qty,fee,mid_price,queue_ahead,rule",
        f"{ns(12_000)},{ns(12_040)},buy,49998,0.5,4.9998,50000,2,queue",
    ]
    assert lines["equity.csv"][0] == "time_ns,mid_price,inventory,gross,fees,net"
    for row, logged in zip(result.equity, result.log):
        assert row["inventory"] == logged["inventory"]
        assert float(row["net"]) == near(float(logged["equity"]))
    last = result.equity[len(result.log)]
    assert last["ms"] == 29_900 and float(last["net"]) == near(4.5 - 24.9999)


def test_in_an_outage_what_rests_is_hit_and_nothing_is_sent(monkeypatch):
    windows = [(ns(13_200), ns(19_700))]
    monkeypatch.setattr(backtest, "draw_outages", lambda *_: windows)
    result = play_fixed(calm(
        30_500,
        trades(12_400, (BID, 4, 2.5)),  # 2 were before us: sells 0.5
        trades(15_000, (ASK, -5, 1)),  # through our bid
        delta(16_200, {-1: 0, -4: 0, -5: 5}, {1: 0, -3: 5}),  # the mid falls by 4 ticks
        trades(19_750, (BID, 5, 0.5)),  # through the ask, whose cancel is on its way
        trades(19_850, (BID, 9, 0.5)),  # and when it has arrived
    ), "--outages", "1")  # fmt: skip
    assert result.traded == [(12_400, 4, -0.5), (15_000, -4, 1), (19_750, 4, -0.5)]
    assert result.heard_ms == [12_400, 19_700, 19_750]
    assert result.quoted == [(11_500, -4, 4), (19_700, None, None), (20_500, -8, 0)]
    assert [tuple(outage.values()) for outage in result.metrics["outages"]] == windows
    names = ("ms", "reason", "bid_price", "volatility", "inventory")
    begin, end, *_, back = [[r[n] for n in names] for r in result.log if r["ms"] > 12_000]
    assert begin == [13_200, "outage", "", "0", "-0.5"]
    assert end == [19_700, "warming up", "", "0", "0.5"]
    assert back == [30_500, "", "49996.0", "0", "0"]  # its move does not count


def test_outages_are_drawn_by_the_seed_within_the_data_and_apart():
    drawn = []
    for seed in "112345":
        outages = play_fixed(calm(400_000), "--outages", "5", "--seed", seed).metrics["outages"]
        windows = [(outage["start_ns"], outage["end_ns"]) for outage in outages]
        times = [ns(500), *(t for window in windows for t in window), ns(399_500)]
        assert windows and times == sorted(times)
        assert all(5 * NS <= end - begin <= 60 * NS for begin, end in windows)
        drawn.append(windows)
    assert drawn[0] == drawn[1] != drawn[2]


def test_impact_makes_each_fill_worse_by_the_orders_share_of_the_depth():
    lines, nets = calm(72_500, trades(12_000, (ASK, -5, 1))), {}
    for qty, impact in ((1, 0), (1, 10), (0.5, 0), (0.5, 10)):
        flags = "--impact-bps", str(impact)
        result = play_fixed(lines, *flags, order_qty=qty, maker_fee_bps=0.0)
        nets[qty, impact] = result.metrics["net_usdt"] / qty
    for qty in (1, 0.5):  # the depth of the bid is 16
        assert nets[qty, 10] - nets[qty, 0] == near(-49_998 * 10e-4 * qty / 16)
    hits = [trades(12_000, (ASK, -4, 2.5)), delta(13_000, {-9: 1}), trades(17_000, (ASK, -4, 3))]
    metrics = play_fixed(calm(20_000, *hits), "--impact-bps", "10").metrics
    assert (metrics["fills"], metrics["orders_filled"]) == (2, 1)  # in parts, of two prices


def test_minutes_without_a_move_are_a_range():
    regimes = play_fixed(calm(32 * 60_000), "--regimes").metrics["regimes"]
    minutes = [regimes[name]["minutes"] for name in ("all", "range", "trend", "not classed")]
    assert minutes == [31, 1, 0, 30]


# ---- 4. Strategies -----------------------------------------------------------------


def test_long_inventory_lowers_both_quotes_by_golden_values_and_a_fixed_spread_is_fixed():
    shape = dict(gamma=0.05, A=2.986162360812285, k=0.04235741115084049)
    half, skew = 20.47208533844371, 9.76326865029227
    p = Parameters(order_qty=1.0, max_inventory=4.0, default_spread_bps=7.0)
    for q, orders in ((0, 0), (0.5, 2), (-0.25, -1)):
        quote = avellaneda_stoikov.quote(p, SimpleNamespace(volatility=10.69), q, **shape)
        assert quote == pytest.approx((half + orders * skew, half - orders * skew), rel=1e-13)
        assert STRATEGIES["fixed"](p, None, q) == Distances(3.5, 3.5)


def test_strategies_are_set_side_by_side_and_each_is_as_it_is_alone():
    market = write(Path("market.gz"), FOUR, **CALM)
    *alone, together = (run("--data", market, "--strategy", *names)[1]
                        for names in (["lp"], ["fixed"], [AS], ["lp", "fixed", AS]))
    assert together == "\n".join(alone) and len(set(alone)) == 3
    quote = play(market, "--strategy", AS).log[-1]
    assert quote["source"] == Path(AS).stem and quote["bid_price"] < "50000" < quote["ask_price"]


def test_each_file_is_played_alone_with_mean_standard_error_and_the_paired_difference():
    names = [write(Path(f"{seed}.gz"), busy_market(seed, 60), **ROUGH) for seed in (1, 2, 3)]
    table = run("--each", "--data", *names, "--strategy", "lp", "fixed")[1].strip().split("\n\n")
    nets = [[play(name, "--strategy", s).metrics["net_usdt"] for name in names]
            for s in ("lp", "fixed")]  # fmt: skip
    nets.append([a - b for a, b in zip(*nets)])
    for block, title, values in zip(table, ("lp", "fixed", "lp - fixed"), nets, strict=True):
        shown = [row.split()[-7] for row in block.splitlines()]
        assert block.split(",")[0].strip() == title and shown[0] == "net"
        expected = [*values, np.mean(values), np.std(values, ddof=1) / 3**0.5]
        assert [*map(float, shown[1:])] == pytest.approx(expected, abs=0.006)
    assert len(set(nets[2])) == 3


def test_a_file_of_ones_own_is_a_strategy_and_what_is_no_quote_falls_back():
    market, code = write(Path("market.gz"), FOUR, **CALM), "def quote(parameters, market, q):\n"
    for body, source, reason in (
        (" return 1.0 + market.depths[1] / market.depths[-1], 1 - q", "mine", ""),
        (" return 1.0, 0.0", "default", "mine quotes (1.0; 0.0)"),
        (" return parameters.gone", "default", "mine failed: AttributeError"),
    ):
        Path("mine.py").write_text(code + body)
        row = play(market, "--strategy", "mine.py").log[-1]
        assert row["source"] == source and row["reason"].startswith(reason)


# ---- 5. The command line -----------------------------------------------------------

FAULTS = """\
--data absent.gz: absent.gz
--data text.txt: text.txt, recording
--data empty.gz: empty.gz, recording
--data /dev/null: /dev/null
--data late.gz a.gz: a.gz, begins before, order
--data a.gz coin.gz: coin.gz, another market, alone
--tick-size 0.3: multiple of the tick 0.3, --tick-size
--bootstrap 100 --data late.gz: minutes, fewer, more --data
--walk-forward: 30 minutes, fewer than the 60, --data
--grid alpha=1,2: --grid needs --tune or --walk-forward
--seed 5: --seed needs --bootstrap or --outages or --tune or --walk-forward
--each --tune: --each does not go with --tune, leave
--tune --log log.csv: --log does not go with --tune
--symbol KOINUSDT: KOINUSDT
--tune --strategy lp fixed: --strategy
--tune --grid alpah=1,2: alpah is not a parameter, did you mean alpha
--tune --grid maker-fee-bps=-1,2: --grid maker_fee_bps
--tune --strategy fixed: --strategy fixed, alpha, default_spread_bps=3,6,12
--tune --grid order_qty=0.5,20: max_inventory = 10, order_qty = 20, raise --max-inventory
--out text.txt: text.txt
--log text.txt: text.txt
--params pipe: --params pipe, regular file
--plot none/x.png: none/x.png"""


@pytest.mark.parametrize("fault", FAULTS.splitlines())
def test_a_users_error_is_one_clear_line_before_any_work(fault, monkeypatch):
    flags, words = fault.split(": ")
    monkeypatch.setattr(backtest, "play", pytest.fail)
    write(Path("a.gz"), calm(31 * 60_000), **CALM)
    write(Path("late.gz"), [snapshot(31 * 60_000)], **CALM)
    coin = gzip.decompress(Path("late.gz").read_bytes()).replace(b"COINUSDT", b"KOINUSDT")
    for name, content in (("coin", coin), ("empty", b"")):
        Path(f"{name}.gz").write_bytes(gzip.compress(content))
    Path("text.txt").write_text("no recording")
    os.mkfifo("pipe")
    before = sorted(Path().iterdir())
    status, out, err = run("--data", "a.gz", *flags.split())
    *reading, line = err.splitlines()
    assert (status, out) == (2, "") and all(note.startswith("reading ") for note in reading), err
    assert line.startswith("error: ") and all(word in line for word in words.split(", ")), err
    assert sorted(path for path in Path().iterdir() if path.name != "cache") == before


def test_ctrl_c_ends_a_run_with_the_table_of_what_was_played_and_replaces_no_whole_one(monkeypatch):
    quote, quotes = STRATEGIES["fixed"], []

    def quote_and_interrupt(*market) -> Distances:
        quotes.append(market)
        if len(quotes) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return quote(*market)

    flags = "--strategy fixed lp --bootstrap 100 --regimes --out out --plot p.png --data".split()
    flags.append(write(Path("market.gz"), calm(31 * 60_000), **CALM))
    status, table, _ = run(*flags, encoding="ascii")
    assert status == 0 and "Bootstrap: 30 minutes" in table and table.endswith("plot: p.png\n")
    files = [Path("p.png"), *Path("out").iterdir()]
    whole = [path.read_bytes() for path in files]
    assert whole[0].startswith(b"\x89PNG")
    monkeypatch.setitem(STRATEGIES, "fixed", quote_and_interrupt)
    status, table, _ = run(*flags)
    assert status == 130 and "STOPPED EARLY" in table.splitlines()[0] and "Bootstrap" not in table
    assert [path.read_bytes() for path in files] == whole and len(quotes) == 2
    metrics, before = (json.loads(Path(f"out/{name}metrics.json").read_text())
                       for name in ("stopped-", ""))  # fmt: skip
    assert metrics["is_stopped"] and metrics["decisions"]["fixed"] == 2 and not before["is_stopped"]
    assert [row["bid_price"] for row in read_csv("out/stopped-quotes.csv")] == ["49998.0"]
    assert Path("stopped-p.png").read_bytes().startswith(b"\x89PNG")


def test_a_full_disk_is_told_at_the_end_and_all_the_rest_is_done(monkeypatch):
    data, before = write(Path("market.gz"), FOUR, **CALM), resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = run("--data", data, "--out", "whole", "--log", "whole.csv")
    monkeypatch.setattr(backtest, "CACHE", Path("full"))  # of tapes, too
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))  # no file grows beyond it
    try:
        flags = "--out", "out", "--log", "log.csv", "--plot", "p.png"
        status, out, err = run("--data", data, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (status, out) == (2, whole[1])
    assert all(name in line for name in ("log.csv", "metrics.json", "p.png"))
    assert Path("whole.csv").read_text().startswith(log := Path("log.csv").read_text())
    assert log.endswith("\n") and not [*Path().rglob("*.part")]
    assert {path.stem for path in Path("out").iterdir()} == {"equity", "fills", "quotes"}


# ---- 6. Pictures -------------------------------------------------------------------


def panels_of(monkeypatch, lines: list, *flags: str, **parameters) -> tuple[list, str]:
    """The panels that a run draws, each on axes of its own, and their title."""
    drawn = []
    monkeypatch.setattr(backtest, "draw_figure", lambda *given, **_: drawn.append(given) or b"")
    play_fixed(lines, *flags, "--plot", "p.png", **parameters)
    ((rows, title),) = drawn
    axes = Figure().subplots(len(rows))
    for ax, (_, panel) in zip(axes, rows):
        panel(ax)
    return [*axes], title


def curve(ax, label: str) -> np.ndarray:
    """Times, ms of the market, and values of a curve."""
    (line,) = [line for line in ax.lines if line.get_label() == label]
    return line.get_xydata() * [60_000, 1] + [500, 0]


def test_curves_step_at_the_fills_with_the_values_worked_by_hand(monkeypatch):
    axes, _ = panels_of(monkeypatch, FOUR)
    for k, label, values in (
        (1, "held", [0.5, -0.5, -0.25, 0.5]), (2, "spread captured", [1, 2, 2.625, 3]),
        (2, "- fees", [-4.9998, -15.0002, -17.500125, -24.9999]),
    ):  # fmt: skip
        x, y = curve(axes[k], label).T
        steps = np.flatnonzero(np.diff(y, prepend=0))
        assert x[steps] == near([12_040, 15_000, 18_000, 20_000]) and y[steps] == near(values)
    assert curve(axes[2], "= net")[-1] == near([29_900, 4.5 - 24.9999])
    assert curve(axes[2], "+ revaluation")[-1] == near([29_900, 1.5])


def test_the_mid_is_drawn_every_second_and_a_lost_book_is_a_gap(monkeypatch):
    rise, gone = delta(12_300, {}, {1: 0, 3: 5}), [lost(20_200), snapshot(25_400), delta(26_100)]
    axes, _ = panels_of(monkeypatch, calm(20_000, rise) + gone)
    mids = {round(x): y for x, y in curve(axes[0], "mid")}
    assert mids[12_000] == 50_000 and mids[13_000] == 50_000.5 and np.isnan(mids[20_200])
    assert sorted(mids) == [*range(1000, 20_001, 1000), 20_200, 26_000, 26_100]
    labels = [ax.get_legend_handles_labels()[1] for ax in axes]
    assert labels[0] == ["mid", "our bid", "our ask"] and "drawdown" not in labels[2]
    assert labels[3:] == [["as quoted"]]  # no terms of a fixed spread, and no markouts


def test_pictures_of_runs_with_different_flags_never_have_the_same_title(monkeypatch):
    kinds = ["", "--alpha 2", "--alpha 2.0000001", f"--strategy {AS}", "--outages 3",
             "--impact-bps 1", "--outages 3 --seed 1", "--bootstrap 100 --seed 1"]  # fmt: skip
    titles = [panels_of(monkeypatch, calm(31 * 60_000), *flags.split())[1] for flags in kinds]
    assert len(set(titles)) == len(kinds)
    assert all(words in titles[k] for k, words in enumerate([
        "market.gz", "alpha 2", "version", "avellaneda", "3 outages", "impact_bps 1", "seed 1",
    ]))  # fmt: skip
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert f"seed {metrics['seed']}, version {metrics['version']}" in titles[-1]
