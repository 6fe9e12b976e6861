# SPDX-License-Identifier: Apache-2.0
"""Notebooks from the guides: `python -m examples.notebooks` writes examples/notebooks/*.ipynb, without outputs.

A line `# %%` begins a cell of code, `# %% [markdown]` one of text, whose lines are comments.
"""

import json
from pathlib import Path
from typing import Any

GUIDES = Path(__file__).with_name("guides")
NOTEBOOKS = Path(__file__).with_name("notebooks")
HELPERS = ("__init__", "start", "efficientnet")  # modules that guides import
FIRST = "import os\n\nos.chdir('../..')  # to the root of the repository: guides share code with the demos"


def scripts() -> list[Path]:
    return [path for path in sorted(GUIDES.glob("*.py")) if path.stem not in HELPERS]


def notebook(script: str) -> str:
    """Return the notebook of a script, as the text of its file."""
    _, *parts = script.split("# %%")  # what stands before the first cell is the licence
    cells = [made(part) for part in parts]
    cells.insert(1, cell("code", FIRST))  # after the title
    for number, one in enumerate(cells):
        one["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def made(part: str) -> dict[str, Any]:
    """Return the cell of what follows a `# %%`."""
    head, _, body = part.partition("\n")
    if head.strip() != "[markdown]":
        return cell("code", body.strip())
    return cell("markdown", "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()))


def cell(kind: str, source: str) -> dict[str, Any]:
    only_code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": "", "metadata": {}, "source": source.splitlines(keepends=True)} | only_code


def main() -> None:
    NOTEBOOKS.mkdir(exist_ok=True)
    for path in scripts():
        target = NOTEBOOKS / f"{path.stem}.ipynb"
        target.write_text(notebook(path.read_text("utf-8")), "utf-8")
        print(target)


if __name__ == "__main__":
    main()
