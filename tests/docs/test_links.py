# SPDX-License-Identifier: Apache-2.0
"""What the pages point to exists: files, headings, make's targets, modules to run."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, ROOT

LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s#]*)(?:#([^)\s]+))?\)")
TARGETS = set(re.findall(r"^([a-z][\w-]*)(?=[:%])", (ROOT / "Makefile").read_text(), re.M))
READ = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "tests" / "README.md"]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub and the site make them: small letters, no punctuation, hyphens for blanks."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", READ, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(prose(page)):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor and target.suffix == ".md":
            assert anchor in {re.sub("-+", "-", a) for a in anchors(target)} | anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("page", READ, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page):
    text = page.read_text()
    for target in re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.M):
        assert target in TARGETS, f"make {target}"
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert module == "pytest" or find_spec(module), f"python -m {module}"
    for path in re.findall(r"`(tests/[\w/.]+|src/graft/[\w/.]+)`", text):
        new = page.name == "add_a_method.md" and path.endswith("/toy.py")
        assert new or (ROOT / path).exists(), path
