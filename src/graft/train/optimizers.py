# SPDX-License-Identifier: Apache-2.0
"""Optimizers that know which matrix of LoRA is which."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graft.core.errors import ConfigError
from graft.core.layer import AdapterLayer


def pairs(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter, float]]:
    """A, B and scaling of each LoRA adapter on a layer that is no embedding."""
    for layer in model.modules():
        if isinstance(layer, AdapterLayer) and "lora_A" in layer.holders and isinstance(layer.lora_A, nn.ModuleDict):
            Bs: Any = layer.lora_B
            for name, A in layer.lora_A.items():
                yield A.weight, Bs[name].weight, layer.scaling[name]  # type: ignore[misc]


def gram(factor: Tensor, damping: float) -> Tensor:
    """(factor factorᵀ + damping · 1)⁺ of a matrix (r, n), in float32."""
    factor = factor.float()
    return torch.linalg.pinv(factor @ factor.T + damping * torch.eye(len(factor), device=factor.device))


# LoRA+


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """LoRA+ (arXiv 2402.12354): B learns `loraplus_lr_ratio` times as fast as A.

    One-dimensional parameters learn with B, all others with A; biases and layer norms do not decay.

    Args:
        loraplus_weight_decay: of all others (0).
        loraplus_lr_embedding: learning rate of adapters on embeddings (1e-6).
        kwargs: for the optimizer.
    """
    decay, lr_embedding = kwargs.pop("loraplus_weight_decay", 0.0), kwargs.pop("loraplus_lr_embedding", 1e-6)
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters(recurse=False)}
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B without decay": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if "lora_embedding_" in name:
            groups["embedding"].append(p)
        elif "lora_B" not in name and p.ndim > 1:
            groups["A"].append(p)
        else:
            groups["B without decay" if "bias" in name or id(p) in norms else "B"].append(p)
    fast = lr * loraplus_lr_ratio
    rates = {"A": (lr, decay), "embedding": (lr_embedding, decay), "B": (fast, decay), "B without decay": (fast, 0.0)}
    made = [{"params": groups[k], "lr": rate, "weight_decay": wd} for k, (rate, wd) in rates.items()]
    return optimizer_cls(made, **kwargs)  # type: ignore[arg-type]


# LoRA-FA


class LoraFAOptimizer(Optimizer):
    """Adam, in which the gradient of B is that of the whole update as far as A, which is fixed, can follow it."""

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
    """LoRA-FA (arXiv 2308.03303): A is frozen, here and now, so that no input needs to be kept for its gradient.

    Args:
        r, lora_alpha, use_rslora: for PEFT's callers; each layer's own scaling is used.
    """
    found = list(pairs(model))
    for A, _, _ in found:
        A.requires_grad_(False)
    factors = {B: (A, scaling) for A, B, scaling in found}
    return LoraFAOptimizer(
        [p for p in model.parameters() if p.requires_grad], lr, weight_decay=weight_decay, factors=factors
    )


# Riemannian preconditioning


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 0.01, **kwargs: Any
) -> Optimizer:
    """Riemannian preconditioned LoRA (arXiv 2402.02347): before each step, gradients in the metric of B A.

    g_A ← (BᵀB + reg)⁺ g_A and g_B ← g_B (AAᵀ + reg)⁺.

    Raises:
        ValueError: no pair of A and B trains.
    """
    both = [(A, B) for A, B, _ in pairs(model) if A.requires_grad and B.requires_grad and A.ndim == 2]
    if not both:
        raise ConfigError("create_riemannian_optimizer did not find any trainable lora_A/lora_B parameter pairs.")
    optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=lr, **kwargs)  # type: ignore[call-arg]

    @torch.no_grad()
    def precondition(_: Any, inputs: tuple, options: dict[str, Any]) -> None:
        if len(inputs) > 1 or options.get("closure") is not None:  # it would compute other gradients
            raise ConfigError("An optimizer with Riemannian preconditioning does not support closures.")
        for A, B in both:
            if A.grad is not None and B.grad is not None:
                a, b = gram(B.T, reg) @ A.grad.float(), B.grad.float() @ gram(A, reg)
                A.grad.copy_(a)
                B.grad.copy_(b)

    optimizer.register_step_pre_hook(precondition)
    return optimizer
