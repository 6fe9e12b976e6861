# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA without its allocator trains as plain LoRA does, and nobody would notice."""

from __future__ import annotations

from typing import Any

from graft.core.errors import PeftWarning, warn
from graft.methods.adalora.allocator import allocator_of, trainable


def warn_if_forgotten(tuner: Any) -> None:
    """Say so if an optimizer step has changed the adapter and nobody has allocated, whatever the loop."""
    for name in tuner.active_adapters:
        state = tuner.states.get(name)
        if state is not None and (state.called or state.warned):
            return
    found = trainable(tuner)
    if found is None or not found[1]:
        return
    state = allocator_of(tuner, found[0])
    A = next(iter(found[1].values())).lora_A
    if not A.requires_grad:
        return
    state.version = A._version if state.version is None else state.version
    if A._version != state.version:
        state.warned = True
        remedy = (
            "A PeftMixedModel has no allocator: train the adapter in a PeftModel."
            if tuner.mixed
            else "Call model.base_model.update_and_allocate(step) after each step, or use "
            "graft.train.adalora_callback (Trainer) or graft.train.allocate_on_step (any optimizer)."
        )
        warn(
            f"AdaLoRA adapter '{found[0]}' took an optimizer step without update_and_allocate(): its ranks will never "
            f"adapt. {remedy}",
            PeftWarning,
        )
