# SPDX-License-Identifier: Apache-2.0
"""PeftModel, the wrapper that users hold: building, adapters, forward, saving and loading."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft.config.base import PeftConfig, check_config
from graft.config.hub import IDLE_LOADING, IDLE_SAVING, LOADING
from graft.config.pair import AdapterInMemory
from graft.config.prompt import PromptLearningConfig
from graft.core.base_config import input_embeddings
from graft.core.errors import (
    AdapterNotFoundError,
    ConfigError,
    DistributedError,
    PeftWarning,
    describe_function,
    warn,
    warn_unknown,
)
from graft.core.gate import PATIENCE, Names
from graft.core.rows import CallContext, Run, count_copies
from graft.inject.job import Options
from graft.inject.parts import HOLDER, get_registry, restore_modes_on_error
from graft.inject.survey import ModuleTree
from graft.io.files import read_checkpoint
from graft.io.load import CheckpointValues, LoadReport
from graft.methods import method_of
from graft.model import checkpoints
from graft.model.audit import warn_trainer_unaware
from graft.model.averaging import WHY_NOT_DDP, check_averaged, note_start
from graft.model.compose import (
    Composition,
    RowNames,
    adapters_in,
    check_row_names,
    choose_composition,
    copy_batch,
    copy_shares,
    forbid_shared_draws,
    make_draws,
    make_rows,
    use_copies,
)
from graft.model.registry import Registry, restore_on_error
from graft.model.rooms import import_from_room
from graft.model.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from graft.model.tuner import Tuner, tuner_of
from graft.storage.codes import count_numbers
from graft.storage.parallel import processes

if TYPE_CHECKING:
    from graft.model.prompts import Prompts
    from graft.model.reference import Reference

OF_TASKS: dict[object, type[PeftModel]] = {}  # the PeftModel class by task type; `model/tasks.py` fills it
# attributes of models that can checkpoint gradients: transformers 5, 4
CHECKPOINTABLE = ("is_activation_checkpointing", "is_gradient_checkpointing")
IGNORED = "_ddp_params_and_buffers_to_ignore"  # the first attribute that DistributedDataParallel reads
OF_PROMPTS = ("prompt_tokens", "word_embeddings")  # attributes that only a PeftModel with prompts has


class PeftModel(nn.Module):
    """A base model with adapters. `base_model` is the tuner, `base_model.model` the model passed in.

    With a prompt method `base_model` is the model itself. Attributes that a PeftModel lacks are the base model's.

    Args:
        model: any nn.Module; modified in place.
        peft_config: the config of the first adapter.
        adapter_name: name of the first adapter, which becomes active.
        autocast_adapter_dtype: train half-precision adapters in float32.
        low_cpu_mem_usage: leave the adapter's tensors on the meta device.
        change_timeout: seconds that a change of adapters waits for running calls of other threads, and a call for a
            change, before they raise InUseError; None: no limit.

    Raises:
        NoMatchingPeftModuleError, UnsupportedLayerError, ConfigError: the model and the config are as before the call.
    """

    special_peft_forward_args: frozenset[str] = frozenset({"adapter_names", "alora_offsets"})
    _registry: Registry = None  # type: ignore[assignment]  # the value that `get_registry` returns
    _mixed_tuner: type[Tuner] | None = None  # the class of the tuner, whatever the method; None: the method's

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        change_timeout: float | None = PATIENCE,
        *,
        options: Options | None = None,
        tree: ModuleTree | None = None,
    ):
        """Inject the first adapter into `model` and activate it; a prompt goes in front of the input instead.

        Inputs of the model are made to require gradients if it checkpoints gradients or cannot say so.
        `config.pretraining_tp` becomes 1. An adapter that trains warns if Trainer is loaded and does not know graft.

        Args:
            options: of the injection, such as heads or a saved adapter's values, in place of `autocast_adapter_dtype`
                and `low_cpu_mem_usage`.
            tree: a survey of the model, if the caller made one.
        """
        super().__init__()
        check_config(peft_config)
        options = options or Options(autocast_adapter_dtype, low_cpu_mem_usage)
        with restore_on_error(peft_config):
            self._extend_config(peft_config)
            if isinstance(peft_config, PromptLearningConfig) and self._mixed_tuner is None:  # else its registry refuses
                from graft.model.prompts import Prompts  # not needed for adapters on layers

                registry: Registry = (prompts := Prompts(model, peft_config, tree))
                prompts.start(adapter_name, peft_config, options)
                self.base_model, self.prompt_encoder = model, prompts.prompt_encoder
            else:
                kind = self._mixed_tuner or tuner_of(peft_config.peft_type)
                self.base_model = tuner = kind(model, peft_config, adapter_name, options=options, tree=tree)
                tuner.training, registry = model.training, get_registry(tuner)
        self.__dict__[HOLDER] = self._registry = registry
        registry.call.gate.timeout = change_timeout
        if options.values is None and processes() > 1:
            note_start(registry, adapter_name)
        registry.on_change = self._heads_changed
        self.peft_type = peft_config.peft_type
        if registry.checkpointing or not any(hasattr(type(model), flag) for flag in CHECKPOINTABLE):
            self.prepare_model_for_gradient_checkpointing(model)
        if hasattr(getattr(model, "config", None), "pretraining_tp"):
            model.config.pretraining_tp = 1  # its split matrix products would bypass the adapters
        self.training = model.training
        if not peft_config.inference_mode:
            warn_trainer_unaware(type(self))

    def _extend_config(self, config: PeftConfig) -> None:
        """Do nothing: a hook. Task classes add heads that must train to the config."""

    @property
    def modules_to_save(self) -> set[str] | None:
        """The set of names that configs of all adapters have in `modules_to_save`; None if there are none."""
        return {n for c in self.peft_config.values() for n in getattr(c, "modules_to_save", None) or ()} or None

    def __getattr__(self, name: str) -> Any:
        """Return an attribute that torch does not find on this module: `prompt_tokens` and `word_embeddings` from a
        registry of prompts, others from `base_model`.

        Raises:
            AttributeError: the base model lacks it as well, the name begins with "__", or it is "base_model".
            DistributedError: DistributedDataParallel asks for its list of ignored parameters, and FSDP2 had sharded the
                base.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or name.startswith("__"):
                raise
            if name == IGNORED and self._registry is not None and self._registry.averager is not None:
                raise DistributedError(WHY_NOT_DDP) from None
            if name in OF_PROMPTS and hasattr(self._registry, name):
                return getattr(self._registry, name)
            return getattr(self.base_model, name)

    def train(self, mode: bool = True) -> PeftModel:
        """Set the mode of all modules and return the model.

        Waits until no call of another thread runs, so that each call sees one mode.
        """
        registry = self._registry
        with nullcontext() if registry is None else registry.call.gate.change(f"train({mode})", ()):
            return super().train(mode)

    # facts

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configs of the adapters, by name."""
        return self._registry.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, in order."""
        return self._registry.active_adapters

    @property
    def active_adapter(self) -> str | None:
        """The first active adapter, or None. Setting it calls `set_adapter`."""
        return next(iter(self.active_adapters), None)

    @active_adapter.setter
    def active_adapter(self, name: str) -> None:
        """Make adapter `name` the active one and trainable, by `set_adapter` with its errors."""
        self.set_adapter(name)

    @property
    def change_timeout(self) -> float | None:
        """Seconds that changes wait for calls, and calls for a change, before an InUseError; None: without limit.

        It may be set at any time.
        """
        return self._registry.call.gate.timeout

    @change_timeout.setter
    def change_timeout(self, seconds: float | None) -> None:
        """Set the seconds at the model's gate, without a check; None: no limit."""
        self._registry.call.gate.timeout = seconds

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the first active adapter.

        Raises:
            AdapterNotFoundError: none is active.
        """
        if not self.active_adapters:
            loaded = ", ".join(self.peft_config) or "none"
            raise AdapterNotFoundError(f"No adapter is active: call set_adapter(). Loaded adapters: {loaded}.")
        return self.peft_config[self.active_adapters[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """True if adapters are active and some carrier is neither switched off nor disabled for this thread."""
        return bool(self.active_adapters) and any(not p.disable_adapters for p in self._registry.carriers())

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The `dtype` of the base model; None if it has no such attribute."""
        return getattr(self.get_base_model(), "dtype", None)

    def get_base_model(self) -> nn.Module:
        """Return the model that was passed in, with the adapter layers in it."""
        return self._registry.model

    def _get_base_model_class(self, is_prompt_tuning: bool = False) -> type[nn.Module]:
        """Return the class of the base model, which clients write into configs.

        The argument is ignored, for PEFT's callers.
        """
        return type(self.get_base_model())

    @property
    def base_model_prepare_inputs_for_generation(self) -> object:
        """The base model's own method, which graft does not replace."""
        return self.get_base_model().prepare_inputs_for_generation

    def _get_name(self) -> str:
        """Return the name of the base's class: a Trainer that does not know graft chooses by it how to shift smoothed
        labels.
        """
        return str(self.get_base_model()._get_name())

    def __repr__(self) -> str:
        """Return the text of the module tree under this class's name, not the base's."""
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base's forward takes `num_items_in_batch`: its own `accepts_loss_kwargs`, else whether it takes
        any keyword.

        Trainer reads this when it gets the model, so this is also the place of the warning that Trainer does not know
        graft.
        """
        warn_trainer_unaware(type(self))  # Trainer asks when it gets the model
        base = self.get_base_model()
        said = getattr(base, "accepts_loss_kwargs", None)
        parameters = inspect.signature(base.forward).parameters.values()
        return any(p.kind is p.VAR_KEYWORD for p in parameters) if said is None else bool(said)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True if the adapter is on some layer, and plain LoRA can hold its update on all of its layers."""
        return self._registry.supports_lora_conversion(adapter_name)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of (trainable, all) numbers in the parameters; shared ones count once.

        Packed 4-bit weights count with the numbers that they hold.
        """
        sizes = [(count_numbers(p), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)

    def adapter_parameters(self, adapter_name: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter) of one adapter, active or not, in the order and by the names of `named_parameters`.

        These are the parameters that can train: of its layers, heads and token rows, and the base's biases that its
        config lets train.

        Raises:
            AdapterNotFoundError: it is not loaded.
        """
        return self._registry.parameters_of(self, adapter_name)

    def print_trainable_parameters(self) -> None:
        """Print "trainable params: 1,024 || all params: 4,096 || trainable%: 25.0000" with the model's numbers."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """Return the status of each adapter layer. Raises TypeError for prompts, ValueError without adapter layers."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """Return the status of all layers together. Raises TypeError for prompts, ValueError without adapter layers."""
        return get_model_status(self)

    # adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        heads: dict[str, nn.Module] | None = None,
    ) -> None:
        """Add an adapter, inactive and frozen.

        Args:
            low_cpu_mem_usage: leave its tensors on the meta device.
            autocast_adapter_dtype: train it in float32 if the base has half precision.
            heads: modules for the config's `modules_to_save`, by name, instead of copies of the base's. They may have
                other shapes: `heads={"classifier": nn.Linear(384, 5)}` for a base with 2 labels.

        Raises:
            ValueError: the name is taken, or the config is of another method.
            NoMatchingPeftModuleError, UnsupportedLayerError, ConfigError: nothing has changed.
        """
        self._add_adapter(adapter_name, peft_config, Options(autocast_adapter_dtype, low_cpu_mem_usage, None, heads))

    def _add_adapter(self, adapter_name: str, config: PeftConfig, options: Options) -> None:
        """Add an adapter by its options, inactive.

        Waits for calls only when the model itself changes. On an error, config and model are as before.

        With several processes, the initial values are noted, to compare them later.
        """
        with self._registry.call.gate.change(f"add_adapter({adapter_name!r})", (), late=True):
            self._registry.check_new(adapter_name, config)
            with restore_on_error(config):
                self._extend_config(config)
                self._registry.add_adapter(adapter_name, config, options)
            if options.values is None and processes() > 1:
                note_start(self._registry, adapter_name)

    def set_adapter(self, adapter_name: str | Composition, inference_mode: bool = False) -> None:
        """Make one adapter the active one, and trainable unless `inference_mode`; or those of a `Stack`, `Average` or
        `Parallel`. Others become inactive and frozen.

        Merged adapters are unmerged first, with a warning. Several at once: `model.base_model.set_adapter([...])`,
        which is a `Stack`.

        Raises:
            AdapterNotFoundError (a ValueError): it is not loaded.
            TypeError: a list is passed.
            RoutingError: an adapter of a composition is not loaded, or an average cannot weigh it.
        """
        if not isinstance(adapter_name, (str, Composition)):
            several = self._registry.several
            raise TypeError(f"set_adapter takes one name, got {adapter_name!r} (a list is unhashable here): {several}.")
        self._registry.set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter.

        If it was the only active one, the first of the others (by name) becomes active, with a warning.

        Raises:
            ValueError: it is not loaded, or it is merged.
        """
        self._registry.delete_adapter(adapter_name)

    def reference(self, adapter_name: str = "default", name: str | None = None) -> Reference:
        """Return a frozen copy of an adapter as it is now, such as the reference policy of a training.

        Call the copy like the model. It is an adapter of the model, inactive; it never trains, and `save_pretrained`
        leaves it out unless it is selected.

        Args:
            name: of the copy; "<adapter_name>-reference" if None.

        Raises:
            AdapterNotFoundError: the adapter is not loaded.
            AdapterNameError: the name is taken, or cannot be one.
        """
        from graft.model.reference import make_reference

        return make_reference(self, adapter_name, name, self._add_adapter)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Set requires_grad of all parameters of these adapters, active or not.

        Frozen copies (`reference`) stay frozen.

        Raises:
            AdapterNotFoundError: one is not loaded.
        """
        self._registry.set_requires_grad(adapter_names, requires_grad)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Run the base model without adapters within the block, in this thread only.

        Other threads continue with adapters, also one that is started within the block. Merged adapters are unmerged,
        and stay unmerged. Nothing can be merged while a block is open. Warns if the config trains biases of the base,
        or if some layers only are switched off.

        Raises:
            InUseError: adapters are merged, and this thread is in a call, or other threads' calls do not end.
        """
        return self._registry.disable_for_thread()

    def _heads_changed(self) -> None:
        """Do nothing: a hook, called when the active heads change, for task classes with a loss that reads
        their size.
        """

    # prompts

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """Return the active prompt, (batch, tokens, dim), or a cache that holds its keys and values.

        Args:
            task_ids: (batch,), for multitask prompts.
            max_cache_len: without effect, since the cache grows.

        Raises:
            TypeError: the model has no prompts.
            ValueError: none of them is active.
        """
        return self._require_prompts("get_prompt").prompt(batch_size, task_ids)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """Return a prompt as in a checkpoint, on the CPU: (tokens, dim), or keys and values (tokens, 2 · layers ·
        token_dim).

        Raises:
            TypeError: the model has no prompts.
            AdapterNotFoundError: there is none of that name.
        """
        return self._require_prompts("get_prompt_embedding_to_save").file_prompt(adapter_name)

    def _require_prompts(self, asked: str) -> Prompts:
        """Return the registry of a model with prompts. Raises TypeError, with `asked`, for any other model."""
        if "prompt_encoder" not in self._modules:
            raise TypeError(
                f"{asked}() is for prompt methods, such as PROMPT_TUNING, and the adapters of this model are "
                f"{self.peft_type.value}."
            )
        return self._registry  # type: ignore[return-value]

    # forward

    def _call_base(
        self, function: Any, inputs: tuple[object, ...], kwargs: dict[str, Any], generates: bool = False
    ) -> object:
        """Run a function of the base model as one call, and return its output.

        `adapter_names` and `compose` are taken out of `kwargs` and obeyed. Raises RoutingError for names or a
        composition that cannot be used.

        A composition copies the batch if it is a Parallel. If a change of another thread makes another composition
        active while this call waits, it starts again. In training with rows' names and an averager, gradients are made
        to reach the inputs.

        With gradients, outside `generate` and a compiler, the output keeps the call's context for the backward pass.
        The averager then follows the output and checks the rows in training. The watch follows it if no rows have
        names.
        """
        names = check_row_names(kwargs.pop("adapter_names", None))
        registry, compose = self._registry, kwargs.pop("compose", None)
        value = choose_composition(registry, compose, names)
        while True:
            of_rows = names if value is None else [value]
            used = None if of_rows is None else [n for name in of_rows for n in adapters_in(name)]
            with self._begin_call("generate" if generates else "forward", used):
                known, value = value, choose_composition(registry, compose, names)
                if value != known:
                    continue  # this call waited for a change that made another composition active
                if compose is not None:
                    registry.check_composition(compose)
                facts: AbstractContextManager[None] = nullcontext()
                if value is not None:
                    methods = [method_of(config.peft_type) for config in self.peft_config.values()]
                    own_arguments = {*self.special_peft_forward_args, *(name for m in methods for name in m.arguments)}
                    inputs, kwargs, names, facts = copy_batch(registry.call, value, inputs, kwargs, own_arguments)
                reaches_inputs: AbstractContextManager[object] = nullcontext()
                if used is not None and registry.averager is not None and self.training and torch.is_grad_enabled():
                    reaches_inputs = registry.averager.reach_inputs(used)
                run = Run(inputs, kwargs, {}, generates=generates, shares=copy_shares(value))
                with facts, reaches_inputs:
                    output, context = self._run_in_call(function, names, run)
            break
        if torch.is_grad_enabled() and not (generates or torch.compiler.is_compiling()):
            registry.call.keep_for_backward(output, context)
            if registry.averager is not None:
                if used is not None and self.training:
                    registry.averager.check_rows(output)
                registry.averager.follow(output)
            if registry.watch is not None and names is None:
                registry.watch.follow(output, (*inputs, *kwargs.values()))
        return output

    def _run_in_call(self, function: Callable[..., object], names: RowNames, run: Run) -> tuple[object, CallContext]:
        """Run a function of the base model within a call; return its output and the call's context.

        For `generate`, `registry.check_generate` checks the arguments first. Arguments of graft and its methods move
        from `run.kwargs` to `run.graft_arguments`; `run.rows` and `run.copies` are set. In the first training step with
        gradients after a change, outside a compiler, check that the processes average all gradients;
        `registry.averaged` notes it.

        Within the run, rows are chosen, and `registry.enter_methods` lets methods surround it. With
        adapter generators, draws from torch's own generators are forbidden, unless the context before the run may draw.
        If `generate` repeats rows (`count_copies` > 1) and the context is not empty, `use_copies` repeats the context.
        The output of the function always passes through `finish`, which adds losses of adapters.

        Raises:
            RoutingError, TypeError: as `forward`; TypeError for `adapter_generators` with `generate`.
            DistributedError: gradients would not be averaged.
        """
        registry, inputs, kwargs = self._registry, run.inputs, run.kwargs
        if run.generates:
            registry.check_generate(kwargs)
        call, names_of_own = registry.call, (*self.special_peft_forward_args, *registry.arguments)
        run.graft_arguments = {name: kwargs.pop(name) for name in names_of_own if name in kwargs}
        generators = kwargs.pop("adapter_generators", None)
        if run.generates and generators is not None:
            raise TypeError("adapter_generators are for training, by the model's forward: generate() takes none.")
        run.rows = make_rows(registry, names, inputs, kwargs)
        draws = make_draws(generators, run.rows)
        if not registry.averaged and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            check_averaged(registry)
            registry.averaged = True
        if run.generates:
            run.copies = count_copies(registry.model, inputs, kwargs)
        with (
            nullcontext() if draws is None or call.context.may_draw else forbid_shared_draws(draws),
            call.use_rows(run.rows, draws),
            registry.enter_methods(run) as finish,
        ):
            copied = run.copies > 1 and call.context
            with use_copies(call, run.copies, registry.model) if copied else nullcontext():
                return finish(function(*inputs, **kwargs)), call.context

    def _begin_call(self, call_name: str, names: Sequence[str] | None) -> AbstractContextManager[object]:
        """Return a context that counts as a call of the model by this thread: adapters do not change within it.

        Args:
            call_name: its name, for threads that wait.
            names: the adapters of the rows; None: the active ones.
        """
        return self._registry.calling(call_name, names)

    def forward(self, *args: object, **kwargs: object) -> object:
        """Run the base model's forward and return its output.

        `adapter_names`: one entry per row of the batch: a name, a `Stack` or an `Average`; "__base__" means no adapter.

        `compose`: a `Stack`, `Average` or `Parallel` for this call, instead of the active adapters.

        `adapter_generators`: a torch.Generator of the CPU for each adapter of the batch. The adapter's dropout draws
        from it, as from torch's generator in a training of this adapter alone: see "Many adapters".

        Raises:
            RoutingError: a name is not loaded, the number of names is wrong, or adapters are merged; an adapter has no
                generator, or shares one; or the base itself draws random numbers.
            TypeError: `adapter_names` are no names, or `adapter_generators` no generators.
        """
        return self._call_base(self.get_base_model(), args, kwargs)

    def generate(self, *args: object, **kwargs: object) -> Any:
        """Run the base model's `generate` and return its output, with `adapter_names` and `compose` as in `forward`."""
        return self._call_base(self.get_base_model().generate, args, kwargs, generates=True)

    @staticmethod
    def prepare_model_for_gradient_checkpointing(model: object) -> None:
        """Make the inputs of the first block require gradients: reentrant checkpointing would drop the gradients
        otherwise.

        Quantized models stay, and so does a model that has the hook. A model without `enable_input_require_grads` gets
        a forward hook on its input embeddings, if it has any; each call adds one more.
        """
        if any(getattr(model, f, False) for f in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")):
            return
        if hasattr(model, "enable_input_require_grads"):
            if getattr(model, "_require_grads_hook", None) is None:  # else it would forget the hook that it has
                model.enable_input_require_grads()
        elif (embeddings := input_embeddings(model)) is not None:
            embeddings.register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))

    # saving

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        fingerprint: str = "sampled",
        for_server: str | None = None,
        layout: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapter_config.json and the adapter's tensors: "default" into the folder, others into sub-folders.

        A failed save leaves the old files; one that is killed leaves the old adapter or the new one. If several
        processes save into one folder at once, it ends with the whole adapter of one of them. Changes of other threads
        wait until the save has ended. Unknown keywords give a warning, and so do adapters that have parts of their
        learning in the base weights.

        Args:
            safe_serialization: safetensors; else a torch file, adapter_model.bin.
            selected_adapters: names; None: all except frozen references.
            save_embedding_layers: True, False, or "auto": if they are targets, or the vocabulary has another size.
            is_main_process: only this process writes.
            path_initial_model_for_weight_conversion: folder of the adapter as it was before training, to save a PiSSA
                or OLoRA adapter as plain LoRA for the unchanged base.
            fingerprint: of the base model, in a safetensors file. A load with another base notices the difference.
                "sampled" holds shapes and 64 values of the adapted weights, and misses changes elsewhere. "full" holds
                a digest of each tensor of the base; saving and every load then read the base in full. Save it before
                merging: unmerging in float32 changes last bits.
            for_server: "vllm", "llama.cpp" or another that `graft check` knows: write each adapter as the LoRA that
                this server reads right. A method that is not LoRA is truncated to one that keeps 99.99 % of ‖ΔW‖², with
                a warning that says the error; `graft.save_as_lora` takes another rank.
            layout: "vllm", "sglang" or another of `graft.adapter_tensors`: write its tensors, with experts as the
                server holds them. Such files load here as others do. With it or `for_server`, only the names and
                `is_main_process` count of the other arguments.
            kwargs: `state_dict`, to take values from; others of transformers are ignored.

        Raises:
            LossError: `for_server` asks for a LoRA, and none equals the adapter; or the server of `layout` cannot run
                it.
            ConfigError: both `layout` and `for_server` are passed.
            ValueError: the path is a file, or a selected adapter is not loaded.
            CheckpointError: an adapter is no longer in the model, or a tensor is a part of one; nothing is written.
        """
        with self._registry.call.gate.call("save_pretrained()"):  # nothing changes meanwhile
            if kwargs:
                warn_unknown(PeftModel.save_pretrained, kwargs, {"state_dict"} | IDLE_SAVING)
            if layout is not None and for_server is not None:
                raise ConfigError(f"layout={layout!r} and for_server={for_server!r}: give one of the two.")
            folders = checkpoints.list_save_folders(self, selected_adapters, save_directory)
            if layout is not None:
                from graft.model.adapter_tensors import adapter_tensors

                tensors = {name: adapter_tensors(self, name, layout) for name in folders}
                for name in folders if is_main_process else ():
                    tensors[name].save(folders[name])
                return
            if for_server is not None:
                import_from_room("export_adapters")(self, folders, for_server, is_main_process)
                return
            if part := [name for name in folders if name in self._registry.taken_in]:
                warn(
                    f"Adapters {part} were restarted: their earlier updates are in the base weights only. Save the "
                    "model as well, by merge_and_unload().save_pretrained(…) of a copy.",
                    PeftWarning,
                )
            checkpoints.save_adapters(
                self,
                save_directory,
                folders,
                kwargs.get("state_dict"),
                fingerprint=fingerprint,
                safetensors=safe_serialization,
                embeddings=save_embedding_layers,
                writes=is_main_process,
                subtract=path_initial_model_for_weight_conversion,
            )

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write README.md with a model card into a folder.

        An existing README.md keeps its text; only the card's data is updated.
        """
        from graft.io.card import write_card

        write_card(self, output_dir)

    def push_to_hub(self, repo_id: str, **kwargs: object) -> object:
        """Save to a temporary folder and upload that to a hub repository; return the hub's answer. Raises HubError."""
        from graft.config.hub import push

        return push(self.save_pretrained, repo_id, **kwargs)

    # loading

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        strict: bool = True,
        allow_nonfinite: bool = False,
        change_timeout: float | None = PATIENCE,
        **kwargs: Any,
    ) -> PeftModel:
        """Inject a saved adapter into `model`, load its values, and return the PeftModel of the config's task type.

        If a client replaced `load_adapter`, it is called afterwards; an error in it takes the adapter off again.
        Unknown keywords give a warning.

        Args:
            model_id: folder or hub repository.
            is_trainable: let the adapter train, in the mode of `model`; else freeze it and set all to eval.
            config: use this instead of the stored config.
            key_mapping: {regex: replacement} for the checkpoint's keys; by default the model's own conversions.
            strict: raise if the checkpoint and the adapter do not hold the same tensors; else warn.
            allow_nonfinite: load NaN and infinite numbers, too.
            change_timeout: as in `PeftModel`.
            ephemeral_gpu_offload, low_cpu_mem_usage: without effect, except that a replaced `load_adapter` gets the
                latter.
            kwargs: for the hub; of X-LoRA `adapters`, with the paths of the experts; `check_digest=False` to load a
                file that was changed after its save. `ignore_mismatched_sizes=True` leaves out tensors of another
                shape. `expert_layout` names the form of factors of stacks of experts, if the file does not: "peft",
                "exchanged" (PEFT before 0.19.1), "grouped_by_expert" (Unsloth before September 2026), "rank_major", or
                several of them.

        Raises:
            AdapterKeyError: tensors are missing or left over (only if strict), or have other shapes.
            BaseModelMismatchError: the checkpoint was made for another architecture (only if strict).
            CheckpointError: the folder holds no adapter, or its files are damaged.
            NonFiniteError: tensors hold NaN or infinite numbers.
            HubError: the hub cannot be reached, or does not give a file.
        """
        by_task = {} if cls._mixed_tuner else OF_TASKS
        config, loaded = read_checkpoint(
            model_id, kwargs, lambda read: find_replaced_loader(by_task.get(read.task_type, cls)), config
        )
        kind = by_task.get(config.task_type, cls)
        replaced_loader = None if isinstance(model_id, AdapterInMemory) else find_replaced_loader(kind)
        if replaced_loader is None and kwargs:
            warn_unknown(PeftModel.from_pretrained, kwargs, LOADING | IDLE_LOADING | config.load_options)
        with restore_on_error(config), nullcontext() if replaced_loader is None else restore_modes_on_error(model):
            if load_options := {name: kwargs[name] for name in config.load_options if name in kwargs}:
                config.take_load_options(load_options)
            checkpoints.prepare_config(config, is_trainable)
            ignore = kwargs.get("ignore_mismatched_sizes", False)
            values = CheckpointValues(model, config, adapter_name, loaded, strict, key_mapping, ignore, allow_nonfinite)
            options = Options(autocast_adapter_dtype, values=values, provisional=replaced_loader is not None)
            peft_model = kind(model, config, adapter_name, change_timeout=change_timeout, options=options)
            checkpoints.let_train(peft_model, adapter_name, is_trainable)
            peft_model._heads_changed()
            if replaced_loader is not None:
                arguments = dict(kwargs, is_trainable=is_trainable, key_mapping=key_mapping)
                arguments["autocast_adapter_dtype"] = autocast_adapter_dtype
                peft_model._call_replaced_loader(
                    replaced_loader, values.report, (model_id, adapter_name, arguments), low_cpu_mem_usage
                )
        return peft_model

    def _call_replaced_loader(
        self, replaced_loader: str, report: LoadReport, request: LoadRequest, low_cpu_mem_usage: bool
    ) -> None:
        """Call a `load_adapter` that a client replaced, after the adapter has been loaded.

        If the client calls the original with the same request, that returns `report` and loads nothing. If it does not,
        warn. If it raises, the adapter is taken off again.

        Args:
            replaced_loader: who replaced it, for the warning.
            request: the arguments of the load.
        """
        model_id, adapter_name, options = request
        self.__dict__["_done"] = request, report
        try:
            with self._registry.provisional(adapter_name):
                self.load_adapter(model_id, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, **options)
        finally:
            done = self.__dict__.pop("_done", None)
        if done is not None:
            warn(
                f"PeftModel.load_adapter was replaced by {replaced_loader}, which has not called the original. Adapter "
                f"'{adapter_name}' has the values of its file, except where the replacement has set others.",
                PeftWarning,
            )

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        strict: bool = True,
        allow_nonfinite: bool = False,
        **kwargs: Any,
    ) -> LoadReport:
        """Load a saved adapter, inactive, next to the loaded ones, and return a report of the keys loaded, missing and
        left over.

        If the name is loaded already, only its values are replaced; a warning says where the configs differ. It stays
        merged if it is merged, and trains on if it trains. Unknown keyword arguments warn. Waits until no call runs, as
        late as possible. A replaced `load_adapter` that `from_pretrained` calls gets only the report of the load, if it
        passes the same arguments.

        Args:
            is_trainable: let the adapter train from now on, active or not, and leave the model in its mode; an adapter
                that trains in part stays so. If False, set the model to eval mode, with a warning if others are
                training.
            torch_device, ephemeral_gpu_offload, low_cpu_mem_usage: without effect.
            kwargs: as of `from_pretrained`.

        Raises:
            ValueError: both `offload_folder` and `offload_dir` are passed.
            Other errors: as `from_pretrained`; the model is then as before.
        """
        request = (model_id, adapter_name, dict(kwargs, is_trainable=is_trainable, key_mapping=key_mapping))
        request[2]["autocast_adapter_dtype"] = autocast_adapter_dtype
        done = self.__dict__.pop("_done", None)
        if done is not None and done[0] == request:
            return done[1]  # type: ignore[no-any-return]
        if all(k in kwargs for k in ("offload_folder", "offload_dir")):
            raise ValueError("Cannot use `offload_folder` when `offload_dir` is specified: they mean the same.")
        warn_unknown(PeftModel.load_adapter, kwargs, LOADING | IDLE_LOADING)
        config, loaded = read_checkpoint(model_id, kwargs, lambda _: find_replaced_loader(type(self)))
        tears: Names = None if self.training and not is_trainable else ()  # the model goes to eval mode
        with self._registry.call.gate.change(f"load_adapter({adapter_name!r})", tears, late=True):
            new = adapter_name not in self.peft_config
            if new:
                checkpoints.prepare_config(config, is_trainable)
            base, ignore = self.get_base_model(), kwargs.get("ignore_mismatched_sizes", False)
            values = CheckpointValues(base, config, adapter_name, loaded, strict, key_mapping, ignore, allow_nonfinite)
            if new:
                self._add_adapter(adapter_name, config, Options(autocast_adapter_dtype, values=values))
            else:
                checkpoints.fill_adapter(self, values, is_trainable)
            checkpoints.let_train(self, adapter_name, is_trainable, new)
            self._heads_changed()
            return values.report

    # dunder protocol

    def __contains__(self, adapter_name: str) -> bool:
        """Return True if an adapter of that name is loaded."""
        return adapter_name in self.peft_config


LOAD_ADAPTER = PeftModel.load_adapter
LoadRequest = tuple[Any, str, dict[str, Any]]  # source, name of the adapter, options


def find_replaced_loader(kind: type[PeftModel]) -> str | None:
    """Return the name of the function that replaced or overrides `load_adapter` in a class; None if it is graft's."""
    return None if kind.load_adapter is LOAD_ADAPTER else describe_function(kind.load_adapter)
