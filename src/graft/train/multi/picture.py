# SPDX-License-Identifier: Apache-2.0
"""One picture of a sweep: the training loss of every setting, those that were dropped in grey."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SMOOTH = 0.9  # of the running mean of losses
COLOURED = 10


def draw(ranked: Sequence[Any], path: str) -> None:
    """Draw trials, best first, and write the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    best = [trial for trial in ranked if trial.state == "kept"][:COLOURED]
    for trial in reversed(ranked):
        steps, losses = [point[0] for point in trial.curve], smooth([point[1] for point in trial.curve])
        if trial in best:
            said = ", ".join(f"{k}={short(v)}" for k, v in trial.setting.items())
            axes.plot(steps, losses, lw=2, zorder=3, label=f"{said}: {trial.loss:.4f}")
        else:
            axes.plot(steps, losses, lw=0.8, color="0.7", zorder=2)
    axes.set(
        xlabel="step", ylabel="training loss, smoothed", title=f"{len(ranked)} settings; {len(best)} trained to the end"
    )
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], title="setting: validation loss", fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def smooth(losses: Sequence[float]) -> list[float]:
    """Return running means, which count the first losses as much as the later ones."""
    out, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = SMOOTH * total + loss, SMOOTH * weight + 1
        out.append(total / weight)
    return out


def short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
