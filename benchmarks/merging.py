# SPDX-License-Identifier: Apache-2.0
"""Merging into the base weights and taking out again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.measure import Bench, Goal, Turns
from benchmarks.models import SCALING, lora, randomize, smollm


def ready(lib: Any, base: nn.Module) -> Any:
    return randomize(lib.get_peft_model(base, lora(lib)))


def merge(lib: Any) -> Turns:
    model = ready(lib, smollm())
    while True:
        yield model.merge_adapter
        model.unmerge_adapter()


def unmerge(lib: Any) -> Turns:
    model = ready(lib, smollm())
    while True:
        model.merge_adapter()
        yield model.unmerge_adapter


def merge_and_unload(lib: Any) -> Turns:
    base = smollm()
    while True:
        model = ready(lib, base)
        yield model.merge_and_unload


@torch.no_grad()
def addmm() -> Turns:
    """W + s B A, in place, for each layer."""
    layers = [m.weight for m in smollm().modules() if isinstance(m, nn.Linear)]
    pairs = [(torch.randn(16, W.shape[1]) * 0.02, torch.randn(W.shape[0], 16) * 0.02) for W in layers]

    def update() -> None:
        with torch.no_grad():
            for W, (A, B) in zip(layers, pairs):
                W.addmm_(B, A, alpha=SCALING)

    while True:
        yield update


# k: of the floor, a twentieth each to read the factors in search of values that are not finite, to find, check and note
# 210 layers, and to put base layers back; a seventh to copy the factors, for unmerging, into memory that is new
BENCHES = [
    Bench("merge_adapter (floor: addmm_)", merge, Goal(1, 1.25), addmm),
    Bench("unmerge_adapter", unmerge, Goal(1, 1.1), addmm, long=True),
    Bench("merge_and_unload", merge_and_unload, Goal(1, 1.15), addmm, long=True),
]
