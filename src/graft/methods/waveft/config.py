# SPDX-License-Identifier: Apache-2.0
"""The config of WaveFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graft.core.errors import ConfigError, PeftWarning, warn
from graft.methods.spectral import SpectralConfig
from graft.methods.waveft.filters import LOW


@dataclass(kw_only=True)
class WaveFTConfig(SpectralConfig):
    """WaveFT: ΔW is the inverse wavelet transform of n coefficients, at places that a seed draws.

    Raises:
        ConfigError: an unknown wavelet, or a number of coefficients that is not positive.
    """

    peft_type: Any = "WAVEFT"
    n_frequency: int = 2592  # n; at most the size of the weight
    scaling: float = 25.0
    wavelet_family: str = "db1"  # db1 to db10, sym2 to sym10, or coif1 to coif5
    use_idwt: bool = True  # False: the coefficients are entries of ΔW itself
    random_loc_seed: int = 777  # of the places, which no file holds
    bias: str = "none"  # which base biases train: none, all, waveft_only
    proportional_parameters: bool = False  # layers share n times their number in proportion to their sizes
    init_weights: bool = True  # zeros, the identity; False: small random values

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wavelet_family not in LOW:
            raise ConfigError(
                f"Wavelet family {self.wavelet_family} not supported. Supported wavelet families are: {', '.join(LOW)}"
            )
        if self.wavelet_family in ("coif4", "coif5"):
            warn(
                f"PEFT 0.21.2 has other filters than those of {self.wavelet_family}: its files of that family compute "
                "something else here, and graft's there.",
                PeftWarning,
            )
