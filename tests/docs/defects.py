# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/peft_defects.md: `python -m tests.docs.defects` puts them in order and says which test shows what.

A row is on the page, and the test that shows it is marked with its case:

    | OLoRA on Conv1D | fails | works |

    @pytest.mark.differs("OLoRA on Conv1D")
    def test_olora_on_conv1d(): ...

A mark may bring the cells of a new row, `peft="fails", graft="works"`; those of the page give way to them.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.docs.marks import put

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "peft_defects.md"
MARK = "pytest.mark.differs"
PARTS = {  # folders of tests → the part of the page that they make
    "Loading and saving": "io trust",
    "Injection": "inject core",
    "Models, batches and merging": "model conformance kernels",
    "Side by side with PEFT": "parity",
    "Methods": "methods",
    "Prompts": "prompts model/tasks model/generation",
    "Combining and converting": "combine",
    "Training": "train optim",
    "Serving": "serving",
    "Quantized bases": "storage packages",
    "Devices and several processes": "device distributed",
    "Code written for PEFT's inside": "compat clients",
}


class Row(NamedTuple):
    case: str
    peft: str
    graft: str
    file: str  # below tests/
    test: str
    runs_peft: bool

    @property
    def line(self) -> str:
        shown = f"`{self.file}` {self.test.removeprefix('test_')}{' *' if self.runs_peft else ''}"
        cells = (self.case, self.peft, self.graft, shown)
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


@functools.cache
def module(path: Path) -> tuple[ast.Module, dict[str, ast.AST], dict[str, tuple[str, str]]]:
    """The tree of a file, what it defines at its top by name, and what it imports: name → (module, name there)."""
    tree = ast.parse(path.read_text())
    defined: dict[str, ast.AST] = {}
    imported: dict[str, tuple[str, str]] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign):
            defined |= {t.id: node.value for t in node.targets if isinstance(t, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imported |= {a.asname or a.name: (node.module or "", a.name) for a in node.names}
        elif isinstance(node, ast.Import):
            imported |= {(a.asname or a.name).partition(".")[0]: (a.name, "") for a in node.names}
    return tree, defined, imported


@functools.cache
def names_in(node: ast.AST) -> set[str]:
    """Return the names that the code reads or has as its parameters."""
    nodes = list(ast.walk(node))
    names = {n.id for n in nodes if isinstance(n, ast.Name)}
    return names | {a.arg for n in nodes if isinstance(n, ast.arguments) for a in n.args}


def uses_peft(path: Path, node: ast.AST, seen: set[tuple[Path, str]]) -> bool:
    """Return True if the code, or what it calls or takes as a fixture, names the package."""
    _, defined, imported = module(path)
    for name in names_in(node):
        package, there = imported.get(name, ("", ""))
        if package.split(".")[0] == "peft":
            return True
        file, what = (path, name) if name in defined else (ROOT / f"{package.replace('.', '/')}.py", there)
        if (file, what) in seen or not (name in defined or package.startswith("tests.")) or not file.exists():
            continue
        seen.add((file, what))
        found = module(file)[1].get(what)
        if found is not None and uses_peft(file, found, seen):
            return True
    return False


def cells() -> dict[str, tuple[str, str]]:
    """Return what the page says of PEFT and of graft, by case."""
    lines = [re.split(r"(?<!\\)\|", line) for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    texts = [[cell.strip().replace(r"\|", "|") for cell in line[1:4]] for line in lines]
    return {case: (peft, graft) for case, peft, graft in texts}


def rows() -> Iterator[Row]:
    """Yield a row for each mark. Raises a KeyError if neither the mark nor the page has its cells."""
    page = cells()
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if f"@{MARK}" not in path.read_text():
            continue
        for node in ast.walk(module(path)[0]):
            if not isinstance(node, ast.FunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == MARK:
                    (case,) = map(ast.literal_eval, mark.args)
                    said = {k.arg: ast.literal_eval(k.value) for k in mark.keywords}
                    if not said and case not in page:
                        raise KeyError(f"{PAGE.name} has no row `| {case} | what PEFT does | what graft does |`")
                    peft, graft = (said.pop("peft"), said.pop("graft")) if said else page[case]
                    if why := said.pop("why", ""):
                        graft = f"{graft}. {why[0].upper()}{why[1:]}"
                    file = str(path.relative_to(ROOT / "tests"))
                    yield Row(case, peft, graft, file, node.name, uses_peft(path, node, set()))
                    assert not said, said


def part_of(row: Row) -> str:
    """Return the part with the longest folder that the test lies in."""
    folders = {folder: part for part, text in PARTS.items() for folder in text.split()}
    return folders[max((f for f in folders if row.file.startswith(f"{f}/")), key=len)]


def text(rows: Iterable[Row]) -> str:
    found = sorted(rows, key=lambda row: (row.file, row.case.strip("`").lower()))
    both = sum(row.runs_peft for row in found)
    lines = [f"{len(found)} rows. In the tests of {both} of them, which have a star, PEFT itself runs.", ""]
    for part in PARTS:
        lines += [f"## {part}", "", "| case | PEFT 0.21.2 | graft | shown by |", "|---|---|---|---|"]
        lines += [row.line for row in found if part_of(row) == part] + [""]
    return "\n".join(lines).rstrip()


def page(rows: Iterable[Row]) -> str:
    return put(PAGE.read_text(), "printed by tests/docs/defects.py", text(rows))


if __name__ == "__main__":
    PAGE.write_text(page(rows()))
