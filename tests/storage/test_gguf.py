# SPDX-License-Identifier: Apache-2.0
"""transformers' layers of GGUF blocks: the real class, with its kernels replaced by plain torch for Q8_0."""

import pytest
import torch
from torch import nn
from transformers.integrations.gguf import utils

from graft.storage.find import find_store
from tests.storage.cells import Kind, cells, linear

Q8_0, SIZE = 8, 32  # of a block: a scale in float16, and 32 integers of 8 bits


def unpacked(blocks):
    held = blocks.unflatten(1, (-1, 2 + SIZE))
    scales = held[..., :2].contiguous().view(torch.float16)
    return (held[..., 2:].contiguous().view(torch.int8) * scales.float()).flatten(1)


def held(layer):
    W = layer.weight.data.unflatten(1, (-1, SIZE))
    scales = (W.abs().amax(-1, keepdim=True) / 127).half()
    codes = (W / scales.float()).round().clamp(-127, 127).to(torch.int8)
    made = utils.GgufLinear(layer.in_features, layer.out_features, Q8_0, True)
    made.weight = nn.Parameter(torch.cat([scales.view(torch.uint8), codes.view(torch.uint8)], -1).flatten(1), False)
    made.bias = layer.bias
    return made


def permuted(layer):
    made = held(layer)
    made.input_permutation = torch.randperm(layer.in_features, generator=torch.Generator().manual_seed(0))
    return made


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    def product(blocks, x, *_):
        with torch.no_grad():
            return x.float() @ unpacked(blocks).T

    monkeypatch.setattr(utils, "mul_mat_vec", product)
    monkeypatch.setattr(utils, "dequantize_blocks", lambda blocks, kind, rows, cols, dtype: unpacked(blocks).to(dtype))


FEW = ("LORA", "LORA-dora", "LOHA", "OFT")
WHY = "its weight is GGUF blocks, and graft does not know how to write it"
KINDS = [Kind("Q8_0", held, fixed=WHY, only=FEW), Kind("Q8_0, inputs in another order", permuted, fixed=WHY, only=FEW)]
globals().update(cells(KINDS))


def test_the_order_of_the_inputs_is_part_of_the_weight():
    layer = permuted(linear())
    W = torch.empty(96, 320)
    W[:, layer.input_permutation] = unpacked(layer.weight)
    assert torch.equal(find_store(layer).read(layer, "weight"), W)
