# SPDX-License-Identifier: Apache-2.0
"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation, arXiv 2407.05000."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graft.core.errors import CalibrationError
from graft.methods.lora.start import Start

GRADIENT = "_peft_loraga_grad"  # attribute of a base layer, as in PEFT


def start(lora: Any, W: Tensor) -> Start:
    """Return singular vectors of the gradient: some of the first 2r for A, some for B."""
    site, r, s, cfg = lora.site, lora.cfg.r, lora.scaling, lora.cfg.lora_ga_config
    module = site.module
    if GRADIENT not in module.__dict__:
        raise CalibrationError(
            f"There is no gradient for layer '{site.key}' (adapter '{lora.name}'): call preprocess_loraga with this "
            "model and config before."
        )
    G = module.__dict__.pop(GRADIENT)
    lora.layer.on_rollback(lambda: setattr(module, GRADIENT, G))
    G = site.op.canon(G).to(W)
    if G.shape != W.shape:
        raise CalibrationError(
            f"The gradient for layer '{site.key}' is {tuple(G.shape)}, and the weight {tuple(W.shape)}: it was "
            "estimated with another model."
        )
    U, S, V = torch.svd_lowrank(G, q=min(4 * r, *G.shape), niter=4)
    for_A, for_B = directions(cfg.direction, r)
    A, B = V.T[for_A], U[:, for_B] * S[for_B]
    if cfg.scale == "stable":
        B = B * (len(W) ** 0.25 / cfg.stable_gamma**0.5)
    elif cfg.scale == "weight_svd":
        largest = torch.svd_lowrank(W, q=r, niter=4)[1][0]
        first = S[for_B][0]
        B = B * (largest / first) if first > 0 else B
    elif cfg.scale == "gd_scale":
        A, B = A / s, B / s
    dtype = lora.layer.W0.dtype
    return Start.of(A.to(dtype).float(), B.to(dtype).float(), s)  # rounded as the adapter will be


def directions(how: str, r: int) -> tuple[Tensor, Tensor]:
    """Return which of 2r singular vectors A and B take."""
    both = torch.arange(2 * r)
    if how == "random":
        chosen = torch.randperm(2 * r)[:r]
        return chosen, chosen
    return {
        "ArBr": (both[1::2], both[0::2]),
        "A2rBr": (both[r:], both[:r]),
        "ArB2r": (both[:r], both[r:]),
    }[how]
