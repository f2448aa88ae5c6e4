"""A live session and the replay of its recording decide the same, byte for byte.

The session runs the whole program against the loopback exchange, with every kind of trouble
in it, on a clock that runs twenty times as fast as the wall's (threads, locks and sockets
are real). PARITY_ROUNDS=20 repeats it more often than the suite does.
"""

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import feed
import marketmaker
from exchange import LoopbackExchange, wait_until
from feed import MS, NS
from simulate import simulate

import numpy as np
import pytest

SPEED = 20  # seconds of the session in one of the wall
DURATION_S = 171.37  # ends in the middle of a second
LATE_MS = 300
ROUNDS = int(os.environ.get("PARITY_ROUNDS", 1))
FLAGS = (
    "--gamma 0.05 --delta 0.1 --zeta 0.1 --min-half-spread-bps 0.02 "
    "--max-inventory 30 --max-depth-share 1 --requote-move-bps 0.5"
).split()


@pytest.fixture
def clock_ns() -> Callable[[], int]:
    wall_ns, start_ns = time.time_ns(), time.monotonic_ns()
    return lambda: wall_ns + (time.monotonic_ns() - start_ns) * SPEED


@pytest.fixture
def makers(monkeypatch) -> list[marketmaker.MarketMaker]:
    """The market makers that the program builds, so that a test can look at them."""
    built = []

    class Watched(marketmaker.MarketMaker):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            built.append(self)

    monkeypatch.setattr(marketmaker, "MarketMaker", Watched)
    monkeypatch.setattr(feed, "BACKOFF_S", (0.05, 0.2))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return built


def trouble(exchange: LoopbackExchange, params: Path, makers: list, clock_ns: Callable) -> list:
    """When something happens in the session, in seconds of its clock, and what."""

    def hit(late_ms: int = 0) -> None:
        """A trade takes the queue at our bid and a little of us; a late one goes through it."""
        maker, ms = makers[-1], clock_ns() // MS - late_ms
        if maker.decision.bid_qty:
            level = round(maker.decision.bid_price / 0.1)
            size = f"{0.05 + maker.market.book.sizes[level]:.3f}"
            price = f"{(level - bool(late_ms)) / 10:.2f}"
            trade = dict(T=ms, s="BTCUSDT", S="Sell", v=size, p=price)
            message = dict(topic="publicTrade.BTCUSDT", type="snapshot", ts=ms, data=[trade])
            exchange.send(json.dumps(message))

    return [
        *((at_s, hit) for at_s in (18, 22, 26, 30, 34, 38)),
        (40, lambda: hit(LATE_MS)),
        (42, exchange.close_clients),
        *((at_s, hit) for at_s in (56, 58)),
        (60, exchange.skip),
        (80, lambda: exchange.stall(7, keep=True)),  # a silence, then all at once
        (100, lambda: params.write_text('{"alpha": 3.0, "order_qty": 2.5}')),
        (103, lambda: exchange.send('{"topic":"orderbook.200.BTCUSDT"}')),
        *((at_s, lambda: hit(LATE_MS)) for at_s in (108, 111, 114, 117)),
        (118, exchange.reset_clients),
        (127, lambda: exchange.send(b"\xff\xfe not text")),
        (128, lambda: exchange.send('{"op":"local",\n"event":"params"}')),
        (132, lambda: exchange.late_trades(LATE_MS)),
        (140, exchange.repeat),
        (142, lambda: params.write_text("no json")),
        (150, exchange.restart),
    ]


def make_trouble(exchange: LoopbackExchange, *rest) -> None:
    """Play the script from the first subscription on."""
    assert wait_until(lambda: exchange.subscriptions)
    start_s = time.monotonic()
    for at_s, act in trouble(exchange, *rest):
        time.sleep(max(0.0, at_s / SPEED - (time.monotonic() - start_s)))
        act()


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_replay_of_a_recorded_live_session_writes_the_same_decision_log(
    seed, makers, clock_ns, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    params = Path("params.json")
    params.write_text('{"alpha": 1.0, "order_qty": 3.0}')
    lines = simulate(np.random.default_rng(seed), 0.06, trades_per_s=20)
    with LoopbackExchange(lines, clock_ns=clock_ns) as exchange:
        script = exchange, params, makers, clock_ns
        (thread := threading.Thread(target=make_trouble, args=script, daemon=True)).start()
        live = ["--live", "--url", exchange.url, "--duration", str(DURATION_S), *FLAGS]
        live += "--record r.gz --params params.json --log live.csv".split()
        assert marketmaker.main(live, clock_ns) == 0
        thread.join(5)
        assert exchange.connections >= 4
    assert marketmaker.main("--replay r.gz --speed max --log replay.csv".split()) == 0
    assert Path("live.csv").read_bytes() == Path("replay.csv").read_bytes()
    (maker, again), fills = makers, makers[0].account.fills
    assert fills == again.account.fills and maker.account.equity == again.account.equity

    # The session had everything that could make a difference.
    lines = list(feed.read_lines(Path("r.gz")))
    assert len(fills) >= 20
    assert any(fill.qty < 2.5 for fill in fills), "no partial fill"
    assert any(f.recv_ns - f.time_ns >= LATE_MS * MS for f in fills), "no late fill"
    assert maker.reasons["book lost"] >= 4 and maker.reasons["book stale"] >= 1
    assert (maker.parameters.alpha, maker.parameters.order_qty) == (3.0, 2.5)
    events = Counter(json.loads(text).get("event") for _, text in lines)
    assert (events["start"], events["params"], events["raw"], events["end"]) == (1, 1, 2, 1)
    assert lines[-1][0] % NS != 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_stops_the_recording_and_not_the_quoting(
    makers, clock_ns, tmp_path, capsys, monkeypatch
):
    record, lines = feed.GrowingFile.record, simulate(np.random.default_rng(3), 0.02)

    def record_on_a_full_disk(recorder: feed.GrowingFile, *line) -> None:
        recorder.file.close()
        recorder.file = open("/dev/full", "wb", buffering=0)
        record(recorder, *line)

    monkeypatch.setattr(feed.GrowingFile, "record", record_on_a_full_disk)
    with LoopbackExchange(lines, clock_ns=clock_ns) as exchange:
        flags = ["--live", "--url", exchange.url, "--record", str(tmp_path / "r.gz")]
        assert marketmaker.main([*flags, "--duration", "60"], clock_ns) == 2
    out, err = capsys.readouterr()
    assert all("r.gz stopped: No space left on device" in text for text in (out, err))
    assert "0 malformed" in out and "stopping" not in out and makers[0].sources["lp"] > 5
