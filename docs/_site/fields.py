# SPDX-License-Identifier: Apache-2.0
"""Fields of configs in the API reference: a table of name, type, what the comment beside it says, and default."""

from __future__ import annotations

import ast
from functools import cache
from importlib import import_module
from typing import Any

import griffe

COMMON = "PeftConfig"  # whose fields every config has: its own entry lists them, once
parse = cache(ast.parse)  # a module has several dataclasses, and each reads those above it


class Fields(griffe.Extension):
    """Write the fields of each dataclass into its docstring, as a Google-style section."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        for cls in classes(pkg):
            lines = list(table(cls))
            if lines and cls.docstring is not None and "Attributes:" not in cls.docstring.value:
                before, raises, after = cls.docstring.value.rstrip().partition("\n\nRaises:")
                cls.docstring.value = "\n".join([before, "", "Attributes:", *lines]) + raises + after

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Show the number of a default that is the name of a constant, such as PATIENCE."""
        for parameter in func.parameters:
            if isinstance(parameter.default, griffe.ExprName) and parameter.default.name.isupper():
                module = import_module(func.module.path)
                parameter.default = repr(getattr(module, parameter.default.name))


def classes(module: griffe.Module) -> list[griffe.Class]:
    """Classes of the module and of those below it."""
    found = []
    for member in module.members.values():
        if member.is_alias:
            continue
        if isinstance(member, griffe.Class):
            found.append(member)
        elif isinstance(member, griffe.Module):
            found += classes(member)
    return found


def table(cls: griffe.Class) -> list[str]:
    if not is_dataclass(cls):
        return []
    rows: dict[str, str] = {}
    for owner in (cls, *cls.mro()):
        if owner.name != COMMON or cls.name == COMMON:
            rows = own(owner) | rows  # a field that a class declares anew is that class's
    names = [name for owner in (cls, *cls.mro()) for name in own(owner) if name in rows]  # its own ones first
    return [rows[name] for name in dict.fromkeys(names)]


def is_dataclass(cls: griffe.Class) -> bool:
    return any("dataclass" in str(decorator.value) for decorator in cls.decorators)


def own(cls: griffe.Class) -> dict[str, str]:
    """The fields that a class body declares: a line for each, by name."""
    lines: list[str] = cls.module.lines_collection[cls.module.filepath]
    body = parse("\n".join(lines)).body
    (found,) = [node for node in body if isinstance(node, ast.ClassDef) and node.name == cls.name]
    nodes = [n for n in found.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    rows = {}
    for node in nodes:
        name, kind = ast.unparse(node.target), ast.unparse(node.annotation)
        if name.startswith("_") or kind.startswith("ClassVar"):
            continue
        said = comment(lines, node)
        default = "" if node.value is None else f"Default: `{shown(node.value)}`."
        rows[name] = f"    {name} ({kind}): {said} {default}".rstrip()
    return rows


def comment(lines: list[str], node: ast.AnnAssign) -> str:
    """What stands behind `#` in the lines of a field, and in lines below it that are nothing else."""
    first, last = node.lineno - 1, node.end_lineno or node.lineno
    parts = [line.rpartition("  # ")[2] for line in lines[first:last] if "  # " in line]
    if parts:
        for line in lines[last:]:
            if not line.strip().startswith("# "):
                break
            parts.append(line.strip()[2:])
    text = " ".join(part.strip() for part in parts)
    if not text:
        return ""
    text = text[0].upper() + text[1:] if text.partition(" ")[0].islower() else text
    return text.rstrip(".") + "."


def shown(value: ast.expr) -> str:
    text = ast.unparse(value)
    return {"field(default_factory=dict)": "{}", "field(default_factory=list)": "[]"}.get(text, text)
