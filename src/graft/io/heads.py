# SPDX-License-Identifier: Apache-2.0
"""Heads of other sizes than the base model's, as a file may hold them."""

from __future__ import annotations

from typing import Any

from torch import nn

from graft.storage import standalone


def torn_apart(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Return name and shape of a weight, and the shape of its bias, which counted the same and no longer do."""
    for name, shape in before.items():
        bias = f"{name.removesuffix('weight')}bias"
        if bias in before and before[bias][:1] == shape[:1] and after[bias][:1] != after[name][:1]:
            return name, after[name], after[bias]
    return None


def resized(module: nn.Module, shapes: dict[str, Any]) -> nn.Module:
    """Return a copy of `module` with parameters of other `shapes` (by name), uninitialised."""
    made = standalone(module)
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        owner = made.get_submodule(path)
        old = getattr(owner, leaf)
        setattr(owner, leaf, nn.Parameter(old.data.new_empty(shape)))
        for attribute in ("out_features", "num_embeddings"):
            if leaf == "weight" and hasattr(owner, attribute):
                setattr(owner, attribute, shape[0])
    return made
