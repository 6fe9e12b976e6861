# SPDX-License-Identifier: Apache-2.0
"""AdaMSS's adaptive subspace allocation: fewer and fewer subspaces train, those on which the loss depends most."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graft.methods.adalora.importance import Importance
from graft.methods.adamss.config import AdamssConfig

PARTS = ("adamss_A", "adamss_B")


class Allocator(Importance):
    """The state of the allocation between two steps: the sensitivity of each parameter since the last choice."""

    @torch.no_grad()
    def update(self, name: str, p: Tensor) -> None:
        if p.grad is None:
            return
        now = (p * p.grad).abs()
        mean = self.mean.setdefault(name, torch.zeros_like(p))
        spread = self.spread.setdefault(name, torch.zeros_like(p))
        spread.mul_(self.beta2).add_((now - mean).abs(), alpha=1 - self.beta2)  # AdaLoRA takes the new mean
        mean.mul_(self.beta1).add_(now, alpha=1 - self.beta1)

    @torch.no_grad()
    def of(self, methods: dict[str, Any], spaces: list[tuple[str, int]]) -> list[float]:
        """Return the scores of subspaces, by one wait for the device."""
        means = [
            self.score(f"{key}.{part}.{j}", getattr(methods[key], part)[j]).mean()
            for key, j in spaces
            for part in PARTS
        ]
        device = means[0].device
        found = torch.stack([mean.to(device) for mean in means]).view(-1, len(PARTS)).tolist()
        return [sum(parts) for parts in found]


def budget(step: int, total: int, cfg: AdamssConfig) -> int:
    """Return how many of all subspaces train from a step on: the fewer, the less of the warm-up is left."""
    left = 1 - (step - cfg.init_warmup) / (cfg.final_warmup - cfg.init_warmup)
    target = min(cfg.asa_target_subspaces, total)
    return int(target + (total - target) * left**cfg.asa_schedule_exponent)


def update_and_allocate(tuner: Any, global_step: int) -> None:
    """Measure importance, and choose which subspaces train. Call after backward(), before gradients are zeroed.

    Does nothing for adapters without `use_asa`, and outside of the warm-up.

    Args:
        global_step: number of the step.

    Raises:
        ValueError: an adapter has no gradients.
    """
    for name in tuner.active_adapters:
        cfg = tuner.peft_config[name]
        if isinstance(cfg, AdamssConfig) and cfg.use_asa and not cfg.inference_mode:
            allocate(tuner, name, cfg, global_step)


def allocate(tuner: Any, name: str, cfg: AdamssConfig, step: int) -> None:
    if not cfg.init_warmup <= step <= cfg.final_warmup:
        return
    methods = {key: layer.methods[name] for key, layer in tuner.layers.items() if name in layer.methods}
    held = [
        (f"{key}.{part}.{j}", p) for key, m in methods.items() for part in PARTS for j, p in enumerate(getattr(m, part))
    ]
    if held and all(p.grad is None for _, p in held):
        raise ValueError(
            f"update_and_allocate({step}): AdaMSS adapter '{name}' has no gradients, from which the importance of its "
            "subspaces is measured. Call it after backward() and optimizer.step(), before zero_grad()."
        )
    if name not in tuner.states:
        tuner.states[name] = Allocator(cfg.asa_importance_beta, cfg.asa_uncertainty_beta)
    state = tuner.states[name]
    for path, p in held:
        state.update(path, p)
    if step % cfg.mask_interval == 0:
        choose(methods, state, step, cfg)
        tuner.states[name] = Allocator(cfg.asa_importance_beta, cfg.asa_uncertainty_beta)


def choose(methods: dict[str, Any], state: Allocator, step: int, cfg: AdamssConfig) -> None:
    """Let the most important subspaces train; of equals, those that do by now."""
    spaces = [(key, j) for key, m in methods.items() for j in range(len(m.adamss_A))]
    scores = zip(spaces, state.of(methods, spaces))
    rank = {(key, j): (score, methods[key].adamss_A[j].requires_grad) for (key, j), score in scores}
    kept = set(sorted(spaces, key=lambda space: rank[space], reverse=True)[: budget(step, len(spaces), cfg)])
    for key, m in methods.items():
        for slot in m.layer.slots(m.name):
            if slot.container in PARTS:  # `set_adapter` lets those train that may
                slot.trains = (key, int(slot.path)) in kept
                slot.tensor.requires_grad = slot.trains
                slot.tensor.grad = slot.tensor.grad if slot.trains else None
