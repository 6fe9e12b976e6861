# SPDX-License-Identifier: Apache-2.0
"""FourierFT: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, arXiv 2405.03003."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graft.config.fields import LayerRange, Targeted
from graft.config.targets import FOURIER
from graft.core.containers import Transient
from graft.core.effect import Effect, Update
from graft.core.errors import ConfigError
from graft.core.method import Method
from graft.kernels.fourier import Spectrum


@dataclass(kw_only=True)
class FourierFTConfig(Targeted, LayerRange):
    """FourierFT: ΔW is the inverse Fourier transform of n coefficients, at places that a seed draws.

    Raises:
        ConfigError: a number of coefficients that is not positive.
    """

    peft_type: Any = "FOURIERFT"
    n_frequency: int = 1000  # n; at most the size of the weight
    scaling: float = 150.0
    random_loc_seed: int | None = 777  # of the places, which no file holds; so there has to be one
    fan_in_fan_out: bool = False  # the layers store (in, out); corrected by layer type
    bias: str = "none"  # which base biases train: none, all, fourier_only
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)  # n by layer name or regex
    init_weights: bool = False  # True: zeros, the identity; False: normally distributed

    patterns: ClassVar[dict[str, str]] = {"n_frequency_pattern": "n_frequency"}
    counters: ClassVar[tuple[str, ...]] = ("random_loc_seed",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for n in (self.n_frequency, *(self.n_frequency_pattern or {}).values()):
            require_frequencies(n)
        if self.random_loc_seed is None:
            raise ConfigError("`random_loc_seed` must be a number: nothing else says where the coefficients stand.")


def require_frequencies(n: int) -> None:
    if n <= 0:
        raise ConfigError(f"`n_frequency` should be a positive integer value but the value passed is {n}")


class FourierFT(Method):
    """ΔW = scaling · Re ifft2(F), where F is zero but at n places."""

    config = FourierFTConfig
    prefix = "fourierft_"
    targets = FOURIER

    fourierft_spectrum: nn.Parameter  # (n,)
    indices: Tensor  # (2, n), the places in F

    def describe(self) -> Effect:
        vectors = len(self.site.shape) == 2 and not self.site.op.takes_ids
        return Update(self.delta, branch=self.branch if vectors else None)

    def check(self) -> str | None:
        return super().check() or too_many(self)

    def build(self, shared: dict[str, Any]) -> dict[str, Any]:
        cfg, site = self.cfg, self.site
        n = cfg.n_frequency
        return dict(
            fourierft_spectrum=nn.Parameter(torch.randn(n)),
            indices=Transient(places(site.out_features, site.fan_in, n, cfg.random_loc_seed)),
            fourierft_n_frequency=n,
            fourierft_scaling=cfg.scaling,
            fourierft_random_loc_seed=cfg.random_loc_seed,
        )

    def init(self) -> None:
        if self.cfg.init_weights:
            nn.init.zeros_(self.fourierft_spectrum)

    def spectrum(self) -> Spectrum:
        site = self.site
        size = site.out_features, site.fan_in
        return Spectrum(self.fourierft_spectrum, self.indices, size, self.cfg.scaling, site.shape)

    def delta(self) -> Spectrum:
        return self.spectrum()

    def branch(self, x: Tensor) -> Tensor:
        return self.spectrum().times(x)


def too_many(m: Any) -> str | None:
    """Say that the weight has fewer places than the config wants; None if it has enough."""
    n, most = m.cfg.n_frequency, m.site.out_features * m.site.fan_in
    if n <= most:
        return None
    return (
        "`n_frequency` should be less than or equal to the product of the input and output dimensions but the value "
        f"passed is {n} and the product is {most}"
    )


@lru_cache(maxsize=16)
def places(out: int, fan_in: int, n: int, seed: int) -> Tensor:
    """Draw n places in a matrix, (2, n), on the CPU: as in PEFT, the first of a random order of all."""
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(out * fan_in, generator=generator, device="cpu")[:n]
    return torch.stack((order // fan_in, order % fan_in))
