# SPDX-License-Identifier: Apache-2.0
"""Callbacks and mixins for transformers' Trainer: an audit, the allocation of AdaLoRA and AdaMSS after each step, and
losses of adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from graft import AuditReport, ConfigError, FineGatesModel, LoraModel, audit
from graft.inject.parts import get_registry, unwrap_model

if TYPE_CHECKING:
    from transformers import TrainerState


def ignore_event(*_: object, **__: object) -> None:
    """Do nothing: the answer to an event of Trainer's that a callback does not handle."""


class Listener:
    """A callback of Trainer's without its base class, which needs transformers. Events without a method do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Return `ignore_event` for names that begin with "on_". Raise AttributeError for others."""
        if name.startswith("on_"):
            return ignore_event
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")


def find_allocator(model: nn.Module) -> Any:
    """Return the tuner (`base_model`) of a model within wrappers, which has `update_and_allocate`.

    Raise ConfigError if it has none.
    """
    tuner = getattr(unwrap_model(model), "base_model", None)
    if not hasattr(tuner, "update_and_allocate"):
        raise ConfigError(
            f"Nothing in this {type(model).__name__} moves rank from layer to layer. Pass the PeftModel with the "
            "AdaLoRA adapter that trains."
        )
    return tuner


class AdaLoraCallback(Listener):
    """Calls `update_and_allocate` of a model after each step; `adalora_callback` makes it."""

    def __init__(self, model: nn.Module):
        """Note the model's tuner. Raises ConfigError if it does not allocate."""
        self.tuner = find_allocator(model)

    def on_optimizer_step(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        """Call the tuner's `update_and_allocate` with the Trainer's `global_step`."""
        self.tuner.update_and_allocate(state.global_step)


def adalora_callback(model: nn.Module) -> AdaLoraCallback:
    """Return a callback for transformers' Trainer that allocates ranks after each optimizer step: `Trainer(…,
    callbacks=[graft.train.adalora_callback(model)])`.

    Raises:
        ConfigError: the model has no AdaLoRA.
    """
    return AdaLoraCallback(model)


def allocate_on_step(optimizer: torch.optim.Optimizer, model: nn.Module, start: int = 0) -> RemovableHandle:
    """Register a hook that allocates ranks after every `optimizer.step()`, with steps counted from `start`.

    Return a handle; its `remove()` ends that.

    Raises:
        ConfigError: the model has no AdaLoRA.
    """
    tuner, steps = find_allocator(model), count(start)
    return optimizer.register_step_post_hook(lambda *_: tuner.update_and_allocate(next(steps)))


class AdamssAsaCallback(Listener):
    """Chooses the subspaces of AdaMSS adapters that train: `Trainer(…, callbacks=[AdamssAsaCallback()])`."""

    def on_optimizer_step(
        self, args: object, state: TrainerState, control: object, model: object = None, **kwargs: object
    ) -> None:
        """Call `update_and_allocate` of the tuner of Trainer's model with Trainer's `global_step`.

        The tuner is the attribute `base_model` of the model's `module`, where the model has that attribute, and else of
        the model. Without that attribute or the tuner's method nothing happens.
        """
        tuner: object = getattr(getattr(model, "module", model), "base_model", None)
        if hasattr(tuner, "update_and_allocate"):
            tuner.update_and_allocate(state.global_step)


class AdapterLossMixin:
    """Adds losses of adapters to a Trainer's loss. Its subclasses come before a Trainer among the bases of a class.

    Attributes:
        tuner_class: of the adapters that have such a loss.
        loss_name: of the tuner's function that returns their loss.
    """

    tuner_class: type[nn.Module]  # of adapters that have such a loss
    loss_name: str

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, object], return_outputs: bool = False, **kwargs: object
    ) -> Tensor | tuple[Tensor, object]:
        """Return the Trainer's loss, or (loss, outputs).

        While the model is in training mode, the mean of the losses of all its tuners of `tuner_class` is added, over
        `count_summed_losses`. Without such tuners 0 is added.
        """
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        if not model.training:
            return result
        kind = type(self)
        losses = [getattr(m, kind.loss_name)() for m in model.modules() if isinstance(m, kind.tuner_class)]
        loss = sum(losses) / max(1, len(losses)) / count_summed_losses(self, kwargs)
        return (result[0] + loss, result[1]) if return_outputs else result + loss


class MontecloraTrainerMixin(AdapterLossMixin):
    """Adds MonteCLoRA's loss: `class MontecloraTrainer(MontecloraTrainerMixin, Trainer)`."""

    tuner_class, loss_name = LoraModel, "_get_monteclora_loss"


class FineGatesTrainerMixin(AdapterLossMixin):
    """Adds the sparsity loss of FineGates: `class GatesTrainer(FineGatesTrainerMixin, Trainer)`."""

    tuner_class, loss_name = FineGatesModel, "_get_finegates_loss"


def count_summed_losses(trainer: Any, arguments: dict[str, object]) -> int:
    """Return the number of losses in a step that a Trainer adds up without dividing by their number: those of
    accumulated batches, if each is divided by the items of the whole step; else 1. `loss_is_scaled_for_ga` of the
    Trainer tells that. Without it, it is so for a `compute_loss_func`, or for `num_items_in_batch` in `arguments` if
    `model_accepts_loss_kwargs`. The number is `current_gradient_accumulation_steps`.
    """
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        counts = arguments.get("num_items_in_batch") is not None
        scaled = counts and getattr(trainer, "model_accepts_loss_kwargs", False)
        scaled = scaled or getattr(trainer, "compute_loss_func", None) is not None
    return int(getattr(trainer, "current_gradient_accumulation_steps", 1)) if scaled else 1


# an audit


FIRST = 3  # steps before the first look: a schedule may begin at 0
OF_GRADIENTS = ("no_gradient", "zero_gradient")


def audit_trainer_model(model: nn.Module, optimizer: torch.optim.Optimizer, half: bool, early: bool) -> AuditReport:
    """Return an audit of a model in Trainer's hands.

    Gradients and optimizer are left out if another tool keeps them elsewhere.

    Args:
        half: float16 is trained with a scaler, which may have skipped the first steps.
        early: the audit after the first steps. Small updates are no finding yet. Updates of 0 are, unless `half`, a
            rate of 0 or a missing optimizer explains them. Missing and zero gradients count only if nothing moved: the
            layer may be an expert without tokens.
    """
    model = unwrap_model(model)
    registry = get_registry(model)
    elsewhere = registry is not None and registry.are_gradients_elsewhere()
    report = audit(model, None if elsewhere else optimizer)
    if early:
        waiting = half or optimizer is None or not any([group["lr"] for group in optimizer.param_groups])
        report.not_moved = [part for part in report.not_moved if not (waiting or report.updates[part])]
        if any(report.updates.values()):
            for name in OF_GRADIENTS:
                getattr(report, name).clear()
    return report


def format_report(report: AuditReport, when: str) -> str:
    """Return a report in one line: that nothing is wrong, or the kinds of findings with their numbers and a hint to
    print the report. If it has updates, their range relative to the weights is added. when: such as "after 3 steps".
    """
    sizes = f"updates are {report.range_of_updates()} of their weights" if report.updates else ""
    if report.ok:
        return f"graft, {when}: nothing is wrong with the adapters" + (f"; {sizes}." if sizes else ".")
    wrong = ", ".join(f"{fault} ({n})" for fault, n in report.count_findings().items())
    return f"graft, {when}: {wrong}" + (f"; {sizes}" if sizes else "") + ". print(watch.report) names them."


class Watch(Listener):
    """Audits the adapters after the first steps and at the end of training, and prints one line each: `Trainer(…,
    callbacks=[graft.train.Watch()])`. Only the step with the audit waits for it.

    Args:
        first: steps before the first audit.

    Attributes:
        report: the AuditReport of the last audit; None before.
    """

    def __init__(self, first: int = FIRST):
        """Note the number of steps before the first audit."""
        self.first, self.steps = first, 0
        self.report: AuditReport | None = None

    def on_train_begin(self, args: tuple[object, ...], state: object, control: object, **kwargs: object) -> None:
        """Begin to count steps at 0."""
        self.steps = 0

    def on_optimizer_step(self, args: object, state: TrainerState, control: object, **kwargs: Any) -> None:
        """Count the step; after step number `first` and no other, make the early audit."""
        self.steps += 1
        if self.steps == self.first:
            self._audit(args, state, f"after {self.steps} steps", early=True, **kwargs)

    def on_train_end(self, args: object, state: TrainerState, control: object, **kwargs: Any) -> None:
        """Audit the model at the end, whatever the number of steps: small updates and missing gradients count now."""
        self._audit(args, state, f"at the end, after {self.steps} steps", early=False, **kwargs)

    def _audit(
        self, args: object, state: TrainerState, when: str, early: bool, model: Any = None, optimizer: Any = None,
        **_: object,
    ) -> None:  # fmt: skip
        """Audit the model and set `report`; with `fp16` of the arguments as `half`.

        The first process prints it in a line.
        """
        self.report = audit_trainer_model(model, optimizer, bool(getattr(args, "fp16", False)), early)
        if state.is_world_process_zero:
            print(format_report(self.report, when), flush=True)
