"""The loopback exchange keeps its word: Bybit's answers, a true book, faults on demand."""

import contextlib
import json
import time
from itertools import pairwise

from exchange import LoopbackExchange, compact, served
from test_feed import BOOK, TICKERS, TRADE, PlainBook, record, session_lines

import pytest
import websocket


@pytest.fixture
def connect(monkeypatch):
    """Make a client of websocket-client's own, with a subscription."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with contextlib.ExitStack() as stack:

        def connect(url: str, *topics: str) -> websocket.WebSocket:
            ws = websocket.create_connection(url, timeout=5)
            stack.callback(ws.shutdown)
            ws.send(compact({"req_id": "7", "op": "subscribe", "args": topics}))
            assert json.loads(ws.recv())["success"]
            return ws

        yield connect


@pytest.fixture
def exchange():
    with LoopbackExchange(session_lines(count=100, step_ms=4)) as exchange:
        yield exchange


def receive(ws: websocket.WebSocket, n: int = 1, topic: str = BOOK) -> list[dict]:
    """The next n messages of a topic."""
    messages = map(json.loads, iter(ws.recv, None))
    wanted = (message for message in messages if message.get("topic") == topic)
    return [next(wanted) for _ in range(n)]


def receive_rest(ws: websocket.WebSocket, exchange: LoopbackExchange, messages: list) -> set[int]:
    """The book's messages to its end; by how much u grows after the last snapshot."""
    assert exchange.finished.wait(5)
    *_, last = (json.loads(text) for _, text in exchange.sent if BOOK in text)
    while messages[-1] != last:
        messages += receive(ws)
    del messages[: max(i for i, m in enumerate(messages) if m["type"] == "snapshot")]
    return {b["data"]["u"] - a["data"]["u"] for a, b in pairwise(messages)}


def rebuild(messages: list[dict]) -> dict:
    """The book that a client makes of a snapshot and deltas."""
    book = PlainBook()
    for message in messages:
        book.apply(json.dumps(message))
    return book.sides


@pytest.mark.parametrize(
    ("fault", "grows"), [("", {1}), ("skip", {1, 2}), ("repeat", {0, 1}), ("restart", {1})]
)
def test_whatever_befalls_a_client_the_book_is_true_and_in_time(exchange, connect, fault, grows):
    messages = receive(ws := connect(exchange.url, BOOK), 30)
    assert 0 <= time.time_ns() / 1e6 - messages[-1]["cts"] < 1_000
    assert {b["cts"] - a["cts"] for a, b in pairwise(messages)} <= {3, 4, 5}
    if fault:
        getattr(exchange, fault)()
    messages += receive(ws, 9)
    late = receive(other := connect(exchange.url, BOOK))  # he gets the book as it then is
    assert receive_rest(ws, exchange, messages) == grows
    assert messages[0]["data"]["u"] == (1 if fault == "restart" else 7_001)
    assert receive_rest(other, exchange, late) == {1}
    assert rebuild(late) == exchange.book()
    assert fault == "skip" or rebuild(messages) == exchange.book()
    assert exchange.connections == 2 and exchange.subscriptions == [[BOOK], [BOOK]]


@pytest.mark.parametrize("keep", [False, True])
def test_a_stall_is_silence_after_which_what_fell_due_is_lost_or_kept(exchange, connect, keep):
    messages, began_s = receive(ws := connect(exchange.url, BOOK), 3), time.monotonic()
    exchange.stall(0.2, keep=keep)
    ws.send('{"op":"ping"}')
    grows = receive_rest(ws, exchange, messages)
    assert time.monotonic() - began_s > 0.19 and exchange.pings == 1
    assert grows == {1} if keep else max(grows) > 5
    assert not any("pong" in text for _, text in exchange.sent)


def test_late_trades_come_after_later_book_messages(exchange, connect):
    exchange.late_trades(35)
    ws = connect(exchange.url, BOOK, TRADE)
    trades = receive(ws, topic=TRADE)[0]["data"]
    assert trades[0]["T"] < receive(ws)[0]["cts"] - 30


def test_the_command_line_sends_every_line_as_recorded_until_its_input_ends(tmp_path, connect):
    texts = [text for _, text in session_lines(count=50)]
    path = record(tmp_path / "r.gz", *texts)
    with served(path, "--max") as url:
        ws = connect(url, BOOK, TRADE, TICKERS)
        assert [ws.recv() for _ in texts] == texts
