# SPDX-License-Identifier: Apache-2.0
"""Ops against the modules whose functions they are."""

from math import prod

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from graft.core.ops import OPS, UNKNOWN, Conv, Embedding, Linear, find_op
from tests.conformance.samples import LAYERS, Cell
from tests.models import seeded

PLACES = [layer for layer in LAYERS if layer.name != "norm"]
places = pytest.mark.parametrize("place", PLACES, ids=str)


def made(place):
    """A layer, its op, an input."""
    with seeded(0):
        module = place.make()
    return module, find_op(module), Cell(None, place, None).inputs(3)


def weight(op, module):
    return op.canon(module.weight)


@places
def test_dims_and_shape_are_those_of_the_canonical_weight(place):
    module, op, _ = made(place)
    W = weight(op, module)
    assert tuple(op.shape(module)) == tuple(W.shape)
    out, inside = op.dims(module)
    assert out == W.shape[0]
    assert inside == W.shape[1] * getattr(module, "groups", 1)


@places
def test_uncanon_undoes_canon(place):
    module, op, _ = made(place)
    assert torch.equal(op.uncanon(weight(op, module)), module.weight)


@places
def test_call_with_its_own_weight_is_the_module(place):
    module, op, x = made(place)
    y = op.call(module, x, weight(op, module), getattr(module, "bias", None))
    assert_close(y, module(x))


@places
def test_call_is_linear_in_the_weight(place):
    module, op, x = made(place)
    W = weight(op, module)
    b = getattr(module, "bias", None)
    D = torch.randn_like(W)
    assert_close(op.call(module, x, W + D, b), module(x) + op.call(module, x, D, None), rtol=1e-5, atol=1e-5)


@places
def test_up_after_down_is_a_call_with_the_product(place):
    module, op, x = made(place)
    shape = op.shape(module)
    if not op.factorable(module):
        assert module.groups > 1
        return
    A, B = torch.randn(3, prod(shape[1:])), torch.randn(shape[0], 3)
    expected = op.call(module, x, (B @ A).view(shape), None)
    assert_close(op.up(module, op.down(module, x, A), B), expected, rtol=1e-4, atol=1e-4)


@places
def test_channels_lines_up_a_vector_with_the_output(place):
    module, op, x = made(place)
    W = weight(op, module)
    v = torch.randn(W.shape[0])
    scaled = W * v.view(-1, *[1] * (W.dim() - 1))
    assert_close(op.call(module, x, W, None) * op.channels(v), op.call(module, x, scaled, None), rtol=1e-5, atol=1e-5)


@places
@pytest.mark.parametrize("bias", [False, True])
def test_factor_modules_compose_to_a_low_rank_update(place, bias):
    module, op, x = made(place)
    pair = op.factor_modules(module, 4, bias)
    if op.takes_ids:
        assert pair is None
        return
    down, up = pair
    assert down.bias is None and (up.bias is not None) == bias
    assert up(down(x)).shape == module(x).shape
    if op.factorable(module):
        A, B = down.weight.flatten(1), up.weight.flatten(1)
        expected = op.call(module, x, (B @ A).view(op.shape(module)), up.bias)
        assert_close(up(down(x)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.differs("HRA, LoRA on a dilated or reflect-padded convolution")
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 1, (1, 2), "same", "valid"], ids=str)
def test_every_way_to_pad(padding, padding_mode):
    module = nn.Conv2d(2, 3, (3, 2), padding=padding, padding_mode=padding_mode, dilation=(1, 2))
    x = torch.randn(2, 2, 6, 7)
    assert_close(find_op(module).call(module, x, module.weight, module.bias), module(x))


@pytest.mark.parametrize("place", [p for p in PLACES if "conv" in p.traits.split()], ids=str)
def test_an_image_without_a_batch(place):
    module, op, x = made(place)
    assert_close(op.call(module, x[0], weight(op, module), module.bias), module(x[0]))


@pytest.mark.parametrize("options", [dict(padding_idx=1), dict(max_norm=0.5), dict(sparse=True)], ids=str)
def test_embedding_options_are_kept(options):
    module = nn.Embedding(7, 3, **options)
    ids = torch.tensor([[0, 1, 6], [1, 1, 2]])
    mine = module.weight.detach().clone().requires_grad_()
    y = OPS.find(nn.Embedding).call(module, ids, mine.T, None)
    expected = module(ids)
    assert_close(y, expected)
    weight = torch.randn(2, 3, 3)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_close(mine.grad.to_dense(), module.weight.grad.to_dense())


def test_which_op_a_module_gets():
    class Own(nn.Linear):
        pass

    assert type(find_op(Own(2, 3))) is Linear
    assert type(find_op(nn.Embedding(2, 3))) is Embedding
    assert type(find_op(nn.Conv1d(2, 3, 1))) is Conv
    assert [find_op(m) for m in (nn.LayerNorm(2), nn.ReLU(), nn.Sequential(), nn.Bilinear(2, 2, 2))] == [UNKNOWN] * 4


@pytest.mark.parametrize("scale", [3.0, 2, torch.tensor(3.0), torch.tensor([3.0])], ids=repr)
def test_an_embedding_that_scales_its_output(scale):
    class Scaled(nn.Embedding):
        embed_scale = scale

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    module, ids = Scaled(7, 3), torch.tensor([[1, 2]])
    op = find_op(module)
    assert_close(op.call(module, ids, module.weight.T, None), module(ids))
    A, B = torch.randn(2, 7), torch.randn(3, 2)
    assert_close(op.up(module, op.down(module, ids, A), B), op.call(module, ids, B @ A, None))


def test_a_scale_that_is_no_number_is_left_alone():
    module = nn.Embedding(7, 3)
    module.embed_scale = torch.ones(3)
    assert type(find_op(module)) is Embedding
