# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer as the description of a run: its loader, optimizer, schedule and loss, but not its loop.

The loop's logging, evaluation, checkpoints and callbacks do not happen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft import ConfigError, PeftWarning
from graft.core.errors import shorten_text, warn
from graft.many.draws import Draws
from graft.many.loader import Batch
from graft.many.losses import Loss
from graft.many.run import WINDOW
from graft.train.calibration import restrict_training

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.utils.data import DataLoader
    from transformers import Trainer

LOOP_ARGUMENTS = {  # arguments that change the result of a step, unless the base has that dtype already
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "neftune_noise_alpha": None,
}
ITEMS = "num_items_in_batch"  # of all batches of a step, which Trainer counts


class TrainerDescription:
    """The parts of a Trainer that make a run.

    Attributes:
        name: of the run, for errors.
        seed, accumulate: from the Trainer's arguments.
        clip: its largest norm of the gradient; None if that is 0.
        loss_name: its class, `compute_loss_func` and label smoothing, which a saved run must have again.
    """

    def __init__(self, name: str, trainer: Trainer):
        """Read a Trainer's settings: seed, batches of a step, and the largest norm, None for 0.

        Warn with PeftWarning of arguments of its loop that have no effect here: bf16 and fp16, unless a parameter of
        the model has that dtype, and NEFTune's noise.

        Raises:
            ConfigError: it is no Trainer, or has an optimizer or scheduler already, made for the parameters of another
                model.
        """
        if not hasattr(trainer, "get_train_dataloader"):
            raise ConfigError(
                f"Run '{name}': trainer must be a Trainer of transformers, got {shorten_text(repr(trainer))}."
            )
        if trainer.optimizer is not None or trainer.lr_scheduler is not None:
            raise ConfigError(
                f"Run '{name}': the Trainer has an optimizer already, for the parameters of another model. Make "
                "another Trainer without `optimizers`, and do not train it."
            )
        self.name, self.trainer, self.args = name, trainer, trainer.args
        model: Any = trainer.model
        dtypes = {p.dtype for p in model.parameters()}
        if left := [k for k, dtype in LOOP_ARGUMENTS.items() if getattr(self.args, k, None) and dtype not in dtypes]:
            warn(
                f"Run '{name}': its Trainer's {', '.join(left)} counts for nothing in a joint pass. Load the base in "
                "bfloat16, or train this adapter by its Trainer.",
                PeftWarning,
            )
        self.seed, self.accumulate = int(self.args.seed), int(self.args.gradient_accumulation_steps)
        self.clip = self.args.max_grad_norm or None
        self.loss_name = [type(trainer), trainer.compute_loss_func, self.args.label_smoothing_factor]

    def make_batches(self, draws: Draws) -> tuple[StepBatches, int]:
        """Seed the run's generator as a Trainer does, and return its batches and the optimizer steps that it would
        make. Its loader is made with the run's random states.

        The steps are `max_steps` if it is above 0, else epochs times the steps of an epoch, rounded up. An epoch has
        its batches over `accumulate`, rounded up, and at least one step.
        """
        draws.generator.manual_seed(self.seed)  # a Trainer does so when it is made, which is after its model
        with draws:
            batches = StepBatches(self.trainer, self.trainer.get_train_dataloader(), self.accumulate)
        if self.args.max_steps > 0:
            return batches, int(self.args.max_steps)
        of_epoch = max(1, math.ceil(len(batches.loader) / self.accumulate))
        return batches, math.ceil(self.args.num_train_epochs * of_epoch)

    def optimizer(self, model: nn.Module, parameters: list[nn.Parameter]) -> Optimizer:
        """Return the Trainer's optimizer of these parameters of a model.

        Meanwhile the Trainer has this model, and only these parameters require gradients; both are undone, also after
        an error. The Trainer keeps the optimizer.
        """
        trainer, its_model = self.trainer, self.trainer.model
        trainer.model = model
        try:
            with restrict_training(model, parameters):
                return trainer.create_optimizer()
        finally:
            trainer.model = its_model

    def compute_loss(self, model: nn.Module, model_loss: Loss | None, output: object, batch: Batch) -> Tensor:
        """Return the loss of a batch by the Trainer's `compute_loss`. That gets a stand-in for the model, which returns
        the given output, the run's rows of a joint pass; the model does not run. It also gets a copy of the batch
        without the counts of items and batches.

        The loss is divided by the number of batches in the step unless the Trainer has divided it already: by its
        `loss_is_scaled_for_ga`, else if it counts items or has a `compute_loss_func`.

        model_loss: the loss of one run's rows; None: the model has none.

        Raises:
            ConfigError: `compute_loss` does not call the model.
        """
        trainer: Any = self.trainer
        inputs = {k: v for k, v in batch.items() if k not in (ITEMS, WINDOW)}
        items = batch[ITEMS]
        stands = ModelStandIn(model, self.name, type(trainer).__name__, output, inputs, model_loss)
        value: Tensor = trainer.compute_loss(stands, dict(inputs), num_items_in_batch=items)
        if not stands.called:
            raise ConfigError(
                f"Run '{self.name}': {type(trainer).__name__}.compute_loss did not call the model. Let it call it once."
            )
        is_mean = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
        is_scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        return value if (is_mean if is_scaled is None else is_scaled) else value / batch[WINDOW]


class StepBatches:
    """The batches of a Trainer's loader.

    Each also has the number of items in its step, and the number of batches in its step.
    """

    def __init__(self, trainer: Trainer, loader: DataLoader[object], accumulate: int):
        self.trainer, self.loader, self.accumulate = trainer, loader, accumulate

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one pass through the loader, which reads all batches of a step before the first of them
        is given.
        """
        batches = iter(self.loader)
        while True:
            window, items = self.trainer.get_batch_samples(batches, self.accumulate, self.trainer.args.device)
            if not window:
                return
            for batch in window:
                yield {**batch, ITEMS: items, WINDOW: len(window)}

    def set_epoch(self, epoch: int) -> None:
        """Call `set_epoch` of the loader, if it has that; else do nothing."""
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)


class ModelStandIn:
    """Replaces the model in `compute_loss`.

    It may be called once, and returns the output that a joint pass has computed for the run's batch.

    Attributes:
        called: True after the call.
    """

    def __init__(self, model: nn.Module, run: str, trainer: str, output: Any, batch: Batch, loss: Loss | None):
        """Note the run's rows of the output, its batch, and the loss of a model; None: the output has no loss."""
        self._model, self._who, self._output, self._batch, self._loss = model, (run, trainer), output, batch, loss
        self.called = False

    def __call__(self, **inputs: object) -> object:
        """Return the run's output; with labels, and a model that has a loss, a new output of the same class with `loss`
        first. Nothing is computed but the loss, which gets `num_items_in_batch` if it is passed.

        Sets `called`.

        Raises:
            ConfigError: it is called twice, or with other objects than the batch's, apart from `return_dict` and
                `num_items_in_batch`.
        """
        run, trainer = self._who
        changed = [k for k, v in inputs.items() if k not in (ITEMS, "return_dict") and v is not self._batch.get(k)]
        if self.called or changed:
            what = f"with other inputs ({', '.join(changed)})" if changed else "twice"
            raise ConfigError(
                f"Run '{run}': {trainer}.compute_loss calls the model {what} for a batch, and a joint pass has run it "
                "once, on the batch. Train this adapter by its Trainer."
            )
        self.called = True
        if "labels" not in inputs or self._loss is None:
            return self._output
        items = {ITEMS: inputs[ITEMS]} if ITEMS in inputs else {}
        loss = self._loss(self._output, self._batch, **items)
        return type(self._output)(**{"loss": loss, **{k: v for k, v in self._output.items() if k != "loss"}})

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the model."""
        return getattr(self._model, name)
