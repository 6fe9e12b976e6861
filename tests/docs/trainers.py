# SPDX-License-Identifier: Apache-2.0
"""What the trainers' cases gave, printed into the pages that show it: `python -m tests.docs.trainers`."""

from __future__ import annotations

from pathlib import Path

from tests.docs.marks import put
from tests.trainers import results

DOCS = Path(__file__).parents[2] / "docs"
SHOWN = {"trainers.md": (results.figures, results.cases, results.tests)}


def pages() -> dict[Path, str]:
    """Return the pages with what was kept, by their paths."""
    mark = "printed by tests/docs/trainers.py"
    shown = {DOCS / name: "\n\n".join(table() for table in tables) for name, tables in SHOWN.items()}
    return {page: put(page.read_text(), mark, tables) for page, tables in shown.items()}


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
