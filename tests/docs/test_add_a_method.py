# SPDX-License-Identifier: Apache-2.0
"""docs/add_a_method.md, followed in a copy of the repository: a file, a line, and everything else is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.docs.blocks import ROOT, blocks
from tests.docs.run import lines

PAGE = ROOT / "docs" / "add_a_method.md"
TOY, USE, SAMPLES = blocks(PAGE)
LAWS = "TOY and (linear or embedding)"  # a part of what the page runs


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy with the page's method in it."""
    copy = tmp_path_factory.mktemp("repository")
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", copy)
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
        command, cwd=repository, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_the_files_are_named_as_the_page_says():
    assert all(name in PAGE.read_text() for name in ("`src/graft/methods/toy.py`", "`tests/samples/toy.py`"))


def test_a_file_and_a_line_make_a_method(repository):
    assert lines(run(repository, "-c", USE.text)) == lines(USE.printed or "")
    names = "import graft; print(graft.ToyModel.__name__, graft.PeftType.TOY.value, graft.method_of('TOY').__module__)"
    assert run(repository, "-c", names) == "ToyModel TOY graft.methods.toy\n"


def test_a_file_of_samples_brings_the_laws(repository):
    """Those of single layers, as `pytest tests/conformance -k TOY` runs them."""
    assert "pytest tests/conformance -k TOY" in PAGE.read_text()
    printed = run(repository, "-m", "pytest", "-p", "no:cacheprovider", "tests/conformance/test_matrix.py", "-vk", LAWS)
    passed = re.search(r"(\d+) passed", printed)
    assert passed and int(passed[1]) > 20, printed[-500:]
