# SPDX-License-Identifier: Apache-2.0
"""Methods that do more than act on layers, or whose loss or input is more than the model's: each as alone."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

import graft
from graft.core.errors import ConfigError
from graft.many import MultiTrain
from tests import models
from tests.many.alone import Spec, alone, as_alone, batches, lora, same, tiny, train

QV = ["q_proj", "v_proj"]
bottleneck = partial(graft.BottleneckConfig, reduction_factor=4)
CONFIGS = {
    "few tokens": graft.ReftConfig(r=2),  # whose dropout is 0.05
    "narrow": bottleneck(dropout=0.2),
    "after attention": bottleneck(mh_adapter=True, original_ln_before=False, dropout=0.2),
    "depth": bottleneck(stochastic_depth=0.3),
    "beside": bottleneck(is_parallel=True, use_gating=True, ln_before=True, dropout=0.2),
    "inverse": bottleneck.func.preset("seq_bn_inv", dropout=0.1),
    "experts": graft.MixLoraConfig(r=2, num_experts=3, top_k=2, lora_dropout=0.2),
    "budget": graft.AdaLoraConfig(target_modules=QV, total_step=100, init_r=4, target_r=2, lora_dropout=0.1),
    "ranks": lora(r=4, use_dylora=True),
    "norms": graft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "own norms": lora(r=4, modules_to_save=["norm"]),
    "prompts": graft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2),  # which uses all four again
    "attention": lora(r=4, target_modules=[*QV, "k_proj", "o_proj"], lora_dropout=0.2),
    "square": graft.LoraXsConfig(target_modules=QV, r=4, lora_dropout=0.1),
}


@pytest.mark.filterwarnings("ignore:AdaLoRA adapter")
@pytest.mark.parametrize("names", [
    ["few tokens", "narrow", "budget"], ["depth", "ranks", "experts"], ["beside", "square", "norms"],
    ["after attention", "inverse"], ["prompts", "attention"], ["own norms", "ranks"],
], ids=" ".join)  # fmt: skip
def test_each_is_as_alone(names):
    specs = {name: Spec(CONFIGS[name], seed=len(name)) for name in names} | {"low": Spec(lora(lora_dropout=0.2))}
    runs = MultiTrain(tiny())
    for name, spec in specs.items():
        runs.add(name, copy.deepcopy(spec.config), **spec.options(6))
    runs.run()
    for name, spec in specs.items():
        parameters, losses = alone(spec, 6)
        assert as_alone(runs[name].parameters, parameters), name
        assert [point.loss for point in runs[name].curve] == pytest.approx(losses), name


TOP = r".*1\.self_attn\.(q|v)_proj"
poly = partial(graft.PolyConfig, n_tasks=3, n_skills=2, n_splits=1)
TOLD = {  # what the method reads of a batch, beside the model's arguments
    "skills": (poly(target_modules=QV, r=2), "task_ids"),
    "top": (poly(target_modules=TOP, r=2), "task_ids"),
    "top too": (poly(target_modules=TOP, r=4), "task_ids"),
    "tasks": (graft.MtlLoraConfig(target_modules=QV, r=2, n_tasks=3), "task_ids"),
    "time": (graft.TLoraConfig(target_modules=QV, r=4), "timestep"),
    "low": (lora(r=4), None),
}


def told(key):
    values = {"task_ids": torch.tensor([0, 1, 2, 1]), "timestep": torch.tensor([10, 300, 700, 900]), None: None}[key]
    return [batch if key is None else batch | {key: values.roll(i)} for i, batch in enumerate(batches(4))]


def test_what_methods_read_of_a_batch():
    runs = MultiTrain(tiny())
    for name, (config, key) in TOLD.items():
        runs.add(name, copy.deepcopy(config), data=told(key), optimizer=partial(torch.optim.AdamW, lr=1e-2), seed=4)
    runs.run()
    for name, (config, key) in TOLD.items():
        with models.seeded(4):
            model = graft.get_peft_model(tiny(), copy.deepcopy(config))
            parameters = train(model, told(key), partial(torch.optim.AdamW, lr=1e-2))
        assert same(runs[name].parameters, parameters), name


def test_a_loss_of_labels_in_the_call():
    runs = MultiTrain(tiny())
    with pytest.raises(ConfigError, match="Run 'x': SHADOW adds a loss of the call's labels"):
        runs.add("x", graft.ShadowConfig(), data=batches(1))
    assert runs.model is None
