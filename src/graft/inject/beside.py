# SPDX-License-Identifier: Apache-2.0
"""The hosts of two kinds of training next to an adapter's layers: whole modules (`modules_to_save`), called heads, and
single rows of an embedding (`trainable_token_indices`).

A wrapper of a head hosts an effect that replaces the module, with `acts_elsewhere`: gates do not weigh it, rows of
narrower heads are padded, and nothing is merged. Token rows are trained by a method on a layer of rows. PEFT's
`TrainableTokensWrapper` around it is only one more module in memory, and carries nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from graft.core.carrier import Carrier, Shell, carrier_of, layer_in
from graft.core.containers import iter_tensors
from graft.core.effect import Effect, Replace
from graft.core.errors import RoutingError, UnsupportedLayerError
from graft.core.layer import AdapterLayer, Host
from graft.core.method import Method
from graft.core.ops import UNKNOWN
from graft.core.rows import OFF, adapters_in
from graft.core.site import Site
from graft.kernels.withheld import Withheld
from graft.methods.trainable_tokens import TrainableTokens
from graft.storage.codes import why_copy_cannot_train
from graft.storage.find import find_device_and_dtype, find_store
from graft.storage.fsdp2 import standalone

CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


@dataclass
class HeadConfig:
    """The config of a `Head`.

    `module` is the module that will train: the caller's, or one with a checkpoint's shapes. None: `Head.build` copies
    the base's module.
    """

    module: nn.Module | None = None
    inference_mode: ClassVar[bool] = True  # a head has the mode of the base's module


class Head(Method[HeadConfig]):
    """The method for `modules_to_save`: one adapter's trainable module, which runs instead of the base's module.

    Heads of several adapters on one module may have different shapes.
    """

    prefix, moves = "modules_to_save", False

    modules_to_save: nn.Module

    def describe(self) -> Effect:
        """Return a `Replace` effect with this head's module.

        With `acts_elsewhere=True`, gates and averages leave it out.
        """
        return Replace(self.get_module, acts_elsewhere=True)

    def get_module(self) -> nn.Module:
        """Return the module that trains, `self.modules_to_save`."""
        return self.modules_to_save

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return {"modules_to_save": module}: the config's module, moved to the base module's device and dtype, or a
        standalone copy of the base module if the config has none. Sets `requires_grad` on its floating and complex
        parameters and clears it on the others. `shared` is not used.
        """
        base, module = self.site.module, self.cfg.module
        module = standalone(base) if module is None else module.to(*find_device_and_dtype(base))
        for p in module.parameters():
            p.requires_grad = p.is_floating_point() or p.is_complex()
        return dict(modules_to_save=module)

    def tie_to_embedding(self, source: Method) -> None:
        """Make the weight of this head the same Parameter object as the weight of `source`'s head.

        Other parameters stay.
        """
        self.modules_to_save.weight = source.modules_to_save.weight


def check_single_adapter(host: Host, names: Sequence[str], shown_as: str, does: str) -> None:
    """Raise ValueError if `host` carries more than one of the adapters `names`.

    Args:
        shown_as: the class name in the text.
        does: the verb phrase before the host's path in the text, such as "trains rows of".
    """
    candidates = [n for n in names if n in host.methods]
    if len(candidates) > 1:
        raise ValueError(
            f"Only one adapter can be set at a time for {shown_as}, got {candidates}: each {does} '{host.key}'. "
            "Activate one of them."
        )


class ModulesToSaveWrapper(Host):
    """The host of heads: it replaces a module of the base and runs the head of the first active adapter that has one
    here. With no such adapter, or while adapters are disabled, the base's module runs.
    """

    how = "already trained whole, through modules_to_save"
    inner_name, claim, beside = "original_module", f"is {how} of", True
    modules_to_save: nn.ModuleDict

    def check_active(self, names: Sequence[str]) -> None:
        """Raise ValueError if more than one of the adapters `names` has a head here, since only one head can run."""
        check_single_adapter(self, names, "ModulesToSaveWrapper", "has its own copy of")

    def adapter_state_dict_load_map(self, adapter: str) -> dict[str, str]:
        """Return {name below this module in a file: "modules_to_save.<adapter>.<name>"} for each tensor of the
        adapter's head. The `load_adapter` of transformers calls it.
        """
        return {path: f"modules_to_save.{adapter}.{path}" for path, *_ in iter_tensors(self.modules_to_save, adapter)}

    def adapter_state_dict(self, adapter: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the adapter's tensors by their names in a file, taken from this module's `state_dict`.

        Raises KeyError if it lacks one.
        """
        return {name: state_dict[memory] for name, memory in self.adapter_state_dict_load_map(adapter).items()}

    adapter_layer_names, other_param_names = ("modules_to_save",), ()

    quantization_backend = None

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters that have a head here, in the order of activation, also while adapters are disabled."""
        return [name for name in self.state.active if name in self.methods]

    @property
    def active(self) -> nn.Module:
        """The module that runs for a call without rows: `remainder`, or the base's module while adapters are
        disabled.
        """
        return self.base_module if self.disable_adapters else self.remainder

    @property
    def running_modules(self) -> list[nn.Module]:
        """The modules that run now, each once.

        While adapters are disabled, or the open call switches them off, that is the base's module. Without an open call
        with rows it is `remainder`. In a mixed batch each group of rows has the first of its adapters with a head here,
        else the base's module; the order is that of the groups.
        """
        rows = self.call.current_rows() if self.call.open else None
        if self.state.disabled or rows is OFF:
            return [self.base_module]
        if rows is None:
            return [self.remainder]
        heads_by_row = ([n for n in adapters_in(key) if n in self.methods] for key in rows.keys)
        return list(dict.fromkeys(self.modules_to_save[n[0]] if n else self.base_module for n in heads_by_row))

    @property
    def remainder(self) -> nn.Module:  # type: ignore[override]
        """The module that stays after an unload: the head of the first active adapter that has one here, else the
        base's module. Disabling adapters does not change it.
        """
        return next((self.modules_to_save[name] for name in self.active_adapters), self.base_module)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the module that runs now, if this wrapper lacks it.

        If rows of the call run several modules, a tensor or submodule goes through `guard_value`; other values are the
        first module's.

        Raises:
            AttributeError: that module lacks it as well, or the name begins with two underscores.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "modules_to_save" not in self.__dict__.get("_modules", {}):
                raise
            first, *more_modules = self.running_modules
            value = getattr(first, name)
            return self.guard_value(name, value) if more_modules and isinstance(value, (Tensor, nn.Module)) else value

    def guard_value(self, name: str, value: Tensor | nn.Module) -> Tensor:
        """Return a `Withheld` tensor of `value`'s shape and dtype, for a batch with rows of several heads.

        Computing with it raises RoutingError.

        Raises:
            RoutingError: `value` is a module.
        """
        text = (
            f"Rows of a mixed batch have different heads in '{self.key}', but the model reads its '{name}' without "
            "calling it. Give all rows of a batch one adapter."
        )
        if isinstance(value, nn.Module):
            raise RoutingError(text)
        return Withheld(value, lambda: RoutingError(text))


def get_head_site(key: str, module: nn.Module) -> Site:
    """Return the site for heads of a module: the module's own `site` if it is a host already, else a new one at path
    `key` with the unknown op. Every module type is accepted.
    """
    return module.site if isinstance(module, Host) else Site(key, module, UNKNOWN, find_store(module))


def describe_trained_module(method: Head | TrainableTokens) -> tuple[str, int]:
    """Return a report's entry for a head or token rows: its description and the count of trainable numbers.

    A caller's module counts in place of the base's.

    A head gives the module's class name and the size of all parameters. Token rows give "<n> tokens" and n times the
    width of the embedding, which for a tied head is `in_features`.
    """
    site = method.site
    if isinstance(method, Head):
        module = site.module if method.cfg.module is None else method.cfg.module
        return type(module).__name__, sum(p.numel() for p in module.parameters())
    rows = len(method.cfg.token_indices)
    return f"{rows} tokens", rows * (site.out_features if site.op.takes_ids else site.in_features)


def find_saved_entry(key: str, names: Sequence[str]) -> str | None:
    """Return the first of `names` (of `modules_to_save`) that is an end of the path `key`, or None.

    As in PEFT the end need not begin at a dot.
    """
    return next((n for n in names if key.endswith(n)), None)


def check_can_train_whole(key: str, module: nn.Module, inside: Sequence[str], adapter: str) -> None:
    """Raise UnsupportedLayerError if `adapter` cannot train a copy of the module at `key`.

    Causes, in this order: it is a container of modules or parameters or an adapter layer, its weights are quantized, or
    modules within it have adapters.

    Args:
        inside: paths below the module that have adapters.
    """
    if isinstance(module, CONTAINERS) or layer_in(module) is not None:
        carrier = carrier_of(module)
        why = "" if carrier is None else f": it {carrier.claim} adapter(s) {carrier.adapters}"
        raise UnsupportedLayerError(
            f"modules_to_save cannot be applied to modules of type {type(module)} ('{key}'){why}. Adapter '{adapter}': "
            "name other modules, or load it into another model."
        )
    if (codes := why_copy_cannot_train(module)) is not None:
        raise UnsupportedLayerError(
            f"modules_to_save cannot be applied to '{key}': {codes}. Adapter '{adapter}': target it instead, or load "
            "the base model without quantizing it."
        )
    if inside:
        raise UnsupportedLayerError(
            f"modules_to_save cannot be applied to '{key}': '{inside[0]}' inside it carries other adapters, and a "
            f"copy would have them too. Adapter '{adapter}': name other modules, or load it into another model."
        )


class RowsLayer(AdapterLayer):
    """The layer of an embedding, or of a head tied to it, with single rows that train.

    Its methods are `TrainableTokens`.
    """

    how = "already trained in single rows, through trainable_token_indices"
    claim, takes_rows, beside = f"is {how} of", True, True

    def check_active(self, names: Sequence[str]) -> None:
        """Raise ValueError if more than one of the adapters `names` trains rows of this layer."""
        check_single_adapter(self, names, "TrainableTokensWrapper", "trains rows of")


class TrainableTokensWrapper(Shell):
    """The module that PEFT puts around a `RowsLayer`.

    It is a shell: it only forwards to the layer, its `token_adapter`.
    """

    token_adapter: RowsLayer
    inner_name = "token_adapter"
    adapter_layer_names = ("token_adapter.trainable_tokens_delta",)
    other_param_names = ("token_adapter.token_indices", "token_adapter.trainable_tokens_original")

    def __init__(self, token_adapter: RowsLayer):
        """Make a wrapper around a layer, which becomes the submodule `token_adapter`."""
        super().__init__()
        self.token_adapter = token_adapter

    @property
    def inner_host(self) -> RowsLayer:  # type: ignore[override]
        """The layer within."""
        return self._modules["token_adapter"]  # type: ignore[return-value]

    @property
    def original_module(self) -> nn.Module:
        """The embedding of the base model, beneath the layer."""
        return self.inner_host.base_layer

    @property
    def weight(self) -> Tensor:
        """`effective_weight()` of `self.inner_host`: the embedding's weight with the active adapters' rows in it, for
        models that use it without calling the embedding.
        """
        return self.inner_host.effective_weight()

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters that train rows here, in the order of activation."""
        return [name for name in self.inner_host.state.active if name in self.inner_host.methods]

    active_adapter = Carrier.active_adapter  # a name, as in PEFT

    def adapter_state_dict_load_map(self, adapter: str) -> dict[str, str]:
        """Return {name below this module in a file: name in memory} of the adapter's rows.

        Returns {} if the rows are borrowed from a tied module, since a file holds them there. The `load_adapter` of
        transformers calls it.
        """
        name = "token_adapter.trainable_tokens_delta"
        return {} if self.inner_host.methods[adapter].lenders else {name: f"{name}.{adapter}"}

    adapter_state_dict = ModulesToSaveWrapper.adapter_state_dict

    def __getattr__(self, name: str) -> Any:
        """Return an attribute that this wrapper lacks: the layer's if `Carrier` declares the name, else that of the
        base's embedding.

        Raises:
            AttributeError: that object lacks it as well, or the name begins with two underscores.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "token_adapter" not in self.__dict__.get("_modules", {}):
                raise
            of_host = name in vars(Carrier) or name in Carrier.__annotations__
            return getattr(self.inner_host if of_host else self.inner_host.base_layer, name)

    def forward(self, *args: object, **kwargs: object) -> object:
        """Call `token_adapter`, the layer within, with all arguments, and return its output."""
        return self.token_adapter(*args, **kwargs)
