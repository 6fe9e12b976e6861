# SPDX-License-Identifier: Apache-2.0
"""docs/command.md shows what the command prints, and has a section for each verb."""

import pytest

from graft.command.app import VERBS
from graft.files.lint import RULES
from tests.docs import command


@pytest.mark.filterwarnings("ignore")
def test_the_page_shows_what_is_printed(tmp_path):
    command.prepare(tmp_path)
    text = command.PAGE.read_text()
    shown = {m["command"]: m["output"] for m in command.BLOCK.finditer(text)}
    assert len(shown) == len(command.BLOCK.findall(text)) >= len(VERBS)
    for line, output in shown.items():
        assert command.run(line, tmp_path) == output, line


def test_every_verb_and_every_rule_is_on_the_page():
    text = command.PAGE.read_text()
    own = {"inspect", "diff", "lint", "resize", "extract"}
    assert all(f"\n## {verb}" in text for verb in own & {*VERBS})
    assert all(f"| `{rule.name}` |" in text for rule in RULES)
