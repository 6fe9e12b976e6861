# SPDX-License-Identifier: Apache-2.0
"""The network beside the model: a small copy of the base model's architecture, or one that is loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from inspect import signature
from typing import Any

from torch import nn

from graft.core.errors import ConfigError
from graft.methods.shadow.config import MIRROR, SIZES, ShadowConfig
from graft.methods.shadow.loading import network_from
from graft.storage.offload import standalone, without_hooks

LISTS = ("layers", "h", "blocks", "single_transformer_blocks", "transformer_blocks")  # names of stacks of blocks
HEADS = ("score", "classifier")
EMBEDDINGS = "embed_tokens"  # where networks share word embeddings, PEFT's lack their own only if these are called so


def containers_of(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield (path, module) of the model, and of the backbones within it, the outermost first."""
    path = ""
    while model is not None:
        yield path, model
        inner = dict.fromkeys(
            ("model", "transformer", "base_model", "decoder", getattr(model, "base_model_prefix", ""))
        )
        name = next((n for n in (*inner, "language_model") if n and isinstance(model._modules.get(n), nn.Module)), "")
        path, model = f"{path}{name}.", model._modules.get(name)


def stack_of(model: nn.Module) -> tuple[Any, str, int] | None:
    """Return the module that holds the stack of blocks, the path of that stack, and how many there are."""
    for path, container in containers_of(model):
        for name in LISTS:
            stack = container._modules.get(name)
            if isinstance(stack, nn.ModuleList) and len(stack):
                return container, f"{path}{name}", len(stack)
    return None


def blocks_of(model: nn.Module) -> list[str]:
    """Return the paths of all blocks.

    Raises:
        AttributeError: the model has no stack of blocks where transformers' models have theirs.
    """
    found = stack_of(model)
    if found is not None:
        return [f"{found[1]}.{i}" for i in range(found[2])]
    raise AttributeError(
        f"SHADOW finds no stack of blocks in a {type(model).__name__}: name the blocks in target_modules."
    )


def text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def hidden_size(model: nn.Module) -> int:
    """Return the width of what goes from block to block."""
    size = getattr(text_config(model), "hidden_size", None)
    if size is None:
        raise ConfigError(f"SHADOW needs a model whose config tells its hidden_size; {type(model).__name__} has none.")
    return int(size)


def backbone_of(model: Any) -> Any:
    """Return the part of a model that makes hidden states of its input: what holds the stack of blocks."""
    found = stack_of(model)
    return model if found is None else found[0]


def beside(model: Any, cfg: ShadowConfig) -> dict[str, nn.Module]:
    """Make the modules that stand beside the model: the network, its projection, and the head of its own loss."""
    width = hidden_size(model)
    mirrors = cfg.shadow_model == MIRROR
    backbone, projection = (mirror(model, cfg), None) if mirrors else network_from(cfg.shadow_model, width)
    made: dict[str, nn.Module] = {"shadow_backbone": backbone}
    own = hidden_size(backbone)
    if projection is None:
        projection = nn.Identity() if own == width else nn.Linear(own, width, bias=False)
    made["shadow_projection"] = projection
    if cfg.task_type == "SEQ_CLS":
        head = standalone(next(getattr(model, n) for n in HEADS if hasattr(model, n)))
        made["shadow_head"] = without_hooks(head)  # it stands where the network does
    for module in made.values():
        module.train(model.training)
    return made


def mirror(model: Any, cfg: ShadowConfig) -> Any:
    """Return a network of the class of the base model's backbone, with new values."""
    base = backbone_of(model)
    config = copy.deepcopy(base.config)
    sizes = {size: getattr(cfg, f"shadow_{size}") for size in SIZES}
    sizes["num_hidden_layers"] = sizes["num_hidden_layers"] or 1
    for name, value in sizes.items():
        if value is not None:
            setattr(config, name, value)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    network = type(base)(config)
    takes_embeddings = "inputs_embeds" in signature(network.forward).parameters
    shares = cfg.share_embeddings and takes_embeddings and config.hidden_size == base.config.hidden_size
    if shares:
        network.needs_embeddings = True
        if EMBEDDINGS in network._modules:
            network._modules[EMBEDDINGS] = None
    return network


def last_loss(tuner: Any) -> Any:
    """The shadow network's own loss in the last call with labels, detached; None if there was none."""
    return next((tuner.states[name] for name in tuner.active_adapters if name in tuner.states), None)
