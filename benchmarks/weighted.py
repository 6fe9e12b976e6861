# SPDX-License-Identifier: Apache-2.0
"""One adapter from three: `add_weighted_adapter`, r 16 on all 210 linear layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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


Rule = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]  # (A of each adapter, B of each) → A and B


def arithmetic(rule: Rule) -> Callable[[], Turns]:
    """The rule on the factors of all layers, and nothing else."""

    @torch.no_grad()
    def turns() -> Turns:
        shapes = [m.weight.shape for m in smollm(device="meta").modules() if isinstance(m, nn.Linear)]
        terms = [
            ([torch.randn(16, width) * 0.02 for _ in NAMES], [torch.randn(rows, 16) * 0.02 for _ in NAMES])
            for rows, width in shapes
        ]
        while True:
            yield torch.no_grad()(lambda: [rule(*both) for both in terms])

    return turns


def sums(*factors: Sequence[Tensor]) -> list[Tensor]:
    """Weighted sums of all A and of all B."""
    first, *others = (SCALING * w for w in WEIGHTS)
    out = []
    for ts in factors:
        total = ts[0] * first
        for t, w in zip(ts[1:], others):
            total.add_(t, alpha=w)
        out.append(total)
    return out


def cat(As: Sequence[Tensor], Bs: Sequence[Tensor]) -> list[Tensor]:
    """All A one below the other, with their weights, and all B side by side."""
    return [torch.cat([A * (SCALING * w) for A, w in zip(As, WEIGHTS)]), torch.cat(list(Bs), dim=1)]


def svd(As: Sequence[Tensor], Bs: Sequence[Tensor]) -> list[Tensor]:
    """The best product of rank 16 for the sum: QR of the factors, SVD of 48 × 48 numbers."""
    A, B = cat(As, Bs)
    (Q, R), (P, L) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, V = torch.linalg.svd(R @ L.T)
    return [V[:16] @ P.T, Q @ (U[:, :16] * S[:16])]


def ties(*factors: Sequence[Tensor]) -> list[Tensor]:
    """Sums of the larger half of each tensor's numbers, of those that have the sign of their sum."""
    out = []
    for ts in factors:
        kept = [larger_half(t) for t in ts]
        sign = (kept[0] + kept[1]).add_(kept[2]).sign_()
        total, count = torch.zeros_like(sign), torch.zeros_like(sign)
        for t, w in zip(kept, WEIGHTS):
            agrees = t.mul_(sign).clamp_(min=0)
            total.add_(agrees, alpha=SCALING * w)
            count.add_(agrees.sign_())
        out.append(total.mul_(sign).div_(count.clamp_(min=1)))
    return out


def larger_half(t: Tensor) -> Tensor:
    """The tensor with its smaller half set to 0. numpy finds the middle in half of the time of `topk`."""
    sizes = t.abs()
    flat = sizes.flatten().numpy()
    middle = len(flat) - len(flat) // 2
    return t * (sizes >= float(np.partition(flat, middle)[middle]))


# beside the floor the new adapter: its modules, names and report, 3 × bare modules, 7 ms (see injection), which is as
# long as the sums, a sixth of the copies into new memory, and a twentieth of the others
BENCHES = [
    Bench("weighted linear, 3 adapters (floor: sums)", partial(combine, kind="linear"), Goal(1, 2), arithmetic(sums)),
    Bench("weighted cat, 3 adapters", partial(combine, kind="cat"), Goal(1, 1.2), arithmetic(cat), long=True),
    Bench(
        "weighted ties, 3 adapters",
        partial(combine, kind="ties", density=0.5),
        Goal(1, 1.1),
        arithmetic(ties),
        long=True,
    ),
    Bench(
        "weighted dare_linear, 3 adapters", partial(combine, kind="dare_linear", density=0.5), Goal(faster=1), long=True
    ),
    Bench(
        "weighted svd, 3 adapters", partial(combine, kind="svd"), Goal(1, 1.1), arithmetic(svd), long=True, once=True
    ),
]
