# SPDX-License-Identifier: Apache-2.0
"""One adapter from three: `add_weighted_adapter`, r 16 on all 210 linear layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.measure import Bench, Goal, Turns
from benchmarks.models import SCALING, lora, randomize, smollm

NAMES, WEIGHTS = ("x", "y", "z"), (0.7, -0.4, 0.5)


def combine(lib: Any, kind: str, **options: Any) -> Turns:
    model = lib.get_peft_model(smollm(), lora(lib), NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, lora(lib))
    randomize(model)
    while True:
        yield partial(model.add_weighted_adapter, list(NAMES), list(WEIGHTS), "new", combination_type=kind, **options)
        model.delete_adapter("new")


@torch.no_grad()
def arithmetic() -> Turns:
    """The weighted sums of all A and all B."""
    layers = [m.weight for m in smollm().modules() if isinstance(m, nn.Linear)]
    shapes = [shape for W in layers for shape in ((16, W.shape[1]), (W.shape[0], 16))]
    terms = [[torch.randn(shape) * 0.02 for _ in NAMES] for shape in shapes]
    first, *others = (SCALING * w for w in WEIGHTS)

    def sums() -> list[torch.Tensor]:
        out = []
        for ts in terms:
            total = ts[0] * first
            for t, w in zip(ts[1:], others):
                total.add_(t, alpha=w)
            out.append(total)
        return out

    while True:
        yield sums


BENCHES = [
    Bench("weighted linear, 3 adapters (floor: sums)", partial(combine, kind="linear"), Goal(faster=8), arithmetic),
    Bench("weighted cat, 3 adapters", partial(combine, kind="cat"), Goal(faster=3), long=True),
    Bench("weighted ties, 3 adapters", partial(combine, kind="ties", density=0.5), Goal(faster=3), long=True),
    Bench(
        "weighted dare_linear, 3 adapters", partial(combine, kind="dare_linear", density=0.5), Goal(faster=1), long=True
    ),
    Bench("weighted svd, 3 adapters", partial(combine, kind="svd"), Goal(faster=60), long=True, once=True),
]
