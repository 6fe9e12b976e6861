# SPDX-License-Identifier: Apache-2.0
"""Experts in torchao's NVFP4: LoRA as on the dequantized base, one matrix dense at a time."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

from graft.kernels import experts as kernel
from graft.storage import stacks
from tests.families import IDS
from tests.storage.packed_experts import blocks, gpt_oss, made, mixtral
from tests.storage.test_experts import holds_one_matrix, merges_and_unmerges, results, same, with_lora

NAMES = ("gate_up_proj", "down_proj")


def pair(make, outer):
    """Return a packed model and its dense twin."""
    packed, dense = made(make), made(make)
    for (_, m), (_, other) in zip(blocks(packed), blocks(dense)):
        for name in NAMES:
            W = getattr(m, name).data
            scale = per_tensor_amax_to_scale(W.abs().max()) if outer else None
            W = NVFP4Tensor.to_nvfp4(W, per_tensor_scale=scale)
            setattr(m, name, nn.Parameter(W, requires_grad=False))
            getattr(other, name).data = W.dequantize(torch.float32)
    return packed, dense


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
@pytest.mark.parametrize("outer", [False, True])
def test_values_and_gradients_are_those_of_the_dequantized_base(make, outer, monkeypatch):
    packed, dense = pair(make, outer)
    expected, model = results(with_lora(dense)), with_lora(packed)
    whole = NVFP4Tensor.dequantize
    monkeypatch.setattr(NVFP4Tensor, "dequantize", lambda t, *a: pytest.fail() if t.dim() > 2 else whole(t, *a))
    same(results(model), expected)
    monkeypatch.setattr(kernel, "BUDGET", 1)
    same(results(copy.deepcopy(model)), expected)
    with torch.no_grad():
        assert_close(model(IDS).logits, expected[1], rtol=1e-5, atol=1e-6)


def test_merging_keeps_what_it_says_and_gives_the_bits_back():
    merges_and_unmerges(pair(mixtral, True)[0])


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
@pytest.mark.parametrize("outer", [False, True])
def test_merging_has_one_matrix_dense_at_a_time(make, outer):
    holds_one_matrix(pair(make, outer)[0])


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
@pytest.mark.parametrize("outer", ["none", "one", "each"])
def test_packing_by_matrix_has_the_bits_of_the_package(make, outer):
    _, m = blocks(made(make))[0]
    for name in NAMES:
        W = getattr(m, name).data
        tops = W.abs().amax((1, 2), keepdim=True)
        scale = {"none": None, "one": per_tensor_amax_to_scale(tops.amax()), "each": per_tensor_amax_to_scale(tops)}
        expected = NVFP4Tensor.to_nvfp4(W, per_tensor_scale=scale[outer])
        setattr(m, name, nn.Parameter(NVFP4Tensor.to_nvfp4(W * 0.7, per_tensor_scale=scale[outer]), False))
        held = stacks.find_matrices(m, name)
        found = held.remake(lambda e, W=W, flipped=held.flipped: W[e].T if flipped else W[e]).weight
        assert torch.equal(found.qdata, expected.qdata) and torch.equal(found.scale.float(), expected.scale.float())
        assert found.dtype == expected.dtype and found.shape == expected.shape
