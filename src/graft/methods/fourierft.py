# SPDX-License-Identifier: Apache-2.0
"""FourierFT: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, arXiv 2405.03003."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.config.fields import FOURIER, BaseBias
from graft.core.method import PublishedRate
from graft.kernels.transforms import Spectrum
from graft.methods.spectral import Spectral, SpectralConfig


@dataclass(kw_only=True)
class FourierFTConfig(SpectralConfig, BaseBias):
    """FourierFT: ΔW is the inverse Fourier transform of n coefficients, at places that a seed draws.

    Raises:
        ConfigError: a number of coefficients that is not positive.
    """

    peft_type: str = "FOURIERFT"
    n_frequency: int = 1000  # n; at most the size of the weight
    scaling: float = 150.0
    init_weights: bool = False  # True: zeros, the identity; False: normally distributed


class FourierFT(Spectral[FourierFTConfig]):
    """FourierFT, arXiv 2405.03003: ΔW = scaling · Re ifft2(F), where F is zero but at n places."""

    prefix = "fourierft_"
    published_lr = PublishedRate(4.3e-2, 0.12, "arXiv 2405.03003, its code, GLUE")
    targets = FOURIER
    places = "indices"

    fourierft_spectrum: nn.Parameter  # (n,)
    indices: Tensor  # (2, n), the places in F

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return the parameter `fourierft_spectrum` (n,) of normal values, on the default device, in the default
        dtype; then places and facts of `Spectral.build`.
        """
        spectrum = nn.Parameter(torch.randn(self.cfg.n_frequency))
        return {"fourierft_spectrum": spectrum, **super().build(shared)}

    def init_values(self) -> None:
        """With `init_weights` fill the coefficients with zeros; else, by default, keep the normal values."""
        if self.cfg.init_weights:
            nn.init.zeros_(self.fourierft_spectrum)

    def transform(self) -> Spectrum:
        """Return ΔW = scaling · Re ifft2(F) as a `Spectrum`, which is not formed until somebody needs it."""
        site = self.site
        size = site.out_features, site.fan_in
        return Spectrum(self.fourierft_spectrum, self.indices, size, self.cfg.scaling, site.shape)
