# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA's allocator: the importance of singular values, and how many may stay (arXiv 2303.10512, section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from graft.kernels.waits import constant
from graft.methods.adalora.config import AdaLoraConfig
from graft.methods.adalora.importance import Importance
from graft.storage.parallel import fill, layout_of, whole


def budget(step: int, start: int, target: int, cfg: Any) -> tuple[int, bool]:
    """Return how many singular values may stay at a step, cubic from `start` to `target`, and whether to prune now."""
    first, last = cfg.tinit, cfg.total_step - cfg.tfinal
    if step <= first:
        return start, False
    if step > last:
        return target, True
    left = 1 - (step - first) / (last - first)
    return int((start - target) * left**3 + target), step % cfg.deltaT == 0


class Allocator:
    """The state of the allocation between two steps."""

    def __init__(self, cfg: Any):
        self.importance = Importance(cfg.beta1, cfg.beta2)
        self.called = self.warned = False
        self.version: int | None = None  # of a parameter, at first sight

    @torch.no_grad()
    def allocate(self, methods: dict[str, Any], keep: int) -> dict[str, list[bool]]:
        """Set all but the `keep` most important singular values to 0. Return masks of those that stay, by layer."""
        scores = {key: self.triplet_scores(key, m) for key, m in methods.items()}
        values = torch.cat(list(scores.values()))
        drop = len(values) - keep
        threshold = values.kthvalue(drop).values if drop > 0 else values.new_full((), float("-inf"))
        for key, m in methods.items():
            fill(m.lora_E, whole(m.lora_E).masked_fill((scores[key] <= threshold)[:, None], 0.0))
        stays = iter((values > threshold).tolist())  # the one wait for the device, since the config has them
        return {key: list(islice(stays, len(score))) for key, score in scores.items()}

    def triplet_scores(self, key: str, m: Any) -> Tensor:
        """Return the importance of each singular value with its two vectors, (r,)."""
        A, B, E = (self.importance.score(f"{key}.lora_{x}", getattr(m, f"lora_{x}")) for x in "ABE")
        return E[:, 0] + A.mean(dim=1) + B.mean(dim=0)


def all_trainable(tuner: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each active AdaLoRA adapter that trains, and its methods by layer: several only in a PeftMixedModel."""
    for name in tuner.active_adapters:
        config = tuner.peft_config[name]
        if isinstance(config, AdaLoraConfig) and not config.inference_mode:
            yield name, {key: layer.methods[name] for key, layer in tuner.layers.items() if name in layer.methods}


def trainable(tuner: Any) -> tuple[str, dict[str, Any]] | None:
    """Return the first AdaLoRA adapter that trains, and its methods by layer; None if none does."""
    return next(all_trainable(tuner), None)


def allocator_of(tuner: Any, name: str) -> Allocator:
    if name not in tuner.states:
        tuner.states[name] = Allocator(tuner.peft_config[name])
    allocator: Allocator = tuner.states[name]
    return allocator


def update_and_allocate(tuner: Any, global_step: int) -> None:
    """Measure importance and prune. Call after each optimizer step, while the gradients are there.

    Args:
        global_step: number of the step, counted from 0 to `total_step`.

    Raises:
        ValueError: no adapter trains, or it has no gradients.
    """
    found = trainable(tuner)
    if found is None:
        raise ValueError("update_and_allocate: none of the active adapters trains (inference_mode is set).")
    name, methods = found
    cfg, state = tuner.peft_config[name], allocator_of(tuner, name)
    state.called = True
    last = cfg.total_step - cfg.tfinal
    if global_step > last:
        if cfg.rank_pattern:
            reapply(methods, cfg)
        return
    check_gradients(name, methods)
    if global_step < last:
        if methods and all(m.lora_E.grad is None for m in methods.values()):
            raise ValueError(
                f"update_and_allocate({global_step}): AdaLoRA adapter '{name}' has no gradients, from which the "
                "importance of its singular values is measured. Call it after backward() and optimizer.step(), before "
                "zero_grad()."
            )
        for key, m in methods.items():
            for x in "ABE":
                state.importance.update(f"{key}.lora_{x}", getattr(m, f"lora_{x}"))
    keep, prune = budget(global_step, len(methods) * cfg.init_r, len(methods) * cfg.target_r, cfg)
    if (prune or global_step == last) and state.importance.mean:
        masks = state.allocate(methods, keep)
        cfg.rank_pattern = {f"{key}.lora_E.{name}": mask for key, mask in masks.items()}
    if global_step == last:
        state.importance = Importance(cfg.beta1, cfg.beta2)


def check_gradients(name: str, methods: dict[str, Any]) -> None:
    """Raise NotImplementedError if gradients are in parts that cannot be put together."""
    for m in methods.values():
        layout = layout_of(m.lora_E)
        if layout is not None and not layout.has_gradients:
            raise NotImplementedError(
                f"update_and_allocate of AdaLoRA adapter '{name}' needs whole gradients, and {layout.name} keeps them "
                "in parts: train it with DDP or fully_shard (FSDP2), or train LoRA."
            )


@torch.no_grad()
def reapply(methods: dict[str, Any], cfg: Any) -> None:
    """Set singular values to 0 again that the optimizer has moved away from it."""
    for key, m in methods.items():
        mask = cfg.kept(key)
        if mask is not None and len(mask) == len(m.lora_E):  # an adapter from a file has no others
            gone = constant(tuple(not stays for stays in mask), torch.bool, m.lora_E.device)
            fill(m.lora_E, whole(m.lora_E).masked_fill(gone[:, None], 0.0))


def orthogonal_loss(tuner: Any) -> Tensor | float:
    """Return orth_reg_weight · mean ‖P Pᵀ - I‖_F over all A and B of the adapter that trains; the sum, of several."""
    loss: Tensor | float = 0.0
    for name, methods in all_trainable(tuner):
        weight = tuner.peft_config[name].orth_reg_weight
        if weight > 0:
            loss = loss + weight * torch.stack([d for m in methods.values() for d in m.distances()]).mean()
    return loss
