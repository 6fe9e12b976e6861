# SPDX-License-Identifier: Apache-2.0
"""The base and the lines that README's first block makes."""

from tests.docs.blocks import ROOT, blocks

exec(blocks(ROOT / "README.md")[0].text, {})
