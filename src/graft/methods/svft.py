# SPDX-License-Identifier: Apache-2.0
"""SVFT: Parameter-Efficient Fine-Tuning with Singular Vectors, arXiv 2405.19597."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from graft.config.fields import COUNT, LORA, NOT_NEGATIVE, LayerRange, Targeted
from graft.core.effect import Factors
from graft.core.method import Method, PublishedRate, Tensors, WeightUse
from graft.methods.loraxs import check_vectors, find_largest_components
from graft.methods.projections import check_places, maybe_transient


@dataclass(kw_only=True)
class SvftConfig(Targeted, LayerRange):
    """SVFT: few numbers between the singular vectors of the weight, which do not train.

    Raises:
        ConfigError: r or off_diag is negative, or r is 0.
    """

    peft_type: str = "SVFT"
    r: Annotated[int | None, COUNT] = None  # singular vectors on each side; None: all
    off_diag: Annotated[int, NOT_NEGATIVE] = 0  # diagonals on each side of the main one; it says how many numbers train
    pattern: Literal["banded", "random", "top_k"] = "banded"  # where they stand; top_k: where the vectors are alike
    seed: int = 0  # of random places
    # put the vectors into files, which then weigh as much as the model's layers; without them a load finds them again,
    # but for those of singular values of 0, which are rounding: the weight has to be of rank r
    save_projection: bool = False
    init_weights: bool = True  # zeros; False: N(0, 1) / √n, for tests

    counters = ("seed",)


class SVFT(Method[SvftConfig]):
    """SVFT, arXiv 2405.19597: ΔW = σ(γ) U M V, with U and V of W₀ = U diag(S) V, and M (n, n) of few numbers that are
    not 0.
    """

    prefix = "svft_"
    published_lr = PublishedRate(5e-2, 5e-2, "arXiv 2405.19597")
    targets = LORA
    facts = ()

    svft_M: nn.Parameter  # (numbers,)
    svft_gate: nn.Parameter  # (1,): γ
    svft_places: Tensor  # (numbers,): i · n + j
    svft_U: Tensor  # (out, n)
    svft_V: Tensor  # (n, fan_in)

    @property
    def n(self) -> int:
        """The number of singular vectors: r, or the smaller side of the weight without r."""
        most = min(self.site.out_features, self.site.fan_in)
        return most if self.cfg.r is None else self.cfg.r

    def check(self) -> str | None:
        """Return the reason of `Method.check`.

        Before that, on layers of known type: ConfigError if the number n of vectors is above the smaller side of the
        weight, then a reason against pattern="top_k" on a weight that is not square.
        """
        site = self.site
        if not site.op.known:
            return super().check()
        check_vectors("SVFT", site, self.n)
        if self.cfg.pattern == "top_k" and site.out_features != site.fan_in:
            return "pattern='top_k' compares outputs with inputs: the weight has to be square"
        return super().check()

    def uses_weight(self) -> WeightUse:
        """Return `WeightUse.STARTS`; with `save_projection=False` also `WeightUse.BEFORE_LOAD`, so that `init_values`
        computes U and V before a load.
        """
        return WeightUse.STARTS if self.cfg.save_projection else WeightUse.STARTS | WeightUse.BEFORE_LOAD

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return trained `svft_M` (numbers,) and `svft_gate` (1,), buffers `svft_places` (numbers,), `svft_U` (out, n)
        and `svft_V` (n, fan_in), all zeros.

        numbers = n (2 d + 1) - d (d + 1) with d = min(off_diag, n - 1): those on the d diagonals on each side. Files
        hold U and V with `save_projection`. Places are int64. Floating-point tensors are made on the default device, in
        the default dtype.
        """
        site, n = self.site, self.n
        d = min(self.cfg.off_diag, n - 1)
        numbers = n * (2 * d + 1) - d * (d + 1)
        return dict(
            svft_M=nn.Parameter(torch.zeros(numbers)),
            svft_gate=nn.Parameter(torch.zeros(1)),
            svft_places=torch.zeros(numbers, dtype=torch.long),
            svft_U=maybe_transient(torch.zeros(site.out_features, n), self.cfg.save_projection),
            svft_V=maybe_transient(torch.zeros(n, site.fan_in), self.cfg.save_projection),
        )

    @torch.no_grad()
    def init_values(self) -> None:
        """Fill U and V with the singular vectors of W₀, and the places with `places`.

        M stays 0, or is normal with std 1/√n for `init_weights=False`.
        """
        U, _, V = find_largest_components(self.layer.W0.flatten(1), self.n)
        self.svft_U.copy_(U)
        self.svft_V.copy_(V)
        self.svft_places.copy_(self.places(U, V))
        self.fill_start(self.svft_M, self.n**-0.5)

    def places(self, U: Tensor, V: Tensor) -> Tensor:
        """Return the flat places of the numbers in M (n, n), ascending, (numbers,).

        "banded": the diagonals up to `off_diag`. "random": drawn from `seed`. "top_k": the largest entries of (V U)ᵀ,
        by value, not by size.
        """
        n, numbers = self.n, len(self.svft_M)
        if self.cfg.pattern == "banded":
            row = torch.arange(n, device="cpu")
            return ((row[:, None] - row).abs() <= self.cfg.off_diag).flatten().nonzero()[:, 0]
        if self.cfg.pattern == "random":
            generator = torch.Generator("cpu").manual_seed(self.cfg.seed)
            places = torch.randperm(n * n, generator=generator, device="cpu")[:numbers]
        else:
            places = (V @ U).T.flatten().topk(numbers)[1]
        return places.sort()[0]

    def from_file_tensors(self, tensors: Tensors, cfg: SvftConfig) -> Tensors:
        """Return the file's tensors unchanged.

        Raises CheckpointError if they have places below 0 or beyond the n² of M. Shapes are not checked, and missing
        places pass.
        """
        return check_places(tensors, "svft_places", self.n**2, self.site.key)

    def factors(self) -> Factors:
        """Return A = σ(γ) M V and B = U; U and V are cast to M's dtype."""
        n, M = self.n, self.svft_M * self.svft_gate.sigmoid()
        dense = M.new_zeros(n * n).index_put((self.svft_places,), M).view(n, n)
        U, V = self.svft_U.to(M.dtype), self.svft_V.to(M.dtype)  # FSDP casts parameters for a call, not buffers
        return Factors(dense @ V, U)
