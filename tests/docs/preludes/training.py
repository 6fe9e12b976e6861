# SPDX-License-Identifier: Apache-2.0
"""The base, the tokenizer and the rows that the first two blocks of "First steps" make."""

import os

from tests.docs.blocks import ROOT, blocks

made: dict = {}
for block in blocks(ROOT / "docs" / "getting_started.md")[:2]:
    exec(block.text, made)
tokenizer, rows = made["tokenizer"], made["rows"]
os.environ["DISABLE_TQDM"] = "1"
