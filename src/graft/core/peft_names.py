# SPDX-License-Identifier: Apache-2.0
"""PEFT's names on a layer, for callers of PEFT: attributes and methods beyond those that graft itself needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from graft.core.containers import Exact, move_tensor
from graft.core.effect import Update
from graft.core.errors import AdapterNotFoundError, ConfigError, PeftWarning, RoutingError, warn
from graft.core.finite import is_finite
from graft.core.folding import EvaluationMode, compute_delta, why_no_delta
from graft.core.gate import all_adapters, changes
from graft.core.merging import lift_merged
from graft.core.method import Method
from graft.core.protocols import Layer

ACTIVATE = "set_adapter() activates adapters"
CLASS_NAMES = {"trainable_tokens": "TrainableTokensLayer"}  # PEFT's; others are by folder and module: lora.Linear


class VariantForward:
    """An adapter that adds another thing than scaling · B A dropout(x), as a forward for PEFT's layers runs it."""

    def __init__(self, method: Method):
        self.method = method

    def forward(self, module: Layer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: object) -> Tensor:
        """Return `result`, the output of a layer for x, with the adapter."""
        y: Tensor = module.plan_for((active_adapter,)).add_to_output(x, result)
        return y

    def supports_lora_conversion(self) -> bool:
        return why_no_delta(self.method) is None

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"A variant has no '{name}' in graft, whose layers merge() and unmerge() adapters.")


class ReadOnlyNames(list[str]):
    """The names of adapters as a layer shows them: changing the list would change nothing, and is refused."""

    def __init__(self, names: Sequence[str], shown_as: str, remedy: str):
        super().__init__(names)
        self.shown_as, self.remedy = shown_as, remedy

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise AttributeError(f"{self.shown_as} cannot be changed: {self.remedy}.")

    __setitem__ = __delitem__ = __iadd__ = __imul__ = append = clear = extend = insert = pop = _refuse
    remove = reverse = sort = _refuse

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:  # a copy is the caller's
        return list, (list(self),)


class PeftNames:
    """The part of an AdapterLayer with these names."""

    # the base layer

    @property
    def weight(self: Layer) -> Tensor:
        """The base layer's weight; where modules around read it to compute with it, with what the adapters do."""
        if self.site.is_read and (plan := self.find_reader_plan()) is not None:
            return self.op.uncanon(plan.fold_current()[0])
        weight: Tensor = self.get_base_layer().weight
        return weight

    @property
    def bias(self: Layer) -> Tensor | None:
        if self.site.is_read and (plan := self.find_reader_plan()) is not None:
            shifted: Tensor | None = plan.bias()
            base_bias = self.bias_now
            return shifted if shifted is None or base_bias is None else shifted.to(base_bias.dtype)
        bias: Tensor | None = self.get_base_layer().bias
        return bias

    @property
    def fan_in_fan_out(self: Layer) -> bool:
        """Return True if the base layer stores (in, out)."""
        return self.op.transposed and not self.op.takes_ids

    @property
    def is_target_conv_1d_layer(self: Layer) -> bool:
        """Return True if the base layer is transformers' Conv1D."""
        return self.site.type_name == "Conv1D"

    @property
    def quantization_backend(self: Layer) -> str | None:
        return None if self.store.name == "dense" else self.store.name

    def get_base_layer(self: Layer) -> nn.Module:
        base = self.base_layer
        while (inner := base._modules.get("base_layer")) is not None:
            base = inner
        return base

    def get_base_weight(self: Layer) -> Tensor:
        """Return the weight as the base layer stores it, dense."""
        return self.base_weight.read()

    def get_delta_weight(self: Layer, adapter: str) -> Tensor:
        """Return ΔW of `adapter` in the orientation that the base layer stores.

        Raises:
            NotImplementedError: the adapter does something else than add to the weight.
        """
        if adapter not in self.methods:
            raise AdapterNotFoundError(f"Adapter {adapter} not found on layer '{self.site.key}'.")
        effect = self.methods[adapter].effect
        if not isinstance(effect, Update) or effect.weightless:
            raise NotImplementedError(
                f"Adapter '{adapter}' has no ΔW on layer '{self.site.key}': {type(self.methods[adapter]).__name__} "
                "does not add to the weight. Call the layer to see what the adapter does."
            )
        with EvaluationMode(self):
            return self.op.uncanon(compute_delta(self, effect))

    def supports_lora_conversion(self: Layer, adapter_name: str = "default") -> bool:
        """Return True if plain LoRA can hold what an adapter does to this layer: see `graft.convert_to_lora`."""
        return adapter_name in self.methods and why_no_delta(self.methods[adapter_name]) is None

    # adapters

    @property
    def merged_adapters(self: Layer) -> list[str]:
        return ReadOnlyNames(self.state.merged, "merged_adapters", "merge() and unmerge() change what is merged")

    @property
    def merged(self: Layer) -> bool:
        return bool(self.state.merged)

    @property
    def active_adapters(self: Layer) -> list[str]:
        """The active adapters, also those that the layer does not carry."""
        return list(self.state.active)  # plain: other packages hand it on, and pickle it

    active_adapter = active_adapters  # a list here and on the tuner, a name on a PeftModel

    @property
    def _active_adapter(self: Layer) -> list[str]:
        return ReadOnlyNames(self.state.active, "_active_adapter", ACTIVATE)

    @_active_adapter.setter
    def _active_adapter(self, names: object) -> None:
        raise AttributeError(f"_active_adapter cannot be set on a layer: {ACTIVATE}.")

    @property
    def _disable_adapters(self: Layer) -> bool:
        off: bool = self.state.disabled
        return off

    @_disable_adapters.setter
    def _disable_adapters(self, off: bool) -> None:
        raise AttributeError(
            "_disable_adapters cannot be set on a layer: enable_adapters(False) switches adapters off."
        )

    @property
    def adapter_layer_names(self: Layer) -> tuple[str, ...]:
        """Containers of tensors that train, empty ones, too; those that a variant of the method adds come last."""
        names = dict.fromkeys(n for m in self.methods.values() for n in m.layer_names)
        return tuple(n for n in names if n in self._modules or n in self.__dict__)

    @property
    def other_param_names(self: Layer) -> tuple[str, ...]:
        return tuple(k for k in self.containers if k not in self.adapter_layer_names)

    # what a forward written for PEFT's layers uses

    @property
    def lora_variant(self: Layer) -> dict[str, VariantForward]:
        """The adapters whose forward is another than plain LoRA's."""
        return {name: VariantForward(m) for name, m in self.methods.items() if m.is_variant}

    def _check_forward_args(self, x: Tensor, *args: object, **kwargs: object) -> None:
        """Do nothing: names of rows are checked where the model is called."""

    def _cast_input_dtype(self: Layer, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return x if x is None or not self.cast_input_dtype_enabled else x.to(dtype)

    def _mixed_batch_forward(
        self: Any,
        x: Tensor,
        *args: object,
        adapter_names: object = None,
        alora_offsets: object = None,
        **kwargs: object,
    ) -> object:
        """Run the layer as graft does, in a mixed batch or not: which adapters act on which rows, the call knows.

        Raises:
            RoutingError: it knows of none.
        """
        if adapter_names is not None and not (self.call.open and self.call.current_rows()):
            raise RoutingError(f"adapter_names for layer '{self.site.key}' alone: pass them to the PeftModel.")
        return self._graft_forward(x, *args, **kwargs)

    @changes(all_adapters)
    def reset_lora_parameters(self: Layer, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Give A and B of a LoRA adapter the values of a start again; a merge holds the new ones then.

        Args:
            init_lora_weights: True or "gaussian"; False: leave all as it is.

        Raises:
            AdapterNotFoundError: the layer does not carry the adapter.
            ConfigError: it is none of LoRA's, or the start is one that changes more than A and B.
        """
        method = self.methods.get(adapter_name)
        if method is None:
            raise AdapterNotFoundError(f"Adapter {adapter_name} not found on layer '{self.site.key}'.")
        if not hasattr(method, "restart"):
            raise ConfigError(
                f"Adapter '{adapter_name}' on layer '{self.site.key}' is {type(method).__name__}, which has no A and B "
                "of LoRA: delete_adapter() it and add it anew."
            )
        with lift_merged(self):
            method.restart(init_lora_weights)

    def _move_adapter_to_device_of_base_layer(
        self: Layer, adapter_name: str, device: torch.device | str | int | None = None
    ) -> None:
        """Put an adapter where the base weight is, or on another device; its floats get the base's dtype."""
        if adapter_name not in self.methods:
            return
        base_device, dtype = self.where
        for slot in self.slots(adapter_name):
            keeps = isinstance(slot.owner, Exact) or dtype is None or not dtype.is_floating_point
            data = slot.tensor.data
            new = move_tensor(
                data, base_device if device is None else torch.device(device), None if keeps else dtype, False
            )
            if new is not data:
                slot.tensor.data = new

    # scaling

    def set_scale(self: Layer, adapter: str, scale: float) -> None:
        """Multiply the configured scaling of `adapter` by `scale`. Raises ConfigError if that is not finite."""
        check_scale(self, scale)
        if adapter in self.scaling_at_start:
            self.scaling[adapter] = scale * self.scaling_at_start[adapter]
        elif adapter in self.methods:
            warn_no_scaling(self, adapter)

    def scale_layer(self: Layer, scale: float) -> None:
        """Multiply the current scaling of the active adapters by `scale`. Raises ConfigError as `set_scale`."""
        check_scale(self, scale)
        rescale(self, lambda adapter: self.scaling[adapter] * scale, changes=scale != 1)

    def unscale_layer(self: Layer, scale: float | None = None) -> None:
        """Divide the current scaling of the active adapters by `scale`; reset it if None.

        Raises:
            ConfigError: `scale` is 0, or not finite.
        """
        check_scale(self, scale, divides=True)
        start = self.scaling_at_start
        rescale(self, lambda a: start[a] if scale is None else self.scaling[a] / scale, changes=scale not in (None, 1))

    # how it shows

    @property
    def type_name(self: Layer) -> str:
        """PEFT's class name for this kind of layer."""
        if self.site.path != self.site.key:
            return "ParamWrapper"
        return "Linear" if self.site.type_name == "Conv1D" else self.site.type_name

    @property
    def parameter_name(self: Layer) -> str:
        """The parameter that is adapted, of a layer that stands around its module; others have no such attribute."""
        if self.site.path == self.site.key:
            raise AttributeError("parameter_name")  # as in PEFT, where clients tell such layers by it
        return self.site.parameter

    def _get_name(self: Layer) -> str:
        modules = {type(m).__module__.removeprefix("graft.methods.").split(".")[0]: None for m in self.methods.values()}
        return CLASS_NAMES.get("+".join(modules), f"{'+'.join(modules) or 'graft'}.{self.type_name}")

    def extra_repr(self: Layer) -> str:
        parameter = f"parameter_name='{self.site.parameter}', " if self.site.path != self.site.key else ""
        return f"{parameter}adapters={list(self.methods)}, active={self.state.active}"


def rescale(layer: Layer, new: Callable[[str], float], changes: bool) -> None:
    """Give the active adapters of a layer another scaling. changes: it may be another than now."""
    for adapter in layer.state.active:
        if adapter in layer.scaling_at_start:
            layer.scaling[adapter] = new(adapter)
        elif adapter in layer.methods and changes:
            warn_no_scaling(layer, adapter)


def check_scale(layer: Layer, scale: float | None, divides: bool = False) -> None:
    """Raise ConfigError if a number that multiplies or divides scalings of a layer is not finite, or divides by 0.

    Tensors pass: to read one, the host would wait for its device.
    """
    if isinstance(scale, (int, float)) and not (is_finite(scale) and (scale or not divides)):
        raise ConfigError(f"Layer '{layer.site.key}' cannot scale an adapter by {scale}. Give another number.")


def warn_no_scaling(layer: Layer, adapter: str) -> None:
    name = type(layer.methods[adapter]).__name__
    warn(f"Scaling has no meaning for {name} adapters (layer '{layer.site.key}'): ignored.", PeftWarning)
