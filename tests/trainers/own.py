# SPDX-License-Identifier: Apache-2.0
"""Run a trainer's own tests, from its source distribution, under PEFT and with graft in its place."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path
from xml.etree import ElementTree

from tests.trainers.both import Side, Trainer

PASSED, OTHER = "passed", ("failure", "error", "skipped")
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "--continue-on-collection-errors"]


def source(python: Path, package: str, version: str, folder: Path) -> Path:
    """Return the unpacked source distribution of a release, which suits this Python: its wheel has no tests."""
    folder.mkdir(parents=True)
    asked = [str(python), "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
    subprocess.run([*asked, f"{package}=={version}"], check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


def outcomes(side: Side, root: Path, files: list[str], folder: Path) -> dict[str, str]:
    """Return how each test ended, by its name: "passed", or an outcome of `OTHER`."""
    report, log = folder / f"{side.library}.xml", folder / f"{side.library}.log"
    under = ["-m", "graft.compat.peft"] if side.library == "graft" else []
    asked = [str(side.bin / "python"), *under, *PYTEST, f"--junitxml={report}", *files]
    with log.open("w") as out:
        subprocess.run(asked, cwd=root, env=side.env, stdout=out, stderr=out)
    assert report.exists(), f"with {side.library} pytest made no report:\n{log.read_text()[-4000:]}"
    cases = ElementTree.parse(report).iter("testcase")
    names = {f"{case.get('classname')}::{case.get('name')}": case for case in cases}
    return {name: next((part.tag for part in case if part.tag in OTHER), PASSED) for name, case in names.items()}


def compared(trainer: Trainer, folder: Path) -> dict[str, list[str]]:
    """Return the names of a trainer's tests that pass with both libraries, with PEFT alone, and with neither."""
    package = trainer.cases.PACKAGE
    root = source(trainer.bin / "python", package, trainer.versions()[package], folder / "source")
    theirs, ours = (outcomes(side, root, trainer.cases.OWN, folder) for side in trainer.sides(folder))
    ran = [name for name, outcome in theirs.items() if outcome != "skipped"]
    good = [name for name in ran if theirs[name] == PASSED]
    return {
        "both": [name for name in good if ours.get(name) == PASSED],
        "PEFT alone": [name for name in good if ours.get(name) != PASSED],
        "neither": [name for name in ran if theirs[name] != PASSED],
    }
