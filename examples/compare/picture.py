# SPDX-License-Identifier: Apache-2.0
"""The comparison in one picture: quality against cost and size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt


def draw(results: dict[str, Any], n: int, path: Path) -> None:
    """Draw exact match, with standard errors, over the CPU time of training and over the size of the file."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained", sharey=True)
    for ax, field, scale, label in (
        (axes[0], "cpu_seconds", 1, "CPU seconds of training"),
        (axes[1], "bytes", 1e3, "size of the file, kB"),
    ):
        for i, (name, m) in enumerate(results.items()):
            x, p, color = m[field] / scale, m["exact"], f"C{i % 10}"
            ax.errorbar(x, p, yerr=(p * (1 - p) / n) ** 0.5, fmt="o", color=color, capsize=2, alpha=0.8)
            ax.annotate(name, (x, p), xytext=(5, 4), textcoords="offset points", fontsize=8, color=color)
        ax.set(xlabel=label, ylim=(-0.05, 1.05))
        ax.margins(x=0.15)
    axes[1].set_xscale("log")
    axes[0].set_ylabel(f"exact match of {n} dates")
    figure.savefig(path, dpi=120)
    plt.close(figure)
