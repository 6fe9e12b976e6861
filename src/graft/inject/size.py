# SPDX-License-Identifier: Apache-2.0
"""The size of what an injection makes before it has seen a checkpoint's values: counted without memory for it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from graft.core.containers import Transient
from graft.core.method import Layers
from graft.core.ops import META


def made_early(job: Any) -> float:
    """Count the numbers that `build` makes for good before it asks a checkpoint for values."""
    total = 0.0
    if job.method.shares and job.sites:
        layers = Layers(job.model, list(job.sites.values()), job.cfg, job.shared.containers, job.others)
        total += size(lambda: job.method.share(layers).values())
    early = [job.methods[key] for key in job.sites if job.methods[key].inits_from_weight()]
    total += sum(size(lambda m=method: m.placeholders({}).values()) for method in early)  # type: ignore[misc]
    for key, indices in job.tokens.items():
        weight = getattr(job.tree.modules[key], "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            total += len(indices) * weight.shape[1]
    return total


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that code makes, also of those that it drops."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def size(make: Callable[[], Iterable[Any]]) -> float:
    """Count the numbers that `make` needs room for: in what it returns, or in its largest tensor. Run it on meta."""
    try:
        with META, Largest() as largest, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when it is made for good
            return max(sum(numbers(value) for value in make()), largest.numbers)
    except (RuntimeError, OverflowError):  # shapes that no tensor can have
        return math.inf


def numbers(value: Any) -> int:
    if isinstance(value, Transient):
        value = value.tensor
    if isinstance(value, nn.Module):
        return sum(t.numel() for t in (*value.parameters(), *value.buffers()))
    return value.numel() if isinstance(value, Tensor) else 0
