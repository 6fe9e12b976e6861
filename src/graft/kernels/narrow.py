# SPDX-License-Identifier: Apache-2.0
"""Products with a frozen weight in a narrow dtype, which is converted part by part; and projections of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.kernels.eager import Context, VmapFunction, only_backward

PART = 1 << 20  # numbers of the weight that are wide at a time


def plain_widened_product(A: Tensor, W: Tensor) -> Tensor:
    """Return A W in the dtype of A, with all of W cast to it; the reference. A (r, m), W (m, n) → (r, n)."""
    return A @ W.to(A.dtype)


def multiply_widened(A: Tensor, W: Tensor) -> Tensor:
    """Return A W in the dtype of A, (r, n), without a copy of all of W in that dtype. W gets no gradient.

    If the dtypes are equal, and for forward-mode derivatives and tracers, it is the plain product. A (r, m), W (m, n).
    """
    if W.dtype == A.dtype or not only_backward():
        return plain_widened_product(A, W)
    return _WidenedProduct.apply(A, W)


class _WidenedProduct(VmapFunction):
    """The function of `multiply_widened`, with W cast in chunks of columns."""

    @staticmethod
    def forward(A: Tensor, W: Tensor) -> Tensor:
        """Return A W, (r, n), joined from the products with chunks of W's columns."""
        return torch.cat([plain_widened_product(A, part) for part in split_columns(W)], 1)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep W, in its narrow dtype, for the backward pass."""
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[object, ...]:
        """Return the gradient g Wᵀ of A, always: summed over chunks of W's columns, each cast to the dtype of g.

        None for W.
        """
        some = split_columns(ctx.saved_tensors[0])
        widths = [part.shape[1] for part in some]
        return sum(h @ part.to(g.dtype).T for h, part in zip(g.split(widths, 1), some)), None


def split_columns(W: Tensor) -> tuple[Tensor, ...]:
    """Return W in chunks of columns, views of at most `PART` numbers, or of one column if that has more."""
    return W.split(max(1, PART // max(1, W.shape[0])), 1)


def project_gradient_outside(p: Tensor, Q: Tensor) -> Tensor:
    """Return a view of p, with a backward pass that turns its gradient g into g - Q Qᵀ g.

    Under tracers and forward-mode derivatives plain operations do the same, in new memory. p (n, k); the columns of Q
    (n, j) are orthonormal.
    """
    return _GradientProjection.apply(p, Q, False) if only_backward() else _project_by_sum(p, Q, False)


def project_gradient_inside(p: Tensor, Q: Tensor) -> Tensor:
    """Return a view of p, with a backward pass that turns its gradient g into Q Qᵀ g.

    Under tracers and forward-mode derivatives plain operations do the same, in new memory. p (n, k); the columns of Q
    (n, j) are orthonormal.
    """
    return _GradientProjection.apply(p, Q, True) if only_backward() else _project_by_sum(p, Q, True)


def project_columns(g: Tensor, Q: Tensor, within: bool) -> Tensor:
    """Return the part of g (n, k) in the space of Q's columns if `within`, else the part outside of it.

    Q is cast to g's dtype, and everything is computed in it: Q (Qᵀ g).
    """
    Q = Q.to(g.dtype)
    part = Q @ (Q.T @ g)
    return part if within else g - part


def _project_by_sum(p: Tensor, Q: Tensor, within: bool) -> Tensor:
    """Return p plus a zero that has the projected gradient, by plain operations; the reference."""
    still = p.detach()
    return still + project_columns(p - still, Q, within)


class _GradientProjection(VmapFunction):
    """The function of `project_gradient_outside` and `project_gradient_inside`."""

    @staticmethod
    def forward(p: Tensor, Q: Tensor, within: bool) -> Tensor:
        """Return a view of p."""
        return p.view_as(p)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, Tensor, object], output: Tensor) -> None:
        """Keep Q and `within` for the backward pass."""
        ctx.save_for_backward(inputs[1])
        ctx.within = inputs[2]

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient projected into the space of Q's columns if `within`, else out of it; None for
        the others.
        """
        (Q,) = ctx.saved_tensors
        return project_columns(g, Q, ctx.within), None, None
