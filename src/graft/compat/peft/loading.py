# SPDX-License-Identifier: Apache-2.0
"""The names by which transformers' own `model.load_adapter` finds the place of each tensor of a checkpoint."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from graft.io.experts import stacked
from graft.methods import METHODS, method_of

STACKS = ("gate_up_proj", "down_proj")  # of experts, from the inside out where an adapter is on both


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
    for conversion in weight_conversions or ():
        if isinstance(conversion, WeightRenaming):
            changes.append(conversion)
        elif "lora_" in prefixes:
            changes += of_experts(conversion, adapter_name, peft_config)
    return changes


def of_experts(conversion: Any, adapter_name: str, config: Any) -> list[Any]:
    """Return what puts A and B of each expert together, where a conversion does so with the experts' weights."""
    path, _, parameter = conversion.target_patterns[0].rpartition(".")
    if len(conversion.target_patterns) > 1 or parameter not in STACKS or not path.endswith("experts"):
        return []
    parts = [pattern.removesuffix(".weight") for pattern in conversion.source_patterns]
    if parameter == STACKS[0] and (config is None or targets_outer(config)):
        path += ".base_layer"  # the layer of the other stack stands around this one's
    return [
        type(conversion)(
            source_patterns=[f"{part}.lora_{side}.*" for part in parts],
            target_patterns=[f"{path}.lora_{side}.{adapter_name}.weight"],
            operations=[Stacking(side)],
        )
        for side in "AB"
    ]


def targets_outer(config: Any) -> bool:
    """Whether an adapter is on the outer stack, too, under its name or that of its part in each expert."""
    modules = config.target_modules or ()
    if isinstance(modules, str):
        return True
    names = {name.rpartition(".")[2] for name in (*modules, *(getattr(config, "target_parameters", None) or ()))}
    return bool(names & {"w2", STACKS[1]})


class Stacking:
    """An operation as transformers has them on weights: A or B of all experts → that of their stack."""

    supports_many_to_many = False

    def __init__(self, side: str):
        self.side = side

    def convert(
        self, input_dict: dict[str, list[Tensor]], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Tensor]:
        parts = [input_dict.pop(pattern) for pattern in source_patterns]  # each: a tensor for each expert
        return {target_patterns[0]: stacked(self.side, parts)}
