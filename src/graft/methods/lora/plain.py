# SPDX-License-Identifier: Apache-2.0
"""Adapters that are nothing but two matrices, so that kernels can take these past the modules that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from graft.kernels.low_rank import eager, unhooked
from graft.kernels.worth import share_dropped

if TYPE_CHECKING:
    from graft.core.layer import AdapterLayer


def plain_factors(layer: AdapterLayer, names: Sequence[str]) -> list[tuple[Tensor, Tensor, float, float]] | None:
    """A, B, scaling and the share that dropout takes out, of adapters on a linear layer that computes nothing but
    W x + b + s B A dropout(x), so that its modules need not be called one by one. Otherwise None.
    """
    modules: dict[str, Any] = layer._modules
    facts = layer.__dict__
    if not (eager() and unhooked(modules["base_layer"])):
        return None
    As, Bs, dropouts = modules["lora_A"]._modules, modules["lora_B"]._modules, modules["lora_dropout"]._modules
    scaling, biased = facts["scaling"], facts["lora_bias"]
    found = []
    for name in names:
        A, B, p = As[name], Bs[name], share_dropped(dropouts[name])
        if p is None or p == 1 or biased[name] or not (unhooked(A) and unhooked(B)):
            return None
        found.append((weight_of(A), weight_of(B), scaling[name], p))
    return found


def weight_of(linear: Any) -> Tensor:
    """Its weight; quicker than the attribute, where nothing computes it (a parametrization)."""
    weight = linear._parameters.get("weight")
    return linear.weight if weight is None else weight
