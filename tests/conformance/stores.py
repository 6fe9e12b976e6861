# SPDX-License-Identifier: Apache-2.0
"""Weights that are not held as plain tensors: rounded ones, that can be read and written, or only read, or neither."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.core.ops import OPS
from graft.storage.find import STORES

STEPS = 2**15 - 1


class Coded(nn.Linear):
    """Holds its weight in steps of its largest value, in a way that no store knows."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.hold(self.weight.data)

    def hold(self, W: Tensor) -> None:
        self.step = 1.0 if W.is_meta else W.detach().abs().max().item() / STEPS
        rounded = (W.detach() / self.step).round().to(torch.int16)
        self.weight = nn.Parameter(rounded, requires_grad=False)

    def dense(self) -> Tensor:
        return self.weight * self.step

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense().to(x.dtype), self.bias)


class Rounded(Coded):
    pass


class ReadOnly(Rounded):
    pass


class Opaque(Rounded):
    pass


class RoundedStore:
    name = "rounded"
    exact = live = in_parts = False

    def why_unreadable(self, m, name):
        return None

    def why_unwritable(self, m, name):
        return None

    def bring_in(self, layer, written):
        return nullcontext()

    def read(self, m, name):
        return m.dense()

    def write(self, m, name, W, shared):
        assert not shared
        m.hold(W)

    def snapshot(self, m, name, shared):
        return m.weight.data.clone(), m.step

    def snapshot_values(self, m, name, state):
        weight, step = state
        return weight * step

    def restore(self, m, name, state):
        m.weight.data, m.step = state

    def where(self, m, name):
        return m.weight.device, None

    def protect(self, y):
        return y


class ReadOnlyStore(RoundedStore):
    name = "read-only"

    def why_unwritable(self, m, name):
        return "read-only weights cannot be rewritten"

    def write(self, *args):
        raise AssertionError("written")

    snapshot = restore = write


class OpaqueStore(ReadOnlyStore):
    name = "opaque"

    def why_unreadable(self, m, name):
        return "opaque weights cannot be read"

    why_unwritable = why_unreadable

    def read(self, *args):
        raise AssertionError("read")


for kind, store in ((Rounded, RoundedStore()), (ReadOnly, ReadOnlyStore()), (Opaque, OpaqueStore())):
    name = f"{kind.__module__}.{kind.__qualname__}"
    STORES.add(name, store)
    OPS.add(name, OPS.find(nn.Linear))  # used as a linear layer is


def held(layer: nn.Module, kind: type[Coded] = Rounded) -> nn.Module:
    """A linear layer with its weight held in another way."""
    made = kind(layer.in_features, layer.out_features, layer.bias is not None)
    made.hold(layer.weight)
    made.bias = layer.bias
    return made
