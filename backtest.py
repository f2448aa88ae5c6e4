"""Would it have paid? The market maker of marketmaker.py over history.

The same code decides, fills and accounts, live and here; this module adds where the
messages come from (history), what makes trading harder (frictions), what it is compared
with (baselines), and what came out (metrics, plots). It makes no decision of its own.

History is read once, message by message as live, and kept as columns in a cache folder
(.npy files, mapped into memory and shared by processes): the tape. Between two decisions
a tape is applied in slices, so that a day of 20 million book rows takes seconds.

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
  - Archives carry no receive time: it is the exchange's plus feed_latency_ms, always the
    same. Real latency has tails: optimistic.
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
import gc
import glob
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import string
import sys
import tempfile
import textwrap
import threading
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from scipy.special import stdtrit

import feed
from feed import (
    ASK,
    BID,
    MS,
    NO_LEVEL,
    NS,
    SIDES,
    SNAPSHOT,
    Instrument,
    Message,
    OrderBook,
    Rows,
    Tape,
    Trades,
    UserError,
    build_tape,
)
from marketmaker import (
    IMPACT_HALF_LIFE_S,
    SAMPLE,
    Fill,
    MarketMaker,
    PaperExchange,
    ParameterFile,
    State,
    add_parameter_flags,
    choose_parameters,
    clock_text,
    given_parameters,
)
from optimize import (
    FIELDS,
    Distances,
    Parameters,
    best_sharpe_by_luck,
    bootstrap,
    choose_distances,
    common_block_length,
    deflated_sharpe,
    draw_best_of_chance,
    draw_overfitting_by_chance,
    expand_grid,
    interval_of,
    measure_paths,
    net_score,
    overfitting_probability,
    refine,
    run_trials,
    shape_of,
    sharpe_error,
    sharpe_score,
)

CACHE = Path(__file__).parent / "data" / "cache"  # of parsed history; may be deleted
CACHE_VERSION = 2  # of the columns below; another one is parsed anew
BLOCK = 20_000  # messages parsed before they are written
MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86_400

# ---- History: messages become columns on disk --------------------------------------

SIDE_NAMES = {BID: "bid", ASK: "ask"}
TRADE_NAMES = [f"trade_{name}" for name in Trades._fields]


def flatten(tape: Tape) -> dict[str, np.ndarray]:
    """A tape's columns by name."""
    columns = {name: getattr(tape, name) for name in ("kind", "recv_ns", "exch_ns", "last_book")}
    columns |= {"turnover": tape.turnover, "quotes": tape.quotes}
    columns |= zip(TRADE_NAMES, tape.trades)
    for side, name in SIDE_NAMES.items():
        columns |= zip((f"{name}_level", f"{name}_size", f"{name}_end"), tape.rows[side])
        columns |= {f"{name}_best": tape.best[side], f"{name}_reach": tape.reach[side]}
    return columns


def unflatten(columns: dict[str, np.ndarray], notes: dict, bounds: dict[int, np.ndarray]) -> Tape:
    """The other way round."""
    trades = Trades(*(columns.pop(name) for name in TRADE_NAMES))
    rows, best, reach = {}, {}, {}
    for side, name in SIDE_NAMES.items():
        rows[side] = Rows(*(columns.pop(f"{name}_{column}") for column in Rows._fields))
        best[side], reach[side] = columns.pop(f"{name}_best"), columns.pop(f"{name}_reach")
    sides = dict(rows=rows, best=best, reach=reach, bounds=bounds)
    return Tape(**columns, **sides, trades=trades, notes=notes)


def find_best(tape: Tape, book: OrderBook) -> dict[int, np.ndarray]:
    """The best level of each side after each message; the book is left as after the last.

    A better level is the new best at once. Only where the best may have been deleted, and
    at snapshots, the ladder is brought up to date and asked.
    """
    best: dict[int, np.ndarray] = {}
    is_snapshot = tape.kind == SNAPSHOT
    for side, ladder in book.ladders.items():
        level, size, end = tape.rows[side]
        messages = ((np.diff(end) > 0) | is_snapshot).nonzero()[0]
        starts, closed = end[messages], np.append(level, NO_LEVEL)
        is_held = np.append(size > 0, False)
        added = np.maximum.reduceat(np.where(is_held, closed, NO_LEVEL), starts)
        gone = np.maximum.reduceat(np.where(is_held, NO_LEVEL, closed), starts)
        found, done, now = [_best(ladder)], 0, _best(ladder)
        for m, new, old in zip(messages.tolist(), added.tolist(), gone.tolist()):
            if is_snapshot[m]:
                ladder.clear()
                done, now = end[m], NO_LEVEL
            if is_snapshot[m] or old >= max(new, now):
                if done < end[m + 1]:
                    ladder.set(level[done : end[m + 1]], size[done : end[m + 1]])
                done, now = end[m + 1], _best(ladder)
            else:
                now = max(new, now)
            found.append(now)
        if done < len(level):
            ladder.set(level[done:], size[done:])
        best[side] = np.array(found)[np.searchsorted(messages, np.arange(len(tape)), "right")]
    return best


def _best(ladder: feed.Ladder) -> int:
    return NO_LEVEL if ladder.best is None else ladder.best


class Column:
    """A .npy file that grows: blocks are appended, the length is written at the end."""

    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = open(path, "wb")
        self.length = 0

    def append(self, block: np.ndarray) -> None:
        """Write the rows of a block."""
        if not self.file.tell():  # the first block, even if it has no row
            self.header(block)
        self.file.write(np.ascontiguousarray(block).tobytes())
        self.length += len(block)
        self.last = block

    def header(self, block: np.ndarray) -> None:
        """numpy leaves room in it for a larger length."""
        shape = (self.length, *block.shape[1:])
        described = dict(descr=block.dtype.str, fortran_order=False, shape=shape)
        np.lib.format.write_array_header_1_0(self.file, described)

    def close(self) -> None:
        self.file.seek(0)
        self.header(self.last)
        self.file.close()


def write_tape(messages: Iterator[Message], folder: Path) -> dict[str, Any]:
    """Parse messages block by block into columns in a folder; what is not a column is
    returned: notes by message, and the bounds of the levels by side.
    """
    book, files, notes = OrderBook(), {}, {}
    ends = Counter[str]()  # rows so far
    bounds = {name: [-NO_LEVEL, NO_LEVEL] for name in SIDE_NAMES.values()}
    count, last_book = 0, -1
    while block := list(islice(messages, BLOCK)):
        tape = build_tape(block)
        columns = flatten(dataclasses.replace(tape, best=find_best(tape, book)))
        for name, column in columns.items():
            if name.endswith("_end"):
                columns[name] = column[count > 0 :] + ends[name]
                ends[name] += int(column[-1])
            elif name.endswith("_level") and len(column):
                low, high = bounds[name[:3]]
                bounds[name[:3]] = [min(low, int(column.min())), max(high, int(column.max()))]
        books = columns["last_book"]
        columns["last_book"] = np.where(books < 0, last_book, books + count)
        columns["quotes"][:, 0] += count
        notes |= {m + count: fields for m, fields in tape.notes.items()}
        for name, column in columns.items():
            if name not in files:
                files[name] = Column(folder / f"{name}.npy")
            files[name].append(column)
        count, last_book = count + len(block), int(columns["last_book"][-1])
    for file in files.values():
        file.close()
    return dict(messages=count, notes=notes, bounds=bounds)


def read_tape(folder: Path, facts: dict[str, Any], latency_ns: int = 0) -> Tape:
    """A tape mapped from its folder; latency_ns is added to the times of receipt."""
    columns = {path.stem: read_column(path) for path in folder.glob("*.npy")}
    if latency_ns:
        columns["recv_ns"] = columns["recv_ns"] + latency_ns
    notes = {int(m): fields for m, fields in facts["notes"].items()}
    bounds = {side: np.array(facts["bounds"][name]) for side, name in SIDE_NAMES.items()}
    return unflatten(columns, notes, bounds)


def read_column(path: Path) -> np.ndarray:
    """One column, mapped: pages are read when needed and shared by processes."""
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.hasobject:
            raise ValueError(f"{path} is no column of ours")
        if not math.prod(shape):
            return np.zeros(shape, dtype)
        return np.asarray(np.memmap(file, dtype, "r", file.tell(), shape))


def cache_folder() -> Path:
    """Where columns are kept: beside the sample, or where the system keeps such things."""
    for folder in (CACHE, Path(tempfile.gettempdir()) / "marketmaker-cache"):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
    raise UserError(f"neither {CACHE} nor the temporary folder can be written: mend one")


def cached(
    paths: list[Path], parser: feed.Parser, read: Callable[..., Iterator[Message]]
) -> tuple[Path, dict]:
    """The folder with the columns of these files, made unless it is there, and its facts.

    Valid while size and modification time of every file, the version of this cache, and
    how the files are read, are what they were. If not, read() gives the messages;
    their parser counts what it sees.
    """
    how = dict(tick=parser.instrument.tick_text, topics=list(parser.handlers))
    stats = [(str(path.resolve()), path.stat()) for path in paths]
    sources = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    made_of = dict(version=CACHE_VERSION, sources=sources, how=how)
    texts = (json.dumps(what) for what in ([[name for name, _ in stats], how], made_of))
    which, state = (hashlib.sha256(text.encode()).hexdigest()[:12] for text in texts)
    name = f"{paths[0].name.split('.')[0]}-{which}"  # of all states of these files
    folder = cache_folder() / f"{name}-{state}"
    if facts := read_facts(folder, made_of):
        return folder, facts
    draft = Path(tempfile.mkdtemp(prefix=folder.name, suffix=".part", dir=folder.parent))
    try:
        print(f"reading {paths[0].name}, once; then from {folder.parent}", file=sys.stderr)
        facts = write_tape(read(), draft) | dict(made_of=made_of, counts=parser.counts)
        if not facts["messages"]:
            raise UserError(f"{paths[0]} holds no message: choose another file")
        facts["sizes"] = column_sizes(draft)
        (draft / "facts.json").write_text(json.dumps(facts))
        try:
            draft.rename(folder)
        except OSError:
            if not read_facts(folder, made_of):  # else another process was faster
                shutil.rmtree(folder, ignore_errors=True)  # damaged
                draft.rename(folder)
        for old in folder.parent.glob(f"{glob.escape(name)}-*"):
            if old != folder and old.suffix != ".part":
                shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"the cache {folder} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder, facts


def read_facts(folder: Path, made_of: dict) -> dict | None:
    """The facts of a folder that is whole and made of the same; else None."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        facts = json.loads((folder / "facts.json").read_text())
        if facts["made_of"] == made_of and facts["sizes"] == column_sizes(folder):
            return facts
    return None


def column_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every column."""
    return {path.name: path.stat().st_size for path in folder.glob("*.npy")}


class Piece(NamedTuple):
    """Messages start..stop-1 of a tape, and the grid of their prices."""

    tape: Tape
    start: int
    stop: int
    tick_text: str


@dataclass
class History:
    """What is replayed, piece by piece. pieces takes the feed's latency in ns, which an
    archive does not know and a recording ignores.
    """

    instrument: Instrument
    pieces: Callable[[int], Iterator[Piece]]
    span_ns: tuple[int, int]  # of receive time, roughly for archives
    name: str
    start: dict[str, Any] = field(default_factory=dict)  # the start line of a recording
    counts: Counter = field(default_factory=Counter)  # of messages and of defects, once read

    @property
    def is_synthetic(self) -> bool:
        return bool(self.start.get("synthetic"))

    @property
    def title(self) -> str:
        return f"{self.instrument.symbol} {self.instrument.category}   backtest of {self.name}"


def load_history(
    paths: list[Path], tick_text: str | None, lot_text: str | None, depth: int | None
) -> History:
    """A recording in parts, or archives of days. UserError for what is neither."""
    for path in paths:
        if not path.exists():
            raise UserError(f"--data {path} does not exist: check the path")
    if any(path.is_dir() or path.suffix == ".zip" for path in paths):
        return load_archives(paths, tick_text, lot_text)
    return load_recording(paths, tick_text, lot_text, depth)


def replay_parts(paths: list[Path], parser: feed.Parser) -> Iterator[Message]:
    """The messages of a recording in parts; UserError unless these are in order of time."""
    last_ns = 0
    for path in paths:
        for message in feed.replay(path, parser):
            if message.recv_ns < last_ns:
                raise UserError(f"{path} begins before the part before it ends: order by time")
            last_ns = message.recv_ns
            yield message


def load_recording(
    paths: list[Path], tick_text: str | None, lot_text: str | None, depth: int | None
) -> History:
    """A recording in one or several parts, given in the order of time."""
    parser, header = feed.parser_of_recording(paths[0], tick_text, lot_text, depth)
    instrument = parser.instrument
    folder, facts = cached(paths, parser, partial(replay_parts, paths, parser))
    tape = read_tape(folder, facts)
    piece = Piece(tape, 0, len(tape), instrument.tick_text)
    span_ns = int(tape.recv_ns[0]), int(tape.recv_ns[-1])
    counts = Counter(facts["counts"])
    name = paths[0].name + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    return History(instrument, lambda _: iter([piece]), span_ns, name, header.start, counts)


def load_archives(paths: list[Path], tick_text: str | None, lot_text: str | None) -> History:
    """Bybit's archives of one or several days; each is read when it is its turn."""
    days, counts = feed.pair_archives(paths), Counter[str]()
    instrument = feed.parser_of_archive(days[0], tick_text, lot_text).instrument

    def pieces(latency_ns: int) -> Iterator[Piece]:
        counts.clear()
        before: Piece | None = None
        for day in days:
            now = read_day(day, tick_text, lot_text, latency_ns, counts)
            if before:
                *whole, now = join_days(before, now)
                yield from chain.from_iterable(map(split_grids, whole))
            before = now
        yield from split_grids(before)

    span_ns = days[0].noon_ns - DAY_S * NS // 2, days[-1].noon_ns + DAY_S * NS // 2
    name = f"{len(days)} days from {days[0].day}" if len(days) > 1 else days[0].day
    return History(instrument, pieces, span_ns, name, counts=counts)


def read_day(
    day: feed.ArchiveDay, tick_text: str | None, lot_text: str | None, latency_ns: int,
    counts: Counter,
) -> Piece:  # fmt: skip
    """One day's archives, by way of the cache; counts what was found in them."""
    parser = feed.parser_of_archive(day, tick_text, lot_text)
    grid = parser.instrument.tick_text  # at the day's beginning
    read = partial(feed.replay_archive, day, parser)
    folder, facts = cached([day.book, day.trades], parser, read)
    counts.update(facts["counts"])
    tape = read_tape(folder, facts, latency_ns)
    return Piece(tape, 0, len(tape), grid)


def join_days(before: Piece, now: Piece) -> list[Piece]:
    """Two days in succession: the earlier one, what both tell of, the later one.

    A day's book begins about a second after midnight and goes on as far after the next;
    its trades change at midnight. So the first trades of a day go with the last of the
    book of the day before, and of that what the new book tells again is dropped.
    """
    book = int((now.tape.last_book < 0).sum())  # the first book message
    begin_ns, book_ns = (int(now.tape.recv_ns[m]) for m in (0, min(book, now.stop - 1)))
    end, cut = before.tape.recv_ns.searchsorted([begin_ns, book_ns]).tolist()
    pieces = [before._replace(stop=max(end, before.start))]
    if before.tick_text == now.tick_text and not grids_of(before._replace(stop=cut)):
        both = [*feed.list_messages(now.tape, 0, book)]
        both += feed.list_messages(before.tape, max(end, before.start), cut)
        if both:  # a stable sort: at equal times the trades come first
            joint = build_tape(sorted(both, key=lambda message: message.recv_ns))
            pieces.append(Piece(joint, 0, len(joint), now.tick_text))
    return [*pieces, now._replace(start=book)]


def grids_of(piece: Piece) -> dict[int, str]:
    """The messages from which on a piece is on another grid, and that grid's tick."""
    notes, own = piece.tape.notes.items(), range(piece.start, piece.stop)
    return {m: note["tick_size"] for m, note in notes if note.get("event") == "tick" and m in own}


def split_grids(piece: Piece) -> Iterator[Piece]:
    """A piece, cut where the tick size changes."""
    for m, tick_text in sorted(grids_of(piece).items()):
        if m > piece.start:
            yield piece._replace(stop=m)
        piece = piece._replace(start=m, tick_text=tick_text)
    if piece.start < piece.stop:
        yield piece


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


# ---- The loop ----------------------------------------------------------------------

DECISION = (
    "t_s", "mid", "bid", "ask", "inventory", "gross", "fees",
    "volatility_bps", "liquidity_bps", "depth_bps", "base_bps",
)  # fmt: skip
HORIZONS_S = (0.1, 1, 10, 60)
OUTAGE_S = (5.0, 60.0)  # shortest and longest
STEP = 20_000  # messages played at a time: then markouts, and a look whether to stop
KEPT_NS = 120 * NS  # mids kept for fills that we hear of late, after an outage say
Windows = Sequence[tuple[int, int]]  # of outages, ns of receive time
Schedule = Sequence[tuple[int, Mapping[str, Any]]]  # ns of receive time, parameters from then


@dataclass
class Result:
    """What a run leaves behind; see DECISION for the columns of `decisions`."""

    decisions: np.ndarray  # (decisions, columns), nan = none
    fills: list[Fill]
    markouts: np.ndarray  # (fills, horizons), bps; nan = the data end before
    state: State
    counts: Counter  # decisions by source and reason
    order_counts: Counter
    parameters: Parameters
    coin: str
    title: str
    is_synthetic: bool
    first_ns: int
    last_ns: int
    events: int
    outages: list[dict[str, float]]
    options: dict[str, Any]  # frictions in force


class Notebook:
    """Writes down what the market maker decides, for metrics, plots and quotes.csv."""

    def __init__(self, maker: MarketMaker, quotes: feed.GrowingFile | None = None) -> None:
        self.rows, self.quotes = array("d"), quotes
        maker.on_decision = self.note
        if quotes:
            quotes.write("time_ns,bid_price,bid_qty,ask_price,ask_qty\n")

    def note(self, maker: MarketMaker) -> None:
        """One decision."""
        s, q, d = maker.state, maker.quote, maker.distances
        terms = d.base_spread if d else None
        bid = math.nan if q.bid_price is None else q.bid_price
        ask = math.nan if q.ask_price is None else q.ask_price
        seconds = (s.time_ns - maker.first_ns) / NS
        spread = (*terms[:3], terms.total_bps) if terms else (math.nan,) * 4
        account = (s.inventory, s.gross, s.fees_paid)
        self.rows.extend((seconds, s.mid_price, bid, ask, *account, *spread))
        if self.quotes and maker.has_sent:
            self.quotes.write(quote_row(maker))

    def note_end(self, maker: MarketMaker) -> None:
        """A last row: what came after the last decision."""
        if self.rows:
            s, last = maker.state, self.rows[-len(DECISION) :]
            seconds = (maker.last_ns - maker.first_ns) / NS
            account = (s.mid_price, *last[2:4], s.inventory, s.gross, s.fees_paid)
            self.rows.extend((seconds, *account, *last[7:]))


def quote_row(maker: MarketMaker) -> str:
    """The two orders wanted, as a line of quotes.csv; empty = none."""
    q, digits = maker.quote, maker.instrument.digits
    sides = ((q.bid_price, q.bid_qty), (q.ask_price, q.ask_qty))
    cells = ["," if p is None else f"{p:.{digits}f},{qty:.9g}" for p, qty in sides]
    return f"{maker.state.time_ns},{','.join(cells)}\n"


def draw_outages(
    count: int, span_ns: tuple[int, int], rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Windows of receive time, none overlapping, in order."""
    first_ns, last_ns = span_ns
    windows: list[tuple[int, int]] = []
    for start in sorted(rng.uniform(first_ns, last_ns, count).tolist()):
        begin = max(int(start), windows[-1][1] + NS if windows else first_ns)
        end = begin + int(rng.uniform(*OUTAGE_S) * NS)
        if end < last_ns:
            windows.append((begin, end))
    return windows


class Player:
    """Plays tapes; at given times something else happens: an outage begins or ends, or
    parameters change. Keeps what each outage cost.
    """

    def __init__(self, maker: MarketMaker, windows: Windows, schedule: Schedule) -> None:
        self.maker, self.costs = maker, []
        waiting = [(at_ns, partial(self.change, at_ns, changes)) for at_ns, changes in schedule]
        for window in windows:
            waiting += zip(window, (partial(self.cut_off, *window), self.reconnect))
        self.waiting = sorted(waiting, key=lambda one: one[0])

    def follow(self, tape: Tape, start: int, stop: int) -> None:
        """Messages start..stop-1 of a tape, with what happens between them."""
        while self.waiting:
            then = int(tape.recv_ns[:stop].searchsorted(self.waiting[0][0]))
            if then > start:
                self.maker.follow(tape, start, then)
                start = then
            if then >= stop:
                return
            self.waiting.pop(0)[1]()
        if start < stop:
            self.maker.follow(tape, start, stop)

    def cut_off(self, begin_ns: int, end_ns: int) -> None:
        """From here on we hear nothing."""
        self.maker.cut_off(begin_ns, end_ns)
        state = self.maker.state
        cost = dict(net_usdt=-state.equity, fills=-state.fills)
        self.costs.append(dict(start_ns=begin_ns, end_ns=end_ns) | cost)

    def reconnect(self) -> None:
        """We hear again."""
        self.maker.reconnect()
        self.costs[-1]["net_usdt"] += self.maker.state.equity
        self.costs[-1]["fills"] += self.maker.state.fills

    def change(self, at_ns: int, changes: Mapping[str, Any]) -> None:
        """New parameters, which nothing that a recording says later takes back."""
        self.maker.overrides |= changes
        note = {"event": "params", "parameters": {}}
        self.maker.follow(build_tape([Message(feed.CONTROL, at_ns, fields=note)]))


class Markouts:
    """Where the mid went after each fill, worked out while the history is played."""

    def __init__(self) -> None:
        self.done: list[np.ndarray] = []  # (fills, horizons) of fills that are complete
        self.count = 0  # how many fills these are
        self.rest = np.zeros((0, len(HORIZONS_S)))  # of the fills after them, as far as known
        self.last = (np.zeros(0, np.int64), np.zeros(0))  # book times of late, and the mids

    def see(self, exchange: PaperExchange, piece: Piece, tick_size: float) -> None:
        """Complete what a piece tells of, now that it has been played."""
        tape, start, stop, _ = piece
        books = (tape.last_book[start:stop] == np.arange(start, stop)).nonzero()[0] + start
        if tape.best is None:  # the second between two days: its mids are not known
            at = tape.exch_ns[books[:1]]
            self.last = np.append(self.last[0], at), np.append(self.last[1], at * np.nan)
            return
        bid, ask = (tape.best[side][books] for side in SIDES)
        has_mid = (bid > NO_LEVEL) & (ask > NO_LEVEL) & (bid < -ask)
        times = np.concatenate((self.last[0], tape.exch_ns[books]))
        mids = np.where(has_mid, (bid - ask) * (tick_size / 2), np.nan)
        mids *= seen_share(exchange.shifts, tape.exch_ns[books])
        mids = np.concatenate((self.last[1], mids))
        kept = np.searchsorted(times, (times[-1] if len(times) else 0) - KEPT_NS)
        self.last = times[kept:], mids[kept:]
        open_fills = exchange.fills[self.count :]
        known, self.rest = self.rest, np.full((len(open_fills), len(HORIZONS_S)), np.nan)
        self.rest[: len(known)] = known
        if open_fills:
            at = [np.array(c) for c in zip(*((f[0], f.side, f.price) for f in open_fills))]
            found = measure_markouts(*at, times, mids)
            self.rest = np.where(np.isnan(self.rest), found, self.rest)
            is_over = at[0] + int(HORIZONS_S[-1] * NS) <= self.last[0][-1]
            over = int(np.append(is_over, False).argmin())  # the first that is still open
            self.done.append(self.rest[:over])
            self.count, self.rest = self.count + over, self.rest[over:]

    def all(self) -> np.ndarray:
        """(fills, horizons), bps; nan = the data end before."""
        return np.concatenate([*self.done, self.rest])


def seen_share(shifts: list[tuple[int, float]], at_ns: np.ndarray) -> np.ndarray:
    """The mid that we see as a share of the market's, where our own impact is modelled."""
    if len(shifts) == 1:
        return np.ones(len(at_ns))
    since_ns, shift = (np.array(column) for column in zip(*shifts))
    row = np.searchsorted(since_ns, at_ns, "right") - 1
    age = (at_ns - since_ns[row]) / (IMPACT_HALF_LIFE_S * NS)
    return 1 + shift[row] * 2.0**-age * 1e-4


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """The loop makes millions of tuples and no cycles: looking for these only costs time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def run_backtest(
    history: History,
    parameters: Parameters,
    strategy: Callable[..., Distances] = choose_distances,
    outages: Windows | None = None,
    overrides: dict[str, Any] | None = None,
    log: Any = None,
    quotes: Any = None,
    stop: threading.Event | None = None,
    schedule: Schedule = (),
    **exchange: Any,
) -> Result:
    """Play a history through the market maker, up to where stop is set.

    schedule: parameters that change at times of receipt. log and quotes take lines;
    exchange: frictions of the PaperExchange.
    """
    maker = MarketMaker(
        parameters, history.instrument, log, overrides, strategy=strategy, **exchange
    )
    notebook, markouts = Notebook(maker, quotes), Markouts()
    player = Player(maker, outages or (), schedule)
    is_stopped = stop.is_set if stop else lambda: False
    with paused_collector():
        late_ms = parameters.feed_latency_ms + parameters.clock_offset_ms  # by our clock
        for piece in history.pieces(round(late_ms * MS)):
            tape, start, end, tick_text = piece
            if tick_text != maker.instrument.tick_text:
                maker.change_tick(tick_text, int(tape.recv_ns[start]))
            for at in range(start, end, STEP):
                if is_stopped():
                    break
                stop_at = min(at + STEP, end)
                player.follow(tape, at, stop_at)
                part = piece._replace(start=at, stop=stop_at)
                markouts.see(maker.exchange, part, maker.instrument.tick_size)
            if is_stopped():
                break
    maker.mark_to_last_mid()
    notebook.note_end(maker)
    options = dict(participation=1.0, impact_bps=0.0, peer_rules=False) | exchange
    return Result(
        decisions=np.array(notebook.rows).reshape(-1, len(DECISION)),
        fills=maker.exchange.fills,
        markouts=markouts.all(),
        state=maker.state,
        counts=maker.counts,
        order_counts=maker.exchange.counts,
        parameters=maker.parameters,
        coin=maker.instrument.base_coin,
        title=history.title + ("   STOPPED EARLY" if is_stopped() else ""),
        is_synthetic=history.is_synthetic,
        first_ns=maker.first_ns,
        last_ns=maker.last_ns,
        events=maker.messages,
        outages=player.costs,
        options=options,
    )


# ---- A run that another process can repeat -----------------------------------------


@dataclass(frozen=True)
class Setting:
    """What a run is made of, but for what a search changes: small, and plain to send."""

    paths: tuple[Path, ...]
    stamps: tuple[tuple[str, int, int], ...]  # of the data's files, see stamps_of
    steps: tuple[str | None, str | None, int | None]  # tick, lot, depth, if data do not tell
    given: dict[str, Any]  # parameters
    strategy: tuple  # its name, then what shapes it
    outages: Windows
    exchange: dict[str, Any]  # frictions of the PaperExchange


@lru_cache(maxsize=1)
def open_history(paths: tuple[Path, ...], stamps: tuple, steps: tuple) -> History:
    """The history, mapped once in a process; other stamps open it anew."""
    return load_history(list(paths), *steps)


def history_of(setting: Setting) -> History:
    """The history of a setting."""
    return open_history(setting.paths, setting.stamps, setting.steps)


def stamps_of(paths: tuple[Path, ...]) -> tuple[tuple[str, int, int], ...]:
    """Path, size and time of modification of every file of the data that exists."""
    files = [f for path in paths for f in (sorted(path.iterdir()) if path.is_dir() else [path])]
    stats = [(str(file.resolve()), file.stat()) for file in files if file.exists()]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def parameters_of(setting: Setting, changes: Mapping[str, Any]) -> Parameters:
    """The given parameters with some changed; UserError for what is out of range."""
    history = history_of(setting)
    return choose_parameters({**setting.given, **changes}, history.start, history.instrument)


def play(
    setting: Setting,
    changes: Mapping[str, Any] | None = None,
    schedule: Schedule = (),
    **files: Any,
) -> Result:
    """One run, with some parameters changed; by schedule, more of them at later times."""
    return run_backtest(
        history_of(setting),
        parameters_of(setting, changes or {}),
        choose_strategy(*setting.strategy),
        setting.outages,
        {**setting.given, **(changes or {})},
        schedule=schedule,
        **files,
        **setting.exchange,
    )


def choose_strategy(name: str, *shape: float) -> Callable[..., Distances]:
    """The program, or a baseline."""
    if name == "as":
        return partial(quote_avellaneda_stoikov, *shape)
    return fixed_spread if name == "fixed" else choose_distances


# ---- Metrics -----------------------------------------------------------------------

YEAR_MINUTES = 365 * 1440  # the market never closes
ANNUAL_FROM_S = 3 * DAY_S  # a shorter span says nothing of a year
NORMAL_95 = 1.96
TINY = 1e-9  # s, USDT or base coin: less is rounding
SOURCES = ("lp", "last_good", "default", "none", "fixed", "as")
SIDES_OF = {"both": (1, -1), "bought": (1,), "sold": (-1,)}
PARAMETER_FRICTIONS = (
    "fill_model", "maker_fee_bps", "taker_fee_bps", "order_latency_ms", "feed_latency_ms",
)  # fmt: skip
HELP = {name: parameter.metadata["help"] for name, parameter in FIELDS.items()} | {
    "impact_bps": "what our own fills move the price, bps",
    "participation": "at most this share of a trade fills us",
    "peer_rules": "fill rules of hftbacktest",
}


def measure_markouts(
    times_ns: np.ndarray, sides: np.ndarray, prices: np.ndarray,
    book_ns: np.ndarray, mids: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """side (mid at fill time + h - price) / price x 1e4, bps: (fills, horizons).

    That mid is the one after the last book message up to then, exchange time; nan before
    the first and beyond the last. For data in chunks, a chunk begins with the last row of
    the one before it. Bought at 100, mid 99.9 after 1 s: markout(1 s) -10, run over.
    """
    until = times_ns[:, None] + np.round(np.array(HORIZONS_S) * NS).astype(np.int64)
    if not len(book_ns):
        return np.full(until.shape, np.nan)
    row = np.searchsorted(book_ns, until, "right") - 1
    mid = np.where((row >= 0) & (until <= book_ns[-1]), mids[row], np.nan)
    return sides[:, None] * (mid / prices[:, None] - 1) * 1e4


def estimate_mean(values: np.ndarray, clusters: np.ndarray) -> dict[str, Any]:
    """Mean in bps with a 95 % interval, where values of one cluster may go together.

    SE^2 = G/(G-1) sum_clusters (sum of the deviations from the mean)^2 / n^2, G clusters;
    the interval is t SE wide to either side, Student's t with G - 1 degrees of freedom.
    One cluster alone gives none. nan is excluded and counted. With clusters of one value
    each this is the textbook's standard error.
    """
    is_known = np.isfinite(values)
    values, clusters = values[is_known], clusters[is_known]
    n, mean, half = len(values), np.nan, np.nan
    groups, member = np.unique(clusters, return_inverse=True)
    if n:
        mean = values.mean()
        sums = np.bincount(member, values - mean)
    if len(groups) > 1:
        error = math.sqrt(len(groups) / (len(groups) - 1) * float(sums @ sums)) / n
        half = stdtrit(len(groups) - 1, 0.975) * error
    return {
        "mean_bps": mean, "low_bps": mean - half, "high_bps": mean + half,
        "fills": n, "clusters": len(groups), "excluded": int((~is_known).sum()),
    }  # fmt: skip


def resting_fills(fills: list[Fill]) -> dict[str, np.ndarray]:
    """The fills of our quotes as columns; taker fills, which close at any price, left out."""
    chosen = [fill for fill in fills if not fill.is_taker]
    return {name: np.array([getattr(f, name) for f in chosen]) for name in Fill._fields}


def resting_markouts(result: Result) -> np.ndarray:
    """Of the same fills, at once (the effective half spread) and at HORIZONS_S: bps."""
    f = resting_fills(result.fills)
    is_resting = np.array([not fill.is_taker for fill in result.fills], bool)
    effective = f["side"] * (f["mid_price"] / f["price"] - 1) * 1e4
    later = result.markouts.reshape(-1, len(HORIZONS_S))[is_resting]
    return np.column_stack([effective, later])


def summarize_markouts(result: Result) -> dict[str, dict[str, dict[str, Any]]]:
    """Markouts by side and horizon; at "0 s" the effective half spread.

    Fills of one minute are one cluster: a move that runs over one quote runs over the next.
    At 60 s neighbouring minutes overlap, and the interval is somewhat too narrow.
    """
    f, markouts = resting_fills(result.fills), resting_markouts(result)
    minute = f["time_ns"] // (MINUTE_S * NS)
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for name, sides in SIDES_OF.items():
        own = np.isin(f["side"], sides)
        table[name] = {
            f"{horizon:g} s": estimate_mean(markouts[own, k], minute[own])
            for k, horizon in enumerate((0, *HORIZONS_S))
        }
    return table


def whole_minutes(first_ns: int, t_s: np.ndarray) -> np.ndarray:
    """The whole minutes (UTC) up to the last decision, in s since first_ns."""
    start_s = -first_ns % (MINUTE_S * NS) / NS
    return np.arange(start_s, (t_s[-1] if len(t_s) else 0) + TINY, MINUTE_S)


def values_at(at_s: np.ndarray, t_s: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of the last decision up to each time, 0 before the first."""
    return np.append(0.0, values)[np.searchsorted(t_s, at_s + TINY, "right")]


def changes_by_minute(first_ns: int, t_s: np.ndarray, net: np.ndarray) -> np.ndarray:
    """Change of net, USDT, from each whole minute (UTC) to the next."""
    return np.diff(values_at(whole_minutes(first_ns, t_s), t_s, net))


def measure_sharpe(changes: np.ndarray, span_s: float) -> dict[str, Any]:
    """Sharpe ratio per minute, mean / standard deviation, with a 95 % interval.

    Its error (`optimize.sharpe_error`) takes the minutes as independent; where they are
    not, use --bootstrap. Annualised, times sqrt(365 x 1440), only from three days on.
    """
    n, sharpe, error = len(changes), np.nan, np.nan
    if n > 2 and changes.std() > TINY:
        sharpe = changes.mean() / changes.std(ddof=1)
        error = sharpe_error(sharpe, n, *shape_of(changes))
    year = math.sqrt(YEAR_MINUTES) if span_s >= ANNUAL_FROM_S else np.nan
    measures: dict[str, Any] = {"sharpe_minutes": n}
    for name, periods in (("minute", 1.0), ("year", year)):
        for bound, sign in (("", 0), ("_low", -1), ("_high", 1)):
            measures[f"sharpe_per_{name}{bound}"] = periods * (sharpe + sign * NORMAL_95 * error)
    return measures


def running_peak(net: np.ndarray) -> np.ndarray:
    """The highest net so far, USDT; we start with 0."""
    return np.maximum.accumulate(np.append(0.0, net))[1:]


def measure_drawdown(t_s: np.ndarray, net: np.ndarray) -> dict[str, Any]:
    """The deepest fall of net below its peak, USDT, as seen at the decisions.

    Its duration, s, runs from the last moment at that peak to the first one back at it,
    or to the end of the data.
    """
    peak = running_peak(net)
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


def measure_quotes(columns: dict[str, np.ndarray], p: Parameters) -> dict[str, Any]:
    """Quotes and inventory, averaged over time; shares of time from 0 to 1.

    At the limit: one more order of full size would breach max_inventory.
    """
    c, t_s, held = columns, columns["t_s"], columns["inventory"]
    mean = time_mean(held, t_s)
    at_limit = np.abs(held) > p.max_inventory - p.order_qty + TINY
    measures = {
        "bid_uptime": time_mean(np.isfinite(c["bid"]) * 1.0, t_s),
        "ask_uptime": time_mean(np.isfinite(c["ask"]) * 1.0, t_s),
        "quoted_spread_bps": time_mean((c["ask"] - c["bid"]) / c["mid"] * 1e4, t_s),
        "inventory_mean": mean,
        "inventory_std": math.sqrt(time_mean((held - mean) ** 2, t_s)),
        "inventory_min": held.min() if len(held) else math.nan,
        "inventory_max": held.max() if len(held) else math.nan,
        "at_limit": time_mean(at_limit * 1.0, t_s),
    }
    for name in ("base", "volatility", "liquidity", "depth"):
        measures[f"{name}_spread_bps"] = time_mean(c[f"{name}_bps"], t_s)
    return measures


def measure_orders(result: Result) -> dict[str, Any]:
    """Orders and fills. Queues in base coin; inf, where nothing was shown, is excluded.

    An order is known by side, arrival and price; the fill ratio counts those that were
    filled at least in part.
    """
    f, sent = resting_fills(result.fills), result.order_counts["sent"]
    filled = len(set(zip(f["side"], f["arrival_ns"], f["price"])))
    measures = {
        "fills": len(result.fills),
        "taker_fills": len(result.fills) - len(f["side"]),
        "orders_sent": sent,
        "orders_filled": filled,
        "fill_ratio": filled / sent if sent else math.nan,
        "time_to_fill_s": median((f["time_ns"] - f["arrival_ns"]) / NS),
        "refused": {
            name.removeprefix("refused: "): count
            for name, count in result.order_counts.items() if name.startswith("refused: ")
        },
    }  # fmt: skip
    for name, queue in (("arrival", f["queue_at_arrival"]), ("fill", f["queue_ahead"])):
        measures[f"queue_at_{name}"] = median(queue)
        measures[f"queue_at_{name}_excluded"] = int((~np.isfinite(queue)).sum())
    return measures


def median(values: np.ndarray) -> float:
    """The median of what is finite; nan of nothing."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else math.nan


def measure_account(state: State) -> dict[str, Any]:
    """net = gross - fees = spread captured + revaluation - fees + residual.

    Each in USDT, and in bps of the turnover, beside which a fee in bps can be read.
    """
    usdt = {
        "net": state.equity,
        "gross": state.gross,
        "fees": state.fees_paid,  # below 0: a rebate
        "spread_captured": state.spread_captured,
        "revaluation": state.revaluation,
        "residual": state.residual,
        "turnover": state.turnover,
    }
    scale = 1e4 / state.turnover if state.turnover else math.nan
    in_bps = {f"{name}_bps": scale * value for name, value in list(usdt.items())[:5]}
    return {f"{name}_usdt": value for name, value in usdt.items()} | in_bps


def account_of(result: Result) -> dict[str, np.ndarray]:
    """The decisions' columns and net, from the first on at which the account is known."""
    columns = dict(zip(DECISION, result.decisions.T))
    columns["net"] = columns["gross"] - columns["fees"]
    return {name: column[np.isfinite(columns["net"])] for name, column in columns.items()}


def measure(result: Result) -> dict[str, Any]:
    """Every metric by name, the unit in the suffix; None where nothing can be said."""
    columns, known = dict(zip(DECISION, result.decisions.T)), account_of(result)
    t_s, net = known["t_s"], known["net"]
    span_s = (result.last_ns - result.first_ns) / NS
    given = {name: getattr(result.parameters, name) for name in PARAMETER_FRICTIONS}
    return to_plain({
        "is_synthetic": result.is_synthetic,
        "first_event_utc": clock_text(result.first_ns),
        "last_event_utc": clock_text(result.last_ns),
        "span_s": span_s,
        "events": result.events,
        **measure_account(result.state),
        **measure_sharpe(changes_by_minute(result.first_ns, t_s, net), span_s),
        **measure_drawdown(t_s, net),
        "markouts": summarize_markouts(result),
        **measure_orders(result),
        **measure_quotes(columns, result.parameters),
        "decisions": {name: result.counts[name] for name in SOURCES},
        "reasons": {n: k for n, k in result.counts.items() if n and n not in SOURCES},
        "frictions": {**given, **result.options},
        "outages": result.outages,
    })  # fmt: skip


def to_plain(value: Any) -> Any:
    """The same in Python's own types, None for nan and inf: what JSON can hold."""
    if isinstance(value, dict):
        return {str(name): to_plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return to_plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- Table -------------------------------------------------------------------------


class Blanks(string.Formatter):
    """str.format that shows None as - in its column."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is not None:
            return format(value, format_spec)
        width = re.match(r">\+?(\d+)", format_spec)
        return "-".rjust(int(width[1])) if width else "-"


TABLE_WIDTH, MAX_REASONS = 100, 8  # columns, and lines of reasons
TABLE = """\
{title}
{first_event_utc} to {last_event_utc} UTC, {events:,} events

Result                                       USDT   bps of turnover
  spread captured                 {spread_captured_usdt:>+15,.2f} {spread_captured_bps:>+17.2f}\
   from our fills to the mid then
  inventory revaluation           {revaluation_usdt:>+15,.2f} {revaluation_bps:>+17.2f}\
   the mid moved while we held
  = gross                         {gross_usdt:>+15,.2f} {gross_bps:>+17.2f}
  {fee_name:<31} {fee_effect_usdt:>+15,.2f} {fee_effect_bps:>+17.2f}
  = net                           {net_usdt:>+15,.2f} {net_bps:>+17.2f}\
   the sum is off by {residual_usdt:.0e} USDT
  turnover                        {turnover_usdt:>15,.2f}

Risk (intervals of 95 %, the minutes taken as independent)
  Sharpe ratio per minute         {sharpe_per_minute:>15.4f}\
   {sharpe_per_minute_low:.4f} to {sharpe_per_minute_high:.4f}\
 from {sharpe_minutes:,} minutes
  Sharpe ratio per year           {sharpe_per_year:>15.2f}\
   {sharpe_per_year_low:.2f} to {sharpe_per_year_high:.2f}, times sqrt(365 x 1440)
  deepest drawdown of net, USDT   {max_drawdown_usdt:>15,.2f}   below its peak so far
  it lasted, s                    {max_drawdown_s:>15,.1f}   {drawdown_end}

Markouts, bps: bought, how far the mid then stood above our price; sold, below it
  mean ± 95 % (fills of one minute count as one event); below 0: we were run over
{markout_lines}

Orders and fills
  fills                           {fills:>15,}   {taker_fills} of them as taker, not counted below
  orders sent                     {orders_sent:>15,}
  refused on arrival              {orders_refused:>15,}   {refused_text}
  filled, at least in part        {orders_filled:>15,}   {fill_ratio:.1%} of those sent
  time to fill, s                 {time_to_fill_s:>15.2f}   median, since arrival
  queue ahead on arrival, {coin:<7} {queue_at_arrival:>15.4f}\
   median; {queue_at_arrival_excluded} fills where none was shown left out
  queue ahead at the fill, {coin:<6} {queue_at_fill:>15.4f}\
   median; {queue_at_fill_excluded} left out; above 0: price went through

Quotes and inventory, averages over time
  time with a bid                 {bid_uptime:>15.1%}
  time with an ask                {ask_uptime:>15.1%}
  quoted spread, bps              {quoted_spread_bps:>15.2f}   while both sides are quoted
  base spread, bps                {base_spread_bps:>15.2f}   volatility\
 {volatility_spread_bps:.2f} + liquidity {liquidity_spread_bps:.2f} + depth {depth_spread_bps:.2f}
  inventory, {coin:<20} {inventory_mean:>+15.4f}   standard deviation\
 {inventory_std:.4f}, from {inventory_min:+.4g} to {inventory_max:+.4g}
  time at the inventory limit     {at_limit:>15.1%}   no room for one more order

Decisions
  by the linear program           {decisions[lp]:>15,}
  by a baseline                   {baseline_decisions:>15,}
  fallback: last good distances   {decisions[last_good]:>15,}
  fallback: default spread        {decisions[default]:>15,}
  no quote                        {decisions[none]:>15,}{reason_lines}

Frictions in force
{friction_lines}"""


def full_title(title: str, is_synthetic: bool) -> str:
    """The title, which never hides that data are synthetic."""
    is_said = not is_synthetic or "SYNTHETIC" in title
    return title + ("" if is_said else "   SYNTHETIC DATA, no market")


def table_line(label: str, value: Any, note: str) -> str:
    """A line of the table that only some runs have."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"  {label:<31} {f'{value:g}' if is_number else str(value):>15}   {note}"


def markout_lines(markouts: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A line for each horizon: mean, half the width of its interval, number of fills."""
    lines = ["  after " + "".join(f"{side + ' (fills)':>26}" for side in markouts) + "  left out"]
    for horizon in markouts["both"]:
        line = f"  {horizon:<6}"
        for cell in (markouts[side][horizon] for side in markouts):
            mean, high = cell["mean_bps"], cell["high_bps"]
            text = "-" if mean is None else f"{mean:+.2f}"
            text += "" if high is None else f" ± {high - mean:.2f}"
            line += f"{text} ({cell['fills']})".rjust(26)
        lines.append(f"{line}{markouts['both'][horizon]['excluded']:>10,}")
    return "\n".join(lines)


def format_table(metrics: dict[str, Any], result: Result) -> str:
    """The metrics to read: label with unit, value, what it means; at most 100 columns."""
    m = metrics
    reasons = sorted(m["reasons"].items(), key=lambda item: -item[1])
    reason_lines = [table_line("  reason given", n, reason) for reason, n in reasons]
    if len(reasons) > MAX_REASONS:
        reason_lines[MAX_REASONS:] = [f"    and {len(reasons) - MAX_REASONS} more: metrics.json"]
    frictions = [table_line(n, value, HELP.get(n, "")) for n, value in m["frictions"].items()]
    for outage in m["outages"]:
        length = f"{(outage['end_ns'] - outage['start_ns']) / NS:.1f} s"
        lost = f"{outage['fills']} fills in it, net {outage['net_usdt']:+.2f} USDT"
        frictions.append(table_line(f"outage {clock_text(outage['start_ns'])}", length, lost))
    is_rebate = m["fees_usdt"] < 0
    text = Blanks().format(
        TABLE,
        **m,
        title=full_title(result.title, result.is_synthetic),
        coin=result.coin,
        fee_name="rebates received" if is_rebate else "fees paid",
        fee_effect_usdt=0 - m["fees_usdt"],  # no minus zero
        fee_effect_bps=None if m["fees_bps"] is None else 0 - m["fees_bps"],
        drawdown_end={True: "until net was back at its peak", False: "to the end of the data",
                      None: ""}[m["max_drawdown_recovered"]],
        baseline_decisions=m["decisions"]["fixed"] + m["decisions"]["as"],
        markout_lines=markout_lines(m["markouts"]),
        orders_refused=sum(m["refused"].values()),
        refused_text=", ".join(f"{count} {why}" for why, count in m["refused"].items()),
        reason_lines="".join(f"\n{line}" for line in reason_lines),
        friction_lines="\n".join(frictions),
    )  # fmt: skip
    if m["sharpe_per_year"] is None:
        text = re.sub(r"  Sharpe ratio per year.*\n", "", text)
    return "\n".join(line.rstrip()[:TABLE_WIDTH] for line in text.splitlines())


# ---- How sure: the bootstrap -------------------------------------------------------

FEW_PERIODS = 500  # below, resampled intervals are too narrow
WIDTH = 27  # of a column of the table
MEASURES = {  # of optimize.measure_paths: name and form in the tables
    "net_usdt": ("net, USDT", "+.2f"),
    "sharpe": ("Sharpe a minute", "+.3f"),
    "max_drawdown_usdt": ("drawdown, USDT", ".2f"),
}


class Trial(NamedTuple):
    """A run by the minute: what bootstrap and search need to know of it."""

    start_ns: int  # the first whole minute
    net: np.ndarray  # (n,) its change in each minute, USDT
    held: np.ndarray  # (n,) inventory's absolute value at the end of each, USDT
    fills: np.ndarray  # (n,) their number

    def between(self, start: int, stop: int) -> Trial:
        """Minutes start..stop-1."""
        columns = (column[start:stop] for column in self[1:])
        return Trial(self.start_ns + start * MINUTE_S * NS, *columns)


def cut_into_minutes(result: Result) -> Trial:
    """From the first whole minute to the last; USDT to six decimals, as they are kept."""
    c = account_of(result)
    at_s = whole_minutes(result.first_ns, c["t_s"])
    net, held = (
        values_at(at_s, c["t_s"], values).round(6)
        for values in (c["net"], np.abs(c["inventory"] * np.nan_to_num(c["mid"])))
    )
    fill_s = np.array([fill.recv_ns - result.first_ns for fill in result.fills]) / NS
    minute = np.searchsorted(at_s, fill_s, "right")  # 0: before the first
    fills = np.bincount(minute, minlength=len(at_s) + 1)[1 : len(at_s)]
    start_ns = result.first_ns + round(float(at_s[0] if len(at_s) else 0) * NS)
    return Trial(start_ns, np.diff(net).round(6), held[1:], fills)


def summarize_bootstrap(
    trials: Mapping[str, Trial], count: int, rng: np.random.Generator
) -> tuple[dict[str, Any], np.ndarray]:
    """Measures of one or two runs, and of their difference, with 95 % intervals; and their
    net in every resample.

    Two runs are resampled at the same minutes: what the market did to both cancels.
    """
    x = np.column_stack([trial.net for trial in trials.values()])
    drawn, found = bootstrap(x, count, rng), measure_paths(x.T)
    of: dict[str, dict[str, Any]] = {name: {} for name in trials}
    if len(trials) == 2:
        of["difference"] = {}
        for values in (drawn, found):
            values |= {name: np.append(v, [v[0] - v[1]], axis=0) for name, v in values.items()}
    for k, (name, column) in enumerate(of.items()):
        for measure in MEASURES:
            low, high = interval_of(drawn[measure][k])
            column[measure] = dict(value=float(found[measure][k]), low=low, high=high)
        if name in trials:
            column["fills"] = int(trials[name].fills.sum())
    sizes = dict(resamples=count, periods=len(x), block=common_block_length(x))
    return sizes | {"of": of}, drawn["net_usdt"]


def format_bootstrap(summary: dict[str, Any], title: str = "Bootstrap") -> str:
    """A column for each run, a line for each measure."""
    lines = [
        f"{title}: {summary['periods']:,} minutes, 95 % by {summary['resamples']:,} resamples "
        f"in blocks of {summary['block']:.1f} minutes",
        " " * 17 + "".join(f"{name:>{WIDTH}}" for name in summary["of"]),
    ]
    for measure, (label, form) in MEASURES.items():
        line = f"  {label:<15}"
        for name, column in summary["of"].items():
            sign = "+" if name == "difference" and form[0] != "+" else ""
            for digits in (form[-2:], "1f", "0f", "0e"):  # fewer where they do not fit
                text = sign + form[:-2] + digits
                value, low, high = (format(x, text) for x in column[measure].values())
                if len(cell := f"{value} ({low} to {high})") < WIDTH:
                    break
            line += f"{cell:>{WIDTH}}"
        lines.append(line)
    fills = [column.get("fills") for column in summary["of"].values()]
    lines.append(f"  {'fills':<15}" + "".join(f"{n:>{WIDTH},}" for n in fills if n is not None))
    if summary["periods"] < FEW_PERIODS:
        lines.append(f"  WARNING: below {FEW_PERIODS} minutes such intervals are too narrow")
    return "\n".join(lines)


# ---- When it pays: regimes ---------------------------------------------------------

GRID_S = 5.0  # mids this far apart measure a minute; a decision is never older
REGIME_WARMUP = 30  # minutes before the first that is classed
VOLATILITIES, DIRECTIONS = ("calm", "usual", "wild"), ("range", "trend")
REGIME_HORIZONS = ("1 s", "10 s")  # of the markouts shown


def class_by_past(values: np.ndarray, classes: int) -> np.ndarray:
    """Which part of the earlier values each one falls into, 0 the lowest; -1 = too early.

    Thresholds are quantiles of what came before, so that no class knows the future. A
    value equal to earlier ones counts as the lowest of them; nan is in no class.
    """
    found, past = np.full(len(values), -1), []
    for k, value in enumerate(values.tolist()):
        if value == value:
            rank = bisect_left(past, value)
            if len(past) >= REGIME_WARMUP:
                found[k] = min(rank * classes // len(past), classes - 1)
            past.insert(rank, value)
    return found


def describe_minutes(result: Result) -> tuple[np.ndarray, np.ndarray]:
    """Volatility, bps/sqrt(s), and directness of each whole minute: (n,) each.

    Of the mid every 5 s: root mean square of the log returns over sqrt(5 s); and
    |sum of returns| / sum of |returns|, 1 for a straight move, near 0 for there and back.
    """
    t_s, mid = result.decisions.T[:2]
    known = np.isfinite(mid)
    at_s = whole_minutes(result.first_ns, result.decisions[:, 0])
    n, parts = max(len(at_s) - 1, 0), round(MINUTE_S / GRID_S)
    grid_s = (at_s[0] if n else 0) + np.arange(n * parts + 1) * GRID_S
    mids = values_at(grid_s, t_s[known], mid[known])
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 before the first mid
        returns = (np.diff(np.log(mids)) * 1e4).reshape(n, parts)
        returns = np.where(np.isfinite(returns), returns, np.nan)
        volatility = np.sqrt((returns**2).mean(axis=1) / GRID_S)
        direct = np.abs(returns.sum(axis=1)) / np.abs(returns).sum(axis=1)
    return volatility, direct


def summarize_regimes(result: Result) -> dict[str, dict[str, Any]]:
    """Result, fills and markouts of the minutes of each regime, by its name."""
    c, (volatility, direct) = account_of(result), describe_minutes(result)
    at_s = whole_minutes(result.first_ns, result.decisions[:, 0])
    by_minute = {n: np.diff(values_at(at_s, c["t_s"], c[n])) for n in ("gross", "fees", "net")}
    by_minute["volatility"] = volatility
    f, markouts = resting_fills(result.fills), resting_markouts(result)
    filled = np.searchsorted(at_s, (f["recv_ns"] - result.first_ns) / NS, "right") - 1
    by_volatility = class_by_past(volatility, len(VOLATILITIES))
    by_direction = class_by_past(direct, len(DIRECTIONS))
    chosen = {name: by_volatility == k for k, name in enumerate(VOLATILITIES)}
    chosen |= {name: by_direction == k for k, name in enumerate(DIRECTIONS)}
    chosen["not classed"] = by_volatility < 0
    rest = by_minute, filled, markouts
    return {name: summarize_regime(own, *rest) for name, own in chosen.items()}


def summarize_regime(
    chosen: np.ndarray, by_minute: dict[str, np.ndarray], filled: np.ndarray, markouts: np.ndarray
) -> dict[str, Any]:
    """What the chosen minutes brought; filled is the minute of each fill."""
    net, volatility = (  # each minute by itself; estimate_mean keeps the unit of its values
        estimate_mean(by_minute[name][chosen], chosen.nonzero()[0])
        for name in ("net", "volatility")
    )
    own = np.isin(filled, chosen.nonzero()[0])
    return {
        "minutes": int(chosen.sum()),
        "gross_usdt": by_minute["gross"][chosen].sum(),
        "fees_usdt": by_minute["fees"][chosen].sum(),
        "net_usdt": by_minute["net"][chosen].sum(),
        "net_a_minute": net["mean_bps"],
        "net_a_minute_half_width": net["high_bps"] - net["mean_bps"],
        "volatility_bps": volatility["mean_bps"],
        "fills": int(own.sum()),
        "markouts": {
            f"{h:g} s": estimate_mean(markouts[own, k], filled[own])
            for k, h in enumerate((0, *HORIZONS_S))
        },
    }


def format_regimes(regimes: dict[str, dict[str, Any]], whose: str = "of all minutes") -> str:
    """A line for each regime, and in words where the money goes."""
    lines = [
        f"Regimes {whose} (± 95 %). A minute is classed, at its end, against those before it:",
        "by thirds of volatility, and by halves of directness",
        "            minutes  bps/√s   gross    fees     net   net a minute fills"
        + "".join(f"{'markout ' + h:>14}" for h in REGIME_HORIZONS),
    ]
    for name, r in regimes.items():
        cells = [r["markouts"][h] for h in REGIME_HORIZONS]
        numbers = (r["volatility_bps"], r["gross_usdt"], 0 - r["fees_usdt"], r["net_usdt"])
        lines.append(
            f"  {name:<11}{r['minutes']:>6,}"
            + "".join(plus_minus(number, math.nan, 8, ".2f") for number in numbers)
            + plus_minus(r["net_a_minute"], r["net_a_minute_half_width"], 15)
            + f"{r['fills']:>6,}"
            + "".join(plus_minus(c["mean_bps"], c["high_bps"] - c["mean_bps"], 14) for c in cells)
        )  # fmt: skip
    return "\n".join([*lines, *tell_regimes(regimes)])


def plus_minus(mean: float, half: float, width: int, form: str = "+.2f") -> str:
    """A mean with half the width of its interval, - where there is none."""
    text = "-" if mean != mean else f"{mean:{form}}" + ("" if half != half else f" ± {half:.2f}")
    return text.rjust(width)


def tell_regimes(regimes: dict[str, dict[str, Any]]) -> list[str]:
    """In plain words: which regime loses the money."""
    volatile = [regimes[name] for name in (*VOLATILITIES, "not classed")]
    total, minutes = (sum(r[name] for r in volatile) for name in ("net_usdt", "minutes"))
    lines = []
    for names in (VOLATILITIES, DIRECTIONS):
        worst = min(names, key=lambda name: regimes[name]["net_usdt"])
        r = regimes[worst]
        if r["net_usdt"] < 0:
            lines.append(f"  {worst} minutes lose most: {r['net_usdt']:+.2f} USDT in "
                         f"{r['minutes']:,} minutes; all {minutes:,}: {total:+.2f}")  # fmt: skip
    return lines or ["  no regime loses money"]


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
FACTS = {*PARAMETER_FRICTIONS, "clock_offset_ms"}  # else a search takes the kindest of them
IN_SAMPLE = 2 / 3  # of the minutes
UNITS = {"net": "net, USDT", "sharpe": "Sharpe ratio a minute", "penalized": "penalized net, USDT"}
HELD_SHARE = 0.01  # of the inventory's value is added to the drawdown: a move of 1 %
RESAMPLES = 1000  # where --bootstrap gives no number
CHANCE_DRAWS = 200  # of the overfitting probability without skill
LUCK = 0.05  # a search without skill ends as well less often than this: it may be skill
DIGITS = 4  # of a refined parameter


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
            raise UserError(f"--grid {name}: the exchange decides that, not we: compare runs with "
                            f"--{name.replace('_', '-')}")  # fmt: skip
        try:
            grid[name] = sorted({float(v) for v in values})
        except ValueError:
            raise UserError(f"--grid {text}: the values must be numbers") from None
    grid = grid or DEFAULT_GRID
    if strategy != "lp" and (unused := [name for name in grid if name in OF_THE_PROGRAM]):
        raise UserError(f"--strategy {strategy} does not use {unused[0]}: give --grid with what it "
                        "uses, such as default_spread_bps=3,6,12 for fixed")  # fmt: skip
    return grid


def score_trial(trial: Trial, objective: str, penalty: float) -> float:
    """What a search makes as large as it can.

    net; Sharpe ratio of a minute; or net - penalty x (deepest drawdown + 1 % of the mean
    value of the inventory), penalized. As seen at whole minutes.
    """
    measures = measure_paths(trial.net)
    if objective == "sharpe":
        return float(measures["sharpe"])
    cost = measures["max_drawdown_usdt"] + HELD_SHARE * trial.held.mean()
    return float(measures["net_usdt"] - (penalty * cost if objective == "penalized" else 0))


def split_of(minutes: int) -> int:
    """How many of the minutes are in sample; UserError where either part is too little."""
    split = round(minutes * IN_SAMPLE)
    if minutes - split < LEAST_MINUTES:
        raise UserError(
            f"{minutes} minutes of data leave {minutes - split} to judge the choice, fewer than "
            f"{LEAST_MINUTES}: give more --data"
        )
    return split


def score_in_sample(trial: Trial, options: argparse.Namespace) -> float:
    """The score by which --tune chooses."""
    inside = trial.between(0, split_of(len(trial.net)))
    return score_trial(inside, options.objective, options.penalty)


def try_out(setting: Setting, changes: Mapping[str, Any]) -> Trial:
    """What a worker does: one run, by the minute."""
    return cut_into_minutes(play(setting, changes))


MODULES = ("feed", "optimize", "marketmaker", "backtest")
WORST = -1e100  # score of what cannot be played
Tried = dict[str, Trial]  # by key_of what was changed


class Stopped(Exception):
    """Ctrl-C came while a search waited for its next point."""


class Search:
    """What is tried of a setting, by which workers, and what has come of it.

    Every trial is a line of JSON, appended as it comes. The file's name holds a hash of
    code, data and setting: a search that was stopped or killed goes on where it was, and
    trials of different kinds never mix.
    """

    def __init__(
        self, setting: Setting, folder: Path, executor: Executor, stop: threading.Event,
        tell: Callable[[str, int, int], None],
    ) -> None:  # fmt: skip
        self.setting, self.executor = setting, executor
        self.stop, self.tell = stop, tell
        self.known: dict[str, Trial] = {}
        code = [Path(__file__).with_name(f"{name}.py").read_text() for name in MODULES]
        about = json.dumps([dataclasses.astuple(setting), code], default=str)
        name = hashlib.sha256(about.encode()).hexdigest()[:10]
        self.path = folder / f"trials-{name}.jsonl"
        kept = self.path.read_bytes() if self.path.exists() else b""
        for line in kept.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # it was cut off
                self._take(json.loads(line))
        self.file = feed.GrowingFile(self.path, append=True)
        if kept[-1:] not in (b"", b"\n"):
            self.file.write("\n")  # a killed writer broke off in mid-line

    def _take(self, line: dict[str, Any]) -> None:
        columns = [np.array(line[name]) for name in Trial._fields[1:]]
        self.known[key_of(line["changes"])] = Trial(line["start_ns"], *columns)

    def try_all(self, configurations: list[dict[str, Any]], what: str = "") -> Tried:
        """Their trials, in this order; those known are not played again. What has come by
        the time of a stop; UserError if a worker dies.
        """
        keys = {key_of(one): one for one in configurations}
        missing = [one for key, one in keys.items() if key not in self.known]
        work, done = partial(try_out, self.setting), len(keys) - len(missing)
        try:
            for k, trial in run_trials(work, missing, self.executor, self.stop.is_set):
                line = {"changes": missing[k]} | to_plain(trial._asdict())
                self._take(line)
                self.file.write(json.dumps(line) + "\n")
                done += 1
                if what:
                    self.tell(what, done, len(keys))
        except BrokenExecutor:
            raise UserError(
                f"a worker was killed, perhaps for want of memory: {len(self.known):,} trials are "
                f"kept in {self.path}; run the same command again, with fewer --workers"
            ) from None
        return {key: self.known[key] for key in keys if key in self.known}


def key_of(changes: Mapping[str, Any]) -> str:
    """The name of a trial."""
    return json.dumps(dict(changes), sort_keys=True)


def tune(
    search: Search, grid: Mapping[str, Sequence[Any]], score: Callable[[Trial], float], steps: int
) -> Tried:
    """The trials of a grid and of the refinement from its best point. Nothing is drawn by
    lot, and the order in which workers finish does not matter.
    """
    tried = search.try_all(expand_grid(grid), "configurations")
    if not tried or search.stop.is_set():
        return tried
    start, on_grid = json.loads(best_of(tried, score)), len(tried)
    rules = {name: FIELDS[name].metadata for name in grid}

    def score_at(point: dict[str, float]) -> float:
        changes = {name: float(f"{point[name]:.{DIGITS}g}") for name in grid}
        try:
            parameters_of(search.setting, changes)
        except UserError:
            return WORST  # two of them do not go together
        found = search.try_all([changes])
        if not found:
            raise Stopped
        tried.update(found)
        if len(tried) > on_grid:
            search.tell("steps of refinement", len(tried) - on_grid, steps)
        return max(score(trial) for trial in found.values())

    limits = {name: (rule["low"], rule["high"]) for name, rule in rules.items()}
    with contextlib.suppress(Stopped):
        refine(score_at, start, grid, limits, steps)
    return tried


def best_of(tried: Tried, score: Callable[[Trial], float]) -> str:
    """The key of the best trial; of equals, the first."""
    return max(tried, key=lambda key: score(tried[key]))


def price_of_search(
    tried: Tried, best: str, split: int, objective: str, rng: np.random.Generator, count: int
) -> dict[str, Any]:
    """What the best of a search is worth, given that all the others were tried.

    Deflated Sharpe ratio and luck from the minutes in sample, before `split`, by which the
    best was chosen; the overfitting probability cuts halves of its own, from all minutes.
    """
    x = np.column_stack([trial.net for trial in tried.values()])
    score = sharpe_score if objective == "sharpe" else net_score
    chosen, k = x[:split], list(tried).index(best)
    moments = chosen.mean(axis=0), chosen.var(axis=0, ddof=1)
    sharpes, found = sharpe_score(*moments), score(*moments)[k]
    variance = float(sharpes.var(ddof=1)) if len(tried) > 1 else 0.0
    luck = draw_best_of_chance(chosen, score, count, rng)
    low, high = interval_of(draw_overfitting_by_chance(x, score, CHANCE_DRAWS, rng))
    return {
        "trials": len(tried),
        "sharpe_by_luck": best_sharpe_by_luck(variance, len(tried)),
        "deflated_sharpe": deflated_sharpe(
            sharpes[k], variance, len(tried), split, *shape_of(chosen[:, k])
        ) if chosen[:, k].std() > TINY else math.nan,
        "overfitting_probability": overfitting_probability(x, score),
        "overfitting_low": low,
        "overfitting_high": high,
        "luck_probability": float((1 + (luck >= found).sum()) / (1 + count)),
    }  # fmt: skip


# ---- Walk-forward ------------------------------------------------------------------

WINDOWS = 4  # of trading, where --walk-forward gives no number
LOOK_BACK = 2  # windows on which each choice is made
LEAST_MINUTES = 10  # of a window, and in sample and out of it


def walk_forward(
    search: Search, grid: Mapping[str, Sequence[Any]], options: argparse.Namespace
) -> dict[str, Any]:
    """Tune on two windows, trade the next, roll on.

    Every configuration is played once over everything, and a choice looks at the minutes
    of its two windows only. What the choices would have earned is played in one piece,
    parameters changing where a window begins, inventory and queues carried along. Before
    the first choice it trades as given, and that does not count.
    """
    setting = search.setting
    tried = search.try_all(expand_grid(grid), "configurations")
    given = search.try_all([{}])
    if search.stop.is_set() or not given:
        return {}
    (trial,) = given.values()
    score = partial(score_trial, objective=options.objective, penalty=options.penalty)
    count, windows = options.walk_forward, []
    length = window_length(len(trial.net), count + LOOK_BACK)
    for k in range(count):
        start, stop = k * length, (k + LOOK_BACK) * length
        past = {key: one.between(start, stop) for key, one in tried.items()}
        key = best_of(past, score)
        begin_ns = trial.start_ns + stop * MINUTE_S * NS
        windows.append(dict(key=key, begin_ns=begin_ns, in_sample=past[key], start=stop))
    schedule = [(w["begin_ns"], json.loads(w["key"])) for w in windows]
    result = play(setting, schedule=schedule, stop=search.stop)
    if search.stop.is_set():
        return {}
    traded = cut_into_minutes(result)
    for w in windows:
        w["out_of_sample"] = traded.between(w["start"], w["start"] + length)
    span = LOOK_BACK * length, (LOOK_BACK + count) * length
    choices = [w["key"] for w in windows]
    return {
        "windows": windows,
        "minutes": length,
        "changed": sum(a != b for a, b in zip(choices, choices[1:])),
        "traded": traded.between(*span),
        "given": trial.between(*span),
        "result": result,
    }


def window_length(minutes: int, windows: int) -> int:
    """Minutes of each of so many windows; UserError where that is too little."""
    length = minutes // windows
    if length < LEAST_MINUTES:
        raise UserError(
            f"{minutes} minutes of data make {windows} windows of {length}, fewer than "
            f"{LEAST_MINUTES}: give more --data, or a smaller --walk-forward"
        )
    return length


# ---- Report of a search ------------------------------------------------------------

SEARCH_TABLE = """\
{title}
{minutes:,} minutes: chosen by {objective} on the first {split:,}, judged on the {rest:,} after them
{trials:,} trials: {on_grid:,} of {grid_size:,} on the grid, {refined:,} of refinement{stopped}\
{notes}
  best       {best}
  as given   {given}

{in_sample}

{out_of_sample}

The price of having searched{by_net}
  deflated Sharpe ratio    {deflated_sharpe:>6.3f}
    confidence that the best's true Sharpe ratio is above {sharpe_by_luck:.3f} a minute, as
    is to be expected of the best of {trials:,} that only luck sets apart
  overfitting probability  {overfitting}
    how often the best of one half of all minutes is below the middle in the other half
  plateau                  {plateau:>6,} trials inside the best's interval above
  In plain words: {luck_probability:.1%} of searches through these configurations, had they no
  skill, would find a best that looks at least as good{verdict}"""


def in_words(changes: Mapping[str, Any]) -> str:
    """alpha 4, gamma 0.5"""
    pairs = ((name, changes[name]) for name in FIELDS if name in changes)
    return ", ".join(f"{n} {'off' if v is None else format(v, 'g')}" for n, v in pairs)


def judge(
    best: Mapping[str, float], grid: Mapping[str, Sequence[float]], found: dict[str, Any],
    is_given_as_good: bool,
) -> list[str]:  # fmt: skip
    """What is to be said against a best that looks good, in sample."""
    beyond = [n for n, value in best.items() if not min(grid[n]) <= value <= max(grid[n])]
    objections = {
        "The best that was found is not to trade.": not found["fills"],
        "The best loses money even where it was chosen.": found["net_usdt"]["value"] < 0,
        "As given was at least as good there: keep it.": is_given_as_good,
        f"The best lies beyond the grid in {', '.join(beyond)}: widen it.": beyond,
    }
    return [text for text, holds in objections.items() if holds]


def summarize_search(
    search: Search, tried: Tried, options: argparse.Namespace, grid: dict[str, list[Any]]
) -> tuple[dict[str, Any], np.ndarray]:
    """Best and given parameters, in sample and out, and the price of the search; and net in
    every resample out of sample.
    """
    rng, count = np.random.default_rng(options.seed), options.bootstrap or RESAMPLES
    (given,) = search.try_all([{}]).values()
    minutes = len(given.net)
    split, configurations = split_of(minutes), {key_of(one) for one in expand_grid(grid)}
    score = partial(score_in_sample, options=options)
    best = best_of(tried, score)
    changes = json.loads(best)
    (inside, _), (outside, drawn) = (
        summarize_bootstrap(
            {"best": tried[best].between(*part), "as given": given.between(*part)}, count, rng
        )
        for part in ((0, split), (split, minutes))
    )
    parameters = parameters_of(search.setting, {})
    earlier = len(search.known.keys() - tried.keys() - {key_of({})})
    notes = [FIXED_IN_GRID] if grid is DEFAULT_GRID else []
    if earlier:
        notes.append(f"{earlier:,} more trials of earlier searches are not counted")
    measure = "sharpe" if options.objective == "sharpe" else "net_usdt"
    least = inside["of"]["best"][measure]["low"]
    return {
        "objective": options.objective,
        "notes": notes,
        "verdicts": judge(changes, grid, inside["of"]["best"],
                          score(given) >= score(tried[best])),
        "minutes": minutes,
        "split": split,
        "on_grid": len(configurations & set(tried)),
        "grid_size": len(configurations),
        "best": changes,
        "given": {name: getattr(parameters, name) for name in grid},
        "in_sample": inside,
        "out_of_sample": outside,
        "plateau": [
            key for key, t in tried.items() if measure_paths(t.net[:split])[measure] >= least
        ],
        **price_of_search(tried, best, split, options.objective, rng, count),
    }, drawn


def format_search(found: dict[str, Any], title: str) -> str:
    """What was tried, the best, how it fares out of sample, and what the search costs."""
    f, luck = to_plain(found), found["luck_probability"]
    pbo, low, high = (f[f"overfitting_{name}"] for name in ("probability", "low", "high"))
    is_whole = f["on_grid"] == f["grid_size"]
    verdicts = [": it may be luck" if luck >= LUCK else ": luck alone would rarely do this"]
    verdicts += f["verdicts"]
    return Blanks().format(
        SEARCH_TABLE,
        **{name: value for name, value in f.items() if not isinstance(value, (list, dict))},
        title=title,
        by_net=" (judged by net)" if f["objective"] == "penalized" else "",
        best=in_words(found["best"]),
        given=in_words(found["given"]),
        in_sample=format_bootstrap(found["in_sample"], "In sample, where it was chosen"),
        out_of_sample=format_bootstrap(found["out_of_sample"], "Out of sample"),
        rest=f["minutes"] - f["split"],
        refined=f["trials"] - f["on_grid"],
        stopped="" if is_whole else "   STOPPED EARLY",
        notes="".join(f"\n  {note}" for note in f["notes"]),
        plateau=len(f["plateau"]),
        overfitting="     - too few trials or minutes to tell" if pbo is None else
        f"{pbo:>6.2f} (where nobody has skill: {low:.2f} to {high:.2f})",
        verdict="\n  ".join(verdicts),
    )  # fmt: skip


def format_walk(walk: dict[str, Any], count: int, rng: np.random.Generator) -> str:
    """Each window: what was chosen, net a minute in sample and out of it."""
    minutes, windows = walk["minutes"], walk["windows"]
    lines = [
        f"Walk-forward: {len(windows)} windows of {minutes} minutes, each traded with what was best\
 in the {LOOK_BACK * minutes} before it",
        "                       net a minute",
        "  from, UTC            in sample   out of it  fills   chosen",
    ]
    for w in windows:
        inside, outside = w["in_sample"], w["out_of_sample"]
        lines.append(
            f"  {clock_text(w['begin_ns'])}{inside.net.mean():>+11.3f}{outside.net.mean():>+12.3f}"
            f"{outside.fills.sum():>7,}   {in_words(json.loads(w['key']))}"
        )
    changes = f"{walk['changed']} of {len(windows) - 1} times"
    lines.append(f"  the choice changed {changes}")
    joined = {"walk-forward": walk["traded"], "as given": walk["given"]}
    summary, _ = summarize_bootstrap(joined, count, rng)
    return "\n".join([*lines, "", format_bootstrap(summary, "Out of sample, windows joined")])


# ---- Plots -------------------------------------------------------------------------

BLACK, BLUE, RED, GREEN = "black", "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's, which
SKY, YELLOW, PINK = "#56B4E9", "#F0E442", "#CC79A7"  # colour-blind readers can tell apart
Row = tuple[float, list[Callable[[Any], None]]]  # height in inches; one panel, or two
FIGURE_WIDTH, PANEL_HEIGHT, PAIR_HEIGHT = 8.8, 2.6, 4.4  # inches
DPI = 150
FEW = 4000  # decisions: more are thinned out
BINS = 1000  # of time, when thinned; about the pixels of a panel
FEW_FILLS = 300  # more get smaller marks
UTC_FROM_S = 3 * HOUR_S  # a longer span shows the time of day


def thin(rows: np.ndarray, by_last: list[int]) -> np.ndarray:
    """At most two rows for each of BINS bins of time: minima, then maxima, of the columns.

    A curve through these looks like one through all rows. The columns by_last, where
    the extremes would only be noise, show their last value. Column 0 is the time.
    """
    if len(rows) <= FEW:
        return rows
    t = rows[:, 0]
    bins = ((t - t[0]) / (t[-1] - t[0]) * BINS).astype(int)
    starts = np.flatnonzero(np.diff(bins, prepend=-1))
    low, high = (pick.reduceat(rows, starts, axis=0) for pick in (np.fmin, np.fmax))
    last = rows[np.append(starts[1:], len(rows)) - 1]
    low[:, by_last] = high[:, by_last] = last[:, by_last]
    return np.stack([low, high], axis=1).reshape(-1, rows.shape[1])


def time_axis(result: Result) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """The time axis that suits the span: its label, and seconds since the start as x."""
    span_s, start = (result.last_ns - result.first_ns) / NS, clock_text(result.first_ns)
    if span_s > UTC_FROM_S:  # matplotlib counts in days since 1970
        return "UTC", lambda t_s: (result.first_ns / NS + t_s) / DAY_S
    if span_s > 3 * MINUTE_S:
        return f"minutes since {start} UTC", lambda t_s: t_s / MINUTE_S
    return f"seconds since {start} UTC", lambda t_s: t_s


def head(ax: Any, title: str, label: str) -> None:
    """Title at the left, legend beside it, above the data; unit at the axis."""
    ax.set_title(title, loc="left", fontsize=10, fontweight="bold")
    ax.set_ylabel(label)
    ax.margins(x=0.01)
    ax.grid(alpha=0.25, linewidth=0.5)
    ax.legend(loc="lower right", bbox_to_anchor=(1.01, 0.985), ncols=6, frameon=False,
              fontsize=8.5, handlelength=1.3, columnspacing=1.0, borderpad=0.2)  # fmt: skip


def plot_prices(
    ax: Any, c: dict[str, np.ndarray], fills: list[Fill], at: np.ndarray, label: str
) -> None:
    """Mid, our quotes, and where they were filled."""
    ax.plot(c["x"], c["mid"], color=BLACK, linewidth=0.9, label="mid", zorder=4)
    for name, color in (("bid", BLUE), ("ask", RED)):
        ax.step(c["x"], c[name], where="post", color=color, linewidth=0.6, alpha=0.6,
                label=f"our {name}")  # fmt: skip
    prices = np.array([fill.price for fill in fills])
    for side, verb, color, mark in ((1, "bought", BLUE, "^"), (-1, "sold", RED, "v")):
        own = np.array([fill.side == side for fill in fills], bool)
        ax.scatter(at[own], prices[own], color=color, marker=mark, zorder=5, linewidths=0.3,
                   s=30 if len(fills) <= FEW_FILLS else 15, edgecolors="white",
                   label=f"{verb} ({own.sum():,})")  # fmt: skip
    ax.ticklabel_format(axis="y", useOffset=False)
    if label == "UTC":
        from matplotlib import dates

        ax.xaxis_date()
        ax.xaxis.set_major_formatter(dates.ConciseDateFormatter(dates.AutoDateLocator()))
    head(ax, "Price", "USDT")


def plot_inventory(ax: Any, c: dict[str, np.ndarray], limit: float, coin: str) -> None:
    """What we hold, between the limits."""
    ax.step(c["x"], c["inventory"], where="post", color=BLACK, linewidth=0.9, label="held")
    for sign in (1, -1):
        ax.axhline(sign * limit, color=RED, linestyle="--", linewidth=1,
                   label="limit" if sign > 0 else None)  # fmt: skip
    ax.axhline(0, color="grey", linewidth=0.6)
    head(ax, "Inventory", coin)


def plot_equity(ax: Any, c: dict[str, np.ndarray], max_drawdown: float | None) -> None:
    """Gross, fees and net; the shade reaches from net up to its peak so far."""
    is_rebate = np.nansum(c["fees"][-1:]) < 0
    ax.fill_between(c["x"], c["net"], c["peak"], color=SKY, alpha=0.3, linewidth=0,
                    label=f"drawdown, at most {max_drawdown or 0:,.2f}")  # fmt: skip
    for values, color, name in (
        (c["gross"], GREEN, "gross"),
        (-c["fees"], PINK, "rebates" if is_rebate else "fees, as a loss"),
        (c["net"], BLACK, "net = gross " + ("+ rebates" if is_rebate else "- fees")),
    ):
        ax.plot(c["x"], values, color=color, linewidth=1.2, label=name)
    ax.axhline(0, color="grey", linewidth=0.6)
    head(ax, "Result", "USDT")


def plot_spread(ax: Any, c: dict[str, np.ndarray], label: str) -> None:
    """The terms of the base spread, stacked, and the spread that was quoted."""
    names = ("volatility", "liquidity", "depth")
    terms = [c[f"{name}_bps"] for name in names]
    ax.stackplot(c["x"], terms, labels=names, colors=(SKY, YELLOW, PINK), alpha=0.8,
                 step="post")  # fmt: skip
    ax.step(c["x"], c["spread_bps"], where="post", color=BLACK, linewidth=0.7, label="as quoted")
    ax.set_ylim(bottom=0)
    ax.set_xlabel(label)
    head(ax, "Spread: its base by terms, and as quoted", "bps")


def plot_markouts(ax: Any, markouts: dict[str, Any], fee_bps: float) -> None:
    """Markouts over the horizon, by side. 0 s has no place on a log axis: it stands left."""
    at = np.array([HORIZONS_S[0] / 4, *HORIZONS_S])
    for (name, cells), color, dodge in zip(
        markouts.items(), (BLACK, BLUE, RED), (1, 0.95, 1.05)
    ):
        mean, high = (
            np.array([cell[key] for cell in cells.values()], float)  # None becomes nan
            for key in ("mean_bps", "high_bps")
        )
        ax.errorbar(at * dodge, mean, yerr=np.nan_to_num(high - mean), color=color, capsize=3,
                    marker="o", markersize=4, linewidth=1.2, label=name)  # fmt: skip
    ax.axhline(0, color="grey", linewidth=0.8)
    ax.axhline(fee_bps, color=PINK, linestyle="--", linewidth=1, label="maker fee, to be earned")
    if not markouts["both"]["0 s"]["fills"]:
        ax.text(0.5, 0.5, "no fill", transform=ax.transAxes, ha="center")
    ax.set_xscale("log")
    ax.set_xlim(at[0] / 1.3, at[-1] * 1.3)
    ax.set_xticks(at, ["0: effective\nhalf spread", *(f"{h:g}" for h in HORIZONS_S)])
    ax.minorticks_off()
    ax.axvline(HORIZONS_S[0] / 2, color="grey", linestyle=":", linewidth=1)  # the axis breaks
    ax.set_xlabel("seconds after the fill")
    head(ax, "Markout of our fills ± 95 %; below 0: run over", "bps")


def plot_columns(decisions: np.ndarray) -> dict[str, np.ndarray]:
    """The decisions' columns and three more, thinned out where they are many."""
    c = dict(zip(DECISION, decisions.T))
    c["net"] = c["gross"] - c["fees"]
    c["peak"] = running_peak(np.nan_to_num(c["net"]))
    c["spread_bps"] = (c["ask"] - c["bid"]) / c["mid"] * 1e4
    by_last = [k for k, name in enumerate(c) if name == "mid" or name.endswith("_bps")]
    return dict(zip(c, thin(np.column_stack(list(c.values())), by_last).T))


def plot_bootstrap(
    ax: Any, summary: dict[str, Any], drawn: np.ndarray, what: str = "Net"
) -> None:
    """How net scatters over the resamples, and the middle 95 % of it."""
    for (name, column), values, color in zip(summary["of"].items(), drawn, (BLUE, PINK)):
        net = column["net_usdt"]
        ax.hist(values, bins=60, color=color, alpha=0.6, density=True,
                label=f"{name}: {net['low']:+.2f} to {net['high']:+.2f}")  # fmt: skip
        ax.axvline(net["value"], color=color, linewidth=2)
        for bound in ("low", "high"):
            ax.axvline(net[bound], color=color, linestyle="--", linewidth=1)
    ax.axvline(0, color="grey", linewidth=0.8)
    ax.set_yticks([])
    ax.set_xlabel("net in a resample, USDT; line: as it was, dashed: middle 95 %")
    head(ax, f"{what}: {summary['periods']:,} minutes, resampled", "how often")


def plot_regimes(ax: Any, regimes: dict[str, dict[str, Any]], whose: str = "") -> None:
    """Gross, fees and net of the minutes of each regime."""
    names = ["not classed", *VOLATILITIES, *DIRECTIONS]
    at = np.array([0.0, 1, 2, 3, 4.5, 5.5])  # the same minutes again, by another view
    ax.axvline(3.75, color="grey", linestyle=":", linewidth=1)
    for k, (name, sign, color) in enumerate((("gross", 1, GREEN), ("fees", -1, PINK),
                                             ("net", 1, BLACK))):  # fmt: skip
        values = [sign * regimes[regime][f"{name}_usdt"] for regime in names]
        ax.bar(at + 0.25 * (k - 1), values, 0.25, color=color,
               label="fees, as a loss" if name == "fees" else name)  # fmt: skip
    half = [regimes[n]["minutes"] * regimes[n]["net_a_minute_half_width"] for n in names]
    net = [regimes[n]["net_usdt"] for n in names]
    ax.errorbar(at + 0.25, net, yerr=np.nan_to_num(half), fmt="none", color="grey", capsize=3)
    ax.axhline(0, color="grey", linewidth=0.6)
    ax.set_xticks(at, [f"{name}\n{regimes[name]['minutes']:,} min" for name in names])
    head(ax, f"Result by regimes {whose} (net ± 95 %)", "USDT")


def most_telling(grid: Mapping[str, Sequence[Any]], scores: dict[str, float], best: dict) -> list:
    """The two parameters along whose line through the best the score varies most."""
    spans = {}
    for name, values in grid.items():
        line = [scores.get(key_of(best | {name: value}), math.nan) for value in values]
        spans[name] = np.nanmax(line) - np.nanmin(line) if len(values) > 1 else -1.0
    chosen = sorted(grid, key=lambda name: -spans[name])[:2]
    return [name for name in grid if name in chosen]


def plot_heat(ax: Any, found: dict[str, Any], scores: dict[str, float], grid: Mapping) -> None:
    """The scores of a slice through the grid's best point, in sample."""
    on_grid = [key for key in map(key_of, expand_grid(grid)) if key in scores]
    best = json.loads(max(on_grid, key=scores.get))
    names = most_telling(grid, scores, best)
    others = in_words({name: value for name, value in best.items() if name not in names})
    star = in_words({name: found["best"][name] for name in names})
    ax.set_title(f"In sample, {UNITS[found['objective']]}{others and ', at '}{others}\n"
                 f"best: {star}", loc="left", fontsize=9)  # fmt: skip
    ax.set_xlabel(names[-1])
    if len(names) == 1:
        points = sorted((json.loads(key)[names[0]], score) for key, score in scores.items())
        ax.plot(*zip(*points), marker="o", color=BLUE)
        return
    down, across = names
    keys = [[key_of(best | {down: y, across: x}) for x in grid[across]] for y in grid[down]]
    values = np.array([[scores.get(key, math.nan) for key in row] for row in keys])
    ax.imshow(values, origin="lower", aspect="auto", cmap="cividis")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (y, x), value in np.ndenumerate(values):
        if value == value:
            ax.text(x, y + 0.22, f"{value:.3g}", ha="center", fontsize=8,
                    color=BLACK if value > middle else "white")  # fmt: skip
        if keys[y][x] in found["plateau"]:
            corners = np.array([-1, -1, 1, 1, -1]) * 0.46, np.array([-1, 1, 1, -1, -1]) * 0.46
            ax.plot(x + corners[0], y + corners[1], color=RED, linewidth=1.5,
                    label="framed: inside the best's interval")  # fmt: skip
    place = [np.interp(found["best"][name], grid[name], range(len(grid[name]))) for name in names]
    if all(min(grid[name]) <= found["best"][name] <= max(grid[name]) for name in names):
        ax.plot(*place[::-1], "*", color=RED, markersize=16, markeredgecolor="white", label="best")
    ax.set_xticks(range(len(grid[across])), [f"{x:g}" for x in grid[across]])
    ax.set_yticks(range(len(grid[down])), [f"{y:g}" for y in grid[down]])
    ax.set_ylabel(down)
    legend = dict(zip(*ax.get_legend_handles_labels()[::-1]))  # each label once
    if legend:
        ax.legend(legend.values(), legend, loc="upper left", bbox_to_anchor=(0, -0.14), fontsize=8,
                  ncols=2, frameon=False)  # fmt: skip


def plot_scatter(ax: Any, found: dict[str, Any], tried: Tried, given: Trial) -> None:
    """Every trial's net a minute, in sample and out."""
    split, on_grid = found["split"], found["on_grid"]
    best = key_of(found["best"])
    points = {key: (t.net[:split].mean(), t.net[split:].mean()) for key, t in tried.items()}
    x, y = np.array(list(points.values())).T
    ax.scatter(x[:on_grid], y[:on_grid], s=14, color=BLUE, alpha=0.6, label="grid")
    ax.scatter(x[on_grid:], y[on_grid:], s=14, color=GREEN, alpha=0.6, label="refined")
    ax.scatter(given.net[:split].mean(), given.net[split:].mean(), s=50, color=BLACK,
               marker="D", label="as given")  # fmt: skip
    ax.scatter(*points[best], s=170, color=RED, marker="*", edgecolors="white", label="best")
    ax.axline((0, 0), slope=1, color="grey", linewidth=0.8, linestyle=":")
    ax.axhline(0, color="grey", linewidth=0.6)
    ax.axvline(0, color="grey", linewidth=0.6)
    ax.legend(fontsize=8, loc="upper left")
    ax.grid(alpha=0.25, linewidth=0.5)
    ax.set_xlabel("in sample")
    ax.set_ylabel("out of sample")
    ax.set_title("Net a minute of every trial, USDT;\ndotted: as good as in sample", loc="left",
                 fontsize=9)  # fmt: skip


def plot_walk(ax: Any, walk: dict[str, Any]) -> None:
    """Net out of sample, joined, and what each choice promised in sample."""
    length = walk["minutes"]
    net = np.append(0, np.cumsum(walk["traded"].net))
    given = np.append(0, np.cumsum(walk["given"].net))
    for k, window in enumerate(walk["windows"]):
        at = k * length
        promise = net[at] + window["in_sample"].net.mean() * length
        ax.plot([at, at + length], [net[at], promise], color=PINK, linestyle="--", linewidth=1.2,
                label="as promised in sample" if k == 0 else None)  # fmt: skip
        ax.axvline(at, color="grey", linestyle=":", linewidth=0.8)
    ax.plot(given, color=SKY, linewidth=1.2, label="as given")
    ax.plot(net, color=BLACK, linewidth=1.4, label="walk-forward")
    ax.axhline(0, color="grey", linewidth=0.6)
    ax.set_xlabel(f"minutes since {clock_text(walk['windows'][0]['begin_ns'])} UTC")
    head(ax, "Walk-forward: net out of sample", "USDT")


def result_rows(result: Result, metrics: dict[str, Any]) -> list[Row]:
    """The five rows of a run; the first four share the axis of time."""
    c, (label, to_x) = plot_columns(result.decisions), time_axis(result)
    c["x"] = to_x(c["t_s"])
    fills_s = np.array([fill.recv_ns - result.first_ns for fill in result.fills]) / NS
    limit, fee_bps = result.parameters.max_inventory, result.parameters.maker_fee_bps
    return [
        (4.4, [partial(plot_prices, c=c, fills=result.fills, at=to_x(fills_s), label=label)]),
        (1.75, [partial(plot_inventory, c=c, limit=limit, coin=result.coin)]),
        (2.9, [partial(plot_equity, c=c, max_drawdown=metrics["max_drawdown_usdt"])]),
        (2.35, [partial(plot_spread, c=c, label=label)]),
        (2.6, [partial(plot_markouts, markouts=metrics["markouts"], fee_bps=fee_bps)]),
    ]


def draw_figure(rows: Sequence[Row], title: str, path: Path | None, shared: int = 0) -> None:
    """As PNG, or on the screen without a path; so many rows on top share their axis x."""
    import matplotlib  # slow

    if path:
        matplotlib.use("Agg")
    from matplotlib import pyplot

    heights, panels = zip(*rows)
    figure, axes = pyplot.subplot_mosaic(
        [[f"{k} 0", f"{k} {len(draws) - 1}"] for k, draws in enumerate(panels)],
        height_ratios=heights,
        figsize=(FIGURE_WIDTH, sum(heights)), layout="constrained",
    )  # fmt: skip
    figure.suptitle(title, fontsize=12)
    for name, ax in axes.items():
        row, column = map(int, name.split())
        panels[row][column](ax)
    for k in range(1, shared):
        axes[f"{k} 0"].sharex(axes["0 0"])
        axes[f"{k - 1} 0"].tick_params(labelbottom=False)
    if path:
        feed.write_whole(path, partial(figure.savefig, dpi=DPI, format="png"))
    else:
        pyplot.show()
    pyplot.close(figure)


# ---- Command line ------------------------------------------------------------------

STRATEGIES = ("lp", "fixed", "as")
STOPS = (signal.SIGINT, signal.SIGTERM)
GRACE_S = 0.3  # for workers to end by themselves
MAX_WORKERS = 61  # in a pool, on Windows
TUNING = Path("tuning")  # where a search writes without --out
SCREEN = Path("-")  # --plot without a name
SOUND = {"book", "trades", "tickers", "acks", "pongs", "ignored", "block trades"}  # no defects


def write_results(result: Result, metrics: dict[str, Any], folder: Path) -> None:
    """metrics.json, fills.csv and equity.csv."""

    def fills(path: Path) -> None:
        with open(path, "w") as file:
            file.write("time_ns,recv_ns,side,price,qty,fee,mid_price,queue_ahead\n")
            for f in result.fills:
                side = "buy" if f.side == BID else "sell"
                numbers = (f.price, f.qty, f.fee, f.mid_price, f.queue_ahead)
                file.write(f"{f[0]},{f.recv_ns},{side},{','.join(f'{x:.9g}' for x in numbers)}\n")

    def equity(path: Path) -> None:
        columns = dict(zip(DECISION, result.decisions.T))
        net = columns["gross"] - columns["fees"]
        time_ns = result.first_ns + np.round(columns["t_s"] * NS).astype(np.int64)
        table = (columns["mid"], columns["inventory"], columns["gross"], columns["fees"], net)
        with open(path, "w") as file:
            file.write("time_ns,mid_price,inventory,gross,fees,net\n")
            for ns, *values in zip(time_ns.tolist(), *(column.tolist() for column in table)):
                file.write(f"{ns},{','.join('' if x != x else f'{x:.9g}' for x in values)}\n")

    text = json.dumps(metrics, indent=1)
    feed.write_whole(folder / "metrics.json", lambda path: path.write_text(text))
    feed.write_whole(folder / "fills.csv", fills)
    feed.write_whole(folder / "equity.csv", equity)


def describe_defects(counts: Counter) -> str:
    """What was found wrong with the data, to stand below the table; empty if nothing."""
    found = [f"{n:,} {what}" for what, n in counts.items() if n and what not in SOUND]
    text = textwrap.fill(f"Defects in the data: {', '.join(found)}", TABLE_WIDTH)
    return f"\n\n{text}" if found else ""


def make_setting(options: argparse.Namespace) -> Setting:
    """What the flags say of data, parameters and frictions."""
    open_history.cache_clear()  # the cache on disk may have changed since
    paths = tuple(path.absolute() for path in options.data or [SAMPLE])
    setting = Setting(
        paths=paths,
        stamps=stamps_of(paths),
        steps=(options.tick_size, options.lot_size, options.depth),
        given=given_parameters(options, ParameterFile(options.params) if options.params else None),
        strategy=strategy_of(options, options.strategy),
        outages=(),
        exchange=dict(participation=options.participation, impact_bps=options.impact_bps,
                      peer_rules=options.peer_rules),
    )  # fmt: skip
    rng, span_ns = np.random.default_rng(options.seed), history_of(setting).span_ns
    parameters_of(setting, {})  # judged before the work
    windows = draw_outages(options.outages, span_ns, rng)
    return dataclasses.replace(setting, outages=tuple(windows))


def strategy_of(options: argparse.Namespace, name: str) -> tuple:
    """A strategy's name, then what shapes it."""
    shape = (options.risk_aversion, options.fill_rate_per_s, options.fill_decay_per_bps)
    return (name, *shape) if name == "as" else (name,)


def make_rival(options: argparse.Namespace, setting: Setting) -> Setting:
    """What --against names: a strategy, or a file of parameters."""
    if options.against in STRATEGIES:
        return dataclasses.replace(setting, strategy=strategy_of(options, options.against))
    try:
        values = ParameterFile(Path(options.against)).values
        rival = dataclasses.replace(setting, given=setting.given | values)
        parameters_of(rival, {})  # judged before the work
    except UserError as error:
        text = str(error).removeprefix(f"--params {options.against}: ")
        raise UserError(f"--against {options.against}: {text}") from None
    return rival


def run(options: argparse.Namespace, executor: Executor | None = None) -> None:
    """Load, play, print, write."""
    if options.plot and options.plot != SCREEN and options.plot.parent != options.out:
        feed.check_plot_path(options.plot)
    is_search = options.tune or options.walk_forward
    for flag, is_wrong, needs in (
        ("log", is_search, "one run: not with --tune or --walk-forward"),
        ("against", is_search or not options.bootstrap,
         "--bootstrap N, without --tune or --walk-forward"),
        ("grid", not is_search, "--tune or --walk-forward"),
    ):  # fmt: skip
        if getattr(options, flag) and is_wrong:
            raise UserError(f"--{flag} needs {needs}")
    setting = make_setting(options)
    try:
        if is_search:
            run_search(options, setting, executor)
        else:
            run_once(options, setting)
    except BrokenPipeError:  # the reader of the table has gone
        raise
    except OSError as error:
        where = error.filename or options.out or TUNING
        raise UserError(f"{where} cannot be written: {error.strerror}") from None


def run_once(options: argparse.Namespace, setting: Setting) -> None:
    """One run: its table, its files, its picture."""
    folder, rng = options.out, np.random.default_rng(options.seed)
    rival = make_rival(options, setting) if options.against else None
    check_length(options, minutes_of(history_of(setting)))
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    log = feed.GrowingFile(options.log) if options.log else None
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        quotes = feed.GrowingFile(Path(scratch) / "quotes.csv") if folder else None
        stop = feed.stop_signal()
        result = play(setting, log=log, quotes=quotes, stop=stop)
        metrics, rows = measure(result), []
        print(format_table(metrics, result) + describe_defects(history_of(setting).counts))
        if options.bootstrap:
            trials = {"this run": cut_into_minutes(result)}
            if rival:
                name = Path(options.against).name[1 - WIDTH :]
                trials[name] = cut_into_minutes(play(rival, stop=stop))
            least = min(len(trial.net) for trial in trials.values())  # if one was stopped
            if least < LEAST_MINUTES:
                print(f"\nstopped after {least} minutes: too few to resample")
            else:
                trials = {name: trial.between(0, least) for name, trial in trials.items()}
                summary, drawn = summarize_bootstrap(trials, options.bootstrap, rng)
                metrics["bootstrap"] = to_plain(summary)
                rows.append((PANEL_HEIGHT, [partial(plot_bootstrap, summary=summary, drawn=drawn)]))
                print("\n" + format_bootstrap(summary))
        if options.regimes:
            regimes = summarize_regimes(result)
            metrics["regimes"] = to_plain(regimes)
            rows.append((PANEL_HEIGHT, [partial(plot_regimes, regimes=regimes)]))
            print("\n" + format_regimes(regimes))
        for file in (log, quotes):
            if file:
                file.close()
                if file.failure:
                    raise UserError(file.failure)
        if quotes:
            quotes.path.replace(folder / "quotes.csv")
            write_results(result, metrics, folder)
    if options.plot:
        title = full_title(result.title, result.is_synthetic)
        show_plot(options, "backtest.png", result_rows(result, metrics) + rows, title, shared=4)


@contextlib.contextmanager
def start_workers(count: int) -> Iterator[Executor]:
    """Processes of our own, which no Ctrl-C reaches: to answer it is for their parent. What
    they still play when we leave is ended.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), begin_work)
    is_main = threading.current_thread() is threading.main_thread()  # others may set no signal
    ours = {number: signal.signal(number, signal.SIG_IGN) for number in STOPS if is_main}
    for _ in range(count):  # a process for each, that inherits what is ignored
        pool.submit(int)
    for number, handler in ours.items():
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
    threading.Thread(target=end_with, args=[multiprocessing.parent_process()], daemon=True).start()


def end_with(parent: Any) -> None:
    """Wait for the parent's end, then end."""
    parent.join()
    os._exit(1)


def show_progress(clock_ns: Callable[[], int]) -> Callable[[str, int, int], None]:
    """Tells on stderr how far a search is, and the time left at its pace so far."""
    began: dict[str, tuple[int, int]] = {}

    def tell(what: str, done: int, total: int) -> None:
        since_ns, before = began.setdefault(what, (clock_ns(), done))
        text = f"{done:,} of {total:,} {what}"
        if before < done < total:
            left_s = (clock_ns() - since_ns) / NS / (done - before) * (total - done)
            text += f", {left_s:,.0f} s left"
        if sys.stderr.isatty():
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
        elif done in (before, total) or done % max(1, total // 10) == 0:
            print(text, file=sys.stderr, flush=True)

    return tell


def run_search(
    options: argparse.Namespace, setting: Setting, executor: Executor | None
) -> None:
    """--tune, --walk-forward: search, report, write."""
    history, stop = history_of(setting), feed.stop_signal()
    grid = parse_grid(options.grid, options.strategy)
    for one in expand_grid(grid):
        try:
            parameters_of(setting, one)
        except UserError as error:
            raise UserError(f"--grid: {error}") from None
    fixed = [name for name in grid if FIELDS[name].metadata["fixed"]]
    if fixed and options.walk_forward:
        raise UserError(f"{fixed[0]} cannot change while trading: leave it out of --walk-forward")
    check_length(options, minutes_of(history))
    folder = options.out or TUNING
    folder.mkdir(parents=True, exist_ok=True)
    for _ in history.pieces(0):
        pass  # archives are parsed here and not by every worker
    own = start_workers(options.workers or min(os.cpu_count() or 1, MAX_WORKERS))
    with contextlib.nullcontext(executor) if executor else own as workers:
        tell = show_progress(feed.session_clock())
        search = Search(setting, folder, workers, stop, tell)
        score = partial(score_in_sample, options=options)
        try:
            for trial in search.try_all([{}]).values():
                check_length(options, len(trial.net))
            tried = tune(search, grid, score, options.refine) if options.tune else {}
            walk = walk_forward(search, grid, options) if options.walk_forward else {}
        finally:
            search.file.close()
            if sys.stderr.isatty():
                print(file=sys.stderr)  # the line of progress ends
    report_search(options, search, grid, tried, walk)
    if search.file.failure:
        raise UserError(search.file.failure)


def minutes_of(history: History) -> int:
    """How many whole minutes there are, at most."""
    first_ns, last_ns = history.span_ns
    return max(len(whole_minutes(first_ns, np.array([last_ns - first_ns]) / NS)) - 1, 0)


def check_length(options: argparse.Namespace, minutes: int) -> None:
    """UserError for data too short for what is asked."""
    if options.tune:
        split_of(minutes)
    if options.walk_forward:
        window_length(minutes, options.walk_forward + LOOK_BACK)
    if options.bootstrap and minutes < LEAST_MINUTES:
        raise UserError(
            f"--bootstrap resamples minutes, of which the data hold {minutes}, fewer than "
            f"{LEAST_MINUTES}: give more --data"
        )


def report_search(
    options: argparse.Namespace, search: Search, grid: dict[str, list[Any]], tried: Tried,
    walk: dict[str, Any],
) -> None:  # fmt: skip
    """Print what was found; write it beside the trials."""
    history, folder = history_of(search.setting), search.path.parent
    symbol = f"{history.instrument.symbol} {history.instrument.category}"
    title = full_title(f"{symbol}   search over {history.name}", history.is_synthetic)
    rng, result = np.random.default_rng(options.seed), None
    rows, written = [], [search.path.name]
    if tried:
        found, drawn = summarize_search(search, tried, options, grid)
        print(format_search(found, title))
        best = json.dumps(search.setting.given | found["best"], indent=1)
        feed.write_whole(folder / "best.json", lambda path: path.write_text(best + "\n"))
        text = json.dumps(to_plain(found), indent=1)
        feed.write_whole(folder / "search.json", lambda path: path.write_text(text))
        written += ["best.json", "search.json"]
        scores = {key: score_in_sample(trial, options) for key, trial in tried.items()}
        (given,) = search.try_all([{}]).values()
        rows.append((PAIR_HEIGHT, [partial(plot_heat, found=found, scores=scores, grid=grid),
                                   partial(plot_scatter, found=found, tried=tried, given=given)]))
        outside = dict(summary=found["out_of_sample"], drawn=drawn, what="Net out of sample")
        rows.append((PANEL_HEIGHT, [partial(plot_bootstrap, **outside)]))
        if options.regimes:
            result = play(search.setting, found["best"], stop=search.stop)
    if walk:
        print("" if tried else title)
        print(format_walk(walk, options.bootstrap or RESAMPLES, rng))
        rows.insert(1, (PANEL_HEIGHT, [partial(plot_walk, walk=walk)]))
        if options.regimes and not tried:
            result = walk["result"]
    if result and not search.stop.is_set():
        regimes = summarize_regimes(result)
        whose = "of the best, all minutes" if tried else "of the walk-forward, all minutes"
        rows.append((PANEL_HEIGHT, [partial(plot_regimes, regimes=regimes, whose=whose)]))
        print("\n" + format_regimes(regimes, whose))
    if search.stop.is_set():
        print(f"stopped; trials kept, from which the same command goes on: {len(search.known):,}")
    print(f"written to {folder}: {', '.join(written)}")
    if rows and options.plot:
        show_plot(options, "search.png", rows, title)


def show_plot(
    options: argparse.Namespace, name: str, rows: list[Row], title: str, shared: int = 0
) -> None:
    """--plot: on the screen if there is one and no name was given, else a PNG file."""
    path = options.plot
    if path == SCREEN:
        from matplotlib import pyplot  # chooses a backend that can show, if there is one

        is_shown = pyplot.get_backend().lower() not in ("agg", "pdf", "ps", "svg", "template")
        path = None if is_shown else (options.out or Path()) / name
    draw_figure(rows, title, path, shared)
    if path:
        print(f"plot: {path}")


def build_arguments() -> argparse.ArgumentParser:
    """The command line of `python backtest.py`."""
    parser = feed.Arguments(
        prog="backtest.py", description="The paper market maker over recorded history."
    )
    add = parser.add_argument
    add("--data", type=Path, nargs="+", metavar="PATH",
        help="recording, its parts in order of time, archives of days, or a folder of these "
        "(default: the bundled synthetic sample)")  # fmt: skip
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
    add("--refine", type=number(0, kind=int), default=30, metavar="N",
        help="steps of local refinement from the grid's best point (default 30)")  # fmt: skip
    add("--objective", choices=tuple(UNITS), default="net",
        help="what is made large: net, Sharpe ratio of a minute, or net less a penalty on "
        "drawdown and inventory (default net)")  # fmt: skip
    add("--penalty", type=number(0), default=1.0, metavar="X",
        help="of --objective penalized: times drawdown plus 1 %% of the inventory (default 1)")
    add("--walk-forward", type=number(1, kind=int), nargs="?", const=WINDOWS, metavar="N",
        help="tune on two windows, trade the next, roll on, N times (default 4)")  # fmt: skip
    add("--workers", type=number(1, kind=int), metavar="N", help="processes (default: all cores)")
    add("--bootstrap", type=number(100, kind=int), metavar="N",
        help="intervals of net, Sharpe ratio, drawdown from N resamples of the minutes "
        "(a search takes 1000)")  # fmt: skip
    add("--against", metavar="NAME|FILE.json",
        help="with --bootstrap: the difference to this strategy, or these parameters")
    add("--regimes", action="store_true",
        help="result by calm, usual and wild, by ranging and trending minutes")  # fmt: skip
    add("--strategy", choices=STRATEGIES, default="lp",
        help="the linear program, or a baseline: a fixed spread (default_spread_bps), or "
        "Avellaneda-Stoikov (default lp)")  # fmt: skip
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
    add("--outages", type=number(0, kind=int), default=0, metavar="N",
        help="windows of 5 to 60 s in which we hear nothing and cannot cancel")  # fmt: skip
    add("--seed", type=number(0, kind=int), default=0, help="of outages and resamples (default 0)")
    add("--peer-rules", action="store_true", help="fill rules of hftbacktest, to compare")
    for flag, kind in (("--tick-size", str), ("--lot-size", str), ("--depth", int)):
        add(flag, type=kind, help="of the data, where they do not tell")
    add_parameter_flags(parser)
    return parser


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


def main(arguments: list[str] | None = None, executor: Executor | None = None) -> int:
    """python backtest.py; the exit status. A search runs on the workers of the executor, if
    one is given: that of Dask or MPI spreads it over a cluster.
    """
    options = build_arguments().parse_args(arguments)
    return feed.exit_cleanly(lambda: run(options, executor))


if __name__ == "__main__":
    sys.exit(main())
