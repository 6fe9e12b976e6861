# SPDX-License-Identifier: Apache-2.0
"""DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353.

W' = m ⊙ (W + ΔW) / ‖W + ΔW‖, with norms over the inputs of each output channel. The norm takes no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from graft.core.effect import Effect, Factors, Update
from graft.core.method import Published, Use
from graft.kernels.decomposed import row_norms
from graft.kernels.eager import cast, eager
from graft.kernels.versions import version_of
from graft.methods.lora.lora import LoRA


class DoraCaching:
    """Keep DoRA's norms from call to call, in eval mode. They cost a product with each weight in every call.

        with DoraCaching():
            model.generate(…)

        caching = DoraCaching(enabled=False)
        caching(enabled=True)  # from here on, in all models and threads

    A layer computes its norms anew in training, and when the base weight, A, B or the scaling has changed, by torch's
    counts of versions. Writes to `tensor.data` are not counted: switch off and on then. Compiled code computes norms in
    every call.
    """

    on = False
    switched = 0  # how often it has been: norms from before count no more

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.before: list[bool] = []

    def __enter__(self) -> DoraCaching:
        self.before.append(DoraCaching.on)
        self(self.enabled)
        return self

    def __exit__(self, *error: object) -> None:
        self(self.before.pop())

    def __call__(self, enabled: bool = True) -> None:
        if enabled != DoraCaching.on:
            DoraCaching.on = enabled
            DoraCaching.switched += 1


class CachedNorm:
    """A norm, and the state of its source tensors."""

    def __init__(self, norm: Tensor, of: Sequence[Tensor], scaling: float):
        self.norm, self.of, self.state = norm, of, tensor_state(of, scaling)

    def holds(self, of: Sequence[Tensor], scaling: float) -> bool:
        return all(a is b for a, b in zip(of, self.of)) and self.state == tensor_state(of, scaling)


def tensor_state(tensors: Sequence[Tensor], scaling: float) -> list[object]:
    """Return a value that is equal only while the tensors have the same values, as torch's version counters show."""
    state: list[object] = [DoraCaching.switched, scaling]
    for t in tensors:
        if is_traceable_wrapper_subclass(t):  # shards, say, whose versions are not counted here: never the same
            state.append(object())
        else:
            state += [t.data_ptr(), version_of(t)]
    return state


class Magnitude(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return self.weight


class DoRA(LoRA):
    """LoRA with magnitudes m (out,) that train; the norm counts as a constant."""

    published_lr = Published(1e-4, 2e-4, "arXiv 2402.09353, its code, commonsense reasoning")
    ungrouped = "DoRA needs the norm of W + ΔW, and a convolution with groups > 1 has no ΔW: A mixes its groups"
    lora_magnitude_vector: nn.Module  # weight (out,), for convolutions (1, out, 1, …)
    norm_cache: CachedNorm | None = None

    def build(self, shared: dict[str, object], device: torch.device | None = None) -> dict[str, object]:
        kernel = [1] * (len(self.site.shape) - 2)
        shape = (1, self.site.out_features, *kernel) if kernel else (self.site.out_features,)
        return super().build(shared, device) | dict(lora_magnitude_vector=Magnitude(torch.empty(shape, device=device)))

    def uses_weight(self) -> Use:
        return super().uses_weight() | Use.TAKES

    def init(self) -> None:
        super().init()
        if self.site.on_meta:
            return
        m: Tensor = self.lora_magnitude_vector.weight
        with torch.no_grad():
            norm = row_norms(
                self.layer.W0.flatten(1), *super().factors().matrices()
            )  # to the bit, if in pieces as well
        m.data = norm.to(device=self.pair[0].device, dtype=m.dtype).view(m.shape)

    def describe(self) -> Effect:
        return Update(factors=self.factors, gains=True, of_weight=True)

    def factors(self) -> Factors:
        m, f = self.lora_magnitude_vector().flatten(), super().factors()
        return f.gained(m / cast(self.norm(f), m.dtype))

    @torch.no_grad()
    def norm(self, f: Factors) -> Tensor:
        """Return ‖W + ΔW‖ per output channel, (out,). f: those of ΔW."""
        if DoraCaching.on and eager():
            if not self.layer.training:
                return self.find_cached_norm(f)
            self.norm_cache = None
        return self.compute_norm(f)

    def compute_norm(self, f: Factors) -> Tensor:
        W, *cuts = self.layer.own_W0
        A, B = f.matrices()
        # detached: under torch 2.6 autocast caches a copy of A and B made here, without gradient, and later uses it
        return row_norms(W.detach().flatten(1), A.detach(), B.detach(), *cuts)

    def find_cached_norm(self, f: Factors) -> Tensor:
        """Return the norms, computed once for each state of the tensors that they depend on."""
        of, cache = (self.layer.weight, *self.pair), self.norm_cache
        if cache is None or not cache.holds(of, self.scaling):
            with torch.inference_mode(False), torch.no_grad():  # or a call with gradients could not save what is kept
                norm = self.compute_norm(f)
            cache = self.norm_cache = CachedNorm(norm, of, self.scaling)
        return cache.norm
