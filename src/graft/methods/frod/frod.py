# SPDX-License-Identifier: Apache-2.0
"""FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees, AAAI 2026, doi 10.1609/aaai.v40i31.39813."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.config.targets import FROD
from graft.core.containers import Attached, Transient
from graft.core.dropout import dropout_for
from graft.core.effect import Effect, Update
from graft.core.errors import ConfigError, PeftWarning, warn
from graft.core.method import Layers, Method
from graft.core.near import near
from graft.core.site import Site
from graft.kernels.refactored import Refactored
from graft.methods.frod.basis import basis, category, entries, support, width
from graft.methods.frod.config import FrodConfig
from graft.methods.projections import kept

SMALLEST = 1e-12  # norm of a column that counts


class FRoD(Method):
    """W' = U (diag(λ) + S) Vᵀ, with U diag(λ) Vᵀ = W₀ at the start and S sparse, 0 at the start."""

    config = FrodConfig
    prefix = "frod_"
    targets = FROD
    shares_from_weight = True
    narrow = frozenset({"frod_U", "frod_V"})
    alike = ("projection_prng_key", "save_projection")

    frod_lambda_l: nn.Parameter  # (in,)
    frod_lambda_s_values: nn.Parameter  # (entries,)
    frod_U: Tensor  # (out, in)
    frod_dropout: nn.Module

    @classmethod
    def share(cls, layers: Layers) -> dict[str, Any]:
        cfg, existing, first = layers.cfg, layers.existing, next(iter(layers.others), None)
        groups: dict[str, list[Site]] = {}
        for site in layers.sites:
            groups.setdefault(category(site.key), []).append(site)
        generator = torch.Generator("cpu").manual_seed(cfg.projection_prng_key)
        values: dict[str, Any] = {}
        for name in sorted(groups):
            n = width(name, groups[name])
            places = support(n, cfg.sparse_rate, generator)
            if first is not None and first in existing.get(f"frod_V.{name}", ()):
                V, before = (existing[f"frod_{part}.{name}"][first] for part in ("V", "s_indices"))
                if len(V) != n:
                    raise ConfigError(f"frod_V of '{name}' is for {len(V)} inputs, and {n} are required.")
                places = before if before.shape == places.shape else places
            else:
                V = basis(groups[name], n, cfg.regularization_alpha)
            for part, t in (("V", V), ("s_indices", places), ("s_size", torch.tensor([n, n]))):
                values[f"frod_{part}.{name}"] = kept(t, cfg.save_projection)
        return values

    def build(self, shared: dict[str, Any]) -> dict[str, Any]:
        cfg, site, mine = self.cfg, self.site, category(self.site.key)
        n = site.fan_in
        common = [shared[f"frod_{part}.{mine}"].container for part in ("V", "s_indices")] if shared else []
        return dict(
            frod_shared=Attached(common),  # out of sight: names in memory are PEFT's
            frod_lambda_l=nn.Parameter(torch.zeros(n)),
            frod_lambda_s_values=nn.Parameter(torch.zeros(entries(n, cfg.sparse_rate))),
            frod_U=Transient(torch.zeros(site.out_features, n)),
            frod_dropout=dropout_for(cfg.frod_dropout),
        )

    def describe(self) -> Effect:
        return Update(self.delta, of_weight=True, dropout=self.dropout)

    def dropout(self) -> nn.Module:
        return self.frod_dropout

    def inits_from_weight(self) -> bool:
        return True

    def inits_before_load(self) -> bool:
        return False  # `loaded` follows

    @torch.no_grad()
    def init(self) -> None:
        scale = self.rotate()
        if scale is None:
            return
        dtype = self.layer.W0.dtype
        if not self.cfg.init_weights:
            s = self.frod_lambda_s_values
            s.copy_(torch.empty(s.shape, dtype=dtype).normal_(0, 0.1))  # drawn and rounded as in PEFT
            scale = scale.to(dtype) + torch.randn(scale.shape, dtype=dtype) * 0.1
        self.frod_lambda_l.copy_(scale)

    @torch.no_grad()
    def loaded(self) -> None:
        self.rotate()

    @property
    def shared(self) -> tuple[Tensor, Tensor]:
        """V (in, in), and the rows and columns of the entries of S (2, entries)."""
        device = self.frod_U.device
        V, places = (near(container[self.name], device) for container in self.layer.frod_shared)
        return V, places

    def rotate(self) -> Tensor | None:
        """Set U so that U diag(λ) Vᵀ = W₀; return λ, (in,). None on the meta device."""
        shared = self.layer.frod_shared[0][self.name]
        if self.site.on_meta or shared.is_meta:
            warn(
                f"FRoD needs the weight of layer '{self.site.key}', which is on the meta device: adapt the model when "
                "it has its values.",
                PeftWarning,
            )
            return None
        W, V = (t.detach().to("cpu", torch.float64) for t in (self.layer.W0.flatten(1), shared))
        try:
            b = torch.linalg.solve(V, W.T).T
        except RuntimeError:  # singular
            b = W @ torch.linalg.pinv(V, rtol=1e-6).T
        scale: Tensor = b.norm(dim=0)
        U = torch.where(scale > SMALLEST, b / scale.clamp(min=SMALLEST), 0.0)
        self.frod_U.copy_(U)
        return scale

    def delta(self, W0: Tensor) -> Refactored:  # type: ignore[override]
        V, (rows, columns) = self.shared
        n, values = len(V), torch.cat((self.frod_lambda_l, self.frod_lambda_s_values))
        places = torch.cat((torch.arange(n, device=V.device) * (n + 1), rows * n + columns))
        return Refactored(W0, self.frod_U.to(values.dtype), V.to(values.dtype), values, places)
