# SPDX-License-Identifier: Apache-2.0
"""The registry of a model's adapters, which owns them from their injection to their deletion.

It adds, activates, disables, merges and deletes adapters, and surrounds each run of the model. Tuners and PeftModels
have functions of the same names that call these. Loads and saves use it from `model/checkpoints.py`.

Threads: `calling` says that a call begins. The decorators `changes` and `prepares`, and `Gate.change`, say that
something changes; no other code here knows of threads. A change waits for the calls under way, and calls wait for a
change. A load or an injection closes the gate (`core/gate.py`) only for its last step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from graft.config.base import PeftConfig, check_config
from graft.core.call import AuxiliaryValue, Call
from graft.core.carrier import (
    Carrier,
    SharedTensors,
    active_after_deletion,
    as_name_list,
    check_name_list,
    check_not_merged,
    iter_carried,
)
from graft.core.containers import Slot
from graft.core.errors import (
    AdapterNameError,
    AdapterNotFoundError,
    AlreadyInjectedError,
    BaseModelMismatchError,
    ConfigError,
    UnsupportedLayerError,
    describe_function,
    warn,
)
from graft.core.gate import ACTIVE, Names, adapters_of_deletion, all_adapters, changes, prepares
from graft.core.layer import AdapterLayer, Host
from graft.core.method import Method, return_unchanged
from graft.core.ops import find_op
from graft.core.rows import Finish, JointAdapters, Run, list_forward_arguments
from graft.inject.beside import RowsLayer
from graft.inject.build import assign_values
from graft.inject.find import list_trained_biases
from graft.inject.inject import Injection, check_second_bias
from graft.inject.job import Options, TensorWriter
from graft.inject.match import COMPRESS_FROM, Matcher, minimize_names
from graft.inject.parts import AdapterCarriers, check_adapter_name, check_no_foreign_adapters, get_registry
from graft.inject.report import InjectReport
from graft.inject.steps import INJECT, ReplacedSteps, names_of_replaced
from graft.inject.survey import ModuleTree, is_linear, survey_model
from graft.io import files
from graft.io.base import remove_carrier_names
from graft.io.fingerprint import Fingerprint, check_fingerprint, why_other_base
from graft.io.rendezvous import RankNote
from graft.io.save import fingerprint_carriers
from graft.methods import ROWS, method_of
from graft.model import checkpoints, merging
from graft.model.audit import Watch, gradients_elsewhere
from graft.model.auxiliary import add_to_loss, compute_losses
from graft.model.averaging import Averager
from graft.model.compose import Average, Composition, Parallel, Stack, check_known, row_keys
from graft.prompts.base import Prompt
from graft.storage.codes import find_unpacked_dtype, holds_codes, mark_plain_layers, remove_quantization_marks
from graft.storage.find import DENSE
from graft.storage.fsdp2 import Sharding
from graft.storage.quantized import Quantized


def names_to_activate(choice: str | Sequence[str] | Composition) -> list[str]:
    """Return the adapters that a choice for `set_adapter` names.

    Raises TypeError if a name is no text, ValueError if one is there twice.
    """
    return choice.names if isinstance(choice, Composition) else as_name_list(choice, "set_adapter")


def weights_and_apart(value: Composition | None) -> tuple[tuple[float, ...] | None, bool]:
    """Return the weights of an Average, else None, and whether the value is a Parallel, where each adapter has separate
    rows.
    """
    return value.weights if isinstance(value, Average) else None, isinstance(value, Parallel)


class Configs(dict[str, PeftConfig]):
    """The configs of a tuner's adapters, by name. The model shows the same dict as `peft_config`."""


@contextmanager
def restore_on_error(config: PeftConfig) -> Iterator[None]:
    """If the block raises, also an interrupt, set all attributes of the config back to their values from before, the
    same objects. New attributes go. Changes inside a list or dict stay.
    """
    before = dict(vars(config))
    try:
        yield
    except BaseException:
        config.__dict__.clear()
        config.__dict__.update(before)
        raise


class PlainRun:
    """The context of a run that no method surrounds.

    A class, since the compiler of torch 2.6 does not look into generators.
    """

    def __enter__(self) -> Finish:
        """Return a function that returns the model's output unchanged."""
        return return_unchanged

    def __exit__(self, *raised: object) -> None:
        """Do nothing; an error of the block is raised on."""
        pass


class Registry:
    """The registry of a model's adapters on layers, of one method or of any.

    `Prompts` and `XLoraRegistry` are subclasses.

    A plain object next to the model: in PeftModel or tuner its names would hide those of the base model.
    """

    several = "use model.base_model.set_adapter([...]) to activate several"  # for errors
    on_change: Callable[[], object] = staticmethod(lambda: None)  # called when other adapters run
    steps: ReplacedSteps | None = None  # of the injection under way, if some were replaced
    pending: Options | None = None  # of an injection that a replaced `inject_adapter` has to make
    watch: Watch | None = None  # looks at the first backward passes, until it has seen enough
    averager: Averager | None = None  # of a base that was sharded before its adapters came
    averaged = False  # it was checked that processes average the gradients of the parameters that train now
    in_ddp = False  # the model ran within a DDP, at the last check
    frozen_before: set[str] | None = None  # names of the base's parameters; None: leave all as they are
    shares_kept: Mapping[str, float] = MappingProxyType({})  # by key of a layer, of the weights of the last merge

    def __init__(
        self,
        model: nn.Module,
        method: type[Method] | type[Prompt] | None,
        tree: ModuleTree | None = None,
        holder: Any = None,
    ):
        """Register the model.

        Adapters that were injected without a PeftModel (`inject_adapter_in_model`, transformers) are registered with
        their configs in `model.peft_config`.

        Args:
            method: of all adapters; None: any.
            tree: a survey of the model, if the caller made one.
            holder: the tuner, which holds the tensors that layers share.

        Raises:
            AlreadyInjectedError: it is a PeftModel, has adapters of another PeftModel's registry, or of another
                package.
        """
        if get_registry(model) is not None:
            raise AlreadyInjectedError(
                "The model is a PeftModel already. For another adapter of the method it has, call its add_adapter(); "
                "for another method, or to start over, pass its get_base_model()."
            )
        self.tree: ModuleTree | None = tree or survey_model(model)  # for the first injection, None afterwards
        self.model, self.holder, self.method, self.is_mixed = model, holder, method, method is None
        self.layers, self.wrappers = self.tree.layers, self.tree.wrappers
        self.checkpointing = self.tree.checkpointing  # gradient checkpointing is on
        carriers = [*self.layers.values(), *self.wrappers.values()]
        check_no_foreign_adapters(model)
        configs: dict[str, PeftConfig] = getattr(model, "peft_config", None) or {}
        if isinstance(configs, Configs):
            configs = {}  # no adapter is without a PeftModel
        if foreign := sorted({name for part in carriers for name in part.adapters if name not in configs}):
            raise AlreadyInjectedError(
                f"The model carries adapter(s) {foreign}, registered by another PeftModel. Call load_adapter() or "
                "add_adapter() of that PeftModel for another adapter; to start over, its unload()."
            )
        self.call = carriers[0].call if carriers else Call()
        self.common_tensors = SharedTensors()
        self.common_tensors.state.call = self.call
        self.peft_config: dict[str, PeftConfig] = Configs()
        self.reports: dict[str, InjectReport] = {}
        self.active_adapters: list[str] = []
        self.composition: Composition | None = None  # the Average or Parallel that they form
        self.checked: set[JointAdapters] = set()  # adapters that can act together so
        self.states: dict[str, Any] = {}  # state of methods during training, by adapter
        self.samples: dict[str, Any] = {}  # values of a sharded base for fingerprints, by adapter
        self.starts: dict[str, RankNote] = {}  # notes of the initial values, by adapter
        self.watched: set[str] = set()  # adapters that a watch was made for
        self.trained: set[str] = set()  # adapters that were active in a backward pass
        self.frozen: set[str] = set()  # adapters that never train, and that are saved only if selected
        self.taken_in: set[str] = set()  # adapters with a part in the base weights that their files lack (restarts)
        self.surrounding: dict[str, type[Method]] = {}  # classes that surround runs of the model, by adapter
        self.losing: dict[str, type[Method]] = {}  # classes that add a loss to the model's, by adapter
        self.arguments: set[str] = set()  # keywords of a call that methods take, and the base does not
        for name, config in configs.items() if holder is not None else ():
            self._register(name, config)

    def _register(self, adapter_name: str, config: PeftConfig) -> None:
        """Record the config of an adapter in `peft_config`, and whether its method surrounds runs, adds a loss, or
        takes arguments of calls that the base's forward does not take.
        """
        self.peft_config[adapter_name] = config
        method = method_of(config.peft_type).variant(config)
        for known, is_used in ((self.surrounding, method.surrounds), (self.losing, method.has_loss)):
            known.pop(adapter_name, None)
            if is_used:
                known[adapter_name] = method
        if method.arguments:
            # arguments that the base takes itself are passed to it
            self.arguments |= {*method.arguments}.difference(list_forward_arguments(self.model))

    # carriers

    def carriers(self) -> Iterator[Carrier]:
        """Yield all carriers of adapters: layers, wrappers of heads and token rows, and shared tensors if there are
        any.
        """
        yield from self.layers.values()
        yield from self.wrappers.values()
        if self.common_tensors.containers:
            yield self.common_tensors

    def parts_of(self, adapter_name: str) -> AdapterCarriers:
        """Return the carriers of an adapter: its layers and wrappers by path, and the shared tensors.

        All layers are in it as well.
        """
        return AdapterCarriers(
            {key: layer for key, layer in self.layers.items() if adapter_name in layer.methods},
            {key: w for key, w in self.wrappers.items() if adapter_name in w.adapters},
            self.common_tensors if self.common_tensors.containers else None,
            all_layers=self.layers,
        )

    def fingerprint_base(self, adapter_name: str, together: bool = False, full: bool = False) -> Fingerprint:
        """Return the fingerprint of an adapter's base.

        Args:
            together: all processes call this, so that sharded values can be read.
            full: with digests of all tensors that the adapter leaves alone.
        """
        parts, config = self.parts_of(adapter_name), self.peft_config[adapter_name]
        sample = self.samples.get(adapter_name)
        return fingerprint_carriers(parts, self.model, adapter_name, config, full, together, sample)

    def check_base(
        self, adapter_name: str, of_file: Any, source: str, together: bool = False, common: bool = False
    ) -> None:
        """Raise BaseModelMismatchError unless a file's fingerprint is of this adapter's base: equal shapes, and equal
        values where both have them.

        Args:
            source: begins the error, such as "The training in x".
            together: as of `fingerprint_base`.
            common: compare the weights that both have; all if one does not name its weights.

        Raises:
            CheckpointError: the fingerprint is none.
        """
        check_fingerprint(of_file, f"{source}: the fingerprint of the base")
        why = why_other_base(of_file, self.fingerprint_base(adapter_name, together), common)
        if why is not None:
            raise BaseModelMismatchError(f"{source} was on another base: {why}. Resume it on the base that it had.")

    def save_adapter(self, adapter_name: str, folder: str, embeddings: str | bool = "auto") -> None:
        """Write an adapter into `folder` itself, whatever its name, as safetensors with a fingerprint of the base.

        The name is not checked apart: an unknown one fails where its tensors are collected. Nothing is subtracted.

        embeddings: as `save_embedding_layers` of `PeftModel.save_pretrained`.
        """
        tensors, config = checkpoints.file_contents(self.holder, adapter_name, None, embeddings, None)
        files.save_adapter(folder, tensors, config, True, self.fingerprint_base(adapter_name))

    def take_snapshot(self, adapter_name: str) -> files.AdapterSnapshot:
        """Return a copy of an adapter, on its device, with a sampled fingerprint of the base.

        The config is a deep copy; embeddings are in it as with `save_embedding_layers="auto"`.
        """
        tensors, config = checkpoints.file_contents(self.holder, adapter_name, None, "auto", None)
        copies = {key: t.detach().clone() for key, t in tensors.items()}
        return files.AdapterSnapshot(copy.deepcopy(config), copies, self.fingerprint_base(adapter_name))

    def assign_values(self, adapter_name: str, values: Iterable[tuple[TensorWriter, Tensor]]) -> None:
        """Write values into an adapter's tensors (`assign_values`), and drop the training state of the old ones.

        Processes of a sharded base compare the values at their next step.
        """
        assign_values(self.parts_of(adapter_name), adapter_name, values)
        self.note_values()
        self.states.pop(adapter_name, None)

    def name_targets(self, keys: Collection[str]) -> set[str]:
        """Return names for `target_modules` that select these paths and no other module.

        From 20 paths on they are short suffixes; fewer paths are returned as they are.
        """
        other_paths = [key for key in survey_model(self.model).modules if key not in keys]
        return minimize_names(keys, other_paths) if len(keys) >= COMPRESS_FROM else set(keys)

    def find_covered_targets(self, adapter_name: str, linear: bool) -> Iterator[tuple[str, list[str]]]:
        """Yield (path, targets) of each module that only other adapters train whole, if it has targets of this one.

        These targets get no adapter. Modules that take token rows are left out.

        Args:
            linear: "all-linear" was asked for: only linear layers count, also those that the config leaves untargeted.
        """
        matcher, wanted = Matcher(self.peft_config[adapter_name]), {"matched", "untargeted"} if linear else {"matched"}
        for key, wrapper in self.wrappers.items():
            if not wrapper.takes_rows and adapter_name not in wrapper.adapters:
                inner = ((f"{key}.{path}", m) for path, m in wrapper.base_module.named_modules() if path)
                paths = [p for p, m in inner if matcher(p).outcome in wanted and (is_linear(m) or not linear)]
                if paths:
                    yield key, paths

    def are_gradients_elsewhere(self) -> bool:
        """Return True if a library may have taken gradients away from active adapters (`gradients_elsewhere`)."""
        return gradients_elsewhere(self.model, self.carriers())

    def slots_of(self, adapter: str) -> Iterator[Slot]:
        """Yield the slot of each tensor of an adapter, on all its carriers."""
        for part, name in iter_carried(self.carriers(), [adapter]):
            yield from part.slots(name)

    def parameters_of(self, module: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Return an iterator over (name in `module`, parameter) of one adapter, in the order of `module`.

        A parameter with several names comes once, under the first.

        These are the parameters that can train, frozen ones included: its tensors, and the base's biases that its
        config lets train. A bias that is a tensor of some adapter does not count as the base's. Parameters outside
        `module` are left out.

        Raises:
            AdapterNotFoundError: it is not loaded.
        """
        self.check_known([adapter])
        slots = {name: list(self.slots_of(name)) for name in self.peft_config}
        ids = {id(slot.tensor) for slot in slots[adapter] if slot.trains and slot.is_parameter}
        adapted = [layer.base_module for layer in self.parts_of(adapter).layers.values()]
        config = self.peft_config[adapter]
        has_biases = getattr(config, "bias", "none") != "none"
        biases = list_trained_biases(config, self.model, adapted, list(self.wrappers)) if has_biases else []
        ids |= {id(bias) for bias in biases} - {id(slot.tensor) for group in slots.values() for slot in group}
        return ((name, p) for name, p in module.named_parameters() if id(p) in ids)

    # add

    @prepares
    def add_adapter(self, adapter_name: str, config: PeftConfig, options: Options) -> InjectReport:
        """Inject another adapter, inactive, and return the report. On an error nothing has changed.

        No other change runs meanwhile; running calls are waited for only where the injection needs it. If a client
        replaced `inject_adapter` of the tuner, that is called, and has to call the original.

        Raises:
            AdapterNameError, ConfigError: as `check_new`. Other errors: as `get_peft_model`.
        """
        self.check_new(adapter_name, config)
        if INJECT in names_of_replaced(self.holder, method_of(config.peft_type)):
            return self._ask_to_inject(adapter_name, config, options)
        return self._inject(adapter_name, config, options)

    def _ask_to_inject(self, adapter_name: str, config: PeftConfig, options: Options) -> InjectReport:
        """Call an `inject_adapter` that a client replaced and that calls the original, which injects; return the
        report.

        It gets the model, the name and `low_cpu_mem_usage`, for the first adapter `state_dict`, too. Config and options
        are recorded meanwhile. If the client raises, the adapter is taken off again.

        Raises:
            UnsupportedLayerError: the client does not call the original.
        """
        holder = self.holder
        arguments: dict[str, object] = dict(low_cpu_mem_usage=options.on_meta)  # the arguments that PEFT passes
        arguments |= {} if self.peft_config else dict(state_dict=options.state_dict)
        self.peft_config[adapter_name], self.pending = config, options
        try:
            with self.provisional(adapter_name, not options.provisional):
                holder.inject_adapter(self.model, adapter_name, **arguments)
                if adapter_name not in self.reports:
                    raise UnsupportedLayerError(
                        f"{type(holder).__name__}.inject_adapter was replaced by "
                        f"{describe_function(holder.inject_adapter)}, which "
                        f"has not called the original for adapter '{adapter_name}': graft injects there alone."
                    )
        finally:
            self.pending = None
        return self.reports[adapter_name]

    def _inject(self, adapter_name: str, config: PeftConfig, options: Options) -> InjectReport:
        """Inject an adapter that has been checked, register it, and return the report.

        Runs within a change that is being prepared. If the config trains biases of the base, first waits until no call
        runs.

        The survey in `self.tree` is used once and dropped. Steps that a client replaced on the tuner are called, except
        the injection itself. If the method shares tensors, their containers become modules of the tuner, unless a
        module of that name is there.
        """
        if getattr(config, "bias", "none") != "none":
            self.wait_for_calls(None)  # the base's biases get the values of the file
        tree, self.tree = self.tree, None
        method = method_of(config.peft_type)
        steps = [name for name in names_of_replaced(self.holder, method) if name != INJECT]
        done = Injection(
            self.model,
            config,
            method,
            adapter_name,
            call=self.call,
            shared=self.common_tensors,
            other_configs=self.find_same_method(config) if method.shares else {},
            tree=tree,  # type: ignore[arg-type]  # None: it makes one
            mixed=self.is_mixed,
            steps=ReplacedSteps(self.holder, steps) if steps else None,
            options=options,
            keys=None if options.state_dict is None else self._keys_in(options.state_dict, config),
        ).run()
        for name, container in self.common_tensors.modules().items() if method.shares else ():
            if name not in self.holder._modules:
                self.holder.add_module(name, container)
        self._register(adapter_name, config)
        return self.register_injection(adapter_name, done)

    @prepares
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add the adapter with the config that the caller has put into `peft_config`, as PEFT's callers do.

        It is inactive.

        A config that fails is taken out of `peft_config`, except while `add_adapter` runs. While that runs, its options
        count; only `low_cpu_mem_usage` and `state_dict` are those passed here.

        Raises:
            ValueError: `model` is not the tuner's own.
            AdapterNotFoundError: there is no such config.
            AdapterNameError: layers carry an adapter of that name.
            NoMatchingPeftModuleError, UnsupportedLayerError, ConfigError: nothing has been injected.
        """
        if model is not self.model:
            raise ValueError("inject_adapter injects into the tuner's own model; make another tuner for another model.")
        self.check_known([adapter_name])
        if any(adapter_name in part.adapters for part in self.carriers()):
            raise AdapterNameError(f"Adapter with name '{adapter_name}' already exists: its layers carry it.")
        config, asked = self.peft_config.pop(adapter_name), self.pending
        if asked is None:
            options = Options(autocast_adapter_dtype, low_cpu_mem_usage, state_dict=state_dict)
        else:
            options = replace(asked, on_meta=low_cpu_mem_usage, state_dict=state_dict, provisional=True)
        try:
            self.check_new(adapter_name, config)
            self._inject(adapter_name, config, options)
        except BaseException:
            if asked is not None:
                self.peft_config[adapter_name] = config  # which `_ask_to_inject` takes back
            raise

    def find_same_method(self, config: PeftConfig) -> dict[str, PeftConfig]:
        """Return the configs of the adapters of the same method as `config`, by name."""
        method = method_of(config.peft_type)
        return {name: c for name, c in self.peft_config.items() if method_of(c.peft_type) is method}

    def _keys_in(self, state_dict: dict[str, Tensor], config: PeftConfig) -> set[str]:
        """Return the paths of the modules that have tensors of this method in a state dict.

        A path is the part of a key before the last "." + the method's prefix, without "_orig_mod." and names of
        carriers. Keys without the prefix are ignored.
        """
        mark = f".{method_of(config.peft_type).prefix}"
        return {remove_carrier_names(k.rsplit(mark, 1)[0].replace("_orig_mod.", "")) for k in state_dict if mark in k}

    def register_injection(self, adapter_name: str, injection: Injection) -> InjectReport:
        """Record layers, wrappers and report of a new adapter, and return the report.

        Layers and wrappers without adapters are dropped. `frozen_before` is kept from the first injection.

        New carriers get the list of active adapters and the weights of the active composition. If all carriers before
        were disabled, all carriers of the adapter are disabled, too. On a sharded base the adapter's gradients are
        hooked, and fingerprint values are read by all processes together.
        """
        parts, self.reports[adapter_name] = injection.parts, injection.report
        if self.frozen_before is None:
            self.frozen_before = injection.frozen_before
        known = {id(part) for part in self.carriers()}
        states = [part.state.disabled for part in self.carriers() if part is not self.common_tensors]  # it may be new
        disabled = bool(states) and all(states)
        self.layers = {key: layer for key, layer in self.layers.items() if layer.methods} | parts.layers
        self.wrappers = {key: w for key, w in self.wrappers.items() if w.adapters} | parts.wrappers
        for part in parts.carriers():
            if id(part) not in known:
                part.state.active = list(self.active_adapters)  # which it does not carry
                part.state.weights, part.state.apart = weights_and_apart(self.composition)
            if disabled:
                part.enable_adapters(False)
        if injection.team is not None and (sharding := injection.team.sharding) is not None:
            self._share(adapter_name, parts, injection.cfg, sharding)
        return injection.report

    def _share(self, adapter_name: str, parts: AdapterCarriers, config: PeftConfig, sharding: Sharding) -> None:
        """Hook the gradients of a new adapter on a sharded base, and put the sampled values for its fingerprint into
        `samples` now.

        The first adapter makes the `averager`; later ones only give it the new sharding. All processes do this
        together; a save is then the work of one.
        """
        if self.averager is None:
            self.averager = self.call.averager = Averager(self, sharding)
        self.averager.sharding = sharding
        self.note_values()
        note = fingerprint_carriers(parts, self.model, adapter_name, config, False, together=True)
        self.samples[adapter_name] = note.get("sample")

    @contextmanager
    def provisional(self, adapter_name: str, then_keep: bool = True) -> Iterator[None]:
        """If the block raises, take off an adapter that was injected with `Options.provisional`: base weights that it
        changed come back, and without other adapters the model is unloaded.

        Args:
            then_keep: drop the data for that after the block; False: an outer block will.
        """
        try:
            yield
        except BaseException:
            for layer in self.parts_of(adapter_name).layers.values():
                layer.rollback()
            self.delete_adapter(adapter_name)
            if not self.peft_config:
                self.unload()
            raise
        for layer in self.layers.values() if then_keep else ():
            layer.drop_rollback()

    # checks

    def check_new(self, adapter_name: str, config: PeftConfig) -> None:
        """Raise unless another adapter can have this name and config.

        Raises:
            AdapterNameError: the name is taken, or cannot be one.
            TypeError: it is no config.
            ConfigError: the method does not fit the loaded ones. Or another adapter trains where only one may, unless
                the config has `inference_mode`.
            ValueError: the config trains biases of the base next to another adapter.
        """
        check_adapter_name(adapter_name, list(self.peft_config))
        check_config(config)
        self.check_method(adapter_name, config)
        if not config.inference_mode:
            self.check_trainable(adapter_name, config)
        if self.peft_config:
            check_second_bias(config)

    def check_method(self, adapter_name: str, config: PeftConfig) -> None:
        """Raise ConfigError for a config that cannot be next to the model's adapters.

        In a model for any method (`method` is None) this is a prompt's config, else a config of another peft_type. For
        a prompt on either side the remedy is a new base model, otherwise a mixed model.
        """
        if self.method is None:
            if config.is_prompt_learning:
                raise ConfigError(
                    f"The provided `peft_type` '{config.peft_type.value}' is not compatible with the `PeftMixedModel`: "
                    "it acts on no layers. Use get_peft_model without mixed=True."
                )
        elif config.peft_type != self.method.config.peft_type:
            remedy = "PeftMixedModel.from_pretrained(…) or get_peft_model(…, mixed=True) takes several methods"
            if config.is_prompt_learning or self.method.config.is_prompt_learning:
                remedy = "prompts need a base model without other adapters, so load a new one"
            raise ConfigError(
                f"Cannot combine adapters with different peft types. Found {self.method.config.peft_type} and "
                f"{config.peft_type} (of adapter '{adapter_name}'): {remedy}."
            )

    def check_trainable(self, adapter_name: str, config: PeftConfig) -> None:
        """Raise ConfigError if the method lets only one adapter train (AdaLoRA), and another one has a config without
        `inference_mode`.

        The new config's mode does not matter. A mixed model allows several, and so does each method that is not
        `over_layers`.
        """
        if self.is_mixed or not method_of(config.peft_type).over_layers:  # a mixed model has no allocator
            return
        trainable = [n for n, c in self.find_same_method(config).items() if n != adapter_name and not c.inference_mode]
        if trainable:
            raise ConfigError(
                f"{ROWS[config.peft_type.value].tuner} supports only 1 trainable adapter. When using multiple "
                "adapters, set inference_mode to True for all adapters except the one you want to train. "
                f"Trainable: {trainable}."
            )

    def check_known(self, names: Sequence[str]) -> None:
        """Raise AdapterNotFoundError if one of these adapters is not loaded. The text lists the loaded ones."""
        unknown = sorted(n for n in names if n not in self.peft_config)
        if unknown:
            loaded = ", ".join(self.peft_config) or "none"
            raise AdapterNotFoundError(f"Adapter {', '.join(unknown)} not found. Loaded adapters: {loaded}.")

    # activate

    # a change of the old ones as well, which no longer train
    @changes(lambda self, adapter_name, *_, **__: (ACTIVE, *self.active_adapters, *names_to_activate(adapter_name)))
    def set_adapter(self, adapter_name: str | Sequence[str] | Composition, inference_mode: bool = False) -> None:
        """Make adapters active, in this order or as a composition says, and trainable unless `inference_mode`.

        Others are deactivated and frozen. Sets `active_adapters` and `composition`; a Stack gives None as composition.
        Waits until no call runs.

        Merged adapters are unmerged first, with a warning, unless just these are merged on all layers under the same
        composition. Frozen copies stay frozen. `averaged` becomes False, `on_change` is called; adapters that no
        watch has seen yet get a new one.

        Raises:
            AdapterNotFoundError: one of them is not loaded.
            ValueError: two of them cannot be active together.
            RoutingError: a composition names one that is not loaded, or averages one that does more than add.
        """
        names, composition = names_to_activate(adapter_name), None
        if isinstance(adapter_name, Composition):
            self.check_composition(adapter_name)
            composition = None if isinstance(adapter_name, Stack) else adapter_name
        else:
            self.check_known(names)
            if len(names) > 1:
                self.check_together(names)
        if self.merged_adapters and not (
            composition == self.composition
            and names == self.active_adapters
            and all(layer.is_exactly_merged(names) for layer in self.mergeable_layers())
        ):
            warn("Adapter cannot be set when the model is merged. Unmerging the model first.")
            self.unmerge_adapter()
        weights, apart = weights_and_apart(composition) if composition else (None, False)
        for part in self.carriers():
            part.activate(names, not inference_mode, weights, apart)
        if self.frozen:
            self._freeze(names)
        self.active_adapters, self.composition = names, composition
        if not self.watched.issuperset(names):
            self.watched.update(names)
            self.watch = Watch(self)
        self.averaged = False
        self.on_change()

    def check_together(self, names: Sequence[str]) -> None:
        """Raise ValueError if two of these adapters cannot be active together on some carrier."""
        for part in self.carriers():
            part.check_active(names)

    def check_composition(self, value: Composition) -> None:
        """Raise unless the adapters of a composition are loaded and can act together in it.

        Joint adapters that passed are noted in `checked`, until an adapter is deleted, and not checked again. An
        Average is also planned on each layer.

        Raises:
            RoutingError: one is not loaded, is a prompt, or is averaged and does more than add.
            ValueError: two of them cannot be active together.
        """
        check_known(value.names, self.peft_config, value)
        for key in row_keys(value):
            if isinstance(key, JointAdapters) and key not in self.checked:
                if len(key.names) > 1:
                    self.check_together(key.names)
                for part in self.carriers() if key.weights is not None else ():
                    if isinstance(part, Host):
                        part.plan_for(key.names, key.weights)
                self.checked.add(key)

    @changes(lambda _, adapter_names, *__, **___: as_name_list(adapter_names, "set_requires_grad"))
    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Set requires_grad of all parameters of these adapters, active or not.

        Frozen copies (`frozen`) stay frozen.

        Waits until no call runs. `averaged` becomes False at the end: the next step checks who averages gradients.

        Raises:
            AdapterNotFoundError: one is not loaded.
        """
        names = as_name_list(adapter_names, "set_requires_grad")
        self.check_known(names)
        for part in self.carriers():
            part.set_requires_grad(names, requires_grad)
        self._freeze(names)
        self.averaged = False

    def note_values(self) -> None:
        """Note that an adapter has got values from a file: `averaged` becomes False, and an averager looks for
        parameters again and compares values before a step.
        """
        self.averaged = False
        if self.averager is not None:
            self.averager.find_parameters()  # a load may have replaced some
            self.averager.compares_values = True

    def trains(self, adapter_name: str) -> bool:
        """Return True if some parameter of an adapter requires gradients."""
        return any(p.requires_grad for part in self.carriers() for p in part.parameters_of(adapter_name))

    def _freeze(self, names: Sequence[str]) -> None:
        """Set requires_grad to False on all carriers for those of these adapters that never train (`frozen`)."""
        frozen_names = [name for name in names if name in self.frozen]
        for part in self.carriers() if frozen_names else ():
            part.set_requires_grad(frozen_names, False)

    @property
    def is_disabled(self) -> bool:
        """True if adapters are disabled for this thread's calls, or all carriers are switched off.

        False without carriers, unless the thread's calls have them disabled.
        """
        off = [part.state.disabled for part in self.carriers()]
        return self.call.off or (bool(off) and all(off))

    # on and off

    @changes(all_adapters)
    def enable_adapter_layers(self) -> None:
        """Switch all adapters on, and call `on_change`.

        Waits until no call runs; merged adapters are not merged again.
        """
        for part in self.carriers():
            part.enable_adapters(True)
        self.on_change()

    @changes(all_adapters)
    def disable_adapter_layers(self) -> None:
        """Switch all adapters off, for all threads, and call `on_change`.

        Waits until no call runs. Layers unmerge. Warns of active adapters that train biases of the base.
        """
        self._warn_of_biases()
        for part in self.carriers():
            part.enable_adapters(False)
        self.on_change()

    @contextmanager
    def disable_for_thread(self) -> Iterator[None]:
        """Run the base model without adapters within the block, in this thread.

        Merged adapters are unmerged, and stay unmerged.

        Calls `on_change` at begin and end. Warns if only some carriers are switched off, or active adapters train
        biases of the base. No thread can merge until the block ends.

        Raises:
            InUseError: adapters are merged, and this thread is in a call, or others' calls do not end.
        """
        if len({part.state.disabled for part in self.carriers()}) > 1:
            warn(
                "The model contains some adapter layers that are enabled and others that are disabled. "
                "This is most likely unintentional. After the block each is as before."
            )
        self._warn_of_biases()
        try:
            with self.call.disable_in_block():  # from here on no thread can merge
                if self.merged_adapters:
                    with self.call.gate.change("disable_adapter() of merged adapters"):
                        if self.merged_adapters:
                            self.unmerge_adapter()
                self.on_change()
                yield
        finally:
            self.on_change()

    def _warn_of_biases(self) -> None:
        """Warn for each active adapter with a config that trains biases of the base, which disabling does not take
        back.
        """
        for config in (self.peft_config.get(name) for name in self.active_adapters):
            bias = getattr(config, "bias", "none")
            if bias != "none":
                warn(
                    f"Careful, disabling adapter layers with bias configured to be '{bias}' does not produce the same "
                    "output as the base model would without adaption."
                )

    # merge

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters merged into some layer, each once, in the order of layers and merges."""
        return list(dict.fromkeys(name for part in self.carriers() for name in part.state.merged))

    def mergeable_layers(self) -> list[AdapterLayer]:
        """Return the adapter layers, and the wrappers of token rows."""
        return [*self.layers.values(), *(w for w in self.wrappers.values() if isinstance(w, RowsLayer))]

    @changes(all_adapters)
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters (None: those active on each layer) into the base weights; `unmerge_adapter` takes them out.

        Waits until no call runs. Adapters that are merged already are left out, with a warning. A copy of each merged
        weight is kept, so that the unmerge is exact to the bit. Float32 and float64 weights keep the factors of
        products instead, and subtract.

        Args:
            safe_merge: compute every merged weight first and check that it is finite, which takes as long as merging.
                Without it only the adapters' own tensors are checked, not whether a sum overflows half precision.

        Raises:
            AdapterNotFoundError: one of them is not loaded.
            ValueError: values are not finite, a name is there twice, or adapters are disabled. Nothing is merged then.
            NotImplementedError: some layer cannot hold them merged. Nothing is merged then.
        """
        self._merge(adapter_names, safe_merge, undoable=True)

    def _merge(self, adapter_names: list[str] | None, safe_merge: bool, undoable: bool, progress: bool = False) -> None:
        """Merge adapters into all mergeable layers, and keep the shares that the weights hold in `shares_kept`.

        If none was left to merge, `shares_kept` stays.

        Args:
            adapter_names: None: those active on each layer.
            undoable: keep the data to unmerge.
            progress: show a progress bar.

        Raises:
            As `merge_adapter`.
        """
        choice = None if adapter_names is None else check_name_list(adapter_names, "adapter_names")
        self.check_known(choice or ())
        shares = merging.merge_layers(self.mergeable_layers(), choice, safe_merge, undoable, progress)
        if shares is not None:
            self.shares_kept = shares

    @changes(all_adapters)
    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights, and set `shares_kept` to {}.

        Waits until no call runs. Warns if none is merged, and empties `shares_kept` all the same.
        """
        if not self.merged_adapters:
            warn("Already unmerged. Nothing to do.")
        for layer in self.mergeable_layers():
            if layer.merged_adapters:
                layer.unmerge()
        self.shares_kept = {}

    @changes(all_adapters)
    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dequantize: bool = False,
    ) -> nn.Module:
        """Merge without a way back, remove the adapter layers, and return the plain model. Waits until no call runs.

        Args:
            progressbar: show one.
            safe_merge: as in `merge_adapter`.
            adapter_names: None: those active on each layer.
            dequantize: hold the weights of adapted layers as plain tensors from then on, where they are packed (4-bit
                codes and the like). Merging is then exact, also into weights that cannot be quantized anew. The model's
                marks of quantization are removed if no packed weight is left, else the plain layers are noted in them.

        Raises:
            As `merge_adapter`; NotImplementedError also if a layer cannot be dequantized.
        """
        with self._dequantize_layers(adapter_names) if dequantize else nullcontext(False) as some:
            self._merge(adapter_names, safe_merge, undoable=False, progress=progressbar)
        plain = self.unload()
        if dequantize and not any(map(holds_codes, plain.modules())):
            remove_quantization_marks(plain)
        elif some:
            mark_plain_layers(plain)
        return plain

    @contextmanager
    def _dequantize_layers(self, adapter_names: list[str] | None) -> Iterator[bool]:
        """Replace packed weights of the layers of these adapters by plain tensors, and yield whether there were any.

        `adapter_names=None` selects the active adapters of each layer; layers of merged adapters always count. All
        checks come before any change. Adapters that are merged already are unmerged before and merged again after, so
        that they can be unmerged. The new dtype is that of the model's unpacked weights. If the replacement or the
        caller's block raises, the packed modules come back and merged adapters are merged again.

        Raises:
            NotImplementedError: a weight cannot be read, or its module understands only codes.
        """
        done = self.merged_adapters
        choice = None if adapter_names is None else check_name_list(adapter_names, "adapter_names")
        named = ((layer, layer.active_adapters if choice is None else choice) for layer in self.mergeable_layers())
        layers = [layer for layer, names in named if not layer.methods.keys().isdisjoint([*done, *names])]
        packed = [(layer, layer.store) for layer in layers if isinstance(layer.store, Quantized)]
        for layer, store in packed:
            if (why := store.why_unreadable(layer.base_layer)) is not None:
                raise NotImplementedError(f"Cannot dequantize layer '{layer.site.key}': {why}.")
        for layer in layers:
            if layer.op.packed_shape is not None:
                raise NotImplementedError(
                    f"Cannot dequantize layer '{layer.site.key}': its module understands only codes. Load the "
                    "base dequantized (in transformers: dequantize=True in its quantization_config) and merge there."
                )
        if done:
            self.unmerge_adapter()
        before = [(layer, layer.base_layer, layer.op, store) for layer, store in packed]
        dtype = find_unpacked_dtype(survey_model(self.model).owners)
        try:
            for layer, store in packed:
                plain = store.dense(layer.base_layer, dtype)
                layer.replace_base_layer(plain, find_op(plain), DENSE)
            if done:
                self._merge(done, False, undoable=True)
            yield bool(packed)
        except BaseException:
            if self.merged_adapters:
                self.unmerge_adapter()
            for layer, module, op, store in before:
                layer.replace_base_layer(module, op, store)
            if done:
                self._merge(done, False, undoable=True)
            raise

    @changes(all_adapters)
    def unload(self, keep_modules: bool = True) -> nn.Module:
        """Return the model without adapter layers. The parameters train that did before the first adapter.

        Waits until no call runs. If the base came with adapters, its parameters stay frozen. Modules in
        `modules_to_save` keep the active adapter's values, also while adapters are disabled. Merged weights stay
        merged. `layers` and `wrappers` become empty; `peft_config` stays. FSDP2 then averages the parameters that
        train, if it had sharded the base before.

        Args:
            keep_modules: False: the base's own modules are put back, and merged adapters are unmerged.
        """
        if not keep_modules:
            if self.merged_adapters:
                self.unmerge_adapter()
            for part in self.carriers():
                part.state.active = []
        merging.unload_adapters(self.model, self.frozen_before)
        if self.averager is not None:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.averager.sharding.set_trainability(trained, True)
        self.layers, self.wrappers = {}, {}
        return self.model

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True if the adapter is on some layer, and plain LoRA can hold its update on all of its layers."""
        layers = [layer for layer in self.layers.values() if adapter_name in layer.methods]
        return bool(layers) and all(layer.supports_lora_conversion(adapter_name) for layer in layers)

    # delete

    @changes(lambda self, adapter_name: adapters_of_deletion(adapter_name, self.active_adapters))
    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, its tensors, and all that the registry notes of it. Waits until no call runs.

        If it was active, the remaining active ones are activated again by `set_adapter`, which also lets them train. If
        it was the only active one, that is the first of the others (by name), with a warning; none without others.

        If it was part of an active Average or Parallel, the composition ends, with a warning.

        Raises:
            AdapterNotFoundError: it is not loaded.
            ValueError: it is merged.
        """
        if adapter_name not in self.peft_config:
            raise AdapterNotFoundError(
                f"Adapter {adapter_name} does not exist. Loaded adapters: {', '.join(self.peft_config)}."
            )
        check_not_merged([adapter_name], self.merged_adapters)
        composition, self.checked = self.composition, set()
        known: list[dict[str, Any]] = [self.peft_config, self.reports, self.states, self.starts, self.samples]
        for by_name in known:
            by_name.pop(adapter_name, None)
        for names in (self.watched, self.trained, self.frozen, self.taken_in):
            names.discard(adapter_name)
        for part in self.carriers():
            part.forget(adapter_name)
        if adapter_name in self.active_adapters:
            if composition is not None:
                warn(f"Adapter '{adapter_name}' was a part of {composition!r}, which ends. Call set_adapter() again.")
            self.set_adapter(active_after_deletion(adapter_name, self.active_adapters, self.peft_config))

    # run

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self.model.training

    def calling(self, call_name: str, rows: Names = None) -> AbstractContextManager[object]:
        """Return a context that counts as a call of the model by this thread: nothing changes within it.

        Under a compiler it does nothing.

        Args:
            call_name: its name, for threads that wait.
            rows: the adapters that the rows of a mixed batch name; None: the active ones.
        """
        if torch.compiler.is_compiling():
            return nullcontext()
        return self.call.gate.call(call_name, self._names_used if rows is None else lambda: rows)

    def _names_used(self) -> tuple[str, ...]:
        """Return the names that a call without names of rows uses: those of the active adapters, and a mark for the
        choice of them.
        """
        return (ACTIVE, *self.active_adapters)

    def wait_for_calls(self, touches: Names = ()) -> None:
        """Wait until no call of these adapters (None: of any) runs, in the middle of a change that this thread has
        prepared. Calls then wait for the change. Raises InUseError.
        """
        with self.call.gate.change("a change", touches):
            pass

    def enter_methods(self, run: Run) -> AbstractContextManager[Finish]:
        """Return a context for one run of the model. Methods of the run's adapters act at its begin and end.

        The adapters are those of the rows' names, or the active ones. The context yields a function that finishes the
        model's output. Losses of adapters are collected only with gradients and outside `generate`. Without such
        methods and losses it is a `PlainRun`.
        """
        names = self.active_adapters if run.rows is None else run.rows.names
        adapters_by_method: dict[type[Method], list[str]] = {}
        for name in names if self.surrounding else ():
            if name is not None and name in self.surrounding:
                adapters_by_method.setdefault(self.surrounding[name], []).append(name)
        losing = torch.is_grad_enabled() and not run.generates and any(name in self.losing for name in names)
        return self._surround(run, adapters_by_method, losing) if adapters_by_method or losing else PlainRun()

    @contextmanager
    def _surround(self, run: Run, adapters_by_method: dict[type[Method], list[str]], losing: bool) -> Iterator[Finish]:
        """Enter `surround_run` of each method, with adapters disabled only where `surrounds_disabled` is True.

        Collect the values noted by layers if `losing`.

        Yield a function for the output.

        That function passes the output through each method's, in the order of entry, then adds losses.

        Args:
            adapters_by_method: the run's adapters, by the method that surrounds it.
        """
        with ExitStack() as stack:
            steps = []
            for method, run.adapters in adapters_by_method.items():
                if method.surrounds_disabled or not self.is_disabled:
                    steps.append(stack.enter_context(method.surround_run(self, self.call, run)))
            if losing:
                noted = stack.enter_context(self.call.collect_values())
                steps.append(lambda output: self._add_losses(output, noted, run))

            def finish(output: object) -> object:
                """Return the output after the functions of `steps`, each on the result of the one before."""
                for step in steps:
                    output = step(output)
                return output

            yield finish

    def _add_losses(self, output: object, noted: Mapping[str, Sequence[AuxiliaryValue]], run: Run) -> object:
        """Return the output with the adapters' losses, computed from `noted`, in its loss.

        If it has no loss with a gradient, the output stays, and the losses are kept in the thread's state for
        `auxiliary_loss`. Without losses the output stays.
        """
        losses = compute_losses(noted, self.losing, self.peft_config, run, self.model)
        both = add_to_loss(output, sum(losses.values())) if losses else output
        if both is None:
            self.call.thread_state.losses.update(losses)
        return output if both is None else both

    def auxiliary_loss(self, adapter_names: str | Sequence[str] | None = None) -> Tensor | float:
        """Return the adapters' losses of this thread's last call, a scalar tensor, for loops that compute the loss
        themselves.

        0.0 if there is none: in eval mode, without gradients, for methods without a loss, or if the losses were added
        to that of the model's output.

        Args:
            adapter_names: sum the losses of these adapters; None: of all.

        Raises:
            AdapterNotFoundError: there is no such adapter.
        """
        losses = self.call.thread_state.losses
        names = list(losses) if adapter_names is None else as_name_list(adapter_names, "auxiliary_loss")
        self.check_known(names)
        return sum((self.call.loss_of(name) for name in names if name in losses), 0.0)

    def check_generate(self, kwargs: dict[str, object]) -> None:
        """Do nothing: prompts raise here for arguments of `generate` that do not work with them."""
