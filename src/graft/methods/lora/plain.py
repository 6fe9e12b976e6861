# SPDX-License-Identifier: Apache-2.0
"""Adapters that are nothing but two matrices, so that kernels can take these past the modules that hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from graft.core.dropout import share_dropped
from graft.kernels.eager import has_no_hooks
from graft.kernels.mixed import add_groups, fits

if TYPE_CHECKING:
    from graft.core.call import Rows
    from graft.core.layer import AdapterLayer


def plain_factors(layer: AdapterLayer, name: str) -> tuple[Tensor, Tensor, float, float] | None:
    """A, B, scaling and the share that dropout takes out, of an adapter on a linear layer that computes nothing but
    W x + b + s B A dropout(x), so that its modules need not be called one by one. Otherwise None.
    """
    modules: dict[str, Any] = layer._modules
    facts = layer.__dict__
    A, B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    p = share_dropped(modules["lora_dropout"]._modules[name])
    if p is None or facts["lora_bias"][name] or not (has_no_hooks(A) and has_no_hooks(B)):
        return None
    return weight_of(A), weight_of(B), facts["scaling"][name], p


def add_plain_rows(layer: AdapterLayer, rows: Rows, x: Tensor, y: Tensor) -> Tensor | None:
    """y, in its memory, with what several adapters add to their rows; None if some are not plain, or drop inputs."""
    if rows.grouped is None:
        return None
    names, order, sizes, in_order = rows.grouped
    factors = []
    for name in names:
        found = plain_factors(layer, name) if name in layer.methods else None
        if found is None or found[3]:
            return None
        factors.append(found[:3])
    return add_groups(y, x, factors, order, sizes, in_order) if fits(y, x, factors, sizes) else None


def weight_of(linear: Any) -> Tensor:
    """Its weight; quicker than the attribute, where nothing computes it (a parametrization)."""
    weight = linear._parameters.get("weight")
    return linear.weight if weight is None else weight
