# SPDX-License-Identifier: Apache-2.0
"""TinyLoRA: Learning to Reason in 13 Parameters, arXiv 2602.04118."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from graft.config.fields import COUNT, FRACTION, LORA, BaseBias, FanInFanOut, LayerRange, Targets
from graft.core.effect import Factors
from graft.core.method import COMPARISON, AdaptedLayers, Method, PublishedRate, WeightUse
from graft.methods.projections import maybe_transient


@dataclass(kw_only=True)
class TinyLoraConfig(Targets, LayerRange, FanInFanOut, BaseBias):
    """TinyLoRA: a vector of u numbers, for one layer or for many, that mixes random r × r matrices between the singular
    vectors of the weight."""

    peft_type: str = "TINYLORA"
    r: Annotated[int, COUNT] = 2  # how many singular vectors
    u: Annotated[int, COUNT] = 64  # numbers that train, for each group of layers
    weight_tying: Annotated[float, FRACTION] = 0.0  # from 0, a vector for each layer, to 1, one for all
    projection_seed: int = 42  # of the random matrices
    save_projection: bool = True  # put them into files, too, which then do not depend on the generator
    init_v_bound: float = 0.02  # of the vectors, if they begin random
    tinylora_dropout: float = 0.0
    init_weights: bool | Literal["uniform"] = True  # vectors of zeros; False or "uniform": random

    counters = ("projection_seed",)


class TinyLoRA(Method[TinyLoraConfig]):
    """TinyLoRA, arXiv 2602.04118: ΔW = B (Σ v_k P_k) A, with B diag(s) A the best approximation of W₀ of rank r.

    Embeddings have Aᵀ (…)ᵀ Bᵀ.
    """

    prefix = "tinylora_"
    weight_use = WeightUse.STARTS  # a file holds A and B
    published_lr = PublishedRate(1e-3, 1e-3, COMPARISON)
    targets = LORA
    agreeing_fields = ("save_projection",)

    tinylora_A: Tensor  # (r, in); of embeddings (r, embedding_dim)
    tinylora_B: Tensor  # (out, r); of embeddings (vocabulary, r)
    tinylora_P: Tensor  # (u, r, r)
    tinylora_v: nn.Module  # parameters (u,) of all groups of layers, shared
    tinylora_dropout: nn.Module
    tinylora_group: int

    @classmethod
    def share(cls, layers: AdaptedLayers) -> dict[str, object]:
        """Return new trained vectors `tinylora_v` (u,), also if other adapters have some, one for each group of layers,
        and `tinylora_places`: by path the layer's number, the number of groups, and that of layers.

        There are round(layers · (1 - weight_tying)) groups, at least one. The vectors are zeros, or uniform within
        ±`init_v_bound` if `init_weights` is not True.
        """
        cfg, sites = layers.cfg, layers.sites
        groups = max(1, round(len(sites) * (1 - cfg.weight_tying)))
        vectors = nn.ParameterDict()
        for group in range(groups):
            v = torch.zeros(cfg.u)
            if cfg.init_weights is not True:
                nn.init.uniform_(v, -cfg.init_v_bound, cfg.init_v_bound)
            vectors[str(group)] = nn.Parameter(v)
        places = {site.key: (n, groups, len(sites)) for n, site in enumerate(sites)}
        return dict(tinylora_v=vectors, tinylora_places=places)

    @property
    def rank(self) -> int:
        """r, or the smaller width of the layer if that is less."""
        return min(int(self.cfg.r), self.site.fan_in, self.site.out_features)

    def build(self, shared: dict[str, Any]) -> dict[str, object]:
        """Return the shared vectors, buffers `tinylora_A` (r, in) and `tinylora_B` (out, r) of zeros, `tinylora_P` (u,
        r, r), the layer's group `tinylora_group`, and r = `rank`.

        P is normal with std 1/√r from the seed `projection_seed` + the layer's number; files hold it with
        `save_projection`. On the meta device it is not drawn. The group is number // (layers // groups), at most the
        last one. A layer without a place counts as number 0 of one. On an embedding A is (r, embedding_dim), B
        (vocabulary, r).
        """
        cfg, site, r = self.cfg, self.site, self.rank
        places = shared["tinylora_places"].container[self.name] if shared else {}
        place, groups, layers = places.get(site.key, (0, 1, 1))
        rows, columns = (site.fan_in, site.out_features) if site.op.takes_ids else (site.out_features, site.fan_in)
        P = torch.empty(cfg.u, r, r)
        if not P.is_meta:
            P.normal_(0, r**-0.5, generator=torch.Generator("cpu").manual_seed(cfg.projection_seed + place))
        return shared | dict(
            tinylora_A=torch.zeros(r, columns),
            tinylora_B=torch.zeros(rows, r),
            tinylora_P=maybe_transient(P, cfg.save_projection),
            tinylora_group=min(place // max(1, layers // groups), groups - 1),
            r=r,
        )

    @torch.no_grad()
    def init_values(self) -> None:
        """Fill A = √S Vᵀ and B = U √S with the r largest singular triples of W₀; of an embedding, of W₀ᵀ.

        The SVD is in float32; its results are rounded to W₀'s dtype before the root.
        """
        W = self.layer.W0.flatten(1)
        svd = torch.linalg.svd((W.T if self.site.op.takes_ids else W).float(), full_matrices=False)
        U, S, V = (t.to(W.dtype) for t in svd)  # rounded before the square root, as PEFT does
        root = S[: self.rank].sqrt()
        self.tinylora_A.copy_(root[:, None] * V[: self.rank])
        self.tinylora_B.copy_(U[:, : self.rank] * root)

    def factors(self) -> Factors:
        """Return Factors of A and B R, without a scale, with R = Σ v_k P_k (r, r).

        On an embedding they are Bᵀ and (R A)ᵀ. Both have `tinylora_dropout`.

        v is that of the layer's group, cast to P's dtype and device.
        """
        P, v = self.tinylora_P, getattr(self.tinylora_v, str(self.tinylora_group))
        R = (v.to(P.device, P.dtype) @ P.flatten(1)).view(P.shape[1:])
        A, B = self.tinylora_A, self.tinylora_B
        if self.site.op.takes_ids:
            return Factors(B.T, (R @ A).T, dropout=self.tinylora_dropout)
        return Factors(A, B @ R, dropout=self.tinylora_dropout)
