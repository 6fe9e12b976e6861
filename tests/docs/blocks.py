# SPDX-License-Identifier: Apache-2.0
"""The code blocks of the documentation, and what their pages say about running them.

A block of Python runs after those before it on its page, in one namespace. A comment on the line before it says
otherwise:

    <!-- needs: trl -->                         runs where that package is installed; elsewhere it is only compiled
    <!-- run by tests/distributed/recipes.py --> another test takes it from the page
    <!-- not run: a GPU -->                     only compiled

A block of text that follows, at once or after a line that ends with a colon, is what the block prints.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?:<!-- (?P<mark>[^>]*?) -->\n)?^```(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^```$", re.M | re.S)
PRINTED = re.compile(r"\n+(?:[^\n`]*:\n+)?```text\n(.*?)^```$", re.M | re.S)
MARKS = re.compile(r"(needs|run by|not run):? (.+)")


class Block(NamedTuple):
    page: Path
    line: int  # of its first line of code, from 1
    kind: str
    text: str
    mark: str = ""  # needs, run by, not run; or none
    of: str = ""  # the package, the test, the reason
    printed: str | None = None

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        return not self.mark or (self.mark == "needs" and all(find_spec(name) for name in self.of.split(", ")))


def blocks(page: Path, kind: str = "python") -> list[Block]:
    """The blocks of one language on a page, in order."""
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        if match["kind"] != kind:
            continue
        mark = MARKS.fullmatch(match["mark"] or "")
        printed = PRINTED.match(text, match.end())
        line = text.count("\n", 0, match.start("text")) + 1
        marked = mark.groups() if mark else ("", "")
        found.append(Block(page, line, kind, match["text"], *marked, printed[1] if printed else None))
    return found


def named(page: Path) -> str:
    """The name of a page among preludes: README, serving, reference_models."""
    return "_".join(page.relative_to(ROOT / "docs" if "docs" in page.parts else ROOT).with_suffix("").parts)
