# SPDX-License-Identifier: Apache-2.0
"""Printed parts of a page: each between `<!-- its mark -->` and `<!-- end -->`."""

from __future__ import annotations

END = "<!-- end -->"


def put(text: str, mark: str, printed: str) -> str:
    """The text, with its marked part as it is printed now."""
    begin = f"<!-- {mark} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(END)
    assert found and closed, f"the page has no {begin} … {END}"
    return f"{before}{begin}\n{printed}\n{END}{after}"
