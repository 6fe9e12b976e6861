# SPDX-License-Identifier: Apache-2.0
"""LoRA-FA: only B learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from graft.core.errors import ConfigError, PeftWarning, warn
from graft.inject.parts import registry_of
from graft.optim.pairs import gram, pairs


class LoraFAOptimizer(Optimizer):
    """Adam with a projected gradient of B, which follows that of ΔW as far as the fixed A allows.

    Args:
        correct_bias: divide the running means by what they lack in the first steps, as Adam does.
        factors: B → its A and its scaling. Other parameters get Adam's steps.

    Raises:
        ConfigError: a number out of range, or groups made for PEFT's class, which tell A from B by names.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        factors: dict[nn.Parameter, tuple[nn.Parameter, float]] | None = None,
    ):
        if lr < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"lr and eps must be ≥ 0 and betas from 0 to below 1, got {lr}, {eps} and {betas}.")
        super().__init__(
            params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, correct_bias=correct_bias)
        )
        self.factors = factors or {}  # B → A, scaling

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        foreign = {"names", "scaling_factor", "scaling_factors"} & param_group.keys()
        if foreign:
            raise ConfigError(
                f"A group with {', '.join(sorted(foreign))} is made for PEFT's LoraFAOptimizer. Here `factors` says "
                "which parameter is the A of which B: call create_lorafa_optimizer(model, …)."
            )
        super().add_param_group(param_group)

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
        rate = group["lr"] * (1 - b2**t) ** 0.5 / (1 - b1**t) if group["correct_bias"] else group["lr"]
        p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-rate)
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
        r, lora_alpha: what the active adapters have. Each layer's own scaling counts; a warning says if these differ.
        use_rslora: deprecated: configs say it.

    Raises:
        ConfigError: an active adapter's config says something else than `use_rslora`, or a number is out of range.
            Nothing is frozen then.
    """
    check_options(model, r, lora_alpha, use_rslora)
    found = list(pairs(model))
    As = {A for A, _, _ in found}
    factors = {B: (A, scaling) for A, B, scaling in found}
    trained = [p for p in model.parameters() if p.requires_grad and p not in As]
    made = LoraFAOptimizer(trained, lr, weight_decay=weight_decay, factors=factors)
    for A in As:
        A.requires_grad_(False)
    return made


def check_options(model: nn.Module, r: int | None, lora_alpha: float | None, use_rslora: bool | None) -> None:
    """Compare the options with the configs of the active adapters, which are what counts."""
    registry = registry_of(model)
    configs = {} if registry is None else {name: registry.peft_config[name] for name in registry.active_adapters}
    if use_rslora is not None:
        other = [name for name, cfg in configs.items() if getattr(cfg, "use_rslora", use_rslora) != use_rslora]
        if other:
            raise ConfigError(
                f"`use_rslora={use_rslora}` was passed to create_lorafa_optimizer, and the config of the active "
                f"adapters {other} says otherwise. Leave the argument out: the config decides."
            )
        warn("`use_rslora` of create_lorafa_optimizer is deprecated: LoraConfig says it.", FutureWarning)
    for option, value in (("r", r), ("lora_alpha", lora_alpha)):
        held = {name: getattr(cfg, option, value) for name, cfg in configs.items()}
        if value is not None and held and value not in held.values():
            warn(
                f"{option}={value} was passed to create_lorafa_optimizer and has no effect: each layer has a scaling "
                f"of its own, and the configs of the active adapters say {held}.",
                PeftWarning,
            )
