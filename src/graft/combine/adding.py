# SPDX-License-Identifier: Apache-2.0
"""Adding an adapter whose values are made of those of others."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graft.combine import union
from graft.combine.forms import Tensors
from graft.core.containers import Slot
from graft.core.errors import ConfigError, NoMatchingPeftModuleError, PeftWarning, UnsupportedLayerError, warn
from graft.core.folding import wide
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
    """The values of a new adapter: of each layer by path, and of token rows, from those of the others."""

    names = ()  # of no file

    def __init__(self, values: dict[str, Tensors], rows: union.Rows):
        self.values, self.rows = values, rows

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
            if wrapper.takes_rows:
                layer, others = wrapper.token_adapter, self.rows[key]
                if name in wrapper.tied and any(m.name not in wrapper.tied for m, _ in others):
                    raise ConfigError(
                        f"'{key}' shares its weight with the embedding, and its rows are its own in some of the "
                        f"adapters {[m.name for m, _ in others]}: adapter '{name}', which trains the same tokens in "
                        "both, cannot hold their sum. Combine the others."
                    )
                rows = moved(layer.methods[name], others)
                out += [(Target(layer, slot), rows) for slot in layer.slots(name) if slot.saved]
        return out


def moved(method: Any, others: list[tuple[Any, float]]) -> Tensor:
    """Return W + Σ wᵢ (rowᵢ - W) for the rows of a new adapter, which are W's yet."""
    base = wide(method.trainable_tokens_delta)
    out, left = torch.zeros_like(base), torch.ones_like(base[:, :1])
    place = {token: i for i, token in enumerate(method.token_indices)}
    for m, weight in others:
        at = [place[token] for token in m.token_indices]
        out[at] += wide(m.rows) * weight
        left[at] -= weight
    return out + base * left


class Target(NamedTuple):
    """The slot of a layer that a value goes to."""

    layer: AdapterLayer
    slot: Slot

    def assign(self, value: Tensor) -> None:
        shape, dtype = self.slot.tensor.shape, self.slot.tensor.dtype
        device = self.layer.store.where(self.layer.base_layer)[0]
        self.slot.assign(value.detach().reshape(shape).to(device=device, dtype=dtype).contiguous(), device)


def put(
    tuner: Any,
    name: str,
    cfg: Any,
    values: dict[str, Tensors],
    owner: dict[str, str],
    rows: union.Rows,
    widened: bool = True,
) -> None:
    """Inject the new adapter with its values in it: in float32 if `widened`, else in half precision on such layers."""

    def inject() -> None:
        found, heads = Combined(values, rows), union.heads(tuner, owner, cfg)
        tuner.add_adapter(name, cfg, autocast_adapter_dtype=widened, values=found, heads=heads)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user saw them when the adapters came
        try:
            inject()
        except (OtherLayers, NoMatchingPeftModuleError, UnsupportedLayerError):  # exclusions or layer ranges differ
            sites = {key: tuner.layers[key].site for key in values}
            union.name_exactly(cfg, values, [key for key, site in sites.items() if site.path != key])
            inject()
