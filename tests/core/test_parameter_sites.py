# SPDX-License-Identifier: Apache-2.0
"""Adapters on a parameter of a module that uses it in ways of its own: fold, then call the module."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

import graft
from graft.core.call import Call
from graft.core.carrier import SharedTensors
from graft.core.errors import RoutingError
from graft.core.layer import make_adapter_layer
from graft.core.method import AdaptedLayers
from graft.core.rows import Rows
from graft.inject.build import add_adapter
from graft.inject.find import make_method
from graft.inject.survey import make_parameter_site, survey_model
from tests.models import seeded


class Gated(nn.Module):
    """Uses its matrix twice, and takes a second argument."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 10))

    def forward(self, x, *, gate):
        return torch.relu(x @ self.w.T) @ self.w * gate


CONFIGS = {
    "LORA": dict(r=2, lora_alpha=3),
    "VERA": dict(r=3),
    "LOHA": dict(r=4, alpha=3),
    "OFT": dict(oft_block_size=2),
    "HRA": dict(r=2),
}


def carried(*methods):
    with seeded(0):
        module = nn.ModuleDict({"m": Gated()}).requires_grad_(False)
        layer = make_adapter_layer(make_parameter_site("m", module["m"], "w", survey_model(module)), Call())
        for name, method in zip("ab", methods):
            cfg = graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](target_modules=["m"], **CONFIGS[method])
            m, shared = graft.method_of(method)(layer.site, cfg, name), SharedTensors()
            assert m.check() is None
            if m.shares:
                shared.hold(name, m.share(AdaptedLayers(module, [layer.site], cfg)), (None, torch.float32), True)
            add_adapter(layer, m, shared.wrap_containers(), on_meta=False, upcast=True)
            layer.require_grad(name, True)
            for p in layer.parameters_of(name):
                p.data.add_(torch.randn(p.shape), alpha=0.3)
    return layer.eval()


X, GATE = torch.linspace(-1, 1, 40).view(4, 10), torch.rand(10, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("a, b", [("LORA", "OFT"), ("VERA", "HRA"), ("LOHA", "LORA"), ("HRA", "LOHA")])
def test_forward_is_the_module_with_the_folded_parameter(a, b):
    layer = carried(a, b)
    base = layer(X, gate=GATE)
    assert torch.equal(base, layer.base_layer(X, gate=GATE))
    layer.set_adapter(["a", "b"])
    W, _ = layer.state.plan.fold(layer.weight_now, None)
    y = layer(X, gate=GATE)
    assert_close(y, torch.relu(X @ W.T) @ W * GATE)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n in "ab" for p in layer.parameters_of(n))
    with torch.no_grad():
        layer.merge()
        assert_close(layer(X, gate=GATE), y)
        layer.unmerge()
        assert_close(layer(X, gate=GATE), y)
    assert layer.get_delta_weight("a").shape == (6, 10) if layer.methods["a"].effect.additive else True


def test_rows_with_different_adapters_are_refused():
    """A module may flatten, repeat or sort its inputs: which of them belong to which row is its own business."""
    layer = carried("LORA", "OFT")
    different = layer.call.use_rows(Rows.from_names(["b", "__base__", "a", "b"]))
    with pytest.raises(RoutingError, match="does not support mixed adapter batches"), different:
        layer(X, gate=GATE)
    with layer.call.use_rows(Rows.from_names(["b"] * 4)):
        mixed = layer(X, gate=GATE)
    layer.set_adapter(["b"])
    assert_close(mixed, layer(X, gate=GATE))


def test_it_compiles_without_a_break():
    layer = carried("LORA", "HRA")
    layer.set_adapter(["a", "b"])
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert_close(compiled(X, gate=GATE), layer(X, gate=GATE))


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("targets", ["attention", "parameter"])
def test_a_parameter_of_which_fsdp1_puts_views_into_the_module(group, targets):
    from torch.distributed.fsdp import FullyShardedDataParallel

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.lin = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

        def forward(self, x):
            return self.lin(self.attn(x, x, x, need_weights=False)[0])

    which = {"target_modules": ["attn"]} if targets == "attention" else {"target_parameters": ["lin.weight"]}
    x = torch.linspace(-2, 2, 48).sin().view(2, 3, 8)
    with seeded(0):
        model = graft.get_peft_model(Net(), graft.LoraConfig(init_lora_weights=False, **which))
    expected = model(x)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process alone
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    out = sharded(x)
    assert_close(out, expected)
    out.square().sum().backward()
    assert_close({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, gradients)


def test_the_method_on_one_matrix_has_the_path_of_the_module():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, 4, 6))

    net = nn.Sequential(Stack())
    site = make_parameter_site("0", net[0], "w", survey_model(net))
    method = make_method(site, graft.methods.method_of("LOHA"), graft.LoHaConfig(r=2), "a")
    assert (method.matrix_method.site.key, method.matrix_method.site.path) == ("0.w", "0")
