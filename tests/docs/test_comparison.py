# SPDX-License-Identifier: Apache-2.0
"""The measured parts of docs/reference/measurements.md and their pictures show the runs in examples/compare."""

import json

import pytest

from tests.docs import comparison


def test_the_numbers_of_the_page_are_those_of_the_run():
    assert comparison.page() == comparison.PAGE.read_text(), "run python -m tests.docs.comparison FILE"


def test_the_pictures_were_drawn_from_the_runs():
    for picture, file in ((comparison.PICTURE, comparison.RESULTS), (comparison.TEXTS_PICTURE, comparison.TEXTS)):
        assert comparison.digest(file).encode() in picture.read_bytes(), "run python -m tests.docs.comparison FILE"


@pytest.fixture
def copies(tmp_path, monkeypatch):
    for name in ("PAGE", "PICTURE", "RESULTS", "TEXTS", "TEXTS_PICTURE"):
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


def of_text(exact, spread=0.01):
    return dict(exact=exact, spread=spread, seeds=[0, 0, 0], lr=0.1, steps=96, cpu_seconds=9.6, note="r 4",
                bytes=40_000, parameters=1000)  # fmt: skip


def test_what_differs_from_lora_on_texts(copies):
    """Two standard errors of a difference are 2 · 0.01 · √(2/3) = 0.016; more for HRA, whose deviation is larger, and
    no less for MiSS, whose deviation is smaller than the median."""
    found = {"LoRA": of_text(0.5), "DoRA": of_text(0.517), "IA3": of_text(0.483), "VeRA": of_text(0.515),
             "HRA": of_text(0.4, 0.2), "MiSS": of_text(0.485, 0.001)}  # fmt: skip
    file = copies / "new" / "texts.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"topics": found, "spam": {"LoRA": of_text(0.9)}}))
    comparison.main(str(file))
    text = comparison.PAGE.read_text()
    assert "headlines: 4 of 6 methods are LoRA's equal within noise (0.500 ± 0.010; two standard errors" in text
    assert "are 0.016 as a rule). Above: DoRA; below: IA3." in text
    assert "| LoRA | r 4 | 0.500 ± 0.010 (0.1) | 0.900 ± 0.010 (0.1) | 100 ms | 40 kB | 1,000 |" in text
    assert "| DoRA | r 4 | 0.517 ± 0.010 (0.1) |  | 100 ms | 40 kB | 1,000 |" in text
    assert comparison.digest(comparison.TEXTS).encode() in comparison.TEXTS_PICTURE.read_bytes()
