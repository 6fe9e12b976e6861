# SPDX-License-Identifier: Apache-2.0
"""The dependence of a loss on each parameter, smoothed over steps (AdaLoRA, arXiv 2303.10512, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.storage.parallel import shape_of, whole


class Importance:
    """Smoothed sensitivity |p ∂p| of parameters, and its uncertainty."""

    def __init__(self, beta1: float, beta2: float):
        self.beta1, self.beta2 = beta1, beta2
        self.mean: dict[str, Tensor] = {}
        self.spread: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, name: str, p: Tensor) -> None:
        grad = p.grad
        if grad is None:
            return
        p = whole(p)
        now = (p * whole(grad)).abs()
        mean = self.mean.setdefault(name, torch.zeros_like(p))
        spread = self.spread.setdefault(name, torch.zeros_like(p))
        mean.mul_(self.beta1).add_(now, alpha=1 - self.beta1)
        spread.mul_(self.beta2).add_((now - mean).abs(), alpha=1 - self.beta2)

    def score(self, name: str, p: Tensor) -> Tensor:
        """Return the score of each element of `p`; 0 if it never had a gradient, as in an expert without tokens."""
        return self.mean[name] * self.spread[name] if name in self.mean else p.new_zeros(shape_of(p))
