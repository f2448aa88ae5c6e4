"""The loopback exchange keeps its word: Bybit's answers, a true book, faults on demand."""

import json
import subprocess
import sys
import time
from itertools import pairwise

import exchange as exchange_module
import pytest
import websocket
from exchange import LoopbackExchange, compact, wait_until

BOOK, TRADES = "orderbook.200.BTCUSDT", "publicTrade.BTCUSDT"
FIRST_MS = 1_700_000_000_000  # receive time of the first line
LAG_MS = 25  # receive time minus exchange time


def line(ms: int, topic: str, kind: str, data) -> tuple[int, str]:
    stamp = FIRST_MS + ms - LAG_MS
    text = compact({"topic": topic, "type": kind, "ts": stamp, "data": data, "cts": stamp})
    return (FIRST_MS + ms) * 1_000_000, text


def market(deltas: int = 20, step_ms: int = 10) -> list[tuple[int, str]]:
    """A snapshot numbered 500, then a delta each step; every fifth comes after a trade."""
    lines = [(0, '{"op":"local"}')]
    lines += [line(0, BOOK, "snapshot", {"b": [["9", "1"], ["8", "2"]], "a": [["10", "3"]], "u": 500})]
    for i in range(1, deltas + 1):
        if i % 5 == 0:
            lines += [line(i * step_ms, TRADES, "snapshot", [{"p": "9", "T": FIRST_MS + i}])]
        rows = {"b": [["8", f"{i}.5"], ["9", str(i % 2)]], "a": [[f"{10 + i}", "1"]]}
        lines += [line(i * step_ms, BOOK, "delta", rows | {"u": 500 + i})]
    return lines


@pytest.fixture
def serve(monkeypatch):
    """Start an exchange; connect clients to it; end all when the test is over."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    opened = []

    def connect(url: str, *topics: str) -> websocket.WebSocket:
        opened.append(ws := websocket.create_connection(url, timeout=5))
        if topics:
            ws.send(compact({"req_id": "7", "op": "subscribe", "args": topics}))
        return ws

    def start(*topics: str, lines=None, **options):
        exchange = LoopbackExchange(lines or market(), **options)
        opened.insert(0, exchange)
        return exchange, connect(exchange.url, *topics), lambda *t: connect(exchange.url, *t)

    yield start
    for each in opened:
        each.close() if isinstance(each, LoopbackExchange) else each.shutdown()


def receive(ws: websocket.WebSocket, n: int = 1, topic: str = BOOK) -> list[dict]:
    """The next n messages of a topic."""
    messages = iter(lambda: json.loads(ws.recv()), None)
    wanted = (message for message in messages if message.get("topic", "") == topic)
    return [next(wanted) for _ in range(n)]


def steps(messages: list[dict], first: str = "snapshot") -> list[int]:
    """By how much u grows from message to message, of which only the first is a snapshot."""
    assert [m["type"] for m in messages] == [first] + ["delta"] * (len(messages) - 1)
    return [b["data"]["u"] - a["data"]["u"] for a, b in pairwise(messages)]


def rebuild(messages: list[dict]) -> dict:
    """The book that a client makes of a snapshot and deltas."""
    sides = {"b": {}, "a": {}, "u": messages[-1]["data"]["u"]}
    for side in "ba":
        for price, size in [row for message in messages for row in message["data"][side]]:
            sides[side][price] = size
        sides[side] = {price: size for price, size in sides[side].items() if size != "0"}
    return sides


def test_snapshot_and_deltas_make_the_true_book_and_times_keep_their_lag(serve):
    exchange, ws, connect = serve(BOOK)
    messages = receive(ws, 8)
    lag_ms = time.time_ns() / 1e6 - messages[-1]["cts"]
    assert LAG_MS - 2 < lag_ms < LAG_MS + 1_000
    assert {b["cts"] - a["cts"] for a, b in pairwise(messages)} <= {9, 10, 11}
    late = connect(BOOK)  # who comes later gets the book as it then is
    messages += receive(ws, 13)
    assert steps(messages) == [1] * 20 and exchange.finished.wait(5)
    assert rebuild(messages) == exchange.book() and len(exchange.book()["a"]) == 21
    (first,) = receive(late)
    rest = receive(late, 520 - first["data"]["u"])
    assert set(steps([first, *rest])) <= {1} and rebuild([first, *rest]) == exchange.book()
    assert exchange.connections == 2 and exchange.subscriptions == [[BOOK], [BOOK]]


def test_full_speed_sends_every_line_as_it_was_recorded(serve):
    lines = market(500)
    exchange, ws, _ = serve(BOOK, TRADES, lines=lines, speed=None)
    received = [ws.recv() for _ in lines]  # the ack stands for the control line
    assert received[1:] == [text for _, text in lines[1:]]
    assert exchange.sent == [(1, text) for text in received]


@pytest.mark.parametrize(("spot", "word"), [(False, ""), (True, "subscribe")])
def test_requests_are_answered_in_bybits_words(serve, spot, word):
    exchange, ws, _ = serve(spot=spot)

    def answer(op: str, *topics: str) -> tuple:
        ws.send(compact({"req_id": "r", "op": op, "args": topics}))
        reply = next(m for m in iter(lambda: json.loads(ws.recv()), None) if "op" in m)
        assert (reply["conn_id"], reply["req_id"], reply["op"]) == ("loopback-1", "r", op)
        return reply["success"], reply["ret_msg"]

    bad = "orderbook.500.BTCUSDT"
    assert answer("subscribe", BOOK, bad) == (False, f"error:handler not found,topic:{bad}")
    assert answer("subscribe", BOOK) == (True, word)
    assert answer("subscribe", BOOK) == (False, f"error:already subscribed,topic:{BOOK}")
    assert answer("ping") == (True, "pong") and exchange.pings == 1
    many = [f"tickers.{i}" for i in range(11)]
    assert answer("subscribe", *many)[1].startswith("args size >10" if spot else "error:handler")


@pytest.mark.parametrize(
    ("fault", "expected"),
    [(lambda e: e.skip(2), [1, 3]), (lambda e: e.repeat(), [0, 1]), (lambda e: None, [1])],
)
def test_a_skip_is_a_gap_and_a_repeat_a_repeat_while_the_book_stays_true(serve, fault, expected):
    exchange, ws, _ = serve(BOOK)
    messages = receive(ws, 3)
    fault(exchange)
    while messages[-1]["data"]["u"] < 520:
        messages += receive(ws)
    assert sorted(set(steps(messages))) == expected
    assert exchange.book()["u"] == 520 and len(exchange.book()["a"]) == 21


def test_after_a_restart_a_snapshot_is_numbered_one_and_the_rest_counts_on(serve):
    exchange, ws, _ = serve(BOOK)
    receive(ws, 3)
    exchange.restart()
    after = [next(m for m in iter(lambda: receive(ws)[0], None) if m["type"] == "snapshot")]
    assert exchange.finished.wait(5)
    after += receive(ws, exchange.book()["u"] - 1)
    assert after[0]["data"]["u"] == 1 and set(steps(after)) == {1}
    assert rebuild(after) == exchange.book()


@pytest.mark.parametrize(
    ("fault", "error"),
    [("reset_clients", ConnectionResetError),
     ("vanish", websocket.WebSocketConnectionClosedException)],
)  # fmt: skip
def test_a_cut_connection_looks_as_on_the_wire_and_the_market_goes_on(serve, fault, error):
    exchange, ws, connect = serve(BOOK)
    receive(ws, 3)
    getattr(exchange, fault)()
    with pytest.raises(error):
        receive(ws, 30)
    exchange.refuse(1)
    with pytest.raises(websocket.WebSocketBadStatusException):
        connect()
    assert exchange.finished.wait(5)
    assert rebuild(receive(connect(BOOK))) == exchange.book() and exchange.connections == 2


def test_anything_can_be_put_on_the_wire_and_a_goodbye_ends_it(serve):
    exchange, ws, _ = serve()
    assert wait_until(lambda: exchange.connections == 1)
    exchange.send("not json")
    exchange.send(b"\xff\xfe", websocket.ABNF.OPCODE_BINARY)
    exchange.send("x" * 70_000)
    exchange.close_clients(1012)
    assert [ws.recv(), ws.recv(), ws.recv()] == ["not json", b"\xff\xfe", "x" * 70_000]
    assert ws.recv_data(control_frame=True) == (websocket.ABNF.OPCODE_CLOSE, b"\x03\xf4")


@pytest.mark.parametrize("keep", [False, True])
def test_a_stall_is_silence_after_which_what_fell_due_is_lost_or_kept(serve, keep):
    exchange, ws, connect = serve(BOOK, lines=market(60))
    messages = receive(ws, 3)
    began = time.monotonic()
    exchange.stall(0.3, keep=keep)
    connect().send('{"op":"ping"}')  # whoever comes meanwhile hears nothing either
    while messages[-1]["data"]["u"] < 560:
        messages += receive(ws)
    grown = steps(messages)
    assert time.monotonic() - began > 0.29
    assert grown == [1] * 60 if keep else max(grown) > 5
    assert exchange.pings == 1 and not any("pong" in text for _, text in exchange.sent)


def test_late_trades_come_after_later_book_messages(serve):
    exchange, ws, _ = serve(BOOK, TRADES)
    exchange.late_trades(35)
    (trade,) = receive(ws, topic=TRADES)
    assert trade["data"][0]["T"] < receive(ws)[0]["cts"] - 30


def test_the_command_line_serves_a_recording_until_its_input_ends(tmp_path, serve):
    file = tmp_path / "recording.jsonl"
    file.write_text("".join(f"{stamp} {text}\n" for stamp, text in market()))
    command = [sys.executable, exchange_module.__file__, str(file), "--speed", "max"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        ws = websocket.create_connection(process.stdout.readline().strip(), timeout=5)
        ws.send(compact({"op": "subscribe", "args": [BOOK]}))
        assert steps(receive(ws, 21)) == [1] * 20
        ws.shutdown()
        process.stdin.close()
        assert process.wait(5) == 0
