"""Our fills against those of hftbacktest, on a simulated recording and on a real one.

hftbacktest is no dependency, so these tests are skipped where it is missing. To run them:

    pip install hftbacktest
    python -m pytest tests/test_peer.py

The backtest writes its quotes; hftbacktest is given these quotes as fixed ones, on events
made here from the raw lines, without feed.py. Its exchange fills whole orders or none, its
queue model is the risk-averse one, and its answers take as long as the feed.
"""

import gzip
import os
import warnings
from pathlib import Path

import backtest
import optimize
import simulate
from exchange import messages_of
from test_backtest import read_csv

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it and numba warn of at import is not ours
    pytest.importorskip("hftbacktest", reason="not installed: pip install hftbacktest")
    import numba
    from hftbacktest import BacktestAsset, HashMapMarketDepthBacktest, types
    from hftbacktest.order import FILLED, GTX, LIMIT, NEW, NONE

BINANCE = Path(os.environ.get("RECORDINGS", ".")) / "binance_usdm_BTCUSDT_20230404.jsonl.gz"
TICK, LOT, MS, FEED_LAG_MS = 0.1, 0.001, 1_000_000, 25
AT_THE_TOUCH = (
    "--gamma 0 --delta 0 --zeta 0 --min-half-spread-bps 0.01 --requote-move-bps 50 "
    "--max-inventory 1000"  # never reached
)
ONE_LOT = "--order-qty 0.001 --max-depth-share 1"
MANY_LOTS = "--order-qty 0.05 --max-depth-share 0.002"


@pytest.fixture(scope="module", params=["simulated", "Binance"])
def recording(request, tmp_path_factory):
    """Where every message is heard FEED_LAG_MS after it was true."""
    if request.param == "Binance":
        if not BINANCE.exists():
            pytest.skip(f"RECORDINGS names no folder with {BINANCE.name}")
        return BINANCE
    path = tmp_path_factory.mktemp("simulated") / "recording.jsonl.gz"
    with pytest.MonkeyPatch.context() as patch:
        for name, ms in dict(LAG_MS=FEED_LAG_MS, JITTER_MS=0, SPIKE_SHARE=0).items():
            patch.setattr(simulate, name, ms)
        assert simulate.main(["--out", str(path), "--hours", "0.15"]) == 0
    return path


def list_events(recording):
    """(event, exchange time, receive time, price, size) in the recording's order."""
    with gzip.open(recording, "rt") as file:
        lines = [line.split(" ", 1) for line in file]
    for recv_ns, _, message in messages_of((int(stamp), text) for stamp, text in lines):
        topic, data = message["topic"].partition(".")[0], message["data"]
        if topic == "publicTrade":
            for trade in data:
                side = {"Buy": types.BUY_EVENT, "Sell": types.SELL_EVENT}[trade["S"]]
                kind = types.TRADE_EVENT | side
                yield kind, trade["T"] * MS, recv_ns, trade["p"], trade["v"]
        elif topic == "orderbook":
            exch_ns, is_whole = message["cts"] * MS, message["type"] == "snapshot"
            kind = types.DEPTH_SNAPSHOT_EVENT if is_whole else types.DEPTH_EVENT
            for side, rows in ((types.BUY_EVENT, data["b"]), (types.SELL_EVENT, data["a"])):
                if is_whole:
                    yield types.DEPTH_CLEAR_EVENT | side, exch_ns, recv_ns, rows[-1][0], 0
                for price, size in rows:
                    yield kind | side, exch_ns, recv_ns, price, size


@pytest.fixture(scope="module")
def events(recording):
    """The recording as hftbacktest's events."""
    kind, exch_ns, recv_ns, price, size = zip(*list_events(recording))
    events = np.zeros(len(kind), types.event_dtype)
    events["ev"] = np.array(kind, np.uint64) | np.uint64(types.EXCH_EVENT | types.LOCAL_EVENT)
    events["exch_ts"], events["local_ts"] = exch_ns, recv_ns
    events["px"], events["qty"] = np.array(price, float), np.array(size, float)
    for clock in ("exch_ts", "local_ts"):
        assert (np.diff(events[clock]) >= 0).all()  # one array serves both clocks
    assert (events["local_ts"] - events["exch_ts"] == FEED_LAG_MS * MS).all()
    return events


@numba.njit
def follow(peer, time_ns, ticks, lots):
    """Keep the orders wanted in the peer's book; its fills (time, side, ticks) at the end.

    Columns of ticks and lots: bid, ask; 0 lots = no order. An order that is neither filled
    nor refused, as far as we know, stands; wanted unchanged, it is left alone.
    """
    sent = np.zeros(2, np.int64)  # row + 1 that sent the order of each side; 0 = none
    peer.elapse(0)
    for row in range(len(time_ns)):
        if peer.elapse(time_ns[row] - peer.current_timestamp):
            break  # the data have ended
        for k in range(2):
            if sent[k]:
                status = peer.orders(0).get(2 * sent[k] + k).status
                before = sent[k] - 1
                stands = status == NEW or status == NONE
                if stands and ticks[before, k] == ticks[row, k] and lots[before, k] == lots[row, k]:
                    continue
                if stands and peer.cancel(0, 2 * sent[k] + k, False):
                    raise RuntimeError("cancel refused: its order is still under way")
                sent[k] = 0
            if lots[row, k]:
                sent[k] = row + 1
                order = (2 * sent[k] + k, ticks[row, k] * TICK, lots[row, k] * LOT, GTX, LIMIT)
                if k == 0:
                    peer.submit_buy_order(0, *order, False)
                else:
                    peer.submit_sell_order(0, *order, False)
    peer.elapse(60_000 * MS)
    fills = [(np.int64(0), np.int64(0), np.int64(0)) for _ in range(0)]
    values = peer.orders(0).values()
    while values.has_next():
        order = values.get()
        if order.status == FILLED:
            fills.append((order.exch_timestamp, np.int64(order.side), order.exec_price_tick))
    return fills


def fills_of_peer(events, quotes, latency_ms):
    """What hftbacktest fills of the quotes."""
    time_ns = np.array([int(row["time_ns"]) for row in quotes])
    ticks, lots = (
        np.array([[round(float(row[f"{side}_{name}"] or 0) / unit) for side in ("bid", "ask")]
                  for row in quotes])
        for name, unit in (("price", TICK), ("qty", LOT))
    )  # fmt: skip
    asset = BacktestAsset().data(events).linear_asset(1.0).tick_size(TICK).lot_size(LOT)
    asset = asset.constant_order_latency(round(latency_ms * MS), FEED_LAG_MS * MS)
    asset = asset.risk_adverse_queue_model().no_partial_fill_exchange()
    peer = HashMapMarketDepthBacktest([asset])
    fills = follow(peer, time_ns, ticks, lots)
    peer.close()
    return sorted(fills)


@pytest.mark.parametrize(
    "latency_ms, flags",
    # decisions at .025 s arrive with a book message after 75 ms; sizes change at every decision
    [(0, ONE_LOT), (5, ONE_LOT), (75, MANY_LOTS)],
)
def test_every_fill_is_that_of_hftbacktest(
    recording, events, tmp_path, monkeypatch, latency_ms, flags
):
    """A decision each tenth of a second: the peer cancels no order that is still under way."""
    monkeypatch.setattr(optimize, "get_optimization_frequency", lambda *_: 0.1)
    flags = f"{AT_THE_TOUCH} {flags} --order-latency-ms {latency_ms}".split()
    given = ["--data", str(recording), "--out", str(tmp_path), "--peer-rules", *flags]
    assert backtest.main(given) == 0
    fills, quotes = (read_csv(tmp_path / f"{name}.csv") for name in ("fills", "quotes"))
    side = {"buy": 1, "sell": -1}
    ours = [(int(row["time_ns"]), side[row["side"]], round(float(row["price"]) / TICK))
            for row in fills]  # fmt: skip
    assert sorted(ours) == fills_of_peer(events, quotes, latency_ms)
    assert len(ours) >= 100
