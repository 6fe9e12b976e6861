# SPDX-License-Identifier: Apache-2.0
"""Tensors of which each process holds a part: DTensor, as FSDP2 and tensor parallelism make them."""

from __future__ import annotations

from torch import Tensor


def is_sharded(t: Tensor) -> bool:
    return type(t).__name__ == "DTensor"


def spread_as(like: Tensor, value: Tensor) -> Tensor:
    """`value`, which every process has whole, spread as `like` is. All processes must come by."""
    if not is_sharded(like) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor  # not needed elsewhere

    return distribute_tensor(value.detach(), like.device_mesh, like.placements)  # type: ignore[attr-defined]
