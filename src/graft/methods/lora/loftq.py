# SPDX-License-Identifier: Apache-2.0
"""LoftQ: LoRA-Fine-Tuning-Aware Quantization, arXiv 2310.08659.

The base weight becomes Q, quantized values in its own dtype, and A, B begin with the loss: Q + s · B A ≈ W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graft.core.errors import ConfigError
from graft.core.method import Method
from graft.methods.lora.start import Start
from graft.methods.lora.sub_configs import LoftQConfig

NF4 = (  # quantiles of a normal distribution, QLoRA (arXiv 2305.14314), appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64  # values that share a scale


def round_to_bits(W: Tensor, bits: int) -> Tensor:
    """Return W (out, in) rounded to quantized values, in its own dtype: NF4 (`nf4`) for 4 bits, else `int8`."""
    return nf4(W) if bits == 4 else int8(W)


def nf4(W: Tensor) -> Tensor:
    """Return W with each value rounded to the nearest of 16 NF4 codes, times the largest absolute value in its block of
    64.

    Blocks run over the flattened weight; the last is padded with zeros. Blocks of zeros stay zeros. Shape and dtype are
    W's.
    """
    codes = torch.tensor(NF4, device=W.device, dtype=W.dtype)
    flat = W.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    unit = blocks / scale.clamp(min=torch.finfo(W.dtype).tiny)
    between = (codes[1:] + codes[:-1]) / 2
    return (codes[torch.bucketize(unit, between)] * scale).view(-1)[: len(flat)].view(W.shape)


def int8(W: Tensor) -> Tensor:
    """Return W (out, in) rounded to multiples of 1/127 of the largest absolute value in each row.

    Rows of zeros stay zeros.
    """
    scale = W.abs().amax(1, keepdim=True) / 127
    return (W / scale.clamp(min=torch.finfo(W.dtype).tiny)).round() * scale


def start(lora: Method, W: Tensor) -> Start:
    """Return the `Start` of LoftQ for W (out, in): A and B of `alternate`, each divided by √scaling, and the product to
    subtract before W is quantized.

    Raises:
        ConfigError: the layer holds a quantized weight already.
    """
    if not lora.layer.store.exact:
        raise ConfigError(
            f"LoftQ quantizes the base itself, and layer '{lora.site.key}' is quantized already. Pass the model as it "
            "was before, or use replace_lora_weights_loftq."
        )
    cfg = lora.cfg.loftq_config
    _, A, B, taken_A, taken_B = alternate(W, cfg["loftq_bits"], lora.cfg.r, cfg["loftq_iter"])
    root = lora.scaling**0.5
    return Start(A / root, B / root, taken_A, taken_B)


@torch.no_grad()
def loftq_init(weight: Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q (out, in), A (r, in) and B (out, r) with Q + B A ≈ weight (out, in): LoftQ's `num_iter` rounds, computed
    in float32.

    Q has the weight's dtype, A and B are float32. r is `reduced_rank`, at most the smaller side of the weight.

    Raises:
        ConfigError: `num_bits` is neither 4 nor 8, or `num_iter` is less than 1.
    """
    LoftQConfig(num_bits, num_iter)
    Q, A, B, _, _ = alternate(weight.float(), num_bits, reduced_rank, num_iter)
    return Q.to(weight.dtype), A, B


def alternate(W: Tensor, bits: int, r: int, rounds: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return Q (out, in), A (r, in), B (out, r), and the A and B that were subtracted before Q was quantized.

    `rounds` times: quantize W - B A to Q, then decompose W - Q into B A. The first round subtracts nothing: its A (0,
    in) and B (out, 0) are empty.
    """
    A, B = W.new_zeros(0, W.shape[1]), W.new_zeros(W.shape[0], 0)
    for _ in range(rounds):
        taken_A, taken_B = A, B
        Q = round_to_bits(W - taken_B @ taken_A if len(taken_A) else W, bits)
        A, B = decompose(W - Q, r)
    return Q, A, B, taken_A, taken_B


def decompose(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r), with B A the best approximation of rank r of W; each has the roots of the
    singular values. With r above the smaller side of W, they have that many rows and columns.
    """
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S[:r].sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root
