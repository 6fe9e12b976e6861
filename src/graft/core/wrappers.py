# SPDX-License-Identifier: Apache-2.0
"""Modules that stand around others and change nothing but how they run: FSDP's, torch.compile's, a checkpoint's.

They put parts of their own into names, also deep inside a model. Names are compared without these parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

INNER = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")  # attributes with the module inside
AROUND = ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine")  # classes that hold a whole model as `module`
PARTS = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join((*INNER, 'module'))})\.")
MANAGED = "_is_fsdp_managed_module"  # FSDP's mark on all modules in its hands


def clean(name: str) -> str:
    """Return a name as it stands in a file: without the parts of wrappers around modules within a model."""
    if "_wrapped_module" not in name and "_orig_mod" not in name:  # no name of INNER, as for most
        return name
    return re.sub(rf"(?:^|(?<=\.))(?:{'|'.join(INNER)})\.", "", name)


def bare(name: str) -> str:
    """Return a name without any part of a wrapper, those around whole models included, to compare it with others."""
    return PARTS.sub("", name)


def place_inside(module: Any) -> str | None:
    """Return the attribute under which a wrapper has the module within; None for any other module."""
    modules = module._modules
    if len(modules) != 1:
        return None
    name: str = next(iter(modules))
    return name if name in INNER or (name == "module" and type(module).__name__ in AROUND) else None


def inside(module: Any) -> Any:
    """Return the module within a wrapper; None for any other module."""
    name = place_inside(module)
    return None if name is None else module._modules[name]


def walk(root: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules from `root` on with their paths, as if there were no wrappers."""
    while (inner := inside(root)) is not None:
        root = inner
    yield path, root
    for name, child in root._modules.items():
        if child is not None:
            yield from walk(child, f"{path}.{name}" if path else name)


def parameters_in(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of one module by name; where FSDP has flattened them, the attributes in their place."""
    held = module.__dict__
    if MANAGED not in held:
        return {name: p for name, p in module._parameters.items() if p is not None}
    own = {name: p for name, p in module._parameters.items() if p is not None and not hasattr(p, "_is_flat_param")}
    return own | {name: t for name, t in held.items() if isinstance(t, Tensor) and hasattr(t._base, "_is_flat_param")}
