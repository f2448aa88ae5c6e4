"""The live feed against a loopback exchange that misbehaves on command.

Real sockets, real threads. What each test asks in the end: was the loss told before the
next book message, did the feed recover alone, is the consumer's book the exchange's, is
all that was received in the recording, and does the recording replay to what was seen.
"""

import contextlib
import gzip
import json
import os
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
from test_feed import BOOK, NOW_MS, book_text, levels_of, session_lines, ticker_text

import feed
from feed import ASK, BID, CONTROL, DELTA, LOST, SNAPSHOT, Book, Instrument, Parser, UserError

PATIENCE_S = 30  # how long a loaded machine may take
SPOT = Instrument("BTCUSDT", "spot", "0.1", "0.000001", 0.000011)


class Consumer:
    """What is made of the queue: the messages, a book, and whether it may be trusted."""

    def __init__(self, source: feed.LiveFeed) -> None:
        self.source, self.messages, self.book, self.is_trusted = source, [], Book(), False

    def drain(self) -> None:
        """Take what waits, and tend the feed, as the main thread does."""
        self.source.tend()
        while not self.source.queue.empty():
            message = self.source.queue.get()
            self.messages.append(message)
            assert self.is_trusted or message.kind != DELTA, "a delta for a book that was lost"
            if message.kind in (SNAPSHOT, LOST):
                self.is_trusted = message.kind == SNAPSHOT
                self.book.clear()
            self.book.apply(feed.build_tape([message]), 0, 1)

    @property
    def losses(self) -> list[str]:
        return [m.note["reason"] for m in self.messages if m.kind == LOST]

    def reaches(self, condition) -> bool:
        """Drain until a condition holds."""
        return wait_until(lambda: self.drain() or condition(), PATIENCE_S)


class Session:
    """An exchange, a feed that records, a consumer; and the questions of every test."""

    def __init__(self, exchange: LoopbackExchange, source: feed.LiveFeed) -> None:
        self.exchange, self.source, self.consumer = exchange, source, Consumer(source)

    def play(self, count: int = 40) -> None:
        """Until so many more messages have come."""
        goal = len(self.consumer.messages) + count
        assert self.consumer.reaches(lambda: len(self.consumer.messages) >= goal)

    def has_true_book(self) -> bool:
        true = self.exchange.book()
        sides = ((BID, true["b"]), (ASK, true["a"]))
        levels = {side: {side * int(Decimal(p) * 10): float(s) for p, s in rows.items()}
                  for side, rows in sides}  # fmt: skip
        return self.consumer.is_trusted and levels_of(self.consumer.book) == levels

    def recover(self) -> None:
        """The market ends; the consumer's book becomes the exchange's without help."""
        assert self.consumer.reaches(self.exchange.finished.is_set)
        assert self.consumer.reaches(self.has_true_book), self.consumer.losses
        assert not self.source.fatal

    def finish(self) -> None:
        self.source.stop()
        assert not self.source.thread.is_alive()
        self.consumer.drain()
        self.source.recorder.close()
        assert not self.source.recorder.failure

    def check_recording(self) -> None:
        """Each connection's part of the file is a prefix of what was sent on it."""
        lines = gzip.decompress(self.source.recorder.path.read_bytes()).decode().splitlines()
        stamps, parts = [int(line.partition(" ")[0]) for line in lines], [[]]
        assert stamps == sorted(stamps)
        for text in (line.partition(" ")[2] for line in lines):
            ours = json.loads(text) if text.startswith('{"op":"local"') else {}
            if ours.get("event") == "lost":
                parts.append([])
            elif not ours or ours["event"] == "raw":
                payload = ours["text"] if ours else text
                parts[-1].append(payload.encode("utf-8", "surrogateescape"))
        if len(parts) > self.exchange.connections and not parts[-1]:
            parts.pop()  # stopped before the next connection
        assert len(parts) == self.exchange.connections
        for number, part in enumerate(parts, 1):
            texts = [text for connection, text in self.exchange.sent if connection == number]
            sent = [text.encode() if isinstance(text, str) else text for text in texts]
            assert part == sent[: len(part)], f"connection {number}"

    def check_replay(self) -> None:
        """The recording gives the messages that the consumer saw, stamp for stamp."""
        recording = feed.open_recording(self.source.recorder.path)
        assert repr([*recording.messages()]) == repr(self.consumer.messages)  # nan is not nan

    def check(self, restarts: int = 0) -> None:
        """All of it; and but for the first and a restart's, a snapshot follows a loss."""
        self.recover()
        self.finish()
        kinds = [m.kind for m in self.consumer.messages if m.kind in (LOST, SNAPSHOT, DELTA)]
        assert sum(b == SNAPSHOT and a != LOST for a, b in pairwise(kinds)) == restarts
        self.check_recording()
        self.check_replay()


def fast_clock(times: float = 20):
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
            lines = lines or session_lines()
            exchange = stack.enter_context(LoopbackExchange(lines, clock_ns=clock_ns, **options))
            path = tmp_path / "r.gz"
            source = feed.open_feed(instrument, depth, exchange.url, path, clock_ns, more=1)
            stack.callback(source.recorder.close)
            stack.callback(source.stop)
            return Session(exchange, source)

        yield start


# ---- The quiet course --------------------------------------------------------------


@pytest.mark.parametrize(("instrument", "is_spot"), [(Instrument(), False), (SPOT, True)])
def test_an_undisturbed_session_is_received_recorded_and_replayed(begin, instrument, is_spot):
    session = begin(instrument=instrument, spot=is_spot)
    session.play()
    session.check()
    counts = session.source.parser.counts
    assert counts == {"acks": 1, "book": 160, "trades": 40, "tickers": 32}
    assert session.consumer.losses == [] and session.source.reconnects == 0
    start = feed.open_recording(session.source.recorder.path).start
    assert (start["symbol"], start["category"], start["depth"], start["more"]) == (
        "BTCUSDT", instrument.category, 200, 1,
    )  # fmt: skip
    assert (start["tick_size"], start["lot_size"]) == ("0.1", instrument.lot_text)


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
    seen = [m.note for m in session.consumer.messages if m.kind == CONTROL and "n" in m.note]
    for n in range(3):
        assert [note["i"] for note in seen if note["n"] == n] == list(range(50))


# ---- Faults that end a connection, and faults that cost nothing --------------------

HUGE_FRAME = b"\x81\x7f" + struct.pack("!Q", 2**40)  # text, unmasked, 64-bit length
ENDLESS = b"\x01\x7e\xff\xff" + b"x" * 65_535 + (b"\x00\x7e\xff\xff" + b"x" * 65_535) * 64
REFUSAL = {"success": False, "ret_msg": "handler not found\n\x1b[2J\ud800", "op": "subscribe"}
ENDING = {
    "a close frame": (lambda e: e.close_clients(1001), "1001"),
    "a TCP reset": (lambda e: e.reset_clients(), ""),
    "an end of file": (lambda e: e.vanish(), ""),
    "two skipped updates": (lambda e: e.skip(2), "gap in u"),
    "a malformed book message": (lambda e: e.send(book_text("x")), "malformed"),
    "a giant frame": (lambda e: e.send(HUGE_FRAME, None), "1099511627776"),
    "a message of endless frames": (lambda e: e.send(ENDLESS, None), "more than 4194304"),
    "a frame of no known kind": (lambda e: e.send(b"\x83\x00", None), "opcode"),
    "a compressed frame": (lambda e: e.send(b"\xc1\x02{}", None), "rsv"),
    "three refused handshakes": (lambda e: (e.refuse(3), e.vanish()), ""),
    "a late refusal": (lambda e: e.send(compact(REFUSAL)), "refused: handler not found??[2J?"),
}


@pytest.mark.parametrize("name", ENDING)
def test_after_a_fault_the_loss_is_told_and_the_feed_recovers_alone(begin, name):
    fault, reason = ENDING[name]
    session = begin()
    session.play()
    fault(session.exchange)
    assert session.consumer.reaches(lambda: session.consumer.losses)
    session.check()
    assert reason in session.consumer.losses[0] and session.consumer.losses[0].isprintable()
    assert session.source.reconnects >= 1 and session.exchange.connections >= 2


def test_fault_upon_fault_is_survived(begin):
    session = begin(session_lines(count=500))
    for name in ("two skipped updates", "a TCP reset", "a giant frame", "a close frame"):
        before = len(session.consumer.losses)
        ENDING[name][0](session.exchange)
        assert session.consumer.reaches(lambda n=before: len(session.consumer.losses) > n)
        assert session.consumer.reaches(lambda: session.consumer.is_trusted)
    session.check()
    assert session.source.reconnects >= 4


def test_an_exchange_that_is_away_for_a_while_is_found_again(begin):
    session = begin()
    session.play()
    session.exchange.close()
    assert session.consumer.reaches(lambda: session.consumer.losses and not session.source.ws)
    port = int(session.exchange.url.rpartition(":")[2])
    with LoopbackExchange(session_lines(count=90), port=port) as session.exchange:
        session.recover()
        session.finish()
    session.check_replay()


ALREADY = '{"success":false,"ret_msg":"error:already subscribed,topic:x"}'
HARMLESS = {
    "a repeated update": (lambda e: e.repeat(), "repeated"),
    "text that is no JSON": (lambda e: e.send('{"topic":"orderbook.200.BTCU'), "malformed"),
    "invalid UTF-8": (lambda e: e.send(b'{"x":"\xff\xfe"}'), "malformed"),
    "a message of two lines": (lambda e: e.send('{"topic":"kline.1.X",\n"data":[]}'), "ignored"),
    "our own name": (lambda e: e.send('{"op":"local","event":"lost","reason":"x"}'), "malformed"),
    "an empty message": (lambda e: e.send(""), "malformed"),
    "a protocol ping": (lambda e: e.send(b"hello", websocket.ABNF.OPCODE_PING), "acks"),
    "already subscribed": (lambda e: e.send(ALREADY), "refusals"),
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
    assert session.exchange.book()["u"] < 160  # counted from 1 again


# ---- Silence -----------------------------------------------------------------------


@pytest.mark.parametrize(("everyone", "losses"), [(False, 1), (True, 2)])
def test_a_socket_that_falls_silent_is_given_up_again_and_again(begin, everyone, losses):
    session = begin(session_lines(count=400, step_ms=100), clock_ns=fast_clock())
    session.play()
    session.exchange.stall(2.5 * feed.WATCHDOG_S, everyone=everyone)
    assert session.consumer.reaches(lambda: len(session.consumer.losses) >= losses)
    session.check()
    assert set(session.consumer.losses) == {"nothing received for 10 s"}


def test_a_book_that_falls_silent_while_others_talk_is_given_up(begin, monkeypatch):
    monkeypatch.setattr(feed, "BOOK_WATCHDOG_S", 15.0)
    lines = session_lines(count=400, step_ms=100, quiet=range(60, 300))
    session = begin(lines, clock_ns=fast_clock())
    assert session.consumer.reaches(lambda: session.consumer.losses)
    session.check()
    assert session.consumer.losses[0] == "no book message for 15 s"


def test_a_message_that_drips_cannot_keep_the_watchdog_from_biting(begin):
    session = begin(session_lines(count=10), clock_ns=fast_clock())
    session.play(10)

    def drips_and_is_cut() -> bool:
        session.exchange.send(b"\x01\x01x" if not session.exchange.drips else b"\x00\x01x", None)
        session.exchange.drips += 1
        return bool(session.consumer.losses)

    session.exchange.drips = 0
    assert session.consumer.reaches(drips_and_is_cut)
    assert session.consumer.losses[0] == "nothing received for 10 s"
    session.recover()


def test_the_feed_pings_in_time_even_while_nothing_comes(begin):
    session = begin(session_lines(count=2), clock_ns=fast_clock())
    assert session.consumer.reaches(lambda: session.source.parser.counts["pongs"] >= 3)
    assert session.exchange.pings >= 3
    session.check()


# ---- Refusals and subscriptions ----------------------------------------------------


@pytest.mark.parametrize(
    ("instrument", "depth", "words"),
    [(Instrument("btcusdt"), 200, "refused: error:handler not found.*--symbol"),
     (Instrument(), 1000, "refused: error:handler not found.*--depth"),
     (Instrument(tick_text="0.3"), 200, "multiple of the tick 0.3: check --tick-size")],
)  # fmt: skip
def test_a_mistake_of_the_user_is_fatal_and_says_what_to_check(begin, instrument, depth, words):
    session = begin(instrument=instrument, depth=depth)
    session.source.thread.join(PATIENCE_S)
    assert not session.source.thread.is_alive(), "it must not try again"
    with pytest.raises(UserError, match=words):
        raise UserError(session.source.fatal)
    assert "\n" not in session.source.fatal and session.exchange.connections == 1


def test_any_number_of_topics_is_subscribed_ten_at_a_time_and_again_after_a_loss(begin, tmp_path):
    topics = [f"tickers.S{number}" for number in range(23)]
    more = [(NOW_MS * feed.MS, ticker_text({}, topic=topic)) for topic in topics]
    session = begin(session_lines() + more, spot=True)
    session.finish()  # another feed takes its place
    parser = Parser(Instrument())
    parser.topics |= dict.fromkeys(topics, parser.topics["tickers.BTCUSDT"])
    source = feed.LiveFeed(session.exchange.url, parser)
    source.start(source.connect())
    session.source, session.consumer = source, Consumer(source)
    first = len(session.exchange.subscriptions)
    session.play()
    session.exchange.vanish()
    session.recover()
    source.stop()
    asked = session.exchange.subscriptions[1:]
    assert [len(args) for args in asked] == [10, 10, 6] * (len(asked) // 3) and len(asked) >= 6
    assert sorted(asked[0] + asked[1] + asked[2]) == sorted(parser.topics)
    assert parser.counts["refusals"] == 0 and parser.counts["acks"] == len(asked)


# ---- The ends of a session ---------------------------------------------------------


def stops(source: feed.LiveFeed, timeout_s: float = PATIENCE_S) -> bool:
    """Whether stop() comes back; a thread asks, so that a test cannot hang."""
    stopper = threading.Thread(target=source.stop, daemon=True)
    stopper.start()
    stopper.join(timeout_s)
    return not stopper.is_alive()


def test_stop_in_the_middle_of_a_busy_market_loses_nothing_received(begin):
    session = begin(session_lines(count=5_000, step_ms=2))
    session.play(100)
    assert stops(session.source) and not session.exchange.finished.is_set()
    session.finish()
    assert not session.consumer.losses
    session.check_recording()
    session.check_replay()


def test_stop_ends_while_nothing_comes(begin, monkeypatch):
    monkeypatch.setattr(feed, "RECV_S", 600.0)
    session = begin(session_lines(count=2))
    session.play(2)
    session.exchange.stall(1_000)
    assert stops(session.source) and not session.source.thread.is_alive()
    assert session.consumer.losses == []


@pytest.mark.parametrize("answers", [False, True])
def test_stop_ends_while_the_exchange_is_away_or_never_answers(begin, monkeypatch, answers):
    monkeypatch.setattr(feed, "CONNECT_S", 600.0)
    monkeypatch.setattr(feed, "STOP_S", 0.2)
    session = begin()
    session.play()
    session.exchange.close()
    assert session.consumer.reaches(lambda: session.consumer.losses and not session.source.ws)
    with contextlib.ExitStack() as stack:
        if answers:  # the call, and then says nothing
            port = int(session.exchange.url.rpartition(":")[2])
            mute = stack.enter_context(socket.create_server(("127.0.0.1", port)))
            stack.enter_context(mute.accept()[0])
        assert stops(session.source)


def test_a_full_queue_is_a_loss_with_a_reason_and_nothing_in_it_is_dropped(begin, monkeypatch):
    monkeypatch.setattr(feed, "MAX_QUEUED", 60)
    session = begin()
    source, exchange = session.source, session.exchange
    assert wait_until(lambda: source.queue.qsize() > 60 and not source.ws, PATIENCE_S)
    assert wait_until(exchange.finished.is_set, PATIENCE_S)
    assert exchange.connections == 1, "it must not go on before the consumer has caught up"
    session.check()
    assert "60 messages wait" in session.consumer.losses[0] and exchange.connections >= 2


def test_the_main_thread_can_ask_for_a_fresh_snapshot_whatever_state_the_socket_is_in(begin):
    session = begin()
    session.play()
    with session.source.lock:  # the feed cannot see yet that the connection was reset
        session.exchange.reset_clients()
        session.source.cut("book crossed for 1 s")
    assert session.consumer.reaches(lambda: session.consumer.losses)
    session.check()
    assert session.consumer.losses[0] == "book crossed for 1 s"


class FullDisk:
    def write(self, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    flush = close = lambda self: None


def test_a_failing_disk_does_not_disturb_the_session(begin):
    session = begin()
    session.play()
    recorder = session.source.recorder
    real, recorder.file = recorder.file, FullDisk()
    session.recover()
    session.source.stop()
    recorder.close()
    real.close()
    assert recorder.failure.endswith("r.gz stopped: No space left on device")
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


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run feed.py record against an exchange: status, what was told, the recording's lines."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*flags: str) -> tuple:
        with LoopbackExchange(session_lines()) as exchange:
            path = str(tmp_path / "new.gz")
            status = feed.main(["record", path, "--url", exchange.url, *flags])
        told = capsys.readouterr()
        return status, told.out + told.err, [text for _, text in feed.read_lines(path)]

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("ending", ["a duration", signal.SIGINT, signal.SIGTERM])
def test_the_command_records_until_its_end_or_a_signal_and_says_what(run, ending):
    flags = ["--minutes", "0.015"]
    if ending != "a duration":
        flags = ["--depth", "200"]
        threading.Timer(0.9, os.kill, (os.getpid(), ending)).start()
    status, told, lines = run(*flags)
    assert status == 0 and "new.gz: {'acks': 1, 'book':" in told
    assert json.loads(lines[0])["event"] == "start" and json.loads(lines[-1])["event"] == "end"
    assert sum(BOOK in text for text in lines) > 20


def test_the_command_ends_with_one_line_where_the_exchange_refuses_and_overwrites_nothing(run):
    steps = "--tick-size", "0.1", "--lot-size", "1"
    status, told, lines = run("--symbol", "btcusdt", *steps)
    assert status == 2 and told.count("error: ") == 1 and "handler not found" in told
    status, told, again = run()
    assert status == 2 and "new.gz exists" in told and told.count("\n") == 1 and again == lines
