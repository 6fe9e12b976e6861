# SPDX-License-Identifier: Apache-2.0
"""Links out of the documentation's folder: pages say `../README.md`, as GitHub shows it; the site needs an address."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\[([^\]\n]+)\]\((\.\./[^)\s]*)\)")


def find_address() -> str | None:
    """Return the address of the repository's files, by pyproject.toml; None if it has none."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    found = urls.get("Repository") or urls.get("Source")
    return f"{found.rstrip('/')}/blob/main" if found else None


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to files beside the documentation at the repository; without an address leave their text."""
    folder = posixpath.dirname(page.file.src_uri)

    def point(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if path.startswith("docs/"):
            return match[0]
        where = find_address()
        return f"[{text}]({where}/{path})" if where else text

    return LINK.sub(point, markdown)
