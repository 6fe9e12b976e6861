# SPDX-License-Identifier: Apache-2.0
"""PSOFT: the turn within the largest components, and its basis, which no file holds."""

import pytest
import torch
from torch import nn

import graft
from tests import models
from tests.looks import layers
from tests.pair import LIBS, adapt, close, outcome, output, randomize
from tests.samples import first


def config(lib, **options):
    return lib.PsoftConfig(target_modules=["0"], **options)


@pytest.mark.differs("`psoft_alpha=0`")
@pytest.mark.parametrize("lib", LIBS)
@pytest.mark.parametrize("options", [dict(r=0), dict(r=13), dict(ab_svd_init="other"), dict(psoft_svd="other")])
def test_settings_that_cannot_be(lib, options):
    made = outcome(lambda: lib.get_peft_model(nn.Sequential(nn.Linear(20, 12)), config(lib, **options)))
    assert made.kind in (ValueError, TypeError)


def test_formula():
    torch.manual_seed(0)
    model = graft.get_peft_model(nn.Sequential(nn.Linear(20, 12)), config(graft, r=4, psoft_alpha=5))
    layer = layers(model)["0"]
    turn = layer.psoft_R["default"]
    for p in turn.parameters():
        p.data.add_(torch.randn(p.shape), alpha=0.3)
    Q = torch.zeros(4, 4)
    Q[tuple(torch.triu_indices(4, 4, 1))] = turn.weight.detach()
    Q = Q - Q.T
    I = torch.eye(4)
    R = turn.vector_b[:, None] * ((I + Q) @ torch.linalg.inv(I - Q)) * turn.vector_a
    U, S, V = torch.linalg.svd(layer.base_layer.weight, full_matrices=False)
    close(layer.get_delta_weight("default"), (U[:, :4] * S[:4]) @ (R - I) @ V[:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_basis_on_a_base_in_half_precision(dtype):
    """The basis keeps its digits, as in PEFT."""
    outputs = []
    for lib in LIBS:
        torch.manual_seed(0)
        model = lib.get_peft_model(nn.Sequential(nn.Linear(20, 12)).to(dtype), config(lib, r=4, psoft_alpha=5))
        for p in model.parameters():
            if p.requires_grad:
                p.data.copy_(torch.linspace(-0.5, 1.5, p.numel()).view(p.shape))
        outputs.append(model(torch.linspace(-1, 1, 60, dtype=dtype).view(3, 20)).float())
    close(*outputs, 0.03)
    basis = layers(graft.get_peft_model(nn.Sequential(nn.Linear(20, 12)).to(dtype), config(graft, r=4)))["0"]
    A = basis.psoft_basis["default"].A
    assert A.dtype == torch.float32 and not torch.equal(A, A.to(dtype).float())


def test_a_model_loaded_without_memory_for_it(tmp_path):
    """The basis comes from the weight when that has values."""
    sample = first("PSOFT")
    model = randomize(adapt(graft, sample), sample).eval()
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(models.make("mlp"), tmp_path, low_cpu_mem_usage=True).eval()
    close(output(loaded, sample), output(model, sample))
    light = adapt(graft, sample, low_cpu_mem_usage=True)
    light.load_adapter(tmp_path, "default")
    close(output(light.eval(), sample), output(model, sample))


def test_training_keeps_no_input():
    """A is fixed, so that nobody needs x again: h = x Aᵀ is enough."""
    torch.manual_seed(0)
    model = graft.get_peft_model(nn.Sequential(nn.Linear(40, 30)), config(graft, r=4))
    x, kept = torch.randn(200, 40), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert not any(t.shape == x.shape for t in kept)


@pytest.mark.parametrize("rows", [3, 200])
def test_gradients(rows):
    torch.manual_seed(0)
    model = graft.get_peft_model(nn.Sequential(nn.Linear(20, 12)), config(graft, r=4, psoft_alpha=5))
    layer, turn = layers(model)["0"], layers(model)["0"].psoft_R["default"]
    for p in turn.parameters():
        p.data.add_(torch.randn(p.shape), alpha=0.3)
    x, g = torch.randn(rows, 20, requires_grad=True), torch.randn(rows, 12)
    inputs = [x, *turn.parameters()]
    ours = torch.autograd.grad((model(x) * g).sum(), inputs)
    W = layer.base_layer.weight + layer.get_delta_weight("default")
    theirs = torch.autograd.grad(((x @ W.T) * g).sum(), inputs)
    for a, b in zip(ours, theirs):
        close(a, b, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_that_is_cast_afterwards(dtype):
    model = graft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), graft.PsoftConfig(r=2, target_modules=["0"]))
    x = torch.linspace(-1, 1, 16).view(2, 8)
    y = model(x)
    out = model.to(dtype)(x.to(dtype))
    torch.testing.assert_close(out.float(), y, rtol=0.05, atol=0.05)
    out.float().square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
