# SPDX-License-Identifier: Apache-2.0
"""Modules that looked for PEFT before `install`, and keep the result.

transformers, accelerate, TRL and diffusers look at import whether the package peft is installed. They keep the result
in a cache (`is_peft_available`), in constants (`USE_PEFT_BACKEND`), and in the names that they import (`PeftModel`).
Two tables list these; a late `install` sets them. None of the clients' source runs again.
"""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.util import find_spec
from types import FunctionType, GenericAlias, ModuleType

CLIENTS = ("transformers", "accelerate", "trl", "diffusers")
OF_TRL = "peft LoraConfig PeftConfig PeftModel PrefixTuningConfig PromptLearningConfig get_peft_model "
OF_TRL += "prepare_model_for_kbit_training tuners.tuners_utils.BaseTunerLayer"
NAMES = {  # modules by pattern → names that they import from peft, if it is installed
    "transformers.trainer": "PeftModel",
    "transformers.trainer_utils": "PeftModel PeftMixedModel",
    "trl.*_trainer": OF_TRL,
    "trl.trainer.utils": OF_TRL,
    "trl.experimental.utils": OF_TRL,
    "diffusers.hooks.layerwise_casting": "helpers.disable_input_dtype_casting tuners.tuners_utils.BaseTunerLayer",
    "diffusers.loaders.lora_base": "tuners.tuners_utils.BaseTunerLayer",
    "diffusers.training_utils": "set_peft_model_state_dict",
}
FLAGS = (  # constants of clients that say whether PEFT is installed
    "USE_PEFT_BACKEND", "_LOW_CPU_MEM_USAGE_DEFAULT_LORA", "_SHOULD_DISABLE_PEFT_INPUT_AUTOCAST", "_peft_available",
    "_required_peft_version",
)  # fmt: skip
VERSION = "_peft_version"
FLAG = re.compile(r"_?(is_|has_|have_)peft\w*|\w*peft_(is_)?(available|installed|backend)", re.IGNORECASE)


def settle_clients() -> None:
    """Set names and flags of PEFT in the loaded modules of CLIENTS by whether `import peft` finds a package now.

    Bools called as in FLAGS, such as USE_PEFT_BACKEND, become True or False, `_peft_version` the version or "N/A".
    Names of the table NAMES are set or deleted, unless their value comes from neither PEFT nor graft. Caches of
    functions with "peft" in the name are cleared. May import `peft`.
    """
    has_peft = find_spec("peft") is not None
    for module in list_loaded_modules(CLIENTS):
        namespace = vars(module)
        for name in [name for name in namespace if "peft" in name.lower()]:
            if hasattr(namespace[name], "cache_clear"):
                namespace[name].cache_clear()
        for name in FLAGS:
            if isinstance(namespace.get(name), bool):
                namespace[name] = has_peft
        if VERSION in namespace:
            namespace[VERSION] = import_module("peft").__version__ if has_peft else "N/A"
        for pattern, names in NAMES.items():
            if fnmatchcase(module.__name__, pattern):
                for path in names.split():
                    set_name(namespace, path, has_peft)


def set_name(namespace: dict[str, object], path: str, has_peft: bool) -> None:
    """Set the last part of `path` in a client module's namespace to PEFT's object; without PEFT, delete it.

    A current value that is neither PEFT's nor graft's stays. An object that `peft` lacks leaves the current value, or
    None.

    Args:
        path: of the object below `peft`; "peft": the package itself.
        has_peft: `import peft` finds something.
    """
    parent, _, name = path.rpartition(".")
    current = namespace.get(name)
    if current is not None and not is_named_peft(current):
        return
    if not has_peft:
        namespace.pop(name, None)
    elif name == "peft":
        namespace[name] = import_module("peft")
    else:
        namespace[name] = getattr(import_module(f"peft.{parent}".rstrip(".")), name, current)


def is_named_peft(value: object) -> bool:
    """Return True for a module `peft` or `graft` or below them, and for an object with such a `__module__`."""
    home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return isinstance(home, str) and home.partition(".")[0] in ("peft", "graft")


def list_loaded_modules(packages: tuple[str, ...]) -> list[ModuleType]:
    """Return the loaded modules of these packages and below them, without those still being imported (`__spec__`)."""
    modules = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] in packages]
    return [
        m for m in modules if isinstance(m, ModuleType) and not getattr(vars(m).get("__spec__"), "_initializing", False)
    ]


def check_flags() -> None:
    """Raise ImportError for the first loaded module with a constant that says PEFT is not installed.

    A constant counts if it is False and called like FLAG, such as HAS_PEFT. `__main__` is skipped. Call it after
    `settle_clients`, which sets the known clients' constants.
    """
    for name, module in list(sys.modules.items()):
        if name == "__main__" or not isinstance(module, ModuleType):
            continue
        flag = next((n for n, value in list(vars(module).items()) if value is False and FLAG.fullmatch(n)), None)
        if flag is not None:
            raise ImportError(
                f"{name}.{flag} says that PEFT is not there, and graft does not know this module. Call "
                f"graft.compat.peft.install() before the first import of {name.partition('.')[0]}, or pass force=True."
            )


# users of an installed PEFT


def list_holders(real: Mapping[str, ModuleType]) -> list[str]:
    """Return who still uses an imported PEFT: names of modules with an object of PEFT in their namespace, then "an
    object of …" for the classes of live objects. Each text comes once, unsorted.

    All other loaded modules are looked at, also graft's. Errors are not caught.

    Args:
        real: PEFT's modules by name; they are not listed themselves.
    """
    outside = [m for name, m in list(sys.modules.items()) if isinstance(m, ModuleType) and name not in real]
    names = [m.__name__ for m in outside if any(belongs_to_peft(value, real) for value in list(vars(m).values()))]
    return [*dict.fromkeys(names), *dict.fromkeys(list_live_objects(real))]


def belongs_to_peft(value: object, real: Mapping[str, ModuleType]) -> bool:
    """Return True for a module of `real` itself, a function defined in one, and a class with itself or a base defined
    in one.

    False for all other values, also objects of PEFT's classes and types such as list[int].

    Args:
        real: PEFT's modules by name.
    """
    if isinstance(value, ModuleType):
        return real.get(value.__name__) is value
    if isinstance(value, FunctionType):
        return value.__module__ in real
    if isinstance(value, GenericAlias):  # a type by `isinstance` under Python 3.10: list[int]
        return False
    return isinstance(value, type) and any(vars(c).get("__module__") in real for c in type.mro(value))


def list_live_objects(real: Mapping[str, ModuleType]) -> Iterator[str]:
    """Yield "an object of …" for each live model, layer or config of PEFT's own classes, once for each object.

    Looks at all objects of the garbage collector.
    """
    from torch import nn

    configs = getattr(real.get("peft"), "PeftConfig", ())
    for x in gc.get_objects():
        cls = type(x)
        if vars(cls).get("__module__") in real and issubclass(cls, (nn.Module, *([configs] if configs else []))):
            yield f"an object of {cls.__module__}.{cls.__name__}"
