"""Tuning, and what is said of it: searches repeated, stopped, killed and resumed; choices
that see the past only; and every figure against pencil and paper or plain loops.

Most searches run in threads, over 52 minutes that are cheap to play (told in ticks of
0.5 USDT away from MID and ms after START_MS, as in test_marketmaker.py); those of real
processes import the program from a folder of links to it, which keeps the cache apart.
"""

import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from market import calm, write
from matplotlib.figure import Figure
from scipy.stats import t as student
from test_marketmaker import LIMITS, delta, ns, params, trades
from test_metrics import START_NS, decision, fill, result_of

import backtest
import feed
from backtest import Trial, key_of
from feed import ASK, BID, MS, NS, UserError
from marketmaker import ParameterFile, choose_parameters
from optimize import draw_positions, expand_grid, interval_of, sharpe_score

ROOT = Path(backtest.__file__).parent
MARKET = LIMITS | dict(
    stale_after_s=60.0, requote_move_bps=1.0, min_half_spread_bps=0.05, default_spread_bps=1.0,
    gamma=0.2, delta=0.2, zeta=0.2, maker_fee_bps=0.05,
)  # fmt: skip
MINUTES = 51  # whole ones in 52 minutes from second 20 on
SEARCH = "--strategy fixed --tune --grid default_spread_bps=0.3,0.6,1,1.5 --grid order_qty=0.5,1,2"
SEARCH = [*SEARCH.split(), *"--refine 3 --bootstrap 200".split()]
near = partial(pytest.approx, rel=1e-9, abs=1e-9)


def wander(minutes: int) -> list[feed.Message]:
    """A book every 10 s that wanders, and trades around its best."""
    rng, stream, center, shown = random.Random(3), [], 0, ({}, {})
    for second in range(0, minutes * 60, 10):
        center += rng.randint(-3, 3)
        new = [{center - s * k: rng.choice([0.5, 1, 2]) for k in range(1, 6)} for s in (BID, ASK)]
        changes = [dict.fromkeys(old, 0) | now for old, now in zip(shown, new)]
        kind, shown = feed.DELTA if stream else feed.SNAPSHOT, new
        stream.append(delta(1000 * second, *changes, kind=kind))
        for ms in (3000, 6000):
            taker = rng.choice([BID, ASK])
            entry = (taker, center + taker * rng.randint(1, 9), 3)
            stream.append(trades(1000 * second + ms, entry))
    return stream


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """The program as links, its cache of columns, and recordings."""
    folder = tmp_path_factory.mktemp("tuning")
    for path in ROOT.glob("*.py"):
        (folder / path.name).symlink_to(path)
    write(folder / "market.gz", wander(52), **MARKET)
    write(folder / "half.gz", wander(32), **MARKET)
    write(folder / "short.gz", wander(20), **MARKET)
    write(folder / "brief.gz", calm(30_000), **MARKET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backtest, "CACHE", folder / "data" / "cache")
        patch.setattr(backtest, "CHANCE_DRAWS", 20)
        yield folder


def run(*flags, executor=None) -> tuple[int, str, str]:
    """Exit status, stdout, stderr; in a thread, or in processes with --workers."""
    out, err = io.StringIO(), io.StringIO()
    with ThreadPoolExecutor(1) as thread:
        own = None if "--workers" in flags else executor or thread
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = backtest.main([str(flag) for flag in flags], own)
            except SystemExit as stopped:  # argparse's own
                status = stopped.code
    return status, out.getvalue(), err.getvalue()


def settle(place: Path, *flags):
    """Options and setting of a command line."""
    flags = ["--data", place / "market.gz", "--strategy", "fixed", *flags]
    options = backtest.build_arguments().parse_args([str(flag) for flag in flags])
    return options, backtest.make_setting(options)


def written(folder: Path) -> list[dict]:
    """The trials on file; a line that was cut off is none."""
    (path,) = folder.glob("trials-*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def said(folder: Path, out: str) -> tuple[str, str, str]:
    """What a search printed, and the two files that it left beside its trials."""
    files = [(folder / name).read_text() for name in ("search.json", "best.json")]
    return out.replace(str(folder), "OUT"), *files


def intervals(*of) -> dict:
    """summarize_bootstrap without the resamples."""
    return backtest.summarize_bootstrap(*of)[0]


def made_up(net, held=0.0, fills=1, start_ns=ns(40_000)) -> Trial:
    net = np.asarray(net, float)
    return Trial(start_ns, net, np.full(len(net), float(held)), np.full(len(net), fills))


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """SEARCH in one go."""
    folder = tmp_path_factory.mktemp("whole")
    status, out, _ = run("--data", place / "market.gz", *SEARCH, "--out", folder)
    assert status == 0
    return SimpleNamespace(folder=folder, out=out, said=said(folder, out), trials=written(folder))


@pytest.fixture
def played(monkeypatch) -> list:
    """What is tried out, and not read from a file."""
    found, try_out = [], backtest.try_out
    monkeypatch.setattr(backtest, "try_out", lambda setting, changes: (
        found.append(changes), try_out(setting, changes))[1])  # fmt: skip
    return found


# ---- 1. The same again -------------------------------------------------------------


def test_a_search_gives_the_same_on_1_2_and_4_workers_and_in_threads(place, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(place), *sys.path])  # where workers import from
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))  # not pytest
    flags = "--tune --walk-forward 1 --grid alpha=0.5,2 --grid gamma=0.2,1 --refine 3".split()
    found, try_out = [], backtest.try_out

    def try_slowly(setting, changes):  # so that the first to begin is the last to come
        time.sleep(0.3 * (changes == {"alpha": 0.5, "gamma": 0.2}))
        return try_out(setting, changes)

    with ThreadPoolExecutor(2) as threads:
        for name in ("1", "2", "4", "threads"):
            own = ["--data", place / "half.gz", "--out", tmp_path / name]
            if name == "threads":
                monkeypatch.setattr(backtest, "try_out", try_slowly)
            else:
                own += ["--workers", name]
            status, out, err = run(*flags, *own, executor=threads)
            assert status == 0 and "4 of 4 configurations" in err
            found.append((*said(tmp_path / name, out), written(tmp_path / name)))
    one, *others = [(*told, sorted(map(json.dumps, trials))) for *told, trials in found]
    assert others == [one] * 3
    first = [line["changes"] for line in found[-1][-1]].index({"alpha": 0.5, "gamma": 0.2})
    assert first > 1 and len(found[0][-1]) > 6  # it came late; there were steps of refinement


def test_of_equals_the_first_on_the_grid_is_the_best_whichever_came_first(
    place, tmp_path, monkeypatch
):
    def try_out(setting, changes):
        time.sleep(0.2 * (changes == {"alpha": 1.0}))
        return made_up(np.arange(MINUTES) % 7)

    monkeypatch.setattr(backtest, "try_out", try_out)
    flags = ["--tune", "--grid", "alpha=1,2,3", "--refine", "0", "--out", tmp_path]
    with ThreadPoolExecutor(2) as threads:
        status, *_ = run("--data", place / "market.gz", *flags, executor=threads)
    assert status == 0 and written(tmp_path)[-1]["changes"] == {"alpha": 1.0}
    assert json.loads((tmp_path / "best.json").read_text()) == {"alpha": 1.0}


def test_the_seed_of_the_resamples_is_that_of_the_command(whole, place):
    for seed, is_same in (("0", True), ("1", False)):
        flags = ["--data", place / "market.gz", *SEARCH, "--out", whole.folder, "--seed", seed]
        status, out, _ = run(*flags)
        assert status == 0 and (out == whole.out) == is_same
        assert out.split("In sample")[0] == whole.out.split("In sample")[0]  # no luck in a search


# ---- 2. Bad input ------------------------------------------------------------------

FAULTS = """\
--tune --grid alpah=1,2: alpah is not a parameter, did you mean alpha
--tune --grid alpha=1,77: --grid, alpha = 77, 0 to 10, lower
--tune --grid alpha=: --grid alpha=, no value, alpha=0.5,1,2
--tune --grid alpha: --grid alpha, no value, alpha=0.5,1,2
--tune --grid alpha=,: --grid alpha=, no value
--tune --grid alpha=x: --grid alpha=x, must be numbers
--tune --grid alpha=1,nan: alpha = nan, not a finite number
--tune --grid alpha=1 --grid alpha=2: --grid alpha, given twice, in one
--tune --grid fill_model=queue,touch: --grid fill_model, the exchange decides, --fill-model
--tune --grid maker-fee-bps=-1,2: --grid maker_fee_bps, the exchange decides
--tune --strategy as: --strategy as, does not use alpha, default_spread_bps=3,6,12
--tune --grid max_inventory=0.5,20: max_inventory = 0.5, order_qty = 1, raise --max-inventory
--tune --alpha 77: alpha = 77, 0 to 10, --alpha
--tune --data short.gz: 19 minutes, fewer than 10, give more --data
--tune --data brief.gz: 0 minutes, fewer than 10, give more --data
--grid alpha=1,2: --grid needs --tune or --walk-forward
--tune --log log.csv: --log needs one run, not with --tune
--walk-forward --log log.csv: --log needs one run
--against fixed: --against needs --bootstrap
--tune --bootstrap 100 --against fixed: --against needs --bootstrap, without --tune
--walk-forward --grid max_inventory=5,20: max_inventory, leave it out of --walk-forward
--tune --walk-forward --grid max_inventory=5,20: max_inventory, leave it out of --walk-forward
--walk-forward 50: 51 minutes, 52 windows of 0, fewer than 10, --data
--walk-forward --data short.gz: 19 minutes, 6 windows of 3, --data
--walk-forward 0: --walk-forward, '0', 1 or more
--walk-forward half: --walk-forward, 'half', whole number
--bootstrap 5: --bootstrap, '5', 100 or more
--bootstrap 100 --data brief.gz: --bootstrap, minutes, fewer than 10, give more --data
--bootstrap 100 --against missing.json: --against, missing.json
--bootstrap 100 --against text.txt: --against, text.txt
--bootstrap 100 --against alpah.json: --against, alpah is not a parameter, did you mean alpha
--bootstrap 100 --against joint.json: --against, max_inventory = 10, order_qty = 20
--tune --refine -1: --refine, '-1', 0 or more
--tune --workers 0: --workers, '0', 1 or more
--tune --objective luck: --objective, 'luck', net, sharpe, penalized
--tune --penalty nan: --penalty, 'nan', 0 or more
--tune --out text.txt: text.txt, cannot be written
--tune --plot none/x.png: --plot none/x.png, cannot be written"""


@pytest.mark.parametrize("fault", FAULTS.splitlines())
def test_a_users_error_is_one_clear_line_before_any_work(
    fault, place, tmp_path, monkeypatch, played
):
    flags, words = fault.split(": ")
    monkeypatch.chdir(tmp_path)
    play, runs = backtest.play, []
    monkeypatch.setattr(backtest, "play", lambda *a, **more: runs.append(a) or play(*a, **more))
    for name in ("market.gz", "short.gz", "brief.gz"):
        Path(name).symlink_to(place / name)
    Path("text.txt").write_text("no parameters")
    Path("alpah.json").write_text('{"alpah": 1}')
    Path("joint.json").write_text('{"order_qty": 20}')
    before = sorted(Path().iterdir())
    status, out, err = run("--data", "market.gz", *flags.split())
    err = "".join(x for x in err.splitlines(keepends=True) if not x.startswith("reading "))
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words.split(", "):
        assert word in err, (word, err)
    assert sorted(Path().iterdir()) == before and not runs and not played


# ---- 3. Stopped, killed, resumed ---------------------------------------------------

needs_proc = pytest.mark.skipif(
    not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists(),
    reason="this system does not tell in /proc what processes a process has started",
)


def resume(place, folder, whole, played) -> None:
    """The same command again gives what it gives in one go, and plays what was missing."""
    kept = len(written(folder))
    status, out, _ = run("--data", place / "market.gz", *SEARCH, "--out", folder)
    assert status == 0 and said(folder, out) == whole.said
    assert len(played) == len(whole.trials) - kept > 0
    assert sorted(map(json.dumps, written(folder))) == sorted(map(json.dumps, whole.trials))


@contextlib.contextmanager
def in_the_middle(place: Path, folder: Path, workers: int):
    """SEARCH by a process and workers of its own, two trials or more being on file. It is less
    urgent than we, who must come before it is through.
    """
    flags = ["--data", place / "market.gz", *SEARCH, "--out", folder, "--workers", str(workers)]
    process = subprocess.Popen(
        ["nice", "-n5", sys.executable, place / "backtest.py", *flags], text=True,
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        end = time.monotonic() + 60
        while not any(p.read_bytes().count(b"}\n") > 1 for p in folder.glob("trials-*")):
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.002)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        pids = [int(pid) for pid in children if "spawn_main" in command_of(pid)]
        assert len(pids) == workers
        yield process, pids
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def command_of(pid) -> str:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""  # it has ended, as one has of which nothing is left to read


@needs_proc
def test_a_killed_worker_is_named_in_a_line_and_no_trial_is_lost(place, tmp_path, whole, played):
    with in_the_middle(place, tmp_path, 1) as (process, (worker,)):
        os.kill(worker, signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    (path,), kept = tmp_path.iterdir(), len(written(tmp_path))
    assert (process.returncode, out) == (2, "") and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error")]
    assert "a worker was killed" in line and f"{kept} trials are kept in {path}" in line
    resume(place, tmp_path, whole, played)


@needs_proc
def test_ctrl_c_reports_the_best_so_far_and_the_same_command_goes_on(
    place, tmp_path, whole, played
):
    """One of the two workers is still starting, and was killed by it with a long traceback."""
    with in_the_middle(place, tmp_path, 2) as (process, workers):
        os.killpg(process.pid, signal.SIGINT)  # to all of the foreground, as a terminal does
        out, err = process.communicate(timeout=60)
    kept = written(tmp_path)  # all of it is whole
    assert process.returncode == 0 and "Traceback" not in err and "error" not in err
    assert f"{len(kept) - 1} of 12 on the grid, 0 of refinement   STOPPED EARLY" in out
    assert f"goes on: {len(kept)}\n" in out
    split = backtest.split_of(MINUTES)
    best = max(kept[1:], key=lambda line: sum(line["net"][:split]))["changes"]
    assert json.loads((tmp_path / "best.json").read_text()) == best
    end = time.monotonic() + 10
    while (left := [pid for pid in workers if command_of(pid)]) and time.monotonic() < end:
        time.sleep(0.01)
    assert not left
    resume(place, tmp_path, whole, played)


def test_what_workers_still_play_is_ended_when_we_leave(monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    with backtest.start_workers(1) as pool:
        future = pool.submit(time.sleep, 60)
        (child,) = multiprocessing.active_children()
        while not future.running() and not future.done():
            time.sleep(0.01)
        begin = time.monotonic()
    assert not child.is_alive() and time.monotonic() - begin < 10


@pytest.mark.parametrize("cut", [2, 5000])
def test_a_file_of_trials_cut_off_in_mid_line_is_completed(cut, place, tmp_path, whole, played):
    (source,) = whole.folder.glob("trials-*")
    path, data = tmp_path / source.name, source.read_bytes()
    path.write_bytes(data[:-cut])
    *lines, broken = data[:-cut].split(b"\n")
    assert broken and len(lines) > 5  # it is cut off in mid-line
    for _ in range(2):
        status, out, _ = run("--data", place / "market.gz", *SEARCH, "--out", tmp_path)
        assert status == 0 and said(tmp_path, out) == whole.said
        assert len(played) == len(whole.trials) - len(lines) > 0  # and nothing again
    assert path.read_bytes().startswith(data[:-cut] + b"\n")


@pytest.mark.parametrize("line", ["", "7", "{}", '{"changes": 3}', "\udcff", '{"changes": {}}'])
def test_what_is_no_trial_is_passed_over_and_left_alone(line, place, tmp_path, whole):
    (source,) = whole.folder.glob("trials-*")
    first, *rest = source.read_bytes().splitlines(keepends=True)
    path = tmp_path / source.name
    path.write_bytes(first + line.encode(errors="surrogateescape") + b"\n" + b"".join(rest))
    before, (_, setting) = path.read_bytes(), settle(place)
    search = backtest.Search(setting, tmp_path, None, threading.Event(), None)
    search.file.close()
    assert len(search.known) == len(whole.trials) and path.read_bytes() == before


def test_another_base_another_data_file_or_other_code_make_another_file(
    place, tmp_path, monkeypatch
):
    def name(*flags) -> str:
        _, setting = settle(place, *flags)
        search = backtest.Search(setting, tmp_path, None, threading.Event(), None)
        search.file.close()
        return search.path.name

    other = tmp_path / "market.gz"
    shutil.copy(place / "market.gz", other)
    kinds = [
        [], ["--alpha", "2"], ["--strategy", "lp"], ["--impact-bps", "1"], ["--data", other],
        ["--outages", "1"], ["--outages", "1", "--seed", "1"],
    ]  # fmt: skip
    names = [name(*flags) for flags in kinds]
    assert len(set(names)) == len(kinds) and name() == names[0]
    assert name("--seed", "1", "--objective", "sharpe", "--bootstrap", "500") == names[0]
    os.utime(other, ns=(1, 2))
    assert name("--data", other) not in names
    monkeypatch.setattr(backtest, "MODULES", ("feed", "backtest"))
    assert name() not in names


class Alarm:
    """An event that is set once it has been asked `count` times."""

    def __init__(self, count: int) -> None:
        self.count = count

    def is_set(self) -> bool:
        self.count -= 1
        return self.count < 0


@pytest.mark.parametrize("flags", ["", "--regimes --against as"])
@pytest.mark.parametrize("count", [0, 9, 30, 50])
def test_ctrl_c_in_a_run_that_is_resampled_is_no_traceback(count, flags, place, monkeypatch):
    """The rival had played other minutes, or none: their columns did not fit together."""
    monkeypatch.setattr(backtest, "STEP", 50)  # messages of 936, and it asks twice for each
    monkeypatch.setattr(feed, "stop_signal", lambda: Alarm(count))
    flags = ["--strategy", "fixed", "--bootstrap", "100", *flags.split()]
    status, out, err = run("--data", place / "market.gz", *flags)
    assert (status, err) == (0, "")
    assert ("STOPPED EARLY" in out.splitlines()[0]) == (count < 30)  # else in the rival's, if any


def test_stopped_before_anything_was_played_a_search_says_so(place, tmp_path, monkeypatch):
    monkeypatch.setattr(feed, "stop_signal", lambda: Alarm(0))
    for flags in (SEARCH, ["--walk-forward", "2"]):
        status, out, _ = run("--data", place / "market.gz", *flags, "--out", tmp_path)
        assert status == 0 and "stopped; trials kept" in out and "Traceback" not in out


# ---- 4. The winner -----------------------------------------------------------------


def test_the_winner_played_again_earns_what_the_search_said(place, tmp_path, whole):
    path = whole.folder / "best.json"
    winner = json.loads(path.read_text())
    (line,) = [line for line in whole.trials if line["changes"] == winner]
    flags = ["--strategy", "fixed", "--params", path, "--bootstrap", "100", "--out", tmp_path]
    status, out, _ = run("--data", place / "market.gz", *flags)
    found = json.loads((tmp_path / "metrics.json").read_text())
    own = found["bootstrap"]["of"]["this run"]
    assert status == 0 and found["bootstrap"]["periods"] == len(line["net"]) == MINUTES
    assert own["net_usdt"]["value"] == near(sum(line["net"])) and own["fills"] == sum(line["fills"])
    _, setting = settle(place, "--params", path)
    again = backtest.cut_into_minutes(backtest.play(setting))
    assert again.net.tolist() == line["net"] and again.held.tolist() == line["held"]
    assert (again.start_ns, again.fills.tolist()) == (line["start_ns"], line["fills"])


def test_the_winner_is_a_file_of_parameters_with_what_was_given(place, tmp_path):
    flags = ["--strategy", "fixed", "--tune", "--grid", "order_qty=1,2", "--refine", "0"]
    own = ["--default-spread-bps", "1.2", "--out", tmp_path]
    assert run("--data", place / "market.gz", *flags, *own)[0] == 0
    values = ParameterFile(tmp_path / "best.json").values
    assert values == {"default_spread_bps": 1.2, "order_qty": 2}
    history = backtest.load_recording([place / "market.gz"], None, None, None)
    chosen = choose_parameters(values, history.start, history.instrument)
    assert (chosen.order_qty, chosen.default_spread_bps, chosen.gamma) == (2, 1.2, 0.2)


# ---- 5. The score, and the cut into minutes ----------------------------------------


def test_a_run_is_cut_at_whole_minutes_without_the_parts_at_both_ends():
    """Data begin at 00:00:20: whole minutes are at 40, 100 and 160 s."""
    rows = [
        decision(10, gross=1.0, inventory=1.0, mid=100.0),
        decision(30, gross=4.0, inventory=3.0, mid=100.0),
        decision(99, gross=9.0, fees=1.5, inventory=-2.0, mid=90.0),
        decision(100, gross=10.0, fees=1.5, inventory=-2.0, mid=95.0),
        decision(150, gross=10.0, fees=3.0, inventory=0.5, mid=80.0),
        decision(190, gross=99.0, inventory=7.0, mid=100.0),
    ]
    fills = [fill(20 + s, 1, 99.0, 100.0) for s in (5, 39, 41, 99, 101, 165, 190)]
    cut = backtest.cut_into_minutes(result_of(rows, fills, first_ns=START_NS + 20 * NS))
    assert cut.start_ns == START_NS + 60 * NS
    assert cut.net.tolist() == [8.5 - 4, 7 - 8.5]
    assert cut.held.tolist() == [190, 40] and cut.fills.tolist() == [2, 1]
    later = cut.between(1, 2)
    assert later.start_ns == START_NS + 120 * NS
    assert (later.net.tolist(), later.held.tolist(), later.fills.tolist()) == ([-1.5], [40], [1])


@pytest.mark.parametrize("rows", [[], [decision(0)], [decision(0), decision(39)]])
def test_a_run_shorter_than_a_minute_is_cut_into_none(rows):
    cut = backtest.cut_into_minutes(result_of(rows, first_ns=START_NS + 20 * NS))
    assert [len(column) for column in cut[1:]] == [0, 0, 0]


def test_scores_are_those_of_pencil_and_paper():
    # net 1 3 2 6; peak 3 then down to 2: drawdown 1; mean value held 200
    trial = made_up([1, 2, -1, 4])._replace(held=np.array([100.0, 300, 0, 400]))
    sharpe = 1.5 / math.sqrt((0.25 + 0.25 + 6.25 + 6.25) / 3)
    assert backtest.score_trial(trial, "net", 9) == 6
    assert backtest.score_trial(trial, "sharpe", 9) == near(sharpe)
    assert backtest.score_trial(trial, "penalized", 0) == 6
    assert backtest.score_trial(trial, "penalized", 2) == near(6 - 2 * (1 + 2))


@pytest.mark.parametrize("minutes, split", [(30, 20), (31, 21), (51, 34), (1440, 960)])
def test_two_thirds_of_the_minutes_are_in_sample(minutes, split):
    assert backtest.split_of(minutes) == split


@pytest.mark.parametrize("minutes", [0, 3, 19, 28])
def test_minutes_too_few_to_judge_a_choice_are_refused(minutes):
    with pytest.raises(UserError, match=f"^{minutes} minutes.*--data"):
        backtest.split_of(minutes)


@pytest.mark.parametrize("objective", list(backtest.UNITS))
def test_a_search_chooses_on_what_it_is_asked_and_in_sample_only(
    objective, place, tmp_path, monkeypatch
):
    rng, n = np.random.default_rng(5), 34
    nets = {  # each the best of one kind; the first would win on all minutes
        1.0: np.append(rng.normal(-1, 1, n), np.full(MINUTES - n, 1e4)),
        2.0: rng.normal(6, 9, MINUTES),  # much, and wild
        3.0: rng.normal(1, 0.1, MINUTES),
        4.0: rng.normal(2.4, 0.5, MINUTES),
    }
    held = {2.0: 1e4, 4.0: 1.0}
    monkeypatch.setattr(backtest, "try_out", lambda _, changes: made_up(
        nets[alpha := changes.get("alpha", 1.0)], held.get(alpha, 0)))  # fmt: skip
    flags = ["--tune", "--grid", "alpha=1,2,3,4", "--refine", "0", "--objective", objective]
    status, out, _ = run("--data", place / "market.gz", *flags, "--out", tmp_path)
    best = json.loads((tmp_path / "best.json").read_text())
    assert status == 0 and f"chosen by {objective} on the first 34, judged on the 17" in out
    assert best == {"alpha": {"net": 2.0, "sharpe": 3.0, "penalized": 4.0}[objective]}


def test_a_refined_point_that_cannot_be_played_is_passed_over(place, tmp_path, played):
    """The simplex goes from order_qty 8 to 5, and from there to 11, above max_inventory."""
    flags = "--strategy fixed --tune --grid order_qty=2,8 --max-inventory 8 --refine 5".split()
    status, out, _ = run("--data", place / "market.gz", *flags, "--out", tmp_path)
    assert status == 0 and max(line.get("order_qty", 0) for line in played) <= 8
    tried = [line["changes"] for line in written(tmp_path)]
    assert len(tried) == len(played) == len({key_of(one) for one in tried}) > 3


# ---- 6. Walk-forward ---------------------------------------------------------------

LENGTH = MINUTES // 5  # of a window, for three of trading
SPREADS = [0.3, 0.6, 1.0, 1.5]


def walk(place, folder, *flags):
    """walk_forward over three windows."""
    options, setting = settle(place, "--walk-forward", "3", *flags)
    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(1) as pool:
        search = backtest.Search(setting, folder, pool, threading.Event(), lambda *_: None)
        found = backtest.walk_forward(search, {"default_spread_bps": SPREADS}, options)
    search.file.close()
    return found, setting


def choices_of(found) -> list[float]:
    return [json.loads(w["key"])["default_spread_bps"] for w in found["windows"]]


@pytest.fixture
def tables(monkeypatch) -> dict:
    """Made-up net by the minute of every configuration, instead of trials."""
    rng = np.random.default_rng(7)
    nets = {spread: rng.normal(0, 1, MINUTES) for spread in [*SPREADS, None]}
    monkeypatch.setattr(backtest, "try_out", lambda _, changes: made_up(
        nets[changes.get("default_spread_bps")]))  # fmt: skip
    return nets


@pytest.mark.parametrize("objective", ["net", "sharpe"])
def test_every_choice_is_the_best_of_its_two_windows_and_sees_nothing_else(
    objective, place, tmp_path, tables
):
    flags = ["--objective", objective]
    score = {"net": np.mean, "sharpe": lambda x: x.mean() / x.std(ddof=1)}[objective]

    def best(k) -> float:
        return max(SPREADS, key=lambda x: score(tables[x][k * LENGTH : (k + 2) * LENGTH]))

    found, _ = walk(place, tmp_path / "first", *flags)
    choices = choices_of(found)
    assert choices == [best(k) for k in range(3)] and len(set(choices)) > 1
    assert found["changed"] == sum(a != b for a, b in itertools.pairwise(choices))
    begin = [ns(40_000) + (k + 2) * LENGTH * 60 * NS for k in range(3)]
    assert [w["begin_ns"] for w in found["windows"]] == begin
    other = next(spread for spread in SPREADS if spread not in choices)
    before = tables[other].copy()
    for k in range(3):  # all but its windows speaks for another
        own = slice(k * LENGTH, (k + 2) * LENGTH)
        tables[other] = before + 1000
        tables[other][own] = before[own]
        again, _ = walk(place, tmp_path / f"spoilt{k}", *flags)
        assert choices_of(again) == [choices[k] if j == k else other for j in range(3)]


def test_choices_that_change_are_counted(place, tmp_path, tables):
    for spread, net in tables.items():
        net[:] = 0.01 * (spread or 0)
    tables[0.6][:LENGTH] = 5  # best of the first two windows only
    found, _ = walk(place, tmp_path)
    assert choices_of(found) == [0.6, 1.5, 1.5] and found["changed"] == 1
    text = backtest.format_walk(found, 100, np.random.default_rng(0))
    assert "changed 1 of 2 times" in text
    shown = [re.findall(r"default_spread_bps (\S+)$", line) for line in text.splitlines()]
    assert sum(shown, []) == ["0.6", "1.5", "1.5"]
    promised, *_ = [line.split() for line in text.splitlines() if line.endswith("bps 0.6")]
    assert float(promised[2]) == near((5 * LENGTH + 0.006 * LENGTH) / 2 / LENGTH, abs=1e-3)


def test_the_walk_is_one_run_in_which_parameters_change_at_the_boundaries(place, tmp_path):
    """As the program does it to a recording with the same changes in its control lines."""
    schedule = [
        (ns(40_000 + k * LENGTH * 60_000), {"alpha": alpha, "gamma": gamma})
        for k, alpha, gamma in ((2, 0.25, 1.0), (3, 4.0, 0.1), (4, 1.0, 0.5))
    ]
    _, setting = settle(place, "--strategy", "lp")
    log, given, noted = io.StringIO(), io.StringIO(), io.StringIO()
    result = backtest.play(setting, schedule=schedule, log=log)
    story = [params((at - ns(0)) // MS, **changes) for at, changes in schedule] + wander(52)
    story = sorted(story, key=lambda message: message.recv_ns)  # before those of its time
    times = [message.recv_ns for message in story]
    assert all(times.count(at) > 1 for at, _ in schedule)  # the boundaries are times of books
    path = write(tmp_path / "noted.gz", story, **MARKET)
    _, other = settle(place, "--strategy", "lp", "--data", path)
    same = backtest.play(other, log=noted)
    assert log.getvalue() == noted.getvalue()
    assert (result.parameters, result.fills) == (same.parameters, same.fills)
    assert np.array_equal(result.decisions, same.decisions, equal_nan=True)
    backtest.play(setting, log=given)
    until = schedule[0][0]
    before = [[x for x in text.getvalue().splitlines()[1:] if int(x.split(",")[0]) < until]
              for text in (log, given)]  # fmt: skip
    assert before[0] == before[1] and len(before[0]) > 100 and log.getvalue() != given.getvalue()


def test_the_walk_counts_from_the_first_choice_on(place, tmp_path, tables):
    found, setting = walk(place, tmp_path)
    schedule = [(w["begin_ns"], json.loads(w["key"])) for w in found["windows"]]
    joined = backtest.cut_into_minutes(backtest.play(setting, schedule=schedule))
    first = 2 * LENGTH
    assert found["traded"].net.tolist() == joined.net[first : 5 * LENGTH].tolist()
    assert found["given"].net.tolist() == tables[None][first : 5 * LENGTH].tolist()
    for k, window in enumerate(found["windows"]):
        part, own = window["out_of_sample"], slice(first + k * LENGTH, first + (k + 1) * LENGTH)
        assert part.net.tolist() == joined.net[own].tolist() != tables[None][own].tolist()
        assert part.start_ns == window["begin_ns"]
        past = tables[choices_of(found)[k]][k * LENGTH : (k + 2) * LENGTH]
        assert window["in_sample"].net.tolist() == past.tolist()


def test_a_recording_cannot_change_what_a_walk_has_chosen_or_the_user_has_given(place, tmp_path):
    """Its own lines of parameters held in the joined run, and in no trial."""
    notes = [params(ms, default_spread_bps=9.0) for ms in (700_000, 1_700_000)]
    story = sorted([*wander(52), *notes], key=lambda message: message.recv_ns)
    path = write(tmp_path / "noted.gz", story, **MARKET)
    _, setting = settle(place, "--data", path, "--default-spread-bps", "0.8")
    schedule = [(ns(1_240_000), {"default_spread_bps": 0.6})]
    given, joined = backtest.play(setting), backtest.play(setting, schedule=schedule)
    before = [r.decisions[r.decisions[:, 0] < 1240].tolist() for r in (given, joined)]
    assert given.parameters.default_spread_bps == 0.8 and repr(before[0]) == repr(before[1])
    assert joined.parameters.default_spread_bps == 0.6


# ---- 7. The bootstrap --------------------------------------------------------------


def test_the_difference_of_a_run_with_itself_is_nothing():
    trial = made_up(np.random.default_rng(1).normal(1, 5, 300))
    one = intervals({"a": trial, "b": trial}, 200, np.random.default_rng(2))
    for measure in backtest.MEASURES:
        assert one["of"]["difference"][measure] == dict(value=0, low=0, high=0)
        assert one["of"]["a"][measure] == one["of"]["b"][measure]
    assert one["of"]["a"]["net_usdt"]["low"] < one["of"]["a"]["net_usdt"]["high"]


def test_resampled_figures_are_those_of_plain_loops_over_the_same_minutes():
    rng, count, n = np.random.default_rng(3), 150, 120
    shared = rng.normal(0, 20, n)
    x = {"ours": shared + rng.normal(1, 1, n), "theirs": shared}
    runs = {name: made_up(net, fills=k) for k, (name, net) in enumerate(x.items(), 2)}
    found = intervals(runs, count, np.random.default_rng(4))
    both = np.column_stack(list(x.values()))
    block = backtest.common_block_length(both)
    rows = np.concatenate([*draw_positions(n, block, count, np.random.default_rng(4))])
    assert (found["resamples"], found["periods"], found["block"]) == (count, n, block)

    def measures(net) -> dict[str, float]:
        level = peak = deepest = 0.0
        for change in net:
            level += change
            peak = max(peak, level)
            deepest = max(deepest, peak - level)
        return dict(net_usdt=level, sharpe=np.mean(net) / np.std(net, ddof=1),
                    max_drawdown_usdt=deepest)  # fmt: skip

    drawn = {name: [measures(net[row]) for row in rows] for name, net in x.items()}
    for name, net in x.items():
        for measure, value in measures(net).items():
            low, high = interval_of([one[measure] for one in drawn[name]])
            assert found["of"][name][measure] == near(dict(value=value, low=low, high=high))
    for measure in backtest.MEASURES:
        gaps = [a[measure] - b[measure] for a, b in zip(drawn["ours"], drawn["theirs"])]
        low, high = interval_of(gaps)
        value = measures(x["ours"])[measure] - measures(x["theirs"])[measure]
        asked = dict(value=value, low=low, high=high)
        assert found["of"]["difference"][measure] == near(asked)
    difference = found["of"]["difference"]["net_usdt"]
    assert difference["low"] > 0 > found["of"]["ours"]["net_usdt"]["low"]  # paired: what is shared
    assert (found["of"]["ours"]["fills"], found["of"]["theirs"]["fills"]) == (2 * n, 3 * n)


@pytest.mark.parametrize("minutes, is_warned", [(499, True), (500, False)])
def test_below_500_minutes_the_table_warns(minutes, is_warned):
    trial = made_up(np.random.default_rng(1).normal(0, 1, minutes))
    summary = intervals({"this run": trial}, 100, np.random.default_rng(2))
    text = backtest.format_bootstrap(summary)
    assert text.startswith(f"Bootstrap: {minutes} minutes, 95 % by 100 resamples")
    assert ("WARNING: below 500 minutes" in text) == is_warned


@pytest.mark.parametrize("scale", [0.01, 1, 10, 1e3])
def test_columns_of_the_bootstrap_stay_apart_and_within_100(scale):
    rng = np.random.default_rng(1)
    runs = {name: made_up(scale * rng.normal(0, 1, 600)) for name in ("this run", "fixed")}
    text = backtest.format_bootstrap(intervals(runs, 100, rng))
    heads, *cells = text.splitlines()[1:5]
    assert max(map(len, text.splitlines())) <= 100
    assert re.findall(r"\S+(?: \S+)*", heads) == ["this run", "fixed", "difference"]
    cell = r" [-+]?[\d.]+ \([-+]?[\d.]+ to [-+]?[\d.]+\)"
    for line in cells:
        assert len(re.findall(cell, line)) == 3, line


def test_a_run_against_itself_or_against_a_file_of_parameters(place, tmp_path):
    path = tmp_path / "parameters-with-quite-a-long-name.json"
    path.write_text('{"default_spread_bps": 0.6}')
    flags = ["--data", place / "market.gz", "--strategy", "fixed", "--bootstrap", "100"]
    for rival, is_same in (("fixed", True), (path, False)):
        status, out, _ = run(*flags, "--against", rival, "--out", tmp_path / "out")
        assert status == 0
        table = out[out.index("Bootstrap: ") :].splitlines()
        assert max(map(len, table)) <= 100 and "difference" in table[1]
        of = json.loads((tmp_path / "out/metrics.json").read_text())["bootstrap"]["of"]
        assert (of["difference"]["net_usdt"]["value"] == 0) == is_same
        assert "drawn_net" not in of["this run"]
    _, setting = settle(place, "--default-spread-bps", "0.6")
    (own,) = [of[name] for name in of if name not in ("this run", "difference")]
    net = backtest.cut_into_minutes(backtest.play(setting)).net.sum()
    assert own["net_usdt"]["value"] == near(net)


# ---- 8. Regimes --------------------------------------------------------------------


def classes_by_brute_force(values, classes) -> list[int]:
    """Each against thresholds of the sorted values before it."""
    found = []
    for k, value in enumerate(values):
        past = sorted(x for x in values[:k] if not math.isnan(x))
        n = len(past)
        if math.isnan(value) or n < 30:
            found.append(-1)
            continue
        thresholds = [past[-(-part * n // classes) - 1] for part in range(1, classes)]
        found.append(sum(value > threshold for threshold in thresholds))
    return found


def test_a_minute_is_classed_among_those_before_it_as_by_hand():
    past = [float(x) for x in range(1, 31)]
    for value, asked in ((0, 0), (10, 0), (10.5, 1), (20, 1), (20.5, 2), (99, 2)):
        found = backtest.class_by_past(np.array([*past, value]), 3)
        assert found.tolist() == [-1] * 30 + [asked], value
    assert backtest.class_by_past(np.array(past), 3).tolist() == [-1] * 30
    late = backtest.class_by_past(np.array([math.nan, *past[:-1], 5.0, math.nan, 30.0]), 3)
    assert late.tolist() == [-1] * 32 + [2]  # what is unknown neither counts nor is classed


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("classes", [2, 3])
def test_classes_are_those_of_thresholds_of_the_past_and_know_no_future(seed, classes):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=200) if seed % 2 else rng.integers(0, 9, 200).astype(float)  # ties
    values[rng.random(200) < 0.1] = np.nan
    found = backtest.class_by_past(values, classes)
    assert found.tolist() == classes_by_brute_force(values.tolist(), classes)
    assert set(found.tolist()) == {-1, *range(classes)}
    assert (found[np.isnan(values)] == -1).all()
    for k in (40, 111):
        other = np.append(values[:k], 50 * rng.normal(size=200 - k))
        assert backtest.class_by_past(other, classes)[:k].tolist() == found[:k].tolist()


def steps(moves_bps) -> list:
    """Decisions every 5 s, at which the mid has moved by so many bps."""
    mids = 100 * np.exp(np.cumsum(moves_bps) * 1e-4)
    return [decision(5.0 * k, mid=mid) for k, mid in enumerate(mids)]


def test_a_straight_minute_is_direct_and_there_and_back_is_not():
    moves = [0] + [2] * 12 + [3, -3] * 6 + [0] * 12 + [2, -1] * 6
    volatility, direct = backtest.describe_minutes(result_of(steps(moves)))
    assert volatility == pytest.approx([2 / 5**0.5, 3 / 5**0.5, 0, (2.5 / 5) ** 0.5], abs=1e-6)
    assert direct[[0, 1, 3]] == pytest.approx([1, 0, 1 / 3], abs=1e-6)
    assert np.isnan(direct[2])  # where nothing moves, nothing has a direction


def test_minutes_are_described_as_by_plain_loops():
    rng = np.random.default_rng(6)
    t_s = np.sort(rng.uniform(0, 600, 300))
    mids = 100 * np.exp(np.cumsum(rng.normal(0, 1e-4, 300)))
    mids[rng.random(300) < 0.1] = np.nan  # between them the last one known holds
    mids[t_s < 130] = np.nan
    result = result_of([decision(t, mid=mid) for t, mid in zip(t_s, mids)],
                       first_ns=START_NS + 20 * NS)  # fmt: skip
    volatility, direct = backtest.describe_minutes(result)

    def mid_at(at_s) -> float:
        known = [mid for t, mid in zip(t_s, mids) if t <= at_s and not math.isnan(mid)]
        return known[-1] if known else math.nan

    starts = range(40, int(t_s[-1]) - 59, 60)
    assert len(volatility) == len(direct) == len(starts) == 9
    for k, start in enumerate(starts):
        path = [mid_at(start + 5 * j) for j in range(13)]
        returns = [1e4 * math.log(b / a) for a, b in itertools.pairwise(path)]
        if math.isnan(sum(returns)):
            assert np.isnan([volatility[k], direct[k]]).all() and start <= 130
        else:
            asked = math.sqrt(sum(r * r for r in returns) / 12 / 5)
            assert volatility[k] == pytest.approx(asked, rel=1e-6)
            asked = abs(sum(returns)) / sum(map(abs, returns))
            assert direct[k] == pytest.approx(asked, rel=1e-6, abs=1e-6)


def test_the_regimes_add_up_to_all_whole_minutes():
    rng, minutes = np.random.default_rng(8), 90
    count = minutes * 12 + 10
    moves = rng.normal(0, 1, count) * rng.choice([1, 3, 9], count)
    moves[9 + 12 * 50 : 9 + 12 * 55] = 0  # five minutes: calm, and of no direction
    rows = np.array(steps(moves))
    names = list(backtest.DECISION)
    gross, fees = rng.normal(0, 1, count).cumsum(), rng.exponential(0.1, count).cumsum()
    rows[:, names.index("gross")], rows[:, names.index("fees")] = gross, fees
    at_s = rng.uniform(0, count * 5, 400)
    fills = [fill(20 + second, 1, 99.0, 100.0) for second in np.sort(at_s)]
    markouts = rng.normal(0, 1, (400, len(backtest.HORIZONS_S)))
    result = result_of(rows, fills, markouts=markouts, first_ns=START_NS + 20 * NS)
    regimes = backtest.summarize_regimes(result)
    parts = [regimes[name] for name in ("calm", "usual", "wild", "not classed")]
    assert all(part["minutes"] >= 15 for part in parts)
    last = max(k for k in range(count) if (5 * k - 40) % 60 == 0)  # the last whole minute
    first = 8
    totals = dict(
        minutes=(last - first) // 12, gross_usdt=gross[last] - gross[first],
        fees_usdt=fees[last] - fees[first], fills=sum(5 * first <= at_s) - sum(at_s > 5 * last),
        net_usdt=(gross - fees)[last] - (gross - fees)[first],
    )  # fmt: skip
    for name, total in totals.items():
        assert sum(part[name] for part in parts) == near(total), name
    assert sum(regimes[name]["minutes"] for name in ("range", "trend")) == totals["minutes"] - 35
    wild = regimes["wild"]
    volatility, _ = backtest.describe_minutes(result)
    own = backtest.class_by_past(volatility, 3) == 2
    net = np.diff((gross - fees)[8 : last + 1 : 12])[own]
    assert wild["net_a_minute"] == near(net.mean()) and own.sum() == wild["minutes"]
    half = student.ppf(0.975, len(net) - 1) * net.std(ddof=1) / math.sqrt(len(net))
    assert wild["net_a_minute_half_width"] == near(half)
    minute = (at_s - 40) // 60
    filled = np.isin(minute, own.nonzero()[0])
    assert wild["fills"] == filled.sum()
    order = np.argsort(at_s)
    asked = markouts[filled[order], 1].mean()
    assert wild["markouts"]["1 s"]["mean_bps"] == near(asked)
    assert volatility[own].mean() == near(wild["volatility_bps"])


@pytest.mark.parametrize("losing", ["calm", "usual", "wild"])
def test_who_loses_in_minutes_of_one_kind_only_is_told_so(losing):
    rng, minutes = np.random.default_rng(9), 120
    size = rng.uniform(1, 9, minutes).repeat(12)
    rows = np.array(steps(np.append(0, size * np.tile([1, -1], minutes * 6))))
    volatility, _ = backtest.describe_minutes(result_of(rows))
    own = backtest.class_by_past(volatility, 3) == ["calm", "usual", "wild"].index(losing)
    changes = np.where(own, -3.0, 0.5)
    gross = np.append(0, np.repeat(changes.cumsum(), 12))  # earned 5 s after a minute begins
    rows[:, backtest.DECISION.index("gross")] = gross
    regimes = backtest.summarize_regimes(result_of(rows))
    line, *_ = backtest.tell_regimes(regimes)
    lost, total = -3.0 * own.sum(), changes.sum()
    asked = f"  {losing} minutes lose most: {lost:+.2f} USDT in {own.sum()} minutes"
    assert line == f"{asked}; all {minutes}: {total:+.2f}" and own.sum() > 15
    assert all((regimes[name]["net_usdt"] < 0) == (name == losing)
               for name in ("calm", "usual", "wild", "not classed"))  # fmt: skip
    rows[:, backtest.DECISION.index("gross")] = -gross.min() + np.arange(len(rows))
    gaining = backtest.summarize_regimes(result_of(rows))
    assert backtest.tell_regimes(gaining) == ["  no regime loses money"]


@pytest.mark.parametrize("rows", [[], [decision(0)], [decision(0), decision(65)], [
    decision(t, **dict.fromkeys(backtest.DECISION[1:], math.nan)) for t in range(0, 2400, 5)
]])  # fmt: skip
def test_where_nothing_can_be_said_of_regimes_a_dash_is_shown(rows):
    for late_s in (0, 20):
        result = result_of(rows, first_ns=START_NS + late_s * NS)
        regimes = backtest.summarize_regimes(result)
        text = backtest.format_regimes(regimes)
        assert "nan" not in text and "-" in text and "no regime loses money" in text
        json.dumps(backtest.to_plain(regimes), allow_nan=False)


def test_a_run_of_less_than_a_minute_has_no_regimes_and_no_traceback(place):
    flags = ["--strategy", "fixed", "--regimes"]
    status, out, _ = run("--data", place / "brief.gz", *flags)
    assert status == 0 and "no regime loses money" in out


# ---- 9. The price of a search ------------------------------------------------------


def price(nets, best, split, objective="net", count=300):
    tried = {key_of({"alpha": float(k)}): made_up(net) for k, net in enumerate(nets)}
    rng = np.random.default_rng(0)
    return backtest.price_of_search(tried, [*tried][best], split, objective, rng, count)


@pytest.mark.parametrize("objective", ["net", "sharpe"])
def test_skill_is_believed_and_the_best_of_chance_is_not(objective):
    """0.3 standard deviations a minute; the best of 20 by luck shows 0.08 in 600 minutes."""
    lucks = []
    for seed in range(4):
        nets, split = np.random.default_rng(seed).normal(0, 1, (20, 800)), 600
        best = int(sharpe_score(nets[:, :split].mean(1), nets[:, :split].var(1)).argmax())
        chance = price(nets, best, split, objective)
        lucks.append(chance["luck_probability"])
        assert chance["deflated_sharpe"] < 0.95 and chance["trials"] == 20
        assert 0.03 < chance["sharpe_by_luck"] < 0.13
        nets[7] += 0.3
        skill = price(nets, 7, split, objective)
        assert skill["deflated_sharpe"] > 0.95 and skill["luck_probability"] < 0.05
        assert skill["overfitting_probability"] < skill["overfitting_low"] + 0.05
        assert skill["overfitting_low"] < skill["overfitting_high"]
    assert np.median(lucks) > 0.2


def test_the_price_looks_at_the_minutes_in_sample_only():
    nets = np.random.default_rng(1).normal(0, 1, (12, 300))
    one = price(nets, 3, 200)
    nets[3, 200:] += 50
    two = price(nets, 3, 200)
    same = ("deflated_sharpe", "luck_probability", "sharpe_by_luck")
    assert [one[name] for name in same] == [two[name] for name in same]
    assert one["overfitting_probability"] != two["overfitting_probability"]


def test_one_trial_has_no_luck_to_beat_and_what_never_trades_no_ratio():
    nets = np.random.default_rng(1).normal(0.5, 1, (1, 60))
    one = price(nets, 0, 40)
    assert one["sharpe_by_luck"] == 0 and one["deflated_sharpe"] > 0.9
    assert math.isnan(one["overfitting_probability"])
    idle = price(np.zeros((2, 60)), 0, 40)
    assert math.isnan(idle["deflated_sharpe"]) and idle["luck_probability"] == 1


def summarize(place, nets, given, fills=1):
    """summarize_search of made-up trials, alpha counting them."""
    options, setting = settle(place, "--tune", "--bootstrap", "200")
    tried = {key_of({"alpha": float(k)}): made_up(net, 0, fills) for k, net in enumerate(nets)}
    known = {"{}": made_up(given)}
    search = SimpleNamespace(setting=setting, try_all=lambda _: known, known=known | tried)
    grid = {"alpha": [float(k) for k in range(len(nets))]}
    return backtest.summarize_search(search, tried, options, grid)[0]


def test_the_plateau_is_every_trial_within_the_interval_of_the_best_in_sample(place):
    rng, n, split = np.random.default_rng(2), 150, 100
    best = rng.normal(1, 2, n)
    nets = [best - 9, best, best - 0.05, np.append(best[:split] - 9, np.full(n - split, 99.0))]
    given = np.full(n, best[:split].mean() - 0.01)
    found = summarize(place, nets, given)
    column = found["in_sample"]["of"]["best"]["net_usdt"]
    low, total = column["low"], best[:split].sum()
    assert found["best"] == {"alpha": 1.0} and (found["split"], found["minutes"]) == (split, n)
    assert column["value"] == near(total) and total - 9 * split < low < total - 0.05 * split
    assert found["plateau"] == [key_of({"alpha": 1.0}), key_of({"alpha": 2.0})]
    out = found["out_of_sample"]["of"]
    assert out["difference"]["net_usdt"]["value"] == near((best - given)[split:].sum())
    assert (found["on_grid"], found["grid_size"], found["trials"]) == (4, 4, 4)
    text = backtest.format_search(found, "title")
    assert re.search(r"plateau +2 +trials", text) and "best       alpha 1\n" in text


@pytest.mark.parametrize("case", ["idle", "losing", "winning"])
def test_in_plain_words_what_the_best_is_worth(case, place):
    shift = {"idle": 0, "losing": -3, "winning": 2}[case]
    x = np.random.default_rng(3).normal(0, 1, (3, 90)) + [[0], [1], [0]] + shift
    found = summarize(place, x * (case != "idle"), x[0], fills=int(case != "idle"))
    text = backtest.format_search(found, "title")
    assert ("not to trade" in text) == (case == "idle")
    assert ("loses money even where it was chosen" in text) == (case == "losing")
    assert ("it may be luck" in text) == (case != "winning") == (found["luck_probability"] >= 0.05)
    assert ("luck alone would rarely do this" in text) == (case == "winning")


def test_a_parameter_that_has_no_value_is_shown_as_it_is(place, tmp_path):
    """max_drawdown_usdt is None unless given: the report broke off after the work."""
    flags = "--strategy fixed --tune --grid max_drawdown_usdt=50,500 --refine 0".split()
    status, out, _ = run("--data", place / "market.gz", *flags, "--out", tmp_path)
    assert status == 0 and "max_drawdown_usdt off" in out


# ---- 10. Pictures ------------------------------------------------------------------


def catch_figures(patch) -> list:
    """The figures drawn from now on, coarsely."""
    found, savefig = [], Figure.savefig
    patch.setattr(backtest, "DPI", 20)
    patch.setattr(Figure, "savefig", lambda figure, *args, **more: (
        found.append(figure), savefig(figure, *args, **more)))  # fmt: skip
    return found


@pytest.fixture
def figures(monkeypatch) -> list:
    return catch_figures(monkeypatch)


@pytest.fixture(scope="module")
def everything(place, tmp_path_factory, whole):
    """What a search that does all there is prints, and draws."""
    folder = tmp_path_factory.mktemp("everything")
    shutil.copytree(whole.folder, folder, dirs_exist_ok=True)  # its trials
    flags = [*SEARCH, "--walk-forward", "3", "--regimes", "--plot", folder / "all.png"]
    with pytest.MonkeyPatch.context() as patch:
        drawn = catch_figures(patch)
        status, out, err = run("--data", place / "market.gz", *flags, "--out", folder)
    assert status == 0 and "Warning" not in err
    return SimpleNamespace(folder=folder, out=out, figures=drawn)


def test_no_line_of_a_report_is_wider_than_100_columns(everything):
    *lines, _, _ = everything.out.splitlines()  # those name files
    assert "WARNING: below 500 minutes" in everything.out and "Regimes" in everything.out
    assert [line for line in lines if len(line) > 100] == []


def test_one_figure_holds_all_panels_of_a_search_and_a_walk(everything):
    path, (figure,) = everything.folder / "all.png", everything.figures
    titles = [ax.get_title(loc="left").split("\n")[0] for ax in figure.axes]
    for title, word in zip(titles, ("In sample", "Net a minute", "Walk-forward", "Net out of",
                                    "Result by regimes"), strict=True):  # fmt: skip
        assert title.startswith(word)
    assert everything.out.endswith(f"plot: {path}\n")
    assert path.read_bytes().startswith(b"\x89PNG")


GRID = {"alpha": [1.0, 2.0, 4.0], "gamma": [0.0, 1.0]}


@pytest.mark.parametrize("best, star", [
    ({"alpha": 4.0, "gamma": 1.0}, (1, 2)),
    ({"alpha": 3.0, "gamma": 0.5}, (0.5, 1.5)),
    ({"alpha": 5.0, "gamma": 1.0}, None),
])  # fmt: skip
def test_the_star_stands_at_the_best_if_it_lies_on_the_map(best, star):
    ax = Figure().subplots()
    scores = {key_of(one): -sum(abs(one[name] - value) for name, value in best.items())
              for one in expand_grid(GRID)}  # fmt: skip
    found = dict(best=best, objective="net", plateau=[max(scores, key=scores.get)])
    backtest.plot_heat(ax, found, scores, GRID)
    frame, *more = ax.lines  # the cell nearest to the best
    assert np.abs(frame.get_xdata()[:4].mean() - min(best["gamma"], 1)) <= 0.5
    assert [tuple(float(x) for (x,) in line.get_data()) for line in more] == [star] * bool(star)
    ticks = [[t.get_text() for t in axis.get_ticklabels()] for axis in (ax.xaxis, ax.yaxis)]
    assert ticks == [["0", "1"], ["1", "2", "4"]]


def test_one_parameter_is_drawn_as_a_line():
    ax = Figure().subplots()
    scores = {key_of({"alpha": value}): value**2 for value in (2.0, 1.0, 1.5, 4.0)}
    found = dict(best={"alpha": 4.0}, objective="sharpe", plateau=[])
    backtest.plot_heat(ax, found, scores, {"alpha": [1.0, 2.0, 4.0]})
    (line,) = ax.lines
    assert line.get_xydata().tolist() == [[1, 1], [1.5, 2.25], [2, 4], [4, 16]]
    assert ax.get_xlabel() == "alpha" and "Sharpe ratio" in ax.get_title(loc="left")


@pytest.mark.parametrize("case", ["stopped after one", "never trades"])
def test_a_picture_is_drawn_where_there_is_little_to_show(case, place, tmp_path, monkeypatch,
                                                          figures):  # fmt: skip
    stop, end, count = threading.Event(), threading.Event(), itertools.count(1)
    monkeypatch.setattr(feed, "stop_signal", lambda: stop)

    def try_out(_, changes):
        if case == "stopped after one" and next(count) == 3:  # the one after the first on the grid
            time.sleep(0.2)
            stop.set()
            end.wait(20)
        net = 0.0 if case == "never trades" else 1.0
        return made_up(net * (np.arange(MINUTES) % 7), fills=int(net))

    monkeypatch.setattr(backtest, "try_out", try_out)
    flags = ["--tune", "--grid", "alpha=1,2,3", "--plot", tmp_path / "few.png", "--out", tmp_path]
    with ThreadPoolExecutor(1) as thread:
        status, out, err = run("--data", place / "market.gz", *flags, executor=thread)
        end.set()
    assert status == 0 and "Warning" not in err and len(figures) == 1
    assert ("1 of 3 on the grid" in out) == (case == "stopped after one")
    assert ("STOPPED EARLY" in out) == (case == "stopped after one")
    assert ("The best that was found is not to trade" in out) == (case == "never trades")
    assert (tmp_path / "few.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_drawn_with_its_bootstrap_and_its_regimes(place, tmp_path, figures):
    path = tmp_path / "run.png"
    flags = ["--bootstrap", "100", "--against", "fixed", "--regimes", "--plot", path]
    status, *_ = run("--data", place / "market.gz", "--strategy", "fixed", *flags)
    assert status == 0 and len(figures[0].axes) == 7
    assert path.read_bytes().startswith(b"\x89PNG")


# ---- 11. Progress ------------------------------------------------------------------


def test_progress_tells_the_time_left_at_the_pace_so_far(capsys):
    now = [5 * NS]
    tell = backtest.show_progress(lambda: now[0])
    for done, at_s in ((3, 5), (4, 25), (5, 45), (9, 65), (10, 70)):  # two were known
        now[0] = at_s * NS
        tell("configurations", done, 10)
    now[0] = 1000 * NS
    tell("steps of refinement", 1, 30)  # a pace of its own
    now[0] = 1040 * NS
    tell("steps of refinement", 3, 30)
    assert capsys.readouterr().err.splitlines() == [
        "3 of 10 configurations",
        "4 of 10 configurations, 120 s left",  # 20 s for one, six to come
        "5 of 10 configurations, 100 s left",
        "9 of 10 configurations, 10 s left",  # 60 s for six, one to come
        "10 of 10 configurations",
        "1 of 30 steps of refinement",
        "3 of 30 steps of refinement, 540 s left",
    ]


def test_progress_in_a_file_is_a_line_for_every_tenth(capsys):
    tell = backtest.show_progress(lambda: 0)
    for done in range(1, 201):
        tell("configurations", done, 200)
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split()[0]) for line in lines] == [1, *range(20, 201, 20)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_progress_is_one_line_which_ends_before_the_report(
    place, tmp_path, monkeypatch
):
    """Refinement ends short of its steps, and the report began behind its last word."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    flags = "--strategy fixed --tune --grid order_qty=1,2 --refine 3 --bootstrap 100".split()
    with ThreadPoolExecutor(1) as pool:
        own = ["--data", place / "market.gz", "--out", tmp_path]
        assert backtest.main([str(flag) for flag in [*own, *flags]], pool) == 0
    progress, *report = screen.getvalue().split("COINUSDT linear")
    assert report and progress.endswith("\n") and progress.count("\r") > 2
    assert "left" in progress and "\x1b[K" in progress


# ---- 12. A cluster -----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of what dask imports
def test_the_workers_of_a_dask_cluster_give_what_threads_give(place, tmp_path, monkeypatch, whole):
    distributed = pytest.importorskip(
        "distributed", reason="dask.distributed is not installed: pip install distributed"
    )
    monkeypatch.setattr(sys, "path", [str(place), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(place))  # of the workers: where they import from
    with distributed.LocalCluster(
        n_workers=2, processes=True, threads_per_worker=1, dashboard_address=None
    ) as cluster, distributed.Client(cluster) as client:  # fmt: skip
        flags = ["--data", place / "market.gz", *SEARCH, "--out", tmp_path]
        status, out, _ = run(*flags, executor=client.get_executor())
    assert status == 0 and said(tmp_path, out) == whole.said
    assert len(written(tmp_path)) == len(whole.trials)
