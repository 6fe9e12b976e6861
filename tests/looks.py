# SPDX-License-Identifier: Apache-2.0
"""What tests look at inside a model with adapters."""

from __future__ import annotations

from typing import Any

import graft
from graft.inject.parts import get_registry

__all__ = ["get_registry", "layers", "layers_of", "merged"]


def layers(model: Any) -> dict[str, graft.AdapterLayer]:
    """All adapter layers by path."""
    return get_registry(model).layers


def layers_of(model: Any, adapter: str) -> list[graft.AdapterLayer]:
    """The layers that carry an adapter."""
    return [layer for layer in get_registry(model).layers.values() if adapter in layer.methods]


def merged(model: Any) -> list[str]:
    """The adapters that are merged into some layer."""
    return get_registry(model).merged_adapters
