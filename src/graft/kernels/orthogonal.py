# SPDX-License-Identifier: Apache-2.0
"""Orthogonal matrices from free parameters, by blocks; Householder reflections in compact WY form, H = I - U T Uᵀ
(Schreiber and Van Loan, 1989); rotations of pairs of channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graft.kernels.eager import Context, Function, autocast_dtype, eager, functional
from graft.kernels.low_rank import FUSED_FROM, worth_it


def skew(v: Tensor, size: int) -> Tensor:
    """Return skew-symmetric matrices (blocks, size, size) from their strict upper triangles v, row by row.

    v (blocks, size (size - 1) / 2).
    """
    rows, cols = torch.triu_indices(size, size, 1, device=v.device)
    Q = v.new_zeros(v.shape[0], size, size).index_put(
        (torch.arange(v.shape[0], device=v.device)[:, None], rows, cols), v
    )
    return Q - Q.mT


def constrain(v: Tensor, eps: float) -> Tensor:
    """Return v with each block's triangle scaled so that the block's Frobenius norm is at most eps / √blocks.

    v holds strict upper triangles, (blocks, …). Blocks within the limit stay.
    """
    limit = eps / math.sqrt(v.shape[0])
    norm = v.norm(dim=1, keepdim=True) * math.sqrt(2)  # norm of Q, which holds every entry twice
    return v * (limit / norm).clamp(max=1)


def constrain_in_backward(v: Tensor, eps: float) -> Tensor:
    """Return the value of `constrain(v, eps)`, with a backward pass for projected gradient descent.

    The gradient at the constrained point becomes the gradient of v. The backward pass overwrites v with that point, so
    that the next step starts there; the forward pass writes nothing. No overwriting under functional transforms.
    """
    out = v + (constrain(v.detach(), eps) - v.detach())
    if out.requires_grad and not functional():

        def move(g: Tensor) -> None:
            """Overwrite v's data with the constrained point; the gradient stays."""
            v.data.copy_(constrain(v.data, eps))

        out.register_hook(move)
    return out


def cayley(Q: Tensor, terms: int | None) -> Tensor:
    """Return (I - Q)(I + Q)⁻¹ of each block of Q (…, n, n).

    With `terms`, return PEFT's truncated series of it instead, I + 2Q + 2Q² + … + Qⁿ⁻¹: I for 1, I + 2Q for 2, and at
    least four terms for 3. Whether I + Q has an inverse is not checked.
    """
    I = torch.eye(Q.shape[-1], device=Q.device, dtype=Q.dtype)
    if terms is None:
        return torch.linalg.solve_ex(I + Q, I - Q, left=False)[0]  # I + Q has an inverse: no check, which would wait
    if terms == 1:
        return I.expand_as(Q)
    if terms == 2:
        return I + 2 * Q
    R, power = I + 2 * Q, Q
    for _ in range(2, max(terms, 4) - 1):
        power = power @ Q
        R = R + 2 * power
    return R + power @ Q


def orthogonal(Q: Tensor, terms: int | None) -> Tensor:
    """Return the value of `cayley(Q, terms)`.

    Where autograd records, outside of autocast and compilers and for other terms than 1 and 2, an autograd.Function
    keeps no powers of Q.
    """
    fused = terms not in (1, 2) and torch.is_grad_enabled() and eager() and autocast_dtype(Q.device) is None
    return _Orthogonal.apply(Q, terms) if fused else cayley(Q, terms)


class _Orthogonal(Function):
    """The function of `orthogonal`."""

    @staticmethod
    def forward(ctx: Context, Q: Tensor, terms: int | None) -> Tensor:
        """Return the Cayley transform of Q, which is kept; or with `terms` its series, by Horner's scheme, and
        keep Q.
        """
        ctx.terms = terms
        if terms is None:
            R = cayley(Q, None)
            ctx.save_for_backward(R)
            return R
        ctx.save_for_backward(Q)
        return torch.baddbmm(_eye(Q), Q, _horner_sums(Q, terms)[-1])

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of Q: from the kept transform, or with `terms` by Horner's sums, formed again; None for
        terms.
        """
        (saved,) = ctx.saved_tensors
        if ctx.terms is None:  # dR (I + Q) = -(I + R) dQ, and (I + Q)⁻¹ = (I + R) / 2
            J = (saved + _eye(saved)).mT
            return J @ g @ J * -0.5, None
        Q, dQ = saved, torch.zeros_like(saved)
        for P in reversed(_horner_sums(Q, ctx.terms)):
            dQ = torch.baddbmm(dQ, g, P.mT)
            g = Q.mT @ g
        return dQ + g, None


def _horner_sums(Q: Tensor, terms: int) -> list[Tensor]:
    """Return the list 2I + Q, 2I + Q (2I + Q), … with max(terms, 4) - 2 items.

    The series is I + Q times the last item, so that no power of Q is formed alone.
    """
    two = 2 * _eye(Q)
    sums = [two + Q]
    for _ in range(max(terms, 4) - 3):
        sums.append(torch.baddbmm(two, Q, sums[-1]))
    return sums


def _eye(Q: Tensor) -> Tensor:
    """Return the identity matrix with the size, device and dtype of Q's blocks."""
    return torch.eye(Q.shape[-1], device=Q.device, dtype=Q.dtype)


def rotate(x: Tensor, R: Tensor) -> Tensor:
    """Return x R, block by block, in the dtype of x, computed in the dtype of R by one batched product.

    For many rows (`worth_it`), keep x in its own dtype for the backward pass.

    x (…, blocks · b), R (blocks, b, b) → (…, blocks · b).
    """
    return _Rotate.apply(x, R) if worth_it(x) else _rotate_blocks(x, R)


def _rotate_blocks(x: Tensor, R: Tensor) -> Tensor:
    """Return x R, block by block, in the dtype of x, by plain operations in the dtype of R."""
    blocks = x.to(R.dtype).reshape(-1, *R.shape[:2]).transpose(0, 1)  # (blocks, rows, b)
    return torch.bmm(blocks, R).transpose(0, 1).reshape(x.shape).to(x.dtype)


class _Rotate(Function):
    """The function of `rotate`."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, R: Tensor) -> Tensor:
        """Return x R, block by block. Keeps x in its dtype, and R."""
        ctx.save_for_backward(x, R)
        return _rotate_blocks(x, R)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[object, object]:
        """Return the gradients g Rᵀ of x, in its dtype, and xᵀ g of R, block by block, each None without need."""
        x, R = ctx.saved_tensors
        g = g.to(R.dtype)
        dx = _rotate_blocks(g, R.mT).to(x.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        left, right = (t.reshape(-1, *R.shape[:2]) for t in (x.to(R.dtype), g))
        return dx, torch.bmm(left.permute(1, 2, 0), right.transpose(0, 1))


def butterfly_order(n: int, size: int, level: int) -> Tensor:
    """Return the permutation (n,) that a butterfly factor applies to its inputs.

    The inputs are cut into chunks of 2^level · size. A chunk's half blocks (size / 2) of its first half and of its
    second half alternate.
    """
    return torch.arange(n).view(-1, 2, 1 << level, size // 2).transpose(1, 2).flatten()


def butterfly(x: Tensor, R: Tensor, orders: Tensor | None, transpose: bool = False) -> Tensor:
    """Return x R_F … R_1, or with `transpose` x (R_F … R_1)ᵀ, (…, n).

    Each factor is block-diagonal in an order of the inputs.

    x (…, n), R (F, blocks, b, b). orders (F, 2, n): the order of each factor and its inverse; None: inputs are not
    reordered.
    """
    levels = range(len(R))
    for i in levels if transpose else reversed(levels):
        factor = R[i].mT if transpose else R[i]
        if orders is None:
            x = rotate(x, factor)
        else:
            x = rotate(x.index_select(-1, orders[i, 0]), factor).index_select(-1, orders[i, 1])
    return x


def gram_distance(P: Tensor) -> Tensor:
    """Return ‖P Pᵀ - I‖_F: how far the rows of P are from orthonormal."""
    return torch.linalg.norm(P @ P.T - torch.eye(len(P), device=P.device, dtype=P.dtype))


def compact_reflections(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return (U, T) of a product of Householder reflections in compact form, I - U T Uᵀ.

    The product is (I - 2 û_1 û_1ᵀ) (I - 2 û_2 û_2ᵀ) …, with û_k the normalised columns of u. u, U (n, r), T (r, r).
    """
    U = u / u.norm(dim=0)
    half = torch.eye(u.shape[1], dtype=u.dtype, device=u.device) / 2
    # T⁻¹ = ½ I + striu(UᵀU)
    return U, torch.linalg.solve_triangular((U.T @ U).triu(1) + half, 4 * half * half, upper=True)


def gram_schmidt(u: Tensor) -> Tensor:
    """Return u (n, r) with its columns made orthonormal, one after another.

    A column becomes 0 if at most 1e-5 of its norm is left after the projections on those before it.
    """
    columns: list[Tensor] = []
    for column in u.unbind(1):
        v = column
        for q in columns:
            v = v - (q @ v) * q
        norm = v.norm()
        depends = norm <= 1e-5 * column.norm()
        columns.append(torch.where(depends, 0, v / torch.where(depends, 1, norm)))
    return torch.stack(columns, dim=1)


def plain_reflect(x: Tensor, U: Tensor, T: Tensor) -> Tensor:
    """Return x Hᵀ = x - (x U) Tᵀ Uᵀ in the dtype of x, by plain operations in the dtype of U; the reference.

    x (…, n), U (n, r), T (r, r).
    """
    z = x.to(U.dtype)
    return (z - (z @ U) @ T.T @ U.T).to(x.dtype)


def reflect(x: Tensor, U: Tensor, T: Tensor) -> Tensor:
    """Return x Hᵀ = x - (x U) Tᵀ Uᵀ in the dtype of x, without a temporary of full width.

    x (…, n), U (n, r), T (r, r).

    For many rows (`worth_it`), keep x and r numbers per row for the backward pass; for few it is `plain_reflect`.
    """
    return _Reflect.apply(x, U, T) if worth_it(x) else plain_reflect(x, U, T)


class _Reflect(Function):
    """The function of `reflect`."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, U: Tensor, T: Tensor) -> Tensor:
        """Return x - (x U) Tᵀ Uᵀ in the dtype of x. Keeps x, U, T and h = x U."""
        flat = x.reshape(-1, x.shape[-1]).to(U.dtype)
        h = flat @ U
        ctx.save_for_backward(x, U, T, h)
        return torch.addmm(flat, h @ T.T, U.T, alpha=-1).to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[object, ...]:
        """Return the gradients of x, U and T, each None without need.

        That of x is g - (g U) T Uᵀ. Products are in the dtype of U, and the gradient of x in that of x. For a second
        derivative h is computed again.
        """
        x, U, T, h = ctx.saved_tensors
        need_x, need_U, need_T = ctx.needs_input_grad
        flat = x.reshape(-1, x.shape[-1]).to(U.dtype)
        if torch.is_grad_enabled():  # for a second derivative: h as a function of x and U
            h = flat @ U
        rows = g.reshape(-1, g.shape[-1]).to(U.dtype)
        down = rows @ U  # (rows, r)
        dh = down @ T
        dx = torch.addmm(rows, dh, U.T, alpha=-1).to(x.dtype).view(x.shape) if need_x else None
        dU = -(flat.T @ dh) - rows.T @ (h @ T.T) if need_U else None
        dT = -(down.T @ h) if need_T else None
        return dx, dU, dT


def plain_rotate_pairs(z: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """Return c ⊙ z + s ⊙ z′ in the dtype of z, by plain operations in that of c; the reference.

    z′ is z with the two numbers of each pair exchanged. z (…, n), c and s (n / g, 2, g / 2). A rotation has s (-sin,
    sin).
    """
    pairs = z.to(c.dtype).view(*z.shape[:-1], *c.shape)
    return torch.addcmul(pairs * c, pairs.flip(-2), s).flatten(-3).to(z.dtype)


def rotate_pairs(z: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """Return c ⊙ z + s ⊙ z′ as `plain_rotate_pairs`; for many rows without a copy of the halves, keeping z in its own
    dtype.

    Fewer than `FUSED_FROM` rows, and compilers and transforms, get the plain operations. With gradients, an autograd
    function is used where `worth_it(z)`.
    """
    if torch.is_grad_enabled():
        return _RotatePairs.apply(z, c, s) if worth_it(z) else plain_rotate_pairs(z, c, s)
    return _rotate_pairs(z, c, s) if z.numel() >= FUSED_FROM * z.shape[-1] and eager() else plain_rotate_pairs(z, c, s)


def _rotate_pairs(z: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """Return c ⊙ z + s ⊙ z′ in the dtype of z: z times c in new memory, then each half added in place."""
    pairs = z.to(c.dtype).view(*z.shape[:-1], *c.shape)
    y = pairs * c
    y[..., 0, :].addcmul_(pairs[..., 1, :], s[:, 0])
    y[..., 1, :].addcmul_(pairs[..., 0, :], s[:, 1])
    return y.flatten(-3).to(z.dtype)


class _RotatePairs(Function):
    """The function of `rotate_pairs`."""

    @staticmethod
    def forward(ctx: Context, z: Tensor, c: Tensor, s: Tensor) -> Tensor:
        """Return c ⊙ z + s ⊙ z′. Keeps z in its dtype, c and s."""
        ctx.save_for_backward(z, c, s)
        return _rotate_pairs(z, c, s)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of z, c and s, each None without need.

        That of z is g rotated with the two rows of s exchanged. Those of c and s are products of g and z, summed over
        rows, in c's dtype.
        """
        z, c, s = ctx.saved_tensors
        need_z, need_c, need_s = ctx.needs_input_grad
        pairs, out = (t.to(c.dtype).unflatten(-1, c.shape) for t in (z, g))
        (z1, z2), (g1, g2) = pairs.unbind(-2), out.unbind(-2)
        rows = tuple(range(z.dim() - 1))
        dc = (out * pairs).sum(rows) if need_c else None
        ds = torch.stack(((g1 * z2).sum(rows), (g2 * z1).sum(rows)), 1) if need_s else None
        return _rotate_pairs(g, c, s.flip(1)) if need_z else None, dc, ds
