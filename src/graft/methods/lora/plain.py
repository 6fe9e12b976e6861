# SPDX-License-Identifier: Apache-2.0
"""Adapters that are nothing but two matrices, so that kernels can take these past the modules that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from graft.core.eager import unhooked
from graft.kernels.mixed import add_groups, fits
from graft.kernels.worth import share_dropped

if TYPE_CHECKING:
    from graft.core.layer import AdapterLayer
    from graft.core.routing import Rows


def plain_factors(layer: AdapterLayer, names: Sequence[str]) -> list[tuple[Tensor, Tensor, float, float]] | None:
    """A, B, scaling and the share that dropout takes out, of adapters on a linear layer that computes nothing but
    W x + b + s B A dropout(x), so that its modules need not be called one by one. Otherwise None.
    """
    modules: dict[str, Any] = layer._modules
    facts = layer.__dict__
    As, Bs, dropouts = modules["lora_A"]._modules, modules["lora_B"]._modules, modules["lora_dropout"]._modules
    scaling, biased = facts["scaling"], facts["lora_bias"]
    found = []
    for name in names:
        A, B, p = As[name], Bs[name], share_dropped(dropouts[name])
        if p is None or biased[name] or not (unhooked(A) and unhooked(B)):
            return None
        found.append((weight_of(A), weight_of(B), scaling[name], p))
    return found


def add_plain_rows(layer: AdapterLayer, rows: Rows, x: Tensor, y: Tensor) -> Tensor | None:
    """y, in its memory, with what several adapters add to their rows; None if some are not plain, or drop inputs."""
    if rows.grouped is None:
        return None
    names, order, sizes, in_order = rows.grouped
    found = plain_factors(layer, names) if all(name in layer.methods for name in names) else None
    if not found or any(p for *_, p in found):
        return None
    factors = [(A, B, scale) for A, B, scale, _ in found]
    return add_groups(y, x, factors, order, sizes, in_order) if fits(y, x, factors, sizes) else None


def weight_of(linear: Any) -> Tensor:
    """Its weight; quicker than the attribute, where nothing computes it (a parametrization)."""
    weight = linear._parameters.get("weight")
    return linear.weight if weight is None else weight
