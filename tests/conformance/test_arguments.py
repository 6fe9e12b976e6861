# SPDX-License-Identifier: Apache-2.0
"""Arguments of a layer's own reach it in every way in which a model with adapters runs."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from graft.core.ops import OPS
from tests.conformance.samples import ADAPTERS, CALLED_CELLS, CELLS
from tests.models import disturb


class Scaled(nn.Linear):
    """A linear layer that multiplies its output by an argument."""

    def forward(self, input, by=1.0):
        return super().forward(input) * by


OPS.add(f"{Scaled.__module__}.{Scaled.__qualname__}", OPS.find(nn.Linear))
CALLS = {  # of a layer with an input
    "position": lambda layer, x: layer(x, 3.0),
    "keyword": lambda layer, x: layer(x, by=3.0),
    "without": lambda layer, x: layer(x),
}
ROWS = ["default", "__base__", "other", "default", "__base__"]
WAYS = {  # context and arguments of the call
    "one": lambda model: (nullcontext(), {}),
    "disabled": lambda model: (model.disable_adapter(), {}),
    "mixed": lambda model: (nullcontext(), {"adapter_names": ROWS}),
    "base rows": lambda model: (nullcontext(), {"adapter_names": ["__base__"] * len(ROWS)}),
    "rows of one": lambda model: (nullcontext(), {"adapter_names": ["other"] * len(ROWS)}),
    "merged": lambda model: (model.merge_adapter() or nullcontext(), {}),
}
OWN = [cell for cell in CELLS + CALLED_CELLS if cell.layer.name == "linear" and cell.store.name == "dense"]
ALONE = ["MISS-bat"]  # it computes with its weight alone, as the Op does, which knows no such argument


class Calls(nn.Module):
    """A layer in a model, called in one of these ways."""

    def __init__(self, net):
        super().__init__()
        self.layer = Scaled(10, 6)
        self.layer.load_state_dict(net.layer.state_dict())
        self.before, self.how = net.before, "without"

    def forward(self, x):
        return CALLS[self.how](self.layer, x)


@pytest.mark.parametrize(
    "cell", [c for c in OWN if not c.sample.prepare and str(c.sample) not in ALONE], ids=lambda cell: str(cell.sample)
)
def test_arguments_reach_the_layer(cell):
    model = disturb(cell.fresh(ADAPTERS, base=Calls(cell.base())))
    x, base = cell.inputs(), model.get_base_model()
    for way, begin in WAYS.items():
        if way == "merged" and cell.unmergeable:
            continue
        context, arguments = begin(model)
        with context, torch.no_grad():
            y = {}
            for base.how in CALLS:
                y[base.how] = model(x, **arguments)
        assert_close(y["keyword"], y["position"], rtol=0, atol=0)
        assert (y["without"] - y["position"]).abs().max() > 1e-3, way
        if way in ("disabled", "base rows", "merged"):
            assert_close(y["position"], y["without"] * 3, rtol=1e-4, atol=1e-5)
