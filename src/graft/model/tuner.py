# SPDX-License-Identifier: Apache-2.0
"""Tuner: a model with adapters of one method on it. What PEFT calls `base_model`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from graft.core import merging
from graft.core.errors import AdapterNameError, ConfigError, warn
from graft.core.layer import AdapterLayer
from graft.core.method import Method
from graft.core.shared import Shared
from graft.inject.inject import Parts, check_bias, inject
from graft.inject.match import Matcher
from graft.inject.report import InjectReport
from graft.inject.survey import Tree, Wrapper, survey
from graft.inject.targets import model_config
from graft.inject.tokens import TrainableTokensWrapper
from graft.methods import METHODS, PROMPTS, method_of
from graft.model.registry import Registry


class Tuner(Registry, nn.Module):
    """Holds the user's model as `.model`; attributes that it does not have itself are the model's.

    The subclasses (`LoraModel`, …) are made from the table of methods and differ only in `method`. By itself it leaves
    adapters in the base's dtype, where a PeftModel has them trained in float32.
    """

    method: type[Method]
    several = "use model.base_model.set_adapter([...]) to activate several"

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
        autocast_adapter_dtype: bool = False,
        **options: Any,
    ):
        super().__init__()
        if isinstance(peft_config, dict):
            if list(peft_config) != [adapter_name]:
                raise ConfigError(
                    f"{type(self).__name__} begins with one adapter, '{adapter_name}', and got configs of "
                    f"{list(peft_config)}: pass one, then add_adapter() the others."
                )
            peft_config = peft_config[adapter_name]
        tree = self.open_registry(model)
        self.__dict__["shared"] = Shared()
        self.peft_config |= getattr(model, "peft_config", None) or {}
        if state_dict is not None:
            options["keys"] = self._keys_in(state_dict, peft_config)
        self.add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype, tree=tree, **options)
        self.set_adapter(adapter_name, inference_mode=self.peft_config[adapter_name].inference_mode)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("__"):
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    # adapters

    def add_adapter(
        self,
        adapter_name: str,
        config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        fill: Callable[[Parts], None] | None = None,
        keys: Any = None,
        heads: dict[str, nn.Module] | None = None,
        tree: Tree | None = None,
    ) -> InjectReport:
        """Inject another adapter, inactive. All or nothing: see `graft.inject.inject`."""
        self.check_new(adapter_name, config)
        disabled = self.disabled
        report, parts = inject(
            self.model,
            config,
            self.method,
            adapter_name,
            call=self.call,
            shared=self.shared,
            others=self.peft_config,
            upcast=autocast_adapter_dtype,
            on_meta=low_cpu_mem_usage,
            fill=fill,
            keys=keys,
            heads=heads,
            tree=tree,
        )
        for name, container in self.shared.modules().items():
            if name not in self._modules:
                self.add_module(name, container)
        self.take_in(parts, disabled)
        self.peft_config[adapter_name] = config
        self.reports[adapter_name] = report
        return report

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """`add_adapter` of a config that has been put into `peft_config` under that name, as PEFT's callers do."""
        if model is not self.model:
            raise ValueError("inject_adapter injects into the tuner's own model; make another tuner for another model.")
        self.check_known([adapter_name])
        if any(adapter_name in part.adapters for part in self.parts()):
            raise AdapterNameError(f"Adapter with name '{adapter_name}' already exists: its layers carry it.")
        config = self.peft_config.pop(adapter_name)
        keys = None if state_dict is None else self._keys_in(state_dict, config)
        self.add_adapter(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype, keys=keys)

    @property
    def target_module_mapping(self) -> dict[str, Any]:
        """Default target_modules by model_type."""
        return self.method.targets

    get_model_config = staticmethod(model_config)

    targeted_parameter_names: tuple[str, ...] = ()  # parameters by themselves are not targets in graft yet

    def parts_of(self, adapter_name: str) -> Parts:
        parts = super().parts_of(adapter_name)
        parts.shared = self.shared
        return parts

    def shown(self) -> dict[str, nn.Module]:
        return {"base_model": self}

    def acting(self, kwargs: dict[str, Any]) -> AbstractContextManager[Callable[[Any], Any]]:
        return self.method.around(self, self.call)

    def check_new(self, adapter_name: str, config: Any) -> None:
        super().check_new(adapter_name, config)
        if self.method.single_trainable and not config.inference_mode:
            others = [name for name, c in self.peft_config.items() if not c.inference_mode]
            if others:
                raise ConfigError(
                    f"{type(self).__name__} supports only 1 trainable adapter. When using multiple adapters, set "
                    f"inference_mode to True for all adapters except the one you want to train. Trainable: {others}."
                )
        check_bias(config, self.method, iter(self.peft_config.values()))

    def parts(self) -> Iterator[Any]:
        yield from super().parts()
        yield self.shared

    # merging

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """Adapters that are merged into some layer."""
        return list(dict.fromkeys(name for layer in self.mergeable_layers() for name in layer.merged_adapters))

    def mergeable_layers(self) -> list[AdapterLayer]:
        rows = [w.token_adapter for w in self.wrappers.values() if isinstance(w, TrainableTokensWrapper)]
        return [*self.layers.values(), *rows]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters (the active ones if None) into the base weights; `unmerge_adapter` takes them out again.

        Raises:
            AdapterNotFoundError: one of them is not loaded.
            ValueError: `safe_merge` found values that are not finite, or adapters are disabled. Nothing is merged then.
            NotImplementedError: some layer cannot hold them merged. Nothing is merged then.
        """
        self._merge(adapter_names, safe_merge, undoable=True)

    def _merge(self, adapter_names: list[str] | None, safe_merge: bool, undoable: bool, progress: bool = False) -> None:
        if isinstance(adapter_names, str):
            raise TypeError(
                f"adapter_names should be a list of strings, got {adapter_names!r}: write ['{adapter_names}']."
            )
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        self.check_known(names)
        done = self.merged_adapters
        wanted, names = names, [n for n in names if n not in done]
        layers: Any = self.mergeable_layers()
        merging.say_merged(done, wanted, names, any(merging.replaces(layer, names) for layer in layers))
        if not names:
            return
        for layer in layers:
            merging.check(layer, names, safe_merge, undoable)
        left = [n for n in self.active_adapters if n not in names and n not in done]
        if not undoable:
            silent = left
            until = "the merged model is without them"
        else:
            hosts = [layer for layer in layers if not layer.methods.keys().isdisjoint(names)]
            silent = [n for n in left if any(n in layer.methods for layer in hosts)]
            until = f"in layers that carry {', '.join(names)}, they have no effect until unmerge_adapter()"
        if silent:
            warn(f"Active adapters {silent} are not merged: {until}.")
        if progress:
            from tqdm import tqdm

            layers = tqdm(layers, desc="Merging", unit="layer")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said above, once
            for layer in layers:
                layer.merge(False, names, undoable)

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights again."""
        if not self.merged_adapters:
            warn("Already unmerged. Nothing to do.")
        for layer in self.mergeable_layers():
            if layer.merged_adapters:
                layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merge for good and return the plain model."""
        self._merge(adapter_names, safe_merge, undoable=False, progress=progressbar)
        return self.unload()

    def unload(self) -> nn.Module:
        """The model without adapter layers. Modules in `modules_to_save` keep the active adapter's values, even if
        adapters are disabled."""
        survey_places(self.model, self._restore)
        self.layers, self.wrappers = {}, {}
        if "peft_config" in self.model.__dict__:
            del self.model.peft_config
        retie(self.model)
        return self.model

    def _restore(self, parent: nn.Module, name: str, child: nn.Module) -> None:
        if isinstance(child, AdapterLayer):
            parent._modules[name] = child.base_layer
        elif isinstance(child, Wrapper):
            parent._modules[name] = child.kept

    # facts

    def _keys_in(self, state_dict: dict[str, Tensor], config: Any) -> set[str]:
        mark = f".{self.method.prefix}"
        return {k.rsplit(mark, 1)[0].replace("_orig_mod.", "") for k in state_dict if mark in k}

    @property
    def targeted_module_names(self) -> list[str]:
        return list(self.layers)

    @property
    def prefix(self) -> str:
        return self.method.prefix


def survey_places(model: nn.Module, act: Any) -> None:
    """Call `act(parent, name, child)` for every module once, not looking into adapter layers."""
    seen: set[int] = set()

    def visit(module: nn.Module) -> None:
        for name, child in list(module._modules.items()):
            if child is None:
                continue
            act(module, name, child)
            if id(child) in seen or isinstance(child, AdapterLayer | Wrapper):
                continue
            seen.add(id(child))
            visit(child)

    visit(model)


def retie(model: Any) -> None:
    """Tie the embeddings of a tied model again after merging, or say in its config that they now differ."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(model, "get_output_embeddings"):
        return
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs is None or inputs is None or inputs.weight is outputs.weight or inputs.weight.is_meta:
        return
    if torch.equal(inputs.weight, outputs.weight):
        outputs.weight = inputs.weight
        return
    warn("Setting `config.tie_word_embeddings` to False: merging gave the tied embeddings different weights.")
    config.tie_word_embeddings = False


def tuner_of(peft_type: str) -> Any:
    """The Tuner subclass of a peft_type, under PEFT's name for it; of a prompt method, the encoder's class."""
    name = getattr(peft_type, "value", peft_type)
    return method_of(name) if name in PROMPTS else _tuner_class(name)


@cache
def _tuner_class(name: str) -> type[Tuner]:
    from graft.combine import weighted  # not needed to import graft

    method = method_of(name)
    members = {"method": method, "__module__": __name__, "__doc__": Tuner.__doc__, **method.tuner_methods}
    members["add_weighted_adapter"] = weighted.function_for(name)
    return type(METHODS[name].tuner, (Tuner,), members)


def __getattr__(name: str) -> Any:  # `pickle` finds the generated classes here
    for peft_type, row in METHODS.items():
        if row.tuner == name:
            return tuner_of(peft_type)
    raise AttributeError(name)


def inject_adapter_in_model(
    peft_config: Any,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Inject an adapter and return the same model, unwrapped: keys have no `base_model.model.` prefix.

    With `state_dict`, exactly the layers that it has tensors for are adapted, whatever the config targets. Adapters
    have the base's dtype, half precision too: only a PeftModel widens it.

    Raises:
        ValueError: the method needs a wrapper (it shares tensors between layers), or the config and the state dict
            do not fit (as a warning if they merely differ).
    """
    method = method_of(peft_config.peft_type)
    if peft_config.is_prompt_learning:
        raise ValueError(
            f"{peft_config.peft_type.value} cannot be injected without a wrapper: prompts act on the calls that go "
            "through it. Please use `get_peft_model` instead."
        )
    if method.shares:
        raise ValueError(
            f"{method.__name__} cannot be injected without a wrapper: it has shared state stored on the tuner. "
            "Please use `get_peft_model` instead."
        )
    cls = tuner_of(peft_config.peft_type)
    tuner = cls(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
    if state_dict is not None:
        compare_targets(tuner, peft_config, adapter_name)
    model.peft_config = tuner.peft_config  # type: ignore[assignment]
    return model


def compare_targets(tuner: Tuner, config: Any, adapter_name: str) -> None:
    if config.target_modules is None:
        return
    matcher = Matcher(config)
    tree = survey(tuner.model)
    wanted = {k for k in tree.modules if matcher(k).outcome == "matched"}
    have = set(tuner.layers)
    if wanted == have:
        return
    text = (
        "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the provided "
        "state_dict. The state_dict decides. "
    )
    if wanted - have:
        text += f"The PEFT config contained these additional target modules: {sorted(wanted - have)}. "
    if have - wanted:
        text += f"The state_dict contained these additional target modules: {sorted(have - wanted)}. "
    warn(text, RuntimeWarning)
