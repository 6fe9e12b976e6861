# SPDX-License-Identifier: Apache-2.0
"""LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters, arXiv 2405.17604.

LoRA-SB: Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning,
arXiv 2411.19557: A and B are singular vectors of AdamW's first step of the weight, and the adapter begins with that
step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from graft.config.fields import COUNT, LORA, LayerRange, Targeted
from graft.core.each import Matrix
from graft.core.effect import Factors
from graft.core.errors import ConfigError
from graft.core.method import Method, PublishedRate, WeightUse, make_dropout
from graft.core.site import Site
from graft.methods.projections import maybe_transient


@dataclass(kw_only=True)
class LoraXsConfig(Targeted, LayerRange):
    """LoRA-XS: r × r numbers between the largest singular vectors of the weight, which do not train."""

    peft_type: str = "LORAXS"
    r: Annotated[int, COUNT] = 8
    lora_alpha: float = 8  # the update counts alpha / r times
    lora_dropout: float = 0.0
    save_projection: bool = True  # put A and B into files, which then do not depend on the decomposition
    init_weights: bool | Literal["sb"] = True  # R of zeros; False: of the paper's N(0, 1e-5); "sb": LoRA-SB

    def __post_init__(self) -> None:
        """Validate the fields; raise ConfigError for init_weights="sb" without `save_projection`."""
        super().__post_init__()
        if self.init_weights == "sb" and not self.save_projection:
            raise ConfigError("init_weights='sb' begins with data, which a load lacks. Leave save_projection on.")


class LoraXS(Method[LoraXsConfig]):
    """LoRA-XS, arXiv 2405.17604: ΔW = s · B R A, with B A the best approximation of W₀ of rank r; only R trains."""

    prefix = "loraxs_"
    published_lr = PublishedRate(1e-4, 4e-3, "arXiv 2405.17604, GLUE (to 1e-3) and models of 7B (from 2e-3)")
    targets = LORA
    base_mark = "_graft_lorasb_step"  # (out, in), by `graft.preprocess_lorasb`

    loraxs_R: nn.Parameter  # (r, r)
    loraxs_A: Tensor  # (r, fan_in): singular vectors, times their values
    loraxs_B: Tensor  # (out, r): singular vectors
    loraxs_dropout: nn.Module
    scaling: float

    def check(self) -> str | None:
        """Raise ConfigError if r is above the smaller side of a known layer's weight.

        Then return a reason against init_weights="sb" on layers other than linear ones, and on a single matrix of a
        stack; else that of `Method.check`.
        """
        site = self.site
        check_vectors("LoRA-XS", site, self.cfg.r)
        if self.cfg.init_weights == "sb" and (not site.op.linear or isinstance(site.op, Matrix)):
            return "LoRA-SB measures linear layers only"
        return super().check()

    def uses_weight(self) -> WeightUse:
        """Return `WeightUse.STARTS`; with `save_projection=False` also `WeightUse.BEFORE_LOAD`, so that `init_values`
        computes A and B before a load.
        """
        return WeightUse.STARTS if self.cfg.save_projection else WeightUse.STARTS | WeightUse.BEFORE_LOAD

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return `loraxs_R` (r, r), trained, and the buffers `loraxs_A` (r, fan_in) and `loraxs_B` (out, r), all zeros;
        `loraxs_dropout` (`make_dropout(cfg.lora_dropout)`) and scaling = alpha / r.

        Files hold A and B only with `save_projection`. Floating-point tensors are made on the default device, in the
        default dtype.
        """
        cfg, site, r = self.cfg, self.site, self.cfg.r
        return dict(
            loraxs_R=nn.Parameter(torch.zeros(r, r)),
            loraxs_A=maybe_transient(torch.zeros(r, site.fan_in), cfg.save_projection),
            loraxs_B=maybe_transient(torch.zeros(site.out_features, r), cfg.save_projection),
            loraxs_dropout=make_dropout(cfg.lora_dropout),
            scaling=cfg.lora_alpha / r,
        )

    @torch.no_grad()
    def init_values(self) -> None:
        """Fill A = S Vᵀ and B = U with the r largest singular triples of W₀; R stays 0, or is normal with std 1e-5 for
        `init_weights=False`.

        "sb" takes the triples of the step that `preprocess_lorasb` has left: R = diag(S / scaling) and A = Vᵀ.
        """
        W = self.layer.W0 if self.cfg.init_weights != "sb" else self.step()
        U, S, V = find_largest_components(W.flatten(1), self.cfg.r)
        if not self.cfg.init_weights:
            nn.init.normal_(self.loraxs_R, std=1e-5)
        if self.cfg.init_weights == "sb":
            self.loraxs_R.copy_(torch.diag(S / self.scaling))
            S = torch.ones_like(S)
        self.loraxs_A.copy_(S[:, None] * V)
        self.loraxs_B.copy_(U)

    def step(self) -> Tensor:
        """Take the update step (out, in) that `preprocess_lorasb` has left on the base layer: remove it there and
        return it.

        Raises:
            CalibrationError: the layer has none.
        """
        return self.take_from_base(
            f"There is no step for layer '{self.site.key}' (adapter '{self.name}'). Call preprocess_lorasb with this "
            "model and config before.",
        )

    def factors(self) -> Factors:
        """Return A and B R with scaling and dropout; A and B are cast to R's dtype."""
        R = self.loraxs_R
        A, B = self.loraxs_A.to(R.dtype), self.loraxs_B.to(R.dtype)  # FSDP casts parameters for a call, not buffers
        return Factors(A, B @ R, self.scaling, self.loraxs_dropout)


def check_vectors(title: str, site: Site, r: int) -> None:
    """Raise ConfigError if r is above the smaller side of a layer's weight. A layer of unknown type passes."""
    if site.op.known and r > min(site.out_features, site.fan_in):
        raise ConfigError(
            f"{title} takes r singular vectors of a weight, and that of layer '{site.key}' has the shape "
            f"{tuple(site.shape)}. Choose a smaller r than {r}."
        )


def find_largest_components(W: Tensor, r: int, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, r), S (r,) and V (r, in) of the r largest singular values of W after the `first` ones, in at least
    float32.

    The largest entry of each column of U is positive, so that every decomposition gives the same.
    """
    U, S, V = torch.linalg.svd(W.to(torch.promote_types(W.dtype, torch.float32)), full_matrices=False)
    some = slice(first, first + r)
    U, S, V = U[:, some], S[some], V[some]
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()  # (1, r)
    return U * sign, S, V * sign.T
