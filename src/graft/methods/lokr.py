# SPDX-License-Identifier: Apache-2.0
"""LoKr: low-rank Kronecker product. LyCORIS, arXiv 2309.14859; KronA, arXiv 2212.10650."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from graft.core.effect import Effect, Update
from graft.core.method import COMPARISON, PublishedRate, fill_kaiming
from graft.kernels.structured import Kronecker, factorization, multiply_kronecker
from graft.methods.lycoris import Lycoris, LycorisConfig, kernel_of


@dataclass(kw_only=True)
class LoKrConfig(LycorisConfig):
    """LoKr: ΔW = alpha / r · w1 ⊗ w2; each of the two may be a product of rank r."""

    peft_type: str = "LOKR"
    decompose_both: bool = False  # w1, the smaller one, may be a product, too
    decompose_factor: int = -1  # the most rows and columns of w1; -1: as many as w2 has, or fewer
    rank_dropout_scale: bool = False  # divide by the share of rows that rank_dropout leaves
    init_weights: bool | Literal["lycoris"] = True  # w1 is zero; "lycoris": w2 is; False: none

    def factor_sizes(self, n: int) -> tuple[int, int]:
        """Return (a, b) with a b = n: the sizes of w1 and w2 along a dimension of n, by `factorization` with the
        config's `decompose_factor`.
        """
        return factorization(n, self.decompose_factor)


class LoKr(Lycoris[LoKrConfig]):
    """LoKr, arXiv 2309.14859: ΔW = s · w1 ⊗ w2; of a convolution, w2 holds the kernel, optionally with a factor t2 for
    it.
    """

    prefix = "lokr_"
    facts = (*Lycoris.facts, "rank_dropout_scale")
    published_lr = PublishedRate(3e-3, 3e-3, COMPARISON)

    lokr_w1: nn.Parameter  # (l, m)
    lokr_w1_a: nn.Parameter  # (l, r)
    lokr_w1_b: nn.Parameter  # (r, m)
    lokr_w2: nn.Parameter  # (k, n, *kernel)
    lokr_w2_a: nn.Parameter  # (k, r); with t2 (r, k)
    lokr_w2_b: nn.Parameter  # (r, n · kernel size); with t2 (r, n)
    lokr_t2: nn.Parameter  # (r, r, *kernel), padded to two kernel dims
    rank_dropout_scale: bool

    def describe(self) -> Effect:
        """Return an `Update` by `delta`, marked as random with a dropout; on layers that take vectors also with a
        `branch` that never forms ΔW.
        """
        return Update(self.delta, branch=self.branch if self.site.multiplies_vectors else None, draws=self.draws)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return an uninitialised parameter `lokr_…` for each entry of `shapes`. Floating-point tensors are made on the
        default device, in the default dtype.
        """
        return {f"lokr_{name}": nn.Parameter(torch.empty(shape)) for name, shape in self.shapes().items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parameters, by name.

        out = l · k, in = m · n by `factor_sizes`.

        w1 (l, m), or w1_a (l, r) and w1_b (r, m) with `decompose_both` and r < max(l, m) / 2. w2 (k, n, *kernel) if r ≥
        max(k, n) / 2; else w2_a (k, r) and w2_b (r, n · kernel size). With a factored kernel (`cp`): w2_a (r, k), w2_b
        (r, n), t2 (r, r, *kernel).
        """
        site, cfg, r = self.site, self.cfg, self.cfg.r
        kernel = site.shape[2:]
        l, k = cfg.factor_sizes(site.out_features)
        m, n = cfg.factor_sizes(site.shape[1])
        pair = cfg.decompose_both and r < max(l, m) / 2
        shapes: dict[str, tuple[int, ...]] = dict(w1_a=(l, r), w1_b=(r, m)) if pair else dict(w1=(l, m))
        if r >= max(k, n) / 2:
            return shapes | dict(w2=(k, n, *kernel))
        if self.cp:
            return shapes | dict(w2_a=(r, k), w2_b=(r, n), t2=self.kernel_shape)
        return shapes | dict(w2_a=(k, r), w2_b=(r, n * math.prod(kernel)))

    def init_values(self) -> None:
        """Fill all parameters kaiming uniform (a=√5), except zeros in w1 or w1_a; "lycoris": zeros in w2 or w2_b;
        False: no zeros.
        """
        zero: dict[object, tuple[str, ...]] = {True: ("w1", "w1_a"), "lycoris": ("w2", "w2_b"), False: ()}
        for name in self.shapes():
            p = getattr(self, f"lokr_{name}")
            if name in zero[self.cfg.init_weights]:
                nn.init.zeros_(p)
            else:
                fill_kaiming(p)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return scaling · w1 (l, m) and w2, (k, n, *kernel) or (k, n · kernel size); products of factors are
        multiplied out.
        """
        shapes = self.shapes()
        w1: Tensor = self.lokr_w1 if "w1" in shapes else self.lokr_w1_a @ self.lokr_w1_b
        if "w2" in shapes:
            w2: Tensor = self.lokr_w2
        elif "t2" in shapes:
            w2 = self.lokr_w2_a.T @ kernel_of(self.lokr_t2, self.lokr_w2_b)
        else:
            w2 = self.lokr_w2_a @ self.lokr_w2_b
        return w1 * self.scaling, w2

    def delta(self) -> Tensor | Kronecker:
        """Return ΔW = scaling · w1 ⊗ w2: a `Kronecker` that is not formed yet, or a tensor in training with dropout or
        for a whole w2 of a Conv1d.

        Dropout multiplies the rows of ΔW, rescaled with `rank_dropout_scale`.
        """
        w1, w2 = self.pair()
        mask = self.row_mask(w1, self.rank_dropout_scale)
        if w2.dim() == 3:  # of a Conv1d, PEFT's files mean this order
            W = torch.kron(w1, w2).reshape(self.site.shape)
        elif mask is None:
            return Kronecker(w1, w2.flatten(1), self.site.shape)
        else:
            W = Kronecker(w1, w2.flatten(1), self.site.shape).dense()
        return W if mask is None else W * mask.view(-1, *[1] * (W.dim() - 1))

    def branch(self, x: Tensor) -> Tensor:
        """Return (scaling · w1 ⊗ w2) x without forming ΔW, (…, out); in autocast's dtype, else the widest of x, w1 and
        w2; in training with dropout of output rows.
        """
        w1, w2 = self.pair()
        y, mask = multiply_kronecker(x, w1, w2), self.row_mask(w1, self.rank_dropout_scale)
        return y if mask is None else y * mask
