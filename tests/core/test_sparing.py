# SPDX-License-Identifier: Apache-2.0
"""On packed weights no step keeps a dense copy for its backward pass."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from graft.core.ops import OPS, Linear
from graft.storage.find import STORES
from tests.samples import LAWS
from tests.storage.cells import IN, OUT, SAMPLES, Kind, packed
from tests.storage.test_cells import Eight, EightStore

ROWS = 3


class Product(torch.autograd.Function):
    """Keeps the codes, as the packages' kernels do."""

    @staticmethod
    def forward(ctx, x, m):
        ctx.m = m
        return x @ (m.codes * m.scale).T + m.bias

    @staticmethod
    def backward(ctx, g):
        return g @ (ctx.m.codes * ctx.m.scale), None


class Lean(Eight):
    def forward(self, x):
        return Product.apply(x, self)


row = f"{Lean.__module__}.{Lean.__qualname__}"
STORES.add(row, EightStore())
OPS.add(row, Linear())
LEAN = Kind("lean", Lean)

# what the adapter's own tensors are as large as: theirs are the values that train, or indices of them
LARGE = {
    "SHIRA",
    "SUPERTUNING",
    "OSF",
    "FROD",
    "LILY",
    "RANDLORA",
    "FOURIERFT",
    "WAVEFT",
    "SVFT",
    "BOTTLENECK-compacter",
}


def kept(model, x) -> int:
    """The bytes that the backward pass keeps alive, beside the parameters and buffers of the model."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found = {}

    def note(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(note, lambda t: t):
        y = model(x)
    y.sum().backward()
    return sum(size for place, size in found.items() if place not in own)


@pytest.mark.differs("memory of HiRA, MiSS bat and what else reads the weight")
@pytest.mark.parametrize("sample", [s for s in SAMPLES if not {s.method, str(s)} & LARGE], ids=str)
def test_nothing_as_large_as_the_weight_is_kept(sample):
    model = packed(LEAN, sample)
    x = torch.randn(ROWS, IN, requires_grad=True)
    assert kept(model, x) < IN * OUT * 4 / 2, "half of a dense copy"


def test_a_dense_layer_shows_that_the_check_can_fail():
    from tests.storage.cells import around, linear

    hira = next(s for s in LAWS if s.method == "MISS" and s.config.get("init_weights") == "bat")
    layer = nn.utils.parametrize.register_parametrization(linear(), "weight", Doubled())
    model = around(layer, hira)
    assert kept(model, torch.randn(ROWS, IN, requires_grad=True)) > IN * OUT * 4 / 2


class Doubled(nn.Module):
    def forward(self, W):
        return W * 2
