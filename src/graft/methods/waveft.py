# SPDX-License-Identifier: Apache-2.0
"""WaveFT: Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets, arXiv 2505.12532."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from graft.config.bounds import Bound
from graft.config.fields import WAVELET, BaseBias
from graft.core.errors import PeftWarning, warn
from graft.core.method import Method
from graft.kernels.transforms import Basis, Plain, Sparse, Wavelet
from graft.methods.spectral import Spectral, SpectralConfig

# low-pass and high-pass filters of the synthesis, by family
LOW: dict[str, tuple[float, ...]] = {
    name: tuple(low) for name, low in json.loads(Path(__file__).with_name("wavelets.json").read_text()).items()
}
HIGH = {name: tuple((-1) ** k * c for k, c in enumerate(reversed(low))) for name, low in LOW.items()}
FAMILY = Bound(
    LOW.__contains__,
    f"Wavelet family {{value}} not supported. Supported wavelet families are: {', '.join(LOW)}",
)


@dataclass(kw_only=True)
class WaveFTConfig(SpectralConfig, BaseBias):
    """WaveFT: ΔW is the inverse wavelet transform of n coefficients, at places that a seed draws.

    Raises:
        ConfigError: an unknown wavelet, or a number of coefficients that is not positive.
    """

    peft_type: str = "WAVEFT"
    n_frequency: int = 2592  # n; at most the size of the weight
    scaling: float = 25.0
    wavelet_family: Annotated[str, FAMILY] = "db1"  # db1 to db10, sym2 to sym10, or coif1 to coif5
    use_idwt: bool = True  # False: the coefficients are entries of ΔW itself
    random_loc_seed: int = 777  # of the places, which no file holds
    proportional_parameters: bool = False  # layers share n times their number in proportion to their sizes
    init_weights: bool = True  # zeros, the identity; False: small random values

    def __post_init__(self) -> None:
        """Validate the fields; warn of coif4 and coif5, where PEFT's filters differ."""
        super().__post_init__()
        if self.wavelet_family in ("coif4", "coif5"):
            warn(
                f"PEFT 0.21.2 has other filters than those of {self.wavelet_family}: its files of that family compute "
                "something else here, and graft's there.",
                PeftWarning,
            )


class WaveFT(Spectral[WaveFTConfig]):
    """WaveFT, arXiv 2505.12532: ΔW = scaling · S M Tᵀ, where M is zero but at n places.

    S synthesizes its columns, T its rows, by a wavelet.
    """

    prefix = "waveft_"
    targets = WAVELET
    shown = (*Spectral.shown, "wavelet_family", "use_idwt")
    places = "waveft_indices"

    waveft_spectrum: nn.Parameter  # (n,)
    waveft_indices: Tensor  # (2, n), the places in M

    @classmethod
    def split_budget(cls, methods: Sequence[Method]) -> None:
        """Give each layer a shallow copy of its config.

        Its `n_frequency` becomes the layer's part of `n_frequency` times the number of layers, rounded, at least 1. The
        part is in proportion to out · fan_in.

        A layer keeps its config if `proportional_parameters` is False there; its size counts in the sum all the same.
        """
        cfgs = [m.cfg for m in methods]
        sizes = [m.site.out_features * m.site.fan_in for m in methods]
        for m, cfg, size in zip(methods, cfgs, sizes):
            if cfg.proportional_parameters:
                m.cfg = copy.copy(cfg)
                m.cfg.n_frequency = max(1, round(size / sum(sizes) * cfg.n_frequency * len(methods)))

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return the parameter `waveft_spectrum` (n,) of zeros, on the default device, in the default dtype; then
        places and facts of `Spectral.build`.
        """
        spectrum = nn.Parameter(torch.zeros(self.cfg.n_frequency))
        return {"waveft_spectrum": spectrum, **super().build(shared)}

    def init_values(self) -> None:
        """With `init_weights=False` fill the coefficients with normal values of std 0.01; else keep the zeros."""
        if not self.cfg.init_weights:
            self.waveft_spectrum.data.copy_(torch.randn(len(self.waveft_spectrum)) * 0.01)

    def basis(self, n: int) -> Basis:
        """Return the basis of vectors of n numbers: a `Wavelet` of the family; with `use_idwt=False` `Plain`, the
        entries themselves.
        """
        family = self.cfg.wavelet_family
        return Wavelet(n, LOW[family], HIGH[family]) if self.cfg.use_idwt else Plain(n)

    def transform(self) -> Sparse:
        """Return ΔW = scaling · S M Tᵀ as a `Sparse`, which is not formed until somebody needs it.

        The places are moved to the middle of the grid of coefficients, which may be larger than ΔW. With wavelets,
        their halves are exchanged as in PEFT.
        """
        site = self.site
        S, T = self.basis(site.out_features), self.basis(site.fan_in)
        u, v = self.waveft_indices  # in the middle of the grid of coefficients, which may be larger than ΔW
        u, v = u + (S.size - site.out_features) // 2, v + (T.size - site.fan_in) // 2
        if isinstance(S, Wavelet) and isinstance(T, Wavelet):  # details of the rows stand to the right, as in PEFT
            u, v = v // T.half * S.half + u % S.half, u // S.half * T.half + v % T.half
        return Sparse(self.cfg.scaling * self.waveft_spectrum[None], u, v, S, T, site.shape)
