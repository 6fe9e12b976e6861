# SPDX-License-Identifier: Apache-2.0
"""README is short, and its picture shows the last run. tests/docs/test_blocks.py runs its examples."""

from graft.methods import ROWS
from tests.docs import readme

LONGEST = 560  # words, code and tables among them, as `wc -w` counts


def test_readme_is_short():
    assert len(readme.PAGE.read_text().split()) <= LONGEST


def test_its_first_sentence_counts_the_methods():
    text = readme.PAGE.read_text().replace("\n", " ")
    assert f"(LoRA and {len(ROWS) - 1} other methods)" in text


def test_table_and_picture_are_printed_from_the_code_and_a_run():
    for page, text in readme.pages().items():
        assert text == page.read_text(), "run python -m tests.docs.readme"
    assert len(readme.table().splitlines()) <= 2 + 13
