# SPDX-License-Identifier: Apache-2.0
"""Riemannian preconditioning: gradients in the metric of B A."""

from __future__ import annotations

import inspect
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
        TypeError: the class is no optimizer's.
        ConfigError: no pair of A and B trains, or a step needs or gets a closure.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}.")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ConfigError(
            f"{optimizer_cls.__name__} requires a closure, which computes gradients again within a step. Only "
            "those before it would be in the metric of B A: choose an optimizer whose step() takes none."
        )
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
