# SPDX-License-Identifier: Apache-2.0
"""The pages of the command show what it prints, and have a section for each verb."""

import pytest

from graft.files.lint import RULES
from tests.docs import command


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page, least", list(zip(command.PAGES, (4, 9, 6))), ids=lambda value: getattr(value, "stem", "")
)
def test_the_page_shows_what_is_printed(page, least, tmp_path):
    command.prepare(tmp_path)
    text = page.read_text()
    shown = {m["command"]: m["output"] for m in command.BLOCK.finditer(text)}
    assert len(shown) == len(command.BLOCK.findall(text)) >= least
    for line, output in shown.items():
        assert command.run(line, tmp_path) == output, line


def test_every_verb_and_every_rule_is_on_the_page():
    text = command.VERBS.read_text()
    own = {"inspect", "diff", "lint", "resize", "extract", "merge", "plan", "convert"}
    assert all(f"\n## {verb}" in text for verb in own)
    assert all(f"`{verb}`" in command.PAGE.read_text() for verb in own)
    assert all(f"| `{rule.name}` |" in command.REFERENCE.read_text() for rule in RULES)
