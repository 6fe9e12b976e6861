# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes: layers of 4 and 8 bits."""

from functools import partial

import bitsandbytes as bnb
import torch

from tests.storage.cells import Kind, cells


def four(layer, kind="nf4", nested=False, compute=None, storage=torch.uint8):
    m = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compute, nested, kind, quant_storage=storage
    )
    m.weight = bnb.nn.Params4bit(
        layer.weight.data.clone(), False, compress_statistics=nested, quant_type=kind, quant_storage=storage, module=m
    )
    m.bias = layer.bias
    return m.to("cpu")


def eight(layer, threshold=6.0, trains=False):
    m = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, False, threshold)
    m.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False)
    m.bias = layer.bias
    m = m.to("cpu")
    if trains:  # it then computes with the dequantized weight, and does not round its inputs
        m.train = lambda mode=True: m
    return m


KINDS = [
    Kind("nf4", four),
    Kind("fp4", partial(four, kind="fp4")),
    Kind("nested", partial(four, nested=True)),
    Kind("bf16", partial(four, compute=torch.bfloat16), tolerance=5e-2),
    Kind("fp16", partial(four, compute=torch.float16), tolerance=5e-2),
    Kind("int8", eight, tolerance=0.12),  # rounds its inputs
    Kind("int8-training", partial(eight, trains=True)),
]
tests = cells(KINDS)
test_reading, test_forward_and_gradients, test_merging, test_merging_into_a_dense_layer, test_files = tests
