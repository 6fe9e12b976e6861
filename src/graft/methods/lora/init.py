# SPDX-License-Identifier: Apache-2.0
"""LoRA's initialisations: kaiming (arXiv 2106.09685), gaussian, orthogonal, OLoRA (2406.01775), PiSSA (2404.02948).

A function here fills A (r, in) and B (out, r). One that starts from the base weight W takes its part out of W, so that
W + scaling · B A stays as it was.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from graft.core.errors import ConfigError, PeftWarning, shortened, warn
from graft.core.random import kaiming_bound

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def changes_base(how: bool | str) -> bool:
    return isinstance(how, str) and (how == "olora" or how.startswith("pissa"))


def initialise(lora: Any, how: bool | str) -> None:
    A, B = (p.data for p in lora.pair)
    op = lora.site.op
    if lora.lora_bias and how is not False:
        lora.lora_B.bias.data.zero_()
    if op.takes_ids:
        if isinstance(how, str):
            text = f"init_lora_weights={how!r} has no meaning for the embedding '{lora.site.key}': default used."
            warn(text, PeftWarning)
        if how is not False:
            A.zero_()
            B.normal_()
    elif how is True:
        _plain(A, B)
    elif how is False:
        pass  # the modules of A and B have initialised themselves
    elif how.lower() == "gaussian":
        A.normal_(std=1 / A.shape[0])
        B.zero_()
    elif A.dim() > 2 or not (how in ("orthogonal", "olora") or how.startswith("pissa")):
        raise ConfigError(
            f"Unknown initialization init_lora_weights='{how}' for layer '{lora.site.key}'. Known ones: True, "
            "False, gaussian and, for linear layers, orthogonal, olora, pissa, pissa_niter_[number]."
        )
    elif how == "orthogonal":
        _orthogonal(A, B)
    else:
        _from_weight(lora, how, A, B)


def _plain(A: Tensor, B: Tensor) -> None:
    bound = kaiming_bound(A[0].numel())
    A.uniform_(-bound, bound)
    B.zero_()


def _orthogonal(A: Tensor, B: Tensor) -> None:
    """Build A's rows and B's columns on orthogonal halves of one random basis, so that B A = 0."""
    r = A.shape[0]
    if r % 2:
        raise ConfigError(f"Orthogonal initialization requires the LoRA rank to be even, got {r} instead.")
    Q, _ = torch.linalg.qr(torch.randn(r, r))
    odd, even = Q[0::2], Q[1::2]  # (r/2, r) each
    A.copy_((torch.randn(A.shape[1], r // 2) @ odd).T / 10)
    B.copy_((torch.randn(r // 2, B.shape[0]).T @ even) / 10)


@torch.no_grad()
def _from_weight(lora: Any, how: str, A: Tensor, B: Tensor) -> None:
    layer, r, s = lora.layer, A.shape[0], lora.scaling
    if s <= 0 or r > min(B.shape[0], A.shape[1]):
        raise ConfigError(
            f"init_lora_weights={how!r} needs a positive lora_alpha and a rank that the weight of '{layer.site.key}' "
            f"can have, at most {min(B.shape[0], A.shape[1])}: r={r}, lora_alpha={lora.cfg.lora_alpha}."
        )
    W = layer.W0
    if lora.site.on_meta:
        layer.rewrite_base(W)  # warns: there are no values to start from
        _plain(A, B)
        return
    if W.dtype not in FLOATS:
        name = "OLoRA" if how == "olora" else "PiSSA"
        raise TypeError(
            f"Please initialize {name} under float32, float16, or bfloat16 (layer '{layer.site.key}' is {W.dtype}). "
            "A quantized base can be quantized again afterwards."
        )
    wide = W.float()
    new_A, new_B = _olora(wide, r) if how == "olora" else _pissa(wide, r, s, how)
    A.copy_(new_A)
    B.copy_(new_B)
    layer.rewrite_base((wide - (s * new_B) @ new_A).to(W.dtype))


def _olora(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(W)
    return R[:r], Q[:, :r]


def _pissa(W: Tensor, r: int, s: float, how: str) -> tuple[Tensor, Tensor]:
    """Return A and B: the r largest singular triples of W, with an even share for each."""
    if how == "pissa":
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U, S, Vh = U[:, :r], S[:r], Vh[:r]
    elif match := re.fullmatch(r"pissa_niter_(\d+)", how):
        if len(match[1]) > 3:
            raise ConfigError(f"init_lora_weights='{shortened(how)}' asks for too many iterations: 999 is the most.")
        U, S, V = torch.svd_lowrank(W, r, niter=int(match[1]))
        Vh = V.T
    else:
        raise ConfigError(
            f"init_lora_weights should be 'pissa' or 'pissa_niter_[number of iters]', got '{how}' instead."
        )
    root = (S / s).sqrt()
    return root[:, None] * Vh, U * root
