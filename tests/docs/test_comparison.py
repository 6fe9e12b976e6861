# SPDX-License-Identifier: Apache-2.0
"""The measured part of docs/methods.md and its picture show the run in examples/compare/results.json."""

import json

import pytest

from tests.docs import comparison


def test_the_numbers_of_the_page_are_those_of_the_run():
    assert comparison.page() == comparison.PAGE.read_text(), "run python -m tests.docs.comparison FILE"


def test_the_picture_was_drawn_from_the_run():
    assert comparison.digest().encode() in comparison.PICTURE.read_bytes(), "run python -m tests.docs.comparison FILE"


@pytest.fixture
def copies(tmp_path, monkeypatch):
    for name in ("PAGE", "PICTURE", "RESULTS"):
        path = getattr(comparison, name)
        monkeypatch.setattr(comparison, name, tmp_path / path.name)
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def run(folder, settings, **exact):
    held = json.loads(comparison.RESULTS.read_text())
    held["settings"] |= settings
    held["methods"] = {name: held["methods"]["LoRA"] | {"exact": p} for name, p in exact.items()}
    path = folder / "new.json"
    path.write_text(json.dumps(held))
    return str(path)


def test_a_new_run_changes_page_and_picture(copies):
    comparison.main(run(copies, {}, LoRA=0.5, DoRA=0.63, KaSA=0.65, MiCA=0.35))
    text = comparison.PAGE.read_text()
    assert "from LoRA's 0.50, above: KaSA; below: MiCA." in text and "This run lacks: rsLoRA, PiSSA" in text
    assert comparison.digest().encode() in comparison.PICTURE.read_bytes() and comparison.page() == text


def test_a_run_of_other_settings_is_refused(copies):
    before = comparison.PAGE.read_text()
    with pytest.raises(SystemExit, match="the page shows"):
        comparison.main(run(copies, {"steps": 3}, LoRA=0.5))
    assert comparison.PAGE.read_text() == before
