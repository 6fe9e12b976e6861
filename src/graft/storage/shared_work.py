# SPDX-License-Identifier: Apache-2.0
"""Modules that several processes compute in pieces: the piece of this process, or why no adapter can act there."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from graft.core.ops import Op, Opaque
from graft.core.pieces import LayerPiece
from graft.storage import engine, megatron, tensor_parallel
from graft.storage.experts import ExpertBlock


def find_piece(module: nn.Module, op: Op) -> LayerPiece | None:
    """Return this process's piece of a layer's work, under transformers' tensor parallelism or else Megatron.

    A piece may have no cuts: then each process computes the whole layer. None for a layer of neither package, or one
    that no adapter can act on.
    """
    return tensor_parallel.find_parallel_piece(module, op) or megatron.find_megatron_piece(module, op)


def find_group(module: nn.Module) -> dist.ProcessGroup | None:
    """Return the group of processes that compute a module in pieces, under Megatron or tensor parallelism.

    None for another module, and for a layer of Megatron that is not cut.
    """
    if megatron.KINDS.find(type(module)) is not None:
        return None if megatron.find_cut(module) is None else megatron.find_megatron_group(module)
    return tensor_parallel.find_parallel_group(module)


def why_no_adapter(module: nn.Module, op: Op, inside: bool) -> str | None:
    """Return why a module that processes share cannot be adapted; None if no sharing prevents it.

    Rules of Megatron and Transformer Engine come first, unless the class is torch's; their reasons name the class. Then
    the rules of tensor parallelism decide. Dispatched stacks of experts that graft can run have no reason.

    inside: the adapter computes with modules inside this one.
    """
    # packages and parametrizations have classes elsewhere
    is_torch = type(module).__module__.startswith("torch.nn.modules.")
    why = None if is_torch else megatron.why_no_megatron_adapter(module) or engine.why_no_engine_adapter(module)
    if why is not None:
        return f"As a {type(module).__name__}, {why}"
    block = ExpertBlock(module)
    if isinstance(op, Opaque) and op.parameter in (block.names or ()) and block.dispatch is not None and block.can_run:
        return None
    return tensor_parallel.why_no_parallel_adapter(module, op, inside)
