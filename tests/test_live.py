"""The live feed against a loopback exchange that misbehaves on command.

Real sockets, real threads. What each test asks in the end: was the loss told before the
next book message, did the feed recover alone, is our book the exchange's, is all that was
received in the recording, and does the recording replay to what was seen.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import chain, pairwise, repeat

import pytest
import websocket
from exchange import LoopbackExchange, compact, wait_until
from test_feed import BOOK, NOW_NS, book_text, levels_of, session_lines, ticker_text

import feed
from feed import DELTA, LOST, SNAPSHOT, Book, Instrument, Parser

PATIENCE_S = 30  # how long a loaded machine may take
SPOT = Instrument("BTCUSDT", "spot", "0.1", "0.000001", 0.000011)


class Session:
    """An exchange, a feed, its consumer as the main thread is one, and every test's questions."""

    def __init__(self, exchange: LoopbackExchange, source: feed.LiveFeed, hurry=None) -> None:
        self.exchange, self.source, self.hurry = exchange, source, hurry
        self.messages, self.book, self.is_trusted = [], Book(), False

    @property
    def losses(self) -> list[str]:
        return [message.note["reason"] for message in self.messages if message.kind == LOST]

    def drain(self) -> None:
        """Take what waits, and tend the feed."""
        self.source.tend()
        while not self.source.queue.empty():
            message = self.source.queue.get()
            assert self.is_trusted or message.kind != DELTA, "a delta for a book that was lost"
            if message.kind in (SNAPSHOT, LOST):
                self.is_trusted = message.kind == SNAPSHOT
                self.book.clear()
            self.book.apply(feed.build_tape([message]), 0, 1)
            self.messages.append(message)

    def reaches(self, condition) -> bool:
        """Drain until a condition holds."""
        return wait_until(lambda: self.drain() or condition(), PATIENCE_S)

    def play(self, count: int = 40) -> "Session":
        """Until so many more messages have come."""
        goal = len(self.messages) + count
        assert self.reaches(lambda: len(self.messages) >= goal)
        return self

    def has_true_book(self) -> bool:
        return self.is_trusted and levels_of(self.book) == self.exchange.book()

    def recover(self) -> None:
        """Without help the book is whole again, and remains the exchange's to the end."""
        assert self.reaches(lambda: self.is_trusted)
        self.hurry()
        assert self.reaches(self.exchange.finished.is_set)
        assert self.reaches(self.has_true_book), self.losses
        assert not self.source.fatal

    def check(self, restarts: int = 0) -> None:
        """All that is asked; but for the first and a restart's, a snapshot follows a loss."""
        self.recover()
        self.finish()
        kinds = [m.kind for m in self.messages if m.kind in (LOST, SNAPSHOT, DELTA)]
        assert sum(b == SNAPSHOT and a != LOST for a, b in pairwise(kinds)) == restarts
        self.check_recording()

    def finish(self) -> None:
        self.source.stop()
        assert not self.source.thread.is_alive()
        self.drain()
        self.source.recorder.close()
        assert not self.source.recorder.failure

    def check_recording(self) -> None:
        """It has a prefix of what each connection was sent, and gives what was seen."""
        path, parts = self.source.recorder.path, [[]]
        stamps, texts = zip(*feed.read_lines(path))
        assert sorted(stamps) == list(stamps)
        for text in texts:
            ours = json.loads(text) if text.startswith('{"op":"local"') else {"event": "raw"}
            if ours["event"] == "lost":
                parts.append([])
            elif ours["event"] == "raw":
                parts[-1].append(ours.get("text", text).encode("utf-8", "surrogateescape"))
        for number, part in enumerate(parts, 1):
            texts = [text for connection, text in self.exchange.sent if connection == number]
            sent = [text.encode() if isinstance(text, str) else text for text in texts]
            assert part == sent[: len(part)], f"connection {number}"
        replayed = feed.Recording(path).messages()
        assert repr([*replayed]) == repr(self.messages)  # by repr, since nan is not nan


def fast_clock() -> int:
    """A clock that runs twenty times as fast as the wall's."""
    return NOW_NS + time.monotonic_ns() * 20


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """No proxy, and shorter waits than in earnest."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name, value in (("BACKOFF_S", (0.02, 0.1)), ("RECV_S", 0.05), ("FLUSH_S", 0.05)):
        monkeypatch.setattr(feed, name, value)


@pytest.fixture
def begin(tmp_path):
    """Start exchange and feed; end both, whatever happens."""
    with contextlib.ExitStack() as stack:

        def start(lines=None, instrument=Instrument(), clock_ns=time.time_ns, depth=200, **options):
            jump_ns = [0]  # of the exchange's clock: what is left of the market comes at once
            options["clock_ns"] = lambda: clock_ns() + jump_ns[-1]
            exchange = stack.enter_context(LoopbackExchange(lines or session_lines(), **options))
            path = tmp_path / "r.gz"
            source = feed.open_feed(instrument, depth, exchange.url, path, clock_ns, more=1)
            stack.callback(source.recorder.close)
            stack.callback(source.stop)
            return Session(exchange, source, lambda: jump_ns.append(3_600 * feed.NS))

        yield start


# ---- The quiet course --------------------------------------------------------------


@pytest.mark.parametrize("instrument", [Instrument(), SPOT])
def test_an_undisturbed_session_is_received_recorded_and_replayed(begin, instrument):
    session = begin(instrument=instrument).play()
    for i in range(50):  # lines of the main thread's stand among the exchange's
        session.source.emit(feed.control_line("params", i=i))
    session.check()
    assert session.source.parser.counts == {"acks": 1, "book": 300, "trades": 75, "tickers": 60}
    assert session.losses == [] and session.source.reconnects == 0
    assert [m.note["i"] for m in session.messages if "i" in m.note] == [*range(50)]
    start = feed.Recording(session.source.recorder.path).start
    steps = dict(depth=200, tick_size="0.1", lot_size=instrument.lot_text, more=1)
    assert start.items() >= dict(symbol="BTCUSDT", category=instrument.category, **steps).items()


# ---- Faults that end a connection, and faults that cost nothing --------------------

ENDLESS = b"\x01\x7e\xff\xff" + b"x" * 65_535 + (b"\x00\x7e\xff\xff" + b"x" * 65_535) * 64
GIANT = b"\x81\x7f\0\0\1\0\0\0\0\0" + bytes(feed.MAX_MESSAGE)  # one of 2^40 bytes
REFUSAL = compact({"success": False, "ret_msg": "handler not found\n\x1b[2J\ud800"})
ENDING = {
    "a close frame": (lambda e: e.close_clients(1001), "1001"),
    "a TCP reset": (lambda e: e.reset_clients(), "Connection reset by peer"),
    "an end of file": (lambda e: e.vanish(), "Connection to remote host was lost"),
    "two skipped updates": (lambda e: e.skip(2), "gap in u"),
    "a malformed book message": (lambda e: e.send(book_text("x")), "malformed"),
    "a giant frame": (lambda e: e.send(GIANT, None), "more bytes than"),
    "a message of endless frames": (lambda e: e.send(ENDLESS, None), "more bytes than"),
    "a frame of no known kind": (lambda e: e.send(b"\x83\x00", None), "opcode"),
    "a compressed frame": (lambda e: e.send(b"\xc1\x02{}", None), "rsv"),
    "three refused handshakes": (lambda e: (e.refuse(3), e.vanish()), ""),
    "a late refusal": (lambda e: e.send(REFUSAL), "refused: handler not found??[2J?"),
}


@pytest.mark.parametrize("name", ENDING)
def test_after_each_of_two_faults_the_loss_is_told_and_the_feed_recovers_alone(begin, name):
    fault, reason = ENDING[name]
    session = begin(session_lines(count=900))
    for count in (1, 2):
        session.play()
        assert session.reaches(lambda: session.is_trusted)
        fault(session.exchange)
        assert session.reaches(lambda n=count: len(session.losses) >= n)
    session.check()
    assert all(reason in loss and loss.isprintable() for loss in session.losses)
    assert session.source.reconnects >= 2 and session.exchange.connections >= 3


ALREADY = '{"success":false,"ret_msg":"error:already subscribed,topic:x"}'
HARMLESS = {
    "a repeated update": (lambda e: e.repeat(), "repeated"),
    "invalid UTF-8": (lambda e: e.send(b'{"x":"\xff\xfe"}'), "malformed"),
    "a message of two lines": (lambda e: e.send('{"topic":"kline.1.X",\n"data":[]}'), "ignored"),
    "a protocol ping": (lambda e: e.send(b"hello", websocket.ABNF.OPCODE_PING), "acks"),
    "already subscribed": (lambda e: e.send(ALREADY), "refusals"),
    "a restart, with a new book": (lambda e: e.restart(), "acks"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_not_spoil_the_book_is_counted_and_costs_nothing(begin, name):
    fault, count = HARMLESS[name]
    session = begin().play()
    fault(session.exchange)
    session.play(9)
    session.check(restarts="restart" in name)
    assert session.source.parser.counts[count] == 1
    assert session.losses == [] and session.source.reconnects == 0


# ---- Silence -----------------------------------------------------------------------


def test_a_socket_that_falls_silent_is_given_up_again_and_again(begin):
    session = begin(session_lines(step_ms=100), clock_ns=fast_clock).play()
    session.exchange.stall(3 * feed.WATCHDOG_S)
    assert session.reaches(lambda: len(session.losses) > 1)
    session.check()
    assert set(session.losses) == {"nothing received for 10 s"}


def test_a_book_that_falls_silent_while_others_talk_is_given_up(begin, monkeypatch):
    monkeypatch.setattr(feed, "BOOK_WATCHDOG_S", 5.0)
    lines = session_lines(step_ms=100, quiet=range(100, 290))
    session = begin(lines, clock_ns=fast_clock)
    assert session.reaches(lambda: session.losses)
    assert sum(m.kind in (DELTA, SNAPSHOT) for m in session.messages) >= 100
    session.check()
    assert session.losses[0] == "no book message for 5 s"


def test_a_message_that_drips_does_not_keep_the_feed_waiting(begin):
    session = begin(session_lines(count=10), clock_ns=fast_clock)
    session.hurry()
    assert session.reaches(session.exchange.finished.is_set)
    drops = chain([b"\x01\x01x"], repeat(b"\x00\x01x"))  # a frame, and more of the same message
    assert session.reaches(lambda: session.exchange.send(next(drops), None) or session.losses)
    assert session.losses[0] == "nothing received for 10 s"
    session.recover()


def test_the_feed_pings_in_time_even_while_nothing_comes(begin):
    session = begin(session_lines(count=2), clock_ns=fast_clock)
    assert session.reaches(lambda: session.source.parser.counts["pongs"] >= 2)
    session.check()
    assert session.exchange.pings >= 2 and session.losses == []


# ---- Refusals and subscriptions ----------------------------------------------------


@pytest.mark.parametrize(
    ("instrument", "depth", "words"),
    [(Instrument(), 1000, "refused: error:handler not found.*--symbol.*--depth"),
     (Instrument(tick_text="0.3"), 200, "multiple of the tick 0.3: check --tick-size")],
)  # fmt: skip
def test_a_mistake_of_the_user_is_fatal_and_says_what_to_check(begin, instrument, depth, words):
    session = begin(instrument=instrument, depth=depth)
    session.source.thread.join(PATIENCE_S)
    assert re.search(words, session.source.fatal) and session.source.fatal.isprintable()
    assert session.exchange.connections == 1


def test_any_number_of_topics_is_subscribed_ten_at_a_time_and_again_after_a_loss():
    topics = [f"tickers.S{number}" for number in range(23)]
    more = [(NOW_NS, ticker_text({}, topic=topic)) for topic in topics]
    parser = Parser(Instrument())
    parser.topics |= dict.fromkeys(topics, parser.topics["tickers.BTCUSDT"])
    with LoopbackExchange(session_lines() + more) as exchange:
        session = Session(exchange, feed.LiveFeed(exchange.url, parser))
        session.source.start(session.source.connect())
        session.play()
        exchange.vanish()
        assert session.reaches(lambda: parser.counts["acks"] == 6)
        session.source.stop()
    asked = exchange.subscriptions
    assert [len(args) for args in asked] == [10, 10, 6] * 2
    assert sorted(sum(asked[:3], [])) == sorted(sum(asked[3:], [])) == sorted(parser.topics)


# ---- The ends of a session ---------------------------------------------------------


def stops(source: feed.LiveFeed) -> bool:
    """Whether stop() comes back; a thread asks, so that a test cannot hang."""
    stopper = threading.Thread(target=source.stop, daemon=True)
    stopper.start()
    stopper.join(PATIENCE_S)
    return not stopper.is_alive()


@pytest.mark.parametrize(
    ("count", "state"),
    [(5_000, lambda e: None), (1, lambda e: e.stall(1_000)),
     (1, lambda e: e.send(b"\x01\x01x", None))], ids=["busy", "silent", "half a message"],
)  # fmt: skip
def test_stop_ends_at_once_and_loses_nothing_received(begin, monkeypatch, count, state):
    monkeypatch.setattr(feed, "RECV_S", 600.0)
    session = begin(session_lines(count=count, step_ms=2)).play(min(count + 2, 100))
    state(session.exchange)
    assert stops(session.source)
    assert count == 1 or not session.exchange.finished.is_set()
    session.finish()
    session.check_recording()
    assert session.losses == []


@pytest.mark.parametrize("then", ["it stays away", "it never answers", "it is back"])
def test_an_exchange_that_went_away_is_found_again_and_stop_does_not_wait(begin, monkeypatch, then):
    monkeypatch.setattr(feed, "CONNECT_S", 600.0)
    monkeypatch.setattr(feed, "STOP_S", 0.2)
    session = begin().play()
    session.exchange.close()
    assert session.reaches(lambda: session.losses and not session.source.ws)
    port = int(session.exchange.url.rpartition(":")[2])
    with contextlib.ExitStack() as stack:
        if then == "it never answers":  # it takes the call, and then says nothing
            mute = stack.enter_context(socket.create_server(("127.0.0.1", port)))
            stack.enter_context(mute.accept()[0])
        elif then == "it is back":
            again = LoopbackExchange(session_lines(count=90), port=port)
            session.exchange = stack.enter_context(again)
            session.recover()
            session.finish()
        assert stops(session.source)


def test_a_full_queue_is_a_loss_with_a_reason_and_nothing_in_it_is_dropped(begin, monkeypatch):
    monkeypatch.setattr(feed, "MAX_QUEUED", 60)
    session = begin()
    source = session.source
    assert wait_until(lambda: source.queue.qsize() > 60 and not source.ws, PATIENCE_S)
    time.sleep(0.3)
    assert source.reconnects == 0, "it must not go on before the consumer has caught up"
    session.check()
    assert "60 messages wait" in session.losses[0] and source.reconnects >= 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_failing_disk_does_not_disturb_the_session(begin):
    session = begin().play()
    recorder = session.source.recorder
    recorder.file.close()
    recorder.file = open("/dev/full", "wb", buffering=0)
    session.recover()
    session.source.stop()
    recorder.close()
    assert recorder.failure.endswith("r.gz stopped: No space left on device")
    assert session.losses == [] and session.source.reconnects == 0


# ---- Opening, and the command line -------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1:1/\r\n\r\n", b"SSH-2.0-x\r\n\r\n", b"",
     b"HTTP/1.1 403 Forbidden\r\nContent-Length: x\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n<html>"],
)  # fmt: skip
def test_whatever_answers_in_place_of_the_exchange_is_an_error_that_callers_know(tmp_path, answer):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with server.accept()[0] as caller:
                caller.recv(65_536)
                caller.sendall(answer)

        threading.Thread(target=serve).start()
        url = f"ws://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises((OSError, websocket.WebSocketException)):
            feed.open_feed(Instrument(), 200, url, tmp_path / "r.gz")
    assert not (tmp_path / "r.gz").exists()


@pytest.fixture
def run(tmp_path):
    """Run feed.py record, until a signal: status, what was told, the recording's lines."""

    def run(*flags: str, number: int = 0) -> tuple:
        with LoopbackExchange(session_lines(count=2_000)) as exchange:
            words = "record", tmp_path / "new.gz", "--url", exchange.url, *flags
            command, pipe = [sys.executable, feed.__file__, *words], subprocess.PIPE
            process = subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True)
            if number:
                assert wait_until(lambda: len(exchange.sent) > 60, PATIENCE_S)
                process.send_signal(number)
            told, _ = process.communicate(timeout=PATIENCE_S)
        lines = [text for _, text in feed.read_lines(tmp_path / "new.gz")]
        return process.returncode, told, lines

    return run


@pytest.mark.parametrize("number", [0, signal.SIGINT, signal.SIGTERM])
def test_the_command_records_until_its_end_or_a_signal_and_says_what(run, number):
    status, told, lines = run("--minutes", "0.5" if number else "0.005", number=number)
    assert status == (130 if number else 0) and "new.gz: {'acks': 1, " in told
    assert json.loads(lines[0])["event"] == "start" and json.loads(lines[-1])["event"] == "end"
    assert 20 < sum(BOOK in text for text in lines) < 2_000


def test_the_command_ends_with_one_line_where_the_exchange_refuses_and_overwrites_nothing(run):
    status, told, lines = run("--symbol", "nosuch", "--tick-size", "0.1", "--lot-size", "1")
    assert status == 2 and told.count("error: ") == 1 and "handler not found" in told
    status, told, again = run("--minutes", "0.005")
    assert status == 2 and "new.gz exists" in told and told.count("\n") == 1 and again == lines
