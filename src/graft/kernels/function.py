# SPDX-License-Identifier: Apache-2.0
"""autograd.Functions whose backward pass computes in the dtypes that its forward pass left."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from graft.kernels.eager import autocast_dtype


class Function(torch.autograd.Function):
    """A Function with one output. Its `backward` does all casts itself; autocast around backward() changes nothing."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.backward = staticmethod(_without_autocast(cls.backward))  # type: ignore[assignment]


def _without_autocast(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    @wraps(backward)
    def run(ctx: Any, g: Tensor) -> Any:
        if autocast_dtype(g.device) is None:
            return backward(ctx, g)
        with torch.autocast(g.device.type, enabled=False):
            return backward(ctx, g)

    return run
