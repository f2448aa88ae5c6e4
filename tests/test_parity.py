"""A live session and the replay of its recording decide the same, byte for byte.

The session runs the whole program against the loopback exchange with every kind of
trouble in it, on a clock that runs twenty times as fast as the wall's (threads, locks and
sockets are real). PARITY_ROUNDS=20 repeats it more often than the suite does.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from exchange import LoopbackExchange
from simulate import simulate

import feed
import marketmaker

SPEED = 20  # seconds of the session in one of the wall
DURATION_S = 171.37  # ends in the middle of a second
LATE_MS = 300
ROUNDS = int(os.environ.get("PARITY_ROUNDS", 1))
FLAGS = (
    "--gamma 0.05 --delta 0.1 --zeta 0.1 --min-half-spread-bps 0.02 --order-qty 3 "
    "--max-inventory 30 --max-depth-share 1 --requote-move-bps 0.5"
).split()


def fast_clock():
    wall, start = time.time_ns(), time.monotonic_ns()
    return lambda: wall + (time.monotonic_ns() - start) * SPEED


def print_at_our_bid(exchange: LoopbackExchange, maker, clock_ns, late_ms: int = 0) -> None:
    """A trade of the exchange's at our bid that takes its queue and a little of us; or,
    told of late, one tick through it."""
    price, book = maker.quote.bid_price, maker.book
    if price is None:
        return
    ticks = round(price / 0.1)
    size = 0.05 + book.ladders[feed.BID].size_at(ticks)
    trade = dict(T=clock_ns() // feed.MS - late_ms, s="BTCUSDT", S="Sell", v=f"{size:.3f}")
    trade |= dict(p=f"{(ticks - bool(late_ms)) / 10:.2f}", i="made", BT=False, RPI=False)
    topic = dict(topic="publicTrade.BTCUSDT", type="snapshot", ts=trade["T"], data=[trade])
    exchange.send(json.dumps(topic))


def trouble(exchange: LoopbackExchange, params: Path, makers: list, clock_ns):
    """What happens in the session, and when, in seconds of its clock."""

    def hit(late_ms: int = 0) -> None:
        print_at_our_bid(exchange, makers[-1], clock_ns, late_ms)

    return [
        *((at_s, hit) for at_s in (18, 22, 26, 30, 34, 38)),
        (40, lambda: hit(LATE_MS)),
        (42, exchange.close_clients),
        *((at_s, hit) for at_s in (56, 58)),
        (60, exchange.skip),
        (80, lambda: exchange.stall(7, keep=True)),  # a silence, then all at once
        (100, lambda: params.write_text(json.dumps({"alpha": 3.0, "order_qty": 2.5}))),
        (103, lambda: exchange.send('{"topic":"orderbook.200.BTCUSDT"}')),
        (117, lambda: hit(LATE_MS)),
        (118, exchange.reset_clients),
        (127, lambda: exchange.send(b"\xff\xfe not text")),
        (128, lambda: exchange.send('{"op":"local",\n"event":"params"}')),
        (132, lambda: exchange.late_trades(LATE_MS)),
        (140, exchange.repeat),
        (142, lambda: params.write_text("no json")),
        (150, exchange.restart),
    ]


def make_trouble(exchange: LoopbackExchange, *rest) -> threading.Thread:
    """A thread that plays the script from the first subscription on."""

    def run() -> None:
        while not exchange.subscriptions:
            time.sleep(0.001)
        start = time.monotonic()
        for at_s, act in trouble(exchange, *rest):
            time.sleep(max(0.0, at_s / SPEED - (time.monotonic() - start)))
            act()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def makers(monkeypatch):
    """The market makers that the program builds, so that a test can look at them after."""
    built = []

    class Watched(marketmaker.MarketMaker):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            built.append(self)

    monkeypatch.setattr(marketmaker, "MarketMaker", Watched)
    monkeypatch.setattr(feed, "BACKOFF_S", (0.05, 0.2))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return built


@pytest.mark.parametrize("round_number", range(ROUNDS))
def test_replay_of_a_recorded_live_session_writes_the_same_decision_log(
    round_number, makers, tmp_path, capsys
):
    recording, live_log, replay_log = (tmp_path / n for n in ("r.gz", "live.csv", "replay.csv"))
    params = tmp_path / "params.json"
    params.write_text(json.dumps({"alpha": 1.0, "order_qty": 3.0}))
    lines = list(simulate(np.random.default_rng(round_number), 0.06, trades_per_s=20))
    clock_ns = fast_clock()
    with LoopbackExchange(lines, clock_ns=clock_ns) as exchange:
        script = make_trouble(exchange, params, makers, clock_ns)
        live = ["--live", "--url", exchange.url, "--record", str(recording)]
        live += ["--params", str(params)]
        live += ["--log", str(live_log), "--duration", str(DURATION_S), *FLAGS]
        assert marketmaker.main(live, clock_ns) == 0
        script.join(5)
        assert exchange.connections >= 4
    replayed = ["--replay", str(recording), "--speed", "max", "--log", str(replay_log)]
    assert marketmaker.main(replayed) == 0
    capsys.readouterr()

    assert live_log.read_bytes() == replay_log.read_bytes()
    first, second = makers
    assert first.exchange.fills == second.exchange.fills
    assert first.state.equity == second.state.equity
    check_that_the_session_had_everything(first, recording)


def check_that_the_session_had_everything(maker, recording: Path) -> None:
    fills = maker.exchange.fills
    assert len(fills) >= 20
    assert any(fill.qty < 2.5 for fill in fills), "no partial fill"
    late_ns = LATE_MS * feed.MS
    assert any(fill.recv_ns - fill.time_ns >= late_ns for fill in fills), "no late fill"
    reasons = maker.counts
    assert reasons["book lost"] >= 4 and reasons["book stale"] >= 1
    assert maker.parameters.alpha == 3.0 and maker.parameters.order_qty == 2.5
    lines = list(feed.read_lines(recording))
    events = Counter(json.loads(text).get("event") for _, text in lines)
    assert (events["start"], events["params"], events["raw"], events["end"]) == (1, 1, 2, 1)
    assert lines[-1][0] % feed.NS != 0


class FullDisk:
    """A file that takes a little and then no more."""

    def __init__(self, file):
        self.file, self.left, self.close = file, 20_000, file.close
        self.flush = file.flush

    def write(self, data: bytes) -> int:
        self.left -= len(data)
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)


def test_a_full_disk_stops_the_recording_and_not_the_quoting(makers, tmp_path, capsys, monkeypatch):
    lines = list(simulate(np.random.default_rng(3), 0.02))
    clock_ns = fast_clock()
    opened = feed.Recorder.__init__

    def open_on_a_full_disk(recorder, path):
        opened(recorder, path)
        recorder.file.file = FullDisk(recorder.file.file)

    monkeypatch.setattr(feed.Recorder, "__init__", open_on_a_full_disk)
    with LoopbackExchange(lines, clock_ns=clock_ns) as exchange:
        flags = ["--live", "--url", exchange.url, "--record", str(tmp_path / "r.gz")]
        assert marketmaker.main([*flags, "--duration", "60"], clock_ns) == 0
    out = capsys.readouterr().out
    assert "r.gz stopped: No space left on device" in out
    assert makers[0].counts["lp"] > 5
