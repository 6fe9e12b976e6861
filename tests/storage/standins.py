# SPDX-License-Identifier: Apache-2.0
"""Layers by the names of packages that CI does not have: they unpack by the published formats in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP, BITS = 32, 4
PER = 32 // BITS  # codes in an int32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output stands in each nibble


def named(name: str, *bases: type) -> type[nn.Module]:
    """Return a class of that qualified name."""
    module, _, kind = name.rpartition(".")
    return type(kind, bases or (nn.Module,), {"__module__": module})


def pack(codes: Tensor, dim: int, order: tuple[int, ...] = tuple(range(PER))) -> Tensor:
    """Put the codes of 8 rows (or columns) into one int32, the first in its lowest bits."""
    parts = codes.to(torch.int64).unflatten(dim, (-1, PER)).movedim(dim + 1, 0)
    packed = sum(parts[place] << BITS * nibble for nibble, place in enumerate(order))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack(packed: Tensor, dim: int, order: tuple[int, ...] = tuple(range(PER))) -> Tensor:
    shifts = [(packed >> BITS * nibble) & (2**BITS - 1) for nibble in range(PER)]
    parts = [shifts[order.index(place)] for place in range(PER)]
    return torch.stack(parts, dim + 1).flatten(dim, dim + 1)


def by_groups(W: Tensor, g_idx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (in, out), zeros and scales (groups, out) of a weight (out, in), rounded group by group."""
    groups = [W.T[g_idx == g] for g in range(int(g_idx.max()) + 1)]
    low, high = (torch.stack([f(group, 0) for group in groups]) for f in (torch.amin, torch.amax))
    scales = (high - low) / (2**BITS - 1)
    zeros = (-low / scales).round().clamp(0, 2**BITS - 1)
    codes = (W.T / scales[g_idx] + zeros[g_idx]).round().clamp(0, 2**BITS - 1)
    return codes, zeros, scales


class FourBits(nn.Module):
    sizes = ("out_features", "in_features")

    def __init__(self, layer: nn.Linear, dtype: torch.dtype = torch.float32):
        super().__init__()
        for name, size in zip(self.sizes, layer.weight.shape):
            setattr(self, name, size)
        self.pack(layer.weight.data, dtype)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.data.to(dtype))

    def hold(self, **tensors):
        for name, t in tensors.items():
            self.register_buffer(name, t)

    def forward(self, x):
        y = x.to(self.scales.dtype) @ self.dense()
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class GptqBits(FourBits):
    """Groups of inputs in an order of their own (desc_act)."""

    def pack(self, W, dtype):
        g_idx = torch.randperm(W.shape[1], generator=torch.Generator().manual_seed(0)) // GROUP
        codes, zeros, scales = by_groups(W, g_idx)
        self.hold(qweight=pack(codes, 0), qzeros=pack(zeros, 1), scales=scales.to(dtype), g_idx=g_idx)

    def dense(self):
        zeros = unpack(self.qzeros, 1)[self.g_idx]
        return (unpack(self.qweight, 0) - zeros) * self.scales[self.g_idx]


class AwqBits(FourBits):
    """Outputs in AWQ's order."""

    def pack(self, W, dtype):
        codes, zeros, scales = by_groups(W, torch.arange(W.shape[1]) // GROUP)
        self.hold(qweight=pack(codes, 1, AWQ_ORDER), qzeros=pack(zeros, 1, AWQ_ORDER), scales=scales.to(dtype))

    def dense(self):
        zeros, scales = unpack(self.qzeros, 1, AWQ_ORDER), self.scales
        return (unpack(self.qweight, 1, AWQ_ORDER) - zeros.repeat_interleave(GROUP, 0)) * scales.repeat_interleave(
            GROUP, 0
        )


BASE = named("gptqmodel.nn_modules.qlinear.BaseQuantLinear")


class Gptq(GptqBits, BASE):
    __module__, __qualname__ = "gptqmodel.nn_modules.qlinear.torch", "TorchLinear"

    @property
    def weight(self):
        """Something that has a shape, and is no tensor."""
        return type("Metadata", (), {"shape": (self.out_features, self.in_features), "dtype": self.scales.dtype})()


class AwqModel(AwqBits, named("gptqmodel.nn_modules.qlinear.AWQuantLinear", BASE)):
    __module__, __qualname__ = "gptqmodel.nn_modules.qlinear.torch_awq", "AwqTorchLinear"


class OldGptq(GptqBits):
    __module__, __qualname__ = "auto_gptq.nn_modules.qlinear.qlinear_triton", "QuantLinear"
    sizes = ("outfeatures", "infeatures")


class OldAwq(AwqBits):
    __module__, __qualname__ = "awq.modules.linear.gemm", "WQLinear_GEMM"


class AqlmProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, bias):
        ctx.save_for_backward(W)
        return F.linear(x, W, bias)

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("The size of tensor a must match the size of tensor b")  # it takes the codes as they were


class Aqlm(nn.Module):
    """Codes of 8 bits, which the first call puts into another order; its backward pass fails, as on CPUs."""

    __module__, __qualname__ = "aqlm.inference", "QuantizedLinear"
    BOOKS, OUT, IN = 2, 1, 8

    def __init__(self, layer: nn.Linear, bits: int = 8):
        super().__init__()
        (self.out_features, self.in_features), g = layer.weight.shape, torch.Generator().manual_seed(0)
        groups = self.out_features // self.OUT, self.in_features // self.IN
        books = torch.randn(self.BOOKS, 2**bits, self.OUT, self.IN, generator=g) * layer.weight.std()
        codes = torch.randint(0, 2**bits, (*groups, self.BOOKS), generator=g)
        self.codebooks = nn.Parameter(books, requires_grad=False)
        self.codes = nn.Parameter(codes.to(torch.int8 if bits == 8 else torch.int16), requires_grad=False)
        self.scales = nn.Parameter(torch.rand(groups[0], 1, 1, 1, generator=g) + 0.5, requires_grad=False)
        self.bias, self.gemv_op = layer.bias, None

    def forward(self, x):
        size = self.codebooks.shape[1]
        if self.gemv_op is None:
            self.gemv_op = "chosen"
            if size == 256:
                self.codes.data = self.codes.data.permute(1, 0, 2).contiguous()
        codes = self.codes.permute(1, 0, 2) if size == 256 else self.codes
        entries = F.one_hot(codes.long() % size, size).float()  # (out groups, in groups, books, size)
        W = torch.einsum("oibs,bspq->opiq", entries, self.codebooks) * self.scales
        W = W.reshape(self.out_features, self.in_features)
        return AqlmProduct.apply(x, W, self.bias) if size == 256 else F.linear(x, W, self.bias)


class Eetq(nn.Module):
    """8 bits, (in, out), rows in an order that its kernel knows; no backward pass, no sizes."""

    __module__, __qualname__ = "transformers.integrations.eetq", "EetqLinear"

    def __init__(self, layer: nn.Linear):
        super().__init__()
        scales = layer.weight.data.abs().amax(1) / 127
        codes = (layer.weight.data.T / scales).round().to(torch.int8)
        self.weight = nn.Parameter(codes.flip(0), requires_grad=False)
        self.weight_scales = nn.Parameter(scales, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x):
        with torch.no_grad():
            y = x @ (self.weight.flip(0) * self.weight_scales)
            return y if self.bias is None else y + self.bias
