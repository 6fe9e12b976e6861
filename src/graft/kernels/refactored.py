# SPDX-License-Identifier: Apache-2.0
"""A weight U M Vᵀ in place of another, as an update of it: never formed, or only within one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.functional import embedding

from graft.kernels.one_product import Call, InputGradient, holds, linear_with
from graft.kernels.worth import worth_it


def plain(W: Tensor, bias: Tensor | None, x: Tensor, W0: Tensor, U: Tensor, M: Tensor, V: Tensor) -> Tensor:
    """The reference: x (W + U M Vᵀ - W0)ᵀ + bias. W, W0 and U (out, n), M and V (n, n), x (…, n) → (…, out)."""
    y = x @ W.T + x @ (U @ M @ V.T - W0).T
    return y if bias is None else y + bias


class Refactored(NamedTuple):
    """ΔW = U M Vᵀ - W, not formed yet. Only M and x get gradients."""

    W: Tensor  # (out, in, *kernel)
    U: Tensor  # (out, n)
    M: Tensor  # (n, n)
    V: Tensor  # (n, n), n = in · kernel

    @property
    def always(self) -> bool:
        """Say that `linear_with` pays for any input."""
        return True

    def dense(self) -> Tensor:
        return (self.U @ (self.M @ self.V.T)).view(self.W.shape) - self.W

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns of ΔW that `ids` (…) name: (…, out)."""
        return embedding(ids, self.V) @ self.M.T @ self.U.T - embedding(ids, self.W.T)

    def product(self, x: Tensor) -> Tensor:
        """Return x ΔWᵀ."""
        return self.narrow(x) @ self.U.T - x @ self.W.T.to(x.dtype)

    def narrow(self, x: Tensor) -> Tensor:
        """Return x V Mᵀ; form M Vᵀ before where there are more rows than that has."""
        return x @ (self.M @ self.V.T).T if x.numel() > x.shape[-1] ** 2 else x @ self.V @ self.M.T

    def linear_with(
        self, W: Tensor, bias: Tensor | None, x: Tensor, call: Call, input_gradient: InputGradient
    ) -> Tensor | None:
        """Return x (W + ΔW)ᵀ + bias, which is x (U M Vᵀ)ᵀ + bias if W is the weight that ΔW replaces; else None."""
        dtype = self.M.dtype
        if W.data_ptr() != self.W.data_ptr() or not holds(self.M, W):
            return None
        out, n = W.shape
        rows = x.numel() // n
        if worth_it(x) and rows * (3 * n - out) > 3 * out * n:  # for products of rows, some that form the weight
            return linear_with(None, bias, x, Whole(self.U, self.M @ self.V.T), call, input_gradient)
        y = call(self.narrow(x.to(dtype)), self.U, None if bias is None else bias.to(dtype))
        return y.to(x.dtype) if y.dtype == dtype else y  # autocast chose another


class Whole(NamedTuple):
    """The weight U K in place of any W. U gets no gradient."""

    U: Tensor  # (out, n)
    K: Tensor  # (n, n)

    def added(self, W: Any) -> Tensor:
        return self.U @ self.K

    def gradients(self, g: Tensor, x: Tensor, need: Sequence[bool]) -> tuple[None, Tensor]:
        return None, self.U.T @ (g.T @ x)
