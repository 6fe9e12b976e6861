# SPDX-License-Identifier: Apache-2.0
"""OSF: Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning, arXiv 2504.07097."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from graft.config.fields import OSF as TARGETS
from graft.config.fields import Targets
from graft.config.reading import compile_pattern
from graft.core.base_config import model_type
from graft.core.containers import Transient
from graft.core.effect import Effect, Factors, Update
from graft.core.errors import ConfigError, warn
from graft.core.method import COMPARISON, Method, Published, Use
from graft.kernels.narrow import project_gradient_inside, project_gradient_outside
from graft.kernels.one_product import Difference


@dataclass(kw_only=True)
class OSFConfig(Targets):
    """OSF: the small singular components of each weight train, outside of the space of the large ones."""

    peft_type: str = "OSF"
    effective_rank: int | float | None = None  # components that stay: a number, a share in (0, 1], or None: half
    rank_pattern: dict[str, int | float] | None = None  # the same by regex, found anywhere in a layer's path
    init_weights: bool | None = True  # the components of the weight; False: random
    target_svd_config: dict[str, int] | None = None  # in PEFT's files; nobody reads it

    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "effective_rank"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_svd_config is not None:
            warn("target_svd_config has no effect: set effective_rank or rank_pattern.")

    def reaches(self, text: str, key: str, field: str) -> bool:
        return compile_pattern(text, field, f".*?(?:{text})").match(key) is not None


class OSF(Method[OSFConfig]):
    """ΔW = U S V - U₀ S₀ V₀, where U₀ S₀ V₀ are the smallest components of W₀.

    Gradients of U and V are projected out of the space of the largest components, in the graph of the forward pass:
    hooks on parameters would not survive a cast.
    """

    prefix = "osf_"
    published_lr = Published(5e-5, 5e-5, COMPARISON)
    targets = TARGETS

    osf_svd_params: nn.ParameterDict  # U_low (out, r), S_low (r,), V_low (r, fan_in)
    osf_U_init: Tensor  # (out, r)
    osf_S_init: Tensor  # (r,)
    osf_V_init: Tensor  # (r, fan_in)
    osf_U_high: Tensor  # (out, k), if out > fan_in
    osf_V_high: Tensor  # (k, fan_in), if out < fan_in

    @classmethod
    def default_targets(cls, model: nn.Module) -> list[str] | str:
        return cls.targets.get(model_type(model), "all-linear")

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Return out, fan_in, how many components stay and how many train."""
        out, n = self.site.out_features, self.site.fan_in
        k = staying(self.cfg.effective_rank, min(out, n))
        return out, n, k, min(out, n) - k

    def check(self) -> str | None:
        if self.site.op.known and self.sizes[2] <= 0:
            raise ConfigError(
                f"`effective_rank` should be a positive integer value but the value passed is {self.sizes[2]}, from "
                f"{self.cfg.effective_rank}, on layer '{self.site.key}'."
            )
        return super().check()

    def uses_weight(self) -> Use:
        return Use.STARTS | Use.AGAIN

    def describe(self) -> Effect:
        out, n, _, r = self.sizes
        return Update(factors=self.factors) if 4 * r * (out + n) < out * n else Update(self.delta)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        out, n, k, r = self.sizes
        fixed: dict[str, tuple[int, ...]] = {"U_init": (out, r), "S_init": (r,), "V_init": (r, n)}
        fixed |= {"U_high": (out, k)} if out > n else {"V_high": (k, n)} if out < n else {}
        # `init` finds them in the weight
        values: dict[str, object] = {f"osf_{name}": Transient(torch.empty(shape)) for name, shape in fixed.items()}
        make = torch.randn if self.cfg.init_weights is False else torch.zeros
        small = dict(U_low=make(out, r), S_low=make(r), V_low=make(r, n))
        return dict(osf_svd_params=nn.ParameterDict(small)) | values

    @torch.no_grad()
    def init(self) -> None:
        out, n, k, _ = self.sizes
        W = self.layer.W0.detach().flatten(1)
        U, S, V = torch.linalg.svd(W.to(torch.promote_types(W.dtype, torch.float32)).contiguous(), full_matrices=False)
        low, name = dict(U=U[:, k:], S=S[k:], V=V[k:]), self.name
        for letter, values in low.items():
            getattr(self.layer, f"osf_{letter}_init")[name] = values.clone()
            if self.cfg.init_weights is not False:
                self.osf_svd_params[f"{letter}_low"].copy_(values)
        if out > n:
            self.layer.osf_U_high[name] = U[:, :k].clone()
        if out < n:
            self.layer.osf_V_high[name] = V[:k].clone()

    def components(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return U S, V, U₀ S₀ and V₀; gradients of U and V leave the space of the large components alone."""
        small, U0, V0 = self.osf_svd_params, self.osf_U_init, self.osf_V_init
        out, n, *_ = self.sizes
        U, V = small["U_low"], small["V_low"]
        if torch.is_grad_enabled():
            U = project_gradient_outside(U, self.osf_U_high) if out > n else project_gradient_inside(U, U0)
            V = project_gradient_outside(V.T, self.osf_V_high.T).T if out < n else project_gradient_inside(V.T, V0.T).T
        S0, dtype = self.osf_S_init, U.dtype
        if U0.dtype != dtype:  # FSDP casts parameters for a call, and leaves buffers as they are
            U0, S0, V0 = U0.to(dtype), S0.to(dtype), V0.to(dtype)
        return U * small["S_low"], V, U0 * S0, V0

    def factors(self) -> Factors:
        """Return factors of twice the rank, for where they are cheaper than ΔW."""
        B, A, B0, A0 = self.components()
        return Factors(torch.cat((A, A0)), torch.cat((B, -B0), 1))

    def delta(self) -> Difference:
        return Difference(*self.components(), self.site.shape)


def staying(wanted: int | float | None, m: int) -> int:
    """Return how many of m components stay."""
    if wanted is None:
        return m // 2
    share = isinstance(wanted, float) and wanted <= 1
    return min(int(m * wanted if share else wanted), m)
