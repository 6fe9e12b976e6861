# SPDX-License-Identifier: Apache-2.0
"""The shadow states of one run of the model, which blocks hand on to those that run later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

FACT = "shadow"  # its name among the facts of a call


class States:
    """By adapter: of its rows, in their order. So the states of some rows need no selection."""

    def __init__(self, seed: Callable[[str, Tensor], Tensor]):
        self.seed = seed  # (adapter, its rows at the first block) → state before that
        self.now: dict[str, Tensor] = {}  # (rows, tokens, hidden)

    def __getitem__(self, index: Any) -> States:
        return self

    def repeat_interleave(self, repeats: int, dim: int) -> States:
        return self

    def take(self, adapter: str, h: Tensor) -> Tensor:
        """Return the state before a block with input h."""
        if adapter not in self.now:
            self.now[adapter] = self.seed(adapter, h)
        return self.now[adapter]
