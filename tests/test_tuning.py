"""Searches repeated, stopped, killed and resumed; choices that see the past only; and what is
said of a best, against pencil and paper or plain loops.

Most searches run in a thread. Those of real processes run the program from a folder of links
to it, which keeps their cache apart.
"""

import contextlib
import io
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
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from market import calm, delta, in_order, ns, params, snapshot, trades, write
from test_backtest import near, read_csv
from test_marketmaker import LIMITS

import backtest
import optimize
from feed import ASK, BID, NS

ROOT = Path(backtest.__file__).parent
MARKET = LIMITS | dict(
    stale_after_s=60.0, requote_move_bps=1.0, min_half_spread_bps=0.05, default_spread_bps=1.0,
    gamma=0.2, delta=0.2, zeta=0.2, maker_fee_bps=0.05,
)  # fmt: skip
MINUTES = 51  # whole ones in 52 minutes from second 20 on
SPLIT = 34  # of them in sample
FIRST_MS = 40_000  # when the first of them begins
SPREADS = [0.3, 0.6, 1.0, 1.5]
SEARCH = "--strategy fixed --tune --grid default_spread_bps=0.3,0.6,1,1.5 --grid order_qty=0.5,1,2"
SEARCH = [*SEARCH.split(), "--bootstrap", "200"]


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
    for path in ROOT.glob("*.py"):
        (folder / path.name).symlink_to(path)
    write(folder / "market.gz", wander(52), **MARKET)
    write(folder / "short.gz", wander(20), **MARKET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backtest, "CACHE", folder / "data" / "cache")
        yield folder


def run(*flags, executor=None) -> tuple[int, str, str]:
    """Exit status, stdout, stderr, with a thread for a worker."""
    out, err = io.StringIO(), io.StringIO()
    with ThreadPoolExecutor(1) as thread, contextlib.redirect_stdout(out):
        with contextlib.redirect_stderr(err):
            try:
                status = backtest.main([str(flag) for flag in flags], executor or thread)
            except SystemExit as stopped:  # argparse's own
                status = stopped.code
    return status, out.getvalue(), err.getvalue()


def run_process(place: Path, *flags) -> subprocess.Popen:
    """The program as its user starts it, with workers of its own."""
    command = [sys.executable, place / "backtest.py", "--data", place / "market.gz", *flags]
    return subprocess.Popen(
        [str(word) for word in command], text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def search(place: Path, folder: Path, *flags, executor=None) -> str:
    """What a search prints, with OUT for its folder."""
    data = ["--data", place / "market.gz", "--out", folder]
    status, out, err = run(*data, *flags, executor=executor)
    assert status == 0, err
    return out.replace(str(folder), "OUT")


def trials_in(folder: Path) -> list[dict]:
    """The trials on file; a line that was cut off is none."""
    (path,) = folder.glob("trials-*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def files_in(folder: Path) -> list:
    """What a search leaves behind; its trials come in any order."""
    texts = [(folder / name).read_text() for name in ("search.json", "best.json")]
    return [*texts, sorted(map(json.dumps, trials_in(folder)))]


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

    def try_out(_, changes):
        net = np.array(net_of(changes), float)
        return backtest.Trial(ns(FIRST_MS), net, np.ones(len(net), int))

    monkeypatch.setattr(backtest, "try_out", try_out)


# ---- 1. The same again -------------------------------------------------------------


def test_a_search_gives_the_same_on_1_and_2_workers_and_on_any_executor(place, tmp_path, whole):
    processes = [run_process(place, *SEARCH, "--workers", n, "--out", tmp_path / n) for n in "12"]
    for n, process in zip("12", processes):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.replace(str(tmp_path / n), "OUT") == whole.out
        assert files_in(tmp_path / n) == whole.files
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
    assert trials_in(tmp_path)[0]["changes"] != {"alpha": 1.0}
    assert json.loads((tmp_path / "best.json").read_text()) == {"alpha": 1.0}


def test_the_best_played_again_earns_what_the_search_said(place, tmp_path, whole):
    best = json.loads((whole.folder / "best.json").read_text())
    (trial,) = [trial for trial in trials_in(whole.folder) if trial["changes"] == best]
    flags = ["--strategy", "fixed", "--params", whole.folder / "best.json", "--bootstrap", "100"]
    search(place, tmp_path, *flags)
    equity = [(int(row["time_ns"]), float(row["net"])) for row in read_csv(tmp_path / "equity.csv")]
    at_ns = [ns(FIRST_MS + 60_000 * k) for k in range(MINUTES + 1)]
    nets = [[net for t, net in equity if t <= at][-1] for at in at_ns]
    assert trial["net"] == near(np.diff(nets))
    fills_ns = [int(row["recv_ns"]) for row in read_csv(tmp_path / "fills.csv")]
    assert trial["fills"] == [sum(a < t <= b for t in fills_ns) for a, b in zip(at_ns, at_ns[1:])]


# ---- 2. Mistakes of a user ---------------------------------------------------------

FAULTS = """\
--tune --grid alpah=1,2: alpah is not a parameter, did you mean alpha
--tune --grid alpha=1,77: alpha = 77, 0 to 10, lower
--tune --grid alpha: --grid alpha, numbers, alpha=0.5,1,2
--tune --grid alpha=1,x: --grid alpha=1,x, numbers, alpha=0.5,1,2
--tune --grid alpha=1,nan: alpha = nan, not a finite number
--tune --grid fill_model=queue,touch: --grid fill_model=queue,touch
--tune --grid maker-fee-bps=-1,2: --grid maker_fee_bps, given and not chosen
--tune --strategy as: --strategy as, does not use alpha, default_spread_bps=3,6,12
--tune --grid order_qty=0.5,20: max_inventory = 10, order_qty = 20, raise --max-inventory
--tune --data short.gz: 19 minutes, fewer than the 30, give more --data
--grid alpha=1,2: --grid needs --tune or --walk-forward
--tune --log log.csv: --log, one run
--walk-forward --strategy lp fixed: --strategy, one run
--walk-forward 4: 51 minutes, fewer than the 60, --data
--walk-forward half: --walk-forward, 'half', number from 1
--tune --workers 0: --workers, '0', number from 1
--tune --objective luck: --objective, 'luck', net, sharpe
--tune --out text.txt: text.txt, cannot be written
--tune --plot none/x.png: --plot none/x.png, cannot be written"""


@pytest.mark.parametrize("fault", FAULTS.splitlines())
def test_a_users_error_is_one_clear_line_before_any_work(
    fault, place, tmp_path, monkeypatch, tried
):
    flags, words = fault.split(": ")
    monkeypatch.chdir(tmp_path)
    for name in ("market.gz", "short.gz"):
        Path(name).symlink_to(place / name)
    Path("text.txt").touch()
    before = sorted(Path().iterdir())
    status, out, err = run("--data", "market.gz", *flags.split())
    err = "".join(x for x in err.splitlines(keepends=True) if not x.startswith("reading "))
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words.split(", ")), err
    assert sorted(Path().iterdir()) == before and not tried


# ---- 3. Stopped, killed, resumed ---------------------------------------------------


def command_of(pid: int) -> str:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""  # it has ended


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc for the workers")
@pytest.mark.parametrize("who", ["Ctrl-C", "a worker is killed", "all but the workers is killed"])
def test_a_search_that_ends_early_says_so_and_the_same_command_goes_on(
    who, place, tmp_path, whole, tried
):
    process = run_process(place, *SEARCH, "--workers", "1" if "worker" in who else "2",
                          "--out", tmp_path)  # fmt: skip
    try:
        # Wait for two trials on file, then look for the workers.
        while not any(p.read_bytes().count(b"}\n") > 1 for p in tmp_path.glob("trials-*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(pid) for pid in children if "spawn_main" in command_of(pid)]
        if who == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)  # to all of the foreground, as a terminal does
        else:
            os.kill(workers[0] if who == "a worker is killed" else process.pid, signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    # What it says, and that no worker is left.
    kept = trials_in(tmp_path)
    assert "Traceback" not in err and 1 < len(kept) < 13
    if who == "Ctrl-C":
        assert process.returncode == 0 and f"stopped: the same command goes on from the {kept}" in out
        best = max(kept[1:], key=lambda trial: sum(trial["net"][:SPLIT]))["changes"]
        assert json.loads((tmp_path / "best.json").read_text()) == best
    elif who == "a worker is killed":
        (line,) = [line for line in err.splitlines() if line.startswith("error")]
        assert process.returncode == 2 and f"a worker was killed" in line
        assert f"{len(kept)} trials are kept" in line and out == ""
    end = time.monotonic() + 20
    while any(map(command_of, workers)):
        assert time.monotonic() < end
        time.sleep(0.01)

    # The same command plays what is missing, and gives what it gives in one go.
    assert search(place, tmp_path, *SEARCH) == whole.out
    assert files_in(tmp_path) == whole.files
    assert len(tried) == len(trials_in(whole.folder)) - len(kept)


def test_a_file_of_trials_that_breaks_off_in_mid_line_is_completed(place, tmp_path, whole, tried):
    (source,) = whole.folder.glob("trials-*")
    *lines, last = source.read_bytes().splitlines(keepends=True)
    broken = b"".join([*lines[:5], b"7\n", b'{"changes": 3}\n', *lines[5:], last[:-2]])
    (tmp_path / source.name).write_bytes(broken)
    for _ in range(2):
        assert search(place, tmp_path, *SEARCH) == whole.out
        assert len(tried) == 1  # and the second time nothing
    assert (tmp_path / source.name).read_bytes().startswith(broken + b"\n")


def test_trials_of_other_data_settings_or_code_never_mix(place, tmp_path, monkeypatch):
    make_up(monkeypatch, lambda changes: np.arange(MINUTES) % 7)
    other = tmp_path / "other.gz"
    shutil.copy(place / "market.gz", other)

    def files(*flags) -> int:
        """How many files of trials there are after a search."""
        search(place, tmp_path, "--tune", "--grid", "order_qty=1", *flags)
        return len(list(tmp_path.glob("trials-*")))

    kinds = [
        ["--alpha", "2"], ["--strategy", "fixed"], ["--impact-bps", "1"], ["--data", other],
        ["--outages", "1"], ["--outages", "1", "--seed", "1"], ["--participation", "0.5"],
    ]  # fmt: skip
    assert [files(), *(files(*flags) for flags in kinds)] == list(range(1, len(kinds) + 2))
    assert files("--seed", "1", "--objective", "sharpe", "--bootstrap", "500") == len(kinds) + 1
    os.utime(other, ns=(1, 2))
    assert files("--data", other) == len(kinds) + 2
    code = tmp_path / "code.py"
    code.touch()
    monkeypatch.setattr(optimize, "__file__", str(code))
    assert files() == len(kinds) + 3


# ---- 4. What is chosen -------------------------------------------------------------


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
    flags = ["--tune", "--grid", "alpha=1,2,3", "--objective", objective]
    out = search(place, tmp_path, *flags)
    assert f"chosen by {objective} on the first 34, judged on the 17 after" in out
    assert json.loads((tmp_path / "best.json").read_text()) == {"alpha": alpha}
    shown = json.loads((tmp_path / "search.json").read_text())
    for part, minutes in (("in_sample", slice(SPLIT)), ("out_of_sample", slice(SPLIT, None))):
        value, low, high = shown[part]["measures"]["best"]["net_usdt"]
        assert value == near(nets[alpha][minutes].sum()) and low < value < high


def test_around_the_best_a_finer_grid_is_tried_without_what_does_not_fit(place, tmp_path, tried):
    flags = "--strategy fixed --tune --grid order_qty=2,8 --max-inventory 8".split()
    out = search(place, tmp_path, *flags, "--default-spread-bps", "0.3")
    best = json.loads((tmp_path / "best.json").read_text())
    finer = [changes["order_qty"] for changes in tried[3:]]
    assert tried[:3] == [{}, {"order_qty": 2}, {"order_qty": 8}]
    assert 5 in finer and max(finer) <= 8 and f"{len(finer)} around its best" in out
    assert best.pop("order_qty") in (2, 8, *finer)
    assert best == dict(max_inventory=8, default_spread_bps=0.3)  # with what was given


# ---- 5. Walk-forward ---------------------------------------------------------------

LENGTH = 10  # minutes of a window, of which three are traded


def test_the_walk_chooses_by_its_two_windows_and_trades_the_next_in_one_piece(
    place, tmp_path, monkeypatch
):
    """Each choice is the best where it may look; before and after, others are far better."""
    winners = [0.6, 1.5, 1.5]
    nets = {spread: np.full(MINUTES, 0.01 * spread) for spread in [*SPREADS, None]}
    nets[0.6][:LENGTH] = 5
    nets[0.6][-1] = nets[0.3][-LENGTH - 1 :] = 1e6
    make_up(monkeypatch, lambda changes: nets[changes.get("default_spread_bps")])
    flags = ["--strategy", "fixed", "--grid", f"default_spread_bps={','.join(map(str, SPREADS))}"]
    out = search(place, tmp_path, "--walk-forward", "3", *flags)
    row = r"  2023-11-14 (22:\d\d:00) +([-+.\d]+) +([-+.\d]+) +(\d+) +default_spread_bps (\S+)"
    rows = re.findall(row, out)
    assert [float(chosen) for *_, chosen in rows] == winners and "changed 1 of 2 times" in out
    assert [clock for clock, *_ in rows] == ["22:34:00", "22:44:00", "22:54:00"]
    promised = [(5 + 0.006) / 2, 0.015, 0.015]
    assert [float(inside) for _, inside, *_ in rows] == pytest.approx(promised, abs=1e-3)

    # What it earned is a run of a recording in which the parameters change at these times.
    changes = [params(FIRST_MS + (k + 2) * LENGTH * 60_000, default_spread_bps=spread)
               for k, spread in enumerate(winners)]  # fmt: skip
    noted = write(tmp_path / "noted.gz", in_order([*changes, *wander(52)]), **MARKET)
    search(place, tmp_path, "--strategy", "fixed", "--data", noted)
    equity = [(int(row["time_ns"]), float(row["net"])) for row in read_csv(tmp_path / "equity.csv")]
    bounds = [ns(FIRST_MS + k * LENGTH * 60_000) for k in (2, 3, 4, 5)]
    nets = [[net for t, net in equity if t <= at][-1] for at in bounds]
    earned = [float(outside) for _, _, outside, *_ in rows]
    assert earned == pytest.approx(np.diff(nets) / LENGTH, abs=6e-4) and len(set(earned)) == 3


# ---- 6. Intervals, and the price of a search ---------------------------------------


def test_intervals_of_independent_minutes_are_those_of_the_normal_law(
    place, tmp_path, monkeypatch
):
    """What both runs share does not blur their difference."""
    rng = np.random.default_rng(3)
    shared, best = rng.normal(0, 20, MINUTES), rng.normal(1, 1, MINUTES)
    make_up(monkeypatch, lambda changes: shared + best * bool(changes))
    search(place, tmp_path, "--tune", "--grid", "alpha=1", "--bootstrap", "4000")
    part = json.loads((tmp_path / "search.json").read_text())["in_sample"]
    assert (part["periods"], part["resamples"]) == (SPLIT, 4000)
    for run_name, net in (("best", shared + best), ("as given", shared), ("difference", best)):
        value, low, high = part["measures"][run_name]["net_usdt"]
        wide = 2 * 1.96 * net[:SPLIT].std() * SPLIT**0.5
        assert value == near(net[:SPLIT].sum()) and low < value < high
        assert high - low == pytest.approx(wide, rel=0.2)
    level = np.cumsum((shared + best)[:SPLIT])
    deepest = max(max([0, *level[:k]]) - level[k] for k in range(SPLIT))
    assert part["measures"]["best"]["max_drawdown_usdt"][0] == near(deepest)


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
    x = np.array([t["net"][:SPLIT] for t in trials_in(tmp_path) if t["changes"]]).T
    sharpes = x.mean(axis=0) / x.std(axis=0, ddof=1)
    k, spread, shape = sharpes.argmax(), sharpes.var(ddof=1), optimize.shape_of
    sure = optimize.deflated_sharpe(sharpes[k], spread, x.shape[1], SPLIT, *shape(x[:, k]))
    luck = optimize.draw_best_of_chance(x, optimize.sharpe_score, 4000, rng)
    assert shown["deflated_sharpe"] == near(sure)
    assert shown["sharpe_by_luck"] == near(optimize.best_sharpe_by_luck(spread, x.shape[1]))
    assert shown["luck_probability"] == pytest.approx((luck >= sharpes[k]).mean(), abs=0.05)
    low = shown["in_sample"]["measures"]["best"]["sharpe"][1]
    assert shown["plateau"] == (sharpes >= low).sum() and shown["trials"] == x.shape[1]
    assert verdict in out and f"deflated Sharpe ratio {sure:.3f}" in out


# ---- 7. Regimes --------------------------------------------------------------------


def test_a_minute_is_classed_among_those_before_it():
    past = [float(x) for x in range(1, 31)]
    for value, k in ((0, 0), (10, 0), (10.5, 1), (20, 1), (20.5, 2), (99, 2)):
        classed = backtest.class_by_past(np.array([*past, value]), 3)
        assert classed.tolist() == [-1] * 30 + [k], value
    late = backtest.class_by_past(np.array([math.nan, *past[:-1], 5.0, math.nan, 30.0]), 3)
    assert late.tolist() == [-1] * 32 + [2]  # what is unknown neither counts nor is classed


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("ties", [False, True])
def test_classes_are_those_of_thresholds_of_the_past(classes, ties):
    rng = np.random.default_rng(classes)
    values = rng.integers(0, 9, 200).astype(float) if ties else rng.normal(size=200)
    for k, part in enumerate(backtest.class_by_past(values, classes).tolist()):
        past = sorted(values[:k])
        thresholds = [past[-(-j * k // classes) - 1] for j in range(1, classes)] if k >= 30 else []
        assert part == (sum(values[k] > x for x in thresholds) if k >= 30 else -1)


def test_regimes_are_those_of_plain_loops_over_the_minutes(place, tmp_path):
    search(place, tmp_path, "--strategy", "fixed", "--regimes")
    rows, fills = read_csv(tmp_path / "equity.csv"), read_csv(tmp_path / "fills.csv")
    regimes = json.loads((tmp_path / "metrics.json").read_text())["regimes"]

    def last(name: str, at_ms: int) -> float:
        return [float(r[name] or "nan") for r in rows if int(r["time_ns"]) <= ns(at_ms)][-1]

    # Each minute: volatility, directness, net and fills.
    minutes = []
    for begin in range(FIRST_MS, FIRST_MS + MINUTES * 60_000, 60_000):
        mids = [last("mid_price", begin + 5000 * k) for k in range(13)]
        moves = [1e4 * math.log(b / a) for a, b in itertools.pairwise(mids)]
        length = sum(map(abs, moves))
        net = last("net", begin + 60_000) - last("net", begin)
        count = sum(ns(begin) < int(f["recv_ns"]) <= ns(begin + 60_000) for f in fills)
        volatility = math.sqrt(sum(move**2 for move in moves) / 60)
        minutes.append((volatility, abs(sum(moves)) / length if length else math.nan, net, count))
    volatility, direct, net, count = map(np.array, zip(*minutes))

    # Each regime is the sum over its minutes.
    by_volatility = backtest.class_by_past(volatility, 3)
    by_direction = backtest.class_by_past(direct, 2)
    for name, is_in in dict(
        all=net == net, calm=by_volatility == 0, usual=by_volatility == 1, wild=by_volatility == 2,
        range=by_direction == 0, trend=by_direction == 1,
    ).items():  # fmt: skip
        regime = regimes[name]
        assert regime["minutes"] == is_in.sum() > 1 and regime["fills"] == count[is_in].sum()
        assert regime["net_usdt"] == near(net[is_in].sum())
        assert regime["net_a_minute"]["mean"] == near(net[is_in].mean())
        assert regime["volatility_bps"] == pytest.approx(volatility[is_in].mean(), rel=1e-5)


# ---- 8. Pictures -------------------------------------------------------------------


def test_a_search_and_a_walk_are_drawn_and_need_no_display(place, tmp_path, whole, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    shutil.copytree(whole.folder, tmp_path / "out")
    flags = [*SEARCH, "--walk-forward", "3", "--regimes", "--plot", tmp_path / "all.png"]
    out = search(place, tmp_path / "out", *flags)
    assert out.endswith(f"plot: {tmp_path}/all.png\n") and "Regimes of the best" in out
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_a_search_of_nothing_but_equal_trials_is_drawn_too(place, tmp_path, monkeypatch):
    make_up(monkeypatch, lambda changes: np.zeros(MINUTES))
    flags = ["--tune", "--grid", "alpha=1,2", "--plot", tmp_path / "none.png"]
    out = search(place, tmp_path, *flags)
    assert "deflated Sharpe ratio -" in out and "nan" not in out
    assert (tmp_path / "none.png").read_bytes().startswith(b"\x89PNG")
