# SPDX-License-Identifier: Apache-2.0
"""LoftQ: LoRA-Fine-Tuning-Aware Quantization, arXiv 2310.08659.

The base weight becomes Q, quantized values in its own dtype, and A, B begin with what is lost: Q + s · B A ≈ W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graft.core.errors import ConfigError
from graft.methods.lora.quantized import quantized
from graft.methods.lora.start import Start
from graft.methods.lora.start_configs import LoftQConfig


def start(lora: Any, W: Tensor) -> Start:
    """Quantize W, and decompose what that loses, in turns."""
    if not lora.layer.store.exact:
        raise ConfigError(
            f"LoftQ quantizes the base itself, and layer '{lora.site.key}' is quantized already: pass the model as it "
            "was before, or use replace_lora_weights_loftq."
        )
    cfg = lora.cfg.loftq_config
    _, A, B, taken_A, taken_B = alternate(W, cfg["loftq_bits"], lora.cfg.r, cfg["loftq_iter"])
    root = lora.scaling**0.5
    return Start(A / root, B / root, taken_A, taken_B)


@torch.no_grad()
def loftq_init(weight: Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q (out, in), A (r, in) and B (out, r) with Q + B A ≈ weight (out, in).

    Raises:
        ConfigError: `num_bits` is neither 4 nor 8, or `num_iter` is less than 1.
    """
    LoftQConfig(num_bits, num_iter)
    Q, A, B, _, _ = alternate(weight.float(), num_bits, reduced_rank, num_iter)
    return Q.to(weight.dtype), A, B


def alternate(W: Tensor, bits: int, r: int, rounds: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantize W less B A, and decompose what that loses into B A, in turns; return Q, A, B and the A, B behind Q."""
    A, B = W.new_zeros(0, W.shape[1]), W.new_zeros(W.shape[0], 0)
    for _ in range(rounds):
        taken_A, taken_B = A, B
        Q = quantized(W - taken_B @ taken_A if len(taken_A) else W, bits)
        A, B = decomposed(W - Q, r)
    return Q, A, B, taken_A, taken_B


def decomposed(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) whose product is nearest to W, each with the roots of the singular values."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S[:r].sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root
