# SPDX-License-Identifier: Apache-2.0
"""Errors that others match hold PEFT's text to its end; graft says more after it."""

from __future__ import annotations

import pytest
from peft.utils import hotswap

import graft
from tests import models
from tests.pair import LIBS, adapt, outcome
from tests.samples import first

SWAP = {"graft": graft.hotswap_adapter, "peft": hotswap.hotswap_adapter}


def merged_swap(lib, path):
    adapt(lib, first("LORA")).save_pretrained(path)
    model = adapt(lib, first("LORA"))
    model.merge_adapter()
    SWAP[lib.__name__](model, path, "default")


def two(lib, method, **options):
    sample = first(method)
    model = lib.get_peft_model(models.make(sample.model), sample.config(lib, **options))
    model.add_adapter("b", sample.config(lib, **options))


CASES = {  # {name: (call, the beginning that both share; None: all of PEFT's text)}
    "selected": (lambda lib, p: adapt(lib, first("LORA")).save_pretrained(p, selected_adapters=["zz"]), None),
    "second bias": (lambda lib, p: two(lib, "LORA", bias="all"), None),
    "second trainable": (lambda lib, p: two(lib, "ADALORA"), None),
    "shared by injection": (
        lambda lib, p: lib.inject_adapter_in_model(first("VERA").config(lib), models.make("mlp")),
        None,
    ),
    "merged swap": (merged_swap, "because it is currently merged into the base weights. Please unmerge the adapter"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_text_that_others_match(case, tmp_path):
    call, part = CASES[case]
    ours, theirs = (outcome(lambda: call(lib, tmp_path / lib.__name__)).error for lib in LIBS)  # noqa: B023
    assert theirs is not None and ours is not None
    wanted = part or str(theirs).strip()
    assert wanted in str(theirs) and wanted in str(ours), (str(ours), str(theirs))
