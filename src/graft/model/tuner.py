# SPDX-License-Identifier: Apache-2.0
"""Tuner: a model with adapters of one method on it. What PEFT calls `base_model`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from graft.core import merging
from graft.core.errors import AdapterNameError, AdapterNotFoundError, ConfigError
from graft.core.layer import AdapterLayer
from graft.core.method import Method
from graft.core.params import BufferDict
from graft.core.routing import BASE, Routing
from graft.inject.inject import Parts, check_bias, inject
from graft.inject.match import Matcher
from graft.inject.report import InjectReport
from graft.inject.survey import Wrapper, survey
from graft.inject.tokens import TrainableTokensWrapper
from graft.methods import METHODS, method_of

TIED_NAMES = ("embed_tokens", "lm_head")
_TAKEN = {name for container in (nn.ModuleDict(), nn.ParameterDict(), BufferDict()) for name in dir(container)}


def check_adapter_name(name: str, taken: Sequence[str] = ()) -> None:
    """Raise unless `name` can name a new adapter."""
    if not isinstance(name, str) or not name:
        raise AdapterNameError(f"An adapter needs a non-empty string as its name, got {name!r}.")
    if "." in name:
        raise AdapterNameError(
            f'module name can\'t contain ".", got: {name}: adapter names are parts of parameter names.'
        )
    if "/" in name or "\\" in name or name == BASE:
        raise AdapterNameError(
            f"'{name}' cannot name an adapter: names become folders, and '{BASE}' stands for the base model."
        )
    if name in _TAKEN:
        raise AdapterNameError(
            f"attribute '{name}' already exists on torch's containers: give the adapter another name."
        )
    if name in taken:
        raise AdapterNameError(
            f"Adapter with name '{name}' already exists. Choose another name (add_adapter() puts it beside that "
            "one), or delete_adapter() it first."
        )


class Tuner(nn.Module):
    """Holds the user's model as `.model`; attributes that it does not have itself are the model's.

    The subclasses (`LoraModel`, …) are made from the table of methods and differ only in `method`.
    """

    method: type[Method]

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
        autocast_adapter_dtype: bool = True,
        **options: Any,
    ):
        super().__init__()
        self.model = model
        found = survey(model)
        self.layers: dict[str, AdapterLayer] = found.layers
        self.wrappers: dict[str, Wrapper] = found.wrappers
        known = [*found.layers.values(), *found.wrappers.values()]
        self.routing: Routing = known[0].routing if known else Routing()
        self.shared: list[str] = []  # names of containers of tensors that all layers share
        self.peft_config: dict[str, Any] = dict(getattr(model, "peft_config", None) or {})
        self.reports: dict[str, InjectReport] = {}
        self.active_adapters: list[str] = []
        self.on_change: Callable[[], None] | None = None  # told when other adapters run
        if state_dict is not None:
            options["keys"] = self._keys_in(state_dict, peft_config)
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        for name, config in configs.items():
            self.add_adapter(name, config, low_cpu_mem_usage, autocast_adapter_dtype, **options)
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
    ) -> InjectReport:
        """Inject another adapter, inactive. All or nothing: see `graft.inject.inject`."""
        self.check_new(adapter_name, config)
        shared = {name: self._modules[name] for name in self.shared}
        report, parts = inject(
            self.model,
            config,
            self.method,
            adapter_name,
            routing=self.routing,
            shared=shared,  # type: ignore[arg-type]
            others=self.peft_config,
            upcast=autocast_adapter_dtype,
            on_meta=low_cpu_mem_usage,
            fill=fill,
            keys=keys,
            heads=heads,
        )
        for name, container in shared.items():
            if name not in self._modules:
                self.add_module(name, container)
                self.shared.append(name)
        self.layers |= parts.layers
        self.wrappers |= parts.wrappers
        self.peft_config[adapter_name] = config
        self.reports[adapter_name] = report
        return report

    def parts_of(self, adapter_name: str) -> Parts:
        """What carries an adapter."""
        return Parts(
            {key: layer for key, layer in self.layers.items() if adapter_name in layer.methods},
            {key: w for key, w in self.wrappers.items() if adapter_name in w.adapters},
            {name: c for name in self.shared if adapter_name in (c := self._modules[name])},  # type: ignore[misc,operator]
        )

    def check_new(self, adapter_name: str, config: Any) -> None:
        check_adapter_name(adapter_name, list(self.peft_config))
        if config.peft_type != self.method.config.peft_type:
            mine = next(iter(self.peft_config.values())).peft_type if self.peft_config else self.method.config.peft_type
            raise ConfigError(
                f"Cannot combine adapters with different peft types. Found {mine} and {config.peft_type}."
            )
        if self.method.single_trainable and not config.inference_mode:
            others = [name for name, c in self.peft_config.items() if not c.inference_mode]
            if others:
                raise ConfigError(
                    f"{type(self).__name__} supports only 1 trainable adapter. When using multiple adapters, set "
                    f"inference_mode to True for all adapters except the one you want to train. Trainable: {others}."
                )
        check_bias(config, self.method, iter(self.peft_config.values()))

    def parts(self) -> Iterator[AdapterLayer | Wrapper]:
        yield from self.layers.values()
        yield from self.wrappers.values()

    def check_known(self, names: Sequence[str]) -> None:
        unknown = sorted(n for n in names if n not in self.peft_config)
        if unknown:
            loaded = ", ".join(self.peft_config) or "none"
            raise AdapterNotFoundError(f"Adapter {', '.join(unknown)} not found. Loaded adapters: {loaded}.")

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters active, in this order, and trainable unless for inference.

        Raises:
            AdapterNotFoundError: one of them is not loaded.
            ValueError: two of them cannot be active together.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.check_known(names)
        for part in self.parts():
            part.check_active(names)
        if self.merged_adapters and names != self.active_adapters:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge_adapter()
        for part in self.parts():
            part.set_adapter(names, inference_mode)
        self.active_adapters = names
        self._changed()

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()

    @property
    def active_adapter(self) -> str | list[str]:
        return self.active_adapters[0] if len(self.active_adapters) == 1 else self.active_adapters

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
        if adapter_name in self.merged_adapters:
            raise ValueError(
                f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Please unmerge them first."
            )
        del self.peft_config[adapter_name]
        self.reports.pop(adapter_name, None)
        for part in self.parts():
            part.delete_adapter(adapter_name)
        for name in self.shared:
            container: Any = self._modules[name]
            if adapter_name in container:
                del container[adapter_name]
        if adapter_name in self.active_adapters:
            left = [n for n in self.active_adapters if n != adapter_name]
            if not left and self.peft_config:
                left = sorted(self.peft_config)[:1]
                warnings.warn(
                    f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {left[0]}.",
                    stacklevel=2,
                )
            self.set_adapter(left)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the parameters of any adapters, active or not, train or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check_known(names)
        for part in self.parts():
            for name in names:
                part.require_grad(name, requires_grad)

    # on and off

    def enable_adapter_layers(self) -> None:
        for part in self.parts():
            part.enable_adapters(True)
        self._changed()

    def disable_adapter_layers(self) -> None:
        for config in (self.peft_config.get(name) for name in self.active_adapters):
            bias = getattr(config, "bias", "none")
            if bias != "none":
                warnings.warn(
                    f"Careful, disabling adapter layers with bias configured to be '{bias}' does not produce the same "
                    "output as the base model would without adaption.",
                    stacklevel=2,
                )
        for part in self.parts():
            part.enable_adapters(False)
        self._changed()

    # merging

    @property
    def merged_adapters(self) -> list[str]:
        """Adapters that are merged into some layer."""
        return list(dict.fromkeys(name for layer in self.mergeable_layers() for name in layer.merged_adapters))

    def mergeable_layers(self) -> list[AdapterLayer]:
        rows = [w.token_adapter for w in self.wrappers.values() if isinstance(w, TrainableTokensWrapper)]
        return [*self.layers.values(), *rows]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters (the active ones if None) into the base weights; `unmerge_adapter` takes them out again.

        Raises:
            AdapterNotFoundError: one of them is not loaded.
            ValueError: `safe_merge` found values that are not finite. Nothing is merged then.
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
        merging.say_merged(done, wanted, names, self.method.replaces)
        left = [n for n in self.active_adapters if n not in names and n not in done]
        if names and left:
            warnings.warn(
                f"Active adapters {left} are not merged: they have no effect until unmerge_adapter().", stacklevel=3
            )
        if not names:
            return
        layers: Any = self.mergeable_layers()
        for layer in layers:
            merging.check(layer, names, safe_merge)
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
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
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
        """The model without adapter layers. Modules in `modules_to_save` keep the active adapter's values."""
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
            parent._modules[name] = child.active

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
    warnings.warn(
        "Setting `config.tie_word_embeddings` to False: merging gave the tied embeddings different weights.",
        stacklevel=4,
    )
    config.tie_word_embeddings = False


def tuner_of(peft_type: str) -> type[Tuner]:
    """The Tuner subclass of a peft_type, under PEFT's name for it."""
    return _tuner_class(getattr(peft_type, "value", peft_type))


@cache
def _tuner_class(name: str) -> type[Tuner]:
    method = method_of(name)
    members = {"method": method, "__module__": __name__, "__doc__": Tuner.__doc__, **method.tuner_methods}
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

    With `state_dict`, exactly the layers that it has tensors for are adapted, whatever the config targets.

    Raises:
        ValueError: the method needs a wrapper (it shares tensors between layers), or the config and the state dict
            do not fit (as a warning if they merely differ).
    """
    method = method_of(peft_config.peft_type)
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
    warnings.warn(text, RuntimeWarning, stacklevel=3)
