# SPDX-License-Identifier: Apache-2.0
"""LoRA-FA: only B learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from graft.core.errors import ConfigError
from graft.optim.pairs import gram, pairs


class LoraFAOptimizer(Optimizer):
    """Adam with a projected gradient of B, which follows that of ΔW as far as the fixed A allows."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        factors: dict[nn.Parameter, tuple[nn.Parameter, float]] | None = None,
    ):
        if lr < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"lr and eps must be ≥ 0 and betas from 0 to below 1, got {lr}, {eps} and {betas}.")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.factors = factors or {}  # B → A, scaling

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        g: Any = p.grad
        if p in self.factors:
            A, scaling = self.factors[p]
            g = (g.flatten(1).float() @ gram(A.flatten(1), 1e-8) / scaling**2).view_as(p).to(p.dtype)
        state, (b1, b2) = self.state[p], group["betas"]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        m, v, t = state["exp_avg"], state["exp_avg_sq"], state["step"]
        m.lerp_(g, 1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-group["lr"] * (1 - b2**t) ** 0.5 / (1 - b1**t))
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])


def create_lorafa_optimizer(
    model: nn.Module,
    r: int | None = None,
    lora_alpha: float | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFAOptimizer:
    """Make an optimizer for LoRA-FA (arXiv 2308.03303). Freeze A at once: no layer keeps its input for A's gradient.

    Args:
        r, lora_alpha, use_rslora: without effect, for callers of PEFT; each layer has its own scaling.
    """
    found = list(pairs(model))
    for A, _, _ in found:
        A.requires_grad_(False)
    factors = {B: (A, scaling) for A, B, scaling in found}
    return LoraFAOptimizer(
        [p for p in model.parameters() if p.requires_grad], lr, weight_decay=weight_decay, factors=factors
    )
