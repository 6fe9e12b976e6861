# SPDX-License-Identifier: Apache-2.0
"""`make verify`: run every suite that `make test` leaves out, row by row, and keep the results in tests/verified.

    make verify                      all rows without a valid result, in order; stop it and call it again at any time
    make verify ROWS="slow clients"  these rows, even if they are valid; "storages" names storages-hqq and its like
    make verify ROWS="--invalid slow clients"  those of them that are not valid
    make verify ROWS=--print         print docs/verified.md anew

A row's result has the commit, the date, the seconds and the versions. It stays valid until a file that the row covers
changes, on any machine: commit tests/verified and docs/verified.md. `make release` refuses rows that are not valid.
A changed docstring or comment of a module changes the rows that read docstrings alone: `docs`, `docs-look` and `dist`.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import re
import shlex
import subprocess
import sys
import time
import tokenize
from contextlib import suppress
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = "tests/verified", "docs/verified.md"
NEVER_COVERED = tuple(f":(exclude){path}" for path in (RESULTS, PAGE, "tests/peft_suite/run.json"))  # runs write them
VERSIONS = """
import importlib.metadata, json, os, platform
names = {d.name: d.version for d in importlib.metadata.distributions() if d.name in ("torch", "transformers", "peft")}
machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
print(json.dumps({"Python": platform.python_version(), **dict(sorted(names.items())), "machine": machine}))
"""  # run by a row's own Python
IMPORT = re.compile(
    r"^\s*(?:from|import) ((?:tests|examples|benchmarks|tools)(?:\.\w+)*)(?:(?= import \(?([\w\s,]+)))?", re.M
)
KEPT_LINES = 20  # of the output of a row that failed

SOURCE = "src/graft/** pyproject.toml"
LIBRARY = f"{SOURCE} tests/conftest.py tests/samples/*.py"  # each run of pytest reads these
ALL = f"{LIBRARY} tests/** examples/** benchmarks/** docs/** tools/** README.md"


class Row(NamedTuple):
    """A row of the table."""

    name: str
    target: str  # of make, with its variables
    claim: str  # the statement that the row verifies, with its cost
    covers: str  # globs of the files that the statement is about; modules that they import count, too
    venv: str = ".venv"  # the environment with the versions that the result names
    needs: str = ""  # a thing that this project's machines lack; the row may then stay without a result
    reads_words: bool = False  # its result depends on docstrings and comments of modules, too


def list_rows(root: Path = ROOT) -> list[Row]:
    """Return all rows in the order in which they run: the cheap ones first, the benchmark last. tests/packages and
    tests/trainers give a row for each of their .txt files.
    """
    packages, trainers = (sorted(p.stem for p in (root / "tests" / f).glob("*.txt")) for f in ("packages", "trainers"))
    return [
        Row("docs", "docs", "the site builds, without a dead link", "src/graft/** docs/** mkdocs.yml README.md",
            reads_words=True),
        Row("dist", "dist", "wheel and source distribution work where nothing else is installed",
            "src/graft/** pyproject.toml tools/** README.md", ".venv/dist", reads_words=True),
        Row("formats", "test-formats", "the libraries of other formats load graft's files",
            f"{LIBRARY} tests/formats/** tests/golden/**", ".venv-formats"),
        Row("oracles", "test-oracles", "AdapterHub, pyreft, repeng and LyCORIS make the fixtures that tests read; 1 GB",
            "tests/oracles/** tests/*/make_*.py tests/*/fixtures/** tests/versions/today.txt"),
        Row("simulator", "simulate", "drawn lives of adapters equal a dense reference; killed and racing saves",
            f"{LIBRARY} tests/trust/simulator.py tests/trust/campaign.py"),
        Row("fuzz", "fuzz", "10,000 damaged adapter folders are refused or loaded whole",
            f"{LIBRARY} tests/trust/fuzz*.py tests/*/fixtures/**"),
        Row("fuzz-files", "fuzz-files", "2,000 damaged files of formats, trainings, runs, sweeps and merges",
            f"{LIBRARY} tests/trust/fuzz*.py tests/*/fixtures/**"),
        Row("device", "test-device GRAFT_TESTS=all", "a simulated CUDA device computes as the CPU, and does not wait",
            f"{LIBRARY} tests/device/**"),
        Row("slow", "test-slow", "the tests that take seconds: processes, a compiler, threads", ALL),
        *(Row(f"storages-{name}", f"test-storages-{name}", f"laws on the quantized layers of {name} itself",
              f"{LIBRARY} tests/packages/conftest.py tests/packages/test_{name}*.py "
              f"tests/packages/{name}.txt docs/storages.md examples/demo_*/**")
          for name in packages),
        Row("distributed", "test-distributed", "DDP, FSDP, ZeRO, tensor and pipeline parallel equal one process",
            f"{LIBRARY} tests/distributed/**"),
        Row("clients", "test-clients", "TRL, Trainer, diffusers, sentence-transformers, accelerate: with graft as with "
            "PEFT", f"{LIBRARY} tests/clients/** docs/** README.md examples/*/carriers.txt tests/docs/preludes/** "
            "tests/docs/test_blocks.py tests/compat/test_late.py tests/test_face.py", ".venv-clients"),
        Row("examples", "examples", "every guide, and the server with eight clients", f"{LIBRARY} examples/** "
            "tests/examples/test_guides.py tests/examples/test_server.py",
            ".venv-clients"),
        Row("coverage", "coverage", "`make test` and the slow tests run 95 % of the lines", ALL),
        Row("all", "test-all", "each law on every cell; `make test` takes a covering array", ALL),
        Row("oldest", "test-oldest", "the lower bounds, on Python 3.10; 5 GB", f"{LIBRARY} tests/**", ".venv/oldest"),
        *(Row(f"oldest-{name}", f"test-oldest OLDEST=oldest-{name}", f"the oldest {name} with the newest of all else",
              f"{LIBRARY} tests/**", f".venv/oldest-{name}") for name in ("torch", "transformers")),
        Row("newest", "test-newest", "the newest release of all packages, on Python 3.13.1 or later",
            ALL, ".venv/newest"),
        Row("peft", "test-peft", "PEFT's own tests with graft under PEFT's name; 20 minutes",
            f"{SOURCE} tests/peft_suite/**", ".venv-peft"),
        *(Row(f"trainers-{name}", f"test-trainers-{name}", f"commands or tests of {name}, with graft as with PEFT; "
              "12 GB in all", f"{SOURCE} tests/trainers/**", f".venv/trainers/{name}") for name in trainers),
        Row("servers", "test-serving", "vLLM and llama.cpp load exported adapters; 2.7 GB, 15 minutes to build",
            f"{LIBRARY} tests/servers/**", ".venv/servers/vllm"),
        Row("guide-serving", "guide-serving", "GRPO trains while vLLM answers with its versions",
            f"{SOURCE} examples/guides/**", ".venv-clients"),
        Row("mutations", "mutations", "the tests notice each patch written by hand", f"{LIBRARY} tests/**"),
        Row("drawn", "drawn", "the share of 100 drawn changes that the tests notice; hours", f"{LIBRARY} tests/**"),
        *(Row(name, name, f"{claim}, on real weights", f"{SOURCE} examples/{folder}/**") for name, folder, claim in (
            ("demo", "demo", "the main job"), ("demo-sweep", "demo", "sixteen settings at once"),
            ("demo-lm", "demo_lm", "a language model"), ("demo-4bit", "demo_*", "a base in four bits"))),
        Row("docs-look", "docs-look", "every page in Chromium, as wide as a desktop and as a phone",
            "src/graft/** docs/** mkdocs.yml README.md tests/docs/look.py", reads_words=True),
        Row("bench", "bench BENCH=--all", "graft and PEFT, each row; an hour or more, with nothing else running",
            f"{SOURCE} benchmarks/** examples/demo_lm/model.py"),
        Row("gpu", "device-report", "the tests of `device`, and the checks and times of `graft device-report`",
            f"{LIBRARY} tests/device/**", needs="a GPU"),
    ]  # fmt: skip


def git(root: Path, *arguments: str) -> str:
    """Return git's output in a repository, stripped. Raises CalledProcessError."""
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def list_changes(root: Path) -> str:
    """Return git's lines about uncommitted and untracked files; results and the page do not count."""
    return git(root, "status", "--porcelain", "--", ".", *NEVER_COVERED)


def list_covered_files(root: Path, row: Row) -> list[str]:
    """Return the files that a row covers, sorted: those of its globs, and modules of tests, examples, benchmarks and
    tools that these import, directly or not.
    """
    tracked = {*git(root, "ls-files").splitlines()}
    covered = {*git(root, "ls-files", "--", *match_globs(row)).splitlines()}
    queue = [name for name in covered if name.endswith(".py") and not name.startswith("src/")]
    while queue:
        path = root / queue.pop()
        for module, names in IMPORT.findall(path.read_text() if path.exists() else ""):
            stems = [module.replace(".", "/"), *(f"{module.replace('.', '/')}/{name}" for name in names.split())]
            modules = {f"{stem.rstrip(',')}{end}" for stem in stems for end in (".py", "/__init__.py")}
            queue += (modules & tracked) - covered
            covered |= modules & tracked
    return sorted(covered)


def match_globs(row: Row) -> list[str]:
    """Return the arguments by which git takes the files of a row's globs."""
    return [*(f":(glob){glob}" for glob in row.covers.split()), *NEVER_COVERED]


def hash_covered(root: Path, row: Row) -> str:
    """Return one hash of the paths and contents of all files that a row covers, as git's index has them.

    Modules count without their docstrings and comments, unless the row reads these.
    """
    lines = git(root, "ls-files", "--stage", "--", *list_covered_files(root, row)).splitlines()
    if not row.reads_words:
        lines = [hash_code(root, line.split()[1]) + line if line.endswith(".py") else line for line in lines]
        lines = [re.sub(r"^(\w{64})\d+ \w+ ", r"\1 ", line) for line in lines]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@cache
def hash_code(root: Path, blob: str) -> str:
    """Return the hash of a module's code without docstrings, comments and blank lines; `blob` is git's name of its
    content. Content that Python cannot parse counts whole.
    """
    text = subprocess.run(["git", "cat-file", "blob", blob], cwd=root, check=True, capture_output=True).stdout.decode()
    with suppress(SyntaxError):
        text = strip_words(text)
    return hashlib.sha256(text.encode()).hexdigest()


def strip_words(text: str) -> str:
    """Return a module's text without docstrings, comments and blank lines. Raises SyntaxError.

    Each version of Python gives the same text, so that a result is valid on another machine.
    """
    lines, spans, kept = text.split("\n"), [], set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                spans.append((first.lineno, first.col_offset, first.end_lineno, first.end_col_offset))
        elif isinstance(node, (ast.Constant, ast.JoinedStr)):
            kept |= {*range(node.lineno, node.end_lineno)}  # a blank line of a string counts
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            start, end = (len(lines[token.start[0] - 1][:column].encode()) for column in (token.start[1], token.end[1]))
            spans.append((token.start[0], start, token.start[0], end))
    found = [line.encode() for line in lines]
    for row, start, last, end in sorted(spans, reverse=True):  # the last first: columns stay as they were
        rest = found[last - 1][end:]
        found[row - 1 : last] = [found[row - 1][:start].rstrip() + rest, *[b""] * (last - row)]
        kept -= {*range(row, last)}
    return "\n".join(line.decode() for i, line in enumerate(found, 1) if line.strip() or i in kept)


def read_result(root: Path, row: Row) -> dict[str, Any] | None:
    """Return the last result of a row, or None."""
    path = root / RESULTS / f"{row.name}.json"
    result: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return result


def judge(root: Path, row: Row) -> tuple[str, int | None]:
    """Return the state of a row, and the number of covered files that changed since its result.

    The state is "valid", "failed", "invalid" (a covered file changed), "never run", or "needs …". The number is None
    without a result, and if git does not know the result's commit.
    """
    result = read_result(root, row)
    if result is None:
        return (f"needs {row.needs}" if row.needs else "never run"), None
    if result["covered"] == hash_covered(root, row):
        return ("valid" if result["passed"] else "failed"), 0
    paths, changed = [*list_covered_files(root, row), *match_globs(row)], None
    with suppress(subprocess.CalledProcessError):  # the commit is of another machine, or was rewritten
        lines = git(root, "diff", "--raw", "--no-abbrev", "--no-renames", result["commit"], "HEAD", "--", *paths)
        changed = sum(differs(root, row, *line.split()[2:4], line) for line in lines.splitlines())
    return ("invalid" if result["passed"] else "failed"), changed


def differs(root: Path, row: Row, old: str, new: str, path: str) -> bool:
    """Return whether two contents of a file differ for a row; a content of zeros is a file that is not there."""
    words_alone = path.endswith(".py") and not row.reads_words and "0" * 40 not in (old, new)
    return not words_alone or hash_code(root, old) != hash_code(root, new)


def find_problems(root: Path = ROOT) -> list[str]:
    """Return a text that names all rows without a valid result; nothing if there are none. Rows with `needs` may lack
    one.
    """
    states = {row.name: judge(root, row)[0] for row in list_rows(root) if not row.needs}
    bad = [f"{name} ({state})" for name, state in states.items() if state != "valid"]
    return [f"these rows of `make verify` have no valid result: {', '.join(bad)}. Run it, and commit."] if bad else []


def run_row(root: Path, row: Row) -> bool:
    """Run a row's target with its output in out/verify, write its result, and return whether it passed.

    A run of pytest without a test that passed fails the row.

    Exits without a result if the commit or a file of the tree changed meanwhile.
    """
    commit, covered, log = git(root, "rev-parse", "HEAD"), hash_covered(root, row), root / f"out/verify/{row.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{row.name}: make {row.target}, into {log}", flush=True)
    start = time.monotonic()
    with log.open("w") as output:
        done = subprocess.run(["make", *shlex.split(row.target)], cwd=root, stdout=output, stderr=subprocess.STDOUT)
    seconds = round(time.monotonic() - start)
    if (changes := list_changes(root)) or git(root, "rev-parse", "HEAD") != commit:
        sys.exit(f"{row.name} is not recorded, since the tree changed while it ran:\n{changes}")
    lines = clean_lines(root, log.read_text(errors="replace"))
    says = summarise(lines)
    passed = done.returncode == 0 and not re.search(r"(^|; )\d+ skipped", says)  # a run that skips all its tests
    result = {
        "commit": commit, "covered": covered, "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "seconds": seconds, "passed": passed, "versions": read_versions(root, row), "says": says,
        "last_lines": [] if passed else lines[-KEPT_LINES:],
    }  # fmt: skip
    path = root / RESULTS / f"{row.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(
        f"{row.name}: {'passed' if passed else 'FAILED'} after {seconds} s. {says}", *result["last_lines"], sep="\n  "
    )
    return passed


def read_versions(root: Path, row: Row) -> dict[str, str]:
    """Return the versions of Python, torch, transformers and peft in a row's environment, and the machine's system and
    cores. A row without its environment has this interpreter's.
    """
    python = root / row.venv / "bin" / "python"
    command = [python if python.exists() else sys.executable, "-c", VERSIONS]
    versions: dict[str, str] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return versions


def clean_lines(root: Path, text: str) -> list[str]:
    """Return the lines of an output that are neither empty nor of make about folders, without escape sequences, at most
    200 characters of each.

    ".", ".venv" and "~" replace the paths of the repository, of this interpreter's environment and of the home folder.
    """
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    for path, name in ((root, "."), (sys.prefix, ".venv"), (Path.home(), "~")):
        text = text.replace(str(path), name)
    lines = [line.rstrip()[:200] for line in re.split(r"[\r\n]+", text) if line.strip()]
    return [line for line in lines if not re.match(r"make\[\d+\]: (Entering|Leaving) directory", line)]


def summarise(lines: list[str]) -> str:
    """Return the last lines of all runs of pytest in an output, such as "3 passed in 2.1s", else the output's last."""
    counts = [line.strip("= ") for line in lines if re.search(r"\d+ (passed|failed|skipped|errors?)\b.* in \d", line)]
    return "; ".join(counts) or (lines[-1].strip("─ ") if lines else "")


def format_page(root: Path) -> str:
    """Return docs/verified.md: a table of all rows, with the last lines of those that failed."""
    rows = [(row, read_result(root, row), *judge(root, row)) for row in list_rows(root)]
    commit, valid = git(root, "rev-parse", "--short=8", "HEAD"), sum(state == "valid" for *_, state, _ in rows)
    text = HEAD.format(commit=commit, valid=valid, rows=len(rows))
    for row, result, state, changed in rows:
        cells: list[Any] = [row.name, row.claim, state if state == "valid" else f"**{state}**", "–", "–", "–", "–", "–"]
        if result:
            ran, under = f"{result['date']}, `{result['commit'][:8]}`", ", ".join(result["versions"].values())
            cells[3:] = ["?" if changed is None else changed, ran, result["seconds"], under, escape(result["says"])]
        text += f"| {' | '.join(map(str, cells))} |\n"
    for row, result, *_ in rows:
        if result and not result["passed"]:
            text += f"\n## {row.name} failed\n\n```text\n" + "\n".join(result["last_lines"]) + "\n```\n"
    return text


HEAD = """# Verified

This page says which suites passed on which commit. `make verify` runs the suites that `make test` leaves out, and
writes this page.

A result is valid until a file that its row covers changes; "changed" counts these files. Docstrings and comments of
modules count for `docs`, `docs-look` and `dist` alone. At commit `{commit}`, {valid} of {rows} rows are valid. "Under"
has the versions of Python, peft, torch and transformers, and the machine.

Nothing ran on a GPU, on macOS or on Windows; [Devices](devices.md) says how to send in a report of a GPU.

| row | verifies | result | changed | ran | seconds | under | says |
|---|---|---|---|---|---|---|---|
"""


def escape(text: str) -> str:
    """Return a text as a cell of a table: pipes, backticks, angle brackets and stars stay as they are written."""
    return re.sub(r"([|`<*_\[])", r"\\\1", text)


def select(rows: list[Row], names: list[str]) -> list[Row]:
    """Return the rows with these names. A name that no row has selects the rows that begin with it and a hyphen. Exits
    if a name selects none.
    """
    known = [row.name for row in rows]
    chosen = {name: [name] if name in known else [row for row in known if row.startswith(f"{name}-")] for name in names}
    if unknown := [name for name in names if not chosen[name]]:
        sys.exit(f"no row {', '.join(unknown)}; there are {', '.join(known)}")
    return [row for row in rows if any(row.name in those for those in chosen.values())]


def main(*names: str, root: Path = ROOT) -> None:
    """Run rows, by default all that are neither valid nor need a missing thing, and write the page after each.

    `--list` prints the rows, and `--print` writes the page; both run nothing. `--invalid` leaves valid rows out. Exits
    with an error if the tree has uncommitted changes, or a row fails.
    """
    rows = list_rows(root)
    if "--list" in names:
        print("\n".join(f"  {row.name:<28}{row.claim}" for row in rows))
        return
    if "--print" in names:
        (root / PAGE).write_text(format_page(root))
        return
    if changes := list_changes(root):
        sys.exit(f"the tree is not clean; commit first, since a result is of a commit:\n{changes}")
    wanted = select(rows, [name for name in names if name != "--invalid"]) if names else rows
    if not names or "--invalid" in names:
        wanted = [row for row in wanted if judge(root, row)[0] != "valid" and not row.needs]
    failed = []
    for row in wanted:
        if not run_row(root, row):
            failed.append(row.name)
        (root / PAGE).write_text(format_page(root))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the last lines are in {PAGE}, all lines in out/verify")


if __name__ == "__main__":
    main(*sys.argv[1:])
