# SPDX-License-Identifier: Apache-2.0
"""What carries one adapter, and the registry that knows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from graft.core.carrier import Carrier
from graft.core.layer import AdapterLayer
from graft.core.shared import Shared
from graft.inject.survey import Wrapper
from graft.prompts.base import Prompt


@dataclass
class Parts:
    """What carries one adapter: layers and wrappers by path, what all layers share, a prompt."""

    layers: dict[str, AdapterLayer]
    wrappers: dict[str, Wrapper]
    shared: Shared | None = None
    prompt: Prompt | None = None

    @property
    def prefix(self) -> str:
        """What keys of a PeftModel begin with: prompts are put into the model as it is, without a tuner around it."""
        return "base_model.model." if self.prompt is None else "base_model."

    def carriers(self) -> Iterator[Carrier]:
        yield from self.layers.values()
        yield from self.wrappers.values()
        if self.shared is not None:
            yield self.shared


HOLDER = "_graft"  # an attribute of PeftModels and tuners; a name that no base model has


def registry_of(model: Any) -> Any:
    """The registry of the adapters of a PeftModel or tuner; None of another model."""
    return model.__dict__.get(HOLDER)
