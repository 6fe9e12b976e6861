# SPDX-License-Identifier: Apache-2.0
"""PiSSA: Principal Singular Values and Singular Vectors Adaptation, arXiv 2404.02948."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from graft.core.errors import ConfigError, shortened
from graft.methods.lora.start import Start


def start(lora: Any, W: Tensor) -> Start:
    """Return the r largest singular triples of W, with an even share for A and B."""
    how, r, s = lora.cfg.init_lora_weights, lora.cfg.r, lora.scaling
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
    return Start.of(root[:, None] * Vh, U * root, s)
