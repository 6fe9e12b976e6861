# SPDX-License-Identifier: Apache-2.0
"""The linear layer x (W + ΔW)ᵀ + b as one product, in place of x Wᵀ + x ΔWᵀ; and classes of ΔW that it takes.

Each ΔW knows how to add itself to W, and the gradients of its fields: - `Dense`: a matrix; - `Factored`: s · B A; -
`Hadamard`: (a b) ⊙ (c d); - `Modulated`: W ⊙ (B A) + D C; - `Rescaled`: a ⊙ W + b 1ᵀ, with a number for each row; -
`Difference`: B A - B₀ A₀, two products of high rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding

from graft.kernels.eager import Context, Function, VmapFunction, once, only_backward

Call = Callable[..., Tensor]  # (x, weight, bias) → the output of a linear layer
InputGradient = Callable[..., Tensor]  # (gradient of that output (rows, out), weight) → gradient of its input (rows, n)


class Addend(Protocol):
    """ΔW (out, n): a NamedTuple of tensors, and of facts.

    One that is wider than its weight has `dense()`, ΔW as a tensor. It may have `rows(part)`, the ΔW of a slice of the
    weight's rows, and `multiply(x)`: x ΔWᵀ in the dtype of x for many rows, or None if forming ΔW is faster.
    """

    def __iter__(self) -> Iterator[object]: ...
    def add_to(self, W: Tensor) -> Tensor:
        """Return W + ΔW, in the dtype of the product. A declaration only."""

    def gradients(self, g: Tensor, x: Tensor, need: Sequence[bool]) -> Sequence[Tensor | None]:
        """Return the gradients of all fields, from that of the output, g (rows, out), and x (rows, n).

        A declaration only.

        need: the fields that get one.
        """


def linear_with(
    W: Tensor, bias: Tensor | None, x: Tensor, delta: Addend, call: Call, input_gradient: InputGradient
) -> Tensor:
    """Return x (W + ΔW)ᵀ + bias in the dtype of x, computed in the dtype of W + ΔW and rounded once.

    For a W in bfloat16 and a wider ΔW, products with both are added instead (`multiplies_apart`). The backward pass
    forms W + ΔW again: only x, W and the fields of ΔW are kept. W gets no gradient.

    Args:
        W: (out, n).
        bias: (out,).
        x: (…, n).
        call: (x, weight, bias) → the output of the layer.
        input_gradient: (gradient of that output (rows, out), weight) → gradient of its input (rows, n).
    """
    return _OneProduct.apply(x, W, bias, type(delta), call, input_gradient, *delta)


def holds(numbers: Tensor, W: Tensor) -> bool:
    """Return True if the dtype of `numbers` represents every value of W's dtype, so that W + ΔW rounds nothing of W."""
    return torch.promote_types(W.dtype, numbers.dtype) == numbers.dtype


class _OneProduct(Function):
    """The function of `linear_with`."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, W: Tensor, bias: Tensor | None, kind: Callable[..., Any], call: Call,
        input_gradient: InputGradient, *fields: object,
    ) -> Tensor:  # fmt: skip
        """Return the output of the layer with W + ΔW, computed in their wider dtype, in the dtype of x.

        The bias is cast to that dtype. If `multiplies_apart`, x is multiplied by ΔW first, in the dtype of W, and the
        product with W is added in the same operation, which rounds once. Keeps x, W and the fields of ΔW for the
        backward pass, but not the sum.
        """
        ctx.save_for_backward(x, W, *[f if isinstance(f, Tensor) else None for f in fields])
        ctx.facts = [None if isinstance(f, Tensor) else f for f in fields]
        delta, dtype = kind(*fields), widest(W, *fields)
        ctx.options = kind, input_gradient, dtype, None if bias is None else bias.dtype
        if not multiplies_apart(W, dtype):
            bias = None if bias is None else bias.to(dtype)
            return call(x.to(dtype), delta.add_to(W), bias).to(x.dtype)
        y = delta.multiply(x) if hasattr(delta, "multiply") else None
        y = call(x, form_rounded(delta, W, False), None) if y is None else y
        y.view(-1, len(W)).addmm_(x.reshape(-1, x.shape[-1]), W.T)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[object, ...]:
        """Return the gradients of x (through W + ΔW, formed again), bias and the fields of ΔW, as far as needed.

        Those of the fields come from `kind.gradients`. None for W and the others. If `multiplies_apart`, the sum is
        rounded to the dtype of W: that costs the gradient of x no more than its own rounding does.
        """
        x, W, *tensors = ctx.saved_tensors
        kind, input_gradient, dtype, bias_dtype = ctx.options
        delta = kind(*[fact if t is None else t for t, fact in zip(tensors, ctx.facts)])
        need_x, _, need_bias, _, _, _, *need = ctx.needs_input_grad
        apart = multiplies_apart(W, dtype)
        rows, flat = (t.reshape(-1, t.shape[-1]).to(W.dtype if apart else dtype) for t in (g, x))
        dx = None
        if need_x:
            total = form_rounded(delta, W, True) if apart else delta.add_to(W)
            dx = input_gradient(rows, total).to(x.dtype).view(x.shape)
        dbias = rows.sum(0, dtype=dtype).to(bias_dtype) if need_bias else None
        field_grads = delta.gradients(rows, flat, need) if any(need) else [None] * len(need)
        return dx, None, dbias, None, None, None, *field_grads


def widest(*fields: object) -> torch.dtype:
    """Return the common dtype, by torch's promotion, of all floating-point tensors among `fields`.

    Other values are ignored. Raises TypeError if there is none.
    """
    dtypes = [f.dtype for f in fields if isinstance(f, Tensor) and f.is_floating_point()]
    return reduce(torch.promote_types, dtypes)


def multiplies_apart(W: Tensor, dtype: torch.dtype) -> bool:
    """Return True if products with W and ΔW apart, in bfloat16, replace one product with their sum in `dtype`.

    That is so if W is in bfloat16 and ΔW is not. bfloat16 has the exponents of float32: a ΔW far below the steps of W
    keeps its leading digits, while the sum would lose it. Products in float32 take at least twice as long.
    """
    return W.dtype == torch.bfloat16 != dtype


PART = 1 << 17  # numbers of a matrix that stay in the cache for several operations


def split_rows(W: Tensor) -> Iterator[slice]:
    """Yield slices of rows of a matrix (out, n), of at most `PART` numbers each, or of one row if that has more."""
    step = max(1, PART // max(1, W.shape[1]))
    return (slice(at, at + step) for at in range(0, len(W), step))


def form_rounded(delta: Any, W: Tensor, with_weight: bool) -> Tensor:
    """Return ΔW, or W + ΔW if `with_weight`, computed in the wider dtype and rounded to that of W, (out, n).

    If autograd does not record and `delta` can be cut by rows, it is formed part by part, which saves wide temporaries.
    """
    if torch.is_grad_enabled() or not hasattr(delta, "rows"):
        return (delta.add_to(W) if with_weight else delta.dense()).to(W.dtype)
    out = torch.empty_like(W)
    for part in split_rows(W):
        some = delta.rows(part)
        out[part] = some.add_to(W[part]) if with_weight else some.dense()
    return out


def split_gradient(g: Tensor, x: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield gᵀ x, the gradient of ΔW (out, n), in `dtype`, in slices of rows. g (rows, out), x (rows, n).

    Where autograd records, as for a second derivative, there is one slice.
    """
    G = g.T @ x
    for part in [slice(None)] if torch.is_grad_enabled() else split_rows(G):
        yield part, G[part].to(dtype)


class Dense(NamedTuple):
    """A ΔW that is a plain matrix."""

    delta: Tensor  # (out, n)

    def add_to(self, W: Tensor) -> Tensor:
        """Return W + ΔW in the wider of both dtypes, in new memory."""
        return W + self.delta

    def gradients(self, g: Tensor, x: Tensor, need: Sequence[bool]) -> tuple[Tensor]:
        """Return (gᵀ x,), the gradient of the matrix, whatever `need` says."""
        return (g.T @ x,)


def low_rank_pays(rows: int, out: int, n: int, r: int, need_A: bool, need_B: bool) -> bool:
    """Return True if forming W + s · B A, once in each direction, costs less in training than multiplying by the
    factors.

    Costs are multiplications: out · n · ((2 + need_A + need_B) r + rows) against rows · r · ((2 + need_A) n + (2 +
    need_B) out). x has `rows` rows.

    need_A, need_B: the factor gets a gradient, by way of that of W.
    """
    apart = rows * r * ((2 + need_A) * n + (2 + need_B) * out)
    return out * n * ((2 + need_A + need_B) * r + rows) < apart


class Factored(NamedTuple):
    """ΔW = s · B A."""

    A: Tensor  # (r, n)
    B: Tensor  # (out, r)
    scale: float

    def add_to(self, W: Tensor) -> Tensor:
        """Return W + s · B A in new memory. W has the dtype of the factors."""
        return torch.addmm(W, self.B, self.A, alpha=self.scale)

    def gradients(self, g: Tensor, x: Tensor, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """Return the gradients s · Bᵀ G of A and s · G Aᵀ of B, each None without need; None for the scale.

        g and x are matrices. G = gᵀ x is computed in their dtype, and the product then cast to that of A.
        """
        G = (g.T @ x).to(self.A.dtype)
        dA = (self.B.T @ G) * self.scale if need[0] else None
        dB = (G @ self.A.T) * self.scale if need[1] else None
        return dA, dB, None


def plain_hadamard(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Return (a b) ⊙ (c d), (out, n), by plain operations; the reference. a, c (out, r), b, d (r, n)."""
    return (a @ b) * (c @ d)


def is_narrow(r: int, out: int, n: int) -> bool:
    """Return True if factors of rank r² are the better choice: they have less than half of the numbers of (out, n)."""
    return 2 * r * r * (out + n) < out * n


def narrow(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Return A (r², n) and B (out, r²) with (a b) ⊙ (c d) = B A.

    A has the products of all pairs of rows of b and d, B those of all pairs of columns of a and c.
    """
    return (b[:, None] * d).flatten(0, 1), (a[:, :, None] * c[:, None]).flatten(1)


class Hadamard(NamedTuple):
    """ΔW = scale · (a b) ⊙ (c d), not formed yet."""

    a: Tensor  # (out, r)
    b: Tensor  # (r, n)
    c: Tensor
    d: Tensor
    scale: float
    shape: tuple[int, ...]  # of ΔW

    def dense(self) -> Tensor:
        """Return ΔW = scale · (a b) ⊙ (c d) in `shape`; autograd keeps only the factors."""
        return self.scale * multiply_hadamard(*self[:4]).reshape(self.shape)

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns of ΔW = scale · (a b) ⊙ (c d) that `ids` (…) name, (…, out), from columns of b and d
        alone.
        """
        return self.scale * (embedding(ids, self.b.T) @ self.a.T) * (embedding(ids, self.d.T) @ self.c.T)

    def product(self, x: Tensor) -> None:
        """Return None, whatever x is: for few rows, too, the matrix has to be formed."""

    def linear_with(
        self, W: Tensor, bias: Tensor | None, x: Tensor, call: Call, input_gradient: InputGradient
    ) -> Tensor | None:
        """Return x (W + scale · (a b) ⊙ (c d))ᵀ + bias by one product.

        Return None if W has another dtype than the factors, since the sum would round.
        """
        return linear_with(W, bias, x, self, call, input_gradient) if W.dtype == self.a.dtype else None

    def add_to(self, W: Tensor) -> Tensor:
        """Return W + scale · (a b) ⊙ (c d) in new memory, for W of two dimensions."""
        return torch.addcmul(W, self.a @ self.b, self.c @ self.d, value=self.scale)

    def gradients(self, g: Tensor, x: Tensor, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """Return the gradients of a, b, c and d, always all, from scale · gᵀ x; None for scale and shape."""
        return *factor_gradients((g.T @ x) * self.scale, *self[:4]), None, None


def multiply_hadamard(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Return (a b) ⊙ (c d), (out, n), and keep only the factors for the backward pass: both products are as large as
    ΔW.

    Tracers other than torch.compile, and forward-mode derivatives, get the plain operation. All four gradients are
    always computed.
    """
    return _HadamardProduct.apply(a, b, c, d) if only_backward() else plain_hadamard(a, b, c, d)


class _HadamardProduct(VmapFunction):
    """The function of `multiply_hadamard`."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        """Return (a b) ⊙ (c d)."""
        return (a @ b) * (c @ d)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of a, b, c and d, always all and never None: `factor_gradients`."""
        return factor_gradients(grad, *ctx.saved_tensors)


def factor_gradients(grad: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of a, b, c and d, always all, from that of (a b) ⊙ (c d).

    They are computed in the widest dtype of the four.
    """
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.promote_types(c.dtype, d.dtype))
    a, b, c, d = (t.to(wide) for t in (a, b, c, d))  # autocast may have made some of them
    left = grad * (c @ d)
    right = grad * (a @ b)
    return left @ b.T, a.T @ left, right @ d.T, c.T @ right


class Modulated(NamedTuple):
    """ΔW = W ⊙ (B A) + D C, not formed yet. W gets no gradient."""

    W: Tensor  # (out, in, *kernel)
    B: Tensor  # (out, r)
    A: Tensor  # (r, in · kernel)
    D: Tensor | None = None  # (out, r); None: no D C
    C: Tensor | None = None  # (r, in · kernel)

    def rows(self, part: slice) -> Modulated:
        """Return the ΔW of some rows of W: W, B and D are cut, A and C shared."""
        return Modulated(self.W[part], self.B[part], self.A, None if self.D is None else self.D[part], self.C)

    def dense(self) -> Tensor:
        """Return ΔW = W ⊙ (B A) + D C in the shape and memory layout of W; without D no D C."""
        delta = self.W * product_like(self.B, self.A, self.W).view(self.W.shape)
        return delta if self.D is None else delta + product_like(self.D, self.C, self.W).view(self.W.shape)  # type: ignore[arg-type]

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns of ΔW = W ⊙ (B A) + D C that `ids` (…) name, (…, out), without forming ΔW; without D no D
        C.
        """
        columns = embedding(ids, self.W.T) * (embedding(ids, self.A.T) @ self.B.T)
        return columns if self.D is None else columns + embedding(ids, self.C.T) @ self.D.T  # type: ignore[union-attr]

    def product(self, x: Tensor) -> None:
        """Return None, whatever x is: for few rows, too, the matrix has to be formed."""

    def linear_with(
        self, W: Tensor, bias: Tensor | None, x: Tensor, call: Call, input_gradient: InputGradient
    ) -> Tensor | None:
        """Return x (W + ΔW)ᵀ + bias with ΔW = W ⊙ (B A) + D C, by one product; None if the factors' dtype cannot hold
        W's.
        """
        return linear_with(W, bias, x, self, call, input_gradient) if holds(self.A, W) else None

    def add_to(self, W: Tensor) -> Tensor:
        """Return W + W ⊙ (B A) + D C in new memory, in the dtype of the factors and the layout of W; without D
        no D C.
        """
        P = product_like(self.B, self.A, W)
        S = torch.addcmul(W, self.W, P) if W.dtype == P.dtype else (self.W * P).add_(W)
        return S if self.D is None or self.C is None else S.addmm_(self.D, self.C)

    def gradients(self, g: Tensor, x: Tensor, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """Return None for W and the gradients of B, A, D and C from G = gᵀ x: (G ⊙ W) Aᵀ, Bᵀ (G ⊙ W), G Cᵀ and Dᵀ G.

        Those of B and A are always computed. D and C get None without the second product, or if neither needs one.
        """
        second = self.D is not None and self.C is not None and (need[3] or need[4])
        parts = [self.rows(part)._gradients(G, second) for part, G in split_gradient(g, x, self.A.dtype)]
        dB, dA, dD, dC = zip(*parts)
        return None, torch.cat(dB), sum(dA), *((torch.cat(dD), sum(dC)) if second else (None, None))

    def _gradients(self, G: Tensor, second: bool) -> tuple[Tensor | None, ...]:
        """Return the gradients of B, A, D and C from that of ΔW, G (out, n); None for D and C without `second`."""
        inner = G * self.W
        dB, dA = inner @ self.A.T, self.B.T @ inner
        return (dB, dA, G @ self.C.T, self.D.T @ G) if second else (dB, dA, None, None)  # type: ignore[union-attr]


def product_like(B: Tensor, A: Tensor, like: Tensor) -> Tensor:
    """Return B A, (out, n).

    For a `like` of two dimensions that is not contiguous, it is computed as (Aᵀ Bᵀ)ᵀ, a transposed view.
    """
    return (A.T @ B.T).T if like.dim() == 2 and not like.is_contiguous() else B @ A


class Rescaled(NamedTuple):
    """ΔW = a ⊙ W + b 1ᵀ, not formed yet. W gets no gradient."""

    W: Tensor  # (out, in, *kernel)
    a: Tensor | None  # (out, 1) or (1,); None: zero, and b as well
    b: Tensor | None

    def dense(self) -> Tensor:
        """Return ΔW = a ⊙ W + b 1ᵀ in the shape of W; zeros without a and b."""
        if self.a is None or self.b is None:
            return torch.zeros_like(self.W)
        return torch.addcmul(self.b, self.a, self.W.flatten(1)).view(self.W.shape)

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns of ΔW = a ⊙ W + b 1ᵀ that `ids` (…) name: (…, out); zeros without a and b."""
        columns = embedding(ids, self.W.T)
        if self.a is None or self.b is None:
            return torch.zeros_like(columns)
        return columns * self.a.flatten() + self.b.flatten()

    def product(self, x: Tensor) -> None:
        """Return None, whatever x is: for few rows, too, the matrix has to be formed."""

    def linear_with(
        self, W: Tensor, bias: Tensor | None, x: Tensor, call: Call, input_gradient: InputGradient
    ) -> Tensor | None:
        """Return x (W + ΔW)ᵀ + bias in the dtype of x: x Wᵀ times 1 + a, plus b times the sum of x.

        Return None if W does not begin at the same memory as the W of ΔW. Without a and b it is the layer alone.
        input_gradient is unused: autograd records these operations.
        """
        if W.data_ptr() != self.W.data_ptr():
            return None
        if self.a is None or self.b is None:
            return call(x, W, None if bias is None else bias.to(x.dtype))
        x = once(x)
        y = call(x, W, None) * (1 + self.a.flatten())
        y = y.addcmul_(x.sum(-1, keepdim=True, dtype=y.dtype), self.b.flatten())
        return (y if bias is None else y.add_(bias)).to(x.dtype)


class Difference(NamedTuple):
    """ΔW = B A - B₀ A₀, not formed yet; 0 where both products are the same. B₀ and A₀ get no gradient."""

    B: Tensor  # (out, r)
    A: Tensor  # (r, n)
    B0: Tensor
    A0: Tensor
    shape: tuple[int, ...]  # of ΔW

    def rows(self, part: slice) -> Difference:
        """Return the ΔW of some rows: B and B₀ are cut, A and A₀ shared.

        The shape gets the number of rows first; its other sizes stay.
        """
        shape = len(self.B[part]), *self.shape[1:]
        return Difference(self.B[part], self.A, self.B0[part], self.A0, shape)

    def dense(self) -> Tensor:
        """Return ΔW = B A - B₀ A₀ in `shape`."""
        return (self.B @ self.A - self.B0 @ self.A0).view(self.shape)

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns of ΔW = B A - B₀ A₀ that `ids` (…) name, (…, out), from columns of A and A₀ alone."""
        return embedding(ids, self.A.T) @ self.B.T - embedding(ids, self.A0.T) @ self.B0.T

    def product(self, x: Tensor) -> Tensor | None:
        """Return x ΔWᵀ, (…, out), by the four factors; None if x has so many rows that forming ΔW takes fewer
        multiplications.
        """
        (out, r), n = self.B.shape, self.A.shape[1]
        rows = x.numel() // n
        if 2 * r * rows * (out + n) > out * n * (2 * r + rows):
            return None
        return x @ self.A.T @ self.B.T - x @ self.A0.T @ self.B0.T

    def linear_with(
        self, W: Tensor, bias: Tensor | None, x: Tensor, call: Call, input_gradient: InputGradient
    ) -> Tensor | None:
        """Return x (W + B A - B₀ A₀)ᵀ + bias by one product; None if the factors' dtype cannot hold W's."""
        return linear_with(W, bias, x, self, call, input_gradient) if holds(self.A, W) else None

    def add_to(self, W: Tensor) -> Tensor:
        """Return W + B A - B₀ A₀ in new memory, in the dtype of A.

        If W is stored as (in, out), the result is stored so, too; else it is contiguous.
        """
        B, A, B0, A0, shape = self
        if W.T.is_contiguous() and not W.is_contiguous():
            return Difference(A.T, B.T, A0.T, B0.T, shape[::-1]).add_to(W.T).T
        return torch.addmm(torch.addmm(W.contiguous().to(A.dtype), B, A), B0, A0, alpha=-1)

    def gradients(self, g: Tensor, x: Tensor, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """Return the gradients G Aᵀ of B and Bᵀ G of A, always, with G = gᵀ x in the dtype of A; None for B₀, A₀ and
        shape.
        """
        G = (g.T @ x).to(self.A.dtype)
        return G @ self.A.T, self.B.T @ G, None, None, None


class Replacement(NamedTuple):
    """ΔW = B A - W₀, not formed yet: the product B A replaces W₀, which gets no gradient."""

    B: Tensor  # (out, r)
    A: Tensor  # (r, n)
    W0: Tensor  # (out, n, *kernel), the weight without adapters

    def dense(self) -> Tensor:
        """Return ΔW = B A - W₀ in the shape of W₀, in the wider dtype."""
        return (self.B @ self.A).view(self.W0.shape) - self.W0

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns of ΔW that `ids` (…) name, (…, out), from columns of A and W₀ alone."""
        return embedding(ids, self.A.T) @ self.B.T - embedding(ids, self.W0.T)

    def product(self, x: Tensor) -> None:
        """Return None, whatever x is: a product that reads W₀ is no faster than forming ΔW."""

    def linear_with(
        self, W: Tensor, bias: Tensor | None, x: Tensor, call: Call, input_gradient: InputGradient
    ) -> Tensor | None:
        """Return x (W + ΔW)ᵀ + bias: (x Aᵀ) Bᵀ + bias if W is W₀ and that takes fewer multiplications in training,
        else one product with the sum.

        Return None if W has another dtype than the factors, since the sum would round.
        """
        if W.dtype != self.A.dtype:
            return None
        (out, r), n = self.B.shape, self.A.shape[1]
        rows = x.numel() // n
        if W is self.W0 and rows * r * (2 * out + 3 * n) < out * n * (3 * rows + 2 * r):
            return call(call(x, self.A, None), self.B, bias)
        return linear_with(W, bias, x, Dense(self.dense()), call, input_gradient)
