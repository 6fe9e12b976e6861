# SPDX-License-Identifier: Apache-2.0
"""Updates by fast transforms: circulant blocks, few frequencies, wavelets, and sums Σ_p S_p M_p T_pᵀ with sparse M.

The work never grows with the number of elements of the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from graft.kernels.eager import Context, VmapFunction, eager, only_backward
from graft.kernels.waits import constant


class Circulant(NamedTuple):
    """The matrix with circulant blocks, described by w (out / b, in / b, b), times `scale`; not formed yet."""

    w: Tensor
    scale: float
    shape: tuple[int, ...]  # of the weight that it updates

    def dense(self) -> Tensor:
        """Return the matrix in `shape`, with entry scale · w[m, n, (s - t) % b] in row t and column s of block
        (m, n).
        """
        b = self.w.shape[-1]
        t = torch.arange(b, device=self.w.device)
        blocks = self.w[:, :, (t - t[:, None]) % b]  # (m, n, t, s)
        return self.scale * blocks.transpose(1, 2).reshape(self.shape)

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns that `ids` (…) name, times the scale: (…, out), from the entries of w that `dense` would
        place there, without forming the matrix.
        """
        m, _, b = self.w.shape
        t = torch.arange(b, device=self.w.device)
        part, s = ids.reshape(-1, 1) // b, ids.reshape(-1, 1) % b
        picked = self.w[:, part, (s - t) % b]  # (m, ids, t)
        return self.scale * picked.transpose(0, 1).reshape(*ids.shape, m * b)


def plain_multiply_circulant(x: Tensor, w: Tensor) -> Tensor:
    """Return x Cᵀ, (…, out), with the matrix C formed; the reference. x (…, in), w (out / b, in / b, b).

    Block (m, n) has w[m, n, (s − t) mod b] in row t and column s: w is its first row.
    """
    m, n, b = w.shape
    return x @ Circulant(w, 1.0, (m * b, n * b)).dense().T


def multiply_circulant(x: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    """Return scale · x Cᵀ, (…, out), by FFT, in float32 at least; keep only x and w for the backward pass.

    C is the circulant matrix of w. An empty x gets the plain product; tracers and forward-mode derivatives get plain
    operations.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)
    if not x.numel():  # transforms take no empty batch
        return scale * plain_multiply_circulant(x.to(dtype), w.to(dtype))
    function = _CirculantProduct.apply if only_backward() else correlate
    return function(x.to(dtype), w.to(dtype), scale)


def block_spectra(x: Tensor, parts: int) -> Tensor:
    """Return the real FFT of each part of x (…, parts · b), by frequency: (b / 2 + 1, rows, parts), complex. x is not
    cast.
    """
    rows = x.reshape(-1, parts, x.shape[-1] // parts).contiguous()  # torch 2.6 transforms no expanded tensors
    return torch.fft.rfft(rows).permute(2, 0, 1)


def invert_spectra(X: Tensor, shape: tuple[int, ...], b: int) -> Tensor:
    """Return the inverse real FFT, over the first dimension, of X (b / 2 + 1, rows, parts): parts of b numbers, as
    `shape`.
    """
    return torch.fft.irfft(X.permute(1, 2, 0), n=b).reshape(shape)


def correlate(x: Tensor, w: Tensor, scale: float) -> Tensor:
    """Return scale · x Cᵀ by FFT, with C the circulant matrix of w; autograd records each step."""
    m, n, b = w.shape
    W = torch.fft.rfft(w * scale).permute(2, 1, 0)  # (frequency, n, m)
    return invert_spectra(block_spectra(x, n) @ W.conj(), (*x.shape[:-1], m * b), b)


class _CirculantProduct(VmapFunction):
    """The function of `multiply_circulant`."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, scale: float) -> Tensor:
        """Return scale · x Cᵀ by FFT."""
        return correlate(x, w, scale)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep x, w and the scale for the backward pass."""
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and w by FFT, each None without need; None for the scale."""
        x, w = ctx.saved_tensors
        m, n, b = w.shape
        G, dx, dw = block_spectra(g, m), None, None  # (frequency, rows, m)
        if ctx.needs_input_grad[0]:
            dx = invert_spectra(G @ torch.fft.rfft(w * ctx.scale).permute(2, 0, 1), x.shape, b)
        if ctx.needs_input_grad[1]:
            dw = torch.fft.irfft((G.mH @ block_spectra(x, n)).permute(1, 2, 0), n=b) * ctx.scale
        return dx, dw, None


class Waves(NamedTuple):
    """cos(2π f q / n), and -sin of it, for the frequencies f ≤ n / 2: a `Basis` of two parts."""

    n: int

    @property
    def size(self) -> int:
        """The number of frequencies, n / 2 + 1."""
        return self.n // 2 + 1

    def analysis(self, x: Tensor) -> Parts:
        """Return the real and the imaginary part of `rfft` along the last dimension of x (samples, n), with all its
        frequencies and unscaled: two contiguous tensors (size, samples).
        """
        X = transpose_complex(torch.fft.rfft(x.contiguous()))  # torch 2.6 transforms no expanded tensors
        return X.real.contiguous(), X.imag.contiguous()

    def synthesis(self, z: Parts) -> Tensor:
        """Return the signals (samples, n) of two parts (size, samples), by inverse FFT."""
        return torch.fft.irfft(transpose_complex(torch.complex(z[0], z[1])), n=self.n)

    def factors(self, index: Tensor) -> Tensor:
        """Return n / 2 for each frequency f in `index`, as f and -f share a cosine; n for the frequencies 0 and n / 2.

        They are float32.
        """
        alone = (index == 0) | (2 * index == self.n)  # every other f has the same cosine as -f
        return torch.full_like(index, self.n / 2, dtype=torch.float32).masked_fill(alone, float(self.n))

    def at(self, index: Tensor, q: Tensor, dtype: torch.dtype) -> Parts:
        """Return cos and -sin of 2π f q / n for the frequencies f in `index` and the samples q: two tensors (indices,
        samples) in `dtype`.
        """
        turn = (index[:, None] * q % self.n).to(dtype) * (2 * torch.pi / self.n)
        return turn.cos(), -turn.sin()


def transpose_complex(X: Tensor) -> Tensor:
    """Return the transpose of a complex matrix.

    In eager code without gradients, complex64 is transposed as float64, in new memory, which is faster; else it is a
    view.
    """
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
        """Return scale times the real part of the inverse FFT of F, in `shape`, in at least float32.

        Of equal places one coefficient counts.
        """
        wide = self.coefficients.to(torch.promote_types(self.coefficients.dtype, torch.float32))
        F = wide.new_zeros(self.size).index_put((self.places[0], self.places[1]), wide)
        return torch.fft.ifft2(F).real.reshape(self.shape) * self.scale

    def to_half_spectrum(self) -> Sparse:
        """Return the same matrix as a `Sparse` over `Waves`, from the frequencies f ≤ n / 2 alone.

        A place (u, v) beyond half of the rows or columns moves to a mirrored one, with the sine's sign changed where
        needed. Coefficients are divided by out · in and times the scale. (u, v) and (-u, -v) have one real part.
        """
        (out, fan_in), (u, v) = self.size, self.places
        back = 2 * u > out
        u, v = torch.where(back, out - u, u), torch.where(back, -v % fan_in, v)
        beyond = 2 * v > fan_in  # the sine changes its sign there
        v = torch.where(beyond, fan_in - v, v)
        c = self.coefficients * (self.scale / (out * fan_in))
        values = torch.stack((c, torch.where(beyond, c, -c)))
        return Sparse(values, u, v, Waves(out), Waves(fan_in), self.shape)

    def times(self, x: Tensor) -> Tensor:
        """Return x ΔWᵀ, (…, out), by `to_half_spectrum`: fast transforms over the frequencies f ≤ n / 2. x (…, in)."""
        return self.to_half_spectrum().times(x)

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns of ΔW that `ids` (…) name, (…, out), by `to_half_spectrum`, without forming ΔW.

        Only the frequencies f ≤ n / 2 are used, with coefficients times scale / (out · in).
        """
        return self.to_half_spectrum().columns(ids)


class Wavelet(NamedTuple):
    """The low-pass filter in steps of two, then the high-pass filter, as columns: a `Basis` of one part."""

    n: int
    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def half(self) -> int:
        """The number of columns of each filter: (n + number of taps - 1) // 2."""
        return (self.n + len(self.low) - 1) // 2

    @property
    def size(self) -> int:
        """The number of columns of both filters."""
        return 2 * self.half

    @property
    def first(self) -> int:
        """The number of entries of the first column that lie before the output: the number of taps less 2."""
        return len(self.low) - 2

    def analysis(self, x: Tensor) -> Parts:
        """Return a list of one tensor (size, samples): Sᵀ xᵀ for x (samples, n), the low-pass sums above the high-pass
        sums.

        The input gets zeros before and after it, as many as the filters reach beyond its ends. Each sum takes
        every second position.
        """
        reach = 2 * self.half - 1
        wide = pad(x, (self.first, 2 * self.half - self.n)).T.contiguous()
        taps = [wide[k : k + reach : 2] for k in range(len(self.low))]
        return [torch.cat([sum_weighted(f, taps) for f in (self.low, self.high)])]

    def synthesis(self, z: Parts) -> Tensor:
        """Return S z, transposed to (samples, n), for the one part z (size, samples).

        The first `half` rows of z are the low band, the others the high band; both are padded with zeros. Shifted bands
        are summed with the even taps of the filters for the even positions, with the odd taps for the odd ones. The
        result is the n positions from `first` on.
        """
        more = self.first // 2
        low, high = (pad(band, (0, 0, more, more)) for band in z[0].split(self.half))
        taps = [b[more - k : more - k + self.half + more] for b in (low, high) for k in range(more + 1)]
        both = [sum_weighted((*self.low[odd::2], *self.high[odd::2]), taps) for odd in (0, 1)]
        return torch.stack(both, 1).flatten(0, 1)[self.first : self.first + self.n].T

    def factors(self, index: Tensor) -> Tensor:
        """Return ones in the shape and dtype of `index`: this basis has no factors."""
        return torch.ones_like(index)

    def at(self, index: Tensor, q: Tensor, dtype: torch.dtype) -> Parts:
        """Return S[q, index] as one tensor (indices, samples) in `dtype`: filter taps, and zeros outside of a
        filter.
        """
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
        """The number of rows of the one part, n."""
        return self.n

    def analysis(self, x: Tensor) -> Parts:
        """Return the transpose of x (samples, n), contiguous, as one part."""
        return [x.T.contiguous()]

    def synthesis(self, z: Parts) -> Tensor:
        """Return the transpose of the one part."""
        return z[0].T

    def factors(self, index: Tensor) -> Tensor:
        """Return ones in the shape and dtype of `index`: this basis has no factors."""
        return torch.ones_like(index)

    def at(self, index: Tensor, q: Tensor, dtype: torch.dtype) -> Parts:
        """Return one tensor (indices, samples) in `dtype` with 1 where index and q agree, else 0."""
        return [(index[:, None] == q).to(dtype)]


def sum_weighted(weights: tuple[float, ...], terms: list[Tensor]) -> Tensor:
    """Return the sum of the terms, each times its weight, in new memory. Both have equally many items, at least one."""
    total = terms[0] * weights[0]
    for w, t in zip(weights[1:], terms[1:]):
        total = torch.add(total, t, alpha=w)
    return total


AT_ONCE = 1 << 18  # numbers that `sample_products` gathers at once: few enough for the cache


Parts = Sequence[Tensor]  # for each part, (size, samples)
# A basis is a matrix S (n, parts · size) with fast transforms; M acts on each part of its columns apart. `analysis`
# returns Sᵀ xᵀ for x (samples, n), `synthesis` (S D⁻¹ z)ᵀ, `factors` D[index], a scale that its caller applies first,
# and `at` S[q, index], (indices, samples) each.
Basis = Waves | Wavelet | Plain


class Sparse(NamedTuple):
    """Σ_p S_p M_p T_pᵀ, not formed yet. M_p[rows[e], cols[e]] is the sum of values[p, e] over all such e."""

    values: Tensor  # (parts, entries)
    rows: Tensor  # (entries,)
    cols: Tensor
    S: Basis
    T: Basis
    shape: tuple[int, ...]  # of the weight that it updates

    def dense(self) -> Tensor:
        """Return S_0 M_0 T_0ᵀ, the matrix of the first part, by two syntheses, in `shape`; meant for bases of one part.

        Values are multiplied by `S.factors(rows)` and `T.factors(cols)` first. Those at the same place add up.
        """
        S, T = self.S, self.T
        values = self.values[0] * S.factors(self.rows) * T.factors(self.cols)
        M = values.new_zeros(S.size, T.size).index_put((self.rows, self.cols), values, accumulate=True)
        return T.synthesis([S.synthesis([M])]).reshape(self.shape)

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns that `ids` (…) name: (…, n of S).

        Entries times `T.at` their columns are summed by row, and synthesized by S. Without ids return an empty tensor
        that keeps gradients.
        """
        q, values = ids.flatten(), self.values * self.S.factors(self.rows)
        if not len(q):  # transforms take no empty batch
            return values.new_zeros(*ids.shape, self.S.n) + 0 * values.sum()
        picked = [v[:, None] * t for v, t in zip(values, self.T.at(self.cols, q, values.dtype))]  # (entries, ids)
        z = [p.new_zeros(self.S.size, len(q)).index_add(0, self.rows, p) for p in picked]
        return self.S.synthesis(z).reshape(*ids.shape, self.S.n)

    def times(self, x: Tensor) -> Tensor:
        """Return x ΔWᵀ = Σ_p S_p M_p T_pᵀ x for each row of x (…, n of T): (…, n of S), by the transforms of T, then of
        S.

        x and the values are cast to the wider of their dtypes and float32; the result keeps that dtype. The backward
        pass keeps x and the entries. An empty x gets an empty result that keeps gradients. Tracers and forward-mode
        derivatives get plain operations.
        """
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.values.dtype), torch.float32)
        if not x.numel():  # transforms take no empty batch
            return x.to(dtype).new_zeros(*x.shape[:-1], self.S.n) + 0 * (x.sum() + self.values.sum())
        function = _TransformedProduct.apply if only_backward() else plain_transformed
        return function(x.to(dtype), self.values.to(dtype), self.rows, self.cols, self.S, self.T)


def plain_transformed(x: Tensor, values: Tensor, rows: Tensor, cols: Tensor, S: Basis, T: Basis) -> Tensor:
    """Return Σ_p S_p M_p T_pᵀ x for each row, (…, n of S), by operations that autograd records. x (…, n of T).

    M_p[rows[e], cols[e]] is the sum of values[p, e]. values (parts, entries), rows and cols (entries,).
    """
    flat = x.reshape(-1, x.shape[-1])
    return synthesize_entries(values, cols, T.analysis(flat), rows, S).reshape(*x.shape[:-1], -1)


def synthesize_entries(values: Tensor, source: Tensor, z: Parts, target: Tensor, S: Basis) -> Tensor:
    """Return the synthesis by S of sums: row target[e] is the sum of values[p, e] times row source[e] of z, over e.

    The values are multiplied by `S.factors(target)` first.

    Eager code uses embedding_bag on sorted entries, other code index_add.
    """
    values = values * S.factors(target)
    if eager():
        order, starts = sort_targets(target, S.size)
        pick, values = source[order], values[:, order]
        return S.synthesis(
            [embedding_bag(pick, p, starts, mode="sum", per_sample_weights=v) for p, v in zip(z, values)]
        )
    sums = (p.new_zeros(S.size, p.shape[1]).index_add(0, target, v[:, None] * p[source]) for p, v in zip(z, values))
    return S.synthesis(list(sums))


def sort_targets(target: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the permutation that sorts `target`, and for each number below `size` the position in it where that
    begins.
    """
    order = target.argsort()
    return order, torch.searchsorted(target[order], torch.arange(size, device=order.device))


def sample_products(G: Parts, rows: Tensor, z: Parts, cols: Tensor) -> Tensor:
    """Return Σ_samples G[p][rows[e]] z[p][cols[e]] for each part p and entry e, (parts, entries).

    Eager code without gradients uses the backward pass of embedding_bag. Eager code with gradients multiplies in chunks
    of `AT_ONCE` numbers, other code all at once.
    """
    if eager() and not torch.is_grad_enabled():
        order, starts = sort_targets(rows, len(G[0]))
        values, pick = [p.new_zeros(len(rows)).requires_grad_() for p in z], cols[order]
        with torch.enable_grad():  # the products are derivatives of such sums by their weights
            sums = [embedding_bag(pick, p, starts, mode="sum", per_sample_weights=v) for p, v in zip(z, values)]
            return torch.stack(torch.autograd.grad(sums, values, G))[:, order.argsort()]
    step = max(1, AT_ONCE // z[0].shape[1]) if eager() else len(rows)
    pairs = list(zip(rows.split(step), cols.split(step)))
    return torch.stack([torch.cat([(g[r] * p[c]).sum(1) for r, c in pairs]) for g, p in zip(G, z)])


class _TransformedProduct(VmapFunction):
    """The function of `Sparse.times`."""

    @staticmethod
    def forward(x: Tensor, values: Tensor, rows: Tensor, cols: Tensor, S: Basis, T: Basis) -> Tensor:
        """Return Σ_p S_p M_p T_pᵀ x for each row: `plain_transformed`."""
        return plain_transformed(x, values, rows, cols, S, T)

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save x, values, rows and cols for the backward pass; keep both bases as the attributes S and T of `ctx`."""
        *tensors, ctx.S, ctx.T = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and values, each None without need; None for the others.

        Both use the analysis of g by S. That of x is synthesized by T, contiguous; that of values comes from
        `sample_products`.
        """
        x, values, rows, cols = ctx.saved_tensors
        G, dx, dvalues = ctx.S.analysis(g.reshape(-1, g.shape[-1])), None, None
        if ctx.needs_input_grad[0]:
            # one row's gradient is contiguous as well, like that of several
            dx = synthesize_entries(values, rows, G, cols, ctx.T).reshape(x.shape).contiguous()
        if ctx.needs_input_grad[1]:
            dvalues = sample_products(G, rows, ctx.T.analysis(x.reshape(-1, x.shape[-1])), cols)
        return dx, dvalues, None, None, None, None
