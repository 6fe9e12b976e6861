# SPDX-License-Identifier: Apache-2.0
"""The names by which transformers' own `model.load_adapter` finds the place of each tensor of a checkpoint."""

from __future__ import annotations

import re
from typing import Any

from graft.methods import METHODS, method_of


def build_peft_weight_mapping(
    weight_conversions: list[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """Return renamings from an adapter's file to a model: drop the prefix, add the adapter's name to the container.

    Leave out conversions of whole base weights (experts fused into one tensor): graft has no adapters of such weights
    yet, and transformers reports their keys as unexpected.
    """
    from transformers.core_model_loading import WeightRenaming

    types = METHODS if peft_config is None else [peft_config.peft_type]
    prefixes = dict.fromkeys(method_of(t).prefix for t in types)
    renamings = [WeightRenaming(r"^base_model\.model\.", "")]
    for prefix in prefixes:
        renamings.append(WeightRenaming(rf"({re.escape(prefix)}[^\.]*)", rf"\1.{adapter_name}"))
    return [*renamings, *(c for c in weight_conversions or () if isinstance(c, WeightRenaming))]
