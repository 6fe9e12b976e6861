# SPDX-License-Identifier: Apache-2.0
"""A weight U M Vᵀ, with an M of few numbers, in place of another, as an update of it: never formed, or only within one
product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import embedding

from graft.kernels.low_rank import worth_it
from graft.kernels.one_product import Call, InputGradient, holds, linear_with
from graft.kernels.sparse import Scattered, scattered_entries


class Refactored(NamedTuple):
    """ΔW = U M Vᵀ - W, not formed yet. M has `values` at `places`, else zeros. Only these and x get gradients."""

    W: Tensor  # (out, in, *kernel)
    U: Tensor  # (out, n)
    V: Tensor  # (n, n), n = in · kernel
    values: Tensor  # (k,)
    places: Tensor  # (k,) long: indices into M (n, n) as a flat list, row by row

    @property
    def always(self) -> bool:
        """Return True: `linear_with` pays for any input."""
        return True

    @property
    def M(self) -> Tensor:
        return Scattered(self.values, self.places, tuple(self.V.shape)).dense()

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
        """Return x (W + ΔW)ᵀ + bias, which is x (U M Vᵀ)ᵀ + bias if W is the weight that ΔW replaces; else None.

        Keep no matrix for the backward pass, which forms them again, but x V or x.
        """
        _, U, V, values, places = self
        if W.data_ptr() != self.W.data_ptr() or not holds(values, W):
            return None
        dtype, (out, n) = values.dtype, W.shape
        pays, rows = worth_it(x), x.numel() // n
        if pays and rows * (3 * n - out) > 2 * n * (n + out):  # for products of rows, some that form the weight
            return linear_with(None, bias, x, Whole(U, V, values, places), call, input_gradient)
        if pays:
            z = linear_with(None, None, x.to(dtype) @ V, Middle(values, places, n), F.linear, Tensor.matmul)
        else:
            z = self.narrow(x.to(dtype))
        y = call(z, U, None if bias is None else bias.to(dtype))
        return y.to(x.dtype) if y.dtype == dtype else y  # autocast chose another


class Middle(NamedTuple):
    """The matrix M in place of any W."""

    values: Tensor  # (k,)
    places: Tensor  # (k,)
    n: int

    def added(self, W: Tensor) -> Tensor:
        return Scattered(self.values, self.places, (self.n, self.n)).dense()

    def gradients(self, g: Tensor, x: Tensor, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
        return scattered_entries(g, x, self.places), None, None


class Whole(NamedTuple):
    """The weight U M Vᵀ in place of any W. U and V get no gradient."""

    U: Tensor  # (out, n)
    V: Tensor  # (n, n)
    values: Tensor  # (k,)
    places: Tensor  # (k,)

    def added(self, W: Tensor) -> Tensor:
        return self.U @ (Middle(self.values, self.places, len(self.V)).added(W) @ self.V.T)

    def gradients(self, g: Tensor, x: Tensor, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
        return None, None, scattered_entries(g @ self.U, x @ self.V, self.places), None
