"""The loopback exchange keeps its word: Bybit's answers, a true book, faults on demand.

A client of websocket-client's own talks to it; the recordings are built by hand here.
One test plays real recordings, found through the environment variable RECORDINGS.
"""

import json
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

import exchange as exchange_module
import pytest
import websocket
from exchange import LoopbackExchange, compact, read_recording, wait_until

BOOK, TRADES, TICKER = "orderbook.50.BTCUSDT", "publicTrade.BTCUSDT", "tickers.BTCUSDT"
FIRST_MS = 1_700_000_000_000  # receive time of the first line of every recording here
LAG_MS = 25  # receive time minus exchange time


# ---- Recordings built by hand ------------------------------------------------------


def book_line(ms: int, update_id: int, bids: list, asks: list, kind="delta") -> tuple:
    data = {"s": "BTCUSDT", "b": bids, "a": asks, "u": update_id, "seq": 7 * update_id}
    return line(ms, {"topic": BOOK, "type": kind, "data": data}, cts=True)


def trade_line(ms: int, price: str) -> tuple:
    trade = {"T": FIRST_MS + ms - LAG_MS, "s": "BTCUSDT", "S": "Sell", "v": "0.1"}
    data = [trade | {"p": price, "i": f"id-{ms}"}]
    return line(ms, {"topic": TRADES, "type": "snapshot", "data": data})


def ticker_line(ms: int, fields: dict, kind="delta") -> tuple:
    return line(ms, {"topic": TICKER, "type": kind, "data": fields, "cs": ms})


def line(ms: int, message: dict, cts: bool = False) -> tuple:
    message["ts"] = FIRST_MS + ms - LAG_MS + 1
    if cts:
        message["cts"] = FIRST_MS + ms - LAG_MS
    return (FIRST_MS + ms) * 1_000_000, compact(message)


def market(deltas: int = 20, step_ms: int = 20) -> list:
    """A snapshot, then a delta each step; every fifth comes with trade and ticker."""
    lines = [
        (FIRST_MS * 1_000_000, '{"op":"local","event":"start"}'),
        ticker_line(0, {"lastPrice": "100.0", "markPrice": "100.1"}, "snapshot"),
        book_line(0, 500, [["99.9", "1"], ["99.8", "2"]], [["100.0", "3"]], "snapshot"),
    ]
    for i in range(1, deltas + 1):
        bids, asks = [["99.8", f"{i}.5"], ["99.9", str(i % 2)]], [[f"{100 + i}.0", "1"]]
        lines.append(book_line(i * step_ms, 500 + i, bids, asks))
        if i % 5 == 0:
            lines.append(trade_line(i * step_ms, "99.9"))
            lines.append(ticker_line(i * step_ms, {"lastPrice": f"{100 + i}.0"}))
    return lines


# ---- A client ----------------------------------------------------------------------


@pytest.fixture
def connect(monkeypatch):
    """Connect to an exchange or a URL, and close the socket when the test is over.

    Only the environment keeps websocket-client from a proxy named there: its option
    http_no_proxy counts beside an http_proxy_host alone.
    """
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    opened = []

    def open_client(server) -> websocket.WebSocket:
        opened.append(websocket.WebSocket())
        opened[-1].settimeout(3)
        opened[-1].connect(getattr(server, "url", server))
        return opened[-1]

    yield open_client
    for ws in opened:
        ws.shutdown()


@pytest.fixture
def serve(connect):
    """Start an exchange with a client, and close it when the test is over."""
    opened = []

    def start(lines=None, **options):
        opened.append(LoopbackExchange(lines or market(), **options))
        return opened[-1], connect(opened[-1])

    yield start
    for server in opened:
        server.close()


def ask(ws: websocket.WebSocket, op: str, *topics: str, **more) -> None:
    ws.send(compact({"op": op, "args": list(topics), **more}))


def receive(ws: websocket.WebSocket, n: int = 1) -> list[dict]:
    return [json.loads(ws.recv()) for _ in range(n)]


def receive_books(ws: websocket.WebSocket, n: int) -> list[dict]:
    """The next n order book messages, whatever else comes between them."""
    books = []
    while len(books) < n:
        books += [m for m in receive(ws) if m.get("topic") == BOOK]
    return books


def rebuild(messages: list[dict]) -> dict:
    """The book that a client makes of snapshot and deltas."""
    book = {"b": {}, "a": {}, "u": None}
    for message in messages:
        if message["type"] == "snapshot":
            book = {"b": {}, "a": {}}
        for side in "ba":
            for price, size in message["data"][side]:
                book[side][price] = size
                if size == "0":
                    del book[side][price]
        book["u"] = message["data"]["u"]
    return book


def update_ids(messages: list[dict]) -> list[int]:
    return [message["data"]["u"] for message in messages]


# ---- The market --------------------------------------------------------------------


def test_snapshot_then_deltas_reproduce_the_true_book(serve):
    exchange, ws = serve(speed=4)
    ask(ws, "subscribe", BOOK)
    assert receive(ws)[0]["success"]
    messages = receive(ws, 21)
    assert [m["type"] for m in messages] == ["snapshot"] + ["delta"] * 20
    assert update_ids(messages) == list(range(500, 521))
    assert exchange.finished.wait(1)
    assert rebuild(messages) == exchange.book()
    assert exchange.book()["b"] == {"99.8": "20.5"}  # 99.9 was deleted by size "0"
    assert exchange.position == 21 + 4 + 5  # the control line does not count


def test_late_subscriber_gets_a_fresh_sorted_snapshot_and_deltas_from_there(serve):
    exchange, ws = serve()
    exchange.release()
    assert wait_until(lambda: exchange.position > 8)
    ask(ws, "subscribe", BOOK)
    first, *rest = messages = receive_books(ws, 5)
    assert first["type"] == "snapshot" and first["data"]["u"] > 500
    asks = [float(price) for price, _ in first["data"]["a"]]
    assert asks == sorted(asks) and len(asks) > 3
    assert update_ids(messages) == [first["data"]["u"] + i for i in range(5)]
    assert {m["type"] for m in rest} == {"delta"}


def test_a_disconnected_client_loses_messages_and_the_market_goes_on(serve, connect):
    exchange, ws = serve()
    ask(ws, "subscribe", BOOK)
    missed = receive_books(ws, 3)[-1]["data"]["u"] + 1
    ws.close()
    assert exchange.finished.wait(3)
    again = connect(exchange)
    ask(again, "subscribe", BOOK)
    snapshot = receive_books(again, 1)
    assert rebuild(snapshot) == exchange.book()
    assert snapshot[0]["data"]["u"] == 520 > missed
    assert exchange.connections == 2
    assert exchange.subscriptions == [[BOOK], [BOOK]]


def test_times_move_to_the_clock_and_keep_their_lag(serve):
    exchange, ws = serve()
    ask(ws, "subscribe", BOOK, TRADES, TICKER)
    lags = []
    while not any(lag[0] == TRADES for lag in lags[4:]):
        (message,) = receive(ws)
        if "topic" in message:
            stamp = message.get("cts") or message["ts"]
            if message["topic"] == TRADES:
                stamp = message["data"][0]["T"]
            lags.append((message["topic"], time.time_ns() / 1e6 - stamp))
    assert all(LAG_MS - 2 <= lag < LAG_MS + 500 for _, lag in lags), lags


def test_pacing_follows_a_clock_that_runs_faster_than_the_wall(serve):
    begin = time.monotonic_ns()
    lines = market(deltas=100, step_ms=200)  # 20 s
    clock = lambda: 10**18 + (time.monotonic_ns() - begin) * 50  # noqa: E731
    exchange, ws = serve(lines, clock_ns=clock)
    ask(ws, "subscribe", BOOK)
    messages = receive_books(ws, 101)
    steps = [b["cts"] - a["cts"] for a, b in zip(messages, messages[1:])]
    assert set(steps) <= {199, 200, 201}
    assert 0.3 < (time.monotonic_ns() - begin) / 1e9 < 3


def test_full_speed_sends_every_line_as_it_was_recorded(serve):
    lines = market(deltas=500)
    exchange, ws = serve(lines, speed=None)
    ask(ws, "subscribe", BOOK, TRADES, TICKER)
    received = [ws.recv() for _ in range(len(lines))]  # the ack for the control line
    assert received[1:] == [text for _, text in lines[1:]]
    assert exchange.sent == [(1, text) for text in received]


def test_held_market_starts_at_release(serve):
    exchange, ws = serve(hold=True)
    ask(ws, "subscribe", BOOK)
    assert receive(ws)[0]["success"]
    time.sleep(0.05)
    assert exchange.position == 0
    exchange.release()
    assert receive(ws)[0]["type"] == "snapshot"


def test_first_ticker_is_a_snapshot_with_all_fields_merged(serve):
    exchange, ws = serve(speed=None)
    exchange.release()
    assert exchange.finished.wait(3)
    ask(ws, "subscribe", TICKER)
    ack, ticker = receive(ws, 2)
    assert ticker["type"] == "snapshot"
    assert ticker["data"] == {"lastPrice": "120.0", "markPrice": "100.1"}


# ---- Requests ----------------------------------------------------------------------


def test_snapshot_may_come_before_the_ack(serve):
    exchange, ws = serve(speed=None, ack_after_data=True)
    exchange.release()
    assert exchange.finished.wait(3)
    ask(ws, "subscribe", BOOK, req_id="a")
    data, ack = receive(ws, 2)
    assert data["type"] == "snapshot" and ack["req_id"] == "a"


@pytest.mark.parametrize("spot, ret_msg", [(False, ""), (True, "subscribe")])
def test_acks_have_the_shape_of_their_socket(serve, spot, ret_msg):
    exchange, ws = serve(spot=spot)
    ask(ws, "subscribe", TRADES, req_id="r1")
    assert receive(ws)[0] == {
        "success": True,
        "ret_msg": ret_msg,
        "conn_id": "loopback-1",
        "req_id": "r1",
        "op": "subscribe",
    }
    ask(ws, "unsubscribe", TRADES, req_id="r2")
    ack = next(m for m in iter(lambda: receive(ws)[0], None) if "op" in m)
    assert (ack["op"], ack["req_id"], ack["success"]) == ("unsubscribe", "r2", True)


@pytest.mark.parametrize("bad", ["orderbook.500.BTCUSDT", "orderbook.50.btcusdt"])
def test_one_bad_topic_fails_the_whole_request(serve, bad):
    exchange, ws = serve(speed=None)
    ask(ws, "subscribe", BOOK, bad, req_id="r")
    (failure,) = receive(ws)
    assert failure["success"] is False and failure["req_id"] == "r"
    assert failure["ret_msg"] == f"error:handler not found,topic:{bad}"
    assert exchange.position == 0  # no subscription, no market
    ask(ws, "subscribe", BOOK)
    assert [m.get("success") for m in receive(ws, 2)] == [True, None]


def test_a_live_topic_cannot_be_subscribed_again(serve):
    exchange, ws = serve(hold=True)
    ask(ws, "subscribe", BOOK)
    ask(ws, "subscribe", BOOK, req_id="duplicate")
    _, failure = receive(ws, 2)
    assert failure["ret_msg"] == f"error:already subscribed,topic:{BOOK}"
    exchange.release()
    assert receive(ws)[0]["topic"] == BOOK  # the first one keeps delivering
    ask(ws, "unsubscribe", BOOK)
    ask(ws, "subscribe", BOOK)
    assert "snapshot" in [m.get("type") for m in receive(ws, 6)]


def test_spot_takes_ten_topics_a_request(serve):
    exchange, ws = serve(spot=True)
    ask(ws, "subscribe", *[BOOK] * 11)
    failure = {"success": False, "ret_msg": "args size >10", "conn_id": "loopback-1"}
    assert receive(ws) == [failure | {"op": "subscribe"}]


def test_nonsense_is_answered_and_the_socket_stays_open(serve):
    exchange, ws = serve()
    ws.send("hello")
    ws.send('["a list"]')
    ask(ws, "order")
    texts = [m["ret_msg"] for m in receive(ws, 3)]
    assert texts[0] == "Failed to decode incoming data:hello"
    assert texts[1].startswith("Failed to decode") and texts[2] == "error:invalid op"
    ask(ws, "ping")
    assert receive(ws)[0]["ret_msg"] == "pong"


@pytest.mark.parametrize("spot", [False, True])
def test_pongs_have_bybits_two_shapes(serve, spot):
    exchange, ws = serve(spot=spot)
    ws.send('{"op":"ping"}')
    pong = {"success": True, "ret_msg": "pong", "conn_id": "loopback-1", "op": "ping"}
    assert receive(ws) == [pong if spot else pong | {"req_id": ""}]
    assert exchange.pings == 1
    ws.ping("here")
    opcode, frame = ws.recv_data_frame(control_frame=True)
    assert (opcode, frame.data) == (websocket.ABNF.OPCODE_PONG, b"here")


def test_a_goodbye_is_answered_with_a_goodbye(serve):
    exchange, ws = serve()
    ws.send_close()
    opcode, payload = ws.recv_data(control_frame=True)
    assert (opcode, payload) == (websocket.ABNF.OPCODE_CLOSE, b"\x03\xe8")


# ---- Faults ------------------------------------------------------------------------


def test_skip_leaves_a_gap_and_the_servers_book_is_right(serve):
    exchange, ws = serve()
    ask(ws, "subscribe", BOOK)
    messages = receive_books(ws, 2)
    exchange.skip(2)
    messages += receive_books(ws, 17)
    steps = [b - a for a, b in zip(update_ids(messages), update_ids(messages)[1:])]
    assert sorted(steps) == [1] * 17 + [3]
    assert exchange.book()["u"] == 520 == messages[-1]["data"]["u"]
    assert len(exchange.book()["a"]) == 21 == len(rebuild(messages)["a"]) + 2


def test_repeat_sends_one_delta_twice(serve):
    exchange, ws = serve(hold=True)
    ask(ws, "subscribe", BOOK)
    exchange.repeat()
    exchange.release()
    messages = receive_books(ws, 5)
    assert update_ids(messages) == [500, 501, 501, 502, 503]
    assert messages[1] == messages[2]


def test_restart_sends_a_snapshot_numbered_one_and_counts_on(serve):
    exchange, ws = serve(market(deltas=40))
    ask(ws, "subscribe", BOOK)
    receive_books(ws, 2)
    exchange.restart()
    messages = receive_books(ws, 39)
    start = [m["type"] for m in messages].index("snapshot")
    after = messages[start:]
    assert update_ids(after) == list(range(1, len(after) + 1))
    assert rebuild(after) == exchange.book()


def test_reset_is_a_connection_reset_at_the_client(serve):
    exchange, ws = serve()
    ask(ws, "subscribe", BOOK)
    receive(ws, 3)
    exchange.reset_clients()
    with pytest.raises(ConnectionResetError):
        receive(ws, 30)


def test_vanish_is_an_end_of_file_at_the_client(serve):
    exchange, ws = serve()
    ask(ws, "subscribe", BOOK)
    receive(ws, 3)
    exchange.vanish()
    with pytest.raises(websocket.WebSocketConnectionClosedException):
        receive(ws, 30)


def test_close_sends_a_proper_goodbye(serve):
    exchange, ws = serve()
    exchange.close_clients(1012)
    assert ws.recv_data(control_frame=True) == (8, b"\x03\xf4")
    assert wait_until(lambda: not exchange._clients)


def test_stall_is_silence_on_an_open_socket_and_its_messages_are_lost(serve):
    exchange, ws = serve(market(deltas=60))
    ask(ws, "subscribe", BOOK)
    ids = update_ids(receive_books(ws, 2))
    begin = time.monotonic()
    exchange.stall(0.2)
    ws.send('{"op":"ping"}')
    while ids[-1] == ids[-2] + 1:  # what was under way when the silence began
        ids += update_ids(receive_books(ws, 1))
    assert time.monotonic() - begin > 0.19
    assert ids[-1] > ids[-2] + 5
    assert exchange.pings == 1 and not any("pong" in text for _, text in exchange.sent)


def test_stall_with_keep_sends_everything_afterwards(serve):
    exchange, ws = serve(hold=True, speed=None)
    ask(ws, "subscribe", BOOK)
    receive(ws)
    exchange.stall(0.5, keep=True)
    exchange.release()
    assert exchange.finished.wait(3)
    assert not select.select([ws.sock], [], [], 0)[0]
    assert update_ids(receive_books(ws, 21)) == list(range(500, 521))


def test_stall_reaches_new_clients_unless_told_otherwise(serve, connect):
    exchange, ws = serve()
    exchange.stall(60)
    deaf = connect(exchange)
    ask(deaf, "ping")
    assert not select.select([deaf.sock], [], [], 0.1)[0]
    exchange.stall(60, everyone=False)
    ask(ws, "ping")
    fresh = connect(exchange)
    ask(fresh, "ping")
    assert receive(fresh)[0]["ret_msg"] == "pong"
    assert not select.select([ws.sock], [], [], 0)[0]


def test_send_puts_anything_on_the_wire(serve):
    exchange, ws = serve()
    exchange.send("not json")
    exchange.send(b"\xff\xfe", websocket.ABNF.OPCODE_BINARY)
    exchange.send(b"\xc1\x01a", opcode=None)  # claims to be compressed
    assert ws.recv() == "not json"
    assert ws.recv() == b"\xff\xfe"
    with pytest.raises(websocket.WebSocketProtocolException):
        ws.recv()
    assert exchange.sent == [(1, "not json")]


def test_refused_handshakes_get_502_and_the_next_one_succeeds(serve, connect):
    exchange, ws = serve()
    exchange.refuse(2)
    for _ in range(2):
        with pytest.raises(websocket.WebSocketBadStatusException) as refusal:
            connect(exchange)
        assert refusal.value.status_code == 502
    connect(exchange).close()
    assert exchange.connections == 2


def test_late_trades_come_after_later_book_messages(serve):
    exchange, ws = serve(hold=True)
    ask(ws, "subscribe", BOOK, TRADES)
    exchange.late_trades(70)
    exchange.release()
    _, *messages = receive(ws, 26)
    trades = [i for i, m in enumerate(messages) if m["topic"] == TRADES]
    assert len(trades) == 4
    assert update_ids(messages[trades[0] - 1 : trades[0]]) == [508]  # due with 505
    assert messages[trades[0]]["data"][0]["T"] < messages[trades[0] - 2]["cts"]


def test_close_ends_every_thread_with_clients_still_connected(serve):
    exchange, ws = serve()
    ask(ws, "subscribe", BOOK)
    receive(ws)
    with socket.create_connection(ws.sock.getpeername()):  # and one that says nothing
        begin = time.monotonic()
        exchange.close()
    assert time.monotonic() - begin < 2
    assert not any(thread.is_alive() for thread in exchange._threads)


def test_a_client_that_stops_reading_is_dropped_and_the_market_goes_on(
    serve, connect, monkeypatch
):
    monkeypatch.setattr(exchange_module, "SOCKET_TIMEOUT_S", 0.2)
    exchange, deaf = serve(market(deltas=60), speed=None, hold=True)
    ask(deaf, "subscribe", BOOK)
    receive(deaf)
    exchange.send("x" * 20_000_000)  # more than the buffers of a socket hold
    exchange.release()
    assert exchange.finished.wait(3)
    ws = connect(exchange)
    ask(ws, "subscribe", BOOK)
    assert rebuild(receive_books(ws, 1)) == exchange.book()
    assert [number for number, _ in exchange.sent] == [1, 2, 2]


# ---- Recordings and command line ---------------------------------------------------


def recordings() -> list[Path]:
    folder = os.environ.get("RECORDINGS")
    return sorted(Path(folder).glob("*.jsonl.gz")) if folder else []


@pytest.mark.skipif(not recordings(), reason="RECORDINGS names no folder")
@pytest.mark.parametrize("path", recordings(), ids=lambda path: path.name[:20])
def test_real_recordings_arrive_whole_and_reproduce_the_book(serve, path):
    lines = read_recording(path, seconds=60)
    topics = sorted({json.loads(text)["topic"] for _, text in lines})
    exchange, ws = serve(lines, speed=None)
    ask(ws, "subscribe", *topics)
    messages = [json.loads(ws.recv()) for _ in range(len(lines) + 1)][1:]
    assert exchange.finished.wait(3) and exchange.position == len(lines)
    books = [m for m in messages if m["topic"] == "orderbook.200.BTCUSDT"]
    assert rebuild(books) == exchange.book()
    ask(ws, "unsubscribe", "orderbook.200.BTCUSDT")
    ask(ws, "subscribe", "orderbook.200.BTCUSDT")
    fresh = receive(ws, 3)[2]["data"]
    assert rebuild(books)["b"] == dict(fresh["b"]) and len(fresh["a"]) <= 200


def test_command_line_serves_a_recording_until_its_input_ends(tmp_path, connect):
    file = tmp_path / "recording.jsonl"
    file.write_text("".join(f"{stamp} {text}\n" for stamp, text in market()))
    command = [sys.executable, exchange_module.__file__, str(file), "--speed", "max"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        ws = connect(process.stdout.readline().strip())
        ask(ws, "subscribe", BOOK)
        assert [m.get("type") for m in receive(ws, 3)] == [None, "snapshot", "delta"]
        process.stdin.close()
        assert process.wait(5) == 0
