# SPDX-License-Identifier: Apache-2.0
"""Loading an adapter: with a new PeftModel, beside the adapters of one, or into one that it has."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from torch import nn

from graft.config.base import PeftConfig
from graft.config.hub import hub_keywords
from graft.config.prompt import NAMES as OF_THE_BASE
from graft.core.containers import place
from graft.core.errors import ConfigError, PeftWarning, warn
from graft.core.layer import AdapterLayer
from graft.inject.build import put
from graft.inject.parts import registry_of
from graft.inject.survey import survey
from graft.io import files
from graft.io.layouts import Layout
from graft.io.load import Values

SETTLED = {f.name for f in fields(PeftConfig)} | {  # fields that the tensors settle, or that have no effect later
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
}  # fmt: skip


def read(where: str | os.PathLike, options: dict[str, Any], config: Any = None) -> tuple[Any, files.Loaded]:
    """Return config and tensors of a saved adapter.

    Args:
        options: keyword arguments of the caller; those for the hub, `subfolder`, `check_digest` and `expert_layout`
            count.
        config: use this in place of the stored one.

    Raises:
        ConfigError: `expert_layout` is none.
    """
    source = hub_keywords(options) | {"where": os.fspath(where), "subfolder": options.get("subfolder")}
    source["check_digest"] = options.get("check_digest", True)
    if config is None:
        config, loaded = files.load_pair(**source)
    elif not isinstance(config, PeftConfig):
        raise ValueError(f"The input config must be a PeftConfig, got {config.__class__}")
    else:
        loaded = files.load_weights(**source)
        if loaded.noted is None or loaded.noted.config is None:  # graft did not write it
            loaded.layout = Layout(config.peft_version)
    loaded.layout = loaded.layout.told(options.get("expert_layout"))
    return config, loaded


def prepare(config: Any, is_trainable: bool) -> None:
    """Have the config of an adapter that is about to come say whether it trains."""
    if config.is_prompt_learning and is_trainable:
        raise ValueError(
            "Cannot set a prompt learning adapter to trainable when loading pretrained adapter. The file holds the "
            "prompt, not the encoder that it was trained with."
        )
    config.inference_mode = not is_trainable


def widen(layers: Iterable[AdapterLayer], adapter: str) -> None:
    """Have the half-precision tensors of an adapter in float32, where its method trains so."""
    for layer in layers:
        for key in layer.adapter_layer_names:
            container = getattr(layer, key)
            if adapter in container and key not in layer.methods[adapter].keeps_base_dtype:
                place(container, adapter, None, None, upcast=True)


def fill(model: Any, values: Values, is_trainable: bool, upcast: bool = False) -> None:
    """Put a checkpoint's values into an adapter that the model has, which keeps its config.

    Args:
        upcast: have its half-precision tensors in float32 from now on, where the method trains so.

    Raises:
        ConfigError: the adapter is of another method, or cannot train beside those that do.
    """
    adapter, config, registry = values.adapter, values.config, registry_of(model)
    own = registry.peft_config[adapter]
    if config.peft_type != own.peft_type:
        raise ConfigError(
            f"Adapter '{adapter}' is {own.peft_type}, but the checkpoint holds {config.peft_type}: load it under "
            "another name into another model."
        )
    if is_trainable:
        registry.check_trainable(adapter)
    warn_kept(adapter, values.path, own, config)
    parts = registry.parts_of(adapter)
    prompt: Any = parts.prompt or nn.Module()
    before = len([*prompt.modules()])
    found = values.of(parts, adapter)
    whole = adapter in registry.merged_adapters or getattr(own, "bias", "none") != "none"
    registry.close(None if whole else (adapter,))
    if upcast:
        widen(parts.layers.values(), adapter)
    put(parts, adapter, found)
    registry.states.pop(adapter, None)  # which belongs to the values from before
    if is_trainable and len([*prompt.modules()]) < before:
        warn(
            f"Adapter '{adapter}' was a prompt computed by a network. The file holds the prompt and not the network, "
            "so that training goes on with the prompt itself: an optimizer, or an optimizer's state, from before does "
            "not fit it.",
            PeftWarning,
        )
    for name in config.results:
        setattr(own, name, getattr(config, name))


def warn_kept(adapter: str, path: str, here: Any, there: Any) -> None:
    """Warn where a file's config differs from that of an adapter which takes only the values from the file."""
    ours, theirs = here.saved_dict(), there.saved_dict()
    left = SETTLED | set(here.results) | (set(ours) - set(theirs))  # these come from the file, or are a client's
    if here.is_prompt_learning:
        left |= {n for n in OF_THE_BASE if theirs[n] is None}  # sizes that the base model gives: CPT's files have none
    names = [n for n in ours if n not in left and "init" not in n and (ours[n] or None) != (theirs[n] or None)]
    if names:
        differ = ", ".join(f"{n} ({ours[n]!r}, in the file {theirs[n]!r})" for n in names)
        warn(
            f"Adapter '{adapter}' gets the values of {path} and keeps its own config, which differs: {differ}. To take "
            "that over as well, delete_adapter() it before loading, or use hotswap_adapter() (LoRA).",
            PeftWarning,
        )


def let_train(model: Any, adapter: str, is_trainable: bool, new: bool = True) -> None:
    """Let an adapter that has been loaded train or not, and set the model to eval mode if it does not."""
    registry = registry_of(model)
    if new or is_trainable:  # whether it is active or not, so that an optimizer made next has it
        registry.peft_config[adapter].inference_mode = not is_trainable
        registry.set_requires_grad(adapter, is_trainable)
    if not is_trainable and model.training:  # else the adapter has the base's mode already
        if new and any(p.requires_grad for p in model.parameters()):
            warn(
                f"Adapter '{adapter}' was loaded for inference (is_trainable=False), which set the model to eval mode "
                "while other parameters train: call model.train() before training goes on.",
                PeftWarning,
            )
        model.eval()


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Widen an adapter's half-precision tensors to float32, if `autocast_adapter_dtype`."""
    if not autocast_adapter_dtype:
        return
    layers = [layer for layer in survey(model).layers.values() if adapter_name in layer.methods]
    if layers:
        with layers[0].call.gate.change(f"cast_adapter_dtype({adapter_name!r})", (adapter_name,)):
            widen(layers, adapter_name)
