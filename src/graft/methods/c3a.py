# SPDX-License-Identifier: Apache-2.0
"""C3A: Parameter-Efficient Fine-Tuning via Circular Convolution, arXiv 2407.19342."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from graft.config.fields import COUNT, FOURIER, BaseBias, LayerRange, Targets
from graft.core.method import COMPARISON, Method, PublishedRate
from graft.kernels.transforms import Circulant, multiply_circulant
from graft.methods.projections import indivisible


@dataclass(kw_only=True)
class C3AConfig(Targets, LayerRange, BaseBias):
    """C3A: ΔW of circulant blocks b × b, each described by b numbers.

    Raises:
        ConfigError: a block size that is not positive.
    """

    peft_type: str = "C3A"
    block_size: Annotated[int, COUNT] = 256  # b; must divide the widths of all layers
    block_size_pattern: dict[str, int] | None = field(default_factory=dict)  # b by layer name or regex
    # False: "xavier_uniform"; True: zeros
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] | None = "xavier_uniform"

    patterns = {"block_size_pattern": "block_size"}


class C3A(Method[C3AConfig]):
    """C3A, arXiv 2407.19342: ΔW of circulant blocks, ΔW[m b + t, n b + s] = w[m, n, (s - t) mod b] / in."""

    prefix = "c3a_"
    published_lr = PublishedRate(0.3, 0.3, COMPARISON)
    targets = FOURIER

    c3a_kernel: nn.Parameter  # (out / b, in / b, b)

    def check(self) -> str | None:
        """Return the reason of `Method.check`, or, only if that is None, that b = `block_size` does not divide the
        input size or the output size.
        """
        b = self.cfg.block_size
        text = "The block size should be a factor of the {name}. However, the {name} is {size} and the block size is "
        return super().check() or indivisible(self.site, b, f"{text}{b}", ("input size", "output size"))

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return `c3a_kernel` (out / b, in / b, b) of zeros, trained, and the fact `block_size`.

        Floating-point tensors are made on the default device, in the default dtype.
        """
        b = self.cfg.block_size
        kernel = torch.zeros(self.site.out_features // b, self.site.fan_in // b, b)
        return dict(c3a_kernel=nn.Parameter(kernel), block_size=b)

    def init_values(self) -> None:
        """Fill the kernel as `init_weights` says.

        True: zeros. "gaussian": normal. "kaiming_uniform": within ±√(1 / in).

        "xavier_uniform", False and None: within ±√(6 / (in + out)).
        """
        start, fan_in, w = self.cfg.init_weights, self.site.fan_in, self.c3a_kernel
        if start is True:
            nn.init.zeros_(w)
        elif start == "gaussian":
            nn.init.normal_(w)
        else:
            bound = 1 / fan_in if start == "kaiming_uniform" else 6 / (fan_in + self.site.out_features)
            nn.init.uniform_(w, -math.sqrt(bound), math.sqrt(bound))

    def delta(self) -> Circulant:
        """Return ΔW as a `Circulant` of the kernel with the factor 1 / in, not formed until somebody needs it."""
        return Circulant(self.c3a_kernel, 1 / self.site.fan_in, self.site.shape)

    def branch(self, x: Tensor) -> Tensor:
        """Return ΔW x, (…, out), as circular convolutions of the blocks of x by FFT, in at least float32."""
        return multiply_circulant(x, self.c3a_kernel, 1 / self.site.fan_in)
