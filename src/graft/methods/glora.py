# SPDX-License-Identifier: Apache-2.0
"""GLoRA: One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning, arXiv 2306.07967."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from graft.config.fields import COUNT, LORA, BaseBias, Targets
from graft.core.effect import Effect, Update
from graft.core.method import COMPARISON, Method, PublishedRate
from graft.kernels.narrow import multiply_widened
from graft.kernels.one_product import Modulated, Rescaled


@dataclass(kw_only=True)
class GloraConfig(Targets, BaseBias):
    """GLoRA: W' = W + W ⊙ A + B, b' = b + b ⊙ D + E + W C.

    Raises:
        ConfigError: an unknown kind of tensor, or a rank that is not positive.
    """

    peft_type: str = "GLORA"
    r: Annotated[int, COUNT] = 8
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"  # a product of rank r; a number per row; one
    config_C: Literal["lora", "vector", "none"] = "lora"
    config_D_E: Literal["vector", "constant", "none"] = "constant"
    init_weights: bool = True  # the identity; else random


class Support(nn.Module):
    """One of GLoRA's tensors, of a shape: a product of two matrices, a number for each row, one number, or zeros."""

    Xd: nn.Parameter  # (rows, r)
    Xu: nn.Parameter  # (r, columns)
    X: nn.Parameter  # (rows, 1), (rows,) or (1,)
    zeros: Tensor  # in memory and in files, as PEFT has it; nothing reads it

    def __init__(self, kind: str, shape: tuple[int, ...], r: int):
        """Make the parameters of a tensor of `shape`, uninitialised.

        "lora": `Xd` (rows, r) and `Xu` (r, columns). "none": a buffer `zeros` of the whole shape. "constant": `X` (1,).
        "vector": `X` (rows, 1, …).
        """
        super().__init__()
        self.kind = kind
        if kind == "lora":
            self.Xd, self.Xu = nn.Parameter(torch.empty(shape[0], r)), nn.Parameter(torch.empty(r, shape[1]))
        elif kind == "none":
            self.register_buffer("zeros", torch.zeros(shape))
        else:
            self.X = nn.Parameter(torch.empty(1 if kind == "constant" else (shape[0], *[1] * (len(shape) - 1))))

    def start(self, as_nothing: bool) -> None:
        """Fill the parameters, the last one first: with `as_nothing` zeros, except `Xu`.

        All others are kaiming uniform (a=√5), except those of kind "constant", which are normal with std 0.02.
        """
        for name, p in reversed(list(self.named_parameters())):
            if as_nothing and name != "Xu":
                nn.init.zeros_(p)
            elif self.kind == "constant":
                nn.init.normal_(p, std=0.02)
            else:
                nn.init.kaiming_uniform_(p if p.dim() > 1 else p[None], a=math.sqrt(5))


class GLoRA(Method[GloraConfig]):
    """GLoRA, arXiv 2306.07967: ΔW = W₀ ⊙ A + B, Δb = b₀ ⊙ D + E + W₀ C."""

    prefix = "glora_"
    published_lr = PublishedRate(5e-4, 5e-4, COMPARISON)
    targets = LORA

    glora_A: Support  # (out, in · kernel)
    glora_B: Support
    glora_C: Support  # (in · kernel, 1)
    glora_D: Support  # (out,)
    glora_E: Support

    @property
    def shifts(self) -> bool:
        """True if C, D and E act: the layer has a bias."""
        return getattr(self.site.module, "bias", None) is not None

    def describe(self) -> Effect:
        """Return an `Update` by `delta` that reads W₀ (`of_weight`), with the bias update `shift` if the layer has a
        bias.
        """
        return Update(self.delta, of_weight=True, bias=self.shift if self.shifts else None)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return `glora_A` to `glora_E`, five `Support` modules of the kinds in the config: A and B (out, fan_in), C
        (fan_in, 1), D and E (out,).

        On a layer without bias C, D and E are of kind "none". Floating-point tensors are made on the default device, in
        the default dtype.
        """
        cfg, out, fan_in = self.cfg, self.site.out_features, self.site.fan_in
        C, D_E = (cfg.config_C, cfg.config_D_E) if self.shifts else ("none", "none")
        return dict(
            glora_A=Support(cfg.config_A_B, (out, fan_in), cfg.r),
            glora_B=Support(cfg.config_A_B, (out, fan_in), cfg.r),
            glora_C=Support(C, (fan_in, 1), cfg.r),
            glora_D=Support(D_E, (out,), cfg.r),
            glora_E=Support(D_E, (out,), cfg.r),
        )

    def init_values(self) -> None:
        """Fill all five tensors (`Support.start`): the update starts as zero; with `init_weights=False` all values are
        random.
        """
        for support in (self.glora_A, self.glora_B, self.glora_C, self.glora_D, self.glora_E):
            support.start(self.cfg.init_weights)

    def delta(self, W0: Tensor) -> Modulated | Rescaled:  # type: ignore[override]
        """Return ΔW = W₀ ⊙ A + B, not formed yet: a `Modulated` of the four factors for kind "lora", else a `Rescaled`
        of the two tensors; of None and None for kind "none".
        """
        A, B = self.glora_A, self.glora_B
        if A.kind == "lora":
            return Modulated(W0, A.Xd, A.Xu, B.Xd, B.Xu)
        return Rescaled(W0, None, None) if A.kind == "none" else Rescaled(W0, A.X, B.X)

    def shift(self) -> Tensor:
        """Return Δb = b₀ ⊙ D + E + W₀ C, (out,), in the adapter's dtype, for a layer with a bias.

        With kind "none" of D and E, or of C, their terms are left out. A C of kind "lora" is the product Xd Xu.
        """
        C, D, E, dtype = self.glora_C, self.glora_D, self.glora_E, self.dtype
        b0 = self.layer.b0.to(dtype)
        shift = torch.zeros_like(b0) if D.kind == "none" else b0 * D.X + E.X
        if C.kind == "none":
            return shift
        c = C.Xd @ C.Xu if C.kind == "lora" else C.X
        return shift + multiply_widened(c.T, self.layer.W0.flatten(1).T)[0]
