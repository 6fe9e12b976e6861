# SPDX-License-Identifier: Apache-2.0
"""HRA: Bridging the Gap between Low-rank and Orthogonal Adaptation via Householder Reflection, arXiv 2405.17484."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from graft.config.fields import COUNT, LORA, BaseBias, LayerRange, Targeted
from graft.core.effect import Effect, Rewrite
from graft.core.errors import warn
from graft.core.method import Method, PublishedRate, fill_kaiming
from graft.kernels.orthogonal import compact_reflections, gram_schmidt, reflect


@dataclass(kw_only=True)
class HRAConfig(Targeted, LayerRange, BaseBias):
    """HRA: W H, H = Π (I - 2 û_k û_kᵀ) over r Householder reflections of the input."""

    peft_type: str = "HRA"
    r: Annotated[int, COUNT] = 8  # number of reflections; even ones start as pairs that cancel
    apply_GS: bool = False  # make the vectors orthogonal first (Gram-Schmidt)
    init_weights: bool = True


class HRA(Method[HRAConfig]):
    """HRA, arXiv 2405.17484: W H, H = Π (I - 2 û_k û_kᵀ), k = 1 … r.

    H acts on the input; in convolutions and embeddings, on the weight.
    """

    prefix = "hra_"
    published_lr = PublishedRate(1e-5, 1e-2, "arXiv 2405.17484, its code, MetaMathQA and GLUE")
    targets = LORA
    facts = ()  # it has its own

    hra_u: nn.Parameter  # (fan_in, r)
    hra_apply_GS: bool

    def describe(self) -> Effect:
        """Return a `Rewrite`: `fold` makes W H; on layers that take vectors `pre` reflects the input instead."""
        return Rewrite(self.fold, pre=self.pre if self.site.multiplies_vectors else None)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return `hra_u` (fan_in, r), uninitialised, and the facts `hra_r` and `hra_apply_GS`.

        Floating-point tensors are made on the default device, in the default dtype.
        """
        u = nn.Parameter(torch.empty(self.site.fan_in, self.cfg.r))
        return dict(hra_u=u, hra_r=self.cfg.r, hra_apply_GS=self.cfg.apply_GS)

    def init_values(self) -> None:
        """Fill `hra_u` kaiming uniform (a=√5).

        For an even r with `init_weights`, columns are equal in pairs, so that H = I.

        Warns if `init_weights` is set and r is odd: H is not the identity.
        """
        r, init = self.cfg.r, self.cfg.init_weights
        if init and r % 2 == 0:
            half = fill_kaiming(torch.empty(self.hra_u.shape[0], r // 2))
            self.hra_u.data.copy_(half.repeat_interleave(2, dim=1))
            return
        if init:
            warn(f"r={r} is odd: the adapter does not start as the identity. Choose an even r.")
        fill_kaiming(self.hra_u)

    def compact(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return U (fan_in, r) and T (r, r), in `dtype`, with H = I - U T Uᵀ; computed in at least float32.

        With `hra_apply_GS` the vectors are orthonormalized first, and T = 2 I.
        """
        u = self.hra_u.to(torch.promote_types(dtype, torch.float32))
        if self.hra_apply_GS:
            U, T = gram_schmidt(u), 2 * torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
        else:
            U, T = compact_reflections(u)
        return U.to(dtype), T.to(dtype)

    def pre(self, x: Tensor) -> Tensor:
        """Return the input reflected, H x, in the input's dtype, computed in the adapter's."""
        return reflect(x, *self.compact(self.dtype))

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W H, a new tensor in W's shape and dtype, and the bias unchanged."""
        U, T = self.compact(W.dtype)
        flat = W.flatten(1)  # (out, fan_in)
        return (flat - (flat @ U) @ T @ U.T).view(W.shape), b
