# SPDX-License-Identifier: Apache-2.0
"""Tensors that several processes hold in pieces: cutting, gathering and summing, with backward passes.

A tensor is *whole* if each process holds all of it; then its gradient is whole as well. Or it is a *piece*, with the
gradient of that piece. Each function here turns one into the other, with the backward pass that keeps this so. Code
that computes only with whole tensors needs none of them: its parameters get equal gradients on all processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graft.kernels.eager import Context, Function


class Cut(NamedTuple):
    """One dimension of a tensor that is cut into a piece for each process, as torch.chunk cuts: the last may be
    shorter.
    """

    group: dist.ProcessGroup | None  # its process group
    rank: int  # of this process, in the group
    world: int
    size: int  # of the whole dimension
    stripes: int = 1  # parts that are cut one by one: 2 if a weight holds two stacked layers

    @property
    def chunk(self) -> int:
        """The size of the first piece of a stripe: size / (stripes · world), rounded up."""
        return -(-self.size // (self.stripes * self.world))

    def length(self, rank: int) -> int:
        """Return the size of a process's piece of a stripe: `chunk`, less at the end of the stripe, and 0 behind it."""
        return max(0, min(self.chunk, self.size // self.stripes - rank * self.chunk))


def take_piece(t: Tensor, cut: Cut, dim: int) -> Tensor:
    """Return this process's piece of a whole tensor, cut along `dim`; with several stripes its parts of all stripes,
    joined.

    It is a view with one stripe. Autograd records a plain slice: `cut_tensor` has the right gradient.
    """
    striped = t.movedim(dim, 0).unflatten(0, (cut.stripes, -1))
    piece = striped.narrow(1, min(cut.rank * cut.chunk, striped.shape[1]), cut.length(cut.rank))
    return piece.flatten(0, 1).movedim(0, dim)


def gather_whole(piece: Tensor, cut: Cut, dim: int) -> Tensor:
    """Return the whole tensor, contiguous, from the pieces that the processes of the group pass.

    All processes have to call it. Shorter pieces are padded for the exchange and cut afterwards; stripes are put back
    in order. It records no gradient: `join_pieces` does.
    """
    stripes = piece.movedim(dim, 0).unflatten(0, (cut.stripes, -1)).movedim(1, 0)  # (length, stripes, …)
    missing = cut.chunk - len(stripes)
    padded = nn.functional.pad(stripes, (0, 0) * (stripes.dim() - 1) + (0, missing)) if missing else stripes
    padded = padded.contiguous()
    gathered = [torch.empty_like(padded) for _ in range(cut.world)]
    dist.all_gather(gathered, padded, group=cut.group)
    whole = torch.cat([t[: cut.length(rank)] for rank, t in enumerate(gathered)])  # (size / stripes, stripes, …)
    return whole.movedim(0, 1).flatten(0, 1).movedim(0, dim).contiguous()


def sum_over_group(t: Tensor, cut: Cut) -> Tensor:
    """Return the sum of a tensor over the processes of the group, in new memory. All processes have to call it."""
    t = t.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(t, group=cut.group)
    return t


class _LinearMap(Function):
    """A linear map of a tensor over the processes of a group, and its adjoint for the gradient."""

    @staticmethod
    def forward(
        ctx: Context, t: Tensor, act: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return `act(t)`. Keeps `adjoint` for the backward pass, and no tensor."""
        ctx.adjoint = adjoint
        return act(t)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> object:
        """Return the adjoint of the gradient, and None for the two functions."""
        return ctx.adjoint(g), None, None


def cut_tensor(t: Tensor, cut: Cut | None, dim: int = -1) -> Tensor:
    """Return this process's piece of a whole tensor, cut along `dim`, contiguous; the tensor itself if `cut` is None.

    The backward pass gathers the gradients of all pieces, so that all processes have to run it.
    """
    if cut is None:
        return t
    return _LinearMap.apply(t, lambda t: take_piece(t, cut, dim).contiguous(), lambda g: gather_whole(g, cut, dim))


def join_pieces(t: Tensor, cut: Cut | None, dim: int = -1) -> Tensor:
    """Return the whole tensor from the pieces that the processes pass, joined along `dim`; the tensor itself if `cut`
    is None.

    Each process gets the gradient of its piece, without another message. All processes have to call it.
    """
    if cut is None:
        return t
    return _LinearMap.apply(t, lambda t: gather_whole(t, cut, dim), lambda g: take_piece(g, cut, dim).contiguous())


def sum_partial_results(t: Tensor, cut: Cut) -> Tensor:
    """Return the sum of the processes' partial results, such as products with pieces; the gradient passes unchanged.

    All processes have to call it.
    """
    return _LinearMap.apply(t, lambda t: sum_over_group(t, cut), lambda g: g)


def sum_gradient(t: Tensor, cut: Cut) -> Tensor:
    """Return a view of a whole tensor, for a product with a piece.

    The backward pass sums its gradient over all processes, so that all have to run it.
    """
    return _LinearMap.apply(t, lambda t: t.view_as(t), lambda g: sum_over_group(g, cut))
