# SPDX-License-Identifier: Apache-2.0
"""Riemannian preconditioning: gradients in the metric of B A."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from graft.core.errors import ConfigError
from graft.optim.pairs import gram, pairs


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 0.01, **kwargs: Any
) -> Optimizer:
    """Make an optimizer for Riemannian preconditioned LoRA (arXiv 2402.02347), with gradients in the metric of B A.

    Before each step g_A ← (BᵀB + reg)⁺ g_A and g_B ← g_B (AAᵀ + reg)⁺.

    Raises:
        ConfigError: no pair of A and B trains, or a step gets a closure.
    """
    both = [(A, B) for A, B, _ in pairs(model) if A.requires_grad and B.requires_grad and A.ndim == 2]
    if not both:
        raise ConfigError("create_riemannian_optimizer did not find any trainable lora_A/lora_B parameter pairs.")
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)  # type: ignore[call-arg]

    @torch.no_grad()
    def precondition(_: Any, inputs: tuple, options: dict[str, Any]) -> None:
        if len(inputs) > 1 or options.get("closure") is not None:  # a closure would compute other gradients
            raise ConfigError("An optimizer with Riemannian preconditioning does not support closures.")
        for A, B in both:
            if A.grad is not None and B.grad is not None:
                a, b = gram(B.T, reg) @ A.grad.float(), B.grad.float() @ gram(A, reg)
                A.grad.copy_(a)
                B.grad.copy_(b)

    optimizer.register_step_pre_hook(precondition)
    return optimizer
