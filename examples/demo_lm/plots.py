# SPDX-License-Identifier: Apache-2.0
"""The demo's results in one picture."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from examples.demo.plots import losses


def draw(results: dict[str, Any], path: Path) -> None:
    """Losses of the two adapters, dates by language, and what each method reaches with how many parameters."""
    tasks, methods = results["tasks"], results["methods"]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for color, (name, task) in zip(("C0", "C1"), tasks.items(), strict=True):
        losses(axes[0], name, torch.tensor(task["losses"]), color, window=5)
    axes[0].set(title="Training loss (LoRA)", xlabel="step", ylabel="cross entropy of the answer", ylim=(0, None))
    axes[0].legend()
    groups(axes[1], tasks["dates"]["groups"])
    trade_off(axes[2], methods, tasks["dates"]["scores"]["base"]["exact"], tasks["dates"]["test"])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def groups(ax: Axes, scores: dict[str, dict[str, float]]) -> None:
    """Exact match by language, base and adapter beside each other."""
    names = list(scores["adapter"])
    for shift, (who, color) in zip((-0.2, 0.2), (("base", "0.7"), ("adapter", "tab:red")), strict=True):
        ax.bar([x + shift for x in range(len(names))], [scores[who][n] for n in names], 0.4, color=color, label=who)
    ax.set_xticks(range(len(names)), names)
    ax.set(title="Dates: exact match by language", ylim=(0, 1.05))
    ax.legend(fontsize=8, loc="lower right")


def trade_off(ax: Axes, methods: dict[str, Any], base: float, n: int) -> None:
    """Exact match over trainable parameters, with standard errors."""
    for i, (name, m) in enumerate(methods.items()):
        p = m["exact"]
        ax.errorbar(m["parameters"], p, yerr=(p * (1 - p) / n) ** 0.5, fmt="o", color=f"C{i}", capsize=3)
        ax.annotate(name, (m["parameters"], p), xytext=(6, 6), textcoords="offset points", fontsize=9, color=f"C{i}")
    ax.axhline(base, color="0.6", linestyle="--", linewidth=1, label="base")
    ax.set(title="Dates: exact match by method", xlabel="trainable parameters", xscale="log", ylim=(-0.05, 1.05))
    ax.margins(x=0.25)
    ax.legend(fontsize=8, loc="lower right")
