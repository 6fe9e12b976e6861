# SPDX-License-Identifier: Apache-2.0
"""Each row of docs/peft_defects.md has the test that is marked with its case, and each marked test is one that runs."""

from collections import Counter
from functools import cache
from pathlib import Path

import peft
import pytest

from tests.docs import defects

CHECKS = (
    "distributed/checks.py",
    "distributed/pipeline.py",
    "distributed/sharded_bases.py",
    "distributed/tensor_parallel.py",
)  # of several processes


@cache
def rows() -> list[defects.Row]:
    return list(defects.rows())


def test_the_page_is_printed_from_the_tests():
    assert defects.page(rows()) == defects.PAGE.read_text(), "run python -m tests.docs.defects"


def test_the_page_names_the_version_that_the_tests_run_beside():
    assert defects.PAGE.read_text().startswith(f"# Defects of PEFT {peft.__version__}\n")


def test_each_row_is_said_once():
    assert {case: n for case, n in Counter(row.case for row in rows()).items() if n > 1} == {}


def test_each_mark_is_on_what_runs():
    assert [row for row in rows() if not row.test.startswith("test_") and row.file not in CHECKS] == []
    assert all(row.case and row.peft and row.graft and "\n" not in row.line for row in rows())


FILES = {
    "both.py": "import peft\n\n\ndef theirs():\n    return peft.LoraConfig()\n",
    "test_it.py": """
import pytest
from tests.both import theirs

@pytest.fixture
def made():
    return theirs()

def plain():
    return 3

@pytest.mark.differs("a|b", peft="wrong", graft="right", why="it matters")
def test_one(made):
    assert made

@pytest.mark.differs("c|d")
def test_other():
    assert plain()
""",
}
PAGE = r"| c\|d | silent | told |"


def test_a_mark_becomes_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tests").mkdir()
    for name, text in FILES.items():
        (tmp_path / "tests" / name).write_text(text)
    (tmp_path / "page.md").write_text(PAGE)
    monkeypatch.setattr(defects, "ROOT", tmp_path)
    monkeypatch.setattr(defects, "PAGE", tmp_path / "page.md")
    one, other = defects.rows()
    assert one.runs_peft and not other.runs_peft
    assert one.line == r"| a\|b | wrong | right. It matters | `test_it.py` one * |"
    assert other.line == r"| c\|d | silent | told | `test_it.py` other |"
    (tmp_path / "page.md").write_text(PAGE.replace("c", "e"))
    with pytest.raises(KeyError, match=r"page.md has no row `\| c"):
        list(defects.rows())
