# SPDX-License-Identifier: Apache-2.0
"""Dropout that an adapter's config asks for, in a model that a loop trains in eval mode, as `from_pretrained` left it.

New layers have the mode of the module that they adapt: an adapter that is added to a model in service does not make
its outputs random. A loop that forgets `model.train()` would so train without dropout, and without a word.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from torch import Tensor

from graft.core.errors import PeftWarning, warn
from graft.model.audit import Part, parts_of_active


def dropouts(config: Any) -> list[str]:
    """Return the fields of a config that are shares to drop, with their values, where they are not 0."""
    found = [(f.name, getattr(config, f.name)) for f in fields(config) if "dropout" in f.name]
    return [f"{name}={value}" for name, value in found if value and not isinstance(value, bool)]


def asleep(parts: list[Part], configs: dict[str, Any]) -> dict[str, int]:
    """Return how many carriers have each adapter that trains with dropout, if all of these are in eval mode."""
    modes: dict[str, list[bool]] = defaultdict(list)
    for part in parts:
        if hasattr(part.carrier, "training") and part.adapter in configs:
            modes[part.adapter].append(part.carrier.training)
    return {name: len(m) for name, m in modes.items() if not any(m) and dropouts(configs[name])}


def say_asleep(parts: list[Part], configs: dict[str, Any]) -> None:
    """Warn of each adapter whose dropout does not act in this backward pass."""
    for name, n in asleep(parts, configs).items():
        warn(
            f"Adapter '{name}' trains without its {', '.join(dropouts(configs[name]))}: its {n} modules are in eval "
            "mode, as from_pretrained() leaves a model. Call model.train() before training.",
            PeftWarning,
        )


def tell_once(carriers: Iterable[Any], configs: dict[str, Any], adapter: str) -> None:
    """Have the first gradient of `adapter` say so, on a model without a PeftModel, whose calls nobody follows."""
    parts = [part for part in parts_of_active(carriers) if part.adapter == adapter]
    if not parts or not dropouts(configs[adapter]):
        return

    def look(_grad: Tensor) -> None:
        handle.remove()
        say_asleep(parts, configs)

    handle = parts[0].parameters[0].register_hook(look)
