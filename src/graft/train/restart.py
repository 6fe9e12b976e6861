# SPDX-License-Identifier: Apache-2.0
"""ReLoRA: High-Rank Training Through Low-Rank Updates, arXiv 2307.05695: merge for good, and begin again."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graft import AdapterLayer, ConfigError, LoraConfig, UnsupportedLayerError, method_of
from graft.inject.parts import get_registry, unwrap_model
from graft.storage.parallel import layout_of
from graft.train.optimizer_states import is_moment

if TYPE_CHECKING:
    from graft import Method


@torch.no_grad()
def restart(model: nn.Module, optimizer: Optimizer, keep: float = 0.0) -> None:
    """Add the LoRA adapter to the base weights for good, and let it begin again, as ReLoRA does between rounds.

    Waits until no call of the model runs.

    A is drawn anew and B is 0, so that the model computes the same as before. The registry notes the adapter in
    `taken_in`, and values kept for a later unmerge are dropped. Let the learning rate warm up again: the paper has 100
    of 5,000 steps. Afterwards the adapter lacks the earlier rounds: save the model itself, by
    `merge_and_unload().save_pretrained(…)`. Saving the adapter warns of that, and so does a load onto the first base.

    Args:
        optimizer: its moments of A and B go to 0.
        keep: the part of each moment that stays, its largest entries: the paper has 0.1.

    Raises:
        ConfigError: there is no LoRA adapter, or several. It is a variant, has a start that changes the base, or is
            merged. `keep` is not between 0 and 1. The optimizer lacks its parameters, or keeps moments that are no
            floats.
        UnsupportedLayerError: a base weight is packed, tied or sharded.
        InUseError: calls of the model last longer than its `change_timeout`. In any case nothing has changed.
    """
    if not 0 <= keep <= 1:
        raise ConfigError(f"`keep` must be between 0 and 1, got {keep}.")
    registry = get_registry(unwrap_model(model))
    name = find_restartable_adapter(registry)
    layers = [layer for layer in registry.layers.values() if name in layer.methods]
    optimizer_ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer in layers:
        check_restart(layer, name, optimizer, optimizer_ids)
    with registry.call.gate.change(f"restart() of adapter '{name}'"):  # a call sees W and A, B of one round
        registry.taken_in.add(name)
        for layer in layers:
            m: Method = layer.methods[name]
            with layer.store.bring_in(layer, None):
                W = layer.W0
                W = W + layer.op.canon(layer.get_delta_weight(name)).to(W.dtype)
            layer.rewrite_base(W)
            layer.drop_rollback()
            reset_factors(m)
            for p in m.pair:
                for moment in find_moments(optimizer, p):
                    prune_moment(moment, keep)


def find_restartable_adapter(registry: Any) -> str:
    """Return the name of a model's only adapter.

    Raises:
        ConfigError: there are none or several. Also if it is not LoRA, has any variant but DyLoRA, has `lora_bias`, or
            its start changed the base.
    """
    names = [] if registry is None else list(registry.peft_config)
    if len(names) != 1:
        raise ConfigError(f"A restart changes the base under all adapters, and the model has {names}. Keep one.")
    cfg = registry.peft_config[names[0]]
    if not isinstance(cfg, LoraConfig) or set(cfg.variants) - {"use_dylora"} or cfg.lora_bias:
        raise ConfigError(f"Adapter '{names[0]}' is not plain LoRA, which a restart needs. Train it without restarts.")
    if method_of(cfg.peft_type).variant(cfg).changes_base(cfg):
        raise ConfigError(
            f"init_lora_weights={cfg.init_lora_weights!r} of adapter '{names[0]}' changed the base. Begin with True."
        )
    return names[0]


def check_restart(layer: AdapterLayer, name: str, optimizer: Optimizer, optimizer_ids: Collection[int]) -> None:
    """Raise an error if a layer's adapter cannot restart, that is merge into the weight for good. Nothing changes.

    The checks run in the order below; the first fault raises.

    optimizer_ids: ids of the optimizer's parameters.

    Raises:
        UnsupportedLayerError: the effect cannot be merged; the weight cannot be read, or not written, is packed, or
            tied to another module's; or the weight or a factor is sharded.
        ConfigError: an adapter is merged on the layer. Then for A, then B: the optimizer lacks a trainable factor, or
            keeps moments of it that are no floats.
    """
    base, parameter = layer.base_layer, layer.site.parameter
    m: Method = layer.methods[name]
    why = m.effect.why_unmergeable or layer.store.why_unreadable(base, parameter)
    why = why or layer.store.why_unwritable(base, parameter)
    if why is None and not layer.store.exact:
        why = "its weight is packed, and would round the update away: begin with merge_and_unload(dequantize=True)"
    if why is None and layer.site.shared:
        why = "its weight is tied to another module's"
    if why is None and (layer.site.piece is not None or any(layout_of(p) is not None for p in m.pair)):
        why = "it is spread over processes"
    if why is not None:
        raise UnsupportedLayerError(f"Layer '{layer.key}' cannot take adapter '{name}' in for good: {why}.")
    if layer.state.merged:
        raise ConfigError(f"Adapter '{name}' is merged. Call unmerge_adapter() before a restart.")
    for p in m.pair:
        if p.requires_grad and id(p) not in optimizer_ids:
            raise ConfigError(
                f"The optimizer does not hold the parameters of adapter '{name}' on layer '{layer.key}', so that its "
                "moments would stay. Pass the one that trains them."
            )
        for moment in find_moments(optimizer, p):
            if not moment.is_floating_point():
                raise ConfigError(
                    f"The optimizer holds {moment.dtype} for layer '{layer.key}'. Use one of full precision."
                )


def find_moments(optimizer: Optimizer, p: nn.Parameter) -> list[Tensor]:
    """Return the tensors with dimensions in an optimizer's state of a parameter that have as many numbers as it."""
    return [t for t in optimizer.state.get(p, {}).values() if is_moment(t, p.numel())]


def reset_factors(m: Method) -> None:
    """Overwrite A and B in place by the values of a new adapter: A uniform within ± 1 / √in and B zero; for an
    embedding A zero and B standard normal.

    Values are drawn on the CPU, in the default dtype. Gradients are not switched off here; that is left to the caller.
    """
    (A, B), ids = m.pair, m.site.op.takes_ids
    drawn, zeros = (B, A) if ids else (A, B)
    values = torch.empty(drawn.shape, device="cpu")
    bound = 1 / math.sqrt(drawn[0].numel())
    drawn.copy_(values.normal_() if ids else values.uniform_(-bound, bound))
    zeros.zero_()


def prune_moment(moment: Tensor, keep: float) -> None:
    """Set all but the entries of a moment with the largest absolute values to 0, in place.

    `keep`: the part of the entries that stays, rounded to a number.
    """
    n = round(keep * moment.numel())
    flat = moment.flatten()
    places = flat.abs().topk(n)[1]
    moment.copy_(torch.zeros_like(flat).index_put((places,), flat[places]).view_as(moment))
