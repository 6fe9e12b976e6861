# SPDX-License-Identifier: Apache-2.0
"""The fixtures of a library that graft is compared with, made anew by it: are they those that the tests read?

`python -m tests.oracles NAME FOLDER` with the packages of NAME.txt on the path (`make test-oracles`). Where a library
has changed on purpose, its new files are in FOLDER, to be copied.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TESTS = Path(__file__).parents[1]
KEPT = {"methods": TESTS / "methods" / "fixtures", "files": TESTS / "files" / "fixtures"}
METHODS = {  # library → what makes its fixtures of methods in a folder, as module:function of tests.methods
    "adapters": ("make_adapterhub:main", "make_adapterhub:heads", "make_fusion:main"),
    "pyreft": ("make_reft_steering:of_pyreft",),
    "repeng": ("make_reft_steering:of_repeng",),
    "lycoris": ("make_tlora:main",),
}
LYCORIS = ("locon", "tucker", "dora", "loha", "lokr", "dylora", "full")
FILES = {  # library → its adapter files, as functions of tests.files.make_fixtures
    "adapters": ("adapterhub_lora", "adapterhub_ia3"),
    "lycoris": tuple(f"lycoris_{kind}" for kind in LYCORIS),
}
DATED = {"transformers_version", "version", "_name_or_path", "model_name"}  # fields that say nothing of the adapter


def main(name: str, folder: str) -> list[str]:
    """Make the fixtures of a library in a folder; return what is wrong."""
    out = Path(folder)
    shutil.rmtree(out, ignore_errors=True)
    for maker in METHODS[name]:
        module, _, function = maker.partition(":")
        (out / "methods").mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)  # of whatever it draws without a seed of its own
        getattr(import_module(f"tests.methods.{module}"), function)(out / "methods")
    for maker in FILES.get(name, ()):
        (out / "files").mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)  # of whatever it draws without a seed of its own
        getattr(import_module("tests.files.make_fixtures"), maker)(str(out.absolute() / "files" / maker))
    made = [file for file in sorted(out.rglob("*")) if file.is_file()]
    wrong = [f"{file.relative_to(out)}: {said}" for file in made if (said := differs(file, kept(file, out)))]
    print(f"{name}: {len(made)} files made, {len(wrong)} of which differ from those that the tests read")
    return wrong


def kept(file: Path, out: Path) -> Path:
    """Return the file that the tests read in place of a new one."""
    kind, *rest = file.relative_to(out).parts
    return KEPT[kind].joinpath(*rest)


def differs(new: Path, old: Path) -> str | None:
    """Return how two files differ; None if they say the same."""
    if not old.is_file():
        return "is new"
    read: dict[str, Callable[[Path], Any]] = {
        ".safetensors": load_file, ".bin": torch.load, ".pt": torch.load, ".json": said_by
    }  # fmt: skip
    if new.suffix not in read:
        return None if new.read_bytes() == old.read_bytes() else "has other bytes"
    a, b = read[new.suffix](new), read[new.suffix](old)
    if new.suffix == ".json":
        return None if a == b else f"says {a}, and not {b}"
    if a.keys() != b.keys():
        return f"has other tensors: {sorted(a.keys() ^ b.keys())}"
    try:
        torch.testing.assert_close(dict(a), dict(b), rtol=1e-4, atol=1e-5)
    except AssertionError as e:
        return " ".join(str(e).split())
    return None


def said_by(path: Path) -> Any:
    held = json.loads(path.read_text())
    return {k: v for k, v in held.items() if k not in DATED} if isinstance(held, dict) else held


if __name__ == "__main__":
    found = main(*sys.argv[1:])
    print(*found, sep="\n")
    sys.exit(bool(found))
