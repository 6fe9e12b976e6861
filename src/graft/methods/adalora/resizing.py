# SPDX-License-Identifier: Apache-2.0
"""Taking pruned singular triples out of memory, where training has only set their singular values to 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.errors import ConfigError
from graft.storage.parallel import layout_of


def resize_modules_by_rank_pattern(
    tuner: Any, rank_pattern: dict[str, Sequence[bool] | Tensor], adapter_name: str
) -> None:
    """Keep only the singular triples that masks name: their parameters are new ones, so make the optimizer afterwards.

    Args:
        rank_pattern: as the config's, {"path.lora_E" or "path.lora_E.adapter": a mask of the layer's triples}.

    Raises:
        AdapterNotFoundError: there is no such adapter.
        ConfigError: a layer does not carry it, or has another number of triples. Nothing has changed.
        ValueError: it is merged.
        NotImplementedError: its tensors are spread over processes.
    """
    tuner.check_known([adapter_name])
    kept: dict[str, Tensor] = {}
    for name, mask in rank_pattern.items():
        key = name.removesuffix(f".{adapter_name}").removesuffix(".lora_E")
        layer = tuner.layers.get(key)
        if layer is None or adapter_name not in layer.methods:
            raise ConfigError(f"rank_pattern names '{key}', where AdaLoRA adapter '{adapter_name}' has no layer.")
        E = layer.methods[adapter_name].lora_E
        kept[key] = torch.as_tensor(mask, dtype=torch.bool, device=E.device).flatten()
        if len(kept[key]) != len(E):
            raise ConfigError(
                f"rank_pattern has {len(kept[key])} entries for '{key}', where AdaLoRA adapter '{adapter_name}' has "
                f"{len(E)} singular triples: give a mask of these."
            )
        if adapter_name in layer.merged_adapters:
            raise ValueError(f"AdaLoRA adapter '{adapter_name}' is merged: unmerge_adapter() it before it is resized.")
        if layout_of(E) is not None:
            raise NotImplementedError(
                f"AdaLoRA adapter '{adapter_name}' has tensors spread over processes: resize it before that."
            )
    for key, mask in kept.items():
        layer = tuner.layers[key]
        for name, of_columns in (("lora_E", False), ("lora_A", False), ("lora_B", True)):
            old = getattr(layer, name)[adapter_name]
            values = old.detach()[:, mask] if of_columns else old.detach()[mask]
            getattr(layer, name)[adapter_name] = nn.Parameter(values.clone(), old.requires_grad)
