# SPDX-License-Identifier: Apache-2.0
"""The training room: starts that are measured on data, callbacks for transformers' Trainer, and trainings that resume.

Entry points: the functions below, `graft.save_training` and `graft.resume`, `graft.preprocess_corda` and its like,
`graft.initialize_lora_eva_weights`, `graft.replace_lora_weights_loftq`.

- `resuming.py`: a training to a file and back, by names of parameters.
- `callbacks.py`: callbacks and mixins for a Trainer.
- `calibration.py`: starts of adapters from gradients and inputs of layers.
"""

from graft.train.callbacks import (
    FineGatesTrainerMixin,
    MontecloraTrainerMixin,
    Watch,
    adalora_callback,
    allocate_on_step,
)
from graft.train.restart import restart
from graft.train.resumable import Resumable, find_last_checkpoint

__all__ = [
    "FineGatesTrainerMixin",
    "MontecloraTrainerMixin",
    "Resumable",
    "Watch",
    "adalora_callback",
    "allocate_on_step",
    "find_last_checkpoint",
    "restart",
]
