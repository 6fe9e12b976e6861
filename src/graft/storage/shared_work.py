# SPDX-License-Identifier: Apache-2.0
"""Modules whose work several processes share: the piece that this one does, or why no adapter can act there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from graft.core.ops import Op
from graft.core.pieces import Piece
from graft.storage import engine, megatron, tensor_parallel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def piece_of(module: nn.Module, op: Op) -> Piece | None:
    """Return the piece of a layer's work that this process does, where it does not do all."""
    return tensor_parallel.piece_of(module, op) or megatron.piece_in(module, op)


def group_of(module: nn.Module) -> ProcessGroup | None:
    """Return the group of processes that compute a module in pieces; None for another module."""
    if megatron.KINDS.find(type(module)) is not None:
        return None if megatron.cut_of(module) is None else megatron.group_of(module)
    return tensor_parallel.group_of(module)


def refusal(module: nn.Module, op: Op, inside: bool) -> str | None:
    """Return why a module that processes share cannot be adapted; None if nothing of the kind keeps it from that.

    inside: the adapter knows what happens inside the module.
    """
    own = type(module).__module__.startswith("torch.nn.modules.")  # no package's, nor a parametrized one of a package's
    why = None if own else megatron.why_not(module) or engine.why_not(module)
    return tensor_parallel.refusal(module, op, inside) if why is None else f"As a {type(module).__name__}, {why}"
