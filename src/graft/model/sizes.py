# SPDX-License-Identifier: Apache-2.0
"""How large the updates of adapters are beside what they change, and whether their values are finite."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graft.core.effect import Branch, Replace, Rewrite
from graft.core.finite import is_plain
from graft.core.folding import delta_of, evaluating, fold_step, shift_of
from graft.inject.beside import ModulesToSaveWrapper
from graft.storage.parallel import layout_of

UNKNOWN = math.nan


class Size(NamedTuple):
    """Of an adapter on one carrier. NaN: not known."""

    largest: float = 0.0  # magnitude of a parameter; inf or NaN if one is not finite
    update: float = UNKNOWN  # Frobenius norm of what it adds to the weight, or makes of it
    weight: float = UNKNOWN  # of the weight without it

    @property
    def finite(self) -> bool:
        return math.isfinite(self.largest)

    @property
    def share(self) -> float:
        """The update as a share of its weight; NaN if that is not known, or the weight is 0."""
        return self.update / self.weight if self.weight else UNKNOWN


@torch.no_grad()
def sizes(parts: Sequence[Any]) -> list[Size]:
    """Measure parts of an audit, with one wait for each device."""
    numbers: dict[torch.device, list[tuple[int, str, Tensor]]] = defaultdict(list)
    for i, part in enumerate(parts):
        held = [p for p in part.parameters if is_plain(p) and p.numel() and layout_of(p) is None]
        if len(held) < len(part.parameters):
            continue  # in parts, or elsewhere
        for p, norm in zip(held, torch._foreach_norm(held, math.inf)):
            numbers[p.device].append((i, "largest", norm))
        for name, norm in zip(("update", "weight"), norms(part.carrier, part.adapter)):
            numbers[norm.device].append((i, name, norm))
    found: list[dict[str, float]] = [{} for _ in parts]
    for of_device in numbers.values():
        read = torch.stack([norm.float() for _, _, norm in of_device]).tolist()
        for (i, name, _), value in zip(of_device, read):
            before = found[i].get(name, 0.0)
            found[i][name] = before if math.isnan(before) else value if math.isnan(value) else max(before, value)
    return [Size(**values) for values in found]


def norms(carrier: Any, adapter: str) -> tuple[Tensor, ...]:
    """Return the norms of update and weight; () if there is no such pair that can be read here."""
    if isinstance(carrier, ModulesToSaveWrapper):
        return of_module(carrier.modules_to_save[adapter], carrier.original_module)
    layer = carrier.adapter_layer
    if layer is None or adapter not in layer.methods:
        return ()
    method = layer.methods[adapter]
    effect = method.effect
    if isinstance(effect, (Branch, Replace)) or effect.fixed or (isinstance(effect, Rewrite) and effect.block):
        return ()
    base = layer.base_layer
    if layer.site.piece is not None or any([layout_of(t) is not None for t in base.parameters()]):
        return ()  # processes would have to read it together
    if layer.store.unread(base, layer.site.parameter):
        return ()
    with evaluating(layer):
        W = layer.W0
        if isinstance(effect, Rewrite):
            b = layer.b0
            folded, bias = fold_step(layer, method, effect, W, b)
            delta, shift = folded.float() - W.float(), None if bias is None or b is None else bias - b
        else:
            delta, shift = delta_of(layer, effect), shift_of(effect)
        update = delta.float().norm()
        if shift is not None:
            update = torch.hypot(update, shift.float().norm())
        return update, W.float().norm()


def of_module(module: nn.Module, original: nn.Module) -> tuple[Tensor, ...]:
    """Return the norms of the difference between a module and the one that it stands for, and of that one."""
    pairs = list(zip(module.parameters(), original.parameters()))
    if not pairs or not all([is_plain(t) and t.numel() and layout_of(t) is None for pair in pairs for t in pair]):
        return ()
    if any([p.shape != q.shape or p.device != q.device for p, q in pairs]):
        return ()
    apart = torch.stack([(p.float() - q.float()).norm() for p, q in pairs]).norm()
    return apart, torch.stack([q.float().norm() for _, q in pairs]).norm()
