# SPDX-License-Identifier: Apache-2.0
"""Deleting by a list that names an adapter twice, by transformers' integration and PEFT's functions."""

from __future__ import annotations

import pytest
from peft import functional

import graft
from graft.model.functional import delete_adapter
from tests import models
from tests.pair import LIBS, adapt, outcome, shapes
from tests.samples import first

DELETE = {"graft": delete_adapter, "peft": functional.delete_adapter}


@pytest.mark.differs("`delete_adapter` (the function) of an adapter that is not there")
@pytest.mark.parametrize("names", [["b", "b"], ["zz"], ["b", "a", "b"]], ids=str)
def test_from_a_model_without_a_wrapper(names):
    """PEFT passes over what is not there without a word; graft says so."""
    left = []
    for lib in LIBS:
        model, sample = models.make("mlp"), first("LORA")
        for name in "ab":
            lib.inject_adapter_in_model(sample.config(lib), model, name)
        done = outcome(lambda: [DELETE[lib.__name__](model, n, "lora_") for n in names])  # noqa: B023
        assert done.error is None
        told = [w for w in done.warnings if "There is no adapter" in str(w.message)]
        assert len(told) == (lib is graft and len(names) - len({*names} & {*"ab"}))
        left.append((shapes(model), list(done.value[-1] or ())))
    assert left[0] == left[1]


def test_from_a_mixed_model():
    """PEFT fails on the second, when the first is gone; graft deletes it once."""
    done = []
    for lib in LIBS:
        model = adapt(lib, first("LORA"), "a", mixed=True)
        model.add_adapter("b", first("LOHA").config(lib))
        done.append(outcome(lambda: model.delete_adapter(["b", "b"])))  # noqa: B023
        if lib is graft:
            assert list(model.peft_config) == ["a"]
    assert done[0].error is None and isinstance(done[1].error, KeyError)


def test_from_a_peft_model():
    """Which takes one name; a list is a TypeError in both."""
    for lib in LIBS:
        model = adapt(lib, first("LORA"), "a")
        assert outcome(lambda: model.delete_adapter(["a", "a"])).kind is TypeError  # noqa: B023
        assert list(model.peft_config) == ["a"]


@pytest.mark.parametrize("lib", LIBS, ids=lambda lib: lib.__name__)
def test_modules_to_save_are_those_of_the_adapters_there(lib):
    model = lib.get_peft_model(models.make("mlp"), lib.LoraConfig(target_modules=["lin0"], modules_to_save=["head"]))
    assert model.modules_to_save == {"head"}
    model.add_adapter("other", lib.LoraConfig(target_modules=["lin0"]))
    model.set_adapter("other")
    model.delete_adapter("default")
    assert model.modules_to_save is None
