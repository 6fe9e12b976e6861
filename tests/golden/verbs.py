# SPDX-License-Identifier: Apache-2.0
"""Verbs of the command with `--json`, run on golden files, and what of their documents has to stay."""

from __future__ import annotations

import io
import json
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import graft
from graft.command import app
from tests.golden.cases import base_at
from tests.serving.server import answers, serving

# name → words of the command, in a folder with a base, a tuned model and adapters; URL is that of a server
VERBS = {
    "inspect": "inspect a --base base --spectrum",
    "inspect-method": "inspect loha",
    "diff": "diff a b --base base",
    "diff-formats": "diff a loha --base base",
    "lint": "lint broken --base base",
    "resize": "resize a -o resized --rank 1",
    "extract": "extract tuned base -o extracted --rank 2",
    "merge": "merge base a b -o merged --weights 0.5,0.5 --certificate",
    "convert": "convert a --to kohya -o a.safetensors",
    "check": "check dora --for vllm,sglang,lorax --base base",
    "export": "export a --for vllm --base base -o exported",
    "export-method": "export loha --for vllm --base base -o exported-loha",
    "plan": "plan base --rank 4 --seq 8 --gpu 24GB",
    "verify": "verify --adapter a --base base --model tuned --url URL",
    "error": "inspect nowhere",
}
KINDS = ((dict, "object"), (list, "list"), (str, "text"), ((int, float, type(None)), "number"))
GONE = {  # what documents no longer hold, by name and beginning of the place
    "plan": ("/gpu/fits", "/gpu/largest_rank"),  # one step is planned, and no other is searched for
}
OWN_NUMBERS = ("check", "plan", "verify")  # that follow from data, or from versions of other packages


def document(words: str, root: Path) -> Any:
    """Run the command in this process, in the folder of its files; return what it prints for programs."""
    if "URL" in words:
        base = base_at(root / "base")
        tuned = graft.PeftModel.from_pretrained(base_at(root / "base"), root / "a").eval()
        with serving({"base": answers(base), "tuned": answers(tuned)}) as url:
            return document(words.replace("URL", url), root)
    printed, before = io.StringIO(), sys.argv
    sys.argv = ["graft", *words.split(), "--json"]
    try:
        with redirect_stdout(printed), redirect_stderr(io.StringIO()), pytest.raises(SystemExit):
            app.main()
    finally:
        sys.argv = before
    return json.loads(printed.getvalue())


def kinds_in(value: Any, where: str = "") -> dict[str, str]:
    """Return what a document holds at each place: an object, a list, a text, a number. A list is one place."""
    if isinstance(value, dict):
        pairs = [*value.items()]
    else:
        pairs = [("*", v) for v in value] if isinstance(value, list) else []
    kind = next(name for kinds, name in KINDS if isinstance(value, kinds))
    return {where: kind} | {at: k for key, v in pairs for at, k in kinds_in(v, f"{where}/{key}").items()}


def numbers_in(value: Any, where: str = "") -> dict[str, float]:
    """Return the numbers of a document by place."""
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {place: n for key, v in pairs for place, n in numbers_in(v, f"{where}/{key}").items()}
    return {where: value} if isinstance(value, (int, float)) else {}


def clear(root: Path) -> None:
    """Remove what the verbs have written."""
    for words in VERBS.values():
        for output in [word for before, word in zip(words.split(), words.split()[1:]) if before == "-o"]:
            path = root / output
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
