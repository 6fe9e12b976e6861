# SPDX-License-Identifier: Apache-2.0
"""The product with DoRA's weight, ratio ⊙ (W + scale · B A), for a linear layer with a frozen weight.

Dropout acts on the low-rank part and on the change (ratio - 1) ⊙ W x, not on W x itself:
    x ↦ W x + b + (ratio - 1) ⊙ W x' + ratio ⊙ scale · B A x', where x' = dropout(x).

The ratio needs the norms of the rows of W + scale · B A. `row_norms` computes them without forming that sum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graft.kernels import low_rank, sparse
from graft.kernels.cuts import Cut, gather_whole, sum_over_group, take_piece
from graft.kernels.eager import Context, Function, cast, differentiate
from graft.kernels.low_rank import gradients, seed_for
from graft.kernels.sparse import gathers


def row_norms(W: Tensor, A: Tensor, B: Tensor, rows: Cut | None = None, columns: Cut | None = None) -> Tensor:
    """Return the norms of the rows of W + B A, (out,), without forming the sum, in at least float32.

    The terms of ‖w‖² + 2⟨W Aᵀ, B⟩ + b A Aᵀ bᵀ may cancel, hence the dtype; a negative sum counts as 0.

    rows, columns: the cuts if W is this process's piece of a weight. Then the processes exchange sums, the result is
    the norm of all rows, and there are no gradients.
    """
    dtype = torch.promote_types(W.dtype, torch.float32)
    W, A, B = cast(W, dtype), cast(A, dtype), cast(B, dtype)
    B_rows = B if rows is None else take_piece(B, rows, 0)
    square = torch.linalg.vector_norm(W, dim=1).square()
    product = W @ (A if columns is None else take_piece(A, columns, 1)).T
    if columns is not None:
        square, product = sum_over_group(square, columns), sum_over_group(product, columns)
    both = torch.addmm(2 * product, B_rows, A @ A.T)
    norms = (square + (both * B_rows).sum(1)).clamp_(min=0).sqrt_()
    return norms if rows is None else gather_whole(norms, rows, 0)


SPARSE_TO = 0.15  # up to this share of dropped inputs, W x' is W x minus the product of the dropped ones


def plain_dora_linear(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, ratio: Tensor, scale: float, mask: Tensor | int = 1
) -> Tensor:
    """Return W x + b + (ratio - 1) ⊙ W x' + ratio ⊙ scale · B A x' by plain operations; the reference.

    x' is x · mask, with dropout's factors as mask. x (…, in), W (out, in), A (r, in), B (out, r), b and ratio (out,).
    """
    y, xd = x @ W.T, x * mask
    out = y + (xd @ W.T) * (ratio - 1) + (xd @ A.T @ B.T) * (scale * ratio)
    return out if b is None else out + b


def dora_linear(
    base: Callable[[Tensor], Tensor],
    input_gradient: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    ratio: Tensor,
    scale: float,
    p: float,
) -> Tensor:
    """Return base(x) + (ratio - 1) ⊙ W x' + ratio ⊙ scale · B A x', with x' = dropout(x, p), in the dtype of base(x).

    base(x) is W x + b. W and b get no gradient. With p > 0 a random seed is drawn. x (…, in), W (out, in), A (r, in), B
    (out, r), b and ratio (out,).

    input_gradient: (gradient of the layer's output (rows, out), W) → gradient of its input (rows, in).
    """
    return _DoraLinear.apply(x, W, b, A, B, ratio, base, input_gradient, scale, p, seed_for(p))


class _DoraLinear(Function):
    """`dora_linear`, which keeps x, h = x' Aᵀ and z, the part that `ratio` scales, for the backward pass."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, ratio: Tensor,
        base: Callable[[Tensor], Tensor], input_gradient: object, scale: float, p: float, seed: int,
    ) -> Tensor:  # fmt: skip
        """Return the output of `dora_linear`, in the dtype of base(x).

        Without dropout base(x) takes in the update in its memory if dtypes agree. With it, W x' is a second product; on
        a CPU with p up to `SPARSE_TO` it is base(x) less the product of the dropped inputs. Keeps all tensors, h = x'
        Aᵀ, and z, the part that `ratio` scales: with the bias only without dropout.
        """
        y = base(x)
        flat = x.reshape(-1, x.shape[-1])
        h = low_rank.down(flat, A, 1.0, p, seed)
        wide = y.to(torch.promote_types(y.dtype, h.dtype)).view(-1, y.shape[-1])
        few = 0 < p <= SPARSE_TO and gathers(x)
        if p:
            if few:
                u = sparse.multiply_sampled(flat, W, low_rank.places(flat.numel(), p, seed, x.device)).to(wide.dtype)
                u = torch.sub(wide, u, out=u)
                u = (u if b is None else u.sub_(b)).mul_(1 / (1 - p))
            else:
                u = (low_rank.dropped(flat, p, seed) @ W.T).to(wide.dtype)
            out = wide.sub_(u)
            z = low_rank.add_up(u, h, B, scale)
            out.addcmul_(z, ratio)
        else:
            z = low_rank.add_up(wide, h, B, scale)
            out = z * ratio if b is None else torch.addcmul(b * (1 - ratio), z, ratio)
        ctx.save_for_backward(x, W, b, A, B, ratio, h, z)
        ctx.input_gradient, ctx.options, ctx.few = input_gradient, (scale, p, seed), few
        return out.to(y.dtype).view(y.shape)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A, B and ratio, each None without need; None for all others.

        For a second derivative autograd runs through `plain_dora_linear` instead. The gradient of x without dropout is
        one product with W, and products with W are in W's dtype. With dropout there are two, for x and for x'. With
        `ctx.few` (on a CPU with little dropout) there is one, corrected at the dropped places. Without dropout, z
        includes the bias, and the ratio's gradient leaves it out.
        """
        x, W, b, A, B, ratio, h, z = ctx.saved_tensors
        scale, p, seed = ctx.options
        need = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
        if torch.is_grad_enabled():  # for a second derivative
            return _differentiable_gradients(ctx, g)
        rows = g.reshape(-1, g.shape[-1]).to(z.dtype)
        d_ratio = dx = None
        if ctx.needs_input_grad[5]:
            d_ratio = torch.linalg.vecdot(rows, z, dim=0)
            if b is not None and not p:
                d_ratio -= rows.sum(0) * b
        if need[0] and ctx.few:
            part = rows * ((ratio - 1) / (1 - p))
            places = low_rank.places(x.numel(), p, seed, x.device)
            less = sparse.product_entries(part, W, places)
            dx = ctx.input_gradient(part.add_(rows).to(W.dtype), W)
            dx.view(-1).index_add_(0, places, less.to(dx.dtype), alpha=-1)
        scaled = rows * ratio
        if need[0] and not p:
            dx = ctx.input_gradient(scaled.to(W.dtype), W)
        elif need[0] and not ctx.few:
            dx = ctx.input_gradient(rows.to(W.dtype), W)
            dx += low_rank.dropped(ctx.input_gradient((scaled - rows).to(W.dtype), W), p, seed)
        dx, dA, dB = gradients(scaled, x, A, B, h, scale, p, seed, need=need, dx=dx)
        return dx, None, None, dA, dB, d_ratio, None, None, None, None, None


def _differentiable_gradients(ctx: Context, g: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of all eleven inputs of `_DoraLinear` by autograd, so that they have gradients themselves.

    `plain_dora_linear` runs again, with the dropout mask of the seed. None for inputs that need none.
    """
    x, W, b, A, B, ratio, *_ = ctx.saved_tensors
    scale, p, seed = ctx.options
    mask = low_rank.dropout_mask(x.reshape(-1, x.shape[-1]), p, seed).view(x.shape) / (1 - p) if p else 1
    out = plain_dora_linear(x, W, b, A, B, ratio, scale, mask)
    return differentiate(out, (x, None, None, A, B, ratio, *[None] * 5), ctx.needs_input_grad, g.to(out.dtype))
