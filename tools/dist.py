# SPDX-License-Identifier: Apache-2.0
"""`make dist`: what was built holds what it should, and works where it is installed with nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "graft"
IN_SDIST = ("CHANGELOG.md", "LICENSE", "Makefile", "README.md", "pyproject.toml", "docs", "src", "tests", "examples")


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


def try_out(built: Path) -> None:
    """Install a file into a fresh virtual environment, and run `tools/smoke.py` there, far from the source tree."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder, "bin", "python"))
        subprocess.run([python, "-m", "pip", "install", "-q", str(built.resolve())], check=True, cwd=folder)
        subprocess.run([python, "-m", "pip", "check"], check=True, cwd=folder)
        subprocess.run([python, "-I", str(ROOT / "tools" / "smoke.py")], check=True, cwd=folder)


def main(folder: str) -> None:
    (wheel,), (sdist,) = Path(folder).glob("*.whl"), Path(folder).glob("*.tar.gz")
    wanted = source_files()
    problems = [*wheel_problems(wheel, wanted), *sdist_problems(sdist, wanted)]
    if problems:
        sys.exit("\n".join(problems))
    for built in (wheel, sdist):
        print(f"{built.name}:", flush=True)
        try_out(built)


if __name__ == "__main__":
    main(*sys.argv[1:])
