# SPDX-License-Identifier: Apache-2.0
"""Adding an adapter whose values are made of those of others."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

from torch import Tensor, nn

from graft.combine import union
from graft.combine.forms import Tensors
from graft.core.containers import Slot
from graft.core.errors import NoMatchingPeftModuleError, PeftWarning, UnsupportedLayerError, warn
from graft.core.layer import AdapterLayer
from graft.methods import method_of


def warn_if_base_changed(tuner: Any, names: list[str], adapter_name: str, cfg: Any) -> None:
    """Warn unless the new adapter changes a fresh base likewise."""
    if changes_base(cfg):
        return
    changed = [n for n in dict.fromkeys(names) if changes_base(tuner.peft_config[n])]
    if changed:
        warn(
            f"The initialisation of {changed} changed the base weights: '{adapter_name}' belongs to the base model as "
            "it is now, and will not fit a fresh one.",
            PeftWarning,
        )


def changes_base(cfg: Any) -> bool:
    """Say whether the initialisation of adapters with this config changes the base weights."""
    setting = getattr(method_of(cfg.peft_type).variant(cfg), "changes_base", None)
    return setting is not None and setting(cfg) is not None


class OtherLayers(Exception):
    """A config selects other layers than those that were combined."""


class Combined:
    """The values of a new adapter: of each layer by path, and token rows of the adapter that has them."""

    names = ()  # of no file

    def __init__(self, values: dict[str, Tensors], owner: dict[str, str]):
        self.values, self.owner = values, owner

    def head(self, key: str, module: nn.Module) -> None:
        return None

    def check_room(self, numbers: float) -> None:
        """Do nothing: the config was made for the values."""

    def of(self, parts: Any, name: str) -> list[tuple[Any, Tensor]]:
        if set(parts.layers) != set(self.values):
            raise OtherLayers
        out = []
        for key, layer in parts.layers.items():
            out += [(Target(layer, slot), self.values[key][slot.container, slot.path]) for slot in layer.slots(name)]
        for key, wrapper in parts.wrappers.items():
            if "token_adapter" in wrapper._modules:
                layer = wrapper.token_adapter
                rows = layer.methods[self.owner[key]].trainable_tokens_delta
                out += [(Target(layer, slot), rows) for slot in layer.slots(name) if slot.saved]
        return out


class Target(NamedTuple):
    """The slot of a layer that a value goes to."""

    layer: AdapterLayer
    slot: Slot

    def assign(self, value: Tensor) -> None:
        shape, dtype = self.slot.tensor.shape, self.slot.tensor.dtype
        device = self.layer.store.where(self.layer.base_layer)[0]
        self.slot.assign(value.detach().reshape(shape).to(device=device, dtype=dtype).contiguous(), device)


def put(
    tuner: Any, name: str, cfg: Any, values: dict[str, Tensors], owner: dict[str, str], widened: bool = True
) -> None:
    """Inject the new adapter with its values in it: in float32 if `widened`, else in half precision on such layers."""

    def inject() -> None:
        found, heads = Combined(values, owner), union.heads(tuner, owner, cfg)
        tuner.add_adapter(name, cfg, autocast_adapter_dtype=widened, values=found, heads=heads)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user saw them when the adapters came
        try:
            inject()
        except (OtherLayers, NoMatchingPeftModuleError, UnsupportedLayerError):  # exclusions or layer ranges differ
            sites = {key: tuner.layers[key].site for key in values}
            union.name_exactly(cfg, values, [key for key, site in sites.items() if site.path != key])
            inject()
