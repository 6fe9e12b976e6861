# SPDX-License-Identifier: Apache-2.0
"""The carriers of one adapter, and the registry of a model."""

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
    """The carriers of one adapter: layers and wrappers by path, the tensors that all layers share, a prompt."""

    layers: dict[str, AdapterLayer]
    wrappers: dict[str, Wrapper]
    shared: Shared | None = None
    prompt: Prompt | None = None

    @property
    def prefix(self) -> str:
        """The beginning of a PeftModel's keys; under a prompt the base model has no tuner around it."""
        return "base_model.model." if self.prompt is None else "base_model."

    def carriers(self) -> Iterator[Carrier]:
        yield from self.layers.values()
        yield from self.wrappers.values()
        if self.shared is not None:
            yield self.shared


HOLDER = "_graft"  # the attribute with the registry of PeftModels and tuners; no base model has one of that name


def registry_of(model: Any) -> Any:
    """Return the registry of a PeftModel or tuner; None for any other model."""
    return model.__dict__.get(HOLDER)
