# SPDX-License-Identifier: Apache-2.0
"""The matrix method × packed storage on a stand-in of our own; real packages have theirs in tests/packages."""

import torch
from torch import nn

from graft.core.ops import OPS, Linear
from graft.storage.find import STORES
from graft.storage.quantized import Quantized
from tests.storage.cells import FEW, Kind, cells


class Eight(nn.Module):
    """A linear layer in eight bits, a scale for each row; no `weight`."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.codes, self.scale = coded(layer.weight.data)
        self.bias = layer.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.codes * self.scale, self.bias)


class Calibrated(Eight):
    pass


def coded(W):
    scale = W.abs().amax(1, keepdim=True) / 127
    return (W / scale).round().to(torch.int8), scale


class EightStore(Quantized):
    name = "eight"
    parts = ("codes", "scale")

    def values(self, m):
        return m.codes * m.scale

    def pack(self, m, W):
        return dict(zip(self.parts, coded(W)))

    def compute_dtype(self, m):
        return m.scale.dtype


class CalibratedStore(EightStore):
    calibrated = "its weight is codes that were calibrated"


for kind, store in ((Eight, EightStore()), (Calibrated, CalibratedStore())):
    row = f"{kind.__module__}.{kind.__qualname__}"
    STORES.add(row, store)
    OPS.add(row, Linear())

# all samples: test_calibrated.py, test_float8.py
globals().update(cells([Kind("eight", Eight), Kind("calibrated", Calibrated, fixed="codes that were calibrated")], FEW))
