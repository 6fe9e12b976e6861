# SPDX-License-Identifier: Apache-2.0
"""The public surface as text: names, signatures, defaults, fields of configs, attributes of layers, options.

`python -m tests.surface` writes it into tests/surface.txt, so that a change of what users call shows in a diff.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from enum import Enum
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch
import typer

import graft
from tests.conformance.samples import SAMPLES

FILE = Path(__file__).with_suffix(".txt")
REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
MODULES = ("graft.optim", "graft.serving", "graft.train", "graft.compat.peft")  # public beside graft itself
PUBLIC = {value for name in graft.__all__ if inspect.isclass(value := getattr(graft, name))}


def print_surface() -> str:
    """Return the whole surface, a line for each name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sections = {
            "graft": names_of_package(),
            "documented beside graft": documented_names(),
            "modules": [line for name in MODULES for line in names_of_module(import_module(name))],
            "methods": methods(),
            "attributes of layers": layer_attributes(),
            "peft": compat_names(),
            "command": command_options(),
        }
    return "".join(f"# {title}\n\n" + "\n".join(lines) + "\n\n" for title, lines in sections.items()).rstrip() + "\n"


def names_of_package() -> list[str]:
    return [line for name in sorted(graft.__all__) for line in describe(f"graft.{name}", getattr(graft, name))]


def documented_names() -> list[str]:
    """Return what the reference documents by its module and `graft` does not export."""
    lines = []
    for page in sorted(REFERENCE.glob("*.md")):
        for path in re.findall(r"^::: (\S+)$", page.read_text(), re.M):
            module, _, name = path.rpartition(".")
            if name not in graft.__all__:
                lines += describe(path, getattr(import_module(module), name))
    return lines


def names_of_module(module: ModuleType) -> Iterator[str]:
    for name in sorted(getattr(module, "__all__", ())):
        yield from describe(f"{module.__name__}.{name}", getattr(module, name))


def describe(path: str, value: Any) -> Iterator[str]:
    """Yield a line for a name, and for a class a line for each field or public attribute."""
    if not inspect.isclass(value):
        yield f"{path}{signature(value)}" if callable(value) else f"{path}: {type(value).__name__}"
        return
    bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
    yield f"class {path}({bases})"
    if issubclass(value, Enum):
        yield from (f"    .{member.name} = {member.value!r}" for member in value)
    elif dataclasses.is_dataclass(value):
        inherited = {
            line
            for base in value.__mro__[1:]
            if base in PUBLIC and dataclasses.is_dataclass(base)
            for line in fields(base)
        }
        yield from (f"    {line}" for line in fields(value) if line not in inherited)
    elif not issubclass(value, BaseException):
        yield f"    {signature(value)}"
    yield from attributes(value)


def fields(value: type) -> list[str]:
    """Return a line for each field of a dataclass."""
    return [f".{field.name}: {field.type}{default_of(field)}" for field in dataclasses.fields(value)]


def attributes(value: type) -> Iterator[str]:
    """Yield the public methods and properties that graft's own classes give a class."""
    own_fields = {f.name for f in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
    for name in dir(value):
        member = inspect.getattr_static(value, name)
        owner = next((c for c in value.__mro__ if name in vars(c)), value)
        if name.startswith("_") or name in own_fields or not owner.__module__.startswith("graft"):
            continue
        if owner is not value and owner in PUBLIC:
            continue
        if isinstance(member, (classmethod, staticmethod)):
            yield f"    .{name}{signature(member.__func__)}"
        elif callable(member):
            yield f"    .{name}{signature(member)}"
        elif not issubclass(value, Enum):
            yield f"    .{name}"


def signature(value: Any) -> str:
    """Return a signature whose defaults read alike in every process and version."""
    if inspect.isclass(value) and issubclass(value, Enum):
        return "(value)"  # each version of Python says another
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return "(…)"
    parameters = [
        p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else Default(p.default))
        for p in found.parameters.values()
    ]
    return str(found.replace(parameters=parameters, return_annotation=found.empty))


class Default:
    """A default whose text holds no address of the process."""

    def __init__(self, value: Any):
        self.value = value

    def __repr__(self) -> str:
        value = self.value
        if inspect.isroutine(value) or inspect.isclass(value):
            return value.__qualname__
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def default_of(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {Default(field.default)!r}"
    return f" = {field.default_factory.__name__}()" if field.default_factory is not dataclasses.MISSING else ""


def methods() -> list[str]:
    """Return the values of PeftType with their config and tuner classes."""
    from graft.methods import ROWS

    return [f"{kind}: {row.config} {row.tuner}" for kind, row in sorted(ROWS.items(), key=lambda r: str(r[0]))]


def layer_attributes() -> list[str]:
    """Return the attributes of a linear layer under each method, without those of every module of torch."""
    lines = set()
    for sample in SAMPLES:
        model = torch.nn.Sequential(OrderedDict(layer=torch.nn.Linear(8, 8)))
        try:
            adapted = graft.get_peft_model(model, sample.make())
        except graft.PeftError:  # of methods that take other layers
            continue
        layer = adapted.base_model.model.layer
        if isinstance(layer, graft.AdapterLayer):
            names = {n for n in dir(layer) if not n.startswith("_")} - set(dir(torch.nn.Module))
            lines.add(f"{sample.method}: {' '.join(sorted(names))}")
    return sorted(lines)


def compat_names() -> list[str]:
    """Return the names that each module of PEFT's name has."""
    from graft.compat.peft import names

    return [f"{module}: {' '.join(sorted(held.split()))}" for module, held in sorted(names.MODULES.items())]


def command_options() -> list[str]:
    """Return each verb of the command with its arguments, options and defaults."""
    from graft.command.app import VERBS, app

    for module in VERBS.values():
        import_module(f"graft.command.{module}")
    group = typer.main.get_command(app)
    lines = []
    for verb, command in sorted(group.commands.items()):  # type: ignore[attr-defined]
        lines.append(f"graft {verb}")
        for p in command.params:
            kind = "argument" if isinstance(p, click.Argument) else "option"
            names = " ".join([*p.opts, *p.secondary_opts])
            lines.append(f"    {kind} {names} = {Default(p.default)!r}{' required' if p.required else ''}")
    return lines


if __name__ == "__main__":
    FILE.write_text(print_surface())
    print(FILE)
