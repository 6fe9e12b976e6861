# SPDX-License-Identifier: Apache-2.0
"""The names by which transformers' own `model.load_adapter` finds the place of each tensor of a checkpoint."""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import Tensor, nn

from graft.core.layer import AdapterLayer
from graft.inject.experts import merges, part_of
from graft.io.layouts import Layout, Stack, as_here, fits, say, scaled, stacked
from graft.methods import METHODS, method_of

OUTER = "down_proj"  # the stack of experts whose layer stands around those of the others


def build_peft_weight_mapping(
    weight_conversions: list[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """Return what becomes of an adapter's file on a model: drop the prefix, add the adapter's name to the container.

    Where the model holds experts as stacks, LoRA's A and B of each expert are put together for them. Other conversions
    of base weights (q, k and v fused into one tensor) are left out, and transformers reports their keys as unexpected.
    """
    from transformers.core_model_loading import WeightRenaming

    types = METHODS if peft_config is None else [peft_config.peft_type]
    prefixes = dict.fromkeys(method_of(t).prefix for t in types)
    changes = [WeightRenaming(r"^base_model\.model\.", "")]
    for prefix in prefixes:
        changes.append(WeightRenaming(rf"({re.escape(prefix)}[^\.]*)", rf"\1.{adapter_name}"))
    # DoRA's magnitude is a module, of which files leave out ".weight"
    changes.append(WeightRenaming(rf"(lora_magnitude_vector\.{re.escape(adapter_name)})$", r"\1.weight"))
    conversions = [c for c in weight_conversions or () if not isinstance(c, WeightRenaming)]
    changes += [c for c in weight_conversions or () if isinstance(c, WeightRenaming)]
    if peft_config is not None and peft_config.peft_type == "LORA":
        told = copy.copy(peft_config)  # injection rewrites it to today's names
        converters = [c for c in conversions if merges(c)]
        for conversion in converters:
            changes += of_experts(conversion, adapter_name, told, targets_outer(told, converters))
        if peft_config.target_parameters:
            changes += of_stacks(adapter_name, told)
    return changes


def of_experts(conversion: Any, adapter_name: str, config: Any, nested: bool) -> list[Any]:
    """Return what puts A and B of each expert together, where a conversion does so with the experts' weights.

    Args:
        nested: the outer stack has a layer, too.
    """
    path, _, parameter = conversion.target_patterns[0].rpartition(".")
    if not path.endswith("experts"):
        return []
    parts = [pattern.removesuffix(".weight") for pattern in conversion.source_patterns]
    if parameter != OUTER and nested:
        path += ".base_layer"
    return [
        type(conversion)(
            source_patterns=[f"{part}.lora_{side}.*" for part in parts],
            target_patterns=[f"{path}.lora_{side}.{adapter_name}.weight"],
            operations=[Stacking(side, parts, config, adapter_name)],
        )
        for side in "AB"
    ]


def of_stacks(adapter_name: str, config: Any) -> list[Any]:
    """Return what gives the factors of stacks the layout that they have here."""
    from transformers.core_model_loading import WeightConverter

    operation: Any = Arranging(adapter_name, Layout.of(vars(config)))
    names = {name.split(".")[-2] for name in config.target_parameters if "." in name}
    both = [
        [f"{name}{within}.lora_{side}.{adapter_name}.weight" for side in "AB"]
        for name in sorted(names)
        for within in (".base_layer", "")
    ]
    return [WeightConverter([pair[0], pair[1]], pair, [operation]) for pair in both]


def targets_outer(config: Any, converters: list[Any]) -> bool:
    """Whether an adapter is on the outer stack, too, under its name or that of its part in each expert."""
    modules = config.target_modules or ()
    if isinstance(modules, str):
        return True
    names = {name.rpartition(".")[2] for name in (*modules, *(config.target_parameters or ()))}
    outer = [c for c in converters if c.target_patterns[0].rpartition(".")[2] == OUTER]
    return bool(names & {OUTER, *(part_of(pattern) for c in outer for pattern in c.source_patterns)})


class Stacking:
    """An operation as transformers has them on weights: A or B of all experts → that of their stack."""

    supports_many_to_many = False

    def __init__(self, side: str, parts: list[str], config: Any, adapter: str):
        self.side, self.parts, self.config, self.adapter = side, parts, config, adapter

    def convert(
        self, input_dict: dict[str, list[Tensor]], source_patterns: list[str], target_patterns: list[str],
        full_layer_name: str, model: nn.Module, **_: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        held = [input_dict.pop(pattern) for pattern in source_patterns]  # each: a tensor for each expert
        layer = layer_at(model, full_layer_name)
        if self.side == "B" and layer is not None:
            before = full_layer_name.partition(target_patterns[0])[0]
            paths = [[before + part.replace("*", str(e)) for e in range(len(of))] for part, of in zip(self.parts, held)]
            held = scaled(held, paths, self.config, layer.methods[self.adapter].cfg)
        return {target_patterns[0]: stacked(self.side, held)}


class Arranging:
    """An operation as transformers has them on weights: A and B of a stack, in whatever layout → as they are here."""

    supports_many_to_many = True

    def __init__(self, adapter: str, layout: Layout):
        self.adapter, self.layout, self.doubts = adapter, layout, set[str]()

    def convert(
        self, input_dict: dict[str, list[Tensor]], source_patterns: list[str], target_patterns: list[str],
        full_layer_name: str, model: nn.Module, **_: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        found = {
            name: held[0] if isinstance(held, list) else held
            for pattern, name in zip(source_patterns, target_patterns)
            if (held := input_dict.pop(pattern, None)) is not None
        }
        layer = layer_at(model, full_layer_name)
        if layer is None or len(found) < 2 or not fits(layer, *found.values()):
            return found
        doubts: set[str] = set()
        a, b = target_patterns
        stack = Stack(layer, a, b, found[a], found[b])
        made = as_here(stack, set(), self.layout, doubts)
        say(doubts - self.doubts, self.layout, f"Adapter '{self.adapter}' (load it by PeftModel.from_pretrained)")
        self.doubts |= doubts
        return dict(zip(target_patterns, made))


def layer_at(model: nn.Module, name: str) -> AdapterLayer | None:
    """Return the layer whose parameter has a name."""
    layer = model.get_submodule(name.partition(".lora_")[0])
    return layer if isinstance(layer, AdapterLayer) else None
