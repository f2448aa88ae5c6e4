"""Searches repeated, stopped, killed and resumed; choices that see the past only; and what is
said of a best, against formulas and plain loops.

Most searches run in a thread. Real processes run the program from a folder of links to it,
which keeps their cache apart.
"""

import contextlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import backtest
import optimize
from feed import ASK, BID
from market import delta, in_order, ns, params, snapshot, trades, write
from test_backtest import near, read_csv, run
from test_marketmaker import LIMITS

import numpy as np
import pytest

MARKET = LIMITS | dict(
    stale_after_s=60.0, requote_move_bps=1.0, min_half_spread_bps=0.05, default_spread_bps=1.0,
    gamma=0.2, delta=0.2, zeta=0.2, maker_fee_bps=0.05,
)  # fmt: skip
MINUTES = 51  # whole ones in 52 minutes from second 20 on
SPLIT = 34  # of them in sample
FIRST_MS = 40_000  # when the first of them begins
GRIDS = "--grid default_spread_bps=0.3,0.6,1,1.5 --grid order_qty=0.5,1,2,4"
SEARCH = f"--strategy fixed --tune {GRIDS} --bootstrap 200".split()
close = partial(pytest.approx, abs=1e-5)  # USDT: sums of numbers of nine digits


def wander(minutes: int) -> list:
    """A book every 10 s that wanders, and trades around its best."""
    rng, lines, center, shown = random.Random(3), [], 0, {BID: {}, ASK: {}}
    for ms in range(0, minutes * 60_000, 10_000):
        center += rng.randint(-3, 3)
        book = {s: {center - s * k: rng.choice([0.5, 1, 2]) for k in range(1, 6)} for s in shown}
        changes = [dict.fromkeys(shown[side], 0) | book[side] for side in shown]
        lines.append(delta(ms, *changes) if lines else snapshot(ms, *changes))
        shown = book
        for later_ms in (3000, 6000):
            taker = rng.choice([BID, ASK])
            lines.append(trades(ms + later_ms, (taker, center + taker * rng.randint(1, 9), 3)))
    return lines


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """The program as links, its cache, and recordings."""
    folder = tmp_path_factory.mktemp("tuning")
    for path in Path(backtest.__file__).parent.glob("*.py"):
        (folder / path.name).symlink_to(path)
    write(folder / "market.gz", wander(52), **MARKET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backtest, "CACHE", folder / "data" / "cache")
        yield folder


def search(place: Path, folder: Path, *flags, executor=None) -> str:
    """What the command prints, with OUT for its folder."""
    data = ["--data", place / "market.gz", "--out", folder]
    status, out, err = run(*data, *flags, executor=executor)
    assert status == 0, err
    return out.replace(str(folder), "OUT")


def start_search(place: Path, folder: Path, workers: int) -> subprocess.Popen:
    """SEARCH as its user starts it. It is less urgent than we, who must come before its end."""
    flags = ["--data", place / "market.gz", *SEARCH, "--out", folder, "--workers", str(workers)]
    command, pipes = ["nice", "-n5", sys.executable, place / "backtest.py", *flags], subprocess.PIPE
    return subprocess.Popen(command, text=True, start_new_session=True, stdout=pipes, stderr=pipes)


def equity_at(folder: Path, *times_ms: int, name: str = "net") -> list[float]:
    """A column of equity.csv as it stands at these times."""
    rows = read_csv(folder / "equity.csv")
    known = [(int(row["time_ns"]), float(row[name])) for row in rows if row[name]]
    return [[value for time_ns, value in known if time_ns <= ns(ms)][-1] for ms in times_ms]


def trials_in(folder: Path) -> list:
    """The trials on file: what was changed, and net and fills by the minute."""
    (path,) = folder.glob("trials-*.jsonl")
    trials = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # it was cut off
            trials.append(json.loads(line))
    return trials


def files_in(folder: Path) -> list:
    """What a search leaves behind; its trials come in any order."""
    return [(folder / "search.json").read_text(), sorted(map(json.dumps, trials_in(folder)))]


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory) -> SimpleNamespace:
    """SEARCH in one go."""
    folder = tmp_path_factory.mktemp("whole")
    out = search(place, folder, *SEARCH)
    return SimpleNamespace(folder=folder, out=out, files=files_in(folder))


@pytest.fixture
def tried(monkeypatch) -> list[dict]:
    """What is tried out, and not read from a file."""
    changes_tried, try_out = [], backtest.try_out

    def note(setting, changes):
        changes_tried.append(changes)
        return try_out(setting, changes)

    monkeypatch.setattr(backtest, "try_out", note)
    return changes_tried


def make_up(monkeypatch, net_of) -> None:
    """Trials of which net_of(changes) says the net of each minute."""
    monkeypatch.setattr(
        backtest, "try_out", lambda _, changes: np.array([net_of(changes), np.ones(MINUTES)])
    )


# ---- 1. The same again -------------------------------------------------------------


def test_a_search_gives_the_same_on_two_workers_and_on_any_executor(place, tmp_path, whole):
    """As on the one of `whole`."""
    process = start_search(place, tmp_path / "two", 2)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.replace(str(tmp_path / "two"), "OUT") == whole.out
    assert files_in(tmp_path / "two") == whole.files
    with ThreadPoolExecutor(3) as threads:
        assert search(place, tmp_path / "threads", *SEARCH, executor=threads) == whole.out
    assert files_in(tmp_path / "threads") == whole.files


def test_of_equals_the_first_on_the_grid_is_the_best_whichever_came_first(
    place, tmp_path, monkeypatch
):
    def net_of(changes) -> np.ndarray:
        time.sleep(0.2 * (changes == {"alpha": 1.0}))
        return np.arange(MINUTES) % 7

    make_up(monkeypatch, net_of)
    with ThreadPoolExecutor(2) as threads:
        search(place, tmp_path, "--tune", "--grid", "alpha=1,2,3", executor=threads)
    assert [changes.get("alpha") for changes, _ in trials_in(tmp_path)][3] == 1  # it came last
    assert json.loads((tmp_path / "search.json").read_text())["best"] == {"alpha": 1.0}


def test_the_best_played_again_earns_what_the_search_said(place, tmp_path, whole):
    best = json.loads((whole.folder / "search.json").read_text())["best"]
    ((net, count),) = [run for changes, run in trials_in(whole.folder) if changes == best]
    (tmp_path / "params.json").write_text(json.dumps(best))
    search(place, tmp_path, "--strategy", "fixed", "--params", tmp_path / "params.json")
    bounds = [FIRST_MS + 60_000 * k for k in range(MINUTES + 1)]
    assert net == close(np.diff(equity_at(tmp_path, *bounds)))
    fills_ns = [int(row["recv_ns"]) for row in read_csv(tmp_path / "fills.csv")]
    minutes = itertools.pairwise(map(ns, bounds))
    assert count == [sum(begin < t <= end for t in fills_ns) for begin, end in minutes]


# ---- 2. Stopped, killed, resumed ---------------------------------------------------


def command_of(pid: int) -> str:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""  # it has ended


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for workers in /proc")
@pytest.mark.parametrize("what", ["Ctrl-C", "a worker is killed", "the program is killed"])
def test_a_search_that_ends_early_says_so_and_the_same_command_goes_on(
    what, place, tmp_path, whole, tried
):
    process = start_search(place, tmp_path, 1 if what == "a worker is killed" else 2)
    try:
        # Wait for two trials on file; then end it.
        while not any(p.read_bytes().count(b"\n") > 2 for p in tmp_path.glob("trials-*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(pid) for pid in children if "spawn_main" in command_of(int(pid))]
        if what == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)  # to all of the foreground, as a terminal does
        else:
            pid = workers[0] if what == "a worker is killed" else process.pid
            os.kill(pid, signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    # It says so, and no worker is left.
    (path,) = tmp_path.glob("trials-*")
    if what == "the program is killed":
        path.write_bytes(path.read_bytes()[:-2])  # in the middle of a line
    kept = trials_in(tmp_path)
    assert "Traceback" not in err and 1 < len(kept) < len(trials_in(whole.folder))
    if what == "Ctrl-C":
        assert process.returncode == 130 and "stopped: the same command goes on" in out
        assert not (tmp_path / "best.json").exists()  # of a part of the trials
    elif what == "a worker is killed":
        (line,) = [line for line in err.splitlines() if line.startswith("error")]
        assert process.returncode == 2 and "a worker was killed" in line and out == ""
    end = time.monotonic() + 20
    while any(map(command_of, workers)):
        assert time.monotonic() < end
        time.sleep(0.01)

    # The same command plays what is missing, and gives what it gives in one go.
    assert search(place, tmp_path, *SEARCH) == whole.out
    assert files_in(tmp_path) == whole.files
    assert len(tried) == len(trials_in(whole.folder)) - len(kept)


def test_trials_of_other_data_settings_or_code_never_mix(place, tmp_path, monkeypatch):
    make_up(monkeypatch, lambda changes: np.arange(MINUTES) % 7)
    other = shutil.copy(place / "market.gz", tmp_path / "other.gz")

    def files_after(*flags) -> int:
        """How many files of trials there are after a search."""
        search(place, tmp_path, "--tune", "--grid", "order_qty=1", *map(str, flags))
        return len(list(tmp_path.glob("trials-*")))

    kinds = [
        [], ["--alpha", 2], ["--strategy", "fixed"], ["--impact-bps", 1], ["--data", other],
        ["--outages", 1], ["--outages", 1, "--seed", 1], ["--participation", 0.5],
    ]  # fmt: skip
    assert [files_after(*flags) for flags in kinds] == [*range(1, 9)]
    assert files_after("--seed", 1, "--objective", "sharpe", "--bootstrap", 500) == 8
    before = other.stat()
    other.write_bytes(other.read_bytes()[:-1] + b"x")  # the same size, and time of modification
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files_after("--data", other) == 9
    monkeypatch.setattr(optimize, "__file__", __file__)  # other code
    assert files_after() == 10


# ---- 3. What is chosen, and walks forward ------------------------------------------


@pytest.mark.parametrize("objective, alpha", [("net", 2.0), ("sharpe", 3.0)])
def test_a_search_chooses_on_what_it_is_asked_and_in_sample_only(
    objective, alpha, place, tmp_path, monkeypatch
):
    rng = np.random.default_rng(5)
    nets = {  # each the best of one kind; the first would win on all minutes
        1.0: np.append(rng.normal(-1, 1, SPLIT), np.full(MINUTES - SPLIT, 1e4)),
        2.0: rng.normal(6, 9, MINUTES),  # much, and wild
        3.0: rng.normal(1, 0.1, MINUTES),
    }
    make_up(monkeypatch, lambda changes: nets.get(changes.get("alpha", 1.0), nets[1.0]))
    out = search(place, tmp_path, "--tune", "--grid", "alpha=1,2,3", "--objective", objective)
    assert f"chosen by {objective} on the first 34" in out
    found = json.loads((tmp_path / "search.json").read_text())
    after = found["out_of_sample"]["measures"]["best"]["net_usdt"][0]
    assert found["best"] == {"alpha": alpha} and after == near(nets[alpha][SPLIT:].sum())


@pytest.mark.parametrize("later, is_kept", [(2.0, True), (0.0, False), (-2.0, False)])
def test_best_json_is_replaced_only_by_what_is_better_out_of_sample_too(
    later, is_kept, place, tmp_path, monkeypatch
):
    gain = np.append(np.full(SPLIT, 1.0), np.full(MINUTES - SPLIT, later))
    make_up(monkeypatch, lambda changes: np.arange(MINUTES) % 7 + gain * bool(changes))
    (tmp_path / "best.json").write_text("of an earlier search")
    out = search(place, tmp_path, "--tune", "--grid", "alpha=2")
    assert ("Keep what was given" in out) is not is_kept
    assert ((tmp_path / "best.json").read_text() == "of an earlier search") is not is_kept


def test_around_the_best_a_finer_grid_is_tried_without_what_does_not_fit(place, tmp_path, tried):
    flags = "--strategy fixed --tune --grid order_qty=2,8 --max-inventory 8".split()
    out = search(place, tmp_path, *flags, "--default-spread-bps", "0.3")
    best = json.loads((tmp_path / "search.json").read_text())["best"]
    finer = [changes["order_qty"] for changes in tried[3:]]
    assert tried[:3] == [{}, {"order_qty": 2}, {"order_qty": 8}]
    assert 5 in finer and max(finer) <= 8 and f"{len(finer)} around its best" in out
    assert best["order_qty"] in (2, 8, *finer)


def test_the_walk_chooses_by_its_two_windows_and_trades_the_next_in_one_piece(
    place, tmp_path, monkeypatch
):
    """Of three windows of 10 minutes. After the last one looked at, others are far better."""
    chosen, spreads = [0.6, 1.5, 1.5], [0.3, 0.6, 1.0, 1.5]
    nets = {spread: np.full(MINUTES, 0.01 * spread) for spread in spreads}
    nets[0.6][:10], nets[0.3][40:] = 5, 1e6
    make_up(monkeypatch, lambda changes: nets[changes.get("default_spread_bps", 1.0)])
    flags = ["--strategy", "fixed", "--grid", "default_spread_bps=0.3,0.6,1,1.5"]
    out = search(place, tmp_path, "--walk-forward", "3", *flags)
    row = r"  2023-11-14 (\S+) +([-+.\d]+) +([-+.\d]+) +\d+ +(\S+) +default_spread_bps (\S+)"
    clock, promised, earned, carried, choices = zip(*re.findall(row, out))
    assert [*map(float, choices)] == chosen and "changed 1 of 2 times" in out
    assert clock == ("22:34:00", "22:44:00", "22:54:00")
    assert [*map(float, promised)] == pytest.approx([(5 + 0.006) / 2, 0.015, 0.015], abs=1e-3)

    # It earns what a recording does in which the parameters change at these times.
    times_ms = [FIRST_MS + minute * 60_000 for minute in (20, 30, 40, 50)]
    changes = [params(ms, default_spread_bps=x) for ms, x in zip(times_ms, chosen)]
    noted = write(tmp_path / "noted.gz", in_order([*changes, *wander(52)]), **MARKET)
    search(place, tmp_path, "--strategy", "fixed", "--data", noted)
    asked = np.diff(equity_at(tmp_path, *times_ms)) / 10
    assert [*map(float, earned)] == pytest.approx(asked, abs=6e-4) and len(set(earned)) == 3
    held = equity_at(tmp_path, *times_ms[:3], name="inventory")
    mids = equity_at(tmp_path, *times_ms, name="mid_price")
    worth = np.array(held) * np.diff(mids)
    assert [*map(float, carried)] == pytest.approx(worth, abs=6e-3) and any(worth)


@pytest.mark.parametrize("skill, verdict", [(0, "may be luck"), (1.5, "luck alone would rarely")])
def test_luck_and_the_deflated_ratio_are_those_of_the_formulas_for_the_trials(
    skill, verdict, place, tmp_path, monkeypatch
):
    rng = np.random.default_rng(1)
    nets = dict(zip(np.arange(1, 10), rng.normal(0, 1, (9, MINUTES))))
    nets[5] += skill
    make_up(monkeypatch, lambda changes: nets.get(round(changes.get("alpha", 1)), nets[1]))
    flags = ["--tune", "--grid", "alpha=1,2,3,4,5,6,7,8,9", "--objective", "sharpe"]
    out = search(place, tmp_path, *flags, "--bootstrap", "2000")
    shown = json.loads((tmp_path / "search.json").read_text())
    x = np.array([net[:SPLIT] for changes, (net, _) in trials_in(tmp_path) if changes]).T
    sharpes = x.mean(axis=0) / x.std(axis=0, ddof=1)
    k, spread = sharpes.argmax(), sharpes.var(ddof=1)
    error = optimize.sharpe_error(x[:, k])
    sure = optimize.deflated_sharpe(sharpes[k], error, spread, x.shape[1])
    luck = optimize.draw_best_of_chance(x, optimize.sharpe_score, 4000, rng)
    assert shown["deflated_sharpe"] == near(sure)
    assert shown["sharpe_by_luck"] == near(optimize.best_sharpe_by_luck(spread, x.shape[1]))
    assert shown["luck_probability"] == pytest.approx((luck >= sharpes[k]).mean(), abs=0.05)
    low = shown["in_sample"]["measures"]["best"]["sharpe"][1]
    assert shown["plateau"] == (sharpes >= low).sum() and shown["trials"] == x.shape[1]
    assert verdict in out and f"deflated Sharpe ratio {sure:.3f}" in out


# ---- 4. Regimes --------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("ties", [False, True])
def test_a_minute_is_classed_by_thresholds_of_those_before_it(classes, ties):
    rng = np.random.default_rng(classes)
    values = rng.integers(0, 9, 200).astype(float) if ties else rng.normal(size=200)
    values[rng.random(200) < 0.1] = math.nan  # it neither counts nor is classed
    for k, part in enumerate(backtest.class_by_past(values, classes).tolist()):
        past = sorted(x for x in values[:k] if x == x)
        if len(past) < 30 or values[k] != values[k]:
            assert part == -1
        else:
            thresholds = [past[-(-j * len(past) // classes) - 1] for j in range(1, classes)]
            assert part == sum(values[k] > threshold for threshold in thresholds)


def test_regimes_are_those_of_plain_loops_over_the_minutes(place, tmp_path):
    search(place, tmp_path, "--strategy", "fixed", "--regimes")
    fills_ns = [int(row["recv_ns"]) for row in read_csv(tmp_path / "fills.csv")]
    minutes = []  # volatility, directness, net, fills
    for begin_ms in range(FIRST_MS, FIRST_MS + MINUTES * 60_000, 60_000):
        end_ms = begin_ms + 60_000
        mids = equity_at(tmp_path, *range(begin_ms, end_ms + 1, 5000), name="mid_price")
        moves = [1e4 * math.log(b / a) for a, b in itertools.pairwise(mids)]
        length, (before, after) = sum(map(abs, moves)), equity_at(tmp_path, begin_ms, end_ms)
        volatility = math.sqrt(sum(move**2 for move in moves) / 60)
        direct = abs(sum(moves)) / length if length else math.nan
        count = sum(ns(begin_ms) < time_ns <= ns(end_ms) for time_ns in fills_ns)
        minutes.append((volatility, direct, after - before, count))
    volatility, direct, net, count = map(np.array, zip(*minutes))

    # Each regime is the sum over its minutes.
    regimes = json.loads((tmp_path / "metrics.json").read_text())["regimes"]
    for names, values in ((["calm", "usual", "wild"], volatility), (["range", "trend"], direct)):
        classed = backtest.class_by_past(values, len(names))
        for k, name in enumerate(names):
            regime, is_in = regimes[name], classed == k
            assert regime["minutes"] == is_in.sum() > 1 and regime["fills"] == count[is_in].sum()
            assert regime["net_usdt"] == close(net[is_in].sum())
            assert regime["net_a_minute"]["mean"] == close(net[is_in].mean())
            assert regime["volatility_bps"] == close(volatility[is_in].mean())


def test_a_search_of_nothing_but_equal_trials_is_drawn_too(place, tmp_path, monkeypatch):
    make_up(monkeypatch, lambda changes: np.zeros(MINUTES))
    out = search(place, tmp_path, "--tune", "--grid", "alpha=1,2", "--plot", tmp_path / "none.png")
    assert "deflated Sharpe ratio -" in out and "nan" not in out
    assert (tmp_path / "none.png").read_bytes().startswith(b"\x89PNG")
