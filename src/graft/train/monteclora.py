# SPDX-License-Identifier: Apache-2.0
"""MonteCLoRA in transformers' Trainer: its loss is added to the model's."""

from __future__ import annotations

from typing import Any

from graft.inject.parts import registry_of
from graft.methods.lora.lora import monteclora_loss
from graft.model.tuner import tuner_of


class MontecloraTrainerMixin:
    """Before a Trainer among the bases of a class: `class MontecloraTrainer(MontecloraTrainerMixin, Trainer)`."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """Return the Trainer's loss with MonteCLoRA's added, which is 0 in evaluation; or (loss, outputs)."""
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        losses = [monteclora_loss(registry_of(m)) for m in model.modules() if isinstance(m, tuner_of("LORA"))]
        own = sum(losses) / len(losses) if losses else 0.0
        return (found[0] + own, found[1]) if return_outputs else found + own
