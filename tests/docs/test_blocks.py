# SPDX-License-Identifier: Apache-2.0
"""Every block of Python in README and docs/ runs, or says why it does not."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tests import fresh
from tests.docs.blocks import PAGES, ROOT, blocks

BLOCKS = [block for page in PAGES for block in blocks(page)]
RUNNING = [page for page in PAGES if any(block.runs for block in blocks(page))]
ELSEWHERE = Counter(  # blocks that do not run here by themselves: a page that adds one says so, and this list too
    {
        ("needs", "bitsandbytes"): 1,
        ("needs", "trl, datasets"): 1,
        ("needs", "trl, datasets, bitsandbytes"): 5,
        ("not run", "the loop is yours"): 1,
        ("run by", "tests/distributed/recipes.py"): 8,
        ("run by", "tests/docs/test_add_a_method.py"): 4,
    }
)


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page):
    """In a process of its own: pages install aliases and process groups."""
    done = fresh.run("-m", "tests.docs.run", page, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith(f"{sum(block.runs for block in blocks(page))} blocks ran\n")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.where)
def test_a_block_is_python(block):
    compile(block.text, block.where, "exec")


def test_blocks_that_do_not_run_here_are_counted():
    assert Counter((block.mark, block.of) for block in BLOCKS if block.mark) == ELSEWHERE


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.mark == "run by"], ids=lambda block: block.where)
def test_the_test_that_runs_a_block_reads_its_page(block):
    assert block.page.name in (ROOT / block.of).read_text()


def test_no_block_is_overlooked():
    """What the pages show as Python in any form: in lists, with other fences, of other names."""
    for page in PAGES:
        shown = re.findall(r"^[ >]*(?:`{3,}|~{3,}) ?\{?\.?(?:python|py|pycon)\b", page.read_text(), re.M | re.I)
        assert len(shown) == len(blocks(page)), page
