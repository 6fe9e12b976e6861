# SPDX-License-Identifier: Apache-2.0
"""MultiTrain: many adapters train at once on one base, each with the results of a training of one adapter."""

from __future__ import annotations

import copy
import inspect
import math
import os
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graft import (
    AdapterNameError,
    AdapterNotFoundError,
    CheckpointError,
    ConfigError,
    PeftConfig,
    PeftModel,
    PeftWarning,
    get_peft_model,
    method_of,
)
from graft.config.base import add_task_heads, check_config
from graft.core.errors import join_some, shorten_text, warn
from graft.inject.parts import check_adapter_name, get_registry
from graft.io.files import AdapterSnapshot
from graft.many import run_file
from graft.many.bank import Banks
from graft.many.claims import Claims
from graft.many.draws import Draws
from graft.many.fanout import are_batches_equal, find_fan, repeat_inputs
from graft.many.joint import ForwardArguments, OutputSplitter, RunBatch, divide_passes, find_main_argument, join_batches
from graft.many.loader import Loader, annotate_error, shares_position
from graft.many.losses import Loss, find_model_loss
from graft.many.run import RUNNING, STOPPED, BatchResult, DueStep, Run, StepRecord, ValidationRecord, make_steps
from graft.many.table import Progress
from graft.many.trainer import TrainerDescription

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import Trainer

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., object])
LOOP_ONLY = ("steps", "accumulate", "stop", "valid", "every")  # arguments of `add` for runs with data
AT_ONCE = 4096  # tokens of a pass: more at once are no faster on a CPU


CALLED = {  # by the name that Trainer has for it
    "learning_rate": "lr", "max_grad_norm": "clip", "gradient_accumulation_steps": "accumulate", "max_steps": "steps",
}  # fmt: skip


def list_names(names: Iterable[str]) -> str:
    """Return sorted names for an error, each in quotes.

    A name of Trainer's gets the name it has here: `'max_steps' (here 'steps')`.
    """
    return ", ".join(f"'{name}'" + (f" (here '{CALLED[name]}')" if name in CALLED else "") for name in sorted(names))


def refuse_within_step(method: F) -> F:
    """Decorate a method of MultiTrain that must not run during a step, in any thread.

    The call holds the lock of steps. It waits for calls of other threads, but not for a step of the loop: that raises
    RuntimeError. A `stop` may make the call, a loss may not. An unknown keyword raises TypeError.
    """

    known = inspect.signature(method).parameters

    @wraps(method)
    def call_method(self: MultiTrain, *args: object, **kwargs: object) -> object:
        """Call the method under the lock of steps.

        Raises:
            TypeError: a keyword is unknown; the text names the method's arguments, for `add` how to pass the
                optimizer's.
            RuntimeError: this thread is within a pass, such as in a loss, or the loop of another thread is in a step.
        """
        if unknown := kwargs.keys() - known.keys():
            remedy = f"It takes {', '.join([*known][1:]) or 'nothing'}."
            if method.__name__ == "add":
                remedy = "An optimizer gets its arguments by optimizer=partial(torch.optim.AdamW, lr=1e-3)."
            raise TypeError(f"MultiTrain.{method.__name__}() takes no {list_names(unknown)}. {remedy}")
        with self.lock_steps():
            return method(self, *args, **kwargs)

    return call_method  # type: ignore[return-value]


@dataclass
class Step:
    """One round: a batch of each run that takes part.

    Attributes:
        losses: by run, of those that made an optimizer step.
        ended: by run, the reason why it does not run any more.
        valid: by run, of those that measured their validation data.
    """

    number: int
    losses: dict[str, float] = field(default_factory=dict)  # by run, of those that made an optimizer step
    ended: dict[str, str] = field(default_factory=dict)  # why, by run, of those that go on no more
    valid: dict[str, float] = field(default_factory=dict)  # by run, of those that looked at their validation data


@dataclass(eq=False)
class BackwardCall:
    """One call of `MultiTrain.backward`. `result` has its results by run, or its error, once it has been made."""

    batches: dict[str, Mapping[str, Any]]
    loss: Callable[..., object] | None
    mean_of: int
    result: Future[dict[str, BatchResult]] = field(default_factory=Future)


class MultiTrain:
    """Many adapters trained at once on one base. The results of a run do not depend on the other runs.

    Iterate over it for one `Step` at a time, or call `run`. A run that `add` got no data for is trained by calls, such
    as those of reinforcement learning:

    - `add(name, config, optimizer=…, clip=…, seed=…)` returns the Run.
    - `backward({name: batch, …}, loss=None, mean_of=1)` returns {name: BatchResult}. Gradients add up until `step`.
    - `gradient_norm(name)` returns a float.
    - `step(name, lr=…, …)` makes one optimizer step, empties the gradients and returns a StepRecord.
    - `snapshot(name)` returns an AdapterSnapshot, a copy for a sampler.
    - `save_run(name, folder)` and `load_run(name, folder)` write and restore the whole state of a run.

    Any threads may make these calls. A call waits while another is under way; all `backward` calls that wait share
    passes. The values of a run have the bits of a plain loop that makes its calls alone. The loop makes its passes and
    steps by the same code. A thread that uses `model` itself, for example to sample, does so `with runs.lock_steps():`.
    So does one that seeds torch's generator, which dropout uses during a pass.

    Args:
        model: the base model, which gets the adapters; or a PeftModel with adapters that may become runs.
        at_once: tokens (with padding) of a joint pass. No result depends on it; memory and speed do.
        exact: batches with other lengths, or with padding, take separate passes: in a joint pass they would round
            differently, and drop other inputs. A collator that pads all to one length makes them share a pass. False:
            they share one, padded here.
        base_in_eval: run the base in eval mode, without its own dropout, and only adapters and heads in training mode.

    Attributes:
        model: the PeftModel; None before the first run.

    Raises:
        ConfigError: the base drops inputs, from a generator that all runs would share; or its output for a row depends
            on the other rows of the batch.
    """

    def __init__(self, model: nn.Module, *, at_once: int = AT_ONCE, exact: bool = True, base_in_eval: bool = False):
        """Note the base, its arguments and the mode of each module.

        Nothing changes in the model. A PeftModel is kept as `model`; for any other module `model` is None until a run
        is added.

        Raises:
            ConfigError: `model` is no module or has a prompt, or `at_once` is no positive int. Or the base has dropout
                and `base_in_eval` is False, or rows of a batch affect each other in it. Modules of adapters are not
                looked at.
        """
        registry = get_registry(model)  # raises if it is no model
        for name, cfg in () if registry is None else registry.peft_config.items():
            if cfg.is_prompt_learning:
                raise ConfigError(f"MultiTrain: adapter '{name}' is a prompt. Pass the model's get_base_model().")
        if type(at_once) is not int or at_once < 1:
            raise ConfigError(f"MultiTrain: at_once must be a positive int, got {at_once!r}.")
        self.model: PeftModel | None = model if isinstance(model, PeftModel) else None
        self.base: nn.Module = model if self.model is None else self.model.get_base_model()
        self.at_once, self.base_in_eval = at_once, base_in_eval
        self._arguments = ForwardArguments.read_signature(self.base, exact)
        self.folder: str | None = None  # of runs to go on with
        self.claims = Claims()  # on the files that `save` writes
        self._runs: dict[str, Run] = {}
        self._banks = Banks({}, ())
        self._fans: dict[tuple[str, ...], list[nn.Module]] = {}  # by the runs of a pass, since one came or went
        self._number = 0
        self._lock = threading.RLock()  # held by `lock_steps`
        self._batch_errors: dict[str, Exception] = {}  # by run, the error of its batch in this round
        self._loss_errors: dict[str, Exception] = {}  # the same, of a loss that the user gave
        self._results: dict[str, BatchResult] = {}  # by run, of the passes of this round
        self._waiting: deque[BackwardCall] = deque()  # calls of all threads that no pass has taken yet
        self._is_in_pass = False  # some runs have taken their batch of a round, and others have not
        self._stepping = False
        self._is_base_checked = False  # a pass has shown that the base draws no random numbers
        self._modes = [(m, m.training) for m in self.base.modules()]
        of_adapters = {id(m) for m in self._list_adapter_modules()}
        parts = {key: m for key, m in self.base.named_modules() if id(m) not in of_adapters}
        refuse_shared_randomness_and_rows(parts, base_in_eval)

    @classmethod
    def resume(cls, model: nn.Module, folder: str | os.PathLike[str], **options: Any) -> MultiTrain:
        """Return a MultiTrain on the folder of `save`.

        Its `add` continues a run that the folder has, and begins any other.

        Add each run as it was added first; those that are not added stay in the folder unchanged.

        Args:
            options: as of MultiTrain.

        Raises:
            CheckpointError: the folder holds no run, or is not there. And the errors of MultiTrain, which come first.
        """
        runs = cls(model, **options)
        runs.folder = os.fspath(folder)
        if not run_file.list_runs(runs.folder):
            raise CheckpointError(f"{runs.folder} holds no run. Pass a folder of MultiTrain.save().")
        return runs

    # runs

    def __getitem__(self, name: str) -> Run:
        """Return the run of a name. Raises AdapterNotFoundError, with the names of all runs, if there is none."""
        if name not in self._runs:
            raise AdapterNotFoundError(f"There is no run '{name}'. Runs: {', '.join(self._runs) or 'none'}.")
        return self._runs[name]

    def __contains__(self, name: object) -> bool:
        return name in self._runs

    def __len__(self) -> int:
        return len(self._runs)

    def __bool__(self) -> bool:
        """Return True, also without runs."""
        return True

    def __repr__(self) -> str:
        return f"MultiTrain({type(self.base).__name__}, runs={self.list_runs()})"

    def list_runs(self) -> list[Run]:
        """Return all runs in the order of `add`, ended ones included."""
        return list(self._runs.values())

    @property
    def names(self) -> list[str]:
        """The names of all runs, in the order of `add`."""
        return list(self._runs)

    @refuse_within_step
    def add(
        self,
        name: str,
        config: PeftConfig | None = None,
        *,
        data: Iterable[object] | None = None,
        optimizer: Callable[[list[nn.Parameter]], Optimizer] = torch.optim.AdamW,
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        loss: Loss | None = None,
        clip: float | None = None,
        steps: int | None = None,
        accumulate: int = 1,
        seed: int = 0,
        stop: Callable[[Run], bool] | None = None,
        valid: Iterable[object] | None = None,
        every: int | None = None,
        heads: dict[str, nn.Module] | Callable[[], dict[str, nn.Module]] | None = None,
        trainer: Trainer | None = None,
    ) -> Run:
        """Add a run.

        It has the results of a separate program that begins with `torch.manual_seed(seed)`, makes the adapter, then the
        optimizer, and iterates over `data`.

        If `resume` found this run in its folder, the run continues there. The adapter's parameters require gradients
        afterwards, and the cache of fans is emptied.

        Args:
            name: of the run and its adapter.
            config: of the adapter; a copy is used. None: the model has an adapter of this name.
            data: batches, mappings of the model's arguments and labels to tensors; iterated again until the steps are
                made. None: `backward` and `step` train the run, and the loop leaves it out.
            optimizer: makes the optimizer of the adapter's parameters, such as `partial(AdamW, lr=1e-3)`.
            schedule: makes the schedule of the optimizer; it steps after each optimizer step.
            loss: of (the output of the run's rows, its batch), a mean; None: the model's own.
            clip: the largest norm of the gradient.
            steps: optimizer steps; None: one pass over the data.
            accumulate: batches of a step.
            seed: of initial values, dropout, and the order of a loader without a generator.
            stop: called with the run after each step and each validation; True ends the run.
            valid: validation data. Its mean loss is measured every `every` steps and at the end of the run.
            heads: as of `get_peft_model`, or a function that returns them.
            trainer: a Trainer of transformers, made with the base or a copy, which replaces `data` to `seed`. Its
                loader, optimizer, schedule and `compute_loss` are used; its loop does not run.

        Raises:
            AdapterNameError: another run, or an adapter, has this name.
            ConfigError: a setting is invalid; `trainer` is passed with a setting that it replaces; without data,
                `steps`, `accumulate`, `stop`, `valid` or `every` is passed; `every` has no `valid` to iterate again.
                Also if another run uses the same iterator, the method is prompt learning or has a loss of labels, or
                the model has no loss. Also if an adapter changes the base (PiSSA, bias="all"), or the run was saved
                with other settings.
            BaseModelMismatchError: the run was saved with another base.
            CheckpointError: the run's file is damaged. And the errors of `add_adapter`. The model is then as it was.
        """
        check_adapter_name(name)
        if config is not None:
            check_config(config)
        if name in self._runs:
            raise AdapterNameError(f"There is a run '{name}' already. Give this one another name.")
        options: dict[str, object] = {"data": data, "optimizer": optimizer, "schedule": schedule, "loss": loss}
        options |= {"clip": clip, "steps": steps, "accumulate": accumulate, "seed": seed}
        options |= {"stop": stop, "valid": valid, "every": every}
        passed = [key for key, value in options.items() if value is not ADD_DEFAULTS[key]]
        description: TrainerDescription | None = None
        has_data = data is not None or trainer is not None
        if trainer is not None:
            if both := [key for key in passed if key not in ("stop", "valid", "every")]:
                raise ConfigError(f"Run '{name}': its trainer sets {', '.join(both)}. Leave that out.")
            description = TrainerDescription(name, trainer)
            seed, accumulate, clip = description.seed, description.accumulate, description.clip
        elif not has_data and (loop_only := [key for key in passed if key in LOOP_ONLY]):
            raise ConfigError(f"Run '{name}' has no data, so {', '.join(loop_only)} cannot be used. Pass data.")
        check_settings(name, clip=clip, steps=steps, accumulate=accumulate, every=every)
        if not callable(optimizer):
            check_optimizer_and_schedule(name, optimizer, None, [])
        user = next((run.name for run in self._runs.values() if run.joins_next_round and run.loader.data is data), None)
        cfg = self.model.peft_config.get(name) if config is None and self.model is not None else config
        fault = ""
        if every is not None and (valid is None or isinstance(valid, Iterator)):
            fault = f"every={every} needs validation data to iterate again. Pass a list."
        elif valid is not None and not hasattr(valid, "__iter__"):
            fault = f"valid must be batches, such as a DataLoader, got {valid!r}."
        elif type(seed) is not int:
            fault = f"seed must be an int, got {seed!r}."
        elif odd := [key for key in ("loss", "stop", "schedule") if key in passed and not callable(options[key])]:
            fault = f"{odd[0]} must be a function, got {options[odd[0]]!r}."
        elif user is not None and shares_position(data):
            fault = f"its iterator, or loader with persistent_workers, is that of run '{user}'. Give each run its own."
        elif cfg is not None and cfg.is_prompt_learning:
            fault = f"{cfg.peft_type.value} puts a prompt before the input. Train it without MultiTrain."
        elif cfg is not None and getattr(method_of(cfg.peft_type), "has_labelled_loss", False):
            fault = f"{cfg.peft_type.value} adds a loss of the call's labels. Train it without MultiTrain."
        if fault:
            raise ConfigError(f"Run '{name}': {fault}")
        self._check_base_unchanged(name, config)
        draws = Draws(seed, data)
        state = None if self.folder is None else run_file.load_run(name, self.folder)
        with draws:
            new = self._inject(name, config, heads() if callable(heads) else heads)
        model = self._peft_model
        registry, model_config = get_registry(model), model.peft_config[name]
        trained = any(p.requires_grad for _, p in model.adapter_parameters(name))
        try:
            refuse_covered_targets(name, config or model_config, registry)
            registry.set_requires_grad(name, True)
            parameters = [p for _, p in model.adapter_parameters(name)]
            loss_name, validation_loss = run_file.to_json_value(loss), loss
            if loss is None:
                needed = has_data if description is None else valid is not None
                loss = validation_loss = find_model_loss(self.base, registry.parts_of(name).wrappers, name, needed)
            if description is not None:
                data, steps = description.make_batches(draws)
                optimizer = partial(description.optimizer, model)
                schedule = partial(description.trainer.create_scheduler, steps)
                loss = partial(description.compute_loss, self.base, loss)
                loss_name = run_file.to_json_value(description.loss_name)
            with draws:
                run_optimizer = optimizer(parameters)
                run_schedule = None if schedule is None else schedule(run_optimizer)
            check_optimizer_and_schedule(name, run_optimizer, run_schedule, parameters)
            run = Run(
                name=name,
                config=model_config,
                parameters=parameters,
                draws=draws,
                loader=Loader(f"Run '{name}'", data if has_data else (), draws, once=steps is None),
                optimizer=run_optimizer,
                schedule=run_schedule,
                loss=loss,
                validation_loss=validation_loss,
                seed=seed,
                clip=clip,
                steps=steps,
                accumulate=accumulate,
                stop=stop,
                validation=valid,
                every=every,
                owner=self,
                loss_name=loss_name,
                is_loss_scaled=description is not None,
                has_data=has_data,
            )
            if state is not None:
                run_file.restore_run(run, model, state, self.folder or "")
        except BaseException:
            if trainer is not None:  # it can be added again
                trainer.optimizer = trainer.lr_scheduler = None
            if new:
                self._remove_adapter(name)
            elif not trained:
                registry.set_requires_grad(name, False)
            raise
        self._runs[name] = run
        self._fans = {}
        return run

    def _check_base_unchanged(self, name: str, config: PeftConfig | None) -> None:
        """Raise ConfigError if the new adapter changes the base, since files of other runs would not fit, and `unload`
        would return another base. Raise it also if an adapter on the model has changed the base, by its config or by
        `restart()`, unless it is `name` and there is no other run.
        """
        if config is not None:
            refuse_base_change(name, config)
        for adapter, cfg in {} if self.model is None else self.model.peft_config.items():
            restarted = adapter in get_registry(self.model).taken_in
            setting = "restart()" if restarted else find_base_change(cfg)
            if setting is not None and {*self._runs, name} != {adapter}:
                raise ConfigError(
                    f"Run '{name}' cannot train here: adapter '{adapter}' changes the base ({setting}), so that the "
                    "files of other runs would not fit a fresh base. Train it on another copy of the base."
                )

    def _inject(self, name: str, config: PeftConfig | None, heads: dict[str, nn.Module] | None) -> bool:
        """Add a copy of `config` to the model as adapter `name`, and return True.

        The copy is trainable and has the heads of its task type.

        Makes the PeftModel, with `mixed=True`, if there is none. With config None, return False for an adapter that is
        there.

        Raises:
            AdapterNotFoundError: there is neither a config nor the adapter.
            AdapterNameError: there are both.
        """
        is_on_model = self.model is not None and name in self.model.peft_config
        if config is None:
            if not is_on_model:
                raise AdapterNotFoundError(f"Run '{name}' has no config, and the model has no such adapter. Pass one.")
            return False
        if is_on_model:
            raise AdapterNameError(f"The model has an adapter '{name}' already. To train it, leave its config out.")
        config = copy.deepcopy(config)
        config.inference_mode = False
        add_task_heads(config)
        if self.model is None:
            self.model = get_peft_model(self.base, config, name, mixed=True, heads=heads)
        else:
            self.model.add_adapter(name, config, heads=heads)
        return True

    def _remove_adapter(self, name: str) -> None:
        """Remove an adapter from the model, and empty the cache of fans.

        With the last adapter the model is unloaded, `model` becomes None, and the base has its own modules again.

        If the adapter is active, the model's first other one becomes the only active one, and the adapters of all runs
        stay trainable. If it trains in banks, all runs leave them.
        """
        self._fans = {}
        if name in self._banks.rows:
            self._assign_rows(releases=True)
        model = self._peft_model
        if list(model.peft_config) == [name]:
            model.unload(keep_modules=False)
            self.model = None
            return
        if name in model.active_adapters:
            model.set_adapter(next(adapter for adapter in model.peft_config if adapter != name))
            get_registry(model).set_requires_grad([n for n in self._runs if n in model.peft_config], True)
        model.delete_adapter(name)

    @refuse_within_step
    def remove(self, name: str) -> Run:
        """Remove a run and its adapter, release its file for other processes, and return the run with its curve.

        After the last one the base has its modes of before.

        Raises:
            AdapterNotFoundError: there is no such run.
            RuntimeError: a step is under way.
        """
        run = self[name]
        self._remove_adapter(name)
        del self._runs[name]
        self.claims.release(name)
        if self.model is None:
            self._restore_modes()
        return run

    @refuse_within_step
    def unload(self) -> nn.Module:
        """Remove all runs and adapters, and return the base as it was; merged adapters are unmerged.

        `model` becomes None, the banks are released, then all files, and the modes of the base's modules are restored.
        """
        if self.model is not None:
            self.model.unload(keep_modules=False)
            self._assign_rows(releases=True)
        self.model, self._runs = None, {}
        self.claims.release()
        self._restore_modes()
        return self.base

    def _restore_modes(self) -> None:
        """Put each module of the base into the mode, training or eval, that it had at the start."""
        for module, training in self._modes:
            module.training = training

    @property
    def arguments(self) -> ForwardArguments:
        """A copy of the description of the base's forward arguments.

        Its `names` has also those that the adapters' methods read from a batch.
        """
        names = set() if self.model is None else get_registry(self.model).arguments
        return replace(self._arguments, names=self._arguments.names | names)

    @property
    def _peft_model(self) -> PeftModel:
        """The model with the runs' adapters. There must be at least one."""
        assert self.model is not None
        return self.model

    def _list_adapter_modules(self) -> list[nn.Module]:
        """Return the modules that adapters have added to the base: the registry's layers and wrappers with all within
        but their base modules. [] without a model.
        """
        modules: list[nn.Module] = []
        for carrier in () if self.model is None else get_registry(self.model).carriers():
            if isinstance(carrier, nn.Module):
                inner = {id(m) for m in carrier.base_module.modules()}
                modules += [m for m in carrier.modules() if id(m) not in inner]
        return modules

    # steps

    def __iter__(self) -> Iterator[Step]:
        """Yield a `Step` for each round, until no run takes part and none needs a check."""
        while any(run.joins_next_round or run.needs_check for run in self._runs.values()):
            yield self.step()

    @overload
    def step(self) -> Step:
        """A declaration only, for a type checker: without a name the result is a Step."""

    @overload
    def step(self, name: str, **settings: Any) -> StepRecord:
        """A declaration only, for a type checker: with a name the result is a StepRecord."""

    def step(self, name: str | None = None, **settings: Any) -> Step | StepRecord:
        """Without a name: take a batch of each run that takes part, and make the optimizer steps that are due.

        After an error, of a loss or a loader, all runs are where they were, except those that made their step before
        it. The next call continues there.

        With the name of a run without data: clip its gradients, make one step of its optimizer and schedule, empty the
        gradients, and return the record of the step. Waits for calls of other threads.

        Args:
            settings: of the optimizer, such as `lr=1e-4`, for all its parameters. They hold for later steps, too.

        Raises:
            TypeError: there are settings and no name.
            RuntimeError: without a name, another thread is in a step, or a `stop` or a loss calls this. With a name,
                the run has no gradients, or has failed.
            AdapterNotFoundError: there is no such run.
            ConfigError: the run has data; the optimizer has no such setting, refuses its value, or has several values
                for it; or `lr` is given and the run has a schedule. Nothing has changed.
            FloatingPointError: loss or gradient is not finite. The gradients are dropped, and the values stay.
        """
        if name is not None:
            with self._lock_call():
                return self._step_run(name, settings)
        if settings:
            raise TypeError(f"MultiTrain.step() takes {list_names(settings)} only with the name of a run. Pass one.")
        with self.lock_steps():
            if self._stepping:
                raise RuntimeError("A step is under way. To make the next one, let its `stop` return.")
            self._stepping = True
            try:
                return self._run_round()
            finally:
                self._stepping = False

    @contextmanager
    def lock_steps(self, waits: bool = False) -> Iterator[None]:
        """Within the block, no other thread can make a step or change the runs.

        Waits while another thread is in such a block.

        Raises:
            RuntimeError: the loop of another thread is in a step, unless `waits`; or this thread is within a pass or a
                step, for example in a loss.
        """
        if not self._lock.acquire(blocking=waits or not self._stepping):
            raise RuntimeError(f"Another thread has the runs {', '.join(self._runs)}. Let one thread run them.")
        try:
            if self._is_in_pass:
                raise RuntimeError("A step is under way. Call this between steps, not from a loss.")
            yield
        finally:
            self._lock.release()

    @contextmanager
    def _lock_call(self) -> Iterator[None]:
        """Within the block, no other thread can make a step or change the runs, and nor can a loss or an optimizer that
        runs here. Waits while another thread is in such a block, also in a step of its loop.

        Raises RuntimeError if this thread is within a pass or a step; so does any such block that begins within this
        one.
        """
        with self.lock_steps(waits=True):
            self._is_in_pass = True
            try:
                yield
            finally:
                self._is_in_pass = False

    def backward(
        self,
        batches: Mapping[str, Mapping[str, Any]],
        loss: Callable[..., object] | None = None,
        mean_of: int = 1,
    ) -> dict[str, BatchResult]:
        """Add the gradients of a batch for each of these runs to those that wait for its `step`. Return the results.

        The batches of this call, and of calls of other threads that wait, share passes. The model is in training mode
        afterwards.

        Args:
            batches: by name of a run without data, a mapping of the model's arguments, and of all that the loss needs,
                to tensors.
            loss: a function of (the output of the run's rows, its batch). It returns a loss (), or a loss and a dict of
                tensors, which the result has detached. None: the loss given to `add`, or the model's.
            mean_of: each loss is divided by this number. 1: gradients of several calls add up to those of the sum;
                the number of calls: to those of the mean.

        Raises:
            AdapterNotFoundError: there is no such run.
            ConfigError: a run has data or no loss; or a batch has no rows, unknown keys, or is no mapping.
            RuntimeError: a run has failed, or a loss or an optimizer calls this.
            And the error of the model or a loss. Whatever is raised, all runs of the call are as before it.
        """
        if not isinstance(batches, Mapping) or not batches or not all(isinstance(b, Mapping) for b in batches.values()):
            raise ConfigError(
                f"backward: batches must be like {{'run': {{'input_ids': …}}}}, got {shorten_text(repr(batches))}."
            )
        if type(mean_of) is not int or mean_of < 1 or not (loss is None or callable(loss)):
            raise ConfigError(f"backward: pass a positive int and a function, got mean_of={mean_of!r}, loss={loss!r}.")
        call = BackwardCall(dict(batches), loss, mean_of)
        self._waiting.append(call)
        try:
            with self._lock_call():
                while not call.result.done():  # one of an earlier thread for the same run comes first
                    self._run_waiting_calls()
        finally:
            if call in self._waiting:
                self._waiting.remove(call)
        return call.result.result()

    def _run_waiting_calls(self) -> None:
        """Make the passes of all waiting calls, except of calls for a run that an earlier one is for; these wait for
        the next time.

        A call with an invalid batch gets its error and takes no part. Each other call gets the results of its runs, or
        the first error of one of them; then all its runs are undone. After an error of this thread, such as an
        interrupt, all runs are as before, the calls without a result wait again in their order, and the error is
        raised.
        """
        calls, later, names = list[BackwardCall](), list[BackwardCall](), set[str]()
        for _ in range(len(self._waiting)):
            call = self._waiting.popleft()
            (calls if names.isdisjoint(call.batches) else later).append(call)
            names |= call.batches.keys()
        self._waiting.extendleft(reversed(later))
        items = list[RunBatch]()
        try:
            for call in calls:
                try:
                    added = [self._check_batch(call, name) for name in call.batches]
                except Exception as error:
                    call.result.set_exception(error)
                else:
                    items += [self._runs[item.name].begin_batch(item) for item in added]
            self._run_backward(items)
        except BaseException:
            for item in items:
                self._runs[item.name].undo_round()
            self._waiting.extendleft(call for call in reversed(calls) if not call.result.done())
            raise
        errors = self._batch_errors | self._loss_errors
        for call in (call for call in calls if not call.result.done()):
            failures = [errors[name] for name in call.batches if name in errors]
            for name in call.batches:
                self._runs[name].undo_round() if failures else self._runs[name].finish_round()
            if failures:
                call.result.set_exception(failures[0])
            else:
                call.result.set_result({name: self._results[name] for name in call.batches})

    def _check_batch(self, call: BackwardCall, name: str) -> RunBatch:
        """Return the batch of a run in a call, with a copy of its dict, the call's loss and `mean_of`.

        Raises:
            ConfigError: there is no loss of the call, the run or the model. Also for names that the model does not
                take, if the model's own loss is used.
            And the errors that `backward` describes for a run that cannot be called.
        """
        run, batch = self._get_called_run(name), call.batches[name]
        if call.loss is None and run.loss is None:
            raise ConfigError(f"Run '{name}' has no loss, nor has the model. Pass loss to backward(), or to add().")
        known = self.arguments
        if call.loss is None and run.loss_name is None and (unknown := known.list_unknown(batch)):
            raise ConfigError(
                f"Run '{name}': the model and its loss take no {list_names(unknown)}. The model takes "
                f"{list_names(known.names)}."
            )
        return RunBatch(name, dict(batch), call.loss, call.mean_of)

    def _get_called_run(self, name: str) -> Run:
        """Return the run of a name, which calls may train.

        Raises:
            AdapterNotFoundError: there is no such run.
            ConfigError: it has data.
            RuntimeError: it has failed.
        """
        run = self[name]
        if run.has_data:
            raise ConfigError(
                f"Run '{name}' has data, so its loop trains it. Add it without data to train it by calls."
            )
        if run.state != RUNNING:
            raise RuntimeError(f"{run.why} Load an earlier state by load_run(), or remove the run.")
        return run

    def _measure_gradients(self, name: str) -> DueStep:
        """Return a run, its loss, and the norm of its gradients as a number and a tensor. The row has the gradients.

        If the run is not on an intact row, all runs get new rows by `_assign_rows`. Stored gradients move into the row.

        Raises RuntimeError if there are no gradients, and the errors of `_get_called_run`.
        """
        run = self._get_called_run(name)
        if not run.losses:
            raise RuntimeError(f"Run '{name}' has no gradients for a step. Call backward() first.")
        if run.row is None or not run.row.is_intact():
            self._assign_rows()
        run.load_gradients()
        return self._read_numbers([run])[0]

    def _step_run(self, name: str, settings: dict[str, Any]) -> StepRecord:
        """Make an optimizer step of one run with its summed gradients, and return its record, the last one of `curve`.

        `settings` are written into all groups of the optimizer before, and stay.

        Raises:
            ConfigError: a setting is refused, see `Run.check_settings`. Nothing changes then.
            FloatingPointError: the loss or the norm of the gradient is not finite. The gradients are dropped, and no
                step is made.
            And the errors of `_measure_gradients`.
        """
        run, loss, norm, length = self._measure_gradients(name)
        run.check_settings(settings)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            run.drop_partial_step()
            raise FloatingPointError(
                f"Run '{name}': loss {loss:g} and gradient norm {norm:g} at step {run.step + 1} are not both finite. "
                "The gradients are dropped; go on with another batch."
            )
        for group in run.optimizer.param_groups:
            group.update(settings)
        make_steps([(run, loss, norm, length)])
        return run.curve[-1]

    def gradient_norm(self, name: str) -> float:
        """Return the norm of the gradients that wait for the step of a run without data, before they are clipped.

        Waits for calls of other threads. Raises AdapterNotFoundError, ConfigError or RuntimeError as `step`.
        """
        with self._lock_call():
            return self._measure_gradients(name)[2]

    def snapshot(self, name: str) -> AdapterSnapshot:
        """Return a copy of a run's adapter, after one step and before the next. Waits for calls of other threads.

        Raises AdapterNotFoundError if there is no such run.
        """
        with self.lock_steps(waits=True):
            run = self[name]  # raises before there is a model
            return get_registry(self._peft_model).take_snapshot(run.name)

    def _run_round(self) -> Step:
        """Make a round and return its `Step`: checks left over from an error, training, then validation and stops.

        The number of rounds rises by one. During the training part `lock_steps` refuses this thread.

        After an error in training the runs' batches are returned, and the error is raised; the number stays. `ended` of
        the step also has runs that failed. Warns with PeftWarning of each run that ended for lack of data.
        """
        step = Step(self._number + 1)
        self._validate_and_stop(step)  # where an error has kept it from doing so
        going = [run for run in self._runs.values() if run.joins_next_round]
        try:
            with self._lock_call():
                self._train_round(step, going)
        except BaseException:
            for run in going:
                run.undo_round()
            raise
        for run in going:
            run.finish_round()
        self._number += 1
        self._validate_and_stop(step)
        step.ended |= {run.name: run.why or "" for run in going if run.state != RUNNING}
        for run in going:
            if run.is_short_of_data:
                warn(f"Run '{run.name}': {run.why}.", PeftWarning)
        return step

    def _train_round(self, step: Step, going: Sequence[Run]) -> None:
        """Take a batch of each of these runs, compute gradients in joint passes, and make the steps that are due.

        Nothing happens without runs, and a run without another batch takes no part.

        An error of a user's loss is raised before any step. Runs with a batch that the model cannot take fail. Runs
        without a due step store their gradients. A run with a loss or norm that is not finite fails with a PeftWarning,
        before its step. `step.losses` gets the losses of the runs that made a step.
        """
        if not going:
            return
        items = [item for run in going if (item := run.take_batch()) is not None]
        self._run_backward(items)
        for error in self._loss_errors.values():
            raise error
        if self._batch_errors:
            self._fail_runs(len(items))
        due = [run for run in going if run.state == RUNNING and run.is_step_due]
        for run in going:
            if run not in due:
                run.store_gradients()
        finite = list[DueStep]()
        for due_step in self._read_numbers(due):
            run, loss, norm, _ = due_step
            if math.isfinite(loss) and math.isfinite(norm):
                finite.append(due_step)
            else:
                cause = "gradient" if math.isfinite(loss) else "loss"
                warn(run.fail(f"its {cause} is not finite", loss), PeftWarning)
        make_steps(finite)
        step.losses |= {run.name: loss for run, loss, *_ in finite}

    def _run_backward(self, items: Sequence[RunBatch]) -> None:
        """Empty `_results`, `_batch_errors` and `_loss_errors`, then run joint passes of these batches, of different
        runs. Their gradients are added to the rows of the runs.

        Without batches, it stops once the three are empty. Else it sets training mode, assigns rows and completes the
        batches; one where that raises is left out. Fills `_results`, and for batches that failed `_batch_errors` and
        `_loss_errors`; a failed batch is not tried again here. Each run records its losses and tokens.
        """
        self._batch_errors, self._loss_errors, self._results = {}, {}, {}
        if not items:
            return
        self._set_mode(True)
        self._assign_rows()
        completed = []
        for item in items:
            try:
                completed.append(self._complete_batch(item))
            except Exception as error:
                self._note_batch_error(item, error)
        for joint in divide_passes(completed, self.arguments, self.at_once, self._note_batch_error):
            for item, result in self._run_pass(joint, self._compute_gradients):
                if isinstance(result, Exception):
                    self._loss_errors[item.name] = result
                else:
                    loss, self._results[item.name] = result
                    self._runs[item.name].record_loss(loss, result[1].tokens)

    def _read_numbers(self, runs: Sequence[Run]) -> list[DueStep]:
        """Return each run, the loss of its step, and the norm of the gradients in its row, as a number and a tensor.

        Waits once for the device. The norm is that before clipping. Without runs, the list is empty.
        """
        if not runs:
            return []
        lengths = self._banks.compute_norms({run.name: run.clip is not None for run in runs})
        losses = [run.step_loss for run in runs]
        numbers = torch.stack([t.float().to(losses[0].device) for t in (*losses, *lengths)]).tolist()
        return list(zip(runs, numbers, numbers[len(runs) :], lengths))

    def _validate_and_stop(self, step: Step) -> None:
        """For runs after a step: measure validation data that is due, call `stop` of running ones, and measure again
        runs that have stopped. Runs that have ended go into `step.ended` with the reason. Runs that another one's
        `stop` removed are skipped. At the end `needs_check` of all these runs is False.

        An error of `stop` gets a note with the run's name, and is raised. The checks of this round are then made again
        in the next one.
        """
        runs = [run for run in self._runs.values() if run.needs_check]
        self._validate_due_runs(step, runs)
        for run in runs:
            if self._runs.get(run.name) is not run:  # the `stop` of another one has removed it
                continue
            try:
                stops = run.state == RUNNING and run.stop is not None and run.stop(run)
            except Exception as error:
                annotate_error(error, f"Run '{run.name}': its stop raised this.")
                raise
            if stops:
                run.end(STOPPED, f"its stop said so at step {run.step}")
            if run.state != RUNNING:
                step.ended[run.name] = run.why or ""
        self._validate_due_runs(step, [run for run in runs if self._runs.get(run.name) is run])
        for run in runs:
            run.needs_check = False

    def _validate_due_runs(self, step: Step, runs: Sequence[Run]) -> None:
        """Measure the validation losses that are due, and add them to `run.valid`, with the run's step, and to
        `step.valid`. Other runs are skipped.

        Runs with the same data object are measured together, by `evaluate`, which leaves the model in eval mode.
        """
        by_data: dict[int, list[Run]] = {}
        for run in runs:
            if run.is_validation_due:
                by_data.setdefault(id(run.validation), []).append(run)
        for sharing in by_data.values():
            losses = self.evaluate([run.name for run in sharing], sharing[0].validation or ())
            for run in sharing:
                run.valid.append(ValidationRecord(run.step, losses[run.name]))
                step.valid[run.name] = losses[run.name]

    def _assign_rows(self, releases: bool = False) -> None:
        """Give a row in new banks to each run that takes part in the next round, or is trained by calls; with
        `releases` to none. Other runs leave theirs, with each tensor in separate memory.

        Nothing happens if exactly these runs have their rows, in order, and the banks are intact. Otherwise parameters
        in the old banks first get separate memory.
        """
        running = [run for run in self._runs.values() if run.state == RUNNING and not releases]
        runs = [run for run in running if run.joins_next_round or not run.has_data]
        rows = self._banks.rows
        is_assigned = [*rows] == [run.name for run in runs] and all(run.row is rows[run.name] for run in runs)
        if is_assigned and self._banks.is_intact():
            return
        model = self._peft_model
        self._banks.separate_memory()
        tensors = {run.name: (run.bank_order, run.parameters) for run in runs}
        self._banks = Banks(tensors, (*model.parameters(), *model.buffers()))
        for run in self._runs.values():
            run.set_row(self._banks.rows.get(run.name))

    def _complete_batch(self, item: RunBatch) -> RunBatch:
        """Return the batch with the arguments that follow from its labels: `decoder_input_ids`, if the base has
        `prepare_decoder_input_ids_from_labels` and the batch has labels, and those of methods around the model, such as
        lengths of prompts. Arguments that the batch has stay.
        """
        batch = item.batch
        make = getattr(self.base, "prepare_decoder_input_ids_from_labels", None)
        if make is not None and "labels" in batch and "decoder_input_ids" not in batch:
            batch = batch | {"decoder_input_ids": make(labels=batch["labels"])}
        for method in dict.fromkeys(get_registry(self._peft_model).surrounding.values()):
            batch = {**method.arguments_of(batch, self.base), **batch}
        return item._replace(batch=batch)

    def _note_batch_error(self, item: RunBatch, error: Exception) -> None:
        """Add a line with the run's name to the error, and keep the error in `_batch_errors` under that name.

        An earlier one is replaced.
        """
        annotate_error(error, f"Run '{item.name}': the model cannot take its batch.")
        self._batch_errors[item.name] = error

    def _fail_runs(self, batches: int) -> None:
        """Fail the runs with a batch that the model cannot take, with a warning, and keep each error in `run.error`.

        A run without memory for its batch fails with another warning, and keeps no error. If `batches` of them have
        another error, raise the first one instead, and no run fails. The frames of a kept error are freed.
        """
        refused = {name: error for name, error in self._batch_errors.items() if not is_out_of_memory(error)}
        for name, error in self._batch_errors.items():
            if len(refused) == batches:
                raise error
            run, why = self._runs[name], f"one batch needs more memory ({error})"
            remedy = "Give it smaller batches, and accumulate= for the same step."
            if name in refused:
                why = f"the model cannot take its batch ({shorten_text(repr(error))})"
                remedy = "Remove it, mend its data, and add it again."
                drop_frames(error)
                run.error = error
            warn(f"{run.fail(why, math.nan)} {remedy}", PeftWarning)

    def _run_pass(
        self, items: list[RunBatch], compute: Callable[[list[RunBatch]], Sequence[T]], is_half: bool = False
    ) -> Iterator[tuple[RunBatch, T]]:
        """Call `compute` on these batches, and yield each batch with its entry of the result.

        A Warning of `compute` is raised. In validation raise any other error with a note, except for short memory with
        several batches, or if the base's blocks may have repeated rows. Otherwise restore the random states, free the
        frames of the error if memory is short or there are several batches, and in training drop the gradients.

        If blocks may have repeated rows and memory was not short, run the batches again without that, now and in later
        passes of these runs (`_fans` gets [] for them). Else a single batch is noted with its error; several are run as
        two halves, one after the other. If memory is short, `at_once` is first lowered to the tokens of the first half,
        padded, at least 1. The outermost call warns with PeftWarning if memory was not short and in the end no single
        batch has failed.

        Blocks repeat their inputs by rows. They cannot where a model passes a tensor of rows times heads (ALiBi in
        Bloom), or of as many heads as there are rows (MPT). They cannot either where the model picks rows by its input
        after the blocks (the last token of a sequence classifier).

        is_half: this is part of such a halving.
        """
        names = tuple(item.name for item in items)
        before = [(draws := self._runs[name].draws, draws.states) for name in names]
        training = torch.is_grad_enabled()
        try:
            results = compute(items)
        except Exception as error:
            if isinstance(error, Warning):  # which the caller has made an error
                raise
            memory = is_out_of_memory(error)
            shares = bool(self._fans.get(names)) and not memory
            if not training and not shares and (not memory or len(items) == 1):
                annotate_error(error, f"A look at validation data of {[*names]} raised this.")
                raise
            if memory or len(items) > 1:
                drop_frames(error)
            failure = error
        else:
            yield from zip(items, results)
            return
        for draws, states in before:
            draws.states = states
        if training:
            self._banks.drop_gradients(names)
        if shares:
            self._fans[names] = []
            yield from self._run_pass(items, compute, is_half)
            return
        if len(items) == 1:
            self._note_batch_error(items[0], failure)
            return
        half, known = len(items) // 2, len(self._batch_errors)
        if memory:
            _, counts = join_batches(items[:half], self.arguments)
            self.at_once = max(1, min(self.at_once, sum(counts.rows) * max(counts.lengths)))
        for section in (items[:half], items[half:]):
            yield from self._run_pass(section, compute, is_half=True)
        if not (memory or is_half) and len(self._batch_errors) == known:
            warn(f"A pass of {[*names]} raised {shorten_text(repr(failure))}, but no single one did.", PeftWarning)

    def _compute_gradients(self, items: list[RunBatch]) -> list[tuple[Tensor, BatchResult] | Exception]:
        """Run a joint pass and one backward pass of all losses, and move the gradients into the rows of the runs.
        Earlier ones there are dropped.

        Return for each batch the loss, with the loss that its adapter adds, and the result.

        If a loss of the user raises an error other than of memory, return the error for its batch, which takes no part
        in the backward pass: no smaller pass would help.
        """
        names = [item.name for item in items]
        self._banks.drop_gradients(names)
        results = list[tuple[Tensor, BatchResult] | Exception]()
        with self._run_model(items) as (outputs, tokens):
            added = [get_registry(self.model).call.loss_of(name) for name in names]
            for output, item, more, count in zip(outputs, items, added, tokens):
                run = self._runs[item.name]
                try:
                    results.append(run.compute_loss(output, item, more, count))
                except Exception as error:
                    if not run.runs_user_loss(item) or is_out_of_memory(error):
                        raise
                    results.append(error)
            if losses := [result[0] for result in results if not isinstance(result, Exception)]:
                torch.autograd.backward(losses)
        self._banks.collect_gradients(names)
        return results

    @contextmanager
    def _run_model(self, items: Sequence[RunBatch]) -> Iterator[tuple[Sequence[object], list[int]]]:
        """Yield the output of each batch, and its number of tokens with padding, from one pass of the model.

        If `_find_fan` finds blocks that may repeat rows, the model gets the rows of the first batch only. These blocks
        repeat them for each batch, also if they run again in the backward pass, within the block.
        `use_cache` becomes False if forward takes it and no batch sets it. With gradients enabled, layers use the
        banks, and dropout draws from each run's generator. The first such pass notes that the base draws no random
        numbers. Raises RuntimeError if the output of repeated rows lacks rows.
        """
        blocks, training = self._find_fan(items), torch.is_grad_enabled()
        copies = len(items) if blocks else 1
        arguments, cut = join_batches(items[:1] if blocks else items, self.arguments)
        cut = OutputSplitter(cut.rows * copies, cut.lengths * copies)
        names = [item.name for item, n in zip(items, cut.rows) for _ in range(n)]
        model = self._peft_model
        if "use_cache" in self._arguments.names:  # nobody reads the keys and values, which take copies
            arguments.setdefault("use_cache", False)
        if training:
            arguments["adapter_generators"] = {item.name: self._runs[item.name].draws.generator for item in items}
        stacks = self._banks if training else None
        with repeat_inputs(blocks, cut.rows[0], copies):
            # one pass shows whether the base draws random numbers; later on other threads may draw, such as samplers
            with get_registry(model).call.use_stacks(stacks, copies, may_draw=self._is_base_checked):
                output = model(**arguments, adapter_names=names)
            self._is_base_checked |= training
            if blocks and not cut.covers_all_rows(output):
                raise RuntimeError("The output has not all rows of the blocks. Return the model's output as it is.")
            yield cut.split(output), [n * length for n, length in zip(cut.rows, cut.lengths)]

    def _find_fan(self, items: Sequence[RunBatch]) -> list[nn.Module]:
        """Return the blocks that repeat the rows of equal batches before the first adapted one; [] if every batch must
        bring its rows.

        It is [] for a single batch, unequal batches, or arguments that methods look up by row. It is [] also if there
        are as many rows as the last dimension of the tokens: both would look alike. And it is [] if `find_fan` finds no
        place in the base for the layers and wrappers of these adapters. Its results are cached by the names in their
        order, until a run is added or removed.
        """
        if len(items) == 1:
            return []
        batches = [self.arguments.select(item.batch) for item in items]
        main, registry = find_main_argument(batches[0]), get_registry(self.model)
        # otherwise rows could not be distinguished from tokens, or methods look up rows in such arguments
        apart = len(main) != main.shape[-1] and registry.arguments.isdisjoint(batches[0])
        if not apart or not are_batches_equal(batches):
            return []
        names = tuple(item.name for item in items)
        if names not in self._fans:
            parts = [registry.parts_of(name) for name in names]
            hosts = {id(c): c for each in parts for c in (*each.layers.values(), *each.wrappers.values())}
            self._fans[names] = find_fan(self.base, list(hosts.values()))
        return self._fans[names]

    @refuse_within_step
    @torch.no_grad()
    def evaluate(self, names: str | Sequence[str], data: Iterable[Any]) -> dict[str, float]:
        """Return by name the mean loss of several runs on data, weighted by rows in float64, without gradients.

        Names that are given twice count once.

        The model is in eval mode afterwards. The data is read once, with the random states of seed 0, so that each call
        has the same batches. The first tensor with dimensions gives a batch's rows; a batch with none is skipped. One
        without such tensors counts as one row. No names give an empty dict, without a look at the data.

        Raises:
            AdapterNotFoundError: there is no such run.
            ConfigError: the data hold no batch, or no rows, or a batch is no mapping or has no rows for the model. And
                the errors of the model and the loss, with a note.
            RuntimeError: a step is under way.
        """
        names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        sums: dict[str, list[Tensor]] = {self[name].name: [] for name in names}
        if not names:
            return {}
        self._set_mode(False)
        rows: list[int] = []
        loader = Loader(f"The validation data of runs {list(names)}", data, Draws(0, data), once=True)
        while (batch := loader.next_batch()) is not None:
            n = next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()), 1)
            if not n:
                continue
            rows.append(n)
            items = [self._complete_batch(RunBatch(name, {**batch})) for name in names]
            for joint in divide_passes(items, self.arguments, self.at_once):
                for item, loss in self._run_pass(joint, self._compute_validation_losses):
                    sums[item.name].append(loss)
        if not rows:
            raise ConfigError(f"The validation data of runs {list(names)} has no rows.")
        weights = torch.tensor(rows, dtype=torch.float64, device="cpu")
        losses = torch.stack([torch.stack(sums[name]) for name in names]).double().cpu() @ weights / weights.sum()
        return dict(zip(names, losses.tolist()))

    def _compute_validation_losses(self, items: list[RunBatch]) -> list[Tensor]:
        """Return the validation loss of each of these batches, from one pass.

        Equal batches share the base's first blocks.
        """
        with self._run_model(items) as (outputs, _):
            return [self._runs[item.name].validation_loss(output, item.batch) for item, output in zip(items, outputs)]

    def _set_mode(self, training: bool) -> None:
        """Set the model to training or eval mode; without `base_in_eval`, nothing happens if it is in that mode
        already.

        With `base_in_eval`, training mode is set for adapters' modules and heads only, and the base is in eval mode.
        """
        if self.base_in_eval or self._peft_model.training != training:
            self._peft_model.train(training and not self.base_in_eval)
        if self.base_in_eval and training:
            for module in self._list_adapter_modules():
                module.training = True

    def run(self, progress: bool = False, save: str | os.PathLike[str] | None = None, every: int = 100) -> MultiTrain:
        """Make rounds until no run takes part. Return self, also if there are no runs.

        Args:
            progress: show a table of the runs, updated after each round.
            save: a folder to `save` to, at each round number that `every` divides, and always at the end, also just
                after such a save. It is claimed before the first round, and stays claimed.

        Raises:
            ConfigError: there are runs and none has data; or, checked next, `every` is no positive int, even without
                `save`.
            FolderInUseError, CheckpointError: as `save`, before the first round.
        """
        if self._runs and not any(run.has_data for run in self._runs.values()):
            raise ConfigError("run: no run has data. Add one with data, or train them by backward() and step().")
        if type(every) is not int or every < 1:
            raise ConfigError(f"run: every must be a positive int, got {every!r}.")
        if save is not None:
            self.claims.claim(os.fspath(save), self._runs)
        with Progress(self.list_runs) if progress else nullcontext() as table:
            for step in self:
                if table is not None:
                    table.update()
                if save is not None and step.number % every == 0:
                    self.save(save)
        if save is not None:
            self.save(save)
        return self

    # files

    @refuse_within_step
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write each run to a file, `folder`/<name>/run.safetensors, with all that `resume` needs.

        A file holds the whole state before or after the call, even if the process is killed. Other processes can save
        runs of these names there once this process has ended, or has removed or unloaded the runs.

        Raises:
            ConfigError: the state of an optimizer or schedule is more than numbers, texts and tensors.
            FolderInUseError: another process saves a run of such a name there.
            CheckpointError: the folder of a run, or of the locks, is a symbolic link.
        """
        self.claims.claim(os.fspath(folder), self._runs)
        for name in self._runs:
            self.save_run(name, folder)

    def save_run(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Write one run to its file, as `save` does. Waits for calls of other threads.

        Raises AdapterNotFoundError if there is no such run, and the errors of `save`.
        """
        with self.lock_steps(waits=True):
            self.claims.claim(os.fspath(folder), [self[name].name])
            run_file.save_run(self[name], self._peft_model, os.fspath(folder))

    def load_run(self, name: str, folder: str | os.PathLike[str]) -> Run:
        """Put a run without data into the state of its file, which `save` or `save_run` wrote. Return the run.

        Values, gradients, optimizer, schedule and random states are overwritten. The run may have failed. Waits for
        calls of other threads. The run leaves its bank once the file is read.

        Raises:
            AdapterNotFoundError: there is no such run.
            ConfigError: the run has data, before the file is read; or the file's run has another config or other
                settings.
            CheckpointError: there is no such file, or it is damaged.
            BaseModelMismatchError: the file's run has another base. Whatever is raised, the run is as before.
        """
        with self.lock_steps(waits=True):
            run = self[name]
            if run.has_data:
                raise ConfigError(f"Run '{name}' has data: MultiTrain.resume() continues it from {folder}.")
            state = run_file.load_run(name, os.fspath(folder))
            if state is None:
                raise CheckpointError(f"{folder} holds no run '{name}'. Pass a folder of MultiTrain.save().")
            run.leave_row()
            run_file.restore_run(run, self._peft_model, state, os.fspath(folder))
            return run

    @refuse_within_step
    def save_adapter(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Write the adapter of a run to a folder, in the form that `save_pretrained` gives the adapter "default".

        Raises:
            AdapterNotFoundError: there is no such run.
            RuntimeError: a pass is under way in this thread, or a step of the loop in another.
        """
        self.snapshot(name).save_pretrained(folder)


ADD_DEFAULTS = {key: p.default for key, p in inspect.signature(MultiTrain.add).parameters.items()}


def is_out_of_memory(error: Exception) -> bool:
    """Return True if an error says that there is no memory for a tensor: `torch.OutOfMemoryError`, MemoryError, or any
    error with "DefaultCPUAllocator: " in its text.

    On a CPU torch has no class for that: its text tells.
    """
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator: " in str(error)


def drop_frames(error: BaseException | None) -> None:
    """Free the local variables in all frames of an error and of its contexts (`__context__`), such as the tensors of a
    pass.

    None does nothing.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


DROPS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def refuse_shared_randomness_and_rows(modules: Mapping[str, nn.Module], base_in_eval: bool) -> None:
    """Raise ConfigError if these modules of a base, by path, drop inputs or layers, unless `base_in_eval`; or, checked
    next, if rows of a batch affect each other in them. The error names the first place.

    Modules of the classes `DROPS` with p above 0 drop inputs. So do modules with a positive float in an attribute with
    "drop" in its name. The mode of the modules does not matter. Rows affect each other in batch normalization of the
    classes `NORMS`, and where `expert_capacity` of a module is not None. With `base_in_eval`, a normalization with
    `track_running_stats` does not count.
    """
    drops, mixing = list[str](), list[str]()
    for key, m in modules.items():
        if isinstance(m, DROPS) and m.p > 0:
            drops.append(f"'{key}'")
        drops += [f"'{key}.{n}'" for n, v in vars(m).items() if "drop" in n and isinstance(v, float) and v > 0]
        if isinstance(m, NORMS) and not (base_in_eval and m.track_running_stats):
            mixing.append(f"'{key}'")
        if getattr(m, "expert_capacity", None) is not None:
            mixing.append(f"'{key}.expert_capacity'")
    if drops and not base_in_eval:
        raise ConfigError(
            f"The base drops inputs ({drops[0]}, and {len(drops) - 1} more), by a generator that all runs would share. "
            "Set its dropout to 0, or pass base_in_eval=True."
        )
    if mixing:
        raise ConfigError(
            f"Rows of a batch affect each other in the base ({mixing[0]}, and {len(mixing) - 1} more), and so would "
            "runs. Pass base_in_eval=True for batch normalization, or train one adapter at a time."
        )


def check_settings(name: str, **settings: float | None) -> None:
    """Raise ConfigError for the first setting that is neither None nor a positive number of exactly the type int; bools
    and subclasses are refused. `clip` may be a float, too. NaN is refused.
    """
    for key, value in settings.items():
        kinds = (int, float) if key == "clip" else (int,)
        if value is not None and (type(value) not in kinds or not value > 0):
            raise ConfigError(f"Run '{name}': {key} must be a positive {kinds[-1].__name__}, got {value!r}.")


def find_base_change(config: PeftConfig) -> str | None:
    """Return the setting that makes an adapter change or train the base's weights, such as "bias='all'".

    The text that `changes_base` of the method's variant returns comes first, then `bias`: "all" or one that ends with
    "_only". Return None if it does neither.
    """
    bias = getattr(config, "bias", "none")
    trains = bias == "all" or bias.endswith("_only")  # another value is refused by the injection
    changes_base = getattr(method_of(config.peft_type).variant(config), "changes_base", lambda config: None)
    return changes_base(config) or (f"bias={bias!r}" if trains else None)


def refuse_base_change(name: str, config: PeftConfig) -> None:
    """Raise ConfigError if a new adapter changes the base that runs share (`find_base_change`), or has a
    `layer_replication`.
    """
    setting = find_base_change(config)
    if setting is None and (ranges := getattr(config, "layer_replication", None)):
        setting = f"layer_replication={ranges}"
    if setting is not None:
        raise ConfigError(
            f"Run '{name}': {setting} changes the base that all runs share. Leave it out, or train this adapter alone."
        )


def refuse_covered_targets(name: str, asked: PeftConfig, registry: Any) -> None:
    """Raise ConfigError if a run's targets are within modules that another adapter trains whole: there the run would
    get no adapter. `find_covered_targets` of the registry finds them; the first is named.

    Nothing is refused for configs without `target_modules`, for modules that take rows, or that the run trains as well.
    With "all-linear", linear modules count that are targeted or that the config leaves untargeted.

    Args:
        asked: the config as `add` got it.
        registry: of the model, with the adapter and the targets that its config has there.
    """
    if not hasattr(asked, "target_modules"):
        return
    for key, hidden in registry.find_covered_targets(name, asked.target_modules == "all-linear"):
        raise ConfigError(
            f"Run '{name}' would train {join_some(hidden)}, and run '{registry.wrappers[key].adapters[0]}' trains "
            f"'{key}' whole. Leave them out of the targets, or train the two in separate MultiTrains."
        )


def check_optimizer_and_schedule(
    name: str, optimizer: Optimizer, schedule: object, parameters: Sequence[nn.Parameter]
) -> None:
    """Raise ConfigError unless the optimizer has exactly the trainable ones of these parameters, and the schedule
    belongs to it.

    An object that is no optimizer is refused, and LBFGS and ReduceLROnPlateau, since their steps need arguments. So are
    parameters that are not among `parameters`; those of them without requires_grad may be in the optimizer or not. A
    schedule of None, or without an attribute `optimizer`, is not checked.
    """
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"Run '{name}': optimizer must make one of its parameters, as partial(torch.optim.AdamW, lr=1e-3) does; "
            f"got {shorten_text(repr(optimizer))}."
        )
    kind, fault = type(optimizer).__name__, ""
    ids, used = {id(p) for p in parameters}, {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = sum(p.requires_grad and id(p) not in used for p in parameters)
    if isinstance(optimizer, torch.optim.LBFGS) or isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
        fault = f"{type(schedule or optimizer).__name__} needs more than gradients to step. Choose another."
    elif used - ids:
        fault = f"its {kind} holds parameters that are not the run's. Let `optimizer` use the parameters that it gets."
    elif missing:
        fault = f"its {kind} leaves out {missing} of {len(ids)} parameters. Use all, or set requires_grad to False."
    elif getattr(schedule, "optimizer", optimizer) is not optimizer:
        fault = f"its {type(schedule).__name__} is of another optimizer. Let `schedule` use the optimizer that it gets."
    if fault:
        raise ConfigError(f"Run '{name}': {fault}")
