# SPDX-License-Identifier: Apache-2.0
"""MonteCLoRA in transformers' Trainer: its loss is added to the model's."""

from __future__ import annotations

from typing import Any


class MontecloraTrainerMixin:
    """Before a Trainer among the bases of a class: `class MontecloraTrainer(MontecloraTrainerMixin, Trainer)`."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """Return the Trainer's loss with MonteCLoRA's added, which is 0 in evaluation; or (loss, outputs)."""
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        losses = [m._get_monteclora_loss() for m in model.modules() if hasattr(type(m), "_get_monteclora_loss")]
        own = sum(losses) / len(losses) if losses else 0.0
        return (found[0] + own, found[1]) if return_outputs else found + own
