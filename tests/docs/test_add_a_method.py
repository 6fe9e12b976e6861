# SPDX-License-Identifier: Apache-2.0
"""docs/add_a_method.md, followed in a copy of the repository: a file, a line, and everything else is there."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.docs.blocks import ROOT, blocks
from tests.docs.run import lines

PAGE = ROOT / "docs" / "add_a_method.md"
TOY, USE, EXCERPT, SAMPLES = blocks(PAGE)
TABLES = "python -m tests.docs.tables"
CHECKS = {  # a part of what `pytest -k TOY` and the whole suite run: tests → those selected, and how many at least
    "conformance/test_matrix.py": ("TOY", 30),
    "conformance/test_subclass.py storage/test_stores.py": ("TOY and not conv", 5),
    "docs/test_tables.py docs/test_reference.py": ("tables or list or methods or ToyConfig or twice", 5),
    "compat/test_compat.py": ("names_are_where or default_targets or every_layer_class or stands_for", 50),
    "test_architecture.py core/test_method.py model/tasks/test_matrix.py": ("Toy or TOY or row or every_cell", 5),
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy with the page's method in it."""
    copy = tmp_path_factory.mktemp("repository")
    left = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.png", "*.svg")
    for folder in ("src", "tests", "docs", "benchmarks", "examples"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=left)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, copy)
    (diff,) = blocks(PAGE, "diff")
    head, line = (text[1:] for text in diff.text.splitlines())
    table = copy / "src" / "graft" / "methods" / "__init__.py"
    assert diff.text.startswith(" ") and table.read_text().count(head) == 1
    table.write_text(table.read_text().replace(head, f"{head}\n{line}"))
    (copy / "src" / "graft" / "methods" / "toy.py").write_text(TOY.text)
    (copy / "tests" / "samples" / "toy.py").write_text(SAMPLES.text)
    return copy


def run(repository, *arguments: str) -> str:
    paths = os.pathsep.join([str(repository / "src"), str(repository)])
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=repository, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_the_files_are_named_as_the_page_says():
    assert all(name in PAGE.read_text() for name in ("`src/graft/methods/toy.py`", "`tests/samples/toy.py`"))


def test_the_second_example_is_a_part_of_its_file():
    (name,) = re.findall(r"From `(\S+)`:", PAGE.read_text())
    text = without_docstrings((ROOT / name).read_text())
    assert [part for part in EXCERPT.text.rstrip().split(":\n", 1)[1].split("\n\n") if part not in text] == []


def without_docstrings(text):
    """Return the text of a module without the docstrings of its functions, which the page leaves out."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines[docstring.lineno - 1 : docstring.end_lineno] = [None] * (docstring.end_lineno - docstring.lineno + 1)
    return "\n".join(line for line in lines if line is not None)


@pytest.mark.slow
def test_a_file_and_a_line_make_a_method(repository):
    assert lines(run(repository, "-c", USE.text)) == lines(USE.printed or "")
    names = "import graft; print(graft.ToyModel.__name__, graft.PeftType.TOY.value, graft.method_of('TOY').__module__)"
    assert run(repository, "-c", names) == "ToyModel TOY graft.methods.toy\n"


@pytest.mark.slow
def test_what_the_page_asks_for_passes_the_tests_of_all_methods(repository):
    """The laws of single layers, and what tests of pages, of PEFT's names and of whole models ask of each method."""
    assert "pytest tests/conformance -k TOY" in PAGE.read_text() and f"`{TABLES}`" in PAGE.read_text()
    run(repository, *TABLES.split()[1:])
    tests = [f"tests/{file}" for files in CHECKS for file in files.split()]
    chosen = " or ".join(f"(({parents(files)}) and ({which}))" for files, (which, _) in CHECKS.items())
    printed = run(repository, "-m", "pytest", "-p", "no:cacheprovider", *tests, "-vvk", chosen)
    passed = re.findall(r"^tests/(\S+?\.py)::.* PASSED", printed, re.M)
    for files, (_, least) in CHECKS.items():
        assert sum(file in files.split() for file in passed) >= least, (files, printed[-500:])


def parents(files: str) -> str:
    """Return what -k takes for tests in these files."""
    return " or ".join(f"({' and '.join(file.split('/'))})" for file in files.split())
