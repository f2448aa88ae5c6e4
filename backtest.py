"""Would it have paid? The market maker of marketmaker.py over history.

The same code decides, fills and accounts, live and here; this module adds where the
messages come from (history), what makes trading harder (frictions), what it is compared
with (baselines), and what came out (metrics, pictures). It makes no decision of its own.

History is a recording, or several that are played one after the other with the state
carried on. Each is read once and kept as columns (a tape) in a cache folder, from where
processes map it into memory without copying.

Assumptions, with the direction of their bias:

  - Fills, queue, latency: the rules in marketmaker.py's docstring.
  - `--participation`: the share of what is left of a trade behind the queue that fills
    us. 1 (default) is optimistic where others queue behind us and are served first.
  - No impact by default: optimistic. `--impact-bps X` moves the prices that we see
    against us by X x (fill / depth of its side near the mid), with a half-life of 30 s.
    Our quotes and the marking of the inventory follow the moved prices; the market's own
    book and trades stay as recorded. A rough stand-in, there to see what it would cost.
  - `--outages N`: windows, drawn by `--seed`, in which we hear nothing and cannot cancel
    while what rests can be hit. What they cost is listed.
  - Recordings made of archives (data/archive.py) carry no receive time of their own, but
    the exchange's plus a constant. Real latency has tails: optimistic.
  - Funding is not modelled. The inventory left at the end is marked to the last mid: no
    fee, no slippage for closing it: slightly optimistic.

Baselines in the same loop: `--strategy fixed` (default_spread_bps around the mid) and
`--strategy as` (Avellaneda and Stoikov in the stationary form of Gueant, Lehalle and
Fernandez-Tapia; formula in the docstring of `avellaneda_stoikov`).

Units: prices USDT, sizes base coin, time int ns, spreads and markouts bps. Result = net =
gross - fees, in USDT, from an account that starts empty.

How sure is it? `--bootstrap N` resamples the net of the minutes in blocks; `--regimes` asks
in which minutes the money is lost. What a search finds looks better than it is, so `--tune`
chooses on the first two thirds (in sample) and shows the rest (out of sample) beside it, and
what the search itself makes of luck; `--walk-forward` tunes and trades in turn. The
mathematics of all this is in optimize.py; a trial is a run of which the minutes are kept.

What this module does not do: one path is no proof. The table says how many fills and
minutes stand behind each figure, with intervals.

Sources: Gueant, Lehalle, Fernandez-Tapia (2013); Avellaneda, Stoikov (2008); those of the
search in optimize.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

import feed
import marketmaker as mm
import optimize as opt
from feed import BID, NO_LEVEL, NS, Tape, UserError, clock_text
from marketmaker import Fill, History, MarketMaker
from optimize import FIELDS, Distances, Parameters

CACHE = Path(__file__).parent / "data" / "cache"  # of parsed recordings; may be deleted
CACHE_VERSION = 3  # of a tape's columns; another one is parsed anew
MINUTE_S, DAY_S = 60, 86_400
MINUTE_NS = MINUTE_S * NS

# ---- History: recordings as tapes, kept in a cache ---------------------------------


class Data(NamedTuple):
    """What is played: recordings of one market, in order of time."""

    recordings: list[feed.Recording]
    tapes: list[Tape]
    counts: Counter  # of messages and of defects

    @property
    def instrument(self) -> feed.Instrument:
        return self.recordings[0].parser.instrument

    @property
    def span_ns(self) -> tuple[int, int]:
        """Receive times of the first and of the last message."""
        return self.tapes[0].recv_ns.item(0), self.tapes[-1].recv_ns.item(-1)

    @property
    def title(self) -> str:
        """Which market, of which file; it never hides that data are synthetic."""
        more = f" and {len(self.tapes) - 1} more" if len(self.tapes) > 1 else ""
        title = f"{self.instrument.symbol} {self.instrument.category}   backtest of "
        title += self.recordings[0].path.name + more
        is_synthetic = any(recording.is_synthetic for recording in self.recordings)
        return title + ("   SYNTHETIC DATA, no market" if is_synthetic else "")


@lru_cache(maxsize=1)
def open_data(
    stamps: tuple[tuple[str, int, int], ...],
    tick_text: str | None, lot_text: str | None, depth: int | None,
) -> Data:  # fmt: skip
    """The files that `stamp_files` named, mapped once in a process. UserError for files that
    are no recordings, of two markets, or not in order of time.
    """
    recordings, tapes, counts = [], [], Counter[str]()
    for path, *_ in stamps:
        recording = feed.open_recording(Path(path), tick_text, lot_text, depth)
        tape, its_counts = load_tape(recording)
        if not len(tape):
            raise UserError(f"{path} holds no message: choose another file")
        if tapes and recording.parser.instrument != recordings[0].parser.instrument:
            raise UserError(f"{path} is of another market, or on another grid of prices, than "
                            f"{recordings[0].path.name}: play it alone, or give --tick-size")
        if tapes and tape.recv_ns[0] < tapes[-1].recv_ns[-1]:
            raise UserError(f"{path} begins before the file before it ends: order by time")
        recordings.append(recording)
        tapes.append(tape)
        counts.update(its_counts)
    return Data(recordings, tapes, counts)


def stamp_files(paths: Sequence[Path]) -> tuple[tuple[str, int, int], ...]:
    """Path, size and time of modification of every file that is read: what is valid for
    these is valid for no other state of them.
    """
    for path in paths:
        if not path.is_file():
            raise UserError(f"--data {path} is no file: give recordings")
    stats = [(str(path.resolve()), path.stat()) for path in paths]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def load_tape(recording: feed.Recording) -> tuple[Tape, dict[str, int]]:
    """The columns of a recording and what its parser counted: mapped from the cache, after
    they were made and written there.
    """
    parser, path = recording.parser, recording.path
    made_of = [CACHE_VERSION, stamp_files([path]), parser.instrument.tick_text, [*parser.topics]]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{path.name.split('.')[0]}-{key}"
    if not folder.exists():
        print(f"reading {path.name}, once; then from {folder.parent}", file=sys.stderr)
        tape = feed.build_tape(recording.messages())
        draft = Path(tempfile.mkdtemp(prefix=folder.name, suffix=".part", dir=folder.parent))
        for name in feed.COLUMNS:
            np.save(draft / f"{name}.npy", getattr(tape, name), allow_pickle=False)
        (draft / "notes.json").write_text(json.dumps([tape.notes, parser.counts]))
        try:
            draft.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(draft)
    notes, counts = json.loads((folder / "notes.json").read_text())
    columns = {
        name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))
        for name in feed.COLUMNS
    }
    return Tape(**columns, notes={int(m): note for m, note in notes.items()}), counts


def cache_folder() -> Path:
    """Where columns are kept: beside the sample, or where the system keeps such things."""
    for folder in (CACHE, Path(tempfile.gettempdir()) / "marketmaker-cache"):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
    raise UserError(f"neither {CACHE} nor the temporary folder can be written: mend one")


def carry_on(tape: Tape, view: feed.View) -> Tape:
    """The tape of a file that follows another: until it tells of book and prices itself, what
    the file before it told of last is still known.
    """
    is_before_book = tape.last_book < 0
    columns = {}
    for name, last in view._asdict().items():
        column = getattr(tape, name)
        is_missing = is_before_book if isinstance(last, int) else np.isnan(column)
        columns[name] = np.where(is_missing, last, column)
    return dataclasses.replace(tape, **columns)


def insert_notes(tape: Tape, notes: Sequence[tuple[int, dict[str, Any]]]) -> Tape:
    """The tape with control messages, (receive time, note) in order of time, put in before
    the first message at or after each time.
    """
    if not notes:
        return tape
    times = np.array([time_ns for time_ns, _ in notes])
    at = np.maximum(tape.recv_ns.searchsorted(times), 1)
    columns = {}
    for name in ("kind", "recv_ns", "exch_ns", *feed.View._fields):
        column = getattr(tape, name)
        columns[name] = np.insert(column, at, column[at - 1])  # known: what was known before
    for name in ("first_row", "first_trade"):
        column = getattr(tape, name)
        columns[name] = np.insert(column, at, column[at])  # no rows and no trades
    places = at + np.arange(len(at))
    columns["kind"][places] = feed.CONTROL
    columns["recv_ns"][places], columns["exch_ns"][places] = times, 0
    kept = {m + int((at <= m).sum()): note for m, note in tape.notes.items()}
    new = {int(m): note for m, (_, note) in zip(places, notes)}
    return dataclasses.replace(tape, **columns, notes=kept | new)


# ---- Baselines ---------------------------------------------------------------------


def fixed_spread(parameters: Parameters, *_: Any) -> Distances:
    """The simplest quote there is: default_spread_bps, shared evenly."""
    half = parameters.default_spread_bps / 2
    return Distances(half, half, "fixed")


def avellaneda_stoikov(
    risk_aversion: float, fill_rate_per_s: float, fill_decay_per_bps: float, sigma: float
) -> tuple[float, float]:
    """Half spread, and skew per order of inventory, both in bps.

    Fills come at the rate A exp(-k d) per second at a distance d; gamma is the aversion to
    inventory counted in orders; sigma in bps/sqrt(s). Stationary form, Gueant et al.:

      c1 = ln(1 + gamma/k) / gamma
      c2 = sqrt( gamma / (2 A k) * (1 + gamma/k)^(k/gamma + 1) )
      half spread = c1 + sigma c2 / 2        skew = sigma c2

    >>> half, skew = avellaneda_stoikov(0.05, 2.986162360812285, 0.04235741115084049, 10.69)
    >>> round(half, 6), round(skew, 6)
    (20.472085, 9.763269)
    """
    gamma, k = risk_aversion, fill_decay_per_bps
    c1 = math.log1p(gamma / k) / gamma
    c2 = math.sqrt(gamma / (2 * fill_rate_per_s * k) * (1 + gamma / k) ** (k / gamma + 1))
    return c1 + sigma * c2 / 2, sigma * c2


def quote_avellaneda_stoikov(
    risk_aversion: float, fill_rate_per_s: float, fill_decay_per_bps: float,
    parameters: Parameters, q: float, ema_volatility: float, *_: Any,
) -> Distances:  # fmt: skip
    """The quote of the baseline; long, it bids further away and offers nearer."""
    shape = (risk_aversion, fill_rate_per_s, fill_decay_per_bps)
    half, skew = avellaneda_stoikov(*shape, ema_volatility)
    shift = q * parameters.max_inventory / parameters.order_qty * skew
    return Distances(half + shift, half - shift, "as")


# ---- A run -------------------------------------------------------------------------

HORIZONS_S = (0.1, 1, 10, 60)  # of markouts
KEPT_NS = 120 * NS  # mids kept for fills that we hear of late, after an outage say
OUTAGE_S = (5.0, 60.0)  # shortest and longest
Schedule = Sequence[tuple[int, Mapping[str, Any]]]  # ns of receive time, parameters from then


@dataclass(frozen=True)
class Setting:
    """What a run is made of, but for what a search changes: small and plain, so that another
    process can repeat it.
    """

    stamps: tuple[tuple[str, int, int], ...]  # of the data's files: see stamp_files
    steps: tuple[str | None, str | None, int | None]  # tick, lot, depth, if data do not tell
    given: dict[str, Any]  # parameters
    strategy: tuple  # its name, then what shapes it
    outages: tuple[tuple[int, int], ...] = ()  # begin and end, ns of receive time
    exchange: dict[str, Any] = field(default_factory=dict)  # frictions of the PaperExchange

    @property
    def data(self) -> Data:
        return open_data(self.stamps, *self.steps)

    def parameters(self, changes: Mapping[str, Any]) -> Parameters:
        """The given parameters with some changed; UserError for what is out of range."""
        start = self.data.recordings[0].start
        return mm.choose_parameters({**self.given, **changes}, start, self.data.instrument)

    def quote(self) -> Callable[..., Distances]:
        """The strategy: the program, or a baseline."""
        name, *shape = self.strategy
        if name == "as":
            return partial(quote_avellaneda_stoikov, *shape)
        return fixed_spread if name == "fixed" else opt.choose_distances


@dataclass
class Result:
    """What a run leaves behind."""

    maker: MarketMaker
    columns: dict[str, np.ndarray]  # the decisions' numbers, see History; and t_s, time in s
    markouts: np.ndarray  # (fills, horizons), bps; nan = the data end before
    setting: Setting
    title: str
    is_stopped: bool

    @property
    def fills(self) -> list[Fill]:
        return self.maker.account.fills

    @property
    def span_s(self) -> float:
        return (self.maker.last_ns - self.maker.first_ns) / NS


class Stopped(Exception):
    """Ctrl-C came."""


def play(
    setting: Setting, changes: Mapping[str, Any] | None = None, schedule: Schedule = (),
    log: Any = None, quotes: Any = None, stop: feed.StopSignal | None = None,
) -> Result:  # fmt: skip
    """Play the data through the market maker, with some parameters changed; by schedule, more
    of them at later times. log and quotes take lines; a stop ends it at the next decision.
    """
    data, changes = setting.data, dict(changes or {})
    maker = MarketMaker(
        setting.parameters(changes), data.instrument, log, {**setting.given, **changes},
        strategy=setting.quote(), **setting.exchange,
    )  # fmt: skip
    history, markouts, is_stopped = History(), Markouts(), False
    if quotes:
        quotes.write("time_ns,bid_price,bid_qty,ask_price,ask_qty\n")

    def note(maker: MarketMaker) -> None:
        history.add(maker.decision)
        if quotes and maker.decision.is_sent:
            quotes.write(quote_row(maker))
        if stop and stop.is_set:
            raise Stopped

    maker.on_decision = note
    waiting = schedule_notes(setting.outages, schedule)
    try:
        for tape in data.tapes:
            now = [note for note in waiting if note[0] <= tape.recv_ns[-1]]
            waiting = waiting[len(now) :]
            maker.follow(insert_notes(carry_on(tape, maker.market.book.view), now))
            markouts.look_up(tape, maker)
    except Stopped:
        is_stopped = True
        markouts.look_up(tape, maker)
    if history.times:
        history.add(maker.finish())
    columns = history.columns()
    columns["t_s"] = (columns["time_ns"] - maker.first_ns) / NS
    title = data.title + ("   STOPPED EARLY" if is_stopped else "")
    return Result(maker, columns, markouts.table, setting, title, is_stopped)


def quote_row(maker: MarketMaker) -> str:
    """The two orders wanted, as a line of quotes.csv; empty = none."""
    d, digits = maker.decision, maker.instrument.digits
    sides = ((d.bid_price, d.bid_qty), (d.ask_price, d.ask_qty))
    cells = ["," if p != p else f"{p:.{digits}f},{qty:.9g}" for p, qty in sides]
    return f"{d.time_ns},{','.join(cells)}\n"


def draw_outages(
    count: int, span_ns: tuple[int, int], rng: np.random.Generator
) -> tuple[tuple[int, int], ...]:
    """Windows of receive time, none overlapping, in order."""
    first_ns, last_ns = span_ns
    windows: list[tuple[int, int]] = []
    for start in sorted(rng.uniform(first_ns, last_ns, count).tolist()):
        begin = max(int(start), windows[-1][1] + NS if windows else first_ns)
        end = begin + int(rng.uniform(*OUTAGE_S) * NS)
        if end < last_ns:
            windows.append((begin, end))
    return tuple(windows)


def schedule_notes(
    outages: Sequence[tuple[int, int]], schedule: Schedule
) -> list[tuple[int, dict[str, Any]]]:
    """Outages and changes of parameters as control messages, in order of time."""
    notes = []
    for begin_ns, end_ns in outages:
        notes.append((begin_ns, {"event": "outage", "back_ns": end_ns}))
        notes.append((end_ns, {"event": "back"}))
    for time_ns, changes in schedule:
        notes.append((time_ns, {"event": "params", "parameters": changes, "is_final": True}))
    return sorted(notes, key=lambda note: note[0])


class Markouts:
    """Where the mid went after each fill, looked up tape by tape."""

    def __init__(self) -> None:
        self.table = np.zeros((0, len(HORIZONS_S)))
        self.times, self.mids = np.zeros(0, np.int64), np.zeros(0)  # of late

    def look_up(self, tape: Tape, maker: MarketMaker) -> None:
        """Complete what the tape tells of, now that it has been played."""
        fills, tick_size = maker.account.fills, maker.instrument.tick_size
        is_book = (tape.kind == feed.DELTA) | (tape.kind == feed.SNAPSHOT)
        times, bid, ask = tape.exch_ns[is_book], tape.best_bid[is_book], tape.best_ask[is_book]
        has_mid = (bid > NO_LEVEL) & (ask > NO_LEVEL) & (bid < -ask)
        mids = np.where(has_mid, (bid - ask) * (tick_size / 2), np.nan)
        mids *= seen_share(maker.exchange.shifts, times)
        times, mids = np.append(self.times, times), np.append(self.mids, mids)
        missing = np.full((len(fills) - len(self.table), len(HORIZONS_S)), np.nan)
        self.table = np.concatenate([self.table, missing])
        if fills and len(times):
            at = [np.array(column) for column in zip(*((f[0], f.side, f.price) for f in fills))]
            later = measure_markouts(*at, times, mids)
            self.table = np.where(np.isnan(self.table), later, self.table)
        kept = times.searchsorted(times[-1] - KEPT_NS) if len(times) else 0
        self.times, self.mids = times[kept:], mids[kept:]


def seen_share(shifts: list[tuple[int, float]], at_ns: np.ndarray) -> np.ndarray:
    """The mid that we see as a share of the market's, where our own impact is modelled."""
    since_ns, shift = (np.array(column) for column in zip(*shifts))
    row = np.searchsorted(since_ns, at_ns, "right") - 1
    age = (at_ns - since_ns[row]) / (mm.IMPACT_HALF_LIFE_S * NS)
    return 1 + shift[row] * 2.0**-age * 1e-4


def measure_markouts(
    times_ns: np.ndarray, sides: np.ndarray, prices: np.ndarray,
    book_ns: np.ndarray, mids: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """side (mid at fill time + h - price) / price x 1e4, bps: (fills, horizons).

    That mid is the one after the last book message up to then, exchange time; nan before
    the first and beyond the last. Bought at 100, mid 99.9 after 1 s: markout(1 s) -10, run
    over.
    """
    until = times_ns[:, None] + np.round(np.array(HORIZONS_S) * NS).astype(np.int64)
    row = np.searchsorted(book_ns, until, "right") - 1
    mid = np.where((row >= 0) & (until <= book_ns[-1]), mids[row], np.nan)
    return sides[:, None] * (mid / prices[:, None] - 1) * 1e4


# ---- Metrics -----------------------------------------------------------------------

YEAR_MINUTES = 365 * 1440  # the market never closes
ANNUAL_FROM_S = 3 * DAY_S  # a shorter span says nothing of a year
NORMAL_95 = 1.96
TINY = 1e-9  # s, USDT or base coin: less is rounding
SOURCES = ("lp", "last_good", "default", "none", "fixed", "as")
SIDES_OF = {"both": (1, -1), "bought": (1,), "sold": (-1,)}
HORIZONS = ["0 s", *(f"{h:g} s" for h in HORIZONS_S)]  # at 0 s the effective half spread
FRICTIONS = (
    "fill_model", "maker_fee_bps", "taker_fee_bps", "order_latency_ms", "clock_offset_ms",
)  # fmt: skip


class Estimate(NamedTuple):
    """A mean with a 95 % interval of mean ± half_width, in the unit of its values."""

    mean: float
    half_width: float
    n: int  # values
    excluded: int = 0  # of them not known

    def __str__(self) -> str:
        if self.mean != self.mean:
            return "-"
        width = "" if self.half_width != self.half_width else f" ± {self.half_width:.2f}"
        return f"{self.mean:+.2f}{width}"


def estimate_mean(values: np.ndarray, clusters: np.ndarray | None = None) -> Estimate:
    """The mean of values, where those of one cluster may go together.

    SE^2 = G/(G-1) sum_clusters (sum of the deviations from the mean)^2 / n^2, G clusters;
    the interval is t SE wide to either side, Student's t with G - 1 degrees of freedom.
    One cluster alone gives none. nan is excluded and counted. Without clusters each value
    stands alone, and this is the textbook's standard error.
    """
    is_known = np.isfinite(values)
    clusters = (np.arange(len(values)) if clusters is None else clusters)[is_known]
    known, half_width = values[is_known], math.nan
    if not len(known):
        return Estimate(math.nan, math.nan, 0, len(values))
    mean = float(known.mean())
    groups, member = np.unique(clusters, return_inverse=True)
    if len(groups) > 1:
        sums = np.bincount(member, known - mean)
        error = math.sqrt(len(groups) / (len(groups) - 1) * float(sums @ sums)) / len(known)
        half_width = float(stdtrit(len(groups) - 1, 0.975)) * error
    return Estimate(mean, half_width, len(known), len(values) - len(known))


class RestingFills(NamedTuple):
    """The fills of our quotes as columns; taker fills, which close at any price, left out."""

    time_ns: np.ndarray
    recv_ns: np.ndarray
    side: np.ndarray
    price: np.ndarray
    arrival_ns: np.ndarray
    queue_ahead: np.ndarray
    queue_at_arrival: np.ndarray
    markouts: np.ndarray  # (fills, HORIZONS), bps


def resting_fills(result: Result) -> RestingFills:
    """See RestingFills."""
    fills = [fill for fill in result.fills if not fill.is_taker]
    is_resting = np.array([not fill.is_taker for fill in result.fills], bool)
    names = RestingFills._fields[:-1]
    columns = [np.array([getattr(fill, name) for fill in fills]) for name in names]
    price = np.array([fill.price for fill in fills])
    side, mid = (np.array([getattr(f, n) for f in fills]) for n in ("side", "mid_price"))
    effective = side * (mid / price - 1) * 1e4
    return RestingFills(*columns, np.column_stack([effective, result.markouts[is_resting]]))


def summarize_markouts(fills: RestingFills) -> dict[str, dict[str, Estimate]]:
    """Markouts by side and horizon.

    Fills of one minute are one cluster: a move that runs over one quote runs over the next.
    At 60 s neighbouring minutes overlap, and the interval is somewhat too narrow.
    """
    minute, table = fills.time_ns // MINUTE_NS, {}
    for name, sides in SIDES_OF.items():
        is_own = np.isin(fills.side, sides)
        cells = [estimate_mean(column[is_own], minute[is_own]) for column in fills.markouts.T]
        table[name] = dict(zip(HORIZONS, cells))
    return table


def whole_minutes(result: Result) -> np.ndarray:
    """The whole minutes (UTC) up to the last decision, in s since the first message."""
    start_s, t_s = -result.maker.first_ns % MINUTE_NS / NS, result.columns["t_s"]
    return np.arange(start_s, (t_s[-1] if len(t_s) else 0) + TINY, MINUTE_S)


def values_at(at_s: np.ndarray, t_s: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of the last decision up to each time, 0 before the first."""
    return np.append(0.0, values)[np.searchsorted(t_s, at_s + TINY, "right")]


def changes_by_minute(result: Result, values: np.ndarray) -> np.ndarray:
    """The change of a column of the decisions from each whole minute to the next."""
    return np.diff(values_at(whole_minutes(result), result.columns["t_s"], values))


def measure_sharpe(changes: np.ndarray, span_s: float) -> dict[str, Any]:
    """Sharpe ratio per minute, mean / standard deviation, with a 95 % interval.

    Its error (`optimize.sharpe_error`) takes the minutes as independent; where they are
    not, use --bootstrap. Annualised, times sqrt(365 x 1440), only from three days on.
    """
    n, sharpe, error = len(changes), math.nan, math.nan
    if n > 2 and changes.std() > TINY:
        sharpe = changes.mean() / changes.std(ddof=1)
        error = opt.sharpe_error(sharpe, n, *opt.shape_of(changes))
    year = math.sqrt(YEAR_MINUTES) if span_s >= ANNUAL_FROM_S else math.nan
    measures: dict[str, Any] = {"sharpe_minutes": n}
    for name, periods in (("minute", 1.0), ("year", year)):
        for bound, sign in (("", 0), ("_low", -1), ("_high", 1)):
            measures[f"sharpe_per_{name}{bound}"] = periods * (sharpe + sign * NORMAL_95 * error)
    return measures


def measure_drawdown(t_s: np.ndarray, net: np.ndarray) -> dict[str, Any]:
    """The deepest fall of net below its peak so far, USDT, as seen at the decisions.

    Its duration, s, runs from the last moment at that peak to the first one back at it,
    or to the end of the data. We start with 0.
    """
    peak = np.maximum.accumulate(np.append(0.0, net))[1:]
    if not len(net) or (depth := peak - net).max() <= TINY:
        return {"max_drawdown_usdt": 0.0, "max_drawdown_s": 0.0, "max_drawdown_recovered": None}
    worst = int(depth.argmax())
    is_at_peak = net >= peak[worst] - TINY
    before, after = np.flatnonzero(is_at_peak[:worst]), np.flatnonzero(is_at_peak[worst:])
    begin_s = t_s[before[-1]] if len(before) else t_s[0]
    end_s = t_s[worst + after[0]] if len(after) else t_s[-1]
    return {
        "max_drawdown_usdt": depth[worst],
        "max_drawdown_s": end_s - begin_s,
        "max_drawdown_recovered": bool(len(after)),
    }


def time_mean(values: np.ndarray, t_s: np.ndarray) -> float:
    """Mean over time where the value is known: each row holds until the next. Else nan."""
    held_s = np.diff(t_s, append=t_s[-1:])
    held_s[~np.isfinite(values)] = 0
    total_s = held_s.sum()
    return float(np.nan_to_num(values) @ held_s / total_s) if total_s else math.nan


def measure_quotes(c: Mapping[str, np.ndarray], p: Parameters) -> dict[str, Any]:
    """Quotes and inventory, averaged over time; shares of time from 0 to 1.

    At the limit: one more order of full size would breach max_inventory.
    """
    mean_of = partial(time_mean, t_s=c["t_s"])
    held, mean = c["inventory"], mean_of(c["inventory"])
    is_at_limit = np.abs(held) > p.max_inventory - p.order_qty + TINY
    measures = {
        "bid_uptime": mean_of(np.isfinite(c["bid_price"]) * 1.0),
        "ask_uptime": mean_of(np.isfinite(c["ask_price"]) * 1.0),
        "quoted_spread_bps": mean_of((c["ask_price"] - c["bid_price"]) / c["mid_price"] * 1e4),
        "inventory_mean": mean,
        "inventory_std": math.sqrt(mean_of((held - mean) ** 2)),
        "inventory_min": held.min() if len(held) else math.nan,
        "inventory_max": held.max() if len(held) else math.nan,
        "at_limit": mean_of(is_at_limit * 1.0),
        "base_spread_bps": mean_of(c["base_spread_bps"]),
    }
    for name in ("volatility", "liquidity", "depth"):
        measures[f"{name}_spread_bps"] = mean_of(c[f"{name}_bps"])
    return measures


def measure_orders(result: Result, fills: RestingFills) -> dict[str, Any]:
    """Orders and fills. Queues in base coin; inf, where nothing was shown, is excluded.

    An order is known by side, arrival and price; the fill ratio counts those that were
    filled at least in part.
    """
    counts = result.maker.exchange.counts
    filled = len(set(zip(fills.side, fills.arrival_ns, fills.price)))
    measures = {
        "fills": len(result.fills),
        "taker_fills": len(result.fills) - len(fills.side),
        "orders_sent": counts["sent"],
        "orders_filled": filled,
        "fill_ratio": filled / counts["sent"] if counts["sent"] else math.nan,
        "time_to_fill_s": median((fills.time_ns - fills.arrival_ns) / NS),
        "refused": {
            name.removeprefix("refused: "): count
            for name, count in counts.items() if name.startswith("refused: ")
        },
    }  # fmt: skip
    for name, queue in (("arrival", fills.queue_at_arrival), ("fill", fills.queue_ahead)):
        measures[f"queue_at_{name}"] = median(queue)
        measures[f"queue_at_{name}_excluded"] = int((~np.isfinite(queue)).sum())
    return measures


def median(values: np.ndarray) -> float:
    """The median of what is finite; nan of nothing."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


def measure_account(account: mm.Account) -> dict[str, Any]:
    """net = gross - fees = spread captured + revaluation - fees + residual.

    Each in USDT, and in bps of the turnover, beside which a fee in bps can be read.
    """
    usdt = {
        "net": account.equity,
        "gross": account.gross,
        "fees": account.fees_paid,  # below 0: a rebate
        "spread_captured": account.spread_captured,
        "revaluation": account.revaluation,
        "residual": account.residual,
        "turnover": account.turnover,
    }
    scale = 1e4 / account.turnover if account.turnover else math.nan
    in_bps = {f"{name}_bps": scale * value for name, value in list(usdt.items())[:5]}
    return {f"{name}_usdt": value for name, value in usdt.items()} | in_bps


def list_outages(result: Result) -> list[dict[str, float]]:
    """What each outage cost: net and fills from its first decision to the one after it."""
    c, outages = result.columns, []
    for begin_ns, end_ns in result.setting.outages:
        begin, end = np.searchsorted(c["time_ns"], [begin_ns, end_ns], "right") - 1
        if begin < 0 or c["time_ns"][end] < end_ns:
            continue  # the run was over before
        fills = sum(begin_ns < fill.recv_ns <= end_ns for fill in result.fills)
        net = float(c["equity"][end] - c["equity"][begin])
        outages.append(dict(start_ns=begin_ns, end_ns=end_ns, net_usdt=net, fills=fills))
    return outages


def measure(result: Result) -> dict[str, Any]:
    """Every metric by name, the unit in the suffix."""
    maker, fills, c = result.maker, resting_fills(result), result.columns
    frictions = {name: getattr(maker.parameters, name) for name in FRICTIONS}
    return {
        "is_synthetic": "SYNTHETIC" in result.title,
        "first_event_utc": clock_text(maker.first_ns),
        "last_event_utc": clock_text(maker.last_ns),
        "span_s": result.span_s,
        "events": maker.messages,
        **measure_account(maker.account),
        **measure_sharpe(changes_by_minute(result, c["equity"]), result.span_s),
        **measure_drawdown(c["t_s"], c["equity"]),
        "markouts": summarize_markouts(fills),
        **measure_orders(result, fills),
        **measure_quotes(c, maker.parameters),
        "decisions": {name: maker.sources[name] for name in SOURCES},
        "reasons": {name: n for name, n in maker.reasons.items() if name},
        "frictions": frictions | result.setting.exchange,
        "outages": list_outages(result),
    }


def to_plain(value: Any) -> Any:
    """The same in Python's own types, None for nan and inf: what JSON can hold."""
    if isinstance(value, Estimate):
        return to_plain(value._asdict())
    if isinstance(value, dict):
        return {str(name): to_plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return to_plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- Tables ------------------------------------------------------------------------
#
# A table of metrics is data: section, then rows of label, metric, format, note. A note may
# name other metrics in braces. {coin} is the base coin.

TABLE: dict[str, list[tuple[str, str, str, str]]] = {
    "Result, USDT": [
        ("spread captured", "spread_captured_usdt", "+,.2f",
         "{spread_captured_bps} bps of turnover: from our fills to the mid then"),
        ("inventory revaluation", "revaluation_usdt", "+,.2f",
         "{revaluation_bps} bps: the mid moved while we held"),
        ("= gross", "gross_usdt", "+,.2f", "{gross_bps} bps"),
        ("fees paid (below 0: received)", "fees_usdt", ",.2f", "{fees_bps} bps"),
        ("= net", "net_usdt", "+,.2f", "{net_bps} bps; the sum is off by {residual_usdt} USDT"),
        ("turnover", "turnover_usdt", ",.2f", ""),
    ],
    "Risk (intervals of 95 %, the minutes taken as independent)": [
        ("Sharpe ratio per minute", "sharpe_per_minute", ".4f",
         "{sharpe_per_minute_low} to {sharpe_per_minute_high} from {sharpe_minutes} minutes"),
        ("Sharpe ratio per year", "sharpe_per_year", ".2f",
         "{sharpe_per_year_low} to {sharpe_per_year_high}, times sqrt(365 x 1440)"),
        ("deepest drawdown of net, USDT", "max_drawdown_usdt", ",.2f", "below its peak so far"),
        ("it lasted, s", "max_drawdown_s", ",.1f", "recovered: {max_drawdown_recovered}"),
    ],
    "Orders and fills": [
        ("fills", "fills", ",", "{taker_fills} of them as taker, not counted below"),
        ("orders sent", "orders_sent", ",", ""),
        ("refused on arrival", "orders_refused", ",", "{refused}"),
        ("filled, at least in part", "orders_filled", ",", "{fill_ratio} of those sent"),
        ("time to fill, s", "time_to_fill_s", ".2f", "median, since arrival"),
        ("queue ahead on arrival, {coin}", "queue_at_arrival", ".4f",
         "median; {queue_at_arrival_excluded} fills where none was shown left out"),
        ("queue ahead at the fill, {coin}", "queue_at_fill", ".4f",
         "median; {queue_at_fill_excluded} left out; above 0: price went through"),
    ],
    "Quotes and inventory, averages over time": [
        ("time with a bid", "bid_uptime", ".1%", ""),
        ("time with an ask", "ask_uptime", ".1%", ""),
        ("quoted spread, bps", "quoted_spread_bps", ".2f", "while both sides are quoted"),
        ("base spread, bps", "base_spread_bps", ".2f",
         "volatility {volatility_spread_bps} + liquidity {liquidity_spread_bps} + "
         "depth {depth_spread_bps}"),
        ("inventory, {coin}", "inventory_mean", "+.4f",
         "standard deviation {inventory_std}, from {inventory_min} to {inventory_max}"),
        ("time at the inventory limit", "at_limit", ".1%", "no room for one more order"),
    ],
}  # fmt: skip
MAX_REASONS = 8  # lines of reasons
NOTE_FORMS = {"residual_usdt": ".0e", "fill_ratio": ".1%", "sharpe_per_minute_low": ".4f",
              "sharpe_per_minute_high": ".4f", "inventory_std": ".4f"}  # fmt: skip


def write_value(value: Any, form: str = "") -> str:
    """A value in a table; - where nothing can be said."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in value.items())
    if isinstance(value, float) and not form:
        return f"{value:.2f}"
    return format(value, form)


def table_row(label: str, value: str, note: str = "") -> str:
    """A line of a table of metrics."""
    return f"  {label:<32}{value:>14}   {note}".rstrip()


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  " + "   ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]  # fmt: skip


def format_table(metrics: dict[str, Any], result: Result) -> str:
    """The metrics to read: label with unit, value, what it means."""
    m = {**metrics, "orders_refused": sum(metrics["refused"].values())}
    names = {name: write_value(value, NOTE_FORMS.get(name, "")) for name, value in m.items()}
    names["coin"] = result.maker.instrument.base_coin
    lines = [result.title, f"{m['first_event_utc']} to {m['last_event_utc']} UTC, "
             f"{m['events']:,} events"]  # fmt: skip
    for section, rows in TABLE.items():
        lines += ["", section]
        for label, name, form, note in rows:
            value = write_value(m[name], form)
            if value != "-" or name != "sharpe_per_year":
                lines.append(table_row(label.format(**names), value, note.format(**names)))

    lines += ["", "Markouts, bps: bought, how far the mid then stood above our price; sold, below",
              "  mean ± 95 % (fills of one minute count as one event); below 0: we were run over"]
    cells = [["after", *(f"{side} (fills)" for side in SIDES_OF), "left out"]]
    for horizon in HORIZONS:
        row = [m["markouts"][side][horizon] for side in SIDES_OF]
        cells.append([horizon, *(f"{e} ({e.n})" for e in row), str(row[0].excluded)])
    lines += align(cells)

    lines += ["", "Decisions by source, and the reasons given"]
    reasons = sorted(m["reasons"].items(), key=lambda item: -item[1])
    lines += [table_row(name, f"{n:,}") for name, n in m["decisions"].items() if n]
    lines += [table_row("  reason", f"{n:,}", reason) for reason, n in reasons[:MAX_REASONS]]
    if len(reasons) > MAX_REASONS:
        lines.append(f"    and {len(reasons) - MAX_REASONS} more: metrics.json")
    lines += ["", "Frictions in force"]
    for name, value in m["frictions"].items():
        help = FIELDS[name].metadata["help"] if name in FIELDS else ""
        lines.append(table_row(name, str(value), help))
    for outage in m["outages"]:
        length = f"{(outage['end_ns'] - outage['start_ns']) / NS:.1f} s"
        cost = f"{outage['fills']} fills in it, net {outage['net_usdt']:+.2f} USDT"
        lines.append(table_row(f"outage {clock_text(outage['start_ns'])}", length, cost))
    defects = [f"{n:,} {what}" for what, n in result.setting.data.counts.items()
               if n and what not in SOUND]  # fmt: skip
    if defects:
        lines += ["", f"Defects in the data: {', '.join(defects)}"]
    return "\n".join(lines)


SOUND = {"book", "trades", "tickers", "acks", "pongs", "ignored", "block trades"}  # no defects


# ---- How sure: the bootstrap -------------------------------------------------------

FEW_PERIODS = 500  # below, resampled intervals are too narrow
MEASURES = {  # of optimize.measure_paths: name and form in the tables
    "net_usdt": ("net, USDT", "+.2f"),
    "sharpe": ("Sharpe a minute", "+.3f"),
    "max_drawdown_usdt": ("drawdown, USDT", "+.2f"),
}


class Trial(NamedTuple):
    """A run by the minute: what bootstrap and search need to know of it."""

    start_ns: int  # the first whole minute
    net: np.ndarray  # (n,) its change in each minute, USDT
    fills: np.ndarray  # (n,) their number

    def between(self, start: int, stop: int) -> Trial:
        """Minutes start..stop-1."""
        start_ns = self.start_ns + start * MINUTE_NS
        return Trial(start_ns, self.net[start:stop], self.fills[start:stop])


def cut_into_minutes(result: Result) -> Trial:
    """From the first whole minute to the last; USDT to six decimals, as they are kept."""
    at_s, first_ns = whole_minutes(result), result.maker.first_ns
    net = values_at(at_s, result.columns["t_s"], result.columns["equity"]).round(6)
    fill_s = np.array([fill.recv_ns - first_ns for fill in result.fills]) / NS
    minute = np.searchsorted(at_s, fill_s, "right")  # 0: before the first
    fills = np.bincount(minute, minlength=len(at_s) + 1)[1 : len(at_s)]
    start_ns = first_ns + round(float(at_s[0] if len(at_s) else 0) * NS)
    return Trial(start_ns, np.diff(net).round(6), fills)


class Bootstrap(NamedTuple):
    """Measures of some runs over the same minutes, and of the difference of the first two."""

    periods: int  # minutes
    resamples: int
    block: float  # mean length of the blocks resampled, minutes
    measures: dict[str, dict[str, tuple[float, float, float]]]  # run: measure: value, low, high
    fills: dict[str, int]
    drawn: np.ndarray  # (runs, resamples): net


def resample(trials: Mapping[str, Trial], count: int, rng: np.random.Generator) -> Bootstrap:
    """Intervals of 95 % by the stationary bootstrap of the minutes.

    All runs are resampled at the same minutes: what the market did to both cancels.
    """
    x = np.column_stack([trial.net for trial in trials.values()])
    drawn, measured = opt.bootstrap(x, count, rng), opt.measure_paths(x.T)
    runs = [*trials, "difference"][: len(trials) + (len(trials) > 1)]
    measures: dict[str, dict[str, tuple[float, float, float]]] = {run: {} for run in runs}
    for name in MEASURES:
        samples, values = drawn[name], measured[name]
        if len(trials) > 1:
            samples = np.append(samples, [samples[0] - samples[1]], axis=0)
            values = np.append(values, values[0] - values[1])
        for run, sample, value in zip(runs, samples, values):
            measures[run][name] = (float(value), *opt.interval_of(sample))
    fills = {name: int(trial.fills.sum()) for name, trial in trials.items()}
    block = opt.common_block_length(x)
    return Bootstrap(len(x), count, block, measures, fills, drawn["net_usdt"])


def format_bootstrap(b: Bootstrap, title: str = "Bootstrap") -> str:
    """A column for each run, a line for each measure."""
    rows = [["", *b.measures]]
    for name, (label, form) in MEASURES.items():
        cells = [(format(x, form) for x in run[name]) for run in b.measures.values()]
        rows.append([label, *("{} ({} to {})".format(*cell) for cell in cells)])
    rows.append(["fills", *(f"{b.fills[run]:,}" if run in b.fills else "" for run in b.measures)])
    lines = [f"{title}: {b.periods:,} minutes, 95 % by {b.resamples:,} resamples in blocks of "
             f"{b.block:.1f} minutes", *align(rows)]  # fmt: skip
    if b.periods < FEW_PERIODS:
        lines.append(f"  WARNING: below {FEW_PERIODS} minutes such intervals are too narrow")
    return "\n".join(lines)


# ---- When it pays: regimes ---------------------------------------------------------

GRID_S = 5.0  # mids this far apart measure a minute; a decision is never older
REGIME_WARMUP = 30  # minutes before the first that is classed
VOLATILITIES, DIRECTIONS = ("calm", "usual", "wild"), ("range", "trend")


class Regime(NamedTuple):
    """What the minutes of a regime brought."""

    minutes: int
    volatility: float  # bps/sqrt(s), their mean
    gross: float  # USDT
    fees: float
    net: float
    net_a_minute: Estimate
    fills: int
    markouts: dict[str, Estimate]  # by horizon


def class_by_past(values: np.ndarray, classes: int) -> np.ndarray:
    """Which part of the earlier values each one falls into, 0 the lowest; -1 = too early.

    Thresholds are quantiles of what came before, so that no class knows the future. A
    value equal to earlier ones counts as the lowest of them; nan is in no class.
    """
    classed, past = np.full(len(values), -1), []
    for k, value in enumerate(values.tolist()):
        if value == value:
            rank = bisect_left(past, value)
            if len(past) >= REGIME_WARMUP:
                classed[k] = min(rank * classes // len(past), classes - 1)
            past.insert(rank, value)
    return classed


def describe_minutes(result: Result) -> tuple[np.ndarray, np.ndarray]:
    """Volatility, bps/sqrt(s), and directness of each whole minute: (n,) each.

    Of the mid every 5 s: root mean square of the log returns over sqrt(5 s); and
    |sum of returns| / sum of |returns|, 1 for a straight move, near 0 for there and back.
    """
    t_s, mid = result.columns["t_s"], result.columns["mid_price"]
    is_known = np.isfinite(mid)
    at_s = whole_minutes(result)
    n, parts = max(len(at_s) - 1, 0), round(MINUTE_S / GRID_S)
    grid_s = (at_s[0] if n else 0) + np.arange(n * parts + 1) * GRID_S
    mids = values_at(grid_s, t_s[is_known], mid[is_known])
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 before the first mid
        returns = (np.diff(np.log(mids)) * 1e4).reshape(n, parts)
        returns = np.where(np.isfinite(returns), returns, np.nan)
        volatility = np.sqrt((returns**2).mean(axis=1) / GRID_S)
        direct = np.abs(returns.sum(axis=1)) / np.abs(returns).sum(axis=1)
    return volatility, direct


def summarize_regimes(result: Result) -> dict[str, Regime]:
    """Result, fills and markouts of the minutes of each regime, by its name."""
    c, fills = result.columns, resting_fills(result)
    volatility, direct = describe_minutes(result)
    net, fees = (changes_by_minute(result, c[name]) for name in ("equity", "fees_paid"))
    fill_s = (fills.recv_ns - result.maker.first_ns) / NS
    minute_of = np.searchsorted(whole_minutes(result), fill_s, "right") - 1
    by_volatility = class_by_past(volatility, len(VOLATILITIES))
    by_direction = class_by_past(direct, len(DIRECTIONS))
    classes = {name: by_volatility == k for k, name in enumerate(VOLATILITIES)}
    classes |= {name: by_direction == k for k, name in enumerate(DIRECTIONS)}
    classes["not classed"] = by_volatility < 0
    regimes = {}
    for name, is_in in classes.items():
        is_own = np.isin(minute_of, is_in.nonzero()[0])
        cells = [estimate_mean(column[is_own], minute_of[is_own]) for column in fills.markouts.T]
        regimes[name] = Regime(
            int(is_in.sum()), estimate_mean(volatility[is_in]).mean,
            float((net + fees)[is_in].sum()), float(fees[is_in].sum()), float(net[is_in].sum()),
            estimate_mean(net[is_in]), int(is_own.sum()), dict(zip(HORIZONS, cells)),
        )  # fmt: skip
    return regimes


def format_regimes(regimes: dict[str, Regime], whose: str = "of all minutes") -> str:
    """A line for each regime, and in words where the money goes."""
    rows = [["", "minutes", "bps/√s", "gross", "fees", "net", "net a minute", "fills",
             "markout 1 s", "markout 10 s"]]  # fmt: skip
    for name, r in regimes.items():
        numbers = [write_value(x, ".2f") for x in (r.volatility, r.gross, 0 - r.fees, r.net)]
        markouts = [str(r.markouts[horizon]) for horizon in ("1 s", "10 s")]
        rows.append([name, str(r.minutes), *numbers, str(r.net_a_minute), str(r.fills), *markouts])
    lines = [f"Regimes {whose} (± 95 %). A minute is classed, at its end, against those before it:",
             "by thirds of volatility, and by halves of directness", *align(rows)]  # fmt: skip
    everything = [regimes[name] for name in (*VOLATILITIES, "not classed")]
    for names in (VOLATILITIES, DIRECTIONS):
        worst = min(names, key=lambda name: regimes[name].net)
        if (r := regimes[worst]).net < 0:
            total = sum(each.net for each in everything)
            minutes = sum(each.minutes for each in everything)
            lines.append(f"  {worst} minutes lose most: {r.net:+.2f} USDT in {r.minutes:,} minutes; "
                         f"all {minutes:,}: {total:+.2f}")  # fmt: skip
    return "\n".join(lines)


# ---- Tuning on the past ------------------------------------------------------------
#
# A trial: one configuration played over all data, kept by the minute. In sample: the
# minutes on which a choice is made. Out of sample: those after it, which judge it.

DEFAULT_GRID = {
    "alpha": [0.25, 1.0, 4.0], "gamma": [0.25, 0.5, 1.0, 2.0],
    "delta": [0.0, 1.0, 4.0], "zeta": [0.0, 1.0, 4.0],
}  # fmt: skip
FIXED_IN_GRID = "beta, horizon_s fixed: only alpha/beta and gamma x sqrt(horizon_s) matter"
OF_THE_PROGRAM = {"alpha", "beta", "gamma", "delta", "zeta", "horizon_s"}  # no baseline's
FACTS = {*FRICTIONS, "feed_latency_ms"}  # a search would take the kindest of them
IN_SAMPLE = 2 / 3  # of the minutes
LEAST_MINUTES = 10  # of a window, and in sample and out of it
SCORES = {"net": ("net_usdt", "net, USDT"), "sharpe": ("sharpe", "Sharpe ratio a minute")}
RESAMPLES = 1000  # where --bootstrap gives no number
LUCK = 0.05  # a search without skill ends as well less often than this: it may be skill
Tried = dict[str, Trial]  # by key_of what was changed


def parse_grid(texts: list[str] | None, strategy: str) -> dict[str, list[float]]:
    """--grid alpha=0.5,1,2 --grid gamma=…: values by parameter. UserError for nonsense."""
    grid: dict[str, list[float]] = {}
    for text in texts or []:
        name, _, listed = text.partition("=")
        name, values = name.strip().replace("-", "_"), [v for v in listed.split(",") if v.strip()]
        if not values:
            raise UserError(f"--grid {text} holds no value: write it as alpha=0.5,1,2")
        if name in grid:
            raise UserError(f"--grid {name} is given twice: list all its values in one")
        if name in FACTS:
            flag = name.replace("_", "-")
            raise UserError(f"--grid {name}: the exchange decides that: compare runs with --{flag}")
        try:
            grid[name] = sorted({float(v) for v in values})
        except ValueError:
            raise UserError(f"--grid {text}: the values must be numbers") from None
    grid = grid or DEFAULT_GRID
    if strategy != "lp" and (unused := [name for name in grid if name in OF_THE_PROGRAM]):
        raise UserError(f"--strategy {strategy} does not use {unused[0]}: give --grid with what it "
                        "uses, such as default_spread_bps=3,6,12 for fixed")  # fmt: skip
    return grid


def key_of(changes: Mapping[str, Any]) -> str:
    """The name of a trial."""
    return json.dumps(dict(changes), sort_keys=True)


def best_of(tried: Tried, objective: str) -> str:
    """The key of the trial with the highest score; of equals, the first."""
    name, _ = SCORES[objective]
    return max(tried, key=lambda key: float(opt.measure_paths(tried[key].net)[name]))


def cut_trials(tried: Tried, start: int, stop: int) -> Tried:
    """The same trials, minutes start..stop-1."""
    return {key: trial.between(start, stop) for key, trial in tried.items()}


def try_out(setting: Setting, changes: Mapping[str, Any]) -> Trial:
    """What a worker does: one run, by the minute."""
    return cut_into_minutes(play(setting, changes))


class Search:
    """What is tried of a setting, by which workers, and what has come of it.

    Every trial is a line of JSON, appended as it comes. The file's name holds a hash of
    code, data and setting: a search that was stopped or killed goes on where it was, and
    trials of different kinds never mix.
    """

    def __init__(
        self, setting: Setting, folder: Path, executor: Executor, stop: feed.StopSignal
    ) -> None:
        self.setting, self.executor, self.stop = setting, executor, stop
        self.trials: Tried = {}
        code = [Path(module.__file__).read_text() for module in (feed, opt, mm, sys.modules[__name__])]
        about = json.dumps([dataclasses.astuple(setting), code])
        self.path = folder / f"trials-{hashlib.sha256(about.encode()).hexdigest()[:10]}.jsonl"
        kept = self.path.read_bytes() if self.path.exists() else b""
        for line in kept.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # it was cut off
                self._keep(json.loads(line))
        self.file = feed.GrowingFile(self.path, append=True)
        if kept[-1:] not in (b"", b"\n"):
            self.file.write("\n")  # a killed writer broke off in mid-line

    def _keep(self, line: dict[str, Any]) -> None:
        net, fills = np.array(line["net"], float), np.array(line["fills"], int)
        self.trials[key_of(line["changes"])] = Trial(line["start_ns"], net, fills)

    def try_all(self, configurations: list[dict[str, Any]]) -> Tried:
        """Their trials, in this order; those kept are not played again. After a stop only
        what has come; UserError if a worker dies.
        """
        keys = {key_of(changes): changes for changes in configurations}
        missing = [changes for key, changes in keys.items() if key not in self.trials]
        work, done = partial(try_out, self.setting), len(keys) - len(missing)
        try:
            for k, trial in opt.run_trials(
                work, missing, self.executor, lambda: self.stop.is_set
            ):
                line = {"changes": missing[k]} | to_plain(trial._asdict())
                self._keep(line)
                self.file.write(json.dumps(line) + "\n")
                done += 1
                show_progress(done, len(keys))
        except BrokenExecutor:
            raise UserError(
                f"a worker was killed, perhaps for want of memory: {len(self.trials):,} trials are "
                f"kept in {self.path}; run the same command again, with fewer --workers"
            ) from None
        return {key: self.trials[key] for key in keys if key in self.trials}


def show_progress(done: int, total: int) -> None:
    """Tell on stderr how far a search is: in place on a terminal, else at every tenth."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{done:,} of {total:,} trials\x1b[K", end=end, file=sys.stderr, flush=True)
    elif done == total or done % max(1, total // 10) == 0:
        print(f"{done:,} of {total:,} trials", file=sys.stderr, flush=True)


def split_of(minutes: int) -> int:
    """How many of the minutes are in sample; UserError where either part is too little."""
    split = round(minutes * IN_SAMPLE)
    if minutes - split < LEAST_MINUTES:
        raise UserError(
            f"{minutes} minutes of data leave {minutes - split} to judge the choice, fewer than "
            f"{LEAST_MINUTES}: give more --data"
        )
    return split


def tune(search: Search, grid: Mapping[str, Sequence[float]], options: argparse.Namespace) -> Tried:
    """The trials of a grid, and of a finer one around its best point in sample."""
    tried = search.try_all(opt.expand_grid(grid))
    if options.refine and tried and not search.stop.is_set:
        minutes = len(next(iter(tried.values())).net)
        best = json.loads(best_of(cut_trials(tried, 0, split_of(minutes)), options.objective))
        limits = {name: (FIELDS[name].metadata["low"], FIELDS[name].metadata["high"])
                  for name in grid}  # fmt: skip
        finer = opt.expand_grid(opt.finer_grid(grid, best, limits))
        tried |= search.try_all([changes for changes in finer if is_sound(search.setting, changes)])
    return tried


def is_sound(setting: Setting, changes: Mapping[str, Any]) -> bool:
    """Whether these parameters go together."""
    with contextlib.suppress(UserError):
        return bool(setting.parameters(changes))
    return False


class Report(NamedTuple):
    """What a search came to."""

    tried: Tried
    on_grid: int  # of the trials; the others refine
    grid_size: int
    minutes: int
    split: int  # minutes in sample
    best: dict[str, float]
    given: Trial
    in_sample: Bootstrap
    out_of_sample: Bootstrap
    plateau: list[str]  # keys of trials inside the best's interval in sample
    deflated_sharpe: float
    sharpe_by_luck: float  # a minute
    luck_probability: float
    doubts: list[str]


def judge_search(
    search: Search, tried: Tried, grid: Mapping[str, Sequence[float]], options: argparse.Namespace
) -> Report:
    """Best and given parameters, in sample and out, and the price of having searched: the
    best is chosen in sample, and luck and the deflated Sharpe ratio are of there.
    """
    rng, count = np.random.default_rng(options.seed), options.bootstrap or RESAMPLES
    (given,) = search.try_all([{}]).values()
    minutes, split = len(given.net), split_of(len(given.net))
    inside = cut_trials(tried, 0, split)
    best = best_of(inside, options.objective)
    in_sample, out_of_sample = (
        resample({"best": tried[best].between(*part), "as given": given.between(*part)}, count, rng)
        for part in ((0, split), (split, minutes))
    )

    # How good would the best of as many trials look, if none had skill?
    x = np.column_stack([trial.net for trial in inside.values()])
    k, mean, variance = list(inside).index(best), x.mean(axis=0), x.var(axis=0, ddof=1)
    sharpes = opt.sharpe_score(mean, variance)
    scatter = float(sharpes.var(ddof=1)) if len(inside) > 1 else 0.0
    score = opt.sharpe_score if options.objective == "sharpe" else opt.net_score
    luck = opt.draw_best_of_chance(x, score, count, rng)
    is_flat = x[:, k].std() <= TINY
    deflated = math.nan if is_flat else opt.deflated_sharpe(
        sharpes[k], scatter, len(inside), split, *opt.shape_of(x[:, k]))  # fmt: skip

    name, _ = SCORES[options.objective]
    value, low, _ = in_sample.measures["best"][name]
    changes = json.loads(best)
    beyond = [n for n, v in changes.items() if not min(grid[n]) <= v <= max(grid[n])]
    doubts = {
        "The best that was found is not to trade.": not in_sample.fills["best"],
        "The best loses money even where it was chosen.":
            in_sample.measures["best"]["net_usdt"][0] < 0,
        "As given was at least as good there: keep it.":
            in_sample.measures["as given"][name][0] >= value,
        f"The best lies beyond the grid in {', '.join(beyond)}: widen it.": beyond,
    }  # fmt: skip
    keys = set(map(key_of, opt.expand_grid(grid)))
    return Report(
        tried, len(keys & set(tried)), len(keys), minutes, split, changes, given, in_sample,
        out_of_sample,
        [key for key, trial in inside.items() if opt.measure_paths(trial.net)[name] >= low],
        deflated, opt.best_sharpe_by_luck(scatter, len(inside)),
        float((1 + (luck >= score(mean, variance)[k]).sum()) / (1 + count)),
        [text for text, holds in doubts.items() if holds],
    )  # fmt: skip


def in_words(changes: Mapping[str, Any]) -> str:
    """alpha 4, gamma 0.5"""
    pairs = ((name, changes[name]) for name in FIELDS if name in changes)
    return ", ".join(f"{n} {'off' if v is None else format(v, 'g')}" for n, v in pairs)


def format_report(r: Report, search: Search, grid: Mapping[str, Any], objective: str) -> str:
    """What was tried, the best, how it fares out of sample, and what the search costs."""
    given = dataclasses.asdict(search.setting.parameters({}))
    earlier = len(search.trials.keys() - r.tried.keys() - {key_of({})})
    stopped = "" if r.on_grid == r.grid_size else "   STOPPED EARLY"
    verdict = "it may be luck" if r.luck_probability >= LUCK else "luck alone would rarely do this"
    lines = [
        f"{r.minutes:,} minutes: chosen by {objective} on the first {r.split:,}, judged on the "
        f"{r.minutes - r.split:,} after them",
        f"{len(r.tried):,} trials: {r.on_grid:,} of {r.grid_size:,} on the grid, "
        f"{len(r.tried) - r.on_grid:,} around its best{stopped}",
        f"  {FIXED_IN_GRID}" if grid is DEFAULT_GRID else "",
        f"  {earlier:,} more trials of earlier searches are not counted" if earlier else "",
        f"  best       {in_words(r.best)}",
        f"  as given   {in_words({name: given[name] for name in grid})}",
        "\n" + format_bootstrap(r.in_sample, "In sample, where it was chosen"),
        "\n" + format_bootstrap(r.out_of_sample, "Out of sample"),
        "\nThe price of having searched",
        f"  deflated Sharpe ratio {write_value(r.deflated_sharpe, '.3f')}: the confidence that the "
        f"best's true ratio is above {r.sharpe_by_luck:.3f} a",
        f"  minute, as is to be expected of the best of {len(r.tried):,} that only luck sets apart",
        f"  plateau: {len(r.plateau):,} trials inside the best's interval above",
        f"  In plain words: {r.luck_probability:.1%} of searches through these configurations, had "
        "they no",
        f"  skill, would find a best that looks at least as good: {verdict}",
        *(f"  {doubt}" for doubt in r.doubts),
    ]
    return "\n".join(line for line in lines if line)


# ---- Walk-forward ------------------------------------------------------------------

WINDOWS = 4  # of trading, where --walk-forward gives no number
LOOK_BACK = 2  # windows on which each choice is made


class Walk(NamedTuple):
    """Tune on two windows, trade the next, roll on."""

    minutes: int  # of a window
    choices: list[dict[str, float]]  # of each window
    inside: list[Trial]  # what the choice had earned where it was made
    outside: list[Trial]  # what it earned then
    traded: Trial  # all windows joined
    given: Trial  # the given parameters over the same minutes
    result: Result


def window_length(minutes: int, windows: int) -> int:
    """Minutes of each of so many windows; UserError where that is too little."""
    length = minutes // windows
    if length < LEAST_MINUTES:
        raise UserError(
            f"{minutes} minutes of data make {windows} windows of {length}, fewer than "
            f"{LEAST_MINUTES}: give more --data, or a smaller --walk-forward"
        )
    return length


def walk_forward(
    search: Search, grid: Mapping[str, Sequence[Any]], options: argparse.Namespace
) -> Walk | None:
    """Every configuration is played once over everything, and a choice looks at the minutes
    of its two windows only. What the choices would have earned is played in one piece,
    parameters changing where a window begins, inventory and queues carried along. Before
    the first choice it trades as given, and that does not count. None after a stop.
    """
    tried = search.try_all(opt.expand_grid(grid))
    given = search.try_all([{}])
    if search.stop.is_set or not given:
        return None
    (trial,) = given.values()
    count = options.walk_forward
    length = window_length(len(trial.net), count + LOOK_BACK)
    starts = [(k + LOOK_BACK) * length for k in range(count)]  # of trading
    keys, inside = [], []
    for start in starts:
        past = cut_trials(tried, start - LOOK_BACK * length, start)
        keys.append(best_of(past, options.objective))
        inside.append(past[keys[-1]])
    choices = [json.loads(key) for key in keys]
    begins_ns = [trial.start_ns + start * MINUTE_NS for start in starts]
    result = play(search.setting, schedule=[*zip(begins_ns, choices)], stop=search.stop)
    if search.stop.is_set:
        return None
    traded, span = cut_into_minutes(result), (starts[0], starts[-1] + length)
    outside = [traded.between(start, start + length) for start in starts]
    return Walk(length, choices, inside, outside, traded.between(*span), trial.between(*span),
                result)  # fmt: skip


def format_walk(walk: Walk, count: int, rng: np.random.Generator) -> str:
    """Each window: what was chosen, net a minute in sample and out of it."""
    rows = [["from, UTC", "in sample", "out of it", "fills", "chosen"]]
    for choice, inside, outside in zip(walk.choices, walk.inside, walk.outside):
        nets = [f"{trial.net.mean():+.3f}" for trial in (inside, outside)]
        fills = f"{outside.fills.sum():,}"
        rows.append([clock_text(outside.start_ns), *nets, fills, in_words(choice)])
    changed = sum(a != b for a, b in zip(walk.choices, walk.choices[1:]))
    joined = resample({"walk-forward": walk.traded, "as given": walk.given}, count, rng)
    return "\n".join([
        f"Walk-forward: {len(walk.choices)} windows of {walk.minutes} minutes, each traded with "
        f"what was best in the {LOOK_BACK * walk.minutes} before it; net a minute",
        *align(rows),
        f"  the choice changed {changed} of {len(walk.choices) - 1} times\n",
        format_bootstrap(joined, "Out of sample, windows joined"),
    ])  # fmt: skip


# ---- Pictures ----------------------------------------------------------------------

FEW = 4000  # decisions: more are thinned out
BINS = 1000  # of time, when thinned; about the pixels of a panel
UTC_FROM_S = 3 * 3600  # a longer span shows the time of day
ROW, PAIR = 2.6, 4.4  # heights of a row of panels, inches


def thin(c: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """At most two rows for each of BINS bins of time: minima, then maxima, of the columns.

    A curve through these looks like one through all rows. Mid and spreads, where the
    extremes would only be noise, show their last value.
    """
    t_s = c["t_s"]
    if len(t_s) <= FEW:
        return dict(c)
    bins = ((t_s - t_s[0]) / (t_s[-1] - t_s[0]) * BINS).astype(int)
    starts = np.flatnonzero(np.diff(bins, prepend=-1))
    last = np.append(starts[1:], len(t_s)) - 1
    thinned = {}
    for name, column in c.items():
        ends = [pick.reduceat(column, starts) for pick in (np.fmin, np.fmax)]
        if name == "mid_price" or name.endswith("_bps"):
            ends = [column[last], column[last]]
        thinned[name] = np.column_stack(ends).ravel()
    return thinned


def plot_spread(ax: Any, c: Mapping[str, np.ndarray]) -> None:
    """The terms of the base spread, stacked, and the spread that was quoted."""
    names = ("volatility", "liquidity", "depth")
    terms = [c[f"{name}_bps"] for name in names]
    colors = (mm.SKY, mm.YELLOW, mm.PINK)
    ax.stackplot(c["x"], terms, labels=names, colors=colors, alpha=0.8, step="post")
    quoted = (c["ask_price"] - c["bid_price"]) / c["mid_price"] * 1e4
    ax.step(c["x"], quoted, where="post", color=mm.BLACK, linewidth=0.7, label="as quoted")
    ax.set_ylim(bottom=0)
    mm.finish_panel(ax, "Spread: its base by terms, and as quoted", "bps")


def plot_markouts(ax: Any, markouts: dict[str, dict[str, Estimate]], fee_bps: float) -> None:
    """Markouts over the horizon, by side. 0 s has no place on a log axis: it stands left."""
    at = np.array([HORIZONS_S[0] / 4, *HORIZONS_S])
    colors = (mm.BLACK, mm.BLUE, mm.RED)
    for (name, cells), color, dodge in zip(markouts.items(), colors, (1, 0.95, 1.05)):
        mean, half = np.array([cell[:2] for cell in cells.values()]).T
        ax.errorbar(at * dodge, mean, yerr=np.nan_to_num(half), color=color, capsize=3,
                    marker="o", markersize=4, linewidth=1.2, label=name)  # fmt: skip
    ax.axhline(0, color="grey", linewidth=0.8)
    ax.axhline(fee_bps, color=mm.PINK, linestyle="--", linewidth=1,
               label="maker fee, to be earned")  # fmt: skip
    ax.set_xscale("log")
    ax.set_xlim(at[0] / 1.3, at[-1] * 1.3)
    ax.set_xticks(at, ["0: effective\nhalf spread", *(f"{h:g}" for h in HORIZONS_S)])
    ax.minorticks_off()
    ax.axvline(HORIZONS_S[0] / 2, color="grey", linestyle=":", linewidth=1)  # the axis breaks
    ax.set_xlabel("seconds after the fill")
    mm.finish_panel(ax, "Markout of our fills ± 95 %; below 0: run over", "bps")


def plot_bootstrap(ax: Any, b: Bootstrap, what: str = "Net") -> None:
    """How net scatters over the resamples, and the middle 95 % of it."""
    for name, values, color in zip(b.fills, b.drawn, (mm.BLUE, mm.PINK, mm.GREEN)):
        value, low, high = b.measures[name]["net_usdt"]
        ax.hist(values, bins=60, color=color, alpha=0.6, density=True,
                label=f"{name}: {low:+.2f} to {high:+.2f}")  # fmt: skip
        for at, style in ((value, "-"), (low, "--"), (high, "--")):
            ax.axvline(at, color=color, linestyle=style, linewidth=1.5)
    ax.axvline(0, color="grey", linewidth=0.8)
    ax.set_yticks([])
    ax.set_xlabel("net in a resample, USDT; line: as it was, dashed: middle 95 %")
    mm.finish_panel(ax, f"{what}: {b.periods:,} minutes, resampled", "how often")


def plot_regimes(ax: Any, regimes: dict[str, Regime], whose: str = "") -> None:
    """Gross, fees and net of the minutes of each regime."""
    names = ["not classed", *VOLATILITIES, *DIRECTIONS]
    at = np.array([0.0, 1, 2, 3, 4.5, 5.5])  # the same minutes again, by another view
    ax.axvline(3.75, color="grey", linestyle=":", linewidth=1)
    for k, (label, sign, color) in enumerate((
        ("gross", 1, mm.GREEN), ("fees", -1, mm.PINK), ("net", 1, mm.BLACK),
    )):  # fmt: skip
        heights = [sign * getattr(regimes[name], label) for name in names]
        label = "fees, as a loss" if sign < 0 else label
        ax.bar(at + 0.25 * (k - 1), heights, 0.25, color=color, label=label)
    half = [regimes[name].minutes * regimes[name].net_a_minute.half_width for name in names]
    net = [regimes[name].net for name in names]
    ax.errorbar(at + 0.25, net, yerr=np.nan_to_num(half), fmt="none", color="grey", capsize=3)
    ax.axhline(0, color="grey", linewidth=0.6)
    ax.set_xticks(at, [f"{name}\n{regimes[name].minutes:,} min" for name in names])
    mm.finish_panel(ax, f"Result by regimes {whose} (net ± 95 %)", "USDT")


def plot_heat(ax: Any, r: Report, grid: Mapping[str, Sequence[float]], objective: str) -> None:
    """The scores in sample along the two parameters that matter most, through the best
    point of the grid.
    """
    name, unit = SCORES[objective]
    scores = {key: float(opt.measure_paths(trial.net[: r.split])[name])
              for key, trial in r.tried.items()}  # fmt: skip
    on_grid = [key for key in map(key_of, opt.expand_grid(grid)) if key in scores]
    best = json.loads(max(on_grid, key=scores.get))
    spans = {}
    for parameter, values in grid.items():
        line = [scores.get(key_of(best | {parameter: v}), math.nan) for v in values]
        spans[parameter] = np.nanmax(line) - np.nanmin(line)
    chosen = sorted(grid, key=lambda n: -spans[n])[:2]
    down, across = chosen if len(chosen) > 1 else [*chosen, *chosen]
    table = np.array([
        [scores.get(key_of(best | {down: y, across: x}), math.nan) for x in grid[across]]
        for y in (grid[down] if down != across else grid[down][:1])
    ])  # fmt: skip
    ax.imshow(table, origin="lower", aspect="auto", cmap="cividis")
    middle = (np.nanmin(table) + np.nanmax(table)) / 2
    for (y, x), value in np.ndenumerate(table):
        color = mm.BLACK if value > middle else "white"
        ax.text(x, y, f"{value:.3g}", ha="center", va="center", fontsize=8, color=color)
    ax.set_xticks(range(len(grid[across])), [f"{x:g}" for x in grid[across]])
    ax.set_yticks(range(len(table)), [f"{y:g}" for y in grid[down][: len(table)]])
    ax.set_xlabel(across)
    ax.set_ylabel(down if down != across else "")
    others = in_words({n: v for n, v in best.items() if n not in chosen})
    ax.set_title(f"In sample, {unit}{others and ', at '}{others}\nbest: {in_words(r.best)}",
                 loc="left", fontsize=9)  # fmt: skip


def plot_scatter(ax: Any, r: Report) -> None:
    """Every trial's net a minute, in sample and out."""
    points = {key: (trial.net[: r.split].mean(), trial.net[r.split :].mean())
              for key, trial in (*r.tried.items(), ("given", r.given))}  # fmt: skip
    x, y = np.array(list(points.values())).T
    ax.scatter(x[: r.on_grid], y[: r.on_grid], s=14, color=mm.BLUE, alpha=0.6, label="grid")
    ax.scatter(x[r.on_grid : -1], y[r.on_grid : -1], s=14, color=mm.GREEN, alpha=0.6,
               label="around its best")  # fmt: skip
    ax.scatter(*points["given"], s=50, color=mm.BLACK, marker="D", label="as given")
    ax.scatter(*points[key_of(r.best)], s=170, color=mm.RED, marker="*", edgecolors="white",
               label="best")  # fmt: skip
    ax.axline((0, 0), slope=1, color="grey", linewidth=0.8, linestyle=":")
    ax.axhline(0, color="grey", linewidth=0.6)
    ax.axvline(0, color="grey", linewidth=0.6)
    ax.legend(fontsize=8, loc="upper left")
    ax.set_xlabel("in sample")
    ax.set_ylabel("out of sample")
    ax.set_title("Net a minute of every trial, USDT;\ndotted: as good as in sample", loc="left",
                 fontsize=9)  # fmt: skip


def plot_walk(ax: Any, walk: Walk) -> None:
    """Net out of sample, joined, and what each choice promised in sample."""
    net, given = (np.append(0, np.cumsum(trial.net)) for trial in (walk.traded, walk.given))
    for k, inside in enumerate(walk.inside):
        at, end = k * walk.minutes, (k + 1) * walk.minutes
        promise = net[at] + inside.net.mean() * walk.minutes
        ax.plot([at, end], [net[at], promise], color=mm.PINK, linestyle="--", linewidth=1.2,
                label="as promised in sample" if k == 0 else None)  # fmt: skip
        ax.axvline(at, color="grey", linestyle=":", linewidth=0.8)
    ax.plot(given, color=mm.SKY, linewidth=1.2, label="as given")
    ax.plot(net, color=mm.BLACK, linewidth=1.4, label="walk-forward")
    ax.axhline(0, color="grey", linewidth=0.6)
    ax.set_xlabel(f"minutes since {clock_text(walk.traded.start_ns)} UTC")
    mm.finish_panel(ax, "Walk-forward: net out of sample", "USDT")


def result_rows(result: Result, metrics: dict[str, Any]) -> list[tuple[float, list[mm.Panel]]]:
    """The five panels of a run; the first four share the axis of time."""
    first_ns, p = result.maker.first_ns, result.maker.parameters
    is_long = result.span_s > UTC_FROM_S
    to_x = partial(np.multiply, 1 / MINUTE_S)
    if is_long:
        def to_x(t_s: np.ndarray) -> np.ndarray:  # matplotlib counts in days since 1970
            return (first_ns / NS + t_s) / DAY_S
    c = thin(result.columns)
    c["x"] = to_x(c["t_s"])
    at = to_x(np.array([fill.recv_ns - first_ns for fill in result.fills]) / NS)

    def spread(ax: Any) -> None:
        plot_spread(ax, c)
        ax.set_xlabel("UTC" if is_long else f"minutes since {clock_text(first_ns)} UTC")
        if is_long:
            ax.xaxis_date()

    coin = result.maker.instrument.base_coin
    markouts = metrics["markouts"]
    return [
        (4.4, [partial(mm.plot_prices, c=c, fills=result.fills, at=at)]),
        (1.75, [partial(mm.plot_inventory, c=c, limit=p.max_inventory, coin=coin)]),
        (2.9, [partial(mm.plot_result, c=c)]),
        (2.35, [spread]),
        (ROW, [partial(plot_markouts, markouts=markouts, fee_bps=p.maker_fee_bps)]),
    ]


# ---- Command line ------------------------------------------------------------------

STRATEGIES = ("lp", "fixed", "as")
STOPS = (signal.SIGINT, signal.SIGTERM)
GRACE_S = 0.3  # for workers to end by themselves
MAX_WORKERS = 61  # in a pool, on Windows
TUNING = Path("tuning")  # where a search writes without --out
SCREEN = Path("-")  # --plot without a name


def run(options: argparse.Namespace, executor: Executor | None = None) -> None:
    """Load, play, print, write."""
    if options.plot and options.plot != SCREEN and options.plot.parent != options.out:
        mm.check_plot_path(options.plot)
    is_search = options.tune or options.walk_forward
    for flag, is_wrong, needs in (
        ("log", is_search, "one run: not with --tune or --walk-forward"),
        ("grid", not is_search, "--tune or --walk-forward"),
    ):
        if getattr(options, flag) and is_wrong:
            raise UserError(f"--{flag} needs {needs}")
    if len(options.strategy) > 1 and (is_search or options.log or options.out):
        raise UserError("several strategies are compared on the screen: name one with --tune, "
                        "--walk-forward, --log or --out")  # fmt: skip
    setting = make_setting(options)
    minutes = int((setting.data.span_ns[1] - setting.data.span_ns[0]) // MINUTE_NS)
    if options.tune:
        split_of(minutes)
    if options.walk_forward:
        window_length(minutes, options.walk_forward + LOOK_BACK)
    if options.bootstrap and minutes < LEAST_MINUTES:
        raise UserError(f"--bootstrap resamples minutes, of which the data hold {minutes}, fewer "
                        f"than {LEAST_MINUTES}: give more --data")  # fmt: skip
    folder = options.out or (TUNING if is_search else None)
    try:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        if is_search:
            run_search(options, setting, folder, executor)
        else:
            run_once(options, setting, folder)
    except BrokenPipeError:  # the reader of the table has gone
        raise
    except OSError as error:
        where = error.filename or folder
        raise UserError(f"{where} cannot be written: {error.strerror}") from None


def make_setting(options: argparse.Namespace) -> Setting:
    """What the flags say of data, parameters and frictions; judged before the work."""
    file = mm.ParameterFile(options.params) if options.params else None
    frictions = ("participation", "impact_bps", "peer_rules")
    setting = Setting(
        stamps=stamp_files(options.data or [mm.SAMPLE]),
        steps=(options.tick_size, options.lot_size, options.depth),
        given=mm.given_parameters(options, file),
        strategy=strategy_of(options, options.strategy[0]),
        exchange={name: getattr(options, name) for name in frictions},
    )
    setting.parameters({})
    rng = np.random.default_rng(options.seed)
    outages = draw_outages(options.outages, setting.data.span_ns, rng)
    return dataclasses.replace(setting, outages=outages)


def strategy_of(options: argparse.Namespace, name: str) -> tuple:
    """A strategy's name, then what shapes it."""
    shape = (options.risk_aversion, options.fill_rate_per_s, options.fill_decay_per_bps)
    return (name, *shape) if name == "as" else (name,)


def run_once(options: argparse.Namespace, setting: Setting, folder: Path | None) -> None:
    """One run: its table, its files, its picture; further strategies are set beside it."""
    rng, stop, rows = np.random.default_rng(options.seed), feed.StopSignal(), []
    log = feed.GrowingFile(options.log) if options.log else None
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        quotes = feed.GrowingFile(Path(scratch) / "quotes.csv") if folder else None
        result = play(setting, log=log, quotes=quotes, stop=stop)
        metrics, trials = measure(result), {options.strategy[0]: cut_into_minutes(result)}
        print(format_table(metrics, result))
        for name in options.strategy[1:]:
            rival = dataclasses.replace(setting, strategy=strategy_of(options, name))
            other = play(rival, stop=stop)
            trials[name] = cut_into_minutes(other)
            print(f"\n{name}:\n{format_table(measure(other), other)}")
        if options.bootstrap:
            least = min(len(trial.net) for trial in trials.values())  # if one was stopped
            if least < LEAST_MINUTES:
                print(f"\nstopped after {least} minutes: too few to resample")
            else:
                b = resample(cut_trials(trials, 0, least), options.bootstrap, rng)
                metrics["bootstrap"] = b._asdict() | {"drawn": None}
                rows.append((ROW, [partial(plot_bootstrap, b=b)]))
                print("\n" + format_bootstrap(b))
        if options.regimes:
            regimes = summarize_regimes(result)
            metrics["regimes"] = {name: regime._asdict() for name, regime in regimes.items()}
            rows.append((ROW, [partial(plot_regimes, regimes=regimes)]))
            print("\n" + format_regimes(regimes))
        for file in filter(None, (log, quotes)):
            file.close()
            if file.failure:
                raise UserError(file.failure)
        if folder:
            quotes.path.replace(folder / "quotes.csv")
            write_results(result, metrics, folder)
    if options.plot:
        rows = result_rows(result, metrics) + rows
        show_plot(options, "backtest.png", rows, result.title, shared=4)


def write_results(result: Result, metrics: dict[str, Any], folder: Path) -> None:
    """metrics.json, fills.csv and equity.csv."""
    fills = ["time_ns,recv_ns,side,price,qty,fee,mid_price,queue_ahead"]
    for f in result.fills:
        numbers = (f.price, f.qty, f.fee, f.mid_price, f.queue_ahead)
        side = "buy" if f.side == BID else "sell"
        fills.append(f"{f.time_ns},{f.recv_ns},{side},{','.join(f'{x:.9g}' for x in numbers)}")
    c = result.columns
    table = (c["mid_price"], c["inventory"], c["equity"] + c["fees_paid"], c["fees_paid"],
             c["equity"])  # fmt: skip
    equity = ["time_ns,mid_price,inventory,gross,fees,net"]
    for time_ns, *values in zip(c["time_ns"].tolist(), *(column.tolist() for column in table)):
        equity.append(f"{time_ns},{','.join('' if x != x else f'{x:.9g}' for x in values)}")
    for name, text in (
        ("metrics.json", json.dumps(to_plain(metrics), indent=1)),
        ("fills.csv", "\n".join(fills) + "\n"),
        ("equity.csv", "\n".join(equity) + "\n"),
    ):
        feed.write_whole(folder / name, lambda path, text=text: path.write_text(text))


def run_search(
    options: argparse.Namespace, setting: Setting, folder: Path, executor: Executor | None
) -> None:
    """--tune, --walk-forward: search, report, write."""
    grid, stop = parse_grid(options.grid, options.strategy[0]), feed.StopSignal()
    for changes in opt.expand_grid(grid):
        try:
            setting.parameters(changes)
        except UserError as error:
            raise UserError(f"--grid: {error}") from None
    fixed = [name for name in grid if FIELDS[name].metadata["fixed"]]
    if fixed and options.walk_forward:
        raise UserError(f"{fixed[0]} cannot change while trading: leave it out of --walk-forward")
    own = start_workers(options.workers or min(os.cpu_count() or 1, MAX_WORKERS))
    with contextlib.nullcontext(executor) if executor else own as workers:
        search = Search(setting, folder, workers, stop)
        try:
            search.try_all([{}])
            tried = tune(search, grid, options) if options.tune else {}
            walk = walk_forward(search, grid, options) if options.walk_forward else None
        finally:
            search.file.close()

    # Tell what came of it, and write it beside the trials.
    print(setting.data.title.replace("backtest of", "search over"))
    rows, written, rng = [], [search.path.name], np.random.default_rng(options.seed)
    regimes_of = walk and walk.result, "of the walk-forward, all minutes"
    if tried:
        report = judge_search(search, tried, grid, options)
        print(format_report(report, search, grid, options.objective))
        best = json.dumps(setting.given | report.best, indent=1) + "\n"
        text = json.dumps(to_plain(report_json(report, options.objective)), indent=1)
        feed.write_whole(folder / "best.json", lambda path: path.write_text(best))
        feed.write_whole(folder / "search.json", lambda path: path.write_text(text))
        written += ["best.json", "search.json"]
        rows.append((PAIR, [partial(plot_heat, r=report, grid=grid, objective=options.objective),
                            partial(plot_scatter, r=report)]))  # fmt: skip
        out = report.out_of_sample
        rows.append((ROW, [partial(plot_bootstrap, b=out, what="Net out of sample")]))
        if options.regimes:
            regimes_of = play(setting, report.best, stop=stop), "of the best, all minutes"
    if walk:
        print("\n" + format_walk(walk, options.bootstrap or RESAMPLES, rng))
        rows.insert(1, (ROW, [partial(plot_walk, walk=walk)]))
    if options.regimes and regimes_of[0] and not stop.is_set:
        regimes = summarize_regimes(regimes_of[0])
        rows.append((ROW, [partial(plot_regimes, regimes=regimes, whose=regimes_of[1])]))
        print("\n" + format_regimes(regimes, regimes_of[1]))
    if stop.is_set:
        count = len(search.trials)
        print(f"stopped; trials kept, from which the same command goes on: {count:,}")
    print(f"written to {folder}: {', '.join(written)}")
    if rows and options.plot:
        show_plot(options, "search.png", rows, setting.data.title)
    if search.file.failure:
        raise UserError(search.file.failure)


def report_json(r: Report, objective: str) -> dict[str, Any]:
    """A report without what is only there to draw."""
    samples = {name: getattr(r, name)._asdict() | {"drawn": None}
               for name in ("in_sample", "out_of_sample")}  # fmt: skip
    rest = {name: value for name, value in r._asdict().items() if name not in ("tried", "given")}
    return {"objective": objective, "trials": len(r.tried)} | rest | samples


@contextlib.contextmanager
def start_workers(count: int) -> Iterator[Executor]:
    """Processes of our own, which no Ctrl-C reaches: to answer it is for their parent. What
    they still play when we leave is ended.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), begin_work)
    is_main = threading.current_thread() is threading.main_thread()  # others may set no signal
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in STOPS if is_main}
    for _ in range(count):  # a process for each, that inherits what is ignored
        pool.submit(int)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield pool
    finally:
        # in a thread: it waits for what is being played, after it has dropped the rest
        closer = threading.Thread(target=partial(pool.shutdown, cancel_futures=True))
        closer.start()
        closer.join(GRACE_S)
        for child in set(multiprocessing.active_children()) - others:
            child.kill()
        closer.join()


def begin_work() -> None:
    """A worker begins: without its parent it ends."""
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def show_plot(
    options: argparse.Namespace, name: str, rows: list, title: str, shared: int = 0
) -> None:
    """--plot: on the screen if there is one and no name was given, else a PNG file."""
    path = options.plot
    if path == SCREEN:
        from matplotlib import pyplot  # chooses a backend that can show, if there is one

        is_screen = pyplot.get_backend().lower() not in ("agg", "pdf", "ps", "svg", "template")
        path = None if is_screen else (options.out or Path()) / name
    mm.draw_figure(rows, title, path, shared)
    if path:
        print(f"plot: {path}")


def number(low: float, high: float = math.inf, kind: Callable = float) -> Callable[[str], Any]:
    """What argparse makes of a text: a number from low to high."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            span = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text!r} must be {span}")
        return value

    convert.__name__ = "number" if kind is float else "whole number"
    return convert


def build_arguments() -> argparse.ArgumentParser:
    """The command line of `python backtest.py`."""
    parser = feed.Arguments(
        prog="backtest.py", description="The paper market maker over recorded history."
    )
    add, count = parser.add_argument, partial(number, kind=int)
    add("--data", type=Path, nargs="+", metavar="FILE",
        help="recordings, in order of time (default: the bundled synthetic sample)")  # fmt: skip
    add("--plot", type=Path, nargs="?", const=SCREEN, metavar="FILE.png",
        help="draw what was found; as PNG where a name is given or there is no screen")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="metrics.json, quotes, fills, equity as CSV")
    add("--log", type=Path, metavar="FILE", help="every decision as CSV")
    add("--params", type=Path, metavar="FILE.json", help="parameters")
    add("--tune", action="store_true",
        help="search for better parameters, judged on minutes that the choice did not see; "
        "writes to --out (default tuning)")  # fmt: skip
    add("--grid", action="append", metavar="NAME=A,B,…",
        help="values to try of a parameter (default: of alpha, gamma, delta, zeta)")  # fmt: skip
    add("--refine", action="store_true", help="also try a finer grid around the best point")
    add("--objective", choices=tuple(SCORES), default="net",
        help="what is made large: net, or the Sharpe ratio of a minute (default net)")  # fmt: skip
    add("--walk-forward", type=count(1), nargs="?", const=WINDOWS, metavar="N",
        help="tune on two windows, trade the next, roll on, N times (default 4)")  # fmt: skip
    add("--workers", type=count(1), metavar="N", help="processes (default: all cores)")
    add("--bootstrap", type=count(100), metavar="N",
        help="intervals of net, Sharpe ratio, drawdown from N resamples of the minutes "
        "(a search takes 1000)")  # fmt: skip
    add("--regimes", action="store_true",
        help="result by calm, usual and wild, by ranging and trending minutes")  # fmt: skip
    add("--strategy", choices=STRATEGIES, nargs="+", default=["lp"],
        help="the linear program, or a baseline: a fixed spread (default_spread_bps), or "
        "Avellaneda-Stoikov; several are set side by side (default lp)")  # fmt: skip
    add("--risk-aversion", type=number(1e-6, 1e6), default=0.05, metavar="X",
        help="of --strategy as: gamma, per bps and order (default %(default)s)")  # fmt: skip
    add("--fill-rate-per-s", type=number(1e-6, 1e6), default=0.55, metavar="X",
        help="of --strategy as: A, fills per s at the mid (default %(default)s)")  # fmt: skip
    add("--fill-decay-per-bps", type=number(1e-6, 1e6), default=1.2, metavar="X",
        help="of --strategy as: k, per bps of distance (default %(default)s)")  # fmt: skip
    add("--participation", type=number(0.01, 1), default=1.0, metavar="X",
        help="share of a trade's rest that fills us, 0.01 to 1 (default 1)")  # fmt: skip
    add("--impact-bps", type=number(0), default=0.0, metavar="X",
        help="our fill as large as the depth near the mid moves the prices that we see so "
        "far against us, bps; it decays (default 0)")  # fmt: skip
    add("--outages", type=count(0), default=0, metavar="N",
        help="windows of 5 to 60 s in which we hear nothing and cannot cancel")  # fmt: skip
    add("--seed", type=count(0), default=0, help="of outages and resamples (default 0)")
    add("--peer-rules", action="store_true", help="fill rules of hftbacktest, to compare")
    for flag, kind in (("--tick-size", str), ("--lot-size", str), ("--depth", int)):
        add(flag, type=kind, help="of the data, where they do not tell")
    mm.add_parameter_flags(parser)
    return parser


def main(arguments: list[str] | None = None, executor: Executor | None = None) -> int:
    """python backtest.py; the exit status. A search runs on the workers of the executor, if
    one is given: that of Dask or MPI spreads it over a cluster.
    """
    options = build_arguments().parse_args(arguments)
    return feed.exit_cleanly(lambda: run(options, executor))


if __name__ == "__main__":
    sys.exit(main())
