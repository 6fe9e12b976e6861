# SPDX-License-Identifier: Apache-2.0
"""Give an adapter on its layers the values of A that EVA found, and the ranks that go with them."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from graft.core.errors import CalibrationError, PeftWarning, some, warn
from graft.inject.match import minimal_names
from graft.inject.survey import survey
from graft.inject.targets import COMPRESS_FROM


def apply(registry: Any, adapter: str, values: dict[str, Tensor]) -> None:
    """Set A of each layer, with its rank, and describe that in the config."""
    with registry.call.gate.change(f"EVA's values of adapter '{adapter}'", (adapter,)):
        _apply(registry, adapter, values)


def _apply(registry: Any, adapter: str, values: dict[str, Tensor]) -> None:
    layers = {key: layer for key, layer in registry.layers.items() if adapter in layer.methods}
    check(adapter, layers, values)
    cfg = registry.peft_config[adapter]
    tree = survey(registry.model)
    kept, missing = {}, []
    for key, layer in layers.items():
        here = cfg.at(key)
        r, alpha = here.r, here.lora_alpha
        A = values.get(key)
        if A is None:
            missing.append(key)
        elif not len(A):
            take_off(registry, layer, key, adapter, tree.places[key])
            continue
        else:
            alpha *= len(A) / r if cfg.eva_config.adjust_scaling_factors else 1
            r = len(A)
        begin_anew(layer, adapter, r, alpha, A)
        kept[key] = (r, alpha)
    others = [key for key in tree.modules if key not in kept]
    cfg.target_modules = minimal_names(kept, others) if len(kept) >= COMPRESS_FROM else set(kept)
    cfg.rank_pattern = {key: r for key, (r, _) in kept.items() if r != cfg.r}
    cfg.alpha_pattern = {key: alpha for key, (_, alpha) in kept.items() if alpha != cfg.lora_alpha}
    if missing:
        warn(
            "the following layers were initialized with init_lora_weights=True because they were not found in the eva "
            f"state_dict: {some(missing)}",
            PeftWarning,
        )


def check(adapter: str, layers: dict[str, Any], values: dict[str, Tensor]) -> None:
    """Raise CalibrationError unless the values fit the layers, and one keeps a rank."""
    unknown = sorted(values.keys() - layers.keys())
    if unknown:
        raise CalibrationError(f"eva_state_dict has values for {some(unknown)}, where adapter '{adapter}' is not.")
    for key, A in values.items():
        wanted = layers[key].fan_in
        if A.dim() != 2 or A.shape[1] != wanted or not A.isfinite().all():
            raise CalibrationError(
                f"eva_state_dict['{key}'] has shape {tuple(A.shape)}, expected is (rank, {wanted}) of finite numbers."
            )
    if not any(len(A) for A in values.values()):
        raise CalibrationError(f"eva_state_dict gives no layer of adapter '{adapter}' a rank.")


def begin_anew(layer: Any, adapter: str, r: int, alpha: float, A: Tensor | None) -> None:
    """Give an adapter on one layer its values; new parameters if the rank is another, or there are no values yet."""
    method = layer.methods[adapter]
    now = method.lora_A.weight
    if A is None or r != method.cfg.r or now.is_meta:
        cfg = copy.copy(method.cfg)
        cfg.r, cfg.lora_alpha = r, alpha
        names, upcast = list(layer.methods), now.dtype != layer.store.where(layer.base_layer)[1]
        layer.drop(adapter)
        made = type(method)(layer.site, cfg, adapter)
        layer.add(made, made.build({}))
        layer.methods.update({name: layer.methods.pop(name) for name in names})  # in the order that they had
        made.init()
        layer.place(adapter, layer.where, upcast)
        layer.require_grad(adapter, adapter in layer.state.trainable)
        layer.changed()
        method = made
    if A is not None:
        method.lora_A.weight.data.copy_(A)


def take_off(registry: Any, layer: Any, key: str, adapter: str, place: tuple[nn.Module, str]) -> None:
    """Take an adapter off a layer, and the layer off its module if it has no other."""
    layer.forget(adapter)
    if not layer.methods:
        parent, name = place
        parent._modules[name] = layer.base_layer
        del registry.layers[key]
