# SPDX-License-Identifier: Apache-2.0
"""convert_to_lora and save_as_lora: an adapter of any method with a ΔW as plain LoRA. truncate_lora: fewer ranks."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping

from torch import Tensor, nn

from graft.combine.convert import convert_layers
from graft.config.base import PeftConfig
from graft.config.fields import to_int
from graft.core.errors import ConfigError, ConfigTypeError
from graft.inject.parts import AdapterCarriers, ParameterLayerPaths, find_carriers, run_as_call, unwrap_model
from graft.io import files, save
from graft.io.entries import list_entries
from graft.io.fingerprint import list_base_weights, make_fingerprint
from graft.methods.lora.config import LoraConfig
from graft.storage.parallel import strip_inner_wrappers


@run_as_call
def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, object] | None = None,
    at: Mapping[str, object] | None = None,
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Return the LoraConfig and the tensors of a LoRA adapter with the update of another adapter.

    The model does not change.

    An update that is a product of that rank is taken as it is. For any other update, an SVD gives the closest product;
    for an update of full rank (OFT, BOFT) a warning says how much a low rank leaves out. Modules that the adapter
    trains whole are copied. Put the result into a fresh base model by

        config, tensors = graft.convert_to_lora(model, rank=16)
        model = graft.get_peft_model(base, config)
        graft.set_peft_model_state_dict(model, tensors)

    An adapter can be converted if it can be merged, except one that acts at some positions only (aLoRA) or a prompt.
    The result of a method that multiplies the weight (OFT, BOFT, HRA, IA3, RoAd) fits this base weight only.

    The update of T-LoRA and MTL-LoRA depends on an argument of the call. Pass one value of it:

        graft.convert_to_lora(model, rank=8, at={"timestep": 500})
        graft.convert_to_lora(model, rank=8, at={"task_ids": 2})

    Args:
        rank: that of every layer. A float, above 0 and up to 1: the part of ‖ΔW‖² that each layer keeps, in the lowest
            rank that has it.
        progressbar: show one over the layers.
        compile_kwargs: arguments of torch.compile, to compile the decomposition.
        at: {argument: value} that the adapter's update depends on.

    Raises:
        TypeError: the model has no adapter on layers, or this one has no ΔW on some layer.
        ValueError: a layer cannot have that rank; the adapter trains biases of the base, or is not loaded.
    """
    parts, prefix, base, config = find_adapter(model, adapter_name)
    lora_config, values = convert_layers(
        base, parts.layers, adapter_name, config, rank, progressbar, compile_kwargs, at
    )
    nests = ParameterLayerPaths(parts.layers.values())
    tensors = {
        f"{prefix}{strip_inner_wrappers(nests.path(key, parts.layers[key]))}.{container}"
        + (f".{path}" if path else ""): t
        for key, of_layer in values.items()
        for (container, path), t in of_layer.items()
    }
    for entry in list_entries(AdapterCarriers({}, parts.wrappers), adapter_name, prefix):
        tensors[entry.file] = entry.tensor.detach().clone()
    return lora_config, tensors


@run_as_call
def truncate_lora(model: nn.Module, rank: int, adapter_name: str = "default") -> tuple[PeftConfig, dict[str, Tensor]]:
    """Return config and copied tensors of the first `rank` ranks of a LoRA adapter, with its alpha.

    The model does not change.

    Other tensors are copied whole. The config is plain LoRA of that rank (`init_lora_weights` is True), without a
    `rank_pattern`.

    DyLoRA (arXiv 2210.07558) trains every rank up to its own, so each can be cut out. Where ranks are not in order,
    `convert_to_lora` gives the best product of a rank. Load the result as shown there.

    Args:
        rank: at most that of each layer.

    Raises:
        TypeError: the model has no adapter on layers, or the rank is no whole number.
        ConfigError: the adapter is neither plain LoRA nor DyLoRA, or acts on stacks or groups; or the rank is below 1
            or above a layer's.
    """
    rank = to_int(rank, "rank")
    parts, prefix, _, config = find_adapter(model, adapter_name)
    lora_config = copy.deepcopy(config)
    if not isinstance(lora_config, LoraConfig) or lora_config.lora_bias or set(lora_config.variants) - {"use_dylora"}:
        raise ConfigError(f"Adapter '{adapter_name}' is not plain LoRA or DyLoRA, so its first ranks are no adapter.")
    for key, layer in parts.layers.items():
        r = lora_config.at(key).r
        if layer.op.opaque or layer.op.count_groups(layer.base_layer) > 1:
            raise ConfigError(
                f"Layer '{key}' has several matrices: their first ranks are no adapter. Use convert_to_lora."
            )
        if not 1 <= rank <= r:
            raise ConfigError(f"The rank must be between 1 and {r}, that of layer '{key}', got {rank}.")
    lora_config.r, lora_config.rank_pattern = rank, {}
    lora_config.init_lora_weights, lora_config.use_dylora = True, False
    tensors = {}
    for entry in list_entries(parts, adapter_name, prefix):
        t = entry.tensor.detach()
        if ".lora_A." in entry.file or ".lora_embedding_A" in entry.file:
            t = t[:rank]
        elif ".lora_B." in entry.file or ".lora_embedding_B" in entry.file:
            t = t[:, :rank]
        tensors[entry.file] = t.clone()
    return lora_config, tensors


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, object] | None = None,
    at: Mapping[str, object] | None = None,
) -> None:
    """Convert an adapter as `convert_to_lora` does, and write adapter_model.safetensors and adapter_config.json into
    the folder `path`.

    The file also holds a fingerprint of the base.

    Raises:
        TypeError, ValueError: as `convert_to_lora`; nothing is written.
    """
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs, at)
    parts, _, base, _ = find_adapter(model, adapter_name)
    save.describe_base(config, base)
    files.save_adapter(os.fspath(path), tensors, config, True, make_fingerprint(list_base_weights(parts, base)))


def find_adapter(model: nn.Module, adapter: str) -> tuple[AdapterCarriers, str, nn.Module, PeftConfig]:
    """Return an adapter's carriers, the prefix of its keys in files, its base model and its config.

    Raises:
        ConfigTypeError: the model has no adapters.
        AdapterNotFoundError: it has others.
    """
    model = unwrap_model(model)
    if not getattr(model, "peft_config", None):
        raise ConfigTypeError("Could not detect any layer that supports LoRA conversion. The model has no adapters.")
    return find_carriers(model, adapter)
