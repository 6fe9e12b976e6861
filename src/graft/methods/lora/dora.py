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
from graft.core.method import PublishedRate, WeightUse
from graft.kernels.decomposed import row_norms
from graft.kernels.eager import cast, eager
from graft.kernels.versions import version_of
from graft.methods.lora.lora import LoRA


class DoraCaching:
    """Keep DoRA's norms ‖W + ΔW‖ from call to call in eval mode; without it every call forms a product with each
    weight.

        with DoraCaching():
            model.generate(…)

        caching = DoraCaching(enabled=False)
        caching(enabled=True)  # from here on, in all models and threads

    A layer computes its norms anew in training, and when the base weight, A, B or the scaling has changed, by torch's
    counts of versions. Writes to `tensor.data` are not counted: switch caching off and on then. Compiled code computes
    norms in every call.
    """

    on = False
    switched = 0  # how often it has been: norms from before count no more

    def __init__(self, enabled: bool = True):
        """Note the choice for a `with` block. Nothing is switched yet."""
        self.enabled = enabled
        self.before: list[bool] = []

    def __enter__(self) -> DoraCaching:
        """Set caching to `enabled` for all models and threads, and remember the former choice on a stack.

        Return the object.
        """
        self.before.append(DoraCaching.on)
        self(self.enabled)
        return self

    def __exit__(self, *error: object) -> None:
        """Set caching back to the choice before the block; an exception of the block is not suppressed."""
        self(self.before.pop())

    def __call__(self, enabled: bool = True) -> None:
        """Switch caching on or off for all models and threads.

        A change increments `switched`, which makes all kept norms invalid.
        """
        if enabled != DoraCaching.on:
            DoraCaching.on = enabled
            DoraCaching.switched += 1


class CachedNorm:
    """A norm (out,), the tensors that it was computed from, and their state at that time."""

    def __init__(self, norm: Tensor, of: Sequence[Tensor], scaling: float):
        """Store the norm, the tensors and `tensor_state` of them now."""
        self.norm, self.of, self.state = norm, of, tensor_state(of, scaling)

    def holds(self, of: Sequence[Tensor], scaling: float) -> bool:
        """Return True if the tensors are the same objects as then, and `tensor_state` is equal: the norm is still
        right.
        """
        return all(a is b for a, b in zip(of, self.of)) and self.state == tensor_state(of, scaling)


def tensor_state(tensors: Sequence[Tensor], scaling: float) -> list[object]:
    """Return a list that compares equal only while the tensors have the same values.

    It holds the count of DoraCaching's switches, the scaling, and address and version of each tensor. A tensor
    subclass, such as a shard, puts in a new object, which equals no other.
    """
    state: list[object] = [DoraCaching.switched, scaling]
    for t in tensors:
        if is_traceable_wrapper_subclass(t):  # such as shards: torch does not count their versions here
            state.append(object())
        else:
            state += [t.data_ptr(), version_of(t)]
    return state


class Magnitude(nn.Module):
    """DoRA's magnitudes m as a module: PEFT's files name the tensor `weight`."""

    def __init__(self, weight: Tensor):
        """Make `weight` a parameter that trains, on the memory of the given tensor."""
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        """Return the parameter `weight`, in its own shape."""
        return self.weight


class DoRA(LoRA):
    """DoRA, arXiv 2402.09353: W' = m ⊙ (W + ΔW) / ‖W + ΔW‖, with magnitudes m (out,) that train; the norm counts as a
    constant.
    """

    published_lr = PublishedRate(1e-4, 2e-4, "arXiv 2402.09353, its code, commonsense reasoning")
    ungrouped = "DoRA needs the norm of W + ΔW, and a convolution with groups > 1 has no ΔW: A mixes its groups"
    lora_magnitude_vector: nn.Module  # weight (out,), for convolutions (1, out, 1, …)
    norm_cache: CachedNorm | None = None

    def build(self, shared: dict[str, object], device: torch.device | None = None) -> dict[str, object]:
        """Return LoRA's tensors and `lora_magnitude_vector`, a `Magnitude` with weight (out,), or (1, out, 1, …) on a
        convolution; `init_values` fills it. The magnitudes are made on `device` (None: the default one), in the default
        dtype.
        """
        kernel = [1] * (len(self.site.shape) - 2)
        shape = (1, self.site.out_features, *kernel) if kernel else (self.site.out_features,)
        return super().build(shared, device) | dict(lora_magnitude_vector=Magnitude(torch.empty(shape, device=device)))

    def uses_weight(self) -> WeightUse:
        """Return `WeightUse.TAKES` with the flags of LoRA: the magnitudes start from the base weight."""
        return super().uses_weight() | WeightUse.TAKES

    def init_values(self) -> None:
        """Initialise A and B as LoRA does, then set m to ‖W₀ + ΔW‖ per output channel, as new data in m's dtype on A's
        device.

        On the meta device m stays empty.
        """
        super().init_values()
        if self.site.on_meta:
            return
        m: Tensor = self.lora_magnitude_vector.weight
        with torch.no_grad():
            # to the bit, if in pieces as well
            norm = row_norms(self.layer.W0.flatten(1), *super().factors().matrices())
        m.data = norm.to(device=self.pair[0].device, dtype=m.dtype).view(m.shape)

    def describe(self) -> Effect:
        """Return an `Update` by `factors` with a gain: it reads W₀ (`of_weight`) and scales the whole weight.

        It names no reason against merging.
        """
        return Update(factors=self.factors, gains=True, of_weight=True)

    def factors(self) -> Factors:
        """Return LoRA's factors with the gain m / ‖W + ΔW‖, (out,).

        The norm has no gradient, and is cast to m's dtype.
        """
        m, f = self.lora_magnitude_vector().flatten(), super().factors()
        return f.with_gain(m / cast(self.norm(f), m.dtype))

    @torch.no_grad()
    def norm(self, f: Factors) -> Tensor:
        """Return ‖W + ΔW‖ per output channel, (out,), without gradient.

        With DoraCaching on, in eager code, eval mode returns `find_cached_norm`. Training sets `norm_cache` to None and
        computes it anew, as all other code does. f: the factors of ΔW.
        """
        if DoraCaching.on and eager():
            if not self.layer.training:
                return self.find_cached_norm(f)
            self.norm_cache = None
        return self.compute_norm(f)

    def compute_norm(self, f: Factors) -> Tensor:
        """Return ‖W₀ + B A‖ per output channel, (out,), for the factors f, all detached; of a sharded weight the
        processes exchange sums.
        """
        W, *cuts = self.layer.local_W0
        A, B = f.matrices()
        # detached: under torch 2.6 autocast caches a copy of A and B made here, without gradient, and later uses it
        return row_norms(W.detach().flatten(1), A.detach(), B.detach(), *cuts)

    def find_cached_norm(self, f: Factors) -> Tensor:
        """Return the cached norm if the base weight, A, B and the scaling are unchanged; else compute it outside of
        inference mode, keep it in `norm_cache` and return it.
        """
        of, cache = (self.layer.weight, *self.pair), self.norm_cache
        if cache is None or not cache.holds(of, self.scaling):
            with torch.inference_mode(False), torch.no_grad():  # else no call with gradients could save the cached norm
                norm = self.compute_norm(f)
            cache = self.norm_cache = CachedNorm(norm, of, self.scaling)
        return cache.norm
