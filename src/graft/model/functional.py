# SPDX-License-Identifier: Apache-2.0
"""Functions on the adapters of any model, with or without a PeftModel around it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from graft.config.base import PeftConfig
from graft.core.carrier import active_after_deletion, as_name_list, check_not_merged, layer_in
from graft.core.errors import AdapterNotFoundError, PeftError, PeftWarning, warn
from graft.core.gate import adapters_of_deletion
from graft.core.layer import AdapterLayer
from graft.inject.parts import get_gate, get_registry, unwrap_model
from graft.inject.survey import Wrapper, survey_model
from graft.kernels.versions import version_of
from graft.model.checkpoints import cast_adapter_dtype as cast_adapter_dtype
from graft.model.peft_model import PeftModel
from graft.model.registry import Registry
from graft.model.tuner import Tuner, make_target_test


def find_carriers(model: nn.Module) -> list[AdapterLayer | Wrapper]:
    """Return the adapter layers and the wrappers of heads and token rows in a model, layers first."""
    tree = survey_model(model)
    return [*tree.layers.values(), *tree.wrappers.values()]


def find_all_carried(model: nn.Module, names: Sequence[str]) -> list[AdapterLayer | Wrapper]:
    """Return all carriers in a model, as `find_carriers`, after a check that each of `names` is on one of them.

    Raises AdapterNotFoundError if one is on no carrier, or if there is no adapter at all. An empty `names` passes
    otherwise.
    """
    parts = find_carriers(model)
    known = dict.fromkeys(name for part in parts for name in part.adapters)
    unknown = [n for n in names if n not in known]
    if unknown or not known:
        raise AdapterNotFoundError(
            f"Adapter {', '.join(unknown) or 'without a name'} not found. The model has: {', '.join(known) or 'none'}."
        )
    return parts


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
    """Make these adapters active, in this order, and trainable unless `inference_mode`.

    Others become inactive and frozen.

    A model with a registry leaves it all to `Registry.set_adapter`. Otherwise the names are checked, then the change
    begins, and all layers are checked before one is set. Merged layers are unmerged first, with a warning. Waits until
    no call of the model runs.

    Raises:
        AdapterNotFoundError: no layer carries one of them.
        InUseError: calls of other threads do not end in time.
        ValueError: two of them cannot be active together.
    """
    names = as_name_list(adapter_name, "set_adapter")
    registry: Registry | None = get_registry(unwrap_model(model))
    if registry is not None:
        registry.set_adapter(names, inference_mode)
        return
    parts = find_all_carried(model, names)
    with parts[0].call.gate.change(f"set_adapter({names})"):
        for part in parts:
            part.check_active(names)
        for part in parts:
            part.set_adapter(names, inference_mode)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str | None = None, layer_cls: type | None = None
) -> list[str]:
    """Remove an adapter, and return the active ones. Waits until no call runs.

    If it was the only active one, the first of the others (by name) becomes active, with a warning.

    In a model without a PeftModel, an adapter that no layer carries gives a warning and changes nothing: callers delete
    by lists that may name it twice. The deleted adapter's entry in a dict `model.peft_config` goes as well.

    Args:
        prefix, layer_cls: the method's; without effect, for PEFT's callers.

    Raises:
        AdapterNotFoundError: the PeftModel has no such adapter.
        ValueError: it is merged.
    """
    registry: Registry | None = get_registry(unwrap_model(model))
    if registry is not None:
        registry.delete_adapter(adapter_name)
        return list(registry.active_adapters)
    parts = find_carriers(model)
    known = dict.fromkeys(name for part in parts for name in part.adapters)
    active = next((list(p.active_adapters) for p in parts if p.active_adapters), [])
    if adapter_name not in known:
        warn(f"There is no adapter {adapter_name} to delete. The model has: {', '.join(known) or 'none'}.", PeftWarning)
        return active
    check_not_merged([adapter_name], {name for part in parts for name in part.merged_adapters})
    with parts[0].call.gate.change(f"delete_adapter({adapter_name!r})", adapters_of_deletion(adapter_name, active)):
        for part in parts:
            part.forget(adapter_name)
        configs = getattr(model, "peft_config", None)
        if isinstance(configs, dict):  # a model without a PeftModel
            configs.pop(adapter_name, None)
        left = active_after_deletion(adapter_name, active, known.keys() - {adapter_name})
        if left and left[0] not in active:
            set_adapter(model, left)
    return left


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Set requires_grad of all parameters of these adapters, active or not. Waits until no call runs.

    A PeftModel's registry does it; its frozen copies stay frozen.

    Raises:
        AdapterNotFoundError: an adapter is on no layer, or not loaded.
        TypeError: `adapter_names` is neither a name nor names.
    """
    names = as_name_list(adapter_names, "set_requires_grad")
    registry: Registry | None = get_registry(unwrap_model(model))
    if registry is not None:
        registry.set_requires_grad(names, requires_grad)
        return
    parts = find_all_carried(model, names)
    with parts[0].call.gate.change(f"set_requires_grad({names})", names):
        for part in parts:
            part.set_requires_grad(names, requires_grad)


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the scaling of all adapters by `multiplier` within the block; afterwards the old scalings come back.

    A scaling that other code sets meanwhile stays as set. Begin and end wait until no call runs.

    Raises:
        TypeError: `multiplier` is not an int or float.
        ValueError: no adapter of the model has a scaling.
    """
    if not isinstance(multiplier, (int, float)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers = {path: m for path, m in survey_model(model).layers.items() if getattr(m, "scaling", None)}
    if not layers:
        raise ValueError("scaling is only supported for models with `LoraLayer`s, and this one has none.")
    with rescale_layers(layers, lambda path: multiplier, "rescale_adapter_scale()"):
        yield


@contextmanager
def rescale_layers(layers: Mapping[str, Any], factor: Callable[[str], float], caller: str) -> Iterator[None]:
    """Multiply the scalings of all adapters of each layer by `factor(path)` within the block.

    Begin and end each wait until no call runs, as a change of the model.

    Layers get new dicts of scalings, at the end again. There, also after an error, the old scalings come back. A
    scaling that other code has set or overwritten meanwhile (a hot-swap) stays. `layers` must not be empty.

    Args:
        caller: its name, for threads that wait.
    """
    gate, before = next(iter(layers.values())).call.gate, {path: layer.scaling for path, layer in layers.items()}
    marks: dict[str, dict[str, tuple[Any, int]]] = {}
    with gate.change(caller):
        for path, layer in layers.items():  # a new dict, so that the old one can be put back
            layer.scaling = {name: value * factor(path) for name, value in layer.scaling.items()}
            marks[path] = {name: mark_scaling(value) for name, value in layer.scaling.items()}
    try:
        yield
    finally:
        with gate.change(f"the end of {caller}"):
            for path, layer in layers.items():
                same = {name for name, mark in marks[path].items() if is_unchanged(layer.scaling.get(name), mark)}
                old = before[path]  # a scaling that other code has set meanwhile stays
                layer.scaling = {name: old[name] if name in same else value for name, value in layer.scaling.items()}


def mark_scaling(value: object) -> tuple[object, int]:
    """Return a scaling with its version, which changes when somebody writes to it in place; 0 for a number, which
    nobody can.
    """
    return value, version_of(value) if isinstance(value, Tensor) else 0


def is_unchanged(value: object, mark: tuple[object, int]) -> bool:
    """Return True if a scaling is the object that was marked, and nobody has written to it."""
    return value is mark[0] and mark_scaling(value) == mark


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Within the block, pass adapters their input unchanged, not cast to their own dtype: `cast_input_dtype_enabled` of
    each layer is False.

    At the end, also after an error, each layer gets its old setting. If `active` is False, do nothing. For hooks that
    cast an adapter's modules when they run, such as diffusers' layerwise casting.
    """
    layers = [m for m in model.modules() if layer_in(m) is m] if active else []
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before):
            layer.cast_input_dtype_enabled = enabled


def calling(model: nn.Module) -> AbstractContextManager[object]:
    """Return a context that is one call of the model: adapters do not change within it, in whatever way the model runs.

        with graft.calling(model):
            compiled(x), model.base_model.model(x), pipeline(prompt)

    Calls and `generate` of a PeftModel, and slots, need none. Changes do not see calls of a compiled model, of modules
    inside the PeftModel, or of a model without one, unless they run in this block.

    Raises:
        AdapterNotFoundError: the model has no adapter.
        InUseError: on entering, a change of another thread takes longer than `change_timeout`.
    """
    return get_gate(model).call("a block of graft.calling()")


def inspect_matched_modules(tuner: Tuner, adapter_name: str = "default") -> dict[str, list[str]]:
    """Return the paths of all modules, {"matched": […], "unmatched": […]}, by whether the adapter's config targets
    them. A PeftModel may be passed, too.
    """
    tuner = get_registry(tuner).holder
    targets = make_target_test(tuner, tuner.peft_config[adapter_name])
    paths: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for key in survey_model(tuner.model).modules:
        paths["matched" if targets(key) else "unmatched"].append(key)
    return paths


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Return True if a folder or hub repository holds an adapter, and its config has a `peft_type`.

    False also for any PeftError, OSError, TypeError or ValueError in reading the config; other errors are raised.
    """
    try:
        return PeftConfig.from_pretrained(model_name_or_path).peft_type is not None
    except (PeftError, OSError, TypeError, ValueError):
        return False


# signatures


CALLS = ("forward", "generate")


def update_signature(model: PeftModel, method: str = "all") -> None:
    """Give `forward`, `generate` or both of this model the base model's signature and docstring.

    A method that the base lacks, or that here takes more than just (*args, **kwargs), stays. The new function is an
    attribute of the model itself.

    Args:
        method: "forward", "generate" or "all".

    Raises:
        ValueError: it is another name.
    """
    if method not in (*CALLS, "all"):
        raise ValueError(f"method {method} is not supported please choose one of {[*CALLS, 'all']}")
    base = model.get_base_model()
    for name in CALLS if method == "all" else (method,):
        if hasattr(base, name) and accepts_anything(getattr(model, name)):
            setattr(model, name, copy_signature(getattr(model, name), getattr(base, name)))


def update_forward_signature(model: PeftModel) -> None:
    """Do `update_signature(model, "forward")`."""
    update_signature(model, "forward")


def update_generate_signature(model: PeftModel) -> None:
    """Do `update_signature(model, "generate")`."""
    update_signature(model, "generate")


def accepts_anything(function: Callable[..., object]) -> bool:
    """Return True if the parameters of a function are exactly (*args, **kwargs)."""
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    return kinds == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]


def copy_signature(function: Callable[..., object], example: Callable[..., object]) -> Callable[..., object]:
    """Return a function that calls `function` and has the signature, name and docstring of `example`."""

    @functools.wraps(example)
    def call(*args: object, **kwargs: object) -> object:
        """Call `function`."""
        return function(*args, **kwargs)

    return call
