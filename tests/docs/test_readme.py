# SPDX-License-Identifier: Apache-2.0
"""README: short, its example runs and prints what stands below it, its table is that of the last run."""

import os
import re
import sys

from graft.methods import IN_PEFT, ROWS
from tests import fresh
from tests.docs import readme

LONGEST = 760  # words, code and tables among them, as `wc -w` counts


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", readme.PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_readme_is_short():
    assert len(readme.PAGE.read_text().split()) <= LONGEST


def test_its_first_sentence_counts_the_methods():
    said = f"LoRA, PEFT's {len(IN_PEFT) - 1} other methods, and {len(ROWS) - len(IN_PEFT)} more"
    assert said in readme.PAGE.read_text().replace("\n", " ")


def test_the_table_is_printed_from_the_code_and_a_run():
    for page, text in readme.pages().items():
        assert text == page.read_text(), "run python -m tests.docs.readme"
    assert len(readme.table().splitlines()) <= 2 + 13


def test_the_example_prints_what_stands_below_it(tmp_path):
    (code,), (printed,) = blocks("python"), blocks("text")
    (tmp_path / "example.py").write_text(code)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = fresh.run("example.py", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed
