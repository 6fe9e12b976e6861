# SPDX-License-Identifier: Apache-2.0
"""`make verify` in a small repository: valid results, repeated runs, refusals; and the real table."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tools import release, verify
from tools.verify import Row, git

ROOT = Path(__file__).parents[1]
MAKEFILE = """
good:
	@echo "ran good" >> out/calls
	@echo "= 3 passed, 1 skipped in 0.1s ="
other:
	@echo "ran other" >> out/calls; echo done
idle:
	@echo "3 passed in 0.1s"; echo "2 skipped in 0.1s"
bad:
	@seq 1 30; echo "in $(CURDIR)"; exit 1
meddling:
	@echo x >> a/one.py
"""
ROWS = [
    Row("good", "good", "it is good", "a/**"), Row("other-x", "other", "it is other", "b/**"),
    Row("gpu", "bad", "it is fast", "a/**", needs="a GPU"),
]  # fmt: skip
BAD, MEDDLING = Row("bad", "bad", "it fails", "b/**"), Row("meddling", "meddling", "it writes", "b/**")


@pytest.fixture
def rows(monkeypatch):
    rows = [*ROWS]
    monkeypatch.setattr(verify, "list_rows", lambda root: rows)
    return rows


@pytest.fixture
def project(tmp_path, rows):
    for name in ("a", "b", "docs", "tests", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "Makefile").write_text(MAKEFILE)
    (tmp_path / ".gitignore").write_text("/out/\n")
    (tmp_path / "a" / "one.py").write_text("from tests.helper import x\n")
    (tmp_path / "b" / "two.py").write_text("")
    (tmp_path / "tests" / "helper.py").write_text("x = 1\n")
    git(tmp_path, "init", "--quiet")
    for name, value in (("user.name", "t"), ("user.email", "t@example.org")):
        git(tmp_path, "config", name, value)
    commit(tmp_path)
    return tmp_path


def commit(project):
    git(project, "add", ".")
    git(project, "commit", "--quiet", "--message", "all")


def change(project, name):
    (project / name).write_text("changed = True\n")
    commit(project)


def states(project):
    return {row.name: verify.judge(project, row) for row in verify.list_rows(project)}


def calls(project):
    path = project / "out" / "calls"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def cells(project, name):
    text = (project / verify.PAGE).read_text()
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_all_rows_run_once_and_stay_valid_in_later_commits(project):
    assert states(project) == {
        "good": ("never run", None),
        "other-x": ("never run", None),
        "gpu": ("needs a GPU", None),
    }
    first = git(project, "rev-parse", "HEAD")
    verify.main(root=project)
    assert calls(project) == ["ran good", "ran other"]
    commit(project)  # the results, as one brings them to another machine
    assert states(project) == {"good": ("valid", 0), "other-x": ("valid", 0), "gpu": ("needs a GPU", None)}
    result = json.loads((project / verify.RESULTS / "good.json").read_text())
    assert result["commit"] == first and result["says"] == "3 passed, 1 skipped in 0.1s" and result["last_lines"] == []
    assert re.fullmatch(r"3\.\d+\.\d+", result["versions"]["Python"]) and "cores" in result["versions"]["machine"]
    verify.main(root=project)
    assert len(calls(project)) == 2 and verify.find_problems(project) == []
    name, claim, state, changed, ran, *_ = cells(project, "good")
    assert (name, claim, state, changed) == ("good", "it is good", "valid", "0") and first[:8] in ran
    assert cells(project, "gpu")[2] == "**needs a GPU**"


def test_a_row_is_invalid_once_a_covered_file_changes(project):
    verify.main(root=project)
    change(project, "a/three.py")
    change(project, "a/one.py")
    assert states(project)["good"] == ("invalid", 2) and states(project)["other-x"] == ("valid", 0)
    verify.main("--print", root=project)
    assert cells(project, "good")[2:4] == ["**invalid**", "2"]
    (problem,) = verify.find_problems(project)
    assert "good (invalid)" in problem and "other-x" not in problem and "gpu" not in problem
    verify.main(root=project)
    assert calls(project) == ["ran good", "ran other", "ran good"] and states(project)["good"] == ("valid", 0)


WORDS = '"""%s"""  # %s\n\nx = 1  # %s\n\n\nclass A:\n    """%s"""\n\n    def f(self): "%s"; return """\n\n# %s\n"""\n'


def test_words_invalidate_the_rows_that_read_them_alone(project, rows):
    rows.append(Row("read", "good", "its words are good", "a/**", reads_words=True))
    (project / "a" / "one.py").write_text(WORDS % ("a", "b", "c", "d\n    # d\n", "é", "f"))
    commit(project)
    verify.main(root=project)
    (project / "a" / "one.py").write_text("\n# new\n" + WORDS % ("aa\n", "é", "", "x", "yy", "f"))
    commit(project)
    assert states(project)["good"] == ("valid", 0) and states(project)["read"] == ("invalid", 1)
    (project / "a" / "one.py").write_text(WORDS % ("a", "b", "c", "d", "e", "a comment no more"))
    commit(project)
    assert states(project)["good"] == ("invalid", 1)


CODES = [
    ("x = '''\n\n'''", "x = '''\n'''"),
    ("x = f'#{1}'", "x = f'#{2}'"),
    ("if x:\n    y = 2", "if x:\n    0\ny = 2"),
]


@pytest.mark.parametrize(("one", "other"), CODES)
def test_code_that_differs_is_never_taken_for_words(one, other):
    assert verify.strip_words(one) != verify.strip_words(other)


def test_a_module_that_a_covered_file_imports_counts(project):
    verify.main(root=project)
    change(project, "tests/helper.py")
    assert states(project)["good"] == ("invalid", 1) and states(project)["other-x"][0] == "valid"


def test_a_deleted_file_counts(project):
    verify.main(root=project)
    (project / "b" / "two.py").unlink()
    commit(project)
    assert states(project)["other-x"] == ("invalid", 1)


def test_a_result_of_an_unknown_commit_counts_by_its_files(project):
    """A rebase gives commits other names."""
    verify.main(root=project)
    path = project / verify.RESULTS / "good.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"commit": "f" * 40}))
    assert states(project)["good"] == ("valid", 0)
    change(project, "a/one.py")
    assert states(project)["good"] == ("invalid", None)


def test_a_row_that_fails_is_recorded_with_its_last_lines(project, rows):
    rows.insert(0, BAD)
    with pytest.raises(SystemExit) as left:
        verify.main(root=project)
    assert left.value.code.startswith("failed: bad")
    assert calls(project) == ["ran good", "ran other"], "the other rows run all the same"
    result = json.loads((project / verify.RESULTS / "bad.json").read_text())
    assert not result["passed"] and len(result["last_lines"]) == verify.KEPT_LINES
    assert "30" in result["last_lines"] and "in ." in result["last_lines"], "paths of the machine are left out"
    page = (project / verify.PAGE).read_text()
    assert "## bad failed" in page and "\nin .\n" in page and cells(project, "bad")[2] == "**failed**"
    assert states(project)["bad"] == ("failed", 0) and "bad (failed)" in verify.find_problems(project)[0]
    rows[0] = BAD._replace(target="good")
    verify.main(root=project)
    assert states(project)["bad"] == ("valid", 0), "a row that failed runs again"


def test_a_run_that_skips_all_its_tests_fails(project, rows):
    rows[:] = [BAD._replace(target="idle")]
    with pytest.raises(SystemExit):
        verify.main(root=project)
    assert (
        states(project)["bad"] == ("failed", 0) and cells(project, "bad")[-1] == "3 passed in 0.1s; 2 skipped in 0.1s"
    )
    change(project, "b/two.py")
    assert states(project)["bad"] == ("failed", 1)


def test_rows_by_name_run_although_they_are_valid(project, rows):
    verify.main(root=project)
    verify.main("other", root=project)
    assert calls(project)[2:] == ["ran other"]
    rows.append(Row("good-too", "bad", "it is better", "b/**"))
    verify.main("good", root=project)
    assert calls(project)[3:] == ["ran good"], "a name that a row has selects that row alone"
    with pytest.raises(SystemExit) as left:
        verify.main("good", "oth", "gpus", root=project)
    assert left.value.code == "no row oth, gpus; there are good, other-x, gpu, good-too"
    assert len(calls(project)) == 4


def test_invalid_leaves_valid_rows_out(project):
    verify.main("other", root=project)
    verify.main("--invalid", "good", "other", "gpu", root=project)
    assert calls(project) == ["ran other", "ran good"]


def test_a_stopped_run_goes_on(project, monkeypatch):
    plain = verify.run_row

    def stop(root, row):
        if row.name == "other-x":
            raise KeyboardInterrupt
        return plain(root, row)

    monkeypatch.setattr(verify, "run_row", stop)
    with pytest.raises(KeyboardInterrupt):
        verify.main(root=project)
    monkeypatch.setattr(verify, "run_row", plain)
    commit(project)
    verify.main(root=project)
    assert calls(project) == ["ran good", "ran other"]


def test_a_tree_with_changes_is_refused(project):
    (project / "b" / "new.py").write_text("")
    with pytest.raises(SystemExit) as left:
        verify.main(root=project)
    assert "b/new.py" in left.value.code and calls(project) == []


def test_a_tree_that_changes_meanwhile_is_not_recorded(project, rows):
    rows[:] = [MEDDLING]
    with pytest.raises(SystemExit) as left:
        verify.main(root=project)
    assert "meddling is not recorded" in left.value.code and "a/one.py" in left.value.code
    assert states(project)["meddling"] == ("never run", None)


def test_a_release_refuses_rows_without_a_valid_result(project, monkeypatch):
    monkeypatch.setattr(release, "ROOT", project)
    monkeypatch.setattr(release, "problems", lambda root: [])
    with pytest.raises(SystemExit) as left:
        release.main()
    assert "good (never run), other-x (never run)" in left.value.code
    verify.main(root=project)
    release.main()
    with pytest.raises(SystemExit):  # of a row that needs something, on a machine without it
        verify.main("gpu", root=project)
    release.main()


# the real table


def targets():
    return set(re.findall(r"^([a-z][a-z0-9-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_each_target_of_make_is_for_people_or_in_a_row():
    rows = verify.list_rows(ROOT)
    names = {row.target.split()[0] for row in rows}
    patterns = {"test-storages", "test-trainers"}
    assert {name for name in names if not name.startswith(tuple(patterns))} <= targets()
    others = {"help", "verify", "release", "clean", "compare", "compare-texts", "rates"}  # they make something
    assert targets() - names - patterns - {"quick", "test", "check"} - others == set()
    assert len({row.name for row in rows}) == len(rows)


def test_each_glob_of_a_row_names_files_that_are_there():
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    for row in verify.list_rows(ROOT):
        for glob in row.covers.split():
            assert git(ROOT, "ls-files", "--", f":(glob){glob}"), f"{row.name}: {glob}"
        assert set(verify.list_covered_files(ROOT, row)) & {"src/graft/__init__.py", "tests/oracles/__main__.py"}


def test_imports_of_tests_are_covered():
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    rows = {row.name: set(verify.list_covered_files(ROOT, row)) for row in verify.list_rows(ROOT)}
    assert {"tests/models.py", "tests/conformance/samples.py", "tests/samples/lora.py"} <= rows["device"]
    assert {"tests/trust/good.py", "tests/trust/damage.py"} <= rows["fuzz"]
    assert "tests/device/test_waits.py" not in rows["fuzz"] and "docs/verified.md" not in rows["docs"]


def test_the_page_has_each_row_and_each_result():
    page = (ROOT / verify.PAGE).read_text()
    named = re.findall(r"^\| ([a-z0-9_-]+) \|.*$", page, re.M)[1:]
    assert named == [row.name for row in verify.list_rows(ROOT)], "`make verify ROWS=--print` writes the page"
    for row in verify.list_rows(ROOT):
        result = verify.read_result(ROOT, row)
        if result is not None:
            assert f"{result['date']}, `{result['commit'][:8]}`" in page


def test_the_list_of_rows(capsys):
    verify.main("--list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [row.name for row in verify.list_rows(ROOT)]


def test_help_names_the_targets_for_people():
    said = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^make ([\w-]+)", said, re.M) == ["quick", "test", "check", "verify"]
