# SPDX-License-Identifier: Apache-2.0
"""The tensors of adapters on experts, one file entry for each, put together for models that hold experts as stacks."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.inject.experts import FAMILIES, OF_EXPERT, current
from graft.inject.parts import Nests, Parts


def fused(tensors: dict[str, Tensor], parts: Parts, prefix: str) -> dict[str, Tensor]:
    """Return a file's tensors with those of experts (`….experts.3.w1.lora_A.weight`) as the stacks' A and B."""
    old: dict[tuple[str, str, str], dict[int, str]] = {}  # (experts, part, A or B) → name by expert
    for name in tensors:
        match = OF_EXPERT.fullmatch(name)
        if match is not None:
            place = current(match["experts"]), match["part"], name.removesuffix(".weight")[-1]
            old.setdefault(place, {})[int(match["number"])] = name
    if not old:
        return tensors
    out, nests = dict(tensors), Nests(parts.layers.values())
    for key, layer in parts.layers.items():
        if not layer.op.opaque or len(layer.site.shape) < 3:
            continue
        experts = f"{prefix}{layer.site.path}"
        for names in (f.parts for family in FAMILIES.values() for f in family if f.parameter == layer.site.parameter):
            held = {side: [old.get((experts, part, side), {}) for part in names] for side in "AB"}
            every = set(range(layer.site.shape[0]))
            if not all(set(by_expert) == every for side in held.values() for by_expert in side):
                continue
            stem = f"{prefix}{nests.path(key, layer)}"
            for side in "AB":
                tensors_of = [[out[by_expert[e]] for e in sorted(every)] for by_expert in held[side]]
                out[f"{stem}.lora_{side}.weight"] = stacked(side, tensors_of)
            for by_expert in (*held["A"], *held["B"]):
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
