# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes: layers of 4 and 8 bits."""

import bitsandbytes as bnb
import torch
from torch import nn

from graft.storage import find_store


def test_a_layer_of_4_bits_is_not_dense():
    layer = bnb.nn.Linear4bit(64, 32)
    layer.weight = bnb.nn.Params4bit(torch.randn(32, 64), requires_grad=False).to("cpu")
    assert isinstance(layer, nn.Linear) and find_store(layer).name != "dense"
