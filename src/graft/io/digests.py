# SPDX-License-Identifier: Apache-2.0
"""Digests of all tensors of a base model, for `save_pretrained(fingerprint="full")`: they see every changed bit."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn

from graft.inject.survey import survey
from graft.io.base import get_base_model_state_dict
from graft.storage.parallel import is_sharded


def digests(base: nn.Module, names: Container[str] | None = None, without: Container[str] = ()) -> dict[str, str]:
    """Return "dtype:digest" of each tensor of the base model by its original name.

    Reads all of them, at about the speed of the disk they came from. Leaves out what is sharded or on the meta device,
    and layers that something is merged into.

    Args:
        names: those to look at; all if None.
        without: those to leave out.
    """
    merged = {layer.site.path for layer in survey(base).layers.values() if layer.merged_adapters}
    return {
        name: digest(t)
        for name, t in get_base_model_state_dict(base).items()
        if (names is None or name in names) and name not in without and not (t.is_meta or is_sharded(t))
        if name.rpartition(".")[0] not in merged
    }


def digest(t: Tensor) -> str:
    data = t.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{str(t.dtype).removeprefix('torch.')}:{hashlib.sha256(data.numpy()).hexdigest()[:16]}"  # type: ignore[arg-type]  # an array is a buffer


def changed(stored: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Name the tensors that differ. Those in another dtype cannot be told apart in this way."""
    pairs = [(name, stored[name], now[name]) for name in stored if name in now]
    return [name for name, a, b in pairs if a != b and a.partition(":")[0] == b.partition(":")[0]]
