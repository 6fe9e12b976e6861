# SPDX-License-Identifier: Apache-2.0
"""transformers' layers of small integers, the real classes: Gemma's, BitNet's."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.integrations import bitnet, gemma_quant

import graft
from graft.core.errors import PeftWarning, UnsupportedLayerError
from graft.storage.find import find_store
from tests.models import disturb, seeded
from tests.storage.cells import IN, Kind, Net, cells, linear
from tests.storage.standins import Eetq


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Run transformers' functions as they are written: to compile them takes minutes."""
    plain = lambda f: getattr(f, "_torchdynamo_orig_callable", f)
    monkeypatch.setattr(bitnet, "unpack_weights", plain(bitnet.unpack_weights))
    for name in ("activation_quant", "post_quant_process"):
        monkeypatch.setattr(bitnet.BitLinear, name, plain(getattr(bitnet.BitLinear, name)))
    for kind in (bitnet.WeightQuant, bitnet.ActQuant):
        monkeypatch.setattr(kind, "forward", staticmethod(plain(kind.forward)))


def gemma(bits, activations=0.0):
    def hold(layer):
        W, half = layer.weight.data, 2 ** (bits - 1)
        made = gemma_quant.QuantizedLinear(layer.in_features, layer.out_features, True, bits)
        scale = W.abs().amax(1, keepdim=True) / max(half - 1, 1)
        codes = (W / scale).round().clamp(-half, half - 1)
        if bits < 8:
            per = 8 // bits
            parts = (codes + half).to(torch.int32).unflatten(1, (-1, per))
            codes = sum(parts[..., i] << bits * i for i in range(per)).to(torch.uint8)
        made.weight = nn.Parameter(codes if bits < 8 else codes.to(torch.int8), requires_grad=False)
        made.weight_scale, made.bias = nn.Parameter(scale), layer.bias
        made.input_activation_scale.data.fill_(activations)
        return made.eval()

    return hold


def ternary(layer):
    W = layer.weight.data
    scale = W.abs().mean()
    codes = (W / scale).round().clamp(-1, 1)
    made = bitnet.BitLinear(layer.in_features, layer.out_features, layer.bias is not None, dtype=torch.float32)
    made.weight, made.weight_scale = bitnet.pack_weights(codes.clone()), 1 / scale[None]
    if layer.bias is not None:
        made.bias = layer.bias.data.clone()
    return made


def auto(online):
    def hold(layer):
        bits = bitnet.AutoBitLinear(layer.in_features, layer.out_features, False, online_quant=online)
        W = layer.weight.data
        scale = W.abs().mean()
        bits.weight.data = W.clone() if online else (W / scale).round().clamp(-1, 1)
        if not online:
            bits.weight_scale = scale[None].clone()
        return bits.requires_grad_(False)

    return hold


FEW = ("LORA", "LORA-dora", "LOHA", "OFT", "BEFT")
TERNARY = "its weight is ternary codes that the model was trained with"
KINDS = [
    *[Kind(f"gemma, {bits} bits", gemma(bits), only=FEW) for bits in (8, 4, 2)],
    Kind("gemma, inputs", gemma(8, 0.03), 2e-2, "scales of its inputs and outputs were", rounds_inputs=True, only=FEW),
    Kind("bitnet", ternary, 2e-2, TERNARY, rounds_inputs=True, only=FEW),
    *[
        Kind(f"bitnet, {name}", auto(online), 2e-2, TERNARY, bias=False, rounds_inputs=True, only=FEW[:-1])
        for name, online in (("online", True), ("offline", False))
    ],
]
globals().update(cells(KINDS))


@pytest.mark.differs(
    "layers whose kernel passes no gradient on (BitLinear, Gemma's rounded activations, fbgemm, compressed-tensors "
    "with rounded activations), or whose backward pass fails (AQLM with codes of 8 bits on CPUs)"
)
@pytest.mark.parametrize("hooked", [False, True])
def test_layers_below_get_a_gradient(hooked):
    """transformers' BitLinear rounds its input to int8, and passes nothing on."""
    layer = ternary(linear())
    if hooked:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        add_hook_to_module(layer, AlignDevicesHook("cpu"))
    with seeded(0):
        base = nn.Sequential(nn.Linear(6, IN), layer)
    model = disturb(graft.get_peft_model(base, graft.LoraConfig(r=2, target_modules=["0"])))
    x, W = torch.randn(5, 6), find_store(layer).read(layer, "weight")
    h = model.base_model.model[0](x)
    model(x).sum().backward()
    lora = model.base_model.model[0]
    expected = torch.autograd.grad((h @ W.T).sum(), lora.lora_B["default"].weight)[0]
    assert_close(lora.lora_B["default"].weight.grad, expected)


def test_a_norm_before_the_weight():
    layer = bitnet.BitLinear(IN, 96, False, dtype=torch.float32, use_rms_norm=True)
    why = "the layer has a norm before its weight, so that it is not linear"
    with pytest.raises(UnsupportedLayerError, match=f"needs its weight, and {why}"):
        graft.get_peft_model(Net(layer), graft.LoraConfig(target_modules=["layer"], use_dora=True))
    with pytest.warns(PeftWarning, match="Layers below a BitLinear get no gradient: the layer has a norm"):
        graft.get_peft_model(Net(layer), graft.LoraConfig(target_modules=["layer"]))


def test_a_scale_of_bias_and_output():
    layer = bitnet.AutoBitLinear(IN, 96, True)
    with pytest.raises(UnsupportedLayerError, match="its scale multiplies its bias as well"):
        graft.get_peft_model(Net(layer), graft.LoraConfig(target_modules=["layer"], use_dora=True))


class Deep(nn.Module):
    """Layers that round their inputs, or have no backward pass, above a dense one."""

    def __init__(self):
        super().__init__()
        with seeded(0):
            self.a, self.b, self.c = nn.Linear(8, IN), ternary(linear()), nn.Linear(96, IN)
            self.d, self.e = gemma(8, 0.1)(linear()), Eetq(linear())

    def forward(self, x):
        h = self.a(x)
        return self.d(self.c(self.b(h))) + self.e(h)


def test_layers_that_accelerate_offloads_pass_the_same_gradients_on():
    from accelerate import cpu_offload

    found = []
    for offloaded in (False, True):
        base = Deep()
        if offloaded:
            cpu_offload(base, torch.device("cpu"), offload_buffers=True)
        with seeded(1):
            model = graft.get_peft_model(base, graft.LoraConfig(r=2, target_modules=["a", "b", "e"]))
        assert all(p.device.type == "cpu" for name, p in model.named_parameters() if "lora_" in name)
        disturb(model)(torch.linspace(-1, 1, 24).view(3, 8)).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == 6 and all(g.abs().sum() > 0 for g in found[0])
    assert_close(*found)
