# SPDX-License-Identifier: Apache-2.0
"""The API reference has every public name, once, where it is defined."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from importlib import import_module

import pytest

import graft
import graft.compat.peft
import graft.optim
import graft.serving
import graft.train
from graft.methods import ROWS
from tests.docs.blocks import ROOT

FOLDER = ROOT / "docs" / "reference"
PAGES = sorted(FOLDER.glob("*.md"))
NAMED = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]
ONE_TEXT = {row.tuner for row in ROWS.values()}  # classes that the index describes together
PUBLIC = [
    (module, name)
    for module in (graft, graft.serving, graft.train, graft.optim, graft.compat.peft)
    for name in module.__all__
    if not (name.startswith("__") or name in ONE_TEXT)
]


def test_public_names_are_described():
    tables = (FOLDER / "index.md").read_text()  # which have no docstring
    for module, name in PUBLIC:
        found = getattr(module, name)
        if hasattr(found, "__qualname__"):
            assert f"{found.__module__}.{found.__qualname__}" in NAMED, name
        else:
            assert f"`{name}`" in tables, name


def test_what_is_described_exists_and_says_something():
    for name in NAMED:
        module, _, attribute = name.rpartition(".")
        assert inspect.getdoc(getattr(import_module(module), attribute)), name


def test_nothing_is_described_twice():
    assert {name: n for name, n in Counter(NAMED).items() if n > 1} == {}


def test_the_index_lists_the_pages():
    listed = re.findall(r"^\| \[[^\]]+\]\((\w+\.md)\)", (FOLDER / "index.md").read_text(), re.M)
    assert sorted(listed) == [page.name for page in PAGES if page.name != "index.md"]


def test_signatures_show_numbers_for_constants():
    griffe = pytest.importorskip("griffe")
    extensions = griffe.load_extensions(f"{ROOT / 'docs' / '_site' / 'fields.py'}:Fields")
    package = griffe.load("graft", search_paths=[str(ROOT / "src")], extensions=extensions)
    for function in (package["model.api.get_peft_model"], package["model.peft_model.PeftModel.from_pretrained"]):
        assert str(function.parameters["change_timeout"].default) == "300.0"
