# SPDX-License-Identifier: Apache-2.0
"""Unloading: the model as it was before its adapters, but for what is merged into it."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

import torch
from torch import nn

from graft.core.carrier import carrier_of
from graft.core.errors import warn
from graft.inject.survey import nest_of
from graft.storage import innermost, release


def unload(model: nn.Module, frozen: Set[str] | None) -> None:
    """Take the adapter layers and wrappers out of a model, and let its parameters train but for `frozen` ones.

    Args:
        frozen: names of parameters; None: leave all as they are.
    """
    survey_places(model, restore)
    release(model.modules())
    if "peft_config" in model.__dict__:
        del model.peft_config
    retie(model)
    if frozen is not None:
        for name, p in model.named_parameters(remove_duplicate=False):
            if p.is_floating_point():
                p.requires_grad_(name not in frozen)


def restore(parent: nn.Module, name: str, child: nn.Module) -> None:
    """Put what an adapter layer or wrapper holds in its place."""
    carrier = carrier_of(child)
    if carrier is not None:
        parent._modules[name] = innermost(child) if nest_of(child) else carrier.kept


def survey_places(model: nn.Module, act: Any) -> None:
    """Call `act(parent, name, child)` once for every module that is not inside a layer or wrapper.

    Modules inside one whose parameters are adapted are not inside a layer.
    """
    seen: set[int] = set()

    def visit(module: nn.Module) -> None:
        for name, child in list(module._modules.items()):
            if child is None:
                continue
            act(module, name, child)
            if nest_of(child):
                child = innermost(child)
            if id(child) in seen or carrier_of(child) is not None:
                continue
            seen.add(id(child))
            visit(child)

    visit(model)


def declared_tied(model: nn.Module) -> Iterator[Any]:
    """Yield the modules whose weights a transformers model says are tied to others."""
    for part in model.modules():
        for key in getattr(part, "_tied_weights_keys", None) or ():
            name, _, parameter = key.rpartition(".")
            try:
                module = part.get_submodule(name)
            except AttributeError:  # a pattern, or a part that this model lacks
                continue
            if parameter == "weight" and module._parameters.get("weight") is not None:
                yield module


def retie(model: Any) -> None:
    """Tie the embeddings of a tied model again after merging, or say in its config that they now differ."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(model, "get_output_embeddings"):
        return
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    for module in declared_tied(model):  # those of an encoder and a decoder
        own = module._parameters["weight"]
        if inputs is not None and own is not inputs.weight and not own.is_meta and torch.equal(own, inputs.weight):
            module.weight = inputs.weight
    if outputs is None or inputs is None or inputs.weight is outputs.weight or inputs.weight.is_meta:
        return
    if torch.equal(inputs.weight, outputs.weight):
        outputs.weight = inputs.weight
        return
    warn("Setting `config.tie_word_embeddings` to False: merging gave the tied embeddings different weights.")
    config.tie_word_embeddings = False
