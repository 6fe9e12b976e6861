# SPDX-License-Identifier: Apache-2.0
"""One picture of all rows: how graft and the floor compare with PEFT."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measure import Row
from benchmarks.results import Found

COLORS = {"graft": "#2a6f97", "floor": "#a9a9a9"}


def draw(rows: Sequence[Row | Found], path: str, title: str, source: str = "") -> None:
    """Bars of PEFT / graft and PEFT / floor on a logarithmic scale: 1 is PEFT, longer is faster or smaller.

    The file says what it was drawn from: `source`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [r for r in rows if r.faster is not None]
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(shown) + 1.4))
    places = range(len(shown))
    peft = [r.median("PEFT") or 0.0 for r in shown]
    for who, height in (("floor", 0.75), ("graft", 0.4)):
        ratios = [p / v if (v := r.median(who)) else 1.0 for r, p in zip(shown, peft)]
        axes.barh(places, [x - 1 for x in ratios], height, left=1, color=COLORS[who], label=who)
        if who == "graft":
            for place, x in zip(places, ratios):
                axes.annotate(f" {x:.2f} ×" if x < 10 else f" {x:.0f} ×", (max(x, 1), place), va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(places, [r.what for r in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("PEFT's time or bytes ÷ those of graft (floor: of the least that is possible)")
    axes.set_title(title, fontsize=9, loc="left")
    axes.legend(loc="lower right", fontsize=8)
    axes.margins(x=0.12, y=0.005)
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Source": source})
