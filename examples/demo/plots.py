# SPDX-License-Identifier: Apache-2.0
"""The demo's results in one picture."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor


def draw(tasks: dict[str, Any], path: Path) -> None:
    """Loss curves, accuracies and update norms, side by side."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for color, (name, task) in zip(("C0", "C1"), tasks.items(), strict=True):
        losses(axes[0], name, torch.tensor(task["losses"]), color)
    axes[0].set(title="Training loss", xlabel="step", ylabel="cross entropy", ylim=(0, None))
    axes[0].legend()
    accuracies(axes[1], tasks)
    update_norms(axes[2], {name: task["update_norms"] for name, task in tasks.items()})
    figure.savefig(path, dpi=120)
    plt.close(figure)


def losses(ax: Axes, name: str, values: Tensor, color: str, window: int = 10) -> None:
    ax.plot(values, color=color, alpha=0.25)
    total = torch.cat([torch.zeros(1), values.cumsum(0)])
    steps = torch.arange(1, len(values) + 1)
    first = (steps - window).clamp(min=0)
    ax.plot(steps - 1, (total[steps] - total[first]) / (steps - first), color=color, label=f"{name}, mean of {window}")


def accuracies(ax: Axes, tasks: dict[str, Any]) -> None:
    """Baselines in grey, the adapter before and after training in colour."""
    names = list(next(iter(tasks.values()))["accuracy"])
    colors = ["0.85", "0.7", "0.55", "tab:pink", "tab:red"]
    width = 0.8 / len(names)
    for i, (name, color) in enumerate(zip(names, colors, strict=True)):
        heights = [task["accuracy"][name] for task in tasks.values()]
        places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(tasks))]
        ax.bar_label(ax.bar(places, heights, width, color=color, label=name), fmt="%.3f", fontsize=7)
    ax.set_xticks(range(len(tasks)), [f"{name} ({task['test']} held out)" for name, task in tasks.items()])
    ax.set(title="Held-out accuracy", ylim=(0, 1.05))
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)  # below: bars fill the axes


def update_norms(ax: Axes, norms: dict[str, dict[str, float]]) -> None:
    """‖ΔW‖ / ‖W‖ of each adapted layer."""
    for color, (task, per_layer) in zip(("C0", "C1"), norms.items(), strict=True):
        for target, marker in (("query", "o-"), ("value", "s--")):
            values = [norm for layer, norm in per_layer.items() if layer.endswith(target)]
            ax.plot(values, marker, color=color, label=f"{task}, {target}")
    ax.set(title="Update norm ‖ΔW‖ / ‖W‖", xlabel="layer", ylim=(0, None))
    ax.legend(fontsize=8)
