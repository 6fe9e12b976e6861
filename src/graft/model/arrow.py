# SPDX-License-Identifier: Apache-2.0
"""create_arrow_model: a base model with saved LoRA adapters as experts, and an Arrow router over them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from graft.config.base import CONFIG_NAME
from graft.core.errors import CheckpointError, ConfigError, UnsupportedLayerError
from graft.inject.parts import registry_of
from graft.inject.survey import survey
from graft.methods.lora.config import LoraConfig
from graft.methods.lora.sub_configs import ArrowConfig
from graft.model.peft_model import PeftModel

TASK, GENERAL, ROUTER = "task_", "gks_", "arrow_router"


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """Load adapters as `task_0`, … (and `gks_0`, … with `use_gks`), and activate `arrow_router` over them.

    Args:
        task_specific_adapter_paths: of the experts: folders, or "owner/repository[/subfolder]" on the hub.
        general_adapter_paths: of adapters of general knowledge, for GenKnowSub.
        adapter_kwargs: for `from_pretrained` and `load_adapter`.

    Raises:
        ConfigError: there are no experts, or these differ in rank, shapes or layers.
        UnsupportedLayerError: they adapt other layers than linear ones.
        CheckpointError: a folder holds no adapter. In each case the model is as it was.
    """
    if not task_specific_adapter_paths:
        raise ConfigError("`task_specific_adapter_paths` should contain at least one adapter path")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ConfigError("You should provide general LoRA paths if you want to use GenKnowSub.")
    tasks = {f"{TASK}{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    if arrow_config.top_k > len(tasks):
        raise ConfigError(f"top_k={arrow_config.top_k} is more than the {len(tasks)} experts.")
    general = {f"{GENERAL}{i}": path for i, path in enumerate(general_adapter_paths or ()) if arrow_config.use_gks}
    sources = {name: source_of(path) for name, path in {**tasks, **general}.items()}
    trained, model = [p for p in base_model.parameters() if p.requires_grad], None
    try:
        for name, (where, subfolder) in sources.items():
            options = dict(adapter_kwargs) if subfolder is None else {"subfolder": subfolder, **adapter_kwargs}
            if model is None:
                model = PeftModel.from_pretrained(base_model, where, name, **options)
            else:
                model.load_adapter(where, name, **options)
        arrow_config.task_adapter_names, arrow_config.gks_adapter_names = list(tasks), list(general)
        targets, r = agreed(model, list(sources))
        router = LoraConfig(arrow_config=arrow_config, target_modules=targets, r=r)
        autocast = adapter_kwargs.get("autocast_adapter_dtype", True)
        model.add_adapter(ROUTER, router, autocast_adapter_dtype=autocast)  # type: ignore[union-attr]
    except BaseException:
        if model is not None:
            registry_of(model).unload()
        for p in trained:
            p.requires_grad = True
        raise
    model.set_adapter(ROUTER)  # type: ignore[union-attr]
    return model  # type: ignore[return-value]


def source_of(path: str) -> tuple[str, str | None]:
    """Return the folder, or the hub repository and its sub-folder."""
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, CONFIG_NAME)):
            raise CheckpointError(f"Local adapter path '{path}' does not contain '{CONFIG_NAME}'.")
        return path, None
    parts = path.strip("/").split("/")
    if os.path.isabs(path) or len(parts) < 3:
        return path, None
    return "/".join(parts[:2]), "/".join(parts[2:])


def agreed(model: Any, names: list[str]) -> tuple[list[str], int]:
    """Return the targets and the rank of the router: those of the adapters, which must agree."""
    layers = registry_of(model).layers
    adapted = {name: {key: layer for key, layer in layers.items() if name in layer.methods} for name in names}
    other = [f"  - adapter '{n}' on module '{k}' of type {a.site.type_name}" for n, found in adapted.items()
             for k, a in found.items() if not a.site.op.linear]  # fmt: skip
    if other:
        raise UnsupportedLayerError("LoRA adapters must only target Linear-like layers. Found:\n" + "\n".join(other))
    first = names[0]
    for name in names[1:]:
        if adapted[name].keys() != adapted[first].keys():
            raise ConfigError(
                f"[{name}] target_modules mismatch:\n  this adapter -> {sorted(adapted[name])}\n"
                f"  reference   -> {sorted(adapted[first])}"
            )
        for key, layer in adapted[name].items():
            ranks = [layer.methods[n].pair[0].shape[0] for n in (name, first)]
            if ranks[0] != ranks[1]:
                raise ConfigError(f"[{name}] rank mismatch: {ranks[0]} != {ranks[1]} (layer '{key}')")
    leaves = {key.rpartition(".")[2] for key in layers}
    also = any(key.rpartition(".")[2] in leaves and key not in layers for key in survey(model.get_base_model()).modules)
    return sorted(layers if also else leaves), max(layer.methods[first].pair[0].shape[0] for layer in layers.values())
