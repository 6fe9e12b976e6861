# SPDX-License-Identifier: Apache-2.0
"""What transformers' Trainer needs for AdaLoRA and AdaMSS (allocation after each step) and MonteCLoRA (a loss)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from graft.inject.parts import registry_of
from graft.methods.lora.lora import monteclora_loss
from graft.model.tuner import tuner_of


def adalora_callback(model: Any) -> Any:
    """Return a callback for transformers' Trainer: `Trainer(…, callbacks=[graft.train.adalora_callback(model)])`."""
    from transformers import TrainerCallback

    class AdaLoraCallback(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model.base_model.update_and_allocate(state.global_step)

    return AdaLoraCallback()


def allocate_on_step(optimizer: torch.optim.Optimizer, model: Any, start: int = 0) -> Any:
    """Make every `optimizer.step()` allocate afterwards. Return a handle whose `remove()` stops that."""
    step = start

    def allocate(*_: Any) -> None:
        nonlocal step
        model.base_model.update_and_allocate(step)
        step += 1

    return optimizer.register_step_post_hook(allocate)


@cache
def callback_class() -> Any:
    """Make the class of `AdamssAsaCallback`, for which transformers is needed."""
    from transformers import TrainerCallback

    class AdamssAsaCallback(TrainerCallback):
        """Chooses the subspaces of AdaMSS adapters that train: `Trainer(…, callbacks=[AdamssAsaCallback()])`."""

        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            tuner: Any = getattr(getattr(model, "module", model), "base_model", None)
            if hasattr(tuner, "update_and_allocate"):
                tuner.update_and_allocate(state.global_step)

    AdamssAsaCallback.__qualname__ = "AdamssAsaCallback"  # as `pickle` finds it here
    return AdamssAsaCallback


def __getattr__(name: str) -> Any:
    if name == "AdamssAsaCallback":
        return callback_class()
    raise AttributeError(f"module 'graft.train.callbacks' has no attribute '{name}'")


class MontecloraTrainerMixin:
    """Before a Trainer among the bases of a class: `class MontecloraTrainer(MontecloraTrainerMixin, Trainer)`."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """Return the Trainer's loss with MonteCLoRA's added, which is 0 in evaluation; or (loss, outputs)."""
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        losses = [monteclora_loss(registry_of(m)) for m in model.modules() if isinstance(m, tuner_of("LORA"))]
        own = sum(losses) / len(losses) if losses else 0.0
        return (found[0] + own, found[1]) if return_outputs else found + own
