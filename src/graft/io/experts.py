# SPDX-License-Identifier: Apache-2.0
"""The tensors of adapters on experts, one file entry for each, put together for models that hold experts as stacks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from graft.inject.experts import OF_EXPERT, Conversions
from graft.inject.parts import Nests, Parts


def fused(tensors: dict[str, Tensor], parts: Parts, prefix: str, model: nn.Module, config: Any) -> dict[str, Tensor]:
    """Return a file's tensors with those of experts (`….experts.3.w1.lora_A.weight`) as the stacks' A and B."""
    matches = {name: match for name in tensors if (match := OF_EXPERT.fullmatch(name)) is not None}
    if not matches:
        return tensors
    conversions = Conversions(model)
    places = {
        key: conversions.place(key[0].removeprefix(prefix), key[1])
        for key in dict.fromkeys((m["experts"], m["part"]) for m in matches.values())
    }
    old: dict[str, dict[tuple[int, str], dict[int, str]]] = {}  # stack → (part, A or B) → name by expert
    count: dict[str, int] = {}  # parts of a stack
    for name, match in matches.items():
        place = places[match["experts"], match["part"]]
        if place is not None:
            of_part = old.setdefault(place.stack, {}).setdefault((place.row, name.removesuffix(".weight")[-1]), {})
            of_part[int(match["number"])] = name
            count[place.stack] = len(place.parts)
    out, nests = dict(tensors), Nests(parts.layers.values())
    for key, layer in parts.layers.items():
        names = old.get(f"{layer.site.path}.{layer.site.parameter}")
        if not layer.op.opaque or len(layer.site.shape) < 3 or names is None:
            continue
        every = range(layer.site.shape[0])
        indices = range(count[f"{layer.site.path}.{layer.site.parameter}"])
        if any(set(names.get((i, side), ())) != set(every) for i in indices for side in "AB"):
            continue
        stem = f"{prefix}{nests.path(key, layer)}"
        held = {side: [[out[names[i, side][e]] for e in every] for i in indices] for side in "AB"}
        if getattr(config, "use_rslora", False):  # alpha / √r: smaller for the ranks of all parts together
            ranks = [len(of_part[0]) for of_part in held["A"]]
            held["B"] = [
                [B * math.sqrt(r / sum(ranks)) for B in of_part] for r, of_part in zip(ranks, held["B"], strict=True)
            ]
        for side in "AB":
            out[f"{stem}.lora_{side}.weight"] = stacked(side, held[side])
        for by_expert in names.values():
            for name in by_expert.values():
                del out[name]
    return out


def stacked(side: str, parts: list[list[Tensor]]) -> Tensor:
    """Return A or B of a stack from those of each part, by expert.

    A of a stack has the rows of one expert's parts after the other; B is block-diagonal in the parts, and has the
    columns of all experts in turn.
    """
    if side == "A":
        return torch.cat([torch.cat(of_expert) for of_expert in zip(*parts, strict=True)])
    return torch.stack([torch.block_diag(*of_expert) for of_expert in zip(*parts, strict=True)], -1).flatten(1)
