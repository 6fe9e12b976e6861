# SPDX-License-Identifier: Apache-2.0
"""The weight of a linear layer by its own forward: what it makes of the rows of the identity matrix."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graft.core.effect import HALF
from graft.storage.dense import NUMBERS

ROWS = 512  # of the identity in one call
TOLERANCE = 0.03  # relative: activations may be rounded to 8 bits
SIZES = (1.0, 1.0, 8.0, 0.125)  # of random rows, so that what bends or clips is seen


F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(f: F) -> F:
    """Keep a compiler from looking inside. What torch.compiler.disable makes does so too, and imports the compiler."""
    f._torchdynamo_disable = True  # type: ignore[attr-defined]
    return f


@uncompiled
def by_identity(m: nn.Module, dims: tuple[int, int], device: torch.device | None, dtype: torch.dtype) -> Tensor:
    """Return the weight (out, in) of a linear layer, as new memory."""
    run = quiet(m)
    W = torch.empty(dims, device=device, dtype=dtype)
    zero = output(run, torch.zeros(1, dims[1], device=device, dtype=dtype))  # a bias that is out of reach
    for columns, rows in _blocks(dims[1], device, dtype):
        W[:, columns] = (output(run, rows) - zero).T
    return W


@uncompiled
def not_linear(m: nn.Module, dims: tuple[int, int], device: torch.device | None, dtype: torch.dtype) -> str | None:
    """Say why a module is not y = W x + bias with its own bias; None if it is. Hold no more than a block of W."""
    run = quiet(m)
    x = torch.randn(len(SIZES), dims[1], generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    x = (x * torch.tensor(SIZES, device="cpu")[:, None]).to(device, dtype)
    zero = output(run, torch.zeros_like(x[:1])).float()
    y, sums = output(run, x).float() - zero, torch.zeros(len(SIZES), dims[0], device=device)
    for columns, rows in _blocks(dims[1], device, dtype):
        sums += x[:, columns].float() @ (output(run, rows).float() - zero)
    if y.shape != sums.shape or not _near(sums, y):
        return "it is not linear: its output is not the sum of what it makes of each input"
    return not_affine(m, dims, device, dtype)


@uncompiled
def not_affine(m: nn.Module, dims: tuple[int, int], device: torch.device | None, dtype: torch.dtype) -> str | None:
    """Say that a module adds something else to W x than its own bias; None if it does not."""
    bias = getattr(m, "bias", None)  # first: a call may put it away again
    zero = output(quiet(m, keep_bias=True), torch.zeros(1, dims[1], device=device, dtype=dtype))[0]
    if not _near(zero.float(), torch.zeros_like(zero).float() if bias is None else bias.detach().float()):
        return "its output for an input of zeros is not its bias"
    return None


def quiet(m: nn.Module, keep_bias: bool = False) -> nn.Module:
    """Return a module with the same tensors, without hooks, in evaluation mode and with a bias of zeros.

    What its forward sets on itself is lost, so that a reading leaves nothing behind.
    """
    made = copy.copy(m)
    made.__dict__.update({key: type(v)(v) for key, v in m.__dict__.items() if key in _OWN})
    made.__dict__.update({key: type(v)() for key, v in m.__dict__.items() if "_hooks" in key and v is not None})
    made.__dict__["training"] = False
    for name, child in m._modules.items():
        made._modules[name] = None if child is None else quiet(child, keep_bias=True)
    bias = getattr(m, "bias", None)
    if isinstance(bias, Tensor) and not keep_bias:
        held: Any = next((made.__dict__[key] for key in _OWN if "bias" in made.__dict__[key]), made.__dict__)
        held["bias"] = torch.zeros_like(bias.detach())
    return made


_OWN = ("_parameters", "_buffers", "_modules")


def tensors_of(m: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of a module, its weight first, and those that it holds as plain attributes last."""
    held = {**m._parameters, **m._buffers}
    for t in (held.pop("weight", None), *held.values(), *vars(m).values()):
        if isinstance(t, Tensor):
            yield t
    for child in m.children():
        yield from tensors_of(child)


def dtype_of(m: nn.Module) -> torch.dtype | None:
    """Return the dtype in which a module computes: what it says, or that of scales in half precision.

    Scales in float32 tell nothing: many layers compute in the dtype of their input.
    """
    named: Any = getattr(m, "compute_dtype", None)
    if isinstance(named, torch.dtype):
        return named
    weight = m._parameters.get("weight")
    if weight is not None and weight.dtype in NUMBERS:
        return weight.dtype
    return next((t.dtype for t in tensors_of(m) if t.dtype in HALF), None)


def _blocks(n: int, device: torch.device | None, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows of the identity, and which they are."""
    for start in range(0, n, ROWS):
        size = min(ROWS, n - start)
        rows = torch.zeros(size, n, device=device, dtype=dtype)
        rows.diagonal(start).fill_(1)
        yield slice(start, start + size), rows


@torch.no_grad()
def output(m: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        y: Any = m.forward(x)
    return y[0] if isinstance(y, tuple) else y


def _near(found: Tensor, goal: Tensor) -> bool:
    scale = goal.norm(dim=-1)
    return bool(((found - goal).norm(dim=-1) <= TOLERANCE * scale + 1e-6).all())
