# SPDX-License-Identifier: Apache-2.0
"""One run, an adapter with its batches, optimizer and schedule: its steps. It knows no other run."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from graft import AdapterNotFoundError, ConfigError
from graft.many.bank import AdapterRow
from graft.many.draws import Draws, States
from graft.many.flat import (
    FlatParameters,
    are_settings_equal,
    can_flatten,
    is_step_hooked,
    order_by_group,
    step_together,
)
from graft.many.joint import RunBatch
from graft.many.loader import Loader, annotate_error
from graft.many.losses import Loss

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

    from graft import PeftConfig

STATES: tuple[str, ...] = ("running", "ended", "stopped", "failed")
RUNNING, ENDED, STOPPED, FAILED = STATES


# settings of an optimizer's group that its state and layout depend on
FIXED = {"params", "initial_lr", "fused", "foreach", "capturable", "differentiable", "decoupled_weight_decay",
         "amsgrad"}  # fmt: skip
WINDOW = "batches_of_this_step"  # a batch may say it, where the end of an epoch leaves fewer
ELSEWHERE = ("base_model_name_or_path", "revision", "peft_version", "auto_mapping")  # of a config: not of the adapter


class BatchResult(NamedTuple):
    """The result of a backward pass for one batch of a run.

    Attributes:
        loss: the value of the loss function, (), detached; undivided and without the loss that the adapter adds.
        outputs: the tensors that the loss function returned with the loss, detached, such as a number per token.
        tokens: number of tokens of the batch.
    """

    loss: Tensor
    outputs: dict[str, Any]
    tokens: int


class StepRecord(NamedTuple):
    """One optimizer step of a run.

    Attributes:
        loss: the mean of its batches, before the step.
        norm: of the gradient, before it is clipped.
    """

    step: int
    loss: float  # before the step; the mean of its batches
    lr: float
    norm: float  # of the gradient, before it is clipped


class ValidationRecord(NamedTuple):
    """One measurement of the loss of validation data, after a number of steps."""

    step: int
    loss: float


@dataclass(eq=False, repr=False, kw_only=True)
class Run:
    """A run of a MultiTrain. `MultiTrain.add` makes it and describes its arguments.

    Attributes:
        step: number of optimizer steps made.
        curve: a record of each step.
        valid: its losses on validation data.
        state: "running", "ended", "stopped" (by its `stop`) or "failed".
        why: in words, why it does not run any more; else None.
        error: the model's error for its batch, if that has ended it in this process.
        until: a step at which it waits; None: it runs to its end. It may be set at any time.
    """

    name: str
    config: PeftConfig
    parameters: list[nn.Parameter]
    draws: Draws
    loader: Loader
    optimizer: Optimizer
    schedule: LRScheduler | None
    loss: Loss | Any  # None: the model has none, and each call gives one
    validation_loss: Loss | Any  # the loss of validation data; None: there is none
    owner: Any  # the MultiTrain that has the run
    seed: int
    loss_name: object  # as JSON has it; None: the model's own loss
    is_loss_scaled: bool
    clip: float | None
    steps: int | None
    accumulate: int
    stop: Callable[[Run], bool] | None
    validation: Iterable[object] | None
    every: int | None
    has_data: bool = True  # False: only `backward` and `step` of the MultiTrain train it

    def __post_init__(self) -> None:
        """Set the state of a new run: `step` 0, `state` "running", and no curve, losses, gradients, row or error; the
        clock starts.

        `settings` and `schedule_settings` get the settings of optimizer and schedule before the first step: of the
        schedule the name of its class and a copy of its `state_dict()`, {} if it has no such method, or None without a
        schedule. `config_values` gets the config's values for files. `draws_in_steps` becomes True for an optimizer
        class outside of torch.optim.
        """
        self._window = self.accumulate  # batches of the step under way
        self.draws_in_steps = not type(self.optimizer).__module__.startswith("torch.optim.")
        self.config_values = {k: v for k, v in self.config.to_file_dict().items() if k not in ELSEWHERE}
        schedule_state: object = copy.deepcopy(getattr(self.schedule, "state_dict", dict)())
        self.schedule_settings = None if self.schedule is None else [type(self.schedule).__name__, schedule_state]
        self.settings = describe_optimizer(self.optimizer)
        self.step, self.state = 0, RUNNING
        self.why: str | None = None
        self.error: Exception | None = None
        self.until: int | None = None
        self.curve: list[StepRecord] = []
        self.valid: list[ValidationRecord] = []
        self.tokens, self.seconds = 0, 0.0  # that it has seen in this process, and since when
        self.losses: list[Tensor] = []  # of the batches of the step under way
        self.bank_order = order_by_group(self.optimizer, self.parameters)  # of the parameters in a bank
        self.row: AdapterRow | Any = None  # its place among those that train now; None: it has none
        self._flat: FlatParameters | None = None  # replaces the parameters in the optimizer
        self._can_flatten = can_flatten(self.optimizer, self.parameters)
        self._sums: list[Tensor | None] | None = None  # gradients of the step under way, unless its row has them
        self._has_sums_in_row = False
        # losses, gradients and random states before this round
        self._saved: tuple[list[Tensor], list[Tensor | None] | None, States | None] | None = None
        self.is_short_of_data = False  # its data ended before its number of steps, or within a step
        self.needs_check = False  # a step, or the end, at which nobody has looked, nor asked `stop`
        self._since = time.perf_counter()

    def __repr__(self) -> str:
        steps = f"{self.step}" if self.steps is None else f"{self.step}/{self.steps}"
        loss = f", loss {self.curve[-1].loss:.4g}" if self.curve else ""
        return f"<Run '{self.name}' {self.config.peft_type.value}: {self.state}, step {steps}{loss}>"

    @property
    def joins_next_round(self) -> bool:
        """Return True if it takes part in the next round: it has data, is running, and has not reached `until`."""
        return self.has_data and self.state == RUNNING and (self.until is None or self.step < self.until)

    @property
    def can_continue(self) -> bool:
        """Return True if it has ended, and now has more steps to make than when it ended; or has no data.

        Runs through their data once cannot.
        """
        if not self.has_data:
            return True
        return self.state == ENDED and self.steps is not None and self.step < self.steps and not self.loader.once

    @property
    def is_validation_due(self) -> bool:
        """Return True if validation data is to be measured: at each step that `every` divides, step 0 included, and
        when it runs no more.

        Never without validation data, nor twice at one step.
        """
        if self.validation is None or (self.valid and self.valid[-1].step == self.step):
            return False
        return self.state != RUNNING or (self.every is not None and self.step % self.every == 0)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the adapter to a folder, as it is now.

        Raises:
            AdapterNotFoundError: the run has been removed with its adapter.
            RuntimeError: a step is under way, in another thread or around a loss that calls this.
        """
        if self.owner[self.name] is not self:
            raise AdapterNotFoundError(f"This run '{self.name}' has been removed. Save a run before you remove it.")
        self.owner.save_adapter(self.name, folder)

    @property
    def lr(self) -> float:
        """The learning rate of the next step: that of the first group of parameters."""
        return float(self.optimizer.param_groups[0]["lr"])

    # a step, in the order of the calls

    def take_batch(self) -> RunBatch | None:
        """Return the next batch of the loader, begun by `begin_batch`, with the number of batches of its step as
        `mean_of`.

        That number is `batches_of_this_step` of the batch, which a Trainer's batches have, else `accumulate`.

        If the data has ended, return None: the step under way is dropped, the run's state becomes "ended" with a
        reason, and `needs_check` becomes True. `is_short_of_data` becomes True if a step was under way, or the run was
        to make `steps`.
        """
        batch = self.loader.next_batch()
        if batch is None:
            early = f", before {self.steps} steps" if self.steps is not None else ""
            unused = f"; {len(self.losses)} of the {self._window} batches of a step were left over, and unused"
            self.is_short_of_data = bool(early or self.losses)
            self.end(ENDED, f"its data ended at step {self.step}{early}{unused if self.losses else ''}")
            self.needs_check = True
            return None
        self._window = batch.get(WINDOW, self.accumulate)
        return self.begin_batch(RunBatch(self.name, batch, mean_of=self._window))

    def begin_batch(self, item: RunBatch) -> RunBatch:
        """Return `item` itself, after `store_gradients`, which moves gradients of earlier batches out of the row.

        `_saved` gets a copy of the list of losses, the summed gradients and, without data, the random states, for
        `undo_round`.
        """
        self.store_gradients()
        self._saved = [*self.losses], self._sums, None if self.has_data else self.draws.states
        return item

    def store_gradients(self) -> None:
        """If the row has the sums, set `_sums` to the row's `copy_gradients()` and `_has_sums_in_row` to False."""
        if self._has_sums_in_row:
            self._sums, self._has_sums_in_row = self.row.copy_gradients(), False

    def undo_round(self) -> None:
        """After an error: restore losses, summed gradients and random states from `_saved`, which becomes None; the
        sums are then not in the row.

        A run with data gives its batch back to the loader, which restores the random states. Nothing happens if the
        batch has become a step, or no batch was begun.
        """
        if self._saved is not None:
            self._has_sums_in_row = False
            (self.losses, self._sums, states), self._saved = self._saved, None
            if states is None:
                self.loader.return_batch()
            else:
                self.draws.states = states

    def finish_round(self) -> None:
        """Set `_saved` to None, so that `undo_round` does nothing from now on."""
        self._saved = None

    def runs_user_loss(self, item: RunBatch) -> bool:
        """Return True if a function of the user computes the loss of this batch, not the model."""
        return self.loss_name is not None or item.loss is not None

    def compute_loss(self, output: object, item: RunBatch, auxiliary: Any, tokens: int) -> tuple[Tensor, BatchResult]:
        """Return the value to differentiate and the result.

        The value is the loss plus `auxiliary`, over `item.mean_of`; a Trainer's loss is already divided, and a number
        as `auxiliary` is ignored. The result has the undivided loss and the outputs, detached, and `tokens`.

        The loss function is `item.loss`, or else the run's. It returns the loss, or (loss, mapping of names to tensors
        or other values). One of the user draws from the run's random states. Errors of it get a note with the run's
        name.

        auxiliary: the loss that the adapter adds, a tensor, or a number if it adds none.

        Raises:
            ConfigError: the loss is no tensor of shape (), or no gradient leads to it.
        """
        try:
            with self.draws if self.runs_user_loss(item) else nullcontext():
                loss: Any = (item.loss or self.loss)(output, item.batch)
        except Exception as error:
            annotate_error(error, f"Run '{self.name}': its loss raised this.")
            raise
        outputs: Mapping[str, Any] = {}
        if isinstance(loss, tuple) and len(loss) == 2 and isinstance(loss[1], Mapping):
            loss, outputs = loss
        if not isinstance(loss, Tensor) or loss.dim():
            fault = f"has the shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"is {loss!r}"
            raise ConfigError(f"Run '{self.name}': its loss {fault}. Return a mean, a tensor ().")
        value = loss if self.is_loss_scaled or item.mean_of == 1 else loss / item.mean_of
        if isinstance(auxiliary, Tensor):
            value = value + auxiliary / item.mean_of
        if not value.requires_grad:
            raise ConfigError(
                f"Run '{self.name}': no gradient leads from its loss to the adapter. Compute it from the output's "
                "tensors, without detach(), item() or no_grad()."
            )
        outputs = {key: v.detach() if isinstance(v, Tensor) else v for key, v in outputs.items()}
        return value, BatchResult(loss.detach(), outputs, tokens)

    def set_row(self, row: AdapterRow | None) -> None:
        """Take a row among the runs that train now; None: leave it.

        `store_gradients` comes first, so that gradients of the step under way are kept.

        If the optimizer has its parameters and may be flattened, a row in a bank gives it vectors in their place
        (`_flat`). If it has vectors, a row in a bank moves them there, and a row in no bank gives it its parameters
        back for good. With None, its vectors become empty. Otherwise the optimizer stays as it is.
        """
        self.store_gradients()
        self.row, flat = row, self._flat
        if flat is None:
            if row is not None and row.value is not None and self._can_flatten:
                self._flat = FlatParameters.try_flatten(self.optimizer, row)
        elif row is None:
            flat.detach_row()
        elif row.value is None:
            self._restore_parameters()
        else:
            flat.attach_row(row)

    def leave_row(self) -> None:
        """Leave the row, and give the optimizer its original parameters and their state until the next row."""
        self._restore_parameters(for_good=False)
        self.set_row(None)

    def _restore_parameters(self, for_good: bool = True) -> None:
        """Give the optimizer its original parameters, and set `_flat` to None.

        With `for_good` it is never flattened again (`_can_flatten` False), also if it was not flattened now.
        """
        if self._flat is not None:
            self._flat.restore_parameters()
        self._flat, self._can_flatten = None, self._can_flatten and not for_good

    def record_loss(self, loss: Tensor, tokens: int) -> None:
        """Append the detached loss of a batch to `losses` after its backward pass, and add the gradients of the step's
        earlier batches to the row. From then on the row has the sums: `_sums` becomes None and `_has_sums_in_row` True.
        `tokens` of the run rises by those of the batch.
        """
        self.tokens += tokens
        self.losses.append(loss.detach())
        if self._sums is not None:
            self.row.add_gradients(self._sums)
        self._sums, self._has_sums_in_row = None, True

    def load_gradients(self) -> None:
        """Move the gradients of the step under way into the row, unless `_has_sums_in_row` says that they are there.

        All of the row's are first marked as not received, so that those of the last pass are replaced; without stored
        ones none is received. `_sums` becomes None.
        """
        if not self._has_sums_in_row:
            self.row.received = [False] * len(self.row.received)
            self.row.add_gradients(self._sums or ())
            self._sums, self._has_sums_in_row = None, True

    @property
    def is_step_due(self) -> bool:
        """Return True if all batches of a step are there."""
        return len(self.losses) == self._window

    @property
    def step_loss(self) -> Tensor:
        """The sum of the losses of the step's batches, (); each is divided by their number already.

        A single loss is returned as it is; there must be one.
        """
        return self.losses[0] if len(self.losses) == 1 else torch.stack(self.losses).sum()

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Raise ConfigError unless these settings can be set in the optimizer. Nothing changes.

        The optimizer has to have each of them, apart from those in `FIXED`, with one value for all groups of
        parameters. `lr` is refused if there is a schedule. For a class in torch.optim, a new optimizer is made with the
        values, and its TypeError or ValueError refuses them.
        """
        kind, groups = type(self.optimizer), self.optimizer.param_groups
        known, fault = groups[0].keys() - FIXED, ""
        if unknown := [key for key in settings if key not in known]:
            fault = f"its {kind.__name__} has no setting '{unknown[0]}' to change. It has {', '.join(sorted(known))}."
        elif mixed := [key for key in settings if any(group[key] != groups[0][key] for group in groups)]:
            fault = f"groups of its parameters have different {mixed[0]}. Set them in run.optimizer.param_groups."
        elif "lr" in settings and self.schedule is not None:
            fault = "its schedule sets lr. Leave lr out, or add the run without schedule."
        elif settings and kind.__module__.startswith("torch.optim."):
            try:
                kind([nn.Parameter(torch.empty(1))], **settings)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"Run '{self.name}': {error}. Pass another value.") from error
        if fault:
            raise ConfigError(f"Run '{self.name}': {fault}")

    def prepare_step(self, length: Tensor) -> None:
        """Give the optimizer the row's gradients, and clip them to `clip` by their norm, unless that is None.

        If a gradient is missing or the optimizer's steps have hooks, the optimizer gets its parameters back for good.
        Without vectors, the `grad` of each parameter is set, None for one that got no gradient.

        length: the norm of the gradient, (), on the device.
        """
        row = self.row
        # an optimizer leaves parameters without a gradient as they are
        if not row.is_complete or is_step_hooked(self.optimizer):
            self._restore_parameters()
        if self._flat is None:
            for p, grad, got in zip(row.parameters, row.gradients, row.received):
                p.grad = grad if got else None
        elif any([vector.grad is None for vector in self._flat.vectors]):  # by zero_grad
            self._flat.attach_row(row)
        if self.clip is not None:
            clip_grads_with_norm_(self.parameters if self._flat is None else self._flat.vectors, self.clip, length)

    def finish_step(self, loss: float, norm: float, lr: float) -> None:
        """After the optimizer's step: make the schedule's, drop the gradients, add a record to `curve`, and end the run
        after its last step.

        With vectors the gradients stay in the row, and the versions of the parameters rise. `step` rises, the step's
        losses are dropped, and `needs_check` becomes True for a run with data.
        """
        if self.schedule is not None:
            self.schedule.step()
        if self._flat is None:
            for p in self.parameters:
                p.grad = None
        else:
            increment_version(self.parameters)  # caches of values computed from them see that they have changed
        self.step += 1
        self.curve.append(StepRecord(self.step, loss, lr, norm))
        self.drop_partial_step()
        self.needs_check = self.has_data
        if self.steps is not None and self.step >= self.steps:
            self.end(ENDED, f"{self.step} steps")

    def can_step_with(self, other: Run) -> bool:
        """Return True if one call of either optimizer can make the steps of both runs: both have vectors, and equal
        classes and settings.
        """
        both_flat = self._flat is not None and other._flat is not None
        return both_flat and are_settings_equal(self.optimizer, other.optimizer)

    def gradients(self) -> list[Tensor | None] | None:
        """Return by parameter, in the model's order, the summed gradients of the step under way; None if it has no loss
        so far. Without stored sums they are copies of the row's gradients, and None for a parameter that got none.
        """
        if not self.losses:
            return None
        gradients = self._sums if self._sums is not None else self.row.copy_gradients()
        sums = {id(p): grad for p, grad in zip(self.bank_order, gradients)}
        return [sums[id(p)] for p in self.parameters]

    def restore_partial_step(self, losses: list[Tensor], gradients: list[Tensor | None] | None) -> None:
        """Set losses and gradients of a step under way, as `losses` and `gradients` gave them, on the device of the
        parameters. Gradients are stored in `_sums`, in the bank's order, not in the row. None leaves the stored
        gradients as they are.
        """
        self.losses = [loss.to(self.parameters[0].device) for loss in losses]
        if gradients is not None:
            sums = {id(p): None if g is None else g.to(p.device) for p, g in zip(self.parameters, gradients)}
            self._sums, self._has_sums_in_row = [sums[id(p)] for p in self.bank_order], False

    def optimizer_state_dict(self) -> dict[str, object]:
        """Return the optimizer's `state_dict` by original parameter, also while it has vectors."""
        with nullcontext() if self._flat is None else self._flat.show_parameters():
            return self.optimizer.state_dict()

    def drop_partial_step(self) -> None:
        """Forget `losses` and summed gradients of the step under way, those in the row, too (`_has_sums_in_row` False).

        `undo_round` does nothing from now on. The row's memory stays.
        """
        self.losses, self._sums, self._saved, self._has_sums_in_row = [], None, None, False

    def end(self, state: str, why: str) -> None:
        """Drop the step under way, set `state` and `why`, and set `seconds` to the time since the run was made."""
        self.drop_partial_step()
        self.state, self.why = state, why
        self.seconds = time.perf_counter() - self._since

    def fail(self, why: str, loss: float) -> str:
        """End the run as failed before its next step, with the values after the last one.

        Return the text of the error, which is also `why`.
        """
        text = f"Run '{self.name}' failed at step {self.step + 1}: {why} (loss {loss:g}, lr {self.lr:g})."
        self.end(FAILED, text)
        return text

    @property
    def tokens_per_second(self) -> float:
        """Tokens of this run in this process over the seconds since it was made, or until it ended; 0.0 if no time has
        passed.
        """
        seconds = self.seconds or time.perf_counter() - self._since
        return self.tokens / seconds if seconds else 0.0


DueStep = tuple[Run, float, float, Tensor]  # a run, loss and norm of its step, and the norm on the device


def make_steps(runs: Iterable[DueStep]) -> None:
    """Make a step of each run: clip its gradients, step optimizer and schedule, and add a record to its `curve` with
    the learning rate before the schedule's step.

    Runs with equal optimizers on vectors step by one call, without a change of results. All gradients are clipped
    before the first step. Optimizers not of torch draw from the run's random states.

    Args:
        runs: each with finite loss and norm of its gradient, and the norm as a tensor () on the device.

    Raises:
        BaseException: the error of an optimizer or schedule, with a note. The runs that shared its call and have not
            finished have then failed, and those after it have made no step.
    """
    by_rate: dict[float, list[list[DueStep]]] = {}  # the rate is the setting that differs most often
    for item in runs:
        run = item[0]
        run.prepare_step(item[3])
        groups = by_rate.setdefault(run.lr, [])
        group = next((group for group in groups if group[0][0].can_step_with(run)), None)
        if group is None:
            groups.append([item])
        else:
            group.append(item)
    for group in (group for groups in by_rate.values() for group in groups):
        run, rates = group[0][0], [run.lr for run, *_ in group]
        try:
            with run.draws if run.draws_in_steps else nullcontext():
                step_together([run.optimizer for run, *_ in group])
            for (run, loss, norm, _), lr in zip(group, rates):
                run.finish_step(loss, norm, lr)
        except BaseException as error:
            why = f"an error stopped its optimizer or schedule in the middle ({error!r})"
            for run, loss, *_ in group:
                if run.losses:  # it has not finished
                    annotate_error(error, run.fail(why, loss))
            raise


def describe_optimizer(optimizer: Optimizer) -> list[dict[str, object]]:
    """Return for each group of an optimizer its settings, and the number of its parameters as `parameters`, in place of
    `params`.

    Tensors () become numbers, since schedules change rates in place.
    """
    return [
        {
            "parameters": len(group["params"]),
            # a rate may be a tensor (), which schedules change in place
            **{k: v.item() if isinstance(v, Tensor) and not v.dim() else v for k, v in group.items() if k != "params"},
        }
        for group in optimizer.param_groups
    ]
