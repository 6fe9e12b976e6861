# SPDX-License-Identifier: Apache-2.0
"""Run the Python of one page in this process: `python -m tests.docs.run docs/serving.md`.

Names that a page takes for granted (`base`, `batch`, a folder of an adapter) come from `preludes/<page>.py`. If that
has a function `fresh`, what it returns for the text of a block is there anew for that block.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from tests.docs.blocks import Block, blocks, named


def run(page: Path) -> int:
    """Run what can run here, in an empty folder; return how many blocks did."""
    held: dict[str, Any] = {"__name__": "__main__"}
    prelude = Path(__file__).parent / "preludes" / f"{named(page)}.py"
    if prelude.exists():
        exec(compile(prelude.read_text(), prelude, "exec"), held)
    fresh = held.pop("fresh", lambda text: {})
    running = [block for block in blocks(page) if block.runs]
    for block in running:
        held |= fresh(block.text)
        follow(block, held)
    return len(running)


def follow(block: Block, held: dict[str, Any]) -> None:
    code = compile("\n" * (block.line - 1) + block.text, block.page, "exec")  # so that tracebacks name the page's line
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, held)
    if block.printed is not None and lines(printed.getvalue()) != lines(block.printed):
        raise AssertionError(f"{block.where} prints\n{printed.getvalue()}\nand the page says\n{block.printed}")


def lines(text: str) -> list[str]:
    """Return the lines of a text, without those of a Trainer's log."""
    kept = [line for line in text.splitlines() if not line.startswith("{'train_runtime'")]
    return [line.rstrip() for line in "\n".join(kept).strip("\n").splitlines()]


def main(name: str) -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    page = Path(name).resolve()
    os.environ |= {"COLUMNS": "100", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        ran = run(page)
        os.chdir(page.parent)
    print(f"{ran} blocks ran")


if __name__ == "__main__":
    main(sys.argv[1])
