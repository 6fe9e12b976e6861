# SPDX-License-Identifier: Apache-2.0
"""Layer replication: a deeper model from ranges of a model's layers, which share weights but not adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain

from torch import nn

from graft.core.carrier import layer_in
from graft.core.errors import ConfigError, PeftWarning, warn

MOST_COPIES = 32
LISTS = ("layers", "layer", "h")  # names of the list of layers in transformers


def replicate(model: nn.Module, ranges: list[tuple[int, int]]) -> Callable[[], None]:
    """Replace the model's list of layers by the layers of these (start, end) ranges, and return a function that undoes
    it.

    A layer that appears again is a copy of the modules on the same parameters and buffers. Sets `num_hidden_layers` in
    the config, if the config has it, each module's `layer_idx`, and the mark `_graft_replicated` on the model. Warns if
    the model has adapters, which see another base then. If the same ranges were replicated before, changes nothing: the
    returned function does nothing then.

    Raises:
        ConfigError: there is no such list; a range is empty or outside it; over 32 times as many layers; other ranges
            were replicated before.
    """
    done = model.__dict__.get("_graft_replicated")
    if done is not None:
        if done != [tuple(r) for r in ranges]:
            raise ConfigError(
                f"layer_replication={ranges} cannot follow {done}. Load the adapters into separate models."
            )
        return lambda: None
    owner, name, layers = _layers(model)
    adapters = sorted({adapter for layer in filter(None, map(layer_in, model.modules())) for adapter in layer.methods})
    if not all(0 <= start < end <= len(layers) for start, end in ranges):
        raise ConfigError(f"layer_replication={ranges} names layers outside the model's {len(layers)}. Choose others.")
    depth_wanted = sum(end - start for start, end in ranges)
    if depth_wanted > MOST_COPIES * len(layers):
        raise ConfigError(
            f"layer_replication asks for {depth_wanted:,} layers, of a model that has {len(layers)}: at most "
            f"{MOST_COPIES} times as many can be made."
        )
    if adapters:
        warn(
            f"layer_replication={ranges} makes the base of adapters {adapters} another one, too: their outputs change, "
            "and their files do not say so. Load adapters into separate models.",
            PeftWarning,
        )
    new, used = nn.ModuleList(), set()
    for index in chain.from_iterable(range(start, end) for start, end in ranges):
        layer = layers[index]
        if index in used:  # a copy of the modules, on the same parameters and buffers
            shared = {id(t): t for t in (*layer.parameters(), *layer.buffers())}
            layer = copy.deepcopy(layer, shared)
        used.add(index)
        new.append(layer)
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)

    def put(stack: nn.ModuleList, depth: int | None) -> None:
        """Make `stack` the model's list of layers, set the config's `num_hidden_layers` unless `depth` is None, and set
        `layer_idx` of each module that has one to its layer's number.
        """
        owner._modules[name] = stack
        if depth is not None:
            model.config.num_hidden_layers = depth
        for i, layer in enumerate(stack):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.__dict__["layer_idx"] = i

    def undo() -> None:
        """Put the former list of layers and depth back, and remove the mark `_graft_replicated` from the model."""
        put(layers, depth)
        del model._graft_replicated

    put(new, None if depth is None else len(new))
    model._graft_replicated = [tuple(r) for r in ranges]  # type: ignore[assignment]
    return undo


def _layers(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """Return the owner, name and ModuleList of the first list called "layers", "layer" or "h" that is in no other list:
    its path has no number. Of several it is the first in the model's order, even an empty one.

    Raises:
        ConfigError: the model has none.
    """
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        outermost = not any(part.isdigit() for part in parent.split("."))
        if isinstance(module, nn.ModuleList) and name in LISTS and outermost:
            return model.get_submodule(parent), name, module
    raise ConfigError("Could not locate the layers attribute in the model: layer_replication needs a list of layers.")
