# SPDX-License-Identifier: Apache-2.0
"""What an adapter does to its layer, said once. Forward, rows of a mixed batch, merging and conversion follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


class Factors(NamedTuple):
    """W' = gain ⊙ (W + scale · outer ⊙ B (inner ⊙ A)). A method makes it anew for each call.

    A and B are tensors, or callables with a `weight`: modules, or a sum in place of a product with ones. A bias of B
    shifts that of the layer.
    """

    A: Any  # (r, fan_in)
    B: Any  # (out, r)
    scale: Any = None  # None: 1
    dropout: nn.Module | None = None  # on the input of A; with a gain, on that of W too
    inner: Tensor | None = None  # (r,)
    outer: Tensor | None = None  # (out,)
    gain: Tensor | None = None  # (out,)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A (r, fan_in) and B (out, r) whose product is the whole update, scale and vectors included."""
        A, B = matrix(self.A).flatten(1), matrix(self.B).flatten(1)
        if self.inner is not None:
            A = self.inner[:, None] * A
        if self.outer is not None:
            B = self.outer[:, None] * B
        return A, B if self.scale is None else B * self.scale

    def shift(self) -> Tensor | None:
        """What is added to the layer's bias, (out,)."""
        bias = getattr(self.B, "bias", None)
        if bias is None:
            return None
        bias = bias if self.outer is None else bias * self.outer
        return bias if self.scale is None else bias * self.scale


def matrix(factor: Any) -> Tensor:
    """The tensor of a factor."""
    return factor if isinstance(factor, Tensor) else factor.weight


@dataclass(frozen=True, eq=False, kw_only=True)
class Effect:
    """Base of the five kinds. The site and the config decide the kind once; its functions run at each call."""

    of_weight: bool = False  # reads W₀, the weight as it was without any adapter
    fixed: str | None = None  # why it has no merged form

    whole: ClassVar[bool] = False  # stands in for the layer
    inward: bool = False  # of several active adapters, each acts on the layer that those after it made

    @property
    def additive(self) -> bool:
        """Whether y = base(x) + part(x)."""
        return True

    @property
    def reads(self) -> bool:
        """Whether a forward pass needs the values of the weight."""
        return self.of_weight


@dataclass(frozen=True, eq=False)
class LowRank(Effect):
    """W' = gain ⊙ (W + B A), as `factors` says."""

    factors: Callable[[], Factors]
    gains: bool = False  # there is a gain

    @property
    def additive(self) -> bool:
        return not self.gains


@dataclass(frozen=True, eq=False)
class Update(Effect):
    """W' = W + ΔW, b' = b + Δb. `delta`: () → ΔW, or W₀ → ΔW if `of_weight`; canonical, (out, in, *kernel).

    ΔW may be a tensor, or a value that is not formed yet (`Hadamard`, `Modulated`). Such a value has `dense()`, the
    tensor; `columns(ids)`, what an embedding looks up; and `linear_with`, a cheaper way for x (W + ΔW)ᵀ.
    """

    delta: Callable[..., Any]
    branch: Callable[[Tensor], Tensor] | None = None  # x → ΔW x, where that is cheaper
    bias: Callable[[], Tensor] | None = None  # Δb, (out,)
    dropout: Callable[[], nn.Module] | None = None  # on the input
    draws: bool = False  # ΔW is random in training: it must not be computed twice for one call


@dataclass(frozen=True, eq=False)
class Rewrite(Effect):
    """(W, b) become `merged(W, b)`. The forward pass is pre → layer → post, or the layer's function with f(W).

    Args:
        pre: x → x', for f(W) x = W x'.
        post: (x, y) → y', from x as it came here and the output y.
        apart: `post` acts on the output without its bias.
    """

    merged: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
    pre: Callable[[Tensor], Tensor] | None = None
    post: Callable[[Tensor, Tensor], Tensor] | None = None
    apart: bool = False

    @property
    def additive(self) -> bool:
        return False

    @property
    def folds(self) -> bool:
        return self.pre is None and self.post is None

    @property
    def reads(self) -> bool:
        return self.of_weight or self.folds


@dataclass(frozen=True, eq=False)
class Branch(Effect):
    """y = base(x) + branch(x), with no merged form.

    `input_of`: for a module of several inputs that returns a tuple, x, (batch, …), from the module and all its
    arguments by name; y is the first of what it returns.
    """

    branch: Callable[[Tensor], Tensor]
    input_of: Callable[[nn.Module, dict[str, Any]], Tensor] | None = None
    fixed: str | None = field(default="a branch beside the layer has no merged form", kw_only=True)


@dataclass(frozen=True, eq=False)
class Replace(Effect):
    """The module runs in place of the layer."""

    module: Callable[[], nn.Module]

    whole: ClassVar[bool] = True

    @property
    def additive(self) -> bool:
        return False
