# SPDX-License-Identifier: Apache-2.0
"""The pages say what the code does."""

from tests.docs import tables


def test_the_tables_of_the_methods_page_are_printed_from_the_code():
    assert tables.page() == tables.PAGE.read_text(), "run python -m tests.docs.tables"
