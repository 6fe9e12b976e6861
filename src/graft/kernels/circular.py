# SPDX-License-Identifier: Apache-2.0
"""Products with a matrix of circulant blocks: C[t, s] = w[(s - t) mod b], by Fourier transforms of length b."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from graft.kernels.eager import only_backward
from graft.kernels.function import Function


class Circulant(NamedTuple):
    """The matrix whose blocks w, (out / b, in / b, b), describes, not formed yet."""

    w: Tensor
    scale: float
    shape: tuple[int, ...]  # of the weight that it updates

    def dense(self) -> Tensor:
        b = self.w.shape[-1]
        t = torch.arange(b, device=self.w.device)
        blocks = self.w[:, :, (t - t[:, None]) % b]  # (m, n, t, s)
        return self.scale * blocks.transpose(1, 2).reshape(self.shape)

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns that `ids` (…) name: (…, out)."""
        b = self.w.shape[-1]
        t = torch.arange(b, device=self.w.device)
        part, s = ids.reshape(-1, 1) // b, ids.reshape(-1, 1) % b
        picked = self.w[:, part, (s - t) % b]  # (m, ids, t)
        return self.scale * picked.transpose(0, 1).reshape(*ids.shape, -1)


def plain(x: Tensor, w: Tensor) -> Tensor:
    """The reference. x (…, in), w (out / b, in / b, b) → (…, out)."""
    m, n, b = w.shape
    return x @ Circulant(w, 1.0, (m * b, n * b)).dense().T


def product(x: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    """Compute scale · `plain`, in float32 at least; keep x and w for the backward pass."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)
    if not x.numel():  # transforms take no empty batch
        return scale * plain(x.to(dtype), w.to(dtype))
    function = _Product.apply if only_backward() else correlate
    return function(x.to(dtype), w.to(dtype), scale)  # type: ignore[no-any-return]


def spectrum(x: Tensor, parts: int) -> Tensor:
    """Return the transforms of the parts of x (…, parts · b), by frequency: (b / 2 + 1, rows, parts)."""
    rows = x.reshape(-1, parts, x.shape[-1] // parts).contiguous()  # torch 2.6 transforms no expanded tensors
    return torch.fft.rfft(rows).permute(2, 0, 1)


def signal(X: Tensor, shape: tuple[int, ...], b: int) -> Tensor:
    """Return the inverse of `spectrum`, in this shape."""
    return torch.fft.irfft(X.permute(1, 2, 0), n=b).reshape(shape)


def correlate(x: Tensor, w: Tensor, scale: float) -> Tensor:
    """Return scale · x Cᵀ."""
    m, n, b = w.shape
    W = torch.fft.rfft(w * scale).permute(2, 1, 0)  # (frequency, n, m)
    return signal(spectrum(x, n) @ W.conj(), (*x.shape[:-1], m * b), b)


class _Product(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, scale: float) -> Tensor:
        return correlate(x, w, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        m, n, b = w.shape
        G, dx, dw = spectrum(g, m), None, None  # (frequency, rows, m)
        if ctx.needs_input_grad[0]:
            dx = signal(G @ torch.fft.rfft(w * ctx.scale).permute(2, 0, 1), x.shape, b)
        if ctx.needs_input_grad[1]:
            dw = torch.fft.irfft((G.mH @ spectrum(x, n)).permute(1, 2, 0), n=b) * ctx.scale
        return dx, dw, None
