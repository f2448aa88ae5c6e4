"""The live feed against a loopback exchange that misbehaves on command.

Real sockets, real threads. What each test asks in the end: was the loss told before the
next book message, did the feed recover alone, is our book the exchange's, is all that was
received in the recording, and does the recording replay to what was seen.
"""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import pairwise, repeat

import feed
from exchange import LoopbackExchange, compact, wait_until
from feed import DELTA, LOST, SNAPSHOT, Book, Instrument
from test_feed import BOOK, NOW_NS, book_text, levels_of, session_lines

import pytest
import websocket

PATIENCE_S = 30  # how long a loaded machine may take


class Session:
    """An exchange, a feed, its consumer as the main thread is one, and every test's questions."""

    def __init__(self, exchange: LoopbackExchange, source: feed.LiveFeed, hurry=None) -> None:
        self.exchange, self.source, self.hurry = exchange, source, hurry
        self.messages, self.book, self.is_trusted = [], Book(), False

    @property
    def losses(self) -> list[str]:
        return [message.note["reason"] for message in self.messages if message.kind == LOST]

    def drain(self) -> None:
        """Take what waits."""
        while not self.source.queue.empty():
            message = self.source.queue.get()
            assert self.is_trusted or message.kind != DELTA, "a delta for a book that was lost"
            if message.kind in (SNAPSHOT, LOST):
                self.is_trusted = message.kind == SNAPSHOT
                self.book.clear()
            self.book.apply(message)
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
            source = feed.LiveFeed(instrument, depth, exchange.url, path, clock_ns, more=1)
            stack.callback(source.recorder.close)
            stack.callback(source.stop)
            return Session(exchange, source, lambda: jump_ns.append(3_600 * feed.NS))

        yield start


@pytest.mark.parametrize("instrument", feed.BUILT_IN.values())
def test_an_undisturbed_session_is_received_recorded_and_replayed(begin, instrument):
    session = begin(instrument=instrument).play()
    for i in range(50):  # lines of the main thread's stand among the exchange's
        session.source.emit(feed.control_line("params", i=i))
    session.check()
    assert session.source.parser.counts == {"acks": 1, "book": 300, "trades": 75, "tickers": 60}
    assert session.losses == [] and session.source.reconnects == 0
    assert [m.note["i"] for m in session.messages if "i" in m.note] == [*range(50)]
    start = feed.Recording(session.source.recorder.path).start
    steps = dict(depth=200, tick_size="0.1", lot_size=instrument.lot_text, min_notional=5.0, more=1)
    assert start.items() >= dict(symbol="BTCUSDT", category=instrument.category, **steps).items()


# ---- Faults that end a connection, and faults that cost nothing --------------------

GIANT = b"\x81\x7f\0\0\1\0\0\0\0\0" + bytes(feed.MAX_MESSAGE)  # one of 2^40 bytes
REFUSAL = compact({"success": False, "ret_msg": "handler not found\n\x1b[2J\ud800"})
ENDING = {
    "a close frame": (lambda e: e.close_clients(1001), "1001"),
    "a TCP reset": (lambda e: e.reset_clients(), "Connection reset by peer"),
    "an end of file": (lambda e: e.vanish(), "Connection to remote host was lost"),
    "two skipped updates": (lambda e: e.skip(2), "gap in u"),
    "a malformed book message": (lambda e: e.send(book_text("x")), "malformed"),
    "a giant frame": (lambda e: e.send(GIANT, None), "more bytes than"),
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


def test_a_socket_that_falls_silent_is_asked_in_time_and_given_up_again_and_again(begin):
    session = begin(session_lines(step_ms=100), clock_ns=fast_clock).play()
    session.exchange.send(b"\x01\x01x", None)  # a part of a message is no frame that counts
    session.exchange.stall(3 * feed.WATCHDOG_S)
    assert session.reaches(lambda: len(session.losses) > 1)
    session.check()
    assert set(session.losses) == {"nothing received for 10 s"} and session.exchange.pings >= 2


def test_a_book_that_falls_silent_while_others_talk_is_given_up(begin, monkeypatch):
    monkeypatch.setattr(feed, "BOOK_WATCHDOG_S", 5.0)
    lines = session_lines(step_ms=100, quiet=range(100, 290))
    session = begin(lines, clock_ns=fast_clock)
    assert session.reaches(lambda: session.losses)
    assert sum(m.kind in (DELTA, SNAPSHOT) for m in session.messages) >= 100
    session.check()
    assert session.losses[0] == "no book message for 5 s"


def test_after_a_sleep_stamps_are_the_walls_again_and_the_book_is_lost(begin, monkeypatch):
    """Monotonic time stands still while a computer sleeps; no stamp ever goes back."""
    session, now_ns = begin(session_lines(step_ms=20)).play(), time.time_ns
    session.source.clock_ns = session.source.read_clock
    for jump_s, losses in ((3600, 1), (1800, 1), (7200, 2)):
        monkeypatch.setattr(feed.time, "time_ns", lambda s=jump_s: now_ns() + s * feed.NS)
        session.play(9)
        assert session.reaches(lambda n=losses: session.is_trusted and len(session.losses) == n)
    assert set(session.losses) == {"the computer slept, or its clock was set"}
    assert 0 <= now_ns() + 7200 * feed.NS - session.messages[-1].recv_ns < 60 * feed.NS
    session.check()


FINER = NOW_NS + feed.NS, book_text(1, [["100.05", "1"]], kind="snapshot")


@pytest.mark.parametrize(
    ("instrument", "depth", "more", "words"),
    [(Instrument(), 1000, [], "refused: error:handler not found.*--symbol.*--depth"),
     (Instrument(tick_text="0.3"), 200, [], "multiple of the tick 0.3: check --tick-size"),
     (Instrument(), 200, [FINER], "100.05 is no multiple of the tick 0.1: check --tick-size")],
)  # fmt: skip
def test_a_mistake_of_the_user_is_fatal_as_is_a_finer_grid(begin, instrument, depth, more, words):
    session = begin(session_lines(count=99) + more, instrument, depth=depth)
    session.source.thread.join(PATIENCE_S)
    assert re.search(words, session.source.fatal) and session.source.fatal.isprintable()
    assert session.exchange.connections == 1 + len(more)


# ---- The ends of a session ---------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "state"),
    [(5_000, lambda e: None), (1, lambda e: e.stall(1_000)),
     (1, lambda e: e.send(b"\x01\x01x", None))], ids=["busy", "silent", "half a message"],
)  # fmt: skip
def test_stop_ends_at_once_and_loses_nothing_received(begin, monkeypatch, count, state):
    monkeypatch.setattr(feed, "RECV_S", 600.0)
    session = begin(session_lines(count=count, step_ms=2)).play(min(count + 2, 100))
    state(session.exchange)
    session.source.stop()
    assert count == 1 or not session.exchange.finished.is_set()
    session.finish()
    session.check_recording()
    assert session.losses == []


def test_stop_does_not_wait_for_an_exchange_that_takes_the_call_and_is_mute(begin, monkeypatch):
    monkeypatch.setattr(feed, "CONNECT_S", 600.0)
    session = begin().play()
    session.exchange.close()
    assert session.reaches(lambda: session.losses and not session.source.ws)
    address = "127.0.0.1", int(session.exchange.url.rpartition(":")[2])
    with socket.create_server(address) as mute, mute.accept()[0]:
        session.source.stop()


def test_a_full_queue_is_a_loss_with_a_reason_and_nothing_in_it_is_dropped(begin, monkeypatch):
    monkeypatch.setattr(feed, "MAX_WAITING", 60_000)
    session = begin()
    source = session.source
    assert wait_until(lambda: source.queue.qsize() > 30 and not source.ws, PATIENCE_S)
    time.sleep(0.3)
    assert source.reconnects == 0, "it must not go on before the consumer has caught up"
    session.check()
    assert "0.06 MB wait" in session.losses[0] and source.reconnects >= 1


# ---- Opening, and the command line -------------------------------------------------

SWITCH, HEADERS = b"HTTP/1.1 101 Switching Protocols\r\n", b"X: y\r\n" * 20_000


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1:1/\r\n\r\n", b"SSH-2.0-x\r\n\r\n", b"",
     b"HTTP/1.1 403 Forbidden\r\nContent-Length: x\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n<html>",
     b"HTTP/1.1 403 \x1b\r\nContent-Length: 99999999\r\n\r\n" + bytes(1 << 20),
     SWITCH + b"Set-Cookie: a\x01b=\x02\r\n\r\n", SWITCH + HEADERS, repeat(b"HTTP")],
)  # fmt: skip
def test_whatever_answers_is_one_error_and_soon(tmp_path, monkeypatch, answer):
    monkeypatch.setattr(feed, "CONNECT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with server.accept()[0] as caller, contextlib.suppress(OSError):
                caller.recv(65_536)
                for part in answer if isinstance(answer, repeat) else [answer]:
                    caller.sendall(part)
                    time.sleep(0.05)

        threading.Thread(target=serve).start()
        url = f"ws://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(OSError) as told:
            feed.LiveFeed(Instrument(), 200, url, tmp_path / "r.gz")
    assert str(told.value).isprintable() and len(str(told.value)) <= 200
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
    if not number:
        status, told, again = run("--minutes", "0.005")
        assert re.fullmatch("error: .*new.gz: File exists: check the path\n", told)
        assert status == 2 and again == lines
