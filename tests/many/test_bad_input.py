# SPDX-License-Identifier: Apache-2.0
"""What is given by mistake: errors that say what to give, before anything has changed; and what runs look like."""

from __future__ import annotations

import subprocess
from functools import partial

import peft
import pytest
import torch

import graft
from graft.config.atomic import machine_token
from graft.core.errors import AlreadyInjectedError
from graft.many import MultiTrain, Trial
from tests.many.alone import batches, lora, tiny

CONFIGS = [
    (peft.LoraConfig(target_modules=["q_proj"]), r"of another package\. .*get_peft_config\(config\.to_dict\(\)\)"),
    ({"peft_type": "LORA"}, r"got dict\. graft\.get_peft_config\(config\)"),
    ("lora", r"got str\. Make one, such as graft\.LoraConfig"),
    (graft.LoraConfig, r"got LoraConfig\. Call the class: LoraConfig\(…\)"),
]  # fmt: skip


def swept(config=None, space=None, **options):
    given = {"data": batches(4), "valid": batches(1), "steps": 4, "rungs": 1} | options
    return graft.sweep(given.pop("model", None) or tiny(), config or lora(), space or {"r": [1, 2]}, **given)


@pytest.mark.parametrize("config, text", CONFIGS, ids=["of PEFT", "dict", "text", "class"])
def test_no_config(config, text):
    model, runs = graft.get_peft_model(tiny(), lora()), MultiTrain(tiny())
    for call in (
        lambda: graft.get_peft_model(tiny(), config),
        lambda: model.add_adapter("x", config),
        lambda: runs.add("x", config, data=batches(1)),
        lambda: swept(config),
    ):
        with pytest.raises(TypeError, match=f"peft_config must be a PeftConfig, got .*{text}|{text}"):
            call()
    assert runs.model is None and list(model.peft_config) == ["default"]


def test_a_config_of_peft_becomes_one_of_graft():
    made = graft.get_peft_config(peft.LoraConfig(r=3, target_modules=["q_proj"]).to_dict())
    assert isinstance(made, graft.LoraConfig) and (made.r, made.target_modules) == (3, {"q_proj"})


@pytest.mark.parametrize("model", ["gpt2", None], ids=str)
def test_no_model(model):
    for call in (
        lambda: MultiTrain(model),
        lambda: graft.get_peft_model(model, lora()),
        lambda: graft.sweep(model, lora(), {"r": [1]}, data=batches(1), valid=batches(1), steps=1, rungs=1),
        lambda: graft.audit(model),
    ):
        with pytest.raises(TypeError, match=rf"A model has to be a torch\.nn\.Module, got {model!r}\. Load it first"):
            call()


def test_a_model_with_a_prompt():
    model = graft.get_peft_model(tiny(), graft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "soft")
    with pytest.raises(graft.ConfigError, match=r"adapter 'soft' is a prompt. Pass the model's get_base_model\(\)"):
        MultiTrain(model)
    runs = MultiTrain(model.get_base_model())
    runs.add("x", lora(), data=batches(1))
    assert runs.run()["x"].state == "ended"


def test_a_model_that_carries_adapters_of_peft():
    model = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"]))
    for base in (model, model.get_base_model()):
        with pytest.raises(AlreadyInjectedError, match=r"\['default'\] of another package.*unload\(\)"):
            graft.get_peft_model(base, lora())
        with pytest.raises(AlreadyInjectedError, match=r"\['default'\] of another package.*unload\(\)"):
            MultiTrain(base).add("x", lora(), data=batches(1))


def test_other_methods_say_what_they_take():
    runs = MultiTrain(tiny())
    with pytest.raises(TypeError, match=r"save\(\) takes no 'path'\. It takes folder\."):
        runs.save(path="x")


def test_what_runs_and_sweeps_look_like(tmp_path):
    runs = MultiTrain(tiny())
    assert runs and not len(runs) and repr(runs) == "MultiTrain(LlamaForCausalLM, runs=[])"
    run = runs.add("x", lora(), data=batches(1), steps=2, optimizer=partial(torch.optim.SGD, lr=0.0))
    assert repr(run) == "<Run 'x' LORA: running, step 0/2>"
    runs.run()
    loss = f"{run.curve[-1].loss:.4g}"
    assert repr(runs) == f"MultiTrain(LlamaForCausalLM, runs=[<Run 'x' LORA: ended, step 2/2, loss {loss}>])"
    assert runs.evaluate("x", batches(1)) == runs.evaluate(["x"], batches(1))
    found = swept()
    assert repr(found).startswith(f"<Sweep of 2 settings; best: '{found.best.name}' {found.best.setting}, loss 4")
    assert "curve" not in repr(Trial("x", {}))


def test_what_killed_sweeps_have_left_goes(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / "s0").mkdir()
    left = [f".{of}.{machine_token()}-{gone.pid}-{'0' * 16}.tmp" for of in ("sweep.json", "run.safetensors", "notes")]
    places = [tmp_path, tmp_path / "s0", tmp_path]
    for where, name in zip(places, left):
        (where / name).touch()
    swept(folder=tmp_path)
    assert [(where / name).exists() for where, name in zip(places, left)] == [False, False, True]  # of another's file
