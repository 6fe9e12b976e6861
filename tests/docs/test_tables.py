# SPDX-License-Identifier: Apache-2.0
"""The pages say what the code does."""

from tests.docs import storages, tables


def test_the_tables_of_the_methods_page_are_printed_from_the_code():
    assert tables.page() == tables.PAGE.read_text(), "run python -m tests.docs.tables"


def test_the_tables_of_the_storages_page_are_printed_from_the_code():
    assert storages.page() == storages.PAGE.read_text(), "run python -m tests.docs.storages"
