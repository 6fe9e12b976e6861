# SPDX-License-Identifier: Apache-2.0
"""Room for adapters that will come by hot-swapping, made before a model is compiled."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal

import torch
from torch import nn

from graft.core.errors import ConfigError, PeftWarning, warn
from graft.inject.parts import Parts, gate_of, unwrapped
from graft.inject.survey import survey
from graft.io.entries import entries
from graft.io.save import config_of
from graft.methods.lora import LoRA
from graft.serving.hotswap import Change, check_base, check_tied, described, grow, padded, shape_at


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make room for adapters to come, so that a model compiled afterwards need not be compiled again.

    Turn scalings into tensors and pad A and B with zeros. Outputs stay the same. Call it with the first adapter on the
    model, before you compile the model.

    Args:
        target_rank: the largest rank that will come; None leaves the ranks.
        config: a LoraConfig or a dict of them, whose ranks become `target_rank`, as the ranks in the model do.
        check_compiled: raise, warn or do nothing if the model is compiled already.

    Raises:
        ConfigError: there is no LoRA adapter, one has a larger rank, or the model is compiled. Nothing has changed.
    """
    if check_compiled not in ("error", "warn", "ignore"):
        raise ConfigError(
            f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check_compiled}' instead."
        )
    if check_compiled != "ignore" and any(
        m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules()
    ):
        if check_compiled == "error":
            raise ConfigError("Call prepare_model_for_compiled_hotswap *before* compiling the model.")
        warn(
            "prepare_model_for_compiled_hotswap was called with a model that is already compiled: it will be compiled "
            "again. Call the function before compiling the model.",
            PeftWarning,
        )
    model = unwrapped(model)
    on: dict[str, dict[str, Any]] = defaultdict(dict)  # layers by adapter
    for key, layer in survey(model).layers.items():
        for name in (n for n, m in layer.methods.items() if isinstance(m, LoRA)):
            on[name][key] = layer
    if not on:
        raise ConfigError(
            "No adapter layers found on the model, make sure to call `prepare_model_for_compiled_hotswap` after "
            "loading the first LoRA adapter and before loading the second."
        )
    patterns = {name: list(given.rank_pattern or ()) for name, given in configs_in(config).items()}
    for name, layers in on.items():
        check_base(next(iter(layers.values())).methods[name].cfg, f"'{name}'")
    with gate_of(model).change("prepare_model_for_compiled_hotswap()"), torch.inference_mode(False), torch.no_grad():
        if target_rank is not None:
            for name, layers in on.items():
                check_room(name, layers, target_rank, config_of(model, name))
            held = [entry for name, layers in on.items() for entry in entries(Parts(layers, {}), name, "")]
            held = [entry for entry in held if shape_at(entry, target_rank) != entry.tensor.shape]
            grow([(entry, padded(entry, entry.tensor, target_rank), target_rank) for entry in held])
        for name, layers in on.items():
            changes = [prepare(layer, name, target_rank) for layer in layers.values()]
            if (known := config_of(model, name)) is not None:
                model.peft_config[name] = described(known, changes)  # type: ignore[union-attr,index,operator]
    if target_rank is not None:
        for name, given in configs_in(config).items():
            given.r, given.rank_pattern = target_rank, dict.fromkeys(patterns[name], target_rank)


def configs_in(config: Any) -> dict[str, Any]:
    """Return the configs that a caller gives: one, several by name, or none."""
    return config if isinstance(config, dict) else {} if config is None else {"": config}


def check_room(adapter: str, layers: dict[str, Any], rank: int, config: Any) -> None:
    """Raise ConfigError unless this can pad an adapter's tensors to a rank."""
    for key, layer in layers.items():
        r, groups = layer.r[adapter], layer.op.groups(layer.base_layer)
        if r > rank:
            raise ConfigError(
                f"Trying to pad the adapter to the target rank {rank}, but the original rank is larger ({r}). Adapter "
                f"'{adapter}', layer '{key}'."
            )
        if rank % groups:
            raise ConfigError(
                f"Trying to pad a {layer.site.type_name} LoRA adapter with groups={groups} to target rank {rank}, but "
                f"the target rank is not divisible by {groups}. Please choose a target rank that is divisible by "
                f"{groups}. Adapter '{adapter}', layer '{key}'."
            )
        if adapter in layer.merged_adapters:
            raise ConfigError(f"Adapter '{adapter}' is merged into '{key}': call unmerge_adapter() before.")
        if r < rank:
            check_tied(adapter, config, rank)


def prepare(layer: Any, adapter: str, rank: int | None) -> Change:
    """Turn an adapter's scaling on a layer into a tensor, and note its rank."""
    r, alpha, rslora = (held[adapter] for held in (layer.r, layer.lora_alpha, layer.use_rslora))
    change = Change.of(layer, r, alpha, rslora, rank or r)
    layer.tell(adapter, r=change.rank, lora_alpha=change.alpha)
    device = layer.methods[adapter].pair[0].device
    for scalings in (layer.scaling, layer.scaling_at_start):
        scalings[adapter] = torch.as_tensor(float(scalings[adapter]), device=device)
    return change
