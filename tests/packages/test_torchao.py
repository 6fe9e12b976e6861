# SPDX-License-Identifier: Apache-2.0
"""torchao: the matrix of methods and its tensors, and the traps of layers that round their inputs."""

import copy

import torch
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

from tests.storage.cells import Kind, cells


def by(config):
    def hold(layer):
        made = copy.deepcopy(layer)
        quantize_(made, config)
        return made

    return hold


def nf4(layer):
    made = copy.deepcopy(layer)
    made.weight = nn.Parameter(to_nf4(layer.weight.data, 64, 160), requires_grad=False)
    return made


GROUPS = dict(weight_dtype=torch.int4, granularity=PerGroup(32))
DYNAMIC = Int8DynamicActivationInt8WeightConfig()
KINDS = [
    Kind("int8", by(Int8WeightOnlyConfig())),
    Kind("int8-dynamic", by(DYNAMIC), 2e-2, rounds_inputs=True),
    Kind("float8", by(Float8WeightOnlyConfig())),
    Kind("intx4", by(IntxWeightOnlyConfig(**GROUPS))),
    Kind("nf4", nf4),
]

tests = cells(KINDS)
test_reading, test_forward_and_gradients, test_merging, test_merging_into_a_dense_layer, test_files = tests
