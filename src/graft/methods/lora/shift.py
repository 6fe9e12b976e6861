# SPDX-License-Identifier: Apache-2.0
"""What an initialisation takes out of a base weight: kept with the adapter, and taken out of a fresh base on loading.

PiSSA, OLoRA, CorDA and LoRA-GA make W ← W - B A, LoftQ W ← Q(W - B A). The file holds A, B and a few values of the
weight before and after, so that the same base is made again without the data, the generator's state, or the same SVD;
and so that a base that has been changed so already is known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graft.core.errors import warn
from graft.core.place import Exact
from graft.methods.lora.choices import TITLES
from graft.methods.lora.quantized import quantized

NAME = "lora_shift"  # container
SAMPLES = 16
TOLERANCE = 2**-7  # relative: a base in half precision is the same base


class Shift(Exact):
    """B A of one layer, in float32: rounded, it would not make the same base again."""

    A: Tensor  # (k, in)
    B: Tensor  # (out, k), times the scaling
    sample: Tensor  # (2, n): evenly spaced values of the base weight before, and after

    def __init__(self, k: int, shape: tuple[int, ...], device: Any = None):
        super().__init__()
        out, fan_in = shape
        kind: Any = dict(device=device, dtype=torch.float32)
        self.register_buffer("A", torch.zeros(k, fan_in, **kind))
        self.register_buffer("B", torch.zeros(out, k, **kind))
        self.register_buffer("sample", torch.zeros(2, min(SAMPLES, out * fan_in), **kind))
        self.done = False  # the base has been changed
        self.before: tuple[Tensor, Tensor] | None = None  # A and B while a file's others are taking their place


def sample(W: Tensor) -> Tensor:
    """Return evenly spaced values of a matrix."""
    n = min(SAMPLES, W.numel())
    at = torch.arange(n, device=W.device) * (W.numel() // n)
    return W.detach()[at // W.shape[1], at % W.shape[1]].float()


def without(lora: Any, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return the weight that W (out, in) becomes."""
    wide = W.to(torch.promote_types(W.dtype, torch.float32))
    if len(A):
        wide = wide - B.to(wide) @ A.to(wide)
    if lora.cfg.init_lora_weights == "loftq":
        wide = quantized(wide, lora.cfg.loftq_config["loftq_bits"])
    return wide.to(W.dtype)


def take_out(lora: Any, A: Tensor, B: Tensor) -> None:
    """Change the base weight, and note that in the adapter."""
    layer, W = lora.layer, lora.layer.W0
    if len(layer.methods) > 1:
        title = title_of(lora)
        warn(
            f"{title} changes the base weights of the model and should thus not be used with other adapters. Consider "
            f"saving the {title} adapter as plain LoRA, with path_initial_model_for_weight_conversion."
        )
    before, changed = sample(W), without(lora, W, A, B)
    layer.rewrite_base(changed)
    if lora.keeps_shift:
        shift = lora.lora_shift
        shift.A, shift.B = A.detach().float(), B.detach().float()
        after = changed if layer.store.exact else layer.W0  # which has been rounded
        shift.sample, shift.done = torch.stack([before, sample(after)]), True


def title_of(lora: Any) -> str:
    how = lora.cfg.init_lora_weights
    return TITLES["pissa" if how.startswith("pissa") else how]


def near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * float(b.abs().max()))
