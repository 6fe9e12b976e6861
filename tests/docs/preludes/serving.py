# SPDX-License-Identifier: Apache-2.0
"""The folders that README's first three blocks make."""

import contextlib
import os

from tests.docs.blocks import ROOT, blocks

made: dict = {}
with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
    for block in blocks(ROOT / "README.md")[:3]:
        exec(block.text, made)
