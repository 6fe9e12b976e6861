# SPDX-License-Identifier: Apache-2.0
"""HQQ's row on a stand-in: a layer of that name with HQQ's layout of four bits, whose arithmetic is here."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

import graft
from graft.storage.find import find_store
from tests.looks import layers
from tests.models import disturb, seeded
from tests.raised import refuses
from tests.storage.cells import FEW, IN, OUT, Kind, cells, linear

CONFIG = dict(weight_quant_params=dict(nbits=4, group_size=64), scale_quant_params=None, zero_quant_params=None)


class HQQLinear(nn.Module):
    def __init__(self, layer, quant_config, compute_dtype=torch.float16, device="cuda"):
        super().__init__()
        self.quant_config = copy.deepcopy(quant_config)
        self.offload_meta = self.quant_config.pop("offload_meta")
        self.compute_dtype, self.device, self.ready = compute_dtype, device, False
        self.bias = self.W_q = self.meta = None
        if layer is not None:
            self.quantize(layer.weight.data, **self.quant_config)
            if layer.bias is not None:
                self.bias = layer.bias.clone().to(compute_dtype)  # a plain tensor, with its graph

    def quantize(self, W, weight_quant_params, scale_quant_params, zero_quant_params):
        self.in_features, self.out_features = W.T.shape
        rows = W.float().reshape(-1, weight_quant_params["group_size"])
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        scale = (high - low) / 15
        codes = ((rows - low) / scale).round().to(torch.uint8)
        upper, lower = codes.chunk(2)
        self.W_q = nn.Parameter(upper << 4 | lower, requires_grad=False)
        self.meta = dict(scale=scale.to(self.compute_dtype), zero=(-low / scale).to(self.compute_dtype), shape=W.shape)
        self.ready = True

    def dequantize(self):
        codes = torch.cat((self.W_q >> 4, self.W_q & 15)).to(self.compute_dtype)
        return ((codes - self.meta["zero"]) * self.meta["scale"]).reshape(self.meta["shape"])

    def forward(self, x):
        return F.linear(x, self.dequantize(), self.bias)


HQQLinear.__module__ = "hqq.core.quantize"


def hold(layer, dtype=torch.float32):
    return HQQLinear(copy.deepcopy(layer), {**CONFIG, "offload_meta": False}, dtype, "cpu")


KINDS = [Kind("hqq", hold)]
globals().update(cells(KINDS, FEW))
X = torch.linspace(-1, 1, 5 * IN).view(5, IN)


def net():
    first = linear()
    first.bias.requires_grad_()
    with seeded(1):
        return nn.Sequential(hold(first), nn.Tanh(), hold(nn.Linear(OUT, 4)))


def test_the_module_stays_when_the_weight_changes():
    model = disturb(graft.get_peft_model(net(), graft.LoraConfig(r=2, target_modules="all-linear"))).eval()
    bases = [layer.base_layer for layer in layers(model).values()]
    kept = [base.meta["scale"] for base in bases]
    model.merge_adapter()
    assert [layer.base_layer for layer in layers(model).values()] == bases and len(bases) == 2
    assert not any(base.meta["scale"] is scale for base, scale in zip(bases, kept))
    model.unmerge_adapter()
    assert all(base.meta["scale"] is scale for base, scale in zip(bases, kept))


def test_half_precision():
    layer = hold(linear(), torch.float16)
    store = find_store(layer)
    assert store.read(layer).dtype == torch.float16 and store.where(layer) == (torch.device("cpu"), torch.float16)
    model = graft.get_peft_model(nn.Sequential(layer), graft.LoraConfig(r=2, target_modules=["0"]))
    assert layers(model)["0"].lora_A["default"].weight.dtype == torch.float32
    assert disturb(model)(X.half()).dtype == torch.float16


BIASES = {"none": [], "lora_only": ["0.base_layer.bias"], "all": ["0.base_layer.bias", "2.bias"]}


@pytest.mark.differs('`bias="all"` on HQQ, GPTQ')
@pytest.mark.parametrize("bias", BIASES)
def test_a_bias_that_is_no_parameter_trains_where_the_config_says_so(bias, tmp_path):
    model = graft.get_peft_model(net(), graft.LoraConfig(r=2, target_modules=["0"], bias=bias))
    trained = {f"base_model.model.{name}" for name in BIASES[bias]}
    assert {n for n, p in model.named_parameters() if p.requires_grad and "bias" in n} == trained
    model = disturb(model)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in trained:
                p.add_(1.0)
    model(X).sum().backward()
    assert layers(model)["0"].base_layer.bias.requires_grad == bool(trained)
    model.save_pretrained(tmp_path)
    expected = model.eval()(X)
    assert_close(graft.PeftModel.from_pretrained(net(), tmp_path).eval()(X), expected)
    assert torch.equal(copy.deepcopy(model)(X), expected)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model(X), expected)


def test_a_failed_call_leaves_biases_as_they_were(tmp_path):
    graft.LoraConfig(r=2, target_modules=["0"], bias="all").save_pretrained(tmp_path)
    save_file({"base_model.model.0.lora_A.weight": torch.zeros(3, IN)}, tmp_path / "adapter_model.safetensors")
    base = net()
    before = base[0].bias
    refuses(RuntimeError, "size mismatch", graft.PeftModel.from_pretrained, base, tmp_path)
    assert type(base[0]) is HQQLinear and base[0].__dict__["bias"] is before


def test_a_layer_without_a_weight_yet_is_refused():
    empty = HQQLinear(None, {**CONFIG, "offload_meta": False}, torch.float32, "cpu")
    assert find_store(empty).why_unreadable(empty) == "it is not quantized yet"
