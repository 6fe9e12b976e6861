# SPDX-License-Identifier: Apache-2.0
"""Layers marked as compressed-tensors marks them: compressed until the first call, with inputs rounded without grad."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from graft.core.errors import UnsupportedLayerError
from graft.storage.find import find_store
from tests.models import disturb, seeded


def rounded_forward(self, x):
    scheme = self.quantization_scheme
    if scheme.input_activations is not None:
        with torch.no_grad():
            size = x.abs().amax(-1, keepdim=True) / 127
            x = (x / size).round() * size
    return type(self).forward(self, x)


class Model(nn.Module):
    """Two layers; the first call of the model makes their codes weights."""

    def __init__(self, activations=None):
        super().__init__()
        with seeded(0):
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)
        for m in (self.a, self.b):
            W = m.weight.data
            m.weight_scale = nn.Parameter(W.abs().amax(1, keepdim=True) / 127, requires_grad=False)
            del m.weight
            m.weight_packed = nn.Parameter((W / m.weight_scale).round().to(torch.int8), requires_grad=False)
            m.quantization_scheme = SimpleNamespace(input_activations=activations, output_activations=None)
            m.forward = rounded_forward.__get__(m)
        self.hook = self.register_forward_pre_hook(self.decompress)

    def decompress(self, *_):
        for m in self.modules():
            if hasattr(m, "weight_packed"):
                m.weight = nn.Parameter(m.weight_packed * m.weight_scale, requires_grad=False)
                del m.weight_packed
        self.hook.remove()

    def forward(self, x):
        return self.b(self.a(x).tanh())


X = torch.linspace(-1, 1, 80).view(5, 16)


def lora(**options):
    return graft.LoraConfig(r=2, target_modules=["a", "b"], **options)


@pytest.mark.parametrize("activations", [None, "int8"])
def test_adapters_train_and_merge(activations):
    model = disturb(graft.get_peft_model(Model(activations), lora()).eval())
    with pytest.raises(NotImplementedError, match="call the model once before"):
        model.merge_adapter()
    y = model(X)
    y.square().sum().backward()
    plain = Model()
    plain(X)
    twin = graft.get_peft_model(plain, lora()).eval()
    graft.set_peft_model_state_dict(twin, graft.get_peft_model_state_dict(model))
    twin(X).square().sum().backward()
    theirs = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert_close(p.grad, theirs[name].grad, rtol=0.05, atol=0.02 * p.grad.abs().max().item())
    model.merge_adapter()
    assert_close(model(X), y, rtol=0.02, atol=0.02)
    model.unmerge_adapter()
    assert_close(model(X), y)


def test_layers_without_adapters_pass_the_gradient_on():
    model = graft.get_peft_model(Model("int8"), graft.LoraConfig(r=2, target_modules=["a"]))
    model(X).sum().backward()
    assert model.base_model.model.a.lora_B["default"].weight.grad.abs().sum() > 0
    again = copy.deepcopy(model)
    again.zero_grad()
    again(X).sum().backward()
    assert again.base_model.model.a.lora_B["default"].weight.grad.abs().sum() > 0
    assert again.base_model.model.b.forward.__self__ is again.base_model.model.b


def test_what_reads_the_weight_waits_for_the_first_call():
    model = Model()
    with pytest.raises(UnsupportedLayerError, match=r"compressed until the model is called.*dequantize=True"):
        graft.get_peft_model(model, lora(use_dora=True))
    model(X)
    assert find_store(model.a).why_unreadable(model.a, "weight") is None
    assert_close(graft.get_peft_model(model, lora(use_dora=True))(X), model(X))
