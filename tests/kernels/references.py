# SPDX-License-Identifier: Apache-2.0
"""Plain references of kernels that the library itself never runs: what a kernel has to compute, as simple as can be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graft.kernels import experts


def plain_run_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: experts.UpdatedStack,
    act: Callable[[Tensor], Tensor],
    down: experts.UpdatedStack,
    norm: Callable[[Tensor], Tensor] | None = None,
    group: Tensor | None = None,
) -> Tensor:
    """The reference of `run_experts`: token by token, with dense matrices."""

    def product(stack: experts.UpdatedStack, v: Tensor, e: int, t: int) -> Tensor:
        W = stack.matrices.dense([e], v.dtype)[0]
        y = W @ v
        for part in stack.parts:
            if part.group is None or (group is not None and part.group == int(group[t])):
                update = (
                    (part.A[e], part.B[e])
                    if isinstance(part, experts.LowRankUpdate)
                    else part.form(e, [u[e] for u in part.form.tensors], W)
                )
                z = update[0] @ v
                for B in update[1:]:
                    z = B @ z
                y = y + z * (1 if part.gate is None else part.gate[t])
        return y if stack.bias is None else y + stack.bias[e]

    out = []
    for t, v in enumerate(x):
        y = torch.zeros_like(v)
        for e, w in zip(index[t].tolist(), weights[t]):
            if 0 <= e < up.matrices.shape[0]:
                z = product(down, act(product(up, v, e, t)), e, t)
                y = y + w * (z if norm is None else norm(z))
        out.append(y)
    return torch.stack(out)


def plain_blocks(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The reference. x (…, in), A (k, in / k, r), B (k, r, out / k) → (…, out)."""
    k = len(A)
    rows = []
    for j in range(k):
        blocks = (A[n].chunk(k, 1)[j] @ B[j].chunk(k, 0)[n] for n in range(k))
        rows.append(torch.cat(list(blocks)).T)  # (out / k, in)
    return x @ torch.cat(rows).T


def plain_multiply_sampled(x: Tensor, W: Tensor, places: Tensor) -> Tensor:
    """The reference of `multiply_sampled`."""
    some = torch.zeros_like(x)
    some.view(-1)[places] = x.reshape(-1)[places]
    return some @ W.T


def plain_linear_with(W: Tensor, bias: Tensor | None, x: Tensor, delta: Tensor) -> Tensor:
    """The reference for every ΔW, given as a matrix. W and delta (out, n), x (…, n), bias (out,) → (…, out)."""
    y = x @ W.T + x @ delta.T
    return y if bias is None else y + bias


def plain_row_norms(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The reference. W (out, n), A (r, n), B (out, r) → (out,)."""
    return (W + B @ A).norm(dim=1)


def plain_rotate(x: Tensor, R: Tensor) -> Tensor:
    """The reference: x R, block by block, computed in the dtype of R. x (…, blocks · b), R (blocks, b, b)."""
    z = x.to(R.dtype).unflatten(-1, R.shape[:2])
    return torch.einsum("...kb,kbc->...kc", z, R).flatten(-2).to(x.dtype)
