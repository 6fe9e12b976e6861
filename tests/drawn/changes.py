# SPDX-License-Identifier: Apache-2.0
"""The changes that can be made to a source file, and a draw of some by a seed.

A change turns a comparison, swaps `and` and `or`, drops a `not`, swaps an operator, changes a number or a flag, removes
a statement, or leaves an argument out. Texts, annotations, assertions, and the messages of errors stay.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: ">=", ast.LtE: ">", ast.Gt: "<=", ast.GtE: "<", ast.Eq: "!=", ast.NotEq: "==",
    ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is",
}  # fmt: skip
OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "//", ast.Pow: "*",
    ast.BitAnd: "|", ast.BitOr: "&",
}  # fmt: skip
SILENT = {"__repr__", "__str__"}  # functions that only describe
TEXTS = {"warn", "warning", "note", "add_note"}  # calls whose arguments are texts
STYLE = {"stacklevel"}  # arguments that change no result


@dataclass(frozen=True)
class Change:
    """One change of a file: `text` in place of the characters from `start` to `end`."""

    file: str  # relative to the package
    line: int
    sort: str  # of the changes that a draw treats alike
    kind: str  # what changes, for people
    start: int
    end: int
    text: str
    function: str  # the innermost function's qualified name; empty outside functions

    def apply(self, source: str) -> str:
        """Return the source with the change; the number of its lines stays."""
        lost = source[self.start : self.end].count("\n") - self.text.count("\n")
        return source[: self.start] + self.text + "\n" * lost + source[self.end :]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.kind}"


class Finder:
    """Finds every change of one file."""

    def __init__(self, file: str, source: str):
        self.file, self.source = file, source
        self.tree = ast.parse(source)
        self.line_starts = [0]
        for line in source.encode().splitlines(keepends=True):
            self.line_starts.append(self.line_starts[-1] + len(line))
        self.bytes = source.encode()
        self.functions: list[str] = []

    def offset(self, line: int, column: int) -> int:
        """Return the offset in characters of a position of the syntax tree, which counts in bytes."""
        return len(self.bytes[: self.line_starts[line - 1] + column].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Return the offsets at which a node begins and ends."""
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def change(self, node: ast.AST, sort: str, kind: str, start: int, end: int, text: str) -> Change:
        return Change(self.file, node.lineno, sort, kind, start, end, text, ".".join(self.functions))  # type: ignore[attr-defined]

    def changes(self) -> list[Change]:
        """Return all changes of the file, in its order."""
        return list(self.visit(self.tree))

    def visit(self, node: ast.AST) -> Iterator[Change]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if node.name in SILENT:
                return
            for child in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
                yield from self.visit(child)
            self.functions.append(node.name)
            for child in node.body:
                yield from self.visit(child)
            self.functions.pop()
            return
        if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)):
            if isinstance(node, ast.Raise) and self.functions:
                yield self.remove(node)
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                yield from self.visit(node.value)
            return
        yield from self.own_changes(node)
        if isinstance(node, ast.Call) and name_of_call(node) in TEXTS:
            return
        for field, value in ast.iter_fields(node):
            if field == "decorator_list":
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.keyword) and child.arg in STYLE:
                    continue
                if isinstance(child, ast.AST):
                    yield from self.visit(child)

    def own_changes(self, node: ast.AST) -> Iterator[Change]:
        """Yield the changes of one node, without those of the nodes in it."""
        if isinstance(node, ast.Compare):
            yield from self.turned(node)
        elif isinstance(node, ast.BoolOp):
            old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            yield from self.between(node, "boolean", node.values[0], node.values[1], old, new)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            start, _ = self.span(node)
            yield self.change(node, "boolean", "not dropped", start, self.span(node.operand)[0], "")
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            if not any(isinstance(n, ast.Constant) and isinstance(n.value, str) for n in ast.walk(node)):
                new = OPERATORS[type(node.op)]
                yield from self.between(node, "operator", node.left, node.right, None, new)
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            yield self.changed_constant(node)
        elif isinstance(node, ast.Call):
            yield from self.without_argument(node)
        elif isinstance(node, (ast.Expr, ast.AugAssign, ast.Continue, ast.Break, ast.Delete)) and self.functions:
            if not (isinstance(node, ast.Expr) and isinstance(node.value, (ast.Constant, ast.Yield, ast.YieldFrom))):
                yield self.remove(node)
        elif isinstance(node, ast.Assign) and self.functions and not any(map(is_name, node.targets)):
            yield self.remove(node)

    def remove(self, node: ast.stmt) -> Change:
        return self.change(node, "removed", f"removed: {ast.unparse(node)[:60]}", *self.span(node), "pass")

    def turned(self, node: ast.Compare) -> Iterator[Change]:
        for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            new = COMPARISONS[type(op)]
            yield from self.between(node, "comparison", left, right, None, new)

    def between(
        self, node: ast.AST, sort: str, left: ast.AST, right: ast.AST, old: str | None, new: str
    ) -> Iterator[Change]:
        """Yield the change of the operator between two nodes, if nothing but it and parentheses stand there."""
        start, end = self.span(left)[1], self.span(right)[0]
        between = self.source[start:end]
        operator = between.replace("(", " ").replace(")", " ").strip()
        if "#" in between or "\n" in operator or (old is not None and operator != old) or not operator:
            return
        at = start + between.index(operator)
        yield self.change(node, sort, f"{operator} → {new}", at, at + len(operator), new)

    def changed_constant(self, node: ast.Constant) -> Change:
        value = node.value
        new = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 2 or 1.0
        return self.change(node, "constant", f"{value} → {new}", *self.span(node), repr(new))

    def without_argument(self, node: ast.Call) -> Iterator[Change]:
        """Yield a change for each keyword argument that is left out, and for the last positional one."""
        if name_of_call(node) in TEXTS:
            return
        arguments = sorted([*node.args, *node.keywords], key=lambda a: (a.lineno, a.col_offset))
        for argument in arguments:
            keyword = isinstance(argument, ast.keyword)
            if (argument.arg in STYLE) if keyword else argument is not node.args[-1]:
                continue
            if isinstance(argument, (ast.GeneratorExp, ast.Starred)):
                continue
            start, end = self.span(argument)
            if not keyword and self.source[start - 1] == "(" and len(arguments) > 1 and node.args[0] is not argument:
                continue  # it stands in parentheses
            after = self.source[end:]
            rest = after.lstrip()
            if rest.startswith(","):
                end += len(after) - len(rest) + 1
            elif (before := self.source[:start].rstrip()).endswith(","):
                start = len(before) - 1
            kind = f"left out: {ast.unparse(argument)[:40]} of {ast.unparse(node.func)[:30]}"
            yield self.change(argument, "keyword" if keyword else "argument", kind, start, end, "")


def is_name(target: ast.expr) -> bool:
    """Return True for a target that binds a name, alone or in a tuple: without it, later lines fail at once."""
    return not isinstance(target, (ast.Attribute, ast.Subscript))


def name_of_call(node: ast.Call) -> str:
    """Return the last part of the name of the function that is called; empty if it has none."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def find_changes(package: Path, folders: list[str]) -> list[Change]:
    """Return all changes of the files below some folders of the package whose result still compiles."""
    changes = []
    for folder in folders:
        for path in sorted((package / folder).rglob("*.py")):
            changes += Finder(path.relative_to(package).as_posix(), path.read_text()).changes()
    return changes


def draw_changes(package: Path, folders: list[str], seed: int, n: int) -> list[Change]:
    """Return `n` changes that the seed draws: first a sort, each alike, then one of it whose result compiles."""
    generator = random.Random(seed)
    sorts: dict[str, list[Change]] = {}
    for change in find_changes(package, folders):
        sorts.setdefault(change.sort, []).append(change)
    for changes in sorts.values():
        generator.shuffle(changes)
    chosen: list[Change] = []
    while len(chosen) < n:
        change = sorts[generator.choice(sorted(sorts))].pop()
        try:
            compile(change.apply((package / change.file).read_text()), change.file, "exec")
        except SyntaxError:
            continue
        chosen.append(change)
    return chosen
