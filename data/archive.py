"""Bybit's archives as recordings: downloads past days, makes each into a file to replay.

    python data/archive.py 2026-09-01 [DAY ...] [--symbol BTCUSDT] [--category linear]

The problem. For each UTC day Bybit publishes the order book's messages (zip) and the
trades (csv.gz), while this program reads recordings, lines `<recv_ns> <message>`. So each
day is made into one, once, and nothing else knows of archives:

    data/archive/linear/2026-09-01_BTCUSDT_ob200.data.zip   downloaded, about 300 MB
    data/archive/linear/BTCUSDT2026-09-01.csv.gz            downloaded, about 70 MB
    data/archive/BTCUSDT-linear-2026-09-01.jsonl.gz         the recording

The book's lines are the socket's own messages and stay as they are. The trades become
`publicTrade` messages, one a millisecond. All stand in the order of exchange time, trades
first at equal times: what a trade took is missing from the book pushed then. Archives
hold no receive times: exchange time + --feed-latency-ms stands for them.

What is lost. Only what happened in that UTC day goes in, so that days follow each other
without overlap. A day's first snapshot comes about a second after midnight: until then
there are trades alone (the book of that second ends the file of the day before).

Units: _ms and _us count from 1970 on the exchange's clock; prices and sizes stay texts.
What it does not do: it checks neither prices nor `u` of the book, since whoever plays the
recording does (`python feed.py info FILE` shows it), and it resumes no download.

Sources: the readers of these files in hftbacktest (data/utils/bybithistmktdata.py) and
nautilus_trader (adapters/bybit/loaders.py); Bybit's V5 documentation for the messages.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gzip
import heapq
import http.client
import io
import json
import logging
import math
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from itertools import chain, groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import feed  # noqa: E402  (it stands in the folder above)
from feed import MALFORMED, MS, UserError  # noqa: E402

import numpy as np  # noqa: E402

BOOK_HOST = "https://quote-saver.bycsi.com/orderbook"
TRADES_HOST = "https://public.bybit.com"
LAST_OB500 = date(2025, 8, 20)  # linear order books had 500 levels a side until then, now 200
WAITS_S = (0, 2, 4, 8, 16)  # before each try of a download, s
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
DAY_MS = 86_400_000
UNIT = Decimal("1e-12")  # USDT, finer than any price
INFLATION, SMALL = 100, 64 << 20  # text / file: a book has 5 to 25; bytes always allowed
Line = tuple[int, str]  # exchange time in ms, message


# ---- A day and its two files -------------------------------------------------------


class Day(NamedTuple):
    """A UTC day of a market, and where Bybit keeps its order book and its trades."""

    date: date
    number: int  # days since 1970
    symbol: str
    category: str  # linear or spot
    depth: int  # levels a side of the archived book
    urls: tuple[str, str]


def parse_day(text: str, symbol: str, category: str) -> Day:
    """The day that a text such as 2026-09-01 names; UserError if it names none."""
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise UserError(f"{text!r} is no day: write it as 2026-09-01 (UTC)") from None
    depth = 500 if category == "linear" and day <= LAST_OB500 else 200
    book = f"{BOOK_HOST}/{category}/{symbol}/{day}_{symbol}_ob{depth}.data.zip"
    folder, joint = ("spot", "_") if category == "spot" else ("trading", "")
    trades = f"{TRADES_HOST}/{folder}/{symbol}/{symbol}{joint}{day}.csv.gz"
    return Day(day, (day - date(1970, 1, 1)).days, symbol, category, depth, (book, trades))


def download(url: str, path: Path) -> None:
    """Download a file, TLS verified. UserError where Bybit refuses it or all tries fail."""
    request, reason = urllib.request.Request(url, headers=feed.USER_AGENT), ""  # else status 403

    def fetch(draft: Path) -> None:
        with urllib.request.urlopen(request, timeout=feed.CONNECT_S) as answer:
            with draft.open("wb") as file:
                shutil.copyfileobj(answer, file)
            if answer.length:  # subtle: the library does not complain of an early end
                raise OSError(f"it ended {answer.length} bytes too early")

    for wait_s in WAITS_S:
        time.sleep(wait_s)
        try:
            return feed.write_whole(path, fetch)
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"status {error.code}"
            if error.code < 500:
                remedy = "a day's file appears the next day: check DAY, --symbol, --category"
                remedy = "too many requests: wait 10 min" if error.code == 403 else remedy
                raise UserError(f"{url} is refused ({reason}): {remedy}") from None
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", 0) in OF_THE_DISK:  # waiting does not help
                raise
            reason = str(error) or type(error).__name__
    raise UserError(f"{url} cannot be downloaded ({reason}): run it again later")


def open_archive(path: Path) -> BinaryIO:
    """What is packed in a gzip, or in a zip's only file."""
    if path.suffix == ".gz":
        return gzip.open(path)
    with zipfile.ZipFile(path) as archive:  # what is opened in it stays open
        members = archive.infolist()
        if len(members) != 1:
            raise ValueError(f"it holds {len(members)} files, not one")
        return io.BufferedReader(archive.open(members[0]))


def archive_lines(path: Path, counts: Counter[str]) -> Iterator[str]:
    """The lines of an archive, up to where it is damaged, if it is.

    Memory stays small whatever the file claims or inflates to. UserError if nothing can be
    read; damage further on is a warning, and counted.
    """
    is_read = False
    try:
        room = max(SMALL, INFLATION * path.stat().st_size)
        with open_archive(path) as file:
            while line := file.readline(feed.MAX_MESSAGE):
                room -= len(line)
                if room < 0 or len(line) == feed.MAX_MESSAGE:
                    raise ValueError("a line, or the whole, is absurdly long")
                is_read = True
                # Other systems' lines bear a byte order mark and carriage returns.
                if text := line.decode("utf-8", "replace").strip("\ufeff\r\n"):
                    yield text
    except Exception as error:  # damage makes zipfile and zlib raise nearly anything
        reason = feed.printable(getattr(error, "strerror", None) or str(error) or "cut off")
        if not is_read:
            raise UserError(f"{path} cannot be read ({reason}): delete it, run again") from None
        counts[f"{path.name} cut off"] += 1
        logging.warning("%s is damaged (%s): read up to there", path, reason)


# ---- The order book ----------------------------------------------------------------


def read_book(path: Path, day: Day, counts: Counter[str]) -> Iterator[Line]:
    """The day's order book messages as they are. Their times never go back."""
    topic, last_ms = f"orderbook.{day.depth}.{day.symbol}", day.number * DAY_MS
    for text in archive_lines(path, counts):
        # Nothing but a message of this book may pass, and no line that steers a session.
        try:
            message = feed.DECODER.decode(text)
            time_ms = feed.must_be(int, message["cts"] if "cts" in message else message["ts"])
            if message["topic"] != topic or time_ms // DAY_MS != day.number:
                raise ValueError
        except MALFORMED:
            counts["lines that are no book of the day"] += 1
            continue
        counts["book messages"] += 1
        last_ms = max(last_ms, time_ms)
        yield last_ms, text
    if counts[f"{path.name} cut off"]:  # what comes after it cannot be vouched for
        yield last_ms, feed.control_line("lost", reason="the archive is cut off")


def first_snapshot(path: Path, day: Day) -> tuple[int, str, str]:
    """The day's first snapshot: its time in ms, its text, and the coarsest tick that fits it."""
    for time_ms, text in read_book(path, day, Counter()):
        with contextlib.suppress(*MALFORMED):
            message = feed.DECODER.decode(text)
            rows = message["data"]["b"] + message["data"]["a"]
            if message["type"] == "snapshot" and rows:
                # The greatest common divisor of all prices, exactly: of 4.5 and 6.0 it is 1.5.
                units = [int(Decimal(price) / UNIT) for price, _ in rows if feed.size_of(price)]
                return time_ms, text, f"{(math.gcd(*units) * UNIT).normalize():f}"
    raise UserError(f"{path} holds no order book of {day.symbol} on {day.date}, unlike its name")


# ---- The trades --------------------------------------------------------------------

# The columns in files without a header, by their number. We need those with names of ours.
LINEAR = "timestamp,symbol,side,size,price,tick,id,gross,home,foreign"
SPOT = "id,timestamp,price,size,side"
UNTITLED = {10: LINEAR, 11: f"{LINEAR},rpi", 5: SPOT, 6: f"{SPOT},rpi"}

# A day has two million trades. Here each takes 81 bytes, a quarter of a tuple of texts.
TRADE = np.dtype("i8, S4, S16, S16, S36, ?")  # time_us, taker's side, price, size, id, is_rpi


def read_trades(path: Path, day: Day, tick: Decimal, counts: Counter[str]) -> Iterator[tuple]:
    """The day's trades in the order of the file, each as the fields of TRADE."""
    columns: list[str] = []
    for line in archive_lines(path, counts):
        # The first line names the columns; if it is a trade, its width tells them.
        if not columns:
            is_header = "timestamp" in line.lower()
            header = line.lower() if is_header else UNTITLED.get(line.count(",") + 1, "")
            columns = header.replace("volume", "size").replace("trdmatchid", "id").split(",")
            if missing := {"timestamp", "side", "size", "price", "id"} - set(columns):
                raise UserError(f"{path} has no column {', '.join(sorted(missing))}")
            if is_header:
                continue
        try:
            yield parse_trade(line, columns, day, tick)
        except MALFORMED:
            counts["rows that are no trade of the day"] += 1


def parse_trade(line: str, columns: list[str], day: Day, tick: Decimal) -> tuple:
    """One row as the fields of TRADE; it raises one of MALFORMED for no trade of the day."""
    fields = line.split(",")
    row = dict(zip(columns, fields))
    price, size, number, side = row["price"], row["size"], row["id"], row["side"].capitalize()
    if len(fields) != len(columns) or row.get("symbol", day.symbol) != day.symbol:
        raise ValueError("a row of another file")
    if not line.isascii() or max(len(price), len(size)) > 16 or len(number) > 36:
        raise ValueError("a text that does not fit TRADE")
    # Spot counts ms, linear seconds. A double holds our time to 0.3 us: whole us are exact.
    time_us = round(float(row["timestamp"]) * (1e3 if day.category == "spot" else 1e6))
    feed.level_of(price, tick, feed.HIT_SIDE[side])
    if not feed.size_of(size) or time_us // 1000 // DAY_MS != day.number:
        raise ValueError("a trade of nothing, or of another day")
    return time_us, side, price, size, number, row.get("rpi", "").lower() in ("1", "true")


def trade_messages(trades: np.ndarray, day: Day, counts: Counter[str]) -> Iterator[Line]:
    """Trades as Bybit's socket sends them, one message for each exchange millisecond."""
    # Equal times keep the order of matching; old files have the newest trade first.
    if np.sign(np.diff(trades["f0"])).sum() < 0:
        trades = trades[::-1]
    in_order = (trades[i].item() for i in np.argsort(trades["f0"], kind="stable"))
    for time_ms, group in groupby(in_order, key=lambda trade: trade[0] // 1000):
        # A trade that is equal in everything, its id too, was written twice.
        copies = list(group)
        different = dict.fromkeys(copies)
        counts["trades"] += len(different)
        counts["repeated trades"] += len(copies) - len(different)
        data = []
        for _, *texts, is_rpi in different:
            side, price, size, number = (text.decode() for text in texts)
            what = {"T": time_ms, "s": day.symbol, "S": side, "v": size, "p": price}
            data.append(what | {"i": number, "BT": False, "RPI": is_rpi})
        message = {"topic": f"publicTrade.{day.symbol}", "type": "snapshot", "ts": time_ms}
        yield time_ms, json.dumps(message | {"data": data}, separators=(",", ":"))


# ---- The recording -----------------------------------------------------------------


def convert(day: Day, book: Path, trades: Path, recording: Path, flags: argparse.Namespace) -> None:
    """Make a day's two files into a recording, and print what went in and what did not."""
    # The first snapshot tells the tick. If one is given, the snapshot must stand on it.
    first_ms, text, tick = first_snapshot(book, day)
    tick = flags.tick_size or tick
    instrument = feed.find_instrument(vars(flags) | {"tick_size": tick})
    feed.Parser(instrument, day.depth).parse(first_ms * MS, text)

    # Merge by time. All trades are in memory, since old files begin with the last.
    counts: Counter[str] = Counter()
    rows = np.fromiter(read_trades(trades, day, Decimal(tick), counts), TRADE)
    if not len(rows):
        raise UserError(f"{trades} holds no trade of {day.symbol} on {day.date}")
    midnight_ms = day.number * DAY_MS
    start = feed.control_line("start", **instrument.told, depth=day.depth)
    both = trade_messages(rows, day, counts), read_book(book, day, counts)
    by_time = heapq.merge(*both, key=lambda line: line[0])  # at equal times trades first

    def write(draft: Path) -> None:
        latency_ns = round(flags.feed_latency_ms * MS)
        with gzip.open(draft, "wt", compresslevel=4, encoding="utf-8", newline="\n") as file:
            for time_ms, text in chain([(midnight_ms, start)], by_time):
                file.write(f"{time_ms * MS + latency_ns} {text}\n")
            file.write(f"{time_ms * MS + latency_ns} {feed.control_line('end')}\n")

    feed.write_whole(recording, write)

    print(f"{recording}: {recording.stat().st_size / 1e6:.1f} MB, tick size {tick}")
    for label, number in sorted(counts.items()):
        print(f"  {label:<45}{number}")
    print(f"  no book in the first {(first_ms - midnight_ms) / 1000:g} s: that ends the day before")


def run(flags: argparse.Namespace) -> None:
    """Download and convert the days, one after the other."""
    # Judge every argument before anything is downloaded.
    market, latency_ms = (flags.symbol, flags.category), flags.feed_latency_ms
    if not (flags.symbol.isascii() and flags.symbol.isalnum()):
        raise UserError(f"--symbol {flags.symbol!r} must be letters and digits, as BTCUSDT")
    if not 0 <= latency_ms <= 60_000:
        raise UserError(f"--feed-latency-ms {latency_ms:g} must be from 0 to 60000")
    feed.find_instrument(vars(flags) | {"tick_size": flags.tick_size or "1"})
    days = [parse_day(text, *market) for text in flags.days]

    for day in days:
        recording = flags.out / f"{day.symbol}-{day.category}-{day.date}.jsonl.gz"
        if recording.exists():
            print(f"{recording} is there already: delete it to make it anew")
            continue
        # Order books of linear and spot bear the same names: each has its folder.
        folder = flags.out / day.category
        paths = [folder / url.rpartition("/")[2] for url in day.urls]
        folder.mkdir(parents=True, exist_ok=True)
        for url, path in zip(day.urls, paths):
            if not path.exists():
                print(f"downloading {url}", flush=True)
                download(url, path)
        convert(day, *paths, recording, flags)


def main(arguments: list[str] | None = None) -> int:
    """python data/archive.py DAY ...; the exit status."""
    parser = feed.Arguments(prog="archive.py", description="Bybit's archives as recordings.")
    parser.add_argument("days", nargs="+", metavar="DAY", help="as 2026-09-01")
    parser.add_argument("--symbol", default="BTCUSDT", type=str.upper, help="as Bybit writes it")
    parser.add_argument("--category", default="linear", choices=("linear", "spot"))
    parser.add_argument("--out", type=Path, default=Path("data/archive"), metavar="DIR")
    parser.add_argument("--feed-latency-ms", type=float, default=100.0, help="exchange to us (100)")
    parser.add_argument("--tick-size", help="price step, USDT (else that of the first snapshot)")
    parser.add_argument("--lot-size", help="quantity step, base coin")
    return feed.exit_cleanly(lambda: run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
