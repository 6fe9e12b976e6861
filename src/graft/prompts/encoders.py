# SPDX-License-Identifier: Apache-2.0
"""The carrier of a model's prompts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from graft.core.call import Call
from graft.core.carrier import Carrier, State
from graft.core.containers import Slot, slots_of
from graft.prompts.base import Prompt

PLACE = "prompt_encoder"


class Encoders(Carrier, nn.ModuleDict):
    """The carrier of all prompts, by adapter."""

    key = PLACE
    replaces = False

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.state = State(call)
        self.never: dict[str, set[tuple[str, str]]] = {}  # by adapter: parameters that never train

    @property
    def call(self) -> Call:
        return self.state.call  # type: ignore[no-any-return]

    @property
    def adapters(self) -> list[str]:
        return list(self)

    def add(self, adapter: str, prompt: Prompt) -> None:
        self[adapter] = prompt
        slots = slots_of(PLACE, self, adapter)
        self.never[adapter] = {(s.container, s.path) for s in slots if s.is_parameter and not s.trains}
        self.require_grad(adapter, False)

    def slots(self, adapter: str) -> list[Slot]:
        return list(slots_of(PLACE, self, adapter, self.never[adapter]))

    def drop(self, adapter: str) -> None:
        del self[adapter], self.never[adapter]

    def check_active(self, names: Sequence[str]) -> None:
        if len(names) > 1:
            raise ValueError(
                f"Only one prompt can be in front of the input at a time, got {list(names)}: call set_adapter() with "
                "one of them."
            )
