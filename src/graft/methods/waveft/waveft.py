# SPDX-License-Identifier: Apache-2.0
"""WaveFT: Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets, arXiv 2505.12532."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.config.targets import WAVELET
from graft.kernels.transformed import Basis, Sparse
from graft.kernels.wavelet import Plain, Wavelet
from graft.methods.spectral import Spectral
from graft.methods.waveft.config import WaveFTConfig
from graft.methods.waveft.filters import HIGH, LOW


class WaveFT(Spectral):
    """ΔW = scaling · S M Tᵀ, where M is zero but at n places. S synthesizes its columns, T its rows, by a wavelet."""

    config = WaveFTConfig
    prefix = "waveft_"
    targets = WAVELET

    waveft_spectrum: nn.Parameter  # (n,)
    waveft_indices: Tensor  # (2, n), the places in M

    @classmethod
    def apportion(cls, methods: Sequence[Any]) -> None:
        cfgs = [m.cfg for m in methods]
        sizes = [m.site.out_features * m.site.fan_in for m in methods]
        for m, cfg, size in zip(methods, cfgs, sizes):
            if cfg.proportional_parameters:
                m.cfg = copy.copy(cfg)
                m.cfg.n_frequency = max(1, round(size / sum(sizes) * cfg.n_frequency * len(methods)))

    def build(self, shared: dict[str, Any]) -> dict[str, Any]:
        cfg = self.cfg
        return dict(
            waveft_spectrum=nn.Parameter(torch.zeros(cfg.n_frequency)),
            waveft_indices=self.places(),
            waveft_n_frequency=cfg.n_frequency,
            waveft_scaling=cfg.scaling,
            waveft_random_loc_seed=cfg.random_loc_seed,
            waveft_wavelet_family=cfg.wavelet_family,
            waveft_use_idwt=cfg.use_idwt,
        )

    def init(self) -> None:
        if not self.cfg.init_weights:
            self.waveft_spectrum.data.copy_(torch.randn(len(self.waveft_spectrum)) * 0.01)

    def basis(self, n: int) -> Basis:
        """Return the basis of vectors of n numbers."""
        family = self.cfg.wavelet_family
        return Wavelet(n, LOW[family], HIGH[family]) if self.cfg.use_idwt else Plain(n)

    def transform(self) -> Sparse:
        site = self.site
        S, T = self.basis(site.out_features), self.basis(site.fan_in)
        u, v = self.waveft_indices  # in the middle of the grid of coefficients, which may be larger than ΔW
        u, v = u + (S.size - site.out_features) // 2, v + (T.size - site.fan_in) // 2
        if isinstance(S, Wavelet) and isinstance(T, Wavelet):  # details of the rows stand to the right, as in PEFT
            u, v = v // T.half * S.half + u % S.half, u // S.half * T.half + v % T.half
        return Sparse(self.cfg.scaling * self.waveft_spectrum[None], u, v, S, T, site.shape)
