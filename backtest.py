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

What this module does not do: it finds no parameters, and one path is no proof: the table
says how many fills and minutes stand behind each figure, with intervals.

Sources: Gueant, Lehalle, Fernandez-Tapia (2013); Avellaneda, Stoikov (2008); Lo (2002) for
the standard error of the Sharpe ratio.
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
import re
import shutil
import string
import sys
import tempfile
import textwrap
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
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
from optimize import FIELDS, Distances, Parameters, choose_distances

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
STEP = 100_000  # messages played before it is looked whether to stop


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


class Outages:
    """Plays tapes with windows in which we hear nothing; keeps what each of them cost."""

    def __init__(self, maker: MarketMaker, windows: list[tuple[int, int]]) -> None:
        self.maker, self.windows = maker, windows
        self.costs: list[dict[str, float]] = []

    def follow(self, tape: Tape, start: int, stop: int) -> None:
        """Messages start..stop-1 of a tape, with what begins and ends between them."""
        maker, at = self.maker, start
        while self.windows:
            begin_ns, end_ns = self.windows[0]
            until = end_ns if maker.is_cut_off else begin_ns
            then = int(tape.recv_ns[:stop].searchsorted(until))
            if then > at:
                maker.follow(tape, at, then)
                at = then
            if then >= stop:
                return
            if maker.is_cut_off:
                maker.reconnect()
                self.costs[-1]["net_usdt"] += maker.state.equity
                self.costs[-1]["fills"] += maker.state.fills
                self.windows.pop(0)
            else:
                maker.cut_off(begin_ns, end_ns)
                cost = dict(net_usdt=-maker.state.equity, fills=-maker.state.fills)
                self.costs.append(dict(start_ns=begin_ns, end_ns=end_ns) | cost)
        if at < stop:
            maker.follow(tape, at, stop)


class Markouts:
    """Where the mid went after each fill, worked out while the history is played."""

    def __init__(self) -> None:
        self.done: list[np.ndarray] = []  # (fills, horizons) of fills that are complete
        self.count = 0  # how many fills these are
        self.rest = np.zeros((0, len(HORIZONS_S)))  # of the fills after them, as far as known
        self.last = (np.zeros(0, np.int64), np.zeros(0))  # last book time, and the mid then

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
        self.last = times[-1:], mids[-1:]
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
    outages: list[tuple[int, int]] | None = None,
    overrides: dict[str, Any] | None = None,
    log: Any = None,
    quotes: Any = None,
    stop: threading.Event | None = None,
    **exchange: Any,
) -> Result:
    """Play a history through the market maker, up to where stop is set.

    log and quotes take lines; exchange: frictions of the PaperExchange.
    """
    maker = MarketMaker(
        parameters, history.instrument, log, overrides, strategy=strategy, **exchange
    )
    notebook, player, markouts = Notebook(maker, quotes), Outages(maker, outages or []), Markouts()
    is_stopped = stop.is_set if stop else lambda: False
    with paused_collector():
        late_ms = parameters.feed_latency_ms + parameters.clock_offset_ms  # by our clock
        for piece in history.pieces(round(late_ms * MS)):
            tape, start, end, tick_text = piece
            if tick_text != maker.instrument.tick_text:
                maker.change_tick(tick_text, int(tape.recv_ns[start]))
            for at in range(start, end, STEP):
                if not is_stopped():
                    player.follow(tape, at, min(at + STEP, end))
            markouts.see(maker.exchange, piece, maker.instrument.tick_size)
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


def summarize_markouts(result: Result) -> dict[str, dict[str, dict[str, Any]]]:
    """Markouts by side and horizon; at "0 s" the effective half spread.

    Fills of one minute are one cluster: a move that runs over one quote runs over the next.
    At 60 s neighbouring minutes overlap, and the interval is somewhat too narrow.
    """
    f = resting_fills(result.fills)
    is_resting = np.array([not fill.is_taker for fill in result.fills], bool)
    effective = f["side"] * (f["mid_price"] / f["price"] - 1) * 1e4
    later = result.markouts.reshape(-1, len(HORIZONS_S))[is_resting]
    markouts, minute = np.column_stack([effective, later]), f["time_ns"] // (MINUTE_S * NS)
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for name, sides in SIDES_OF.items():
        own = np.isin(f["side"], sides)
        table[name] = {
            f"{horizon:g} s": estimate_mean(markouts[own, k], minute[own])
            for k, horizon in enumerate((0, *HORIZONS_S))
        }
    return table


def changes_by_minute(first_ns: int, t_s: np.ndarray, net: np.ndarray) -> np.ndarray:
    """Change of net, USDT, from each whole minute (UTC) to the next.

    Net at a minute is that of the last decision up to it, and 0 before the first.
    """
    start_s = -first_ns % (MINUTE_S * NS) / NS
    grid = np.arange(start_s, (t_s[-1] if len(t_s) else 0) + TINY, MINUTE_S)
    row = np.searchsorted(t_s, grid + TINY, "right")
    return np.diff(np.append(0.0, net)[row])


def measure_sharpe(changes: np.ndarray, span_s: float) -> dict[str, Any]:
    """Sharpe ratio per minute, mean / standard deviation, with a 95 % interval.

    SE = sqrt((1 - g3 SR + (g4 - 1)/4 SR^2) / (n - 1)), g3 skew, g4 raw kurtosis. It takes
    the minutes as independent; where they are not, use the bootstrap. Annualised, times
    sqrt(365 x 1440), only when the data span three days.
    """
    n, sharpe, error = len(changes), np.nan, np.nan
    if n > 2 and changes.std() > TINY:
        sharpe = changes.mean() / changes.std(ddof=1)
        z = (changes - changes.mean()) / changes.std()
        g3, g4 = (z**3).mean(), (z**4).mean()
        error = math.sqrt((1 - g3 * sharpe + (g4 - 1) / 4 * sharpe**2) / (n - 1))
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


def measure(result: Result) -> dict[str, Any]:
    """Every metric by name, the unit in the suffix; None where nothing can be said."""
    columns = dict(zip(DECISION, result.decisions.T))
    is_known = np.isfinite(columns["gross"] - columns["fees"])
    t_s, net = columns["t_s"][is_known], (columns["gross"] - columns["fees"])[is_known]
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
    if isinstance(value, np.generic):
        value = value.item()
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


def full_title(result: Result) -> str:
    """The title, which never hides that data are synthetic."""
    is_said = not result.is_synthetic or "SYNTHETIC" in result.title
    return result.title + ("" if is_said else "   SYNTHETIC DATA, no market")


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
        title=full_title(result),
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


# ---- Plots -------------------------------------------------------------------------

BLACK, BLUE, RED, GREEN = "black", "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's, which
SKY, YELLOW, PINK = "#56B4E9", "#F0E442", "#CC79A7"  # colour-blind readers can tell apart
FIGURE_SIZE = (8.8, 14)  # inches; at 100 dpi 880 pixels wide
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


def plot_prices(ax: Any, c: dict[str, np.ndarray], fills: list[Fill], at: np.ndarray) -> None:
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


def plot_spread(ax: Any, c: dict[str, np.ndarray]) -> None:
    """The terms of the base spread, stacked, and the spread that was quoted."""
    names = ("volatility", "liquidity", "depth")
    terms = [c[f"{name}_bps"] for name in names]
    ax.stackplot(c["x"], terms, labels=names, colors=(SKY, YELLOW, PINK), alpha=0.8,
                 step="post")  # fmt: skip
    ax.step(c["x"], c["spread_bps"], where="post", color=BLACK, linewidth=0.7, label="as quoted")
    ax.set_ylim(bottom=0)
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


def plot_result(result: Result, metrics: dict[str, Any], path: Path | None) -> None:
    """One figure of five panels as PNG, or on the screen without a path."""
    import matplotlib  # slow to import, and needed by nobody else here

    if path:
        matplotlib.use("Agg")
    from matplotlib import dates, pyplot

    figure, axes = pyplot.subplots(
        5, 1, figsize=FIGURE_SIZE, height_ratios=(3, 1.2, 2, 1.6, 1.8), layout="constrained"
    )
    figure.suptitle(full_title(result), fontsize=12)
    c, (label, to_x) = plot_columns(result.decisions), time_axis(result)
    c["x"] = to_x(c["t_s"])
    fills_s = np.array([fill.recv_ns - result.first_ns for fill in result.fills]) / NS
    plot_prices(axes[0], c, result.fills, to_x(fills_s))
    plot_inventory(axes[1], c, result.parameters.max_inventory, result.coin)
    plot_equity(axes[2], c, metrics["max_drawdown_usdt"])
    plot_spread(axes[3], c)
    plot_markouts(axes[4], metrics["markouts"], result.parameters.maker_fee_bps)
    for ax in axes[1:4]:
        ax.sharex(axes[0])
    for ax in axes[:3]:
        ax.tick_params(labelbottom=False)
    axes[3].set_xlabel(label)
    if label == "UTC":
        axes[3].xaxis_date()
        axes[3].xaxis.set_major_formatter(dates.ConciseDateFormatter(dates.AutoDateLocator()))
    if path:
        feed.write_whole(path, partial(figure.savefig, dpi=DPI, format="png"))
    else:
        pyplot.show()
    pyplot.close(figure)


# ---- Command line ------------------------------------------------------------------

STRATEGIES = ("lp", "fixed", "as")
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


def choose_strategy(options: argparse.Namespace) -> Callable[..., Distances]:
    """The program, or a baseline."""
    if options.strategy == "fixed":
        return fixed_spread
    if options.strategy == "as":
        shape = (options.risk_aversion, options.fill_rate_per_s, options.fill_decay_per_bps)
        return partial(quote_avellaneda_stoikov, *shape)
    return choose_distances


def run(options: argparse.Namespace) -> None:
    """Load, play, print, write."""
    feed.check_plot_path(None if options.plot == SCREEN else options.plot)
    steps = options.tick_size, options.lot_size, options.depth
    history = load_history(options.data or [SAMPLE], *steps)
    given = given_parameters(options, ParameterFile(options.params) if options.params else None)
    parameters = choose_parameters(given, history.start, history.instrument)
    rng = np.random.default_rng(options.seed)
    folder = options.out
    try:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        log = feed.GrowingFile(options.log) if options.log else None
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            quotes = feed.GrowingFile(Path(scratch) / "quotes.csv") if folder else None
            result = run_backtest(
                history, parameters, choose_strategy(options),
                draw_outages(options.outages, history.span_ns, rng), given, log, quotes,
                feed.stop_signal(),
                participation=options.participation, impact_bps=options.impact_bps,
                peer_rules=options.peer_rules,
            )  # fmt: skip
            metrics = measure(result)
            print(format_table(metrics, result) + describe_defects(history.counts))
            for file in (log, quotes):
                if file:
                    file.close()
                    if file.failure:
                        raise UserError(file.failure)
            if quotes:
                quotes.path.replace(folder / "quotes.csv")
                write_results(result, metrics, folder)
        show_plot(options, result, metrics)
    except BrokenPipeError:  # the reader of the table has gone
        raise
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be written: {error.strerror}") from None


def show_plot(options: argparse.Namespace, result: Result, metrics: dict[str, Any]) -> None:
    """--plot: on the screen if there is one and no name was given, else a PNG file."""
    if options.plot is None:
        return
    path = options.plot
    if path == SCREEN:
        from matplotlib import pyplot  # chooses a backend that can show, if there is one

        is_shown = pyplot.get_backend().lower() not in ("agg", "pdf", "ps", "svg", "template")
        path = None if is_shown else (options.out or Path()) / "backtest.png"
    plot_result(result, metrics, path)
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
        help="show five panels; as PNG where a name is given or there is no screen")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="metrics.json, quotes, fills, equity as CSV")
    add("--log", type=Path, metavar="FILE", help="every decision as CSV")
    add("--params", type=Path, metavar="FILE.json", help="parameters")
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
    add("--seed", type=number(0, kind=int), default=0, help="of the outages' times (default 0)")
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


def main(arguments: list[str] | None = None) -> int:
    """python backtest.py; the exit status."""
    options = build_arguments().parse_args(arguments)
    return feed.exit_cleanly(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
