# SPDX-License-Identifier: Apache-2.0
"""aqlm: layers of additive codes."""

import os

import peft
import pytest
import torch
from aqlm.inference import QuantizedLinear
from torch.testing import assert_close

import graft
from graft.storage.find import find_store
from tests.models import disturb
from tests.storage.cells import IN, OUT, Kind, Net, cells, identity, linear

os.environ["NUMBA_NUM_THREADS"] = "1"  # threads of aqlm's kernel for 8 bits add to the same numbers at once


def coded(bits):
    def hold(layer):
        g = torch.Generator().manual_seed(0)
        made = QuantizedLinear(IN, OUT, 8, 1, 2, bits, bias=True, dtype=torch.float32)
        made.codebooks.data = torch.randn(made.codebooks.shape, generator=g) * layer.weight.std()
        made.codes.data = torch.randint(0, 2**bits, made.codes.shape, generator=g).to(made.codes.dtype)
        made.scales.data = torch.rand(made.scales.shape, generator=g) + 0.5
        made.bias = layer.bias
        return made.eval()

    return hold


FEW = ("LORA", "LORA-dora", "LOHA", "OFT", "HIRA", "IA3", "RANDLORA", "FOURIERFT")
CODES = "AQLM codes that were calibrated, and merging would quantize them anew"
KINDS = [Kind(f"{bits} bits", coded(bits), fixed=CODES, only=FEW) for bits in (8, 12)]
globals().update(cells(KINDS))


def test_a_first_call_rearranges_codes_and_nothing_else():
    layer = coded(8)(linear())
    W, before = find_store(layer).read(layer, "weight"), layer.codes.clone()
    assert torch.equal(layer.codes, before)
    assert_close(identity(layer), W)
    assert layer.codes.shape != before.shape
    assert torch.equal(find_store(layer).read(layer, "weight"), W)


CONFIGS = {"LORA": dict(r=4), "OFT": dict(oft_block_size=8), "VERA": dict(r=4), "MISS": dict(r=4)}


@pytest.mark.parametrize("method", CONFIGS)
def test_peft_computes_the_same(method):
    options = CONFIGS[method] | dict(target_modules=["layer"])
    ours = graft.get_peft_model(Net(coded(12)(linear())), graft.PEFT_TYPE_TO_CONFIG_MAPPING[method](**options))
    disturb(ours.eval())
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)](**options)
    theirs = peft.get_peft_model(Net(coded(12)(linear())), config).eval()
    assert not peft.set_peft_model_state_dict(theirs, graft.get_peft_model_state_dict(ours)).unexpected_keys
    found = []
    for model in (ours, theirs):
        x = torch.linspace(-1, 1, 3 * IN).view(3, IN).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        found.append((y, x.grad))
    assert_close(*found)
