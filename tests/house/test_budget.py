# SPDX-License-Identifier: Apache-2.0
"""No room of the house grows without a word in tests/house/budget.toml."""

import pytest

pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")

from tests.house.budget import PACKAGE, excesses, files_of_room, read_limits
from tests.house.counts import SourceFile, count_hard_turns, is_participle


def test_no_room_grows():
    assert not excesses(), "shrink the room again, or raise the limit in tests/house/budget.toml and say why"


def test_each_file_stands_in_one_room():
    rooms = [room for name, room in read_limits().items() if name not in ("spine", "house")]
    files = [file for room in rooms for file in files_of_room(room)]
    assert sorted(files) == sorted(PACKAGE.rglob("*.py"))


def test_lines_of_code_leave_out_texts_about_it(tmp_path):
    path = tmp_path / "a.py"
    path.write_text('"""A\nB"""\n\n# c\nx = """1\n2"""  # d\n\n\ndef f():\n    """E."""\n    return x\n')
    assert SourceFile(path).count_lines() == 4


@pytest.mark.parametrize("name", ["given_names", "found", "stored", "_kept", "told"])
def test_participles_are_told(name):
    assert is_participle(name)


@pytest.mark.parametrize("name", ["load_adapter", "embed", "fold_weights", "is_merged", "speed"])
def test_verbs_and_nouns_are_no_participles(name):
    assert not is_participle(name)


def test_hard_turns_of_sentences():
    assert count_hard_turns("Return what the layer holds, of which one stands beside it.") == 3
    assert count_hard_turns("Return the weight. What does it cost?") == 0
    assert count_hard_turns("word " * 31) == 1
