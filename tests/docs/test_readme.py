# SPDX-License-Identifier: Apache-2.0
"""README is short, and its picture shows the last run. tests/docs/test_blocks.py runs its examples."""

from graft.methods import ROWS
from tests.docs import readme

LONGEST = 570  # words, code and tables among them, as `wc -w` counts
TASKS = {  # a page that does a task after README → its title there
    "getting_started": "First steps",
    "methods": "Which method",
    "serving": "Serving",
    "moving_from_peft": "From PEFT",
    "command": "The command",
}


def test_readme_is_short():
    assert len(readme.PAGE.read_text().split()) <= LONGEST


def test_five_tasks_take_half_an_hour_of_reading():
    _, _, pages = readme.PAGE.read_text().partition("## One page for each task")
    assert all(f"- [{title}](docs/{name}.md): " in pages for name, title in TASKS.items())
    texts = [readme.PAGE.read_text() + (readme.ROOT / "docs" / f"{name}.md").read_text() for name in TASKS]
    minutes = [len(text.split()) / 200 for text in texts]
    assert max(minutes) <= 7 and sum(minutes) <= 29


def test_its_first_sentence_counts_the_methods():
    text = readme.PAGE.read_text().replace("\n", " ")
    assert f"(LoRA and {len(ROWS) - 1} other methods)" in text


def test_table_and_picture_are_printed_from_the_code_and_a_run():
    for page, text in readme.pages().items():
        assert text == page.read_text(), "run python -m tests.docs.readme"
    assert len(readme.table().splitlines()) <= 2 + 13
