# SPDX-License-Identifier: Apache-2.0
"""A level of a wavelet's synthesis, without its matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from graft.kernels.transformed import Parts
from graft.kernels.waits import constant


class Wavelet(NamedTuple):
    """The low-pass filter in steps of two, then the high-pass filter, as columns: a `Basis` of one part."""

    n: int
    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def half(self) -> int:
        return (self.n + len(self.low) - 1) // 2

    @property
    def size(self) -> int:
        return 2 * self.half

    @property
    def first(self) -> int:
        """How much of the first column lies before the output."""
        return len(self.low) - 2

    def analysis(self, x: Tensor) -> Parts:
        reach = 2 * self.half - 1
        wide = pad(x, (self.first, 2 * self.half - self.n)).T.contiguous()
        taps = [wide[k : k + reach : 2] for k in range(len(self.low))]
        return [torch.cat([summed(f, taps) for f in (self.low, self.high)])]

    def synthesis(self, z: Parts) -> Tensor:
        more = self.first // 2
        low, high = (pad(band, (0, 0, more, more)) for band in z[0].split(self.half))
        taps = [b[more - k : more - k + self.half + more] for b in (low, high) for k in range(more + 1)]
        both = [summed((*self.low[odd::2], *self.high[odd::2]), taps) for odd in (0, 1)]
        return torch.stack(both, 1).flatten(0, 1)[self.first : self.first + self.n].T

    def factors(self, index: Tensor) -> Tensor:
        return torch.ones_like(index)

    def at(self, index: Tensor, q: Tensor, dtype: torch.dtype) -> Parts:
        filters = constant((self.low, self.high), dtype, q.device)
        band, place = index[:, None] // self.half, index[:, None] % self.half
        tap = q + self.first - 2 * place
        inside = (tap >= 0) & (tap < len(self.low))
        return [torch.where(inside, filters[band, tap.clamp(0, len(self.low) - 1)], 0.0)]


class Plain(NamedTuple):
    """The identity: a `Basis` of one part."""

    n: int

    @property
    def size(self) -> int:
        return self.n

    def analysis(self, x: Tensor) -> Parts:
        return [x.T.contiguous()]

    def synthesis(self, z: Parts) -> Tensor:
        return z[0].T

    def factors(self, index: Tensor) -> Tensor:
        return torch.ones_like(index)

    def at(self, index: Tensor, q: Tensor, dtype: torch.dtype) -> Parts:
        return [(index[:, None] == q).to(dtype)]


def summed(weights: tuple[float, ...], terms: list[Tensor]) -> Tensor:
    """Return the weighted sum of the terms."""
    total = terms[0] * weights[0]
    for w, t in zip(weights[1:], terms[1:]):
        total = torch.add(total, t, alpha=w)
    return total
