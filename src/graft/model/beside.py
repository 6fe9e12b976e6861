# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer beside models that it does not know: it would save them whole, and resume from no adapter."""

from __future__ import annotations

import sys

from graft.core.errors import PeftWarning, warn

_said = False


def say_unknown(model_class: type) -> None:
    """Warn once in a process that the loaded Trainer takes models of this class for any other modules."""
    global _said
    trainer = sys.modules.get("transformers.trainer")
    if trainer is None or _said or issubclass(model_class, getattr(trainer, "PeftModel", ())):
        return
    _said = True
    warn(
        "transformers' Trainer is loaded and does not know graft's models: its checkpoints would be whole models, "
        "without an adapter, and TRL's trainers would fail. To train by one of them, call "
        "graft.compat.peft.install(), also now; for a loop of your own nothing is to be done.",
        PeftWarning,
    )
