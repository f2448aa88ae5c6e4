"""A loopback exchange: Bybit's public V5 protocol on ws://127.0.0.1, for the tests.

It replays recorded lines through a real WebSocket, so that a feed is tested with
sockets, threads and time-outs as they are, and it misbehaves on command: gaps,
repeats, restarts, resets, silence. A request and its answers look like this:

    > {"req_id":"7","op":"subscribe","args":["orderbook.200.BTCUSDT"]}
    < {"success":true,"ret_msg":"","conn_id":"loopback-1","req_id":"7","op":"subscribe"}
    < {"topic":"orderbook.200.BTCUSDT","type":"snapshot","ts":...,"data":{...},...}

The market is one thread. It starts at the first subscription and goes on whether or
not anybody listens: who is disconnected misses messages, and gets a snapshot of the
book as it then is when he comes back.

Time. With first = receive time of the first line, t0 = the clock at the start, a line
received at x is sent when the clock shows t0 + (x - first); the times inside it (ts, cts,
T) are moved by the same rule and rounded down to the millisecond.

What it does not do: TLS, compression, unsubscribing, limits on connections and topics, an
idle time-out, the words of the spot socket, the repeated snapshot of depth 1 (unless recorded).

    python tests/exchange.py data/sample.jsonl.gz [--port 8765]     says how to watch it
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import feed  # noqa: E402  (for the command line alone)

from websocket import ABNF, WebSocketException, frame_buffer  # noqa: E402

HANDSHAKE_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
POLL_S = 0.001  # the clock may run faster than the wall: look at it this often
NOTICE_S = 0.02  # how soon close() is noticed where nobody connects
NS_PER_MS, TEXT = 1_000_000, ABNF.OPCODE_TEXT
STAMP = re.compile(r'("(?:ts|cts|T)"\s*:\s*)(\d+)')
UPDATE_ID = re.compile(r'("u"\s*:\s*)(\d+)')


def build_frame(payload: str | bytes, opcode: int = TEXT) -> bytes:
    """A WebSocket frame as a server sends it: never masked (RFC 6455, section 5.2)."""
    data = payload.encode() if isinstance(payload, str) else payload
    return ABNF(1, opcode=opcode, mask_value=0, data=data).format()


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


def messages_of(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str, dict]]:
    """What the market said, and each line decoded: no acks, nothing of ours, nothing broken."""
    for recv_ns, text in lines:
        with contextlib.suppress(ValueError):
            if "topic" in (message := json.loads(text)):
                yield recv_ns, text, message


class Book:
    """The true book of one topic: on each side price text to size text."""

    def __init__(self) -> None:
        self.sides: dict[str, dict[str, str]] = {"b": {}, "a": {}}
        self.last: dict = {}  # the message applied last, with the recorded numbers
        self.shift = 0  # recorded u minus published u: above 0 after a restart
        self.is_restarting = False

    def apply(self, message: dict) -> None:
        if message["type"] == "snapshot":
            self.sides, self.shift = {"b": {}, "a": {}}, 0
        for name, side in self.sides.items():
            for price, size in message["data"][name]:
                side[price] = size
                if not float(size):
                    del side[price]
        self.last = message

    def snapshot(self) -> str:
        """All of it, in the shape of the last message."""
        rows = {name: list(side.items()) for name, side in self.sides.items()}
        return compact(self.last | {"type": "snapshot", "data": self.last["data"] | rows})


@dataclass(eq=False)
class Client:
    """One connection. The exchange's lock guards everything in it but the reading."""

    sock: socket.socket
    number: int = 0  # from 1 on after the handshake
    topics: set[str] = field(default_factory=set)

    def read(self, n: int) -> bytes:
        if received := self.sock.recv(n):
            return received
        raise ConnectionError("the connection has ended")


class LoopbackExchange(contextlib.AbstractContextManager):
    """A server with one market, any number of clients, and faults on command.

    lines: (recv_ns, text) as in a recording, in order of time, with one order book.
    clock_ns: what the pacing and the moved times go by.

    For the tests to look at: `url`, `connections` (handshakes), `subscriptions` (args
    of each subscribe request), `pings` (JSON pings), `finished` (an Event), `sent`
    ((connection number, text) of every text frame), `book()`.
    """

    def __init__(
        self, lines: Iterable[tuple[int, str]], *,
        clock_ns: Callable[[], int] = time.time_ns, port: int = 0,
    ) -> None:  # fmt: skip
        self._clock_ns = clock_ns
        # The first lines tell the topics. The others are read when they fall due.
        lines = messages_of(lines)
        first = list(islice(lines, 2000))
        topics = {message["topic"] for _, _, message in first}
        books = [topic for topic in topics if "orderbook." in topic]
        if len(books) != 1:
            raise feed.UserError(f"the lines are of {len(books)} order books: one is needed")
        symbol, self._book_topic = books[0].rpartition(".")[2], books[0]
        self._topics = topics | {f"publicTrade.{symbol}", f"tickers.{symbol}"}
        self._first_ns, self._lines = first[0][0], chain(first, lines)
        self._book = Book()
        self.connections = self.pings = 0
        self.subscriptions: list[list[str]] = []
        self.sent: list[tuple[int, str | bytes]] = []
        self.finished = threading.Event()
        self._start_ns = 0  # t0, set when the market starts
        self._copies: deque[int] = deque()  # how often the next deltas go out; then once each
        self._refusals = self._late_ns = self._silent_until_ns = self._paused_until_ns = 0
        self._clients: list[Client] = []
        self._lock = threading.RLock()
        self._open, self._stopping = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        self._listener.settimeout(NOTICE_S)
        self.url = f"ws://127.0.0.1:{self._listener.getsockname()[1]}"
        self._spawn(self._accept)
        self._spawn(self._run_market)

    def _spawn(self, work: Callable, *args: object) -> None:
        self._threads.append(threading.Thread(target=work, args=args, daemon=True))
        self._threads[-1].start()

    def close(self, *_: object) -> None:
        """Cut every connection and end every thread. May be called twice."""
        self._stopping.set()
        self._open.set()
        for thread in self._threads:
            while thread.is_alive():
                self.vanish()  # every time: somebody may just have got in
                thread.join(NOTICE_S)
        self._listener.close()

    __exit__ = close

    def book(self) -> dict[int, dict[int, float]]:
        """The true book: {1: bids, -1: asks}, each {side x price in ticks of 0.1: size}."""
        with self._lock:
            bids, asks = (list(self._book.sides[name].items()) for name in "ba")
        return {sign: {sign * round(float(price) * 10): float(size) for price, size in rows}
                for sign, rows in ((1, bids), (-1, asks))}  # fmt: skip

    # ---- Faults: from any thread, at once or at the next message -------------------

    def close_clients(self, code: int = 1001) -> None:
        """Say goodbye to every client with a proper CLOSE frame."""
        self.send(struct.pack("!H", code), ABNF.OPCODE_CLOSE)
        for client in self._clients:
            client.topics.clear()

    def vanish(self, how: int = socket.SHUT_RDWR, linger: tuple[int, int] = (0, 0)) -> None:
        """End every connection without a CLOSE frame: the client reads end of file."""
        for client in list(self._clients):
            with contextlib.suppress(OSError):
                option = struct.pack("ii", *linger)
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
                client.sock.shutdown(how)

    def reset_clients(self) -> None:
        """Reset every connection (TCP RST): the client's read or write fails.

        Half a shutdown, unseen on the wire, wakes the connection's thread; its close sends it.
        """
        self.vanish(socket.SHUT_RD, (1, 0))

    def stall(self, seconds: float, keep: bool = False) -> None:
        """Send nothing to anybody, not even a pong, for so many seconds of the clock.

        What falls due meanwhile is lost to the clients, or with `keep` sent afterwards.
        """
        with self._lock:
            self._silent_until_ns = self._clock_ns() + int(seconds * 1e9)
            self._paused_until_ns = self._silent_until_ns if keep else 0

    def skip(self, n: int = 1) -> None:
        """Apply the next n book deltas that somebody would get, but withhold them."""
        self._copies += [0] * n

    def repeat(self) -> None:
        """Send the next book delta that somebody gets twice."""
        self._copies.append(2)

    def restart(self) -> None:
        """Make the next book message a snapshot with u = 1, and count on from there."""
        self._book.is_restarting = True

    def refuse(self, n: int = 1) -> None:
        """Answer the next n handshakes with HTTP 502."""
        self._refusals += n

    def late_trades(self, ms: float) -> None:
        """From now on send trades so many ms of the clock after their due time."""
        self._late_ns = int(ms * NS_PER_MS)

    def send(self, payload: str | bytes, opcode: int | None = TEXT) -> None:
        """Send anything to every client; opcode None writes the bytes as they are."""
        with self._lock:
            for client in self._clients:
                self._send(client, payload, opcode)

    # ---- The market ----------------------------------------------------------------

    def _run_market(self) -> None:
        """Play the recording on the clock."""
        self._open.wait()
        self._start_ns = self._clock_ns()
        for line in self._timeline():
            while not self._publish(*line):
                if self._stopping.wait(POLL_S):
                    return
            time.sleep(0)  # others want the lock
        self.finished.set()

    def _timeline(self) -> Iterator[tuple[int, str, dict]]:
        """The lines in order of sending: late trades slip behind later messages."""
        late = deque()
        for recv_ns, text, message in self._lines:
            while late and late[0][0] <= recv_ns:
                yield late.popleft()
            if self._late_ns and message["topic"].startswith("publicTrade."):
                late.append((recv_ns + self._late_ns, text, message))
            else:
                yield recv_ns, text, message
        yield from late

    def _publish(self, recv_ns: int, text: str, message: dict) -> bool:
        """Send a line to its subscribers; False if it is not yet due."""
        with self._lock:
            is_due = self._clock_ns() >= max(self._moved_ns(recv_ns), self._paused_until_ns)
            if not is_due or self._stopping.is_set():
                return False

            # The exchange itself misses nothing; after a restart it tells all, from 1 on.
            is_delta = message["type"] == "delta"
            if book := self._book if message["topic"] == self._book_topic else None:
                book.apply(message)
                if book.is_restarting:
                    book.is_restarting, book.shift = False, message["data"]["u"] - 1
                    text, is_delta = book.snapshot(), False

            # Whoever has subscribed gets it, unless a fault was asked for.
            clients = [client for client in self._clients if message["topic"] in client.topics]
            is_faulty = self._copies and clients and book and is_delta
            copies = self._copies.popleft() if is_faulty else 1
            text = self._renew(text, book)
            for client in clients * copies:
                self._send(client, text)
            return True

    def _moved_ns(self, recorded_ns: int) -> int:
        """A recorded time on the server's clock."""
        return self._start_ns + recorded_ns - self._first_ns

    def _renew(self, text: str, book: Book | None) -> str:
        """Recorded text with today's times and today's count of updates."""

        def moved(match: re.Match) -> str:
            return f"{match[1]}{self._moved_ns(int(match[2]) * NS_PER_MS) // NS_PER_MS}"

        if book and book.shift:
            text = UPDATE_ID.sub(lambda match: f"{match[1]}{int(match[2]) - book.shift}", text)
        return STAMP.sub(moved, text)

    def _send(self, client: Client, payload: str | bytes, opcode: int | None = TEXT) -> None:
        """Write a frame, unless in a silence; the lock keeps frames from mixing."""
        if not client.number or self._clock_ns() < self._silent_until_ns:
            return
        try:
            if opcode == TEXT:
                self.sent.append((client.number, payload))  # before it can be received
            client.sock.sendall(payload if opcode is None else build_frame(payload, opcode))
        except OSError:
            with contextlib.suppress(OSError):
                client.sock.shutdown(socket.SHUT_RDWR)

    # ---- Connections and requests --------------------------------------------------

    def _accept(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                self._spawn(self._serve, Client(self._listener.accept()[0]))

    def _serve(self, client: Client) -> None:
        """One connection from its handshake to its end."""
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._clients.append(client)
        with contextlib.suppress(OSError, WebSocketException):
            self._shake_hands(client)
            frames = frame_buffer(client.read, True)
            while True:
                self._answer(client, frames.recv_frame())
        with self._lock:  # nobody is writing: the descriptor may be given up
            self._clients.remove(client)
            client.sock.close()

    def _shake_hands(self, client: Client) -> None:
        """Answer the HTTP upgrade (RFC 6455, section 4.2.2), or refuse it."""
        request = b""
        while b"\r\n\r\n" not in request:
            request += client.read(4096)
        with self._lock:
            if self._refusals:
                self._refusals -= 1
                client.sock.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
                raise ConnectionError("refused")
            key = re.search(rb"(?i)\r\nsec-websocket-key:[ \t]*(\S+)", request)[1]
            digest = base64.b64encode(hashlib.sha1(key + HANDSHAKE_GUID).digest())
            status = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
            accept = b"Connection: Upgrade\r\nSec-WebSocket-Accept: " + digest + b"\r\n\r\n"
            client.sock.sendall(status + accept)
            client.number = self.connections = self.connections + 1

    def _answer(self, client: Client, frame: ABNF) -> None:
        with self._lock:
            if frame.opcode == ABNF.OPCODE_CLOSE:
                self._send(client, frame.data, ABNF.OPCODE_CLOSE)
                raise ConnectionError("the client has said goodbye")
            if frame.opcode == ABNF.OPCODE_PING:
                self._send(client, frame.data, ABNF.OPCODE_PONG)
            elif frame.opcode == TEXT:
                request = json.loads(frame.data)
                if request["op"] == "subscribe":
                    return self._subscribe(client, request)
                self.pings += 1
                self._reply(client, request, "pong")

    def _reply(self, client: Client, request: dict, ret_msg: str, success: bool = True) -> None:
        """An ack, a failure or a pong."""
        reply = {"success": success, "ret_msg": ret_msg, "conn_id": f"loopback-{client.number}"}
        reply |= {"req_id": request.get("req_id", ""), "op": request["op"]}
        self._send(client, compact(reply))

    def _subscribe(self, client: Client, request: dict) -> None:
        """All topics or none; then the book as it is, and the market opens."""
        topics = request["args"]
        self.subscriptions.append(topics)
        if unknown := set(topics) - self._topics:
            problem = f"error:handler not found,topic:{min(unknown)}"
            return self._reply(client, request, problem, False)
        self._reply(client, request, "")
        if self._book_topic in topics and self._book.last:
            self._send(client, self._renew(self._book.snapshot(), self._book))
        client.topics.update(topics)
        self._open.set()


class Firehose(LoopbackExchange):
    """Sends it all as fast as the socket takes it, from frames built beforehand, just once."""

    def _run_market(self) -> None:
        frames = [build_frame(text) for _, text, _ in self._lines]
        self._open.wait()
        for frame in frames:
            self._clients[0].sock.sendall(frame)


@contextlib.contextmanager
def served(path: Path, *flags: str) -> Iterator[str]:
    """The URL of an exchange in a process of its own."""
    command = [sys.executable, __file__, path, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().partition(" ")[0]
        finally:
            process.kill()


def port(text: str) -> int:
    return feed.must_be(int, int(text), 0, 65_535)


def main(arguments: list[str] | None = None) -> int:
    """Serve one recording until Ctrl-C."""
    parser = feed.Arguments(prog="exchange.py", description=main.__doc__)
    parser.add_argument("file", type=Path, help="recording")
    parser.add_argument("--port", type=port, default=0, help="on 127.0.0.1 (any that is free)")
    parser.add_argument("--max", action="store_true", help="as fast as the socket takes it")
    options = parser.parse_args(arguments)

    def serve() -> None:
        kind = Firehose if options.max else LoopbackExchange
        with kind(feed.read_lines(options.file), port=options.port) as exchange:
            program = f"python marketmaker.py --url {exchange.url}"
            print(f"{exchange.url} is ready: {program}  (Ctrl-C ends it)", flush=True)
            threading.Event().wait()

    return feed.exit_cleanly(serve)


if __name__ == "__main__":
    sys.exit(main())
