# SPDX-License-Identifier: Apache-2.0
"""A weight W + Σ s · B A that is never formed where a module multiplies by it.

`make_sum` returns a tensor that represents the sum, of one matrix or of a stack, such as that of experts.

Selecting from a stack, transposing, and products with inputs use W, A and B apart, so that the cost is that of the
matrices in use. Any other operation sees the sum itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graft.kernels.low_rank import autocast
from graft.kernels.waits import differences

SumPart = tuple[Tensor, Tensor, float]  # A (…, r, in), B (…, out, r), s
Keywords = dict[str, object] | None  # keyword arguments
signature = cache(inspect.signature)


class Summed(Tensor):
    """The tensor W + Σ s · B A, with W (…, out, in), that is formed only where an operation needs it.

    Operations of `HANDLERS` use W, A and B apart; facts such as the shape are read without forming; others get the sum.

    flipped: the last two dimensions of the sum are exchanged.
    """

    W: Tensor
    parts: list[SumPart]
    flipped: bool

    @staticmethod
    def __new__(cls, W: Tensor, parts: list[SumPart], flipped: bool) -> Summed:
        """Return a tensor without memory that keeps the three arguments.

        It has the dtype and device of W and requires no gradient; shape and strides are those of W, or of its transpose
        if `flipped`.
        """
        shown = W.mT if flipped else W
        tensor: Summed = Tensor._make_wrapper_subclass(
            cls, shown.shape, strides=shown.stride(), dtype=W.dtype, device=W.device, requires_grad=False
        )
        tensor.W, tensor.parts, tensor.flipped = W, parts, flipped
        return tensor

    def materialize(self) -> Tensor:
        """Return the sum as a plain tensor, in the dtype of W, with its last two dimensions exchanged if `flipped`.

        Each product is cast to W's dtype before it is added.
        """
        W = self.W
        for A, B, s in self.parts:
            W = W + (s * (B @ A)).to(W.dtype)
        return W.mT if self.flipped else W

    def times(self, x: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return x (W + Σ s · B A)ᵀ without forming the sum; updates are computed in the dtype of their factors, or
        autocast's.

        product: (x, M) → x M, for M (…, in, out).
        """
        y = product(x, self.W.mT)
        for A, B, s in self.parts:
            A, B = autocast(x, A, B)
            y = y + (product(product(x.to(A.dtype), A.mT), B.mT) * s).to(y.dtype)
        return y

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: Keywords = None
    ) -> object:
        """Run a function on sums: a fact (such as a shape) directly, a function with a handler by it, any other with
        the sums formed, also within lists and dicts of the arguments.

        A handler is found by the function or its name. One that cannot take the keyword arguments or returns
        NotImplemented is passed over. Torch functions are not intercepted meanwhile.
        """
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function in FACTS:
                return function(*args, **kwargs)
            handler = HANDLERS.get(function) or HANDLERS.get(getattr(function, "__name__", ""))
            if handler is not None and (not kwargs or can_bind(handler, args, kwargs)):
                out = handler(function, *args, **kwargs)
                if out is not NotImplemented:
                    return out
            return function(*form_sums(args), **form_sums(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: Keywords = None
    ) -> object:
        """Run an operation below autograd with the sums formed."""
        return function(*form_sums(args), **form_sums(kwargs or {}))


def can_bind(handler: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    """Return True if a handler has parameters for the function as first argument and for `args` and `kwargs`.

    Nothing is called.
    """
    try:
        signature(handler).bind(None, *args, **kwargs)
    except TypeError:
        return False
    return True


def make_sum(W: Tensor, parts: list[SumPart], flipped: bool = False) -> Tensor:
    """Return a tensor that represents W + Σ s · B A, and is formed only where an operation needs it.

    Args:
        W: (…, out, in).
        parts: A (…, r, in), B (…, out, r) and s of each product.
        flipped: show the sum as (…, in, out).
    """
    return Summed(W, parts, flipped)


def form_sums(value: object) -> Any:
    """Return a value with each `Summed` replaced by the sum itself, within lists, tuples and dicts too.

    A list or tuple becomes a new one of its class, a dict a plain dict. Named tuples are returned as they are.
    """
    if isinstance(value, Summed):
        return value.materialize()
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(form_sums(v) for v in value)
    if isinstance(value, dict):
        return {key: form_sums(v) for key, v in value.items()}
    return value


def _select(function: object, W: Summed, index: Any) -> object:
    """Return the `Summed` of one or some matrices of a stack (…, out, in), for an integer or integer indices up to
    (n,).

    Return NotImplemented for other indices, such as slices and masks, and for a sum that is no stack.
    """
    one = isinstance(index, int) or (isinstance(index, Tensor) and not index.is_floating_point() and index.dim() < 2)
    if not one or W.W.dim() != 3 or (isinstance(index, Tensor) and index.dtype == torch.bool):
        return NotImplemented
    return Summed(W.W[index], [(A[index], B[index], s) for A, B, s in W.parts], W.flipped)


def _transpose(function: object, W: Summed, a: int, b: int) -> object:
    """Return the `Summed` with its last two dimensions exchanged, with the same tensors.

    NotImplemented if `a` and `b`, which may be negative, are not exactly these two.
    """
    last = {W.dim() - 1, W.dim() - 2}
    if {a % W.dim(), b % W.dim()} != last:
        return NotImplemented
    return Summed(W.W, W.parts, not W.flipped)


def _t(function: object, W: Summed) -> object:
    """Return the transposed `Summed`, with the same tensors; NotImplemented for a stack, unless the function
    is `mT`.
    """
    return Summed(W.W, W.parts, not W.flipped) if W.dim() == 2 or function == MT else NotImplemented


def _return_sum(function: object, W: Summed, *args: object, **kwargs: object) -> object:
    """Return the `Summed` itself, whatever the arguments: it has no memory to make contiguous."""
    return W


def _linear(function: object, x: Tensor, weight: object, bias: Tensor | None = None) -> object:
    """Return x Wᵀ + bias without forming the sum; NotImplemented if the weight is no sum of two dimensions, or x is a
    sum.
    """
    if not isinstance(weight, Summed) or weight.dim() != 2 or isinstance(x, Summed):
        return NotImplemented
    y = _multiply_right(torch.matmul, x, Summed(weight.W, weight.parts, not weight.flipped))
    return y if y is NotImplemented or bias is None else y + bias


def _matmul(function: Any, x: Any, y: Any) -> Any:
    """Return the product with a sum on either side, without forming it: M x is (xᵀ Mᵀ)ᵀ.

    Returns NotImplemented for two sums, if the other operand is a vector, or, for M x, if either operand has fewer than
    two dimensions.
    """
    if isinstance(x, Summed) and isinstance(y, Summed):
        return NotImplemented
    if isinstance(y, Summed):
        return _multiply_right(function, x, y)
    if x.dim() < 2 or y.dim() < 2:
        return NotImplemented
    out = _multiply_right(function, y.mT, Summed(x.W, x.parts, not x.flipped))
    return out if out is NotImplemented else out.mT


def _multiply_right(function: Any, x: Tensor, M: Summed) -> Any:
    """Return x M without forming the sum, by `function`; NotImplemented for an x of one dimension.

    An M that is not `flipped` is transposed part by part first.
    """
    if not M.flipped or x.dim() < 2:  # x M with M (in, out) as shown: the sum is stored as (out, in)
        if x.dim() < 2:
            return NotImplemented
        M = Summed(M.W.mT, [(B.mT, A.mT, s) for A, B, s in M.parts], True)
    return M.times(x, function)


def _multiply_grouped(function: Any, x: Tensor, M: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the products of rows of x, sorted by expert, with the matrices of a stack, without forming the sums.

    `function`, torch's grouped product, multiplies by W; each expert's rows get their updates on top, in the dtype of
    the factors or of autocast. Rows behind the last offset belong to no expert, and get no update. The host waits for
    the offsets. Return NotImplemented if M is no `Summed` stack, x is one, or offsets are missing.

    offs, in args or kwargs: the end of each expert's rows.
    """
    offs = kwargs.get("offs", args[0] if args else None)
    if not isinstance(M, Summed) or isinstance(x, Summed) or offs is None or M.dim() != 3:
        return NotImplemented
    if not M.flipped:
        M = Summed(M.W.mT, [(B.mT, A.mT, s) for A, B, s in M.parts], True)
    y = function(x, M.W.mT, *args, **kwargs)
    sizes = differences(offs, len(x))
    sizes = [*sizes, len(x) - sum(sizes)]  # the last: rows of no expert
    rows = x.split(sizes)
    used = [e for e, n in enumerate(sizes[:-1]) if n]
    for A, B, s in M.parts:
        A, B = autocast(x, A, B)
        pieces = [((rows[e].to(A.dtype) @ A[e].mT) @ B[e].mT * s).to(y.dtype) for e in used]
        y = y + torch.cat([*pieces, y.new_zeros(sizes[-1], y.shape[1])])
    return y


def _get(name: str) -> object:
    """Return the getter of a property of torch's Tensor, as `__torch_function__` gets it."""
    return getattr(Tensor, name).__get__


MT = _get("mT")
FACTS = {
    _get("shape"), _get("dtype"), _get("device"), _get("ndim"), _get("requires_grad"), _get("is_leaf"), _get("layout"),
    _get("is_cuda"), _get("is_cpu"), _get("is_sparse"), _get("is_quantized"), _get("is_meta"), _get("grad_fn"),
    _get("itemsize"), _get("_backward_hooks"),
    Tensor.size, Tensor.dim, Tensor.stride, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__,
    Tensor.get_device, Tensor.is_contiguous, Tensor.element_size, Tensor.ndimension, torch.is_floating_point,
    torch.numel,
}  # fmt: skip
# handlers by the names that torch's and Tensor's functions share; a property's getter has no name, and is the key
HANDLERS: dict[object, Callable[..., object]] = {
    "__getitem__": _select,
    "transpose": _transpose,
    **dict.fromkeys(("t", _get("T"), MT), _t),
    "contiguous": _return_sum,
    "linear": _linear,
    **dict.fromkeys(("matmul", "__matmul__", "bmm", "mm"), _matmul),
    "__rmatmul__": lambda function, M, x: _matmul(torch.matmul, x, M),
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _multiply_grouped),
}
