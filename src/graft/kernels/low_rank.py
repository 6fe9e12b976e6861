# SPDX-License-Identifier: Apache-2.0
"""Low-rank updates, y + s · dropout(x) Aᵀ Bᵀ, in y's own memory.

There are variants with vectors around fixed A and B, and with projections of x kept for the backward pass (VeLoRA's,
arXiv 2405.17991). Rules say when each form pays.

x (rows, n) is wide, h (rows, r) narrow. Dropout, of the share p, acts on the wide side: on the same elements for the
same seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled
from torch.nn.functional import linear

from graft.kernels.eager import Context, Function, autocast_dtype, cast, eager
from graft.kernels.one_product import Call, InputGradient
from graft.kernels.sparse import gathers

BLOCK = 256  # rows in a cast


@lru_cache(maxsize=1)  # several products of one layer need the same places, one after another
def places(size: int, p: float, seed: int, device: torch.device) -> Tensor:
    """Return where dropout puts zeros: each of `size` places with probability p, 0 < p < 1, (count,) int64, sorted.

    The same seed gives the same places. The gaps between zeros are geometric, which takes one random number per zero,
    not one per place. Waits for the device. Do not write to the result: that of the last arguments is cached.
    """
    g = torch.Generator(device).manual_seed(seed)
    draws = int(size * p + 6 * math.sqrt(size * p)) + 16  # enough but for one time in 10⁹
    while True:
        gaps = torch.rand(draws, generator=g, device=device).neg_().log1p_().mul_(1 / math.log1p(-p))
        positions = gaps.to(torch.int64).add_(1).cumsum(0).sub_(1)
        if positions[-1] >= size:
            return positions[: int(torch.searchsorted(positions, size))]
        draws *= 2


def dropout_mask(like: Tensor, p: float, seed: int) -> Tensor:
    """Return a boolean mask of the elements of `like` that dropout of the share p keeps, the same for the same seed.

    Where `gathers(like)` is True (on a CPU) it is made from `places`, else from one random number per element, drawn by
    a new generator with the seed. On the meta device nothing is seeded.
    """
    if not gathers(like):  # `places` would wait for the device
        g = None if like.is_meta else torch.Generator(like.device).manual_seed(seed)
        return torch.rand(like.shape, generator=g, device=like.device) >= p
    mask = torch.ones(like.shape, dtype=torch.bool, device=like.device)
    mask.view(-1).index_fill_(0, places(like.numel(), p, seed, like.device), False)
    return mask


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """Return dropout(x), with kept elements times 1 / (1 - p); x itself if p is 0."""
    return torch.where(dropout_mask(x, p, seed), x * (1 / (1 - p)), 0) if p else x


FUSED_FROM = 64  # rows: with fewer, an autograd.Function costs more than it saves


def zeroed(x: Tensor, dtype: torch.dtype, p: float, seed: int) -> Tensor:
    """Return (1 - p) · dropout(x) in `dtype`, that is x with zeros at the places of `seed`: the factor is cheaper on
    the narrow side.

    Without dropout it is x, or a cast; else new memory. Where `gathers(x)` is False, a mask is used, else zeros are
    written at the places.
    """
    if not p:
        return x.to(dtype)
    if not gathers(x):
        return torch.where(dropout_mask(x, p, seed), x.to(dtype), 0)
    x = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
    x.view(-1).index_fill_(0, places(x.numel(), p, seed, x.device), 0)
    return x


def down(x: Tensor, W: Tensor, scale: float = 1.0, p: float = 0.0, seed: int = 0) -> Tensor:
    """Return scale · dropout(x) Wᵀ, (rows, r), in the dtype of W; dropout(x) has zeros at the places of `seed`. x
    (rows, n), W (r, n).

    From `FUSED_FROM` rows on it is formed as (W xᵀ)ᵀ, a transposed view: products run along the last dimension of their
    result, which is narrow otherwise. Few rows have the bits of operations that autograd records.
    """
    if p or x.dtype != W.dtype:
        x, scale = zeroed(x, W.dtype, p, seed), scale / (1 - p)
    h = nn.functional.linear(x, W) if len(x) < FUSED_FROM else nn.functional.linear(W, x).T
    return h if scale == 1 else h * scale


def down_each(x: Tensor, W: Tensor) -> Tensor:
    """Return x Wᵀ of several adapters with the bits of `down`. x (n, rows, in), W (n, r, in) → (n, rows, r).

    Fewer than `FUSED_FROM` rows take one batched product; more take that of W with xᵀ, and the result is its transposed
    view.
    """
    return torch.bmm(x, W.mT) if x.shape[1] < FUSED_FROM else torch.bmm(W, x.mT).mT


def up(h: Tensor, W: Tensor, dtype: torch.dtype, p: float = 0.0, seed: int = 0) -> Tensor:
    """Return dropout(h Wᵀ), (rows, n), with zeros at the places of `seed`, computed in the dtype of h and cast to
    `dtype`. h (rows, r), W (n, r).
    """
    return zeroed(h * (1 / (1 - p)) @ W.T if p else h @ W.T, h.dtype, p, seed).to(dtype)


def add_up(y: Tensor, h: Tensor, W: Tensor, scale: float, p: float = 0.0, seed: int = 0) -> Tensor:
    """Add dropout(scale · h Wᵀ) to y in y's memory, and return y.

    y (…, n), h (rows, r), W (n, r). Elements that are not dropped, by `seed`, are divided by 1 - p.

    Without dropout and with one dtype it is a single operation. Else the sum is computed in the wider dtype and rounded
    once. With dropout a masked product is added, or on a CPU the dropped elements get their values back after a full
    product.
    """
    flat = y.view(-1, y.shape[-1])
    if not p and y.dtype == h.dtype:
        flat.addmm_(h, W.T, alpha=scale)
        return y
    dtype = torch.promote_types(y.dtype, h.dtype)
    wide = flat.to(dtype)  # to round the sum once
    h, W, scale = h.to(dtype), W.to(dtype), scale / (1 - p)
    if p and not gathers(y):
        wide.add_(zeroed(h @ W.T, dtype, p, seed), alpha=scale)
    elif p:  # put the elements without an addition back afterwards
        where = places(y.numel(), p, seed, y.device)
        before = wide.view(-1).index_select(0, where)
        wide.addmm_(h, W.T, alpha=scale).view(-1).index_copy_(0, where, before)
    else:
        wide.addmm_(h, W.T, alpha=scale)
    if wide is not flat:
        flat.copy_(wide)
    return y


def outer(h: Tensor, x: Tensor, p: float = 0.0, seed: int = 0) -> Tensor:
    """Return hᵀ dropout(x), (r, n), in the dtype of h; dropout(x) has zeros at the places of `seed`. h (rows, r), x
    (rows, n).
    """
    product = h.T @ zeroed(x, h.dtype, p, seed)
    return product * (1 / (1 - p)) if p else product


def outer_wide(x: Tensor, h: Tensor, scale: float) -> Tensor:
    """Return scale · xᵀ h, (n, r), in the dtype of h, as the transpose of hᵀ x. x (rows, n), h (rows, r)."""
    product = h.T @ x.to(h.dtype)  # xᵀ h takes up to four times as long
    return (product if scale == 1 else product * scale).T


def through_up(g: Tensor, W: Tensor, h: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of h (rows, r) and W (n, r) through scale · h Wᵀ, from that of the result, g (rows, n).

    If g has another dtype than h and no second derivative is wanted, g is cast in blocks of `BLOCK` rows, so that no
    whole copy of it exists.
    """
    if g.dtype == h.dtype or torch.is_grad_enabled():
        return down(g, W.T, scale), outer_wide(g, h, scale)
    dh, dW = torch.empty_like(h), h.new_zeros(W.shape[::-1])
    for part, narrow, out in zip(g.split(BLOCK), h.split(BLOCK), dh.split(BLOCK)):
        wide = part.to(h.dtype)  # small enough to stay in the cache for both
        torch.mm(wide, W, out=out)
        dW.addmm_(narrow.T, wide)
    return dh.mul_(scale), dW.mul_(scale).T


def plain(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float = 0.0) -> Tensor:
    """Return y + scale · dropout(x) Aᵀ Bᵀ in y's dtype, in new memory, by plain operations in the dtype of A; the
    reference. x is cast to that dtype first, and torch's own dropout acts, without a seed.

    y (…, out), x (…, in), A (r, in), B (out, r).
    """
    x = x if x.dtype == A.dtype else x.to(A.dtype)  # as `cast`
    out = plus(y, linear(linear(nn.functional.dropout(x, p) if p else x, A), B), scale)
    return out if out.dtype == y.dtype else out.to(y.dtype)


def plus(y: Tensor, z: Tensor, scale: Tensor | float) -> Tensor:
    """Return y + scale · z, by one operation unless the scale is a tensor."""
    return y + z * scale if isinstance(scale, Tensor) else torch.add(y, z, alpha=scale)


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float = 0.0) -> Tensor:
    """Return y + scale · dropout(x) Aᵀ Bᵀ; y's memory may hold the result.

    y (…, out), x (…, in), A (r, in), B (out, r).

    y must be fresh: nothing else may need its values, not even its own backward pass (a linear layer's does not).
    Without gradients and dropout it is added in place. If only B trains, nothing keeps x. Otherwise `FUSED_FROM` rows
    and more use an autograd.Function, which draws a seed for dropout; fewer use `plain`. Except for `plain`, autocast's
    dtype is that of A and B if it is on.
    """
    grad = torch.is_grad_enabled()
    if not (p or grad):
        A, B = autocast(x, A, B)
        return add_up(y, down(x.reshape(-1, x.shape[-1]), A), B, scale)
    if grad and B.requires_grad and not A.requires_grad:  # then the backward pass needs no x
        (A,) = autocast(x, A)
        x = x.to(A.dtype)
        return add_product(y, (dropout(x, p) if p else x) @ A.T, B, scale)
    # Dropout without gradients comes here, too: reentrant checkpointing runs once without and once with gradients,
    # and both runs need the same mask.
    if x.numel() >= FUSED_FROM * x.shape[-1]:
        A, B = autocast(x, A, B)
        return _AddLowRank.apply(y, x, A, B, scale, p, seed_for(p))
    return plain(y, x, A, B, scale, p)


def add_product(y: Tensor, h: Tensor, B: Tensor, scale: Any) -> Tensor:
    """Return y + scale · h Bᵀ in y's dtype. y (…, out), h (…, r), B (out, r).

    y must be fresh, as for `add_low_rank`: its memory may hold the result. Under autocast B is cast to its dtype, and h
    always to B's. Without gradients or with fewer than `FUSED_FROM` rows the result is new.
    """
    (B,) = autocast(h, B)
    h = h.to(B.dtype)
    if not torch.is_grad_enabled() or h.numel() < FUSED_FROM * h.shape[-1]:
        return plus(y, h @ B.T, scale).to(y.dtype)
    return _AddProduct.apply(y, h, B, scale)


def low_rank_linear(
    base: Callable[[Tensor], Tensor],
    input_gradient: Callable[[Tensor, Tensor], Tensor],
    W: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    p: float = 0.0,
) -> Tensor:
    """Return base(x) + scale · dropout(x) Aᵀ Bᵀ, with one gradient of x for both.

    x has many rows, W gets no gradient.

    The memory of base(x) holds the result. With p > 0 a random seed is drawn. Under autocast A and B are cast to its
    dtype.

    Args:
        base: a linear layer without hooks.
        input_gradient: (gradient of its output (rows, out), W) → gradient of its input (rows, in).
        W: its weight, as `input_gradient` takes it.
    """
    A, B = autocast(x, A, B)
    return _LowRankLinear.apply(x, W, A, B, base, input_gradient, scale, p, seed_for(p))


def few_rows_linear(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return x Wᵀ + bias + scale · x Aᵀ Bᵀ for few rows, with the bits of plain operations, gradients included.

    One autograd.Function takes the place of six nodes of the graph. All tensors have one dtype; W and bias get no
    gradient. For eager code without autocast.
    """
    return _FewRowsLinear.apply_eagerly(x, W, bias, A, B, scale)


class _FewRowsLinear(Function):
    """The function of `few_rows_linear`."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
    ) -> Tensor:  # fmt: skip
        """Return x Wᵀ + bias with scale · h Bᵀ added in its memory, without casts.

        Keeps x, W, A, B, h = x Aᵀ and the scale.
        """
        h = linear(x, A)
        ctx.save_for_backward(x, W, A, B, h)
        ctx.scale = scale
        return linear(x, W, bias).add_(linear(h, B), alpha=scale)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[object, ...]:
        """Return the gradients of x, A and B as far as needed; None for W, the bias and the scale.

        Leading dimensions are flattened, and x's gradient gets its shape back. For a second derivative, if B needs a
        gradient, h is found again from x.
        """
        x, W, A, B, h = ctx.saved_tensors
        need_x, _, _, need_A, need_B, _ = ctx.needs_input_grad
        if need_B and torch.is_grad_enabled():
            h = linear(x, A)
        shape = x.shape
        if len(shape) != 2:
            g, x, h = (t.reshape(-1, t.shape[-1]) for t in (g, x, h))
        scaled = g * ctx.scale
        dh = scaled @ B
        dx = (g @ W).add_(dh @ A) if need_x else None
        if dx is not None and len(shape) != 2:
            dx = dx.view(shape)
        return dx, None, None, dh.t() @ x if need_A else None, scaled.t() @ h if need_B else None, None


def autocast(x: Tensor, *factors: Tensor) -> Sequence[Tensor]:
    """Return `factors` as a list in the dtype of autocast on x's device if it is on; else the tuple `factors`
    itself.
    """
    if not _is_any_autocast_enabled() or (dtype := autocast_dtype(x.device)) is None:
        return factors
    return [f.to(dtype) for f in factors]


def new_seed(generator: torch.Generator | None = None) -> int:
    """Return a random integer below 2**62 from `generator`, or from torch's generator of the CPU."""
    return int(torch.randint(2**62, (), device="cpu", generator=generator).item())


def seed_for(p: float) -> int:
    """Return a new random seed if p is not 0; else 0, without drawing."""
    return new_seed() if p else 0


def dropout(x: Tensor, p: float) -> Tensor:
    """Return torch's dropout of x; for many rows of eager code keep a seed for the backward pass instead of a mask.

    Fewer than `FUSED_FROM` rows, and compilers and tracers, get torch's function. It drops in any mode of a module. The
    seed is drawn from torch's CPU generator, even if p is 0.
    """
    if not eager() or x.numel() < FUSED_FROM * x.shape[-1]:
        return nn.functional.dropout(x, p)
    return _Dropout.apply(x, p, new_seed())


class _Dropout(Function):
    """The function of `dropout`, which keeps only the seed."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, p: float, seed: int) -> Tensor:
        """Return dropout(x) with the places that `seed` gives."""
        ctx.options = p, seed
        return dropped(x, p, seed)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor, None, None]:
        """Return dropout of the gradient at the same places; None for p and seed."""
        return dropped(g, *ctx.options), None, None


class _AddLowRank(Function):
    """The function of `add_low_rank`.

    It keeps x as it came (others often keep it anyway) and h = x Aᵀ, r numbers per row.
    """

    @staticmethod
    def forward(ctx: Context, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float, seed: int) -> Tensor:
        """Add scale · dropout(x) Aᵀ Bᵀ to y's memory past autograd, and return y's data.

        Keeps x, A, B, h = dropout(x) Aᵀ, and the last three arguments.
        """
        h = down(x.reshape(-1, x.shape[-1]), A, 1.0, p, seed)
        ctx.save_for_backward(x, A, B, h)
        ctx.options = scale, p, seed
        return add_up(y.data, h, B, scale)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[object, ...]:
        """Return g itself for y, and the gradients of x, A and B as far as needed; None for the others."""
        x, A, B, h = ctx.saved_tensors
        need = ctx.needs_input_grad[1:4]
        return g, *gradients(g.reshape(-1, g.shape[-1]), x, A, B, h, *ctx.options, need=need), None, None, None


class _AddProduct(Function):
    """The function of `add_product`."""

    @staticmethod
    def forward(ctx: Context, y: Tensor, h: Tensor, B: Tensor, scale: float) -> Tensor:
        """Add scale · h Bᵀ to y's memory past autograd, and return y's data.

        Keeps B, h's shape and the scale, and h only if B needs a gradient.
        """
        ctx.save_for_backward(h if ctx.needs_input_grad[2] else None, B)
        ctx.options = h.shape, scale
        return add_up(y.data, h.reshape(-1, h.shape[-1]), B, scale)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return g itself for y, the gradient scale · g B of h, scale · gᵀ h for B, and None for the scale.

        h always gets its gradient, in the shape of h. B gets None if it was fixed in the forward pass, when no h was
        saved.
        """
        (h, B), (shape, scale) = ctx.saved_tensors, ctx.options
        rows, dB = g.reshape(-1, g.shape[-1]), None
        if h is None:  # B is fixed
            dh = down(rows, B.T, scale)
        else:
            dh, dB = through_up(rows, B, h.reshape(-1, shape[-1]), scale)
        return g, dh.view(shape), dB, None


class _LowRankLinear(Function):
    """The function of `low_rank_linear`: base layer and update together.

    Their gradients of x are summed in one memory.
    """

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, W: Tensor, A: Tensor, B: Tensor, base: Call, input_gradient: InputGradient,
        scale: float, p: float, seed: int,
    ) -> Tensor:  # fmt: skip
        """Return base(x) with the update added in its memory.

        Keeps W, x, A, B, h = dropout(x) Aᵀ, `input_gradient` and the last three arguments.
        """
        y = base(x)
        h = down(x.reshape(-1, x.shape[-1]), A, 1.0, p, seed)
        ctx.save_for_backward(W, x, A, B, h)
        ctx.input_gradient, ctx.options = input_gradient, (scale, p, seed)
        return add_up(y, h, B, scale)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[object, ...]:
        """Return the gradients of x (base layer and update), A and B as far as needed; None for the others.

        W is cast to the dtype of g.
        """
        W, x, A, B, h = ctx.saved_tensors
        need_x, _, *need = ctx.needs_input_grad[:4]
        rows = g.reshape(-1, g.shape[-1])
        dx = ctx.input_gradient(rows, W.to(g.dtype)) if need_x else None
        dx, dA, dB = gradients(rows, x, A, B, h, *ctx.options, need=(need_x, *need), dx=dx)
        return dx, None, dA, dB, None, None, None, None, None


def gradients(
    g: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    h: Tensor,
    scale: float,
    p: float,
    seed: int,
    *,
    need: Sequence[bool],
    dx: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, A and B from that of the output, g (rows, out). A's and B's are None without need.

    That of x has the shape and dtype of x. Without need of it, `dx` is returned as passed, in that shape and dtype;
    None without `dx`. For a second derivative h is computed again from x, by operations that have one, and nothing is
    written in place.

    Args:
        h: dropout(x) Aᵀ, (rows, r), of the forward pass.
        need: for x, A and B.
        dx: a gradient of x (rows, in). The update's is added to it, in place unless a second derivative is wanted.
    """
    need_x, need_A, need_B = need
    drop: dict[str, Any] = dict(p=p, seed=seed)
    flat = x.reshape(-1, x.shape[-1])
    again = torch.is_grad_enabled()
    if again:  # for a second derivative: h by operations that have one
        h = down(flat, A, **drop)
    dh, dB = through_up(g, B, h, scale)
    dA = outer(dh, flat, **drop) if need_A else None
    if need_x and dx is not None and not again:
        dx = add_up(dx, dh, A.T, 1.0, p, seed)
    elif need_x:
        branch_dx = up(dh, A.T, x.dtype, **drop)
        dx = branch_dx if dx is None else dx + branch_dx
    return None if dx is None else dx.to(x.dtype).view(x.shape), dA, dB if need_B else None


def worth_it(x: Tensor) -> bool:
    """Return True if an autograd.Function pays for x: autograd records, and x has at least `FUSED_FROM` rows.

    False under compilers, tracers, transforms and hooks on all modules (`eager`), and under autocast.
    """
    many = torch.is_grad_enabled() and x.numel() >= FUSED_FROM * x.shape[-1]
    return many and eager() and autocast_dtype(x.device) is None


def plain_scaled_low_rank(y: Tensor, h: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """Return y + ((h ⊙ d) Bᵀ) ⊙ b in y's dtype, from h = x Aᵀ, by plain operations; the reference.

    y (…, out), h (…, r), B (out, r), d (r,), b (out,).
    """
    return cast(y + nn.functional.linear(h * d, B) * b, y.dtype)


def add_scaled(y: Tensor, h: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """Return y + ((h ⊙ d) Bᵀ) ⊙ b. B gets no gradient. y (…, out), h (…, r), B (out, r), d (r,), b (out,).

    If `worth_it(h)`, an autograd.Function writes the result to y's memory past autograd, so that nothing else may need
    y's values. Else the result is new.
    """
    return _AddScaled.apply(y, h, B, d, b) if worth_it(h) else plain_scaled_low_rank(y, h, B, d, b)


def plain_sample_hidden(h: Tensor, d: Tensor, noise: Tensor) -> Tensor:
    """Return μ + ε σ, (…, r), with (μ, log σ²) = h ⊙ d, by plain operations; the reference.

    h (…, 2 r), d (2 r,), ε = `noise` (…, r).
    """
    mean, log_variance = (h * d).chunk(2, -1)
    return mean + noise * (0.5 * log_variance).exp()


def sample_hidden(h: Tensor, d: Tensor, noise: Tensor) -> Tensor:
    """Return μ + ε σ, (…, r), with (μ, log σ²) = h ⊙ d: by an autograd.Function that keeps the arguments alone if
    `worth_it(h)`, else by plain operations.

    h (…, 2 r), d (2 r,), ε = `noise` (…, r), which gets no gradient.
    """
    return _SampledHidden.apply(h, d, noise) if worth_it(h) else plain_sample_hidden(h, d, noise)


class _SampledHidden(Function):
    """The function of `sample_hidden`."""

    @staticmethod
    def forward(ctx: Context, h: Tensor, d: Tensor, noise: Tensor) -> Tensor:
        """Return μ + ε σ. Keeps h, d and the noise."""
        ctx.save_for_backward(h, d, noise)
        return plain_sample_hidden(h, d, noise)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of h and d, both always, from σ computed again; None for the noise.

        That of μ is g, that of log σ² is v = ½ g ε σ. d gets sums over all rows.
        """
        h, d, noise = ctx.saved_tensors
        (h1, h2), (d1, d2) = h.chunk(2, -1), d.chunk(2)
        v = g * noise * (0.5 * d2 * h2).exp() * 0.5  # the gradient of log σ²
        dd = [(t * part).flatten(0, -2).sum(0) for t, part in ((g, h1), (v, h2))]
        return torch.cat((g * d1, v * d2), -1), torch.cat(dd), None


def one_product_pays(rows: int, out: int, n: int) -> bool:
    """Return True if forming W + ΔW, once in each direction, costs less than three products with the factors.

    W is (out, n), and x has `rows` rows. The costs are 2 out · n and rows (2 out + n), times r. The sums with W come on
    top: hence 3.
    """
    return 3 * out * n < rows * (2 * out + n)


def linear_with(
    W: Tensor, bias: Tensor | None, x: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor,
    call: Call, input_gradient: InputGradient,
) -> Tensor:  # fmt: skip
    """Return x (W + ΔW)ᵀ + bias by one product, with ΔW = diag(b) B diag(d) A; for where `one_product_pays`.

    Only d, b and x get gradients. All have one dtype.

    Args:
        call: (x, weight, bias) → the output of the layer.
        input_gradient: (gradient of that output (rows, out), weight) → gradient of its input (rows, in).
    """
    h = x.reshape(-1, x.shape[-1]) @ A.T
    return _OneProduct.apply(x, h, W, bias, A, B, d, b, call, input_gradient)


def vector_gradients(
    G: Tensor, B: Tensor, d: Tensor, b: Tensor, need: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients b (G ⊙ B) of d and (G ⊙ B) d of b, each None without need, from G = gᵀ h (out, r).

    This takes no further product of the width of y. B (out, r), d (r,), b (out,).
    """
    dd = b @ (G * B) if need[0] else None
    db = (G * B) @ d if need[1] else None
    return dd, db


KEPT_FROM = 128  # rank of B: from it on, keeping h Bᵀ for the gradient of b costs less than another product


TINY = 1e-30  # a block of rows is never divided by less


class _AddScaled(Function):
    """The function of `add_scaled`."""

    @staticmethod
    def forward(ctx: Context, y: Tensor, h: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
        """Add ((h ⊙ d) Bᵀ) ⊙ b to y's memory past autograd, and return y's data. Keeps h, B, d and b.

        From the rank `KEPT_FROM` on, (h ⊙ d) Bᵀ is kept, too, if b needs a gradient. It is in the dtype of h if y has
        that, else in float16, which errs an eighth of a bfloat16 y. Each block of `BLOCK` rows is then divided by its
        largest magnitude, at least 1e-30.
        """
        flat = h.reshape(-1, h.shape[-1])
        ctx.kept = len(d) >= KEPT_FROM and ctx.needs_input_grad[4]
        if not ctx.kept:
            ctx.save_for_backward(h, B, d, b)
            return add_up(y.data, flat * d, b[:, None] * B, 1.0)
        rows = y.data.view(-1, y.shape[-1])
        if y.dtype == h.dtype:
            z = (flat * d) @ B.T
            ctx.save_for_backward(h, B, d, b, z, None)
            rows.addcmul_(z, b)
            return y.data
        z = torch.empty_like(rows, dtype=torch.float16)
        largest = h.new_empty(-(-len(rows) // BLOCK))
        ctx.save_for_backward(h, B, d, b, z, largest)
        for n, (some, narrow, quotients) in enumerate(zip(rows.split(BLOCK), flat.split(BLOCK), z.split(BLOCK))):
            wide = (narrow * d) @ B.T
            some.copy_(torch.addcmul(some.to(h.dtype), wide, b))
            torch.amax(wide.abs(), (0, 1), out=largest[n]).clamp_(min=TINY)
            quotients.copy_(wide.div_(largest[n]))
        return y.data

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[object, ...]:
        """Return g itself for y, and the gradients of h, d and b, as far as needed; None for B.

        The kept product z is used in blocks of `BLOCK` rows; a narrow z is scaled back by the largest value of its
        block. Without z, or for a second derivative, (h ⊙ d) Bᵀ is found again from h, with products in h's dtype.
        """
        h, B, d, b, *saved = ctx.saved_tensors
        _, need_h, _, need_d, need_b = ctx.needs_input_grad
        flat, rows = h.reshape(-1, h.shape[-1]), g.reshape(-1, g.shape[-1])
        scaled = b[:, None] * B
        if not saved or torch.is_grad_enabled():
            rows = rows.to(h.dtype)
            dd, db = vector_gradients(outer_wide(rows, flat, 1.0), B, d, b, (need_d, need_b))
            return g, (down(rows, scaled.T) * d).view(h.shape) if need_h else None, None, dd, db
        z, largest = saved
        dd, db = torch.zeros_like(d), torch.zeros_like(b)
        if largest is None:
            dh = rows @ scaled
            for some, wide in zip(rows.split(BLOCK), z.split(BLOCK)):
                db += (some * wide).sum(0)
        else:
            dh = torch.empty_like(flat)
            for some, wide, out, unit in zip(rows.split(BLOCK), z.split(BLOCK), dh.split(BLOCK), largest):
                some = some.to(h.dtype)
                torch.mm(some, scaled, out=out)
                db.addcmul_(wide.to(h.dtype).mul_(some).sum(0), unit)
        if need_d:
            for out, narrow in zip(dh.split(BLOCK), flat.split(BLOCK)):
                dd += (out * narrow).sum(0)
        return g, dh.mul_(d).view(h.shape) if need_h else None, None, dd if need_d else None, db


class _OneProduct(Function):
    """The function of `linear_with`.

    The caller makes h = x Aᵀ, so that a second derivative finds x. The gradient of x includes h's.
    """

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, h: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, d: Tensor,
        b: Tensor, call: Call, input_gradient: InputGradient,
    ) -> Tensor:  # fmt: skip
        """Return call(x, W + ΔW, bias). Keeps h, W, A, B, d, b and `input_gradient`, and neither x nor the sum."""
        ctx.save_for_backward(h, W, A, B, d, b)
        ctx.input_gradient = input_gradient
        return call(x, _sum(W, A, B, d, b), bias)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[object, ...]:
        """Return the gradients of x, d and b, as far as needed; None for the others, also for h and the bias.

        That of x goes through W + ΔW, formed again. Those of d and b come from gᵀ h, which is always computed, without
        a cast.
        """
        h, W, A, B, d, b = ctx.saved_tensors
        rows = g.reshape(-1, g.shape[-1])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ctx.input_gradient(rows, _sum(W, A, B, d, b)).view(*g.shape[:-1], A.shape[1])
        dd, db = vector_gradients(rows.T @ h, B, d, b, ctx.needs_input_grad[6:8])
        return dx, None, None, None, None, None, dd, db, None, None


def _sum(W: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """Return W + diag(b) B diag(d) A in new memory. W (out, n), A (r, n), B (out, r)."""
    return torch.addmm(W, b[:, None] * B, d[:, None] * A)


def width(n: int, groups: int) -> int:
    """Return D = n / groups, rounded up: how many numbers of an input vector (n,) are in a group."""
    return -(-n // groups)


def grouped(x: Tensor, groups: int) -> Tensor:
    """Cut vectors into groups: (…, n) → (…, groups, D). Zeros fill the last groups if n is no multiple."""
    n = x.shape[-1]
    D = width(n, groups)
    return (x if n == groups * D else nn.functional.pad(x, (0, groups * D - n))).unflatten(-1, (groups, D))


def unit(v: Tensor) -> Tensor:
    """Return the vector v with length 1, in float32; for zero, a vector (n,) of numbers 1 / √n."""
    v = v.float()
    norm = v.norm()
    return torch.where(norm > 0, v / norm, v.shape[0] ** -0.5)


def mean_direction(x: Tensor, groups: int) -> Tensor:
    """Return the direction of the mean group of inputs x (…, n): (D,) of length 1, in float32."""
    mean = x.reshape(-1, x.shape[-1]).mean(0, dtype=torch.promote_types(x.dtype, torch.float32))
    return unit(grouped(mean, groups).mean(0))


def sketched_product(x: Tensor, A: Tensor, v: Tensor, groups: int, scale: float = 1.0) -> Tensor:
    """Return x Aᵀ in the dtype of A, or of autocast.

    The gradient of A is scale · gᵀ x̂; x̂ is x with each group projected onto v.

    Only one number for each group of x is kept. v gets no gradient. x (…, n), A (r, n), v (D,).
    """
    A, v = autocast(x, A, v)
    return _Sketched.apply(x.to(A.dtype), A, v.to(A.dtype), groups, scale)


class _Sketched(Function):
    """The function of `sketched_product`."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, A: Tensor, v: Tensor, groups: int, scale: float) -> Tensor:
        """Return x Aᵀ. Keeps A, v, the scale and the projections of x's groups on v, (rows, groups), but not x."""
        c = grouped(x.reshape(-1, x.shape[-1]), groups) @ v  # (rows, groups)
        ctx.save_for_backward(c, A, v)
        ctx.scale = scale
        return nn.functional.linear(x, A)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[object, ...]:
        """Return the gradient g A of x, and scale · (gᵀ c) ⊗ v of A from the kept projections c, each None without
        need; None for the others.

        A's gradient is cut to the columns of A, as the last group may be shorter.
        """
        c, A, v = ctx.saved_tensors
        dx = g @ A if ctx.needs_input_grad[0] else None
        dA = None
        if ctx.needs_input_grad[1]:  # c_g v needs no forming: gᵀ (c ⊗ v) = (gᵀ c) ⊗ v
            sums = g.reshape(-1, g.shape[-1]).T @ c * ctx.scale  # (r, groups)
            dA = (sums[..., None] * v).flatten(1)[:, : A.shape[1]]
        return dx, dA, None, None, None
