# SPDX-License-Identifier: Apache-2.0
"""The comparison in one picture: quality, cost and size of each method, the best above."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from PIL import Image
from PIL.PngImagePlugin import PngInfo

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt

ON_FRONT, BEHIND = "C1", "C0"


class Panel(NamedTuple):
    """One quantity of all methods."""

    label: str
    value: Callable[[dict[str, Any]], float]
    scale: str = "linear"


def deviation(m: dict[str, Any], n: int) -> float:
    """Return the standard deviation of the exact match over seeds; of one seed, its standard error over n dates."""
    p = float(m["exact"])
    return float(m["spread"]) if "spread" in m else (p * (1 - p) / n) ** 0.5  # type: ignore[no-any-return]


def cost(m: dict[str, Any]) -> float:
    return float(m["cpu_seconds"] / m["steps"])


PANELS = (
    Panel("right answers", lambda m: float(m["exact"])),
    Panel("CPU seconds of a training step", cost),
    Panel("size of the file, kB", lambda m: m["bytes"] / 1e3, "log"),
)


def draw(results: dict[str, Any], n: int, path: Path, source: str = "", what: str = "dates") -> None:
    """Draw the share of n right answers, with its deviation, beside the CPU time of a step and the size of the file.

    Lines show LoRA's values. Methods that no other beats in both quality and time have a colour of their own.

    Args:
        source: what the picture's metadata say that it was drawn from.
        what: the questions were.
    """
    names = sorted(results, key=lambda name: (results[name]["exact"], -cost(results[name])))
    best = front(results)
    colors = [ON_FRONT if name in best else BEHIND for name in names]
    places = range(len(names))
    figure, axes = plt.subplots(1, 3, figsize=(12, 1.4 + 0.2 * len(names)), layout="constrained", sharey=True)
    for ax, panel in zip(axes, PANELS):
        values = [panel.value(results[name]) for name in names]
        ax.scatter(values, places, color=colors, zorder=3)
        if panel is PANELS[0]:
            errors = [deviation(results[name], n) for name in names]
            ax.errorbar(values, places, xerr=errors, fmt="none", ecolor="0.6")
        if "LoRA" in results:
            ax.axvline(panel.value(results["LoRA"]), color="0.6", linestyle="--", linewidth=1)
        ax.set(xlabel=panel.label, xscale=panel.scale)
        ax.grid(axis="y", color="0.9")
    axes[0].set_yticks(places, names)
    axes[0].set_ylim(-0.7, len(names) - 0.3)
    axes[0].set_title(f"{n or ''} held-out {what}; orange: none is both better and cheaper", loc="left", fontsize=9)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    plt.close(figure)
    notes = PngInfo()
    notes.add_text("Source", source)
    few_colors = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)  # a third of the bytes
    few_colors.save(path, "PNG", optimize=True, pnginfo=notes)


def front(results: dict[str, Any]) -> set[str]:
    """Return the methods that no other is at least as good as for no more time, and better in one of the two."""

    def beaten(one: dict[str, Any]) -> bool:
        for other in results.values():
            gain, saved = other["exact"] - one["exact"], cost(one) - cost(other)
            if min(gain, saved) >= 0 and max(gain, saved) > 0:
                return True
        return False

    return {name for name, m in results.items() if not beaten(m)}
