# SPDX-License-Identifier: Apache-2.0
"""What a whole run of PEFT's tests gave, printed into its page: `python -m tests.docs.peft_suite`."""

from __future__ import annotations

from pathlib import Path

from tests.docs.marks import put
from tests.peft_suite.results import sentences

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"


def page() -> str:
    return put(PAGE.read_text(), "printed by tests/docs/peft_suite.py", sentences())


if __name__ == "__main__":
    PAGE.write_text(page())
