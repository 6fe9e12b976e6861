# SPDX-License-Identifier: Apache-2.0
"""Losses of variants, which a training loop adds to its own. LoraModel has them as methods."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graft.core.errors import AdapterNotFoundError


def kasa_loss(tuner: Any, adapter_names: str | list[str] | None = None) -> Tensor | float:
    """Return the sum of `KaSA.loss` over layers and adapters; 0.0 without any.

    Args:
        adapter_names: which ones; the active ones if None.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
    """
    return sum((m.loss() for m in adapters_of(tuner, adapter_names, "kasa_config")), 0.0)


def monteclora_loss(tuner: Any, adapter_names: str | list[str] | None = None) -> Tensor | float:
    """Return the mean of `MonteCLoRA.loss` over layers and adapters; 0.0 without any. Otherwise as `kasa_loss`."""
    found = adapters_of(tuner, adapter_names, "monteclora_config")
    return sum((m.loss() for m in found), 0.0) / max(1, len(found))


def adapters_of(tuner: Any, adapter_names: str | list[str] | None, variant: str) -> list[Any]:
    """Return the adapters of a variant, the active ones if `adapter_names` is None, on all layers."""
    names = tuner.active_adapters if adapter_names is None else adapter_names
    names = [names] if isinstance(names, str) else names
    unknown = [name for name in names if name not in tuner.peft_config]
    if unknown:
        raise AdapterNotFoundError(f"Adapter {', '.join(unknown)} not found.")
    names = [name for name in names if variant in tuner.peft_config[name].variants]
    return [layer.methods[name] for layer in tuner.layers.values() for name in names if name in layer.methods]
