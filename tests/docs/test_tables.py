# SPDX-License-Identifier: Apache-2.0
"""The pages say what the code does."""

import re

import pytest

from graft.methods import ROWS
from tests.docs import storages, tables


@pytest.mark.parametrize("path", [tables.PAGE, tables.MEASUREMENTS, tables.CONFIGS], ids=lambda path: path.name)
def test_what_pages_say_of_each_method_is_printed_from_the_code(path):
    assert path.read_text() == tables.pages()[path], "run python -m tests.docs.tables"


def test_the_tables_of_storages_are_printed_from_the_code():
    for page, text in storages.pages().items():
        assert text == page.read_text(), "run python -m tests.docs.storages"


def test_the_list_of_methods_names_each_config_once():
    _, _, part = tables.PAGE.read_text().partition("## All methods, with configs and papers")
    named = re.findall(r"^\| [^|]+ \| `(\w+)` \|", part, re.MULTILINE)
    assert sorted(named) == sorted(row.config for row in ROWS.values())


def test_methods_of_the_core_are_peft_s_that_merge():
    """By the table on the page, which the test above compares with the code."""
    lines = re.findall(r"^\| `\w+Config` \| (?:core|extra|experimental) \|.*$", tables.PAGE.read_text(), re.M)
    rows = [dict(zip(tables.HEAD, (cell.strip() for cell in line.strip("|").split("|")))) for line in lines]
    assert len(rows) == len(tables.single())
    for row in rows:
        assert (row["tier"] == "core") == (row["PEFT's"] == "yes" and row["merges"] == "yes"), row["config"]
