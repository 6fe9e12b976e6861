# SPDX-License-Identifier: Apache-2.0
"""AdaMSS in transformers' Trainer: calls of its allocator after each optimizer step."""

from __future__ import annotations

from functools import cache
from typing import Any


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
    raise AttributeError(f"module 'graft.train.adamss' has no attribute '{name}'")
