# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for Megatron's linear layers, with the names, attributes and results of the real ones (0.16)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MODULE = "megatron.core.tensor_parallel.layers"


class Summed(torch.autograd.Function):
    """Sum over the processes: forward for the outputs of pieces, backward for the input of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: bool) -> Tensor:
        ctx.forward = forward
        return total(x) if forward else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return (g if ctx.forward else total(g)), None


def total(t: Tensor) -> Tensor:
    t = t.contiguous().clone()
    dist.all_reduce(t)
    return t


class Parallel(nn.Module):
    def __init__(self, dense: nn.Linear, world: int, skip_bias_add: bool) -> None:
        super().__init__()
        self.output_size, self.input_size = dense.weight.shape
        self.skip_bias_add, self.sequence_parallel = skip_bias_add, False
        self.tp_group, self.world = (dist.group.WORLD, world) if world > 1 else (None, 1)
        rank = dist.get_rank() if world > 1 else 0
        W, b = dense.weight.data, dense.bias.data
        self.weight = nn.Parameter(W.chunk(world, self.dim)[rank].clone())
        self.bias = nn.Parameter((b if self.dim else b.chunk(world)[rank]).clone())

    dim = 0


class ColumnParallelLinear(Parallel):
    gather_output = False

    def forward(self, input_: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = input_ if self.world == 1 else Summed.apply(input_, False)
        bias = self.bias
        return nn.functional.linear(x, self.weight, None if self.skip_bias_add else bias), (
            bias if self.skip_bias_add else None
        )


class RowParallelLinear(Parallel):
    dim = 1
    input_is_parallel = True

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        y = nn.functional.linear(input_, self.weight)
        y = y if self.world == 1 else Summed.apply(y, True)
        return (y, self.bias) if self.skip_bias_add else (y + self.bias, None)


for kind in (ColumnParallelLinear, RowParallelLinear):
    kind.__module__ = MODULE


class MegatronNet(nn.Module):
    """`Net` of tensor_parallel.py with its last two layers of Megatron."""

    def __init__(self, net: Any, world: int, skip_bias_add: bool) -> None:
        super().__init__()
        self.first = net.first
        self.layer = ColumnParallelLinear(net.layer, world, skip_bias_add)
        self.after = RowParallelLinear(net.after, world, skip_bias_add)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.layer, self.after):
            y, b = layer(self.first(x) if layer is self.layer else torch.tanh(x))
            x = y if b is None else y + b
        return x
