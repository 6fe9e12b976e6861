# SPDX-License-Identifier: Apache-2.0
"""Fields of configs in the API reference: a table of name, type, the text of its comment, and default."""

from __future__ import annotations

import ast
from functools import cache
from importlib import import_module
from typing import Any

import griffe

COMMON = "PeftConfig"  # every config has its fields: only its entry lists them
parse = cache(ast.parse)  # a module has several dataclasses, and each reads those above it


class Fields(griffe.Extension):
    """Write the fields of each dataclass into its docstring, as a Google-style section."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        for cls in list_classes(pkg):
            lines = list(list_field_lines(cls))
            if lines and cls.docstring is not None and "Attributes:" not in cls.docstring.value:
                before, raises, after = cls.docstring.value.rstrip().partition("\n\nRaises:")
                cls.docstring.value = "\n".join([before, "", "Attributes:", *lines]) + raises + after

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Show the number of a default that is the name of a constant, such as PATIENCE."""
        for parameter in func.parameters:
            if isinstance(parameter.default, griffe.ExprName) and parameter.default.name.isupper():
                module = import_module(func.module.path)
                parameter.default = repr(getattr(module, parameter.default.name))


def list_classes(module: griffe.Module) -> list[griffe.Class]:
    """Return the classes of a module and of the modules below it."""
    classes = []
    for member in module.members.values():
        if member.is_alias:
            continue
        if isinstance(member, griffe.Class):
            classes.append(member)
        elif isinstance(member, griffe.Module):
            classes += list_classes(member)
    return classes


def list_field_lines(cls: griffe.Class) -> list[str]:
    """Return a line for each field of a dataclass, its own first, then inherited ones; none for another class."""
    if not is_dataclass(cls):
        return []
    rows: dict[str, str] = {}
    for owner in (cls, *cls.mro()):
        if owner.name != COMMON or cls.name == COMMON:
            rows = read_field_lines(owner) | rows  # a field that a class declares anew is that class's
    names = [name for owner in (cls, *cls.mro()) for name in read_field_lines(owner)]  # its own ones first
    return [rows[name] for name in dict.fromkeys(names) if name in rows]


def is_dataclass(cls: griffe.Class) -> bool:
    return any("dataclass" in str(decorator.value) for decorator in cls.decorators)


def read_field_lines(cls: griffe.Class) -> dict[str, str]:
    """Return a line for each field that a class body declares, by name."""
    lines: list[str] = cls.module.lines_collection[cls.module.filepath]
    body = parse("\n".join(lines)).body
    (definition,) = [node for node in body if isinstance(node, ast.ClassDef) and node.name == cls.name]
    nodes = [n for n in definition.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    rows = {}
    for node in nodes:
        name, kind = ast.unparse(node.target), ast.unparse(node.annotation)
        if name.startswith("_") or kind.startswith("ClassVar"):
            continue
        text = read_comment(lines, node)
        default = "" if node.value is None else f"Default: `{format_default(node.value)}`."
        rows[name] = f"    {name} ({kind}): {text} {default}".rstrip()
    return rows


def read_comment(lines: list[str], node: ast.AnnAssign) -> str:
    """Return the comment of a field: in its lines, and in the lines of comments below it. "" if there is none."""
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


def format_default(value: ast.expr) -> str:
    """Return the text of a default; an empty container replaces its factory."""
    text = ast.unparse(value)
    return {"field(default_factory=dict)": "{}", "field(default_factory=list)": "[]"}.get(text, text)
