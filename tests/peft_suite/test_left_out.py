# SPDX-License-Identifier: Apache-2.0
"""The list of PEFT's tests that do not count: it can be read, and says only what the documentation says, too."""

from collections import Counter
from datetime import date
from pathlib import Path

from tests.docs import peft_suite
from tests.peft_suite import results
from tests.peft_suite.results import Found, Line

ROOT = Path(__file__).parents[2]


def test_every_line_has_a_reason_and_names_a_test_once():
    found = results.lines()
    assert {line.part for line in found} == {"differs", "inside", "fails"}
    assert all(line.reason and line.tests.startswith("test_") and "::" in line.tests for line in found)
    assert len({line.tests for line in found}) == len(found)


def test_what_differs_on_purpose_stands_in_the_lists_of_differences():
    said = "".join((ROOT / "docs" / name).read_text() for name in ("differences.md", "peft_defects.md")).replace(
        "\n", " "
    )
    reasons = {line.reason for line in results.lines() if line.part == "differs"}
    assert not [reason for reason in reasons if reason not in said]


def test_a_line_names_parameters_or_all_of_them():
    line = Line("inside", "", "test_a.py::TestA::test_*[LoraConfig-*-x]").names()
    assert line.fullmatch("test_a.py::TestA::test_b[LoraConfig-2-x]")
    assert not line.fullmatch("test_a.py::TestA::test_b[LoraConfig-2-y]")
    whole = Line("inside", "", "test_a.py::TestA::test_b").names()
    assert whole.fullmatch("test_a.py::TestA::test_b") and whole.fullmatch("test_a.py::TestA::test_b[1]")
    assert not whole.fullmatch("test_a.py::TestA::test_bc")


def test_the_page_says_what_the_last_run_gave():
    assert peft_suite.page() == peft_suite.PAGE.read_text(), "run python -m tests.docs.peft_suite"


def test_a_run_is_kept_with_its_date(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "KEPT", tmp_path / "run.json")
    assert results.kept() is None and "No whole run" in results.sentences()
    results.record(Found(passed=1998, skipped=3, failed={"a": "why", "b": ""}, left_out=Counter(differs=4, fails=1)))
    run = results.kept()
    assert run is not None and run.date == date.today().isoformat()
    assert (run.counted, run.skipped, run.differs, run.inside, run.fails) == (2000, 3, 4, 0, 1)
    assert run.date in results.sentences() and "1,998 of the other 2,000: 99.9 %" in results.sentences()


def test_a_share_is_never_rounded_up():
    assert results.percent(9995, 10000) == "99.9 %" and results.percent(5, 5) == "100.0 %"
    assert Found(passed=999, failed={"a": ""}).good and not Found(passed=998, failed={"a": "", "b": ""}).good
