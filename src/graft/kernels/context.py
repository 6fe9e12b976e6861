# SPDX-License-Identifier: Apache-2.0
"""What the `forward` of a `torch.autograd.Function` hands to its `backward`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.function import FunctionCtx


class Context(FunctionCtx):
    """torch's object as type checkers should see it; nobody makes one."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def __getattr__(self, name: str) -> Any: ...  # what `forward` has noted
    def __setattr__(self, name: str, value: object) -> None: ...
