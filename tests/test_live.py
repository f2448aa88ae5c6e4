"""The live feed against a loopback exchange that misbehaves on command.

Real sockets, real threads. What each test asks in the end: was the loss told before the
next book message, did the feed recover alone, is the consumer's book the exchange's, is
all that was received in the recording, and does the recording replay to what was seen.
"""

import contextlib
import gzip
import json
import queue
import random
import signal
import socket
import struct
import threading
import time
from decimal import Decimal
from itertools import pairwise

import pytest
import websocket
from exchange import LoopbackExchange, compact, wait_until

import feed
from feed import (
    ASK,
    BID,
    CONTROL,
    DELTA,
    LOST,
    REFUSED,
    SNAPSHOT,
    Instrument,
    OrderBook,
    Parser,
    UserError,
)

PATIENCE_S = 30  # how long a loaded machine may take
FIRST_MS = 1_700_000_000_000
BOOK, TRADE, TICKERS = "orderbook.200.BTCUSDT", "publicTrade.BTCUSDT", "tickers.BTCUSDT"
SPOT = Instrument("BTCUSDT", "spot", "0.1", "0.000001", 0.000011)


# ---- A market by hand --------------------------------------------------------------


def line(ms: float, message: dict, spot: bool = False) -> tuple[int, str]:
    """A recorded line; spot puts ts before type."""
    stamp = FIRST_MS + int(ms)
    head = ("topic", "ts", "type") if spot else ("topic", "type", "ts")
    message = {"ts": stamp, **message}
    return stamp * 1_000_000, compact({key: message[key] for key in head} | message)


def book_line(ms: float, u: int, bids: list, asks: list, kind: str, spot: bool = False) -> tuple:
    data = {"s": "BTCUSDT", "b": bids, "a": asks, "u": u, "seq": 7 * u}
    message = {"topic": BOOK, "type": kind, "data": data, "cts": FIRST_MS + int(ms)}
    return line(ms, message, spot)


def market(messages: int = 161, step_ms: float = 4, spot: bool = False, quiet=range(0)) -> list:
    """A book that wanders, with trades and tickers; in `quiet` only the tickers go on."""
    rng, mid, u = random.Random(messages), 5_000, 7_000
    sides = {-1: {}, 1: {}}

    def change(sign: int) -> list:
        side, rows = sides[sign], []
        for tick in [t for t in side if (t - mid) * sign <= 0]:
            rows.append([f"{tick / 10:.2f}", "0"])
            del side[tick]
        for _ in range(3):
            tick = mid + sign * rng.randint(1, 30)
            side[tick] = f"{rng.randint(1, 9999) / 1000:g}"
            rows.append([f"{tick / 10:.2f}", side[tick]])
        return rows

    lines = []
    for number in range(messages):
        ms = number * step_ms
        if number % 5 == 0:
            fields = {"symbol": "BTCUSDT", "lastPrice": f"{mid / 10}"}
            kind = "snapshot" if spot or number == 0 else "delta"
            lines.append(line(ms, {"topic": TICKERS, "type": kind, "data": fields}, spot))
        if number in quiet:
            continue
        mid += rng.choice((-3, -1, 0, 0, 1, 3))
        u += 1
        kind = "snapshot" if number == 0 else "delta"
        lines.append(book_line(ms, u, change(-1), change(1), kind, spot))
        if number % 4 == 3:
            trade = {"T": FIRST_MS + int(ms), "s": "BTCUSDT", "S": rng.choice(("Buy", "Sell"))}
            trade |= {"v": "0.004", "p": f"{mid / 10:.2f}", "i": str(number)}
            lines.append(line(ms, {"topic": TRADE, "type": "snapshot", "data": [trade]}, spot))
    return lines


# ---- A consumer, as the main thread is one -----------------------------------------


class Consumer:
    """What is made of the queue: the messages, a book, and whether it may be trusted."""

    def __init__(self, source: feed.LiveFeed) -> None:
        self.source, self.messages, self.book = source, [], OrderBook()
        self.trusted = False

    def drain(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self.take(self.source.queue.get_nowait())

    def take(self, message: feed.Message) -> None:
        self.messages.append(message)
        if message.kind == LOST:
            self.trusted = False
        elif message.kind == SNAPSHOT:
            self.book.clear()
            self.trusted = True
        elif message.kind == DELTA:
            assert self.trusted, "a delta for a book that was lost"
        if message.kind in (SNAPSHOT, DELTA):
            self.book.apply(feed.build_tape([message]))

    @property
    def losses(self) -> list[str]:
        return [m.fields["reason"] for m in self.messages if m.kind == LOST]

    def levels(self) -> dict:
        """All levels of the book: price in ticks to size."""
        sides = {}
        for name, side in (("b", BID), ("a", ASK)):
            levels, sizes = self.book.ladders[side].occupied()
            sides[name] = dict(zip((levels * side).tolist(), sizes.tolist(), strict=True))
        return sides

    def reaches(self, condition) -> bool:
        """Drain until a condition holds."""

        def holds() -> bool:
            self.drain()
            return condition()

        return wait_until(holds, PATIENCE_S)


def true_levels(exchange: LoopbackExchange) -> dict:
    book = exchange.book()
    return {
        name: {int(Decimal(price) * 10): float(size) for price, size in book[name].items()}
        for name in "ba"
    }


class Session:
    """An exchange, a feed that records, a consumer; and the questions of every test."""

    def __init__(self, exchange: LoopbackExchange, source: feed.LiveFeed, path) -> None:
        self.exchange, self.source, self.path = exchange, source, path
        self.consumer = Consumer(source)

    def play(self, messages: int = 40) -> None:
        """Until so many more messages have come."""
        goal = len(self.consumer.messages) + messages
        assert self.consumer.reaches(lambda: len(self.consumer.messages) >= goal)

    def recover(self) -> None:
        """The market ends; the consumer's book becomes the exchange's without help."""
        consumer = self.consumer
        same = lambda: consumer.trusted and consumer.levels() == true_levels(self.exchange)  # noqa: E731
        assert wait_until(self.exchange.finished.is_set, PATIENCE_S)
        assert consumer.reaches(same), (self.source.parser.problem, consumer.losses)
        assert not self.source.fatal

    def finish(self) -> None:
        self.source.stop()
        assert not self.source.thread.is_alive()
        self.consumer.drain()
        self.source.recorder.close()
        assert not self.source.recorder.failure

    def lines(self) -> list[str]:
        text = gzip.decompress(self.path.read_bytes()).decode()
        stamps = [int(row.partition(" ")[0]) for row in text.splitlines()]
        assert stamps == sorted(stamps)
        return [row.partition(" ")[2] for row in text.split("\n")[:-1]]

    def check_recording(self) -> None:
        """Each connection's part of the file is a prefix of what was sent on it."""
        parts: list[list[bytes]] = [[]]
        for text in self.lines():
            message = json.loads(text) if text.startswith('{"op":"local"') else {}
            if message.get("event") == "lost":
                parts.append([])
            elif message.get("event") == "raw":
                parts[-1].append(message["text"].encode("utf-8", "surrogateescape"))
            elif not message:
                parts[-1].append(text.encode())
        if len(parts) == self.exchange.connections + 1 and not parts[-1]:
            parts.pop()  # stopped before the next connection
        assert len(parts) == self.exchange.connections
        for number, part in enumerate(parts, 1):
            texts = [text for connection, text in self.exchange.sent if connection == number]
            sent = [text.encode() if isinstance(text, str) else text for text in texts]
            assert part == sent[: len(part)], f"connection {number}"
        seen = sum(m.kind not in (LOST, CONTROL) for m in self.consumer.messages)
        assert sum(map(len, parts)) >= seen

    def check_replay(self) -> None:
        """The recording gives the messages that the consumer saw, stamp for stamp."""
        parser = Parser(self.source.parser.instrument)
        assert list(feed.replay(self.path, parser)) == self.consumer.messages

    def check_losses_told(self, restarts: int = 0) -> None:
        """A new snapshot comes after a loss, but for the first and a restart's."""
        kinds = [m.kind for m in self.consumer.messages if m.kind in (LOST, SNAPSHOT, DELTA)]
        unannounced = [b for a, b in pairwise(kinds) if b == SNAPSHOT and a != LOST]
        assert len(unannounced) == restarts

    def check(self, restarts: int = 0) -> None:
        self.recover()
        self.finish()
        self.check_losses_told(restarts)
        self.check_recording()
        self.check_replay()


def fast_clock(times: float):
    """A clock that starts now and runs faster than the wall."""
    wall, began = time.time_ns(), time.monotonic_ns()
    return lambda: wall + int((time.monotonic_ns() - began) * times)


@pytest.fixture
def begin(monkeypatch, tmp_path):
    """Start exchange and feed; end both, whatever happens."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(feed, "BACKOFF_S", (0.05, 0.2))
    monkeypatch.setattr(feed, "RECV_S", 0.05)
    with contextlib.ExitStack() as stack:

        def start(lines=None, instrument=Instrument(), clock_ns=time.time_ns, depth=200, **options):
            made = LoopbackExchange(lines or market(), clock_ns=clock_ns, **options)
            exchange = stack.enter_context(made)
            path = tmp_path / f"{exchange.url[-5:]}.jsonl.gz"
            source = feed.open_feed(instrument, depth, exchange.url, path, clock_ns)
            stack.callback(source.recorder.close)
            stack.callback(source.stop)
            return Session(exchange, source, path)

        yield start


# ---- The quiet course --------------------------------------------------------------


@pytest.mark.parametrize("late_ack", [False, True])
def test_an_undisturbed_session_is_received_recorded_and_replayed(begin, late_ack):
    session = begin(ack_after_data=late_ack)
    session.play()
    session.check()
    counts = session.source.parser.counts
    assert counts["acks"] == 1 and counts["book"] == 161 and counts["trades"] == 40
    assert not any(counts[name] for name in ("malformed", "losses", "repeated", "refusals"))
    assert session.consumer.losses == [] and session.source.reconnects == 0
    (start, *_rest) = session.lines()
    fields = json.loads(start)
    assert fields["event"] == "start" and fields["symbol"] == "BTCUSDT" and fields["depth"] == 200
    header = feed.peek(session.path)
    assert header.start == fields and header.depths == {200}


def test_a_spot_session_is_understood_too(begin):
    session = begin(market(spot=True), SPOT, spot=True)
    session.play()
    session.check()
    counts = session.source.parser.counts
    assert counts["acks"] == 1 and counts["trades"] == 40 and counts["malformed"] == 0
    assert any(text.startswith('{"topic":"orderbook.200.BTCUSDT","ts"') for text in session.lines())


def test_control_lines_of_the_main_thread_stand_in_the_recording_in_order(begin):
    session = begin()

    def write(n: int) -> None:
        for i in range(50):
            session.source.emit(feed.control_line("params", n=n, i=i))

    writers = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    for writer in writers:
        writer.start()
    session.play()
    for writer in writers:
        writer.join()
    session.check()
    seen = [m.fields for m in session.consumer.messages if m.fields.get("event") == "params"]
    for n in range(3):
        assert [fields["i"] for fields in seen if fields["n"] == n] == list(range(50))


# ---- Faults that end a connection or the trust in the book -------------------------

HUGE_FRAME = b"\x81\x7f" + struct.pack("!Q", 2**40)  # text, unmasked, 64-bit length
BAD_BOOK = compact({"topic": BOOK, "type": "delta", "ts": FIRST_MS, "data": {"u": "x"}})
ENDING = {
    "a close frame": (lambda e: e.close_clients(1001), "1001"),
    "a TCP reset": (lambda e: e.reset_clients(), ""),
    "an end of file": (lambda e: e.vanish(), ""),
    "a skipped update": (lambda e: e.skip(), "gap in u"),
    "two skipped updates": (lambda e: e.skip(2), "gap in u"),
    "a malformed book message": (lambda e: e.send(BAD_BOOK), "malformed"),
    "a giant frame": (lambda e: e.send(HUGE_FRAME, None), "1099511627776"),
    "a frame of no known kind": (lambda e: e.send(b"\x83\x00", None), "opcode"),
    "a compressed frame": (lambda e: e.send(b"\xc1\x02{}", None), "rsv"),
    "three refused handshakes": (lambda e: (e.refuse(3), e.vanish()), ""),
}


@pytest.mark.parametrize("name", ENDING)
def test_after_a_fault_the_loss_is_told_and_the_feed_recovers_alone(begin, name):
    fault, reason = ENDING[name]
    session = begin()
    session.play()
    assert session.consumer.losses == []
    fault(session.exchange)
    assert session.consumer.reaches(lambda: session.consumer.losses)
    session.check()
    assert reason in session.consumer.losses[0]
    assert session.source.reconnects >= 1
    assert session.exchange.connections >= 2


def test_fault_upon_fault_is_survived(begin):
    session = begin(market(500))
    for name in ("a skipped update", "a TCP reset", "a giant frame", "a close frame"):
        before = len(session.consumer.losses)
        ENDING[name][0](session.exchange)
        assert session.consumer.reaches(lambda n=before: len(session.consumer.losses) > n)
        assert session.consumer.reaches(lambda: session.consumer.trusted)
    session.check()
    assert session.source.reconnects >= 4


def test_an_exchange_that_is_away_for_a_while_is_found_again(begin):
    session = begin()
    session.play()
    port = int(session.exchange.url.rpartition(":")[2])
    session.exchange.close()
    assert session.consumer.reaches(
        lambda: session.consumer.losses and not session.source.connected
    )
    assert not session.consumer.trusted
    with LoopbackExchange(market(90), clock_ns=time.time_ns, port=port) as session.exchange:
        session.recover()
        session.finish()
    session.check_losses_told()
    session.check_replay()


# ---- Faults that cost nothing ------------------------------------------------------

OTHER = '{"topic":"kline.1.BTCUSDT",\n"data":[]}'
HARMLESS = {
    "a repeated update": (lambda e: e.repeat(), "repeated"),
    "text that is no JSON": (lambda e: e.send('{"topic":"orderbook.200.BTCU'), "malformed"),
    "invalid UTF-8": (lambda e: e.send(b'{"x":"\xff\xfe"}'), "malformed"),
    "a message of two lines": (lambda e: e.send(OTHER), "ignored"),
    "our own name": (lambda e: e.send('{"op":"local","event":"lost","reason":"x"}'), "malformed"),
    "an unknown topic": (lambda e: e.send('{"topic":"kline.1.BTCUSDT","data":[]}'), "ignored"),
    "an empty message": (lambda e: e.send(""), "malformed"),
    "a protocol ping": (lambda e: e.send(b"hello", websocket.ABNF.OPCODE_PING), "acks"),
    "already subscribed": (
        lambda e: e.send('{"success":false,"ret_msg":"error:already subscribed,topic:x"}'),
        "refusals",
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_not_touch_the_book_is_counted_and_costs_nothing(begin, name):
    fault, count = HARMLESS[name]
    session = begin()
    session.play()
    fault(session.exchange)
    session.play()
    session.check()
    assert session.source.parser.counts[count] == 1
    assert session.consumer.losses == [] and session.source.reconnects == 0


def test_a_restart_of_the_exchange_replaces_the_book_without_a_loss(begin):
    session = begin()
    session.play()
    session.exchange.restart()
    session.play()
    session.check(restarts=1)
    assert session.consumer.losses == [] and session.source.reconnects == 0
    assert session.exchange.book()["u"] < 161  # counted from 1 again


# ---- Silence -----------------------------------------------------------------------


def test_a_socket_that_falls_silent_is_given_up(begin):
    session = begin(market(300, 100), clock_ns=fast_clock(20))
    session.play()
    session.exchange.stall(3 * feed.WATCHDOG_S, everyone=False)
    assert session.consumer.reaches(lambda: session.consumer.losses)
    session.check()
    assert "nothing received for 10 s" in session.consumer.losses[0]


def test_a_silence_of_every_connection_is_outlived(begin):
    session = begin(market(400, 100), clock_ns=fast_clock(20))
    session.play()
    session.exchange.stall(2.5 * feed.WATCHDOG_S)
    assert session.consumer.reaches(lambda: len(session.consumer.losses) >= 2)
    session.check()


def test_a_book_that_falls_silent_while_others_talk_is_given_up(begin, monkeypatch):
    monkeypatch.setattr(feed, "BOOK_WATCHDOG_S", 15.0)
    session = begin(market(400, 100, quiet=range(60, 300)), clock_ns=fast_clock(20))
    assert session.consumer.reaches(lambda: session.consumer.losses)
    session.check()
    assert "no book message for 15 s" in session.consumer.losses[0]


def test_the_feed_pings_in_time_even_while_nothing_comes(begin):
    session = begin(market(2), clock_ns=fast_clock(20))
    assert session.consumer.reaches(lambda: session.exchange.pings >= 4)
    assert session.consumer.reaches(lambda: session.source.parser.counts["pongs"] >= 3)
    session.check()


# ---- Refusals and subscriptions ----------------------------------------------------


@pytest.mark.parametrize(
    ("instrument", "depth"),
    [(Instrument("btcusdt"), 200), (Instrument("NOSUCHUSDT"), 200), (Instrument(), 1000)],
)
def test_a_refused_topic_is_fatal_and_says_what_to_check(begin, instrument, depth):
    session = begin(instrument=instrument, depth=depth)
    session.source.thread.join(PATIENCE_S)
    assert not session.source.thread.is_alive(), "it must not try again"
    assert "handler not found" in session.source.fatal and "--symbol" in session.source.fatal
    assert "\n" not in session.source.fatal
    assert session.exchange.connections == 1
    session.consumer.drain()
    assert session.consumer.messages[-1].kind == REFUSED


def test_a_refusal_with_line_breaks_and_escapes_still_makes_one_line(begin):
    session = begin()
    words = "handler not found\n\x1b[2J\ud800"
    session.exchange.send(compact({"success": False, "ret_msg": words, "op": "subscribe"}))
    source = session.source

    def told() -> str:  # fatal before there was a book; after it, a reason to reconnect
        return source.fatal + "".join(session.consumer.losses) + source.parser.problem

    assert session.consumer.reaches(lambda: "handler not found" in told())
    assert told().isprintable()


def test_a_tick_size_that_does_not_fit_is_fatal_and_names_the_flag(begin):
    session = begin(instrument=Instrument(tick_text="0.3"))
    session.source.thread.join(PATIENCE_S)
    assert not session.source.thread.is_alive()
    assert "--tick-size" in session.source.fatal and session.exchange.connections == 1


def test_any_number_of_topics_is_subscribed_ten_at_a_time_and_again_after_a_loss(begin, tmp_path):
    topics = [f"tickers.S{number}" for number in range(23)]
    more = [line(i, {"topic": t, "type": "snapshot", "data": {}}) for i, t in enumerate(topics)]
    lines = sorted(market() + more)
    parser = Parser(Instrument())
    parser.handlers |= dict.fromkeys(topics, parser.handlers[TICKERS])
    with LoopbackExchange(lines, clock_ns=time.time_ns, spot=True) as exchange:
        recorder = feed.Recorder(tmp_path / "r.gz")
        source = feed.LiveFeed(exchange.url, parser, recorder)
        source.start(source.connect())
        session = Session(exchange, source, tmp_path / "r.gz")
        try:
            session.play()
            exchange.vanish()
            session.recover()
            asked = exchange.subscriptions
            assert [len(args) for args in asked] == [10, 10, 6] * exchange.connections
            for first in range(0, len(asked), 3):
                assert sorted(sum(asked[first : first + 3], [])) == sorted(parser.handlers)
            assert parser.counts["refusals"] == 0 and parser.counts["acks"] == len(asked)
        finally:
            session.finish()


# ---- The ends of a session ---------------------------------------------------------


def stops(source: feed.LiveFeed, timeout_s: float = PATIENCE_S) -> bool:
    """Whether stop() comes back; a thread asks, so that a test cannot hang."""
    stopper = threading.Thread(target=source.stop, daemon=True)
    stopper.start()
    stopper.join(timeout_s)
    return not stopper.is_alive()


def test_stop_ends_in_the_middle_of_a_busy_market_and_nothing_received_is_missing(begin):
    session = begin(market(5_000, 2))
    session.play(100)
    assert stops(session.source)
    after = len(session.exchange.sent)
    session.finish()
    assert after < 5_000, "the market was over before the stop"
    session.check_recording()
    session.check_replay()


def test_stop_ends_while_nothing_comes(begin):
    session = begin(market(2))
    session.play(2)
    session.exchange.stall(1_000)
    assert stops(session.source)
    assert session.consumer.losses == []


def test_stop_ends_while_the_exchange_is_away(begin):
    session = begin()
    session.play()
    session.exchange.close()
    assert session.consumer.reaches(
        lambda: session.consumer.losses and not session.source.connected
    )
    assert stops(session.source)


def test_stop_does_not_wait_for_a_handshake_that_is_never_answered(begin, monkeypatch):
    monkeypatch.setattr(feed, "CONNECT_S", 600.0)
    session = begin()
    session.play()
    port = int(session.exchange.url.rpartition(":")[2])
    session.exchange.close()
    with socket.create_server(("127.0.0.1", port)) as mute:
        mute.settimeout(PATIENCE_S)
        caller, _ = mute.accept()
        with caller:
            assert stops(session.source, PATIENCE_S / 3)


def test_stop_does_not_wait_for_a_message_that_never_ends(begin):
    session = begin()
    session.play()
    more, over = b"\x00\x01x", threading.Event()  # a continuation frame that is not the last

    def drip() -> None:
        session.exchange.send(b"\x01\x01x", None)
        while not over.wait(0.01):
            session.exchange.send(more, None)

    session.exchange.skip(10**6)  # the book is silent from here on
    assert wait_until(session.exchange.finished.is_set, PATIENCE_S)
    dripper = threading.Thread(target=drip)
    dripper.start()
    try:
        time.sleep(0.5)
        assert stops(session.source, PATIENCE_S / 3)
    finally:
        over.set()
        dripper.join()


def test_a_full_queue_is_a_loss_with_a_reason_and_nothing_in_it_is_dropped(begin, monkeypatch):
    monkeypatch.setattr(feed, "MAX_QUEUED", 60)
    session = begin()
    source, exchange = session.source, session.exchange
    assert wait_until(lambda: source.queue.qsize() > 60 and not source.connected, PATIENCE_S)
    assert wait_until(exchange.finished.is_set, PATIENCE_S)
    waiting = source.queue.qsize()
    assert exchange.connections == 1, "it must not go on before the consumer has caught up"
    session.consumer.drain()
    assert len(session.consumer.messages) >= waiting
    session.check()
    assert "60 messages wait" in session.consumer.losses[0]
    assert exchange.connections >= 2


def test_the_main_thread_can_ask_for_a_fresh_snapshot(begin):
    session = begin()
    session.play()
    session.source.resync_reason = "book crossed for 1 s"
    assert session.consumer.reaches(lambda: session.consumer.losses)
    session.check()
    assert "book crossed for 1 s" in session.consumer.losses[0]


def test_a_failing_disk_does_not_disturb_the_session(begin):
    session = begin()
    session.play()

    class FullDisk:
        closed = False

        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        flush = close = lambda self: None

    growing = session.source.recorder.file
    real, growing.file = growing.file, FullDisk()
    session.recover()
    session.source.stop()
    session.source.recorder.close()
    real.close()
    assert session.source.recorder.failure.endswith(" stopped: No space left on device")
    assert session.consumer.losses == [] and session.source.reconnects == 0


# ---- Opening, and the command line -------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1:1/\r\n\r\n", b"SSH-2.0-x\r\n\r\n", b"",
     b"HTTP/1.1 403 Forbidden\r\nContent-Length: x\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n<html>"],
)  # fmt: skip
def test_whatever_answers_in_place_of_the_exchange_is_an_error_that_callers_know(
    monkeypatch, tmp_path, answer
):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            caller, _ = server.accept()
            with caller:
                caller.recv(65_536)
                caller.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"ws://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises((OSError, websocket.WebSocketException)):
            feed.open_feed(Instrument(), 200, url, tmp_path / "r.gz")
        thread.join()
    assert not (tmp_path / "r.gz").exists()


@pytest.mark.parametrize("url", ["http://x", "stream.bybit.com", "ws://", "wss:///v5"])
def test_an_address_that_is_none_is_named(url):
    with pytest.raises(UserError, match="--url"):
        feed.open_feed(Instrument(), 200, url)


def test_an_existing_recording_is_not_touched_by_a_new_session(begin, tmp_path):
    session = begin()
    (tmp_path / "r.gz").write_bytes(b"precious")
    with pytest.raises(UserError, match="exists"):
        feed.open_feed(Instrument(), 200, session.exchange.url, tmp_path / "r.gz")
    assert (tmp_path / "r.gz").read_bytes() == b"precious"


@pytest.fixture
def signals():
    """Give the signals back as they were."""
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("flags", [(), ("--depth", "200")])
def test_the_command_records_for_some_minutes_and_says_what(
    monkeypatch, tmp_path, capsys, signals, flags
):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with LoopbackExchange(market(), clock_ns=time.time_ns) as exchange:
        path = tmp_path / "new.jsonl.gz"
        arguments = ["record", str(path), "--minutes", "0.02", "--url", exchange.url, *flags]
        assert feed.main(arguments) == 0, capsys.readouterr().err
        counts = capsys.readouterr().out
    lines = [text for _, text in feed.read_lines(path)]
    assert json.loads(lines[0])["event"] == "start" and json.loads(lines[-1])["event"] == "end"
    assert json.loads(lines[0])["depth"] == 200
    assert sum('"topic":"orderbook.200.BTCUSDT"' in text for text in lines) > 20
    assert str(path) in counts


def test_the_command_ends_with_one_line_where_the_exchange_refuses(
    monkeypatch, tmp_path, capsys, signals
):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with LoopbackExchange(market(), clock_ns=time.time_ns) as exchange:
        path = tmp_path / "new.jsonl.gz"
        steps = "--tick-size", "0.1", "--lot-size", "1"
        where = "--symbol", "btcusdt", *steps, "--depth", "200", "--url", exchange.url
        assert feed.main(["record", str(path), *where]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "handler not found" in told
