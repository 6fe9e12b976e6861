# SPDX-License-Identifier: Apache-2.0
"""The mode of an adapter's layers, and the warning of a loop that trains in eval mode with dropout configured."""

from __future__ import annotations

import copy

import pytest
import torch

import graft
from tests import models
from tests.pair import LIBS, adapt, both, outcome, output, randomize
from tests.samples import first

WORDS = "Call model.train() before training"


def lora(lib, p: float = 0.5, **kwargs):
    return lib.LoraConfig(lora_dropout=p, target_modules=["q_proj"], **kwargs)


def modes(model) -> set[bool]:
    return {m.training for name, m in model.named_modules() if name.endswith("q_proj")}


def step(model) -> None:
    models.output(model, models.inputs("llama")).square().mean().backward()


def get(lib, tmp_path):
    return lib.get_peft_model(models.make("llama"), lora(lib))


def loaded(lib, tmp_path):
    lib.get_peft_model(models.make("llama"), lora(lib)).save_pretrained(tmp_path)
    return lib.PeftModel.from_pretrained(models.make("llama"), tmp_path, is_trainable=True)


def added(lib, tmp_path):
    model = lib.get_peft_model(models.make("llama"), lora(lib, 0.0))
    model.add_adapter("second", lora(lib))
    model.set_adapter("second")
    return model


def loaded_beside(lib, tmp_path):
    lib.get_peft_model(models.make("llama"), lora(lib)).save_pretrained(tmp_path)
    model = lib.get_peft_model(models.make("llama"), lora(lib, 0.0))
    model.load_adapter(tmp_path, "second", is_trainable=True)
    model.set_adapter("second")
    return model


def injected(lib, tmp_path):
    return lib.inject_adapter_in_model(lora(lib), models.make("llama"))


WAYS = [get, loaded, added, loaded_beside, injected]


@pytest.mark.differs("the mode of a fresh PeftModel and of new layers")
@pytest.mark.parametrize("way", WAYS)
def test_first_backward_in_eval_mode_tells(way, tmp_path):
    """PEFT's new layers are in training mode, on a base in eval mode, so that dropout acts; graft's are as the base."""
    ours, theirs = (way(lib, tmp_path / lib.__name__) for lib in LIBS)
    assert modes(theirs) == {True} and modes(ours) == {False}
    told = outcome(lambda: step(ours)).warned(WORDS)
    assert told == [graft.PeftWarning]
    assert not outcome(lambda: step(ours)).warned(WORDS), "once"


@pytest.mark.parametrize("way", WAYS)
def test_training_mode_is_silent(way, tmp_path):
    """After `.train()` both drop out, and nothing is said."""
    model = way(LIBS[0], tmp_path).train()
    assert modes(model) == {True}
    assert not outcome(lambda: step(model)).warned(WORDS)
    batch = models.inputs("llama")
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    assert not torch.equal(models.output(model, batch), models.output(model, batch))


def test_the_warning_names_adapter_share_and_layers():
    model = adapt(LIBS[0], first("LORA", "llama"), "mine")
    model.peft_config["mine"].lora_dropout = 0.25
    (warning,) = [w for w in outcome(lambda: step(model)).warnings if WORDS in str(w.message)]
    layers = sum(isinstance(m, graft.AdapterLayer) for m in model.modules())
    assert "'mine'" in str(warning.message) and "lora_dropout=0.25" in str(warning.message)
    assert f"{layers} modules" in str(warning.message)


QUIET = {"no dropout": lambda: lora(graft, 0.0), "for inference": lambda: lora(graft, inference_mode=True)}


@pytest.mark.parametrize("case", QUIET)
@pytest.mark.parametrize("wrapped", [True, False])
def test_silent_where_nothing_is_left_out(case, wrapped):
    config, base = QUIET[case](), models.make("llama")
    model = graft.get_peft_model(base, config) if wrapped else graft.inject_adapter_in_model(config, base)
    inputs = {"inputs_embeds": base.get_input_embeddings()(models.inputs("llama")["input_ids"]).detach()}
    inputs["inputs_embeds"].requires_grad_()
    assert not outcome(lambda: models.output(model, inputs).sum().backward()).warned(WORDS)


def test_an_adapter_that_is_added_leaves_a_model_in_service_alone():
    """PEFT puts the layers of a second adapter into training mode: its own dropout acts once it is active."""
    sample = first("LORA")
    same = []
    for lib, model in zip(LIBS, both(sample)):
        model.eval()
        model.add_adapter("second", sample.config(lib, lora_dropout=0.5))
        model.set_adapter("second")
        randomize(model, sample)
        same.append(torch.equal(output(model, sample), output(model, sample)))
    assert same == [True, False]


def test_a_copy_of_an_injected_model_trains_and_saves(tmp_path):
    """The parameter that waits for its first gradient can be copied and stored."""
    model = injected(LIBS[0], tmp_path)
    torch.save(model, tmp_path / "whole.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "whole.pt", weights_only=False)):
        step(other)
        assert any(p.grad is not None for p in other.parameters())
    assert outcome(lambda: step(model)).warned(WORDS)


def test_what_is_loaded_to_train_trains_whether_active_or_not(tmp_path):
    """An optimizer that is made next has it."""
    graft.get_peft_model(models.make("llama"), lora(graft)).save_pretrained(tmp_path)
    for there in (False, True):
        model = graft.get_peft_model(models.make("llama"), lora(graft, 0.0))
        if there:
            model.add_adapter("second", lora(graft))
        model.load_adapter(tmp_path, "second", is_trainable=True)
        own = [p for name, p in model.named_parameters() if ".second." in name]
        assert own and all(p.requires_grad for p in own) and not model.peft_config["second"].inference_mode


def test_modules_that_are_alike_in_both_modes_are_in_that_of_their_adapter():
    """transformers' test of `load_adapter(is_trainable=True)` asks them; nothing random acts on a base in eval mode."""
    for inference in (False, True):
        model = graft.inject_adapter_in_model(lora(graft, 0.0, inference_mode=inference), models.make("llama").eval())
        leaves = [m for name, m in model.named_modules() if "lora_" in name and not [*m.children()]]
        assert leaves and {m.training for m in leaves} == {not inference}
        assert not any(m.training for m in model.eval().modules())
