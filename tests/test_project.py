# SPDX-License-Identifier: Apache-2.0
"""What the project's own files say of each other: versions, commands, releases."""

import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import graft
from tools import dist, release, verify

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):(?!=)", MAKEFILE, re.MULTILINE))


def text_of(name):
    return (ROOT / name).read_text()


def lower_bounds():
    """Package → lower bound, of all that graft itself and the extras for users name."""
    pyproject = text_of("pyproject.toml").split("\ndemo =")[0].split("quantized =")[0]
    return dict(re.findall(r'"([A-Za-z_-]+)>=([\d.]+)', pyproject.split("dependencies = [")[1]))


def same(a, b):
    """Return True if two versions are one: 13 is 13.0.0."""
    a, b = ([*map(int, v.split("."))] for v in (a, b))
    width = max(len(a), len(b))
    return a + [0] * (width - len(a)) == b + [0] * (width - len(b))


def test_oldest_versions_are_the_lower_bounds():
    bounds, pins = lower_bounds(), dict(re.findall(r"^([\w-]+)==([\d.]+)$", text_of("tests/versions/oldest.txt"), re.M))
    assert {"torch", "transformers", "safetensors", "huggingface_hub", "numpy"} <= bounds.keys()
    assert bounds.keys() <= pins.keys()
    different = {name: (bounds[name], pins[name]) for name in bounds if not same(bounds[name], pins[name])}
    assert different == {}


def test_one_version():
    assert graft.__version__ == release.version(ROOT) == version("graft-adapters")
    name, date, _ = next(section for section in release.sections(text_of("CHANGELOG.md")) if section[2])
    assert name == ("Unreleased" if date is None else graft.__version__)


def commands():
    """Every target that a file of the project has make run."""
    workflow = yaml.safe_load(text_of(".github/workflows/ci.yml"))
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    matrix = workflow["jobs"]["make"]["strategy"]["matrix"]["target"]
    yield from (("ci.yml", target) for target in matrix)
    for name, text in [("ci.yml", "\n".join(runs)), *((n, text_of(n)) for n in (".ci/run", "CONTRIBUTING.md"))]:
        yield from ((name, target) for target in re.findall(r"(?:^|`)make ([a-z][a-z0-9-]*)", text, re.MULTILINE))


def test_every_command_is_a_target():
    said = list(commands())
    assert {name for name, _ in said} == {"ci.yml", ".ci/run", "CONTRIBUTING.md"}
    assert [(name, target) for name, target in said if target not in TARGETS] == []


def test_the_map_of_tests_has_each_folder():
    packages = {path.name for path in (ROOT / "src" / "graft").iterdir()} | {"optim"}
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/*.py")}
    linked = set(re.findall(r"\]\((\w+)[)/]", text_of("tests/README.md")))
    assert folders - packages <= linked and linked <= folders
    assert len(text_of("tests/README.md").splitlines()) <= 50, "one screen"


def test_hosted_ci_covers_what_pyproject_promises():
    jobs = yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"]
    cells = [cell for job in ("test", "oldest") for cell in jobs[job]["strategy"]["matrix"]["include"]]
    promised = set(re.findall(r'Python :: (3\.\d+)"', text_of("pyproject.toml")))
    assert {cell["python"] for cell in cells} == promised
    assert {cell["versions"] for cell in cells} == {path.stem for path in (ROOT / "tests" / "versions").glob("*.txt")}
    names = re.search(r'ROWS="--invalid ([a-z ]+)"', text_of(".ci/run"))[1].split()
    local = {
        row.target.removesuffix(f"-{row.name.partition('-')[2]}") for row in verify.select(verify.list_rows(), names)
    }
    assert local - {"test-slow"} == set(jobs["make"]["strategy"]["matrix"]["target"]) - {"check"}


def test_hooks_are_those_of_make_check():
    hooks = yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    recipe = MAKEFILE.split("\ncheck:")[1].split("\n\n")[0].replace("$(BIN)", ".venv/bin")
    wanted = {" ".join(line.split()[:2]) for line in recipe.splitlines()[1:]}
    assert {" ".join(hook["entry"].split()[:2]) for hook in hooks} == wanted
    assert {hook["language"] for hook in hooks} == {"system"}


# releases


@pytest.fixture
def project(tmp_path):
    """A repository that may be released as 1.2.0."""
    source = tmp_path / "src" / "graft"
    source.mkdir(parents=True)
    (source / "__init__.py").write_text('"""A package."""\n__version__ = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2026-01-31\n\n### Added\n\n- A thing.\n\n"
        "## [1.1.0] - 2025-01-31\n\n- Old.\n"
    )
    release.git(tmp_path, "init", "--quiet")
    for name, value in (("user.name", "t"), ("user.email", "t@example.org")):
        release.git(tmp_path, "config", name, value)
    commit(tmp_path)
    return tmp_path


def commit(project):
    release.git(project, "add", ".")
    release.git(project, "commit", "--quiet", "--message", "all")


def test_a_release_that_may_be(project):
    assert release.problems(project) == []
    assert release.tag(project) == "v1.2.0"
    message = release.git(project, "tag", "--list", "--format=%(contents)", "v1.2.0")
    assert message == "v1.2.0\n\n### Added\n\n- A thing."


def edit(name, old, new):
    def change(project):
        path = project / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        commit(project)

    return change


@pytest.mark.parametrize("change, text", [
    (lambda project: (project / "new.txt").write_text(""), r"the tree is not clean.*\n\?\? new\.txt"),
    (edit("src/graft/__init__.py", "1.2.0", "1.3.0"), r"begins with 1\.2\.0, src/graft/__init__\.py says 1\.3\.0"),
    (edit("CHANGELOG.md", "[Unreleased]\n", "[Unreleased]\n\n- Later.\n"), "begins with Unreleased"),
    (edit("CHANGELOG.md", " - 2026-01-31", ""), r"\[1\.2\.0\] has no date"),
    (release.tag, r"the tag v1\.2\.0 exists"),
], ids=["uncommitted", "version", "unreleased", "date", "tag"])  # fmt: skip
def test_a_release_that_may_not_be(project, change, text):
    change(project)
    (problem,) = release.problems(project)
    assert re.search(text, problem)


# distributions


def wheel_of(folder, files):
    path = folder / "graft_adapters-1.2.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("graft_adapters-1.2.0.dist-info/METADATA", "")
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_the_contents_of_a_wheel(tmp_path):
    wanted = dist.source_files()
    assert {"graft/__init__.py", "graft/py.typed", "graft/methods/lora/dora.py"} <= wanted.keys()
    assert dist.wheel_problems(wheel_of(tmp_path, wanted), wanted) == []
    other = {**wanted, "tests/test_x.py": b"", "graft/core/layer.py": b"old"}
    del other["graft/py.typed"]
    lacks, has, differs = dist.wheel_problems(wheel_of(tmp_path, other), wanted)
    assert lacks.endswith("lacks graft/py.typed") and "has tests/test_x.py" in has and "graft/core/layer.py" in differs


def test_the_contents_of_a_source_distribution(tmp_path):
    path, present = tmp_path / "graft_adapters-1.2.0.tar.gz", [name for name in dist.IN_SDIST if name != "docs"]
    with tarfile.open(path, "w:gz") as archive:
        for name in [*present, "src/graft/__init__.py"]:
            archive.addfile(tarfile.TarInfo(f"graft_adapters-1.2.0/{name}"))
    wanted = {"graft/__init__.py": b"", "graft/py.typed": b""}
    assert dist.sdist_problems(path, wanted) == [f"{path.name} lacks docs", f"{path.name} lacks src/graft/py.typed"]


def test_the_smoke_test_refuses_the_source_tree():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "smoke.py"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 1 and "not from what was installed" in done.stderr


def test_actions_are_pinned_by_digest():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    used = re.findall(r"uses: (\S+)", text)
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in used)
