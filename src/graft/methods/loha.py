# SPDX-License-Identifier: Apache-2.0
"""LoHa: low-rank Hadamard product. FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859.

ABBA: Highly Expressive Hadamard Product Adaptation for Large Language Models, arXiv 2505.14238: LoHa with a first
product that starts as the best approximation of the weight of rank r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from graft.config.fields import Targets
from graft.core.effect import Effect, Factors, Update
from graft.core.errors import ConfigError, PeftWarning, warn_of_layer
from graft.core.method import Method, WeightUse, fill_kaiming
from graft.kernels.one_product import Hadamard, is_narrow, narrow
from graft.methods.loraxs import check_vectors, find_largest_components
from graft.methods.lycoris import Lycoris, LycorisConfig, kernel_of


@dataclass(kw_only=True)
class LoHaConfig(LycorisConfig):
    """LoHa: ΔW = alpha / r · (w1_a w1_b) ⊙ (w2_a w2_b), of rank up to r².

    Raises:
        ConfigError: `use_khatri_rao` with another start than the default.
    """

    peft_type: str = "LOHA"
    init_weights: bool | Literal["abba"] = True  # w2_b of zeros; False: random; "abba": w1 of the weight, w2_a of zeros
    use_khatri_rao: bool = False  # begin with w2_a w2_b = 1 and w1_a = 0, so that learning begins as LoRA's does
    beyond = Targets.beyond | {"use_khatri_rao"}

    def __post_init__(self) -> None:
        """Validate the fields; raise ConfigError for `use_khatri_rao` with an `init_weights` other than True."""
        super().__post_init__()
        if self.use_khatri_rao and self.init_weights is not True:
            raise ConfigError(f"use_khatri_rao and init_weights={self.init_weights!r} are two starts. Leave one out.")


class LoHa(Lycoris[LoHaConfig]):
    """LoHa, arXiv 2108.06098: ΔW = s · (w1_a w1_b) ⊙ (w2_a w2_b); in convolutions, optionally, with a kernel factor t
    within each product.
    """

    prefix = "hada_"

    hada_w1_a: nn.Parameter  # (out, r); with t (r, out)
    hada_w1_b: nn.Parameter  # (r, fan_in); with t (r, in / groups)
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter
    hada_t1: nn.Parameter  # (r, r, *kernel), padded to two kernel dims
    hada_t2: nn.Parameter

    @classmethod
    def split_budget(cls, methods: Sequence[Method]) -> None:
        """Raise ConfigError if `use_khatri_rao` is set and every layer of the adapter factors its kernel (`cp`): the
        option would do nothing.
        """
        if methods and methods[0].cfg.use_khatri_rao and all(m.cp for m in methods):
            raise ConfigError(
                f"use_khatri_rao has no effect: all layers of adapter '{methods[0].name}' are convolutions with "
                "factored kernels. Leave it out, or use_effective_conv2d."
            )

    def check(self) -> str | None:
        """Return the reason of `Lycoris.check`.

        Before that, on known layers with init_weights="abba": the reason against factored kernels (`cp`), then
        ConfigError for r above the smaller side of the weight. Lycoris raises ConfigError for r < 1.
        """
        if self.cfg.init_weights == "abba" and self.site.op.known:
            if self.cp:
                return "ABBA's start has no factors of kernels: leave use_effective_conv2d out"
            check_vectors("ABBA's start", self.site, self.cfg.r)
        return super().check()

    def uses_weight(self) -> WeightUse:
        """Return `WeightUse.STARTS` for init_weights="abba", which starts from the weight; else `WeightUse.NONE`."""
        return WeightUse.STARTS if self.cfg.init_weights == "abba" else WeightUse.NONE

    def describe(self) -> Effect:
        """Return an `Update` by `factors` of rank r² where these are cheaper than ΔW (`is_narrow`) and the kernel is
        not factored.

        Else an `Update` by `delta`, marked as random (`draws`) with a dropout of ranks or modules.
        """
        if not self.cp and is_narrow(self.cfg.r, self.site.out_features, self.site.fan_in):
            return Update(factors=self.factors)
        return Update(self.delta, draws=self.draws)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return uninitialised parameters `hada_w1_a`, `hada_w2_a` (out,
        r) and `hada_w1_b`, `hada_w2_b` (r, fan_in).

        With a factored kernel (`cp`): a (r, out), b (r, in / groups), and `hada_t1`, `hada_t2` (r, r, *kernel).
        Floating-point tensors are made on the default device, in the default dtype.
        """
        site, r = self.site, self.cfg.r
        if self.cp:
            a, b, t = (r, site.out_features), (r, site.shape[1]), self.kernel_shape
            shapes: dict[str, tuple[int, ...]] = dict(w1_a=a, w1_b=b, w2_a=a, w2_b=b, t1=t, t2=t)
        else:
            a, b = (site.out_features, r), (r, site.fan_in)
            shapes = dict(w1_a=a, w1_b=b, w2_a=a, w2_b=b)
        return {f"hada_{name}": nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}

    def init_values(self) -> None:
        """Fill w1_a, w1_b, w2_a, and t1 and t2 of a factored kernel (`cp`), kaiming uniform (a=√5), and w2_b with
        zeros.

        With `init_weights=False` w2_b is kaiming uniform, too. "abba" calls `init_abba` instead; `use_khatri_rao`,
        unless the kernel is factored, `init_ones`.
        """
        if self.cfg.init_weights == "abba":
            self.init_abba()
        elif self.cfg.use_khatri_rao and not self.cp:
            self.init_ones()
        else:
            names = ["w1_a", "w1_b", "w2_a", "w2_b"] + ["t1", "t2"] * self.cp
            for name in names:
                if name == "w2_b" and self.cfg.init_weights:
                    nn.init.zeros_(self.hada_w2_b)
                else:
                    fill_kaiming(getattr(self, f"hada_{name}"))

    @torch.no_grad()
    def init_ones(self) -> None:
        """Start with a second product of ones: column 0 of w2_a and row 0 of w2_b are 1, the rest of w2_a 0, the rest
        of w2_b normal with std 1/√fan_in.

        w1_a is 0, so that ΔW = 0, and w1_b kaiming uniform (a=√5). Warns that weight decay would shrink the ones.
        """
        warn_of_layer(
            self.site.key,
            "With use_khatri_rao, the factors w2 of {} begin with ones that weight decay would shrink. Let it be 0 "
            "for them.",
            PeftWarning,
        )
        nn.init.zeros_(self.hada_w1_a)
        fill_kaiming(self.hada_w1_b)
        nn.init.normal_(self.hada_w2_b, std=self.hada_w2_b.shape[1] ** -0.5)
        self.hada_w2_b[0] = 1
        nn.init.zeros_(self.hada_w2_a)
        self.hada_w2_a[:, 0] = 1

    @torch.no_grad()
    def init_abba(self) -> None:
        """Fill w1_a and w1_b with the best product of rank r for W₀ (√S in each), w2_a with zeros and w2_b kaiming
        uniform (a=0).
        """
        U, S, V = find_largest_components(self.layer.W0.flatten(1), self.cfg.r)
        self.hada_w1_a.copy_(U * S.sqrt())
        self.hada_w1_b.copy_(S.sqrt()[:, None] * V)
        nn.init.kaiming_uniform_(self.hada_w2_b)
        nn.init.zeros_(self.hada_w2_a)

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return matrices a (out, r), b (r, fan_in), c, d of ΔW = scaling · (a b) ⊙ (c d).

        With a factored kernel b and d include it. In training, rank and module dropout scale the rows of a, rescaled.
        """
        a, b, c, d = (getattr(self, f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        if self.cp:  # b and d take in the kernel's factors
            b, d = kernel_of(self.hada_t1, b), kernel_of(self.hada_t2, d)
            a, c = a.T, c.T
        mask = self.row_mask(a, rescale=True)
        return a if mask is None else a * mask[:, None], b, c, d

    def factors(self) -> Factors:
        """Return `Factors` of rank r² that equal ΔW: row-wise products of the four matrices of `parts`, with the scale
        alpha / r.
        """
        return Factors(*narrow(*self.parts()), scale=self.scaling)

    def delta(self) -> Hadamard:
        """Return ΔW = scaling · (a b) ⊙ (c d) as a `Hadamard`, which is not formed until somebody needs it."""
        return Hadamard(*self.parts(), self.scaling, self.site.shape)
