"""A loopback exchange: Bybit's public V5 protocol on ws://127.0.0.1, for the tests.

It replays recorded lines through a real WebSocket, so that a feed is tested with
sockets, threads and time-outs as they are, and it misbehaves on command: gaps,
repeats, restarts, resets, silence. A request and its answers look like this:

    > {"req_id":"7","op":"subscribe","args":["orderbook.200.BTCUSDT"]}
    < {"success":true,"ret_msg":"","conn_id":"loopback-1","req_id":"7","op":"subscribe"}
    < {"topic":"orderbook.200.BTCUSDT","type":"snapshot","ts":...,"data":{...},...}
    < {"topic":"orderbook.200.BTCUSDT","type":"delta","ts":...,"data":{...},...}

The market is one thread. It starts at the first subscription and goes on whether or
not anybody listens: who is disconnected misses messages, and gets a fresh snapshot of
the book as it then is when he comes back.

Time. With first = receive time of the first line, t0 = the clock at the start, a line
received at x is sent when the clock shows t0 + (x - first) / speed; the times inside
it (ts, cts, T) are moved by the same rule and rounded down to the millisecond. The
recorded lag is kept, divided by the speed. A speed above 1 also lets neighbouring
times fall into one millisecond; a test that minds uses a faster clock instead.

What it does not do: TLS, compression, limits on connections, an idle time-out, the
repeated snapshot of depth 1 (unless recorded), spread and option sockets.

    python tests/exchange.py FILE [--port P] [--speed X|max]     prints its URL
"""

import argparse
import base64
import contextlib
import gzip
import hashlib
import json
import re
import signal
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from websocket import ABNF, WebSocketException, frame_buffer

HANDSHAKE_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
MAX_HANDSHAKE_BYTES = 65_536
SOCKET_TIMEOUT_S = 5.0  # a client that takes nothing for so long is dropped
POLL_S = 0.001  # the clock may run faster than the wall: look at it this often
NOTICE_S = 0.02  # how soon a thread without a client notices close()
JOIN_S = 5.0  # patience with the threads when closing
BURST = 64  # lines sent at full speed before other threads get their turn
SPOT_MAX_ARGS = 10
NS_PER_MS = 1_000_000
BOOK_TOPIC = re.compile(r"orderbook\.(\d+)\.")  # others are passed on as they are
STAMP = re.compile(r'("(?:ts|cts|T)"\s*:\s*)(\d+)')
UPDATE_ID = re.compile(r'("u"\s*:\s*)(\d+)')


# ---- Recordings --------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One recorded message: text as received, parsed, and framed if sent unchanged."""

    recv_ns: int
    text: str
    message: dict
    frame: bytes | None = None


def read_recording(
    path: str | Path, seconds: float | None = None
) -> list[tuple[int, str]]:
    """(recv_ns, text) of every line of a recording, or of its first `seconds`."""
    opened = gzip.open if str(path).endswith(".gz") else open
    lines = []
    with opened(path, "rt", encoding="utf-8") as file:
        for row in file:
            stamp, _, text = row.rstrip("\n").partition(" ")
            lines.append((int(stamp), text))
            if seconds is not None and lines[-1][0] - lines[0][0] > seconds * 1e9:
                return lines[:-1]
    return lines


def parse_lines(lines: Iterable[tuple[int, str]], framed: bool) -> Iterator[Line]:
    """Keep what the market said: neither control lines nor acks, pongs and garbage."""
    for recv_ns, text in lines:
        with contextlib.suppress(ValueError):
            message = json.loads(text)
            if isinstance(message, dict) and "topic" in message:
                frame = build_frame(text) if framed else None
                yield Line(recv_ns, text, message, frame)


def build_frame(payload: str | bytes, opcode: int = ABNF.OPCODE_TEXT) -> bytes:
    """A WebSocket frame as a server sends it: never masked."""
    frame = ABNF.create_frame(payload, opcode)
    frame.mask_value = 0
    return frame.format()


def compact(message: dict) -> str:
    return json.dumps(message, separators=(",", ":"))


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Poll until the condition holds; False if it does not within the time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


# ---- What the exchange itself knows ------------------------------------------------


@dataclass
class Book:
    """The true book of one topic: price string to size string, on each side."""

    bids: dict = field(default_factory=dict)
    asks: dict = field(default_factory=dict)
    last: dict | None = None  # the message applied last, with the recorded numbers
    shift: int = 0  # recorded u minus published u: above 0 after a restart
    restarting: bool = False

    def apply(self, message: dict) -> str:
        """Apply both sides; how the message goes out: "" = not at all."""
        if message["type"] == "snapshot":
            self.bids, self.asks, self.shift = {}, {}, 0
        elif self.last is None:
            return ""
        for levels, side in (self.bids, "b"), (self.asks, "a"):
            for price, size in message["data"][side]:
                levels[price] = size
                if not float(size):
                    del levels[price]
        self.last = message
        return self._restart() if self.restarting else message["type"]

    def _restart(self) -> str:
        self.restarting, self.shift = False, self.last["data"]["u"] - 1
        return "fresh"

    def snapshot(self) -> dict:
        """The book now, in the shape of the last message (key order differs by topic).

        Bids come best (highest) first, asks best (lowest) first.
        """
        bids = sorted(self.bids.items(), key=lambda level: -float(level[0]))
        asks = sorted(self.asks.items(), key=lambda level: float(level[0]))
        data = {**self.last["data"], "b": bids, "a": asks}
        return {**self.last, "type": "snapshot", "data": data}


@dataclass
class Ticker:
    """The ticker of one symbol: deltas carry changed fields only, so merge them."""

    fields: dict = field(default_factory=dict)
    last: dict | None = None
    shift: int = 0  # always: tickers are not counted

    def apply(self, message: dict) -> str:
        """Merge; a delta that is the first thing known goes out as a snapshot."""
        first, self.last = self.last is None, message
        self.fields |= message["data"]
        return "fresh" if first and message["type"] == "delta" else message["type"]

    def snapshot(self) -> dict:
        return {**self.last, "type": "snapshot", "data": self.fields}


@dataclass(eq=False)
class Client:
    """One connection. The exchange's lock guards everything in it but the reading."""

    number: int  # counts from 1, refused handshakes not counted
    sock: socket.socket
    topics: set = field(default_factory=set)
    leaving: bool = False  # nothing more is sent
    silent_until_ns: int = 0
    keeps: bool = False  # what falls into the silence is sent after it
    backlog: list = field(default_factory=list)  # (frame, text)


# ---- The exchange ------------------------------------------------------------------


class LoopbackExchange:
    """A server with one market, any number of clients, and faults on command.

    lines: (recv_ns, text) as in a recording, in order of time.
    speed: times faster than recorded; None or 0 = as fast as the sockets take it, with
        the recorded times left in the messages and frames built beforehand.
    clock_ns: what the pacing and the moved times go by.
    spot: answer in the shape of the spot socket instead of the linear one.
    ack_after_data: send the first snapshots before the ack, as Bybit often does.
    hold: start the market at `release()`, not at the first subscription.

    For the tests to look at: `url`, `connections` (handshakes), `subscriptions` (args
    of each subscribe request), `pings` (JSON pings), `position` (lines played),
    `finished` (an Event), `sent` ((connection number, text) of every text frame, from
    just before it is written), `book()`.
    """

    def __init__(
        self,
        lines: Iterable[tuple[int, str]],
        *,
        speed: float | None = 1.0,
        clock_ns: Callable[[], int] = time.time_ns,
        spot: bool = False,
        ack_after_data: bool = False,
        hold: bool = False,
        start: bool = True,
        port: int = 0,
    ) -> None:
        self._speed = speed or None
        self._lines = list(parse_lines(lines, framed=not self._speed))
        self._clock_ns, self._spot, self._hold = clock_ns, spot, hold
        self._ack_after_data = ack_after_data
        self._topics = {line.message["topic"] for line in self._lines}
        self._symbols = {topic.rpartition(".")[2] for topic in self._topics}
        self._books = {t: Book() for t in self._topics if BOOK_TOPIC.match(t)}
        tickers = {t: Ticker() for t in self._topics if t.startswith("tickers.")}
        self._states = {**self._books, **tickers}
        self.connections = self.pings = self.position = 0
        self.subscriptions: list[list[str]] = []
        self.sent: list[tuple[int, str | bytes]] = []
        self.finished = threading.Event()
        self._start_ns = 0  # t0, set when the market starts
        self._skips = self._repeats = self._refusals = 0
        self._late_ns = self._silent_until_ns = 0
        self._keeps = False
        self._clients: list[Client] = []
        self._lock = threading.RLock()
        self._open, self._stopping = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        self._listener.settimeout(NOTICE_S)
        self.url = f"ws://127.0.0.1:{self._listener.getsockname()[1]}"
        if start:
            self.start()

    def start(self) -> None:
        """Begin to accept clients; the market waits for the first subscription."""
        if not self._threads:
            self._spawn(self._accept)
            self._spawn(self._run_market)

    def release(self) -> None:
        """Start a held market, whether or not anybody has subscribed."""
        self._open.set()

    def close(self) -> None:
        """Cut every connection and end every thread. May be called twice."""
        self._stopping.set()
        wait_until(self._ended, JOIN_S)
        self._listener.close()

    def _ended(self) -> bool:
        self.vanish()  # every time: somebody may just have got in
        return not any(thread.is_alive() for thread in self._threads)

    def __enter__(self) -> "LoopbackExchange":
        self.start()
        return self

    def __exit__(self, *_exception) -> None:
        self.close()

    def book(self, topic: str | None = None) -> dict:
        """The true book: {"b": {price: size}, "a": {...}, "u": int or None}, strings.

        Without a topic the deepest book of the recording.
        """
        with self._lock:
            deepest = max(self._books, key=lambda name: int(BOOK_TOPIC.match(name)[1]))
            book = self._books[topic or deepest]
            update_id = book.last and book.last["data"]["u"] - book.shift
            return {"b": dict(book.bids), "a": dict(book.asks), "u": update_id}

    # ---- Faults: from any thread, at once or at the next message -------------------

    def close_clients(self, code: int = 1001) -> None:
        """Say goodbye to every client with a proper CLOSE frame."""
        farewell = build_frame(struct.pack("!H", code), ABNF.OPCODE_CLOSE)
        with self._lock:
            for client in self._clients:
                self._write(client, farewell, None)
                client.leaving = True

    def reset_clients(self) -> None:
        """Reset every connection (TCP RST): the client's read or write fails.

        Half a shutdown, which the wire does not show, wakes the connection's own
        thread; only the last close of a socket sends the RST, and that one is there.
        """
        for client in list(self._clients):
            client.leaving = True
            with contextlib.suppress(OSError):
                linger = struct.pack("ii", 1, 0)
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                client.sock.shutdown(socket.SHUT_RD)

    def vanish(self) -> None:
        """End every connection without a CLOSE frame: the client reads end of file."""
        for client in list(self._clients):
            client.leaving = True
            with contextlib.suppress(OSError):
                client.sock.shutdown(socket.SHUT_RDWR)

    def stall(self, seconds: float, keep: bool = False, everyone: bool = True) -> None:
        """Send nothing, not even a pong, for so many seconds of the clock.

        What falls due meanwhile is lost to the clients, or with `keep` sent afterwards.
        `everyone` includes those who connect meanwhile (the handshake is answered).
        """
        with self._lock:
            until_ns = self._clock_ns() + int(seconds * 1e9)
            self._silent_until_ns, self._keeps = (until_ns if everyone else 0), keep
            for client in self._clients:
                client.silent_until_ns, client.keeps = until_ns, keep

    def skip(self, n: int = 1) -> None:
        """Apply the next n book deltas that somebody would get, but withhold them."""
        with self._lock:
            self._skips += n

    def repeat(self) -> None:
        """Send the next book delta that somebody gets twice."""
        with self._lock:
            self._repeats += 1

    def restart(self) -> None:
        """Make the next book message a snapshot with u = 1, and count on from there."""
        with self._lock:
            for book in self._books.values():
                book.restarting = True

    def refuse(self, n: int = 1) -> None:
        """Answer the next n handshakes with HTTP 502."""
        with self._lock:
            self._refusals += n

    def late_trades(self, ms: float) -> None:
        """From now on send trades so many ms of the clock after their due time."""
        self._late_ns = int(ms * NS_PER_MS * (self._speed or 1))

    def send(self, payload: str | bytes, opcode: int | None = ABNF.OPCODE_TEXT) -> None:
        """Send anything to every client; opcode None writes the bytes as they are."""
        frame = payload if opcode is None else build_frame(payload, opcode)
        text = payload if opcode == ABNF.OPCODE_TEXT else None
        with self._lock:
            for client in self._clients:
                self._send(client, frame, text)

    # ---- The market ----------------------------------------------------------------

    def _run_market(self) -> None:
        """Play the recording on the clock, then stay to end the silences."""
        while not self._open.is_set():
            if self._stopping.wait(POLL_S):
                return
            self._end_silences()
        self._start_ns = self._clock_ns()
        for line in self._timeline():
            self._wait_for(line)
            if self._stopping.is_set():
                return
            self._publish(line)
        self.finished.set()
        while not self._stopping.wait(POLL_S):
            self._end_silences()

    def _timeline(self) -> Iterator[Line]:
        """The lines in order of sending: late trades slip behind later messages."""
        late: deque[Line] = deque()
        for line in self._lines:
            while late and late[0].recv_ns <= line.recv_ns:
                yield late.popleft()
            if self._late_ns and line.message["topic"].startswith("publicTrade."):
                late.append(replace(line, recv_ns=line.recv_ns + self._late_ns))
            else:
                yield line
        yield from late

    def _wait_for(self, line: Line) -> None:
        """Return when the line is due; at full speed only let others have the lock."""
        if not self._speed:
            if self.position % BURST == 0:
                time.sleep(0)
            return
        due_ns = self._moved_ns(line.recv_ns)
        while (left_ns := due_ns - self._clock_ns()) > 0:
            if self._stopping.wait(min(left_ns / 1e9, POLL_S)):
                return
            self._end_silences()

    def _moved_ns(self, recorded_ns: int) -> int:
        """A recorded time on the server's clock."""
        offset_ns = recorded_ns - self._lines[0].recv_ns
        return self._start_ns + int(offset_ns // self._speed)

    def _publish(self, line: Line) -> None:
        """Apply one message to the server's own state; send it to its subscribers."""
        with self._lock:
            self.position += 1
            topic = line.message["topic"]
            state = self._states.get(topic)
            kind = state.apply(line.message) if state else line.message["type"]
            clients = [c for c in self._clients if topic in c.topics and not c.leaving]
            if clients and kind:
                text = compact(state.snapshot()) if kind == "fresh" else line.text
                text = self._renew(text, state.shift if state else 0)
                frame = line.frame if text is line.text else None
                frame = frame or build_frame(text)
                for _ in range(self._copies(topic, kind)):
                    for client in clients:
                        self._send(client, frame, text)

    def _copies(self, topic: str, kind: str) -> int:
        """How often a message goes out: once, but for the faults asked for."""
        if topic in self._books and kind == "delta":
            if self._skips:
                self._skips -= 1
                return 0
            if self._repeats:
                self._repeats -= 1
                return 2
        return 1

    def _renew(self, text: str, shift: int) -> str:
        """Recorded text with today's times and today's count of updates."""
        if shift:
            text = UPDATE_ID.sub(lambda m: f"{m[1]}{int(m[2]) - shift}", text)
        if self._speed:
            text = STAMP.sub(
                lambda m: f"{m[1]}{self._moved_ns(int(m[2]) * NS_PER_MS) // NS_PER_MS}",
                text,
            )
        return text

    # ---- Sending: the lock is held, so that frames never mix -----------------------

    def _send(self, client: Client, frame: bytes, text: str | bytes | None) -> None:
        """Send a frame, unless this client is in a silence."""
        if self._clock_ns() >= client.silent_until_ns:
            self._empty_backlog(client)
            self._write(client, frame, text)
        elif client.keeps:
            client.backlog.append((frame, text))

    def _write(self, client: Client, frame: bytes, text: str | bytes | None) -> None:
        """Write and remember the text; a client that cannot be written to is cut."""
        if client.leaving:
            return
        if text is not None:
            self.sent.append((client.number, text))
        try:
            client.sock.sendall(frame)
        except OSError:
            client.leaving = True
            if text is not None:
                self.sent.pop()
            with contextlib.suppress(OSError):
                client.sock.shutdown(socket.SHUT_RDWR)

    def _empty_backlog(self, client: Client) -> None:
        backlog, client.backlog = client.backlog, []
        for frame, text in backlog:
            self._write(client, frame, text)

    def _end_silences(self) -> None:
        """Send what was kept for clients whose silence is over."""
        if any(client.backlog for client in list(self._clients)):
            with self._lock:
                for client in self._clients:
                    if self._clock_ns() >= client.silent_until_ns:
                        self._empty_backlog(client)

    # ---- Connections ---------------------------------------------------------------

    def _spawn(self, work: Callable, *args) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                sock, _address = self._listener.accept()
                self._spawn(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        """One connection from its handshake to its end."""
        sock.settimeout(NOTICE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError, WebSocketException):
            client = self._handshake(sock)
            sock.settimeout(SOCKET_TIMEOUT_S)
            frames = frame_buffer(lambda n: self._read(sock, n), True)
            while client and self._answer(client, frames.recv_frame()):
                pass
        with self._lock:  # nobody is writing: the descriptor may be given up
            self._clients = [client for client in self._clients if client.sock != sock]
            sock.close()

    def _read(self, sock: socket.socket, n: int) -> bytes:
        """Up to n bytes, however long they take; the time-out is for the writer."""
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                if received := sock.recv(n):
                    return received
                break
        raise ConnectionError("the connection has ended")

    def _handshake(self, sock: socket.socket) -> Client | None:
        """Answer the HTTP upgrade, or refuse it."""
        request = b""
        while b"\r\n\r\n" not in request and len(request) < MAX_HANDSHAKE_BYTES:
            request += self._read(sock, 4096)
        key = re.search(rb"(?i)\r\nsec-websocket-key:[ \t]*(\S+)", request)
        with self._lock:
            refused, self._refusals = self._refusals > 0, max(self._refusals - 1, 0)
            if refused or key is None:
                status = "502 Bad Gateway" if refused else "400 Bad Request"
                sock.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
                return None
            self.connections += 1
            client = Client(self.connections, sock)
            client.silent_until_ns = self._silent_until_ns
            client.keeps = self._keeps
            self._clients.append(client)
            sock.sendall(accept_upgrade(key[1].decode()))
            return client

    # ---- Requests ------------------------------------------------------------------

    def _answer(self, client: Client, frame: ABNF) -> bool:
        """Answer one frame; False when the conversation is over."""
        with self._lock:
            if frame.opcode == ABNF.OPCODE_CLOSE:
                reply = build_frame(frame.data, ABNF.OPCODE_CLOSE)
                self._send(client, reply, None)
                client.leaving = True
                return False
            if frame.opcode == ABNF.OPCODE_PING:
                self._send(client, build_frame(frame.data, ABNF.OPCODE_PONG), None)
            elif frame.opcode == ABNF.OPCODE_TEXT:
                self._answer_text(client, frame.data)
        return True

    def _answer_text(self, client: Client, payload: bytes) -> None:
        try:
            request = json.loads(payload)
            op = request.get("op")
        except (ValueError, AttributeError):
            text = payload.decode(errors="replace")
            return self._reply(client, {}, f"Failed to decode incoming data:{text}")
        if op == "ping":
            self.pings += 1
            self._reply(client, request, "pong", True)
        elif op == "subscribe":
            self._subscribe(client, request)
        elif op == "unsubscribe":
            client.topics.difference_update(map(str, request.get("args") or ()))
            self._reply(client, request, "unsubscribe" if self._spot else "", True)
        else:
            self._reply(client, request, "error:invalid op")

    def _reply(
        self, client: Client, request: dict, ret_msg: str, success: bool = False
    ) -> None:
        """An ack, a failure or a pong. Spot leaves out a req_id that was not sent."""
        reply = {"success": success, "ret_msg": ret_msg}
        reply["conn_id"] = f"loopback-{client.number}"
        if "req_id" in request or not self._spot:
            reply["req_id"] = request.get("req_id", "")
        reply["op"] = request.get("op", "")
        text = compact(reply)
        self._send(client, build_frame(text), text)

    def _subscribe(self, client: Client, request: dict) -> None:
        """All topics or none; then what is known of each, and the market opens."""
        topics = [str(topic) for topic in request.get("args") or ()]
        self.subscriptions.append(topics)
        if problem := self._find_problem(client, topics):
            return self._reply(client, request, problem)
        if not self._ack_after_data:
            self._reply(client, request, "subscribe" if self._spot else "", True)
        for topic in topics:
            state = self._states.get(topic)
            if state and state.last:
                text = self._renew(compact(state.snapshot()), state.shift)
                self._send(client, build_frame(text), text)
        if self._ack_after_data:
            self._reply(client, request, "subscribe" if self._spot else "", True)
        client.topics.update(topics)
        if not self._hold:
            self._open.set()

    def _find_problem(self, client: Client, topics: list[str]) -> str:
        """Why Bybit would refuse these topics, in its words; "" if it would not."""
        if self._spot and len(topics) > SPOT_MAX_ARGS:
            return f"args size >{SPOT_MAX_ARGS}"
        for topic in topics:
            channel, _, symbol = topic.rpartition(".")
            common = channel in ("publicTrade", "tickers") and symbol in self._symbols
            if not common and topic not in self._topics:
                return f"error:handler not found,topic:{topic}"
            if topic in client.topics:
                return f"error:already subscribed,topic:{topic}"
        return ""


def accept_upgrade(key: str) -> bytes:
    """The server's half of the opening handshake (RFC 6455, section 4.2.2).

    The key "dGhlIHNhbXBsZSBub25jZQ==" is accepted with "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=".
    """
    digest = hashlib.sha1((key + HANDSHAKE_GUID).encode()).digest()
    lines = (
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {base64.b64encode(digest).decode()}",
    )
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


# ---- Command line ------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Serve one recording until standard input ends, or until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("file", help="recording, .gz or plain")
    parser.add_argument("--port", type=int, default=0, help="0 = any free port")
    parser.add_argument("--speed", default="1", help="times faster, or max")
    parser.add_argument("--spot", action="store_true", help="answer as the spot socket")
    options = parser.parse_args(argv)
    speed = None if options.speed == "max" else float(options.speed)
    lines = read_recording(options.file)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with (
        LoopbackExchange(
            lines, speed=speed, spot=options.spot, port=options.port
        ) as exchange,
        contextlib.suppress(KeyboardInterrupt),
    ):
        print(exchange.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
