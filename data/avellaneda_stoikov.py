"""A strategy in a file: Avellaneda and Stoikov (2008), to set beside the linear program.

    python backtest.py --strategy lp data/avellaneda_stoikov.py

In the stationary form of Gueant, Lehalle and Fernandez-Tapia (2013): long, it bids further away
and offers nearer. Fills come at the rate A exp(-k d) per second at a distance d from the mid, bps;
gamma is the aversion to inventory, counted in orders; sigma the volatility, bps/sqrt(s).

  c1 = ln(1 + gamma/k) / gamma
  c2 = sqrt( gamma / (2 A k) * (1 + gamma/k)^(k/gamma + 1) )
  half spread = c1 + sigma c2 / 2        skew per order = sigma c2

The defaults fit BTCUSDT linear. data/experiments.py fits A and k to the fills of fixed quotes.
"""

import math
from typing import Any

NEAREST_BPS = 0.01  # a lean beyond the half spread brings a side to the mid, and no further


def quote(parameters: Any, market: Any, q: float, gamma: float = 0.05,
          A: float = 0.55, k: float = 1.2) -> tuple[float, float]:  # fmt: skip
    """Distances of bid and ask from the mid, bps, at inventory q, a share of its limit."""
    c1, sigma = math.log1p(gamma / k) / gamma, market.volatility
    c2 = math.sqrt(gamma / (2 * A * k) * (1 + gamma / k) ** (k / gamma + 1))
    half, orders = c1 + sigma * c2 / 2, q * parameters.max_inventory / parameters.order_qty
    lean = orders * sigma * c2
    return max(half + lean, NEAREST_BPS), max(half - lean, NEAREST_BPS)
