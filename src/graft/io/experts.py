# SPDX-License-Identifier: Apache-2.0
"""The tensors of adapters on experts, one file entry for each, put together for models that hold experts as stacks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.errors import PeftWarning, warn
from graft.inject.experts import OF_EXPERT, Conversions
from graft.inject.parts import Nests, Parts


def fused(
    tensors: dict[str, Tensor], parts: Parts, prefix: str, model: nn.Module, config: Any, adapter: str
) -> dict[str, Tensor]:
    """Return a file's tensors with those of experts (`….experts.3.w1.lora_A.weight`) as the stacks' A and B.

    Args:
        config: the file's, with ranks and alphas by the names that it has there.
    """
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
        paths = [[names[i, "B"][e].removeprefix(prefix).removesuffix(".lora_B.weight") for e in every] for i in indices]
        held["B"] = scaled(held["B"], paths, config, layer.methods[adapter].cfg)
        for side in "AB":
            out[f"{stem}.lora_{side}.weight"] = stacked(side, held[side])
        for by_expert in names.values():
            for name in by_expert.values():
                del out[name]
    return out


def scaled(parts: list[list[Tensor]], paths: list[list[str]], config: Any, own: Any) -> list[list[Tensor]]:
    """Return B of each part, by expert, so that the scaling of the stack does to it what its own did.

    Args:
        paths: their modules, by which `config` gives each its alpha.
        own: the stack's config, whose alpha and rank are for all parts together.
    """
    alphas = [[config.at(path).lora_alpha if config.alpha_pattern else config.lora_alpha for path in of_part]
              for of_part in paths]  # fmt: skip
    if config.target_parameters and sum(of_part[0] for of_part in alphas) != own.lora_alpha:
        warn(
            f"The config does not tell the alphas of the parts of '{paths[0][0]}' any more, only that of all together: "
            "each gets a share by its rank. Load the adapter from its folder instead.",
            PeftWarning,
        )
        return parts

    def scaling(alpha: float, r: int) -> float:
        return alpha / (math.sqrt(r) if config.use_rslora else r)

    whole = scaling(own.lora_alpha, own.r)
    return [
        [B if (by := scaling(alpha, B.shape[1]) / whole) == 1 else B * by for B, alpha in zip(*of_part, strict=True)]
        for of_part in zip(parts, alphas, strict=True)
    ]


def stacked(side: str, parts: list[list[Tensor]]) -> Tensor:
    """Return A or B of a stack from those of each part, by expert.

    A of a stack has the rows of one expert's parts after the other; B is block-diagonal in the parts, and has the
    columns of all experts in turn.
    """
    if side == "A":
        return torch.cat([torch.cat(of_expert) for of_expert in zip(*parts, strict=True)])
    return torch.stack([torch.block_diag(*of_expert) for of_expert in zip(*parts, strict=True)], -1).flatten(1)
