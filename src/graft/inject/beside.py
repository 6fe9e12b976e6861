# SPDX-License-Identifier: Apache-2.0
"""What trains beside an adapter: whole modules (`modules_to_save`), single rows (`trainable_token_indices`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from graft.config.fields import TASK_HEADS
from graft.core.carrier import Carrier, Shell, carrier_of, layer_in
from graft.core.containers import tensors_of
from graft.core.effect import Effect, Replace
from graft.core.errors import PeftWarning, RoutingError, UnsupportedLayerError, warn
from graft.core.layer import AdapterLayer, Host
from graft.core.method import Method
from graft.core.ops import UNKNOWN
from graft.core.rows import OFF, adapters_in
from graft.core.site import Site
from graft.kernels.withheld import Withheld
from graft.methods.trainable_tokens import TrainableTokens
from graft.storage import find_device_and_dtype, find_store, standalone, why_copy_cannot_train

CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


@dataclass
class HeadConfig:
    """The config of a head. module: the caller's, or of a checkpoint's shape; None: a copy of the base's."""

    module: nn.Module | None = None
    inference_mode: ClassVar[bool] = True  # a head has the mode of the module that it stands for


class Head(Method[HeadConfig]):
    """A module that trains whole in the place of the base's, which other heads may differ from in shape."""

    prefix, moves = "modules_to_save", False

    modules_to_save: nn.Module

    def describe(self) -> Effect:
        return Replace(self.get_module, acts_elsewhere=True)

    def get_module(self) -> nn.Module:
        return self.modules_to_save

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        base, module = self.site.module, self.cfg.module
        module = standalone(base) if module is None else module.to(*find_device_and_dtype(base))
        for p in module.parameters():
            p.requires_grad = p.is_floating_point() or p.is_complex()
        return dict(modules_to_save=module)

    def tie(self, source: Method) -> None:
        self.modules_to_save.weight = source.modules_to_save.weight


def check_single_adapter(host: Host, names: Sequence[str], shown_as: str, does: str) -> None:
    """Raise ValueError if a host has several of these adapters, only one of which can act there."""
    candidates = [n for n in names if n in host.methods]
    if len(candidates) > 1:
        raise ValueError(
            f"Only one adapter can be set at a time for {shown_as}, got {candidates}: each {does} '{host.key}'. "
            "Activate one of them."
        )


class ModulesToSaveWrapper(Host):
    """The host of heads: runs that of the active adapter; if it has none, the original."""

    how = "already trained whole, through modules_to_save"
    inner_name, claim, beside = "original_module", f"is {how} of", True
    modules_to_save: nn.ModuleDict

    def check_active(self, names: Sequence[str]) -> None:
        check_single_adapter(self, names, "ModulesToSaveWrapper", "has its own copy of")

    def adapter_state_dict_load_map(self, adapter: str) -> dict[str, str]:
        """Return {name below this module in a file: name in memory}, for transformers' `load_adapter`."""
        return {path: f"modules_to_save.{adapter}.{path}" for path, *_ in tensors_of(self.modules_to_save, adapter)}

    def adapter_state_dict(self, adapter: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that a file holds of an adapter, from this module's state dict."""
        return {name: state_dict[memory] for name, memory in self.adapter_state_dict_load_map(adapter).items()}

    adapter_layer_names, other_param_names = ("modules_to_save",), ()

    quantization_backend = None

    @property
    def active_adapters(self) -> list[str]:
        return [name for name in self.state.active if name in self.methods]

    @property
    def active(self) -> nn.Module:
        """The module that runs where a call says nothing of its rows."""
        return self.base_module if self.disable_adapters else self.remainder

    @property
    def running_modules(self) -> list[nn.Module]:
        """The modules that run now: that of the active adapter, or those of the rows of the call."""
        rows = self.call.current() if self.call.open else None
        if self.state.disabled or rows is OFF:
            return [self.base_module]
        if rows is None:
            return [self.remainder]
        heads_by_row = ([n for n in adapters_in(key) if n in self.methods] for key in rows.keys)
        return list(
            dict.fromkeys(self.modules_to_save[names[0]] if names else self.base_module for names in heads_by_row)
        )

    @property
    def remainder(self) -> nn.Module:  # type: ignore[override]
        """The module that unloading leaves, whether adapters are disabled or not."""
        return next((self.modules_to_save[name] for name in self.active_adapters), self.base_module)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "modules_to_save" not in self.__dict__.get("_modules", {}):
                raise
            first, *more_modules = self.running_modules
            value = getattr(first, name)
            return self.guard_value(name, value) if more_modules and isinstance(value, (Tensor, nn.Module)) else value

    def guard_value(self, name: str, value: Tensor | nn.Module) -> Tensor:
        """Return what rows with heads of their own see of a tensor: its shape and dtype. Raise for a module."""
        text = (
            f"Rows of a mixed batch have heads of their own in '{self.key}', whose '{name}' the model reads, and uses "
            "without calling the head: give all rows of a batch one adapter."
        )
        if isinstance(value, nn.Module):
            raise RoutingError(text)
        return Withheld(value, lambda: RoutingError(text))


def get_head_site(key: str, module: nn.Module) -> Site:
    """Return the site of heads for a module: what type it has is nobody's business."""
    return module.site if isinstance(module, Host) else Site(key, module, UNKNOWN, find_store(module))


def describe_trained_module(method: Head | TrainableTokens) -> tuple[str, int]:
    """Return what a report says of a head or of rows: what they are, and how many numbers train."""
    site = method.site
    if isinstance(method, Head):
        module = site.module if method.cfg.module is None else method.cfg.module
        return type(module).__name__, sum(p.numel() for p in module.parameters())
    rows = len(method.cfg.token_indices)
    return f"{rows} tokens", rows * (site.out_features if site.op.takes_ids else site.in_features)


def find_saved_entry(key: str, names: Sequence[str]) -> str | None:
    """Return the entry of modules_to_save that names a module, if any: a plain end of its path, as in PEFT."""
    return next((n for n in names if key.endswith(n)), None)


def add_task_heads(config: Any) -> None:
    """Add the heads of the config's task to its modules_to_save, in place."""
    if config.task_type in TASK_HEADS and not hasattr(config, "modules_to_save"):
        warn(
            f"{config.peft_type.value} has no modules_to_save: the head of the {config.task_type.value} model stays as "
            "it is, and a fresh one stays random.",
            PeftWarning,
        )
    elif config.task_type in TASK_HEADS:
        names = list(config.modules_to_save or [])
        config.modules_to_save = names + [n for n in TASK_HEADS[config.task_type] if n not in names]
        config._default_heads = TASK_HEADS[config.task_type]  # no model has all of them: no warning


def check_can_train_whole(key: str, module: nn.Module, inside: Sequence[str], adapter: str) -> None:
    """Raise if `adapter` cannot train the module whole. `inside`: paths below it with other adapters."""
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
            f"modules_to_save cannot be applied to '{key}': '{inside[0]}' inside it carries other adapters, which a "
            f"copy would take along. Adapter '{adapter}': name other modules, or load it into another model."
        )


class RowsLayer(AdapterLayer):
    """The layer of an embedding (or a head tied to it) some of whose rows train beside an adapter."""

    how = "already trained in single rows, through trainable_token_indices"
    claim, takes_rows, beside = f"is {how} of", True, True

    def check_active(self, names: Sequence[str]) -> None:
        check_single_adapter(self, names, "TrainableTokensWrapper", "trains rows of")


class TrainableTokensWrapper(Shell):
    """PEFT's module around a `RowsLayer`, which is called `token_adapter` within it."""

    token_adapter: RowsLayer
    inner_name = "token_adapter"
    adapter_layer_names = ("token_adapter.trainable_tokens_delta",)
    other_param_names = ("token_adapter.token_indices", "token_adapter.trainable_tokens_original")

    def __init__(self, token_adapter: RowsLayer):
        super().__init__()
        self.token_adapter = token_adapter

    @property
    def inner_host(self) -> RowsLayer:  # type: ignore[override]
        return self._modules["token_adapter"]  # type: ignore[return-value]

    @property
    def original_module(self) -> nn.Module:
        return self.inner_host.base_layer

    @property
    def weight(self) -> Tensor:
        """The weight with the active rows, for models that use it without calling the embedding."""
        return self.inner_host.effective_weight()

    @property
    def active_adapters(self) -> list[str]:
        return [name for name in self.inner_host.state.active if name in self.inner_host.methods]

    active_adapter = Carrier.active_adapter  # a name, as in PEFT

    def adapter_state_dict_load_map(self, adapter: str) -> dict[str, str]:
        """Return {name below this module in a file: name in memory}, for transformers' `load_adapter`."""
        name = "token_adapter.trainable_tokens_delta"
        return {} if self.inner_host.methods[adapter].lenders else {name: f"{name}.{adapter}"}

    adapter_state_dict = ModulesToSaveWrapper.adapter_state_dict

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "token_adapter" not in self.__dict__.get("_modules", {}):
                raise
            of_host = name in vars(Carrier) or name in Carrier.__annotations__
            return getattr(self.inner_host if of_host else self.inner_host.base_layer, name)

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.token_adapter(*args, **kwargs)
