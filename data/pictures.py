"""The pictures of the README that no command of the program draws.

    python data/pictures.py        writes jump.png, program.png and inventory.png beside this file

Each panel is a function of an axes, as in marketmaker.py. inventory.png plays a simulated path
(experiments.py makes it); what it shows is SYNTHETIC.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import experiments  # puts the project on the path
import numpy as np

import backtest
import marketmaker as mm
import optimize as opt

FOLDER = Path(__file__).resolve().parent


def plot_jump(ax: Any) -> None:
    """The half-spread before, at and after a jump of the mid."""
    seconds = range(-90, 120)
    now, average = experiments.follow_jump(seconds).T
    ax.step(seconds, now, mm.BLACK, where="post", label="from the volatility of now")
    ax.step(seconds, average, mm.RED, where="post", label="from its average")
    ax.set_xlim(-20, 110)
    ax.set_xlabel("seconds after a jump of the mid by 50 bps")
    mm.finish_panel(ax, "Half the base spread", "bps")


def plot_cost(ax: Any, q: float = 0.5) -> None:
    """The cost of every lean at the width S, as it is and by coarse chords."""
    lean = np.linspace(-1, 1, 401)
    cost = opt.cost_function((1 + lean) / 2, (1 - lean) / 2, q, 1.0, 1.0)
    ax.plot(lean, cost, mm.BLACK, label=f"C at q = {q:g}")
    grid = np.linspace(-1, 1, 9)
    at_grid = opt.cost_function((1 + grid) / 2, (1 - grid) / 2, q, 1.0, 1.0)
    ax.plot(grid, at_grid, mm.SKY, marker="o", markersize=4,
            label="by 8 chords; the program has finer ones")  # fmt: skip
    best = opt.solve_quote(q, 1.0, 1.0, 1 / 64)
    s = best.bid_distance - best.ask_distance
    ax.axvline(s, color=mm.RED, linestyle="--", label=f"the program: s = {s:.2f}")
    ax.set_xlabel("lean s = d_b - d_a: right of 0 it would rather sell")
    mm.finish_panel(ax, "Cost of a quote of width S", "cost")


def plot_lean(ax: Any) -> None:
    """How the quote leans with the inventory, and where an edge stops it."""
    qs = np.linspace(-1, 1, 201)
    for alpha, color in ((0.25, mm.SKY), (1.0, mm.BLACK), (4.0, mm.RED)):
        solved = [opt.solve_quote(float(q), alpha, 1.0, 0.25) for q in qs]
        ax.plot(qs, [x.bid_distance for x in solved], color, label=f"bid, alpha {alpha:g}")
        ax.plot(qs, [x.ask_distance for x in solved], color, linestyle=":")
    ax.axhline(0.25, color="grey", linewidth=0.8)
    ax.set_xlabel("inventory q, share of the limit; dotted: the ask; grey: the edge d_min")
    mm.finish_panel(ax, "Distances from the mid", "S")


def plot_inventory(ax: Any) -> None:
    """One path, with and without a lean."""
    for alpha, color in ((0.0, mm.RED), (1.0, mm.BLACK)):
        stamps = (backtest.stamp_file(experiments.PATHS[0]),)
        setting = backtest.Setting(stamps, (None, None, None), {"alpha": alpha}, "lp", {})
        c = backtest.play(setting).columns
        minutes = (c["time_ns"] - c["time_ns"][0]) / backtest.MINUTE_NS
        ax.step(minutes, c["inventory"], color, where="post", linewidth=0.9,
                label=f"alpha {alpha:g}")  # fmt: skip
    ax.axhline(0, color="grey", linewidth=0.6)
    ax.set_xlabel("minutes of path 1, SYNTHETIC")
    mm.finish_panel(ax, "Inventory, with the lean and without", "BTC")


def main() -> int:
    """Draw all of them; the exit status."""
    with ProcessPoolExecutor() as pool:
        experiments.make_paths(pool)
    draw = partial(mm.draw_figure, shared=0)
    draw([(2.6, [plot_jump])], "Which volatility makes the spread?", FOLDER / "jump.png")
    draw([(2.8, [plot_cost]), (2.8, [plot_lean])], "The program", FOLDER / "program.png")
    draw([(2.6, [plot_inventory])], "Inventory control", FOLDER / "inventory.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
