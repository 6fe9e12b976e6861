# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA in a training loop: calls of its allocator after each optimizer step."""

from __future__ import annotations

from typing import Any

import torch


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
