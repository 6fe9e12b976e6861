# SPDX-License-Identifier: Apache-2.0
"""OSF: Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning, arXiv 2504.07097."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.config.fields import TARGETS, Targets
from graft.config.reading import compile_pattern
from graft.core.containers import Transient
from graft.core.effect import Effect, Factors, Update
from graft.core.errors import ConfigError, warn
from graft.core.method import COMPARISON, Method, PublishedRate, WeightUse
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

    patterns = {"rank_pattern": "effective_rank"}

    def __post_init__(self) -> None:
        """Validate the fields; warn that `target_svd_config` does nothing, if it is not None."""
        super().__post_init__()
        if self.target_svd_config is not None:
            warn("target_svd_config has no effect. Set effective_rank or rank_pattern.")

    def reaches(self, text: str, key: str, field: str) -> bool:
        """Return True if the regular expression `text` matches anywhere in the path `key`.

        Raises ConfigError, with the name `field`, if the text is no regular expression.
        """
        return compile_pattern(text, field, f".*?(?:{text})").match(key) is not None


class OSF(Method[OSFConfig]):
    """OSF, arXiv 2504.07097: ΔW = U S V - U₀ S₀ V₀, where U₀ S₀ V₀ are the smallest components of W₀.

    Gradients of U and V are projected out of the space of the largest components, in the graph of the forward pass:
    hooks on parameters would not survive a cast.
    """

    prefix = "osf_"
    fallback_targets = "all-linear"
    weight_use = WeightUse.STARTS | WeightUse.BEFORE_LOAD
    published_lr = PublishedRate(5e-5, 5e-5, COMPARISON)
    targets = TARGETS["OSF"]

    osf_svd_params: nn.ParameterDict  # U_low (out, r), S_low (r,), V_low (r, fan_in)
    osf_U_init: Tensor  # (out, r)
    osf_S_init: Tensor  # (r,)
    osf_V_init: Tensor  # (r, fan_in)
    osf_U_high: Tensor  # (out, k), if out > fan_in
    osf_V_high: Tensor  # (k, fan_in), if out < fan_in

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """out, fan_in, the number of components that stay, and the number that train, which is the rest of min(out,
        fan_in). `staying` counts the first by `effective_rank`.
        """
        out, n = self.site.out_features, self.site.fan_in
        k = staying(self.cfg.effective_rank, min(out, n))
        return out, n, k, min(out, n) - k

    def check(self) -> str | None:
        """Raise ConfigError if no component of a known layer stays (`sizes`: 0 or fewer); else return the reason of
        `Method.check`.
        """
        if self.site.op.known and self.sizes[2] <= 0:
            raise ConfigError(
                f"`effective_rank` should be a positive integer value but the value passed is {self.sizes[2]}, from "
                f"{self.cfg.effective_rank}, on layer '{self.site.key}'."
            )
        return super().check()

    def describe(self) -> Effect:
        """Return an `Update` by `factors` of rank 2 r where these are cheap, 4 r (out + in) < out · in; else by
        `delta`.
        """
        out, n, _, r = self.sizes
        return Update(factors=self.factors) if 4 * r * (out + n) < out * n else Update(self.delta)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return the trained `osf_svd_params` with U_low (out, r), S_low (r,), V_low (r, in): zeros, or normal values
        with `init_weights=False`.

        Uninitialised buffers, which no file holds: `osf_U_init`, `osf_S_init`, `osf_V_init` of these shapes;
        `osf_U_high` (out, k) if out > in, `osf_V_high` (k, in) if out < in. Floating-point tensors are made on the
        default device, in the default dtype.
        """
        out, n, k, r = self.sizes
        fixed: dict[str, tuple[int, ...]] = {"U_init": (out, r), "S_init": (r,), "V_init": (r, n)}
        fixed |= {"U_high": (out, k)} if out > n else {"V_high": (k, n)} if out < n else {}
        # `init_values` finds them in the weight
        values: dict[str, object] = {f"osf_{name}": Transient(torch.empty(shape)) for name, shape in fixed.items()}
        make = torch.randn if self.cfg.init_weights is False else torch.zeros
        small = dict(U_low=make(out, r), S_low=make(r), V_low=make(r, n))
        return dict(osf_svd_params=nn.ParameterDict(small)) | values

    @torch.no_grad()
    def init_values(self) -> None:
        """Decompose W₀ in at least float32.

        The r smallest components fill the `_init` buffers and, unless `init_weights=False`, the trained tensors.

        The k largest fill `osf_U_high` or `osf_V_high`, where they exist.
        """
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
        """Return U S, V, U₀ S₀ and V₀, in U's dtype.

        With gradients on, the gradients of U and V are projected out of the space of the k large components. For the
        longer side, out or in, that uses the stored large vectors; else it projects onto the span of U₀ or V₀.
        """
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
        """Return factors of rank 2 r with the product U S V - U₀ S₀ V₀."""
        B, A, B0, A0 = self.components()
        return Factors(torch.cat((A, A0)), torch.cat((B, -B0), 1))

    def delta(self) -> Difference:
        """Return ΔW = U S V - U₀ S₀ V₀ as a `Difference`, not formed until somebody needs it."""
        return Difference(*self.components(), self.site.shape)


def staying(wanted: int | float | None, m: int) -> int:
    """Return the number of m components that stay, rounded down: half for None, a share of m for a float up to 1, else
    the number itself; at most m.
    """
    if wanted is None:
        return m // 2
    share = isinstance(wanted, float) and wanted <= 1
    return min(int(m * wanted if share else wanted), m)
