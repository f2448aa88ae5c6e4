"""Would it have paid? The market maker of marketmaker.py over history.

The same code decides, fills and accounts, live and here. This module adds where the messages
come from (history), what makes trading harder (frictions), and what came out (metrics, tables,
pictures). It makes no decision of its own.

History is a recording, or several of one market in a row, with inventory and orders carried
along. Two concessions to simplicity: a further file begins with an empty book, until its first
snapshot, and a markout does not look beyond the file of its fill.

Assumptions, with the direction of their bias:

  - Fills, queue and latency follow the rules in marketmaker.py's docstring.
  - `--participation` is our share of what a trade leaves after the queue; 1: optimistic.
  - There is no impact by default: optimistic. `--impact-bps X` makes a quote's fill worse in price
    by X x (order / depth of its side near the mid): a rough stand-in, to see what it would cost.
  - `--outages N` draws windows in which we hear nothing and cannot cancel: what rests is hit.
  - Archives (data/archive.py) are heard after a constant; real latency has tails: optimistic.
  - What a drawdown limit closes as a taker trades at once, without an order's latency: optimistic.
  - No funding; what is held at the end is marked to the mid, not closed: slightly optimistic.

Units: prices USDT, sizes base coin, time int ns, spreads and markouts bps. The result is net =
gross - fees, in USDT, of an account that starts empty. The statistics are in optimize.py.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import feed
import marketmaker as mm
import optimize as opt
from feed import ASK, BID, NS, Tape, UserError, clock_text
from marketmaker import MINUTE_NS
from optimize import FIELDS, Parameters

import numpy as np
from numpy.random import Generator, default_rng
from scipy.special import stdtrit

CACHE = Path(__file__).parent / "data" / "cache"  # of tapes; may be deleted at any time
CACHE_VERSION = 3  # of a tape's columns; what another version wrote is not read
Stamp = tuple[str, int, int, int]  # of a file: path, size, times of its last changes in ns
Steps = tuple[tuple[str, Any], ...]  # flags of the market by name; None: as the data tell


# ---- History: recordings as tapes, kept in a cache ---------------------------------


@dataclass(frozen=True, eq=False)
class Data:
    """What is played: the recordings of one market, in order of time."""

    title: str  # which market, of which file; it never hides that data are synthetic
    is_synthetic: bool
    instrument: feed.Instrument
    start: dict[str, Any]  # the first recording's start line
    tapes: list[Tape]
    counts: Counter[str]  # of messages, and of defects

    @cached_property
    def minutes_ns(self) -> np.ndarray:
        """Where the whole minutes (UTC) begin, without those that touch a hole."""
        first_ns, last_ns = self.tapes[0].recv_ns.item(0), self.tapes[-1].recv_ns.item(-1)
        begins = np.arange(-(-first_ns // MINUTE_NS), last_ns // MINUTE_NS) * MINUTE_NS
        is_whole = np.full(len(begins), True)
        for begin_ns, end_ns in self.holes:
            is_whole &= (begins + MINUTE_NS <= begin_ns) | (begins >= end_ns)
        return begins[is_whole]

    @cached_property
    def holes(self) -> list[tuple[int, int]]:
        """From one book message to the next, receive time, where that is more than a minute."""
        book_ns = np.concatenate([tape.recv_ns[tape.is_book] for tape in self.tapes])
        after = (np.diff(book_ns) > MINUTE_NS).nonzero()[0]
        return [*zip(book_ns[after].tolist(), book_ns[after + 1].tolist())]


@lru_cache(maxsize=1)
def open_data(stamps: tuple[Stamp, ...], steps: Steps) -> Data:
    """Open recordings in this state, once in a process. UserError if they do not go together."""
    recordings = [feed.Recording(Path(path), dict(steps)) for path, *_ in stamps]
    first, tapes, counts = recordings[0], [], Counter[str]()
    instrument = first.parser.instrument
    for recording, stamp in zip(recordings, stamps):
        path = recording.path
        if recording.parser.instrument != instrument:
            raise UserError(f"{path} is of another market, or on another grid of prices, than "
                            f"{first.path.name}: play it alone, or give --tick-size")  # fmt: skip
        tape, its_counts = load_tape(recording)
        if not tape.is_book.any():
            raise UserError(f"{path} holds no book of {instrument.symbol}: choose another file")
        if tapes and tape.recv_ns[0] < tapes[-1].recv_ns[-1]:
            raise UserError(f"{path} begins before the file before it ends: order by time")
        if stamp_file(path) != stamp:
            raise UserError(f"{path} was changed since the start: run the same command again")
        tapes.append(tape)
        counts.update(its_counts)
    is_synthetic = any(recording.is_synthetic for recording in recordings)
    names = ", ".join(recording.path.name for recording in recordings)
    title = f"{instrument.symbol} {instrument.category}   backtest of {names}"
    title += "   SYNTHETIC DATA, no market" if is_synthetic else ""
    return Data(title, is_synthetic, instrument, first.start, tapes, counts)


def stamp_file(path: Path) -> Stamp:
    """The state of a file: what is made of it is valid for no other. OSError if it is missing."""
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def load_tape(recording: feed.Recording) -> tuple[Tape, Mapping[str, int]]:
    """The tape of a recording, and what its parser counted: parsed once, then from the cache."""
    parser, path = recording.parser, recording.path
    made_of = CACHE_VERSION, stamp_file(path), parser.instrument.tick_text, [*parser.topics]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    folder = CACHE / f"{path.name.split('.')[0]}-{key}"
    files = {name: folder / f"{name}.npy" for name in feed.COLUMNS}

    def sum_files(folder: Path) -> dict[str, int]:
        return {file.name: zlib.crc32(np.memmap(file, mode="r")) for file in folder.glob("*.*")}

    with contextlib.suppress(OSError, ValueError, RecursionError):  # not there, or damaged
        if json.loads((folder / "sums").read_text()) == sum_files(folder):
            notes, counts = json.loads((folder / "notes.json").read_text())
            columns = {name: np.asarray(np.load(files[name], mmap_mode="r")) for name in files}
            return Tape(**columns, notes={int(m): note for m, note in notes.items()}), counts

    draft = folder.with_name(folder.name + ".part")
    for remains in (folder, draft):  # of a process that was killed, too
        shutil.rmtree(remains, ignore_errors=True)
    print(f"reading {path.name}, once; then from {CACHE}", file=sys.stderr)
    tape = feed.build_tape(recording.messages())
    try:
        draft.mkdir(parents=True)
        for name, file in files.items():
            np.save(draft / file.name, getattr(tape, name))
        (draft / "notes.json").write_text(json.dumps([tape.notes, parser.counts]))
        (draft / "sums").write_text(json.dumps(sum_files(draft)))
        draft.rename(folder)
    except OSError:  # another process was faster, or nothing can be written there
        shutil.rmtree(draft, ignore_errors=True)
    return tape, parser.counts


# ---- A run -------------------------------------------------------------------------

HORIZONS_S = np.array([0.1, 1, 10, 60])  # of markouts
FRICTIONLESS = {"participation": 1.0, "impact_bps": 0.0, "peer_rules": False}


@dataclass(frozen=True)
class Setting:
    """What a run is made of. It is small and plain, so that another process can repeat the run."""

    stamps: tuple[Stamp, ...]  # of the data's files
    steps: Steps
    given: dict[str, Any]  # parameters
    strategy: Any  # as mm.load_strategy takes it
    exchange: dict[str, Any]  # frictions of the PaperExchange
    outages: Sequence[tuple[int, int]] = ()  # begin and end, ns of receive time

    @property
    def data(self) -> Data:
        return open_data(self.stamps, self.steps)

    @property
    def parameters(self) -> Parameters:
        """UserError for what is out of range."""
        return mm.choose_parameters(self.given, self.data.start, self.data.instrument)

    @property
    def words(self) -> str:
        """The strategy, and whatever differs from the defaults."""
        changed = opt.in_words(opt.differing(self.parameters)) or "parameters at their defaults"
        words = [f"strategy {mm.load_strategy(self.strategy)[1]}", changed]
        words += [f"{n} {v:g}" for n, v in self.exchange.items() if v != FRICTIONLESS[n]]
        return ", ".join(words + [mm.count(len(self.outages), "outage")] * bool(self.outages))

    @property
    def version(self) -> str:
        """It is another one if anything differs: data, flags, code, a strategy's own file."""
        code = (feed.__file__, opt.__file__, mm.__file__, __file__, self.strategy)
        files = [Path(file) for file in code if not callable(file)]
        parts = [astuple(self), [file.read_text("latin-1") for file in files if file.is_file()]]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:10]

    def change(self, changes: Mapping[str, Any]) -> Setting:
        """The same with some parameters changed."""
        return replace(self, given={**self.given, **changes})


@dataclass(frozen=True)
class Result:
    """What a run leaves behind."""

    setting: Setting
    is_stopped: bool  # before the end of the data
    title: str
    maker: mm.MarketMaker
    fills: list[mm.Fill]
    columns: dict[str, np.ndarray]  # of the decisions: see MarketMaker.columns
    minutes_ns: np.ndarray  # where the whole minutes that were played begin
    markouts: np.ndarray  # (fills, HORIZONS_S), bps; nan = the file ends before


def play(setting: Setting, notes: Sequence[tuple[int, dict]] = (), log: Any = None,
         stop: feed.StopSignal | None = None) -> Result:  # fmt: skip
    """Play the data, with notes put in. The log takes lines; a stop ends at the next message."""
    data = setting.data
    maker = mm.MarketMaker(setting.parameters, data.instrument, log, setting.given,
                           strategy=setting.strategy, **setting.exchange)  # fmt: skip
    # Outages are messages in the stream.
    begins = [(begin, {"event": "outage", "back_ns": end}) for begin, end in setting.outages]
    ends = [(end, {"event": "outage", "back_ns": 0}) for _, end in setting.outages]
    notes = sorted([*notes, *begins, *ends], key=lambda note: note[0])
    # Play tape by tape, and look up where the mid went after the fills of each.
    fills, markouts = maker.account.fills, []
    for tape in data.tapes:
        before = len(fills)
        for message in tape.messages():
            if stop and stop.is_set:
                break
            while notes and maker.messages and notes[0][0] <= message.recv_ns:  # after the first
                maker.hear(feed.Message(feed.CONTROL, notes[0][0], note=notes.pop(0)[1]))
            maker.hear(message)
        markouts.append(measure_markouts(fills[before:], tape, data.instrument.tick_size))
        if stop and stop.is_set:
            break
    # The end: one row more, with the account as the last message leaves it.
    maker.finish()
    columns = maker.columns()
    minutes_ns = data.minutes_ns[data.minutes_ns + MINUTE_NS <= columns["time_ns"][-1]]
    is_stopped = bool(stop and stop.is_set)
    title = f"{data.title}{'   STOPPED EARLY' * is_stopped}\n{setting.words}"
    return Result(setting, is_stopped, title, maker, fills, columns, minutes_ns,
                  np.concatenate(markouts))  # fmt: skip


def draw_outages(count: int, tapes: list[Tape], rng: Generator) -> list[tuple[int, int]]:
    """Windows of 5 to 60 s of receive time, (begin, end), in order; none overlap."""
    first_ns, last_ns = tapes[0].recv_ns.item(0), tapes[-1].recv_ns.item(-1)
    windows: list[tuple[int, int]] = []
    for start in sorted(rng.uniform(first_ns, last_ns, count).tolist()):
        begin = max(int(start), windows[-1][1] + NS if windows else first_ns)
        end = begin + int(rng.uniform(5.0, 60.0) * NS)
        if end < last_ns:
            windows.append((begin, end))
    return windows


def measure_markouts(fills: list[mm.Fill], tape: Tape, tick_size: float) -> np.ndarray:
    """side (mid at fill time + h - price) / price x 1e4, bps: (fills, HORIZONS_S). Of the mid after
    the last book message up to then, exchange time; nan before the first, in a hole, and beyond
    the last. Bought at 100, mid 99.9 after 1 s: -10, run over.
    """
    book_ns, mids = tape.exch_ns[tape.is_book], tape.mid_ticks[tape.is_book] * tick_size
    side = np.array([fill.side for fill in fills])[:, None]
    price = np.array([fill.price for fill in fills])[:, None]
    time_ns = np.array([fill.time_ns for fill in fills], np.int64)[:, None]
    until_ns = time_ns + (HORIZONS_S * NS).astype(np.int64)
    row = np.searchsorted(book_ns, until_ns, "right")  # 0: before the first
    mid = np.append(np.nan, mids)[row]
    mid[until_ns > book_ns.max(initial=0)] = np.nan
    mid[np.diff(book_ns, prepend=book_ns[:1], append=book_ns[-1:])[row] > MINUTE_NS] = np.nan
    return side * (mid / price - 1) * 1e4


# ---- Metrics -----------------------------------------------------------------------

ANNUAL_FROM_S = 3 * 86_400  # a shorter span says nothing of a year
NET, FILLS, FEES = range(3)  # rows of a run by the minute
TINY = 1e-9  # USDT or base coin: less is rounding
SIDES_OF = {"both": (1, -1), "bought": (1,), "sold": (-1,)}
TERMS = ("volatility", "liquidity", "depth")  # of the base spread
HORIZONS = ["0 s", *(f"{h:g} s" for h in HORIZONS_S)]  # at 0 s the effective half spread
FEW_FILLS = 30  # below, nothing can be said of them
FRICTIONS = ["fill_model", "maker_fee_bps", "taker_fee_bps", "order_latency_ms", "clock_offset_ms"]


def cut_into_minutes(result: Result) -> np.ndarray:
    """By how much net, USDT, the number of fills, and fees, USDT, grow in each minute: (3, n)."""
    c, heard_ns = result.columns, np.sort([fill.recv_ns for fill in result.fills])
    known = [(c["time_ns"], c["equity"]), (heard_ns, np.arange(1, len(heard_ns) + 1)),
             (c["time_ns"], c["fees_paid"])]  # fmt: skip
    begins, ends = result.minutes_ns, result.minutes_ns + MINUTE_NS
    return np.array([values_at(ends, *of) - values_at(begins, *of) for of in known])


def values_at(at_ns: np.ndarray, time_ns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Of values that hold from time_ns on, the one that holds at each time; 0 before."""
    return np.append(0.0, values)[np.searchsorted(time_ns, at_ns, "right")]


@dataclass(frozen=True)
class Estimate:
    """A mean with a 95 % interval of mean ± half_width, in the unit of its values."""

    mean: float
    half_width: float
    n: int  # values
    excluded: int  # not known

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.half_width:.2f}".replace(" ± nan", "")


def estimate_mean(values: np.ndarray, clusters: np.ndarray) -> Estimate:
    """The mean of values, where those of one cluster may go together; nan is excluded.

    SE^2 = G/(G-1) sum_clusters (sum of the deviations from the mean)^2 / n^2, G clusters; the
    interval is t SE wide to either side, Student's t with G - 1 > 0 degrees of freedom.
    """
    is_known = np.isfinite(values)
    finite, n = values[is_known], int(is_known.sum())
    mean, half_width = float(finite.mean()) if n else math.nan, math.nan
    groups, member = np.unique(clusters[is_known], return_inverse=True)
    if len(groups) > 1:
        sums = np.bincount(member, finite - mean)
        error = math.sqrt(len(groups) / (len(groups) - 1) * float(sums @ sums)) / n
        half_width = float(stdtrit(len(groups) - 1, 0.975)) * error
    return Estimate(mean, half_width, n, len(values) - n)


def resting_fills(result: Result) -> dict[str, np.ndarray]:
    """Fills of our quotes, not as taker, as columns of Fill; markouts, bps: (fills, HORIZONS)."""
    rows = [k for k, fill in enumerate(result.fills) if fill.rule != "taker"]
    resting = [result.fills[k] for k in rows]
    fills = {name: np.array([getattr(f, name) for f in resting]) for name in mm.Fill._fields}
    effective = fills["side"] * (fills["mid_price"] / fills["price"] - 1) * 1e4
    return fills | {"markouts": np.column_stack([effective, result.markouts[rows]])}


def measure_sharpe(net: np.ndarray, span_s: float) -> dict[str, Any]:
    """Sharpe ratio per minute, mean / standard deviation, with a 95 % interval from
    `optimize.sharpe_error`. Annualised, times sqrt(365 x 1440), only from three days on.
    """
    n, error = len(net), opt.sharpe_error(net)
    sharpe = net.mean() / net.std(ddof=1) if n > 2 and net.std() > TINY else math.nan
    year = math.sqrt(365 * 1440) if span_s >= ANNUAL_FROM_S else math.nan
    measures: dict[str, Any] = {"sharpe_minutes": n}
    for name, periods in (("minute", 1.0), ("year", year)):
        measures[f"sharpe_per_{name}"] = periods * sharpe
        measures[f"sharpe_per_{name}_low"] = periods * (sharpe - opt.PARTS_95 * error)
        measures[f"sharpe_per_{name}_high"] = periods * (sharpe + opt.PARTS_95 * error)
    return measures


def measure_drawdown(t_s: np.ndarray, net: np.ndarray) -> dict[str, Any]:
    """The deepest fall of net, which starts with 0, below its peak so far, USDT, at the decisions.
    It lasts, s, from the last moment at that peak to the first one back at it, or to the end.
    """
    peak = np.maximum.accumulate(np.append(0.0, net))[1:]
    worst = int((peak - net).argmax())
    depth = peak[worst] - net[worst]
    # From the last moment at that peak before it to the first moment back at it.
    is_at_peak = net >= peak[worst] - TINY
    begin = np.flatnonzero(is_at_peak[:worst]).max(initial=0)
    end = (worst + np.flatnonzero(is_at_peak[worst:])).min(initial=len(net) - 1)
    is_any = depth > TINY
    return {
        "max_drawdown_usdt": is_any * depth, "max_drawdown_s": is_any * (t_s[end] - t_s[begin]),
        "max_drawdown_recovered": bool(is_at_peak[worst:].any()),
    }  # fmt: skip


def measure_quotes(c: Mapping[str, np.ndarray], t_s: np.ndarray, p: Parameters) -> dict[str, Any]:
    """Quotes and inventory, averaged over time where they are known; shares of time from 0 to 1."""
    held_s = np.diff(t_s, append=t_s[-1:])  # each row holds until the next

    def mean_of(values: np.ndarray) -> float:
        is_known = np.isfinite(values)
        total_s = held_s[is_known].sum()
        return float(values[is_known] @ held_s[is_known] / total_s) if total_s else math.nan

    inventory, mean = c["inventory"], mean_of(c["inventory"])
    is_at_limit = np.abs(inventory) > p.max_inventory - p.order_qty + TINY  # for one order more
    return {
        **{f"{side}_uptime": mean_of(np.isfinite(c[f"{side}_price"])) for side in ("bid", "ask")},
        "quoted_spread_bps": mean_of((c["ask_price"] - c["bid_price"]) / c["mid_price"] * 1e4),
        "inventory_mean": mean, "inventory_std": math.sqrt(mean_of((inventory - mean) ** 2)),
        "inventory_min": inventory.min(), "inventory_max": inventory.max(),
        "at_limit": mean_of(is_at_limit), "base_spread_bps": mean_of(c["base_spread_bps"]),
        **{f"{name}_spread_bps": mean_of(c[f"{name}_bps"]) for name in TERMS},
    }  # fmt: skip


def measure_orders(result: Result, fills: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Orders and our resting fills, medians of what is known. An order is known by side and
    arrival; queues, base coin, leave out fills where the book did not show our price."""
    # The exchange counts what was sent, and under "refused: " what it refused, and why.
    counts, why = result.maker.exchange.counts, "refused: "
    refused = {name.removeprefix(why): n for name, n in counts.items() if name.startswith(why)}
    filled = len(set(zip(fills["side"], fills["arrival_ns"])))
    measures = {
        "fills": len(result.fills), "taker_fills": len(result.fills) - len(fills["side"]),
        "orders_sent": counts["sent"], "orders_filled": filled,
        "fill_ratio": filled / counts["sent"] if counts["sent"] else math.nan,
        "orders_refused": sum(refused.values()), "refused": refused,
    }  # fmt: skip
    for name, values in (
        ("time_to_fill_s", (fills["time_ns"] - fills["arrival_ns"]) / NS),
        ("queue_at_arrival", fills["queue_at_arrival"]),
        ("queue_at_fill", fills["queue_ahead"]),
    ):
        finite = values[np.isfinite(values)]
        measures[name] = float(np.median(finite)) if len(finite) else math.nan
        measures[f"{name}_excluded"] = len(values) - len(finite)
    return measures


def estimate_markouts(markouts: np.ndarray, clusters: np.ndarray) -> dict[str, Estimate]:
    """The mean of some fills' markouts, bps, (fills, HORIZONS), by horizon."""
    return {name: estimate_mean(x, clusters) for name, x in zip(HORIZONS, markouts.T)}


def measure_adverse_selection(fills: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Who hit us: markouts by side and horizon, and after 1 s by rule. The fills of one minute are
    one cluster: a move runs over quote after quote. At 60 s the interval is somewhat too narrow.
    """
    minute, markouts, rules = fills["time_ns"] // MINUTE_NS, {}, {}
    for name, sides in SIDES_OF.items():
        is_side = np.isin(fills["side"], sides)
        markouts[name] = estimate_markouts(fills["markouts"][is_side], minute[is_side])
    for rule in mm.RULES[:-1]:
        is_rule = fills["rule"] == rule
        of_rule = estimate_markouts(fills["markouts"][is_rule], minute[is_rule])
        rules[rule] = {"fills": int(is_rule.sum()), "markout": of_rule["1 s"]}
    return {"markouts": markouts, "rules": rules}


def measure(result: Result) -> dict[str, Any]:
    """Every metric by name, the unit in the suffix."""
    setting, maker, a, c = result.setting, result.maker, result.maker.account, result.columns
    fills, net, holes = resting_fills(result), cut_into_minutes(result)[NET], setting.data.holes
    # Time stands still in a hole.
    in_holes = [np.clip(c["time_ns"] - begin, 0, end - begin) for begin, end in holes]
    t_s = (c["time_ns"] - maker.first_ns - sum(in_holes)) / NS
    span_s, hours = t_s[-1], t_s[-1] / 3600
    # net = gross - fees = spread captured + revaluation - fees + residual, each in USDT, and
    # in bps of the turnover, beside which a fee in bps can be read. Fees below 0: a rebate.
    money = {"net": a.equity, "gross": a.equity + a.fees_paid, "fees": a.fees_paid,
             "spread_captured": a.spread_captured, "revaluation": a.revaluation}  # fmt: skip
    residual = a.equity - (a.spread_captured + a.revaluation - a.fees_paid)
    scale = 1e4 / a.turnover if a.turnover else math.nan
    limit_usdt = maker.parameters.max_inventory * a.mid_price
    sources = (maker.strategy_name, "last_good", "default", "none")
    return {
        "title": result.title, "is_stopped": result.is_stopped, "version": setting.version,
        "data": [path for path, *_ in setting.stamps], "is_synthetic": setting.data.is_synthetic,
        "strategy": setting.strategy, "parameters": opt.differing(maker.parameters),
        "first_event_utc": clock_text(maker.first_ns), "last_event_utc": clock_text(maker.last_ns),
        "span_s": span_s, "events": maker.messages,
        "holes": len(holes), "holes_s": sum(end_ns - begin_ns for begin_ns, end_ns in holes) / NS,
        **{f"{name}_usdt": usdt for name, usdt in money.items()},
        **{f"{name}_bps": usdt * scale for name, usdt in money.items()},
        "residual_usdt": residual, "turnover_usdt": a.turnover,
        "turnover_rate": a.turnover / hours / limit_usdt if hours else math.nan,
        **measure_sharpe(net, span_s),
        **measure_drawdown(t_s, c["equity"]),
        **measure_adverse_selection(fills),
        **measure_orders(result, fills),
        **measure_quotes(c, t_s, maker.parameters),
        "decisions": {name: maker.sources[name] for name in sources},
        "reasons": {name: n for name, n in maker.reasons.items() if name},
        "frictions": {n: getattr(maker.parameters, n) for n in FRICTIONS} | setting.exchange,
        "outages": [{"start_ns": begin, "end_ns": end} for begin, end in setting.outages],
    }  # fmt: skip


# ---- Tables ------------------------------------------------------------------------
#
# The table of a run is data: titles, and label | value | note with metrics and their formats.

TABLE = """{title}
{first_event_utc} to {last_event_utc} UTC, {events:,} events, \
{holes} holes of {holes_s:,.0f} s left out

Result, USDT
spread captured | {spread_captured_usdt:+,.2f} | {spread_captured_bps:.2f} bps of turnover
inventory revaluation | {revaluation_usdt:+,.2f} | {revaluation_bps:.2f} bps: by moves of the mid
= gross | {gross_usdt:+,.2f} | {gross_bps:.2f} bps
fees paid (below 0: received) | {fees_usdt:,.2f} | {fees_bps:.2f} bps
= net | {net_usdt:+,.2f} | {net_bps:.2f} bps; the sum is off by {residual_usdt:.0e} USDT
turnover | {turnover_usdt:,.2f} | an hour {turnover_rate:.1f} times the inventory limit

Risk (intervals of 95 %, from the scatter of ten parts of the time)
Sharpe ratio per minute | {sharpe_per_minute:.4f} | \
{sharpe_per_minute_low:.4f} to {sharpe_per_minute_high:.4f} from {sharpe_minutes} minutes
Sharpe ratio per year | {sharpe_per_year:.2f} | \
{sharpe_per_year_low:.2f} to {sharpe_per_year_high:.2f}, x sqrt(365 x 1440); from three days on
deepest drawdown of net, USDT | {max_drawdown_usdt:,.2f} | below its peak so far, at decisions
it lasted, s | {max_drawdown_s:,.1f} | recovered: {max_drawdown_recovered}

Orders and fills
fills | {fills:,} | {taker_fills} of them as taker, not counted below
orders sent | {orders_sent:,}
refused on arrival | {orders_refused:,} | {refused}
filled, at least in part | {orders_filled:,} | {fill_ratio:.1%} of those sent
time to fill, s | {time_to_fill_s:.2f} | median, since arrival
queue ahead on arrival, {coin} | {queue_at_arrival:.4f} | \
median; {queue_at_arrival_excluded} fills where none was shown left out
queue ahead at the fill, {coin} | {queue_at_fill:.4f} | \
median, just before the fill; {queue_at_fill_excluded} left out

Quotes and inventory, averages over time
time with a bid | {bid_uptime:.1%}
time with an ask | {ask_uptime:.1%}
quoted spread, bps | {quoted_spread_bps:.2f} | to be set against a round trip's \
{round_trip_bps:g}, twice the maker fee
base spread, bps | {base_spread_bps:.2f} | volatility {volatility_spread_bps:.2f} + \
liquidity {liquidity_spread_bps:.2f} + depth {depth_spread_bps:.2f}
inventory, {coin} | {inventory_mean:+.4f} | standard deviation {inventory_std:.4f}, \
from {inventory_min:.2f} to {inventory_max:.2f}
time at the inventory limit | {at_limit:.1%} | no room for one more order

Markouts, bps: bought, how far the mid then stood above our price; sold, below
  mean ± 95 % (fills of one minute count as one event); below 0: we were run over"""
SOUND = {"book", "trades", "tickers", "acks", "pongs", "ignored", "block trades"}  # no defects


def dash(cell: Any) -> str:
    """A cell's text, with a dash where nothing can be said."""
    return re.sub(r"[+-]?\b(nan|inf)\b%?", "-", str(cell))


def align(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines with the first column to the left and the others to the right."""
    rows = [[*map(dash, row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for label, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:])]
        lines.append("  ".join([f"  {label:<{widths[0]}}", *cells]).rstrip())
    return lines


def format_table(metrics: dict[str, Any], result: Result) -> str:
    """The metrics to read: label with unit, value, what it means."""
    refused = ", ".join(f"{n} {why}" for why, n in metrics["refused"].items())
    names = {"coin": result.maker.instrument.base_coin, "refused": refused}
    names["round_trip_bps"] = 2 * result.maker.parameters.maker_fee_bps
    lines = []

    def add(label: str, value: str = "", note: str = "") -> None:
        row = f"  {label:<32}{dash(value):>14}   {dash(note)}".rstrip()
        lines.append(row if value else label)

    for line in TABLE.splitlines():
        add(*(cell.format(**metrics | names).rstrip() for cell in line.split(" | ")))
    rows = [["after", *(f"{side} (fills)" for side in SIDES_OF), "left out"]]
    for horizon in HORIZONS:
        cells = [metrics["markouts"][side][horizon] for side in SIDES_OF]
        rows.append([horizon, *(f"{e} ({e.n})" for e in cells), cells[0].excluded])
    lines += align(rows)
    add("\nWho hit us: fills by rule (queue and touch: a trade at our price; through: one beyond\n"
        "it; book: the other side reached it without a trade), and their markout after 1 s")
    for rule, r in metrics["rules"].items():
        share = r["fills"] / max(metrics["fills"] - metrics["taker_fills"], 1)
        add(rule, f"{r['fills']:,}", f"{share:.0%}   {r['markout']} bps ({r['markout'].n})")
    if metrics["fills"] < FEW_FILLS:
        add(f"WARNING: from fewer than {FEW_FILLS} fills nothing can be said of such figures")
    # Sections whose rows are not always the same.
    for section in ("decisions", "reasons", "frictions"):
        add(f"\n{section.capitalize()}")
        for name, value in metrics[section].items():
            add(name, str(value), FIELDS[name].metadata["help"] if name in FIELDS else "")
    counts = result.setting.data.counts.items()
    defects = [f"{n:,} {what}" for what, n in counts if n and what not in SOUND]
    if defects:
        add(f"\nDefects in the data: {', '.join(defects)}")
    return "\n".join(lines)


# ---- How sure: the bootstrap -------------------------------------------------------

FEW_PERIODS = 500  # below, resampled intervals are too narrow
MEASURES = {  # of optimize.measure_paths: label and format in the tables
    "net_usdt": ("net, USDT", "{:+.2f} ({:+.2f} to {:+.2f})"),
    "sharpe": ("Sharpe a minute, by parts", "{:+.3f} ({:+.3f} to {:+.3f})"),
    "max_drawdown_usdt": ("drawdown by minute", "{:+.2f} ({:+.2f} to {:+.2f})"),
}


def resample(runs: Mapping[str, np.ndarray], count: int, rng: Generator) -> dict[str, Any]:
    """Intervals of 95 % by the stationary bootstrap (of a run's Sharpe ratio: by its ten parts),
    for runs by the minute and the difference of the first two. All are resampled at the same
    minutes: what the market did to both cancels."""
    x = np.column_stack([run[NET] for run in runs.values()])
    drawn, measured = opt.bootstrap(x, count, rng), opt.measure_paths(x.T)
    measures: dict[str, dict[str, tuple[float, ...]]] = {}
    for measure in MEASURES:
        both = measured[measure], drawn[measure]
        # subtle: of a run alone the difference is empty
        values, samples = (np.append(a, a[:1] - a[1:2], axis=0) for a in both)
        bounds = np.quantile(samples, [0.025, 0.975], axis=1).T  # the middle 95 %
        for name, value, middle in zip([*runs, "difference"], values, bounds):
            measures.setdefault(name, {})[measure] = (float(value), *middle.tolist())
    for name, run in runs.items():  # of one ratio there is one interval, here and in the table
        measures[name]["sharpe"] = tuple(measure_sharpe(run[NET], 0).values())[1:4]
    fills = {name: int(run[FILLS].sum()) for name, run in runs.items()}
    return {
        "periods": len(x), "resamples": count, "block": opt.block_length(x), "fills": fills,
        "measures": measures,  # run: measure: value, low, high
    }  # fmt: skip


def format_bootstrap(b: Mapping[str, Any], title: str) -> str:
    """A column for each run, a line for each measure."""
    head = ": {periods:,} minutes, 95 % by {resamples:,} resamples in blocks of {block:.1f} minutes"
    rows: list[list[Any]] = [["", *b["measures"]]]
    for name, (label, form) in MEASURES.items():
        rows.append([label, *(form.format(*run[name]) for run in b["measures"].values())])
    rows.append(["fills", *(b["fills"].get(run, "") for run in b["measures"])])
    lines = [title + head.format(**b), *align(rows)]
    if b["periods"] < FEW_PERIODS:
        lines.append(f"  WARNING: below {FEW_PERIODS} minutes such intervals are too narrow")
    if min(b["fills"].values()) < FEW_FILLS:
        lines.append(f"  WARNING: fewer than {FEW_FILLS} fills say next to nothing")
    return "\n".join(lines)


# ---- When it pays: regimes ---------------------------------------------------------

GRID_S = 5  # mids this far apart measure a minute
REGIME_WARMUP = 30  # minutes before the first that is classed
VOLATILITIES, DIRECTIONS = ("calm", "usual", "wild"), ("range", "trend")


def class_by_past(values: np.ndarray, classes: int) -> np.ndarray:
    """Which part of the earlier values each one falls into, 0 the lowest; -1: too early, or nan.
    No class knows the future. A value equal to earlier ones counts as the lowest of them.
    """
    classed, is_known = np.full(len(values), -1), np.isfinite(values)
    for k in np.flatnonzero(is_known):
        past = values[:k][is_known[:k]]
        if len(past) >= REGIME_WARMUP:
            rank = (past < values[k]).sum()
            classed[k] = min(rank * classes // len(past), classes - 1)
    return classed


def describe_minutes(result: Result) -> tuple[np.ndarray, np.ndarray]:
    """Volatility, bps/sqrt(s), and directness of each whole minute: (n,) each. Of the mid every
    5 s: root mean square of the log returns over sqrt(5 s); |sum of returns| / sum of |returns|.
    """
    begins, parts = result.minutes_ns, MINUTE_NS // (GRID_S * NS)
    time_ns, mid = result.columns["time_ns"], result.columns["mid_price"]
    is_known = np.isfinite(mid)
    grid_ns = begins[:, None] + np.arange(parts + 1) * (GRID_S * NS)
    mids = values_at(grid_ns, time_ns[is_known], mid[is_known])
    # A row of returns for each minute; there are none before the first mid.
    mids[mids == 0] = np.nan
    returns = np.diff(np.log(mids)) * 1e4
    way = np.maximum(np.abs(returns).sum(axis=1), TINY)  # a minute without a move has no trend
    return np.sqrt((returns**2).mean(axis=1) / GRID_S), np.abs(returns.sum(axis=1)) / way


def summarize_regimes(result: Result) -> dict[str, dict[str, Any]]:
    """Result, fills and markouts of the minutes of each regime."""
    # What each minute brought, and into which minute each fill falls.
    begins, ends, fills = result.minutes_ns, result.minutes_ns + MINUTE_NS, resting_fills(result)
    net, _, fees = cut_into_minutes(result)
    minute_of = np.searchsorted(begins, fills["recv_ns"], "right") - 1
    minute_of[fills["recv_ns"] >= np.append(0, ends)[minute_of + 1]] = -1  # in none, or in a hole
    # Which minutes are in a regime: told at their end, by their rank among those before them.
    volatility, direct = describe_minutes(result)
    members = {"all": np.full(len(net), True)}
    for names, values in ((VOLATILITIES, volatility), (DIRECTIONS, direct)):
        classed = class_by_past(values, len(names))
        members |= {name: classed == k for k, name in enumerate(names)}
        members.setdefault("not classed", classed < 0)
    regimes = {}
    for name, is_member in members.items():
        rows = np.flatnonzero(is_member)
        of_fill = np.isin(minute_of, rows)
        regimes[name] = {
            "minutes": len(rows),
            "volatility_bps": estimate_mean(volatility[rows], rows).mean,
            "gross_usdt": (net + fees)[rows].sum(), "fees_usdt": fees[rows].sum(),
            "net_usdt": net[rows].sum(), "net_a_minute": estimate_mean(net[rows], rows),
            "fills": of_fill.sum(),
            "markouts": estimate_markouts(fills["markouts"][of_fill], minute_of[of_fill]),
        }  # fmt: skip
    return regimes


def format_regimes(regimes: dict[str, dict[str, Any]], whose: str) -> str:
    """A line for each regime."""
    rows: list[list[Any]] = [["", "min", "bps/√s", "gross", "fees", "net", "net a minute", "fills",
                              "markout 1 s", "markout 10 s"]]  # fmt: skip
    for name, r in regimes.items():
        money = (r["volatility_bps"], r["gross_usdt"], 0 - r["fees_usdt"], r["net_usdt"])
        rows.append([name, r["minutes"], *(f"{x:.2f}" for x in money), r["net_a_minute"],
                     r["fills"], r["markouts"]["1 s"], r["markouts"]["10 s"]])  # fmt: skip
    how = "by thirds of volatility and halves of directness among the minutes before"
    return "\n".join([f"Regimes {whose}, {how} (± 95 %)", *align(rows)])


# ---- Search: tuning on the past ----------------------------------------------------
#
# A trial is one configuration played over all data, kept by the minute. In sample: the
# minutes on which a choice is made. Out of sample: those after it, which judge it.

DEFAULT_GRID = ["alpha=0.25,1,4", "gamma=0.25,0.5,1,2", "delta=0,1,4", "zeta=0,1,4"]
OF_THE_PROGRAM = {"alpha", "beta", "gamma", "delta", "zeta", "horizon_s",
                  "liquidity_scale_musd", "depth_scale_musd"}  # fmt: skip  # no baseline's
IN_SAMPLE = 2 / 3  # of the minutes
LOOK_BACK = 2  # windows of a walk-forward on which each choice is made
SCORES = {"net": "net_usdt", "sharpe": "sharpe"}  # by objective: of optimize.measure_paths
PRICE = """
The price of having searched
  deflated Sharpe ratio {deflated_sharpe:.3f}: the confidence that the best's true ratio is above
  {sharpe_by_luck:.3f} a minute, which the best of {trials:,} as scattered as these shows by luck
  plateau: {plateau:,} trials not below the best's interval in sample
  In plain words: {luck_probability:.1%} of searches through these configurations, had they no
  skill, would find a best that looks at least as good: """
KEEP = "\nKeep what was given: out of sample the best is no better; best.json is not written"
Trial = tuple[dict[str, float], np.ndarray]  # what was changed, and the run by the minute


def parse_grid(texts: Sequence[str], setting: Setting) -> dict[str, list[float]]:
    """--grid alpha=0.5,1,2 --grid gamma=…: values by parameter. UserError for nonsense."""
    grid: dict[str, list[float]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        try:
            grid[name.strip().replace("-", "_")] = sorted({float(v) for v in values.split(",")})
        except ValueError:
            raise UserError(f"--grid {text}: write numbers, as in alpha=0.5,1,2") from None
    # Can all of it be played, and does it change anything?
    if math.prod(map(len, grid.values())) > 1e5:
        raise UserError("--grid makes more than 100,000 configurations: give fewer values")
    for changes in opt.expand_grid(grid):
        _ = setting.change(changes).parameters  # raises what is wrong with them
    unused = OF_THE_PROGRAM if setting.strategy == "fixed" else ()
    for name in grid:
        if FIELDS[name].metadata["fixed"] or name in unused:
            raise UserError(f"--grid {name} is nothing that --strategy {setting.strategy} chooses: "
                            "give what it does, such as default_spread_bps=3,6,12 for fixed")
    return grid


def best_of(trials: list[Trial], objective: str, minutes: slice) -> int:
    """Which trial has the highest score over some minutes; of equals, the first."""
    x = np.array([run[NET, minutes] for _, run in trials])
    return int(opt.measure_paths(x)[SCORES[objective]].argmax())


def try_out(setting: Setting, changes: Mapping[str, Any]) -> np.ndarray:
    """What a worker does: one run, by the minute."""
    return cut_into_minutes(play(setting.change(changes)))[:FEES]


def try_all(configurations: list[dict[str, float]], setting: Setting, path: Path,
            executor: Executor, stop: feed.StopSignal) -> list[Trial]:  # fmt: skip
    """The trials of all configurations, in this order; after a stop, those done by then. What the
    file holds from an earlier search is not played again. UserError if a worker dies.
    """
    # Each trial is a line of JSON; a search that was killed may have left half of one.
    kept = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
            changes, run = json.loads(line)
            kept[frozenset(changes.items())] = np.array(run, float).reshape(2, -1)
    # Play what is missing, and write it down as it comes.
    keys = [frozenset(changes.items()) for changes in configurations]
    missing = [changes for key, changes in zip(keys, configurations) if key not in kept]
    total, work = len(missing), partial(try_out, setting)
    with open(path, "ab", buffering=0) as file:
        try:
            played = opt.run_trials(work, missing, executor, lambda: stop.is_set)
            for done, (k, run) in enumerate(played, 1):
                kept[frozenset(missing[k].items())] = run
                with contextlib.suppress(OSError):  # a full disk ends no search
                    file.write(f"\n{json.dumps([missing[k], run.tolist()])}".encode())
                if done * 10 // total > (done - 1) * 10 // total:  # at each tenth of them
                    print(f"{done:,} of {total:,} trials", file=sys.stderr, flush=True)
        except BrokenExecutor:
            what = f"a worker was killed, perhaps for want of memory; {path} keeps what was played"
            raise UserError(f"{what}: run the same command again, with fewer --workers") from None
    return [(changes, kept[key]) for key, changes in zip(keys, configurations) if key in kept]


def refine_grid(trials: list[Trial], grid: dict, setting: Setting, objective: str) -> list[dict]:
    """The points of a finer grid around the best trial in sample."""
    split = round(trials[0][1].shape[1] * IN_SAMPLE)
    best, _ = trials[best_of(trials, objective, slice(0, split))]
    limits = {n: (FIELDS[n].metadata["low"], FIELDS[n].metadata["high"]) for n in grid}
    on_grid, finer = opt.expand_grid(grid), []
    for changes in opt.expand_grid(opt.finer_grid(grid, best, limits)):
        with contextlib.suppress(UserError):  # they do not go together
            if changes not in on_grid and setting.change(changes).parameters:
                finer.append(changes)
    return finer


def judge_search(on_grid: list[Trial], finer: list[Trial], given: np.ndarray, objective: str,
                 count: int, rng: Generator) -> dict[str, Any]:  # fmt: skip
    """The best and the given parameters, in sample and out, and the price of having searched."""
    # Choose on the first minutes, and show both parts.
    trials = on_grid + finer
    minutes, split = given.shape[1], round(given.shape[1] * IN_SAMPLE)
    k = best_of(trials, objective, slice(0, split))
    changes, best = trials[k]
    in_sample, out_of_sample = (
        resample({"best": best[:, part], "as given": given[:, part]}, count, rng)
        for part in (slice(0, split), slice(split, None))
    )
    # Which of its values is the last that was tried, though the parameter could go further?
    at_edge = []
    for name, value in changes.items():
        tried, rule = sorted({other[name] for other, _ in trials}), FIELDS[name].metadata
        if value in (tried[0], tried[-1]) and tried[1:] and rule["low"] < value < rule["high"]:
            at_edge.append(name)
    # How good would the best of as many trials look, if none had skill?
    x = np.column_stack([run[NET, :split] for _, run in trials])
    mean, variance = x.mean(axis=0), x.var(axis=0, ddof=1)
    score = opt.sharpe_score if objective == "sharpe" else lambda mean, variance: mean
    luck = opt.draw_best_of_chance(x, score, count, rng)
    as_good = (luck >= score(mean, variance)[k]).sum()
    sharpes = opt.sharpe_score(mean, variance)
    scatter = float(sharpes.var(ddof=1)) if len(trials) > 1 else 0.0
    deflated = opt.deflated_sharpe(sharpes[k], opt.sharpe_error(x[:, k]), scatter, len(trials))
    _, low, _ = in_sample["measures"]["best"][SCORES[objective]]
    better_by, *_ = out_of_sample["measures"]["difference"][SCORES[objective]]
    return {
        "objective": objective, "minutes": minutes, "split": split, "judged": minutes - split,
        "trials": len(trials), "on_grid": len(on_grid), "around": len(finer),
        "best": changes, "run": best, "in_sample": in_sample, "out_of_sample": out_of_sample,
        "plateau": (opt.measure_paths(x.T)[SCORES[objective]] >= low).sum(), "at_edge": at_edge,
        "deflated_sharpe": deflated, "luck_probability": (1 + as_good) / (1 + count),
        "sharpe_by_luck": opt.best_sharpe_by_luck(scatter, len(trials)),
        "is_better": better_by > 0,  # than what was given, where neither was chosen
    }  # fmt: skip


def format_report(r: dict[str, Any], given: Mapping[str, Any]) -> str:
    """What was tried, the best, how it fares out of sample, and what the search costs."""
    may_be_luck = r["luck_probability"] >= 0.05
    verdict = "it may be luck" if may_be_luck else "luck alone would rarely do this"
    return "\n".join([
        "{minutes:,} minutes: chosen by {objective} on the first {split:,}, judged on the other "
        "{judged:,}".format(**r),
        "{trials:,} trials: {on_grid:,} on the grid, {around:,} around its best".format(**r),
        f"  best       {opt.in_words(r['best'])}",
        f"  as given   {opt.in_words({name: given[name] for name in r['best']})}\n",
        *(f"  {name} lies at the edge of the grid: widen it with --grid {name}=..."
          for name in r["at_edge"]),
        format_bootstrap(r["in_sample"], "In sample, where it was chosen") + "\n",
        format_bootstrap(r["out_of_sample"], "Out of sample"),
        dash(PRICE.format(**r)) + verdict + ("" if r["is_better"] else KEEP),
    ])  # fmt: skip


def walk_forward(setting: Setting, trials: list[Trial], count: int, objective: str,
                 stop: feed.StopSignal) -> tuple[list[tuple], slice, Result]:  # fmt: skip
    """Tune on two windows, trade the next, roll on: windows (begin, ns; choice; its net a minute in
    sample), their minutes, and what came out. It is played in one piece, inventory and queues
    carried along; before the first choice it trades as given, and that does not count.
    """
    length, windows, notes = trials[0][1].shape[1] // (LOOK_BACK + count), [], []
    for k in range(count):
        past = slice(k * length, (k + LOOK_BACK) * length)
        choice, run = trials[best_of(trials, objective, past)]
        begin_ns = setting.data.minutes_ns.item(past.stop)
        windows.append((begin_ns, choice, run[NET, past].mean()))
        notes.append((begin_ns, {"event": "params", "overrides": {**setting.given, **choice}}))
    span = slice(LOOK_BACK * length, (LOOK_BACK + count) * length)
    return windows, span, play(setting, notes, stop=stop)


def format_walk(windows: list[tuple], end_ns: int, traded: np.ndarray, walk: Result) -> str:
    """Each window: what was chosen, net a minute in sample and out of it; the last one's end."""
    rows = [["from, UTC", "in sample", "out of it", "fills", "carried in", "chosen"]]
    c, count, length = walk.columns, len(windows), traded.shape[1] // len(windows)
    at_ns = np.array([*(begin_ns for begin_ns, _, _ in windows), end_ns])
    held, known = values_at(at_ns[:-1], c["time_ns"], c["inventory"]), np.isfinite(c["mid_price"])
    mids = values_at(at_ns, c["time_ns"][known], c["mid_price"][known])
    carried = held * np.diff(mids)  # USDT: what it brings if it is held through the window
    parts = np.split(traded, count, axis=1)
    for (begin_ns, choice, inside), (net, fills, _), usdt in zip(windows, parts, carried):
        rows.append([clock_text(begin_ns), f"{inside:+.3f}", f"{net.mean():+.3f}",
                     f"{fills.sum():,.0f}", f"{usdt:+.2f}", opt.in_words(choice)])  # fmt: skip
    changed = sum(a[1] != b[1] for a, b in zip(windows, windows[1:]))
    return "\n".join([
        f"Walk-forward: {count} windows of {length} minutes, traded with what was best in the "
        f"{LOOK_BACK * length} before it; net a minute",
        *align(rows),
        f"  the choice changed {changed} of {count - 1} times; carried in: what the inventory of",
        "  before the window, which no choice of it bought, brings by its end, USDT\n",
    ])  # fmt: skip


# ---- Pictures ----------------------------------------------------------------------
#
# A panel draws on an axes, and tells its title, its unit and what runs along it.

BLACK, BLUE, RED, GREEN = "black", "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's, which
SKY, YELLOW, PINK = "#56B4E9", "#F0E442", "#CC79A7"  # colour-blind readers can tell apart
HEIGHT = 2.6  # of most panels, inches
CLOSE_UP = 10.0  # minutes
Told = tuple[str, str, str]  # of a panel: title, unit, x label
Row = tuple[float, Callable[[Any], Told]]  # of a picture: height and panel


def draw_figure(rows: list[Row], title: str, shared: int = 0, shades: Any = ()) -> bytes:
    """Panels below each other, as a PNG; the first `shared` have one x axis, and its shades."""
    from matplotlib.figure import Figure  # slow to import

    heights, panels = zip(*rows)
    figure, png = Figure(figsize=(8.8, sum(heights)), layout="constrained"), io.BytesIO()
    figure.suptitle("\n".join(textwrap.fill(line, 105) for line in title.splitlines()), fontsize=10)
    axes = figure.subplots(len(rows), squeeze=False, height_ratios=heights)[:, 0]
    for ax, panel in zip(axes, panels):
        ax.margins(x=0.01)
        ax.grid(alpha=0.25, linewidth=0.5)
        told, unit, along = panel(ax)
        ax.set_title(told, loc="left", fontsize=10, fontweight="bold")
        ax.set(xlabel=along, ylabel=unit)
        if ax.get_ylim()[0] < 0 < ax.get_ylim()[1]:
            ax.axhline(0, color="grey", linewidth=0.7)
        if ax.get_legend_handles_labels()[0]:  # beside the title, above the data
            ax.legend(loc="lower right", bbox_to_anchor=(1.01, 0.985), ncols=6, frameon=False,
                      fontsize=8.5, handlelength=1.3, columnspacing=1.0, borderpad=0.2)
    for ax in axes[:shared]:
        for begin, end in shades:
            ax.axvspan(begin, end, color="grey", alpha=0.25, linewidth=0)
    for above, ax in zip(axes, axes[1:shared]):
        ax.sharex(axes[0])
        above.tick_params(labelbottom=False)
    figure.savefig(png, dpi=150, format="png")
    return png.getvalue()


def draw_steps(ax: Any, x: Any, values: Any, color: str, label: str, width: float = 1.0) -> None:
    """A curve of values that each hold until the next; nan is a gap, and nan alone no curve."""
    if np.isfinite(values).any():
        ax.step(x, values, color, where="post", linewidth=width, label=label)


def plot_prices(ax: Any, result: Result, x: Any, mids: Any, title: str, size: float) -> Told:
    """The mid of every second, with a gap where no book was known; quotes and fills."""
    c, first_ns = result.columns, result.maker.first_ns
    draw_steps(ax, x, mids, BLACK, "mid")
    for side, name, color, marker in ((BID, "bid", BLUE, "^"), (ASK, "ask", RED, "v")):
        minutes = (c["time_ns"] - first_ns) / MINUTE_NS
        draw_steps(ax, minutes, c[f"{name}_price"], color, f"our {name}", 0.4)
        ours = [fill for fill in result.fills if fill.side == side]
        if ours:
            at = [(fill.recv_ns - first_ns) / MINUTE_NS for fill in ours]
            ax.scatter(at, [fill.price for fill in ours], s=size, c=color, marker=marker, zorder=5,
                       edgecolors="white", linewidths=0.3, label=mm.VERBS[side])  # fmt: skip
    ax.ticklabel_format(axis="y", useOffset=False)
    return title, "USDT", ""


def plot_run(result: Result) -> list[Row]:
    """The panels of a run: the first four over its time, then those of the ten minutes that lost
    most. The shade of the result reaches from net up to its peak so far.
    """
    maker, c, coin = result.maker, result.columns, result.maker.instrument.base_coin
    minutes = (c["time_ns"] - maker.first_ns) / MINUTE_NS
    path = np.array(maker.account.path).reshape(-1, 7)  # see Account.add_point
    time_ns, mids, held, captured, revaluation, fees, net = path.T
    x = (time_ns - maker.first_ns) / MINUTE_NS
    loss = net[(x.searchsorted(x - CLOSE_UP, "right") - 1).clip(min=0)] - net
    last = max(x[loss.argmax()], CLOSE_UP)
    is_close = (minutes >= last - CLOSE_UP) & (minutes < last)

    def plot_inventory(ax: Any) -> Told:
        draw_steps(ax, x, held, BLACK, "held")
        ax.axhline(maker.parameters.max_inventory, color=RED, linewidth=1.0, label="limit")
        ax.axhline(-maker.parameters.max_inventory, color=RED, linewidth=1.0)
        return "Inventory", coin, ""

    def plot_result(ax: Any) -> Told:
        peak = np.maximum.accumulate(np.append(0.0, net))[1:]
        if (net < peak).any():
            ax.fill_between(x, net, peak, color=SKY, alpha=0.3, lw=0, step="post", label="drawdown")
        draw_steps(ax, x, captured, GREEN, "spread captured")
        draw_steps(ax, x, revaluation, BLUE, "+ revaluation")
        draw_steps(ax, x, -fees, PINK, "- fees")
        draw_steps(ax, x, net, BLACK, "= net", 1.4)
        return "Result", "USDT", ""

    def plot_spread(ax: Any) -> Told:
        terms, colors = [c[f"{name}_bps"] for name in TERMS], (SKY, YELLOW, PINK)
        if np.isfinite(terms).any():
            ax.stackplot(minutes, terms, labels=TERMS, colors=colors, alpha=0.8, step="post")
        quoted = (c["ask_price"] - c["bid_price"]) / c["mid_price"] * 1e4
        draw_steps(ax, minutes, quoted, BLACK, "as quoted", 0.7)
        ax.set_ylim(0, 1.05 * ax.get_ylim()[1])
        since = f"minutes since {clock_text(maker.first_ns)} UTC"
        return "Spread: its base by terms, and as quoted", "bps", since

    def plot_close_up(ax: Any) -> Told:
        prices = [c[name][is_close] for name in ("bid_price", "mid_price", "ask_price")]
        ax.set(xlim=(last - CLOSE_UP, last), ylim=(np.nanmin(prices), np.nanmax(prices)))
        return plot_prices(ax, result, x, mids, "The ten minutes that lost most", 40)

    def plot_queues(ax: Any) -> Told:
        ax.set_xlim(last - CLOSE_UP, last)
        for name, color in (("bid", BLUE), ("ask", RED)):
            queue = c[f"{name}_queue"][is_close]  # inf, where it was not shown, is a gap
            draw_steps(ax, minutes[is_close], queue, color, f"ahead of our {name}")
        return "Queue", coin, ""

    size = 30 if len(result.fills) < 300 else 15
    prices = partial(plot_prices, result=result, x=x, mids=mids, title="Price", size=size)
    rows = [(4.4, prices), (1.8, plot_inventory), (2.8, plot_result), (2.4, plot_spread)]
    close_up = [(3.6, plot_close_up), (1.8, plot_queues)]
    return rows + (close_up if loss.max() > 0 and x[-1] > CLOSE_UP else [])


def plot_markouts(ax: Any, metrics: Mapping[str, Any]) -> Told:
    """Markouts over the horizon, by side."""
    colors, dodges = (BLACK, BLUE, RED), (0, -0.05, 0.05)
    for (name, cells), color, dodge in zip(metrics["markouts"].items(), colors, dodges):
        mean, half = np.array([(e.mean, e.half_width) for e in cells.values()]).T
        if np.isfinite(mean).any():
            ax.errorbar(np.arange(len(mean)) + dodge, mean, yerr=np.nan_to_num(half), color=color,
                        capsize=3, marker="o", markersize=4, linewidth=1.2, label=name)
    fee_bps = metrics["frictions"]["maker_fee_bps"]
    ax.axhline(fee_bps, color=PINK, linestyle="--", label="maker fee, to be earned")
    ax.set_xticks(range(len(HORIZONS)), HORIZONS)
    ax.set_xlim(-0.2, len(HORIZONS) - 0.8)
    along = "after the fill; at 0 s it is the effective half spread"
    return "Markout of our fills ± 95 %; below 0: run over", "bps", along


def plot_regimes(ax: Any, regimes: dict[str, dict[str, Any]]) -> Told:
    """Gross, fees and net of the minutes of each regime."""
    at = np.arange(len(regimes))
    bars = ("gross", 1, GREEN), ("fees", -1, PINK), ("net", 1, BLACK)
    for k, (name, sign, color) in enumerate(bars):
        heights = [sign * r[f"{name}_usdt"] for r in regimes.values()]
        ax.bar(at + 0.25 * (k - 1), heights, 0.25, color=color, label=f"{'- ' * (sign < 0)}{name}")
    half = [r["minutes"] * r["net_a_minute"].half_width for r in regimes.values()]
    ax.errorbar(at + 0.25, heights, yerr=np.nan_to_num(half), fmt="none", color="grey", capsize=3)
    ax.set_xticks(at, [f"{name}\n{r['minutes']:,} min" for name, r in regimes.items()])
    return "Result by regimes (net ± 95 %)", "USDT", ""


def plot_trials(ax: Any, groups: Sequence[list[np.ndarray]], split: int) -> Told:
    """Every trial's net a minute, in sample and out."""
    labels = "grid", "around its best", "as given", "best"
    styles = (dict(s=14, color=BLUE, alpha=0.6), dict(s=14, color=GREEN, alpha=0.6),
              dict(s=50, color=BLACK, marker="D"), dict(s=170, color=RED, marker="*"))
    ax.margins(0.05)
    for group, label, style in zip(groups, labels, styles):
        if group:
            inside = [run[NET, :split].mean() for run in group]
            ax.scatter(inside, [run[NET, split:].mean() for run in group], label=label, **style)
    ax.axline((0, 0), slope=1, color="grey", linewidth=0.8, linestyle=":")
    along = "in sample, USDT; dotted: as good out of it as in it"
    return "Net a minute of every trial", "out of sample, USDT", along


def plot_walk(ax: Any, windows: list[tuple], runs: Mapping[str, np.ndarray]) -> Told:
    """Net out of sample, joined, and what each choice promised in sample."""
    net, given = (np.append(0, np.cumsum(run[NET])) for run in runs.values())
    length = (len(net) - 1) // len(windows)
    for k, (_, _, inside) in enumerate(windows):
        at, end = k * length, (k + 1) * length
        ax.plot([at, end], [net[at], net[at] + inside * length], color=PINK, linestyle="--",
                linewidth=1.2, label="" if k else "as promised in sample")  # fmt: skip
        ax.axvline(at, color="grey", linestyle=":", linewidth=0.8)
    ax.plot(given, color=SKY, linewidth=1.2, label="as given")
    ax.plot(net, color=BLACK, linewidth=1.4, label="walk-forward")
    since = f"minutes since {clock_text(windows[0][0])} UTC"
    return "Walk-forward: net out of sample", "USDT", since


# ---- Command line ------------------------------------------------------------------

GRACE_S = 0.3  # for a worker to end by itself
EACH = {  # columns of --each: metric, format
    "net": ("net_usdt", "+.2f"), "gross": ("gross_usdt", "+.2f"), "fees": ("fees_usdt", ".2f"),
    "fills": ("fills", ".0f"), "captured": ("spread_captured_usdt", "+.2f"),
    "inventory_sd": ("inventory_std", ".4f"), "drawdown": ("max_drawdown_usdt", ".2f"),
}  # fmt: skip
SEARCH = {"tune", "walk_forward"}
NEEDS = {  # flags that change nothing without one of others, and flags that exclude others
    "grid": SEARCH, "objective": SEARCH, "workers": SEARCH,
    "seed": SEARCH | {"bootstrap", "outages"},
}  # fmt: skip
EXCLUDES = {"log": SEARCH, "each": SEARCH | {"bootstrap", "regimes", "plot", "log", "out"}}


def run(options: argparse.Namespace, executor: Executor | None = None) -> None:
    """Check what was asked before the work; then play once, or search."""
    # No flag is taken and ignored.
    default, plot = build_arguments().get_default, options.plot
    given = {name for name, value in vars(options).items() if value != default(name)}
    for name in sorted(given):
        needed, excluded = NEEDS.get(name, {name}), given & EXCLUDES.get(name, set())
        if excluded or given.isdisjoint(needed):
            rule = "does not go with" if excluded else "needs"
            others = " or ".join(f"--{other}" for other in sorted(excluded or needed))
            raise UserError(f"--{name} {rule} {others}: leave it out".replace("_", "-"))
    if given & SEARCH and len(options.strategy) > 1:
        raise UserError("--tune and --walk-forward take one --strategy: leave the others out")
    if options.log and options.log.parent == options.out:
        raise UserError(f"--log {options.log} lies in --out, with its files: choose another folder")
    _ = [mm.load_strategy(name) for name in options.strategy]  # raises what is wrong with one
    # Nothing is played twice, and there is enough of it.
    options.data = [file for path in options.data for file in list_recordings(path)]
    for flag, values in (("--data", options.data), ("--strategy", options.strategy)):
        if len({*map(os.path.realpath, values)}) < len(values):
            raise UserError(f"{flag} has something twice: leave one of them out")
    if options.each:
        return run_each(options)
    setting = make_setting(options)
    minutes, need_many = len(setting.data.minutes_ns), SEARCH | {"bootstrap"}
    least = 10 * max(3, (options.walk_forward or 0) + LOOK_BACK)  # ten a part, or a window
    if minutes < least and given & need_many:
        raise UserError(f"{minutes} minutes of data are fewer than the {least} that --bootstrap, "
                        "--tune or --walk-forward need: give more --data")  # fmt: skip
    if plot and not importlib.util.find_spec("matplotlib"):
        raise UserError("matplotlib is missing: pip install -r requirements.txt")
    if plot and (plot.suffix != ".png" or not (plot.parent == options.out or plot.parent.is_dir())):
        raise UserError(f"--plot {plot} cannot be written: choose a .png in a folder")
    run_search(options, setting, executor) if given & SEARCH else run_once(options, setting)


def list_recordings(path: Path) -> list[Path]:
    """A file; of a folder its recordings, in order of their first time."""
    files = [file for file in path.glob("*") if file.name.endswith((".jsonl", ".gz"))]
    return sorted(files, key=lambda file: next(feed.read_lines(file), (0, ""))[0]) or [path]


def make_setting(options: argparse.Namespace, *files: Path) -> Setting:
    """What the flags say of parameters and frictions; of these files, or all of --data."""
    of_market = "symbol", "category", "depth", "tick_size", "lot_size"
    setting = Setting(
        stamps=tuple(map(stamp_file, files or options.data)),
        steps=tuple((name, getattr(options, name)) for name in of_market),
        given=mm.given_parameters(options),
        strategy=options.strategy[0],
        exchange={name: getattr(options, name) for name in FRICTIONLESS},
    )
    _ = setting.parameters  # raises what is wrong with them
    outages = draw_outages(options.outages, setting.data.tapes, default_rng(options.seed))
    return replace(setting, outages=outages)


def run_each(options: argparse.Namespace) -> None:
    """Every file alone, with mean and standard error, by strategy; first minus second."""
    stop, measured = feed.StopSignal(), {name: [] for name in options.strategy}
    for path in options.data:
        setting = make_setting(options, path)
        for name in options.strategy:
            metrics = measure(play(replace(setting, strategy=name), stop=stop))
            measured[name].append([metrics[metric] for metric, _ in EACH.values()])
        if stop.is_set:
            return print("stopped: nothing is said of a part of the files", file=sys.stderr)
    tables = {name: np.array(rows, float) for name, rows in measured.items()}
    for name, other in zip(options.strategy, options.strategy[1:2]):
        tables[f"{name} - {other}"] = tables[name] - tables[other]
    for name, values in tables.items():
        rows = [[f"{name}, USDT", *EACH]]
        lines = [*zip([path.name for path in options.data], values), ("mean", values.mean(axis=0))]
        if len(values) > 1:
            lines.append(("standard error", values.std(axis=0, ddof=1) / math.sqrt(len(values))))
        for label, numbers in lines:
            rows.append([label, *(format(x, form) for x, (_, form) in zip(numbers, EACH.values()))])
        print("\n".join(align(rows)) + "\n")


def run_once(options: argparse.Namespace, setting: Setting) -> None:
    """One run: its table, its files, its picture; further strategies are set beside it."""
    stop = feed.StopSignal()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    log = feed.GrowingFile(options.log) if options.log else None
    with contextlib.closing(log) if log else contextlib.nullcontext():
        results = [play(setting, log=log, stop=stop)]
    for name in options.strategy[1:]:
        if not stop.is_set:
            results.append(play(replace(setting, strategy=name), stop=stop))
    measured, result = [measure(result) for result in results], results[0]
    texts, rows = ["\n\n".join(map(format_table, measured, results))], []
    metrics = measured[0] | {"seed": options.seed}
    # What is said of whole minutes, if no run was cut short.
    if options.bootstrap and not stop.is_set:
        runs = {result.setting.strategy: cut_into_minutes(result) for result in results}
        metrics["bootstrap"] = b = resample(runs, options.bootstrap, default_rng(options.seed))
        texts.append("\n" + format_bootstrap(b, "Bootstrap"))
    if options.regimes and not stop.is_set:
        metrics["regimes"] = regimes = summarize_regimes(result)
        rows.append((HEIGHT, partial(plot_regimes, regimes=regimes)))
        texts.append("\n" + format_regimes(regimes, "of all minutes"))
    files = list_results(result, metrics, options.out) if options.out else {}
    if options.plot:
        title = f"{result.title}\nseed {options.seed}, version {setting.version}"
        shades = (np.array(setting.outages).reshape(-1, 2) - result.maker.first_ns) / MINUTE_NS
        markouts = [(HEIGHT, partial(plot_markouts, metrics=metrics))] * bool(result.fills)
        panels = plot_run(result) + markouts + rows
        files[options.plot] = draw_figure(panels, title, shared=4, shades=shades)
    finish(files, texts, stop.is_set, [log.failure] if log and log.failure else [])


def finish(files: Mapping[Path, bytes], texts: list[str], is_stopped: bool,
           failed: Sequence[str] = ()) -> None:  # fmt: skip
    """Write files, then print texts. What failed is told after all the rest (UserError). A stopped
    run's files have names of their own, and replace no others.
    """
    failed = [*failed]
    for path, content in files.items():
        path = path.with_name(f"stopped-{path.name}") if is_stopped else path
        try:
            feed.write_whole(path, partial(Path.write_bytes, data=content))
            texts += [f"plot: {path}"] * (path.suffix == ".png")
        except (UserError, OSError) as error:
            failed.append(f"{path}: {error.strerror}" if isinstance(error, OSError) else f"{error}")
    print("\n".join(texts))
    if failed:
        raise UserError("; ".join(failed))


def list_results(result: Result, metrics: dict[str, Any], folder: Path) -> dict[Path, bytes]:
    """metrics.json, and as CSV the orders wanted (when something was sent), fills, equity."""
    c, digits, quotes = result.columns, result.maker.instrument.digits, []
    for k in np.flatnonzero(c["is_sent"]):
        orders = [(c[f"{side}_price"][k], c[f"{side}_qty"][k]) for side in ("bid", "ask")]
        cells = [[f"{p:.{digits}f}", qty] if p == p else ["", ""] for p, qty in orders]
        quotes.append([c["time_ns"][k], *cells[0], *cells[1]])
    fills = [[f.time_ns, f.recv_ns, "buy" if f.side == BID else "sell", *f[3:8], f.rule]
             for f in result.fills]  # fmt: skip
    equity = zip(c["time_ns"], c["mid_price"], c["inventory"], c["equity"] + c["fees_paid"],
                 c["fees_paid"], c["equity"])  # fmt: skip
    files = {folder / "metrics.json": to_json(metrics)}
    for name, header, rows in (
        ("quotes.csv", "time_ns,bid_price,bid_qty,ask_price,ask_qty", quotes),
        ("fills.csv", "time_ns,recv_ns,side,price,qty,fee,mid_price,queue_ahead,rule", fills),
        ("equity.csv", "time_ns,mid_price,inventory,gross,fees,net", equity),
    ):
        texts = ([mm.plain(x) if isinstance(x, float) else str(x) for x in row] for row in rows)
        files[folder / name] = "\n".join([header, *map(",".join, texts), ""]).encode()
    return files


def to_json(values: Any) -> bytes:
    """Values as JSON, which knows no nan and no inf: null, as arrays are, which are drawn."""
    text = json.dumps(values, default=lambda value: value.item() if isinstance(value, np.generic)
                      else getattr(value, "__dict__", None))  # fmt: skip
    return json.dumps(json.loads(text, parse_constant=lambda _: None), indent=1).encode() + b"\n"


def run_search(options: argparse.Namespace, setting: Setting, executor: Executor | None) -> None:
    """--tune, --walk-forward: search, report, write. Without an executor, by our own processes."""
    grid, objective = parse_grid(options.grid or DEFAULT_GRID, setting), options.objective
    folder = options.out or Path("tuning")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"trials-{setting.version}.jsonl"  # trials of different kinds never mix
    # Try what is given and what is on the grid; then, to tune, a finer grid around its best.
    points = opt.expand_grid(grid)
    ours = start_workers(min(options.workers, len(points)))
    with contextlib.nullcontext(executor) if executor else ours as pool:
        stop = feed.StopSignal()
        play_all = partial(try_all, setting=setting, path=path, executor=pool, stop=stop)
        trials, finer, given = play_all([{}, *points]), [], None
        if trials and not trials[0][0]:  # after a stop it may be missing
            _, given = trials.pop(0)
        if options.tune and not stop.is_set:
            finer = play_all(refine_grid(trials, grid, setting, objective))
    # Judge what was found, also after a stop; of a walk only a whole one says something.
    title = setting.data.title.replace("backtest of", "search over")
    count, texts, files, rows = options.bootstrap or 1000, [title], {}, []
    if options.tune and trials and given is not None:
        r = judge_search(trials, finer, given, objective, count, default_rng(options.seed))
        texts.append(format_report(r, asdict(setting.parameters)))
        if not stop.is_set:  # a part of a search replaces no whole one
            files[folder / "search.json"] = to_json(r)
        if not stop.is_set and r["is_better"]:
            files[folder / "best.json"] = to_json(setting.given | r["best"])
        runs = [run for _, run in trials], [run for _, run in finer], [given], [r["run"]]
        rows.append((4.4, partial(plot_trials, groups=runs, split=r["split"])))
    if options.walk_forward and not stop.is_set:
        windows, span, walk = walk_forward(setting, trials, options.walk_forward, objective, stop)
    if options.regimes and not stop.is_set:
        whole = play(setting.change(r["best"]), stop=stop) if options.tune else walk
    if options.walk_forward and not stop.is_set:  # subtle: either may have been stopped
        end_ns = setting.data.minutes_ns[span].item(-1) + MINUTE_NS
        runs = {"walk-forward": cut_into_minutes(walk)[:, span], "as given": given[:, span]}
        texts.append("\n" + format_walk(windows, end_ns, runs["walk-forward"], walk))
        joined = resample(runs, count, default_rng(options.seed))
        texts.append(format_bootstrap(joined, "Out of sample, windows joined"))
        rows.append((HEIGHT, partial(plot_walk, windows=windows, runs=runs)))
    if options.regimes and not stop.is_set:
        regimes = summarize_regimes(whole)
        whose = "of the best" if options.tune else "of the walk-forward"
        texts.append("\n" + format_regimes(regimes, whose + ", all minutes"))
        rows.append((HEIGHT, partial(plot_regimes, regimes=regimes)))
    if stop.is_set:
        title += "   STOPPED EARLY"
        texts.append("stopped: the same command goes on from the trials that are kept")
    texts.append(f"written to {folder}, trials to {path.name}")
    if rows and options.plot:
        title += f"\n{setting.words}, by {objective}, {' '.join(options.grid or DEFAULT_GRID)}"
        title += f"\nseed {options.seed}, version {setting.version}"
        files[options.plot] = draw_figure(rows, title)
    finish(files, texts, stop.is_set)


@contextlib.contextmanager
def start_workers(count: int) -> Iterator[Executor]:
    """Processes of our own. What they still play when we leave is ended."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), begin_work)
    # Each begins with Ctrl-C blocked, as we have it now: to answer it is for us alone.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    for _ in range(count):
        pool.submit(int)  # nothing to do: it starts now
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in set(multiprocessing.active_children()) - others:
            worker.join(GRACE_S)
            worker.kill()


def begin_work() -> None:
    """A worker begins: without its parent it ends."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def number(low: float, high: float, text: str) -> float:
    """The number that a flag's text says: from low to high, whole if low is."""
    with contextlib.suppress(ValueError):
        return feed.must_be(type(low), type(low)(text), low, high)
    raise argparse.ArgumentTypeError(f"{text!r} must be a number from {low:g} to {high:g}")


def build_arguments() -> argparse.ArgumentParser:
    """The command line of `python backtest.py`."""
    what = "The paper market maker over recorded history."
    parser = feed.Arguments(prog="backtest.py", description=what)
    add, within = parser.add_argument, partial(partial, number)
    add("--data", type=Path, nargs="+", default=[mm.SAMPLE], metavar="FILE|DIR",
        help="recordings, in order of time (default: the bundled synthetic sample)")  # fmt: skip
    add("--plot", type=Path, nargs="?", const=Path("backtest.png"), metavar="FILE.png",
        help="draw what came out (without a name: backtest.png)")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="metrics.json, and as CSV quotes, fills, equity")
    add("--log", type=Path, metavar="FILE", help="every decision as CSV")
    add("--tune", action="store_true", help="search for better parameters, into --out or tuning")
    add("--grid", action="append", metavar="NAME=A,B,…",
        help=f"values to try of a parameter (default {' '.join(DEFAULT_GRID)})")  # fmt: skip
    add("--objective", choices=SCORES, default="net", help="what a search makes large")
    add("--walk-forward", type=within(1, 1000), nargs="?", const=4, metavar="N",
        help="tune on two windows, trade the next, roll on, N times (default 4)")  # fmt: skip
    add("--workers", type=within(1, 1000), default=os.cpu_count(), help="processes of a search")
    add("--bootstrap", type=within(100, 1e6), metavar="N", help="intervals from N resamples")
    add("--each", action="store_true", help="play each file of --data on its own, line by line")
    add("--regimes", action="store_true", help="result by volatility and trend of the minutes")
    add("--strategy", nargs="+", default=["lp"], metavar="NAME|FILE.py", help=mm.STRATEGY_HELP)
    add("--participation", type=within(0.01, 1), default=1.0, help="our share behind the queue")
    add("--impact-bps", type=within(0.0, 1e4), default=0.0, metavar="X",
        help="how much worse an order as large as the depth near the mid fills (default 0)")
    add("--outages", type=within(0, 1e6), default=0, help="spells of 5 to 60 s, unheard")
    add("--seed", type=within(0, 1e18), default=0, help="of outages and resamples (default 0)")
    add("--peer-rules", action="store_true", help="fill rules of hftbacktest, to compare")
    feed.add_market_flags(parser)
    mm.add_parameter_flags(parser)
    return parser


def main(arguments: list[str] | None = None, executor: Executor | None = None) -> int:
    """python backtest.py; the exit status. A search takes any executor's workers."""
    return feed.exit_cleanly(lambda: run(build_arguments().parse_args(arguments), executor))


if __name__ == "__main__":
    sys.exit(main())
