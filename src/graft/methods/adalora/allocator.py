# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA's allocator: the importance of singular values, and how many may stay (arXiv 2303.10512, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.errors import ConfigError
from graft.core.method import Method, Tuner
from graft.core.rows import Run
from graft.kernels.waits import constant
from graft.storage.parallel import find_whole_shape, gather_tensor, layout_of, write_whole


class Importance:
    """Smoothed sensitivity |p ∂p| of parameters, and its uncertainty, by name (arXiv 2303.10512, equations 8 to 11)."""

    to_new_mean = True  # the uncertainty is of the distance from the mean after an update; False: before it

    def __init__(self, beta1: float, beta2: float):
        """Start without parameters. beta1 smooths the sensitivity, beta2 its uncertainty."""
        self.beta1, self.beta2 = beta1, beta2
        self.mean: dict[str, Tensor] = {}
        self.spread: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, name: str, p: Tensor) -> None:
        """Update the running mean of now = |p ∂p|, and that of the spread |now - mean|, of parameter `name`; do nothing
        without a gradient. Both start at 0. The spread's mean is the new one, or the old one without `to_new_mean`.

        Sharded tensors are gathered first.
        """
        grad = p.grad
        if grad is None:
            return
        p = gather_tensor(p)
        now = (p * gather_tensor(grad)).abs()
        before = self.mean.get(name, torch.zeros_like(p))
        self.mean[name] = mean = (before * self.beta1).add_(now, alpha=1 - self.beta1)
        distance = (now - (mean if self.to_new_mean else before)).abs()
        self.spread.setdefault(name, torch.zeros_like(p)).mul_(self.beta2).add_(distance, alpha=1 - self.beta2)

    def score(self, name: str, p: Tensor) -> Tensor:
        """Return mean · spread of each element of `p`, in its whole shape; zeros if it never had a gradient, as in an
        expert without tokens.
        """
        return self.mean[name] * self.spread[name] if name in self.mean else p.new_zeros(find_whole_shape(p))


def find_rank_budget(step: int, start: int, target: int, cfg: Any) -> tuple[int, bool]:
    """Return the number of singular values that stay at a step, and whether to prune now.

    `start`, False up to `tinit`; `target`, True after `total_step` - `tfinal`. Between them a cubic from start to
    target, rounded down, with pruning at multiples of `deltaT`.
    """
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
        """Start without importance, calls and warnings, with `beta1` and `beta2` of the config."""
        self.importance = Importance(cfg.beta1, cfg.beta2)
        self.called = self.warned = False
        self.version: int | None = None  # of a parameter, at first sight

    @torch.no_grad()
    def allocate(self, methods: dict[str, Method], keep: int) -> dict[str, list[bool]]:
        """Set all but the `keep` most important singular values to 0, in place.

        Return masks of those that stay (True), by layer.

        Values with a score equal to the threshold are set to 0, too, so fewer may stay. With `keep` at or above their
        number all stay. The host waits for the device once.
        """
        scores = {key: self.triplet_scores(key, m) for key, m in methods.items()}
        values = torch.cat(list(scores.values()))
        drop = len(values) - keep
        threshold = values.kthvalue(drop).values if drop > 0 else values.new_full((), float("-inf"))
        for key, m in methods.items():
            write_whole(m.lora_E, gather_tensor(m.lora_E).masked_fill((scores[key] <= threshold)[:, None], 0.0))
        stays = iter((values > threshold).tolist())  # the one wait for the device, since the config has them
        return {key: list(islice(stays, len(score))) for key, score in scores.items()}

    def triplet_scores(self, key: str, m: Method) -> Tensor:
        """Return the importance of each singular value with its two vectors, (r,): E's score plus the means of A's row
        and B's column.
        """
        A, B, E = (self.importance.score(f"{key}.lora_{x}", getattr(m, f"lora_{x}")) for x in "ABE")
        return E[:, 0] + A.mean(dim=1) + B.mean(dim=0)


def all_trainable(tuner: Tuner, names: Iterable[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, methods by layer) of each AdaLoRA adapter in `names` (None: the active ones) that is not in
    inference mode; nothing if there is none. A name that the model lacks is a KeyError. Layers that lack the adapter
    are left out.

    There can be several only in a PeftMixedModel.
    """
    for name in tuner.active_adapters if names is None else names:
        config = tuner.peft_config[name]
        if config.peft_type == "ADALORA" and not config.inference_mode:
            yield name, {key: layer.methods[name] for key, layer in tuner.layers.items() if name in layer.methods}


def trainable(tuner: Tuner) -> tuple[str, dict[str, Method]] | None:
    """Return the first AdaLoRA adapter that trains, and its methods by layer; None if none does."""
    return next(all_trainable(tuner), None)


def allocator_of(tuner: Tuner, name: str) -> Allocator:
    """Return the adapter's Allocator in `tuner.states`; create and store it, from the adapter's config, if there is
    none. A name that the model lacks is a KeyError.
    """
    if name not in tuner.states:
        tuner.states[name] = Allocator(tuner.peft_config[name])
    return tuner.states[name]


def update_and_allocate(tuner: Tuner, global_step: int) -> None:
    """Measure importance and prune the first AdaLoRA adapter that trains.

    Call after each optimizer step, while the gradients are there.

    Before step `total_step` - `tfinal` it updates the importance. A pruning step writes E and the config's
    `rank_pattern`, if any importance was measured; so does that last step, which also discards the importance. After
    it, pruned values are only set to 0 again, and gradients are not needed. Every call notes that ranks are allocated
    (`called`).

    Args:
        global_step: number of the step, counted from 0 to `total_step`.

    Raises:
        ValueError: no adapter trains, or it has no gradients.
        NotImplementedError: gradients are in parts that cannot be put together.
    """
    trained = trainable(tuner)
    if trained is None:
        raise ValueError("update_and_allocate: none of the active adapters trains. Load one with is_trainable=True.")
    name, methods = trained
    cfg, state = tuner.peft_config[name], allocator_of(tuner, name)
    state.called = True
    last = cfg.total_step - cfg.tfinal
    if global_step > last:
        if cfg.rank_pattern:
            zero_pruned_values(methods, cfg)
        return
    for m in methods.values():
        layout = layout_of(m.lora_E)
        if layout is not None and not layout.has_gradients:
            raise NotImplementedError(
                f"update_and_allocate of AdaLoRA adapter '{name}' needs whole gradients, and {layout.name} keeps them "
                "in parts. Train it with DDP or fully_shard (FSDP2), or train LoRA."
            )
    if global_step < last:
        if methods and all(m.lora_E.grad is None for m in methods.values()):
            raise ValueError(
                f"update_and_allocate({global_step}): AdaLoRA adapter '{name}' has no gradients to measure the "
                "importance of its singular values. Call it after backward() and optimizer.step(), before "
                "zero_grad()."
            )
        for key, m in methods.items():
            for x in "ABE":
                state.importance.update(f"{key}.lora_{x}", getattr(m, f"lora_{x}"))
    keep, prune = find_rank_budget(global_step, len(methods) * cfg.init_r, len(methods) * cfg.target_r, cfg)
    if (prune or global_step == last) and state.importance.mean:
        masks = state.allocate(methods, keep)
        cfg.rank_pattern = {f"{key}.lora_E.{name}": mask for key, mask in masks.items()}
    if global_step == last:
        state.importance = Importance(cfg.beta1, cfg.beta2)


@torch.no_grad()
def zero_pruned_values(methods: dict[str, Method], cfg: Any) -> None:
    """Set singular values to 0 that `rank_pattern` marks as pruned and the optimizer has moved away from 0.

    Layers with another number of values than their mask are left out: an adapter from a file has only the kept ones.
    """
    for key, m in methods.items():
        mask = cfg.rank_mask(key)
        if mask is not None and len(mask) == len(m.lora_E):  # an adapter from a file has no others
            gone = constant(tuple(not stays for stays in mask), torch.bool, m.lora_E.device)
            write_whole(m.lora_E, gather_tensor(m.lora_E).masked_fill(gone[:, None], 0.0))


def orthogonal_losses(tuner: Tuner, names: Iterable[str], run: Run) -> dict[str, Callable[[], Tensor]]:
    """Return, by name, functions that compute the regularisation of these adapters: those that train, with
    `orth_reg_weight` > 0; {} without any.

    Nothing is computed before a call of such a function. Its weight is `orth_reg_weight` times the share of the run
    that uses the adapter.
    """
    return {
        name: partial(orthogonal_loss, methods, weight * run.share(name, tuner.model))
        for name, methods in all_trainable(tuner, names)
        if (weight := tuner.peft_config[name].orth_reg_weight) > 0
    }


def orthogonal_loss(methods: dict[str, Any], weight: Tensor | float) -> Tensor:
    """Return weight · the mean of ‖P Pᵀ - I‖_F over all A and Bᵀ of an adapter, (), on the first one's device.

    ValueError for no methods.
    """
    first, *distances = (d for m in methods.values() for d in m.distances())
    return weight * torch.stack([first, *(d.to(first.device) for d in distances)]).mean()  # on several devices


def resize_modules_by_rank_pattern(
    tuner: Tuner, rank_pattern: dict[str, Sequence[bool] | Tensor], adapter_name: str
) -> None:
    """Keep only the singular triples that masks name (True), and record the masks in the config's `rank_pattern`.

    A, E and B of these layers become new parameters with the same `requires_grad`, so make the optimizer afterwards.
    Other layers' masks in the config stay. All checks come before the first change.

    Args:
        rank_pattern: as the config's, {"path.lora_E" or "path.lora_E.adapter": a mask of the layer's triples}.

    Raises:
        AdapterNotFoundError: there is no such adapter.
        ConfigError: a layer does not carry it, or has another number of triples.
        ValueError: it is merged.
        NotImplementedError: its tensors are spread over processes.
    """
    tuner.check_known([adapter_name])
    masks: dict[str, Tensor] = {}
    for name, mask in rank_pattern.items():
        key = name.removesuffix(f".{adapter_name}").removesuffix(".lora_E")
        layer = tuner.layers.get(key)
        if layer is None or adapter_name not in layer.methods:
            raise ConfigError(
                f"rank_pattern names '{key}', no layer of AdaLoRA adapter '{adapter_name}'. Name its layers."
            )
        E = layer.methods[adapter_name].lora_E
        masks[key] = torch.as_tensor(mask, dtype=torch.bool, device="cpu").flatten()  # for the config, too
        if len(masks[key]) != len(E):
            raise ConfigError(
                f"rank_pattern has {len(masks[key])} entries for '{key}', where AdaLoRA adapter '{adapter_name}' has "
                f"{len(E)} singular triples. Give a mask of these."
            )
        if adapter_name in layer.merged_adapters:
            raise ValueError(f"AdaLoRA adapter '{adapter_name}' is merged. Call unmerge_adapter() before the resize.")
        if layout_of(E) is not None:
            raise NotImplementedError(
                f"AdaLoRA adapter '{adapter_name}' has tensors spread over processes. Resize it before that."
            )
    for key, cpu_mask in masks.items():
        layer = tuner.layers[key]
        mask = cpu_mask.to(layer.methods[adapter_name].lora_E.device)
        for name, of_columns in (("lora_E", False), ("lora_A", False), ("lora_B", True)):
            old = getattr(layer, name)[adapter_name]
            values = old.detach()[:, mask] if of_columns else old.detach()[mask]
            getattr(layer, name)[adapter_name] = nn.Parameter(values.clone(), old.requires_grad)
    cfg = tuner.peft_config[adapter_name]  # its pattern says which triples a file holds
    other_masks = {k: mask for k, mask in (cfg.rank_pattern or {}).items() if k.partition(".lora_E")[0] not in masks}
    cfg.rank_pattern = other_masks | {f"{key}.lora_E.{adapter_name}": mask.tolist() for key, mask in masks.items()}
