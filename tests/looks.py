# SPDX-License-Identifier: Apache-2.0
"""What tests look at inside a model with adapters."""

from __future__ import annotations

from typing import Any

import graft
from graft.inject.parts import registry_of

__all__ = ["layers", "layers_of", "merged", "registry_of"]


def layers(model: Any) -> dict[str, graft.AdapterLayer]:
    """All adapter layers by path."""
    return registry_of(model).layers


def layers_of(model: Any, adapter: str) -> list[graft.AdapterLayer]:
    """The layers that carry an adapter."""
    return [layer for layer in registry_of(model).layers.values() if adapter in layer.methods]


def merged(model: Any) -> list[str]:
    """The adapters that are merged into some layer."""
    return registry_of(model).merged_adapters
