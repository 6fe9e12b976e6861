# SPDX-License-Identifier: Apache-2.0
"""The update of few frequencies, Re ifft2(F), by Fourier transforms of the input and the output."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graft.kernels.eager import eager
from graft.kernels.transformed import Parts, Sparse


class Waves(NamedTuple):
    """cos(2π f q / n), and -sin of it, for the frequencies f ≤ n / 2: a `Basis` of two parts."""

    n: int

    @property
    def size(self) -> int:
        return self.n // 2 + 1

    def analysis(self, x: Tensor) -> Parts:
        X = turned(torch.fft.rfft(x.contiguous()))  # torch 2.6 transforms no expanded tensors
        return X.real.contiguous(), X.imag.contiguous()

    def synthesis(self, z: Parts) -> Tensor:
        return torch.fft.irfft(turned(torch.complex(z[0], z[1])), n=self.n)

    def factors(self, index: Tensor) -> Tensor:
        alone = (index == 0) | (2 * index == self.n)  # every other f stands for -f, too
        return torch.where(alone, float(self.n), self.n / 2)

    def at(self, index: Tensor, q: Tensor, dtype: torch.dtype) -> Parts:
        turn = (index[:, None] * q % self.n).to(dtype) * (2 * torch.pi / self.n)
        return turn.cos(), -turn.sin()


def turned(X: Tensor) -> Tensor:
    """Return the transpose of a complex matrix."""
    if torch.is_grad_enabled() or X.dtype != torch.complex64 or not eager():
        return X.T
    return X.contiguous().view(torch.float64).T.contiguous().view(X.dtype)  # torch has a fast way for real numbers


class Spectrum(NamedTuple):
    """scale · Re ifft2(F), not formed yet. F (out, in) is zero but for real coefficients at places (u, v)."""

    coefficients: Tensor  # (n,)
    places: Tensor  # (2, n)
    size: tuple[int, int]  # of F
    scale: float
    shape: tuple[int, ...]  # of the weight that it updates

    def dense(self) -> Tensor:
        wide = self.coefficients.to(torch.promote_types(self.coefficients.dtype, torch.float32))
        F = wide.new_zeros(self.size).index_put((self.places[0], self.places[1]), wide)
        return torch.fft.ifft2(F).real.reshape(self.shape) * self.scale

    def halved(self) -> Sparse:
        """Return the same by frequencies f ≤ n / 2: (u, v) and (-u, -v) have one real part."""
        (out, fan_in), (u, v) = self.size, self.places
        back = 2 * u > out
        u, v = torch.where(back, out - u, u), torch.where(back, -v % fan_in, v)
        beyond = 2 * v > fan_in  # there the sine has the other sign
        v = torch.where(beyond, fan_in - v, v)
        c = self.coefficients * (self.scale / (out * fan_in))
        values = torch.stack((c, torch.where(beyond, c, -c)))
        return Sparse(values, u, v, Waves(out), Waves(fan_in), self.shape)

    def times(self, x: Tensor) -> Tensor:
        """Return x ΔWᵀ. x (…, in) → (…, out)."""
        return self.halved().times(x)

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns of ΔW that `ids` (…) name: (…, out)."""
        return self.halved().columns(ids)
