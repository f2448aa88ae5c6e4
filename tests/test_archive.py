"""Bybit's archives: two daily files become one recording, or one clear line.

Archives are written here in the documented formats by the standard library. What must
come out is the sample, or worked out by hand. Downloads go to a server on loopback.
"""

from __future__ import annotations

import errno
import gzip
import http.server
import json
import random
import subprocess
import sys
import threading
import zipfile
from decimal import Decimal
from itertools import islice
from pathlib import Path
from unittest.mock import Mock

import archive
import feed
from test_feed import book_text

import pytest

ROOT = Path(feed.__file__).parent
DAY, T0, DAY_MS = "2026-01-01", 1_767_225_600_000, 86_400_000  # its midnight, ms
HEADERS = {
    "linear": "timestamp,symbol,side,size,price,tickDirection,trdMatchID,grossValue,"
    "homeNotional,foreignNotional,RPI",
    "spot": "id,timestamp,price,volume,side,rpi",
}
RNG = random.Random(3)


# ---- Files in the documented formats -----------------------------------------------


def delta(u, ms, b=(), a=(), kind="delta", **more) -> str:
    return book_text(u, b, a, kind, **dict(ts=T0 + ms + 4, cts=T0 + ms) | more)


def snapshot(u, ms, prices=("99.9", "100.0", "100.1"), **more) -> str:
    bid, *asks = ((price, "1.5") for price in prices)
    return delta(u, ms, [bid], asks, "snapshot", **more)


def row(number, ms=5, side="Buy", size="0.03", price="100.10", rpi="0", stamp=None, spot=False):
    """A trade. Linear times have four decimals, as Bybit writes them."""
    stamp = f"{(T0 + Decimal(str(ms))) / 1000:.4f}" if stamp is None else stamp
    fields = [stamp, "BTCUSDT", side, size, price, "PlusTick", str(number), "1e+8", size, "3"]
    if spot:
        fields = [str(number), str(T0 + int(ms)), price, size, side.lower()]
    return ",".join(fields if rpi is None else [*fields, rpi])


ROWS = [row(i, 1000 * i) for i in range(1, 10)]
BOOK = [snapshot(5, 1000), *(delta(5 + i, 1000 + 100 * i) for i in range(1, 10))]


def lay(out, book=BOOK, rows=ROWS, category="linear", header=None, end="\n", members=1,
        pack=gzip.compress):  # fmt: skip
    """Write a day's two archives where downloads go. The header "" is none."""
    (out / category).mkdir(exist_ok=True)
    names = f"{DAY}_BTCUSDT_ob200.data.zip", f"BTCUSDT{'_' * (category == 'spot')}{DAY}.csv.gz"
    paths = out / category / names[0], out / category / names[1]
    with zipfile.ZipFile(paths[0], "w", zipfile.ZIP_DEFLATED) as file:
        for number in range(members):
            file.writestr(f"{number}.data", end.join([*book, ""]))
    header = HEADERS[category] if header is None else header
    paths[1].write_bytes(pack(end.join([header, *rows, ""]).encode()))
    return paths


def convert(out, *words) -> int:
    return archive.main([*words, DAY, "--out", str(out)])


def recorded(out, category="linear") -> list[tuple[float, dict]]:
    """(receive time in ms since midnight, message) between `start` and `end`."""
    pairs = feed.read_lines(out / f"BTCUSDT-{category}-{DAY}.jsonl.gz")
    lines = [(stamp / feed.MS - T0, json.loads(message)) for stamp, message in pairs]
    assert [lines[i][1]["event"] for i in (0, -1)] == ["start", "end"]
    return lines[1:-1]


def made(out, *words, category="linear", **archives) -> list[tuple[float, dict]]:
    """The recording of a day whose archives are there."""
    lay(out, category=category, **archives)
    assert convert(out, "--category", category, *words) == 0
    return recorded(out, category)


def trades_of(lines) -> list[list]:
    trades = [t for _, m in lines if m.get("topic") == "publicTrade.BTCUSDT" for t in m["data"]]
    return [[t[name] for name in ("T", "S", "v", "p", "i", "RPI")] for t in trades]


def told(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


class Host(http.server.BaseHTTPRequestHandler):
    """Serves the files of a folder, with what the plan holds for the next requests."""

    def do_GET(self):
        self.server.agents.append(self.headers["User-Agent"])
        path = self.server.folder / self.path.rpartition("/")[2]
        body = path.read_bytes() if path.exists() else b""
        act = self.server.plan.pop(0) if self.server.plan else 200 if body else 404
        self.send_response(200 if act == "cut" else act)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if act == "cut" else body)

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def host(monkeypatch, tmp_path):
    """Nobody else is asked in any test."""
    with http.server.HTTPServer(("127.0.0.1", 0), Host) as server:
        server.agents, server.plan, server.folder = [], [], tmp_path
        server.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(archive, "BOOK_HOST", f"{server.url}/orderbook")
        monkeypatch.setattr(archive, "TRADES_HOST", server.url)
        monkeypatch.setattr(archive, "WAITS_S", (0, 0.001, 0.001))
        monkeypatch.setenv("no_proxy", "*")
        threading.Thread(target=server.serve_forever, args=(0.002,)).start()
        yield server
        server.shutdown()


# ---- The recording of a day --------------------------------------------------------


@pytest.mark.parametrize("category, old", [("linear", False), ("linear", True), ("spot", False)])
def test_day_as_archives_is_the_day_as_websocket_messages(tmp_path, category, old):
    with gzip.open(ROOT / "data" / "sample.jsonl.gz", "rt") as file:
        sample = [json.loads(line.split(" ", 1)[1]) for line in islice(file, 2000)]
    session, rows, is_spot = [], [], category == "spot"
    for message in sample:
        if message.get("topic") == "orderbook.200.BTCUSDT":
            session.append((message["cts"], 1, message))
        elif message.get("topic") == "publicTrade.BTCUSDT":
            for t in message["data"]:
                fields = t["i"], t["T"] - T0, t["S"], t["v"], t["p"], str(int(t["RPI"]))
                rows.append(row(*fields, spot=is_spot))
                del t["L"], t["seq"]
            session.append((t["T"], 0, message | {"ts": t["T"]}))
    session.sort(key=lambda line: line[:2])
    book = [json.dumps(message) for _, is_book, message in session if is_book]
    lines = made(tmp_path, category=category, book=book, rows=rows[::-1] if old else rows)
    assert lines == [(ms - T0 + 100, message) for ms, _, message in session]

    # It can be played: with the right instrument, and every message is understood.
    recording = feed.Recording(tmp_path / f"BTCUSDT-{category}-{DAY}.jsonl.gz")
    assert recording.parser.instrument == feed.BUILT_IN["BTCUSDT", category]
    assert len([*recording.messages()]) == len(lines) + 2 and not recording.parser.problem
    assert recording.start["depth"] == 200


BAD_LINES = [
    "{", "nonsense", "[1]", "1", "\0", "[" * 9999, delta(6, 1050, topic="orderbook.50.BTCUSDT"),
    delta(6, 1050, topic="orderbook.200.XRPUSDT"), delta(6, 1050, cts=f"{T0}"),
    '{"op":"local","event":"lost","reason":"x"}',
]  # fmt: skip
BAD_ROWS = [
    ",", "1,2,3", "\0", row(1, side="Hold"), row(1, rpi=None), row("x" * 40), row("é"),
    row(1).replace("BTCUSDT", "DOTUSDT"), row(1, size="0"), row(1, size="inf"),
    *(row(1, stamp=text) for text in ("soon", "nan", "1e308", "-inf", "", "1e9", "9" * 30)),
    *(row(1, price=text) for text in ("0", "1e99", "nan", "-1", "100.15", "100.1" + "0" * 20)),
]  # fmt: skip


def test_only_sound_lines_of_the_day_go_in_by_exchange_time_and_trades_first(tmp_path, capsys):
    old = delta(4, 2000).replace(f', "cts": {T0 + 2000}', "")  # only `ts`, 4 ms later
    book = [snapshot(1, -1), *BAD_LINES, snapshot(2, 1070), *BAD_LINES, delta(3, 1000), old]
    book += [delta(5, DAY_MS - 1), delta(6, DAY_MS), snapshot(6, DAY_MS + 70)]
    rows = [row(1, 0), row(1, 0, "Sell"), row(1, 0, size="1"), row(1, 0, price="9"), row(1, 0.1)]
    times = (-0.1, 0, 1070.9, 1070, 2005, 2004, 1070, 3000, 4000, DAY_MS - 0.1, DAY_MS)
    rows += [text for i, ms in enumerate(times) for text in (row(i, ms), *BAD_ROWS, row(1, 0))]
    lines = made(tmp_path, "--feed-latency-ms", "2.5", book=book, rows=rows)
    short = [(ms, m["data"]["u"] if "u" in m["data"] else "".join(t["i"] for t in m["data"]))
             for ms, m in lines]  # fmt: skip
    assert short == [
        (2.5, "11111"), (1072.5, "362"), (1072.5, 2), (1072.5, 3), (2006.5, "5"), (2006.5, 4),
        (2007.5, "4"), (3002.5, "7"), (4002.5, "8"), (DAY_MS + 1.5, "9"), (DAY_MS + 1.5, 5),
    ]  # fmt: skip
    out = told(capsys)
    assert f"no book of the day {2 * len(BAD_LINES) + 3} repeated trades 12" in out
    assert f"no trade of the day {11 * len(BAD_ROWS) + 2} trades 13" in out
    assert "no book in the first 1.07 s" in out


@pytest.mark.parametrize("rpi", ["0", "1", "", "null", "true", "False", None])
@pytest.mark.parametrize("category", ["linear", "spot"])
@pytest.mark.parametrize("has_header", [True, False])
def test_columns_are_found_and_times_floored_and_equal_times_keep_their_order(
    tmp_path, category, rpi, has_header
):
    rows, trades = [], []
    for i in range(300):
        ms = (i - i % 4) * 287_987 + 0.1 * (i % 2)  # two and two are equal, or all four
        side, size = "Sell" if i % 3 else "Buy", f"{i + 1}"
        rows.append(row(i, ms, side, size, "100.1", rpi, spot=category == "spot"))
        trade = [T0 + int(ms), side, size, "100.1", str(i), rpi in ("1", "true")]
        trades.append((int(ms) if category == "spot" else ms, trade))
    header = HEADERS[category] if rpi is not None else HEADERS[category].rpartition(",")[0]
    if has_header:  # then columns may stand anywhere; and lines may end as on other systems
        table = [text.split(",") for text in (header, *rows)]
        places = RNG.sample(range(len(table[0])), len(table[0]))
        header, *rows = [",".join(fields[i] for i in places) for fields in table]
        archives = dict(book=["\ufeff" + BOOK[0], *BOOK[1:]], header="\ufeff" + header, end="\r\n")
    else:  # and here the newest trade comes first, as in old files
        archives, rows = dict(header=""), rows[::-1]
    lines = made(tmp_path, category=category, rows=rows, **archives)
    assert trades_of(lines) == [trade for _, trade in sorted(trades, key=lambda pair: pair[0])]
    assert [m for _, m in lines if "cts" in m] == list(map(json.loads, BOOK))


@pytest.mark.parametrize("words, tick", [((), "1.5"), (("--tick-size", "0.5"), "0.5")])
def test_tick_is_the_greatest_step_of_the_first_snapshot_or_given(tmp_path, words, tick):
    book = [delta(4, 900, kind="snapshot"), snapshot(5, 1000, ["4.5", "6.00", "9"])]
    made(tmp_path, *words, book=book, rows=[row(1, price="7.5")])
    recording = feed.Recording(tmp_path / f"BTCUSDT-linear-{DAY}.jsonl.gz")
    assert recording.parser.instrument.tick_text == tick


# ---- Damaged and wrong files, download ---------------------------------------------


@pytest.mark.parametrize("damage", ["", "x" * (1 << 19), "\n" * (1 << 22)], ids=len)
def test_what_is_damaged_overlong_or_a_bomb_is_used_up_to_there_and_the_book_then_lost(
    tmp_path, capsys, monkeypatch, damage
):
    monkeypatch.setattr(archive, "INFLATION", 0)
    monkeypatch.setattr(archive, "SMALL", 1 << 21)
    monkeypatch.setattr(feed, "MAX_MESSAGE", 1 << 18)
    numbers = [f"{RNG.random()}" for _ in range(4000)]
    book = BOOK[:1] + [delta(6 + i, 1100 + i, [("99.9", n)]) for i, n in enumerate(numbers)]
    rows = [row(number, i) for i, number in enumerate(numbers)]
    paths = lay(tmp_path, [*book, damage, *BOOK], rows, pack=lambda t: gzip.compress(t)[:-20_000])
    if not damage:
        content = bytearray(paths[0].read_bytes())
        content[50_000:50_099] = b"\xff" * 99
        paths[0].write_bytes(content)
    assert convert(tmp_path) == 0
    lines, out = recorded(tmp_path), told(capsys)
    trades, messages = trades_of(lines), [message for _, message in lines]
    books = [message for message in messages if "cts" in message]
    assert 500 < len(books) <= len(book) and books[:500] == list(map(json.loads, book[:500]))
    assert 500 < len(trades) < len(rows) and [t[4] for t in trades] == numbers[: len(trades)]
    assert messages[messages.index(books[-1]) + 1].get("event") == "lost"
    assert all(f"{path.name} cut off 1" in out for path in paths)


@pytest.mark.parametrize(
    "wrong, words, rule", [
        (dict(book=[snapshot(5, 1000, topic="orderbook.200.XRPUSDT")]), (), "unlike its name"),
        (dict(book=[snapshot(5, 9 * DAY_MS)]), (), "no order book of BTCUSDT on 2026-01-01"),
        (dict(members=2), (), "cannot be read (it holds 2 files, not one): delete it, run again"),
        (dict(pack=bytes), (), "cannot be read (Not a gzipped file"),
        (dict(rows=BAD_ROWS), (), "no trade of BTCUSDT on 2026-01-01"),
        (dict(header="timestamp,symbol,side,size"), (), "has no column id, price"),
        ({}, ("--tick-size", "0.5"), "check --tick-size"),
        ({}, ("2026-1-1",), "'2026-1-1' is no day: write it as 2026-09-01"),
        ({}, ("--symbol", "../x"), "must be letters and digits"),
        ({}, ("--symbol", "XRPUSDT"), "give --tick-size, --lot-size"),
        ({}, ("--feed-latency-ms", "-1"), "must be from 0 to 60000"),
    ]
)  # fmt: skip
def test_mistake_is_one_clear_line(tmp_path, host, capsys, wrong, words, rule):
    lay(tmp_path, **wrong)
    assert convert(tmp_path, *words) == 2
    error = capsys.readouterr().err
    assert rule in error and error.count("\n") == 1
    assert not (host.agents or list(tmp_path.glob("*.gz")))


def test_addresses_of_a_day_are_bybits(host):
    for day, category, book, trades in (
        ("2025-08-20", "linear", "2025-08-20_X_ob500.data.zip", "trading/X/X2025-08-20.csv.gz"),
        ("2025-08-21", "linear", "2025-08-21_X_ob200.data.zip", "trading/X/X2025-08-21.csv.gz"),
        ("2025-08-20", "spot", "2025-08-20_X_ob200.data.zip", "spot/X/X_2025-08-20.csv.gz"),
    ):
        urls = archive.parse_day(day, "X", category).urls
        assert urls == (f"{host.url}/orderbook/{category}/X/{book}", f"{host.url}/{trades}")


@pytest.mark.parametrize(
    "plan, requests, problem", [
        ([], 2, ""), ([503], 3, ""), ([500, "cut", 200, 502], 5, ""), ([503] * 9, 3, "status 503"),
        (["cut"] * 9, 3, "too early"), ([403], 1, "wait 10 min"), ([418], 1, "status 418"),
        ([404], 1, "appears the next day"), ([], 1, "No space left"),
    ]
)  # fmt: skip
def test_download_has_patience_or_ends_in_one_clear_line(
    tmp_path, host, capsys, monkeypatch, plan, requests, problem
):
    if problem == "No space left":
        is_full = Mock(side_effect=OSError(errno.ENOSPC, problem))
        monkeypatch.setattr(archive.shutil, "copyfileobj", is_full)
    host.folder, host.plan, out = lay(tmp_path)[0].parent, list(plan), tmp_path / "out"
    assert convert(out) == (2 if problem else 0)
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == bool(problem)
    assert host.agents == [feed.USER_AGENT["User-Agent"]] * requests
    assert problem or recorded(out) == made(tmp_path)
    kept = sorted(path.suffix for path in out.rglob("*") if path.is_file())
    assert kept == ([] if problem else [".gz", ".gz", ".zip"])  # no draft, nothing cut


def test_script_runs_from_anywhere_and_leaves_a_recording_alone_that_is_there(tmp_path, capsys):
    paths = lay(tmp_path)
    command = [sys.executable, ROOT / "data" / "archive.py", DAY, "--out", tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    lines = recorded(tmp_path)
    for path in paths:
        path.unlink()
    assert convert(tmp_path) == 0 and recorded(tmp_path) == lines
    assert f"BTCUSDT-linear-{DAY}.jsonl.gz is there already" in told(capsys)
