# SPDX-License-Identifier: Apache-2.0
"""The registry of a model's adapters: which it has, which are active, and their carriers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from graft.config.base import PeftConfig, check_config
from graft.core.call import Call
from graft.core.carrier import Carrier, active_without, carried, check_not_merged
from graft.core.containers import BufferDict, Slot
from graft.core.errors import (
    AdapterNameError,
    AdapterNotFoundError,
    AlreadyInjectedError,
    ConfigError,
    shortened,
    warn,
)
from graft.core.gate import ACTIVE, Names, changes, deletion, everything
from graft.core.layer import AdapterLayer, Host
from graft.core.method import Method
from graft.core.names import one_or_several
from graft.core.rows import BASE, Finish, Run, Together
from graft.inject.find import biases_of
from graft.inject.job import Options
from graft.inject.parts import Parts, check_foreign, registry_of
from graft.inject.report import InjectReport
from graft.inject.survey import Tree, Wrapper, survey
from graft.io.rendezvous import Note
from graft.model.compose import Average, Composition, Parallel, Stack, check_known, keys_of
from graft.model.watch import Watch
from graft.prompts.base import Prompt

_TAKEN = {name for container in (nn.ModuleDict(), nn.ParameterDict(), BufferDict()) for name in dir(container)}


LONGEST_NAME = 255  # bytes


def names_for(choice: str | Sequence[str] | Composition) -> list[str]:
    """Return the adapters that `set_adapter` is to make active."""
    return choice.names if isinstance(choice, Composition) else one_or_several(choice, "set_adapter")


def how(value: Composition | None) -> tuple[tuple[float, ...] | None, bool]:
    """Return the weights of the active adapters, and whether each has its own rows."""
    return value.weights if isinstance(value, Average) else None, isinstance(value, Parallel)


REMEDY = "Choose another name (add_adapter() puts it beside that one), or delete_adapter() it first."


def check_adapter_name(name: str, taken: Sequence[str] = (), remedy: str = REMEDY) -> None:
    """Raise AdapterNameError unless `name` can name a new adapter; `remedy` is for one that is taken."""
    if not isinstance(name, str) or not name:
        raise AdapterNameError(f"An adapter needs a non-empty string as its name, got {shortened(repr(name))}.")
    if "." in name:
        raise AdapterNameError(
            f'module name can\'t contain ".", got: {name}: adapter names are parts of parameter names.'
        )
    if "/" in name or "\\" in name or name == BASE:
        raise AdapterNameError(
            f"'{name}' cannot name an adapter: names become folders, and '{BASE}' stands for the base model."
        )
    try:
        size = len(os.fsencode(name))
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= LONGEST_NAME or "\0" in name:
        raise AdapterNameError(
            f"{shortened(repr(name))} cannot name an adapter: names become folders, and file systems take up to "
            f"{LONGEST_NAME} bytes of valid text without NUL."
        )
    if name in _TAKEN:
        raise AdapterNameError(
            f"attribute '{name}' already exists on torch's containers: give the adapter another name."
        )
    if name in taken:
        raise AdapterNameError(f"Adapter with name '{name}' already exists. {remedy}")


class Configs(dict[str, PeftConfig]):
    """The configs of a tuner's adapters, by name, which its model shows as `peft_config` as well."""


def configs_of(model: nn.Module) -> dict[str, PeftConfig]:
    """Return the configs of the adapters that a model carries without a PeftModel."""
    configs = getattr(model, "peft_config", None)
    if configs is None or isinstance(configs, Configs):
        return {}
    check_foreign(model)
    own: dict[str, PeftConfig] = configs
    return own


def check_registered(model: nn.Module, parts: Sequence[AdapterLayer | Wrapper]) -> None:
    """Raise AlreadyInjectedError if `model` carries adapters of another PeftModel's registry.

    Adapters of a model without a PeftModel stand in the model's own `peft_config`.
    """
    registered = configs_of(model)
    foreign = sorted({name for part in parts for name in part.adapters if name not in registered})
    if foreign:
        raise AlreadyInjectedError(
            f"The model carries adapter(s) {foreign} of another PeftModel, which has them in its registry. For another "
            "adapter beside them call load_adapter() or add_adapter() of that PeftModel; to start over, its unload()."
        )


@contextmanager
def unless_it_fails(config: PeftConfig) -> Iterator[None]:
    """Restore a config's fields if the block raises."""
    before = dict(vars(config))
    try:
        yield
    except BaseException:
        config.__dict__.clear()
        config.__dict__.update(before)
        raise


def parameters_of(module: nn.Module, registry: Registry, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of one adapter that can train, with their names in `module`, in its order.

    Raises:
        AdapterNotFoundError: it is not loaded.
    """
    registry.check_known([adapter])
    slots = {name: list(registry.slots_of(name)) for name in registry.peft_config}
    own = {id(slot.tensor) for slot in slots[adapter] if slot.trains and slot.is_parameter}
    adapted = [layer.base_module for layer in registry.parts_of(adapter).layers.values()]
    biases = biases_of(registry.peft_config[adapter], registry.model, adapted, list(registry.wrappers))
    own |= {id(bias) for bias in biases} - {id(slot.tensor) for group in slots.values() for slot in group}
    return ((name, p) for name, p in module.named_parameters() if id(p) in own)


class Registry:
    """The registry of a model's adapters, which act on layers (`LayerRegistry`) or are prompts (`Prompts`).

    A plain object beside the model: in PeftModel or tuner its names would hide those of the base model.
    """

    method: type[Method] | type[Prompt]  # the Method or Prompt class
    model: nn.Module  # the base model
    layers: dict[str, AdapterLayer]
    wrappers: dict[str, Wrapper]
    call: Call
    checkpointing: bool  # the model has gradient checkpointing on
    peft_config: dict[str, PeftConfig]
    reports: dict[str, InjectReport]
    active_adapters: list[str]
    composition: Composition | None  # the Average or Parallel that they form
    checked: set[Together]  # adapters that can act together so
    on_change: Callable[[], None] | None = None  # called when other adapters run
    merged_adapters: Sequence[str] = ()
    states: dict[str, Any]  # state of methods during training, by adapter
    watch: Watch | None = None  # looks at the first backward passes, until it has seen enough
    watched: set[str]  # adapters for which that was set up
    trained: set[str]  # adapters that were active in a backward pass
    averaged = False  # the gradients of what trains now will be averaged over processes
    in_ddp = False  # it ran within a DDP, the last time that somebody looked
    frozen: set[str]  # adapters that never train, and that no save takes unless it is told to
    taken_in: set[str]  # adapters of which the base weights hold a part for good, that no file of theirs has
    starts: dict[str, Note]  # notes of the values with which adapters began, by adapter
    arguments: set[str]  # of a call of the model that are the methods' own
    several: str  # for errors: how to activate several adapters

    def begin(self, model: nn.Module, tree: Tree | None = None) -> Tree:
        """Register the adapters that `model` carries. Return a survey of it: `tree`, if the caller made one."""
        if registry_of(model) is not None:
            raise AlreadyInjectedError(
                "The model is a PeftModel already. For another adapter of the method it has, call its add_adapter(); "
                "for another method, or to start over, pass its get_base_model()."
            )
        found = tree or survey(model)
        known = [*found.layers.values(), *found.wrappers.values()]
        check_registered(model, known)
        self.model, self.layers, self.wrappers = model, found.layers, found.wrappers
        self.call = known[0].call if known else Call()
        self.peft_config, self.reports, self.active_adapters, self.states = Configs(), {}, [], {}
        self.watched, self.trained, self.frozen, self.starts = set(), set(), set(), {}
        self.taken_in = set()
        self.composition, self.checked = None, set()
        return found

    @property
    def training(self) -> bool:
        return self.model.training

    def calling(self, what: str, rows: Names = None) -> AbstractContextManager[object]:
        """Return a context: a call of the model, during which nothing changes. A compiler does not see it.

        rows: the adapters that the rows of a mixed batch name; None: those count that are active.
        """
        if torch.compiler.is_compiling():
            return nullcontext()
        return self.call.gate.call(what, self._used if rows is None else lambda: rows)

    def _used(self) -> tuple[str, ...]:
        """Return what a call uses that names no adapters."""
        return (ACTIVE, *self.active_adapters)

    def close(self, touches: Names = ()) -> None:
        """Wait until no call is under way, in the middle of a change that this thread has prepared."""
        with self.call.gate.change("a change", touches):
            pass

    def slots_of(self, adapter: str) -> Iterator[Slot]:
        """Yield the slots of an adapter's tensors on all its carriers."""
        for part, name in carried(self.carriers(), [adapter]):
            yield from part.slots(name)

    def carriers(self) -> Iterator[Carrier]:
        """Yield all carriers of adapters."""
        yield from self.layers.values()
        yield from self.wrappers.values()

    @property
    def disabled(self) -> bool:
        """True while there are carriers and all are switched off, or disabled for what this thread calls."""
        return self.switched_off or self.call.off

    @property
    def switched_off(self) -> bool:
        """True while there are carriers and all are switched off."""
        off = [part.state.disabled for part in self.carriers()]
        return bool(off) and all(off)

    def changed_training(self) -> None:
        """Note that other parameters may train."""
        self.averaged = False

    def take_in(self, parts: Parts, disabled: bool) -> None:
        """Register the carriers of a new adapter, and forget those that have no adapter left.

        Args:
            disabled: the others were switched off before: switch off the new ones, too.
        """
        known = {id(part) for part in self.carriers()}
        self.layers = {key: layer for key, layer in self.layers.items() if layer.methods} | parts.layers
        self.wrappers = {key: w for key, w in self.wrappers.items() if w.adapters} | parts.wrappers
        for part in parts.carriers():
            if id(part) not in known:
                state = part.state
                state.active = list(self.active_adapters)  # which it does not carry
                if self.composition is not None:
                    state.weights, state.apart = how(self.composition)
            if disabled:
                part.enable_adapters(False)

    def provisional(self, adapter_name: str, then_keep: bool = True) -> AbstractContextManager[None]:
        """Return a context: an adapter that has come is taken off again if the block raises."""
        return nullcontext()

    def parts_of(self, adapter_name: str) -> Parts:
        """Return the carriers of an adapter."""
        return Parts(
            {key: layer for key, layer in self.layers.items() if adapter_name in layer.methods},
            {key: w for key, w in self.wrappers.items() if adapter_name in w.adapters},
            all_layers=self.layers,
        )

    def add_adapter(self, adapter_name: str, config: PeftConfig, options: Options) -> InjectReport:
        """Add an adapter, inactive. A call that fails changes nothing."""
        raise NotImplementedError

    def acting(self, run: Run) -> AbstractContextManager[Finish]:
        """Surround a run of the model, whose `kwargs` may change; yield a function for its output."""
        raise NotImplementedError

    def check_generate(self, kwargs: dict[str, object]) -> None:
        """Raise for arguments of `generate` that do not work with the adapters."""

    def check_new(self, adapter_name: str, config: PeftConfig) -> None:
        """Raise AdapterNameError or ConfigError unless another adapter can have this name and config."""
        check_adapter_name(adapter_name, list(self.peft_config))
        check_config(config)
        self.check_method(adapter_name, config)

    def check_method(self, adapter_name: str, config: PeftConfig) -> None:
        """Raise ConfigError unless an adapter of this config's method can stand beside the others."""
        if config.peft_type != self.method.config.peft_type:
            mine = next(iter(self.peft_config.values())).peft_type if self.peft_config else self.method.config.peft_type
            prompts = config.is_prompt_learning or self.method.config.is_prompt_learning
            raise ConfigError(
                f"Cannot combine adapters with different peft types. Found {mine} and {config.peft_type} (of adapter "
                f"'{adapter_name}'): "
                + (
                    "prompts stand in a model by themselves, so load it with a base model that has no other adapter."
                    if prompts
                    else "PeftMixedModel.from_pretrained(…), or get_peft_model(…, mixed=True), makes a model that "
                    "takes adapters of several methods."
                )
            )

    def check_trainable(self, adapter_name: str) -> None:
        """Raise ConfigError unless this adapter can train beside those that do."""

    def check_known(self, names: Sequence[str]) -> None:
        """Raise AdapterNotFoundError if the model lacks one of these adapters."""
        unknown = sorted(n for n in names if n not in self.peft_config)
        if unknown:
            loaded = ", ".join(self.peft_config) or "none"
            raise AdapterNotFoundError(f"Adapter {', '.join(unknown)} not found. Loaded adapters: {loaded}.")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True if plain LoRA can hold what an adapter does to all of its layers, of which there are some: see
        `graft.convert_to_lora`."""
        layers = [layer for layer in self.layers.values() if adapter_name in layer.methods]
        return bool(layers) and all(layer.supports_lora_conversion(adapter_name) for layer in layers)

    # those before them as well, which train no more
    @changes(lambda self, adapter_name, *_, **__: (ACTIVE, *self.active_adapters, *names_for(adapter_name)))
    def set_adapter(self, adapter_name: str | Sequence[str] | Composition, inference_mode: bool = False) -> None:
        """Make these adapters active, in this order or as a composition says, and trainable unless for inference.

        Raises:
            AdapterNotFoundError: one of them is not loaded.
            ValueError: two of them cannot be active together.
            RoutingError: a composition names one that is not loaded, or averages one that does more than add.
        """
        names, composition = names_for(adapter_name), None
        if isinstance(adapter_name, Composition):
            self.check_composition(adapter_name)
            composition = None if isinstance(adapter_name, Stack) else adapter_name
        else:
            self.check_known(names)
            self.check_together(names)
        if self.merged_adapters and not (
            composition == self.composition
            and names == self.active_adapters
            and all(layer.is_merged(names) for layer in self.mergeable_layers())
        ):
            warn("Adapter cannot be set when the model is merged. Unmerging the model first.")
            self.unmerge_adapter()
        weights, apart = how(composition)
        for part in self.carriers():
            part.activate(names, not inference_mode, weights, apart)
        self._freeze(names)
        self.active_adapters, self.composition = names, composition
        if not self.watched.issuperset(names):
            self.watched.update(names)
            self.watch = Watch(self)
        self.changed_training()
        self._changed()

    def check_together(self, names: Sequence[str]) -> None:
        """Raise ValueError if two of these adapters cannot be active together."""
        if len(names) > 1:
            for part in self.carriers():
                part.check_active(names)

    def check_composition(self, value: Composition) -> None:
        """Raise unless its adapters are loaded and can act together so.

        Raises:
            RoutingError: one is not loaded, or is averaged and does more than add.
            ValueError: two of them cannot be active together.
        """
        check_known(value.names, self.peft_config, value)
        for key in keys_of(value):
            if isinstance(key, Together) and key not in self.checked:
                self.check_together(key.names)
                for part in self.carriers() if key.weights is not None else ():
                    if isinstance(part, Host):
                        part.plan_for(key.names, key.weights)
                self.checked.add(key)

    def mergeable_layers(self) -> list[AdapterLayer]:
        return []

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights again."""

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()

    @changes(lambda self, adapter_name: deletion(adapter_name, self.active_adapters))
    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its tensors.

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
        known: list[dict[str, Any]] = [self.peft_config, self.reports, self.states, self.starts]
        for by_name in known:
            by_name.pop(adapter_name, None)
        for names in (self.watched, self.trained, self.frozen, self.taken_in):
            names.discard(adapter_name)
        for part in self.carriers():
            part.forget(adapter_name)
        if adapter_name in self.active_adapters:
            if composition is not None:
                warn(f"Adapter '{adapter_name}' was a part of {composition!r}, which ends: set_adapter() anew.")
            self.set_adapter(active_without(adapter_name, self.active_adapters, self.peft_config))

    @changes(lambda _, adapter_names, *__, **___: one_or_several(adapter_names, "set_requires_grad"))
    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the parameters of any adapters, active or not, train or not."""
        names = one_or_several(adapter_names, "set_requires_grad")
        self.check_known(names)
        for part in self.carriers():
            part.set_requires_grad(names, requires_grad)
        self._freeze(names)
        self.changed_training()

    def trains(self, adapter_name: str) -> bool:
        """Return True if some parameter of an adapter requires gradients."""
        return any(p.requires_grad for part in self.carriers() for p in part.parameters_of(adapter_name))

    def _freeze(self, names: Sequence[str]) -> None:
        """Take back what let frozen adapters train."""
        frozen_names = [name for name in names if name in self.frozen]
        for part in self.carriers() if frozen_names else ():
            part.set_requires_grad(frozen_names, False)

    # on and off

    @changes(everything)
    def enable_adapter_layers(self) -> None:
        for part in self.carriers():
            part.enable_adapters(True)
        self._changed()

    @changes(everything)
    def disable_adapter_layers(self) -> None:
        self._warn_of_biases()
        for part in self.carriers():
            part.enable_adapters(False)
        self._changed()

    @contextmanager
    def disabled_here(self) -> Iterator[None]:
        """Let the base model run alone within the block, for this thread. Unmerge merged adapters; they stay unmerged.

        Raises:
            InUseError: adapters are merged, and this thread is in a call, or others' calls do not end.
        """
        if len({part.state.disabled for part in self.carriers()}) > 1:
            warn(
                "The model contains some adapter layers that are enabled and others that are disabled. "
                "This is most likely unintentional. They are put back as they were after the block."
            )
        self._warn_of_biases()
        try:
            with self.call.disabled():  # from here on no thread can merge
                if self.merged_adapters:
                    with self.call.gate.change("disable_adapter() of merged adapters"):
                        if self.merged_adapters:
                            self.unmerge_adapter()
                self._changed()
                yield
        finally:
            self._changed()

    def _warn_of_biases(self) -> None:
        for config in (self.peft_config.get(name) for name in self.active_adapters):
            bias = getattr(config, "bias", "none")
            if bias != "none":
                warn(
                    f"Careful, disabling adapter layers with bias configured to be '{bias}' does not produce the same "
                    "output as the base model would without adaption."
                )
