# SPDX-License-Identifier: Apache-2.0
"""PSOFT: Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation, arXiv 2505.11235."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from graft.config.bounds import Bound
from graft.config.fields import COUNT, LORA, FanInFanOut, LayerRange, Targeted
from graft.core.containers import ExactBuffers
from graft.core.effect import Factors, Product
from graft.core.errors import ConfigError, warn
from graft.core.method import Method, Tensors, WeightUse
from graft.core.random import draw_from_seed
from graft.core.site import Site
from graft.kernels.orthogonal import orthogonal, skew
from graft.methods.oft import TERMS

ALPHA = Bound(bool, "`{name}` must not be 0: B holds the singular values divided by alpha / r.")
EPS = Bound(lambda eps: 0 < eps < 1, "`{name}` must be in (0, 1) when set; got {value}.")


@dataclass(kw_only=True)
class PsoftConfig(Targeted, LayerRange, FanInFanOut):
    """PSOFT: rotation and scaling within the space of the weight's r largest singular components."""

    peft_type: str = "PSOFT"
    r: Annotated[int, COUNT] = 32
    psoft_alpha: Annotated[int, ALPHA] = 32  # the update counts alpha / r times
    psoft_dropout: float = 0.0
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"  # singular values in B, or their roots in A and B
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0  # of "lowrank"
    psoft_orth: bool = True  # R is orthogonal; else any matrix
    psoft_mag_b: bool = True  # a factor per row of R
    psoft_mag_a: bool = True  # a factor per column of R
    use_cayley_neumann: bool = False  # a power series in place of the exact Cayley transform
    num_cayley_neumann_terms: Annotated[int, TERMS] = 5
    cayley_neumann_eps: Annotated[float | None, EPS] = None  # in (0, 1): the largest Frobenius norm of Q
    init_weights: bool = True  # the identity; else random

    counters = ("random_seed",)

    def __post_init__(self) -> None:
        """Validate the fields; warn of each option that has no effect.

        Without `use_cayley_neumann` these are `cayley_neumann_eps` other than None and `num_cayley_neumann_terms` other
        than 5. Without psoft_svd="lowrank" it is a `psoft_svd_lowrank_niter` other than 10.
        """
        super().__post_init__()
        eps, terms = self.cayley_neumann_eps, self.num_cayley_neumann_terms
        niter = self.psoft_svd_lowrank_niter
        for name, value, condition, met in (
            ("cayley_neumann_eps", eps is not None, "use_cayley_neumann=True", self.use_cayley_neumann),
            ("num_cayley_neumann_terms", terms != 5, "use_cayley_neumann=True", self.use_cayley_neumann),
            ("psoft_svd_lowrank_niter", niter != 10, "psoft_svd='lowrank'", self.psoft_svd == "lowrank"),
        ):
            if value and not met:
                warn(f"`{name}` is only used when `{condition}`. It has no effect here.")


BASIS = "psoft_basis"  # container


class Turn(nn.Module):
    """R (r, r) as the strict upper triangle of Q or as it is, and the factors of its rows and columns."""

    def __init__(self, r: int, cfg: PsoftConfig):
        """Make uninitialised `weight`: (r (r - 1) / 2) with `psoft_orth`, else (r, r); and `vector_b`, `vector_a` (r,)
        of ones, None without `psoft_mag_b`, `psoft_mag_a`.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.empty(r * (r - 1) // 2 if cfg.psoft_orth else (r, r)))
        self.vector_b = nn.Parameter(torch.ones(r)) if cfg.psoft_mag_b else None
        self.vector_a = nn.Parameter(torch.ones(r)) if cfg.psoft_mag_a else None


class Basis(ExactBuffers):
    """The singular components within which R turns, in at least float32."""

    A: Tensor  # (r, fan_in)
    B: Tensor  # (out, r)

    def __init__(self, r: int, site: Site):
        """Register uninitialised buffers A (r, fan_in) and B (out, r)."""
        super().__init__()
        self.register_buffer("A", torch.empty(r, site.fan_in))
        self.register_buffer("B", torch.empty(site.out_features, r))


class PSOFT(Method[PsoftConfig]):
    """PSOFT, arXiv 2505.11235: ΔW = s · B (R - I) A, where s · B A are the r largest singular components of W₀ and do
    not train.

    Files hold A and B: decomposed anew on another device, or from a rounded weight, they may have other signs and mix
    components of similar size, and R would turn another space. PEFT's files lack them.
    """

    prefix = "psoft_"
    weight_use = WeightUse.STARTS  # a file holds the basis
    targets = LORA

    psoft_R: Turn
    psoft_basis: Basis
    psoft_dropout: nn.Module
    scaling: float

    def check(self) -> str | None:
        """Raise ConfigError if r is above the smaller side of a known layer's weight; else return the reason of
        `Method.check`.
        """
        r, most = self.cfg.r, min(self.site.out_features, self.site.fan_in)
        if self.site.op.known and r > most:
            raise ConfigError(
                f"`r` ({r}) must be less than or equal to min(in_features, out_features) ({self.site.fan_in}, "
                f"{self.site.out_features}), layer '{self.site.key}'."
            )
        return super().check()

    def from_file_tensors(self, tensors: Tensors, cfg: PsoftConfig) -> Tensors:
        """Return the file's tensors; if they lack the basis, as PEFT's do, add that of this adapter, or of the weight
        if it has no values.

        On the meta device nothing is added.
        """
        basis = self.psoft_basis
        if any(place[0] == BASIS for place in tensors) or self.site.on_meta:
            return tensors
        A, B = self.components() if basis.A.is_meta else (basis.A, basis.B)
        return tensors | {(BASIS, "A"): A, (BASIS, "B"): B}

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return `psoft_R` (`Turn`), `psoft_basis` (`Basis`), with uninitialised weights and buffers, and `scaling` =
        psoft_alpha / r. Floating-point tensors are made on the default device, in the default dtype.
        """
        cfg, r = self.cfg, self.cfg.r
        return dict(scaling=cfg.psoft_alpha / r, psoft_R=Turn(r, cfg), psoft_basis=Basis(r, self.site))

    @torch.no_grad()
    def init_values(self) -> None:
        """Fill R with the identity (zeros of its triangle with `psoft_orth`), and the basis with `components`.

        With `init_weights=False` R is random: triangle normal with std 0.1, or the identity plus such values.
        """
        cfg, R = self.cfg, self.psoft_R.weight
        if cfg.psoft_orth:
            self.fill_start(R, 0.1)
        else:
            nn.init.eye_(R)
            if not cfg.init_weights:
                R.add_(torch.randn_like(R), alpha=0.1)
        self.psoft_basis.A, self.psoft_basis.B = self.components()

    def components(self) -> tuple[Tensor, Tensor]:
        """Return A (r, fan_in) and B (out, r) from the r largest singular components of W₀, with singular values / s in
        B.

        With "pissa_init" their roots are in A and B.
        """
        U, S, V = self.largest()
        S = S / self.scaling
        if self.cfg.ab_svd_init == "pissa_init":
            S = S.sqrt()
            V = S[:, None] * V
        return V.clone(memory_format=torch.contiguous_format), (U * S).contiguous()  # as a file gives them: equal bits

    def largest(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the r largest singular components of W₀ in at least float32: U (out, r), S (r,), V (r, fan_in).

        psoft_svd="lowrank" takes a randomized SVD with `psoft_svd_lowrank_niter` iterations, seeded with `random_seed`;
        generators stay as they are.
        """
        cfg, W = self.cfg, self.layer.W0.detach().flatten(1)
        W = W.to(torch.promote_types(W.dtype, torch.float32)).contiguous()
        if cfg.psoft_svd == "full":
            U, S, V = torch.linalg.svd(W, full_matrices=False)
            return U[:, : cfg.r], S[: cfg.r], V[: cfg.r]
        with draw_from_seed(cfg.random_seed):
            U, S, V = torch.svd_lowrank(W, q=cfg.r, niter=cfg.psoft_svd_lowrank_niter)
        return U, S, V.T

    def R(self) -> Tensor:
        """Return R (r, r), in at least float32: orthogonal from the skew-symmetric Q with `psoft_orth`, else the
        weight.

        With `use_cayley_neumann` it is a series of `num_cayley_neumann_terms`. Q is first scaled to a norm of at most
        `cayley_neumann_eps`, unless that is None. Else it is the exact Cayley transform. Rows are then multiplied by
        `vector_b`, columns by `vector_a`, where there are such vectors.
        """
        cfg, parameters = self.cfg, self.psoft_R
        R = parameters.weight.to(torch.promote_types(parameters.weight.dtype, torch.float32))
        if cfg.psoft_orth:
            Q = skew(R[None], cfg.r)
            if cfg.cayley_neumann_eps is not None and cfg.use_cayley_neumann:
                Q = Q * (cfg.cayley_neumann_eps / Q.norm().clamp(min=1e-12)).clamp(max=1)
            # the series is that of (I + Q) (I - Q)⁻¹
            R = orthogonal(Q, cfg.num_cayley_neumann_terms)[0] if cfg.use_cayley_neumann else orthogonal(-Q, None)[0]
        R = R if parameters.vector_b is None else parameters.vector_b[:, None] * R
        return R if parameters.vector_a is None else R * parameters.vector_a

    def factors(self) -> Factors:
        """Return (R - I) A and B with scaling and dropout.

        On layers that take vectors A is a `Product` that keeps no input for the backward pass.

        On others both are cast to the adapter's dtype.
        """
        R = self.R()
        A, B = (t.to(R.dtype) for t in (self.psoft_basis.A, self.psoft_basis.B))  # `.half()` rounds them
        turn = R - torch.eye(len(R), dtype=R.dtype, device=R.device)
        turned = turn @ A
        if not self.site.multiplies_vectors:  # the layer takes matrices of one dtype with its input
            return Factors(turned.to(self.dtype), B.to(self.dtype), self.scaling, self.psoft_dropout)
        # A and B are fixed: no gradient of theirs needs x
        return Factors(Product(partial(into, A, turn), turned), B, self.scaling, self.psoft_dropout)


def into(A: Tensor, turn: Tensor, x: Tensor) -> Tensor:
    """Return x Aᵀ turnᵀ in the dtype of A: x (…, fan_in), A (r, fan_in), turn (r, r)."""
    return (x.to(A.dtype) @ A.T) @ turn.T
