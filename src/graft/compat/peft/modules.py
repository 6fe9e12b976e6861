# SPDX-License-Identifier: Apache-2.0
"""Modules called peft, peft.tuners.lora, … that hand out graft's objects, and the finder that makes them."""

from __future__ import annotations

import difflib
import importlib.abc
import importlib.machinery
import importlib.metadata
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import graft
from graft import PeftWarning, method_of
from graft.compat.peft.layers import BNB, kind_names, layer_class, layer_names, make_refusing_function
from graft.compat.peft.names import (
    BESIDE,
    LAYER_FILES,
    MAPPINGS,
    MODULES,
    OF_FILES,
    WHERE,
    WITH_BNB,
    folder,
    import_held,
)
from graft.core.errors import warn
from graft.methods import IN_PEFT, ROWS

ROOT = "peft"
OF_LAYERS = (  # about a function that chooses a layer class
    "chooses one of PEFT's layer classes, which graft does not have. Call get_peft_model(), or Linear(base, adapter, "
    "config=…) of peft.tuners.lora for one layer."
)
VERSION = "0.22.0"  # the least that transformers 5.24 accepts; graft's interface is that of 0.21.2


def list_method_names(peft_type: str) -> dict[str, list[str]]:
    """Return the names in each module of a method, by the module's path below `peft`.

    The modules are .config, .model, the one of layers and .bnb, and for LoRA those of `OF_FILES`. One without names is
    left out. The method's package has the names of all of them, and .model also PEFT's table of default targets.
    """
    row, package = ROWS[peft_type], f"tuners.{folder(peft_type)}"
    modules = {
        "config": [row.config, *BESIDE.get(peft_type, "").split()],
        LAYER_FILES.get(peft_type, "layer"): layer_names(peft_type),
        "model": [row.tuner],
        "bnb": kind_names(peft_type, BNB) if peft_type in WITH_BNB else [],
        **{file: [name] for name, file in OF_FILES.items() if peft_type == "LORA"},
    }
    all_names = [name for names in modules.values() for name in names]
    modules["model"] += [name for name, of in MAPPINGS.items() if of == peft_type]
    return {package: all_names} | {f"{package}.{file}": names for file, names in modules.items() if names}


# module below `peft` that a method owns → (peft_type, names)
OF_METHODS = {path: (of, names) for of in IN_PEFT for path, names in list_method_names(of).items()}


def is_known_module(module: str) -> bool:
    """Return True if graft has a module for the dotted name, such as "peft.tuners.lora"."""
    return strip_root(module) in MODULES or strip_root(module) in OF_METHODS


def strip_root(module: str) -> str:
    """Return a module's name without a leading "peft" and dot: "" for "peft", "tuners.lora" for "peft.tuners.lora"."""
    return module.removeprefix(ROOT).removeprefix(".")


def names_in(module: str) -> list[str]:
    """Return the names in a module, sorted: those that the tables list for it, and the modules directly inside it.

    A module inside it counts by its first part, also if only a deeper one is listed. `peft` itself also has all public
    names of graft. A module that graft does not have has none.
    """
    path = strip_root(module)
    _, names = OF_METHODS.get(path, ("", graft.__all__ if path == "" else []))
    start = f"{path}." if path else ""
    inner = {p[len(start) :].partition(".")[0] for p in (*MODULES, *OF_METHODS) if p and p.startswith(start)}
    return sorted({*names, *MODULES.get(path, "").split(), *inner})


def resolve(module: str, name: str) -> Any:
    """Return the object that PEFT's `module` has under `name`: the first of these that exists.

    1. a module; 2. a method's layer class; 3. in `peft.import_utils`, a check such as `is_bnb_available`; 4. a name of
    the tables: a refusing dispatcher, default targets, an object inside graft, one of `clients`, `layers` or `shims`,
    or a public name of graft.

    Raises:
        AttributeError: graft has no such name; the text suggests a similar one.
    """
    if is_known_module(f"{module}.{name}"):
        return import_module(f"{module}.{name}")
    path = strip_root(module)
    if path in OF_METHODS and name in layer_names(OF_METHODS[path][0]):
        return layer_class(OF_METHODS[path][0], name)
    from graft.compat.peft import clients, layers, shims

    if path == "import_utils" and (check := shims.import_check(name)) is not None:
        return check
    if name in names_in(module):
        if name.startswith("dispatch_"):
            return make_refusing_function(name, OF_LAYERS)
        if name in MAPPINGS:
            return method_of(MAPPINGS[name]).targets
        if name in WHERE:
            return import_held(name)
        return getattr(next((home for home in (clients, layers, shims) if name in vars(home)), graft), name)
    raise AttributeError(describe_missing_name(module, name))


def describe_missing_name(module: str, name: str) -> str:
    """Return the error text for a name that graft lacks.

    If graft has the module, the most similar of its names is suggested, from a similarity of 0.9.
    """
    close = difflib.get_close_matches(name, names_in(module), n=1, cutoff=0.9)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return (
        f"{module}.{name} is not in graft yet{hint}: graft replaces peft here, see graft.compat.peft. Use PEFT for it, "
        "or see docs/differences.md for names that are missing on purpose."
    )


class AliasModule(ModuleType):
    """A module that looks names up on first use and then keeps them, as `graft` itself does."""

    def __getattr__(self, name: str) -> Any:
        """Return PEFT's object of that name, by `resolve`, and keep it in the module.

        `__version__` of `peft` and `peft.config` is the version of `install`; `__all__` is `names_in`. Neither is kept.

        Raises:
            AttributeError: another dunder name, or a name that graft lacks.
        """
        if name == "__version__" and strip_root(self.__name__) in ("", "config"):
            return FINDER.version
        if name == "__all__":
            return names_in(self.__name__)
        if name.startswith("__"):
            raise AttributeError(name)
        value = resolve(self.__name__, name)
        self.__dict__[name] = value  # past __setattr__, which warns
        return value

    def __setattr__(self, name: str, value: object) -> None:
        """Set a name in this module.

        Warns with PeftWarning if the name has another value, since graft never reads it here.

        Modules and dunder names are set without a warning.
        """
        plain = name.startswith("__") or isinstance(value, ModuleType)
        if not plain and getattr(self, name, value) is not value:
            warn(
                f"{self.__name__}.{name} was replaced for those who import it from there from now on; graft itself "
                "calls nothing by PEFT's names, and runs as before.",
                PeftWarning,
            )
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """Return `names_in` of this module, whether the objects have been looked up or not."""
        return names_in(self.__name__)


def metadata(version: str) -> str:
    """Return the text of a METADATA file for a distribution `peft` of that version."""
    return f"Metadata-Version: 2.1\nName: {ROOT}\nVersion: {version}\nSummary: graft in PEFT's place\n"


class _Distribution(importlib.metadata.Distribution):
    """The distribution `peft` for `importlib.metadata`; libraries check there that PEFT is installed."""

    def __init__(self, version: str):
        """Keep two texts: METADATA with the version, and top_level.txt with "peft"."""
        self._texts = {"METADATA": metadata(version), "top_level.txt": ROOT}

    def read_text(self, filename: str) -> str | None:
        """Return METADATA or top_level.txt; None for any other file."""
        return self._texts.get(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> Any:
        """Return `path` below the folder of the package graft. The file need not exist."""
        return os.path.join(os.path.dirname(graft.__file__ or ""), path)


class Finder(importlib.metadata.DistributionFinder, importlib.abc.Loader):
    """A meta path finder for `peft` and all below it, and for its metadata."""

    version = VERSION

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module `peft` or below it, always as a package with no folders; None for all other
        names.

        Raises:
            ModuleNotFoundError: graft has no such module below `peft`. The error has the parent's name.
        """
        if name != ROOT and not name.startswith(f"{ROOT}."):
            return None
        if not is_known_module(name):
            # named after its parent: `from peft import X` would hide an error that is named peft.X
            parent, _, last = name.rpartition(".")
            raise ModuleNotFoundError(describe_missing_name(parent, last), name=parent)
        spec = importlib.machinery.ModuleSpec(name, self, origin="graft.compat.peft")
        spec.submodule_search_locations = []  # a package, so that Python asks here for a missing name
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Return an empty AliasModule with the spec's name."""
        return AliasModule(spec.name, f"graft in the place of {spec.name}")

    def exec_module(self, module: ModuleType) -> None:
        """Set the module's `__file__` to that of graft.compat.peft; nothing else runs."""
        module.__file__ = os.path.join(os.path.dirname(__file__), "__init__.py")

    def find_distributions(self, context: object = None) -> Iterator[importlib.metadata.Distribution]:
        """Yield the distribution `peft` with this finder's version, if the context asks for "peft" in any case or for
        all.
        """
        name = getattr(context, "name", None)
        if name is None or name.lower() == ROOT:
            yield _Distribution(self.version)


FINDER = Finder()


def select_peft_modules(modules: Iterable[str]) -> list[str]:
    """Return those of the names that are "peft" or begin with "peft."."""
    return [m for m in modules if m == ROOT or m.startswith(f"{ROOT}.")]


def real_peft() -> dict[str, ModuleType]:
    """Return an installed PEFT's modules in `sys.modules`, by name, without graft's aliases.

    An entry None, as set by a program that hides a module, is included.
    """
    return {m: x for m in select_peft_modules(list(sys.modules)) if not isinstance(x := sys.modules[m], AliasModule)}
