# SPDX-License-Identifier: Apache-2.0
"""The base that README's first block makes."""

from tests.docs.blocks import ROOT, blocks

exec(blocks(ROOT / "README.md")[0].text, {})


def fresh(text: str) -> dict:
    """Drop PEFT's model before graft takes PEFT's place: no other program would hold one by then."""
    return {"theirs": None} if "install()" in text else {}
