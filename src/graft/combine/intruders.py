# SPDX-License-Identifier: Apache-2.0
"""Intruder dimensions, arXiv 2410.21228: singular vectors of W + ΔW that are similar to none of W's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from graft.combine import adding, rules
from graft.combine.adding import inject_combined, warn_if_base_changed
from graft.combine.forms import read_term
from graft.config.base import PeftConfig
from graft.config.fields import to_int
from graft.core.containers import UPCAST
from graft.core.errors import ConfigError
from graft.core.folding import widen
from graft.core.layer import AdapterLayer
from graft.core.method import Method
from graft.inject.parts import get_registry
from graft.methods.lora.config import LoraConfig


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: object,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], object] = print,
) -> None:
    """Add an adapter like a LoRA adapter, with its intruder dimensions scaled down, and activate it.

    Fine-tuning adds such dimensions to a weight, and they make a model forget. One is a left singular vector uᵢ of W +
    ΔW, among the first `top_k`. The magnitude of its cosine with each of W's is below `threshold_epsilon`. The new
    adapter, of the same rank, comes closest to ΔW + (λ - 1) Σ σᵢ uᵢ vᵢᵀ; layers without intruders, trained modules and
    token rows are copied.

    Warns if the adapter's start changed the base.

    Args:
        mitigation_lambda: λ, the part of an intruder that stays: 1 keeps all, 0 nothing.
        logging_sink: is called with a line of text for each layer, and one before the new adapter is activated.

    Raises:
        ConfigError: adapters of the model are not LoRA, or this one does more than add B A. Nothing has changed.
        AdapterNotFoundError: there is no adapter of the old name.
        AdapterNameError: there is one of the new name, or no adapter can have it.
    """
    registry = get_registry(peft_model)
    if registry is None or not any(isinstance(config, LoraConfig) for config in registry.peft_config.values()):
        raise ConfigError("The provided model is not using LoRA and is therefore not supported.")
    registry.check_known([old_adapter_name])
    top_k = to_int(top_k, "top_k")
    cfg = copy.deepcopy(registry.peft_config[old_adapter_name])
    parts = registry.parts_of(old_adapter_name)
    layers = parts.layers
    check_reducible(layers, old_adapter_name, cfg)
    if isinstance(cfg.init_lora_weights, str):
        cfg.init_lora_weights = True  # the base weights have been changed already
    registry.check_new(new_adapter_name, cfg)
    warn_if_base_changed(registry, [old_adapter_name], new_adapter_name, cfg)
    slots = {key: layer.slots(old_adapter_name) for key, layer in layers.items()}
    values = {key: {(slot.container, slot.path): slot.tensor for slot in items} for key, items in slots.items()}
    widened = all(slot.tensor.dtype not in UPCAST for items in slots.values() for slot in items)
    for key, layer in layers.items():
        m = layer.methods[old_adapter_name]
        items = find_intruders(layer.W0, m, top_k, threshold_epsilon)
        logging_sink(f"{parts.prefix}{key}: " + (f"Intruders: {len(items[1])}" if len(items[1]) else "No intruders"))
        if len(items[1]):
            values[key] |= m.holding(*scale_intruders(m, *items, mitigation_lambda))
    old = [old_adapter_name]
    owner, rows = adding.find_owners(registry, old), adding.find_token_rows(registry, old, [1.0], cfg)
    inject_combined(registry, new_adapter_name, cfg, values, owner, rows, widened)
    logging_sink(f"Enabling new adapter {new_adapter_name}")
    registry.set_adapter(new_adapter_name)


def check_reducible(layers: dict[str, AdapterLayer], adapter: str, cfg: PeftConfig) -> None:
    """Raise ConfigError unless the config is LoRA's, and on each layer the adapter adds only B A and its tensors can
    hold any product.

    Convolutions with several groups and stacks are refused. Without layers only the config is checked. The text names
    the first such layer.
    """
    if cfg.peft_type != "LORA":
        raise ConfigError(f"The provided model is not using LoRA for '{adapter}' and is therefore not supported.")
    for key, layer in layers.items():
        m = layer.methods[adapter]
        if (
            not (m.effect.additive and m.holds_any)
            or layer.op.count_groups(layer.base_layer) > 1
            or layer.site.is_stack
        ):
            raise ConfigError(
                f"Intruder dimensions of '{adapter}' cannot be reduced: on layer '{key}' ({type(m).__name__}, "
                f"{layer.site.type_name}) it is no plain product B A. Leave such layers out."
            )


def get_product(m: Method) -> tuple[Tensor, Tensor]:
    """Return A (r, n) and B (out, r) with ΔW = B A; the scaling is in B."""
    term = read_term(m, 1.0)
    (A,), (B,) = term.product()
    return A, B * term.scaling


def find_intruders(W: Tensor, m: Method, top_k: int, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular triples of W + ΔW that are intruders, out of the first `top_k`: U (out, k), S (k,), Vh (k,
    n).

    A triple is one if the cosine of its u with each left singular vector of W is below `epsilon` in magnitude. Costs
    two SVDs of the weight's size, in float32 at least.
    """
    W, (A, B) = widen(W).flatten(1), get_product(m)
    U, S, Vh = torch.linalg.svd(W + B @ A, full_matrices=False)
    base_vectors = torch.linalg.svd(W, full_matrices=False).U
    new = (U[:, :top_k].T @ base_vectors).abs().amax(dim=1) < epsilon
    return U[:, :top_k][:, new], S[:top_k][new], Vh[:top_k][new]


def scale_intruders(m: Method, U: Tensor, S: Tensor, Vh: Tensor, part: float) -> tuple[Tensor, Tensor]:
    """Return A and B of the adapter, without its scaling, with only the share `part` of these triples.

    The product is truncated to the adapter's rank. Both get the root of each singular value; a value of 0 gives zeros
    in A.
    """
    A, B = get_product(m)
    rank = len(A)
    A, B, S = rules.truncate_product(torch.cat([A, Vh]), torch.cat([B, U * ((part - 1) * S)], dim=1), rank)
    root = S[:rank].sqrt()  # share the size out to both, as training does
    return A * root[:, None], B / torch.where(root > 0, root, 1.0) / m.scaling
