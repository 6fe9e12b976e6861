# SPDX-License-Identifier: Apache-2.0
"""Products of Householder reflections in compact WY form, H = I - U T Uᵀ (Schreiber and Van Loan, 1989)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graft.kernels.function import Function
from graft.kernels.worth import worth_it


def compact(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return (U, T) of (I - 2 û_1 û_1ᵀ) (I - 2 û_2 û_2ᵀ) …, û_k the normalised columns of u. u, U (n, r), T (r, r)."""
    U = u / u.norm(dim=0)
    half = torch.eye(u.shape[1], dtype=u.dtype, device=u.device) / 2
    # T⁻¹ = ½ I + striu(UᵀU)
    return U, torch.linalg.solve_triangular((U.T @ U).triu(1) + half, 4 * half * half, upper=True)


def gram_schmidt(u: Tensor) -> Tensor:
    """Make the columns of u orthonormal one after another; one that depends on those before it becomes 0."""
    columns: list[Tensor] = []
    for column in u.unbind(1):
        v = column
        for q in columns:
            v = v - (q @ v) * q
        norm = v.norm()
        depends = norm <= 1e-5 * column.norm()
        columns.append(torch.where(depends, 0, v / torch.where(depends, 1, norm)))
    return torch.stack(columns, dim=1)


def plain(x: Tensor, U: Tensor, T: Tensor) -> Tensor:
    """The reference: x Hᵀ, computed in the dtype of U. x (…, n), U (n, r), T (r, r)."""
    z = x.to(U.dtype)
    return (z - (z @ U) @ T.T @ U.T).to(x.dtype)


def reflect(x: Tensor, U: Tensor, T: Tensor) -> Tensor:
    """Compute `plain` without a temporary of full width; keep x as it came and r numbers per row."""
    return _Reflect.apply(x, U, T) if worth_it(x) else plain(x, U, T)  # type: ignore[no-any-return]


class _Reflect(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, U: Tensor, T: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(U.dtype)
        h = flat @ U
        ctx.save_for_backward(x, U, T, h)
        return torch.addmm(flat, h @ T.T, U.T, alpha=-1).to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
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
