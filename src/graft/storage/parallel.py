# SPDX-License-Identifier: Apache-2.0
"""Tensors of which each process holds a part: DTensor, as FSDP2 and tensor parallelism make them, and others."""

from __future__ import annotations

from torch import Tensor


def is_sharded(t: Tensor) -> bool:
    return type(t).__name__ == "DTensor"


def is_whole(t: Tensor) -> bool:
    """Say whether a tensor is what it seems: not emptied by ZeRO-3, nor a slice of a flat parameter of FSDP1."""
    return bool(t.numel() or not t.is_floating_point()) and "_fsdp_flattened" not in t.__dict__


def spread_as(like: Tensor, value: Tensor) -> Tensor:
    """Return `value`, which every process holds whole, sharded as `like` is. Every process must call this."""
    if not is_sharded(like) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor  # rarely needed

    return distribute_tensor(value.detach(), like.device_mesh, like.placements)  # type: ignore[attr-defined]
