# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""The layouts of expert stacks in files.

The shapes, the program that wrote the file, or the caller tells which one it is.

graft and PEFT from 0.19.1 on take a stack as (n, out, in), or as (n, in, out) if its module says `is_transposed`. PEFT
before 0.19 took all as (n, in, out), and 0.19.0 did the reverse of today. Where such a file differs from today, A and B
are exchanged in it. Unsloth before September 2026 kept the columns of B by expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graft.config.pair import StackLayout
from graft.config.reading import Json
from graft.core.errors import PeftWarning, warn
from graft.core.layer import AdapterLayer
from graft.core.ops import Opaque
from graft.inject.experts import OF_EXPERT, ExpertStacks
from graft.inject.parts import AdapterCarriers, ParameterLayerPaths


def fuse_experts(
    tensors: dict[str, Tensor], parts: AdapterCarriers, prefix: str, model: nn.Module, config: object, adapter: str
) -> dict[str, Tensor]:
    """Return a file's tensors with the factors of single experts joined to A and B of the stacks.

    Such keys look like `….experts.3.w1.lora_A.weight`. The joined keys replace them, and B is rescaled to the stack's
    scaling. A stack that no layer adapts, or that lacks some expert or part, stays as it is in the file. A file without
    such keys is returned itself, otherwise a new dict.

    Args:
        config: the file's, with ranks and alphas by its own names.
    """
    matches = {name: match for name in tensors if (match := OF_EXPERT.fullmatch(name)) is not None}
    if not matches:
        return tensors
    place_of = cache(ExpertStacks(model).find_place)
    old: dict[str, dict[tuple[int, str], dict[int, str]]] = {}  # stack → (part, A or B) → name by expert
    count: dict[str, int] = {}  # parts of a stack
    for name, match in matches.items():
        place = place_of(match["experts"].removeprefix(prefix), match["part"])
        if place is not None:
            of_part = old.setdefault(place.stack, {}).setdefault((place.row, name.removesuffix(".weight")[-1]), {})
            of_part[int(match["number"])] = name
            count[place.stack] = len(place.parts)
    out, nests = dict(tensors), ParameterLayerPaths(parts.layers.values())
    for key, layer in parts.layers.items():
        names = old.get(f"{layer.site.path}.{layer.site.parameter}")
        if not layer.site.is_stack or names is None:
            continue
        every = range(layer.site.shape[0])
        indices = range(count[f"{layer.site.path}.{layer.site.parameter}"])
        if any(set(names.get((i, side), ())) != set(every) for i in indices for side in "AB"):
            continue
        stem = f"{prefix}{nests.path(key, layer)}"
        factors = {side: [[out[names[i, side][e]] for e in every] for i in indices] for side in "AB"}
        paths = [[names[i, "B"][e].removeprefix(prefix).removesuffix(".lora_B.weight") for e in every] for i in indices]
        factors["B"] = rescale_parts(factors["B"], paths, config, layer.methods[adapter].cfg)
        for side in "AB":
            out[f"{stem}.lora_{side}.weight"] = stack_factors(side, factors[side])
        for by_expert in names.values():
            for name in by_expert.values():
                del out[name]
    return out


def rescale_parts(
    parts: list[list[Tensor]], paths: list[list[str]], config: Any, stack_config: Any
) -> list[list[Tensor]]:
    """Return B of each part, by expert, multiplied so that the stack's one scaling gives the scaling of each part.

    B stays the same object where the factor is 1. Without an `alpha_pattern` each part has `config.lora_alpha`. If the
    config has `target_parameters` and the alphas of the first experts do not sum to the stack's, all B stay and a
    warning says so.

    Args:
        paths: the experts' modules, by part; `config` gives each its alpha.
        stack_config: has alpha and rank of all parts together.
    """
    alphas = [[config.at(path).lora_alpha if config.alpha_pattern else config.lora_alpha for path in of_part]
              for of_part in paths]  # fmt: skip
    if config.target_parameters and sum(of_part[0] for of_part in alphas) != stack_config.lora_alpha:
        warn(
            f"The config does not tell the alphas of the parts of '{paths[0][0]}' any more, only that of all together: "
            "each gets a share by its rank. Load the adapter from its folder instead.",
            PeftWarning,
        )
        return parts

    def scaling(alpha: float, r: int) -> float:
        """Return alpha / r, or alpha / √r with rsLoRA."""
        return alpha / (math.sqrt(r) if config.use_rslora else r)

    whole = scaling(stack_config.lora_alpha, stack_config.r)
    return [
        [B if (by := scaling(alpha, B.shape[1]) / whole) == 1 else B * by for B, alpha in zip(*of_part, strict=True)]
        for of_part in zip(parts, alphas, strict=True)
    ]


def stack_factors(side: str, parts: list[list[Tensor]]) -> Tensor:
    """Return A or B of a stack from the factors of each part, by expert.

    A has the rows of one expert's parts, then those of the next expert. B is block-diagonal in the parts; its columns
    alternate between the experts.
    """
    if side == "A":
        return torch.cat([torch.cat(of_expert) for of_expert in zip(*parts, strict=True)])
    return torch.stack([torch.block_diag(*of_expert) for of_expert in zip(*parts, strict=True)], -1).flatten(1)


class StackFactors(NamedTuple):
    """A stack of the model and its factors in a file, with their keys."""

    layer: AdapterLayer
    a: str  # names in the file
    b: str
    A: Tensor
    B: Tensor

    @property
    def verdict(self) -> tuple[bool | None, bool]:
        """(exchanged, transposed).

        exchanged: whether A fits the outputs and B the inputs; None if inputs and outputs are as many. transposed:
        whether the module holds (in, out).
        """
        _, out_features, in_features = self.layer.site.shape
        exchanged = (self.A.shape[1], self.B.shape[0]) == (out_features, in_features)
        return None if out_features == in_features else exchanged, self.layer.op.transposed


def convert_stack_layouts(
    tensors: dict[str, Tensor], parts: AdapterCarriers, prefix: str, layout: StackLayout, what: str
) -> dict[str, Tensor]:
    """Return a file's tensors with the factors of stacks in graft's layout, in a new dict; `tensors` itself if the file
    has no stacks.

    Warns of a layout that nothing tells.

    Args:
        what: adapter and file, for warnings.
    """
    stacks = [*find_stack_factors(tensors, parts, prefix)]
    if not stacks:
        return tensors
    doubts = set[str]()
    out = tensors | convert_factors(stacks, layout, doubts)
    layout.warn_of_doubts(doubts, what)
    return out


class StackArranger:
    """Brings the factors of stacks, two at a time, from a file's layout into graft's."""

    def __init__(self, fields: Json, what: str):
        """Keep the layout that the fields of the file's config tell, and the adapter and file that warnings name."""
        self.layout, self.what, self.doubts = StackLayout.from_config(fields), what, set[str]()

    def __deepcopy__(self, memo: object) -> StackArranger:
        """Return itself. transformers makes a copy for each stack, and all share the doubts."""
        return self

    def convert(self, layer: AdapterLayer, pair: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return A and B of a stack by key, first A, in graft's layout; `pair` itself if they cannot be factors of the
        layer.

        Warns of a layout that nothing tells, of each such doubt once for all stacks (`doubts`).
        """
        (a, A), (b, B) = pair.items()
        if not can_be_stack_factors(layer, A, B):
            return pair
        doubts = set[str]()
        factors = convert_factors([StackFactors(layer, a, b, A, B)], self.layout, doubts)
        self.layout.warn_of_doubts(doubts - self.doubts, self.what)
        self.doubts |= doubts
        return factors


def convert_factors(stacks: Sequence[StackFactors], layout: StackLayout, doubts: set[str]) -> dict[str, Tensor]:
    """Return the factors of a file's stacks in graft's layout, by key.

    If the layout is by expert, columns of B are put in graft's order, unless the rank is 1. A and B are exchanged back
    where the layout finds them exchanged.

    Adds to `doubts`: "exchanged" if nothing tells; "by_expert" if the layout does not tell the order, and rank and
    experts are above 1. Adds "twice" if columns were reordered although another package replaced PEFT's `load_adapter`.
    """
    exchanges, out = layout.find_exchanges({s.a: s.verdict for s in stacks}, doubts), dict[str, Tensor]()
    for layer, a, b, A, B in stacks:
        n = layer.site.shape[0]
        r = len(A) // n
        if layout.by_expert and r > 1:
            B = B.view(-1, n, r).transpose(1, 2).flatten(1)
            doubts |= {"twice"} if layout.left_to else set()
        elif layout.by_expert is None and min(r, n) > 1:
            doubts.add("by_expert")
        if exchanges[a][0]:
            of_each = Opaque.split_matrices(A, B, n)
            A, B = Opaque.join_matrices(of_each[1].mT, of_each[0].mT)
        out |= {a: A, b: B}
    return out


def find_stack_factors(tensors: dict[str, Tensor], parts: AdapterCarriers, prefix: str) -> Iterator[StackFactors]:
    """Yield the adapted stacks with both factors in a file, if their shapes are possible. Nothing is changed."""
    nests = ParameterLayerPaths(parts.layers.values())
    for key, layer in parts.layers.items():
        stem = f"{prefix}{nests.path(key, layer)}"
        a, b = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
        A, B = tensors.get(a), tensors.get(b)
        if A is not None and B is not None and can_be_stack_factors(layer, A, B):
            yield StackFactors(layer, a, b, A, B)


def can_be_stack_factors(layer: AdapterLayer, A: Tensor, B: Tensor) -> bool:
    """Return True if two tensors can be the factors of a layer: it adapts a stack of matrices, both have two
    dimensions, A has as many rows as B has columns, and a multiple of the number of experts.
    """
    site = layer.site
    return site.is_stack and A.dim() == B.dim() == 2 and len(A) == B.shape[1] and len(A) % site.shape[0] == 0
