# SPDX-License-Identifier: Apache-2.0
"""Functions of the package to read without their bodies: a test of names and docstrings by people.

python -m tests.house.reading                 40 functions, drawn by the hash of the commit: name, signature, docstring
python -m tests.house.reading --bodies        the same with their bodies, for those who grade
python -m tests.house.reading --n 20 --seed 7 as many as given, drawn by a seed

A reader who has not seen the code writes down what each function returns, under which conditions it does something
else, its side effects and errors. A grader compares: 2 is right, 1 misses a condition or side effect, 0 is wrong.
"""

from __future__ import annotations

import argparse
import ast
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "graft"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def list_functions(package: Path = PACKAGE) -> list[tuple[Path, str, Function]]:
    """Return path, qualified name and node of all functions of a package but dunder methods, nested ones included."""

    def walk(path: Path, node: ast.AST, names: tuple[str, ...]) -> Iterator[tuple[Path, str, Function]]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            inner = (*names, child.name) if named else names  # type: ignore[attr-defined]
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and not child.name.startswith("__"):
                yield path, ".".join(inner), child
            yield from walk(path, child, inner)

    files = sorted(package.rglob("*.py"))
    return [entry for path in files for entry in walk(path, ast.parse(path.read_text()), ())]


def read_commit() -> str:
    """Return the hash of the commit that is checked out."""
    words = ["git", "rev-parse", "HEAD"]
    return subprocess.run(words, cwd=PACKAGE, check=True, capture_output=True, text=True).stdout.strip()


def show_function(path: Path, name: str, node: Function, body: bool) -> str:
    """Return the text of a function: with its body, or only path, name, signature and docstring."""
    place = f"src/graft/{path.relative_to(PACKAGE)}: {name}"
    if body:
        return f"{place}\n{ast.get_source_segment(path.read_text(), node)}"
    decorators = "".join(f"@{ast.unparse(decorator)}\n" for decorator in node.decorator_list)
    returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    docstring = ast.get_docstring(node) or "(no docstring)"
    return f"{place}\n{decorators}def {node.name}({ast.unparse(node.args)}){returned}\n{docstring}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=40)
    parser.add_argument("--seed", default=None)
    parser.add_argument("--bodies", action="store_true")
    options = parser.parse_args()
    draw = random.Random(options.seed or read_commit()).sample(list_functions(), options.n)
    for i, (path, name, node) in enumerate(draw, 1):
        print(f"## {i}. {show_function(path, name, node, options.bodies)}\n")


if __name__ == "__main__":
    main()
