# SPDX-License-Identifier: Apache-2.0
"""PEFT's names on a layer: attributes and methods for callers of PEFT, beyond those that graft itself uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from graft.core.containers import ExactBuffers, move_tensor
from graft.core.effect import Update
from graft.core.errors import AdapterNotFoundError, ConfigError, PeftWarning, RoutingError, warn
from graft.core.finite import is_finite
from graft.core.folding import EvaluationMode, compute_delta, why_no_delta
from graft.core.gate import all_adapters, changes
from graft.core.merging import lift_merged
from graft.core.method import Layer, Method

ACTIVATE = "set_adapter() activates adapters"
CLASS_NAMES = {"trainable_tokens": "TrainableTokensLayer"}  # PEFT's names; all others are folder and type: lora.Linear


class VariantForward:
    """An adapter with a forward other than scaling · B A dropout(x), as a value of PEFT's `lora_variant`."""

    def __init__(self, method: Method):
        self.method = method

    def forward(self, module: Layer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: object) -> Tensor:
        """Return `result`, the output of layer `module` for x, with this one adapter on it, by the layer's plan for
        `active_adapter` alone; `method` is not read.

        Raises NotImplementedError if the adapter changes more than the output. Further arguments are ignored.
        """
        y: Tensor = module.plan_for((active_adapter,)).add(x, result, False)
        return y

    def supports_lora_conversion(self) -> bool:
        """Return True if plain LoRA can hold the adapter."""
        return why_no_delta(self.method) is None

    def __getattr__(self, name: str) -> NoReturn:
        """Raise AttributeError for PEFT's other attributes of a variant."""
        raise AttributeError(f"A variant has no '{name}' in graft. Call merge() and unmerge() of its layer.")


class Variants(Mapping[str, VariantForward]):
    """The adapters of a layer with a forward other than plain LoRA's, by name, as they are at each access."""

    def __init__(self, layer: Layer):
        self.layer = layer

    def _find_variants(self) -> dict[str, VariantForward]:
        return {name: VariantForward(m) for name, m in self.layer.methods.items() if m.is_variant}

    def __getitem__(self, name: str) -> VariantForward:
        return self._find_variants()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._find_variants())

    def __len__(self) -> int:
        return len(self._find_variants())


class ReadOnlyNames(list[str]):
    """The names of adapters as a layer shows them.

    Every method that changes a list raises; copies and pickles are lists.
    """

    def __init__(self, names: Sequence[str], shown_as: str, remedy: str):
        """Hold the names. `shown_as` and `remedy` are for the error."""
        super().__init__(names)
        self.shown_as, self.remedy = shown_as, remedy

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        """Raise AttributeError with the attribute's name and the remedy: a change of the list would have no effect."""
        raise AttributeError(f"{self.shown_as} cannot be changed: {self.remedy}.")

    __setitem__ = __delitem__ = __iadd__ = __imul__ = append = clear = extend = insert = pop = _refuse
    remove = reverse = sort = _refuse

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:  # a copy is the caller's
        return list, (list(self),)


class PeftNames:
    """The part of an AdapterLayer that has PEFT's names."""

    # the base layer

    @property
    def weight(self: Layer) -> Tensor:
        """Return the base layer's weight.

        If modules around it read it to compute with it, the adapters of this call are folded in.
        """
        if self.site.is_read and (plan := self.find_reader_plan()) is not None:
            return self.op.uncanon(plan.fold_current()[0])
        weight: Tensor = self.get_base_layer().weight
        return weight

    @property
    def bias(self: Layer) -> Tensor | None:
        """Return the base layer's bias; None if it has none.

        If modules around it read it to compute with it, the adapters of this call are in it, in the bias's dtype.
        """
        if self.site.is_read and (plan := self.find_reader_plan()) is not None:
            shifted: Tensor | None = plan.bias()
            base_bias = self.bias_now
            return shifted if shifted is None or base_bias is None else shifted.to(base_bias.dtype)
        bias: Tensor | None = self.get_base_layer().bias
        return bias

    @property
    def fan_in_fan_out(self: Layer) -> bool:
        """Return True if the base layer stores (in, out) and is no embedding."""
        return self.op.transposed and not self.op.takes_ids

    @property
    def is_target_conv_1d_layer(self: Layer) -> bool:
        """Return True if the base layer is transformers' Conv1D, by the name of its class."""
        return self.site.type_name == "Conv1D"

    @property
    def quantization_backend(self: Layer) -> str | None:
        """Return the name of the layer's store, such as "bnb"; None for the store "dense"."""
        return None if self.store.name == "dense" else self.store.name

    def get_base_layer(self: Layer) -> nn.Module:
        """Return the innermost module without adapters, below all nested `base_layer`s."""
        base = self.base_layer
        while (inner := base._modules.get("base_layer")) is not None:
            base = inner
        return base

    def get_base_weight(self: Layer) -> Tensor:
        """Return the weight in the base layer's orientation, dequantized if it is packed."""
        return self.base_weight.read()

    def get_delta_weight(self: Layer, adapter: str) -> Tensor:
        """Return ΔW of `adapter` in the base layer's orientation, without dropout: the layer is in evaluation mode
        meanwhile. It does not matter whether the adapter is active or merged.

        Raises:
            AdapterNotFoundError: the layer does not carry it.
            NotImplementedError: the adapter does something else than add to the weight.
        """
        if adapter not in self.methods:
            raise AdapterNotFoundError(f"Adapter {adapter} not found on layer '{self.site.key}'.")
        effect = self.methods[adapter].effect
        if not isinstance(effect, Update) or effect.weightless:
            raise NotImplementedError(
                f"Adapter '{adapter}' has no ΔW on layer '{self.site.key}': {type(self.methods[adapter]).__name__} "
                "does not add to the weight. Call the layer to see the adapter's effect."
            )
        with EvaluationMode(self):
            return self.op.uncanon(compute_delta(self, effect))

    def supports_lora_conversion(self: Layer, adapter_name: str = "default") -> bool:
        """Return True if the layer carries the adapter and plain LoRA can hold it: see `graft.convert_to_lora`."""
        return adapter_name in self.methods and why_no_delta(self.methods[adapter_name]) is None

    # adapters

    @property
    def merged_adapters(self: Layer) -> list[str]:
        """Return the names of the merged adapters as a list that cannot be changed."""
        return ReadOnlyNames(self.state.merged, "merged_adapters", "merge() and unmerge() change what is merged")

    @property
    def merged(self: Layer) -> bool:
        """Return True if an adapter is merged."""
        return bool(self.state.merged)

    @property
    def active_adapters(self: Layer) -> list[str]:
        """Return a new list of the active adapters, including those that the layer does not carry."""
        return list(self.state.active)  # a plain list: other packages pass it on, and pickle it

    active_adapter = active_adapters  # a list here and on the tuner, a name on a PeftModel

    @property
    def _active_adapter(self: Layer) -> list[str]:
        """Return the names of the active adapters as a list that cannot be changed.

        Setting it raises AttributeError.
        """
        return ReadOnlyNames(self.state.active, "_active_adapter", ACTIVATE)

    @_active_adapter.setter
    def _active_adapter(self, names: object) -> None:
        """Raise AttributeError: `set_adapter` activates adapters."""
        raise AttributeError(f"_active_adapter cannot be set on a layer: {ACTIVATE}.")

    @property
    def _disable_adapters(self: Layer) -> bool:
        """Return True if `enable_adapters` has disabled the adapters.

        Blocks and calls do not count. Setting it raises AttributeError.
        """
        off: bool = self.state.disabled
        return off

    @_disable_adapters.setter
    def _disable_adapters(self, off: bool) -> None:
        """Raise AttributeError: `enable_adapters` switches adapters on and off."""
        raise AttributeError(
            "_disable_adapters cannot be set on a layer: enable_adapters(False) switches adapters off."
        )

    @property
    def adapter_layer_names(self: Layer) -> tuple[str, ...]:
        """Return the names of the containers of trained tensors of the methods on this layer, each once, empty ones
        included.

        The containers that a variant of a method adds come last. Names without a container on the layer are left out.
        """
        names = dict.fromkeys(n for m in self.methods.values() for n in m.layer_names)
        return tuple(n for n in names if n in self._modules or n in self.__dict__)

    @property
    def other_param_names(self: Layer) -> tuple[str, ...]:
        """Return the names of the layer's containers that are not in `adapter_layer_names`, in the order of
        `containers`.
        """
        return tuple(k for k in self.containers if k not in self.adapter_layer_names)

    # attributes that a forward written for PEFT's layers uses

    @property
    def lora_variant(self: Layer) -> Variants:
        """Return the adapters with a forward other than plain LoRA's, by name; a deleted adapter disappears from it."""
        return Variants(self)

    def _check_forward_args(self, x: Tensor, *args: object, **kwargs: object) -> None:
        """Do nothing: names of rows are checked where the model is called."""

    def _cast_input_dtype(self: Layer, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return x in this dtype; x itself if it is None, or if the layer's input casting is disabled."""
        return x if x is None or not self.cast_input_dtype_enabled else x.to(dtype)

    def _mixed_batch_forward(
        self: Any,
        x: Tensor,
        *args: object,
        adapter_names: object = None,
        alora_offsets: object = None,
        **kwargs: object,
    ) -> object:
        """Run the layer by graft's own forward, which takes the rows from the model's call, and return its output.

        `alora_offsets` is ignored, and so is `adapter_names` if the call has rows.

        Raises:
            RoutingError: `adapter_names` is given here, and the model's call has no rows.
        """
        if adapter_names is not None and not (self.call.open and self.call.current_rows()):
            raise RoutingError(f"adapter_names for layer '{self.site.key}' alone. Pass them to the PeftModel.")
        return self._graft_forward(x, *args, **kwargs)

    @changes(all_adapters)
    def reset_lora_parameters(self: Layer, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Set A and B of a LoRA adapter to initial values again.

        If it is merged, the merge holds the new values afterwards.

        Waits until no call of the model runs.

        Args:
            init_lora_weights: True or "gaussian"; False leaves all as it is.

        Raises:
            AdapterNotFoundError: the layer does not carry the adapter.
            ConfigError: the adapter's method has no `restart`, as LoRA's has, or the initialisation changes more than A
                and B.
            InUseError: calls of the model do not end in time.
        """
        method = self.methods.get(adapter_name)
        if method is None:
            raise AdapterNotFoundError(f"Adapter {adapter_name} not found on layer '{self.site.key}'.")
        if not hasattr(method, "restart"):
            raise ConfigError(
                f"Adapter '{adapter_name}' on layer '{self.site.key}' is {type(method).__name__}, which has no A and B "
                "of LoRA. Delete the adapter and add it anew."
            )
        with lift_merged(self):
            method.restart(init_lora_weights)

    def _move_adapter_to_device_of_base_layer(
        self: Layer, adapter_name: str, device: torch.device | str | int | None = None
    ) -> None:
        """Move an adapter's tensors to the base weight's device, or to `device`, and cast floats to the base weight's
        dtype.

        Values of `ExactBuffers` keep their dtype, and all do if the weight is no float. Does nothing if the layer
        does not carry the adapter.
        """
        if adapter_name not in self.methods:
            return
        base_device, dtype = self.where
        for slot in self.slots(adapter_name):
            keeps = isinstance(slot.owner, ExactBuffers) or dtype is None or not dtype.is_floating_point
            data = slot.tensor.data
            new = move_tensor(
                data, base_device if device is None else torch.device(device), None if keeps else dtype, False
            )
            if new is not data:
                slot.tensor.data = new

    # scaling

    def set_scale(self: Layer, adapter: str, scale: float) -> None:
        """Set the scaling of `adapter` to `scale` times its configured one.

        Warns if its method has no scaling; does nothing if the layer does not carry it. Raises ConfigError if `scale`
        is not finite.
        """
        rescale(self, [adapter], scale, lambda name: scale * self.scaling_at_start[name], changes=True)

    def scale_layer(self: Layer, scale: float) -> None:
        """Multiply the present scaling of the active adapters by `scale`.

        Warns for methods without scaling, unless `scale` is 1. Raises ConfigError if `scale` is not finite.
        """
        rescale(self, self.state.active, scale, lambda name: self.scaling[name] * scale, changes=scale != 1)

    def unscale_layer(self: Layer, scale: float | None = None) -> None:
        """Divide the present scaling of the active adapters by `scale`; set it to the configured one if `scale` is
        None.

        Warns for methods without scaling, unless `scale` is 1 or None.

        Raises:
            ConfigError: `scale` is 0, or not finite.
        """

        def unscale(adapter: str) -> float:
            """Return the adapter's configured scaling if `scale` is None, else the present one divided by it."""
            return self.scaling_at_start[adapter] if scale is None else self.scaling[adapter] / scale

        rescale(self, self.state.active, scale, unscale, changes=scale not in (None, 1), divides=True)

    # names and repr

    @property
    def parameter_name(self: Layer) -> str:
        """Return the name of the adapted parameter of a layer around a parameter.

        Raises AttributeError on other layers, as PEFT's clients tell layers apart by it.
        """
        if self.site.path == self.site.key:
            raise AttributeError("parameter_name")  # as in PEFT, where clients tell such layers by it
        return self.site.parameter

    def _get_name(self: Layer) -> str:
        """Return the name for repr: folders of the methods on the layer, joined by "+" ("graft" without methods), and
        PEFT's name for the type, such as "lora.Linear". Folders in `CLASS_NAMES` give PEFT's name instead.

        The type is "ParamWrapper" for a parameter, "Linear" also for a Conv1D, else the base layer's.
        """
        base = self.site.type_name
        kind = "ParamWrapper" if self.site.path != self.site.key else "Linear" if base == "Conv1D" else base
        modules = {type(m).__module__.removeprefix("graft.methods.").split(".")[0]: None for m in self.methods.values()}
        return CLASS_NAMES.get("+".join(modules), f"{'+'.join(modules) or 'graft'}.{kind}")

    def extra_repr(self: Layer) -> str:
        """Return "adapters=[…], active=[…]" for repr, after "parameter_name='…', " if the layer is for a parameter.

        Nothing of the base layer is in it.
        """
        parameter = f"parameter_name='{self.site.parameter}', " if self.site.path != self.site.key else ""
        return f"{parameter}adapters={list(self.methods)}, active={self.state.active}"


def rescale(
    layer: Layer,
    adapters: Iterable[str],
    scale: float | None,
    new: Callable[[str], float],
    changes: bool,
    divides: bool = False,
) -> None:
    """Set the scaling of these adapters of a layer to `new(adapter)`.

    A method without scaling is left alone, with a PeftWarning if `changes`: the scaling may differ from the present
    one. Names that the layer does not carry are ignored. Tensors and None as `scale` are not checked: the host would
    have to wait for a tensor's device.

    Raises:
        ConfigError: `scale`, a factor for scalings, is an infinite or NaN number, or is 0 and `divides`.
    """
    if isinstance(scale, (int, float)) and not (is_finite(scale) and (scale or not divides)):
        raise ConfigError(f"Layer '{layer.site.key}' cannot scale an adapter by {scale}. Give another number.")
    for adapter in adapters:
        if adapter in layer.scaling_at_start:
            layer.scaling[adapter] = new(adapter)
        elif adapter in layer.methods and changes:
            name = type(layer.methods[adapter]).__name__
            warn(f"Scaling has no meaning for {name} adapters (layer '{layer.site.key}'): ignored.", PeftWarning)
