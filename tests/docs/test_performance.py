# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md and its picture show the run in benchmarks/results.json."""

import itertools
import json

import pytest

from benchmarks import results
from benchmarks.rows import BENCHES
from tests.docs import performance, readme


def test_the_numbers_of_the_page_are_those_of_the_run():
    assert performance.page() == performance.PAGE.read_text(), "run python -m tests.docs.performance"


def test_the_picture_was_drawn_from_the_run():
    assert results.digest().encode() in performance.PICTURE.read_bytes(), "run python -m tests.docs.performance"


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """Page, picture, README and run, to write into."""
    monkeypatch.setattr(performance, "PICTURE", tmp_path / "bench.png")
    for module, name in ((performance, "PAGE"), (readme, "PAGE"), (results, "RESULTS")):
        page = getattr(module, name)
        monkeypatch.setattr(module, name, tmp_path / page.name)
        (tmp_path / page.name).write_text(page.read_text())
    return tmp_path


def run(folder, **changes):
    held = json.loads((folder / "results.json").read_text()) | changes
    held["rows"] = [row | ({"faster": 123.0} if "10k modules" in row["what"] else {}) for row in held["rows"]]
    path = folder / "new.json"
    path.write_text(json.dumps(held))
    return str(path)


def test_a_new_run_changes_page_picture_and_readme(copies):
    performance.main(run(copies, run="a later day"))
    assert "The run: a later day" in performance.PAGE.read_text()
    assert "(123 ×)" in performance.PAGE.read_text() and "(123 ×)" in readme.PAGE.read_text()
    assert results.digest().encode() in performance.PICTURE.read_bytes()
    assert performance.page() == performance.PAGE.read_text() and readme.page() == readme.PAGE.read_text()


def test_a_run_of_some_rows_is_refused(copies):
    before = performance.PAGE.read_text()
    with pytest.raises(SystemExit, match="has not all rows"):
        performance.main(run(copies, whole=False))
    assert performance.PAGE.read_text() == before


def test_the_page_says_what_the_run_lacks_and_where_peft_is_ahead():
    rows = [
        results.Found(bench.what, "s", {}, faster, None, "", None)
        for bench, faster in zip(BENCHES, itertools.chain([0.994, 0.996, 0.5], itertools.repeat(2.0)))
    ]
    whole, part = (results.Run("", "", True, found) for found in (rows, rows[:-2]))
    assert performance.absent(whole) == "The run has all rows of the benchmark."
    assert performance.absent(part).startswith("The run lacks 2 rows") and "hotswap_adapter" in performance.absent(part)
    ahead = f"PEFT is ahead in 2 of {len(rows)} rows: {rows[0].what} (0.99 ×); {rows[2].what} (0.50 ×)."
    assert performance.behind(whole) == ahead
    assert performance.behind(results.Run("", "", True, rows[3:])) == "PEFT is ahead in no row."
