# SPDX-License-Identifier: Apache-2.0
"""The choice of a kernel's form: plain torch, or Triton on a GPU. Nothing else chooses by device.

The Triton forms run only with GRAFT_TRITON=1: tests run them in Triton's interpreter, and no GPU has run them yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})  # for the Triton forms, which sum in float32
CAPABILITY = (8, 0)  # the least that an NVIDIA GPU needs: the first with bfloat16

_forced: bool | None = None if os.environ.get("GRAFT_TRITON") == "1" else False


@cache
def has_triton(device: torch.device) -> bool:
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= CAPABILITY


def uses_triton(*tensors: Tensor) -> bool:
    """Say whether the Triton form serves these tensors, which stand on one device."""
    first = tensors[0]
    wanted = first.is_cuda and has_triton(first.device) if _forced is None else _forced
    return wanted and all(t.dtype in DTYPES for t in tensors)


@cache
def triton_form(name: str) -> ModuleType:
    """Import triton and return the module in `kernels/triton/` that goes with `graft.kernels.<…>`."""
    return import_module(name.replace("graft.kernels.", "graft.kernels.triton."))


def gathers(x: Tensor) -> bool:
    """Say whether products of few elements, picked by index, are cheaper than those of all."""
    return x.device.type == "cpu"


def form_for(plain: ModuleType, *tensors: Tensor) -> ModuleType:
    """Return `plain`, or the module with the Triton forms of its functions."""
    return triton_form(plain.__name__) if uses_triton(*tensors) else plain


@contextmanager
def force(triton: bool) -> Iterator[None]:
    """Run the Triton forms (in Triton's interpreter also on a CPU) or the plain ones, whatever the device."""
    global _forced
    before, _forced = _forced, triton
    try:
        yield
    finally:
        _forced = before
