# SPDX-License-Identifier: Apache-2.0
"""Names of PEFT's inside that single clients import do what PEFT's do."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import peft
import pytest
import torch
from accelerate import cpu_offload
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import other
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from graft.compat.peft import clients
from graft.compat.peft.layers import layer_class
from tests import models
from tests.leaves_out import CONVERSIONS
from tests.pair import LIBS, adapt, close, randomize
from tests.samples import first


class Experts(nn.Module):
    """A module that uses a tensor past any layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 5))

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.weight)


def test_layers_of_tensors_are_param_wrappers():
    """PEFT's class has the tensor's layers, and no other of its layer classes does."""
    found = []
    for lib, cls in zip(LIBS, (layer_class("LORA", "ParamWrapper"), ParamWrapper)):
        base = nn.Sequential(nn.Linear(3, 5), Experts())
        config = lib.LoraConfig(target_modules=["0"], target_parameters=["1.weight"], r=2)
        model = lib.get_peft_model(base, config)
        found.append([name for name, m in model.named_modules() if isinstance(m, cls)])
        assert not any(isinstance(m, layer_class("LORA", "Embedding")) for m in model.modules())
    assert found[0] == found[1] == ["base_model.model.1"]


@pytest.fixture(scope="module")
def mixtral():
    sizes = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, vocab_size=11)
    return MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=2))


TARGETS = [["w1", "w2", "w3"], ["w1", "w3"], ["q_proj"], ["w2", "q_proj"]]


@CONVERSIONS
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_configs_of_fused_experts(targets, mixtral):
    made = []
    theirs = importlib.import_module("peft.utils.transformers_weight_conversion")
    for lib, module in zip(LIBS, (clients, theirs)):
        config = lib.LoraConfig(target_modules=list(targets), r=4)
        mapping = module.get_model_conversion_mapping(mixtral)
        module.convert_peft_config_for_transformers(config, model=mixtral, conversions=mapping)
        made.append((set(config.target_modules), set(config.target_parameters or ()), config.rank_pattern))
    assert made[0] == made[1]


def test_onload_layer():
    """What is written to the base layer within the block stays; a layer that is not offloaded is left alone."""
    sample = first("LORA")
    low = cpu_offload(models.make(sample.model), torch.device("cpu"))
    model = randomize(adapt(LIBS[0], sample, base=low), sample)
    layer = model.base_model.model.layers[0].fc1
    assert layer.base_layer.weight.is_meta
    with clients.onload_layer(layer):
        assert not layer.base_layer.weight.is_meta
        merged = layer.base_layer.weight + layer.get_delta_weight("default")
        layer.merge()
        close(layer.base_layer.weight.data, merged.data)
    assert layer.base_layer.weight.is_meta
    with clients.onload_layer(layer):
        close(layer.base_layer.weight.data, merged.data)
    plain = nn.Linear(2, 2)
    with clients.onload_layer(plain):
        assert not plain.weight.is_meta


class Params4bit(nn.Parameter):
    """As the one of bitsandbytes is called."""


@pytest.mark.parametrize("param", [Params4bit(torch.zeros(1)), nn.Parameter(torch.zeros(1))], ids=["4bit", "plain"])
def test_kinds_of_weights(param):
    theirs = importlib.import_module("peft.utils.integrations").get_bnb_param_type
    assert clients.get_bnb_param_type(param) == theirs(param)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("config", [{"quantization_config": 3}, {}], ids=str)
def test_quantization_configs(config, method):
    model = SimpleNamespace(config=SimpleNamespace(**config), quantization_method="gptq")
    for given in (model, nn.Linear(1, 1)):
        assert clients.get_quantization_config(given, method) == other.get_quantization_config(given, method)


def test_data():
    assert clients.VARIANT_KWARG_KEYS == peft.tuners.lora.layer.VARIANT_KWARG_KEYS
    theirs = importlib.import_module("peft.tuners.adaption_prompt.config").TRANSFORMERS_MODEL_CONFIG
    assert {k: v.target_modules for k, v in theirs.items()} == clients.TRANSFORMERS_MODEL_CONFIG
