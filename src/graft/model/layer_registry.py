# SPDX-License-Identifier: Apache-2.0
"""The registry of adapters on layers: adding them, and what they do around a run of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graft.config.base import PeftConfig
from graft.core.call import Noted
from graft.core.carrier import Carrier
from graft.core.errors import AdapterNameError, ConfigError, UnsupportedLayerError, who
from graft.core.gate import prepares
from graft.core.method import Method, as_it_is
from graft.core.names import one_or_several
from graft.core.rows import Finish, Run, parameters_of
from graft.core.shared import Shared
from graft.inject.inject import Injection, check_bias
from graft.inject.job import Options
from graft.inject.parts import Parts
from graft.inject.report import InjectReport
from graft.inject.steps import Steps
from graft.inject.survey import Tree
from graft.io.base import original
from graft.methods import ROWS, method_of
from graft.model.auxiliary import losses_of, with_loss
from graft.model.merging import MergingRegistry
from graft.model.registry import configs_of
from graft.model.tuner_type import INJECT, is_replaced, replaced


class NothingAround:
    """A run that no method surrounds. A class: the compiler of torch 2.6 does not look into generators."""

    def __enter__(self) -> Finish:
        return as_it_is

    def __exit__(self, *raised: object) -> None:
        pass


class LayerRegistry(MergingRegistry):
    """The registry of a model's adapters of one method on layers; of any methods if `method` is None.

    holder: the tuner, which holds the tensors that layers share.
    """

    method: type[Method]
    steps: Steps | None = None  # of the injection under way, if some were replaced
    pending: Options | None = None  # of an injection that a replaced `inject_adapter` is asked for
    several = "use model.base_model.set_adapter([...]) to activate several"

    def __init__(self, holder: nn.Module, model: nn.Module, method: type[Method] | None, tree: Tree | None = None):
        self.holder, self.mixed = holder, method is None
        self.method = method  # type: ignore[assignment]
        self.tree: Tree | None = self.begin(model, tree)  # for the first injection, None afterwards
        self.checkpointing = self.tree.checkpointing
        self.shared = Shared()
        self.shared.state.call = self.call
        self.surrounding: dict[str, type[Method]] = {}  # classes that surround runs of the model, by adapter
        self.losing: dict[str, type[Method]] = {}  # classes that have a loss of their own, by adapter
        self.arguments: set[str] = set()
        self.peft_config |= configs_of(model)
        for name, config in self.peft_config.items():
            self._note(name, config)

    def method_for(self, config: PeftConfig) -> type[Method]:
        return method_of(config.peft_type) if self.mixed else self.method

    def alike(self, config: PeftConfig) -> dict[str, PeftConfig]:
        """Return the configs of the adapters of the same method, by name."""
        method = method_of(config.peft_type)
        return {name: c for name, c in self.peft_config.items() if method_of(c.peft_type) is method}

    # adapters

    @prepares
    def add_adapter(
        self,
        adapter_name: str,
        config: PeftConfig,
        options: Options,
    ) -> InjectReport:
        """Inject another adapter, inactive. All or nothing: see `graft.inject.inject`."""
        self.check_new(adapter_name, config)
        if is_replaced(self.holder, self.method_for(config), INJECT):
            return self._ask_to_inject(adapter_name, config, options)
        return self._inject(adapter_name, config, options)

    def _ask_to_inject(self, adapter_name: str, config: PeftConfig, options: Options) -> InjectReport:
        """Call a replaced `inject_adapter`, whose call of the original injects.

        Raises:
            UnsupportedLayerError: it does not call the original. Whatever it raises: nothing has changed.
        """
        holder: Any = self.holder
        arguments: dict[str, object] = dict(low_cpu_mem_usage=options.on_meta)  # what PEFT hands on
        arguments |= {} if self.peft_config else dict(state_dict=options.state_dict)
        self.peft_config[adapter_name], self.pending = config, options
        try:
            with self.provisional(adapter_name, not options.provisional):
                holder.inject_adapter(self.model, adapter_name, **arguments)
                if adapter_name not in self.reports:
                    raise UnsupportedLayerError(
                        f"{type(holder).__name__}.inject_adapter was replaced by {who(holder.inject_adapter)}, which "
                        f"has not called the original for adapter '{adapter_name}': graft injects there alone."
                    )
        finally:
            self.pending = None
        return self.reports[adapter_name]

    def _inject(self, adapter_name: str, config: PeftConfig, options: Options) -> InjectReport:
        """Inject an adapter that has been checked, and register it: in a change that is being prepared."""
        if getattr(config, "bias", "none") != "none":
            self.close(None)  # the base's biases get the values of the file
        tree, self.tree, disabled = self.tree, None, self.switched_off
        method = self.method_for(config)
        theirs = replaced(self.holder, method)
        done = Injection(
            self.model,
            config,
            method,
            adapter_name,
            call=self.call,
            shared=self.shared,
            others=self.alike(config),
            tree=tree,  # type: ignore[arg-type]  # None: it makes one
            mixed=self.mixed,
            close=self.close,
            steps=Steps(self.holder, theirs) if theirs else None,
            options=options,
            keys=None if options.state_dict is None else self._keys_in(options.state_dict, config),
        ).run()
        for name, container in self.shared.modules().items():
            if name not in self.holder._modules:
                self.holder.add_module(name, container)
        self.take_in(done.parts, disabled)
        if self.frozen_before is None:
            self.frozen_before = done.frozen_before
        self.peft_config[adapter_name] = config
        self._note(adapter_name, config)
        self.reports[adapter_name] = done.report
        return done.report

    def _note(self, adapter_name: str, config: PeftConfig) -> None:
        method = method_of(config.peft_type).variant(config)
        for known, has in ((self.surrounding, method.surrounds), (self.losing, method.has_loss)):
            known.pop(adapter_name, None)
            if has:
                known[adapter_name] = method
        self.arguments |= set(method.arguments).difference(parameters_of(self.model))  # it gets its own

    @prepares
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add the adapter whose config the caller has put into `peft_config` under that name, as PEFT's callers do.

        Raises:
            ValueError: `model` is not the tuner's own.
            AdapterNotFoundError: there is no such config.
            AdapterNameError: layers carry an adapter of that name.
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

    def parts_of(self, adapter_name: str) -> Parts:
        parts = super().parts_of(adapter_name)
        parts.shared = self.shared
        return parts

    def acting(self, run: Run) -> AbstractContextManager[Finish]:
        names = self.active_adapters if run.rows is None else run.rows.names
        found: dict[type[Method], list[str]] = {}
        for name in names if self.surrounding else ():
            if name is not None and name in self.surrounding:
                found.setdefault(self.surrounding[name], []).append(name)
        losing = torch.is_grad_enabled() and not run.generates and any(name in self.losing for name in names)
        return self._around(run, found, losing) if found or losing else NothingAround()

    @contextmanager
    def _around(self, run: Run, found: dict[type[Method], list[str]], losing: bool) -> Iterator[Finish]:
        with ExitStack() as stack:
            steps = []
            for method, run.adapters in found.items():
                steps.append(stack.enter_context(method.around(self, self.call, run)))
            if losing:
                noted = stack.enter_context(self.call.noting())
                steps.append(lambda output: self._with_losses(output, noted, run))

            def finish(output: object) -> object:
                for step in steps:
                    output = step(output)
                return output

            yield finish

    def _with_losses(self, output: object, noted: Mapping[str, Sequence[Noted]], run: Run) -> object:
        """Return the output with the adapters' losses in its own; keep them if it has none."""
        losses = losses_of(noted, self.losing, self.peft_config, run, self.model)
        both = with_loss(output, sum(losses.values())) if losses else output
        if both is None:
            self.call.here.losses.update(losses)
        return output if both is None else both

    def auxiliary_loss(self, adapter_names: str | Sequence[str] | None = None) -> Tensor | float:
        """Return what adapters add to the loss of this thread's last call, (), where its output had no loss to add to.

        It is for loops that compute the loss themselves. 0.0 for calls in eval mode, without gradients, or of adapters
        that have no loss of their own; and if the model's output has a `loss`, which holds it already.

        Args:
            adapter_names: those of which to return the sum; None: all.

        Raises:
            AdapterNotFoundError: there is no such adapter.
        """
        losses = self.call.here.losses
        names = list(losses) if adapter_names is None else one_or_several(adapter_names, "auxiliary_loss")
        self.check_known(names)
        return sum((self.call.loss_of(name) for name in names if name in losses), 0.0)

    def check_method(self, adapter_name: str, config: PeftConfig) -> None:
        if not self.mixed:
            super().check_method(adapter_name, config)
        elif config.is_prompt_learning:
            raise ConfigError(
                f"The provided `peft_type` '{config.peft_type.value}' is not compatible with the `PeftMixedModel`: it "
                "acts on no layers. Use get_peft_model without mixed=True."
            )

    def check_new(self, adapter_name: str, config: PeftConfig) -> None:
        super().check_new(adapter_name, config)
        if not config.inference_mode:
            self._check_alone(adapter_name, config)
        check_bias(config, self.peft_config.values())

    def check_trainable(self, adapter_name: str) -> None:
        self._check_alone(adapter_name, self.peft_config[adapter_name])

    def _check_alone(self, adapter_name: str, config: PeftConfig) -> None:
        """Raise ConfigError if the method lets one adapter train at a time, and another one does."""
        method, tuner = self.method_for(config), ROWS[config.peft_type.value].tuner
        others = [n for n, c in self.alike(config).items() if n != adapter_name and not c.inference_mode]
        if method.over_layers and others and not self.mixed:  # which has no allocator
            raise ConfigError(
                f"{tuner} supports only 1 trainable adapter. When using multiple adapters, set "
                f"inference_mode to True for all adapters except the one you want to train. Trainable: {others}."
            )

    def carriers(self) -> Iterator[Carrier]:
        yield from super().carriers()
        if self.shared.containers:
            yield self.shared

    def _keys_in(self, state_dict: dict[str, Tensor], config: PeftConfig) -> set[str]:
        mark = f".{self.method_for(config).prefix}"
        return {original(k.rsplit(mark, 1)[0].replace("_orig_mod.", "")) for k in state_dict if mark in k}
