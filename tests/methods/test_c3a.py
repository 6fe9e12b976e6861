# SPDX-License-Identifier: Apache-2.0
"""C3A: what PEFT gets right of its gradients, and adapters that act at once."""

import pytest
import torch
from torch import nn

import graft
from tests import models
from tests.pair import LIBS, close


def made(lib, adapters=("a",), width=(8, 8), **options):
    models.seed(0)
    base = nn.Sequential(nn.Linear(*width))
    config = lib.C3AConfig(**{"target_modules": ["0"], "block_size": 4, "init_weights": "gaussian"} | options)
    model = lib.get_peft_model(base, config, adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(adapters))
    return model, model.base_model.model[0]


def test_the_gradient_of_the_kernel_is_pefts():
    found = []
    for lib in LIBS:
        model, layer = made(lib, width=(12, 20))
        x = torch.linspace(-1, 1, 60).view(5, 12)
        model(x).square().sum().backward()
        found.append(layer.c3a_kernel["a"].grad)
    close(*found)


@pytest.mark.differs("C3A: gradients")
def test_the_gradient_of_the_input_is_a_derivative():
    model, _ = made(graft)
    x = torch.linspace(-1, 1, 24).double().view(3, 8).requires_grad_()
    assert torch.autograd.gradcheck(model.double(), (x,))


@pytest.mark.differs("two C3A adapters at once")
@pytest.mark.parametrize("width", [(8, 8), (12, 20)])
def test_adapters_act_on_one_input(width):
    """In PEFT each acts on the output of the one before it: only as merged if there is one."""
    model, layer = made(graft, ("a", "b"), width)
    x = torch.linspace(-1, 1, 5 * width[0]).view(5, width[0])
    deltas = sum(layer.get_delta_weight(name) for name in "ab")
    both = model(x)
    close(both, layer.base_layer(x) + x @ deltas.T)
    model.merge_adapter()
    close(model(x), both)


def test_the_pattern_reaches_modules_at_the_top():
    _, layer = made(graft, block_size_pattern={"0": 2})
    assert layer.block_size == {"a": 2} and layer.c3a_kernel["a"].shape == (4, 4, 2)
