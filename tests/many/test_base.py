# SPDX-License-Identifier: Apache-2.0
"""The base that runs share: nobody changes it, and it comes back as it was."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

import graft
from graft.core.errors import ConfigError
from graft.many import MultiTrain
from tests import models
from tests.many.alone import batches, lora, same, tiny
from tests.trust.fuzz import difference, snapshot

ADAM = partial(torch.optim.AdamW, lr=1e-2)
WHOLE = {  # what trains whole, or by rows
    "head": lora(modules_to_save=["lm_head"]),
    "norms": lora(modules_to_save=["norm"]),
    "embeddings": lora(modules_to_save=["embed_tokens"]),
    "tied": lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "rows": lora(trainable_token_indices=[4, 5]),
    "norms alone": graft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
}


def base_for(name):
    base = tiny()
    if name == "tied":
        base.config.tie_word_embeddings = True
        base.tie_weights()
    return base


def trained(base, config, **options):
    runs = MultiTrain(base)
    runs.add("x", copy.deepcopy(config), **{"data": batches(3), "optimizer": ADAM, "steps": 3, **options})
    return runs


def wrong(output, batch):
    raise ZeroDivisionError


def unloaded(runs):
    runs.run().unload()


def removed(runs):
    runs.run().remove("x")


def beside(runs):
    runs.add("y", copy.deepcopy(runs["x"].config), data=batches(3), optimizer=ADAM)
    runs.run().model.set_adapter("y")
    runs.unload()


def refused(runs):
    config = runs.run().remove("x").config
    with pytest.raises(ZeroDivisionError):
        runs.add("y", config, data=batches(1), optimizer=lambda parameters: 1 / 0)


@pytest.mark.parametrize("end", [unloaded, removed, beside, refused])
@pytest.mark.parametrize("name", WHOLE)
def test_the_base_comes_back_as_it_was(name, end):
    base = base_for(name)
    before = snapshot(base)
    end(trained(base, WHOLE[name]))
    assert difference(before, snapshot(base)) == ""


def test_a_second_training_on_a_base_is_the_first():
    base, config = tiny(), WHOLE["head"]
    first = trained(base, config)
    values = [p.clone() for p in first.run()["x"].parameters]
    first.remove("x")
    first.add("x", copy.deepcopy(config), data=batches(3), optimizer=ADAM, steps=3)
    assert same(first.run()["x"].parameters, values)
    first.unload()
    assert same(trained(base, config).run()["x"].parameters, values)


def test_a_sweep_that_raises_gives_the_head_back():
    base, calls = tiny(), []

    def loss(output, batch):
        calls.append(None)
        return output["logits"].square().mean() if len(calls) < 6 else wrong(output, batch)

    before = snapshot(base)
    options = {"data": batches(4), "valid": batches(1), "steps": 4, "rungs": 1, "optimizer": ADAM, "loss": loss}
    with pytest.raises(ZeroDivisionError):
        graft.sweep(base, WHOLE["head"], {"r": [2, 4]}, **options)
    assert difference(before, snapshot(base)) == ""


def test_hooks_of_the_base_stay_as_many():
    base = tiny()
    models.checkpoint(base)
    model = graft.get_peft_model(base, lora())
    base = model.unload()  # transformers 4 leaves the hook to the adapter's model
    before = len(base.get_input_embeddings()._forward_hooks)
    for _ in range(2):
        trained(base, lora()).run().unload()
    assert len(base.get_input_embeddings()._forward_hooks) == before <= 1


def test_what_is_merged_comes_out():
    base = tiny()
    before = snapshot(base)
    runs = trained(base, WHOLE["head"]).run()
    runs.model.merge_adapter(["x"])
    runs.unload()
    for name, value in base.state_dict().items():
        torch.testing.assert_close(value, before["tensors"][name])  # merging rounds


CHANGES = {
    "init_lora_weights='pissa'": lora(init_lora_weights="pissa"),
    "init_lora_weights='pissa_niter_4'": lora(init_lora_weights="pissa_niter_4"),
    "init_lora_weights='olora'": lora(init_lora_weights="olora"),
    "init_lora_weights='loftq'": lora(init_lora_weights="loftq", loftq_config=graft.LoftQConfig()),
    "init_lora_weights='corda'": lora(init_lora_weights="corda", corda_config=graft.CordaConfig()),
    "init_lora_weights='lora_ga'": lora(init_lora_weights="lora_ga", lora_ga_config=graft.LoraGAConfig()),
    "kasa_config": lora(kasa_config={}),
    "bias='all'": lora(bias="all"),
    "bias='lora_only'": lora(bias="lora_only"),
    "layer_replication=": lora(layer_replication=[(0, 2), (1, 2)]),
}


@pytest.mark.parametrize("setting", CHANGES)
def test_what_changes_the_base_is_refused(setting):
    base = tiny()
    before = snapshot(base)
    runs = MultiTrain(base)
    with pytest.raises(ConfigError, match=f"Run 'x': {setting}.* changes the base"):
        runs.add("x", copy.deepcopy(CHANGES[setting]), data=batches(1))
    assert runs.model is None and difference(before, snapshot(base)) == ""
    runs.add("plain", lora(), data=batches(3), optimizer=ADAM, seed=1)
    runs.step()
    with pytest.raises(ConfigError, match=f"Run 'x': {setting}.* changes the base"):
        runs.add("x", copy.deepcopy(CHANGES[setting]), data=batches(1))
    assert runs.names == ["plain"] and [*runs.model.peft_config] == ["plain"]
    alone = trained(tiny(), lora(), seed=1).run()
    assert same(runs.run()["plain"].parameters, alone["x"].parameters)


def test_a_sweep_refuses_it_before_anything_trains(monkeypatch):
    monkeypatch.setattr(MultiTrain, "add", None)
    space = {"init_lora_weights": [True, "pissa"]}
    with pytest.raises(ConfigError, match="Run 's1': init_lora_weights='pissa' changes the base"):
        graft.sweep(tiny(), lora(), space, data=batches(4), valid=batches(1), steps=4, rungs=1)


def test_an_adapter_that_has_changed_the_base_trains_without_others():
    model = graft.get_peft_model(tiny(), lora(init_lora_weights="pissa"), "start")
    model.add_adapter("plain", lora())
    runs = MultiTrain(model)
    for name, config in ("plain", None), ("new", lora()):
        with pytest.raises(ConfigError, match=rf"Run '{name}' .* 'start' changes the base \(init_lora_weights='pissa'"):
            runs.add(name, config, data=batches(1))
    assert runs.add("start", data=batches(3), steps=3).step == 0
    with pytest.raises(ConfigError, match="'start' changes the base"):
        runs.add("plain", data=batches(1))
    assert runs.run()["start"].state == "ended"


def test_a_restart_changes_the_base_of_later_runs():
    model = graft.get_peft_model(tiny(), lora(), "x")
    graft.train.restart(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad))
    runs = MultiTrain(model)
    with pytest.raises(ConfigError, match=r"'x' changes the base \(restart\(\)\)"):
        runs.add("y", lora(), data=batches(1))


@pytest.mark.filterwarnings("ignore:target_modules entry", "ignore:You have passed exclude_modules")
@pytest.mark.parametrize("config, names", [
    (lora(target_modules=["q_proj", "down_proj"]), r"\[model.layers.0.mlp.down_proj\]"),
    (lora(target_modules="all-linear"), r"\[model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj"),
    (graft.IA3Config(), r"\[model.layers.0.mlp.down_proj\]"),
], ids=["named", "all", "by default"])  # fmt: skip
def test_layers_that_another_run_trains_whole_are_refused(config, names):
    """The run would train without them, and nobody would notice."""
    runs = MultiTrain(tiny())
    runs.add("whole", lora(modules_to_save=["mlp"]), data=batches(1))
    with pytest.raises(ConfigError, match=rf"Run 'x' would train {names}.*, and run 'whole' trains .*mlp' whole"):
        runs.add("x", copy.deepcopy(config), data=batches(1))
    assert runs.names == ["whole"] and [*runs.model.peft_config] == ["whole"]
    mlp = ["gate_proj", "up_proj", "down_proj"]
    for i, other in enumerate((lora(), lora(target_modules="all-linear", exclude_modules=mlp))):
        runs.add(f"x{i}", other, data=batches(1))
    assert [len(runs[name].parameters) for name in ("x0", "x1")] == [8, 16]
