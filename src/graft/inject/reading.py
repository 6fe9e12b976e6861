# SPDX-License-Identifier: Apache-2.0
"""What the modules around a layer do with it: call it, or read its weight and compute with that, as Mamba's mixers do.

An adapter acts where its layer is called; where its weight is read, the layer has to give out what the adapter makes of
it. Which of the two a class does stands in its source alone.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

from graft.storage import innermost

Path = tuple[str, ...]  # of attributes, from a module on; ITEM for one of a list

ITEM = "[]"
TENSORS = {"weight", "bias"}
FACTS = {
    "dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_meta", "is_cuda", "is_quantized",
    "element_size", "layout", "itemsize", "get_device", "is_floating_point", "grad",
}  # fmt: skip
TAKES_FACTS = {"isinstance", "hasattr", "to", "type_as", "id"}  # functions that use no value of a tensor
SETS_UP = re.compile(r"__init__|_*(init|reset|tie|untie|resize|set|load|save|prune|convert|smart)(_|ialize|$)")


class Use(NamedTuple):
    """What a class does with a module within it."""

    reads: bool = False  # computes with its weight or bias
    calls: bool = False  # calls it, or hands it on to what may


class Source(ast.NodeVisitor):
    """The modules that a function reads and calls, by their paths from `self`."""

    def __init__(self, me: str):
        self.known: dict[str, Path] = {me: ()}  # by the name of a variable
        self.reads: set[Path] = set()
        self.calls: set[Path] = set()

    def path(self, node: ast.AST) -> Path | None:
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            inner = self.path(node.value)
            return None if inner is None else (*inner, node.attr)
        if isinstance(node, ast.Subscript):
            inner = self.path(node.value)
            if inner is None or isinstance(node.slice, ast.Slice):
                return inner
            return (*inner, ITEM)
        return None

    def visit(self, node: ast.AST) -> None:
        path = self.path(node)
        if path is None:
            super().visit(node)
            return
        self.use(path, writes=not isinstance(getattr(node, "ctx", None), ast.Load))
        while not isinstance(node, ast.Name):  # what stands in brackets
            if isinstance(node, ast.Subscript):
                self.visit(node.slice)
            node = node.value  # type: ignore[attr-defined]

    def use(self, path: Path, writes: bool = False) -> None:
        at = next((i for i, part in enumerate(path) if i and part in TENSORS), None)
        if at is None:
            self.calls.add(path)
            return
        rest = [part for part in path[at + 1 :] if part != "data"]
        if not writes and not (rest and rest[0] in FACTS):
            self.reads.add(path[:at])

    def visit_Call(self, node: ast.Call) -> None:
        path, name = self.path(node.func), getattr(node.func, "id", getattr(node.func, "attr", ""))
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        if path is None:
            self.visit(node.func)
        elif not name.endswith("_") or name.startswith("_"):  # else it writes to the tensor
            self.use(path)
            self.calls.add(path[:-1])
        for value in given:
            if not (name in TAKES_FACTS and self.path(value)):
                self.visit(value)

    def visit_Compare(self, node: ast.Compare) -> None:
        if not isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        path, target = self.path(node.value), node.targets[0]
        if path is None or TENSORS & set(path) or not isinstance(target, ast.Name):
            self.generic_visit(node)
        else:
            self.known[target.id] = path

    def visit_For(self, node: ast.For) -> None:
        path = self.path(node.iter)
        if path and isinstance(node.target, ast.Name):
            self.known[node.target.id] = (*path, ITEM)
        for part in (node.iter, *node.body, *node.orelse):
            self.visit(part)


def plain(value: Any) -> FunctionType | None:
    """Return the function that a class has written, from what stands in its dictionary."""
    written: Any = value.fget if isinstance(value, property) else value
    value = inspect.unwrap(written)
    return value if isinstance(value, FunctionType) and value.__code__.co_argcount else None


def names(code: CodeType) -> Iterator[str]:
    """Yield the names of all attributes in a function."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from names(inner)


def look(function: FunctionType) -> Source | None:
    """Return what a function reads and calls; None if it has no source."""
    try:
        lines = inspect.getsourcelines(function)[0]
        tree = ast.parse("".join(["if 1:\n", *lines] if lines[0][:1].isspace() else lines))
    except (OSError, TypeError, SyntaxError):
        return None
    source = Source(function.__code__.co_varnames[0])
    source.visit(tree)
    return source


SOURCES: WeakKeyDictionary[type, dict[Path, Use]] = WeakKeyDictionary()


def uses_of(kind: type) -> dict[Path, Use]:
    """Return what a class does with the modules within it, by path; {} if it reads the weight of none."""
    if kind in SOURCES:
        return SOURCES[kind]
    functions: dict[str, FunctionType] = {}
    for cls in kind.__mro__:
        if not f"{cls.__module__}.".startswith("torch."):  # its own: see `COMPOSED`, and `attach` in inject.py
            for name, value in vars(cls).items():
                if (function := plain(value)) is not None and not SETS_UP.match(name):
                    functions.setdefault(name, function)
    uses: dict[Path, Use] = {}
    if any(TENSORS & set(names(f.__code__)) for f in functions.values()):  # few do
        found = [seen for f in functions.values() if (seen := look(f)) is not None]
        reads, calls = {p for s in found for p in s.reads}, {p for s in found for p in s.calls}
        uses = {path: Use(path in reads, path in calls) for path in reads | calls} if reads else {}
    SOURCES[kind] = uses
    return uses


def readers(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, dict[Path, Use]]:
    """Return what those modules do with others within them that read a weight there, by path. Few models have any."""
    kinds: dict[type, list[str]] = {}
    for path, m in modules:
        kinds.setdefault(type(innermost(m)), []).append(path)
    return {path: uses for kind, paths in kinds.items() if (uses := uses_of(kind)) for path in paths}


def use_of(key: str, readers: dict[str, dict[Path, Use]]) -> Use:
    """Return what the modules around one do with it."""
    parts = key.split(".")
    inside = tuple(ITEM if part.isdigit() else part for part in parts)
    found = [
        use
        for i in range(len(parts))
        if (uses := readers.get(".".join(parts[:i]))) and (use := uses.get(inside[i:])) is not None
    ]
    return Use(any(use.reads for use in found), any(use.calls for use in found))
