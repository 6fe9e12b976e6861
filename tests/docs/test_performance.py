# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md and docs/performance_rows.md show the run in benchmarks/results.json."""

import itertools
import json

import pytest

from benchmarks import results
from benchmarks.rows import BENCHES
from tests.docs import performance, readme


def test_the_numbers_of_the_page_are_those_of_the_run():
    for page, text in performance.pages().items():
        assert text == page.read_text(), "run python -m tests.docs.performance"


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """Pages and the run, to write into."""
    names = {performance: ("PAGE", "ROWS"), readme: ("GLANCE", "BARS"), results: ("RESULTS",)}
    for module, name in ((module, name) for module, of_it in names.items() for name in of_it):
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


@pytest.mark.slow
def test_a_new_run_changes_pages_and_bars(copies):
    performance.main(run(copies, run="a later day"))
    assert "The run: a later day" in performance.PAGE.read_text()
    assert all("| 123 |" in page.read_text() for page in (performance.PAGE, performance.ROWS))
    assert "(123 ×)" in readme.GLANCE.read_text()
    assert all(text == page.read_text() for page, text in performance.pages().items())
    assert all(text == page.read_text() for page, text in readme.pages().items())


def test_a_run_of_some_rows_is_refused(copies):
    before = performance.PAGE.read_text()
    with pytest.raises(SystemExit, match="has not all rows"):
        performance.main(run(copies, whole=False))
    assert performance.PAGE.read_text() == before


def test_the_summary_counts_rows_beyond_noise():
    ratios = [2.0, 3.0, 1.05, 1.0, 0.97, 0.5, None]
    rows = [results.Found(f"row {x}", "s", {}, x, None, "", None) for x in ratios]
    said = performance.summary(results.Run("versions", "a day", True, rows))
    assert said.startswith("- graft is ahead in 3 of 6 rows, in half of these by 2.00 × or more.\n- 2 rows are equal")
    assert "\n- PEFT is ahead in 1: row 0.5 (0.50 ×).\n- The run: a day. versions." in said


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
