# SPDX-License-Identifier: Apache-2.0
"""A store that is found by the type of the weight, where the module keeps its own: as torchao leaves nn.Linear."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import graft
from graft.storage.find import STORES, TENSORS, find_store
from tests.conformance.stores import RoundedStore
from tests.models import seeded


class Codes(Tensor):
    """Integer codes and a step; torch's functions see the values."""

    @staticmethod
    def __new__(cls, codes: Tensor, step: float):
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, requires_grad=False)
        made.codes, made.step = codes, step
        return made

    @classmethod
    def of(cls, W: Tensor) -> "Codes":
        step = W.abs().max().item() / (2**15 - 1)
        return cls((W / step).round().to(torch.int16), step)

    def values(self) -> Tensor:
        return self.codes * self.step

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].step)
        plain = [a.values() if isinstance(a, Codes) else a for a in args]
        return func(*plain, **(kwargs or {}))


class CodesStore(RoundedStore):
    name = "codes"

    def read(self, m, name):
        return m._parameters[name].values()

    def write(self, m, name, W, shared):
        m._parameters[name] = nn.Parameter(Codes.of(W.detach()), requires_grad=False)

    def snapshot(self, m, name, shared):
        p = m._parameters[name]
        return p.codes.clone(), p.step

    def restore(self, m, name, state):
        m._parameters[name] = nn.Parameter(Codes(*state), requires_grad=False)


@pytest.fixture(autouse=True)
def row():
    TENSORS.add(f"{Codes.__module__}.{Codes.__qualname__}", CodesStore())


def base() -> nn.Module:
    with seeded(0):
        net = nn.Sequential(nn.Linear(6, 4))
    net[0].weight = nn.Parameter(Codes.of(net[0].weight.detach()), requires_grad=False)
    return net


X = torch.linspace(-1, 1, 30).view(5, 6)
CONFIGS = {
    "LORA": dict(r=2),
    "LOHA": dict(r=3),
    "OFT": dict(oft_block_size=2),
    "HRA": dict(r=2),
    "IA3": dict(feedforward_modules=[]),
}


@pytest.mark.differs("which layers are quantized")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
def test_the_tensor_says_how_it_is_held(method, dora):
    options = CONFIGS[method] | (dict(use_dora=True) if dora and method == "LORA" else {})
    net = base()
    assert STORES.find(type(net[0])) is None and find_store(net[0]).name == "codes"
    model = graft.get_peft_model(net, graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](target_modules=["0"], **options))
    with seeded(1), torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.3)
    layer, y = model.base_model.model[0], model(X)
    assert layer.quantization_backend == "codes"
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    before = layer.base_layer.weight.codes.clone()
    model.merge_adapter()
    assert not torch.equal(layer.base_layer.weight.codes, before)
    assert_close(model(X), y, rtol=1e-3, atol=1e-3)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight.codes, before), "bit for bit"
    assert torch.equal(model(X), y)
