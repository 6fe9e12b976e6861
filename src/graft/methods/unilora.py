# SPDX-License-Identifier: Apache-2.0
"""Uni-LoRA: One Vector is All You Need, arXiv 2506.00799."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from graft.config.bounds import one_of
from graft.config.fields import COUNT, LORA, NOT_NEGATIVE, POSITIVE, FanInFanOut, LayerRange, Targets
from graft.core.effect import Factors
from graft.core.method import COMPARISON, AdaptedLayers, Method, PublishedRate, Tensors
from graft.core.random import skip_draws
from graft.core.site import Site
from graft.methods.projections import check_places, maybe_transient


@dataclass(kw_only=True)
class UniLoraConfig(Targets, LayerRange, FanInFanOut):
    """UniLoRA: LoRA with numbers taken from one trained vector θ, in all layers, each many times."""

    peft_type: str = "UNILORA"
    r: Annotated[int, COUNT] = 4
    proj_seed: Annotated[int, NOT_NEGATIVE] = 42  # of the places that each number of θ has
    theta_d_length: Annotated[int, COUNT] = 256
    unilora_dropout: float = 0.0
    bias: Annotated[str, one_of("none", "all", "unilora_only")] = "none"  # which base biases train
    init_theta_d_bound: Annotated[float, POSITIVE] = 0.02  # θ begins uniform within it
    init_weights: bool = True  # False: normal
    save_indices: bool = False  # put the places into files, which then do not depend on other adapted layers

    counters = ("proj_seed",)


class Places:
    """The index into θ for each place of A and B of all layers, (places,), dealt once for the model; and the factor 1 /
    √(count of the index).
    """

    def __init__(self, sites: Sequence[Site], cfg: UniLoraConfig):
        """Number the places of the layers, r · (fan_in + out) each, in order; deal the indices of θ (`deal_places`),
        and compute the factors.

        On the meta device the factors stay uninitialised.
        """
        self.first: dict[str, int] = {}  # the place where a layer begins, by path
        total = 0
        for site in sites:
            self.first[site.key] = total
            total += cfg.r * (site.fan_in + site.out_features)
        self.index = deal_places(total, cfg.theta_d_length, cfg.proj_seed)
        if self.index.is_meta:
            self.scale = torch.empty(total)
        else:
            self.scale = self.index.bincount(minlength=cfg.theta_d_length).rsqrt()[self.index]

    def of(self, site: Site, r: int) -> list[Tensor]:
        """Return four tensors of a layer: factors of A (r, in) and B (out, r), then indices of A and B."""
        start, a, b = self.first[site.key], r * site.fan_in, r * site.out_features
        shapes = ((r, site.fan_in), (site.out_features, r))
        pairs = (t[start : start + a + b].split((a, b)) for t in (self.scale, self.index))
        return [part.view(shape) for pair in pairs for part, shape in zip(pair, shapes)]


class UniLoRA(Method[UniLoraConfig]):
    """UniLoRA, arXiv 2506.00799: ΔW = B A.

    A place that holds the number k of θ has the value θ[k] / √(how many places hold k).
    """

    prefix = "unilora_"
    published_lr = PublishedRate(2e-3, 2e-3, COMPARISON)
    targets = LORA
    agreeing_fields = ("save_indices",)

    unilora_theta_d: nn.Parameter  # (length,), shared
    unilora_indices_A: Tensor  # (r, in)
    unilora_indices_B: Tensor  # (out, r)
    unilora_scales_A: Tensor  # (r, in)
    unilora_scales_B: Tensor  # (out, r)
    unilora_dropout: nn.Module

    @classmethod
    def share(cls, layers: AdaptedLayers) -> dict[str, object]:
        """Return a new vector `unilora_theta_d` (length,) for each adapter, uniform within ±`init_theta_d_bound`, or
        normal with `init_weights=False`, and `unilora_places`, the `Places` of all layers.
        """
        cfg = layers.cfg
        theta = torch.empty(cfg.theta_d_length)
        if cfg.init_weights:
            nn.init.uniform_(theta, -cfg.init_theta_d_bound, cfg.init_theta_d_bound)
        else:
            nn.init.normal_(theta)
        return dict(unilora_theta_d=nn.Parameter(theta), unilora_places=Places(layers.sites, cfg))

    def build(self, shared: dict[str, Any]) -> dict[str, object]:
        """Return all shared values (θ and the places), and this layer's buffers `unilora_scales_A`, `_B` and
        `unilora_indices_A`, `_B`, in this order.

        The buffers have the shapes (r, in) and (out, r). They come from this adapter's entry of the shared
        `unilora_places`, for this site. Files hold them only with `save_indices`.
        """
        cfg = self.cfg
        places = shared["unilora_places"].container[self.name].of(self.site, cfg.r)
        names = [f"unilora_{part}_{x}" for part in ("scales", "indices") for x in "AB"]  # a floating one first
        return shared | {name: maybe_transient(t, cfg.save_indices) for name, t in zip(names, places)}

    def init_values(self) -> None:
        """Advance the generator as if A and B were drawn, as PEFT does. No tensor changes."""
        # as PEFT
        skip_draws(*(torch.empty(shape) for shape in (self.unilora_indices_A.shape, self.unilora_indices_B.shape)))

    def from_file_tensors(self, tensors: Tensors, cfg: UniLoraConfig) -> Tensors:
        """Return the file's tensors unchanged.

        Raises CheckpointError if they have indices outside of θ. Shapes are not checked, and missing indices pass.
        """
        for x in "AB":
            check_places(tensors, f"unilora_indices_{x}", self.cfg.theta_d_length, self.site.key)
        return tensors

    def factors(self) -> Factors:
        """Return A (r, in) and B (out, r), looked up in θ, with dropout."""
        A = self.values(self.unilora_indices_A, self.unilora_scales_A)
        B = self.values(self.unilora_indices_B, self.unilora_scales_B)
        return Factors(A, B, dropout=self.unilora_dropout)

    def values(self, index: Tensor, scale: Tensor) -> Tensor:
        """Return θ[index] · scale in the shape of `index`; θ is moved to the index's device and the scale's dtype."""
        theta = self.unilora_theta_d.to(index.device, scale.dtype)  # FSDP casts parameters for a call, not buffers
        return theta.index_select(0, index.flatten()).view(index.shape) * scale


def deal_places(places: int, length: int, seed: int) -> Tensor:
    """Return an index below `length` for each of `places` places, shuffled by numpy's generator with `seed`, as PEFT
    does.

    Each index appears ⌊places / length⌋ times; the remaining places get random ones, each at most once. On the meta
    device the tensor stays uninitialised.
    """
    out = torch.empty(places, dtype=torch.int64)
    if out.is_meta:
        return out
    import numpy as np  # rarely needed

    rng = np.random.default_rng(seed)
    times, remainder = divmod(places, length)
    numbers = np.repeat(np.arange(length), times)
    if remainder:
        numbers = np.concatenate([numbers, rng.choice(length, size=remainder, replace=False)])
    rng.shuffle(numbers)
    return torch.from_numpy(numbers)
