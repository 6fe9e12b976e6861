# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors: models that transformers loads compressed, and that become dense at their first call."""

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

import graft
from graft.core.errors import UnsupportedLayerError
from tests.models import disturb

INT4 = dict(num_bits=4, type="int", strategy="group", group_size=32)
INT8 = dict(num_bits=8, type="int", strategy="channel")
TOKENS = dict(num_bits=8, type="int", strategy="token", dynamic=True)
SCHEMES = {"w4": (INT4, None), "w8a8": (INT8, TOKENS)}
IDS = torch.arange(12).view(2, 6)


@pytest.fixture(scope="module", params=SCHEMES)
def folder(request, tmp_path_factory):
    weights, inputs = (args and QuantizationArgs(**args) for args in SCHEMES[request.param])
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=50)
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
    for m in model.modules():
        if hasattr(m, "quantization_scheme"):
            groups = m.weight.data.unflatten(1, (-1, weights.group_size or m.in_features))
            m.weight_scale.data = calculate_qparams(groups.amin(-1), groups.amax(-1), weights)[0]
            m.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    compressor.update_config(path)
    return path


def load(folder, **options):
    config = dict(quantization_config=CompressedTensorsConfig(**options)) if options else {}
    return AutoModelForCausalLM.from_pretrained(folder, **config).eval()


def lora(**options):
    return graft.LoraConfig(target_modules=["q_proj", "down_proj"], **options)


def gradients(model):
    model(IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_adapters_train_as_on_a_dense_model(folder):
    model = disturb(graft.get_peft_model(load(folder), lora()).eval())
    twin = graft.get_peft_model(load(folder, dequantize=True), lora()).eval()
    graft.set_peft_model_state_dict(twin, graft.get_peft_model_state_dict(model))
    ours, theirs = gradients(model), gradients(twin)
    assert ours.keys() == theirs.keys() and all("lora_" in name for name in ours)
    for name, g in theirs.items():
        assert g.abs().sum() > 0
        assert_close(ours[name], g, rtol=0.05, atol=0.05 * g.abs().max().item())


def test_merging(folder):
    model = disturb(graft.get_peft_model(load(folder), lora()).eval())
    with pytest.raises(NotImplementedError, match="compressed until the model is called: call the model once before"):
        model.merge_adapter()
    y = model(IDS).logits
    with model.disable_adapter():
        base = model(IDS).logits
    assert torch.equal(base, load(folder)(IDS).logits)
    model.merge_adapter()
    assert_close(model(IDS).logits, y, rtol=0.05, atol=0.05 * y.abs().max().item())
    model.unmerge_adapter()
    assert_close(model(IDS).logits, y)


def test_what_reads_the_weight(folder):
    with pytest.raises(UnsupportedLayerError, match=r"needs its weight.*compressed.*dequantize=True"):
        graft.get_peft_model(load(folder), lora(use_dora=True))
    model = load(folder)
    model(IDS)
    model = disturb(graft.get_peft_model(model, lora(use_dora=True)).eval())
    twin = graft.get_peft_model(load(folder, dequantize=True), lora(use_dora=True)).eval()
    graft.set_peft_model_state_dict(twin, graft.get_peft_model_state_dict(model))
    y, z = model(IDS).logits, twin(IDS).logits
    assert_close(y, z, rtol=0.02, atol=0.02 * z.abs().max().item())
