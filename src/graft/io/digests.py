# SPDX-License-Identifier: Apache-2.0
"""Digests of all tensors of a base model, for `save_pretrained(fingerprint="full")`: they see every changed bit."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn

from graft.inject.survey import survey
from graft.io.base import get_base_model_state_dict
from graft.storage.dense import plain_tensors
from graft.storage.parallel import is_sharded


def digests(base: nn.Module, names: Container[str] | None = None, without: Container[str] = ()) -> dict[str, str]:
    """Return "dtype:digest" of each tensor of the base model by its original name.

    Reads all of them, at about the speed of the disk they came from. Leaves out what is sharded, on the meta device or
    of a type that does not show its bytes, and layers that something is merged into.

    Args:
        names: those to look at; all if None.
        without: those to leave out.
    """
    merged = {layer.site.path for layer in survey(base).layers.values() if layer.merged_adapters}
    found = {
        name: digest(t)
        for name, t in get_base_model_state_dict(base).items()
        if (names is None or name in names) and name not in without and not (t.is_meta or is_sharded(t))
        if name.rpartition(".")[0] not in merged
    }
    return {name: text for name, text in found.items() if text is not None}


def digest(t: Tensor) -> str | None:
    """Return dtype and digest of a tensor, or of all tensors that it is made of; None if nobody can tell its bytes."""
    parts = plain_tensors(t)
    if parts is None:
        return None
    made = hashlib.sha256()
    for part in parts:
        made.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
    return f"{str(t.dtype).removeprefix('torch.')}:{made.hexdigest()[:16]}"


def changed(stored: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Name the tensors that differ. Those in another dtype cannot be told apart in this way."""
    pairs = [(name, stored[name], now[name]) for name in stored if name in now]
    return [name for name, a, b in pairs if a != b and a.partition(":")[0] == b.partition(":")[0]]
