# SPDX-License-Identifier: Apache-2.0
"""The code of docs/storages.md, which `make test` only compiles."""

from tests.docs.blocks import ROOT, blocks
from tests.docs.test_blocks import test_the_code_of_a_page_runs as run_page

PAGE = ROOT / "docs" / "storages.md"


def test_the_code_of_the_page_runs():
    assert blocks(PAGE)[0].runs
    run_page(PAGE)
