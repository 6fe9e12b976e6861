# SPDX-License-Identifier: Apache-2.0
"""Gates of a call: how much each adapter counts, for mixtures of adapters."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from tests.looks import get_registry, layers
from tests.models import seeded
from tests.raised import refuses

X = torch.linspace(-1, 1, 40).view(4, 10)
CONFIGS = {
    "LORA": dict(r=2, lora_alpha=3),
    "VERA": dict(r=3),
    "LOHA": dict(r=2),
    "OFT": dict(oft_block_size=2),
    "LN_TUNING": {},
}


class ByRow:
    """A weight for each row and adapter."""

    def __init__(self, weights):
        self.weights = weights  # adapter → (batch,)

    def apply(self, layer, adapter, part):
        return part * self.weights[adapter].view(-1, *[1] * (part.dim() - 1))

    def rows(self, index):
        return ByRow({name: w[index] for name, w in self.weights.items()})


def model(*methods):
    with seeded(0):
        net = nn.Sequential(nn.Linear(10, 6)).eval()
        made = None
        for name, method in zip("ab", methods):
            cfg = graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](target_modules=["0"], **CONFIGS[method])
            if made is None:
                made = graft.get_peft_model(net, cfg, name, mixed=True)
            else:
                made.add_adapter(name, cfg)
        for layer in layers(made).values():
            for name in layer.adapters:
                for p in layer.parameters_of(name):
                    p.data.add_(torch.randn(p.shape), alpha=0.4)
    return made.eval()


GATES = ByRow({"a": torch.tensor([0.0, 1.0, 0.3, 2.0]), "b": torch.tensor([1.0, 0.0, 0.5, -1.0])})


@pytest.mark.parametrize("rows", [4, 80])
@pytest.mark.parametrize("a, b", [("LORA", "LORA"), ("LORA", "VERA"), ("LOHA", "LORA"), ("VERA", "LOHA")])
def test_gates_weigh_what_each_adapter_adds(a, b, rows):
    made = model(a, b)
    made.set_adapter(["a", "b"])
    x, gates = X.repeat(rows // 4, 1), ByRow({n: w.repeat(rows // 4) for n, w in GATES.weights.items()})
    layer, call = layers(made)["0"], get_registry(made).call
    base = layer.base_layer(x)
    expected = base + sum(gates.apply(layer, name, x @ layer.get_delta_weight(name).T) for name in ("a", "b"))
    names = ["a", "__base__", "b", "a"] * (rows // 4)
    with call.extend_context(gates):
        y = made(x)
        mixed = made(x, adapter_names=names)
    assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    for row, name in enumerate(names[:8]):
        part = 0 if name == "__base__" else gates.weights[name][row] * (x[row] @ layer.get_delta_weight(name).T)
        assert_close(mixed[row], base[row] + part, rtol=1e-5, atol=1e-5)
    assert (made(x) - y).abs().max() > 1e-3


@pytest.mark.parametrize("b", ["OFT", "LN_TUNING"])
def test_what_does_more_than_add_refuses_gates(b):
    made = model("LORA", b)
    with get_registry(made).call.extend_context(GATES):
        made.set_adapter("a")
        made(X)
        made.set_adapter("b")
        refuses(graft.RoutingError, r"layer '0' do more than add .* gates", made, X)
        refuses(graft.RoutingError, "gates", made, X, adapter_names=["a", "b", "a", "b"])
