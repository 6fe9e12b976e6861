# SPDX-License-Identifier: Apache-2.0
"""`make dist`: what was built holds what it should, and works where it is installed with nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "graft"
IN_SDIST = ("CHANGELOG.md", "LICENSE", "Makefile", "README.md", "pyproject.toml", "docs", "src", "tests", "examples")
LIMITS = {".whl": 1_500_000, ".tar.gz": 4_000_000}  # bytes of what is built

ITS_OWN = re.compile(r"[^/]+\.dist-info/")  # what a wheel says of itself


def source_files(source: Path = SOURCE) -> dict[str, bytes]:
    """Path in a wheel → bytes, for all that the package has in the source tree."""
    files = (path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(source.parent)): path.read_bytes() for path in files}


def wheel_problems(wheel: Path, wanted: dict[str, bytes]) -> list[str]:
    """What a wheel lacks, has too much, or has in another form, in words."""
    with zipfile.ZipFile(wheel) as archive:
        found = {name: archive.read(name) for name in archive.namelist() if not ITS_OWN.match(name)}
    return [
        *(f"{wheel.name} lacks {name}" for name in sorted(wanted.keys() - found.keys())),
        *(f"{wheel.name} has {name}, which is no file of src/graft" for name in sorted(found.keys() - wanted.keys())),
        *(
            f"{name} in {wheel.name} is not the one in src"
            for name in sorted(wanted)
            if found.get(name, b"") != wanted[name]
        ),
    ]


def sdist_problems(sdist: Path, wanted: dict[str, bytes]) -> list[str]:
    """What a source distribution lacks of what builds, tests and explains the package."""
    with tarfile.open(sdist) as archive:
        found = {member.name.split("/", 1)[-1] for member in archive.getmembers()}
    expected = [*IN_SDIST, *(f"src/{name}" for name in wanted)]
    return [f"{sdist.name} lacks {name}" for name in sorted(expected) if name not in found]


def size_problems(built: Path) -> list[str]:
    """Return an error text if a built file is larger than its kind may be."""
    limit = next(limit for ending, limit in LIMITS.items() if built.name.endswith(ending))
    size = built.stat().st_size
    return [f"{built.name} has {size:,} bytes, and may have {limit:,}"] if size > limit else []


def try_out(built: Path, interpreter: str) -> None:
    """Install a file into a fresh environment of an interpreter and run `tools/smoke.py` there.

    Then install its extra `trainer` and run README's first example.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        python = str(Path(folder, "bin", "python"))
        subprocess.run([python, "-m", "pip", "install", "-q", str(built.resolve())], check=True, cwd=folder)
        subprocess.run([python, "-m", "pip", "check"], check=True, cwd=folder)
        subprocess.run([python, "-I", str(ROOT / "tools" / "smoke.py")], check=True, cwd=folder)
        subprocess.run([python, "-m", "pip", "install", "-q", f"{built.resolve()}[trainer]"], check=True, cwd=folder)
        text, printed = first_example((ROOT / "README.md").read_text())
        done = subprocess.run([python, "-I", "-c", text], check=True, cwd=folder, stdout=subprocess.PIPE, text=True)
        lines = [line for line in done.stdout.splitlines() if line and not line.startswith("{")]  # without Trainer's
        if lines != printed.splitlines():
            sys.exit(f"README's first example prints, under {built.name}:\n{done.stdout}")
        print("README's first example prints the text that stands below it", flush=True)


def first_example(page: str) -> tuple[str, str]:
    """Return the Python blocks of a page up to its first block of output, and that output."""
    until, found, after = page.partition("```text\n")
    if not found:
        raise ValueError("README has no block of output")
    return "\n".join(re.findall(r"```python\n(.*?)```", until, re.DOTALL)), after.partition("```")[0]


def main(folder: str, *interpreters: str) -> None:
    """Check the files of a folder and try them out under each interpreter, by default the running one."""
    (wheel,), (sdist,) = Path(folder).glob("*.whl"), Path(folder).glob("*.tar.gz")
    wanted = source_files()
    problems = [*wheel_problems(wheel, wanted), *sdist_problems(sdist, wanted)]
    problems += [*size_problems(wheel), *size_problems(sdist)]
    if problems:
        sys.exit("\n".join(problems))
    for interpreter in interpreters or (sys.executable,):
        for built in (wheel, sdist):
            print(f"{built.name}, {interpreter}:", flush=True)
            try_out(built, interpreter)


if __name__ == "__main__":
    main(*sys.argv[1:])
