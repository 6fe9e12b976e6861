# SPDX-License-Identifier: Apache-2.0
"""Names of fields that stand in files and documents: fields.txt holds them, so that a new name shows.

The file has two parts: each place in the source that makes a dict of an object, with the classes that reach a file
there ("-": none does), and the fields of these classes. After a change on purpose:
`python -m tests.golden.test_fields`, and say in place of "?" what a new place is for. Whoever gives a field another
name has to read the old one, too.
"""

from __future__ import annotations

import ast
import dataclasses
from importlib import import_module
from pathlib import Path

import pytest

import graft
from tests.golden.cases import HERE

pytestmark = pytest.mark.graft_only
TABLE, SOURCE = HERE / "fields.txt", Path(graft.__file__).parent
TO_DICT = ("asdict", "astuple", "vars", "_asdict")
LISTED = ("graft.many.run:StepRecord", "graft.many.run:ValidationRecord")  # run files and tables have them as lists


def calls(tree):
    """Yield the calls that make a dict of all attributes of an object, and not only look one of them up."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", None))
        above = parents[node]
        looks_up = isinstance(above, (ast.Subscript, ast.Compare)) or getattr(above, "attr", None) in ("get", "pop")
        if name in TO_DICT and not looks_up:
            yield ast.unparse(node)


def places():
    """Return the places in the source, as "path: expression"."""
    found = set()
    for path in sorted(SOURCE.rglob("*.py")):
        source = path.read_text()
        if any(name in source for name in TO_DICT):  # most files call none
            found |= {f"{path.relative_to(SOURCE).as_posix()}: {call}" for call in calls(ast.parse(source))}
    return sorted(found)


def known():
    """Return what the file says of each place."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    return dict(line.rsplit(" → ", 1) for line in lines if " → " in line)


def fields_of(name):
    """Return the names of the fields of a class, "module:Class"."""
    module, _, name = name.partition(":")
    cls = getattr(import_module(module), name)
    return list(getattr(cls, "_fields", ())) or [f.name for f in dataclasses.fields(cls)]


def text():
    """Return what the file should be; "?" stands at new places."""
    said = {place: known().get(place, "?") for place in places()}
    classes = {f"graft:{name}" for name in dir(graft) if name.endswith("Config")} | {*LISTED}
    for names in said.values():
        classes |= {name for name in names.split() if ":" in name}
    by_name = sorted(classes, key=lambda name: name.partition(":")[::-1])
    lines = [f"{place} → {names}" for place, names in said.items()]
    return "\n".join([*lines, "", *(f"{name} = {' '.join(fields_of(name))}" for name in by_name)]) + "\n"


def test_fields_that_reach_files():
    made = text()
    assert " → ?" not in made, "say in tests/golden/fields.txt which classes reach a file there"
    assert made.splitlines() == TABLE.read_text().splitlines()


if __name__ == "__main__":
    TABLE.write_text(text())
