# SPDX-License-Identifier: Apache-2.0
"""Modules that other packages put around modules (FSDP, torch.compile, checkpointing), and accelerate's hooks.

Wrappers change only how a module runs, and add parts to names. Hooks of accelerate move the inputs of the modules that
it dispatches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

# attributes with the module inside
INNER_ATTRIBUTES = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
# classes that hold a whole model as `module`
OUTER_CLASSES = ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine")
WRAPPER_NAMES = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join((*INNER_ATTRIBUTES, 'module'))})\.")
WRAPPER_PREFIX = re.compile(rf"(?:(?:{'|'.join((*INNER_ATTRIBUTES, 'module'))})\.)+")  # see `strip_outer_wrappers`
MANAGED = "_is_fsdp_managed_module"  # FSDP sets it on all modules that it manages


def find_unsharded_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module; if `fully_shard` has replaced it by a subclass, the class of before.

    It is the first class of the MRO that is not one of torch.distributed with a name beginning with "FSDP".
    """
    return next(
        kind
        for kind in type(module).__mro__
        if not (kind.__name__.startswith("FSDP") and kind.__module__.startswith("torch.distributed."))
    )


def strip_all_wrappers(name: str) -> str:
    """Return a name without any part of a wrapper, "module." of wrappers around whole models included, for
    comparisons.
    """
    return WRAPPER_NAMES.sub("", name)


def strip_outer_wrappers(name: str) -> str:
    """Return a name without the wrapper parts at its beginning, those of wrappers around the whole model."""
    prefix = WRAPPER_PREFIX.match(name)
    return name if prefix is None else name[prefix.end() :]


def is_bias(name: str) -> bool:
    """Return True if the last part of a dotted parameter name is "bias".

    `bias="all"` trains and saves these, as in PEFT.
    """
    return name.rpartition(".")[2] == "bias"


def find_inner_attribute(module: nn.Module) -> str | None:
    """Return the attribute under which a wrapper holds its module; None if `module` is no wrapper.

    A wrapper has exactly one child, with a name of `INNER_ATTRIBUTES`, or named "module" in a class of `OUTER_CLASSES`.
    """
    modules = module._modules
    if len(modules) != 1:
        return None
    name: str = next(iter(modules))
    return name if name in INNER_ATTRIBUTES or (name == "module" and type(module).__name__ in OUTER_CLASSES) else None


def find_inner_module(module: nn.Module) -> nn.Module | None:
    """Return the module that a wrapper holds; None if `module` is no wrapper."""
    name = find_inner_attribute(module)
    return None if name is None else module._modules[name]


def walk_unwrapped(root: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) for `root` and all modules below it.

    Wrappers are left out, from the modules and from the paths.

    A module with two paths comes twice.
    """
    while (inner := find_inner_module(root)) is not None:
        root = inner
    yield path, root
    for name, child in root._modules.items():
        if child is not None:
            yield from walk_unwrapped(child, f"{path}.{name}" if path else name)


def collect_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of one module by name, without those of its children and without entries of None.

    Where FSDP1 has flattened them, returns the plain attributes that are views of the flat parameter, and not the flat
    one.
    """
    attributes = module.__dict__
    if MANAGED not in attributes:
        return {name: p for name, p in module._parameters.items() if p is not None}
    parameters = {n: p for n, p in module._parameters.items() if p is not None and not hasattr(p, "_is_flat_param")}
    views = {n: t for n, t in attributes.items() if isinstance(t, Tensor) and hasattr(t._base, "_is_flat_param")}
    return parameters | views


HOOK = "_hf_hook"  # accelerate's mark on a module


def find_offload_hooks(m: nn.Module) -> list[Any]:
    """Return the accelerate hooks on a module that load its tensors for a call and offload them again; [] if it has
    none.

    They are those with a true `offload`, also within a sequence of hooks.
    """
    hook: Any = m.__dict__.get(HOOK)
    return [h for h in getattr(hook, "hooks", (hook,)) if getattr(h, "offload", False)]


def copy_offloaded(m: nn.Module, name: str) -> Tensor:
    """Return a copy of an offloaded tensor of a module, on the execution device of its first offloading hook.

    Raises IndexError without such a hook.
    """
    hook = find_offload_hooks(m)[0]
    weights: Mapping[str, Tensor] = hook.weights_map
    return weights[name].to(hook.execution_device, copy=True)


def remove_hook(m: nn.Module) -> None:
    """Remove accelerate's hook and the forward of the instance, if there are any, without calling the hook.

    The class's forward runs from then on. The module's tensors stay where they are.
    """
    for name in (HOOK, "_old_forward", "forward"):
        m.__dict__.pop(name, None)


def load_offloaded(m: nn.Module, source: nn.Module) -> None:
    """Replace each parameter and buffer of a module that is on the meta device by a copy from the hooks of `source`.

    Parameters are new objects with the same `requires_grad`.
    """
    for name, p in m._parameters.items():
        if p is not None and p.is_meta:
            m._parameters[name] = nn.Parameter(copy_offloaded(source, name), p.requires_grad)
    for name, b in m._buffers.items():
        if b is not None and b.is_meta:
            m._buffers[name] = copy_offloaded(source, name)


OFFLOAD_LOCK = Lock()  # one thread at a time loads tensors for good


def end_offloading(root: nn.Module) -> None:
    """Load the offloaded tensors of `root` and all modules below it for good, and remove accelerate's hooks from these
    modules.

    Modules without an offloading hook keep theirs. Takes a lock of all threads, once per module. Accelerate loads the
    tensors of a module only when the module is called. Methods read many tensors without a call, and torch multiplies
    with meta tensors without an error. Another thread may add modules meanwhile.
    """
    waiting = [root]
    while waiting:
        m = waiting.pop()
        waiting += [child for child in list(m._modules.values()) if child is not None]
        if find_offload_hooks(m):
            with OFFLOAD_LOCK:
                if find_offload_hooks(m):  # else another thread was first
                    load_offloaded(m, m)
                    remove_hook(m)


def move_inputs(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object], Callable[[object], object] | None]:
    """Return the arguments of a call, moved as accelerate's hook on the module moves them, and a function of the
    output.

    The first hook with `io_same_device` and an execution device counts. The function moves the output back to the
    device of the first tensor among the arguments. It is None if the hook does not do that, or if the devices are
    equal. Keyword arguments under the hook's `skip_keys` are not moved. If no hook has a device, returns the arguments
    as they are, and None.
    """
    hook = module.__dict__[HOOK]
    for h in getattr(hook, "hooks", (hook,)):
        if hasattr(h, "io_same_device") and h.execution_device is not None:
            device = torch.device(h.execution_device)
            came = find_device((args, kwargs)) if h.io_same_device else None
            skipped = (h.skip_keys,) if isinstance(h.skip_keys, str) else h.skip_keys or ()
            back = None if came is None or came == device else partial(move_tensors, device=came)
            return move_tensors(args, device), move_tensors(kwargs, device, skipped), back
    return args, kwargs, None


def move_tensors(value: Any, device: torch.device, skipped: Collection[str] = ()) -> Any:
    """Return a value with all tensors in its tuples, lists and dicts on `device`; values under the keys `skipped` stay.

    Other objects, subclasses of these containers included, are returned unchanged.
    """
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)([move_tensors(v, device, skipped) for v in value])
    if type(value) is dict:
        return {k: v if k in skipped else move_tensors(v, device, skipped) for k, v in value.items()}
    return value


def find_device(value: Any) -> torch.device | None:
    """Return the device of the first tensor in a value or in its tuples, lists and dicts; None if there is none.

    Subclasses of these containers, such as a transformers output, are not searched.
    """
    if isinstance(value, Tensor):
        return value.device
    inside = value.values() if type(value) is dict else value if type(value) in (tuple, list) else ()
    return next((d for v in inside if (d := find_device(v)) is not None), None)
