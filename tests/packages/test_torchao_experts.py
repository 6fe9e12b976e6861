# SPDX-License-Identifier: Apache-2.0
"""Experts in torchao's NVFP4: LoRA as on the dequantized base, one matrix dense at a time."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

from graft.kernels import experts as kernel
from tests.storage.packed_experts import IDS, blocks, gpt_oss, made, mixtral
from tests.storage.test_packed_experts import adapted, merges_and_unmerges, results, same

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
    expected, model = results(adapted(dense)), adapted(packed)
    whole = NVFP4Tensor.dequantize
    monkeypatch.setattr(NVFP4Tensor, "dequantize", lambda t, *a: pytest.fail() if t.dim() > 2 else whole(t, *a))
    same(results(model), expected)
    monkeypatch.setattr(kernel, "BUDGET", 1)
    same(results(copy.deepcopy(model)), expected)
    with torch.no_grad():
        assert_close(model(IDS).logits, expected[1], rtol=1e-5, atol=1e-6)


def test_merging_keeps_what_it_says_and_gives_the_bits_back():
    merges_and_unmerges(pair(mixtral, True)[0])
