# SPDX-License-Identifier: Apache-2.0
"""CorDA: Context-Oriented Decomposition Adaptation, arXiv 2406.05223."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graft.core.errors import CalibrationError
from graft.methods.lora.start import Start

EIGENS = "eigens"  # attribute of a base layer, as in PEFT
DAMP, GOOD_ENOUGH = 0.01, 0.05


@dataclass
class CordaEigens:
    """r singular triples of W C, with C⁻¹ multiplied back: W ≈ U diag(S) Vᵀ on inputs like those behind C."""

    S_WC: Tensor  # (r,)
    U_WC: Tensor  # (out, r)
    V_WC: Tensor  # (in, r)


def start(lora: Any, W: Tensor) -> Start:
    """Return the triples that `preprocess_corda` has chosen, with an even share for A and B."""
    site, r, s = lora.site, lora.cfg.r, lora.scaling
    module = site.module
    if EIGENS not in module.__dict__:
        raise CalibrationError(
            f"`eigens` attribute not found for layer '{site.key}', please run `preprocess_corda` first, with this "
            f"model and config (adapter '{lora.name}')."
        )
    eigens = module.__dict__.pop(EIGENS)
    lora.layer.on_rollback(lambda: setattr(module, EIGENS, eigens))
    S, U, V = (t.to(W) for t in (eigens.S_WC, eigens.U_WC, eigens.V_WC))
    wanted = {"S": (r,), "U": (len(W), r), "V": (W.shape[1], r)}
    for name, t in dict(S=S, U=U, V=V).items():
        if t.shape != wanted[name]:
            raise CalibrationError(
                f"Matrix {name} size mismatch: {tuple(t.shape)} vs. {wanted[name]} on layer '{site.key}'. "
                "`preprocess_corda` and `get_peft_model` need the same model and rank; so does a cache file."
            )
        if not t.isfinite().all():
            raise CalibrationError(f"Invalid value found in matrix {name} for layer '{site.key}': NaN or infinite.")
    root = (S / s).sqrt()
    return Start.of(root[:, None] * V.T, U * root, s)


@torch.no_grad()
def eigens_of(W: Tensor, C: Tensor, r: int, method: str, key: str) -> CordaEigens:
    """Decompose W C, W (out, in), C (in, in); keep the r largest triples (ipm) or the smallest (kpm).

    Raises:
        CalibrationError: C is zero or not finite.
    """
    W, C = W.float(), C.float()
    mean = C.diagonal().mean()
    if not (C.isfinite().all() and mean > 0):
        raise CalibrationError(f"The inputs of layer '{key}' are all zero, or not finite: there is no covariance.")
    one, damp = torch.eye(len(C), device=C.device), DAMP
    while True:
        damped = C + damp * mean * one
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, one) < GOOD_ENOUGH:
            break
        damp *= 2
    U, S, Vh = torch.linalg.svd(W @ damped, full_matrices=False)
    V = (Vh @ inverse).T
    kept = slice(r) if method == "ipm" else slice(len(S) - r, None)
    return CordaEigens(S[kept].clone(), U[:, kept].clone(), V[:, kept].clone())
