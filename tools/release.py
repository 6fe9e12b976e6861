# SPDX-License-Identifier: Apache-2.0
"""`make release`: check that the tree has one version and valid results of `make verify`; with `--tag`, tag it.

Nothing is uploaded.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tools import verify

ROOT = Path(__file__).parents[1]
HEADING = re.compile(r"^## \[(?P<name>[^\]]+)\](?: - (?P<date>\d{4}-\d\d-\d\d))?$", re.MULTILINE)


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def version(root: Path) -> str:
    """The one source of the version, read as text: graft need not be importable."""
    text = (root / "src" / "graft" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def sections(changelog: str) -> list[tuple[str, str | None, str]]:
    """(name, date, text) of each section, the newest first."""
    marks = [*HEADING.finditer(changelog)]
    ends = [mark.start() for mark in marks[1:]] + [len(changelog)]
    return [(mark["name"], mark["date"], changelog[mark.end() : end].strip()) for mark, end in zip(marks, ends)]


def problems(root: Path) -> list[str]:
    """What stands in the way of a release, each with the remedy."""
    number = version(root)
    found = []
    if changed := git(root, "status", "--porcelain"):
        found.append(f"the tree is not clean; commit or remove:\n{changed}")
    filled = [section for section in sections((root / "CHANGELOG.md").read_text()) if section[2]]
    name, date, _ = filled[0] if filled else ("nothing", None, "")
    if name != number:
        found.append(
            f"CHANGELOG.md begins with {name}, src/graft/__init__.py says {number}: give both the same version"
        )
    elif not date:
        found.append(f"CHANGELOG.md: [{number}] has no date; write '## [{number}] - YYYY-MM-DD'")
    if git(root, "tag", "--list", f"v{number}"):
        found.append(f"the tag v{number} exists: choose the next version")
    return found


def tag(root: Path) -> str:
    """Tag HEAD with the version; the message is its section of CHANGELOG.md."""
    name = f"v{version(root)}"
    text = next(text for _, _, text in sections((root / "CHANGELOG.md").read_text()) if text)
    git(root, "tag", "--annotate", name, "--cleanup=verbatim", "--message", f"{name}\n\n{text}\n")
    return name


def main(*arguments: str) -> None:
    if found := problems(ROOT) + verify.find_problems(ROOT):
        sys.exit("\n".join(f"- {problem}" for problem in found))
    if "--tag" in arguments:
        name = tag(ROOT)
        print(f"{name} is tagged here, and dist/ is built. To publish: git push origin {name}; twine upload dist/*")


if __name__ == "__main__":
    main(*sys.argv[1:])
