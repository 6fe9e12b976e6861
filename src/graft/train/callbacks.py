# SPDX-License-Identifier: Apache-2.0
"""What transformers' Trainer needs: an audit, AdaLoRA's and AdaMSS's allocation after each step, MonteCLoRA's loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from graft import AuditReport, ConfigError, FineGatesModel, LoraModel, audit
from graft.inject.parts import get_registry, unwrap_model
from graft.methods.finegates import sparsity_loss
from graft.methods.lora.lora import monteclora_loss
from graft.model.audit import SECTIONS, find_active_parts
from graft.model.watch import gradients_elsewhere

if TYPE_CHECKING:
    from transformers import TrainerState


def ignore_event(*_: object, **__: object) -> None:
    """Leave an event alone."""


class Listener:
    """A callback of Trainer's, without its base class, which would need transformers: other events do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("on_"):
            return ignore_event
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")


def find_allocator(model: nn.Module) -> Any:
    """Return the tuner of a model that allocates; raise ConfigError if it has none."""
    tuner = getattr(unwrap_model(model), "base_model", None)
    if not hasattr(tuner, "update_and_allocate"):
        raise ConfigError(
            f"Nothing in this {type(model).__name__} moves rank from layer to layer: pass the PeftModel with the "
            "AdaLoRA adapter that trains."
        )
    return tuner


class AdaLoraCallback(Listener):
    """Allocates after each step; `adalora_callback` makes it."""

    def __init__(self, model: nn.Module):
        self.tuner = find_allocator(model)

    def on_optimizer_step(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        self.tuner.update_and_allocate(state.global_step)


def adalora_callback(model: nn.Module) -> AdaLoraCallback:
    """Return a callback for transformers' Trainer: `Trainer(…, callbacks=[graft.train.adalora_callback(model)])`.

    Raises:
        ConfigError: the model has no AdaLoRA.
    """
    return AdaLoraCallback(model)


def allocate_on_step(optimizer: torch.optim.Optimizer, model: nn.Module, start: int = 0) -> RemovableHandle:
    """Make every `optimizer.step()` allocate afterwards. Return a handle whose `remove()` stops that.

    Raises:
        ConfigError: the model has no AdaLoRA.
    """
    tuner, step = find_allocator(model), start

    def allocate(*_: object) -> None:
        nonlocal step
        tuner.update_and_allocate(step)
        step += 1

    return optimizer.register_step_post_hook(allocate)


class AdamssAsaCallback(Listener):
    """Chooses the subspaces of AdaMSS adapters that train: `Trainer(…, callbacks=[AdamssAsaCallback()])`."""

    def on_optimizer_step(
        self, args: object, state: TrainerState, control: object, model: object = None, **kwargs: object
    ) -> None:
        tuner: object = getattr(getattr(model, "module", model), "base_model", None)
        if hasattr(tuner, "update_and_allocate"):
            tuner.update_and_allocate(state.global_step)


class AdapterLossMixin:
    """Before a Trainer among the bases of a class, by one of the following: the loss of adapters beside the model's."""

    tuner_class: type[nn.Module]  # of adapters that have such a loss
    adapter_loss: Callable[[Any], Tensor | float]  # their loss, of a registry

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, object], return_outputs: bool = False, **kwargs: object
    ) -> Tensor | tuple[Tensor, object]:
        """Return the Trainer's loss, in training with that of the adapters added; or (loss, outputs)."""
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        if not model.training:
            return result
        kind = type(self)
        losses = [kind.adapter_loss(get_registry(m)) for m in model.modules() if isinstance(m, kind.tuner_class)]
        loss = sum(losses) / max(1, len(losses)) / count_summed_losses(self, kwargs)
        return (result[0] + loss, result[1]) if return_outputs else result + loss


class MontecloraTrainerMixin(AdapterLossMixin):
    """Before a Trainer among the bases of a class: `class MontecloraTrainer(MontecloraTrainerMixin, Trainer)`."""

    tuner_class, adapter_loss = LoraModel, staticmethod(monteclora_loss)


class FineGatesTrainerMixin(AdapterLossMixin):
    """Before a Trainer among the bases of a class: `class GatesTrainer(FineGatesTrainerMixin, Trainer)`."""

    tuner_class, adapter_loss = FineGatesModel, staticmethod(sparsity_loss)


def count_summed_losses(trainer: Any, arguments: dict[str, object]) -> int:
    """Return how many losses of one step a Trainer adds up as they are: those of batches that accumulate, if each is
    divided by the items of the whole step already."""
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
    """Audit a model in Trainer's hands.

    Args:
        half: float16 is trained by a scaler, which may have skipped the first steps.
        early: the look after the first steps. Small updates are no finding yet, those of 0 are; and a layer without
            gradients may belong to an expert without tokens: the model's own watch says so after some passes.
    """
    model = unwrap_model(model)
    registry = get_registry(model)
    elsewhere = registry is not None and gradients_elsewhere(model, find_active_parts(registry.carriers()))
    report = audit(model, None if elsewhere else optimizer)
    if early:
        waiting = half or optimizer is None or not any([group["lr"] for group in optimizer.param_groups])
        report.not_moved = [part for part in report.not_moved if not (waiting or report.updates[part])]
        if any(report.updates.values()):
            for name in OF_GRADIENTS:
                getattr(report, name).clear()
    return report


def format_report(report: AuditReport, when: str) -> str:
    """Return what a report says in one line."""
    counts = {name: len(getattr(report, name)) for name in SECTIONS}
    sizes = f"updates are {report.range_of_updates()} of their weights" if report.updates else ""
    if report.ok:
        return f"graft, {when}: nothing is wrong with the adapters" + (f"; {sizes}." if sizes else ".")
    wrong = ", ".join(f"{SECTIONS[name][0]} ({n})" for name, n in counts.items() if n)
    return f"graft, {when}: {wrong}" + (f"; {sizes}" if sizes else "") + ". print(watch.report) names them."


class Watch(Listener):
    """Audits the adapters after the first steps and at the end, and prints one line each:
    `Trainer(…, callbacks=[graft.train.Watch()])`. No step waits for it but the one at which it looks.

    Args:
        first: steps before the first look.

    Attributes:
        report: the AuditReport of the last look.
    """

    def __init__(self, first: int = FIRST):
        self.first, self.steps = first, 0
        self.report: AuditReport | None = None

    def on_train_begin(self, args: tuple[object, ...], state: object, control: object, **kwargs: object) -> None:
        self.steps = 0

    def on_optimizer_step(self, args: object, state: TrainerState, control: object, **kwargs: Any) -> None:
        self.steps += 1
        if self.steps == self.first:
            self._audit(args, state, f"after {self.steps} steps", early=True, **kwargs)

    def on_train_end(self, args: object, state: TrainerState, control: object, **kwargs: Any) -> None:
        self._audit(args, state, f"at the end, after {self.steps} steps", early=False, **kwargs)

    def _audit(
        self, args: object, state: TrainerState, when: str, early: bool, model: Any = None, optimizer: Any = None,
        **_: object,
    ) -> None:  # fmt: skip
        self.report = audit_trainer_model(model, optimizer, bool(getattr(args, "fp16", False)), early)
        if state.is_world_process_zero:
            print(format_report(self.report, when), flush=True)
